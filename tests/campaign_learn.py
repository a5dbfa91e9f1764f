"""What the learning path finds where nothing is, where something is, and what breaks it.

    python tests/campaign_learn.py markets --seeds 10 --signal 0      # nothing to find
    python tests/campaign_learn.py markets --seeds 4 --signal 0.05    # a planted signal
    python tests/campaign_learn.py shift --shifts=-60,-20,130,250    # labels moved in a circle
    python tests/campaign_learn.py faults                            # kills, a full disk, no device

Nothing here passes or fails; it prints what was measured, for a person to read. The tests hold the
same properties at a smaller size.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from sensequant.backtest.metrics import rank_ic
from sensequant.core.errors import SenseQuantError
from sensequant.core.events import read_events
from sensequant.core.types import Interval
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs
from sensequant.learn import tables
from sensequant.learn.batch import BatchRules, train_students, train_teachers
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.records import count_outcomes
from sensequant.learn.tables import Recipe, WindowSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.simulator import MarketSpec, simulate

FIRST, START, END = date(2021, 7, 5), date(2022, 1, 1), date(2024, 12, 31)
SCOPES = ("symbol", "pooled")


def made_run(spec: MarketSpec, home: Path | None = None) -> Run:
    """A run over a simulated market, in a home of its own."""
    home = home or Path(tempfile.mkdtemp(prefix="learn-"))
    run = Run("live_candidate_20240101_093000", home)
    market = simulate(spec)
    for symbol in market.symbols:
        pin_bars(run, symbol, market.bars(symbol))
    listed = dict.fromkeys(market.symbols)
    pin_inputs(run, Inputs(START, END, Interval.DAY, True, listed, None))
    with run.state as state:
        state.start_run(run.run_id, {}, os.getpid(), True)
    return run


def recipe_of(trees: int) -> Recipe:
    """The default recipe, or one with fewer and faster trees."""
    rate = 0.01 * 500 / trees
    return Recipe(teacher=TeacherSpec(n_estimators=trees, learning_rate=rate), compare_scopes=True)


def said_by_scope(run: Run, recipe: Recipe, workers: int) -> dict[str, pd.DataFrame]:
    """Train everything; the out-of-sample predictions of both scopes."""
    rules = BatchRules(workers)
    train_teachers(run, recipe, rules)
    train_students(run, batch=rules)
    return {s: chain_predictions(run, recipe, s) for s in SCOPES}


def pooled_t(ics: list[pd.Series], lags: int) -> tuple[float, float]:
    """Mean of the daily ICs of several seeds and its error, clustered by date, with HAC lags.

    Seeds are independent markets, so their dates share nothing; each seed's series is studentised
    with its own lags and the variances of the means are added.
    """
    means, variances = [], []
    for ic in ics:
        x = ic.to_numpy() - ic.mean()
        n, total = len(x), float(x @ x)
        for k in range(1, lags + 1):
            total += 2 * (1 - k / (lags + 1)) * float(x[k:] @ x[:-k])
        means.append(ic.mean())
        variances.append(total / n / n)
    m = len(ics)
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / m)


def markets(args: argparse.Namespace) -> None:
    """Rank IC of both scopes on simulated markets, seed by seed and together."""
    recipe, found = recipe_of(args.trees), {s: [] for s in SCOPES}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        began = time.perf_counter()
        spec = MarketSpec(args.symbols, FIRST, END, seed, args.signal, late_listing_frac=0.0)
        said = said_by_scope(made_run(spec), recipe, args.workers)
        line = [f"seed {seed:>3}"]
        for scope, predictions in said.items():
            ic = rank_ic(predictions, recipe.label.horizon_days)
            found[scope].append(ic.by_date)
            line.append(f"{scope} IC {ic.mean:+.4f} t {ic.t:+.2f} ({ic.n_dates} dates)")
        print("  ".join(line), f" {time.perf_counter() - began:.0f} s", flush=True)
    for scope, ics in found.items():
        mean, error = pooled_t(ics, recipe.label.horizon_days - 1)
        print(f"{scope:<8} mean IC {mean:+.5f}, error {error:.5f}, {mean / error:+.2f} errors of 0")


def shift(args: argparse.Namespace) -> None:
    """The whole path on a planted market whose labels are moved in a circle, by date.

    Below 0 a row gets the label of a later day, which nobody can know once the horizon has passed.
    Above 0 it gets one of an earlier day: the features know it rightly while it lies within their
    memory of 60 bars, so a shift of 20 finds far more than the planted signal. That is no leak;
    further back they have forgotten.
    """
    recipe = recipe_of(args.trees)
    spec = MarketSpec(args.symbols, FIRST, END, args.first_seed, args.signal, late_listing_frac=0.0)
    plain = tables.make_labels
    for k in (0, *args.shifts):

        def moved(bars: pd.DataFrame, label: object, interval: Interval, k: int = k):
            made = plain(bars, label, interval)
            values = ["label", "forward_return"]
            rolled = made[values].to_numpy()
            known = made["label"].notna().to_numpy()
            rolled[known] = np.roll(rolled[known], k, axis=0)
            return made.assign(**dict(zip(values, rolled.T, strict=True))).astype(made.dtypes)

        tables.make_labels = moved
        said = said_by_scope(made_run(spec), recipe, workers=1)  # the patch lives in this process
        tables.make_labels = plain
        for scope, predictions in said.items():
            ic = rank_ic(predictions, recipe.label.horizon_days)
            print(f"shift {k:>4}  {scope:<8} IC {ic.mean:+.4f}  t {ic.t:+.2f}", flush=True)


def worker_pids() -> list[int]:
    """The workers of this process; loky's tracker of resources is none."""
    held = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any("popen_loky" in word for word in child.cmdline()):
                held.append(child.pid)
    return held


