"CSV files as vendors write them, and as accidents leave them."

import gzip
import io
import os
import random
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars
from sensequant.core.types import BAR_COLUMNS, IST, Interval
from sensequant.data.bars import check_bars
from sensequant.data.csv_bars import CsvTree, read_csv_bars
from sensequant.market.bar_rules import (
    CIRCUIT_FRAC,
    NOISE_FRAC,
    REASONS,
    SET_APART,
    judge_frame,
)
from sensequant.market.calendar import sessions

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real bars in {DATA}")
DAY, FIVE = Interval.DAY, Interval.MINUTE_5
HEAD = "timestamp,open,high,low,close,volume\n"
GOOD = HEAD + "2024-01-01,100,102,99,101,5\n2024-01-02,101,102,99,100,7\n"


def session_bars(n: int = 200) -> pd.DataFrame:
    "Random bars on real sessions."
    return random_bars(n).set_index(sessions(date(2024, 1, 1), date(2025, 6, 30))[:n])


def as_csv(bars: pd.DataFrame) -> str:
    "Bars as the text of a file, every digit kept."
    return bars.rename_axis("timestamp").to_csv()


BROKEN_FILES = {
    "empty": (b"", "an empty file"),
    "blanks only": (b"\n  \n\n", "an empty file"),
    "heading only": (HEAD.encode(), "at least one row must stand below the heading"),
    "no heading": (b"2024-01-01,100,102,99,101,5\n", "columns timestamp, open"),
    "no volume": (b"date,open,high,low,close\n2024-01-01,1,2,1,2\n", "columns volume must be"),
    "semicolons": (GOOD.replace(",", ";").encode(), "separated by commas"),
    "two times": (b"date,time,o,h,l,c,v\n1,2,3,4,5,6,7\n", "one column must give timestamp"),
    "utf-16": (GOOD.encode("utf-16"), "text in UTF-8"),
    "latin-1": (GOOD.encode() + b"# \xe9t\xe9\n", "byte 0xe9 at position"),
    "zero bytes": (GOOD.encode() + bytes(512), "zero bytes"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "text in UTF-8"),
    "open quote": (GOOD.replace("100,102", '"100,102', 1).encode(), "must be CSV"),
}


@pytest.mark.parametrize("what", BROKEN_FILES)
def test_a_broken_file_is_refused_by_name(tmp_path, what):
    content, message = BROKEN_FILES[what]
    path = tmp_path / "TCS.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read_csv_bars(path, DAY)
    assert message in str(refusal.value) and str(path) in str(refusal.value)


def test_every_cut_of_an_archive_is_refused(tmp_path):
    whole = gzip.compress(as_csv(session_bars()).encode())
    path = tmp_path / "TCS.csv.gz"
    for cut in [1, 2, 5, 10, 18, len(whole) // 2, len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"whole gzip archive.*TCS\.csv\.gz"):
            read_csv_bars(path, DAY)
    path.write_bytes(GOOD.encode())
    with pytest.raises(DataError, match="whole gzip archive"):
        read_csv_bars(path, DAY)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(DataError):
        read_csv_bars(path, DAY)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "TCS.csv"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match=r"must be readable; found Permission denied.*TCS\.csv"):
        read_csv_bars(path, DAY)


def test_missing_and_wrong_folders(tmp_path):
    with pytest.raises(DataError, match=r"must be readable; found No such file.*TCS\.csv"):
        read_csv_bars(tmp_path / "TCS.csv", DAY)
    (tmp_path / "file").write_text("")
    for folder in ("nowhere", "file"):
        with pytest.raises(DataError, match="the folder must be there and readable"):
            CsvTree(tmp_path / folder).symbols()


