"""The site: `handle(request) -> reply`, whatever carries it: verify, admit, reserve, do, settle.

Covered:
    * a request is read only if the pinned operator signed it; a reply is signed by this site and names its request;
    * nothing is computed on records before the release is reserved in the ledger, and nothing leaves before it is settled;
    * a repeated request gets the same bytes; a known id with other content is refused;
    * whatever goes wrong, a fixed code leaves; the text stays in this site's log;
    * nothing is unmasked for a second list of survivors, nor after the operator failed to show what an earlier list was;
    * once a release is reserved, whether it fails does not depend on single records: a record whose gradient is not finite
      counts as zero, and heads that could make one overflow are refused before.
Not covered (yet):
    * sealing past the relay, human approval, a ledger head echoed by the operator.
"""

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

import urna
from urna.client import ballot, evaluation, training
from urna.client.config import DATA_KEY_FILE, LEDGER_FILE, SiteConfig, load_site_config
from urna.client.data import Records, buckets, load_records, split
from urna.client.ledger import CampaignRow, Ledger, Release
from urna.client.local_log import local_log
from urna.client.policy import Denial, admit_plan, admit_release
from urna.client.round_store import Audited
from urna.client.secure_rounds import SecureRounds, graph_nonce
from urna.models.catalogue import spec
from urna.models.loading import artefact_sha256, load_backbone
from urna.models.preflight import check_head
from urna.models.tuning import normalise_for_head, trainable_size
from urna.privacy.accounting import described, epsilon_of_rows
from urna.privacy.counts import CountLayout
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Integers
from urna.privacy.release import noisy_sum
from urna.privacy.ring import masked, numbers_of
from urna.privacy.secure_sum import Bytes, check_cohort, context_of, named_segments
from urna.protocol.errors import (
    AuditError,
    FailureCode,
    LedgerError,
    ModelError,
    NonFiniteError,
    PlanError,
    ProtocolError,
    ReplayError,
    RollbackError,
    SiteConfigError,
    UrnaError,
)
from urna.protocol.identity import (
    IDENTITY_FILE,
    OPERATOR,
    ROSTER_FILE,
    Identity,
    Roster,
    create_identity,
    load_identity,
    load_roster,
)
from urna.protocol.messages import (
    AbortRequest,
    AnswerOfSite,
    BallotRequest,
    Burnt,
    CloseRequest,
    Envelope,
    EvaluateRequest,
    Failure,
    HelloReply,
    HelloRequest,
    Masked,
    Member,
    Refusal,
    SetupReply,
    SetupRequest,
    Stage,
    Statement,
    Summed,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    open_request,
    signed,
)
from urna.protocol.plan import Name, Plan
from urna.protocol.quorum import Quorum

