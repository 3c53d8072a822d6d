"""How the plan's epsilon is divided: noise multipliers of every stage, from public numbers only.

Tuning records: the ballot takes a part of the squared Gaussian-DP mu, training takes what is then left by PLD. Held-out
records compose in parallel with them, so evaluation may use the whole epsilon again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from urna.privacy.accounting import mu_for, noise_multiplier_for
from urna.protocol.plan import Plan


def ballot_noise_multiplier(plan: Plan) -> float:
    """1 / mu_s with mu_s^2 = budget_fraction * mu_total^2."""
    return 1 / (math.sqrt(plan.ballot.budget_fraction) * mu_for(plan.privacy.epsilon, plan.privacy.delta))


def training_noise_multiplier(plan: Plan, num_rounds: int, spent: Iterable[str]) -> float:
    """What lets ``num_rounds`` rounds of the plan fit beside the events that the tuning records have spent.

    Raises:
        ValueError: nothing is left.
    """
    privacy = plan.privacy
    steps = num_rounds * plan.final.local_steps
    return noise_multiplier_for(privacy.epsilon, privacy.delta, steps, plan.final.sample_rate, spent)


@dataclass(frozen=True)
class EvaluationBudget:
    """Noise multipliers of one release of each kind on held-out records, such that all planned ones fit."""

    curve: float
    runoff: float
    final: float


def evaluation_budget(plan: Plan) -> EvaluationBudget:
    """Divide the held-out records' squared mu: curve points, the runoff's comparison, and the final counts."""
    settings = plan.evaluation
    squared = mu_for(plan.privacy.epsilon, plan.privacy.delta) ** 2
    curve = squared * settings.curve_budget_fraction if settings.num_curve_points else 0.0
    runoff = squared * settings.runoff_budget_fraction if plan.ballot.if_undecided == "runoff" else 0.0
    final = squared - curve - runoff

    def share(part: float, count: int) -> float:
        return math.sqrt(count / part) * (1 + 1e-6) if part else math.inf  # rounded up

    attempts = settings.max_attempts
    return EvaluationBudget(share(curve, settings.num_curve_points), share(runoff, attempts), share(final, attempts))
