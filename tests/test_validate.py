"""Validations: the whole command on a small simulated market, what fails how, and that a run is
none the worse for having been validated."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import SMALL, SYMBOLS
from typer.testing import CliRunner

from sensequant.core.artifacts import sha256_file
from sensequant.core.errors import DataError, SettingsError
from sensequant.core.ledger import Ledger, ledger_path
from sensequant.core.settings import load_settings
from sensequant.data.runs import open_run
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops import orchestrator as o
from sensequant.ops import validation_runs as v
from sensequant.ops.main import app

CLI = [sys.executable, "-c", "from sensequant.ops.main import main; main()"]
SEARCH = {"search_train_sessions": 60, "search_test_sessions": 40, "search_min_trades": 2}
QUICK = SMALL | {"ablation_windows": 1, "propose": False, "workers": 1}
FIELDS = {
    "run_id", "timestamp", "symbols", "date_range", "status", "dryrun", "teacher_results",
    "student_results", "optimizer_results", "reports", "promotion_recommendation",
    "symbols_table", "training_run", "warnings", "verdict", "simulated", "score_bars",
}  # fmt: skip


def typed(drop=(), **more):
    "Options of a small validation."
    given = {k: x for k, x in (QUICK | more).items() if k not in drop}
    names = given.pop("symbols", SYMBOLS)
    pairs = [w for k, x in given.items() for w in ("--set", f"{k}={x}")]
    return ["validate", *pairs, "--symbols", ",".join(names)]


def invoke(home, *words):
    "A command in a home."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEQUANT_HOME", str(home))
        return CliRunner().invoke(app, [*map(str, words)])


def summary_of(home, name):
    "The summary as it lies on the disk."
    return json.loads((home / "data/validations" / name / "validation_summary.json").read_text())


def hashes(folder):
    "Every file below a folder by its hash."
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    "A home in which a validation with optimizer and reports came to its end."
    home = tmp_path_factory.mktemp("validated")
    done = invoke(home, *typed(**SEARCH), "--run-id", "trial", "--max-configs", 3)
    assert done.exit_code == 0, done.output
    return home, done.output


# To its end


@pytest.mark.slow
def test_a_validation_says_what_became_of_everything(validated):
    home, told = validated
    s = summary_of(home, "trial")
    assert set(s) == FIELDS
    assert (s["run_id"], s["status"], s["dryrun"], s["simulated"]) == (
        "trial", "completed", False, True,
    )  # fmt: skip
    assert s["symbols"] == SYMBOLS and s["date_range"] == {
        "start": "2022-07-01", "end": "2024-02-29",
    }  # fmt: skip
    assert s["timestamp"].endswith("+05:30") or "+05:30" in s["timestamp"]
    teacher, student = s["teacher_results"], s["student_results"]
    assert (teacher["status"], student["status"]) == ("success", "success")
    assert teacher["runs_completed"] == student["runs_completed"] > 5
    for name in ("avg_precision", "avg_recall", "avg_f1"):
        assert 0 < teacher[name] < 1
    for name in ("avg_accuracy", "avg_precision", "avg_recall"):
        assert 0 < student[name] < 1
    rows = {r["symbol"]: r for r in s["symbols_table"]}
    assert set(SYMBOLS) <= set(rows)
    assert rows["SIM001"]["outcome"] == "ok" and rows["SIM001"]["predictions"] > 100
    assert rows["SIM010"]["outcome"] == "no model" and "pre_listing" in rows["SIM010"]["reason"]
    assert not s["promotion_recommendation"]["reason"].startswith("rejected")
    assert "may go on to the judge" in told and s["verdict"] == ""
    assert {b["decides"] for b in s["score_bars"]} == {"nothing"}


@pytest.mark.slow
def test_figures_are_those_of_the_run(validated):
    home, _ = validated
    s = summary_of(home, "trial")
    run = open_run(s["training_run"], home)
    said = run.artifacts.read_json("validation_summary.json")
    rows = {r["symbol"]: r for r in s["symbols_table"] if r["predictions"]}
    assert {k: (r["predictions"], r["accuracy"]) for k, r in rows.items()} == {
        k: (x["n"], x["accuracy"]) for k, x in said["by_symbol"].items()
    }
    students = [json.loads(x) for x in run.artifacts.read_text("student_runs.json").splitlines()]
    mine = [r for r in students if r["symbol"] == "SIM001"]
    counted = {w: sum(r["status"] == w for r in mine) for w in ("success", "skipped")}
    assert rows["SIM001"]["student"] == {k: n for k, n in counted.items() if n}
    good = [r["metrics"]["accuracy"] for r in students if r["status"] == "success"]
    assert s["student_results"]["avg_accuracy"] == pytest.approx(sum(good) / len(good))


@pytest.mark.slow
def test_the_search_enters_the_ledger_and_changes_no_setting(validated):
    home, _ = validated
    s = summary_of(home, "trial")
    found = s["optimizer_results"]
    assert found["status"] == "success" and found["configs"] == 3
    best = found["best_configs"]["model"]
    assert {"entry_score", "exit_score", "score", "sharpe_ratio"} <= set(best)
    with Ledger(ledger_path(home)) as ledger:
        rows = [ledger.trial(n) for n in range(1, ledger.head().count + 1)]
        assert [r.source for r in rows] == ["optimizer"] * 4 and ledger.verify().intact
    assert not list(home.glob(".env*")), "no setting is written anywhere"
    spec = json.loads((home / "data/optimization/trial/search.json").read_text())
    assert json.dumps(spec).count('"entry_score"') >= 1


@pytest.mark.slow
def test_reports_can_be_read(validated):
    home, _ = validated
    reports = summary_of(home, "trial")["reports"]
    assert set(reports) == {"accuracy_report", "optimization_report"}
    for path in reports.values():
        page = BeautifulSoup((home / path).read_text(), "html.parser")
        assert page.find("h1") and not page.find(string=re.compile("Traceback"))
    text = BeautifulSoup((home / reports["accuracy_report"]).read_text(), "html.parser").get_text()
    assert "Phase 5 has not made the account yet" in text


@pytest.mark.slow
def test_the_text_says_what_the_figures_say(validated):
    home, _ = validated
    s = summary_of(home, "trial")
    text = (home / "data/validations/trial/validation_summary.md").read_text()
    assert text.startswith("# Validation trial\n\n**completed**: may go on to the judge.")
    assert f"accuracy {s['student_results']['avg_accuracy']:.1%}" in text
    assert "Simulated market" in text and f"`{s['training_run']}`" in text
    assert f"sensequant resume {s['training_run']}" in text
    table = [x for x in text.splitlines() if x.startswith("| SIM001 |")]
    assert len(table) == 1 and table[0].count("|") == 9


@pytest.mark.slow
def test_the_state_knows_it_and_the_list_shows_it(validated):
    home, _ = validated
    told = v.get_validation_run("trial", home)
    assert (told["status"], told["dryrun"], told["symbols"]) == ("completed", False, SYMBOLS)
    assert told["results"] == summary_of(home, "trial")
    assert v.get_validation_runs("failed", home=home) == []
    assert v.get_validation_runs(dryrun=True, home=home) == []
    with pytest.raises(DataError, match="a validation must be known; found live_"):
        v.get_validation_run(told["results"]["training_run"], home)
    listed = invoke(home, "validate", "--list", "--status", "completed", "--json")
    assert [r["run_id"] for r in json.loads(listed.output)] == ["trial"]
    runs = {r["run_id"]: r for r in json.loads(invoke(home, "runs", "--json").output)}
    assert runs["trial"] | {"message": ""} == {
        "run_id": "trial", "kind": "validation", "status": "success", "message": "",
    }  # fmt: skip
    assert runs[told["results"]["training_run"]]["kind"] == "training"
    assert invoke(home, "runs").exit_code == 0


@pytest.mark.slow
def test_a_validated_run_goes_on_to_its_verdict_undisturbed(validated, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(validated[0], home)
    name = summary_of(home, "trial")["training_run"]
    before = hashes(home / "data/validations")
    done = invoke(home, "resume", name)
    assert done.exit_code == 0, done.output
    run = open_run(name, home)
    assert run.artifacts.verify() == [] and o.done_phases(run) == [p.name for p in o.PHASES]
    checks = run.artifacts.read_json("audit/checks.json")
    assert checks["whole"] is True, checks
    assert not [a for a in run.artifacts.index() if "validations" in a or "optimization" in a]
    assert hashes(home / "data/validations") == before
    again = invoke(home, "validate", "--run-id", name, "--skip-optimizer", "--skip-reports")
    assert again.exit_code == 0, again.output
    assert "the gate has said not-proposed" in again.output
    with run.state as state:
        assert state.run(name).status == "success", "a finished run is not made partial"


@pytest.mark.slow
def test_a_name_is_used_once_and_bad_names_make_nothing(validated):
    home, _ = validated
    before = sorted(p.name for p in (home / "data/validations").iterdir())
    again = invoke(home, "validate", "--run-id", "trial")
    assert again.exit_code == 2 and "a name is used once" in again.stderr
    for name in ("../x", "/tmp/x", "a b", "", "x.json"):
        done = invoke(home, *typed(), "--run-id", name)
        assert done.exit_code == 2, (name, done.output)
        assert "must begin with a letter" in done.stderr
    assert sorted(p.name for p in (home / "data/validations").iterdir()) == before


# A run that is trained already


def test_a_finished_run_keeps_its_word(copied_run):
    before, home = hashes(copied_run.folder), copied_run.home
    words = ("--skip-optimizer", "--skip-reports", "--require-pass")
    done = invoke(home, "validate", "--run-id", copied_run.run_id, *words)
    assert done.exit_code == 0, done.output
    (told,) = v.get_validation_runs(home=home)
    s = told["results"]
    assert (s["training_run"], s["verdict"]) == (copied_run.run_id, "ready-for-review")
    assert s["promotion_recommendation"]["approved"] is True
    assert re.fullmatch(r"validation_\d{8}_\d{6}", told["run_id"])
    assert hashes(copied_run.folder) == before
    with copied_run.state as state:
        assert state.run(copied_run.run_id).status == "success"


def test_a_rejection_of_the_gate_is_never_contradicted(copied_run):
    briefing = copied_run.artifacts.read_json("promotion_briefing.json") | {"status": "rejected"}
    copied_run.artifacts.write_json("promotion_briefing.json", briefing)
    words = ("--skip-optimizer", "--skip-reports")
    done = invoke(copied_run.home, "validate", "--run-id", copied_run.run_id, *words)
    assert done.exit_code == 0 and "may not go on to the judge" in done.output
    passed = invoke(
        copied_run.home, "validate", "--run-id", copied_run.run_id, *words, "--require-pass"
    )
    assert passed.exit_code == 3
    advice = v.get_validation_runs(home=copied_run.home)[0]["results"]["promotion_recommendation"]
    assert (advice["approved"], advice["reason"]) == (False, "the gate has rejected this run")


@pytest.mark.slow
def test_phase_4_is_done_when_it_is_all_that_is_missing(copied_run):
    (copied_run.folder / "predictions.parquet").write_bytes(b"damaged")
    words = ("--skip-optimizer", "--skip-reports")
    done = invoke(copied_run.home, "validate", "--run-id", copied_run.run_id, *words)
    assert done.exit_code == 0, done.output
    assert re.search(r"Phase 3/7 .* done before", done.output)
    assert o.done_phases(copied_run) == [p.name for p in o.PHASES[:4]]


def test_an_untrained_run_is_refused_and_its_settings_are_its_own(copied_run):
    (copied_run.folder / "student_runs.json").unlink()
    done = invoke(copied_run.home, "validate", "--run-id", copied_run.run_id)
    assert done.exit_code == 2
    assert "phases 1 to 3 of a run must be done; found not 3_student" in done.stderr
    done = invoke(copied_run.home, "validate", "--run-id", copied_run.run_id, "--seed", "2")
    assert done.exit_code == 2 and "bring their own settings; found --seed" in done.stderr
    assert v.get_validation_runs(home=copied_run.home) == []
    gone = invoke(copied_run.home, "validate", "--run-id", "live_candidate_20200101_000000")
    assert gone.exit_code == 2 and "a run must have a folder" in gone.stderr


# What fails how


@pytest.mark.slow
def test_without_a_teacher_nothing_else_is_attempted(tmp_path):
    done = invoke(tmp_path, *typed(min_window_bars=5000), "--run-id", "short")
    assert done.exit_code == 1, done.output
    s = summary_of(tmp_path, "short")
    assert (s["status"], s["teacher_results"]["status"]) == ("failed", "failed")
    assert "at least one window must be trainable" in s["teacher_results"]["reason"]
    for step in ("student_results", "optimizer_results"):
        assert s[step]["status"] == "not attempted", step
    assert s["reports"] == {} and "were not attempted" in " ".join(s["warnings"])
    advice = s["promotion_recommendation"]
    assert (
        not advice["approved"] and f"sensequant resume {s['training_run']}" in advice["next_steps"]
    )
    assert v.get_validation_run("short", tmp_path)["status"] == "failed"


@pytest.mark.slow
def test_a_student_that_fails_is_summed_up(copied_run):
    home, config = copied_run.home, copied_run.artifacts.read_json("config.json")
    broken = config | {"student": config["student"] | {"kind": "oracle"}}
    copied_run.artifacts.write_json("config.json", broken)
    (copied_run.folder / "student_runs.json").unlink()
    wanted = v.Wanted(broken, reports=False)
    validation = v.begin_validation(wanted, home, "sick")
    validation.folder.mkdir(parents=True)
    (validation.folder / "training_run.txt").write_text(copied_run.run_id)
    s = v.validate(validation, wanted)
    assert (s["status"], s["teacher_results"]["status"]) == ("failed", "success")
    assert s["teacher_results"]["runs_completed"] > 5
    assert s["student_results"]["status"] == "failed" and "oracle" in s["student_results"]["reason"]
    assert s["optimizer_results"]["status"] == "not attempted"
    assert summary_of(home, "sick")["promotion_recommendation"]["approved"] is False


def test_an_optimizer_or_a_report_that_fails_is_a_warning(copied_run, monkeypatch):
    monkeypatch.setattr(v, "report_notebook", lambda kind: Path("/no/such/notebook.ipynb"))
    config = copied_run.artifacts.read_json("config.json")  # 252 sessions to learn from: too many
    wanted = v.Wanted(config, copied_run.run_id)
    s = v.validate(v.begin_validation(wanted, copied_run.home, "warned"), wanted)
    assert (s["status"], s["optimizer_results"]["status"], s["reports"]) == (
        "completed", "failed", {},
    )  # fmt: skip
    assert [w.partition(":")[0] for w in s["warnings"][-2:]] == ["optimizer", "accuracy_report"]
    assert "sessions" in s["optimizer_results"]["reason"]
    assert "optimizer: failed: " in v.validation_text(s)


@pytest.mark.slow
def test_a_symbol_that_fails_makes_it_partial(tmp_path):
    names, folder = ["SIM001", "SIM002", "SIM003"], tmp_path / "bars"
    market = simulate(MarketSpec(symbols=10, signal_ic=0.4))
    folder.mkdir()
    for name in names:
        bars = market.bars(name, "1day", *map(_day, ("2022-01-03", "2024-02-29")))
        table = bars.reset_index(names="timestamp")
        table["timestamp"] = table["timestamp"].dt.strftime("%Y-%m-%d")
        if name == "SIM003":
            table.loc[::2, "close"] = -1.0
        table.to_csv(folder / f"{name}.csv", index=False)
    words = typed(symbols=names, drop=("sim_symbols", "signal_ic"))
    words += ["--csv-dir", str(folder), "--skip-optimizer", "--skip-reports", "--run-id", "mixed"]
    done = invoke(tmp_path / "home", *words, "--require-pass")
    assert done.exit_code == 3, done.output
    s = summary_of(tmp_path / "home", "mixed")
    rows = {r["symbol"]: r for r in s["symbols_table"]}
    assert s["status"] == "partial" and rows["SIM003"]["outcome"] == "refused"
    assert "may be rejected" in rows["SIM003"]["reason"] and rows["SIM001"]["outcome"] == "ok"
    advice = s["promotion_recommendation"]
    assert advice["reason"] == "rejected: 1 of 3 symbols failed: SIM003" and not advice["approved"]
    assert "SIM003 refused: " in done.output
    assert [r["run_id"] for r in v.get_validation_runs("partial", home=tmp_path / "home")] == [
        "mixed"
    ]


def _day(text):
    from datetime import date

    return date.fromisoformat(text)


# Interrupted


def wait_for(what, limit_s=120):
    "Until something holds."
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "it should have come by now"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_validation_goes_on_with_the_same_run(tmp_path, how):
    environment = os.environ | {"SENSEQUANT_HOME": str(tmp_path)}
    words = [*CLI, *typed(), "--run-id", "stopped", "--skip-optimizer", "--skip-reports"]
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("runs/*/coverage.json")))
    process.send_signal(how)
    code = process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # kernels of one that was killed
    assert code == (-9 if how == signal.SIGKILL else 130)
    assert v.get_validation_run("stopped", tmp_path)["status"] == "interrupted"
    (first,) = tmp_path.glob("runs/*")
    late = invoke(tmp_path, *typed(), "--run-id", "stopped")
    assert late.exit_code == 2 and "bring their own settings" in late.stderr
    done = invoke(tmp_path, "validate", "--run-id", "stopped")
    assert done.exit_code == 0, done.output
    s = summary_of(tmp_path, "stopped")
    assert s["training_run"] == first.name and len(list(tmp_path.glob("runs/*"))) == 1
    assert (s["status"], s["optimizer_results"]["status"], s["reports"]) == (
        "completed", "skipped", {},
    )  # fmt: skip


def test_a_living_one_is_not_taken_over(tmp_path):
    wanted = v.Wanted(o.run_config(load_settings(**SMALL), SYMBOLS))
    v.begin_validation(wanted, tmp_path, "busy")
    code = "import sys; from pathlib import Path; from sensequant.ops import validation_runs as v;"
    code += "v.resume_validation('busy', Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1 and f"process {os.getpid()}" in done.stderr
    v.record_validation_run(*_ended(tmp_path, "busy", wanted))
    with pytest.raises(SettingsError, match="a name is used once; found busy, completed"):
        v.resume_validation("busy", tmp_path)


def _ended(home, name, wanted):
    "A validation and the summary of a plan."
    validation = v.Validation(name, home)
    summary = v._summary(validation, wanted)
    v._judged(summary, [], "")
    return validation, summary


def test_a_dry_run_is_noted_and_makes_no_run(tmp_path):
    done = invoke(tmp_path, *typed(), "--dryrun", "--require-pass")
    assert done.exit_code == 0, done.output
    (told,) = v.get_validation_runs("completed", dryrun=True, home=tmp_path)
    s = told["results"]
    assert s["training_run"] is None and not s["promotion_recommendation"]["approved"]
    assert {s[f"{k}_results"]["status"] for k in ("teacher", "student")} == {"not attempted"}
    assert s["plan"]["to_train"] > 5 and not (tmp_path / "runs").exists()
    assert "(dry run)" in invoke(tmp_path, "validate", "--list").output
