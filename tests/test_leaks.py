"""Controls that a leaking pipeline fails, on markets whose truth is known.

A shuffled label would not find a leak that lives on overlapping labels, so labels are shifted in a
circle: their autocorrelation stays, their link to the features goes. What a model knew is worked
out here from the bars alone, not read from `label_known_at`: a wrong record cannot excuse itself.
"""

from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from sensequant.backtest.backtester import LongFlatRule, long_flat
from sensequant.backtest.metrics import ic_by_date, rank_ic
from sensequant.core.testing import test_causal as require_causal
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import SimulatedFeed
from sensequant.data.ingest import ingest
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs, pin_run, pinned_bars
from sensequant.features.features import FEATURES
from sensequant.features.labels import forward_labels
from sensequant.features.windows import Window, first_after, purged_folds
from sensequant.learn import batch
from sensequant.learn.batch import (
    WindowRecord,
    WindowSpec,
    read_window_runs,
    train_students,
    train_teachers,
)
from sensequant.learn.predictions import chain_predictions, turns
from sensequant.learn.student import StudentSpec
from sensequant.learn.teacher import TeacherSpec, fit_teacher, out_of_fold, pack_teacher
from sensequant.market.simulator import MarketSpec, simulate

START, END = date(2022, 1, 1), date(2024, 3, 28)
SPEC = WindowSpec(180, 180)
TREES = TeacherSpec(n_estimators=25, learning_rate=0.1)
SAID = ["ts", "window_label", "p_long", "p_short", "score"]  # of a prediction, before hindsight
FREE = LongFlatRule(cost_bps_per_side=0.0)


def taught(folder, bars, spec=SPEC, start=START, end=END, interval=Interval.DAY):
    "A run over these bars with its teachers and students."
    run = Run("live_candidate_20240101_093000", folder)
    for symbol, frame in bars.items():
        pin_bars(run, symbol, frame)
    pin_inputs(run, Inputs(start, end, interval, True, dict.fromkeys(bars), None))
    with run.state as state:
        state.start_run(run.run_id, {}, 1, True)
    train_teachers(run, spec, TREES)
    return run, train_students(run, (spec, TREES, StudentSpec()))


def made(folder, bars, spec=SPEC, **inputs):
    "A run over these bars, trained, with its predictions."
    run, students = taught(folder, bars, spec, **inputs)
    return run, students, chain_predictions(run, spec)


def market(symbols=6, ic=0.4, seed=7, end=END):
    "Bars by symbol of a simulated market with its warm-up; nobody lists late."
    spec = MarketSpec(symbols, date(2021, 7, 5), end, seed, ic, late_listing_frac=0.0)
    made_up = simulate(spec)
    return {s: made_up.bars(s) for s in made_up.symbols}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A market with a strong signal, and what the pipeline makes of it."
    bars = market()
    return bars, *made(tmp_path_factory.mktemp("planted"), bars)


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


def test_a_planted_signal_is_found(planted):
    *_, predictions = planted
    found = rank_ic(predictions, 5)
    assert found.mean > 0.1 and found.t > 4
    for figure, nothing in ((auc, 0.5), (uplift, 0.0), (mean_ic, 0.0)):
        value, error = with_error(figure, predictions)
        assert value > nothing + 4 * error, figure.__name__


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-40, -20, 85, 130, 250])
def test_labels_shifted_in_a_circle_leave_nothing_to_find(planted, tmp_path, monkeypatch, shift):
    """A label from later days (shift below 0) need only be three horizons away. One from earlier
    days must lie beyond the 50 bars that the features remember: nearer, they know it rightly."""
    bars, *_ = planted
    whole = batch.label_table

    def shifted(frame, interval, spec):
        "The same features beside labels of other days, each known when its row's own would be."
        table = whole(frame, interval, spec)
        known = table["label"].notna()
        for column in ("label", "forward_return"):
            table.loc[known, column] = np.roll(table.loc[known, column].to_numpy(), shift)
        return table

    monkeypatch.setattr(batch, "label_table", shifted)
    *_, predictions = made(tmp_path, bars)
    assert len(predictions) == len(planted[-1])
    for figure, nothing in ((auc, 0.5), (uplift, 0.0), (mean_ic, 0.0)):
        value, error = with_error(figure, predictions)
        assert abs(value - nothing) < 3 * error, figure.__name__
    assert abs(rank_ic(predictions, 5).t) < 3.5


