"""The symbol table against the lists it was made from, and against every file of bars."""

import re
from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from sensequant.core.errors import DataError
from sensequant.core.types import Symbol
from sensequant.market import symbols as table
from sensequant.market.calendar import is_session, read_facts

DATA = Path(__file__).parents[1].parent / "shared" / "data"
REFERENCE = DATA / "reference"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no market data: {DATA} is absent")
FOLDERS = [
    "nse_daily",
    "nse_daily_upstox",
    "nse_intraday_1m",
    "nse_intraday_5m",
    "nse_intraday_5m_yahoo",
]
NEW_LISTINGS = [
    *("LODHA", "ETERNAL", "MAXHEALTH", "MAZDOCK", "JIOFIN", "HYUNDAI"),
    *("ENRIN", "TATACAP", "TMCV"),
]
# Where the facts depart from NSE's list of July 2026, on purpose: the note of the line says why.
OTHER_LISTING = {"NESTLEIND": date(2010, 1, 8)}


def text(name: str) -> pd.DataFrame:
    """A reference file with every cell as text."""
    frame = pd.read_csv(REFERENCE / name, dtype=str, keep_default_na=False)
    return frame.rename(columns=str.strip)


def bar_files() -> list[tuple[str, str, Path]]:
    """(folder, symbol, file) of each share with bars; indices are not shares."""
    files = [(f, p.name.split(".csv")[0], p) for f in FOLDERS for p in (DATA / f).glob("*.csv*")]
    return [x for x in sorted(files) if not x[1].endswith("_INDEX")]


@needs_data
def test_every_file_of_bars_is_found_and_starts_at_or_after_listing() -> None:
    files, early = bar_files(), []
    assert len(files) > 160
    for folder, name, path in files:
        first = pd.read_csv(path, usecols=["timestamp"], nrows=1)["timestamp"].iloc[0][:10]
        listed = table.find(name).listing_date
        if listed is None or date.fromisoformat(first) < listed:
            early.append((folder, name, first, listed))
    assert early == []


@needs_data
@pytest.mark.parametrize("name", NEW_LISTINGS)
def test_bars_of_new_listings_start_on_the_listing_day(name: str) -> None:
    path = next((DATA / "nse_daily").glob(f"{name}.csv*"))
    first = pd.read_csv(path, usecols=["timestamp"], nrows=1)["timestamp"].iloc[0][:10]
    assert date.fromisoformat(first) == table.find(name).listing_date


@needs_data
def test_universe_is_the_list_of_constituents() -> None:
    listed = text("nifty100_constituents.csv").set_index("symbol")
    ours = {s.nse_code: s for s in table.universe("nifty100")}
    assert set(ours) == set(listed.index) and len(ours) == 100
    for code, row in listed.iterrows():
        expected = Symbol(
            str(code),
            row["isec_code"] or None,
            row["company_name"],
            row["isin"],
            OTHER_LISTING.get(str(code), date.fromisoformat(row["listing_date"])),
        )
        assert ours[str(code)] == expected
    fifty = set(listed.index[listed["index"] == "NIFTY 50"])
    assert {s.nse_code for s in table.universe("nifty50")} == fifty


@needs_data
def test_other_symbols_agree_with_nse_and_breeze() -> None:
    nse = text("EQUITY_L.csv").set_index("SYMBOL")
    master = text("breeze_security_master_nse.csv").query("series == 'EQ'").set_index("nse_symbol")
    inside = {s.nse_code for s in table.universe("nifty100")}
    outside = [c for c in read_facts("symbols")["nse_code"] if c not in inside]
    assert len(outside) > 50
    for code in outside:
        symbol = table.find(code)
        assert symbol.isec_code == master.at[code, "isec_code"], code
        if code in nse.index:
            listed = pd.to_datetime(nse.at[code, "DATE OF LISTING"], format="%d-%b-%Y").date()
            assert (symbol.isin, symbol.listing_date) == (nse.at[code, "ISIN NUMBER"], listed)
        else:
            assert symbol.isin == master.at[code, "isin"], code


