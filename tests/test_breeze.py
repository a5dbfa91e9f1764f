"""The Breeze client: the real, unmodified SDK against the sandbox broker, never against a mock."""

import base64
import contextlib
import gzip
import http.server
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pickle
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest
from bench_fetch import broker_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from typer.testing import CliRunner

from sensequant.core.errors import SettingsError
from sensequant.core.settings import env_file, load_settings
from sensequant.core.types import Interval
from sensequant.data import breeze as b
from sensequant.live.sandbox import Sandbox
from sensequant.live.sandbox_desk import SandboxSpec
from sensequant.live.sandbox_faults import Planned
from sensequant.live.sandbox_feeds import StreamSpec
from sensequant.market import breeze_protocol as p
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.ops.broker_cli import breeze

MARKET = MarketSpec(symbols=3, start=date(2024, 1, 1), end=date(2024, 6, 28))
V2 = "v2/historicalcharts"
QUICK = b.RetryPolicy(3, 0.02, 1.0)
PYTHON = [sys.executable, "-c"]


@pytest.fixture(scope="module")
def broker():
    "A sandbox that allows sixty times what Breeze does."
    with Sandbox(SandboxSpec(MARKET, scale=600)) as sandbox:
        yield sandbox


def credentials(sandbox):
    "What the sandbox wants to see."
    return b.Credentials(*map(SecretStr, sandbox.credentials))


def client_of(sandbox, folder, policy=QUICK, **limits):
    "A client of `sandbox` with a budget of its own."
    allowance = b.Allowance(folder / "allowance.db", *limits.values() or (60_000, 3_000_000, 6_000))
    return b.BreezeClient(credentials(sandbox), b.Endpoints.at(sandbox.url), allowance, policy)


@pytest.fixture
def client(broker, tmp_path):
    "A client that is not connected yet."
    return client_of(broker, tmp_path)


def daily(client, isec_code="SIMAAA", end=MARKET.end):
    "Daily bars of the whole market's time."
    return client.bars(isec_code, Interval.DAY, MARKET.start, end)


# ------------------------------------------------------------------------------ the SDK, contained


def test_nobody_pays_for_the_sdk_who_does_not_call_breeze():
    code = "import sys, sensequant.data.breeze; print(sorted(sys.modules))"
    held = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=True).stdout
    for name in ("breeze_connect", "socketio", "requests", "aiohttp", "tenacity"):
        assert f"'{name}'" not in held


LEAVES_NOTHING = """
import logging, os, socket, sys, types
sys.modules["config"] = config = types.ModuleType("config")  # a project's own
import urllib.request, urllib3.util.connection as net
import requests, socketio, engineio, pandas
before = list(sys.path), os.getcwd(), urllib.request.urlopen, requests.get, net.HAS_IPV6
loggers, handlers = set(logging.root.manager.loggerDict), list(logging.root.handlers)
hooks = signal_before = __import__("signal").getsignal(2)
from sensequant.data.breeze import Allowance, Wire, load_sdk
from sensequant.market.breeze_protocol import Endpoints
where = Endpoints.at("http://127.0.0.1:1")
mod = load_sdk(where, Wire(where, Allowance("unused.db"), 1.0))
assert before == (sys.path, os.getcwd(), urllib.request.urlopen, requests.get, net.HAS_IPV6)
assert sys.modules["config"] is config and "breeze_connect" not in sys.modules
assert handlers == logging.root.handlers
new = set(logging.root.manager.loggerDict) - loggers
assert not {n for n in new if "API" in n or "Websocket" in n or "quiet" in n}, new
handler = mod.SocketEventBreeze("/", None)
assert __import__("signal").getsignal(2) is signal_before
assert os.listdir() == [], os.listdir()
print(mod.BreezeConnect.__init__.__code__.co_filename)
"""


