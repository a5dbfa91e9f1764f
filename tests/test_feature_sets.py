"""What a run pins for its features, and what it makes of it later, whatever happened meanwhile."""

import gzip
import pickle
from dataclasses import replace
from datetime import date, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.data.books import BookStore, SimulatedBooks
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs, pinned_bars
from sensequant.data.sentiment import Snapshot, SnapshotStore, write_snapshots
from sensequant.features.context import (
    MARKET,
    POST_IPO_CAP,
    days_to_expiry,
    equal_weight,
    market,
    monthly_expiries,
    regime,
)
from sensequant.features.feature_sets import (
    GROUPS,
    INDEX_FILE,
    Context,
    feature_names,
    feature_set,
    group_of,
    make_features,
    parse_groups,
    pin_context,
    pinned_context,
    required_columns,
    warmup_bars,
)
from sensequant.features.joined import (
    BOOK,
    SENTIMENT,
    book_columns,
    read_user_table,
    sentiment_columns,
    snapshot_table,
    user_columns,
)
from sensequant.market.calendar import is_session, session_hours, sessions

DAYS = sessions("2022-06-01", "2024-03-28")
PAIR = ("INFY", "TCS")
MORE = ("order_book", "sentiment", "market", "options", "macro")  # groups that read more than bars
OPTIONS = "symbol,available_at,date,iv\nTCS,2024-02-01 15:40,2024-02-01,0.2\nABC,2024-01-01,,0.1\n"
MACRO = "available_at,repo rate\n2023-12-08 10:00,6.5\n2024-02-08 10:00,6.25\n"


def bars_of(seed):
    "Daily bars on real sessions."
    return random_bars(len(DAYS), seed).set_axis(DAYS)


def keep_books(home, symbol, days, source="breeze"):
    "One book a session, ten minutes before it ends."
    maker = SimulatedBooks({symbol: 100.0}, seed=3)
    for day in days:
        [book] = maker.latest([symbol], session_hours(day)[1] - timedelta(minutes=10))
        assert BookStore(home / "data" / "books").append([replace(book, source=source)]) == [""]


def keep_opinions(home, symbol, days):
    "An opinion about each day, to be had shortly after its end."
    by = ("rss", ("rss",), ("rss",), True)
    late = timedelta(hours=25)
    said = [(d.date(), d + late, 0.1 * (k % 7), 0.5, 2, *by) for k, d in enumerate(days)]
    made = [Snapshot(symbol, *words) for words in said]
    write_snapshots(SnapshotStore(home / "data" / "sentiment"), made)


def begin(home, symbols=PAIR, second=0, benchmark=None):
    "A run whose bars and inputs are pinned, and its inputs."
    run = Run(f"live_candidate_20240401_0900{second:02d}", home)
    for seed, symbol in enumerate(symbols):
        pin_bars(run, symbol, bars_of(seed))
    if benchmark is not None:
        run.artifacts.write_parquet("benchmark.parquet", benchmark)
    listed = dict.fromkeys(symbols, date(2022, 6, 1))
    name = None if benchmark is None else "NIFTY50"
    inputs = Inputs(date(2023, 9, 1), date(2024, 3, 28), Interval.DAY, False, listed, name)
    pin_inputs(run, inputs)
    return run, inputs


@pytest.fixture
def full(tmp_path):
    "A home with everything for TCS and little for INFY, and a run that pinned it."
    keep_books(tmp_path, "TCS", DAYS[-12:])
    keep_opinions(tmp_path, "TCS", DAYS[-40:])
    (tmp_path / "options.csv").write_text(OPTIONS.replace(",,", ",2024-01-01,"))
    (tmp_path / "macro.csv").write_text(MACRO)
    run, inputs = begin(tmp_path, benchmark=bars_of(9))
    told = pin_context(run, inputs, GROUPS, tmp_path / "options.csv", tmp_path / "macro.csv")
    return run, inputs, told


