"""The report: a view of the journal alone, as report.json for programs and report.html for people.

Covered:
    * nothing is remembered elsewhere: the same journal gives the same report, also of an unfinished run;
    * what each site spent is what its own statement says; where a statement is missing, that is said;
    * every text is escaped; the page needs no network and no script.
Not covered:
    * who signed a statement: its signature was checked when it arrived, and is not checked again here; the signed bytes are
      in the journal (entries ``reply/close/<site>``: body and signature), so that anyone with the roster can do so;
    * whether a statement is true: the ledger behind it is the site's own.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from urna.models.catalogue import CATALOGUE
from urna.privacy.counts import COUNT_WEIGHT, CountLayout, Counts
from urna.protocol.plan import Plan
from urna.server import figures
from urna.server.journal import Entry, Journal, Json, recorded_plan
from urna.strategies.scores import scores

if TYPE_CHECKING:
    from markupsafe import Markup

JSON_FILE, HTML_FILE, TEMPLATE_FILE = "report.json", "report.html", "report.html.j2"
PER_CLASS = ("precision", "precision_stderr", "recall", "recall_stderr", "f1", "f1_stderr")
UNIT = "one record of one site; add or remove"
EXPERIMENTS = ("embedded", "memory")  # engines whose sites are folders of one person
MAX_MATRIX_CLASSES = 16  # a larger confusion matrix is in report.json only
MAX_LISTED = 40  # sites or lost replies; report.json has all
MEASURED_CLASSES, MEASURED_CANDIDATES = 12, 9  # the largest tasks on which the ballot was measured


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
    honest_parties: int  # of a round's sites, for the epsilon to hold


class Left(Part):
    """Numbers of one kind that left each site; all of them noisy, in a sum or by themselves."""

    what: str
    stage: str
    times: int
    lost: int
    numbers: int  # each time
    partition: str
    noise_multiplier: float


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


def write_report(run_dir: Path) -> Path:
    """Write report.json and report.html into a run's folder, each replaced in one step.

    Returns:
        The page.

    Raises:
        RunError: there is no journal, or it holds no plan.
    """
    report = read_report(run_dir)
    write_atomically(run_dir / JSON_FILE, report.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(run_dir / HTML_FILE, render(report).encode())
    return run_dir / HTML_FILE


def read_report(run_dir: Path) -> Report:
    """What the journal of a run says.

    Raises:
        RunError: there is no journal, or it holds no plan.
    """
    with closing(Journal.read(run_dir)) as journal:
        return _Reading(recorded_plan(journal), journal.entries()).report(run_dir.resolve().name)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).chmod(0o644)
    Path(name).replace(path)


class _Reading:
    """A journal's entries, read once."""

    def __init__(self, plan: Plan, entries: Sequence[Entry]) -> None:
        self.plan = plan
        self.entries = entries
        self.values: dict[str, Json] = {entry.key: entry.value for entry in entries}
        self.rounds = tuple(_round(entry) for entry in entries if entry.kind == "round")

    def report(self, folder: str) -> Report:
        run, finished = self.values["run"], "finished" in self.values
        decision = self.values.get("decision", {})
        starts = [value for key, value in self.values.items() if key.startswith("start/")]
        hello = self.values.get("hello", {"members": {}, "others": {}})
        return Report(
            run_id=self._campaign() or folder,
            state="finished" if finished else f"running or stopped at stage {self._stage()}",
            finished=finished,
            engine=run["engine"],
            plan=run["plan"],
            plan_sha256=run["plan_sha256"],
            models=self.values.get("models", {}),
            versions=starts[-1]["versions"] if starts else {},
            seconds=self.entries[-1].at - self.entries[0].at,
            resumed=max(0, len(starts) - 1),
            sites={site: facts["num_records"] for site, facts in hello["members"].items()},
            refused=tuple(_absent(site, why) for site, why in hello["others"].items()),
            winner=decision.get("winner"),
            decided_by=decision.get("by"),
            undecided=decision.get("undecided"),
            ranking=self._ranking(),
            runoff=self._runoff(),
            **self._scores(),
            learning_curve=self._curve(),
            epsilon_planned=self.plan.privacy.epsilon,
            delta=self.plan.privacy.delta,
            epsilon_spent=self._spent(hello["members"]),
            unit_of_privacy=UNIT,
            noise=self._noise(),
            rounds=self.rounds,
            dropouts=tuple(
                Dropout(round=one.key, site=site, why=why) for one in self.rounds for site, why in one.dropped.items()
            ),
            left=self._left(),
            limits=tuple(self._limits()),
        )

    def _campaign(self) -> str | None:
        """The id that the sites know, also after the folder was renamed."""
        asked = self.values.get("ask/hello")
        return None if asked is None else str(json.loads(asked["body"])["campaign"])

    def _stage(self) -> str:
        """Of the latest entry that belongs to one."""
        stages = {"models": "hello", "hello": "hello", "shortlist": "shortlist", "ballot": "ballot", "statements": "close"}
        for entry in reversed(self.entries):
            if entry.kind in ("ask", "round", "counts", "model"):
                known = [one.stage for one in self.rounds if one.key == entry.key.partition("/")[2]]
                part = entry.key.split("/")[1] if entry.kind == "ask" else "evaluation"
                return known[0] if known else "final" if entry.kind == "model" else part
            if entry.kind in stages:
                return stages[entry.kind]
        return "hello"

    def _ranking(self) -> tuple[Ranked, ...]:
        """Ranked candidates first, best first; then those that were not voted on, in the plan's order."""
        ballot = self.values.get("ballot", {"standings": [], "contenders": []})
        voted = {
            one["name"]: {"rank": rank, "score": one["score"], "stderr": one["stderr"]}
            for rank, one in enumerate(ballot["standings"], start=1)
        }
        ranked = [
            Ranked(
                name=one["name"],
                family=CATALOGUE[one["name"]].family if one["name"] in CATALOGUE else "unknown",
                contender=one["name"] in ballot["contenders"],
                shortlisted=not one["reasons"],
                reasons=tuple(one["reasons"]),
                **voted.get(one["name"], {}),
            )
            for one in self.values.get("shortlist", {"candidates": []})["candidates"]
        ]
        return tuple(sorted(ranked, key=lambda one: (one.rank or math.inf, not one.shortlisted)))

    def _runoff(self) -> tuple[Finalist, ...]:
        counts = self.values.get("counts/runoff")
        if counts is None:
            return ()
        triples = zip(counts["candidates"], counts["accuracy"], counts["accuracy_stderr"], strict=True)
        return tuple(Finalist(name=name, accuracy=accuracy, stderr=stderr) for name, accuracy, stderr in triples)

    def _scores(self) -> Json:
        """The fields of `Report` that the final counts fill; none without them."""
        value = self.values.get("counts/final")
        if value is None:
            return {}
        counts = _counts(value)
        found = scores(counts)
        return {
            "accuracy": found.accuracy,
            "accuracy_stderr": found.accuracy_stderr,
            "macro_f1": found.macro_f1,
            "macro_f1_stderr": found.macro_f1_stderr,
            "confusion": Confusion(cells=value["confusion"], noise_std=counts.confusion_noise_std),
            "per_class": tuple(
                ClassScore(label=label, **{name: float(getattr(found, name)[label]) for name in PER_CLASS})
                for label in range(len(found.f1))
            ),
            "num_records_evaluated": found.num_records,
            "baseline_majority_accuracy": found.majority_accuracy,
        }

    def _curve(self) -> tuple[CurvePoint, ...]:
        at = {f"counts/curve-{index}": index for index in range(1, self.plan.final.num_rounds + 1)}
        at["counts/final"] = self.plan.final.num_rounds
        return tuple(
            CurvePoint(round=index, accuracy=self.values[key]["accuracy"][0], stderr=self.values[key]["accuracy_stderr"][0])
            for key, index in at.items()
            if key in self.values
        )

    def _spent(self, members: Mapping[str, object]) -> EpsilonSpent:
        statements = self.values.get("statements", {})
        sites = {
            site: SiteEpsilon(total=value["epsilon"], stages=value["epsilon_by_stage"]) for site, value in statements.items()
        }
        largest = max((one.total for one in sites.values()), default=None)
        kept = tuple(site for site in sites if f"reply/close/{site}" in self.values)
        return EpsilonSpent(max=largest, sites=sites, missing=tuple(sorted(members.keys() - sites.keys())), kept=kept)

    def _noise(self) -> Noise:
        cohort = min((one.cohort for one in self.rounds), default=self.plan.federation.min_sites)
        meaning = {
            "shared": "each site adds its part of the noise, and only the sum over all sites of a round is ever opened",
            "local": "each site adds enough noise for its own contribution to be private by itself",
        }[self.plan.privacy.noise]
        return Noise(kind=self.plan.privacy.noise, meaning=meaning, honest_parties=self.plan.noise_parties(cohort))

    def _left(self) -> tuple[Left, ...]:
        """One line for each kind of release, in the order in which they began."""
        groups: dict[tuple[str, str, str], list[Round]] = {}
        for one in self.rounds:
            names = one.candidates[0] if one.purpose == "gradients" else ""
            groups.setdefault((one.stage, one.purpose, names), []).append(one)
        return tuple(
            Left(
                what=self._what(purpose, name),
                stage=stage,
                times=len(rounds),
                lost=sum(not one.opened for one in rounds),
                numbers=self._numbers(rounds[0]),
                partition=rounds[0].partition,
                noise_multiplier=rounds[0].noise_multiplier,
            )
            for (stage, purpose, name), rounds in groups.items()
        )

    def _what(self, purpose: str, name: str) -> str:
        if purpose == "gradients":
            return f"clipped gradients of {name}" if self.plan.privacy.noise == "shared" else f"clipped changes of {name}"
        return {
            "votes": "votes over the candidates",
            "runoff": "counts: right answers of the finalists",
            "curve": "counts: right answers so far",
        }.get(purpose, "counts: right answers and the confusion matrix")

    def _numbers(self, one: Round) -> int:
        if one.purpose == "gradients":
            judged = self.values["shortlist"]["candidates"]
            return next((int(item["trainable_parameters"]) for item in judged if item["name"] == one.candidates[0]), 0)
        if one.purpose == "votes":
            return sum(not item["reasons"] for item in self.values["shortlist"]["candidates"])
        return CountLayout(len(one.candidates), self.plan.task.num_classes if one.purpose == "final" else 0).size

    def _limits(self) -> list[str]:
        plan, counts = self.plan, self.values.get("counts/final")
        colluding = plan.privacy.max_colluding_sites
        lost = sum(not one.opened for one in self.rounds)
        engine = self.values["run"]["engine"]
        lines = [
            f"The sites were folders of one person (engine: {engine}): this is an experiment, and nothing was kept from anyone."
            if engine in EXPERIMENTS
            else "",
            "Accuracy is that of held-out records of the same sites: a site that took no part may see another.",
            "Plus or minus is one standard error, of sampling and of privacy noise: not of another training run.",
            "The finalists were compared on the same held-out records that evaluated the winner." if self._runoff() else "",
            _about_size(_counts(counts)) if counts else "",
            "A ballot's score is a 1-NN accuracy in small groups of records: what others reach when fine-tuned is not known.",
            "A sum opens with all of its sites or not at all: one missing reply loses a round that the others have paid for.",
            f"{lost} of {len(self.rounds)} rounds were lost." if lost else "",
            _about_honesty(colluding) if plan.privacy.noise == "shared" else "",
            "The unit is a record: a person with several records, or at two sites, is protected less than epsilon says.",
            "Sites declared their sizes and nobody checked them; a dishonest site can spoil the model.",
            f"The ballot was measured on up to {MEASURED_CLASSES} classes and {MEASURED_CANDIDATES} candidates; not with more."
            if plan.task.num_classes > MEASURED_CLASSES or len(plan.candidates) > MEASURED_CANDIDATES
            else "",
        ]
        return [line for line in lines if line]


