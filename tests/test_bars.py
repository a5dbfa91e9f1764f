"The bar store under several processes, kills, full disks and damaged files."

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars, tiny_bars
from sensequant.core.types import IST, REJECT_COLUMNS, Interval
from sensequant.data.bars import BarStore, between, hash_bars, no_bars, resample_bars
from sensequant.data.csv_bars import CsvTree, export_tree, import_tree, read_csv_bars
from sensequant.market.calendar import sessions
from sensequant.market.ranges import missing_spans, pack_ranges, plan_chunks, unpack_ranges

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real bars in {DATA}")
DAY, FIVE = Interval.DAY, Interval.MINUTE_5
NOON = datetime(2024, 6, 1, 12, tzinfo=IST)
SPAWN = multiprocessing.get_context("spawn")


def write_months(root: Path, months: list[int]) -> None:
    "Write the bars of some months of 2024 one by one."
    store, bars = BarStore(root), random_bars(250)
    for month in months:
        part = bars[bars.index.month == month]
        store.write("csv-a", "M&M", DAY, part)


def write_forever(root: Path) -> None:
    "Replace the same file until killed."
    store = BarStore(root)
    while True:
        for n in (100, 2_000):
            store.write("csv-a", "TCS", DAY, random_bars(n), date(2024, 1, 1), date(2039, 1, 1))


def hold_lock(root: Path) -> None:
    "Take the lock of TCS, say so, and never give it back."
    from sensequant.data.bars import _locked

    path = BarStore(root).path("csv-a", "TCS", DAY)
    with _locked(path):
        (root / "held").touch()
        time.sleep(600)


def test_two_processes_lose_nothing(tmp_path):
    halves = ([1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12])
    writers = [SPAWN.Process(target=write_months, args=(tmp_path, h)) for h in halves]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0]
    held = BarStore(tmp_path).read("csv-a", "M&M", DAY)
    pd.testing.assert_frame_equal(held, random_bars(250), check_freq=False)


def test_killed_writer_leaves_a_whole_file(tmp_path):
    store = BarStore(tmp_path)
    path = store.path("csv-a", "TCS", DAY)
    for pause in (0.01, 0.05, 0.12):
        writer = SPAWN.Process(target=write_forever, args=(tmp_path,))
        path.unlink(missing_ok=True)
        writer.start()
        while not path.exists():
            time.sleep(0.005)
        time.sleep(pause)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
        assert len(store.read("csv-a", "TCS", DAY)) in (100, 2_000)


def test_lock_of_a_killed_writer_is_free(tmp_path):
    store = BarStore(tmp_path)
    store.write("csv-a", "TCS", DAY, tiny_bars([100, 101]))
    holder = SPAWN.Process(target=hold_lock, args=(tmp_path,))
    holder.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    waiting = SPAWN.Process(target=write_one, args=(tmp_path,))
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive(), "a second writer must wait for the lock"
    os.kill(holder.pid, signal.SIGKILL)
    waiting.join(20)
    assert waiting.exitcode == 0
    assert list(store.read("csv-a", "TCS", DAY)["close"]) == [100.0, 101.0, 102.0]


def write_one(root: Path) -> None:
    "Add one bar to TCS."
    BarStore(root).write("csv-a", "TCS", DAY, tiny_bars([102], "2024-01-03"))


def write_too_much(root: Path) -> None:
    "Write more than the limit on file size allows."
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        BarStore(root).write("csv-a", "TCS", DAY, random_bars(5_000))
    except DataError as error:
        sys.exit(0 if "must have room for TCS.parquet" in str(error) else 2)
    sys.exit(3)


def left_over(root: Path) -> list[str]:
    "Files in the store that are neither bars nor locks."
    files = (p for p in root.rglob("*") if p.is_file())
    return [p.name for p in files if p.suffix not in (".parquet", ".lock")]


def test_no_room_keeps_what_was_there(tmp_path):
    store = BarStore(tmp_path)
    store.write("csv-a", "TCS", DAY, tiny_bars([100, 101]))
    writer = SPAWN.Process(target=write_too_much, args=(tmp_path,))
    writer.start()
    writer.join(30)
    assert writer.exitcode == 0
    assert list(store.read("csv-a", "TCS", DAY)["close"]) == [100.0, 101.0]
    assert left_over(tmp_path) == []


