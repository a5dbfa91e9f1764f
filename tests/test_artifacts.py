"""Files that matter: a full disk, a folder without permission, a kill, a changed byte."""

import dataclasses
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sensequant.core.artifacts import (
    Artifact,
    Artifacts,
    link_atomic,
    parquet_bytes,
    sha256_file,
    write_atomic,
    write_together,
)
from sensequant.core.errors import DataError
from sensequant.core.events import json_bytes
from sensequant.core.testing import random_bars
from sensequant.core.types import Direction, Interval


def everything(root: Path) -> dict[str, bytes]:
    """Content by path of all files below `root`, temporary ones too."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def in_child(function: Callable[..., None], *arguments: object) -> int:
    """Exit code of a spawned process that runs `function`: 1 when it raised."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_files_and_no_temporary_one(small_disk: Path) -> None:
    run = Artifacts(small_disk / "r1")
    run.write_all({"a.bin": b"a" * 50_000, "b.bin": b"b" * 50_000})
    before = everything(small_disk)
    with pytest.raises(DataError, match=r"must have room for c\.bin; found no space left.*r1"):
        run.write_all({"a.bin": b"new", "b.bin": b"new", "c.bin": b"c" * 300_000})
    assert everything(small_disk) == before
    assert run.verify() == [] and not run.has("c.bin")

    with pytest.raises(DataError, match=r"must have room for a\.bin"):
        write_atomic(run.path("a.bin"), b"a" * 300_000)
    assert everything(small_disk) == before
    run.write_bytes("c.bin", b"small enough")
    assert run.verify() == []


def write_beyond_limit(root: Path) -> None:
    """Try 20 kB where a file may have 10; succeed when that is refused in words."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        Artifacts(root).write_bytes("a.bin", b"a" * 20_000)
    except DataError as error:
        assert "must have room for a.bin" in str(error) and str(root) in str(error)
        os._exit(7)


def test_a_refused_size_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    run = Artifacts(tmp_path)
    run.write_bytes("a.bin", b"old")
    before = everything(tmp_path)
    assert in_child(write_beyond_limit, tmp_path) == 7
    assert everything(tmp_path) == before and run.verify() == []


# A folder without permission


def write_as_nobody(folder: Path) -> None:
    """Try to write as a user without rights; succeed when that is refused in words."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for attempt in (
        lambda: write_atomic(folder / "a.txt", b"a"),
        lambda: Artifacts(folder / "r1").write_text("a.txt", "a"),
    ):
        try:
            attempt()
        except DataError as error:
            assert "the folder must be writable" in str(error), error
            assert "found permission denied" in str(error) and str(folder) in str(error), error
        else:
            os._exit(8)
    os._exit(7)


def test_an_unwritable_folder_is_named() -> None:
    # Not below tmp_path: pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert in_child(write_as_nobody, Path(folder)) == 7
        assert everything(Path(folder)) == {}
        os.chmod(folder, 0o755)


# A kill

FOREVER = """
import sys
from pathlib import Path
from sensequant.core.artifacts import Artifacts
run, n = Artifacts(Path(sys.argv[1])), 0
while True:
    run.write_all({"a.txt": b"%d" % n * 100_000, "b.txt": b"%d" % n * 100_000})
    print(n, flush=True)
    n = (n + 1) % 10
"""


def test_a_kill_leaves_whole_files_and_no_false_record(tmp_path: Path) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", FOREVER, str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(15):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        run = Artifacts(tmp_path)
        for name in ("a.txt", "b.txt"):
            data = run.path(name).read_bytes()
            assert len(data) == 100_000 and len(set(data)) == 1
            # Trusted only when the record and the file agree.
            assert run.has(name) == (sha256_file(run.path(name)) == run.sha256(name))
        left = {p.name for p in tmp_path.iterdir()} - {"a.txt", "b.txt", "artifacts.jsonl"}
        assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
        run.write_all({"a.txt": b"whole", "b.txt": b"whole"})
        assert run.verify() == [] and Artifacts(tmp_path).verify() == []


# Several writers


def write_numbered(root: Path, worker: int) -> None:
    """Write fifty files of one worker."""
    for n in range(50):
        Artifacts(root).write_text(f"teacher/w{worker}/{n}.txt", f"{worker} {n}")


