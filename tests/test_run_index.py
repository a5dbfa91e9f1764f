"""The list of all runs, and two runs side by side: whatever lies in their folders."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import PROGRAM, look
from bs4 import BeautifulSoup
from typer.testing import CliRunner

from sensequant.core.events import read_events
from sensequant.core.state import State
from sensequant.data.runs import Run
from sensequant.govern import run_index as x
from sensequant.govern.promotion import Register, register_path
from sensequant.ops.main import app
from sensequant.ops.orchestrator import render_again

ROOT = Path(__file__).parents[1]


def page_of(path):
    "A page, after the rules that every page obeys."
    text = path.read_text("utf-8")
    page = BeautifulSoup(text, "html.parser")
    bare = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?://|url\(|@import", bare)
    assert not page.find_all(["script", "link", "iframe", "object", "form", "base"])
    assert not [a for tag in page.find_all(True) for a in tag.attrs if a.startswith("on")]
    assert "default-src 'none'" in page.find("meta", {"http-equiv": True})["content"]
    assert all((path.parent / a["href"]).is_file() for a in page.find_all("a"))
    rows = [len([r for r in t.find_all("tr") if r.find("td")]) for t in page.find_all("table")]
    assert all(n <= 12 for n in rows)
    return page


def rows_of(page):
    "The runs of a list, by id: its cells as text."
    found = {}
    for row in page.find_all("tr"):
        if row.code:
            found[row.code.get_text()] = [
                " ".join(c.get_text(" ").split()) for c in row.find_all("td")
            ]
    return found


def small_run(home, run_id, **changes):
    "The folder of a run that has nothing but what the list reads."
    folder = home / "runs" / run_id
    folder.mkdir(parents=True)
    stats = {"rank_ic": {"mean": 0.05, "t": 3.2}, "alpha": {"daily": 1e-4}}
    stats |= {"net": {"sharpe": 1.1}, "n_sessions": 480}
    told = {"status": "rejected", "gate": {"checks": [], "reasons": []}, "statistical_tests": stats}
    (folder / "promotion_briefing.json").write_text(json.dumps(told | changes))
    config = {"source": "csv", "symbols": ["A", "B"], "start": "2020-01-01", "end": "2024-12-31"}
    (folder / "config.json").write_text(json.dumps(config))
    return Run(run_id, home)


def other_run(run, run_id):
    "The same run under another name, so that two stand beside each other."
    shutil.copytree(run.folder, run.home / "runs" / run_id)
    return Run(run_id, run.home)


def changed(path, **changes):
    "Change some keys of a file of JSON, as nobody should."
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The list


def test_a_finished_run_is_listed_with_its_figures(finished_run):
    page = page_of(finished_run.home / "reports" / "index.html")
    (cells,) = rows_of(page).values()
    stats = finished_run.artifacts.read_json("stat_tests.json")
    assert finished_run.run_id in cells[0] and cells[1] == "READY FOR REVIEW"
    assert cells[2] == "simulated: 3 symbols, 2022-07-01 to " + str(
        finished_run.artifacts.read_json("inputs.json")["end"]
    )
    assert stats["rank_ic"]["mean"] is None  # three shares have no ranks
    assert cells[3:8] == [
        "",
        "",
        f"{1e4 * stats['alpha']['daily']:+.2f}",
        f"{stats['net']['sharpe']:.2f}",
        f"{stats['n_sessions']}",
    ]
    assert cells[8] == "ready-for-review"
    links = {a["href"] for a in page.find_all("a")}
    assert f"{finished_run.run_id}/briefing.html" in links
    front = BeautifulSoup((finished_run.pages / "index.html").read_text("utf-8"), "html.parser")
    assert "../index.html" in {a["href"] for a in front.find_all("a")}


def test_the_newest_run_stands_first_and_older_ones_are_folded_away(tmp_path):
    names = [f"live_candidate_202401{d:02}_093000" for d in range(1, 28)]
    for name in names:
        small_run(tmp_path, name)
    page = page_of(x.write_index(tmp_path))
    assert list(rows_of(page)) == names[::-1]
    assert len(page.find_all("details")) == 2 and len(page.find_all("table")) == 3
    assert page.h1.get_text() == "27 runs" and "27 rejected" in page.find("p").get_text()


def broken(home):
    "Runs of which something is wrong, by id, with a word that the list must say."
    told = {}
    for day, (fault, word) in enumerate(
        {
            "empty": "promotion_briefing.json is not there",
            "cut": "cannot be read: JSONDecodeError",
            "list": "cannot be read: no object",
            "binary": "promotion_briefing.json cannot be read",
            "deep": "cannot be read: RecursionError",
            "folder": "cannot be read: IsADirectoryError",
            "odd": "REJECTED",
        }.items(),
        start=1,
    ):
        run = small_run(home, f"live_candidate_202402{day:02}_093000")
        path = run.folder / "promotion_briefing.json"
        path.unlink()
        if fault == "cut":
            path.write_text('{"status": "rej')
        elif fault == "list":
            path.write_text("[1, 2]")
        elif fault == "binary":
            path.write_bytes(b"\xff\xfe\x00{")
        elif fault == "deep":
            path.write_text("[" * 200_000)
        elif fault == "folder":
            path.mkdir()
        elif fault == "odd":
            odd = {"status": "rejected", "gate": 3, "statistical_tests": {"rank_ic": [1]}}
            path.write_text(json.dumps(odd | {"figures": 7, "sections": None}))
            (run.folder / "config.json").write_text('{"symbols": 5, "sim_symbols": "x"}')
            (run.folder / "inputs.json").write_text('{"listed_on": "no", "simulated": "?"}')
        told[run.run_id] = word
    return told


def test_broken_folders_are_lines_of_the_list(tmp_path):
    told = broken(tmp_path)
    good = small_run(tmp_path, "live_candidate_20240301_093000")
    (tmp_path / "runs" / "live_candidate_20240302_093000").write_text("a file, not a folder")
    with State(tmp_path / "data" / "state" / "sensequant.db") as state:
        state.start_run("live_candidate_20240303_093000", {}, os.getpid(), True)
        state.finish_run("live_candidate_20240303_093000", "failed", "<script>no</script>")
    rows = rows_of(page_of(x.write_index(tmp_path)))
    for run_id, word in told.items():
        assert word in rows[run_id][1], rows[run_id]
    assert "+0.0500" in rows[good.run_id] and "not in the state" not in rows[good.run_id][1]
    gone = rows["live_candidate_20240303_093000"][1]
    assert gone.startswith("DELETED") and "<script>no</script>" in gone
    assert "live_candidate_20240302_093000" not in rows
    assert x.refresh_index(tmp_path) == []


def test_a_damaged_state_does_not_take_the_list_away(tmp_path):
    small_run(tmp_path, "live_candidate_20240301_093000")
    for name in ("sensequant.db", "register.db"):
        path = tmp_path / "data" / "state" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no database")
    page = page_of(x.write_index(tmp_path))
    assert list(rows_of(page)) == ["live_candidate_20240301_093000"]
    assert page.get_text().count("cannot be read") == 2


def test_a_validation_is_no_deleted_run(tmp_path):
    run, name = small_run(tmp_path, "live_candidate_20260101_100000"), "validation_20260101_110000"
    with run.state as state:
        state.start_run(name, {"kind": "validation"}, os.getpid(), True)
        state.finish_run(name, "success")
    lines, notes = x.run_lines(tmp_path)
    assert ([line.run_id for line in lines], notes) == ([run.run_id], [])


def test_a_run_whose_process_died_keeps_its_release(tmp_path):
    run = small_run(tmp_path, "live_candidate_20260101_100000")
    with run.state as state:
        state.start_run(run.run_id, {}, 2**22 + 1, True)
    Register(register_path(tmp_path)).move(run.run_id, "candidate", by="gate", why="judged")
    (line,), _ = x.run_lines(tmp_path)
    assert (line.status, line.release) == ("interrupted", "candidate")


def test_a_run_taken_up_again_shows_no_stale_verdict(tmp_path):
    run = small_run(tmp_path, "live_candidate_20240301_093000")
    with State(tmp_path / "data" / "state" / "sensequant.db") as state:
        state.start_run(run.run_id, {}, os.getpid(), True)
    (cells,) = rows_of(page_of(x.write_index(tmp_path))).values()
    assert cells[1] == "INCOMPLETE it has not ended"
    with State(tmp_path / "data" / "state" / "sensequant.db") as state:
        state.finish_run(run.run_id, "interrupted", "stopped by the user")
    (cells,) = rows_of(page_of(x.write_index(tmp_path))).values()
    assert cells[1] == "INTERRUPTED stopped by the user"


def test_hundreds_of_runs_are_listed_quickly(tmp_path):
    for k in range(300):
        padding = {"sections": [{"text": "x" * 60_000}]}  # as large as a real one
        small_run(tmp_path, f"live_candidate_2024{k // 25 + 1:02}{k % 25 + 1:02}_093000", **padding)
    began = time.perf_counter()
    path = x.write_index(tmp_path)
    took = time.perf_counter() - began
    assert len(rows_of(page_of(path))) == 300
    assert took < 10 and path.stat().st_size < 1_000_000, took


def test_processes_that_write_the_list_at_once_leave_a_whole_one(tmp_path):
    for day in range(1, 5):
        small_run(tmp_path, f"live_candidate_2024010{day}_093000")
    code = "import sys; from pathlib import Path\n"
    code += "from sensequant.govern.run_index import write_index\n"
    code += "[write_index(Path(sys.argv[1])) for _ in range(15)]"
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    path = tmp_path / "reports" / "index.html"
    while any(p.poll() is None for p in running):
        if path.is_file():
            assert path.read_text("utf-8").endswith("</html>\n")
        time.sleep(0.02)
    assert [p.returncode for p in running] == [0, 0, 0]
    assert sorted(p.name for p in (tmp_path / "reports").iterdir()) == ["index.html"]


def test_a_list_that_cannot_be_written_stops_nothing(copied_run):
    index = copied_run.home / "reports" / "index.html"
    index.unlink()
    index.mkdir()
    assert render_again(copied_run).name == "index.html"
    last = read_events(copied_run.folder / "events.jsonl")[0][-1]
    assert last.event_type == "warning" and "the list of runs is not up to date" in last.message
    index.rmdir()
    render_again(copied_run)
    assert copied_run.run_id in index.read_text("utf-8")


# Two runs


@pytest.fixture
def two(copied_run):
    "A finished run, and one like it that earned less on other settings."
    second = other_run(copied_run, "live_candidate_29991231_093000")
    path = second.folder / "promotion_briefing.json"
    told = json.loads(path.read_text())
    for figure in told["figures"]:
        if figure["key"] == "net_sharpe":
            figure |= {"value": figure["value"] - 0.5, "text": f"{figure['value'] - 0.5:+.2f}"}
    told["gate"]["checks"][0] |= {"passed": False, "measured": "a | b"}
    path.write_text(json.dumps(told))
    changed(second.folder / "config.json", seed=77)
    return copied_run, second


def compared(*runs, more=()):
    "The command on two runs."
    return CliRunner().invoke(app, ["compare", *(r.run_id for r in runs), *more])


def test_two_runs_are_laid_side_by_side(two, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(two[0].home))
    done = compared(*two)
    assert done.exit_code == 0, done.output
    path = two[0].home / "reports" / x.comparison_name(*(r.run_id for r in two))
    assert str(path) in done.output.replace("\n", "")
    page = page_of(path)
    said = " ".join(page.get_text(" ").split())
    assert "Both read the same market over the same dates" in said
    rows = [[c.get_text().strip() for c in r.find_all("td")] for r in page.find_all("tr")]
    rows = [r for r in rows if r]
    sharpe = next(r for r in rows if r[0] == "net Sharpe ratio")
    assert sharpe[3] == "-0.50" and float(sharpe[1]) == pytest.approx(
        float(sharpe[2]) + 0.5, abs=0.011
    )
    assert next(r for r in rows if r[0] == "net alpha")[3] == "+0.00"
    assert next(r for r in rows if r[0] == "rank IC")[1:] == ["n/a"] * 3  # three shares have none
    assert next(r for r in rows if r[0] == "seed")[2] == "77" and "1 of" in said
    first = json.loads((two[0].folder / "promotion_briefing.json").read_text())["gate"]["checks"][0]
    assert [first["must"], f"yes: {first['measured']}", "NO: a | b"] in rows
    assert len(page.find_all("img")) == 1
    index = page_of(two[0].home / "reports" / "index.html")
    assert path.name in {a["href"] for a in index.find_all("a")}


def test_runs_on_other_data_are_not_compared_without_saying_so(two, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(two[0].home))
    listed = {"SIM001": None, "NEW": None}
    changed(two[1].folder / "inputs.json", feed="csv-x", simulated=False, start="2020-01-01",
            listed_on=listed)  # fmt: skip
    done = compared(*two, more=["--json"])
    told = json.loads(done.output)
    (data,) = [s for s in told["sections"] if s["key"] == "data"]
    assert data["said"][0].startswith("Not comparable")
    words = " ".join(data["points"])
    for reason in (
        "different feeds",
        "One market is simulated",
        "dates differ",
        "3 symbols are in one",
    ):
        assert reason in words, words
    assert "Not comparable" in page_of(Path(told["page"])).get_text()


def test_a_run_without_a_verdict_can_be_compared(two, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(two[0].home))
    for name in ("promotion_briefing.json", "daily_returns.parquet"):
        (two[1].folder / name).unlink()
    done = compared(*two)
    assert done.exit_code == 0, done.output
    for words in ("missing: no figures of live_candidate_2999", "a run has not been judged"):
        assert words in " ".join(done.output.split()), words
    path = two[0].home / "reports" / x.comparison_name(*(r.run_id for r in two))
    assert "a run has no daily returns" in page_of(path).get_text()


def test_runs_without_a_shared_session_have_no_picture(two):
    both = x.read_two(*(r.run_id for r in two), two[0].home)
    path = two[1].folder / "daily_returns.parquet"
    import pandas as pd

    daily = pd.read_parquet(path)
    daily.set_axis(daily.index + pd.Timedelta(days=9000)).to_parquet(path)
    section, picture = x.equity_compared(both)
    assert picture is None and "share no two sessions" in section.missing


def test_the_newest_verdict_is_compared_with_the_one_before_it(two):
    home = two[0].home
    path = home / "reports" / x.comparison_name(*(r.run_id for r in two))
    assert x.refresh_index(home) == [] and path.is_file()
    stamp = path.stat().st_mtime_ns
    assert x.refresh_index(home) == [] and path.stat().st_mtime_ns == stamp  # not drawn again
    os.utime(two[1].folder / "promotion_briefing.json", (time.time() + 5, time.time() + 5))
    assert x.refresh_index(home) == [] and path.stat().st_mtime_ns > stamp


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("latest", "latest"), "two different runs"),
        (("latest", "live_candidate_20200101_093000"), "a run must have a folder"),
        (("latest", "../../etc"), "a run must have a folder"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(finished_run, monkeypatch, names, words):
    monkeypatch.setenv("SENSEQUANT_HOME", str(finished_run.home))
    before = sorted(p.name for p in (finished_run.home / "reports").iterdir())
    done = CliRunner().invoke(app, ["compare", *names])
    assert done.exit_code == 2 and words in done.stderr
    assert sorted(p.name for p in (finished_run.home / "reports").iterdir()) == before


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome here")
def test_both_pages_stay_within_a_telephone(two):
    home = two[0].home
    x.refresh_index(home)
    for name in ("index.html", x.comparison_name(*(r.run_id for r in two))):
        seen = look(home / "reports" / name, 390)
        assert seen.scroll_width <= seen.width <= 390, name
        assert (seen.asked, seen.errors) == ([], []), name
