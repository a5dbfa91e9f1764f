"""Audit bundles: every flag forced and taken away, figures by hand, partial evidence, no secret in
any file, and what an audit must leave as it was."""

import json
import shutil
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from sensequant.core.artifacts import Artifacts, sha256_file
from sensequant.core.errors import DataError
from sensequant.core.ledger import ledger_path
from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.data.runs import Run, _artifacts
from sensequant.govern.approvals import load_private
from sensequant.govern.bundle import (
    _deployed_facts,
    audit_beside,
    audit_deployed,
    open_deployed,
    replaced_release,
    standing_of,
    write_bundle,
)
from sensequant.govern.figures import Book, deltas, figures, window_figures
from sensequant.govern.flags import Facts, environments_ready, risk_flags
from sensequant.govern.promotion import approve, enrol_key
from sensequant.govern.release import active_release, deploy
from sensequant.govern.shelf import audits_folder, held_bundles
from sensequant.govern.weighing import Audited, sources_of, windows_of
from sensequant.ops.main import app
from sensequant.trading.opinions import model_opinions
from sensequant.trading.traces import write_traces

NOW = datetime.now(IST)
FILES = (
    "metrics.json",
    "summary.md",
    "checks.json",
    "configs/settings.json",
    "configs/settings.env",
    "telemetry_summaries/30_days.json",
    "telemetry_summaries/90_days.json",
    "validation_results/optimizer_validation.json",
    "validation_results/student_validation.json",
    "promotion_checklists/promotion_checklist.md",
    "promotion_checklists/promotion_checklist.json",
    *(f"plots/{n}.png" for n in ("equity", "drawdown", "against_baseline", "ic_by_month")),
    *(f"plots/{n}.png" for n in ("score_deciles", "calibration", "confusion", "alerts")),
)


# Flags, each from one fact: just inside of what is allowed, and just beyond

CLEAN = Facts(coverage=1.0, sentiment=None, drift=0.0, age_sessions=0)
LOST = {"reproduced": False, "found": "cfg_1 score was 1 and is 2"}
EDGES = {  # flag: facts that raise none, facts that raise it
    "evidence": ({"failed_checks": []}, {"failed_checks": ["files"]}),
    "ledger": ({"ledger": ""}, {"ledger": "row 2 is missing"}),
    "release": ({"deployed": ""}, {"deployed": "config.json has changed"}),
    "nothing_deployed": ({"nothing": ""}, {"nothing": "production"}),
    "gate": ({"gate": ""}, {"gate": "no alpha"}),
    "certificate": ({"certificate": ""}, {"certificate": "none"}),
    "simulated_data": ({"simulated": False}, {"simulated": True}),
    "coverage": ({"coverage": 0.95}, {"coverage": 0.9499}),
    "sentiment": ({"sentiment": 0.8001}, {"sentiment": 0.80}),
    "failed_windows": ({"failed_windows": 0}, {"failed_windows": 1}),
    "optimizer": ({"search": None}, {"search": LOST}),
    "drift": ({"drift": 0.05}, {"drift": 0.0501}),
    "degradation": ({"worse_in": []}, {"worse_in": ["precision of opinions"]}),
    "alerts": ({"alerts": 3}, {"alerts": 4}),
    "stale_data": ({"age_sessions": 10}, {"age_sessions": 11}),
    "sharpe_ratio_drop": (
        {"deltas": {"sharpe_ratio_delta": 1.3 - 1.5}},
        {"deltas": {"sharpe_ratio_delta": -0.2001}},
    ),
    "win_rate_drop": (
        {"deltas": {"win_rate_delta": 0.5 - 0.55}},
        {"deltas": {"win_rate_delta": -0.0501}},
    ),
    "hit_ratio_drop": (
        {"deltas": {"hit_ratio_delta": 0.5 - 0.6}},
        {"deltas": {"hit_ratio_delta": -0.1001}},
    ),
}
EVERYTHING = {"evidence", "ledger", "release", "nothing_deployed", "gate", "coverage"}


@pytest.mark.parametrize("name", list(EDGES))
def test_each_flag_is_raised_by_its_fact_alone(name):
    settings = load_settings()
    inside, beyond = (replace(CLEAN, **facts) for facts in EDGES[name])
    assert risk_flags(inside, settings) == []
    (flag,) = risk_flags(beyond, settings)
    assert (flag.name, flag.blocks) == (name, "all" if name in EVERYTHING else "production")
    assert flag.evidence and flag.action
    assert environments_ready([flag]) == ([] if name in EVERYTHING else ["staging"])


