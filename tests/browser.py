"""A page as a real browser shows it: its width, what it asks for, what goes wrong, its print."""

import asyncio
import base64
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from sensequant.ops.report_cli import BROWSERS

PROGRAM = next(filter(None, map(shutil.which, BROWSERS)), None)


@dataclass
class Seen:
    "What a browser saw of a page."

    scroll_width: int = 0  # pixels the page needs
    width: int = 0  # pixels it has
    asked: list[str] = field(default_factory=list)  # addresses other than the page and its data
    errors: list[str] = field(default_factory=list)  # of scripts and of the content policy
    text: str = ""  # as it is read
    pdf: bytes = b""
    shot: bytes = b""  # PNG of the whole page


@contextmanager
def chromium():
    "The address of a browser's socket."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        how = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command = [PROGRAM, *how, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            for line in process.stderr:
                if found := re.search(r"ws://\S+", line):
                    break
            yield found[0]
        finally:
            process.terminate()
            process.wait(20)
            process.stderr.close()


async def _look(address: str, page: Path, width: int, dark: bool) -> Seen:
    "Speak to the browser until the page is shown."
    seen, answers, number = Seen(), {}, 0
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):

        async def call(method, target=None, **parameters):
            nonlocal number
            number += 1
            message = {"id": number, "method": method, "params": parameters}
            await socket.send_json(message | ({"sessionId": target} if target else {}))
            while number not in answers:
                heard(await socket.receive_json(timeout=60))
            return answers.pop(number)

        def heard(message):
            if "id" in message:
                answers[message["id"]] = message.get("result", message)
            method, told = message.get("method"), message.get("params", {})
            if method == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith("data:") and url != page.as_uri():
                    seen.asked.append(url)
            if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
                seen.errors.append(str(told))
            if method == "Page.loadEventFired":
                answers["loaded"] = True

        made = await call("Target.createTarget", url="about:blank")
        attached = await call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        tab = attached["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            await call(f"{domain}.enable", tab)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await call("Emulation.setDeviceMetricsOverride", tab, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await call("Emulation.setEmulatedMedia", tab, features=[scheme])
        answers.pop("loaded", None)
        await call("Page.navigate", tab, url=page.as_uri())
        while "loaded" not in answers:
            heard(await socket.receive_json(timeout=60))

        async def value(words):
            told = await call("Runtime.evaluate", tab, expression=words, returnByValue=True)
            return told["result"]["value"]

        seen.scroll_width = await value("document.documentElement.scrollWidth")
        seen.width = await value("document.documentElement.clientWidth")
        seen.text = await value("document.body.innerText")
        printed = await call("Page.printToPDF", tab, preferCSSPageSize=True, printBackground=True)
        shown = await call("Page.captureScreenshot", tab, captureBeyondViewport=True)
        seen.pdf, seen.shot = (base64.b64decode(x["data"]) for x in (printed, shown))
    return seen


def look(page: Path, width: int, dark: bool = False) -> Seen:
    "Show a page in a window of some width."
    with chromium() as address:
        return asyncio.run(_look(address, page.absolute(), width, dark))
