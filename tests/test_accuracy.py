"""Traces under a kill, a full disk, several processes and any content; accuracy against
scikit-learn, the engine and what chance does."""

import errno
import gzip
import json
import multiprocessing
import signal
import string
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sensequant.backtest import accuracy, charts
from sensequant.backtest.backtester import run_backtest
from sensequant.core.errors import DataError
from sensequant.core.testing import expect_fail, random_bars
from sensequant.core.types import IST
from sensequant.features.labels import CLASSES
from sensequant.trading import traces as traces_module
from sensequant.trading.grid import build_grid, make_signals
from sensequant.trading.opinions import (
    AccuracyRules,
    model_opinions,
    opinion_traces,
    signal_traces,
    trade_traces,
)
from sensequant.trading.risk import Rules
from sensequant.trading.traces import (
    TRACE_COLUMNS,
    Trace,
    TraceRules,
    TraceWriter,
    no_traces,
    read_traces,
    unpacked,
    write_traces,
)

START = datetime(2024, 1, 15, 9, 15, tzinfo=IST)


def trace_of(n: int, writer: int = 0) -> Trace:
    """A trace that says which it is."""
    about = {"n": n, "writer": writer}
    moment = START + timedelta(minutes=n)
    return Trace(moment, f"S{writer}", "swing", "LONG", "NOOP", 0.5, 100.0, 101.0, metadata=about)


def numbers_of(traces: pd.DataFrame) -> list[int]:
    """Which ones came back."""
    return unpacked(traces, "metadata")["n"].tolist() if len(traces) else []


# --- writing and reading -------------------------------------------------------------------------

NAMES = st.text(string.ascii_letters + string.digits + '&-_," ', min_size=1, max_size=9)
NAMES = NAMES.filter(lambda s: s.strip() == s and s.strip('"'))
FLOATS = st.floats(allow_nan=True, allow_infinity=False)
OBJECTS = st.dictionaries(NAMES, st.one_of(st.floats(-1e9, 1e9), st.text(max_size=9)), max_size=4)
TRACES = st.builds(
    Trace,
    st.datetimes(datetime(2001, 1, 1), datetime(2049, 1, 1)).map(lambda t: t.replace(tzinfo=IST)),
    NAMES,
    NAMES,
    st.sampled_from(CLASSES),
    st.one_of(st.none(), st.sampled_from(CLASSES)),
    st.one_of(st.just(float("nan")), st.floats(0, 1)),
    FLOATS,
    FLOATS,
    FLOATS,
    FLOATS,
    OBJECTS,
    OBJECTS,
)
RULES = st.builds(
    TraceRules,
    compress=st.booleans(),
    buffer=st.integers(1, 7),
    max_bytes=st.integers(1, 2000),
)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.lists(TRACES, max_size=12), RULES)
def test_whatever_is_written_comes_back(tmp_path_factory, written, rules):
    folder = tmp_path_factory.mktemp("traces")
    with TraceWriter(folder, rules) as writer:
        for trace in written:
            writer.write(trace)
    if not written:
        assert list(folder.iterdir()) == []
        return
    back, torn = read_traces(folder)
    order = sorted(written, key=lambda t: (t.timestamp, t.strategy, t.symbol))
    assert torn == () and len(back) == len(order)
    for row, trace in zip(back.itertuples(index=False), order, strict=True):
        for name in TRACE_COLUMNS[:10]:
            found, meant = getattr(row, name), getattr(trace, name)
            missing = meant is None or meant != meant
            assert pd.isna(found) if missing else found == meant, name
        assert json.loads(row.features) == trace.features
        assert json.loads(row.metadata) == trace.metadata
    for file in writer.files:
        data = gzip.decompress(file.read_bytes()) if rules.compress else file.read_bytes()
        lines = data.count(b"\n") - 1
        assert lines and (len(data) <= rules.max_bytes or lines == 1)
    assert {f.suffix for f in writer.files} == {".gz" if rules.compress else ".csv"}


