"""What a new user of `sensequant data` gets wrong or is not told: false bars, silent ranges, rows
decided by the way, plans of thousands of requests."""

import json
from dataclasses import replace
from datetime import date

import pandas as pd
import pytest
from typer.testing import CliRunner

from sensequant.core.settings import load_settings
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore, no_bars
from sensequant.data.coverage import Span
from sensequant.data.csv_bars import export_tree, import_tree
from sensequant.data.feeds import CsvFeed
from sensequant.data.ingest import Filled, Notice, ingest, too_many_rejected
from sensequant.live.sandbox import Sandbox, SandboxSpec
from sensequant.market.actions import read_actions, save_actions
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops.data_cli import held_spans, open_store, spell_notices
from sensequant.ops.main import app

MARKET = MarketSpec(symbols=3, start=date(2024, 1, 1), end=date(2024, 3, 28))
SPAN = (MARKET.start, MARKET.end)
DAY, FIVE = Interval.DAY, Interval.MINUTE_5


def data(*words):
    "Run `sensequant data` in this process."
    return CliRunner().invoke(app, ["data", *map(str, words)], env={"COLUMNS": "200"})


def store():
    "The bar store of this test's home."
    return open_store(load_settings())


def market_files(folder, interval, symbols=("SIM001", "SIM002"), span=SPAN):
    "Flat files of the simulated market."
    folder.mkdir(parents=True, exist_ok=True)
    for symbol in symbols:
        bars = simulate(MARKET).bars(symbol, interval, *span)
        bars.rename_axis("timestamp").to_csv(folder / f"{symbol}.csv")
    return folder


def hold(source, interval, symbols=("SIM001", "SIM002"), span=SPAN):
    "Put the simulated market into the store under another name."
    for symbol in symbols:
        bars = simulate(MARKET).bars(symbol, interval, *span)
        store().write(source, symbol, interval, bars, *span, origin="test")


# ---------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("interval", [FIVE, Interval.MINUTE_15, Interval.MINUTE_30])
def test_shorter_bars_are_never_taken_for_days(tmp_path, interval):
    files = market_files(tmp_path / "files", interval, span=(MARKET.start, date(2024, 1, 31)))
    told = data("import", files)
    assert told.exit_code == 1, told.output
    assert f"these look like {interval} bars: --interval {interval}" in told.output
    assert "nothing was stored" in told.output and store().sources() == []
    assert not store().root.exists(), "no empty folder is left behind"
    right = data("import", files, "--interval", interval)
    assert right.exit_code == 0, right.output
    assert store().symbols(CsvFeed(files).name, interval) == ["SIM001", "SIM002"]


def test_days_taken_for_five_minutes_are_refused_in_plain_words(tmp_path):
    files = market_files(tmp_path / "files", DAY)
    told = data("import", files, "--interval", "5minute")
    assert told.exit_code == 1 and "these look like 1day bars: --interval 1day" in told.output
    assert not store().root.exists()


@pytest.mark.parametrize("how", ["zone", "shift"])
def test_the_right_interval_is_never_suggested_instead_of_itself(tmp_path, how):
    files = tmp_path / "files"
    files.mkdir()
    bars = simulate(MARKET).bars("SIM001", FIVE, MARKET.start, date(2024, 1, 5))
    utc = bars.index.tz_convert("UTC").tz_localize(None)
    wrong = utc if how == "zone" else bars.index + pd.Timedelta(minutes=2)
    bars.set_axis(wrong).rename_axis("timestamp").to_csv(files / "SIM001.csv")
    told = data("import", files, "--interval", "5minute")
    assert told.exit_code == 1 and "rows may be rejected" in told.output
    assert "these look like" not in told.output


def test_a_bad_symbol_stops_no_good_one_and_the_limit_can_be_set(tmp_path):
    files = market_files(tmp_path / "files", DAY)
    lines = (files / "SIM002.csv").read_text().splitlines()
    lines[3:6] = [line.rsplit(",", 1)[0] + ",many" for line in lines[3:6]]
    (files / "SIM002.csv").write_text("\n".join(lines))
    told = data("import", files, "--source", "csv-own")
    assert told.exit_code == 1 and "failed: SIM002: at most 1.0% of the rows" in told.output
    assert store().symbols("csv-own", DAY) == ["SIM001"]
    assert store().quarantined("csv-own").empty
    more = data("import", files, "--source", "csv-own", "--set", "max_rejected_frac=0.2")
    assert more.exit_code == 0 and "3 more in quarantine" in more.output


