"""The site: `handle(request) -> reply`, whatever carries it: verify, admit, reserve, do, settle.

`receive` is the edge around it: it opens a sealed parcel, compares the ledger head that the operator was last shown with this
ledger, and seals the answer with the new head.

Covered:
    * a request is read only if the pinned operator signed it; a reply is signed by this site and names its request;
    * nothing that leaves is computed before it is reserved in the ledger (until then records are only read and hashed, to
      know whose budget it is), and nothing leaves before it is settled;
    * a repeated request gets the same bytes; a known id with other content is refused, and so is a new release after a close;
    * a campaign that needs a person's yes waits for it, without keeping anybody else waiting; a pause, a no or a policy that
      was made stricter stops every release that was not settled before;
    * whatever goes wrong, a fixed code leaves; the text stays in this site's log;
    * a candidate that is not here, or not the one that the hello pinned, costs nothing: it is refused, or delivered first;
      nor does one whose weights are damaged, or that no engine can train: it is loaded and tried before the reservation;
    * nothing is unmasked for a second list of survivors, nor after the operator failed to show what an earlier list was;
    * once a release is reserved, whether it fails does not depend on single records: a record whose gradient is not finite
      counts as zero, and heads that could make one overflow are refused before.
Not covered:
    * bytes that were settled before a pause or a no, and never arrived: they are sent when they are asked for again;
    * how long an answer takes, and how large it is, can be seen by the relay.
"""

import hashlib
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

import urna
from urna.client.config import SiteConfig, Vault, load_site_config
from urna.client.dataset import DatasetConfig
from urna.client.delivery import Delivery, forget, is_absent, is_intact, piece_of
from urna.client.file_lock import FileLock
from urna.client.ledger import Ledger
from urna.client.ledger_rows import CampaignRow, Release, Waiting
from urna.client.local_log import Event, local_log, write
from urna.client.policy import Denial, admit_plan, admit_release, missing_peers
from urna.client.round_store import Audited
from urna.client.secure_rounds import SecureRounds, graph_nonce
from urna.client.vault import load_data_key, open_ledger
from urna.client.work import Workbench, check_grid, head_of, heads_of
from urna.models.catalogue import spec
from urna.privacy.accounting import described, epsilon_of_rows
from urna.privacy.fixed_point import Grid
from urna.privacy.ring import masked, numbers_of
from urna.privacy.secure_sum import Bytes, check_cohort, context_of, named_segments
from urna.protocol.errors import (
    AuditError,
    FailureCode,
    LedgerError,
    ModelError,
    NonFiniteError,
    PausedError,
    PlanError,
    ProtocolError,
    ReplayError,
    RollbackError,
    SiteConfigError,
    StaleError,
    UrnaError,
)
from urna.protocol.identity import IDENTITY_FILE, OPERATOR, ROSTER_FILE, Identity, Roster, load_identity, load_roster
from urna.protocol.messages import (
    AbortRequest,
    AnswerOfSite,
    BallotRequest,
    Burnt,
    CloseRequest,
    Envelope,
    EvaluateRequest,
    Failure,
    Head,
    HelloReply,
    HelloRequest,
    Masked,
    Member,
    Pending,
    Refusal,
    Request,
    SetupReply,
    SetupRequest,
    SpentRow,
    Stage,
    Statement,
    Summed,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    WeightsReply,
    WeightsRequest,
    open_request,
    signed,
)
from urna.protocol.plan import Plan
from urna.protocol.quorum import Quorum
from urna.protocol.sealing import Parcel, seal, unseal

MAX_BUNDLES = 1000  # that the ledger remembers
NOT_INSTALLED = (
    "not installed here, and policy.accept_weights is off: run `urna models pretrain` or `urna models add`, or allow delivery"
)
REASON_LIMIT, REASONS_LIMIT = 1000, 100  # what a `Refusal` carries: characters of one, and how many


