"""Corporate actions: laws on made-up bars, and the documented ones on bars of two vendors."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.data.csv_bars import read_csv_bars
from sensequant.market.actions import (
    ACTION_COLUMNS,
    actions_for,
    adjust,
    check_actions,
    market_gap,
    merge_actions,
    opening_gaps,
    read_actions,
    save_actions,
    suspect_actions,
    suspect_by_comparison,
    unadjust,
)
from sensequant.market.calendar import is_session
from sensequant.market.symbols import find

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real bars in {DATA}")
PRICES = ["open", "high", "low", "close"]
NAMES = ("nse_daily", "nse_daily_upstox")
WALK = random_bars(80)
# Above 20 % from close to close, and real: README of the data.
GENUINE = [
    *(("AXISBANK", "2020-03-23"), ("BAJAJFINSV", "2020-03-23"), ("BAJFINANCE", "2020-03-23")),
    *(("ADANIENT", "2023-02-01"), ("ADANIENT", "2023-02-02"), ("ADANIENT", "2023-02-08")),
    *(("ADANIENT", "2024-11-21"), ("ADANIGREEN", "2024-11-29"), ("ADANIPORTS", "2024-06-04")),
    *(("VEDL", "2020-10-12"), ("GODREJCP", "2021-05-12"), ("HINDZINC", "2024-05-21")),
    *(("INDUSINDBK", "2025-03-11"), ("TATAMOTORS", "2021-10-13")),
]


def action(ex_date, factor=1.0, shift=0.0, volume=1.0, **other) -> dict:
    """One confirmed action of TCS."""
    known = dict(zip(ACTION_COLUMNS[3:6], (factor, shift, volume), strict=True))
    rest = {"kind": "split", "applies_to": "any", "status": "confirmed", "source": "test"}
    return {"symbol": "TCS", "ex_date": ex_date, **known, **rest, "note": "", **other}


def table(*rows: dict) -> pd.DataFrame:
    """Actions as a checked table."""
    return check_actions(pd.DataFrame(list(rows), columns=list(ACTION_COLUMNS)))


@pytest.fixture(scope="module")
def vendors() -> tuple[dict, dict]:
    """Daily bars of both vendors by symbol, judged by the rules."""
    return tuple(
        {
            path.name.removesuffix(".csv.gz"): read_csv_bars(path, Interval.DAY).bars
            for path in sorted((DATA / name).glob("*.csv.gz"))
        }
        for name in NAMES
    )


factors = st.sampled_from([0.1, 0.2, 1 / 3, 0.5, 2 / 3, 0.75, 0.946013, 2.0])
lists = st.lists(
    st.tuples(st.integers(0, 79), factors, st.sampled_from([0.0, 0.5, 2.0])),
    max_size=4,
    unique_by=lambda a: a[0],
)


@settings(max_examples=30, deadline=None)
@given(lists)
def test_applied_and_taken_back_is_as_before(made):
    actions = table(*(action(WALK.index[i], f, s, max(1 / f, 1)) for i, f, s in made))
    before = WALK.copy()
    back = unadjust(adjust(WALK, actions), actions)
    np.testing.assert_allclose(back[PRICES], WALK[PRICES], rtol=1e-9)
    assert (back["volume"] == WALK["volume"]).all(), "volume factors of 1 and above lose no share"
    pd.testing.assert_frame_equal(WALK, before)


@settings(max_examples=30, deadline=None)
@given(lists, st.integers(1, 79))
def test_the_past_is_seen_as_it_was(made, last):
    """As of a day, neither a later bar nor a later action matters; the last bar is as traded."""
    actions = table(*(action(WALK.index[i], f, s, 1 / f) for i, f, s in made))
    day = WALK.index[last]
    seen = adjust(WALK, actions, as_of=day)
    early = actions[actions["ex_date"] <= day]
    pd.testing.assert_frame_equal(seen, adjust(WALK.iloc[: last + 1], early))
    noisy = WALK.copy()
    noisy.loc[noisy.index > day, PRICES] *= 3.0
    pd.testing.assert_frame_equal(seen, adjust(noisy, actions, as_of=day))
    assert (seen.iloc[-1] == WALK.iloc[last]).all()
    pd.testing.assert_frame_equal(adjust(WALK, actions, as_of=day.date()), seen)


@settings(max_examples=30, deadline=None)
@given(lists)
def test_factors_change_no_return_but_that_of_the_ex_date(made):
    actions = table(*(action(WALK.index[i], f, 0.0, 1 / f) for i, f, _ in made))
    raw, told = (b["close"].pct_change().iloc[1:] for b in (WALK, adjust(WALK, actions)))
    ex_dates = told.index.isin(actions["ex_date"])
    np.testing.assert_allclose(told[~ex_dates], raw[~ex_dates], atol=1e-12)
    factor = actions.set_index("ex_date")["price_factor"].reindex(told.index[ex_dates])
    np.testing.assert_allclose(1 + told[ex_dates], (1 + raw[ex_dates]) / factor, rtol=1e-12)
    shuffled = actions.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(adjust(WALK, shuffled), adjust(WALK, actions))


def test_bars_stay_bars_and_intraday_follows_the_session():
    stamps = pd.date_range("2024-10-25 09:15", periods=4, freq="5min", tz=IST, name="ts").append(
        pd.date_range("2024-10-28 09:15", periods=4, freq="5min", tz=IST, name="ts")
    )
    bars = random_bars(8).set_axis(stamps)
    told = adjust(bars, table(action("2024-10-28", 0.5, 0.0, 2.0)))
    assert (told["close"].iloc[:4] == bars["close"].iloc[:4] / 2).all()
    assert told.iloc[4:].equals(bars.iloc[4:])
    assert told["volume"].dtype == np.int64
    seen = adjust(bars, table(action("2024-10-28", 0.5)), as_of="2024-10-25")
    assert seen.equals(bars.iloc[:4])


def test_only_what_is_confirmed_and_concerns_the_source_is_applied():
    day = WALK.index[40]
    rows = [
        action(day, 0.5, status="suspected"),
        action(day, 0.4, status="rejected", applies_to="breeze"),
        action(day, 0.3, applies_to="csv-nse_daily-*"),
        action(day, 0.2, symbol="INFY", applies_to="other"),
    ]
    known = table(*rows)
    assert adjust(WALK, known.query("status != 'confirmed'")).equals(WALK)
    assert actions_for(known, "TCS", "breeze").empty
    assert actions_for(known, "TCS", "csv-nse_daily_upstox-1a2b3c").empty
    mine = actions_for(known, "TCS", "csv-nse_daily-1a2b3c")
    assert mine["price_factor"].tolist() == [0.3]
    assert actions_for(table(action(day)), "TCS", "breeze")["applies_to"].tolist() == ["any"]


def test_a_price_that_would_vanish_is_refused():
    with pytest.raises(DataError, match=r"above 0 INR.*TCS"):
        adjust(WALK, table(action(WALK.index[40], shift=-1_000.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ex_date": "soon"}, "ex_date must be a date"),
        ({"kind": "gift"}, "kind must be one of"),
        ({"status": "perhaps"}, "status must be one of"),
        ({"price_factor": "half"}, "must be numbers"),
        ({"price_factor": float("inf")}, "must be numbers"),
        ({"volume_factor": -2}, "above 0"),
        ({"source": ""}, "must be given"),
        ({"symbol": None}, "must be given"),
    ],
)
def test_a_line_that_cannot_be_applied_is_named(change, message):
    rows = [action("2024-01-02"), action("2024-01-03") | change]
    with pytest.raises(DataError, match=message + r".*row 2"):
        table(*rows)


def test_the_table_of_ones_own(tmp_path):
    path = tmp_path / "state" / "corporate_actions.csv"
    seen = table(action("2022-01-14", 1.35, status="suspected", symbol="MOTHERSON"))
    save_actions(path, seen)
    assert read_actions(path).query("symbol == 'MOTHERSON' and status == 'suspected'").shape[0] == 1
    text = path.read_text().replace("suspected", "rejected")
    path.write_text(text)
    again = save_actions(path, seen)
    assert again["status"].tolist() == ["rejected"], "what a person decided stays"
    assert path.read_text() == text, "saving the same again changes nothing"
    path.write_text(text.replace("2022-01-14", "14 Jan"))
    with pytest.raises(DataError, match=r"corporate_actions\.csv, row 1"):
        read_actions(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="must be a CSV file"):
        read_actions(path)


def test_ones_own_word_wins_over_the_facts(tmp_path):
    path = tmp_path / "mine.csv"
    facts = read_actions()
    mine = facts.iloc[[0]].assign(price_factor=0.25, source="my broker's statement")
    save_actions(path, mine)
    both = read_actions(path)
    assert len(both) == len(facts) and (both["price_factor"] == 0.25).sum() == 1
    assert merge_actions(both, facts.assign(status="suspected")).equals(both)


def test_facts_are_sourced_sessions_of_known_symbols():
    facts = read_actions()
    assert facts["source"].str.contains(r"read 20\d\d-\d\d-\d\d").all()
    for row in facts.itertuples():
        assert is_session(row.ex_date) and find(row.symbol)
        if row.kind in ("split", "bonus"):
            assert row.price_factor * row.volume_factor == 1


@needs_data
def test_motherson_is_found_by_its_jump_alone_and_nothing_else(vendors):
    """The file rises by 28.6 % that day; the share itself opened 17 % lower, without its wiring."""
    ours, theirs = (suspect_actions(b, n) for b, n in zip(vendors, NAMES, strict=True))
    assert theirs.empty
    assert ours[["symbol", "kind", "applies_to"]].values.tolist() == [
        ["MOTHERSON", "scale", "nse_daily"]
    ]
    assert str(ours["ex_date"].iloc[0].date()) == "2022-01-14"
    assert ours["price_factor"].iloc[0] == pytest.approx(1.3537, abs=1e-4)
    alone = suspect_actions({"MOTHERSON": vendors[0]["MOTHERSON"]})
    assert alone["price_factor"].iloc[0] == pytest.approx(1.3507, abs=1e-4), "without a market"
    bars = vendors[0]["MOTHERSON"]["close"]
    assert bars["2022-01-14"] / bars["2022-01-13"] - 1 == pytest.approx(0.2855, abs=1e-4)
    fact = read_actions().query("symbol == 'MOTHERSON'").iloc[0]
    assert fact["price_factor"] == pytest.approx(194.95 / 234.80, abs=1e-6)


@needs_data
def test_genuine_moves_are_no_actions(vendors):
    """Each is there, above a fifth or just below it, and none is suspected."""
    found = {(s, str(d.date())) for b in vendors for s, d in suspects(suspect_actions(b))}
    for symbol, day in GENUINE:
        bars = vendors[symbol not in vendors[0]][symbol]["close"].pct_change()
        assert abs(bars[day]) > 0.198, (symbol, day)
        assert (symbol, day) not in found


def suspects(found: pd.DataFrame) -> list[tuple]:
    """Symbol and ex-date of each line."""
    return list(zip(found["symbol"], found["ex_date"], strict=True))


@needs_data
def test_what_one_vendor_adjusts_and_the_other_does_not(vendors):
    found = suspect_by_comparison(*vendors, NAMES)
    told = found.assign(ex_date=found["ex_date"].dt.strftime("%Y-%m-%d"))
    assert told[["symbol", "ex_date", "kind", "applies_to"]].values.tolist() == [
        ["COALINDIA", "2023-11-21", "dividend", NAMES[1]],
        ["ITC", "2025-01-06", "demerger", NAMES[1]],
        ["ONGC", "2023-11-21", "dividend", NAMES[1]],
        ["POWERGRID", "2023-08-08", "dividend", NAMES[1]],
        ["RELIANCE", "2023-07-20", "demerger", NAMES[1]],
    ]
    by = told.set_index("symbol")
    shifts = by["price_shift_inr"]
    assert shifts["COALINDIA"] == pytest.approx(15.25, abs=0.001)
    assert shifts["ONGC"] == pytest.approx(5.75, abs=0.001)
    assert shifts["POWERGRID"] == pytest.approx(3.55, abs=0.02)  # 4.75 before a bonus of 1:3
    assert by["price_factor"]["RELIANCE"] == pytest.approx(0.968, abs=0.0005)
    assert by["price_factor"]["ITC"] == pytest.approx(0.963, abs=0.0005)
    volumes = by["volume_factor"][["RELIANCE", "ITC"]] * by["price_factor"][["RELIANCE", "ITC"]]
    np.testing.assert_allclose(volumes, 1, atol=1e-4)
    swapped = suspect_by_comparison(*vendors[::-1], NAMES[::-1])
    assert swapped[["symbol", "applies_to"]].equals(found[["symbol", "applies_to"]])
    np.testing.assert_allclose(swapped["price_factor"], found["price_factor"], atol=1e-5)
    np.testing.assert_allclose(swapped["price_shift_inr"], found["price_shift_inr"], atol=1e-3)


@needs_data
def test_confirmed_they_make_the_vendors_agree(vendors):
    confirmed = suspect_by_comparison(*vendors, NAMES).assign(status="confirmed")
    for symbol in confirmed["symbol"]:
        first, second = (b[symbol] for b in vendors)
        raw = (second["close"] / first["close"] - 1).dropna().abs()
        mended = adjust(second, actions_for(confirmed, symbol, NAMES[1]))
        left = (mended["close"] / first["close"] - 1).dropna().abs()
        assert (raw > 0.005).mean() > 0.5 and (left > 0.002).mean() < 0.005, symbol
        assert suspect_by_comparison({symbol: first}, {symbol: mended}).empty


@needs_data
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 2 / 3, 0.75])
def test_splits_planted_in_real_bars_are_found_to_the_day(vendors, ratio):
    """Forty at random places: at least 39 on the day, nothing elsewhere, sizes within 5 %."""
    rng, bars = np.random.default_rng(3), vendors[1]
    market, hits, near = market_gap(opening_gaps(bars)), 0, 0
    for _ in range(40):
        symbol = str(rng.choice(sorted(bars)))
        day = bars[symbol].index[rng.integers(30, len(bars[symbol]) - 30)]
        raw = unadjust(bars[symbol], table(action(day, ratio, volume=1 / ratio)))
        found = suspect_actions({symbol: raw}, market=market)
        assert set(found["ex_date"]) <= {day}
        hits += len(found)
        near += int((abs(found["price_factor"] / ratio - 1) < 0.05).sum())
    assert hits >= 39 and near >= hits - 2


@needs_data
def test_within_the_band_a_jump_proves_nothing(vendors):
    """A bonus of 1:5 opens 17 % lower, as bad news may; a second vendor is needed, and finds it."""
    bars = vendors[1]["TCS"]
    day = bars.index[600]
    raw = unadjust(bars, table(action(day, 5 / 6, volume=1.2)))
    assert suspect_actions({"TCS": raw}).empty
    found = suspect_by_comparison({"TCS": bars}, {"TCS": raw}).iloc[0]
    assert (found["ex_date"], found["applies_to"]) == (day, "second")
    assert found["price_factor"] == pytest.approx(5 / 6, abs=1e-5)
    assert found["volume_factor"] == pytest.approx(1.2, abs=1e-3)


@needs_data
def test_several_shifts_of_one_symbol_are_told_apart(vendors):
    """A dividend, a split and a demerger, in any mixture of the two sources."""
    bars, rng = vendors[1]["TITAN"], np.random.default_rng(5)
    for trial in range(20):
        places = np.sort(rng.choice(np.arange(80, 1160, 90), 3, replace=False))
        days = bars.index[places]
        kinds = [(1.0, -30.0, 1.0), (0.2, 0.0, 5.0), (0.93, 0.0, 1.0)]
        sides = rng.integers(0, 2, 3)
        made = [action(d, *kinds[k]) for d, k in zip(days, rng.permutation(3), strict=True)]
        both = [adjust(bars, table(*(m for m, s in zip(made, sides, strict=True) if s == n)))
                for n in (0, 1)]  # fmt: skip
        found = suspect_by_comparison({"TITAN": both[0]}, {"TITAN": both[1]})
        assert found["ex_date"].tolist() == list(days), trial
        confirmed = found.assign(status="confirmed")
        mended = [adjust(b, actions_for(confirmed, "TITAN", n))["close"]
                  for b, n in zip(both, ("first", "second"), strict=True)]  # fmt: skip
        np.testing.assert_allclose(mended[0], mended[1], rtol=2e-3)


def test_noise_and_unfinished_business():
    """Rounding is no shift; a level that differs to the end is told without an ex-date."""
    rng, bars = np.random.default_rng(1), random_bars(300)
    rounded = bars.assign(close=bars["close"] * (1 + rng.uniform(-0.0019, 0.0019, 300)))
    assert suspect_by_comparison({"TCS": bars}, {"TCS": rounded}).empty
    half = bars.assign(**{c: bars[c] / 2 for c in PRICES}, volume=bars["volume"] * 2)
    found = suspect_by_comparison({"TCS": half}, {"TCS": bars}).iloc[0]
    assert found["ex_date"] == bars.index[-1] + pd.Timedelta(days=1)
    assert (found["kind"], found["applies_to"], found["price_factor"]) == ("split", "second", 0.5)
    assert "still differ" in found["note"]
    assert suspect_by_comparison({"TCS": bars}, {"INFY": bars}).empty
    assert suspect_actions({}).empty and suspect_actions({"TCS": bars.iloc[:0]}).empty


def test_one_day_is_never_adjusted_twice(tmp_path):
    "A fact says breeze; a row of one's own that says any, or breeze*, would halve the price again."
    own = tmp_path / "own.csv"
    for to in ("any", "breeze*"):
        row = action("2024-10-28", 0.5, 0.0, 2.0, symbol="RELIANCE", applies_to=to)
        table(row).to_csv(own, index=False)
        with pytest.raises(DataError, match=r"one confirmed action a day.*breeze.*RELIANCE"):
            actions_for(read_actions(own), "RELIANCE", "breeze")
        suspected = row | {"status": "suspected"}
        table(suspected).to_csv(own, index=False)
        assert len(actions_for(read_actions(own), "RELIANCE", "breeze")) == 2


def test_slips_of_a_hand_are_refused(tmp_path):
    with pytest.raises(DataError, match="volumes must stay countable"):
        adjust(WALK, table(action(WALK.index[40], 1e-30, 0.0, 1e30)))
    (tmp_path / "own.csv").write_bytes(b"\xff\xfe\x00garbage")
    for use in (read_actions, lambda p: save_actions(p, table(action(WALK.index[5])))):
        with pytest.raises(DataError, match=r"must be a CSV file.*own\.csv"):
            use(tmp_path / "own.csv")
