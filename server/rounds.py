"""One secure round over whatever carries envelopes: uploads are added as they arrive, then the survivors' sum is opened.

    upload    the request to every member of the cohort; each reply is added to a running total and dropped
    unmask    who uploaded, to every one of them that holds shares; enough answers open the total
    abort     only when too few answered: nobody will ever answer that round, and says so for the next audit

A round that cannot be opened is lost, cleanly: nothing of it is opened, and the campaign decides what that means. Members that
did not upload sit out until the next stage. A request is in the journal before it is sent, the list of the alive included, so
after a crash the very same bytes are asked again, and the sites, who keep their answers, spend nothing.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats
from urna.privacy.ring import spans
from urna.privacy.secure_sum import Context, ServerRole, alive_digest, context_of, doubt_of_key, segments_of, upload_of
from urna.protocol.errors import ProtocolError, RoundError
from urna.protocol.identity import OPERATOR, Identity, Roster, verify
from urna.protocol.messages import (
    AbortRequest,
    AnswerOfSite,
    AnyArray,
    AnyReply,
    Audit,
    Burnt,
    Envelope,
    Failure,
    HelloReply,
    Masked,
    Member,
    Message,
    Refusal,
    Request,
    SetupReply,
    SetupRequest,
    Summed,
    Unmasked,
    UnmaskRequest,
    from_record,
    open_reply,
    read_request,
    signed,
    to_record,
)
from urna.protocol.plan import Plan
from urna.protocol.quorum import MAX_SILENT_AT_SETUP
from urna.server.journal import Journal, Json
from urna.strategies.grid import POLL_SECONDS, exchange

if TYPE_CHECKING:
    from flwr.app import Message as FlowerMessage
    from flwr.serverapp import Grid as FlowerGrid

# single vectors by site, and the cohort -> one vector; only without a secure sum
Combine = Callable[[Mapping[str, Floats], Sequence[Member]], Floats]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """What every request of a round needs beside its stage's own fields."""

    key: str
    cohort: tuple[Member, ...]
    graph_nonce: str
    graph_nonces: Mapping[str, str]  # of all members, where the graph is sparse
    audits: tuple[Audit, ...]


Ask = Callable[[Opening], tuple[Summed, Mapping[str, AnyArray]]]


class Transport(Protocol):
    """What carries envelopes; addresses are opaque and never identities."""

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:
        """Whom it can reach now, after waiting for ``at_least`` of them or the timeout."""

    def ask(
        self, route: str, requests: Mapping[int, Envelope], timeout_seconds: float
    ) -> Iterator[tuple[int, Envelope | None]]:
        """Send each request; yield (address, reply) as they arrive, None where delivery failed; stop at the timeout."""


class GridTransport:
    """Flower's Grid: push, then pull by id until the deadline, so that one silent site blocks nobody.

    Args:
        grid: given by Flower to a ServerApp.
        poll_seconds: between two pulls.
    """

    def __init__(self, grid: "FlowerGrid", poll_seconds: float = POLL_SECONDS) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:
        """The node ids that Flower knows."""
        deadline = time.monotonic() + timeout_seconds
        while len(found := list(self._grid.get_node_ids())) < at_least and time.monotonic() < deadline:
            time.sleep(self._poll_seconds)
        return found

    def ask(
        self, route: str, requests: Mapping[int, Envelope], timeout_seconds: float
    ) -> Iterator[tuple[int, Envelope | None]]:
        """See `Transport`."""
        from flwr.app import Message as FlowerMessage

        messages = (
            FlowerMessage(content=to_record(request), dst_node_id=node, message_type=route, ttl=timeout_seconds)
            for node, request in requests.items()
        )
        for node, reply in exchange(self._grid, messages, timeout_seconds, self._poll_seconds):
            yield node, None if reply is None else _read(reply)


def _read(reply: "FlowerMessage") -> Envelope | None:
    if reply.has_error():
        log.warning("Flower could not deliver to node %s: error %s", reply.metadata.src_node_id, reply.error.code)
        return None
    try:
        return from_record(reply.content)
    except ProtocolError as error:
        log.warning("%s", error)
        return None


@dataclass(frozen=True)
class Outcome:
    """How a round ended; ``total`` is the opened sum in real units, or None when it was lost."""

    key: str
    total: Floats | None
    members: tuple[Member, ...]  # that were asked
    survivors: tuple[Member, ...]  # that are in the total
    noise_multiplier: float  # as it was asked
    dropped: Mapping[str, str]  # site -> refusal, code or "silent"


