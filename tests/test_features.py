"""What every column of the technical and the levels group must keep, on real and made bars: blind
to the future, deaf to a past beyond the warm-up, free of scale, never infinite."""

import gzip
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sensequant.core.testing import random_bars
from sensequant.core.types import BAR_COLUMNS, IST, Interval
from sensequant.features.features import TECHNICAL, technical, technical_warmup
from sensequant.features.levels import LEVELS, levels, levels_warmup
from sensequant.market.simulator import MarketSpec, simulate

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
DAY, FIVE = Interval.DAY, Interval.MINUTE_5
PRICES = ["open", "high", "low", "close"]
GROUPS = [
    pytest.param(technical, TECHNICAL, technical_warmup, id="technical"),
    pytest.param(levels, LEVELS, levels_warmup, id="levels"),
]
MARKETS = [
    "RELIANCE",
    "ADANIGREEN",
    "INDHOTEL",
    "five",
]  # ADANIGREEN: locked at its circuit in 2020


def real(folder, symbol):
    "Bars as the vendor gave them, or a skip that says why."
    path = DATA / folder / f"{symbol}.csv.gz"
    if not path.is_file():
        pytest.skip(f"no real bars in {path}")
    with gzip.open(path, "rt") as file:
        raw = pd.read_csv(file)
    ts = pd.DatetimeIndex(pd.to_datetime(raw.pop("timestamp")), name="ts")
    raw.index = ts.tz_localize(IST) if ts.tz is None else ts.tz_convert(IST)
    return raw[list(BAR_COLUMNS)]


@pytest.fixture(scope="session")
def five_minutes():
    "A year and a half of simulated five-minute bars of one share."
    market = simulate(MarketSpec(10, date(2022, 1, 1), date(2023, 6, 30)))
    return market.bars("SIM002", FIVE)


@pytest.fixture(params=MARKETS)
def market(request, five_minutes):
    "Bars, and their interval."
    five = request.param == "five"
    return (five_minutes, FIVE) if five else (real("nse_daily", request.param), DAY)


def differences(one, other):
    "The largest difference by column, infinite where only one of the two is known."
    other = other.reindex_like(one)
    gap = (one - other).abs().mask(one.isna() != other.isna(), np.inf)
    return gap.max().fillna(0.0)


def assert_same(one, other, atol):
    "Every column alike, missing values included, or the names of those that are not."
    found = differences(one, other)
    assert (found <= atol).all(), found[found > atol].to_dict()


def disturbed(bars, cut, seed=0):
    "The bars with other prices and volumes from row `cut` on."
    rng, out = np.random.default_rng(seed), bars.astype(float)
    out.iloc[cut:, :4] *= rng.uniform(0.5, 2, (len(bars) - cut, 1))
    out.iloc[cut:, 4] *= rng.uniform(0, 3, len(bars) - cut)
    return out


