"""The register and the approvals of candidates: several people at once, sudden death, a full disk,
clocks set back, and hands that reach into every file."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from candidates import MODEL, PHRASE, ROLES, make_candidate, make_run, people, sign_all
from processes import python, results
from typer.testing import CliRunner

from sensequant.core.artifacts import sha256_file
from sensequant.core.errors import DataError, GateError
from sensequant.core.ledger import Head
from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.data.runs import Run
from sensequant.govern.approvals import (
    approval_bytes,
    approvals_folder,
    load_private,
    new_key,
    public_path,
    read_approval,
    sign,
)
from sensequant.govern.promotion import (
    ARROWS,
    STATES,
    Register,
    approve,
    auto_approve,
    check_approvals,
    enrol_key,
    find_run,
    get_candidate_runs,
    get_latest_candidate_run,
    keys_gone,
    known_key,
    nominate,
    register_path,
    reject,
)
from sensequant.ops.main import app

RUN = "live_candidate_20260302_100000"
LEAD, RISK = "Engineering Lead", "Risk Manager"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A home with a candidate and three people; to be copied, never changed."
    base = tmp_path_factory.mktemp("made")
    make_candidate(base / "home")
    people(base / "home", base / "keys", *ROLES)
    return base


@pytest.fixture
def house(made, tmp_path):
    "A home of its own, and its three people."
    shutil.copytree(made / "home", tmp_path / "home")
    return tmp_path / "home", [load_private(n, PHRASE, made / "keys") for n in ROLES]


@pytest.fixture
def signed(house):
    "A home whose candidate is approved."
    home, who = house
    sign_all(Run(RUN, home), *who[:2])
    return home, who


def register(home):
    return Register(register_path(home))


def names(found):
    return [(a.role, a.name) for a in found]


def tamper(path, *statements):
    "Reach into the register past its fence, which is put up again."
    c = sqlite3.connect(path, isolation_level=None)
    fence = c.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in fence:
        c.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        c.execute(statement)
    for _, sql in fence:
        c.execute(sql)
    c.close()


# States


def walk(home, *states):
    "A candidate taken along arrows."
    for to in states:
        facts = {"rollback": "release_x"} if to == "restored" else {}
        register(home).move(RUN, to, by="test", why="to get there", **facts)
    return register(home)


WAYS = {
    "candidate": ["candidate"],
    "ready-for-review": ["candidate", "ready-for-review"],
    "rejected": ["candidate", "rejected"],
}
WAYS["approved"] = [*WAYS["ready-for-review"], "approved"]
WAYS["staged"] = [*WAYS["approved"], "staged"]
WAYS["deployed"] = [*WAYS["staged"], "deployed"]
WAYS["superseded"] = [*WAYS["deployed"], "superseded"]
WAYS["rolled-back"] = [*WAYS["staged"], "rolled-back"]


@pytest.mark.parametrize("held", STATES)
def test_a_candidate_moves_along_arrows_alone(held, tmp_path):
    for to in STATES:
        home = tmp_path / to
        book = walk(home, *WAYS[held])
        if to in ARROWS[held]:
            book.move(RUN, to, by="test", why="a way", rollback="release_x")
            assert book.state(RUN) == to
        else:
            with pytest.raises(GateError, match=f"from {held} a candidate goes to"):
                book.move(RUN, to, by="test", why="no way", rollback="release_x")
            assert book.state(RUN) == held
        assert book.verify().intact


def test_what_was_superseded_returns_by_a_rollback_alone(tmp_path):
    book = walk(tmp_path, *WAYS["superseded"])
    with pytest.raises(GateError, match="only a rollback restores"):
        book.move(RUN, "staged", by="me", why="I want it back")
    book.move(RUN, "staged", by="me", why="the new one fails", rollback="release_20260303_100000")
    assert book.rows("state", RUN)[-1]["rollback"] == "release_20260303_100000"


def test_a_row_tells_who_when_why_and_of_what(tmp_path):
    book = walk(tmp_path, "candidate")
    (row,) = book.rows()
    always = {"kind", "at", "by", "why", "run_id", "release_id", "manifest_sha256", "from", "to"}
    assert always | {"n", "hash"} == set(row)
    assert datetime.fromisoformat(row["at"]).utcoffset() == timedelta(hours=5.5)
    for facts, why in [({"by": " "}, "who"), ({"why": ""}, "reason")]:
        with pytest.raises(GateError, match=why):
            book.move(RUN, "ready-for-review", **{"by": "me", "why": "x"} | facts)
    with pytest.raises(DataError, match="an id must be"):
        book.move("../../x", "candidate", by="me", why="x")
    assert len(book.rows()) == 1


def test_several_rows_are_all_written_or_none(tmp_path):
    book = walk(tmp_path, *WAYS["staged"])
    before = book.head()
    step = {"run_id": RUN, "by": "me", "why": "x"}
    with pytest.raises(GateError):
        book.record(
            [
                ("deploy", step),
                ("state", step | {"to": "deployed"}),
                ("state", step | {"to": "approved"}),
            ]
        )
    assert book.head() == before
    assert book.record([("deploy", step), ("state", step | {"to": "deployed"})]) == [5, 6]


@pytest.mark.parametrize("back", [timedelta(microseconds=1), timedelta(days=400)])
def test_a_clock_that_was_set_back_dates_nothing(back, tmp_path):
    book, now = register(tmp_path), datetime(2026, 3, 2, 10, tzinfo=IST)
    book.move(RUN, "candidate", by="gate", why="judged", now=now)
    for attempt in (
        lambda: book.move(RUN, "ready-for-review", by="gate", why="passed", now=now - back),
        lambda: book.add("deploy", {"by": "me"}, now - back),
        lambda: book.require_now(now - back),
    ):
        with pytest.raises(GateError, match=r"not be dated before .*Check the clock"):
            attempt()
    with pytest.raises(GateError, match="must know its zone"):
        book.add("deploy", {"by": "me"}, now.replace(tzinfo=None))
    assert len(book.rows()) == 1
    book.add("deploy", {"by": "me"}, now)


def test_an_approval_on_a_clock_that_was_set_back_writes_nothing(house):
    home, (asha, *_) = house
    before = register(home).head()
    for back in (1, 86400 * 400):
        past = datetime.now(IST) - timedelta(days=1, seconds=back)
        with pytest.raises(GateError, match="Check the clock"):
            approve(home, RUN, LEAD, asha, now=past)
    assert register(home).head() == before and not approvals_folder(home, RUN).exists()
    with Run(RUN, home).state as state:
        assert state.approvals(RUN) == []


# Nomination


@pytest.mark.parametrize("status", ["ready-for-review", "not-proposed", "rejected"])
def test_a_resumed_run_is_nominated_once(status, tmp_path):
    run = make_candidate(tmp_path, status=status)
    head = register(tmp_path).head()
    sha256 = run.artifacts.sha256("manifest.yaml")
    expected = "candidate" if status == "not-proposed" else status
    assert nominate(run, status, sha256, ["signal: p 0.4"]) == expected
    assert register(tmp_path).head() == head
    with run.state as state:
        assert state.candidate(run.run_id).status == status


def test_a_nomination_killed_in_the_middle_is_completed(tmp_path):
    run, sha256 = make_run(tmp_path)
    with run.state as state:
        state.add_candidate(run.run_id, "ready-for-review", [], True, sha256)
    register(tmp_path).move(
        run.run_id, "candidate", by="gate", why="judged", manifest_sha256=sha256
    )
    assert nominate(run, "ready-for-review", sha256) == "ready-for-review"
    assert [r["to"] for r in register(tmp_path).rows("state")] == ["candidate", "ready-for-review"]


def test_what_was_approved_is_not_nominated_anew(signed):
    home, _ = signed
    run = Run(RUN, home)
    assert nominate(run, "ready-for-review", run.artifacts.sha256("manifest.yaml")) == "approved"
    with pytest.raises(GateError, match="does not change"):
        nominate(run, "ready-for-review", "ab" * 32)


def test_what_a_person_rejected_stays_rejected(house):
    home, _ = house
    reject(home, RUN, "Asha", "the bars are wrong")
    run = Run(RUN, home)
    assert nominate(run, "ready-for-review", run.artifacts.sha256("manifest.yaml")) == "rejected"
    with run.state as state:
        assert (state.candidate(RUN).status, state.candidate(RUN).reasons) == (
            "rejected",
            ("the bars are wrong",),
        )
    assert [c["status"] for c in get_candidate_runs(home=home)] == ["rejected"]


def test_a_run_from_before_the_register_is_taken_into_it(tmp_path):
    run, sha256 = make_run(tmp_path / "home")
    with run.state as state:
        state.add_candidate(run.run_id, "ready-for-review", [], True, sha256)
    home = tmp_path / "home"
    assert get_latest_candidate_run(home)["status"] == "ready-for-review"
    assert register(home).state(run.run_id) is None
    sign_all(run, *people(home, tmp_path / "keys", "Asha", "Bala"))
    assert get_latest_candidate_run(home)["status"] == "approved"


# Approving


def test_two_people_approve_a_candidate(signed):
    home, (asha, bala, _) = signed
    found = check_approvals(home, RUN, "staging")
    assert names(found) == [(LEAD, "Asha"), (RISK, "Bala")]
    assert [a.fingerprint for a in found] == [asha.public.fingerprint, bala.public.fingerprint]
    assert found[1].register.count == found[0].register.count + 1
    assert register(home).state(RUN) == "approved" and register(home).verify().intact
    with Run(RUN, home).state as state:
        assert [(a.role, a.environment) for a in state.approvals(RUN)] == [
            (LEAD, "staging"),
            (RISK, "staging"),
        ]


def test_one_signature_is_not_enough_and_says_what_lacks(house):
    home, (asha, *_) = house
    approve(home, RUN, LEAD, asha)
    with pytest.raises(
        GateError, match=r"no signature of Risk Manager.*--role 'Risk Manager' --key NAME"
    ):
        check_approvals(home, RUN, "staging")


def test_the_order_of_the_signatures_does_not_matter(house):
    home, (asha, bala, _) = house
    approve(home, RUN, RISK, bala)
    approve(home, RUN, "engineering lead", asha)
    assert names(check_approvals(home, RUN, "staging")) == [(LEAD, "Asha"), (RISK, "Bala")]


def test_approving_again_changes_nothing(signed):
    home, (asha, *_) = signed
    head, files = register(home).head(), contents(home)
    assert approve(home, RUN, LEAD, asha).name == "Asha"
    assert (register(home).head(), contents(home)) == (head, files)


def contents(home, run_id=RUN):
    "The signatures that lie there, byte for byte."
    return {p.name: p.read_bytes() for p in approvals_folder(home, run_id).iterdir()}


def refused(home, why, *arguments, **more):
    "An approval is refused with its reason, and nothing is written."
    folder = approvals_folder(home, RUN)
    before = register(home).rows(), sorted(folder.iterdir()) if folder.exists() else []
    with pytest.raises((GateError, DataError), match=why):
        approve(home, *arguments, **more)
    assert (register(home).rows(), sorted(folder.iterdir()) if folder.exists() else []) == before


def test_one_person_does_not_fill_two_roles(house, tmp_path):
    home, (asha, *_) = house
    approve(home, RUN, LEAD, asha)
    refused(home, "a person signs in one role; found Asha", RUN, RISK, asha)


def test_one_key_under_two_names_is_not_enrolled(house, made, tmp_path):
    home, _ = house
    shutil.copytree(made / "keys", tmp_path / "keys")
    (tmp_path / "keys/Asha.pem").rename(tmp_path / "keys/Dinesh.pem")
    with pytest.raises(GateError, match="a key one name"):
        enrol_key(home, "Dinesh", PHRASE, tmp_path / "keys")
    with pytest.raises(GateError, match="a name has one key"):
        enrol_key(home, "asha", PHRASE, tmp_path / "other keys")


def test_a_key_whose_enrolment_was_broken_off_is_enrolled_by_the_same_command(house, tmp_path):
    home, _ = house
    made = new_key("Dinesh", PHRASE, tmp_path / "keys", home)
    with pytest.raises(GateError, match="must be in the register"):
        known_key(register(home), home, "Dinesh")
    assert enrol_key(home, "Dinesh", PHRASE, tmp_path / "keys") == (made, True)
    public_path(home, "Dinesh").unlink()
    with pytest.raises(GateError, match="must open the key"):
        enrol_key(home, "Dinesh", "another passphrase", tmp_path / "keys")
    assert enrol_key(home, "Dinesh", PHRASE, tmp_path / "keys") == (made, True)
    assert known_key(register(home), home, "Dinesh") == made
    assert [r["name"] for r in register(home).rows("key")] == [*ROLES, "Dinesh"]


ENROL = """
import sys
from pathlib import Path
from sensequant.core.errors import GateError
from sensequant.govern.promotion import enrol_key
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    pass
try:
    print(enrol_key(Path(sys.argv[1]), "Dinesh", "correct horse", Path(sys.argv[2]))[0].fingerprint)
