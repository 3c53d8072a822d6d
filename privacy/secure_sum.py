"""The secure sum: the server learns the total of the surviving sites' vectors and nothing else.

Sources: Bonawitz et al. 2017 (double masking, shares), Bell et al. 2020 (sparse graphs), Ma et al. 2023, *Flamingo* (keys once
a campaign, one committee of share holders). Both roles are here, without any input or output:

    set-up (once)   site -> server: Member, a key signed by its identity            server -> sites: all of them
    upload          site -> server: Upload: vector + masks, shares, checks          server -> sites: the request (Context)
    unmask          site -> server: pads of single shares, the alive list signed    server -> sites: the alive list

    pair key        HKDF-SHA256(X25519(own, peer's), info = campaign, sorted names and keys)            RFC 7748, RFC 5869
    edge seed       HMAC-SHA256(pair key, "mask" || context); its key stream is added by the site whose name sorts first,
                    subtracted by the other
    self seed       32 fresh random bytes a round; its key stream is added
    shares          Shamir, threshold t, of the self seed and of every edge seed of a site, to every holder
    pad             AES-256-CTR key stream under HMAC(pair key of dealer and holder, "pad" || dealer || context), 32 bytes for
                    each share: a share travels as share XOR pad, and its holder opens it by telling the server this pad
    check           16 bytes of SHA-256("check" || context || whose || seed): an opened seed is checked against it, and the
                    two ends of an edge must bring the same
    context         SHA-256 over version, campaign, round, sorted (site, key) list, quorum, ring, sizes, graph seed and the hash
                    of the request as it was received: one bit changed, other masks

A site whose upload arrived is *alive*, another is *dead*; the total opens with the self seeds of the alive and the edge seeds
between alive and dead. Nobody ever tells both kinds about one site: a role answers one alive list a round.

Covered:
    * a curious or lying server, a relay, and up to c colluding sites (see `protocol.quorum`): each honest vector stays hidden
      in a sum with other honest ones, whatever lists it shows to whom;
    * dropouts at any point while t holders answer; uploads that come late stay hidden;
    * a second vector, alive list or context in one round; swapped, duplicate and unknown sites; small cohorts;
    * forged shares and pads: found by their check, outvoted where more than t answer, and named.
Not covered:
    * a server that shows different alive lists can still open the sum of a smaller set of sites (c = 1: of 10 at least 5 honest
      ones, of 32 at least 17); the noise is sized for it (`Quorum.noise_parties`), and what holders signed, shown to all with
      the next request, raises the alarm one round later (`client.secure_rounds`);
    * a site restored from a backup that uploads a second time in one round: then pads are used twice and the difference of its
      two vectors can be opened. Its ledger must not be restored (the alarm for that comes with the ledger's anchor);
    * one site that contradicts its neighbours' edges, or deals wrong shares, loses a round; `ServerRole.suspects` names it;
    * two sums over cohorts that differ by one site: their difference is that site's vector and noise;
    * a site that lies about its own vector; n - 1 colluding sites always know the rest, so what is summed is DP anyway;
    * a server that refuses to go on; whether keys are signed (`Member.check`, before a context is made); keeping `Progress` on
      disk before an answer leaves (the caller's duty).
"""

import hashlib
import hmac
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from urna.privacy import shamir
from urna.privacy.mechanisms import key_stream, random_bytes
from urna.privacy.ring import Fill, Ring, Signed, Vector, Wire, add_segments, add_streams, masked
from urna.protocol.errors import ProtocolError, ReplayError
from urna.protocol.messages import AnyArray, Member, Summed
from urna.protocol.plan import Plan
from urna.protocol.quorum import Quorum

