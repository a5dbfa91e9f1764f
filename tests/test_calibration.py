"""A campaign counts what the real pipeline and the real gate do, goes on after a kill as if nothing
had happened, and its certificate knows which code it was made with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import rank_ic_judge
from scipy.stats import binom, binomtest
from statsmodels.stats.proportion import proportion_confint

from sensequant.backtest import calibration
from sensequant.backtest.calibration import (
    Plan,
    Replication,
    block_order,
    date_rows,
    make_market,
    naive_gate,
    rebuilt_bars,
    replicate,
)
from sensequant.core.errors import DataError, GateError, SettingsError
from sensequant.core.events import append_lines, json_bytes
from sensequant.core.settings import Settings, load_settings
from sensequant.data.bars import check_bars
from sensequant.govern import certificate
from sensequant.govern.certificate import (
    ABOUT,
    ANSWERS,
    BESIDE,
    PIPELINE,
    Campaign,
    bind,
    calibrate,
    certificate_for_current_code,
    clopper_pearson,
    fingerprint,
    imported_modules,
    make_certificate,
    most_promotions,
    read_answers,
    read_campaign,
    upper_bound,
)
from sensequant.govern.judgement import judged
from sensequant.learn.tables import Recipe, WindowSpec
from sensequant.learn.teacher import TeacherSpec
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops import calibrate_cli
from sensequant.ops.cli import FAILED, FINISHED

TREES = TeacherSpec(n_estimators=5, learning_rate=0.2, folds=2)
RECIPE = Recipe(WindowSpec(90, 90, min_window_bars=30), teacher=TREES, scope="pooled")
TINY = Plan(
    "planted", 0.4, 6, date(2023, 1, 2), date(2023, 10, 31), 150, RECIPE, holdout_sessions=20
)
EMPTY = replace(TINY, market="null", signal_ic=0.0)


@pytest.fixture(scope="module")
def bound():
    "What the campaigns of these tests hold for."
    return bind(load_settings(), rank_ic_judge)


def untimed(answer):
    "An answer without what depends on the machine."
    return replace(answer, cpu_s=0.0, wall_s=0.0)


def made_panel(signal_ic=0.0, symbols=6, **numbers):
    "Bars by symbol over 600 sessions without a gap."
    whole = {"late_listing_frac": 0.0, "missing_day_frac": 0.0} | numbers
    market = simulate(
        MarketSpec(symbols, date(2021, 1, 4), date(2023, 6, 30), 5, signal_ic, **whole)
    )
    return {s: market.bars(s) for s in market.symbols}


# Counts


@pytest.mark.parametrize(("k", "n"), [(0, 7), (1, 7), (7, 7), (12, 400), (38, 1000), (499, 1000)])
def test_bounds_are_those_of_scipy_and_statsmodels(k, n):
    low, high = clopper_pearson(k, n, 0.95)
    theirs = binomtest(k, n).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert (low, high) == pytest.approx(proportion_confint(k, n, 0.05, "beta"), abs=1e-9)
    one_sided = binomtest(k, n, alternative="less").proportion_ci(0.95, "exact").high
    assert upper_bound(k, n) == pytest.approx(one_sided, abs=1e-9)


def test_the_acceptance_rule_is_the_published_one():
    "Most promotions at 5 %, and the chance of a gate of a given true rate to be certified."
    most = {100: 1, 200: 4, 400: 12, 600: 20, 1000: 38, 2000: 83}
    assert {n: most_promotions(n) for n in most} == most
    chance = [round(binom.cdf(most[400], 400, rate), 2) for rate in (0.02, 0.025, 0.03, 0.04)]
    assert chance == [0.94, 0.79, 0.58, 0.19]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(59, 3000), st.sampled_from([0.02, 0.05, 0.1]), st.sampled_from([0.9, 0.95, 0.99])
)
def test_one_promotion_more_would_be_too_many(n, rate, confidence):
    k = most_promotions(n, rate, confidence)
    assert k < 0 or upper_bound(k, n, confidence) <= rate
    assert upper_bound(k + 1, n, confidence) > rate


# Markets


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 5.0, 20.0]))
def test_bars_of_rows_in_another_order_are_bars(seed, block):
    rows = date_rows(made_panel())
    at = block_order(len(rows.sessions), block, np.random.default_rng(seed))
    made = rebuilt_bars(rows, at, rows.sessions)
    for symbol, frame in made.items():
        check_bars(frame, symbol)
        ticks = frame[["open", "high", "low", "close"]].to_numpy() / 0.05
        assert np.abs(ticks - np.rint(ticks)).max() < 1e-6
        assert (frame["volume"] > 0).all()


def lagged(returns, lag):
    "Mean autocorrelation over symbols."
    return np.mean([returns[c].autocorr(lag) for c in returns])


def test_no_link_outlives_its_block_and_none_between_symbols_is_lost():
    "Returns that repeat after 40 sessions, beside returns that all symbols share."
    rng, n = np.random.default_rng(2), 900
    noise = rng.normal(0, 0.01, (n, 8))
    for t in range(40, n):
        noise[t] += 0.8 * noise[t - 40]
    moves = noise + rng.normal(0, 0.01, n)[:, None]
    days = pd.bdate_range("2019-01-01", periods=n, tz="Asia/Kolkata", name="ts")
    panel = {}
    for k in range(8):
        close = 500 * np.exp(np.cumsum(moves[:, k]))
        first = np.r_[500, close[:-1]]
        columns = {"open": first, "high": np.maximum(first, close), "low": np.minimum(first, close)}
        panel[f"S{k}"] = pd.DataFrame(columns | {"close": close, "volume": 10_000}, index=days)
    rows = date_rows(panel)
    at = block_order(len(rows.sessions), 8, np.random.default_rng(1))
    made = rebuilt_bars(rows, at, rows.sessions)
    old, new = (
        pd.DataFrame({s: np.log(b["close"]).diff() for s, b in p.items()}) for p in (panel, made)
    )
    assert lagged(old, 40) > 0.4
    assert abs(lagged(new, 40)) < 0.08
    correlation = [frame.corr().to_numpy()[np.triu_indices(8, 1)].mean() for frame in (old, new)]
    assert correlation[0] == pytest.approx(correlation[1], abs=0.02)


def test_a_share_that_rose_tenfold_is_no_winner_in_another_order():
    panel = made_panel()
    up = np.exp(np.linspace(0, np.log(10), len(panel["SIM003"])))[:, None]
    prices = ["open", "high", "low", "close"]
    panel["SIM003"] = panel["SIM003"].assign(**(panel["SIM003"][prices] * up))
    moves = date_rows(panel).moves[..., 3].mean(axis=0)
    assert np.ptp(moves) < 1e-12


def written(folder, panel):
    "The panel as a vendor's folder of CSV files."
    for symbol, bars in panel.items():
        bars.rename_axis("timestamp").to_csv(folder / f"{symbol}.csv")
    return folder


def test_labels_of_another_time_hide_a_signal_that_is_there(tmp_path):
    "Bars with a strong signal in files; the run that sees the labels moved finds none of it."
    folder = written(tmp_path, made_panel(0.4, 8))
    span = {"start": date(2022, 1, 3), "end": date(2023, 3, 31)}
    plan = Plan(
        "shifted",
        0.0,
        8,
        **span,
        warmup_days=150,
        recipe=RECIPE,
        folder=folder,
        holdout_sessions=20,
    )
    found = [replicate(plan, seed, rank_ic_judge) for seed in range(3)]
    assert len({make_market(plan, seed).shift for seed in range(3)}) == 3
    assert max(abs(a.rank_ic_t) for a in found) < 3.3


def test_mirrored_bars_hold_no_signal_and_bars_in_long_blocks_hold_all(tmp_path, monkeypatch):
    "The same planted bars in one piece or two: mirrored at random dates, or left alone."
    folder = written(tmp_path, made_panel(0.4, 8))
    span = {"start": date(2022, 1, 3), "end": date(2023, 3, 31)}
    plan = Plan(
        "bootstrap",
        0.0,
        8,
        **span,
        warmup_days=150,
        recipe=RECIPE,
        folder=folder,
        holdout_sessions=20,
    )
    plan = replace(plan, block_sessions=500.0)
    for symbol, frame in make_market(plan, 1).held.items():
        check_bars(frame, symbol)
    assert max(abs(replicate(plan, seed, rank_ic_judge).rank_ic_t) for seed in range(3)) < 3.3
    monkeypatch.setattr(calibration, "mirrored", lambda moves, turn: moves)
    assert replicate(plan, 1, rank_ic_judge).rank_ic_t > 5


def test_real_bars_that_are_too_few_are_refused(tmp_path):
    folder = written(tmp_path, made_panel(symbols=3))
    plan = Plan("bootstrap", 0.0, 6, recipe=RECIPE, folder=folder, holdout_sessions=20)
    with pytest.raises(DataError, match="must hold 6 symbols"):
        make_market(plan, 1)


# Replications and campaigns


def test_a_planted_signal_is_found_and_nothing_is_not():
    assert replicate(TINY, 3, rank_ic_judge).promoted
    quiet = replicate(EMPTY, 3, rank_ic_judge)
    assert not quiet.promoted and quiet.reasons and quiet.realised_ic is None


def test_the_naive_gate_finds_skill_in_noise():
    plan = replace(EMPTY, symbols=12)
    found = naive_gate(make_market(plan, 4), RECIPE, 4)
    assert found["promoted"] == found["student_promoted"] == 1.0


def test_any_number_of_workers_gives_the_same_answers(tmp_path, bound):
    serial = calibrate(EMPTY, Campaign(tmp_path / "one", 3, 50), bound, rank_ic_judge)
    double = calibrate(EMPTY, Campaign(tmp_path / "two", 3, 50, workers=2), bound, rank_ic_judge)
    assert [untimed(a) for a in serial] == [untimed(a) for a in double]
    assert len({a.rank_ic for a in serial}) == 3
    assert all(a.cpu_s > 0 for a in double)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_calibration import EMPTY, Campaign, bind, calibrate, load_settings, rank_ic_judge
if __name__ == "__main__":
    bound = bind(load_settings(), rank_ic_judge)
    calibrate(EMPTY, Campaign(Path({folder!r}), 6, 70, workers={workers}), bound, rank_ic_judge)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_campaign_goes_on_where_it_was(tmp_path, bound, workers):
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), workers=workers)
    script = tmp_path / "child.py"
    script.write_text(code)
    child = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    until = time.monotonic() + 240
    while len(read_answers(folder)) < 2 and time.monotonic() < until and child.poll() is None:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    with (folder / ANSWERS).open("ab") as file:
        file.write(b'{"seed": 75, "promo')  # a line that the kill tore
    before = read_answers(folder)
    assert 2 <= len(before) < 6
    told = []
    campaign, note = Campaign(folder, 6, 70), lambda a: told.append(a.seed)
    done = calibrate(EMPTY, campaign, bound, rank_ic_judge, note)
    assert sorted(told) == [s for s in range(70, 76) if s not in before]
    assert [a for a in done if a.seed in before] == [before[s] for s in sorted(before)]
    whole = calibrate(EMPTY, Campaign(tmp_path / "whole", 6, 70), bound, rank_ic_judge)
    assert [untimed(a) for a in done] == [untimed(a) for a in whole]


def breaks(run):
    "A judge that cannot decide."
    raise DataError("a verdict must be possible", "none", run.run_id)


def test_a_market_that_broke_is_no_market_that_was_not_promoted(tmp_path, bound):
    "It is told, it keeps the certificate back, and it is tried again."
    campaign = Campaign(tmp_path / "null", 2, 80)
    broken = calibrate(EMPTY, campaign, bound, breaks)
    assert all("a verdict must be possible" in a.error for a in broken)
    append_lines(campaign.folder / ANSWERS, asdict(Replication(80)))
    assert read_campaign(campaign.folder)["missing"] == 1
    with pytest.raises(GateError, match="every market must have an answer"):
        make_certificate([campaign.folder], date(2026, 1, 1))
    mended = calibrate(EMPTY, campaign, bound, rank_ic_judge)
    assert [a.error for a in mended] == [None, None]


def answered(folder, n, promoted=0, asked=(), bound=None, plan=EMPTY):
    "A campaign of `n` markets answered by hand, after it was asked for in other sizes too."
    campaign = Campaign(folder, n)
    for k, seed in enumerate(campaign.seeds):
        append_lines(folder / ANSWERS, asdict(Replication(seed, k < promoted, rank_ic=0.001 * k)))
    for size in (*asked, n):
        calibrate(plan, replace(campaign, replications=size), bound, rank_ic_judge)
    return folder


def test_a_second_look_has_its_price(tmp_path, bound):
    once = read_campaign(answered(tmp_path / "once", 400, bound=bound))["summary"]["gate"]
    twice = answered(tmp_path / "twice", 400, asked=(200,), bound=bound)
    second = read_campaign(twice)["summary"]["gate"]
    assert (once["allowed"], second["allowed"]) == (12, most_promotions(400, 0.05, 0.975))
    assert second["allowed"] < once["allowed"] and second["at_most"] > once["at_most"]


def test_a_look_at_fewer_markets_fails_when_one_of_them_broke_alone(tmp_path, bound, monkeypatch):
    folder = answered(tmp_path / "null", 50, bound=bound)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(about | {"asked": [400, 50]}))  # and stopped at 50
    assert read_campaign(folder)["missing"] == 350
    monkeypatch.setattr(calibrate_cli, "write_report", lambda *told: None)
    order = calibrate_cli.Order(EMPTY, Campaign(folder, 50), breaks, bound, tmp_path, None)
    assert calibrate_cli._measure(order) == FINISHED
    append_lines(folder / ANSWERS, asdict(Replication(order.campaign.seeds[7], error="it broke")))
    assert calibrate_cli._measure(order) == FAILED


def test_a_folder_holds_one_campaign_of_one_gate(tmp_path, bound):
    folder = answered(tmp_path / "null", 60, bound=bound)
    other = bind(load_settings(teacher_num_leaves=5), rank_ic_judge)
    with pytest.raises(SettingsError, match="teacher_num_leaves was"):
        calibrate(EMPTY, Campaign(folder, 60), other, rank_ic_judge)
    with pytest.raises(SettingsError, match="another plan"):
        calibrate(replace(EMPTY, symbols=7), Campaign(folder, 60), bound, rank_ic_judge)
    planted = answered(tmp_path / "planted", 5, 4, bound=other, plan=TINY)
    with pytest.raises(GateError, match="of one gate"):
        make_certificate([folder, planted], date(2026, 1, 1))


def test_the_certificate_promises_what_the_worst_null_bears(tmp_path, bound):
    folders = [
        answered(tmp_path / "null", 200, 2, bound=bound),
        answered(tmp_path / "fitted", 200, 4, bound=bound, plan=replace(EMPTY, market="fitted")),
        answered(tmp_path / "planted", 60, 57, bound=bound, plan=TINY),
    ]
    made = make_certificate(folders, date(2026, 1, 1))
    assert (made["rate"], made["at_most"]) == (4 / 200, upper_bound(4, 200))
    path = tmp_path / "certificate.json"
    path.write_bytes(json_bytes(made, pretty=True))
    standing = certificate_for_current_code(load_settings(), rank_ic_judge, path=path)
    assert standing.matches and "2.00 %, at most 4.52 % with 95 % confidence" in standing.sentence
    none = tmp_path / "none.json"
    assert not certificate_for_current_code(load_settings(), rank_ic_judge, path=none).matches
    with pytest.raises(GateError, match="of 200 null markets at most 4 may be promoted"):
        make_certificate([answered(tmp_path / "bad", 200, 5, bound=bound)], date(2026, 1, 1))


# What a certificate is bound to


@pytest.fixture
def copy(tmp_path):
    "The package in another place, to be changed."
    there = tmp_path / "sensequant"
    shutil.copytree(certificate.PACKAGE, there, ignore=shutil.ignore_patterns("__pycache__"))
    return there


def changed(copy, name, text):
    "Which hashes differ after `text` was added to a file of the package."
    before = fingerprint(root=copy)
    with (copy / name).open("a") as file:
        file.write(text)
    after = fingerprint(root=copy)
    return {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}


@pytest.mark.parametrize("name", ["learn/teacher.py", "features/windows.py", "core/fanout.py"])
def test_a_change_of_the_pipeline_is_seen(copy, name):
    module = "sensequant." + name.removesuffix(".py").replace("/", ".")
    assert changed(copy, name, "\nLATER = 1\n") == {module}


@pytest.mark.parametrize("name", ["ops/cli.py", "live/sandbox.py", "__init__.py", "ops/main.py"])
def test_a_change_elsewhere_is_not(copy, name):
    assert changed(copy, name, "\nLATER = 1\n") == set()


def test_a_remark_is_no_change_and_a_table_of_facts_is_one(copy):
    assert changed(copy, "learn/teacher.py", "\n\n# Nothing of this is run.\n") == set()
    assert changed(copy, "market/facts/session_exceptions.csv", "2031-01-01,x\n") == {
        "market/session_exceptions.csv"
    }


def test_a_module_that_is_newly_imported_counts_with_all_it_imports(copy):
    found = changed(copy, "learn/predictions.py", "\ndef f():\n    from ..ops import usage\n")
    assert {"sensequant.learn.predictions", "sensequant.ops.usage"} <= found


def test_the_fingerprint_is_that_of_the_judge_too():
    own = bind(load_settings(), judged).modules
    assert {"sensequant.govern.judgement", "sensequant.backtest.gate"} <= own.keys()
    assert not {"sensequant.govern.judgement", "sensequant.backtest.gate"} & fingerprint().keys()


def replaced(copy, old, new):
    "Which hashes differ after a change of the settings."
    before, path = fingerprint(root=copy), copy / "core/settings.py"
    text = path.read_text("utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf-8")
    after = fingerprint(root=copy)
    return {k for k in before if before[k] != after[k]}


def test_settings_of_what_follows_a_verdict_are_not_bound_and_the_others_are(copy):
    assert replaced(copy, "audit_max_alerts: int", "audit_alerts: int") == set()
    assert replaced(copy, "audit_keep_days: int", "audit_hold_days: int") == set()
    assert replaced(copy, "yearly_error: float", "monthly_error: float") == {
        "sensequant.core.settings"
    }


def test_no_bound_module_reads_a_setting_that_is_not_bound():
    bases = {group.__name__: group for group in Settings.__mro__}
    names = {name for group in BESIDE for name in bases[group].model_fields}
    assert len(names) > 20
    modules = imported_modules([*PIPELINE, judged.__module__])
    for module in modules.keys() - {"sensequant.core.settings"}:
        words = set(re.findall(r"\w+", modules[module].read_text("utf-8")))
        assert not words & names, module


def test_answers_survive_their_file(tmp_path):
    answer = Replication(3, True, ("a",), 0.1, 2.0, 9, 0.05, {"accuracy": 0.6}, 1.0, 2.0)
    append_lines(tmp_path / ANSWERS, asdict(answer))
    assert read_answers(tmp_path) == {3: answer}
    assert json.loads((tmp_path / ANSWERS).read_text())["seed"] == 3
