"State under several processes, sudden death, damage and time."

import multiprocessing
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime

import psutil
import pytest
from processes import ROOT, python, results

from sensequant.core import state as module
from sensequant.core.errors import DataError, GateError
from sensequant.core.events import STATUSES
from sensequant.core.fanout import fan_out
from sensequant.core.state import State, is_held, process_started
from sensequant.core.types import IST

NOON = datetime(2026, 3, 2, 12, tzinfo=IST)
SHA = "ab" * 32


@pytest.fixture
def path(tmp_path):
    return tmp_path / "with space" / "sensequant.db"


@pytest.fixture
def state(path):
    with State(path) as opened:
        yield opened


IDS = """
import sys
from datetime import datetime
from sensequant.core.state import State
state, noon = State(sys.argv[1]), datetime.fromisoformat(sys.argv[2])
print(*[state.new_run_id(noon) for _ in range(20)])
"""


def test_ids_are_unique_when_processes_ask_for_the_same_second(path):
    given = results([python(IDS, path, NOON.isoformat()) for _ in range(4)])
    ids = [i for mine in given for i in mine]
    assert len(ids) == len(set(ids)) == 80
    assert all(re.fullmatch(r"live_candidate_20260302_12\d{4}", i) for i in ids)
    assert sorted(ids)[-1] == "live_candidate_20260302_120119"  # no second is left out


def test_an_id_is_in_indian_time(state):
    assert state.new_run_id(datetime(2026, 3, 1, 20, 0, 5, tzinfo=UTC)).endswith("20260302_013005")
    with pytest.raises(DataError, match="zone"):
        state.new_run_id(datetime(2026, 3, 1))


WINDOWS = """
import sys
from sensequant.core.state import State
state, name = State(sys.argv[1]), sys.argv[2]
for k in range(100):
    state.set_window("r", "teacher", f"{name}_{k:03}", "success", artifacts={"m": name})
    state.set_window("r", "teacher", "shared", "success", message=name)
"""


def test_processes_write_windows_at_once_while_one_reads(state, path):
    state.start_run("r", {}, os.getpid(), True)
    writers, seen = [python(WINDOWS, path, f"P{n}") for n in range(3)], []
    while any(w.poll() is None for w in writers):
        begun = time.monotonic()
        seen.append(len(state.windows("r", "teacher")))
        assert time.monotonic() - begun < 2
    results(writers)
    windows = state.windows("r", "teacher")
    assert len(windows) == 301 and seen == sorted(seen)
    assert list(windows) == sorted(windows)
    assert windows["P2_099"].artifacts == {"m": "P2"}


def test_a_new_file_is_opened_by_many_at_once(tmp_path):
    for attempt in range(10):
        barrier, seen = threading.Barrier(8), []

        def first_use(file=tmp_path / f"{attempt}.db", barrier=barrier, seen=seen):
            with State(file) as state:
                barrier.wait()
                seen.append(state.new_run_id(NOON))

        threads = [threading.Thread(target=first_use) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(set(seen)) == 8


ENDLESS = """
import sys
from sensequant.core.state import State
state, k = State(sys.argv[1]), 0
while True:
    state.set_window("r", "teacher", f"w{k:06}", "success", message="x" * 2000)
    print(k, flush=True)
    k += 1
"""


def test_kill_9_in_the_middle_of_writing(state, path):
    state.start_run("r", {}, os.getpid(), True)
    state.close()
    for wait in (0.05, 0.11, 0.23):
        writer = python(ENDLESS, path)
        writer.stdout.readline()
        time.sleep(wait)
        writer.kill()
        told = [int(line) for line in writer.communicate()[0].split()]
        with State(path) as after:
            windows = after.windows("r", "teacher")
            after.set_phase("r", "2_teacher", "running")
        assert told and f"w{told[-1]:06}" in windows  # what was said to be done is there
        assert all(w.message == "x" * 2000 for w in windows.values())
    with sqlite3.connect(path) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)


HOLDING = """
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
c.execute("COMMIT")
"""


def test_a_writer_waits_and_a_reader_does_not(state, path):
    state.start_run("r", {}, os.getpid(), True)
    holder = python(HOLDING, path, 1)
    holder.stdout.readline()
    begun = time.monotonic()
    assert state.run("r").run_id == "r"
    assert time.monotonic() - begun < 0.5
    state.set_phase("r", "1_ingest", "success")
    assert time.monotonic() - begun > 0.5
    results([holder])


