"""The promotion checklist: three criteria at their edges, one that is enough or none, never against
the gate; and both files say the same."""

import json
from datetime import datetime

import numpy as np
import pandas as pd
import pytest

from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.govern.checklist import (
    CRITERIA,
    Batch,
    checklist_files,
    criteria,
    promotion_checklist,
    recommend,
    symbol_rows,
)
from sensequant.govern.figures import unit_traces

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=IST)
EDGE = {"precision_long": 0.02, "hit_ratio": 0.02, "sharpe_ratio": 0.05}


def book(name="the SMA cross", **figures):
    "Figures of a book, as `figures` gives them."
    values = dict.fromkeys(CRITERIA, 0.5) | figures
    span = {"first_session": "2024-01-01", "last_session": "2024-12-31"}
    return {"name": name, **span, **values, "observations": dict.fromkeys(CRITERIA, 300)}


def batch(candidate, baseline, **more):
    model = {"path": "student/POOLED/student.model", "sha256": "0" * 64, "symbol": "POOLED"}
    ids = ("live_candidate_20260102_030405", "release_20260102_030405")
    return Batch(*ids, [model], ["AAA", "BBB"], candidate, baseline, **more)


def verdicts(candidate, baseline, **settings):
    rows = criteria(candidate, baseline, load_settings(**settings))
    return {c["criterion"]: c["passed"] for c in rows}


@pytest.mark.parametrize("name", list(EDGE))
def test_an_uplift_of_exactly_what_is_asked_for_is_enough(name):
    exact = verdicts(book(**{name: 0.5 + EDGE[name]}), book())
    short = verdicts(book(**{name: 0.5 + EDGE[name] - 1e-6}), book())
    assert (exact[name], short[name]) == (True, False)


@pytest.mark.parametrize("name", list(EDGE))
@pytest.mark.parametrize("missing", ["candidate", "baseline"])
def test_what_cannot_be_measured_is_not_met(name, missing):
    whole, lacking = book(**{name: 0.9}), book(**{name: None})
    pair = (lacking, book()) if missing == "candidate" else (whole, lacking)
    assert verdicts(*pair)[name] is False
    row = next(c for c in criteria(*pair, load_settings()) if c["criterion"] == name)
    assert row["uplift"] is None


def test_the_thresholds_come_from_the_settings():
    better = book(hit_ratio=0.55)
    assert verdicts(better, book(), promotion_min_hit_ratio_uplift=0.05)["hit_ratio"]
    assert not verdicts(better, book(), promotion_min_hit_ratio_uplift=0.06)["hit_ratio"]


def test_all_or_one_but_never_against_the_gate():
    all_met = criteria(book(**dict.fromkeys(CRITERIA, 0.9)), book(), load_settings())
    one_met = criteria(book(hit_ratio=0.9), book(), load_settings())
    none_met = criteria(book(), book(), load_settings())
    for require_all, expected in ((True, "PRR"), (False, "PPR")):
        found = [recommend(m, [], require_all)[0][0] for m in (all_met, one_met, none_met)]
        assert "".join(found) == expected
        for met in (all_met, one_met, none_met):
            word, reason = recommend(met, ["no alpha; found p = 0.4", "no hold-out"], require_all)
            assert word == "REJECT"
            assert reason == "The gate did not pass: no alpha; found p = 0.4 and 1 more"


def test_both_files_say_the_same():
    settings = load_settings(promotion_require_all_criteria=False)
    files = checklist_files(batch(book("new", hit_ratio=0.61), book()), settings, NOW)
    sheet = json.loads(files["promotion_checklist.json"])
    page = files["promotion_checklist.md"].decode()
    assert page.startswith(f"# {sheet['recommendation']}: {sheet['reason']}\n")
    for name, (_, title) in CRITERIA.items():
        new, old = sheet["candidate_metrics"][name], sheet["baseline_metrics"][name]
        assert f"| {title} | {new:.3f} | {old:.3f} | {new - old:+.3f} |" in page
    for line in (*sheet["pre_deployment"], *sheet["sign_offs"], *sheet["rollback"]):
        assert line in page
    assert (sheet["require_all_criteria"], sheet["timestamp"]) == (False, NOW.isoformat())
    assert sheet["validation_results"]["any_criterion_passes"]
    assert not sheet["validation_results"]["all_criteria_pass"]


def test_the_fields_of_the_reference_are_there():
    sheet = promotion_checklist(batch(book("new"), book()), load_settings(), NOW)
    assert set(sheet["deltas"]) == {"precision_uplift", "hit_ratio_uplift", "sharpe_uplift"}
    assert sheet["validation_thresholds"] == {
        "min_precision_uplift": 0.02,
        "min_hit_ratio_uplift": 0.02,
        "min_sharpe_uplift": 0.05,
    }
    held = {"precision_pass", "hit_ratio_pass", "sharpe_pass", "all_criteria_pass"}
    assert held <= set(sheet["validation_results"])
    period = sheet["validation_period"]
    assert (period["first"], period["symbols"]) == ("2024-01-01", ["AAA", "BBB"])
    assert sheet["candidate_model"]["models"][0]["sha256"] == "0" * 64


def opinions(symbol, right, said="LONG", n=20):
    "Opinions of which the first few were right."
    days = pd.bdate_range("2024-01-01", periods=n, tz=IST, name="ts")
    rows = pd.DataFrame({"symbol": symbol, "ts": days, "direction": said, "confidence": 0.5})
    rows["forward_return"] = np.where(np.arange(n) < right, 0.02, -0.02)
    return rows.assign(label_known_at=days + pd.Timedelta(days=1))


def test_symbols_by_hand():
    mine = unit_traces(pd.concat([opinions("AAA", 15), opinions("BBB", 5)]))
    its = unit_traces(pd.concat([opinions("AAA", 10), opinions("BBB", 5), opinions("CCC", 9)]))
    rows = {r["symbol"]: r["criteria"] for r in symbol_rows(mine, its, load_settings())}
    assert list(rows) == ["AAA", "BBB"]
    long, hit = rows["AAA"]
    assert (long["candidate"], long["baseline"], hit["uplift"]) == (0.75, 0.5, 0.25)
    assert (long["passed"], rows["BBB"][1]["passed"], long["observations"]) == (
        True,
        False,
        [20, 20],
    )
    quiet = symbol_rows(unit_traces(opinions("AAA", 15, "NOOP")), its, load_settings())
    assert [c["candidate"] for c in quiet[0]["criteria"]] == [None, None]


def test_a_long_list_of_symbols_is_cut_on_the_page_alone():
    names = [f"S{k:02d}" for k in range(30)]
    mine = unit_traces(pd.concat([opinions(s, k % 20) for k, s in enumerate(names)]))
    its = unit_traces(pd.concat([opinions(s, 10) for s in names]))
    rows = symbol_rows(mine, its, load_settings())
    files = checklist_files(batch(book("new"), book(), by_symbol=rows), load_settings(), NOW)
    sheet = json.loads(files["promotion_checklist.json"])
    assert [r["symbol"] for r in sheet["by_symbol"]] == names
    page = files["promotion_checklist.md"].decode()
    assert sum(f"| {s} |" in page for s in names) == 12
