"The embedded market: the same everywhere, sound in every bar, with what was ordered in it."

import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.types import BAR_COLUMNS, Interval
from sensequant.market import simulator
from sensequant.market.calendar import session_hours, sessions
from sensequant.market.simulator import Market, MarketSpec, simulate

SMALL = MarketSpec(symbols=4, end=date(2022, 6, 30))
SEEDS = range(201, 213)  # none was looked at when the recipe was chosen

DIGEST = """
import hashlib
from datetime import date
from sensequant.core.types import Interval
from sensequant.market.simulator import MarketSpec, simulate
market = simulate(MarketSpec(symbols=4, end=date(2022, 6, 30)))
told = hashlib.sha256(market.spec.key.encode())
for symbol in market.symbols:
    for interval in (Interval.DAY, Interval.MINUTE_5):
        bars = market.bars(symbol, interval, date(2022, 5, 2), date(2022, 5, 31))
        told.update(bars.to_csv().encode())
print(told.hexdigest())
"""


def closes(market: Market, column: str = "close") -> pd.DataFrame:
    "One column of every symbol's daily bars."
    return pd.DataFrame({s: market.bars(s)[column] for s in market.symbols})


@pytest.fixture(scope="module")
def nulls() -> list[Market]:
    "Markets of the default size without a signal."
    return [simulate(MarketSpec(seed=seed, signal_ic=0)) for seed in SEEDS]


def test_two_processes_make_the_same_market():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_another_seed_is_another_market():
    a, b = simulate(SMALL), simulate(replace(SMALL, seed=2))
    assert not np.array_equal(a.ticks, b.ticks)
    moves = np.diff(np.log(a.ticks[3]), axis=0), np.diff(np.log(b.ticks[3]), axis=0)
    assert abs(np.corrcoef(moves[0].ravel(), moves[1].ravel())[0, 1]) < 0.2


def test_a_symbol_is_the_same_in_any_company():
    alone, crowd = simulate(replace(SMALL, symbols=1)), simulate(replace(SMALL, symbols=40))
    pd.testing.assert_frame_equal(alone.bars("SIM001"), crowd.bars("SIM001"))
    day = crowd.bars("SIM001").index[7].date()
    pd.testing.assert_frame_equal(
        alone.minute_bars("SIM001", day), crowd.minute_bars("SIM001", day)
    )


def test_every_spec_has_its_own_key():
    changes = [
        {"symbols": 21}, {"start": date(2022, 1, 2)}, {"end": date(2024, 12, 30)}, {"seed": 2},
        {"signal_ic": 0.05}, {"premium_annual": 0.1001}, {"late_listing_frac": 0},
        {"missing_day_frac": 0}, {"overnight_frac": 0.2}, {"clustering": 0}, {"tail_df": 5},
        {"circuit_frac": 0.1}, {"tick_inr": 0.01},
    ]  # fmt: skip
    keys = [MarketSpec(**change).key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys) == len(MarketSpec.__dataclass_fields__) + 1
    assert keys[0].startswith("sim-20-s1-ic0.15-") and len(keys[0].rsplit("-", 1)[1]) == 8
    same = MarketSpec(symbols=np.int64(20), signal_ic=np.float64(0.15))
    assert same == MarketSpec() and same.key == keys[0]


def test_a_new_recipe_has_new_keys(monkeypatch):
    before = SMALL.key
    monkeypatch.setattr(simulator, "RECIPE", simulator.RECIPE + 1)
    assert SMALL.key != before


@pytest.mark.parametrize("name", simulator.RANGES)
def test_values_out_of_range_are_refused_by_name(name):
    low, high = simulator.RANGES[name]
    replace(SMALL, **{name: low}), replace(SMALL, **{name: high})
    for wrong in (low - 1, high * 2 + 1, float("nan"), float("inf"), "1", None, True):
        with pytest.raises(SettingsError, match=f"^{name} must be a .*; in {name}$"):
            replace(SMALL, **{name: wrong})


def test_dates_that_are_no_range_are_refused():
    with pytest.raises(SettingsError, match="end must lie after start; found 2023-01-01 to 2022"):
        replace(SMALL, start=date(2023, 1, 1))
    for wrong in ("2022-01-01", pd.Timestamp("2022-01-01"), None):
        with pytest.raises(SettingsError, match="start must be a date without a time"):
            replace(SMALL, start=wrong)
    with pytest.raises(SettingsError, match="tick_inr must be whole paise"):
        replace(SMALL, tick_inr=0.025)
    with pytest.raises(SettingsError, match="must hold sessions"):
        simulate(replace(SMALL, start=date(2022, 1, 1), end=date(2022, 1, 2)))


