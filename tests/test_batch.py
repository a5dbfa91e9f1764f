"""The batch with real processes: the same bytes whoever works, and what becomes of a window whose
worker is killed, hangs, meets a full disk or damaged bars."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import ROOT

from sensequant.core.artifacts import Artifacts, sha256_file
from sensequant.core.errors import DataError
from sensequant.core.events import json_bytes, read_events
from sensequant.core.types import Interval
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs
from sensequant.features.labels import LabelSpec
from sensequant.learn import batch
from sensequant.learn.ablation import ablation, ablation_table, reward_trial
from sensequant.learn.batch import (
    BatchRules,
    StudentRules,
    TeacherTask,
    importance_share,
    load_window_student,
    load_window_teacher,
    train_students,
    train_teachers,
)
from sensequant.learn.models import read_header
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.records import count_outcomes, read_window_runs, require_few_failures
from sensequant.learn.rewards import RewardSpec
from sensequant.learn.student import StudentSpec
from sensequant.learn.tables import POOLED, Recipe, WindowSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.simulator import MarketSpec, simulate

FIRST, START, END, LATER = date(2021, 6, 1), date(2022, 1, 1), date(2022, 12, 26), date(2023, 4, 25)
TREES = TeacherSpec(n_estimators=10, learning_rate=0.1)
RECIPE = Recipe(WindowSpec(120, 120), teacher=TREES, compare_scopes=True)
USUAL, TAUGHT = BatchRules(), StudentRules()
ALONE = replace(RECIPE, compare_scopes=False)
LABELS = ("2022-01-01_to_2022-04-30", "2022-05-01_to_2022-08-28", "2022-08-29_to_2022-12-26")
# The third window of the six symbols, and of all together, lacks its future.


@pytest.fixture(scope="module")
def market():
    "Bars by symbol of six shares."
    spec = MarketSpec(6, FIRST, LATER, 7, 0.3, late_listing_frac=0.0)
    made_up = simulate(spec)
    return {s: made_up.bars(s) for s in made_up.symbols}


def prepared(home, bars, end=END, run_id="live_candidate_20240101_093000"):
    "A run with its bars pinned, up to a day."
    run = Run(run_id, home)
    for symbol, frame in bars.items():
        pin_bars(run, symbol, frame.loc[: f"{end}"])
    pin_inputs(run, Inputs(START, end, Interval.DAY, True, dict.fromkeys(bars), None))
    with run.state as state:
        state.start_run(run.run_id, {}, os.getpid(), True)
    return run


def made(run, recipe=RECIPE, rules=USUAL, students=TAUGHT):
    "Outcomes of teachers and students."
    return train_teachers(run, recipe, rules), train_students(run, students, rules)


def files(run, *kinds):
    "Hash of each file of teachers and students on disk, which must be those on record."
    held = {a.path: a.sha256 for a in Artifacts(run.folder).index().values()}
    held = {p: h for p, h in held.items() if p.startswith(kinds or ("teacher/", "student/"))}
    assert {p: sha256_file(run.folder / p) for p in held} == held
    return held


def outcomes(records):
    "What must not depend on who did the work."
    return [(r.window_label, r.status, r.skip_class, r.metrics, r.artifacts) for r in records]


def lines(run, kind="teacher"):
    "What is in a runs file now."
    path = run.folder / f"{kind}_runs.json"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def warnings(run):
    "Messages of the warnings of a run."
    events = read_events(run.folder / "events.jsonl")[0]
    return [e.message for e in events if e.event_type == "warning"]


@pytest.fixture(scope="module")
def serial(tmp_path_factory, market):
    "Made in this process; to be looked at, never changed."
    run = prepared(tmp_path_factory.mktemp("serial"), market)
    teachers, students = made(run)
    for records in (teachers, students):
        assert count_outcomes(records) == {"success": 14, "skipped": 7, "failed": 0, "total": 21}
    return run, teachers, students


# --- the same bytes


def workers_of_this():
    "Processes that work for this one now."
    children = psutil.Process().children()
    return [p for p in children if "popen_loky" in " ".join(p.cmdline())]


def kill_one(run, seen):
    "As soon as a line is there, kill workers until one is told to have died in its work."
    while not lines(run):
        time.sleep(0.01)
    while not any("SIGKILL" in words for words in warnings(run)):
        if crew := workers_of_this():
            seen.append(len(lines(run)))
            crew[0].send_signal(signal.SIGKILL)
        time.sleep(1)


def test_a_killed_worker_other_workers_and_another_order_change_no_byte(
    serial, market, tmp_path, monkeypatch
):
    "And windows are told of as they finish, not when all are done."
    run, teachers, students = serial
    items, seen = batch.teacher_items, []
    monkeypatch.setattr(batch, "teacher_items", lambda *given: items(*given)[::-1])
    other = prepared(tmp_path, market)
    killer = threading.Thread(target=kill_one, args=(other, seen), daemon=True)
    killer.start()
    again, later = made(other, RECIPE, BatchRules(workers=2))
    killer.join(5)
    assert seen and 0 < seen[0] < len(again)
    assert "a worker ended with SIGKILL(-9)" in warnings(other)[0]
    assert outcomes(again) == outcomes(teachers) and outcomes(later) == outcomes(students)
    assert files(other) == files(run)
    for scope in ("symbol", "pooled"):
        said, before = (chain_predictions(r, RECIPE, scope) for r in (other, run))
        pd.testing.assert_frame_equal(said, before)
    assert len({line["window_label"] for line in lines(other)}) == len(lines(other)) == 21


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes(serial, market, cluster, bounded, tmp_path):
    run, teachers, students = serial
    other = prepared(tmp_path, market)
    again, later = made(other, RECIPE, BatchRules(backend="dask", scheduler=cluster))
    assert outcomes(again) == outcomes(teachers) and outcomes(later) == outcomes(students)
    assert files(other) == files(run)


# --- what fails


class Cursed(TeacherTask):
    "Hangs over a window of one symbol, and is killed over a window of another."

    def outcome(self, item, plan, rows):
        if plan.window.label == f"SIM002_{LABELS[1]}":
            time.sleep(120)
        if plan.window.label == f"SIM004_{LABELS[1]}":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().outcome(item, plan, rows)


@pytest.mark.slow
def test_what_hangs_or_kills_fails_alone_and_a_resume_repairs(
    serial, market, tmp_path, monkeypatch
):
    run, done = prepared(tmp_path, market), files(serial[0], "teacher/")
    with monkeypatch.context() as patch:
        patch.setattr(batch, "TeacherTask", Cursed)
        rules = BatchRules(workers=2, task_timeout_s=15)
        records = {r.window_label: r for r in train_teachers(run, ALONE, rules)}
    assert Counter(r.status for r in records.values()) == {
        "success": 10,
        "skipped": 4,
        "failed": 4,
    }
    for symbol in ("SIM002", "SIM004"):  # what it had done before it ended stays
        first = records[f"{symbol}_{LABELS[0]}"]
        assert first.status == "success" and all(run.artifacts.has(p) for p in first.artifacts)
    late, dead = (records[f"{s}_{LABELS[1]}"] for s in ("SIM002", "SIM004"))
    assert late.error == "TimedOut: stopped after 15 s" and late.tries == 1
    assert late.error_detail["timeout_seconds"] == 15 and late.duration_seconds >= 15
    assert dead.error == "WorkerDied: its process ended with SIGKILL(-9)" and dead.tries == 3
    assert dead.error_detail["exit_code"] == -9
    again = train_teachers(run, ALONE, BatchRules(workers=2))
    assert outcomes(again) == outcomes(r for r in serial[1] if r.symbol != POOLED)
    fresh = {r.window_label for r in again if r.duration_seconds is not None}
    assert fresh == {late.window_label, dead.window_label}
    assert files(run, "teacher/") == {p: h for p, h in done.items() if POOLED not in p}


@pytest.mark.parametrize(
    ("error", "times", "tries"),
    [
        (ConnectionResetError("gone"), 1, 2),
        (ConnectionResetError("gone"), 9, 3),
        (ValueError("never"), 1, 1),
    ],
)
def test_only_what_may_pass_is_tried_again(
    serial, market, tmp_path, monkeypatch, error, times, tries
):
    calls, teach = [], batch.teach

    def moody(rows, *how):
        calls.append(rows.index[0])
        if len(calls) <= times:
            raise error
        return teach(rows, *how)

    monkeypatch.setattr(batch, "teach", moody)
    run = prepared(tmp_path, {"SIM001": market["SIM001"]})
    first, second, _ = train_teachers(run, ALONE)
    assert (first.tries, second.tries) == (tries, tries if times == 9 else 1)
    if times < tries:
        assert outcomes([first, second]) == outcomes(serial[1][3:5]) and not first.error
        return
    assert first.status == "failed" and first.error == f"{type(error).__name__}: {error}"
    assert first.error_detail["exception"] == type(error).__name__
    assert "in moody" in first.error_detail["traceback"]
    assert (second.status == "failed") == (times == 9)


def test_a_write_that_may_pass_is_tried_again(serial, market, tmp_path, monkeypatch):
    "A disk in the net that was away for a moment; one without room is not asked twice."
    write, calls = Artifacts.write_all, []

    def away(store, named):
        calls.append(sorted(named))
        if len(calls) == 1:
            raise DataError("the folder must be writable") from OSError(116, "stale file handle")
        if len(calls) == 3:
            raise DataError("the disk must have room") from OSError(28, "no space left on device")
        return write(store, named)

    run = prepared(tmp_path, {"SIM001": market["SIM001"]})
    recipe = replace(ALONE, window=WindowSpec(120, 120))
    batch.write_recipe(run, recipe)
    monkeypatch.setattr(Artifacts, "write_all", away)
    task = TeacherTask(run, recipe, BatchRules())
    (item,) = batch.teacher_items(run, recipe)
    first, second, _ = task(item)
    assert (first.status, first.tries, second.status, second.tries) == ("success", 2, "failed", 1)
    assert outcomes([first]) == outcomes(serial[1][3:4])


def test_damaged_bars_fail_their_own_windows_and_the_pooled_ones(serial, market, tmp_path):
    run = prepared(tmp_path, market)
    path = run.folder / "bars" / "SIM003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    records = train_teachers(run, RECIPE)
    failed = [r for r in records if r.status == "failed"]
    assert {r.symbol for r in failed} == {"SIM003", POOLED} and len(failed) == 6
    assert all("bars/SIM003.parquet" in r.error and r.tries == 1 for r in failed)
    assert all("DataError" in r.error_detail["traceback"] for r in failed)
    others = [r for r in records if r.symbol not in ("SIM003", POOLED)]
    untouched = [r for r in serial[1] if r.symbol not in ("SIM003", POOLED)]
    assert outcomes(others) == outcomes(untouched)
    path.write_bytes(whole)
    assert outcomes(train_teachers(run, RECIPE)) == outcomes(serial[1])


ON_A_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
import test_batch as t

run = t.Run("live_candidate_20240101_093000", Path(sys.argv[1]))
disk = str(run.folder / "teacher")
Path(disk).mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", disk], check=True)
full = t.train_teachers(run, t.ALONE)
left = [str(p) for p in Path(disk).rglob("*.tmp*")]
subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
freed = t.train_teachers(run, t.ALONE)
tell = lambda r: [r.window_label, r.status, r.error, r.tries, r.artifacts]
told = [[tell(r) for r in records] for records in (full, freed)]
print(json.dumps([told, left, t.files(run, "teacher/")]))
"""


