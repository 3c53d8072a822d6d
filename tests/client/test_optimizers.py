"""The sites' optimiser in closed form, and the plan's schedule: both of public numbers and noisy gradients only."""

import math
from typing import Any

import numpy as np
import pytest

from tests.client.clinic import a_plan
from tests.client.kinds import HEAD, head_records
from urna.client.optimizers import LocalOptimizer
from urna.client.training import local_steps
from urna.privacy.mechanisms import Floats
from urna.protocol.plan import Final

SIZE, STEPS, RATE = 30, 12, 0.05
GRADIENTS = np.random.default_rng(0).normal(size=(STEPS, SIZE))
START = np.random.default_rng(1).normal(size=SIZE)


def a_final(**changes: Any) -> Final:
    return Final(**({"num_rounds": 10, "sample_rate": 0.5, "learning_rate": 1.0, "local_learning_rate": RATE} | changes))


def taken(final: Final, factors: Floats | None = None) -> Floats:
    optimizer = LocalOptimizer(START, final)
    for gradient, factor in zip(GRADIENTS, np.ones(STEPS) if factors is None else factors, strict=True):
        optimizer.step(gradient.copy(), float(factor))
    return optimizer.vector


def adam(weight_decay: float = 0.0) -> Floats:
    """Kingma, Ba 2015, algorithm 1; the decay decoupled as in Loshchilov, Hutter 2019, algorithm 2."""
    vector, first, second = START.copy(), np.zeros(SIZE), np.zeros(SIZE)
    for step, gradient in enumerate(GRADIENTS, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        vector = vector * (1 - RATE * weight_decay)
        vector = vector - RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return vector


def test_sgd_is_a_sum_of_gradients() -> None:
    np.testing.assert_allclose(taken(a_final()), START - RATE * GRADIENTS.sum(axis=0), rtol=1e-12)


def test_momentum_adds_up_a_geometric_series() -> None:
    weights = np.array([sum(0.9**power for power in range(STEPS - at)) for at in range(STEPS)])
    expected = START - RATE * (weights[:, None] * GRADIENTS).sum(axis=0)
    np.testing.assert_allclose(taken(a_final(local_optimizer="momentum")), expected, rtol=1e-12)


def test_adam_is_that_of_the_paper() -> None:
    np.testing.assert_allclose(taken(a_final(local_optimizer="adam")), adam(), rtol=1e-9)


def test_weight_decay_shrinks_the_offset_beside_the_moments() -> None:
    final = a_final(local_optimizer="adamw", local_weight_decay=0.5)
    np.testing.assert_allclose(taken(final), adam(0.5), rtol=1e-9)


def test_a_step_is_taken_at_the_rate_of_its_place() -> None:
    factors = np.linspace(1, 0.1, STEPS)
    np.testing.assert_allclose(taken(a_final(), factors), START - RATE * factors @ GRADIENTS, rtol=1e-12)


def test_the_global_vector_and_the_gradients_are_left_as_they_were() -> None:
    start, gradient = START.copy(), GRADIENTS[0].copy()
    optimizer = LocalOptimizer(start, a_final(local_optimizer="adamw", local_weight_decay=0.1))
    optimizer.step(gradient, 1.0)
    np.testing.assert_array_equal(start, START)
    np.testing.assert_array_equal(gradient, GRADIENTS[0])


# --- the schedule


def factors_of(**changes: Any) -> list[float]:
    final = a_final(**changes)
    pairs = [(index, step) for index in range(1, final.num_rounds + 1) for step in range(final.local_steps)]
    return [final.learning_rate_factor(index, step) for index, step in pairs]


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_rises_then_falls_and_is_never_zero_nor_above_one(schedule: str, warmup: float, local_steps: int) -> None:
    factors = factors_of(schedule=schedule, warmup_fraction=warmup, local_steps=local_steps)
    assert all(0 < one <= 1 for one in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == pytest.approx(1, abs=0.1 + 1 / len(factors))
    if schedule != "constant" and len(factors) * (1 - warmup) > 2:
        assert factors[-1] < 0.6


def test_schedules_are_those_that_their_names_say() -> None:
    assert factors_of() == [1.0] * 10
    np.testing.assert_allclose(factors_of(schedule="linear"), np.arange(10, 0, -1) / 10)
    np.testing.assert_allclose(factors_of(schedule="cosine"), [0.5 + 0.5 * math.cos(math.pi * at / 10) for at in range(10)])
    np.testing.assert_allclose(factors_of(warmup_fraction=0.4), [0.25, 0.5, 0.75, *[1.0] * 7])


def test_local_steps_of_two_rounds_are_those_of_one_round_that_is_twice_as_long() -> None:
    """Plain SGD has no moments, so cutting a run into rounds changes nothing if the place of each step is right."""
    common: dict[str, Any] = {"sample_rate": 1.0, "local_learning_rate": 0.5, "schedule": "linear"}
    plans = [
        a_plan(privacy={"noise": "local"}, final=common | {"num_rounds": rounds, "local_steps": 6 // rounds})
        for rounds in (1, 2)
    ]
    data, vector = head_records(20), HEAD.vector()
    whole = local_steps(data, vector, plans[0], 1e-5, 20.0)
    first = local_steps(data, vector, plans[1], 1e-5, 20.0, index=1)
    second = local_steps(data, (vector + first).astype(np.float32), plans[1], 1e-5, 20.0, index=2)
    np.testing.assert_allclose(first + second, whole, atol=1e-5)


def test_moments_start_afresh_in_every_round() -> None:
    """Adam's first step is as long as its rate whatever the gradient; one with moments of an earlier round is not."""
    final = {
        "sample_rate": 1.0,
        "local_steps": 1,
        "local_optimizer": "adam",
        "local_learning_rate": 0.01,
        "max_grad_norm": 10.0,
    }
    plan, vector = a_plan(privacy={"noise": "local"}, final=final), HEAD.vector()
    for seed in (0, 1, 2):
        change = local_steps(head_records(20, seed), vector, plan, 1e-5, 20.0, index=seed + 1)
        np.testing.assert_allclose(np.abs(change), 0.01, rtol=1e-2)