def blind(function, bars, interval):
    "Values up to a cut are the same, to the bit, without what follows and with another future."
    full = function(bars, interval)
    for cut in (len(bars) // 3, 2 * len(bars) // 3 + 7, len(bars) - 1):
        assert_same(full.iloc[:cut], function(bars.iloc[:cut], interval), 0)
        other = function(disturbed(bars, cut), interval)
        assert_same(full.iloc[:cut], other.iloc[:cut], 0)


@pytest.mark.parametrize(("function", "names", "warmup"), GROUPS)
def test_columns_are_complete_and_know_nothing_of_the_future(function, names, warmup, market):
    bars, interval = market
    table = function(bars, interval)
    assert tuple(table.columns) == names and table.index.equals(bars.index)
    assert set(table.dtypes) == {np.dtype(float)} and table.notna().any().all()
    blind(function, bars, interval)


@pytest.mark.parametrize("leak", ["next close", "mean of all", "session's high"])
def test_a_column_that_looks_ahead_is_caught(leak, five_minutes):
    bars = five_minutes.iloc[:3000]
    columns = {
        "next close": lambda b: b["close"].shift(-1) / b["close"],
        "mean of all": lambda b: b["close"] / b["close"].mean(),
        "session's high": lambda b: b["close"] / b["high"].groupby(b.index.date).transform("max"),
    }

    def leaking(b, interval):
        return technical(b, interval).assign(leak=columns[leak](b))

    with pytest.raises(AssertionError, match="leak"):
        blind(leaking, bars, FIVE)


@pytest.mark.parametrize(("function", "names", "warmup"), GROUPS)
def test_a_history_that_begins_later_says_the_same_after_the_warm_up(
    function, names, warmup, market
):
    bars, interval = market
    full, wait = function(bars, interval), warmup(interval)
    for late in (1, 97, 400):
        part = function(bars.iloc[late:], interval).iloc[wait:]
        assert len(part) > 500
        assert_same(part, full.loc[part.index], 1e-6 if function is technical else 1e-8)


def test_the_warm_up_is_not_longer_than_it_must_be():
    bars = random_bars(700)
    for function, wait in ((technical, 150), (levels, 240)):
        part = function(bars.iloc[97:]).iloc[wait:]
        assert (differences(part, function(bars).loc[part.index]) > 1e-6).any()


@pytest.mark.parametrize(("function", "names", "warmup"), GROUPS)
@pytest.mark.parametrize("factor", [1 / 3, 7.3, 1e-3])
def test_the_unit_of_prices_and_of_volumes_does_not_matter(function, names, warmup, factor, market):
    bars, interval = market
    table = function(bars, interval)
    dear = bars.assign(**{c: bars[c] * factor for c in PRICES})
    assert_same(table, function(dear, interval), 1e-6)
    assert_same(table, function(bars.assign(volume=bars["volume"] * 7.3), interval), 1e-6)


def degenerate(kind, bars):
    "Bars of a market in which nothing moves, nothing is traded, or both for a while."
    if kind == "untraded":
        return bars.assign(volume=0)
    price = bars["close"].iloc[0] if kind == "constant" else bars["close"].iloc[400]
    still = bars.index >= bars.index[0 if kind == "constant" else 400]
    return bars.assign(**{c: bars[c].mask(still, price) for c in PRICES})


@pytest.mark.parametrize(("function", "names", "warmup"), GROUPS)
@pytest.mark.parametrize("kind", ["untraded", "constant", "locked after 400 bars"])
@pytest.mark.parametrize("interval", [DAY, FIVE])
def test_nothing_is_infinite_where_nothing_happens(
    function, names, warmup, kind, interval, five_minutes
):
    bars = random_bars(1500) if interval is DAY else five_minutes
    table = function(degenerate(kind, bars), interval)
    assert not np.isinf(table.to_numpy()).any()
    assert table.abs().max().max() < 1e4
    if kind != "untraded":
        assert table.filter(regex="_gap_atr|^rsi|^bb").iloc[-500:].isna().all(axis=None)


@pytest.mark.parametrize(("function", "names", "warmup"), GROUPS)
@pytest.mark.parametrize("rows", [0, 1, 2, 30])
def test_a_young_share_has_its_columns_and_knows_little(function, names, warmup, rows):
    table = function(random_bars(30).iloc[:rows])
    assert tuple(table.columns) == names and len(table) == rows
    assert table.notna().all(axis=1).sum() == 0


def test_a_turning_point_is_not_used_before_it_is_known():
    bars = random_bars(400)
    swing = bars["close"] - levels(bars)["swing_high_gap_atr"] * mean_range(bars)
    for day in range(30, 400):
        is_past = np.isclose(bars["high"].iloc[: day - 4], swing.iloc[day], rtol=1e-9).any()
        assert np.isnan(swing.iloc[day]) or is_past


def mean_range(bars):
    "Mean of the last 20 true ranges, by pandas."
    before = bars["close"].shift(1)
    wide = bars["high"].clip(lower=before) - bars["low"].clip(upper=before)
    return wide.mask(before.isna()).rolling(20).mean()


def test_averages_and_extremes_agree_with_pandas_on_real_bars():
    bars = real("nse_daily", "RELIANCE")
    table, typical = levels(bars), bars[["high", "low", "close"]].mean(axis=1)
    quarter = bars.index.year * 4 + bars.index.quarter
    paid = (typical * bars["volume"]).groupby(quarter).cumsum()
    average = paid / bars["volume"].groupby(quarter).cumsum()
    by_hand = ((bars["close"] - average) / mean_range(bars)).where(quarter != quarter[0])
    np.testing.assert_allclose(table["vwap_quarter_gap_atr"], by_hand, atol=1e-8)
    top = bars["high"].rolling(252, min_periods=120).max()
    np.testing.assert_allclose(table["high_252_frac"], bars["close"] / top - 1, atol=1e-12)


def test_levels_of_a_session_are_the_same_from_intraday_and_from_daily_bars():
    minutes = real("nse_intraday_5m", "RELIANCE")
    how = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    daily = minutes.groupby(minutes.index.normalize()).agg(how)
    opens = minutes.groupby(minutes.index.normalize()).head(1)
    inside = levels(minutes, FIVE).loc[opens.index]
    swing = (
        opens["close"].to_numpy()
        - inside["swing_low_gap_atr"] * mean_range(daily).shift(1).to_numpy()
    )
    by_day = (daily["close"] - levels(daily)["swing_low_gap_atr"] * mean_range(daily)).shift(1)
    np.testing.assert_allclose(swing, by_day, rtol=1e-9)
