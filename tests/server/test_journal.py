"""The journal: facts once, durable, readable while written, and for one writer."""

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest

from urna.protocol.errors import RunError
from urna.server.journal import JOURNAL_FILE, Journal, is_running


def test_a_fact_is_recorded_once_and_given_back(tmp_path: Path) -> None:
    journal = Journal.open_for_writing(tmp_path)
    assert journal.once("run", lambda: {"a": 1}) == {"a": 1}
    assert journal.once("run", lambda: {"a": 2}) == {"a": 1}
    with pytest.raises(RuntimeError, match="journal key 'run' is recorded once"):
        journal.record("run", {"a": 3})
    journal.close()


def test_arrays_survive_bit_for_bit(tmp_path: Path) -> None:
    journal = Journal.open_for_writing(tmp_path)
    total = np.random.default_rng(0).normal(size=1000)
    journal.record("round/final/1", {}, {"total": total})
    journal.close()
    reader = Journal.read(tmp_path)
    found = reader.find("round/final/1")
    assert found is not None
    assert found.arrays["total"].tobytes() == total.tobytes()
    assert found.kind == "round"
    assert reader.entries()[0].arrays == {}
    reader.close()


def test_every_write_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    journal = Journal.open_for_writing(tmp_path)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    journal.close()


def test_a_second_writer_is_refused_and_the_first_let_go_by_closing(tmp_path: Path) -> None:
    first = Journal.open_for_writing(tmp_path)
    assert is_running(tmp_path)
    with pytest.raises(RunError, match="is being run by another process: wait for it, or end it first"):
        Journal.open_for_writing(tmp_path)
    first.close()
    assert not is_running(tmp_path)
    Journal.open_for_writing(tmp_path).close()


def test_looking_at_a_run_never_makes_starting_it_fail(tmp_path: Path) -> None:
    Journal.open_for_writing(tmp_path).close()
    stop = threading.Event()

    def stare() -> None:
        while not stop.is_set():
            is_running(tmp_path)

    thread = threading.Thread(target=stare)
    thread.start()
    try:
        for _ in range(50):
            Journal.open_for_writing(tmp_path).close()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [None, b"", b"not a database at all, but long enough to be read as one" * 20])
def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / JOURNAL_FILE).write_bytes(content)
    with pytest.raises(RunError, match=r"expected a run's folder|cannot be used"):
        Journal.read(tmp_path)


def test_a_journal_of_another_program_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / JOURNAL_FILE)
    connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(RunError, match="cannot be used: no such table: entry"):
        Journal.read(tmp_path)


def test_not_a_number_never_enters(tmp_path: Path) -> None:
    journal = Journal.open_for_writing(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.record("counts/final", {"accuracy": float("nan")})
    journal.close()