VERSION = b"urna-secure-sum/2"
SEED_BYTES, CHECK_BYTES = 32, 16
MAX_DRAWS = 100  # of a graph's distances; dense graphs of few sites have no better ones
SUBSETS_TRIED = 2_000  # of answers, when some of them are forged
Bytes = npt.NDArray[np.uint8]
Scalars = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Context:
    """What every mask of one round is bound to; members whose signatures have been checked, in any order.

    Args:
        campaign: the campaign's id.
        round_id: the upload request's id; used once.
        cohort: the round keys of all members of this round.
        quorum: who must be there.
        size: d, numbers in a vector.
        num_scalars: exact numbers modulo 2**64 beside it.
        ring_bits: of the vector.
        graph_seed: who shares masks with whom in a sparse graph; chosen by no one alone.
        request_sha256: of the request as it was received (model and mechanism included), hex.

    Raises:
        ProtocolError: duplicates in the cohort, or another number of sites than the quorum is for.
    """

    campaign: str
    round_id: str
    cohort: tuple[Member, ...]
    quorum: Quorum
    size: int
    num_scalars: int
    ring_bits: int
    graph_seed: bytes
    request_sha256: str

    def __post_init__(self) -> None:
        check_cohort(self.cohort, self.quorum.num_sites)
        if len(self.cohort) != self.quorum.num_sites:
            raise ProtocolError(f"expected {self.quorum.num_sites} sites, found {len(self.cohort)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The members, sorted; a site's index in it is its number in the graph."""
        return tuple(sorted(member.site for member in self.cohort))

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The number of each site."""
        return {name: at for at, name in enumerate(self.names)}

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Each member's X25519 key, hex."""
        return {member.site: member.public_key for member in self.cohort}

    @cached_property
    def graph(self) -> "Graph":
        """Who shares masks with whom, and who holds shares."""
        return Graph(self.quorum, self.graph_seed)

    @cached_property
    def digest(self) -> bytes:
        """The binding, 32 bytes."""
        rules = [self.quorum.num_colluding, self.quorum.degree, self.quorum.num_holders, self.quorum.threshold]
        fields = [self.campaign, self.round_id, sorted(self.keys.items()), rules, self.quorum.min_survivors]
        sizes = [self.size, self.num_scalars, self.ring_bits, self.graph_seed.hex(), self.request_sha256]
        return hashlib.sha256(VERSION + json.dumps([fields, sizes]).encode()).digest()

    @property
    def ring(self) -> Ring:
        """Of the vector."""
        return Ring(self.ring_bits)

    def check_of(self, whose: Sequence[str], seed: bytes) -> bytes:
        """What stands for a seed in an upload: of a site's self seed, or of the edge between two."""
        label = json.dumps(sorted(whose)).encode()
        return hashlib.sha256(b"check" + self.digest + label + b"\0" + seed).digest()[:CHECK_BYTES]


def context_of(request: Summed, plan: Plan, size: int, request_sha256: str) -> Context:
    """The context of a campaign's round: all from the request as it was received and the plan, so both sides find the same.

    Raises:
        ProtocolError: duplicates in the cohort, or too few sites for the plan.
    """
    try:
        quorum = plan.quorum(len(request.cohort))
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    nonces = json.dumps([request.graph_nonce, sorted(request.graph_nonces.items())]).encode()
    return Context(
        campaign=request.campaign,
        round_id=request.request_id,
        cohort=request.cohort,
        quorum=quorum,
        size=size,
        num_scalars=0,
        ring_bits=request.ring_bits,
        graph_seed=hashlib.sha256(b"graph" + nonces).digest(),
        request_sha256=request_sha256,
    )


class Graph:
    """Who shares masks with whom: everybody, or a random circulant graph; and the committee of holders.

    The sites are put in a random order; each is joined to those at k/2 random distances on either side. Such Cayley graphs
    with O(log n) random generators are expanders (Alon, Roichman 1994), every site has exactly k neighbours, and a site finds
    its own without building the graph.
    """

    def __init__(self, quorum: Quorum, seed: bytes) -> None:
        n, self._full = quorum.num_sites, quorum.is_full
        self._neighbours: dict[int, list[int]] = {}
        order = _shuffled(n, seed, b"order")
        self._at = order.tolist()  # place -> site
        self._place = np.argsort(order).tolist()  # site -> place
        self._distances = [] if self._full else _distances(quorum, seed)
        chosen = _shuffled(n, seed, b"holders")[: quorum.num_holders]
        self.holders: tuple[int, ...] = tuple(sorted(chosen.tolist()))

    def neighbours(self, site: int) -> list[int]:
        """The sites that share a mask with ``site``, sorted; found once, do not change it."""
        if site not in self._neighbours:
            n = len(self._at)
            if self._full:
                found = [other for other in range(n) if other != site]
            else:
                place = self._place[site]
                found = sorted(self._at[(place + sign * distance) % n] for distance in self._distances for sign in (1, -1))
            self._neighbours[site] = found
        return self._neighbours[site]


def _distances(quorum: Quorum, seed: bytes) -> list[int]:
    """k/2 random distances; 1 is always among them, for distances that are all even would leave two halves.

    Now and then all of them are small in some other order of the sites (f times each, modulo n): then two blocks that are told
    dead would part the graph. Such a draw is put aside, against as many dead as any lists can make (`Quorum.most_cut_off`).
    """
    n, half = quorum.num_sites, quorum.degree // 2
    factors = np.arange(1, n // 2 + 1)[:, None]
    factors = factors[np.gcd(factors[:, 0], n) == 1]
    for draw in itertools.count():
        further = _shuffled((n - 1) // 2 - 1, seed, b"distances" + draw.to_bytes(4, "big"))[: half - 1] + 2
        distances = np.array([1, *further])
        steps = factors * distances % n
        widest = np.minimum(steps, n - steps).max(axis=1)  # of the blocks that would part this order
        if 2 * int(widest.min()) > quorum.most_cut_off or draw == MAX_DRAWS:
            return [int(one) for one in distances]
    raise AssertionError("itertools.count ends nowhere")


def _shuffled(count: int, seed: bytes, label: bytes) -> npt.NDArray[np.int64]:
    """0 ... count - 1 in the order of 64-bit numbers from a key stream."""
    keys = np.frombuffer(key_stream(hashlib.sha256(VERSION + label + seed).digest(), 8 * count), dtype="<u8")
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True)
class Upload:
    """What one site sends: all of it looks uniform to anyone without keys.

    Args:
        segments: the masked vector as it travels, see `ring`.
        scalars: (num_scalars,) masked modulo 2**64.
        shares: (m, 1 + k, 32) sealed by pads: for each holder, of the self seed, then of each neighbour's edge seed.
        checks: (1 + k, 16) of the same seeds.
    """

    segments: Sequence[Wire]
    scalars: Scalars
    shares: Bytes
    checks: Bytes

    def to_arrays(self) -> dict[str, AnyArray]:
        """By name, as they travel; the inverse of `upload_of`."""
        return {**named_segments(self.segments), "scalars": self.scalars, "shares": self.shares, "checks": self.checks}


def upload_of(arrays: Mapping[str, AnyArray]) -> Upload:
    """Read an upload from arrays by name; sizes are checked where it is added.

    Raises:
        ProtocolError: not the arrays of an upload.
    """
    try:
        return Upload(segments_of(arrays), arrays["scalars"], arrays["shares"], arrays["checks"])
    except KeyError as error:
        raise ProtocolError(f"expected an upload with segments, scalars, shares and checks, found no {error}") from None


def named_segments(segments: Sequence[Wire]) -> dict[str, AnyArray]:
    """By name, in order; the inverse of `segments_of`."""
    return {f"segment-{at:06}": one for at, one in enumerate(segments)}


def segments_of(arrays: Mapping[str, AnyArray]) -> list[Wire]:
    """The segments of a vector, in order."""
    return [array for name, array in sorted(arrays.items()) if name.startswith("segment-")]


@dataclass(frozen=True)
class Progress:
    """How far a site is in one round: it only ever moves forward. Keep it on disk before the answer leaves."""

    context: str  # the digest that was uploaded for, hex
    alive_sha256: str = ""  # the alive list that was answered, hex; "" before that
    burnt: bool = False  # the round was given up: no unmask is ever answered


class SiteRole:
    """One site's side of a campaign.

    Args:
        site: this site's name.
        private_key: its X25519 round key, made for this campaign.
        campaign: the campaign's id.
        min_cohort: the smallest cohort, and the smallest number of survivors, that it takes part in (at least 2).
        progress: of earlier rounds by round id, as it was kept.
    """

    def __init__(
        self,
        site: str,
        private_key: X25519PrivateKey,
        campaign: str,
        min_cohort: int,
        progress: Mapping[str, Progress] | None = None,
    ) -> None:
        self._site = site
        self._private_key = private_key
        self._public_key = private_key.public_key().public_bytes_raw().hex()
        self._campaign = campaign
        self._min_cohort = max(2, min_cohort)
        self._pair_keys: dict[tuple[str, str], bytes] = {}
        self.progress: dict[str, Progress] = dict(progress or {})

    @staticmethod
    def uploaded(context: Context | None) -> Progress:
        """What to keep once a round was uploaded; of none, that nothing was."""
        return Progress("" if context is None else context.digest.hex())

    def upload(self, context: Context, fill: Fill, scalars: Sequence[int] = ()) -> Upload:
        """Mask a vector for one round, once; `progress` has moved when this returns.

        Args:
            context: of the round.
            fill: gives the vector's numbers modulo 2**ring_bits (see `ring.Fill`).
            scalars: exact numbers, taken modulo 2**64; read when ``fill`` has given the whole vector.

        Raises:
            ReplayError: this round was uploaded before, or given up: answer a repeated request with the stored bytes.
            ProtocolError: the cohort is too small or lacks this site with its own key.
            RuntimeError: another number of scalars than agreed.
        """
        self._check_own(context)
        if context.round_id in self.progress:
            raise ReplayError(f"round {context.round_id} was masked before: a second vector would open the difference")
        if len(scalars) != context.num_scalars:
            raise RuntimeError(f"expected {context.num_scalars} scalars, found {len(scalars)}")
        own = context.index[self._site]
        peers = [context.names[other] for other in context.graph.neighbours(own)]
        for other in {*peers, *(context.names[holder] for holder in context.graph.holders)}:
            self._pair_key(context, other)  # a key that is none is found before the round is used up
        self.progress[context.round_id] = self.uploaded(context)
        self_seed = random_bytes(SEED_BYTES)
        edge_seeds = [hmac.digest(self._pair_key(context, peer), b"mask" + context.digest, "sha256") for peer in peers]
        keys = [(self_seed, False), *zip(edge_seeds, (peer < self._site for peer in peers), strict=True)]
        labels = [(self._site,), *((self._site, peer) for peer in peers)]
        checks = b"".join(context.check_of(label, seed) for label, (seed, _) in zip(labels, keys, strict=True))
        return Upload(
            masked(fill, context.size, context.ring, keys),
            _masked_scalars(scalars, keys),
            self._sealed(context, np.frombuffer(b"".join(seed for seed, _ in keys), np.uint8).reshape(-1, SEED_BYTES)),
            np.frombuffer(checks, np.uint8).reshape(-1, CHECK_BYTES),
        )

    def unmask(self, context: Context, alive: Sequence[str]) -> Bytes:
        """Open single shares of one round for the server, for one alive list only; `progress` has moved when this returns.

        Args:
            context: of the round, as this site uploaded for it.
            alive: the sites whose uploads the server has.

        Returns:
            (number of `opened_items`, 32) pads, in their order.

        Raises:
            ReplayError: another alive list was answered before, the round was given up, or the context is another.
            ProtocolError: this site did not upload or holds no shares, or the list is not one that it may answer.
        """
        kept = self.progress.get(context.round_id)
        if kept is None:
            raise ProtocolError(f"expected an unmask after an upload of {context.round_id}, found none of {self._site}")
        digest = alive_digest(context, alive).hex()
        if kept.context != context.digest.hex() or kept.burnt or kept.alive_sha256 not in ("", digest):
            raise ReplayError(f"round {context.round_id} was given up, or answered for another alive list or context")
        own = context.index[self._site]
        if own not in context.graph.holders:
            raise ProtocolError(f"expected a holder of shares, found {self._site}")
        check_alive(context, alive, self._min_cohort)
        if self._site not in alive:
            raise ProtocolError(f"expected {self._site}, which uploaded, among the alive, found it dead: refused")
        self.progress[context.round_id] = replace(kept, alive_sha256=digest)
        return self._pads_of(context, opened_items(context, alive))

    def burn(self, round_id: str) -> Progress:
        """Give a round up: no unmask of it is ever answered from now on."""
        self.progress[round_id] = replace(self.progress.get(round_id, Progress("")), burnt=True)
        return self.progress[round_id]

    def _check_own(self, context: Context) -> None:
        check_cohort(context.cohort, self._min_cohort)
        own = context.keys.get(self._site)
        if own != self._public_key or context.campaign != self._campaign:
            raise ProtocolError(f"expected {self._site} with its own round key in the cohort, found {own or 'neither'}")
        if context.quorum.min_survivors < self._min_cohort:
            raise ProtocolError(f"expected sums of at least {self._min_cohort} survivors, found {context.quorum.min_survivors}")

    def _sealed(self, context: Context, seeds: Bytes) -> Bytes:
        """Shares (m, 1 + k, 32) of the seeds, each XOR its pad."""
        quorum = context.quorum
        shares = shamir.split(seeds, quorum.threshold, quorum.num_holders)
        for share, holder in zip(shares, context.graph.holders, strict=True):
            pads = key_stream(self._pad_key(context, self._site, context.names[holder]), share.size)
            share ^= np.frombuffer(pads, np.uint8).reshape(share.shape)
        return shares

    def _pads_of(self, context: Context, items: "list[Item]") -> Bytes:
        pads = np.empty((len(items), SEED_BYTES), dtype=np.uint8)
        place = 0
        for dealer, group in itertools.groupby(items, key=lambda item: item.dealer):
            slots = [item.slot for item in group]
            key = self._pad_key(context, context.names[dealer], self._site)
            stream = np.frombuffer(key_stream(key, SEED_BYTES * (1 + max(slots))), np.uint8).reshape(-1, SEED_BYTES)
            pads[place : place + len(slots)] = stream[slots]
            place += len(slots)
        return pads

    def _pad_key(self, context: Context, dealer: str, holder: str) -> bytes:
        """Of the shares that ``dealer`` gives ``holder``; this site is one of them, or both."""
        peer = holder if dealer == self._site else dealer
        label = json.dumps([dealer, holder]).encode()
        return hmac.digest(self._pair_key(context, peer), b"pad" + context.digest + label, "sha256")

    def _pair_key(self, context: Context, peer: str) -> bytes:
        """The key that this site and ``peer`` share in this campaign; of this site alone where it is the peer itself."""
        theirs = context.keys[peer]
        if (peer, theirs) not in self._pair_keys:
            own = self._private_key.private_bytes_raw()
            shared = own if peer == self._site else exchanged(self._private_key, peer, theirs)  # nobody else needs the first
            info = json.dumps([self._campaign, sorted([(self._site, self._public_key), (peer, theirs)])]).encode()
            derived = HKDF(algorithm=SHA256(), length=32, salt=VERSION, info=info).derive(shared)
            self._pair_keys[peer, theirs] = derived
        return self._pair_keys[peer, theirs]


class ServerRole:
    """The server's side of one round: a running total, so that what vectors take does not grow with the number of sites.

    Shares do: m (1 + k) 32 bytes for each site until the round is over, 34 KB above 32 sites.

    ``add`` each upload as it arrives; ``close`` fixes who is alive; ``answer`` with each holder's pads until ``is_open``; then
    ``total``.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._total = context.ring.zeros(context.size)
        self._scalars = np.zeros(context.num_scalars, dtype=np.uint64)
        self._shares: dict[int, Bytes] = {}
        self._checks: dict[int, Bytes] = {}
        self._alive: tuple[str, ...] | None = None
        self._items: list[Item] = []
        self._pads: dict[int, Bytes] = {}
        self._seeds: Bytes | None = None
        self._is_taken = False
        self._conflicts: dict[int, set[int]] = {}  # site -> later ones whose edge checks differ from its own
        self.forgers: frozenset[str] = frozenset()  # holders whose shares disagree with the checked seeds
        self._unsolved: set[int] = set()  # dealers whose seeds no answers give
        self._most_liars = max(1, context.quorum.num_colluding)  # so many may say the same wrong thing

    def add(self, site: str, upload: Upload) -> None:
        """Take one site's upload.

        Raises:
            ProtocolError: not a member, a second one, after the list was closed, of other sizes than agreed, or with an edge
                check that differs from its neighbour's (one of the two has another key or lies).
        """
        context = self._context
        at = context.index.get(site)
        if at is None or at in self._shares:
            raise ProtocolError(f"expected one upload of each member, found a second or a foreign one from {site!r}")
        if self._alive is not None:
            raise ProtocolError(f"expected uploads before the round closed, found a late one from {site}: it stays hidden")
        rows = 1 + context.quorum.degree
        context.ring.check(upload.segments, context.size)
        shapes = (upload.scalars.shape, upload.shares.shape, upload.checks.shape)
        expected = ((context.num_scalars,), (context.quorum.num_holders, rows, SEED_BYTES), (rows, CHECK_BYTES))
        types = [part.dtype.str for part in (upload.scalars, upload.shares, upload.checks)]
        if shapes != expected or types != ["<u8", "|u1", "|u1"]:
            raise ProtocolError(f"expected scalars, shares and checks of {expected} from {site}, found {shapes}")
        self._check_edges(at, upload.checks)
        self._shares[at], self._checks[at] = upload.shares, upload.checks
        self._scalars += upload.scalars
        add_segments(self._total, context.ring, upload.segments)

    @property
    def missing(self) -> frozenset[str]:
        """The members that have not uploaded."""
        return frozenset(name for name, at in self._context.index.items() if at not in self._shares)

    @property
    def suspects(self) -> frozenset[str]:
        """Who probably spoils the round: sites that more others contradict than collude, dealers of seeds nobody finds."""
        doubted = {at for at, others in self._conflicts.items() if len(others) > self._most_liars}
        return frozenset(self._context.names[at] for at in doubted | self._unsolved)

    @property
    def wronged(self) -> frozenset[str]:
        """Sites that were left out because of what suspects say, and of nobody else."""
        suspects = {self._context.index[name] for name in self.suspects}
        accusers: dict[int, set[int]] = {}
        for at, others in self._conflicts.items():
            for other in others:
                accusers.setdefault(other, set()).add(at)
        return frozenset(self._context.names[at] for at, who in accusers.items() if who <= suspects and at not in suspects)

    def close(self) -> tuple[str, ...]:
        """Fix who is alive: nobody's upload is taken from now on.

        Raises:
            ProtocolError: too few are alive for the sum ever to open.
        """
        if self._alive is None:
            missing = self.missing
            alive = tuple(name for name in self._context.names if name not in missing)
            check_alive(self._context, alive)
            self._alive = alive
            self._items = opened_items(self._context, alive)
        return self._alive

    def answer(self, site: str, pads: Bytes) -> None:
        """Take one holder's answer to the alive list.

        Raises:
            RuntimeError: the list was not closed.
            ProtocolError: not an alive holder, a second answer, or of another shape.
        """
        if self._alive is None:
            raise RuntimeError("answers are taken after `close`")
        at = self._context.index.get(site)
        if at not in self._context.graph.holders or site not in self._alive or at in self._pads:
            raise ProtocolError(f"expected one answer of each alive holder, found a second or a foreign one from {site!r}")
        if pads.shape != (len(self._items), SEED_BYTES) or pads.dtype != np.uint8:
            raise ProtocolError(f"expected pads of {(len(self._items), SEED_BYTES)} from {site}, found {pads.shape}")
        self._pads[at] = pads
        if self._seeds is None and len(self._pads) >= self._context.quorum.threshold:
            self._seeds = self._combine()

    @property
    def answered(self) -> frozenset[str]:
        """The holders whose answers were taken."""
        return frozenset(self._context.names[at] for at in self._pads)

    @property
    def is_open(self) -> bool:
        """Whether enough true answers are there."""
        return self._seeds is not None

    def total(self) -> tuple[Vector, Scalars]:
        """The sums of the alive sites' vectors, modulo 2**ring_bits, and scalars, modulo 2**64; once.

        Raises:
            RuntimeError: not enough answers, what is there is noise and means nothing; or it was taken before.
        """
        if self._is_taken:
            raise RuntimeError("the total is taken once")
        if self._seeds is None:
            raise RuntimeError(f"the sum opens with {self._context.quorum.threshold} answers, found {len(self._pads)}")
        keys = []
        for item, seed in zip(self._items, self._seeds, strict=True):
            added = item.peer is None or self._context.names[item.dealer] < self._context.names[item.peer]
            keys.append((seed.tobytes(), added))  # what the dealer added is subtracted
        self._is_taken = True
        add_streams(self._total, self._context.ring, keys)
        return self._context.ring.reduce(self._total), self._scalars + _scalar_masks(len(self._scalars), keys)

    def _check_edges(self, at: int, checks: Bytes) -> None:
        neighbours = self._context.graph.neighbours(at)
        wrong = []
        for row, other in enumerate(neighbours, start=1):
            if other in self._checks:
                theirs = self._checks[other][1 + self._context.graph.neighbours(other).index(at)]
                if not np.array_equal(checks[row], theirs):
                    wrong.append(self._context.names[other])
                    self._conflicts.setdefault(other, set()).add(at)
        if wrong:
            name = self._context.names[at]
            raise ProtocolError(f"expected {name} and {', '.join(wrong)} to share a seed, found two: {name} is left out")

    def _combine(self) -> Bytes | None:
        """The seeds of all items, or None while too many answers are forged."""
        items, graph, quorum = self._items, self._context.graph, self._context.quorum
        threshold = quorum.threshold
        dealt = np.stack([self._shares[item.dealer][:, item.slot] for item in items], axis=1)  # (m, items, 32)
        shares = {x: dealt[x - 1] ^ self._pads[at] for x, at in enumerate(graph.holders, start=1) if at in self._pads}
        seeds = np.zeros((len(items), SEED_BYTES), dtype=np.uint8)
        todo, trusted = np.arange(len(items)), sorted(shares)
        dealer_of = np.array([item.dealer for item in items])
        unsolved: set[int] = set()
        wrong: set[tuple[int, int]] = set()  # (dealer, x) whose share is not on the polynomial
        while len(todo):
            subset = trusted[:threshold]
            found = shamir.combine(np.stack([shares[x][todo] for x in subset]), subset)
            good = np.array([self._is_true(row, seed) for row, seed in zip(todo.tolist(), found, strict=True)])
            if not good.any():  # an answer of this subset is forged: look for one that opens the first item
                opening = self._subset_for(int(todo[0]), shares) if len(shares) > threshold else None
                if opening is not None:
                    trusted = [*opening, *(x for x in sorted(shares) if x not in opening)]
                    continue
                unsolved.add(int(dealer_of[todo[0]]))  # it dealt wrong shares if the seeds of others open
                if len(shares) == threshold or len(unsolved) > self._most_liars:
                    self._unsolved = set()  # too many answers are forged: it says nothing about dealers
                    return None
                todo = todo[dealer_of[todo] != dealer_of[todo[0]]]
                continue
            seeds[todo[good]] = found[good]
            off = {
                x: (
                    shamir.interpolate(np.stack([shares[y][todo[good]] for y in subset]), subset, x) != shares[x][todo[good]]
                ).any(1)
                for x in set(shares) - set(subset)
            }
            # two polynomials with one value at 0 share threshold - 2 more: with c forgers beside them it may be the wrong one
            agreeing = len(shares) - sum((one.astype(int) for one in off.values()), np.zeros(good.sum(), int))
            sure = agreeing >= threshold - 1 + quorum.num_colluding
            wrong |= {(int(dealer_of[row]), x) for x, one in off.items() for row in todo[good][one & sure].tolist()}
            todo = todo[~good]
        self._unsolved = unsolved
        if unsolved:
            return None
        blamed = Counter(x for _, x in wrong)  # by more dealers than collude: those may have dealt it a wrong share
        self.forgers = frozenset(
            self._context.names[graph.holders[x - 1]] for x, count in blamed.items() if count > self._most_liars
        )
        return seeds

    def _subset_for(self, row: int, shares: Mapping[int, Bytes]) -> list[int] | None:
        """A random subset of answers that opens one item."""
        for _ in range(SUBSETS_TRIED):
            subset = sorted(secrets.SystemRandom().sample(sorted(shares), self._context.quorum.threshold))
            found = shamir.combine(np.stack([shares[x][row : row + 1] for x in subset]), subset)
            if self._is_true(row, found[0]):
                return subset
        return None

    def _is_true(self, row: int, seed: Bytes) -> bool:
        item, names = self._items[row], self._context.names
        whose = [names[item.dealer]] if item.peer is None else [names[item.dealer], names[item.peer]]
        check: bytes = self._checks[item.dealer][item.slot].tobytes()
        return self._context.check_of(whose, seed.tobytes()) == check


@dataclass(frozen=True)
class Item:
    """One seed that an alive list opens: ``dealer``'s self seed (no peer) or its edge seed with a dead peer."""

    dealer: int
    slot: int  # among the dealer's seeds
    peer: int | None = None


def opened_items(context: Context, alive: Sequence[str]) -> list[Item]:
    """What an alive list opens, in the order of answers: for each alive site its self seed, then its edges to the dead."""
    living = {context.index[name] for name in alive}
    items = []
    for dealer in sorted(living):
        items.append(Item(dealer, 0))
        if len(living) < len(context.names):
            around = context.graph.neighbours(dealer)
            items += [Item(dealer, slot, peer) for slot, peer in enumerate(around, start=1) if peer not in living]
    return items


def check_cohort(cohort: Sequence[Member], min_cohort: int) -> Mapping[str, str]:
    """The cohort's keys by name.

    Raises:
        ProtocolError: fewer distinct members or distinct keys than entries, or fewer than ``min_cohort``.
    """
    keys = {key.site: key.public_key for key in cohort}
    if len(keys) != len(cohort) or len(set(keys.values())) != len(cohort):
        raise ProtocolError(f"expected each site and key once, found duplicates among {[k.site for k in cohort][:40]}")
    if len(keys) < min_cohort:
        raise ProtocolError(f"expected a cohort of at least {min_cohort} sites, found {len(keys)}")
    return keys


def check_keys(private_key: X25519PrivateKey, cohort: Sequence[Member]) -> None:
    """Whether a secret can be shared with every member, before anything is spent on it.

    Raises:
        ProtocolError: a key is of low order.
    """
    for member in cohort:
        exchanged(private_key, member.site, member.public_key)


def doubt_of_key(member: Member, others: Sequence[Member]) -> str | None:
    """Why nobody could share masks with this member: its presence would stop every round of the others."""
    for other in others:
        if other.site != member.site and other.public_key == member.public_key:
            return f"shows the round key of {other.site}"
    try:
        check_keys(X25519PrivateKey.generate(), [member])
    except ProtocolError:
        return "shows a round key of low order"
    return None


def exchanged(private_key: X25519PrivateKey, peer: str, public_key: str) -> bytes:
    """X25519 (RFC 7748, section 6.1) with a peer's key, hex.

    Raises:
        ProtocolError: the key is of low order.
    """
    try:
        return private_key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public_key)))
    except (ValueError, InvalidKey):
        raise ProtocolError(f"expected an X25519 key of {peer}, found a low-order point") from None


