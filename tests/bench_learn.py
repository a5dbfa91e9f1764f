"""Speed of teachers, students and features at full size: part of `make bench`.

The floor of phase 2 is what a user would write without this package: one `lightgbm.train` for each
window and each of its purged folds, on arrays that are there already, with the teacher's parameters
as they stand in the settings. A second floor has the teacher's bound on leaves, which spares work
that no tree of so few rows can need. Both are measured on every fourth window, in turn, half before
phase 2 and half after it, so that all see the same machine.
"""

import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
from bench_data import intraday

from sensequant.core.types import Interval
from sensequant.data.books import BOOK_COLUMNS
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs
from sensequant.features.feature_sets import GROUPS, Context, make_features
from sensequant.features.features import TECHNICAL
from sensequant.features.joined import read_user_table
from sensequant.features.labels import CLASSES
from sensequant.features.windows import purged_folds
from sensequant.learn.batch import (
    BatchRules,
    TeacherTask,
    load_window_student,
    teacher_items,
    train_students,
    train_teachers,
)
from sensequant.learn.records import WindowRecord
from sensequant.learn.tables import Recipe, symbol_table, table_names
from sensequant.learn.teacher import TARGET, TeacherSpec, fit_teacher
from sensequant.market.calendar import sessions
from sensequant.market.simulator import MarketSpec, simulate

FIRST, START, END = date(2021, 7, 5), date(2022, 1, 1), date(2025, 12, 31)  # 8 windows and a stump
WORKERS, EVERY = 2, 4  # processes; one window in so many is fitted plainly
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, weight of one fit


def learn_run(folder: Path, symbols: int) -> Run:
    """A run with eight windows of daily bars for each symbol."""
    run = Run("live_candidate_20260101_093000", folder)
    market = simulate(MarketSpec(symbols, FIRST, END, late_listing_frac=0.0))
    for symbol in market.symbols:
        pin_bars(run, symbol, market.bars(symbol))
    pin_inputs(run, Inputs(START, END, Interval.DAY, True, dict.fromkeys(market.symbols), None))
    with run.state as state:
        state.start_run(run.run_id, {}, 1, True)
    return run


def plain_rows(run: Run, recipe: Recipe) -> list[list[Rows]]:
    """The arrays of every fourth window: one set for each of its purged folds, and the whole."""
    task = TeacherTask(run, recipe, BatchRules())
    pairs = (pair for item in teacher_items(run, recipe) for pair in task.of_symbol(item))
    tables = [rows for plan, rows in pairs if plan.skip_class is None][::EVERY]
    return [list(fits_of(rows, recipe)) for rows in tables]


def fits_of(rows: pd.DataFrame, recipe: Recipe) -> Iterator[Rows]:
    """What each fit of a window learns from."""
    x = rows[list(table_names(rows))].to_numpy(float)
    y = rows["label"].map({c: k for k, c in enumerate(CLASSES)}).to_numpy(float)
    y = (y == 0).astype(float) if recipe.teacher.objective == "binary" else y
    spans = (rows.index, rows["label_known_at"])
    folds = purged_folds(*spans, recipe.teacher.folds, recipe.window.embargo_sessions)
    for at in (*(train for train, _ in folds), np.arange(len(rows))):
        yield x[at], y[at], rows["weight"].to_numpy()[at]


@dataclass
class Floor:
    """CPU seconds of plain fits, with all leaves and with as many as the rows can fill."""

    spec: TeacherSpec
    plain_s: float = 0.0
    bounded_s: float = 0.0
    fits: int = 0

    def measure(self, windows: list[list[Rows]]) -> None:
        """Fit every set both ways, in turn."""
        for x, y, w in (fit for window in windows for fit in window):
            self.plain_s += self.seconds(x, y, w, self.spec.parameters())
            self.bounded_s += self.seconds(x, y, w, self.spec.parameters(n_rows=len(x)))
            self.fits += 1

    def seconds(self, x: np.ndarray, y: np.ndarray, w: np.ndarray, parameters: dict) -> float:
        """CPU seconds of one fit, its end included."""
        began = time.process_time()
        data = lgb.Dataset(x, y, weight=w, params=parameters)
        model = lgb.train(parameters, data, self.spec.n_estimators, keep_training_booster=True)
        del model, data
        return time.process_time() - began


