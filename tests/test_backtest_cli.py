"""`sensequant backtest` as a person uses it, rightly and wrongly: what is refused before any work,
and what the files say that are left."""

import inspect
import json
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from sensequant.backtest.accounts import read_accounts
from sensequant.core.ledger import Ledger, ledger_path
from sensequant.core.settings import load_settings
from sensequant.core.types import IST, Interval
from sensequant.data.runs import read_inputs
from sensequant.data.sentiment import Snapshot, SnapshotStore, write_snapshots
from sensequant.learn.tables import read_recipe, write_recipe
from sensequant.market.actions import ACTION_COLUMNS
from sensequant.market.calendar import sessions
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops import judge_cli, optimize_cli
from sensequant.ops.deployment import open_search
from sensequant.ops.main import app

SPAN = ("--start", "2023-01-02", "--end", "2023-12-29")
SIMULATED = ("--source", "simulated", "--sim-symbols", "4", *SPAN)
OPTIONS = inspect.signature(judge_cli.backtest).parameters
MARKET = MarketSpec(symbols=3, start=date(2024, 1, 1), end=date(2024, 1, 31))


def backtest(*words):
    "Run `sensequant backtest` in this process."
    env = {"COLUMNS": "120", "SENSEQUANT_WORKERS": "1"}  # a process takes seconds to start
    return CliRunner().invoke(app, ["backtest", *map(str, words)], env=env)


def done(tmp_path, *words, name="out"):
    "A backtest that went well, as it was written."
    told = backtest(*words, "--output-dir", tmp_path / name)
    assert told.exit_code == 0, told.output
    return read_accounts(tmp_path / name), told.output


def minute_files(folder, interval=Interval.MINUTE_5):
    "Flat files of a simulated market inside the day."
    folder.mkdir(parents=True)
    for symbol in simulate(MARKET).symbols:
        bars = simulate(MARKET).bars(symbol, interval, MARKET.start, MARKET.end)
        bars.rename_axis("timestamp").to_csv(folder / f"{symbol}.csv")
    return folder