HARSH = {"tail_df": 3, "clustering": 0.13, "overnight_frac": 0.9}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"circuit_frac": 0.05, "tick_inr": 1.0},
        {"circuit_frac": 0.02, "tick_inr": 0.01, "signal_ic": 0.5},
        {"signal_ic": -0.5, **HARSH},
    ],
)
def test_bars_are_sound(change):
    market = simulate(MarketSpec(symbols=30, missing_day_frac=0, seed=3, **change))
    circuit, tick = market.spec.circuit_frac, market.spec.tick_inr
    at_limit = 0
    for symbol in market.symbols:
        bars = market.bars(symbol)
        o, h, low, c = (bars[name] for name in BAR_COLUMNS[:4])
        assert (low <= np.minimum(o, c)).all() and (np.maximum(o, c) <= h).all()
        assert (low > 0).all() and (bars["volume"] > 0).all()
        assert bars["volume"].dtype == "int64" and (bars.dtypes[:4] == "float64").all()
        paise = (bars.iloc[:, :4] * 100).round()
        assert ((paise / 100) == bars.iloc[:, :4]).all().all()
        assert (paise % round(tick * 100) == 0).all().all()
        cap, floor = c.shift()[1:] * (1 + circuit), c.shift()[1:] * (1 - circuit)
        assert (h[1:] <= cap + 1e-9).all() and (low[1:] >= floor - 1e-9).all()
        at_limit += int((h[1:] > cap - tick).sum() + (low[1:] < floor + tick).sum())
    assert at_limit > 0 or circuit == 0.20  # a narrow band is really reached


def test_a_share_of_one_tick_keeps_trading():
    n = 200
    rng = np.random.default_rng(1)
    legs = simulator._Legs(rng.normal(0, 0.4, (n, 2, 5)), np.full((n, 5), 0.5))
    first = np.array([1.0, 2, 3, 4, 5])
    tape = simulator._trade(MarketSpec(symbols=5), first, legs, np.zeros(5))
    assert (tape[:3] >= 1).all() and np.isfinite(tape).all()
    low, high = simulator._band(MarketSpec(), np.array([1.0, 2, 5, 6]))
    assert list(low) == [1, 2, 4, 5] and list(high) == [1, 2, 6, 7]


def test_the_index_is_sessions_in_ist():
    market = simulate(SMALL)
    days = sessions(SMALL.start, SMALL.end)
    bars = market.bars("SIM001")
    assert bars.index.isin(days).all() and bars.index.is_monotonic_increasing
    assert bars.index.is_unique and bars.index.name == "ts"
    assert str(bars.index.tz) == "Asia/Kolkata" and list(bars.columns) == list(BAR_COLUMNS)
    missing = market.missing_days("SIM001")
    assert days.equals(bars.index.union(missing)) and not bars.index.intersection(missing).size


def test_ranges_are_cut_on_both_sides():
    market = simulate(replace(SMALL, missing_day_frac=0))
    part = market.bars("SIM002", start=date(2022, 2, 1), end=date(2022, 2, 28))
    pd.testing.assert_frame_equal(part, market.bars("SIM002").loc["2022-02-01":"2022-02-28"])
    empty = market.bars("SIM002", start=date(2022, 2, 5), end=date(2022, 2, 6))
    assert empty.empty and list(empty.columns) == list(BAR_COLUMNS)
    assert str(empty.index.tz) == "Asia/Kolkata"
    assert market.bars("SIM002", Interval.MINUTE_1, date(2022, 2, 5), date(2022, 2, 6)).empty


def test_late_listings_and_missing_days_are_as_many_as_ordered():
    market = simulate(MarketSpec(symbols=50, late_listing_frac=0.3, missing_day_frac=0.01))
    listed = {s: market.listed_on(s) for s in market.symbols}
    late = [s for s, day in listed.items() if day]
    assert len(late) == 15
    for symbol in late:
        assert market.bars(symbol).index[0].date() == listed[symbol] > market.spec.start
        assert listed[symbol] < market.spec.end - timedelta(days=200)
    missing = sum(len(market.missing_days(s)) for s in market.symbols)
    possible = missing + sum(len(market.bars(s)) for s in market.symbols)
    error = (0.01 * 0.99 / possible) ** 0.5
    assert abs(missing / possible - 0.01) < 4 * error
    none = simulate(MarketSpec(symbols=50, late_listing_frac=0, missing_day_frac=0))
    assert none.held.all() and not any(none.listed_on(s) for s in none.symbols)


def test_a_new_share_has_no_signal_before_six_closes():
    market = simulate(MarketSpec(symbols=10))
    k = market.column("SIM010")
    first = market.first[k]
    assert (market.z[first : first + 6, k] == 0).all() and market.z[first + 6, k] != 0


