"Keys, signatures and their files, in careless and in hostile hands."

import base64
import json
import os
import shutil
import stat
import subprocess
from dataclasses import replace
from datetime import datetime

import pytest
from candidates import PHRASE, people
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.padding import PKCS7
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import python, results

from sensequant.core.errors import GateError
from sensequant.core.ledger import Head
from sensequant.core.settings import project_root
from sensequant.core.types import IST
from sensequant.govern.approvals import (
    Approval,
    approval_bytes,
    check_keys_dir,
    check_name,
    fingerprint_of,
    load_private,
    new_key,
    pinned_keys,
    private_path,
    public_path,
    read_approval,
    read_public,
    read_roles,
    role_slug,
    sign,
    statement,
    verify_approval,
    write_public,
)

AT = datetime(2026, 3, 2, 10, tzinfo=IST)
WORD = Approval("ab" * 32, "release_1", "run_1", "Risk Manager", "", ("staging",), AT)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "a home"


@pytest.fixture
def keys_dir(tmp_path):
    return tmp_path / "my keys"


@pytest.fixture
def asha(home, keys_dir):
    new_key("Asha", PHRASE, keys_dir, home)
    return load_private("Asha", PHRASE, keys_dir)


# Names


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_a_name_stays_in_its_folder_or_is_refused(text):
    try:
        name = check_name(text)
    except GateError as error:
        assert "plain words" in str(error)
        return
    folder = project_root() / "keys"
    for path in (private_path(folder, name), public_path(folder, name)):
        assert path.resolve().is_relative_to(folder) and path.name.startswith(name)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "a\0b", "a\nb", "~", "-x", "Auto", "x" * 65, "é"]
)
def test_a_name_that_is_no_plain_word_makes_nothing(name, home, keys_dir):
    with pytest.raises(GateError, match="plain words"):
        new_key(name, PHRASE, keys_dir, home)
    assert not keys_dir.exists() and not home.exists()


# Keys


def test_a_key_is_its_owners_alone_and_encrypted(asha, home, keys_dir):
    path = private_path(keys_dir, "Asha")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys_dir.stat().st_mode) == 0o700
    assert b"\n-----BEGIN ENCRYPTED PRIVATE KEY-----" in path.read_bytes()
    assert asha.key.private_bytes_raw().hex() not in repr(asha)
    assert [p.name for p in keys_dir.iterdir()] == ["Asha.pem"]
    assert read_public(home, "Asha") == asha.public
    assert fingerprint_of(asha.public.public_hex) == asha.public.fingerprint


def test_a_umask_that_opens_everything_opens_no_key(home, keys_dir):
    before = os.umask(0)
    try:
        new_key("Asha", PHRASE, keys_dir, home)
    finally:
        os.umask(before)
    assert stat.S_IMODE(private_path(keys_dir, "Asha").stat().st_mode) == 0o600
    assert stat.S_IMODE(keys_dir.stat().st_mode) == 0o700


@pytest.mark.parametrize("phrase", ["", "1234567"])
def test_a_short_passphrase_makes_no_key(phrase, home, keys_dir):
    with pytest.raises(GateError, match="8 characters"):
        new_key("Asha", phrase, keys_dir, home)
    assert not keys_dir.exists()


def test_a_passphrase_is_any_text(home, keys_dir):
    phrase = "पासफ़्रेज़ है यह 🔑"
    new_key("Asha", phrase, keys_dir, home)
    assert load_private("Asha", phrase, keys_dir).public == read_public(home, "Asha")


def test_a_key_is_never_overwritten(asha, home, keys_dir):
    before = private_path(keys_dir, "Asha").read_bytes()
    for name in ("Asha", "ASHA"):
        with pytest.raises(GateError, match="never overwritten"):
            new_key(name, PHRASE, keys_dir, home)
    assert private_path(keys_dir, "Asha").read_bytes() == before
    with pytest.raises(GateError, match="a name has one key"):
        new_key("Asha", PHRASE, keys_dir.with_name("other keys"), home)
    assert not private_path(keys_dir.with_name("other keys"), "Asha").exists()


MAKE = """
import sys
from pathlib import Path
from sensequant.core.errors import GateError
from sensequant.govern.approvals import new_key
while not Path(sys.argv[3]).exists():
    pass
try:
    key = new_key("Asha", "correct horse battery", Path(sys.argv[1]), Path(sys.argv[2]))
    print(key.fingerprint)
except GateError as error:
    print("refused")
"""


