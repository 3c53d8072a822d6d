"""The anchor: what it says is what was written last, or it is an error with a name."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from urna.client.anchor import LIMIT_BYTES, Anchored, read_anchor, sync_folder, write_anchor
from urna.protocol.errors import LedgerError

KEY = bytes(range(32))
HEAD = Anchored("ab" * 16, 7, "cd" * 32)
NEXT = Anchored("ab" * 16, 8, "ef" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.anchor"
    write_anchor(path, KEY, HEAD)
    return path


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond that: what fits is written, the rest is not, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_written_last_is_read(path: Path) -> None:
    assert read_anchor(path, KEY) == HEAD
    write_anchor(path, KEY, NEXT)
    assert read_anchor(path, KEY) == NEXT
    assert [one.name for one in path.parent.iterdir()] == ["ledger.anchor"]


def test_it_is_readable_by_its_owner_alone(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_bitflip_every_byte_detected(path: Path) -> None:
    """Every bit of the anchor, and of the key: nothing else is ever taken for what was written."""
    content = path.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
            with pytest.raises(LedgerError, match="was altered, or is of another data key: restore it; it is never repaired"):
                read_anchor(path, KEY)
    path.write_bytes(content)
    for at in range(len(KEY)):
        with pytest.raises(LedgerError, match="of another data key"):
            read_anchor(path, KEY[:at] + bytes([KEY[at] ^ 1]) + KEY[at + 1 :])
    assert read_anchor(path, KEY) == HEAD


def test_an_anchor_that_was_cut_off_or_goes_on_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for altered in [*(content[:size] for size in range(len(content))), content + b"\n", content * 2, b"0" * (LIMIT_BYTES + 9)]:
        path.write_bytes(altered)
        with pytest.raises(LedgerError, match="was altered"):
            read_anchor(path, KEY)


def test_a_missing_anchor_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"found nothing: mount or restore it; if it is lost for good.*--renew-anchor"):
        read_anchor(tmp_path / "ledger.anchor", KEY)


def test_an_anchor_that_cannot_be_read_is_not_called_lost(tmp_path: Path) -> None:
    """Whoever is told so would make a new one of an old ledger."""
    with pytest.raises(LedgerError, match=r"cannot be read \(Is a directory\): nothing is released"):
        read_anchor(tmp_path, KEY)


@pytest.mark.parametrize("limit", [0, 1, 100, 172])
def test_a_full_disk_leaves_the_anchor_that_was_there(path: Path, limit: int) -> None:
    """A part of the new one that fitted must not take its place: the site would be locked out."""
    assert len(path.read_bytes()) == 173
    with file_limit(limit), pytest.raises(LedgerError, match=r"cannot be written .*: nothing is released"):
        write_anchor(path, KEY, NEXT)
    assert read_anchor(path, KEY) == HEAD
    assert [one.name for one in path.parent.iterdir()] == ["ledger.anchor"]
    write_anchor(path, KEY, NEXT)
    assert read_anchor(path, KEY) == NEXT


def test_a_folder_that_is_gone_is_an_error(path: Path) -> None:
    """An unmounted disk."""
    shutil.rmtree(path.parent)
    with pytest.raises(LedgerError, match=r"cannot be written \(No such file or directory\): nothing is released"):
        write_anchor(path, KEY, NEXT)
    with pytest.raises(LedgerError, match=r"cannot be written \(No such file or directory\)"):
        sync_folder(path.parent)


def test_a_draft_that_a_crash_left_is_written_over(path: Path) -> None:
    path.with_name("ledger.anchor.new").write_bytes(b"half of" * 100)
    write_anchor(path, KEY, NEXT)
    assert read_anchor(path, KEY) == NEXT