def test_rows_without_a_trade_condemn_no_symbol(tmp_path):
    files = market_files(tmp_path / "files", DAY, ["SIM001"])
    lines = (files / "SIM001.csv").read_text().splitlines()
    lines[3:9] = [line.split(",")[0] + ",100,100,100,100,0" for line in lines[3:9]]
    (files / "SIM001.csv").write_text("\n".join(lines))
    told = data("import", files)
    assert told.exit_code == 0 and "6 more in quarantine" in told.output


def test_a_second_copy_of_daily_rows_is_not_called_another_interval(tmp_path):
    files = market_files(tmp_path / "files", DAY, ["SIM001"])
    lines = (files / "SIM001.csv").read_text().splitlines()
    (files / "SIM001.csv").write_text("\n".join(lines + lines[1:]))
    told = data("import", files)
    assert told.exit_code == 1 and "these look like" not in told.output


def test_a_tree_without_the_interval_or_without_files_says_so(tmp_path):
    hold("vendor", FIVE, ["SIM001"])
    export_tree(store(), "vendor", tmp_path / "tree", FIVE)
    told = data("import", tmp_path / "tree", "--source", "csv-new")
    assert told.exit_code == 1 and "Take them with --interval 5minute" in told.output
    (tmp_path / "empty").mkdir()
    none = data("import", tmp_path / "empty", "--source", "csv-new")
    assert none.exit_code == 2 and "the folder must hold SYMBOL.csv" in none.output
    assert not (store().root / "csv-new").exists()
    unknown = data("import", tmp_path / "tree", "--interval", "5min")
    assert unknown.exit_code == 2 and "5minute" in unknown.output


def test_files_without_a_single_bar_leave_nothing_behind(tmp_path):
    (tmp_path / "A.csv").write_text("date,o,h,l,c,v\n2024-01-06,1,2,1,2,10\n")
    (result,) = import_tree(BarStore(tmp_path / "store"), "csv-a", tmp_path, DAY)
    assert "at least one row must be a 1day bar; found 1 not_a_session" in result.reason
    assert not (tmp_path / "store").exists()


def test_a_run_gives_the_same_hint(tmp_path):
    files = market_files(tmp_path / "files", FIVE, ["SIM001"])
    result = ingest(CsvFeed(files), BarStore(tmp_path / "store"), ["SIM001"], DAY, *SPAN)
    assert result.results[0].reason.endswith("these look like 5minute bars: --interval 5minute")
    good = CsvFeed(files).fetch("SIM001", FIVE, *SPAN)
    assert too_many_rejected(good, 0.01) == ""


# --------------------------------------------------------------------------------------- compare


def test_two_sources_are_compared_over_what_both_have(tmp_path):
    hold("one", DAY, span=(date(2024, 1, 1), date(2024, 2, 29)))
    hold("two", DAY, span=(date(2024, 2, 1), date(2024, 3, 28)))
    early = pd.Timestamp("2024-01-10", tz="Asia/Kolkata")
    row = {"row": 1, "ts": early, "column": "close", "value": "x", "reason": "not_a_number"}
    store().quarantine("one", "SIM001", DAY, pd.DataFrame([row]), "test")
    out = tmp_path / "told.json"
    told = data("compare", "one", "two", "--out", out)
    assert told.exit_code == 0, told.output
    assert "Range 2024-02-01 to 2024-02-29, of both sources" in told.output
    assert "00:00:00" not in told.output
    found = json.loads(out.read_text())
    assert all("2024-02-01" <= f["ts"] <= "2024-02-29" for f in found["findings"]), found
    assert {s["both"] for s in found["symbols"].values()} == {21}
    part = data("compare", "one", "two", "--start", "2024-02-12", "--end", "2024-02-16")
    assert "Range 2024-02-12 to 2024-02-16" in part.output