@pytest.mark.parametrize(
    "setting, value, facts",
    [
        ("audit_sharpe_drop", 0.5, {"deltas": {"sharpe_ratio_delta": -0.4}}),
        ("audit_win_rate_drop", 0.2, {"deltas": {"win_rate_delta": -0.1}}),
        ("audit_hit_ratio_drop", 0.3, {"deltas": {"hit_ratio_delta": -0.2}}),
        ("audit_max_alerts", 9, {"alerts": 8}),
        ("audit_max_age_sessions", 40, {"age_sessions": 30}),
        ("audit_min_sentiment_frac", 0.2, {"sentiment": 0.5}),
        ("gate_min_coverage_frac", 0.5, {"coverage": 0.7}),
    ],
)
def test_what_is_allowed_comes_from_the_settings(setting, value, facts):
    found = replace(CLEAN, **facts)
    assert len(risk_flags(found, load_settings())) == 1
    assert risk_flags(found, load_settings(**{setting: value})) == []


def test_a_reproduced_search_raises_nothing():
    found = {"reproduced": True, "found": "within 5%"}
    assert risk_flags(replace(CLEAN, search=found), load_settings()) == []


def test_gravest_first_and_missing_differences_raise_nothing():
    missing = dict.fromkeys(("sharpe_ratio_delta", "win_rate_delta", "hit_ratio_delta"))
    assert risk_flags(replace(CLEAN, deltas=missing), load_settings()) == []
    many = replace(CLEAN, alerts=9, simulated=True, drift=0.5, ledger="row 1 is missing")
    found = [f.severity for f in risk_flags(many, load_settings())]
    assert found == ["high", "high", "medium", "low"]


# Figures by hand


def opinions(moves, direction="LONG"):
    days = pd.bdate_range("2024-01-01", periods=len(moves), tz=IST, name="ts")
    rows = pd.DataFrame({"symbol": "AAA", "ts": days, "direction": direction, "confidence": 0.5})
    return rows.assign(forward_return=moves, label_known_at=days + pd.Timedelta(days=1))


def account(returns):
    days = pd.bdate_range("2024-01-01", periods=len(returns), tz=IST, name="ts")
    return pd.DataFrame({"net_return": returns}, days)


def test_differences_by_hand():
    up, down = 0.01, -0.005
    new = figures(Book("new", account([up, down] * 20), None, opinions([0.02] * 3 + [-0.02])))
    old = figures(Book("old", account([down, up] * 20), None, opinions([0.02] * 2 + [-0.02] * 2)))
    gaps = deltas(new, old)
    assert gaps["hit_ratio_delta"] == pytest.approx(0.75 - 0.5)
    assert gaps["precision_long_delta"] == pytest.approx(0.25)
    assert gaps["sharpe_ratio_delta"] == pytest.approx(0)
    assert gaps["total_return_delta"] == pytest.approx(0)
    mean, spread = 0.0025, np.std([up, down] * 20, ddof=1)
    assert new["sharpe_ratio"] == pytest.approx(mean / spread * 252**0.5)
    assert (gaps["win_rate_delta"], new["reasons"]["win_rate"]) == (None, "no trades were kept")
    assert new["observations"]["hit_ratio"] == 4


def test_a_window_without_opinions_says_so():
    traces = Book("new", account([]), None, opinions([0.02] * 50)).traces()
    late = traces["timestamp"].max() + pd.Timedelta(days=31)
    found = window_figures(traces, None, 30, late)
    assert (found["n_opinions"], found["hit_ratio"], found["alert_count"]) == (0, None, 0)
    assert found["reason"].startswith("no opinion in 30 days; the newest is of 2024-03-08")
    assert window_figures(traces, None, 90, late)["hit_ratio"] == 1.0


# The bundle of a finished run


def tree(folder):
    "Hash of every file below a folder."
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_phase_6_wrote_every_file_before_the_manifest(finished_run):
    store = finished_run.artifacts
    paths = list(store.index())
    assert {f"audit/{p}" for p in FILES} <= set(paths)
    assert store.verify() == []
    manifest = yaml.safe_load(store.read_text("manifest.yaml"))
    assert {f"audit/{p}" for p in FILES} <= set(manifest["files"])
    found = store.read_json("audit/metrics.json")
    assert manifest["audit"]["risk_flags"] == [f["name"] for f in found["risk_flags"]]
    assert manifest["audit"]["deployment_ready"] == found["deployment_ready"] is False


