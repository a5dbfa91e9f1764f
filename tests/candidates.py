"""Candidates small enough to be made in a moment: a judged run of three files with a whole manifest,
and people with keys. Imports what workers may import too."""

import os
from pathlib import Path

from sensequant.core.settings import load_settings
from sensequant.data.runs import Run
from sensequant.govern.approvals import load_private
from sensequant.govern.manifest import (
    FIELDS,
    manifest_bytes,
    monitoring_plan,
    parse_manifest,
    release_id_of,
    rollback_plan,
)
from sensequant.govern.promotion import approve, enrol_key, nominate

PHRASE = "correct horse battery staple"
MODEL = "student/POOLED_2024-01-01_to_2024-06-28/student.model"
ROLES = {"Asha": "Engineering Lead", "Bala": "Risk Manager", "Chitra": "Business Owner"}


def manifest_of(run, gate, simulated, release_type):
    "A manifest with every field, hand-sized."
    files = {p: {"sha256": a.sha256, "size": a.size} for p, a in run.artifacts.index().items()}
    told = {name: {} for name in FIELDS}
    told |= {"release_id": release_id_of(run.run_id), "run_id": run.run_id, "files": files}
    told |= {"release_type": release_type, "simulated": simulated, "gate": gate, "ledger": None}
    told |= {"created_at": "2026-03-02T10:00:00+05:30", "audit_bundle": "audit/"}
    days = {"saw_until": "2024-07-08T15:30:00+05:30", "window_end": "2024-06-28"}
    model = {"symbol": "POOLED", "window_label": MODEL.split("/")[1], "path": MODEL}
    groups = {name: [] for name in ("configs", "notebooks", "search_space")}
    told["artifacts"] = groups | {"models": [model | days | files[MODEL]]}
    told["approvals"] = {"roles": ["Engineering Lead", "Risk Manager"]}
    told["approvals"] |= {"environments": gate["environments"]}
    told["audit"] = {"whole": True, "risk_flags": ["simulated_data"], "deployment_ready": False}
    told["events"] = {"path": "events.jsonl", "sha256": "", "size": 0}
    told["rollback_plan"] = rollback_plan(None)
    told["monitoring"] = monitoring_plan(load_settings().model_dump())
    told["data"] = {"symbols": ["SIM001"], "bars": {}, "data_age": {}}
    told["environment"] = {"python": "", "platform": "", "packages": {}}
    told["code"] = {"package": "", "commit": None, "dirty": None}
    return told


def make_run(home, number=0, simulated=True, passed=True, t=15.2, release_type="minor", kb=1):
    "A judged run that is not nominated yet, and the hash of its manifest."
    run = Run(f"live_candidate_20260302_1{number:05d}", Path(home))
    with run.state as state:
        state.start_run(run.run_id, {}, os.getpid(), simulated)
    places = ["staging"] if simulated else ["staging", "production"]
    headline = "Passed: every condition holds" if passed else "Rejected: signal"
    test = {"test": {"statistic": "rank_ic", "t": t}}
    gate = {"passed": passed, "environments": places if passed else [], "headline": headline}
    gate |= {"holdout": test, "reasons": [] if passed else ["signal: p 0.4"]}
    span = {"start": "2022-01-01", "end": "2024-06-28", "interval": "1day", "benchmark": None}
    listed = {"simulated": simulated, "listed_on": {"SIM001": None}}
    run.artifacts.write_json("inputs.json", span | listed)
    run.artifacts.write_json("verdict.json", gate)
    run.artifacts.write_bytes(MODEL, b"tree" * 256 * kb)
    data = manifest_bytes(manifest_of(run, gate, simulated, release_type))
    parse_manifest(data)
    return run, run.artifacts.write_bytes("manifest.yaml", data).sha256


def make_candidate(home, number=0, status="ready-for-review", **more):
    "A run that the gate has put forward."
    run, sha256 = make_run(home, number, passed=status != "rejected", **more)
    nominate(run, status, sha256, ["signal: p 0.4"] if status == "rejected" else [])
    return run


def people(home, keys_dir, *names):
    "People with keys that the house knows."
    for name in names:
        enrol_key(home, name, PHRASE, keys_dir)
    return [load_private(name, PHRASE, keys_dir) for name in names]


def sign_all(run, *who, environments=None):
    "Everybody signs in the role that is theirs."
    return [approve(run.home, run.run_id, ROLES[w.public.name], w, environments) for w in who]