def bench_phases(folder: Path, watch: Any, objective: str, symbols: int) -> dict[str, float]:
    """Phase 2 and 3 from cold workers, as ratios to the plain fits."""
    start = bench_start(watch)
    recipe = Recipe(teacher=TeacherSpec(objective=objective))
    run, rules, floor = learn_run(folder, symbols), BatchRules(WORKERS), Floor(recipe.teacher)
    windows = plain_rows(run, recipe)
    half = len(windows) // 2
    floor.measure(windows[:half])
    with watch.timed(f"phase 2, {objective}") as two:
        done = [r for r in train_teachers(run, recipe, rules) if r.status == "success"]
    floor.measure(windows[half:])
    with watch.timed(f"phase 3, {objective}") as three:
        students = [r for r in train_students(run, batch=rules) if r.status == "success"]
    fits = len(done) * (recipe.teacher.folds + 1)
    two["amount"] = f"{symbols} symbols, {len(done)} windows, {fits:,} fits"
    three["amount"] = f"{len(students)} students"
    plain, bounded = (s * fits / floor.fits for s in (floor.plain_s, floor.bounded_s))
    aim = {"three_class": 1100, "binary": 2500}[objective]
    out = {
        f"{objective}: phase 2 / plain fits (CPU; at most 1.3)": two["cpu s"] / plain,
        f"{objective}: the same, start of workers apart": (two["cpu s"] - start) / plain,
        f"{objective}: phase 2 / fits with our bound on leaves": two["cpu s"] / bounded,
        f"{objective}: phase 3 / phase 2 (CPU; at most 1)": three["cpu s"] / two["cpu s"],
        f"{objective}: fits a minute, wall (at least {aim:,})": 60 * fits / two["wall s"],
        f"{objective}: the same on {WORKERS} idle cores, by CPU": 60
        * WORKERS
        * fits
        / two["cpu s"],
    }
    return out | bench_answer(run, students) if objective == "three_class" else out


def bench_start(watch: Any) -> float:
    """CPU seconds that the workers need to start: what they import, once each."""
    with watch.timed("start of the workers", f"{WORKERS} processes, imports alone") as start:
        for _ in range(WORKERS):
            subprocess.run([sys.executable, "-c", "import sensequant.learn.batch"], check=True)
    return start["cpu s"]


def bench_answer(run: Run, students: list[WindowRecord]) -> dict[str, float]:
    """One bar, one answer: wall milliseconds of a student in the middle of its life."""
    record = students[0]
    student = load_window_student(run, record.window_label)
    table = symbol_table(run, record.symbol, Recipe())[list(student.features)].dropna()
    later = table[(table.index > student.trained_until) & (table.index <= student.expires_at)]
    bars = [later.iloc[k : k + 1] for k in range(len(later))]
    times = []
    for bar in bars * 5:
        began = time.perf_counter()
        student.score(bar)
        times.append(1000 * (time.perf_counter() - began))
    return {
        "one bar's prediction, median (ms; at most 1)": float(np.median(times)),
        "one bar's prediction, 99th percentile (ms)": float(np.quantile(times, 0.99)),
    }