def check_alive(context: Context, alive: Sequence[str], min_cohort: int = 2) -> None:
    """Whether a sum over these sites may be opened at all.

    Raises:
        ProtocolError: duplicates or unknown sites; fewer than the quorum's or the policy's minimum; fewer holders than the
            threshold; or a site with fewer than half of its neighbours (a list could cut it off from the others).
    """
    living = {context.index[name] for name in alive if name in context.index}
    if len(living) != len(alive) or list(alive) != sorted(alive):
        raise ProtocolError("expected a sorted list of different members of the cohort, found duplicates or strangers")
    needed = max(min_cohort, context.quorum.min_survivors)
    if len(living) < needed:
        raise ProtocolError(f"expected at least {needed} of {len(context.names)} sites alive, found {len(living)}")
    holders = living.intersection(context.graph.holders)
    if len(holders) < context.quorum.threshold:
        raise ProtocolError(f"expected at least {context.quorum.threshold} holders alive, found {len(holders)}")
    if not context.quorum.is_full:
        for site in sorted(living):
            around = len(living.intersection(context.graph.neighbours(site)))
            if 2 * around < context.quorum.degree:
                raise ProtocolError(f"expected half of the neighbours of {context.names[site]} alive, found {around}")


def alive_digest(context: Context, alive: Sequence[str]) -> bytes:
    """What a holder signs when it answers an alive list: 32 bytes."""
    return hashlib.sha256(b"alive" + context.digest + json.dumps(list(alive)).encode()).digest()


def burnt_statement(round_id: str, context: str, alive_sha256: str) -> bytes:
    """What a holder signs when it gives a round up: for which context (hex), and the list that it had answered, if any."""
    return json.dumps(["burnt", round_id, context, alive_sha256]).encode()


def _scalar_masks(count: int, keys: Sequence[Signed]) -> Scalars:
    """The sum of the scalar masks of ``keys``: those marked true are subtracted."""
    total = np.zeros(count, dtype=np.uint64)
    for seed, negative in keys if count else ():
        stream = np.frombuffer(key_stream(hmac.digest(seed, b"scalars", "sha256"), 8 * count), dtype="<u8")
        total = total - stream if negative else total + stream
    return total


def _masked_scalars(scalars: Sequence[int], keys: Sequence[Signed]) -> Scalars:
    values = np.array([int(value) % 2**64 for value in scalars], dtype=np.uint64)
    return values + _scalar_masks(len(values), keys)
