"""The operator's side of every exchange: seal, send, believe a reply only as far as checked, keep its ledger head.

    seal      the content once for all receivers, with the newest head that each of them has shown
    send      over a `Transport`, which sees parcels and addresses only
    believe   opened, signed by that site, an answer to this very parcel, with a head that is not older than the last
    keep      new heads in the journal when the exchange ends: a resumed run echoes them again

Covered:
    * a site whose ledger went back to an older copy during a run sees that by the echo; a reply with an older head is dropped;
    * one reply is alive at a time.
Not covered:
    * a ledger that goes back between two runs: heads are kept for a run. The site's own anchor is for that.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from urna.protocol import sealing
from urna.protocol.errors import ProtocolError, RollbackError
from urna.protocol.identity import Identity, Roster
from urna.protocol.messages import AnyReply, Envelope, Failure, Head, Pending, Refusal, open_reply
from urna.protocol.sealing import Parcel, seal, unseal
from urna.server.journal import Journal
from urna.strategies.grid import POLL_SECONDS, exchange

if TYPE_CHECKING:
    from flwr.app import Message as FlowerMessage
    from flwr.serverapp import Grid as FlowerGrid

APPROVAL_POLL_SECONDS = 5.0  # between two questions whether a person has approved
APPROVAL_ANSWER_SECONDS = 30.0  # for the answer: a site that is gone keeps nobody else waiting for long
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clock:
    """What time it is on a link, and how to let it pass."""

    now: Callable[[], float] = time.monotonic  # in seconds
    sleep: Callable[[float], None] = time.sleep


class Transport(Protocol):
    """What carries parcels; addresses are opaque and never identities."""

    @property
    def clock(self) -> Clock:
        """A simulated link has a simulated clock."""

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:
        """Whom it can reach now, after waiting for ``at_least`` of them or the timeout."""

    def ask(self, route: str, requests: Mapping[int, Parcel], timeout_seconds: float) -> Iterator[tuple[int, Parcel | None]]:
        """Send each request; yield (address, reply) as they arrive, None where delivery failed; stop at the timeout."""


class GridTransport:
    """Flower's Grid: push, then pull by id until the deadline, so that one silent site blocks nobody.

    Args:
        grid: given by Flower to a ServerApp.
        poll_seconds: between two pulls.
    """

    clock = Clock()

    def __init__(self, grid: "FlowerGrid", poll_seconds: float = POLL_SECONDS) -> None:
        self._grid = grid
        self._poll_seconds = poll_seconds

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:
        """The node ids that Flower knows."""
        deadline = time.monotonic() + timeout_seconds
        while len(found := list(self._grid.get_node_ids())) < at_least and time.monotonic() < deadline:
            time.sleep(self._poll_seconds)
        return found

    def ask(self, route: str, requests: Mapping[int, Parcel], timeout_seconds: float) -> Iterator[tuple[int, Parcel | None]]:
        """See `Transport`."""
        from flwr.app import Message as FlowerMessage

        messages = (
            FlowerMessage(content=sealing.to_record(request), dst_node_id=node, message_type=route, ttl=timeout_seconds)
            for node, request in requests.items()
        )
        for node, reply in exchange(self._grid, messages, timeout_seconds, self._poll_seconds):
            parcel = None if reply is None else _read(reply)
            del reply
            yield node, parcel
            del parcel  # before the next one is pulled


def _read(reply: "FlowerMessage") -> Parcel | None:
    if reply.has_error():
        log.warning("Flower could not deliver to node %s: error %s", reply.metadata.src_node_id, reply.error.code)
        return None
    try:
        return sealing.from_record(reply.content)
    except ProtocolError as error:
        log.warning("%s", error)
        return None


@dataclass(frozen=True)
class Answer:
    """What came back from one address: what ``site`` said in ``reply``; or nothing that was believed, and then why not."""

    address: int
    site: str  # "" where nobody could tell who is there
    said: AnyReply | None
    reply: Envelope | None
    doubt: str = ""  # "undelivered", "not believed" or "ledger went back", where nothing was said

    @property
    def why(self) -> str:
        """Why this is no answer to what was asked, in words for the journal."""
        match self.said:
            case None:
                return self.doubt
            case Refusal():
                return "refused: " + "; ".join(self.said.reasons)
            case Failure():
                return f"failed: {self.said.code}"
        return f"answered with a {self.said.kind}"


def never() -> bool:
    """For exchanges in which every reply is waited for."""
    return False


class Exchange:
    """Asks sites over a transport.

    Args:
        transport: what carries parcels.
        journal: where heads are kept, and who is waited for.
        identity: the operator's.
        roster: pinned keys.
        timeout_seconds: of one exchange.
    """

    def __init__(
        self, transport: Transport, journal: Journal, identity: Identity, roster: Roster, timeout_seconds: float
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._identity = identity
        self._roster = roster
        self._timeout_seconds = timeout_seconds
        self._heads: dict[str, Head] = {}  # the newest of each site
        self._kept: dict[str, Head] = {}  # of these, what the journal holds
        self._counted = {"heads": 0, "waiting": 0}  # entries of these kinds
        for entry in journal.entries():
            if entry.kind in self._counted:
                self._counted[entry.kind] += 1
            if entry.kind == "heads":
                self._kept |= {site: Head.model_validate(head) for site, head in entry.value.items()}
        self._heads |= self._kept

    def addresses(self, at_least: int) -> Sequence[int]:
        """Whom the transport can reach."""
        return self._transport.addresses(at_least, self._timeout_seconds)

    def ask(
        self,
        route: str,
        envelope: Envelope,
        site_at: Mapping[int, str],
        take: Callable[[Answer], None],
        enough: Callable[[], bool] = never,
        timeout_seconds: float | None = None,
    ) -> None:
        """Ask everyone in ``site_at`` the same, and hand on the answers one by one.

        Args:
            route: Flower's message type.
            envelope: the signed request.
            site_at: who is at which address; "" where that is not known yet: any site of the roster can open it then.
            take: gets each answer as it arrives; it must not keep the reply.
            enough: whether the rest need not be waited for.
            timeout_seconds: instead of the usual.
        """
        receivers = self._roster.sites if "" in site_at.values() else site_at.values()
        sealed = seal(self._identity, self._roster, envelope, {site: self._echo(site) for site in receivers})
        requests = {at: sealed.only_for(self._roster, site) if site else sealed for at, site in site_at.items()}
        timeout = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            for address, parcel in self._transport.ask(route, requests, timeout):
                answer = self._believed(address, site_at[address], parcel, envelope, sealed.sha256)
                del parcel
                take(answer)
                del answer  # one reply at a time is in memory
                if enough():
                    break
        finally:
            self._keep_heads()

    def ask_until_approved(
        self, route: str, envelope: Envelope, nodes: Sequence[int], take: Callable[[Answer], None], patience_seconds: float
    ) -> list[str]:
        """Ask whoever is at ``nodes``, and the sites that wait for a person again until they answer or patience ends.

        Returns:
            The sites that still wait.
        """
        waiting: dict[int, str] = {}

        def sort_out(answer: Answer) -> None:
            if isinstance(answer.said, Pending):
                waiting[answer.address] = answer.site
            elif answer.said is not None or answer.address not in waiting:  # what is not believed ends no waiting
                waiting.pop(answer.address, None)
                take(answer)

        clock = self._transport.clock
        self.ask(route, envelope, dict.fromkeys(nodes, ""), sort_out)
        deadline, shown = clock.now() + patience_seconds, list[str]()
        while waiting:
            left = deadline - clock.now()
            shown = self._show_waiting(sorted(waiting.values()), shown)
            if left <= 0:
                break
            clock.sleep(min(APPROVAL_POLL_SECONDS, left))
            self.ask(route, envelope, dict(waiting), sort_out, timeout_seconds=self._poll_timeout)
        if not waiting:
            self._show_waiting([], shown)
        return sorted(waiting.values())

    @property
    def _poll_timeout(self) -> float:
        return min(self._timeout_seconds, APPROVAL_ANSWER_SECONDS)

    def _show_waiting(self, sites: list[str], shown: list[str]) -> list[str]:
        """A line in the log and in the journal where the list is another than the last."""
        if sites != shown:
            log.info("waiting for approval at %s", ", ".join(sites) or "no site any more")
            self._counted["waiting"] += 1
            self._journal.record(f"waiting/{self._counted['waiting']}", {"sites": sites})
        return sites

    def _echo(self, site: str) -> Head | None:
        """The newest head that a site has shown."""
        return self._heads.get(site)

    def _believed(self, address: int, site: str, parcel: Parcel | None, asked: Envelope, asked_sha256: str) -> Answer:
        if parcel is None:
            return Answer(address, site, None, None, "undelivered")
        try:
            reply, head = unseal(self._identity, self._roster, parcel, sender=site or None, answers=asked_sha256)
            site = reply.sender
            said = open_reply(reply, self._roster, site, asked)
            self._note(site, said, head)
        except RollbackError as error:
            log.warning("%s", error)
            return Answer(address, site, None, None, "ledger went back")
        except ProtocolError as error:
            log.warning("an answer was not believed: %s", error)
            return Answer(address, site, None, None, "not believed")
        return Answer(address, site, said, reply)

    def _note(self, site: str, said: AnyReply, head: Head | None) -> None:
        """Take in a reply's head.

        Raises:
            ProtocolError: there is none (a failure may lack one: its ledger may be what failed), or it is not this site's.
            RollbackError: it is older than the newest, or another of the same number.
        """
        if head is None:
            if isinstance(said, Failure):
                return
            raise ProtocolError(f"expected {site}'s ledger head in its reply, found none")
        if head.site != site:
            raise ProtocolError(f"expected {site}'s ledger head in its reply, found another site's")
        head.check(self._roster)
        known = self._heads.get(site)
        if known is not None and (head.seq < known.seq or (head.seq == known.seq and head.link != known.link)):
            raise RollbackError(
                f"expected {site}'s ledger to hold entry {known.seq} as it showed it before, found it at {head.seq}: "
                "an older or another copy was restored there"
            )
        self._heads[site] = head

    def _keep_heads(self) -> None:
        new = {site: head for site, head in self._heads.items() if self._kept.get(site) != head}
        if new:
            self._counted["heads"] += 1
            self._journal.record(f"heads/{self._counted['heads']}", {site: head.model_dump() for site, head in new.items()})
            self._kept |= new