def _round(entry: Entry) -> Round:
    value = entry.value
    purposes = {"ballot": "votes", "runoff": "gradients", "final": "gradients"}
    candidates = value.get("candidates", [value["candidate"]] if "candidate" in value else [])
    return Round(
        key=entry.key.partition("/")[2],
        stage=value["stage"],
        index=value.get("index", value.get("attempt", 1)),
        purpose=purposes.get(value["stage"]) or str(value.get("purpose", "final")).partition("-")[0],
        candidates=tuple(candidates),
        partition=value["partition"],
        cohort=len(value["cohort"]),
        opened=value["opened"],
        dropped=value["dropped"],
        seconds=value["seconds"],
        noise_multiplier=value["noise_multiplier"],
        epsilon=value["epsilon"],
    )


def _absent(site: str, why: str) -> Absent:
    return Absent(site=site, reasons=tuple(why.removeprefix("refused: ").split("; ")))


def _counts(value: Json) -> Counts:
    return Counts(
        num_records=value["num_records"],
        accuracy=np.array(value["accuracy"]),
        accuracy_stderr=np.array(value["accuracy_stderr"]),
        confusion=None if value["confusion"] is None else np.array(value["confusion"]),
        confusion_noise_std=value["confusion_noise_std"],
    )


def _about_size(counts: Counts) -> str:
    layout = CountLayout(1, 1)
    std = counts.confusion_noise_std * layout.confusion_weight / COUNT_WEIGHT
    return (
        f"How many records were evaluated is itself a noisy count: {counts.num_records:.0f} ± {std:.0f}. Scores of single "
        "classes are estimated from a noisy matrix: a class that is worse than the others may look better than it is."
    )


