"""Laws of the strategies on markets of any kind: a day is a day whatever its bars, answers do not
depend on when they are asked, and news never makes a wish."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.trading.strategies import (
    Intraday,
    IntradayParams,
    Model,
    ModelParams,
    SentimentGate,
    Swing,
    SwingParams,
    View,
    boosted,
    decide,
    gated,
    latched,
    session_closes,
    signal,
)

SWING = Swing(SwingParams(fast_sessions=3, slow_sessions=7))
INTRADAY = Intraday(IntradayParams(rsi_bars=4, ema_bars=9, oversold=10, overbought=90))


def inside_the_day(seed: int, n_days: int = 12, drop: float = 0.1) -> pd.DataFrame:
    "Quarter hours of a walk, some of them missing, from a Friday on with gaps between sessions."
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2024-02-23", periods=n_days, tz=IST)
    starts = [d + pd.Timedelta(minutes=555 + 15 * k) for d in days for k in range(25)]
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.004, len(starts))))
    open_ = np.r_[close[0], close[:-1]] * np.exp(rng.normal(0, 0.001, len(close)))
    top, bottom = np.maximum(open_, close), np.minimum(open_, close)
    prices = {"open": open_, "high": top * 1.001, "low": bottom * 0.999, "close": close}
    volume = rng.integers(0, 2, len(close)) * rng.integers(1, 900, len(close))
    bars = pd.DataFrame(prices | {"volume": volume}, pd.DatetimeIndex(starts, name="ts"))
    return bars[rng.random(len(bars)) >= drop]


def known_by_hand(bars: pd.DataFrame) -> tuple[list[float], list[int]]:
    "Closes of sessions and the newest one known at each bar, bar by bar."
    closes, seen, day, done = [], [], None, False
    for ts, close in bars["close"].items():
        if ts.date() != day:
            if day is not None and not done:
                closes.append(before)  # noqa: F821
            day, done = ts.date(), False
        if not done and ts.hour * 60 + ts.minute + 15 >= 930:
            closes.append(close)
            done = True
        seen.append(len(closes) - 1)
        before = close  # noqa: F841
    return closes if done else [*closes, close], seen


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_session_close_is_known_when_its_last_bar_is_complete_or_the_next_day_begins(seed):
    bars = inside_the_day(seed, drop=0.3)
    closes, seen = session_closes(View("TCS", bars, Interval.MINUTE_15))
    wanted, known = known_by_hand(bars)
    np.testing.assert_array_equal(seen, known)
    np.testing.assert_array_equal(closes, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_swing_says_the_same_of_a_day_and_of_its_quarter_hours(seed):
    bars = inside_the_day(seed, 40, drop=0.0)
    last = bars.groupby(bars.index.normalize()).agg(
        {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum"}
    )
    daily = decide(SWING, View("TCS", last))
    fine = decide(SWING, View("TCS", bars, Interval.MINUTE_15))
    np.testing.assert_array_equal(fine.want[24::25], daily.want)
    np.testing.assert_array_equal(fine.confidence[24::25], daily.confidence)
    assert set(daily.want) == {-1, 0, 1}


@given(st.integers(0, 10_000), st.sampled_from([SWING, INTRADAY, Model()]))
@settings(max_examples=12, deadline=None)
def test_asked_bar_by_bar_it_says_what_it_says_of_all(seed, strategy):
    bars, rng = inside_the_day(seed, 8), np.random.default_rng(seed)
    said = {name: rng.uniform(-1, 1, len(bars)) for name in ("sentiment", "scores")}
    for values in said.values():
        values[rng.random(len(values)) < 0.2] = np.nan
    view = View("TCS", bars, Interval.MINUTE_15, **said)
    whole, words = decide(strategy, view), {"LONG": 1, "NOOP": 0, "SHORT": -1}
    for n in range(1, len(bars) + 1):
        now = signal(strategy, view.until(n))
        assert words[now.direction] == whole.want[n - 1], (n, now)
        assert now.confidence == whole.confidence[n - 1], (n, now)
        assert now.reason and now.ts == bars.index[n - 1]


@given(st.integers(0, 10_000), st.floats(0.05, 50))
@settings(max_examples=20, deadline=None)
def test_the_price_level_decides_nothing(seed, factor):
    bars = inside_the_day(seed)
    other = bars.assign(**{c: bars[c] * factor for c in ("open", "high", "low", "close")})
    for strategy in (SWING, INTRADAY):
        one, two = (decide(strategy, View("TCS", b, Interval.MINUTE_15)) for b in (bars, other))
        assert (one.want == two.want).mean() > 0.99  # a tie may be told apart by rounding
        same = one.want == two.want
        np.testing.assert_allclose(one.confidence[same], two.confidence[same], atol=1e-6)


wishes = st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40)
moods = st.one_of(st.floats(-1, 1), st.just(float("nan")))


@given(wishes, st.data())
def test_news_takes_wishes_away_and_never_makes_or_turns_one(wish, data):
    want = np.array(wish, np.int8)
    mood = np.array(data.draw(st.lists(moods, min_size=len(wish), max_size=len(wish))))
    gate, left, allowed = SentimentGate(), gated(want, mood, SentimentGate()), False
    for i, now in enumerate(wish):
        if i == 0 or now != wish[i - 1]:
            allowed = False  # another wish begins
        allowed = allowed or not now * mood[i] < -gate.sentiment_block
        assert left[i] == (now if allowed else 0)
    np.testing.assert_array_equal(gated(-want, -mood, gate), -left)
    sure = boosted(left, np.full(len(wish), 0.9), mood, gate)
    assert set(np.unique(sure)) <= {0.0, 0.9, 1.0}
    np.testing.assert_array_equal(sure == 0, left * mood < -gate.sentiment_block)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_a_latch_is_the_loop_that_anybody_would_write(words):
    state, states = False, []
    for on, off in words:
        state = True if on else False if off else state
        states.append(state)
    on, off = (np.array(side) for side in zip(*words, strict=True))
    np.testing.assert_array_equal(latched(on, off), states)


@given(st.lists(moods, min_size=1, max_size=60), st.floats(-1, 1), st.floats(0, 1))
def test_the_model_rule_holds_long_as_the_first_judge_did(scores, entry, gap):
    score, exit_ = np.array(scores), max(-1.0, entry - gap)
    held, states = False, []
    for s in scores:
        held = s > entry or (held and s >= exit_)
        states.append(held)
    bars = random_bars(len(scores))
    got = decide(Model(ModelParams(entry, exit_)), View("TCS", bars, scores=score))
    np.testing.assert_array_equal(got.want == 1, states)
    assert (got.want[np.isnan(score)] == 0).all()
    assert ((got.confidence >= 0) & (got.confidence <= 1)).all()


def test_nothing_is_wanted_overnight_or_in_sessions_without_an_afternoon():
    bars = inside_the_day(1, 30, drop=0.05)
    drill = bars.iloc[:0]
    for ts in pd.date_range("2024-03-02 09:15", "2024-03-02 12:15", freq="15min", tz=IST):
        drill.loc[ts] = bars.iloc[40]
    bars = pd.concat([bars, drill]).sort_index()
    got = decide(INTRADAY, View("TCS", bars, Interval.MINUTE_15))
    minute = bars.index.hour * 60 + bars.index.minute
    first = ~bars.index.normalize().duplicated()
    saturday = bars.index.normalize() == pd.Timestamp("2024-03-02", tz=IST)
    assert saturday.sum() == 13 and (got.want[~saturday] != 0).mean() > 0.3
    assert (got.want[first | saturday | (minute >= 920)] == 0).all()
