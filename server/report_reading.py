"""A journal, read into a `Report`.

Covered:
    * nothing is remembered elsewhere: the same journal gives the same report, also of an unfinished run;
    * what each site spent is what its own statement says; where a statement is missing, that is said.
Not covered:
    * who signed a statement: its signature was checked when it arrived, and is not checked again here; the signed bytes are
      in the journal (entries ``reply/close/<site>``: body and signature), so that anyone with the roster can do so;
    * whether a statement is true: the ledger behind it is the site's own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from urna.models.catalogue import spec
from urna.privacy.counts import COUNT_WEIGHT, CountLayout, Counts
from urna.protocol.errors import ModelError
from urna.protocol.plan import Final, Plan
from urna.server.journal import Entry, Journal, Json, recorded_plan
from urna.server.report import (
    Absent,
    ClassScore,
    Confusion,
    CurvePoint,
    Dropout,
    EpsilonSpent,
    Finalist,
    Left,
    Noise,
    Preparation,
    Ranked,
    Report,
    Round,
    SiteEpsilon,
)
from urna.strategies.scores import scores

PER_CLASS = ("precision", "precision_stderr", "recall", "recall_stderr", "f1", "f1_stderr")
UNIT = "one record of one site; add or remove"
EXPERIMENTS = ("embedded", "memory")  # engines whose sites are folders of one person
MEASURED_CLASSES, MEASURED_CANDIDATES = 12, 11  # the largest tasks on which the ballot was measured


def read_report(run_dir: Path) -> Report:
    """What the journal of a run says.

    Raises:
        RunError: there is no journal, or it holds no plan.
    """
    with closing(Journal.read(run_dir)) as journal:
        return _Reading(recorded_plan(journal), journal.entries()).report(run_dir.resolve().name)


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
            tuning=tuning_in_words(self.plan.final),
            preparation=self._preparation(),
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
        stages["tuning"] = "shortlist"
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
                family=_family(one["name"]),
                contender=one["name"] in ballot["contenders"],
                shortlisted=not one["reasons"],
                reasons=tuple(one["reasons"]),
                **voted.get(one["name"], {}),
            )
            for one in self.values.get("shortlist", {"candidates": []})["candidates"]
        ]
        return tuple(sorted(ranked, key=lambda one: (one.rank or math.inf, not one.shortlisted)))

    def _preparation(self) -> Preparation | None:
        tuning, winner = self.values.get("tuning"), self.values.get("decision", {}).get("winner")
        if tuning is None or winner not in tuning["candidates"]:
            return None
        found = tuning["candidates"][winner]
        return Preparation(
            mode=tuning["mode"],
            numbers=found["size"],
            share_trained=found["share_trained"],
            engine=found["engine"],
            notes=tuple(found["notes"]),
            fallbacks=tuple(found["fallbacks"]),
        )

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
        if counts.confusion is None:  # the plan asks for none
            accuracy, stderr = value["accuracy"][0], value["accuracy_stderr"][0]
            return {"accuracy": accuracy, "accuracy_stderr": stderr, "num_records_evaluated": value["num_records"]}
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
        meaning = {
            "shared": "each site adds its part of the noise, and only the sum over a round's surviving sites is ever opened",
            "local": "each site adds enough noise for its own contribution to be private by itself",
        }[self.plan.privacy.noise]
        privacy = self.plan.privacy
        return Noise(
            kind=privacy.noise,
            meaning=meaning,
            max_colluding_sites=privacy.max_colluding_sites,
            secure_sum=self.plan.federation.secure_sum,
        )

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
        }.get(purpose, f"counts: right answers{' and the confusion matrix' if self.plan.evaluation.confusion else ''}")

    def _numbers(self, one: Round) -> int:
        if one.purpose == "gradients":
            judged = self.values["shortlist"]["candidates"]
            return next((int(item["trainable_parameters"]) for item in judged if item["name"] == one.candidates[0]), 0)
        if one.purpose == "votes":
            return sum(not item["reasons"] for item in self.values["shortlist"]["candidates"])
        detailed = one.purpose == "final" and self.plan.evaluation.confusion
        return CountLayout(len(one.candidates), self.plan.task.num_classes if detailed else 0).size

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
            _about_sums(plan),
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


def tuning_in_words(final: Final) -> str:
    """What a plan trains."""
    return {
        "head": "a linear head on frozen features",
        "lora": f"low-rank factors of rank {final.lora_rank} beside the linear layers, and a linear head",
        "full": "every weight that per-example gradients exist for, and a linear head",
    }[final.tuning]


def _family(name: str) -> str:
    try:
        return spec(name).family
    except ModelError:  # it was known where the campaign ran
        return "unknown"


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


def _about_sums(plan: Plan) -> str:
    if not plan.federation.secure_sum:
        return "There was no secure sum: the operator saw each site's noisy numbers by themselves."
    return (
        "A sum opens with more than two thirds of its sites, and of share holders, or not at all; what a lost round cost "
        "is spent. Every survivor's noise is in it, so the more survive, the more noise it has."
    )


def _about_honesty(colluding: int) -> str:
    who = f"at most {colluding} sites tell" if colluding else "no site tells"
    against = (
        "" if colluding else " It holds against the server, not against a fellow site, who knows its own part of the noise."
    )
    return f"The noise is shared: epsilon holds as long as {who} the server its part of the noise and its masks.{against}"
