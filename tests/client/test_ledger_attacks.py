"""Attacks on a site's ledger, by whoever has its file in hand and knows its format, but not the site's key.

An altered ledger is refused as it is; one that opens says exactly what the untouched one says.
"""

import hashlib
import shutil
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client import crash_points
from tests.client.crash_points import KEY, REPLY, a_release
from tests.client.test_round_store import ANSWERED, NEVER
from urna.client.ledger import Ledger
from urna.client.ledger_file import SCHEMA
from urna.client.ledger_rows import CampaignRow, Waiting
from urna.client.records import Records, Table
from urna.client.sketch import Sketch, sketch_of
from urna.privacy.accounting import gaussian
from urna.protocol.errors import LedgerError, RollbackError

SHA = "0" * 64
PLAN = '{"evaluation": {"holdout_fraction": 0.2}}'
ALTERED = "was altered|were altered|cannot be used"


def some_records(ids: range | set[int], prefix: str = "record-", shift: float = 0.0) -> Records:
    """Of one table: an id and a content each."""
    names = tuple(f"{prefix}{one}" for one in sorted(ids))
    values = np.array([one + shift for one in sorted(ids)], np.float64)
    return Records(names, names, np.zeros(len(names), np.int64), Table({"x": values}))


def a_sketch(ids: range | set[int], prefix: str = "record-", shift: float = 0.0) -> Sketch:
    return sketch_of(some_records(ids, prefix, shift), KEY)


def steps(ledger: Ledger) -> list[Callable[[], object]]:
    """What fills every table of a ledger, two rows each; every step appends an entry."""
    other = CampaignRow("run-2", SHA, PLAN, {"pixels": SHA}, bytes(32), b"another hello", "ab" * 32, "site-2", 2)
    return [
        lambda: ledger.register("scans", a_sketch(range(3))),
        lambda: ledger.register("more scans", a_sketch(range(7, 9))),
        lambda: ledger.join(CampaignRow("run-1", SHA, PLAN, {"pixels": SHA}, bytes(32), b"hello", dataset=1)),
        lambda: ledger.join(other),
        lambda: ledger.wait(Waiting("run-3", SHA, PLAN)),
        lambda: ledger.wait(Waiting("run-4", SHA, PLAN)),
        lambda: ledger.note("approve", "run-3", by="Ada"),
        lambda: ledger.reserve(a_release("run-1/ballot/1", event=gaussian(1.0), dataset=1)),
        lambda: ledger.settle("run-1/ballot/1", REPLY + b"1"),
        lambda: ledger.reserve(a_release("run-1/ballot/2", event=gaussian(2.0), count=5)),
        lambda: ledger.settle("run-1/ballot/2", REPLY + b"2"),
        lambda: ledger.rounds.private_key("run-1"),
        lambda: ledger.rounds.private_key("run-2"),
        lambda: ledger.rounds.keep_setup("run-1", {"site-1": "ab"}),
        lambda: ledger.rounds.keep_setup("run-2", {"site-1": "cd"}),
        lambda: ledger.rounds.keep("run-1/ballot/1", ANSWERED),
        lambda: ledger.rounds.keep("run-1/ballot/2", NEVER),
        lambda: ledger.reserve(a_release("run-2/ballot/1", campaign="run-2", dataset=2)),
        lambda: ledger.note("pause", ""),
    ]


