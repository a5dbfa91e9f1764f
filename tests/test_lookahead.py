"""Features that know the future, each of which must be caught, and the features of the house, on
real bars, none of which may be."""

import zlib
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.data.books import SimulatedBooks, book_frame
from sensequant.data.csv_bars import read_csv_bars
from sensequant.features import feature_sets
from sensequant.features.context import market
from sensequant.features.feature_sets import (
    GROUPS,
    Context,
    feature_names,
    feature_set,
    make_features,
    warmup_bars,
)
from sensequant.features.joined import SNAPSHOT_COLUMNS
from sensequant.features.labels import known_at
from sensequant.features.lookahead import (
    LookaheadRules,
    check_context,
    check_lookahead,
    check_user_feature,
    load_function,
    require_blind,
)

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
EXACT = LookaheadRules(tolerance=0.0)
WALK = random_bars(500, 11)
RATES = pd.Series(range(30), pd.bdate_range("2024-01-31", periods=30, freq="BME", tz=IST))


def by_month_to_come(bars):
    "A monthly table that has no `available_at`, joined by its date and filled backward."
    return RATES.reindex(bars.index).bfill()


def fitted_so_far(bars):
    "Scaled by everything since the first bar, whichever that is."
    move = bars["close"].pct_change()
    return (move - move.expanding().mean()) / move.expanding().std()


def pivots(bars):
    "Highs that stand above two bars on either side, marked where they stand."
    return (bars["high"] == bars["high"].rolling(5, center=True).max()).astype(float)


def last_week_of_month(bars):
    "A look ahead that touches only a few bars of each month."
    late = bars.index.day > 23
    return bars["close"].shift(-1).where(late, bars["close"]) / bars["close"]


