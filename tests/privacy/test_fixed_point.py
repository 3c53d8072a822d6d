import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from urna.privacy.fixed_point import Grid, exact_squared_norms, grid_for
from urna.privacy.ring import RING_BITS, Ring
from urna.protocol.errors import ProtocolError

exponents = st.integers(-60, 30)
summands = st.integers(1, 2**16)


@pytest.mark.parametrize(
    ("step_exp", "num_summands", "message"),
    [
        (-61, 2, "step_exp must be -60 to 30, found -61"),
        (31, 2, "step_exp must be -60 to 30, found 31"),
        (0, 0, "num_summands must be 1 to 65536, found 0"),
        (0, 2**16 + 1, "num_summands must be 1 to 65536, found 65537"),
    ],
)
def test_a_grid_out_of_range_is_refused(step_exp: int, num_summands: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(step_exp, num_summands)


@given(exponents, st.floats(0, 1e12))
def test_units_never_round_up(step_exp: int, value: float) -> None:
    units = Grid(step_exp, 1).units(value)
    step = Fraction(2) ** step_exp
    assert units * step <= Fraction(value) < (units + 1) * step


rows_of = st.integers(1, 40).flatmap(
    lambda p: st.lists(st.lists(st.floats(-1e6, 1e6) | st.floats(-1, 1), min_size=p, max_size=p), min_size=1, max_size=5)
)


@settings(max_examples=200, deadline=None)
@given(rows_of, st.integers(-24, -6), st.floats(0.2, 100))
def test_no_quantised_row_is_longer_than_its_clip(rows: list[list[float]], step_exp: int, max_norm: float) -> None:
    grid = Grid(step_exp, 4)
    assume(grid.units(max_norm) > math.sqrt(len(rows[0])) + 2)
    for row in grid.quantise_rows(np.array(rows), max_norm).tolist():
        assert sum(value * value for value in row) <= grid.units(max_norm) ** 2  # Python's integers: exact


@pytest.mark.parametrize("size", [1, 2, 10, 1000, 50_000])
def test_rounding_in_the_worst_direction_stays_within_the_clip(size: int) -> None:
    """Every coordinate half a unit above an integer rounds up: the row gets longer by sqrt(p)/2 units."""
    grid = Grid(-20, 4)
    row = np.full((1, size), 1.0 / math.sqrt(size))
    integers = grid.quantise_rows(row * 5, 1.0)
    assert sum(int(value) ** 2 for value in integers[0]) <= grid.units(1.0) ** 2
    shortest = 1 - (math.sqrt(size) + 2) / grid.units(1.0)  # the price of the slack is small
    assert math.sqrt(float(exact_squared_norms(integers)[0])) >= shortest * grid.units(1.0)


def test_a_short_row_is_only_rounded() -> None:
    grid = Grid(-10, 4)
    rows = np.array([[0.1, -0.2, 0.0003], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(grid.quantise_rows(rows, 1.0), np.rint(rows * 1024).astype(np.int64))


def test_a_grid_too_coarse_for_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="a clip of 1 is 16 grid units, too few for 100000 numbers: use a finer step"):
        Grid(-4, 2).quantise_rows(np.zeros((1, 100_000)), 1.0)


def test_a_grid_too_fine_for_exact_arithmetic_is_refused() -> None:
    """Whatever the records are: an error that only some of them raise would tell about them."""
    for rows in (np.ones((1, 3)), np.zeros((1, 3)), np.zeros((0, 3))):
        with pytest.raises(
            ValueError, match="a clip of 1 is 2147483648 grid units, more than the ring holds: use a coarser step"
        ):
            Grid(-31, 2).quantise_rows(rows, 1.0)


@pytest.mark.parametrize("size", [1, 40, 5000])
def test_a_concentrated_row_is_as_good_as_a_spread_one(size: int) -> None:
    """The check once looked at the largest entry times p, and raised for a record whose gradient has one large entry."""
    rows = np.zeros((2, size))
    rows[0, 0] = 9.0
    rows[1] = 9.0
    grid = Grid(-30, 2)
    for row in grid.quantise_rows(rows, 1.9).tolist():
        assert sum(value * value for value in row) <= grid.units(1.9) ** 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_refused(bad: float) -> None:
    grid = Grid(-10, 2)
    with pytest.raises(ProtocolError, match="expected finite numbers before the clip, found NaN or infinity"):
        grid.quantise_rows(np.array([[0.0, bad]]), 1.0)
    with pytest.raises(ProtocolError, match="expected finite numbers before the clip, found NaN or infinity"):
        grid.quantise(np.array([0.0, bad]))


@pytest.mark.parametrize("value", [2**31, -(2**32), 2**62, -(2**63), 2**63 - 1])
def test_squares_that_could_wrap_are_refused(value: int) -> None:
    """-2**63 is its own absolute value in int64, and its square is 0: it must not pass for a row of length 0."""
    with pytest.raises(ValueError, match=f"a row of length {re.escape(f'{abs(value):g}')} is too long to square exactly"):
        exact_squared_norms(np.array([[value, 0]]))


@given(st.lists(st.lists(st.integers(-(2**30), 2**30), min_size=3, max_size=3), min_size=1, max_size=4))
def test_squared_norms_are_exact(rows: list[list[int]]) -> None:
    assert exact_squared_norms(np.array(rows)).tolist() == [sum(value * value for value in row) for row in rows]


@given(st.integers(1, 2**15 - 1), st.sampled_from([1, -1]), st.sampled_from(RING_BITS))
def test_ring_capacity_boundaries(num_summands: int, sign: int, bits: int) -> None:
    """As many summands as agreed, all at the bound, are read back exactly; the next integer would not fit."""
    grid = Grid(0, num_summands, bits)
    part = grid.to_ring(np.array([sign * grid.bound]))
    total = grid.ring.reduce(part * part.dtype.type(num_summands))
    assert grid.from_ring(total).tolist() == [float(sign * grid.bound * num_summands)]
    assert num_summands * grid.bound <= grid.ring.half - 1 < num_summands * (grid.bound + 1)


def test_one_unit_more_than_the_bound_would_wrap() -> None:
    grid = Grid(0, 1)
    one_more = np.array([grid.bound + 1])
    assert grid.bound == 2**31 - 1
    assert grid.from_ring(grid.to_ring(one_more)).tolist() == [-(2.0**31)]  # so sums of data are clamped:
    assert grid.from_ring(grid.to_ring(grid.clamp(one_more))).tolist() == [2.0**31 - 1]


@pytest.mark.parametrize("value", [2**31, 2**32, 2**40, 2**63 - 1, -(2**31), -(2**63)])
@pytest.mark.parametrize("num_summands", [1, 2, 3, 5, 100])
def test_a_sum_of_data_too_large_is_clamped_and_never_wraps(value: int, num_summands: int) -> None:
    grid = Grid(0, num_summands)
    expected = math.copysign(grid.bound, value)
    assert grid.from_ring(grid.to_ring(grid.clamp(np.array([value])))).tolist() == [expected]


@given(st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=2), st.integers(1, 9))
def test_clamping_does_not_raise_the_sensitivity(pair: list[int], num_summands: int) -> None:
    one, other = Grid(0, num_summands).clamp(np.array(pair)).tolist()
    assert abs(one - other) <= abs(pair[0] - pair[1])


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=5), st.sampled_from(RING_BITS))
def test_the_ring_is_arithmetic_modulo_a_power_of_two_whatever_the_size(values: list[int], bits: int) -> None:
    grid = Grid(0, 5, bits)
    total = sum((grid.to_ring(np.array([value])) for value in values), grid.ring.zeros(1))
    assert int(grid.ring.reduce(total)[0]) == sum(values) % 2**bits


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(-30, 0), st.integers(0, 2**32 - 1), st.sampled_from(RING_BITS))
def test_the_sum_over_the_ring_is_the_plain_sum_but_for_rounding(
    p: int, sites: int, step_exp: int, seed: int, bits: int
) -> None:
    grid = Grid(step_exp, sites, bits)
    reach = grid.bound * grid.step
    vectors = np.random.default_rng(seed).uniform(-reach, reach, (sites, p))
    total = sum((grid.to_ring(grid.quantise(one)) for one in vectors), grid.ring.zeros(p))
    error = np.abs(grid.from_ring(grid.ring.reduce(total)) - vectors.sum(axis=0))
    assert (error <= sites * grid.step / 2 * (1 + 1e-6)).all()


