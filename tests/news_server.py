"""NewsAPI, X and RSS on loopback, with a menu of faults, for the tests of news and sentiment."""

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from xml.sax.saxutils import escape

from aiohttp import web

from sensequant.core.types import IST

KEY, TOKEN = "news-key-51d2", "x-token-83ac"


@dataclass
class Piece:
    "An article, a post or an entry."

    text: str
    at: datetime  # aware UTC
    counts: dict = field(default_factory=dict)  # public_metrics of a post
    repost: bool = False


def zulu(text: str) -> datetime:
    "A moment as services spell it."
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def spelled(at: datetime) -> str:
    "A moment as services spell it."
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class NewsServer:
    "Speaks all three services from one list of pieces; pops one fault a request."

    def __init__(self, pieces=(), most_results=10_000, reach_days=30):
        self.pieces, self.most_results, self.reach_days = list(pieces), most_results, reach_days
        self.faults, self.log = deque(), []
        self._ready = threading.Event()

    def __enter__(self):
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _serve(self):
        asyncio.run(self._main())

    async def _main(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/v2/everything", self._newsapi)
        app.router.add_get("/2/tweets/search/recent", self._twitter)
        app.router.add_get("/feed", self._feed)
        app.router.add_get("/moved", self._moved)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def hits(self, path=""):
        "Requests to paths that hold `path`."
        return sum(path in p for p, _, _ in self.log)

    async def _fault(self, request):
        "Note a request; the reply of the next fault, None where there is none."
        self.log.append((request.path, dict(request.query), dict(request.headers)))
        fault = self.faults.popleft() if self.faults else None
        if fault is None:
            return None
        if isinstance(fault, int):
            body = {"status": "error", "code": "unexpectedError" if fault >= 500 else "x"}
            headers = {"x-rate-limit-reset": str(int(datetime.now(UTC).timestamp()) + 600)}
            return web.json_response(body, status=fault, headers=headers if fault == 429 else {})
        if fault == "busy":
            return web.json_response({"status": "error", "code": "rateLimited"}, status=429)
        if fault == "html":
            return web.Response(text="<html><body>Gateway</body></html>", content_type="text/html")
        if fault == "broken":
            return web.Response(
                text='{"status": "ok", "articles": [', content_type="application/json"
            )
        if fault == "list":
            return web.json_response([1, 2])
        if fault == "shape":
            return web.json_response(
                {"status": "ok", "articles": [7], "totalResults": 1, "meta": {}, "data": [7]}
            )
        if fault == "echo":
            said = f"your key {KEY if 'v2' in request.path else TOKEN} is wrong"
            return web.json_response(
                {"status": "error", "code": "apiKeyInvalid", "message": said, "detail": said},
                status=401,
            )
        if fault == "redirect":
            raise web.HTTPFound("http://127.0.0.1:9/steal")
        if fault == "huge":
            return web.Response(body=b" " * 6_000_000)
        if fault == "drop":
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "drip":
            return await self._drip(request)
        raise AssertionError(fault)

    async def _drip(self, request):
        "A byte now and then, for ever."
        reply = web.StreamResponse()
        await reply.prepare(request)
        for _ in range(300):
            await reply.write(b" ")
            await asyncio.sleep(0.05)
        return reply

    def _matching(self, words, low, high):
        "Pieces that hold one of the quoted words, newest first."
        names = [w.lower() for w in words.split('"')[1::2]]
        found = [p for p in self.pieces if any(n in p.text.lower() for n in names)]
        return sorted((p for p in found if low <= p.at <= high), key=lambda p: p.at, reverse=True)

    async def _newsapi(self, request):
        "The `everything` endpoint."
        if fault := await self._fault(request):
            return fault
        if request.headers.get("X-Api-Key") != KEY:
            body = {
                "status": "error",
                "code": "apiKeyInvalid",
                "message": "Your API key is invalid",
            }
            return web.json_response(body, status=401)
        q = request.query
        low, high = zulu(q["from"]), zulu(q["to"])
        limit = datetime.now(UTC) - timedelta(days=self.reach_days)
        if low < limit:
            first = limit.astimezone(IST).date() + timedelta(days=1)  # whole, at any time of day
            said = f"You are trying to request results too far in the past. Yours begin {first}"
            body = {"status": "error", "code": "parameterInvalid", "message": said}
            return web.json_response(body, status=426)
        size, page = int(q["pageSize"]), int(q["page"])
        found = self._matching(q["q"], low, high)
        if page > 1 and page * size > self.most_results:
            body = {"status": "error", "code": "maximumResultsReached", "message": "limit"}
            return web.json_response(body, status=426)
        part = found[(page - 1) * size : page * size]
        rows = [{"title": p.text, "publishedAt": spelled(p.at), "url": "http://n/1"} for p in part]
        return web.json_response({"status": "ok", "totalResults": len(found), "articles": rows})

    async def _twitter(self, request):
        "The recent search."
        if fault := await self._fault(request):
            return fault
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"title": "Unauthorized", "status": 401}, status=401)
        q, now = request.query, datetime.now(UTC)
        low, high = zulu(q["start_time"]), zulu(q["end_time"]) if "end_time" in q else now
        if low < now - timedelta(days=7) or high > now:
            said = {"title": "Invalid Request", "detail": "Invalid 'start_time' or 'end_time'"}
            return web.json_response(said, status=400)
        assert "-is:retweet" in q["query"] and len(q["query"]) <= 512
        found, at = self._matching(q["query"], low, high), int(q.get("next_token", 0))
        size = int(q["max_results"])
        rows = [self._post(n, p) for n, p in enumerate(found)][at : at + size]
        meta = {"result_count": len(rows)}
        if at + size < len(found):
            meta["next_token"] = str(at + size)
        return web.json_response({"meta": meta} | ({"data": rows} if rows else {}))

    def _post(self, number, piece):
        "A post as X shows it."
        row = {"id": str(number), "text": piece.text, "created_at": spelled(piece.at), "lang": "en"}
        row["public_metrics"] = piece.counts
        return row | (
            {"referenced_tweets": [{"type": "retweeted", "id": "1"}]} if piece.repost else {}
        )

    async def _feed(self, request):
        "An RSS feed of all pieces."
        if fault := await self._fault(request):
            return fault
        items = "".join(
            f"<item><title>{escape(p.text)}</title><pubDate>{format_datetime(p.at)}</pubDate></item>"
            for p in self.pieces
        )
        xml = f'<rss version="2.0"><channel><title>t</title>{items}</channel></rss>'
        return web.Response(text='<?xml version="1.0"?>' + xml, content_type="application/rss+xml")

    async def _moved(self, request):
        "Where the feed used to be."
        raise web.HTTPFound("/feed")
