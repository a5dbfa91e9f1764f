"""How often the tests of `backtest.stat_tests` are fooled by returns without any skill.

No market and no model: series with the tails, clusters, skewness and overlap that strategies show,
of which the best one is handed in. Run `python tests/campaign_stats.py`; `--share 0.1` takes a
tenth of the replications. Each row names its rejections with exact 95 % binomial bounds.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from arch.bootstrap import SPA
from numba import njit
from scipy.stats import beta as beta_distribution

from sensequant.backtest import metrics
from sensequant.backtest import stat_tests as st
from sensequant.core.testing import sessions

HORIZON = 5  # sessions over which one opinion earns
KINDS = ("normal", "garch", "garch_overlap", "skewed")
LEVELS = (0.05, 0.03)


@dataclass(frozen=True)
class Cell:
    """A null world and how often it is drawn."""

    kind: str  # of KINDS
    n: int  # sessions
    trials: int
    correlation: float  # between trials
    replications: int
    shift: float = 0.0  # standard errors that the first trial really earns
    whole: bool = True  # False: every trial but the candidate knows part of the sessions


@njit(cache=True)
def _clustered(shocks: np.ndarray) -> np.ndarray:
    """GARCH(1,1) with 0.08 and 0.90 and unit variance, along the first axis."""
    out = np.empty_like(shocks)
    for j in range(shocks.shape[1]):
        variance = 1.0
        for t in range(shocks.shape[0]):
            out[t, j] = math.sqrt(variance) * shocks[t, j]
            variance = 0.02 + 0.08 * out[t, j] ** 2 + 0.90 * variance
    return out


def shocks(kind: str, n: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Returns of unit variance and mean 0, shape (n, columns)."""
    if kind == "skewed":  # often a little gain, seldom a large loss: skewness -2
        return 1 - rng.exponential(1.0, (n, columns))
    if kind == "normal":
        return rng.normal(size=(n, columns))
    drawn = rng.standard_t(5, (n + 150, columns)) / math.sqrt(5 / 3)
    return _clustered(drawn)[150:]


def series(cell: Cell, seed: int) -> np.ndarray:
    """Skill-less results (n, trials); overlapping ones carry each opinion for five sessions."""
    rng, overlap = np.random.default_rng(seed), "overlap" in cell.kind
    drawn = shocks(cell.kind, cell.n + 4, cell.trials + 1, rng)
    mixed = math.sqrt(cell.correlation) * drawn[:, :1]
    mixed = mixed + math.sqrt(1 - cell.correlation) * drawn[:, 1:]
    if overlap:
        mixed = np.lib.stride_tricks.sliding_window_view(mixed, 5, axis=0).sum(axis=-1)
    mixed = 0.01 * mixed[-cell.n :]
    mixed[:, 0] += 0.01 * cell.shift * (5 if overlap else 1) / math.sqrt(cell.n)
    return mixed


