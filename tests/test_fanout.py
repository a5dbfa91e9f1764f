"Fan-out with real processes: deaths, interrupts, large and unpicklable things."

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.fanout import Outcome, fan_out

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def touchy(item):
    "Fails on multiples of 5 in several ways, otherwise squares."
    if item == 5:
        raise DataError("close must be above 0 INR", -1, "TCS")
    if item == 10:
        return threading.Lock()
    if item == 15:
        sys.exit("no more")
    return item * item


def deadly(item, folder=None):
    "Kills its process at 3 always, at 4 the first time only."
    marker = Path(folder) / "four"
    if item == 3 or (item == 4 and not marker.exists()):
        if item == 4:
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return item


def linger(item):
    "Sleeps for `item` seconds and tells who did."
    time.sleep(item)
    return os.getpid()


def large(n_bytes):
    "An array of `n_bytes`."
    return np.ones(n_bytes, dtype="int8")


def half_written(item):
    "Dies while its answer is pickled."
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return Slow()


class Slow:
    "A value whose pickling takes longer than its process lives."

    def __reduce__(self):
        time.sleep(5)
        return Slow, ()


class Poison:
    "A value that can be written but not read."

    def __reduce__(self):
        return _explode, ()


def _explode():
    raise ValueError("poison")


def poison(item):
    return Poison() if item == 1 else item


def threads(_):
    np.ones((50, 50)) @ np.ones((50, 50))
    return max(pool["num_threads"] for pool in threadpool_info())


def interrupt_itself(item):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return item


def told(outcomes):
    "What the outcomes say, without times and traces."
    return sorted((o.item, str(o.value), str(o.error)) for o in outcomes)


def alive(pids):
    "Processes of `pids` that still run."
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def gone_within(pids, seconds):
    "Wait until none of `pids` runs; whether that came true."
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)


def test_outcomes_do_not_depend_on_the_number_of_workers():
    one, three = (list(fan_out(touchy, range(1, 18), workers=n)) for n in (1, 3))
    assert told(one) == told(three) and len(one) == 17
    by_item = {o.item: o for o in three}
    assert by_item[4].ok and by_item[4].value == 16
    assert by_item[5].error == "DataError: close must be above 0 INR; found -1; in TCS"
    assert "in touchy" in by_item[5].traceback
    assert "cannot pickle" in by_item[10].error
    assert by_item[15].error == "SystemExit: no more"


def test_one_worker_in_a_process_of_its_own():
    (outcome,) = fan_out(linger, [0], backend="processes")
    assert outcome.value != os.getpid()
    (here,) = fan_out(linger, [0])
    assert here.value == os.getpid()


def test_no_items():
    assert list(fan_out(touchy, [], workers=3)) == list(fan_out(touchy, [])) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_workers_end_their_own_item_only(tmp_path, workers):
    deaths = []
    outcomes = fan_out(
        partial(deadly, folder=tmp_path),
        range(12),
        workers=workers,
        backend="processes",
        on_restart=lambda item, how: deaths.append((item, how)),
    )
    by_item = {o.item: o for o in outcomes}
    assert sorted(by_item) == list(range(12))
    assert [i for i, o in by_item.items() if not o.ok] == [3]
    assert by_item[4].value == 4
    assert by_item[3].error.startswith("WorkerDied: its process ended with SIGKILL(-9)")
    assert sorted(deaths) == [(3, "SIGKILL(-9)"), (3, "SIGKILL(-9)"), (4, "SIGKILL(-9)")]


def test_a_worker_killed_from_outside_while_idle_or_busy():
    outcomes, killed = fan_out(linger, [0.3] * 6, workers=2), 0
    values = []
    for outcome in outcomes:
        values.append(outcome)
        if killed < 2:
            os.kill(outcome.value, signal.SIGKILL)
            killed += 1
    assert len(values) == 6 and all(o.ok for o in values)


def test_a_death_while_the_answer_is_pickled_does_not_hang():
    begun = time.monotonic()
    (outcome,) = fan_out(half_written, [1], backend="processes")
    assert not outcome.ok and "SIGKILL" in outcome.error
    assert time.monotonic() - begun < 5


def test_outcomes_come_before_the_last_item_is_done():
    stream = fan_out(linger, [0, 0, 2.5, 0], workers=2)
    early = [next(stream).item for _ in range(3)]
    begun = time.monotonic()
    assert next(stream).item == 2.5 and early == [0, 0, 0]
    assert time.monotonic() - begun > 0.5  # it was still being worked on


def test_a_slow_reader_does_not_hold_the_workers_up():
    stream = fan_out(linger, [0.2] * 8, workers=2)
    next(stream)
    time.sleep(2)
    begun = time.monotonic()
    assert len(list(stream)) == 7
    assert time.monotonic() - begun < 0.6


def test_large_items_functions_and_results():
    table = np.arange(500_000)
    outcomes = list(fan_out(partial(np.add, table), [table, 1], workers=2))
    by_size = {np.size(o.item): o.value for o in outcomes}
    assert (by_size[500_000] == 2 * table).all() and (by_size[1] == table + 1).all()
    (outcome,) = fan_out(large, [3_000_000], backend="processes")
    assert outcome.value.nbytes == 3_000_000


