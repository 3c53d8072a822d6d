import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from urna.models.tuning import (
    HEAD_FEATURE_NORM,
    head_from_vector,
    normalise_for_head,
    per_example_gradients,
    predict_logits,
    trainable_size,
    vector_from_head,
    zero_head,
)
from urna.protocol.errors import ModelError

sizes = st.integers(1, 12)


def random_vector(feature_dim: int, num_classes: int, seed: int = 0) -> NDArray[np.float32]:
    size = trainable_size(feature_dim, num_classes)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@given(feature_dim=sizes, num_classes=sizes, seed=st.integers(0, 99))
def test_a_head_and_its_vector_hold_the_same_numbers(feature_dim: int, num_classes: int, seed: int) -> None:
    vector = random_vector(feature_dim, num_classes, seed)
    head = head_from_vector(vector, feature_dim, num_classes)
    assert sum(parameter.numel() for parameter in head.parameters()) == trainable_size(feature_dim, num_classes)
    np.testing.assert_array_equal(vector_from_head(head), vector)


def test_the_vector_is_the_weight_row_by_row_then_the_bias() -> None:
    head = head_from_vector(np.arange(8, dtype=np.float32), feature_dim=3, num_classes=2)
    assert head.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert head.bias.tolist() == [6, 7]


def test_a_head_and_its_vector_share_no_memory() -> None:
    vector = random_vector(3, 2)
    head = head_from_vector(vector, 3, 2)
    before, out = vector.copy(), vector_from_head(head)
    out += 1.0
    vector += 2.0
    np.testing.assert_array_equal(vector_from_head(head), before)


def test_the_first_head_is_zero_and_favours_no_class() -> None:
    logits = zero_head(5, 4)(torch.rand(3, 5))
    assert torch.equal(logits, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros(9, np.float32), r"3-to-2 head must be float32 \(8,\), found float32 \(9,\)"),
        (np.zeros(8, np.float64), r"found float64 \(8,\)"),
        (np.zeros((2, 4), np.float32), r"found float32 \(2, 4\)"),
        (np.full(8, np.nan, np.float32), "must be finite"),
    ],
)
def test_a_vector_of_another_head_is_refused(vector: NDArray[np.float32], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        head_from_vector(vector, 3, 2)


@given(number=st.integers(0, 6), feature_dim=sizes, scale=st.floats(1e-30, 1e18), seed=st.integers(0, 99))
def test_every_record_has_the_same_norm_before_the_head(number: int, feature_dim: int, scale: float, seed: int) -> None:
    raw = np.random.default_rng(seed).normal(size=(number, feature_dim)) * scale
    normalised = normalise_for_head(raw.astype(np.float32))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(normalised, axis=1), HEAD_FEATURE_NORM, rtol=1e-5)


def test_a_record_without_features_stays_zero() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    np.testing.assert_allclose(normalise_for_head(features), [[0.0, 0.0], [1.8, 2.4]], rtol=1e-6)


def test_normalising_is_record_by_record() -> None:
    features = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_array_equal(normalise_for_head(features)[3:5], normalise_for_head(features[3:5]))


@settings(deadline=None, max_examples=25)
@given(number=st.integers(1, 6), feature_dim=sizes, num_classes=st.integers(2, 6), seed=st.integers(0, 99))
def test_per_example_gradients_match_a_one_example_loop(number: int, feature_dim: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = head_from_vector(random_vector(feature_dim, num_classes, seed), feature_dim, num_classes)
    features = torch.randn((number, feature_dim), generator=generator)
    labels = torch.randint(num_classes, (number,), generator=generator)
    found = per_example_gradients(head, features, labels)
    for i in range(number):
        loss = functional.cross_entropy(head(features[i : i + 1]), labels[i : i + 1])
        weight, bias = torch.autograd.grad(loss, (head.weight, head.bias))
        torch.testing.assert_close(found[i], torch.cat([weight.flatten(), bias]), atol=1e-5, rtol=1e-4)


def test_an_empty_sample_gives_no_gradients_and_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: nn.Linear, features: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{self} saw {features.shape}")

    monkeypatch.setattr(nn.Linear, "forward", never)
    gradients = per_example_gradients(zero_head(5, 3), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert gradients.shape == (0, 18)


def test_asking_for_gradients_leaves_head_and_features_as_they_were() -> None:
    head, features = head_from_vector(random_vector(5, 3), 5, 3), torch.rand(4, 5)
    before = vector_from_head(head)
    per_example_gradients(head, features, torch.tensor([0, 1, 2, 0]))
    np.testing.assert_array_equal(vector_from_head(head), before)
    assert not features.requires_grad
    assert features.grad is None
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in head.parameters())


def test_logits_are_those_of_the_head() -> None:
    vector, features = random_vector(5, 3), np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    features.flags.writeable = False  # as a memory-mapped cache gives them
    weight, bias = vector[:15].reshape(3, 5), vector[15:]
    np.testing.assert_allclose(predict_logits(vector, features), features @ weight.T + bias, rtol=1e-5, atol=1e-5)
    assert predict_logits(vector, features[:0]).shape == (0, 3)


@pytest.mark.parametrize("size", [0, 17])
def test_a_vector_that_fits_no_number_of_classes_is_refused(size: int) -> None:
    with pytest.raises(ModelError, match=f"must have a multiple of 6 weights, found {size}"):
        predict_logits(np.zeros(size, np.float32), np.zeros((2, 5), np.float32))
