"""The manifest of a real run: what it names, that it is written once and comes out again byte for
byte, and that nothing but a manifest is read as one."""

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from datetime import datetime

import pytest
import yaml

from sensequant.core.artifacts import sha256_file
from sensequant.core.errors import DataError, GateError
from sensequant.core.ledger import Head
from sensequant.core.settings import load_settings, project_root
from sensequant.data.runs import read_inputs
from sensequant.govern.judgement import manifest_heads
from sensequant.govern.manifest import (
    FIELDS,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    build_manifest,
    code_version,
    manifest_bytes,
    model_set,
    models_missing,
    parse_manifest,
    read_manifest,
    release_id_of,
    required_roles,
    run_id_of,
    write_manifest,
)
from sensequant.learn.batch import load_window_student
from sensequant.learn.records import read_window_runs, write_runs
from sensequant.learn.tables import POOLED, read_recipe, write_recipe
from sensequant.ops.orchestrator import PHASES, claim_run, go_on, undo_rest


@pytest.fixture(scope="module")
def text(finished_run):
    return (finished_run.folder / MANIFEST).read_bytes()


@pytest.fixture(scope="module")
def small(text):
    "The manifest without its long blocks."
    raw = yaml.safe_load(text)
    named = {f["path"] for group in raw["artifacts"].values() for f in group if isinstance(f, dict)}
    raw["files"] = {p: f for p, f in raw["files"].items() if p in named}
    long = ("gate", "settings", "statistical_tests", "validation")
    return manifest_bytes(raw | {name: {} for name in long})


def without(text, *path):
    "The manifest with a field taken out."
    raw = yaml.safe_load(text)
    held = raw
    for name in path[:-1]:
        held = held[name]
    del held[path[-1]]
    return manifest_bytes(raw)


# What it names


def test_the_fields_of_the_reference_stand_in_their_order(text):
    raw = parse_manifest(text)
    assert tuple(raw) == tuple(FIELDS)
    assert raw["release_id"] == release_id_of(raw["run_id"])
    assert raw["created_at"] == "{:%Y-%m-%dT%H:%M:%S}+05:30".format(
        datetime.strptime(raw["run_id"][-15:], "%Y%m%d_%H%M%S")
    )
    plan, watch = raw["rollback_plan"], raw["monitoring"]
    assert (plan["previous_release_id"], plan["previous_manifest_sha256"]) == (None, None)
    assert plan["restore_command"].startswith("sensequant release rollback")
    assert (watch["heightened_hours"], watch["check_hours"]) == (48.0, 2.0)
    assert watch["thresholds"]["sharpe_drop"] == 0.15 and watch["windows"]["intraday_hours"] == 6.0
    assert watch["normal"]["thresholds"]["sharpe_drop"] == 0.25
    assert raw["approvals"] == {
        "roles": ["Engineering Lead", "Risk Manager"],
        "environments": ["staging"],
    }


def test_every_file_on_record_is_named(finished_run, text):
    raw, index = parse_manifest(text), finished_run.artifacts.index()
    later = {p for p in index if re.match(r"(6_|7_|manifest\.|promotion_briefing\.)", p)}
    assert raw["files"].keys() == index.keys() - later
    for path, held in raw["files"].items():
        assert held == {"sha256": index[path].sha256, "size": index[path].size}
        assert held["sha256"] == sha256_file(finished_run.folder / path)


def test_the_groups_name_configurations_and_notebooks(finished_run, text):
    groups = parse_manifest(text)["artifacts"]
    names = ["config.json", "recipe.json", "inputs.json", "coverage.json"]
    assert [c["path"] for c in groups["configs"]] == names
    templates = [n for n in groups["notebooks"] if n["kind"] == "template"]
    assert len(templates) == 7
    for held in templates:
        assert held["sha256"] == sha256_file(project_root() / held["path"])
    executed = [n["path"] for n in groups["notebooks"] if n["kind"] == "executed"]
    assert executed == [f"{phase.name}.ipynb" for phase in PHASES[:5]]


