from typing import Any

import numpy as np
import pytest
import torch

from urna.protocol.plan import Final
from urna.strategies.aggregation import BETA1, BETA2, MOMENTUM, TAU, OptimizerState, apply, combine

SIZE, STEPS = 40, 60
OPTIMIZERS = ("sgd", "momentum", "adam", "yogi", "adagrad")
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


def a_final(optimizer: str = "adam", learning_rate: float = 0.05, **more: Any) -> Final:
    return Final.model_validate(
        {"num_rounds": 1, "sample_rate": 0.5, "optimizer": optimizer, "learning_rate": learning_rate, **more}
    )


def gradients(smallest: float = -6) -> list[Vector]:
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.uniform(smallest, 3, STEPS)
    return [generator.normal(size=SIZE) * scale for scale in scales]


@pytest.mark.parametrize("learning_rate", [0.001, 0.05, 1.0, 2.0])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_every_step_equals_torchs(optimizer: str, learning_rate: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    references = {
        "sgd": torch.optim.SGD([parameter], lr=learning_rate),
        "momentum": torch.optim.SGD([parameter], lr=learning_rate, momentum=MOMENTUM),
        "adam": torch.optim.Adam([parameter], lr=learning_rate),
    }
    state = OptimizerState.start(SIZE)
    # torch adds its epsilon before the bias correction, Flower after it: alike to 1e-6 while gradients are not tiny
    tolerance, smallest = (1e-6, 0.0) if optimizer == "adam" else (1e-9, -6.0)
    for number, gradient in enumerate(gradients(smallest), start=1):
        parameter.grad = torch.from_numpy(gradient.copy())
        references[optimizer].step()
        state = apply(state, gradient, a_final(optimizer, learning_rate))
        # Flower sees old and new vector and takes their difference: its rounding is relative to the vector
        scale = np.abs(state.vector).max()
        np.testing.assert_allclose(state.vector, parameter.detach().numpy(), rtol=tolerance, atol=scale * tolerance)
        assert state.step == number


def test_adagrad_and_yogi_follow_the_paper() -> None:
    """Reddi et al. 2021, algorithm 2, written down independently."""
    for optimizer in ("adagrad", "yogi"):
        state = OptimizerState.start(SIZE)
        vector, first, second = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
        beta1 = BETA1 if optimizer == "yogi" else 0.0
        for gradient in gradients(-2):
            state = apply(state, gradient, a_final(optimizer))
            delta = -gradient
            first = beta1 * first + (1 - beta1) * delta
            square = delta**2
            yogi = second - (1 - BETA2) * square * np.sign(second - square)
            second = second + square if optimizer == "adagrad" else yogi
            vector = vector + 0.05 * first / (np.sqrt(second) + TAU)
            np.testing.assert_allclose(state.vector, vector, rtol=1e-6, atol=1e-9)


def test_a_head_starts_at_zero_and_favours_no_class() -> None:
    state = OptimizerState.start(SIZE)
    assert not state.vector.any()
    assert state.step == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_zero_gradient_moves_nothing(optimizer: str) -> None:
    assert not apply(OptimizerState.start(SIZE), np.zeros(SIZE), a_final(optimizer)).vector.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sum_that_is_not_finite_is_refused(optimizer: str, bad: float) -> None:
    gradient = np.zeros(SIZE)
    gradient[7] = bad
    with pytest.raises(ValueError, match="expected a finite gradient, found NaN or infinity"):
        apply(OptimizerState.start(SIZE), gradient, a_final(optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_leaves_the_state_before_it_as_it_was(optimizer: str) -> None:
    before = apply(OptimizerState.start(SIZE), np.ones(SIZE), a_final(optimizer))
    copies = [part.copy() for part in (before.vector, before.first, before.second)]
    apply(before, np.ones(SIZE), a_final(optimizer))
    for part, copy in zip((before.vector, before.first, before.second), copies, strict=True):
        np.testing.assert_array_equal(part, copy)


RULES = ("median", "trimmed_mean", "krum", "bulyan")


def honest(count: int) -> dict[str, Vector]:
    generator = np.random.default_rng(1)
    return {f"site-{at}": 1 + 0.1 * generator.normal(size=SIZE) for at in range(count)}


@pytest.mark.parametrize("rule", RULES)
def test_one_poisoned_update_does_not_move_a_robust_rule(rule: str) -> None:
    changes = honest(7)
    changes["site-3"] = np.full(SIZE, -1e6)
    robust = combine(changes, a_final(aggregation=rule))
    assert np.abs(robust - 1).max() < 0.5
    assert np.abs(sum(changes.values()) / 7 - 1).max() > 1e5  # the mean it does move


def test_the_rules_are_what_their_names_say() -> None:
    changes = honest(7)
    stacked = np.stack(list(changes.values()))
    np.testing.assert_allclose(combine(changes, a_final(aggregation="median")), np.median(stacked, axis=0))
    trimmed = np.sort(stacked, axis=0)[1:-1].mean(axis=0)
    np.testing.assert_allclose(combine(changes, a_final(aggregation="trimmed_mean")), trimmed)
    krum = combine(changes, a_final(aggregation="krum"))
    assert min(np.abs(stacked - krum).max(axis=1)) < 1e-12  # one of them


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_with_too_few_sites_is_refused(rule: str) -> None:
    final = a_final(aggregation=rule, num_malicious_sites=2)
    with pytest.raises(ValueError, match=f"expected at least {final.min_robust_sites} sites for '{rule}', found 4"):
        combine(honest(4), final)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_schedule_scales_the_rate_and_nothing_else(optimizer: str) -> None:
    gradient = np.random.default_rng(3).normal(size=SIZE)
    plan = {"num_rounds": 1, "sample_rate": 0.5, "optimizer": optimizer}
    scheduled = apply(OptimizerState.start(SIZE), gradient, Final(**plan, learning_rate=0.2), 0.25)
    lower = apply(OptimizerState.start(SIZE), gradient, Final(**plan, learning_rate=0.05))
    np.testing.assert_allclose(scheduled.vector, lower.vector, rtol=1e-12)
    np.testing.assert_allclose(scheduled.first, lower.first, rtol=1e-12)
