"""Folds and windows: laws that hold for any rows, each with a splitter that breaks it."""

from datetime import date, timedelta
from itertools import pairwise
from math import comb

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars, sessions
from sensequant.core.types import IST, Interval
from sensequant.features.features import TECHNICAL, technical
from sensequant.features.labels import LabelSpec, forward_labels, make_labels
from sensequant.features.windows import (
    SKIP_CLASSES,
    WindowRules,
    combinatorial_folds,
    combinatorial_paths,
    cut_windows,
    plan_windows,
    purged_folds,
    usable_rows,
)

# --- any rows -------------------------------------------------------------------------------------


def daily(rng, n, horizon):
    "When each of `n` daily bars is known to have ended its label, at most `horizon` sessions on."
    days = sessions(n + horizon)
    ends = np.arange(n) + rng.integers(1, horizon + 1, n)
    return days[:n], days[ends] + pd.Timedelta(15.5, "h")


def intraday(rng, n, horizon):
    "The same with four bars a session; a label may end within one."
    days = sessions(n // 4 + horizon + 1)
    ts = pd.DatetimeIndex([d + pd.Timedelta(10 + h, "h") for d in days for h in range(4)])
    ends = np.arange(n) + rng.integers(1, 4 * horizon + 1, n)
    return ts[:n], ts[ends] + pd.Timedelta(1, "h")


@st.composite
def random_rows(draw):
    "Times and label ends of one symbol or of many with holes, in the order of time."
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kind, horizon = draw(st.sampled_from([daily, intraday])), draw(st.integers(1, 6))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        ts, ends = kind(rng, draw(st.integers(24, 60)), horizon)
        held = rng.random(len(ts)) < draw(st.sampled_from([0.7, 1.0]))
        held[:: len(ts) // 12] = True  # never fewer sessions than blocks
        parts.append(pd.Series(ends[held], index=ts[held]))
    return pd.concat(parts).sort_index(kind="stable")


def clash(known, train, test):
    "Whether a label of a training row shares a moment with a label of a tested one."
    a, b = known.index.as_unit("ns").asi8, pd.DatetimeIndex(known).as_unit("ns").asi8
    return ((a[train][:, None] <= b[test]) & (b[train][:, None] >= a[test])).any()


def days(moments):
    "Dates of some moments, IST."
    return pd.DatetimeIndex(moments).tz_localize(None).to_numpy().astype("datetime64[D]")


def days_of(known, rows):
    "Sessions of some rows."
    return set(days(known.index[rows]).tolist())


def embargoed(known, test, n):
    "The `n` sessions among the rows that follow the session in which a block's last label ended."
    held, last = np.unique(days(known.index)), days([known.iloc[test].max()])[0]
    return set(held[held > last][:n].tolist())


@settings(max_examples=30, deadline=None)
@given(known=random_rows(), n_folds=st.integers(2, 5), embargo=st.integers(0, 4))
def test_folds_share_no_session_and_no_moment(known, n_folds, embargo):
    folds = purged_folds(known.index, known, n_folds, embargo)
    assert np.concatenate([t for _, t in folds]).tolist() == list(range(len(known)))
    for train, test in folds:
        assert not days_of(known, train) & days_of(known, test)
        assert not clash(known, train, test)
        assert not days_of(known, train) & embargoed(known, test, embargo)
        before = train[train < test[0]]
        assert not len(before) or known.iloc[before].max() < known.index[test].min()


@settings(max_examples=30, deadline=None)
@given(known=random_rows(), n_folds=st.integers(2, 5), embargo=st.integers(0, 4))
def test_folds_keep_every_row_that_they_may(known, n_folds, embargo):
    "What is left out clashes with the block or stands under its embargo."
    for train, test in purged_folds(known.index, known, n_folds, embargo):
        last = known.iloc[test].max()
        for row in np.setdiff1d(np.arange(len(known)), np.r_[train, test]):
            at = known.index[row]
            echo = at > last and at.date() <= max([last.date(), *embargoed(known, test, embargo)])
            assert clash(known, [row], [test[0]]) or clash(known, [row], test) or (embargo and echo)


def unpurged(known, n_folds):
    "Negative control: blocks of sessions, and all the rest to learn from."
    day = known.index.normalize()
    blocks = np.array_split(day.unique(), n_folds)
    return [(np.flatnonzero(~day.isin(b)), np.flatnonzero(day.isin(b))) for b in blocks]


@settings(max_examples=20, deadline=None)
@given(known=random_rows(), n_folds=st.integers(2, 5))
def test_a_splitter_without_the_purge_is_caught(known, n_folds):
    "Whenever the purge takes a row away, and for labels of five sessions always."
    for rows in (known, forward_labels(random_bars(40), 5)["label_known_at"].dropna()):
        ours, theirs = purged_folds(rows.index, rows, n_folds), unpurged(rows, n_folds)
        assert all((a == b).all() for (_, a), (_, b) in zip(theirs, ours, strict=True))
        purged = [len(a) < len(b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
        assert [clash(rows, *fold) for fold in theirs] == purged
    assert all(purged)


def test_a_splitter_by_rows_is_caught_on_a_panel():
    "Negative control: cut between rows, one session lies on both sides."
    known = pd.concat(
        [pd.Series(e, index=t) for t, e in [daily(np.random.default_rng(0), 25, 1)] * 3]
    )
    known = known.sort_index(kind="stable")
    blocks = np.array_split(np.arange(len(known)), 4)
    assert any(days_of(known, a) & days_of(known, b) for a, b in pairwise(blocks))
    tested = [days_of(known, test) for _, test in purged_folds(known.index, known, 4)]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 25


@pytest.mark.parametrize("n_folds", [2, 3, 5, 7])
def test_daily_bars_of_one_symbol_are_cut_as_before(n_folds):
    "The folds of the first release: np.array_split over rows, purged by label end."
    rows = forward_labels(random_bars(143), 5).dropna()
    start, end = rows.index, rows["label_known_at"]
    folds = purged_folds(start, end, n_folds)
    for (train, test), block in zip(
        folds, np.array_split(np.arange(len(rows)), n_folds), strict=True
    ):
        apart = (end < start[block[0]]) | (start > end.iloc[block].max())
        assert (test == block).all() and (train == np.flatnonzero(apart)).all()


def test_the_embargo_counts_from_the_last_label_and_not_from_the_last_row():
    rows = forward_labels(random_bars(40), 5).dropna()
    for embargo in range(4):
        train, test = purged_folds(rows.index, rows["label_known_at"], 5, embargo)[1]
        assert train[train > test[-1]][0] == test[-1] + 5 + 1 + embargo


def test_a_label_that_ends_within_a_session_frees_the_rest_of_it_unless_embargoed():
    ts = pd.DatetimeIndex([d + pd.Timedelta(h, "h") for d in sessions(6) for h in (10, 12, 14)])
    known = pd.Series(ts + pd.Timedelta(1, "h"), index=ts)
    known.iloc[8] = ts[9] + pd.Timedelta(1, "h")  # the block's last label ends next morning at 11
    for embargo, first in ((0, 10), (1, 15)):
        train, test = purged_folds(ts, known, 2, embargo)[0]
        assert (test[-1], train[0]) == (8, first)


# --- combinations ---------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(known=random_rows(), n_test=st.integers(2, 3), embargo=st.integers(0, 2))
def test_combinations_are_whole_and_do_not_touch(known, n_test, embargo):
    n_folds = 4 if known.index.normalize().nunique() < 10 else 5
    if known.index.normalize().nunique() < 2 * n_folds:
        with pytest.raises(DataError, match="2 sessions a block"):
            combinatorial_folds(known.index, known, n_folds, n_test, embargo)
        return
    folds = combinatorial_folds(known.index, known, n_folds, n_test, embargo)
    assert len(folds) == comb(n_folds, n_test)
    for train, tests in folds:
        assert len(tests) == n_test
        for test in tests:
            assert not days_of(known, train) & days_of(known, test)
            assert not clash(known, train, test)
            assert not days_of(known, train) & embargoed(known, test, embargo)
    counts = np.bincount(np.concatenate([np.concatenate(t) for _, t in folds]))
    assert (counts == comb(n_folds - 1, n_test - 1)).all()  # each row tested equally often


@pytest.mark.parametrize(("n_folds", "n_test"), [(4, 2), (6, 2), (6, 3), (8, 5)])
def test_paths_test_every_block_once_and_use_every_test_once(n_folds, n_test):
    paths = combinatorial_paths(n_folds, n_test)
    assert paths.shape == (comb(n_folds, n_test) * n_test // n_folds, n_folds)
    rows = forward_labels(random_bars(60), 1).dropna()
    folds = combinatorial_folds(rows.index, rows["label_known_at"], n_folds, n_test)
    used = set()
    for path in paths:
        whole = []
        for block, split in enumerate(path):
            starts = sorted(t[0] for t in folds[split][1])
            mine = [t for t in folds[split][1] if t[0] == block * (len(rows) // n_folds)]
            assert len(mine) == 1 and mine[0][0] in starts
            whole.append(mine[0])
            used.add((block, split))
        assert np.concatenate(whole).tolist() == list(range(len(rows)))
    assert len(used) == comb(n_folds, n_test) * n_test


# --- windows --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 90), step=st.integers(1, 90), span=st.integers(0, 400))
def test_windows_cover_the_range_and_never_repeat(length, step, span):
    start = date(2022, 1, 1)
    end = start + timedelta(days=span)
    for mode in ("rolling", "expanding"):
        windows = cut_windows("AAA", start, end, length, step, mode)
        assert len({w.label for w in windows}) == len(windows)
        assert windows[0].start == start
        assert windows[-1].end == end or (mode == "rolling" and step > length)
        assert windows[0].end == min(start + timedelta(days=length - 1), end)
        assert windows == sorted(windows)
        moved = [w.end if mode == "expanding" else w.start for w in windows]
        gaps = [(b - a).days for a, b in pairwise(moved)]
        assert set(gaps[:-1]) <= {step} and (not gaps or 0 < gaps[-1] <= step)
        if mode == "expanding":
            assert {w.start for w in windows} == {start}


@pytest.fixture(scope="module")
def table():
    "Features and barrier labels of two years."
    bars = random_bars(500, 3).set_axis(
        pd.bdate_range("2022-01-03", periods=500, tz=IST, name="ts")
    )
    return technical(bars).join(make_labels(bars, LabelSpec("triple_barrier")))


def test_a_plan_counts_the_rows_that_a_trainer_gets(table):
    rng = np.random.default_rng(1)
    for column in TECHNICAL[:3]:
        table = table.assign(**{column: table[column].where(rng.random(len(table)) > 0.05)})
    table = table.assign(sentiment_mean=np.nan)
    for required in (TECHNICAL, TECHNICAL[:2], (), None):
        rules = WindowRules(required=required, embargo_sessions=1)
        windows = cut_windows("AAA", date(2022, 1, 1), date(2023, 12, 1), 180, 90)
        for plan in plan_windows(windows, table, rules):
            rows = usable_rows(plan.window.slice(table), required)
            assert len(rows) == plan.n_rows and len(plan.window.slice(table)) == plan.n_bars
            assert rows["label"].notna().all()
            if plan.skip_class is None:
                folds = purged_folds(rows.index, rows["label_known_at"], 5, 1)
                assert all(rows["label"].iloc[train].nunique() > 1 for train, _ in folds)
            else:
                assert plan.skip_class in SKIP_CLASSES and plan.message
        if required is None:
            assert {p.n_rows for p in plan_windows(windows, table, rules)} == {0}


def test_an_open_barrier_is_missing_future_and_a_missing_volatility_is_not(table):
    open_ = table["label_known_at"].isna()
    late = open_ & (table.index > table.index[100])
    assert open_.iloc[:20].all() and late.any() and not late.iloc[:-5].any()
    windows = cut_windows("AAA", date(2022, 1, 3), date(2023, 12, 31), 365, 365)
    plans = plan_windows(windows, table, WindowRules())
    assert [p.skip_class for p in plans] == [None, "insufficient_future"]
    assert str(table.index[-1].date()) in plans[1].message


def test_an_embargo_can_leave_a_fold_nothing_to_learn_from(table):
    windows = cut_windows("AAA", date(2022, 6, 1), date(2022, 9, 30), 122, 122)
    few = [plan_windows(windows, table, WindowRules(5, 30, None, 2, e))[0] for e in (1, 60)]
    assert [p.skip_class for p in few] == [None, "insufficient_history"]


def test_half_hours_are_cut_between_sessions():
    at = [d + pd.Timedelta(555 + 30 * k, "m") for d in sessions(60) for k in range(13)]
    bars = random_bars(len(at), 1, 0.004).set_axis(pd.DatetimeIndex(at, name="ts"))
    rows = make_labels(bars, LabelSpec("triple_barrier"), Interval.MINUTE_30).dropna()
    folds = purged_folds(rows.index, rows["label_known_at"], 5, 1)
    tested = [set(rows.index[test].date) for _, test in folds]
    assert sum(map(len, tested)) == len(set.union(*tested))
    assert max(map(len, tested)) - min(map(len, tested)) <= 1
    for (train, _), days in zip(folds, tested, strict=True):
        assert len(train) and not set(rows.index[train].date) & days