def test_full_disk_keeps_what_was_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        store = BarStore(disk)
        store.write("csv-a", "TCS", DAY, tiny_bars([100, 101]))
        with pytest.raises(DataError, match=r"must have room for TCS.parquet"):
            store.write("csv-a", "TCS", DAY, random_bars(5_000))
        assert list(store.read("csv-a", "TCS", DAY)["close"]) == [100.0, 101.0]
        assert left_over(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_where_a_folder_must_be(tmp_path):
    (tmp_path / "bars").write_text("not a folder")
    with pytest.raises(DataError, match=r"must be writable for TCS.parquet"):
        BarStore(tmp_path / "bars").write("csv-a", "TCS", DAY, tiny_bars([100]))


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"must be writable for TCS.parquet"):
        BarStore(tmp_path).write("csv-a", "TCS", DAY, tiny_bars([100]))


def test_a_flipped_bit_never_passes_for_a_price(tmp_path):
    store, bars = BarStore(tmp_path), random_bars(300)
    store.write("csv-a", "TCS", DAY, bars)
    path = store.path("csv-a", "TCS", DAY)
    whole, refused, ranges = path.read_bytes(), 0, store.ranges("csv-a", "TCS", DAY)
    for place in range(0, len(whole), len(whole) // 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = store.read("csv-a", "TCS", DAY)
        except DataError as error:
            assert "TCS.parquet" in str(error)
            refused += 1
        else:
            assert hash_bars(found) == hash_bars(bars)
            assert store.ranges("csv-a", "TCS", DAY) in ((), ranges)
    assert refused > 100


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\0" * 500, b"open,high\n1,2\n"])
def test_rubbish_in_the_store_is_kept_aside(tmp_path, content):
    store = BarStore(tmp_path)
    path = store.path("csv-a", "TCS", DAY)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"must hold whole bars.*TCS\.parquet"):
        store.read("csv-a", "TCS", DAY)
    with pytest.raises(DataError, match=r"TCS\.parquet"):
        store.held("csv-a", DAY)
    written = store.write("csv-a", "TCS", DAY, tiny_bars([100, 101]))
    assert written.kept_aside.read_bytes() == content
    assert len(store.read("csv-a", "TCS", DAY)) == 2


def test_other_tables_are_not_taken_for_bars(tmp_path):
    path = BarStore(tmp_path).path("csv-a", "TCS", DAY)
    path.parent.mkdir(parents=True)
    tiny_bars([100, 101]).drop(columns="low").to_parquet(path)
    with pytest.raises(DataError, match="must hold whole bars"):
        BarStore(tmp_path).read("csv-a", "TCS", DAY)


def test_any_order_of_writes_ends_the_same(tmp_path):
    rng, bars = np.random.default_rng(1), random_bars(60)
    days = [ts.date() for ts in bars.index]
    for trial in range(5):
        store, model = BarStore(tmp_path / str(trial)), {}
        for _ in range(12):
            low, high = sorted(rng.integers(0, 60, 2))
            new = bars.iloc[low : high + 1].assign(volume=int(rng.integers(1, 1_000)))
            new = new[rng.random(len(new)) < 0.8]
            if new.empty:
                continue
            store.write("csv-a", "TCS", DAY, new, days[low], days[high])
            for day in bars.index[low : high + 1]:
                model.pop(day, None)
            model.update(dict(new.iterrows()))
        expected = pd.DataFrame(model).T.sort_index()
        held = store.read("csv-a", "TCS", DAY)
        assert list(held.index) == list(expected.index)
        assert (held.to_numpy() == expected.to_numpy()).all()


def test_same_bars_same_bytes_whatever_the_unit(tmp_path):
    bars = random_bars(50)
    stores = [BarStore(tmp_path / unit) for unit in ("s", "us", "ns")]
    hashes = {
        s.write("csv-a", "TCS", DAY, bars.set_index(bars.index.as_unit(s.root.name))).sha256
        for s in stores
    }
    assert len(hashes) == 1


def test_between_leaves_nothing_and_doubles_nothing():
    bars = random_bars(40)
    cut = date(2024, 1, 20)
    parts = [between(bars, end=cut), between(bars, start=date(2024, 1, 21))]
    pd.testing.assert_frame_equal(pd.concat(parts), bars, check_freq=False)


