"""The accountant against independent ones: exact formulas in 50 digits (mpmath), Opacus' PRV, and Renyi DP."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy import stats

from urna.privacy.accounting import (
    described,
    epsilon_of,
    epsilon_rdp,
    event_from_json,
    gaussian,
    gaussian_delta,
    mu_for,
    noise_multiplier_for,
    subsampled_gaussian,
)
from urna.protocol.messages import BallotRequest, EvaluateRequest, Summed, TrainRequest
from urna.protocol.plan import Plan

DELTA = 1e-5
Account = Callable[[Iterable[str], float], float]


def exact_delta(mu: float, epsilon: float) -> float:
    """Balle and Wang 2018, theorem 8, in 50 digits."""
    with mpmath.workdps(50):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return float(mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m))


def exact_epsilon(mu: float, delta: float) -> float:
    """The epsilon of Gaussian releases of a common mu, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(mu, middle) > delta else (low, middle)
    return high


@cache
def epsilon_prv(noise_multiplier: float, sample_rate: float, count: int) -> float:
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, count)]
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize(("noise_multiplier", "count"), [(4.0, 1), (4.0, 10), (4.0, 50), (0.8, 1), (20.0, 400), (1.0, 3)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:opacus", "ignore:Optimal order is the largest:UserWarning")
def test_accountants_bracket_exact(noise_multiplier: float, count: int) -> None:
    events = [gaussian(noise_multiplier)] * count
    exact = exact_epsilon(math.sqrt(count) / noise_multiplier, DELTA)
    found = epsilon_of(events, DELTA)
    assert exact <= found <= epsilon_prv(noise_multiplier, 1.0, count) + 0.02 <= epsilon_rdp(events, DELTA) + 0.02
    assert found <= exact + 0.003
    assert epsilon_prv(noise_multiplier, 1.0, count) <= epsilon_rdp(events, DELTA)


@pytest.mark.parametrize(("noise_multiplier", "sample_rate", "count"), [(1.1, 0.05, 200), (2.46, 0.25, 40), (0.9, 0.01, 1000)])
def test_accountants_bracket_each_other_on_dp_sgd(noise_multiplier: float, sample_rate: float, count: int) -> None:
    events = [subsampled_gaussian(sample_rate, noise_multiplier)] * count
    prv, found = epsilon_prv(noise_multiplier, sample_rate, count), epsilon_of(events, DELTA)
    assert prv - 0.03 <= found <= prv + 0.02 <= epsilon_rdp(events, DELTA)


def test_dp_sgd_costs_what_was_measured_elsewhere() -> None:
    """PLD 3.9617, PRV 3.9719, RDP 4.443 by three implementations, in the project's research notes."""
    events = [subsampled_gaussian(0.05, 1.1)] * 200
    assert epsilon_of(events, DELTA) == pytest.approx(3.9617, abs=2e-3)
    assert epsilon_rdp(events, DELTA) == pytest.approx(4.443, abs=2e-3)


def exact_delta_of_one_sample(sample_rate: float, noise_multiplier: float, epsilon: float) -> float:
    """Delta of one Poisson-subsampled Gaussian release, both directions, by the likelihood ratio (closed form)."""
    q, s = sample_rate, noise_multiplier

    def tail(x: float, mean: float) -> float:
        return float(stats.norm.sf((x - mean) / s))

    def crossing(ratio: float) -> float:  # where (1 - q) + q exp((2x - 1) / 2s^2) equals ratio
        return s * s * math.log((ratio - (1 - q)) / q) + 0.5

    remove = 0.0
    x = crossing(math.exp(epsilon))
    remove = (1 - q) * tail(x, 0) + q * tail(x, 1) - math.exp(epsilon) * tail(x, 0)
    add = 0.0
    if math.exp(-epsilon) > 1 - q:
        x = crossing(math.exp(-epsilon))
        mixed = (1 - q) * (1 - tail(x, 0)) + q * (1 - tail(x, 1))
        add = (1 - tail(x, 0)) - math.exp(epsilon) * mixed
    return max(remove, add)


@pytest.mark.parametrize(("sample_rate", "noise_multiplier"), [(0.25, 1.0), (0.5, 0.7), (0.01, 0.6), (0.9, 2.0)])
def test_one_sampled_release_costs_its_exact_epsilon(sample_rate: float, noise_multiplier: float) -> None:
    found = epsilon_of([subsampled_gaussian(sample_rate, noise_multiplier)], DELTA)
    assert exact_delta_of_one_sample(sample_rate, noise_multiplier, found) <= DELTA
    assert exact_delta_of_one_sample(sample_rate, noise_multiplier, found - 0.003) > DELTA


MIXED = [gaussian(3.0), *[subsampled_gaussian(0.25, 2.0)] * 5, gaussian(9.0), gaussian(3.0)]


def test_order_does_not_matter() -> None:
    orders = [MIXED, MIXED[::-1], MIXED[3:] + MIXED[:3]]
    assert len({epsilon_of(one, DELTA) for one in orders}) == 1
    assert len({epsilon_rdp(one, DELTA) for one in orders}) == 1


def test_iterators_are_read_once_and_in_full() -> None:
    assert epsilon_of(iter(MIXED), DELTA) == epsilon_of(tuple(MIXED), DELTA)
    assert epsilon_of((one for one in MIXED), DELTA) == epsilon_of(MIXED, DELTA)


def test_splitting_gaussian_releases_changes_nothing_but_rounding() -> None:
    """Four releases of multiplier 8 are one of multiplier 4."""
    assert epsilon_of([gaussian(8.0)] * 4, DELTA) == pytest.approx(epsilon_of([gaussian(4.0)], DELTA), abs=4e-3)


def test_merging_equal_events_changes_nothing_but_rounding() -> None:
    """Multipliers that differ in the last bit are not merged, and composed one by one."""
    close = [gaussian(np.nextafter(5.0, 6.0)), gaussian(5.0), gaussian(np.nextafter(5.0, 4.0))]
    assert epsilon_of(close, DELTA) == pytest.approx(epsilon_of([gaussian(5.0)] * 3, DELTA), abs=4e-3)


events_of = st.lists(
    st.builds(gaussian, st.sampled_from([1.0, 2.0, 5.0]))
    | st.builds(subsampled_gaussian, st.sampled_from([0.1, 0.5]), st.sampled_from([1.0, 3.0])),
    max_size=4,
)


@settings(max_examples=12, deadline=None)
@given(events_of, events_of.filter(bool))
def test_one_more_release_never_lowers_epsilon(events: list[str], more: list[str]) -> None:
    before = epsilon_of(events, DELTA)
    assert before <= epsilon_of(events + more, DELTA) + 1e-9
    assert epsilon_of(more, DELTA) > 0


def test_nothing_released_costs_nothing() -> None:
    assert epsilon_of([], DELTA) == epsilon_rdp([], DELTA) == 0.0


def test_a_smaller_delta_costs_a_larger_epsilon() -> None:
    epsilons = [epsilon_of(MIXED, delta) for delta in (1e-3, 1e-5, 1e-8)]
    assert epsilons == sorted(epsilons)
    assert len(set(epsilons)) == 3


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_means_nothing_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta must be in \(0, 1\), found"):
        epsilon_of([gaussian(1.0)], delta)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_that_means_nothing_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier must be positive and finite, found"):
        gaussian(value)
    with pytest.raises(ValueError, match="noise_multiplier must be positive and finite, found"):
        subsampled_gaussian(0.5, value)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_rate_that_means_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\], found"):
        subsampled_gaussian(rate, 1.0)


def test_sampling_at_rate_one_is_no_sampling() -> None:
    assert subsampled_gaussian(1.0, 2.5) == gaussian(2.5)


def test_sampling_less_costs_less() -> None:
    costs = [epsilon_of([subsampled_gaussian(rate, 1.0)] * 5, DELTA) for rate in (0.01, 0.1, 0.5, 1.0)]
    assert costs == sorted(costs)


# What ledgers hold, and the exact epsilon at 1e-5 of each. These strings are never changed: a new mechanism gets a new event.
GOLDEN = {
    '{"GaussianDpEvent":{"noise_multiplier":4.0}}': (gaussian(4.0), 0.92634),
    '{"GaussianDpEvent":{"noise_multiplier":0.3333333333333333}}': (gaussian(1 / 3), 16.67549),
    '{"PoissonSampledDpEvent":{"event":{"GaussianDpEvent":{"noise_multiplier":1.0}},"sampling_probability":0.25}}': (
        subsampled_gaussian(0.25, 1.0),
        2.70651,
    ),
}


@pytest.mark.parametrize("stored", GOLDEN)
def test_the_meaning_of_a_stored_event_never_changes(stored: str) -> None:
    written, epsilon = GOLDEN[stored]
    assert written == stored
    assert epsilon_of([stored], DELTA) == pytest.approx(epsilon, abs=1.5e-3)


def test_an_event_is_read_whatever_the_order_of_its_keys() -> None:
    stored = (
        '{ "PoissonSampledDpEvent": {"sampling_probability": 0.25, "event": {"GaussianDpEvent": {"noise_multiplier": 1.0}}}}'
    )
    assert event_from_json(stored) == event_from_json(subsampled_gaussian(0.25, 1.0))


GAUSSIAN = {"GaussianDpEvent": {"noise_multiplier": 1.0}}


@pytest.mark.parametrize(
    "event",
    [
        {},
        [],
        None,
        1.0,
        "GaussianDpEvent",
        {"LaplaceDpEvent": {"noise_multiplier": 1.0}},
        {"NoOpDpEvent": {}},
        {"GaussianDpEvent": {}},
        {"GaussianDpEvent": {"noise_multiplier": "1.0"}},
        {"GaussianDpEvent": {"noise_multiplier": True}},
        {"GaussianDpEvent": {"noise_multiplier": None}},
        {"GaussianDpEvent": {"noise_multiplier": 10**400}},
        {"GaussianDpEvent": {"noise_multiplier": 1.0, "count": 0}},
        {**GAUSSIAN, "NoOpDpEvent": {}},
        {"PoissonSampledDpEvent": {"sampling_probability": 0.0, "event": GAUSSIAN}},
        {"PoissonSampledDpEvent": {"sampling_probability": -0.5, "event": GAUSSIAN}},
        {"PoissonSampledDpEvent": {"sampling_probability": 1.5, "event": GAUSSIAN}},
        {"PoissonSampledDpEvent": {"sampling_probability": math.nan, "event": GAUSSIAN}},
        {"PoissonSampledDpEvent": {"sampling_probability": 0.5, "event": {"NoOpDpEvent": {}}}},
        {
            "PoissonSampledDpEvent": {
                "sampling_probability": 0.5,
                "event": {"PoissonSampledDpEvent": {"sampling_probability": 0.5, "event": GAUSSIAN}},
            }
        },
        {"PoissonSampledDpEvent": {"sampling_probability": 0.5, "event": GAUSSIAN, "extra": 1}},
    ],
    ids=lambda event: json.dumps(event)[:90],
)
def test_an_event_that_cannot_be_accounted_is_an_error_and_not_free(event: object) -> None:
    with pytest.raises(ValueError, match=r"expected a release that this version can account for, found .*: update urna"):
        epsilon_of([json.dumps(event)], DELTA)


@pytest.mark.parametrize("value", ["0.0", "-1.0", "NaN", "Infinity", "1e999"])
def test_a_stored_event_without_noise_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="noise_multiplier must be positive and finite"):
        epsilon_of([f'{{"GaussianDpEvent":{{"noise_multiplier":{value}}}}}'], DELTA)


