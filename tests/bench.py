"""Speed as ratios measured in one run: what the house adds to work a library must do anyway.

CPU seconds are the steady figure; wall clock depends on who else uses the machine. Nothing here
passes or fails: `make bench` prints, a person reads.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import lightgbm as lgb
import pandas as pd
import psutil
from bench_data import bench_store
from bench_fetch import bench_fetch

from sensequant.backtest.backtester import long_flat
from sensequant.backtest.stat_tests import stat_tests
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import Run, pin_run, pinned_bars
from sensequant.features.features import FEATURES, features
from sensequant.features.labels import CLASSES
from sensequant.learn.batch import (
    WindowSpec,
    count_outcomes,
    symbol_table,
    train_students,
    train_teachers,
)
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.student import StudentSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.simulator import MarketSpec, simulate

MARKET = MarketSpec(20, date(2021, 7, 5), date(2024, 12, 31))
TREES, WINDOWS = TeacherSpec(), WindowSpec()


@dataclass
class Stopwatch:
    """Rows of the table: what, wall and CPU seconds, how much, and the ratio to a floor."""

    rows: list[dict] = field(default_factory=list)

    @contextmanager
    def timed(self, what: str, amount: str = "") -> Iterator[dict]:
        """Time a block, children included."""
        row, wall, cpu = {"what": what, "amount": amount}, time.perf_counter(), cpu_seconds()
        yield row
        row |= {"wall s": time.perf_counter() - wall, "cpu s": cpu_seconds() - cpu}
        self.rows.append(row)

    def table(self) -> pd.DataFrame:
        """Everything timed so far."""
        return pd.DataFrame(self.rows).set_index("what").round(2).fillna("")


def cpu_seconds() -> float:
    """CPU time of this process and of all children that ended, s."""
    own = psutil.Process().cpu_times()
    return own.user + own.system + own.children_user + own.children_system


def make_run(folder: Path, watch: Stopwatch) -> Run:
    """Simulate, ingest and pin the default market."""
    run, store, feed = (
        Run("live_candidate_20240101_093000", folder),
        BarStore(folder),
        SimulatedFeed(MARKET),
    )
    with watch.timed("simulate 20 symbols", "873 sessions"):
        simulate(MARKET)
    with watch.timed("ingest", "20 symbols"):
        done = ingest(feed, store, feed.symbols(), Interval.DAY, MARKET.start, MARKET.end)
    with watch.timed("pin", "20 symbols"):
        pin_run(run, store, done, date(2022, 1, 1))
    with run.state as state:
        state.start_run(run.run_id, {}, 1, True)
    return run


def bare_lightgbm(run: Run, labels: list[str]) -> Callable[[], None]:
    """The floor: the very fits the teachers need, six a window, and nothing else."""
    tables = [run.artifacts.read_parquet(f"teacher/{w}/labels.parquet") for w in labels]
    codes = {c: k for k, c in enumerate(CLASSES)}
    data = [(t[list(FEATURES)].to_numpy(), t["label"].map(codes).to_numpy(float)) for t in tables]
    share = 1 - 1 / TREES.folds

    def fit_all() -> None:
        for x, y in data:
            for rows in [len(x)] + [int(share * len(x))] * TREES.folds:
                part = lgb.Dataset(x[:rows], y[:rows], params=TREES.parameters())
                lgb.train(TREES.parameters(), part, TREES.n_estimators, keep_training_booster=True)

    return fit_all


def main() -> None:
    """Time the default run's work, piece by piece, and print ratios."""
    watch, folder = Stopwatch(), Path(tempfile.mkdtemp())
    run = make_run(folder, watch)
    bars = {s: pinned_bars(run, s) for s in SimulatedFeed(MARKET).symbols()}
    with watch.timed("features", f"{sum(map(len, bars.values())):,} bars x {len(FEATURES)}"):
        for frame in bars.values():
            features(frame)
    with watch.timed("tables with labels", "20 symbols"):
        for symbol in bars:
            symbol_table(run, symbol, WINDOWS)
    with watch.timed("teachers, 1 worker") as serial:
        records = train_teachers(run, WINDOWS, TREES, workers=1)
    trained = [r.window_label for r in records if r.status == "success"]
    serial["amount"] = f"{len(trained)} of {len(records)} windows"
    floor_work = bare_lightgbm(run, trained)
    with watch.timed("LightGBM alone, same fits", f"{len(trained)} windows x 6 fits") as floor:
        floor_work()
    with watch.timed("found done, 1 worker", f"{len(trained)} windows") as again:
        train_teachers(run, WINDOWS, TREES, workers=1)
    other = make_run(Path(tempfile.mkdtemp()), Stopwatch())
    with watch.timed("teachers, 2 workers", f"{len(trained)} windows") as double:
        train_teachers(other, WINDOWS, TREES, workers=2)
    with watch.timed("students, 1 worker", f"{len(trained)} windows"):
        students = train_students(run, (WINDOWS, TREES, StudentSpec()))
    with watch.timed("predictions") as said:
        predictions = chain_predictions(run, WINDOWS)
    said["amount"] = f"{len(predictions):,} rows of {count_outcomes(students)['success']} students"
    with watch.timed("backtest", f"{predictions['ts'].nunique()} sessions x 20"):
        daily = long_flat(predictions, bars)
    with watch.timed("statistics", "2,000 resamples"):
        stat_tests(daily, predictions, horizon=5, seed=1)
    ratios = {
        "teachers / LightGBM alone (CPU; 1 is the floor)": serial["cpu s"] / floor["cpu s"],
        "2 workers / 1 worker (wall; 0.5 is ideal)": double["wall s"] / serial["wall s"],
        "found done / trained (CPU; what a resume pays)": again["cpu s"] / serial["cpu s"],
        "windows a minute, 2 workers (wall)": 60 * len(trained) / double["wall s"],
    }
    ratios |= bench_store(Path(tempfile.mkdtemp()), watch)
    ratios |= bench_fetch(Path(tempfile.mkdtemp()), watch)
    print(watch.table().to_string(), "\n")
    for name, value in ratios.items():
        print(f"{name:<52}{value:8.3f}")


if __name__ == "__main__":
    main()
