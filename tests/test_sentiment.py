"""The registry, the snapshots and the command: a server, real headlines, disturbances."""

import json
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from news_server import KEY, TOKEN, NewsServer, Piece
from typer.testing import CliRunner

from sensequant.core.errors import DataError, SettingsError
from sensequant.core.settings import load_settings
from sensequant.core.types import IST, Interval
from sensequant.data.news import NeutralStub, NewsError, QuotaSpent, Unreachable, read_headlines
from sensequant.data.sentiment import (
    Registry,
    ScoreCache,
    Snapshot,
    SnapshotStore,
    Watched,
    fetch_sentiment,
    fetch_symbol,
    make_registry,
    mean_score,
    next_day,
    put_question,
    sentiment,
    sentiment_as_of,
    sentiment_of_bars,
    wanted_days,
    write_snapshots,
)
from sensequant.market.calendar import session_hours, sessions
from sensequant.market.headlines import SentimentScore, company
from sensequant.ops.collect_cli import sentiment as command

ROOT = Path(__file__).resolve().parents[1]
NEWS = ROOT.parent / "shared" / "data" / "news"
FEED = NEWS / "company_feed_headlines.csv.gz"
needs_data = pytest.mark.skipif(not NEWS.is_dir(), reason=f"no headlines in {NEWS}")
NOW = datetime.now(IST)
TODAY = NOW.date()
GOOD = {"like_count": 3}


def ago(days: float) -> datetime:
    "A moment in the past, UTC."
    return (NOW - timedelta(days=days)).astimezone(UTC)


def day(back: int) -> date:
    "An Indian day in the past."
    return TODAY - timedelta(days=back)


def own_settings(server, home, providers="newsapi,twitter", **more):
    "Settings that ask the server on loopback, hastily."
    keys = {"newsapi_key": KEY, "twitter_token": TOKEN, "newsapi_url": server.url + "/v2"}
    rest = {"twitter_url": server.url + "/2", "rss_urls": server.url + "/feed", "home": str(home)}
    quick = {"sentiment_timeout_s": 0.3, "sentiment_retries": 1}
    return load_settings(sentiment_providers=providers, **keys | rest | quick | more)


NEWS_UP = Piece("TCS profit rises, shares surge", ago(0.01))
POST_DOWN = Piece("TCS shares plunge", ago(0.011), GOOD)


class Only(NewsServer):
    "Articles for NewsAPI, posts for X."

    def __init__(self, articles, posts):
        super().__init__()
        self.articles, self.posts = list(articles), list(posts)

    async def _newsapi(self, request):
        self.pieces = self.articles
        return await super()._newsapi(request)

    async def _twitter(self, request):
        self.pieces = self.posts
        return await super()._twitter(request)


# --- the registry ---


def test_the_mean_is_weighted_and_says_where_it_comes_from(tmp_path):
    with Only([NEWS_UP], [POST_DOWN]) as server:
        score = sentiment(make_registry(own_settings(server, tmp_path)), "TCS")
    parts = score.metadata["providers"]
    expected = 0.6 * parts["newsapi"]["value"] + 0.4 * parts["twitter"]["value"]
    assert parts["newsapi"]["value"] > 0 > parts["twitter"]["value"]
    assert score.value == pytest.approx(expected, abs=1e-12) and not score.stale
    assert score.source == "mean[newsapi,twitter]" and score.timestamp.tzinfo is IST
    for part in parts.values():
        file, mark = part["evidence"][0].split("#")
        kept = (tmp_path / "data/sentiment/audit" / file).read_text()
        assert mark in kept and KEY not in kept and TOKEN not in kept


def test_the_next_provider_answers_when_one_fails(tmp_path):
    with Only([NEWS_UP], [POST_DOWN]) as server:
        server.faults.append(500)
        both = make_registry(own_settings(server, tmp_path))
        score = sentiment(both, "TCS")
        assert score.value < 0 and "HTTP 500" in score.metadata["failed"]["newsapi"]
        server.log.clear()
        first = make_registry(own_settings(server, tmp_path / "b"), average=False)
        assert sentiment(first, "TCS").source == "newsapi" and server.hits("tweets") == 0
        server.faults.append("html")
        fallback = make_registry(own_settings(server, tmp_path / "c"), average=False)
        assert sentiment(fallback, "TCS").source == "twitter"


