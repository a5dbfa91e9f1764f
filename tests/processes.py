"""Looking after processes that tests start. Imports little: workers import it with their items."""

import time

import psutil


def alive(pids):
    "Processes of `pids` that still run."
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]


def gone_within(pids, seconds):
    "Wait until none of `pids` runs; whether that came true."
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pids)