@needs_data
def test_one_minute_bars_add_up_to_the_vendors_five():
    "The source says RELIANCE's 1-minute bars aggregate to its 5-minute bars exactly."
    ones, fives = (
        read_csv_bars(CsvTree(DATA / folder).files("RELIANCE", interval), interval).bars
        for folder, interval in (
            ("nse_intraday_1m", Interval.MINUTE_1),
            ("nse_intraday_5m", Interval.MINUTE_5),
        )
    )
    made = resample_bars(ones, Interval.MINUTE_5)
    both = made.index.intersection(fives.index)
    assert len(both) == len(fives)
    pd.testing.assert_frame_equal(made.loc[both], fives.loc[both])
    fifteen = resample_bars(ones, Interval.MINUTE_15)
    pd.testing.assert_frame_equal(fifteen, resample_bars(made, Interval.MINUTE_15))
    assert len(fifteen) == 124 * 25


def five_minutes(first: date, last: date, seed: int = 1) -> pd.DataFrame:
    "Five-minute bars of every session of a range."
    days = sessions(first, last)
    clock = pd.to_timedelta(np.arange(75) * 5 + 555, unit="min")
    index = pd.DatetimeIndex([d + c for d in days for c in clock], name="ts").as_unit("us")
    return random_bars(len(index), seed, 0.002).set_index(index)


