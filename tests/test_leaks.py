"""Controls that a leaking pipeline fails, on markets whose truth is known.

A shuffled label would not find a leak that lives on overlapping labels, so labels are shifted in a
circle: their autocorrelation stays, their link to the features goes.
"""

import json
from datetime import date

import numpy as np
import pandas as pd
import pytest

from sensequant.backtest.backtester import LongFlatRule, long_flat
from sensequant.backtest.metrics import rank_ic
from sensequant.core.types import Interval
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs, pinned_bars
from sensequant.features.windows import first_after, purged_folds
from sensequant.learn import batch
from sensequant.learn.batch import WindowSpec, train_students, train_teachers
from sensequant.learn.predictions import chain_predictions, score_predictions
from sensequant.learn.student import StudentSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.simulator import MarketSpec, simulate

START, END = date(2022, 1, 1), date(2024, 3, 28)
SPEC = WindowSpec(180, 180)
TREES = TeacherSpec(n_estimators=25, learning_rate=0.1)


def made(folder, bars, spec=SPEC, end=END):
    "A run over these bars, trained, with its predictions."
    run = Run("live_candidate_20240101_093000", folder)
    for symbol, frame in bars.items():
        pin_bars(run, symbol, frame)
    pin_inputs(run, Inputs(START, end, Interval.DAY, True, dict.fromkeys(bars), None))
    with run.state as state:
        state.start_run(run.run_id, {}, 1, True)
    train_teachers(run, spec, TREES)
    students = train_students(run, (spec, TREES, StudentSpec()))
    return run, students, chain_predictions(run, spec)


def market(symbols=6, ic=0.4, seed=7):
    "Bars by symbol of a simulated market with its warm-up; nobody lists late."
    spec = MarketSpec(symbols, date(2021, 7, 5), END, seed, ic, late_listing_frac=0.0)
    made_up = simulate(spec)
    return {s: made_up.bars(s) for s in made_up.symbols}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A market with a strong signal, and what the pipeline makes of it."
    bars = market()
    return bars, *made(tmp_path_factory.mktemp("planted"), bars)


def test_a_planted_signal_is_found(planted):
    *_, predictions = planted
    found = rank_ic(predictions, 5)
    assert found.mean > 0.1 and found.t > 3
    assert score_predictions(predictions)["auc"] > 0.54


@pytest.mark.slow
@pytest.mark.parametrize("shift", [40, 130, 250])
def test_labels_shifted_in_a_circle_leave_nothing_to_find(planted, tmp_path, monkeypatch, shift):
    bars, *_ = planted
    whole = batch.label_table

    def shifted(frame, interval, spec):
        "The same features beside labels of other days, each known when its row's own would be."
        table = whole(frame, interval, spec)
        for column in ("label", "forward_return"):
            known = table[column].notna()
            table.loc[known, column] = np.roll(table.loc[known, column].to_numpy(), shift)
        return table

    monkeypatch.setattr(batch, "label_table", shifted)
    *_, predictions = made(tmp_path, bars)
    found = rank_ic(predictions, 5)
    assert abs(found.t) < 3 and abs(found.mean) < 0.08
    assert abs(score_predictions(predictions)["auc"] - 0.5) < 0.03


@pytest.mark.slow
def test_a_null_market_holds_nothing(tmp_path):
    means = []
    for seed in range(21, 27):
        *_, predictions = made(tmp_path / str(seed), market(ic=0.0, seed=seed))
        means.append(rank_ic(predictions, 5).mean)
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means)) < 3 * error


def test_garbage_after_a_window_changes_neither_its_models_nor_what_was_said_before(
    planted, tmp_path
):
    bars, run, students, predictions = planted
    symbol = "SIM003"
    mine = [r for r in students if r.symbol == symbol and r.status == "success"]
    cut = pd.Timestamp(mine[1].saw_until)
    rng, ruined = np.random.default_rng(3), bars[symbol].copy()
    later = ruined.index > cut
    noise = np.exp(np.cumsum(rng.normal(0, 0.05, later.sum())))[:, None]
    ruined.loc[later, ["open", "high", "low", "close"]] *= noise
    other, others, said = made(tmp_path, {symbol: ruined})
    for record in mine[:2]:
        twin = next(r for r in others if r.window_label == record.window_label)
        assert twin.artifacts == record.artifacts
        kept = f"teacher/{record.window_label}/model.txt.zst"
        assert other.artifacts.sha256(kept) == run.artifacts.sha256(kept)
    early = predictions[(predictions["symbol"] == symbol) & (predictions["ts"] <= cut)]
    again = said[said["ts"] <= cut]
    columns = ["ts", "window_label", "p_long", "p_short", "score"]
    pd.testing.assert_frame_equal(
        early[columns].reset_index(drop=True), again[columns].reset_index(drop=True)
    )
    third = next(r for r in others if r.window_label == mine[2].window_label)
    assert third.artifacts != mine[2].artifacts  # the garbage did reach what came later