HEAD_LIMIT = 1e4  # of a head's numbers: no record's gradient can overflow at such a head
Features = npt.NDArray[np.float32]


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
    _records: dict[float, tuple[Records, Records]] = field(default_factory=dict)
    _features: dict[tuple[str, float], tuple[Features, Features]] = field(default_factory=dict)

    def handle(self, request: Envelope) -> Envelope:
        """Answer one request; never raises, and answers a fixed code when something is wrong."""
        try:
            return self._answer(request)
        except Exception as error:  # the edge: whatever happened, only a code leaves
            code = failure_code(error)
            self.log.exception("request failed with code %s", code)
            return signed(self.identity, Failure(request_sha256=request.sha256, code=code))

    def _answer(self, envelope: Envelope) -> Envelope:
        request = open_request(envelope, self.roster, OPERATOR)
        if isinstance(request, HelloRequest):
            return self._hello(envelope, request)
        kept = self.ledger.campaign(request.campaign)
        if kept is None:
            raise ProtocolError(f"campaign {request.campaign} was never opened here")
        plan = Plan.model_validate_json(kept.plan_json)
        if plan.sha256 != request.plan_sha256:
            raise ProtocolError(f"campaign {request.campaign} was opened with another plan")
        if isinstance(request, UnmaskRequest | AbortRequest):
            found = self.ledger.rounds.find(request.round_id)
            if found is not None and found.campaign != request.campaign:
                raise ProtocolError(f"expected a round of {request.campaign}, found one of {found.campaign}")
        match request:
            case CloseRequest():
                return self._statement(envelope, request, plan)
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
        if known is not None and known.request_sha256 == envelope.sha256:
            return Envelope.from_bytes(known.reply)
        plan = Plan.model_validate_json(request.plan_json)
        if plan.sha256 != request.plan_sha256:
            raise ProtocolError("the plan and its hash differ")
        verdict = admit_plan(self.config.policy, plan, self.ledger.rows())
        denied = verdict.reasons if isinstance(verdict, Denial) else ()
        reasons = (*denied, *self._other_split(plan), *self._unfit(plan, request.models))
        if reasons:
            self.log.warning("refused campaign %s: %s", request.campaign, "; ".join(reasons))
            return signed(self.identity, Refusal(request_sha256=envelope.sha256, reasons=reasons))
        key = X25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw().hex()
        commitment = hashlib.sha256(bytes.fromhex(graph_nonce(key))).hexdigest()
        member = Member.create(self.identity, request.campaign, public, self.config.data.num_records, commitment)
        hello = HelloReply(request_sha256=envelope.sha256, urna_version=urna.__version__, member=member)
        reply = signed(self.identity, hello)
        row = CampaignRow(
            campaign=request.campaign,
            request_sha256=envelope.sha256,
            plan_json=plan.model_dump_json(),  # defaults included
            models=dict(request.models),
            round_key=key.private_bytes_raw(),
            reply=reply.to_bytes(),
            graph_commitment=request.graph_commitment,
        )
        return Envelope.from_bytes(self.ledger.join(row).reply)

    def _unfit(self, plan: Plan, models: dict[str, str]) -> tuple[str, ...]:
        """What this installation lacks for the plan, beside its policy."""
        reasons = []
        if plan.task.num_classes != self.config.data.num_classes:
            reasons.append(f"task: this site's records have {self.config.data.num_classes} classes")
        for entry in plan.candidates:
            try:
                found = artefact_sha256(entry.name)
                if found != models.get(entry.name) or entry.sha256 not in (None, found):
                    reasons.append(f"model {entry.name}: other weights are installed here than the operator pinned")
            except ModelError:
                reasons.append(f"model {entry.name}: not installed at this site")
        return tuple(reasons)

    def _other_split(self, plan: Plan) -> tuple[str, ...]:
        """Why this plan may not move records between the partitions: whoever changed sides would be charged for one only."""
        asked = plan.evaluation.holdout_fraction
        others = sorted(self.ledger.holdout_fractions() - {asked})
        return tuple(f"holdout: the plan holds out {asked:g} of the records, this site's releases {one:g}" for one in others)

    def _release(self, envelope: Envelope, request: Summed, plan: Plan, kept: CampaignRow) -> Envelope:
        known = self.ledger.find(request.request_id, envelope.sha256)
        if isinstance(known, bytes):
            return Envelope.from_bytes(known)
        shown = self._check(envelope, request, plan, kept)
        if known is None:
            reasons = self._reserve(envelope, request, plan)
            if reasons:
                self.log.warning("refused %s: %s", request.request_id, "; ".join(reasons))
                return signed(self.identity, Refusal(request_sha256=envelope.sha256, reasons=reasons))
        grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
        numbers = grid.to_ring(self._compute(envelope, request, plan, kept, grid))
        said = Masked(request_sha256=envelope.sha256)
        if not plan.federation.secure_sum:  # the policy allows it, and the release is private by itself
            reply = signed(self.identity, said, named_segments(masked(numbers_of(numbers), len(numbers), grid.ring, [])))
            self.ledger.settle(request.request_id, reply.to_bytes())
            return reply
        context = context_of(request, plan, len(numbers), envelope.sha256)
        secure = self._secure(plan)
        upload = secure.upload(context, _round_key(kept), numbers_of(numbers))
        reply = signed(self.identity, said, upload.to_arrays())
        with self.ledger.exclusive():  # all of it is on disk, or nothing
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
        heads = _heads(request)
        asked = request.candidates if isinstance(request, BallotRequest) else tuple(heads.values())
        foreign = set(asked) - {entry.name for entry in plan.candidates}  # the policy allowed the plan's, no others
        if foreign:
            raise ProtocolError(f"expected candidates of the plan, found {', '.join(sorted(foreign))}")
        for name, candidate in heads.items():
            self._vector(envelope, name, candidate, plan)
        secure = self._secure(plan)
        if plan.federation.secure_sum:
            quorum = _quorum(plan, len(request.cohort))
            if quorum.min_survivors < self._min_cohort(plan):
                raise ProtocolError(f"expected sums of {self._min_cohort(plan)} survivors, found {quorum.min_survivors}")
            secure.check_graph(request, quorum, kept.graph_commitment)
            secure.check_round(request.request_id, _round_key(kept), request.cohort)
        return secure.check_audits(request.campaign, request.audits)

    def _reserve(self, envelope: Envelope, request: Summed, plan: Plan) -> tuple[str, ...]:
        """Write the reservation, or why not: decided and written while no other process of this site can spend."""
        partition, event, count = described(request, plan)
        release = Release(request.request_id, envelope.sha256, request.campaign, request.stage, partition, event, count)
        with self.ledger.exclusive():
            here, ever = self.ledger.rows(request.campaign), self.ledger.rows()
            denial = admit_release(self.config.policy, plan, release, request.planned_count * count, here, ever)
            reasons = (*(denial.reasons if denial else ()), *self._other_split(plan))
            if not reasons:
                self.ledger.reserve(release)
        return reasons

    def _min_cohort(self, plan: Plan) -> int:
        return max(plan.federation.min_sites, self.config.policy.min_cohort)

    def _compute(self, envelope: Envelope, request: Summed, plan: Plan, kept: CampaignRow, grid: Grid) -> Integers:
        """The site's summand, in grid units, its share of the noise included."""
        parties = plan.noise_parties(len(request.cohort))
        nm = request.noise_multiplier
        match request:
            case BallotRequest():
                rows = self._votes(request, plan, kept)
                return noisy_sum(rows, plan.ballot.clip, nm, grid, num_noise_parties=parties, sensitivity_clips=2)
            case TrainRequest():
                return self._train(envelope, request, plan, kept, grid, parties)
            case EvaluateRequest():
                layout = CountLayout(len(request.candidates), plan.task.num_classes if request.detail else 0)
                features = [normalise_for_head(self._both(name, plan, kept)[1]) for name in request.candidates]
                vectors = [self._vector(envelope, name, one, plan) for name, one in _heads(request).items()]
                held = self.split_records(plan.evaluation.holdout_fraction)[1]
                rows = evaluation.count_rows(features, vectors, held.labels, layout)
                return noisy_sum(rows, 1.0, nm, grid, num_noise_parties=parties)
        raise ProtocolError(f"no work is known for a {type(request).__name__}")

    def _votes(self, request: BallotRequest, plan: Plan, kept: CampaignRow) -> npt.NDArray[np.float64]:
        tuning = self.split_records(plan.evaluation.holdout_fraction)[0]
        count = plan.num_buckets(self.config.data.num_records)
        features = [self._both(name, plan, kept)[0] for name in request.candidates]
        return ballot.votes(features, tuning.labels, buckets(tuning, self.data_key, count), count)

    def _train(
        self, envelope: Envelope, request: TrainRequest, plan: Plan, kept: CampaignRow, grid: Grid, parties: int
    ) -> Integers:
        check_head(spec(request.candidate).feature_dim, plan.task.num_classes, seed=0)
        tuning = self.split_records(plan.evaluation.holdout_fraction)[0]
        data = training.TuningSet(normalise_for_head(self._both(request.candidate, plan, kept)[0]), tuning.labels)
        vector = self._vector(envelope, "vector", request.candidate, plan)
        if plan.privacy.noise == "shared":
            return training.shared_step(data, vector, plan, request.noise_multiplier, grid, parties)
        declared = {member.site: member.num_records for member in request.cohort}
        own = declared[self.identity.name]
        batch = plan.final.sample_rate * own * (1 - plan.evaluation.holdout_fraction)
        change = training.local_steps(data, vector, plan, request.noise_multiplier, batch)
        return grid.quantise(change * (own / sum(declared.values())))

    def _vector(self, envelope: Envelope, name: str, candidate: str, plan: Plan) -> npt.NDArray[np.float32]:
        vector = envelope.arrays.get(name)
        size = trainable_size(spec(candidate).feature_dim, plan.task.num_classes)
        if vector is None or vector.shape != (size,) or vector.dtype != np.float32:
            raise ProtocolError(f"expected a float32 head ({size},) in array {name!r}")
        if not (np.abs(vector) <= HEAD_LIMIT).all():  # false for NaN too
            raise ProtocolError(f"expected a head of numbers up to {HEAD_LIMIT:g}, found larger ones or NaN")
        return np.asarray(vector, dtype=np.float32)

    def split_records(self, fraction: float) -> tuple[Records, Records]:
        """Tuning and held-out records, read once."""
        if fraction not in self._records:
            self._records[fraction] = split(load_records(self.folder, self.config.data), self.data_key, fraction)
        return self._records[fraction]

    def _both(self, candidate: str, plan: Plan, kept: CampaignRow) -> tuple[Features, Features]:
        """Frozen features of the tuning and held-out records, computed once."""
        key = (kept.models[candidate], plan.evaluation.holdout_fraction)
        if key not in self._features:
            backbone = load_backbone(candidate, expected_sha256=kept.models[candidate])
            tuning, held = self.split_records(plan.evaluation.holdout_fraction)
            self._features[key] = (backbone.features(tuning.images), backbone.features(held.images))
        return self._features[key]

    def _statement(self, envelope: Envelope, request: CloseRequest, plan: Plan) -> Envelope:
        secure = self._secure(plan)
        secure.note(secure.check_audits(request.campaign, request.audits))
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