def test_rejected_rows_inside_the_range_are_still_told(tmp_path):
    hold("one", DAY)
    hold("two", DAY)
    row = {"row": 1, "column": "close", "value": "x", "reason": "not_a_number"}
    row["ts"] = pd.Timestamp("2024-02-10", tz="Asia/Kolkata")
    store().quarantine("one", "SIM001", DAY, pd.DataFrame([row]), "test")
    told = data("compare", "one", "two")
    assert "1 finding\n" in told.output and "not_a_number" in told.output


def test_folders_are_compared_whatever_the_settings_say(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_START", "2022-01-01")
    monkeypatch.setenv("SENSEQUANT_END", "2022-12-31")
    first, second = (market_files(tmp_path / n, DAY) for n in ("first", "second"))
    told = data("compare", first, second)
    assert told.exit_code == 0, told.output
    assert "Range 2024-01-01 to 2024-03-28" in told.output or "Range 2024-01-02" in told.output


def test_shorter_bars_are_compared_as_days(tmp_path):
    hold("one", FIVE, ["SIM001"])
    hold("two", FIVE, ["SIM001"])
    told = data("compare", "one", "two", "--interval", "5minute")
    assert told.exit_code == 0, told.output
    assert "days made of 5minute bars" in told.output and "0 findings" in told.output
    assert data("compare", "one", "two").exit_code == 2, "no daily bars are held"


def test_what_only_one_has_is_said_and_nothing_in_common_refused(tmp_path):
    hold("one", DAY, ["SIM001", "SIM002"])
    hold("two", DAY, ["SIM001"])
    hold("three", DAY, ["SIM003"])
    told = data("compare", "one", "two", "--symbols", "SIM001,SIM002")
    assert told.exit_code == 0 and "Not in two: SIM002" in told.output
    assert "1 symbol, " in told.output
    for pair, words in (("two", "three"), ()), (("one", "two"), ("--symbols", "FOO")):
        none = data("compare", *pair, *words)
        assert none.exit_code == 2 and "symbol in common" in none.output, none.output
    hold("four", DAY, ["SIM001"], (date(2024, 3, 1), date(2024, 3, 28)))
    hold("five", DAY, ["SIM001"], (date(2024, 1, 1), date(2024, 1, 31)))
    apart = data("compare", "four", "five")
    assert apart.exit_code == 2 and "sessions in common" in apart.output
    order = data("compare", "one", "two", "--start", "2024-02-01", "--end", "2024-01-01")
    assert order.exit_code == 2


# --------------------------------------------------------------------------------------- actions


def own_actions():
    "Two suspected actions of one day, of two sources, beside the facts."
    facts = read_actions()
    row = facts.iloc[[0]].assign(symbol="ABC", status="suspected", source="test")
    table = pd.concat([row.assign(applies_to=s) for s in ("one", "two")])
    path = load_settings().home / "data" / "corporate_actions.csv"
    save_actions(path, table)
    return path, f"ABC@{row['ex_date'].iloc[0]:%Y-%m-%d}"


def status_of(path):
    "Status of the two by their source."
    table = read_actions(path).query("symbol == 'ABC'")
    return dict(zip(table["applies_to"], table["status"], strict=True))


def test_one_action_is_decided_at_a_time():
    path, key = own_actions()
    vague = data("actions", "--reject", key)
    assert vague.exit_code == 2 and f"{key}@one, {key}@two" in vague.output
    both = data("actions", "--reject", f"{key}@one", "--confirm", f"{key}@one")
    assert both.exit_code == 2 and "not both" in both.output
    assert set(status_of(path).values()) == {"suspected"}
    done = data("actions", "--reject", f"{key}@one", "--confirm", f"{key}@two")
    assert done.exit_code == 0, done.output
    assert f"rejected: {key}@one" in done.output and f"confirmed: {key}@two" in done.output
    assert status_of(path) == {"one": "rejected", "two": "confirmed"}


def test_a_shipped_fact_changes_by_its_own_key_alone():
    fact = read_actions().iloc[0]
    day = f"{fact['symbol']}@{fact['ex_date']:%Y-%m-%d}"
    path = load_settings().home / "data" / "corporate_actions.csv"
    alone = data("actions", "--reject", day)
    assert alone.exit_code == 2 and f"{day}@{fact['applies_to']}" in alone.output
    assert not path.exists()
    save_actions(path, read_actions().iloc[[0]].assign(applies_to="mine", status="suspected"))
    assert data("actions", "--reject", day).exit_code == 2
    done = data("actions", "--reject", f"{day}@mine", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)
    after = read_actions(path)
    same = after[(after["symbol"] == fact["symbol"]) & (after["ex_date"] == fact["ex_date"])]
    kept = dict(zip(same["applies_to"], same["status"], strict=True))
    assert kept == {fact["applies_to"]: fact["status"], "mine": "rejected"}
    full = data("actions", "--reject", f"{day}@{fact['applies_to']}")
    assert full.exit_code == 0 and f"rejected: {day}@{fact['applies_to']}" in full.output


# ------------------------------------------------------------------------------ fetch and backfill


@pytest.fixture
def broker(monkeypatch):
    "A sandbox that the settings lead to."
    with Sandbox(SandboxSpec(MARKET, scale=600)) as sandbox:
        names = ("breeze_api_key", "breeze_api_secret", "breeze_session_token")
        given = dict(zip(names, map(str, sandbox.credentials), strict=True))
        given |= {"breeze_url": sandbox.url, "breeze_backoff_s": 0.01, "source": "breeze"}
        given |= {"breeze_calls_per_minute": 60_000, "breeze_calls_per_day": 3_000_000}
        for name, value in given.items():
            monkeypatch.setenv(f"SENSEQUANT_{name.upper()}", str(value))
        yield sandbox


RANGE = ("--start", "2024-01-01", "--end", "2024-03-28")


def history(broker):
    "Requests for bars so far."
    return sum(r.endpoint == "v2/historicalcharts" for r in broker.log)


def test_a_universe_the_feed_has_nothing_of_is_refused(broker):
    told = data("fetch", "--universe", "nifty100", *RANGE)
    assert told.exit_code == 2 and "It has SIM001, SIM002, SIM003" in told.output
    assert "SUMMARY" not in told.output and len(told.output.splitlines()) == 1


def test_an_index_goes_by_its_name_at_the_exchange(broker):
    told = data("fetch", "--symbols", "NIFTY 50", *RANGE)
    assert told.exit_code == 0, told.output
    assert "1 symbol," in told.output and "1 symbols" not in told.output
    (source,) = store().sources()
    assert store().symbols(source, DAY) == ["NIFTY50"]
    shown = data("show")
    assert f"SIMULATED bars of {source}, 1day" in shown.output
    assert "1 row" in shown.output and "1 rows" not in shown.output


def test_a_backfill_plans_only_what_is_held_at_each_interval(broker):
    data("fetch", "--symbols", "SIM001,SIM002", *RANGE)
    data("fetch", "--symbols", "SIM001", "--interval", "5minute", *RANGE)
    before = history(broker)
    plan = data("backfill", *RANGE, "--dryrun")
    assert plan.exit_code == 0, plan.output
    assert "1minute: nothing is held" in plan.output
    assert plan.output.count("0 requests for 0 symbols") == 2, plan.output
    later = data("backfill", "--intervals", "5minute", "--end", "2024-03-28", "--dryrun")
    assert "0 requests" in later.output, "from the first day held, not that of the settings"
    assert history(broker) == before


def test_asking_again_says_its_requests_beforehand(broker):
    data("fetch", "--symbols", "SIM001", "--start", "2024-01-01", "--end", "2024-02-04")
    (source,) = store().sources()
    hole = (date(2024, 2, 5), date(2024, 2, 9))
    store().write(source, "SIM001", DAY, no_bars(), *hole, origin="an outage")
    data("fetch", "--symbols", "SIM001", "--start", "2024-02-10", "--end", "2024-03-28")
    before = history(broker)
    plan = data("backfill", *RANGE, "--intervals", "1day", "--again", "--dryrun")
    assert "5 sessions missing of 1 symbol\n" in plan.output
    assert "1 request for 1 symbol" in plan.output and history(broker) == before
    plain = data("backfill", *RANGE, "--intervals", "1day", "--dryrun")
    assert "0 requests" in plain.output


def test_a_backfill_reaches_from_the_first_day_held_to_the_newest():
    hold("one", DAY, ["SIM001"])
    hold("one", DAY, ["SIM002"], (date(2024, 2, 1), date(2024, 3, 28)))
    span = Span(DAY, date(2020, 1, 1), date(2021, 1, 1))
    spans = held_spans(store(), "one", span, (False, False))
    assert [s.start for s in spans.values()] == [date(2024, 1, 1), date(2024, 2, 1)]
    assert all(s.end > date(2024, 3, 28) for s in spans.values())
    assert set(held_spans(store(), "one", span, (True, True)).values()) == {span}
    assert held_spans(store(), "one", replace(span, interval=FIVE), (False, False)) == {}


def test_a_broker_that_is_down_is_one_warning(broker):
    data("fetch", "--symbols", "SIM001,SIM002,SIM003", *RANGE)
    (source,) = store().sources()
    broker.stop()
    told = data(
        "fetch", "--source", "hybrid", "--symbols", "SIM001,SIM002,SIM003",
        "--start", "2023-12-01", "--end", "2024-03-28",
    )  # fmt: skip
    assert source in told.output and told.exit_code == 0, told.output
    assert told.output.count("warning: fallback") == 1, told.output


def test_alike_reasons_are_joined_and_others_are_not():
    lines = [Notice("fallback", s, f"{n} of 9 chunks") for n, s in enumerate("ABC")]
    assert len(spell_notices(lines)) == 1
    assert len(spell_notices([*lines, Notice("fallback", "D", "the disk is full")])) == 2
    assert Filled("breeze", False, (), 0, 1.0).rows == 0


# ------------------------------------------------------------------------------------ which source


@pytest.mark.parametrize("words", [["show"], ["quarantine"], ["coverage"], ["export", "x"]])
def test_no_source_and_several_are_told_plainly(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty = data(*words)
    assert empty.exit_code == 2 and "it is empty" in empty.output, empty.output
    hold("one", DAY, ["SIM001"])
    hold("two", FIVE, ["SIM001"])
    several = data(*words)
    assert several.exit_code == 2, several.output
    assert "2 sources: one (1day), two (5minute)" in several.output
    absent = data(*words, "--source", "breeze")
    assert absent.exit_code == 2 and "one (1day), two (5minute)" in absent.output, absent.output


def test_an_interval_that_is_not_held_is_said(tmp_path):
    hold("two", FIVE, ["SIM001"])
    for words in (["show"], ["export", str(tmp_path / "x")], ["coverage"]):
        told = data(*words, "--source", "two")
        assert told.exit_code == 2 and "two (5minute)" in told.output, told.output
    assert not (tmp_path / "x").exists()


def test_a_home_that_is_a_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SENSEQUANT_HOME", str(tmp_path / "file"))
    told = data("show")
    assert told.exit_code == 2 and "SENSEQUANT_HOME" in told.output and "a file" in told.output


def test_what_is_simulated_says_so():
    hold("sim-x", DAY, ["SIM001"])
    hold("one", DAY, ["SIM001"])
    assert "SIMULATED bars of sim-x, 1day" in data("show", "--source", "sim-x").output
    assert "Bars of one, 1day" in data("show", "--source", "one").output
    rows = json.loads(data("show", "--source", "sim-x", "--json").output)
    assert (rows[0]["simulated"], rows[0]["interval"]) == ("True", "1day")


def test_an_unknown_symbol_is_said_by_coverage():
    hold("one", DAY, ["SIM001"])
    told = data("coverage", "--source", "one", "--symbols", "FOO,SIM001", *RANGE)
    assert told.exit_code == 3
    assert "Nothing of 1day is held in one of: FOO" in told.output


def test_the_help_names_all_that_is_kept():
    assert "Bars, books and news" in data("--help").output
