"""A site's part of one round of DP training: engines make the clipped gradients, Urna all that makes them private.

``noise = "shared"`` (DP-FedSGD): one Poisson sample, per-example gradients, clipped, summed on the grid, plus this site's
share of the noise. ``noise = "local"``: many DP-SGD steps (Abadi et al. 2016, algorithm 1) with the whole noise here; the
change of the vector is what leaves, weighted by declared sizes.

Constants of the plan, never of the data: sample_rate, max_grad_norm, the number of steps, what sums are divided by.

What is sampled and clipped is a unit of privacy: a record, or a person with all of their records. So adding or removing a
person changes a sum by at most one clip, in both ways to get there:

    head        the person's unclipped gradients are averaged, and the average is clipped          `TuningSet`
    lora, full  each of the person's k gradients is clipped and weighs 1 / k: their sum is         `ModelSet`
                a mean of vectors within the clip; no engine has to hold a gradient of its own for each person
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from urna.client.optimizers import LocalOptimizer
from urna.models.tuning import head_from_vector, per_example_gradients
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, poisson_sample
from urna.privacy.release import engine_clip, noisy_sum, noisy_total
from urna.protocol.plan import Plan

if TYPE_CHECKING:
    from urna.models.prepared import Prepared
    from urna.models.tunable import Batch

LOCAL_GRID_BITS = 24  # a local step's clip is about 2**24 grid units; nothing of it goes through the ring
Chosen = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float32]


class Tuned(Protocol):
    """A site's tuning records, ready for one way of tuning."""

    def noisy_step(self, vector: Vector, plan: Plan, noise_multiplier: float, grid: Grid, num_noise_parties: int) -> Integers:
        """The clipped gradients (p,) of a fresh Poisson sample at ``vector`` (p,), summed, with noise, in grid units."""


@dataclass(frozen=True)
class TuningSet:
    """What a head is trained on at one site.

    Args:
        features: (n, d) float32 of bounded norm.
        labels: (n,) int64.
        groups: (n,) int64, each record's unit of privacy, 0 ... u - 1; every record its own where records are the unit.
    """

    features: npt.NDArray[np.float32]
    labels: Numbers
    groups: Numbers

    def noisy_step(self, vector: Vector, plan: Plan, noise_multiplier: float, grid: Grid, num_noise_parties: int) -> Integers:
        """See `Tuned`: rows in float64, each clipped as the integers that it becomes."""
        rows = sample_gradients(self, vector, plan)
        return noisy_sum(rows, plan.final.max_grad_norm, noise_multiplier, grid, num_noise_parties=num_noise_parties)


@dataclass(frozen=True, eq=False)
class ModelSet:
    """What a model's own weights are trained on at one site.

    Args:
        prepared: the model, repaired and checked, with its engine.
        batch: the records at these places as the model reads them, labels included, padded to this length.
        groups: (n,) int64, each record's unit of privacy, 0 ... u - 1.
        lengths: (n,) int64, what each record is padded to: a function of that record alone.
    """

    prepared: "Prepared"
    batch: Callable[[Numbers, int], "Batch"]
    groups: Numbers
    lengths: Numbers

    def noisy_step(self, vector: Vector, plan: Plan, noise_multiplier: float, grid: Grid, num_noise_parties: int) -> Integers:
        """See `Tuned`: what the engine clipped to a little less than the clip, so that rounding the sum stays within it."""
        max_norm = plan.final.max_grad_norm
        total = sample_total(self, vector, plan, engine_clip(max_norm, vector.size, grid))
        return noisy_total(total, max_norm, noise_multiplier, grid, num_noise_parties=num_noise_parties)


def sample_units(groups: Numbers, sample_rate: float) -> Chosen:
    """The records (n,) of a fresh Poisson sample of units."""
    num_units = int(groups.max(initial=-1)) + 1
    return np.asarray(poisson_sample(num_units, sample_rate)[groups])


