"""Held-out counts as one Gaussian release: a record's row, and what can be read from the sum.

One record contributes a row of L2 norm 1 or less: a constant (so that n is estimated, not trusted), for each of K models
its centred correctness (+1 right, -1 wrong), and with ``detail`` a one-hot cell of the confusion matrix. Centring
matters: it makes the accuracy's error small exactly where models are good or n is slightly off.

    weights^2:  count 0.2    correct 0.4 (0.8 without detail), over K models    confusion 0.4
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from urna.privacy.mechanisms import Floats

COUNT_WEIGHT = math.sqrt(0.2)


@dataclass(frozen=True)
class CountLayout:
    """Which numbers a release of counts has.

    Args:
        num_models: K, the models compared.
        num_classes: C, classes of the confusion matrix (of the first model); 0 leaves it out.
    """

    num_models: int
    num_classes: int = 0

    @property
    def size(self) -> int:
        """How many numbers leave: 1 + K + C^2."""
        return 1 + self.num_models + self.num_classes**2

    @property
    def correct_weight(self) -> float:
        """Weight of one model's correctness in a record's row."""
        return math.sqrt((0.4 if self.num_classes else 0.8) / self.num_models)

    @property
    def confusion_weight(self) -> float:
        """Weight of a cell of the confusion matrix."""
        return math.sqrt(0.4)

    def rows(self, labels: npt.NDArray[np.int64], predictions: npt.NDArray[np.int64]) -> Floats:
        """Encode n records: labels (n,), predictions (n, K) -> (n, size), each row of norm at most 1."""
        right = 2.0 * (predictions == labels[:, None]) - 1.0  # (n, K)
        parts = [np.full((len(labels), 1), COUNT_WEIGHT), right * self.correct_weight]
        if self.num_classes:
            cells = np.zeros((len(labels), self.num_classes**2))
            cells[np.arange(len(labels)), labels * self.num_classes + predictions[:, 0]] = self.confusion_weight
            parts.append(cells)
        return np.concatenate(parts, axis=1)

    def decode(self, total: Floats, noise_std: float, num_records: int) -> "Counts":
        """Read a noisy sum.

        Args:
            total: (size,) the opened sum.
            noise_std: standard deviation of the noise on each number, in the same units.
            num_records: the public size, used only where the noisy count is useless (below a tenth of it).
        """
        count = float(total[0]) / COUNT_WEIGHT
        n = count if count > 0.1 * num_records else float(num_records)
        margins = total[1 : 1 + self.num_models] / self.correct_weight / n  # in [-1, 1] up to noise
        accuracy = np.clip(0.5 + 0.5 * margins, 0.0, 1.0)
        sampling = accuracy * (1 - accuracy) / n
        noise = (0.5 * noise_std / self.correct_weight / n) ** 2
        noise_of_count = ((accuracy - 0.5) * noise_std / COUNT_WEIGHT / n) ** 2
        confusion = None
        if self.num_classes:
            cells = total[1 + self.num_models :] / self.confusion_weight
            confusion = cells.reshape(self.num_classes, self.num_classes)
        return Counts(
            num_records=n,
            accuracy=accuracy,
            accuracy_stderr=np.sqrt(sampling + noise + noise_of_count),
            confusion=confusion,
            confusion_noise_std=noise_std / self.confusion_weight,
        )


@dataclass(frozen=True)
class Counts:
    """What a noisy sum says about K models; standard errors hold sampling and noise."""

    num_records: float
    accuracy: Floats  # (K,)
    accuracy_stderr: Floats  # (K,)
    confusion: Floats | None  # (C, C), rows are true classes; cells carry noise and may be negative
    confusion_noise_std: float
