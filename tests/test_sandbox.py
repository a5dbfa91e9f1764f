"""The sandbox broker, asked by the unmodified SDK in a process of its own and by plain HTTP."""

import base64
import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date, timedelta
from functools import partial

import pandas as pd
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sensequant.core.errors import BrokerError, SettingsError
from sensequant.core.testing import expect_fail, tiny_bars
from sensequant.core.types import BAR_COLUMNS, IST, Interval
from sensequant.data.bars import BarStore
from sensequant.live.sandbox import Sandbox, env_lines
from sensequant.live.sandbox_desk import (
    ENDPOINTS,
    LOGIN,
    MASTER,
    USER,
    V1,
    V2,
    SandboxSpec,
    busiest,
    signature,
)
from sensequant.live.sandbox_faults import MENU, Planned
from sensequant.live.sandbox_feeds import StreamSpec
from sensequant.live.sandbox_market import INDEX, SimulatedSource, Stored
from sensequant.market.simulator import MarketSpec, simulate

MARKET = MarketSpec(symbols=4, start=date(2023, 1, 2), end=date(2024, 6, 28))
HISTORY = "v2/historicalcharts"
plain = requests.Session()


@pytest.fixture
def sandbox():
    "A sandbox without limits that matter; its feeds move by hand."
    stream = StreamSpec(tick_s=0, ping_interval_s=1, ping_timeout_s=1)
    with Sandbox(SandboxSpec(MARKET, scale=1_000, stream=stream)) as broker:
        yield broker


# Asking by plain HTTP, as the SDK does it


def session_header(broker):
    "What the SDK makes of customer details."
    body = {"SessionToken": broker.credentials.session_token, "AppKey": broker.credentials.api_key}
    told = plain.get(f"{broker.url}{V1}customerdetails", data=json.dumps(body), timeout=5).json()
    return told["Success"]["session_token"]


def ask(broker, bearer, timeout=5, **changed):
    "History of version 2 of the first share's days, with some parameters changed."
    asked = {"interval": "1day", "stock_code": "SIMAAA", "exch_code": "NSE"}
    asked |= {"from_date": "2023-01-01T00:00:00.000Z", "to_date": "2024-12-31T23:59:59.000Z"}
    headers = {"apikey": broker.credentials.api_key, "X-SessionToken": bearer}
    url = f"{broker.url}{V2}historicalcharts"
    return plain.get(url, params=asked | changed, headers=headers, timeout=timeout)


def ask_signed(broker, bearer, name="funds", method="GET", secret=None, **body):
    "A call of version 1."
    text, stamp = json.dumps(body, separators=(",", ":")), "2024-01-31T05:00:00.000Z"
    headers = {"X-AppKey": broker.credentials.api_key, "X-SessionToken": bearer}
    checksum = signature(stamp, text.encode(), secret or broker.credentials.api_secret)
    headers |= {"X-Timestamp": stamp, "X-Checksum": checksum}
    return plain.request(method, f"{broker.url}{V1}{name}", data=text, headers=headers, timeout=5)


@pytest.fixture
def bearer(sandbox):
    "The session that the sandbox's clients use."
    return session_header(sandbox)


def frame(rows, zone=IST):
    "Rows of a history as bars."
    table = pd.DataFrame(rows)
    index = pd.DatetimeIndex(pd.to_datetime(table["datetime"])).tz_localize(zone)
    types = dict.fromkeys(BAR_COLUMNS[:4], float) | {"volume": int}
    return table.set_index(index.rename("ts"))[list(BAR_COLUMNS)].astype(types)


def same(told, truth):
    "The rows are the bars, to the last bit."
    pd.testing.assert_frame_equal(told, truth, check_index_type=False, check_freq=False)


# Asking by the SDK

SDK = """
import importlib.util, json, os, sys, types
url, key, secret, token = sys.argv[1:]
folder = importlib.util.find_spec("breeze_connect").submodule_search_locations[0]
config = types.ModuleType("config")
exec(open(os.path.join(folder, "config.py")).read(), config.__dict__)
config.API_URL, config.BREEZE_NEW_URL = url + "/breezeapi/api/v1/", url + "/api/v2/"
config.LIVE_FEEDS_URL = config.LIVE_STREAM_URL = config.LIVE_OHLC_STREAM_URL = url
config.SECURITY_MASTER_URL = url + "/MotherAppMaster/SecurityMaster.zip"
sys.modules["config"] = config
import breeze_connect
module = sys.modules["breeze_connect.breeze_connect"]
ticks = []

def new(key=key, secret=secret, token=token):
    made = module.BreezeConnect(api_key=key)
    made.on_ticks = ticks.append
    made.generate_session(api_secret=secret, session_token=token)
    return made

def attempt(what, *given, **named):
    "What comes back, or the text of what is raised."
    try:
        return what(*given, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def take():
    told = list(ticks)
    ticks.clear()
    return told

def close(made):
    for name in ("rate_refresh", "ohlcv_stream", "order_refresh"):
        handler = getattr(made, f"sio_{name}_handler")
        if handler:
            handler.sio.disconnect()

print("ready", flush=True)
for line in sys.stdin:
    try:
        answer = eval(line, globals())
    except SyntaxError:
        answer = exec(line, globals())
    print(json.dumps(answer, default=str), flush=True)
"""