def sample_gradients(data: TuningSet, vector: Vector, plan: Plan) -> Floats:
    """Unclipped gradients (b, p) of a fresh Poisson sample of units at ``vector`` (p,); b may be 0.

    A record whose gradient is not finite contributes zero. An error instead would tell, without noise, that such a record
    was sampled; zero is a function of that record alone, so the clip's argument holds.
    """
    chosen = sample_units(data.groups, plan.final.sample_rate)
    head = head_from_vector(vector, data.features.shape[1], plan.task.num_classes)
    features, labels = torch.from_numpy(data.features[chosen]), torch.from_numpy(data.labels[chosen])
    rows = np.asarray(per_example_gradients(head, features, labels).numpy(), dtype=np.float64)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    return unit_means(rows, data.groups[chosen])


def sample_total(data: ModelSet, vector: Vector, plan: Plan, max_grad_norm: float) -> Floats:
    """Clipped gradients of a fresh Poisson sample of units at ``vector``, weighted and summed: (p,), zeros of an empty one.

    A record whose gradient is not finite contributes zero, as in `sample_gradients`.
    """
    from urna.models.loading import by_length
    from urna.models.prepared import clipped_sum

    chosen = sample_units(data.groups, plan.final.sample_rate)
    data.prepared.tunable.load(vector)  # also of an empty sample: a vector that cannot be loaded fails whatever was sampled
    places = np.flatnonzero(chosen)
    weights = unit_weights(data.groups[places])
    total = np.zeros(vector.size)  # float64; of an empty sample, too: the noise is added all the same
    for some, length in by_length(data.lengths[places], data.prepared.parts.size):
        batch = data.batch(places[some], length)
        total += clipped_sum(data.prepared, batch, max_grad_norm, weights[some]).cpu().numpy()
    return total


def unit_weights(groups: Numbers) -> torch.Tensor:
    """One over the number of a record's unit's records, float32 (n,), rounded down: a unit's weights add up to 1 at most."""
    _, position, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shares = (1.0 / counts).astype(np.float32)
    shares = np.where(shares.astype(np.float64) * counts > 1, np.nextafter(shares, np.float32(0)), shares)
    return torch.from_numpy(shares[position])


def unit_means(rows: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Average each unit's rows: (n, p) and (n,) -> (number of different units, p), ordered by unit.

    A mean of rows of norm at most r has norm at most r, so what held for one record holds for one person.
    """
    _, position, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if len(counts) == len(rows):
        return rows  # every record is a unit
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, position, rows)
    return np.asarray(sums / counts[:, None])


def shared_step(
    data: Tuned, vector: Vector, plan: Plan, noise_multiplier: float, grid: Grid, num_noise_parties: int
) -> Integers:
    """This site's summand of one DP-FedSGD step: (p,) grid units."""
    return data.noisy_step(vector, plan, noise_multiplier, grid, num_noise_parties)


def local_grid(max_norm: float) -> Grid:
    """The grid of a local step."""
    return Grid(step_exp=math.floor(math.log2(max_norm)) - LOCAL_GRID_BITS, num_summands=1)


def local_steps(
    data: Tuned, vector: Vector, plan: Plan, noise_multiplier: float, expected_batch: float, index: int = 1
) -> Floats:
    """The change (p,) of the vector after ``plan.final.local_steps`` DP-SGD steps, private by itself.

    The optimiser's moments are those of this round alone; see `optimizers`.

    Args:
        data: this site's tuning records.
        vector: (p,) the global one.
        plan: gives the clip, the sampling rate, the steps, the optimiser and its learning rate.
        noise_multiplier: sigma / clip of every step.
        expected_batch: q times the declared number of tuning records; never the sample's size.
        index: which of the plan's rounds this is, for the schedule of the learning rate.
    """
    final = plan.final
    grid = local_grid(final.max_grad_norm)
    start = vector.astype(np.float64)
    optimizer = LocalOptimizer(start, final)
    for step in range(final.local_steps):
        current = optimizer.vector
        noisy = data.noisy_step(current.astype(np.float32), plan, noise_multiplier, grid, 1) * grid.step
        pull = final.proximal_mu * (current - start)  # FedProx (Li et al. 2020); of public numbers and private outputs only
        optimizer.step(noisy / expected_batch + pull, final.learning_rate_factor(index, step))
    return np.asarray(optimizer.vector - start)
