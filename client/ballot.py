"""A site's sealed ballots: which candidate's features put records of one class next to each other?

DESIGN section 6, steps 1-3. A bucket's vote is a vector of K leave-one-out 1-NN accuracies, less its mean: one record
is in one bucket, so adding or removing it changes one vote, which lies in a ball of radius ``clip`` before and after;
the sum's L2 sensitivity is 2 ``clip`` whatever K and the feature sizes are.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from urna.privacy.mechanisms import Floats

MIN_BUCKET = 4  # a smaller bucket votes zero


def votes(
    features: Sequence[npt.NDArray[np.float32]],
    labels: npt.NDArray[np.int64],
    bucket_of: npt.NDArray[np.int64],
    num_buckets: int,
) -> Floats:
    """Every bucket's vote, not yet clipped.

    Args:
        features: for each of K candidates (n, d_k), centred by a public mean.
        labels: (n,).
        bucket_of: (n,) in 0 ... num_buckets - 1.
        num_buckets: a public constant; empty buckets vote zero.

    Returns:
        (num_buckets, K): accuracies less their mean over candidates.
    """
    unit = [_normalised(one) for one in features]
    result = np.zeros((num_buckets, len(features)))
    for bucket in range(num_buckets):
        members = np.flatnonzero(bucket_of == bucket)
        if len(members) >= MIN_BUCKET:
            scores = np.array([nearest_neighbour_accuracy(one[members], labels[members]) for one in unit])
            result[bucket] = scores - scores.mean()
    return result


def nearest_neighbour_accuracy(unit_features: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Leave-one-out 1-NN accuracy by cosine, of n >= 2 records (n, d)."""
    similarity = unit_features @ unit_features.T  # (n, n)
    np.fill_diagonal(similarity, -np.inf)
    return float(np.mean(labels[similarity.argmax(axis=1)] == labels))


def _normalised(features: npt.NDArray[np.float32]) -> Floats:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12))
