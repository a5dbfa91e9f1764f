"""Teachers on a simulated market: same trees everywhere, and no glance at a tested fold."""

import json
from dataclasses import replace
from datetime import date
from functools import cache

import lightgbm as lgb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import norm, spearmanr
from sklearn import metrics

from sensequant.core.errors import DataError
from sensequant.core.events import json_bytes
from sensequant.features.features import TECHNICAL, technical
from sensequant.features.labels import CLASSES, forward_labels
from sensequant.features.windows import purged_folds
from sensequant.learn import teacher as module
from sensequant.learn.teacher import (
    NOTE,
    OBJECTIVES,
    PROBABILITIES,
    TARGET,
    TeacherSpec,
    Terms,
    fit_teacher,
    most_leaves,
    out_of_fold,
    pack_teacher,
    teach,
    unpack_teacher,
)
from sensequant.market.simulator import MarketSpec, simulate

SPEC = TeacherSpec(n_estimators=30, learning_rate=0.1)
EACH = pytest.mark.parametrize("objective", OBJECTIVES)
SAID = [*PROBABILITIES, "score"]


@cache
def window(symbol=0, rows=122):
    "Half a year of a simulated share: features, labels and a target in volatilities."
    market = simulate(MarketSpec(3, date(2022, 1, 3), date(2023, 6, 30), seed=4))
    bars = market.bars(market.symbols[symbol])
    table = technical(bars).join(forward_labels(bars)).dropna().iloc[-rows:]
    aim = (table["forward_return"] / (0.02 * 5**0.5)).clip(-3, 3)
    return table.assign(**{TARGET: aim})


def panel():
    "Three shares stacked by ts, so that each moment occurs three times."
    parts = {f"S{k}": window(k, 90) for k in range(3)}
    return pd.concat(parts, names=["symbol"]).swaplevel().sort_index()


def trees(booster):
    "The trees as text, without names and the list of settings."
    text = booster.model_to_string()
    return text[text.index("Tree=0") : text.index("end of trees")]


def test_trees_do_not_depend_on_threads():
    "Few trees, as two threads wait for each other on a busy machine."
    one, two = (replace(SPEC, n_estimators=5, num_threads=n) for n in (1, 2))
    first, second = (fit_teacher(window(), TECHNICAL, spec).booster for spec in (one, two))
    assert trees(first) == trees(second)


@EACH
def test_a_window_taught_twice_is_the_same(objective):
    "Opinions, scores and model file."
    first, second = (teach(window(), TECHNICAL, replace(SPEC, objective=objective)) for _ in "ab")
    pd.testing.assert_frame_equal(first.soft, second.soft)
    assert first.validation == second.validation
    assert pack_teacher(first.teacher) == pack_teacher(second.teacher)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_leaves_that_cannot_be_filled_change_nothing(spread):
    "The bound on the leaves is never met, even with weights that upset LightGBM's row counts."
    table, spec = window().iloc[:98], replace(SPEC, n_estimators=300, learning_rate=0.01)
    weights = np.exp(np.random.default_rng(1).normal(0, spread, len(table)))
    capped = fit_teacher(table, TECHNICAL, spec, weights).booster
    full = spec.parameters()
    assert full["num_leaves"] == 127 > most_leaves(98, 20)
    target = table["label"].map({c: k for k, c in enumerate(CLASSES)}).to_numpy(float)
    data = lgb.Dataset(table[list(TECHNICAL)].to_numpy(), target, weight=weights, params=full)
    assert trees(lgb.train(full, data, 300)) == trees(capped)


@EACH
def test_out_of_fold_is_what_a_teacher_of_the_training_rows_says(objective):
    "Fold by fold, fitted by hand; in-sample opinions are other ones."
    table, spec = window(), replace(SPEC, objective=objective)
    soft = out_of_fold(table, TECHNICAL, spec)
    by_heart = fit_teacher(table, TECHNICAL, spec)
    x = table[list(TECHNICAL)].to_numpy()
    for number, (train, test) in enumerate(purged_folds(table.index, table["label_known_at"], 5)):
        teacher, mine = fit_teacher(table.iloc[train], TECHNICAL, spec), soft.iloc[test]
        raw = teacher.booster.predict(x[test])
        assert (teacher.link.probabilities(raw) == mine[list(PROBABILITIES)].to_numpy()).all()
        assert (mine["fold"] == number).all()
        assert (mine["teacher_saw_until"] == table["label_known_at"].iloc[train].max()).all()
    learned = by_heart.link.probabilities(by_heart.booster.predict(x))
    assert not np.isclose(learned[:, 0], soft["p_long"]).any()
    assert soft["teacher_saw_until"].dtype == table["label_known_at"].dtype
    assert soft.index.equals(table.index)