class Sdk:
    "The unmodified SDK in a process and a folder of its own."

    def __init__(self, broker, folder):
        command = [sys.executable, "-c", SDK, broker.url, *broker.credentials]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.noise = open(folder / "stderr.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(command, cwd=folder, stderr=self.noise, **pipes)
        assert self.process.stdout.readline() == "ready\n", (folder / "stderr.txt").read_text()

    def do(self, line):
        "The value of a line of Python over there."
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait_ticks(self, at_least, seconds=10):
        "Ticks as they come, until there are enough."
        told, until = [], time.monotonic() + seconds
        while len(told) < at_least and time.monotonic() < until:
            told += self.do("take()")
            time.sleep(0.02)
        time.sleep(0.1)
        return told + self.do("take()")

    def end(self):
        "Close the process."
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
        self.noise.close()


@pytest.fixture
def sdk(sandbox, tmp_path):
    "An SDK that is logged in as `b`."
    client = Sdk(sandbox, tmp_path)
    client.do("b = new()")
    yield client
    client.end()


def test_the_sdk_logs_in_and_gets_its_history(sandbox, sdk):
    market = simulate(MARKET)
    assert sdk.do("b.user_id") == USER
    assert sdk.do(f"b.get_customer_details({sandbox.credentials.session_token!r})")["Status"] == 200
    call = (
        "b.get_historical_data{}(interval='{}', from_date='2024-01-01T00:00:00.000Z', "
        "to_date='{}T15:30:00.000Z', stock_code='{}', exchange_code='NSE', product_type='cash')"
    )
    for interval, end in (("1day", "2024-06-28"), ("5minute", "2024-01-15")):
        for number, code in enumerate(("SIMAAA", "SIMAAD"), 1):
            symbol = f"SIM00{1 if number == 1 else 4}"
            truth = market.bars(
                symbol, Interval(interval), date(2024, 1, 1), date.fromisoformat(end)
            )
            told = sdk.do(call.format("_v2", interval, end, code))
            assert told["Status"] == 200 and told["Error"] is None
            same(frame(told["Success"]), truth)
            older = sdk.do(call.format("", interval, end, code))
            same(frame(older["Success"]), truth)
            assert {type(row["open"]) for row in older["Success"]} == {str}
    assert sdk.do(call.format("_v2", "1day", "2024-06-28", "SIM001"))["Success"] == []
    assert sdk.do(call.format("", "1day", "2024-06-28", "SIM001"))["Error"] == (
        "Historical Data Fail"
    )
    assert not any(r.fault or r.status != 200 for r in sandbox.log)


def test_the_sdk_finds_names_quotes_and_an_account(sdk):
    found = sdk.do("b.get_names('NSE', 'SIM003')")
    assert (found["isec_stock_code"], found["isec_token"]) == ("SIMAAC", "10003")
    assert sdk.do("b.get_names('NSE', 'NIFTY')")["isec_token_level1"] == "4.1!NIFTY 50"
    assert sdk.do("b.get_names('NSE', 'TCS')")["Error"] == "Result Not Found"
    quotes = sdk.do("b.get_quotes('SIMAAA', 'NSE', '', 'cash', '', '')")["Success"]
    last = simulate(MARKET).bars("SIM001").iloc[-2:]
    assert [q["exchange_code"] for q in quotes] == ["NSE", "BSE"]
    assert (quotes[0]["ltp"], quotes[0]["previous_close"]) == tuple(last["close"])[::-1]
    assert quotes[0]["lower_circuit"] < quotes[0]["best_bid_price"] < quotes[0]["best_offer_price"]
    assert sdk.do("b.get_funds()")["Success"]["unallocated_balance"] == "1000000"
    assert sdk.do("b.get_demat_holdings()")["Success"] == []
    assert sdk.do("b.get_portfolio_positions()")["Success"] == []


def test_orders_are_answered_in_the_broker_s_shape(sandbox, sdk):
    order = "stock_code='SIMAAA', exchange_code='NSE', product='cash', action='buy', quantity='1'"
    order += ", price='100', validity='day'"
    for kind in ("limit", "market"):
        told = sdk.do(f"b.place_order({order}, order_type='{kind}')")
        assert (told["Success"], told["Status"]) == (None, 500) and "no orders yet" in told["Error"]
    assert "no orders yet" in sdk.do("b.cancel_order('NSE', '1')")["Error"]
    assert "no orders yet" in sdk.do("b.get_order_detail('NSE', '1')")["Error"]
    assert [r.endpoint for r in sandbox.log].count("order") == 4


LOGINS = {
    "invalid_session": "Please check session key",
    "wrong_key": "Please check api key",
    "expired": "Session key is expired",
    "throttled": "Unable to retrieve customer details",
    "html_503": "Invalid JSON format",
    "empty_body": "Invalid JSON format",
    "json_list": "Unexpected format",
    "drop": "Connection aborted",
}


def test_a_login_fails_in_every_known_way(sandbox, sdk):
    sandbox.schedule(*(Planned(name, "customerdetails") for name in LOGINS))
    for name, words in LOGINS.items():
        assert words in sdk.do("attempt(new)"), name
    assert sdk.do("attempt(new).user_id") == USER
    assert "Please check api key" in sdk.do("attempt(new, key='nobody')")
    assert "Please check session key" in sdk.do("attempt(new, token='yesterday')")
    sandbox.advance(timedelta(days=1))
    assert "Session key is expired" in sdk.do("attempt(new)")
    assert sdk.do(f"attempt(new, token={sandbox.login()!r}).user_id") == USER


CALLS = {
    "html_429": "Expecting value: line 1 column 1",
    "html_502": "Expecting value: line 1 column 1",
    "html_503": "Expecting value: line 1 column 1",
    "empty_body": "Expecting value: line 1 column 1",
    "truncated": "Error in get_historical_data_v2",
    "drop": "Connection aborted",
    "drop_after": "Connection aborted",
    "drop_midway": "Connection broken",
    "json_null": None,
    "json_list": [],
    "json_string": "Server is busy",
    "asp_net": {"Message": "An error has occurred."},
    "expired": {"Success": None, "Status": 500, "Error": "Resource not available."},
    "static_ip": {"Success": None, "Status": 500},
    "invalid_user": {"Error": "Invalid User Details", "Status": 500},
    "no_data": {"Error": "No Data Found"},
    "throttled": {"Status": 5},
    "throttled_null": {"Success": None, "Status": 5},
    "throttled_401": {"Status": 5},
    "throttled_day": {"Error": "Limit exceed: API call per day: "},
    "empty_success": {"Success": [], "Status": 200, "Error": None},
}
WEEK = (
    "attempt(b.get_historical_data_v2, interval='1day', from_date='2024-01-01T00:00:00.000Z', "
    "to_date='2024-01-05T00:00:00.000Z', stock_code='SIMAAA', exchange_code='NSE')"
)


def test_the_sdk_meets_every_answer_of_the_study(sandbox, sdk):
    sandbox.schedule(*(Planned(name, HISTORY) for name in CALLS))
    for name, wanted in CALLS.items():
        told = sdk.do(WEEK)
        if isinstance(wanted, dict):
            assert wanted.items() <= told.items(), name
            assert ("Success" in told) == (
                name not in ("throttled", "throttled_401", "asp_net") and name != "throttled_day"
            ), name
        elif isinstance(wanted, str):
            assert wanted in told, name
        else:
            assert told == wanted, name
    good = sdk.do(WEEK)
    assert len(good["Success"]) == 5
    assert [r.fault for r in sandbox.log if r.endpoint == HISTORY] == [*CALLS, ""]


# Keys, sessions, quotas


def test_each_call_of_version_1_is_verified_on_its_raw_body(sandbox, bearer):
    assert ask_signed(sandbox, bearer).json()["Status"] == 200
    wrong = ask_signed(sandbox, bearer, secret="guessed")
    assert wrong.json() == {"Status": 5, "Error": "Authentication Fail :: Invalid Checksum."}
    assert ask_signed(sandbox, "bm9ib2R5").json()["Error"] == "Invalid session."
    text, stamp = '{"stock_code":"SIMAAA"}', "2024-01-31T05:00:00.000Z"
    checksum = signature(stamp, text.encode(), sandbox.credentials.api_secret)
    headers = {"X-AppKey": sandbox.credentials.api_key, "X-SessionToken": bearer}
    headers |= {"X-Timestamp": stamp, "X-Checksum": checksum}
    quotes = partial(plain.get, f"{sandbox.url}{V1}quotes", headers=headers, timeout=5)
    assert quotes(data=text).json()["Status"] == 200
    assert quotes(data=text + " ").json()["Status"] == 5
    assert quotes(data=text, headers=headers | {"X-Timestamp": stamp[:-1]}).json()["Status"] == 5


def test_version_2_needs_key_and_session(sandbox, bearer):
    assert ask(sandbox, bearer).json()["Status"] == 200
    assert ask(sandbox, "").json()["Error"] == "Invalid session."
    url = f"{sandbox.url}{V2}historicalcharts"
    bare = plain.get(url, headers={"X-SessionToken": bearer}, timeout=5)
    assert bare.json()["Error"] == "Public Key does not exist."


def test_a_session_ends_at_midnight_and_the_next_login_works(sandbox, bearer):
    now = sandbox.desk.now()
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    sandbox.advance(midnight - now - timedelta(minutes=5))
    assert ask(sandbox, bearer).json()["Status"] == 200
    sandbox.advance(timedelta(minutes=6))
    over = ask(sandbox, bearer)
    assert (over.status_code, over.json()["Error"]) == (500, "Resource not available.")
    page = plain.get(f"{sandbox.url}{LOGIN}?api_key={sandbox.credentials.api_key}", timeout=5)
    assert page.url.endswith("API_Session=" + sandbox.credentials.session_token)
    fresh = session_header(sandbox)
    assert fresh != bearer and ask(sandbox, fresh).json()["Status"] == 200
    sandbox.expire()
    assert ask(sandbox, fresh).json()["Error"] == "Resource not available."
    refused = plain.get(f"{sandbox.url}{LOGIN}?api_key=nobody", timeout=5)
    assert refused.status_code == 400


@pytest.mark.parametrize("http", [200, 401])
def test_the_minute_slides_and_no_more_than_the_limit_gets_through(http):
    spec = SandboxSpec(MARKET, calls_per_minute=30, throttle_http=http)
    with Sandbox(spec) as broker, ThreadPoolExecutor(8) as pool:
        bearer = session_header(broker)
        answers = list(pool.map(lambda _: ask(broker, bearer), range(60)))
        told = [answer.json() for answer in answers]
        assert sum(t["Status"] == 200 for t in told) == 29
        refused = next(a for a in answers if a.json()["Status"] == 5)
        assert refused.status_code == http and "Success" not in refused.json()
        assert refused.json()["Error"] == "Limit exceed: API call per minute:Try after some time"
        broker.advance(timedelta(seconds=61))
        assert ask(broker, bearer).json()["Status"] == 200


def test_the_day_s_budget_survives_a_restart_and_begins_anew_at_midnight():
    with Sandbox(SandboxSpec(MARKET, calls_per_day=5)) as broker:
        bearer, place = session_header(broker), broker.url
        told = [ask(broker, bearer).json()["Status"] for _ in range(3)]
        broker.restart()
        assert broker.url == place
        told += [ask(broker, bearer).json()["Status"] for _ in range(3)]
        assert told == [200, 200, 200, 200, 5, 5]
        assert ask(broker, bearer).json()["Error"] == "Limit exceed: API call per day: "
        broker.advance(timedelta(days=1))
        broker.login()
        assert ask(broker, session_header(broker)).json()["Status"] == 200


def test_orders_have_a_limit_of_their_own():
    with Sandbox(SandboxSpec(MARKET, orders_per_second=2, scale=2)) as broker:
        bearer = session_header(broker)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(ask_signed, broker, bearer, "order", "POST") for _ in range(24)]
        told = [call.result().json()["Error"] for call in calls]
        assert {text.split(":")[0] for text in told} <= {
            "The sandbox takes no orders yet",
            "Limit exceed",
        }
        admitted = [r for r in broker.log if r.endpoint == "order" and "yet" in r.error]
        assert len(admitted) >= 4 and busiest(admitted, 1) == 4
        assert ask_signed(broker, bearer, "funds").json()["Status"] == 200