BAD_ROWS = {
    "2024-01-03,100,102,99,101": "wrong_number_of_fields",
    "2024-01-03,100,102,99,101,5,6": "wrong_number_of_fields",
    "03/01/2024,100,102,99,101,5": "bad_timestamp",
    ",100,102,99,101,5": "bad_timestamp",
    "1704220200,100,102,99,101,5": "bad_timestamp",
    "2024-02-30,100,102,99,101,5": "bad_timestamp",
    "now,100,102,99,101,5": "bad_timestamp",
    "2024-01-06,100,102,99,101,5": "not_a_session",
    "2024-01-26,100,102,99,101,5": "not_a_session",
    "2199-01-02,100,102,99,101,5": "not_a_session",
    "2024-01-03,abc,102,99,101,5": "not_a_number",
    "2024-01-03,100,,99,101,5": "not_a_number",
    "2024-01-03,100,inf,99,101,5": "not_a_number",
    "2024-01-03,100,102,nan,101,5": "not_a_number",
    '2024-01-03,100,102,99,"1,101",5': "not_a_number",
    "2024-01-03,100,102,99,101,": "not_a_number",
    "2024-01-03,100,102,0,101,5": "not_positive",
    "2024-01-03,-100,102,99,101,5": "not_positive",
    "2024-01-03,100,102,99,101,-5": "negative_volume",
    "2024-01-03,100,102,99,101,1e300": "volume_too_large",
    "2024-01-03,100,98,99,99,5": "high_below_low",
    "2024-01-03,103,102,99,101,5": "open_or_close_outside_range",
    "2024-01-03,100,102,99,98.9,5": "open_or_close_outside_range",
    "2024-01-03,100,100,100,100,0": "no_trade",
    "2024-01-02,100,102,99,101,5": "duplicate_timestamp",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_left_out_with_its_reason(tmp_path, row):
    path = tmp_path / "TCS.csv"
    path.write_text(GOOD + row + "\n")
    read = read_csv_bars(path, DAY)
    assert (len(read.bars), read.rows_read) == (2, 3)
    assert read.rejected[["row", "reason"]].to_numpy().tolist() == [[3, BAD_ROWS[row]]]
    column, value = read.rejected.loc[0, ["column", "value"]]
    assert value in row and (column or BAD_ROWS[row] == "wrong_number_of_fields")


MINUTES = st.integers(8 * 60 + 40, 16 * 60 + 20)
STAMPS = st.builds(
    lambda day, minute, second: (
        pd.Timestamp(f"2024-01-{day:02d}", tz=IST) + pd.Timedelta(minutes=minute, seconds=second)
    ),
    st.integers(4, 9),  # Thursday to Tuesday over a weekend
    MINUTES,
    st.sampled_from([0, 0, 0, 4, 5, 6, 30, 55, 56]),
)
NUMBERS = st.sampled_from([100.0, 100.0, 101.0, 99.0, 130.0, 0.0, -1.0, float("nan"), float("inf")])
SHARES = st.sampled_from([0.0, 0.0, 5.0, 7.4, -5.0, 1e300, float("nan")])
ROWS = st.lists(st.tuples(STAMPS, *[NUMBERS] * 4, SHARES), min_size=1, max_size=40)


def verdict(row: tuple, step: int) -> str:
    "The reason against one row, found the slow way."
    ts, opened, high, low, close, volume = row
    minute, second = ts.hour * 60 + ts.minute, ts.second
    behind = ((minute - 555) * 60 + second + step * 30) % (step * 60) - step * 30
    minute += (second - behind) / 60 - minute % 1 if abs(behind) <= 5 else second / 60
    if ts.dayofweek >= 5:
        return "not_a_session"
    if not 555 <= minute < 930:
        early, late = 540 <= minute < 555, 930 <= minute < 960
        return "pre_open" if early else "closing_auction" if late else "outside_hours"
    prices = (opened, high, low, close)
    rules = {
        "off_grid": abs(behind) > 5,
        "not_a_number": not np.isfinite([*prices, volume]).all(),
        "not_positive": min(prices) <= 0,
        "negative_volume": volume < 0,
        "volume_too_large": volume > 2**53,
        "high_below_low": high * (1 + NOISE_FRAC) < low,
        "open_or_close_outside_range": max(opened, close) > high * (1 + NOISE_FRAC)
        or min(opened, close) < low * (1 - NOISE_FRAC),
        "no_trade": volume == 0 and len(set(prices)) == 1,
    }
    return next((reason for reason, broken in rules.items() if broken), "")


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([1, 5, 30]))
def test_rows_are_judged_as_one_would_by_hand(rows, step):
    interval = Interval(f"{step}minute")
    frame = pd.DataFrame(rows, columns=["ts", *BAR_COLUMNS])
    judged = judge_frame(frame, interval, "broker TCS")
    check_bars(judged.bars, "TCS", interval)
    found = dict(zip(judged.rejected["row"], judged.rejected["reason"], strict=True))
    seen, expected = set(), {}
    for number, row in enumerate(rows, 1):
        reason = verdict(row, step)
        start = row[0].round(f"{step}min") if step != 30 else row[0].round("15min")
        if not reason and start in seen:
            reason = "duplicate_timestamp"
        seen |= {start} if not reason else set()
        expected |= {number: reason} if reason else {}
    assert found == expected
    assert set(judged.bars.index) == seen and len(judged.bars) + len(found) == len(rows)
    again = judge_frame(judged.bars.reset_index(), interval, "again")
    pd.testing.assert_frame_equal(again.bars, judged.bars)
    assert again.rejected.empty and again.unsorted == 0