def test_loading_the_sdk_leaves_nothing_behind(tmp_path):
    done = subprocess.run(
        [*PYTHON, LEAVES_NOTHING], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    file = Path(done.stdout.strip())
    installed = {str(f.locate()): f for f in importlib.metadata.files("breeze-connect")}
    assert str(file) in installed, "the SDK that runs is the installed one"


def test_the_code_that_runs_is_the_installed_file(client, broker):
    client.connect()
    file = Path(client._module.__file__)
    assert compile(file.read_text(), str(file), "exec") == b._source("breeze_connect.py")
    assert client.endpoints.api == client._module.config.API_URL
    assert not (Path.cwd() / "logs").exists()


@pytest.mark.parametrize("version", ["1.0.13", "1.0.68", "0.9"])
def test_an_old_sdk_is_refused(version, tmp_path, monkeypatch, client):
    meta = tmp_path / "site" / f"breeze_connect-{version}.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: breeze-connect\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(str(meta.parent))
    with pytest.raises(SettingsError, match=r"at least 1\.0\.69; found .*pip install") as refused:
        client.connect()
    assert refused.value.found == version


def test_clients_of_two_brokers_live_side_by_side(broker, client, tmp_path):
    other_market = MarketSpec(symbols=2, start=date(2024, 1, 1), end=date(2024, 2, 28), seed=9)
    with Sandbox(SandboxSpec(other_market, seed=5)) as second, ThreadPoolExecutor(8) as pool:
        other = client_of(second, tmp_path / "second")
        jobs = [(client, MARKET), (other, other_market)] * 10
        got = list(
            pool.map(
                lambda job: job[0].bars("SIMAAB", Interval.DAY, job[1].start, job[1].end), jobs
            )
        )
    for (_, market), fetched in zip(jobs, got, strict=True):
        truth = simulate(market).bars("SIM002", Interval.DAY, market.start, market.end)
        pd.testing.assert_frame_equal(fetched.bars, truth, check_freq=False, check_index_type=False)
    assert client.name != other.name and client.name.startswith("breeze-sandbox-")


# ------------------------------------------------------------------------------------------- bars


def test_bars_are_the_market_s(client, broker):
    fetched = daily(client)
    truth = simulate(MARKET).bars("SIM001", Interval.DAY, MARKET.start, MARKET.end)
    pd.testing.assert_frame_equal(fetched.bars, truth, check_freq=False, check_index_type=False)
    assert (fetched.requests, fetched.rows_read, len(fetched.rejected)) == (1, len(truth), 0)
    assert client.simulated and str(fetched.bars.index.tz) == "Asia/Kolkata"


def test_a_cut_answer_is_asked_for_again_in_halves(client, broker):
    fetched = client.bars("SIMAAC", Interval.MINUTE_5, date(2024, 1, 1), date(2024, 3, 1))
    truth = simulate(MARKET).bars("SIM003", Interval.MINUTE_5, date(2024, 1, 1), date(2024, 3, 1))
    pd.testing.assert_frame_equal(fetched.bars, truth, check_freq=False, check_index_type=False)
    asked = [r for r in broker.log[-fetched.requests :] if r.endpoint == V2]
    assert 1000 in [r.rows for r in asked] and fetched.requests == len(asked)


def test_exactly_a_thousand_rows_are_taken_for_cut(tmp_path):
    whole = MarketSpec(symbols=1, start=date(2020, 1, 1), end=date(2024, 6, 28))
    start = simulate(whole).bars("SIM001", Interval.DAY, whole.start, whole.end).index[-1000].date()
    with Sandbox(SandboxSpec(whole)) as sandbox:
        fetched = client_of(sandbox, tmp_path).bars("SIMAAA", Interval.DAY, start, whole.end)
    assert (len(fetched.bars), fetched.requests) == (1000, 3)


def test_the_index_and_every_interval(client):
    assert len(daily(client, "NIFTY").bars) == len(simulate(MARKET).sessions)
    day = date(2024, 1, 31)
    for interval in (Interval.MINUTE_1, Interval.MINUTE_5, Interval.MINUTE_30, Interval.DAY):
        assert len(client.bars("SIMAAA", interval, day, day).bars) == interval.bars_a_session
    with pytest.raises(p.Validation):
        client.bars("SIMAAA", Interval.MINUTE_15, day, day)
    with pytest.raises(p.Validation):
        client.bars("SIMAAA", Interval.DAY, day, day - timedelta(1))


def test_no_data_and_no_such_stock_are_told_apart(client, broker):
    empty = client.bars("SIMAAA", Interval.DAY, date(2022, 1, 3), date(2022, 1, 31))
    assert (len(empty.bars), empty.rows_read) == (0, 0)
    assert list(empty.bars.columns) == ["open", "high", "low", "close", "volume"]
    with pytest.raises(p.UnknownCode, match="Did you mean SIMAAA"):
        daily(client, "SIM001")
    broker.schedule(Planned("master_404", count=3))
    other = pickle.loads(pickle.dumps(client))
    unsure = daily(other, "SIM001")
    assert len(unsure.bars) == 0 and "could not be looked up" in unsure.notes[0]


def test_master_quote_and_customer(client, broker):
    codes = client.master().set_index("isec_code")
    assert codes.loc["SIMAAA", "nse_code"] == "SIM001" and codes.loc["NIFTY", "series"] == "INDEX"
    assert client.requests == 1, "the code table needs no login"
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pd.testing.assert_frame_equal(pool.apply(client.master), client.master())
    quote = client.quote("SIMAAA")
    truth = (
        simulate(MARKET).bars("SIM001", Interval.DAY, MARKET.start, MARKET.end)["close"].iloc[-1]
    )
    assert quote.last_inr == truth and quote.bid_inr < truth < quote.ask_inr
    assert abs(client.customer().clock_skew_s) < 2
    with pytest.raises(p.NoData):
        client.quote("NOBODY")


# ----------------------------------------------------------------------------------------- faults

RECOVERED = (  # name of the fault: requests until the bars were there
    dict.fromkeys(("html_429", "html_502", "html_503", "asp_net", "invalid_user"), 2)
    | dict.fromkeys(("empty_body", "json_null", "json_list", "json_string", "truncated"), 2)
    | dict.fromkeys(("drop", "drop_after", "drop_midway"), 2)
    | dict.fromkeys(("throttled", "throttled_null", "throttled_401"), 2)
    | dict.fromkeys(("no_data", "history_fail", "empty_success"), 2)
    | dict.fromkeys(("rows_high_low", "rows_nan", "rows_null", "rows_outside"), 2)
    | dict.fromkeys(("rows_unordered", "rows_duplicated", "rows_strings"), 1)
)
REFUSED = {
    "expired": p.SessionExpired,
    "invalid_session": p.SessionExpired,
    "wrong_key": p.WrongKey,
    "wrong_checksum": p.WrongKey,
    "static_ip": p.StaticIp,
    "throttled_day": p.DaySpent,
}


@pytest.mark.parametrize("fault", RECOVERED)
def test_a_passing_fault_costs_a_try_and_no_row(client, broker, fault):
    client.connect()
    broker.schedule(Planned(fault, V2))
    fetched = daily(client)
    truth = simulate(MARKET).bars("SIM001", Interval.DAY, MARKET.start, MARKET.end)
    pd.testing.assert_frame_equal(fetched.bars, truth, check_freq=False, check_index_type=False)
    assert fetched.requests == RECOVERED[fault]
    assert broker.log[-fetched.requests].fault == fault


@pytest.mark.parametrize(
    "fault", ["html_503", "drop", "asp_net", "throttled_401", "json_null", "hang"]
)
def test_a_lasting_fault_is_typed_after_three_tries(client, broker, fault):
    client.connect()
    sent = client.requests
    broker.schedule(Planned(fault, V2, count=3))
    began = time.monotonic()
    with pytest.raises(p.BreezeError) as refused:
        daily(client)
    assert client.requests - sent == 3 and refused.value.temporary
    assert time.monotonic() - began < 3 * QUICK.timeout_s + 2
    assert len(daily(client).bars) > 100, "the next call is as good as ever"


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("http", [200, 401, 500])
def test_a_wrong_key_or_session_is_never_tried_again(client, broker, fault, http):
    client.connect()
    sent = client.requests
    broker.schedule(Planned(fault, V2, http=http))
    with pytest.raises(REFUSED[fault]):
        daily(client)
    assert client.requests - sent == 1


def test_rows_that_stay_wrong_are_rejected_with_a_reason(client, broker):
    broker.schedule(Planned("rows_nan", V2, count=2))
    fetched = daily(client)
    if len(fetched.rejected) != 1:  # the sandbox broke another row each time: no two answers agreed
        pytest.fail(f"{fetched.requests} requests, {len(fetched.rejected)} rejected")
    assert fetched.rejected["reason"].iloc[0] == "not_a_number" and fetched.requests == 2


def test_a_dripping_answer_is_given_up(client, broker):
    "A byte every 0.2 s keeps a socket's own time-out from ever being over."
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def drip():
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not done.wait(0.2):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        where = p.Endpoints.at(f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(p.Transport):
            b.Wire(where, client.allowance, 1.0).send("GET", where.api + "slow")
        assert time.monotonic() - began < 2.5
        done.set()
        thread.join()


class Talk(http.server.BaseHTTPRequestHandler):
    "A broker that repeats what it is told, or answers in gzipped chunks."

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        told = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.path.endswith("chunked"):
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            packed = gzip.compress(b'{"Success":[' + b"1," * 40_000 + b'2],"Status":200}')
            for part in (packed[:7], packed[7:90], packed[90:], b""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            return
        secrets = f"{told} {self.headers.get('X-SessionToken')} {self.headers.get('apikey')}"
        body = json.dumps({"Success": None, "Status": 500, "Error": f"Rejected {secrets}"}).encode()
        self.send_response(500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        "Say nothing."


@pytest.fixture
def talker():
    "The address of a server that talks."
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Talk) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield p.Endpoints.at(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_a_broker_that_repeats_secrets_is_not_repeated(talker, tmp_path):
    secrets = ("a-key-1234567", "a-secret-1234567", "50123456")
    allowance = b.Allowance(tmp_path / "a.db", 9999, 9999)
    client = b.BreezeClient(b.Credentials(*map(SecretStr, secrets)), talker, allowance, QUICK)
    with pytest.raises(p.ServerError, match=r"Rejected .*\*\*\*") as refused:
        client.connect()
    told = "".join(traceback.format_exception(refused.value)) + repr(vars(refused.value))
    assert not [s for s in secrets if s in told]


def test_an_answer_in_gzipped_chunks_is_read(talker, client):
    wire = b.Wire(talker, client.allowance, 2.0)
    rows = p.judge_answer(wire.send("GET", talker.api + "chunked"))
    assert len(rows) == 40_001 and rows[-1] == 2


def test_requests_leave_over_ipv4(client):
    "A host with an address of each kind is reached at the one that was declared to the broker."
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this computer has no IPv6")
    with server:
        where = p.Endpoints.at(f"http://[::1]:{server.getsockname()[1]}")
        with pytest.raises(p.Transport, match="no connection"):
            b.Wire(where, client.allowance, 1.0).send("GET", where.api)


def test_a_broker_that_is_not_there(tmp_path, broker):
    with Sandbox(SandboxSpec(MARKET)) as gone:
        client = client_of(gone, tmp_path)
    with pytest.raises(p.Transport, match="no connection"):
        client.connect()
    gone.start()
    assert len(daily(client).bars) > 100
    gone.stop()


def test_a_login_that_was_refused_is_not_tried_by_every_thread(broker, tmp_path):
    wrong = credentials(broker).__class__(*map(SecretStr, (*broker.credentials[:2], "123")))
    client = b.BreezeClient(
        wrong, b.Endpoints.at(broker.url), b.Allowance(tmp_path / "a.db"), QUICK
    )
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(daily, client) for _ in range(16)]
    errors = [job.exception() for job in jobs]
    assert client.requests == 1 and {type(e) for e in errors} == {p.SessionExpired}
    assert "sensequant breeze login" in str(errors[0]) and "midnight IST" in str(errors[0])


def test_a_session_ends_at_midnight(tmp_path):
    with Sandbox(SandboxSpec(MARKET)) as sandbox:
        client = client_of(sandbox, tmp_path)
        daily(client)
        sandbox.advance(timedelta(days=1))
        with pytest.raises(p.SessionExpired, match="midnight IST"):
            daily(client)
        sandbox.login()
        assert len(daily(client_of(sandbox, tmp_path)).bars) > 100


# ---------------------------------------------------------------------------- processes and threads


def fetch_in_child(client):
    "Rows and requests of a client that came by pickle or by fork."
    return len(daily(client).bars), client.requests


def test_a_forked_client_makes_its_own_connection(client):
    daily(client)
    client.quote("SIMAAA")  # three requests here, two in the child
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    child = context.Process(target=lambda: told.put(fetch_in_child(client)))
    child.start()
    assert told.get(timeout=20) == (len(daily(client).bars), 2)
    child.join()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_client_travels_to_another_process(client, method):
    daily(client)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(fetch_in_child, [client] * 2) == [(len(daily(client).bars), 2)] * 2


def test_threads_share_one_login_and_keep_connections(client, broker):
    before = len(broker.log)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda _: len(daily(client).bars), range(40)))
    assert len(set(rows)) == 1 and client.requests == 41
    assert [r.endpoint for r in broker.log[before:]].count("customerdetails") == 1


# -------------------------------------------------------------------------------------- allowance


class Hand:
    "A clock moved by hand; answers come when it passes their moment."

    def __init__(self):
        self.time, self.due = 1.7e9, []

    def now(self):
        return self.time

    def sleep(self, seconds):
        end = self.time + seconds
        for moment, grant in sorted(self.due, key=lambda pair: pair[0]):
            if moment <= end:
                self.time = max(self.time, moment)
                grant.answered()
                self.due.remove((moment, grant))
        self.time = end


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 40), st.floats(0, 1), st.floats(0, 400)), max_size=40),
    st.integers(1, 5),
)
def test_no_minute_at_the_broker_ever_holds_more_calls_than_allowed(calls, most):
    "Whatever the pauses, and whenever a call arrives between its leave and its answer."
    hand, arrivals = Hand(), []
    with tempfile.TemporaryDirectory() as folder:
        allowance = b.Allowance(Path(folder, "a.db"), most, 10**6, 8, hand)
        for pause, share, trip in calls:
            hand.sleep(pause)
            grant = allowance.take()
            arrivals.append(hand.time + share * min(trip, b.HELD_S))
            hand.due.append((hand.time + trip, grant))
    arrivals.sort()
    later = zip(arrivals, arrivals[most:], strict=False)
    assert all(second - first >= 60 - 1e-6 for first, second in later)