def test_what_later_phases_read_is_still_there(finished_run):
    store = finished_run.artifacts
    checks, found = (store.read_json(f"audit/{n}.json") for n in ("checks", "metrics"))
    assert {"whole", "checks", "risks"} <= set(checks)
    assert found["statistics"] == store.read_json("stat_tests.json")
    assert found["validation"]["overall"]["n"] == found["candidate"]["observations"][
        "hit_ratio"
    ] or (found["validation"]["overall"]["n"] > found["candidate"]["observations"]["hit_ratio"])
    assert found["windows"]["student"]["failed"] == 0


def test_a_simulated_run_may_go_to_staging_alone(finished_run):
    found = finished_run.artifacts.read_json("audit/metrics.json")
    flags = {f["name"]: f for f in found["risk_flags"]}
    assert flags["simulated_data"]["blocks"] == "production"
    assert set(flags) == {"simulated_data", "certificate"}
    assert "bootstrap_samples was 2000, is 200" in flags["certificate"]["evidence"]
    assert found["environments_ready"] == ["staging"]
    assert found["facts"]["age_sessions"] is None  # the market has no today
    page = finished_run.artifacts.read_text("audit/summary.md")
    assert page.startswith("# 2 risk flags: ready for staging only")
    assert "candidates approve" in page and "release deploy" in page


def test_page_and_data_say_the_same(finished_run):
    store = finished_run.artifacts
    found, page = store.read_json("audit/metrics.json"), store.read_text("audit/summary.md")
    new, old = found["candidate"], found["baseline"]
    n = new["observations"]["sharpe_ratio"]
    gap = new["sharpe_ratio"] - old["sharpe_ratio"]
    assert (
        f"| {new['sharpe_ratio']:.2f} | {n} | {old['sharpe_ratio']:.2f} | {n} | {gap:+.2f} |"
        in page
    )
    for flag in found["risk_flags"]:
        assert flag["evidence"] in page and flag["action"] in page
    sheet = store.read_json("audit/promotion_checklists/promotion_checklist.json")
    assert sheet["candidate_metrics"]["hit_ratio"] == new["hit_ratio"]
    assert sheet["recommendation"] == "PROMOTE"


def test_the_figures_are_those_of_the_statistics(finished_run):
    store = finished_run.artifacts
    stats, found = store.read_json("stat_tests.json"), store.read_json("audit/metrics.json")
    assert found["candidate"]["sharpe_ratio"] == pytest.approx(stats["net"]["sharpe"])
    assert found["candidate"]["max_drawdown"] == pytest.approx(stats["net"]["max_drawdown"])
    assert found["baseline"]["sharpe_ratio"] == pytest.approx(stats["baseline"]["sharpe"])
    trades = store.read_parquet("trades.parquet")
    assert found["candidate"]["win_rate"] == pytest.approx((trades["net_inr"] > 0).mean())
    assert found["candidate"]["observations"]["win_rate"] == len(trades)


def test_no_secret_and_no_private_path_is_in_any_file(copied_run, monkeypatch):
    secret = "k-93f1a77c2"
    monkeypatch.setenv("SENSEQUANT_NEWSAPI_KEY", secret)
    monkeypatch.setenv("SENSEQUANT_HOME", str(copied_run.home))
    bundle = audit_beside(copied_run, standing_of(copied_run))
    deployed = audit_deployed(copied_run.home, "production")
    for path in [*bundle.rglob("*"), *deployed.rglob("*"), *copied_run.folder.rglob("audit/*")]:
        if path.is_file():
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert str(copied_run.home).encode() not in data, path
            assert str(Path.home() / ".config").encode() not in data, path


# Beside a run: nothing of it changes


@pytest.fixture(scope="module")
def second(finished_run, tmp_path_factory):
    "A copy of the run, audited once more beside it."
    home = tmp_path_factory.mktemp("beside") / "home"
    shutil.copytree(finished_run.home, home)
    run = Run(finished_run.run_id, home)
    before = tree(run.folder)
    return run, audit_beside(run, None), before


