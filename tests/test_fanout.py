"Fan-out with real processes: deaths, interrupts, large and unpicklable things."

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import alive, gone_within
from threadpoolctl import threadpool_info

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.fanout import Outcome, Rules, current_device, fan_out

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
    assert time.monotonic() - begun < 10


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
            # One error, and no worker's; a chained one where the signal fell into an `except`.
            chained = errors.count("During handling of the above exception")
            assert errors.count("Traceback") - chained == 1, errors
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


def sleepy(item):
    "Says what it is about to do and sleeps `item` seconds."
    print(f"waiting for {item}", flush=True)
    return linger(item)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_over_its_time_is_stopped_and_its_worker_goes_on(workers):
    begun, deaths = time.monotonic(), []
    rules = Rules(timeout_s=2, tries=3)
    items = [60, 0.1, 0.2, 0.3, 0.4]
    died = lambda *death: deaths.append(death)  # noqa: E731
    outcomes = {o.item: o for o in fan_out(sleepy, items, workers, on_restart=died, rules=rules)}
    late = outcomes.pop(60)
    assert late.error == "TimedOut: stopped after 2 s" and late.tries == 1 and not deaths
    assert late.detail["timeout_seconds"] == 2 and late.detail["stdout_tail"] == "waiting for 60\n"
    assert len(outcomes) == 4 and all(o.ok and o.tries == 1 for o in outcomes.values())
    assert len({o.value for o in outcomes.values()}) <= workers  # no other process was ended
    assert time.monotonic() - begun < 20


def test_after_a_stopped_item_the_worker_has_a_fresh_process():
    outcomes = list(fan_out(linger, [0, 60, 0.1], rules=Rules(timeout_s=1)))
    assert [o.ok for o in outcomes] == [True, False, True]
    assert outcomes[0].value != outcomes[2].value != os.getpid()


def moody(item, folder):
    "Fails in the way of its name and counts its tries in a file."
    with open(Path(folder) / item, "ab") as file:
        file.write(b".")
        tries = file.tell()
    if item == "value":
        raise ValueError("wrong for ever")
    if item == "data":
        raise DataError("close must be above 0 INR", -1)
    if item == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if item == "missing":
        Path(folder, "no such file").read_bytes()
    if item in ("net", "net for ever") and (tries < 3 or item != "net"):
        raise ConnectionError("reset")
    if item == "memory" and tries < 2:
        raise MemoryError("no room")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_only_what_may_pass_is_tried_again(tmp_path, workers):
    items = ["value", "data", "full", "missing", "net", "net for ever", "memory", "fine"]
    told = fan_out(partial(moody, folder=tmp_path), items, workers, rules=Rules(tries=3))
    tries = {o.item: (o.tries, o.ok) for o in told}
    once = dict.fromkeys(("value", "data", "full", "missing"), (1, False))
    more = {"net": (3, True), "net for ever": (3, False), "memory": (2, True), "fine": (1, True)}
    assert tries == once | more
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {
        i: n for i, (n, _) in tries.items()
    }


def test_the_detail_of_an_error():
    (outcome,) = fan_out(touchy, [5], rules=Rules(tries=1))
    assert outcome.detail == {"exception_type": "DataError", "traceback": outcome.traceback}


def venom(item, ending=0):
    "At 2 ends its process, and says so first; else squares."
    if item == 2:
        print("first", "words")
        print("last words", file=sys.stderr)
        os._exit(ending) if ending > 0 else os.kill(os.getpid(), -ending)
    time.sleep(0.1)
    return item * item