def test_a_run_reads_back_what_there_was(full, tmp_path):
    run, inputs, told = full
    store = SnapshotStore(tmp_path / "data" / "sentiment")
    direct = Context(
        Interval.DAY,
        date(2022, 6, 1),
        bars_of(9)["close"],
        BookStore(tmp_path / "data" / "books").read("TCS", inputs.start, inputs.end),
        snapshot_table(store, "TCS", inputs.end),
        read_user_table(tmp_path / "options.csv", "options").query("symbol == 'TCS'"),
        read_user_table(tmp_path / "macro.csv", "macro"),
    )
    bars = pinned_bars(run, "TCS")
    wanted = make_features(bars, direct, GROUPS)
    table = make_features(bars, pinned_context(run, "TCS", GROUPS), GROUPS)
    pd.testing.assert_frame_equal(table, wanted)
    shares = feature_set(table, GROUPS)
    assert shares["order_book"] == pytest.approx(12 / len(DAYS))
    waited = DAYS[-39:] + timedelta(hours=15.5) - (DAYS[-40:-1] + timedelta(days=1))
    fresh = (waited <= timedelta(days=3)).sum()  # a long week-end makes an opinion too old
    assert 30 < fresh < 39 and shares["sentiment"] == pytest.approx(fresh / len(DAYS))
    after = (pd.Timestamp("2024-02-01", tz=IST) < DAYS).mean()
    assert shares["options"] == pytest.approx(after) and shares["macro"] > shares["options"]
    assert told["market"]["source"] == "NIFTY50" and told["market"]["note"] == ""
    assert told["order_book"] == {"source": "breeze", "rows": 12, "note": "none for INFY"}


def test_what_is_missing_is_no_error_and_is_said(tmp_path):
    run, inputs = begin(tmp_path)
    told = pin_context(run, inputs, GROUPS)
    assert tuple(told) == MORE
    assert told["market"]["source"] == "equal weight of 2 symbols"
    for group in ("order_book", "sentiment"):
        assert told[group] == {"source": "none", "rows": 0, "note": "none for INFY, TCS"}
    assert "options_csv names no file" in told["options"]["note"]
    table = make_features(pinned_bars(run, "TCS"), pinned_context(run, "TCS", GROUPS), GROUPS)
    assert table[[*BOOK, *SENTIMENT]].isna().all(axis=None)
    assert table[list(MARKET)].iloc[-1].notna().all()
    shares = feature_set(table, GROUPS)
    assert tuple(shares) == GROUPS
    assert [shares[g] for g in ("order_book", "sentiment", "options", "macro")] == [0.0] * 4
    assert not [c for c in table if c.startswith(("options_", "macro_"))]


def test_one_symbol_without_a_benchmark_is_told_so(tmp_path):
    run, inputs = begin(tmp_path, ("TCS",))
    assert "one symbol is no market" in pin_context(run, inputs, GROUPS)["market"]["note"]


def test_the_columns_are_the_same_for_every_symbol(full):
    run, _, _ = full
    tables = [
        make_features(pinned_bars(run, s), pinned_context(run, s, GROUPS), GROUPS) for s in PAIR
    ]
    assert list(tables[0]) == list(tables[1])
    order = [group_of(c) for c in feature_names(tables[0])]
    assert order == sorted(order, key=GROUPS.index)
    assert tables[0].filter(like="options_").isna().all(axis=None)  # INFY has no row


def test_nothing_that_happens_later_changes_a_pinned_run(full, tmp_path):
    run, _, _ = full
    bars = pinned_bars(run, "TCS")
    before = make_features(bars, pinned_context(run, "TCS", GROUPS), GROUPS)
    (tmp_path / "macro.csv").write_text("available_at,other\n2020-01-01,1\n")
    (tmp_path / "options.csv").unlink()
    keep_books(tmp_path, "TCS", DAYS[-20:-15])
    keep_opinions(tmp_path, "TCS", DAYS[-80:-60])
    again = make_features(bars, pinned_context(Run(run.run_id, tmp_path), "TCS", GROUPS), GROUPS)
    pd.testing.assert_frame_equal(again, before)