@EACH
@pytest.mark.parametrize("rounds", [0, 5])
def test_a_tested_fold_has_no_part_in_its_own_opinions(objective, rounds):
    "Other answers, and other features in half its rows: the rest is judged bit for bit the same."
    table, spec = window(), replace(SPEC, objective=objective, early_stopping_rounds=rounds)
    before = out_of_fold(table, TECHNICAL, spec)
    for number in range(5):
        spoiled, fold = table.copy(), np.flatnonzero(before["fold"] == number)
        spoiled.iloc[fold, spoiled.columns.get_loc("label")] = "SHORT"
        spoiled.iloc[fold, spoiled.columns.get_loc("forward_return")] = -0.5
        spoiled.iloc[fold, spoiled.columns.get_loc(TARGET)] = 1e6
        spoiled.iloc[fold[::2], : len(TECHNICAL)] *= -1e3
        after, kept = out_of_fold(spoiled, TECHNICAL, spec), fold[1::2]
        assert (after[SAID].iloc[kept] == before[SAID].iloc[kept]).all(axis=None)
        # A fold that is the newest block of another only says when to stop, and may say the same.
        newest = before["fold"].map(lambda f: 3 if f == 4 else 4)
        taught = (before["fold"] != number) & ((newest != number) | (rounds == 0))
        changed = (after["score"] != before["score"])[taught]
        assert taught.any() != (rounds and number == 4) and not changed.mean() <= 0.9


def test_early_stopping_listens_to_the_newest_training_rows():
    "It ends before the last round, keeps the best one, and other newest labels end it elsewhere."
    table = window(1)
    spec = replace(SPEC, n_estimators=400, early_stopping_rounds=20)
    stopped = fit_teacher(table, TECHNICAL, spec)
    best = stopped.booster.best_iteration
    assert 1 < best < 380
    block = len(table) // spec.folds
    begin = table.index[-block]
    old = table[table["label_known_at"] < begin]
    assert len(old) < len(table) - block
    plain = fit_teacher(old, TECHNICAL, replace(SPEC, n_estimators=best))
    assert trees(plain.booster) == trees(stopped.booster)
    again = unpack_teacher(pack_teacher(stopped))
    assert again.booster.num_trees() == 3 * best
    assert stopped.saw_until == table["label_known_at"].max()
    other = table.copy()
    other.iloc[-block:, other.columns.get_loc("label")] = "LONG"
    assert fit_teacher(other, TECHNICAL, spec).booster.best_iteration != best


def test_early_stopping_needs_older_rows():
    "All labels reach into the newest block: nothing to learn from."
    late = window().assign(label_known_at=window()["label_known_at"].max())
    with pytest.raises(DataError, match="early stopping needs rows before its newest block"):
        fit_teacher(late, TECHNICAL, replace(SPEC, early_stopping_rounds=5))


@EACH
def test_weights_count(objective):
    "Equal weights are no weights; a row of weight 0 may claim what it likes."
    table, spec = window(), replace(SPEC, objective=objective)
    weights = np.random.default_rng(2).uniform(0.2, 1, len(table))
    plain = out_of_fold(table, TECHNICAL, spec)
    weighted = out_of_fold(table, TECHNICAL, spec, Terms(weights))
    assert (plain["score"] != weighted["score"]).mean() > 0.9
    weights[10:20] = 0
    lied = table.copy()
    lied.iloc[10:20, lied.columns.get_loc("label")] = "SHORT"
    lied.iloc[10:20, lied.columns.get_loc(TARGET)] = 3.0
    honest, fooled = (fit_teacher(t, TECHNICAL, spec, weights) for t in (table, lied))
    assert trees(honest.booster) == trees(fooled.booster)
    assert honest.link.short_share == pytest.approx(fooled.link.short_share)
    assert honest.link.spread == pytest.approx(fooled.link.spread)


def test_binary_shares_what_is_not_long_as_the_training_rows_did():
    "P(LONG) is LightGBM's own; NOOP and SHORT keep their ratio."
    table, spec = window(), replace(SPEC, objective="binary")
    soft, labels = out_of_fold(table, TECHNICAL, spec), table["label"]
    for train, test in purged_folds(table.index, table["label_known_at"], 5):
        seen = labels.iloc[train]
        ratio = (seen == "SHORT").sum() / (seen != "LONG").sum()
        short, long = soft["p_short"].iloc[test], soft["p_long"].iloc[test]
        np.testing.assert_allclose(short, (1 - long) * ratio, rtol=1e-12)
    np.testing.assert_allclose(soft[list(PROBABILITIES)].sum(axis=1), 1)
    assert ((labels == "LONG").mean() - soft["p_long"].mean()) < 0.1


