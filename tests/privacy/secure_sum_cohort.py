"""For tests of the secure sum: keys, a context, roles, a whole round, mutants, and a server that takes all it can get."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from urna.privacy import secure_sum, shamir
from urna.privacy.mechanisms import key_stream
from urna.privacy.ring import Fill, Ring, Vector, add_segments
from urna.privacy.secure_sum import Bytes, Context, Item, ServerRole, SiteRole, Upload, opened_items
from urna.protocol.errors import ProtocolError
from urna.protocol.identity import Identity
from urna.protocol.messages import Member
from urna.protocol.quorum import Quorum, quorum

CAMPAIGN = "c-1"
ROUND = "c-1/round-1"
REQUEST = "ab" * 32
ALPHA = 1e-8  # each tail of each chi-square: below 1e-6 for the fifty of them that the largest test looks at


_KEYS: dict[str, X25519PrivateKey] = {}


def key_of(name: str) -> X25519PrivateKey:
    """The round key of a site; the same in all tests of one process."""
    if name not in _KEYS:
        _KEYS[name] = X25519PrivateKey.generate()
    return _KEYS[name]


@cache
def member(name: str, key_name: str = "", campaign: str = CAMPAIGN) -> Member:
    """A signed member, with the key of another site where ``key_name`` is given."""
    public_key = key_of(key_name or name).public_key().public_bytes_raw().hex()
    return Member.create(Identity(name, Ed25519PrivateKey.generate()), campaign, public_key, 100)


def names_of(count: int) -> list[str]:
    """Names that sort in their order."""
    return [f"site-{number:03}" for number in range(count)]


def context_of(
    count: int,
    *,
    size: int | None = None,
    num_scalars: int = 0,
    ring_bits: int = 32,
    num_colluding: int | None = None,
    numbers: Quorum | None = None,
    graph_seed: bytes = b"graph",
) -> Context:
    """A round of ``count`` sites; of 8 numbers, or one for each site, if nothing else is said."""
    colluding = min(1, count - 2) if num_colluding is None else num_colluding
    cohort = tuple(member(name) for name in names_of(count))
    length = max(8, count) if size is None else size
    return Context(
        CAMPAIGN, ROUND, cohort, numbers or quorum(count, colluding), length, num_scalars, ring_bits, graph_seed, REQUEST
    )


def fill_of(vector: Vector) -> Fill:
    """A fill that gives this vector."""

    def fill(start: int, out: Vector) -> None:
        out[:] = vector[start : start + len(out)]

    return fill


def in_ring(ring: Ring, numbers: npt.NDArray[np.integer]) -> Vector:
    """Numbers modulo 2**bits."""
    vector: Vector = numbers.astype(np.uint16) if ring.bits == 16 else numbers.astype(np.uint32)
    return ring.reduce(vector)


def one_hot(context: Context, name: str) -> Vector:
    """1 at the site's own place: in a sum, a 2 is a site counted twice."""
    vector = context.ring.zeros(context.size)
    vector[context.index[name] : context.index[name] + 1] = 1  # of an empty vector: nothing
    return vector


@dataclass
class Cohort:
    """Roles of all sites of one context, of the real protocol or of a mutant of it."""

    context: Context
    protocol: ModuleType = secure_sum
    min_cohort: int = 2
    roles: dict[str, SiteRole] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.protocol is not secure_sum:  # a mutant binds its own context
            self.context = self.protocol.Context(**{one.name: getattr(self.context, one.name) for one in fields(Context)})
        for name in self.context.names:
            self.restart(name)

    def restart(self, name: str, min_cohort: int | None = None) -> SiteRole:
        """Build a role from nothing but its key and what it kept on disk."""
        kept = dict(self.roles[name].progress) if name in self.roles else {}
        least = self.min_cohort if min_cohort is None else min_cohort
        self.roles[name] = self.protocol.SiteRole(name, key_of(name), self.context.campaign, least, kept)
        return self.roles[name]

    def server(self) -> ServerRole:
        """A server for this context."""
        role: ServerRole = self.protocol.ServerRole(self.context)
        return role

    def upload(self, name: str, vector: Vector | None = None, scalars: Sequence[int] = ()) -> Upload:
        """One site's upload, of zeros if nothing else is said."""
        given = self.context.ring.zeros(self.context.size) if vector is None else vector
        return self.roles[name].upload(self.context, fill_of(given), scalars)

    def upload_all(self, names: Iterable[str] | None = None) -> dict[str, Upload]:
        """One-hot uploads of some or all sites."""
        chosen = self.context.names if names is None else names
        scalars = [5] * self.context.num_scalars
        return {name: self.upload(name, one_hot(self.context, name), scalars) for name in chosen}

    def received(self, uploads: Mapping[str, Upload] | None = None) -> ServerRole:
        """A server with uploads: those given, or one-hot ones of all sites."""
        server = self.server()
        for name, upload in (self.upload_all() if uploads is None else uploads).items():
            server.add(name, upload)
        return server

    def finished(self, server: ServerRole) -> list[int]:
        """The total of a server that is closed, if it was not, and brought all answers."""
        self.ask(server, server.close())
        return [int(one) for one in server.total()[0]]

    def round(self, silent: Iterable[str] = (), mute: Iterable[str] = ()) -> ServerRole:
        """A round of one-hot vectors: the ``silent`` never upload, the ``mute`` upload and never answer."""
        server = self.received(self.upload_all(name for name in self.context.names if name not in set(silent)))
        self.ask(server, server.close(), mute)
        return server

    def ask(self, server: ServerRole, alive: Sequence[str], mute: Iterable[str] = ()) -> None:
        """Bring the server the answers of all alive holders that are not ``mute``."""
        for name in self.holders(alive):
            if name not in set(mute):
                server.answer(name, self.roles[name].unmask(self.context, alive))

    def holders(self, alive: Sequence[str]) -> list[str]:
        """The alive holders of shares."""
        return [name for at in self.context.graph.holders if (name := self.context.names[at]) in alive]