def first_version(path: Path, bars: pd.DataFrame) -> None:
    "A file as the first version of the store wrote it: no ranges, intraday bars in one file."
    schema = [pa.field("ts", pa.timestamp("us", tz=IST.key), nullable=False)]
    schema += [pa.field(c, pa.from_numpy_dtype(bars[c].dtype), nullable=False) for c in bars]
    stamps = pa.array(bars.index.as_unit("us").asi8).cast(schema[0].type)
    table = pa.Table.from_arrays(
        [stamps, *(bars[c].to_numpy() for c in bars)], schema=pa.schema(schema)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


@pytest.mark.parametrize("interval", [DAY, FIVE])
def test_a_store_of_the_first_version_is_read_and_taken_over(tmp_path, interval):
    store, first, last = BarStore(tmp_path), date(2022, 12, 1), date(2024, 1, 31)
    bars = random_bars(280) if interval == DAY else five_minutes(first, last)
    path = store.path("csv-a", "TCS", interval)
    old = path if interval == DAY else path.with_name("TCS.parquet")
    first_version(old, bars)
    key = ("csv-a", "TCS", interval)
    pd.testing.assert_frame_equal(store.read(*key), bars, check_freq=False)
    assert store.ranges(*key) == () and store.symbols("csv-a", interval) == ["TCS"]
    assert store.missing(*key, first, last) == [
        (sessions(first, last)[0].date(), sessions(first, last)[-1].date())
    ]
    with pytest.raises(DataError, match="the origin of a bar must be on record"):
        store.origin_of(*key, bars.index[0])
    middle = between(bars, date(2024, 1, 8), date(2024, 1, 12)).assign(volume=7)
    written = store.write(*key, middle, origin="vendor", fetched_at=NOON)
    assert written.rows == len(bars) and (interval == DAY) == old.exists()
    expected = pd.concat([bars.loc[:"2024-01-07"], middle, bars.loc["2024-01-13":]])
    pd.testing.assert_frame_equal(store.read(*key), expected, check_freq=False)
    assert [(r.first.day, r.last.day, r.rows) for r in store.ranges(*key)] == [(8, 12, len(middle))]
    assert store.origin_of(*key, middle.index[-1]).origin == "vendor"


def test_a_first_version_being_split_is_read_whole(tmp_path):
    "A writer killed between writing the years and removing the one file leaves both."
    store, bars = BarStore(tmp_path), five_minutes(date(2023, 12, 1), date(2024, 1, 31))
    old = store.path("csv-a", "TCS", FIVE).with_name("TCS.parquet")
    first_version(old, bars)
    kept = old.read_bytes()
    changed = between(bars, date(2024, 1, 2), date(2024, 1, 5)).assign(volume=9)
    store.write("csv-a", "TCS", FIVE, changed)
    old.write_bytes(kept)
    for years, start in ((2, None), (1, date(2024, 1, 1))):
        held = store.read("csv-a", "TCS", FIVE, start)
        assert held.index.is_monotonic_increasing and held.index.is_unique
        assert (held["volume"] == 9).sum() == len(changed), years
        assert len(held) == len(between(bars, start))
    store.write("csv-a", "TCS", FIVE, changed)
    assert not old.exists() and len(store.read("csv-a", "TCS", FIVE)) == len(bars)


def test_years_are_files_of_their_own(tmp_path):
    store, bars = BarStore(tmp_path), five_minutes(date(2022, 12, 20), date(2024, 1, 10))
    span = date(2022, 12, 1), date(2024, 1, 31)
    written = store.write("b", "M&M", FIVE, bars, *span, "vendor", NOON)
    folder = store.path("b", "M&M", FIVE)
    assert sorted(p.name for p in folder.iterdir()) == [f"{y}.parquet" for y in (2022, 2023, 2024)]
    assert written.rows == len(bars) and written.sha256 == hash_bars(bars)
    pd.testing.assert_frame_equal(store.read("b", "M&M", FIVE), bars, check_freq=False)
    assert [(r.first, r.last, r.rows) for r in store.ranges("b", "M&M", FIVE)] == [
        (*span, len(bars))
    ]
    january = store.read("b", "M&M", FIVE, date(2024, 1, 1), date(2024, 1, 5))
    assert len(january) == 5 * 75
    others = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    store.write("b", "M&M", FIVE, january.tail(75), origin="later")
    now = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert [name for name in now if now[name] != others[name]] == ["2024.parquet"]
    (folder / "2023.parquet").write_bytes(b"rubbish")
    assert len(store.read("b", "M&M", FIVE, date(2024, 1, 1))) == 8 * 75, "its own year is whole"
    with pytest.raises(DataError, match=r"2023\.parquet"):
        store.read("b", "M&M", FIVE)
    assert store.missing("b", "M&M", FIVE, date(2024, 1, 1), date(2024, 1, 31)) == []
    gone = store.missing("b", "M&M", FIVE, date(2022, 12, 1), date(2024, 1, 31))
    assert gone == [(date(2023, 1, 2), date(2023, 12, 29))]
    assert [p.name[:21] for p in store.damaged()] == ["2023.parquet.damaged-"]


def test_a_damaged_file_is_missing_again_and_comes_back(tmp_path):
    store, bars = BarStore(tmp_path), random_bars(60)
    span = bars.index[0].date(), bars.index[-1].date()
    store.write("b", "TCS", DAY, bars, *span)
    path = store.path("b", "TCS", DAY)
    path.write_bytes(path.read_bytes()[:-7])
    held = path.read_bytes()
    assert store.repair("b", "INFY", DAY) == []
    aside = store.repair("b", "TCS", DAY)
    assert [p.read_bytes() for p in aside] == [held] and store.repair("b", "TCS", DAY) == []
    assert len(store.missing("b", "TCS", DAY, *span)) == 1
    store.write("b", "TCS", DAY, bars, *span)
    assert store.missing("b", "TCS", DAY, *span) == [] and store.damaged() == aside


def test_an_empty_answer_is_remembered_and_erases_nothing(tmp_path):
    store, nothing = BarStore(tmp_path), (date(2021, 1, 1), date(2021, 12, 31))
    store.write("b", "TCS", FIVE, no_bars(), *nothing, "breeze", NOON)
    assert store.read("b", "TCS", FIVE).empty and store.held("b", FIVE).empty
    assert store.missing("b", "TCS", FIVE, *nothing) == []
    assert store.origin_of("b", "TCS", FIVE, NOON.replace(year=2021)).rows == 0
    store.write("b", "TCS", DAY, tiny_bars([1, 2, 3]))
    with pytest.raises(DataError, match="must not erase bars that are held; found 2 bars"):
        store.write("b", "TCS", DAY, no_bars(), date(2024, 1, 2), date(2024, 1, 31))
    assert len(store.read("b", "TCS", DAY)) == 3
    with pytest.raises(DataError, match="at least one bar"):
        store.write("b", "TCS", DAY, no_bars(), date(2024, 1, 2))
    with pytest.raises(DataError, match="must lie in the range written"):
        store.write("b", "TCS", DAY, no_bars(), date(2024, 1, 2), date(2024, 1, 1))


DAYS = [ts.date() for ts in sessions(date(2023, 11, 1), date(2024, 3, 28))]
SPANS = st.tuples(st.integers(0, len(DAYS) - 1), st.integers(0, len(DAYS) - 1)).map(sorted)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(SPANS, st.integers(0, 3)), min_size=1, max_size=6), st.booleans())
def test_ranges_are_those_of_a_plain_list_of_days(tmp_path_factory, writes, daily):
    "Whatever is written in whatever order: each day belongs to the last answer that covered it."
    store, model, rows = BarStore(tmp_path_factory.mktemp("store")), {}, {}
    interval = DAY if daily else Interval.MINUTE_30
    for number, ((low, high), every) in enumerate(writes):
        chosen = DAYS[low : high + 1][:: every + 1]
        index = pd.DatetimeIndex([pd.Timestamp(d, tz=IST) for d in chosen], name="ts")
        index = index if daily else index + pd.Timedelta(hours=9, minutes=15)
        bars = tiny_bars(np.full(len(chosen), 100.0 + number)).set_index(index.as_unit("us"))
        at = NOON + timedelta(minutes=number)
        store.write("b", "TCS", interval, bars, DAYS[low], DAYS[high], f"answer {number}", at)
        model |= dict.fromkeys(DAYS[low : high + 1], number)
        rows = {d: n for d, n in rows.items() if not DAYS[low] <= d <= DAYS[high]}
        rows |= dict.fromkeys(chosen, number)
    ranges = store.ranges("b", "TCS", interval)
    told = {d: r.origin for d in DAYS for r in ranges if r.first <= d <= r.last}
    assert told == {d: f"answer {n}" for d, n in model.items()}
    assert sum(r.rows for r in ranges) == len(rows) == len(store.read("b", "TCS", interval))
    assert all(a.last < b.first for a, b in pairwise(ranges))
    spans = store.missing("b", "TCS", interval, DAYS[0], DAYS[-1])
    lacking = [d for a, b in spans for d in DAYS if a <= d <= b]
    assert lacking == [d for d in DAYS if d not in model]
    assert unpack_ranges(pack_ranges(ranges)) == ranges


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(Interval)),
    st.dates(date(2020, 1, 1), date(2024, 1, 1)),
    st.integers(0, 900),
    st.integers(1, 2_000),
)
def test_chunks_cover_each_session_once_and_stay_small(interval, start, length, cap):
    end = start + timedelta(days=length)
    chunks = plan_chunks(interval, start, end, cap)
    days = [ts.date() for ts in sessions(start, end)]
    assert [d for a, b in chunks for d in days if a <= d <= b] == days
    for first, last in chunks:
        inside = sum(first <= d <= last for d in days)
        assert inside * interval.bars_a_session < 1_000 and (last - first).days < cap
    assert missing_spans([], start, end) == ([(days[0], days[-1])] if days else [])


