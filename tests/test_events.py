"""The event stream under several writers, a kill, a full disk and a fork."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sensequant.core.errors import DataError
from sensequant.core.events import EventLog, EventReader, append_lines, read_events

WRITERS, EVENTS = 4, 200


def write_many(log: EventLog, writer: int) -> None:
    """Emit `EVENTS` numbered events, long enough to span a page now and then."""
    for n in range(EVENTS):
        metrics = {"writer": writer, "n": n}
        log.emit("teacher_window_success", message="x" * (n * 37 % 6000), metrics=metrics)


def test_four_processes_write_one_stream(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl", "r1")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(log, w)) for w in range(WRITERS)]
    follower, followed = EventReader(log.path), []
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        followed += follower.new()
        time.sleep(0.01)
    followed += follower.new()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS

    events, damaged = read_events(log.path)
    assert damaged == 0 and follower.damaged == 0
    assert events == followed
    for writer in range(WRITERS):
        mine = [e.metrics["n"] for e in events if e.metrics["writer"] == writer]
        assert mine == list(range(EVENTS))


FOREVER = """
import sys
from pathlib import Path
from sensequant.core.events import EventLog
log, n = EventLog(Path(sys.argv[1]), "r1"), 0
while True:
    log.emit("warning", message="x" * 50_000, metrics={"n": n})
    print(n, flush=True)
    n += 1
"""


def test_a_killed_writer_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    path, written = tmp_path / "events.jsonl", 0
    for _ in range(3):
        command = [sys.executable, "-c", FOREVER, str(path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        told = [writer.stdout.readline() for _ in range(20)]
        assert told[-1] == "19\n"
        writer.send_signal(signal.SIGKILL)
        told += writer.stdout.readlines()
        writer.wait()
        returned = sum(line.endswith("\n") for line in told)

        events, damaged = read_events(path)
        since = [e.metrics["n"] for e in events[written:]]
        assert since == list(range(len(since)))
        # An event that returned is there; one more may be, when the kill came before its print.
        assert returned <= len(since) <= returned + 1
        assert damaged <= 3
        written = len(events)


@pytest.mark.parametrize("kept", [1, 7, 60, -1])
def test_the_next_write_starts_a_fresh_line(tmp_path: Path, kept: int) -> None:
    log = EventLog(tmp_path / "events.jsonl", "r1")
    log.emit("run_start")
    whole = len(log.path.read_bytes())
    log.emit("phase_start", phase="1_ingest")
    os.truncate(log.path, whole + kept if kept > 0 else log.path.stat().st_size - 1)

    # Without its newline alone, the last line is still a whole event.
    torn = kept > 0
    events, damaged = read_events(log.path)
    assert (len(events), damaged) == (1, 1) if torn else (2, 0)
    follower = EventReader(log.path)
    assert len(follower.new()) == 1

    log.emit("run_end")
    events, damaged = read_events(log.path)
    assert events[-1].event_type == "run_end"
    assert (len(events), damaged) == ((2, 1) if torn else (3, 0))
    assert len(follower.new()) == len(events) - 1 and follower.damaged == damaged


def test_garbage_in_the_middle_is_counted_and_read_past(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "r1")
    log.emit("run_start")
    garbage = [
        b"\x00" * 40,
        b"\xff\xfe not utf-8",
        b"[1, 2]",
        b"3",
        b'{"run_id": "r1"}',
        b'{"timestamp": "2024-01-01T10:00:00", "run_id": "r1", "event_type": "run_end"}',
        b'{"timestamp": "2024-01-01T10:00:00+05:30", "run_id": "r1", "event_type": "party"}',
    ]
    with log.path.open("ab") as file:
        file.write(b"\n".join(garbage) + b"\n\n")
    log.emit("run_end")
    events, damaged = read_events(log.path)
    assert [e.event_type for e in events] == ["run_start", "run_end"]
    assert damaged == len(garbage)


def test_a_forked_process_writes_beside_its_parent(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "r1")
    log.emit("run_start")
    child = os.fork()
    if child == 0:
        log.emit("warning", message="from the child")
        os._exit(0)
    log.emit("warning", message="from the parent")
    assert os.waitpid(child, 0)[1] == 0
    events, damaged = read_events(log.path)
    assert damaged == 0
    messages = {e.message for e in events[1:]}
    assert messages == {"from the child", "from the parent"}


def emit_within(log: EventLog, size: int) -> None:
    """Emit under a limit of `size` bytes a file; the process ends with 7 when that is refused."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        log.emit("warning", message="x" * 5_000)
    except DataError as error:
        named = "the disk must have room for events.jsonl" in str(error)
        os._exit(7 if named and str(log.path.parent) in str(error) else 8)
    os._exit(0)


def test_a_full_disk_refuses_and_keeps_what_was_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "r1")
    log.emit("run_start")
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=emit_within, args=(log, 3_000))
    writer.start()
    writer.join()
    assert writer.exitcode == 7
    log.emit("run_end", status="failed")
    events, damaged = read_events(log.path)
    assert [e.event_type for e in events] == ["run_start", "run_end"]
    assert damaged == 1


def test_lines_are_plain_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", "r1")
    log.emit("validation_complete", metrics={"auc": float("nan")}, message="two\nlines, 100 ₹")
    (line,) = log.path.read_text(encoding="utf-8").splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["metrics"] == {"auc": None}
    assert record["timestamp"].endswith("+05:30")
    assert list(record) == [
        "timestamp",
        "run_id",
        "event_type",
        "phase",
        "symbol",
        "window_label",
        "status",
        "metrics",
        "message",
        "duration_seconds",
    ]


def test_many_lines_in_one_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "lines.jsonl"
    append_lines(path, *({"n": n} for n in range(100)))
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == list(range(100))
