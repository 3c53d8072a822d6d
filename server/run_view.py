"""The typed view of one run's journal that the metrics show: read a little at a time, and believed only as far as checked.

Covered: every entry that is used is checked against its fact below; names that become labels are the plan's candidates, the
members, or a code of a closed set; what is unknown is left out or called other.
Not covered: what the report wants besides (every text and number of a run, in its own words): see `report`.
"""

import re
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from urna.protocol.messages import Partition, Stage
from urna.protocol.plan import Name, Plan
from urna.server.journal import Entry, Journal, is_running

PURPOSE = re.compile(r"runoff|final|curve-[0-9]{1,5}")
STATES = ("running", "stopped", "finished")
ROUND_STAGES: tuple[Stage, ...] = ("ballot", "runoff", "final", "evaluation")
OUTCOMES = ("opened", "lost")
PARTITIONS: tuple[Partition, ...] = ("tuning", "heldout")
REASONS = ("silent", "undelivered", "refused", "failed", "not_believed", "other")

Fraction = Annotated[float, Field(allow_inf_nan=False)]


class Fact(BaseModel, frozen=True):
    """What a metric needs of a journal entry; entries say more, and newer ones may say more still."""


class RunFact(Fact):
    """How a run began."""

    plan: Plan
    engine: str
    started_at: Fraction


class HelloFact(Fact):
    """Who takes part; their declared sizes are left where they are."""

    members: dict[Name, object]


class RoundFact(Fact):
    """One round: ``epsilon`` is what the partition's records have spent with it, had every site answered every round."""

    stage: Stage
    partition: Partition
    cohort: tuple[Name, ...]
    dropped: dict[Name, str]
    opened: bool
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    epsilon: Annotated[float, Field(ge=0)]


class StandingFact(Fact):
    """One candidate's noisy score."""

    name: Name
    score: Fraction
    stderr: Fraction


class BallotFact(Fact):
    """The opened ballot; no standings when every attempt was lost."""

    standings: tuple[StandingFact, ...]
    undecided: bool


class ScheduleFact(Fact):
    """Who runs off, for how many rounds each."""

    finalists: tuple[Name, ...]
    runoff_rounds: int


class WinnerFact(Fact):
    """Which candidate is fine-tuned."""

    winner: Name


class CountsFact(Fact):
    """Noisy held-out accuracy, by candidate."""

    candidates: tuple[Name, ...]
    accuracy: tuple[Fraction, ...]
    accuracy_stderr: tuple[Fraction, ...]


class StatementFact(Fact):
    """What a site's ledger says this campaign cost its records."""

    epsilon: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Measured:
    """One noisy held-out accuracy."""

    purpose: str  # see `PURPOSE`
    candidate: str
    accuracy: float
    stderr: float