def test_a_full_disk_fails_windows_and_a_resume_repairs(serial, market, tmp_path):
    "Only the disk of the models is full: what became of each window is still written down."
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("a small disk needs a namespace of its own")
    run = prepared(tmp_path, {s: market[s] for s in ("SIM001", "SIM002")})
    known = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = ["unshare", "-rm", sys.executable, "-c", ON_A_SMALL_DISK, str(run.home)]
    done = subprocess.run(words, capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    (full, freed), left, written = json.loads(done.stdout)
    failed = [x for x in full if x[1] == "failed"]
    assert 0 < len(failed) < 4 and not left
    assert all("no space left on device" in x[2] and x[3] == 1 for x in failed)
    mine = [r for r in serial[1] if r.symbol in ("SIM001", "SIM002")]
    assert [(x[0], x[1], x[4]) for x in freed] == [
        (r.window_label, r.status, r.artifacts) for r in mine
    ]
    assert written == {p: h for r in mine for p, h in r.artifacts.items()}


def test_what_needs_more_memory_than_there_is_fails_and_is_written_down(
    market, tmp_path, monkeypatch
):
    "Tried again alone, and then given up; the window before it stays."
    calls, teach = [], batch.teach

    def hungry(rows, *how):
        calls.append(rows.index[0])
        if rows.index[0] > pd.Timestamp(f"{LABELS[1][:10]}", tz="Asia/Kolkata"):
            raise MemoryError("no room")
        return teach(rows, *how)

    monkeypatch.setattr(batch, "teach", hungry)
    run = prepared(tmp_path, {"SIM001": market["SIM001"]})
    first, second, third = train_teachers(run, ALONE)
    assert (first.status, second.status, third.status) == ("success", "failed", "failed")
    assert second.error == "MemoryError: no room" and second.tries == 3


# --- what is taken over


NEXT = "live_candidate_20240102_093000"


def test_incremental_takes_over_what_did_not_change_and_nothing_else(serial, market, tmp_path):
    "Five months more: the third window has its future now, and the second student more bars."
    run = prepared(tmp_path, market)
    made(run)
    assert files(run) == files(serial[0])
    more = prepared(tmp_path, market, LATER, NEXT)
    rules = BatchRules(incremental=True)
    teachers, students = made(more, RECIPE, rules)
    for kind, records, last in (("teacher", teachers, 2), ("student", students, 1)):
        taken = {r.window_label for r in records if r.incremental}
        names = [*market, POOLED]
        assert taken == {f"{s}_{d}" for s in names for d in LABELS[:last]}
        assert {r.status for r in records if r.window_label.endswith(LABELS[2])} == {"success"}
        for path in (p for r in records if r.incremental for p in r.artifacts):
            assert (more.folder / path).samefile(run.folder / path), (kind, path)
        told = {line["window_label"]: line["incremental"] for line in lines(more, kind)}
        assert {w for w, taken_over in told.items() if taken_over} == taken
    anew = prepared(tmp_path / "anew", market, LATER)
    made(anew)
    assert files(anew) == files(more)  # as if all had been trained
    # Another recipe, or asked to: nothing is taken over.
    other = prepared(tmp_path, market, LATER, NEXT.replace("0102", "0103"))
    slower = replace(RECIPE, teacher=replace(TREES, learning_rate=0.05))
    assert not any(r.incremental for r in train_teachers(other, slower, rules))
    forced = replace(rules, force=True)
    records = train_teachers(other, RECIPE, forced)
    assert not any(r.incremental for r in records)
    assert all(r.duration_seconds is not None for r in records if r.status == "success")
    assert files(other, "teacher/") == files(more, "teacher/")


def test_one_changed_bar_is_not_taken_over(market, tmp_path):
    "The last close of the second window, of one symbol: that window, and all that were ranked."
    made(prepared(tmp_path, market))
    changed = {s: b.copy() for s, b in market.items()}
    day = f"{LABELS[1][-10:-2]}26"
    changed["SIM005"].loc[day, "volume"] += 1
    other = prepared(tmp_path, changed, run_id=NEXT)
    records = train_teachers(other, RECIPE, BatchRules(incremental=True))
    anew = {r.window_label for r in records if r.status == "success" and not r.incremental}
    assert (
        anew <= {f"{s}_{LABELS[1]}" for s in ("SIM005", POOLED)} and f"SIM005_{LABELS[1]}" in anew
    )


def test_done_windows_are_found_again_and_force_trains_anew(market, tmp_path):
    run = prepared(tmp_path, {"SIM001": market["SIM001"]})
    made(run, ALONE)
    before = files(run)
    for records in made(run, ALONE):
        assert [r.duration_seconds for r in records] == [None] * 3
        assert not any(r.incremental for r in records)
    for records in made(run, ALONE, BatchRules(force=True)):
        assert all(r.duration_seconds is not None for r in records if r.status == "success")
    assert files(run) == before
    stronger = StudentRules(StudentSpec(l2=50.0))
    students = train_students(run, stronger)
    assert all(r.duration_seconds is not None for r in students if r.status == "success")


# --- what is asked for


def test_windows_of_one_class_are_skipped(market, tmp_path):
    "No share doubles in a week; ranks among the others have winners and losers all the same."
    run = prepared(tmp_path, market)
    recipe = replace(RECIPE, label=LabelSpec(label_threshold_frac=1.0))
    teachers, students = made(run, recipe)
    own = [r for r in teachers if r.symbol != POOLED and r.end_date <= "2022-09-01"]
    assert len(own) == 12 and {(r.status, r.skip_class) for r in own} == {
        ("skipped", "single_class")
    }
    assert all("are NOOP" in r.message for r in own)
    assert [r.status for r in teachers if r.symbol == POOLED] == ["success", "success", "skipped"]
    assert [s.skip_class for s in students] == [t.skip_class for t in teachers]
    with pytest.raises(DataError, match="at least one window must be trainable"):
        require_few_failures([r for r in teachers if r.symbol != POOLED], 0.5)


def students_of(run, **reward):
    "Hash of each student's model by window, taught under a reward."
    train_students(run, StudentRules(reward=RewardSpec(**reward)))
    return {p.split("/")[1]: h for p, h in files(run, "student/").items() if p.endswith(".model")}


def garbled(bars, after):
    "Other prices from the first bar later than `after`."
    ruined, later = bars.copy(), bars.index > after
    noise = np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.05, later.sum())))[:, None]
    ruined.loc[later, ["open", "high", "low", "close"]] *= noise
    return ruined


