"""Students as files that strangers may have touched, in other processes and against the clock, and
rewards that must not know the future."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from threadpoolctl import threadpool_limits

from sensequant.core.errors import DataError
from sensequant.core.testing import random_bars, sessions
from sensequant.core.types import IST, Interval
from sensequant.features.features import TECHNICAL, technical
from sensequant.features.labels import forward_labels
from sensequant.learn.models import (
    STUDENT_FILE,
    Expected,
    load_student,
    load_teacher,
    model_header,
    read_header,
    save_student,
    untrusted,
)
from sensequant.learn.rewards import paired_difference, reward_outcomes, reward_weights, rewards
from sensequant.learn.student import (
    Student,
    StudentSpec,
    dissimilarity,
    fit_student,
    make_territory,
    search_penalty,
)
from sensequant.learn.teacher import PROBABILITIES, TeacherSpec, fit_teacher, pack_teacher
from sensequant.market.simulator import MarketSpec, simulate

KINDS = ("logistic", "sgd", "lightgbm")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "As a batch trains: small sums on many threads cost more than they save."
    with threadpool_limits(1):
        yield


def taught(n=123, seed=1):
    "Rows of one window and opinions about them, without a teacher's time."
    bars = random_bars(n + 80, seed)
    rows = technical(bars).join(forward_labels(bars)).dropna().iloc[:n]
    odds = np.random.default_rng(seed).dirichlet([2, 2, 2], len(rows))
    return rows, pd.DataFrame(odds, index=rows.index, columns=list(PROBABILITIES))


ROWS, SOFT = taught()


@pytest.fixture(scope="module", params=KINDS)
def student(request) -> Student:
    return fit_student(ROWS, SOFT, StudentSpec(request.param))


def saved(student) -> bytes:
    return save_student(student, Interval.DAY)[STUDENT_FILE]


def on_record(data, **changes) -> Expected:
    "What a reader expects when these very bytes are on record."
    known = Expected(hashlib.sha256(data).hexdigest(), TECHNICAL, Interval.DAY)
    return replace(known, **changes)


def parts(data) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as box:
        return {name: box.read(name) for name in box.namelist()}


def boxed(files, compression=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as box:
        for name, data in files.items():
            box.writestr(name, data)
    return out.getvalue()


def forged(data, change=None, **files) -> bytes:
    "A student's file with parts exchanged, its header changed, and every hash set right."
    held = parts(data) | {name.replace("_", "."): content for name, content in files.items()}
    header = json.loads(held.pop("header.json"))
    header["sha256"] = {n: hashlib.sha256(d).hexdigest() for n, d in held.items()}
    if change:
        change(header)
    return boxed({"header.json": json.dumps(header).encode()} | held)


# --- the same bytes everywhere

SCRIPT = """
import hashlib
from tests.test_student import KINDS, ROWS, SOFT, StudentSpec, fit_student, saved
for kind in KINDS:
    print(hashlib.sha256(saved(fit_student(ROWS, SOFT, StudentSpec(kind)))).hexdigest())
