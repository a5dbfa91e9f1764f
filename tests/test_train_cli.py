"Commands that train one phase, try a feature, list devices and write tables."

import json

import pandas as pd
import pytest
from conftest import SMALL
from typer.testing import CliRunner

from sensequant.core.artifacts import Artifacts
from sensequant.data.runs import open_run
from sensequant.learn.records import count_outcomes, read_window_runs
from sensequant.learn.tables import POOLED
from sensequant.ops.main import app
from sensequant.ops.orchestrator import open_feed, plan_run

KNOWS = """
import pandas as pd

def shifted(bars: pd.DataFrame) -> pd.Series:
    return bars["close"].shift(-1) / bars["close"]

def blind(bars: pd.DataFrame) -> pd.Series:
    return bars["close"].pct_change(5)
"""


def invoke(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_a_feature_is_tried_before_it_is_trusted(tmp_path):
    (tmp_path / "mine.py").write_text(KNOWS)
    good = invoke("check", "lookahead", f"{tmp_path / 'mine.py'}:blind", "--warmup", 5)
    assert good.exit_code == 0 and "is blind to the future" in good.output, good.output
    bad = invoke("check", "lookahead", f"{tmp_path / 'mine.py'}:shifted", "--warmup", 5)
    assert bad.exit_code == 3 and "must not know the future" in bad.stderr, bad.output
    assert "shifted" in bad.output or "close" in bad.output
    for wrong in ("mine.py:blind", f"{tmp_path / 'mine.py'}:absent", "mine"):
        refused = invoke("check", "lookahead", wrong)
        assert refused.exit_code == 2 and not refused.stdout, refused.output
        assert "Traceback" not in refused.output


def test_a_feature_is_tried_on_bars_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(KNOWS)
    days = pd.bdate_range("2023-01-02", periods=300)
    days = [d for d in days if f"{d:%m-%d}" not in ("01-26", "08-15", "10-02")]
    rows = [f"{d:%Y-%m-%d},{100 + k},{102 + k},{99 + k},{101 + k},1000" for k, d in enumerate(days)]
    (tmp_path / "bars").mkdir()
    text = "\n".join(["date,open,high,low,close,volume", *rows])
    (tmp_path / "bars" / "OWN.csv").write_text(text)
    where = ["--csv-dir", tmp_path / "bars", "--warmup", 5]
    done = invoke("check", "lookahead", f"{tmp_path / 'mine.py'}:blind", *where)
    assert done.exit_code == 0, done.output
    done = invoke("check", "lookahead", f"{tmp_path / 'mine.py'}:shifted", *where)
    assert done.exit_code == 3, done.output
    done = invoke("check", "lookahead", f"{tmp_path / 'mine.py'}:blind", *where, "--symbol", "TCS")
    assert done.exit_code == 2 and "TCS" in done.stderr


def test_devices_are_listed_without_a_trial():
    held = json.loads(invoke("devices", "--no-probe", "--json").output)
    assert held[0]["name"] == "cpu" and held[0]["memory_mb"] > 100
    shown = invoke("devices", "--no-probe")
    assert shown.exit_code == 0 and "cpu" in shown.output and "memory (GiB)" in shown.output


def test_the_tables_of_a_run_are_written_as_csv(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(finished_run.home))
    done = invoke("export", finished_run.run_id, "--to", tmp_path / "out", "--only", "teacher/")
    assert done.exit_code == 0, done.output
    store = finished_run.artifacts
    tables = [p for p in store.index() if p.startswith("teacher/") and p.endswith(".parquet")]
    written = sorted((tmp_path / "out").rglob("*.csv"))
    assert len(written) == len(tables) > 5 and f"{len(tables)} tables written" in done.output
    back = pd.read_csv(written[0], index_col=0)
    held = store.read_parquet(str(written[0].relative_to(tmp_path / "out"))[:-3] + "parquet")
    assert list(back.columns) == list(held.columns) and len(back) == len(held)
    pd.testing.assert_series_equal(
        back["p_long"].reset_index(drop=True), held["p_long"].reset_index(drop=True)
    )
    none = invoke("export", finished_run.run_id, "--to", tmp_path / "no", "--only", "nothing/")
    assert none.exit_code == 2 and "none below 'nothing/'" in none.stderr
    assert not (tmp_path / "no").exists()
    assert store.verify() == []


@pytest.mark.slow
def test_phases_are_trained_one_by_one_and_the_run_can_go_on(tmp_path, monkeypatch):
    "Six shares, so that both scopes have models and the default judges all shares together."
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path))
    small = SMALL | {"sim_symbols": 6, "ablation_windows": 4, "workers": 1}
    small |= {"feature_groups": "technical,regime", "teacher_n_estimators": 10}
    words = [w for k, v in small.items() for w in ("--set", f"{k}={v}")]
    done = invoke("train", "teacher", *words)
    assert done.exit_code == 0, done.output
    run = open_run("latest")
    assert (run.folder / "teacher_runs.json").exists()
    assert not (run.folder / "student_runs.json").exists()
    counts = count_outcomes(read_window_runs(run, "teacher", "pooled"))
    assert counts["success"] == 5 and not counts["failed"]
    config = run.artifacts.read_json("config.json")
    plan = plan_run(config, open_feed(config), tmp_path / "absent")
    told = read_window_runs(run, "teacher")
    expected = [(r.window_label, r.skip_class, r.message) for r in told]
    assert [(p.window.label, p.skip_class, p.message) for p in plan.windows] == expected
    done = invoke("train", "student")
    assert done.exit_code == 0, done.output
    students = read_window_runs(open_run(run.run_id), "student")
    assert {r.symbol for r in students if r.status == "success"} >= {POOLED, "SIM001"}
    assert not (run.folder / "predictions.parquet").exists()
    done = invoke("resume")
    assert done.exit_code == 0, done.output
    store = Artifacts(run.folder)
    judged, beside = (
        store.read_parquet(f"{n}.parquet") for n in ("predictions", "predictions_beside")
    )
    assert judged["window_label"].str.startswith(POOLED).all()
    assert beside["window_label"].str.startswith("SIM").all()
    scopes = store.read_json("validation_summary.json")["scopes"]
    assert {s["scope"] for s in scopes} == {"symbol", "pooled"}
    found = store.read_json("ablation.json")
    for scope in ("symbol", "pooled"):
        assert {line["group"] for line in found[scope]} == {"technical", "regime"}
    assert store.verify() == []