def test_an_audit_beside_leaves_the_run_as_it_was(second):
    run, bundle, before = second
    assert tree(run.folder) == before
    assert bundle.parent == audits_folder(run.home)
    assert set(FILES) == {*Artifacts(bundle).index()}
    assert Artifacts(bundle).verify() == []
    assert not [p for p in audits_folder(run.home).iterdir() if p.name.startswith(".")]


def test_a_second_audit_finds_the_same_but_for_the_certificate(second):
    run, bundle, _ = second
    first, again = run.artifacts.read_json("audit/metrics.json"), metrics_of(bundle)
    for name in ("candidate", "baseline", "deltas", "student_model", "monitoring", "windows"):
        assert again[name] == first[name], name
    flag = next(f for f in again["risk_flags"] if f["name"] == "certificate")
    assert flag["evidence"] == "no certificate was looked for"
    assert (bundle / "plots/equity.png").read_bytes() == (
        run.folder / "audit/plots/equity.png"
    ).read_bytes()
    assert again["validation_results"]["optimizer_validation"] == {
        "searched": False,
        "reason": "no search on this run's scores",
    }


def test_a_run_with_its_manifest_is_never_written_again(second):
    run, _, before = second
    with pytest.raises(DataError, match="is not written again"):
        write_bundle(run, None)
    assert tree(run.folder) == before


def test_a_run_that_was_not_audited_is_refused(copied_run):
    kept = [line for line in (copied_run.folder / "artifacts.jsonl").read_text().splitlines()
            if '"audit/' not in line]  # fmt: skip
    (copied_run.folder / "artifacts.jsonl").write_text("\n".join(kept) + "\n")
    _artifacts.cache_clear()
    with pytest.raises(DataError, match="must have come through phase 6"):
        audit_beside(copied_run, None)
    assert held_bundles(copied_run.home) == []


# Damage and partial evidence


def flags_after(run):
    found = metrics_of(audit_beside(run, None))
    return {f["name"]: f["evidence"] for f in found["risk_flags"]}, found


def test_a_changed_file_and_a_lost_ledger_block_everything(copied_run):
    path = next(p for p in copied_run.folder.glob("teacher/*/*") if p.suffix != ".json")
    path.write_bytes(path.read_bytes() + b" ")
    ledger_path(copied_run.home).unlink()
    flags, found = flags_after(copied_run)
    assert flags["evidence"] == "checks failed: files"
    assert flags["ledger"] == "there is no ledger"
    assert (found["environments_ready"], found["deployment_ready"]) == ([], False)


def test_a_run_that_never_traded_has_reasons_in_place_of_figures(copied_run):
    store = copied_run.artifacts
    trades, daily = (store.read_parquet(f"{n}.parquet") for n in ("trades", "daily_returns"))
    store.write_parquet("trades.parquet", trades.iloc[:0])
    store.write_parquet("daily_returns.parquet", daily.assign(net_return=0.0))
    flags, found = flags_after(copied_run)
    assert flags["evidence"] == "checks failed: returns"
    new = found["candidate"]
    assert (new["win_rate"], new["reasons"]["win_rate"]) == (None, "0 closed trades")
    assert (new["sharpe_ratio"], found["deltas"]["sharpe_ratio_delta"]) == (None, None)
    assert new["observations"]["sharpe_ratio"] == len(daily)
    assert found["monitoring"]["trades_90day"]["reason"] == "there are no opinions"


def test_a_search_on_the_scores_must_have_been_reproduced(copied_run):
    store = Artifacts(copied_run.home / "data" / "optimization" / "run_20260101_090000")
    store.write_json("optimization_summary.json", {"identity": {"run": copied_run.run_id}})
    flags, found = flags_after(copied_run)
    assert flags["optimizer"] == "run_20260101_090000 was never measured again"
    again = {"tolerance": 0.05, "delta_tolerance_met": True, "best_config_consistent": True}
    store.write_json("optimizer_validation.json", again | {"differs": [], "warnings": []})
    flags, found = flags_after(copied_run)
    assert "optimizer" not in flags
    told = found["validation_results"]["optimizer_validation"]
    assert (told["searched"], told["reproduced"], told["best_config_consistent"]) == (True,) * 3
    store.path("optimizer_validation.json").write_text("{}")
    flags, _ = flags_after(copied_run)
    assert "cannot be read: SHA-256 must be" in flags["optimizer"]