def take_many(path, count, limits):
    "Moments of leave, and how many were refused because the day was spent."
    allowance, moments = b.Allowance(path, *limits), []
    for _ in range(count):
        try:
            with allowance.take():
                moments.append(time.time())
        except p.DaySpent:
            return moments, True
    return moments, False


def test_processes_share_one_budget_which_survives_them(tmp_path):
    limits = (10_000, 500, 8)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        parts = pool.starmap(take_many, [(tmp_path / "a.db", 200, limits)] * 3)
    assert sum(len(moments) for moments, _ in parts) == 500
    assert sum(spent for _, spent in parts) >= 1
    again = b.Allowance(tmp_path / "a.db", *limits)
    assert (again.left().day, again.left().minute) == (0, 0)
    with pytest.raises(p.DaySpent, match="500 of 500"):
        again.take()


def test_orders_of_all_threads_keep_to_their_second(tmp_path):
    allowance, moments = b.Allowance(tmp_path / "a.db", 1000, 1000, 5), []

    def order(_):
        with allowance.take("order"):
            moments.append(time.time())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(order, range(18)))
    moments.sort()
    assert all(late - early >= 1 for early, late in zip(moments, moments[5:], strict=False))
    assert moments[-1] - moments[0] < 6


KILLED = """
import sys
from sensequant.data.breeze import Allowance
allowance = Allowance(sys.argv[1], 100000, 1000000, 8)
while True:
    with allowance.take():
        print(".", flush=True)
"""


