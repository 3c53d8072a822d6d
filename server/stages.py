"""How each stage of a campaign asks the sites: builds its request, sizes its grid, reads its sum.

Everything is recorded in the journal under the stage's key; asking again gives back what was recorded.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from urna.models.loading import artefact_sha256
from urna.models.sizes import trained_size_of
from urna.privacy.accounting import described, epsilon_of, epsilon_of_rows
from urna.privacy.counts import CountLayout, Counts
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats
from urna.protocol.errors import PlanError, ProtocolError, RefusedError, RoundError
from urna.protocol.messages import (
    PARTITIONS,
    AnyArray,
    AnyReply,
    BallotRequest,
    CloseRequest,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Member,
    Partition,
    SetupRequest,
    Stage,
    Statement,
    Summed,
    TrainRequest,
)
from urna.protocol.plan import Plan
from urna.server.journal import Journal, Json
from urna.server.rounds import Ask, Combine, Opening, Outcome, Rounds
from urna.strategies import ballot
from urna.strategies.aggregation import OptimizerState, apply, combine
from urna.strategies.budget import final_counts_noise_multiplier
from urna.strategies.sizing import ballot_grid, count_grid, train_grid

log = logging.getLogger(__name__)


@dataclass
class Stages:
    """Asks for one plan under one campaign id."""

    run_id: str
    plan: Plan
    journal: Journal
    rounds: Rounds
    _seen: int = 0
    _asked: dict[Partition, Counter[str]] = field(default_factory=lambda: {part: Counter() for part in PARTITIONS})

    def hello(self) -> None:
        """Open the campaign at every site within reach.

        Raises:
            RefusedError: fewer than the minimum joined, and a policy was among the reasons.
            RoundError: fewer than the minimum answered.
        """
        models = self.journal.once("models", self._pinned_models)
        fields = self._header("hello", "hello")
        commitment = hashlib.sha256(bytes.fromhex(self.rounds.graph_nonce)).hexdigest()
        plan_json = self.plan.model_dump_json()
        request = HelloRequest(**fields, plan_json=plan_json, models=models, graph_commitment=commitment)
        federation = self.plan.federation
        expected = federation.virtual.num_sites if federation.virtual else federation.min_sites
        begun = self.journal.find("hello") is not None  # then who takes part is fixed, and nobody else is waited for
        patience = 0.0 if begun else federation.approval_timeout_seconds
        members, others = self.rounds.hello(request, expected, self._doubt, patience)
        if len(members) < federation.min_sites:
            reasons = "; ".join(f"{site} {why}" for site, why in sorted(others.items())) or "nobody else answered"
            text = f"the plan needs {federation.min_sites} sites, found {len(members)}: {reasons}"
            raise RefusedError(text) if any(why.startswith("refused") for why in others.values()) else RoundError(text)
        try:
            self.plan.check_sizes([one.member.num_records for one in members.values()])
        except ProtocolError as error:
            raise RoundError(str(error)) from None
        if federation.secure_sum and not self.plan.quorum(len(members)).is_full:
            self.rounds.setup(SetupRequest(**self._header("hello", "setup"), cohort=self.rounds.members))
        self.journal.once("hello", lambda: {"members": _facts_of(members), "others": others})

    def _doubt(self, answer: HelloReply) -> str | None:
        """Why a site that says hello is no member: the first hello that found enough sites fixes who takes part."""
        opened = self.journal.find("hello")
        if opened is not None and answer.member.site not in opened.value["members"]:
            return "came after the campaign had begun"
        if answer.member.num_records > self.plan.federation.num_records:
            return f"declares {answer.member.num_records} records, more than the plan's {self.plan.federation.num_records}"
        return None

    def ballot(self, names: Sequence[str], multiplier: float) -> ballot.Ranking | None:
        """Votes over ``names``, in as many attempts as the plan pays for; None when all were lost."""
        clip = self.plan.ballot.clip
        self.rounds.everyone_back()
        for attempt in range(1, self.plan.ballot.max_attempts + 1):

            def ask(opening: Opening) -> tuple[Summed, Mapping[str, AnyArray]]:
                grid = ballot_grid(self.plan, opening.cohort, len(names), multiplier)
                fields = self._summed("ballot", opening, multiplier, grid, self.plan.ballot.max_attempts)
                return BallotRequest(**fields, candidates=tuple(names)), {}

            outcome = self._sum(f"ballot/{attempt}", "query.ballot", ask, len(names), {"attempt": attempt})
            if outcome.total is not None:
                std = self.noise_std(2 * clip, outcome)
                return ballot.rank(names, outcome.total, std, self._num_buckets(outcome.survivors))
        return None

    def train(
        self, stage: Stage, key: str, candidate: str, state: OptimizerState, index: int, multiplier: float, planned: int
    ) -> OptimizerState:
        """One DP training round; a lost round leaves the state as it was, and is not asked again."""
        final = self.plan.final
        shared = self.plan.privacy.noise == "shared"

        def ask(opening: Opening) -> tuple[Summed, Mapping[str, AnyArray]]:
            grid = train_grid(self.plan, opening.cohort, self._size(candidate), multiplier)
            fields = self._summed(stage, opening, multiplier, grid, planned)
            request = TrainRequest(**fields, candidate=candidate, index=index)
            return request, {"vector": state.vector.astype(np.float32)}

        facts = {"candidate": candidate, "index": index, "of": final.num_rounds}
        robust = None if final.aggregation == "mean" else self._robust
        outcome = self._sum(key, "train", ask, self._size(candidate), facts, robust)
        if outcome.total is None:
            return state
        if shared:
            return apply(state, outcome.total / self.plan.expected_batch, final, final.learning_rate_factor(index))
        return apply(state, -outcome.total * _share_of_survivors(outcome), final)  # the schedule was the sites'

    def count(
        self,
        key: str,
        attempt: int,
        models: Mapping[str, OptimizerState],
        multiplier: float,
        planned: int,
        *,
        detail: bool = False,
    ) -> Counts | None:
        """Noisy held-out counts of one or several candidates, tuned as far as they are.

        Args:
            key: what they are for; names the journal's entry.
            attempt: 1, 2, ...; each is a release of its own.
            models: candidates and their vectors.
            multiplier: noise of this attempt.
            planned: how many releases of this multiplier the campaign will ask for.
            detail: whether the confusion matrix leaves too.

        Returns:
            What can be read from the sum; None when the round was lost.
        """
        names = tuple(models)
        layout = CountLayout(len(names), self.plan.task.num_classes if detail else 0)
        vectors = {f"vector-{at}": state.vector.astype(np.float32) for at, state in enumerate(models.values())}

        def ask(opening: Opening) -> tuple[Summed, Mapping[str, AnyArray]]:
            grid = count_grid(self.plan, opening.cohort, layout.size, multiplier)
            fields = self._summed("evaluation", opening, multiplier, grid, planned)
            return EvaluateRequest(**fields, candidates=names, detail=detail), vectors

        facts = {"candidates": list(names), "purpose": key, "attempt": attempt}
        outcome = self._sum(f"evaluation/{key}/{attempt}", "evaluate", ask, layout.size, facts)
        if outcome.total is None:
            return None
        std = self.noise_std(1.0, outcome)
        counts = layout.decode(outcome.total, std, self.plan.num_heldout_records)
        self.journal.once(f"counts/{key}", lambda: _counts_json(names, counts))
        return counts

    def close(self) -> None:
        """Ask every site what its ledger says this campaign cost."""
        if self.journal.find("statements") is not None:
            return
        audits = self.rounds.unshown_audits(self.rounds.member_names)
        request = CloseRequest(**self._header("close", "close"), audits=audits)
        answers = self.rounds.ask_all("close", "query.close", request)
        statements = {site: answer.model_dump() for site, answer in sorted(answers.items()) if self._is_sound(answer)}
        self.journal.record("statements", statements)

    def _is_sound(self, answer: AnyReply) -> bool:
        """Whether a statement's epsilon is what its own rows cost, at the plan's delta."""
        if not isinstance(answer, Statement) or answer.delta != self.plan.privacy.delta:
            return False
        try:
            return math.isclose(answer.epsilon, epsilon_of_rows(answer.rows, answer.delta), rel_tol=1e-6)
        except ValueError:
            log.warning("a statement lists a release that this version cannot account for")
            return False

    def check_rings(self, names: Sequence[str], ballot_multiplier: float, training_multiplier: float) -> None:
        """Whether the sums to come fit into a ring, before anything is spent on one.

        Raises:
            PlanError: one does not.
        """
        cohort = self.rounds.members
        ballot_grid(self.plan, cohort, len(names), ballot_multiplier)
        for name in names:
            train_grid(self.plan, cohort, self._size(name), training_multiplier)
        counted = CountLayout(1, self.plan.task.num_classes).size
        count_grid(self.plan, cohort, counted, final_counts_noise_multiplier(self.plan, {}, last_attempt=True))

    def start(self, candidate: str) -> OptimizerState:
        """What every fine-tune of ``candidate`` starts from."""
        return OptimizerState.start(self._size(candidate))

    def asked_events(self, partition: Partition) -> Counter[str]:
        """Every event of the records ``partition`` that some site may have released so far, counted: all that were asked."""
        for entry in self.journal.entries(after=self._seen):
            self._seen = entry.seq
            if entry.kind == "round":
                self._asked[entry.value["partition"]][entry.value["event"]] += entry.value["count"]
        return Counter(self._asked[partition])

    def noise_std(self, sensitivity: float, outcome: Outcome) -> float:
        """Standard deviation of the noise on an opened sum: every survivor's share is in it, also the colluders'."""
        parties = self.plan.noise_parties(len(outcome.members))
        return outcome.noise_multiplier * sensitivity * math.sqrt(len(outcome.survivors) / parties)

    def _sum(self, key: str, route: str, ask: Ask, size: int, facts: Json, robust: Combine | None = None) -> Outcome:
        return self.rounds.secure_sum(key, route, ask, size, lambda request: self._cost(request) | facts, robust)

    def _robust(self, singles: Mapping[str, Floats], cohort: Sequence[Member]) -> Floats:
        """One change from single ones, as if it were the sum of the survivors' weighted ones."""
        declared = {one.site: one.num_records for one in cohort}
        whole = sum(declared.values())
        changes = {site: vector * whole / declared[site] for site, vector in singles.items()}
        return combine(changes, self.plan.final) * sum(declared[site] for site in singles) / whole

    def _cost(self, request: Summed) -> Json:
        """What this round brings the records it touches to, had every site answered every round."""
        partition, event, count = described(request, self.plan)
        events = self.asked_events(partition) + Counter({event: count})
        return {
            "stage": request.stage,
            "partition": partition,
            "event": event,
            "count": count,
            "noise_multiplier": request.noise_multiplier,
            "epsilon": epsilon_of(events, self.plan.privacy.delta),
        }

    def _header(self, stage: Stage, key: str) -> Json:
        return {
            "campaign": self.run_id,
            "plan_sha256": self.plan.sha256,
            "request_id": f"{self.run_id}/{key}",
            "stage": stage,
        }

    def _summed(self, stage: Stage, opening: Opening, multiplier: float, grid: Grid, planned: int) -> Json:
        return {
            **self._header(stage, opening.key),
            "cohort": opening.cohort,
            "noise_multiplier": multiplier,
            "step_exp": grid.step_exp,
            "ring_bits": grid.ring_bits,
            "planned_count": planned,
            "graph_nonce": opening.graph_nonce,
            "graph_nonces": opening.graph_nonces,
            "audits": opening.audits,
        }

    def _num_buckets(self, cohort: Sequence[Member]) -> int:
        return sum(self.plan.num_buckets(member.num_records) for member in cohort)

    def _size(self, candidate: str) -> int:
        final = self.plan.final
        return trained_size_of(candidate, self.plan.task.num_classes, final.tuning, final.lora_rank)

    def _pinned_models(self) -> Json:
        pinned = {}
        for entry in self.plan.candidates:
            found = artefact_sha256(entry.name)
            if entry.sha256 not in (None, found):
                raise PlanError(f"candidate {entry.name} is pinned to {entry.sha256}, found {found} installed: update one")
            pinned[entry.name] = found
        return pinned


def _share_of_survivors(outcome: Outcome) -> float:
    """What makes a sum of changes, weighted by declared parts of the cohort, a mean over those that are in it."""
    return sum(one.num_records for one in outcome.members) / sum(one.num_records for one in outcome.survivors)


def _facts_of(members: Mapping[str, HelloReply]) -> Json:
    return {
        name: {"num_records": members[name].member.num_records, "urna_version": members[name].urna_version}
        for name in sorted(members)
    }


def _counts_json(names: Sequence[str], counts: Counts) -> Json:
    def listed(values: Floats | None) -> object:
        return None if values is None else values.tolist()

    return {
        "candidates": list(names),
        "num_records": counts.num_records,
        "accuracy": listed(counts.accuracy),
        "accuracy_stderr": listed(counts.accuracy_stderr),
        "confusion": listed(counts.confusion),
        "confusion_noise_std": counts.confusion_noise_std,
    }
