import numpy as np
import pytest

from urna.privacy.fixed_point import Rounding
from urna.privacy.weighted_mean import (
    SMALLEST_RANGE,
    Ranges,
    check_types,
    grids_for,
    opened,
    scalars_of,
    weighted_update,
)
from urna.protocol.errors import ModelError, NonFiniteError, ProtocolError, SiteConfigError
from urna.protocol.messages import AnyArray

BEFORE: dict[str, AnyArray] = {
    "a": np.full((2, 3), 1.0, np.float32),
    "b": np.zeros(4, np.float32),
    "n": np.asarray(7, np.int64),
}


def summed(
    weights: list[int], shifts: list[float], ranges: tuple[float, ...], ring_bits: int = 32
) -> tuple[AnyArray, AnyArray, int]:
    """The ring's sum over sites without masks: vector, scalars, and how many values were clamped."""
    grids = grids_for(BEFORE, ranges, len(weights), ring_bits)
    total, scalars = None, np.zeros(3, np.uint64)
    for weight, shift in zip(weights, shifts, strict=True):
        after = {name: (one + np.asarray(shift, one.dtype)).astype(one.dtype) for name, one in BEFORE.items()}
        rounding = Rounding(weighted_update(BEFORE, after, weight), grids)
        vector = grids[0][1].ring.zeros(11)
        rounding(0, vector)
        total = vector if total is None else total + vector
        _, own = scalars_of(weight, {"loss": shift}, ("loss",), 1000, len(weights))
        own[1] = rounding.num_clamped
        scalars += np.array([one % 2**64 for one in own], np.uint64)
    assert total is not None
    return total, scalars, int(scalars[1])


def test_the_mean_weighs_each_site_by_its_weight() -> None:
    weights, shifts = [1, 10, 0, 5], [3.0, -2.0, 100.0, 1.0]
    total, scalars, _ = summed(weights, shifts, (2000.0, 2000.0, 2000.0))
    found = opened(total, scalars, BEFORE, grids_for(BEFORE, (2000.0,) * 3, 4, 32), ("loss",))
    mean = float(np.average(shifts, weights=weights))
    assert found is not None
    assert (found.total_weight, found.num_clamped) == (16, 0)
    assert found.metrics["loss"] == pytest.approx(mean, abs=1e-6)
    for name, one in BEFORE.items():
        assert found.tensors[name] == pytest.approx(one + mean, abs=1e-5)
        assert found.tensors[name].shape == one.shape
    assert [found.tensors[name].dtype for name in BEFORE] == [np.float32, np.float32, np.float64]
    assert found.largest == pytest.approx((12.0, 12.0, 12.0), abs=1e-4)


def test_a_sum_without_any_weight_says_nothing() -> None:
    total, scalars, _ = summed([0, 0], [1.0, 2.0], (1.0, 1.0, 1.0))
    assert opened(total, scalars, BEFORE, grids_for(BEFORE, (1.0,) * 3, 2, 32), ("loss",)) is None


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_the_largest_values_of_all_sites_do_not_wrap(ring_bits: int) -> None:
    total, scalars, clamped = summed([10] * 5, [2.0] * 5, (20.0, 20.0, 20.0), ring_bits)
    found = opened(total, scalars, BEFORE, grids_for(BEFORE, (20.0,) * 3, 5, ring_bits), ("loss",))
    assert found is not None
    assert clamped == 0
    assert found.tensors["b"] == pytest.approx(np.full(4, 2.0), abs=2e-3)


def test_values_beyond_their_range_are_clamped_and_counted() -> None:
    total, scalars, clamped = summed([10, 10], [2.0, -2.0], (20.0, 1.0, 20.0))
    found = opened(total, scalars, BEFORE, grids_for(BEFORE, (20.0, 1.0, 20.0), 2, 32), ("loss",))
    assert found is not None
    assert clamped == found.num_clamped == 8
    assert found.tensors["b"] == pytest.approx(np.zeros(4), abs=1e-6)


def test_ranges_follow_what_was_opened_and_grow_when_values_were_clamped() -> None:
    ranges = Ranges((1000.0, 1000.0), 32)
    assert (ranges.now, ranges.headroom) == ((1000.0, 1000.0), 256.0)
    ranges.learn((0.5, 0.0), 0)
    assert ranges.now == (128.0, SMALLEST_RANGE)
    ranges.learn((0.25, 0.0), 3)
    assert ranges.now == (1000.0, 256 * SMALLEST_RANGE)
    ranges.learn((0.25, 0.0), 0)
    assert ranges.now == (1000.0, 256 * SMALLEST_RANGE), "never below what was too small"
    assert [Ranges((1.0,), bits).headroom for bits in (16, 24)] == [16.0, 64.0]


def test_other_tensors_are_refused() -> None:
    for after in ({"a": BEFORE["a"]}, BEFORE | {"c": np.zeros(1)}, BEFORE | {"b": np.zeros(5, np.float32)}):
        with pytest.raises(ModelError, match="expected the tensors that were received, found others at"):
            weighted_update(BEFORE, after, 1)
    for wrong in (np.zeros(2, bool), np.zeros(2, np.complex64), np.array(["x"])):
        with pytest.raises(ModelError, match="expected tensors of floats or integers"):
            check_types({"a": wrong})


def test_a_counter_whose_mean_is_a_double_is_compared_with_the_integer_that_apps_return() -> None:
    vector = weighted_update({"n": np.asarray(6.5)}, {"n": np.asarray(9, np.int64)}, 4)
    assert vector.tolist() == [10.0]
    assert vector.dtype == np.float64


@pytest.mark.parametrize("weight", [-1, 1001, 1.0, 3.5, True, None, "5", float("nan")])
def test_a_weight_is_a_whole_number_within_its_limit(weight: object) -> None:
    with pytest.raises(SiteConfigError, match="expected a whole number of 0 to 1000 as weight"):
        scalars_of(weight, {}, (), 1000, 3)


def test_metrics_are_numbers_that_can_be_summed() -> None:
    assert scalars_of(3, {"loss": -0.5, "other": 9.0}, ("loss",), 10, 3) == (3, [3, 0, -3 * 2**19])
    for missing in ({}, {"loss": [1.0]}, {"loss": None}):
        with pytest.raises(SiteConfigError, match="expected the agreed metrics"):
            scalars_of(3, missing, ("loss",), 10, 3)
    for wrong in (float("nan"), float("inf"), 1e30, -1e30):
        with pytest.raises(NonFiniteError, match="expected finite metrics"):
            scalars_of(3, {"loss": wrong}, ("loss",), 10, 3)


def test_an_update_that_overflows_is_found_on_its_grid() -> None:
    vector = weighted_update({"a": np.zeros(2, np.float32)}, {"a": np.array([1e38, 0], np.float32)}, 10**6)
    with pytest.raises(NonFiniteError, match="expected finite numbers"):
        Rounding(vector, grids_for({"a": np.zeros(2)}, (1.0,), 3, 32))(0, np.zeros(2, np.uint32))


def test_ranges_that_fit_no_grid_are_a_peers_mistake() -> None:
    for ranges, message in (
        ((1.0,), "expected a range for each of 3 tensors, found 1"),
        ((1e300,) * 3, "a range fits no grid"),
    ):
        with pytest.raises(ProtocolError, match=message):
            grids_for(BEFORE, ranges, 3, 32)
