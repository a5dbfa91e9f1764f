"""The watch after a deployment: market hours over weekends, holidays and special sessions."""

from datetime import datetime, timedelta

import numpy as np
import pytest
from releases import CONFIG, moment

from sensequant.core.errors import DataError
from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.govern.manifest import monitoring_plan
from sensequant.govern.release import full_sessions, market_hours, watch_terms
from sensequant.govern.watch import (
    hours_left,
    mode,
    next_check,
    read_watch,
    thresholds_at,
    watch_ends,
    watch_of,
)
from sensequant.market.calendar import known, session_hours, sessions


def minutes_open(start, end):
    "Hours of trading, counted minute by minute."
    open_at = [session_hours(day) for day in sessions(start.date(), end.date())]
    steps = int((end - start).total_seconds() // 60)
    minutes = (start + timedelta(minutes=n) for n in range(steps))
    return sum(any(a <= m < b for a, b in open_at) for m in minutes) / 60


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2026-06-12T18:00", "2026-06-16T10:00"),  # a weekend
        ("2025-10-20T09:00", "2025-10-24T16:00"),  # Diwali: an hour of Muhurat, then a holiday
        ("2024-03-01T12:34", "2024-03-05T09:16"),  # a Saturday with two short sessions
        ("2026-01-30T15:29", "2026-02-02T09:15"),  # the Sunday of the budget
    ],
)
def test_market_hours_are_the_minutes_in_which_the_exchange_is_open(start, end):
    assert market_hours(moment(start), moment(end)) == pytest.approx(
        minutes_open(moment(start), moment(end)), abs=1e-9
    )


def test_the_end_is_when_the_hours_have_passed():
    "The law that ties the two functions together, at 60 random moments."
    rng = np.random.default_rng(1)
    for _ in range(60):
        start = moment("2025-01-01T00:00") + timedelta(minutes=int(rng.integers(0, 500_000)))
        hours = float(rng.integers(1, 4000)) / 60
        end = watch_ends(start, hours)
        assert market_hours(start, end) == pytest.approx(hours, abs=1e-6)
        assert market_hours(start, end - timedelta(minutes=1)) < hours


def test_hours_add_up():
    a, b, c = moment("2026-03-02T11:00"), moment("2026-03-06T14:00"), moment("2026-03-17T09:20")
    assert market_hours(a, b) + market_hours(b, c) == pytest.approx(market_hours(a, c), abs=1e-9)
    assert market_hours(c, a) == 0


def test_zones_do_not_matter_and_none_is_refused():
    utc = datetime.fromisoformat("2026-06-15T03:45:00+00:00")  # 09:15 IST
    assert market_hours(utc, moment("2026-06-15T10:15")) == 1
    with pytest.raises(DataError, match="must know its zone"):
        hours_left(watch_of(load_settings(), utc), datetime(2026, 6, 15))


def test_a_watch_of_48_hours_is_seven_sessions_and_a_part_of_the_eighth():
    watch = watch_of(load_settings(), moment("2026-06-12T15:30"))
    assert watch.end == moment("2026-06-24T13:30")
    assert full_sessions(watch.start, watch.end) == 7
    assert full_sessions(watch.start, moment("2026-06-24T15:30")) == 8


def test_the_mode_follows_from_the_clock_alone():
    "A watch that was read back, by a process that never saw the deployment, says the same."
    terms = watch_terms(monitoring_plan(CONFIG), moment("2026-06-12T15:30"))
    watch = read_watch(terms)
    for text, expected in (
        ("2026-06-12T15:30", "heightened"),
        ("2026-06-24T13:29", "heightened"),
        ("2026-06-24T13:30", "normal"),
        ("2026-12-24T13:30", "normal"),
        ("2025-06-24T13:30", "heightened"),  # a clock set back
    ):
        assert mode(watch, moment(text)) == expected, text
    drops = {e: thresholds_at(watch, moment(e)) for e in ("2026-06-23T10:00", "2026-06-25T10:00")}
    early, late = drops.values()
    assert early == {
        "hit_ratio_drop": 0.05,
        "precision_drop": 0.05,
        "sharpe_drop": 0.15,
        "drawdown": 0.05,
    }
    assert late == {
        "hit_ratio_drop": 0.10,
        "precision_drop": 0.10,
        "sharpe_drop": 0.25,
        "drawdown": 0.10,
    }


def test_beyond_the_calendar_it_stays_close():
    last = datetime.combine(known()[1], datetime.min.time(), IST)
    watch = watch_of(load_settings(), last)
    assert watch.end is None
    assert mode(watch, last + timedelta(days=400)) == "heightened"
    assert next_check(watch, last + timedelta(days=2)) is None
    assert market_hours(last + timedelta(days=5), last + timedelta(days=9)) == 0


def test_a_setting_of_no_hours_watches_as_always_from_the_start():
    watch = watch_of(load_settings(watch_hours=0), moment("2026-06-12T15:30"))
    assert (watch.end, mode(watch, watch.start)) == (watch.start, "normal")


def test_checks_come_every_so_many_hours_of_the_market():
    watch = watch_of(load_settings(), moment("2026-06-12T15:30"))
    due, checks = watch.start, []
    while due < watch.end:
        checks.append(due := next_check(watch, due))
    assert checks[0] == moment("2026-06-15T11:15")
    assert len(checks) == 24  # 48 hours, one every two


@pytest.mark.parametrize("key", ["start", "thresholds", "windows", "check_hours", "normal"])
def test_a_watch_with_something_missing_is_refused(key):
    terms = watch_terms(monitoring_plan(CONFIG), moment("2026-06-12T15:30"))
    with pytest.raises(DataError, match="a watch must say"):
        read_watch({k: v for k, v in terms.items() if k != key})
