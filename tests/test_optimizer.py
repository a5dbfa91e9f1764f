"A search: the same for any number of workers, whatever kills it, and files that tell."

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sensequant.backtest.accounts import read_accounts
from sensequant.backtest.optimizer import (
    SAMPLERS,
    Dimension,
    Evaluation,
    Job,
    Search,
    SearchPlan,
    Space,
    WalkForward,
    baseline_of,
    grid_order,
    make_folds,
    make_space,
    random_order,
    ranked,
    read_space,
    reproduce,
)
from sensequant.core.errors import DataError, GateError, SettingsError
from sensequant.core.ledger import Ledger
from sensequant.core.testing import sessions
from sensequant.data.runs import index_of
from sensequant.market.calendar import sessions as exchange_sessions
from sensequant.ops import optimize_cli
from sensequant.ops.deployment import (
    compared,
    config_lines,
    counted,
    fold_table,
    open_search,
    summarise,
    traced,
    write_files,
)
from sensequant.ops.main import app
from sensequant.ops.report_cli import report_notebooks
from sensequant.ops.search_luck import luck_of, search_series

DAYS = sessions(320)
SAID = dict(
    symbol="A", strategy="toy", predicted_direction="LONG", confidence=0.6, entry_price_inr=100.0,
    holding_minutes=375.0, features="{}", metadata="{}",
)  # fmt: skip
SPACE = make_space(
    {
        "parameters": {
            "fast": {"kind": "int", "low": 2, "high": 12, "step": 2},
            "slow": {"kind": "int", "low": 8, "high": 20, "step": 4},
            "frac": {"kind": "log", "low": 0.01, "high": 0.1, "points": 3},
        }
    }
)


@dataclass(frozen=True)
class Noise:
    "A rule whose gains are noise, the same for the same parameters, and slow when asked."

    strategy: str = "toy"
    edge: float = 0.0  # gain a session at fast = 6, fraction
    wait_s: float = 0.0

    @property
    def defaults(self):
        return {"fast": 4, "slow": 16, "frac": 0.05, "other": 1}

    def check(self, params):
        if params["fast"] >= params["slow"]:
            raise SettingsError("fast must be below slow", (params["fast"], params["slow"]))

    def evaluate(self, params, folds):
        time.sleep(self.wait_s)
        if params["fast"] == 10:
            raise ZeroDivisionError("no volume")
        seed = [params["fast"], params["slow"], int(1e9 * params["frac"])]
        rng = np.random.default_rng(seed)
        for fold in folds:
            when = DAYS[(fold.test_first <= DAYS) & (fold.test_last >= DAYS)]
            net = rng.normal(self.edge * (params["fast"] == 6), 0.01, len(when))
            daily = pd.DataFrame({"net_return": net, "benchmark_return": 0.0, "ic": np.nan}, when)
            trades = pd.DataFrame({"net_inr": 100 * net, "return_frac": net})
            rose = pd.DataFrame({"realised_return": net, "exit_price_inr": 100 * (1 + net)}, when)
            rose["actual_direction"] = np.where(net > 0.005, "LONG", "NOOP")
            traces = rose.rename_axis("timestamp").reset_index().assign(**SAID)
            yield Evaluation(daily, trades.assign(holding_minutes=375.0), traces)

    def identity(self):
        return {"market": "toy", "symbols": ["A"], "edge": self.edge}


def job(sampler="random", n=12, **evaluator):
    plan = SearchPlan(sampler, "sharpe_ratio", max_configs=n, batch=4, min_trades=5)
    folds = make_folds(DAYS, WalkForward(train=60, test=60, purge=5, embargo=1))
    return Job(Noise(**evaluator), SPACE, folds, plan)


