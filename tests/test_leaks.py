"""Controls that a leaking pipeline fails, on markets whose truth is known.

A shuffled label would not find a leak that lives on overlapping labels, so labels are shifted in a
circle: their autocorrelation stays, their link to the features goes. What a model knew is worked
out here from the bars alone, not read from `label_known_at`: a wrong record cannot excuse itself.
"""

from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from sensequant.backtest.accounts import trade_scores
from sensequant.backtest.metrics import ic_by_date, rank_ic
from sensequant.core.testing import test_causal as require_causal
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs, pin_run, pinned_bars
from sensequant.features.feature_sets import Context
from sensequant.features.features import TECHNICAL
from sensequant.features.labels import LabelSpec, forward_labels
from sensequant.features.windows import Window, first_after, purged_folds
from sensequant.learn import batch, tables
from sensequant.learn.batch import train_students, train_teachers
from sensequant.learn.predictions import chain_predictions
from sensequant.learn.records import WindowRecord, read_window_runs, turns
from sensequant.learn.tables import (
    POOLED,
    Recipe,
    WindowSpec,
    learning_table,
    panel_rows,
    table_names,
)
from sensequant.learn.teacher import TeacherSpec, fit_teacher, out_of_fold, pack_teacher
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.trading.risk import Rules
from sensequant.trading.strategies import Model

START, END = date(2022, 1, 1), date(2024, 3, 28)
TREES = TeacherSpec(n_estimators=25, learning_rate=0.1)
RECIPE = Recipe(WindowSpec(180, 180), teacher=TREES)
TOGETHER = replace(RECIPE, scope="pooled")
SCOPES = ("symbol", "pooled")
# Of a prediction, before hindsight.
SAID = ["ts", "window_label", "p_long", "p_short", "score", "dissimilarity"]
ACCOUNT = Rules(capital_inr=1e7, max_volume_frac=1.0)  # charges are looked away from below


def cut_by(days, step, horizon=5):
    "A recipe with other windows and labels."
    label = LabelSpec(horizon_days=horizon)
    return replace(RECIPE, window=WindowSpec(days, step), label=label)


def taught(folder, bars, recipe=RECIPE, start=START, end=END, interval=Interval.DAY):
    "A run over these bars with its teachers and students."
    run = Run("live_candidate_20240101_093000", folder)
    for symbol, frame in bars.items():
        pin_bars(run, symbol, frame)
    pin_inputs(run, Inputs(start, end, interval, True, dict.fromkeys(bars), None))
    with run.state as state:
        state.start_run(run.run_id, {}, 1, True)
    train_teachers(run, recipe)
    return run, train_students(run)


def made(folder, bars, recipe=RECIPE, **inputs):
    "A run over these bars, trained, with the predictions of the judged scope."
    run, students = taught(folder, bars, recipe, **inputs)
    return run, students, chain_predictions(run, recipe)


def models(run, symbol):
    """By window: hashes of everything a teacher left, and of its student's model. How a student
    did later and until when it was scored stand in other files."""
    hashes = {}
    for kind in ("teacher", "student"):
        for record in read_window_runs(run, kind):
            if record.symbol == symbol and record.status == "success":
                held = {p: h for p, h in record.artifacts.items() if keeps(p)}
                hashes.setdefault(record.window_label, {}).update(held)
    assert all(len(h) == 7 for h in hashes.values())
    return hashes


def keeps(path):
    "Whether a file must not depend on what comes after its window."
    return path.startswith("teacher/") or path.endswith("student.model")


def market(symbols=6, ic=0.4, seed=7, end=END):
    "Bars by symbol of a simulated market with its warm-up; nobody lists late."
    spec = MarketSpec(symbols, date(2021, 7, 5), end, seed, ic, late_listing_frac=0.0)
    made_up = simulate(spec)
    return {s: made_up.bars(s) for s in made_up.symbols}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A market with a strong signal, and what the pipeline makes of it."
    bars, recipe = market(), replace(RECIPE, compare_scopes=True)
    return bars, *made(tmp_path_factory.mktemp("planted"), bars, recipe)


@pytest.fixture(scope="module")
def pooled(planted):
    "What the models of all symbols together say of the same market."
    return chain_predictions(planted[1], RECIPE, "pooled")


