"""Which grid and ring each stage's sums use, from public numbers only: the narrowest ring, from the plan's on, that fits.

A sum fits when no honest one can wrap (twice the expected data plus twelve standard deviations of all the noise in it), when a
clip is enough grid units for its rounding, and when every share of the noise is at least 32 units (`mechanisms.integer_noise`).
"""

import math
from collections.abc import Sequence

from urna.privacy.fixed_point import Grid, grid_for
from urna.privacy.ring import RING_BITS
from urna.protocol.errors import PlanError
from urna.protocol.messages import Member
from urna.protocol.plan import Plan

NOISE_RANGE = 12.0  # standard deviations of noise that the ring leaves room for
MIN_NOISE_UNITS = 32


def ballot_grid(plan: Plan, cohort: Sequence[Member], num_candidates: int, multiplier: float) -> Grid:
    """For votes: one vector of norm ``ballot.clip`` a bucket, a record changes two.

    Raises:
        PlanError: no ring fits.
    """
    clip = plan.ballot.clip
    buckets = sum(plan.num_buckets(member.num_records) for member in cohort)
    return _narrowest(plan, "the ballot", len(cohort), clip * buckets, num_candidates, clip, 2, multiplier)


def count_grid(plan: Plan, cohort: Sequence[Member], size: int, multiplier: float) -> Grid:
    """For held-out counts: one vector of norm 1 a record.

    Raises:
        PlanError: no ring fits.
    """
    return _narrowest(plan, "evaluation", len(cohort), 2.0 * plan.num_heldout_records, size, 1.0, 1, multiplier)


def train_grid(plan: Plan, cohort: Sequence[Member], size: int, multiplier: float) -> Grid:
    """For sums of clipped gradients, or (local noise) of weighted changes, which are private before they are rounded.

    Raises:
        PlanError: no ring fits.
    """
    clip = plan.final.max_grad_norm
    if plan.privacy.noise == "shared":
        return _narrowest(plan, "training", len(cohort), 2 * plan.expected_batch * clip, size, clip, 1, multiplier)
    reach = _reach_of_local_steps(plan, cohort, multiplier)
    for bits in RING_BITS:
        grid = _grid(reach, len(cohort), bits) if bits >= plan.federation.ring_bits else None
        if grid is not None:
            return grid
    raise PlanError(f"expected changes of heads that a ring can hold, found up to {reach:.3g}: change final's rates and norms")


def _reach_of_local_steps(plan: Plan, cohort: Sequence[Member], multiplier: float) -> float:
    """How far a head can move in a round of local steps: a bound for the ring, far from tight."""
    final = plan.final
    smallest = min(member.num_records for member in cohort) * (1 - plan.evaluation.holdout_fraction)
    noise = NOISE_RANGE * multiplier / (final.sample_rate * smallest)
    return final.local_learning_rate * final.max_grad_norm * final.local_steps * (4.0 + noise)


def _narrowest(
    plan: Plan, what: str, num_sites: int, data: float, size: int, clip: float, clips: int, multiplier: float
) -> Grid:
    parties = plan.noise_parties(num_sites)
    largest = data + NOISE_RANGE * clips * clip * multiplier * math.sqrt(num_sites / parties)
    units = 0
    for bits in RING_BITS:
        if bits >= plan.federation.ring_bits:
            grid = _grid(largest, num_sites, bits)
            if grid is None:
                continue
            units = grid.units(clip)
            share = multiplier * clips * units / math.sqrt(parties)
            if units > 2 * (math.sqrt(size) / 2 + 1) and share >= MIN_NOISE_UNITS:
                return grid
    raise PlanError(
        f"expected a ring of 32 bits to hold {what} of {num_sites} sites with a clip of {clip:g} and noise of {multiplier:.3g} "
        f"clips, found {units} grid units for a clip: ask fewer records or sites, or a higher epsilon"
    )


def _grid(largest: float, num_sites: int, bits: int) -> Grid | None:
    """The grid of a ring; None where no step of it is within reach."""
    try:
        return grid_for(largest, num_sites, bits)
    except ValueError:
        return None
