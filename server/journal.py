"""What has happened in a run, durable: the campaign resumes from it, and progress, metrics and report are views of it.

One SQLite file in the run's folder. An entry has a key that is used once (`once` gives back what was recorded), so the
campaign's code reads as if it never stopped. Only public numbers are in it: opened sums, signed requests, statements.
"""

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import ValidationError

from urna.protocol.errors import RunError
from urna.protocol.messages import AnyArray
from urna.protocol.plan import Plan

JOURNAL_FILE = "journal.sqlite"
LOCK_FILE = "journal.lock"
SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, at REAL NOT NULL, value TEXT NOT NULL, arrays BLOB
) STRICT;
"""
Json = dict[str, Any]  # JSON that this module wrote; the models of `campaign` say what each key holds


@dataclass(frozen=True)
class Entry:
    """One recorded fact: ``key`` like ``final/3``, ``at`` in Unix seconds."""

    seq: int
    key: str
    at: float
    value: Json
    arrays: Mapping[str, AnyArray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The key's first part."""
        return self.key.split("/")[0]


class Journal:
    """A run's journal; `open_for_writing` in the one process that runs it, `read` anywhere else."""

    def __init__(self, run_dir: Path, connection: sqlite3.Connection, lock: IO[str] | None) -> None:
        self.run_dir = run_dir
        self._db = connection
        self._lock = lock

    @staticmethod
    def open_for_writing(run_dir: Path) -> "Journal":
        """Open (or begin) the journal of a run, for this process alone.

        Raises:
            RunError: another process runs it, or the file is no journal.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK_FILE).open("a+")
        if not _locked(lock, patience_seconds=1.0):  # a glance by `is_running` holds it for an instant
            lock.close()
            raise RunError(f"{run_dir} is being run by another process: wait for it, or end it first")
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        with _mapped(run_dir):
            connection = sqlite3.connect(run_dir / JOURNAL_FILE, isolation_level=None, timeout=30)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA journal_mode=DELETE")  # one file that can be copied, readable in a read-only folder
            connection.executescript(SCHEMA)
        return Journal(run_dir, connection, lock)

    @staticmethod
    def read(run_dir: Path) -> "Journal":
        """Open a journal to look at it.

        Raises:
            RunError: there is none in this folder.
        """
        path = run_dir / JOURNAL_FILE
        if not path.is_file():
            raise RunError(f"expected a run's folder (with {JOURNAL_FILE}), found none at {run_dir}: see `urna status`")
        with _mapped(run_dir):
            connection = sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True, isolation_level=None, timeout=30)
            try:
                connection.execute("SELECT 1 FROM entry LIMIT 1")
            except sqlite3.Error:
                connection.close()
                raise
        return Journal(run_dir, connection, None)

    def close(self) -> None:
        """Close the file and let another process run it."""
        self._db.close()
        if self._lock is not None:
            self._lock.close()

    def record(self, key: str, value: Json, arrays: Mapping[str, AnyArray] | None = None) -> Entry:
        """Write one fact, durably.

        Raises:
            RuntimeError: the key is taken.
        """
        from safetensors.numpy import save

        blob = save({name: np.ascontiguousarray(one) for name, one in arrays.items()}) if arrays else None
        with _mapped(self.run_dir):
            try:
                self._db.execute(
                    "INSERT INTO entry (key, at, value, arrays) VALUES (?, ?, ?, ?)",
                    (key, time.time(), json.dumps(value, allow_nan=False), blob),
                )
            except sqlite3.IntegrityError:
                raise RuntimeError(f"journal key {key!r} is recorded once") from None
        found = self.find(key)
        assert found is not None
        return found

    def once(self, key: str, make: Callable[[], Json]) -> Json:
        """What is recorded under ``key``; made and recorded now if nothing is."""
        found = self.find(key)
        return found.value if found else self.record(key, make()).value

    def find(self, key: str) -> Entry | None:
        """The entry of a key, if it is recorded."""
        with _mapped(self.run_dir):
            row = self._db.execute("SELECT seq, key, at, value, arrays FROM entry WHERE key = ?", (key,)).fetchone()
        return _entry(row) if row else None

    def entries(self, after: int = 0, *, with_arrays: bool = False) -> list[Entry]:
        """All entries with ``seq > after``, oldest first."""
        query = f"SELECT seq, key, at, value, {'arrays' if with_arrays else 'NULL'} FROM entry WHERE seq > ? ORDER BY seq"
        with _mapped(self.run_dir):
            return [_entry(row) for row in self._db.execute(query, (after,)).fetchall()]


def begin(run_dir: Path, plan: Plan, engine: str) -> None:
    """Make a run's folder and write the plan into its journal; nothing is asked yet."""
    journal = Journal.open_for_writing(run_dir)
    plan_json = plan.model_dump(mode="json")
    value: Json = {"plan": plan_json, "plan_sha256": plan.sha256, "engine": engine, "started_at": time.time()}
    journal.once("run", lambda: value)
    journal.close()


def recorded_plan(journal: Journal) -> Plan:
    """The plan of a run.

    Raises:
        RunError: the journal has none.
    """
    entry = journal.find("run")
    if entry is None:
        raise RunError(f"the journal of {journal.run_dir} holds no plan: start a new run")
    try:
        plan = Plan.model_validate(entry.value["plan"])
    except (KeyError, ValidationError):
        plan = None
    if plan is None or plan.sha256 != entry.value.get("plan_sha256"):
        raise RunError(f"the plan in {journal.run_dir} is not the one that was begun: it was altered, or is of another version")
    return plan


def is_running(run_dir: Path) -> bool:
    """Whether a process holds the run's lock at this moment."""
    path = run_dir / LOCK_FILE
    if not path.is_file():
        return False
    with path.open() as file:
        return not _locked(file)


def _locked(file: IO[str], patience_seconds: float = 0.0) -> bool:
    """Take the lock, for as long as the file stays open; whether that worked."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        else:
            return True


def _entry(row: tuple[int, str, float, str, bytes | None]) -> Entry:
    from safetensors.numpy import load

    return Entry(row[0], row[1], row[2], json.loads(row[3]), load(row[4]) if row[4] else {})


@contextmanager
def _mapped(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
        if isinstance(error, sqlite3.IntegrityError):
            raise
        raise RunError(f"the journal of {run_dir} cannot be used: {error}") from None