def test_sentiment_counts_where_a_group_reads_it(copied_run):
    store = copied_run.artifacts
    recipe = store.read_json("recipe.json")
    audited = Audited(copied_run, [], [], None, NOW)
    assert sources_of(audited)[1] is None
    store.write_json("recipe.json", recipe | {"groups": ["technical", "sentiment"]})
    assert sources_of(audited)[1] == 0.0
    store.write_json("sources.json", {"sentiment": {"share_covered": 0.9}})
    coverage, mood, newest = sources_of(audited)
    assert (mood, 0.9 < coverage <= 1.0, newest.isoformat()) == (0.9, True, "2024-02-29")


# What is deployed


@pytest.fixture(scope="module")
def staged(finished_run, tmp_path_factory):
    "A home in which the run was approved by two people and deployed to staging."
    folder = tmp_path_factory.mktemp("staged")
    shutil.copytree(finished_run.home, folder / "home")
    for role, name in (("Engineering Lead", "Asha"), ("Risk Manager", "Ravi")):
        enrol_key(folder / "home", name, "a passphrase", folder / "keys")
        private = load_private(name, "a passphrase", folder / "keys")
        approve(folder / "home", finished_run.run_id, role, private)
    deploy(folder / "home", finished_run.run_id, "staging", "a test")
    return folder / "home"