def test_a_killed_process_leaves_a_whole_budget(tmp_path):
    path = tmp_path / "a.db"
    for _ in range(3):
        victim = subprocess.Popen([*PYTHON, KILLED, str(path)], stdout=subprocess.PIPE)
        victim.stdout.read(400)
        victim.send_signal(signal.SIGKILL)
        said = 400 + len(victim.stdout.read())
        victim.wait()
        allowance = b.Allowance(path, 100_000, 1_000_000, 8)
        counted = 1_000_000 - allowance.left().day
        assert counted >= said // 2, "every call that was made is in the budget"
        with allowance.take():
            pass
    assert 1_000_000 - allowance.left().day == counted + 1


def test_the_real_broker_is_never_asked_for_more_than_it_allows(tmp_path, broker):
    for limits, name in (((101, 1, 1), "minute"), ((1, 5001, 1), "day"), ((1, 1, 11), "orders")):
        with pytest.raises(SettingsError, match=f"{name}.* must be at most"):
            b.BreezeClient(credentials(broker), p.REAL, b.Allowance(tmp_path / "a.db", *limits))
    real = b.BreezeClient(credentials(broker), p.REAL, b.Allowance(tmp_path / "a.db"))
    assert not real.simulated and real.name == "breeze" and real.requests == 0