class Attacker:
    """A server that keeps every upload and every pad, from whatever list it came, and opens each seed that it can."""

    def __init__(self, context: Context, uploads: Mapping[str, Upload]) -> None:
        self.context = context
        self.uploads = uploads
        self.pads: dict[Item, dict[int, Bytes]] = {}  # by holder, in the order of holders

    def take(self, holder: str, alive: Sequence[str], pads: Bytes) -> None:
        """Keep a holder's answer to some list."""
        at = self.context.graph.holders.index(self.context.index[holder])
        for item, pad in zip(opened_items(self.context, alive), pads, strict=True):
            self.pads.setdefault(item, {})[at] = pad

    def seeds(self) -> dict[Item, bytes]:
        """Every seed for which there are as many pads as the threshold."""
        opened: dict[Item, bytes] = {}
        for item, pads in self.pads.items():
            chosen = sorted(pads)[: self.context.quorum.threshold]
            if len(chosen) == self.context.quorum.threshold:
                dealt = self.uploads[self.context.names[item.dealer]].shares
                shares = np.stack([(dealt[at, item.slot] ^ pads[at])[None] for at in chosen])
                opened[item] = shamir.combine(shares, [at + 1 for at in chosen]).tobytes()
        return opened

    def open_sums(self, colluders: Sequence[str] = ()) -> list[set[str]]:
        """The smallest sets of honest sites whose sums this server can read.

        Honest sites hang together where a mask between them is unknown; a set that hangs together is read when it is known
        what its own masks are.
        """
        names, seeds = self.context.names, self.seeds()
        known = {names[item.dealer] for item in seeds if item.peer is None}
        cut = {frozenset((names[item.dealer], names[item.peer])) for item in seeds if item.peer is not None}
        honest = [name for name in names if name not in colluders and name in self.uploads]
        around = {
            name: {
                names[other]
                for other in self.context.graph.neighbours(self.context.index[name])
                if names[other] in honest and frozenset((name, names[other])) not in cut
            }
            for name in honest
        }
        return [one for one in components(around) if one <= known]


def components(around: Mapping[str, set[str]]) -> Iterator[set[str]]:
    """The connected components of a graph."""
    left = set(around)
    while left:
        found, edge = set[str](), {left.pop()}
        while edge:
            found |= edge
            edge = {other for name in edge for other in around[name]} - found
        left -= found
        yield found


@contextmanager
def mutant(*changes: tuple[str, str]) -> Iterator[ModuleType]:
    """The module `secure_sum` with pieces of its text replaced, each of which must be there exactly once.

    Raises:
        RuntimeError: a piece is not there, or more than once: write the mutant anew.
    """
    source = inspect.getsource(secure_sum)
    for old, new in changes:
        if source.count(old) != 1:
            raise RuntimeError(f"expected {old!r} once in secure_sum.py, found it {source.count(old)} times")
        source = source.replace(old, new)
    module = ModuleType("urna_mutant_of_secure_sum")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, "<mutant>", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]


def looks_uniform(numbers: bytes | npt.NDArray[np.generic]) -> bool:
    """Chi-square over the 256 values of all bytes; false alarm 2 * ALPHA = 2e-8."""
    data = np.frombuffer(numbers if isinstance(numbers, bytes) else np.ascontiguousarray(numbers).tobytes(), np.uint8)
    counts = np.bincount(data, minlength=256)
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    return bool(stats.chi2.ppf(ALPHA, 255) < statistic < stats.chi2.isf(ALPHA, 255))


