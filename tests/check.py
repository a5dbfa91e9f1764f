"""Every check of the house, one after the other: what `make test` runs.

`--fast` leaves out the tests marked slow, and the demand on coverage that only they can meet. A
step that fails does not stop the others; the exit status says whether one did.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_COVERAGE = 85  # percent of the package's lines
NBDEV_TEST = "from nbdev.test import nbdev_test; nbdev_test(path='nbs', n_workers=2)"


@dataclass(frozen=True)
class Step:
    """A command of this environment's Python."""

    name: str
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)  # of the environment, only here


def pytest_words(fast: bool) -> tuple[str, ...]:
    """pytest on two cores, adding its coverage to what the notebooks' lessons have covered."""
    words = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    words += ("--durations=30", "--durations-min=5")
    words += ("--cov", "--cov-append", "--cov-report=term:skip-covered")
    return (*words, "-m", "not slow") if fast else (*words, f"--cov-fail-under={LEAST_COVERAGE}")


def steps(fast: bool) -> list[Step]:
    """What is checked: quick things first; pytest last, so that its closing line is."""
    measured = {"COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml")}
    places = ("nbs", "tests", "setup.py")
    return [
        Step("lint (ruff)", ("-m", "ruff", "check", "--quiet", *places)),
        Step("layout (ruff)", ("-m", "ruff", "format", "--check", "--quiet", *places)),
        Step("types (mypy)", ("-m", "mypy", "--no-error-summary")),
        Step("lessons (nbdev-test)", ("-c", NBDEV_TEST), measured),
        Step("tests (pytest)", pytest_words(fast)),
    ]


def isolated(folder: str) -> dict[str, str]:
    """An environment with nobody's own settings, data, runs or start-up scripts."""
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith("SENSEQUANT_")}
    places = {"SENSEQUANT_HOME": "home", "SENSEQUANT_ENV_FILE": ".env", "IPYTHONDIR": "ipython"}
    places |= {"JUPYTER_CONFIG_DIR": "jupyter", "COVERAGE_FILE": ".coverage"}
    fixed = {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUTF8": "1"}
    return own | {k: f"{folder}/{v}" for k, v in places.items()} | fixed


def passed(step: Step, folder: str) -> bool:
    """Run a step in the clone and say how it went."""
    print(f"\n=== {step.name}", flush=True)
    began, command = time.perf_counter(), [sys.executable, *step.words]
    surroundings = isolated(folder) | step.variables
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, stdin=subprocess.DEVNULL, check=False
    )
    word = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
    print(f"=== {step.name}: {word}, {time.perf_counter() - began:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run all steps and say which failed."""
    chosen, began = steps(fast="--fast" in sys.argv[1:]), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sensequant-check-") as folder:
        failed = [step.name for step in chosen if not passed(step, folder)]
    minutes = (time.perf_counter() - began) / 60
    names = f": {', '.join(failed)}" if failed else ""
    print(f"{len(failed)} of {len(chosen)} steps failed{names}; {minutes:.1f} minutes", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