def test_pinning_again_takes_what_is_there_now(full, tmp_path):
    run, inputs, _ = full
    told = pin_context(run, inputs, ("macro", "options"), None, tmp_path / "macro.csv")
    assert told["options"]["rows"] == 0
    context = pinned_context(run, "TCS", ("options", "macro"))
    assert context.options is None and len(context.macro) == 2


def test_equal_inputs_are_equal_files(full, tmp_path):
    run, inputs, _ = full
    other, _ = begin(tmp_path, second=1, benchmark=bars_of(9))
    pin_context(other, inputs, GROUPS, tmp_path / "options.csv", tmp_path / "macro.csv")
    mine, yours = (
        {p: a.sha256 for p, a in r.artifacts.index().items() if p.startswith("context/")}
        for r in (run, other)
    )
    assert mine == yours and len(mine) == 3 + 2 * len(PAIR)


@pytest.mark.parametrize(
    ("group", "rel"),
    [
        ("market", INDEX_FILE),
        ("order_book", "context/books/TCS.parquet"),
        ("sentiment", "context/sentiment/TCS.parquet"),
        ("options", "context/options.parquet"),
        ("macro", "context/macro.parquet"),
    ],
)
def test_a_file_that_was_changed_is_refused(full, group, rel):
    run, _, _ = full
    path = run.artifacts.path(rel)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="SHA-256 must be"):
        pinned_context(run, "TCS", (group,))
    for other in set(MORE) - {group}:
        pinned_context(run, "TCS", (other,))


def test_groups_that_are_off_are_neither_pinned_nor_read(tmp_path):
    run, inputs = begin(tmp_path)
    assert pin_context(run, inputs, ("technical", "levels", "regime")) == {}
    assert not [p for p in run.artifacts.index() if p.startswith("context/")]
    context = pinned_context(run, "TCS", ("technical",))
    assert context.listed_on == date(2022, 6, 1) and context.index_close is None
    with pytest.raises(DataError, match="must be on record"):
        pinned_context(run, "TCS", ("macro",))
    with pytest.raises(DataError, match="must be one of the run's"):
        pinned_context(run, "SBIN", ("technical",))


def test_a_context_travels_to_a_worker(full):
    run, _, _ = full
    context, bars = pinned_context(run, "TCS", GROUPS), pinned_bars(run, "TCS")
    sent = pickle.loads(pickle.dumps(context))
    wanted = make_features(bars, context, GROUPS)
    pd.testing.assert_frame_equal(make_features(bars, sent, GROUPS), wanted)


# --- shares and names


def test_books_that_were_made_up_are_data_but_not_real(tmp_path):
    keep_books(tmp_path, "TCS", DAYS[-22:-6], "simulated")
    keep_books(tmp_path, "TCS", DAYS[-6:])
    run, inputs = begin(tmp_path)
    assert pin_context(run, inputs, ("order_book",))["order_book"]["source"] == "breeze, simulated"
    on = ("technical", "order_book")
    table = make_features(pinned_bars(run, "TCS"), pinned_context(run, "TCS", on), on)
    assert table["book_imbalance"].notna().sum() == 22
    assert feature_set(table, on)["order_book"] == pytest.approx(6 / len(DAYS))


def test_the_calendar_alone_is_no_data():
    short = bars_of(1).iloc[:15]
    on = ("technical", "regime")
    table = make_features(short, Context(listed_on=date(2022, 6, 1)), on)
    assert table[["post_ipo_days", "days_to_expiry"]].notna().all(axis=None)
    assert feature_set(table, on)["regime"] == 0.0
    assert feature_set(table.iloc[:0], on) == dict.fromkeys(GROUPS, 0.0)


