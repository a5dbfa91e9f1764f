"""Deployments and rollbacks in careless and hostile hands: each refused with its reason, nothing
half-done, and one whole release active whatever happens."""

import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import skops.io
from campaign_release import campaign
from conftest import ROOT
from releases import PASSPHRASE, House, build_house, copied, judged_run, moment, nominate_at
from sklearn.preprocessing import FunctionTransformer
from typer.testing import CliRunner

from sensequant.core.errors import DataError, GateError
from sensequant.core.ledger import ledger_path
from sensequant.core.settings import load_settings
from sensequant.data.runs import Run
from sensequant.govern import release as r
from sensequant.govern.approvals import approvals_folder, new_key, public_path
from sensequant.govern.manifest import build_manifest, parse_manifest, write_manifest
from sensequant.govern.promotion import Register, approve, register_path, reject, user_name
from sensequant.learn.models import _zip

FRIDAY = moment("2026-06-05T16:00")
TUESDAY = moment("2026-06-09T15:30")  # two full sessions later
A, B, C, SIM = (f"live_candidate_20260601_093{n}00" for n in (1, 2, 3, 9))


@pytest.fixture(scope="module")
def approved(tmp_path_factory):
    "Three approved runs of a real market and one of a simulated one; to be copied, never changed."
    house = build_house(tmp_path_factory.mktemp("approved"))
    for number in (1, 2, 3):
        house.run(number)
    house.run(9, simulated=True)
    return house


@pytest.fixture
def house(approved, tmp_path, monkeypatch):
    "A home of its own for each test."
    mine = copied(approved, tmp_path)
    monkeypatch.setenv("SENSEQUANT_HOME", str(mine.home))
    return mine


@pytest.fixture(scope="module")
def deployed(approved, tmp_path_factory):
    "A in production and superseded in staging, where B is active."
    mine = copied(approved, tmp_path_factory.mktemp("deployed"))
    r.deploy(mine.home, A, "staging", "Chitra", FRIDAY)
    r.deploy(mine.home, A, "production", "Chitra", TUESDAY)
    r.deploy(mine.home, B, "staging", "Chitra", TUESDAY)
    return mine


@pytest.fixture
def live(deployed, tmp_path, monkeypatch):
    "A home of its own for each test, with releases that are active."
    mine = copied(deployed, tmp_path)
    monkeypatch.setenv("SENSEQUANT_HOME", str(mine.home))
    return mine


def release_of(run_id):
    return run_id.replace("live_candidate", "release")


def tree(folder: Path) -> dict[str, bytes]:
    "Every file and link below a folder; locks apart."
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        elif path.is_file() and not name.endswith((".lock", ".turn", "-shm", "-wal")):
            found[name] = path.read_bytes()
    return found


def active(house: House, environment: str = "staging") -> str | None:
    "The active release, verified."
    found = r.active_release(house.home, environment)
    return found and found.release_id


def state(house: House, run_id: str) -> str | None:
    with Register(register_path(house.home)) as register:
        return register.state(run_id)


def require_refused(house, run_id, environment, words, now=FRIDAY, family=(GateError, DataError)):
    "A deployment is refused for this reason, and leaves the models as they were."
    models, rows = house.home / "data" / "models", len(r.history(house.home))
    before = tree(models)
    with pytest.raises(family, match=words):
        r.deploy(house.home, run_id, environment, "Chitra", now)
    assert tree(models) == before
    assert len(r.history(house.home)) == rows


# What a deployment is


def test_a_release_is_the_run_as_it_was_signed(house):
    run, made = Run(A, house.home), r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    assert made == r.active_release(house.home, "staging")
    assert (made.release_id, made.run_id, made.by) == (release_of(A), A, "Chitra")
    assert (made.deployed_at, made.previous) == (FRIDAY, None)
    held = tree(made.folder)
    moved = {p: p.removeprefix("evidence/") for p in held if not p.startswith("approvals/")}
    for inside, source in moved.items():
        if inside != "release.json":
            assert held[inside] == (run.folder / source).read_bytes(), inside
    signed = tree(approvals_folder(house.home, A))
    assert {p: held[f"approvals/{p}"] for p in signed} == signed
    assert len(signed) == 2
    assert "search/search_space.json" in held
    assert {*made.files, "release.json"} == set(held)
    assert not [p for p in made.folder.rglob("*") if p.is_file() and p.stat().st_mode & 0o222]
    assert sorted(r.load_models(made)) == ["AAA", "BBB"]
    assert r.read_release_settings(made) == json.loads((run.folder / "config.json").read_bytes())
    assert state(house, A) == "staged"


def test_staging_and_production_are_apart(live):
    assert (active(live, "production"), active(live)) == (release_of(A), release_of(B))
    assert (state(live, A), state(live, B)) == ("deployed", "staged")
    one, other = (tree(r.release_folder(live.home, e, release_of(A))) for e in r.ENVIRONMENTS)
    told = {"release.json"}
    assert {p: v for p, v in one.items() if p not in told} == {
        p: v for p, v in other.items() if p not in told
    }


