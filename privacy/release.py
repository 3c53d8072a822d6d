"""One site's part of a Gaussian release: rows, or the sum of an engine, -> clipped integers -> its share of the noise.

Votes, counts and gradients (of shared and of local steps) take this way; there is no second one. It has two entrances:

    noisy_sum      rows are at hand: they are clipped here, on the grid
    noisy_total    only a float sum is: of a model so large that no record's gradient is ever whole; clipped by its engine

Covered:
    * sensitivity: adding or removing one row changes the integer sum by at most ``sensitivity_clips`` clips in L2;
    * the same of a float sum whose summands were clipped to `engine_clip`, whatever the other summands are;
    * the total noise is at least ``noise_multiplier`` sensitivities when ``num_noise_parties`` honest sites add theirs.
Not covered:
    * who counts as honest: the caller says how many parties are guaranteed;
    * that the engine clips (rows are clipped here, a sum cannot be: tests attack the engines);
    * float32 arithmetic of the engine: that one record more moves the sum, rounding errors of the whole sum included, by at
      most 1 + FLOAT_SLACK times what the engine clips to is measured, not proven.
"""

import math

import numpy as np
import numpy.typing as npt

from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, integer_noise

FLOAT_SLACK = 1e-3  # of the clip: what float32 arithmetic may add to a record's part in a sum


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


def engine_clip(max_norm: float, size: int, grid: Grid) -> float:
    """What an engine must clip each record's gradient to, so that a record moves the integers by ``units(max_norm)`` at most.

    Let s and s' be the sums without and with a record, in grid units. Each number is rounded to the nearest integer, so
    round(s') - round(s) is within 1 of s' - s in each of the p numbers, and by the triangle inequality

        |round(s') - round(s)| <= |s' - s| + sqrt(p) <= (1 + FLOAT_SLACK) engine_clip / step + sqrt(p) = units(max_norm).

    It is reached: of 0.5 and 1.5, half-way both, the nearest even numbers are 0 and 2.

    Args:
        max_norm: C, the plan's.
        size: p, the number of trained weights.
        grid: the integers' step.

    Raises:
        ValueError: rounding would take half of the clip, or more.
    """
    units, rounding = grid.units(max_norm), math.sqrt(size)
    if units <= 2 * rounding:
        raise ValueError(f"a clip of {max_norm:g} is {units} grid units, too few for a sum of {size} numbers: use a finer step")
    return (units - rounding) * grid.step / (1 + FLOAT_SLACK)


def noisy_total(
    total: npt.NDArray[np.float32] | Floats, max_norm: float, noise_multiplier: float, grid: Grid, *, num_noise_parties: int
) -> Integers:
    """Put a sum of clipped rows on the grid, plus integer noise.

    Args:
        total: (p,) the sum over records, each clipped to ``engine_clip(max_norm, p, grid)``; zeros where there was none.
        max_norm: C, the plan's: the noise is of it.
        noise_multiplier: sigma / sensitivity of the *whole* sum over sites.
        grid: the integers' step.
        num_noise_parties: how many honest sites surely add such a share; 1 makes this sum private by itself.

    Returns:
        (p,) integers in grid units; the data's part of them is within the summand's part of the ring.

    Raises:
        NonFiniteError: a number is not finite.
        ValueError: the grid is too coarse for this clip or noise, whatever the sum.
    """
    engine_clip(max_norm, total.size, grid)
    integers = grid.quantise(total)
    integers += noise_share(total.size, max_norm, noise_multiplier, grid, num_noise_parties, 1)
    return integers


def check_fits(
    size: int, max_norm: float, noise_multiplier: float, grid: Grid, *, num_noise_parties: int, sensitivity_clips: int = 1
) -> None:
    """Whether `noisy_sum` of ``size`` numbers can fail whatever the rows: tried with none.

    Raises:
        ValueError: the grid is too coarse or too fine for this clip or noise.
    """
    grid.quantise_rows(np.zeros((0, size)), max_norm)
    noise_share(1, max_norm, noise_multiplier, grid, num_noise_parties, sensitivity_clips)


def check_total_fits(size: int, max_norm: float, noise_multiplier: float, grid: Grid, *, num_noise_parties: int) -> None:
    """Whether `noisy_total` of ``size`` numbers can fail whatever the sum.

    Raises:
        ValueError: the grid is too coarse or too fine for this clip or noise.
    """
    engine_clip(max_norm, size, grid)
    noise_share(1, max_norm, noise_multiplier, grid, num_noise_parties, 1)


def noise_share(
    size: int, max_norm: float, noise_multiplier: float, grid: Grid, num_noise_parties: int, sensitivity_clips: int
) -> Integers:
    """This site's share: variance (noise_multiplier * sensitivity)^2 / num_noise_parties, in squared grid units."""
    if num_noise_parties < 1:
        raise ValueError(f"noise needs at least one honest party, found {num_noise_parties}")
    sensitivity = sensitivity_clips * grid.units(max_norm)
    return integer_noise(size, noise_multiplier * sensitivity / math.sqrt(num_noise_parties))
