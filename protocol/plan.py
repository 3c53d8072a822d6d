"""The plan: what the operator asks for, in TOML, validated, frozen and hashed.

Every number that decides a shape (sampling rate, expected batch, clip, steps, buckets) is in here and nowhere else,
so nothing that leaves a site is shaped by its records. Unknown keys are errors: a typo never falls back to a default.
"""

import difflib
import hashlib
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from urna.protocol.errors import PlanError, ProtocolError
from urna.protocol.quorum import Quorum, quorum

PLAN_LIMIT_BYTES = 1_000_000  # refused before it is parsed
EXPLAINED_LIMIT, MISTAKE_LIMIT = 1_500, 300  # characters: of all mistakes together, of one
_LOGIN = re.compile(r"://\S*@")  # of a URL: what stands before the host may be a password

Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Section(BaseModel):
    """A part of a document that a person writes: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic alone reads "3.0" and true as numbers, and takes infinity and integers that no JSON reader takes back."""
        field = cls.model_fields.get(info.field_name or "")
        kinds = set() if field is None else _kinds_of(field.annotation)
        if kinds and kinds <= {bool, NoneType} and not isinstance(value, bool | None):
            raise ValueError("input should be true or false, without quotes")
        if kinds & {int, float} and kinds <= {int, float, NoneType}:
            if isinstance(value, str | bool):
                raise ValueError("input should be a number, without quotes")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("input should be a finite number")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError("input should be below 2**63")
        return value


def _kinds_of(annotation: object) -> set[object]:
    """The types that a value may have, those of ``number | None`` included."""
    if get_origin(annotation) is Annotated:
        return _kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set[object]().union(*map(_kinds_of, get_args(annotation)))
    return {annotation}


class Task(Section):
    """What the model must do."""

    kind: Literal["classification"] = "classification"
    modality: Literal["image", "text"] = "image"
    num_classes: Annotated[int, Field(ge=2, le=1000)]
    dataset: Name | None = None  # what the sites call their records for this task; None: a site's first that fits