def write_slices(root: Path, number: int) -> None:
    "Write every third session of half a year of five-minute bars, one by one, over New Year."
    store = BarStore(root)
    for day in sessions(date(2023, 11, 15), date(2024, 2, 15))[number::3]:
        bars = five_minutes(day.date(), day.date(), seed=day.dayofyear)
        store.write("b", "TCS", FIVE, bars, day.date(), day.date(), f"writer {number}", NOON)


def test_writers_killed_again_and_again_lose_nothing_that_was_said_to_be_held(tmp_path):
    "Three writers, a kill -9 every few moments: ranges never run ahead of the rows."
    rng, kills, finished = np.random.default_rng(1), 0, set()
    store, span = BarStore(tmp_path), (date(2023, 11, 15), date(2024, 2, 15))
    fork = multiprocessing.get_context("fork")
    while len(finished) < 3:
        number = int(rng.choice([n for n in range(3) if n not in finished]))
        pair = [n for n in range(3) if n not in finished and n != number][:1] + [number]
        writers = {n: fork.Process(target=write_slices, args=(tmp_path, n)) for n in pair}
        for writer in writers.values():
            writer.start()
        if kills < 10:
            time.sleep(float(rng.uniform(0.01, 0.12)))
            os.kill(writers[number].pid, signal.SIGKILL)
            kills += 1
        for writer in writers.values():
            writer.join(60)
        finished |= {n for n in pair if writers[n].exitcode == 0}
        held = store.read("b", "TCS", FIVE) if store.path("b", "TCS", FIVE).exists() else no_bars()
        for r in store.ranges("b", "TCS", FIVE) if len(held) else ():
            days = sessions(r.first, r.last)
            assert len(between(held, r.first, r.last)) == r.rows == 75 * len(days)
    assert kills == 10 and store.missing("b", "TCS", FIVE, *span) == []
    bars = store.read("b", "TCS", FIVE)
    for day in sessions(*span):
        truth = five_minutes(day.date(), day.date(), seed=day.dayofyear)
        pd.testing.assert_frame_equal(
            between(bars, day.date(), day.date()), truth, check_freq=False
        )
    folder = store.path("b", "TCS", FIVE)
    old = time.time() - 7_200
    for left in folder.glob(".*.tmp"):
        os.utime(left, (old, old))
    store.write("b", "TCS", FIVE, bars.tail(75))
    assert list(folder.glob(".*.tmp")) == []