def test_every_request_of_the_sdk_is_counted(tmp_path):
    with Sandbox(SandboxSpec(MARKET)) as sandbox:
        client = client_of(sandbox, tmp_path, per_minute=100, per_day=1000, orders=8)
        daily(client)
        client.quote("SIMAAA")
        client.master()
        assert len(sandbox.log) == client.requests == 1000 - client.allowance.left().day == 4
        client._session().get_funds()  # straight past the client
        assert len(sandbox.log) == client.requests == 1000 - client.allowance.left().day == 5


@pytest.mark.slow
def test_the_allowed_rate_is_used_and_never_exceeded(tmp_path):
    "Limits scaled sixty-fold, bars judged; every sliding minute as a broker elsewhere counts it."
    allowed, sixtyfold = 3600, SandboxSpec(MARKET, calls_per_minute=60, scale=60)
    with broker_elsewhere(sixtyfold) as (endpoints, secrets, close):
        allowance = b.Allowance(tmp_path / "allowance.db", allowed, 300_000, 480)
        client = b.BreezeClient(secrets, endpoints, allowance, b.RetryPolicy(3, 0.02, 10.0))
        client.connect()
        end = time.time() + 122

        def work(_):
            while time.time() < end:
                got = client.bars("SIMAAA", Interval.DAY, date(2024, 1, 1), date(2024, 1, 31))
                assert len(got.bars) > 15 and got.requests == 1

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        log = close()
    times = [moment for moment, _ in log]
    assert not [error for _, error in log if error]
    assert all(late - early >= 60 for early, late in zip(times, times[allowed:], strict=False))
    assert sum(t < times[0] + 120 for t in times) >= 0.95 * 2 * allowed


# ---------------------------------------------------------------------------------------- secrets

EXERCISE = """
import faulthandler, json, logging, os, sys, threading, traceback
logging.basicConfig(level=1, stream=sys.stderr)
for name in ("socketio.client", "engineio.client", "urllib3", "APILogger", "WebsocketLogger"):
    logging.getLogger(name).setLevel(1)
from datetime import date
from pathlib import Path
from pydantic import SecretStr
from sensequant.core.types import Interval
from sensequant.data.breeze import Allowance, BreezeClient, Credentials, RetryPolicy
from sensequant.market.breeze_protocol import BreezeError, Endpoints
told = json.loads(sys.stdin.read())
def make(*secrets):
    policy = RetryPolicy(2, 0.01, 2.0)
    client = BreezeClient(Credentials(*map(SecretStr, secrets)), Endpoints.at(told["url"]),
                          Allowance(Path("allowance.db"), 9999, 99999, 99), policy)
    print(client, repr(client.credentials), client.credentials, vars(client))
    return client
key, secret, token = told["secrets"]
client = make(key, secret, token)
calls = [
    lambda: client.bars("SIMAAA", Interval.DAY, date(2024, 1, 1), date(2024, 2, 1)),
    lambda: client.bars("NOBODY", Interval.DAY, date(2024, 1, 1), date(2024, 2, 1)),
    lambda: client.quote("SIMAAA"), client.customer, client.master,
    lambda: client.ask("get_funds"), lambda: client.ask("no_such_method"),
    lambda: client.ask("get_historical_data_v2", interval="1day"),
    make(key, secret, token[::-1]).connect, make(key[::-1], secret, token).connect,
    lambda: make(key, secret[::-1], token).quote("SIMAAA"),
]
for call in calls * 3:
    try:
        print(call())
    except BreezeError as error:
        traceback.print_exception(error)
        print(repr(error), vars(error), repr(error.__cause__), repr(error.__context__))
stream = client.stream()
stream.subscribe("4.1!10001", "4.2!10001")
print(stream, stream.get(5), stream.counts)
stream.close()
sdk = client._session()
print("SESSION KEY", sdk.session_key, file=open("key.txt", "w"))
"""


