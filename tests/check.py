"""Every check of the house, one after the other: what `make test` runs.

`--fast` leaves out the tests marked slow and the demand on coverage, which they carry. A step that
fails does not stop the others; the exit status says whether one did.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAST_COVERAGE = 85  # percent of the package's lines
NBDEV_TEST = "from nbdev.test import nbdev_test; nbdev_test(path='nbs', n_workers=2)"


@dataclass(frozen=True)
class Step:
    """A command of this environment's Python."""

    name: str
    words: tuple[str, ...]


def steps(fast: bool) -> list[Step]:
    """What is checked, quick things first, pytest last so that its closing line is."""
    tests = ("-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--cov", "--cov-report=")
    chosen = ("-m", "not slow") if fast else ()
    show = ("-m", "coverage", "report", "--skip-covered", "--sort=cover")
    least = () if fast else (f"--fail-under={LEAST_COVERAGE}",)
    return [
        Step("ruff: lint", ("-m", "ruff", "check", "--quiet", "nbs", "tests", "setup.py")),
        Step("ruff: layout", ("-m", "ruff", "format", "--check", "nbs", "tests", "setup.py")),
        Step("mypy", ("-m", "mypy", "--no-error-summary")),
        Step("notebooks: nbdev-test", ("-c", NBDEV_TEST)),
        Step("tests: pytest", (*tests, *chosen)),
        Step("coverage", (*show, *least)),
    ]


def isolated(folder: str) -> dict[str, str]:
    """The environment of the steps: nobody's own settings, data or runs."""
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith("SENSEQUANT_")}
    settings = {"SENSEQUANT_HOME": folder, "SENSEQUANT_ENV_FILE": f"{folder}/.env"}
    return own | settings | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUTF8": "1"}


def main() -> int:
    """Run all steps and say which failed."""
    fast, failed, began = "--fast" in sys.argv[1:], [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sensequant-check-") as folder:
        for step in steps(fast):
            print(f"\n=== {step.name}", flush=True)
            start, command = time.perf_counter(), [sys.executable, *step.words]
            done = subprocess.run(
                command, cwd=ROOT, env=isolated(folder), stdin=subprocess.DEVNULL, check=False
            )
            word = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
            print(f"=== {step.name}: {word}, {time.perf_counter() - start:.0f} s", flush=True)
            failed += [step.name] if done.returncode else []
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{len(failed)} of {len(steps(fast))} steps failed, {minutes:.1f} minutes", flush=True)
    for name in failed:
        print(f"  {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