def frames(cell: Cell, seed: int) -> list[pd.DataFrame]:
    """Trials of one replication, the one to be judged first: the best, or the skilled one."""
    results, rng = series(cell, seed), np.random.default_rng(10_000_000 + seed)
    market = 0.0004 + 0.01 * shocks("garch", cell.n, 1, rng)[:, 0]
    tables = [
        pd.DataFrame({"net_return": r + 0.5 * market, "benchmark_return": market, "ic": r})
        for r in results.T
    ]
    tables = [t.set_index(sessions(cell.n)) for t in tables]
    if not cell.whole:
        cuts = rng.integers(0, cell.n // 2, (cell.trials, 2)) // [[1, 2]]
        tables = [t.iloc[a : cell.n - b] for t, (a, b) in zip(tables, cuts, strict=True)]
    if not cell.shift:
        tables.sort(key=lambda t: -metrics.sharpe(st.statistic_series(t, "alpha")))
    return tables


def spa_p(tables: list[pd.DataFrame], seed: int) -> float:
    """Hansen's consistent p on alpha, as the package arch has it."""
    alphas = pd.concat([st.statistic_series(t, "alpha") for t in tables], axis=1)
    block = math.ceil(st.block_length(alphas.iloc[:, 0].to_numpy(), HORIZON))
    losses = -(alphas / alphas.std()).to_numpy()  # arch compares plain means
    test = SPA(np.zeros(len(alphas)), losses, block_size=block, reps=500, seed=seed)
    test.compute()
    return float(test.pvalues["consistent"])


def one_error_p(long_run: bool, tables: list[pd.DataFrame], seed: int) -> float:
    """p of a max test with one error a trial for all resamples, long-run or standard deviation."""
    returns = np.column_stack([st.statistic_series(t, "alpha") for t in tables])
    n, gaps = len(returns), returns - returns.mean(axis=0)
    block = st.block_length(returns[:, 0], HORIZON)
    power = np.abs(np.fft.rfft(gaps, axis=0)) ** 2
    around = np.fft.irfft(power, n=n, axis=0)[1:] / n  # autocovariances that wrap around
    lags = np.arange(1, n)
    weights = (1 - lags / n) * (1 - 1 / block) ** lags * long_run
    error = np.sqrt(gaps.var(axis=0) + 2 * (weights @ around))
    drawn = st.bootstrap_indices(n, block, 1000, seed)
    counts = np.stack([np.bincount(row, minlength=n) for row in drawn])
    largest = (counts @ gaps / n / error).max(axis=1)
    return (1 + int((largest >= (returns.mean(axis=0) / error)[0]).sum())) / 1001


def with_lags(lags: int, tables: list[pd.DataFrame], seed: int) -> float:
    """p of max-t when its errors use another number of lags."""
    alphas = [st.statistic_series(t, "alpha") for t in tables]
    field = st._field(alphas, HORIZON, lags)
    drawn = st._largest(field, 1000, seed)[:, 0]
    return (1 + int((drawn >= field.t).sum())) / 1001


def max_t_p(statistic: str, tables: list[pd.DataFrame], seed: int) -> float:
    """p of the gate's own test."""
    how = dict(statistic=statistic, horizon=HORIZON, seed=seed, threshold=0.1)
    return st.max_t(tables[0], tables[1:], **how).p


def psr_p(tables: list[pd.DataFrame], seed: int) -> float:
    """One less PSR of the best alpha, as if it were the only trial."""
    return 1 - metrics.psr(st.statistic_series(tables[0], "alpha"))


def dsr_p(tables: list[pd.DataFrame], seed: int) -> float:
    """One less DSR of the best alpha."""
    alphas = [st.statistic_series(t, "alpha") for t in tables]
    return 1 - metrics.dsr(alphas[0], np.array([metrics.sharpe(a) for a in alphas]))


def bounds(hits: int, n: int) -> tuple[float, float]:
    """Exact two-sided 95 % bounds of a rate."""
    low, high = beta_distribution.ppf([0.025, 0.975], [hits, hits + 1], [n - hits + 1, n - hits])
    return (0.0 if hits == 0 else float(low)), (1.0 if hits == n else float(high))


def rejections(test, cell: Cell, first_seed: int = 0) -> list[int]:
    """How many replications a test rejects at each of LEVELS."""
    found = np.array([
        test(frames(cell, first_seed + i), first_seed + i) for i in range(cell.replications)
    ])  # fmt: skip
    return [int((found < level).sum()) for level in LEVELS]


def report(name: str, test, cell: Cell) -> None:
    """One row of the table."""
    began, seed = time.process_time(), 1_000_000
    found = rejections(test, cell, seed)
    rates = [
        f"{hits / cell.replications:.3f} [{low:.3f}, {high:.3f}]"
        for hits, (low, high) in ((h, bounds(h, cell.replications)) for h in found)
    ]
    about = f"{cell.kind:13} {cell.n:4} {cell.trials:4} {cell.correlation:4.1f} {cell.shift:4.1f}"
    took = time.process_time() - began
    print(f"{name:18} {about} {cell.replications:5}  {'  '.join(rates)}  {took:5.0f} s", flush=True)


def main() -> None:
    """All tables, the cheap ones first."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--share", type=float, default=1.0, help="of the replications")
    options.add_argument("--only", default="size,partial,errors,power", help="tables, by comma")
    chosen = options.parse_args()
    wanted, many = chosen.only.split(","), lambda n: max(2, round(n * chosen.share))
    gate, ranks = partial(max_t_p, "alpha"), partial(max_t_p, "rank_ic")
    print("test               kind          days  try corr skill  reps  p<.05  p<.03")
    if "size" in wanted:
        for kind in KINDS:
            for n in (250, 500):
                report("max-t", gate, Cell(kind, n, 1, 0.0, many(1000)))
        report("max-t rank IC", ranks, Cell("garch_overlap", 345, 1, 0.0, many(1000)))
        for trials, replications in ((6, 400), (100, 200)):
            for kind in ("garch", "garch_overlap"):
                for correlation in (0.0, 0.6, 0.9):
                    cell = Cell(kind, 345, trials, correlation, many(replications))
                    tests = {"max-t": gate, "SPA": spa_p, "PSR": psr_p, "DSR": dsr_p}
                    for name in list(tests)[: 4 if trials == 6 else 2]:
                        report(name, tests[name], cell)
        report("max-t", gate, Cell("skewed", 250, 100, 0.6, many(200)))
    if "partial" in wanted:
        for trials in (1, 6, 100):
            cell = Cell("garch", 345, trials, 0.6, many(200 if trials == 100 else 400), whole=False)
            report("max-t, parts", gate, cell)
    if "errors" in wanted:
        tests = {f"own, {lags} lags": partial(with_lags, lags) for lags in (4, 10, 15, 30)}
        tests |= {"one, long-run": partial(one_error_p, True)}
        tests |= {"one, deviation": partial(one_error_p, False)}
        cells = [Cell(kind, 250, 1, 0.0, many(1000)) for kind in KINDS[1:]]
        cells += [Cell(kind, 250, 100, 0.0, many(200)) for kind in KINDS[1:]]
        cells += [Cell(kind, 250, 6, 0.6, many(300), shift=3.0) for kind in KINDS[1:3]]
        for cell in cells:
            for name, test in tests.items():
                report(name, test, cell)
    if "power" in wanted:
        for trials in (1, 6, 100):
            cell = Cell("garch", 345, trials, 0.6, many(200), shift=3.0)
            report("max-t", gate, cell)
            report("DSR", dsr_p, cell)


if __name__ == "__main__":
    main()