def test_nothing_shows_a_secret(broker, tmp_path):
    "Standard output and error, loggers at their loudest, error texts, tracebacks and files."
    secrets = list(broker.credentials)
    faults = ("expired", "html_502", "wrong_checksum", "static_ip", "asp_net", "json_list", "drop")
    for nth, fault in enumerate(faults, 2):
        broker.schedule(Planned(fault, nth=2 * nth))
    done = subprocess.run(
        [*PYTHON, EXERCISE],
        cwd=tmp_path,
        input=json.dumps({"url": broker.url, "secrets": secrets}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    session_key = (tmp_path / "key.txt").read_text().split()[-1]
    (tmp_path / "key.txt").unlink()
    user = base64.b64encode(f"SB000001:{session_key}".encode()).decode()
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.name.split("-")[0] for f in files} <= {"allowance.db", "allowance.db.lock"}
    seen = done.stdout.encode() + done.stderr.encode() + b"".join(f.read_bytes() for f in files)
    assert b"Traceback" in seen and b"urllib3" in seen, "there was something to look through"
    for secret in (*secrets, session_key, user):
        assert secret.encode() not in seen and secret[::-1].encode() not in seen


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "schlüssel"])
def test_a_credential_that_cannot_be_one_is_refused_unseen(value):
    with pytest.raises(SettingsError) as refused:
        b.Credentials(SecretStr("key"), SecretStr(value), SecretStr("token"))
    assert not value or value not in str(refused.value)


def test_a_missing_setting_is_named():
    with pytest.raises(SettingsError, match="SENSEQUANT_BREEZE_API_SECRET"):
        b.client_from(load_settings(breeze_api_key="key"))
    with pytest.raises(SettingsError, match="sensequant breeze login"):
        b.client_from(load_settings(breeze_api_key="key", breeze_api_secret="secret"))


# ----------------------------------------------------------------------------------------- stream

BOOK, QUOTE = "4.2!10001", "4.1!10001"
STREAMED = b.StreamPolicy(quiet_s=2.0, gone_s=0.5)


@pytest.fixture
def market():
    "A sandbox whose feeds speak when told."
    with Sandbox(SandboxSpec(MARKET, scale=600, stream=StreamSpec(tick_s=0))) as sandbox:
        yield sandbox


def joined(sandbox, times=1):
    "Wait until the sandbox has seen so many joins."
    wait_for(lambda: sum(r.endpoint == "stream/join" for r in sandbox.log) >= times)


def wait_for(happened, seconds=15):
    "Until `happened()`, or fail."
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def drain(stream, seconds=0.5):
    "All ticks that are there or come soon."
    ticks = []
    while tick := stream.get(seconds):
        ticks.append(tick)
    return ticks


def test_books_come_in_order_with_their_instant(market, tmp_path):
    threads = set(threading.enumerate())
    with client_of(market, tmp_path).stream(STREAMED) as stream:
        stream.subscribe(BOOK, QUOTE)
        joined(market)
        market.step(50)
        wait_for(lambda: stream.counts["kept"] >= 100)
        ticks = drain(stream, 0.1)
        books = [t for t in ticks if isinstance(t, p.Depth)]
        quotes = [t for t in ticks if isinstance(t, p.Quote)]
        assert (len(books), len(quotes)) == (50, 50)
        stamps = [t.ts for t in books]
        assert stamps[0].strftime("%H:%M:%S %Z") == "09:15:00 IST"
        assert {b - a for a, b in itertools.pairwise(stamps)} == {timedelta(seconds=15)}
        assert all(t.bids[0].price_inr < t.asks[0].price_inr and len(t.bids) == 5 for t in books)
        stream.unsubscribe(BOOK)
        wait_for(lambda: market.log[-1].endpoint == "stream/leave")
        market.step()
        assert {type(t) for t in drain(stream)} == {p.Quote}
    assert set(threading.enumerate()) == threads


def test_bad_ticks_are_dropped_and_counted(market, tmp_path):
    with client_of(market, tmp_path).stream(STREAMED) as stream:
        stream.subscribe(QUOTE)
        joined(market)
        faults = ["tick_twice", "tick_late", "tick_null", "tick_malformed", "tick_lost"]
        for nth, fault in zip((3, 5, 8, 10, 12), faults, strict=True):
            market.schedule(Planned(fault, "stock", nth=nth))
        market.step(20)
        wait_for(lambda: sum(stream.counts.values()) >= 20)
        ticks = drain(stream, 0.2)
    assert stream.counts == {"kept": 16, "twice": 1, "out of order": 1, "malformed": 2}
    assert sorted(ticks, key=lambda t: t.ts) == ticks and len(ticks) == 16