def test_touched_and_strange_rows_are_told_of():
    "Nothing is repaired or kept in doubt without a word."
    index = pd.date_range("2024-01-01 09:15", periods=5, freq="5min", tz=IST)
    bars = random_bars(5, volatility=0.001).set_index(index.rename("ts")).astype(float)
    bars.iloc[1, bars.columns.get_loc("volume")] = 0.0
    bars.iloc[2, bars.columns.get_loc("volume")] = 7.4
    bars.iloc[3, :4] *= 1 + CIRCUIT_FRAC + 0.01
    bars.iloc[4, bars.columns.get_loc("high")] = bars[["open", "close"]].iloc[4].max() * 0.9999999
    late = bars.iloc[[4, 0, 1, 2, 3]].set_index(index[[4, 0, 1, 2, 3]] + pd.Timedelta(seconds=3))
    judged = judge_frame(late.rename_axis("ts").reset_index(), Interval.MINUTE_5, "broker TCS")
    assert judged.rejected.empty and list(judged.bars.index) == list(index)
    assert judged.flagged[["row", "reason"]].to_numpy().tolist() == [
        [3, "zero_volume"],
        [5, "jump"],
    ], "back down again from 21 % above is a fall of 17 %"
    words = ("out of order", "within 5 s", "were widened", "were rounded", "jump", "zero_volume")
    assert len(judged.notes) == 6
    assert all(word in note for word, note in zip(words, judged.notes, strict=True))


def test_every_daily_reason_is_tried():
    assert set(BAD_ROWS.values()) == set(REASONS) - {*SET_APART, "outside_hours", "off_grid"}


def test_first_good_row_of_a_time_is_kept(tmp_path):
    path = tmp_path / "TCS.csv"
    path.write_text(HEAD + "2024-01-01,1,2,1,x,5\n2024-01-01,1,2,1,2,6\n2024-01-01,1,2,1,2,7\n")
    read = read_csv_bars(path, DAY)
    assert read.bars["volume"].tolist() == [6]
    assert read.rejected["reason"].tolist() == ["not_a_number", "duplicate_timestamp"]


def test_hours_and_grid(tmp_path):
    path = tmp_path / "TCS.csv"
    times = {"08:55": "outside_hours", "09:00": "pre_open", "09:10": "pre_open", "09:15": ""}
    times |= {"09:21": "off_grid", "09:25:30": "off_grid", "15:25": "", "15:30": "closing_auction"}
    times |= {"15:55": "closing_auction", "16:00": "outside_hours", "23:55": "outside_hours"}
    rows = [f"2024-01-01T{t},100,102,99,101,5" for t in times]
    path.write_text(HEAD + "\n".join(rows))
    read = read_csv_bars(path, FIVE)
    assert read.rejected["reason"].tolist() == [r for r in times.values() if r]
    assert [f"{t:%H:%M}" for t in read.bars.index] == [t for t, r in times.items() if not r]


def test_evening_session_keeps_its_hours(tmp_path):
    "Muhurat trading of 2024-11-01 was held from 18:00 to 19:00."
    path = tmp_path / "TCS.csv"
    rows = [f"2024-11-01T{t},100,102,99,101,5" for t in ("09:15", "18:00", "18:55", "19:00")]
    path.write_text(HEAD + "\n".join(rows))
    read = read_csv_bars(path, FIVE)
    assert [f"{t:%H:%M}" for t in read.bars.index] == ["18:00", "18:55"]


