"The hold-out is read by nothing that trains, chooses or compares, and by the gate's view alone."

import os
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest

from sensequant.core.errors import GateError
from sensequant.core.ledger import check_series
from sensequant.core.settings import load_settings
from sensequant.core.types import IST, Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import (
    Run,
    actions_file,
    benchmark_returns,
    holdout_view,
    pin_run,
    pinned_bars,
    read_inputs,
)
from sensequant.features.feature_sets import pin_contexts, pinned_context
from sensequant.govern import judgement
from sensequant.learn.batch import BatchRules, train_students, train_teachers
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.tables import Recipe, WindowSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.actions import ACTION_COLUMNS
from sensequant.market.simulator import MarketSpec, simulate

FIRST, START, END = date(2022, 7, 1), date(2023, 1, 2), date(2024, 2, 29)
MARKET = MarketSpec(6, FIRST, END, 3, 0.3, late_listing_frac=0.0)
GROUPS = ("technical", "market")
RECIPE = Recipe(
    WindowSpec(window_days=90, window_step_days=90, min_window_bars=30),
    groups=GROUPS,
    teacher=TeacherSpec(n_estimators=10, learning_rate=0.1),
    scope="pooled",
    compare_scopes=True,
)


class Disturbed(SimulatedFeed):
    "The simulated market, with other prices from a day on."

    def __init__(self, spec, since):
        super().__init__(spec)
        self.since = pd.Timestamp(since, tz=IST)

    def fetch(self, *span):
        fetched = super().fetch(*span)
        bars = fetched.bars.copy()
        late = bars.index >= self.since
        noise = np.exp(np.random.default_rng(1).normal(0, 0.05, late.sum()).cumsum())
        prices = ["open", "high", "low", "close"]
        bars.loc[late, prices] = (bars.loc[late, prices].mul(noise, axis=0)).round(2)
        return replace(fetched, bars=bars)


def made(home, feed, holdout=40):
    "A run over a feed, its bars and context pinned, with an index beside it."
    run = Run("live_candidate_20240301_093000", home)
    store = BarStore(home / "data" / "bars")
    result = ingest(feed, store, feed.symbols(), Interval.DAY, FIRST, END)
    index = home / "NIFTY.csv"
    bars = simulate(MARKET).index_bars()
    bars.assign(date=bars.index.date).to_csv(index, index=False)
    with run.state as state:
        state.start_run(run.run_id, {}, os.getpid(), True)
    pin_run(run, store, result, START, index, holdout)
    pin_contexts(run, GROUPS)
    return run


