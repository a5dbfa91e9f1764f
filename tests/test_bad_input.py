"""A user who misuses the program: each refusal is one line that names the place and what to do,
with the exit code of its kind, and what was there before is still there, byte for byte."""

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pytest
from conftest import SMALL
from typer.testing import CliRunner

from sensequant.core.errors import SettingsError
from sensequant.core.settings import Settings, load_settings
from sensequant.core.types import Interval
from sensequant.data.bars import BarStore
from sensequant.data.feeds import CsvFeed, SimulatedFeed
from sensequant.market.calendar import known
from sensequant.market.simulator import MarketSpec
from sensequant.ops.main import app
from sensequant.ops.orchestrator import begin_run, run_config

HEAD = "date,open,high,low,close,volume"
SPEC = MarketSpec(2, date(2022, 6, 1), date(2024, 2, 29), 1, 0.4)
SPAN = ("--start", "2023-01-02", "--end", "2024-02-29")
NOBODY = 65534


def sensequant(*words):
    "The command as a person types it, in this process."
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert "Traceback" not in done.output
    return done


def require_refused(done, *parts, code=2):
    "One line on standard error with every one of `parts`."
    assert done.exit_code == code, done.output
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: "), line
    assert [p for p in parts if p not in line] == [], line


def tree(folder):
    "SHA-256 of every file by its path; None for a folder."
    whole = lambda p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None  # noqa: E731
    return {str(p.relative_to(folder)): whole(p) for p in sorted(folder.rglob("*"))}


@pytest.fixture
def home():
    "The folder of data, runs and reports; it is not there yet."
    return Path(os.environ["SENSEQUANT_HOME"])


@pytest.fixture(scope="module")
def rows():
    "Rows of a daily CSV file, without its heading."
    bars = SimulatedFeed(SPEC).fetch("SIM001", Interval.DAY, SPEC.start, SPEC.end).bars
    text = bars.set_axis(bars.index.strftime("%Y-%m-%d")).to_csv(header=False)
    return text.splitlines()


def write_csv(path, rows, head=HEAD):
    "A CSV file of these rows."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


# What a run is asked

