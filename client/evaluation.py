"""A site's held-out counts: records that never train, read by `privacy.counts`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from urna.models.tuning import predict_logits
from urna.privacy.counts import CountLayout
from urna.privacy.mechanisms import Floats


def count_rows(
    features: Sequence[npt.NDArray[np.float32]],
    vectors: Sequence[npt.NDArray[np.float32]],
    labels: npt.NDArray[np.int64],
    layout: CountLayout,
) -> Floats:
    """One row for each held-out record (n, layout.size), of norm at most 1.

    Args:
        features: for each model (n, d_k), normalised as for training.
        vectors: for each model its head's flat vector.
        labels: (n,).
        layout: which numbers leave.
    """
    return rows_of([predict_logits(vector, one) for vector, one in zip(vectors, features, strict=True)], labels, layout)


def rows_of(logits: Sequence[npt.NDArray[np.float32]], labels: npt.NDArray[np.int64], layout: CountLayout) -> Floats:
    """The same from each model's logits (n, num_classes), however it came to them."""
    predictions = np.stack([one.argmax(axis=1) for one in logits], axis=1).astype(np.int64)  # (n, K)
    return layout.rows(labels, predictions)