@dataclass
class RunView:
    """What has been read of one journal so far; `add` takes its entries in order."""

    name: str
    last_seq: int = 0
    last_at: float = 0.0
    running: bool = False
    run: RunFact | None = None
    starts: int = 0
    members: tuple[str, ...] = ()
    rounds: list[RoundFact] = field(default_factory=list)
    steps: set[str] = field(default_factory=set)  # rounds without their attempts
    ballot: BallotFact | None = None
    standings: list[StandingFact] = field(default_factory=list)
    schedule: ScheduleFact | None = None
    winner: str = ""
    measured: list[Measured] = field(default_factory=list)  # in order
    statements: dict[str, StatementFact] = field(default_factory=dict)
    finished: bool = False

    def add(self, entry: Entry) -> None:
        """Take in the next entry.

        Raises:
            ValueError: it does not hold what its kind holds.
        """
        value = entry.value
        match entry.kind:
            case "run":
                self.run = RunFact.model_validate(value)
            case "start":
                self.starts += 1
            case "hello":
                self.members = tuple(HelloFact.model_validate(value).members)
            case "round":
                self._add_round(entry.key.removeprefix("round/"), RoundFact.model_validate(value))
            case "ballot":
                self.ballot = BallotFact.model_validate(value)
                self.standings = [one for one in self.ballot.standings if one.name in self._candidates]
            case "schedule":
                self.schedule = ScheduleFact.model_validate(value)
            case "decision":
                winner = WinnerFact.model_validate(value).winner
                self.winner = winner if winner in self._candidates else ""
            case "counts":
                self._add_counts(entry.key.removeprefix("counts/"), CountsFact.model_validate(value))
            case "statements":
                self.statements = {
                    site: StatementFact.model_validate(one) for site, one in value.items() if site in self.members
                }
            case "finished":
                self.finished = True
        self.last_seq, self.last_at = entry.seq, float(entry.at)

    def _add_round(self, key: str, fact: RoundFact) -> None:
        self.rounds.append(fact)
        self.steps.add(key if fact.stage in ("runoff", "final") else key.rpartition("/")[0])

    def _add_counts(self, purpose: str, fact: CountsFact) -> None:
        if PURPOSE.fullmatch(purpose) is not None:
            rows = zip(fact.candidates, fact.accuracy, fact.accuracy_stderr, strict=True)
            self.measured += [Measured(purpose, *row) for row in rows if row[0] in self._candidates]

    @property
    def _candidates(self) -> set[str]:
        return {entry.name for entry in self.plan.candidates}

    @property
    def plan(self) -> Plan:
        """The run's plan.

        Raises:
            ValueError: the journal has none.
        """
        if self.run is None:
            raise ValueError("the journal holds no plan")
        return self.run.plan

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return "finished" if self.finished else "running" if self.running else "stopped"

    @property
    def progress(self) -> float:
        """Steps done of steps planned; a runoff, once it is decided on, adds to the plan."""
        plan, schedule = self.plan, self.schedule
        total = (len(plan.candidates) > 1) + plan.final.num_rounds + plan.evaluation.num_curve_points + 1
        if schedule is not None and schedule.finalists:
            total += (len(schedule.finalists) - 1) * schedule.runoff_rounds + 1
        return 1.0 if self.finished else min(1.0, len(self.steps) / total)

    @property
    def spent(self) -> dict[tuple[Stage, Partition], float]:
        """Epsilon of a partition's records at the end of each stage so far, everything before it included."""
        return {(one.stage, one.partition): one.epsilon for one in self.rounds}

    @property
    def left(self) -> dict[Partition, float]:
        """Epsilon of the plan that a partition's records have not spent."""
        spent = dict.fromkeys(PARTITIONS, 0.0) | {one.partition: one.epsilon for one in self.rounds}  # the last says it all
        return {name: self.plan.privacy.epsilon - epsilon for name, epsilon in spent.items()}

    @property
    def outcomes(self) -> Counter[tuple[str, str]]:
        """Rounds by (stage, outcome), zeros included, so that the first one is an increase."""
        found: Counter[tuple[str, str]] = Counter(dict.fromkeys(product(ROUND_STAGES, OUTCOMES), 0))
        found.update((one.stage, "opened" if one.opened else "lost") for one in self.rounds)
        return found

    @property
    def dropouts(self) -> Counter[tuple[str, str]]:
        """Rounds by (member, why it did not deliver)."""
        pairs = ((site, reason(why)) for one in self.rounds for site, why in one.dropped.items())
        return Counter((site, code) for site, code in pairs if site in self.members)

    @property
    def seconds(self) -> dict[str, list[float]]:
        """How long each round took, by stage."""
        found: dict[str, list[float]] = defaultdict(list)
        for one in self.rounds:
            found[one.stage].append(one.seconds)
        return found

    @property
    def latest(self) -> Measured | None:
        """The last measurement of the model that is being fine-tuned."""
        return next((one for one in reversed(self.measured) if one.purpose != "runoff"), None)


def reason(why: str) -> str:
    """The journal's words for why a member did not deliver, as one of `REASONS`: a refusal's text is no label."""
    code = why.split(":")[0].replace(" ", "_")
    return code if code in REASONS else "other"


def updated(view: RunView, run_dir: Path) -> RunView:
    """The view with what the journal gained.

    Raises:
        UrnaError: the journal cannot be opened.
        ValueError: it does not hold what a journal holds; the view is to be thrown away.
    """
    view.running = not view.finished and is_running(run_dir)  # first: a run that ends in between is then finished, not stopped
    with closing(Journal.read(run_dir)) as journal:
        for entry in journal.entries(after=view.last_seq):
            view.add(entry)
    _ = view.plan  # a journal without a plan is none
    return view