def progress_of(cohort: Cohort) -> dict[str, dict[str, secure_sum.Progress]]:
    """A copy of what every site kept."""
    return {name: dict(role.progress) for name, role in cohort.roles.items()}


def changed_contexts(context: Context) -> dict[str, Context]:
    """The context with each of its fields changed, the quorum's numbers one by one; of a full graph of five sites or more."""
    cohort, numbers = context.cohort, context.quorum
    last = cohort[-1].site
    changed_quorums = {
        "colluding": replace(numbers, num_colluding=numbers.num_colluding - 1),
        "threshold": replace(numbers, threshold=numbers.threshold + 1, min_survivors=numbers.num_sites),
        "survivors": replace(numbers, min_survivors=numbers.min_survivors + 1),
    }
    return {
        "campaign": replace(context, campaign="c-2"),
        "round": replace(context, round_id="c-1/round-2"),
        "key of another": replace(context, cohort=(*cohort[:-1], member(last, "stranger"))),
        "name of another": replace(context, cohort=(*cohort[:-1], member("site-zzz", last))),
        **{f"quorum: {name}": replace(context, quorum=one) for name, one in changed_quorums.items()},
        "size": replace(context, size=context.size + 1),
        "scalars": replace(context, num_scalars=context.num_scalars + 1),
        "ring": replace(context, ring_bits=24 if context.ring_bits != 24 else 32),
        "graph seed": replace(context, graph_seed=bytes([context.graph_seed[0] ^ 1]) + context.graph_seed[1:]),
        "request": replace(context, request_sha256=f"{int(context.request_sha256, 16) ^ 1:064x}"),
    }


def expected_total(context: Context, alive: Sequence[str]) -> list[int]:
    return [1 if at < len(context.names) and context.names[at] in alive else 0 for at in range(context.size)]


def is_refused(call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except ProtocolError:
        return True
    return False


def mask_of(context: Context, site: str, seeds: Sequence[bytes]) -> Vector:
    """The whole mask of a site, in the ring."""
    dtype, names = context.ring.dtype, context.names
    total = context.ring.zeros(context.size)
    peers = [names[at] for at in context.graph.neighbours(context.index[site])]
    for seed, peer in zip(seeds, [None, *peers], strict=True):
        if not seed:  # left out
            continue
        stream = in_ring(context.ring, np.frombuffer(key_stream(seed, context.size * dtype.itemsize), dtype))
        np.subtract(total, stream, out=total) if peer is not None and peer < site else np.add(total, stream, out=total)
    return context.ring.reduce(total)


def opened_vector(context: Context, upload: Upload) -> Vector:
    total = context.ring.zeros(context.size)
    add_segments(total, context.ring, upload.segments)
    return context.ring.reduce(total)


def seeds_of(cohort: Cohort, site: str, upload: Upload) -> list[bytes]:
    """Every seed of an upload that some holders of the role's own making can open: pads of the role that dealt them."""
    context, role = cohort.context, cohort.roles[site]
    holders = [context.names[at] for at in context.graph.holders]
    shape = upload.shares.shape[1:]
    pads = [key_stream(role._pad_key(context, site, holder), shape[0] * shape[1]) for holder in holders]
    shares = upload.shares ^ np.stack([np.frombuffer(one, np.uint8).reshape(shape) for one in pads])
    return [row.tobytes() for row in shamir.combine(shares, [at + 1 for at in range(len(holders))])]


def shown(cohort: Cohort, uploads: Mapping[str, Upload], lists: Mapping[str, Sequence[Sequence[str]]]) -> Attacker:
    """A server that shows each holder its lists; a colluder answers several, an honest site the first of them only."""
    attacker = Attacker(cohort.context, uploads)
    kept = progress_of(cohort)
    for name, several in lists.items():
        for alive in several:
            attacker.take(name, alive, cohort.roles[name].unmask(cohort.context, alive))
            cohort.roles[name].progress = dict(kept[name])  # a colluder forgets; the honest have one list
    return attacker


def error_of(whose: str) -> Bytes:
    """32 bytes that no errors of others cancel."""
    return np.frombuffer(hashlib.sha256(whose.encode()).digest(), np.uint8)


def flipped_by(*forgers: str) -> Callable[[str, Bytes], Bytes]:
    def forge(name: str, pads: Bytes) -> Bytes:
        if name not in forgers:
            return pads
        return pads ^ error_of(name)

    return forge


def answered_round(cohort: Cohort, forge: Callable[[str, Bytes], Bytes], order: Sequence[str] | None = None) -> ServerRole:
    """A round with all uploads, whose answers pass through ``forge``."""
    server = cohort.received()
    alive = server.close()
    for name in order or alive:
        server.answer(name, forge(name, cohort.roles[name].unmask(cohort.context, alive)))
    return server