def test_two_brokers_live_side_by_side_and_do_not_take_each_other_s_keys():
    other = SandboxSpec(MarketSpec(symbols=2, start=date(2024, 1, 1), end=date(2024, 3, 1)), seed=2)
    with Sandbox(SandboxSpec(MARKET)) as one, Sandbox(other) as two:
        bearers = session_header(one), session_header(two)
        assert one.url != two.url and set(one.credentials).isdisjoint(two.credentials)
        counts = [
            len(ask(b, s).json()["Success"]) for b, s in zip((one, two), bearers, strict=True)
        ]
        assert counts == [len(simulate(b.spec.market).bars("SIM001")) for b in (one, two)]
        crossed = plain.get(
            f"{two.url}{V2}historicalcharts",
            headers={"apikey": one.credentials.api_key, "X-SessionToken": bearers[0]},
            timeout=5,
        )
        assert crossed.json()["Error"] == "Public Key does not exist."


def test_the_same_seed_makes_the_same_keys_and_lines_for_env():
    one, two = Sandbox(SandboxSpec(MARKET, port=4242)), Sandbox(SandboxSpec(MARKET, port=4242))
    assert env_lines(one) == env_lines(two)
    names = [line.split("=")[0] for line in env_lines(one)]
    assert names == [
        f"SENSEQUANT_BREEZE_{n}" for n in ("URL", "API_KEY", "API_SECRET", "SESSION_TOKEN")
    ]


