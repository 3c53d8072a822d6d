"""Run as a script: what happens to a ledger when its process dies, or is not alone.

kill FOLDER      die before the n-th SQL statement of "reserve, settle", for every n; ends beside FOLDER/<n>/
kill-rounds F    likewise of the transaction that settles a reply and keeps its round
crowd FOLDER     four processes reserve 15 releases each in FOLDER/ledger.sqlite, at once
answer FOLDER    four processes answer the same 10 rounds, each for a list of its own; marks say who was heard
key FOLDER       four processes ask for the round key of one campaign, and write it down
busy FOLDER      hold FOLDER/ledger.sqlite, say so, and reserve until killed
traced F PLANT   answer one request under strace; F/trace-1 is what it called, PLANT what was made worse before (or "nothing")
calls F FAULT    the same, once for each system call on the ledger's files, with FAULT at that call: kill, or an error code such
                 as EIO; a + behind it: at all later ones of its name, too; then once more without; beside F/<call>-<n>/
"""

import ctypes
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from urna.client.ledger import Ledger
from urna.client.ledger_rows import Release
from urna.client.round_store import KeptRound
from urna.privacy.secure_sum import Progress
from urna.protocol.errors import LedgerError

EVENT = '{"GaussianDpEvent":{"noise_multiplier":3.5}}'
REPLY = b"the exact bytes"
KEY = bytes(range(32))  # the data key
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
    ledger = Ledger.open(folder / "ledger.sqlite", KEY)
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
    ledger = Ledger.create(folder / "ledger.sqlite", KEY)
    ledger.reserve(a_release("run-1/ballot/1"))
    ledger.settle("run-1/ballot/1", REPLY)
    ledger.close()
    kill_everywhere(folder, reserve_and_settle)


