"""The ring of every stage's sums: no honest sum wraps, and what no ring holds is said as an error of the plan."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.simulator import small
from urna.client.optimizers import LocalOptimizer
from urna.privacy.fixed_point import Grid
from urna.privacy.release import engine_clip
from urna.protocol.errors import PlanError
from urna.protocol.messages import Member
from urna.protocol.plan import Plan
from urna.strategies.sizing import MIN_NOISE_UNITS, ballot_grid, count_grid, train_grid

RECORDS = 300  # declared by each site
MULTIPLIER = 4.0
Size = Callable[[Plan, Sequence[Member], int, float], Grid]


def plan_of(num_sites: int, noise: str, ring_bits: int, **final: object) -> Plan:
    document = small(noise=noise, names=("pixels",)).model_dump()
    document["privacy"]["max_colluding_sites"] = int(num_sites > 2)
    document["federation"] |= {
        "min_sites": min(num_sites, 3),
        "num_records": RECORDS * num_sites,
        "ring_bits": ring_bits,
        "virtual": None,
    }
    document["final"] |= final
    return Plan.model_validate(document)


def cohort_of(num_sites: int) -> tuple[Member, ...]:
    """Only the declared sizes matter."""
    return tuple(
        Member.model_construct(site=f"site-{number}", public_key="", num_records=RECORDS, signature="")
        for number in range(num_sites)
    )


def noise_of(plan: Plan, num_sites: int, one_release: float) -> float:
    """Of a sum in which all sites survive: each adds the share that makes ``one_release`` of the parties that are counted."""
    return one_release * math.sqrt(num_sites / plan.noise_parties(num_sites))


@pytest.mark.parametrize("noise", ["shared", "local"])
@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_no_honest_sum_of_two_to_forty_sites_wraps_with_twelve_standard_deviations_of_noise(noise: str, ring_bits: int) -> None:
    for num_sites in range(2, 41):
        plan, cohort = plan_of(num_sites, noise, ring_bits), cohort_of(num_sites)
        buckets = sum(plan.num_buckets(member.num_records) for member in cohort)
        clip, norm = plan.ballot.clip, plan.final.max_grad_norm
        stages = {  # grid, largest honest data, standard deviation of one release
            "ballot": (ballot_grid(plan, cohort, 3, MULTIPLIER), clip * buckets, 2 * clip * MULTIPLIER),
            "counts": (count_grid(plan, cohort, 102, MULTIPLIER), float(plan.num_heldout_records), MULTIPLIER),
        }
        if noise == "shared":
            gradients = train_grid(plan, cohort, 650, MULTIPLIER)
            stages["training"] = (gradients, plan.expected_batch * norm, norm * MULTIPLIER)
        else:  # a mean of changes: every step moves a head by a clipped mean and its noise
            steps, rate = plan.final.local_steps, plan.final.local_learning_rate
            tuning = RECORDS * (1 - plan.evaluation.holdout_fraction)
            std = norm * MULTIPLIER / (plan.final.sample_rate * tuning)
            changes = train_grid(plan, cohort, 650, MULTIPLIER)
            largest = rate * (steps * norm + 12 * math.sqrt(steps) * std)
            assert largest / changes.step + num_sites / 2 < changes.ring.half, num_sites
            assert changes.ring_bits >= ring_bits
        for what, (grid, data, std) in stages.items():
            reach = data + 12 * noise_of(plan, num_sites, std)
            assert reach / grid.step + num_sites < grid.ring.half, (what, num_sites)
            assert data / grid.step <= grid.bound, (what, num_sites)  # of one site that holds it all: nothing is clamped
            assert std / math.sqrt(plan.noise_parties(num_sites)) / grid.step >= MIN_NOISE_UNITS * 0.99, (what, num_sites)
            assert (grid.num_summands, grid.ring_bits >= ring_bits) == (num_sites, True)


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_a_clip_that_no_ring_holds_is_an_error_of_the_plan(ring_bits: int) -> None:
    for clip in (1e-300, 1e-30, 1e-17):
        with pytest.raises(PlanError, match=r"expected a ring of 32 bits to hold training of 5 sites with a clip of 1e-"):
            train_grid(plan_of(5, "shared", ring_bits, max_grad_norm=clip), cohort_of(5), 650, MULTIPLIER)


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_changes_that_a_narrow_ring_cannot_hold_go_to_a_wider_one_or_are_an_error_of_the_plan(ring_bits: int) -> None:
    cohort = cohort_of(40)
    wide = plan_of(40, "local", ring_bits, local_learning_rate=1000.0, max_grad_norm=1000.0, local_steps=10_000)
    grid = train_grid(wide, cohort, 650, 1e5)
    assert grid.ring_bits == max(24, ring_bits)  # with 16 bits a step would be beyond 2**30
    for plan, multiplier in (
        (wide, 1e12),
        (plan_of(40, "local", ring_bits, local_learning_rate=1e-300), MULTIPLIER),
    ):
        with pytest.raises(PlanError, match="expected changes that a ring can hold, found up to"):
            train_grid(plan, cohort, 650, multiplier)


def test_a_noise_or_clip_at_either_end_is_never_another_error() -> None:
    """Every stage, from the smallest to the largest that a plan may say."""
    sizes: tuple[Size, ...] = (ballot_grid, count_grid, train_grid)
    found = {"grid": 0, "plan": 0}
    for noise in ("shared", "local"):
        for clip in (1e-300, 1e-9, 1.0, 1000.0):
            plan = plan_of(5, noise, 16, max_grad_norm=clip, local_learning_rate=1000.0)
            for multiplier in (1e-6, 1.0, 1e6, 1e12, 1e100):
                for size in sizes:
                    try:
                        grid = size(plan, cohort_of(5), 100, multiplier)
                        found["grid"] += grid.ring_bits >= 16
                    except PlanError:
                        found["plan"] += 1
    assert min(found.values()) >= 20


def test_a_model_of_a_hundred_million_numbers_has_a_grid_and_rounding_takes_little_of_its_clip() -> None:
    """Forty sites, 2,400 records in a sum: what is left for a single number is more than any share of the noise in it."""
    for size in (650, 200_000, 22_000_000, 110_000_000):
        for ring_bits in (16, 24, 32):
            plan = plan_of(40, "shared", ring_bits, tuning="full")
            grid = train_grid(plan, cohort_of(40), size, MULTIPLIER)
            assert 1 - engine_clip(1.0, size, grid) < 0.13, (size, ring_bits)
            assert grid.ring_bits >= ring_bits
            noise = noise_of(plan, 40, MULTIPLIER)
            assert (plan.expected_batch / 8 + 12 * noise) / grid.step + 40 < grid.ring.half, (size, ring_bits)


def test_a_model_that_no_ring_holds_is_an_error_of_the_plan() -> None:
    with pytest.raises(PlanError, match="expected a ring of 32 bits to hold training of 40 sites"):
        train_grid(plan_of(40, "shared", 32, tuning="full"), cohort_of(40), 10**12, MULTIPLIER)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_no_local_optimiser_moves_a_number_beyond_its_ring(optimizer: str) -> None:
    """Gradients of the worst kind: clipped ones of one direction, then twelve standard deviations of noise in every step."""
    decay = 0.5 if optimizer == "adamw" else 0.0
    plan = plan_of(5, "local", 32, local_optimizer=optimizer, local_weight_decay=decay, local_steps=50)
    final, clip = plan.final, plan.final.max_grad_norm
    batch = final.sample_rate * RECORDS * (1 - plan.evaluation.holdout_fraction)
    steady = np.full((50, 1), -(clip + 12 * MULTIPLIER * clip / batch))
    sparse = np.zeros((50, 1))
    sparse[49] = steady[0]
    reach = train_grid(plan, cohort_of(5), 1, MULTIPLIER)
    for gradients in (steady, sparse, steady * (-1.0) ** np.arange(50)[:, None]):
        taken = LocalOptimizer(np.zeros(1), final)
        for gradient in gradients:
            taken.step(gradient, 1.0)
        assert abs(taken.vector[0]) / reach.step < reach.bound
