"""One process at a time, as the kernel says it: with real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from urna.client.file_lock import FileLock
from urna.protocol.errors import LedgerError

HOLD = """
import sys, time
from pathlib import Path
from urna.client.file_lock import FileLock
FileLock(Path(sys.argv[1])).acquire(5)
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.lock"


def test_a_second_process_is_told_who_has_it_and_a_dead_one_has_nothing(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            lock = FileLock(path)
            for timeout_seconds in (0, 0.05):
                with pytest.raises(
                    LedgerError, match=f"locked: process {holder.pid} of this site uses it; one process at a time"
                ):
                    lock.acquire(timeout_seconds)
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    lock.acquire(0)
    assert path.read_text() == f"{os.getpid()}\n"
    lock.release()


def test_it_is_taken_again_by_who_has_it_and_given_back_as_often(path: Path) -> None:
    one, other = FileLock(path), FileLock(path)
    for _ in range(3):
        one.acquire(0)
    for _ in range(3):
        with pytest.raises(LedgerError, match="locked"):
            other.acquire(0)
        one.release()
    other.acquire(0)
    other.drop()
    one.acquire(0)
    one.acquire(0)
    one.drop()
    other.acquire(0)


def test_a_lock_that_was_not_taken_is_not_given_back(path: Path) -> None:
    lock = FileLock(path)
    with pytest.raises(RuntimeError, match="not acquired"):
        lock.release()
    lock.drop()  # at the end, whatever was before
    lock.acquire(0)
    lock.release()
    with pytest.raises(RuntimeError, match="not acquired"):
        lock.release()


def test_a_lock_on_a_removed_file_is_taken_on_the_new_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the file before it was removed would lock what nobody else ever sees."""
    real = os.open

    def removed(file: object, flags: int, mode: int = 0o777) -> int:
        monkeypatch.setattr(os, "open", real)
        descriptor = real(path, flags, mode)
        assert file == path
        path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", removed)
    FileLock(path).acquire(1)
    assert path.exists()


def test_it_is_readable_by_its_owner_alone(path: Path) -> None:
    FileLock(path).acquire(0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be used: No such file or directory"):
        FileLock(tmp_path / "gone" / "ledger.lock").acquire(0)
    with pytest.raises(LedgerError, match="cannot be used: Is a directory"):
        FileLock(tmp_path).acquire(0)


def test_a_holder_without_a_name_is_unknown(path: Path) -> None:
    """A full disk: the lock holds without the number in it."""
    one = FileLock(path)
    one.acquire(0)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="process unknown of this site"):
        FileLock(path).acquire(0)
