from typing import Any

import numpy as np
import pytest
import torch

from urna.protocol.plan import Final
from urna.strategies.aggregation import OptimizerState, apply

SIZE, STEPS = 40, 60


def a_final(optimizer: str, learning_rate: float = 0.05) -> Final:
    fields: dict[str, Any] = {"num_rounds": 1, "sample_rate": 0.5}
    return Final(optimizer=optimizer, learning_rate=learning_rate, **fields)


def gradients() -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.uniform(-6, 3, STEPS)
    return [generator.normal(size=SIZE) * scale for scale in scales]


@pytest.mark.parametrize("learning_rate", [0.001, 0.05, 2.0])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_step_equals_torchs(optimizer: str, learning_rate: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    reference = kinds[optimizer]([parameter], lr=learning_rate)
    state = OptimizerState.start(SIZE)
    for number, gradient in enumerate(gradients(), start=1):
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        state = apply(state, gradient, a_final(optimizer, learning_rate))
        np.testing.assert_allclose(state.vector, parameter.detach().numpy(), rtol=1e-10, atol=1e-12)
        assert state.step == number


def test_a_head_starts_at_zero_and_favours_no_class() -> None:
    state = OptimizerState.start(SIZE)
    assert not state.vector.any()
    assert state.step == 0


def test_a_zero_gradient_moves_nothing() -> None:
    for optimizer in ("adam", "sgd"):
        assert not apply(OptimizerState.start(SIZE), np.zeros(SIZE), a_final(optimizer)).vector.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_sum_that_is_not_finite_is_refused(optimizer: str, bad: float) -> None:
    gradient = np.zeros(SIZE)
    gradient[7] = bad
    with pytest.raises(ValueError, match="expected a finite gradient, found NaN or infinity"):
        apply(OptimizerState.start(SIZE), gradient, a_final(optimizer))


def test_a_step_leaves_the_state_before_it_as_it_was() -> None:
    before = apply(OptimizerState.start(SIZE), np.ones(SIZE), a_final("adam"))
    copies = [part.copy() for part in (before.vector, before.first, before.second)]
    apply(before, np.ones(SIZE), a_final("adam"))
    for part, copy in zip((before.vector, before.first, before.second), copies, strict=True):
        np.testing.assert_array_equal(part, copy)
