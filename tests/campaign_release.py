"""A kill campaign over deployments and rollbacks: after each kill one whole release is active.

`python tests/campaign_release.py --kills 300` begins deployments to staging and to production, and
rollbacks in both, in processes of their own, and ends each with kill -9 at a random instant. After
each kill it asks, before anything is mended: does the pointer name the release of before or the one
that was to come, and is every byte of it right? Then what was left is settled: the chain must be
whole, the states must follow the pointers, nothing half-written may be left, and what was undone
must succeed when it is done again. It prints where the kills fell and leaves with 1 when one figure
is not as it must be.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from releases import START, House, build_house, copied

from sensequant.core.errors import SenseQuantError
from sensequant.core.state import ENVIRONMENTS
from sensequant.govern import release as release_module
from sensequant.govern.manifest import release_id_of, run_id_of
from sensequant.govern.promotion import Register, register_path
from sensequant.govern.release import (
    active_release,
    deploy,
    history,
    load_models,
    models_folder,
    pointed,
    release_folder,
    rollback,
    settle,
)

RUNS = 10  # approved ones in a house; then a fresh house is taken
PLACES = (  # where a kill can fall, in order
    "before anything was written",
    "while the release was written",
    "after the row, before the folder's name",
    "after the folder's name, before the pointer",
    "after the pointer, before the last row",
    "after the last row",
)


@dataclass
class Step:
    """A deployment or a rollback that is to be done in a house."""

    house: House
    kind: str  # deploy or rollback
    environment: str
    run_id: str  # to be deployed
    now: datetime
    before: str | None = None  # active release
    rows: int = 0  # of the environment's history

    def carry_out(self) -> None:
        """Do it."""
        if self.kind == "deploy":
            deploy(self.house.home, self.run_id, self.environment, "Chitra", self.now)
        else:
            rollback(self.house.home, self.environment, "Chitra", "a campaign", self.now)

    def goals(self) -> set[str | None]:
        """What may be active after it."""
        if self.kind == "deploy":
            return {release_id_of(self.run_id)}
        taken = [r for r in history(self.house.home, self.environment) if r["kind"] == "deploy"]
        return {r["release_id"] for r in taken} - {self.before} | {None}


@dataclass
class Campaign:
    """A house in which things happen, and what was seen."""

    template: House
    folder: Path
    chance: random.Random
    house: House | None = None
    fresh: list[str] = field(default_factory=list)  # runs that nobody has deployed
    now: datetime = START
    houses: int = 0
    fell: Counter = field(default_factory=Counter)  # kills by place
    killed: Counter = field(default_factory=Counter)  # kills by step
    settled: Counter = field(default_factory=Counter)  # what settling did
    wrong: list[str] = field(default_factory=list)
    usual: dict[str, float] = field(default_factory=dict)  # s that a step takes, by kind

    def move_in(self) -> None:
        """Take a fresh house."""
        self.houses += 1
        self.house = copied(self.template, self.folder / f"house-{self.houses}")
        self.fresh = sorted(p.name for p in (self.house.home / "runs").iterdir())
        self.now = START + timedelta(hours=8)

    def next_step(self) -> Step:
        """Something that can be done now."""
        if self.house is None or not self.fresh:
            self.move_in()
        home = self.house.home
        self.now += timedelta(minutes=1)
        active = {e: pointed(home, e) for e in ENVIRONMENTS}
        ways = [("deploy", "staging", self.fresh[0])] * 4
        ways += [("rollback", e, "") for e in ENVIRONMENTS if active[e]]
        staged = active["staging"]
        with Register(register_path(home)) as register:
            may = staged and register.state(run_id_of(staged)) == "staged"
        may = may and not release_folder(home, "production", staged).exists()  # a second time
        ways += [("deploy", "production", run_id_of(staged))] * 3 if may else []
        kind, environment, run_id = self.chance.choice(ways)
        if (kind, environment) == ("deploy", "production"):
            self.now += timedelta(days=6)  # two full sessions at least
        rows = len(history(home, environment))
        return Step(self.house, kind, environment, run_id, self.now, active[environment], rows)


def work(step: Step, pipe: int) -> None:
    """Do a step, and tell when everything is checked and written but nothing named yet."""
    original = release_module._carry_out

    def tell(*given):
        os.write(pipe, b".")
        original(*given)

    release_module._carry_out = tell
    step.carry_out()


def kill(step: Step, after: float, late: bool) -> bool:
    """Do a step in a process of its own and end it after so many seconds; False if it was done.

    Half of the kills are counted from the moment at which row, name, pointer and row follow each
    other: they take a tenth of the time, and are what matters most.
    """
    sys.stdout.flush()
    ends = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work(step, ends[1])
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(ends[1])
    if late:
        os.read(ends[0], 1)
    os.close(ends[0])
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def place_of(step: Step) -> str:
    """Where a kill fell, by what lies there."""
    home = step.house.home
    rows = history(home, step.environment)[step.rows :]
    folder = models_folder(home, step.environment) / "releases"
    if not rows:
        parked = folder.is_dir() and any(p.name.endswith(".tmp") for p in folder.iterdir())
        return PLACES[1] if parked else PLACES[0]
    if rows[-1]["phase"] == "done":
        return PLACES[5]
    if pointed(home, step.environment) != step.before:
        return PLACES[4]
    named = step.kind == "deploy" and (folder / release_id_of(step.run_id)).is_dir()
    return PLACES[3] if named or step.kind == "rollback" else PLACES[2]


def left_over(home: Path) -> list[str]:
    """Files that were half-written."""
    found = (p for p in (home / "data").rglob("*") if re.fullmatch(r"\..*\.tmp", p.name))
    return [str(p.relative_to(home)) for p in found]


def states_wrong(home: Path) -> list[str]:
    """Active releases whose run does not stand where the pointers say."""
    active = {e: pointed(home, e) for e in ENVIRONMENTS}
    with Register(register_path(home)) as register:
        held = {e: r and register.state(run_id_of(r)) for e, r in active.items()}
        proof = register.verify()
    wrong = [] if proof.intact else [f"the chain: {proof.wrong}"]
    if held["production"] not in (None, "deployed"):
        wrong.append(f"production holds a {held['production']} one")
    # what was taken back from production may still be in staging, where it says so
    allowed = {None, "staged", "deployed", "rolled-back"}
    return wrong + (
        [] if held["staging"] in allowed else [f"staging holds a {held['staging']} one"]
    )


def look(step: Step, when: str, allowed: set[str | None]) -> list[str]:
    """What is wrong with what is active."""
    wrong = []
    for environment in ENVIRONMENTS:
        try:
            release = active_release(step.house.home, environment)
            if release:
                load_models(release)
        except SenseQuantError as error:
            wrong.append(f"{when}: {environment} is not whole: {error}")
    found = pointed(step.house.home, step.environment)
    return wrong + ([] if found in allowed else [f"{when}: {found} is active, not {allowed}"])


def once(campaign: Campaign) -> None:
    """One step, killed; then everything that must hold."""
    step = campaign.next_step()
    home, name = step.house.home, f"{step.kind} {step.environment}"
    allowed = {step.before} | step.goals()
    usual = campaign.usual.get(name, 0.08)
    late = campaign.chance.random() < 0.5
    after = campaign.chance.uniform(0, (0.4 if late else 1.05) * usual)
    if kill(step, after, late):  # otherwise it was done before; what must hold is the same
        campaign.killed[name] += 1
        campaign.fell[place_of(step)] += 1
    wrong = look(step, "after the kill", allowed)
    held = pointed(home, step.environment)
    try:
        said = settle(home, step.now)
    except SenseQuantError as error:
        wrong.append(f"settling was refused: {error}")
        said = []
    campaign.settled.update(s.split()[0] for s in said)
    wrong += look(step, "once settled", {held})
    wrong += states_wrong(home) + [f"left over: {p}" for p in left_over(home)]
    if held == step.before and not wrong:
        begun = time.monotonic()
        step.carry_out()
        campaign.usual[name] = 0.8 * usual + 0.2 * (time.monotonic() - begun)
        wrong += look(step, "done again", allowed - {step.before}) + states_wrong(home)
    if step.run_id in campaign.fresh:
        campaign.fresh.remove(step.run_id)
    campaign.wrong += [f"{name}: {w}" for w in wrong]


def campaign(kills: int, seed: int, folder: Path, tell=None) -> Campaign:
    """So many kills, and what came of them."""
    template = build_house(folder / "template")
    for number in range(1, RUNS + 1):
        template.run(number, START + timedelta(hours=7))
    seen = Campaign(template, folder, random.Random(seed))
    while seen.killed.total() < kills and not seen.wrong:
        once(seen)
        if tell and seen.killed.total() % 50 == 0:
            tell(seen)
    return seen


def main() -> int:
    """Run a campaign and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    given, begun = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        os.environ["SENSEQUANT_ENV_FILE"], os.environ["SENSEQUANT_HOME"] = f"{name}/.env", name
        seen = campaign(given.kills, given.seed, Path(name))
    total = seen.killed.total()
    print(f"{total} kills in {time.monotonic() - begun:.0f} s, {seen.houses} houses")
    for step, n in sorted(seen.killed.items()):
        print(f"  {step:<46}{n:>5}")
    print("Where they fell")
    for place in PLACES:
        print(f"  {place:<46}{seen.fell[place]:>5}")
    print(f"Settled: {dict(seen.settled)}")
    for fault in seen.wrong:
        print(f"WRONG {fault}")
    missed = [p for p in PLACES if not seen.fell[p]] if total >= 300 else []
    print("Every kill left one whole release or none" if not seen.wrong else "FAILED")
    if missed:
        print(f"no kill fell {', '.join(missed)}")
    return 1 if seen.wrong or total < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
