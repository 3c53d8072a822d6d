"""A site's part of one round of DP training; Opacus makes the per-example gradients, Urna all that makes them private.

``noise = "shared"`` (DP-FedSGD): one Poisson sample, per-example gradients, clipped on the grid, summed, plus this site's
share of the noise. ``noise = "local"``: many DP-SGD steps (Abadi et al. 2016, algorithm 1) with the whole noise here; the
change of the head is what leaves, weighted by declared sizes.

Constants of the plan, never of the data: sample_rate, max_grad_norm, the number of steps, what sums are divided by.

What is sampled and clipped is a unit of privacy: a record, or a person with all of their records, whose gradients are averaged
before the clip. So adding or removing a person changes a sum by at most one clip.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from urna.models.tuning import head_from_vector, per_example_gradients
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, poisson_sample
from urna.privacy.release import noisy_sum
from urna.protocol.plan import Plan

LOCAL_GRID_BITS = 24  # a local step's clip is about 2**24 grid units; nothing of it goes through the ring


@dataclass(frozen=True)
class TuningSet:
    """What a head is trained on at one site.

    Args:
        features: (n, d) float32 of bounded norm.
        labels: (n,) int64.
        groups: (n,) int64, each record's unit of privacy, 0 ... u - 1; every record its own where records are the unit.
    """

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


def sample_gradients(data: TuningSet, vector: npt.NDArray[np.float32], plan: Plan) -> Floats:
    """Unclipped gradients (b, p) of a fresh Poisson sample of units at ``vector`` (p,); b may be 0.

    A record whose gradient is not finite contributes zero. An error instead would tell, without noise, that such a record
    was sampled; zero is a function of that record alone, so the clip's argument holds.
    """
    num_units = int(data.groups.max(initial=-1)) + 1
    chosen = poisson_sample(num_units, plan.final.sample_rate)[data.groups]  # (n,)
    head = head_from_vector(vector, data.features.shape[1], plan.task.num_classes)
    features, labels = torch.from_numpy(data.features[chosen]), torch.from_numpy(data.labels[chosen])
    rows = np.asarray(per_example_gradients(head, features, labels).numpy(), dtype=np.float64)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    return unit_means(rows, data.groups[chosen])


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
    data: TuningSet,
    vector: npt.NDArray[np.float32],
    plan: Plan,
    noise_multiplier: float,
    grid: Grid,
    num_noise_parties: int,
) -> Integers:
    """This site's summand of one DP-FedSGD step: (p,) grid units."""
    rows = sample_gradients(data, vector, plan)
    return noisy_sum(rows, plan.final.max_grad_norm, noise_multiplier, grid, num_noise_parties=num_noise_parties)


def local_grid(max_norm: float) -> Grid:
    """The grid of a local step."""
    return Grid(step_exp=math.floor(math.log2(max_norm)) - LOCAL_GRID_BITS, num_summands=1)


def local_steps(
    data: TuningSet,
    vector: npt.NDArray[np.float32],
    plan: Plan,
    noise_multiplier: float,
    expected_batch: float,
) -> Floats:
    """The change (p,) of the head after ``plan.final.local_steps`` DP-SGD steps, private by itself.

    Args:
        data: this site's tuning records.
        vector: (p,) the global head.
        plan: gives the clip, the sampling rate, the steps and the learning rate.
        noise_multiplier: sigma / clip of every step.
        expected_batch: q times the declared number of tuning records; never the sample's size.
    """
    max_norm = plan.final.max_grad_norm
    grid = local_grid(max_norm)
    current = vector.astype(np.float64)
    for _ in range(plan.final.local_steps):
        rows = sample_gradients(data, current.astype(np.float32), plan)
        noisy = noisy_sum(rows, max_norm, noise_multiplier, grid, num_noise_parties=1) * grid.step
        pull = plan.final.proximal_mu * (
            current - vector
        )  # FedProx (Li et al. 2020); of public numbers and private outputs only
        current = current - plan.final.local_learning_rate * (noisy / expected_batch + pull)
    return np.asarray(current - vector)
