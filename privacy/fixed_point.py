"""Reals to integers modulo 2**32 and back, and the error that costs.

A `Grid` has a power-of-two step. Data go on the grid *before* noise is added and the noise is integer noise on the same
grid (`mechanisms.integer_noise`), so the privacy proof is about integers and no floating-point effect enters it.

Covered:
    * the L2 norm of every record's integers is at most ``units(max_norm)``, checked in exact integer arithmetic;
    * a site's sum of data is clamped before its noise is added, so that no honest sum wraps by more than noise;
    * non-finite input is refused.
Not covered:
    * a site that lies about its own sum: it can send any ring element.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from urna.privacy.mechanisms import Floats, Integers, clip_rows

RING_BITS = 32
RING_HALF = 1 << (RING_BITS - 1)  # as an integer: in float32, 2**31 - 1 would round up to 2**31
Ring = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Grid:
    """A step of 2**step_exp between neighbouring values.

    Args:
        step_exp: exponent of the step, -60 ... 30.
        num_summands: how many sites' vectors are added; each gets an equal part of the ring.

    Raises:
        ValueError: an argument is out of range.
    """

    step_exp: int
    num_summands: int

    def __post_init__(self) -> None:
        if not -60 <= self.step_exp <= 30:
            raise ValueError(f"step_exp must be -60 to 30, found {self.step_exp}")
        if not 1 <= self.num_summands <= 2**16:
            raise ValueError(f"num_summands must be 1 to 65536, found {self.num_summands}")

    @property
    def step(self) -> float:
        """The distance of two neighbouring values."""
        return math.ldexp(1.0, self.step_exp)

    @property
    def bound(self) -> int:
        """The largest absolute value of one summand, in units: that many summands cannot wrap."""
        return (RING_HALF - 1) // self.num_summands

    def units(self, value: float) -> int:
        """How many whole steps fit into ``value``."""
        return math.floor(value / self.step)

    def quantise_rows(self, rows: Floats, max_norm: float) -> Integers:
        """Clip each row of (n, p) and put it on the grid, with an integer L2 norm of at most ``units(max_norm)``.

        Rounding to the nearest integer can lengthen a row by sqrt(p)/2 units, so the clip is that much tighter; the
        integer norms are then checked exactly.

        Raises:
            ProtocolError: a number is not finite.
            ValueError: the step is too coarse for ``max_norm`` and p, or too fine for the ring, whatever the rows.
        """
        limit = self.units(max_norm)
        slack = math.sqrt(rows.shape[1]) / 2 + 1
        if limit <= 2 * slack:
            raise ValueError(
                f"a clip of {max_norm:g} is {limit} grid units, too few for {rows.shape[1]} numbers: use a finer step"
            )
        if limit >= RING_HALF:  # so that squares below stay under 2**62 and no error depends on the records
            raise ValueError(f"a clip of {max_norm:g} is {limit} grid units, more than the ring holds: use a coarser step")
        integers = np.rint(clip_rows(rows / self.step, limit - slack)).astype(np.int64)
        if exact_squared_norms(integers).max(initial=0) > limit * limit:  # cannot happen; the proof rests on it
            raise RuntimeError("a quantised row is longer than its clip")
        return integers

    def quantise(self, vector: Floats) -> Integers:
        """Put one vector (p,) that is private already on the grid: nearest value, within the summand's part of the ring."""
        return self.clamp(np.asarray(np.rint(clip_rows(vector[None] / self.step, 2.0**62)[0]), dtype=np.int64))

    def clamp(self, integers: Integers) -> Integers:
        """Keep a sum of *data* within the summand's part of the ring: a contraction, it cannot raise the sensitivity.

        Never after noise was added: where shares of several sites make up the noise, a site that saturates would add none.
        """
        return np.clip(integers, -self.bound, self.bound)

    def to_ring(self, integers: Integers) -> Ring:
        """Represent modulo 2**32; for the sum over sites that is post-processing, whatever the step."""
        return integers.astype(np.uint32)  # C conversion: modulo 2**32

    def from_ring(self, total: Ring) -> Floats:
        """Read a sum back: the representative nearest to zero, times the step."""
        return total.view(np.int32).astype(np.float64) * self.step


def exact_squared_norms(integers: Integers) -> Integers:
    """Squared L2 norms of the rows of (n, p), without rounding.

    Raises:
        ValueError: a row's squares could exceed int64.
    """
    estimate = float(np.square(integers.astype(np.float64)).sum(axis=1).max(initial=0.0))  # right to p * 2**-53
    if estimate >= 2.0**62:
        raise ValueError(f"a row of length {math.sqrt(estimate):g} is too long to square exactly: use a coarser step")
    return np.asarray(np.einsum("ij,ij->i", integers, integers), dtype=np.int64)


def grid_for(largest_sum: float, num_summands: int) -> Grid:
    """The finest grid on which a sum of absolute value ``largest_sum`` still fits when one site holds all of it.

    Raises:
        ValueError: ``largest_sum`` is not positive and finite.
    """
    if not (largest_sum > 0 and math.isfinite(largest_sum)):
        raise ValueError(f"largest_sum must be positive and finite, found {largest_sum}")
    part = (RING_HALF - 1) // num_summands
    return Grid(step_exp=math.ceil(math.log2(largest_sum / part)), num_summands=num_summands)
