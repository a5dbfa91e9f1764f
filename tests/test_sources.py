"""What a run records of books and sentiment: what is there, never that a switch was on."""

from dataclasses import replace
from datetime import date, timedelta

import pandas as pd
import pytest

from sensequant.core.settings import load_settings
from sensequant.core.testing import random_bars
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore, between
from sensequant.data.books import Book, BookStore, Level
from sensequant.data.feeds import CsvFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import (
    Inputs,
    Run,
    actions_file,
    pin_bars,
    pin_inputs,
    pin_run,
    pin_sources,
    pinned_bars,
)
from sensequant.market.actions import ACTION_COLUMNS, read_actions
from sensequant.market.calendar import sessions

START, END = date(2024, 1, 1), date(2024, 1, 31)
DAYS = sessions(START, END)
INPUTS = Inputs(START, END, Interval.DAY, False, {"TCS": None, "INFY": None}, None)


@pytest.fixture
def run(tmp_path):
    "A run with a month of daily bars of two shares."
    made = Run("live_candidate_20240201_093000", tmp_path)
    for symbol in INPUTS.symbols:
        pin_bars(made, symbol, random_bars(len(DAYS)).set_axis(DAYS.rename("ts")))
    pin_inputs(made, INPUTS)
    return made


def book(symbol: str, day: pd.Timestamp, source: str) -> Book:
    "A book at noon."
    noon = (day + timedelta(hours=12)).to_pydatetime()
    return Book(symbol, noon, (Level(100.0, 5),), (Level(100.1, 5),), source)


def test_books_count_where_a_market_held_them(run):
    "Five sessions of one share with a real book, five with a simulated one, the rest with none."
    store = BookStore(run.home / "data" / "books")
    for n, day in enumerate(DAYS[:10]):
        store.append([book("TCS", day, "breeze" if n < 5 else "simulated")])
    table = pin_sources(run, INPUTS, load_settings(home=run.home))
    held = run.artifacts.read_json("sources.json")["order_book"]
    assert held["symbols"] == {"TCS": 5 / len(DAYS), "INFY": 0.0}
    assert table.loc["order book", "covered (%)"] == pytest.approx(100 * held["share"])


def test_bars_of_the_warm_up_are_not_counted(run):
    "The same books over a range that begins later: only its own bars are asked."
    store = BookStore(run.home / "data" / "books")
    for day in DAYS[:10]:
        store.append([book("TCS", day, "breeze")])
    later = replace(INPUTS, start=DAYS[8].date())
    pin_sources(run, later, load_settings(home=run.home))
    held = run.artifacts.read_json("sources.json")["order_book"]["symbols"]
    assert held == {"TCS": 2 / (len(DAYS) - 8), "INFY": 0.0}


def test_an_action_after_the_last_bar_read_changes_nothing(tmp_path):
    "A split announced for next week must not halve what is read today."
    store, halves = BarStore(tmp_path), {"price_factor": 0.5, "volume_factor": 2.0}
    bars = random_bars(len(DAYS)).set_axis(DAYS.rename("ts"))
    store.write("vendor", "TCS", Interval.DAY, bars)
    row = dict.fromkeys(ACTION_COLUMNS, "") | {"symbol": "TCS", "kind": "split"} | halves
    row |= {"ex_date": DAYS[10], "price_shift_inr": 0.0, "applies_to": "any"}
    table = pd.DataFrame([row | {"status": "confirmed"}])
    for end, changed in ((DAYS[9].date(), False), (DAYS[10].date(), True)):
        raw = store.read("vendor", "TCS", Interval.DAY, end=end)
        told = store.read("vendor", "TCS", Interval.DAY, end=end, adjust=table)
        assert (told["close"] != raw["close"]).any() == changed
        assert told["close"].iloc[-1] == raw["close"].iloc[-1]


def test_sentiment_is_said_to_cover_the_days_a_provider_spoke_for(run):
    "Headlines of one share: two thirds of nothing is still nothing for the other."
    path = run.home / "headlines.csv"
    lines = ["symbol,timestamp,headline"]
    lines += [f"TCS,{d.date()}T10:00:00+05:30,TCS wins large order" for d in DAYS[:10]]
    path.write_text("\n".join(lines) + "\n")
    own = load_settings(
        home=run.home, sentiment=True, sentiment_providers="csv", headlines_csv=path
    )
    pin_sources(run, INPUTS, own)
    said = run.artifacts.read_json("sources.json")["sentiment"]
    assert said["source"] == "csv" and 0 < said["share_with_items"] < 0.5
    assert {s["symbol"] for s in said["symbols"]} == {"TCS", "INFY"}


def test_a_switch_that_is_off_and_shares_that_do_not_exist_ask_nobody(run):
    for settings, inputs in (
        (load_settings(home=run.home), INPUTS),
        (load_settings(home=run.home, sentiment=True), replace(INPUTS, simulated=True)),
    ):
        pin_sources(run, inputs, settings)
        said = run.artifacts.read_json("sources.json")["sentiment"]
        assert (said["source"], said["share_covered"]) == ("none", 0.0)
    assert not (run.home / "data" / "sentiment").exists()


def test_confirmed_actions_are_applied_to_the_run_and_never_to_the_store(tmp_path):
    "A split of 1 to 2 that the vendor left in: halved before, volume doubled, listed by name."
    bars = random_bars(len(DAYS), volatility=0.01).set_axis(DAYS.rename("ts"))
    folder = tmp_path / "vendor"
    folder.mkdir()
    bars.rename_axis("timestamp").round(2).to_csv(folder / "TCS.csv")
    feed, store = CsvFeed(folder), BarStore(tmp_path / "data" / "bars")
    ingested = ingest(feed, store, ["TCS"], Interval.DAY, START, END)
    rows = {"symbol": "TCS", "ex_date": "2024-01-15", "kind": "split", "price_factor": 0.5}
    rows |= {"price_shift_inr": 0.0, "volume_factor": 2.0, "applies_to": "any"}
    known = rows | {"source": "test", "note": ""}
    both = [known | {"status": "confirmed"}]
    both += [known | {"status": "suspected", "ex_date": "2024-01-22"}]
    both += [known | {"status": "confirmed", "ex_date": "2024-02-05"}]  # after the last bar
    table = pd.DataFrame(both)[list(ACTION_COLUMNS)]
    table.to_csv(actions_file(tmp_path), index=False)
    assert len(read_actions(actions_file(tmp_path))) >= 2
    run = Run("live_candidate_20240201_093001", tmp_path)
    pin_run(run, store, ingested, START)
    raw, told = store.read(feed.name, "TCS", Interval.DAY), pinned_bars(run, "TCS")
    early, late = (
        between(told, *d) for d in ((None, date(2024, 1, 14)), (date(2024, 1, 15), None))
    )
    assert early["close"].tolist() == pytest.approx((raw["close"][: len(early)] / 2).tolist())
    assert early["volume"].tolist() == (raw["volume"][: len(early)] * 2).tolist()
    pd.testing.assert_frame_equal(late, raw[len(early) :])
    (applied,) = run.artifacts.read_json("actions.json")["applied"]
    assert (applied["symbol"], applied["ex_date"][:10]) == ("TCS", "2024-01-15")
