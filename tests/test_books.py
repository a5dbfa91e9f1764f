"""Order books on disk: several writers, a writer that dies, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensequant.core.errors import DataError
from sensequant.core.types import IST
from sensequant.data.books import Book, BookStore, Level, book_fault, book_features, book_frame

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
