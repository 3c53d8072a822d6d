"""The public filter, which costs no privacy: what cannot win is not voted on."""

import math
from dataclasses import dataclass

from urna.models.catalogue import CandidateSpec
from urna.protocol.plan import Plan


@dataclass(frozen=True)
class Shortlisted:
    """One candidate's public numbers, and why it was dropped (empty: kept)."""

    name: str
    trainable_parameters: int
    noise_to_signal: float
    reasons: tuple[str, ...]


def shortlist(plan: Plan, candidates: list[CandidateSpec], noise_multiplier: float) -> list[Shortlisted]:
    """Judge every candidate by task, modality, licence, size and noise-to-signal ratio, in the plan's order.

    The ratio is noise_multiplier * sqrt(p) / (sample_rate * n): the norm of one step's noise over the largest norm that
    the sum of clipped gradients can have; with local noise there are sqrt(sites) times as much of it.
    """
    return [_judge(plan, candidate, noise_multiplier) for candidate in candidates]


def _judge(plan: Plan, candidate: CandidateSpec, noise_multiplier: float) -> Shortlisted:
    rules = plan.shortlist
    trainable = (candidate.feature_dim + 1) * plan.task.num_classes
    shares = plan.federation.min_sites if plan.privacy.noise == "local" else 1
    ratio = noise_multiplier * math.sqrt(trainable * shares) / plan.expected_batch
    checks = [
        (plan.task.kind in candidate.tasks, f"does not do {plan.task.kind}"),
        (plan.task.modality == candidate.modality, f"reads {candidate.modality}, not {plan.task.modality}"),
        (candidate.licence in rules.licences, f"licence {candidate.licence} is not accepted"),
        (
            candidate.num_parameters <= rules.max_parameters,
            f"{candidate.num_parameters} parameters, more than {rules.max_parameters}",
        ),
        (
            ratio <= rules.max_noise_to_signal,
            f"noise-to-signal ratio {ratio:.2f}, more than {rules.max_noise_to_signal:g}: a head of {trainable} numbers drowns",
        ),
    ]
    return Shortlisted(candidate.name, trainable, ratio, tuple(reason for fine, reason in checks if not fine))