@dataclass(frozen=True)
class Opened:
    """What an exchange of uploads brought: ``total`` in real units if it opened, and who is in it."""

    total: Floats | None
    alive: tuple[str, ...]
    dropped: Mapping[str, str]
    delivered: tuple[str, ...]


class Rounds:
    """Asks sites, and writes what happened.

    Args:
        transport: what carries envelopes.
        journal: where requests and outcomes are kept.
        identity: the operator's, which signs requests.
        roster: pinned keys.
        plan: who must be there, how sums are opened, how long an exchange may take.
    """

    def __init__(self, transport: Transport, journal: Journal, identity: Identity, roster: Roster, plan: Plan) -> None:
        if identity.name != OPERATOR:
            raise ValueError(f"rounds are asked by {OPERATOR!r}, found {identity.name!r}")
        self._transport = transport
        self._journal = journal
        self._identity = identity
        self._roster = roster
        self._plan = plan
        self._timeout_seconds = plan.federation.round_timeout_seconds
        self._address: dict[str, int] = {}
        self._active: dict[str, Member] = {}
        self._members: dict[str, Member] = {}
        self._nonces: dict[str, str] = {}
        self._unshown: dict[str, tuple[Audit, set[str]]] = {}  # round id -> what became of it, whom it was not shown to yet

    @property
    def graph_nonce(self) -> str:
        """What sparse graphs depend on, beside the sites' keys: drawn once, committed to in the hello."""
        return str(self._journal.once("graph-nonce", lambda: {"nonce": os.urandom(32).hex()})["nonce"])

    def hello(
        self, request: Request, num_expected: int, believe: Callable[[HelloReply], str | None]
    ) -> tuple[dict[str, HelloReply], dict[str, str]]:
        """Ask everyone within reach; learn who is who by signature.

        Args:
            request: the opening request.
            num_expected: how many to wait for.
            believe: why a site that would join may not, or None.

        Returns:
            The members by name, and why others are none: refusals, codes and doubts by name.
        """
        envelope = self._sealed("hello", request, {})
        nodes = self._transport.addresses(num_expected, self._timeout_seconds)
        members: dict[str, HelloReply] = {}
        others: dict[str, str] = {}
        for node, reply in self._transport.ask("query.hello", dict.fromkeys(nodes, envelope), self._timeout_seconds):
            if reply is None:
                continue
            try:
                answer = open_reply(reply, self._roster, reply.sender, envelope)
                if isinstance(answer, HelloReply):
                    answer.member.check(self._roster, request.campaign)
                    if answer.member.site != reply.sender:
                        raise ProtocolError(f"{reply.sender} speaks for {answer.member.site}")
                    doubt = believe(answer) or doubt_of_key(answer.member, [other.member for other in members.values()])
                    doubt = doubt or self._doubt_of_owner(answer.member)
                    if doubt is not None:
                        others[reply.sender] = doubt
                        continue
                    members[reply.sender] = answer
                    self._address[reply.sender] = node
                else:
                    others[reply.sender] = _why(answer)
            except ProtocolError as error:
                log.warning("a hello was not believed: %s", error)
        self._members = {name: members[name].member for name in sorted(members)}
        self.everyone_back()
        return members, others

    def setup(self, request: SetupRequest) -> None:
        """Fix the members and learn what their sparse graph depends on; who does not tell its nonce takes no part.

        Raises:
            RoundError: too many did not, so that sites would refuse the graph.
        """
        told = self.ask_all("setup", "query.setup", request)
        fixed = {member.site: member.graph_commitment for member in request.cohort}
        for site, answer in told.items():
            if isinstance(answer, SetupReply) and _sha256(answer.graph_nonce) == fixed.get(site):
                self._nonces[site] = answer.graph_nonce
        silent = sorted(set(fixed) - set(self._nonces))
        left = len(fixed) - len(silent)
        is_full = left >= self._plan.federation.min_sites and self._plan.quorum(left).is_full
        if left < self._plan.federation.min_sites or (len(silent) > MAX_SILENT_AT_SETUP and not is_full):
            raise RoundError(
                f"expected the graph nonces of all but {MAX_SILENT_AT_SETUP} of {len(fixed)} sites, none came from "
                f"{', '.join(silent[:10])}: bring them back, then `urna resume`"
            )
        self._members = {name: member for name, member in self._members.items() if name in self._nonces}
        self.everyone_back()

    @property
    def members(self) -> tuple[Member, ...]:
        """Who takes part."""
        return tuple(self._members.values())

    @property
    def member_names(self) -> tuple[str, ...]:
        """Who takes part."""
        return tuple(self._members)

    def everyone_back(self) -> None:
        """A new stage: members that sat out may try again."""
        self._active = dict(self._members)

    def _doubt_of_owner(self, member: Member) -> str | None:
        """Who showed a key first keeps it, after a resume too: by then every member knows it."""
        owner = self._journal.once(f"key/{member.public_key}", lambda: {"site": member.site})["site"]
        return None if owner == member.site else f"shows the round key of {owner}"

    def secure_sum(
        self, key: str, route: str, make: Ask, size: int, facts: Callable[[Summed], Json], combine: Combine | None = None
    ) -> Outcome:
        """One round, or what the journal says of it.

        Args:
            key: of this round, used once in the run; the end of its request id.
            route: Flower's message type.
            make: the request and its arrays.
            size: d, the length of the vector that is summed.
            facts: public facts of the request, written beside the outcome.
            combine: instead of the sum; for plans without a secure sum only.

        Raises:
            RoundError: fewer than the minimum of sites are left to ask.
        """
        done = self._journal.find(f"round/{key}")
        fresh = done is None
        if done is None:
            started = time.time()
            request, envelope = self._asked(key, make)
            opened = self._opened(key, route, request, envelope, size, combine)
            value: Json = {
                "cohort": [member.site for member in request.cohort],
                "survivors": list(opened.alive),
                "delivered": list(opened.delivered),
                "dropped": dict(opened.dropped),
                "opened": opened.total is not None,
                "seconds": time.time() - started,
                **facts(request),
            }
            done = self._journal.record(f"round/{key}", value, None if opened.total is None else {"total": opened.total})
        asked = self._journal.find(f"ask/{key}")
        assert asked is not None  # it is recorded before it is sent
        request = _summed(self._restored(asked.value, {}))
        self._note_shown(key, request, done.value["delivered"])
        for site in set(done.value["cohort"]) - set(done.value["delivered"]) if fresh else ():  # resumed: all may try again
            self._active.pop(site, None)
        survivors = tuple(member for member in request.cohort if member.site in done.value["survivors"])
        total = done.arrays.get("total")
        return Outcome(key, total, request.cohort, survivors, request.noise_multiplier, done.value["dropped"])

    def unshown_audits(self, sites: Sequence[str]) -> tuple[Audit, ...]:
        """What became of the rounds that some of ``sites`` answered and that it was not told yet."""
        return tuple(audit for audit, whom in self._unshown.values() if whom.intersection(sites))

    def ask_all(self, key: str, route: str, request: Request) -> dict[str, AnyReply]:
        """Ask every member something that is no sum; whoever answers well is in the result.

        The signed bytes are kept under ``reply/<key>/<site>``, so that anyone with the roster can check them later.
        """
        envelope = self._sealed(key, request, {})
        answers: dict[str, AnyReply] = {}
        nodes = {self._address[site]: site for site in self._members}
        for node, reply in self._transport.ask(route, dict.fromkeys(nodes, envelope), self._timeout_seconds):
            try:
                if reply is not None:
                    site = nodes[node]
                    answers[site] = open_reply(reply, self._roster, site, envelope)
                    kept = {"body": reply.body.decode(), "signature": reply.signature.hex()}
                    self._journal.once(f"reply/{key}/{site}", lambda kept=kept: kept)  # type: ignore[misc]
            except ProtocolError as error:
                log.warning("an answer was not believed: %s", error)
        return answers

    def _asked(self, key: str, make: Ask) -> tuple[Summed, Envelope]:
        """The request of this round: the recorded bytes if there are any, else a new one to the active members."""
        kept = self._journal.find(f"ask/{key}")
        if kept is None:
            needed = self._plan.federation.min_sites
            if len(self._active) < needed:
                raise RoundError(
                    f"round {key} needs {needed} sites, found {len(self._active)} "
                    f"({', '.join(self._active) or 'none'}): bring sites back, then `urna resume`"
                )
            audits = self.unshown_audits(tuple(self._active))
            cohort = tuple(self._active.values())
            sparse = self._plan.federation.secure_sum and not self._plan.quorum(len(cohort)).is_full
            nonces = dict(self._nonces) if sparse else {}
            request, arrays = make(Opening(key, cohort, self.graph_nonce, nonces, audits))
            return request, self._sealed(key, request, arrays)
        envelope = self._restored(kept.value, kept.arrays)
        return _summed(envelope), envelope

    def _sealed(self, key: str, message: Message, arrays: Mapping[str, AnyArray]) -> Envelope:
        kept = self._journal.find(f"ask/{key}")
        if kept is None:
            envelope = signed(self._identity, message, arrays)
            value = {"body": envelope.body.decode(), "signature": envelope.signature.hex()}
            kept = self._journal.record(f"ask/{key}", value, dict(envelope.arrays))
        return self._restored(kept.value, kept.arrays)

    def _restored(self, value: Json, arrays: Mapping[str, AnyArray]) -> Envelope:
        return Envelope(self._identity.name, value["body"].encode(), bytes.fromhex(value["signature"]), dict(arrays))

    def _opened(self, key: str, route: str, request: Summed, envelope: Envelope, size: int, combine: Combine | None) -> Opened:
        """Both exchanges of a round."""
        grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
        cohort = tuple(member.site for member in request.cohort)
        if not self._plan.federation.secure_sum:
            return self._gathered(route, envelope, request.cohort, grid, size, combine)
        context = context_of(request, self._plan, size, envelope.sha256)
        server = ServerRole(context)
        fixed = self._journal.find(f"ask/{key}/unmask")  # before a crash: the list of the alive stays what it was
        wanted = cohort if fixed is None else tuple(json.loads(fixed.value["body"])["alive"])
        if self._journal.find(f"ask/{key}/abort") is not None:  # given up before a crash: it stays so
            self._abort(key, request, context, wanted)
            return Opened(None, (), {}, wanted)

        def add(site: str, reply: Envelope) -> None:
            server.add(site, upload_of(reply.arrays))

        dropped = dict.fromkeys(set(cohort) - set(wanted), "silent") | self._collect(route, envelope, wanted, add)
        dropped = {site: why for site, why in dropped.items() if site not in server.wronged}
        dropped |= dict.fromkeys(server.suspects, "not believed")  # also where its vector is in the total already
        delivered = tuple(site for site in cohort if site not in dropped)
        try:
            alive = server.close()
            if fixed is not None and alive != wanted:
                raise ProtocolError(f"expected the {len(wanted)} sites of the list that was asked before, found {len(alive)}")
        except ProtocolError as error:
            log.warning("round %s is lost: %s", key, error)
            if fixed is not None:
                self._abort(key, request, context, wanted)
            return Opened(None, (), dropped, delivered)
        if not self._unmask(key, request, context, server, alive):
            self._abort(key, request, context, alive)
            dropped |= dict.fromkeys(sorted(server.suspects), "shares do not open")
            return Opened(None, (), dropped, tuple(site for site in delivered if site not in server.suspects))
        return Opened(grid.from_ring(server.total()[0]), alive, dropped, delivered)

    def _gathered(
        self, route: str, envelope: Envelope, members: tuple[Member, ...], grid: Grid, size: int, combine: Combine | None
    ) -> Opened:
        """Without a secure sum: every vector as it is, each private by its own noise."""
        singles: dict[str, Floats] = {}

        def add(site: str, reply: Envelope) -> None:
            segments = segments_of(reply.arrays)
            grid.ring.check(segments, size)
            vector = grid.ring.zeros(size)
            for (start, stop), segment in zip(spans(size), segments, strict=True):
                vector[start:stop] = grid.ring.from_wire(segment)
            singles[site] = grid.from_ring(vector)

        cohort = tuple(member.site for member in members)
        dropped = self._collect(route, envelope, cohort, add)
        alive = tuple(site for site in cohort if site in singles)
        if len(alive) < self._plan.federation.min_sites:
            return Opened(None, (), dropped, alive)
        ordered = {site: singles[site] for site in alive}
        total = combine(ordered, members) if combine else sum(ordered.values(), np.zeros(size))
        return Opened(total, alive, dropped, alive)

    def _collect(
        self, route: str, envelope: Envelope, cohort: tuple[str, ...], add: Callable[[str, Envelope], None]
    ) -> dict[str, str]:
        """Add uploads as they arrive and drop them; why each member that did not deliver did not."""
        site_at = {self._address[site]: site for site in cohort if site in self._address}
        dropped = dict.fromkeys(cohort, "silent")
        for node, reply in self._transport.ask(route, dict.fromkeys(site_at, envelope), self._timeout_seconds):
            site = site_at[node]
            if site not in dropped:  # a second reply: the first one counts
                continue
            if reply is None:
                dropped[site] = "undelivered"
                continue
            try:
                answer = open_reply(reply, self._roster, site, envelope)
                if isinstance(answer, Masked):
                    add(site, reply)
                    del dropped[site]
                else:
                    dropped[site] = _why(answer)
            except ProtocolError as error:
                log.warning("%s", error)
                dropped[site] = "not believed"
        return dropped

    def _unmask(self, key: str, request: Summed, context: Context, server: ServerRole, alive: tuple[str, ...]) -> bool:
        """The second exchange: whether enough true answers came; what the holders signed is kept for the next audit."""
        round_id = request.request_id
        asked = UnmaskRequest(**self._header(request, f"{key}/unmask"), round_id=round_id, alive=alive)
        envelope = self._sealed(f"{key}/unmask", asked, {})
        holders = {context.names[at] for at in context.graph.holders}.intersection(alive)
        digest = alive_digest(context, alive)
        answers: dict[str, AnswerOfSite] = {}
        site_at = {self._address[site]: site for site in sorted(holders) if site in self._address}
        for node, reply in self._transport.ask("query.unmask", dict.fromkeys(site_at, envelope), self._timeout_seconds):
            site = site_at[node]
            try:
                answer = None if reply is None else open_reply(reply, self._roster, site, envelope)
                if reply is None or not isinstance(answer, Unmasked):
                    log.warning("%s did not unmask %s: %s", site, key, "undelivered" if answer is None else _why(answer))
                    continue
                verify(self._roster, site, "alive", digest, bytes.fromhex(answer.answer.signature))
                server.answer(site, reply.arrays.get("pads", np.empty(0)))
                answers[site] = answer.answer
            except ProtocolError as error:
                log.warning("%s", error)
            if server.is_open:  # the rest is not waited for
                break
        if server.forgers:
            log.warning("round %s: forged shares from %s", key, ", ".join(sorted(server.forgers)))
        if server.is_open:
            audit = Audit(round_id=round_id, alive=alive, answers=answers)
            self._journal.once(f"audit/{key}", lambda: {"asked": sorted(holders), "audit": audit.model_dump()})
        return server.is_open

    def _abort(self, key: str, request: Summed, context: Context, alive: tuple[str, ...]) -> None:
        """Nobody will answer this round any more; what holders say about it is the proof that it was not opened."""
        log.warning("round %s is given up: nobody will unmask it any more", key)
        said = AbortRequest(**self._header(request, f"{key}/abort"), round_id=request.request_id)
        envelope = self._sealed(f"{key}/abort", said, {})
        site_at = {self._address[one.site]: one.site for one in request.cohort if one.site in self._address}
        holders = {context.names[at] for at in context.graph.holders}
        believed = {"", alive_digest(context, alive).hex()}  # no other list was asked: who says so lies
        answers: dict[str, AnswerOfSite] = {}
        for node, reply in self._transport.ask("query.abort", dict.fromkeys(site_at, envelope), self._timeout_seconds):
            try:
                answer = None if reply is None else open_reply(reply, self._roster, site_at[node], envelope)
                if isinstance(answer, Burnt) and site_at[node] in holders and answer.answer.alive_sha256 in believed:
                    answers[site_at[node]] = answer.answer
            except ProtocolError as error:
                log.warning("%s", error)
        audit = Audit(round_id=request.request_id, alive=(), answers=answers)
        asked = sorted(member.site for member in request.cohort)
        self._journal.once(f"audit/{key}", lambda: {"asked": asked, "audit": audit.model_dump()})

    def _note_shown(self, key: str, request: Summed, delivered: Sequence[str]) -> None:
        """Whom the next requests need not show earlier rounds again, and whom this one."""
        for audit in request.audits:
            if audit.round_id in self._unshown:
                self._unshown[audit.round_id][1].difference_update(delivered)
        kept = self._journal.find(f"audit/{key}")
        if kept is not None:
            self._unshown[request.request_id] = (Audit.model_validate(kept.value["audit"]), set(kept.value["asked"]))
        self._unshown = {round_id: one for round_id, one in self._unshown.items() if one[1]}

    def _header(self, request: Summed, key: str) -> Json:
        shared = {"campaign": request.campaign, "plan_sha256": request.plan_sha256, "stage": request.stage}
        return {**shared, "request_id": f"{request.campaign}/{key}"}


def _sha256(nonce: str) -> str:
    return hashlib.sha256(bytes.fromhex(nonce)).hexdigest()


def _summed(envelope: Envelope) -> Summed:
    request = read_request(envelope.body)
    assert isinstance(request, Summed)  # it was recorded by `_asked`
    return request


def _why(answer: AnyReply) -> str:
    match answer:
        case Refusal():
            return "refused: " + "; ".join(answer.reasons)
        case Failure():
            return f"failed: {answer.code}"
    return f"answered with a {answer.kind}"