def test_the_register_tells_the_whole_story(live):
    rows = r.history(live.home)
    steps = [(x["environment"], x["phase"], x["release_id"], x["previous"]) for x in rows]
    a, b = release_of(A), release_of(B)
    assert steps == [
        (e, phase, new, old)
        for e, new, old in (("staging", a, None), ("production", a, None), ("staging", b, a))
        for phase in ("begun", "done")
    ]
    assert rows[0]["watch"]["end"] == "2026-06-17T13:30:00+05:30"
    assert [x["name"] for x in rows[0]["approvals"]] == ["Asha Rao", "Bala Iyer"]
    with Register(register_path(live.home)) as register:
        assert register.verify().intact


def test_what_is_active_needs_no_run_any_more(live):
    "Runs may be archived: a release, its backup and the way back are whole without them."
    shutil.rmtree(live.home / "runs")
    assert active(live) == release_of(B)
    back = r.rollback(live.home, "staging", "Chitra", "its run is archived", TUESDAY)
    assert back.release_id == release_of(A)


# What speaks against it


@pytest.mark.parametrize(
    "run_id",
    ["../runs/" + A, A + "/", A + "/../" + A, "/etc", "", "latest", A + "\n", A.upper(), "."],
)
def test_a_run_id_that_leads_elsewhere(house, run_id):
    require_refused(house, run_id, "staging", "must be named live_candidate_YYYYMMDD_HHMMSS")


def test_a_run_that_lies_elsewhere(house, tmp_path):
    folder = Run(A, house.home).folder
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    require_refused(house, A, "staging", "a folder of its own; found a symbolic link")
    folder.unlink()
    require_refused(house, A, "staging", "a folder of its own; found no such folder")


def test_an_environment_that_is_none(house):
    for name in ("live", "../staging", "Staging", ""):
        require_refused(house, A, name, "an environment must be one of")


def test_what_is_active_is_not_deployed_again(live):
    require_refused(live, B, "staging", "it is active already", TUESDAY)
    require_refused(live, A, "production", "it is active already", TUESDAY)
    require_refused(live, A, "staging", "a rollback restores it", TUESDAY)


def test_a_tampered_manifest(house):
    path = Run(A, house.home).folder / "manifest.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("heightened_hours: 48.0", "heightened_hours: 0.0"))
    require_refused(house, A, "staging", "as the state says")
    path.write_text("release_id: !!python/object/apply:os.system ['true']")
    require_refused(house, A, "staging", "plain YAML")
    path.unlink()
    require_refused(house, A, "staging", "No such file")


def test_a_manifest_that_only_one_of_three_names(house):
    "The state was edited too; the register was not."
    path = Run(A, house.home).folder / "manifest.yaml"
    path.write_text(path.read_text().replace("heightened_hours: 48.0", "heightened_hours: 0.0"))
    sha256 = r.hashlib.sha256(path.read_bytes()).hexdigest()
    database = sqlite3.connect(house.home / "data" / "state" / "sensequant.db")
    with database:
        change = "UPDATE candidates SET manifest_sha256 = ? WHERE run_id = ?"
        database.execute(change, (sha256, A))
    database.close()
    require_refused(house, A, "staging", "as the register says")


@pytest.mark.parametrize(
    "name",
    [
        *("student.model", "config.json", "inputs.json", "recipe.json", "trades.parquet"),
        *("verdict.json", "student_runs.json", "AAA.parquet"),  # evidence that is not copied
    ],
)
def test_a_file_that_was_swapped_after_the_approval(house, name):
    path = next(Run(A, house.home).folder.rglob(name))
    other = next(Run(B, house.home).folder.rglob(name)).read_bytes()
    whole = path.read_bytes()
    path.write_bytes(other + b" " if other == whole else other)
    require_refused(house, A, "staging", "as it was signed|after it was written")
    path.unlink()
    require_refused(house, A, "staging", "No such file")
    path.write_bytes(whole)
    assert r.deploy(house.home, A, "staging", "Chitra", FRIDAY).run_id == A


def test_a_file_that_is_swapped_while_the_deployment_runs(house):
    "What was read once is what is hashed, looked into and written; the swap does not reach it."
    model = next(Run(A, house.home).folder.rglob("AAA_*/student.model"))
    whole, original = model.read_bytes(), r._go_live

    def swap(*given):
        model.write_bytes(b"another model")
        original(*given)

    with patch.object(r, "_go_live", swap):
        made = r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    path = made.models["AAA"]["path"]
    assert (made.folder / path).read_bytes() == whole
    assert model.read_bytes() == b"another model"


@pytest.mark.parametrize("deep", [False, True])
def test_a_link_out_of_the_run(house, tmp_path, deep):
    "To the very same bytes: tomorrow they are others."
    path = next(Run(A, house.home).folder.rglob("student.model"))
    path = path.parent if deep else path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    require_refused(house, A, "staging", "a symbolic link on the way")