@pytest.mark.parametrize(
    ("ending", "how"), [(1, "EXIT(1)"), (-9, "SIGKILL(-9)"), (-11, "SIGSEGV(-11)")]
)
def test_a_poison_item_harms_no_other(ending, how):
    deaths, rules = [], Rules(tries=3)
    died = lambda *death: deaths.append(death)  # noqa: E731
    outcomes = list(
        fan_out(partial(venom, ending=ending), range(9), 2, on_restart=died, rules=rules)
    )
    bad = outcomes.pop()  # last, when the others were done
    assert [(o.item, o.value, o.tries) for o in sorted(outcomes, key=lambda o: o.item)] == [
        (i, i * i, 1) for i in range(9) if i != 2
    ]
    assert (bad.item, bad.tries, deaths) == (2, 3, [(2, how)] * 3)
    assert bad.error == f"WorkerDied: its process ended with {how}"
    assert bad.detail["exit_code"] == ending and bad.detail["ended"] == how
    assert bad.detail["stdout_tail"] == "first words\n"
    assert bad.detail["stderr"].startswith("last words\n")
    assert ("Segmentation fault" in bad.detail["stderr"]) == (
        ending == -11
    )  # a stack comes with it


def test_what_a_worker_prints_is_passed_on(capfd):
    list(fan_out(sleepy, [0, 0.1, 0.2], workers=2))
    assert sorted(capfd.readouterr().out.split()[2::3]) == ["0", "0.1", "0.2"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_values_in_any_order_and_number(workers):
    items = list(range(1, 18))
    random.Random(workers).shuffle(items)
    serial = told(fan_out(touchy, range(1, 18)))
    assert told(fan_out(touchy, items, workers, "processes")) == serial


def placed(item, folder):
    "Waits until as many workers as items are at work, and tells who and where it is."
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(os.listdir(folder)) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    return os.getpid(), current_device()


def test_workers_take_devices_in_turn(tmp_path):
    rules = Rules(devices=("gpu:0", "gpu:1"))
    outcomes = list(fan_out(partial(placed, folder=tmp_path), range(4), 4, rules=rules))
    places = dict(o.value for o in outcomes)
    assert len(places) == 4 and Counter(places.values()) == {"gpu:0": 2, "gpu:1": 2}


def replaced(item, folder):
    "The first dies, the second waits for the others, so the others have the place of the first."
    folder = Path(folder)
    (folder / f"{item}").write_text(str(current_device()))
    if item == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 60
    while item == 1 and not (folder / "3").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return current_device()


def test_a_replaced_worker_has_the_same_device(tmp_path):
    rules = Rules(devices=("gpu:0", "gpu:1"), tries=1)
    told = {
        o.item: o.value
        for o in fan_out(partial(replaced, folder=tmp_path), range(4), 2, rules=rules)
    }
    dead = (tmp_path / "0").read_text()
    assert (told[2], told[3]) == (dead, dead) and {dead, told[1]} == {"gpu:0", "gpu:1"}


def test_one_worker_has_the_first_device_and_gives_it_back():
    outcomes = fan_out(lambda _: current_device(), [1], rules=Rules(devices=("gpu:0", "gpu:1")))
    assert [o.value for o in outcomes] == ["gpu:0"] and current_device() is None


def test_rules_that_cannot_be_kept_are_refused(monkeypatch):
    for call in (
        {"backend": "threads", "rules": Rules(tries=3)},
        {"backend": "serial", "rules": Rules(timeout_s=1)},
        {"backend": "dask"},
    ):
        with pytest.raises(SettingsError):
            fan_out(touchy, [1], **call)
    with pytest.raises(SettingsError, match="tries must be at least 1"):
        Rules(tries=0)
    monkeypatch.setitem(sys.modules, "distributed", None)  # as when it is not installed
    with pytest.raises(SettingsError, match=r'pip install "sensequant\[dask\]"'):
        fan_out(touchy, [1], backend="dask", rules=Rules(scheduler="tcp://127.0.0.1:8786"))


# On Dask


def hosted(item):
    "Sleeps a little; its process, the Dask worker that holds it, its device and a square."
    time.sleep(0.3)
    return os.getpid(), os.getppid(), current_device(), item * item


def hostile(item):
    "Kills the Dask worker that holds its process."
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.slow
def test_dask_gives_the_same_as_serial(cluster, bounded):
    rules = Rules(scheduler=cluster)
    assert told(fan_out(touchy, range(1, 18), 1, "dask", rules=rules)) == told(
        fan_out(touchy, range(1, 18))
    )
    sizes = list(fan_out(large, [3_000_000, 10], 1, "dask", rules=rules))
    assert {o.item: o.value.nbytes for o in sizes} == {3_000_000: 3_000_000, 10: 10}
    lock = threading.Lock()
    strange = list(fan_out(str, [lock, 2], 1, "dask", rules=rules))
    assert sorted(str(o.value) for o in strange) == ["2", "None"]
    assert list(fan_out(abs, [], 1, "dask", rules=rules)) == []
    assert [o.value for o in fan_out(threads, [0], 1, "dask", rules=rules)] == [1]
    with pytest.raises(SettingsError, match="by path"):
        next(fan_out(partial(np.add, np.zeros(500_000)), [1], 1, "dask", rules=rules))


@pytest.mark.slow
def test_a_dask_worker_killed_in_the_middle_loses_nothing(cluster, bounded):
    rules = Rules(scheduler=cluster, devices=("gpu:0", "gpu:1"))
    outcomes, killed = [], 0
    for outcome in fan_out(hosted, range(12), 1, "dask", rules=rules):
        outcomes.append(outcome)
        if not killed:
            killed, place = outcome.value[1], outcome.value[2]
            os.kill(killed, signal.SIGKILL)
    assert {o.item: o.value[3] for o in outcomes} == {i: i * i for i in range(12)}
    assert all(o.ok and o.tries == 1 for o in outcomes)
    devices = {o.value[1]: o.value[2] for o in outcomes}
    other = ({"gpu:0", "gpu:1"} - {place}).pop()
    assert Counter(devices.values())[other] == 1  # the worker that lived kept its own
    assert gone_within([o.value[0] for o in outcomes], 3)


@pytest.mark.slow
def test_items_that_kill_hang_or_fail_on_dask(cluster, bounded, tmp_path):
    deaths, rules = [], Rules(scheduler=cluster, tries=3, timeout_s=5)
    died = lambda *death: deaths.append(death)  # noqa: E731
    *others, bad = fan_out(partial(venom, ending=7), range(9), 1, "dask", died, rules)
    assert sorted(o.value for o in others) == [i * i for i in range(9) if i != 2]
    assert (bad.item, bad.tries, bad.detail["exit_code"]) == (2, 3, 7)
    assert bad.detail["stderr"] == "last words\n" and deaths == [(2, "EXIT(7)")] * 3
    by_item = {o.item: o for o in fan_out(sleepy, [60, 0, 0.1], 1, "dask", rules=rules)}
    assert by_item[60].error == "TimedOut: stopped after 5 s" and by_item[60].tries == 1
    assert by_item[0].ok and by_item[0.1].ok
    moods = fan_out(partial(moody, folder=tmp_path), ["net", "value"], 1, "dask", rules=rules)
    assert {o.item: (o.tries, o.ok) for o in moods} == {"net": (3, True), "value": (1, False)}


@pytest.mark.slow
def test_an_item_that_kills_dask_workers_is_given_up(cluster, bounded):
    (outcome,) = fan_out(hostile, ["x"], 1, "dask", rules=Rules(scheduler=cluster))
    assert outcome.error.startswith("WorkerDied: Attempted to run task") and outcome.tries == 2
    assert outcome.detail["exception_type"] == "KilledWorker"


@pytest.mark.slow
def test_leaving_a_map_on_dask_ends_it_everywhere(cluster, bounded, capfd):
    rules = Rules(scheduler=cluster)
    stream = fan_out(hosted, range(500), 1, "dask", rules=rules)
    pids = [next(stream).value[0] for _ in range(4)]
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 10 and gone_within(pids, 2)
    (after,) = fan_out(hosted, [3], 1, "dask", rules=rules)  # and the cluster is free again
    assert after.value[3] == 9
    assert "ERROR" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("listens", [False, True])
def test_a_scheduler_that_does_not_answer_is_refused_soon(listens):
    pytest.importorskip("distributed")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        if listens:
            mute.listen()
        address, begun = f"tcp://127.0.0.1:{mute.getsockname()[1]}", time.monotonic()
        with pytest.raises(SettingsError, match="a Dask scheduler must answer") as refusal:
            next(fan_out(touchy, [1], 1, "dask", rules=Rules(scheduler=address)))
    assert address in str(refusal.value) and time.monotonic() - begun < 15