def test_regression_reads_its_prediction_through_an_ordered_normal_link():
    "With the spread of the training target, by scipy's normal distribution."
    table, spec = window(), replace(SPEC, objective="regression")
    soft = out_of_fold(table, TECHNICAL, spec)
    for train, test in purged_folds(table.index, table["label_known_at"], 5):
        error = norm(scale=table[TARGET].iloc[train].std(ddof=0))
        part = soft.iloc[test]
        np.testing.assert_allclose(part["p_long"], 1 - error.cdf(0.43 - part["yhat"]), rtol=1e-9)
        np.testing.assert_allclose(part["p_short"], error.cdf(-0.43 - part["yhat"]), rtol=1e-9)
    assert spearmanr(soft["yhat"], soft["score"])[0] > 0.95
    with pytest.raises(DataError, match="finite target"):
        fit_teacher(table.assign(**{TARGET: np.nan}), TECHNICAL, spec)
    with pytest.raises(DataError, match=r"no \['target'\]"):
        fit_teacher(table.drop(columns=TARGET), TECHNICAL, spec)


@EACH
def test_gaps_are_read_and_empty_columns_ignored(objective):
    "A column of nothing gains nothing; a gap moves the opinion on its row only."
    table = window().copy()
    names = (*TECHNICAL, "options_pcr", "macro_rate")
    table["options_pcr"] = np.nan
    rates = np.random.default_rng(3).normal(size=len(table))
    table["macro_rate"] = np.where(np.arange(len(table)) < 40, np.nan, rates)
    taught = teach(table, names, replace(SPEC, objective=objective))
    assert taught.soft[SAID].notna().all(axis=None)
    gain = taught.importance.set_index("feature")["gain"]
    assert gain["options_pcr"] == 0 and gain["macro_rate"] > 0
    missing = taught.statistics["missing_share"]
    assert missing["options_pcr"] == 1 and missing["macro_rate"] == 40 / 122