def test_workers_record_beside_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_numbered, args=(tmp_path, w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    run = Artifacts(tmp_path)
    assert len(run.index()) == 200 and run.damaged() == 0 and run.verify() == []
    assert run.read_text("teacher/w3/49.txt") == "3 49"


# Reading checks


@pytest.mark.parametrize("read", ["read_bytes", "read_text", "read_json", "read_parquet"])
def test_a_changed_byte_is_named(tmp_path: Path, read: str) -> None:
    run = Artifacts(tmp_path)
    run.write_json("keep.json", [1, 2])
    run.write_json("sub/changed.json", [1, 2])
    path = run.path("sub/changed.json")
    expected, data = run.sha256("sub/changed.json"), bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError) as refusal:
        getattr(run, read)("sub/changed.json")
    for part in (str(path), expected, sha256_file(path)):
        assert part in str(refusal.value)
    assert run.verify() == ["sub/changed.json"] and not run.has("sub/changed.json")
    assert run.read_json("keep.json") == [1, 2]

    path.unlink()
    with pytest.raises(DataError, match="must be readable"):
        getattr(run, read)("sub/changed.json")
    assert run.verify() == ["sub/changed.json"]
    with pytest.raises(DataError, match="must be on record"):
        getattr(run, read)("never.json")


def test_a_torn_record_costs_its_own_line(tmp_path: Path) -> None:
    run = Artifacts(tmp_path)
    run.write_text("a.txt", "a")
    run.write_text("b.txt", "b")
    record = tmp_path / "artifacts.jsonl"
    os.truncate(record, record.stat().st_size - 10)
    after = Artifacts(tmp_path)
    assert after.has("a.txt") and not after.has("b.txt")
    after.write_text("b.txt", "b")
    assert after.has("b.txt") and after.damaged() == 1


def test_a_record_of_a_file_outside_is_refused(tmp_path: Path) -> None:
    run = Artifacts(tmp_path / "r1")
    for outside in ("../a.txt", "/tmp/a.txt", "a/../../b.txt", "", ".", "artifacts.jsonl"):
        for attempt in (
            lambda rel: run.write_text(rel, "a"),
            lambda rel: run.record(rel, "0" * 64, 1),
            lambda rel: run.link(rel, Path(__file__)),
            run.read_bytes,
            run.has,
        ):
            with pytest.raises(DataError, match="must lie below the root"):
                attempt(outside)
    assert everything(tmp_path) == {}


# Same content, same bytes