def test_a_writer_gives_up_in_words(path):
    with State(path, busy_s=0.2) as state:
        state.start_run("r", {}, os.getpid(), True)
        holder = python(HOLDING, path, 2)
        holder.stdout.readline()
        with pytest.raises(DataError, match=r"must be free.*sensequant\.db"):
            state.set_phase("r", "1_ingest", "success")
        results([holder])
        state.set_phase("r", "1_ingest", "success")


def record_window(task):
    state, label = task
    state.set_window("r", "student", label, "success")
    return state.path


def test_a_worker_gets_the_state_and_opens_its_own_connection(state, path):
    state.start_run("r", {}, os.getpid(), True)
    copy = pickle.loads(pickle.dumps(state))
    assert (copy.path, copy.busy_s) == (path, state.busy_s)
    outcomes = list(fan_out(record_window, [(state, f"w{k}") for k in range(6)], workers=2))
    assert [o.error for o in outcomes] == [None] * 6
    assert list(state.windows("r", "student")) == [f"w{k}" for k in range(6)]


def forked(state):
    state.set_phase("r", "child", "success")
    assert state._owner == os.getpid()


def test_a_forked_child_leaves_the_connection_of_its_parent_alone(state):
    state.start_run("r", {}, os.getpid(), True)
    child = multiprocessing.get_context("fork").Process(target=forked, args=(state,))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    state.set_phase("r", "parent", "success")
    assert list(state.phases("r")) == ["child", "parent"]