# -------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--strategy", "swin"), "Did you mean swing?"),
        (("--strategy", ","), "a strategy must be named"),
        (("--strategy", "intraday"), "the intraday rule needs bars inside the day; found 1day"),
        (("--strategy", "both"), "the intraday rule needs bars inside the day"),
        (("--strategy", "model"), "the model rule needs a run's predictions"),
        (("--params", "fast_session=5"), "Did you mean fast_sessions?"),
        (("--params", "rsi_bars=5"), "a parameter must be known; found rsi_bars"),
        (("--params", "fast_sessions"), "a parameter is given as name=value"),
        (("--params", "fast_sessions=1"), "fast_sessions must lie in [2, 250]; found 1"),
        (("--params", "fast_sessions=50"), "fast_sessions must be below slow_sessions"),
        (("--params", "fast_sessions=2.5"), "must be a whole number"),
        (("--params", "stop_frac=2"), "stop_frac"),
        (("--capital", "0"), "capital_inr"),
        (("--engine", "vector"), "the engine must be kernel or loop; found vector"),
        (("--interval", "2minute"), "interval"),
        (("--start", "02.01.2023"), "start"),
        (("--start", "2023-06-01", "--end", "2023-01-02"), "end must not lie before"),
        (("--symbols", "SIM001,NOSUCH"), "each symbol must be in the feed; found NOSUCH"),
        (("--run", "latest", "--source", "csv"), "a finished run brings its own bars"),
        (("--run", "latest", "--end", "2024-01-31"), "found --end; in --run"),
        (("--run", "live_candidate_20200101_000000"), "a run must have a folder"),
        (("--benchmark", "no/such.csv"), "the benchmark must be a file"),
        (("--set", "no_such=1"), "no_such"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_leaves_nothing(words, told, tmp_path):
    base = () if "--run" in words else SIMULATED
    said = backtest(*base, *words, "--output-dir", tmp_path / "out")
    assert said.exit_code == 2 and said.exception.__class__ is SystemExit, said.output
    assert told in said.output and "Traceback" not in said.output, said.output
    assert not (tmp_path / "out").exists()
    assert not ledger_path(load_settings().home).exists(), "what was not tried is no trial"


def test_files_of_somebody_else_are_never_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = backtest(*SIMULATED, "--output-dir", tmp_path)
    assert said.exit_code == 2 and "the folder must be new or empty" in said.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_symbol_without_bars_is_left_out_and_said_and_none_at_all_is_a_failure(tmp_path):
    files = minute_files(tmp_path / "files")
    (files / "EMPTY.csv").write_text("timestamp,open,high,low,close,volume\n")
    words = ("--csv-dir", files, "--interval", "5minute", "--start", "2024-01-01")
    kept, told = done(tmp_path, *words, "--end", "2024-01-31")
    assert "warning: EMPTY:" in told and kept.config["symbols"] == ["SIM001", "SIM002", "SIM003"]
    said = backtest(*words, "--end", "2024-01-31", "--symbols", "EMPTY")
    assert said.exit_code == 1 and "at least one symbol must be usable" in said.output


# ----------------------------------------------------------------------------------------- results


def test_the_files_hold_what_the_table_tells_and_the_ledger_knows_of_it(tmp_path):
    kept, told = done(tmp_path, *SIMULATED, "--params", "fast_sessions=5", "--capital", "500000")
    assert "SIMULATED" in told and "4 symbols, 2023-01-02 to 2023-12-29" in told
    daily, trades = kept.daily, kept.trades
    assert set(daily["account"]) == {"swing"} and len(trades) > 10
    earned = trades["net_inr"].sum()
    assert daily["equity_inr"].iloc[-1] == pytest.approx(500_000 + earned, abs=0.005)
    table = kept.summary["swing"]
    assert table["net_return"] == pytest.approx(earned / 500_000)
    assert table["n_trades"] == len(trades) == sum(table["exits"].values())
    assert kept.config["accounts"]["swing"]["swing"]["params"]["fast_sessions"] == 5
    assert (tmp_path / "out" / "equity.png").read_bytes().startswith(b"\x89PNG")
    again = pd.read_csv(tmp_path / "out" / "trades.csv")
    np.testing.assert_allclose(again["net_inr"], trades["net_inr"])
    with Ledger(ledger_path(load_settings().home)) as ledger:
        row = ledger.trial(1)
        np.testing.assert_array_equal(ledger.series(row)["net_return"], daily["net_return"])
    assert row.source == "backtest" and row.symbols == ("SIM001", "SIM002", "SIM003", "SIM004")


def test_the_same_question_has_the_same_answer_from_both_engines_and_from_workers(
    tmp_path, monkeypatch
):
    words = (*SIMULATED, "--strategy", "swing")
    one, _ = done(tmp_path, *words, name="one")
    two, _ = done(tmp_path, *words, "--engine", "loop", name="two")
    pd.testing.assert_frame_equal(one.trades, two.trades)
    pd.testing.assert_frame_equal(one.daily, two.daily)
    monkeypatch.setattr(judge_cli, "HEAVY_CELLS", 0)
    inside = ("--csv-dir", minute_files(tmp_path / "files"), "--interval", "5minute")
    many = (*inside, "--start", "2024-01-01", "--end", "2024-01-31", "--strategy", "swing,intraday")
    three, _ = done(tmp_path, *many, "--workers", "2", name="three")
    four, _ = done(tmp_path, *many, "--workers", "1", name="four")
    pd.testing.assert_frame_equal(three.trades, four.trades)
    assert list(three.config["accounts"]) == ["intraday", "swing"]
    assert set(three.summary) == {"swing", "intraday"}


def test_both_is_a_swing_book_and_an_intraday_book_with_half_the_money_each(tmp_path):
    inside = ("--csv-dir", minute_files(tmp_path / "files"), "--interval", "5minute")
    words = (*inside, "--start", "2024-01-01", "--end", "2024-01-31")
    quick = ("--params", "fast_sessions=3", "--params", "slow_sessions=8")
    kept, _ = done(tmp_path, *words, *quick, "--strategy", "both", "--capital", "200000")
    halves = {"max_exposure_inr": 50_000, "max_symbol_inr": 12_500, "daily_loss_inr": 2_500}
    rest = [w for k, v in halves.items() for w in ("--params", f"{k}={v}")]
    alone = (*words, *rest, "--capital", "100000")
    swing, _ = done(tmp_path, *alone, *quick, "--strategy", "swing", name="swing")
    day, _ = done(tmp_path, *alone, "--strategy", "intraday", name="day")
    own = dict(list(kept.trades.groupby("strategy")))
    for name, other in {"swing": swing, "intraday": day}.items():
        assert len(other.trades) > 2
        np.testing.assert_allclose(own[name]["net_inr"].sum(), other.trades["net_inr"].sum())
    total = swing.daily["equity_inr"] + day.daily["equity_inr"]
    np.testing.assert_allclose(kept.daily["equity_inr"], total)
    assert (day.trades["exit_ts"].dt.date == day.trades["entry_ts"].dt.date).all()
    last = day.trades["exit_ts"].dt.hour * 60 + day.trades["exit_ts"].dt.minute
    assert last.max() <= 15 * 60 + 20


def test_traces_hold_every_opinion_with_what_was_measured(tmp_path):
    from sensequant.trading.traces import read_traces

    kept, told = done(tmp_path, *SIMULATED, "--enable-telemetry")
    opinions = read_traces(tmp_path / "out" / "traces" / "swing" / "swing").traces
    trades = read_traces(tmp_path / "out" / "traces" / "swing" / "trades").traces
    assert len(trades) == len(kept.trades) and len(opinions) > len(trades)
    assert f"Traces     {len(opinions) + len(trades):,}" in told
    measured = opinions["features"].map(json.loads)
    spoke = opinions["predicted_direction"] == "LONG"
    assert spoke.any() and measured[spoke].map(lambda m: m["sma_fast"] > m["sma_slow"]).all()


def test_a_finished_run_brings_its_bars_and_predictions(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path / "home"))
    words = ("--set", f"home={finished_run.home}", "--run", finished_run.run_id)
    kept, told = done(tmp_path, *words, "--strategy", "model,swing", "--params", "entry_score=0.05")
    said = finished_run.artifacts.read_parquet("predictions.parquet")
    spoken = pd.DatetimeIndex(said["ts"]).tz_convert(IST).normalize()
    first, last = spoken.min(), spoken.max()
    days = kept.daily.index
    assert days.min() == first and (days > last).sum() == 2 * 1  # one session, two accounts
    assert set(kept.trades["account"]) == {"model", "swing"} and "SIMULATED" in told
    model = kept.trades.query("account == 'model'")
    score = said.set_index(["symbol", "ts"])["score"]
    bars = {
        s: finished_run.artifacts.read_parquet(f"bars/{s}.parquet") for s in set(said["symbol"])
    }
    for trade in model.itertuples():
        index = bars[trade.symbol].index
        decided = index[index.get_loc(trade.entry_ts) - 1]
        assert score[trade.symbol, decided] > 0.05, "bought what was not scored high the bar before"
    assert backtest(*words, "--strategy", "model", "--symbols", "TCS").exit_code == 2


