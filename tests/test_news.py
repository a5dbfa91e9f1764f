"""Providers against a server that speaks their protocols, the scorer against people's labels."""

import ast
import json
import logging
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from news_server import KEY, TOKEN, NewsServer, Piece

from sensequant.core.errors import DataError, SenseQuantError, SettingsError
from sensequant.core.settings import load_settings
from sensequant.core.types import IST
from sensequant.data.news import (
    Allowed,
    BadReply,
    BeyondHistory,
    Caller,
    CallRules,
    CsvHeadlines,
    KeyRefused,
    NewsApi,
    NewsError,
    NewsProvider,
    ProviderDown,
    Quota,
    QuotaSpent,
    Reply,
    RssFeeds,
    TwitterSearch,
    Unreachable,
    _articles,
    _judge_newsapi,
    _judge_twitter,
    _posts,
    left,
    query,
    read_headlines,
    take,
)
from sensequant.data.sentiment import make_provider
from sensequant.market.calendar import read_facts
from sensequant.market.headlines import (
    FinanceScorer,
    Item,
    Thresholds,
    VaderScorer,
    company,
    finance_words,
    fit_thresholds,
    lexicon,
    measure,
    score_items,
)

ROOT = Path(__file__).resolve().parents[1]
NEWS = ROOT.parent / "shared" / "data" / "news"
needs_data = pytest.mark.skipif(not NEWS.is_dir(), reason=f"no headlines in {NEWS}")
TCS, NOW = company("TCS"), datetime.now(IST)
TODAY = NOW.date()
HASTY = CallRules(timeout_s=0.4, tries=3, backoff_s=0.01)


def ago(days: float) -> datetime:
    "A moment in the past, UTC."
    return (NOW - timedelta(days=days)).astimezone(UTC)


def day(back: int) -> date:
    "An Indian day in the past."
    return TODAY - timedelta(days=back)


def asker(name, rules=HASTY, audit=None, calls=10_000, **more) -> Caller:
    "Somebody who may ask as much as a test needs."
    return Caller(Quota(name, Allowed(calls, 900, burst=1000)), rules, audit, **more)


def newsapi(server, key=KEY, **more) -> NewsApi:
    "NewsAPI on loopback."
    return NewsApi(asker("newsapi", secrets=(key,), **more), key, server.url + "/v2")


def twitter(server, token=TOKEN, pages=10, **more) -> TwitterSearch:
    "X on loopback."
    return TwitterSearch(
        asker("twitter", secrets=(token,), **more), token, server.url + "/2", pages
    )


def rss(server, path="/feed?q={query}", **more) -> RssFeeds:
    "A feed on loopback."
    return RssFeeds(asker("rss", redirects=True, **more), [server.url + path])


# --- what a provider gives ---


def test_newsapi_gives_the_articles_of_the_days_that_name_the_company():
    texts = {1.0: "TCS wins order", 2.0: "Infosys gains", 5.0: "TCS slips", 9.0: "TCS old"}
    with NewsServer([Piece(t, ago(d)) for d, t in texts.items()]) as server:
        answer = newsapi(server).fetch(TCS, day(6), day(1))
        assert {i.text for i in answer.items} == {"TCS wins order", "TCS slips"}
        assert all(i.published_at.tzinfo is IST for i in answer.items)
        assert (answer.first, answer.last, answer.notes) == (day(6), day(1), ())
        ((path, params, headers),) = server.log
        assert KEY not in path + str(params) and headers["X-Api-Key"] == KEY


def test_days_are_indian_days():
    "An article of 20:00 UTC belongs to the next day in India."
    evening = datetime.combine(day(3), datetime.min.time(), UTC) + timedelta(hours=20)
    with NewsServer([Piece("TCS up", evening)]) as server:
        provider = newsapi(server)
        assert not provider.fetch(TCS, day(3), day(3)).items
        assert provider.fetch(TCS, day(2), day(2)).items


def test_newsapi_turns_pages():
    pieces = [Piece(f"TCS note {n}", ago(2 + n / 1000)) for n in range(250)]
    with NewsServer(pieces) as server:
        assert len(newsapi(server).fetch(TCS, day(4), day(1)).items) == 250
        assert server.hits() == 3