def test_the_set_is_the_newest_students_and_can_be_read(finished_run, text):
    models = model_set(finished_run)
    records = read_window_runs(finished_run, "student", "symbol")
    trained = {r.symbol for r in records if r.status == "success"}
    assert [m.symbol for m in models] == sorted(trained) and len(trained) > 1
    for model in models:
        done = [r for r in records if (r.symbol, r.status) == (model.symbol, "success")]
        assert model.window_end == max(r.end_date for r in done)
        student = load_window_student(finished_run, model.window_label)
        assert student.trained_until.isoformat() == model.saw_until
    assert parse_manifest(text)["artifacts"]["models"] == [
        {"path": m.path, "sha256": m.sha256, "size": m.size} | asdict(m) for m in models
    ]
    missing = sorted(set(read_inputs(finished_run).symbols) - trained)
    assert models_missing(finished_run, models) == missing == ["SIM010"]  # it was listed late


def test_the_newest_pooled_one_is_the_set_where_that_is_judged(copied_run):
    write_recipe(copied_run, replace(read_recipe(copied_run), scope="pooled"))
    records = [replace(r, symbol=POOLED) for r in read_window_runs(copied_run, "student")]
    write_runs(copied_run, "student", records)
    (model,) = models = model_set(copied_run)
    newest = max(r.end_date for r in records if r.status == "success")
    assert (model.symbol, model.window_end) == (POOLED, newest)
    assert models_missing(copied_run, models) == []


def test_a_symbol_without_a_student_is_named(copied_run):
    records = read_window_runs(copied_run, "student")
    first = model_set(copied_run)[0].symbol
    lost = [replace(r, status="failed") if r.symbol == first else r for r in records]
    write_runs(copied_run, "student", lost)
    assert models_missing(copied_run, model_set(copied_run)) == [first, "SIM010"]
    raw = build_manifest(copied_run, {"audit": {"whole": True}})
    assert raw["artifacts"]["models_missing"] == [first, "SIM010"]
    write_runs(copied_run, "student", [replace(r, status="failed") for r in records])
    with pytest.raises(DataError, match="at least one student of scope symbol must be trained"):
        model_set(copied_run)


def test_the_age_of_the_newest_model_is_told(finished_run, text):
    data = parse_manifest(text)["data"]
    age, holdout = data["data_age"], load_settings().holdout_sessions
    saw = sorted(m.saw_until for m in model_set(finished_run))
    assert [age["oldest_saw_until"], age["newest_saw_until"]] == [saw[0], saw[-1]]
    assert age["last_bar"] == "2024-02-29" and 60 <= age["sessions_unseen"] < 60 + holdout
    assert data["bars"].keys() == set(data["symbols"])


def test_the_gate_finds_the_head_of_the_ledger(finished_run, text):
    kept = parse_manifest(text)["ledger"]
    assert manifest_heads(finished_run.home) == [Head(kept["count"], kept["hash"])]
    assert kept == finished_run.artifacts.read_json("verdict.json")["ledger"]
    assert list(kept) == ["count", "hash"]


def test_a_major_release_needs_one_signature_more(copied_run):
    config = copied_run.artifacts.read_json("config.json") | {"release_type": "major"}
    assert required_roles(config) == ["Engineering Lead", "Risk Manager", "Business Owner"]
    copied_run.artifacts.write_json("config.json", config)
    raw = build_manifest(copied_run, {"audit": {"whole": True}})
    assert (raw["release_type"], raw["approvals"]["roles"][-1]) == ("major", "Business Owner")


def test_what_is_replaced_is_planned_for(finished_run):
    active = {"release_id": "release_20240102_091500", "manifest_sha256": "ab" * 32}
    plan = build_manifest(finished_run, {"audit": {"whole": True}}, active)["rollback_plan"]
    assert plan["previous_release_id"] == active["release_id"]
    assert plan["previous_manifest_sha256"] == active["manifest_sha256"]
    assert plan["verification_steps"][-1] == f"sensequant verify {run_id_of(active['release_id'])}"


def test_without_git_the_commit_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version() == {"package": code_version()["package"], "commit": None, "dirty": None}