def test_rewards_change_later_students_by_what_was_known_before_their_cut(market, tmp_path):
    run = prepared(tmp_path / "whole", market)
    train_teachers(run, RECIPE)
    plain, paid = students_of(run), students_of(run, reward_weighting="linear")
    changed = {w for w in plain if plain[w] != paid[w]}
    assert changed == {w for w in plain if w.endswith(LABELS[1])} and len(changed) == 7
    generous = students_of(run, reward_weighting="linear", reward_clip=0.5)
    assert {w for w in paid if generous[w] != paid[w]} == changed
    cut = max(pd.Timestamp(r.saw_until) for r in read_window_runs(run, "student") if r.saw_until)
    ruined = {s: garbled(b, cut) for s, b in market.items()}
    other = prepared(tmp_path / "ruined", ruined)
    assert files(run, "bars/") != files(other, "bars/")
    train_teachers(other, RECIPE)
    assert students_of(other, reward_weighting="linear") == paid


@pytest.mark.parametrize(
    ("kind", "objective", "mode", "label"),
    [
        ("sgd", "binary", "expanding", LabelSpec("triple_barrier")),
        ("lightgbm", "three_class", "expanding", LabelSpec(label_threshold_vols=0.5)),
        ("logistic", "regression", "rolling", LabelSpec("triple_barrier", horizon_days=3)),
    ],
)
def test_every_way_goes_from_end_to_end(market, tmp_path, kind, objective, mode, label):
    run = prepared(tmp_path, market)
    spec = replace(TREES, objective=objective, early_stopping_rounds=3)
    window = WindowSpec(120, 120, mode, embargo_sessions=2, sample_weights="none")
    recipe = Recipe(window, label, ("technical", "regime"), spec, "pooled", True)
    if objective == "regression":  # only ranks have a target
        recipe = replace(recipe, compare_scopes=False)
    student = StudentSpec(kind, grid=kind == "logistic")
    teachers, students = made(run, recipe, students=StudentRules(student))
    assert {r.status for r in (*teachers, *students)} == {"success", "skipped"}
    done = [r for r in students if r.status == "success"]
    if mode == "expanding":
        assert {r.start_date for r in teachers} == {"2022-01-01"}
        assert [r.metrics["n_rows"] for r in done[:2]] == sorted(
            r.metrics["n_rows"] for r in done[:2]
        )
    for record in done:
        path = f"student/{record.window_label}/student.model"
        assert read_header(run.artifacts.read_bytes(path))["kind"] == kind
        mine = load_window_student(run, record.window_label)
        theirs = load_window_teacher(run, record.window_label)
        assert mine.features == theirs.features
        asked = "regression" if record.symbol == POOLED else objective
        assert theirs.link.objective == asked
    for scope in recipe.scopes:
        said = chain_predictions(run, recipe, scope)
        assert len(said) > 100 and said["score"].between(-1, 1).all()
        assert (said[["p_long", "p_short"]].sum(axis=1) <= 1 + 1e-9).all()
        assert said["dissimilarity"].ge(0).all()


