"""Labels against twins written the long way, and the promise that nothing later changes them."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics as twin

from sensequant.core.testing import random_bars, sessions, tiny_bars
from sensequant.core.types import IST, Interval
from sensequant.features.labels import (
    CLASSES,
    LabelSpec,
    average_uniqueness,
    confusion_table,
    forward_labels,
    known_at,
    label_scores,
    make_labels,
    rank_ic,
    sample_weights,
    volatility,
)

SPEC = LabelSpec("triple_barrier", horizon_days=3, label_volatility_span=3)
SIGMA = np.std([0.01, -0.01, 0.01], ddof=1)  # what the fourth close of `after` knows


def after(*bars):
    "Four closes with a known volatility, the fourth at 100.98, then these bars."
    closes = 100 * np.cumprod([1, 1.01, 0.99, 1.01])
    quiet = [(c, c, c, c) for c in closes]
    frame = pd.DataFrame([*quiet, *bars], columns=["open", "high", "low", "close"], dtype=float)
    return frame.set_index(sessions(len(frame))).assign(volume=1)


def minutes(days, bars_a_day=4, seed=1):
    "Half hours of some weekdays that wander enough to meet a barrier."
    at = [d + pd.Timedelta(555 + 30 * k, "m") for d in sessions(days) for k in range(bars_a_day)]
    bars = random_bars(len(at), seed, 0.01)
    return bars.set_axis(pd.DatetimeIndex(at, name="ts"))


# --- triple barrier -------------------------------------------------------------------------------

FLAT = (100, 100.5, 99.5, 100)  # within both barriers of an entry at 100: 97.69 and 102.31
TOP, FLOOR = 100 * (1 + 2 * SIGMA), 100 * (1 - 2 * SIGMA)


@pytest.mark.parametrize(
    ("bars", "word", "price", "bar"),
    [
        ([FLAT, (100, 103, 99, 102), FLAT], "LONG", TOP, 5),  # profit first
        ([FLAT, (100, 101, 97, 98), (98, 104, 98, 104)], "SHORT", FLOOR, 5),  # stop first
        ([FLAT, (100, 103, 97, 102), FLAT], "SHORT", FLOOR, 5),  # both in one bar
        ([FLAT, (96, 104, 95, 103), FLAT], "SHORT", 96, 5),  # opens below the stop
        ([FLAT, (105, 106, 90, 91), FLAT], "LONG", 105, 5),  # opens above the profit
        ([FLAT, FLAT, (100, 101, 99, 101)], "NOOP", 101, 6),  # time
        ([(100, 103, 99.5, 100), FLAT, FLAT], "LONG", TOP, 4),  # the entry bar
        ([(100, 103, 97, 100), FLAT, FLAT], "SHORT", FLOOR, 4),  # both in the entry bar
        ([FLAT, FLAT, (100, 103, 99, 101)], "LONG", TOP, 6),  # in the last bar allowed
        ([FLAT, (100, 103, 99, 102)], "LONG", TOP, 5),  # met before the data ends too early
        ([FLAT, (100, TOP, 99, 102)], "LONG", TOP, 5),  # exactly at the barrier
    ],
)
def test_the_first_barrier_ends_a_label(bars, word, price, bar):
    frame = after(*bars)
    found = make_labels(frame, SPEC).iloc[3]
    assert found["label"] == word
    assert found["forward_return"] == pytest.approx(price / 100 - 1, abs=1e-12)
    assert found["label_known_at"] == known_at(frame.index)[bar]


@pytest.mark.parametrize("bars", [[], [FLAT], [FLAT, FLAT], [(100, 102.3, 97.7, 100)] * 2])
def test_an_open_position_at_the_end_of_the_data_has_no_label(bars):
    assert make_labels(after(*bars), SPEC).iloc[[3, -1]].isna().all(axis=None)


def test_a_label_without_a_volatility_or_without_movement_does_not_exist():
    made = make_labels(after(*[FLAT] * 6), SPEC)
    assert made.iloc[:3].isna().all(axis=None) and made.iloc[3].notna().all()
    for spec in (SPEC, LabelSpec(label_threshold_vols=1, horizon_days=3, label_volatility_span=3)):
        assert make_labels(tiny_bars([100.0] * 12), spec).isna().all(axis=None)
        assert make_labels(tiny_bars([100.0]), spec).isna().all(axis=None)
        assert make_labels(tiny_bars([100.0]).iloc[:0], spec).empty


def test_a_halt_moves_the_end_to_the_sessions_that_were_held():
    whole = after(FLAT, FLAT, FLAT, (100, 101, 99, 100.7))
    halted = whole.drop(whole.index[5])
    found = make_labels(halted, SPEC).iloc[3]
    assert (found["label"], found["label_known_at"].date()) == ("NOOP", whole.index[7].date())
    assert found["forward_return"] == pytest.approx(0.007)


def slow_barrier(bars, spec, interval):
    "Each label by walking from its entry, one bar after the other."
    days, rows = bars.index.normalize().unique(), []
    sigma, known = volatility(bars["close"], spec.label_volatility_span, interval), known_at
    for i in range(len(bars)):
        rows.append((None, np.nan, pd.NaT))
        number = days.get_loc(bars.index[i].normalize()) + spec.horizon_days
        end = days[number] if number < len(days) else None
        if i + 1 == len(bars) or not sigma.iloc[i] > 0:
            continue
        entry = bars["open"].iloc[i + 1]
        top = entry * (1 + spec.barrier_profit_vols * sigma.iloc[i])
        floor = entry * (1 - spec.barrier_stop_vols * sigma.iloc[i])
        for ts, bar in bars.iloc[i + 1 :].iterrows():
            if end is not None and ts.normalize() > end:
                break
            out = None
            if bar["low"] <= floor:
                out = "SHORT", min(bar["open"], floor)
            elif bar["high"] >= top:
                out = "LONG", max(bar["open"], top)
            if bar["open"] >= top:
                out = "LONG", bar["open"]
            at = known(pd.DatetimeIndex([ts]), interval)[0]
            if out:
                rows[i] = (out[0], out[1] / entry - 1, at)
                break
            if end is not None:
                rows[i] = ("NOOP", bar["close"] / entry - 1, at)
    return pd.DataFrame(rows, bars.index, ["label", "forward_return", "label_known_at"])


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
@pytest.mark.parametrize(("profit", "stop"), [(1.0, 1.0), (2.0, 0.7), (0.4, 2.5)])
def test_barriers_agree_with_the_long_way(interval, profit, stop):
    bars = random_bars(90, 4, 0.02) if interval is Interval.DAY else minutes(24, 4)
    bars = bars.drop(bars.index[[31, 32, 50]])  # a halt
    spec = LabelSpec("triple_barrier", 4, 0, 0, profit, stop, 6)
    made, twin_ = make_labels(bars, spec, interval), slow_barrier(bars, spec, interval)
    assert len(set(made["label"].dropna())) > 1
    assert made["label"].fillna("").tolist() == twin_["label"].fillna("").tolist()
    np.testing.assert_allclose(made["forward_return"], twin_["forward_return"], rtol=1e-12)
    assert made["label_known_at"].equals(
        twin_["label_known_at"].astype(made["label_known_at"].dtype)
    )


# --- what a label may know ------------------------------------------------------------------------

SPECS = [
    LabelSpec(),
    LabelSpec(label_threshold_vols=0.5, label_volatility_span=6),
    LabelSpec("triple_barrier", 4, label_volatility_span=6),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_a_label_rests_on_nothing_later_than_the_moment_it_was_known(spec, interval):
    bars = random_bars(80, 2) if interval is Interval.DAY else minutes(24)
    made, rng = make_labels(bars, spec, interval), np.random.default_rng(0)
    complete = known_at(bars.index, interval)
    for row in rng.choice(np.flatnonzero(made["label"].notna()), 12):
        later = complete > made["label_known_at"].iloc[row]
        other = bars.copy()
        other.iloc[later, :4] *= rng.uniform(0.5, 2, (later.sum(), 1))
        assert make_labels(other, spec, interval).iloc[row].equals(made.iloc[row])
        assert make_labels(bars[~later], spec, interval).iloc[row].equals(made.iloc[row])


@pytest.mark.parametrize("spec", SPECS)
def test_the_bar_that_ended_a_label_matters(spec):
    "Negative control: one bar earlier, the label is not there or not the same."
    bars = random_bars(80, 2)
    made = make_labels(bars, spec)
    for row in np.flatnonzero(made["label"].notna())[::7]:
        before = known_at(bars.index) < made["label_known_at"].iloc[row]
        assert made.index[row] < bars.index[before][-1] or spec.label_kind == "triple_barrier"
        assert make_labels(bars[before], spec).iloc[row].isna().all()


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
def test_a_volatility_knows_no_later_bar_and_forgets_the_start(interval):
    bars = random_bars(90) if interval is Interval.DAY else minutes(24)
    whole = volatility(bars["close"], 6, interval)
    for cut in (30, 41, 42, 43, 44, 77):
        pd.testing.assert_series_equal(
            volatility(bars["close"].iloc[:cut], 6, interval), whole[:cut]
        )
    late = volatility(bars["close"].iloc[24:], 6, interval).dropna()
    pd.testing.assert_series_equal(late, whole.loc[late.index], rtol=0, atol=0)
    close = bars["close"].groupby(bars.index.normalize()).last()
    daily = close.pct_change().rolling(6).std().shift(interval is not Interval.DAY)
    np.testing.assert_allclose(whole, daily.reindex(bars.index.normalize()), rtol=1e-9)


def test_a_threshold_in_volatilities_is_that_of_the_horizon():
    bars, spec = random_bars(120, 5), LabelSpec(label_threshold_vols=0.8, label_volatility_span=10)
    made = make_labels(bars, spec)
    sigma, plain = bars["close"].pct_change().rolling(10).std(), forward_labels(bars)
    bound = (0.8 * sigma * np.sqrt(5)).to_numpy()
    known = plain["forward_return"].notna().to_numpy() & ~np.isnan(bound)
    assert (made["label"].notna().to_numpy() == known).all() and known.sum() == 120 - 5 - 10
    move = plain["forward_return"].to_numpy()[known]
    words = np.select([move > bound[known], move < -bound[known]], ["LONG", "SHORT"], "NOOP")
    assert made["label"].to_numpy(object)[known].tolist() == words.tolist()
    assert made["forward_return"].dropna().equals(plain["forward_return"][known])


def test_a_diwali_barrier_is_known_in_the_evening():
    "Muhurat trading of 1 November 2024, 18:00 to 19:00."
    bars = random_bars(30, 3).set_axis(pd.bdate_range("2024-09-27", periods=30, tz=IST, name="ts"))
    made = make_labels(bars, LabelSpec("triple_barrier", 5, 0, 0, 0.3, 0.3, 5))
    evening = made["label_known_at"].dropna()
    evening = evening[evening.dt.date == date(2024, 11, 1)]
    assert len(evening) and (evening.dt.strftime("%H:%M") == "19:00").all()


# --- uniqueness -----------------------------------------------------------------------------------


def slow_uniqueness(ts, known, bars):
    "Mean over the bars of each label's life of one over the labels alive, counted one by one."
    lives = [[b for b in bars if a < b < k] for a, k in zip(ts, known, strict=True)]
    alive = {b: sum(b in life for life in lives) for b in bars}
    return [np.mean([1 / alive[b] for b in life]) for life in lives]


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
@pytest.mark.parametrize("spec", [LabelSpec(horizon_days=3), SPECS[2]])
def test_uniqueness_agrees_with_the_long_way(interval, spec):
    bars = random_bars(70, 8) if interval is Interval.DAY else minutes(20, seed=8)
    rows = make_labels(bars, spec, interval).dropna()
    drawn = np.sort(np.random.default_rng(1).choice(len(rows), len(rows) // 2, replace=False))
    for part in (rows, rows.iloc[drawn]):
        known = part["label_known_at"]
        ours = average_uniqueness(part.index, known, bars.index)
        np.testing.assert_allclose(ours, slow_uniqueness(part.index, known, bars.index), rtol=1e-12)
        assert (ours > 0).all() and (ours <= 1).all() and len(set(ours.round(9))) >= 3


@pytest.mark.parametrize("interval", [Interval.DAY, Interval.MINUTE_30])
@pytest.mark.parametrize("hole", [slice(0, 0), slice(16, 40)])
def test_whole_sessions_tell_the_bars_that_labels_live_in(interval, hole):
    "Also with a block left out, whose neighbours' labels were purged."
    bars = random_bars(70, 8) if interval is Interval.DAY else minutes(20, seed=8)
    rows = forward_labels(bars, 2, interval=interval).dropna()
    block = rows.iloc[hole]
    if len(block):
        apart = (rows["label_known_at"] < block.index[0]) | (
            rows.index > block["label_known_at"].max()
        )
        rows = rows[apart]
    told = average_uniqueness(rows.index, rows["label_known_at"])
    np.testing.assert_allclose(
        told, average_uniqueness(rows.index, rows["label_known_at"], bars.index)
    )


def test_rows_left_out_do_not_count():
    "A fold's weights are the same whatever its tested block would have brought."
    rows = forward_labels(random_bars(60), 5).dropna()
    early, whole = rows.iloc[:20], sample_weights(rows)
    known = early["label_known_at"]
    unique = average_uniqueness(early.index, known)
    np.testing.assert_allclose(sample_weights(early), unique / unique.mean())
    all_of_them = average_uniqueness(rows.index, rows["label_known_at"])
    assert unique[-1] > 2 * all_of_them[19]  # its life is shared with no later label
    assert whole.mean() == pytest.approx(1)


# --- scores ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), classes=st.integers(1, 3))
def test_scores_agree_with_scikit_learn(seed, n, classes):
    rng = np.random.default_rng(seed)
    held = rng.permutation(CLASSES)[:classes]
    truth, p = pd.Series(rng.choice(held, n)), rng.multinomial(6, [1 / 3] * 3, n) / 6
    ours, said = label_scores(truth, p), np.array(CLASSES)[p.argmax(axis=1)]
    shares = twin.precision_recall_fscore_support(truth, said, labels=CLASSES, zero_division=0.0)
    for name, values in zip(("precision", "recall", "f1"), shares[:3], strict=True):
        assert ours[name] == pytest.approx(values.mean())
        assert [ours[f"{name}_{c.lower()}"] for c in CLASSES] == pytest.approx(values)
    assert ours["accuracy"] == pytest.approx(twin.accuracy_score(truth, said))
    assert ours["log_loss"] == pytest.approx(twin.log_loss(truth, p, labels=CLASSES))
    matrix = twin.confusion_matrix(truth, said, labels=CLASSES)
    assert (confusion_table(ours).to_numpy() == matrix).all() and ours["n"] == n
    there = [k for k, c in enumerate(CLASSES) if 0 < (truth == c).sum() < n]
    areas = [twin.roc_auc_score(truth == CLASSES[k], p[:, k]) for k in there]
    assert ours["auc_classes"] == len(areas)
    assert ours["auc"] == (pytest.approx(np.mean(areas)) if areas else None)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 30))
def test_rank_ic_agrees_with_scipy(seed, n):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, n) * 1.0, rng.integers(0, 4, n) * 1.0
    a[rng.random(n) < 0.2] = np.nan
    both = ~np.isnan(a)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        assert rank_ic(a, b) is None
    else:
        assert rank_ic(a, b) == pytest.approx(spearmanr(a[both], b[both]).statistic)