def a_full_ledger(path: Path) -> Ledger:
    ledger = Ledger.create(path, KEY)
    for step in steps(ledger):
        step()
    return ledger


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "ledger.sqlite"
    a_full_ledger(path).close()
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    for file in (original, original.with_suffix(".anchor")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / original.name


def said(ledger: Ledger) -> list[object]:
    """Everything that a ledger says to the site, and to the person who looks."""
    rounds = ledger.rounds
    campaigns = ("run-1", "run-2")
    return [
        ledger.head(),
        ledger.rows(),
        [ledger.rows(campaign) for campaign in campaigns],
        [ledger.rows(dataset=number) for number in (0, 1)],
        [ledger.charged(number).sharing for (number,) in ledger._db.execute("SELECT id FROM dataset ORDER BY id").fetchall()],
        ledger.releases(),
        ledger.campaigns(),
        ledger.waiting(),
        ledger.holdout_fractions(),
        ledger.all_noted("approve", "pause", "resume", "deny", "stop", "close", "bundle", "anchor"),
        [ledger.find(f"{campaign}/ballot/{n}", SHA) for campaign in campaigns for n in (1, 2)],
        [(rounds.progress(one), rounds.unaudited(one), rounds.num_unproven(one), rounds.setup(one)) for one in campaigns],
        [rounds.find(f"run-1/ballot/{n}") for n in (1, 2)],
        [ledger._db.execute("SELECT * FROM secure_campaign ORDER BY campaign").fetchall()],
    ]


def alter(path: Path, *statements: str) -> None:
    """As someone with the file in hand would, constraints switched off."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, statement


def refused(path: Path, match: str = ALTERED, error: type[LedgerError] = LedgerError) -> None:
    """The file is refused in both ways of opening it, and stays as it is: evidence."""
    content, anchor = path.read_bytes(), path.with_suffix(".anchor").read_bytes()
    for read_only in (False, True):
        with pytest.raises(error, match=match):
            Ledger.open(path, KEY, read_only=read_only)
    assert path.read_bytes() == content
    assert path.with_suffix(".anchor").read_bytes() == anchor


# ---- rows


def tables() -> dict[str, dict[str, str]]:
    """Every table with its columns and their types, as the program makes them."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", (name,)).fetchall()) for name in names
        }


TABLES = tables()
COLUMNS = [(table, column) for table, columns in TABLES.items() for column in columns]
CHANGED = {
    "INTEGER": "{0} + 100",
    "REAL": "{0} + 1",
    "TEXT": "COALESCE({0}, '') || '0'",
    "BLOB": "CAST(COALESCE({0}, x'') || x'00' AS BLOB)",
}


def test_the_tables_are_those_that_are_attacked(path: Path) -> None:
    """And every one has two rows at least."""
    expected = {"entry", "campaign", "release", "dataset", "waiting", "secure_round", "secure_setup", "secure_campaign"}
    assert set(TABLES) == expected
    with closing(sqlite3.connect(path)) as connection:
        for table in TABLES:
            assert connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] >= 2


@pytest.mark.parametrize("row", ["first", "last"])
@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_altered_row_is_detected(path: Path, table: str, column: str, row: str) -> None:
    value = f"'{gaussian(99.0)}'" if column == "event" else CHANGED[TABLES[table][column]].format(column)
    which = "MIN" if row == "first" else "MAX"
    alter(path, f"UPDATE {table} SET {column} = {value} WHERE rowid = (SELECT {which}(rowid) FROM {table})")
    refused(path)


@pytest.mark.parametrize(
    ("table", "column"), [("release", "reply"), ("secure_round", "answer"), ("secure_round", "context_json")]
)
def test_bytes_that_were_taken_away_are_missed(path: Path, table: str, column: str) -> None:
    """So that a request would be answered a second time, with other noise."""
    alter(path, f"UPDATE {table} SET {column} = NULL WHERE {column} NOTNULL")
    refused(path)


def test_a_row_of_the_ledger_with_no_accountable_event_is_detected(path: Path) -> None:
    alter(path, "UPDATE release SET event = '{\"ZeroDpEvent\":{}}' WHERE number = 2")
    refused(path, "cannot be used: expected a release that this version can account for")