TRAPS = {
    "zscore of everything": (lambda b: (b["close"] - b["close"].mean()) / b["close"].std(), "cut"),
    "centred mean": (lambda b: b["close"].rolling(7, center=True).mean() / b["close"], "cut"),
    "tomorrow": (lambda b: b["close"].shift(-1) / b["close"], "cut"),
    "next week": (lambda b: b["close"].shift(-5) / b["close"], "cut"),
    "sign of tomorrow": (lambda b: np.sign(b["close"].shift(-1) - b["close"]).fillna(0), "disturb"),
    "filled backward": (lambda b: b["close"].where(b.index.day % 7 == 0).bfill(), "cut"),
    "highest ever": (lambda b: b["close"] / b["high"].max(), "disturb"),
    "rank in everything": (lambda b: b["volume"].rank(pct=True), "cut"),
    "later volume": (lambda b: b["volume"].rolling(3).mean().shift(-2), "disturb"),
    "pivots": (pivots, "cut"),
    "few bars": (last_week_of_month, "cut"),
    "table by its date": (by_month_to_come, "cut"),
    "fit since the start": (fitted_so_far, "start"),
    "counter": (lambda b: pd.Series(np.arange(len(b)) / 100.0, b.index), "start"),
    "volume since the start": (lambda b: b["volume"].cumsum(), "start"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_caught(name):
    function, check = TRAPS[name]
    found = check_lookahead(function, WALK, 100)
    assert check in {f.check for f in found}, f"{name}: {[str(f) for f in found]}"
    with pytest.raises(DataError, match="must not depend on"):
        require_blind(function, WALK, 100)


def test_a_gap_at_the_end_is_a_look_ahead_even_where_every_number_agrees():
    [cut, _] = check_lookahead(lambda b: b["close"].shift(-5), WALK, 100)
    assert cut.check == "cut" and np.isnan(cut.other) and np.isnan(cut.difference)
    at = WALK.index.get_loc(cut.ts)
    assert cut.full == WALK["close"].iloc[at + 5]


def test_findings_name_column_first_bar_and_difference():
    def two(bars):
        return pd.DataFrame({"fine": bars["close"].diff(), "leak": bars["close"].shift(-1)})

    found = check_lookahead(two, WALK, 100)
    assert {f.column for f in found} == {"leak"} and {f.check for f in found} == {"cut", "disturb"}
    noise = next(f for f in found if f.check == "disturb")
    row = WALK.index.get_loc(noise.ts)
    assert noise.full == WALK["close"].iloc[row + 1]
    assert noise.difference >= abs(noise.full - noise.other) > 0
    with pytest.raises(DataError, match=r"leak at \d{4}-.*difference of up to"):
        require_blind(two, WALK, 100)


def test_what_only_looks_back_passes_to_the_last_bit():
    def plain(bars):
        close = bars["close"]
        columns = {"momentum": close / close.shift(20) - 1, "calm": close.rolling(20).std() / close}
        return pd.DataFrame(columns | {"flat": 1.0, "never": np.nan}, index=bars.index)

    assert check_lookahead(plain, WALK, 21, EXACT) == []


def test_a_slow_average_passes_after_a_warm_up_that_is_long_enough():
    def slow(bars):
        return bars["close"].ewm(span=26, adjust=False).mean() / bars["close"]

    assert check_lookahead(slow, WALK, 150) == []
    assert {f.check for f in check_lookahead(slow, WALK, 26)} == {"start"}


def test_bars_stay_bars_when_they_are_disturbed():
    "A function may rely on a high above a low, and on a whole volume."
    seen = []

    def careful(bars):
        assert (bars["high"] >= bars[["open", "close", "low"]].max(axis=1)).all()
        assert (bars["low"] <= bars[["open", "close"]].min(axis=1)).all()
        assert bars["volume"].dtype == WALK["volume"].dtype
        seen.append(len(bars))
        return bars["close"].diff()

    check_lookahead(careful, WALK, 100)
    assert len(seen) > 15


def test_a_function_that_changes_its_bars_changes_only_its_own():
    def rude(bars):
        bars["close"] = bars["close"].rolling(3).mean()
        return bars["close"]

    before = WALK.copy()
    assert check_lookahead(rude, WALK, 100) == []
    pd.testing.assert_frame_equal(WALK, before)


# --- a user's own file


def test_files_of_users(tmp_path):
    (tmp_path / "broken.py").write_text("def f(bars):\n  return bars +\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "words.py").write_text("VALUE = 3\ndef f(bars): return bars['close'].astype(str)\n")
    for spec, words in {
        f"{tmp_path}/broken.py:f": "SyntaxError",
        f"{tmp_path}/fails.py:f": "RuntimeError: no licence",
        f"{tmp_path}/none.py:f": "must be there",
        f"{tmp_path}/words.py:VALUE": "must have a function of that name",
        f"{tmp_path}/words.py:": "file.py:function",
        "": "file.py:function",
    }.items():
        with pytest.raises(DataError, match=words):
            load_function(spec)
    with pytest.raises(DataError, match="must hold numbers"):
        check_user_feature(f"{tmp_path}/words.py:f", WALK)
    (tmp_path / "good.py").write_text("def f(bars): return bars[['close']].pct_change()\n")
    table, ok = check_user_feature(f"{tmp_path}/good.py:f", WALK)
    assert ok and table.empty


def test_a_module_can_be_named_too():
    assert load_function("sensequant.features.context:market") is market


def test_columns_that_come_and_go_are_refused():
    def moody(bars):
        return bars["close"].to_frame("even" if len(bars) % 2 else "odd")

    with pytest.raises(DataError, match="must always give the columns"):
        check_lookahead(moody, WALK, 100)


# --- the features of the house


def made_up(bars, interval):
    "Books, opinions and tables of made-up numbers around the bars of a symbol."
    known, rng = known_at(bars.index, interval), np.random.default_rng(5)
    maker = SimulatedBooks({"X": 100.0})
    books = [maker.latest(["X"], t - timedelta(seconds=20))[0] for t in known[::3]]
    days = known.normalize().unique()
    at = days + pd.to_timedelta(rng.integers(0, 40 * 60, len(days)), unit="min")
    said = pd.DataFrame({"date": days.strftime("%Y-%m-%d"), "available_at": at})
    said = said.assign(value=rng.uniform(-1, 1, len(days)), confidence=0.5, items=3)
    said = said.assign(source="rss", asked="rss").astype(SNAPSHOT_COLUMNS)
    late = pd.Series(at).sort_values(ignore_index=True)
    table = pd.DataFrame({"available_at": late})
    options = table.assign(symbol="X", options_iv=rng.uniform(0.1, 0.5, len(table)))
    macro = table.iloc[::5].assign(macro_rate=rng.uniform(5, 7, len(table.iloc[::5])))
    frame = book_frame(books).assign(source="breeze")
    return {"books": frame, "sentiment": said, "options": options, "macro": macro}


def real_bars(folder, name, interval):
    "Real bars, or a skip with its reason."
    path = REAL / folder / f"{name}.csv.gz"
    if not path.is_file():
        pytest.skip(f"no real bars at {path}")
    return read_csv_bars(path, interval).bars


def daily_case():
    bars = real_bars("nse_daily", "HDFCBANK", Interval.DAY).iloc[-800:]
    index = real_bars("index_daily", "NIFTY50", Interval.DAY)["close"]
    return bars, Context(Interval.DAY, date(1995, 11, 8), index, **made_up(bars, Interval.DAY))


def intraday_case(n, *place):
    bars = real_bars("nse_intraday_5m", "HDFCBANK", Interval.MINUTE_5).iloc[-n:]
    index, made = real_bars(*place)["close"], made_up(bars, Interval.MINUTE_5)
    return bars, Context(Interval.MINUTE_5, date(1995, 11, 8), index, **made)


BY_DAY = ("index_daily", "NIFTY50", Interval.DAY)
BY_BAR = ("nse_intraday_5m", "NIFTY50_INDEX", Interval.MINUTE_5)
CASES = {
    "daily": daily_case,
    "five minutes, daily index": lambda: intraday_case(2500, *BY_DAY),
    "five minutes, its own index": lambda: intraday_case(2500, *BY_BAR),
}


@pytest.mark.parametrize("case", ["daily", "five minutes, daily index"])
def test_no_group_knows_the_future_of_its_bars(case):
    bars, context = CASES[case]()
    warmup = warmup_bars(GROUPS, context.interval)
    whole = len(bars) > warmup + 500  # levels look back a year, more than these five-minute bars
    rules = LookaheadRules(cuts=3, starts=3 if whole else 0, seed=zlib.crc32(case.encode()))

    def everything(rows):
        return make_features(rows, context, GROUPS)

    table = everything(bars)
    shares = feature_set(table, GROUPS)
    assert {feature_sets.group_of(c) for c in feature_names(table)} == set(GROUPS)
    assert min(v for g, v in shares.items() if g != "market") > 0.3, shares
    found = check_lookahead(everything, bars, warmup if whole else len(bars) // 2, rules)
    assert [str(f) for f in found] == []


@pytest.mark.parametrize("case", CASES)
def test_no_group_knows_the_future_of_what_surrounds_it(case):
    bars, context = CASES[case]()
    around = ("market", "order_book", "sentiment", "options", "macro")
    rules = LookaheadRules(cuts=3, tolerance=0.0)
    assert [str(f) for f in check_context(bars, context, around, rules)] == []


@pytest.mark.parametrize("place", [BY_DAY, BY_BAR])
def test_half_a_year_of_five_minutes_is_enough_for_what_needs_no_year(place):
    bars, context = intraday_case(9000, *place)
    groups = ("technical", "regime", "market")
    warmup = warmup_bars(groups, Interval.MINUTE_5)

    def most(rows):
        return make_features(rows, context, groups)

    assert len(bars) > warmup + 500
    assert [str(f) for f in check_lookahead(most, bars, warmup, LookaheadRules(cuts=2))] == []


# --- leaks through what surrounds the bars


def forward_join(bars, context):
    "The next row of the table, whenever it comes."
    table = context.macro
    place = table["available_at"].searchsorted(bars.index, side="left")
    return table[["macro_rate"]].reset_index(drop=True).reindex(place).set_axis(bars.index)


def today_of_the_index(bars, context):
    "A five-minute bar that sees the close its own day ends with."
    level = np.log(context.index_close).diff()
    return pd.DataFrame(
        {"market_return": level.reindex(bars.index.normalize()).to_numpy()}, bars.index
    )


def books_to_come(bars, context):
    "The next book after each bar."
    place = context.books.index.searchsorted(known_at(bars.index, context.interval))
    size = context.books["bid_quantity_1"].reset_index(drop=True).reindex(place)
    return size.astype(float).set_axis(bars.index).to_frame("book_size")


def opinions_by_their_date(bars, context):
    "The opinion about a day on that very day, although it could be had later."
    value = context.sentiment.set_index("date")["value"]
    days = bars.index.strftime("%Y-%m-%d")
    return pd.DataFrame({"sentiment_value": value.reindex(days).to_numpy()}, bars.index)


@pytest.mark.parametrize(
    ("group", "leak"),
    [
        ("macro", forward_join),
        ("market", today_of_the_index),
        ("order_book", books_to_come),
        ("sentiment", opinions_by_their_date),
    ],
)
def test_a_leak_through_the_context_is_caught(group, leak, monkeypatch):
    days = pd.bdate_range("2024-01-29", periods=20, tz=IST)
    days = days[~days.isin(pd.DatetimeIndex(["2024-01-26", "2024-03-08"], tz=IST))]
    starts = days.repeat(75) + pd.to_timedelta([*range(555, 930, 5)] * len(days), unit="min")
    walk = random_bars(len(starts), 3, 0.002)
    bars = walk.set_axis(starts.rename("ts"))
    level = pd.Series(random_bars(len(days), 4)["close"].to_numpy(), days)
    made = made_up(bars, Interval.MINUTE_5)
    context = Context(Interval.MINUTE_5, None, level, **made)
    assert check_context(bars, context, (group,), EXACT) == []
    monkeypatch.setitem(feature_sets._MAKERS, group, leak)
    assert {f.check for f in check_context(bars, context, (group,), EXACT)} == {"context"}