def learned(run):
    "Everything phases 2 to 4 make of it."
    rules = BatchRules(1)
    train_teachers(run, RECIPE, rules)
    train_students(run, batch=rules)
    return {s: chain_predictions(run, RECIPE, s) for s in RECIPE.scopes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same market twice, the second with another hold-out."
    plain = made(tmp_path_factory.mktemp("plain"), SimulatedFeed(MARKET))
    since = read_inputs(plain).holdout
    other = made(tmp_path_factory.mktemp("other"), Disturbed(MARKET, since))
    return [(run, learned(run)) for run in (plain, other)]


def test_what_is_learned_and_said_does_not_depend_on_the_hold_out(runs):
    (plain, said), (other, said_too) = runs
    for scope in RECIPE.scopes:
        pd.testing.assert_frame_equal(said[scope], said_too[scope])
        assert said[scope]["ts"].max() < pd.Timestamp(read_inputs(plain).holdout, tz=IST)
    models = [{p: a.sha256 for p, a in r.artifacts.index().items()} for r in (plain, other)]
    learned_files = [p for p in models[0] if p.startswith(("teacher/", "student/", "bars/"))]
    assert len(learned_files) > 20
    differ = [p for p in learned_files if models[0][p] != models[1][p]]
    assert differ == []
    symbol = read_inputs(plain).symbols[0]
    ends = [pinned_bars(holdout_view(r), symbol)["close"].iloc[-1] for r in (plain, other)]
    assert ends[0] != ends[1]


def test_a_label_that_needs_the_hold_out_is_not_known(runs):
    (plain, said), _ = runs
    last = said["pooled"]["label_known_at"].max()
    assert last < pd.Timestamp(read_inputs(plain).holdout, tz=IST)


def test_the_view_says_the_same_of_what_lies_before_and_goes_on(runs):
    (plain, said), _ = runs
    opened = chain_predictions(holdout_view(plain), RECIPE)
    start = pd.Timestamp(read_inputs(plain).holdout, tz=IST)
    both = opened.merge(said["pooled"], on=["symbol", "ts"], suffixes=("", "_closed"))
    assert len(both) == len(said["pooled"])
    assert (both["score"] == both["score_closed"]).all()
    late = opened[opened["ts"] >= start]
    assert late["symbol"].nunique() == 6
    assert late["ts"].nunique() == 40 - RECIPE.label.horizon_days  # labels end with the bars
    assert late["window_label"].nunique() == 1  # the newest student, which saw none of them
    saw = plain.artifacts.read_json(f"student/{late['window_label'].iloc[0]}/metadata.json")
    assert pd.Timestamp(saw["saw_until"]) < start


def test_what_the_gate_reads_has_a_figure_but_for_the_last_horizon(runs):
    "The derivation of the shortest hold-out; benchmark returns are known no longer than scores."
    (plain, _), _ = runs
    series = judgement.holdout_series(plain, judgement.judge_plan(load_settings().model_dump()))
    known = series[["ic", "benchmark_return"]].notna().sum()
    assert len(series) == 40 and known["ic"] == 40 - RECIPE.label.horizon_days
    assert known["ic"] <= known["benchmark_return"] <= 40


def test_a_hold_out_of_which_nothing_is_said_is_read_as_days_in_cash(runs, monkeypatch):
    (plain, said), _ = runs
    monkeypatch.setattr(judgement, "chain_predictions", lambda *_: said["pooled"])
    series = judgement.holdout_series(plain, judgement.judge_plan(load_settings().model_dump()))
    whole = check_series(series)
    assert len(whole) == 40 and (whole["net_return"] == 0).all()
    assert whole[["ic", "benchmark_return"]].isna().all(axis=None)


def test_index_and_context_end_before_the_hold_out_too(runs):
    (plain, _), _ = runs
    inputs, view = read_inputs(plain), holdout_view(plain)
    start = pd.Timestamp(inputs.holdout, tz=IST)
    for run, reaches in ((plain, False), (view, True)):
        assert (benchmark_returns(run).index.max() >= start) == reaches
        context = pinned_context(run, inputs.symbols[0], GROUPS)
        assert (context.index_close.index.max() >= start) == reaches
        assert (read_inputs(run).end >= inputs.holdout) == reaches


def test_a_share_listed_inside_the_hold_out_is_left_out_with_a_warning(tmp_path):
    feed = SimulatedFeed(MARKET)
    fetch = feed.fetch

    def late(symbol, interval, start, end):
        got = fetch(symbol, interval, start, end)
        return replace(got, bars=got.bars.iloc[-10:]) if symbol == "SIM003" else got

    feed.fetch = late
    run = made(tmp_path, feed)
    assert "SIM003" not in read_inputs(run).symbols
    words = (run.folder / "events.jsonl").read_text()
    assert "its first bar lies in the hold-out" in words


def test_without_a_hold_out_there_is_no_view_of_it(tmp_path):
    run = made(tmp_path, SimulatedFeed(MARKET), holdout=0)
    assert read_inputs(run).holdout is None
    with pytest.raises(GateError, match="must hold sessions out"):
        holdout_view(run)


def test_an_action_inside_the_hold_out_changes_no_earlier_bar(tmp_path):
    names = {"symbol": "SIM001", "kind": "split", "status": "confirmed", "applies_to": "any"}
    rows = names | {"price_factor": 0.5, "price_shift_inr": 3.0, "volume_factor": 2.0}
    rows |= {"ex_date": "2024-02-05", "source": "test", "note": ""}
    plain, split = (tmp_path / n for n in ("plain", "split"))
    for home in (plain, split):
        home.mkdir()
    actions_file(split).parent.mkdir(parents=True)
    pd.DataFrame([rows])[list(ACTION_COLUMNS)].to_csv(actions_file(split), index=False)
    runs = [made(home, SimulatedFeed(MARKET)) for home in (plain, split)]
    pd.testing.assert_frame_equal(*(pinned_bars(run, "SIM001") for run in runs))
    whole = [pinned_bars(holdout_view(run), "SIM001")["close"] for run in runs]
    assert whole[1].iloc[0] == pytest.approx(whole[0].iloc[0] / 2 + 3, abs=0.01)
    assert whole[1].iloc[-1] == whole[0].iloc[-1]
    assert runs[1].artifacts.read_json("actions.json")["applied"]