def test_threads_share_a_state(state):
    state.start_run("r", {}, os.getpid(), True)

    def work(name):
        for k in range(25):
            state.set_window("r", "teacher", f"{name}{k:02}", "success")

    threads = [threading.Thread(target=work, args=(n,)) for n in "abcd"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(state.windows("r", "teacher")) == 100


# --- runs and the processes that hold them


def test_a_run_from_start_to_finish(state):
    run_id = state.new_run_id(NOON)
    assert state.run(run_id).started_at is None and state.run(run_id).simulated
    state.start_run(run_id, {"start": date(2022, 1, 1), "n": 2}, os.getpid(), simulated=False)
    run = state.latest_run()
    assert (run.config, run.simulated, run.status) == (
        {"n": 2, "start": "2022-01-01"},
        False,
        "running",
    )
    assert run.started_at.utcoffset().total_seconds() == 5.5 * 3600
    assert is_held(run) and state.stale_runs() == []
    state.finish_run(run_id, "partial", "phase 3 failed")
    run = state.run(run_id)
    assert (run.status, run.message) == ("partial", "phase 3 failed") and run.finished_at
    assert not is_held(run)


def test_runs_come_newest_first_and_limited(state):
    for k in range(5):
        state.start_run(f"r{k}", {}, os.getpid(), True)
    assert [r.run_id for r in state.runs(limit=2)] == ["r4", "r3"]
    assert state.latest_run().run_id == "r4"


def test_times_are_stored_as_indian_iso_text(state, path):
    state.start_run("r", {}, os.getpid(), True)
    with sqlite3.connect(path) as raw:
        (text,) = raw.execute("SELECT started_at FROM runs").fetchone()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+05:30", text)


RUN = """
import os, sys, time
from sensequant.core.state import State
state = State(sys.argv[1])
state.start_run("r", {}, os.getpid(), True)
print("started", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_stale_and_may_be_claimed_once(state, path):
    process = python(RUN, path)
    process.stdout.readline()
    assert state.stale_runs() == []
    with pytest.raises(GateError, match=f"process {process.pid}"):
        state.claim_run("r", os.getpid())
    process.send_signal(signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert [r.run_id for r in state.stale_runs()] == ["r"]  # dead, though nobody waited for it yet
    process.communicate()
    state.claim_run("r", os.getpid())
    state.claim_run("r", os.getpid())
    assert state.run("r").pid == os.getpid() and state.stale_runs() == []
    with pytest.raises(GateError, match="one process"):
        state.claim_run("r", os.getppid())


CLAIM = """
import os, sys, time
from sensequant.core.errors import GateError
from sensequant.core.state import State
state = State(sys.argv[1])
sys.stdin.readline()
try:
    state.claim_run("r", os.getpid())
    print("mine", flush=True)
except GateError:
    print("busy", flush=True)
sys.stdin.readline()
"""


def test_of_processes_that_resume_at_once_one_wins(state, path):
    state.start_run("r", {}, os.getpid(), True)
    state.finish_run("r", "interrupted")
    command = [sys.executable, "-c", CLAIM, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    rivals = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for rival in rivals:
        rival.stdin.write("go\n")
        rival.stdin.flush()
    told = [rival.stdout.readline().strip() for rival in rivals]
    for rival in rivals:
        rival.communicate("end\n", timeout=20)
    assert sorted(told) == ["busy", "busy", "busy", "mine"]


def test_a_recycled_process_number_is_not_the_run(state, path):
    state.start_run("r", {}, os.getpid(), True)
    with sqlite3.connect(path) as raw:  # as if the number had belonged to an earlier process
        raw.execute("UPDATE runs SET process_started = process_started - 60")
    assert [r.run_id for r in state.stale_runs()] == ["r"]
    state.claim_run("r", os.getppid())
    assert state.run("r").process_started == pytest.approx(process_started(os.getppid()), abs=1.5)


# --- damage, other versions, places that cannot be written


def damage(path, kind):
    "Spoil the file in one of several ways."
    if kind == "text":
        path.write_bytes(b"not a database at all\n" * 100)
    elif kind == "header":
        path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    elif kind == "pages":
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    else:
        path.write_bytes(path.read_bytes()[:6000])


@pytest.mark.parametrize("kind", ["text", "header", "pages", "short"])
def test_a_damaged_file_is_named_and_left_as_it_is(path, kind):
    with State(path) as state:
        state.start_run("r", {}, os.getpid(), True)
    damage(path, kind)
    before = path.read_bytes()
    for _ in range(2):
        with State(path) as state, pytest.raises(DataError, match=r"sensequant\.db"):
            state.windows("r", "teacher")
        with State(path) as state, pytest.raises(DataError, match=r"sensequant\.db"):
            state.set_phase("r", "1_ingest", "running")
    assert path.read_bytes() == before


def test_a_newer_file_is_refused_with_what_to_do(path):
    with State(path) as state:
        state.start_run("r", {}, os.getpid(), True)
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 7")
    with pytest.raises(DataError, match=r"version 7.*Update SenseQuant"):
        State(path).runs()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT run_id FROM runs").fetchall() == [("r",)]


def test_another_programs_database_is_not_taken_over(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(DataError, match="must be a state database"):
        State(path).runs()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]


def test_an_older_file_is_brought_up_to_date_and_keeps_its_rows(path, monkeypatch):
    with State(path) as state:
        state.start_run("r", {}, os.getpid(), True)
    script = "ALTER TABLE runs ADD COLUMN colour TEXT; CREATE TABLE extra (x)"
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, script))
    with State(path) as state:
        assert [r.run_id for r in state.runs()] == ["r"]
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (2,)
        assert raw.execute("SELECT colour FROM runs").fetchall() == [(None,)]


def test_a_migration_that_fails_half_way_changes_nothing(path, monkeypatch):
    with State(path) as state:
        state.start_run("r", {}, os.getpid(), True)
    good = module.MIGRATIONS
    monkeypatch.setattr(module, "MIGRATIONS", (*good, "CREATE TABLE extra (x); CREATE nonsense"))
    with pytest.raises(DataError, match="nonsense"):
        State(path).runs()
    monkeypatch.setattr(module, "MIGRATIONS", good)
    with State(path) as state:
        assert [r.run_id for r in state.runs()] == ["r"]
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        assert not raw.execute("SELECT 1 FROM sqlite_master WHERE name = 'extra'").fetchall()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="readable and writable"):
        State(tmp_path / "file" / "sensequant.db").runs()


def test_a_refused_write_leaves_no_lock_behind(state, path):
    with pytest.raises(DataError, match="run must be known"):
        state.set_phase("nobody", "1_ingest", "running")
    with State(path, busy_s=0.2) as other:
        other.start_run("r", {}, os.getpid(), True)


# --- words


def test_only_known_words(state):
    state.start_run("r", {}, os.getpid(), True)
    for status in STATUSES:
        state.set_phase("r", "1_ingest", status)
    for call in (
        lambda: state.set_phase("r", "1_ingest", "done"),
        lambda: state.set_window("r", "pupil", "w", "success"),
        lambda: state.set_window("r", "teacher", "w", "success", skip_class="no_data"),
        lambda: state.finish_run("r", "running"),
        lambda: state.finish_run("nobody", "failed"),
        lambda: state.start_run("q", {"x": object()}, os.getpid(), True),
        lambda: state.add_candidate("r", "maybe", [], True, SHA),
        lambda: state.add_candidate("r", "rejected", [], True, SHA),
        lambda: state.candidate("r"),
    ):
        with pytest.raises(DataError):
            call()
    assert [r.run_id for r in state.runs()] == ["r"]


def test_windows_of_both_kinds_and_their_skip_class(state):
    state.start_run("r", {}, os.getpid(), True)
    state.set_window("r", "teacher", "w", "skipped", "no_data", "no bars")
    state.set_window("r", "student", "w", "failed", message="ValueError: x")
    state.set_window("r", "student", "w", "success", artifacts={"b": SHA, "a": SHA})
    (teacher,), (student,) = (state.windows("r", k).values() for k in ("teacher", "student"))
    assert (teacher.skip_class, teacher.artifacts) == ("no_data", {})
    assert (student.status, student.message, list(student.artifacts)) == ("success", "", ["a", "b"])


def test_candidates_and_what_an_approval_needs(state):
    for run_id, simulated in {"sim": True, "real": False, "weak": False}.items():
        state.start_run(run_id, {}, os.getpid(), simulated)
        status, why = ("rejected", ["alpha"]) if run_id == "weak" else ("ready-for-review", [])
        state.add_candidate(run_id, status, why, simulated, SHA)
    assert [c.run_id for c in state.candidates("ready-for-review")] == ["real", "sim"]
    assert state.latest_candidate().reasons == ("alpha",)
    for run_id, role, name, place, sha in (
        ("sim", "risk", "A. Rao", "production", SHA),
        ("weak", "risk", "A. Rao", "production", SHA),
        ("weak", "risk", "A. Rao", "staging", SHA),
        ("real", "risk", "A. Rao", "production", "cd" * 32),
        ("real", "risk", " ", "production", SHA),
        ("real", "risk", "A. Rao", "home", SHA),
    ):
        with pytest.raises(GateError):
            state.approve(run_id, role, name, place, sha)
        assert state.approvals(run_id) == []
    state.approve("sim", "risk", "A. Rao", "staging", SHA)
    state.approve("real", "risk", "A. Rao", "production", SHA)
    state.approve("real", "desk", "B. Iyer", "production", SHA)
    assert [(a.role, a.name) for a in state.approvals("real")] == [
        ("risk", "A. Rao"),
        ("desk", "B. Iyer"),
    ]


def test_a_candidate_may_be_put_forward_again_until_it_is_approved(state):
    state.start_run("r", {}, os.getpid(), True)
    state.add_candidate("r", "rejected", ["x"], True, SHA)
    state.add_candidate("r", "ready-for-review", [], True, "cd" * 32)
    assert state.candidate("r").manifest_sha256 == "cd" * 32
    with pytest.raises(GateError, match="simulated as its run is"):
        state.add_candidate("r", "ready-for-review", [], False, SHA)
    state.approve("r", "risk", "A. Rao", "staging", "cd" * 32)
    with pytest.raises(GateError, match="does not change"):
        state.add_candidate("r", "ready-for-review", [], True, SHA)
    assert state.candidate("r").manifest_sha256 == "cd" * 32


def test_fetches_keep_the_last_word(state):
    state.record_fetch("csv", "TCS", "1day", date(2020, 1, 1), date(2020, 6, 30), 120, SHA)
    state.record_fetch("csv", "TCS", "1day", date(2020, 1, 1), date(2020, 12, 31), 248, SHA)
    state.record_fetch("csv", "ABB", "1day", None, None, 0, None)
    abb, tcs = state.fetches("csv")
    assert (abb.first, abb.rows, tcs.last, tcs.rows) == (None, 0, date(2020, 12, 31), 248)
    assert state.fetches("other") == []
