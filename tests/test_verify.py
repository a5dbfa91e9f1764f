"""Verification and reproduction of a real run: every file changed by one byte, every chain cut,
every signature forged, each named; the run made again from its manifest, without its source too."""

import json
import shutil
import sqlite3
from datetime import date

import numpy as np
import pandas as pd
import pytest
from candidates import people, sign_all
from conftest import SMALL, SYMBOLS
from typer.testing import CliRunner

from sensequant.core.artifacts import RECORD, sha256_file
from sensequant.core.errors import DataError, GateError
from sensequant.core.events import json_bytes
from sensequant.core.ledger import Ledger, Trial, ledger_path
from sensequant.core.settings import load_settings
from sensequant.core.types import Interval
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.runs import Run, actions_file, pinned_bars, read_inputs
from sensequant.govern import reproduction, verification
from sensequant.govern.manifest import MANIFEST, code_version, read_manifest
from sensequant.govern.promotion import nominate
from sensequant.govern.release import active_release, deploy, rollback
from sensequant.govern.reproduction import GOOD, compare_runs_files, reproduce_run
from sensequant.govern.verification import verify_run
from sensequant.market.actions import ACTION_COLUMNS
from sensequant.market.simulator import MarketSpec
from sensequant.ops.main import app
from sensequant.ops.orchestrator import PHASES, begin_run, go_on, run_config

cli = CliRunner()


@pytest.fixture(scope="module")
def signed_run(finished_run, tmp_path_factory):
    "The finished run, put forward and signed by two people."
    home = tmp_path_factory.mktemp("signed")
    shutil.copytree(finished_run.home, home, dirs_exist_ok=True)
    run = Run(finished_run.run_id, home)
    nominate(run, "ready-for-review", sha256_file(run.folder / MANIFEST))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEQUANT_HOME", str(home))
        sign_all(run, *people(home, tmp_path_factory.mktemp("keys"), "Asha", "Bala"))
    return run


@pytest.fixture
def own_run(signed_run, tmp_path):
    "The signed run in a home of its own, to be damaged."
    shutil.copytree(signed_run.home, tmp_path / "own")
    return Run(signed_run.run_id, tmp_path / "own")


def quick(run):
    "What a look at the bytes finds wrong, by place, the first thing of each."
    return {f.where: f for f in reversed(verify_run(run, deep=False).faults)}


def flip(path):
    "Change one byte in the middle of a file."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(run, path):
    "Put a file on record as it lies there, as one would who wants to hide a change."
    found = sha256_file(run.folder / path)
    lines = [json.loads(line) for line in (run.folder / RECORD).read_text().splitlines()]
    for line in lines:
        if line["path"] == path:
            line |= {"sha256": found, "size": (run.folder / path).stat().st_size}
    (run.folder / RECORD).write_bytes(b"".join(map(json_bytes, lines)))
    return found


# Whole


def test_a_signed_run_is_whole(signed_run):
    before = {p: p.stat().st_mtime_ns for p in signed_run.home.rglob("*") if p.is_file()}
    told = []
    seen = verify_run(signed_run, tell=told.append)
    assert (seen.whole, seen.faults) == (True, []), seen.faults
    found = {c.name: c.found for c in seen.checks}
    names = "links record files strangers manifest signed events candidate ledger head register"
    more = "approvals briefing words models rescore returns trial pages"
    assert set(found) >= {*names.split(), *more.split(), "model set", "windows", "lineage"}
    assert found["approvals"] == "2 signatures hold"
    assert "2 heads of signatures among them; approved" in found["register"]
    assert "not judged" not in found["pages"]
    assert told[0] == "links" and told[-1] == "pages" and len(told) == len(set(told))
    kept = {p: t for p, t in before.items() if ".db" not in p.name}
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in kept}.items()


def test_the_commands_say_so(signed_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(signed_run.home))
    done = cli.invoke(app, ["verify", signed_run.run_id])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"Run {signed_run.run_id}: everything is whole."
    told = json.loads(cli.invoke(app, ["verify", "latest", "--quick", "--json"]).stdout)
    assert (told["whole"], told["run_id"]) == (True, signed_run.run_id)
    for word in ("../" + signed_run.run_id, "nothing"):
        assert cli.invoke(app, ["verify", word]).exit_code == 2


# A byte