@pytest.fixture(scope="module")
def half_hours():
    "Bars of 30 minutes around the Diwali of 2022, whose one session began at 18:15."
    spec = MarketSpec(2, date(2022, 8, 1), date(2022, 12, 15), 3, 0.0, late_listing_frac=0.0)
    made_up = simulate(spec)
    return {s: made_up.bars(s, Interval.MINUTE_30) for s in made_up.symbols}


# --- what is out of sample ------------------------------------------------------------------------


def directional(predictions):
    "The predictions whose outcome had a direction."
    return predictions[predictions["label"] != "NOOP"]


def auc(predictions):
    "How well the score tells LONG from SHORT; NOOP would only ask about volatility."
    rows = directional(predictions)
    return roc_auc_score(rows["label"] == "LONG", rows["score"])


def uplift(predictions):
    "Right directions less what each symbol's shares alone make right by chance."
    rows = directional(predictions)
    rose, said = rows["label"] == "LONG", rows["score"] > 0
    by = rows["symbol"]
    p, q = (x.groupby(by).transform("mean") for x in (rose, said))
    return ((rose == said) - (p * q + (1 - p) * (1 - q))).mean()


def mean_ic(predictions):
    "Mean rank correlation across symbols."
    return ic_by_date(predictions).mean()


def with_error(figure, predictions, blocks=20):
    "A figure and its jackknife error, leaving out a stretch of sessions of all symbols each time."
    days = np.array_split(np.sort(predictions["ts"].unique()), blocks)
    left = np.array([figure(predictions[~predictions["ts"].isin(block)]) for block in days])
    error = np.sqrt((blocks - 1) / blocks * ((left - left.mean()) ** 2).sum())
    return figure(predictions), error


@pytest.mark.parametrize("scope", SCOPES)
def test_a_planted_signal_is_found(planted, pooled, scope):
    predictions = pooled if scope == "pooled" else planted[-1]
    found = rank_ic(predictions, 5)
    assert found.mean > 0.1 and found.t > 4
    for figure, nothing in ((auc, 0.5), (uplift, 0.0), (mean_ic, 0.0)):
        value, error = with_error(figure, predictions)
        assert value > nothing + 4 * error, figure.__name__


SHIFTS = (-40, -20, 85, 130, 250)


def shifted_by(shift):
    "What makes a table of the same features beside labels of other days, each known as its row's."
    whole = tables.learning_table

    def shifted(frame, context, recipe):
        table = whole(frame, context, recipe)
        known = table["label"].notna()
        for column in ("label", "forward_return"):
            table.loc[known, column] = np.roll(table.loc[known, column].to_numpy(), shift)
        return table

    return shifted


@pytest.mark.slow
def test_labels_shifted_in_a_circle_leave_nothing_to_find(planted, pooled, tmp_path, monkeypatch):
    """A label from later days (shift below 0) need only be three horizons away. One from earlier
    days must lie beyond the 60 bars that the features remember: nearer, they know it rightly. A
    jackknife's error is rough itself, and the true one is the same for each shift: so their mean
    square is used."""
    bars, recipe = planted[0], replace(RECIPE, compare_scopes=True)
    honest, found = {"symbol": planted[-1], "pooled": pooled}, {}
    for shift in SHIFTS:
        with monkeypatch.context() as patch:
            patch.setattr(tables, "learning_table", shifted_by(shift))
            run, *_ = taught(tmp_path / str(shift), bars, recipe)
            said = {scope: chain_predictions(run, recipe, scope) for scope in SCOPES}
        for scope, predictions in said.items():
            assert len(predictions) == len(honest[scope])
            assert abs(rank_ic(predictions, 5).t) < 3.5, (scope, shift)
            for figure, nothing in ((auc, 0.5), (uplift, 0.0), (mean_ic, 0.0)):
                value, error = with_error(figure, predictions)
                found.setdefault((scope, figure.__name__), []).append((value - nothing, error))
    for name, pairs in found.items():
        values, errors = np.array(pairs).T
        error = np.sqrt((errors**2).mean())
        assert abs(values).max() < 3 * error, (name, pairs)
        assert abs(values.mean()) < 3 * error / np.sqrt(len(SHIFTS)), (name, pairs)


