"""What is held and what is missing: from a store on disk to the files and the exit code."""

import io
import json
import re
import struct
import time
from datetime import date
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sensequant.core.settings import load_settings
from sensequant.core.testing import tiny_bars
from sensequant.core.types import REJECT_COLUMNS, Fetched, Interval
from sensequant.data.bars import BarStore
from sensequant.data.coverage import (
    SHADES,
    Span,
    coverage,
    coverage_page,
    coverage_picture,
    coverage_status,
    coverage_summary,
    find_gaps,
    monthly,
    shared_gaps,
    write_coverage,
)
from sensequant.market.symbols import universe
from sensequant.ops.data_cli import data

YEARS = Span(Interval.DAY, date(2022, 1, 1), date(2024, 12, 31))
NOTHING = pd.DataFrame(columns=list(REJECT_COLUMNS))
FULL = tiny_bars(np.full(len(YEARS.expected()), 100.0)).set_index(YEARS.expected())
cli = CliRunner()


def judged(symbol, bars, listed=None, span=YEARS):
    """The coverage of a symbol with these bars."""
    return coverage(symbol, Fetched(bars, NOTHING, len(bars), ""), span, listed)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_months_add_up_to_the_whole(data):
    """Held sessions counted by month are those counted at once."""
    n = len(FULL)
    holes = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, 90)), max_size=4))
    keep = np.ones(n, bool)
    for start, length in holes:
        keep[start : start + length] = False
    listed = data.draw(st.none() | st.sampled_from(list(FULL.index.date[: n // 2])))
    bars = FULL[keep & (True if listed is None else FULL.index.date >= listed)]
    found = judged("TCS", bars, listed)
    shares = monthly([found], YEARS).loc["TCS"]
    due = YEARS.expected(listed)
    months = pd.Series(due.strftime("%Y-%m")).value_counts().reindex(shares.index).fillna(0)
    held = (shares.fillna(0) * months).round(6)
    assert held.sum() == pytest.approx(found.sessions_held)
    assert (shares.isna() == (months == 0)).all()
    assert sum(g.sessions for g in found.missing) == found.sessions_expected - found.sessions_held


def test_the_gaps_are_those_of_the_calendar_and_the_listing():
    bars = FULL.drop(FULL.loc["2023-03-01":"2023-03-15"].index).loc["2022-06-01":]
    found = judged("LICI", bars, date(2022, 6, 1))
    (gap,) = found.missing
    assert (gap.first, gap.last, gap.sessions) == (date(2023, 3, 1), date(2023, 3, 15), 10)
    assert found.sessions_expected == len(YEARS.expected(date(2022, 6, 1)))


def test_a_share_that_is_wholly_missing_does_not_hide_among_many():
    many = [judged(f"S{n:02}", FULL) for n in range(95)]
    none = judged("GONE", FULL.iloc[:0])
    told = coverage_summary([*many, none], YEARS, 0.95)
    assert told["coverage_frac"] > 0.95 and told["missing_local"] == ["GONE"]
    assert told["status"]["ok"] == 95


def test_one_that_was_listed_after_the_range_is_not_missing():
    late = judged("HYUNDAI", FULL.iloc[:0], date(2025, 1, 6))
    assert late.sessions_expected == 0
    assert coverage_summary([late], YEARS, 1.0)["status"]["ok"] == 1


def crowd(n=96):
    """Many symbols over three years, some with holes, some listed late."""
    chance, found = np.random.default_rng(1), []
    for i, share in enumerate(universe("nifty100")[:n]):
        bars = (
            FULL.drop(FULL.index[(a := chance.integers(0, 600)) : a + 60]) if i % 7 == 0 else FULL
        )
        bars = bars.iloc[chance.integers(1, 400) :] if i % 11 == 3 else bars
        found.append(judged(share.nse_code, bars, bars.index[0].date()))
    return found


def test_ninety_six_symbols_over_three_years_are_drawn_legibly(tmp_path):
    found = crowd()
    summary, begun = coverage_summary(found, YEARS, 0.95, "breeze"), time.process_time()
    paths = write_coverage(tmp_path, found, YEARS, summary)
    assert time.process_time() - begun < 10
    picture = Image.open(paths["picture"]).convert("RGB")
    assert picture.height >= 96 * 12 and picture.width >= 36 * 15
    colours = {c for _, c in picture.getcolors(1_000_000)}
    near = [struct.unpack("BBB", bytes.fromhex(c[1:])) for _, c, _ in SHADES]
    for shade in near:
        assert any(max(abs(a - b) for a, b in zip(shade, c, strict=True)) <= 8 for c in colours)
    card = coverage_picture(monthly(found, YEARS), summary)
    names = [t.get_text() for t in card.axes[0].get_yticklabels()]
    assert names == sorted(c.symbol for c in found) and len(names) == 96


def test_the_shades_are_told_apart_in_grey():
    """Lightness falls from whole to nothing, so no eye needs the colour."""
    light = []
    for _, colour, _ in SHADES:
        rgb = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
        light.append(float(rgb @ [0.2126, 0.7152, 0.0722]))
    assert all(a - b > 0.07 for a, b in pairwise(light))


def test_the_page_needs_nothing_but_itself():
    found = crowd(20)
    shares = monthly(found, YEARS)
    page = coverage_page(found, shares, coverage_summary(found, YEARS, 0.95, "<b>&"))
    assert not re.search(r"https?://|<script|src=|url\(", page)
    assert "default-src 'none'" in page and "&lt;b&gt;&amp;" in page
    assert page.count("<td class=") == 20 * 36


def page_of(found, span=YEARS, source="csv-a"):
    """The page of these symbols."""
    return coverage_page(found, monthly(found, span), coverage_summary(found, span, 0.95, source))


def test_the_page_explains_white_squares_and_rows_without_one():
    late = [judged("LATE", FULL.iloc[:0], date(2025, 1, 6)), judged("TCS", FULL)]
    page = page_of(late)
    key = re.search(r"<p class=key>(.*?)</p>", page)[1]
    assert [w for _, _, w in SHADES] + ["not listed"] == re.findall(r"</span>([^<]+)", key)
    row = re.search(r"<th>LATE</th>(.*?)</tr>", page)[1]
    assert row.endswith(">not listed in this range</td>")
    assert page.count("not listed in this range") == 1


@pytest.mark.parametrize(
    ("start", "end", "heads"),
    [
        (date(2022, 1, 1), date(2024, 12, 31), [("12", "2022"), ("12", "2023"), ("12", "2024")]),
        (date(2022, 11, 1), date(2023, 3, 31), [("2", ""), ("3", "2023")]),
    ],
)
def test_the_years_stand_over_their_months(start, end, heads):
    span = Span(Interval.DAY, start, end)
    bars = FULL.loc[str(start) : str(end)]
    page = page_of([judged("TCS", bars, span=span)], span)
    assert re.findall(r'<th colspan="(\d+)">(\d*)</th>', page) == heads
    assert page.count("<td class=") == sum(int(n) for n, _ in heads)


def test_sessions_that_many_lack_are_one_line_with_their_number():
    down = FULL.drop(FULL.loc["2023-03-01":"2023-03-15"].index)
    found = [judged(f"S{n:02}", down) for n in range(30)]
    found += [judged("TCS", FULL.drop(FULL.index[[5]]))]
    page = page_of(found)
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    cells = [row.split("</td><td>") for row in rows if "2023-03-01" in row]
    names = ", ".join(f"S{n:02}" for n in range(12))
    assert cells == [["2023-03-01", "2023-03-15", "10", "30", f"{names} and 18 more"]]
    assert "31 gaps, 2 different ones" in page
    assert page.index("2023-03-15</td>") < page.index("<td>TCS</td>")


@given(st.lists(st.sets(st.integers(0, 40), max_size=8), min_size=1, max_size=6))
def test_gaps_told_together_are_the_gaps_told_alone(lost):
    found = [judged(f"S{i}", FULL.drop(FULL.index[sorted(days)])) for i, days in enumerate(lost)]
    together = shared_gaps(found)
    assert len({gap for gap, _ in together}) == len(together)
    alone = {(c.symbol, gap) for c in found for gap in c.missing}
    assert {(name, gap) for gap, names in together for name in names} == alone
    assert sum(g.sessions * len(names) for g, names in together) == sum(map(len, lost))


@pytest.mark.parametrize(
    ("source", "invented"),
    [
        ("sim-20-1-0a1b2c", True),
        ("breeze-sandbox-abc123", True),
        ("breeze", False),
        ("csv-sim-1", False),
    ],
)
def test_simulated_bars_are_called_so(source, invented):
    found = [judged("TCS", FULL)]
    summary = coverage_summary(found, YEARS, 0.95, source)
    card = coverage_picture(monthly(found, YEARS), summary)
    for told in (card.axes[0].get_title("left"), page_of(found, source=source)):
        assert ("SIMULATED" in told) == invented


def test_a_crowd_larger_than_a_picture_shows_the_worst():
    found = [judged(f"S{n:03}", FULL if n else FULL.iloc[:300]) for n in range(170)]
    card = coverage_picture(monthly(found, YEARS), coverage_summary(found, YEARS, 0.95))
    names = [t.get_text() for t in card.axes[0].get_yticklabels()]
    assert (
        len(names) == 150 and "S000" in names and "the worst 150" in card.axes[0].get_title("left")
    )


def test_the_report_has_a_line_a_symbol_without_a_path(tmp_path):
    found = crowd(12)
    paths = write_coverage(tmp_path, found, YEARS, coverage_summary(found, YEARS, 0.95, "breeze"))
    text = paths["report"].read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["symbol"] for line in lines] == sorted(c.symbol for c in found)
    assert {"status", "coverage_frac", "missing", "listed_on", "first", "last"} <= lines[0].keys()
    assert str(tmp_path) not in text
    summary = json.loads(paths["summary"].read_text())
    assert summary["symbols"] == 12 and summary["sessions_held"] <= summary["sessions_expected"]


def test_find_gaps_of_nothing_and_of_everything():
    days = YEARS.expected()
    assert find_gaps(days, days) == ()
    (whole,) = find_gaps(days, days[:0])
    assert whole.sessions == len(days)


# ---------------------------------------------------------------------------- the command line


def stored(source="breeze", interval=Interval.DAY, **bars):
    """A store in the home of this test, with these bars."""
    home = load_settings().home
    store = BarStore(home / "data" / "bars")
    for symbol, frame in bars.items():
        store.write(source, symbol.replace("_", "&"), interval, frame)
    return home


SPAN = ["--start", "2022-01-01", "--end", "2024-12-31"]


@pytest.mark.parametrize(("share", "code"), [(0.97, 0), (0.90, 3)])
def test_the_exit_code_tells_whether_enough_is_held(share, code):
    home = stored(TCS=FULL, INFY=FULL.iloc[: int(share * len(FULL))])
    done = cli.invoke(data, ["coverage", *SPAN])
    assert done.exit_code == code, done.stdout
    folder = home / "data" / "coverage" / "breeze" / "1day"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "coverage.html",
        "coverage.png",
        "coverage_report.jsonl",
        "coverage_summary.json",
    ]
    Image.open(io.BytesIO((folder / "coverage.png").read_bytes())).verify()
    strict = cli.invoke(data, ["coverage", *SPAN, "--threshold", "0.999"])
    assert strict.exit_code == 3 and "INFY" in strict.stdout


def test_a_named_symbol_that_is_not_held_is_missing():
    stored(TCS=FULL)
    done = cli.invoke(data, ["coverage", *SPAN, "--symbols", "TCS,INFY,TATACAP"])
    assert done.exit_code == 3
    summary = json.loads(next(load_settings().home.rglob("coverage_summary.json")).read_text())
    assert summary["missing_local"] == ["INFY"]
    assert summary["status"]["ok"] == 2, "TATACAP was listed after the range"


def test_a_symbol_without_a_code_says_so():
    stored(TCS=FULL)
    later = ["--start", "2025-11-03", "--end", "2025-12-31"]
    cli.invoke(data, ["coverage", *later, "--symbols", "TATACAP,TCS"])
    summary = json.loads(next(load_settings().home.rglob("coverage_summary.json")).read_text())
    assert summary["missing_mapping"] == ["TATACAP"] and summary["missing_local"] == ["TCS"]


def test_two_sources_of_a_kind_must_be_told_apart():
    stored("csv-a-111111", TCS=FULL)
    stored("csv-b-222222", TCS=FULL)
    done = cli.invoke(data, ["coverage", *SPAN, "--source", "csv"])
    assert done.exit_code == 2
    assert all(name in done.stderr for name in ("csv-a-111111", "csv-b-222222"))
    assert cli.invoke(data, ["coverage", *SPAN, "--source", "csv-a-111111"]).exit_code == 0


def test_an_empty_store_is_wrong_use_not_a_traceback():
    done = cli.invoke(data, ["coverage", *SPAN])
    assert done.exit_code == 2 and "Traceback" not in done.stderr


def test_a_range_that_has_not_begun_is_refused():
    stored(TCS=FULL)
    done = cli.invoke(data, ["coverage", "--start", "2099-01-01", "--end", "2099-02-01"])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)


@given(st.integers(1, 400), st.data())
def test_a_share_that_is_just_enough_is_enough(expected, draw):
    held = draw.draw(st.integers(1, expected))
    days = YEARS.expected()[:expected]
    span = Span(Interval.DAY, days[0].date(), days[-1].date())
    found = coverage("TCS", Fetched(FULL.loc[days[:held]], NOTHING, held, "x"), span)
    assert coverage_status(found, held / expected) == "ok"
    assert held == expected or coverage_status(found, (held + 1) / expected) == "partial"
