"""Fetching through the real client from the sandbox: kills, faults, two at once, late bars."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from sensequant.core.errors import BrokerError
from sensequant.core.events import write_refusal
from sensequant.core.settings import load_settings
from sensequant.core.state import State
from sensequant.core.types import IST, Fetched, Interval
from sensequant.data import bars as bars_module
from sensequant.data.bars import BarStore, resample_bars
from sensequant.data.coverage import Span
from sensequant.data.feeds import HybridFeed, breeze_feed, make_feed
from sensequant.data.ingest import FetchPlan, fill, incremental_span, ingest, remember
from sensequant.live.sandbox import Sandbox, SandboxSpec
from sensequant.live.sandbox_faults import Planned
from sensequant.market.bar_rules import judge_frame
from sensequant.market.calendar import session_hours, sessions
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops.data_cli import _forgiven

MARKET = MarketSpec(symbols=3, start=date(2024, 1, 1), end=date(2024, 6, 28))
HALF_YEAR = (MARKET.start, MARKET.end)
DAY, FIVE = Interval.DAY, Interval.MINUTE_5
V2 = "v2/historicalcharts"
CLI = [sys.executable, "-c", "from sensequant.ops.data_cli import data; data()"]
LIMITS = {"breeze_calls_per_minute": 60_000, "breeze_calls_per_day": 3_000_000}
QUICK = {"breeze_backoff_s": 0.01, "breeze_timeout_s": 2.0}


@pytest.fixture
def broker():
    "A sandbox that allows six hundred times what Breeze does."
    with Sandbox(SandboxSpec(MARKET, scale=600)) as sandbox:
        yield sandbox


def keys_of(sandbox):
    "The settings that lead to a sandbox."
    names = ("breeze_api_key", "breeze_api_secret", "breeze_session_token")
    keys = dict(zip(names, map(str, sandbox.credentials), strict=True))
    return {"breeze_url": sandbox.url} | keys | LIMITS | QUICK


def feed_of(sandbox, home, **more):
    "A feed with a budget and a table of codes of its own."
    return breeze_feed(load_settings(home=home, **keys_of(sandbox) | more))


def environment(sandbox, home, **more):
    "The same for a process."
    given = {"home": home} | keys_of(sandbox) | more
    return os.environ | {f"SENSEQUANT_{k.upper()}": str(v) for k, v in given.items()}


def command(sandbox, home, *words, **more):
    "Run `sensequant data` to its end."
    env = environment(sandbox, home, **more)
    return subprocess.run([*CLI, *words], env=env, capture_output=True, text=True, timeout=300)


def store_of(home):
    "The bar store of a home."
    return BarStore(home / "data" / "bars")


def asked(sandbox):
    "The requests for history so far, by what they asked for."
    names = ("stock_code", "interval", "from_date", "to_date")
    return [tuple(r.params.get(n) for n in names) for r in sandbox.log if r.endpoint == V2]


def assert_truth(store, source, interval, symbols=("SIM001", "SIM002", "SIM003"), span=HALF_YEAR):
    "The store holds what was traded, row for row."
    market = simulate(MARKET)
    for symbol in symbols:
        true = market.bars(symbol, interval, *span)
        pd.testing.assert_frame_equal(
            store.read(source, symbol, interval, *span), true, check_freq=False
        )


def wanted(interval, *symbols, span=HALF_YEAR):
    "A half year of each symbol."
    return {s: Span(interval, *span) for s in symbols or ("SIM001", "SIM002", "SIM003")}


# -------------------------------------------------------------------------- what is asked, and how


def test_a_year_of_days_is_one_request_and_is_never_asked_for_again(tmp_path):
    year = MarketSpec(symbols=1, start=date(2024, 1, 1), end=date(2024, 12, 31))
    with Sandbox(SandboxSpec(year, scale=600)) as broker:
        feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
        span = (year.start, year.end)
        first = ingest(feed, store, ["SIM001"], DAY, *span)
        assert len(asked(broker)) <= 2
        before = len(broker.log)
        again = ingest(feed_of(broker, tmp_path), store, ["SIM001"], DAY, *span)
        assert again.report() == first.report()
        assert len(broker.log) == before, "a full store needs no login either"


@pytest.mark.parametrize("workers", [1, 3])
def test_five_minutes_come_in_chunks_and_are_the_truth(broker, tmp_path, workers):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    filled = fill(feed, store, wanted(FIVE), workers=workers)
    assert filled.failed == [] and filled.count("fetched") == len(asked(broker))
    assert_truth(store, feed.name, FIVE)
    again = fill(feed, store, wanted(FIVE), workers=workers).summary()
    assert (again["requests"], again["cache_hit_rate"], again["new_chunks"]) == (0, 1.0, 0)


def test_only_what_is_missing_is_asked_for(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(DAY, "SIM001", span=(date(2024, 2, 1), date(2024, 2, 29))))
    fill(feed, store, wanted(DAY, "SIM001"))
    days = [(a[:10], b[:10]) for _, _, a, b in asked(broker)]
    assert days == [
        ("2024-02-01", "2024-02-29"),
        ("2024-01-01", "2024-01-31"),
        ("2024-03-01", "2024-06-28"),
    ]
    assert_truth(store, feed.name, DAY, ["SIM001"])


def test_an_index_is_fetched_and_stored_like_any_symbol(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    result = ingest(feed, store, ["NIFTY50", "SIM001"], DAY, *HALF_YEAR)
    assert result.having("success") == ["NIFTY50", "SIM001"]
    days = store.read(feed.name, "NIFTY50", DAY).index
    assert list(days) == list(sessions(*HALF_YEAR)) and "NIFTY50" not in feed.symbols()


def test_quarter_hours_are_made_of_five_minutes(broker, tmp_path):
    feed, store, span = feed_of(broker, tmp_path), store_of(tmp_path), HALF_YEAR
    made = ingest(feed, store, ["SIM001"], Interval.MINUTE_15, *span)
    assert {a[1] for a in asked(broker)} == {"5minute"}
    true = resample_bars(simulate(MARKET).bars("SIM001", FIVE, *span), Interval.MINUTE_15)
    held = store.read(feed.name, "SIM001", Interval.MINUTE_15)
    pd.testing.assert_frame_equal(held, true, check_freq=False)
    before = len(asked(broker))
    again = ingest(feed, store, ["SIM001"], Interval.MINUTE_15, *span)
    assert again.report() == made.report() and len(asked(broker)) == before


def test_a_run_sees_the_same_market_through_the_broker(broker, tmp_path):
    local = make_feed("simulated", spec=MARKET)
    direct = ingest(local, BarStore(tmp_path / "direct"), local.symbols(), DAY, *HALF_YEAR)
    feed = feed_of(broker, tmp_path)
    assert feed.symbols() == local.symbols() and feed.simulated
    through = ingest(feed, store_of(tmp_path), feed.symbols(), DAY, *HALF_YEAR, workers=2)
    assert [r.sha256 for r in through.results] == [r.sha256 for r in direct.results]


# --------------------------------------------------------------------------- nothing, and too late


def test_what_was_answered_with_nothing_is_remembered_until_force(tmp_path):
    spec = SandboxSpec(MARKET, scale=600, intraday_from=date(2024, 3, 11))
    with Sandbox(spec) as broker:
        feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
        first = fill(feed, store, wanted(FIVE, "SIM001"))
        assert first.count("empty") == 3 and first.failed == []
        assert store.missing(feed.name, "SIM001", FIVE, *HALF_YEAR) == []
        before = len(asked(broker))
        assert fill(feed, store, wanted(FIVE, "SIM001")).requests == 0
        forced = fill(feed, store, wanted(FIVE, "SIM001"), FetchPlan(force=True))
        assert forced.count("empty", "fetched") == first.count("empty", "fetched")
        assert len(asked(broker)) > before and forced.failed == []


def test_nothing_among_bars_is_doubted_once_on_another_day(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    days = [FetchPlan(now=datetime(2026, 3, n, 17, tzinfo=IST)) for n in (2, 3, 4, 5)]
    broker.schedule(Planned("empty_success", V2, nth=3, count=2))
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[0]).count("empty") == 1
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[0]).requests == 0, "not on the same day"
    broker.schedule(Planned("empty_success", V2, count=2))
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[1]).count("empty") == 1
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[2]).requests == 0, "believed now"
    other = BarStore(tmp_path / "other")
    broker.schedule(Planned("empty_success", V2, nth=3, count=2))
    fill(feed, other, wanted(FIVE, "SIM001"), days[0])
    assert fill(feed, other, wanted(FIVE, "SIM001"), days[1]).count("fetched") == 1
    assert_truth(other, feed.name, FIVE, ["SIM001"])


def test_forcing_never_erases_what_a_broker_has_forgotten(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(DAY, "SIM001"))
    broker.schedule(Planned("empty_success", V2, count=9))
    forced = fill(feed, store, wanted(DAY, "SIM001"), FetchPlan(force=True))
    assert forced.failed == ["SIM001"] and "must not erase" in forced.symbols[0].reason()
    assert_truth(store, feed.name, DAY, ["SIM001"])


def test_late_bars_are_asked_for_again_and_old_gaps_are_not(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    now = datetime(2024, 6, 12, 17, tzinfo=IST)
    plan, span = FetchPlan(now=now), (date(2024, 6, 3), date(2024, 6, 30))
    broker.show_until(date(2024, 6, 10))
    first = fill(feed, store, wanted(DAY, "SIM001", span=span), plan)
    assert [n.kind for n in first.symbols[0].notices] == ["open_session", "late"]
    late = [(date(2024, 6, 11), date(2024, 6, 12))]
    assert store.missing(feed.name, "SIM001", DAY, span[0], now.date()) == late
    broker.show_until(date(2024, 6, 28))
    fill(feed, store, wanted(DAY, "SIM001", span=span), plan)
    assert store.missing(feed.name, "SIM001", DAY, span[0], now.date()) == []
    asked_days = [(a[:10], b[:10]) for _, _, a, b in asked(broker)]
    assert asked_days[0] == ("2024-06-03", "2024-06-12")
    assert asked_days[-1] == ("2024-06-11", "2024-06-12")


def test_a_session_that_is_not_over_is_never_stored_as_held(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    noon = FetchPlan(now=datetime(2024, 6, 12, 12, tzinfo=IST))
    fill(feed, store, wanted(FIVE, "SIM001", span=(date(2024, 6, 10), date(2024, 6, 12))), noon)
    assert store.ranges(feed.name, "SIM001", FIVE)[-1].last == date(2024, 6, 11)
    assert all(b[:10] < "2024-06-12" for _, _, _, b in asked(broker))


def test_incremental_goes_on_after_the_last_session_held(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(DAY, "SIM001", span=(date(2024, 2, 1), date(2024, 3, 28))))
    ask = Span(DAY, date(2024, 5, 1), date(2024, 5, 31))
    span = incremental_span(store, feed.name, "SIM001", ask, 30)
    assert (span.start, span.end) == (date(2024, 3, 29), ask.end)
    assert incremental_span(store, feed.name, "SIM002", ask, 30) == ask
    fill(feed, store, {"SIM001": span})
    assert asked(broker)[-1][2:] == ("2024-04-01T00:00:00.000Z", "2024-05-31T23:59:59.000Z")
    following = Span(DAY, date(2024, 5, 1), date(2024, 6, 2))
    assert fill(feed, store, {"SIM001": following}).requests == 0, "1 and 2 June were a week-end"


# ---------------------------------------------------------------------------------------- failures


def test_a_failing_chunk_fails_only_itself(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    broker.schedule(Planned("html_502", V2, nth=4, count=3))
    filled = fill(feed, store, wanted(FIVE))
    assert filled.failed == ["SIM001"] and filled.count("failed") == 1
    (lost,) = filled.symbols[0].failed
    assert type(lost.error).__name__ == "ServerError"
    gap = [(lost.chunk.first, lost.chunk.last)]
    assert store.missing(feed.name, "SIM001", FIVE, *HALF_YEAR) == gap
    assert_truth(store, feed.name, FIVE, ["SIM002", "SIM003"])
    again = fill(feed, store, wanted(FIVE))
    assert again.count("fetched") == 1 and again.failed == []
    assert_truth(store, feed.name, FIVE)


@pytest.mark.parametrize(
    "fault", ["truncated", "rows_unordered", "rows_duplicated", "rows_outside", "drop_midway"]
)
def test_a_spoilt_answer_leaves_the_truth_in_the_store(broker, tmp_path, fault):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    broker.schedule(Planned(fault, V2, nth=2))
    assert fill(feed, store, wanted(FIVE, "SIM001")).failed == []
    assert_truth(store, feed.name, FIVE, ["SIM001"])


@pytest.mark.parametrize("fault", ["expired", "wrong_key", "static_ip", "throttled_day"])
def test_what_holds_for_all_is_asked_once(broker, tmp_path, fault):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    broker.schedule(Planned(fault, V2, count=99))
    filled = fill(feed, store, wanted(FIVE))
    assert filled.failed == ["SIM001", "SIM002", "SIM003"] and len(asked(broker)) == 1
    assert all(isinstance(r.error, BrokerError) for s in filled.symbols for r in s.failed)


def test_a_service_that_is_gone_is_soon_left_alone(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    feed.client.connect()
    feed.codes()
    broker.stop()
    begun = time.monotonic()
    filled = fill(feed, store, wanted(FIVE))
    assert filled.requests <= 15 and time.monotonic() - begun < 20
    assert filled.failed == ["SIM001", "SIM002", "SIM003"]


def test_hybrid_gives_what_is_held_and_says_what_is_missing(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(DAY, "SIM001", "SIM002", span=(MARKET.start, date(2024, 3, 28))))
    broker.stop()
    strict = ingest(feed, store, ["SIM001"], DAY, *HALF_YEAR)
    assert strict.having("failed") == ["SIM001"] and "Transport" in strict.results[0].reason
    hybrid = ingest(HybridFeed(feed, store), store, ["SIM001", "SIM002", "SIM003"], DAY, *HALF_YEAR)
    assert hybrid.having("success") == ["SIM001", "SIM002"]
    assert hybrid.having("failed") == ["SIM003"], "nothing is held of it"
    (note,) = hybrid.results[0].notes
    assert note.startswith("fallback: SIM001") and "2024-04-01 to 2024-06-28" in note
    assert hybrid.coverages[0].missing[-1].last == MARKET.end
    assert_truth(store, feed.name, DAY, ["SIM001"], (MARKET.start, date(2024, 3, 28)))
    given = HybridFeed(feed, store).fetch("SIM001", DAY, *HALF_YEAR)
    assert "2024-04-01 to 2024-06-28 is missing: Transport" in given.notes[-1]


def test_hybrid_on_the_command_line_warns_and_succeeds(broker, tmp_path):
    span = ["--start", "2024-01-01", "--end", "2024-03-28", "--symbols", "SIM001"]
    assert command(broker, tmp_path, "fetch", "--source", "hybrid", *span).returncode == 0
    broker.stop()
    longer = [*span[:3], "2024-06-28", *span[4:]]
    warned = command(broker, tmp_path, "fetch", "--source", "hybrid", *longer)
    assert warned.returncode == 0
    assert "warning: fallback: SIM001: what is held is used" in warned.stdout
    strict = command(broker, tmp_path, "fetch", "--source", "breeze", *longer)
    assert strict.returncode == 1 and "Failed         SIM001" in strict.stdout


def test_one_bad_symbol_does_not_stop_the_rest(broker, tmp_path):
    words = ["fetch", "--source", "breeze", "--start", "2024-01-01", "--end", "2024-06-28"]
    done = command(broker, tmp_path, *words, "--symbols", "NOPE,SIM001,SIM002")
    assert done.returncode == 1 and "Failed         NOPE" in done.stdout
    assert "a symbol must have an ISEC code; found NOPE" in done.stdout
    source = feed_of(broker, tmp_path).name
    assert_truth(store_of(tmp_path), source, DAY, ["SIM001", "SIM002"])
    with State(tmp_path / "data" / "state" / "sensequant.db") as state:
        held = {f.symbol: f for f in state.fetches(source)}
    assert (held["SIM001"].last, held["NOPE"].rows) == (MARKET.end, 0)


def test_a_damaged_file_is_named_set_aside_and_fetched_again(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(FIVE, "SIM001", "SIM002"))
    path = store.path(feed.name, "SIM001", FIVE) / "2024.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    before = Counter(a[0] for a in asked(broker))
    filled = fill(feed, store, wanted(FIVE, "SIM001", "SIM002"))
    assert filled.symbols[0].notices[0].kind == "damaged" and filled.failed == []
    after = Counter(a[0] for a in asked(broker))
    assert after["SIMAAB"] == before["SIMAAB"] and after["SIMAAA"] == 2 * before["SIMAAA"]
    assert_truth(store, feed.name, FIVE, ["SIM001", "SIM002"])


def test_the_state_never_says_more_than_the_store(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    broker.schedule(Planned("html_503", V2, nth=2, count=99))
    fill(feed, store, wanted(FIVE, "SIM001"))
    state = State(tmp_path / "state.db")
    remember(state, store, feed.name, "SIM001", FIVE)
    held = store.read(feed.name, "SIM001", FIVE)
    (noted,) = state.fetches(feed.name)
    assert (noted.rows, noted.last) == (len(held), held.index[-1].date())
    assert noted.last < MARKET.end


# ------------------------------------------------------------------------------- kills, and others


FETCH_FIVE = ["fetch", "--source", "breeze", "--interval", "5minute", "--workers", "2"]
FETCH_FIVE += ["--start", "2024-01-01", "--end", "2024-06-28"]


def begin(broker, home, *words, **more):
    "A fetch in a process of its own."
    env = environment(broker, home, **more)
    out = subprocess.DEVNULL
    return subprocess.Popen([*CLI, *words], env=env, stdout=out, stderr=out, process_group=0)


def kill_after(process, broker, requests, patience_s=60):
    "Kill a process without a warning once so many more requests for history have been seen."
    until, goal = time.monotonic() + patience_s, len(asked(broker)) + requests
    while process.poll() is None and len(asked(broker)) < goal and time.monotonic() < until:
        time.sleep(0.005)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def held_days(store, source, interval):
    "Days of ranges held, by the code that the sandbox has for each symbol."
    codes = {"SIM001": "SIMAAA", "SIM002": "SIMAAB", "SIM003": "SIMAAC"}
    return {c: store.ranges(source, s, interval) for s, c in codes.items()}


@pytest.mark.slow
def test_killed_at_any_moment_nothing_stored_is_asked_for_again(broker, tmp_path):
    source, store = feed_of(broker, tmp_path).name, store_of(tmp_path)
    killed = 0
    for requests in (1, 4, 9):
        before, held = len(asked(broker)), held_days(store, source, FIVE)
        killed += kill_after(begin(broker, tmp_path, *FETCH_FIVE), broker, requests)
        for code, _, first, last in asked(broker)[before:]:
            days = date.fromisoformat(first[:10]), date.fromisoformat(last[:10])
            assert not any(r.first <= days[1] and days[0] <= r.last for r in held[code])
    assert killed == 3
    done = command(broker, tmp_path, *FETCH_FIVE)
    assert done.returncode == 0, done.stdout
    assert_truth(store, source, FIVE)
    times = Counter(asked(broker))
    assert sum(n - 1 for n in times.values()) <= 2 * killed, "only what was under way when it died"
    assert not list(store.root.rglob("*.damaged-*"))
    idle = len(broker.log)
    assert command(broker, tmp_path, *FETCH_FIVE).returncode == 0
    assert len(asked(broker)) == len([r for r in broker.log[:idle] if r.endpoint == V2])


def test_ctrl_c_keeps_what_came_and_says_so(broker, tmp_path):
    broker.schedule(Planned("hang", V2, nth=6, count=9))
    env, pipe = environment(broker, tmp_path, breeze_timeout_s=60), subprocess.PIPE
    process = subprocess.Popen([*CLI, *FETCH_FIVE], env=env, stdout=pipe, text=True)
    until = time.monotonic() + 60
    while len(asked(broker)) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Interrupted: what came is kept" in told
    assert store_of(tmp_path).ranges(feed_of(broker, tmp_path).name, "SIM001", FIVE)


@pytest.mark.slow
def test_two_fetches_of_the_same_symbols_do_not_ask_twice(broker, tmp_path):
    both = [begin(broker, tmp_path, *FETCH_FIVE) for _ in range(2)]
    assert [p.wait(120) for p in both] == [0, 0]
    source = feed_of(broker, tmp_path).name
    assert_truth(store_of(tmp_path), source, FIVE)
    assert max(Counter(asked(broker)).values()) == 1


FAULTS = {
    "html_502": 0.03,
    "html_429": 0.02,
    "empty_body": 0.02,
    "asp_net": 0.02,
    "truncated": 0.03,
    "drop": 0.03,
    "drop_after": 0.02,
    "drop_midway": 0.02,
    "throttled": 0.02,
    "throttled_401": 0.02,
    "invalid_user": 0.02,
    "empty_success": 0.03,
    "rows_unordered": 0.03,
    "rows_duplicated": 0.03,
    "rows_strings": 0.02,
    "rows_high_low": 0.02,
    "rows_nan": 0.02,
    "rows_outside": 0.02,
}


def lost_rows(store, source):
    "Rows that were traded and are not held."
    market, lost = simulate(MARKET), set()
    for symbol in market.symbols:
        true, held = market.bars(symbol, FIVE, *HALF_YEAR), store.read(source, symbol, FIVE)
        lost |= {(symbol, ts) for ts in true.index.difference(held.index)}
    return lost


@pytest.mark.slow
def test_under_random_faults_the_store_ends_as_the_truth(tmp_path):
    with Sandbox(SandboxSpec(MARKET, scale=600, rates=FAULTS, seed=3)) as broker:
        feed, store = feed_of(broker, tmp_path, breeze_tries=4), store_of(tmp_path)
        for _ in range(12):
            filled = fill(feed, store, wanted(FIVE), workers=3)
            for result in (r for s in filled.symbols for r in s.failed):
                assert isinstance(result.error, BrokerError), result.error
            if not filled.failed:
                break
        assert filled.failed == []
        assert sum(r.fault != "" for r in broker.log) > 10, "the faults did happen"
        broker.desk.faults.clear()
        bad = store.quarantined(feed.name)[["symbol", "ts"]].dropna()
        assert lost_rows(store, feed.name) <= set(bad.itertuples(index=False, name=None))
        for symbol, day in {(s, ts.date()) for s, ts in bad.itertuples(index=False)}:
            fill(feed, store, wanted(FIVE, symbol, span=(day, day)), FetchPlan(force=True))
        assert_truth(store, feed.name, FIVE)


def test_the_allowance_is_never_exceeded(tmp_path):
    with Sandbox(SandboxSpec(MARKET, scale=0.2)) as broker:  # 20 a minute, 1,000 a day
        limits = {"breeze_calls_per_minute": 20, "breeze_calls_per_day": 12}
        feed, store = feed_of(broker, tmp_path, **limits), store_of(tmp_path)
        filled = fill(feed, store, wanted(FIVE), workers=4)
        assert {type(r.error).__name__ for s in filled.symbols for r in s.failed} == {"DaySpent"}
        assert 8 <= len(broker.log) <= 12 and not any(r.error for r in broker.log)


# -------------------------------------------------------------------------------- the command line


def test_incremental_on_the_command_line_ends_today(broker, tmp_path):
    words = ["fetch", "--source", "breeze", "--symbols", "SIM001", "--incremental"]
    done = command(broker, tmp_path, *words, "--lookback-days", "20")
    assert done.returncode == 0, done.stderr
    first, last = (date.fromisoformat(t[:10]) for t in asked(broker)[-1][2:])
    assert 0 <= (datetime.now(IST).date() - last).days < 10
    assert timedelta(0) <= last - first <= timedelta(days=20)


def test_discover_keeps_the_codes_and_tells_what_changed(broker, tmp_path):
    first = command(broker, tmp_path, "discover")
    assert first.returncode == 0 and "added              4" in first.stdout
    again = command(broker, tmp_path, "discover")
    assert "added              0" in again.stdout and "missing            0" in again.stdout
    held = (tmp_path / "data" / "state" / "breeze_codes.csv").read_text()
    assert ",SIM001,SIMAAA,INE" in held and ",NIFTY50,NIFTY,," in held


@pytest.mark.slow
def test_backfill_fills_what_coverage_finds_missing(broker, tmp_path):
    span = ["--start", "2024-01-01", "--end", "2024-01-31", "--source", "breeze"]
    words = ["--symbols", "SIM001,SIM002"]
    command(broker, tmp_path, "fetch", *span, *words)
    before = len(asked(broker))
    words = ["--start", "2024-01-01", "--end", "2024-02-15", "--source", "breeze"]
    named = ["--symbols", "SIM001,SIM002", "--intervals", "1day,5minute"]
    done = command(broker, tmp_path, "backfill", *words, *named)
    assert done.returncode == 0, done.stdout
    new = Counter((a[0], a[1]) for a in asked(broker)[before:])
    assert new == {(c, "1day"): 1 for c in ("SIMAAA", "SIMAAB")} | {
        (c, "5minute"): 3 for c in ("SIMAAA", "SIMAAB")
    }
    covered = command(broker, tmp_path, "coverage", *words, "--interval", "5minute")
    assert covered.returncode == 0, covered.stdout
    assert_truth(
        store_of(tmp_path), feed_of(broker, tmp_path).name, FIVE, ["SIM001"],
        (date(2024, 1, 1), date(2024, 2, 15)),
    )  # fmt: skip


def test_without_keys_or_symbols_the_command_says_so(broker, tmp_path):
    span = ["--start", "2024-01-01", "--end", "2024-01-31", "--source", "breeze"]
    env = {k: v for k, v in environment(broker, tmp_path).items() if "BREEZE" not in k}
    keyless = subprocess.run(
        [*CLI, "fetch", *span, "--symbols", "TCS"], env=env, capture_output=True, text=True
    )
    assert keyless.returncode == 2 and "error:" in keyless.stderr
    assert "Traceback" not in keyless.stderr and Path(env["SENSEQUANT_HOME"]) == tmp_path


# ------------------------------------------------------------------- what a store must not lose


def test_forcing_keeps_sessions_that_come_with_fewer_bars(broker, tmp_path):
    feed, store, force = feed_of(broker, tmp_path), store_of(tmp_path), FetchPlan(force=True)
    fill(feed, store, wanted(DAY, "SIM001") | wanted(FIVE, "SIM002"))
    broker.show_until(date(2024, 3, 1))
    short = fill(feed, store, wanted(DAY, "SIM001"), force)
    (kept,) = short.symbols[0].notices
    assert (kept.kind, short.failed) == ("kept", []) and "2024-03-02 to 2024-06-28" in kept.text
    assert_truth(store, feed.name, DAY, ["SIM001"])
    broker.show_until(MARKET.end)
    broker.schedule(Planned("rows_missing", V2, count=99))
    thin = fill(feed, store, wanted(FIVE, "SIM002"), force)
    assert thin.failed == [] and {n.kind for n in thin.symbols[0].notices} == {"kept"}
    assert_truth(store, feed.name, FIVE, ["SIM002"])


def test_an_outage_before_the_first_bar_is_doubted_too(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    days = [FetchPlan(now=datetime(2026, 3, n, 17, tzinfo=IST)) for n in (2, 3)]
    broker.schedule(Planned("empty_success", V2, count=6))
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[0]).count("empty") == 3
    assert fill(feed, store, wanted(FIVE, "SIM001"), days[1]).count("fetched") == 3
    assert_truth(store, feed.name, FIVE, ["SIM001"])


def test_rows_that_came_good_later_do_not_condemn_a_symbol(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    good = ingest(feed, store, ["SIM001"], FIVE, *HALF_YEAR)
    stamps = store.read(feed.name, "SIM001", FIVE).index[:900]
    rows = pd.DataFrame({"row": range(900), "ts": stamps, "reason": "high_below_low"})
    store.quarantine(feed.name, "SIM001", FIVE, rows.assign(column="high", value="1"))
    assert ingest(feed, store, ["SIM001"], FIVE, *HALF_YEAR).report() == good.report()
    assert len(store.quarantined(feed.name)) == 900, "they can still be looked at"


class Unexpected:
    "A service of which one session has rows at hours the calendar does not know."

    name, simulated, remote = "breeze-unexpected", True, True

    def listed_on(self, symbol):
        return None

    def fetch(self, symbol, interval, start, end):
        hours = {day: session_hours(day) for day in sessions(start, end)}
        muhurat = pd.Timestamp("2026-11-08", tz=IST)
        if muhurat in hours:
            hours[muhurat] = muhurat + pd.Timedelta(hours=18), muhurat + pd.Timedelta(hours=19)
        step = {"freq": "5min", "inclusive": "left"}
        ts = [t for first, last in hours.values() for t in pd.date_range(first, last, **step)]
        rows = {"open": 100.0, "high": 101.0, "low": 99.0, "close": 100.5, "volume": 10}
        found = judge_frame(pd.DataFrame({"ts": ts} | rows), interval, "rows")
        return Fetched(found.bars, found.rejected, len(ts), "rows", found.notes, 1)


def test_a_session_at_unknown_hours_does_not_condemn_its_neighbours(tmp_path):
    feed, store, days = Unexpected(), store_of(tmp_path), (date(2026, 11, 2), date(2026, 11, 13))
    plan = FetchPlan(now=datetime(2026, 11, 20, 18, tzinfo=IST))
    filled = fill(feed, store, wanted(FIVE, "TCS", span=days), plan)
    assert [n.kind for n in filled.symbols[0].notices] == ["calendar", "rejected"]
    assert filled.failed == [] and len(store.read(feed.name, "TCS", FIVE)) == 9 * 75
    assert len(store.quarantined(feed.name)) == 12
    alone = fill(feed, store, wanted(FIVE, "INFY", span=(date(2026, 11, 8),) * 2), plan)
    assert alone.failed == ["INFY"], "with nothing else to tell, such an answer is not believed"


def test_what_a_service_remarks_is_told(broker, tmp_path):
    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    broker.schedule(Planned("rows_duplicated", V2))
    filled = fill(feed, store, wanted(DAY, "SIM001"))
    assert [str(n) for n in filled.symbols[0].notices] == ["note: SIM001: 13 rows came twice"]


# ----------------------------------------------------------- stores that are damaged or full


TWO_YEARS = MarketSpec(symbols=2, start=date(2023, 10, 3), end=date(2024, 2, 29))


def test_damage_of_another_year_stops_no_fetch(tmp_path):
    with Sandbox(SandboxSpec(TWO_YEARS, scale=600)) as broker:
        feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
        both = (TWO_YEARS.start, date(2024, 1, 31))
        fill(feed, store, wanted(FIVE, "SIM001", span=both))
        path = store.path(feed.name, "SIM001", FIVE) / "2023.parquet"
        path.write_bytes(path.read_bytes()[:-200])
        words = ["fetch", "--source", "breeze", "--interval", "5minute", "--end", "2024-02-29"]
        words += ["--symbols", "SIM001,SIM002"]
        done = command(broker, tmp_path, *words, "--incremental")
        assert done.returncode == 0, done.stderr
        assert "warning: damaged: SIM001" in done.stdout and store.damaged()
        assert store.missing(feed.name, "SIM001", FIVE, *both)[0][0] == TWO_YEARS.start


def test_a_full_disk_soon_ends_the_asking_and_nothing_forgives_it(broker, tmp_path, monkeypatch):
    def full(files):
        cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise write_refusal(cause, next(iter(files))) from cause

    feed, store = feed_of(broker, tmp_path), store_of(tmp_path)
    fill(feed, store, wanted(FIVE, "SIM001", span=(MARKET.start, date(2024, 1, 31))))
    before = len(asked(broker))
    monkeypatch.setattr(bars_module, "write_together", full)
    filled = fill(HybridFeed(feed, store), store, wanted(FIVE))
    assert len(asked(broker)) - before == 5 and filled.count("unstored") == 28
    assert _forgiven(HybridFeed(feed, store), store, filled) == set()


def test_backfill_mends_damage_and_makes_quarter_hours(broker, tmp_path):
    words = ["--source", "breeze", "--start", "2024-01-01", "--end", "2024-01-31"]
    named = ["--symbols", "SIM001", "--intervals", "15minute"]
    source, store, quarter = feed_of(broker, tmp_path).name, store_of(tmp_path), Interval.MINUTE_15
    done = command(broker, tmp_path, "backfill", *words, *named)
    assert done.returncode == 0, done.stderr
    true = store.read(source, "SIM001", quarter)
    assert len(true) == 25 * len(sessions(date(2024, 1, 1), date(2024, 1, 31)))
    for interval in (FIVE, quarter):
        path = store.path(source, "SIM001", interval) / "2024.parquet"
        path.write_bytes(path.read_bytes()[:-200])
    done = command(broker, tmp_path, "backfill", *words, *named)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(store.read(source, "SIM001", quarter), true)


def test_a_symbol_whose_file_was_set_aside_is_still_missed(broker, tmp_path):
    words = ["--source", "breeze", "--start", "2024-01-01", "--end", "2024-01-31"]
    assert command(broker, tmp_path, "fetch", *words, "--symbols", "SIM001,SIM002").returncode == 0
    store, source = store_of(tmp_path), feed_of(broker, tmp_path).name
    path = store.path(source, "SIM001", DAY)
    path.write_bytes(path.read_bytes()[:-50])
    store.repair(source, "SIM001", DAY)
    covered = command(broker, tmp_path, "coverage", *words)
    assert covered.returncode == 3 and "1 of 2" in covered.stdout


def test_damaged_state_and_codes_are_told_before_a_request_is_spent(broker, tmp_path):
    words = ["fetch", "--source", "breeze", "--start", "2024-01-01", "--end", "2024-01-31"]
    words += ["--symbols", "SIM001"]
    state = tmp_path / "data" / "state" / "sensequant.db"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"garbage" * 1000)
    refused = command(broker, tmp_path, *words)
    assert (refused.returncode, len(broker.log)) == (2, 0) and "must be whole" in refused.stderr
    state.unlink()
    command(broker, tmp_path, "discover")
    codes = state.with_name("breeze_codes.csv")
    text = codes.read_text()
    codes.write_text(re.sub(r"(SIM001,SIMAAA,\w+),[^,]*,", r"\1,soon,", text))
    damaged = command(broker, tmp_path, *words)
    assert damaged.returncode == 1 and "must be YYYY-MM-DD; found soon" in damaged.stdout
    assert "Traceback" not in damaged.stderr