@pytest.mark.slow
def test_null_markets_hold_nothing(tmp_path):
    found = {auc: [], uplift: [], mean_ic: []}
    for seed in range(21, 27):
        *_, predictions = made(tmp_path / str(seed), market(ic=0.0, seed=seed))
        for figure, values in found.items():
            values.append(with_error(figure, predictions))
    for figure, values in found.items():
        value, error = np.array(values).T
        mean, of_mean = value.mean(), np.sqrt((error**2).sum()) / len(error)
        assert abs(mean - (0.5 if figure is auc else 0.0)) < 2.5 * of_mean, figure.__name__


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
    bars, _, students, predictions = planted
    symbol = "SIM003"
    mine = [r for r in students if r.symbol == symbol and r.status == "success"]
    cut = pd.Timestamp(mine[turn].saw_until)
    _, others, said = made(tmp_path, {symbol: garbled(bars[symbol], cut)})
    for record, twin in zip(mine[: turn + 1], others, strict=False):
        assert twin.window_label == record.window_label and twin.artifacts == record.artifacts
    early = predictions[(predictions["symbol"] == symbol) & (predictions["ts"] <= cut)]
    again = said[said["ts"] <= cut]
    assert len(early) >= 50 * turn
    pd.testing.assert_frame_equal(early[SAID].reset_index(drop=True), again[SAID])
    assert others[turn + 1].artifacts != mine[turn + 1].artifacts


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


def test_the_bars_just_before_a_cut_do_matter(planted, tmp_path):
    "The cut of the test above is sharp: one session earlier, the teacher sees the garbage."
    bars, _, students, _ = planted
    mine = next(r for r in students if r.symbol == "SIM003")
    cut = pd.Timestamp(mine.saw_until) - pd.Timedelta(days=1)
    _, others = taught(tmp_path, {"SIM003": garbled(bars["SIM003"], cut)})
    assert others[0].window_label == mine.window_label
    assert others[0].artifacts != mine.artifacts


def test_other_symbols_and_their_order_change_nothing(planted, tmp_path):
    bars, _, students, predictions = planted
    chosen = {s: bars[s] for s in ("SIM005", "SIM002")}
    _, others, said = made(tmp_path, chosen)
    held = predictions[predictions["symbol"].isin(chosen)].reset_index(drop=True)
    pd.testing.assert_frame_equal(said, held)
    mine = {r.window_label: r.artifacts for r in students}
    assert all(r.artifacts == mine[r.window_label] for r in others) and len(others) == 10


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_features_know_nothing_of_the_future(planted, half_hours, interval):
    bars = planted[0]["SIM001"] if interval is Interval.DAY else half_hours["SIM001"]
    known = lambda frame: batch.label_table(frame, interval, SPEC)[list(FEATURES)]  # noqa: E731
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
    assert predictions["ts"].max() == bars["whole"].index[-1 - SPEC.horizon_days]


# --- windows and folds ----------------------------------------------------------------------------


def test_teachers_learn_from_the_bars_of_their_window_alone(planted):
    _, run, students, _ = planted
    for record in (r for r in students if r.status == "success" and r.symbol == "SIM004"):
        folder = f"teacher/{record.window_label}"
        rows = run.artifacts.read_parquet(f"{folder}/labels.parquet")
        assert date.fromisoformat(record.start_date) <= rows.index[0].date()
        assert rows.index[-1].date() <= date.fromisoformat(record.end_date)
        again = pack_teacher(fit_teacher(rows, TREES))
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
    table = batch.label_table(bars, interval, WindowSpec(horizon_days=horizon)).dropna()
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
    table = batch.label_table(bars["SIM004"], Interval.DAY, SPEC).dropna()
    rows = Window("SIM004", date(2022, 6, 30), date(2022, 12, 26)).slice(table)
    ends = last_prices(bars["SIM004"].index, SPEC.horizon_days).reindex(rows.index)
    soft, turned = out_of_fold(rows, TREES), {"LONG": "SHORT", "SHORT": "NOOP", "NOOP": "LONG"}
    for number, part in soft.groupby("fold"):
        touch = (ends >= part.index[0]) & (rows.index <= ends[part.index].max())
        assert touch.sum() > len(part)
        other = rows.assign(label=rows["label"].where(~touch, rows["label"].map(turned)))
        again = out_of_fold(other, TREES)
        pd.testing.assert_frame_equal(again[again["fold"] == number], part)
        assert not again[again["fold"] != number].equals(soft[soft["fold"] != number])
        assert (part["teacher_saw_until"].dt.date == ends[~touch].max().date()).all()


def test_labels_that_reach_across_a_window_are_a_skip_and_no_failure(planted, tmp_path):
    bars, *_ = planted
    _, students = taught(tmp_path, {"SIM001": bars["SIM001"]}, WindowSpec(180, 180, 60, 60))
    classes = {r.skip_class for r in students}
    assert classes == {"insufficient_history", "insufficient_future"}


# --- who is scored on what ------------------------------------------------------------------------