def kill_some(times: list[float], told: list[str]) -> None:
    """Kill a worker of this process at each of the moments, in seconds from now."""
    began = time.perf_counter()
    for moment in times:
        time.sleep(max(0.0, began + moment - time.perf_counter()))
        if workers := worker_pids():
            os.kill(workers[0], signal.SIGKILL)
            told.append(f"worker {workers[0]} after {moment:.0f} s")


def faults(args: argparse.Namespace) -> None:
    """A batch with killed workers, a symbol that breaks and a folder in the way."""
    recipe = Recipe(WindowSpec(), teacher=TeacherSpec(n_estimators=args.trees), compare_scopes=True)
    run = made_run(MarketSpec(args.symbols, FIRST, END, 1, 0.0, late_listing_frac=0.0))
    broken = run.folder / "bars" / "SIM003.parquet"
    broken.write_bytes(broken.read_bytes()[:-100] + b"x" * 100)
    blocked = "SIM005_2022-01-01_to_2022-06-29"
    (run.folder / "teacher" / blocked / "model.txt.zst").mkdir(parents=True)
    told: list[str] = []
    killer = threading.Thread(target=kill_some, args=([3.0, 6.0, 9.0, 12.0], told), daemon=True)
    killer.start()
    records = train_teachers(run, recipe, BatchRules(args.workers))
    print("killed:", "; ".join(told))
    print("outcomes:", count_outcomes(records))
    for r in [r for r in records if r.status == "failed"]:
        print(f"  {r.window_label}: {r.message[:110]} (tries {r.tries})")
    clean = made_run(MarketSpec(args.symbols, FIRST, END, 1, 0.0, late_listing_frac=0.0))
    again = {r.window_label: r.artifacts for r in train_teachers(clean, recipe, BatchRules(1))}
    same = [
        r.artifacts == again[r.window_label] for r in records if r.scope == "symbol" and r.artifacts
    ]
    print(f"of {len(same)} symbol windows, {sum(same)} have the bytes of an undisturbed batch")
    broken.write_bytes((clean.folder / "bars" / broken.name).read_bytes())
    shutil.rmtree(run.folder / "teacher" / blocked)
    mended = train_teachers(run, recipe, BatchRules(args.workers))
    anew = sum(r.duration_seconds is not None for r in mended)
    print("mended and gone on:", count_outcomes(mended), f"{anew} windows trained anew")
    full_disk(args)
    dead_device(args)


def full_disk(args: argparse.Namespace) -> None:
    """A batch on a disk that fills, and the same batch once there is room; needs root."""
    place, small = Path(tempfile.mkdtemp(prefix="disk-")), "size=12m"
    mount = ["mount", "-t", "tmpfs", "-o", small, "tmpfs", str(place)]
    if subprocess.run(mount, check=False).returncode:
        print("full disk: not tried, no file system may be mounted here")
        return
    recipe = recipe_of(args.trees)
    spec = MarketSpec(12, FIRST, END, 1, 0.0, late_listing_frac=0.0)
    try:
        run = made_run(spec, place)
        try:
            print(
                "full disk:", count_outcomes(train_teachers(run, recipe, BatchRules(args.workers)))
            )
        except SenseQuantError as error:
            print(f"full disk: the batch ended with: {str(error).splitlines()[0][:160]}")
        subprocess.run(["mount", "-o", "remount,size=900m", str(place)], check=True)
        again = train_teachers(run, recipe, BatchRules(args.workers))
        found = sum(r.status == "success" and r.duration_seconds is None for r in again)
        print(f"with room again: {count_outcomes(again)}, {found} windows found done")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def dead_device(args: argparse.Namespace) -> None:
    """A batch that asks for a GPU where no driver answers."""
    os.environ["OCL_ICD_VENDORS"] = tempfile.mkdtemp(prefix="no-driver-")
    recipe = recipe_of(args.trees)
    recipe = replace(recipe, teacher=replace(recipe.teacher, device_type="gpu"))
    run = made_run(MarketSpec(6, FIRST, END, 1, 0.0, late_listing_frac=0.0))
    records = train_teachers(run, recipe, BatchRules(args.workers))
    warned = {
        e.message for e in read_events(run.folder / "events.jsonl")[0] if e.event_type == "warning"
    }
    used = sorted({str(r.device) for r in records if r.status == "success"})
    print("dead device:", count_outcomes(records), "trained on", ", ".join(used))
    print("\n".join(f"  warning: {w[:150]}" for w in sorted(warned)))


def main() -> None:
    """Read the words and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("markets", "shift", "faults"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=101)
    parser.add_argument("--signal", type=float, default=0.0)
    parser.add_argument("--symbols", type=int, default=60)
    parser.add_argument("--trees", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--shifts", type=lambda t: [int(k) for k in t.split(",")], default=[-60, -20, 130, 250]
    )
    args = parser.parse_args()
    {"markets": markets, "shift": shift, "faults": faults}[args.what](args)


if __name__ == "__main__":
    main()