def _about_honesty(colluding: int) -> str:
    who = f"at most {colluding} sites tell" if colluding else "no site tells"
    return f"The noise is shared: epsilon holds as long as {who} the server its part of the noise and its masks."


# --- the page


def render(report: Report) -> str:
    """The page, complete in one file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": _duration, "small": _small}
    page: str = environment.get_template(TEMPLATE_FILE).render(
        report=report,
        headline=headline(report),
        decision=decision_in_words(report),
        figures=_figures(report),
        plan_lines=list(_flat(report.plan)),
        show_matrix=report.confusion is not None and len(report.confusion.cells) <= MAX_MATRIX_CLASSES,
        max_listed=MAX_LISTED,
    )
    return page


def headline(report: Report) -> str:
    """The answer to the operator's question, in one sentence."""
    if not report.finished:
        return f"Not finished: {report.state}."
    spent = report.epsilon_spent.max
    cost = f"epsilon {spent:.2f} of {report.epsilon_planned:.2f}" if spent is not None else "an epsilon that no site confirmed"
    if report.accuracy is None or report.accuracy_stderr is None:
        return f"Fine-tune {report.winner}; how good it is is not known, for the final counts were lost, at {cost}."
    return (
        f"Fine-tune {report.winner}: {_percent(report.accuracy)} % ± {_percent(report.accuracy_stderr)} "
        f"on held-out records nobody pooled, at {cost}."
    )