def test_a_technical_row_needs_every_column_and_other_groups_cost_no_row():
    on = ("technical", "order_book", "market")
    table = make_features(bars_of(1), Context(), on)
    complete = table[list(required_columns(on))].notna().all(axis=1)
    assert complete.sum() > 300
    assert feature_set(table, on)["technical"] == pytest.approx(complete.mean())
    assert not table.notna().all(axis=1).any()


def test_names_of_groups():
    assert parse_groups("MACRO , options,macro") == ("technical", "options", "macro")
    for text, near in {
        "techincal": "technical",
        "orderbook": "order_book",
        "level": "levels",
    }.items():
        with pytest.raises(SettingsError, match=f"Did you mean {near}"):
            parse_groups(text)
    with pytest.raises(SettingsError, match="must be one of"):
        make_features(bars_of(1), Context(), ("technical", "weather"))
    assert warmup_bars(("technical",)) < warmup_bars(("regime",)) <= warmup_bars(GROUPS)


# --- the calendar of expiries

THURSDAYS = {  # that were holidays, and the expiry that came before them; those of 2014 and 2018 as
    "2014-02-27": "2014-02-26",  # reported in swapniljariwala/nsepy, issue 84
    "2014-04-24": "2014-04-23",
    "2018-03-29": "2018-03-28",
    "2023-01-26": "2023-01-25",
    "2023-03-30": "2023-03-29",
    "2023-06-29": "2023-06-28",
}


def test_expiries_are_the_last_thursdays_and_then_the_last_tuesdays():
    found = monthly_expiries()
    assert {f"{t:%Y-%m-%d}" for t in found} >= set(THURSDAYS.values())
    assert not {f"{t:%Y-%m-%d}" for t in found} & set(THURSDAYS)
    assert all(is_session(t) for t in found)
    months = found.tz_localize(None).to_period("M")
    assert (
        months.is_unique and (months[1:].astype("int64") - months[:-1].astype("int64") == 1).all()
    )
    late = found[found >= pd.Timestamp("2025-09-01", tz=IST)]
    assert [f"{t:%m-%d}" for t in late[:7]] == [
        "09-30",
        "10-28",
        "11-25",
        "12-30",
        "01-27",
        "02-24",
        "03-30",
    ]


def test_days_to_expiry_count_down_one_a_session():
    left = pd.Series(days_to_expiry(DAYS), DAYS)
    step = left.diff().dropna()
    assert set(step[step < 0]) == {-1.0}
    assert (left[monthly_expiries().intersection(DAYS)] == 0).all()
    fives = DAYS[:3].repeat(2) + pd.to_timedelta([555, 925] * 3, unit="min")
    assert days_to_expiry(fives).tolist() == left.iloc[:3].repeat(2).tolist()


def test_age_is_capped_and_never_made_up():
    table = regime(bars_of(1), listed_on=date(2022, 6, 10))
    age = table["post_ipo_days"]
    assert age[: pd.Timestamp("2022-06-09", tz=IST)].isna().all() and age.max() <= POST_IPO_CAP
    assert age[pd.Timestamp("2022-06-10", tz=IST)] == 0


# --- the market


def test_a_level_of_the_universe_forgets_nobody_and_foresees_nobody():
    closes = {str(k): bars_of(k)["close"] for k in range(4)}
    closes["new"] = bars_of(7)["close"].iloc[200:]
    closes["gaps"] = bars_of(8)["close"].drop(DAYS[50:60])
    level = equal_weight(closes)
    early = equal_weight(
        {s: c.iloc[: c.index.searchsorted(DAYS[150])] for s, c in closes.items() if s != "new"}
    )
    pd.testing.assert_series_equal(level[: DAYS[149]], early)
    returns = pd.concat([c.pct_change(fill_method=None) for c in closes.values()], axis=1)
    wanted = returns.mean(axis=1).iloc[1:]
    np.testing.assert_allclose(level.pct_change().iloc[1:], wanted, atol=1e-12)


