"""A candidate that comes through the campaign: piece by piece into a scratch folder, then installed as a whole or not at all.

    delivery/<hash>/<candidate>/model.safetensors.part    grows from its beginning on, and survives a restart
    delivery/<hash>/<candidate>/model.safetensors         whole, with the hash that was pinned
    <cache>/<candidate>/                                  renamed to there once every file is whole and the candidate loads

The hash that the hello fixed pins all of it: a built-in candidate's is that of its weights, an installed one's is that of
candidate.json, which comes first and pins the other files.

Covered:
    * other bytes than the pinned ones, more of them than the policy allows or the disk has room for, and files of other names
      are refused; what was begun is bounded by the same limits, and removed when it is done, wrong, or the campaign closes;
    * a piece that comes twice changes nothing; another piece for the same place is refused; a torn one is filled up;
    * an artefact that is there already is never touched; what is installed was loaded once by the loader that will use it.
Not covered:
    * weights that were poisoned before they were pinned, and what a licence text says: see `models.loading`;
    * when somebody looks at which sites get the long messages: that a site lacks a candidate can be seen by the relay.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from urna.client.ledger import Ledger
from urna.client.policy import Policy, allows_licence
from urna.models.candidate_file import CANDIDATE_FILE, MAX_CANDIDATE_BYTES, CandidateFile, parse_candidate
from urna.models.catalogue import CATALOGUE, cache_root
from urna.models.loading import MANIFEST_FILE, MAX_WEIGHTS_BYTES, artefact_sha256, load_backbone
from urna.protocol.errors import ModelError, ProtocolError
from urna.protocol.messages import PIECE_LIMIT_BYTES, Envelope, FileName, WeightsRequest

SCRATCH = "delivery"  # in the site's folder
KEPT_SECONDS = 7 * 86_400  # how long what was begun waits for the rest
SPARE_BYTES = 256 * 2**20  # that stay free on the disk: a ledger that cannot be written stops the site
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Pin:
    """What a file has to be."""

    sha256: str
    size: int | None  # None: as the request declares it, up to ``limit``
    limit: int


@dataclass(frozen=True)
class Held:
    """How much of a file is here, and whether the whole candidate is installed."""

    received: int
    complete: bool


def piece_of(envelope: Envelope, request: WeightsRequest) -> bytes:
    """The bytes that a request brings.

    Raises:
        ProtocolError: none, too many, of another type, or past the end of the file.
    """
    part = envelope.arrays.get("part")
    if part is None or len(envelope.arrays) != 1 or part.dtype != np.uint8 or part.ndim != 1:
        raise ProtocolError("expected the array 'part' (n,) of uint8 and no other")
    if not 1 <= part.size <= PIECE_LIMIT_BYTES or request.offset + part.size > request.size:
        raise ProtocolError(
            f"expected 1 to {PIECE_LIMIT_BYTES} bytes within a file of {request.size}, found {part.size} at {request.offset}"
        )
    return part.tobytes()


def is_intact(candidate: str, pinned: str | None) -> bool:
    """Whether the artefact with this hash is installed."""
    try:
        return artefact_sha256(candidate) == pinned
    except ModelError:
        return False


def is_absent(candidate: str) -> bool:
    """Whether nothing at all is installed under this name."""
    return not os.path.lexists(cache_root() / candidate)


def forget(folder: Path, hashes: Iterable[str]) -> None:
    """Remove what was begun of some candidates.

    Args:
        folder: the site's.
        hashes: of the candidates.
    """
    for one in hashes:
        shutil.rmtree(folder / SCRATCH / one, ignore_errors=True)
    with suppress(OSError):  # others are still there, or it never was
        (folder / SCRATCH).rmdir()


@dataclass(frozen=True)
class Delivery:
    """One candidate on its way to this site.

    Args:
        folder: the site's.
        candidate: its name.
        pinned: its hash, as the hello fixed it.
        policy: how much may come, and under which licences.
        ledger: notes what was installed, and how large it is.
    """

    folder: Path
    candidate: str
    pinned: str
    policy: Policy
    ledger: Ledger

    def denied(self, request: WeightsRequest) -> tuple[str, ...]:
        """What the policy says against the next piece, as far as is known by now.

        Raises:
            ProtocolError: the piece is of no file that is pinned.
            ModelError: candidate.json is malformed.
        """
        if not self.policy.accept_weights:
            return (f"weights: {self.candidate} may not come through the campaign here (policy.accept_weights is off)",)
        self._pin(request)
        total = self._size(request) + self._begun_of_others() + _delivered(self.ledger, but=self.pinned)
        reasons = []
        limit = self.policy.max_weights_bytes
        if total > limit and not is_intact(self.candidate, self.pinned):
            reasons.append(f"weights: with {self.candidate} {total} bytes would have come, this site allows {limit} in all")
        listing = self._listing()  # a built-in one's licence was looked at in the hello
        if listing is not None and not allows_licence(self.policy, listing.licence):
            reasons.append(f"licences: not allowed at this site: {self.candidate} ({listing.licence})")
        return tuple(reasons)

    def take(self, request: WeightsRequest, part: bytes) -> Held:
        """Keep a piece; install the candidate with the last one.

        Raises:
            ProtocolError: not of a file that is pinned, not what was sent for this place before, or of another hash.
            ModelError: the disk has no room, something else is installed under this name, or the candidate cannot be loaded.
        """
        self._pin(request)
        if is_intact(self.candidate, self.pinned):
            folder = cache_root() / self.candidate
            _check_same(folder / request.file, request.offset, part)
            self._note(sum((folder / name).stat().st_size for name in self._pins()))  # where a crash came between
            return Held(request.size, complete=True)
        if not is_absent(self.candidate):
            raise ModelError(f"expected no {self.candidate} in {cache_root()}, found another or a damaged one: remove it")
        whole = self._staged / request.file
        if whole.is_file():
            _check_same(whole, request.offset, part)
            received = request.size
        else:
            received = self._grown(request, part, whole)
        is_last = all((self._staged / name).is_file() for name in self._pins())
        if is_last:
            self._install()
        return Held(received, complete=is_last)

    # ---- what has to come

    @property
    def _staged(self) -> Path:
        """The candidate's folder as it grows; its parent is a root of artefacts with this one in it."""
        return self.folder / SCRATCH / self.pinned / self.candidate

    def _pin(self, request: WeightsRequest) -> Pin:
        pins = self._pins()
        pin = pins.get(request.file)
        if pin is None:
            raise ProtocolError(f"expected {' or '.join(pins)} of {self.candidate}, found {request.file}")
        if request.sha256 != pin.sha256 or request.size != (pin.size or request.size) or request.size > pin.limit:
            raise ProtocolError(f"expected {request.file} of {self.candidate} as it was pinned, found another hash or size")
        return pin

    def _pins(self) -> dict[FileName, Pin]:
        """Every file of the candidate, as far as is known by now."""
        if self.candidate in CATALOGUE:
            return {"model.safetensors": Pin(self.pinned, None, MAX_WEIGHTS_BYTES)}
        pins: dict[FileName, Pin] = {"candidate.json": Pin(self.pinned, None, MAX_CANDIDATE_BYTES)}
        listing = self._listing()
        if listing is not None:
            pins |= {name: Pin(pin.sha256, pin.size, pin.size) for name, pin in listing.files.items()}
        return pins

    def _size(self, request: WeightsRequest) -> int:
        """Of all files that are known by now."""
        sizes = {name: pin.size for name, pin in self._pins().items()} | {request.file: request.size}
        here = {name: self._staged / name for name, size in sizes.items() if size is None}
        return sum(size or 0 for size in sizes.values()) + sum(path.stat().st_size for path in here.values() if path.is_file())

    def _listing(self) -> CandidateFile | None:
        """What candidate.json says; None before it is here."""
        home = cache_root() / self.candidate if is_intact(self.candidate, self.pinned) else self._staged
        path = home / CANDIDATE_FILE
        return parse_candidate(self.candidate, path.read_bytes(), path) if path.is_file() else None

    def _begun_of_others(self) -> int:
        """Bytes on the disk of candidates that were begun, without this one."""
        scratch, sizes = self.folder / SCRATCH, 0
        for one in scratch.rglob("*") if scratch.is_dir() else ():
            if one.is_file() and not one.is_relative_to(scratch / self.pinned):
                sizes += one.stat().st_size
        return sizes

    # ---- on the disk

    def _grown(self, request: WeightsRequest, part: bytes, whole: Path) -> int:
        """The file's length after this piece; it gets its name when it is whole."""
        growing = whole.with_name(f"{whole.name}.part")
        if request.offset > 0 and not growing.is_file():
            return 0  # what was here is gone: it has to begin again
        self._make_room(request, growing)
        received = _append(growing, request.offset, part, request.size)
        if received == request.size:
            try:
                self._check_whole(request, growing)
            except (ProtocolError, ModelError):
                forget(self.folder, [self.pinned])
                raise
            growing.rename(whole)
        return received

    def _check_whole(self, request: WeightsRequest, path: Path) -> None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != request.sha256:
            raise ProtocolError(f"expected {request.file} of {self.candidate} with the pinned hash, found other bytes")
        if request.file == CANDIDATE_FILE:
            parse_candidate(self.candidate, path.read_bytes(), path)

    def _make_room(self, request: WeightsRequest, growing: Path) -> None:
        """The folders, and a look at the disk when a file begins."""
        scratch = self.folder / SCRATCH
        scratch.mkdir(mode=0o700, exist_ok=True)
        for old in scratch.iterdir():
            if old.name != self.pinned and old.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        self._staged.mkdir(parents=True, exist_ok=True)
        os.utime(self._staged.parent)
        have = growing.stat().st_size if growing.is_file() else 0
        if shutil.disk_usage(scratch).free < request.size - have + SPARE_BYTES:
            raise ModelError(f"expected room for {request.size} bytes of {self.candidate} on the disk, found less: make room")

    def _install(self) -> None:
        """Try it, and give it its place; whatever is wrong with it, nothing of it stays.

        Raises:
            ModelError: it cannot be loaded, or its place was taken in the meantime.
        """
        size = sum((self._staged / name).stat().st_size for name in self._pins())
        try:
            self._try_out()
            if self.candidate in CATALOGUE:  # what is beside the weights nobody needs to send
                manifest = json.dumps({"sha256": self.pinned, "recipe": "delivered"}, indent=2)
                (self._staged / MANIFEST_FILE).write_text(f"{manifest}\n", encoding="utf-8")
            _move(self._staged, cache_root() / self.candidate)
        except OSError as error:
            if not is_intact(self.candidate, self.pinned):  # else another site of this machine was faster
                raise ModelError(f"{self.candidate} cannot be installed in {cache_root()}: {error.strerror}") from None
        finally:
            forget(self.folder, [self.pinned])
        self._note(size)

    def _try_out(self) -> None:
        """Load it, and compute with it: a release that then fails would cost its epsilon for nothing."""
        from urna.models.trial import try_out  # it imports a tokenizer's library

        try_out(load_backbone(self.candidate, self.pinned, self._staged.parent))

    def _note(self, size: int) -> None:
        """Write into the ledger that it came, once."""
        if all(one.detail["sha256"] != self.pinned for one in self.ledger.all_noted("weights")):
            self.ledger.note("weights", self.candidate, sha256=self.pinned, size=str(size))


