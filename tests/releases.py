"""Small runs that can be signed, deployed and taken back: hand-made files and two real students.

Everything happens in June 2026, by the dates that are handed in: tests of market hours must not
depend on the day they run on. The runs hold no bars; what a release is made of is all there.
"""

import os
import shutil
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from sensequant.core.ledger import SERIES_COLUMNS, Ledger, Trial, ledger_path
from sensequant.core.settings import PromotionSettings, ReleaseSettings
from sensequant.core.testing import random_bars
from sensequant.core.types import IST, Interval
from sensequant.data.runs import Inputs, Run, pin_bars, pin_inputs
from sensequant.features.features import TECHNICAL, technical
from sensequant.features.labels import LabelSpec, forward_labels
from sensequant.features.windows import Window
from sensequant.govern.approvals import PrivateKey, load_private, new_key
from sensequant.govern.manifest import build_manifest, write_manifest
from sensequant.govern.promotion import Register, approve, register_path
from sensequant.learn.models import save_student
from sensequant.learn.records import record_of, write_runs
from sensequant.learn.student import fit_student
from sensequant.learn.tables import Recipe, WindowSpec, write_recipe
from sensequant.learn.teacher import PROBABILITIES, TeacherSpec

ROLES = {"Engineering Lead": "Asha Rao", "Risk Manager": "Bala Iyer"}
PASSPHRASE = "a sentence that only tests use"
SYMBOLS = ("AAA", "BBB")
GROUPS = (PromotionSettings, ReleaseSettings)
CONFIG = {n: f.default for g in GROUPS for n, f in g.model_fields.items() if n != "keys_dir"}
START = datetime(2026, 6, 1, 9, 30, tzinfo=IST)  # a Monday; the first run begins


def moment(text: str) -> datetime:
    "A moment of IST, such as 2026-06-05T16:00."
    return datetime.fromisoformat(text).replace(tzinfo=IST)


@cache
def student_file(seed: int) -> tuple[bytes, str]:
    "A student's file, and until when it has learned."
    bars = random_bars(200, seed)
    bars.index = pd.bdate_range("2025-08-01", periods=200, tz=IST, name="ts")
    rows = technical(bars).join(forward_labels(bars)).dropna()
    draws = np.random.default_rng(seed).dirichlet(np.ones(3), len(rows))
    soft = pd.DataFrame(draws, rows.index, list(PROBABILITIES))
    made = fit_student(rows, soft)
    (data,) = save_student(made, Interval.DAY).values()
    return data, made.trained_until.isoformat()


def write_student(run: Run, symbol: str, seed: int):
    "A teacher's metadata and a student's file; the record of its window."
    window = Window(symbol, date(2025, 8, 1), date(2026, 5, 7))
    data, saw = student_file(seed)
    run.artifacts.write_json(f"teacher/{window.label}/metadata.json", {"features": list(TECHNICAL)})
    made = run.artifacts.write_bytes(f"student/{window.label}/student.model", data)
    return record_of(
        "student", window, "success", saw_until=saw, artifacts={made.path: made.sha256}
    )


def write_evidence(run: Run, simulated: bool) -> None:
    "What phases 4 and 5 leave, as far as a release holds it."
    store, days = run.artifacts, pd.bdate_range("2026-01-01", periods=3, tz=IST, name="ts")
    for name in ("daily_returns", "trades", "predictions"):
        store.write_parquet(f"{name}.parquet", pd.DataFrame({"value": [1.0, 2.0, 3.0]}, index=days))
    store.write_json("stat_tests.json", {"n_sessions": 3})
    store.write_json("validation_summary.json", {"symbols": list(SYMBOLS)})
    with Ledger(ledger_path(run.home)) as ledger:
        series = pd.DataFrame(0.001, days, list(SERIES_COLUMNS))
        ledger.record_trial(Trial("run", run.run_id, "NSE", {}, SYMBOLS, series))
        head = ledger.head()
    allowed = ["staging"] if simulated else ["staging", "production"]
    about = {"passed": True, "environments": allowed, "headline": "Passed: every condition holds"}
    store.write_json("verdict.json", about | {"ledger": {"count": head.count, "hash": head.hash}})


def judged_run(home: Path, number: int = 1, simulated: bool = False) -> Run:
    "A run up to its manifest; each number begins a minute after the one before."
    begun = START + timedelta(minutes=number)
    run = Run(f"live_candidate_{begun:%Y%m%d_%H%M%S}", Path(home))
    with run.state as state:
        state.start_run(run.run_id, {}, os.getpid(), simulated)
        state.finish_run(run.run_id, "success")
    listed = dict.fromkeys(SYMBOLS)
    days = (date(2025, 8, 1), date(2026, 5, 8))
    pin_inputs(run, Inputs(*days, Interval.DAY, simulated, listed, None, feed="csv-test"))
    for symbol in SYMBOLS:
        pin_bars(run, symbol, random_bars(3))
    spec = (WindowSpec(), LabelSpec(), ("technical",), TeacherSpec())
    write_recipe(run, Recipe(*spec, scope="symbol", compare_scopes=False))
    run.artifacts.write_json("config.json", CONFIG)
    run.artifacts.write_json("search/search_space.json", {"horizon_days": [5]})
    records = [write_student(run, s, 10 * number + n) for n, s in enumerate(SYMBOLS)]
    for kind in ("teacher", "student"):
        write_runs(run, kind, [replace(r, kind=kind) for r in records])
    write_evidence(run, simulated)
    audit = {"whole": True, "risk_flags": [], "deployment_ready": True}
    write_manifest(run, build_manifest(run, {"audit": audit}))
    return run


def nominate_at(run: Run, now: datetime, simulated: bool = False) -> None:
    "Put a run forward at a moment of the past."
    sha256 = run.artifacts.sha256("manifest.yaml")
    with run.state as state:
        state.add_candidate(run.run_id, "ready-for-review", [], simulated, sha256)
    told = {"run_id": run.run_id, "by": "gate", "why": "the gate passed", "manifest_sha256": sha256}
    with Register(register_path(run.home)) as register:
        steps = [("state", told | {"to": to}) for to in ("candidate", "ready-for-review")]
        register.record(steps, now)


@dataclass(frozen=True)
class House:
    "A home with approved runs, and the keys of those who approved them."

    home: Path
    keys: dict[str, PrivateKey]  # by role

    def run(self, number: int, now: datetime = START, simulated: bool = False) -> Run:
        "A run that everybody has signed for wherever the gate allows."
        run = judged_run(self.home, number, simulated)
        nominate_at(run, now, simulated)
        for role, key in self.keys.items():
            approve(self.home, run.run_id, role, key, now=now)
        return run


def build_house(folder: Path, now: datetime = START) -> House:
    "A home without a run; keys lie beside it."
    home, own = folder / "home", folder / "keys"
    keys = {}
    for role, name in ROLES.items():
        public = new_key(name, PASSPHRASE, own, home)
        with Register(register_path(home)) as register:
            register.enrol(public, name, now)
        keys[role] = load_private(name, PASSPHRASE, own)
    return House(home, keys)


def copied(house: House, folder: Path) -> House:
    "The same house elsewhere, to be damaged."
    shutil.copytree(house.home, folder / "home", symlinks=True)
    return House(folder / "home", house.keys)