class CandidateEntry(Section):
    """A pretrained model that takes part; the order of entries is the operator's prior, best guess first."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None  # None: pin what the operator has built


class Privacy(Section):
    """What the whole campaign may cost each site, and who is trusted with what."""

    epsilon: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]  # must stay below 1 / federation.num_records
    noise: Literal["shared", "local"] = "shared"
    # members that the noise does not count on; with 0 epsilon holds against the server only, not against a fellow member,
    # who knows its own share of the noise
    max_colluding_sites: Annotated[int, Field(ge=0, le=80)] = 1


class VirtualSites(Section):
    """The embedded engine: sites over local data, for experiments and demonstrations."""

    dataset: Literal["digits"]
    num_sites: Annotated[int, Field(ge=2, le=1000)]
    dirichlet_alpha: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 0.5  # label skew; smaller: harder
    seed: Annotated[int, Field(ge=0)] = 0  # of the partition only; noise, sampling and masks have no seed


class Federation(Section):
    """Who takes part."""

    min_sites: Annotated[int, Field(ge=2)]  # no sum over fewer sites is ever opened
    num_records: Annotated[int, Field(ge=50)]  # public, may be rounded: the sites' declared sizes added up
    round_timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 120.0  # of each of a round's two exchanges
    # for people at sites that approve campaigns by hand; who has not said yes by then takes no part
    approval_timeout_seconds: Annotated[float, Field(ge=0, le=2_592_000)] = 3600.0
    # only sums are opened; without it every site's release is seen, so it must be private by itself (privacy.noise = "local")
    secure_sum: bool = True
    # of a number in a sum, at least: fewer bits, fewer bytes, coarser numbers; sums that need more get more
    ring_bits: Literal[16, 24, 32] = 32
    max_dropouts: Annotated[int, Field(ge=0)] | None = None  # that a round survives; None: as many as the threshold allows
    threshold_fraction: Annotated[float, Field(ge=2 / 3, le=1)] = 2 / 3  # more than this part of the holders opens a sum
    virtual: VirtualSites | None = None


class Shortlist(Section):
    """The public filter, which costs no privacy."""

    max_parameters: Annotated[int, Field(ge=1)] = 100_000_000
    max_noise_to_signal: Annotated[float, Field(gt=0)] = 1.0  # noise_multiplier * sqrt(p) / (sample_rate * n)
    licences: tuple[str, ...] = ("Apache-2.0", "MIT", "BSD-3-Clause")


class Ballot(Section):
    """The private choice: bucketed 1-NN votes, one Gaussian release of one number a candidate."""

    budget_fraction: Fraction = 0.15  # of the squared Gaussian-DP mu
    bucket_size: Annotated[int, Field(ge=4, le=100)] = 15  # expected records in a bucket
    clip: Annotated[float, Field(gt=0, le=2)] = 0.2  # L2 norm of one bucket's vote
    max_attempts: Annotated[int, Field(ge=1, le=5)] = 2  # each attempt is charged in full
    if_undecided: Literal["runoff", "prior"] = "runoff"


class Runoff(Section):
    """When the ballot is undecided: train the leaders a few rounds, compare them on held-out records."""

    num_finalists: Annotated[int, Field(ge=2, le=3)] = 2
    num_rounds: Annotated[int, Field(ge=1, le=1000)] = 10  # for each finalist; the winner keeps its rounds


class Final(Section):
    """The fine-tune of the winner."""

    # what is trained: a linear head on frozen features, low-rank factors beside linear layers and the head, or every weight
    tuning: Literal["head", "lora", "full"] = "head"
    lora_rank: Annotated[int, Field(ge=1, le=256)] = 8  # of tuning = "lora"
    num_rounds: Annotated[int, Field(ge=1, le=10_000)]
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1  # DP-SGD steps a round at each site (noise = "local")
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    # of the server, by Flower's strategies of these names
    optimizer: Literal["sgd", "momentum", "adam", "yogi", "adagrad"] = "adam"
    learning_rate: Annotated[float, Field(gt=0, le=1000)]
    # of the sites' steps (noise = "local"); its moments start afresh in every round
    local_optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    local_learning_rate: Annotated[float, Field(gt=0, le=1000)] = 1.0
    local_weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0  # of adamw, decoupled: pulls to the pretrained weights
    proximal_mu: Annotated[float, Field(ge=0, le=1000)] = 0.0  # pulls local steps to the global vector (FedProx)
    # of the rate of DP-SGD steps: the server's with noise = "shared", the sites' (local_learning_rate) with "local"
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # linear and cosine fall, to zero after the last step
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of all steps: the rate rises to its value in them
    # how updates become one; all but the mean need to see each update (federation.secure_sum = false)
    aggregation: Literal["mean", "median", "trimmed_mean", "krum", "bulyan"] = "mean"
    num_malicious_sites: Annotated[int, Field(ge=0, le=1000)] = 1  # that a robust aggregation bears

    @property
    def min_robust_sites(self) -> int:
        """How many sites the aggregation needs to bear that many (Blanchard et al. 2017; El Mhamdi et al. 2018)."""
        bad = self.num_malicious_sites
        needed = {"mean": 1, "median": 2 * bad + 1, "trimmed_mean": 2 * bad + 1, "krum": 2 * bad + 3, "bulyan": 4 * bad + 3}
        return needed[self.aggregation]

    def learning_rate_factor(self, index: int, step: int = 0) -> float:
        """What the schedule multiplies a rate by, above 0 and at most 1: of the plan's numbers and the place only.

        Args:
            index: the round, 1 ... num_rounds; a round that is lost counts.
            step: of the round's local steps, 0 ... local_steps - 1. A place outside of the plan is taken for its first or last.
        """
        total = self.num_rounds * self.local_steps
        done = min(max((index - 1) * self.local_steps + step, 0), total - 1)  # steps before this one
        warmup = self.warmup_fraction * total
        if done + 1 < warmup:
            return (done + 1) / warmup
        left = (total - max(done, warmup)) / (total - warmup)  # of the steps after the warm-up
        return {"constant": 1.0, "linear": left, "cosine": math.sin(0.5 * math.pi * left) ** 2}[self.schedule]


class Evaluation(Section):
    """Noisy counts on records that never train; they compose in parallel with the rest."""

    holdout_fraction: Annotated[float, Field(ge=0.05, le=0.5)] = 0.2
    num_curve_points: Annotated[int, Field(ge=0, le=20)] = 4
    curve_budget_fraction: Fraction = 0.1  # of the held-out records' squared mu, for all curve points together
    runoff_budget_fraction: Fraction = 0.15  # likewise, for comparing the finalists
    max_attempts: Annotated[int, Field(ge=1, le=5)] = 2
    confusion: bool = True  # the final counts carry a confusion matrix; sites' policies may not let one leave

    @property
    def metrics_asked(self) -> set[str]:
        """What sites' policies are asked about."""
        return {"accuracy", "confusion"} if self.confusion else {"accuracy"}