def test_a_cached_score_asks_nobody_and_a_stale_one_is_labelled(tmp_path):
    with Only([NEWS_UP], [POST_DOWN]) as server:
        registry = make_registry(own_settings(server, tmp_path, sentiment_ttl_s=1))
        fresh = sentiment(registry, "TCS")
        assert sentiment(registry, "TCS").value == fresh.value and server.hits() == 2
        assert registry.cache.hit_rate("newsapi") == 0.5
        time.sleep(1.1)
        server.faults.extend([503] * 2)
        old = sentiment(registry, "TCS")
        assert old.stale and old.value == fresh.value and old.source == f"stale[{fresh.source}]"
        assert old.metadata["age_s"] >= 1 and old.timestamp <= fresh.timestamp
        assert set(old.metadata["failed"]) == {"newsapi", "twitter"}
        server.faults.extend([503] * 2)
        with pytest.raises(NewsError, match="a provider must answer, or have answered before"):
            sentiment(registry, "INFY")


def test_the_stub_is_neutral_and_without_confidence():
    score = sentiment(Registry([Watched(NeutralStub(), 0, 0)]), "TCS")
    assert (score.value, score.confidence, score.source) == (0, 0, "stub")


def test_a_breaker_opens_after_five_failures_and_lets_one_through_later(tmp_path):
    with Only([NEWS_UP], []) as server:
        more = {"sentiment_breaker_minutes": 0.01}
        registry = make_registry(own_settings(server, tmp_path, "newsapi", **more))
        (watched,) = registry.watched
        server.faults.extend([500] * 6)
        for _ in range(8):
            with pytest.raises(NewsError):
                put_question(watched, "TCS", day(1), day(0))
        assert server.hits() == 5 and registry.health()["newsapi"].breaker == "open"
        time.sleep(0.65)
        with pytest.raises(NewsError, match="HTTP 500"):  # the trial fails: open again
            put_question(watched, "TCS", day(1), day(0))
        with pytest.raises(Unreachable, match="failed again and again"):
            put_question(watched, "TCS", day(1), day(0))
        time.sleep(0.65)
        assert put_question(watched, "TCS", day(1), day(0)).items
        health = registry.health()["newsapi"]
        assert (health.breaker, health.consecutive_failures) == ("closed", 0)
        assert (health.requests, health.failures) == (7, 6)
        assert health.error_rate == pytest.approx(6 / 7) and health.average_latency_ms > 0
        assert "HTTP 500" in health.last_error and health.last_success > NOW


def test_quotas_come_from_settings_and_outlive_the_registry(tmp_path):
    with Only([NEWS_UP], []) as server:
        given = own_settings(server, tmp_path, "newsapi", newsapi_calls_per_day=2)
        for _ in range(2):
            put_question(make_registry(given).watched[0], "TCS", day(1), day(0))
        for _ in range(7):
            with pytest.raises(QuotaSpent, match="of 2 requests in 1,440 minutes"):
                put_question((again := make_registry(given)).watched[0], "TCS", day(1), day(0))
        assert server.hits() == 2
        assert again.health()["newsapi"].breaker == "closed"  # the provider is well
        assert again.health()["newsapi"].quota_left == 0


def test_threads_share_a_cache():
    cache = ScoreCache(entries=50)
    score = SentimentScore(0.1, 0.1, "x", NOW)

    def work():
        for n in range(2000):
            cache.put("x", str(n % 80), score)
            cache.get("x", str(n % 80))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert cache.hits.get("x", 0) + cache.misses.get("x", 0) == 8000


SCORES = st.builds(
    lambda v, c, n: SentimentScore(v, c, "x", NOW, {"items": n}),
    st.floats(-1, 1),
    st.floats(0, 1),
    st.integers(0, 9),
)