def require_later(run, students, predictions, spec, interval=Interval.DAY):
    "Every scored bar starts after every price that its student and its teacher's labels used."
    assert not predictions.duplicated(["symbol", "ts"]).any()
    for _, part in predictions.groupby("symbol"):
        assert part["ts"].is_monotonic_increasing and part["window_label"].is_monotonic_increasing
    for record in (r for r in students if r.status == "success"):
        said = predictions[predictions["window_label"] == record.window_label]
        rows = run.artifacts.read_parquet(f"teacher/{record.window_label}/labels.parquet")
        prices = last_prices(pinned_bars(run, record.symbol).index, spec.horizon_days)
        learned = prices.reindex(rows.index).max()
        assert pd.Timestamp(record.saw_until) > learned
        assert pd.Timestamp(record.saw_until) >= rows["teacher_saw_until"].max()
        if len(said):
            assert said["ts"].min() > learned
            assert said["ts"].min() >= first_after(date.fromisoformat(record.end_date))
            complete = said["ts"].min() + pd.Timedelta(minutes=interval.minutes)
            assert said["label_known_at"].min() > complete


@pytest.mark.parametrize(("days", "step"), [(180, 180), (150, 65), (120, 170)])
def test_a_scored_bar_is_later_than_all_that_its_models_learned_from(planted, tmp_path, days, step):
    bars, spec = planted[0]["SIM001"], WindowSpec(days, step)
    run, students, predictions = made(tmp_path, {"SIM001": bars}, spec)
    require_later(run, students, predictions, spec)
    trained = [r for r in students if r.status == "success"]
    assert len(trained) == len(students) - sum(r.status == "skipped" for r in students) > 2
    end = bars.index[-1 - spec.horizon_days]  # the last bar with a label
    assert pd.Timestamp(trained[-1].saw_until) < end == predictions["ts"].iloc[-1]
    assert predictions["window_label"].iloc[-1] == trained[-1].window_label


def test_a_scored_evening_is_later_than_what_its_models_learned_from(half_hours, tmp_path):
    "The labels of the first window end with the Diwali session, whose own bars are not scored."
    spec = WindowSpec(30, 30)
    spans = dict(start=date(2022, 9, 18), end=date(2022, 12, 15), interval=Interval.MINUTE_30)
    run, students, predictions = made(tmp_path, half_hours, spec, **spans)
    require_later(run, students, predictions, spec, Interval.MINUTE_30)
    first = [r for r in students if r.end_date == "2022-10-17"]
    assert [r.saw_until for r in first] == ["2022-10-24T19:15:00+05:30"] * 2
    assert predictions["ts"].min() > pd.Timestamp("2022-10-24 23:00", tz="Asia/Kolkata")


def test_broken_and_empty_windows_keep_the_order(planted, tmp_path, monkeypatch):
    "The second window breaks, the fourth has no bars: their students' turns are nobody's."
    bars, spec = planted[0]["SIM001"], WindowSpec(120, 120)
    spans = [
        (START + timedelta(days=120 * k), START + timedelta(days=120 * k + 119)) for k in (1, 3)
    ]
    hole = Window("SIM001", *spans[1]).slice(bars).index
    teach = batch.teach

    def fragile(rows, trees):
        "A teacher that breaks on one window."
        if rows.index[0].date() <= spans[0][1] and rows.index[-1].date() >= spans[0][0]:
            raise MemoryError("no room")
        return teach(rows, trees)

    monkeypatch.setattr(batch, "teach", fragile)
    run, students, predictions = made(tmp_path, {"SIM001": bars.drop(hole)}, spec)
    teachers = read_window_runs(run, "teacher")
    assert [r.status for r in teachers][:4] == ["success", "failed", "success", "skipped"]
    assert [r.skip_class for r in students][1:4:2] == ["no_teacher", "no_data"]
    require_later(run, students, predictions, spec)
    by = predictions.groupby("window_label")["ts"].agg(["min", "max"])
    assert by["max"].iloc[0] < first_after(spans[0][1]) < by["min"].iloc[1]
    assert predictions["ts"].max() == bars.index[-1 - spec.horizon_days]


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
                  if day > t.after and (t.before is None or day < t.before)]
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
    earned = lambda said: 1e4 * long_flat(said, bars, FREE)["net_return"].mean()  # noqa: E731
    honest, oracle = earned(predictions), earned(moved(seen, bars, -1))
    late = [earned(moved(predictions, bars, by)) for by in (1, 2, 4)]
    assert oracle > 3 * honest  # the session that is bought, known a bar too early
    assert abs(earned(seen)) < oracle / 5  # the same session, known when it is over
    assert honest > late[0] > late[1] > late[2]


def test_a_session_earns_only_on_what_was_said_before_it(planted):
    "Scores of a session and all later ones turned around, and all later prices made up."
    bars, _, _, predictions = planted
    daily = long_flat(predictions, bars, FREE)
    for day in daily.index[[40, 150, 300]]:
        said = predictions["score"].where(predictions["ts"] < day, -predictions["score"])
        prices = {s: garbled(b, day) for s, b in bars.items()}
        again = long_flat(predictions.assign(score=said), prices, FREE)
        columns = ["net_return", "gross_return", "benchmark_return", "exposure", "turnover"]
        pd.testing.assert_frame_equal(daily.loc[:day, columns], again.loc[:day, columns])
        assert (
            not daily["net_return"]
            .loc[day:]
            .iloc[1:30]
            .equals(again["net_return"].loc[day:].iloc[1:30])
        )