# Histories


MINUTES = {"1minute": 1, "5minute": 5, "30minute": 30, "1day": 1_440}
days = st.dates(date(2022, 12, 25), date(2024, 7, 10))
clocks = st.times().map(lambda t: t.replace(microsecond=0))


@pytest.fixture(scope="module")
def open_broker():
    "One sandbox for many questions."
    with Sandbox(SandboxSpec(MARKET, scale=1_000_000)) as broker:
        yield broker, session_header(broker)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*MINUTES]), st.sampled_from(["SIMAAB", "NIFTY"]), st.tuples(days, clocks),
    st.integers(0, 40), clocks,
)  # fmt: skip
def test_any_window_gives_its_last_thousand_bars(open_broker, interval, code, start, length, until):
    broker, bearer = open_broker
    source = broker.desk.library.source
    end = start[0] + timedelta(days=length * (10 if interval == "1day" else 1))
    low, high = f"{start[0]}T{start[1]}", f"{end}T{until}"
    told = ask(
        broker, bearer, interval=interval, stock_code=code,
        from_date=f"{low}.000Z", to_date=f"{high}.000Z",
    ).json()  # fmt: skip
    truth = source.bars(source_listing(source, code), Interval(interval), start[0], end)
    if interval != "1day":
        truth = truth[truth.index >= pd.Timestamp(low, tz=IST)] if len(truth) else truth
        truth = truth[truth.index <= pd.Timestamp(high, tz=IST)] if len(truth) else truth
    if low > high:
        truth = truth[:0]
    assert len(told["Success"]) == min(len(truth), 1_000)
    if len(truth):
        same(frame(told["Success"]), truth[-1_000:])


