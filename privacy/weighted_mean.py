"""A weighted mean of tensors and metrics as one secure sum: numbers in, numbers out.

    vector     weight * (a site's tensor - the global one), a tensor after the other, each on a grid of its own
    scalars    weight; how many values were clamped; weight * metric in steps of 2**-20; all modulo 2**64

The mean is the global tensor plus the opened sum over the opened weight, so weights differ by site and none is seen. The first
grids come from public constants; later ones from what was opened before (`Ranges`), with headroom, for a finer step.

Covered:
    * no honest sum wraps: values beyond a grid's range are clamped and counted, metrics beyond theirs refused;
    * non-finite values, other names or shapes than the global tensors: refused, nothing is sent.
Not covered:
    * a clamp shortens an update; the count says that it happened, not where, and the next round's ranges are wider;
    * privacy of the mean itself: it is not differentially private unless the sites' updates are.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from urna.privacy.fixed_point import Grid, grid_for
from urna.privacy.ring import Vector
from urna.privacy.secure_sum import Context, Scalars
from urna.protocol.averaging import AverageRequest
from urna.protocol.errors import ModelError, NonFiniteError, ProtocolError, SiteConfigError
from urna.protocol.messages import AnyArray
from urna.protocol.quorum import quorum

METRIC_STEP_EXP = -20
NUM_OWN_SCALARS = 2  # weight, clamped
SMALLEST_RANGE = 2.0**-24
Tensors = Mapping[str, AnyArray]
Grids = list[tuple[int, Grid]]
FloatVector = npt.NDArray[np.floating]


def context_of(request: AverageRequest, num_numbers: int, request_sha256: str) -> Context:
    """The context of a round, from the request as it was received, so both sides find the same.

    Args:
        request: which round, and who takes part.
        num_numbers: d, of all tensors; 0 for metrics alone.
        request_sha256: hash of the signed request, hex.

    Raises:
        ProtocolError: duplicates in the cohort, or too few sites.
    """
    try:
        numbers = quorum(len(request.cohort), request.num_colluding, request.min_sites)
    except ValueError as error:
        raise ProtocolError(str(error)) from None
    keys = json.dumps(sorted((member.site, member.public_key) for member in request.cohort)).encode()
    return Context(
        campaign=request.campaign,
        round_id=request.round_id,
        cohort=request.cohort,
        quorum=numbers,
        size=num_numbers,
        num_scalars=NUM_OWN_SCALARS + len(request.metrics),
        ring_bits=request.ring_bits,
        graph_seed=hashlib.sha256(b"graph" + bytes.fromhex(request.nonce) + keys).digest(),
        request_sha256=request_sha256,
    )


def check_types(tensors: Tensors) -> None:
    """Whether a mean of these makes sense.

    Raises:
        ModelError: a tensor is neither of floats nor of integers.
    """
    other = {name: str(tensor.dtype) for name, tensor in tensors.items() if tensor.dtype.kind not in "fiu"}
    if other:
        raise ModelError(f"expected tensors of floats or integers, found {other}: keep them out of the averaged arrays")


def grids_for(tensors: Tensors, ranges: Sequence[float], num_sites: int, ring_bits: int) -> Grids:
    """One grid for each tensor.

    Raises:
        ProtocolError: another number of ranges than tensors, or one that no grid can hold.
    """
    if len(ranges) != len(tensors):
        raise ProtocolError(f"expected a range for each of {len(tensors)} tensors, found {len(ranges)}")
    try:
        return [(one.size, grid_for(top, num_sites, ring_bits)) for one, top in zip(tensors.values(), ranges, strict=True)]
    except ValueError as error:
        raise ProtocolError(f"a range fits no grid: {error}") from None


def weighted_update(before: Tensors, after: Tensors, weight: int) -> FloatVector:
    """``weight * (after - before)`` as one vector (d,): float32 where no tensor is wider, else float64.

    Types may differ: the mean of an integer counter is a float64, and apps return integers again.

    Raises:
        ModelError: other names or shapes than ``before``, or no numbers.
    """
    check_types(before)
    check_types(after)
    shapes = [{name: one.shape for name, one in tensors.items()} for tensors in (before, after)]
    if shapes[0] != shapes[1]:
        differ = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise ModelError(f"expected the tensors that were received, found others at {differ[:5]}: return the same state dict")
    narrow = all(one.dtype.kind == "f" and one.dtype.itemsize <= 4 for one in (*before.values(), *after.values()))
    vector: FloatVector = np.empty(sum(one.size for one in before.values()), dtype=np.float32 if narrow else np.float64)
    start = 0
    for name, old in before.items():
        part = vector[start : start + old.size]
        np.subtract(after[name].ravel(), old.ravel(), out=part, dtype=vector.dtype, casting="unsafe")
        start += old.size
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found where the vector is put on its grids
        vector *= weight
    return vector


def scalars_of(
    weight: object, metrics: Mapping[str, object], names: Sequence[str], max_weight: int, num_sites: int
) -> tuple[int, list[int]]:
    """The weight, checked; and all exact numbers: weight, a place for the number of clamped values, numerators of ``names``.

    Raises:
        SiteConfigError: the weight is no whole number of 0 ... ``max_weight``, or a metric is missing.
        NonFiniteError: a metric is not finite, or too large for a sum that cannot wrap.
    """
    if isinstance(weight, bool) or not isinstance(weight, int) or not 0 <= weight <= max_weight:
        raise SiteConfigError(f"expected a whole number of 0 to {max_weight} as weight, found {weight!r}")
    values = [metrics.get(name) for name in names]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) != len(names):
        found = sorted(metrics)
        raise SiteConfigError(f"expected the agreed metrics {list(names)} as numbers, found {found}: return or agree on others")
    limit = math.ldexp((2**63 - 1) // num_sites, METRIC_STEP_EXP)
    products = [weight * value for value in numbers]
    if not all(math.isfinite(one) and abs(one) < limit for one in products):
        raise NonFiniteError(f"expected finite metrics of a size that can be summed, found others among {list(names)}")
    return weight, [weight, 0, *(round(math.ldexp(one, -METRIC_STEP_EXP)) for one in products)]


@dataclass(frozen=True)
class Opened:
    """What a round's sum says.

    Args:
        total_weight: of all sites in the sum.
        num_clamped: values that were beyond their range, of all sites.
        metrics: weighted means.
        tensors: weighted means; empty for metrics alone.
        largest: for each tensor, the largest absolute value of the opened sum.
    """

    total_weight: int
    num_clamped: int
    metrics: Mapping[str, float]
    tensors: Tensors
    largest: tuple[float, ...]


def opened(total: Vector, scalars: Scalars, before: Tensors, grids: Grids, metrics: Sequence[str]) -> Opened | None:
    """Read a round's sums; None where nobody had any weight."""
    weight, clamped, *numerators = (int(one) for one in scalars.view(np.int64))
    if weight <= 0:
        return None
    tensors: dict[str, AnyArray] = {}
    largest = []
    start = 0
    for (name, old), (size, grid) in zip(before.items(), grids, strict=True):
        sums = grid.from_ring(total[start : start + size])
        largest.append(float(np.abs(sums).max(initial=0.0)))
        mean = old.astype(np.float64) + (sums / weight).reshape(old.shape)
        tensors[name] = np.asarray(mean, dtype=old.dtype if old.dtype.kind == "f" else np.float64)
        start += size
    means = {name: math.ldexp(one, METRIC_STEP_EXP) / weight for name, one in zip(metrics, numerators, strict=True)}
    return Opened(weight, clamped, means, tensors, tuple(largest))


@dataclass
class Ranges:
    """The largest ``|weight * update|`` that the next round's grids hold, for each tensor.

    They start at ``caps`` (public constants). After an opened round a range is ``headroom`` times the largest opened value: a
    site's own values may exceed the sum's where sites pull in different directions. Whenever values were clamped, all ranges
    grow by the headroom and never shrink below that again.
    """

    caps: tuple[float, ...]
    ring_bits: int
    now: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.caps
        self._floors: tuple[float, ...] = (SMALLEST_RANGE,) * len(self.caps)

    @property
    def headroom(self) -> float:
        """16, 64, 256 for 16, 24, 32 bits."""
        return 2.0 ** (self.ring_bits // 4)

    def learn(self, largest: Sequence[float], num_clamped: int) -> None:
        """Choose the next ranges by what a round opened."""
        if num_clamped:
            self._floors = tuple(min(cap, self.headroom * one) for cap, one in zip(self.caps, self.now, strict=True))
        wanted = [max(floor, self.headroom * top) for floor, top in zip(self._floors, largest, strict=True)]
        self.now = tuple(min(cap, one) for cap, one in zip(self.caps, wanted, strict=True))
