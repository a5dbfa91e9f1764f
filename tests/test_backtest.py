"""Backtest, statistics and gate: independent twins, laws, and the size of the bootstrap."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

from sensequant.backtest import charts, metrics
from sensequant.backtest.backtester import DAILY_COLUMNS, LongFlatRule, long_flat, wanted
from sensequant.backtest.gate import preliminary_gate
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

# --- metrics -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fat_tails():
    "Two series of 500 fat-tailed returns: a strategy and a market."
    index = pd.bdate_range("2022-01-03", periods=500)
    draw = {
        seed: np.random.default_rng(seed).standard_t(5, 500) * 0.01 + drift
        for seed, drift in ((11, 0.0005), (12, 0.0003))
    }
    return pd.Series(draw[11], index), pd.Series(draw[12], index)


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


# --- backtester ----------------------------------------------------------------------------------


def ragged_market(seed, n=60, symbols=5):
    "Bars with missing sessions and late listings, and predictions with gaps."
    rng = np.random.default_rng(seed)
    bars, rows = {}, []
    for i in range(symbols):
        frame = random_bars(n, seed=1000 * seed + i)
        keep = rng.random(n) > 0.15
        keep[: rng.integers(0, 10)] = False
        bars[f"S{i}"] = frame = frame[keep]
        spoken = frame.index[rng.random(len(frame)) > 0.2][:-1]
        score = np.clip(rng.normal(0.05, 0.2, len(spoken)), -1, 1)
        rows.append(pd.DataFrame({"symbol": f"S{i}", "ts": spoken, "score": score}))
    return bars, pd.concat(rows, ignore_index=True)


def clerk(predictions, bars, rule):
    "The same account kept by hand: session by session, shares and cash, one symbol after another."
    symbols = sorted(predictions["symbol"].unique())
    said = predictions.set_index(["symbol", "ts"])["score"].to_dict()
    days = sorted(set().union(*(bars[s].index for s in symbols)))
    cost, capital = rule.cost_bps_per_side / 1e4, 1 / len(symbols)
    cash, shares = dict.fromkeys(symbols, capital), dict.fromkeys(symbols, 0.0)
    mark, wish = dict.fromkeys(symbols, 0.0), dict.fromkeys(symbols, False)
    rows, before, started = {}, 1.0, min(t for _, t in said)
    for day in days:
        traded = 0.0
        for s in symbols:
            if day not in bars[s].index:
                continue
            bar = bars[s].loc[day]
            if wish[s] and not shares[s]:
                shares[s], cash[s] = cash[s] / (1 + cost) / bar["open"], 0.0
                traded += shares[s] * bar["open"]
            elif shares[s] and not wish[s]:
                traded += shares[s] * bar["open"]
                cash[s], shares[s] = shares[s] * bar["open"] * (1 - cost), 0.0
            mark[s], score = bar["close"], said.get((s, day))
            if score is None or score < rule.exit_score:
                wish[s] = False
            elif score > rule.entry_score:
                wish[s] = True
        equity = sum(cash[s] + shares[s] * mark[s] for s in symbols)
        if day > started:
            rows[day] = (equity / before - 1, traded / before, sum(v > 0 for v in shares.values()))
        before = equity
    return pd.DataFrame.from_dict(rows, orient="index", columns=["net", "turnover", "held"])


@pytest.mark.parametrize("seed", range(12))
def test_a_clerk_with_cash_and_shares_keeps_the_same_account(seed):
    bars, predictions = ragged_market(seed)
    rule = LongFlatRule(0.1, 0.0, 35.0)
    daily = long_flat(predictions, bars, rule)
    by_hand = clerk(predictions, bars, rule).loc[: daily.index[-1]]
    assert list(by_hand.index) == list(daily.index)
    inner = slice(0, -1)  # on the last day the backtester sells out
    np.testing.assert_allclose(daily["net_return"][inner], by_hand["net"][inner], atol=1e-13)
    np.testing.assert_allclose(daily["turnover"][inner], by_hand["turnover"][inner], atol=1e-13)
    end = by_hand["net"].iloc[-1] + 1  # what is still held is sold at its last mark, with cost
    sold_out = (1 + daily["net_return"].iloc[-1]) / end
    sold = daily["turnover"].iloc[-1] - by_hand["turnover"].iloc[-1]
    assert sold_out == pytest.approx(1 - rule.cost_frac * sold / end, abs=1e-13)
    assert (sold > 1e-13) == (daily["n_held"].iloc[-1] > 0)
    assert daily["n_held"].tolist() == by_hand["held"].tolist()
    assert daily["cost"].equals(daily["turnover"] * rule.cost_frac)


def test_the_account_ends_when_the_last_opinion_is_carried_out():
    bars = {"A": random_bars(30, seed=1)}
    index = bars["A"].index
    said = pd.DataFrame({"symbol": "A", "ts": index[5:8], "score": [0.5, 0.5, 0.5]})
    daily = long_flat(said, bars)
    assert (daily.index[0], daily.index[-1]) == (index[6], index[9])  # sold at the open of 9
    assert daily["n_held"].tolist() == [1, 1, 1, 0]
    unwanted = long_flat(said.assign(score=-0.5), bars)
    assert (unwanted.index[0], unwanted.index[-1]) == (index[6], index[8])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.floats(-1, 1), st.just(np.nan)), min_size=1, max_size=60))
def test_wishes_follow_the_rule_bar_by_bar(scores):
    rule, state, expected = LongFlatRule(), False, []
    for score in scores:
        if np.isnan(score) or score < rule.exit_score:
            state = False
        elif score > rule.entry_score:
            state = True
        expected.append(state)
    assert wanted(np.array(scores), rule).tolist() == expected


def test_costs_only_ever_hurt():
    bars, predictions = ragged_market(3, n=200)
    ends = [
        (1 + long_flat(predictions, bars, LongFlatRule(cost_bps_per_side=c))["net_return"]).prod()
        for c in (0, 1, 5, 12, 50, 200)
    ]
    assert ends == sorted(ends, reverse=True) and len(set(ends)) == len(ends)
    free = long_flat(predictions, bars, LongFlatRule(cost_bps_per_side=0))
    np.testing.assert_allclose(free["net_return"], free["gross_return"], atol=1e-15)


def test_never_wanted_is_cash_and_always_wanted_is_the_share():
    bars, predictions = ragged_market(4, n=200)
    out = long_flat(predictions.assign(score=-1.0), bars)
    assert (out[["net_return", "gross_return", "exposure", "turnover", "cost"]] == 0).all(axis=None)
    full = {s: random_bars(150, seed=i) for i, s in enumerate("ABC")}
    every = pd.concat(pd.DataFrame({"symbol": s, "ts": b.index}) for s, b in full.items())
    daily = long_flat(every.assign(score=1.0), full, LongFlatRule(cost_bps_per_side=0))
    slots = [b["close"].iloc[1:] / b["open"].iloc[1] for b in full.values()]
    np.testing.assert_allclose(
        (1 + daily["net_return"]).cumprod(), np.mean(slots, axis=0), rtol=1e-12
    )
    assert (daily["exposure"] == 1).all()


@pytest.mark.parametrize("cut", [20, 35, 50])
def test_what_comes_later_changes_nothing_before(cut):
    bars, predictions = ragged_market(5)
    rng, day = np.random.default_rng(cut), sessions(60)[cut]
    whole = long_flat(predictions, bars)
    noisy = {s: b.assign(**{c: b[c].astype(float) for c in b}) for s, b in bars.items()}
    for frame in noisy.values():
        late = frame.index >= day
        frame.loc[late] *= rng.uniform(0.5, 2, (late.sum(), 5))
    changed = predictions["score"].where(predictions["ts"] < day, -predictions["score"])
    other = long_flat(predictions.assign(score=changed), noisy)
    early = whole.index < day
    pd.testing.assert_frame_equal(whole[early], other.loc[whole.index[early]])
    assert not whole[~early].equals(other.reindex(whole.index[~early]))


def test_a_signal_one_bar_late_is_filled_one_bar_late():
    bars = {"A": random_bars(200, seed=9)}
    index, score = bars["A"].index, np.random.default_rng(2).uniform(-0.3, 0.3, 200)
    on_time = pd.DataFrame({"symbol": "A", "ts": index[:150], "score": score[:150]})
    late = on_time.assign(ts=index[1:151])
    held, held_late = (long_flat(p, bars)["n_held"].to_numpy() for p in (on_time, late))
    n = min(len(held), len(held_late))
    assert held[:n].tolist() == held_late[:n].tolist()
    assert (long_flat(late, bars).index[0] - long_flat(on_time, bars).index[0]).days >= 1


def test_an_oracle_earns_massively_and_noise_pays_its_costs():
    bars = {f"S{i}": random_bars(500, seed=i) for i in range(8)}
    knows = pd.concat(
        {s: np.sign(b["open"].shift(-2) / b["open"].shift(-1) - 1) for s, b in bars.items()},
        names=["symbol"],
    )
    oracle = knows.rename("score").reset_index().dropna()
    rng = np.random.default_rng(0)
    noise = oracle.assign(score=rng.permutation(oracle["score"].to_numpy()))
    free = LongFlatRule(cost_bps_per_side=0)
    assert metrics.sharpe(long_flat(oracle, bars, free)["net_return"], 252) > 10
    assert abs(metrics.sharpe(long_flat(noise, bars, free)["net_return"], 252)) < 2
    paid = long_flat(noise, bars)
    assert paid["gross_return"].sum() - paid["net_return"].sum() > 0.2


def test_order_of_rows_and_zone_of_times_do_not_matter():
    bars, predictions = ragged_market(6)
    whole = long_flat(predictions, bars)
    mixed = predictions.sample(frac=1, random_state=3)
    mixed["ts"] = mixed["ts"].dt.tz_convert("UTC")
    pd.testing.assert_frame_equal(long_flat(mixed, bars), whole)
    pd.testing.assert_frame_equal(long_flat(predictions, bars | {"X": bars["S0"]}), whole)
    assert tuple(whole.columns) == DAILY_COLUMNS and whole.index.name == "ts"


def test_half_hour_bars_are_marked_by_the_day():
    rng = np.random.default_rng(1)
    times = pd.DatetimeIndex(
        [d + pd.Timedelta(minutes=555 + 30 * k) for d in sessions(20) for k in range(13)], name="ts"
    )
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.003, len(times))))
    open_ = np.r_[100, close[:-1]]
    bars = {"A": pd.DataFrame({"open": open_, "close": close}, index=times)}
    said = pd.DataFrame({"symbol": "A", "ts": times, "score": 1.0})
    daily = long_flat(said, bars, LongFlatRule(cost_bps_per_side=0))
    assert len(daily) == 20
    by_day = bars["A"]["close"].groupby(times.normalize()).last()
    np.testing.assert_allclose((1 + daily["net_return"]).cumprod(), by_day / open_[1], rtol=1e-12)
    assert daily["n_symbols"].tolist() == [1] * 20


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
    daily = long_flat(predictions, bars)
    answer = stat_tests(daily, predictions, horizon=5, seed=1, bootstrap_samples=200)
    return daily, predictions, answer


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


# --- gate ----------------------------------------------------------------------------------------

WINDOWS = {"n_success": 40, "n_failed": 2, "max_failure_rate": 0.15}
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["n_sessions", "alpha", "interval", "confidence"]), inner),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(junk)
def test_junk_never_passes_and_always_says_why(stats):
    verdict = preliminary_gate(**WINDOWS, stats=stats)
    assert not verdict.passed and verdict.reasons
    json.dumps(asdict(verdict))


@pytest.mark.parametrize("lost", ["n_sessions", "confidence", "alpha"])
@pytest.mark.parametrize("value", ["gone", None, float("nan"), True, "0.95", [], {}])
def test_any_one_piece_of_evidence_that_is_lost_refuses(lost, value):
    stats = {"n_sessions": 300, "confidence": 0.95, "alpha": {"interval": [0.001, 0.002]}}
    assert preliminary_gate(**WINDOWS, stats=stats).passed
    stats |= {lost: value}
    if value == "gone":
        del stats[lost]
    verdict = preliminary_gate(**WINDOWS, stats=stats)
    assert not verdict.passed and len(verdict.reasons) == 1


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(0, 500),
    low=st.floats(-0.01, 0.01),
    ok=st.integers(0, 50),
    failed=st.integers(0, 50),
)
def test_a_verdict_passes_exactly_when_all_four_hold(n, low, ok, failed):
    stats = {"n_sessions": n, "confidence": 0.95, "alpha": {"interval": [low, 0.02]}}
    verdict = preliminary_gate(n_success=ok, n_failed=failed, max_failure_rate=0.15, stats=stats)
    holds = n >= 250 and low > 0 and ok >= 1 and failed <= 0.15 * (ok + failed) + 1e-12
    assert verdict.passed == holds
    assert bool(verdict.reasons) != verdict.passed
    assert "not calibrated" in verdict.kind


def test_the_gate_reads_what_the_statistics_write(tested):
    daily, _, answer = tested
    verdict = preliminary_gate(**WINDOWS, stats=json.loads(json.dumps(answer)))
    found = {c.name: c.found for c in verdict.checks}
    assert found["oos_sessions"] == str(len(daily))
    assert found["net_alpha"] == f"{answer['alpha']['interval'][0] * 1e4:.2f} basis points"


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