def test_a_plan_of_one_page_is_asked_in_halves():
    pieces = [Piece(f"TCS note {d} {n}", ago(d + n / 1e4)) for d in range(1, 9) for n in range(60)]
    crowd = [Piece(f"TCS crowd {n}", ago(10 + n / 1e4)) for n in range(140)]
    with NewsServer(pieces + crowd, most_results=100) as server:
        whole = newsapi(server).fetch(TCS, day(9), day(0))
        assert len(whole.items) == len({i.text for i in whole.items}) == 480 and not whole.notes
        full = newsapi(server).fetch(TCS, day(10), day(10))
        assert len(full.items) <= 100 and "more articles than the plan gives" in full.notes[0]


def test_days_out_of_reach_are_no_days_covered_and_cost_nothing():
    with NewsServer() as server:
        for provider, reach in ((newsapi(server), 29), (twitter(server), 6)):
            none = provider.fetch(TCS, date(2022, 1, 1), date(2022, 12, 31))
            assert (none.items, none.first, server.hits()) == ((), None, 0)
            assert "reaches back" in none.notes[0]
            part = provider.fetch(TCS, day(90), day(1))
            assert (part.first, part.last) == (day(reach), day(1)) and "reaches back" in part.notes[
                0
            ]
            server.log.clear()


def test_a_plan_that_reaches_less_far_says_so():
    with NewsServer([Piece("TCS up", ago(3))], reach_days=10) as server:
        part = newsapi(server).fetch(TCS, day(20), day(1))
        assert part.items and day(10) <= part.first <= day(8) and part.last == day(1)
        assert "begins on" in part.notes[0]
        with pytest.raises(BeyondHistory, match="too far"):
            newsapi(server).fetch(TCS, day(20), day(15))


def test_x_leaves_reposts_out_and_weighs_engagement():
    pieces = [
        Piece("TCS is up https://t.co/x", ago(1), {"like_count": 50, "retweet_count": 10}),
        Piece("TCS is up", ago(1), repost=True),
        Piece("RT @someone TCS is up", ago(1)),
        Piece("TCS meh", ago(2), {"like_count": "many"}),
    ]
    with NewsServer(pieces) as server:
        answer = twitter(server).fetch(TCS, day(5), day(0))
        assert {i.text: round(i.weight, 2) for i in answer.items} == {
            "TCS is up": 5.26,
            "TCS meh": 1.0,
        }
        assert (answer.first, answer.last) == (day(5), day(0))


def test_x_turns_pages_and_halves_what_is_too_much():
    pieces = [Piece(f"TCS {d} {n}", ago(d + n / 1e4)) for d in range(1, 5) for n in range(150)]
    with NewsServer(pieces) as server:
        assert len(twitter(server).fetch(TCS, day(6), day(0)).items) == 600
        assert len(twitter(server, pages=2).fetch(TCS, day(6), day(0)).items) == 600
        assert "the newest count" in twitter(server, pages=1).fetch(TCS, day(3), day(3)).notes[0]


def test_a_feed_vouches_only_for_days_after_its_oldest_entry():
    pieces = [Piece("TCS & Infosys gain", ago(1)), Piece("Wipro slips", ago(3))]
    with NewsServer(pieces) as server:
        answer = rss(server).fetch(TCS, day(30), day(0))
        assert [i.text for i in answer.items] == ["TCS & Infosys gain"]
        assert (answer.first, answer.last) == (day(2), day(0))
        assert server.log[0][1]["q"] == query(TCS)
        assert rss(server).fetch(TCS, day(30), day(9)).first is None


def test_a_feed_without_a_query_is_downloaded_once_and_redirects_are_followed():
    with NewsServer([Piece("TCS up", ago(1))]) as server:
        feeds = rss(server, "/moved")
        for symbol in ("TCS", "INFY", "WIPRO"):
            feeds.fetch(company(symbol), day(3), day(0))
        assert server.hits("/feed") == 1


def test_all_keep_the_promise():
    with NewsServer() as server:
        assert all(
            isinstance(p, NewsProvider) for p in (newsapi(server), twitter(server), rss(server))
        )


# --- faults ---

