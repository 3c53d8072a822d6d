"""One secure round: ask the cohort, add the replies as they arrive, open the sum when all are there.

Without dropout recovery a round ends in one of two ways: every member delivered and the sum opens, or it does not and the
round is lost, cleanly: nothing of it is opened, the members that failed sit out, and the campaign decides what a lost round
means. A request is in the journal before it is sent, so after a crash the very same bytes are asked again and the sites,
who keep their answers, spend nothing.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats
from urna.privacy.secure_sum import ServerRole
from urna.protocol.errors import ProtocolError, RoundError
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import (
    AnyArray,
    AnyReply,
    Envelope,
    Failure,
    HelloReply,
    Masked,
    Member,
    Message,
    Refusal,
    Request,
    Summed,
    from_record,
    open_reply,
    read_request,
    seal,
    to_record,
)
from urna.server.journal import Journal, Json

if TYPE_CHECKING:
    from flwr.serverapp import Grid as FlowerGrid

Ask = Callable[[tuple[Member, ...], str], tuple[Summed, Mapping[str, AnyArray]]]  # (cohort, key) -> request, arrays
POLL_SECONDS = 0.05
log = logging.getLogger(__name__)


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

        deadline = time.monotonic() + timeout_seconds
        waiting: dict[str, int] = {}
        for node, request in requests.items():
            message = FlowerMessage(content=to_record(request), dst_node_id=node, message_type=route, ttl=timeout_seconds)
            pushed = [one for one in self._grid.push_messages([message]) if one]  # empty or "" where it was not stored
            if pushed:
                waiting[pushed[0]] = node
            else:
                yield node, None
        while waiting and time.monotonic() < deadline:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                if reply.metadata.reply_to_message_id in waiting:
                    yield waiting.pop(reply.metadata.reply_to_message_id), _read(reply)
            if not replies:
                time.sleep(self._poll_seconds)


def _read(reply: object) -> Envelope | None:
    from flwr.app import Message as FlowerMessage

    assert isinstance(reply, FlowerMessage)
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
    members: tuple[Member, ...]
    noise_multiplier: float  # as it was asked
    dropped: Mapping[str, str]  # site -> refusal, code or "silent"


class Rounds:
    """Asks sites, and writes what happened.

    Args:
        transport: what carries envelopes.
        journal: where requests and outcomes are kept.
        identity: the operator's, which signs requests.
        roster: pinned keys.
        min_sites: no round is asked of fewer.
        timeout_seconds: of one round.
    """

    def __init__(
        self,
        transport: Transport,
        journal: Journal,
        identity: Identity,
        roster: Roster,
        min_sites: int,
        timeout_seconds: float,
    ) -> None:
        if identity.name != OPERATOR:
            raise ValueError(f"rounds are asked by {OPERATOR!r}, found {identity.name!r}")
        self._transport = transport
        self._journal = journal
        self._identity = identity
        self._roster = roster
        self._min_sites = min_sites
        self._timeout_seconds = timeout_seconds
        self._address: dict[str, int] = {}
        self._active: dict[str, Member] = {}
        self._members: dict[str, Member] = {}

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
                    doubt = believe(answer)
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

    def everyone_back(self) -> None:
        """A new stage: members that sat out may try again."""
        self._active = dict(self._members)

    def secure_sum(
        self,
        key: str,
        route: str,
        make: Ask,
        size: int,
        facts: Callable[[Summed], Json],
    ) -> Outcome:
        """One round, or what the journal says of it.

        Args:
            key: of this round, used once in the run; the end of its request id.
            route: Flower's message type.
            make: (cohort, key) -> the request and its arrays.
            size: d, the length of the vector that is summed.
            facts: public facts of the request, written beside the outcome.

        Raises:
            RoundError: fewer than the minimum of sites are left to ask.
        """
        done = self._journal.find(f"round/{key}")
        if done is not None:
            total = done.arrays.get("total")
            asked = self._journal.find(f"ask/{key}")
            assert asked is not None  # it is recorded before it is sent
            kept = _summed(self._restored(asked.value, {}))
            return Outcome(key, total, kept.cohort, kept.noise_multiplier, done.value["dropped"])
        started = time.time()
        request, envelope = self._asked(key, make)
        cohort = tuple(member.site for member in request.cohort)
        server = ServerRole(cohort, size)
        dropped = self._collect(route, envelope, cohort, server)
        total = None
        if not server.missing:
            total = Grid(request.step_exp, len(cohort)).from_ring(server.total())
        for site in dropped:
            self._active.pop(site, None)
        value: Json = {
            "cohort": list(cohort),
            "dropped": dropped,
            "opened": total is not None,
            "seconds": time.time() - started,
            **facts(request),
        }
        self._journal.record(f"round/{key}", value, None if total is None else {"total": total})
        return Outcome(key, total, request.cohort, request.noise_multiplier, dropped)

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
                    signed = {"body": reply.body.decode(), "signature": reply.signature.hex()}
                    self._journal.once(f"reply/{key}/{site}", lambda signed=signed: signed)  # type: ignore[misc]
            except ProtocolError as error:
                log.warning("an answer was not believed: %s", error)
        return answers

    def _asked(self, key: str, make: Ask) -> tuple[Summed, Envelope]:
        """The request of this round: the recorded bytes if there are any, else a new one to the active members."""
        kept = self._journal.find(f"ask/{key}")
        if kept is None:
            if len(self._active) < self._min_sites:
                raise RoundError(
                    f"round {key} needs {self._min_sites} sites, found {len(self._active)} "
                    f"({', '.join(self._active) or 'none'}): bring sites back, then `urna resume`"
                )
            request, arrays = make(tuple(self._active.values()), key)
            return request, self._sealed(key, request, arrays)
        envelope = self._restored(kept.value, kept.arrays)
        return _summed(envelope), envelope

    def _sealed(self, key: str, message: Message, arrays: Mapping[str, AnyArray]) -> Envelope:
        kept = self._journal.find(f"ask/{key}")
        if kept is None:
            envelope = seal(self._identity, message, arrays)
            value = {"body": envelope.body.decode(), "signature": envelope.signature.hex()}
            kept = self._journal.record(f"ask/{key}", value, dict(envelope.arrays))
        return self._restored(kept.value, kept.arrays)

    def _restored(self, value: Json, arrays: Mapping[str, AnyArray]) -> Envelope:
        return Envelope(self._identity.name, value["body"].encode(), bytes.fromhex(value["signature"]), dict(arrays))

    def _collect(self, route: str, envelope: Envelope, cohort: tuple[str, ...], server: ServerRole) -> dict[str, str]:
        """Add replies as they arrive; why each member that did not deliver did not."""
        site_at = {self._address[site]: site for site in cohort if site in self._address}
        dropped = dict.fromkeys(cohort, "silent")
        for node, reply in self._transport.ask(route, dict.fromkeys(site_at, envelope), self._timeout_seconds):
            site = site_at[node]
            if reply is None:
                dropped[site] = "undelivered"
                continue
            try:
                answer = open_reply(reply, self._roster, site, envelope)
                if isinstance(answer, Masked) and "masked" in reply.arrays:
                    server.add(site, reply.arrays["masked"])
                    del dropped[site]
                else:
                    dropped[site] = _why(answer)
            except ProtocolError as error:
                log.warning("%s", error)
                dropped[site] = "not believed"
        return dropped


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