@QUICK
@given(st.lists(TRACES, min_size=1, max_size=6), st.data())
def test_a_file_cut_at_any_byte_gives_its_whole_lines(tmp_path_factory, written, data):
    folder = tmp_path_factory.mktemp("cut")
    with TraceWriter(folder) as writer:
        for trace in written:
            writer.write(trace)
    whole = writer.files[0].read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    writer.files[0].write_bytes(whole[:at])
    back, torn = read_traces(folder)
    assert len(back) == max(0, whole[:at].count(b"\n") - 1)
    clean = at == 0 or whole[:at].endswith(b"\n")
    assert torn == (() if clean else (str(writer.files[0]),))


@QUICK
@given(st.lists(TRACES, max_size=30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_a_sample_depends_on_the_traces_alone(written, one, two, seed):
    low, high = sorted([one, two])
    kept = [t for t in written if traces_module.is_sampled(t, low, seed)]
    assert kept == [t for t in reversed(written) if traces_module.is_sampled(t, low, seed)][::-1]
    assert all(traces_module.is_sampled(t, high, seed) for t in kept)
    other = [replace(t, predicted_direction="NOOP", confidence=0.1) for t in kept]
    assert all(traces_module.is_sampled(t, low, seed) for t in other)


def test_the_same_sample_comes_from_any_split_of_the_work(tmp_path):
    rules = TraceRules(sample_frac=0.3, seed=5)
    every = [trace_of(n, writer) for n in range(300) for writer in range(2)]
    shares = {"one": [every], "two": [every[::2], every[1::2]]}
    kept = {}
    for name, parts in shares.items():
        for part in parts:
            with TraceWriter(tmp_path / name, rules) as writer:
                for trace in part:
                    writer.write(trace)
        kept[name] = read_traces(tmp_path / name).traces
    pd.testing.assert_frame_equal(kept["one"], kept["two"])
    assert 120 < len(kept["one"]) < 240


FOREVER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_accuracy import trace_of
from sensequant.trading.traces import TraceRules, TraceWriter
writer = TraceWriter(Path(sys.argv[1]), TraceRules(buffer=7, max_bytes=200_000, compress=True))
for n in range(10**9):
    writer.write(trace_of(n))
    if n % 1000 == 999:
        print(n, flush=True)
"""


def test_a_killed_writer_loses_only_what_it_held_back(tmp_path):
    command = [sys.executable, "-c", FOREVER, str(tmp_path), str(__file__).rsplit("/", 1)[0]]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    told = [int(writer.stdout.readline()) for _ in range(6)]
    writer.send_signal(signal.SIGKILL)
    told += [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
    writer.wait()
    back, _ = read_traces(tmp_path)
    numbers = numbers_of(back)
    assert numbers == list(range(len(numbers)))  # none lost between others, none twice
    assert len(numbers) > told[-1] - 7
    with TraceWriter(tmp_path) as after:  # and somebody else goes on beside it
        after.write(trace_of(len(numbers)))
    assert numbers_of(read_traces(tmp_path).traces) == list(range(len(numbers) + 1))


def write_many(folder, writer):
    """Work of one process."""
    with TraceWriter(folder, TraceRules(buffer=9, max_bytes=20_000, compress=True)) as out:
        for n in range(1500):
            out.write(trace_of(n, writer))


def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, w)) for w in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    back, torn = read_traces(tmp_path)
    assert torn == ()
    for writer in range(2):
        assert numbers_of(back[back["symbol"] == f"S{writer}"]) == list(range(1500))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"traces-{n:06d}.csv.gz" for n in range(1, len(names) + 1)]


def test_a_file_caught_between_compression_and_removal_counts_once(tmp_path):
    with TraceWriter(tmp_path) as writer:
        writer.write(trace_of(1))
    plain = writer.files[0]
    plain.with_suffix(".csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert numbers_of(read_traces(tmp_path).traces) == [1]
    plain.unlink()
    assert numbers_of(read_traces(tmp_path).traces) == [1]
    packed = plain.with_suffix(".csv.gz")
    whole = packed.read_bytes()
    for damaged in (b"\x1f\x8bno", whole[:-9], whole[:12] + bytes(8) + whole[20:]):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=f"must be readable.*{packed.name}"):
            read_traces(tmp_path)


def test_a_full_disk_tears_nothing_and_the_rest_can_follow(tmp_path, monkeypatch):
    whole, full = traces_module.write_whole, [False]

    def half(descriptor, data):
        whole(descriptor, data[: len(data) // 2] if full[0] else data)
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(traces_module, "write_whole", half)
    writer = TraceWriter(tmp_path, TraceRules(buffer=3))
    for n in range(5):
        writer.write(trace_of(n))
    full[0] = True
    with expect_fail(DataError, "the disk must have room"):
        writer.write(trace_of(5))
    back, torn = read_traces(tmp_path)
    assert (numbers_of(back), torn) == ([0, 1, 2], ())
    full[0] = False
    writer.close()
    back, torn = read_traces(tmp_path)
    assert (numbers_of(back), torn) == (list(range(6)), ())


def test_strategies_folders_and_files_are_chosen(tmp_path):
    for name in ("swing", "intraday"):
        with TraceWriter(tmp_path / name) as writer:
            writer.write(replace(trace_of(1), strategy=name))
    assert len(read_traces(tmp_path).traces) == 2
    assert read_traces(tmp_path, "swing").traces["strategy"].tolist() == ["swing"]
    both = read_traces([tmp_path / "swing", tmp_path / "intraday" / "traces-000001.csv"]).traces
    assert sorted(both["strategy"]) == ["intraday", "swing"]


# --- classes -------------------------------------------------------------------------------------

WORDS = st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(CLASSES)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(WORDS)
def test_classes_are_scored_as_scikit_learn_does(pairs):
    frame = pd.DataFrame(pairs, columns=["actual_direction", "predicted_direction"])
    table = accuracy.confusion(frame)
    words = frame["actual_direction"], frame["predicted_direction"]
    assert (table.to_numpy() == confusion_matrix(*words, labels=CLASSES)).all()
    scores = accuracy.class_scores(table)
    theirs = precision_recall_fscore_support(*words, labels=CLASSES, zero_division=np.nan)
    for name, value in zip(("precision", "recall", "f1"), theirs[:3], strict=True):
        np.testing.assert_allclose(scores[name], value, atol=1e-12, equal_nan=True)
    assert (scores["n_actual"] == theirs[3]).all()


# --- a market, and opinions on it ----------------------------------------------------------------


def said_on(seed, n=220, symbols=4, skill=1.5):
    """Predictions of somebody who knows a little of the next five sessions, and the bars."""
    rng, parts = np.random.default_rng(seed), []
    walks = {f"S{i}": random_bars(n, seed=100 * seed + i) for i in range(symbols)}
    for name, bars in walks.items():
        ahead = bars["close"].shift(-5) / bars["open"].shift(-1) - 1
        hunch = np.clip(rng.normal(0, 0.3, n) + skill * ahead.fillna(0), -0.6, 0.6)
        part = pd.DataFrame({"symbol": name, "ts": bars.index, "score": hunch})
        part["forward_return"] = ahead.to_numpy()
        part["p_long"], part["p_short"] = 0.33 + part["score"] / 2, 0.33 - part["score"] / 2
        known = bars.index.to_series().shift(-5) + pd.Timedelta(hours=15, minutes=30)
        part["label_known_at"] = known.array
        parts.append(part.assign(window_label="w", label="NOOP"))
    return pd.concat(parts, ignore_index=True), walks


def judged_on(predictions, walks):
    """The traces of predictions, and the closes of the bars."""
    closes = pd.DataFrame({s: b["close"] for s, b in walks.items()})
    return opinion_traces(model_opinions(predictions), walks), closes


def opinions_on(seed, **how):
    """Traces of somebody who knows a little of the next five sessions, and the closes."""
    return judged_on(*said_on(seed, **how))


def test_every_prediction_is_traced_and_entered_at_the_next_open():
    predictions, walks = said_on(1)
    traces, _ = judged_on(predictions, walks)
    assert len(traces) == 4 * 220 and traces["actual_direction"].isna().sum() == 4 * 5
    entered = traces.dropna(subset=["entry_price_inr"])
    assert len(entered) == 4 * 219
    for symbol, rows in entered.groupby("symbol"):
        bars = walks[symbol]
        said = pd.DatetimeIndex(unpacked(rows, "metadata")["ts"])
        after = bars.index.get_indexer(said) + 1
        assert (rows["entry_price_inr"].to_numpy() == bars["open"].to_numpy()[after]).all()
        opened = bars.index[after] + pd.Timedelta(hours=9, minutes=15)
        assert (pd.DatetimeIndex(rows["timestamp"]) == opened).all()
        earned = predictions[predictions["symbol"] == symbol].set_index("ts")["forward_return"]
        moved = rows["exit_price_inr"].to_numpy() / rows["entry_price_inr"].to_numpy() - 1
        np.testing.assert_allclose(moved, earned.loc[said], atol=1e-12)


def test_bars_that_come_later_change_no_trace_and_no_day_before_them():
    predictions, walks = said_on(1)
    cut = walks["S0"].index[120]
    other = {s: b * np.where(b.index < cut, 1, 3)[:, None] for s, b in walks.items()}
    (one, closes), (two, changed) = (judged_on(predictions, bars) for bars in (walks, other))
    before = one["timestamp"] < cut
    pd.testing.assert_frame_equal(one[before], two[before])
    late = [t.loc[~before, "entry_price_inr"].dropna() for t in (one, two)]
    assert (3 * late[0] == late[1]).all() and len(late[0]) > 300, "the later bars did change"
    days, others = accuracy.opinion_days(one, closes), accuracy.opinion_days(two, changed)
    pd.testing.assert_series_equal(days[days.index < cut], others[others.index < cut])
    assert days[cut] != others[cut], "the day of the change did"
    shuffled = one.sample(frac=1, random_state=1)
    pd.testing.assert_series_equal(accuracy.opinion_days(shuffled, closes), days)


@pytest.mark.parametrize("seed", range(4))
def test_the_days_of_opinions_add_up_to_the_opinions(seed):
    "Each LONG alone compounds to its return; SHORT is the mirror image, session by session."
    traces, closes = opinions_on(seed, n=60, symbols=2)
    rows = accuracy.directional(traces)
    for _, row in rows.sample(12, random_state=seed).iterrows():
        alone = accuracy.opinion_days(row.to_frame().T.astype(traces.dtypes.to_dict()), closes)
        if row["predicted_direction"] == "LONG":
            assert (1 + alone).prod() - 1 == pytest.approx(row["realised_return"], abs=1e-12)
        else:  # short of the same shares every day: the mirror image of each session
            long = row.copy()
            long["predicted_direction"], long["realised_return"] = "LONG", -row["realised_return"]
            mirror = accuracy.opinion_days(
                long.to_frame().T.astype(traces.dtypes.to_dict()), closes
            )
            np.testing.assert_allclose(alone, -mirror, atol=1e-12)


def test_turning_every_word_around_mirrors_every_figure():
    traces, closes = opinions_on(3)
    mirror = {"LONG": "SHORT", "SHORT": "LONG", "NOOP": "NOOP"}
    turned = traces.assign(realised_return=-traces["realised_return"])
    turned["predicted_direction"] = (
        traces["predicted_direction"].map(mirror).astype(traces["predicted_direction"].dtype)
    )
    one, other = accuracy.measure(traces), accuracy.measure(turned)
    assert one["hit_ratio"] == pytest.approx(1 - other["hit_ratio"])
    assert one["average_return"] == pytest.approx(-other["average_return"])
    assert one["profit_factor"] == pytest.approx(1 / other["profit_factor"])
    days = [accuracy.opinion_days(t, closes) for t in (traces, turned)]
    np.testing.assert_allclose(days[0], -days[1], atol=1e-12)


@pytest.mark.parametrize("held", ["nothing", "only NOOP", "nothing known"])
def test_a_report_can_be_made_of_traces_that_say_little(held):
    traces, closes = opinions_on(5)
    if held == "only NOOP":
        traces = traces.assign(predicted_direction="NOOP")
    elif held == "nothing known":
        traces = traces[traces["actual_direction"].isna()]
    else:
        traces = no_traces()
    days = accuracy.opinion_days(traces, closes)
    found, losses = accuracy.measure(traces, days), accuracy.degradation(traces, days)
    assert found["n_directional"] == 0 == len(days) and np.isnan(found["hit_ratio"])
    assert (accuracy.losses_table(losses)["worse"] == "too few").all()
    assert accuracy.figures_table({"one": found}).loc["win rate: made money (%)", "one"] == "n/a"
    for by in accuracy.GROUPS:
        table = accuracy.groups_table(accuracy.measure_by(traces, by))
        assert (table["n"] == "0").all() and bool(len(table)) == bool(len(traces))
    pair = accuracy.compare_strategies({"model": days, "rival": days})
    told = accuracy.accuracy_verdict({"model": found, "rival": found}, pair, losses)
    assert "n/a% right" in told or "had n/a%" in told
    charts.confusion_matrix(accuracy.confusion(traces))
    charts.return_distribution(accuracy.directional(traces)["realised_return"])
    charts.rolling_chart(accuracy.rolling_accuracy(traces), 100, found["directional_precision"])
    sure = traces["confidence"], traces["actual_direction"] == "LONG"
    charts.calibration_curve(accuracy.calibration_table(*sure))


# --- getting worse, or chance --------------------------------------------------------------------


def test_where_nothing_changed_the_losses_spread_as_their_errors_say():
    "Thirty markets: the losses, in their standard errors, have mean 0 and spread 1; few alert."
    found = []
    for seed in range(30):
        traces, closes = opinions_on(seed)
        table = accuracy.degradation(traces, accuracy.opinion_days(traces, closes))
        found.append([*(table["drop"] / table["standard_error"]), table["alert"].sum()])
    z = np.array(found)
    assert (abs(z[:, :3].mean(axis=0)) < 0.65).all()  # 3.6 standard errors of a mean of 30
    assert (z[:, :3].std(axis=0) > 0.6).all() and (z[:, :3].std(axis=0) < 1.5).all()
    assert z[:, 3].sum() <= 12  # of 90; 2 are expected, 12 have a chance below one in a million


def test_a_crowd_that_moves_as_one_raises_no_alarm_and_a_lost_gift_does():
    traces, closes = opinions_on(7, n=500, symbols=1, skill=6.0)
    crowd = pd.concat([traces.assign(symbol=f"C{i}") for i in range(40)])
    crowd = crowd.sort_values(["timestamp", "symbol"], ignore_index=True)
    alone, many = (accuracy.degradation(t)["standard_error"]["precision"] for t in (traces, crowd))
    assert many > 0.3 > 3 * alone  # a hundred copies of three days are three days
    late = traces.index[-200:]
    lost = traces.copy()
    lost.loc[late, "realised_return"] = -lost.loc[late, "realised_return"]
    mirror = {"LONG": "SHORT", "SHORT": "LONG", "NOOP": "NOOP"}
    lost.loc[late, "predicted_direction"] = lost.loc[late, "predicted_direction"].map(mirror)
    table = accuracy.degradation(lost, accuracy.opinion_days(lost, closes))
    assert table["alert"].all(), table


def test_a_large_loss_among_few_is_no_alert_and_a_sure_small_one_neither():
    traces, _ = opinions_on(2)
    rows = accuracy.directional(traces)
    wide = AccuracyRules(window=10, standard_errors=1e9)
    assert not accuracy.degradation(rows, None, wide)["alert"].any()
    lax = AccuracyRules(window=200, precision_drop=1.0, win_rate_drop=1.0, standard_errors=0.0)
    assert not accuracy.degradation(rows, None, lax)["alert"].any()


def test_strategies_without_a_difference_are_seldom_told_apart():
    "Five-day opinions share days; the test knows, and rejects about as often as it says."
    rng, rejected = np.random.default_rng(5), 0
    index = pd.bdate_range("2022-01-03", periods=400, tz=IST)
    for _ in range(120):
        noise = rng.normal(0, 0.01, (404, 2))
        smooth = np.array([noise[k : k + 5].mean(axis=0) for k in range(400)])
        days = {n: pd.Series(smooth[:, i], index) for i, n in enumerate("ab")}
        rejected += accuracy.compare_strategies(days, horizon=5)["p"][0] < 0.05
    assert rejected <= 19  # of 120; 6 at the nominal rate, about 10 with Bartlett's weights


# --- the engine's trades -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traded():
    "A rule on three walks, its account and its opinions."
    bars = {f"S{i}": random_bars(200, seed=i) for i in range(3)}
    grid = build_grid({s: b.assign(volume=10**7) for s, b in bars.items()})
    rng = np.random.default_rng(2)
    want = np.repeat(rng.integers(0, 2, (40, 3)), 5, axis=0)
    signals = make_signals(grid, want, 0.7, "swing")
    return grid, signals, run_backtest(grid, signals, Rules(capital_inr=3_000_000))


def test_opinions_begin_and_end_when_the_account_trades_them(traded):
    grid, signals, result = traded
    opinions = signal_traces(grid, signals)
    long = opinions[opinions["predicted_direction"] == "LONG"].dropna(subset=["exit_price_inr"])
    trades = trade_traces(result.trades)
    keys = ["timestamp", "symbol"]
    joined = long.merge(trades, on=keys, suffixes=("", "_trade"))
    assert len(joined) == len(long) == len(trades) > 25
    ended = joined["timestamp"] + pd.to_timedelta(joined["holding_minutes"], unit="min")
    left = joined["timestamp"] + pd.to_timedelta(joined["holding_minutes_trade"], unit="min")
    assert (ended.dt.normalize() == left.dt.normalize()).all()
    assert (joined["actual_direction"] == joined["actual_direction_trade"]).mean() > 0.98
    assert (joined["realised_return_trade"] < joined["realised_return"]).all()  # costs
    assert set(unpacked(trades, "metadata")["reason"]) <= {"signal_flat", "backtest_end"}


def test_traces_of_trades_survive_their_files(traded, tmp_path):
    trades = trade_traces(traded[2].trades)
    write_traces(trades, tmp_path)
    back = read_traces(tmp_path).traces
    keys = ["timestamp", "strategy", "symbol"]
    expected = trades.sort_values(keys, kind="stable", ignore_index=True)
    pd.testing.assert_frame_equal(back, expected, check_dtype=False, check_exact=True)


# --- a finished run ------------------------------------------------------------------------------


def test_a_run_is_judged_as_its_own_validation_judged_it(finished_run):
    "With the threshold of the labels, the traces give the accuracy that phase 4 wrote down."
    summary = finished_run.artifacts.read_json("validation_summary.json")["overall"]
    threshold = finished_run.artifacts.read_json("config.json")["label_threshold_frac"]
    judged = accuracy.run_traces(finished_run, AccuracyRules(swing_frac=threshold))
    found = accuracy.measure(judged.model)
    assert found["n_traces"] == summary["n"] == len(judged.baseline)
    assert found["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-12)
    for name in ("precision", "recall"):
        for word in CLASSES:
            ours = found[name][word]
            assert (0.0 if np.isnan(ours) else ours) == pytest.approx(
                summary[f"{name}_{word.lower()}"], abs=1e-12
            )