@dataclass
class Site:
    """A data holder. Open it with `open_site`; it keeps records and features in memory between requests."""

    config: SiteConfig
    identity: Identity
    roster: Roster
    ledger: Ledger
    data_key: bytes
    folder: Path
    log: logging.Logger
    work: str = ""  # the request that is computed for at this moment
    _lock: FileLock | None = None
    _benches: dict[str, Workbench] = field(default_factory=dict)

    def receive(self, parcel: Parcel) -> Parcel:
        """Open, compare the echoed ledger head, answer, seal with the new head; never raises: a fixed code leaves."""
        asked = parcel.sha256  # what a failure names until the request in it is known
        try:
            request, echoed = unseal(self.identity, self.roster, parcel, sender=OPERATOR)
            asked = request.sha256
            if echoed is not None:
                self._check_echo(echoed)
            reply = self.handle(request)
            head = Head.create(self.identity, self.ledger.id, *self.ledger.head())
            return seal(self.identity, self.roster, reply, {OPERATOR: head}, answers=parcel.sha256)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # the edge, as in `handle`
            code = failure_code(error)
            write(self.log, Event.REQUEST_FAILED, "a parcel", level=logging.ERROR, code=code, error=error)
            failure = signed(self.identity, Failure(request_sha256=asked, code=code))
            return seal(self.identity, self.roster, failure, {OPERATOR: None}, answers=parcel.sha256)

    def _check_echo(self, head: Head) -> None:
        """Whether the ledger still holds what it last showed the operator."""
        if head.site != self.identity.name:
            raise ProtocolError(f"expected a ledger head of {self.identity.name}, found one of {head.site}")
        head.check(self.roster)
        if head.ledger != self.ledger.id:  # this site had another vault once; that is no reason to stop this one for ever
            raise RollbackError("expected a head of this ledger, found one of another: was the vault exchanged?")
        self.ledger.check_head(head.seq, head.link)

    def handle(self, request: Envelope) -> Envelope:
        """Answer one request; never raises, and answers a fixed code when something is wrong."""
        try:
            return self._answer(request)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # the edge: whatever happened, a library's panic too, only a code leaves
            code = failure_code(error)
            write(self.log, Event.REQUEST_FAILED, "a request", level=logging.ERROR, code=code, error=error)
            return signed(self.identity, Failure(request_sha256=request.sha256, code=code))

    def _answer(self, envelope: Envelope) -> Envelope:
        request = open_request(envelope, self.roster, OPERATOR)
        ids = [request.request_id, *([request.round_id] if isinstance(request, UnmaskRequest | AbortRequest) else [])]
        if not all(one.startswith(f"{request.campaign}/") for one in ids):  # ids of one campaign never meet another's
            raise ProtocolError(f"expected ids that begin with {request.campaign}/, found {' and '.join(ids)}")
        if isinstance(request, HelloRequest):
            return self._hello(envelope, request)
        kept = self.ledger.campaign(request.campaign)
        if kept is None or kept.site != self.identity.public_key_hex:
            raise ProtocolError(f"campaign {request.campaign} was never opened here")
        plan = Plan.model_validate_json(kept.plan_json)
        if plan.sha256 != request.plan_sha256:
            raise ProtocolError(f"campaign {request.campaign} was opened with another plan")
        match request:
            case CloseRequest():
                return self._statement(envelope, request, plan, kept)
            case WeightsRequest():
                return self._weights(envelope, request, plan, kept)
            case SetupRequest():
                return self._setup(envelope, request, plan, kept)
            case UnmaskRequest():
                return self._unmask(envelope, request, plan, kept)
            case AbortRequest():
                answer = self._secure(plan).burn(request.campaign, request.round_id)
                return signed(self.identity, Burnt(request_sha256=envelope.sha256, answer=answer))
        return self._release(envelope, request, plan, kept)

    def _hello(self, envelope: Envelope, request: HelloRequest) -> Envelope:
        known = self.ledger.campaign(request.campaign)
        if known is not None and known.request_sha256 == envelope.sha256 and known.site == self.identity.public_key_hex:
            return Envelope.from_bytes(known.reply)
        plan = Plan.model_validate_json(request.plan_json)
        if plan.sha256 != request.plan_sha256:
            raise ProtocolError("the plan and its hash differ")
        if not request.models.keys() <= {entry.name for entry in plan.candidates}:
            raise ProtocolError("expected hashes of the plan's candidates, found others too")
        dataset = self.config.dataset_for(plan)
        number = None if dataset is None else self._registered(dataset)
        reasons = (*self._barred(plan, self.ledger.rows(dataset=number)), *self._other_split(plan))
        reasons += self._unfit(plan, request.models) + self._denied(request.campaign, plan)
        if dataset is None or number is None:
            asked = plan.task.dataset or f"{plan.task.modality}s of {plan.task.num_classes} classes"
            reasons += (f"task: this site has no records of {asked}",)
            return self._refused(envelope, request, reasons)
        if reasons:
            return self._refused(envelope, request, reasons)
        if not self._approved(envelope, request, plan) or self.is_paused:  # in this order: people see what waits behind a pause
            write(self.log, Event.CAMPAIGN_WAITS, campaign=request.campaign)
            return signed(self.identity, Pending(request_sha256=envelope.sha256))
        key = X25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw().hex()
        commitment = hashlib.sha256(bytes.fromhex(graph_nonce(key))).hexdigest()
        member = Member.create(self.identity, request.campaign, public, dataset.num_records, commitment)
        lacks = tuple(entry.name for entry in plan.candidates if is_absent(entry.name))
        hello = HelloReply(request_sha256=envelope.sha256, urna_version=urna.__version__, member=member, lacks=lacks)
        reply = signed(self.identity, hello)
        row = CampaignRow(
            campaign=request.campaign,
            request_sha256=envelope.sha256,
            plan_json=plan.model_dump_json(),  # defaults included
            models=dict(request.models),
            round_key=key.private_bytes_raw(),
            reply=reply.to_bytes(),
            graph_commitment=request.graph_commitment,
            site=self.identity.public_key_hex,
            dataset=number,
        )
        joined = self.ledger.join(row)
        write(self.log, Event.CAMPAIGN_OPENED, campaign=request.campaign)
        return Envelope.from_bytes(joined.reply)

    def _barred(self, plan: Plan, spent: tuple[SpentRow, ...]) -> tuple[str, ...]:
        """What the policy says against a plan."""
        names, licences = {entry.name for entry in plan.candidates}, {}
        for name in names:
            with suppress(ModelError):
                licences[name] = spec(name).licence
        unseen = names - set(licences) if self.config.policy.accept_weights else set[str]()
        verdict = admit_plan(self.config.policy, plan, spent, self.roster.operator, licences, unseen)
        return verdict.reasons if isinstance(verdict, Denial) else ()

    def _refused(self, envelope: Envelope, request: Request, reasons: tuple[str, ...]) -> Envelope:
        events: dict[type[Request], Event] = {HelloRequest: Event.CAMPAIGN_REFUSED, WeightsRequest: Event.WEIGHTS_REFUSED}
        event = events.get(type(request), Event.RELEASE_REFUSED)
        write(
            self.log,
            event,
            "; ".join(reasons),
            level=logging.WARNING,
            campaign=request.campaign,
            request_id=request.request_id,
            stage=request.stage,
        )
        told = tuple(reason if len(reason) <= REASON_LIMIT else f"{reason[: REASON_LIMIT - 3]}..." for reason in reasons)
        return signed(self.identity, Refusal(request_sha256=envelope.sha256, reasons=told[:REASONS_LIMIT]))

    def _unfit(self, plan: Plan, models: dict[str, str]) -> tuple[str, ...]:
        """What this installation lacks for the plan, beside its policy; what may still be delivered is no reason."""
        reasons = []
        for entry in plan.candidates:
            name, pinned = entry.name, models.get(entry.name)
            as_planned = pinned is not None and entry.sha256 in (None, pinned)
            if is_absent(name) and not self.config.policy.accept_weights:
                reasons.append(f"model {name}: {NOT_INSTALLED}")
            elif is_absent(name) and not as_planned:
                reasons.append(f"model {name}: the operator pinned no weights to deliver, or others than the plan")
            elif not is_absent(name) and not (as_planned and is_intact(name, pinned)):
                reasons.append(f"model {name}: other weights are installed here than the operator pinned")
        return tuple(reasons)

    def _weights(self, envelope: Envelope, request: WeightsRequest, plan: Plan, kept: CampaignRow) -> Envelope:
        """Take a piece of a candidate that this site lacked in its hello; it costs nothing and is no release."""
        lacks = HelloReply.model_validate_json(Envelope.from_bytes(kept.reply).body).lacks
        if request.candidate not in lacks or self.ledger.releases(request.campaign):
            raise ProtocolError(f"expected weights that this site lacks, before the first release; found {request.candidate}")
        part = piece_of(envelope, request)
        pinned = kept.models[request.candidate]
        delivery = Delivery(self.folder, request.candidate, pinned, self.config.policy, self.ledger)
        reasons = self._check_open(request.campaign, plan) or delivery.denied(request)
        if reasons:
            return self._refused(envelope, request, reasons)
        was_here = is_intact(request.candidate, pinned)
        held = delivery.take(request, part)
        if request.offset == 0 or (held.complete and not was_here):
            event = Event.WEIGHTS_INSTALLED if held.complete else Event.WEIGHTS_BEGUN
            detail = f"{request.candidate} {pinned}, {request.file} of {request.size} bytes"
            write(self.log, event, detail, campaign=request.campaign, request_id=request.request_id)
        return signed(
            self.identity, WeightsReply(request_sha256=envelope.sha256, received=held.received, complete=held.complete)
        )

    def _other_split(self, plan: Plan) -> tuple[str, ...]:
        """Why this plan may not move records between the partitions: whoever changed sides would be charged for one only."""
        asked = plan.evaluation.holdout_fraction
        others = sorted(self.ledger.holdout_fractions() - {asked})
        return tuple(f"holdout: the plan holds out {asked:g} of the records, this site's releases {one:g}" for one in others)

    # ---- what a person at the site decides

    @property
    def is_paused(self) -> bool:
        """Whether a person has stopped all releases."""
        last = self.ledger.noted("pause", "resume")
        return last is not None and last.event == "pause"

    def _denied(self, campaign: str, plan: Plan) -> tuple[str, ...]:
        last = self.ledger.noted("approve", "deny", subject=campaign)
        denied = last is not None and last.event == "deny" and last.detail.get("plan_sha256") == plan.sha256
        return ("approval: a person at this site said no",) if denied else ()

    def _approved(self, envelope: Envelope, request: HelloRequest, plan: Plan) -> bool:
        """Whether a person has said yes to this very plan, where the policy asks for one; if not, it waits for them."""
        if not self.config.policy.approval_required:
            return True
        last = self.ledger.noted("approve", "deny", subject=request.campaign)
        if last is not None and last.event == "approve" and last.detail.get("plan_sha256") == plan.sha256:
            return True
        self.ledger.wait(Waiting(request.campaign, envelope.sha256, plan.model_dump_json()))
        return False

    def _check_open(self, campaign: str, plan: Plan) -> tuple[str, ...]:
        """Whether anything more may be released for a campaign; why a person says no.

        Raises:
            StaleError: it was closed.
            PausedError: a person has stopped all releases.
        """
        if self.ledger.noted("close", subject=campaign) is not None:
            raise StaleError(f"campaign {campaign} was closed here: nothing more is released for it")
        if self.is_paused:
            raise PausedError("a person at this site has paused it: `urna-site resume` lets it go on")
        return (*self._barred(plan, ()), *self._denied(campaign, plan))  # a policy may have been made stricter since the hello

    def _check_still_open(self, campaign: str, plan: Plan) -> None:
        """Whether a person said no, or the campaign ended, while a release was computed: it stays reserved, nothing leaves.

        Raises:
            StaleError, PausedError: see `_check_open`, or it was denied.
        """
        if self._check_open(campaign, plan):
            raise StaleError(f"campaign {campaign} was denied here: nothing more is released for it")

    # ---- releases

    def _release(self, envelope: Envelope, request: Summed, plan: Plan, kept: CampaignRow) -> Envelope:
        known = self.ledger.find(request.request_id, envelope.sha256)
        if isinstance(known, bytes):
            return Envelope.from_bytes(known)
        shown = self._check(envelope, request, plan, kept)
        reasons = self._check_open(request.campaign, plan)
        if known is None and not reasons:
            reasons = self._reserve(envelope, request, plan, kept)
        if reasons:
            return self._refused(envelope, request, reasons)
        bench = self.bench(self._dataset(plan))
        if known == "reserved" and self.ledger.reserved_for(request.request_id) != self._registered(bench.dataset):
            raise SiteConfigError(f"expected the records that {request.request_id} was charged to, found others: restore them")
        grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
        self.work = request.request_id
        try:
            numbers = grid.to_ring(bench.summand(envelope, request, plan, kept.models, self.identity.name))
        finally:
            self.work = ""
        said = Masked(request_sha256=envelope.sha256)
        if not plan.federation.secure_sum:  # the policy allows it, and the release is private by itself
            reply = signed(self.identity, said, named_segments(masked(numbers_of(numbers), len(numbers), grid.ring, [])))
            with self.ledger.exclusive():
                self._check_still_open(request.campaign, plan)
                self.ledger.settle(request.request_id, reply.to_bytes())
            return reply
        context = context_of(request, plan, len(numbers), envelope.sha256)
        secure = self._secure(plan)
        upload = secure.upload(context, _round_key(kept), numbers_of(numbers))
        reply = signed(self.identity, said, upload.to_arrays())
        with self.ledger.exclusive():  # all of it is on disk, or nothing
            self._check_still_open(request.campaign, plan)
            self.ledger.settle(request.request_id, reply.to_bytes())
            secure.keep(context)
            secure.note(shown)
        return reply

    def _setup(self, envelope: Envelope, request: SetupRequest, plan: Plan, kept: CampaignRow) -> Envelope:
        for member in request.cohort:
            member.check(self.roster, request.campaign)
        nonce = self._secure(plan).setup(request.campaign, _round_key(kept), request.cohort)
        return signed(self.identity, SetupReply(request_sha256=envelope.sha256, graph_nonce=nonce))

    def _unmask(self, envelope: Envelope, request: UnmaskRequest, plan: Plan, kept: CampaignRow) -> Envelope:
        alone = missing_peers(self.config.policy, request.alive)
        if alone is not None:
            return self._refused(envelope, request, alone.reasons)

        def sealed(pads: Bytes, answer: AnswerOfSite) -> bytes:
            return signed(self.identity, Unmasked(request_sha256=envelope.sha256, answer=answer), {"pads": pads}).to_bytes()

        reply = self._secure(plan).unmask(request.round_id, _round_key(kept), request.alive, envelope.sha256, sealed)
        return Envelope.from_bytes(reply)

    def _secure(self, plan: Plan) -> SecureRounds:
        aborts = self.config.policy.max_unproven_aborts
        return SecureRounds(self.identity, self.roster, self.ledger.rounds, self._min_cohort(plan), aborts)

    def _check(self, envelope: Envelope, request: Summed, plan: Plan, kept: CampaignRow) -> dict[str, Audited]:
        """Everything that can be wrong with a request by itself, before it costs anything.

        Returns:
            What it shows of earlier rounds.
        """
        own = _round_key(kept).public_key().public_bytes_raw().hex()
        if check_cohort(request.cohort, self._min_cohort(plan)).get(self.identity.name) != own:
            raise ProtocolError(f"expected {self.identity.name} with its own round key in the cohort, found another or none")
        for member in request.cohort:
            member.check(self.roster, request.campaign)
        plan.check_sizes([member.num_records for member in request.cohort])
        if request.planned_count > plan.max_planned_count:
            raise ProtocolError(f"expected at most {plan.max_planned_count} planned releases, found {request.planned_count}")
        if isinstance(request, TrainRequest):
            rounds = plan.num_runoff_rounds if request.stage == "runoff" else plan.final.num_rounds
            if request.index > rounds:  # its rate has no place in the plan's schedule
                raise ProtocolError(f"expected {request.stage} round {rounds} or an earlier one, found {request.index}")
        heads = heads_of(request)
        asked = request.candidates if isinstance(request, BallotRequest) else tuple(heads.values())
        foreign = set(asked) - {entry.name for entry in plan.candidates}  # the policy allowed the plan's, no others
        if foreign:
            raise ProtocolError(f"expected candidates of the plan, found {', '.join(sorted(foreign))}")
        for name in asked:  # before it is reserved: what cannot be computed must cost nothing
            if not is_intact(name, kept.models[name]):
                raise ModelError(f"expected {name} as the hello pinned it, found none or another: install or deliver it")
        for name, candidate in heads.items():
            head_of(envelope, name, candidate, plan)
        if isinstance(request, EvaluateRequest) and request.detail and not plan.evaluation.confusion:
            raise ProtocolError("expected counts without a confusion matrix, as the plan says; found a request for one")
        check_grid(request, plan)
        secure = self._secure(plan)
        if plan.federation.secure_sum:
            quorum = _quorum(plan, len(request.cohort))
            if quorum.min_survivors < self._min_cohort(plan):
                raise ProtocolError(f"expected sums of {self._min_cohort(plan)} survivors, found {quorum.min_survivors}")
            secure.check_graph(request, quorum, kept.graph_commitment)
            secure.check_round(request.request_id, _round_key(kept), request.cohort)
        return secure.check_audits(request.campaign, request.audits)

    def _reserve(self, envelope: Envelope, request: Summed, plan: Plan, kept: CampaignRow) -> tuple[str, ...]:
        """Write the reservation, or why not: decided and written while no other process of this site can spend.

        Raises:
            ModelError: a candidate's weights are damaged, or no engine serves it; nothing is reserved.
        """
        partition, event, count = described(request, plan)
        number = self._registered(self._dataset(plan))
        release = Release(request.request_id, envelope.sha256, request.campaign, request.stage, partition, event, count, number)
        planned = request.planned_count * count
        members = [member.site for member in request.cohort]
        reasons = self._against(release, planned, members, plan)  # accounting may take seconds: not while others are kept out
        if reasons:
            return reasons
        self.bench(self._dataset(plan)).ready(request, plan, kept.models)  # what cannot be computed must cost nothing
        with self.ledger.exclusive():
            reasons = self._check_open(request.campaign, plan) or self._against(release, planned, members, plan)
            if not reasons:
                self.ledger.reserve(release)
        return reasons

    def _against(self, release: Release, planned: int, members: list[str], plan: Plan) -> tuple[str, ...]:
        """What policy and ledger say against a release."""
        here, ever = self.ledger.rows(release.campaign), self.ledger.rows(dataset=release.dataset)
        denial = admit_release(self.config.policy, plan, release, planned, here, ever)
        denials = [one for one in (denial, missing_peers(self.config.policy, members)) if one is not None]
        return (*(reason for one in denials for reason in one.reasons), *self._other_split(plan))

    def _min_cohort(self, plan: Plan) -> int:
        return max(plan.federation.min_sites, self.config.policy.min_cohort)

    def _dataset(self, plan: Plan) -> DatasetConfig:
        found = self.config.dataset_for(plan)
        if found is None:
            raise SiteConfigError(
                "expected the records that this campaign was joined with, found none in site.toml: restore them"
            )
        return found

    def bench(self, dataset: DatasetConfig) -> Workbench:
        """The open records of one of this site's data sets."""
        bench = Workbench(self.folder, dataset, self.data_key, self.config.compute, self.log)
        return self._benches.setdefault(dataset.name, bench)

    def _registered(self, dataset: DatasetConfig) -> int:
        """The records' number in the ledger: by what they are, not by what they are called."""
        return self.ledger.register(dataset.name, self.bench(dataset).sketch())

    def _statement(self, envelope: Envelope, request: CloseRequest, plan: Plan, kept: CampaignRow) -> Envelope:
        secure = self._secure(plan)
        secure.note(secure.check_audits(request.campaign, request.audits))
        if self.ledger.noted("close", subject=request.campaign) is None:
            self.ledger.note("close", request.campaign, plan_sha256=plan.sha256)
        forget(self.folder, kept.models.values())  # what was begun of them, and will not go on
        rows = self.ledger.rows(request.campaign)
        delta = plan.privacy.delta
        stages: list[Stage] = list(dict.fromkeys(row.stage for row in rows))
        by_stage = {stage: epsilon_of_rows((row for row in rows if row.stage == stage), delta) for stage in stages}
        statement = Statement(
            request_sha256=envelope.sha256,
            rows=rows,
            epsilon_by_stage=by_stage,
            epsilon=epsilon_of_rows(rows, delta),
            delta=delta,
        )
        return signed(self.identity, statement)

    def saw_bundle(self, sha256: str, run_id: int) -> None:
        """Record an app bundle that a run came with; none is ever run here. Whoever sends thousands fills no disk."""
        seen = self.ledger.all_noted("bundle")
        if len(seen) < MAX_BUNDLES and sha256 not in {one.subject for one in seen}:
            self.ledger.note("bundle", sha256, run=str(run_id))

    def hold(self) -> None:
        """Keep every other process of this node from spending, until `close`; nodes that share a vault take turns.

        Raises:
            LedgerError: another process has it now.
        """
        if self.config.vault == Vault(anchor=self.config.vault.anchor):
            self.ledger.hold()
        else:
            self._lock = FileLock(self.folder / "node.lock")
            self._lock.acquire(0)

    def close(self) -> None:
        """Close the ledger, and let others use it."""
        self.ledger.close()
        if self._lock is not None:
            self._lock.drop()


