"""Speed as ratios measured in one run: what the house adds to work a library must do anyway.

CPU seconds are the steady figure; wall clock depends on who else uses the machine. Nothing here
passes or fails: `make bench` prints, a person reads.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pandas as pd
import psutil
from bench_backtest import bench_backtest
from bench_data import bench_store
from bench_fetch import bench_fetch
from bench_gate import bench_gate
from bench_learn import bench_learn
from bench_traces import bench_traces

from sensequant.backtest.accounts import trade_scores
from sensequant.backtest.calibration import replicate
from sensequant.backtest.stat_tests import stat_tests
from sensequant.core.settings import load_settings
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import Run, pin_run, pinned_bars
from sensequant.features.features import TECHNICAL, technical
from sensequant.learn.batch import BatchRules, train_students, train_teachers
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.records import count_outcomes
from sensequant.learn.tables import Recipe, symbol_table
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops.calibrate_cli import plan_of, production_judge
from sensequant.trading.risk import Rules
from sensequant.trading.strategies import Model

MARKET = MarketSpec(20, date(2021, 7, 5), date(2024, 12, 31))
RECIPE = Recipe()


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


def bench_replication(watch: Stopwatch) -> dict[str, float]:
    """One market of a calibration, 60 symbols by 740 sessions, as the settings would train it."""
    settings = load_settings(sim_symbols=60)
    plan = plan_of(settings, "null", naive=False)
    with watch.timed("calibration, one market", f"60 symbols x {len(plan.days)} sessions"):
        answer = replicate(plan, 900, production_judge(settings))
    return {"one calibration market / 25 s (CPU; at most 1)": answer.cpu_s / 25}


def main() -> None:
    """Time the default run's work, piece by piece, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="phases 2 and 3 on 96 symbols, not 24")
    symbols = 96 if parser.parse_args().full else 24
    watch, folder = Stopwatch(), Path(tempfile.mkdtemp())
    run = make_run(folder, watch)
    bars = {s: pinned_bars(run, s) for s in SimulatedFeed(MARKET).symbols()}
    with watch.timed("features", f"{sum(map(len, bars.values())):,} bars x {len(TECHNICAL)}"):
        for frame in bars.values():
            technical(frame)
    with watch.timed("tables with labels", "20 symbols"):
        for symbol in bars:
            symbol_table(run, symbol, RECIPE)
    with watch.timed("teachers, 1 worker") as serial:
        records = train_teachers(run, RECIPE)
    trained = count_outcomes(records)["success"]
    serial["amount"] = f"{trained} of {len(records)} windows"
    with watch.timed("found done, 1 worker", f"{trained} windows") as again:
        train_teachers(run, RECIPE)
    other = make_run(Path(tempfile.mkdtemp()), Stopwatch())
    with watch.timed("teachers, 2 workers", f"{trained} windows") as double:
        train_teachers(other, RECIPE, BatchRules(2))
    with watch.timed("students, 1 worker", f"{trained} windows"):
        students = train_students(run)
    with watch.timed("predictions") as said:
        predictions = chain_predictions(run, RECIPE)
    said["amount"] = f"{len(predictions):,} rows of {count_outcomes(students)['success']} students"
    with watch.timed("backtest", f"{predictions['ts'].nunique()} sessions x 20"):
        daily = trade_scores(predictions, bars, Rules(1e7), Model()).daily
    with watch.timed("statistics", "2,000 resamples"):
        stat_tests(daily, predictions, horizon=5, seed=1)
    ratios = {
        "2 workers / 1 worker (wall; 0.5 is ideal)": double["wall s"] / serial["wall s"],
        "found done / trained (CPU; what a resume pays)": again["cpu s"] / serial["cpu s"],
        "windows a minute, 2 workers (wall)": 60 * trained / double["wall s"],
    }
    ratios |= bench_backtest(watch)
    ratios |= bench_learn(Path(tempfile.mkdtemp()), watch, symbols)
    ratios |= bench_store(Path(tempfile.mkdtemp()), watch)
    ratios |= bench_fetch(Path(tempfile.mkdtemp()), watch)
    ratios |= bench_replication(watch)
    ratios |= bench_gate(Path(tempfile.mkdtemp()), watch)
    ratios |= bench_traces(Path(tempfile.mkdtemp()), watch)
    print(watch.table().to_string(), "\n")
    for name, value in ratios.items():
        print(f"{name:<58}{value:8.3f}")


if __name__ == "__main__":
    main()
