"""Rounds of the secure sum in memory, and what the benchmarks share: cohorts, sites in another process, CPU seconds, peaks.

The sites of a round work in a process of their own and hand their uploads over in a file, so that neither their seconds nor
their memory count as the server's; and each measured role starts in a fresh process (`alone`), so that no peak hides another.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.privacy.ring import Ring, Vector, spans
from urna.privacy.secure_sum import Bytes, Context, Scalars, ServerRole, SiteRole, Upload
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import Member
from urna.protocol.quorum import quorum

CAMPAIGN = "benchmark"
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One round: d numbers of ``ring_bits`` from ``num_sites``, of which the first ``num_dropped`` upload nothing."""

    size: int
    num_sites: int
    num_dropped: int = 0
    ring_bits: int = 32


@dataclass(frozen=True)
class Cohort:
    """Members with all their keys."""

    members: tuple[Member, ...]
    keys: dict[str, X25519PrivateKey]
    roster: Roster


def cohort(num_sites: int) -> Cohort:
    """Fresh keys of everybody; names sort as they are numbered."""
    names = [f"site-{at:05d}" for at in range(num_sites)]
    identities = [Identity(name, Ed25519PrivateKey.generate()) for name in names]
    keys = {name: X25519PrivateKey.generate() for name in names}
    members = tuple(
        Member.create(one, CAMPAIGN, keys[one.name].public_key().public_bytes_raw().hex(), 1000) for one in identities
    )
    operator = Identity(OPERATOR, Ed25519PrivateKey.generate()).public_key_hex
    return Cohort(members, keys, Roster(operator=operator, sites={one.name: one.public_key_hex for one in identities}))


def context_of(members: tuple[Member, ...], case: Case, round_id: str) -> Context:
    """The round's context, with one scalar beside the vector: the weight."""
    assert len(members) == case.num_sites
    rules = quorum(case.num_sites)
    return Context(CAMPAIGN, round_id, members, rules, case.size, 1, case.ring_bits, b"benchmark", "0" * 64)