FAULTS = {
    401: (KeyRefused, 1),
    403: (KeyRefused, 1),
    400: (BadReply, 1),
    429: (QuotaSpent, 1),
    500: (ProviderDown, 3),
    503: (ProviderDown, 3),
    "html": (BadReply, 1),
    "broken": (BadReply, 1),
    "list": (BadReply, 1),
    "shape": (BadReply, 1),
    "drop": (Unreachable, 3),
    "hang": (Unreachable, 3),
    "drip": (Unreachable, 3),
    "huge": (BadReply, 1),
    "echo": (KeyRefused, 1),
    "redirect": (BadReply, 1),
}


@pytest.mark.parametrize("make", [newsapi, twitter])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_error_and_its_tries(make, fault):
    kind, tries = FAULTS[fault]
    with NewsServer() as server:
        server.faults.extend([fault] * 10)
        began = time.monotonic()
        with pytest.raises(kind) as caught:
            make(server).fetch(TCS, day(3), day(1))
        assert type(caught.value) is kind and server.hits() == tries
        assert time.monotonic() - began < 3 * (HASTY.timeout_s + 0.3)
        assert KEY not in str(caught.value) and TOKEN not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("fault", [500, "drop", "hang"])
def test_what_is_temporary_is_tried_again(fault):
    with NewsServer([Piece("TCS up", ago(1))]) as server:
        server.faults.extend([fault, fault])
        assert newsapi(server).fetch(TCS, day(3), day(0)).items
        assert server.hits() == 3


@pytest.mark.parametrize("fault", ["html", 404, "drop"])
def test_faults_of_feeds(fault):
    with NewsServer() as server:
        server.faults.extend([fault] * 3)
        with pytest.raises((BadReply, Unreachable)):
            rss(server).fetch(TCS, day(3), day(0))


def test_a_wrong_key_is_said_once():
    with NewsServer() as server:
        with pytest.raises(KeyRefused, match="apiKeyInvalid: Your API key is invalid"):
            newsapi(server, key="wrong").fetch(TCS, day(3), day(1))
        with pytest.raises(KeyRefused):
            twitter(server, token="wrong").fetch(TCS, day(3), day(1))
        assert server.hits() == 2


def test_after_a_429_the_server_is_left_alone_until_its_reset():
    with NewsServer() as server:
        provider = twitter(server)
        server.faults.append(429)
        for _ in range(3):
            with pytest.raises(QuotaSpent) as caught:
                provider.fetch(TCS, day(3), day(1))
        assert server.hits() == 1
        wait = caught.value.until - datetime.now(IST)
        assert timedelta(minutes=9) < wait <= timedelta(minutes=10)
        server.faults.append("busy")  # says no time: left alone for a quarter of an hour
        silent = newsapi(server)
        for _ in range(3):
            with pytest.raises(QuotaSpent):
                silent.fetch(TCS, day(3), day(1))
        assert server.hits() == 2


def test_no_key_is_seen_anywhere(tmp_path, caplog):
    "Not in logs, errors, addresses or what is kept, even when the server repeats it."
    caplog.set_level(logging.DEBUG)
    with NewsServer([Piece(f"TCS up {KEY}", ago(1))]) as server:
        provider = newsapi(server, audit=tmp_path)
        answer = provider.fetch(TCS, day(3), day(0))
        server.faults.append("echo")
        with pytest.raises(KeyRefused, match=r"your key \*\*\*"):
            provider.fetch(TCS, day(3), day(0))
        assert answer.items[0].text == "TCS up ***"
        kept = "".join(p.read_text() for p in tmp_path.rglob("*.jsonl"))
        assert kept and KEY not in kept + caplog.text + repr(provider.__dict__.get("caller"))
        assert all(KEY not in p + str(q) for p, q, _ in server.log)


