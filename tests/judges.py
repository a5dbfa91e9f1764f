"""A judge that looks at one figure, for campaigns of tests. Workers import it with their items."""

from sensequant.backtest.gate import Condition, Judgement
from sensequant.backtest.metrics import rank_ic


def rank_ic_judge(run, level=0.03, horizon=5):
    "Promote when the daily rank IC lies above 0 by its Newey-West t; p is one-sided."
    found = rank_ic(run.artifacts.read_parquet("predictions.parquet"), horizon)
    p = found.p / 2 if found.t > 0 else 1 - found.p / 2
    ok, must = bool(p <= level), f"p must be at most {level}"
    return Judgement(ok, (Condition("rank_ic", must, f"{p:.3f}", ok, p, level),))