@pytest.mark.parametrize("name", ["staging", "staging/releases"])
def test_a_link_in_place_of_the_folder_of_releases(house, tmp_path, name):
    "Nothing is written where somebody else may own the folder."
    outside = tmp_path / "outside"
    outside.mkdir()
    link = house.home / "data" / "models" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    require_refused(house, A, "staging", "a symbolic link")
    assert not list(outside.iterdir())


def test_a_pipe_in_place_of_a_file_holds_nobody_up(house):
    path = Run(A, house.home).folder / "recipe.json"
    path.unlink()
    os.mkfifo(path)
    require_refused(house, A, "staging", "must be a plain one")


def hostile_model(whole: bytes) -> bytes:
    "A student's file that would run code when a careless loader reads it."
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(whole)) as box:
        files = {n: box.read(n) for n in box.namelist()}
    files["model.skops"] = skops.io.dumps(FunctionTransformer(func=os.system))
    header = json.loads(files["header.json"])
    sums = {n: r.hashlib.sha256(d).hexdigest() for n, d in files.items() if n != "header.json"}
    files["header.json"] = json.dumps(header | {"sha256": sums}).encode()
    return _zip(files)


@pytest.mark.parametrize("make", [hostile_model, lambda whole: b"no zip", lambda whole: whole[:-9]])
def test_a_model_of_a_hostile_type_is_refused_although_it_was_signed(house, make):
    "Its hash is in the manifest and two people signed it; the loader does not read it."
    original = Run(A, house.home)
    run = Run("live_candidate_20260601_094500", house.home)
    shutil.copytree(original.folder, run.folder)
    (run.folder / "manifest.yaml").unlink()
    lines = (run.folder / "artifacts.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "manifest.yaml" not in line]
    (run.folder / "artifacts.jsonl").write_text("".join(kept))
    path = next(run.folder.rglob("student.model"))
    run.artifacts.write_bytes(str(path.relative_to(run.folder)), make(path.read_bytes()))
    write_manifest(run, build_manifest(run, {}))
    with run.state as held:
        held.start_run(run.run_id, {}, os.getpid(), False)
    nominate_at(run, FRIDAY)
    for role, key in house.keys.items():
        approve(house.home, run.run_id, role, key, now=FRIDAY)
    require_refused(house, run.run_id, "staging", "student's file must be", family=DataError)


def tampered(path: Path, change: str) -> None:
    "A database that somebody has edited by hand, fences and all."
    database = sqlite3.connect(path)
    triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    held = triggers.fetchall()
    with database:
        for name, _ in held:
            database.execute(f"DROP TRIGGER {name}")
        database.execute(change)
        for _, sql in held:
            database.execute(sql)
    database.close()


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        (ledger_path, "UPDATE rows SET body = replace(body, 'AAA', 'BBB') WHERE n = 1", "row 1 is"),
        (ledger_path, "DELETE FROM rows WHERE n > 1", "the ledger must be as it was written"),
        (register_path, "UPDATE rows SET body = replace(body, 'Bala', 'Eve')", "is not as it was"),
        (register_path, "DELETE FROM rows WHERE n = 3", "the register must be as it was written"),
    ],
)
def test_a_tampered_chain(house, where, change, words):
    tampered(where(house.home), change)
    models = house.home / "data" / "models"
    for run_id in (B, C):
        with pytest.raises(GateError, match=words):
            r.deploy(house.home, run_id, "staging", "Chitra", FRIDAY)
    assert set(tree(models)) <= {"deploy.lock"}


def test_an_older_register_does_not_explain_what_is_active(live, approved):
    "It is whole by itself; what a release has kept of it says that rows are missing."
    for name in ("register.db", "register.db-wal", "register.db-shm"):
        (live.home / "data" / "state" / name).unlink(missing_ok=True)
    shutil.copy(register_path(approved.home), register_path(live.home))
    with pytest.raises(GateError, match="must be in the register"):
        r.active_release(live.home, "staging")
    for step in (
        lambda: r.deploy(live.home, C, "staging", "Chitra", TUESDAY),
        lambda: r.rollback(live.home, "staging", "Chitra", "x", TUESDAY),
        lambda: r.settle(live.home, TUESDAY),
    ):
        with pytest.raises(GateError, match=r"rows kept in .*/release.json is not among"):
            step()
    assert r.pointed(live.home, "staging") == release_of(B)


def test_rows_cut_off_together_with_what_they_explain(live):
    "The register is cut back to before B and the pointer too; B's own record gives it away."
    rows = r.history(live.home, "staging")
    first = next(x["n"] for x in rows if x["release_id"] == release_of(A))
    tampered(register_path(live.home), f"DELETE FROM rows WHERE n > {first}")
    pointer = r.models_folder(live.home, "staging") / "current"
    pointer.unlink()
    pointer.symlink_to("releases/" + release_of(A))
    with pytest.raises(GateError, match=r"rows kept in .*/release.json is not among"):
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY)


def test_a_lost_register_takes_nothing_away(live):
    register_path(live.home).unlink()
    before = tree(r.models_folder(live.home, "staging"))
    with pytest.raises(GateError, match="there must be a register where there are releases"):
        r.settle(live.home, TUESDAY)
    assert tree(r.models_folder(live.home, "staging")) == before


