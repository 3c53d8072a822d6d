"""A site's side of a weighted mean (`protocol.averaging`): opens a signed request, lets the app work, answers masked.

Covered:
    * a request that the operator did not sign, for another run, message type or other records than came with it;
    * a round is used once; what was uploaded, answered or given up is on disk before the reply exists;
    * cohorts and numbers of colluding sites below this site's own minimum; members that their pinned identity did not sign;
    * what goes wrong here leaves as a fixed code, never as a text; the text is in the site's own log.
Not covered:
    * what the app itself sends elsewhere; how private the mean is: without clipping and noise in the app, not differentially.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import urna
from urna.client.local_log import Event, local_log, write
from urna.client.round_store import RoundStore
from urna.client.secure_rounds import SecureRounds
from urna.privacy.fixed_point import Rounding
from urna.privacy.ring import Vector
from urna.privacy.secure_sum import Bytes
from urna.privacy.weighted_mean import Tensors, context_of, grids_for, scalars_of, weighted_update
from urna.protocol.averaging import (
    AverageRequest,
    GreetRequest,
    MeanAbortRequest,
    MeanUnmaskRequest,
    open_asked,
)
from urna.protocol.errors import (
    AuditError,
    FailureCode,
    LedgerError,
    ModelError,
    NonFiniteError,
    ProtocolError,
    ReplayError,
    SiteConfigError,
)
from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE, Identity, load_identity, load_roster
from urna.protocol.messages import AnswerOfSite, Burnt, Envelope, Failure, HelloReply, Masked, Member, Unmasked, signed

ROUNDS_FILE = "rounds.sqlite"
CODES: tuple[tuple[type[Exception], FailureCode], ...] = (  # the first that fits
    (ReplayError, FailureCode.REPLAY_CHANGED),
    (AuditError, FailureCode.AUDIT),
    (NonFiniteError, FailureCode.NUMERIC),
    (ProtocolError, FailureCode.BAD_REQUEST),
    (SiteConfigError, FailureCode.DATA),
    (ModelError, FailureCode.MODEL),
    (LedgerError, FailureCode.LEDGER),
)


@dataclass(frozen=True)
class Received:
    """What came with a request, as it was received."""

    run_id: int
    message_type: str
    content_sha256: str
    num_tensors: int
    num_numbers: int


@dataclass(frozen=True)
class Worked:
    """What the app made of it; without tensors where only metrics are asked."""

    before: Tensors
    after: Tensors
    metrics: Mapping[str, object]


@dataclass(frozen=True)
class MeanSite:
    """One site, open.

    Args:
        rounds: its side of the secure sum.
        min_colluding: it takes part only where masks bear that many colluding members.
        log: stays here.
    """

    rounds: SecureRounds
    min_colluding: int
    log: logging.Logger

    def handle(self, envelope: Envelope, received: Received, work: Callable[[], Worked]) -> Envelope:
        """Answer a request; ``work`` is called only when an update is asked and may be given."""
        try:
            return self._answer(envelope, received, work)
        except Exception as error:  # the edge: only a code leaves
            code = next((code for kind, code in CODES if isinstance(error, kind)), FailureCode.INTERNAL)
            write(self.log, Event.REQUEST_FAILED, "a request", level=logging.ERROR, code=code, error=error)
            return signed(self.rounds.identity, Failure(request_sha256=envelope.sha256, code=code))

    def _answer(self, envelope: Envelope, received: Received, work: Callable[[], Worked]) -> Envelope:
        request = open_asked(envelope, self.rounds.roster, received.run_id, received.message_type)
        match request:
            case GreetRequest():
                return self._greet(envelope, request)
            case AverageRequest():
                return self._average(envelope, request, received, work)
            case MeanUnmaskRequest():
                return self._unmask(envelope, request)
            case MeanAbortRequest():
                answer = self.rounds.burn(request.campaign, request.round_id)
                return signed(self.rounds.identity, Burnt(request_sha256=envelope.sha256, answer=answer))

    def _greet(self, envelope: Envelope, request: GreetRequest) -> Envelope:
        key = self.rounds.store.private_key(request.campaign).public_key().public_bytes_raw().hex()
        member = Member.create(self.rounds.identity, request.campaign, key, num_records=1)  # how many is nobody's business
        hello = HelloReply(request_sha256=envelope.sha256, urna_version=urna.__version__, member=member)
        return signed(self.rounds.identity, hello)

    def _average(self, envelope: Envelope, request: AverageRequest, received: Received, work: Callable[[], Worked]) -> Envelope:
        rounds, num_sites = self.rounds, len(request.cohort)
        if request.content_sha256 != received.content_sha256:
            raise ProtocolError("expected the records that the operator signed, found others beside the request")
        if request.num_colluding < self.min_colluding or request.min_sites < rounds.min_cohort:
            raise ProtocolError(
                f"expected sums that bear {self.min_colluding} colluding sites and are of at least {rounds.min_cohort}, "
                f"found {request.num_colluding} and {request.min_sites}"
            )
        with_tensors = request.category == "train"
        if len(request.ranges) != (received.num_tensors if with_tensors else 0):
            raise ProtocolError(f"expected a range for each tensor, found {len(request.ranges)}")
        for member in request.cohort:
            member.check(rounds.roster, request.campaign)
        context = context_of(request, received.num_numbers if with_tensors else 0, envelope.sha256)
        rounds.check_round(request.round_id, rounds.store.private_key(request.campaign), request.cohort)
        audited = rounds.check_audits(request.campaign, request.audits)
        worked = work()
        weight, scalars = scalars_of(
            worked.metrics.get(request.weight_key), worked.metrics, request.metrics, request.max_weight, num_sites
        )
        vector = weighted_update(worked.before, worked.after, weight)
        if len(vector) != context.size:
            raise ProtocolError(f"expected tensors of {context.size} numbers, as they say, found {len(vector)}")
        grids = grids_for(worked.before, request.ranges, num_sites, request.ring_bits)
        rounding = Rounding(vector, grids)

        def fill(start: int, out: Vector) -> None:
            rounding(start, out)
            scalars[1] = rounding.num_clamped  # scalars are masked after the vector

        upload = rounds.upload(context, rounds.store.private_key(request.campaign), fill, scalars)
        reply = signed(rounds.identity, Masked(request_sha256=envelope.sha256), upload.to_arrays())
        with self.rounds.store.exclusive():
            rounds.note(audited)
            rounds.keep(context)
        return reply

    def _unmask(self, envelope: Envelope, request: MeanUnmaskRequest) -> Envelope:
        kept = self.rounds.store.find(request.round_id)
        if kept is None or kept.campaign != request.campaign:
            raise ProtocolError(f"expected a round of {request.campaign}, found none called {request.round_id} here")

        def sealed(pads: Bytes, answer: AnswerOfSite) -> bytes:
            reply = Unmasked(request_sha256=envelope.sha256, answer=answer)
            return signed(self.rounds.identity, reply, {"pads": pads}).to_bytes()

        key = self.rounds.store.private_key(request.campaign)
        return Envelope.from_bytes(self.rounds.unmask(request.round_id, key, request.alive, envelope.sha256, sealed))


@contextmanager
def open_mean_site(folder: Path, min_cohort: int, min_colluding: int) -> Iterator[MeanSite]:
    """Open the site in ``folder``: its identity, roster and rounds; its name is the one that the roster gives its key.

    Raises:
        SiteConfigError: a file is missing or malformed, or the roster does not list this site's key.
        LedgerError: its rounds cannot be kept.
    """
    key = load_identity("this site", folder / IDENTITY_FILE)
    roster = load_roster(folder / ROSTER_FILE)
    name = next((name for name, public in roster.sites.items() if public == key.public_key_hex), None)
    if name is None:
        raise SiteConfigError(f"{folder / ROSTER_FILE} does not list the key in {IDENTITY_FILE}: ask for a new roster")
    with closing(RoundStore.open(folder / ROUNDS_FILE)) as store:
        rounds = SecureRounds(Identity(name, key.private_key), roster, store, min_cohort)
        yield MeanSite(rounds, min_colluding, local_log(name, folder))