@given(st.dictionaries(st.sampled_from("abcd"), SCORES, min_size=1), st.floats(0.01, 100))
def test_a_mean_lies_between_its_parts_whatever_the_scale_of_weights(scores, scale):
    weights = {n: 1 + ord(n) % 3 for n in "abcd"}
    mean = mean_score(scores, weights, NOW)
    spoke = [s for s in scores.values() if s.metadata["items"]]
    low, high = (f([s.value for s in spoke], default=0) for f in (min, max))
    assert low - 1e-12 <= mean.value <= high + 1e-12
    assert mean.confidence <= max([s.confidence for s in spoke], default=0) + 1e-12
    other = mean_score(scores, {n: w * scale for n, w in weights.items()}, NOW)
    assert other.value == pytest.approx(mean.value, abs=1e-12)


# --- snapshots ---


def test_a_day_is_asked_again_until_it_is_over(tmp_path):
    with Only([], [Piece("TCS up", ago(d), GOOD) for d in (0.001, 1, 2)]) as server:
        given = own_settings(server, tmp_path, "twitter")
        days, store = wanted_days(day(2), day(0)), SnapshotStore(tmp_path / "data/sentiment")
        still = 2 if NOW.hour == 0 and NOW.minute < 5 else 1  # X settles five minutes after a day
        for asked in (3, still, still):  # today is open, and for a moment yesterday
            assert fetch_symbol(make_registry(given), store, "TCS", days).fetched == asked
        lines = store.read_day("TCS", day(0))
        assert len(lines) == 3 and not any(s.final for s in lines)  # what was known then stays
        assert [s.available_at for s in lines] == sorted(s.available_at for s in lines)
        assert all(s.available_at > NOW for d in days for s in store.read_day("TCS", d))


def test_a_failed_provider_leaves_the_day_open(tmp_path):
    with Only([Piece("TCS up", ago(3))], [Piece("TCS up", ago(3), GOOD)]) as server:
        given = own_settings(server, tmp_path)
        server.faults.append(500)
        first = fetch_sentiment(given, ["TCS"], day(3), day(3))
        assert first.share() == 1 and "HTTP 500" in first.failed["newsapi"]
        second = fetch_sentiment(given, ["TCS"], day(3), day(3))
        assert second.symbols[0].fetched == 1 and not second.failed
        assert fetch_sentiment(given, ["TCS"], day(3), day(3)).symbols[0].fetched == 0
        assert fetch_sentiment(given, ["TCS"], day(3), day(3), force=True).symbols[0].fetched == 1
        store = SnapshotStore(tmp_path / "data/sentiment")
        assert [s.providers for s in store.read_day("TCS", day(3))] == [
            ("twitter",),
            ("newsapi", "twitter"),
            ("newsapi", "twitter"),
        ]


def test_a_second_fetch_changes_no_past_where_a_service_stands_beside_a_file(tmp_path):
    "The service fails, answers, and the file gains a headline under an earlier time."
    file, store = tmp_path / "news.csv", SnapshotStore(tmp_path / "data/sentiment")
    begin = datetime.now(IST) - timedelta(days=1)
    lines = [f"TCS,{(begin + timedelta(hours=h)).isoformat()},TCS up {h}" for h in (0, 3, 6)]
    grid = pd.date_range(begin, begin + timedelta(hours=12), freq="30min")
    seen, sizes = [], []
    with Only([], []) as server:
        given = own_settings(server, tmp_path, "csv,newsapi", headlines_csv=str(file))
        server.faults.append(500)
        for more in ([], [], [f"TCS,{(begin + timedelta(hours=1)).isoformat()},TCS fraud"]):
            lines += more
            file.write_text("symbol,timestamp,headline\n" + "\n".join(lines))
            fetch_sentiment(given, ["TCS"], begin.date(), TODAY, force=True)
            seen.append(sentiment_as_of(store, "TCS", grid))
            held = [s for d in store.days("TCS") for s in store.read_day("TCS", d)]
            sizes.append(len(held))
            assert len({(s.date, s.available_at) for s in held}) == len(held)
    assert seen[0]["value"].notna().any() and sizes[0] < sizes[1] < sizes[2]
    for later in seen[1:]:
        pd.testing.assert_frame_equal(later, seen[0])