@pytest.mark.parametrize("role", ["engineering-lead", "risk-manager"])
def test_a_missing_or_edited_approval(house, role):
    path = approvals_folder(house.home, A) / f"{role}.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"2026-06-01", b"2026-06-02"))
    require_refused(house, A, "staging", "signature|approval")
    path.unlink()
    require_refused(house, A, "staging", "approval must be readable")


def test_an_approval_of_another_run(house):
    "Both are signed by the same two; one run's word is none for the other."
    for role in ("engineering-lead", "risk-manager"):
        source = approvals_folder(house.home, B) / f"{role}.json"
        shutil.copy(source, approvals_folder(house.home, A) / f"{role}.json")
    require_refused(house, A, "staging", "approval")


def test_a_swapped_key(house, tmp_path):
    other = new_key("Eve", PASSPHRASE, tmp_path / "eve", tmp_path / "another home")
    path = public_path(house.home, "Bala Iyer")
    told = json.loads(path.read_bytes()) | {
        "public_hex": other.public_hex,
        "fingerprint": other.fingerprint,
    }
    path.write_bytes(r.json_bytes(told, pretty=True))
    require_refused(house, A, "staging", "a public key must be the register's")


def test_states_that_do_not_lead_there(house):
    run = judged_run(house.home, 20)
    require_refused(house, run.run_id, "staging", "must have a candidate", family=DataError)
    nominate_at(run, FRIDAY)
    require_refused(house, run.run_id, "staging", "must be approved")
    approve(house.home, run.run_id, "Risk Manager", house.keys["Risk Manager"], now=FRIDAY)
    require_refused(house, run.run_id, "staging", "no signature of Engineering Lead")
    require_refused(house, A, "production", "only a staged run goes to production")
    reject(house.home, A, "Dev", "the fees changed", FRIDAY)
    require_refused(house, A, "staging", "must be approved; found rejected")


def test_a_simulated_market_never_reaches_production(house):
    made = r.deploy(house.home, SIM, "staging", "Chitra", FRIDAY)
    assert parse_manifest((made.folder / "manifest.yaml").read_bytes())["simulated"]
    require_refused(house, SIM, "production", "simulated", TUESDAY)


def test_production_needs_two_full_sessions_in_staging(house):
    r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    for now, done in ((FRIDAY, 0), (TUESDAY - timedelta(days=1), 1), (TUESDAY - timedelta(1), 1)):
        words = f"production needs 2 full sessions in staging before it; found {done}"
        require_refused(house, A, "production", words, now)
    words = "found 1"
    require_refused(house, A, "production", words, TUESDAY - timedelta(seconds=1))
    assert r.deploy(house.home, A, "production", "Chitra", TUESDAY).environment == "production"


def test_fewer_sessions_in_the_settings_open_nothing_that_was_signed(house):
    r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    with pytest.raises(GateError, match="production needs 2 full sessions"):
        none = load_settings(staging_sessions=0)
        r.deploy(house.home, A, "production", "Chitra", FRIDAY, none)
    with pytest.raises(GateError, match="production needs 9 full sessions"):
        r.plan_deployment(house.home, A, "production", TUESDAY, load_settings(staging_sessions=9))


def test_sessions_count_only_while_it_is_the_active_one(house):
    "A was staged for one session, replaced for a week and restored for one."
    day = lambda n: FRIDAY + timedelta(days=n)  # noqa: E731
    r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    r.deploy(house.home, B, "staging", "Chitra", day(3))  # Monday after the close
    require_refused(house, A, "production", "must be approved|only a staged run", day(10))
    r.rollback(house.home, "staging", "Chitra", "B is worse", day(10))
    assert r.staged_sessions(house.home, release_of(A), day(10)) == 1
    require_refused(house, A, "production", "found 1", day(10))
    assert r.deploy(house.home, A, "production", "Chitra", day(11)).run_id == A


def test_models_that_do_not_speak_any_more_stay_out_of_production(house):
    late = moment("2027-08-01T16:00")  # 400 days after their newest label
    plan = r.plan_deployment(house.home, A, "staging", late)
    assert all(m["expires_at"] < late.isoformat() for m in plan.models.values())
    asked = r._Asked(house.home, A, "production", late, load_settings())
    with pytest.raises(GateError, match="a model that still speaks"):
        r._require_speaking(asked, plan.models)


def test_a_clock_that_was_set_back(live):
    before = tree(live.home / "data" / "models")
    for step in (
        lambda now: r.deploy(live.home, C, "staging", "Chitra", now),
        lambda now: r.rollback(live.home, "staging", "Chitra", "x", now),
    ):
        with pytest.raises(GateError, match="Check the clock"):
            step(TUESDAY - timedelta(seconds=1))
    assert tree(live.home / "data" / "models") == before