@pytest.mark.parametrize("key", ["SECRET\nSECRET", "SECRET\x00", "SECRETк"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key):
    with pytest.raises(SettingsError, match="printable ASCII") as found:
        Caller(Quota("newsapi", Allowed(9, 60)), secrets=(key,))
    assert "SECRET" not in str(found.value)


@pytest.mark.parametrize("scheme", ["htp://me:SECRET@x/", "http://me:SECRET@[", "me:SECRET@x"])
def test_an_address_that_is_none_is_refused_without_its_password(scheme):
    caller = Caller(Quota("newsapi", Allowed(9, 60)), HASTY)
    with pytest.raises(SettingsError, match="must begin with http") as found:
        NewsApi(caller, KEY, scheme).fetch(TCS, day(1), day(0))
    assert "SECRET" not in str(found.value)


def test_what_a_feed_carries_in_its_address_is_not_kept(tmp_path):
    with NewsServer([Piece("TCS up", ago(1))]) as server:
        url = server.url.replace("://", "://me:SECRET1@") + "/feed?keyword=steel&api_key=SECRET2"
        given = {"home": str(tmp_path), "sentiment_providers": "rss", "rss_urls": url}
        provider = make_provider("rss", load_settings(**given))
        assert provider.fetch(TCS, day(1), day(0)).items
    kept = "".join(p.read_text() for p in (tmp_path / "data").rglob("*.jsonl"))
    assert "keyword=steel" in kept and "SECRET" not in kept


def test_half_a_character_can_be_printed():
    "JSON may hold one half of a pair; no terminal and no file takes it."
    said = {"status": "error", "code": "apiKeyInvalid", "message": "bad \ud800 key"}
    reply = Reply(401, {}, json.dumps(said).encode())
    with pytest.raises(KeyRefused, match=r"bad \? key") as found:
        _judge_newsapi(reply, "newsapi")
    str(found.value).encode()
    whole = Reply(
        200, {}, json.dumps({"status": "ok", "articles": ["🙂"], "totalResults": 1}).encode()
    )
    assert _judge_newsapi(whole, "newsapi")["articles"] == ["🙂"]


def test_a_damaged_count_is_named(tmp_path):
    (tmp_path / "calls.db").write_bytes(b"garbage" * 100)
    with pytest.raises(DataError, match=r"count of requests.*calls\.db"):
        Quota("newsapi", Allowed(9, 60), tmp_path / "calls.db")
    (tmp_path / "file").write_text("")
    with pytest.raises(SenseQuantError, match="file"):
        Quota("newsapi", Allowed(9, 60), tmp_path / "file" / "calls.db")


def test_a_window_is_a_little_longer_than_allowed():
    "A request that comes late counts later with the provider than with us."
    quota, began = Quota("newsapi", Allowed(1, 100.0)), datetime.now(IST)
    take(quota)
    with pytest.raises(QuotaSpent) as found:
        take(quota)
    assert timedelta(seconds=100.5) < found.value.until - began < timedelta(seconds=102)


def test_the_payload_behind_a_score_is_kept(tmp_path):
    with NewsServer([Piece("TCS up", ago(1))]) as server:
        (mark,) = newsapi(server, audit=tmp_path).fetch(TCS, day(3), day(0)).evidence
        file, digest = mark.split("#")
        (line,) = [json.loads(x) for x in (tmp_path / file).read_text().splitlines()]
        assert line["id"] == digest and "TCS up" in line["payload"] and line["status"] == 200


# --- allowances ---


def test_every_try_counts_and_a_spent_quota_asks_nobody():
    with NewsServer() as server:
        provider = newsapi(server, calls=2)
        server.faults.extend([500] * 5)
        with pytest.raises(QuotaSpent, match="of 2 requests"):
            provider.fetch(TCS, day(3), day(1))
        assert server.hits() == 2


def test_a_window_never_gives_more_than_its_quota(tmp_path):
    "A token bucket alone would; so would a count that resets on the hour."
    quota = Quota("x", Allowed(5, 0.5, burst=1000), tmp_path / "q.db")
    taken, end = [], time.monotonic() + 2.2
    while time.monotonic() < end:
        try:
            take(quota)
            taken.append(time.monotonic())
        except QuotaSpent:
            time.sleep(0.005)
    starts = np.array(taken)
    most = max(int(((starts >= s) & (starts < s + 0.49)).sum()) for s in starts)
    assert most == 5 and len(taken) >= 20


def test_processes_share_a_quota_and_a_restart_does_not_forget(tmp_path):
    code = """
import sys
from pathlib import Path
from sensequant.data.news import Allowed, Quota, QuotaSpent, take
quota, n = Quota("newsapi", Allowed(25, 86400, burst=1000), Path(sys.argv[1])), 0
for _ in range(20):
    try:
        take(quota)
        n += 1
    except QuotaSpent:
        pass
print(n)
"""
    file = tmp_path / "news.db"
    start = [sys.executable, "-c", code, str(file)]
    running = [
        subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    assert sum(int(p.communicate(timeout=60)[0]) for p in running) == 25
    assert left(Quota("newsapi", Allowed(25, 86_400), file)) == 0
    assert left(Quota("twitter", Allowed(7, 900), file)) == 7


# --- what cannot be read is refused, never guessed ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["articles", "totalResults", "title", "publishedAt", "data", "text", "meta",
                         "created_at", "public_metrics", "referenced_tweets", "status", "code"]),
        inner, max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(JSON, st.sampled_from([200, 200, 200, 400, 429, 500]))