@pytest.mark.slow
def test_a_changed_byte_of_any_file_is_named(own_run):
    "Every file of the run in turn, each restored before the next."
    files = sorted(p for p in own_run.folder.rglob("*") if p.is_file())
    assert len(files) > 140 and not quick(own_run)
    for path in files:
        held, rel = path.read_bytes(), path.relative_to(own_run.folder).as_posix()
        flip(path)
        assert rel in quick(own_run), f"{rel}: {list(quick(own_run))}"
        path.write_bytes(held)
    assert not quick(own_run)


@pytest.mark.slow
def test_a_changed_byte_of_any_page_is_named(own_run, monkeypatch):
    case = verification._Case(own_run)
    monkeypatch.setattr(verification, "code_version", lambda: case.manifest["code"])
    pages = sorted(own_run.pages.glob("*.html"))
    assert len(pages) == 9
    for path in pages:
        held = path.read_bytes()
        flip(path)
        wrong = [f.where for f in verification._pages(case) if not f.passed]
        assert wrong == [f"reports/{own_run.run_id}/{path.name}"]
        path.write_bytes(held)
    (own_run.pages / "2_teacher.html").unlink()
    (own_run.pages / "accuracy.html").write_text("of another command")
    wrong = {f.where: f.found for f in verification._pages(case) if not f.passed}
    assert wrong.pop(f"reports/{own_run.run_id}/2_teacher.html") == "no such file"
    assert set(wrong) <= {f"reports/{own_run.run_id}/index.html"}  # which links it now


def test_pages_of_another_version_must_say_the_same(own_run, monkeypatch):
    "A later version may frame a page otherwise; what it says is the run's."
    other = code_version() | {"commit": "ab" * 20}
    monkeypatch.setattr(verification, "code_version", lambda: other)
    case, path = verification._Case(own_run), own_run.pages / "4_validate.html"
    held = path.read_text()
    path.write_text(held.replace("max-width:60rem", "max-width:70rem"))
    assert all(f.passed for f in verification._pages(case)) and path.read_text() != held
    path.write_text(held.replace(">OK<", ">FAILED<", 1))
    (wrong,) = [f.where for f in verification._pages(case) if not f.passed]
    assert wrong == f"reports/{own_run.run_id}/4_validate.html"
    assert any("ab" * 20 in note for note in verify_run(own_run, deep=False).notes)


def forged_briefing(run, *names):
    "The Sharpe ratio of the briefing changed in some of its forms, with the record put right."
    held = run.artifacts.read_json("promotion_briefing.json")
    told = next(f["text"] for f in held["figures"] if f["key"] == "net_sharpe")
    for name in names:
        text = (run.folder / name).read_text()
        assert told in text
        (run.folder / name).write_text(text.replace(told, "+9.99"))
        rewrite(run, name)


@pytest.mark.parametrize("commit", ["the run's", "another"])
@pytest.mark.parametrize(
    ("names", "blamed"),
    [
        (["promotion_briefing.md"], {"promotion_briefing.md"}),
        (["7_briefing.ipynb"], {"7_briefing.ipynb"}),
        (
            ["promotion_briefing.json", "promotion_briefing.md", "7_briefing.ipynb"],
            {"promotion_briefing.json"},
        ),
    ],
)
def test_a_forged_briefing_is_named_although_it_is_on_record(
    own_run, monkeypatch, names, blamed, commit
):
    "The manifest is older than the briefing, so its figures must come out of the evidence again."
    case = verification._Case(own_run)
    code = case.manifest["code"] | ({"commit": "ab" * 20} if commit == "another" else {})
    monkeypatch.setattr(verification, "code_version", lambda: code)
    assert all(f.passed for f in verification._worded(case))
    forged_briefing(own_run, *names)
    assert not quick(own_run)
    found = verification._worded(verification._Case(own_run))
    assert {f.where for f in found if not f.passed} == blamed, found


def test_a_changed_byte_of_keys_and_signatures_is_named(own_run):
    for folder in ("approvals", "keys"):
        files = sorted(p for p in (own_run.home / "data" / folder).rglob("*.json"))
        assert len(files) == 2
        for path in files:
            held = path.read_bytes()
            flip(path)
            faults = verify_run(own_run, deep=False).faults
            named = " ".join(f"{f.where} {f.found}" for f in faults)
            assert faults and path.name.split(".")[0] in named, named
            path.write_bytes(held)
    assert not quick(own_run)


