"""The server's side of a weighted mean (`protocol.averaging`): who takes part, one round after the other, what each is shown.

    greet     once for each node: a round key, signed by an identity that the roster pins
    average   to all nodes of a round at once; uploads are added as they arrive
    unmask    the list of who uploaded; over as soon as the sum opens
    abort     only if it does not: the round is lost, and everyone says that it stays so

Covered:
    * this side never holds a site's update, metrics or weight, and at most a few uploads at a time, however many sites;
    * sites are known by signature, never by node id; what a site answers is checked before it is used;
    * every site is shown, with the next request, what all of them signed about the last (`Audit`).
Not covered:
    * a lost round is not asked again;
    * the last round of a run: nothing is asked after it, so its alive lists are not shown.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from urna.privacy.mechanisms import random_bytes
from urna.privacy.secure_sum import Context, ServerRole, alive_digest, burnt_statement, doubt_of_key, upload_of
from urna.privacy.weighted_mean import Opened, Tensors, context_of, grids_for, opened
from urna.protocol.averaging import (
    Asked,
    AverageRequest,
    GreetRequest,
    MeanAbortRequest,
    MeanUnmaskRequest,
    RingBits,
    campaign_of,
)
from urna.protocol.errors import ProtocolError, SignatureError
from urna.protocol.identity import Identity, Roster, verify
from urna.protocol.messages import (
    AnswerOfSite,
    AnyReply,
    Audit,
    Burnt,
    Envelope,
    Failure,
    HelloReply,
    Masked,
    Member,
    Unmasked,
    open_reply,
    signed,
)

GREET_AGAIN_SECONDS = 600.0  # a node that was silent or not believed
log = logging.getLogger(__name__)
Ask = Callable[[Sequence[int], str, Envelope, float], Iterator[tuple[int, Envelope]]]  # nodes, message type, request, seconds


@dataclass(frozen=True)
class Terms:
    """The public numbers of a run's sums; see `SecureSum`."""

    min_sites: int
    num_colluding: int
    ring_bits: RingBits
    max_abs: float
    max_abs_integers: float
    max_weight: int
    weight_key: str
    train_metrics: tuple[str, ...]
    evaluate_metrics: tuple[str, ...]
    setup_timeout_seconds: float
    unmask_timeout_seconds: float


@dataclass(frozen=True)
class Batch:
    """What one round averages: the same for all its nodes."""

    nodes: tuple[int, ...]
    message_type: str
    content_sha256: str
    before: Tensors  # empty for metrics alone
    ranges: tuple[float, ...]
    ask: Ask  # sends the app's records beside the request