def test_two_processes_make_one_key_of_a_name(home, keys_dir, tmp_path):
    makers = [python(MAKE, keys_dir, home, tmp_path / "go") for _ in range(3)]
    (tmp_path / "go").touch()
    told = [word for (word,) in results(makers)]
    assert sorted(t == "refused" for t in told) == [False, True, True]
    made = load_private("Asha", "correct horse battery", keys_dir).public
    assert made.fingerprint in told and read_public(home, "Asha") == made


@pytest.mark.parametrize("part", ["data", "data/keys", "runs/x", "reports"])
def test_private_keys_stay_out_of_the_home(part, home):
    with pytest.raises(GateError, match=r"must lie outside .*SENSEQUANT_KEYS_DIR"):
        check_keys_dir(home / part, home)


def test_private_keys_stay_out_of_the_clone_even_through_a_link(home, tmp_path):
    (tmp_path / "link").symlink_to(project_root())
    for folder in (project_root(), project_root() / "keys", tmp_path / "link/keys"):
        with pytest.raises(GateError, match="must lie outside"):
            new_key("Asha", PHRASE, folder, home)
    assert not (project_root() / "keys").exists()


def test_a_folder_that_others_enter_is_refused_and_left_as_it_is(home, keys_dir):
    keys_dir.mkdir(mode=0o755)
    with pytest.raises(GateError, match="chmod 700"):
        new_key("Asha", PHRASE, keys_dir, home)
    assert stat.S_IMODE(keys_dir.stat().st_mode) == 0o755 and not list(keys_dir.iterdir())


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o601, 0o777])
def test_a_key_that_others_could_read_is_refused(mode, asha, keys_dir):
    path = private_path(keys_dir, "Asha")
    path.chmod(mode)
    with pytest.raises(GateError, match=rf"found {mode:o}; in .*chmod 600"):
        load_private("Asha", PHRASE, keys_dir)
    path.chmod(0o600)
    assert load_private("Asha", PHRASE, keys_dir).public == asha.public


def test_a_key_that_is_a_link_is_refused(asha, keys_dir, tmp_path):
    path = private_path(keys_dir, "Asha")
    shutil.move(path, tmp_path / "elsewhere.pem")
    path.symlink_to(tmp_path / "elsewhere.pem")
    with pytest.raises(GateError, match="readable file"):
        load_private("Asha", PHRASE, keys_dir)


@pytest.mark.parametrize("phrase", ["", "wrong horse battery", PHRASE + " ", PHRASE.upper()])
def test_a_wrong_passphrase_opens_nothing(phrase, asha, keys_dir):
    with pytest.raises(GateError, match=r"must open the key.*cannot be recovered"):
        load_private("Asha", phrase, keys_dir)


def test_a_key_cut_anywhere_or_with_any_bit_changed_is_never_another_key(asha, keys_dir):
    path, opened = private_path(keys_dir, "Asha"), 0
    whole = path.read_bytes()
    spoilt = [whole[:n] for n in range(1, len(whole) - 1)]
    for n, byte in enumerate(whole):
        spoilt += [whole[:n] + bytes([byte ^ (1 << b)]) + whole[n + 1 :] for b in (0, 3, 6)]
    for data in spoilt:
        path.write_bytes(data)
        try:
            assert load_private("Asha", PHRASE, keys_dir).public == asha.public
            opened += 1  # a line end or the padding of base64
        except GateError as error:
            assert "a private key must be" in str(error) or "must open the key" in str(error)
    assert opened <= 10
    path.write_bytes(whole)
    assert load_private("Asha", PHRASE, keys_dir).public == asha.public


def tlv(tag, *parts):
    "A part of a DER file, up to 255 bytes long."
    body = b"".join(parts)
    long = b"\x81" if len(body) > 127 else b""
    return bytes([tag]) + long + bytes([len(body)]) + body