@pytest.mark.parametrize("text", ["", "{", "x"])
def test_an_event_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|found"):
        epsilon_of([text], DELTA)


def wrong_account(account: Account) -> set[str]:
    """How an accountant departs from exact values and simple laws."""
    wrong = set()
    for count in (1, 4, 100):
        exact = exact_epsilon(math.sqrt(count) / 5.0, DELTA)
        found = account([gaussian(5.0)] * count, DELTA)
        if found < exact:
            wrong.add("below the exact value")
        if found > exact + 0.01:
            wrong.add("far above the exact value")
    if account([gaussian(5.0), gaussian(2.0)], DELTA) < exact_epsilon(math.hypot(0.2, 0.5), DELTA):
        wrong.add("forgets an event")
    if account([subsampled_gaussian(0.5, 0.7)], DELTA) < epsilon_of([subsampled_gaussian(0.4, 0.7)], DELTA):
        wrong.add("sampling")
    return wrong


ACCOUNT_MUTANTS: dict[str, tuple[Account, str]] = {
    "drops the count": (lambda events, delta: epsilon_of(set(events), delta), "below the exact value"),
    "only the last": (lambda events, delta: epsilon_of(list(events)[-1:], delta), "below the exact value"),
    "only the largest": (lambda events, delta: epsilon_of([min(events)], delta), "forgets an event"),
    "one round for all": (lambda events, delta: epsilon_of(list(events)[:1], delta), "below the exact value"),
    "adds up": (lambda events, delta: sum(epsilon_of([one], delta) for one in events), "far above the exact value"),
    "one per cent off": (lambda events, delta: 0.99 * epsilon_of(events, delta), "below the exact value"),
    "a tenth of delta": (lambda events, delta: epsilon_of(events, delta / 10), "far above the exact value"),
    "ten deltas": (lambda events, delta: epsilon_of(events, delta * 10), "below the exact value"),
    "thinks it sampled": (
        lambda events, delta: epsilon_of([subsampled_gaussian(0.3, 0.7) if "Poisson" in one else one for one in events], delta),
        "sampling",
    ),
}