@pytest.mark.parametrize("table", TABLES)
def test_a_deleted_row_is_detected(path: Path, original: Path, table: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        rows = [row for (row,) in connection.execute(f"SELECT rowid FROM {table}")]
    for row in rows:
        shutil.copy(original, path)
        alter(path, f"DELETE FROM {table} WHERE rowid = {row}")
        refused(path, ALTERED if table != "entry" or row != max(rows) else "its anchor says")
    shutil.copy(original, path)
    alter(path, f"DELETE FROM {table}")
    refused(path)


@pytest.mark.parametrize("table", TABLES)
def test_an_added_row_is_detected(path: Path, table: str) -> None:
    """A copy under another key: releases that never were, an approval, a data set that shares with none."""
    key, *others = TABLES[table]
    new = f"{key} || 'x'" if TABLES[table][key] == "TEXT" else f"(SELECT MAX({key}) + 1 FROM {table})"
    values = ["request_id || 'x'" if one == "request_id" else one for one in others]
    alter(path, f"INSERT INTO {table} SELECT {', '.join([new, *values])} FROM {table} LIMIT 1")
    refused(path)


def test_renumbered_rows_are_detected(path: Path, original: Path) -> None:
    for table, key in (("release", "number"), ("entry", "seq"), ("dataset", "id")):
        shutil.copy(original, path)
        alter(path, f"UPDATE {table} SET {key} = {key} + 1000", f"UPDATE {table} SET {key} = {key} - 998")
        refused(path)
        shutil.copy(original, path)
        alter(path, f"DELETE FROM {table} WHERE {key} = 1", f"UPDATE {table} SET {key} = {key} - 1")
        refused(path)


@pytest.mark.parametrize("table", TABLES)
def test_reordered_rows_are_detected_or_say_the_same(path: Path, table: str) -> None:
    """Where the order of the rows in the file says something, it is part of what is checked."""
    before = said(Ledger.open(path, KEY))
    with closing(sqlite3.connect(path)) as connection:
        one, other = (row for (row,) in connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid LIMIT 2"))
    swap = [(one, 999), (other, one), (999, other)]
    alter(path, *(f"UPDATE {table} SET rowid = {after} WHERE rowid = {now}" for now, after in swap))
    if table in ("release", "entry", "dataset"):
        refused(path)
    else:
        assert said(Ledger.open(path, KEY)) == before


def test_exchanged_replies_are_detected(path: Path) -> None:
    """Each of them was written by this site, but for another request."""
    first, second = (f"(SELECT reply FROM release WHERE number = {n})" for n in (1, 2))
    alter(
        path,
        f"INSERT INTO dataset VALUES (9, '', {first})",
        f"UPDATE release SET reply = {second} WHERE number = 1",
        "UPDATE release SET reply = (SELECT sketch FROM dataset WHERE id = 9) WHERE number = 2",
        "DELETE FROM dataset WHERE id = 9",
    )
    refused(path, "altered in what it says of settle run-1/ballot/1")


PLANTED = {
    "a trigger that takes back": "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM release WHERE number = 1; END",
    "a trigger that changes them": "CREATE TRIGGER t BEFORE INSERT ON entry BEGIN UPDATE release SET count = 1; END",
    "a table": "CREATE TABLE t (x)",
    "an index": "CREATE INDEX t ON release (event)",
    "a view": "CREATE VIEW t AS SELECT * FROM release",
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_trigger_is_refused(path: Path, what: str) -> None:
    """It would wait until all rows were checked, and work while the site does."""
    alter(path, PLANTED[what])
    refused(path, "the ledger's tables were altered: restore it; it is never repaired")


def test_a_table_that_is_a_view_is_refused(path: Path) -> None:
    """It would say one thing to whoever checks, and another thing to whoever adds up."""
    alter(
        path,
        "ALTER TABLE release RENAME TO kept",
        "CREATE VIEW release AS SELECT * FROM kept WHERE number > 1 OR julianday('now') < 2470000",
    )
    refused(path, "the ledger's tables were altered")


def test_another_data_key_is_refused(path: Path) -> None:
    for at in range(len(KEY)):
        other = KEY[:at] + bytes([KEY[at] ^ (1 << at % 8)]) + KEY[at + 1 :]
        with pytest.raises(LedgerError, match="altered at entry 1, or is of another data key"):
            Ledger.open(path, other)


# ---- bytes


def a_small_ledger(path: Path) -> None:
    """A row in every table, and pages as small as SQLite has them."""
    ledger = Ledger.create(path, KEY)
    for number in (0, 2, 4, 6, 7, 8, 11, 13, 18):  # without the long ones
        steps(ledger)[number]()
    ledger.rounds.keep("run-1/ballot/1", replace(ANSWERED, context=None))
    ledger.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size=512")
        connection.execute("VACUUM")


def every_row(ledger: Ledger) -> list[object]:
    known = [ledger.find(f"run-1/ballot/{n}", SHA) for n in (1, 2)]  # through an index
    return [known, ledger.head(), *(ledger._db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in TABLES)]


def clean_up(path: Path) -> None:
    for name in ("-journal", "-wal", "-shm"):
        Path(f"{path}{name}").unlink(missing_ok=True)


def test_bitflip_every_byte_detected(tmp_path: Path) -> None:
    """A flipped bit in any byte of the file: it is refused, or all that it says is the same as before."""
    path = tmp_path / "ledger.sqlite"
    a_small_ledger(path)
    content = path.read_bytes()
    with closing(Ledger.open(path, KEY)) as ledger:
        before, rows_before = said(ledger), every_row(ledger)
    num_refused = 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            ledger = Ledger.open(path, KEY, read_only=True)
        except LedgerError:
            num_refused += 1
            continue
        finally:
            clean_up(path)
        assert every_row(ledger) == rows_before, at
        if at % 8 == 0:  # it follows from the rows, and takes its time
            assert said(ledger) == before, at
        ledger.close()
    assert num_refused > len(content) / 3  # the others hit space that holds nothing


def test_a_file_that_was_cut_off_is_detected(tmp_path: Path) -> None:
    """But for the unused space of the last page, which holds nothing."""
    path = tmp_path / "ledger.sqlite"
    a_small_ledger(path)
    content = path.read_bytes()
    for size in range(0, len(content) - 512, 97):
        path.write_bytes(content[:size])
        with pytest.raises(LedgerError, match=f"{ALTERED}|found format 0"):
            Ledger.open(path, KEY)
        clean_up(path)


# ---- older copies


def as_it_was(path: Path, folder: Path) -> list[Path]:
    """Copies of ledger and anchor after every step of filling it."""
    ledger, copies = Ledger.create(path, KEY), list[Path]()
    for number, step in enumerate(steps(ledger)):
        step()
        copies.append(folder / str(number))
        copies[-1].mkdir()
        for file in (path, path.with_suffix(".anchor")):
            shutil.copy(file, copies[-1] / file.name)
    ledger.close()
    return copies


def test_rollback_detected_by_anchor(tmp_path: Path) -> None:
    """A restored backup, after every single write: the budget spent since would be there again."""
    path = tmp_path / "ledger.sqlite"
    *older, newest = as_it_was(path, tmp_path)
    for copy in older:
        shutil.copy(copy / path.name, path)
        refused(path, "expected the ledger with entry 20 as its anchor says, found an older", RollbackError)
    shutil.copy(newest / path.name, path)
    Ledger.open(path, KEY)


def test_rollback_detected_by_echoed_head(tmp_path: Path) -> None:
    """A snapshot of the whole machine, anchor included: only who saw the newer head can tell."""
    path = tmp_path / "ledger.sqlite"
    *older, _ = as_it_was(path, tmp_path)
    with closing(Ledger.open(path, KEY)) as newest:
        head = newest.head()
    for copy in older:
        for file in copy.iterdir():
            shutil.copy(file, path.parent / file.name)
        with closing(Ledger.open(path, KEY)) as ledger:
            with pytest.raises(RollbackError, match=f"expected entry {head[0]} as this ledger showed it before"):
                ledger.check_head(*head)
            with pytest.raises(RollbackError, match="nothing is released"):
                ledger.reserve(a_release("run-9/ballot/1", campaign="run-9"))
        assert Ledger.open(path, KEY).noted("stop") is not None


def test_a_fork_of_the_same_length_is_detected(tmp_path: Path) -> None:
    """An older copy that went on by itself holds an entry of that number, but another one."""
    path, fork = tmp_path / "ledger.sqlite", tmp_path / "fork.sqlite"
    a_full_ledger(path).close()
    for suffix in (".sqlite", ".anchor"):
        shutil.copy(path.with_suffix(suffix), fork.with_suffix(suffix))
    one, other = Ledger.open(path, KEY), Ledger.open(fork, KEY)
    one.reserve(a_release("run-1/final/1"))
    other.reserve(a_release("run-1/final/2"))
    assert one.head()[0] == other.head()[0]
    with pytest.raises(RollbackError, match="found an older or another"):
        other.check_head(*one.head())
    one.close()
    shutil.copy(fork, path)
    refused(path, "as its anchor says", RollbackError)


UNDO = {
    "reserve": "DELETE FROM release WHERE request_id = '{0}'",
    "settle": "UPDATE release SET reply = NULL WHERE request_id = '{0}'",
    "join": "DELETE FROM campaign WHERE campaign = '{0}'",
    "wait": "DELETE FROM waiting WHERE campaign = '{0}'",
    "dataset": "DELETE FROM dataset WHERE id = {0}",
    "round": "DELETE FROM secure_round WHERE round_id = '{0}'",
    "setup": "DELETE FROM secure_setup WHERE campaign = '{0}'",
    "round-key": "DELETE FROM secure_campaign WHERE campaign = '{0}'",
}


def test_truncated_chain_refused(path: Path) -> None:
    """Entries cut off at the end together with all that they brought: what is left is sound by itself."""
    with closing(sqlite3.connect(path)) as connection:
        entries = connection.execute("SELECT seq, kind, subject FROM entry ORDER BY seq DESC").fetchall()
    for seq, kind, subject in entries[:-1]:
        alter(path, f"DELETE FROM entry WHERE seq = {seq}", *([UNDO[kind].format(subject)] if kind in UNDO else []))
        refused(
            path, rf"with entry {len(entries)} as its anchor says, found an older one that ends at {seq - 1}", RollbackError
        )


def test_an_anchor_of_another_ledger_is_refused(path: Path, tmp_path: Path) -> None:
    """Under the same key: an empty ledger, made elsewhere, in the place of the one that was spent."""
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / path.name
    Ledger.create(other, KEY).close()
    shutil.copy(path.with_suffix(".anchor"), other.with_suffix(".anchor"))
    refused(other, "is of another ledger: restore the one that belongs to it")


def a_journal(path: Path, older: bytes) -> None:
    """A rollback journal as a crash would leave it, that brings all pages of an older copy back (SQLite file format, 3)."""
    now, size, nonce = path.read_bytes(), 4096, 7
    pages = [older[at : at + size] for at in range(0, len(older), size)]
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", len(pages), nonce, len(pages), 512, size)
    records = b""
    for number, page in enumerate(pages, start=1):
        checksum = (nonce + sum(page[at] for at in range(size - 200, 0, -200))) % 2**32
        records += struct.pack(">I", number) + page + struct.pack(">I", checksum)
    assert len(now) >= len(older)
    Path(f"{path}-journal").write_bytes(header.ljust(512, b"\0") + records)


def test_a_planted_journal_that_takes_releases_back_is_refused(tmp_path: Path) -> None:
    """SQLite plays it back as after a crash of its own, without a word."""
    path = tmp_path / "ledger.sqlite"
    older, *_ = as_it_was(path, tmp_path)
    a_journal(path, (older / path.name).read_bytes())
    with pytest.raises(RollbackError, match="with entry 20 as its anchor says, found an older one that ends at 2"):
        Ledger.open(path, KEY)
    assert not Path(f"{path}-journal").exists()  # it was played back, and not merely ignored


# ---- under a running process


def exchanged(path: Path, older: Path) -> None:
    shutil.copy(older, path.with_name("new"))
    path.with_name("new").replace(path)


def overwritten(path: Path, older: Path) -> None:
    """As cp does."""
    path.write_bytes(older.read_bytes())


def deleted(path: Path, _older: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("act", [exchanged, overwritten, deleted])
def test_an_older_copy_put_under_a_running_process_is_noticed(tmp_path: Path, act: Callable[[Path, Path], None]) -> None:
    """Writes would go to a deleted file, or follow what was long taken back."""
    path = tmp_path / "ledger.sqlite"
    older = as_it_was(path, tmp_path)[-4]
    ledger = Ledger.open(path, KEY)
    ledger.rows()
    act(path, older / path.name)
    for _ in range(2):
        with pytest.raises(LedgerError, match=f"exchanged while open|its anchor says|{ALTERED}"):
            ledger.reserve(a_release("run-9/ballot/1", campaign="run-9"))


def test_rows_altered_under_a_running_process_are_noticed(path: Path) -> None:
    """By another connection, between two requests: what was checked when it was opened is not what is added up."""
    ledger = Ledger.open(path, KEY)
    ledger.hold()
    alter(path, f"UPDATE release SET event = '{gaussian(99.0)}' WHERE number = 1")
    with pytest.raises(LedgerError, match="altered in what it says of reserve run-1/ballot/1"):
        ledger.reserve(a_release("run-9/ballot/1", campaign="run-9"))
    assert ledger.find("run-9/ballot/1", SHA) is None


@pytest.fixture
def busy(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the ledger and writes all the time."""
    command = [sys.executable, crash_points.__file__, "busy", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_second_process_refused(tmp_path: Path, busy: "subprocess.Popen[str]") -> None:
    """Two runners on one ledger would decide on one remaining budget: the second may not write; a dead one holds nothing."""
    ledger = Ledger.open(tmp_path / "ledger.sqlite", KEY)
    ledger.timeout_seconds = 0
    writes: list[Callable[[], object]] = [
        ledger.hold,
        lambda: ledger.reserve(a_release("run-9/1")),
        lambda: ledger.note("pause", ""),
        lambda: ledger.rounds.private_key("run-9"),
    ]
    for write in writes:
        with pytest.raises(
            LedgerError, match=f"locked: process {busy.pid} of this site uses it; one process at a time may spend"
        ):
            write()
    before = sum(row.count for row in ledger.rows())
    busy.kill()
    busy.wait()
    ledger.hold()
    ledger.reserve(a_release("run-9/1"))
    assert sum(row.count for row in ledger.rows()) > before


@pytest.mark.usefixtures("busy")
def test_a_look_at_a_ledger_that_is_written_to_is_no_false_alarm(tmp_path: Path) -> None:
    """A person who is told at every second look that the ledger was altered believes it no more when it was."""
    counts = list[int]()
    until = time.monotonic() + 60
    while len(counts) < 20 or len(set(counts)) < 5:
        assert time.monotonic() < until, "the other process wrote nothing"
        with closing(Ledger.open(tmp_path / "ledger.sqlite", KEY, read_only=True)) as look:
            counts.append(sum(row.count for row in look.rows()))
    assert counts == sorted(counts)


# ---- the same records under another name


def spent(ledger: Ledger, number: int, partition: str = "tuning") -> int:
    return sum(row.count for row in ledger.rows(dataset=number) if row.partition == partition)


@pytest.fixture
def empty(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.sqlite", KEY)


def test_two_nodes_same_data_share_budget(tmp_path: Path) -> None:
    """A second SuperNode on the same records: what one spent, the other has spent."""
    Ledger.create(tmp_path / "ledger.sqlite", KEY).close()
    nodes = [Ledger.open(tmp_path / "ledger.sqlite", KEY) for _ in range(2)]
    numbers = [node.register(f"of node {at}", a_sketch(range(50))) for at, node in enumerate(nodes)]
    assert numbers[0] == numbers[1]
    nodes[0].reserve(a_release("run-1/1", dataset=numbers[0], count=3))
    nodes[1].reserve(a_release("run-2/1", dataset=numbers[1], count=4))
    assert [spent(node, number) for node, number in zip(nodes, numbers, strict=True)] == [7, 7]


def test_renamed_dataset_same_budget(empty: Ledger) -> None:
    """Another name, order, path or labels; new ids over the same contents; the same persons with new contents."""
    first = empty.register("scans", a_sketch(range(50)))
    empty.reserve(a_release("run-1/1", dataset=first, count=3))
    records = some_records(range(50))
    back = Records(records.ids[::-1], records.units[::-1], records.labels + 1, Table({"x": records.inputs.columns["x"][::-1]}))  # type: ignore[union-attr]
    assert empty.register("something else", sketch_of(back, KEY)) == first
    for name, sketch in (("new ids", a_sketch(range(50), "case-")), ("new contents", a_sketch(range(50), shift=1000.0))):
        number = empty.register(name, sketch)
        assert number != first
        assert spent(empty, number) == 3, name
        renamed = name == "new ids"  # so they may have been on the other side of the split
        assert spent(empty, number, "heldout") == (3 if renamed else 0), name


def test_subset_charged_to_parent(empty: Ledger) -> None:
    """A part, a part of a part, two parts: each release is charged to all that share a record with it."""
    whole = empty.register("whole", a_sketch(range(100)))
    left, right = empty.register("left", a_sketch(range(50))), empty.register("right", a_sketch(range(50, 100)))
    one = empty.register("one record", a_sketch({49}))
    others = empty.register("others", a_sketch(range(1000, 1010)))
    for number, count in ((whole, 1), (left, 10), (right, 100), (one, 1000), (others, 10_000), (0, 100_000)):
        empty.reserve(a_release(f"run/{number}", dataset=number, count=count))
    counts = {name: spent(empty, number) - 100_000 for name, number in zip("wlro", (whole, left, right, one), strict=True)}
    assert counts == {"w": 1111, "l": 1011, "r": 101, "o": 1011}
    assert spent(empty, others) == 110_000
    assert spent(empty, 0) == 111_111  # of no known records: all that was ever spent may be theirs


SETS = st.lists(
    st.tuples(st.sets(st.integers(0, 12), min_size=1, max_size=6), st.booleans(), st.booleans()), min_size=1, max_size=6
)


@settings(max_examples=25, deadline=None)
@given(sets=SETS)
def test_a_release_is_charged_to_all_who_share_a_record_with_it(
    tmp_path_factory: pytest.TempPathFactory, sets: list[tuple[set[int], bool, bool]]
) -> None:
    """Random overlaps, some under new ids, some with new contents, against sets of ids and contents written out.

    Exactly these where nothing was renamed; where something was, it is followed further, never less far.
    """
    ledger = Ledger.create(tmp_path_factory.mktemp("ledger") / "ledger.sqlite", KEY)
    written: list[tuple[set[str], int, int]] = []
    for at, (ids, new_ids, new_contents) in enumerate(sets):
        prefix, shift = f"{at}-" if new_ids else "record-", 100.0 * (at + 1) if new_contents else 0.0
        number = ledger.register(str(at), a_sketch(ids, prefix, shift))
        ledger.reserve(a_release(f"run/{at}", dataset=number, count=2**at))
        written.append(({f"{prefix}{one}" for one in ids} | {f"content {one + shift}" for one in ids}, number, 2**at))
    for mine, number, _ in written:
        direct = sum(count for theirs, _, count in written if mine & theirs)
        charged = ledger.charged(number)
        assert spent(ledger, number) & direct == direct
        assert spent(ledger, number) == direct or charged.renamed
        assert spent(ledger, number, "heldout") == sum(count for _, one, count in written if one in charged.renamed)
    ledger.close()


def test_ledger_has_no_record_values(empty: Ledger, tmp_path: Path) -> None:
    """A thief of the file: no id and no content is in it, nor a hash of one that can be computed without the site's key."""
    name, value = "Erika Mustermann 1964-08-12", 0.123456789123
    records = Records((name,) * 2, (name,) * 2, np.zeros(2, np.int64), Table({"x": np.array([value, value])}))
    empty.reserve(a_release("run-1/1", dataset=empty.register("scans", sketch_of(records, KEY))))
    empty.close()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.is_file())
    assert sketch_of(records, KEY).to_bytes()[-16:] in stored  # what is looked for would be found
    plain = [name.encode(), struct.pack("<d", value), struct.pack(">d", value), repr(value).encode()]
    hashes = [hashlib.new(kind, one).digest() for kind in ("sha256", "sha1", "md5", "sha512") for one in plain]
    for one in [*plain, *hashes]:
        assert one[:8] not in stored
        assert one.hex().encode()[:16] not in stored
    assert sketch_of(records, bytes(32)).to_bytes()[-16:] not in stored


def test_the_newest_copy_can_be_put_back_after_an_older_one_was_found_out(path: Path) -> None:
    """A snapshot took ledger and anchor back; what the older copy then says of itself must not shut the newest out."""
    older = {file: file.read_bytes() for file in (path, path.with_suffix(".anchor"))}
    ledger = Ledger.open(path, KEY)
    ledger.note("pause", "site-1")
    head = ledger.head()
    ledger.close()
    newest = path.read_bytes()
    for file, content in older.items():
        file.write_bytes(content)
    found_out = Ledger.open(path, KEY)
    with pytest.raises(RollbackError):
        found_out.check_head(*head)
    found_out.note("pause", "site-1")
    found_out.head()
    found_out.close()
    path.write_bytes(newest)
    again = Ledger.open(path, KEY)
    again.check_head(*head)
    again.reserve(a_release("run-1/ballot/99"))
