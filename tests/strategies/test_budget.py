"""Every stage's noise together, as the sites' ledgers will count it: by PLD, and never above the plan's epsilon."""

import math
from typing import Any

import pytest

from urna.privacy.accounting import epsilon_of, gaussian, gaussian_delta, mu_for, subsampled_gaussian
from urna.protocol.errors import PlanError
from urna.protocol.plan import Plan
from urna.strategies.budget import (
    ballot_noise_multiplier,
    evaluation_budget,
    final_counts_noise_multiplier,
    training_noise_multiplier,
)

PLAN: dict[str, Any] = {
    "name": "any",
    "task": {"num_classes": 10},
    "candidates": [{"name": "cnn"}, {"name": "pixels"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 1797},
    "final": {"num_rounds": 40, "sample_rate": 0.25, "learning_rate": 0.05},
}


def a_plan(**sections: dict[str, Any]) -> Plan:
    return Plan.model_validate(PLAN | {name: PLAN.get(name, {}) | section for name, section in sections.items()})


def evaluation_events(plan: Plan) -> list[str]:
    """Everything that held-out records can be asked: all curve points and every attempt of everything."""
    settings, budget = plan.evaluation, evaluation_budget(plan)
    events = [gaussian(budget.curve)] * settings.num_curve_points if settings.num_curve_points else []
    if plan.ballot.if_undecided == "runoff":
        events += [gaussian(budget.runoff)] * settings.max_attempts
    for attempt in range(1, settings.max_attempts + 1):
        last = attempt == settings.max_attempts
        events.append(gaussian(final_counts_noise_multiplier(plan, events, last_attempt=last)))
    return events


def test_the_ballot_takes_its_part_of_the_squared_mu() -> None:
    plan = a_plan(ballot={"budget_fraction": 0.15})
    mu = 1 / ballot_noise_multiplier(plan)
    assert mu**2 == pytest.approx(0.15 * mu_for(3.0, 1e-5) ** 2, rel=1e-12)
    assert gaussian_delta(mu / math.sqrt(0.15), 3.0) <= 1e-5


@pytest.mark.parametrize("epsilon", [0.3, 3.0])
@pytest.mark.parametrize(("sample_rate", "num_rounds"), [(0.05, 400), (0.25, 40), (1.0, 1)])
@pytest.mark.parametrize("attempts", [0, 2])
def test_ballots_and_training_fit_into_the_plan(epsilon: float, sample_rate: float, num_rounds: int, attempts: int) -> None:
    plan = a_plan(privacy={"epsilon": epsilon}, final={"sample_rate": sample_rate, "num_rounds": num_rounds})
    ballots = [gaussian(ballot_noise_multiplier(plan))] * attempts
    steps = [subsampled_gaussian(sample_rate, training_noise_multiplier(plan, num_rounds, ballots))] * num_rounds
    assert 0.99 * epsilon < epsilon_of(ballots + steps, 1e-5) <= epsilon


def test_every_local_step_of_every_round_is_paid_for() -> None:
    plan = a_plan(privacy={"noise": "local"}, final={"local_steps": 7})
    multiplier = training_noise_multiplier(plan, 10, [])
    assert epsilon_of([subsampled_gaussian(0.25, multiplier)] * 70, 1e-5) <= 3.0
    assert epsilon_of([subsampled_gaussian(0.25, multiplier)] * 72, 1e-5) > 3.0


def test_a_spent_budget_leaves_nothing_for_training() -> None:
    with pytest.raises(PlanError, match=r"privacy.epsilon: 3 cannot pay .* of 3 is taken by earlier releases: raise epsilon"):
        training_noise_multiplier(a_plan(), 10, [gaussian(0.5)])


GRID = [  # epsilon, delta, curve points, attempts, if undecided
    (0.1, 1e-5, 4, 2, "runoff"),
    (0.1, 1e-9, 4, 2, "prior"),
    (1.0, 1e-9, 20, 5, "runoff"),
    (3.0, 1e-5, 4, 2, "runoff"),
    (3.0, 1e-5, 0, 1, "prior"),
    (8.0, 1e-7, 4, 1, "runoff"),
]


@pytest.mark.parametrize(("epsilon", "delta", "points", "attempts", "if_undecided"), GRID)
def test_all_evaluations_fit_into_the_plan(epsilon: float, delta: float, points: int, attempts: int, if_undecided: str) -> None:
    plan = a_plan(
        privacy={"epsilon": epsilon, "delta": delta},
        evaluation={"num_curve_points": points, "max_attempts": attempts},
        ballot={"if_undecided": if_undecided},
    )
    assert 0.98 * epsilon < epsilon_of(evaluation_events(plan), delta) <= epsilon


def test_curve_and_runoff_take_their_parts() -> None:
    plan = a_plan(
        evaluation={"num_curve_points": 4, "max_attempts": 2, "curve_budget_fraction": 0.2, "runoff_budget_fraction": 0.3}
    )
    budget, whole = evaluation_budget(plan), mu_for(3.0, 1e-5) ** 2
    assert 4 / budget.curve**2 == pytest.approx(0.2 * whole, rel=3e-3)
    assert 4 / budget.curve**2 < 0.2 * whole
    assert 2 / budget.runoff**2 == pytest.approx(0.3 * whole, rel=3e-3)
    assert 2 / budget.runoff**2 < 0.3 * whole


def test_what_is_not_used_costs_nothing() -> None:
    budget = evaluation_budget(a_plan(evaluation={"num_curve_points": 0}, ballot={"if_undecided": "prior"}))
    assert (budget.curve, budget.runoff) == (math.inf, math.inf)


def test_a_first_attempt_keeps_a_fifth_back_and_the_last_takes_all() -> None:
    plan, whole = a_plan(), mu_for(3.0, 1e-5) ** 2
    first = final_counts_noise_multiplier(plan, [], last_attempt=False)
    assert first**-2 == pytest.approx(0.8 * whole, rel=3e-3)
    second = final_counts_noise_multiplier(plan, [gaussian(first)], last_attempt=True)
    assert second**-2 == pytest.approx(0.2 * whole, rel=2e-2)
    assert final_counts_noise_multiplier(plan, [], last_attempt=True) < first


def test_final_counts_of_a_spent_budget_are_an_error() -> None:
    with pytest.raises(PlanError, match=r"nothing is left for the final counts: .* of 3 is taken"):
        final_counts_noise_multiplier(a_plan(), [gaussian(0.5)], last_attempt=True)