def test_history_nobody_gives_is_coverage_zero_and_nothing_is_written(tmp_path):
    with Only([], []) as server:
        none = fetch_sentiment(
            own_settings(server, tmp_path), ["TCS"], date(2022, 1, 1), date(2022, 3, 1)
        )
        assert none.share() == none.share("with_items") == 0 and server.hits() == 0
        assert any("reaches back" in n for n in none.notes)
        assert not list((tmp_path / "data/sentiment").rglob("2022-*.jsonl"))
        json.dumps(none.describe())


def test_what_is_fetched_today_is_hidden_from_yesterday(tmp_path):
    with Only([Piece("TCS profit surges", ago(d)) for d in range(2, 20)], []) as server:
        found = fetch_sentiment(own_settings(server, tmp_path, "newsapi"), ["TCS"], day(20), day(2))
    assert found.share() == 1 and found.share("in_time") <= 1 / 19
    store, bars = SnapshotStore(tmp_path / "data/sentiment"), sessions(day(25), day(1))
    past = sentiment_of_bars(store, "TCS", bars, Interval.DAY)
    assert past["value"].isna().all()
    tomorrow = pd.DatetimeIndex([NOW + timedelta(days=1)])
    assert sentiment_as_of(store, "TCS", tomorrow, max_age=timedelta(days=5))["value"].iloc[0] > 0


@needs_data
def test_real_headlines_are_known_from_their_own_time_on(tmp_path):
    given = load_settings(home=str(tmp_path), sentiment_providers="csv", headlines_csv=str(FEED))
    began = time.process_time()
    found = fetch_sentiment(given, ["RELIANCE", "INFY"], date(2023, 1, 1), date(2024, 12, 31))
    seconds = time.process_time() - began
    assert found.share() == 0.5 == found.share("in_time")  # nothing of INFY
    assert 0.1 < found.share("with_items") < 0.5
    store, bars = SnapshotStore(tmp_path / "data/sentiment"), sessions("2023-01-01", "2024-12-31")
    seen = sentiment_of_bars(store, "RELIANCE", bars, Interval.DAY)
    table, _ = read_headlines(FEED)
    who = company("RELIANCE")
    rows = table[(table["symbol"] == "RELIANCE") & ~table["repeat"] & (table["ts"] >= "2023-01-01")]
    known = rows["ts"][[who.named_in(t) for t in rows["headline"]]] + timedelta(minutes=15)
    for ts, row in seen.iterrows():  # by brute force: the newest headline known before the open
        opens = pd.Timestamp(session_hours(ts)[0])
        before = known[known < opens]
        aged = before.empty or opens - (
            before.iloc[-1] - timedelta(minutes=15)
        ).normalize() > timedelta(4)
        assert pd.isna(row["available_at"]) if aged else row["available_at"] == before.iloc[-1]
    print(f"\n{found.symbols[0]}\n{seen['value'].notna().mean():.1%} of sessions, {seconds:.1f} s")
    again = fetch_sentiment(given, ["RELIANCE"], date(2023, 1, 1), date(2024, 12, 31))
    assert again.symbols[0].fetched == 0
    files = {p: p.read_bytes() for p in (tmp_path / "data/sentiment/RELIANCE").glob("*.jsonl")}
    forced = fetch_sentiment(given, ["RELIANCE"], date(2023, 1, 1), date(2024, 12, 31), force=True)
    assert forced.symbols[0].fetched == 731
    strip = [
        {k: v for k, v in json.loads(x).items() if k != "metadata"}
        for b in files.values()
        for x in b.splitlines()
    ]
    after = [json.loads(x) for p in files for x in p.read_bytes().splitlines()]
    assert strip == [{k: v for k, v in x.items() if k != "metadata"} for x in after]


