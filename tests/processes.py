"""Looking after processes that tests start. Imports little: workers import it with their items."""

import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def python(code, *arguments):
    "A real process that runs `code`."
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def results(processes):
    "The words that they printed; every one must end well."
    told = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), told
    return [out.split() for out, _ in told]


def alive(pids):
    "Processes of `pids` that still run."
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def gone_within(pids, seconds):
    "Wait until none of `pids` runs; whether that came true."
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)
