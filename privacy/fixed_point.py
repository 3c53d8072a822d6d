"""Reals to integers modulo 2**16, 2**24 or 2**32 and back, and the error that costs.

A `Grid` has a power-of-two step. Data go on the grid *before* noise is added and the noise is integer noise on the same
grid (`mechanisms.integer_noise`), so the privacy proof is about integers and no floating-point effect enters it.

Covered:
    * the L2 norm of every record's integers is at most ``units(max_norm)``, checked in exact integer arithmetic;
    * a site's sum of data is clamped before its noise is added, so that no honest sum wraps by more than noise;
    * non-finite input is refused;
    * vectors that carry no noise of their own (`Rounding`) are rounded up or down at random, without bias, from the CSPRNG.
Not covered:
    * a site that lies about its own sum: it can send any ring element;
    * privacy of vectors that carry no noise: then the secure sum alone hides them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from urna.privacy.mechanisms import Floats, Integers, RandomStream, clip_rows
from urna.privacy.ring import Ring, Vector
from urna.protocol.errors import NonFiniteError

BLOCK = 1 << 16  # numbers that are rounded at a time: three arrays of them stay in the L2 cache


@dataclass(frozen=True)
class Grid:
    """A step of 2**step_exp between neighbouring values.

    Args:
        step_exp: exponent of the step, -60 ... 30.
        num_summands: how many sites' vectors are added; each gets an equal part of the ring.
        ring_bits: 16, 24 or 32.

    Raises:
        ValueError: an argument is out of range.
    """

    step_exp: int
    num_summands: int
    ring_bits: int = 32

    def __post_init__(self) -> None:
        if not -60 <= self.step_exp <= 30:
            raise ValueError(f"step_exp must be -60 to 30, found {self.step_exp}")
        if not 1 <= self.num_summands <= 2**16:
            raise ValueError(f"num_summands must be 1 to 65536, found {self.num_summands}")
        if self.bound < 1:
            raise ValueError(f"a ring of {self.ring_bits} bits has no room for {self.num_summands} summands: use a wider one")

    @property
    def ring(self) -> Ring:
        """Where the integers are added."""
        return Ring(self.ring_bits)

    @property
    def step(self) -> float:
        """The distance of two neighbouring values."""
        return math.ldexp(1.0, self.step_exp)

    @property
    def bound(self) -> int:
        """The largest absolute value of one summand, in units: that many summands cannot wrap."""
        return (self.ring.half - 1) // self.num_summands

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
        if limit >= self.ring.half:  # so that squares below stay under 2**62 and no error depends on the records
            raise ValueError(f"a clip of {max_norm:g} is {limit} grid units, more than the ring holds: use a coarser step")
        integers = np.rint(clip_rows(rows / self.step, limit - slack)).astype(np.int64)
        if exact_squared_norms(integers).max(initial=0) > limit * limit:  # cannot happen; the proof rests on it
            raise RuntimeError("a quantised row is longer than its clip")
        return integers

    def quantise(self, vector: npt.NDArray[np.float32] | Floats) -> Integers:
        """Put one vector (p,) on the grid: nearest value, within the summand's part of the ring; a block at a time.

        A bound is an integer, so it does not matter that the clamp (a contraction: see `clamp`) comes before the rounding.

        Raises:
            NonFiniteError: a number is not finite.
        """
        integers = np.empty(vector.size, np.int64)
        for start in range(0, vector.size, BLOCK):
            units = vector[start : start + BLOCK].astype(np.float64)
            if not np.isfinite(units).all():
                raise NonFiniteError("expected finite numbers before the clip, found NaN or infinity: nothing is released")
            with np.errstate(over="ignore"):  # clamped
                np.divide(units, self.step, out=units)  # exact: a power of two
            np.clip(units, -self.bound, self.bound, out=units)
            np.rint(units, out=units)
            np.copyto(integers[start : start + BLOCK], units, casting="unsafe")
        return integers

    def clamp(self, integers: Integers) -> Integers:
        """Keep a sum of *data* within the summand's part of the ring: a contraction, it cannot raise the sensitivity.

        Never after noise was added: where shares of several sites make up the noise, a site that saturates would add none.
        """
        return np.clip(integers, -self.bound, self.bound)

    def to_ring(self, integers: Integers) -> Vector:
        """Represent in the ring; for the sum over sites that is post-processing, whatever the step."""
        numbers = integers.astype(np.uint16) if self.ring_bits == 16 else integers.astype(np.uint32)  # C conversion: modulo
        return self.ring.reduce(numbers)

    def from_ring(self, total: Vector) -> Floats:
        """Read a sum back: the representative nearest to zero, times the step."""
        shift = 32 - self.ring_bits  # the sign bit to the top, and back with its sign
        signed = (total.astype(np.uint32) << np.uint32(shift)).view(np.int32) >> np.int32(shift)
        return signed.astype(np.float64) * self.step


class Rounding:
    """Puts a float vector on one grid for each of its tensors while it is being masked: a `ring.Fill`.

    Rounding is stochastic (up with the probability of the fraction), so that the mean of many sites has no bias beyond 2**-16
    of a step.
    Values beyond the summand's part of the ring are clamped and counted.

    Args:
        vector: (d,) float32 or float64.
        grids: how many numbers are on which grid, in order; all of one ring and number of summands.

    Raises:
        ValueError: the grids do not cover the vector, or it is of another type.
    """

    def __init__(self, vector: npt.NDArray[np.floating], grids: Sequence[tuple[int, Grid]]) -> None:
        if sum(size for size, _ in grids) != len(vector):
            raise ValueError(f"expected grids for {len(vector)} numbers, found {sum(size for size, _ in grids)}")
        if vector.dtype.name not in ("float32", "float64"):
            raise ValueError(f"expected float32 or float64, found {vector.dtype}")
        self._vector = vector
        stops = np.cumsum([size for size, _ in grids]).tolist()
        self._parts = [(stop - size, stop, grid) for stop, (size, grid) in zip(stops, grids, strict=True)]
        self._random = RandomStream()
        self._work = np.empty((3, BLOCK), dtype=vector.dtype)
        self.num_clamped = 0

    def __call__(self, start: int, out: Vector) -> None:
        """Write the ring elements ``start`` ... ``start + len(out)`` into ``out``.

        Raises:
            NonFiniteError: a number is NaN or infinite.
            ValueError: more numbers are asked for than there are.
        """
        if start + len(out) > len(self._vector):  # what is not written here would be masked as it is
            raise ValueError(f"expected at most {len(self._vector)} numbers to be asked for, found {start + len(out)}")
        for low, high, grid in self._parts:
            first, last = max(low, start), min(high, start + len(out))
            for at in range(first, last, BLOCK):
                stop = min(at + BLOCK, last)
                self._round(self._vector[at:stop], grid, out[at - start : stop - start])

    def _round(self, values: npt.NDArray[np.floating], grid: Grid, out: Vector) -> None:
        largest, smallest = float(values.max()), float(values.min())  # NaN if any is
        if not (math.isfinite(largest) and math.isfinite(smallest)):
            raise NonFiniteError("expected finite numbers, found NaN or infinity: nothing is sent")
        units, floors, fraction = self._work[:, : len(values)]
        kind = units.dtype.type
        bound, scale = grid.bound, 1 / grid.step
        with np.errstate(over="ignore"):  # clamped below
            np.multiply(values, kind(scale), out=units)  # exact: a power of two
        clamped = None
        if max(largest, -smallest) * scale > bound:
            limit = kind(bound)
            if int(limit) > bound:  # as integers: float32 rounds 2**31 - 1 up, and would compare it rounded, too
                limit = np.nextafter(limit, kind(0))
            clamped = np.abs(units) > limit
            self.num_clamped += int(np.count_nonzero(clamped))
            np.clip(units, -limit, limit, out=units)
        np.floor(units, out=floors)
        np.subtract(units, floors, out=units)  # exact: beyond 2**24 a float32 is an integer and its fraction is 0
        np.copyto(fraction, self._random.uint16(len(values)))
        np.multiply(fraction, kind(2.0**-16), out=fraction)
        np.add(units, fraction, out=units)
        np.floor(units, out=units)  # 0 or 1
        np.add(floors, units, out=floors)
        signed = out.view(np.int16 if out.dtype.itemsize == 2 else np.int32)
        np.copyto(signed, floors, casting="unsafe")
        if clamped is not None:  # exactly, where float32 has no such number
            signed[clamped] = np.where(values[clamped] > 0, bound, -bound)


def exact_squared_norms(integers: Integers) -> Integers:
    """Squared L2 norms of the rows of (n, p), without rounding.

    Raises:
        ValueError: a row's squares could exceed int64.
    """
    estimate = float(np.square(integers.astype(np.float64)).sum(axis=1).max(initial=0.0))  # right to p * 2**-53
    if estimate >= 2.0**62:
        raise ValueError(f"a row of length {math.sqrt(estimate):g} is too long to square exactly: use a coarser step")
    return np.asarray(np.einsum("ij,ij->i", integers, integers), dtype=np.int64)


def grid_for(largest_sum: float, num_summands: int, ring_bits: int = 32) -> Grid:
    """The finest grid on which a sum of absolute value ``largest_sum`` still fits when one site holds all of it.

    Raises:
        ValueError: ``largest_sum`` is not positive and finite.
    """
    if not (largest_sum > 0 and math.isfinite(largest_sum)):
        raise ValueError(f"largest_sum must be positive and finite, found {largest_sum}")
    part = (Ring(ring_bits).half - 1) // num_summands
    if part < 1:
        raise ValueError(f"a ring of {ring_bits} bits has no room for {num_summands} summands: use a wider one")
    return Grid(step_exp=math.ceil(math.log2(largest_sum / part)), num_summands=num_summands, ring_bits=ring_bits)
