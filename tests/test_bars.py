"The bar store under several processes, kills, full disks and damaged files."

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars, tiny_bars
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore, between, hash_bars, resample_bars
from sensequant.data.csv_bars import CsvTree, read_csv_bars

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real bars in {DATA}")
DAY = Interval.DAY
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
    whole, refused = path.read_bytes(), 0
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