def test_other_symbols_change_nothing(planted, tmp_path):
    bars, _, _, predictions = planted
    *_, alone = made(tmp_path, {"SIM002": bars["SIM002"]})
    held = predictions[predictions["symbol"] == "SIM002"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, held)


def test_every_scored_bar_is_later_than_all_that_its_models_learned_from(planted):
    _, run, students, predictions = planted
    assert not predictions.duplicated(["symbol", "ts"]).any()
    for record in (r for r in students if r.status == "success"):
        rows = run.artifacts.read_parquet(f"teacher/{record.window_label}/labels.parquet")
        said = predictions[predictions["window_label"] == record.window_label]
        learned = rows[["label_known_at", "teacher_saw_until"]].max().max()
        assert said["ts"].min() > learned == pd.Timestamp(record.saw_until)
        day = first_after(date.fromisoformat(record.end_date))
        assert rows.index.max() < day <= said["ts"].min()
        about = run.artifacts.read_json(f"student/{record.window_label}/metadata.json")
        assert json.loads(about["settings"][0]) == SPEC.__dict__


@pytest.mark.parametrize("step", [90, 180, 220])
def test_chained_students_never_speak_twice_and_the_last_speaks_to_the_end(planted, tmp_path, step):
    bars, *_ = planted
    spec = WindowSpec(180, step)
    run, students, predictions = made(tmp_path, {"SIM001": bars["SIM001"]}, spec)
    saw = {r.window_label: pd.Timestamp(r.saw_until) for r in students if r.status == "success"}
    assert not predictions["ts"].duplicated().any() and predictions["ts"].is_monotonic_increasing
    assert (predictions["ts"] > predictions["window_label"].map(saw)).all()
    assert predictions["window_label"].is_monotonic_increasing
    labelled = pinned_bars(run, "SIM001").index[-1 - SPEC.horizon_days]
    if labelled > saw[max(saw)]:
        assert predictions["window_label"].iloc[-1] == max(saw)
        assert predictions["ts"].iloc[-1] == labelled
    assert predictions["label_known_at"].max().date() <= END


def spans_apart(ts, known_at, train, test):
    "Whether no training label span touches a tested one."
    starts, ends = ts.to_numpy(), pd.DatetimeIndex(known_at).to_numpy()
    first, last = starts[test].min(), ends[test].max()
    return not ((starts[train] <= last) & (ends[train] >= first)).any()


def test_folds_never_touch_and_a_splitter_without_the_purge_is_caught(planted):
    bars, *_ = planted
    rng = np.random.default_rng(0)
    for _ in range(30):
        horizon, n = int(rng.integers(1, 15)), int(rng.integers(60, 200))
        labels = batch.label_table(bars["SIM004"], Interval.DAY, WindowSpec(horizon_days=horizon))
        rows = labels.dropna().iloc[:n]
        folds = purged_folds(rows.index, rows["label_known_at"], int(rng.integers(2, 8)))
        assert sorted(np.concatenate([t for _, t in folds])) == list(range(len(rows)))
        for train, test in folds:
            assert spans_apart(rows.index, rows["label_known_at"], train, test)
            rest = np.setdiff1d(np.arange(len(rows)), test)
            assert not spans_apart(rows.index, rows["label_known_at"], rest, test)


def moved(predictions, bars, by):
    "The same scores, said `by` bars later."
    parts = []
    for symbol, rows in predictions.groupby("symbol"):
        index = bars[symbol].index
        place = index.get_indexer(rows["ts"]) + by
        parts.append(rows.assign(ts=index[np.clip(place, 0, len(index) - 1)]))
    return pd.concat(parts).drop_duplicates(["symbol", "ts"])


def test_an_oracle_gains_massively_and_delay_costs(planted):
    bars, _, _, predictions = planted
    rule = LongFlatRule(cost_bps_per_side=0.0)
    honest = long_flat(predictions, bars, rule)["net_return"].mean()
    late = long_flat(moved(predictions, bars, 3), bars, rule)["net_return"].mean()
    tomorrow = {
        (s, t): r
        for s, b in bars.items()
        for t, r in (b["close"] / b["open"] - 1).shift(-1).items()
    }
    keys = zip(predictions["symbol"], predictions["ts"], strict=True)
    knowing = predictions.assign(score=[np.sign(tomorrow[k]) for k in keys])
    oracle = long_flat(knowing, bars, rule)["net_return"].mean()
    assert oracle > 2 * honest and honest > 1.3 * late
