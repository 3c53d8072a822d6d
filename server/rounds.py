"""One secure round over whatever carries parcels: uploads are added as they arrive, then the survivors' sum is opened.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats
from urna.privacy.ring import spans
from urna.privacy.secure_sum import Context, ServerRole, alive_digest, context_of, doubt_of_key, segments_of, upload_of
from urna.protocol.errors import ProtocolError, RoundError
from urna.protocol.identity import OPERATOR, Identity, Roster, verify
from urna.protocol.messages import (
    PIECE_LIMIT_BYTES,
    AbortRequest,
    AnswerOfSite,
    AnyArray,
    AnyReply,
    Audit,
    Burnt,
    Envelope,
    HelloReply,
    HelloRequest,
    Masked,
    Member,
    Message,
    Request,
    SetupReply,
    SetupRequest,
    Summed,
    Unmasked,
    UnmaskRequest,
    read_request,
    signed,
)
from urna.protocol.plan import Plan
from urna.protocol.quorum import MAX_SILENT_AT_SETUP
from urna.server.delivery import Delivery, doubt_of_lacks
from urna.server.exchange import Answer, Exchange, Transport
from urna.server.journal import Journal, Json

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
        transport: what carries parcels.
        journal: where requests and outcomes are kept.
        identity: the operator's, which signs requests.
        roster: pinned keys.
        plan: who must be there, how sums are opened, how long an exchange may take.
    """

    def __init__(self, transport: Transport, journal: Journal, identity: Identity, roster: Roster, plan: Plan) -> None:
        if identity.name != OPERATOR:
            raise ValueError(f"rounds are asked by {OPERATOR!r}, found {identity.name!r}")
        self._exchange = Exchange(transport, journal, identity, roster, plan.federation.round_timeout_seconds)
        self._journal = journal
        self._identity = identity
        self._roster = roster
        self._plan = plan
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
        self,
        request: Request,
        num_expected: int,
        believe: Callable[[HelloReply], str | None],
        patience_seconds: float = 0.0,
    ) -> tuple[dict[str, HelloReply], dict[str, str]]:
        """Ask everyone within reach; learn who is who by signature.

        Args:
            request: the opening request.
            num_expected: how many to wait for.
            believe: why a site that would join may not, or None.
            patience_seconds: how long to wait for people at the sites who must approve first.

        Returns:
            The members by name, and why others are none: refusals, codes and doubts by name. Members have every candidate:
            what they lacked, and let be sent, was delivered.

        Raises:
            ModelError: a candidate that a site lacks is not here as it was pinned.
        """
        members: dict[str, HelloReply] = {}
        others: dict[str, str] = {}

        def take(answer: Answer) -> None:
            if not isinstance(answer.said, HelloReply):
                if answer.site:
                    others[answer.site] = answer.why
                return
            try:
                self._check_owner(answer.said.member, answer.site, request.campaign)
            except ProtocolError as error:
                log.warning("a hello was not believed: %s", error)
                return
            doubt = believe(answer.said) or doubt_of_lacks(request, answer.said)
            doubt = doubt or self._doubt_of_key(answer.said.member, members)
            if doubt is None:
                members[answer.site] = answer.said
                self._address[answer.site] = answer.address
            else:
                others[answer.site] = doubt

        nodes = self._exchange.addresses(num_expected)
        envelope = self._recorded("hello", request, {})
        waiting = self._exchange.ask_until_approved("query.hello", envelope, nodes, take, patience_seconds)
        others |= dict.fromkeys(waiting, "waits for approval at the site")
        if isinstance(request, HelloRequest):
            others |= self._delivered(request, members)
        members = {name: one for name, one in members.items() if name not in others}
        self._members = {name: members[name].member for name in sorted(members)}
        self.everyone_back()
        return members, others

    def _delivered(self, request: HelloRequest, members: Mapping[str, HelloReply]) -> dict[str, str]:
        """Send the members what they lack, before anything is spent; why some did not get it."""
        delivery = Delivery(self._exchange, self._journal, self._identity, PIECE_LIMIT_BYTES)
        lacking = {site: said.lacks for site, said in members.items() if said.lacks}
        return delivery.run(request, lacking, self._address)

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

    def _check_owner(self, member: Member, site: str, campaign: str) -> None:
        """Whether a round key was signed by the site that shows it, for this campaign."""
        member.check(self._roster, campaign)
        if member.site != site:
            raise ProtocolError(f"{site} speaks for {member.site}")

    def _doubt_of_key(self, member: Member, members: Mapping[str, HelloReply]) -> str | None:
        """Who showed a key first keeps it, after a resume too: by then every member knows it."""
        doubt = doubt_of_key(member, [other.member for other in members.values()])
        if doubt is not None:
            return doubt
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
        envelope = self._recorded(key, request, {})
        answers: dict[str, AnyReply] = {}

        def take(answer: Answer) -> None:
            if answer.said is not None and answer.reply is not None:
                answers[answer.site] = answer.said
                kept = {"body": answer.reply.body.decode(), "signature": answer.reply.signature.hex()}
                self._journal.once(f"reply/{key}/{answer.site}", lambda: kept)

        self._exchange.ask(route, envelope, self._site_at(self._members), take)
        return answers

    def _site_at(self, sites: Iterable[str]) -> dict[int, str]:
        """The addresses of those that said hello."""
        return {self._address[site]: site for site in sites if site in self._address}

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
            return request, self._recorded(key, request, arrays)
        envelope = self._restored(kept.value, kept.arrays)
        return _summed(envelope), envelope

    def _recorded(self, key: str, message: Message, arrays: Mapping[str, AnyArray]) -> Envelope:
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
        dropped = dict.fromkeys(cohort, "silent")

        def take(answer: Answer) -> None:
            site = answer.site
            if site not in dropped:  # a second reply: the first one counts
                return
            dropped[site] = answer.why
            if isinstance(answer.said, Masked) and answer.reply is not None:
                try:
                    add(site, answer.reply)
                    del dropped[site]
                except ProtocolError as error:
                    log.warning("%s", error)
                    dropped[site] = "not believed"

        self._exchange.ask(route, envelope, self._site_at(cohort), take)
        return dropped

    def _unmask(self, key: str, request: Summed, context: Context, server: ServerRole, alive: tuple[str, ...]) -> bool:
        """The second exchange: whether enough true answers came; what the holders signed is kept for the next audit."""
        round_id = request.request_id
        asked = UnmaskRequest(**self._header(request, f"{key}/unmask"), round_id=round_id, alive=alive)
        envelope = self._recorded(f"{key}/unmask", asked, {})
        holders = {context.names[at] for at in context.graph.holders}.intersection(alive)
        digest = alive_digest(context, alive)
        answers: dict[str, AnswerOfSite] = {}

        def take(answer: Answer) -> None:
            if not isinstance(answer.said, Unmasked) or answer.reply is None:
                log.warning("%s did not unmask %s: %s", answer.site, key, answer.why)
                return
            try:
                verify(self._roster, answer.site, "alive", digest, bytes.fromhex(answer.said.answer.signature))
                server.answer(answer.site, answer.reply.arrays.get("pads", np.empty(0)))
                answers[answer.site] = answer.said.answer
            except ProtocolError as error:
                log.warning("%s", error)

        site_at = self._site_at(sorted(holders))
        self._exchange.ask("query.unmask", envelope, site_at, take, enough=lambda: server.is_open)
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
        envelope = self._recorded(f"{key}/abort", said, {})
        holders = {context.names[at] for at in context.graph.holders}
        believed = {"", alive_digest(context, alive).hex()}  # no other list was asked: who says so lies
        answers: dict[str, AnswerOfSite] = {}

        def take(answer: Answer) -> None:
            said = answer.said
            if isinstance(said, Burnt) and answer.site in holders and said.answer.alive_sha256 in believed:
                answers[answer.site] = said.answer

        self._exchange.ask("query.abort", envelope, self._site_at(one.site for one in request.cohort), take)
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