def test_prices_of_another_size_change_nothing():
    bars, index = bars_of(1), bars_of(2)["close"]
    paise = bars.assign(**{c: bars[c] * 100 for c in ("open", "high", "low", "close")})
    for function in (lambda b, k: market(b, index * k), lambda b, _: regime(b)):
        a, b = function(bars, 1.0), function(paise, 7.0)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_a_special_session_that_the_index_lacks_is_nan_and_costs_no_later_row():
    bars, index = bars_of(1), bars_of(2)["close"].drop(DAYS[300])
    table = market(bars, index)
    assert table.iloc[300].isna().all()
    assert table.iloc[301:].notna().all(axis=None)


def test_daily_bars_against_an_index_of_five_minutes_take_its_last_close():
    days = DAYS[:80]
    fives = days.repeat(2) + pd.to_timedelta([560, 925] * len(days), unit="min")
    close = pd.Series(random_bars(len(fives), 3)["close"].to_numpy(), fives)
    bars = bars_of(1).iloc[:80]
    table = market(bars, close)
    wanted = market(bars, pd.Series(close.to_numpy()[1::2], days))
    pd.testing.assert_frame_equal(table, wanted, check_freq=False)


# --- what is joined


def test_an_opinion_that_was_refetched_counts_from_then_on(tmp_path):
    store = SnapshotStore(tmp_path)
    at = datetime(2024, 1, 2, 12, tzinfo=IST)
    said = (date(2024, 1, 2), at, 0.5, 0.5, 2, "rss", ("rss",), ("rss",), False)
    first = Snapshot("X", *said)
    later = replace(first, value=-0.5, available_at=at + timedelta(hours=13))
    silent = replace(later, date=date(2024, 1, 3), value=None, items=0)
    write_snapshots(store, [first, later, silent])
    table = snapshot_table(store, "X", date(2024, 1, 31))
    assert len(table) == 3 and table["value"].isna().sum() == 1
    days = sessions("2024-01-01", "2024-01-04")
    found = sentiment_columns(days, table)["sentiment_value"]
    assert found.fillna(9).tolist() == [9, 0.5, -0.5, -0.5]
    assert snapshot_table(store, "X", date(2024, 1, 2)).shape[0] == 2


def test_books_after_the_close_are_never_seen(tmp_path):
    keep_books(tmp_path, "X", DAYS[-3:])
    books = BookStore(tmp_path / "data" / "books").read("X", date(2024, 1, 1), date(2024, 12, 31))
    late = books.set_axis(books.index + pd.Timedelta(minutes=10))  # at 15:30
    assert book_columns(DAYS[-3:], books)["book_spread_bps"].notna().all()
    assert book_columns(DAYS[-3:], late).isna().all(axis=None)


def table_of(tmp_path, text, prefix="macro", name="table.csv", **zone):
    path = tmp_path / name
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return read_user_table(path, prefix, **zone)