def snapshot(number: int, value: float, items: int, hours: float) -> Snapshot:
    "About the day `number`, available so many hours after its start."
    on = date(2024, 5, 1) + timedelta(days=number)
    at = datetime(2024, 5, 1, tzinfo=IST) + timedelta(days=number, hours=hours)
    said = value if items else None
    return Snapshot("TCS", on, at, said, 0.5, items, "x", ("x",), ("x",), True)


MADE = st.builds(
    snapshot, st.integers(0, 9), st.floats(-1, 1), st.integers(0, 3), st.floats(0, 300)
)


@settings(deadline=None, max_examples=60)
@given(st.lists(MADE, max_size=12), st.lists(MADE, max_size=6), st.floats(0, 400))
def test_nothing_later_changes_what_was_seen(tmp_path_factory, held, disturbing, hours):
    "Snapshots that become available at or after a moment leave every earlier answer as it was."
    moment = datetime(2024, 5, 1, tzinfo=IST) + timedelta(hours=hours)
    begin = datetime(2024, 5, 1, tzinfo=IST)
    grid = pd.date_range(begin, moment, freq="7h").append(pd.DatetimeIndex([moment]))
    answers = []
    before = [s for s in held if s.available_at < moment]
    others = [replace(s, value=-1.0, items=9) for s in disturbing if s.available_at >= moment]
    for rows in (held, before + others):
        store = SnapshotStore(tmp_path_factory.mktemp("s"))
        write_snapshots(store, rows)
        answers.append(sentiment_as_of(store, "TCS", grid))
    pd.testing.assert_frame_equal(*answers)
    assert answers[0]["value"].notna().any() <= any(s.items for s in before)
    seen = answers[0].dropna(subset=["available_at"])
    assert all(t > at for t, at in zip(seen.index, seen["available_at"], strict=True))


def test_the_leak_test_can_fail(tmp_path):
    "Were `available_at` ignored, the disturbance would show."
    one, moment = snapshot(0, 0.5, 1, 30), datetime(2024, 5, 2, 12, tzinfo=IST)
    store = SnapshotStore(tmp_path)
    write_snapshots(store, [replace(one, available_at=datetime(2024, 5, 1, 9, tzinfo=IST))])
    before = sentiment_as_of(store, "TCS", pd.DatetimeIndex([moment]))["value"].iloc[0]
    write_snapshots(store, [replace(one, value=-1.0, available_at=moment - timedelta(minutes=1))])
    assert (
        sentiment_as_of(store, "TCS", pd.DatetimeIndex([moment]))["value"].iloc[0] == -1.0 != before
    )


def test_an_old_day_filled_in_later_is_no_news(tmp_path):
    store = SnapshotStore(tmp_path)
    write_snapshots(store, [snapshot(5, 0.5, 1, 20), snapshot(4, -1.0, 1, 60)])
    row = sentiment_as_of(store, "TCS", pd.DatetimeIndex([datetime(2024, 5, 8, tzinfo=IST)])).iloc[
        0
    ]
    assert row["value"] == 0.5


