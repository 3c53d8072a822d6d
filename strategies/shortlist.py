"""The public filter, which costs no privacy: what cannot win is not voted on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from urna.models.catalogue import CandidateSpec
from urna.models.sizes import TrainedSize, try_trained_size
from urna.protocol.plan import Plan

WHAT = {"head": "a head", "lora": "an adapter", "full": "a model"}  # of so many numbers


@dataclass(frozen=True)
class Shortlisted:
    """One candidate's public numbers, and why it was dropped (empty: kept)."""

    name: str
    trainable_parameters: int
    noise_to_signal: float
    reasons: tuple[str, ...]


def trained_sizes(plan: Plan, candidates: list[CandidateSpec]) -> dict[str, TrainedSize]:
    """How many numbers the plan trains of each candidate, and how; no weights are read of one that is dropped without them.

    Raises:
        ModelError: a candidate's weights have to be read for it, and are not installed.
    """
    final = plan.final
    return {
        one.name: try_trained_size(one.name, plan.task.num_classes, final.tuning, final.lora_rank)
        for one in candidates
        if final.tuning == "head" or not _dropped(plan, one)
    }


def shortlist(
    plan: Plan, candidates: list[CandidateSpec], noise_multiplier: float, sizes: Mapping[str, TrainedSize]
) -> list[Shortlisted]:
    """Judge every candidate by task, modality, licence, size and noise-to-signal ratio, in the plan's order.

    The ratio is noise_multiplier * sqrt(p) / (sample_rate * n), p what the plan's mode trains: the norm of one step's noise
    over the largest norm that the sum of clipped gradients can have; with local noise there is sqrt(sites) times as much.
    """
    return [_judge(plan, one, noise_multiplier, sizes.get(one.name, TrainedSize(0))) for one in candidates]


def _judge(plan: Plan, candidate: CandidateSpec, noise_multiplier: float, trained: TrainedSize) -> Shortlisted:
    trainable = trained.size
    shares = plan.federation.min_sites if plan.privacy.noise == "local" else 1
    drowned = f"{WHAT[plan.final.tuning]} of {trainable} numbers drowns"
    ratio = noise_multiplier * math.sqrt(trainable * shares) / plan.expected_batch
    highest = plan.shortlist.max_noise_to_signal
    checks = [
        (not trained.reason, f"cannot be tuned ({plan.final.tuning}): {trained.reason}"),
        (ratio <= highest, f"noise-to-signal ratio {ratio:.2f}, more than {highest:g}: {drowned}"),
    ]
    reasons = (*_dropped(plan, candidate), *(reason for fine, reason in checks if not fine))
    return Shortlisted(candidate.name, trainable, ratio, reasons)


def _dropped(plan: Plan, candidate: CandidateSpec) -> tuple[str, ...]:
    """Why a candidate is dropped by what the catalogue says of it."""
    rules = plan.shortlist
    checks = [
        (plan.task.kind in candidate.tasks, f"does not do {plan.task.kind}"),
        (plan.task.modality == candidate.modality, f"reads {candidate.modality}, not {plan.task.modality}"),
        (candidate.licence in rules.licences, f"licence {candidate.licence} is not accepted"),
        (
            candidate.num_parameters <= rules.max_parameters,
            f"{candidate.num_parameters} parameters, more than {rules.max_parameters}",
        ),
    ]
    return tuple(reason for fine, reason in checks if not fine)