@pytest.mark.parametrize(
    "day", ["2024-01-03", "2024-01-20", "2024-11-01"]
)  # plain, special, Muhurat
@pytest.mark.parametrize("interval", [i for i in Interval if i != Interval.DAY])
def test_minutes_add_up_to_the_day(day, interval):
    session = date.fromisoformat(day)
    market = simulate(MarketSpec(symbols=12, start=date(2024, 1, 1), missing_day_frac=0))
    opened, closed = session_hours(session)
    for symbol in [s for s in market.symbols if not market.listed_on(s)]:
        bars = market.minute_bars(symbol, session, interval)
        whole = market.bars(symbol, start=session, end=session).iloc[0]
        ends = bars["open"].iloc[0], bars["high"].max(), bars["low"].min(), bars["close"].iloc[-1]
        assert (*ends, bars["volume"].sum()) == tuple(whole)
        assert (bars["low"] <= bars[["open", "close"]].min(axis=1)).all()
        assert (bars["high"] >= bars[["open", "close"]].max(axis=1)).all()
        steps = pd.date_range(opened, closed, freq=f"{interval.minutes}min", inclusive="left")
        assert list(bars.index) == list(steps)
        pd.testing.assert_frame_equal(bars, market.minute_bars(symbol, session, interval))


def test_longer_bars_are_minutes_taken_together():
    market = simulate(SMALL)
    asked = date(2022, 3, 1), date(2022, 3, 4)
    minutes = market.bars("SIM003", Interval.MINUTE_1, *asked)
    how = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    for interval in (Interval.MINUTE_5, Interval.MINUTE_15, Interval.MINUTE_30):
        grouped = minutes.groupby(minutes.index.normalize(), group_keys=False)
        expected = grouped.apply(
            lambda day, rule=f"{interval.minutes}min": day.resample(rule, origin="start").agg(how)
        )
        pd.testing.assert_frame_equal(
            market.bars("SIM003", interval, *asked), expected, check_freq=False
        )


def test_the_path_inside_a_session_is_rough_everywhere():
    market = simulate(replace(SMALL, missing_day_frac=0))
    bars = market.bars("SIM001", Interval.MINUTE_1)
    moves = np.log(bars["close"] / bars["open"])
    size = moves.abs().groupby(bars.index.hour).mean()
    assert size.max() / size.min() < 1.3
    assert abs(moves.autocorr()) < 0.05


def test_what_is_not_there_is_refused():
    market = simulate(SMALL)
    for ask in (market.bars, market.listed_on, market.missing_days):
        with pytest.raises(DataError, match="must be one of SIM001 to SIM004; found SIM005"):
            ask("SIM005")
    holey = simulate(replace(SMALL, missing_day_frac=0.1))
    lost = holey.missing_days("SIM001")[0].date()
    with pytest.raises(DataError, match=f"must have a bar on the session asked for; found {lost}"):
        holey.minute_bars("SIM001", lost)


def test_the_texture_is_that_of_shares(nulls):
    facts = []
    for market in nulls:
        close, opened = closes(market), closes(market, "open")
        moves, gaps = np.log(close).diff(), np.log(opened / close.shift())
        n = moves.shape[1]
        facts.append({
            "volatility": moves.std().median() * 252**0.5,
            "kurtosis": moves.kurt().median() + 3,
            "memory of squares": moves.pow(2).apply(lambda m: m.autocorr()).median(),
            "memory": moves.apply(lambda m: m.autocorr()).mean(),
            "correlation": (moves.corr().to_numpy().sum() - n) / (n * (n - 1)),
            "overnight": (gaps.var() / moves.var()).median(),
        })  # fmt: skip
    table = pd.DataFrame(facts)
    mean, error = table.mean(), table.std() / len(table) ** 0.5
    assert 0.25 < mean["volatility"] < 0.36
    assert (table["kurtosis"] > 3.8).all() and mean["kurtosis"] < 9
    assert (table["memory of squares"] > 0.03).all()
    assert abs(mean["memory"]) < 3 * error["memory"] + 0.005
    assert table["correlation"].between(0.1, 0.5).all() and 0.18 < mean["correlation"] < 0.33
    assert abs(mean["overnight"] - 0.30) < 0.02


def test_without_clustering_and_tails_returns_are_normal_and_forgetful():
    spec = MarketSpec(signal_ic=0, clustering=0, tail_df=1_000, missing_day_frac=0)
    moves = np.log(closes(simulate(spec))).diff()
    assert abs(moves.kurt().mean()) < 0.15
    assert abs(moves.pow(2).apply(lambda m: m.autocorr()).mean()) < 0.03