except GateError as error:
    print("refused")
"""


def test_the_user_who_enrols_is_the_systems_not_the_environments(house, tmp_path, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "the board")
    enrol_key(house[0], "Dinesh", PHRASE, tmp_path / "keys")
    assert register(house[0]).rows("key")[-1]["by"] not in ("the board", "")


def test_two_machines_enrol_one_key_of_a_name(house, tmp_path):
    home, _ = house
    own = [tmp_path / f"keys {k}" for k in range(2)]
    ready = [python(ENROL, home, keys, tmp_path / "go") for keys in own]
    for process in ready:
        assert process.stdout.readline().strip() == "ready"
    (tmp_path / "go").touch()
    told = [word for (word,) in results(ready)]
    assert sorted(t == "refused" for t in told) == [False, True]
    assert known_key(register(home), home, "Dinesh").fingerprint in told


def test_a_second_person_in_a_role_is_refused(house):
    home, (asha, bala, _) = house
    approve(home, RUN, LEAD, asha)
    refused(home, "a role is signed by one person; found signed by Asha", RUN, LEAD, bala)


@pytest.mark.parametrize(
    ("role", "why"),
    [
        ("Risk Manger", "Did you mean Risk Manager"),
        ("", "found nothing"),
        ("CEO", "must be one of"),
    ],
)
def test_a_role_that_must_not_sign_is_refused(role, why, house):
    refused(house[0], why, RUN, role, house[1][0])


@pytest.mark.parametrize(
    ("environments", "why"),
    [
        (["production"], "simulated bars"),
        (["staging", "production"], "simulated"),
        (["stage"], "Did you mean"),
    ],
)
def test_an_environment_that_the_gate_does_not_allow_is_refused(environments, why, house):
    refused(house[0], why, RUN, LEAD, house[1][0], environments)


@pytest.mark.parametrize(
    "run_id",
    ["../x", f"{RUN}/../{RUN}", "latest", "", RUN + "\n", "live_candidate_20260302_100009", "."],
)
def test_a_run_that_is_none_is_refused(run_id, house):
    refused(house[0], "a run's id must be|a folder of its own", run_id, LEAD, house[1][0])
    with pytest.raises(GateError):
        find_run(house[0], run_id)


def test_a_run_that_is_a_link_to_another_is_refused(house, tmp_path):
    home, (asha, *_) = house
    shutil.move(home / "runs" / RUN, tmp_path / "elsewhere")
    (home / "runs" / RUN).symlink_to(tmp_path / "elsewhere")
    refused(home, "found a link", RUN, LEAD, asha)


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ("not-proposed", "found not-proposed.*--incremental --propose"),
        ("rejected", "found rejected.*new run"),
    ],
)
def test_what_is_not_ready_for_review_is_refused(status, why, house):
    home, (asha, *_) = house
    run = make_candidate(home, 1, status)
    refused(home, why, run.run_id, LEAD, asha)
    with pytest.raises(GateError):
        check_approvals(home, run.run_id, "staging")


def test_a_run_without_a_verdict_is_refused(house):
    home, (asha, *_) = house
    run, _ = make_run(home, 1)
    refused(home, "must have reached its verdict.*sensequant resume", run.run_id, LEAD, asha)


@pytest.mark.parametrize("path", ["manifest.yaml", MODEL, "verdict.json", "inputs.json"])
@pytest.mark.parametrize("how", ["changed", "longer", "gone", "linked", "folder"])
def test_a_file_that_is_not_the_judged_one_is_refused(path, how, house, tmp_path):
    home, (asha, *_) = house
    file = home / "runs" / RUN / path
    whole = file.read_bytes()
    if how == "changed":
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    if how == "longer":
        file.write_bytes(whole + b"\n")
    if how in ("gone", "linked", "folder"):
        file.unlink()
    if how == "linked":
        (tmp_path / "twin").write_bytes(b"" if path == "manifest.yaml" else whole)
        file.symlink_to(tmp_path / "twin")
    if how == "folder":
        file.mkdir()
    refused(home, path.replace(".", r"\."), RUN, LEAD, asha)


def test_a_manifest_put_on_record_anew_is_still_another(house):
    home, (asha, *_) = house
    run = Run(RUN, home)
    data = (run.folder / "manifest.yaml").read_bytes().replace(b"minor", b"hotfix")
    run.artifacts.write_bytes("manifest.yaml", data)
    refused(home, r"must be the one that was judged.*sensequant\.db", RUN, LEAD, asha)
    c = sqlite3.connect(run.state.path)
    c.execute(
        "UPDATE candidates SET manifest_sha256 = ?", (sha256_file(run.folder / "manifest.yaml"),)
    )
    c.commit()
    c.close()
    refused(home, r"must be the one that was judged.*register\.db", RUN, LEAD, asha)


def test_a_manifest_changed_between_two_signatures_stops_the_second_and_the_deployment(house):
    home, (asha, bala, _) = house
    approve(home, RUN, LEAD, asha)
    manifest = home / "runs" / RUN / "manifest.yaml"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"Passed: every", b"Passed: almost every"))
    refused(home, "must be the one that was judged", RUN, RISK, bala)
    with pytest.raises(GateError, match="must be the one that was judged"):
        check_approvals(home, RUN, "staging")
    manifest.write_bytes(whole)
    approve(home, RUN, RISK, bala)
    assert len(check_approvals(home, RUN, "staging")) == 2


# Roles


def test_a_major_release_needs_a_third_person(house):
    home, who = house
    run = make_candidate(home, 1, release_type="major")
    sign_all(run, *who[:2])
    assert register(home).state(run.run_id) == "ready-for-review"
    with pytest.raises(GateError, match="no signature of Business Owner"):
        check_approvals(home, run.run_id, "staging")
    sign_all(run, who[2])
    assert len(check_approvals(home, run.run_id, "staging")) == 3


def test_a_role_taken_out_of_the_settings_must_still_sign(house, monkeypatch):
    home, (asha, *_) = house
    monkeypatch.setenv("SENSEQUANT_RELEASE_ROLES", "Engineering Lead")
    approve(home, RUN, LEAD, asha)
    assert register(home).state(RUN) == "ready-for-review"
    with pytest.raises(GateError, match="no signature of Risk Manager"):
        check_approvals(home, RUN, "staging")


def test_a_role_added_to_the_settings_must_sign_what_was_approved(signed, monkeypatch):
    home, (_, _, chitra) = signed
    monkeypatch.setenv("SENSEQUANT_RELEASE_ROLES", "Engineering Lead, Risk Manager, Auditor")
    with pytest.raises(
        GateError, match="every role must have signed for staging; found no signature of Auditor"
    ):
        check_approvals(home, RUN, "staging")
    approve(home, RUN, "auditor", chitra)
    assert len(check_approvals(home, RUN, "staging")) == 3


def test_production_is_signed_together_with_staging_or_later(house):
    home, (asha, bala, _) = house
    run = make_candidate(home, 1, simulated=False)
    approve(home, run.run_id, LEAD, asha)  # both
    approve(home, run.run_id, RISK, bala, ["staging"])
    assert register(home).state(run.run_id) == "approved"
    register(home).move(run.run_id, "staged", by="release", why="two sessions begin")
    with pytest.raises(GateError, match=r"no signature of Risk Manager.*--environment production"):
        check_approvals(home, run.run_id, "production")
    approve(home, run.run_id, RISK, bala)
    assert [a.environments for a in check_approvals(home, run.run_id, "production")] == [
        ("staging", "production"),
        ("production",),
    ]
    assert len(check_approvals(home, run.run_id, "staging")) == 2
    assert register(home).state(run.run_id) == "staged"


# Keys that count


def test_a_key_that_is_not_pinned_neither_signs_nor_counts(signed, monkeypatch):
    home, (asha, bala, _) = signed
    pins = f"Asha={asha.public.fingerprint}, Bala={bala.public.fingerprint}"
    monkeypatch.setenv("SENSEQUANT_APPROVER_KEYS", pins)
    assert len(check_approvals(home, RUN, "staging")) == 2
    assert keys_gone(register(home), home, RUN, pins) == []
    pins = f"Asha={asha.public.fingerprint}, Bala={'0' * 32}"
    monkeypatch.setenv("SENSEQUANT_APPROVER_KEYS", pins)
    (gone,) = keys_gone(register(home), home, RUN, pins)
    assert gone.startswith("Bala signed it with a key that counts no more: a key must be among")
    with pytest.raises(
        GateError, match=f"must be among approver_keys; found Bala={bala.public.fingerprint}"
    ):
        check_approvals(home, RUN, "staging")
    other = make_candidate(home, 1)
    refused(home, "must be among approver_keys", other.run_id, RISK, bala)


def test_a_public_key_that_was_swapped_counts_no_more(signed, tmp_path):
    home, _ = signed
    (false,) = people(tmp_path / "mallory", tmp_path / "mallory keys", "Asha")
    whole = public_path(home, "Asha").read_bytes()
    shutil.copy(public_path(tmp_path / "mallory", "Asha"), public_path(home, "Asha"))
    with pytest.raises(GateError, match=r"must be the register's.*Asha\.json"):
        check_approvals(home, RUN, "staging")
    refused(home, "must be the register's", make_candidate(home, 1).run_id, LEAD, false)
    public_path(home, "Asha").write_bytes(whole)
    refused(home, "must be the one that was enrolled", make_candidate(home, 2).run_id, LEAD, false)


def test_a_key_that_the_register_does_not_know_signs_nothing(house, tmp_path):
    home, _ = house
    (mallory,) = people(tmp_path / "elsewhere", tmp_path / "keys", "Mallory")
    refused(home, "public key must be readable", RUN, LEAD, mallory)
    shutil.copy(public_path(tmp_path / "elsewhere", "Mallory"), public_path(home, "Mallory"))
    refused(home, "must be in the register", RUN, LEAD, mallory)


# Hands in the files


def outcome(home, environment="staging"):
    "What a check says: the signatures, or the message of a refusal."
    try:
        return names(check_approvals(home, RUN, environment))
    except (GateError, DataError) as error:
        return str(error)


def test_every_changed_byte_of_every_signature_key_and_manifest_is_named(signed):
    home, _ = signed
    files = [*approvals_folder(home, RUN).iterdir()]
    files += [public_path(home, "Asha"), home / "runs" / RUN / "manifest.yaml"]
    for file in files:
        whole = file.read_bytes()
        for n in range(0, len(whole), 1 + len(whole) // 90):
            file.write_bytes(
                whole[:n]
                + bytes([whole[n] ^ (1 << random.Random(n).randrange(8))])
                + whole[n + 1 :]
            )
            assert file.name in outcome(home), (file, n)
        file.unlink()
        assert file.name in outcome(home)
        file.write_bytes(whole)
    assert outcome(home) == [(LEAD, "Asha"), (RISK, "Bala")]


def test_a_changed_byte_of_the_register_changes_no_answer_unnoticed(signed, tmp_path):
    home, _ = signed
    path, fine = register_path(home), outcome(home)
    with sqlite3.connect(path) as c:
        c.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    c.close()
    whole, draw, seen = path.read_bytes(), random.Random(1), 0
    bodies = whole.find(b'{"by":')
    for k in range(150):
        n = draw.randrange(bodies, len(whole)) if k % 2 else draw.randrange(len(whole))
        path.write_bytes(whole[:n] + bytes([whole[n] ^ (1 << draw.randrange(8))]) + whole[n + 1 :])
        for other in ("-wal", "-shm"):
            path.with_name(path.name + other).unlink(missing_ok=True)
        told = outcome(home)
        assert told == fine or "register" in told, told
        seen += told != fine
    assert seen > 50
    path.write_bytes(whole)
    assert outcome(home) == fine


def test_a_signature_put_in_the_place_of_another_is_named(signed):
    home, _ = signed
    folder = approvals_folder(home, RUN)
    shutil.copy(folder / "engineering-lead.json", folder / "risk-manager.json")
    assert "must be the one in the register" in outcome(home)
    assert "risk-manager.json" in outcome(home)


def test_a_signature_of_another_run_is_none_of_this_one(signed):
    home, who = signed
    other = make_candidate(home, 1)
    sign_all(other, *who[:2])
    for name in ("engineering-lead.json", "risk-manager.json"):
        shutil.copy(approvals_folder(home, other.run_id) / name, approvals_folder(home, RUN) / name)
    assert "must be the one in the register" in outcome(home)


def test_a_signature_that_the_register_does_not_know_does_not_count(house, signed):
    home, (asha, bala, _) = signed
    other = make_candidate(home, 1)
    folder = approvals_folder(home, other.run_id)
    folder.mkdir()
    for who, role in ((asha, LEAD), (bala, RISK)):
        made = read_approval(approvals_folder(home, RUN) / f"{role.lower().replace(' ', '-')}.json")
        sha256 = other.artifacts.sha256("manifest.yaml")
        release = other.run_id.replace("live_candidate", "release")
        made = replace(made, run_id=other.run_id, release_id=release, manifest_sha256=sha256)
        (folder / f"{role.lower().replace(' ', '-')}.json").write_bytes(
            approval_bytes(sign(made, who))
        )
    with pytest.raises(GateError, match="no signature of Engineering Lead, Risk Manager"):
        check_approvals(home, other.run_id, "staging")
    sign_all(other, asha, bala)
    assert len(check_approvals(home, other.run_id, "staging")) == 2


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        (["DELETE FROM rows WHERE n = 4"], "row 4 is missing"),
        (
            ["DELETE FROM rows WHERE n = 4", "UPDATE rows SET n = n - 1 WHERE n > 4"],
            "row 4 does not",
        ),
        (
            ["UPDATE rows SET body = replace(body, 'Asha', 'Esha') WHERE n = 3"],
            "row 3 is not as it was",
        ),
        (
            [
                "UPDATE rows SET n = 100 WHERE n = 3",
                "UPDATE rows SET n = 3 WHERE n = 4",
                "UPDATE rows SET n = 4 WHERE n = 100",
            ],
            "row 3 does not follow",
        ),
        (["DELETE FROM rows WHERE n > 5"], "heads? of 6 rows kept in .*risk-manager.json"),
    ],
)
def test_a_register_that_was_altered_is_named(statements, why, signed):
    home, (_, _, chitra) = signed
    assert register(home).head().count == 8  # 2 steps, 3 keys, 2 approvals, 1 step
    tamper(register_path(home), *statements)
    with pytest.raises(
        GateError, match=rf"the register must be as it was written.*{why}.*register\.db"
    ):
        check_approvals(home, RUN, "staging")
    with pytest.raises(GateError, match="the register must be as it was written"):
        approve(home, RUN, RISK, chitra)


def test_a_register_whose_last_row_is_gone_approves_nothing(signed):
    home, _ = signed
    head = register(home).head()
    tamper(register_path(home), "DELETE FROM rows WHERE n = 8")
    assert "must be approved" in outcome(home)
    tamper(register_path(home), "DELETE FROM rows WHERE n = 7")
    assert "no signature of Risk Manager" in outcome(home)
    assert register(home).verify().intact
    assert "head of 8 rows" in register(home).verify([head]).wrong


def replace_register(home, source=None):
    "Another file in the place of the register, as a restored backup would be."
    gc.collect()  # what still holds the old one
    path = register_path(home)
    for name in ("register.db", "register.db-wal", "register.db-shm"):
        path.with_name(name).unlink(missing_ok=True)
    if source:
        shutil.copy(source, path)


def test_an_older_copy_of_the_register_is_seen_by_the_heads_that_signatures_keep(house, tmp_path):
    home, (asha, bala, _) = house
    copies = []
    for role, who in ((LEAD, asha), (RISK, bala)):
        copies.append(tmp_path / f"{role}.db")
        old, copy = sqlite3.connect(register_path(home)), sqlite3.connect(copies[-1])
        old.backup(copy)  # with what its journal holds
        old.close()
        copy.close()
        approve(home, RUN, role, who)
    copies.append(None)  # none at all: a new one begins
    heads = ["the head of 6 rows kept in", "no signature of Risk Manager", "the head of"]
    for copy, told in zip(copies, heads, strict=True):
        replace_register(home, copy)
        assert told in outcome(home), (copy, outcome(home))


def test_a_register_written_anew_from_the_first_row_on_is_seen(signed):
    "Hashes and all: what it then lacks is the heads."
    home, _ = signed
    rows = register(home).rows()
    replace_register(home)
    entries = [
        (r.pop("kind"), {k: v for k, v in r.items() if k not in ("n", "hash")}) for r in rows
    ]
    register(home).record([(kind, body) for kind, body in entries])
    assert register(home).verify().intact
    assert "the register must be as it was written; found the head of" in outcome(home)


def test_a_story_that_cannot_be_is_seen_though_every_hash_fits(tmp_path):
    book = walk(tmp_path, "candidate", "ready-for-review")
    with book._transaction() as c:
        book._enter(
            c,
            "state",
            {"run_id": RUN, "to": "deployed", "by": "x", "why": "x"},
            "2020-01-01T00:00:00+05:30",
        )
    assert "row 3 is no step: from ready-for-review" in book.verify().wrong
    assert register(tmp_path).verify([Head(2, book.rows()[1]["hash"])]).wrong


# Rejecting


@pytest.mark.parametrize("status", ["candidate", "ready-for-review", "approved"])
def test_a_person_rejects_what_is_not_deployed_yet(status, house):
    home, who = house
    run = make_candidate(home, 1, "not-proposed" if status == "candidate" else "ready-for-review")
    if status == "approved":
        sign_all(run, *who[:2])
    reject(home, run.run_id, "Chitra", "capacity is too small")
    row = register(home).rows("state", run.run_id)[-1]
    assert (row["to"], row["by"], row["why"]) == ("rejected", "Chitra", "capacity is too small")
    refused(home, "found rejected", run.run_id, LEAD, who[0])
    with pytest.raises(GateError, match="found rejected"):
        check_approvals(home, run.run_id, "staging")
    reject(home, run.run_id, "Chitra", "again")
    assert register(home).rows("state", run.run_id)[-1] == row


def test_what_is_staged_is_not_rejected_and_a_rejection_has_a_reason(signed):
    home, _ = signed
    with pytest.raises(GateError, match="needs a reason"):
        reject(home, RUN, "Asha", "  ")
    register(home).move(RUN, "staged", by="release", why="x")
    with pytest.raises(GateError, match="from staged a candidate goes to deployed or"):
        reject(home, RUN, "Asha", "too late")


# Automatic


def test_nothing_is_approved_automatically_by_default(house):
    home, _ = house
    assert auto_approve(Run(RUN, home), load_settings()) == "candidate_auto_approve is off"
    assert register(home).state(RUN) == "ready-for-review"


AUTO = {"candidate_auto_approve": True}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"t": 2.99}, "t 2.99 on the hold-out, 3 needed"),
        ({"t": None}, "no t-value of a rank IC on the hold-out, 3 needed"),
        ({"status": "rejected"}, "the candidate is rejected"),
        ({"status": "not-proposed"}, "the candidate is candidate"),
    ],
)
def test_a_hold_out_that_says_too_little_approves_nothing(more, why, tmp_path):
    run = make_candidate(tmp_path, **more)
    assert auto_approve(run, load_settings(**AUTO)) == why
    assert register(tmp_path).rows("approval") == []


def test_an_automatic_approval_is_for_staging_alone(tmp_path, monkeypatch):
    run = make_candidate(tmp_path, simulated=False, t=3.0)
    assert auto_approve(run, load_settings(**AUTO)) == ""
    assert auto_approve(run, load_settings(**AUTO)) == "the candidate is approved"
    (row,) = register(tmp_path).rows("approval")
    assert (row["by"], row["environments"], row["t"], row["threshold"]) == (
        "auto",
        ["staging"],
        3.0,
        3.0,
    )
    with pytest.raises(GateError, match="no signature of"):  # it is off again
        check_approvals(tmp_path, run.run_id, "staging")
    monkeypatch.setenv("SENSEQUANT_CANDIDATE_AUTO_APPROVE", "true")
    (one,) = check_approvals(tmp_path, run.run_id, "staging")
    assert (one.role, one.environments, one.signature) == ("auto", ("staging",), "")
    with monkeypatch.context() as stricter:
        stricter.setenv("SENSEQUANT_CANDIDATE_APPROVAL_THRESHOLD", "3.5")
        with pytest.raises(GateError, match="no signature of"):
            check_approvals(tmp_path, run.run_id, "staging")
    with pytest.raises(GateError, match="no signature of Engineering Lead, Risk Manager"):
        check_approvals(tmp_path, run.run_id, "production")
    manifest = run.folder / "manifest.yaml"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(GateError, match="must be the one that was judged"):
        check_approvals(tmp_path, run.run_id, "staging")


# Several at once

SIGN = """
import sys, time
from pathlib import Path
from sensequant.core.errors import GateError
from sensequant.govern.approvals import load_private
from sensequant.govern.promotion import approve
home, keys, name, go, *pairs = sys.argv[1:]
private = load_private(name, "correct horse battery staple", Path(keys))
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
for pair in pairs:
    run_id, role = pair.split("=")
    try:
        print("signed" if approve(Path(home), run_id, role, private) else "", flush=True)
    except GateError as error:
        print(str(error).split(";")[0].replace(" ", "_"), flush=True)