def test_a_finished_run_is_traded_without_the_keys_of_its_source(copied_run):
    config = copied_run.artifacts.read_json("config.json")
    copied_run.artifacts.write_json("config.json", config | {"source": "breeze"})
    given = {"strategy": "model", "engine": "kernel", "run": copied_run.run_id}
    given |= {"set_": [f"home={copied_run.home}"]}
    opened = judge_cli.from_run(judge_cli.read_options(dict.fromkeys(OPTIONS) | given))
    assert opened.simulated and opened.source == read_inputs(copied_run).feed != ""


def test_a_pooled_run_is_traded_by_the_thresholds_of_ranks(copied_run, tmp_path):
    write_recipe(copied_run, replace(read_recipe(copied_run), scope="pooled"))
    words = ("--set", f"home={copied_run.home}", "--run", copied_run.run_id, "--strategy", "model")
    kept, _ = done(tmp_path, *words)
    assert kept.config["accounts"]["model"]["model"]["params"] == {
        "entry_score": 0.9,
        "exit_score": -0.5,
    }
    more = ("--set", "pooled_entry_score=0.2", "--params", "exit_score=-0.7")
    other, _ = done(tmp_path, *words, *more, name="other")
    assert other.config["accounts"]["model"]["model"]["params"] == {
        "entry_score": 0.2,
        "exit_score": -0.7,
    }
    assert len(other.trades) > len(kept.trades), "a lower threshold buys more often"


