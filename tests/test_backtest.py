"""Backtest, statistics and gate: independent twins, laws, and the size of the bootstrap."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta as beta_distribution

from sensequant.backtest import charts, metrics
from sensequant.backtest.accounts import trade_scores
from sensequant.backtest.stat_tests import (
    BASELINE_KEYS,
    Resampling,
    bootstrap_alpha,
    bootstrap_sharpe,
    stat_tests,
)
from sensequant.core.errors import DataError
from sensequant.core.plots import png
from sensequant.core.testing import expect_fail, random_bars, sessions
from sensequant.trading.risk import Rules
from sensequant.trading.strategies import Model

# --- metrics -------------------------------------------------------------------------------------


def test_figures_of_two_other_libraries(fat_tails):
    "Recorded with empyrical-reloaded 0.7.1 and quantstats 0.0.86 on these two series."
    returns, market = fat_tails
    figures = {
        "sharpe": (metrics.sharpe(returns, 252), 1.7148951668811574),
        "sortino": (metrics.sortino(returns, periods=252), 2.6526412341632972),
        "max_drawdown": (metrics.max_drawdown(returns), -0.16075029239131752),
        "annual_return": (metrics.annualised_return(returns), 0.3895963717084663),
        "annual_volatility": (metrics.annualised_volatility(returns), 0.20408296081638122),
        "win_rate": (metrics.hit_rate(returns), 0.548),
    }
    for name, (ours, theirs) in figures.items():
        assert ours == pytest.approx(theirs, rel=1e-12), name
    fit = metrics.alpha_beta(returns, market)
    assert fit.beta == pytest.approx(0.02451401, abs=1e-8)
    # empyrical compounds a daily alpha with annualization=1, which leaves it as it is
    assert fit.alpha == pytest.approx(0.00138704, abs=1e-8)
    # quantstats corrects skewness and kurtosis for bias, the paper does not
    assert metrics.psr(returns) == pytest.approx(0.9919822957891867, abs=2e-5)


def test_psr_grows_with_the_track_and_falls_with_the_benchmark():
    longer = [metrics.psr_of(0.1, n) for n in (30, 100, 400)]
    harder = [metrics.psr_of(0.1, 100, benchmark=b) for b in (-0.1, 0.0, 0.1, 0.2)]
    assert longer == sorted(longer) and harder == sorted(harder, reverse=True)
    assert metrics.psr_of(0.1, 100, benchmark=0.1) == 0.5


def test_undefined_figures_are_nan_and_missing_returns_are_refused():
    flat, none = pd.Series(np.full(50, 0.001)), pd.Series(dtype=float)
    for figure in (metrics.sharpe, metrics.sharpe_se, metrics.psr, metrics.ljung_box):
        assert np.isnan(figure(flat)) and np.isnan(figure(none)), figure.__name__
    assert np.isnan(metrics.sortino(flat)) and np.isnan(metrics.hit_rate(0 * flat))
    assert np.isnan(metrics.max_drawdown(none)) and np.isnan(metrics.annualised_return(none))
    for figure in (metrics.sharpe, metrics.sortino, metrics.max_drawdown, metrics.ljung_box):
        with expect_fail(DataError, "returns must be numbers"):
            figure(pd.Series([0.01, np.nan]))


def test_rank_ic_is_pandas_spearman_on_every_date():
    rng = np.random.default_rng(8)
    grid = pd.MultiIndex.from_product([sessions(60), [f"S{i}" for i in range(9)]])
    rows = pd.DataFrame(rng.integers(-4, 5, (540, 2)) / 10, grid, ["score", "forward_return"])
    rows = rows.rename_axis(["ts", "symbol"]).reset_index()
    rows.loc[rng.integers(0, 540, 60), "score"] = np.nan
    ours = metrics.rank_ic(rows, 5).by_date
    theirs = {
        ts: g["score"].corr(g["forward_return"], method="spearman")
        for ts, g in rows.dropna().groupby("ts")
        if len(g) >= 3
    }
    theirs = pd.Series(theirs).dropna()
    pd.testing.assert_series_equal(ours, theirs, check_names=False, check_freq=False)


# --- statistics ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tested():
    "A backtest of random scores, its predictions and its figures."
    bars = {f"S{i}": random_bars(300, seed=i) for i in range(8)}
    rng = np.random.default_rng(1)
    predictions = pd.concat(
        pd.DataFrame(
            {
                "symbol": s,
                "ts": b.index,
                "score": rng.uniform(-0.3, 0.3, len(b)),
                "forward_return": (b["close"].shift(-5) / b["open"].shift(-1) - 1).to_numpy(),
            }
        )
        for s, b in bars.items()
    )
    daily = trade_scores(predictions, bars, Rules(1e6, max_volume_frac=1.0), Model()).daily
    answer = stat_tests(daily, predictions, horizon=5, seed=1, bootstrap_samples=200)
    return daily, predictions, answer


def test_scores_are_traded_alike_in_any_order_clock_and_company(tested):
    "Rows shuffled, times in UTC, bars of a share nobody spoke of: the same trades."
    _, predictions, _ = tested
    bars = {f"S{i}": random_bars(300, seed=i) for i in range(8)}
    some = predictions[predictions["ts"] < bars["S0"].index[60]]
    rules, model = Rules(1e6, max_volume_frac=1.0), Model()
    plain = trade_scores(some, bars, rules, model)
    assert len(plain.trades) > 20
    others = {
        "order": (some.sample(frac=1, random_state=3), bars),
        "clock": (some.assign(ts=some["ts"].dt.tz_convert("UTC")), bars),
        "company": (some, bars | {"A": random_bars(300, seed=99)}),
        "order of the bars": (some, dict(reversed(bars.items()))),
    }
    for name, (said, seen) in others.items():
        found = trade_scores(said, seen, rules, model)
        pd.testing.assert_frame_equal(found.trades, plain.trades, obj=name)
        pd.testing.assert_frame_equal(found.daily, plain.daily, obj=name)


def gaps(answer):
    "Names of all figures that are None."
    return {
        f"{name}.{key}"
        for name, section in answer.items()
        if isinstance(section, dict) and name != "reasons"
        for key, value in section.items()
        if value is None
    }


def test_every_none_has_its_reason_and_json_is_strict(tested):
    daily, predictions, answer = tested
    flat = daily.assign(net_return=0.0, gross_return=0.0, turnover=0.0, cost=0.0)
    still = daily.assign(benchmark_return=0.0)
    lost = daily.assign(benchmark_return=np.nan)
    odd = [(daily[:k], predictions) for k in (0, 1, 2, 29, 30)]
    odd += [(d, predictions) for d in (flat, still, lost)]
    odd += [(daily, predictions[:0]), (daily, predictions.assign(score=0.2))]
    for frame, said in odd:
        found = stat_tests(frame, said, horizon=5, seed=1, bootstrap_samples=100)
        json.dumps(found, allow_nan=False)
        assert gaps(found) == set(found["reasons"])
        assert all(found["reasons"].values())
        assert set(found) == set(answer)
        assert {k: set(v) for k, v in found.items() if isinstance(v, dict) and k != "reasons"} == {
            k: set(v) for k, v in answer.items() if isinstance(v, dict) and k != "reasons"
        }
    alone = {"trading.cost_share_of_gross_alpha", "net.min_track_record", "trials.pbo"}
    alone |= {f"trading.{k}" for k in ("capacity_inr", "participation_mean", "participation_p95")}
    alone |= {"trials.pbo_loss"} | {f"baseline.{k}" for k in BASELINE_KEYS}
    assert gaps(answer) <= alone  # nothing was given to hold it against


def test_the_seed_draws_the_interval_and_nothing_else(tested):
    daily, predictions, answer = tested
    again, other = (
        stat_tests(daily, predictions, horizon=5, seed=s, bootstrap_samples=200) for s in (1, 2)
    )
    assert again == answer
    assert other["alpha"]["interval"] != answer["alpha"]["interval"]
    for figures in (answer, other):
        figures = figures["alpha"]
        assert figures["interval"][0] < figures["daily"] < figures["interval"][1]
    assert other["alpha"]["t"] == answer["alpha"]["t"]


def test_rules_that_differ_only_in_cost_differ_only_in_alpha(tested):
    daily, predictions, answer = tested
    dearer = daily.assign(net_return=daily["net_return"] - 0.001)
    found = stat_tests(dearer, predictions, horizon=5, seed=1, bootstrap_samples=200)
    assert found["alpha"]["daily"] == pytest.approx(answer["alpha"]["daily"] - 0.001, abs=1e-12)
    shift = np.subtract(found["alpha"]["interval"], answer["alpha"]["interval"])
    np.testing.assert_allclose(shift, -0.001, atol=1e-12)
    assert found["alpha"]["gross_daily"] == answer["alpha"]["gross_daily"]


def test_a_benchmark_of_another_index_is_used_where_it_exists(tested):
    daily, predictions, _ = tested
    index = pd.Series(0.01 * np.sin(np.arange(len(daily))), daily.index).drop(daily.index[10:25])
    found = stat_tests(
        daily, predictions, horizon=5, seed=1, bootstrap_samples=100, benchmark=index,
        benchmark_name="NIFTY 50",
    )  # fmt: skip
    assert found["benchmark"]["name"] == "NIFTY 50" and found["benchmark"]["n_missing"] == 15
    kept = daily.loc[index.index]
    twin = metrics.alpha_beta(kept["net_return"], index, 5)
    assert found["alpha"]["daily"] == twin.alpha and found["alpha"]["n_sessions"] == twin.n


def clustered(rng, n, sessions_, alpha=0.08, beta=0.90):
    "GARCH(1,1) series with Student-t(5) shocks of unit variance, (n, sessions_)."
    shocks = rng.standard_t(5, (n, sessions_ + 200)) / np.sqrt(5 / 3)
    variance, out = np.ones(n), np.empty_like(shocks)
    for t in range(shocks.shape[1]):
        out[:, t] = np.sqrt(variance) * shocks[:, t]
        variance = 1 - alpha - beta + alpha * out[:, t] ** 2 + beta * variance
    return out[:, 200:]


def share_above(residuals, markets, gain):
    "How many of the strategies 0.5 × market + gain + residual have a lower bound above 0."
    above = 0
    for seed, (e, x) in enumerate(zip(residuals, markets, strict=True)):
        y, plan = 0.5 * x + gain + e, Resampling(5, seed, samples=400)
        slope, level = np.polyfit(x, y, 1)
        alphas = bootstrap_alpha(y, x, plan.drawn(y - level - slope * x))
        above += plan.interval(alphas)[0] > 0
    return above


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "clustered"])
def test_the_bootstrap_is_fooled_about_as_often_as_it_says(kind, record_property):
    "Nominal 2.5 % at the lower end; 600 null strategies of 345 sessions, and 100 with skill."
    rng, n, length = np.random.default_rng(17), 600, 345
    draw = clustered if kind == "clustered" else lambda r, *size: r.normal(0, 1, size)
    markets, residuals = 0.0004 + 0.01 * draw(rng, n, length), 0.006 * draw(rng, n, length)
    fooled = share_above(residuals, markets, 0.0)
    low, high = beta_distribution.ppf(
        [0.025, 0.975], [fooled, fooled + 1], [n - fooled + 1, n - fooled]
    )
    record_property("false_alarms", f"{fooled} of {n}: {fooled / n:.3f} [{low:.3f}, {high:.3f}]")
    print(f"{kind}: {fooled} of {n} null strategies, 95 % CP [{low:.3f}, {high:.3f}]")
    assert low <= 0.05 and high <= 0.07  # bounded size
    assert fooled > 0  # not by never speaking
    found = share_above(residuals[:100], markets[:100], 0.0012)
    print(f"{kind}: {found} of 100 strategies with 12 basis points a session")
    assert found >= 80


def test_blocks_keep_days_together():
    "A resample never pairs one day of the rule with another day of the market."
    x = np.random.default_rng(1).normal(0, 0.01, 200)
    plan = Resampling(5, 3, samples=200)
    exact = bootstrap_alpha(0.0003 + 0.5 * x, x, plan.drawn(x))
    np.testing.assert_allclose(exact, 0.0003, atol=1e-15)
    assert np.isfinite(bootstrap_sharpe(np.r_[0.01, np.zeros(199)], plan.drawn(x))).all()


# --- charts --------------------------------------------------------------------------------------


def test_every_chart_draws_a_small_picture_of_anything(tested):
    daily, predictions, _ = tested
    for frame, said in (
        (daily, predictions),
        (daily[:1], predictions[:3]),
        (daily[:0], predictions[:0]),
    ):
        figures = stat_tests(frame, said, horizon=5, seed=1, bootstrap_samples=100)
        cards = [charts.equity_curve(frame), charts.drawdown_curve(frame)]
        cards += [charts.alpha_interval(figures), charts.ic_by_month(said)]
        cards += [charts.score_histogram(said), charts.score_deciles(said, 5)]
        assert all(len(png(card)) <= 60_000 for card in cards)
        assert all(card.axes[0].get_title(loc="left") for card in cards)
