"From feeds into the store: many symbols, several processes, real folders."

import json
import pickle
from datetime import date
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sensequant.core.errors import DataError
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore, hash_bars
from sensequant.data.coverage import Span, coverage_table
from sensequant.data.feeds import CsvFeed, SimulatedFeed, make_feed
from sensequant.data.ingest import ingest, read_range
from sensequant.market.simulator import MarketSpec, simulate

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real bars in {DATA}")
DAY = Interval.DAY
HEAD = "date,o,h,l,c,v\n"
FIRST, LAST = date(2024, 1, 1), date(2024, 6, 28)
SPEC = MarketSpec(symbols=6, start=FIRST, end=LAST, late_listing_frac=0.4, missing_day_frac=0.05)


def files_of(store: BarStore) -> dict[str, pa.Table]:
    "What every bar file of a store holds, by its place; when it was fetched is left aside."
    paths = sorted(store.root.rglob("*.parquet"))
    tables = {p.relative_to(store.root).as_posix(): pq.read_table(p) for p in paths}
    return {name: table.replace_schema_metadata() for name, table in tables.items()}


def test_workers_do_not_change_the_result(tmp_path):
    feed = SimulatedFeed(SPEC)
    stores = [BarStore(tmp_path / str(n)) for n in (1, 2)]
    results = [
        ingest(feed, s, feed.symbols(), DAY, FIRST, LAST, n) for n, s in enumerate(stores, 1)
    ]
    assert results[0].results == results[1].results
    assert files_of(stores[0]) == files_of(stores[1]) != {}


def test_simulated_market_is_told_as_it_was_made(tmp_path):
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path)
    result = ingest(feed, store, feed.symbols(), DAY, FIRST, LAST)
    market = simulate(SPEC)
    for covered in result.coverages:
        lost = sum(gap.sessions for gap in covered.missing)
        assert lost == len(market.missing_days(covered.symbol))
        assert covered.listed_on == market.listed_on(covered.symbol)
        assert covered.sha256 == hash_bars(market.bars(covered.symbol))
    assert any(c.listed_on for c in result.coverages) and any(c.missing for c in result.coverages)
    bars = read_range(store, feed.name, feed.symbols(), result.span)
    assert {s: hash_bars(b) for s, b in bars.items()} == {
        r.symbol: r.sha256 for r in result.results
    }


@pytest.mark.parametrize("interval", ["1minute", "5minute", "15minute", "30minute"])
def test_intraday_intervals(tmp_path, interval):
    feed = SimulatedFeed(MarketSpec(symbols=2, start=FIRST, end=date(2024, 1, 12)))
    span = Interval(interval), FIRST, date(2024, 1, 12)
    result = ingest(feed, BarStore(tmp_path), ["SIM001"], *span)
    covered = result.coverages[0]
    assert covered.rows == covered.sessions_held * Interval(interval).bars_a_session
    assert covered.short_sessions == 0


def flawed_rows(good: int, bad: int) -> str:
    "A file with so many good rows, then so many with text for a price."
    start = pd.Timestamp("2024-01-01 09:15")
    times = [
        (start + pd.Timedelta(days=i // 75, minutes=5 * (i % 75))).isoformat()
        for i in range(good + bad)
    ]
    rows = [f"{t},100,102,99,{101 if i < good else 'x'},5" for i, t in enumerate(times)]
    return "\n".join(["time,o,h,l,c,v", *rows])


@pytest.mark.parametrize(("bad", "status"), [(0, "success"), (3, "success"), (4, "failed")])
def test_one_row_in_a_hundred_is_the_limit(tmp_path, bad, status):
    (tmp_path / "TCS.csv").write_text(flawed_rows(300 - bad, bad))
    store, span = BarStore(tmp_path / "bars"), (Interval.MINUTE_5, FIRST, date(2024, 1, 4))
    result = ingest(CsvFeed(tmp_path), store, ["TCS"], *span)
    assert result.results[0].status == status
    assert ("4 not_a_number" in result.results[0].reason) == (status == "failed")
    lax = ingest(CsvFeed(tmp_path), store, ["TCS"], *span, max_rejected_frac=0.02)
    assert lax.having("success") == ["TCS"]


def test_a_refused_symbol_keeps_its_old_bars(tmp_path):
    store, feed, path = BarStore(tmp_path / "bars"), CsvFeed(tmp_path), tmp_path / "TCS.csv"
    path.write_text(HEAD + "2024-01-01,100,102,99,101,5\n2024-01-02,101,102,99,100,7\n")
    ingest(feed, store, ["TCS"], DAY, FIRST, LAST)
    before = files_of(store)
    for text in ("", HEAD, "date,o\n1,2\n", HEAD + "2024-01-01,100,102,99,x,5\n", "\0"):
        path.write_text(text)
        result = ingest(feed, store, ["TCS"], DAY, FIRST, LAST)
        assert result.having("failed") == ["TCS"] and "TCS.csv" in result.results[0].reason
        assert files_of(store) == before
    path.write_text(HEAD + "2023-01-02,100,102,99,101,5\n")
    result = ingest(feed, store, ["TCS"], DAY, FIRST, LAST)
    assert result.having("skipped") == ["TCS"] and files_of(store) == before


def test_a_later_fetch_extends_what_is_held(tmp_path):
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path / "a")
    ingest(feed, store, feed.symbols(), DAY, FIRST, date(2024, 3, 31))
    ingest(feed, store, feed.symbols(), DAY, date(2024, 3, 1), LAST)
    once = BarStore(tmp_path / "b")
    ingest(feed, once, feed.symbols(), DAY, FIRST, LAST)
    assert files_of(store) == files_of(once)


def test_a_damaged_store_file_is_kept_and_named(tmp_path):
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path)
    ingest(feed, store, ["SIM001", "SIM002"], DAY, FIRST, LAST)
    path = store.path(feed.name, "SIM001", DAY)
    path.write_bytes(path.read_bytes()[:300])
    held = ingest(feed, store, ["SIM001", "SIM002"], DAY, FIRST, LAST, skip_fetch=True)
    assert held.having("failed") == ["SIM001"] and str(path) in held.results[0].reason
    again = ingest(feed, store, ["SIM001", "SIM002"], DAY, FIRST, LAST)
    assert again.having("success") == ["SIM001", "SIM002"]
    assert "damaged store file was kept as SIM001.parquet.damaged-" in again.results[0].notes[0]