def test_the_thresholds_of_a_run_can_be_sought(copied_run, tmp_path):
    (tmp_path / "space.json").write_text(
        json.dumps({"parameters": {"entry_score": {"kind": "choice", "choices": [0.05, 0.2]}}})
    )
    words = ["--space", tmp_path / "space.json", "--strategy", "model", "--sampler", "grid"]
    words += ["--set", f"home={copied_run.home}", "--run", "latest"]
    words += ["--set", "search_train_sessions=20", "--set", "search_test_sessions=40"]
    words += ["--output-dir", tmp_path / "found"]
    told = CliRunner().invoke(app, ["optimize", *map(str, words)])
    assert told.exit_code == 0, told.output
    search = open_search(tmp_path / "found")
    assert search.summary["states"]["failed"] == 0 and len(search.lines) == 2
    kept = json.loads((tmp_path / "found/options.json").read_text())["options"]
    assert kept["run"] == copied_run.run_id, "another run may be the latest when it goes on"
    bought = {x["parameters"]["entry_score"]: x["metrics"]["total_trades"] for x in search.lines}
    assert bought[0.05] > bought[0.2] > 0
    assert (
        read_inputs(copied_run).holdout > pd.Timestamp(search.summary["date_range"]["end"]).date()
    )


def test_a_search_on_a_run_is_purged_by_the_horizon_of_that_run(copied_run, tmp_path):
    recipe = read_recipe(copied_run)
    label = replace(recipe.label, horizon_days=recipe.label.horizon_days + 4)
    write_recipe(copied_run, replace(recipe, label=label))
    space = tmp_path / "space.json"
    space.write_text('{"parameters": {"entry_score": {"kind": "choice", "choices": [0.1]}}}')
    sizes = ["search_train_sessions=20", "search_test_sessions=40"]
    given = dict.fromkeys(inspect.signature(optimize_cli.optimize).parameters) | {
        "space": space, "strategy": "model", "run": copied_run.run_id,
        "set_": [f"home={copied_run.home}", *sizes],
    }  # fmt: skip
    sought = optimize_cli.read_search(given)
    opened = judge_cli.from_run(sought.asked)
    made, lasts = optimize_cli.make_job(sought, opened)
    assert lasts == label.horizon_days
    days, _ = opened.market.grid.days, opened
    days = opened.market.grid.days
    days = days[days >= opened.market.start]
    embargo = sought.asked.settings.embargo_sessions
    assert made.folds[0].test_first == days[20 + label.horizon_days + embargo]


def test_another_benchmark_takes_the_place_of_the_universe(tmp_path):
    days = sessions("2022-06-01", "2023-12-29").tz_localize(None)
    level = 100 * 1.001 ** np.arange(len(days))
    prices = dict.fromkeys(("open", "high", "low", "close"), level)
    pd.DataFrame(prices | {"volume": 9}, days.rename("date")).to_csv(tmp_path / "STEADY.csv")
    kept, _ = done(tmp_path, *SIMULATED, "--benchmark", tmp_path / "STEADY.csv")
    assert kept.config["benchmark"] == "STEADY"
    known = kept.daily["benchmark_return"].dropna()
    assert len(known) > 200 and np.allclose(known, 0.001)


@pytest.mark.parametrize("mood", [-0.4, 0.9])
def test_news_forbids_new_purchases_and_makes_others_surer(tmp_path, mood):
    days = simulate(MARKET).bars("SIM001", Interval.DAY, MARKET.start, MARKET.end).index
    (tmp_path / "files").mkdir()
    level = pd.Series(100 * 1.004 ** np.arange(len(days)), days)
    prices = {"open": level, "high": level * 1.01, "low": level * 0.99, "close": level * 1.004}
    bars = pd.DataFrame(prices | {"volume": 9_000_000}).rename_axis("timestamp")
    for symbol in ("SAID", "SILENT"):
        bars.to_csv(tmp_path / "files" / f"{symbol}.csv")
    store = SnapshotStore(load_settings().home / "data" / "sentiment")
    spoken = [(day.date(), day + pd.Timedelta(hours=10)) for day in days]
    about = (mood, 0.8, 3, "csv", (), ("csv",), False)
    write_snapshots(store, [Snapshot("SAID", day, had, *about) for day, had in spoken])
    words = ("--csv-dir", tmp_path / "files", "--start", "2024-01-01", "--end", "2024-01-31")
    quick = ("--params", "fast_sessions=2", "--params", "slow_sessions=4")
    rest = ("--params", "max_hold_sessions=0", "--params", "target_frac=0")
    deaf, _ = done(tmp_path, *words, *quick, *rest, name="deaf")
    heard, _ = done(tmp_path, *words, *quick, *rest, "--set", "sentiment=true", name="heard")
    assert set(deaf.trades["symbol"]) == {"SAID", "SILENT"}
    if mood < 0:
        assert set(heard.trades["symbol"]) == {"SILENT"}
    else:
        sure = heard.trades.set_index("symbol")["confidence"]
        before = deaf.trades.set_index("symbol")["confidence"]
        assert sure["SAID"] == pytest.approx(min(1.0, 1.2 * before["SAID"]))
        assert sure["SILENT"] == before["SILENT"]