class Plan(Section):
    """One campaign, as the operator asks for it."""

    name: Name
    task: Task
    candidates: Annotated[tuple[CandidateEntry, ...], Field(min_length=1, max_length=64)]
    privacy: Privacy
    federation: Federation
    shortlist: Shortlist = Shortlist()
    ballot: Ballot = Ballot()
    runoff: Runoff = Runoff()
    final: Final
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [entry.name for entry in self.candidates]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"candidates must differ, found {', '.join(doubled)} twice: remove one entry")
        limit = 1 / self.federation.num_records
        if self.privacy.delta >= limit:
            raise ValueError(
                f"privacy.delta must be below 1/n = {limit:.3g} (n = federation.num_records = "
                f"{self.federation.num_records}), found {self.privacy.delta:g}: lower delta"
            )
        virtual = self.federation.virtual
        if virtual is not None and virtual.num_sites < self.federation.min_sites:
            raise ValueError(
                f"federation.virtual.num_sites must be at least federation.min_sites = {self.federation.min_sites}, "
                f"found {virtual.num_sites}: add sites or lower the minimum"
            )
        if self.privacy.noise == "shared" and self.privacy.max_colluding_sites >= self.federation.min_sites - 1:
            raise ValueError(
                f"privacy.max_colluding_sites must be at most federation.min_sites - 2 = "
                f"{self.federation.min_sites - 2}, found {self.privacy.max_colluding_sites}: "
                "with fewer than two honest sites a sum hides nothing; add sites or lower it"
            )
        if virtual is not None and self.task.modality != "image":
            raise ValueError(
                f'federation.virtual has images of {virtual.dataset} only, found task.modality = "{self.task.modality}": '
                "take the section out and run with sites of your own"
            )
        if self.privacy.noise == "shared" and (self.final.local_optimizer != "sgd" or self.final.local_weight_decay):
            raise ValueError(
                'final.local_optimizer and final.local_weight_decay are of local steps, and privacy.noise = "shared" has none: '
                'choose final.optimizer, or noise = "local"'
            )
        if self.final.local_weight_decay and self.final.local_optimizer != "adamw":
            raise ValueError(
                f'final.local_weight_decay is of final.local_optimizer = "adamw", found "{self.final.local_optimizer}": '
                "use 0, or adamw"
            )
        if self.privacy.noise == "shared" and self.final.proximal_mu:
            raise ValueError('final.proximal_mu pulls local steps, and privacy.noise = "shared" has none: use 0, or "local"')
        if not self.federation.secure_sum and self.privacy.noise != "local":
            raise ValueError(
                'federation.secure_sum = false needs privacy.noise = "local", found "shared": without the sum each update is '
                "seen with its own share of the noise only, which does not make it private"
            )
        if self.final.aggregation != "mean" and self.federation.secure_sum:
            raise ValueError(
                f'final.aggregation = "{self.final.aggregation}" compares single updates, which a secure sum never opens: '
                'use "mean", or federation.secure_sum = false with privacy.noise = "local"'
            )
        if self.final.min_robust_sites > self.federation.min_sites:
            raise ValueError(
                f'final.aggregation = "{self.final.aggregation}" bears {self.final.num_malicious_sites} bad sites '
                f"of {self.final.min_robust_sites} or more, found federation.min_sites = {self.federation.min_sites}: raise it "
                "or lower final.num_malicious_sites"
            )
        if self.ballot.budget_fraction * self.ballot.max_attempts > 0.9:
            raise ValueError(
                f"ballot.budget_fraction * ballot.max_attempts must be at most 0.9, found "
                f"{self.ballot.budget_fraction * self.ballot.max_attempts:g}: leave some of the budget for training"
            )
        if self.evaluation.curve_budget_fraction + self.evaluation.runoff_budget_fraction > 0.9:
            together = self.evaluation.curve_budget_fraction + self.evaluation.runoff_budget_fraction
            raise ValueError(
                f"evaluation.curve_budget_fraction and evaluation.runoff_budget_fraction may take 0.9 together, "
                f"found {together:g}: leave some for the final counts"
            )
        if self.privacy.noise == "shared" and self.final.local_steps != 1:
            raise ValueError(
                f'final.local_steps must be 1 with privacy.noise = "shared", found {self.final.local_steps}: '
                'shared noise opens one step a round; use noise = "local" for more'
            )
        return self

    @property
    def sha256(self) -> str:
        """The plan's identity: the hash of its canonical JSON, defaults included."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def num_tuning_records(self) -> int:
        """The public number of records that train (held-out ones taken off)."""
        return max(1, round(self.federation.num_records * (1 - self.evaluation.holdout_fraction)))

    @property
    def num_heldout_records(self) -> int:
        """The public number of records that evaluate."""
        return max(1, self.federation.num_records - self.num_tuning_records)

    @property
    def expected_batch(self) -> float:
        """B = q n: what a sum of gradients is divided by, whatever was really sampled."""
        return self.final.sample_rate * self.num_tuning_records

    @property
    def num_runoff_rounds(self) -> int:
        """Of each finalist; the winner's are the first of its `Final.num_rounds`."""
        return min(self.runoff.num_rounds, self.final.num_rounds)

    @property
    def max_planned_count(self) -> int:
        """The most releases of one kind that any stage may announce."""
        training = self.final.num_rounds + (self.runoff.num_finalists - 1) * self.runoff.num_rounds
        return max(training, self.ballot.max_attempts, self.evaluation.max_attempts, self.evaluation.num_curve_points)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Sites' declared sizes add up to no more than the plan's public number, rounding of a tenth allowed.

        Raises:
            ProtocolError: they do not; errors, weights and buckets would be wrong.
        """
        limit = 1.1 * self.federation.num_records
        if sum(sizes) > limit:
            raise ProtocolError(
                f"expected sites that declare at most {self.federation.num_records} records in all, found {sum(sizes)}: "
                "correct federation.num_records or the sites' declarations"
            )

    def quorum(self, cohort_size: int) -> Quorum:
        """Who must be there for a sum over a cohort to open.

        Raises:
            ValueError: the cohort is too small for this plan.
        """
        colluding = min(self.privacy.max_colluding_sites, cohort_size - 2)
        federation = self.federation
        return quorum(cohort_size, colluding, federation.min_sites, federation.max_dropouts, federation.threshold_fraction)

    def noise_parties(self, cohort_size: int) -> int:
        """How many honest sites of a cohort surely add their share of the noise to a sum that opens.

        The smallest number of survivors less the colluders; with local noise each site counts on itself alone.
        """
        return 1 if self.privacy.noise == "local" else self.quorum(cohort_size).noise_parties

    def num_buckets(self, num_records: int) -> int:
        """M of a site with ``num_records`` declared records; at least 1."""
        return max(1, math.floor(num_records * (1 - self.evaluation.holdout_fraction) / self.ballot.bucket_size))


def parse_plan(text: str) -> Plan:
    """Read a plan from TOML text.

    Raises:
        PlanError: not TOML, an unknown or missing key, or a value out of range; the message names the field,
            what was found and what to do.
    """
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # syntax, or an integer of thousands of digits
        raise PlanError(f"the plan must be TOML, found a syntax error: {error}") from None
    except RecursionError:
        raise PlanError("the plan must be TOML, found brackets nested too deep: a plan has three levels") from None
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise PlanError(explain(error, Plan)) from None


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: there is no such file, it is too large or not UTF-8, or see `parse_plan`.
    """
    return parse_plan(read_text(path, "plan", PlanError))


