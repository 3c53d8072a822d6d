import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from urna.privacy.counts import CountLayout
from urna.privacy.mechanisms import Floats, standard_normal


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[CountLayout, NDArray[np.int64], NDArray[np.int64]]:
    classes, models, n = draw(st.integers(2, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 30))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    detail = draw(st.booleans())
    labels, predictions = generator.integers(0, classes, n), generator.integers(0, classes, (n, models))
    return CountLayout(models, classes if detail else 0), labels, predictions


@settings(max_examples=100, deadline=None)
@given(outcomes())
def test_no_record_contributes_more_than_norm_one(case: tuple[CountLayout, NDArray[np.int64], NDArray[np.int64]]) -> None:
    layout, labels, predictions = case
    rows = layout.rows(labels, predictions)
    assert rows.shape == (len(labels), layout.size)
    np.testing.assert_allclose((rows**2).sum(axis=1), 1.0, rtol=0, atol=1e-12)  # all of the budget, and no more


@settings(max_examples=100, deadline=None)
@given(outcomes())
def test_a_sum_without_noise_is_read_exactly(case: tuple[CountLayout, NDArray[np.int64], NDArray[np.int64]]) -> None:
    layout, labels, predictions = case
    counts = layout.decode(layout.rows(labels, predictions).sum(axis=0), noise_std=0.0, num_records=len(labels))
    assert counts.num_records == pytest.approx(len(labels), rel=1e-12)
    np.testing.assert_allclose(counts.accuracy, (predictions == labels[:, None]).mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(
        counts.accuracy_stderr, np.sqrt(counts.accuracy * (1 - counts.accuracy) / len(labels)), atol=1e-12
    )
    if layout.num_classes:
        expected = np.zeros((layout.num_classes, layout.num_classes))
        for true, predicted in zip(labels, predictions[:, 0], strict=True):
            expected[true, predicted] += 1
        assert counts.confusion is not None
        np.testing.assert_allclose(counts.confusion, expected, atol=1e-9)
    else:
        assert counts.confusion is None


def test_one_record_changes_only_its_own_cell_and_the_shared_counts() -> None:
    layout = CountLayout(1, 3)
    row = layout.rows(np.array([2]), np.array([[1]]))[0]
    assert np.flatnonzero(row).tolist() == [0, 1, 2 + 2 * 3 + 1]
    assert row[1] < 0  # wrong


def test_no_held_out_records_give_no_rows() -> None:
    rows = CountLayout(2, 3).rows(np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
    assert rows.shape == (0, 12)


def test_a_label_beyond_the_classes_is_not_counted_as_another() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        CountLayout(1, 3).rows(np.array([3]), np.array([[0]]))


def test_where_the_noisy_count_is_useless_the_public_size_is_used() -> None:
    layout = CountLayout(1)
    total = np.array([-5.0, 40 * layout.correct_weight])
    counts = layout.decode(total, noise_std=30.0, num_records=100)
    assert counts.num_records == 100
    assert counts.accuracy.tolist() == pytest.approx([0.7])


def test_an_accuracy_never_leaves_zero_to_one() -> None:
    layout = CountLayout(2)
    total = np.array([100 * math.sqrt(0.2), 500.0, -500.0])
    assert layout.decode(total, noise_std=1.0, num_records=100).accuracy.tolist() == [1.0, 0.0]


REPEATS = 2000


@pytest.mark.parametrize(("true_accuracy", "n", "noise_std"), [(0.9, 400, 5.0), (0.5, 400, 20.0), (0.8, 2000, 10.0)])
def test_the_standard_error_covers(true_accuracy: float, n: int, noise_std: float) -> None:
    """Of 2000 noisy sums over fresh binomial samples, 95 % should lie within 1.96 standard errors.

    The error of the estimate has about this deviation, so the share lies in 0.93 ... 0.97 unless by a chance of
    about 4e-5 (four deviations of 0.0049 to either side) and the small departure of the estimate from a normal one.
    The bounds 0.92 ... 0.98 are six deviations wide: a false alarm below 1e-6.
    """
    layout = CountLayout(1)
    right = np.random.default_rng(1).binomial(n, true_accuracy, REPEATS)  # the sample; the noise is ours
    noise = standard_normal(2 * REPEATS).reshape(REPEATS, 2) * noise_std
    within = 0
    for one, extra in zip(right, noise, strict=True):
        total: Floats = np.array([n * math.sqrt(0.2), (2.0 * one - n) * layout.correct_weight]) + extra
        counts = layout.decode(total, noise_std, n)
        within += bool(abs(counts.accuracy[0] - true_accuracy) < 1.96 * counts.accuracy_stderr[0])
    assert 0.92 < within / REPEATS < 0.98


def test_the_confusion_matrix_states_its_noise() -> None:
    """Chi-square on 10,000 cells of noise alone; false alarm 1e-6 (five deviations of sqrt(2 / 10,000))."""
    layout = CountLayout(1, 100)
    total = layout.rows(np.zeros(500, np.int64), np.zeros((500, 1), np.int64)).sum(axis=0) + standard_normal(layout.size) * 3.0
    counts = layout.decode(total, 3.0, 500)
    assert counts.confusion is not None
    noise = counts.confusion.ravel()[1:] / counts.confusion_noise_std
    assert abs(float((noise**2).mean()) - 1) < 5 * math.sqrt(2 / noise.size)