# --- what is compared afterwards


def test_a_small_run_is_compared_as_far_as_it_can_be(market, tmp_path):
    "Two symbols have no order to speak of, and few dates no interval: that is said, and no error."
    run = prepared(tmp_path, {s: market[s] for s in ("SIM001", "SIM002")})
    recipe = replace(RECIPE, groups=("technical", "regime"))
    made(run, recipe)
    found = ablation(run, recipe, 10)
    assert [line["group"] for line in found["symbol"]] == ["regime", "technical"]
    assert all(line["splits (%)"] > 0 and line["interval"] is None for line in found["symbol"])
    assert found["pooled"] == [] and len(ablation_table(found, "symbol")) == 2
    far = replace(recipe, label=LabelSpec(horizon_days=40))
    told = reward_trial(run, far, RewardSpec())
    assert told["interval"] is None and told["n_dates"] > 10 and told["n_bars"] > 20
    for path in (run.folder / "bars").iterdir():
        path.write_bytes(b"damaged")
    assert reward_trial(run, recipe, RewardSpec())["n_bars"] == 0
    assert sum("left out of a comparison" in words for words in warnings(run)) == 2


def test_trees_that_never_split_are_no_error(market, tmp_path):
    run = prepared(tmp_path, {"SIM001": market["SIM001"]})
    stumps = replace(RECIPE, teacher=replace(TREES, min_child_samples=500))
    teachers, students = made(run, stumps)
    assert [r.status for r in students if r.symbol != POOLED][:2] == ["success"] * 2
    assert importance_share(run, teachers).empty
    assert ablation_table(ablation(run, stumps, 10), "symbol").empty
    assert chain_predictions(run, stumps)["score"].notna().all()


@pytest.mark.slow
def test_what_a_group_adds_and_whether_rewards_help(serial, market, tmp_path):
    "Six symbols: both scopes, with intervals; the same figures for one worker and two."
    run, *_ = serial
    other = prepared(tmp_path, market)
    recipe = replace(RECIPE, groups=("technical", "regime"))
    made(other, recipe)
    found = ablation(other, recipe, 100)
    for scope in ("symbol", "pooled"):
        for line in found[scope]:
            low, high = line["interval"]
            assert low <= line["loss"] <= high and line["n_dates"] > 100, (scope, line)
            assert line["loss"] == pytest.approx(line["ic_all"] - line["ic_without"])
    assert ablation(other, recipe, 100, workers=2) == found
    assert json_bytes(found)
    assert [len(ablation_table(found, scope)) for scope in ("symbol", "pooled")] == [2, 2]
    told = reward_trial(run, RECIPE, RewardSpec())
    low, high = told["interval"]
    assert low <= told["gain"] <= high and told["n_dates"] > 60
