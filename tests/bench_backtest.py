"""Speed of the two engines beside vectorbt: part of `make bench`.

vectorbt 1.2.0 is asked in an environment of its own when VECTORBT_PYTHON names its Python, as after
`python3 -m venv vbt && vbt/bin/pip install vectorbt==1.2.0`; otherwise only own figures are shown.
Both begin with aligned arrays of prices and end with what each account gained.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sensequant.backtest.backtester import run_backtest, sweep
from sensequant.core.testing import random_bars
from sensequant.core.types import BAR_COLUMNS, IST
from sensequant.market.costs import Slippage
from sensequant.trading.grid import Grid, Signals, build_grid, make_signals, wide_grid
from sensequant.trading.risk import Rules
from sensequant.trading.sizing import Sizing
from sensequant.trading.tape import flat_rates

PAIRS = [(fast, slow) for fast in range(5, 51, 5) for slow in range(60, 241, 20)]
EASY = Rules(1e6, slippage=Slippage(0, 0, 0), max_volume_frac=1.0, circuit_frac=0.0)
FULL = Rules(1e6, Sizing(), stop_frac=0.02, target_frac=0.04, square_off_minute=920)


def daily_market() -> dict[str, pd.DataFrame]:
    """96 shares over 740 sessions."""
    return {f"S{n:02d}": random_bars(740, seed=n) for n in range(96)}


def minute_market(n: int = 90_000) -> Grid:
    """One share on 240 days of 375 minutes."""
    bars = random_bars(n, seed=7, volatility=0.0008).assign(volume=10**7)
    days = pd.bdate_range("2024-01-01", periods=n // 375)
    minutes = pd.to_timedelta(555 + np.arange(375), unit="min")
    index = pd.DatetimeIndex(np.add.outer(days.to_numpy(), minutes.to_numpy()).ravel(), tz=IST)
    columns = {name: bars[[name]].to_numpy(float) for name in BAR_COLUMNS}
    return wide_grid(["S00"], index, columns)


def means(close: np.ndarray, window: int) -> np.ndarray:
    """Moving average down the rows, NaN until the window is full."""
    total = np.cumsum(np.vstack([np.zeros(close.shape[1]), close]), axis=0)
    made = np.full(close.shape, np.nan)
    made[window - 1 :] = (total[window:] - total[:-window]) / window
    return made


def many_shares(market: tuple, engine: str) -> float:
    """Job (a), from arrays to the days of the account: SMA 20/50, a million INR a share."""
    grid = wide_grid(*market)
    want = (means(grid.close, 20) > means(grid.close, 50)).astype(np.int8)
    rules = Rules(96e6, slippage=Slippage(0, 0, 0), max_volume_frac=1.0, circuit_frac=0.0)
    rates = flat_rates(grid, 0.0012)
    result = run_backtest(grid, make_signals(grid, want), rules, engine, rates)  # type: ignore[arg-type]
    return float(result.daily["net_return"].sum())


def pair_signals(grid: Grid) -> list[Signals]:
    """The wishes of 100 pairs of averages."""
    made = {w: means(grid.close, w) for pair in PAIRS for w in pair}
    sure = np.ones(grid.shape)
    return [Signals((made[f] > made[s]).astype(np.int8), sure) for f, s in PAIRS]


def many_pairs(grid: Grid, rules: Rules, flat: bool) -> float:
    """Job (b): 100 pairs on 90,000 minutes, to the equity of each."""
    rates = flat_rates(grid, 0.0012) if flat else None
    trials = ((signals, rules) for signals in pair_signals(grid))
    return float(np.mean([r.raw_days["equity"][-1] for r in sweep(grid, trials, rates)]))


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Least CPU seconds of a few goes."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


def vectorbt(bars: dict[str, pd.DataFrame], grid: Grid) -> dict[str, float]:
    """CPU seconds of the same jobs in vectorbt, compiled code warm; empty where it is not there."""
    python = os.environ.get("VECTORBT_PYTHON")
    if not python:
        return {}
    with tempfile.TemporaryDirectory() as name:
        close, first = (np.column_stack([b[c] for b in bars.values()]) for c in ("close", "open"))
        minute = {"minute_close": grid.close[:, 0], "minute_open": grid.open[:, 0]}
        np.savez(Path(name) / "job.npz", close=close, open=first, **minute)
        twin = str(Path(__file__).with_name("vectorbt_twin.py"))
        subprocess.run([python, twin, "timed", name], check=True)
        with np.load(Path(name) / "answer.npz") as answer:
            return {key: float(answer[key]) for key in answer.files}


def bench_backtest(watch: Any) -> dict[str, float]:
    """Time both engines on jobs (a) and (b), and again with every rule on."""
    bars, grid = daily_market(), minute_market()
    wide = build_grid(bars)
    daily_arrays = wide.symbols, wide.index, {name: getattr(wide, name) for name in BAR_COLUMNS}
    with watch.timed("backtest engines, compile or load", "once a machine"):
        many_shares(daily_arrays, "kernel")
        many_pairs(grid, FULL, flat=False)
    daily, plain = (seconds(lambda e=e: many_shares(daily_arrays, e)) for e in ("kernel", "loop"))
    easy = seconds(lambda: many_pairs(grid, EASY, flat=True), 2)
    full = seconds(lambda: many_pairs(grid, FULL, flat=False), 2)
    theirs = vectorbt(bars, grid)
    ratios = {
        "backtest (a) kernel (CPU ms)": 1000 * daily,
        "96 frames to a grid (CPU ms)": 1000 * seconds(lambda: build_grid(bars)),
        "backtest (a) plain loop (M symbol-bars a CPU s)": 96 * 740 / plain / 1e6,
        "backtest (b) 100 pairs x 90,000 minutes (CPU s)": easy,
        "backtest (b) with stops, square-off, NSE's charges (CPU s)": full,
    }
    if theirs:
        ratios["backtest (a) kernel / vectorbt (CPU; at most 1)"] = daily / theirs["cpu_a"]
        ratios["backtest (b) kernel / vectorbt (CPU; at most 1)"] = easy / theirs["cpu_b"]
        ratios["backtest (b) all rules / vectorbt without (CPU)"] = full / theirs["cpu_b"]
    return ratios