@needs_data
def test_membership_is_the_history() -> None:
    theirs = text("nifty_membership_history.csv")
    ours = read_facts("index_membership")
    columns = ["valid_from", "valid_to", "note"]
    assert ours[["index", "nse_code", *columns]].to_numpy().tolist() == (
        theirs[["index_name", "symbol", *columns]].to_numpy().tolist()
    )


def test_members_are_known_symbols() -> None:
    """PEIND is a code of the membership source alone, for half a year from 2021-09-30."""
    codes = set(read_facts("index_membership")["nse_code"])
    assert codes - set(read_facts("symbols")["nse_code"]) == {"PEIND"}


def test_nobody_joined_an_index_before_being_listed() -> None:
    """A wrong listing date shows here; floors of the source are no dates of joining."""
    facts, early = read_facts("index_membership"), []
    told = facts[facts["source"].str.endswith("press_release") & (facts["nse_code"] != "PEIND")]
    assert len(told) > 100
    for row in told.itertuples():
        listed = table.find(str(row.nse_code)).listing_date
        if listed and date.fromisoformat(str(row.valid_from)) < listed:
            early.append((row.nse_code, row.valid_from, listed))
    assert early == []


def test_fifty_are_fifty_on_each_day_of_change() -> None:
    facts = read_facts("index_membership")
    first, last = table.membership_known()
    days = {d for d in [*facts["valid_from"], *facts["valid_to"]] if str(first) <= d <= str(last)}
    assert len(days) > 15
    for day in sorted(days):
        on = date.fromisoformat(day)
        fifty, following = (table.members(i, on) for i in ("NIFTY 50", "NIFTY NEXT 50"))
        assert len(fifty) == 50 and 46 <= len(following) <= 54, on
        assert not set(fifty) & set(following), on
        assert table.members("NIFTY 100", on) == sorted(fifty + following)


def test_facts_are_complete_and_sound() -> None:
    facts = read_facts("symbols")
    assert facts["nse_code"].is_unique and facts["nse_code"].is_monotonic_increasing
    assert (facts[["nse_code", "company", "isin", "source"]] != "").all(axis=None)
    assert facts["isin"].map(lambda x: bool(re.fullmatch(r"INE[0-9A-Z]{8}\d", x))).all()
    shared = facts[facts["isin"].duplicated(keep=False)]["nse_code"]
    assert set(shared) == {"TATAMOTORS", "TMPV"}  # one security under two names
    codes = facts.loc[facts["isec_code"] != "", ["isec_code", "nse_code"]]
    assert set(codes[codes["isec_code"].duplicated(keep=False)]["nse_code"]) == set(shared)
    unknown = facts[facts["listing_date"] == ""]
    assert set(unknown["nse_code"]) == {"HDFC", "PEL"}
    assert unknown["note"].str.contains("not known").all()


def test_listing_days_since_2020_are_sessions() -> None:
    dates = [s.listing_date for s in map(table.find, read_facts("symbols")["nse_code"])]
    recent = [d for d in dates if d and d >= date(2020, 1, 1)]
    assert len(recent) > 10 and all(is_session(d) for d in recent)


def test_exceptions() -> None:
    facts = table.exceptions()
    assert (facts != "").all(axis=None)
    assert set(table.exceptions("breeze")["nse_code"]) == {
        "ADANIGREEN", "APLAPOLLO", "DIXON", "IDEA", "MINDTREE", "TATACAP", "TMCV"
    }  # fmt: skip
    assert list(table.exceptions("csv-nse_daily")["nse_code"]) == ["MINDTREE"]
    without_code = [s.nse_code for s in table.universe("nifty100") if s.isec_code is None]
    breeze = facts.set_index("nse_code")
    assert breeze.loc[without_code, "reason"].str.contains("no ISEC code").all()


def test_returned_tables_are_copies() -> None:
    mine = table.exceptions()
    mine.loc[:, "reason"] = ""
    table.universe("nifty50").clear()
    assert (table.exceptions()["reason"] != "").all() and len(table.universe("nifty50")) == 50


@pytest.mark.parametrize("code", ["", "RELIANC", "NIFTY50_INDEX", "PEIND"])
def test_unknown_symbols_are_refused(code: str) -> None:
    with pytest.raises(DataError, match="must be in the table"):
        table.find(code)
