"""How the plan's epsilon is divided: noise multipliers of every stage, from public numbers only.

Tuning records: the ballot takes a part of the squared Gaussian-DP mu, training takes what is then left by PLD. Held-out
records compose in parallel with them, so evaluation may use the whole epsilon again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from urna.privacy.accounting import gaussian, mu_for, noise_multiplier_for
from urna.protocol.errors import PlanError
from urna.protocol.plan import Plan

Events = Iterable[str] | Mapping[str, int]  # descriptions, repeated or with their counts


def ballot_noise_multiplier(plan: Plan) -> float:
    """1 / mu_s with mu_s^2 = budget_fraction * mu_total^2."""
    return 1 / (math.sqrt(plan.ballot.budget_fraction) * mu_for(plan.privacy.epsilon, plan.privacy.delta))


def training_noise_multiplier(plan: Plan, num_rounds: int, spent: Events) -> float:
    """What lets ``num_rounds`` rounds of the plan fit beside the events that the tuning records have spent.

    Raises:
        PlanError: the plan's epsilon cannot pay for that.
    """
    privacy = plan.privacy
    steps = num_rounds * plan.final.local_steps
    try:
        return noise_multiplier_for(privacy.epsilon, privacy.delta, steps, plan.final.sample_rate, spent)
    except ValueError as error:
        raise PlanError(
            f"privacy.epsilon: {privacy.epsilon:g} cannot pay for ballot and {steps} training steps: {error}"
        ) from None


def check_affordable(plan: Plan) -> None:
    """Whether the plan's epsilon pays for all that it may ask, before anything is begun.

    Raises:
        PlanError: it does not.
    """
    ballots = Counter({gaussian(ballot_noise_multiplier(plan)): plan.ballot.max_attempts})
    training_noise_multiplier(plan, plan.max_planned_count, ballots if len(plan.candidates) > 1 else Counter())


@dataclass(frozen=True)
class EvaluationBudget:
    """Noise multipliers of one release of each kind on held-out records; an unused kind is infinite."""

    curve: float
    runoff: float


def evaluation_budget(plan: Plan) -> EvaluationBudget:
    """Noise of one curve point and of one comparison of finalists, from their parts of the held-out records' squared mu."""
    settings = plan.evaluation
    squared = mu_for(plan.privacy.epsilon, plan.privacy.delta) ** 2
    curve = squared * settings.curve_budget_fraction
    runoff = squared * settings.runoff_budget_fraction if plan.ballot.if_undecided == "runoff" else 0.0
    return EvaluationBudget(_multiplier(curve, settings.num_curve_points), _multiplier(runoff, settings.max_attempts))


def final_counts_noise_multiplier(plan: Plan, spent: Events, *, last_attempt: bool) -> float:
    """Noise of the final counts: what the held-out records have left; a first attempt keeps a fifth back for another.

    What is left is found by PLD, as the sites' ledgers will: squared mus alone come out too large by a thousandth.

    Raises:
        PlanError: nothing is left.
    """
    privacy = plan.privacy
    try:
        smallest = noise_multiplier_for(privacy.epsilon, privacy.delta, 1, 1.0, spent)
    except ValueError as error:
        raise PlanError(f"evaluation: nothing is left for the final counts: {error}") from None
    return smallest if last_attempt else smallest / math.sqrt(0.8)


def _multiplier(squared_mu: float, count: int) -> float:
    """Noise multiplier of one of ``count`` Gaussian releases that share ``squared_mu``; a thousandth is kept as margin."""
    return math.sqrt(count / squared_mu) * 1.001 if squared_mu > 0 and count else math.inf