def test_a_changed_clone_is_dirty(tmp_path, monkeypatch):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for name in [n for n in os.environ if n.startswith("GIT_")]:
        monkeypatch.delenv(name)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    clean = code_version(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert code_version(tmp_path) == clean | {"dirty": True}


# Written once


def test_another_manifest_is_refused_and_the_first_stays(copied_run, text):
    raw = read_manifest(copied_run)
    with pytest.raises(GateError, match=r"never changes once written.*Begin a new run"):
        write_manifest(copied_run, raw | {"simulated": False})
    assert (copied_run.folder / MANIFEST).read_bytes() == text
    assert write_manifest(copied_run, raw) == hashlib.sha256(text).hexdigest()
    assert Head(**raw["ledger"]) == manifest_heads(copied_run.home)[0]


def test_one_that_cannot_be_read_back_is_not_written(copied_run):
    raw = read_manifest(copied_run)
    for wrong in (raw | {"release_type": "tiny"}, {k: v for k, v in raw.items() if k != "gate"}):
        with pytest.raises(DataError, match="a manifest must be plain YAML as it was written"):
            write_manifest(copied_run, wrong)


def test_it_is_written_again_where_it_was_lost(copied_run, text):
    raw = read_manifest(copied_run)
    (copied_run.folder / MANIFEST).unlink()
    write_manifest(copied_run, raw)
    assert (copied_run.folder / MANIFEST).read_bytes() == text


@pytest.mark.slow
def test_phases_done_again_give_the_same_bytes(copied_run, text):
    "What a signature names survives that damaged evidence is made again."
    path = copied_run.folder / "audit/summary.md"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match="SHA-256 must be"):
        copied_run.artifacts.read_bytes("audit/summary.md")
    run = claim_run(copied_run.run_id, copied_run.home)
    assert undo_rest(run)[-1] == "5_stat_tests"
    assert go_on(run).status == "success"
    assert (run.folder / MANIFEST).read_bytes() == text


# Read with distrust


def test_a_field_that_is_missing_is_named(small):
    parse_manifest(small)
    for name in FIELDS:
        with pytest.raises(DataError, match=f"no field {name}"):
            parse_manifest(without(small, name))
    for path in (("audit", "deployment_ready"), ("ledger", "hash"), ("artifacts", "models")):
        with pytest.raises(DataError, match=f"no field {'.'.join(path)}"):
            parse_manifest(without(small, *path))


def test_a_field_of_another_type_is_named(small):
    raw = yaml.safe_load(small)
    for name, kinds in FIELDS.items():
        wrong = 1 if str in kinds or bool in kinds else "text"
        with pytest.raises(DataError, match=f"{name} is {type(wrong).__name__}"):
            parse_manifest(manifest_bytes(raw | {name: wrong}))
    counted = raw["ledger"] | {"count": True}
    with pytest.raises(DataError, match=r"ledger\.count is bool"):
        parse_manifest(manifest_bytes(raw | {"ledger": counted}))
    assert parse_manifest(manifest_bytes(raw | {"ledger": None}))["ledger"] is None


@pytest.mark.parametrize(
    ("path", "held", "why"),
    [
        ("../../etc/passwd", {}, "none below the run"),
        ("/etc/passwd", {}, "none below the run"),
        ("bars//A.parquet", {}, "none below the run"),
        ("a.json", {"sha256": "0" * 63}, "the hash or the size of a.json is none"),
        ("a.json", {"sha256": "Z" * 64}, "the hash or the size of a.json is none"),
        ("a.json", {"size": -1}, "the hash or the size of a.json is none"),
        ("a.json", {"size": "1"}, "a.json: size is str"),
    ],
)
def test_a_file_that_is_none_is_refused(small, path, held, why):
    raw = yaml.safe_load(small)
    raw["files"][path] = {"sha256": "ab" * 32, "size": 1} | held
    with pytest.raises(DataError, match=re.escape(why)):
        parse_manifest(manifest_bytes(raw))


def test_a_model_must_be_a_file_of_the_run(small):
    raw = yaml.safe_load(small)
    model = raw["artifacts"]["models"][0]
    for wrong in ({"path": "student/x/student.model"}, {"sha256": "ab" * 32}, {"size": 1}):
        raw["artifacts"]["models"] = [model | wrong]
        with pytest.raises(DataError, match="in models and not the same in files"):
            parse_manifest(manifest_bytes(raw))
    for wrong in ({"path": "../student.model"}, {"path": 7}, {"path": None}):
        raw["artifacts"]["models"] = [model | wrong]
        with pytest.raises(DataError, match="none below the run"):
            parse_manifest(manifest_bytes(raw))
    raw["artifacts"]["models"] = []
    with pytest.raises(DataError, match="no model"):
        parse_manifest(manifest_bytes(raw))
    raw["artifacts"]["models"] = ["student.model"]
    with pytest.raises(DataError, match="an entry of models is str"):
        parse_manifest(manifest_bytes(raw))