"""


def test_another_process_writes_the_same_bytes():
    here = [saved(fit_student(ROWS, SOFT, StudentSpec(kind))) for kind in KINDS]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    env = os.environ | threads | {"PYTHONHASHSEED": "7", "PYTHONPATH": root}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(data).hexdigest() for data in here]


def test_a_student_comes_back_exactly(student):
    data = saved(student)
    copy = load_student(data, on_record(data))
    pd.testing.assert_frame_equal(copy.score(ROWS), student.score(ROWS), check_exact=True)
    assert saved(copy) == data
    same = ("features", "spec", "trained_until", "expires_at")
    assert all(getattr(copy, n) == getattr(student, n) for n in same)
    assert copy.expires_at.tz == IST


def test_a_skops_dump_as_it_comes_would_not_repeat():
    "The renumbering is needed: skops names arrays by their place in memory."
    model = fit_student(ROWS, SOFT).model
    again = pickle.loads(pickle.dumps(model))
    assert skops.io.dumps(model) != skops.io.dumps(again)


# --- files that must not be opened


def test_a_changed_byte_is_refused_before_anything_is_read(student, monkeypatch):
    data = saved(student)
    expected = on_record(data)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # opening anything would fail otherwise
    for at in (0, 100, len(data) // 2, len(data) - 1):
        broken = bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]])
        with pytest.raises(DataError, match=r"SHA-256 must be .* in a/student\.model"):
            load_student(broken, expected, "a/student.model")


def test_damage_that_is_on_record_is_refused_or_harmless(student):
    "Bytes flipped with the hash set right: an error in our words, or the very same student."
    data, rng = saved(student), np.random.default_rng(1)
    said, refused = student.score(ROWS), 0
    for at in rng.integers(0, len(data), 150):
        broken = bytes([*data[:at], data[at] ^ (1 << rng.integers(8)), *data[at + 1 :]])
        try:
            copy = load_student(broken, on_record(broken))
        except DataError:
            refused += 1
        else:
            pd.testing.assert_frame_equal(copy.score(ROWS), said, check_exact=True)
    assert refused > 140


@pytest.mark.parametrize("what", ["pickle", "cut", "empty", "text", "compressed", "skops"])
def test_what_is_no_student_is_refused_by_name(what):
    data = saved(fit_student(ROWS, SOFT))
    files = {
        "pickle": pickle.dumps({"weights": [1, 2]}),
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b'{"kind": "softmax"}',
        "compressed": boxed(parts(data), zipfile.ZIP_DEFLATED),
        "skops": parts(data)["model.skops"],
    }
    with pytest.raises(DataError, match=r"'sensequant student 1'.* in s/student\.model"):
        load_student(files[what], on_record(files[what]), "s/student.model")
    with pytest.raises(DataError, match=r"'sensequant student 1'"):
        read_header(files[what])


class Stranger(LogisticRegression):
    "A class of somebody else."


def test_a_strange_type_is_named_and_never_runs(tmp_path):
    data, mark = saved(fit_student(ROWS, SOFT)), tmp_path / "ran"
    evil = FunctionTransformer(os.system, kw_args={"command": f"touch {mark}"})
    model = Stranger().fit(ROWS[list(TECHNICAL)], ROWS["label"])
    for one, name in ((evil, "FunctionTransformer"), (model, "Stranger")):
        bad = forged(data, model_skops=skops.io.dumps(Pipeline([("step", one)])))
        with pytest.raises(DataError, match=f"not on the list: .*{name}"):
            load_student(bad, on_record(bad))
    assert any("system" in name for name in untrusted(skops.io.dumps(evil)))
    assert not mark.exists()


def test_a_type_hidden_as_plain_data_is_found():
    "Every dictionary of the tree is looked at, wherever it stands."
    files = parts(parts(saved(fit_student(ROWS, SOFT)))["model.skops"])
    schema = json.loads(files["schema.json"])
    hidden = {"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}
    schema["content"]["content"]["memory"] = hidden | {"content": {}}
    bad = boxed(files | {"schema.json": json.dumps(schema).encode()})
    assert untrusted(bad) == ["FunctionNode", "os.system"]


def test_numbers_that_do_not_fit_the_header_are_refused(student):
    data = saved(student)

    def fewer(header):
        header["features"] = header["features"][:-1]

    bad = forged(data, fewer)
    with pytest.raises(DataError, match="sensequant student 1"):
        load_student(bad, on_record(bad, features=TECHNICAL[:-1]))
    for change in (
        lambda h: h["territory"].update(mean_distance=-1.0),
        lambda h: h["territory"].update(scale=[0.0] * len(TECHNICAL)),
        lambda h: h["spec"].update(kind="sgd" if student.spec.kind != "sgd" else "logistic"),
        lambda h: h["spec"].update(depth=3),
        lambda h: h.update(trained_until="soon"),
        lambda h: h.pop("territory"),
    ):
        bad = forged(data, change)
        with pytest.raises(DataError, match="sensequant student 1"):
            load_student(bad, on_record(bad))


# --- files that were made for something else


def test_columns_bars_and_libraries_must_match(student):
    data = saved(student)
    for changes, words in (
        ({"interval": Interval.MINUTE_5}, r"interval of a model must be 5minute; found 1day"),
        ({"features": TECHNICAL[1:]}, r"will not be given .*found \['sma_20_gap_atr'\]"),
        ({"features": (*TECHNICAL, "vix")}, r"does not know .*found \['vix'\]"),
        ({"features": TECHNICAL[::-1]}, "order of columns"),
    ):
        with pytest.raises(DataError, match=words):
            load_student(data, on_record(data, **changes))
    for library in read_header(data)["libraries"]:
        bad = forged(data, lambda h, name=library: h["libraries"].update({name: "99.1"}))
        with pytest.raises(DataError, match=rf"major version of {library} .*found 99\.1"):
            load_student(bad, on_record(bad))


def test_a_minor_version_may_differ():
    data = saved(fit_student(ROWS, SOFT, StudentSpec("lightgbm")))
    bad = forged(data, lambda h: h["libraries"].update(lightgbm="4.0.0"))
    assert load_student(bad, on_record(bad)).spec.kind == "lightgbm"


def test_an_expired_student_refuses_when_read_and_when_asked():
    student = fit_student(ROWS, SOFT, StudentSpec(expiry_days=30))
    data, late = saved(student), student.expires_at + pd.Timedelta(minutes=1)
    copy = load_student(data, on_record(data, now=student.expires_at))
    old = f"{student.expires_at:%Y-%m-%d %H:%M}.*found {late:%Y-%m-%d %H:%M}"
    with pytest.raises(DataError, match=old):
        load_student(data, on_record(data, now=late))
    with pytest.raises(DataError, match=old):
        copy.score(ROWS.iloc[[-1]].set_axis(pd.DatetimeIndex([late], name="ts")))


def test_a_teacher_follows_the_same_rules():
    teacher = fit_teacher(ROWS.iloc[:60], TECHNICAL, TeacherSpec(n_estimators=3))
    later = ROWS[ROWS.index > teacher.saw_until]
    data, header = pack_teacher(teacher), model_header("teacher", TECHNICAL, Interval.DAY)
    copy = load_teacher(data, header, on_record(data))
    pd.testing.assert_frame_equal(copy.score(later), teacher.score(later), check_exact=True)
    with pytest.raises(DataError, match="SHA-256"):
        load_teacher(data[:-1], header, on_record(data))
    with pytest.raises(DataError, match="packed with zstd"):
        load_teacher(b"trees", header, on_record(b"trees"))
    with pytest.raises(DataError, match="missing header entries"):
        load_teacher(data, {"kind": "teacher"}, on_record(data))


# --- what a student may know


def test_an_answer_does_not_depend_on_the_other_rows(student):
    table = technical(random_bars(300, 3))
    whole = student.score(table)
    pd.testing.assert_frame_equal(student.score(table.iloc[:150]), whole.iloc[:150])
    one = table.iloc[[150]]
    pd.testing.assert_frame_equal(student.score(one), whole.iloc[[150]], rtol=1e-12)
    turned = student.score(table[list(TECHNICAL[::-1])].assign(note="x"))
    pd.testing.assert_frame_equal(turned, whole)


def test_holes_are_filled_from_the_training_rows_only():
    names, rows = (*TECHNICAL, "macro_rate"), ROWS.assign(macro_rate=np.arange(len(ROWS)) * 1.0)
    student = fit_student(rows, SOFT, StudentSpec(), names)
    assert student.model[0].statistics_[-1] == np.median(rows["macro_rate"])
    asked = rows.assign(macro_rate=np.nan)
    asked.iloc[0, asked.columns.get_loc("macro_rate")] = 1e9
    filled = rows.assign(macro_rate=np.median(rows["macro_rate"]))
    left, right = (student.score(t).iloc[1:] for t in (asked, filled))
    pd.testing.assert_frame_equal(left, right, check_exact=True)


def test_a_column_that_is_never_known_says_nothing(student):
    names = (*TECHNICAL, "book_depth")
    rows = ROWS.assign(book_depth=np.nan)
    wide = fit_student(rows, SOFT, StudentSpec(student.spec.kind), names)
    left, right = (s.score(r)["score"] for s, r in ((wide, rows), (student, ROWS)))
    assert abs(left - right).max() < 1e-9
    data = saved(wide)
    assert load_student(data, on_record(data, features=names)).features == names


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_labels_of_one_class_and_no_penalty_still_give_odds(share):
    rows = ROWS.assign(label="NOOP")
    for spec in (StudentSpec(k, teacher_share=share, l2=p) for k in KINDS for p in (0.0, 10.0)):
        odds = fit_student(rows, SOFT, spec).score(rows)[list(PROBABILITIES)]
        assert np.allclose(odds.sum(axis=1), 1) and (share or (odds["p_noop"] > 0.9).mean() > 0.9)


def test_the_search_is_settled_by_the_rows_given():
    first = search_penalty(ROWS, StudentSpec())
    assert first["chosen"].sum() == 1
    garbage = ROWS.assign(label_known_at=ROWS["label_known_at"])
    garbage.iloc[90:, :14] = 1e6
    short = search_penalty(garbage.iloc[:90], StudentSpec())
    pd.testing.assert_frame_equal(short, search_penalty(ROWS.iloc[:90], StudentSpec()))
    strong = first["l2"] >= first.loc[first["loss"].idxmin(), "l2"]
    assert strong[first["chosen"]].all()


def test_few_bars_of_an_ordinary_market_are_silenced():
    market, far = simulate(MarketSpec(symbols=6, start=date(2022, 1, 1))), []
    for symbol in market.symbols:
        table = technical(market.bars(symbol)).dropna()
        for k in range(0, len(table) - 240, 120):
            ground = make_territory(table.iloc[k : k + 120].to_numpy())
            far.append(dissimilarity(ground, table.iloc[k + 120 : k + 240].to_numpy()))
    share = np.mean(np.concatenate(far) > StudentSpec().max_dissimilarity)
    assert share < 0.05


def test_prices_that_missed_a_split_are_silenced():
    bars = random_bars(320)
    bars.iloc[220:, :4] /= 5
    table = technical(bars).join(forward_labels(bars)).dropna()
    past = table.loc[: bars.index[200]]
    student = fit_student(past, taught(len(past))[1].set_axis(past.index))
    said = student.score(table.loc[bars.index[220] : bars.index[224]])
    assert (said["p_noop"] == 1).all() and (said["score"] == 0).all()


def test_one_bar_takes_less_than_a_millisecond(student):
    "Of the processor: a busy machine may add waiting to it."
    one, costs = ROWS[list(TECHNICAL)].iloc[[5]], []
    for _ in range(500):
        began = time.process_time()
        student.score(one)
        costs.append(time.process_time() - began)
    assert np.median(costs) < 0.001


# --- rewards


def test_a_student_taught_with_rewards_knows_nothing_after_its_cut():
    bars = random_bars(260)
    table = technical(bars).join(forward_labels(bars)).dropna()
    past = table.iloc[:120]
    cut = past["label_known_at"].max()
    said = pd.DataFrame(
        {"score": np.random.default_rng(2).uniform(-1, 1, len(bars))}, index=bars.index
    )
    disturbed = bars.copy()
    late = bars.index > cut
    disturbed.loc[late, ["open", "high", "low", "close"]] *= 3.7
    soft = taught(120)[1].set_axis(past.index)

    def made(bars, said):
        known = rewards(said, reward_outcomes(bars), cut)
        weights = reward_weights(known.reindex(past.index))
        return saved(fit_student(past, soft, weights=weights)), known

    data, known = made(bars, said)
    assert made(disturbed, said.where(~late[:, None], 0.9))[0] == data
    assert known.loc[past.index].notna().all() and known[late].isna().all()
    assert saved(fit_student(past, soft)) != data


def test_rewards_of_several_symbols_keep_apart():
    outcomes = {s: reward_outcomes(random_bars(80, seed)) for s, seed in (("AAA", 1), ("BBB", 2))}
    stacked = pd.concat(outcomes, names=["symbol", "ts"])
    said = pd.DataFrame({"score": 0.5}, index=stacked.index)
    now = stacked["known_at"].max()
    both = rewards(said, stacked, now)
    for symbol, own in outcomes.items():
        alone = rewards(pd.DataFrame({"score": 0.5}, index=own.index), own, now)
        pd.testing.assert_series_equal(both.xs(symbol), alone)


@pytest.mark.slow
def test_the_interval_covers_what_is_true():
    "Differences that remember the day before: 95 % intervals must hold the truth about so often."
    days, rng, hits, n = sessions(250), np.random.default_rng(1), 0, 80
    for seed in range(n):
        noise = rng.normal(0, 1, 250)
        for k in range(1, 250):
            noise[k] += 0.4 * noise[k - 1]
        base = pd.Series(np.zeros(250))
        found = paired_difference(base, base + 0.1 + noise, days, block=15, seed=seed)
        hits += found["low"] <= 0.1 <= found["high"]
    assert 0.84 <= hits / n <= 0.99