def found(tried):
    return [(t.config_id, t.parameters, t.state, t.reason) for t in tried]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_workers_change_nothing(tmp_path, sampler):
    ledger = Ledger(tmp_path / "ledger.db")
    one, two = (Search(tmp_path / str(n), ledger, workers=n).run(job(sampler)) for n in (1, 3))
    assert found(one) == found(two)
    scores = [[t.score for t in tried if t.state == "complete"] for tried in (one, two)]
    assert scores[0] == scores[1] and len(scores[0]) > 3
    assert {t.state for t in one} == {"complete", "pruned", "failed"}


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_optimizer import Ledger, Search, job
folder = Path({folder!r})
search = Search(folder / "search", Ledger(folder / "ledger.db"), workers={workers})
search.run(job({sampler!r}, wait_s=0.15))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "workers"), [("tpe", 1), ("random", 2)])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, sampler, workers):
    path = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = SCRIPT.format(path=path, folder=str(tmp_path), workers=workers, sampler=sampler)
    victim = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    folder, ledger = tmp_path / "search", Ledger(tmp_path / "ledger.db")
    until = time.monotonic() + 120
    while len(list(folder.glob("telemetry/*/daily.parquet"))) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    assert victim.poll() is None, "it should still be at work"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    with pytest.raises(SettingsError, match="Resume it"):
        Search(folder, ledger).run(job(sampler))
    seen = []
    search = Search(folder, ledger, resume=True, watch=lambda done, total, t: seen.append(done))
    went_on = search.run(job(sampler))
    whole = Search(tmp_path / "whole", Ledger(tmp_path / "other.db")).run(job(sampler))
    assert found(went_on) == found(whole)
    assert 0 < len(seen) < 12 and seen[-1] == 12
    rows = ledger.overlapping("toy", ["A"], DAYS[0].date(), DAYS[-1].date())
    held = {json.dumps(r.config["parameters"], sort_keys=True) for r in rows}
    assert held == {json.dumps(t.parameters, sort_keys=True) for t in went_on if t.folds}
    assert ledger.verify().intact


def test_one_process_at_a_time(tmp_path):
    ledger, tries = Ledger(tmp_path / "ledger.db"), []

    def intrude(done, total, tried):
        with pytest.raises(GateError, match="one process at a time"):
            Search(tmp_path / "a", ledger, resume=True).run(job())
        tries.append(done)

    Search(tmp_path / "a", ledger, watch=intrude).run(job(n=2))
    assert tries == [0, 1, 2]


@settings(max_examples=6, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    asked=st.lists(st.integers(1, 14), min_size=1, max_size=2),
)
def test_exactly_as_many_as_asked_for_and_each_once(tmp_path_factory, sampler, asked):
    folder = tmp_path_factory.mktemp("search")
    ledger = Ledger(folder / "ledger.db")
    reached = 0
    for i, n in enumerate(asked):
        tried = Search(folder / "a", ledger, resume=i > 0).run(job(sampler, n))
        reached = max(reached, n)
        sought = [t for t in tried if t.config_id != "baseline"]
        assert len(sought) == reached and baseline_of(tried) is not None
        assert [t.config_id for t in sought] == [f"config_{k:04d}" for k in range(1, reached + 1)]
        assert len({json.dumps(t.parameters, sort_keys=True) for t in sought}) == reached


def test_a_small_space_ends_a_search_early(tmp_path):
    few = Space((Dimension("fast", "int", 2, 8, step=2),))
    for sampler in SAMPLERS:
        tried = Search(tmp_path / sampler, Ledger(tmp_path / "ledger.db"), baseline=False).run(
            replace(job(sampler, 40), space=few)
        )
        assert sorted(t.parameters["fast"] for t in tried) == [2, 4, 6, 8]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 5), st.integers(1, 50))