def test_tables_as_users_write_them(tmp_path):
    rows = '20240102,"-1.5e3",2024-01-01\n\n2023-12-29T18:30:00Z,,20231229\n'
    text = f'\ufeff Available_At ,"FII net, crore", Date\n{rows}'
    table = table_of(tmp_path, text, name="table.csv.gz")
    assert list(table) == ["available_at", "macro_fii_net_crore"]
    assert [f"{t:%Y-%m-%d %H:%M}" for t in table["available_at"]] == [
        "2023-12-30 00:00",
        "2024-01-03 00:00",
    ]
    assert table["macro_fii_net_crore"].fillna(0).tolist() == [0, -1500]
    utc = table_of(
        tmp_path, "available_at,x\n2024-01-02 10:00,1\n2024-01-03T10:00:00+05:30,2", zone="UTC"
    )
    assert [f"{t:%H:%M}" for t in utc["available_at"]] == ["15:30", "10:00"]
    ahead = table_of(tmp_path, "available_at,x\n2031-01-01,1\n2024-01-02 10:00,2")
    assert user_columns(DAYS, ahead)["macro_x"].dropna().unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("text", "prefix", "words"),
    [
        ("date,x\n2024-01-01,1", "macro", "columns available_at must be there"),
        ("available_at,x\nsoon,1", "macro", "line 2, column available_at"),
        ("available_at,x\n,1", "macro", "line 2, column available_at"),
        ("available_at,x\n2024-01-01,1\n2024-01-02,n/a", "macro", "must hold numbers; found 'n/a'"),
        ("available_at,x\n2024-01-01,inf", "macro", "must hold numbers; found 'inf'"),
        ("available_at,x\n2024-01-01,1e999", "macro", "must hold numbers; found '1e999'"),
        ("available_at,date,x\n2024-01-01,2024-01-09,1", "macro", "must not lie before its date"),
        ("available_at,date,x\n2024-01-01,yesterday,1", "macro", "a date must read as"),
        ("available_at,x\n2024-01-01,1\n2024-01-01,2", "macro", "lines 2 and 3"),
        ("available_at,x\n2024-01-02,1\n2024-01-03 00:00,2", "macro", "lines 2 and 3"),
        ("available_at,symbol,x\n2024-01-01,TCS,1", "macro", "column symbol"),
        ("available_at,x\n2024-01-01,1", "options", "columns symbol must be there"),
        ("available_at,symbol,x\n2024-01-01,,1", "options", "must name its symbol"),
        ("available_at,symbol\n2024-01-01,TCS", "options", "needs rows and a column of numbers"),
        ("available_at,x", "macro", "needs rows and a column of numbers"),
        ("available_at,x,X\n2024-01-01,1,2", "macro", "a name of its own"),
        ("available_at,a b,a-b\n2024-01-01,1,2", "macro", "a name of its own"),
        ("available_at,\n2024-01-01,1", "macro", "a name of its own"),
        ("available_at,x\n2024-01-01,1,5", "macro", "must have 2 cells"),
        ('available_at,x\n2024-01-01,"1', "macro", "must be CSV"),
        ("", "macro", "an empty file"),
    ],
)
def test_tables_that_cannot_be_trusted(tmp_path, text, prefix, words):
    with pytest.raises(DataError, match=words):
        table_of(tmp_path, text, prefix)


def test_a_table_that_is_not_there_and_a_zone_that_is_none(tmp_path):
    with pytest.raises(DataError, match="must be readable"):
        read_user_table(tmp_path / "none.csv", "macro")
    with pytest.raises(DataError, match="IANA name"):
        table_of(tmp_path, "available_at,x\n2024-01-02 10:00,1", zone="Mumbai")


def test_a_value_stays_until_its_moment_comes_exactly(tmp_path):
    table = table_of(tmp_path, "available_at,x\n2024-01-02 15:30,1\n2024-01-03 15:30:00.000001,2")
    found = user_columns(sessions("2024-01-01", "2024-01-04"), table)["macro_x"]
    assert found.fillna(0).tolist() == [0, 1, 1, 2]


def test_symbols_never_mix(tmp_path):
    text = "symbol,available_at,iv\ntcs,2024-01-01,1\nINFY,2024-01-02,2\ntcs,2024-01-03,3"
    table = table_of(tmp_path, text, "options")
    days = sessions("2024-01-01", "2024-01-08")
    assert user_columns(days, table, symbol="TCS")["options_iv"].dropna().unique().tolist() == [
        1,
        3,
    ]
    assert user_columns(days, table, symbol="INFY")["options_iv"].dropna().unique().tolist() == [2]
    with pytest.raises(DataError, match="options of one symbol"):
        make_features(bars_of(1), Context(options=table), ("options",))
