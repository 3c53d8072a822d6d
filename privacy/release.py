"""One site's part of a Gaussian release: rows -> clipped integers -> sum + its share of the noise.

Votes, counts and gradients (of shared and of local steps) take this way; there is no second one.

Covered:
    * sensitivity: adding or removing one row changes the integer sum by at most ``sensitivity_clips`` clips in L2;
    * the total noise is at least ``noise_multiplier`` sensitivities when ``num_noise_parties`` honest sites add theirs.
Not covered:
    * who counts as honest: the caller says how many parties are guaranteed.
"""

import math

import numpy as np

from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, integer_noise


def noisy_sum(
    rows: Floats,
    max_norm: float,
    noise_multiplier: float,
    grid: Grid,
    *,
    num_noise_parties: int,
    sensitivity_clips: int = 1,
) -> Integers:
    """Sum the rows of (n, p), clipped to ``max_norm`` on the grid, plus integer noise; n may be 0.

    Args:
        rows: one row for each record (or bucket), any finite numbers.
        max_norm: C, the L2 bound of one row.
        noise_multiplier: sigma / sensitivity of the *whole* sum over sites.
        grid: the integers' step.
        num_noise_parties: how many honest sites surely add such a share; 1 makes this sum private by itself.
        sensitivity_clips: by how many C one record can move the sum: 1 where a record is a row, 2 where it changes one.

    Returns:
        (p,) integers in grid units; the data's part of them is within the summand's part of the ring.

    Raises:
        ProtocolError: a number is not finite.
        ValueError: the grid is too coarse for this clip or noise.
    """
    total = grid.clamp(grid.quantise_rows(rows, max_norm).sum(axis=0, dtype=np.int64))
    return total + noise_share(total.size, max_norm, noise_multiplier, grid, num_noise_parties, sensitivity_clips)


def check_fits(
    size: int, max_norm: float, noise_multiplier: float, grid: Grid, *, num_noise_parties: int, sensitivity_clips: int = 1
) -> None:
    """Whether `noisy_sum` of ``size`` numbers can fail whatever the rows: tried with none.

    Raises:
        ValueError: the grid is too coarse or too fine for this clip or noise.
    """
    grid.quantise_rows(np.zeros((0, size)), max_norm)
    noise_share(1, max_norm, noise_multiplier, grid, num_noise_parties, sensitivity_clips)


def noise_share(
    size: int, max_norm: float, noise_multiplier: float, grid: Grid, num_noise_parties: int, sensitivity_clips: int
) -> Integers:
    """This site's share: variance (noise_multiplier * sensitivity)^2 / num_noise_parties, in squared grid units."""
    if num_noise_parties < 1:
        raise ValueError(f"noise needs at least one honest party, found {num_noise_parties}")
    sensitivity = sensitivity_clips * grid.units(max_norm)
    return integer_noise(size, noise_multiplier * sensitivity / math.sqrt(num_noise_parties))