def source_listing(source, code):
    "The listing of a code."
    return next(line for line in source.listings if line.isec_code == code)


def test_more_than_a_thousand_candles_lose_the_first_ones_without_a_word(sandbox, bearer):
    told = ask(sandbox, bearer, interval="1minute", from_date="2024-01-01T00:00:00.000Z").json()
    truth = simulate(MARKET).bars("SIM001", Interval.MINUTE_1, date(2024, 6, 1))
    assert (told["Status"], told["Error"], len(told["Success"])) == (200, None, 1_000)
    same(frame(told["Success"]), truth[-1_000:])
    assert sandbox.log[-1].rows == 1_000


def test_what_does_not_exist_is_empty_or_refused_as_the_broker_does(sandbox, bearer):
    for changed in (
        {"stock_code": "SIM001"}, {"exch_code": "BSE"}, {"interval": "1second"},
        {"from_date": "2024-01-06T00:00:00.000Z", "to_date": "2024-01-07T00:00:00.000Z"},
        {"from_date": "2024-01-09T00:00:00.000Z", "to_date": "2024-01-08T00:00:00.000Z"},
    ):  # fmt: skip
        assert ask(sandbox, bearer, **changed).json() == {
            "Error": None, "Status": 200, "Success": []}, changed  # fmt: skip
    for stamp in ("", "soon", "2024-13-01T00:00:00.000Z", "99999-01-01", "NaT", "\x00"):
        assert ask(sandbox, bearer, to_date=stamp).json()["Error"] == "Invalid date format", stamp


def test_bars_come_late_and_minutes_begin_late():
    spec = SandboxSpec(MARKET, scale=100, intraday_from=date(2024, 3, 1))
    with Sandbox(spec) as broker:
        bearer = session_header(broker)
        whole = len(ask(broker, bearer).json()["Success"])
        broker.show_until(date(2024, 6, 26))
        early = ask(broker, bearer).json()["Success"]
        assert early[-1]["datetime"][:10] == "2024-06-26" and len(early) < whole
        five = partial(ask, broker, bearer, interval="5minute")
        assert five(to_date="2024-02-29T15:30:00.000Z").json()["Success"] == []
        first = five(to_date="2024-03-04T15:30:00.000Z").json()["Success"][0]
        assert first["datetime"] == "2024-03-01 09:15:00"
        broker.show_until(date(2024, 6, 28))
        assert len(ask(broker, bearer).json()["Success"]) == whole


def test_stored_bars_are_served_under_the_codes_of_icici(tmp_path):
    store, minute = BarStore(tmp_path), Interval.MINUTE_5
    daily = tiny_bars([100.0, 101.5, 99.95, 102.0])
    store.write("csv-demo", "RELIANCE", Interval.DAY, daily)
    store.write("csv-demo", "ZZTOP", Interval.DAY, daily * 2)
    ts = pd.date_range("2024-01-02 09:15", periods=75, freq="5min", tz=IST, name="ts")
    sparse = pd.DataFrame(dict.fromkeys(BAR_COLUMNS[:4], 100.5), index=ts).assign(volume=7)[::3]
    store.write("csv-demo", "RELIANCE", minute, sparse.astype({"volume": "int64"}))
    with Sandbox(SandboxSpec(Stored(tmp_path, "csv-demo"))) as broker:
        bearer = session_header(broker)
        same(frame(ask(broker, bearer, stock_code="RELIND").json()["Success"]), daily)
        told = ask(broker, bearer, stock_code="RELIND", interval="5minute").json()["Success"]
        assert [row["datetime"][11:16] for row in told] == [f"{t:%H:%M}" for t in sparse.index]
        assert ask(broker, bearer, stock_code="RELIANCE").json()["Success"] == []
        assert "INE002A01018" in master(broker).read("NSEScripMaster.txt").decode()


# Faults


def master(broker):
    "The security master."
    return zipfile.ZipFile(io.BytesIO(plain.get(broker.url + MASTER, timeout=5).content))


def test_the_security_master_fails_in_every_known_way(sandbox):
    get = partial(plain.get, sandbox.url + MASTER)
    sandbox.schedule(*(Planned(n) for n in ("master_404", "master_corrupt", "master_cut")))
    sandbox.schedule(Planned("master_empty"), Planned("master_hang", seconds=60))
    sandbox.schedule(Planned("html_503", "master"))
    assert get(timeout=5).status_code == 404
    for _ in range(2):
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(get(timeout=5).content))
    assert len(master(sandbox).read("NSEScripMaster.txt").splitlines()) == 1
    with pytest.raises(requests.exceptions.ReadTimeout):
        get(timeout=0.2)
    assert get(timeout=5).status_code == 503
    lines = master(sandbox).read("NSEScripMaster.txt").splitlines()
    assert len(lines) == 1 + 4 + 1 + 1  # header, shares, index, bond
    faults = ["master_404", "master_corrupt", "master_cut", "master_empty", "master_hang"]
    assert [r.fault for r in sandbox.log] == [*faults, "html_503", ""]
    assert [r.status for r in sandbox.log][4] == 0