def test_a_change_that_is_recorded_is_in_no_manifest(own_run):
    path = "stat_tests.json"
    flip(own_run.folder / path)
    rewrite(own_run, path)
    assert quick(own_run)[path].name == "signed"


def test_a_change_that_is_recorded_and_named_is_in_no_state(own_run):
    "Against a rewritten manifest stand state, register, briefing and signatures."
    path = "stat_tests.json"
    before = sha256_file(own_run.folder / path)
    flip(own_run.folder / path)
    found = rewrite(own_run, path)
    text = (own_run.folder / MANIFEST).read_text().replace(before, found)
    (own_run.folder / MANIFEST).write_text(text)
    rewrite(own_run, MANIFEST)
    faults = verify_run(own_run, deep=False).faults
    names = {f.name for f in faults}
    assert names >= {"candidate", "register", "approvals", "briefing"}
    assert {"data/state/sensequant.db", "data/state/register.db"} <= {f.where for f in faults}


def test_a_record_that_says_otherwise_is_blamed(own_run):
    path = own_run.folder / RECORD
    line = next(x for x in path.read_bytes().splitlines() if b'"verdict.json"' in x)
    sha256 = json.loads(line)["sha256"].encode()
    path.write_bytes(path.read_bytes().replace(sha256, sha256[::-1]))
    found = quick(own_run)
    assert found[RECORD].found == "verdict.json is as it was signed, and the record says otherwise"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda d: d + b'{"path": "x"', "a line without its end"),
        (lambda d: d + b"no line\n", "a line that cannot be read"),
        (lambda d: d + b'{"path":"../x","sha256":"a","size":1}\n', "leaves the run: ../x"),
        (lambda d: d.replace(b'{"path":', b'{ "path":', 1), "not as it was written"),
        (lambda d: b"", "no line"),
    ],
)
def test_a_torn_record_is_named(own_run, damage, why):
    path = own_run.folder / RECORD
    path.write_bytes(damage(path.read_bytes()))
    assert why in quick(own_run)[RECORD].found


# A file too many, too few, or elsewhere


def test_a_stranger_among_the_models_is_named(own_run):
    for rel in ("student/extra/student.model", "bars/ZZZ.parquet", "notes.txt"):
        path = own_run.folder / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
        assert quick(own_run)[rel].name == "strangers"
        path.unlink()


def test_a_recorded_stranger_is_in_no_manifest(own_run):
    own_run.artifacts.write_bytes("student/extra/student.model", b"1")
    assert quick(own_run)["student/extra/student.model"].name == "signed"


def test_a_link_to_the_same_bytes_is_named(own_run, tmp_path):
    path = own_run.folder / "verdict.json"
    shutil.copy(path, tmp_path / "elsewhere.json")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.json")
    found = quick(own_run)["verdict.json"]
    assert (found.name, str(tmp_path / "elsewhere.json") in found.found) == ("links", True)


def test_a_linked_folder_is_named(own_run, tmp_path):
    shutil.move(own_run.folder / "bars", tmp_path / "bars")
    (own_run.folder / "bars").symlink_to(tmp_path / "bars")
    assert quick(own_run)["bars"].name == "links"


def test_a_missing_file_is_named(own_run):
    for rel in ("predictions.parquet", "manifest.yaml", "7_briefing.ipynb", "events.jsonl"):
        held = (own_run.folder / rel).read_bytes()
        (own_run.folder / rel).unlink()
        assert rel in quick(own_run)
        (own_run.folder / rel).write_bytes(held)
    (own_run.pages / "briefing.html").unlink()
    assert f"reports/{own_run.run_id}/briefing.html" in quick(own_run)


# Chains


def unfenced(path):
    "The database without the triggers that keep its rows."
    connection = sqlite3.connect(path)
    names = [
        r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type='trigger'")
    ]
    for name in names:
        connection.execute(f"DROP TRIGGER {name}")
    return connection


CUTS = {
    "the last row is deleted": "DELETE FROM rows WHERE n = (SELECT max(n) FROM rows)",
    "all rows are deleted": "DELETE FROM rows",
    "the first row is deleted": "DELETE FROM rows WHERE n = 1",
    "a row is changed": "UPDATE rows SET body = replace(body, ':', ': ') WHERE n = 1",
    "a row is added": (
        "INSERT INTO rows SELECT n + 1, hash, hash, body, series FROM rows ORDER BY n DESC LIMIT 1"
    ),
    "nothing but the triggers is taken": "SELECT 1",
}