def kill_rounds(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite", KEY)
    ledger.rounds.keep("run-1/ballot/1", KeptRound("run-1", None, Progress("ab" * 32, "ef" * 32), "", "0" * 64, b"pads"))
    ledger.reserve(a_release("run-1/ballot/2"))
    ledger.close()
    kill_everywhere(folder, settle_and_keep)


def kill_everywhere(folder: Path, work: Callable[[Ledger, Path], None]) -> None:
    first = folder / "ledger.sqlite"
    for point in range(1, 100):
        here = folder / str(point)
        here.mkdir()
        for file in (first, first.with_suffix(".anchor")):
            shutil.copy(file, here / file.name)
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
            work(Ledger.open(folder / "ledger.sqlite", KEY), process)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a process could not do its work")


def crowd(folder: Path) -> None:
    Ledger.create(folder / "ledger.sqlite", KEY).close()

    def reserve(ledger: Ledger, process: int) -> None:
        for number in range(RELEASES):
            ledger.reserve(a_release(f"run-1/{process}/{number}"))

    at_once(folder, reserve)


def answer(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite", KEY)
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
    Ledger.create(folder / "ledger.sqlite", KEY).close()

    def ask(ledger: Ledger, process: int) -> None:
        (folder / f"key-{process}").write_bytes(ledger.rounds.private_key("run-1").private_bytes_raw())

    at_once(folder, ask)


def busy(folder: Path) -> None:
    ledger = Ledger.create(folder / "ledger.sqlite", KEY)
    ledger.hold()
    with ledger.exclusive():  # so that it takes a while to check
        for number in range(500):
            ledger.reserve(a_release(f"run-0/{number}"))
    print("held", flush=True)
    for number in range(100_000):
        ledger.reserve(a_release(f"run-1/{number}"))
        ledger.settle(f"run-1/{number}", REPLY)


# ---- under strace

REQUEST = "run-1/ballot/2"
CALLS = ("openat", "write", "pwrite64", "ftruncate", "fdatasync", "fsync", "unlink", "rename")
NOT_TRACED = 77  # the exit code where strace may not watch a process
PR_SET_PTRACER = 0x59616D61


def paths(here: Path) -> tuple[Path, Path]:
    """A ledger and its anchor, "on another disk"."""
    return here / "disk" / "ledger.sqlite", here / "other" / "ledger.anchor"


def a_traced_ledger(here: Path) -> None:
    ledger, anchor = paths(here)
    ledger.parent.mkdir(parents=True)
    anchor.parent.mkdir()
    one = Ledger.create(ledger, KEY, anchor)
    one.reserve(a_release("run-1/ballot/1"))
    one.settle("run-1/ballot/1", REPLY)
    one.close()


def answer_request(here: Path, plant: str) -> None:
    """As a site does; and after an error again, as an operator who asks again."""
    ledger = None
    for attempt in range(4):
        try:
            ledger = ledger or Ledger.open(paths(here)[0], KEY, paths(here)[1])
            PLANTS[plant](ledger)
            known = ledger.find(REQUEST, "0" * 64)
            if known is None:
                ledger.reserve(a_release(REQUEST))
            (here / "computed").mkdir(exist_ok=True)
            if plant == "released before it is settled":
                (here / "RELEASE").mkdir()
            if not isinstance(known, bytes):
                ledger.settle(REQUEST, REPLY)
            ledger.head()
        except LedgerError as error:
            (here / f"failed-{attempt}").mkdir(exist_ok=True)
            (here / f"error-{attempt}").write_text(str(error))
            continue
        (here / "RELEASE").mkdir(exist_ok=True)
        return
    os._exit(3)


def with_settings(*pragmas: str) -> Callable[[Ledger], None]:
    def plant(ledger: Ledger) -> None:
        for pragma in pragmas:
            ledger._db.execute(f"PRAGMA {pragma}")

    return plant


def without_fsync(of_folders: bool) -> Callable[[Ledger], None]:
    fsync = os.fsync

    def kept(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) != of_folders:
            fsync(descriptor)

    def plant(_ledger: Ledger) -> None:
        os.fsync = kept  # type: ignore[assignment]

    return plant


PLANTS: dict[str, Callable[[Ledger], None]] = {
    "nothing": lambda _: None,
    "synchronous=OFF": with_settings("synchronous=OFF"),
    "WAL and synchronous=NORMAL": with_settings("journal_mode=WAL", "synchronous=NORMAL"),  # as Flower has it
    "journal's folder not synced": lambda ledger: (
        with_settings("synchronous=FULL")(ledger),
        without_fsync(of_folders=True)(ledger),
    )[1],
    "anchor not synced": without_fsync(of_folders=False),
    "anchor's folder not synced": without_fsync(of_folders=True),
    "released before it is settled": lambda _: None,
}


def watched(here: Path, trace: str, plant: str = "nothing", injection: str | None = None) -> int:
    """Answer the request in a child under strace.

    Returns:
        The child's exit code; -9 if it was killed.
    """
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        code = 1
        try:
            answer_request(here, plant)
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    ledger, anchor = paths(here)
    seen = [
        ledger,
        Path(f"{ledger}-journal"),
        Path(f"{ledger}-wal"),
        ledger.parent,
        anchor,
        Path(f"{anchor}.new"),
        anchor.parent,
    ]
    seen += [ledger.with_name("ledger.sqlite.lock"), here / "RELEASE"]
    command = ["strace", "-y", "-s0", "-o", str(here / trace), "-p", str(child), "-e", "trace=file,desc"]
    command += [one for path in seen for one in ("-P", str(path))] + (["-e", f"inject={injection}"] if injection else [])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = ""
        while "attached" not in said and (line := strace.stderr.readline()):
            said += line
        os.kill(child, signal.SIGCONT if "attached" in said else signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if "attached" not in said:
        print(said, file=sys.stderr)
        sys.exit(NOT_TRACED)
    return os.waitstatus_to_exitcode(status)


def traced(folder: Path) -> None:
    a_traced_ledger(folder)
    watched(folder, "trace-1", sys.argv[3])


def calls(folder: Path) -> None:
    fault = sys.argv[3]
    a_traced_ledger(folder / "first")
    for number, (call, at) in enumerate([("nothing", 0), *every_call(folder)]):
        here = folder / f"{call}-{at}"
        shutil.copytree(folder / "first", here)
        when = f"{at}+" if fault.endswith("+") else str(at)
        what = "signal=KILL" if fault == "kill" else f"error={fault.rstrip('+')}"
        code = watched(here, "trace-1", injection=f"{call}:{what}:when={when}" if number else None)
        (here / f"ended-{code}").touch()
        if (here / "RELEASE").exists():
            (here / "RELEASE").rename(here / "released-at-once")
        if watched(here, "trace-2"):  # a restarted site
            raise RuntimeError(f"{here.name}: not answered after a restart")


def every_call(folder: Path) -> list[tuple[str, int]]:
    """What a fault-free answer calls: names, and how many of each."""
    here = folder / "count"
    shutil.copytree(folder / "first", here)
    watched(here, "trace-1")
    counts = Counter(re.findall(r"^(\w+)\(", (here / "trace-1").read_text(), re.MULTILINE))
    shutil.rmtree(here)
    names = (*CALLS, "pread64") if sys.argv[3] == "EIO" else CALLS
    return [(name, at) for name in names for at in range(1, counts[name] + 1)]


if __name__ == "__main__":
    modes = {"kill": kill, "kill-rounds": kill_rounds, "crowd": crowd, "answer": answer, "key": key, "busy": busy}
    modes |= {"traced": traced, "calls": calls}
    modes[sys.argv[1]](Path(sys.argv[2]))
