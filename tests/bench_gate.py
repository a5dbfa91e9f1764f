"""Speed of the whole gate: part of `make bench`.

From the predictions of 96 shares over three years to the verdict, with 99 other trials of the same
shares and days in the ledger: accounts, every statistic, leak checks, max-t over all trials and,
since the planted signal is strong, the hold-out.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sensequant.backtest.calibration import begin_run, learn_and_predict, make_market
from sensequant.core.ledger import Ledger, Trial, ledger_path, market_of
from sensequant.core.settings import load_settings
from sensequant.data.runs import Run, read_inputs
from sensequant.govern.judgement import JudgePlan, judge_plan, judged, make_account
from sensequant.govern.validation import trial_series
from sensequant.ops.calibrate_cli import plan_of


def enter_others(run: Run, plan: JudgePlan, n: int) -> None:
    """Put trials into the ledger that gained the candidate's days in another order."""
    predictions, rng = run.artifacts.read_parquet("predictions.parquet"), np.random.default_rng(1)
    series = trial_series(make_account(run, plan).daily, predictions)
    inputs, ledger = read_inputs(run), Ledger(ledger_path(run.home))
    for k in range(n):
        own = series.iloc[rng.permutation(len(series))].set_axis(series.index)
        market = market_of(inputs.feed, inputs.simulated)
        names = tuple(sorted(predictions["symbol"].unique()))
        ledger.record_trial(Trial("optimizer", f"sweep-{k}", market, {"k": k}, names, own))


def bench_gate(folder: Path, watch: Any) -> dict[str, float]:
    """Time `judged` on a run of 96 shares with 100 trials on record."""
    settings = load_settings(sim_symbols=96, signal_ic=0.15)
    work = plan_of(settings, "planted", 0.15, naive=False)
    plan = judge_plan(settings.model_dump() | {"propose": True})
    run = begin_run(folder, make_market(work, 1), work)
    learn_and_predict(run, work)
    enter_others(run, plan, 99)
    with watch.timed("the whole gate, 100 trials", f"96 symbols x {len(work.days)} days") as row:
        verdict = judged(run, plan)
    row["amount"] += ", passed" if verdict.passed else f", {verdict.reasons[0][:40]}"
    return {"the whole gate / 60 s (CPU; at most 1)": row["cpu s"] / 60}
