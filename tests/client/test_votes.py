import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urna.client.ballot import MIN_BUCKET, nearest_neighbour_accuracy, votes
from urna.privacy.fixed_point import Grid, exact_squared_norms

Features = list[npt.NDArray[np.float32]]


def a_data_set(
    seed: int, num_records: int, num_candidates: int = 3, num_buckets: int = 6
) -> tuple[Features, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    features = [generator.normal(size=(num_records, 4 + one)).astype(np.float32) for one in range(num_candidates)]
    return features, generator.integers(0, 3, num_records), generator.integers(0, num_buckets, num_records)


def brute_force(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float:
    """Cosine 1-NN, one pair at a time, in Python's own numbers."""
    right = 0
    for one in range(len(labels)):
        best, nearest = -2.0, -1
        for other in range(len(labels)):
            if other != one:
                a, b = [float(x) for x in features[one]], [float(x) for x in features[other]]
                norms = sum(x * x for x in a) ** 0.5 * sum(x * x for x in b) ** 0.5
                cosine = sum(x * y for x, y in zip(a, b, strict=True)) / norms
                if cosine > best:
                    best, nearest = cosine, other
        right += labels[nearest] == labels[one]
    return right / len(labels)


@pytest.mark.parametrize("seed", range(5))
def test_a_vote_is_leave_one_out_accuracy_as_by_brute_force(seed: int) -> None:
    features, labels, _ = a_data_set(seed, 20)
    found = votes(features, labels, np.zeros(20, np.int64), 1)[0]
    scores = np.array([brute_force(one, labels) for one in features])
    np.testing.assert_allclose(found, scores - scores.mean(), atol=1e-12)


def test_a_record_is_never_its_own_neighbour() -> None:
    alone = np.eye(4)
    assert nearest_neighbour_accuracy(alone, np.arange(4)) == 0.0


@pytest.mark.parametrize("size", range(MIN_BUCKET))
def test_a_bucket_of_fewer_than_four_records_votes_zero(size: int) -> None:
    features, labels, _ = a_data_set(0, size)
    assert not votes(features, labels, np.zeros(size, np.int64), 2).any()


def test_four_records_vote() -> None:
    features = [
        np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32),
        np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32),
    ]
    assert votes(features, np.array([0, 0, 1, 1]), np.zeros(4, np.int64), 1).tolist() == [[0.5, -0.5]]


def test_records_without_direction_are_no_error() -> None:
    zero = np.zeros((5, 3), np.float32)
    assert np.isfinite(votes([zero, zero], np.array([0, 1, 0, 1, 0]), np.zeros(5, np.int64), 1)).all()


@given(seed=st.integers(0, 10_000), num_records=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_votes_of_a_bucket_sum_to_zero(seed: int, num_records: int) -> None:
    found = votes(*a_data_set(seed, num_records), 6)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)
    assert np.abs(found).max(initial=0) <= 1


@given(seed=st.integers(0, 10_000), factor=st.sampled_from([1e-6, 0.3, 7.0, 1e6]))
@settings(max_examples=20, deadline=None)
def test_a_candidate_gains_nothing_by_large_features(seed: int, factor: float) -> None:
    features, labels, bucket_of = a_data_set(seed, 50)
    scaled = [features[0] * np.float32(factor), *features[1:]]
    np.testing.assert_array_equal(votes(scaled, labels, bucket_of, 6), votes(features, labels, bucket_of, 6))


@given(seed=st.integers(0, 100_000), num_records=st.integers(1, 60), removed=st.integers(0, 59), clip=st.floats(0.01, 2.0))
@settings(max_examples=80, deadline=None)
def test_one_record_changes_one_vote_and_the_integer_sum_by_two_clips(
    seed: int, num_records: int, removed: int, clip: float
) -> None:
    features, labels, bucket_of = a_data_set(seed, num_records)
    removed %= num_records
    keep = np.arange(num_records) != removed
    before = votes(features, labels, bucket_of, 6)
    after = votes([one[keep] for one in features], labels[keep], bucket_of[keep], 6)
    changed = np.flatnonzero((before != after).any(axis=1))
    assert set(changed) <= {bucket_of[removed]}
    grid = Grid(step_exp=-20, num_summands=3)
    difference = grid.quantise_rows(before, clip).sum(axis=0) - grid.quantise_rows(after, clip).sum(axis=0)
    assert exact_squared_norms(difference[None])[0] <= (2 * grid.units(clip)) ** 2


def test_two_clips_are_needed_for_the_sensitivity() -> None:
    """A record can turn its bucket's vote round: one clip would be too little noise."""
    first = np.array([[1, 0], [1, 0.01], [-1, 0], [-1, 0.01], [0, 1]], np.float32)
    second = np.array([[1, 0], [-1, 0], [1, 0.01], [-1, 0.01], [0, 1]], np.float32)
    grid, largest = Grid(step_exp=-20, num_summands=3), 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        features = [first + generator.normal(0, 0.7, first.shape).astype(np.float32), second]
        labels, whole = generator.integers(0, 2, 5), np.zeros(5, np.int64)
        sums = [
            grid.quantise_rows(votes([one[:n] for one in features], labels[:n], whole[:n], 1), 0.2).sum(axis=0) for n in (4, 5)
        ]
        largest = max(largest, int(exact_squared_norms((sums[0] - sums[1])[None])[0]))
    assert largest > grid.units(0.2) ** 2


def test_the_number_of_votes_is_the_public_constant() -> None:
    for num_records in (0, 1, 100):
        assert votes(*a_data_set(0, num_records), 6).shape == (6, 3)
