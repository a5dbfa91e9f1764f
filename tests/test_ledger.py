"The ledger under several processes, sudden death, and hands that reach into its file."

import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import python, results

from sensequant.core import ledger as module
from sensequant.core.errors import DataError, GateError
from sensequant.core.ledger import (
    SERIES_COLUMNS,
    Head,
    Ledger,
    Opening,
    Trial,
    check_series,
    link,
    pack_series,
    raw_series,
    spend,
    unpack_series,
)
from sensequant.core.testing import sessions

DAY = date(2026, 3, 2)


def series(seed=1, n=60, start="2024-01-01"):
    noise = np.random.default_rng(seed).normal(0, 0.01, (n, 3))
    return pd.DataFrame(noise, index=sessions(n, start), columns=list(SERIES_COLUMNS))


def trial(seed=1, **changes):
    "A trial without skill, each seed another configuration."
    base = Trial("run", "r", "NSE", {"seed": seed}, ("INFY", "TCS"), series(seed))
    return replace(base, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "with space" / "ledger.db"


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


@pytest.fixture
def whole(path):
    "A closed ledger of eight trials, and the head after each."
    with Ledger(path) as opened:
        heads = [replace(opened.head(), seen_in="m0")]
        for seed in range(1, 9):
            opened.record_trial(trial(seed))
            heads.append(replace(opened.head(), seen_in=f"m{seed}"))
    return path, heads


def proof(path, heads=()):
    "What a fresh look at the file finds."
    with Ledger(path) as opened:
        return opened.verify(heads)


def tamper(path, *statements, values=()):
    "Reach into the file past the ledger, the fence taken down and put up again."
    c = sqlite3.connect(path, isolation_level=None)
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
    fence = c.execute(query).fetchall()
    for name, _ in fence:
        c.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        c.execute(statement, values)
    for _, sql in fence:
        c.execute(sql)
    c.close()


# Several at once


APPEND = """
import sys
import numpy as np, pandas as pd
from sensequant.core.ledger import Ledger, Trial, SERIES_COLUMNS
from sensequant.core.testing import sessions
ledger, name = Ledger(sys.argv[1]), sys.argv[2]
zero = pd.DataFrame(0.0, index=sessions(300), columns=list(SERIES_COLUMNS))
for k in range(int(sys.argv[3])):
    row = ledger.record_trial(Trial("optimizer", name, "NSE", {"k": k}, ("TCS",), zero + k / 100))
    print(row.n, flush=True)
"""


def test_processes_append_at_once_while_one_verifies(path):
    writers, seen = [python(APPEND, path, f"p{k}", 25) for k in range(4)], []
    with Ledger(path) as looking:
        while any(w.poll() is None for w in writers):
            found = looking.verify([h for h, _ in seen])
            assert found.intact, found
            seen.append((found.head, time.monotonic()))
            time.sleep(0.02)
        given_out = [int(n) for mine in results(writers) for n in mine]
        assert sorted(given_out) == list(range(1, 101))
        assert looking.verify([h for h, _ in seen]).head.count == 100
        rows = looking.overlapping("NSE", ["TCS"], DAY.replace(year=2024), DAY)
    by_run = {f"p{k}": [r.config["k"] for r in rows if r.run_id == f"p{k}"] for k in range(4)}
    assert by_run == {f"p{k}": list(range(25)) for k in range(4)}


def test_threads_share_one_ledger(ledger):
    def some(k):
        for _ in range(10):
            ledger.record_trial(trial(k))
            ledger.head()

    threads = [threading.Thread(target=some, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert ledger.verify().intact and ledger.head().count == 60


PROPOSE = """
import sys
from datetime import date
from sensequant.core.ledger import Ledger
ledger = Ledger(sys.argv[1])
for k in range(10):
    print(ledger.propose(f"{sys.argv[2]}_{k % 5}", "NSE", date(2026, 3, 2), "c").number)
"""


def test_proposals_at_once_each_get_their_own_number(path):
    told = results([python(PROPOSE, path, f"p{k}") for k in range(3)])
    numbers = [int(n) for mine in told for n in mine]
    assert all(mine[:5] == mine[5:] for mine in told)  # the second time a run gets what it had
    assert sorted(set(numbers)) == list(range(1, 16))
    with Ledger(path) as after:
        assert [p.number for p in after.proposals("NSE")] == list(range(1, 16))


def test_kill_9_in_the_middle_of_appending(path):
    kept = [Head()]
    for wait in (0.05, 0.13, 0.29):
        writer = python(APPEND, path, "endless", 100_000)
        writer.stdout.readline()
        time.sleep(wait)
        writer.kill()
        told = [int(line) for line in writer.communicate()[0].split()]
        with Ledger(path) as after:
            found = after.verify(kept)
            assert found.intact and found.head.count >= told[-1]  # what was said is there
            kept.append(replace(after.head(), seen_in=f"after {wait}"))
            after.record_trial(trial(1))
    with sqlite3.connect(path) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)


HOLD = """
import sys, time
from sensequant.core.ledger import Ledger
with Ledger(sys.argv[1])._transaction():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_sleeps_is_an_error_and_its_death_frees_the_ledger(path):
    holder = python(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGSTOP)
    with Ledger(path, busy_s=0.3) as waiting:
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"within 0\.3 s"):
            waiting.record_trial(trial())
        assert time.monotonic() - begun < 5
        assert waiting.verify().intact  # readers go on
        holder.kill()
        holder.communicate()
        assert waiting.record_trial(trial()).n == 1


def test_another_tool_that_holds_the_file_is_an_error_in_words(path):
    Ledger(path).head()
    tool = sqlite3.connect(path, isolation_level=None)
    tool.execute("BEGIN IMMEDIATE")
    with Ledger(path, busy_s=0.2) as waiting, pytest.raises(DataError, match="must be free"):
        waiting.record_trial(trial())
    tool.close()


def _in_child(ledger, queue):
    queue.put(ledger.record_trial(trial(2)).n)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_worker_gets_the_ledger_and_opens_its_own_connection(ledger, how):
    ledger.record_trial(trial(1))
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    worker = context.Process(target=_in_child, args=(ledger, queue))
    worker.start()
    assert queue.get(timeout=60) == 2
    worker.join(timeout=60)
    assert ledger.record_trial(trial(3)).n == 3 and ledger.verify().intact
    assert pickle.loads(pickle.dumps(ledger)).path == ledger.path


# Hands in the file


def test_nobody_touched_it(whole):
    path, heads = whole
    assert proof(path, heads).wrong == "" and proof(path, heads).head == heads[-1]


def test_the_fence_stops_every_statement_that_would_change_a_row(whole):
    path, heads = whole
    c = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "DELETE FROM rows WHERE n = 8",
        "UPDATE rows SET body = body",
        "INSERT OR REPLACE INTO rows SELECT * FROM rows WHERE n = 3",
        "REPLACE INTO rows SELECT n, previous, 'x', body, series FROM rows WHERE n = 8",
        "INSERT INTO rows SELECT n + 8, previous, hash, body, series FROM rows",
        "INSERT INTO rows SELECT 9, previous, hash, body, series FROM rows WHERE n = 8",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="a row of the ledger"):
            c.execute(statement)
    c.close()
    assert proof(path, heads).intact


@pytest.mark.parametrize("n", [1, 4, 7])
def test_a_deleted_row_is_named(whole, n):
    path, _ = whole
    tamper(path, f"DELETE FROM rows WHERE n = {n}")
    assert proof(path).wrong == f"row {n} is missing"


def test_a_deleted_row_whose_gap_was_closed_is_named(whole):
    path, _ = whole
    tamper(path, "DELETE FROM rows WHERE n = 4", "UPDATE rows SET n = n - 1 WHERE n > 4")
    assert proof(path).wrong == "row 4 does not follow row 3"


def test_the_last_row_deleted_leaves_a_good_chain_that_lacks_a_head(whole):
    path, heads = whole
    tamper(path, "DELETE FROM rows WHERE n = 8")
    assert proof(path, heads[:8]).intact
    wrong = proof(path, heads).wrong
    assert "head of 8 rows kept in m8 is not among 7 rows" in wrong


def test_two_rows_that_changed_places_are_named(whole):
    path, _ = whole
    tamper(
        path,
        "UPDATE rows SET n = 100 WHERE n = 3",
        "UPDATE rows SET n = 3 WHERE n = 5",
        "UPDATE rows SET n = 5 WHERE n = 100",
    )
    assert proof(path).wrong == "row 3 does not follow row 2"


def _flipped(value, at, bit):
    "The value with one bit changed."
    data = bytearray(value if isinstance(value, bytes) else value.encode())
    data[at % len(data)] ^= 1 << bit
    return bytes(data) if isinstance(value, bytes) else bytes(data).decode("latin-1")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 8),
    column=st.sampled_from(["previous", "hash", "body", "series"]),
    at=st.integers(0, 10_000),
    bit=st.integers(0, 6),
)
def test_any_changed_bit_of_any_column_is_named(shared, n, column, at, bit):
    path, copy = shared
    shutil.copy(path, copy)
    c = sqlite3.connect(copy)
    (held,) = c.execute(f"SELECT {column} FROM rows WHERE n = {n}").fetchone()
    c.close()
    changed = _flipped(held, at, bit)
    tamper(copy, f"UPDATE rows SET {column} = ? WHERE n = {n}", values=(changed,))
    assert proof(copy).wrong in (
        f"row {n} is not as it was written",
        f"row {n} does not follow row {n - 1}",
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    with Ledger(folder / "ledger.db") as opened:
        for seed in range(1, 9):
            opened.record_trial(trial(seed))
    return folder / "ledger.db", folder / "copy.db"


def test_a_byte_changed_on_disk_is_seen(whole):
    path, heads = whole
    with Ledger(path) as opened:
        blob = pack_series(raw_series(check_series(opened.series(opened.trial(5)))))
    data = bytearray(path.read_bytes())
    place = data.find(blob[:200])
    assert place > 0
    data[place + 150] ^= 1
    path.write_bytes(data)
    assert proof(path, heads).wrong == "row 5 is not as it was written"
    with Ledger(path) as opened, pytest.raises(DataError, match="row 5"):
        opened.series(opened.trial(5))


def test_a_row_told_anew_with_every_later_hash_lacks_the_heads(whole):
    path, heads = whole
    c = sqlite3.connect(path)
    rows = c.execute("SELECT previous, body, series FROM rows ORDER BY n").fetchall()
    c.close()
    previous = rows[3][0]
    for n, (_, body, blob) in enumerate(rows[3:], 4):
        told = body.replace('"seed":4', '"seed":44')
        new = link(previous, told, blob)
        tamper(
            path,
            f"UPDATE rows SET previous = ?, body = ?, hash = ? WHERE n = {n}",
            values=(previous, told, new),
        )
        previous = new
    assert proof(path).intact  # nothing inside the file gives it away
    assert "head of 4 rows kept in m4" in proof(path, heads).wrong


def test_a_truncated_file_is_seen(whole):
    path, heads = whole
    size = path.stat().st_size
    for kept in (size - 1, size - 5000, size // 2, 4096, 100):
        copy = path.with_name(f"cut_{kept}.db")
        copy.write_bytes(path.read_bytes()[:kept])
        wrong = proof(copy, heads).wrong
        assert wrong, kept
        assert "row" in wrong or "must be whole" in wrong, wrong


def test_a_file_cut_to_nothing_or_gone_is_a_new_ledger_that_lacks_the_heads(whole):
    path, heads = whole
    path.write_bytes(b"")
    assert "head of 1 rows kept in m1 is not among 0 rows" in proof(path, heads).wrong
    path.unlink()
    assert "is not among 0 rows" in proof(path, heads).wrong
    assert proof(path).intact  # without a witness nobody can know


def test_a_replaced_file_lacks_the_heads(whole, tmp_path):
    path, heads = whole
    with Ledger(tmp_path / "other.db") as other:
        for seed in range(11, 25):
            other.record_trial(trial(seed))
    shutil.copy(tmp_path / "other.db", path)
    assert "head of 1 rows kept in m1 is not among 14 rows" in proof(path, heads).wrong


def test_a_backup_put_back_lacks_the_newer_heads_even_when_it_grew_again(whole):
    path, heads = whole
    backup = path.with_name("backup.db")
    shutil.copy(path, backup)
    with Ledger(path) as opened:
        for seed in (9, 10):
            opened.record_trial(trial(seed))
        later = replace(opened.head(), seen_in="runs/r7/manifest.yaml")
    shutil.copy(backup, path)
    with Ledger(path) as opened:
        assert opened.verify(heads).intact
        assert "kept in runs/r7/manifest.yaml" in opened.verify([*heads, later]).wrong
        for seed in (9, 11, 12):
            opened.record_trial(trial(seed))
        assert "kept in runs/r7/manifest.yaml" in opened.verify([*heads, later]).wrong


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    note, other = tmp_path / "note.db", tmp_path / "other.db"
    note.write_text("this is a note, not a database" * 20)
    with sqlite3.connect(other) as c:
        c.execute("CREATE TABLE mine (x)")
    for place, words in ((note, "must be whole"), (other, "must be a ledger")):
        before = place.read_bytes()
        assert words in proof(place).wrong
        with Ledger(place) as opened, pytest.raises(DataError, match=words):
            opened.record_trial(trial())
        assert place.read_bytes() == before


def test_a_ledger_of_newer_code_is_refused(whole, monkeypatch):
    path, _ = whole
    monkeypatch.setattr(module, "LEDGER_MIGRATIONS", ())
    with Ledger(path) as opened, pytest.raises(DataError, match="ledger must be at most version 0"):
        opened.head()


def test_a_fence_that_is_gone_or_a_table_that_is_another_is_seen(whole):
    path, heads = whole
    c = sqlite3.connect(path, isolation_level=None)
    c.execute("DROP TRIGGER rows_follow")
    assert "triggers" in proof(path, heads).wrong
    c.execute("ALTER TABLE rows RENAME TO real_rows")
    c.execute("CREATE VIEW rows AS SELECT * FROM real_rows WHERE n != 5")
    c.close()
    assert proof(path, heads).wrong == "row 5 is missing"


# What is told


@settings(max_examples=80, deadline=None)
@given(
    values=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 40), st.just(3)),
        elements=st.floats(allow_nan=True, allow_infinity=False, width=64),
    ),
    start=st.dates(date(1995, 1, 2), date(2060, 1, 1)),
)
def test_a_series_comes_back_to_the_last_bit(values, start):
    values[:, 0] = np.nan_to_num(values[:, 0])
    given_in = pd.DataFrame(
        values, index=sessions(len(values), str(start)), columns=list(SERIES_COLUMNS)
    )
    back = unpack_series(pack_series(raw_series(check_series(given_in))))
    assert raw_series(back) == raw_series(check_series(given_in))
    assert list(back.index) == list(given_in.index)
    assert np.array_equal(back.to_numpy(), given_in.to_numpy(), equal_nan=True)


def test_the_same_numbers_have_one_hash_whatever_their_frame_looks_like(ledger):
    plain = series(1)
    spellings = [
        plain,
        plain.assign(extra=1)[["ic", "extra", "net_return", "benchmark_return"]],
        plain.tz_convert("UTC"),
        plain.rename_axis("day"),
        plain.set_axis(plain.index.as_unit("s")),
    ]
    rows = [ledger.record_trial(trial(1, series=s)) for s in spellings]
    assert len({r.series_sha256 for r in rows}) == 1
    assert [r.n for r in rows] == [1, 2, 3, 4, 5]  # all of them are written down


def test_overlap_is_by_market_symbols_and_sessions(ledger):
    ledger.record_trial(trial(1))  # 2024-01-01 to 2024-03-22, INFY and TCS
    first, last = ledger.trial(1).first, ledger.trial(1).last
    assert (first, last) == (date(2024, 1, 1), date(2024, 3, 22))
    asked = {
        ("NSE", ("TCS",), first, first): 1,
        ("NSE", ("TCS", "SBIN"), last, date(2030, 1, 1)): 1,
        ("NSE", ("SBIN",), first, last): 0,
        ("sim", ("TCS",), first, last): 0,
        ("NSE", ("TCS",), date(2024, 3, 23), date(2030, 1, 1)): 0,
        ("NSE", ("TCS",), date(2020, 1, 1), date(2023, 12, 31)): 0,
        ("NSE", (), first, last): 0,
    }
    assert {k: len(ledger.overlapping(*k)) for k in asked} == asked


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda s: s.drop(columns="ic"), "ic"),
        (lambda s: s.reset_index(drop=True), "00:00 IST"),
        (lambda s: s.tz_localize(None), "00:00 IST"),
        (lambda s: s.iloc[:0], "00:00 IST"),
        (lambda s: s.iloc[[0, 0, 1]], "each once"),
        (lambda s: s.set_axis(s.index + pd.Timedelta("9h15min")), "midnights"),
        (lambda s: s.assign(net_return=np.inf), "must be a number"),
    ],
)
def test_a_series_that_cannot_be_right_is_refused_and_nothing_is_written(ledger, broken, words):
    with pytest.raises(DataError, match=words):
        ledger.record_trial(trial(1, series=broken(series(1))))
    assert ledger.head() == Head()


@pytest.mark.parametrize("lack", [{"source": ""}, {"run_id": ""}, {"market": ""}, {"symbols": ()}])
def test_a_trial_without_a_name_is_refused(ledger, lack):
    with pytest.raises(DataError, match="needs a source"):
        ledger.record_trial(trial(1, **lack))
    with pytest.raises(DataError, match="JSON"):
        ledger.record_trial(trial(1, config={"f": object()}))
    assert ledger.head() == Head()


def test_a_row_of_another_kind_is_no_trial(ledger):
    ledger.propose("r", "NSE", DAY, "c")
    for n, words in ((1, "proposal"), (2, "nothing")):
        with pytest.raises(DataError, match=words):
            ledger.trial(n)


def test_budgets_of_markets_and_years_are_apart_and_never_add_up_to_more(ledger):
    spent = {}
    for year in (2025, 2026):
        for k in range(40):
            for market in ("NSE", "sim-1"):
                p = ledger.propose(f"{market}_{year}_{k}", market, date(year, 6, 1), "c")
                spent.setdefault((market, year), []).append(p.threshold)
    assert all(s == [spend(i) for i in range(1, 41)] for s in spent.values())
    assert all(0.0487 < sum(s) < 0.05 for s in spent.values())


def test_a_threshold_stands_as_it_was_given(ledger):
    first = ledger.propose("r", "NSE", DAY, "c", 0.01)
    assert first.threshold == spend(1, 0.01)
    assert ledger.propose("r", "NSE", DAY, "c", 0.9) == first
    assert ledger.next_proposal("r", "NSE", DAY, "c", 0.9) == first
    for error in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            ledger.propose("s", "NSE", DAY, "c", error)


def test_looking_at_the_next_proposal_spends_nothing(ledger):
    before = ledger.head()
    looks = [ledger.next_proposal(f"r{k}", "NSE", DAY, "c").number for k in range(5)]
    assert looks == [1] * 5 and ledger.head() == before


def test_an_opening_needs_the_proposal_of_the_very_candidate(ledger):
    ledger.propose("r", "NSE", DAY, "c")
    look = Opening("r", "NSE", "c", date(2025, 9, 1), date(2026, 2, 27))
    for other in ({"run_id": "s"}, {"candidate": "d"}, {"market": "sim"}):
        with pytest.raises(GateError, match="was proposed"):
            ledger.open_holdout(replace(look, **other))
    assert ledger.open_holdout(look) == 1
    with pytest.raises(GateError, match="one hold-out"):
        ledger.open_holdout(replace(look, first=date(2024, 9, 1)))
    assert ledger.openings("NSE", look.last, look.last) == [look]
    assert ledger.head().count == 2
