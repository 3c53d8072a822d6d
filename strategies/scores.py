"""Noisy counts -> accuracy, precision, recall and F1, each with a standard error, pure.

The confusion matrix carries as much noise in each of its C^2 cells as a class has errors in all, so it is not read cell by
cell. Estimator: the accuracy, which was released by itself with far less noise, says how many records are right and wrong;
the diagonal is shrunk towards equal classes as far as its noise explains its spread (James, Stein 1961); a wrong cell
more than 4 noise standard deviations above zero is believed; all other errors are spread in proportion to class sizes.

Root mean squared error of precision, recall and F1 (and of macro F1) on 57 true matrices of 10 classes, accuracy 0.80-0.97,
equal and skewed classes, errors spread, in few pairs or in one class, 340 records, noise 2.5 and 4.0 a cell:

    ratios of the raw cells            0.172 / 0.248  (0.069 / 0.109)
    cells clipped at 0                 0.248 / 0.333  (0.218 / 0.304)
    {cells >= 0, sum n}                0.139 / 0.205  (0.088 / 0.141)
    the same, right and wrong apart    0.077 / 0.099  (0.024 / 0.031)
    shrunk towards sizes, linearly     0.050 / 0.063  (0.019 / 0.024)
    this one                           0.045 / 0.056  (0.016 / 0.021)

Not covered: one class that is much worse than the others, without a single pair that stands out of the noise, looks better
than it is; the standard errors hold this for errors as uneven as ``ERROR_SHAPE`` says.
"""

from dataclasses import dataclass

import numpy as np

from urna.privacy.counts import COUNT_WEIGHT, CountLayout, Counts
from urna.privacy.mechanisms import Floats

BELIEVED_STDS = 4.0  # of the noise: of 90 wrong cells, one in 350 matrices is believed by chance
ERROR_SHAPE = 0.15  # of the Gamma by which a wrong cell's share differs from its expectation: a few cells hold most errors
NUM_REPLICATES = 200
SEED = 20_260_101  # what is read here was released before: no privacy rests on it, and a report redraws alike


@dataclass(frozen=True)
class Scores:
    """What held-out counts say about one model of C classes; standard errors hold sampling and privacy noise."""

    accuracy: float
    accuracy_stderr: float
    precision: Floats  # (C,)
    precision_stderr: Floats
    recall: Floats  # (C,)
    recall_stderr: Floats
    f1: Floats  # (C,)
    f1_stderr: Floats
    macro_f1: float
    macro_f1_stderr: float
    majority_accuracy: float  # of always saying the largest class, as far as it stands out of the noise
    num_records: float


def scores(counts: Counts) -> Scores:
    """Read the first model's scores.

    Raises:
        ValueError: the counts have no confusion matrix.
    """
    if counts.confusion is None:
        raise ValueError("expected counts with a confusion matrix, found none: ask for them with detail")
    num_classes = len(counts.confusion)
    estimate = estimated_confusion(counts)
    values = _metrics(estimate)
    stderrs = _stderrs(estimate, counts.confusion_noise_std)
    precision, recall, f1 = values[:-1].reshape(3, num_classes)
    precision_stderr, recall_stderr, f1_stderr = stderrs[:-1].reshape(3, num_classes)
    return Scores(
        accuracy=float(counts.accuracy[0]),
        accuracy_stderr=float(counts.accuracy_stderr[0]),
        precision=precision,
        precision_stderr=precision_stderr,
        recall=recall,
        recall_stderr=recall_stderr,
        f1=f1,
        f1_stderr=f1_stderr,
        macro_f1=float(values[-1]),
        macro_f1_stderr=float(stderrs[-1]),
        majority_accuracy=float(estimate.sum(axis=1).max() / estimate.sum()),
        num_records=counts.num_records,
    )


