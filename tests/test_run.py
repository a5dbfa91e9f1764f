"""The whole way: a finished run, and the same run killed, stopped, damaged, starved of disk and
taken up again. Everything here runs the real phases on a small simulated market."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import SMALL, SYMBOLS
from typer.testing import CliRunner

from sensequant.core.artifacts import Artifacts, sha256_file
from sensequant.core.errors import DataError, GateError
from sensequant.core.events import EVENT_TYPES, EventReader, read_events
from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs, pinned_bars, read_inputs
from sensequant.learn.batch import BatchRules, train_students, train_teachers
from sensequant.learn.records import (
    count_outcomes,
    read_window_runs,
    record_from,
    require_few_failures,
)
from sensequant.learn.tables import POOLED, read_recipe
from sensequant.market.calendar import sessions
from sensequant.ops.main import app
from sensequant.ops.orchestrator import (
    PHASES,
    begin_run,
    claim_run,
    done_phases,
    open_feed,
    plan_run,
    recipe_of,
    run_config,
    state_of,
)

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-c", "from sensequant.ops.main import main; main()"]
NAMES = [p.name for p in PHASES]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.upper().startswith("SENSEQUANT_")}
ENVIRONMENT["SENSEQUANT_ENV_FILE"] = os.devnull


def given(**more):
    "The options of a small run."
    pairs = [w for k, v in (SMALL | more).items() for w in ("--set", f"{k}={v}")]
    return [*pairs, "--symbols", ",".join(SYMBOLS)]


# What must not differ between two runs of the same inputs, settings and seed.
COMPARED = ("bars/", "inputs.", "coverage.", "teacher/", "student/", "predictions")
COMPARED += ("audit/checks.", "audit/plots/", "audit/telemetry_summaries/")  # settings differ
COMPARED += ("recipe.", "ablation.", "validation_summary.", "daily_returns.", "stat_tests.")


def evidence(run):
    "Hash of each comparable file by path, from the bytes on disk; each must be the one on record."
    held = [a for a in Artifacts(run.folder).index().values() if a.path.startswith(COMPARED)]
    found = {a.path: sha256_file(run.folder / a.path) for a in held}
    assert found == {a.path: a.sha256 for a in held}
    return found


def statuses(run):
    "Phases and their status, and how the run stands."
    with run.state as state:
        phases = {p.phase: p.status for p in state.phases(run.run_id).values()}
        return phases, state.run(run.run_id).status


def lines(path):
    "Records of a file of JSON lines."
    return [json.loads(line) for line in path.read_text().splitlines()]


def require_whole(run):
    "A finished run: every phase done, every file as recorded and as signed in the manifest."
    assert statuses(run) == (dict.fromkeys(NAMES, "success"), "success")
    assert Artifacts(run.folder).verify() == []
    manifest = yaml.safe_load((run.folder / "manifest.yaml").read_text())
    signed = {path: a["sha256"] for path, a in manifest["files"].items()}
    assert signed == {path: sha256_file(run.folder / path) for path in signed}
    assert json.loads((run.folder / "audit/checks.json").read_text())["whole"] is True
    assert not list(run.folder.rglob("*.tmp"))
    assert {p.name for p in run.pages.iterdir()} == PAGES
    with run.state as state:
        assert state.candidate(run.run_id).manifest_sha256 == sha256_file(
            run.folder / "manifest.yaml"
        )


PAGES = {f"{name}.html" for name in NAMES} | {"index.html", "briefing.html"}


# A finished run


def test_a_finished_run_stands_in_the_state(finished_run):
    require_whole(finished_run)
    with finished_run.state as state:
        record = state.run(finished_run.run_id)
        phases = state.phases(finished_run.run_id)
        assert (state.stale_runs(), record.simulated) == ([], True)
        assert state.candidate(finished_run.run_id).status == record.message == "ready-for-review"
        assert record.config == finished_run.artifacts.read_json("config.json")
        for kind in ("teacher", "student"):
            noted = {
                k: (w.status, w.skip_class) for k, w in state.windows(record.run_id, kind).items()
            }
            told = read_window_runs(finished_run, kind)
            assert noted == {w.window_label: (w.status, w.skip_class) for w in told}
    assert all(p.duration_seconds > 0 and not p.message for p in phases.values())


def test_a_finished_run_tells_its_events(finished_run):
    events, damaged = read_events(finished_run.folder / "events.jsonl")
    counts = Counter(e.event_type for e in events)
    assert (damaged, set(counts) <= set(EVENT_TYPES)) == (0, True)
    assert (events[0].event_type, events[-1].event_type) == ("run_start", "run_end")
    steps = [(e.event_type, e.phase) for e in events if e.event_type.startswith("phase_")]
    assert steps == [(f"phase_{s}", name) for name in NAMES for s in ("start", "end")]
    once = (
        "run_start",
        "run_end",
        "student_batch_end",
        "validation_complete",
        "stat_test_complete",
    )
    assert [counts[name] for name in once] == [1] * 5
    for kind in ("teacher", "student"):
        told = Counter(r["status"] for r in lines(finished_run.folder / f"{kind}_runs.json"))
        seen = {e: counts[f"{kind}_window_{e}"] for e in ("success", "skip", "fail")}
        assert seen == {"success": told["success"], "skip": told["skipped"], "fail": told["failed"]}
    assert all(e.run_id == finished_run.run_id for e in events)
    assert all(e.timestamp.utcoffset() == datetime.now(IST).utcoffset() for e in events)
    assert [e.timestamp for e in events] == sorted(e.timestamp for e in events)


def test_a_finished_run_has_its_files(finished_run):
    folder = finished_run.folder
    named = {f"{name}.ipynb" for name in NAMES} | {"events.jsonl", "artifacts.jsonl", "config.json"}
    named |= {
        "coverage.json",
        "inputs.json",
        "actions.json",
        "sources.json",
        "teacher_runs.json",
        "student_runs.json",
        "recipe.json",
        "ablation.json",
        "audit",
    }
    named |= {"predictions.parquet", "validation_summary.json", "validation_summary.md"}
    named |= {"bars", "holdout"}
    named |= {"daily_returns.parquet", "trades.parquet", "baseline_returns.parquet"}
    named |= {"stat_tests.json", "verdict.json", "manifest.yaml", "teacher", "student"}
    assert {p.name for p in folder.iterdir()} == named | {
        "promotion_briefing.md",
        "promotion_briefing.json",
    }
    for path in folder.rglob("*.json"):
        if path.name not in ("teacher_runs.json", "student_runs.json"):  # JSON Lines
            json.loads(path.read_text(), parse_constant=pytest.fail)
    trained = [w for w in read_window_runs(finished_run, "teacher") if w.status == "success"]
    students = {w.window_label: w for w in read_window_runs(finished_run, "student")}
    files = {"model.txt.zst", "labels.parquet", "feature_importance.json", "metadata.json"}
    files |= {"evaluation.json", "dataset.json"}
    for w in trained:
        assert {p.name for p in (folder / "teacher" / w.window_label).iterdir()} == files
        held = {p.name for p in (folder / "student" / w.window_label).iterdir()}
        sheets = {"promotion_checklist.md", "promotion_checklist.json"}
        judged = sheets if students[w.window_label].metrics["n"] else set()
        assert held == {"student.model", "evaluation.json", "metadata.json"} | judged
    assert sum(bool(w.metrics.get("n")) for w in students.values()) > 5
    assert read_recipe(finished_run) == recipe_of(
        finished_run.artifacts.read_json("config.json"), 3
    )
    columns = {"symbol", "ts", "window_label", "p_long", "p_short", "score", "label_known_at"}
    predictions = finished_run.artifacts.read_parquet("predictions.parquet")
    assert columns | {"forward_return"} <= set(predictions.columns)
    assert len(list((folder / "teacher").iterdir())) == len(trained) > 5


def test_the_windows_files_are_sorted_and_say_why(finished_run):
    for kind in ("teacher", "student"):
        told = lines(finished_run.folder / f"{kind}_runs.json")
        keys = [(r["symbol"], r["start_date"]) for r in told]
        assert keys == sorted(keys) and len(set(keys)) == len(keys) == 24
        together = [r for r in told if r["symbol"] == POOLED]  # three symbols have no ranks
        assert [r["scope"] for r in together] == ["pooled"] * 6
        assert {r["skip_class"] for r in together} == {"no_data"}
        assert all(
            (r["status"] == "skipped") == bool(r["skip_class"] and r["message"]) for r in told
        )
    classes = {r["skip_class"] for r in lines(finished_run.folder / "teacher_runs.json")}
    assert {"pre_listing", "insufficient_history", "insufficient_future"} <= classes


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_needs_nothing_else(finished_run, name):
    path = finished_run.pages / name
    text, page = path.read_text(), BeautifulSoup(path.read_text(), "html.parser")
    assert path.stat().st_size <= 1_000_000
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import", re.sub(r"base64,[^\"]+", "", text))
    assert not page.find_all(["script", "link", "iframe", "object", "embed", "form", "base"])
    assert not [a for tag in page.find_all(True) for a in tag.attrs if a.startswith("on")]
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.find_all("img"))
    policy = page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    links = [a["href"] for a in page.find_all("a")]
    assert all((finished_run.pages / href).is_file() for href in links)
    rows = [len([r for r in t.find_all("tr") if r.find("td")]) for t in page.find_all("table")]
    assert all(n <= 12 for n in rows)
    assert "prefers-color-scheme: dark" in text and finished_run.run_id in text


def test_pages_say_the_verdict_and_that_the_market_is_simulated(finished_run):
    front = BeautifulSoup((finished_run.pages / "index.html").read_text(), "html.parser")
    assert "Ready for review" in front.h1.text and "Simulated market" in front.text
    assert {a["href"] for a in front.find_all("a")} >= PAGES - {"index.html"}
    briefing = (finished_run.pages / "briefing.html").read_text()
    assert "gate with a yearly error budget" in briefing and "Simulated market" in briefing
    assert "SIMULATED" in (finished_run.pages / "1_ingest.html").read_text()


def plain(path):
    "All that a file says, as text."
    if path.suffix == ".zst":
        return pa.input_stream(path, compression="zstd").read().decode()
    if path.suffix in (".model", ".png"):  # a zip of stored files, or a picture
        return path.read_bytes().decode("latin-1")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return f"{pq.read_schema(path).metadata}{table.to_pandas().reset_index().to_csv()}"
    return path.read_text()


def test_what_is_compared_knows_no_run_no_time_and_no_place(finished_run):
    began = datetime.strptime(finished_run.run_id[-15:], "%Y%m%d_%H%M%S")
    words = [finished_run.run_id, str(finished_run.home), str(ROOT), finished_run.run_id[-15:]]
    words += [f"{began:%Y-%m-%d}", f"{began:%Y%m%d}", "duration"]
    held = evidence(finished_run)
    assert len(held) > 60
    for path in held:
        text = plain(finished_run.folder / path)
        assert not [w for w in words if w in text], path


def test_a_simulated_candidate_may_be_tried_but_never_traded(copied_run):
    with copied_run.state as state:
        digest = state.candidate(copied_run.run_id).manifest_sha256
        with pytest.raises(GateError, match="production needs real bars"):
            state.approve(copied_run.run_id, "risk", "A. Rao", "production", digest)
        state.approve(copied_run.run_id, "risk", "A. Rao", "staging", digest)
        assert [a.environment for a in state.approvals(copied_run.run_id)] == ["staging"]
    briefing = copied_run.artifacts.read_json("promotion_briefing.json")
    assert (briefing["environments"], briefing["training"]["simulated"]) == (["staging"], True)


# A plan


def tree(folder):
    "Every file and folder with its size and time."
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_dry_run_touches_nothing_and_tells_the_truth(finished_run, copied_run, monkeypatch):
    before, absent = tree(copied_run.home), copied_run.home.with_name("absent")
    printed = []
    for home in (copied_run.home, absent):
        monkeypatch.setenv("SENSEQUANT_HOME", str(home))
        done = CliRunner().invoke(app, ["run", "--dryrun", *given()])
        assert done.exit_code == 0, done.output
        printed.append(done.output.splitlines()[:-1])  # the last line is a measured time
    assert (tree(copied_run.home), absent.exists()) == (before, False)
    assert printed[0] == printed[1] and "24 windows" in printed[0][1]
    config = finished_run.artifacts.read_json("config.json")
    plan = plan_run(config, open_feed(config), absent)
    told = read_window_runs(finished_run, "teacher")
    expected = [(r.window_label, r.skip_class, r.message) for r in told]
    assert [(p.window.label, p.skip_class, p.message) for p in plan.windows] == expected
    assert plan.rows == sum(len(pinned_bars(finished_run, s)) for s in SYMBOLS)


def test_a_plan_from_the_store_is_the_same(finished_run):
    config = finished_run.artifacts.read_json("config.json")
    fetched = plan_run(config, open_feed(config), finished_run.home)
    stored = plan_run(config | {"skip_fetch": True}, open_feed(config), finished_run.home)
    assert (stored.windows, stored.rows, stored.refused) == (fetched.windows, fetched.rows, {})


def test_a_plan_refuses_what_the_run_would_refuse(tmp_path):
    row = "{:%Y-%m-%d},100,101,99,100,1000\n"
    days = sessions(date(2022, 6, 1), date(2023, 9, 29))
    good = "date,open,high,low,close,volume\n" + "".join(row.format(d) for d in days)
    (tmp_path / "GOOD.csv").write_text(good)
    (tmp_path / "BAD.csv").write_text(good.replace(",101,", ",98,", 50))
    (tmp_path / "OLD.csv").write_text(good[: good.index("2022-07-01")])
    span = {"start": "2023-01-02", "end": "2023-09-29", "holdout_sessions": 35}
    settings = span | {"csv_dir": tmp_path, "source": "csv"}
    config = run_config(load_settings(**settings), [])
    plan = plan_run(config, open_feed(config), tmp_path / "home")
    assert {p.window.symbol for p in plan.windows} == {"GOOD", "POOLED"}
    assert "at most 1.0% of the rows may be rejected; found 25 of 307" in plan.refused["BAD"]
    assert "must have bars in the range" in plan.refused["OLD"]


# Refused before it begins


def test_a_home_that_cannot_be_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path / "file"))
    done = CliRunner().invoke(app, ["run", *given()])
    assert done.exit_code == 2
    assert "the folder must be writable" in done.stderr and str(tmp_path / "file") in done.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_wrong_use_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path / "home"))
    for words in (
        ["run", "--symbols", "NOPE"],
        ["run", "--benchmark", str(tmp_path / "none.csv")],
        ["run", "--set", "horizon_day=5"],
        ["run", "--start", "2024-01-06", "--end", "2024-01-07"],
        ["run", "--unknown"],
        ["resume", "live_candidate_20200101_000000"],
        ["resume"],
    ):
        assert CliRunner().invoke(app, words).exit_code == 2, words
    assert not (tmp_path / "home").exists()


def test_a_run_that_somebody_works_on_is_busy(copied_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(copied_run.home))
    with copied_run.state as state:
        state.claim_run(copied_run.run_id, os.getppid())
    done = CliRunner().invoke(app, ["resume", copied_run.run_id])
    assert (done.exit_code, "a run must have one process" in done.stderr) == (4, True)
    assert CliRunner().invoke(app, ["resume"]).exit_code == 4


def test_resuming_a_finished_run_changes_nothing(copied_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(copied_run.home))
    before = tree(copied_run.folder)
    for words in (["resume"], ["resume", copied_run.run_id, "--require-pass"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0 and "Ready for review" in done.output, done.output
    after = tree(copied_run.folder)
    assert {p.name for p in after if after[p] != before.get(p)} == {"events.jsonl"}
    require_whole(copied_run)


def test_pages_can_be_made_again(copied_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(copied_run.home))
    front = (copied_run.pages / "index.html").read_text()
    shutil.rmtree(copied_run.pages)
    done = CliRunner().invoke(app, ["report", copied_run.run_id])
    assert (done.exit_code, done.output.strip()) == (0, str(copied_run.pages / "index.html"))
    assert {p.name for p in copied_run.pages.iterdir()} == PAGES
    assert (copied_run.pages / "index.html").read_text() == front


def test_a_run_whose_process_died_is_listed_as_interrupted(copied_run, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(copied_run.home))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    with copied_run.state as state:
        state.claim_run(copied_run.run_id, gone.pid)
        gone.wait()
    (row,) = json.loads(CliRunner().invoke(app, ["runs", "--json"]).output)
    assert (row["run_id"], row["status"]) == (copied_run.run_id, "interrupted")


# What must be done again


DAMAGED = {
    "bars/SIM001.parquet": 0,
    "inputs.json": 0,
    "coverage.json": 0,
    "actions.json": 0,
    "sources.json": 0,
    "1_ingest.ipynb": 0,
    "recipe.json": 1,
    "teacher_runs.json": 1,
    "teacher/SIM002_2023-03-28_to_2023-06-25/model.txt.zst": 1,
    "student_runs.json": 2,
    "student/SIM002_2023-03-28_to_2023-06-25/student.model": 2,
    "student/SIM002_2023-03-28_to_2023-06-25/evaluation.json": 2,
    "predictions.parquet": 3,
    "ablation.json": 3,
    "validation_summary.md": 3,
    "daily_returns.parquet": 4,
    "stat_tests.json": 4,
    "audit/summary.md": 5,
    "manifest.yaml": 5,
    "promotion_briefing.md": 6,
    "7_briefing.ipynb": 6,
}


def test_a_phase_is_done_while_its_files_are_what_it_wrote(copied_run):
    assert done_phases(copied_run) == NAMES
    for path, n in DAMAGED.items():
        file = copied_run.folder / path
        held = file.read_bytes()
        file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        assert done_phases(copied_run) == NAMES[:n], path
        file.unlink()
        assert done_phases(copied_run) == NAMES[:n], path
        file.write_bytes(held)
    with copied_run.state as state:
        state.set_phase(copied_run.run_id, "3_student", "failed")
    assert done_phases(copied_run) == NAMES[:2]


def test_a_run_without_its_record_has_nothing_done(copied_run):
    (copied_run.folder / "artifacts.jsonl").unlink()
    assert done_phases(Run(copied_run.run_id, copied_run.home)) == []


def test_a_lost_configuration_comes_back(copied_run):
    held = (copied_run.folder / "config.json").read_bytes()
    (copied_run.folder / "config.json").unlink()
    with copied_run.state as state:
        state.finish_run(copied_run.run_id, "failed")
    claim_run(copied_run.run_id, copied_run.home)
    assert (copied_run.folder / "config.json").read_bytes() == held


def test_a_run_killed_before_it_began_is_refused(tmp_path):
    with state_of(tmp_path) as state:
        run_id = state.new_run_id()
    (tmp_path / "runs" / run_id).mkdir(parents=True)
    with pytest.raises(DataError, match="a run must have begun"):
        claim_run(run_id, tmp_path)


def test_runs_of_the_same_second_have_their_own_ids(tmp_path):
    config = run_config(load_settings(**SMALL), SYMBOLS)
    runs = [begin_run(config, tmp_path) for _ in range(3)]
    assert len({r.run_id for r in runs}) == len({r.folder for r in runs}) == 3


# Windows that fail


def trained(finished_run, home, workers, blocked):
    "Outcomes of a run's windows on the same bars, with folders in the way of some teachers."
    run, config = Run(finished_run.run_id, home), finished_run.artifacts.read_json("config.json")
    inputs = read_inputs(finished_run)
    for symbol in inputs.symbols:
        pin_bars(run, symbol, pinned_bars(finished_run, symbol))
    pin_inputs(run, Inputs(**vars(inputs)))
    for label in blocked:
        (run.folder / "teacher" / label / "model.txt.zst").mkdir(parents=True)
    with run.state as state:
        state.start_run(run.run_id, config, os.getpid(), simulated=True)
    teachers = train_teachers(run, recipe_of(config, len(inputs.symbols)), BatchRules(workers))
    return teachers, train_students(run, batch=BatchRules(workers))


def outcome(record):
    "What must not depend on the number of workers, nor on where the run lies."
    told = re.sub(r"/\S*/", "", record.message)
    return record.window_label, record.status, record.skip_class, told, record.artifacts


def test_failures_are_counted_and_skips_are_not(finished_run, tmp_path):
    blocked = ["SIM001_2023-03-28_to_2023-06-25", "SIM002_2023-06-26_to_2023-09-23"]
    one = trained(finished_run, tmp_path / "one", 1, blocked)
    two = trained(finished_run, tmp_path / "two", 2, blocked)
    for serial, parallel in zip(one, two, strict=True):
        assert [outcome(r) for r in serial] == [outcome(r) for r in parallel]
    teachers, students = one
    assert [r.window_label for r in teachers if r.status == "failed"] == blocked
    assert count_outcomes(teachers) == {"success": 8, "skipped": 14, "failed": 2, "total": 24}
    assert count_outcomes(students) == {"success": 8, "skipped": 16, "failed": 0, "total": 24}
    assert [s.skip_class for s in students if s.window_label in blocked] == ["no_teacher"] * 2
    assert all("is a directory" in r.error for r in teachers if r.status == "failed")
    assert require_few_failures(teachers, 0.2) == 2 / 10  # of those attempted, skips left out
    with pytest.raises(GateError, match="found 2 of 10"):
        require_few_failures(teachers, 0.19)
    whole = {w.window_label: w.artifacts for w in read_window_runs(finished_run, "teacher")}
    assert all(r.artifacts == whole[r.window_label] for r in teachers if r.status == "success")


# The whole way, in processes of its own


STARTED = []  # processes


class Walk:
    "A `sensequant` process as a user starts one, and what can be done to it."

    def __init__(self, home, *words):
        self.home, self.told = home, []
        home.parent.mkdir(parents=True, exist_ok=True)
        self.log = home.parent / f"log-{time.monotonic_ns()}"
        self.reader = EventReader(home / "runs" / words[1] / "events.jsonl")
        self.reader.new()  # what earlier processes told
        # The home is named from the working directory, which is not the one of the phases.
        known = ENVIRONMENT | {"SENSEQUANT_HOME": home.name}
        with self.log.open("w") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            self.process = subprocess.Popen(
                [*CLI, *words], cwd=home.parent, env=known, start_new_session=True, **streams
            )
        STARTED.append(self.process)

    @property
    def run(self):
        "The run it works on, None before it has said so."
        said = re.search(r"^Run (live_candidate_\d+_\d+)$", self.log.read_text(), re.M)
        return Run(said[1], self.home) if said else None

    def news(self):
        "Events since this process was started."
        if not self.reader.path.exists() and self.run:
            self.reader = EventReader(self.run.folder / "events.jsonl")
        self.told += self.reader.new()
        return self.told

    def until(self, seen, seconds=180):
        "Wait until `seen()`."
        limit = time.monotonic() + seconds
        while not seen():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.01)

    def until_event(self, *event):
        "Wait until this process, its kernel or a worker has told of something: type, then phase."
        self.until(lambda: any((e.event_type, e.phase)[: len(event)] == event for e in self.news()))

    def ended(self, seconds=240):
        "Exit code, once it has ended."
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running: {self.log.read_text()}")

    def family(self):
        "The process, its kernel and the kernel's workers."
        return [me := psutil.Process(self.process.pid), *me.children(recursive=True)]

    def kill(self):
        "End it as `kill -9` does; its kernel and the workers must follow by themselves."
        family = self.family()
        assert any(map(is_kernel, family))
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(10) == -signal.SIGKILL
        return family


def is_kernel(process):
    "Whether a living process executes a notebook."
    try:
        return "ipykernel_launcher" in process.cmdline()
    except psutil.Error:
        return False


def kill_all(processes):
    "End processes at once; some may have ended by themselves."
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


WALKS = {}


def walk_beside(function):
    "A test that takes long: two such walks go beside each other, and each test awaits its own."

    @pytest.mark.slow
    def test(walks):
        walks[function.__name__].result()

    WALKS[function.__name__], test.__name__ = function, function.__name__
    return test


@pytest.fixture(scope="module")
def walks(request, finished_run, tmp_path_factory):
    "The long walks that were asked for, by name; the first two share a home."
    asked, pool = {item.name for item in request.session.items}, ThreadPoolExecutor(2)
    shared = tmp_path_factory.mktemp("shared")
    begun = {}
    for name, walk in WALKS.items():
        both = name in TOGETHER and test_two_runs_in_one_home_do_not_disturb_each_other.__name__
        if name in asked or both in asked:
            folder = shared if name in TOGETHER else tmp_path_factory.mktemp("walk")
            begun[name] = pool.submit(walk, finished_run, folder)
    yield begun
    kill_all(psutil.Process(p.pid) for p in STARTED if p.poll() is None)  # of a test that failed
    pool.shutdown(cancel_futures=True)


def require_gone(family, seconds=8):
    "No process of a family is left after a few seconds."
    _, alive = psutil.wait_procs(family, timeout=seconds)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert not [p.cmdline() for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def taught(run):
    "Windows whose teacher is on record; files that were killed before they got there do not count."
    held = [Path(p) for p in Artifacts(run.folder).index()]
    return {p.parent.name for p in held if p.match("teacher/*/metadata.json")}


@walk_beside
def test_a_run_killed_anywhere_and_resumed_ends_the_same(finished_run, folder):
    home = folder / "a home"
    walk = Walk(home, "run", *given(), "--workers", "2")
    walk.until_event("run_start")
    run = walk.run
    walk.until(lambda: list(run.folder.glob("bars/*.parquet")))  # in the middle of phase 1
    families = [walk.kill()]
    assert statuses(run) == ({"1_ingest": "running"}, "running")

    walk = Walk(home, "resume", run.run_id)
    walk.until_event("phase_start", "1_ingest")
    with pytest.raises(GateError, match="a run must have one process"):
        claim_run(run.run_id, home)
    walk.until_event("teacher_window_success")
    kill_all(reversed(walk.family()))  # the machine goes off: all at once
    walk.ended()
    done = taught(run)
    assert 1 <= len(done) < 10
    assert statuses(run)[0] == {"1_ingest": "success", "2_teacher": "running"}

    for event in ("teacher_window_success", "student_window_success"):
        walk = Walk(home, "resume", run.run_id)
        walk.until_event(event)
        families += [walk.kill()]
        told = durations(walk.news())
        assert {w for w, seconds in told.items() if seconds is None} <= done
        assert not {w for w, seconds in told.items() if seconds is not None} & done
        require_gone(families[-1])
        done = taught(run)
    assert len(told) == len(done) == 10

    walk = Walk(home, "resume", run.run_id)
    walk.until(lambda: (run.folder / "predictions.parquet").exists())
    families += [walk.kill()]
    assert statuses(run)[0] == dict.fromkeys(NAMES[:3], "success") | {"4_validate": "running"}

    walk = Walk(home, "resume", run.run_id)
    assert walk.ended() == 0, walk.log.read_text()
    assert walk.log.read_text().count("done before") == 3
    require_whole(run)
    assert evidence(run) == evidence(finished_run)
    assert not [e for e in walk.news() if e.event_type.startswith(("teacher", "student"))]
    require_gone([p for family in families for p in family])
    return run


def durations(events):
    "Seconds of each teacher that was trained, by window; None where it was found done."
    kind = "teacher_window_success"
    return {e.window_label: e.duration_seconds for e in events if e.event_type == kind}


def require_stopped(walk, phase):
    "An interrupted run: said in the state, on a page and on the screen, with the way to go on."
    run = walk.run
    phases, status = statuses(run)
    assert (phases[phase], status) == ("interrupted", "interrupted")
    briefing = json.loads((run.folder / "promotion_briefing.json").read_text())
    assert (briefing["stopped_in"], briefing["status"]) == (phase, "interrupted")
    assert f"sensequant resume {run.run_id}" in (run.pages / "briefing.html").read_text()
    assert "INTERRUPTED" in (run.pages / "index.html").read_text()
    assert read_events(run.folder / "events.jsonl")[0][-1].event_type == "run_end"
    printed = walk.log.read_text()
    assert "stopped by the user" in printed and f"sensequant resume {run.run_id}" in printed
    assert not re.search("Traceback|Task|asyncio|ERROR", printed), printed


@walk_beside
def test_ctrl_c_stops_cleanly_and_the_run_can_go_on(finished_run, folder):
    home = folder / "a home"
    walk = Walk(home, "run", *given(), "--workers", "2")
    walk.until_event("teacher_window_success")
    run = walk.run
    family, began = walk.family(), time.monotonic()
    os.killpg(walk.process.pid, signal.SIGINT)  # as a terminal does
    assert walk.ended() == 130, walk.log.read_text()
    assert time.monotonic() - began < 15
    require_gone(family)
    require_stopped(walk, "2_teacher")

    walk = Walk(home, "resume", run.run_id)
    walk.until_event("phase_start", "3_student")
    family = walk.family()
    for _ in range(2):  # somebody impatient
        os.kill(walk.process.pid, signal.SIGINT)
        time.sleep(0.2)
    # The second one may hit a process that has nothing left to do; a shell says 130 for both.
    assert walk.ended() in (130, -signal.SIGINT), walk.log.read_text()
    require_gone(family)
    require_stopped(walk, "3_student")

    walk = Walk(home, "resume", run.run_id)
    walk.until_event("phase_start", "4_validate")
    time.sleep(1)
    os.kill(walk.process.pid, signal.SIGTERM)
    assert walk.ended() == 130, walk.log.read_text()
    require_stopped(walk, "4_validate")

    walk = Walk(home, "resume", run.run_id)
    assert walk.ended() == 0, walk.log.read_text()
    require_whole(run)
    assert evidence(run) == evidence(finished_run)
    return run


TOGETHER = (
    "test_a_run_killed_anywhere_and_resumed_ends_the_same",
    "test_ctrl_c_stops_cleanly_and_the_run_can_go_on",
)


@pytest.mark.slow
def test_two_runs_in_one_home_do_not_disturb_each_other(finished_run, walks):
    "The same market, the same bar store, the same moment, two workers each."
    runs = [walks[name].result() for name in TOGETHER]
    assert runs[0].home == runs[1].home and runs[0].run_id != runs[1].run_id
    assert {p.name for p in (runs[0].home / "runs").iterdir()} == {r.run_id for r in runs}
    for run in runs:
        require_whole(run)
        assert evidence(run) == evidence(finished_run)
        events, _ = read_events(run.folder / "events.jsonl")
        assert {e.run_id for e in events} == {run.run_id}


@walk_beside
def test_a_run_fails_is_mended_and_is_rejected(finished_run, folder):
    home = folder / "home"
    blocked = ["SIM001_2023-03-28_to_2023-06-25", "SIM002_2022-12-28_to_2023-03-27"]
    # Nothing is there to find, and far more sessions are asked for than there are: which of three
    # shares win within a year is luck, and this run is to be rejected whatever the luck.
    nothing = {"signal_ic": 0, "label_threshold_frac": 0.01, "min_oos_sessions": 5000}
    walk = Walk(home, "run", *given(**nothing))
    walk.until_event("run_start")
    run = walk.run
    for label in blocked:
        (run.folder / "teacher" / label / "model.txt.zst").mkdir(parents=True)

    # 2 of 10 windows failed: more than 15 %
    assert walk.ended() == 1
    assert "failed windows must be at most 15%" in walk.log.read_text()
    assert statuses(run) == ({"1_ingest": "success", "2_teacher": "failed"}, "failed")
    told = lines(run.folder / "teacher_runs.json")
    assert [r["window_label"] for r in told if r["status"] == "failed"] == blocked
    assert Counter(e.event_type for e in walk.news())["teacher_window_fail"] == 2
    facts = json.loads((run.folder / "promotion_briefing.json").read_text())
    assert (facts["stopped_in"], facts["status"]) == ("2_teacher", "failed")
    assert "GateError" in facts["traceback"] and "require_few_failures" in facts["traceback"]
    assert "GateError" in (run.folder / "promotion_briefing.md").read_text()
    assert "GateError" in (run.pages / "briefing.html").read_text()
    assert "FAILED" in (run.pages / "index.html").read_text()
    assert Artifacts(run.folder).verify() == []

    # 1 of 10 may fail; then a file is changed while the run goes on
    (run.folder / "teacher" / blocked[0] / "model.txt.zst").rmdir()
    walk = Walk(home, "resume", run.run_id)
    walk.until_event("phase_end", "3_student")
    (run.folder / "student_runs.json").write_text("changed")
    assert walk.ended() == 1
    assert "SHA-256 must be" in walk.log.read_text()
    trained = [w for w, seconds in durations(walk.news()).items() if seconds is not None]
    assert trained == [blocked[0]]
    assert statuses(run)[0] == dict.fromkeys(NAMES[:3], "success") | {"4_validate": "failed"}

    # A rejection is a finished run; only who requires a pass hears of it
    walk = Walk(home, "resume", run.run_id, "--require-pass")
    assert walk.ended() == 3, walk.log.read_text()
    assert "Rejected" in walk.log.read_text()
    require_whole(run)
    counts = count_outcomes(lines_of_windows(run))
    assert counts == {"success": 9, "skipped": 14, "failed": 1, "total": 24}
    with run.state as state:
        candidate = state.candidate(run.run_id)
    assert candidate.status == "rejected"
    assert any("5000 sessions must be out of sample" in reason for reason in candidate.reasons)
    assert Walk(home, "resume", run.run_id).ended() == 0


def lines_of_windows(run):
    "Outcomes of the teachers of a run that other processes have changed meanwhile."
    return [record_from(line) for line in lines(run.folder / "teacher_runs.json")]


@walk_beside
def test_a_damaged_run_is_made_whole(finished_run, folder):
    run, home = Run(finished_run.run_id, folder / "home"), folder / "home"
    shutil.copytree(finished_run.home, home)
    (run.folder / "stat_tests.json").unlink()
    (run.folder / "7_briefing.ipynb").write_text("edited by hand")
    walk = Walk(home, "resume", run.run_id)
    walk.until(lambda: any(map(is_kernel, walk.family())))
    kill_all(filter(is_kernel, walk.family()))  # as a lack of memory does
    assert walk.ended() == 1
    assert "the kernel must live until the phase ends" in walk.log.read_text()
    phases, status = statuses(run)
    assert (phases["5_stat_tests"], phases["6_audit"], status) == ("failed", "partial", "failed")
    assert done_phases(run) == NAMES[:4]
    walk = Walk(home, "resume", run.run_id)
    assert walk.ended() == 0, walk.log.read_text()
    require_whole(run)
    assert evidence(run) == evidence(finished_run)


ON_A_SMALL_DISK = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path

copy, disk, *cli = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", disk], check=True)
home, ballast = Path(disk, "home"), Path(disk, "ballast")
shutil.copytree(copy, home)
os.environ["SENSEQUANT_HOME"] = str(home)
(run,) = (home / "runs").iterdir()
(run / "stat_tests.json").unlink()
held = lambda: {str(p): p.read_bytes() for p in run.glob("[tsb]*/**/*") if p.is_file()}
pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
begun = lambda: (run / "events.jsonl").read_text().count("phase_start")
before, phases, told = held(), begun(), {}

full = subprocess.Popen([*cli, "resume"], **pipes)
while begun() == phases:
    time.sleep(0.01)
try:
    with ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
except OSError:
    pass
told["full"] = [full.communicate()[0], full.returncode]
new = subprocess.run([*cli, "run", "--sim-symbols", "2"], **pipes)
told["new"] = [new.stdout, new.returncode]
told["kept"], told["left"] = before == held(), [str(p) for p in home.rglob("*.tmp")]
ballast.unlink()
freed = subprocess.run([*cli, "resume", run.name], **pipes)
told["freed"] = [freed.stdout, freed.returncode]
shutil.rmtree(copy)
shutil.copytree(home, copy)
print(json.dumps(told))
"""


@walk_beside
def test_a_full_disk_fails_the_run_and_loses_nothing(finished_run, folder):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("a small disk needs a namespace of its own")
    run, disk = Run(finished_run.run_id, folder / "home"), folder / "disk"
    shutil.copytree(finished_run.home, run.home)
    disk.mkdir()
    words = ["unshare", "-rm", sys.executable, "-c", ON_A_SMALL_DISK, str(run.home), str(disk)]
    done = subprocess.run([*words, *CLI], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    text, code = told["full"]
    assert code == 1 and "no space left on device" in text, text
    assert "Traceback" not in text and f"sensequant resume {run.run_id}" in text
    text, code = told["new"]
    assert code == 1 and "disk" in text and "Traceback" not in text, text
    assert (told["kept"], told["left"]) == (True, [])
    text, code = told["freed"]
    assert code == 0, text
    require_whole(run)
    assert evidence(run) == evidence(finished_run)