def test_writers_do_not_lose_each_others_lines(tmp_path):
    store = SnapshotStore(tmp_path)

    def work(n):
        for hour in range(10):
            write_snapshots(store, [snapshot(3, 0.1, 1, 24 + n + hour / 10)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(store.read_day("TCS", date(2024, 5, 4))) == 40
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_torn_file_is_named_never_empty(tmp_path):
    store = SnapshotStore(tmp_path)
    write_snapshots(store, [snapshot(3, 0.1, 1, 24)])
    path = store.path("TCS", date(2024, 5, 4))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"2024-05-04.jsonl, line 1"):
        sentiment_as_of(store, "TCS", pd.DatetimeIndex([NOW]))


def test_incremental_begins_where_it_stopped_and_returns_to_open_days(tmp_path):
    store, end = SnapshotStore(tmp_path), date(2024, 5, 20)
    assert next_day(store, "TCS", ["x"], end, 30) == date(2024, 4, 21)
    write_snapshots(store, [snapshot(n, 0.1, 1, 24) for n in range(8)])
    assert next_day(store, "TCS", ["x"], end, 30) == date(2024, 5, 9)
    write_snapshots(store, [replace(snapshot(8, 0.1, 1, 24), final=False), snapshot(9, 0.1, 1, 24)])
    assert next_day(store, "TCS", ["x"], end, 30) == date(2024, 5, 9)
    assert next_day(store, "TCS", ["x"], end, 5) == date(2024, 5, 11)
    assert next_day(store, "TCS", ["x", "y"], end, 30) == date(2024, 4, 21)


# --- the command ---

APP = typer.Typer()
APP.command()(command)


def run(*words: str):
    "The command as a person types it."
    return CliRunner().invoke(APP, list(words))


def test_the_command_fetches_once_and_goes_on_incrementally(tmp_path):
    file = tmp_path / "news.csv"
    lines = [f"TCS,{TODAY - timedelta(days=n)} 09:00,TCS up {n}" for n in range(5, 40)]
    file.write_text("symbol,timestamp,headline\n" + "\n".join(lines))
    base = [
        "--symbols",
        "TCS",
        "--providers",
        "csv",
        "--set",
        f"headlines_csv={file}",
        "--incremental",
    ]
    first = run(*base)
    assert first.exit_code == 0, first.output
    assert "30 days asked" in first.output and "25/30 days covered" in first.output
    assert "the file reaches from" in first.output and "In time" in first.output
    assert "    5 days asked" in run(*base).output
    assert (
        "365 days asked"
        in run(*base, "--lookback-days", "365", "--force", "--start", str(day(364))).output
    )


def test_the_command_says_what_is_wrong(tmp_path):
    for words, text in (
        (["--symbols", "TCS"], "the first day must be named"),
        (["--start", "2024-01-01"], "symbols must be named"),
        (
            ["--symbols", "TCS", "--start", "2024-01-01", "--providers", "newsapi"],
            "needs newsapi_key",
        ),
        (
            ["--symbols", "TCS", "--start", "2024-01-01", "--providers", "myspace"],
            "a provider must be newsapi, twitter, rss, csv or stub; found myspace",
        ),
    ):
        result = run(*words)
        assert result.exit_code == 2 and text in result.output


def test_the_command_fails_when_a_provider_does(tmp_path):
    with Only([], []) as server:
        server.faults.extend([401] * 5)
        own = {"newsapi_key": "wrong", "newsapi_url": server.url + "/v2", "home": tmp_path}
        sets = [x for k, v in own.items() for x in ("--set", f"{k}={v}")]
        result = run("--symbols", "TCS", "--start", str(day(3)), "--providers", "newsapi", *sets)
    assert (
        result.exit_code == 1 and "failed newsapi" in result.output and "0/4 days" in result.output
    )


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    for more, text in (
        ({"sentiment_providers": "stub,stub"}, "each once"),
        ({"sentiment_providers": ""}, "providers must be named"),
        ({"sentiment_providers": "csv"}, "headlines_csv"),
        ({"sentiment_providers": "rss"}, "rss_urls"),
        ({"sentiment_providers": "stub", "sentiment_weights": "stub=-1"}, "0 or more"),
        ({"sentiment_providers": "newsapi", "newsapi_key": "torn\nkey"}, "printable ASCII"),
        ({"sentiment_providers": "twitter", "twitter_token": "ключ"}, "printable ASCII"),
    ):
        with pytest.raises(SettingsError, match=text):
            make_registry(load_settings(home=str(tmp_path), **more))


def test_a_snapshot_survives_its_file(tmp_path):
    one = replace(snapshot(1, 0.25, 2, 3), metadata={"a": [1, "x"]})
    store = SnapshotStore(tmp_path)
    write_snapshots(store, [one])
    (back,) = store.read_day("TCS", one.date)
    assert asdict(back) == asdict(one) and np.isfinite(back.value)