def test_rows_are_spoilt_as_the_menu_says(sandbox, bearer):
    good = ask(sandbox, bearer).json()["Success"]
    names = [name for name, dish in MENU.items() if dish.family == "rows"]
    sandbox.schedule(*(Planned(name, HISTORY) for name in names))
    told = {name: ask(sandbox, bearer).json()["Success"] for name in names}
    assert all(rows != good for rows in told.values())
    stamps = {name: [row["datetime"] for row in rows] for name, rows in told.items()}
    assert sorted(stamps["rows_unordered"]) == stamps["rows_nan"] != stamps["rows_unordered"]
    assert len(stamps["rows_duplicated"]) > len(set(stamps["rows_duplicated"])) == len(good)
    assert {type(row["close"]) for row in told["rows_strings"]} == {str}
    assert sum(row["high"] < row["low"] for row in told["rows_high_low"]) == 1
    assert sum(row["close"] != row["close"] for row in told["rows_nan"]) == 1
    assert sum(row["open"] is None for row in told["rows_null"]) == 1
    assert stamps["rows_outside"][0] < "2023-01-01" and told["rows_outside"][1:] == good
    assert {len(stamp) for stamp in stamps["rows_dates"]} == {10}
    assert len(told["rows_missing"]) == len(good) - len(good) // 5
    assert ask(sandbox, bearer).json()["Success"] == good


def test_connections_break_before_in_and_after_the_answer(sandbox, bearer):
    sandbox.schedule(*(Planned(n, HISTORY) for n in ("drop", "drop_midway", "drop_after")))
    for error in ("ConnectionError", "ChunkedEncodingError", "ConnectionError"):
        with pytest.raises(requests.exceptions.RequestException) as raised:
            ask(sandbox, bearer)
        assert type(raised.value).__name__ == error
    last = sandbox.log[-3:]
    assert [r.status for r in last] == [0, 0, 0]
    assert [r.rows is None for r in last] == [True, False, False]
    assert ask(sandbox, bearer).json()["Status"] == 200


def test_a_hanging_answer_holds_up_nobody_else(sandbox, bearer):
    sandbox.schedule(Planned("hang", HISTORY, seconds=60), Planned("late", HISTORY, seconds=0.3))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, sandbox, bearer, timeout=1.0)
        time.sleep(0.2)
        started = time.monotonic()
        assert ask(sandbox, bearer).json()["Status"] == 200
        assert time.monotonic() - started >= 0.3
        assert ask(sandbox, bearer).json()["Status"] == 200
        with pytest.raises(requests.exceptions.ReadTimeout):
            waiting.result()
    assert [(r.fault, r.status) for r in sandbox.log[-3:]] == [
        ("hang", 0),
        ("late", 200),
        ("", 200),
    ]


def test_a_fault_may_carry_another_http_status(sandbox, bearer):
    sandbox.schedule(Planned("expired", http=401), Planned("throttled", http=429))
    assert [ask(sandbox, bearer).status_code for _ in range(3)] == [401, 429, 200]


def test_exact_faults_hit_the_request_they_are_meant_for(sandbox, bearer):
    sandbox.schedule(Planned("no_data", "funds", nth=2), Planned("html_502", HISTORY, 3, count=2))
    for _ in range(5):
        ask(sandbox, bearer)
        ask_signed(sandbox, bearer)
    told = [(r.endpoint, r.fault) for r in sandbox.log[1:]]
    assert [f for e, f in told if e == HISTORY] == ["", "", "html_502", "html_502", ""]
    assert [f for e, f in told if e == "funds"] == ["", "no_data", "", "", ""]


def campaign(order):
    "The fault of each question when 8 threads ask them in this order."
    rates = {"html_502": 0.1, "throttled": 0.1, "rows_nan": 0.1, "drop": 0.1}
    with Sandbox(SandboxSpec(MARKET, scale=100, rates=rates, seed=4)) as broker:
        bearer = base64.b64encode(
            f"{USER}:{next(iter(broker.desk.sessions.values())).key}".encode()
        )

        def one(day):
            with suppress(requests.exceptions.ConnectionError):
                ask(broker, bearer.decode(), from_date=f"{day}T00:00:00.000Z")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, order))
        return {r.params["from_date"]: r.fault for r in broker.log}


def test_random_faults_do_not_depend_on_which_thread_came_first():
    order = [date(2023, 1, 1) + timedelta(days=n) for n in range(150)]
    first = campaign(order)
    assert first == campaign(order[::-1])
    assert {"", "html_502", "throttled", "rows_nan", "drop"} == set(first.values())
    assert 60 * 0.5 < sum(map(bool, first.values())) < 60 * 1.5


