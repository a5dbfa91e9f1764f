"""The training run from a broker: the real SDK, a sandbox with the market of the simulator."""

from datetime import date

import pytest
from conftest import SMALL, SYMBOLS

from sensequant.core.settings import load_settings
from sensequant.data.bars import BarStore
from sensequant.data.runs import benchmark_returns, pinned_bars, warm_start
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.live.sandbox_faults import Planned
from sensequant.market.simulator import MarketSpec
from sensequant.ops.orchestrator import begin_run, go_on, run_config, warnings_of

START, END = (date.fromisoformat(SMALL[k]) for k in ("start", "end"))
MARKET = MarketSpec(SMALL["sim_symbols"], warm_start(START, 180), END, 1, SMALL["signal_ic"])
HISTORY = "v2/historicalcharts"


@pytest.fixture
def broker(monkeypatch):
    "A sandbox whose keys stand in the environment, where phase 1 finds them and nobody else."
    with Sandbox(SandboxSpec(MARKET, scale=100)) as sandbox:
        for name, value in zip(
            ("API_KEY", "API_SECRET", "SESSION_TOKEN"), sandbox.credentials, strict=True
        ):
            monkeypatch.setenv(f"SENSEQUANT_BREEZE_{name}", value)
        yield sandbox


def settings_of(sandbox, source, **more):
    "Settings of a small run from the sandbox."
    quick = {"breeze_backoff_s": 0.02, "breeze_calls_per_minute": 6_000}
    own = SMALL | {"workers": 1, "source": source, "breeze_url": sandbox.url} | quick | more
    return load_settings(**own)


def run_from(sandbox, home, source, **more):
    "A finished run."
    settings = settings_of(sandbox, source, home=home, **more)
    run = begin_run(run_config(settings, SYMBOLS), home)
    return run, go_on(run)


def hashes(run, *beginnings):
    "SHA-256 of the files on record by path."
    held = run.artifacts.index()
    return {p: a.sha256 for p, a in held.items() if p.startswith(beginnings)}


@pytest.mark.slow
def test_a_run_from_breeze_ends_with_the_models_of_the_simulator(broker, finished_run, tmp_path):
    "The same market, once from the seed, once through the wire: the same bars, models and verdict."
    run, ended = run_from(broker, tmp_path, "breeze", benchmark="NIFTY 50")
    assert ended.status == "success", ended.message
    same = ("bars/", "teacher/", "student/", "predictions.")
    mine, theirs = hashes(run, *same), hashes(finished_run, *same)
    assert mine == theirs and sum(p.endswith("student.model") for p in mine) > 3
    assert run.state.run(run.run_id).simulated
    (source,) = BarStore(tmp_path / "data" / "bars").sources()
    assert source.startswith("breeze-sandbox")
    moves = benchmark_returns(run)
    assert moves.between(-0.2, 0.2).all() and len(moves) > 100
    written = "".join(p.read_text() for p in run.folder.glob("*.[ij][ps]*") if p.is_file())
    assert "NIFTY50" in written and not any(secret in written for secret in broker.credentials)


@pytest.mark.slow
def test_a_hybrid_run_goes_on_with_what_is_held_when_the_broker_is_down(broker, tmp_path):
    "Half is in the store, the rest cannot be had: the run says what is missing and uses the half."
    run, ended = run_from(broker, tmp_path, "hybrid", end="2023-09-29")
    assert ended.status == "success", ended.message
    broker.schedule(Planned("drop", HISTORY, count=10_000))
    more, ended = run_from(broker, tmp_path, "hybrid")
    assert ended.status == "success", ended.message
    told = warnings_of(more)
    assert any("what is held is used" in line and "2023-10" in line for line in told), told
    held, before = (pinned_bars(r, "SIM001") for r in (more, run))
    assert held.equals(before) and len(held) > 100


@pytest.mark.slow
def test_without_a_session_the_run_fails_with_the_address_to_open(broker, tmp_path):
    broker.expire()
    _, ended = run_from(broker, tmp_path, "breeze")
    assert ended.status == "failed" and "login?api_key=" in ended.message
    assert not list((tmp_path / "data" / "bars").rglob("*.parquet"))
    assert not any(secret in ended.message for secret in broker.credentials[1:])