@EACH
def test_many_symbols_at_once(objective):
    "Rows of one moment are never on both sides, and the opinions keep the rows' own index."
    table, spec = panel(), replace(SPEC, objective=objective)
    soft = out_of_fold(table, TECHNICAL, spec)
    assert soft.index.equals(table.index) and soft[SAID].notna().all(axis=None)
    ts, known = table.index.get_level_values("ts"), table["label_known_at"]
    for train, test in purged_folds(ts, known, 5):
        assert not set(ts[train]) & set(ts[test])
        assert (soft["teacher_saw_until"].iloc[test] == known.iloc[train].max()).all()
    half = table.iloc[: len(table) // 2]
    teacher = fit_teacher(half, TECHNICAL, spec)
    with pytest.raises(DataError, match="a teacher judges rows later than"):
        teacher.score(table)
    later = table[ts > teacher.saw_until]
    assert teacher.score(later).index.equals(later.index)


@EACH
def test_a_model_file_says_the_same_after_a_journey(objective):
    "Same opinions; LightGBM alone reads it too; the names travel inside."
    table = window()
    teacher = fit_teacher(table.iloc[:80], TECHNICAL, replace(SPEC, objective=objective))
    later, packed = table[table.index > teacher.saw_until], pack_teacher(teacher)
    back = unpack_teacher(packed, TECHNICAL)
    pd.testing.assert_frame_equal(back.score(later), teacher.score(later))
    assert (back.link, back.saw_until, back.features) == (
        teacher.link,
        teacher.saw_until,
        TECHNICAL,
    )
    text = pa.input_stream(pa.BufferReader(packed), compression="zstd").read().decode()
    assert lgb.Booster(model_str=text).feature_name() == list(TECHNICAL)
    assert f"feature_names={' '.join(TECHNICAL)}\n" in text
    assert json.loads(text.rpartition(NOTE)[2])["objective"] == objective


def test_files_that_are_no_teacher_are_refused():
    "Cut short, without its note, with a strange note, or not text at all."
    packed = pack_teacher(fit_teacher(window(), TECHNICAL, SPEC))
    text = pa.input_stream(pa.BufferReader(packed), compression="zstd").read().decode()
    bare = text.rpartition(NOTE)[0]
    wrong = [bare, bare + NOTE + "{}", bare + NOTE + '{"saw_until": "2024-01-01T00:00+05:30"}', ""]
    files = [pa.compress(w.encode(), codec="zstd", asbytes=True) for w in wrong]
    for data in [*files, packed[:200], b"\x80\x04N."]:
        with pytest.raises(DataError, match="LightGBM text and its note"):
            unpack_teacher(data)
    with pytest.raises(DataError, match=r"lacks \['rsi'\]"):
        unpack_teacher(packed, (*TECHNICAL, "rsi"))


def test_scores_agree_with_scikit_learn_and_scipy():
    "Every headline and class, over all rows of all folds."
    table = window()
    taught = teach(table, TECHNICAL, SPEC)
    said, truth = taught.soft[list(PROBABILITIES)].to_numpy(), table["label"].to_numpy(str)
    scores, words = (
        taught.validation,
        np.array(CLASSES)[taught.soft[list(PROBABILITIES)].to_numpy().argmax(1)],
    )
    assert scores["n"] == len(table)
    codes = [list(CLASSES).index(t) for t in truth]
    assert scores["log_loss"] == pytest.approx(metrics.log_loss(codes, said, labels=[0, 1, 2]))
    ic = spearmanr(taught.soft["score"], table["forward_return"])[0]
    assert scores["rank_ic"] == pytest.approx(ic)
    each = metrics.precision_recall_fscore_support(words, truth, labels=CLASSES)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(truth, words, labels=CLASSES)
    assert (each[0] == recall).all()  # the two sides in the right order
    for k, c in enumerate(CLASSES):
        mine = [scores[f"{m}_{c.lower()}"] for m in ("precision", "recall", "f1")]
        assert mine == pytest.approx([precision[k], recall[k], f1[k]])
        counts = [scores[f"{c.lower()}_as_{d.lower()}"] for d in CLASSES]
        assert counts == [((truth == c) & (words == d)).sum() for d in CLASSES]
    areas = [metrics.roc_auc_score(truth == c, said[:, k]) for k, c in enumerate(CLASSES)]
    assert scores["auc"] == pytest.approx(np.mean(areas)) and scores["auc_classes"] == 3
    json_bytes({"scores": scores, "statistics": taught.statistics})


def test_nothing_in_sample_is_left_of_a_window():
    "Its teacher judged none of its own rows for what is left, and refuses to judge one now."
    table = window()
    taught = teach(table, TECHNICAL, SPEC)
    own = taught.teacher.booster.predict(table[list(TECHNICAL)].to_numpy())
    assert not np.isclose(own, taught.soft[list(PROBABILITIES)].to_numpy()).all(axis=1).any()
    with pytest.raises(DataError, match="a teacher judges rows later than"):
        taught.teacher.score(table.iloc[-1:])
    assert taught.teacher.saw_until == table["label_known_at"].max()


def test_one_class_alone_teaches_its_share():
    "No error: the trees have nothing to tell apart, and scores that need two classes are None."
    table = window().assign(label="NOOP")
    for objective in ("three_class", "binary"):
        taught = teach(table, TECHNICAL, replace(SPEC, objective=objective))
        assert taught.soft["p_noop"].min() > 0.99
        assert (taught.validation["auc"], taught.validation["auc_classes"]) == (None, 0)
        assert taught.importance["gain"].sum() == 0


def test_the_embargo_reaches_the_folds(monkeypatch):
    "As a keyword, and only when there is one."
    asked = []

    def cut(ts, known, n_folds, **more):
        asked.append(more)
        return purged_folds(ts, known, n_folds)

    monkeypatch.setattr(module, "purged_folds", cut)
    for sessions in (0, 3):
        out_of_fold(window(), TECHNICAL, SPEC, Terms(embargo_sessions=sessions))
    assert asked == [{}, {"embargo_sessions": 3}]


def test_device_parameters_reach_trees_and_bins():
    "What a device needs is used for both: coarser bins, passed like a device, change the trees."
    table = window()
    plain = fit_teacher(table, TECHNICAL, SPEC)
    coarse = fit_teacher(table, TECHNICAL, SPEC, None, {"max_bin": 4})
    assert "[max_bin: 4]" in coarse.booster.model_to_string()
    assert trees(plain.booster) != trees(coarse.booster)


def test_rows_out_of_order_and_unlabelled_rows_are_refused():
    "Each with the row it is about."
    table = window()
    with pytest.raises(DataError, match="must be sorted by ts"):
        fit_teacher(table.iloc[::-1], TECHNICAL, SPEC)
    open_ = table.copy()
    open_.iloc[3, open_.columns.get_loc("label_known_at")] = pd.NaT
    with pytest.raises(DataError, match=f"1 of 122 rows have none, first {table.index[3].date()}"):
        teach(open_, TECHNICAL, SPEC)
    with pytest.raises(DataError, match="0 rows"):
        fit_teacher(table.iloc[:0], TECHNICAL, SPEC)