@pytest.mark.slow
def test_null_markets_hold_nothing(tmp_path):
    "Six markets taken together, for both scopes."
    recipe = replace(RECIPE, compare_scopes=True)
    runs = [
        taught(tmp_path / str(seed), market(ic=0.0, seed=seed), recipe)[0] for seed in range(21, 27)
    ]
    for scope in SCOPES:
        said = [chain_predictions(run, recipe, scope) for run in runs]
        for figure in (auc, uplift, mean_ic):
            value, error = np.array([with_error(figure, p) for p in said]).T
            mean, of_mean = value.mean(), np.sqrt((error**2).sum()) / len(error)
            none = 0.5 if figure is auc else 0.0
            assert abs(mean - none) < 2.5 * of_mean, (scope, figure.__name__)


# --- what a model may know ------------------------------------------------------------------------


def garbled(bars, after, seed=3):
    "The same bars with prices and volumes made up from the first bar later than `after`."
    rng, ruined = np.random.default_rng(seed), bars.copy()
    later = ruined.index > after
    noise = np.exp(np.cumsum(rng.normal(0, 0.05, later.sum())))[:, None]
    ruined.loc[later, ["open", "high", "low", "close"]] *= noise
    ruined.loc[later, "volume"] = rng.integers(1, 10**7, later.sum())
    return ruined


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_garbage_after_a_window_changes_neither_its_models_nor_what_was_said_before(
    planted, tmp_path, turn
):
    bars, run, students, predictions = planted
    symbol = "SIM003"
    mine = [r for r in students if r.symbol == symbol and r.status == "success"]
    cut = pd.Timestamp(mine[turn].saw_until)
    other, _, said = made(tmp_path, {symbol: garbled(bars[symbol], cut)})
    held, again = models(run, symbol), models(other, symbol)
    for record in mine[: turn + 1]:
        assert again[record.window_label] == held[record.window_label]
    early = predictions[(predictions["symbol"] == symbol) & (predictions["ts"] <= cut)]
    again_said = said[said["ts"] <= cut]
    assert len(early) >= 50 * turn
    pd.testing.assert_frame_equal(early[SAID].reset_index(drop=True), again_said[SAID])
    later = mine[turn + 1].window_label
    assert not set(again[later].values()) & set(held[later].values())


@pytest.mark.parametrize("whose", ["all", "others"])
@pytest.mark.parametrize("turn", [0, 2])
def test_garbage_after_a_window_of_all_changes_neither_their_model_nor_what_was_said_before(
    planted, pooled, tmp_path, turn, whose
):
    "The model of all symbols together: later bars of any of them do not matter."
    bars, run, students, _ = planted
    mine = [r for r in students if r.symbol == POOLED and r.status == "success"]
    cut = pd.Timestamp(mine[turn].saw_until)
    kept = [] if whose == "all" else ["SIM003"]
    ruined = {
        s: b if s in kept else garbled(b, cut, seed=k) for k, (s, b) in enumerate(bars.items())
    }
    other, _, said = made(tmp_path, ruined, TOGETHER)
    held, again = models(run, POOLED), models(other, POOLED)
    for record in mine[: turn + 1]:
        assert again[record.window_label] == held[record.window_label]
    early, again_said = (p[p["ts"] <= cut].reset_index(drop=True) for p in (pooled, said))
    assert len(early) >= 300 * turn
    pd.testing.assert_frame_equal(early[["symbol", *SAID]], again_said[["symbol", *SAID]])
    later = mine[turn + 1].window_label
    assert not set(again[later].values()) & set(held[later].values())


@pytest.mark.parametrize("place", [0.2, 0.7])
def test_what_was_said_stays_whatever_comes_after(planted, tmp_path, place):
    "A cut in the middle of a student's turn: the same opinions up to it, others from the next bar."
    bars, _, _, predictions = planted
    symbol = "SIM003"
    held = predictions[predictions["symbol"] == symbol].reset_index(drop=True)
    row = int(place * len(held))
    *_, said = made(tmp_path, {symbol: garbled(bars[symbol], held["ts"].iloc[row])})
    pd.testing.assert_frame_equal(said.loc[:row, SAID], held.loc[:row, SAID])
    assert said["score"].iloc[row + 1] != held["score"].iloc[row + 1]


def of(predictions, symbol, until):
    "What was said of a symbol until a moment, before hindsight."
    mine = predictions[(predictions["symbol"] == symbol) & (predictions["ts"] <= until)]
    return mine[SAID].reset_index(drop=True)