@pytest.fixture
def staged_copy(staged, tmp_path):
    "The same to be changed."
    shutil.copytree(staged, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def test_what_is_deployed_is_audited_without_its_run(staged_copy):
    release = active_release(staged_copy, "staging")
    shutil.rmtree(staged_copy / "runs")
    bundle = audit_deployed(staged_copy, "staging")
    found = metrics_of(bundle)
    assert Artifacts(bundle).verify() == []
    assert {f["name"] for f in found["risk_flags"]} == {"simulated_data", "certificate"}
    assert found["student_model"]["version"] == release.release_id
    assert found["baseline"]["sharpe_ratio"] is not None
    assert found["candidate"]["reasons"]["hit_ratio"] == "no opinions were kept"
    assert found["monitoring"]["swing_90day"]["reason"] == "there are no opinions"
    assert (bundle / "plots/equity.png").is_file()


def test_telemetry_since_the_deployment_is_compared_with_the_evidence(staged_copy):
    release = active_release(staged_copy, "staging")
    said = pd.read_parquet(release.folder / "evidence" / "predictions.parquet")
    first = pd.Timestamp(release.deployed_at) + pd.Timedelta(minutes=1)
    rows = model_opinions(said).head(80).assign(direction="LONG", forward_return=-0.02)
    rows["ts"] = pd.date_range(first, periods=80, freq="min")
    rows["label_known_at"] = rows["ts"] + pd.Timedelta(minutes=5)
    before = rows.assign(ts=rows["ts"] - pd.Timedelta(days=2), forward_return=0.02)
    before["label_known_at"] = before["ts"] + pd.Timedelta(minutes=5)
    place = staged_copy / "data" / "telemetry" / "staging" / release.release_id
    for name, part in (("model", rows), ("earlier", before)):
        write_traces(Book("", account([]), None, part).traces(), place / name)
    now = release.deployed_at + timedelta(hours=6)
    found = metrics_of(audit_deployed(staged_copy, "staging", now))
    assert (found["candidate"]["hit_ratio"], found["candidate"]["observations"]["hit_ratio"]) == (
        0,
        80,
    )
    assert found["monitoring"]["swing_90day"]["n_opinions"] == 160
    flags = {f["name"]: f["evidence"] for f in found["risk_flags"]}
    assert "below release release_" in flags["hit_ratio_drop"]
    quiet = metrics_of(audit_deployed(staged_copy, "staging", now + timedelta(days=60)))
    assert quiet["monitoring"]["intraday_30day"]["n_opinions"] == 0
    late = json.loads(
        (
            audits_folder(staged_copy) / quiet["audit_id"] / "telemetry_summaries/30_days.json"
        ).read_text()
    )
    assert late["opinions"]["reason"].startswith("no opinion in 30 days; the newest is of")


def test_what_its_run_had_to_learn_from_is_weighed_again(staged_copy, finished_run):
    totals = finished_run.artifacts.read_json("coverage.json")["totals"]
    share = totals["sessions_held"] / totals["sessions_expected"]
    shutil.rmtree(staged_copy / "runs")
    held = open_deployed(staged_copy, "staging", NOW)
    windows = windows_of(held.seen[0], held.settings, pd.Timestamp(NOW))
    facts = _deployed_facts(held, {}, windows)
    assert 0 < share < 1
    assert (facts.coverage, facts.sentiment, facts.failed_windows) == (share, None, 0)
    held.manifest["training"]["student"]["failed"] = 2
    assert _deployed_facts(held, {}, windows).failed_windows == 2


def test_a_damaged_release_is_a_finding_and_makes_a_bundle(staged_copy):
    release = active_release(staged_copy, "staging")
    path = release.folder / "config.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes() + b" ")
    found = metrics_of(audit_deployed(staged_copy, "staging"))
    assert [f["name"] for f in found["risk_flags"]] == ["release"]
    assert "config.json: it has changed" in found["risk_flags"][0]["evidence"]
    assert found["environments_ready"] == []


def test_a_later_run_is_compared_with_what_is_deployed(staged_copy, finished_run):
    later = Run("live_candidate_20991231_090000", staged_copy)
    shutil.copytree(staged_copy / "runs" / finished_run.run_id, later.folder)
    release = active_release(staged_copy, "staging")
    told = {"release_id": release.release_id, "environment": "staging"}
    assert replaced_release(later) == told | {"manifest_sha256": release.manifest_sha256}
    assert replaced_release(Run(finished_run.run_id, staged_copy)) is None
    _, found = flags_after(later)
    release = active_release(staged_copy, "staging").release_id
    assert found["comparison"]["release_id"] == release
    assert found["comparison"]["sessions_shared"] == found["statistics"]["n_sessions"]
    assert found["comparison"]["notes"] == ["nothing is deployed to production"]
    gaps = {k: v for k, v in found["deltas"].items() if k.endswith("_delta")}
    assert set(gaps.values()) == {0.0}
    assert found["baseline"]["name"] == f"release {release}"
    assert found["student_model"]["deployed"] is False
    sheet = "promotion_checklists/promotion_checklist.json"
    told = json.loads((audits_folder(staged_copy) / found["audit_id"] / sheet).read_text())
    assert (told["recommendation"], told["baseline_model"]) == ("REJECT", f"release {release}")


def test_with_too_few_shared_sessions_the_sma_cross_stands_in(
    staged_copy, finished_run, monkeypatch
):
    later = Run("live_candidate_20991231_090000", staged_copy)
    shutil.copytree(staged_copy / "runs" / finished_run.run_id, later.folder)
    monkeypatch.setattr("sensequant.govern.weighing.MIN_SHARED", 10_000)
    _, found = flags_after(later)
    assert found["baseline"]["name"] == "the SMA cross"
    assert "10000 are needed" in " ".join(found["comparison"]["notes"])
    assert found["comparison"]["kind"] == "sma_cross"


# The command


def test_the_command_line_ends_with_3_where_a_flag_is(second, monkeypatch):
    run, _, before = second
    monkeypatch.setenv("SENSEQUANT_HOME", str(run.home))
    told = CliRunner().invoke(app, ["audit", "latest"])
    assert told.exit_code == 3, told.output
    assert "simulated_data: the bars are simulated (blocks production)" in told.stdout
    assert tree(run.folder) == before
    folder = Path(told.stdout.split("Bundle")[1].split("\n")[0].strip())
    assert asdict(Artifacts(folder).index()["metrics.json"])["size"] > 1000
    wrong = CliRunner().invoke(app, ["audit", "latest", "--deployed", "staging"])
    assert (wrong.exit_code, "found both" in wrong.stderr) == (2, True)


def test_old_bundles_go_to_the_archive_whole(second, monkeypatch):
    run, bundle, _ = second
    monkeypatch.setenv("SENSEQUANT_HOME", str(run.home))
    old = bundle.with_name(f"audit_{NOW - timedelta(days=184):%Y%m%d_%H%M%S}")
    young = bundle.with_name(f"audit_{NOW - timedelta(days=182):%Y%m%d_%H%M%S}")
    for target in (old, young):
        shutil.copytree(bundle, target)
    told = CliRunner().invoke(app, ["audit", "--deployed", "production", "--prune"])
    assert f"Archived   {old.name}" in told.stdout and "Deleted" not in told.stdout
    assert Artifacts(old.parent / "archive" / old.name).verify() == []
    assert young.is_dir() and not old.exists()