def test_what_the_store_lacks_is_reported(tmp_path):
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path)
    ingest(feed, store, ["SIM001"], DAY, FIRST, date(2024, 3, 31))
    before = files_of(store)
    held = ingest(feed, store, ["SIM001", "SIM002"], DAY, FIRST, LAST, skip_fetch=True)
    assert (held.having("success"), held.having("failed")) == (["SIM001"], ["SIM002"])
    last = held.coverages[0].missing[-1]
    assert last.last == LAST and last.sessions > 50
    assert files_of(store) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_that_cannot_be_written_is_no_fault_of_the_symbols(tmp_path, workers):
    "A disk that fills half way must not leave a smaller market to be judged."
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path)
    blocked = store.path(feed.name, "SIM002", DAY)
    blocked.mkdir(parents=True)
    with pytest.raises(DataError, match=r"1 of 6 not stored: .* for SIM002\.parquet"):
        ingest(feed, store, feed.symbols(), DAY, FIRST, LAST, workers)
    blocked.rmdir()
    assert ingest(feed, store, feed.symbols(), DAY, FIRST, LAST).having("success")


def test_refusals_before_any_work(tmp_path):
    feed, store = SimulatedFeed(SPEC), BarStore(tmp_path)
    for days, message in (
        ((LAST, FIRST), "start must not lie after end"),
        ((date(2024, 1, 6), date(2024, 1, 7)), "must hold a session"),
    ):
        with pytest.raises(DataError, match=message):
            ingest(feed, store, ["SIM001"], DAY, *days)
    with pytest.raises(DataError, match="at least one symbol"):
        ingest(feed, store, [], DAY, FIRST, LAST)
    missing = CsvFeed(tmp_path / "nowhere")
    result = ingest(missing, store, ["TCS"], DAY, FIRST, LAST)
    assert "the folder must be there and readable" in result.results[0].reason


def test_feeds_travel(tmp_path):
    for feed in (CsvFeed(tmp_path), SimulatedFeed(SPEC)):
        copy = pickle.loads(pickle.dumps(feed))
        assert (copy.name, copy.simulated) == (feed.name, feed.simulated)
        assert len(pickle.dumps(feed)) < 2_000


@needs_data
def test_all_of_nse_daily(tmp_path):
    "Eighty symbols, defects included, twice: with one worker and with two."
    feed = make_feed("csv", DATA / "nse_daily")
    span = DAY, date(2020, 1, 1), date(2026, 4, 24)
    stores = [BarStore(tmp_path / str(n)) for n in (1, 2)]
    done = [ingest(feed, s, feed.symbols(), *span, n) for n, s in enumerate(stores, 1)]
    assert done[0].results == done[1].results and files_of(stores[0]) == files_of(stores[1])
    assert len(done[0].having("success")) == 80
    report = done[0].report()
    text = json.dumps(report, sort_keys=True)
    assert str(tmp_path) not in text and str(DATA) not in text and feed.name not in text
    totals = report["totals"]
    assert (totals["rows"], totals["rows_read"]) == (112_502, 112_661)
    assert totals["rejected"] == {"no_trade": 88, "not_a_session": 71}
    table = coverage_table(done[0].coverages)
    assert len(table) == 12 and table["missing %"].is_monotonic_decreasing
    jumps = report["symbols"]["MOTHERSON"]["large_moves"]
    assert [m["fraction"] for m in jumps if m["ts"].startswith("2022-01-14")] == [0.285503]
    held = ingest(feed, stores[0], feed.symbols(), *span, skip_fetch=True)
    assert [r.sha256 for r in held.results] == [r.sha256 for r in done[0].results]


@needs_data
def test_two_vendors_never_meet(tmp_path):
    store, feeds = (
        BarStore(tmp_path),
        [CsvFeed(DATA / d) for d in ("nse_daily", "nse_daily_upstox")],
    )
    span = Span(DAY, date(2025, 3, 1), date(2025, 3, 31))
    for feed in feeds:
        ingest(
            feed, store, ["RELIANCE"], span.interval, span.start, span.end, max_rejected_frac=0.1
        )
    ours, theirs = (read_range(store, f.name, ["RELIANCE"], span)["RELIANCE"] for f in feeds)
    assert len(theirs) == len(ours) + 1, "only the second vendor has 2025-03-18"


@needs_data
@pytest.mark.parametrize("interval", ["5minute", "15minute"])
def test_real_intraday(tmp_path, interval):
    feed = CsvFeed(DATA / "nse_intraday_5m_yahoo")
    span = Interval(interval), date(2026, 5, 20), date(2026, 6, 19)
    result = ingest(feed, BarStore(tmp_path), ["HDFCBANK", "M&M"], *span)
    for covered in result.coverages:
        assert (covered.sessions_held, covered.missing, covered.short_sessions) == (22, (), 0)
        assert covered.rows == 22 * Interval(interval).bars_a_session
