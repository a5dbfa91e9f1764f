"""Fixtures for all tests: no test reads or writes the clone's own data, runs, reports or settings,
and one small finished run is shared by every test that only looks at it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from processes import gone_within

from sensequant.core.settings import load_settings

# A shell that starts the tests in the background leaves SIGINT ignored, and so would every process
# that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]

# Three shares, one listed late, six windows each, a few trees: about half a minute, nearly all of
# it the start of seven kernels. The planted signal is strong enough to pass the gate.
MARKET = {"sim_symbols": 10, "signal_ic": 0.4, "start": "2022-07-01", "end": "2024-02-29"}
WINDOWS = {"window_days": 90, "window_step_days": 90, "min_window_bars": 30}
MODELS = {"teacher_n_estimators": 20, "teacher_learning_rate": 0.1}
JUDGE = {"bootstrap_samples": 200, "min_oos_sessions": 60, "holdout_sessions": 60, "propose": True}
SMALL = MARKET | WINDOWS | MODELS | JUDGE
SYMBOLS = ["SIM001", "SIM002", "SIM010"]


def isolate(patch, folder):
    "Point the settings to a home and a `.env` below `folder`; neither is there yet."
    for name in [n for n in os.environ if n.upper().startswith("SENSEQUANT_")]:
        patch.delenv(name)
    patch.setenv("SENSEQUANT_HOME", str(folder / "home"))
    patch.setenv("SENSEQUANT_ENV_FILE", str(folder / ".env"))


# The files that take longest, longest first. Two cores then end at about the same time, which they
# do not when one is left with whole runs while the other has run out of files.
LONGEST = ("run", "run_breeze", "batch", "breeze", "bad_input", "train_cli", "notebooks")


def pytest_collection_modifyitems(items):
    "Begin with the longest files; the order within a file stays."
    turns = {f"test_{name}": turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))


@pytest.fixture(scope="session", autouse=True)
def own_session(tmp_path_factory):
    "Fixtures shared between tests have a home of their own."
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("session"))
        yield


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    "Every test has a home of its own."
    isolate(monkeypatch, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    "A small run that reached its verdict, with one worker; to be looked at, never changed."
    # Here, not above: workers import this file with the items of the fan-out's tests.
    from sensequant.ops.orchestrator import begin_run, go_on, run_config

    config = run_config(load_settings(workers=1, **SMALL), SYMBOLS)
    ended = go_on(begin_run(config, tmp_path_factory.mktemp("finished")))
    assert ended.status == "success", ended.message
    return ended.run


@pytest.fixture
def copied_run(finished_run, tmp_path):
    "The same run in a home of its own, to be damaged and mended."
    from sensequant.data.runs import Run

    shutil.copytree(finished_run.home, tmp_path / "copy")
    return Run(finished_run.run_id, tmp_path / "copy")


@pytest.fixture(scope="session")
def fat_tails():
    "Two series of 500 fat-tailed returns: a strategy and a market."
    index = pd.bdate_range("2022-01-03", periods=500)
    draw = {
        seed: np.random.default_rng(seed).standard_t(5, 500) * 0.01 + drift
        for seed, drift in ((11, 0.0005), (12, 0.0003))
    }
    return pd.Series(draw[11], index), pd.Series(draw[12], index)


# A Dask cluster: a scheduler and two workers, all processes of their own, on the loopback only.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def bounded():
    "No test waits for a cluster longer than two minutes."

    def late(*_):
        raise TimeoutError("the cluster took more than 120 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "The address of a scheduler with two workers, each one thread; all are gone afterwards."
    pytest.importorskip("distributed")
    folder, port = tmp_path_factory.mktemp("dask"), free_port()
    address = f"tcp://127.0.0.1:{port}"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
        "DASK_TEMPORARY_DIRECTORY": str(folder),
        "TMPDIR": str(folder),
    }
    here = ["--host", "127.0.0.1", "--no-dashboard"]
    commands = [["scheduler", *here, "--port", str(port)]]
    commands += [["worker", address, *here, "--nthreads", "1"]] * 2
    started = []
    with open(folder / "log", "wb") as log:
        for name, *options in commands:
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *options]
            streams = {"stdout": log, "stderr": log, "start_new_session": True}
            started.append(subprocess.Popen(command, env=environment, cwd=folder, **streams))
    yield address
    family = [c.pid for p in started for c in psutil.Process(p.pid).children(recursive=True)]
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert gone_within(family, 10)
    assert not list(folder.glob("fan_out-*"))