def _heads(request: Summed) -> dict[str, Name]:
    """The arrays that a request brings: the name of each, and the candidate whose head it is."""
    match request:
        case TrainRequest():
            return {"vector": request.candidate}
        case EvaluateRequest():
            return {f"vector-{at}": name for at, name in enumerate(request.candidates)}
    return {}


def _quorum(plan: Plan, num_sites: int) -> Quorum:
    try:
        return plan.quorum(num_sites)
    except ValueError as error:
        raise ProtocolError(str(error)) from None


def _round_key(kept: CampaignRow) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(kept.round_key)


def failure_code(error: Exception) -> FailureCode:
    """The fixed code of an exception; the first match counts."""
    table: list[tuple[type[Exception], FailureCode]] = [
        (RollbackError, FailureCode.ROLLBACK),
        (LedgerError, FailureCode.LEDGER),
        (SiteConfigError, FailureCode.DATA),
        (ModelError, FailureCode.MODEL),
        (ReplayError, FailureCode.REPLAY_CHANGED),
        (AuditError, FailureCode.AUDIT),
        (NonFiniteError, FailureCode.NUMERIC),
        (PlanError, FailureCode.BAD_REQUEST),
        (ProtocolError, FailureCode.BAD_REQUEST),
        (ValidationError, FailureCode.BAD_REQUEST),
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
        ledger=Ledger.open(folder / LEDGER_FILE),
        data_key=load_data_key(folder),
        folder=folder,
        log=local_log(config.name, folder),
    )


def load_data_key(folder: Path) -> bytes:
    """Read the key of the records' split and buckets.

    Raises:
        SiteConfigError: missing, or not 32 bytes.
    """
    path = folder / DATA_KEY_FILE
    if not path.is_file() or path.stat().st_size != 32:
        raise SiteConfigError(f"expected the site's data key (32 bytes) at {path}: restore it, a new one moves records")
    return path.read_bytes()


def create_keys(folder: Path, name: str) -> Identity:
    """Make a site's identity, data key and empty ledger: once, at its own machine.

    Raises:
        SiteConfigError: there are some already.
        LedgerError: there is a ledger already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = create_identity(name, folder / IDENTITY_FILE)
    descriptor = os.open(folder / DATA_KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(32))
    Ledger.create(folder / LEDGER_FILE).close()
    return identity