def test_nothing_secret_is_logged(sandbox, bearer):
    ask(sandbox, bearer, api_key=sandbox.credentials.api_key, right=sandbox.credentials.api_secret)
    ask_signed(sandbox, bearer, SessionToken="x", stock_code=sandbox.credentials.session_token)
    plain.get(f"{sandbox.url}{LOGIN}?api_key={sandbox.credentials.api_key}", timeout=5)
    plain.get(f"{sandbox.url}/other?token={sandbox.credentials.session_token}", timeout=5)
    text = repr(sandbox.log)
    keys = [session.key for session in sandbox.desk.sessions.values()]
    secrets = [*sandbox.credentials, *sandbox.desk.sessions, *keys, bearer]
    assert len(sandbox.log) == 5 and not any(secret in text for secret in secrets)


def test_a_stopped_sandbox_leaves_nothing_behind():
    plain.close()
    gc.collect()  # earlier tests' pipes
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    broker = Sandbox(SandboxSpec(MARKET))
    for _ in range(3):
        broker.start()
        bearer = session_header(broker)
        broker.schedule(Planned("hang", HISTORY))
        with pytest.raises(requests.exceptions.ReadTimeout):
            ask(broker, bearer, timeout=0.1)
        broker.stop()
        broker.stop()
    plain.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    with pytest.raises(requests.exceptions.ConnectionError):
        ask(broker, "")
    with expect_fail(BrokerError, "must be started"):
        broker.step()


def test_a_taken_port_is_refused(sandbox):
    port = int(sandbox.url.rsplit(":")[-1])
    with expect_fail(BrokerError, "the port must be free"):
        Sandbox(SandboxSpec(MARKET, port=port)).start()
    with expect_fail(SettingsError, "Did you mean link_kill"):
        sandbox.cut_off("link_kil")


paths = st.sampled_from([path for _, path in ENDPOINTS] + [MASTER, LOGIN, "/", "/api/v2/x"])
values = st.one_of(st.text(max_size=20), st.integers(), st.none(), st.lists(st.integers()))
bodies = st.one_of(
    st.binary(max_size=60), st.dictionaries(st.text(max_size=9), values).map(json.dumps)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]), paths, bodies, st.booleans())
def test_no_request_brings_it_down(open_broker, method, path, body, authorised):
    broker, bearer = open_broker
    headers = {"apikey": broker.credentials.api_key, "X-SessionToken": bearer}
    data = body if isinstance(body, bytes) else body.encode()
    if authorised:
        stamp = "2024-01-31T05:00:00.000Z"
        checksum = signature(stamp, data, broker.credentials.api_secret)
        headers |= {"X-AppKey": broker.credentials.api_key}
        headers |= {"X-Timestamp": stamp, "X-Checksum": checksum}
    answer = plain.request(
        method, broker.url + path, data=data, headers=headers, timeout=5, allow_redirects=False
    )
    if (method, path) in ENDPOINTS:
        assert {"Status", "Error"} <= set(answer.json())
    elif path == MASTER and method == "GET":
        assert answer.content[:2] == b"PK"
    else:
        assert answer.status_code in (302, 400, 404)
    assert answer.status_code != 500 or b"Resource" in answer.content


# Live feeds


@pytest.fixture
def feed(sandbox, sdk):
    "An SDK that hears quotes and depth of the first share, and its candles."
    sdk.do("b.ws_connect()")
    sdk.do("b.subscribe_feeds(stock_token='4.1!10001')")
    sdk.do("b.subscribe_feeds(stock_token=['4.2!10001', '4.1!NIFTY 50'])")
    sdk.do("b.subscribe_feeds(stock_token='4.1!10001', interval='1minute')")
    joined(sandbox, 3)
    yield sdk
    sdk.do("close(b)")


def joined(broker, count, seconds=10):
    "Wait until so many joins have come since the start."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if sum(r.endpoint.endswith("/join") for r in broker.log) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{count} joins should have come: {broker.log}")


def joins(broker):
    "How many joins there have been."
    return sum(r.endpoint.endswith("/join") for r in broker.log)


def test_the_sdk_hears_quotes_depth_an_index_and_candles(sandbox, feed):
    sandbox.step(20)
    told = feed.wait_ticks(65)
    assert len(told) == 3 * 20 + 5
    quotes = [t for t in told if t.get("symbol") == "4.1!10001"]
    depths = [t for t in told if t.get("quotes") == "Market Depth"]
    candles = [t for t in told if "interval" in t]
    assert {t["stock_name"] for t in quotes} == {"SIMULATED SIM001 LIMITED"}
    truth = simulate(MARKET).bars("SIM001", Interval.MINUTE_1, sandbox.desk.replay.day)[:5]
    assert max(t["high"] for t in quotes) == truth["high"].max()
    assert min(t["low"] for t in quotes) == truth["low"].min()
    assert max(t["ttq"] for t in quotes) == truth["volume"].sum()
    same(frame(sorted(candles, key=lambda c: c["datetime"])), truth)
    for tick in depths:
        best, levels = tick["depth"][0], tick["depth"]
        assert len(levels) == 5 and best["BestBuyRate-1"] < best["BestSellRate-1"]
    index = [t for t in told if t.get("symbol") == "4.1!NIFTY 50"]
    assert {t["bPrice"] for t in index} == {None} and len(index) == 20


