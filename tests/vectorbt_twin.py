"""Jobs for vectorbt, run by the interpreter of an environment of its own: `python vectorbt_twin.py
JOB FOLDER` reads FOLDER/job.npz and writes FOLDER/answer.npz. SenseQuant is not there."""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import vectorbt as vbt


def orders(job: dict) -> dict:
    """Equity of one pot of cash from which a fixed sum a share is bought and sold at the open."""
    want = job["want"].astype(bool)
    entries = np.zeros_like(want)
    entries[1:] = want[:-1]
    size = np.zeros(want.shape)
    size[1:] = np.floor(job["notional"] / job["close"][:-1])
    account = vbt.Portfolio.from_signals(
        pd.DataFrame(job["close"]),
        entries,
        ~entries,
        size=size,
        price=job["open"],
        fees=float(job["fee"]),
        init_cash=float(job["cash"]),
        cash_sharing=True,
        group_by=True,
    )
    return {"equity": account.value().to_numpy(), "trades": account.trades.count()}


def timed(job: dict) -> dict:
    """CPU seconds of the two jobs of `bench_backtest.py`, compiled code warm."""
    times = {}
    for name, work in (("a", _many_shares), ("b", _many_pairs)):
        work(job)
        began = time.process_time()
        times[f"total_{name}"] = work(job)
        times[f"cpu_{name}"] = time.process_time() - began
    return times


def _many_shares(job: dict) -> float:
    """96 shares by one cross of averages, each with an account of its own."""
    close = pd.DataFrame(job["close"])
    fast, slow = (vbt.MA.run(close, window).ma for window in (20, 50))
    fast.columns = slow.columns = close.columns
    up = (fast > slow).to_numpy()
    account = vbt.Portfolio.from_signals(
        close,
        np.r_[np.zeros((1, up.shape[1]), bool), up[:-1]],
        np.r_[np.zeros((1, up.shape[1]), bool), ~up[:-1]],
        price=job["open"],
        fees=0.0012,
        init_cash=1e6,
        size_granularity=1,
    )
    return float(account.total_return().mean())


def _many_pairs(job: dict) -> float:
    """100 crosses of averages on minute bars of one share."""
    close = pd.Series(job["minute_close"])
    pairs = [(f, s) for f in range(5, 51, 5) for s in range(60, 241, 20)]
    fast = vbt.MA.run(close, [f for f, _ in pairs]).ma.to_numpy()
    slow = vbt.MA.run(close, [s for _, s in pairs]).ma.to_numpy()
    up = fast > slow
    account = vbt.Portfolio.from_signals(
        close,
        np.r_[np.zeros((1, up.shape[1]), bool), up[:-1]],
        np.r_[np.zeros((1, up.shape[1]), bool), ~up[:-1]],
        price=pd.Series(job["minute_open"]),
        fees=0.0012,
        init_cash=1e6,
        size_granularity=1,
    )
    return float(account.total_return().mean())


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    with np.load(folder / "job.npz") as held:
        done = {"orders": orders, "timed": timed}[sys.argv[1]](dict(held))
    np.savez(folder / "answer.npz", **done)
