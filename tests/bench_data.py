"""Speed of the bar store, of the rules for every row, and of reading CSV: part of `make bench`."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.data.bars import BarStore
from sensequant.data.csv_bars import import_tree, read_csv_bars
from sensequant.market.calendar import sessions

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def intraday(first: date, last: date, step: int) -> pd.DataFrame:
    """Random bars of `step` minutes for every session of a range."""
    clock = (555 + np.arange(0, 375, step)) * 60_000_000
    stamps = (sessions(first, last).asi8[:, None] + clock).ravel().view("M8[us]")
    index = pd.DatetimeIndex(stamps, name="ts").tz_localize("UTC").tz_convert(IST)
    return random_bars(len(index), volatility=0.002).set_index(index)


def bench_store(folder: Path, watch: Any) -> dict[str, float]:
    """Time the store and the row rules; ratios to what pandas needs for the same files."""
    store, names, day, five = BarStore(folder), [f"S{n:02d}" for n in range(96)], "1day", "5minute"
    year, two = (date(2024, 1, 1), date(2024, 12, 31)), (date(2024, 1, 1), date(2024, 1, 5))
    for name in names:
        store.write("bench", name, day, random_bars(740))
        store.write("bench", name, five, intraday(*year, 5))
    files = [store.path("bench", n, day) for n in names]
    with watch.timed("read 96 symbols", "96 x 740 daily, checked") as read:
        for name in names:
            store.read("bench", name, day)
    with watch.timed("pandas alone, same files", "not checked") as floor:
        for file in files:
            pd.read_parquet(file)
    with watch.timed("read one range, 100 times", "130 of 740 daily") as one:
        for _ in range(100):
            store.read("bench", "S05", day, date(2025, 1, 1), date(2025, 6, 30))
    with watch.timed("read five-minute bars") as many:
        rows = sum(len(store.read("bench", n, five)) for n in names)
    many["amount"] = f"{rows:,} rows, checked"
    ratios = {
        "read 96 x 740 daily (CPU s; at most 0.2)": read["cpu s"],
        "the same / pandas alone (CPU)": read["cpu s"] / floor["cpu s"],
        "one symbol's range (CPU ms; at most 5)": 10 * one["cpu s"],
        "1.8 M five-minute rows (CPU s; at most 0.6)": many["cpu s"],
    }
    path = folder / "one_day.csv"
    intraday(*two, 1).loc["2024-01-02":"2024-01-02"].rename_axis("timestamp").to_csv(path)
    read_csv_bars(path, Interval.MINUTE_1)
    with watch.timed("read and check a day of minutes, 20 times", "375 rows of CSV") as minutes:
        for _ in range(20):
            read_csv_bars(path, Interval.MINUTE_1)
    ratios["one day of minutes from CSV (CPU ms; at most 20)"] = 50 * minutes["cpu s"]
    if DATA.is_dir():
        with watch.timed("import real CSV", "80 files, 112,661 rows") as imported:
            import_tree(store, "real", DATA / "nse_daily", Interval.DAY)
        ratios["80 real CSV imported (CPU s; at most 3)"] = imported["cpu s"]
    return ratios
