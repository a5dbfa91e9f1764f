"""A fault campaign: thousands of fetches from the sandbox, at random faults, killed ten times.

`python tests/campaign.py --fetches 2000 --kills 10` runs `sensequant data fetch` in processes of
their own, ends some of them with kill -9 and starts them again until every symbol is whole. What
the broker spoilt or denied twice alike is then mended by the means a person has. In the end the
store is compared with the market row for row, and the broker's log with what a client may ask. It
prints a table of figures and leaves with 1 when one of them is not as it must be.
"""

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from sensequant.core.settings import load_settings
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore, hash_bars
from sensequant.data.coverage import Span, find_gaps
from sensequant.data.feeds import breeze_feed
from sensequant.data.ingest import FetchPlan, fill
from sensequant.live.sandbox import Sandbox, SandboxSpec
from sensequant.market import breeze_protocol
from sensequant.market.calendar import sessions
from sensequant.market.ranges import plan_chunks
from sensequant.market.simulator import MarketSpec, simulate

CLI = [sys.executable, "-c", "from sensequant.ops.data_cli import data; data()"]
FIVE, V2 = Interval.MINUTE_5, "v2/historicalcharts"
FIRST, LAST, CHUNK_DAYS = date(2023, 1, 2), date(2024, 6, 28), 7
TRIES, WORKERS, SCALE = 4, 4, 12  # the allowance, twelve times that of Breeze, is what limits
MOST_RUNS = 80  # after which a campaign that does not end has failed

RARE, SELDOM, OFTEN = 0.0004, 0.002, 0.01  # share of the requests
RATES = {
    OFTEN: "html_429 html_502 html_503 empty_body json_null json_list json_string asp_net "
    "truncated drop drop_after drop_midway throttled throttled_null throttled_401 invalid_user "
    "rows_unordered rows_duplicated rows_strings",
    SELDOM: "history_fail no_data empty_success hang late rows_high_low rows_nan rows_null "
    "rows_outside rows_dates master_404 master_corrupt master_cut master_empty",
    RARE: "expired invalid_session wrong_key wrong_checksum static_ip throttled_day",
}
FAULTS = {fault: rate for rate, names in RATES.items() for fault in names.split()}
TYPES = {"refused before a chunk", "DataError"} | set(dir(breeze_protocol))


@dataclass
class Run:
    """One start of the command, and its part of the broker's log."""

    begun: int  # requests in the log before
    held: dict[str, list[tuple[date, date]]]  # days in the store before, by ISEC code
    ended: int = 0
    killed: bool = False
    output: str = ""


@dataclass
class Campaign:
    """What is needed to begin a run, and what became of those before."""

    home: Path
    broker: Sandbox
    market: MarketSpec
    limits: dict[str, int]
    runs: list[Run] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, object]:
        """Settings that lead to the sandbox."""
        names = ("breeze_api_key", "breeze_api_secret", "breeze_session_token")
        keys = dict(zip(names, map(str, self.broker.credentials), strict=True))
        given = {"home": self.home, "breeze_url": self.broker.url, "breeze_tries": TRIES}
        return given | keys | self.limits | {"breeze_backoff_s": 0.02, "breeze_timeout_s": 3.0}

    @property
    def feed(self):
        """The feed of the sandbox, in this process."""
        return breeze_feed(load_settings(**self.settings))

    @property
    def store(self) -> BarStore:
        """The store of the campaign."""
        return BarStore(self.home / "data" / "bars")

    @property
    def codes(self) -> dict[str, str]:
        """ISEC code of each symbol."""
        listed = self.broker.desk.library.source.listings
        return {one.nse_code: one.isec_code for one in listed if not one.is_index}

    def asked(self, run: Run | None = None) -> list[tuple[str, date, date]]:
        """Requests for history, of one run or of all: ISEC code, first and last day."""
        log = self.broker.log[run.begun : run.ended] if run else self.broker.log
        rows, day = [r.params for r in log if r.endpoint == V2], date.fromisoformat
        return [(r["stock_code"], day(r["from_date"][:10]), day(r["to_date"][:10])) for r in rows]