"""


def together(home, keys_dir, go, orders):
    "Several processes, each a person with orders, begin at the same instant."
    signers = [python(SIGN, home, keys_dir, name, go, *pairs) for name, pairs in orders.items()]
    for signer in signers:
        assert signer.stdout.readline().strip() == "ready"
    go.touch()
    return dict(zip(orders, results(signers), strict=True))


def test_two_people_at_once_both_count(house, made, tmp_path):
    home, _ = house
    runs = [make_candidate(home, n).run_id for n in range(1, 6)]
    orders = {n: [f"{r}={ROLES[n]}" for r in runs] for n in ("Asha", "Bala")}
    told = together(home, made / "keys", tmp_path / "go", orders)
    assert told == {n: ["signed"] * 5 for n in orders}
    for run_id in runs:
        assert len(check_approvals(home, run_id, "staging")) == 2
        assert [r["to"] for r in register(home).rows("state", run_id)][2:] == ["approved"]
    assert register(home).verify().intact


def test_two_people_at_once_in_one_role_are_one(house, made, tmp_path):
    home, _ = house
    runs = [make_candidate(home, n).run_id for n in range(1, 6)]
    orders = {n: [f"{r}={LEAD}" for r in runs] for n in ("Asha", "Bala")}
    told = together(home, made / "keys", tmp_path / "go", orders)
    for run_id, *words in zip(runs, *told.values(), strict=True):
        assert sorted(words) == ["a_role_is_signed_by_one_person", "signed"]
        (row,) = register(home).rows("approval", run_id)
        assert [read_approval(p).name for p in approvals_folder(home, run_id).iterdir()] == [
            row["name"]
        ]


# Sudden death


def sign_in_child(home, who):
    sign_all(Run(RUN, home), *who)


def stage(home):
    "How far an attempt has come: files written, words in the state, rows, and the end."
    folder = approvals_folder(home, RUN)
    files = len(list(folder.glob("*.json"))) if folder.exists() else 0
    with Run(RUN, home).state as state:
        told = len(state.approvals(RUN))
    return files, told, len(register(home).rows("approval", RUN)), register(home).state(RUN)


def test_a_kill_at_any_instant_is_completed_by_approving_again(made, tmp_path):
    _, who = made, [load_private(n, PHRASE, made / "keys") for n in ("Asha", "Bala")]
    draw, fork, seen = random.Random(7), multiprocessing.get_context("fork"), Counter()
    begun = time.monotonic()
    shutil.copytree(made / "home", tmp_path / "timed")
    sign_in_child(tmp_path / "timed", who)
    longest = 1.2 * (time.monotonic() - begun)
    for k in range(40):
        home = tmp_path / f"home {k}"
        shutil.copytree(made / "home", home)
        child = fork.Process(target=sign_in_child, args=(home, who))
        child.start()
        time.sleep(draw.uniform(0, longest))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reached = stage(home)
        seen[reached] += 1
        approved = reached == (2, 2, 2, "approved")
        assert isinstance(outcome(home), list if approved else str), reached
        sign_all(Run(RUN, home), *who)
        assert stage(home) == (2, 2, 2, "approved")
        assert outcome(home) == [(LEAD, "Asha"), (RISK, "Bala")]
        assert register(home).verify().intact
    assert len(seen) >= 3, seen
    print(f"killed at (files, words, rows, state): {dict(seen)}")


STOPS = ["after the file", "after the state", "before everything"]


@pytest.mark.parametrize("stop", STOPS)
def test_a_death_between_two_steps_is_completed_by_approving_again(stop, house):
    "What a kill leaves at each step, made by hand from a whole approval."
    home, (asha, bala, _) = house
    fresh = shutil.copytree(home, home.with_name("fresh"))
    given = approve(home, RUN, LEAD, asha)
    if stop != "before everything":
        folder = approvals_folder(fresh, RUN)
        folder.mkdir(parents=True)
        (folder / "engineering-lead.json").write_bytes(approval_bytes(given))
    if stop == "after the state":
        with Run(RUN, fresh).state as state:
            state.approve(RUN, LEAD, "Asha", "staging", given.manifest_sha256)
    with pytest.raises(GateError, match=r"no signature of Engineering Lead, Risk Manager"):
        check_approvals(fresh, RUN, "staging")
    if stop != "before everything":
        refused(fresh, r"signed by Asha.*Asha can finish it", RUN, LEAD, bala)
    again = approve(fresh, RUN, LEAD, asha)
    assert again == given or stop == "before everything"
    approve(fresh, RUN, RISK, bala)
    assert outcome(fresh) == [(LEAD, "Asha"), (RISK, "Bala")]


# A full disk

FILL = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from candidates import PHRASE, make_candidate, sign_all
from sensequant.core.errors import DataError
from sensequant.govern.approvals import load_private
from sensequant.govern.promotion import check_approvals
disk, keys, base = map(Path, sys.argv[1:4])
who = [load_private(n, PHRASE, keys) for n in ("Asha", "Bala")]
home, refusals = disk / "home", 0
for n in range(1, 13):
    run = make_candidate(home, n)
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
        filler.truncate(max(0, filler.tell() - 4096 * 3 * (n - 1)))
    try:
        sign_all(run, *who)
    except DataError as error:
        refusals += 1
    (disk / "filler").unlink()
    sign_all(run, *who)
    assert len(check_approvals(home, run.run_id, "staging")) == 2
    assert not list(home.rglob("*.tmp"))
print(refusals)
"""


