"""Check a site's receipt without the site: who signed it, and whether its numbers follow from each other and from the plan.

Covered:
    * a forged or altered receipt, one in another site's name, of another plan or another operator;
    * releases that the plan's stages do not make: another partition, sampling rate or count; events that cannot be accounted;
    * an epsilon that is not the cost of the releases that are listed.
Not covered:
    * a site that leaves releases out of what it signs: `receipt_run` finds those that the operator holds answers to;
    * what releases of other campaigns cost: a receipt is of one.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from urna.privacy.accounting import described, epsilon_of_rows, event_from_json
from urna.protocol.errors import BadInputError, SignatureError
from urna.protocol.identity import Roster, load_roster
from urna.protocol.messages import BallotRequest, EvaluateRequest, SpentRow, Stage, Summed, TrainRequest
from urna.protocol.plan import Plan, explain
from urna.protocol.receipt import FILE_LIMIT_BYTES, Left, Receipt, SignedReceipt, plan_hash, read_receipt

REQUESTS: dict[Stage, type[Summed]] = {
    "ballot": BallotRequest,
    "runoff": TrainRequest,
    "final": TrainRequest,
    "evaluation": EvaluateRequest,
}
TOLERANCE = 1e-9  # of epsilon: the same code gives the same number, but for the last digits on another machine
# above any plan's, and still computed in seconds; what is further off could keep this machine busy for hours
MIN_NOISE_MULTIPLIER, MAX_SQUARED_MU, MAX_KINDS = 0.05, 600.0, 200
Kind = Literal["wrong", "note"]


@dataclass(frozen=True)
class Finding:
    """One line about a receipt; without a *wrong* one it is good."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Checked:
    """A receipt with all that was found."""

    receipt: Receipt | None  # None: not readable, or not signed by whom it names; nothing in it is worth showing
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return all(one.kind != "wrong" for one in self.findings)


def check_file(path: Path, roster_path: Path | None, key: str | None, run_dir: Path | None = None) -> Checked:
    """Check a receipt's file.

    Args:
        path: the file.
        roster_path: the roster of pinned keys.
        key: instead of a roster, the site's public key; who the operator was is then not compared.
        run_dir: the operator's folder of the run; what its journal holds of this site is compared too.

    Raises:
        BadInputError: neither or both of roster and key, or one of them or the journal cannot be read.
        OSError: the file cannot be read.
    """
    if (roster_path is None) == (key is None):
        raise BadInputError("expected --roster ROSTER or --key HEX, found none or both: give one")
    roster = None if roster_path is None else load_roster(roster_path)
    with path.open("rb") as file:
        data = file.read(FILE_LIMIT_BYTES + 1)
    try:
        signed = read_receipt(data)
        roster = roster or _roster_of(signed.receipt, key or "")
        signed.check(roster)
    except (BadInputError, SignatureError) as error:
        return Checked(None, (Finding("wrong", str(error)),))
    findings = [*check_receipt(signed, roster)]
    if key is not None:
        findings.append(Finding("note", "the operator's key is the one that the receipt names: no roster was compared"))
    if run_dir is not None:
        from urna.server.receipt_run import compare_with_run

        findings += compare_with_run(signed.receipt, roster, run_dir)
    return Checked(signed.receipt, tuple(findings))


def _roster_of(receipt: Receipt, key: str) -> Roster:
    """Pinned: one site's key. The operator is whom the receipt names.

    Raises:
        BadInputError: no such keys make a roster.
    """
    try:
        return Roster(operator=receipt.operator_key, sites={receipt.site: key.strip().lower()})
    except ValidationError as error:
        raise BadInputError(f"expected the site's public key of 128 hex digits: {explain(error, Roster)}") from None


def check_receipt(signed: SignedReceipt, roster: Roster) -> Iterator[Finding]:
    """What is wrong with a receipt that this roster's site signed, and what is worth a note.

    Raises:
        SignatureError: it did not sign it.
    """
    signed.check(roster)
    receipt = signed.receipt
    if receipt.operator_key != roster.operator:
        yield _wrong("it names another operator's key than the roster pins")
    if plan_hash(receipt.plan_json) != receipt.plan_sha256:
        yield _wrong("the plan's hash is not that of the plan in it")
    try:
        plan = Plan.model_validate_json(receipt.plan_json)
    except ValidationError as error:
        yield _wrong(f"the plan in it is none that this version can run: {explain(error, Plan)[:500]}")
        return
    if plan.sha256 != receipt.plan_sha256:
        yield Finding("note", "the plan in it is not written as this version of urna writes it: was it another version's?")
    yield from _about_models(receipt, plan)
    if receipt.delta != plan.privacy.delta:
        yield _wrong(f"its delta is {receipt.delta:g}, the plan's {plan.privacy.delta:g}")
    releases = [*_about_releases(receipt, plan)]
    yield from releases
    if not any(one.kind == "wrong" for one in releases):
        yield from _about_epsilon(receipt, plan)


def _about_models(receipt: Receipt, plan: Plan) -> Iterator[Finding]:
    pinned = {entry.name: entry.sha256 for entry in plan.candidates}
    if set(receipt.models) != set(pinned):
        yield _wrong(f"its models are {', '.join(sorted(receipt.models)) or 'none'}, the plan's {', '.join(sorted(pinned))}")
    for name in sorted(set(receipt.models) & set(pinned)):
        if pinned[name] not in (None, receipt.models[name]):
            yield _wrong(f"model {name} has other weights than the plan pins")