@pytest.mark.parametrize("name", ACCOUNT_MUTANTS)
def test_a_planted_fault_of_the_accountant_is_found(name: str) -> None:
    mutant, symptom = ACCOUNT_MUTANTS[name]
    assert symptom in wrong_account(mutant)


def test_the_accountant_has_none_of_these_faults() -> None:
    assert wrong_account(epsilon_of) == set()


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 20), st.floats(0.01, 20))
def test_the_exact_delta_agrees_with_fifty_digits(mu: float, epsilon: float) -> None:
    assert gaussian_delta(mu, epsilon) == pytest.approx(exact_delta(mu, epsilon), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(("epsilon", "delta"), list(itertools.product([0.1, 1.0, 3.0, 8.0, 100.0], [1e-3, 1e-5, 1e-9])))
def test_mu_is_rounded_down_and_hardly(epsilon: float, delta: float) -> None:
    mu = mu_for(epsilon, delta)
    assert exact_delta(mu, epsilon) <= delta * (1 + 1e-9)
    assert exact_delta(mu * 1.001, epsilon) > delta


TARGETS = [(3.0, 40, 0.25, ()), (1.0, 5, 1.0, ()), (8.0, 20, 0.5, (gaussian(1.5),)), (0.5, 10, 0.05, (gaussian(8.0),))]


@pytest.mark.parametrize(("target", "steps", "rate", "spent"), TARGETS)
def test_the_noise_meets_the_target_and_one_per_cent_less_would_not(
    target: float, steps: int, rate: float, spent: tuple[str, ...]
) -> None:
    multiplier = noise_multiplier_for(target, DELTA, steps, rate, spent)
    assert epsilon_of([*spent, *[subsampled_gaussian(rate, multiplier)] * steps], DELTA) <= target
    assert epsilon_of([*spent, *[subsampled_gaussian(rate, 0.99 * multiplier)] * steps], DELTA) > target


def test_the_noise_is_not_found_where_nothing_is_left() -> None:
    with pytest.raises(ValueError, match="of 1 is taken by earlier releases: raise epsilon"):
        noise_multiplier_for(1.0, DELTA, 1, 0.5, [gaussian(1.0)])


def test_the_noise_is_not_found_beyond_its_range() -> None:
    with pytest.raises(ValueError, match="no noise within reach meets the target: raise epsilon or lower the number of rounds"):
        noise_multiplier_for(1e-4, 1e-9, 10_000, 1.0)


PLAN = Plan.model_validate(
    {
        "name": "x",
        "task": {"num_classes": 2},
        "candidates": [{"name": "a"}, {"name": "b"}],
        "privacy": {"epsilon": 1.0, "delta": 1e-5, "noise": "local"},
        "federation": {"min_sites": 2, "num_records": 100},
        "final": {"num_rounds": 3, "sample_rate": 0.5, "learning_rate": 0.1, "local_steps": 7},
    }
)


def test_every_kind_of_request_has_its_price() -> None:
    shared = {
        "campaign": "c",
        "plan_sha256": "0" * 64,
        "cohort": (),
        "noise_multiplier": 2.0,
        "step_exp": -9,
        "graph_nonce": "0" * 64,
    }
    ballot = BallotRequest.model_validate(shared | {"request_id": "b", "stage": "ballot", "candidates": ("a", "b")})
    train = TrainRequest.model_validate(shared | {"request_id": "t", "stage": "final", "candidate": "a"})
    evaluate = {"request_id": "e", "stage": "evaluation", "candidates": ("a",), "detail": True}
    assert described(ballot, PLAN) == ("tuning", gaussian(2.0), 1)
    assert described(train, PLAN) == ("tuning", subsampled_gaussian(0.5, 2.0), 7)
    assert described(EvaluateRequest.model_validate(shared | evaluate), PLAN) == ("heldout", gaussian(2.0), 1)


def test_a_new_kind_of_request_is_not_free() -> None:
    request = Summed.model_validate(
        {
            "campaign": "c",
            "plan_sha256": "0" * 64,
            "cohort": (),
            "noise_multiplier": 2.0,
            "step_exp": -9,
            "graph_nonce": "0" * 64,
        }
        | {"request_id": "n", "stage": "final"}
    )
    with pytest.raises(ValueError, match="no release is known for a Summed"):
        described(request, PLAN)
