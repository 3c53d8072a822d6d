"""Crashes, full and broken disks at every system call of a request that a site answers; power cuts by the order of its syncs.

strace watches a real process and makes its n-th call of a kind fail, or kills it there, for every n. A kill by itself does not
test durability (what was written is in the kernel's memory), so the order of writes and successful syncs is checked as well:
before a release leaves, all that it rests on is on disk.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.client import crash_points
from tests.client.crash_points import KEY, NOT_TRACED, PLANTS, REPLY, REQUEST, a_release, paths
from urna.client.ledger import Ledger

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
SHA = "0" * 64
CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)")


def run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, crash_points.__file__, *arguments], check=False, capture_output=True, text=True)
    if done.returncode == NOT_TRACED:
        pytest.skip(f"strace may not watch a process here: {done.stderr}")
    assert done.returncode == 0, done.stderr


@dataclass
class Disk:
    """What a power cut would lose, as a list of calls says."""

    unsynced: set[str] = field(default_factory=set)
    journals: set[str] = field(default_factory=set)  # a hot one would take back what it was written for
    writes: int = 0

    def call(self, name: str, arguments: str, result: int) -> None:
        if result < 0:
            return
        named = re.findall(r'"([^"]+)"', arguments)
        opened = re.match(r"\d+<([^>]+)>", arguments)
        path = opened[1].removesuffix(" (deleted)") if opened else ""
        match name.removesuffix("64").removesuffix("at2").removesuffix("at"):
            case "write" | "pwrite" | "ftruncate":
                self.unsynced.add(path)
                self.writes += not path.endswith(".lock")
            case "fdatasync" | "fsync":
                self.unsynced.discard(path)
            case "open" if "O_CREAT" in arguments and named[-1].endswith("-journal"):
                self.journals.add(named[-1])
            case "unlink":
                self.unsynced.discard(named[-1])
                self.journals.discard(named[-1])
                self.unsynced.add(str(Path(named[-1]).parent))
            case "rename":
                if named[0] in self.unsynced:
                    self.unsynced.add(named[1])
                self.unsynced.discard(named[0])
                self.unsynced.add(str(Path(named[1]).parent))

    def lost(self) -> set[str]:
        """But for the lock file, which says nothing."""
        return {path for path in self.unsynced | self.journals if not path.endswith(".lock")}


def lost_at_release(*traces: Path) -> set[str]:
    """What was not on disk when the release left.

    Raises:
        AssertionError: nothing left, or it left before two commits and two anchors were written.
    """
    disk = Disk()
    for line in (one for trace in traces for one in trace.read_text().splitlines()):
        match = CALL.match(line)
        if match is None:
            continue
        if match[1].startswith("mkdir") and "/RELEASE" in match[2] and int(match[3]) == 0:
            return disk.lost()
        disk.call(match[1], match[2], int(match[3]))
    raise AssertionError("nothing was released")


def test_release_follows_fsync(tmp_path: Path) -> None:
    """A power cut: what a release rests on is lost if it only was in the kernel's memory when the bytes left."""
    run("traced", str(tmp_path / "here"), "nothing")
    trace = tmp_path / "here" / "trace-1"
    assert lost_at_release(trace) == set()
    text, (ledger, anchor) = trace.read_text(), paths(tmp_path / "here")
    assert len(re.findall(rf"pwrite64\(\d+<{ledger}>", text)) >= 4  # not by having written nothing
    assert len(re.findall(rf"unlink\(\"{ledger}-journal\"\) = 0|unlinkat\(.*\"{ledger}-journal\", 0\) = 0", text)) == 2
    assert len(re.findall(rf"rename\w*\(.*\"{anchor}\"\) += 0", text)) == 2


@pytest.mark.parametrize("plant", [name for name in PLANTS if name != "nothing"])
def test_the_order_of_syncs_sees_a_planted_mutant(tmp_path: Path, plant: str) -> None:
    """Flower's own setting (NORMAL) passes every kill -9; so the check by order must see it, and each sync that is left out."""
    run("traced", str(tmp_path / "here"), plant)
    lost = lost_at_release(tmp_path / "here" / "trace-1")
    ledger, anchor = paths(tmp_path / "here")
    if plant == "released before it is settled":  # on disk by itself, but without its bytes
        assert lost == set()
        assert len(re.findall(r"rename\w*\(", (tmp_path / "here" / "trace-1").read_text().split("RELEASE")[0])) == 1
    else:
        assert (
            lost
            & {
                "synchronous=OFF": {str(ledger)},
                "WAL and synchronous=NORMAL": {f"{ledger}-wal"},
                "journal's folder not synced": {str(ledger.parent)},
                "anchor not synced": {str(anchor)},
                "anchor's folder not synced": {str(anchor.parent)},
            }[plant]
        )


def check_point(here: Path) -> None:
    """After the fault, after the restart: released is recorded, spent once, on disk, and the ledger goes on."""
    for trace in [[here / "trace-1"], [here / "trace-1", here / "trace-2"]]:
        released = (here / "released-at-once").exists() if len(trace) == 1 else True
        if released:
            assert lost_at_release(*trace) == set(), here.name
    path, anchor = paths(here)
    assert not path.with_name("ledger.sqlite-journal").exists(), here.name
    ledger = Ledger.open(path, KEY, anchor)
    assert ledger.find("run-1/ballot/1", SHA) == ledger.find(REQUEST, SHA) == REPLY, here.name
    assert sum(row.count for row in ledger.rows()) == 2, here.name
    ledger.reserve(a_release("run-1/ballot/3"))
    ledger.close()
    assert sum(row.count for row in Ledger.open(path, KEY, anchor).rows()) == 3, here.name


def points(folder: Path) -> list[Path]:
    found = [one for one in folder.iterdir() if one.is_dir() and one.name != "first"]
    assert len(found) > 60
    return found


def test_ledger_crash_at_every_syscall(tmp_path: Path) -> None:
    """A process that dies between any two system calls: what it released is recorded; after a restart each id is spent once."""
    run("calls", str(tmp_path), "kill")
    seen = set()
    for here in points(tmp_path):
        killed = (here / "ended--9").exists()
        assert killed != (here.name == "nothing-0"), here.name
        seen.add(((here / "computed").exists(), (here / "released-at-once").exists()))
        check_point(here)
    assert (True, True) in seen  # the one that nothing happened to


@pytest.mark.parametrize("fault", ["ENOSPC", "ENOSPC+", "EIO", "EIO+"])
def test_a_failing_disk_at_every_syscall(tmp_path: Path, fault: str) -> None:
    """A full or a broken disk, once or from then on (+): a loud error or a later success, never a release without a record."""
    run("calls", str(tmp_path), fault)
    failed = unanswered = 0
    for here in points(tmp_path):
        errors = [one.read_text() for one in here.glob("error-*")]
        assert all(re.search("cannot be (used|written|read)|file was altered", one) for one in errors), (
            errors
        )  # a page that is unreadable
        ended = {one.name for one in here.glob("ended-*")}
        assert ended <= {"ended-0", "ended-3"}, (here.name, ended)  # never another exception, never a dead process
        assert (ended == {"ended-0"}) == (here / "released-at-once").exists()
        failed, unanswered = failed + bool(errors), unanswered + (ended == {"ended-3"})
        check_point(here)
    assert failed > 20
    assert (unanswered > 20) == fault.endswith("+")