def test_grids_and_draws_hold_each_point_once(low, width, step, seed):
    space = Space(
        (
            Dimension("a", "int", low, low + width, step=step),
            Dimension("b", "choice", choices=("x", "y", 3)),
        )
    )
    points = list(grid_order(space, seed))
    assert len(points) == space.size() == len({tuple(p.items()) for p in points})
    assert all(low <= p["a"] <= low + width and (p["a"] - low) % step == 0 for p in points)
    drawn = list(random_order(space, seed))
    assert {tuple(p.items()) for p in drawn} <= {tuple(p.items()) for p in points}


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(10, 400),
    train=st.integers(1, 100),
    test=st.integers(1, 80),
    purge=st.integers(0, 15),
    embargo=st.integers(0, 5),
)
def test_folds_never_touch(n, train, test, purge, embargo):
    days, cut = sessions(n), WalkForward(train, test, purge, embargo)
    if n < train + purge + embargo + test:
        with pytest.raises(DataError, match="sessions must reach"):
            make_folds(days, cut)
        return
    folds = make_folds(days, cut)
    at = {day: i for i, day in enumerate(days)}
    covered = []
    for fold in folds:
        covered += range(at[fold.test_first], at[fold.test_last] + 1)
        assert at[fold.test_last] - at[fold.test_first] + 1 >= test
    assert covered == list(range(train + purge + embargo, n))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("parameters: {fats: {kind: int, low: 1, high: 2}}", "found fats.*Did you mean fast"),
        ("parameters: {fast: {kind: int, low: 9, high: 2}}", "low must not lie above high"),
        ("parameters: {fast: {kind: int, low: 1.5, high: 2}}", "a whole number needs a whole"),
        ("parameters: {fast: {kind: int, low: 20, high: 30}}", "does not contradict itself"),
        ("parameters: {fast: {kind: int, low: one, high: 2}}", "low and high must be numbers"),
        ("parameters: {fast: {kind: choice, low: 1, choices: [1]}}", "a choice has no range"),
        ("parameters: {frac: {kind: log, low: 0, high: 2}}", "a log range begins above 0"),
        ("parameters: {fast: {kind: int, low: 1}, fast: {kind: int}}", "stand once.*found fast"),
        ("parameters: {fast: 3}", "a parameter has kind"),
        ("parameters: []", "must list its parameters"),
        ("fast: 3", "must list its parameters"),
        ("{", "must be YAML or JSON"),
    ],
)
def test_a_space_that_cannot_be_meant_is_refused(tmp_path, text, words):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        replace(job(), space=read_space(file))


def test_json_is_read_too(tmp_path):
    file = tmp_path / "space.json"
    file.write_text(json.dumps({"parameters": {"frac": {"kind": "float", "low": 0, "high": 0.5}}}))
    assert read_space(file).size() is None
    with pytest.raises(SettingsError, match="a grid needs step or points"):
        replace(job("grid"), space=read_space(file))