def test_a_vector_of_zeros_or_of_huge_numbers_goes_on_the_grid_without_a_warning() -> None:
    grid = Grid(-20, 4)
    assert grid.quantise(np.zeros(3)).tolist() == [0, 0, 0]
    assert grid.from_ring(grid.to_ring(grid.quantise(np.array([1e300, 0.0])))).tolist() == [grid.bound * grid.step, 0.0]


@given(st.floats(1e-6, 1e8), st.integers(1, 1000), st.sampled_from(RING_BITS))
def test_the_grid_for_a_sum_is_the_finest_that_holds_it(largest_sum: float, num_summands: int, bits: int) -> None:
    grid = grid_for(largest_sum, num_summands, bits)
    part = (Ring(bits).half - 1) // num_summands
    assert largest_sum / grid.step <= part * (1 + 1e-12)
    assert largest_sum / (grid.step / 2) > part * (1 - 1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_sum_without_a_size_has_no_grid(value: float) -> None:
    with pytest.raises(ValueError, match="largest_sum must be positive and finite, found"):
        grid_for(value, 3)


def test_a_sum_beyond_every_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="step_exp must be -60 to 30"):
        grid_for(1e30, 3)


def test_a_ring_without_room_for_its_summands_is_refused() -> None:
    assert Grid(0, 2**15 - 1, 16).bound == 1
    with pytest.raises(ValueError, match="a ring of 16 bits has no room for 32768 summands: use a wider one"):
        Grid(0, 2**15, 16)
    with pytest.raises(ValueError, match="a ring of 16 bits has no room for 32768 summands: use a wider one"):
        grid_for(1.0, 2**15, 16)
    with pytest.raises(ValueError, match="ring_bits must be 16, 24 or 32, found 20"):
        Grid(0, 2, 20)