TABLES = {
    "bars": random_bars(50),
    "range": pd.DataFrame({"n": [1, 2], "x": [0.5, np.nan], "word": ["a", None]}),
    "multi": pd.DataFrame({"x": [1.0, 2.0]}, pd.MultiIndex.from_product([["TCS"], [1, 2]])),
    "bool": pd.DataFrame({"flag": [True, False], "day": pd.to_datetime(["2024-01-01", None])}),
    "empty": random_bars(50).iloc[:0],
    "category": pd.DataFrame({"label": pd.Categorical(["LONG", "NOOP"])}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_comes_back_and_has_one_hash(tmp_path: Path, name: str) -> None:
    frame, run = TABLES[name], Artifacts(tmp_path)
    first = run.write_parquet("a.parquet", frame)
    back = run.read_parquet("a.parquet")
    pd.testing.assert_frame_equal(back, frame, check_freq=False)
    # Attributes, memory layout and a trip through the disk leave the bytes as they are.
    marked = frame.copy()
    marked.attrs["made"] = str(datetime.now(UTC))
    for same in (frame.copy(deep=True), marked, back, frame.iloc[::-1].iloc[::-1]):
        assert run.write_parquet("b.parquet", same).sha256 == first.sha256


BYTES = """
import hashlib
from sensequant.core.artifacts import parquet_bytes
from sensequant.core.events import json_bytes
from sensequant.core.testing import random_bars
bars = random_bars(200)
summary = {"codes": {"TCS", "INFY", "RELIANCE", "SBIN"}, "mean": bars["close"].mean()}
print(hashlib.sha256(parquet_bytes(bars) + json_bytes(summary, pretty=True)).hexdigest())
"""


def test_two_interpreters_make_the_same_bytes() -> None:
    hashes = set()
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "TZ": ("UTC", "Asia/Tokyo")[int(seed) - 1],
        }
        command = [sys.executable, "-c", BYTES]
        hashes.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(hashes) == 1


@dataclasses.dataclass(frozen=True)
class Finding:
    where: Path
    day: date
    parts: tuple[int, ...]


def test_json_takes_what_a_run_has_at_hand(tmp_path: Path) -> None:
    run = Artifacts(tmp_path)
    value = {
        "numpy": [np.int64(1), np.float32(0.5), np.bool_(True), np.str_("a"), np.array([1, 2])],
        "none": [None, pd.NA, pd.NaT, float("nan"), np.float64("inf"), -np.inf],
        "times": [
            date(2024, 1, 1),
            datetime(2024, 1, 1, 9, 15, tzinfo=UTC),
            time(9, 15),
            timedelta(minutes=1),
            pd.Timestamp("2024-01-01", tz="Asia/Kolkata"),
            pd.Timedelta("1h"),
            np.datetime64("2024-01-01"),
        ],
        "finding": Finding(Path("a") / "b.csv", date(2024, 1, 1), (1, 2)),
        Interval.DAY: Direction.SHORT,
        date(2024, 1, 1): {3: "three", True: "yes", None: "none"},
        "matrix": np.array([[1.0, np.nan]]),
        "zero_d": np.array(2.5),
        "series": list(pd.Series([1, 2])),
    }
    run.write_json("a.json", value)
    assert run.read_json("a.json") == {
        "numpy": [1, 0.5, True, "a", [1, 2]],
        "none": [None] * 6,
        "times": [
            "2024-01-01",
            "2024-01-01T09:15:00+00:00",
            "09:15:00",
            60.0,
            "2024-01-01T00:00:00+05:30",
            3600.0,
            "2024-01-01T00:00:00",
        ],
        "finding": {"where": "a/b.csv", "day": "2024-01-01", "parts": [1, 2]},
        "1day": "SHORT",
        "2024-01-01": {"3": "three", "true": "yes", "null": "none"},
        "matrix": [[1.0, None]],
        "zero_d": 2.5,
        "series": [1, 2],
    }
    reordered = dict(reversed(value.items()))
    assert run.write_json("b.json", reordered).sha256 == run.sha256("a.json")
    assert json_bytes(-0.1 - 0.2) == b"-0.30000000000000004\n"


@pytest.mark.parametrize("bad", [object(), b"bytes", pd.DataFrame(), 1 + 2j, {1: 0, "1": 0}])
def test_json_refuses_what_it_cannot_hold(tmp_path: Path, bad: object) -> None:
    run = Artifacts(tmp_path)
    with pytest.raises(DataError, match=r"value\.best\[1\]"):
        run.write_json("a.json", {"best": [1, bad]})
    assert everything(tmp_path) == {}


# Links


def test_a_link_shares_the_bytes_and_survives_a_replaced_source(tmp_path: Path) -> None:
    source, run = tmp_path / "store" / "TCS.parquet", Artifacts(tmp_path / "r1")
    write_atomic(source, parquet_bytes(TABLES["bars"]))
    for _ in range(2):  # linking again changes nothing and leaves nothing behind
        artifact = run.link("bars/TCS.parquet", source)
        assert artifact == Artifact("bars/TCS.parquet", sha256_file(source), source.stat().st_size)
    assert run.path("bars/TCS.parquet").samefile(source)
    assert set(everything(tmp_path / "r1")) == {"artifacts.jsonl", "bars/TCS.parquet"}
    write_atomic(source, b"another day")
    assert run.verify() == []
    source.write_bytes(b"edited in place")
    assert run.verify() == []


def test_a_link_across_file_systems_copies(tmp_path: Path, small_disk: Path) -> None:
    source = small_disk / "a.bin"
    source.write_bytes(b"a" * 1000)
    assert link_atomic(tmp_path / "b.bin", source) == 1000
    assert (tmp_path / "b.bin").read_bytes() == source.read_bytes()
    assert not (tmp_path / "b.bin").samefile(source)
    (tmp_path / "alias").symlink_to(source)
    link_atomic(small_disk / "c.bin", tmp_path / "alias")
    assert (small_disk / "c.bin").samefile(source)
    assert not (small_disk / "c.bin").is_symlink()


# One call, several files


def test_a_name_that_is_a_folder_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old")
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(DataError) as refusal:
        write_together({tmp_path / "b.txt": b"new", tmp_path / "a.txt": b"new"})
    assert isinstance(refusal.value.__cause__, OSError)
    assert refusal.value.__cause__.errno == errno.EISDIR
    assert everything(tmp_path) == {"a.txt": b"old"}