@pytest.mark.parametrize("workers", [1, 2])
def test_a_value_that_cannot_be_read_is_one_failure(workers):
    outcomes = {o.item: o for o in fan_out(poison, [1, 2, 3], workers=workers)}
    assert outcomes[1].error == "result cannot be read: ValueError: poison"
    assert outcomes[2].ok and outcomes[3].ok


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_cannot_be_sent_is_one_failure(workers):
    lock = threading.Lock()
    outcomes = list(fan_out(str, [lock, 2], workers=workers))
    bad = next(o for o in outcomes if o.item is lock)
    assert bad.error.startswith("item cannot be sent: TypeError") and not bad.ok
    assert next(o for o in outcomes if o.item == 2).value == "2"


def test_a_local_function_is_carried():
    offset = 7
    assert {o.value for o in fan_out(lambda x: x + offset, [1, 2], workers=2)} == {8, 9}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_item_of_the_caller_is_not_changed(workers):
    item = [1]
    (outcome,) = fan_out(lambda x: x.append(2) or x, [item], workers, "auto")
    assert (item, outcome.value, outcome.item is item) == ([1], [1, 2], True)


@pytest.mark.parametrize("workers", [1, 2])
def test_numeric_libraries_use_one_thread(workers):
    assert [o.value for o in fan_out(threads, [0, 1], workers=workers)] == [1, 1]


def test_an_interrupt_of_a_worker_is_ignored():
    assert {o.value for o in fan_out(interrupt_itself, [1, 2], workers=2)} == {1, 2}


def test_leaving_early_kills_the_workers():
    before = set(psutil.Process().children(recursive=True))
    stream = fan_out(linger, [0, 60, 60], workers=2)
    first = next(stream)
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 3 and gone_within([first.value], 1)
    left = {p for p in set(psutil.Process().children(recursive=True)) - before if p.is_running()}
    assert not [p for p in left if "popen_loky_posix" in " ".join(p.cmdline())]


def test_leaving_just_when_an_item_is_sent():
    for _ in range(4):  # a thread of loky that dies here fails the test, by `pytestmark`
        stream = fan_out(abs, range(10_000), workers=2)
        for _ in range(20):
            next(stream)
        begun = time.monotonic()
        stream.close()
        assert time.monotonic() - begun < 3


def test_no_worker_is_left_after_a_whole_map():
    pids = {o.value for o in fan_out(linger, [0.1] * 4, workers=2)}
    assert len(pids) == 2 and not alive(pids)


def test_bad_calls_are_refused_at_once():
    for call in ({"workers": 0}, {"workers": 0, "backend": "threads"}, {"backend": "dask"}):
        with pytest.raises(SettingsError):
            fan_out(touchy, [1], **call)
    with pytest.raises(SettingsError, match="picklable"):
        fan_out(partial(touchy, threading.Lock()), [1])


def test_an_outcome_is_frozen():
    with pytest.raises(AttributeError):
        Outcome(1, 2, None, None, 0.0).value = 3


SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import time, os
from sensequant.core.fanout import fan_out
def work(seconds):
    time.sleep(seconds)
    return os.getpid()
for outcome in fan_out(work, [0, 0, 60, 60, 60], workers=2):
    print(outcome.value, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    "A running map in a session of its own, two items done, the workers busy."
    file = tmp_path / "map.py"
    file.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    workers = {int(process.stdout.readline()) for _ in range(2)}
    children = [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
    assert workers <= set(children) and len(children) >= 2
    yield process, children
    for pid in alive([process.pid, *children]):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_leaves_no_process_and_one_traceback(script):
    process, children = script
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert gone_within(children, 3)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_while_the_workers_start(tmp_path):
    file = tmp_path / "map.py"
    file.write_text(SCRIPT.replace("for outcome", "print('go', flush=True)\nfor outcome"))
    for wait in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        command = [sys.executable, str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, cwd=ROOT, **pipes) as process:
            assert process.stdout.readline() == "go\n"
            time.sleep(wait)
            children = [c.pid for c in psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=10)
            assert gone_within(children, 3)
            assert errors.count("Traceback") == 1, errors
            assert errors.rstrip().endswith("KeyboardInterrupt"), errors


def test_workers_do_not_outlive_a_killed_parent(script):
    process, children = script
    process.kill()
    assert gone_within(children, 4)


def test_threads_share_what_the_caller_has_and_need_no_pickling():
    lock, seen = threading.Lock(), []

    def work(item):
        with lock:
            seen.append(item)
        if item == 3:
            raise DataError("three must fail", item)
        return threading.get_ident()

    told = list(fan_out(work, range(8), 3, "threads"))
    assert sorted(seen) == list(range(8)) and len({o.value for o in told if o.ok}) <= 3
    assert [(o.item, o.error.split(":")[0]) for o in told if not o.ok] == [(3, "DataError")]


def test_threads_begin_nothing_once_nobody_reads():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.05)
        return item

    outcomes = fan_out(work, range(100), 2, "threads")
    next(outcomes)
    outcomes.close()
    seen = len(begun)
    time.sleep(0.2)
    assert len(begun) == seen <= 6
