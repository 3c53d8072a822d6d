"""Which grid and ring each stage's sums use, from public numbers only: the narrowest ring, from the plan's on, that fits.

A sum fits when no honest one can wrap (twice the expected data plus twelve standard deviations of all the noise in it), when a
clip is enough grid units for its rounding, and when every share of the noise is at least 32 units (`mechanisms.integer_noise`).

Rounding takes a part of the clip: of rows sqrt(p) / 2 + 1 units (`Grid.quantise_rows`), of an engine's sum sqrt(p)
(`release.engine_clip`). A grid is taken for an engine's sum only where that is an eighth at most. Where no ring is wide enough
for it (many millions of numbers, many records), single numbers get less room: no gradient of a large model points along one
weight, and a sum of data that does is clamped at its site, which is a contraction (`Grid.clamp`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from urna.privacy.fixed_point import Grid, grid_for
from urna.privacy.ring import RING_BITS
from urna.protocol.errors import PlanError
from urna.protocol.messages import Member
from urna.protocol.plan import Plan

NOISE_RANGE = 12.0  # standard deviations of noise that the ring leaves room for
MIN_NOISE_UNITS = 32
ENGINE_REACHES = (1.0, 1 / 4, 1 / 16)  # parts of twice the expected data that a single number of an engine's sum has room for
ADAM_REACH = 4.0  # rates that a step of Adam moves a number at most: (1 - 0.9) / sqrt(1 - 0.999) = 3.2 (Kingma, Ba 2015, 2.1)
MOMENTUM_REACH = 10.0  # steps that a step of momentum 0.9 adds up to
OFFSET_REACH = 10.0  # of a number that weight decay shrinks; what is beyond is clamped at the site, which is post-processing


def ballot_grid(plan: Plan, cohort: Sequence[Member], num_candidates: int, multiplier: float) -> Grid:
    """For votes: one vector of norm ``ballot.clip`` a bucket, a record changes two.

    Raises:
        PlanError: no ring fits.
    """
    clip = plan.ballot.clip
    buckets = sum(plan.num_buckets(member.num_records) for member in cohort)
    return _narrowest(plan, "the ballot", len(cohort), clip * buckets, _Rounded(num_candidates), clip, 2, multiplier)


def count_grid(plan: Plan, cohort: Sequence[Member], size: int, multiplier: float) -> Grid:
    """For held-out counts: one vector of norm 1 a record.

    Raises:
        PlanError: no ring fits.
    """
    return _narrowest(plan, "evaluation", len(cohort), 2.0 * plan.num_heldout_records, _Rounded(size), 1.0, 1, multiplier)


def train_grid(plan: Plan, cohort: Sequence[Member], size: int, multiplier: float) -> Grid:
    """For sums of clipped gradients, or (local noise) of weighted changes, which are private before they are rounded.

    Raises:
        PlanError: no ring fits.
    """
    clip = plan.final.max_grad_norm
    if plan.privacy.noise == "shared":
        rounded = _Rounded(size, by_engine=plan.final.tuning != "head")
        return _narrowest(plan, "training", len(cohort), 2 * plan.expected_batch * clip, rounded, clip, 1, multiplier)
    reach = _reach_of_local_steps(plan, cohort, multiplier)
    for bits in RING_BITS:
        grid = _grid(reach, len(cohort), bits) if bits >= plan.federation.ring_bits else None
        if grid is not None:
            return grid
    raise PlanError(f"expected changes that a ring can hold, found up to {reach:.3g}: change final's rates and norms")


def _reach_of_local_steps(plan: Plan, cohort: Sequence[Member], multiplier: float) -> float:
    """How far a number can move in a round of local steps: a bound for the ring, far from tight."""
    final = plan.final
    if final.local_optimizer in ("adam", "adamw"):
        decay = OFFSET_REACH * final.local_weight_decay
        return final.local_learning_rate * final.local_steps * (ADAM_REACH + decay)
    smallest = min(member.num_records for member in cohort) * (1 - plan.evaluation.holdout_fraction)
    noise = NOISE_RANGE * multiplier / (final.sample_rate * smallest)
    reach = final.local_learning_rate * final.max_grad_norm * final.local_steps * (4.0 + noise)
    return reach * (MOMENTUM_REACH if final.local_optimizer == "momentum" else 1.0)


@dataclass(frozen=True)
class _Rounded:
    """Vectors of ``size`` numbers: rows that are rounded here, or sums of an engine."""

    size: int
    by_engine: bool = False

    @property
    def min_units(self) -> float:
        """Grid units that a clip has to be more than."""
        return 8 * math.sqrt(self.size) if self.by_engine else 2 * (math.sqrt(self.size) / 2 + 1)


def _narrowest(
    plan: Plan, what: str, num_sites: int, data: float, rounded: _Rounded, clip: float, clips: int, multiplier: float
) -> Grid:
    parties = plan.noise_parties(num_sites)
    noise = NOISE_RANGE * clips * clip * multiplier * math.sqrt(num_sites / parties)
    units = 0
    for reach in ENGINE_REACHES if rounded.by_engine else (1.0,):
        for bits in (one for one in RING_BITS if one >= plan.federation.ring_bits):
            grid = _grid(reach * data + noise, num_sites, bits)
            if grid is None:
                continue
            units = grid.units(clip)
            share = multiplier * clips * units / math.sqrt(parties)
            if units > rounded.min_units and share >= MIN_NOISE_UNITS:
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
