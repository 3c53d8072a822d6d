"""Run as a script: what happens to a ledger when its process dies, or is not alone.

kill FOLDER      die before the n-th SQL statement of "reserve, settle", for every n; ends beside FOLDER/<n>/
kill-rounds F    likewise of the transaction that settles a reply and keeps its round
crowd FOLDER     four processes reserve 15 releases each in FOLDER/ledger.sqlite, at once
answer FOLDER    four processes answer the same 10 rounds, each for a list of its own; marks say who was heard
key FOLDER       four processes ask for the round key of one campaign, and write it down
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from urna.client.ledger import Ledger, Release
from urna.client.round_store import KeptRound
from urna.privacy.secure_sum import Progress
from urna.protocol.errors import LedgerError

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


def die_before(folder: Path, point: int, work: Callable[[Ledger, Path], None]) -> None:
    """Do the work, but for what comes after some statement; marks in the folder say what the world could have seen."""
    ledger = Ledger.open(folder / "ledger.sqlite")
    seen = 0

    def count(statement: str) -> None:  # noqa: ARG001 - SQLite's signature
        nonlocal seen
        seen += 1
        if seen == point:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger._db.set_trace_callback(count)
    work(ledger, folder)
    ledger._db.set_trace_callback(None)
    (folder / "done").touch()


def reserve_and_settle(ledger: Ledger, folder: Path) -> None:
    ledger.reserve(a_release("run-1/ballot/2"))
    (folder / "computed").touch()
    ledger.settle("run-1/ballot/2", REPLY)
    (folder / "released").write_bytes(REPLY)


def settle_and_keep(ledger: Ledger, folder: Path) -> None:
    with ledger.exclusive():
        ledger.settle("run-1/ballot/2", REPLY)
        ledger.rounds.keep("run-1/ballot/2", KeptRound("run-1", None, Progress("cd" * 32)))
        ledger.rounds.set_audited("run-1/ballot/1", "opened")
    (folder / "released").write_bytes(REPLY)


def kill(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite")
    ledger.reserve(a_release("run-1/ballot/1"))
    ledger.settle("run-1/ballot/1", REPLY)
    ledger.close()
    kill_everywhere(folder, reserve_and_settle)


def kill_rounds(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite")
    ledger.rounds.keep("run-1/ballot/1", KeptRound("run-1", None, Progress("ab" * 32, "ef" * 32), "", "0" * 64, b"pads"))
    ledger.reserve(a_release("run-1/ballot/2"))
    ledger.close()
    kill_everywhere(folder, settle_and_keep)


def kill_everywhere(folder: Path, work: Callable[[Ledger, Path], None]) -> None:
    first = folder / "ledger.sqlite"
    for point in range(1, 100):
        here = folder / str(point)
        here.mkdir()
        shutil.copy(first, here / "ledger.sqlite")
        child = os.fork()
        if child == 0:
            die_before(here, point, work)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
    raise RuntimeError("no end of statements")


def at_once(folder: Path, work: Callable[[Ledger, int], None]) -> None:
    """The same work in several processes."""
    children = []
    for process in range(PROCESSES):
        child = os.fork()
        if child == 0:
            work(Ledger.open(folder / "ledger.sqlite"), process)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a process could not do its work")


def crowd(folder: Path) -> None:
    Ledger.create(folder / "ledger.sqlite").close()

    def reserve(ledger: Ledger, process: int) -> None:
        for number in range(RELEASES):
            ledger.reserve(a_release(f"run-1/{process}/{number}"))

    at_once(folder, reserve)


def answer(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite")
    for number in range(10):
        ledger.rounds.keep(f"round/{number}", KeptRound("run-1", None, Progress("ab" * 32)))
    ledger.close()

    def unmask(ledger: Ledger, process: int) -> None:
        for number in range(10):
            progress = Progress("ab" * 32, f"{process}{process}" * 32)
            try:
                ledger.rounds.keep(f"round/{number}", KeptRound("run-1", None, progress, "", "0" * 64, str(process).encode()))
            except (RuntimeError, LedgerError):
                continue
            (folder / f"won-{number}-{process}").touch()

    at_once(folder, unmask)


def key(folder: Path) -> None:
    Ledger.create(folder / "ledger.sqlite").close()

    def ask(ledger: Ledger, process: int) -> None:
        (folder / f"key-{process}").write_bytes(ledger.rounds.private_key("run-1").private_bytes_raw())

    at_once(folder, ask)


if __name__ == "__main__":
    modes = {"kill": kill, "kill-rounds": kill_rounds, "crowd": crowd, "answer": answer, "key": key}
    modes[sys.argv[1]](Path(sys.argv[2]))