def read_document(path: Path, what: str, error: type[Exception]) -> dict[str, object]:
    """Read a TOML file that a person wrote.

    Raises:
        error: it is not TOML, or see `read_text`.
    """
    text = read_text(path, what, error)
    try:
        return tomllib.loads(text)
    except ValueError as wrong:  # syntax, or an integer of thousands of digits
        raise error(f"{path}: expected TOML, found a syntax error: {wrong}") from None
    except RecursionError:
        raise error(f"{path}: expected TOML, found brackets nested too deep") from None


def read_text(path: Path, what: str, error: type[Exception]) -> str:
    """Read a small UTF-8 file that a person wrote.

    Raises:
        error: there is no such file, or it is too large or not UTF-8.
    """
    if not path.is_file():
        raise error(f"expected a {what} file at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    size = path.stat().st_size
    if size > PLAN_LIMIT_BYTES:
        raise error(f"{path}: a {what} has at most {PLAN_LIMIT_BYTES} bytes, found {size}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise error(f"{path}: a {what} must be UTF-8 text, found other bytes") from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line a person can act on: each wrong field with what was expected and what was found."""
    items = error.errors(include_url=False)
    wrong = [item["loc"] for item in items]
    told = [one for one in items if not (one["type"] == "too_short" and any(_is_below(loc, one["loc"]) for loc in wrong))]
    shown: list[str] = []
    for item in told:
        line = _cut(_explain_one(dict(item), model), MISTAKE_LIMIT)
        if sum(map(len, shown)) + len(line) > EXPLAINED_LIMIT:
            return "; ".join([*shown, f"and {len(told) - len(shown)} more"])
        shown.append(line)
    return "; ".join(shown)


def _is_below(location: tuple[int | str, ...], upper: tuple[int | str, ...]) -> bool:
    """Whether something is a part of ``upper``: an entry that is wrong is missing, too, in pydantic's eyes."""
    return len(location) > len(upper) and location[: len(upper)] == upper


def _explain_one(item: dict[str, object], model: type[BaseModel]) -> str:
    location = item["loc"]
    assert isinstance(location, tuple)
    field = ".".join(_one_line(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1], model)
        close = difflib.get_close_matches(str(location[-1])[:80], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {field}: {hint}"
    if item["type"] == "missing":
        return f"missing key {field}: add it"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not field:
        return message
    return f"{field}: {message[0].lower()}{message[1:]}, found {_shown(item['input'])}"


def _one_line(part: object) -> str:
    """A key as it was written, unless quotes let it hold line breaks or a whole page."""
    text = str(part)
    return text if text.isprintable() and len(text) <= 80 else _shown(text)


def _shown(value: object) -> str:
    """What was found; never the content of a whole section, for a key of it may hold a secret."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list | tuple) for one in value):
        return f"a list of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a number of thousands of digits"
    return _cut(_LOGIN.sub("://...@", text), 80)


def _cut(text: str, limit: int) -> str:
    return text if len(text) < limit else text[: limit - 3] + "..."


def _fields_at(location: tuple[object, ...], model: type[BaseModel]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        model = next(m for m in _models_in(annotation))
    return list(model.model_fields)


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found += _models_in(inner)
    return found