def _delivered(ledger: Ledger, but: str) -> int:
    """Bytes of all candidates that ever came like this, without one."""
    noted = {one.detail["sha256"]: int(one.detail["size"]) for one in ledger.all_noted("weights")}
    return sum(size for sha256, size in noted.items() if sha256 != but)


def _append(path: Path, offset: int, part: bytes, size: int) -> int:
    """Write what is new of a piece behind what is there; the file's length afterwards."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        held = os.fstat(file.fileno()).st_size
        if held > size:
            raise ProtocolError(f"expected a file of {held} bytes or more, as it was declared before, found {size}")
        if offset > held:
            return held
        known = part[: held - offset]
        if os.pread(file.fileno(), len(known), offset) != known:
            raise ProtocolError(f"expected the piece at {offset} as it came before, found another")
        try:
            file.seek(held)
            file.write(part[held - offset :])
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(file.fileno(), held)
            why = "make room on the disk" if error.errno in _NO_ROOM else "see to the disk"
            raise ModelError(f"{path} cannot be written ({error.strerror}): {why}") from None
        return max(held, offset + len(part))


def _check_same(path: Path, offset: int, part: bytes) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(len(part)) != part:
            raise ProtocolError(f"expected the piece at {offset} as it came before, found another")


def _move(source: Path, target: Path) -> None:
    """Give a folder its place in one step, on whatever disk that is; an OSError if something is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = target.with_name(f".{target.name}.new")  # no candidate is called like this
        shutil.rmtree(near, ignore_errors=True)
        shutil.copytree(source, near)
        for file in near.iterdir():
            _sync(file)
        near.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