def test_bars_of_others_matter_to_a_rank_at_once_and_never_before(planted, pooled, tmp_path):
    "A cut in the middle of a turn: the symbol's own bars stay, those of all others are made up."
    bars, *_ = planted
    days = np.sort(pooled["ts"].unique())
    cut, after = (pd.Timestamp(days[len(days) * 6 // 10 + k]) for k in (0, 1))
    ruined = {s: b if s == "SIM003" else garbled(b, cut) for s, b in bars.items()}
    *_, said = made(tmp_path, ruined, TOGETHER)
    before, again = of(pooled, "SIM003", cut), of(said, "SIM003", cut)
    pd.testing.assert_frame_equal(before, again)
    changed = of(pooled, "SIM003", after).iloc[-1] != of(said, "SIM003", after).iloc[-1]
    assert len(before) > 100 and changed[["p_long", "score"]].all()


def test_who_will_be_gone_tomorrow_is_still_there_today(planted, pooled, tmp_path):
    "Bars of one symbol end in the middle of a turn: what was said of the others until then stays."
    bars, *_ = planted
    days = np.sort(pooled["ts"].unique())
    cut = pd.Timestamp(days[len(days) * 6 // 10])
    *_, said = made(tmp_path, bars | {"SIM006": bars["SIM006"].loc[:cut]}, TOGETHER)
    for symbol in ("SIM001", "SIM004"):
        pd.testing.assert_frame_equal(of(pooled, symbol, cut), of(said, symbol, cut))
    assert said[said["symbol"] == "SIM001"]["ts"].max() > cut + pd.Timedelta(days=60)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_bars_just_before_a_cut_do_matter(planted, tmp_path, scope):
    "The cut of the test above is sharp: one session earlier, the teacher sees the garbage."
    bars, run, students, _ = planted
    name = "SIM003" if scope == "symbol" else POOLED
    mine = next(r for r in students if r.symbol == name)
    cut = pd.Timestamp(mine.saw_until) - pd.Timedelta(days=1)
    held = bars if scope == "pooled" else {}
    ruined = held | {"SIM003": garbled(bars["SIM003"], cut)}
    other, others = taught(tmp_path, ruined, replace(RECIPE, scope=scope))
    assert others[0].window_label == mine.window_label
    pair = (models(r, name)[mine.window_label] for r in (run, other))
    same = [a == b for a, b in zip(*map(dict.items, pair), strict=True)]
    assert sum(same) <= 1  # at most its statistics


def test_other_symbols_and_their_order_change_nothing(planted, tmp_path):
    bars, _, students, predictions = planted
    chosen = {s: bars[s] for s in ("SIM005", "SIM002")}
    _, others, said = made(tmp_path, chosen)
    held = predictions[predictions["symbol"].isin(chosen)].reset_index(drop=True)
    pd.testing.assert_frame_equal(said, held)
    mine = {r.window_label: r.artifacts for r in students}
    assert all(r.artifacts == mine[r.window_label] for r in others) and len(others) == 10


def test_the_order_of_symbols_changes_nothing_for_all_together(planted, pooled, tmp_path):
    bars, run, *_ = planted
    other, _, said = made(tmp_path, dict(sorted(bars.items(), reverse=True)), TOGETHER)
    pd.testing.assert_frame_equal(said, pooled)
    assert models(other, POOLED) == models(run, POOLED)


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_features_know_nothing_of_the_future(planted, half_hours, interval):
    bars = planted[0]["SIM001"] if interval is Interval.DAY else half_hours["SIM001"]
    recipe = replace(RECIPE, groups=("technical", "levels", "regime"))

    def known(frame):
        table = learning_table(frame, Context(interval), recipe)
        return table[list(table_names(table))]

    require_causal(known, bars.iloc[-500:])


def last_prices(index, horizon):
    "Start of the last bar behind each label, by counting sessions one at a time; NaT without one."
    days = [t.date() for t in index]
    order = sorted(set(days))
    last = dict(zip(days, index, strict=True))
    place = {day: k for k, day in enumerate(order)}
    ahead = (place[day] + horizon for day in days)
    ends = [last[order[k]] if k < len(order) else pd.NaT for k in ahead]
    return pd.Series(ends, index=index)


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_a_label_is_known_when_its_last_price_is_and_rests_on_nothing_later(
    planted, half_hours, interval
):
    bars = planted[0]["SIM001"] if interval is Interval.DAY else half_hours["SIM001"]
    labels, ends = forward_labels(bars, 5, interval=interval), last_prices(bars.index, 5)
    entry, complete = bars["open"].shift(-1), ends + pd.Timedelta(minutes=interval.minutes)
    by_hand = bars["close"].reindex(ends).to_numpy() / entry - 1
    pd.testing.assert_series_equal(labels["forward_return"], by_hand, check_names=False)
    known = labels["label_known_at"].dropna()
    assert known.index.equals(ends.dropna().index)
    assert (known > ends.dropna()).all()  # later than the start of the last bar it rests on
    if interval is not Interval.DAY:
        assert (known <= complete.dropna()).all()
    rows = pd.Series(range(len(bars)), index=bars.index)[known.index]
    for row in np.random.default_rng(1).choice(rows, 40):
        at = known[bars.index[row]]
        after = forward_labels(garbled(bars, at - pd.Timedelta(1, "us")), 5, interval=interval)
        assert after["forward_return"].iloc[row] == labels["forward_return"].iloc[row]


def test_diwali_bars_are_known_in_the_evening(half_hours):
    labels = forward_labels(half_hours["SIM001"], 5, interval=Interval.MINUTE_30)
    evening = labels["label_known_at"].dropna()
    evening = evening[evening.dt.date == date(2022, 10, 24)]
    assert len(evening) and (evening.dt.strftime("%H:%M") == "19:15").all()


def test_labels_stop_where_the_run_stops(tmp_path):
    "A store that holds another half year gives the same run as one that ends with it."
    later, bars = END + timedelta(days=180), {}
    for name, held in (("whole", later), ("cut", END)):
        spec, store = MarketSpec(1, date(2021, 7, 5), later, 7, 0.4), BarStore(tmp_path / name)
        feed, span = SimulatedFeed(spec), (Interval.DAY, date(2021, 7, 5))
        ingest(feed, store, ["SIM001"], *span, held)
        run = Run("live_candidate_20240101_093000", tmp_path / name)
        again = ingest(feed, store, ["SIM001"], *span, END, skip_fetch=True)
        assert pin_run(run, store, again, START).end == END
        bars[name] = pinned_bars(run, "SIM001")
    assert bars["whole"].index[-1].date() <= END
    pd.testing.assert_frame_equal(bars["whole"], bars["cut"])
    run, students, predictions = made(tmp_path / "run", {"SIM001": bars["whole"]})
    assert students[-1].skip_class == "insufficient_future"
    assert predictions["label_known_at"].max().date() <= END
    assert predictions["ts"].max() == bars["whole"].index[-1 - RECIPE.label.horizon_days]


# --- windows and folds ----------------------------------------------------------------------------


def test_teachers_learn_from_the_bars_of_their_window_alone(planted):
    _, run, students, _ = planted
    for record in (r for r in students if r.status == "success" and r.symbol == "SIM004"):
        folder = f"teacher/{record.window_label}"
        rows = run.artifacts.read_parquet(f"{folder}/labels.parquet")
        assert date.fromisoformat(record.start_date) <= rows.index[0].date()
        assert rows.index[-1].date() <= date.fromisoformat(record.end_date)
        again = pack_teacher(fit_teacher(rows, TECHNICAL, TREES, rows["weight"]))
        assert again == run.artifacts.read_bytes(f"{folder}/model.txt.zst")
        assert record.metrics["n_rows"] == len(rows)


def spans_apart(ts, ends, train, test):
    "Whether no training label touches a tested one; a label lives until its last bar is complete."
    starts, ends = ts.to_numpy(), ends.to_numpy()
    first, last = starts[test].min(), ends[test].max()
    return not ((starts[train] <= last) & (ends[train] >= first)).any()


def random_rows(bars, interval, rng, most):
    "Rows of a random window with labels of a random horizon, and when each label's life ends."
    horizon, n = int(rng.integers(1, 13)), int(rng.integers(60, most))
    table = learning_table(bars, Context(interval), cut_by(180, 180, horizon)).dropna()
    first = int(rng.integers(0, len(table) - n))
    rows = table.iloc[first : first + n]
    ends = last_prices(bars.index, horizon).reindex(rows.index)
    return rows, ends + (pd.Timedelta(minutes=interval.minutes))


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_folds_never_touch_and_a_splitter_without_the_purge_is_caught(
    planted, half_hours, interval
):
    daily = interval is Interval.DAY
    bars, rng = (planted[0] if daily else half_hours)["SIM002"], np.random.default_rng(0)
    for _ in range(30 if daily else 8):
        rows, ends = random_rows(bars, interval, rng, 200 if daily else 500)
        folds = purged_folds(rows.index, rows["label_known_at"], int(rng.integers(2, 8)))
        assert sorted(np.concatenate([t for _, t in folds])) == list(range(len(rows)))
        for train, test in folds:
            assert spans_apart(rows.index, ends, train, test)
            rest = np.setdiff1d(np.arange(len(rows)), test)
            assert not spans_apart(rows.index, ends, rest, test)
        last_train, last_test = folds[-1]
        assert not len(last_train) or ends.iloc[last_train].max() < rows.index[last_test[0]]


def test_an_opinion_does_not_know_the_labels_that_touch_its_own(planted):
    "All labels that overlap a fold are turned around; what is said of the fold stays the same."
    bars, *_ = planted
    table = learning_table(bars["SIM004"], Context(), RECIPE).dropna()
    rows = Window("SIM004", date(2022, 6, 30), date(2022, 12, 26)).slice(table)
    ends = last_prices(bars["SIM004"].index, RECIPE.label.horizon_days).reindex(rows.index)
    soft = out_of_fold(rows, TECHNICAL, TREES)
    turned = {"LONG": "SHORT", "SHORT": "NOOP", "NOOP": "LONG"}
    for number, part in soft.groupby("fold"):
        touch = (ends >= part.index[0]) & (rows.index <= ends[part.index].max())
        assert touch.sum() > len(part)
        other = rows.assign(label=rows["label"].where(~touch, rows["label"].map(turned)))
        again = out_of_fold(other, TECHNICAL, TREES)
        pd.testing.assert_frame_equal(again[again["fold"] == number], part)
        assert not again[again["fold"] != number].equals(soft[soft["fold"] != number])
        assert (part["teacher_saw_until"].dt.date == ends[~touch].max().date()).all()


def test_what_is_said_of_a_fold_of_all_symbols_knows_no_label_that_touches_it(planted, tmp_path):
    "As above, for rows of six symbols: other labels and targets of every symbol at once."
    bars, run, *_ = planted
    window = Window(POOLED, date(2022, 6, 30), date(2022, 12, 26))
    rows, names = panel_rows(run, window, RECIPE).rows, TECHNICAL
    spec = replace(TREES, objective="regression", n_estimators=5)
    ends = last_prices(bars["SIM004"].index, 5).reindex(rows.index)
    soft = out_of_fold(rows, names, spec)
    assert set(rows["symbol"]) == set(bars) and table_names(rows) == TECHNICAL
    for number, part in soft.groupby("fold"):
        touch = np.asarray((ends >= part.index[0]) & (rows.index <= ends[part.index].max()))
        other = rows.assign(target=rows["target"].where(~touch, -2 * rows["target"]))
        again = out_of_fold(other, names, spec)
        pd.testing.assert_frame_equal(again[again["fold"] == number], part)
        assert not again[again["fold"] != number].equals(soft[soft["fold"] != number])
        assert (part["teacher_saw_until"].dt.date == ends[~touch].max().date()).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_labels_that_reach_across_a_window_are_a_skip_and_no_failure(planted, tmp_path, scope):
    bars, *_ = planted
    held = bars if scope == "pooled" else {"SIM001": bars["SIM001"]}
    _, students = taught(tmp_path, held, replace(cut_by(180, 180, 60), scope=scope))
    classes = {r.skip_class for r in students}
    assert classes == {"insufficient_history", "insufficient_future"}


# --- who is scored on what ------------------------------------------------------------------------


def require_later(run, students, predictions, recipe, interval=Interval.DAY):
    "Every scored bar starts after every price that its student and its teacher's labels used."
    assert not predictions.duplicated(["symbol", "ts"]).any()
    for _, part in predictions.groupby("symbol"):
        assert part["ts"].is_monotonic_increasing and part["window_label"].is_monotonic_increasing
    for record in (r for r in students if r.status == "success"):
        said = predictions[predictions["window_label"] == record.window_label]
        rows = run.artifacts.read_parquet(f"teacher/{record.window_label}/labels.parquet")
        own = rows["symbol"] if "symbol" in rows else pd.Series(record.symbol, index=rows.index)
        horizon = recipe.label.horizon_days
        learned = max(
            last_prices(pinned_bars(run, s).index, horizon).reindex(own.index[own == s]).max()
            for s in own.unique()
        )
        assert pd.Timestamp(record.saw_until) > learned
        assert pd.Timestamp(record.saw_until) >= rows["teacher_saw_until"].max()
        if len(said):
            assert said["ts"].min() > learned
            assert said["ts"].min() >= first_after(date.fromisoformat(record.end_date))
            complete = said["ts"].min() + pd.Timedelta(minutes=interval.minutes)
            assert said["label_known_at"].min() > complete


@pytest.mark.parametrize(("days", "step"), [(180, 180), (150, 65), (120, 170)])
def test_a_scored_bar_is_later_than_all_that_its_models_learned_from(planted, tmp_path, days, step):
    bars, recipe = planted[0]["SIM001"], cut_by(days, step)
    run, students, predictions = made(tmp_path, {"SIM001": bars}, recipe)
    require_later(run, students, predictions, recipe)
    trained = [r for r in students if r.status == "success"]
    assert len(trained) == len(students) - sum(r.status == "skipped" for r in students) > 2
    end = bars.index[-1 - recipe.label.horizon_days]  # the last bar with a label
    assert pd.Timestamp(trained[-1].saw_until) < end == predictions["ts"].iloc[-1]
    assert predictions["window_label"].iloc[-1] == trained[-1].window_label


def test_a_scored_bar_of_all_is_later_than_all_that_their_model_learned_from(planted, tmp_path):
    "One symbol has no bars for ten sessions at the end of a window, so its labels reach further."
    end = pd.Timestamp("2022-12-26", tz="Asia/Kolkata")
    late = planted[0]["SIM006"]
    hole = late.loc[end : end + pd.Timedelta(days=16)].index
    recipe, bars = (
        replace(cut_by(150, 130), scope="pooled"),
        planted[0] | {"SIM006": late.drop(hole)},
    )
    run, students, predictions = made(tmp_path, bars, recipe)
    require_later(run, students, predictions, recipe)
    assert sum(r.status == "success" for r in students) > 3


def test_a_scored_evening_is_later_than_what_its_models_learned_from(half_hours, tmp_path):
    "The labels of the first window end with the Diwali session, whose own bars are not scored."
    recipe = cut_by(30, 30)
    spans = dict(start=date(2022, 9, 18), end=date(2022, 12, 15), interval=Interval.MINUTE_30)
    run, students, predictions = made(tmp_path, half_hours, recipe, **spans)
    require_later(run, students, predictions, recipe, Interval.MINUTE_30)
    first = [r for r in students if r.end_date == "2022-10-17"]
    assert [r.saw_until for r in first] == ["2022-10-24T19:15:00+05:30"] * 2
    assert predictions["ts"].min() > pd.Timestamp("2022-10-24 23:00", tz="Asia/Kolkata")


def test_broken_and_empty_windows_keep_the_order(planted, tmp_path, monkeypatch):
    "The second window breaks, the fourth has no bars: their students' turns are nobody's."
    bars, recipe = planted[0]["SIM001"], cut_by(120, 120)
    spans = [
        (START + timedelta(days=120 * k), START + timedelta(days=120 * k + 119)) for k in (1, 3)
    ]
    hole = Window("SIM001", *spans[1]).slice(bars).index
    teach = batch.teach

    def fragile(rows, *how):
        "A teacher that breaks on one window."
        if rows.index[0].date() <= spans[0][1] and rows.index[-1].date() >= spans[0][0]:
            raise ArithmeticError("not today")
        return teach(rows, *how)

    monkeypatch.setattr(batch, "teach", fragile)
    run, students, predictions = made(tmp_path, {"SIM001": bars.drop(hole)}, recipe)
    teachers = read_window_runs(run, "teacher")
    assert [r.status for r in teachers][:4] == ["success", "failed", "success", "skipped"]
    assert [r.skip_class for r in students][1:4:2] == ["no_teacher", "no_data"]
    require_later(run, students, predictions, recipe)
    by = predictions.groupby("window_label")["ts"].agg(["min", "max"])
    assert by["max"].iloc[0] < first_after(spans[0][1]) < by["min"].iloc[1]
    assert predictions["ts"].max() == bars.index[-1 - recipe.label.horizon_days]


def random_records(rng):
    "Outcomes of one symbol's windows with any length, step, status and reach of their labels."
    days, step, reach = (int(rng.integers(*r)) for r in ((5, 200), (3, 250), (1, 30)))
    records, start = [], date(2022, 1, 1)
    for k in range(int(rng.integers(1, 12))):
        end = start + timedelta(days=days - 1)
        saw = pd.Timestamp(end + timedelta(days=reach), tz="Asia/Kolkata") + pd.Timedelta(
            hours=15.5
        )
        status = str(rng.choice(["success", "success", "skipped", "failed"]))
        told = {"status": status, "saw_until": str(saw) if status == "success" else None}
        records.append(WindowRecord("student", "AAA", f"w{k:02}", str(start), str(end), **told))
        start += timedelta(days=step)
    return records


def test_turns_are_what_they_are_said_to_be():
    "For every day: the one student whose next window it is and who saw nothing so late, if any."
    rng = np.random.default_rng(5)
    for _ in range(40):
        records = random_records(rng)
        trained = [k for k, r in enumerate(records) if r.status == "success"]
        days = pd.date_range("2022-01-01", "2026-12-31", tz="Asia/Kolkata", freq="5D")
        spoken = {
            day: [t.record.window_label for t in turns(records)
                  if day > t.span.after and (t.span.before is None or day < t.span.before)]
            for day in days
        }  # fmt: skip
        for day, speakers in spoken.items():
            may = []
            for k in trained:
                own, saw = date.fromisoformat(records[k].end_date), records[k].saw_until
                last = k == trained[-1]
                until = None if last else date.fromisoformat(records[k + 1].end_date)
                in_turn = day.date() > own and (last or day.date() <= until)
                may += [records[k].window_label] if in_turn and day > pd.Timestamp(saw) else []
            assert speakers == may and len(may) <= 1


# --- fills ----------------------------------------------------------------------------------------


def traded(predictions, bars):
    "The account of a long-flat rule on scores."
    return trade_scores(predictions, bars, ACCOUNT, Model()).daily


def moved(predictions, bars, by):
    "The same scores, said `by` bars later."
    parts = []
    for symbol, rows in predictions.groupby("symbol"):
        index = bars[symbol].index
        place = index.get_indexer(rows["ts"]) + by
        parts.append(rows.assign(ts=index[np.clip(place, 0, len(index) - 1)]))
    return pd.concat(parts).drop_duplicates(["symbol", "ts"])


def test_knowing_one_bar_more_gains_massively_and_delay_costs(planted):
    bars, _, _, predictions = planted
    move = {s: np.sign(b["close"] / b["open"] - 1) for s, b in bars.items()}
    seen = pd.concat(move, names=["symbol", "ts"]).rename("score").reset_index()
    seen = seen[seen["ts"] >= predictions["ts"].min()]
    earned = lambda said: 1e4 * traded(said, bars)["gross_return"].mean()  # noqa: E731
    honest, oracle = earned(predictions), earned(moved(seen, bars, -1))
    late = [earned(moved(predictions, bars, by)) for by in (1, 2, 4)]
    assert oracle > 3 * honest  # the session that is bought, known a bar too early
    assert abs(earned(seen)) < oracle / 5  # the same session, known when it is over
    assert honest > late[0] > late[1] > late[2]


def test_a_session_earns_only_on_what_was_said_before_it(planted):
    "Scores of a session and all later ones turned around, and all later prices made up."
    bars, _, _, predictions = planted
    daily = traded(predictions, bars)
    for day in daily.index[[40, 150, 300]]:
        said = predictions["score"].where(predictions["ts"] < day, -predictions["score"])
        prices = {s: garbled(b, day) for s, b in bars.items()}
        again = traded(predictions.assign(score=said), prices)
        columns = ["net_return", "gross_return", "benchmark_return", "exposure", "turnover"]
        pd.testing.assert_frame_equal(daily.loc[:day, columns], again.loc[:day, columns])
        assert (
            not daily["net_return"]
            .loc[day:]
            .iloc[1:30]
            .equals(again["net_return"].loc[day:].iloc[1:30])
        )