def _quorum(plan: Plan, num_sites: int) -> Quorum:
    try:
        return plan.quorum(num_sites)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _round_key(kept: CampaignRow) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(kept.round_key)


def failure_code(error: BaseException) -> FailureCode:
    """The fixed code of an exception; the first match counts."""
    table: list[tuple[type[Exception], FailureCode]] = [
        (RollbackError, FailureCode.ROLLBACK),
        (LedgerError, FailureCode.LEDGER),
        (SiteConfigError, FailureCode.DATA),
        (ModelError, FailureCode.MODEL),
        (ReplayError, FailureCode.REPLAY_CHANGED),
        (StaleError, FailureCode.STALE),
        (AuditError, FailureCode.AUDIT),
        (NonFiniteError, FailureCode.NUMERIC),
        (PlanError, FailureCode.BAD_REQUEST),
        (ProtocolError, FailureCode.BAD_REQUEST),
        (ValidationError, FailureCode.BAD_REQUEST),
        (PausedError, FailureCode.PAUSED),
        (UrnaError, FailureCode.INTERNAL),
        (ArithmeticError, FailureCode.NUMERIC),
    ]
    return next((code for kind, code in table if isinstance(error, kind)), FailureCode.INTERNAL)


def open_site(folder: Path) -> Site:
    """Open a site's folder.

    Raises:
        SiteConfigError: it is not a site's folder, or a part of it is wrong.
        LedgerError: the ledger is missing or altered.
    """
    config = load_site_config(folder)
    return Site(
        config=config,
        identity=load_identity(config.name, folder / IDENTITY_FILE),
        roster=load_roster(folder / ROSTER_FILE),
        ledger=open_ledger(folder, config.vault),
        data_key=load_data_key(folder, config.vault),
        folder=folder,
        log=local_log(config.name, folder),
    )