def start(campaign: Campaign) -> tuple[subprocess.Popen, Run, Path]:
    """Begin the command in a process group of its own."""
    source, store = campaign.feed.name, campaign.store
    held = {
        code: [(r.first, r.last) for r in store.ranges(source, symbol, FIVE)]
        for symbol, code in campaign.codes.items()
    }
    words = ["fetch", "--source", "breeze", "--interval", FIVE.value, "--workers", str(WORKERS)]
    words += ["--start", str(FIRST), "--end", str(LAST), "--chunk-days", str(CHUNK_DAYS)]
    words += ["--symbols", ",".join(campaign.codes)]
    env = {f"SENSEQUANT_{k.upper()}": str(v) for k, v in campaign.settings.items()}
    env["SENSEQUANT_ENV_FILE"] = str(campaign.home / ".env")
    path = campaign.home / f"run-{len(campaign.runs)}.txt"
    with path.open("w") as out:
        process = subprocess.Popen(
            [*CLI, *words], env=os.environ | env, stdout=out, stderr=out, process_group=0
        )
    return process, Run(len(campaign.broker.log), held), path


def run_once(campaign: Campaign, kill_after: int | None) -> int | None:
    """Run the command, to its end or until so many requests more were seen; its exit code."""
    process, run, path = start(campaign)
    while process.poll() is None:
        if kill_after is not None and len(campaign.broker.log) - run.begun >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            run.killed = True
        time.sleep(0.01)
    process.wait()
    run.ended, run.output = len(campaign.broker.log), path.read_text()
    campaign.runs.append(run)
    return None if run.killed else process.returncode


def walk(campaign: Campaign, fetches: int, kills: int, seed: int) -> None:
    """Kill and restart, then go on until every symbol is whole."""
    chance, share = random.Random(seed), fetches // (kills + 1)
    while len(campaign.runs) < MOST_RUNS:
        killed = sum(run.killed for run in campaign.runs)
        code = run_once(campaign, chance.randint(1, share) if killed < kills else None)
        word = "killed" if code is None else f"exit code {code}"
        count = f"{len(campaign.broker.log):,} requests so far"
        print(f"run {len(campaign.runs)}: {word}, {count}", flush=True)
        if code == 0:
            break


def mend(campaign: Campaign) -> tuple[int, int, int]:
    """Ask anew for what is in quarantine, and for sessions without a bar; days, sessions, rows of
    which there was no trace."""
    campaign.broker.desk.faults.clear()
    feed, store, span = campaign.feed, campaign.store, Span(FIVE, FIRST, LAST)
    bad = store.quarantined(feed.name)[["symbol", "ts"]].dropna()
    seen = set(bad.itertuples(index=False, name=None))
    gaps = {}
    for symbol in campaign.codes:
        held = store.read(feed.name, symbol, FIVE).index.normalize().unique()
        gaps[symbol] = [(g.first, g.last) for g in find_gaps(span.expected(), held)]
    empty = {(s, day) for s, days in gaps.items() for a, b in days for day in sessions(a, b)}
    lost = {(s, ts) for s, ts in lost_rows(campaign) - seen if (s, ts.normalize()) not in empty}
    days = {(s, ts.date()) for s, ts in seen if FIRST <= ts.date() <= LAST}
    for symbol, day in sorted(days):
        fill(feed, store, {symbol: Span(FIVE, day, day)}, FetchPlan(force=True))
    fill(feed, store, dict.fromkeys(gaps, span), again=gaps)
    return len(days), len(empty), len(lost)


def lost_rows(campaign: Campaign) -> set:
    """Rows that were traded and are not in the store."""
    market, source, lost = simulate(campaign.market), campaign.feed.name, set()
    for symbol in campaign.codes:
        true = market.bars(symbol, FIVE, FIRST, LAST).index
        held = campaign.store.read(source, symbol, FIVE).index
        lost |= {(symbol, ts) for ts in true.difference(held)}
    return lost


def compare(campaign: Campaign) -> tuple[int, int]:
    """Rows in the store; symbols whose rows are not those of the market."""
    market, source = simulate(campaign.market), campaign.feed.name
    rows = wrong = 0
    for symbol in campaign.codes:
        held = campaign.store.read(source, symbol, FIVE)
        rows += len(held)
        wrong += hash_bars(held) != hash_bars(market.bars(symbol, FIVE, FIRST, LAST))
    return rows, wrong


def refetched(campaign: Campaign) -> int:
    """Requests for days that the store held when the run began."""
    return sum(
        any(first <= b and a <= last for a, b in run.held[code])
        for run in campaign.runs
        for code, first, last in campaign.asked(run)
    )


def most_tries(campaign: Campaign) -> int:
    """Most requests for one chunk in one run."""
    counts = (Counter(campaign.asked(run)).values() for run in campaign.runs)
    return max(max(c, default=0) for c in counts)