@pytest.mark.parametrize("name", ["ledger.db", "register.db"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_chain_is_named(own_run, name, cut):
    with unfenced(own_run.home / "data/state" / name) as connection:
        connection.execute(CUTS[cut])
    connection.close()
    assert f"data/state/{name}" in quick(own_run), cut


@pytest.mark.parametrize("name", ["ledger.db", "register.db", "sensequant.db"])
def test_a_lost_or_ruined_database_is_named(own_run, name):
    for path in (own_run.home / "data/state").glob(f"{name}*"):
        path.unlink()
    assert quick(own_run)[f"data/state/{name}"].found.startswith("no ")
    assert not (own_run.home / "data/state" / name).exists()  # looking makes none
    (own_run.home / "data/state" / name).write_bytes(b"SQLite format 3\0" + b"\7" * 4096)
    assert f"data/state/{name}" in quick(own_run)


def test_chains_that_grow_stay_whole(own_run):
    series = pd.DataFrame(
        {"net_return": 0.01, "benchmark_return": 0.0, "ic": 0.0},
        index=pd.date_range("2024-01-01", periods=3, tz="Asia/Kolkata"),
    )
    with Ledger(ledger_path(own_run.home)) as ledger:
        ledger.record_trial(Trial("notebook", "later", "NSE", {}, ("AAA",), series))
    assert not quick(own_run)


# Signatures


def test_a_signature_that_was_given_must_lie_there(own_run):
    (path,) = (own_run.home / "data/approvals").rglob("risk-manager.json")
    held = json.loads(path.read_text())
    path.unlink()
    found = quick(own_run)[path.relative_to(own_run.home).as_posix()].found
    assert found == "no such file; Bala signed as Risk Manager"
    for change in ({"name": "Asha"}, {"role": "Business Owner"}, {"manifest_sha256": "ab" * 32}):
        path.write_bytes(json_bytes(held | change, pretty=True))
        assert path.relative_to(own_run.home).as_posix() in quick(own_run), change


def test_a_signature_nobody_gave_is_named(own_run):
    (path,) = (own_run.home / "data/approvals").rglob("risk-manager.json")
    shutil.copy(path, path.with_name("business-owner.json"))
    forged = json.loads(path.read_text()) | {"role": "Business Owner", "signature": "ab" * 64}
    path.with_name("business-owner.json").write_bytes(json_bytes(forged, pretty=True))
    where = path.with_name("business-owner.json").relative_to(own_run.home).as_posix()
    assert quick(own_run)[where].found == "not in the register"


# What is made again


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_model_that_is_none_is_named(own_run, kind):
    "Recorded and all: the loader refuses it."
    name = {"student": "student.model", "teacher": "model.txt.zst"}[kind]
    path = sorted(own_run.folder.glob(f"{kind}/*/{name}"))[0]
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    own_run.artifacts.write_bytes(path.relative_to(own_run.folder).as_posix(), path.read_bytes())
    wrong = [f for f in verification._models(verification._Case(own_run)) if not f.passed]
    assert [f.where for f in wrong] == [f"{kind}/{path.parent.name}"]


def test_predictions_that_no_model_made_are_named(own_run):
    table = own_run.artifacts.read_parquet("predictions.parquet")
    table.loc[table.index[0], "p_long"] += 1e-9
    own_run.artifacts.write_parquet("predictions.parquet", table)
    wrong = {f.name for f in verify_run(own_run).faults}
    assert wrong >= {"rescore", "signed"}


def test_the_trial_in_the_ledger_must_be_the_accounts(own_run):
    daily = own_run.artifacts.read_parquet("daily_returns.parquet")
    daily.iloc[0] *= 1.5
    own_run.artifacts.write_parquet("daily_returns.parquet", daily)
    assert {f.name for f in verify_run(own_run).faults} >= {"trial", "returns", "signed"}


LOST = ("recipe.json", "inputs.json", "config.json", "student_runs.json", "verdict.json", RECORD)


def test_nothing_that_is_lost_stops_it(own_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(own_run.home))
    for rel in LOST:
        (own_run.folder / rel).unlink()
        seen = verify_run(own_run)
        assert rel in {f.where for f in seen.faults}
    shutil.rmtree(own_run.folder)
    own_run.folder.mkdir()
    seen = verify_run(own_run)
    assert not seen.whole and all(f.found for f in seen.faults)
    done = cli.invoke(app, ["verify", own_run.run_id])
    assert (done.exit_code, "Traceback" in done.output) == (3, False)
    assert "FAULT" in done.stdout and "faults in" in done.stdout.splitlines()[-1]


def test_a_run_without_a_verdict_is_told_what_it_lacks(tmp_path):
    config = run_config(load_settings(workers=1, **SMALL), SYMBOLS)
    run = begin_run(config, tmp_path)
    assert go_on(run, until="1_ingest").status == "partial"
    seen = verify_run(run)
    found = {f.name: f.found for f in seen.faults}
    assert found["manifest"] == "none: phase 6 has not written it"
    assert found["candidate"] == "no candidate; done up to 1_ingest"
    assert {"files", "record", "links", "strangers"} <= {c.name for c in seen.checks if c.passed}


# Made again


@pytest.mark.slow
def test_a_simulated_run_comes_out_again(signed_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(signed_run.home))
    before = {p: sha256_file(p) for p in signed_run.home.rglob("*") if p.is_file()}
    done = cli.invoke(app, ["reproduce", signed_run.run_id, "--into", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    twin = Run(signed_run.run_id, tmp_path / "again")
    rows = {r.path: r for r in compare_runs_files(signed_run, twin)}
    apart = {p for p, r in rows.items() if r.status == "equal"}
    assert all(r.status in GOOD for r in rows.values())
    executed = {f"{p.name}.ipynb" for p in PHASES}
    expected = {"manifest.yaml", "promotion_briefing.json", "promotion_briefing.md"}
    assert apart <= executed | expected | {"teacher_runs.json", "student_runs.json"}
    for name in ("verdict.json", "stat_tests.json", "predictions.parquet", "audit/metrics.json"):
        assert rows[name].status == "same"
    with Ledger(ledger_path(twin.home)) as ledger:
        assert ledger.head().hash == read_manifest(signed_run)["ledger"]["hash"]
    after = {p: sha256_file(p) for p in before if ".db" not in p.name}
    assert after.items() <= before.items()
    assert "left out   events.jsonl" in done.stdout and "0 different" not in done.stdout
    (twin.folder / "config.json").write_text("{}")  # what differs is told
    assert {r.path: r.status for r in compare_runs_files(signed_run, twin)}["config.json"] == "same"
    again = cli.invoke(app, ["reproduce", signed_run.run_id, "--into", str(tmp_path / "again")])
    assert again.exit_code == 1 and "must be empty" in again.stderr


@pytest.mark.slow
def test_a_run_audited_beside_a_release_comes_out_again(own_run, tmp_path, monkeypatch):
    "What was deployed then is deployed no more; the second run is laid beside the same release."
    monkeypatch.setenv("SENSEQUANT_HOME", str(own_run.home))
    release = deploy(own_run.home, own_run.run_id, "staging", "Chitra")
    run = begin_run(run_config(load_settings(workers=1, **SMALL), SYMBOLS), own_run.home)
    assert go_on(run).status == "success"
    rollback(own_run.home, "staging", "Chitra", "a lesson")
    again = reproduce_run(run, tmp_path / "again")
    assert again.equal, [r for r in again.rows if r.status not in GOOD]
    twin = Run(run.run_id, tmp_path / "again")
    told = twin.artifacts.read_json("audit/metrics.json")["comparison"]
    assert told["release_id"] == release.release_id
    assert active_release(twin.home, "staging").files == release.files
    shutil.rmtree(release.folder)
    (gone,) = reproduction._bring_deployed(run, Run(run.run_id, tmp_path / "a third"))
    assert gone == f"{release.release_id}, deployed to staging when the run was audited, is gone"


def write_csv(folder):
    "Daily bars of three shares, one of them as traded before a split that halved its price."
    market = MarketSpec(10, date(2022, 1, 1), date(2024, 2, 29), 3, 0.4)
    feed = SimulatedFeed(market)
    folder.mkdir(parents=True)
    for symbol in SYMBOLS:
        bars = feed.fetch(symbol, Interval.DAY, date(2022, 1, 3), date(2024, 2, 29)).bars
        if symbol == SYMBOLS[0]:
            early = bars.index < pd.Timestamp("2023-06-01", tz="Asia/Kolkata")
            prices = ["open", "high", "low", "close"]
            bars[prices] = np.where(early[:, None], bars[prices] * 2, bars[prices])
        bars.index.name = "date"
        bars.to_csv(folder / f"{symbol}.csv", date_format="%Y-%m-%d")


@pytest.fixture(scope="module")
def csv_run(tmp_path_factory):
    "A run of CSV files in a house that has proposed before, whose source is gone."
    home, folder = tmp_path_factory.mktemp("csv"), tmp_path_factory.mktemp("source") / "bars"
    write_csv(folder)
    row = (SYMBOLS[0], "2023-06-01", "split", 0.5, 0.0, 2.0, "any", "confirmed", "a test", "")
    actions_file(home).parent.mkdir(parents=True)
    pd.DataFrame([row], columns=list(ACTION_COLUMNS)).to_csv(actions_file(home), index=False)
    others(home, "before")
    given = {k: v for k, v in SMALL.items() if k not in ("sim_symbols", "signal_ic")}
    settings = load_settings(workers=1, source="csv", csv_dir=folder, **given)
    ended = go_on(begin_run(run_config(settings, SYMBOLS), home))
    assert ended.status == "success", ended.message
    others(home, "later")
    shutil.rmtree(folder)
    return ended.run


def others(home, name):
    "A trial and a proposal of another run of the same market."
    series = pd.DataFrame(
        {"net_return": 0.001, "benchmark_return": 0.0, "ic": 0.01},
        index=pd.date_range("2023-03-01", periods=9, freq="B", tz="Asia/Kolkata"),
    )
    with Ledger(ledger_path(home)) as ledger:
        row = ledger.record_trial(Trial("run", name, "NSE", {}, tuple(SYMBOLS), series))
        day = date.today() if name == "before" else date.today().replace(year=date.today().year + 1)
        ledger.propose(name, "NSE", day, row.series_sha256)


@pytest.mark.slow
def test_a_csv_run_comes_out_again_without_its_source(csv_run):
    "Its split is not applied twice, its place in the year's budget is what it was."
    again = reproduce_run(csv_run)
    try:
        assert [r for r in again.rows if r.status not in GOOD] == []
        assert again.equal and again.ended.status == "success"
        given = {r.path for r in again.rows if r.status == "given"}
        assert {"config.json", "inputs.json", "coverage.json", "1_ingest.ipynb"} <= given
        assert {f"bars/{s}.parquet" for s in SYMBOLS} <= given
        applied = csv_run.artifacts.read_json("actions.json")["applied"]
        assert [a["symbol"] for a in applied] == [SYMBOLS[0]]
        twin = Run(csv_run.run_id, again.home)
        close = [pinned_bars(r, SYMBOLS[0])["close"] for r in (csv_run, twin)]
        assert close[0].equals(close[1]) and close[0].pct_change().abs().max() < 0.3
        assert read_inputs(twin).simulated is False
        verdicts = [r.artifacts.read_json("verdict.json") for r in (csv_run, twin)]
        assert verdicts[0] == verdicts[1] and verdicts[0]["proposal"] == 2
        assert "rows of other runs" not in " ".join(again.warnings)
    finally:
        shutil.rmtree(again.home)


@pytest.mark.slow
def test_a_source_that_is_gone_is_said_when_it_is_asked_for(csv_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(csv_run.home))
    into = str(tmp_path / "again")
    done = cli.invoke(app, ["reproduce", "latest", "--from-source", "--into", into])
    assert done.exit_code == 3
    assert "The second run ended failed" in done.stdout and "MISSING" in done.stdout
    assert "before its verdict" in done.stdout and into in done.stdout


def test_what_cannot_be_made_again_is_refused(own_run, tmp_path):
    flip(ledger_path(own_run.home).with_name("ledger.db"))
    with unfenced(ledger_path(own_run.home)) as connection:
        connection.execute("DELETE FROM rows WHERE n = 1")
    connection.close()
    with pytest.raises(GateError, match="the ledger must be as it was written"):
        reproduce_run(own_run, tmp_path / "one")
    flip(own_run.folder / MANIFEST)
    with pytest.raises(DataError, match="SHA-256 must be"):
        reproduce_run(own_run, tmp_path / "two")
    assert not (tmp_path / "two").exists()