def _about_releases(receipt: Receipt, plan: Plan) -> Iterator[Finding]:
    for request_id, times in Counter(one.request_id for one in receipt.left).items():
        if times > 1:
            yield _wrong(f"release {request_id} is listed {times} times")
    for one in receipt.left:
        if not one.request_id.startswith(f"{receipt.campaign}/"):
            yield _wrong(f"release {one.request_id} is none of this campaign")
        fault = fault_of(one, plan)
        if fault is not None:
            yield _wrong(f"release {one.request_id}: {fault}")
    asked = Counter(one.stage for one in receipt.left)
    for stage, most in _most(plan).items():
        if asked[stage] > most:
            yield Finding("note", f"{asked[stage]} releases of the stage {stage} were asked, the plan speaks of {most} at most")


def fault_of(one: Left, plan: Plan) -> str | None:
    """Why a release is none that this plan's stages make, or None."""
    kind = REQUESTS.get(one.stage)
    if kind is None:
        return f"nothing of a record leaves in the stage {one.stage}"
    try:
        event_from_json(one.event)
        multiplier = noise_multiplier_of(one.event)
    except (ValueError, RecursionError):
        return "its event is none that this version can account for"
    if multiplier < MIN_NOISE_MULTIPLIER:
        return f"its noise multiplier is {multiplier:g}: no plan is paid for with so little noise"
    fields: dict[str, Any] = {"noise_multiplier": multiplier}  # nothing else of a request decides what answering it releases
    partition, event, count = described(kind.model_construct(**fields), plan)
    if one.partition != partition:
        return f"the stage {one.stage} is about {partition} records, found {one.partition} ones"
    if one.event != event:
        return f"the plan's {one.stage} is {in_words(event)}, found {one.event[:200]!r}"
    if one.count != count:
        return f"the plan's {one.stage} counts {count} a release, found {one.count}"
    return None


def _about_epsilon(receipt: Receipt, plan: Plan) -> Iterator[Finding]:
    rows = rows_of(receipt)
    if len({row.event for row in rows}) > MAX_KINDS or _squared_mu(rows) > MAX_SQUARED_MU:
        yield _wrong("its releases cost more than any plan allows: their epsilon is not computed again")
        return
    found: dict[Stage, float] = {}
    for stage in dict.fromkeys(row.stage for row in rows):
        found[stage] = epsilon_of_rows((row for row in rows if row.stage == stage), plan.privacy.delta)
    if set(found) != set(receipt.epsilon_by_stage):
        yield _wrong("it gives an epsilon for other stages than released something")
    for stage in set(found) & set(receipt.epsilon_by_stage):
        if not _same(found[stage], receipt.epsilon_by_stage[stage]):
            yield _wrong(
                f"{stage}: it says epsilon {receipt.epsilon_by_stage[stage]:.9g}, its releases cost {found[stage]:.9g}"
            )
    epsilon = epsilon_of_rows(rows, plan.privacy.delta)
    if not _same(epsilon, receipt.epsilon):
        yield _wrong(f"it says epsilon {receipt.epsilon:.9g}, its releases cost {epsilon:.9g}")
    if epsilon > plan.privacy.epsilon * (1 + TOLERANCE):
        yield Finding("note", f"MORE THAN THE PLAN: epsilon {epsilon:.6g} was spent, the plan allows {plan.privacy.epsilon:g}")


def rows_of(receipt: Receipt) -> tuple[SpentRow, ...]:
    """The releases of a receipt, equal events of a stage merged, as statements have them."""
    counts: Counter[tuple[Stage, Literal["tuning", "heldout"], str]] = Counter()
    for one in receipt.left:
        counts[one.stage, one.partition, one.event] += one.count
    return tuple(SpentRow(stage=key[0], partition=key[1], event=key[2], count=count) for key, count in counts.items())


def noise_multiplier_of(event: str) -> float:
    """Of an event that can be accounted for."""
    tree = json.loads(event)
    tree = tree["PoissonSampledDpEvent"]["event"] if "PoissonSampledDpEvent" in tree else tree
    return float(tree["GaussianDpEvent"]["noise_multiplier"])


def in_words(event: str) -> str:
    """An event that can be accounted for, as a person says it."""
    tree = json.loads(event)
    words = f"Gaussian, noise multiplier {noise_multiplier_of(event):.4g}"
    if "PoissonSampledDpEvent" in tree:
        words += f", of a Poisson sample of {tree['PoissonSampledDpEvent']['sampling_probability']:.4g}"
    return words


def _most(plan: Plan) -> dict[Stage, int]:
    """How many releases of each stage the plan pays for at most."""
    attempts, curve = plan.evaluation.max_attempts, plan.evaluation.num_curve_points
    runoff = plan.runoff.num_finalists * min(plan.runoff.num_rounds, plan.final.num_rounds)
    return {
        "ballot": plan.ballot.max_attempts,
        "runoff": runoff,
        "final": plan.final.num_rounds,
        "evaluation": curve + 2 * attempts,
    }


def _squared_mu(rows: Iterable[SpentRow]) -> float:
    """Of the Gaussian releases together; what Poisson samples add is left out."""
    plain = [row for row in rows if "PoissonSampledDpEvent" not in row.event]
    return sum(row.count / noise_multiplier_of(row.event) ** 2 for row in plain)


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _wrong(text: str) -> Finding:
    return Finding("wrong", text)
