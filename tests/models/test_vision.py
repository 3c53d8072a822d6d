import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from urna.models.catalogue import CATALOGUE, spec
from urna.models.vision import adapt, build
from urna.protocol.errors import ModelError


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_architecture_yields_features_of_its_declared_size(name: str) -> None:
    with torch.no_grad():
        features = build(name)(torch.rand(3, *spec(name).input_shape))
    assert features.shape == (3, spec(name).feature_dim)
    assert features.dtype == torch.float32


@settings(deadline=None, max_examples=30)
@given(number=st.integers(0, 4), side=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_square_image_becomes_eight_by_eight_within_range(number: int, side: int, seed: int) -> None:
    adapted = adapt(np.random.default_rng(seed).random((number, side, side)))
    assert adapted.shape == (number, 1, 8, 8)
    assert adapted.dtype == torch.float32
    assert adapted.is_contiguous()
    assert bool(((adapted >= 0) & (adapted <= 1 + 1e-6)).all())


def test_large_images_are_averaged_over_blocks() -> None:
    images = np.random.default_rng(0).random((2, 32, 32))
    blocks = images.reshape(2, 8, 4, 8, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(adapt(images)[:, 0].numpy(), blocks, atol=1e-6)


def test_a_record_is_adapted_the_same_alone_and_in_company() -> None:
    images = np.random.default_rng(0).random((5, 11, 11))
    assert torch.equal(adapt(images)[2:3], adapt(images[2:3]))


def test_images_that_may_not_be_written_are_read_and_left_alone() -> None:
    images = np.random.default_rng(0).random((2, 8, 8)).astype(np.float32)
    images.flags.writeable = False
    adapted = adapt(images)
    adapted += 1.0
    assert images.max() <= 1.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8), np.int64), "must be floating point in .0, 1., found int64"),
        (np.zeros((1, 8, 9)), r"found shape \(1, 8, 9\)"),
        (np.zeros((8, 8)), r"found shape \(8, 8\)"),
        (np.zeros((1, 3, 8, 8)), r"found shape \(1, 3, 8, 8\)"),
        (np.zeros((2, 0, 0)), r"found shape \(2, 0, 0\)"),
        (np.full((1, 8, 8), 16.0), "found 16 to 16: divide by the largest grey value"),
        (np.full((1, 8, 8), -0.1), "found -0.1 to -0.1"),
        (np.full((1, 8, 8), np.nan), "found nan to nan"),
    ],
)
def test_images_that_are_not_square_grey_and_within_range_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapt(images)