def normal(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """An update of (size,) normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


class Peak:
    """How far this process' resident memory rises within a ``with`` block, over what was there before: ``bytes``."""

    bytes = 0

    def __enter__(self) -> Self:
        """Set the high-water mark to what is resident now."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Read it."""
        self.bytes = max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def timed(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> tuple[float, T]:
    """CPU seconds of this process, and the result."""
    started = time.process_time()
    result = work(*arguments, **options)
    return time.process_time() - started, result


def median(values: Sequence[float]) -> float:
    """To four digits."""
    return round(statistics.median(values), 4)


def alone(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **options).result()


class _Worker:
    """All sites of a cohort, in the sites' process."""

    def __init__(self, num_sites: int, file: str) -> None:
        self._cohort = cohort(num_sites)
        self._roles = {name: SiteRole(name, key, CAMPAIGN, 2) for name, key in self._cohort.keys.items()}
        self._file = file
        self._context: Context

    def members(self) -> tuple[Member, ...]:
        return self._cohort.members

    def begin(self, context: Context) -> list[float]:
        """Agree on all pair keys that the uploads need: once a campaign; CPU seconds of each site."""
        self._context = context
        holders = {context.names[at] for at in context.graph.holders}
        return [timed(self._agree, name, holders)[0] for name in context.names]

    def _agree(self, name: str, holders: set[str]) -> None:
        around = self._context.graph.neighbours(self._context.index[name])
        for peer in holders.union(self._context.names[other] for other in around):
            self._roles[name]._pair_key(self._context, peer)  # which only keeps what `upload` would derive and keep

    def upload(self, name: str) -> tuple[float, Upload]:
        """CPU seconds, and an upload without its segments: they are in the file."""
        number = 1 + self._context.index[name]

        def fill(start: int, out: Vector) -> None:  # noqa: ARG001 - the same number everywhere
            out[:] = number

        seconds, upload = timed(self._roles[name].upload, self._context, fill, [number])
        with Path(self._file).open("wb") as file:
            for segment in upload.segments:
                file.write(segment.data)
        return seconds, Upload((), upload.scalars, upload.shares, upload.checks)

    def unmask(self, name: str, alive: tuple[str, ...]) -> tuple[float, Bytes]:
        """CPU seconds and pads, with pair keys in hand."""
        for dealer in alive:
            self._roles[name]._pair_key(self._context, dealer)
        return timed(self._roles[name].unmask, self._context, alive)


def _serve(pipe: Connection, num_sites: int, file: str) -> None:
    worker = _Worker(num_sites, file)
    while (request := pipe.recv()) is not None:
        method, arguments = request
        pipe.send(getattr(worker, method)(*arguments))


class Sites:
    """The sites of a cohort in another process; a context manager."""

    def __init__(self, num_sites: int) -> None:
        context = get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name, "upload")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, num_sites, str(self._file)), daemon=True)
        self._process.start()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the process, remove the file."""
        if kind is None:
            self._pipe.send(None)
            self._process.join()
        else:
            self._process.kill()
        self._folder.cleanup()

    def _ask(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._pipe.recv()

    @property
    def members(self) -> tuple[Member, ...]:
        """Their round keys."""
        members: tuple[Member, ...] = self._ask("members")
        return members

    def begin(self, context: Context) -> list[float]:
        """See `_Worker.begin`."""
        seconds: list[float] = self._ask("begin", context)
        return seconds

    def upload(self, name: str, ring: Ring, size: int) -> tuple[float, Upload]:
        """CPU seconds at the site, and its upload."""
        seconds, rest = self._ask("upload", name)
        segments, offset = [], 0
        for start, stop in spans(size):
            count = ring.wire_bytes(stop - start)
            segments.append(np.fromfile(self._file, np.uint8, count, offset=offset))
            offset += count
        return seconds, Upload(segments, rest.scalars, rest.shares, rest.checks)

    def unmask(self, name: str, alive: tuple[str, ...]) -> tuple[float, Bytes]:
        """CPU seconds at the site, and its pads."""
        answer: tuple[float, Bytes] = self._ask("unmask", name, alive)
        return answer


@dataclass(frozen=True)
class Round:
    """What one round took, in CPU seconds and bytes."""

    agree_seconds: list[float]  # of every site
    upload_seconds: list[float]
    unmask_seconds: list[float]  # of every holder that was asked
    context_seconds: float  # the server's; every site pays the same
    add_seconds: float
    close_seconds: float
    open_seconds: float  # taking answers and combining shares
    total_seconds: float  # removing masks
    server_peak_bytes: int
    small_upload_bytes: int  # beside the vector: scalars, shares, checks
    answer_bytes: int
    alive: tuple[str, ...]

    @property
    def server_seconds(self) -> float:
        """All that the server does."""
        return self.context_seconds + self.add_seconds + self.close_seconds + self.open_seconds + self.total_seconds


def run_round(sites: Sites, members: tuple[Member, ...], case: Case, round_id: str) -> Round:
    """One round whose total is checked; this process is the server.

    Raises:
        RuntimeError: the total is wrong.
    """
    context = context_of(members, case, round_id)
    agree, uploads, unmasks, adds = sites.begin(context), [], [], []
    with Peak() as peak:
        context_seconds, context = timed(_fresh, members, case, round_id)
        server = ServerRole(context)
        for name in context.names[case.num_dropped :]:
            seconds, upload = sites.upload(name, context.ring, case.size)
            uploads.append(seconds)
            adds.append(timed(server.add, name, upload)[0])
            small_bytes = upload.scalars.nbytes + upload.shares.nbytes + upload.checks.nbytes
            del upload
        close, alive = timed(server.close)
        opened, answer_bytes = 0.0, 0
        for name in [name for name in alive if context.index[name] in context.graph.holders]:
            seconds, pads = sites.unmask(name, alive)
            unmasks.append(seconds)
            opened += timed(server.answer, name, pads)[0]
            answer_bytes = pads.nbytes
            if server.is_open:
                break
        removing, (total, scalars) = timed(server.total)
    _check(case, total, scalars)
    seconds_of_server = (context_seconds, sum(adds), close, opened, removing)
    return Round(agree, uploads, unmasks, *seconds_of_server, peak.bytes, small_bytes, answer_bytes, alive)


def _fresh(members: tuple[Member, ...], case: Case, round_id: str) -> Context:
    """A context with all that it computes once."""
    context = context_of(members, case, round_id)
    _ = context.digest, context.index, context.graph
    return context


def _check(case: Case, total: Vector, scalars: Scalars) -> None:
    expected = sum(range(1 + case.num_dropped, 1 + case.num_sites))
    if not np.all(total == expected % 2**case.ring_bits) or int(scalars[0]) != expected:
        raise RuntimeError(f"expected a total of {expected} everywhere, found {total[:3]} and {scalars}: the sum is wrong")