def test_a_full_disk_is_refused_and_approving_again_completes(made, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        shutil.copytree(made / "home", disk / "home")
        told = python(FILL, disk, made / "keys", tmp_path, os.path.dirname(__file__))
        ((refusals,),) = results([told])
        assert 1 <= int(refusals) <= 12
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The commands


@pytest.fixture
def say(house, made, monkeypatch):
    "Run a command in the house."
    monkeypatch.setenv("SENSEQUANT_HOME", str(house[0]))
    monkeypatch.setenv("SENSEQUANT_KEYS_DIR", str(made / "keys"))

    def run(*words, code=0, typed=None, phrase=PHRASE):
        env = {"SIGNING_PASSPHRASE": phrase} if phrase else {}
        done = CliRunner().invoke(app, [*map(str, words)], input=typed, env=env)
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    return run


def sign_with(say, role, key, *more, **how):
    return say("candidates", "approve", "latest", "--role", role, "--key", key, *more, **how)


def test_from_the_first_look_to_approved(say, house):
    home, _ = house
    told = say("candidates", "show", "latest")
    for words in (
        "Status ready-for-review",
        "Engineering Lead missing",
        "Verdict Passed",
        "simulated",
    ):
        assert words in told
    assert f"Next sensequant candidates approve {RUN} --role 'Engineering Lead' --key NAME" in told
    told = sign_with(say, LEAD, "Asha", "--yes")
    assert "Risks 1: simulated_data" in told and "--role 'Risk Manager'" in told
    assert sha256_file(home / "runs" / RUN / "manifest.yaml") in told
    told = sign_with(say, RISK, "Bala", typed="approve\n")
    assert "Status approved" in told
    assert f"Next sensequant release deploy {RUN} --environment staging" in told
    shown = json.loads(CliRunner().invoke(app, ["candidates", "show", RUN, "--json"]).output)
    assert [r["signatures"][0]["name"] for r in shown["roles"]] == ["Asha", "Bala"]
    assert [h["to"] for h in shown["history"]] == ["candidate", "ready-for-review", "approved"]
    assert (shown["register"], shown["changed_files"]) == ("intact", [])
    assert (shown["approved_for"], shown["why_not"]) == (["staging"], "")
    file = approvals_folder(home, RUN) / "risk-manager.json"
    file.write_bytes(file.read_bytes()[:-1])
    told = say("candidates", "show", RUN)
    assert "Approved not yet: an approval must be as it was written" in told
    file.write_bytes(file.read_bytes() + b"\n")
    assert len(check_approvals(home, RUN, "staging")) == 2


def test_what_is_staged_is_signed_for_production_next(say, house):
    home, who = house
    run = make_candidate(home, 1, simulated=False)
    sign_all(run, *who[:2], environments=["staging"])
    register(home).move(run.run_id, "staged", by="release", why="x")
    told = say("candidates", "show", run.run_id)
    assert (
        f"approve {run.run_id} --role 'Engineering Lead' --key NAME --environment production"
        in told
    )
    sign_all(run, *who[:2])
    assert f"release deploy {run.run_id} --environment production" in say(
        "candidates", "show", "latest"
    )


def test_another_word_than_approve_signs_nothing(say, house):
    assert "nothing was signed" in sign_with(say, LEAD, "Asha", typed="yes\n", code=3)
    assert "nothing was rejected" in say(
        "candidates", "reject", RUN, "--why", "x", typed="\n \n", code=3
    )
    assert register(house[0]).state(RUN) == "ready-for-review"


def test_a_passphrase_is_typed_without_an_echo(say):
    told = sign_with(say, LEAD, "Asha", typed=f"approve\n{PHRASE}\n", phrase=None)
    assert PHRASE not in told and "Signed Engineering Lead, Asha" in told


def test_who_cannot_type_is_told_how_a_script_signs_and_nothing_is_signed(say, house):
    told = sign_with(say, LEAD, "Asha", code=3)
    assert "must be the word approve; found no answer" in told and "a script says --yes" in told
    told = sign_with(say, LEAD, "Asha", "--yes", code=3, phrase=None)
    assert "a script sets SIGNING_PASSPHRASE" in told
    assert "a script says --yes" in say("candidates", "reject", RUN, "--why", "so", code=3)
    assert register(house[0]).rows("approval") == []
    assert register(house[0]).state(RUN) in (None, "ready-for-review")


@pytest.mark.parametrize(
    ("role", "key", "more", "why"),
    [
        ("Risk Manger", "Asha", [], "Did you mean Risk Manager?"),
        (LEAD, "Nobody", [], "sensequant keys new 'Nobody'"),
        (LEAD, "../Asha", [], "plain words"),
        (LEAD, "Asha", ["--environment", "production"], "simulated bars"),
    ],
)
def test_what_is_refused_is_refused_in_words(role, key, more, why, say, house):
    assert why in sign_with(say, role, key, "--yes", *more, code=3)
    assert register(house[0]).rows("approval") == []


def test_a_wrong_passphrase_signs_nothing(say, house):
    assert "must open the key" in sign_with(
        say, LEAD, "Asha", "--yes", code=3, phrase="wrong horse"
    )
    assert register(house[0]).rows("approval") == []


def test_a_not_proposed_run_says_how_to_propose(say, house):
    run = make_candidate(house[0], 1, "not-proposed")
    told = say(
        "candidates", "approve", run.run_id, "--role", LEAD, "--key", "Asha", "--yes", code=3
    )
    assert "found not-proposed" in told and "--incremental --propose" in told
    shown = say("candidates", "show", run.run_id)
    assert "Next sensequant run " in shown and "--incremental --propose" in shown


def test_a_rejection_on_the_command_line_is_kept(say, house):
    told = say("candidates", "reject", "latest", "--why", "too little capacity", typed="reject\n")
    assert f"Rejected {RUN}: too little capacity" in told
    row = register(house[0]).rows("state", RUN)[-1]
    assert row["to"] == "rejected" and row["by"]
    assert "found rejected" in sign_with(say, LEAD, "Asha", "--yes", code=3)


def test_lists_are_of_a_status_and_for_scripts(say, house):
    make_candidate(house[0], 1, "rejected")
    rows = json.loads(CliRunner().invoke(app, ["candidates", "list", "--json"]).output)
    assert [r["status"] for r in rows] == ["rejected", "ready-for-review"]
    wanted = {
        "run_id",
        "timestamp",
        "status",
        "training",
        "validation",
        "statistical_tests",
        "artifacts",
    }
    assert wanted <= set(rows[0])
    only = say("candidates", "list", "--status", "ready-for-review")
    assert "ready-for-review" in only and "rejected" not in only
    assert say("candidates", "list", "--status", "deployed") == "no candidate is deployed"
    assert "Did you mean rejected?" in say("candidates", "list", "--status", "reject", code=2)


def test_keys_are_made_shown_and_not_made_twice(say, house, tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_KEYS_DIR", str(tmp_path / "own"))
    told = say("keys", "new", "Dinesh K.", typed=f"{PHRASE}\n{PHRASE}\n", phrase=None)
    assert "Dinesh K.'s key is enrolled." in told and PHRASE not in told
    assert "a name has one key" in say("keys", "new", "Dinesh K.", code=3)
    rows = {
        r["name"]: r for r in json.loads(CliRunner().invoke(app, ["keys", "list", "--json"]).output)
    }
    assert rows.keys() == {"Asha", "Bala", "Chitra", "Dinesh K."}
    assert [n for n, r in rows.items() if r["private_here"]] == ["Dinesh K."]
    assert all(r["counts"] and r["enrolled_by"] and not r["pinned"] for r in rows.values())
    assert rows["Asha"]["fingerprint"] in say("keys", "show", "Asha")
    public_path(house[0], "Asha").unlink()
    assert "Asha does not count: a public key must be readable" in say("keys", "list")


def test_a_key_in_the_clone_or_with_a_short_passphrase_is_not_made(
    say, house, tmp_path, monkeypatch
):
    monkeypatch.setenv("SENSEQUANT_KEYS_DIR", str(tmp_path / "own"))
    for phrase in ("", "short"):
        done = CliRunner().invoke(
            app, ["keys", "new", "Dinesh"], env={"SIGNING_PASSPHRASE": phrase}
        )
        assert done.exit_code == 3 and "8 characters" in done.output
    monkeypatch.setenv("SENSEQUANT_KEYS_DIR", str(house[0] / "data" / "own"))
    assert "must lie outside" in say("keys", "new", "Dinesh", code=3)
    assert not (tmp_path / "own").exists()


def test_the_passphrase_leaves_the_environment_at_once(house, made):
    code = """
import os, sys
from sensequant.ops.main import app
try:
    app(["keys", "list"])
except SystemExit as end:
    print("held" if "SIGNING_PASSPHRASE" in os.environ else "gone", end.code)
"""
    env = os.environ | {"SIGNING_PASSPHRASE": PHRASE, "SENSEQUANT_HOME": str(house[0])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["gone", "0"], done


# A real run


@pytest.mark.slow
def test_a_real_run_is_approved_and_a_changed_model_is_not(copied_run, tmp_path):
    who = people(copied_run.home, tmp_path / "keys", "Asha", "Bala")
    home, run_id = copied_run.home, copied_run.run_id
    latest = get_latest_candidate_run(home)
    assert (latest["run_id"], latest["status"]) == (run_id, "ready-for-review")
    assert latest["statistical_tests"]["n_sessions"] > 60 and latest["training"]["symbols"]
    for place in latest["artifacts"].values():
        assert (home / place).exists()
    model = next(copied_run.folder.glob("student/*/*.model"))
    whole = model.read_bytes()
    model.write_bytes(whole + b" ")
    with pytest.raises(GateError, match=model.name):
        approve(home, run_id, LEAD, who[0])
    model.write_bytes(whole)
    sign_all(copied_run, *who)
    assert names(check_approvals(home, run_id, "staging")) == [(LEAD, "Asha"), (RISK, "Bala")]
    with pytest.raises(GateError, match="simulated bars"):
        check_approvals(home, run_id, "production")