WRONG_USE = {
    "no csv folder": (["--csv-dir", "nowhere"], "be there and readable; found No such", "nowhere"),
    "a file for a folder": (["--csv-dir", "note.txt"], "found Not a directory", "note.txt"),
    "an empty folder": (["--csv-dir", "empty"], "must hold SYMBOL.csv", "found none", "empty"),
    "csv from nowhere": (["--source", "csv"], "needs a folder", "csv_dir"),
    "a source there is not": (
        ["--source", "kite"],
        "source must be csv, breeze, hybrid or simulated",
        "kite",
    ),
    "a zone there is not": (["--csv-dir", "bars", "--csv-zone", "Mars"], "IANA name", "Mars"),
    "an unknown symbol": (["--csv-dir", "bars", "--symbols", "tcs,tsc"], "found TSC", "TCS"),
    "a path for a symbol": (["--csv-dir", "bars", "--symbols", "../../etc/passwd"], "symbol"),
    "no symbol": (["--symbols", " , "], "at least one symbol", "--symbols"),
    "no symbols file": (["--symbols-file", "none.txt"], "must be readable text", "none.txt"),
    "an empty symbols file": (["--symbols-file", "blank.txt"], "at least one", "blank.txt"),
    "a binary symbols file": (["--symbols-file", "photo.txt"], "readable text", "photo.txt"),
    "a folder of symbols": (["--symbols-file", "empty"], "readable text", "empty"),
    "symbols twice": (["--symbols", "TCS", "--universe", "nifty50"], "named in one way"),
    "an unknown universe": (["--universe", "sensex"], "nifty50, niftynext50, nifty100", "sensex"),
    "a universe of others": (["--universe", "nifty50"], "symbol of the universe; found nifty50"),
    "end before start": (["--start", "2024-05-01", "--end", "2024-04-01"], "end must not lie"),
    "no session": (["--start", "2024-01-06", "--end", "2024-01-07"], "must hold a session"),
    "past the calendar": (["--end", "2050-01-03"], "a day must lie from", "found 2050-01-03"),
    "before the calendar": (["--start", "1970-01-05"], "a day must lie from", "1997-01-01"),
    "a day of February": (["--start", "2024-02-30"], "a day such as 2024-01-31", "2024-02-30"),
    "another order": (["--start", "01/02/2024"], "start must be a day such as 2024-01-31"),
    "a day with a time": (["--end", "2024-02-01T10:00"], "end must be a day", "T10:00"),
    "seconds for a day": (["--start", "1704067200"], "start must be a day", "1704067200"),
    "an interval": (["--interval", "1hour"], "one of 1minute, 5minute, 15minute", "1hour"),
    "no workers": (["--workers", "0"], "workers must be a whole number from 1 to 512", "found 0"),
    "no number": (["--signal-ic", "nan"], "signal_ic must be a number from 0 to 0.5", "found nan"),
    "below the range": (["--seed", "-1"], "seed must be a whole number from 0 to 2,147,483,647"),
    "no market": (["--sim-symbols", "0"], "sim_symbols must be a whole number from 1 to 999"),
    "a misspelt setting": (["--set", "horizn_days=4"], "found horizn_days", "mean horizon_days?"),
    "a setting's type": (["--set", "horizon_days=x"], "from 1 to 120 sessions", "found x"),
    "half a number": (["--set", "horizon_days=2.5"], "a whole number from 1 to 120", "found 2.5"),
    "a setting without =": (["--set", "horizon_days"], "--set takes NAME=VALUE"),
    "a setting of nothing": (["--set", "horizon_days="], "from 1 to 120", "found nothing"),
    "scores upside down": (["--set", "exit_score=0.5"], "exit_score must not lie above"),
    "no benchmark": (["--benchmark", "none.csv"], "benchmark must be a file", "none.csv"),
    "a folder for it": (["--benchmark", "empty"], "benchmark must be a file", "empty"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_one_line_and_leaves_nothing(case, tmp_path, home, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("TCS\n")
    (tmp_path / "blank.txt").write_text("# none yet\n\n")
    (tmp_path / "photo.txt").write_bytes(bytes(range(256)))
    write_csv(tmp_path / "bars" / "TCS.csv", rows[:40])
    before, (words, *parts) = tree(tmp_path), WRONG_USE[case]
    size = [] if "--sim-symbols" in words else ["--sim-symbols", "1"]
    require_refused(sensequant("run", *size, *words), *parts)
    assert (home.exists(), tree(tmp_path)) == (False, before)


@pytest.mark.parametrize("words", [["--wat"], ["--seed", "x"], ["more"], ["--start"]])
def test_words_that_no_command_has_are_shown_in_a_box(words, home):
    done = sensequant("run", *words)
    assert done.exit_code == 2 and "Error" in done.stderr and words[0] in done.stderr
    assert done.stdout == "" and not home.exists()


OF_A_RUN = {
    "resume": "",
    "report": "",
    "train student": "",
    "verify": "",
    "reproduce": "",
    "audit": "",
    "release manifest": "",
    "release validate": "",
    "release deploy": "-e staging",
    "candidates show": "",
    "candidates approve": "--role Risk --key x",
    "candidates reject": "--why hush --yes",
}


@pytest.mark.parametrize("command", OF_A_RUN)
@pytest.mark.parametrize("run_id", ["latest", "live_candidate_20200101_000000", "../../etc"])
def test_a_run_there_is_not(command, run_id, home):
    done = sensequant(*command.split(), run_id, *OF_A_RUN[command].split())
    require_refused(done, "a run must have a folder", run_id)
    assert not home.exists()


# Settings

ENV_FILES = {
    "a misspelt name": (b"SENSEQUANT_HORIZN_DAYS=3\n", "found horizn_days", "mean horizon_days?"),
    "a wrong value": (b"SENSEQUANT_HORIZON_DAYS=hush\n", "from 1 to 120 sessions", "found hush"),
    "no value": (b"A=1\n\nSENSEQUANT_SEED\n", "NAME=VALUE", ".env, line 3"),
    "an open quote": (b"# mine\r\nSENSEQUANT_SEED='3\r\nB=2\r\n", "quotes closed", ".env, line 2"),
    "no assignment": (b"A=1\n=== hush\n", "NAME=VALUE", ".env, line 2"),
    "a photograph": (bytes(range(256)), "readable text", "not UTF-8"),
}


@pytest.mark.parametrize("case", ENV_FILES)
def test_a_broken_env_file_is_named_with_its_line(case, home):
    file, (content, *parts) = Path(os.environ["SENSEQUANT_ENV_FILE"]), ENV_FILES[case]
    file.write_bytes(content)
    require_refused(sensequant("settings"), str(file), *parts)
    require_refused(sensequant("run", "--dryrun"), str(file), *parts)
    assert (file.read_bytes(), home.exists()) == (content, False)


def test_a_folder_for_an_env_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SENSEQUANT_ENV_FILE", str(tmp_path))
    require_refused(sensequant("settings"), "must be readable text; found Is a directory")


def test_names_of_others_and_blank_values_are_passed_over(monkeypatch):
    "A template's empty line means not set, and so does an empty variable of the shell."
    text = "\ufeffPATH=/x\nexport SENSEQUANT_SEED=4 # mine\nSENSEQUANT_BREEZE_API_KEY=\n"
    Path(os.environ["SENSEQUANT_ENV_FILE"]).write_text(text)
    monkeypatch.setenv("SENSEQUANT_HORIZON_DAYS", "")
    settings = load_settings()
    assert (settings.seed, settings.breeze_api_key, settings.horizon_days) == (4, None, 5)


def test_an_unknown_variable_of_the_shell_is_named(monkeypatch):
    monkeypatch.setenv("SENSEQUANT_WORKER", "3")
    require_refused(sensequant("settings"), "found worker; in environment", "mean workers?")


def test_a_relative_home_is_one_place_wherever_the_program_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert load_settings(home="runs here").home == tmp_path / "runs here"
    assert load_settings(home="~/x").home == tmp_path / "me" / "x"


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_refuses_what_it_cannot_hold(name):
    "A text is no number, no day and no choice; a setting of text or a path takes it."
    field = Settings.model_fields[name]
    if "text" in str(field.json_schema_extra) or "Path" in str(field.annotation):
        assert load_settings(**{name: "x y"})
        return
    with pytest.raises(SettingsError, match=rf"^{name} must be a.*; found x y|^{name}.*one of|or "):
        load_settings(**{name: "x y"})


# Files of bars


def flawed(rows, what, times):
    "The rows with column `what[0]` of the first few made `what[1]`."
    column, value = what
    cells = [r.split(",") for r in rows]
    for row in cells[200 : 200 + times]:
        row[column] = value
    return [",".join(row) for row in cells]


def test_a_plan_names_the_file_row_column_and_value_of_each_fault(tmp_path, home, rows):
    bars = tmp_path / "bars"
    write_csv(bars / "M&M.csv", rows)
    write_csv(bars / "bajaj-auto.CSV", rows[::-1])
    write_csv(bars / "FEW.csv", flawed(rows, (4, "n/a"), 3))
    write_csv(bars / "MANY.csv", flawed(rows, (5, "-7"), 30))
    write_csv(bars / "TWICE.csv", rows + rows[200:230])
    write_csv(bars / "NOVOLUME.csv", [r.rpartition(",")[0] for r in rows], HEAD[:-7])
    (bars / "EMPTY.csv").write_text("")
    (bars / "TORN.csv.gz").write_bytes(b"\x1f\x8b\x08" + bytes(30))
    (bars / "GONE.csv").symlink_to(tmp_path / "gone.csv")
    (bars / "TREE" / "5minute").mkdir(parents=True)
    before = tree(tmp_path)
    done = sensequant("run", "--dryrun", "--csv-dir", bars, *SPAN)
    told = dict(line[10:].split(": ", 1) for line in done.output.splitlines() if "refused" in line)
    assert (done.exit_code, home.exists(), tree(tmp_path)) == (0, False, before)
    for symbol, parts in {
        "MANY": ["at most 1.0% of the rows", "found 30 of"],
        "TWICE": ["at most 1.0% of the rows", "found 30 of"],
        "NOVOLUME": ["columns volume must be there", "NOVOLUME.csv"],
        "EMPTY": ["an empty file", "EMPTY.csv"],
        "TORN": ["whole gzip archive", "TORN.csv.gz"],
        "GONE": ["must be readable; found No such file", "GONE.csv"],
        "TREE": ["1day bars of TREE must be there; found only 5minute", str(bars)],
    }.items():
        reason = told.pop(symbol)
        assert [p for p in parts if p not in reason] == [], reason
    assert told == {} and "8 windows" in done.output  # two each: M&M, BAJAJ-AUTO, FEW, POOLED


@pytest.mark.parametrize("typed", ["m&m,Bajaj-Auto", "M&M, BAJAJ-AUTO,m&m"])
def test_codes_may_be_typed_in_small_letters(typed, tmp_path, rows):
    for name in ("M&M.csv", "bajaj-auto.csv"):
        write_csv(tmp_path / name, rows)
    done = sensequant("run", "--dryrun", "--csv-dir", tmp_path, *SPAN, "--symbols", typed)
    assert (done.exit_code, "6 windows" in done.output) == (0, True), done.output
    feed = CsvFeed(tmp_path)
    assert feed.symbols() == ["BAJAJ-AUTO", "M&M"] and feed.listed_on("BAJAJ-AUTO")


def test_two_files_that_differ_by_case_are_one_too_many(tmp_path, rows):
    for name in ("TCS.csv", "tcs.csv"):
        write_csv(tmp_path / name, rows)
    if len(CsvFeed(tmp_path).tree._found()) == 2:  # a file system that tells them apart
        done = sensequant("run", "--dryrun", "--csv-dir", tmp_path, *SPAN)
        assert "one place must hold TCS; found TCS.csv, tcs.csv" in done.output


# What was there before


@pytest.mark.parametrize("words", [["runs"], ["resume"], ["report"], ["run", "--sim-symbols", "1"]])
@pytest.mark.parametrize("damage", ["note", "torn", "page", "folder"])
def test_a_damaged_state_is_named_and_kept(damage, words, home):
    path = begin_run(run_config(load_settings(), []), home).state.path
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        page = whole[:4096] + b"\xff" * 2048 + whole[6144:]
        path.write_bytes(
            {"note": b"not a database" * 99, "torn": whole[:9000], "page": page}[damage]
        )
    before, done = tree(home), sensequant(*words)
    must = "readable and writable" if damage == "folder" else "must be whole"
    assert done.exit_code in (1, 2)  # no wrong use, yet nothing has begun
    require_refused(done, must, str(path), code=done.exit_code)
    assert tree(home) == before


@contextmanager
def nobody():
    "In the block, permissions bind, whoever runs the tests."
    if os.geteuid():
        yield
        return
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def open_folder(monkeypatch):
    "A folder that everybody may enter, with a home that only its owner may write."
    known()  # what is loaded late must be loaded by its owner
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "home").mkdir()
        monkeypatch.setenv("SENSEQUANT_HOME", str(folder / "home"))
        monkeypatch.setenv("SENSEQUANT_ENV_FILE", str(folder / ".env"))
        yield folder
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_a_home_that_may_not_be_written_is_refused(open_folder):
    home = open_folder / "home"
    home.chmod(0o555)
    with nobody():
        done = sensequant("run", "--sim-symbols", "1", *SPAN)
    require_refused(done, "folder must be writable", str(home), "Change its permissions")
    assert tree(home) == {}


def test_what_may_not_be_read_is_named(open_folder, rows):
    for symbol in ("TCS", "INFY"):
        write_csv(open_folder / "bars" / f"{symbol}.csv", rows)
    (open_folder / "bars" / "TCS.csv").chmod(0)
    with nobody():
        done = sensequant("run", "--dryrun", "--csv-dir", open_folder / "bars", *SPAN)
    assert done.exit_code == 0 and "refused TCS: the file must be readable" in done.output
    (open_folder / "bars").chmod(0)
    with nobody():
        done = sensequant("run", "--csv-dir", open_folder / "bars", *SPAN)
    assert done.exit_code == 2 and "readable" in done.stderr
    (open_folder / ".env").write_text("SENSEQUANT_SEED=1\n")
    (open_folder / ".env").chmod(0)
    with nobody():
        done = sensequant("settings")
    require_refused(done, "must be readable text; found Permission denied", ".env")


# Whole runs


def settings_of(**more):
    "The small settings of the tests as words of the command line."
    small = {k: v for k, v in SMALL.items() if k != "sim_symbols"} | more
    return [w for k, v in small.items() for w in ("--set", f"{k}={v}")]


@pytest.mark.slow
def test_a_run_goes_on_without_the_symbols_it_refuses(tmp_path, monkeypatch, rows):
    "In a folder with blanks and letters of other alphabets, beside a store that was there before."
    home, bars = tmp_path / "घर ₹ home", tmp_path / "CSV ä files"
    monkeypatch.setenv("SENSEQUANT_HOME", str(home))
    feed, store = CsvFeed(bars), BarStore(home / "data" / "bars")
    for name in ("M&M.csv", "bajaj-auto.csv", "BAD.csv"):
        write_csv(bars / name, rows)
    for symbol in ("M&M", "BAD"):
        held = feed.fetch(symbol, Interval.DAY, SPEC.start, date(2022, 12, 30)).bars
        store.write(feed.name, symbol, Interval.DAY, held)
    write_csv(bars / "BAD.csv", flawed(rows, (2, "0.5"), 30))
    torn, kept = (store.path(feed.name, s, Interval.DAY) for s in ("M&M", "BAD"))
    torn.write_bytes(torn.read_bytes()[:-50])
    damaged, before, given = torn.read_bytes(), kept.read_bytes(), tree(bars)
    done = sensequant("run", "--csv-dir", bars, "--workers", "99", *settings_of())
    assert done.exit_code == 0, done.output
    (run,) = (home / "runs").iterdir()
    report = json.loads((run / "coverage.json").read_text())
    assert sorted(report["symbols"]) == ["BAJAJ-AUTO", "M&M"]
    assert "30 high_below_low; first in BAD.csv, row 201" in report["failed"]["BAD"]
    assert str(tmp_path) not in json.dumps(report)
    assert kept.read_bytes() == before and tree(bars) == given
    (aside,) = torn.parent.glob("M&M.parquet.damaged-*")
    assert aside.read_bytes() == damaged
    page = (home / "reports" / run.name / "1_ingest.html").read_text("utf-8")
    assert "high_below_low" in page and "BAD" in page
