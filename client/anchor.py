"""Where a ledger was last: a small file at another place, so that an older copy of the ledger is noticed.

Covered:
    * a ledger that was restored, cut off or lost while the anchor was not; an altered anchor.
Not covered:
    * whoever puts back both files at once (a snapshot of the whole machine): that is noticed when the operator echoes the newer
      head; so keep the anchor on another disk than the ledger.
"""

import contextlib
import errno
import hmac
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from urna.protocol.errors import LedgerError

LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Anchored:
    """The head that an anchor holds."""

    ledger_id: str
    seq: int
    link: str


def write_anchor(path: Path, key: bytes, head: Anchored) -> None:
    """Replace the anchor, durably, in one step.

    Raises:
        LedgerError: the disk refuses.
    """
    draft = path.with_name(f"{path.name}.new")
    line = json.dumps([head.ledger_id, head.seq, head.link])
    raw = f"{line}\n{_mac(key, line)}\n".encode()
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if os.write(descriptor, raw) != len(raw):  # a part of it fitted: renamed, it would lock the site out
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        draft.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise LedgerError(f"the anchor {path} cannot be written ({error.strerror}): nothing is released") from None


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk: what was renamed or deleted in it stays so.

    Raises:
        LedgerError: the disk refuses.
    """
    try:
        _fsync_folder(folder)
    except OSError as error:
        raise LedgerError(f"the folder {folder} cannot be written ({error.strerror}): nothing is released") from None


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_anchor(path: Path, key: bytes) -> Anchored:
    """Read an anchor.

    Raises:
        LedgerError: it is missing, altered, or of another ledger's key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            raw = file.read(LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise LedgerError(
            f"expected the ledger's anchor at {path}, found nothing: mount or restore it; if it is lost for good, and the "
            "ledger is the newest, `urna-site ledger --renew-anchor` makes another"
        ) from None
    except OSError as error:
        raise LedgerError(f"the anchor {path} cannot be read ({error.strerror}): nothing is released") from None
    try:
        line, mac, rest = raw.decode("ascii").split("\n")
        if rest or not hmac.compare_digest(_mac(key, line), mac):
            raise ValueError("not what was written")
        ledger_id, seq, link = json.loads(line)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are ones
        raise LedgerError(
            f"the anchor {path} was altered, or is of another data key: restore it; it is never repaired"
        ) from None
    return Anchored(str(ledger_id), int(seq), str(link))


def _mac(key: bytes, line: str) -> str:
    return hmac.digest(key, b"anchor\0" + line.encode(), "sha256").hex()