def decision_in_words(report: Report) -> list[str]:
    """How the winner was chosen, a sentence each."""
    kept = [one for one in report.ranking if one.shortlisted]
    words = [f"{len(kept)} of {len(report.ranking)} candidates passed the public shortlist."] if report.ranking else []
    voted = [one for one in report.ranking if one.rank is not None]
    contenders = [one.name for one in voted if one.contender]
    if len(contenders) > 1:
        words.append(f"The ballot was undecided: its noise cannot tell {_listed(contenders)} apart.")
    elif contenders:
        words.append(f"The ballot was decided: {contenders[0]} is clear of all others by more than two standard errors.")
    if report.runoff:
        results = [f"{one.name} {_percent(one.accuracy)} % ± {_percent(one.stderr)}" for one in report.runoff]
        words.append(
            f"A runoff trained the leaders a few rounds each and compared them on held-out records: {_listed(results)}."
        )
    words += _verdict(report)
    return words or ["Nothing is decided yet."]


def _verdict(report: Report) -> list[str]:
    if report.winner is None or report.decided_by is None:
        return []
    by = {
        "ballot": "The ballot decided for {}.",
        "runoff": "It decided for {}.",
        "prior": "The operator's order of candidates, written before anything was asked, decided for {}.",
        "only candidate": "{} was the only candidate left, so nothing was voted on.",
    }.get(report.decided_by, f"{{}} was taken: {report.decided_by}.")
    words = [by.format(report.winner)]
    if report.decided_by == "runoff" and len(report.runoff) > 1:
        first, second = sorted(report.runoff, key=lambda one: -one.accuracy)[:2]
        apart = (first.accuracy - second.accuracy) / max(math.hypot(first.stderr, second.stderr), 1e-9)
        if apart < 2:
            words.append(f"The best two are only {apart:.1f} standard errors apart: {second.name} may be as good.")
    return words


def _figures(report: Report) -> dict[str, "Markup"]:
    drawn = {}
    if marks := [
        figures.Mark(one.name, one.score, one.stderr, one.contender, winner=one.name == report.winner)
        for one in report.ranking
        if one.score is not None and one.stderr is not None
    ]:
        drawn["ranking"] = figures.ranking(marks)
    if len(curve := report.learning_curve) > 1:
        rounds, accuracy, stderr = zip(*((point.round, point.accuracy, point.stderr) for point in curve), strict=True)
        drawn["curve"] = figures.learning_curve(rounds, accuracy, stderr)
    if len(report.rounds) > 1:
        drawn["spending"] = figures.spending([(one.partition, one.epsilon) for one in report.rounds], report.epsilon_planned)
    return drawn


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _small(value: float) -> str:
    """0.00001 -> 1e-05, 2.99865 -> 2.999."""
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The plan as lines of dotted keys; what is not set is left out."""
    lines: list[tuple[str, str]] = []
    for key, one in value.items():
        if isinstance(one, dict):
            lines += _flat(one, f"{prefix}{key}.")
        elif key == "candidates":
            lines.append((f"{prefix}{key}", ", ".join(str(entry["name"]) for entry in one)))
        elif one is not None:
            lines.append((f"{prefix}{key}", ", ".join(map(str, one)) if isinstance(one, list) else str(one)))
    return lines