def test_a_client_without_a_session_hears_nothing(sandbox, feed):
    feed.do("c = module.BreezeConnect(api_key=key)")
    feed.do("c.user_id, c.session_key = 'SB000001', 'stale'")
    assert "Failed to connect" in feed.do("attempt(c.ws_connect)")
    sandbox.schedule(Planned("connect_refused", "stream"))
    feed.do("d = new()")
    assert "Failed to connect" in feed.do("attempt(d.ws_connect)")
    assert [r.status for r in sandbox.log if r.endpoint == "stream"] == [101, 401, 401]


@pytest.mark.parametrize("fault", ["link_kill", "link_freeze"])
def test_after_a_lost_connection_the_sdk_comes_back(sandbox, feed, fault):
    before = joins(sandbox)
    sandbox.schedule(Planned(fault, "stock"))
    sandbox.step()
    if fault == "link_kill":
        sandbox.cut_off(fault)  # the schedule cut one feed; this is the other
    else:
        sandbox.cut_off("link_freeze")
    joined(sandbox, before + 2, seconds=20)
    feed.do("take()")
    sandbox.step()
    assert len(feed.wait_ticks(3)) == 3
    assert fault in [r.fault for r in sandbox.log]


def test_a_restart_on_the_same_port_is_survived(sandbox, feed):
    before = joins(sandbox)
    sandbox.restart()
    joined(sandbox, before + 2, seconds=20)
    sandbox.step()
    assert len(feed.wait_ticks(3)) == 3


@pytest.mark.parametrize("fault", ["link_leave", "link_close"])
def test_after_a_graceful_end_the_sdk_stays_silent_until_it_is_asked(sandbox, feed, fault):
    before = joins(sandbox)
    sandbox.cut_off(fault)
    time.sleep(3)
    sandbox.step()
    assert feed.wait_ticks(1, seconds=0.5) == [] and joins(sandbox) == before
    feed.do("b.ws_connect()")
    joined(sandbox, before + 1)
    sandbox.step()
    assert len(feed.wait_ticks(3)) == 3


def test_the_sdk_s_own_disconnect_does_not_disconnect(sandbox, feed):
    feed.do("kept = b.sio_rate_refresh_handler, b.sio_ohlcv_stream_handler")
    feed.do("b.ws_disconnect()")
    time.sleep(0.3)
    sandbox.step()
    assert len(feed.wait_ticks(3)) == 3
    feed.do("[handler.sio.disconnect() for handler in kept]")


def test_ticks_go_wrong_in_every_known_way(sandbox, feed):
    def count(fault):
        sandbox.schedule(Planned(fault, "stock"))
        sandbox.step(2)
        return len([t for t in feed.wait_ticks(7, seconds=0.6) if "interval" not in t])

    feed.do("b.unsubscribe_feeds(stock_token='4.1!10001', interval='1minute')")
    assert count("tick_twice") == 7
    assert count("tick_late") == 6
    assert count("tick_lost") == 5
    assert count("tick_null") == 5  # the SDK's parser raises in its thread and the tick is lost
    assert count("tick_malformed") == 5
    assert [r.fault for r in sandbox.log if r.endpoint == "stock"] == [
        "tick_twice", "tick_late", "tick_lost", "tick_null", "tick_malformed"]  # fmt: skip


def test_the_market_moves_by_itself_when_told_so(tmp_path):
    spec = SandboxSpec(MARKET, stream=StreamSpec(date(2024, 1, 31), tick_s=0.02))
    with Sandbox(spec) as broker:
        client = Sdk(broker, tmp_path)
        client.do("b = new()")
        client.do("b.ws_connect()")
        client.do("b.subscribe_feeds(stock_token='4.1!10002')")
        told = client.wait_ticks(10)
        client.do("close(b)")
        client.end()
    assert len(told) >= 10
    assert sorted(t["ttq"] for t in told) == sorted({t["ttq"] for t in told})


# In the foreground


def test_serve_tells_what_to_write_and_stops_at_ctrl_c(tmp_path):
    code = (
        "from datetime import date\nfrom sensequant.live.sandbox import SandboxSpec, serve\n"
        "from sensequant.market.simulator import MarketSpec\n"
        "spec = MarketSpec(symbols=2, start=date(2024, 1, 1), end=date(2024, 3, 1))\n"
        "from functools import partial\n"
        "serve(SandboxSpec(spec), partial(print, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    lines = [process.stdout.readline().strip() for _ in range(7)]
    env = dict(line.split("=", 1) for line in lines[2:6])
    assert plain.get(env["SENSEQUANT_BREEZE_URL"] + MASTER, timeout=5).status_code == 200
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "Stopped after 1 requests" in rest
    assert lines[0].startswith("Sandbox broker at http://127.0.0.1:")


def test_an_index_moves_as_its_members_do():
    source = SimulatedSource(MARKET)
    for day in (source.first, date(2024, 3, 1), source.last):
        daily = source.bars(INDEX, Interval.DAY, day, day).iloc[0]
        for interval in (Interval.MINUTE_1, Interval.MINUTE_5, Interval.MINUTE_30):
            bars = source.bars(INDEX, interval, day, day)
            assert (bars["open"].iloc[0], bars["close"].iloc[-1]) == (daily["open"], daily["close"])
            assert bars["high"].max() <= daily["high"] and bars["low"].min() >= daily["low"]