def test_nothing_but_beta_is_paid_in_a_market_without_a_signal():
    spec = MarketSpec(symbols=400, signal_ic=0, late_listing_frac=0, missing_day_frac=0)
    betas = simulator._draw(spec, 1).beta
    means = []
    for premium in (0.0, 0.4):
        ticks = simulate(replace(spec, premium_annual=premium)).ticks[3]
        means.append((ticks[1:] / ticks[:-1] - 1).mean(axis=0) * 252)
    paid = means[1] - means[0]  # by the same chance
    slope, level = np.polyfit(betas, paid, 1)
    assert abs(slope - 0.4) < 0.02 and abs(level) < 0.02
    error = means[0].std() / 20**0.5  # shares move together, so 400 of them count as few
    assert abs(means[0].mean()) < 3 * error


def test_volatile_shares_earn_no_more_than_quiet_ones():
    gaps = []
    for seed in SEEDS:
        spec = MarketSpec(symbols=200, signal_ic=0, premium_annual=0, seed=seed)
        draws = simulator._draw(spec, 1)
        market = simulate(replace(spec, late_listing_frac=0))
        mean = (market.ticks[3, 1:] / market.ticks[3, :-1] - 1).mean(axis=0) * 252
        wild = draws.volatility > np.median(draws.volatility)
        gaps.append(mean[wild].mean() - mean[~wild].mean())
    assert abs(np.mean(gaps)) < 3 * np.std(gaps, ddof=1) / len(gaps) ** 0.5


@pytest.mark.parametrize("ic", [0.0, 0.03, 0.08, 0.15])
def test_the_signal_is_as_strong_as_ordered(ic):
    found = [simulate(MarketSpec(seed=seed, signal_ic=ic)).realised_ic() for seed in SEEDS]
    off = np.array([(measured.value - ic) / measured.error for measured in found])
    assert abs(off.mean()) < 3 / len(off) ** 0.5  # no bias
    assert 0.5 < off.std(ddof=1) < 1.6  # the errors are honest
    assert all(m.error < 0.02 and m.pairs > 13_000 for m in found)


def test_one_session_has_no_measurable_signal():
    market = simulate(replace(SMALL, start=date(2024, 1, 5), end=date(2024, 1, 6)))
    with pytest.raises(DataError, match="two sessions in a row must have bars"):
        market.realised_ic()


def test_the_signal_is_paid_after_the_open():
    spec = MarketSpec(symbols=60, signal_ic=0.15, missing_day_frac=0, late_listing_frac=0)
    market = simulate(spec)
    gap = np.log(market.ticks[0, 1:] / market.ticks[3, :-1]) / market.sigma[1:]
    way = np.log(market.ticks[3, 1:] / market.ticks[0, 1:]) / market.sigma[1:]
    z = market.z[1:]
    by_session = (z * gap).sum(axis=1) / (z**2).sum()
    error = np.sqrt((by_session**2).sum())
    assert abs(by_session.sum()) < 3 * error < 0.03
    assert (z * way).sum() / (z**2).sum() > 0.13


def test_the_signal_is_known_from_the_closes_alone():
    market = simulate(replace(SMALL, missing_day_frac=0))
    close = np.log(market.ticks[3])
    fall = close[:-6] - close[5:-1]  # known at the close before session 6, 7, ...
    known = np.sign(fall) == np.sign(market.z[6:])
    assert known[market.z[6:] != 0].all()


def test_the_benchmark_is_the_mean_of_its_members():
    market = simulate(replace(SMALL, symbols=7, missing_day_frac=0.05, late_listing_frac=0.3))
    index, close = market.index_bars(), closes(market)
    moves = (close / close.ffill().shift()).mean(axis=1)
    np.testing.assert_allclose((index["close"] / index["close"].shift())[1:], moves[1:], rtol=2e-5)
    assert (index["low"] <= index[["open", "close"]].min(axis=1)).all()
    assert (index[["open", "close"]].max(axis=1) <= index["high"]).all()
    assert index["volume"].dtype == "int64" and index.index.equals(market.sessions)
    assert (index["volume"] == closes(market, "volume").sum(axis=1)).all()


def test_the_benchmark_of_one_share_skips_its_missing_days():
    market = simulate(MarketSpec(symbols=1, missing_day_frac=0.1))
    index, bars = market.index_bars(), market.bars("SIM001")
    assert index.notna().all().all() and index.index.isin(bars.index).all()
    ratio = index["close"] / bars["close"].reindex(index.index)
    np.testing.assert_allclose(ratio, ratio.iloc[0], rtol=1e-4)


def test_the_smallest_and_the_largest_market():
    tiny = simulate(MarketSpec(symbols=1, start=date(2024, 1, 1), end=date(2024, 1, 2)))
    assert len(tiny.bars("SIM001")) == 2 == len(tiny.index_bars())
    large = simulate(replace(SMALL, symbols=999))
    assert large.symbols[-1] == "SIM999" == max(large.symbols)
    assert len(large.bars("SIM999")) > 0
