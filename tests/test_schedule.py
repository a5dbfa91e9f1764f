"""Retraining by the clock: lines that cron, the shell and systemd read as they were meant, one
retraining at a time, bars before models, and windows taken over where nothing changed."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from conftest import SMALL, SYMBOLS
from typer.testing import CliRunner

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.ledger import Ledger, ledger_path, spend
from sensequant.core.settings import load_settings
from sensequant.core.types import IST, Interval
from sensequant.data.bars import BarStore
from sensequant.data.runs import warm_start
from sensequant.learn.records import read_window_runs
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.live.sandbox_faults import Planned
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops import orchestrator as o
from sensequant.ops import schedule as s
from sensequant.ops import schedule_cli as cli
from sensequant.ops.main import app
from sensequant.ops.validation_runs import get_validation_runs

CLI = [sys.executable, "-c", "from sensequant.ops.main import main; main()"]
KOLKATA, UTC = ZoneInfo("Asia/Kolkata"), ZoneInfo("UTC")
YEARS = [date(2025, 1, 1) + timedelta(n) for n in range(8 * 365)]
SIM = {k: x for k, x in SMALL.items() if k not in ("end", "propose")} | {
    "source": "simulated", "workers": 1, "ablation_windows": 1, "compare_scopes": False,
}  # fmt: skip


def runs_on(kind, day):
    "Whether a scheduled retraining of a kind does its work on a day."
    return s.due(kind, day) and not s.replaced_by(kind, day)


def options(**more):
    "Options of a small retraining."
    pairs = [w for k, x in (SIM | more).items() for w in ("--set", f"{k}={x}")]
    return [*pairs, "--symbols", ",".join(SYMBOLS)]


def given(**more):
    "The same, as the command knows them."
    none = dict.fromkeys([*cli.OPTIONS, "set_"])
    pairs = [f"{k}={x}" for k, x in (SIM | more).items()]
    return none | {"symbols": ",".join(SYMBOLS), "set_": pairs, "wait": 0.0, "scheduled": False}


def noted(home):
    "Lines of the log."
    path = s.log_path(home)
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def home_now():
    "The home of this test."
    return Path(os.environ["SENSEQUANT_HOME"])


# When


def test_no_two_trainings_fall_on_one_day():
    for day in YEARS:
        kinds = [k for k in s.KINDS[1:] if runs_on(k, day)]
        assert len(kinds) <= 1
        wanted = "quarterly" if day.day == 1 and day.month in (1, 4, 7, 10) else None
        wanted = wanted or ("monthly" if day.day == 1 else "weekly" if day.weekday() == 6 else None)
        assert kinds == ([wanted] if wanted else []), day
        assert runs_on("daily", day) == (day.weekday() < 5), "bars come whatever is trained"


FIELD = r"(\d+|\*)(?:-(\d+))?"


def matches(field, value):
    "Whether a field of a crontab holds for a number, as crontab(5) says."
    for part in field.split(","):
        low, high = re.fullmatch(FIELD, part).groups()
        if low == "*" or int(low) <= value <= int(high or low):
            return True
    return False


def cron_days(line):
    "Days on which cron starts a line; the two kinds of days are either-or where both are named."
    day_of, month, week = line.split(" ")[2:5]
    for day in YEARS:
        of_month, of_week = matches(day_of, day.day), matches(week, (day.weekday() + 1) % 7)
        either = of_month or of_week if "*" not in (day_of, week) else of_month and of_week
        if either and matches(month, day.month):
            yield day


def cron_lines(text):
    "The lines of a crontab that start something, by kind."
    found = {}
    for line in text.splitlines():
        if line and line[0] not in "#C":
            found[re.search(r" retrain (\w+) ", line)[1]] = line
    return found


def test_cron_starts_each_kind_on_its_days():
    settings = load_settings(retrain_fetch_at="18:05", retrain_at="03:30")
    lines = cron_lines(s.crontab(s.Plan(), settings))
    assert list(lines) == list(s.KINDS)
    for kind, line in lines.items():
        started = [
            d for d in cron_days(line) if not s.replaced_by(kind, d)
        ]  # what --scheduled does
        assert started == [d for d in YEARS if runs_on(kind, d)], kind
        assert line.startswith("5 18 " if kind == "daily" else "30 3 ")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_timers_elapse_on_the_days_and_hours_of_india():
    when = s.calendars(load_settings())
    for kind in s.KINDS:
        n = 40 if kind == "weekly" else 24
        ask = ["systemd-analyze", "calendar", "--iterations", str(n), when[kind]]
        told = subprocess.run(
            [*ask, "--base-time", "2026-01-01 00:00:00 UTC"], capture_output=True, text=True,
            env=os.environ | {"TZ": "UTC", "LC_ALL": "C"}, check=True,
        ).stdout  # fmt: skip
        stamps = re.findall(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC$", told, re.M)
        moments = [
            datetime.fromisoformat(x).replace(tzinfo=UTC).astimezone(KOLKATA) for x in stamps
        ]
        moments = sorted(m for m in set(moments) if m.date() > date(2026, 1, 1))
        assert len(moments) >= n - 2, told
        clock = "18:00" if kind == "daily" else "02:00"
        assert {m.strftime("%H:%M") for m in moments} == {clock}
        span = [d for d in YEARS if moments[0].date() <= d <= moments[-1].date()]
        assert [m.date() for m in moments] == [d for d in span if runs_on(kind, d)], kind


def test_a_scheduled_one_gives_way_to_a_rarer_one_and_a_persons_does_not(monkeypatch):
    class First(datetime):
        "On 1 November 2026, a Sunday."

        @classmethod
        def now(cls, zone=None):
            return datetime(2026, 11, 1, 2, 0, tzinfo=IST)

    monkeypatch.setattr(cli, "datetime", First)
    done = CliRunner().invoke(app, ["retrain", "weekly", "--scheduled", *options()])
    assert (done.exit_code, "monthly runs in its place" in done.output) == (0, True)
    (line,) = noted(home_now())
    assert (line["kind"], line["status"]) == ("weekly", "skipped")
    assert not (home_now() / "runs").exists() and not (home_now() / "data/bars").exists()
    plan = CliRunner().invoke(app, ["retrain", "weekly", "--dryrun", *options()])
    assert plan.exit_code == 0 and "Would train 2022-07-01" in plan.output


# What it spends


def test_the_table_of_the_budget_is_the_ledgers():
    settings = load_settings(retrain_propose="monthly", yearly_error=0.1)
    lines = s.budget_lines(settings, 2026, before=2)
    monthly = next(x for x in lines if x.startswith("monthly"))
    assert f"p <= {spend(3, 0.1):.2g}" in monthly and f"p <= {spend(14, 0.1):.2g}" in monthly
    assert monthly.endswith("<- in force") and lines[0].endswith("2 spent so far.")
    days = [d for d in YEARS if d.year == 2027]
    for choice, kinds in (("quarterly", s.KINDS[3:]), ("monthly", s.KINDS[2:])):
        n = sum(runs_on(k, d) for k in kinds for d in days)
        assert s.proposals_of(choice, 2027) == n == {"quarterly": 4, "monthly": 12}[choice]
    assert spend(s.proposals_of("monthly", 2026)) < 0.00022


def test_proposals_that_are_spent_already_are_counted(tmp_path):
    settings = load_settings(home=tmp_path)
    assert s.spent(settings, "NSE", 2026) == 0 and not ledger_path(tmp_path).exists()
    with Ledger(ledger_path(tmp_path)) as ledger:
        for day, name in (("2025-12-31", "old"), ("2026-01-05", "a"), ("2026-04-01", "b")):
            ledger.propose(name, "NSE", date.fromisoformat(day), "0" * 64)
    assert s.spent(settings, "NSE", 2026) == 2


@pytest.mark.parametrize("choice", ["never", "quarterly", "monthly", "weekly"])
def test_who_asks_for_promotion(choice):
    for kind in s.KINDS[1:]:
        told = given(retrain_propose=choice)
        job = cli.open_job(kind, told, datetime(2024, 3, 5, tzinfo=IST))
        config = cli.config_for(job, date(2024, 2, 29))
        rank = {"never": 9, "weekly": 1, "monthly": 2, "quarterly": 3}[choice]
        assert config["propose"] == (s.KINDS.index(kind) >= rank), (kind, choice)
        assert config["incremental"] == (kind != "quarterly")
        assert (config["start"], config["end"]) == ("2022-07-01", "2024-02-29")


# What is started


ODD = 'my "odd" 100% $HOME \\folder'
SPY = """#!/bin/sh
exec {python} -c 'import json, os, sys
names = ("SENSEQUANT_HOME", "SENSEQUANT_ENV_FILE")
told = [sys.argv[1:], os.getcwd(), [os.environ.get(n) for n in names]]
open(os.environ["SENSEQUANT_HOME"] + "/told.json", "w").write(json.dumps(told))
print("logged")' "$@"
"""


@pytest.fixture
def odd(tmp_path):
    "A plan of which every path and word is hard to quote, and the home it is for."
    home = tmp_path / ODD
    clone = home / "my clone"
    clone.mkdir(parents=True)
    spy = home / "spy it"
    spy.write_text(SPY.format(python=shlex.quote(sys.executable)))
    spy.chmod(0o755)
    words = ("--csv-dir", str(home), "--set", "rss_urls=http://x/?q={query}&a=50%25 b'c")
    held = (("SENSEQUANT_ENV_FILE", str(home / ".env")), ("SENSEQUANT_HOME", str(home)))
    return s.Plan(words, 7.5, (str(spy),), clone, held), home


def as_cron_runs(line):
    "What cron gives to the shell: up to the first bare %, with escaped ones as they are meant."
    command = line.split(" ", 5)[5]
    assert len(command) < 998, "Debian's cron refuses more"
    return re.split(r"(?<!\\)%", command)[0].replace("\\%", "%")


@pytest.mark.parametrize("kind", s.KINDS)
def test_the_shell_reads_a_line_of_cron_as_it_was_meant(odd, kind):
    plan, home = odd
    line = cron_lines(s.crontab(plan, load_settings(home=home)))[kind]
    bare = {"PATH": "/usr/bin:/bin", "HOME": "/", "LOGNAME": "nobody"}
    subprocess.run(["/bin/sh", "-c", as_cron_runs(line)], env=bare, cwd="/", check=True)
    words, folder, held = json.loads((home / "told.json").read_text())
    assert words == ["retrain", kind, "--scheduled", "--wait", "7.5", *plan.words]
    assert (folder, held) == (str(plan.clone), [str(home), str(home / ".env")])
    assert (home / "data/state/retrain.log").read_text() == "logged\n", "its folder is made"


def unit_words(text):
    "Words of a line as systemd reads them: systemd.syntax(7) and systemd.service(5)."
    words, i = [], 0
    while i < len(text):
        assert text[i] == '"', text[i:]
        word, i = "", i + 1
        while text[i] != '"':
            if text[i] == "\\":
                assert text[i + 1] in '\\"'
                i += 1
            word, i = word + text[i], i + 1
        words.append(word)
        i += 2
    assert not [w for w in words if re.search(r"(?<!%)%(?!%)", w.replace("%%", ""))]
    return [w.replace("%%", "%") for w in words]


def test_systemd_reads_a_unit_as_it_was_meant(odd):
    plan, home = odd
    text = s.units(plan, load_settings(home=home))["sensequant-retrain-weekly.service"]
    lines = dict(x.split("=", 1) for x in text.splitlines() if x.startswith(("Exec", "Working")))
    words = [w.replace("$$", "$") for w in unit_words(lines["ExecStart"])]
    assert words == plan.command("weekly")
    assert lines["WorkingDirectory"].replace("%%", "%") == str(plan.clone)
    held = [x.split("=", 1)[1] for x in text.splitlines() if x.startswith("Environment=")]
    assert [unit_words(x)[0] for x in held] == ["=".join(pair) for pair in plan.environment]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    home = tmp_path / "my 100% home"
    plan = s.Plan(("--universe", "nifty100"), program=("/bin/true",), folder=tmp_path)
    files = s.write_schedule(tmp_path / "units", s.units(plan, load_settings(home=home)))
    assert len(files) == 8
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, files)], capture_output=True, text=True
    )
    ours = [x for x in (done.stdout + done.stderr).splitlines() if "sensequant" in x]
    assert (done.returncode, ours) == (0, [])


def test_the_command_prints_a_crontab_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("SENSEQUANT_SEED", "7")
    words = [
        "schedule",
        "--universe",
        "nifty100",
        "--source",
        "breeze",
        "--set",
        "gate_statistic=alpha",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert all(x[0] in "#C0123456789" for x in lines) and done.output.endswith("\n")
    assert "CRON_TZ=Asia/Kolkata" in lines and "quarterly                4" in done.output
    assert "unknown to the lines; put them into .env: SENSEQUANT_SEED" in done.output
    for kind, line in cron_lines(done.output).items():
        start = shlex.split(as_cron_runs(line))
        tail = start[start.index("retrain") : start.index(f">>{home_now()}/data/state/retrain.log")]
        assert tail[:2] == ["retrain", kind] and tail[-6:] == words[1:]
        assert f"SENSEQUANT_HOME={home_now()}" in start
    if program := shutil.which("crontab"):
        (tmp_path / "tab").write_text(done.output)
        checked = subprocess.run([program, "-n", tmp_path / "tab"], capture_output=True, text=True)
        assert "successfully checked" in checked.stdout, checked.stderr
    assert not home_now().exists(), "nothing is installed or written"


def test_a_source_that_counts_requests_needs_its_symbols_named():
    done = CliRunner().invoke(app, ["schedule", "--source", "breeze"])
    assert done.exit_code == 2 and "symbols must be named" in done.stderr
    with pytest.raises(SettingsError, match="retrain_at must be a time such as 18:00; found 2am"):
        s.crontab(s.Plan(), load_settings(retrain_at="2am"))


# One at a time


@pytest.mark.slow
def test_two_at_once_and_a_dead_holder(tmp_path):
    environment = os.environ | {"SENSEQUANT_HOME": str(tmp_path)}
    weekly = [*CLI, "retrain", "weekly", *options()]
    daily = [*CLI, "retrain", "daily", *options()]
    first = subprocess.Popen(weekly, env=environment, start_new_session=True)
    end = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/coverage.json")):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.05)
    try:
        busy = subprocess.run(daily, env=environment, capture_output=True, text=True)
        assert busy.returncode == 4, busy.stderr
        assert f"found process {first.pid}, weekly since 20" in busy.stderr
        waiting = [*daily, "--wait", "2"]
        second = subprocess.Popen(waiting, env=environment, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline().startswith("SenseQuant: daily")
        assert second.stdout.readline().startswith(f"Waiting for process {first.pid}, weekly since")
        first.kill()  # its kernel may live on for a while and must not hold the lock
        out, _ = second.communicate(timeout=100)
        assert (second.returncode, "2 of 3 symbols" in out or "3 of 3 symbols" in out) == (0, True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    lines = [(x["kind"], x["status"]) for x in noted(tmp_path)]
    assert lines == [
        ("weekly", "running"), ("weekly", "running"), ("daily", "busy"), ("daily", "running"),
        ("daily", "success"),
    ]  # fmt: skip
    killed = [x for x in noted(tmp_path) if x["kind"] == "weekly"][-1]
    (run,) = tmp_path.glob("runs/*")
    assert (killed["run_id"], killed["ended"]) == (run.name, None)


def test_the_same_moment_lets_one_through(tmp_path):
    code = "import sys, time; from pathlib import Path; from sensequant.ops.schedule import sole\n"
    code += "path, log = map(Path, sys.argv[1:])\n"
    code += "with sole(path, 'weekly', 60, every_s=0.001):\n"
    code += "    a = time.time(); time.sleep(0.02); b = time.time()\n"
    code += "    open(log, 'a').write(f'{a} {b}\\n')"
    log = tmp_path / "log"
    words = [sys.executable, "-c", code, str(tmp_path / "lock"), str(log)]
    crowd = [subprocess.Popen(words) for _ in range(6)]
    assert [p.wait(100) for p in crowd] == [0] * 6
    turns = sorted(tuple(map(float, x.split())) for x in log.read_text().splitlines())
    assert len(turns) == 6
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(turns)), "no two overlap"


# Bars before models


START, END = (date.fromisoformat(SMALL[k]) for k in ("start", "end"))
MARKET = MarketSpec(SMALL["sim_symbols"], warm_start(START, 180), END, 1, SMALL["signal_ic"])
HISTORY = "v2/historicalcharts"


@pytest.fixture
def broker(monkeypatch):
    "A sandbox whose keys stand in the environment."
    with Sandbox(SandboxSpec(MARKET, scale=100)) as sandbox:
        names = ("API_KEY", "API_SECRET", "SESSION_TOKEN")
        for name, value in zip(names, sandbox.credentials, strict=True):
            monkeypatch.setenv(f"SENSEQUANT_BREEZE_{name}", value)
        yield sandbox


def remote(broker, **more):
    "Options of a retraining from the sandbox."
    quick = {"breeze_backoff_s": 0.02, "breeze_calls_per_minute": 6_000, "breeze_url": broker.url}
    return given(source="breeze", **quick, **more)


def asked(broker):
    "Requests for bars so far."
    return sum(r.endpoint == HISTORY for r in broker.log)


def at(day):
    "After the close of a session."
    return datetime.fromisoformat(f"{day} 18:00").replace(tzinfo=IST)


def test_a_daily_fetch_brings_what_is_missing_and_a_weekly_one_what_was_corrected(broker):
    told, before = remote(broker), asked(broker)
    first = cli.open_job("daily", told, at("2023-12-29"))
    assert cli.bring(first) == 0
    assert cli.last_held(first) == date(2023, 12, 29)
    whole = asked(broker) - before
    assert whole == len(SYMBOLS), "the first daily one brings the whole history, warm-up included"
    next_day = cli.open_job("daily", told, at("2024-01-02"))
    assert cli.bring(next_day) == 0 and cli.last_held(next_day) == date(2024, 1, 2)
    assert asked(broker) - before == 2 * len(SYMBOLS)
    store, place = BarStore(home_now() / "data/bars"), (first.feed.name, "SIM001", Interval.DAY)
    true = store.read(*place)
    wrong = true.loc[str(date(2023, 12, 1)) : str(date(2023, 12, 29))].copy()
    wrong["volume"] += 1
    store.write(*place, wrong, date(2023, 12, 1), date(2023, 12, 29), "a mistake of the vendor")
    assert not store.read(*place).equals(true)
    assert cli.bring(next_day) == 0
    assert not store.read(*place).equals(true), "a daily one asks for nothing that is held"
    weekly = cli.open_job("weekly", told, at("2024-01-02"))
    count = asked(broker)
    assert cli.bring(weekly) == 0 and asked(broker) - count == len(SYMBOLS)
    assert store.read(*place).equals(true), "a weekly one does"
    plan = asked(broker)
    assert cli.bring(cli.open_job("monthly", told, at("2024-02-01")), dryrun=True) == 0
    assert asked(broker) == plan, "a plan asks nobody"


@pytest.mark.parametrize("kind", ["daily", "weekly"])
def test_a_fetch_that_fails_ends_it_before_anything_is_trained(broker, kind, capsys):
    broker.schedule(Planned("drop", HISTORY, count=10_000))
    code = cli.retrain_now(kind, remote(broker), home_now())
    assert code == 1
    told = capsys.readouterr().out
    assert "failed: SIM001" in told and "nothing was trained" in told
    assert not (home_now() / "runs").exists()
    begun, last = noted(home_now())
    assert (begun["status"], last["status"], last["run_id"]) == ("running", "failed", None)
    assert "bars are missing" in last["message"] and last["ended"] is not None


def test_an_error_is_noted_with_its_reason():
    words = ["retrain", "weekly", "--source", "csv", "--csv-dir", "/no/such/folder"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code in (1, 2) and done.stderr.startswith("error: ")
    last = noted(home_now())[-1]
    assert last["status"] == "failed" and "/no/such/folder" in last["message"]


# Training


def write_csv(corrected=None):
    "Files of the simulated market, one bar as the vendor corrected it; their folder."
    folder, market = home_now().parent / "bars", simulate(MARKET)
    folder.mkdir(exist_ok=True)
    for name in SYMBOLS:
        table = market.bars(name, Interval.DAY, MARKET.start, MARKET.end).reset_index(
            names="timestamp"
        )
        table.loc[table["timestamp"].dt.date == corrected, "volume"] *= 2
        table["timestamp"] = table["timestamp"].dt.strftime("%Y-%m-%d")
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder


def tried(home):
    "Who tried, row by row of the ledger."
    with Ledger(ledger_path(home)) as ledger:
        assert ledger.verify().intact
        for n in range(1, ledger.head().count + 1):
            with contextlib.suppress(DataError):  # a proposal or an opening
                yield ledger.trial(n).source


def require_taken(first, second):
    "Only the window of the corrected bar was taught anew, and only students judged on that bar."
    for kind, last in (("teacher", 1), ("student", 2)):
        before, after = (
            {r.window_label: r for r in read_window_runs(x, kind)} for x in (first, second)
        )
        good = {k: r for k, r in after.items() if r.status == "success" and r.symbol == "SIM001"}
        taken = {k for k, r in good.items() if r.incremental}
        assert len(good) == 5 and sorted(set(good) - taken) == sorted(good)[-last:], kind
        assert all(good[k].artifacts == before[k].artifacts for k in taken)


@pytest.mark.slow
def test_a_later_run_takes_over_windows_whose_rows_are_the_same():
    home = home_now()
    told, runs = given(source="csv", csv_dir=write_csv()), []
    for day in ("2024-01-30", "2024-02-29"):
        job = cli.open_job("weekly", told, at(day))
        assert cli.bring(job) == 0
        config = cli.config_for(job, cli.last_held(job))
        assert config["start"] == SMALL["start"] and config["end"] == day
        o.require_folders(home)
        run = o.begin_run(config, home)
        assert o.go_on(run, until="3_student").status == "partial"
        runs.append(run)
        write_csv(corrected=date(2023, 9, 11))  # which the second one meets
    require_taken(*runs)


@pytest.mark.slow
def test_a_quarterly_one_trains_all_and_evaluates_after_its_verdict():
    more = {"search_train_sessions": 60, "search_test_sessions": 40, "search_min_trades": 2}
    done = CliRunner().invoke(app, ["retrain", "quarterly", *options(start="2025-03-03", **more)])
    assert done.exit_code == 0, done.output
    last = noted(home_now())[-1]
    assert last["status"] == "success" and last["run_id"].startswith("live_candidate_")
    run = home_now() / "runs" / last["run_id"]
    config = json.loads((run / "config.json").read_text())
    assert (config["incremental"], config["propose"]) == (False, True)
    verdict = json.loads((run / "promotion_briefing.json").read_text())["status"]
    assert last["message"] == verdict and verdict in ("ready-for-review", "rejected")
    (validation,) = get_validation_runs(home=home_now())
    found = validation["results"]
    assert found["training_run"] == last["run_id"] and found["verdict"] == verdict
    assert found["optimizer_results"]["status"] == "success", found["warnings"]
    sources = list(tried(home_now()))
    first = sources.index("optimizer")
    assert first and set(sources[first:]) == {"optimizer"}, "what was sought came after the verdict"