def test_a_deployment_must_say_who_and_a_rollback_why(live):
    for by in ("", "  ", "a\nb"):
        with pytest.raises(GateError, match="must say who does it"):
            r.deploy(live.home, C, "staging", by, TUESDAY)
    for why in ("", "  ", "a\x00b"):
        with pytest.raises(GateError, match="must say why"):
            r.rollback(live.home, "staging", "Chitra", why, TUESDAY)
    with pytest.raises(DataError, match="must know its zone"):
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY.replace(tzinfo=None))


# What is active, in hostile hands


@pytest.mark.parametrize(
    "target",
    [
        "../production/releases/" + release_of(A),
        "/tmp",
        "releases",
        "releases/../releases/" + release_of(A),
        f"releases/{release_of(A)}/",
        "./releases/" + release_of(A),
    ],
)
def test_a_pointer_that_leads_elsewhere(live, target):
    pointer = r.models_folder(live.home, "staging") / "current"
    pointer.unlink()
    pointer.symlink_to(target)
    for step in (
        lambda: r.active_release(live.home, "staging"),
        lambda: r.rollback(live.home, "staging", "Chitra", "x", TUESDAY),
        lambda: r.deploy(live.home, C, "staging", "Chitra", TUESDAY),
    ):
        with pytest.raises(DataError, match="the pointer must be a link to a release of staging"):
            step()
    status = r.release_status(live.home, TUESDAY)
    assert not status["environments"]["staging"]["intact"]
    assert status["environments"]["production"]["intact"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_pointer_that_is_no_link(live, make):
    pointer = r.models_folder(live.home, "staging") / "current"
    pointer.unlink()
    make(pointer)
    with pytest.raises(DataError, match="found no link"):
        r.active_release(live.home, "staging")


def test_a_pointer_moved_by_hand_to_a_whole_release(live):
    pointer = r.models_folder(live.home, "staging") / "current"
    pointer.unlink()
    pointer.symlink_to("releases/" + release_of(A))
    with pytest.raises(GateError, match=f"ln -sfn releases/{release_of(B)} current"):
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY)
    assert "as the register says" in r.release_status(live.home, TUESDAY)["wrong"]


def spoil(folder: Path, how: str) -> str:
    "Damage a release; what must be named."
    model = next(folder.rglob("student.model"))
    name = str(model.relative_to(folder))
    for path in (model, folder / "release.json", folder / "manifest.yaml"):
        path.chmod(0o644)
    if how == "byte":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
        return f"{name}: it has changed"
    if how == "missing":
        model.unlink()
        return f"{name}: No such file"
    if how == "link":
        model.rename(folder.parent.parent / "elsewhere")
        model.symlink_to(folder.parent.parent / "elsewhere")
        return f"{name}: a symbolic link"
    if how == "more":
        (folder / "student" / "one_more.model").write_bytes(b"x")
        return "student/one_more.model is not part of it"
    if how == "folder":
        (folder / "approvals2").symlink_to(folder / "approvals")
        return "approvals2 is not part of it"
    record = folder / "release.json"
    told = json.loads(record.read_bytes()) | {"by": "Eve"}
    record.write_bytes(r.json_bytes(told, pretty=True))
    return "as the register says"


DAMAGES = ["byte", "missing", "link", "more", "folder", "record"]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_what_is_active_is_named(live, how):
    words = spoil(r.release_folder(live.home, "staging", release_of(B)), how)
    with pytest.raises(DataError, match=words):
        r.active_release(live.home, "staging")
    about = r.release_status(live.home, TUESDAY)["environments"]["staging"]
    assert (about["intact"], words in about["wrong"]) == (False, True)
    # and it can still be taken back, or replaced
    assert r.rollback(live.home, "staging", "Chitra", "damaged", TUESDAY).run_id == A


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_backup_is_refused_by_its_name(live, how):
    words = spoil(r.release_folder(live.home, "staging", release_of(A)), how)
    with pytest.raises(GateError, match=f"the backup {release_of(A)} must be whole") as refused:
        r.rollback(live.home, "staging", "Chitra", "x", TUESDAY)
    assert words in str(refused.value)
    assert "sensequant release deploy RUN --environment staging" in str(refused.value)
    assert active(live) == release_of(B)
    assert r.deploy(live.home, C, "staging", "Chitra", TUESDAY).previous == release_of(B)


def test_a_release_folder_that_is_a_link(live, tmp_path):
    folder = r.release_folder(live.home, "staging", release_of(B))
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a symbolic link"):
        r.active_release(live.home, "staging")


def test_a_lock_that_is_a_link_overwrites_nothing(live, tmp_path):
    lock = live.home / "data" / "models" / "deploy.lock"
    lock.unlink()
    (tmp_path / "precious").write_text("kept")
    lock.symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match=r"deploy\.lock"):
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY)
    assert (tmp_path / "precious").read_text() == "kept"


# Rollback