def sealed(raw, phrase):
    "Bytes as an Ed25519 key, encrypted as RFC 8018 says (PBES2: PBKDF2, AES-256-CBC)."
    salt, start = b"s" * 16, b"i" * 16
    key = PBKDF2HMAC(hashes.SHA256(), 32, salt, 2048).derive(phrase.encode())
    ed25519, pbes2, pbkdf2, sha256, aes = (
        bytes.fromhex(f"06{len(h) // 2:02x}{h}")
        for h in (
            "2b6570",
            "2a864886f70d01050d",
            "2a864886f70d01050c",
            "2a864886f70d0209",
            "60864801650304012a",
        )
    )
    inner = tlv(0x30, tlv(2, b"\0"), tlv(0x30, ed25519), tlv(4, tlv(4, raw)))
    padder, cipher = PKCS7(128).padder(), Cipher(AES(key), CBC(start)).encryptor()
    secret = cipher.update(padder.update(inner) + padder.finalize()) + cipher.finalize()
    rounds = tlv(0x30, tlv(4, salt), tlv(2, b"\x08\0"), tlv(0x30, sha256, b"\x05\0"))
    how = tlv(0x30, tlv(0x30, pbkdf2, rounds), tlv(0x30, aes, tlv(4, start)))
    der = tlv(0x30, tlv(0x30, pbes2, how), tlv(4, secret))
    kind = b"ENCRYPTED PRIVATE KEY-----"
    return b"-----BEGIN " + kind + b"\n" + base64.encodebytes(der) + b"-----END " + kind + b"\n"


def test_a_key_of_the_wrong_length_in_a_good_envelope_is_refused(asha, keys_dir):
    "What damage may leave: it opens, and OpenSSL fails with an error that it has no name for."
    path = private_path(keys_dir, "Asha")
    path.write_bytes(sealed(b"k" * 32, PHRASE))
    assert load_private("Asha", PHRASE, keys_dir).public != asha.public
    for n in (0, 31, 33):
        path.write_bytes(sealed(b"k" * n, PHRASE))
        with pytest.raises(GateError, match="must open the key; found a wrong one, or a damaged"):
            load_private("Asha", PHRASE, keys_dir)


def test_openssl_opens_the_key_and_signs_what_counts(asha, keys_dir, tmp_path):
    "The formats are everybody's: a signature made without this package is as good."
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    words = replace(WORD, name="Asha", fingerprint=asha.public.fingerprint)
    (tmp_path / "told").write_bytes(statement(words))
    key = ["-inkey", str(private_path(keys_dir, "Asha")), "-passin", f"pass:{PHRASE}"]
    files = ["-rawin", "-in", str(tmp_path / "told"), "-out", str(tmp_path / "signature")]
    subprocess.run(["openssl", "pkeyutl", "-sign", *key, *files], check=True)
    signature = (tmp_path / "signature").read_bytes().hex()
    verify_approval(replace(words, signature=signature), asha.public)


def put(keys_dir, key, lock):
    path = private_path(keys_dir, "Odd")
    path.touch(0o600)
    kind = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    path.write_bytes(key.private_bytes(*kind))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
)
def test_a_key_of_another_kind_is_refused(make, asha, keys_dir):
    put(keys_dir, make(), serialization.BestAvailableEncryption(PHRASE.encode()))
    with pytest.raises(GateError, match="must be Ed25519"):
        load_private("Odd", PHRASE, keys_dir)


def test_a_key_without_encryption_is_refused(asha, keys_dir):
    put(keys_dir, asha.key, serialization.NoEncryption())
    with pytest.raises(GateError, match="whole, and encrypted"):
        load_private("Odd", PHRASE, keys_dir)


def test_every_changed_byte_of_a_public_key_is_seen(asha, home):
    path = public_path(home, "Asha")
    whole = path.read_bytes()
    for n, byte in enumerate(whole):
        path.write_bytes(whole[:n] + bytes([byte ^ 1]) + whole[n + 1 :])
        with pytest.raises(GateError, match=str(path).replace("(", r"\(")):
            read_public(home, "Asha")
    path.write_bytes(whole)
    assert write_public(home, asha.public) == path


# Signatures


def test_a_signature_is_of_one_statement(asha):
    mine = sign(WORD, asha)
    verify_approval(mine, asha.public)
    assert json.loads(statement(mine))["context"] == "sensequant approval 1"
    changes = {
        "manifest_sha256": "ab" * 31 + "ac",
        "release_id": "release_2",
        "run_id": "run_2",
        "role": "Business Owner",
        "environments": ("staging", "production"),
        "at": AT.replace(second=1),
        "register": Head(1, "00" * 32),
    }
    for name, value in changes.items():
        assert statement(replace(mine, **{name: value})) != statement(mine)
        with pytest.raises(GateError, match="over this approval"):
            verify_approval(replace(mine, **{name: value}), asha.public)