GONE, QUIET = b.StreamPolicy(quiet_s=60, gone_s=0.5), b.StreamPolicy(quiet_s=1.5, gone_s=60)
LOST = {"link_leave": GONE, "link_close": GONE, "link_kill": QUIET, "link_freeze": QUIET}


@pytest.mark.parametrize("fault", LOST)
def test_a_lost_connection_is_built_anew(market, tmp_path, fault):
    with client_of(market, tmp_path).stream(LOST[fault]) as stream:
        stream.subscribe(BOOK)
        joined(market)
        market.step(2)
        wait_for(lambda: stream.counts["kept"] == 2)
        market.cut_off(fault)
        joined(market, 2)
        market.step(2)
        wait_for(lambda: stream.counts["kept"] >= 4)
        stream.subscribe(QUOTE)  # refused for ever by an SDK that is left alone after an error
        joined(market, 3)
        market.step(2)
        wait_for(lambda: any(isinstance(t, p.Quote) for t in drain(stream, 0.1)))
    assert not [t for t in threading.enumerate() if t.name == "breeze-stream"]


def test_the_sdk_coming_back_by_itself_can_still_subscribe(market, tmp_path):
    "It comes back, and refuses every new token, once an attempt to come back has failed."
    with client_of(market, tmp_path).stream(b.StreamPolicy(quiet_s=60, gone_s=60)) as stream:
        stream.subscribe(BOOK)
        joined(market)
        market.stop()
        handler = stream._sdk.sio_rate_refresh_handler
        wait_for(lambda: handler.authentication is False)
        market.start()
        joined(market, 2)
        stream.subscribe(QUOTE)
        joined(market, 3)
        assert stream.counts["rebuilt"] == 0


def test_a_burst_keeps_its_order(market, tmp_path):
    with client_of(market, tmp_path).stream(STREAMED) as stream:
        put, threads = stream.put, set()
        stream.put = lambda data: threads.add(threading.get_ident()) or put(data)
        stream.subscribe(BOOK, "4.2!10002", "4.2!10003")
        joined(market)
        market.step(300)
        wait_for(lambda: sum(stream.counts.values()) >= 900)
        assert stream.counts == {"kept": 900}
        assert len(threads) == 1, "the SDK alone starts one for each message"


def test_a_broker_that_is_away_for_a_while(market, tmp_path):
    with client_of(market, tmp_path).stream(STREAMED) as stream:
        stream.subscribe(BOOK)
        joined(market)
        market.stop()
        wait_for(lambda: stream.counts["not rebuilt"] >= 1)
        assert isinstance(stream.failure, p.Transport)
        market.start()
        joined(market, 2)
        market.step(3)
        wait_for(lambda: stream.counts["kept"] >= 3)
        assert stream.failure is None


def test_a_stream_that_cannot_begin_leaves_nothing(market, tmp_path):
    threads = set(threading.enumerate())
    client = client_of(market, tmp_path).connect()
    market.schedule(Planned("connect_refused", "stream"))
    with pytest.raises(p.Transport, match="no stream"):
        client.stream(STREAMED)
    wait_for(lambda: set(threading.enumerate()) == threads)


def test_the_newest_ticks_stay_when_nobody_reads(market, tmp_path):
    policy = b.StreamPolicy(quiet_s=30, gone_s=5, kept=10)
    with client_of(market, tmp_path).stream(policy) as stream:
        stream.subscribe(BOOK)
        joined(market)
        market.step(30)
        wait_for(lambda: stream.counts["kept"] == 30)
        ticks = drain(stream, 0.1)
    assert len(ticks) == 10 and stream.counts["overflow"] == 20
    assert ticks[-1].ts.strftime("%H:%M:%S") == "09:22:15"


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def env(broker):
    "A `.env` that points at the sandbox and holds no token yet."
    names = {"URL": broker.url, "API_KEY": broker.credentials.api_key}
    names |= {"API_SECRET": broker.credentials.api_secret, "CALLS_PER_MINUTE": 6000}
    file = env_file()
    file.write_text("# mine\n" + "".join(f"SENSEQUANT_BREEZE_{k}={v}\n" for k, v in names.items()))
    return file


def command(*words, **more):
    "What `sensequant breeze` does."
    return CliRunner().invoke(breeze, words, **more)


@pytest.mark.parametrize("pasted", ["{}", "https://127.0.0.1/?API_Session={}&x=1", " '{}' "])
def test_login_stores_a_token_that_the_broker_took(env, broker, pasted):
    token = broker.credentials.session_token
    done = command("login", input=pasted.format(token) + "\n")
    assert done.exit_code == 0, done.output
    assert broker.url + "/apiuser/login?api_key=" in done.output and "midnight IST" in done.output
    assert token not in done.output and broker.credentials.api_secret not in done.output
    assert env.read_text().startswith("# mine\n") and env.read_text().endswith(f"TOKEN={token}\n")
    assert env.stat().st_mode & 0o777 == 0o600
    assert len(daily(b.client_from(load_settings())).bars) > 100
    command("login", input=token)
    assert env.read_text().count("SESSION_TOKEN") == 1