def test_a_rollback_restores_exactly(live):
    before = tree(r.release_folder(live.home, "staging", release_of(A)))
    wanted = r.read_release(live.home, "staging", release_of(A))
    back = r.rollback(live.home, "staging", "Dev", "hit ratio fell by 7 points", TUESDAY)
    assert tree(back.folder) == before
    assert (back.files, back.models, back.manifest_sha256) == (
        wanted.files,
        wanted.models,
        wanted.manifest_sha256,
    )
    assert (back.by, back.deployed_at) == ("Dev", TUESDAY)
    assert back.watch["start"] == TUESDAY.isoformat()  # watched closely again
    assert (state(live, B), state(live, A)) == ("rolled-back", "deployed")
    last = r.history(live.home, "staging")[-1]
    assert (last["why"], last["restored"]) == ("hit ratio fell by 7 points", release_of(A))
    require_refused(live, B, "staging", "must be approved; found rolled-back|a rollback", TUESDAY)


def test_rolling_back_the_first_leaves_none(live):
    assert r.rollback(live.home, "production", "Dev", "a lesson", TUESDAY) is None
    assert not os.path.lexists(r.models_folder(live.home, "production") / "current")
    assert (active(live, "production"), state(live, A)) == (None, "rolled-back")
    with pytest.raises(GateError, match="something must be active"):
        r.rollback(live.home, "production", "Dev", "again", TUESDAY)
    assert r.release_folder(live.home, "production", release_of(A)).is_dir()  # evidence stays


def test_what_was_itself_taken_back_is_not_restored(live):
    "A was taken back from production; staging goes on to what lay before A, which is nothing."
    r.rollback(live.home, "production", "Dev", "lost money", TUESDAY)
    assert r.plan_rollback(live.home, "staging") == (release_of(B), None)
    assert r.rollback(live.home, "staging", "Dev", "no better", TUESDAY) is None
    assert (state(live, A), state(live, B)) == ("rolled-back", "rolled-back")


def test_production_goes_forward_and_back(live):
    later = TUESDAY + timedelta(days=6)
    r.deploy(live.home, B, "production", "Chitra", later)
    assert (state(live, A), state(live, B)) == ("superseded", "deployed")
    assert r.rollback(live.home, "production", "Dev", "x", later).run_id == A
    assert (state(live, A), state(live, B)) == ("deployed", "rolled-back")
    assert active(live) == release_of(B)  # staging keeps it, and says where it stands
    told = r.release_status(live.home, later)["environments"]["staging"]
    assert (told["state"], told["intact"]) == ("rolled-back", True)


def test_a_backup_whose_approvals_are_gone(live):
    public_path(live.home, "Bala Iyer").unlink()
    with pytest.raises(GateError, match=f"the backup {release_of(A)} must be whole"):
        r.rollback(live.home, "staging", "Dev", "x", TUESDAY)


# Two at once


def test_a_second_deployment_is_told_whom_to_wait_for(house):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from sensequant.govern.release import deployment_turn\n"
        "with deployment_turn(Path(sys.argv[1]), 'deploy by Eve'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(house.home)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        for step in (
            lambda: r.deploy(house.home, A, "staging", "Chitra", FRIDAY),
            lambda: r.rollback(house.home, "staging", "Chitra", "x", FRIDAY),
            lambda: r.settle(house.home),
        ):
            begun = time.monotonic()
            with pytest.raises(r.DeploymentBusy, match=rf"process {other.pid} since .*by Eve"):
                step()
            assert time.monotonic() - begun < 1
        assert f"process {other.pid}" in r.release_status(house.home, FRIDAY)["busy"]
    finally:
        other.kill()
        other.wait()
    assert r.deploy(house.home, A, "staging", "Chitra", FRIDAY).run_id == A  # the lock died too


def forked(function) -> int:
    "Call a function in a process of its own; its pid."
    pid = os.fork()
    if pid:
        return pid
    try:
        os._exit(function() or 0)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr)
        os._exit(99)


def test_of_many_deployments_at_once_the_others_are_refused(house):
    def attempt(run_id):
        try:
            r.deploy(house.home, run_id, "staging", "Chitra", FRIDAY)
        except r.DeploymentBusy:
            return 4
        except GateError:
            return 3  # it is, or was, active already

    for _ in range(2):
        pids = [forked(lambda run_id=run_id: attempt(run_id)) for run_id in (B, C) * 3]
        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
        assert set(codes) <= {0, 3, 4}, codes
    rows = r.history(house.home, "staging")
    assert [x["phase"] for x in rows] == ["begun", "done"] * (len(rows) // 2)
    assert len(rows) >= 2
    assert active(house) == rows[-1]["release_id"]


def test_readers_see_the_old_or_the_new(live):
    "A reader asks all the time while another process deploys and rolls back."
    order = [B, C, B, A]

    def work():
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY)
        for _ in range(2):
            r.rollback(live.home, "staging", "Chitra", "x", TUESDAY)

    pid, seen = forked(work), []
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        found = r.active_release(live.home, "staging")
        assert sorted(r.load_models(found)) == ["AAA", "BBB"]
        seen += [] if seen[-1:] == [found.run_id] else [found.run_id]
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    seen += [] if seen[-1:] == [A] else [A]
    assert r.active_release(live.home, "staging").run_id == A
    left = iter(order)
    assert all(run_id in left for run_id in seen), seen  # in this order, none twice, none else