def bench_pooled(watch: Any) -> dict[str, float]:
    """A pooled regression at its full size."""
    rng, stamps = np.random.default_rng(1), sessions(date(2022, 1, 1), date(2024, 12, 31))[:740]
    index = pd.DatetimeIndex(np.repeat(stamps, 96), name="ts")[:71_000]
    names = TECHNICAL[:22]
    rows = pd.DataFrame(rng.normal(size=(len(index), 22)), index=index, columns=list(names))
    target = (0.05 * rows.iloc[:, 0] + rng.normal(size=len(index))).clip(-3, 3)
    rows = rows.assign(label="NOOP", forward_return=0.01 * target, label_known_at=index)
    rows["label_known_at"] += pd.Timedelta(days=7)
    with watch.timed("pooled regression", f"{len(rows):,} x 22, 500 trees") as pooled:
        trees = TeacherSpec(objective="regression", n_estimators=500, learning_rate=0.01)
        fit_teacher(rows.assign(**{TARGET: target}), names, trees)
    return {"pooled regression, 71,000 x 22 (CPU s; at most 8)": pooled["cpu s"]}


def five_minute_context(folder: Path, bars: pd.DataFrame) -> Context:
    """A book within each bar, and words of the day before for every other group."""
    rng, close = np.random.default_rng(2), bars["close"].to_numpy()
    side = {"bid": -1, "ask": 1}
    books = pd.DataFrame(index=bars.index + pd.Timedelta(minutes=4))
    for name in BOOK_COLUMNS:
        where, part, depth = name.split("_")
        price = close * (1 + side[where] * 1e-4 * int(depth))
        books[name] = price if part == "price" else rng.integers(1, 500, len(bars))
    days = bars.index.normalize().unique()
    stamps = [f"{d:%Y-%m-%d} 18:00" for d in days]
    said = pd.DataFrame({"date": [f"{d:%Y-%m-%d}" for d in days], "items": 3, "source": "rss"})
    said["available_at"] = pd.DatetimeIndex(days).as_unit("us") + pd.Timedelta(hours=18)
    said = said.assign(value=rng.uniform(-1, 1, len(days)), confidence=0.5, asked="rss")
    for prefix, symbol in (("options", "symbol,"), ("macro", "")):
        lines = [f"{symbol and 'AAA,'}{s},{rng.uniform():.3f}" for s in stamps]
        text = "\n".join([f"{symbol}available_at,level", *lines]) + "\n"
        (folder / f"{prefix}.csv").write_text(text)
    tables = [read_user_table(folder / f"{p}.csv", p) for p in ("options", "macro")]
    listed = days[0].date()
    return Context(
        Interval.MINUTE_5, listed, bars["close"], books.assign(source="x"), said, *tables
    )


def five_minute_features(folder: Path, symbols: int) -> tuple[int, dict[str, float], float]:
    """Rows, CPU seconds of each group over a year of five-minute bars, and peak memory in MB."""
    bars = intraday(date(2024, 1, 1), date(2024, 12, 31), 5)
    context = five_minute_context(folder, bars)
    spent = dict.fromkeys(GROUPS, 0.0)
    for group in GROUPS:
        make_features(bars, context, (group,))  # what is compiled is compiled once a machine
        began = time.process_time()
        for _ in range(symbols):
            make_features(bars, context, (group,))
        spent[group] = time.process_time() - began
    return symbols * len(bars), spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_features(folder: Path, watch: Any, symbols: int = 95) -> dict[str, float]:
    """Every group over a year of five-minute bars, one symbol after the other."""
    alone = multiprocessing.get_context("spawn")  # nothing of this process's memory counts
    with watch.timed("features of five-minute bars") as row, ProcessPoolExecutor(1, alone) as pool:
        rows, spent, peak = pool.submit(five_minute_features, folder, symbols).result()
    row["amount"] = f"{rows:,} rows, {len(GROUPS)} groups"
    aim = {"technical": "; at most 1"}
    out = {f"{g}, {rows / 1e6:.1f} M rows (CPU s{aim.get(g, '')})": s for g, s in spent.items()}
    return out | {"their memory (MB; at most 2,000)": peak}


def bench_learn(folder: Path, watch: Any, symbols: int) -> dict[str, float]:
    """Everything above."""
    ratios: dict[str, float] = {}
    for objective in ("three_class", "binary"):
        (folder / objective).mkdir()
        ratios |= bench_phases(folder / objective, watch, objective, symbols)
    return ratios | bench_pooled(watch) | bench_features(folder, watch)
