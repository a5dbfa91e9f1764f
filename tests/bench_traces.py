"""What a trace costs, beside what the standard library needs for the same bytes."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from sensequant.core.types import IST
from sensequant.trading.traces import Trace, TraceRules, TraceWriter, read_traces

TRACES, FEATURES = 20_000, 22


def some_traces() -> list[Trace]:
    """As a backtest makes them, each with its features."""
    start = datetime(2024, 1, 15, 9, 15, tzinfo=IST)
    names = [f"feature_{k}" for k in range(FEATURES)]
    values = np.random.default_rng(1).normal(0, 1, (TRACES, FEATURES)).tolist()
    prices = (0.61, 2500.05, 2520.0, 1440.0, 0.0079)
    what = ("RELIANCE", "swing", "LONG", "LONG", *prices)
    return [
        Trace(start + timedelta(minutes=n), *what, dict(zip(names, row, strict=True)))
        for n, row in enumerate(values)
    ]


def bench_traces(folder: Path, watch) -> dict[str, float]:
    """Write, sample, compress and read; the promise is 0.1 ms a trace."""
    traces, amount = some_traces(), f"{TRACES:,} with {FEATURES} features"
    with watch.timed("traces written", amount) as plain, TraceWriter(folder / "plain") as writer:
        for trace in traces:
            writer.write(trace)
    rules = TraceRules(compress=True)
    with watch.timed("traces compressed", amount), TraceWriter(folder / "gz", rules) as packed:
        for trace in traces:
            packed.write(trace)
    few = TraceRules(sample_frac=0.1)
    with watch.timed("traces, a tenth", amount) as tenth, TraceWriter(folder / "few", few) as kept:
        for trace in traces:
            kept.write(trace)
    with watch.timed("traces read", amount) as read:
        read_traces(folder / "plain")
    with watch.timed("their JSON alone", amount) as floor:
        for trace in traces:
            json.dumps(trace.features)
    return {
        "ms a trace (CPU; at most 0.1 is promised)": 1000 * plain["cpu s"] / TRACES,
        "trace / its JSON alone (CPU)": plain["cpu s"] / floor["cpu s"],
        "ms a trace where a tenth is kept (CPU)": 1000 * tenth["cpu s"] / TRACES,
        "reading / writing traces (CPU)": read["cpu s"] / plain["cpu s"],
        "bytes of a trace / compressed": sum(f.stat().st_size for f in writer.files)
        / sum(f.stat().st_size for f in packed.files),
    }