def test_threads_on_one_symbol_lose_nothing(tmp_path):
    store, bars = BarStore(tmp_path), five_minutes(date(2023, 12, 20), date(2024, 1, 10))
    days = sorted(set(bars.index.date))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda d: store.write("b", "TCS", FIVE, between(bars, d, d), d, d), days))
    pd.testing.assert_frame_equal(store.read("b", "TCS", FIVE), bars, check_freq=False)
    assert store.missing("b", "TCS", FIVE, days[0], days[-1]) == []


def test_years_of_daily_answers_stay_quick_to_read(tmp_path):
    "Each day fetched with the thirty before it leaves a range a day."
    store, bars = BarStore(tmp_path), random_bars(140)
    for n in range(30, 140):
        part, at = bars.iloc[n - 30 : n + 1], NOON + timedelta(days=n)
        store.write("b", "TCS", DAY, part, part.index[0].date(), part.index[-1].date(), "v", at)
    ranges = store.ranges("b", "TCS", DAY)
    assert len(ranges) == 110 and sum(r.rows for r in ranges) == 140
    assert store.origin_of("b", "TCS", DAY, bars.index[35]).fetched_at == NOON + timedelta(days=65)
    with pytest.raises(DataError, match="fetched_at must carry a zone"):
        store.write("b", "TCS", DAY, bars, fetched_at=datetime(2024, 1, 1))


def replace_over_new_year(root: Path) -> None:
    "Replace the same weeks on both sides of New Year until killed."
    store, n = BarStore(root), 0
    bars = five_minutes(date(2023, 12, 26), date(2024, 1, 5))
    while True:
        n += 1
        store.write("b", "TCS", FIVE, bars.assign(volume=n))


def test_a_reader_never_sees_half_a_write_over_two_years(tmp_path):
    store = BarStore(tmp_path)
    writer = SPAWN.Process(target=replace_over_new_year, args=(tmp_path,))
    writer.start()
    try:
        while not (store.path("b", "TCS", FIVE) / "2024.parquet").exists():
            time.sleep(0.01)
        seen = set()
        for _ in range(60):
            volumes = store.read("b", "TCS", FIVE)["volume"].unique()
            assert len(volumes) == 1
            seen.add(int(volumes[0]))
    finally:
        writer.kill()
        writer.join(10)
    assert len(seen) > 3


def refuse_rows(root: Path, number: int) -> None:
    "Put the same forty rows and ten of one's own in quarantine, one by one."
    store = BarStore(root)
    for n in [*range(40), *range(100 + 10 * number, 110 + 10 * number)]:
        row = [n, pd.Timestamp("2024-01-01", tz=IST) + pd.Timedelta(minutes=n), "close", "x", "bad"]
        store.quarantine("b", "TCS", DAY, pd.DataFrame([row], columns=list(REJECT_COLUMNS)), "v")


