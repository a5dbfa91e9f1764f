"""The broker's commands as a person meets them: nobody there, nothing pasted, no word cut."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from datetime import date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sensequant.core.errors import SettingsError
from sensequant.core.settings import env_file
from sensequant.core.testing import expect_fail
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.live.sandbox_faults import MENU, Planned
from sensequant.market.breeze_protocol import LOGIN
from sensequant.market.calendar import is_session
from sensequant.market.simulator import MarketSpec
from sensequant.ops.broker_cli import Checked, spell_rows, spell_session
from sensequant.ops.main import app

MARKET = MarketSpec(symbols=2, start=date(2024, 1, 1), end=date(2024, 3, 28))


@pytest.fixture(scope="module")
def broker():
    "A sandbox that allows what is asked here."
    with Sandbox(SandboxSpec(MARKET, scale=100)) as sandbox:
        yield sandbox


@pytest.fixture
def closed():
    "An address at which nobody listens."
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def write_env(url, keys, **more):
    "A `.env` for a broker."
    names = {"URL": url, "API_KEY": keys[0], "API_SECRET": keys[1]} | more
    env_file().write_text("".join(f"SENSEQUANT_BREEZE_{k}={v}\n" for k, v in names.items()))
    return env_file()


def command(*words, **more):
    "What `sensequant` does."
    return CliRunner().invoke(app, words, **more)


def checked():
    "The rows of a check by name, and its exit code."
    done = command("breeze", "check", "--json")
    return {row["what"]: row for row in json.loads(done.stdout)}, done


# --------------------------------------------------------------------------------------- check


def test_a_stopped_sandbox_is_told_at_once_and_once(closed):
    write_env(closed, ("k", "s"), SESSION_TOKEN="1")
    begun = time.monotonic()
    rows, done = checked()
    assert time.monotonic() - begun < 5, "no tries, no pauses"
    assert done.exit_code == 1 and "checking" in done.stderr
    assert [w for w, row in rows.items() if row["looked"] and not row["ok"]] == ["broker"]
    assert "Start `sensequant sandbox`" in rows["broker"]["fix"]
    assert closed in rows["broker"]["found"]
    for what in ("session", "clock", "codes", "secret"):
        assert rows[what]["found"] == "not checked: the broker cannot be reached"
        assert not rows[what]["fix"]
    assert rows["SDK"]["ok"] and rows["limits"]["ok"]
    assert command("breeze", "check").stdout.count("must listen") == 1


def test_a_broker_that_hangs_is_told_once(broker):
    keys = broker.credentials
    write_env(broker.url, keys, SESSION_TOKEN=keys.session_token, TIMEOUT_S=1, TRIES=1)
    broker.schedule(Planned("hang", "customerdetails"))
    rows, done = checked()
    assert done.exit_code == 1
    assert [w for w, row in rows.items() if row["looked"] and not row["ok"]] == ["session"]
    assert "no answer" in rows["session"]["found"] and not rows["codes"]["looked"]


def test_a_session_of_yesterday_is_one_failure_with_the_sandbox_s_own_address(broker):
    write_env(broker.url, broker.credentials, SESSION_TOKEN="99")
    rows, done = checked()
    assert done.exit_code == 1 and rows["codes"]["ok"]
    assert f"{broker.url}{LOGIN}" in rows["session"]["fix"]
    assert "icicidirect" not in rows["session"]["fix"]
    for what in ("clock", "secret"):
        assert rows[what]["found"] == "not checked: it needs the session"


def test_a_broken_code_table_is_one_failure(broker):
    keys = broker.credentials
    write_env(broker.url, keys, SESSION_TOKEN=keys.session_token, TRIES=1)
    broker.schedule(Planned("master_corrupt", count=2))
    rows, _ = checked()
    assert [w for w, row in rows.items() if row["looked"] and not row["ok"]] == ["codes"]
    assert rows["secret"]["found"].startswith("not checked: ")
    rows, done = checked()
    assert done.exit_code == 0 and all(row["ok"] for row in rows.values())


WORDS = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1, max_size=120)


@given(st.lists(WORDS, min_size=1, max_size=12), st.integers(30, 120))
def test_no_word_is_cut_at_any_width(words, width):
    lines = spell_rows([Checked("session", False, " ".join(words), " ".join(words))], width)
    told = " ".join(lines).split()
    assert told == ["session", "failed", *words, "->", *words]
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines[1:])


def test_addresses_and_names_are_whole_at_eighty_columns(broker, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_env(broker.url, broker.credentials, SESSION_TOKEN="99")
    shown = command("breeze", "check").stdout
    assert f"{broker.url}{LOGIN}{broker.credentials.api_key}" in shown and "…" not in shown
    write_env(broker.url, (broker.credentials.api_key, "f"), SESSION_TOKEN=broker.login())
    shown = command("breeze", "check").stdout
    assert "SENSEQUANT_BREEZE_API_KEY" in shown and "SENSEQUANT_BREEZE_API_SECRET" in shown


# --------------------------------------------------------------------------------------- login


def test_login_knocks_before_anybody_opens_a_page(closed):
    file = write_env(closed, ("k", "s"))
    before, begun = file.read_bytes(), time.monotonic()
    done = command("breeze", "login", input="123\n")
    assert done.exit_code == 1 and "Start `sensequant sandbox`" in done.stderr
    assert "Open this address" not in done.stdout and time.monotonic() - begun < 5
    assert file.read_bytes() == before


def test_a_wrong_value_is_refused_in_login_s_own_words(broker):
    file = write_env(broker.url, broker.credentials)
    before = file.read_bytes()
    done = command("breeze", "login", input="99\n")
    assert done.exit_code == 1 and file.read_bytes() == before
    assert "what is pasted must be a session token of today" in done.stderr
    assert "Paste the whole address, or the value after API_Session=" in done.stderr
    assert f"{broker.url}{LOGIN}{broker.credentials.api_key}" in done.stderr
    assert "sensequant breeze login" not in done.stderr, "that is what was just typed"


@pytest.mark.parametrize("pasted", ["", "\n", "  \n"])
def test_an_empty_line_says_what_is_expected(broker, pasted):
    write_env(broker.url, broker.credentials)
    done = command("breeze", "login", input=pasted)
    assert done.exit_code == 2 and "an empty line" in done.stderr
    assert "the value after API_Session=" in done.stderr


def on_a_terminal(typed):
    "Exit code and screen of a login at whose question `typed` is typed."
    ours, theirs = pty.openpty()
    code = "from sensequant.ops.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "breeze", "login"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""
    while b"whole address:" not in seen:
        seen += os.read(ours, 4096)
    time.sleep(0.3)  # until the echo is off
    process.send_signal(signal.SIGINT) if typed is None else os.write(ours, typed)
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:
        os.close(ours)
    return process.wait(20), seen.decode()


def test_ctrl_c_at_the_question_ends_with_130_and_no_noise(broker):
    file = write_env(broker.url, broker.credentials)
    before = file.read_bytes()
    code, seen = on_a_terminal(None)
    assert code == 130 and "Interrupted: nothing was stored" in seen
    assert "Abort" not in seen and "Traceback" not in seen
    assert file.read_bytes() == before


def test_enter_at_the_question_is_answered(broker):
    write_env(broker.url, broker.credentials)
    code, seen = on_a_terminal(b"\n")
    assert code == 2 and "an empty line" in seen


@given(st.dates(date(2021, 1, 1), date(2026, 12, 1)))
def test_no_day_without_a_session_is_called_a_trading_day(day):
    told = spell_session(f"{day:%d-%b-%Y}")
    assert told.startswith("NSE trades on") == is_session(day)
    assert is_session(datetime.strptime(told.split()[-1], "%d-%b-%Y").date())


@pytest.mark.parametrize("told", [None, "", "soon", "2026-11-20", "01-Jan-2999"])
def test_a_day_that_nobody_knows_is_not_guessed(told):
    assert spell_session(told) == "which day NSE trades is not known"


def test_login_names_a_session(broker):
    write_env(broker.url, broker.credentials)
    done = command("breeze", "login", input=broker.login())
    assert done.exit_code == 0 and "NSE trades " in done.stdout


# ------------------------------------------------------------------------------------- sandbox


def test_the_faults_can_be_found_by_name():
    done = command("sandbox", "--faults", "list")
    assert done.exit_code == 0
    shown = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert all(dish.meaning in shown[name] for name, dish in MENU.items())


def test_an_unknown_fault_names_near_ones_and_the_list():
    done = command("sandbox", "--port", "0", "--symbols", "2", "--faults", "html_504=0.1")
    assert done.exit_code == 2
    assert "html_50" in done.stderr and "--faults list" in done.stderr
    with expect_fail(SettingsError, "--faults list"):
        Planned("zzzz")


def test_a_scale_of_nothing_is_refused_in_plain_words():
    for scale in ("0", "nan"):
        done = command("sandbox", "--scale", scale)
        assert done.exit_code == 2 and "--scale must be above 0" in done.stderr
        assert "(" not in done.stderr and "1 is as strict as Breeze" in done.stderr


def test_a_running_sandbox_says_its_limits_and_faults():
    code = "from sensequant.ops.main import main; main()"
    words = ["--port", "0", "--symbols", "2", "--scale", "2", "--faults", "html_503=0.05,drop=0.1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "sandbox", *words], stdout=subprocess.PIPE, text=True
    )
    seen = ""
    while "Press Ctrl-C" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "Stopped after 0 requests" in rest
    assert "200 requests a minute, 10,000 a day, 20 orders a second (2 times Breeze)" in seen
    assert "html_503 5.0% of the requests, drop 10.0% of the requests" in seen


def test_the_help_tells_of_the_list():
    assert "list" in command("sandbox", "--help").stdout
