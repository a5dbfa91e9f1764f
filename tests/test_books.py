"""Order books on disk: several writers, a writer that dies, what is refused."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sensequant.core.errors import DataError
from sensequant.core.settings import load_settings
from sensequant.core.types import IST, Interval
from sensequant.data.books import (
    Book,
    BookStore,
    BreezeBooks,
    Level,
    book_fault,
    book_features,
    book_frame,
    book_share,
    collect_books,
    join_books,
    open_books,
)
from sensequant.data.breeze import client_from
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.live.sandbox_feeds import StreamSpec
from sensequant.market.simulator import MarketSpec
from sensequant.ops.main import app

NOON = datetime(2024, 7, 1, 12, tzinfo=IST)
DAY = NOON.date()
GOOD = Book("INFY", NOON, (Level(100.0, 300, 3),), (Level(100.05, 100, 1),), "breeze")
WRITER = """
import sys
from dataclasses import replace
from datetime import timedelta
from tests.test_books import GOOD, NOON, BookStore
store, symbol = BookStore(sys.argv[1]), sys.argv[2]
n = 0
while n < int(sys.argv[3]):
    n += 1
    store.append([replace(GOOD, symbol=symbol, ts=NOON + timedelta(seconds=n))])
"""


def writer(folder, symbol: str, books: int) -> subprocess.Popen:
    """Another process that appends books, one at a time."""
    words = [sys.executable, "-c", WRITER, str(folder), symbol, str(books)]
    root = os.path.dirname(os.path.dirname(__file__))
    return subprocess.Popen(words, cwd=root, env=os.environ | {"PYTHONPATH": root})


def test_two_writers_of_one_session_never_go_back_in_time(tmp_path):
    "Both send the same moments; each moment is kept once, and the other one is refused."
    both = [writer(tmp_path, "INFY", 40) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    held = BookStore(tmp_path).read("INFY", DAY, DAY)
    assert held.index.is_monotonic_increasing and held.index.is_unique
    refused = (tmp_path / "refused.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in refused} == {"not_later"}
    assert len(held) + len(refused) == 80


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    "kill -9 in the middle of appending, ten times."
    store, counts = BookStore(tmp_path), [0]
    for turn in range(10):
        symbol = f"S{turn}"
        process = writer(tmp_path, symbol, 100_000)
        while not store.path(symbol, DAY).exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.02 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        counts.append(len(store.read(symbol, DAY, DAY)))
        later = replace(GOOD, symbol=symbol, ts=NOON + timedelta(days=0, hours=1))
        assert store.append([later]) == [""]
    assert min(counts[1:]) >= 1 and max(counts) > 3


def test_books_of_two_sessions_are_not_mixed(tmp_path):
    with pytest.raises(DataError, match="one symbol and session"):
        BookStore(tmp_path).append([GOOD, replace(GOOD, ts=NOON + timedelta(days=1))])
    with pytest.raises(DataError, match="one symbol and session"):
        BookStore(tmp_path).append([])


def test_sessions_are_read_by_range(tmp_path):
    store = BookStore(tmp_path)
    for day in range(5):
        store.append([replace(GOOD, ts=NOON + timedelta(days=day))])
    held = store.read("INFY", date(2024, 7, 2), date(2024, 7, 4))
    assert [ts.day for ts in held.index] == [2, 3, 4]
    assert str(held.index.tz) == "Asia/Kolkata"


LEVELS = st.lists(
    st.tuples(st.floats(-5, 200), st.integers(-2, 10_000)), min_size=0, max_size=6
).map(lambda rows: tuple(Level(price, quantity) for price, quantity in rows))


@given(LEVELS, LEVELS)
def test_what_is_not_refused_makes_sense(bids, asks):
    "Whatever comes in: a book that passes has a positive spread and an imbalance in [-1, 1]."
    book = replace(GOOD, bids=bids, asks=asks)
    if book_fault(book):
        return
    said = book_features(book_frame([book])).iloc[0]
    assert -1 <= said["imbalance"] <= 1
    if bids and asks:
        assert said["spread_bps"] > 0 and said["depth_slope"] > 0
        assert bids[0].price_inr <= said["mid_inr"] <= asks[0].price_inr
        assert abs(said["microprice_bps"]) <= said["spread_bps"] / 2 + 1e-6


# ----------------------------------------------------------- the real SDK, a sandbox, its websocket

MARKET = MarketSpec(symbols=3, start=date(2024, 1, 1), end=date(2024, 2, 29))
SYMBOLS = ["SIM001", "SIM003"]


def keys(sandbox, **more):
    "Settings of a client of `sandbox`."
    key, secret, token = sandbox.credentials
    words = {"breeze_api_key": key, "breeze_api_secret": secret, "breeze_session_token": token}
    fast = {"breeze_calls_per_minute": 600, "breeze_backoff_s": 0.01, "breeze_timeout_s": 5.0}
    return load_settings(breeze_url=sandbox.url, **words | fast | more)


def test_books_come_from_the_websocket_and_say_that_they_are_simulated(tmp_path):
    "A sandbox replays a session: what is stored is in order, whole, and nobody takes it for real."
    with Sandbox(SandboxSpec(MARKET, stream=StreamSpec(tick_s=0.05))) as sandbox:
        provider = BreezeBooks(client_from(keys(sandbox)), SYMBOLS)
        try:
            store = BookStore(tmp_path / "books")
            rounds = collect_books(provider, store, SYMBOLS, every_s=0.25, rounds=8)
            *_, done = rounds
        finally:
            provider.close()
    assert done.source == "simulated" and done.kept >= 8 and done.refused == {}
    for symbol in SYMBOLS:
        held = store.read(symbol, MARKET.start, date.today())
        said = book_features(held)
        assert held.index.is_monotonic_increasing and held.index.is_unique and len(held) >= 4
        assert (said["spread_bps"] > 0).all() and said["imbalance"].abs().max() <= 1
        bars = held.index.floor("5min").unique()
        joined = join_books(bars, held, Interval.MINUTE_5)
        assert joined["source"].notna().all() and book_share(joined) == 0.0


@pytest.mark.parametrize("fault", ["link_leave", "link_kill"])
def test_a_server_that_hangs_up_is_called_again(tmp_path, fault):
    "A graceful disconnect is final for the SDK; the collection goes on all the same."
    with Sandbox(SandboxSpec(MARKET, stream=StreamSpec(tick_s=0.05))) as sandbox:
        provider = BreezeBooks(client_from(keys(sandbox)), SYMBOLS)
        try:
            store = BookStore(tmp_path / "books")
            rounds = collect_books(provider, store, SYMBOLS, every_s=0.2)
            before = next(itertools.islice(rounds, 3, None)).kept
            sandbox.cut_off(fault)
            deadline, after = time.monotonic() + 30, before
            while after <= before + 2 and time.monotonic() < deadline:
                after = next(rounds).kept
        finally:
            provider.close()
    assert after > before + 2


def test_without_a_login_books_are_made_up_in_plain_words():
    asked = load_settings()
    provider = open_books("breeze", ["INFY"], {"INFY": 1500.0}, lambda: client_from(asked))
    assert "Breeze gives no order books" in provider.note and "simulated" in provider.note
    assert {b.source for b in provider.latest(["INFY"])} == {"simulated"}


def test_a_code_that_is_not_in_the_master_is_refused_before_anything_is_collected():
    refusal = pytest.raises(DataError, match="security master; found NOPE")
    with Sandbox(SandboxSpec(MARKET)) as sandbox, refusal:
        BreezeBooks(client_from(keys(sandbox)), ["SIM001", "NOPE"])


# --- books and bars ---


def test_a_bar_knows_no_book_of_its_close_or_of_after_the_session():
    "A stamp of whole seconds at the close may be later; the last bar of 30 minutes lasts 15."

    def told(bar, interval, *stamps):
        books = [replace(GOOD, ts=datetime.fromisoformat(s).replace(tzinfo=IST)) for s in stamps]
        index = pd.DatetimeIndex([pd.Timestamp(bar, tz=IST)])
        return join_books(index, book_frame(books), interval)["source"].notna().item()

    assert told("2024-07-01 12:00", Interval.MINUTE_5, "2024-07-01 12:04:59")
    assert not told("2024-07-01 12:00", Interval.MINUTE_5, "2024-07-01 12:05:00")
    assert told("2024-07-01 12:05", Interval.MINUTE_5, "2024-07-01 12:05:00")
    assert told("2024-07-01 15:15", Interval.MINUTE_30, "2024-07-01 15:29:59")
    assert not told("2024-07-01 15:15", Interval.MINUTE_30, "2024-07-01 15:30:00")
    assert not told("2024-07-01 15:15", Interval.MINUTE_30, "2024-07-01 15:40:00")
    assert told("2024-07-01", Interval.DAY, "2024-07-01 15:29:59")
    assert not told("2024-07-01", Interval.DAY, "2024-07-01 15:30:00")
    assert not told("2020-11-14", Interval.DAY, "2020-11-14 19:20:00")  # an hour in the evening


@given(st.sets(st.integers(0, 25_200), max_size=30), st.integers(0, 74))
def test_nothing_at_or_after_a_close_changes_a_bar(seconds, at):
    "Books from 09:00 to 16:00; those from a bar's close on are taken away."
    opens = datetime(2024, 7, 1, 9, tzinfo=IST)
    index = pd.date_range(opens + timedelta(minutes=15), periods=75, freq="5min")
    books = [replace(GOOD, ts=opens + timedelta(seconds=n)) for n in sorted(seconds)]
    before = [b for b in books if b.ts < index[at] + timedelta(minutes=5)]
    told, cut = (join_books(index, book_frame(b), Interval.MINUTE_5) for b in (books, before))
    a, b = (j.iloc[: at + 1][["mid_inr", "imbalance"]] for j in (told, cut))
    pd.testing.assert_frame_equal(a, b)


def test_the_command_says_with_its_exit_code_that_books_were_made_up(tmp_path):
    "A job that asked for Breeze must not see success when nobody was there."
    words = ["data", "books", "--symbols", "INFY", "--every", "1", "--rounds", "1"]
    asked = CliRunner().invoke(app, [*words, "--provider", "breeze"])
    assert asked.exit_code == 3 and "warning: Breeze gives no order books" in asked.output
    chosen = CliRunner().invoke(app, [*words, "--provider", "simulated"])
    assert chosen.exit_code == 0 and "warning" not in chosen.output