def test_an_action_of_the_holdout_moves_no_price_before_it(tmp_path):
    market = simulate(MarketSpec(symbols=1, start=date(2022, 1, 3), end=date(2023, 12, 29)))
    bars = market.bars("SIM001", Interval.DAY, date(2022, 1, 3), date(2023, 12, 29))
    bars.rename_axis("timestamp").to_csv(tmp_path / "SIM001.csv")
    asked = judge_cli.read_options(dict.fromkeys(OPTIONS) | {
        "csv_dir": tmp_path, "start": "2022-06-01", "end": "2023-12-29", "strategy": "swing",
        "engine": "kernel",
    })  # fmt: skip
    own = asked.settings.home / "data" / "corporate_actions.csv"
    own.parent.mkdir(parents=True)

    def seen(*dates, kept):
        rows = [f"SIM001,{d:%Y-%m-%d},demerger,1,-3.5,1,any,confirmed,test," for d in dates]
        own.write_text("\n".join([",".join(ACTION_COLUMNS), *rows]) + "\n")
        return judge_cli.from_feed(asked, judge_cli.Meter(), kept).market.seen["SIM001"]

    early, late = bars.index[300], bars.index[-60]
    plain, none_of_it = seen(early, kept=100), seen(early, late, kept=100)
    assert plain.index[-1] == bars.index[-101]
    pd.testing.assert_frame_equal(plain, none_of_it)
    whole = seen(early, late, kept=0)
    np.testing.assert_allclose(whole["close"].iloc[:300], plain["close"].iloc[:300] - 3.5)


@pytest.mark.parametrize("part", ["from_feed", "write_telemetry"])
def test_ctrl_c_says_what_is_left(tmp_path, monkeypatch, part):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(judge_cli, part, interrupted)
    said = backtest(*SIMULATED, "--enable-telemetry", "--output-dir", tmp_path / "out")
    written = part != "from_feed"
    assert said.exit_code == 130 and (tmp_path / "out/summary.json").exists() == written
    left = f"the accounts are in {tmp_path / 'out'}" if written else "no account was written"
    assert f"stopped; {left}" in said.output.replace("\n", "")


def test_a_split_is_traded_and_not_seen_as_a_fall(tmp_path):
    market = simulate(MarketSpec(symbols=1, start=date(2022, 1, 3), end=date(2023, 12, 29)))
    plain = market.bars("SIM001", Interval.DAY, date(2022, 1, 3), date(2023, 12, 29))
    split = plain.index[300]
    raw = plain.copy()
    raw.loc[: plain.index[299], ["open", "high", "low", "close"]] *= 10
    raw.loc[: plain.index[299], "volume"] //= 10
    for name, bars in {"raw": raw, "plain": plain}.items():
        (tmp_path / name).mkdir()
        bars.rename_axis("timestamp").to_csv(tmp_path / name / "SIM001.csv")
    home = load_settings().home
    (home / "data").mkdir(parents=True)
    columns = "symbol,ex_date,kind,price_factor,price_shift_inr,volume_factor,applies_to,status"
    columns += ",source,note"
    row = f"SIM001,{split:%Y-%m-%d},split,0.1,0,10,csv-raw-*,confirmed,test,"
    (home / "data" / "corporate_actions.csv").write_text(f"{columns}\n{row}\n")
    words = (*SPAN, "--capital", "100000000", "--params", "max_exposure_inr=0")
    more = ("--params", "max_symbol_inr=0", "--params", "max_volume_frac=1")
    made = {
        name: done(tmp_path, "--csv-dir", tmp_path / name, *words, *more, name=f"out-{name}")[0]
        for name in ("raw", "plain")
    }
    one, two = made["raw"].daily["net_return"], made["plain"].daily["net_return"]
    np.testing.assert_allclose(one, two, atol=2e-4)
    assert (made["raw"].trades["entry_ts"] == made["plain"].trades["entry_ts"]).all()
    assert abs(one).max() < 0.2