def test_single_precision_noise_is_mended_and_no_more(tmp_path):
    path = tmp_path / "TCS.csv"
    path.write_text(
        HEAD
        + "2024-01-01,1363.30004882,1363.3,1290,1300,5.4\n2024-01-02,1363.302,1363.3,1290,1300,5\n"
    )
    read = read_csv_bars(path, DAY)
    bar = read.bars.iloc[0]
    assert (bar["high"], bar["volume"]) == (1363.30004882, 5)
    assert read.rejected["reason"].tolist() == ["open_or_close_outside_range"]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_stamps_without_a_zone_follow_the_zone_told(tmp_path, zone):
    path = tmp_path / "TCS.csv"
    index = pd.date_range("2024-01-01 09:15", periods=75, freq="5min", tz="Asia/Kolkata")
    bars = random_bars(75).set_index(index.rename("ts"))
    path.write_text(as_csv(bars.set_axis(index.tz_convert(zone).tz_localize(None))))
    read = read_csv_bars(path, FIVE, zone=zone)
    pd.testing.assert_frame_equal(read.bars, bars, check_freq=False)


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%Y%m%d", "%Y-%m-%d 00:00:00+05:30", "%Y-%m-%dT00:00"]
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata"])
def test_daily_bars_stand_on_their_session(tmp_path, form, zone):
    path, bars = tmp_path / "TCS.csv", session_bars(50)
    path.write_text(as_csv(bars.set_axis(bars.index.strftime(form))))
    read = read_csv_bars(path, DAY, zone=zone)
    pd.testing.assert_frame_equal(read.bars, bars, check_freq=False)


def test_daily_bars_stamped_the_evening_before_in_utc(tmp_path):
    path, bars = tmp_path / "TCS.csv", session_bars(50)
    path.write_text(as_csv(bars.set_axis(bars.index.tz_convert("UTC"))))
    pd.testing.assert_frame_equal(read_csv_bars(path, DAY).bars, bars, check_freq=False)


def test_order_of_rows_and_columns_does_not_matter(tmp_path):
    path, bars = tmp_path / "TCS.csv", session_bars()
    shuffled = bars.sample(frac=1, random_state=1)[["volume", "low", "close", "open", "high"]]
    path.write_text("\ufeff" + as_csv(shuffled).replace("\n", "\r\n"))
    read = read_csv_bars(path, DAY)
    pd.testing.assert_frame_equal(read.bars, bars, check_freq=False)
    assert read.rejected.empty and read.unsorted > 150
    assert "out of order" in read.notes[0]


def test_many_files_of_one_symbol(tmp_path):
    folder, bars = tmp_path / "BAJAJ-AUTO" / "1day", session_bars()
    folder.mkdir(parents=True)
    for month, part in bars.groupby(bars.index.strftime("%Y-%m")):
        (folder / f"{month}.csv.gz").write_bytes(gzip.compress(as_csv(part).encode()))
    (folder / "metadata.json").write_text("{}")
    tree = CsvTree(tmp_path)
    read = read_csv_bars(tree.files("BAJAJ-AUTO", DAY), DAY)
    pd.testing.assert_frame_equal(read.bars, bars, check_freq=False)
    assert read.rejected.empty and read.unsorted == 0 and tree.symbols() == ["BAJAJ-AUTO"]
    (folder / "2024-01b.csv").write_text(as_csv(bars.head(1)))
    again = read_csv_bars(tree.files("BAJAJ-AUTO", DAY), DAY)
    assert again.rejected[["file", "reason"]].to_numpy().tolist() == [
        ["2024-01b.csv", "duplicate_timestamp"]
    ]


def test_a_range_reads_the_same_rows_as_the_whole(tmp_path):
    path, bars = tmp_path / "TCS.csv", session_bars()
    path.write_text(as_csv(bars) + "2024-01-07,1,2,1,2,5\nrubbish,1,2,1,2,5\n")
    part = read_csv_bars(path, DAY, start=date(2024, 3, 1), end=date(2024, 3, 31))
    march = bars[(bars.index >= "2024-03-01") & (bars.index < "2024-04-01")]
    pd.testing.assert_frame_equal(part.bars, march, check_freq=False)
    assert part.rejected["reason"].tolist() == ["bad_timestamp"], "its day is not known"
    assert part.rows_read == len(march) + 1


