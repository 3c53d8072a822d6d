"""The report's values: all that report.json holds; `report_reading` fills them, `report_page` shows them."""

from typing import Any

from pydantic import BaseModel


class Part(BaseModel, frozen=True):
    """A part of report.json."""


class Ranked(Part):
    """A candidate: its ballot score is 1-NN accuracy above the mean of all candidates; None where it was not voted on."""

    name: str
    family: str
    score: float | None = None
    stderr: float | None = None
    rank: int | None = None
    contender: bool = False
    shortlisted: bool
    reasons: tuple[str, ...] = ()


class Finalist(Part):
    """What the runoff measured of a finalist."""

    name: str
    accuracy: float
    stderr: float


class ClassScore(Part):
    """How well one class is told from the others."""

    label: int
    precision: float
    precision_stderr: float
    recall: float
    recall_stderr: float
    f1: float
    f1_stderr: float


class SiteEpsilon(Part):
    """What a site's statement says; stages do not add up to the total, for they compose."""

    total: float
    stages: dict[str, float]


class EpsilonSpent(Part):
    """By the sites' statements; ``missing`` members gave none; of ``kept`` ones the journal has the signed bytes."""

    max: float | None
    sites: dict[str, SiteEpsilon]
    missing: tuple[str, ...]
    kept: tuple[str, ...] = ()


class Round(Part):
    """One round; ``epsilon`` is what the records of its partition have spent with it if every site answered every round."""

    key: str
    stage: str
    index: int
    purpose: str  # "votes", "gradients" or which counts
    candidates: tuple[str, ...]
    partition: str
    cohort: int
    opened: bool
    dropped: dict[str, str]
    seconds: float
    noise_multiplier: float
    epsilon: float


class Dropout(Part):
    """A site that did not deliver to a round."""

    round: str
    site: str
    why: str


class Absent(Part):
    """A site that did not join at hello."""

    site: str
    reasons: tuple[str, ...]


class CurvePoint(Part):
    """Held-out accuracy after a round."""

    round: int
    accuracy: float
    stderr: float


class Noise(Part):
    """Who adds the noise."""

    kind: str
    meaning: str
    max_colluding_sites: int  # epsilon holds if, of the fewest sites that may open a sum, all others add their noise
    secure_sum: bool  # whether only sums were opened


class Left(Part):
    """Numbers of one kind that left each site; all of them noisy, in a sum or by themselves."""

    what: str
    stage: str
    times: int
    lost: int
    numbers: int  # each time
    partition: str
    noise_multiplier: float


class Preparation(Part):
    """How the winner was made ready for per-example gradients, by the operator's preflight; sites run their own."""

    mode: str
    numbers: int  # trained
    share_trained: float  # of the weights that the mode would train
    engine: str
    notes: tuple[str, ...]  # what was repaired or frozen
    fallbacks: tuple[str, ...]  # why faster engines do not serve


class Confusion(Part):
    """The released matrix, rows are true classes: every cell carries Gaussian noise and may be negative."""

    cells: tuple[tuple[float, ...], ...]
    noise_std: float


class Report(Part):
    """All that report.json holds; what is not known (yet) is None or empty."""

    run_id: str
    state: str  # "finished" or "running or stopped at stage ..."
    finished: bool
    engine: str
    plan: dict[str, Any]  # JSON, as the plan's own model wrote it
    plan_sha256: str
    models: dict[str, str]
    tuning: str  # what was trained, in words
    preparation: Preparation | None = None  # of the winner; None for a head
    versions: dict[str, str]
    seconds: float
    resumed: int
    sites: dict[str, int]  # declared sizes of the members
    refused: tuple[Absent, ...]
    winner: str | None
    decided_by: str | None
    undecided: bool | None  # whether the ballot left more than one contender
    ranking: tuple[Ranked, ...]
    runoff: tuple[Finalist, ...]
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    macro_f1: float | None = None
    macro_f1_stderr: float | None = None
    per_class: tuple[ClassScore, ...] = ()
    confusion: Confusion | None = None
    num_records_evaluated: float | None = None
    baseline_majority_accuracy: float | None = None
    learning_curve: tuple[CurvePoint, ...]
    epsilon_planned: float
    delta: float
    epsilon_spent: EpsilonSpent
    unit_of_privacy: str
    noise: Noise
    rounds: tuple[Round, ...]
    dropouts: tuple[Dropout, ...]
    left: tuple[Left, ...]
    limits: tuple[str, ...]