LAUGHS = b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
HOSTILE = {
    "a tag that runs a command": (b"a: !!python/object/apply:os.system ['false']\n", "the tag"),
    "a tag of one's own": (b"a: !evil 1\n", "the tag !evil in line 1"),
    "a tag of a plain type": (b"a: !!str 1\n", "the tag"),
    "anchors that grow": (LAUGHS, "an anchor in line 1"),
    "an anchor that holds itself": (b"a: &a\n  b: *a\n", "an anchor in line 1"),
    "a merge of a key": (b"a: 1\n<<: {b: 1}\nb: 2\n<<: {b: 3}\n", "the key '<<' again"),
    "a key twice": (b"simulated: true\nsimulated: false\n", "the key 'simulated' again in line 2"),
    "a key that is a list": (b"? [a, b]\n: 1\n", "a key that is no word"),
    "two documents": (b"a: 1\n---\nb: 2\n", "expected a single document"),
    "a deep nest": (b"[" * 99 + b"]" * 99, "a nest deeper than 32"),
    "a deep nest of mappings": (b"{a: " * 99 + b"}" * 99, "a nest deeper than 32"),
    "an endless nest": (b"[" * 1_000_000, "exceeded maximum nesting depth"),
    "no date": (b"a: 2024-99-99\n", "month must be in"),
    "a huge number": (b"a: 1" + b"0" * 5_000 + b"\n", "4300"),
    "no text": (b"\xff\xfe\x00a", "decode"),
    "a control character": (b"a: \x07\n", "control characters are not allowed"),
    "a list": (b"- 1\n", "a list"),
    "nothing": (b"", "a NoneType"),
    "a word": (b"release_id", "a str"),
    "an unended string": (b'a: "b', "found unexpected end of stream"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_manifest_is_refused(name):
    data, why = HOSTILE[name]
    with pytest.raises(DataError) as refused:
        parse_manifest(data, "manifest.yaml")
    assert why in str(refused.value) and "manifest.yaml" in str(refused.value)


def test_a_tag_is_refused_anywhere(text):
    "Each line in turn is given a tag that a careless loader would obey."
    lines = text.splitlines()
    for number in range(0, len(lines), 97):
        key, colon, value = lines[number].partition(b": ")
        if colon and value:
            bad = [
                *lines[:number],
                key + b": !!python/name:os.system " + value,
                *lines[number + 1 :],
            ]
            with pytest.raises(DataError, match=r"the tag .* in line"):
                parse_manifest(b"\n".join(bad) + b"\n")


def test_a_manifest_has_a_largest_size(text):
    with pytest.raises(DataError, match=r"32,000,0.. bytes, more than 32,000,000"):
        parse_manifest(text + b"#" * (MAX_MANIFEST_BYTES - len(text) + 1))


def test_a_manifest_of_another_run_is_refused(copied_run, text):
    run_id = copied_run.run_id
    other = "live_candidate_20240101_091500"
    moved = text.replace(run_id.encode(), other.encode())
    with pytest.raises(DataError, match="of run live_candidate_20240101_091500"):
        parse_manifest(moved)
    moved = moved.replace(release_id_of(run_id).encode(), release_id_of(other).encode())
    copied_run.artifacts.write_bytes(MANIFEST, moved)
    with pytest.raises(DataError, match="a manifest must name its run"):
        read_manifest(copied_run)


@pytest.mark.parametrize("word", ["latest", "live_candidate_20240101", "../x", None, 7])
def test_what_is_no_id_has_no_release(word):
    with pytest.raises(DataError, match="an id must be live_candidate_"):
        release_id_of(word)
    with pytest.raises(DataError, match="an id must be release_"):
        run_id_of(f"release_20240101_091500{word}")