def test_no_accident_gets_through(tmp_path):
    "Whatever happens to the text: a DataError, or sound bars with every row accounted for."
    rng, path = random.Random(1), tmp_path / "TCS.csv"
    text, refused = as_csv(session_bars(60)), 0
    junk = ["", ",", '"', "\n", "-", "nan", "0", "9" * 30, "e", "\t", "é", "Z", "+05:30", "2024-"]
    for _ in range(250):
        damaged = text
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            damaged = damaged[:place] + rng.choice(junk) + damaged[place + rng.randint(0, 12) :]
        path.write_text(damaged)
        try:
            read = read_csv_bars(path, DAY)
        except DataError as error:
            assert "TCS.csv" in str(error)
            refused += 1
            continue
        check_bars(read.bars, "TCS", DAY)
        assert len(read.bars) + len(read.rejected) == read.rows_read
        assert set(read.rejected["reason"]) <= set(REASONS)
    assert 0 < refused < 200


REAL = {
    "nse_daily": (DAY, 80, 112_661, {"no_trade": 88, "not_a_session": 71}),
    "nse_daily_upstox": (DAY, 42, 51_207, {}),
    "nse_intraday_1m": (Interval.MINUTE_1, 2, 93_037, {"closing_auction": 41}),
    "nse_intraday_5m": (FIVE, 8, 74_423, {"closing_auction": 33}),
    "nse_intraday_5m_yahoo": (FIVE, 40, 66_000, {}),
}


@needs_data
@pytest.mark.parametrize("folder", REAL)
def test_real_folders_give_what_their_description_says(folder):
    "Rows and known defects as the data's own README counts them."
    interval, symbols, rows, reasons = REAL[folder]
    tree = CsvTree(DATA / folder)
    read = [read_csv_bars(tree.files(s, interval), interval) for s in tree.symbols()]
    assert (len(read), sum(r.rows_read for r in read)) == (symbols, rows)
    found = pd.concat([r.rejected["reason"] for r in read]).value_counts().to_dict()
    assert found == reasons
    for each in read:
        check_bars(each.bars, each.origin, interval)


@needs_data
def test_stale_days_are_the_known_ones():
    tree = CsvTree(DATA / "nse_daily")
    read = [read_csv_bars(tree.files(s, DAY), DAY) for s in tree.symbols()]
    days = pd.concat([r.rejected for r in read])["ts"].dt.date.value_counts()
    assert (days[date(2025, 3, 18)], days[date(2026, 1, 15)]) == (70, 71)


@needs_data
def test_reader_keeps_every_digit_of_a_vendor():
    path = DATA / "nse_daily" / "RELIANCE.csv.gz"
    plain = pd.read_csv(
        io.BytesIO(gzip.decompress(path.read_bytes())), float_precision="round_trip"
    )
    plain = plain[plain["volume"] > 0]
    read = read_csv_bars(path, DAY)
    for column in ("open", "high", "low", "close", "volume"):
        assert np.array_equal(read.bars[column], plain[column])


@needs_data
def test_utc_vendor_meets_the_ist_vendor():
    "Closes of HDFCBANK at the same five minutes differ by 0.3 % at most, as the README says."
    ours, theirs = (
        read_csv_bars(DATA / folder / "HDFCBANK.csv.gz", FIVE).bars["close"]
        for folder in ("nse_intraday_5m", "nse_intraday_5m_yahoo")
    )
    both = ours.index.intersection(theirs.index)
    gap = (ours[both] / theirs[both] - 1).abs()
    assert len(both) > 500 and gap.max() < 0.0035 and gap.median() < 1e-4


@needs_data
def test_jumps_are_the_known_ones():
    "Moves that the data's own README names, and no flag on any of any other row."
    known = {"ADANIENT": 5, "ADANIGREEN": 1, "ADANIPORTS": 1, "ADANIPOWER": 1, "AXISBANK": 1}
    known |= {"BAJAJFINSV": 1, "BAJFINANCE": 1, "CANBK": 1, "GODREJCP": 1, "HINDZINC": 1}
    known |= {"MOTHERSON": 2, "VBL": 1, "VEDL": 1}
    tree = CsvTree(DATA / "nse_daily")
    flagged = {s: read_csv_bars(tree.files(s, DAY), DAY).flagged for s in tree.symbols()}
    found = {s: len(f) for s, f in flagged.items() if len(f)}
    assert found == known and set(pd.concat(flagged.values())["reason"]) == {"jump"}
    assert date(2022, 1, 14) in set(flagged["MOTHERSON"]["ts"].dt.date)