class MeanRounds:
    """The rounds of one run.

    Args:
        run_id: Flower's.
        identity: the operator's.
        roster: pinned keys of operator and sites.
        terms: public numbers.
        ask: sends a request alone.
    """

    def __init__(self, run_id: int, identity: Identity, roster: Roster, terms: Terms, ask: Ask) -> None:
        self._run_id = run_id
        self._identity = identity
        self._roster = roster
        self._terms = terms
        self._ask = ask
        self._nonce = random_bytes(32).hex()
        self._campaign = campaign_of(run_id, self._nonce)
        self._greeted: dict[int, float] = {}  # node -> when
        self._audits: dict[str, list[Audit]] = {}  # what each site is still to be shown
        self._num_rounds = 0
        self.members: dict[int, Member] = {}  # of the nodes that answered
        self.doubts: dict[int, str] = {}  # why a node that answered takes no part

    def greet(self, present: Sequence[int], message_type: str, seconds: float) -> None:
        """Ask the nodes that were not asked yet, or not lately, for their round keys."""
        now = time.monotonic()
        nodes = [node for node in present if node not in self.members and self._is_due(node, now)]
        if not nodes:
            return
        self._greeted.update(dict.fromkeys(nodes, now))
        request = GreetRequest(campaign=self._campaign, run_id=self._run_id, message_type=message_type)
        envelope = signed(self._identity, request)
        for node, reply in self._ask(nodes, message_type, envelope, seconds):
            try:
                answer = open_reply(reply, self._roster, reply.sender, envelope)
                if not isinstance(answer, HelloReply):
                    raise ProtocolError(_why(answer))
                answer.member.check(self._roster, self._campaign)
                if answer.member.site != reply.sender:
                    raise ProtocolError(f"{reply.sender} speaks for {answer.member.site}")
                doubt = doubt_of_key(answer.member, list(self.members.values()))
                if doubt is not None:
                    raise ProtocolError(doubt)
            except ProtocolError as error:
                log.warning("node %s does not take part: %s", node, error)
                self.doubts[node] = str(error)
                continue
            for other in [one for one, member in self.members.items() if member.site == reply.sender]:
                del self.members[other]  # the site came back as another node
            self.members[node] = answer.member

    def round(self, batch: Batch, seconds: float) -> Opened | None:
        """Upload and unmask; None when the round is lost."""
        request = self._request(batch)
        envelope = signed(self._identity, request)
        context = context_of(request, sum(one.size for one in batch.before.values()), envelope.sha256)
        role = ServerRole(context)
        for site, answer, reply in self._asked(batch.ask, batch.nodes, request, envelope, seconds):
            try:
                if not isinstance(answer, Masked):
                    raise ProtocolError(_why(answer))
                role.add(site, upload_of(reply.arrays))
                self._audits.pop(site, None)  # it was shown them
            except ProtocolError as error:
                log.warning("%s is not in round %s: %s", site, request.round_id, error)
        try:
            alive = role.close()
        except ProtocolError as error:
            log.warning("round %s is lost: %s; without: %s", request.round_id, error, ", ".join(sorted(role.missing)))
            return None
        if not self._opens(batch.nodes, request, context, role, alive):
            return None
        total, scalars = role.total()
        grids = grids_for(batch.before, request.ranges, len(request.cohort), request.ring_bits)
        found = opened(total, scalars, batch.before, grids, request.metrics)
        if found is None or not self._is_plausible(found, context):
            log.warning("round %s is lost: nobody had any weight, or some site lied about its numbers", request.round_id)
            return None
        return found

    def _is_plausible(self, found: Opened, context: Context) -> bool:
        """Whether honest sites can have sent these numbers; a weight or count out of bounds would spoil all later rounds."""
        sites = len(context.names)
        return found.total_weight <= sites * self._terms.max_weight and 0 <= found.num_clamped <= sites * context.size

    def _is_due(self, node: int, now: float) -> bool:
        return node not in self._greeted or now - self._greeted[node] > GREET_AGAIN_SECONDS

    def _request(self, batch: Batch) -> AverageRequest:
        terms = self._terms
        self._num_rounds += 1
        cohort = tuple(self.members[node] for node in batch.nodes)
        shown = {audit.round_id: audit for member in cohort for audit in self._audits.get(member.site, [])}
        return AverageRequest(
            campaign=self._campaign,
            run_id=self._run_id,
            message_type=batch.message_type,
            round_id=f"{self._campaign}/{self._num_rounds}",
            nonce=self._nonce,
            cohort=cohort,
            num_colluding=terms.num_colluding,
            min_sites=terms.min_sites,
            ring_bits=terms.ring_bits,
            weight_key=terms.weight_key,
            max_weight=terms.max_weight,
            metrics=terms.train_metrics if batch.message_type.startswith("train") else terms.evaluate_metrics,
            ranges=batch.ranges,
            content_sha256=batch.content_sha256,
            audits=tuple(shown.values()),
        )

    def _opens(
        self, nodes: Sequence[int], request: AverageRequest, context: Context, role: ServerRole, alive: tuple[str, ...]
    ) -> bool:
        """Ask the holders to open the sum of the alive; if too few do, ask everyone to give the round up."""
        digest = alive_digest(context, alive)
        holders = {context.names[at] for at in context.graph.holders}.intersection(alive)
        asked = MeanUnmaskRequest(
            campaign=request.campaign,
            run_id=request.run_id,
            message_type=request.message_type,
            round_id=request.round_id,
            alive=alive,
        )
        answers: dict[str, AnswerOfSite] = {}
        living = [node for node in nodes if self.members[node].site in holders]
        seconds = self._terms.unmask_timeout_seconds
        for site, answer, reply in self._asked(self._ask, living, asked, signed(self._identity, asked), seconds):
            try:
                if not isinstance(answer, Unmasked) or "pads" not in reply.arrays:
                    raise ProtocolError(_why(answer))
                if answer.answer.alive_sha256 != digest.hex():
                    raise ProtocolError("expected an answer for the list of this round, found another")
                verify(self._roster, site, "alive", digest, bytes.fromhex(answer.answer.signature))
                role.answer(site, reply.arrays["pads"])
                answers[site] = answer.answer
            except ProtocolError as error:
                log.warning("%s does not open round %s: %s", site, request.round_id, error)
            if role.is_open:
                break
        if role.is_open:
            audit = Audit(round_id=request.round_id, alive=alive, answers=answers)
        else:
            log.warning("round %s is lost: %d of %d answered", request.round_id, len(answers), len(holders))
            audit = self._given_up(nodes, request, context, digest.hex())
        for site in holders:  # whoever may have answered
            self._audits.setdefault(site, []).append(audit)
        return role.is_open

    def _given_up(self, nodes: Sequence[int], request: AverageRequest, context: Context, asked_sha256: str) -> Audit:
        """Ask everyone to burn a round, until so many holders have that it never can be opened, even if colluders lied."""
        asked = MeanAbortRequest(
            campaign=request.campaign, run_id=request.run_id, message_type=request.message_type, round_id=request.round_id
        )
        holders = {context.names[at] for at in context.graph.holders}
        answers: dict[str, AnswerOfSite] = {}
        seconds = self._terms.unmask_timeout_seconds
        for site, answer, _ in self._asked(self._ask, nodes, asked, signed(self._identity, asked), seconds):
            if not isinstance(answer, Burnt) or site not in holders or answer.answer.alive_sha256 not in ("", asked_sha256):
                continue  # no other list was asked: who says so lies
            if self._is_burnt(context, site, answer.answer):
                answers[site] = answer.answer
            unanswered = sum(one.alive_sha256 == "" for one in answers.values())
            if len(holders) - unanswered + context.quorum.num_colluding < context.quorum.threshold:  # as the sites count
                break
        return Audit(round_id=request.round_id, alive=(), answers=answers)

    def _is_burnt(self, context: Context, site: str, said: AnswerOfSite) -> bool:
        for digest in (context.digest.hex(), ""):
            statement = burnt_statement(context.round_id, digest, said.alive_sha256)
            try:
                verify(self._roster, site, "burnt", statement, bytes.fromhex(said.signature))
            except SignatureError:
                continue
            return True
        return False

    def _asked(
        self, ask: Ask, nodes: Sequence[int], request: Asked, envelope: Envelope, seconds: float
    ) -> Iterator[tuple[str, AnyReply, Envelope]]:
        """Each site's signed answer, as it arrives."""
        for node, reply in ask(nodes, request.message_type, envelope, seconds):
            site = self.members[node].site
            try:
                yield site, open_reply(reply, self._roster, site, envelope), reply
            except ProtocolError as error:
                log.warning("%s is not believed: %s", site, error)


def _why(answer: AnyReply) -> str:
    return f"it failed: {answer.code}" if isinstance(answer, Failure) else f"it answered with a {answer.kind}"
