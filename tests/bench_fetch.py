"""Whether fetching is limited by what the broker allows, or by us: part of `make bench`."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr

from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.breeze import Allowance, BreezeClient, Credentials, RetryPolicy
from sensequant.data.coverage import Span
from sensequant.data.feeds import BreezeFeed
from sensequant.data.ingest import FetchPlan, fill
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.market.breeze_protocol import Endpoints
from sensequant.market.simulator import MarketSpec

MARKET = MarketSpec(330, date(2021, 1, 1), date(2024, 6, 28), late_listing_frac=0.0)
ALLOWED, MINUTES = 3_600, 2  # requests a minute, sixty times the default of 60; whole minutes


def serve(pipe: Connection, spec: SandboxSpec) -> None:
    """A sandbox that runs until asked when each request came, s since 1970, and what was wrong."""
    with Sandbox(spec) as sandbox:
        pipe.send((sandbox.url, sandbox.credentials))
        pipe.recv()
        pipe.send([(r.time.timestamp(), r.error) for r in sandbox.log])


@contextmanager
def broker_elsewhere(spec: SandboxSpec) -> Iterator[tuple[Endpoints, Credentials, Callable]]:
    """A sandbox in another process: its address, our credentials, and what ends it with its log."""
    spawned = multiprocessing.get_context("spawn")
    ours, theirs = spawned.Pipe()
    broker = spawned.Process(target=serve, args=(theirs, spec), daemon=True)
    broker.start()

    def close() -> list[tuple[float, str]]:
        ours.send("close")
        return ours.recv()

    try:
        url, secrets = ours.recv()
        yield Endpoints.at(url), Credentials(*map(SecretStr, secrets)), close
    finally:
        broker.terminate()
        broker.join()


def busiest_minute(times: np.ndarray) -> int:
    """Most requests in any 60 s; `times` in s, sorted."""
    return int((np.arange(len(times)) - times.searchsorted(times - 60, side="right") + 1).max())


def bench_fetch(folder: Path, watch: Any) -> dict[str, float]:
    """Fill a store through the whole way with four threads, as the broker counts it."""
    spec = SandboxSpec(MARKET, calls_per_minute=ALLOWED, calls_per_day=10**6)
    with broker_elsewhere(spec) as (endpoints, secrets, close):
        allowance = Allowance(folder / "allowance.db", ALLOWED, 10**6)
        feed = BreezeFeed(BreezeClient(secrets, endpoints, allowance, RetryPolicy(3, 0.1, 30.0)))
        wanted = dict.fromkeys(feed.symbols(), Span(Interval.DAY, MARKET.start, MARKET.end))
        plan, cpu = FetchPlan(chunk_days=56), time.process_time()
        with watch.timed("fetch at 3,600 requests a minute, 4 threads") as row:
            done = fill(feed, BarStore(folder), wanted, plan, workers=4)
        cpu = time.process_time() - cpu
        log = close()
    row["amount"] = f"{done.requests:,} requests, {done.rows:,} daily bars stored"
    times = np.sort([moment for moment, _ in log])
    kept = int((times < times[0] + 60 * MINUTES).sum())
    failed = sum(bool(error) for _, error in log) + done.count("failed", "unstored")
    return {
        "requests sent / allowed, 2 minutes (at least 0.95)": kept / (ALLOWED * MINUTES),
        "busiest minute / allowed (at most 1)": busiest_minute(times) / ALLOWED,
        "one request, fetched and stored (CPU ms)": 1000 * cpu / done.requests,
        "requests refused or failed": float(failed),
    }
