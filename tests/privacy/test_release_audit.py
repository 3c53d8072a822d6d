"""White-box audit of the real release path: a lower bound on epsilon from one run (Steinke, Nasr, Jagielski 2023).

5000 canaries with one-hot gradients are in or out by a coin each; sampling, clip, grid and noise are the product's own. What
is audited by rows is audited by engines, too: of a linear model whose loss is its output, a record is its own gradient. The
bound exceeds the true epsilon with probability at most FALSE_ALARM. Nothing is seeded: the noise cannot be.

What this cannot show: that epsilon is small. Noise of a half passes here; `test_mechanisms` and `test_release` find 1 %.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from urna.models.book_keeping import BookKeeping
from urna.models.engine_types import Engine
from urna.models.row_engines import Hooks, Loop, Vmap
from urna.models.tunable import Batch, Tunable
from urna.privacy.accounting import noise_multiplier_for
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, poisson_sample
from urna.privacy.release import engine_clip, noisy_sum, noisy_total

CANARIES, GUESSES, STEPS, SAMPLE_RATE = 5000, 1000, 16, 0.5
EPSILON, DELTA = 1.0, 1e-8  # with delta 1e-5 the bound's term 2 m delta alone is a false alarm of 1e-4
FALSE_ALARM = 1e-4
Release = Callable[[Floats, float], Integers]  # rows, noise multiplier
GRID = Grid(-14, 4)


def p_value(right: int, guesses: int, epsilon: float, delta: float) -> float:
    """How likely ``right`` or more correct guesses are under (epsilon, delta)-DP (theorem 5.2 and appendix D)."""
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, chance))
    tails = np.cumsum(stats.binom.pmf(right - np.arange(1, right + 1), guesses, chance))
    alpha = float((tails / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * CANARIES * delta * alpha)


def epsilon_lower_bound(right: int, guesses: int) -> float:
    """The largest epsilon that so many correct guesses refute; 0 where they refute nothing."""
    low, high = 0.0, 20.0
    if p_value(right, guesses, low, DELTA) > FALSE_ALARM:
        return 0.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(right, guesses, middle, DELTA) < FALSE_ALARM else (low, middle)
    return low


def audit(release: Release, noise_multiplier: float) -> float:
    """Run DP-SGD's sums over canaries, guess the highest and lowest scores, bound epsilon."""
    present = poisson_sample(CANARIES, 0.5)  # the coins
    members = np.flatnonzero(present)
    scores = np.zeros(CANARIES)
    for _ in range(STEPS):
        chosen = members[poisson_sample(len(members), SAMPLE_RATE)]
        scores += sums_in_parts(release, chosen, noise_multiplier)
    order = np.argsort(scores)
    right = int(present[order[-GUESSES // 2 :]].sum() + (~present[order[: GUESSES // 2]]).sum())
    return epsilon_lower_bound(right, GUESSES)


def sums_in_parts(release: Release, chosen: Integers, noise_multiplier: float) -> Floats:
    """One release of 5000 numbers; rows that are orthogonal may be made 500 columns at a time (with the same noise)."""
    parts = []
    for start in range(0, CANARIES, 500):
        here = chosen[(chosen >= start) & (chosen < start + 500)]
        rows = np.zeros((len(here), 500))
        rows[np.arange(len(here)), here - start] = 100.0  # far above the clip
        parts.append(release(rows, noise_multiplier))
    return np.concatenate(parts).astype(np.float64) * GRID.step


def real(rows: Floats, noise_multiplier: float) -> Integers:
    return noisy_sum(rows, 1.0, noise_multiplier, GRID, num_noise_parties=1)


def score_of(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a model with one weight a canary: an example's gradient is its features."""
    scores: torch.Tensor = module(batch["features"])
    return scores[:, 0]


@functools.cache
def engine_of(kind: Callable[[Tunable], Engine], num_weights: int) -> Engine:
    return kind(Tunable(nn.Linear(num_weights, 1, bias=False), loss=score_of))


def engine_total(kind: Callable[[Tunable], Engine], rows: Floats, clip: float) -> Floats:
    """What an engine gives for records ``rows``, zeros of none."""
    if not len(rows):
        return np.zeros(rows.shape[1])
    batch = {"features": torch.from_numpy(rows.astype(np.float32))}
    return np.asarray(engine_of(kind, rows.shape[1]).clipped_sum(batch, clip).total.numpy(), dtype=np.float64)


def by_engine(kind: Callable[[Tunable], Engine]) -> Release:
    """The release of a model's own weights: engine, grid, noise."""

    def release(rows: Floats, noise_multiplier: float) -> Integers:
        total = engine_total(kind, rows, engine_clip(1.0, rows.shape[1], GRID))
        return noisy_total(total, 1.0, noise_multiplier, GRID, num_noise_parties=1)

    return release


def engine_without_noise(rows: Floats, noise_multiplier: float) -> Integers:  # noqa: ARG001 - the fault
    return GRID.quantise(engine_total(BookKeeping, rows, engine_clip(1.0, rows.shape[1], GRID)))


def engine_that_does_not_clip(rows: Floats, noise_multiplier: float) -> Integers:
    return noisy_total(engine_total(BookKeeping, rows, 1e6), 1.0, noise_multiplier, GRID, num_noise_parties=1)


def without_noise(rows: Floats, noise_multiplier: float) -> Integers:  # noqa: ARG001 - the fault
    total: Integers = GRID.quantise_rows(rows, 1.0).sum(axis=0, dtype=np.int64)
    return total


def a_tenth_of_the_noise(rows: Floats, noise_multiplier: float) -> Integers:
    return real(rows, noise_multiplier / 10)


def without_the_clip(rows: Floats, noise_multiplier: float) -> Integers:
    total: Integers = np.rint(rows.sum(axis=0) / GRID.step).astype(np.int64)
    return total + real(rows[:0], noise_multiplier)


@pytest.fixture(scope="module")
def multiplier() -> float:
    """The noise that the product's own accountant asks for."""
    return noise_multiplier_for(EPSILON, DELTA, STEPS, SAMPLE_RATE)


def test_audit_white_box_eps1(multiplier: float) -> None:
    """False alarm at most 1e-4 if the release is (1, 1e-8)-DP; in truth far less, for the bound is loose."""
    assert audit(real, multiplier) <= EPSILON


@pytest.mark.parametrize("kind", [BookKeeping, Hooks, Vmap, Loop])
def test_audit_white_box_eps1_through_every_engine(kind: Callable[[Tunable], Engine], multiplier: float) -> None:
    """As above."""
    assert audit(by_engine(kind), multiplier) <= EPSILON


@pytest.mark.parametrize("kind", [BookKeeping, Hooks, Vmap, Loop])
def test_every_engine_sees_the_canaries(kind: Callable[[Tunable], Engine]) -> None:
    """Else its audit would pass by being blind: with next to no noise the bound is far above epsilon."""
    assert audit(by_engine(kind), 0.01) > 3.0


MUTANTS = [without_noise, without_the_clip, engine_without_noise, engine_that_does_not_clip]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.__name__)
def test_audit_kills_mutants(mutant: Release, multiplier: float) -> None:
    """All 1000 guesses are right but for canaries that were in and never sampled: 0.04 of 5000 are expected.

    Ten wrong guesses, of probability below 1e-15, would still refute epsilon 3.
    """
    assert audit(mutant, multiplier) > 3.0


def test_audit_notices_a_tenth_of_the_noise(multiplier: float) -> None:
    assert audit(a_tenth_of_the_noise, multiplier) > 1.5 * EPSILON


def test_the_auditor_claims_nothing_from_coin_flips() -> None:
    assert epsilon_lower_bound(GUESSES // 2, GUESSES) == 0.0
    assert epsilon_lower_bound(GUESSES, GUESSES) > 4.0
    assert epsilon_lower_bound(GUESSES - 10, GUESSES) > 3.0


def test_the_p_value_without_delta_is_the_binomial_tail() -> None:
    """Ten of ten at epsilon 0 is 2**-10; at ln 3 it is 0.75**10."""
    assert p_value(10, 10, 0.0, 0.0) == pytest.approx(2.0**-10)
    assert p_value(10, 10, math.log(3), 0.0) == pytest.approx(0.75**10)
