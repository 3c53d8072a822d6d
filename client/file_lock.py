"""One process at a time: a lock file that ends with the process that holds it (flock).

Covered:
    * a second process, also one that was started while the first one works; a process that died holding it.
Not covered:
    * whoever removes the lock file under its holder: a ledger's own transactions (SQLite's lock) still keep spending apart;
    * file systems that do not share flock between machines: one machine at a time.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from urna.protocol.errors import LedgerError

RETRY_SECONDS = 0.01


class FileLock:
    """A lock that may be taken again by who has it; released as often as it was taken.

    Args:
        path: of the lock file; made if it is not there, readable by its owner alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._depth = 0

    def acquire(self, timeout_seconds: float) -> None:
        """Take the lock.

        Raises:
            LedgerError: another process holds it for all that time, or the disk refuses.
        """
        if self._depth:
            self._depth += 1
            return
        deadline = time.monotonic() + timeout_seconds
        while True:
            descriptor = self._try()
            if descriptor is not None:
                break
            if time.monotonic() >= deadline:
                raise LedgerError(
                    f"the ledger is locked: process {self._holder()} of this site uses it; one process at a time may spend"
                )
            time.sleep(RETRY_SECONDS)
        with contextlib.suppress(OSError):  # for a person who asks who holds it; a full disk is no reason to stop here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor, self._depth = descriptor, 1

    def _try(self) -> int | None:
        """The locked file, or nothing while another process has it."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(f"{self._path} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == self._path.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # held; or removed since it was opened: a lock on a removed file keeps nobody out
        except OSError as error:
            os.close(descriptor)
            raise LedgerError(f"{self._path} cannot be used: {error.strerror}") from None
        os.close(descriptor)
        return None

    def _holder(self) -> str:
        try:
            return self._path.read_bytes()[:20].decode("ascii", "replace").strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        """Give it back, once for each `acquire`."""
        if self._descriptor is None:
            raise RuntimeError("release of a lock that was not acquired")
        self._depth -= 1
        if self._depth == 0:
            os.close(self._descriptor)  # and with it the lock
            self._descriptor = None

    def drop(self) -> None:
        """Give it back whatever its depth."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._depth = None, 0