def busiest(campaign: Campaign) -> int:
    """Most requests that the broker saw within a minute."""
    times = [r.time.timestamp() for r in campaign.broker.log if r.endpoint != "master"]
    low = most = 0
    for high, moment in enumerate(times):
        while times[low] <= moment - 60:
            low += 1
        most = max(most, high - low + 1)
    return most


def refusals(campaign: Campaign) -> tuple[Counter, int]:
    """Refusals by type as the runs told them; faults of the program."""
    told: Counter = Counter()
    for run in campaign.runs:
        told.update(re.findall(r"^failed: .*? failed \(.*?\): (\w+):", run.output, re.MULTILINE))
        told["refused before a chunk"] += len(re.findall(r"^error: ", run.output, re.MULTILINE))
    return +told, sum("Traceback" in run.output for run in campaign.runs)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetches", type=int, default=2000, help="chunks to be fetched, at least")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def figures_of(campaign: Campaign, chunks: int) -> dict[str, object]:
    """What came of a campaign, before and after mending."""
    log, runs = campaign.broker.log, campaign.runs
    kinds, (told, tracebacks) = Counter(r.fault for r in log if r.fault), refusals(campaign)
    found: dict[str, object] = {
        "chunks of the market": chunks,
        "requests": len(log),
        "requests for history": len(campaign.asked()),
        "faults that happened": kinds.total(),
        "kinds of them": f"{len(kinds)} of {len(FAULTS)}",
        "runs": len(runs),
        "killed with kill -9": sum(run.killed for run in runs),
        "failures told": ", ".join(f"{n} {t}" for t, n in told.most_common()) or "none",
        "failures without a type": sum(told[t] for t in told.keys() - TYPES),
        "tracebacks": tracebacks,
        "requests for what was stored before": refetched(campaign),
        "most requests for a chunk in a run": most_tries(campaign),
        "most requests within a minute": busiest(campaign),
        "requests the broker had to throttle": sum(
            "Limit exceed" in r.error and not r.fault for r in log
        ),
        "damaged files": len(campaign.store.damaged()),
        "last run whole": not runs[-1].killed and "Failed chunks  0" in runs[-1].output,
    }
    mended = ("days spoilt twice alike", "sessions denied twice", "rows lost without a trace")
    found |= dict(zip(mended, mend(campaign), strict=True))
    return found | dict(
        zip(("rows compared", "symbols that differ"), compare(campaign), strict=True)
    )


def faults_in(found: dict, kills: int, limits: dict[str, int]) -> list[str]:
    """Figures that are not as they must be."""
    none = ("failures without a type", "tracebacks", "requests for what was stored before")
    none += ("requests the broker had to throttle", "damaged files")
    none += ("rows lost without a trace", "symbols that differ")
    wrong = [name for name in none if found[name]]
    most = {
        "most requests for a chunk in a run": TRIES,
        "most requests within a minute": limits["breeze_calls_per_minute"],
    }
    wrong += [name for name, limit in most.items() if found[name] > limit]
    wrong += [] if found["killed with kill -9"] >= kills else ["killed with kill -9"]
    return wrong + [n for n in ("faults that happened", "last run whole") if not found[n]]


def main() -> int:
    """Run a campaign and judge it."""
    given, begun = parse(), time.monotonic()
    each = len(plan_chunks(FIVE, FIRST, LAST, CHUNK_DAYS))
    symbols = -(-given.fetches // each)
    market = MarketSpec(symbols, FIRST, LAST, given.seed, late_listing_frac=0, missing_day_frac=0)
    limits = {"breeze_calls_per_minute": 60 * SCALE, "breeze_calls_per_day": 4_500 * SCALE}
    spec = SandboxSpec(market, scale=SCALE, rates=FAULTS, seed=given.seed)
    with tempfile.TemporaryDirectory(prefix="campaign-") as name, Sandbox(spec) as broker:
        os.environ["SENSEQUANT_ENV_FILE"], os.environ["SENSEQUANT_HOME"] = f"{name}/.env", name
        campaign = Campaign(Path(name), broker, market, limits)
        print(f"{symbols} symbols, {each} chunks each, {given.kills} kills", flush=True)
        walk(campaign, symbols * each, given.kills, given.seed)
        found = figures_of(campaign, symbols * each)
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    found["CPU, s"] = round(sum(resource.getrusage(w).ru_utime for w in whose))
    found["time, s"] = round(time.monotonic() - begun)
    for name, value in found.items():
        print(f"  {name:<38}{value:,}" if type(value) is int else f"  {name:<38}{value}")
    wrong = faults_in(found, given.kills, limits)
    print(f"FAILED: {', '.join(wrong)}" if wrong else "every figure is as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
