"""The calendar against real trading days, against its library, and in its speed."""

import subprocess
import sys
from datetime import date, time, timedelta
from pathlib import Path

import pandas as pd
import pytest

from sensequant.core.errors import DataError
from sensequant.market import calendar as nse

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no market data: {DATA} is absent")
# Sessions that happened although no data set shows them, so the list of trading days lacks them.
UNSEEN = {"2020-02-01"}  # Budget Saturday, lacking at the only vendor that reaches back to it


@pytest.fixture(scope="module")
def traded() -> pd.DatetimeIndex:
    """Days on which any of the data sets shows trading."""
    days = pd.read_csv(DATA / "reference" / "nse_trading_days.csv")["date"]
    return pd.DatetimeIndex(days).tz_localize(nse.IST)


@needs_data
def test_every_traded_day_is_a_session(traded: pd.DatetimeIndex) -> None:
    assert len(traded) == 1607
    wrong = [str(day.date()) for day in traded if not nse.is_session(day)]
    assert wrong == []


@needs_data
def test_every_session_was_traded(traded: pd.DatetimeIndex) -> None:
    first, last = nse.covered()
    assert (first, last) == (traded[0].date(), traded[-1].date())
    ours = nse.sessions(first, last)
    assert {str(day.date()) for day in ours.difference(traded)} == UNSEEN
    assert len(ours) == len(traded) + len(UNSEEN)


@needs_data
def test_unseen_session_would_be_seen_if_a_vendor_had_it() -> None:
    """The exception above goes as soon as any file holds that day."""
    files = [*(DATA / "nse_daily").glob("*.csv*"), *(DATA / "index_daily").glob("*.csv*")]
    assert len(files) > 80
    held = {d for f in files for d in pd.read_csv(f, usecols=["timestamp"])["timestamp"].str[:10]}
    assert held.isdisjoint(UNSEEN)
    assert "2020-01-31" in held and "2020-02-03" in held


@needs_data
@pytest.mark.parametrize("folder", ["nse_intraday_5m", "nse_intraday_5m_yahoo"])
def test_intraday_bars_lie_within_session_hours(folder: str) -> None:
    for file in sorted((DATA / folder).glob("[!N]*.csv*"))[:6]:  # stocks; the index prints later
        bars = pd.read_csv(file, usecols=["timestamp"])["timestamp"]
        stamps = pd.DatetimeIndex(pd.to_datetime(bars)).tz_convert(nse.IST)
        for day, of_day in stamps.groupby(stamps.normalize()).items():
            opens, closes = nse.session_hours(day)
            assert opens <= of_day.min() and of_day.max() < closes, (file.name, day)


def test_library_agrees_but_for_the_special_sessions() -> None:
    from exchange_calendars import get_calendar

    first, last = nse.known()
    plain = get_calendar("XBOM", start=str(first), end=str(last)).sessions.tz_localize(nse.IST)
    ours, special = nse.sessions(first, last), nse.special_sessions().index
    assert plain.difference(ours).empty  # each holiday of the facts is one of the library too
    assert ours.difference(plain).difference(special).empty
    assert special.difference(ours).empty


def test_facts_are_complete_and_sound() -> None:
    facts = nse.read_facts("session_exceptions")
    assert facts["date"].is_monotonic_increasing and facts["date"].is_unique
    assert set(facts["kind"]) == {"holiday", "special"}
    assert (facts[["name", "source"]] != "").all(axis=None)
    special = facts[facts["kind"] == "special"]
    assert set(special["hours"]) <= {"known", "assumed"}
    opens, closes = (special[c].map(time.fromisoformat) for c in ("open", "close"))
    assert (opens < closes).all()
    assert (facts.loc[facts["kind"] == "holiday", ["open", "close", "hours"]] == "").all(axis=None)
    assumed = special[special["hours"] == "assumed"]
    assert assumed["source"].str.contains("not known").all()


def test_returned_tables_are_copies() -> None:
    mine = nse.special_sessions()
    mine.loc[:, "open"] = "00:00"
    assert nse.session_hours("2024-11-01")[0].time() == time(18, 0)


def test_shape_of_sessions() -> None:
    days = nse.sessions(date(2020, 1, 1), pd.Timestamp("2026-12-31 12:00", tz=nse.IST))
    assert days.name == "ts" and str(days.tz) == "Asia/Kolkata"
    assert days.is_monotonic_increasing and days.is_unique
    assert (days == days.normalize()).all()
    assert len(nse.sessions("2024-01-21", "2024-01-22")) == 0


def test_every_day_is_session_holiday_or_weekend() -> None:
    for year in range(2020, 2027):
        days, closed = nse.sessions(f"{year}-01-01", f"{year}-12-31"), nse.holidays(year)
        assert days.intersection(closed).empty
        weekdays = pd.bdate_range(f"{year}-01-01", f"{year}-12-31", tz=nse.IST)
        assert days.union(closed).difference(weekdays).isin(nse.special_sessions().index).all()
        assert weekdays.difference(days.union(closed)).empty


def test_steps_agree_with_slices() -> None:
    days = nse.sessions("2023-10-01", "2024-03-31")
    day = date(2023, 10, 15)
    while day < date(2024, 3, 1):
        stamp = pd.Timestamp(day, tz=nse.IST)
        assert nse.next_session(day, 3) == days[days > stamp][2]
        assert nse.previous_session(day, 2) == days[days < stamp][-2]
        day += timedelta(days=1)


def test_ends_of_the_calendar_are_refused() -> None:
    first, last = nse.known()
    for ask in (nse.is_session, nse.next_session, nse.previous_session, nse.session_hours):
        for day in (first - timedelta(days=1), last + timedelta(days=1)):
            with pytest.raises(DataError, match="must lie from"):
                ask(day)
    with pytest.raises(DataError, match="within the calendar"):
        nse.previous_session(first)


def test_importing_does_not_build() -> None:
    """Whoever needs no session does not wait for the library."""
    code = (
        "import sys, sensequant.market.calendar as nse; "
        "assert 'exchange_calendars' not in sys.modules; "
        "nse.is_session('2024-01-20'); assert 'exchange_calendars' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)