def test_any_body_is_understood_or_refused_in_words(body, status):
    reply = Reply(status, {"content-type": "application/json"}, json.dumps(body).encode())
    for judge, read in ((_judge_newsapi, _articles), (_judge_twitter, _posts)):
        try:
            held = judge(reply, "here")
            items = read(held, "here") if held else []
        except NewsError:
            continue
        assert all(isinstance(i, Item) and i.published_at.tzinfo is IST for i in items)


# --- files of headlines ---


@needs_data
def test_real_headlines_are_read_with_what_was_left_out():
    file = NEWS / "company_feed_headlines.csv.gz"
    table, bad = read_headlines(file)
    assert bad == 0 and table["ts"].is_monotonic_increasing
    assert len(table) == 5030 and table["repeat"].sum() == 81 + 256  # as the data's README counts
    answer = CsvHeadlines(file).fetch(company("RELIANCE"), date(2021, 1, 1), date(2025, 12, 31))
    assert (answer.first, answer.last) == (date(2021, 2, 18), date(2025, 4, 29))
    assert 0 < len(answer.items) < 2516 and "do not name the company" in answer.notes[0]
    assert all(company("RELIANCE").named_in(i.text) for i in answer.items)


@pytest.mark.parametrize(
    "text",
    ["2024-05-02", "20240502", "2024-05-02 00:00:00", "2024-05-02T00:00+05:30"],
)
def test_a_headline_with_a_day_alone_is_unknown_until_the_day_is_over(tmp_path, text):
    "Results of the evening must not be seen at the open."
    file = tmp_path / "news.csv"
    file.write_text(f"symbol,date,headline\nTCS,{text},TCS profit falls\n")
    (ts,) = read_headlines(file)[0]["ts"]
    assert ts == pd.Timestamp("2024-05-02 23:59:59", tz=IST)
    (item,) = CsvHeadlines(file).fetch(TCS, date(2024, 5, 2), date(2024, 5, 2)).items
    assert item.published_at == ts


@pytest.mark.parametrize("text", ["2024", "2024-05", "202405"])
def test_a_month_is_no_moment(tmp_path, text):
    (tmp_path / "news.csv").write_text(f"symbol,date,headline\nTCS,{text},TCS up\n")
    table, bad = read_headlines(tmp_path / "news.csv")
    assert table.empty and bad == 1


def test_an_unreadable_file_is_refused(tmp_path):
    for name, data in {
        "none.csv": None,
        "blank.csv": b"",
        "binary.csv": b"\xff\xfe\x00\x81" * 9,
    }.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=r"readable CSV|headlines need"):
            CsvHeadlines(tmp_path / name).fetch(TCS, day(3), day(1))


def test_no_company_is_taken_for_another():
    people = [company(code) for code in read_facts("symbols")["nse_code"]]
    pairs = [
        (a, b, name) for a in people for b in people for name in b.names if name not in a.names
    ]
    wrong = [(a.symbol, b.symbol, n) for a, b, n in pairs if a.named_in(f"{n} shares gain")]
    lost = [
        (a.symbol, n) for a in people for n in a.names if not a.named_in(f"Will {n}'s rise last?")
    ]
    assert (wrong, lost) == ([], [])


# --- the scorer ---

FINANCE = FinanceScorer()
WORDS = st.lists(
    st.sampled_from(sorted(lexicon("word")) + ["profit", "falls", "the", "12%", "|", ";"]),
    max_size=12,
)


