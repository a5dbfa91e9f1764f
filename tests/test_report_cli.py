"""`sensequant report`: pages about a finished run, in three formats, whole or not at all."""

import ast
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from sensequant.backtest import accuracy
from sensequant.core.settings import Settings, load_settings
from sensequant.core.testing import sessions
from sensequant.data.runs import Run
from sensequant.ops import report_cli
from sensequant.ops.main import app
from sensequant.trading.opinions import AccuracyRules, accuracy_rules

ROOT = Path(__file__).resolve().parent.parent
REPORTS = sorted((ROOT / "nbs/reports").glob("*.ipynb"))


def invoke(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def small_report(folder: Path, *sources: str, parameters: str = 'run_id = "latest"\nn = 3') -> Path:
    """A notebook that says little, quickly, in a project of its own."""
    cells = [new_markdown_cell("# Is it small?")]
    cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in sources]
    path = folder / "nbs/reports/8_small.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with nothing but the reports that a test puts there."
    monkeypatch.setattr(report_cli, "project_root", lambda: tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def subject(tmp_path):
    "A folder that something left."
    folder = tmp_path / "search_1"
    folder.mkdir()
    return folder


# --- the templates -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REPORTS, ids=lambda p: p.stem)
def test_a_report_is_a_question_with_parameters_and_no_code_of_its_own(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert "".join(cells[0]["source"]).splitlines()[0].endswith("?")
    assert "stops when" in "".join(cells[0]["source"])
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is next(c for c in cells if c["cell_type"] == "code")
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert not re.search(r"^\s*(def|class) |^#\| export", "\n".join(sources), re.M)
    values = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(sources[0]).body}
    for name, value in values.items():
        if name in Settings.model_fields:
            assert str(Settings.model_fields[name].default) == str(value), name


def cell_of(stem, words):
    "The source of the one cell of a template that holds some words."
    cells = json.loads((ROOT / f"nbs/reports/{stem}.ipynb").read_text("utf-8"))["cells"]
    (found,) = [s for s in ("".join(c["source"]) for c in cells) if words in s]
    return found


def test_more_bars_in_a_session_make_no_error_bar_shorter():
    days, rng = sessions(40), np.random.default_rng(4)
    daily = pd.DataFrame({"ts": days, "p_long": rng.uniform(size=40), "label": "LONG"})
    daily["label"] = np.where(rng.uniform(size=40) < daily["p_long"], "LONG", "NOOP")
    bars = pd.concat([daily.assign(ts=days + pd.Timedelta(hours=9 + k)) for k in range(6)])
    drawn = []
    for said in (daily, bars):
        known = {"judged": SimpleNamespace(predictions=said.reset_index(drop=True)), "horizon": 2}
        known |= {"charts": SimpleNamespace(calibration_curve=drawn.append), "accuracy": accuracy}
        exec(cell_of("1_accuracy", "charts.calibration_curve"), known)
    np.testing.assert_allclose(drawn[0]["share"], drawn[1]["share"])
    np.testing.assert_allclose(drawn[0]["se"], drawn[1]["se"])


def test_what_alerts_is_what_the_settings_say(monkeypatch):
    said = {"alert_precision_drop": 0.02, "alert_win_rate_drop": 0.03, "alert_sharpe_drop": 0.7}
    said |= {"alert_standard_errors": 1.0, "accuracy_window": 50, "right_swing_frac": 0.01}
    for name, value in said.items():
        monkeypatch.setenv(f"SENSEQUANT_{name.upper()}", str(value))
    known = report_cli.report_parameters(report_cli.report_notebook("accuracy"), "live_x")
    known |= {"AccuracyRules": AccuracyRules}
    exec(cell_of("1_accuracy", "rules = "), known)
    assert known["rules"] == accuracy_rules(load_settings(**said))


# --- a finished run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(finished_run, tmp_path_factory):
    "A finished run and its report on accuracy, as a page and as text."
    home = shutil.copytree(finished_run.home, tmp_path_factory.mktemp("reported") / "home")
    run = Run(finished_run.run_id, home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEQUANT_HOME", str(home))
        for form in ("html", "md"):
            done = invoke(run.run_id, "accuracy", "--format", form)
            assert done.exit_code == 0, done.output
            assert done.output.strip() == str(run.pages / f"accuracy.{form}")
    return run


class Links(HTMLParser):
    "What a page would fetch, and the pages it leads to."

    def __init__(self, page):
        super().__init__()
        self.fetched, self.followed, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "src" or (tag == "link" and name == "href"):
                self.fetched.append(value)
            elif name == "href":
                self.followed.append(value)


def test_the_page_needs_nothing_else_and_says_what_it_is_about(reported):
    page = (reported.pages / "accuracy.html").read_text("utf-8")
    links = Links(page)
    assert links.fetched and all(v.startswith("data:image/png") for v in links.fetched)
    assert len(links.fetched) == 7 and "script" not in links.tags
    assert links.followed == ["index.html"]
    front = Links((reported.pages / "index.html").read_text("utf-8"))
    assert "accuracy.html" in front.followed  # the run's front page leads to it
    for words in (reported.run_id, "simulated market", "How accurate was it", 'class="badge ok"'):
        assert words in page, words
    assert "right_swing_frac = " not in page  # parameters are not shown
    assert "profit factor" in page and "baseline" in page and "Verdict" in page


def test_the_text_has_its_tables_and_pictures(reported):
    text = (reported.pages / "accuracy.md").read_text("utf-8")
    assert text.startswith(f"{reported.run_id} · simulated market · accuracy\n\n# How accurate")
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert len(pictures) == 7
    for name in pictures:
        assert (reported.pages / name).read_bytes().startswith(b"\x89PNG")
    assert "| figure | model | baseline |\n| --- | --- | --- |" in text
    assert "<t" not in text


def test_a_report_changes_nothing_of_the_run(reported, finished_run):
    assert reported.artifacts.verify() == []
    names = [
        {p.relative_to(r.folder) for p in r.folder.rglob("*")} for r in (reported, finished_run)
    ]
    assert names[0] == names[1]
    pages = [{p.name for p in r.pages.iterdir()} for r in (reported, finished_run)]
    assert pages[0] - pages[1] == {"accuracy.html", "accuracy.md", "accuracy_files"}


# --- small reports about folders -----------------------------------------------------------------


def test_any_notebook_can_be_a_report_about_a_folder(project, subject):
    small_report(project, "print(run_id, n + 1)")
    done = invoke(subject, "small", "--format", "md", "--set", "n=4")
    assert done.exit_code == 0, done.output
    text = (subject / "small.md").read_text()
    assert f"```\n{subject} 5\n```" in text and text.startswith(
        "search_1 · small\n\n# Is it small?"
    )
    assert [p.name for p in subject.iterdir()] == ["small.md"]


def test_a_setting_is_taken_from_the_settings_unless_it_is_given(project, subject, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HORIZON_DAYS", "7")
    small_report(project, "print(horizon_days)", parameters='run_id = ""\nhorizon_days = 5')
    invoke(subject, "small", "--format", "md")
    assert "```\n7\n```" in (subject / "small.md").read_text()
    done = invoke(subject, "small", "--format", "md", "--set", "horizon_days=9")
    assert done.exit_code == 0 and "```\n9\n```" in (subject / "small.md").read_text()
    wrong = invoke(subject, "small", "--set", "horizon_days=0")
    assert wrong.exit_code == 2 and "horizon_days" in wrong.stderr


def test_a_report_that_stops_leaves_the_old_page(project, subject):
    (subject / "small.html").write_text("old")
    small_report(project, "1 / 0")
    done = invoke(subject, "small")
    assert (done.exit_code, done.stdout) == (1, "") and "ZeroDivisionError" in done.stderr
    small_report(project, "from sensequant.core.errors import DataError", "raise DataError('a', 1)")
    done = invoke(subject, "small")
    assert done.exit_code == 1 and "a; found 1" in done.stderr and "Traceback" not in done.output
    assert [p.read_text() for p in subject.iterdir()] == ["old"]


def test_wrong_words_write_nothing(project, subject):
    small_report(project, "print(1)")
    cases = {
        ("nothing",): "a report must be one of small; found nothing",
        ("small", "--format", "docx"): "--format must be one of html, md, pdf; found docx",
        ("small", "--set", "depth=3"): "a parameter must be one of n; found depth",
        ("small", "--set", "run_id=x"): "found run_id",
        ("small", "--set", "n"): "--set takes NAME=VALUE",
    }
    for words, message in cases.items():
        done = invoke(subject, *words)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert message in done.stderr, done.stderr
    absent = invoke("live_candidate_20200101_000000", "small")
    assert absent.exit_code == 2 and "a run must have a folder" in absent.stderr
    assert invoke("latest", "--format", "pdf").exit_code == 2
    assert list(subject.iterdir()) == []


def test_a_notebook_that_takes_no_run_is_no_report(project, subject):
    path = small_report(project, parameters="port = 5106")
    done = invoke(subject, "small")
    assert done.exit_code == 2 and "found small" in done.stderr
    path.write_text("{}")
    done = invoke(subject, "small")
    assert done.exit_code == 2 and "must be a notebook with a kernel" in done.stderr


@pytest.mark.skipif(not any(map(shutil.which, report_cli.BROWSERS)), reason="no Chromium here")
def test_a_pdf_is_printed_and_nothing_else_is_left(project, subject):
    small_report(project, "print('printed')")
    done = invoke(subject, "small", "--format", "pdf")
    assert done.exit_code == 0, done.output
    data = (subject / "small.pdf").read_bytes()
    assert data.startswith(b"%PDF") and b"%%EOF" in data[-20:]
    assert [p.name for p in subject.iterdir()] == ["small.pdf"]


def test_without_a_browser_it_says_how_to_get_one_before_the_work(project, subject, monkeypatch):
    small_report(project, f"open({str(subject / 'worked')!r}, 'w')")
    monkeypatch.setenv("PATH", str(subject))
    done = invoke(subject, "small", "--format", "pdf")
    assert done.exit_code == 2 and "apt-get install chromium" in done.stderr
    assert list(subject.iterdir()) == []


def test_a_browser_that_fails_is_told_and_leaves_nothing(project, subject, tmp_path, monkeypatch):
    small_report(project, "print(1)")
    program = tmp_path / "bin" / "chromium"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho cannot open display >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(report_cli, "find_chromium", lambda: str(program))
    done = invoke(subject, "small", "--format", "pdf")
    assert done.exit_code == 1 and "cannot open display" in done.stderr
    assert list(subject.iterdir()) == []