def estimated_confusion(counts: Counts) -> Floats:
    """The matrix (C, C) behind the noise: cells of 0 or more that sum to n, the diagonal to n times the accuracy."""
    assert counts.confusion is not None
    half = 0.5 / counts.num_records  # neither all nor no records are right, as far as n records can tell
    accuracy = float(np.clip(counts.accuracy[0], half, 1 - half)) if half < 0.5 else 0.5
    right, std = counts.num_records * accuracy, counts.confusion_noise_std
    diagonal = _shrunk(np.diag(counts.confusion), right, std)
    wrong = ~np.eye(len(diagonal), dtype=bool)
    believed = np.where(wrong & (counts.confusion > BELIEVED_STDS * std), counts.confusion, 0.0)
    errors = counts.num_records - right
    believed *= min(1.0, errors / max(believed.sum(), errors))
    spread = np.where(wrong & (believed == 0), np.outer(diagonal, diagonal) + 1e-9, 0.0)
    left = max(0.0, errors - believed.sum())  # below 0 by a rounding error where all errors are believed
    estimate = believed + spread * (left / max(spread.sum(), 1e-9))
    np.fill_diagonal(estimate, diagonal)
    return np.asarray(estimate, dtype=np.float64)


def _shrunk(noisy: Floats, total: float, std: float) -> Floats:
    """Numbers of 0 or more with this sum, nearer to each other the more of their spread is noise."""
    mean = total / len(noisy)
    moved = noisy - noisy.mean()
    variance = float(moved @ moved) / (len(noisy) - 1)
    kept = max(0.0, 1 - std**2 / variance) if variance > 0 else 0.0
    return _onto_simplex(mean + kept * moved, total)


def _onto_simplex(values: Floats, total: float) -> Floats:
    """The nearest vector of numbers of 0 or more with this sum (Duchi et al. 2008, figure 1)."""
    falling = np.sort(values)[::-1]
    thresholds = (np.cumsum(falling) - total) / np.arange(1, len(values) + 1)
    return np.asarray(np.maximum(values - thresholds[falling > thresholds][-1], 0.0))


def _metrics(matrix: Floats) -> Floats:
    """Precision, recall and F1 of each class, macro F1: (3 C + 1,)."""
    right, rows, columns = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)

    def ratio(part: Floats, whole: Floats) -> Floats:
        return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)

    f1 = ratio(2 * right, rows + columns)
    return np.concatenate([ratio(right, columns), ratio(right, rows), f1, [f1.mean()]])


def _stderrs(estimate: Floats, noise_std: float) -> Floats:
    """Parametric bootstrap of `_metrics`: root mean squared error over matrices like this one.

    Each replicate draws a truth of its own, whose errors sit in few cells (the noise hides in which), then records, then
    noise, and estimates again. Taking the estimate itself for the truth would make it its own witness: 2 standard
    errors then hold 72 % of the truths measured above; so they hold 95 %.
    """
    generator = np.random.default_rng(SEED)
    drawn = (_error_of_one(estimate, noise_std, generator) for _ in range(NUM_REPLICATES))
    return np.asarray(np.sqrt(np.mean([error**2 for error in drawn], axis=0)))


def _error_of_one(estimate: Floats, noise_std: float, generator: np.random.Generator) -> Floats:
    diagonal = np.diag(estimate)
    uneven = estimate * generator.gamma(ERROR_SHAPE, size=estimate.shape)
    np.fill_diagonal(uneven, 0.0)
    truth = uneven * ((estimate.sum() - diagonal.sum()) / max(uneven.sum(), 1e-12))
    np.fill_diagonal(truth, diagonal)
    share = truth / truth.sum()
    num_records = max(1, round(float(estimate.sum())))
    cells = generator.multinomial(num_records, share.ravel()).reshape(share.shape).astype(np.float64)
    return _metrics(estimated_confusion(noisy_counts(cells, noise_std, generator))) - _metrics(share)


def noisy_counts(cells: Floats, noise_std: float, generator: np.random.Generator) -> Counts:
    """Counts as a release of these true cells (C, C) would give them, with ``noise_std`` on a cell. For simulation only."""
    layout = CountLayout(1, len(cells))
    num_records, right = cells.sum(), np.trace(cells)
    total = np.concatenate(
        [
            [num_records * COUNT_WEIGHT, (2 * right - num_records) * layout.correct_weight],
            cells.ravel() * layout.confusion_weight,
        ]
    )
    std = noise_std * layout.confusion_weight
    return layout.decode(total + generator.normal(0.0, std, total.size), std, max(1, round(float(num_records))))
