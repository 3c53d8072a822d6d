"""Run as a script: what happens to a ledger when its process dies, or is not alone.

kill FOLDER      die before the n-th SQL statement of "reserve, settle", for every n; ends beside FOLDER/<n>/
crowd FOLDER     four processes reserve 15 releases each in FOLDER/ledger.sqlite, at once
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from urna.client.ledger import Ledger, Release

EVENT = '{"GaussianDpEvent":{"noise_multiplier":3.5}}'
REPLY = b"the exact bytes"
PROCESSES, RELEASES = 4, 15


def a_release(request_id: str, **changes: object) -> Release:
    fields: dict[str, object] = {
        "request_sha256": "0" * 64,
        "campaign": "run-1",
        "stage": "ballot",
        "partition": "tuning",
        "event": EVENT,
    }
    return Release(**{"request_id": request_id, **fields, **changes})  # type: ignore[arg-type]  # a test's shorthand


def die_before(folder: Path, point: int) -> None:
    """Reserve and settle one release; a mark in the folder says what the world could have seen."""
    ledger = Ledger.open(folder / "ledger.sqlite")
    seen = 0

    def count(statement: str) -> None:  # noqa: ARG001 - SQLite's signature
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger._db.set_trace_callback(count)
    ledger.reserve(a_release("run-1/ballot/2"))
    (folder / "computed").touch()
    ledger.settle("run-1/ballot/2", REPLY)
    (folder / "released").write_bytes(REPLY)
    ledger._db.set_trace_callback(None)
    (folder / "done").touch()


def kill(folder: Path) -> None:
    first = folder / "ledger.sqlite"
    ledger = Ledger.create(first)
    ledger.reserve(a_release("run-1/ballot/1"))
    ledger.settle("run-1/ballot/1", REPLY)
    ledger.close()
    for point in range(1, 100):
        here = folder / str(point)
        here.mkdir()
        shutil.copy(first, here / "ledger.sqlite")
        child = os.fork()
        if child == 0:
            die_before(here, point)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
    raise RuntimeError("no end of statements")


def crowd(folder: Path) -> None:
    Ledger.create(folder / "ledger.sqlite").close()
    children = []
    for process in range(PROCESSES):
        child = os.fork()
        if child == 0:
            ledger = Ledger.open(folder / "ledger.sqlite")
            for number in range(RELEASES):
                ledger.reserve(a_release(f"run-1/{process}/{number}"))
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a process could not reserve")


if __name__ == "__main__":
    {"kill": kill, "crowd": crowd}[sys.argv[1]](Path(sys.argv[2]))