def test_another_search_does_not_go_on_in_the_same_folder(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    Search(tmp_path / "a", ledger).run(job(n=2))
    for other, words in [
        (job("grid"), "plan.sampler was random and is grid"),
        (job(edge=0.1), "identity.edge was 0.0 and is 0.1"),
    ]:
        with pytest.raises(SettingsError, match=words):
            Search(tmp_path / "a", ledger, resume=True).run(other)


def test_the_best_is_found_and_found_again(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    sought = job("grid", 60, edge=0.005)
    best = ranked(Search(tmp_path / "a", ledger).run(sought))[0]
    assert best.parameters["fast"] == 6 and best.parameters["other"] == 1
    again = reproduce(tmp_path / "a", sought, ledger)
    assert again.best_config_consistent and again.delta_tolerance_met and not again.warnings
    worse = reproduce(tmp_path / "a", job("grid", 60, edge=0.001), ledger)
    assert not worse.best_config_consistent and not worse.delta_tolerance_met
    assert worse.warnings == ("identity.edge was 0.005 and is 0.001",)
    assert any(d.startswith(f"{best.config_id} sharpe_ratio was") for d in worse.differs)
    slightly = reproduce(tmp_path / "a", job("grid", 60, edge=0.00501), ledger)
    assert slightly.delta_tolerance_met and slightly.warnings


def test_the_files_have_the_fields_that_others_read(tmp_path):
    ledger = Ledger(tmp_path / "ledger.db")
    sought = job("grid", 20, edge=0.004)
    tried = Search(tmp_path / "a", ledger).run(sought)
    write_files(tmp_path / "a", summarise(sought, tried, {"run_id": "a"}), config_lines(tried))
    held = {p.name for p in (tmp_path / "a").iterdir()}
    assert held >= {
        "configs.json", "ranked_results.csv", "baseline_metrics.json", "optimization_summary.json",
        "accuracy_report.md", "deployment_plan.md", "telemetry", "search.db", "search.json",
    }  # fmt: skip
    lines = json.loads((tmp_path / "a/configs.json").read_text())
    assert len(lines) == 20
    fields = {"config_id", "rank", "score", "parameters", "metrics", "accuracy_metrics"}
    assert all(fields <= set(line) for line in lines)
    base = json.loads((tmp_path / "a/baseline_metrics.json").read_text())
    names = {"sharpe_ratio", "total_return", "win_rate", "precision_long", "hit_ratio"}
    assert names <= set(base) and names <= {*lines[0]["metrics"], *lines[0]["accuracy_metrics"]}
    table = pd.read_csv(tmp_path / "a/ranked_results.csv")
    assert table["score"].dropna().is_monotonic_decreasing
    assert {"config_id", "score", "sharpe_ratio", "param_fast", "state", "reason"} <= set(table)
    summary = json.loads((tmp_path / "a/optimization_summary.json").read_text())
    assert summary["total_configs"] == sum(summary["states"].values()) == 20
    assert summary["best"]["config_id"] == lines[0]["config_id"]
    back = open_search(tmp_path / "a")
    assert len(back.table(lines[0]["config_id"], "traces")) == lines[0]["metrics"]["n_sessions"]
    never = [x for x in lines if "fast must be below slow" in x["reason"]]
    assert never and not any((tmp_path / "a/telemetry" / x["config_id"]).exists() for x in never)


@dataclass(frozen=True)
class Odd(Noise):
    "The same, of whose parameters in force nothing can be said."

    how: str = "undefined"  # undefined, ruined or broken

    def evaluate(self, params, folds):
        for part in super().evaluate(params, folds):
            if params == self.defaults:
                if self.how == "broken":
                    raise ZeroDivisionError("no volume")
                daily, trades = part.daily.copy(), part.trades.assign(net_inr=1.0)
                if self.how == "ruined":
                    daily.iloc[3, 0], daily.iloc[4:, 0] = -1.2, 0.0
                part = replace(part, daily=daily, trades=trades)
            yield part


def odd(how):
    sought = job("random", 6)
    objective = "profit_factor" if how == "undefined" else "composite"
    plan = replace(sought.plan, objective=objective, seed=3)
    return replace(sought, evaluator=Odd(how=how), plan=plan)


@pytest.mark.parametrize(
    ("how", "state", "why"),
    [
        ("undefined", "pruned", "profit_factor is undefined in a fold"),
        ("broken", "failed", "no volume"),
        ("ruined", "pruned", "the account lost all its capital in a fold"),
    ],
)
def test_a_baseline_of_which_nothing_can_be_said_is_named_and_not_compared(
    tmp_path, how, state, why
):
    sought, ledger = odd(how), Ledger(tmp_path / "ledger.db")
    tried = Search(tmp_path / "a", ledger).run(sought)
    base, best = baseline_of(tried), ranked(tried)[0]
    assert base.state == state and why in base.reason
    luck = luck_of(search_series(ledger, tried, "random"), 1, 1, 7)
    summary = summarise(sought, tried, {"run_id": "a"}, luck)
    assert len(write_files(tmp_path / "a", summary, config_lines(tried))) == 6
    found = open_search(tmp_path / "a")
    assert "(the baseline has no score)" in (tmp_path / "a/accuracy_report.md").read_text()
    plan = (tmp_path / "a/deployment_plan.md").read_text()
    assert "nothing to deploy" in plan and why in plan
    measured = how != "broken"
    assert found.pair == [best.config_id, "baseline"][: 1 + measured]
    assert ("baseline" in fold_table(found.summary)) == measured == bool(found.summary["deltas"])
    for name in found.pair:
        assert counted(found, name).to_numpy().sum() > 0
    assert compared(found.summary).set_index("metric").loc["score", "baseline"] == "none"
    assert reproduce(tmp_path / "a", sought, ledger).delta_tolerance_met


TRY = """
parameters:
  fast_sessions: {kind: int, low: 5, high: 25, step: 10}
  slow_sessions: {kind: int, low: 30, high: 70, step: 20}
"""


@pytest.fixture(scope="module")
def null_search(tmp_path_factory):
    "A search from the command line on a market with nothing to find."
    home = tmp_path_factory.mktemp("home")
    (home / "space.yaml").write_text(TRY)
    words = ["optimize", "--space", home / "space.yaml", "--sampler", "grid", "--max-configs", 8]
    words += ["--source", "simulated", "--sim-symbols", 5, "--signal-ic", 0, "--seed", 3]
    words += ["--start", "2022-01-03", "--end", "2024-12-31", "--capital", 1_000_000]
    words += ["--set", "search_train_sessions=100", "--telemetry-sample-rate", 0.5]
    words += ["--set", "trace_compress=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENSEQUANT_HOME", str(home))
        done = CliRunner().invoke(app, [*map(str, words), "--output-dir", str(home / "found")])
    assert done.exit_code == 0, done.output
    return home, done.output


def test_the_best_of_a_null_market_is_luck_and_said_to_be(null_search):
    home, told = null_search
    summary = open_search(home / "found").summary
    best, base = summary["best"], summary["baseline"]
    assert best["score"] > base["score"], "a search always finds something better"
    assert summary["luck"]["is_luck"] and summary["luck"]["p_improvement"] > 0.05
    assert "is not told apart from luck" in told
    for name in ("accuracy_report.md", "deployment_plan.md"):
        assert "not told apart from luck" in (home / "found" / name).read_text()
    assert summary["luck"]["n_configs"] == 9 == summary["luck"]["n_ledger"]


def test_the_holdout_is_not_read(null_search):
    home, _ = null_search
    found = open_search(home / "found")
    held = exchange_sessions(date(2022, 1, 3), date(2024, 12, 31))[-120]
    assert pd.Timestamp(found.summary["date_range"]["end"]) < held
    assert pd.Timestamp(found.summary["identity"]["last_bar"]) < held, "not even as a bar"
    ledger = Ledger(home / "data/state/ledger.db")
    assert ledger.verify().intact
    last = pd.Timestamp(found.summary["date_range"]["end"]).date()
    rows = [ledger.trial(line["ledger_row"]) for line in found.lines]
    assert {row.last for row in rows} == {last} and {row.source for row in rows} == {"optimizer"}


def test_telemetry_is_sampled_and_apart(null_search):
    home, _ = null_search
    found = open_search(home / "found")
    for line in found.lines:
        kept, all_ = len(found.table(line["config_id"], "traces")), line["accuracy_metrics"]
        assert 0.3 < kept / all_["n_traces"] < 0.7
        assert len(found.table(line["config_id"], "trades")) == line["metrics"]["total_trades"]
        files = (home / "found/telemetry" / line["config_id"]).glob("traces-*")
        assert [f.suffix for f in files] == [".gz"], "written as the settings of traces say"


def test_the_plan_names_paths_and_commands_that_exist(null_search, monkeypatch, tmp_path):
    home, _ = null_search
    monkeypatch.setenv("SENSEQUANT_HOME", str(home))
    plan = (home / "found/deployment_plan.md").read_text()
    quoted = re.findall(r"`([^`\n]+)`", plan)
    paths = [Path(word) for word in quoted if "/" in word]
    assert len(paths) == 4 and all(path.exists() for path in paths), paths
    typed = [line for line in plan.splitlines() if line.startswith("sensequant ")]
    measured, shown, traded = (shlex.split(line)[1:] for line in typed)
    assert Path(shown[1]).samefile(home / "found") and shown[2] in report_notebooks()
    traded += ["--output-dir", str(tmp_path / "traded")]
    for words in (measured, traded, ["settings"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    best = open_search(home / "found").summary["best"]["parameters"]
    kept = read_accounts(tmp_path / "traded").config["accounts"]["swing"]["swing"]["params"]
    assert kept == {name: best[name] for name in kept}
    rest = set(quoted) - {str(path) for path in paths}
    known = {"sensequant settings", "sensequant optimize", ".env", "baseline", "found"}
    assert rest <= known | {open_search(home / "found").summary["best"]["config_id"]}, rest


def test_a_search_of_files_goes_on_from_anywhere_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path / "home"))
    (tmp_path / "bars").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "space.yaml").write_text(TRY)
    given = dict.fromkeys(inspect.signature(optimize_cli.optimize).parameters)
    none = given | {"skip_fetch": False, "resume": False}
    monkeypatch.chdir(tmp_path)
    typed = none | {"space": Path("space.yaml"), "csv_dir": Path("bars"), "skip_fetch": True}
    sought = optimize_cli.read_search(
        typed | {"output_dir": Path("found"), "benchmark": Path("NIFTY50")}
    )
    optimize_cli.remember(sought.folder, sought.given, sought.space)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for how in ({"validate_only": tmp_path / "found"}, {"resume": True}):
        place = {"output_dir": tmp_path / "found"} if "resume" in how else {}
        again = optimize_cli.read_search(none | how | place)
        assert again.asked.settings.csv_dir == tmp_path / "bars"
        assert index_of(again.asked.settings.benchmark) == "NIFTY50"
        assert again.asked.skip_fetch and again.space == sought.space


def test_a_rule_inside_the_day_is_sought_and_ends_before_the_holdout(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path))
    (tmp_path / "space.yaml").write_text("parameters: {rsi_bars: {kind: int, low: 7, high: 9}}")
    words = ["optimize", "--space", tmp_path / "space.yaml", "--strategy", "intraday"]
    words += ["--source", "simulated", "--sim-symbols", 2, "--interval", "30minute"]
    words += ["--start", "2023-01-02", "--end", "2023-06-30", "--sampler", "grid"]
    for setting in ("search_train_sessions=20", "search_test_sessions=30", "holdout_sessions=40"):
        words += ["--set", setting]
    words += ["--telemetry-sample-rate", 0, "--capital", 1_000_000, "--max-configs", 3]
    done = CliRunner().invoke(app, [*map(str, words), "--output-dir", str(tmp_path / "found")])
    assert done.exit_code == 0, done.output
    found = open_search(tmp_path / "found")
    assert found.summary["states"] == {"complete": 3, "pruned": 0, "failed": 0}
    trades = found.table(found.lines[0]["config_id"], "trades")
    assert (trades["entry_ts"].dt.date == trades["exit_ts"].dt.date).all() and len(trades) > 10
    held = exchange_sessions(date(2023, 1, 2), date(2023, 6, 30))[-40]
    assert pd.Timestamp(found.summary["identity"]["last_bar"]) < held
    name = found.lines[0]["config_id"]
    assert traced(found, name).startswith("A sample of 0 of the")
    assert counted(found, name).to_numpy().sum() == found.line(name)["accuracy_metrics"]["n_known"]