def test_quarantine_of_two_writers(tmp_path):
    writers = [SPAWN.Process(target=refuse_rows, args=(tmp_path, n)) for n in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    held = BarStore(tmp_path).quarantined("b")
    assert len(held) == 60 and held["ts"].is_unique and set(held["symbol"]) == {"TCS"}
    assert str(held["ts"].dt.tz) == IST.key and set(held["value"]) == {"x"}


def test_quarantine_keeps_rows_without_a_time_and_finds_by_symbol(tmp_path):
    store = BarStore(tmp_path)
    rows = [[1, pd.NaT, "timestamp", "31/12/2024", "bad_timestamp"], [2, pd.NaT, "", "", "torn"]]
    frame = pd.DataFrame(rows, columns=list(REJECT_COLUMNS)).assign(file="a.csv")
    assert store.quarantine("b", "M&M", FIVE, frame) == 2
    assert store.quarantine("b", "M&M", FIVE, frame) == 0
    assert store.quarantine("b", "BAJAJ-AUTO", DAY, frame.assign(file="b.csv")) == 2
    assert store.quarantine("b", "TCS", DAY, frame.head(0)) == 0
    assert list(store.quarantined("b", "BAJAJ-AUTO")["file"]) == ["b.csv", "b.csv"]
    assert list(store.quarantined("b", interval=FIVE)["symbol"]) == ["M&M", "M&M"]
    assert store.quarantined("elsewhere").empty
    path = tmp_path / "b" / "quarantine" / "M&M-5minute.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a quarantine must be readable.*M&M-5minute"):
        store.quarantined("b")
    assert store.quarantine("b", "M&M", FIVE, frame) == 2
    assert len(store.quarantined("b", "M&M")) == 2 and len(store.damaged()) == 1


@pytest.mark.parametrize("interval", [DAY, FIVE])
def test_out_to_files_and_in_again_changes_nothing(tmp_path, interval):
    store, span = BarStore(tmp_path / "store"), (date(2023, 12, 1), date(2024, 1, 31))
    days = sessions(*span)
    bars = random_bars(len(days)).set_index(days) if interval == DAY else five_minutes(*span)
    odd = bars.assign(open=bars["open"] / 3, low=bars["low"] / 7)
    for symbol in ("M&M", "TCS"):
        store.write("b", symbol, interval, odd, *span, "vendor", NOON)
        store.write("b", symbol, interval, no_bars(), date(2024, 2, 1), date(2024, 2, 9), "x", NOON)
    count = export_tree(store, "b", tmp_path / "out", interval)
    assert count == 2 * (2 if interval == DAY else len(days))
    done = import_tree(store, "c", tmp_path / "out", interval)
    assert [(d.symbol, d.rows, d.rejected) for d in done] == [
        (s, len(bars), 0) for s in ("M&M", "TCS")
    ]
    again = store.read("c", "TCS", interval)
    assert hash_bars(again) == hash_bars(odd)
    assert store.ranges("c", "TCS", interval) == store.ranges("b", "TCS", interval)
    assert export_tree(store, "c", tmp_path / "out", interval, ["TCS"]) == count // 2


def test_an_earlier_systems_tree_is_read_with_its_zone_told(tmp_path):
    "Stamps without a zone are UTC there, and a faulty symbol does not stop the others."
    folder, bars = tmp_path / "tree", five_minutes(date(2024, 1, 1), date(2024, 1, 2))
    for symbol in ("INFY", "TCS"):
        place = folder / symbol / "5minute"
        place.mkdir(parents=True)
        for day, part in bars.groupby(bars.index.date):
            naive = part.set_axis(part.index.tz_convert("UTC").tz_localize(None))
            naive.rename_axis("timestamp").to_csv(place / f"{day}.csv")
        (place / "metadata.json").write_text('{"symbol": "TCS", "files": {}}')
    (folder / "INFY" / "5minute" / "2024-01-01.csv").write_text("rubbish")
    with (folder / "TCS" / "5minute" / "2024-01-02.csv").open("a") as file:
        file.write("2024-01-02 05:00:00,1,2,1,x,5\n")
    store = BarStore(tmp_path / "store")
    infy, tcs = import_tree(store, "old", folder, FIVE, zone="UTC")
    assert "2024-01-01.csv" in infy.reason and (tcs.rows, tcs.rejected) == (150, 1)
    pd.testing.assert_frame_equal(store.read("old", "TCS", FIVE), bars, check_freq=False)
    assert store.quarantined("old", "TCS")["reason"].tolist() == ["not_a_number"]
    wrong = import_tree(store, "wrong", folder, FIVE)
    assert wrong[1].rows < 75, "as local time most of them lie outside the session"