def test_a_signature_of_the_bare_statement_is_none(asha):
    mine = sign(WORD, asha)
    bare = statement(mine).replace(b"sensequant approval 1", b"sensequant release 1")
    with pytest.raises(GateError, match="over this approval"):
        verify_approval(replace(mine, signature=asha.key.sign(bare).hex()), asha.public)


@pytest.mark.parametrize("text", ["", "00", "zz", "00" * 64, "00" * 65])
def test_a_text_that_is_no_signature_is_none(text, asha):
    with pytest.raises(GateError, match="over this approval"):
        verify_approval(replace(sign(WORD, asha), signature=text), asha.public)


def test_another_key_in_the_same_name_is_seen(asha, home, keys_dir, tmp_path):
    new_key("Asha", PHRASE, tmp_path / "mallory", tmp_path / "another home")
    false = load_private("Asha", PHRASE, tmp_path / "mallory")
    with pytest.raises(GateError, match="must be by the key of Asha"):
        verify_approval(sign(WORD, false), asha.public)
    lying = replace(sign(WORD, false), fingerprint=asha.public.fingerprint)
    with pytest.raises(GateError, match="over this approval"):
        verify_approval(lying, asha.public)


def test_every_changed_cut_or_added_byte_of_an_approval_is_seen(asha, tmp_path):
    path, mine = tmp_path / "risk-manager.json", sign(WORD, asha)
    whole = approval_bytes(mine)
    spoilt = [whole[:n] + bytes([b ^ 1]) + whole[n + 1 :] for n, b in enumerate(whole)]
    spoilt += [whole[:n] for n in range(len(whole))] + [whole + b"\n", b" " + whole]
    for data in spoilt:
        path.write_bytes(data)
        with pytest.raises(GateError):
            verify_approval(read_approval(path), asha.public, path)
    path.write_bytes(whole)
    assert read_approval(path) == mine


@pytest.mark.parametrize(
    "text", ["null", "1", '"x"', "[]", "{}", "[" * 100_000, '{"at": 1}', "\udcff", "NaN"]
)
def test_what_is_no_approval_is_refused_in_words(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(GateError, match=r"as it was written.*x\.json"):
        read_approval(path)


def test_fields_of_another_type_are_refused(asha, tmp_path):
    raw = json.loads(approval_bytes(sign(WORD, asha)))
    for name in raw:
        for value in (None, 1, [], {}, ["a", 1], "x"):
            if raw[name] == value:
                continue
            (tmp_path / "x.json").write_text(json.dumps(raw | {name: value}))
            with pytest.raises(GateError):
                verify_approval(read_approval(tmp_path / "x.json"), asha.public)


# Roles and pins


def test_roles_are_one_whatever_their_case_and_blanks():
    assert read_roles(" Risk  Manager ,risk manager,Auditor,") == ("Risk Manager", "Auditor")
    assert role_slug("Risk Manager / Desk 2") == "risk-manager-desk-2"
    with pytest.raises(GateError, match="a letter or a digit"):
        read_roles("Auditor,../")


@pytest.mark.parametrize("text", ["Asha", "Asha=", "Asha=12", "=" + "0" * 32, "Asha=" + "g" * 32])
def test_a_pin_that_is_none_shuts_nobody_out_silently(text):
    with pytest.raises(GateError, match=r"must be NAME=FINGERPRINT|plain words"):
        pinned_keys(text)


def test_a_full_disk_leaves_no_half_of_a_key(tmp_path):
    told = python(FILL, tmp_path)
    assert results([told]) == [["room"]]
    assert not list((tmp_path / "keys").iterdir())
    people(tmp_path / "home", tmp_path / "keys", "Asha")
    assert [p.name for p in (tmp_path / "keys").iterdir()] == ["Asha.pem"]


FILL = """
import resource, signal, sys
from pathlib import Path
from sensequant.core.errors import DataError
from sensequant.govern.approvals import new_key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    new_key("Asha", "correct horse battery", Path(sys.argv[1], "keys"), Path(sys.argv[1], "home"))
except DataError as error:
    print("room" if "must have room for Asha.pem" in str(error) else error)
"""
