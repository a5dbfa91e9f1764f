"""Statistics against the examples of their papers, other libraries, and the size they claim."""

import json
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path

import campaign_stats
import numpy as np
import pandas as pd
import pytest
from arch.bootstrap import SPA, StepM
from campaign_stats import Cell, frames
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from statsmodels.regression.linear_model import OLS

from sensequant.backtest import metrics, stat_tests
from sensequant.backtest.stat_tests import Beside, Resampling, max_t
from sensequant.core.errors import DataError
from sensequant.core.testing import expect_fail, sessions

# --- examples of the papers ----------------------------------------------------------------------


def _track(q, skewness=0.0, kurtosis=3.0):
    "Years until a yearly ratio of 2 is above 1, watched q times a year."
    return metrics.minimum_track_record(2 / q**0.5, skewness, kurtosis, 1 / q**0.5) / q


def _deflated(n_trials, skewness, kurtosis):
    "Bailey and López de Prado's strategy: 2.5 a year over 1,250 days, variance of the tries 1/2."
    luck = metrics.luckiest_ratio(0.5 / 250, n_trials)
    return metrics.psr_of(2.5 / 250**0.5, 1250, skewness, kurtosis, luck)


EXAMPLES = {
    "Lo 2002, error after 12 months": (np.sqrt(metrics.sharpe_variance(0.5) / 12), 0.306, 5e-4),
    "Lo 2002, error after 60 months": (np.sqrt(metrics.sharpe_variance(0.5) / 60), 0.137, 5e-4),
    "Lo 2002, 12 months, rho 0.2": (metrics.annual_factor(0.2 ** np.arange(1, 12), 12), 2.88, 5e-3),
    "Lo 2002, 12 months, rho -0.2": (
        metrics.annual_factor((-0.2) ** np.arange(1, 12), 12),
        4.17,
        5e-3,
    ),
    "PSR 2012, hedge fund": (metrics.psr_of(0.458, 24, -2.448, 10.164), 0.913, 5e-4),
    "PSR 2012, normal": (metrics.psr_of(0.458, 24), 0.982, 5e-4),
    "MinTRL 2012, days": (_track(252), 2.73, 5e-3),
    "MinTRL 2012, weeks": (_track(52), 2.83, 5e-3),
    "MinTRL 2012, months": (_track(12), 3.24, 5e-3),
    "MinTRL 2012, hedge fund months": (_track(12, -0.72, 5.78), 4.99, 5e-3),
    "MinBTL 2014, 45 tries": (metrics.minimum_backtest(45), 5.0, 5e-3),
    "DSR 2014, luck": (metrics.luckiest_ratio(0.5 / 250, 100), 0.1132, 5e-5),
    "DSR 2014, 100 tries": (_deflated(100, -3, 10), 0.9004, 5e-5),
    "DSR 2014, 46 tries": (_deflated(46, -3, 10), 0.9505, 5e-5),
    "DSR 2014, 88 tries, normal": (_deflated(88, 0, 3), 0.9505, 5e-5),
    "Sortino 2013": (
        metrics.sortino(pd.Series([0.17, 0.15, 0.23, -0.05, 0.12, 0.09, 0.13, -0.04])),
        4.417,
        5e-4,
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_example_of_the_paper(name):
    ours, published, rounding = EXAMPLES[name]
    assert ours == pytest.approx(published, abs=rounding)


def test_the_hedge_funds_of_ledoit_and_wolf():
    "120 months of two hedge funds, and what the authors' own program says of them."
    funds = np.loadtxt(Path(__file__).with_name("hedge_funds.csv"), delimiter=",", skiprows=1)
    ratios = [metrics.sharpe(pd.Series(fund)) for fund in funds.T]
    assert ratios == pytest.approx([1.014228, 1.460547], abs=5e-7)
    assert metrics.sharpe_difference_se(funds, False) == pytest.approx(0.3176271, abs=5e-8)
    assert metrics.sharpe_difference_se(funds) == pytest.approx(0.3872694, abs=5e-8)
    found = stat_tests.sharpe_difference(*funds.T, Resampling(1, 3, 4999), block=5)
    assert found.value == pytest.approx(-0.4463183, abs=5e-8)
    assert found.p_hac == pytest.approx(0.2491259, abs=5e-7)
    # the program drew 0.250 and, with a factor for small samples, 0.298 from 499 resamples each
    assert found.p == pytest.approx(0.274, abs=0.03)


# --- other libraries -----------------------------------------------------------------------------


def test_quantstats_and_empyrical(fat_tails):
    "Recorded with quantstats 0.0.86 and empyrical-reloaded 0.7.1."
    returns, market = fat_tails
    skewness, kurtosis = metrics.moments(returns)
    n = len(returns)
    corrected = skewness * np.sqrt(n * (n - 1)) / (n - 2)
    assert corrected == pytest.approx(0.04432230665634002, rel=1e-12)
    excess = ((n + 1) * (kurtosis - 3) + 6) * (n - 1) / ((n - 2) * (n - 3))
    assert excess == pytest.approx(1.0829240283247508, rel=1e-12)
    both = metrics.information_ratio(returns, market)
    assert both == pytest.approx(0.07301536801173641, rel=1e-12)
    # quantstats takes the size of the first autocorrelation, whatever its sign, for all lags
    rho = abs(np.corrcoef(returns[:-1], returns[1:])[0, 1])
    penalty = np.sqrt(500) / metrics.annual_factor(rho ** np.arange(1, 500), 500)
    assert penalty == pytest.approx(1.0233256656879997, rel=1e-12)


def test_purgedcv(fat_tails):
    "Recorded with purgedcv 0.1.11: its Sharpe ratio divides by T, its moments are corrected."
    returns = fat_tails[0]
    ratio = returns.mean() / returns.std(ddof=0)
    shape = returns.skew(), returns.kurt() + 3
    theirs = partial(metrics.psr_of, ratio, 500, *shape)
    assert theirs(0.0) == pytest.approx(0.9920347623613789, rel=1e-12)
    luck = metrics.luckiest_ratio(0.002, 20)
    assert theirs(luck) == pytest.approx(0.6969651370714484, rel=1e-12)
    assert metrics.psr(returns, luck) == pytest.approx(0.6969651370714484, abs=1e-3)
    assert np.ceil(metrics.minimum_track_record(0.1, -0.5, 6.0, 0.02)) == 451
    years = [metrics.minimum_backtest(45), metrics.minimum_backtest(100, 1.5)]
    assert years == pytest.approx([4.998087004443404, 2.8462004458136607], rel=1e-12)
    noise = np.random.default_rng(21).standard_t(5, (480, 20)) * 0.01
    shares = [metrics.overfitting(noise, blocks).pbo for blocks in (8, 10)]
    assert shares == pytest.approx([0.37142857142857144, 0.38095238095238093], rel=1e-12)
    # an odd number of rules can end on the median: the paper counts it, the library does not
    assert metrics.overfitting(noise[:, :19], 8).pbo == pytest.approx(0.4, rel=1e-12)  # 0.3286


def test_jsharpe():
    "Recorded with jsharpe 0.6.3; its PSR is a later variant, 0.988 where the paper has 0.913."
    assert metrics.luckiest_ratio(0.002, 20) == pytest.approx(0.08500224368431025, rel=1e-12)
    variance = metrics.sharpe_variance(0.1, -0.3, 7.0) / 500
    assert variance == pytest.approx(0.0020900000000000007, rel=1e-12)


# --- overfitting ---------------------------------------------------------------------------------


def by_the_book(returns, blocks):
    "The paper's steps one after the other, split by split."
    parts, n = np.array_split(returns, blocks), returns.shape[1]
    logits = []
    for chosen in combinations(range(blocks), blocks // 2):
        inside = np.concatenate([parts[i] for i in chosen])
        outside = np.concatenate([parts[i] for i in range(blocks) if i not in chosen])
        seen, unseen = (x.mean(0) / x.std(0, ddof=1) for x in (inside, outside))
        relative = pd.Series(unseen).rank()[seen.argmax()] / (n + 1)
        logits.append(np.log(relative / (1 - relative)))
    return np.mean(np.array(logits) <= 1e-12)


@pytest.mark.parametrize("blocks, rules", [(4, 2), (6, 5), (8, 20)])
def test_overfitting_is_what_the_paper_counts(blocks, rules):
    returns = np.random.default_rng(blocks).normal(0.001, 0.01, (blocks * 30, rules))
    found = metrics.overfitting(returns, blocks)
    assert found.pbo == pytest.approx(by_the_book(returns, blocks), abs=1e-12)


def test_all_splits_of_a_hundred_rules():
    returns = np.random.default_rng(1).normal(0, 0.01, (503, 100))
    found = metrics.overfitting(returns)
    assert found.n_splits == 12_870 and 0 <= found.pbo <= 1
    idle = metrics.overfitting(np.c_[returns[:, :3] - 0.01, np.zeros(503)])
    assert idle.pbo == 0.0 and idle.loss == 0.0  # a rule that rests is better than three that lose


# --- max-t ---------------------------------------------------------------------------------------

ASKED = dict(statistic="alpha", horizon=5, seed=3, threshold=0.03)


def by_hand(series, drawn, lags):
    "t of a series in one resample, with the kernel written as a sum over lags."
    y = series[drawn]
    e = y[~np.isnan(y)] - np.nanmean(y)
    power = e @ e + 2 * sum((1 - k / (lags + 1)) * (e[k:] @ e[:-k]) for k in range(1, lags + 1))
    return np.nanmean(y) * len(e) / np.sqrt(power)


def test_resampled_ts_are_those_of_the_kernel_written_out():
    rng = np.random.default_rng(4)
    gaps = np.where(rng.random((70, 90)) > 0.2, rng.normal(size=(70, 90)), np.nan)
    drawn, factor = stat_tests.bootstrap_indices(90, 6, 20, 1), np.linspace(1, 1.2, 70)
    found = stat_tests._resampled_t(gaps, drawn, 7, np.stack([np.zeros(70), factor]))
    ts = np.array([[by_hand(g, row, 7) for g in gaps] * factor for row in drawn])
    np.testing.assert_allclose(found, np.c_[ts.max(axis=1), ts[:, 0]], rtol=1e-9)


def test_the_candidates_t_is_that_of_a_hac_regression_on_the_benchmark():
    candidate, *others = frames(Cell("garch", 250, 4, 0.5, 1), 5)
    found = max_t(candidate, others, **ASKED)
    alpha = stat_tests.statistic_series(candidate, "alpha")
    options = {"maxlags": found.lags, "kernel": "bartlett", "use_correction": False}
    fit = OLS(alpha, np.ones(250)).fit(cov_type="HAC", cov_kwds=options)
    assert found.t == pytest.approx(fit.tvalues.iloc[0], rel=1e-9)
    assert found.lags >= 4 and found.block >= 5
    x = np.c_[np.ones(250), candidate["benchmark_return"]]
    assert found.estimate == pytest.approx(OLS(candidate["net_return"], x).fit().params["const"])


def test_order_unit_and_repetition_of_trials_change_nothing():
    candidate, *others = frames(Cell("garch", 250, 6, 0.3, 1), 6)
    p = max_t(candidate, others, **ASKED).p
    assert max_t(candidate, others[::-1], **ASKED).p == p
    again = max_t(candidate, [candidate, *others, *others], **ASKED)
    assert (again.p, again.n_distinct, again.n_trials) == (p, 6, 11)
    percent = [100 * f for f in (candidate, *others)]
    assert max_t(percent[0], percent[1:], **ASKED).p == pytest.approx(p, abs=1e-3)
    assert max_t(candidate, others, **(ASKED | {"seed": 4})).p == pytest.approx(p, abs=0.02)


def test_more_skill_is_a_smaller_p_and_more_trials_a_larger_one():
    candidate, *others = frames(Cell("garch", 300, 12, 0.2, 1), 7)
    ps = [
        max_t(candidate.assign(net_return=candidate["net_return"] + gain), others, **ASKED).p
        for gain in (-0.001, 0.0, 0.001, 0.002)
    ]
    assert ps == sorted(ps, reverse=True) and ps[-1] < 0.01
    tries = [max_t(candidate, others[:k], **ASKED) for k in (0, 1, 3, 11)]
    assert [t.p for t in tries] == sorted(t.p for t in tries)
    assert tries[0].p == tries[0].p_alone
    assert [t.critical_values["0.03"] > t.critical_values["0.05"] for t in tries] == [True] * 4


def test_a_period_picked_from_many_is_judged_as_one_of_many():
    "One strategy, shown on the best of its windows: the other windows are trials of their own."
    whole = frames(Cell("garch", 600, 1, 0.0, 1), 1017)[0]
    windows = [whole.iloc[a : a + 250] for a in range(0, 351, 25)]
    best = max(windows, key=lambda w: metrics.sharpe(stat_tests.statistic_series(w, "alpha")))
    alone, honest = max_t(best, [], **ASKED), max_t(best, windows, **ASKED)
    assert alone.p < 0.03 < honest.p and honest.n_distinct == len(windows)


def test_trials_too_short_to_be_resampled_count_as_independent_tries():
    candidate, *others = frames(Cell("garch", 250, 30, 0.0, 1), 9)
    short = [f.iloc[i : i + 20] for i, f in enumerate(others)]
    hidden = max_t(candidate, short, **ASKED)
    assert (hidden.n_short, hidden.n_distinct) == (29, 30)
    assert hidden.p == pytest.approx(1 - (1 - hidden.p_alone) ** 30)
    rare = others[0].assign(net_return=0.0)
    rare.iloc[[10, 90, 170], 0] = -0.02
    assert max_t(candidate, [rare], **ASKED).p < 2.1 * max_t(candidate, [], **ASKED).p


@pytest.mark.parametrize("statistic", ["alpha", "rank_ic"])
def test_a_candidate_that_says_nothing_never_passes(statistic):
    candidate, *others = frames(Cell("garch", 250, 3, 0.0, 1), 10)
    how = ASKED | {"statistic": statistic}
    silent = [candidate.iloc[:0], candidate.iloc[:29], candidate * np.nan]
    silent += [candidate.assign(net_return=0.0, ic=0.1)]
    silent += [candidate.assign(benchmark_return=np.nan, ic=np.nan)]
    for frame in silent:
        found = max_t(frame, others, **how)
        assert found.p == 1.0 and found.why
        assert found.samples == 0
    copy = candidate.assign(net_return=0.7 * candidate["benchmark_return"], ic=candidate["ic"])
    assert statistic == "rank_ic" or max_t(copy, others, **how).p > 0.4
    with expect_fail(DataError, "sessions that come once"):
        max_t(pd.concat([candidate, candidate]), others, **how)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0, 0.6))
def test_any_holes_give_a_p_that_json_can_hold(seed, trials, lost):
    rng = np.random.default_rng(seed)
    tables = [
        f.mask(rng.random(f.shape) < lost) for f in frames(Cell("garch", 80, trials, 0, 1), seed)
    ]
    tables[1] = tables[1].iloc[: rng.integers(0, 80)]
    for statistic in stat_tests.STATISTICS:
        found = max_t(tables[0], tables[1:], **(ASKED | {"statistic": statistic, "threshold": 0.3}))
        assert 0 < found.p <= 1 and found.p >= found.resolution
        json.dumps(asdict(found), allow_nan=False)


@pytest.mark.slow
def test_a_hundred_trials_and_a_tiny_threshold_have_resamples_enough():
    tables = frames(Cell("garch", 500, 100, 0.3, 1), 11)
    found = max_t(tables[0], tables[1:], **(ASKED | {"threshold": 0.0003}))
    assert found.samples == 100_000 and found.resolution < 0.0003 / 20
    assert stat_tests._resamples(0.03) == 6667


# --- size and power: quick versions of the campaign ----------------------------------------------

GATE = partial(campaign_stats.max_t_p, "alpha")


def within(hits, n, low, high):
    "Whether a count fits a rate between low and high, 99 times in 100 on either side."
    return binom.ppf(0.01, n, low) <= hits <= binom.ppf(0.99, n, high)


@pytest.mark.parametrize(
    "cell, high",
    [
        (Cell("garch", 250, 1, 0.0, 200), 0.06),
        pytest.param(Cell("garch", 250, 6, 0.6, 150), 0.06, marks=pytest.mark.slow),
        pytest.param(Cell("skewed", 250, 1, 0.0, 300), 0.06, marks=pytest.mark.slow),
        pytest.param(Cell("garch_overlap", 345, 1, 0.0, 300), 0.07, marks=pytest.mark.slow),
        pytest.param(Cell("garch_overlap", 345, 6, 0.9, 150), 0.07, marks=pytest.mark.slow),
        pytest.param(Cell("garch", 345, 100, 0.6, 60), 0.06, marks=pytest.mark.slow),
        pytest.param(Cell("garch", 345, 6, 0.6, 150, whole=False), 0.06, marks=pytest.mark.slow),
    ],
)
def test_max_t_is_fooled_as_often_as_it_says(cell, high, record_property):
    at_5, at_3 = campaign_stats.rejections(GATE, cell)
    record_property("fooled", f"{at_5} and {at_3} of {cell.replications}")
    print(cell, at_5, at_3)
    assert within(at_5, cell.replications, 0.02, high)
    assert at_3 <= binom.ppf(0.99, cell.replications, high - 0.02)


def test_max_t_finds_what_is_there():
    cell = Cell("garch", 345, 6, 0.6, 60, shift=4.0)
    assert campaign_stats.rejections(GATE, cell)[1] >= 45


@pytest.mark.slow
def test_one_error_for_all_resamples_is_fooled_by_many_overlapping_trials():
    "Why every resample has its own error: the same replications, five times the nominal rate."
    cell = Cell("garch_overlap", 250, 100, 0.0, 40)
    fixed = partial(campaign_stats.one_error_p, True)
    shared, own = (campaign_stats.rejections(t, cell)[0] for t in (fixed, GATE))
    assert shared > binom.ppf(0.99, 40, 0.05) >= own


def test_arch_compares_plain_means_so_alphas_are_brought_to_one_scale():
    "arch 8.0.0: a trial that bets a hundred times as much decides alone, studentised or not."
    alphas = np.random.default_rng(4).normal(0, 0.01, (250, 2)) + [0.002, 0.0]
    how = dict(block_size=5, reps=500, studentize=True, seed=1)
    tests = [SPA(np.zeros(250), -alphas * scale, **how) for scale in ([1, 1], [1, 100])]
    for test in tests:
        test.compute()
    same, wild = (test.pvalues["consistent"] for test in tests)
    assert same < 0.01 and wild > 0.1
    ours = stat_tests.superior(pd.DataFrame(alphas * [1, 100]), Resampling(5, 1, 500))
    assert ours["spa_p"] < 0.01 and ours["stepm_candidate"]


@pytest.mark.parametrize("means", ([0.1, 0, 0, 0], [0.3, 0.15, 0.1, 0], [0, 0, 0, 0]))
def test_the_rounds_are_those_of_arch(means):
    alphas = np.random.default_rng(5).normal(0, 1, (500, 4)) + means
    how = dict(block_size=5, reps=500, seed=1)
    theirs = StepM(np.zeros(500), -alphas, size=0.05, **how)
    theirs.compute()
    ours = SPA(np.zeros(500), -alphas, **how)
    assert stat_tests.step_down(ours).tolist() == theirs.superior_models


def test_several_rounds_may_keep_every_trial():
    "arch 8.0.0: `StepM` asks once more of nobody, and ends with an error."
    alphas = np.random.default_rng(5).normal(0, 1, (500, 6))
    alphas += np.r_[0.30, np.linspace(0.104, 0.102, 5)] - alphas.mean(axis=0)
    how = dict(block_size=5, reps=500, seed=1)
    first = SPA(np.zeros(500), -alphas, **how)
    first.compute()
    assert 0 < len(first.better_models(0.05)) < 6
    assert stat_tests.step_down(first).tolist() == list(range(6))
    found = stat_tests.superior(pd.DataFrame(alphas), Resampling(5, 1, 500))
    assert found["stepm_superior"] == 6 and found["stepm_candidate"]


# --- the table of a run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    "A daily account, predictions by window, and everything that can stand beside it."
    tables = frames(Cell("garch", 260, 8, 0.4, 1), 12)
    extra = dict(exposure=0.5, turnover=0.1, cost=1e-4, n_symbols=5, n_held=2)
    daily = tables[0].assign(gross_return=tables[0]["net_return"] + 1e-4, **extra)
    grid = pd.MultiIndex.from_product([sessions(260), list("ABCDE")], names=["ts", "symbol"])
    rng = np.random.default_rng(1)
    said = pd.DataFrame(rng.normal(size=(1300, 2)), grid, ["score", "forward_return"]).reset_index()
    said["window_label"] = np.repeat(["w1", "w2", "w3", "w4"], 325)
    fills = pd.DataFrame({"value_inr": [4e4] * 60, "participation": [0.02] * 60})
    return daily, said, Beside(tables[1:], tables[1], "promoted", fills, 1e6, 40.0)


def table_of(daily, said, beside, **options):
    return stat_tests.stat_tests(
        daily, said, horizon=5, seed=1, bootstrap_samples=200, beside=beside, **options
    )


def test_every_figure_of_a_run_is_there_and_agrees_with_its_own_function(run):
    daily, said, beside = run
    found = table_of(daily, said, beside)
    json.dumps(found, allow_nan=False)
    assert set(found["reasons"]) <= {"net.min_track_record", "trading.cost_share_of_gross_alpha"}
    net, trials = daily["net_return"], found["trials"]
    ratios = [metrics.sharpe(f["net_return"]) for f in (daily, *beside.trials)]
    assert trials["dsr"] == pytest.approx(metrics.dsr(net, np.array(ratios)))
    assert (trials["n_trials"], trials["n_distinct"], trials["n_compared"]) == (8, 8, 8)
    assert found["baseline"]["name"] == "promoted" and found["baseline"]["n_sessions"] == 260
    gap = found["net"]["sharpe"] - found["baseline"]["sharpe"]
    assert found["baseline"]["sharpe_difference"] == pytest.approx(gap)
    walk = found["walk_forward"]
    assert [f["fold"] for f in walk["folds"]] == ["w1", "w2", "w3", "w4"]
    assert sum(f["n_sessions"] for f in walk["folds"]) == 260
    weighted = np.mean([f["alpha_daily"] for f in walk["folds"]])
    assert weighted == pytest.approx(found["alpha_universe"]["daily"])
    assert found["alpha"] == found["alpha_universe"] | {"n_sessions": 260}


def test_a_second_benchmark_leaves_the_universe_beside_it(run):
    daily, said, beside = run
    index = 0.7 * daily["benchmark_return"] + 0.001 * np.sin(np.arange(260))
    found = table_of(daily, said, beside, benchmark=index, benchmark_name="NIFTY 50")
    assert found["alpha_universe"] == table_of(daily, said, beside)["alpha_universe"]
    assert found["alpha"]["beta"] != found["alpha_universe"]["beta"]


def test_whatever_is_missing_leaves_a_reason(run):
    daily, said, beside = run
    flat = daily.assign(net_return=0.0, gross_return=0.0)
    later = daily.set_index(sessions(260, "2030-01-01"))
    odd = [Beside(), Beside([later]), Beside(baseline=flat), Beside(baseline=later)]
    odd += [Beside(baseline=daily.iloc[:9]), Beside(fills=beside.fills.iloc[:0], impact_bps=9.0)]
    odd += [Beside([daily.iloc[:5], flat, daily * np.nan])]
    for some in odd:
        for account in (daily, flat, daily.iloc[:31], daily.iloc[:5], daily.iloc[:0]):
            found = table_of(account, said, some)
            json.dumps(found, allow_nan=False)
            empty = {
                f"{name}.{key}"
                for name, section in found.items()
                if isinstance(section, dict) and name != "reasons"
                for key, value in section.items()
                if value is None
            }
            assert empty == set(found["reasons"]) and all(found["reasons"].values())


# --- capacity ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.002), st.floats(1e4, 1e8), st.floats(1, 500), st.integers(1, 80))
def test_at_its_capacity_a_rule_earns_nothing(alpha, capital, impact_bps, n):
    rng = np.random.default_rng(n)
    fills = pd.DataFrame({"value_inr": capital * rng.random(n), "participation": rng.random(n) / 9})

    def paid(size):
        share = np.sqrt(fills["participation"] * size / capital)
        return (fills["value_inr"] / capital * share).sum() * impact_bps / 1e4 / 250

    bears = metrics.capacity(fills, alpha, capital, 250, impact_bps)
    before_impact = alpha + paid(capital)
    assert bears >= capital * (1 - 1e-9)
    assert before_impact - paid(bears) == pytest.approx(0, abs=1e-9 * max(1, paid(bears)))