@pytest.mark.slow
def test_the_report_of_a_search_is_made(null_search, monkeypatch):
    home, _ = null_search
    monkeypatch.setenv("SENSEQUANT_HOME", str(home))
    words = ["report", str(home / "found"), "optimization", "--format", "html"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    page = (home / "found/optimization.html").read_text()
    assert "not told apart from luck" in page and page.count("data:image/png") >= 7


@pytest.mark.parametrize("validate", [True, False])
def test_ctrl_c_advises_nothing_that_would_be_refused(tmp_path, monkeypatch, validate):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path))
    monkeypatch.setattr(optimize_cli, "from_feed", interrupted)
    (tmp_path / "space.yaml").write_text(TRY)
    words = ["--space", str(tmp_path / "space.yaml"), "--output-dir", str(tmp_path / "found")]
    if validate:
        (tmp_path / "found").mkdir()
        optimize_cli.remember(tmp_path / "found", {"strategy": "swing"}, {})
        (tmp_path / "found/search.json").touch()
        words = ["--validate-only", str(tmp_path / "found")]
    said = CliRunner().invoke(app, ["optimize", *words])
    assert said.exit_code == 130 and "interrupted" in said.output, said.output
    assert "--resume" not in said.output


@pytest.mark.slow
def test_ctrl_c_leaves_a_search_that_goes_on(null_search, tmp_path, monkeypatch):
    home, _ = null_search
    main = "from sensequant.ops.main import main; main()"
    words = ["optimize", "--space", home / "space.yaml", "--source", "simulated"]
    words += ["--sim-symbols", 5, "--signal-ic", 0, "--seed", 3, "--capital", 1_000_000]
    words += ["--start", "2022-01-03", "--end", "2024-12-31", "--max-configs", 6]
    words += ["--set", "search_train_sessions=100", "--sampler", "random", "--workers", 1]
    env = os.environ | {"SENSEQUANT_HOME": str(home)}
    folder = tmp_path / "search"
    command = [sys.executable, "-c", main, *map(str, words), "--output-dir", str(folder)]
    victim = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while len(list(folder.glob("telemetry/*/daily.parquet"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    victim.send_signal(signal.SIGINT)
    told, _ = victim.communicate()
    assert victim.returncode == 130, told
    assert f"go on with: sensequant optimize --resume --output-dir {folder}" in told
    monkeypatch.setenv("SENSEQUANT_HOME", str(home))
    done = CliRunner().invoke(app, ["optimize", "--resume", "--output-dir", str(folder)])
    assert done.exit_code == 0 and "6 configurations" in done.output, done.output