@settings(deadline=None)
@given(st.text(max_size=200) | WORDS.map(" ".join))
def test_any_text_has_a_score_in_range(text):
    assert -1 <= FINANCE.score(text) <= 1
    assert "|" not in finance_words(text)


@settings(deadline=None, max_examples=50)
@given(WORDS.map(" ".join), st.lists(st.floats(0.1, 50), min_size=1, max_size=6), st.randoms())
def test_order_repeats_and_scale_of_weights_do_not_matter(text, weights, random):
    items = [Item(f"{text} {n}", NOW, w) for n, w in enumerate(weights)]
    score = score_items(items, FINANCE, "x", NOW)
    mixed = random.sample(
        [Item(i.text, i.published_at, i.weight * 3) for i in items] * 2, len(items) * 2
    )
    other = score_items(mixed, FINANCE, "x", NOW)
    assert other.value == pytest.approx(score.value, abs=1e-12)
    assert other.confidence == pytest.approx(score.confidence, abs=1e-12)


PAIRS = [("profit", 1), ("sales", 1), ("costs", -1), ("losses", -1), ("debt", -1)]


@pytest.mark.parametrize(("subject", "sign"), PAIRS)
@pytest.mark.parametrize(("up", "down"), [("rise", "fall"), ("jump", "drop"), ("widen", "narrow")])
def test_a_direction_is_judged_by_its_subject(subject, sign, up, down):
    for pattern in ("{s} {d}", "{s} {d} 12%", "Q3 {s} {d} by 4 pct", "{d} in {s}"):
        assert sign * FINANCE.score(pattern.format(s=subject, d=up)) > 0
        assert sign * FINANCE.score(pattern.format(s=subject, d=down)) < 0


def labelled(odd: bool) -> pd.DataFrame:
    "SEntFiN's headlines with one entity: text and -1, 0 or 1."
    table = pd.read_csv(NEWS / "sentfin_headlines.csv.gz")
    table = table[table["S No."] % 2 == odd]
    words = {"negative": -1, "neutral": 0, "positive": 1}
    rows = []
    for text, decisions in zip(table["Title"], table["Decisions"], strict=True):
        try:
            held = ast.literal_eval(decisions)
        except (ValueError, SyntaxError):
            continue  # 13 of the rows published do not parse
        if isinstance(held, dict) and len(held) == 1:
            rows.append((text, words[next(iter(held.values()))]))
    return pd.DataFrame(rows, columns=["text", "truth"])


@needs_data
def test_the_lexicon_beats_vader_on_headlines_it_has_not_seen():
    "Thresholds from the even half, figures from the odd one; spread by resampling its headlines."
    even, odd = labelled(False), labelled(True)
    truth, lines, readings = odd["truth"].to_numpy(), [], {}
    for scorer in (VaderScorer(), FINANCE):
        fitted = fit_thresholds([scorer.score(t) for t in even["text"]], even["truth"])
        scores = [scorer.score(t) for t in odd["text"]]
        for cut, name in ((Thresholds(), "±0.05"), (fitted, "fitted")):
            readings[scorer.name, name] = cut.labels(scores)
            found = measure(truth, readings[scorer.name, name])
            lines.append(
                (
                    scorer.name,
                    name,
                    cut.low,
                    cut.high,
                    *(found.n, found.accuracy, found.macro_f1),
                    found.confusion,
                )
            )
    heading = [
        "scorer",
        "thresholds",
        "low",
        "high",
        "n",
        "accuracy",
        "macro-F1",
        "confusion -1,0,1 by -1,0,1",
    ]
    print("\n" + pd.DataFrame(lines, columns=heading).to_string(index=False, float_format="%.4f"))
    rng, gains, levels = np.random.default_rng(1), [], []
    for _ in range(1000):
        draw = rng.integers(0, len(truth), len(truth))
        own, other = (
            measure(truth[draw], readings[s, "fitted"][draw]).macro_f1
            for s in ("vader-finance-1", "vader")
        )
        gains.append(own - other)
        levels.append(own)
    gain, level = np.quantile(gains, [0.025, 0.5, 0.975]), np.quantile(levels, [0.025, 0.5, 0.975])
    print(f"2.5%, 50%, 97.5% of 1,000 resamples: macro-F1 {level.round(4)}, gain {gain.round(4)}")
    assert gain[0] > 0.10