def test_nobody_rejects_while_a_deployment_runs(house):
    "A rejection waits for its turn, and then it is too late: what is staged is rolled back."
    original, refused = r._go_live, []

    def meanwhile(*given):
        try:
            with patch("sensequant.govern.promotion.locked", lambda path, _: r.locked(path, 0)):
                reject(house.home, A, "Dev", "too risky", FRIDAY)
        except DataError as error:
            refused.append(str(error))
        original(*given)

    with patch.object(r, "_go_live", meanwhile):
        r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    assert "approvals.lock" in refused[0]
    assert state(house, A) == "staged"


# Kills and full disks

STEPS = ["_park", "_carry_out", "_point", "_conclude"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("what", ["first", "next", "back", "to none"])
def test_a_death_at_each_step(house, what, step):
    if what != "first":
        r.deploy(house.home, A, "staging", "Chitra", FRIDAY)
    if what == "back":
        r.deploy(house.home, B, "staging", "Chitra", FRIDAY)
    before = active(house)

    def act():
        if what in ("first", "next"):
            return r.deploy(house.home, A if what == "first" else C, "staging", "Chitra", FRIDAY)
        return r.rollback(house.home, "staging", "Chitra", "x", FRIDAY)

    if step == "_park" and what in ("back", "to none"):
        return  # a rollback writes no folder
    with patch.object(r, step, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        act()
    moved = step == "_conclude"
    assert (active(house) != before) == moved
    told = r.settle(house.home, FRIDAY)
    assert [t.split()[0] for t in told] == {"_conclude": ["finished"], "_point": ["undid"]}.get(
        step, []
    )
    assert r.settle(house.home, FRIDAY) == []
    if not moved:
        assert active(house) == before
        act()
    goals = {"first": release_of(A), "next": release_of(C), "back": release_of(A), "to none": None}
    assert active(house) == goals[what]
    assert not list((house.home / "data").rglob(".*.tmp"))


@pytest.mark.parametrize("kind", ["deploy", "rollback"])
def test_a_full_disk_at_every_size(live, kind):
    "No file may grow beyond so many bytes, from none to enough: done, or refused and nothing left."
    before, seen = active(live), set()

    def act():
        if kind == "deploy":
            r.deploy(live.home, C, "staging", "Chitra", TUESDAY)
        else:
            r.rollback(live.home, "staging", "Chitra", "x", TUESDAY)

    def limited(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            act()
        except (DataError, GateError) as error:
            assert "Traceback" not in str(error)
            return 1

    # sizes of the register's files decide where a rollback stops
    wal = [p.stat().st_size for p in register_path(live.home).parent.glob("register.db*")]
    sizes = [0, 100, 5_000, 20_000, *(s + d for s in wal for d in (0, 4096, 8192)), 60_000, 10**8]
    for size in sorted(set(sizes)):
        pid = forked(lambda size=size: limited(size))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 1), size
        found = active(live)
        assert found == before if code else found != before
        r.settle(live.home, TUESDAY)
        seen.add(code)
        if code == 0:
            break
        assert not list((live.home / "data" / "models").rglob(".*.tmp"))
    assert seen == {0, 1}
    with Register(register_path(live.home)) as register:
        assert register.verify().intact


@pytest.mark.parametrize("step", ["rename", "symlink", "replace"])
def test_a_disk_that_fills_up_between_two_steps(live, step):
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(r.os, step, side_effect=full), pytest.raises(DataError, match="have room"):
        r.deploy(live.home, C, "staging", "Chitra", TUESDAY)
    assert active(live) == release_of(B)
    assert r.settle(live.home, TUESDAY) == []  # it was undone at once
    assert [x["phase"] for x in r.history(live.home, "staging")[-2:]] == ["begun", "undone"]
    assert r.deploy(live.home, C, "staging", "Chitra", TUESDAY).run_id == C


@pytest.mark.slow
def test_kills_at_random_instants(tmp_path):
    seen = campaign(kills=25, seed=7, folder=tmp_path)
    assert seen.wrong == []
    assert seen.killed.total() == 25


# The command line


def typed(*words, answer=""):
    from sensequant.ops.release_cli import release

    return CliRunner().invoke(release, list(words), input=answer)


def test_deploy_shows_asks_and_does(house):
    for answer in ("", "no\n", "y\n", "YES\n"):
        said = typed("deploy", A, "-e", "staging", answer=answer)
        assert (said.exit_code, active(house)) == (3, None)
    assert "the answer must be the word yes" in said.stderr
    for words in ("release_20260601_093100  ->  staging", "Passed: every condition", "Asha Rao"):
        assert words in said.stdout, said.stdout
    assert "nothing: it is the first" in said.stdout
    assert "learned until 2026-" in said.stdout
    said = typed("deploy", A, "-e", "staging", answer="yes\n")
    assert (said.exit_code, active(house)) == (0, release_of(A)), said.output
    assert "Watched     closely" in said.stdout


def test_who_deploys_is_the_user_the_system_knows(house, monkeypatch):
    monkeypatch.setenv("LOGNAME", "the chief")
    typed("deploy", A, "--environment", "staging", "--yes", release_of(A))
    with Register(register_path(house.home)) as register:
        assert {row["by"] for row in register.rows("deploy")} == {user_name()} != {"the chief"}


def test_a_script_spells_the_release_out(house):
    for wrong in (release_of(B), A, "yes", ""):
        said = typed("deploy", A, "-e", "staging", "--yes", wrong)
        assert (said.exit_code, active(house)) == (3, None)
    said = typed("deploy", A, "-e", "staging", "--yes", release_of(A), "--by", "Chitra")
    assert (said.exit_code, r.active_release(house.home, "staging").by) == (0, "Chitra")
    said = typed("deploy", A, "-e", "production", "--yes", release_of(A))
    assert said.exit_code == 3
    assert "production needs 2 full sessions" in said.stderr or "still speaks" in said.stderr


def test_rollback_and_status_on_the_command_line(live):
    told = json.loads(typed("status", "--json").stdout)
    places = told["environments"]
    assert places["staging"]["release_id"] == release_of(B)
    assert places["staging"]["sessions_needed"] == 2
    assert places["production"]["mode"] in ("heightened", "normal")
    assert 0 <= places["production"]["market_hours_left"] <= 48
    assert "two releases" not in typed("status").stdout
    said = typed("rollback", "--why", "x")
    assert (said.exit_code, "an environment must be named" in said.stderr) == (2, True)
    said = typed("rollback", "-e", "staging", "--why", "it lost", "--yes", release_of(A))
    assert (said.exit_code, active(live)) == (3, release_of(B))
    said = typed("rollback", "-e", "staging", "--why", "it lost", answer="yes\n")
    assert (said.exit_code, active(live)) == (0, release_of(A))
    assert f"Restores    {release_of(A)}" in said.stdout
    spoil(r.release_folder(live.home, "production", release_of(A)), "byte")
    said = typed("status")
    assert (said.exit_code, "WRONG" in said.stdout) == (1, True)


def test_a_key_that_counts_no_more_is_said_and_takes_nothing_away(live, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_APPROVER_KEYS", f"Asha Rao={'0' * 32}")
    warns = "Warning     Asha Rao signed it with a key that counts no more: a key must be among"
    said = typed("status")
    assert (said.exit_code, said.stdout.count(warns)) == (0, 2)
    assert "Intact      yes" in said.stdout
    said = typed("rollback", "-e", "staging", "--why", "it lost", answer="yes\n")
    assert (said.exit_code, active(live)) == (0, release_of(A))
    assert said.stdout.index(warns) < said.stdout.index("Active  ")


@pytest.mark.parametrize("damage", ["gone", "no database"])
def test_status_tells_of_a_lost_register_and_makes_none(live, damage):
    path = register_path(live.home)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    if damage != "gone":
        path.write_bytes(b"x" * 5000)
    said = typed("status")
    assert (said.exit_code, path.exists()) == (1, damage != "gone")
    assert "WRONG" in said.stdout and release_of(B) in said.stdout


def test_a_kill_is_settled_by_the_next_command(live):
    dies = patch.object(r, "_conclude", side_effect=KeyboardInterrupt)
    with dies, pytest.raises(KeyboardInterrupt):
        r.rollback(live.home, "staging", "Chitra", "x", TUESDAY)
    said = typed("status")
    assert said.exit_code == 0
    assert "First finished the rollback of" in said.stdout


def test_manifest_names_what_changed(house):
    said = typed("manifest", A)
    assert (said.exit_code, "Whole       yes" in said.stdout) == (0, True), said.output
    next(Run(A, house.home).folder.rglob("student.model")).write_bytes(b"x")
    said = typed("manifest", A)
    assert (said.exit_code, "student.model: it has changed" in said.stderr) == (1, True)


def test_audit_says_when_nothing_is_deployed(house):
    said = typed("audit")
    assert said.exit_code == 3
    assert "something must be deployed in staging or production" in said.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["release-audit"], "release audit"),
        (["release-audit", "ENVIRONMENT=staging"], "release audit --environment staging"),
        (["release-validate", f"RUN={A}"], f"release validate {A}"),
        (["release-manifest"], "release manifest latest"),
        (["deploy-staging"], "release deploy latest --environment staging"),
        (["deploy-prod", f"RUN={A}"], f"release deploy {A} --environment production"),
        (
            ["release-deploy", "ENVIRONMENT=staging", "YES=release_1"],
            "release deploy latest --environment staging --yes release_1",
        ),
        (["release-rollback", "WHY=it lost"], 'release rollback  --why "$WHY"'),
        (["release-status"], "release status"),
    ],
)
def test_each_target_calls_its_command(words, command):
    made = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert command in made.stdout, made.stdout + made.stderr


def test_help_lists_every_target():
    made = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    for target in ("release-audit", "release-rollback", "deploy-staging", "deploy-prod", "run"):
        assert f"  make {target} " in made.stdout