@pytest.mark.parametrize(
    ("pasted", "code", "said"),
    [("", 2, "digits and letters"), ("https://x/?a=1", 2, "API_Session="), ("99", 1, "session")],
)
def test_login_stores_nothing_that_was_refused(env, pasted, code, said):
    before = env.read_bytes()
    done = command("login", input=pasted)
    assert done.exit_code == code and said in done.stderr
    assert env.read_bytes() == before and list(env.parent.glob(".*.tmp")) == []


def test_a_terminal_does_not_show_what_is_pasted(env, broker):
    ours, theirs = pty.openpty()
    code = "from sensequant.ops.broker_cli import breeze; breeze()"
    process = subprocess.Popen(
        [*PYTHON, code, "login"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = b""
    while b"whole address:" not in seen:
        seen += os.read(ours, 4096)
    time.sleep(0.3)  # until the echo is off
    os.write(ours, broker.credentials.session_token.encode() + b"\n")
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    assert process.wait() == 0, seen.decode()
    assert b"Logged in" in seen and broker.credentials.session_token.encode() not in seen


def test_check_says_in_one_screen_what_is_in_order(env, broker):
    assert command("check").exit_code == 2, "no token yet"
    command("login", input=broker.credentials.session_token)
    done = command("check", "--json")
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert done.exit_code == 0 and all(row["ok"] for row in rows.values())
    assert list(rows) == ["broker", "SDK", "session", "clock", "codes", "secret", "limits"]
    assert "1.0.69" in rows["SDK"]["found"] and "3 shares" in rows["codes"]["found"]
    assert not [r for r in broker.log if r.endpoint.endswith(("order", "squareoff"))]
    shown = command("check")
    assert shown.exit_code == 0 and shown.stdout.count(" ok ") == 7


def test_check_names_each_thing_that_is_wrong(env, broker, monkeypatch):
    command("login", input=broker.credentials.session_token)
    good = env.read_text()

    def failed(text=good):
        env.write_text(text)
        done = command("check", "--json")
        assert done.exit_code == 1
        return {row["what"]: row for row in json.loads(done.stdout) if not row["ok"]}

    wrong = failed(good.replace("SESSION_TOKEN=", "SESSION_TOKEN=9"))
    assert set(wrong) == {"session", "clock", "secret"}
    assert "sensequant breeze login" in wrong["session"]["fix"]
    wrong = failed(good.replace("API_SECRET=", "API_SECRET=f"))
    assert set(wrong) == {"secret"} and "API_SECRET" in wrong["secret"]["fix"]
    broker.schedule(Planned("master_corrupt", count=6))
    assert set(failed(good + "SENSEQUANT_BREEZE_BACKOFF_S=0.01\n")) == {"codes", "secret"}
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 90)
    assert set(failed()) == {"clock"}


STORING = """
import sys
from pathlib import Path
from sensequant.ops.broker_cli import store_token
n = 10_000_000
while True:
    store_token(Path(sys.argv[1]), str(n))
    print(n, flush=True)
    n += 1
"""


def test_a_killed_login_leaves_a_whole_env(tmp_path):
    file = tmp_path / "real" / ".env"
    file.parent.mkdir()
    file.write_text("A=1\nSENSEQUANT_BREEZE_SESSION_TOKEN=1\nB='2'\n")
    (tmp_path / ".env").symlink_to(file)
    for _ in range(3):
        victim = subprocess.Popen(
            [*PYTHON, STORING, str(tmp_path / ".env")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(30):
            victim.stdout.readline()
        victim.kill()
        victim.communicate()
        first, token, last = file.read_text().splitlines()
        assert (first, last) == ("A=1", "B='2'")
        assert re.fullmatch(r"SENSEQUANT_BREEZE_SESSION_TOKEN=1\d{7}", token)
    assert (tmp_path / ".env").is_symlink()


def test_the_sandbox_command_prints_lines_for_the_env(tmp_path):
    code = "import typer; from sensequant.ops.broker_cli import sandbox; typer.run(sandbox)"
    words = ["--port", "0", "--symbols", "2", "--scale", "10", "--faults", "html_503=0.5"]
    process = subprocess.Popen([*PYTHON, code, *words], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(7)]
    values = dict(line.strip().split("=", 1) for line in lines if line.startswith("SENSEQUANT"))
    env_file().write_text("".join(line for line in lines if line.startswith("SENSEQUANT")))
    settings = load_settings(breeze_backoff_s=0.01, breeze_tries=9)
    client = b.client_from(settings)
    assert len(client.master()) == 3 and settings.breeze_url == values["SENSEQUANT_BREEZE_URL"]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stdout.close()
