"""The briefing: its text, its data and its page say the same, in words that need no statistics."""

import copy
import json
import re
import shutil

import pytest
from browser import PROGRAM, look
from bs4 import BeautifulSoup

from sensequant.core.settings import load_settings
from sensequant.data.runs import Run
from sensequant.govern.briefing import (
    GLOSSARY,
    MADE_BY,
    PATTERNS,
    briefing_text,
    data_section,
    partial_briefing,
    section_text,
    training_section,
)
from sensequant.govern.findings import build_briefing
from sensequant.govern.manifest import read_manifest
from sensequant.govern.pages import Heading, briefing_top, frame_page, prose
from sensequant.ops.orchestrator import PHASES, settings_of, verdict_of

NAMES = [p.name for p in PHASES]
PROMISE = "Judged by a gate with a false-promotion rate that a test made up."


def plain(text):
    "Markdown of one cell or line as it is read."
    bare = BeautifulSoup(prose(text), "html.parser").get_text()
    return " ".join(bare.split())


def cells(line):
    "Cells of a line of a Markdown table."
    return [plain(c) for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables_of_text(text):
    "Tables of Markdown: rows of cells, the heading first."
    found, open_ = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not open_:
                found.append([])
            if "| --- |" not in line:
                found[-1].append(cells(line))
        open_ = line.startswith("|")
    return found


def tables_of_page(page):
    "Tables of a page: rows of cells, the heading first."
    read = [
        [[" ".join(c.get_text().split()) for c in row.find_all(["th", "td"])] for row in t("tr")]
        for t in page.find_all("table")
    ]
    return read


def cards_of_page(page):
    "Key figures of a page: name, value and words."
    return [
        [" ".join(card.find(tag).get_text().split()) for tag in ("i", "b", "p")]
        for card in page.find_all(class_="card")
    ]


def told_by(briefing, key=None):
    "Figures and tables of a briefing as they must be shown."
    figures, tables = [], []
    for s in briefing["sections"]:
        if s["figures"]:
            figures.append([[plain(f[k]) for k in ("name", "text", "words")] for f in s["figures"]])
        tables += [
            [[plain(c) for c in row] for row in (t["columns"], *t["rows"])] for t in s["tables"]
        ]
    return figures, tables


@pytest.fixture(scope="module")
def read(finished_run):
    "A finished run's briefing as data, text and page."
    folder = finished_run.folder
    data = json.loads((folder / "promotion_briefing.json").read_text("utf-8"))
    text = (folder / "promotion_briefing.md").read_text("utf-8")
    page = (finished_run.pages / "briefing.html").read_text("utf-8")
    return data, text, page


# The same numbers everywhere


def test_text_data_and_page_say_the_same_numbers(read):
    data, text, html = read
    page = BeautifulSoup(html, "html.parser")
    figures, tables = told_by(data)
    assert sum(map(len, figures)) == len(data["figures"]) > 30 and len(tables) > 8
    heading = ["figure", "value", "in words"]
    in_text = tables_of_text(text)
    assert [t[1:] for t in in_text if t[0] == heading] == figures
    assert [t for t in in_text if t[0] != heading] == tables
    in_page = tables_of_page(page)
    assert cards_of_page(page) == figures[0]
    assert [t[1:] for t in in_page if t[0] == heading] == figures[1:]
    assert [t for t in in_page if t[0] != heading] == tables


def test_a_number_that_differs_would_be_seen(read):
    "The comparison above can fail."
    data = copy.deepcopy(read[0])
    data["sections"][0]["figures"][0]["text"] = "+0.9999"
    figures, _ = told_by(data)
    heading = ["figure", "value", "in words"]
    assert [t[1:] for t in tables_of_text(read[1]) if t[0] == heading] != figures
    assert cards_of_page(BeautifulSoup(read[2], "html.parser")) != figures[0]


def test_each_shown_number_is_the_value_of_its_figure(read):
    shown = 0
    for figure in read[0]["figures"]:
        if figure["value"] is None:
            assert figure["text"] == "n/a"
            continue
        number = re.match(r"[-+]?[\d,]+(\.\d+)?", figure["text"])[0].replace(",", "")
        digits = len(number.split(".")[1]) if "." in number else 0
        assert float(number) == pytest.approx(figure["value"], abs=0.51 * 10**-digits), figure
        assert figure["text"].endswith(figure["unit"])
        shown += 1
    assert shown > 30


def test_the_figures_are_those_of_the_phases(read, finished_run):
    stats = finished_run.artifacts.read_json("stat_tests.json")
    held = {f["key"]: f["value"] for f in read[0]["figures"]}
    assert held["rank_ic"] == stats["rank_ic"]["mean"] and held["ic_t"] == stats["rank_ic"]["t"]
    assert held["net_alpha"] == pytest.approx(1e4 * stats["alpha"]["daily"])
    assert held["net_sharpe"] == stats["net"]["sharpe"]
    assert held["costs"] == pytest.approx(100 * stats["trading"]["cost_annualised"])
    assert held["sessions"] == stats["n_sessions"]
    overall = finished_run.artifacts.read_json("validation_summary.json")["overall"]
    assert held["precision"] == pytest.approx(100 * overall["precision"])
    coverage = finished_run.artifacts.read_json("coverage.json")["symbols"].values()
    lost = 1 - sum(s["sessions_held"] for s in coverage) / sum(
        s["sessions_expected"] for s in coverage
    )
    assert held["coverage"] == pytest.approx(100 * (1 - lost))


def test_the_months_of_the_table_multiply_to_the_year(read, finished_run):
    (table,) = [
        t
        for s in read[0]["sections"]
        for t in s["tables"]
        if t["title"].startswith("Net return by")
    ]
    daily = finished_run.artifacts.read_parquet("daily_returns.parquet")["net_return"]
    assert [int(r[0]) for r in table["rows"]] == sorted(set(daily.index.year))
    for year, *months, whole in table["rows"]:
        grown = 1.0
        for m in filter(None, months):
            grown *= 1 + float(m) / 100
        made = 100 * ((1 + daily[daily.index.year == int(year)]).prod() - 1)
        assert float(whole) == pytest.approx(made, abs=0.051)
        assert 100 * (grown - 1) == pytest.approx(made, abs=0.8)


# Words


def first_uses(text):
    "The line of each term's first use, code and commands apart."
    lines = re.sub(r"```.*?```", "", text, flags=re.S).splitlines()
    return {
        term: line
        for term, pattern in PATTERNS.items()
        if (line := next((x for x in lines if pattern.search(x)), None)) is not None
    }


def test_each_term_is_explained_where_it_is_first_used(read):
    found = first_uses(read[1])
    assert len(found) > 25
    assert [t for t, line in found.items() if GLOSSARY[t] not in line] == []
    for term in found:
        assert read[1].count(GLOSSARY[term]) == 1, term
    said = " ".join(BeautifulSoup(read[2], "html.parser").get_text(" ").split())
    assert [t for t in found if GLOSSARY[t] not in said] == []


def test_a_term_that_nobody_explains_would_be_seen():
    found = first_uses("The rank IC is high.\nThe rank IC (" + GLOSSARY["rank IC"] + ") again.")
    assert [t for t, line in found.items() if GLOSSARY[t] not in line] == ["rank IC"]


def test_the_verdict_and_its_one_reason_come_first(read, finished_run):
    data, text, html = read
    lines = [line for line in text.splitlines() if line]
    assert lines[0] == f"# {data['headline']}" and lines[1] == f"**{data['reason']}**"
    page = BeautifulSoup(html, "html.parser")
    assert page.h1.get_text() == data["headline"]
    assert page.find(class_="reason").get_text() == plain(data["reason"])
    assert "Luck alone" in data["reason"] and data["status"] == "ready-for-review"
    assert verdict_of(finished_run).message == data["headline"]


# What it holds


def test_every_section_is_there_and_no_table_is_long(read):
    keys = [s["key"] for s in read[0]["sections"]]
    wanted = ["summary", "conditions", "data", "training", "results", "statistics", "costs"]
    assert keys == [*wanted, "deployed", "models", "risks", "by_hand", "next"]
    assert not [s["missing"] for s in read[0]["sections"] if s["missing"]]
    assert all(len(t["rows"]) <= 12 for s in read[0]["sections"] for t in s["tables"])
    pictures = BeautifulSoup(read[2], "html.parser").find_all("img")
    assert len(pictures) == 6  # coverage, accounts, IC, calibration, confusion, alpha
    assert len(read[2].encode()) < 1_000_000


def test_every_condition_of_the_gate_is_listed(read, finished_run):
    gate = read[0]["gate"]
    (section,) = [s for s in read[0]["sections"] if s["key"] == "conditions"]
    rows = [row for t in section["tables"] for row in t["rows"]]
    assert len(rows) == len(gate["checks"])
    listed = {plain(row[0]).split(" (")[0] for row in rows}
    for check in gate["checks"]:
        assert any(check["must"].startswith(begins) for begins in listed), check["must"]
    measured = [plain(row[1]) for row in rows]
    verdict = finished_run.artifacts.read_json("verdict.json")
    assert len(verdict["conditions"]) == len(rows) - 1  # and the audit
    profit = next(c for c in verdict["conditions"] if c["name"] == "profit")
    assert any(m.startswith(profit["measured"].split(" bps")[0]) for m in measured)


def test_scripts_find_the_fields_they_know(read, finished_run):
    data = read[0]
    assert data["run_id"] == finished_run.run_id and "+05:30" in data["timestamp"]
    assert data["recommendation"] == "approve_staging" and data["environments"] == ["staging"]
    teacher, student = data["training"]["teacher"], data["training"]["student"]
    assert teacher["runs_completed"] == teacher["success"] and teacher["avg_f1"] is not None
    assert student["total_samples"] > 100 and 0 < student["accuracy"] < 1
    stats = data["statistical_tests"]
    sharpe = stats["sharpe_ratio"]
    assert sharpe["improvement"] == pytest.approx(sharpe["value"] - sharpe["baseline"])
    assert stats["benchmark"]["alpha"] == stats["alpha"]["daily"]
    assert len(stats["bootstrap"]["ci"]) == 2 and stats["walk_forward_cv"]["folds"] > 1
    assert set(data["risk_assessment"]) >= {
        "outstanding_issues",
        "warnings",
        "manual_review_required",
    }
    places = data["artifacts"]
    assert all((finished_run.home / places[k]).exists() for k in ("model_dir", "audit_dir"))
    assert (finished_run.home / places["manifest"]).is_file()
    assert data["manifest"]["sha256"] == finished_run.artifacts.sha256("manifest.yaml")


def test_what_would_be_deployed_is_the_manifests_model_set(read, finished_run):
    listed = read_manifest(finished_run)["artifacts"]["models"]
    assert [m["sha256"] for m in read[0]["models"]] == [m["sha256"] for m in listed]
    (section,) = [s for s in read[0]["sections"] if s["key"] == "models"]
    newest = max(m["saw_until"] for m in listed)[:10]
    assert "have not been scored yet" in section["said"][0] and newest in section["said"][1]


# Other verdicts


def judged_again(run, **changes):
    "The briefing of a run whose verdict was another one."
    verdict = run.artifacts.read_json("verdict.json")
    run.artifacts.write_json("verdict.json", verdict | changes)
    settings = settings_of(run.artifacts.read_json("config.json"))
    return build_briefing(run, PROMISE, settings, read_manifest(run))


def test_a_rejection_leads_with_its_reason(copied_run):
    verdict = copied_run.artifacts.read_json("verdict.json")
    reasons = ["net alpha must lie above 0; found -1.00 bps", "the ledger must be intact; found no"]
    conditions = [
        c | ({"passed": False, "measured": "-1.00 bps"} if c["name"] == "profit" else {})
        for c in verdict["conditions"]
    ]
    changed = {"passed": False, "would_pass": False, "reasons": reasons, "conditions": conditions}
    told = judged_again(copied_run, **changed, environments=[])
    assert (told["status"], told["recommendation"]) == ("rejected", "reject")
    assert told["headline"].startswith("Rejected")
    assert "Net alpha" in told["reason"] and "1 more condition fails" in told["reason"]
    assert GLOSSARY["alpha"] in told["reason"]
    text = briefing_text(told)
    assert [t for t, line in first_uses(text).items() if GLOSSARY[t] not in line] == []
    assert "Do not trade this candidate" in text and "release deploy" not in text
    assert any(row[2] == "NO" for t in told["sections"][1]["tables"] for row in t["rows"])
    assert told["risk_assessment"]["outstanding_issues"][:2] == reasons
    page = frame_page(Heading("x", told["status"]), briefing_top(told))
    assert 'class="verdict failed"' in page


def test_a_run_that_proposes_nothing_says_so(copied_run):
    changed = {"passed": False, "would_pass": True, "proposing": False, "reasons": []}
    told = judged_again(copied_run, **changed, environments=[])
    assert (told["status"], told["recommendation"]) == ("not-proposed", "propose")
    assert "not asked to propose" in told["reason"] and not told["environments"]
    assert "sensequant run --symbols " in briefing_text(told)
    assert "--incremental --propose" in briefing_text(told)


def test_a_review_names_every_command_and_role(read):
    (section,) = [s for s in read[0]["sections"] if s["key"] == "next"]
    run_id = read[0]["run_id"]
    assert section["commands"][0] == f"sensequant verify {run_id}"
    for role in ("Engineering Lead", "Risk Manager"):
        line = f'sensequant candidates approve {run_id} --role "{role}" --key NAME'
        assert line in section["commands"]
    assert section["commands"][-1] == f"sensequant release deploy {run_id} --environment staging"
    assert section["commands"] == re.findall(r"^sensequant .*$", read[1], re.M)


def test_what_is_deployed_is_compared(copied_run):
    metrics = copied_run.artifacts.read_json("audit/metrics.json")
    figures = {"sharpe_ratio": 1.5, "win_rate": 0.6, "observations": {"sharpe_ratio": 250}}
    how = {"kind": "deployed", "environment": "staging", "release_id": "release_20240101_093000"}
    metrics |= {"candidate": figures, "baseline": {"sharpe_ratio": 1.0, "win_rate": None}}
    metrics |= {"deltas": {"sharpe_ratio_delta": 0.5, "sharpe_ratio_delta_error": 0.25}}
    metrics |= {"comparison": how | {"sessions_shared": 250}, "environments_ready": []}
    flag = {"name": "stale_data", "severity": "high", "what": "Old | bars", "evidence": "40 <b>"}
    metrics |= {"risk_flags": [flag | {"action": "Fetch", "blocks": "all"}]}
    copied_run.artifacts.write_json("audit/metrics.json", metrics)
    told = judged_again(copied_run)
    held = {s["key"]: s for s in told["sections"]}
    rows = held["deployed"]["tables"][0]["rows"]
    assert rows[0] == ("net Sharpe ratio", "+1.00", "+1.50", "+0.50", "250")
    assert rows[1][1:4] == ("n/a", "60.0", "n/a")
    assert "standard error of 0.25" in held["deployed"]["said"][0]
    assert plain(held["risks"]["tables"][0]["rows"][0][0]).startswith("Old | bars (blocks all)")
    assert told["environments_ready"] == [] and told["recommendation"] == "mend_risks"
    assert not any("deploy" in c for c in held["next"]["commands"])
    assert any("Old | bars" in x for x in told["risk_assessment"]["outstanding_issues"])


# A run that stopped


def test_a_partial_briefing_tells_what_is_there_and_what_is_missing(copied_run):
    stood = dict.fromkeys(NAMES[:3], "success") | {"4_validate": "failed"}
    facts, text = partial_briefing(copied_run, stood, "disk | full", "Trace\n```\nback")
    assert list(facts["missing"]) == [k for k in MADE_BY if k not in ("data", "training")]
    for title, phase in list(MADE_BY.values())[2:]:
        assert f"## {title}\n\n**Missing:** phase {phase} makes it" in text
    held = {s["key"]: s for s in facts["sections"]}
    assert [f["text"] for f in held["data"]["figures"]] == [
        f.text for f in data_section(copied_run).figures
    ]
    assert len(held["training"]["tables"][0]["rows"]) == 4
    assert text.count("````") == 2 and "Trace" in text  # a longer fence than the traceback has
    figures, tables = told_by(facts)
    in_text = tables_of_text(text)
    assert [t[1:] for t in in_text if t[0] == ["figure", "value", "in words"]] == figures
    assert [t for t in in_text if t[0] != ["figure", "value", "in words"]] == tables
    assert [t for t, line in first_uses(text).items() if GLOSSARY[t] not in line] == []


@pytest.mark.parametrize("name", ["coverage.json", "sources.json", "inputs.json"])
def test_a_partial_briefing_survives_damaged_evidence(copied_run, name):
    (copied_run.folder / name).write_text("{}")
    stood = dict.fromkeys(NAMES[:4], "success") | {"5_stat_tests": "interrupted"}
    facts, text = partial_briefing(copied_run, stood, "stopped by the user", "")
    assert "it cannot be read" in facts["missing"]["data"] and name in text


def test_a_teacher_without_students_is_shown(copied_run):
    (copied_run.folder / "student_runs.json").unlink()
    lines = (copied_run.folder / "artifacts.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"student_runs.json"' not in line]
    (copied_run.folder / "artifacts.jsonl").write_text("".join(kept))
    shutil.copytree(copied_run.folder, copied_run.home / "runs" / "live_candidate_x")
    section = training_section(Run("live_candidate_x", copied_run.home))
    assert section.missing == "no student has been trained"
    assert [row[0] for row in section.tables[0].rows] == ["teacher", "teacher"]


# Attack


HOSTILE = (
    "<script>alert(1)</script>",
    "[x](https://evil.example)",
    "a|b",
    "![i](http://e.x/p.png)",
)


def test_hostile_names_stay_words(copied_run):
    inputs = copied_run.artifacts.read_json("inputs.json")
    listed = dict.fromkeys(HOSTILE) | inputs["listed_on"]
    copied_run.artifacts.write_json(
        "inputs.json", inputs | {"listed_on": listed, "feed": HOSTILE[0]}
    )
    coverage = copied_run.artifacts.read_json("coverage.json")
    worst = next(iter(coverage["symbols"].values())) | {"symbol": HOSTILE[2], "sessions_held": 0}
    coverage["symbols"][HOSTILE[2]] = worst
    copied_run.artifacts.write_json("coverage.json", coverage)
    for word in HOSTILE:
        copied_run.events.emit(
            "warning", phase="1_ingest", symbol=word, message=f"no {word}\n# big"
        )
    stood = {"1_ingest": "success", "2_teacher": "failed"}
    facts, _ = partial_briefing(copied_run, stood, HOSTILE[1], HOSTILE[0])
    html = briefing_top(facts) + prose("\n".join(section_text(s) for s in facts["sections"]))
    page = BeautifulSoup(html, "html.parser")
    assert not page.find_all(["script", "a", "img"]) and len(page.find_all("h1")) == 1
    said = " ".join(page.get_text(" ").split())
    assert HOSTILE[0] in said and "[x](https://evil.example)" in said
    figures, _ = told_by(facts)
    (data,) = [t[1:] for t in tables_of_page(page) if t[0] == ["figure", "value", "in words"]]
    assert data == figures[0] and "Most are missing of a|b." in data[1][2]
    assert all(len(row) == 3 for row in data)


# In a browser


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome here")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_stays_within_its_window_and_asks_nobody(finished_run, width):
    seen = look(finished_run.pages / "briefing.html", width)
    assert seen.scroll_width <= seen.width <= width
    assert (seen.asked, seen.errors) == ([], [])
    assert "Ready for review" in seen.text and "rank IC" in seen.text


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome here")
def test_the_browser_would_tell_of_a_page_that_is_too_wide_or_asks(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<div style='width:2000px'>x</div><img src='other.png'><script>y()</script>")
    seen = look(page, 390)
    assert seen.scroll_width > 390 and len(seen.asked) == 1 and seen.errors


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium or Chrome here")
def test_it_prints_on_a4(finished_run):
    pdf = look(finished_run.pages / "briefing.html", 1280).pdf
    assert pdf.startswith(b"%PDF")
    sizes = {tuple(map(float, m.split())) for m in re.findall(rb"/MediaBox ?\[([^\]]*)\]", pdf)}
    (size,) = sizes
    assert size[2:] == pytest.approx((595, 842), abs=1)
    assert 3 <= len(re.findall(rb"/Type ?/Page[^s]", pdf)) <= 14


def test_settings_are_those_of_the_run(finished_run):
    config = finished_run.artifacts.read_json("config.json")
    assert settings_of(config).staging_sessions == load_settings().staging_sessions
