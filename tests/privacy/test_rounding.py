"""Stochastic rounding, and the generator behind it. Statistical tests fail by chance in less than one of a million runs."""

import math
import os

import numpy as np
import pytest

from urna.privacy.fixed_point import Grid, Rounding
from urna.privacy.mechanisms import RandomStream
from urna.privacy.ring import Ring, Vector, masked
from urna.protocol.errors import NonFiniteError

BITS = [16, 24, 32]
FORKED = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns where other threads run


def rounded(vector: np.ndarray[tuple[int], np.dtype[np.floating]], grid: Grid, pieces: int = 1) -> list[int]:
    """The signed integers that a vector becomes."""
    rounding = Rounding(vector, [(len(vector), grid)])
    out = grid.ring.zeros(len(vector))
    for part in np.array_split(np.arange(len(vector)), pieces):
        rounding(int(part[0]), out[part[0] : part[-1] + 1])
    return [int(value) for value in grid.from_ring(grid.ring.reduce(out)) / grid.step]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_is_rounded_up_or_down_to_its_neighbours(bits: int, dtype: type[np.floating]) -> None:
    grid = Grid(-4, 2, bits)
    vector = np.random.default_rng(1).uniform(-9, 9, 5000).astype(dtype)
    exact = vector.astype(np.float64) / grid.step
    units = np.array(rounded(vector, grid, pieces=7))
    assert ((units == np.floor(exact)) | (units == np.floor(exact) + 1)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_numbers_of_steps_stay_as_they_are(bits: int, dtype: type[np.floating]) -> None:
    grid = Grid(-3, 2, bits)
    units = np.arange(-250, 251)
    assert rounded((units * grid.step).astype(dtype), grid) == units.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 0.5, 0.875, -0.1, -0.5, 3.3, -7.9, 100.25, -4000.3, 20_000.3])
def test_rounding_has_no_bias(bits: int, dtype: type[np.floating], value: float) -> None:
    """The mean of 200,000 roundings, within 5.5 standard errors and 2**-16 of a step; false alarm 4e-8 a case."""
    count, grid = 200_000, Grid(0, 1, bits)
    vector = np.full(count, value).astype(dtype)
    exact = float(vector[0])
    part = exact - math.floor(exact)
    allowed = 5.5 * math.sqrt(part * (1 - part) / count) + 2.0**-16
    assert abs(float(np.mean(rounded(vector, grid))) - exact) < allowed


def test_the_error_of_a_sum_of_many_sites_does_not_grow_with_their_number() -> None:
    """Nearest rounding of 0.3 would be off by 0.3 a site; 10,000 sites; within 6 sigma, false alarm 2e-9."""
    sites = 10_000
    total = sum(rounded(np.full(sites, 0.3), Grid(0, 1, 32)))
    assert abs(total - 0.3 * sites) < 6 * math.sqrt(0.21 * sites) + sites * 2.0**-16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_beyond_the_ring_are_clamped_and_counted(bits: int, dtype: type[np.floating]) -> None:
    grid = Grid(0, 3, bits)
    large = float(2 * grid.bound)
    vector = np.array([large, 1.0, -large, 0.0, 1e15, -1e15], dtype)
    rounding, out = Rounding(vector, [(6, grid)]), grid.ring.zeros(6)
    rounding(0, out)
    found = grid.from_ring(grid.ring.reduce(out)).tolist()
    assert found == [grid.bound, 1.0, -grid.bound, 0.0, grid.bound, -grid.bound]
    assert rounding.num_clamped == 4


@pytest.mark.parametrize("bits", BITS)
def test_as_many_sites_as_agreed_at_the_bound_never_wrap(bits: int) -> None:
    for num_summands in (1, 2, 3, 10, 100):
        grid = Grid(0, num_summands, bits)
        for sign in (1, -1):
            one = np.array(rounded(np.full(4, sign * 1e18), grid)).astype(np.int64)
            total = grid.ring.reduce(grid.to_ring(one) * grid.ring.dtype.type(num_summands))
            assert grid.from_ring(total).tolist() == [float(sign * grid.bound * num_summands)] * 4


def test_a_value_at_the_bound_is_not_counted_as_clamped() -> None:
    """The bound itself fits; of a wide ring."""
    grid = Grid(0, 1, 32)
    rounding, out = Rounding(np.full(1000, float(grid.bound)), [(1000, grid)]), grid.ring.zeros(1000)
    rounding(0, out)
    assert rounding.num_clamped == 0
    assert set(out.tolist()) == {grid.bound}


@pytest.mark.parametrize("grid", [Grid(0, 8, 16), Grid(0, 1, 16), Grid(0, 2048, 24), Grid(0, 1, 24)], ids=str)
def test_whole_numbers_near_the_end_of_a_ring_stay_as_they_are(grid: Grid) -> None:
    """Float32 has no room for 16 bits of a fraction beside 12 of an integer: added to it, 1 of 8,192 would be moved.

    Then 200,000 of them would all stay with chance 1e-10.
    """
    for sign in (1, -1):
        whole = sign * (grid.bound - 1)
        assert set(rounded(np.full(200_000, whole, np.float32), grid)) == {whole}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("summands", [1, 8])
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_a_huge_finite_number_is_clamped_and_counted_without_a_warning(bits: int, summands: int, value: float) -> None:
    """Also where it is infinite once it is divided by the step: in float32, and in float64."""
    grid = Grid(-10, summands, bits)
    for vector in (np.array([value], np.float32), np.array([value * 5e269])):
        rounding, out = Rounding(vector, [(1, grid)]), grid.ring.zeros(1)
        rounding(0, out)
        assert grid.from_ring(grid.ring.reduce(out)).tolist() == [math.copysign(grid.bound * grid.step, value)]
        assert rounding.num_clamped == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tiny_negative_number_becomes_zero_or_now_and_then_minus_one(dtype: type[np.floating]) -> None:
    """Its fraction is 1 in floats; to minus one with 2**-16 at most, so more than 17 times with chance below 1e-8."""
    units = np.array(rounded(np.full(200_000, -1e-30, dtype), Grid(0, 2, 32)))
    assert set(units.tolist()) <= {0, -1}
    assert int((units == -1).sum()) <= 17
    assert set(rounded(np.full(200_000, 1e-30, dtype), Grid(0, 2, 32))) <= {0, 1}


def test_a_sum_of_finite_numbers_that_overflows_is_not_called_infinite() -> None:
    grid = Grid(0, 1, 32)
    assert rounded(np.full(3, 1.7e308), grid) == [grid.bound] * 3


@pytest.mark.parametrize(
    ("bits", "sites", "largest"), [(32, 10, 1e-6), (32, 100, 1e-6), (24, 10, 1e-4), (16, 10, 2e-2)], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_relative_error_of_a_mean_is_small(bits: int, sites: int, largest: float, dtype: type[np.floating]) -> None:
    """Of Gaussian vectors, whose largest entry sets the grid: relative L2 error, far from the limit; fixed seed."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=5000)  # updates of one model resemble each other
    vectors = [(base + 0.3 * rng.normal(size=5000)).astype(dtype) for _ in range(sites)]
    reach = max(float(np.abs(one).max()) for one in vectors)
    grid = fitting(reach, sites, bits)
    total = grid.ring.zeros(5000)
    for one in vectors:
        out = grid.ring.zeros(5000)
        rounding = Rounding(one, [(5000, grid)])
        rounding(0, out)
        assert rounding.num_clamped == 0
        total += out
    exact = sum((one.astype(np.float64) for one in vectors), np.zeros(5000))
    error = np.linalg.norm(grid.from_ring(grid.ring.reduce(total)) - exact) / np.linalg.norm(exact)
    assert error <= largest


def fitting(reach: float, sites: int, bits: int) -> Grid:
    """The finest grid on which one site's largest number fits its part of the ring."""
    part = (Ring(bits).half - 1) // sites
    return Grid(math.ceil(math.log2(reach / (part - 1))), sites, bits)


@pytest.mark.parametrize("bits", BITS)
def test_every_tensor_has_a_grid_of_its_own(bits: int) -> None:
    """Also where pieces and tensors do not begin together."""
    fine, coarse = Grid(-8, 2, bits), Grid(2, 2, bits)
    vector = np.concatenate([np.arange(10) / 256, np.arange(7) * 4.0, -np.arange(5) / 256]).astype(np.float32)
    grids = [(10, fine), (7, coarse), (0, fine), (5, fine)]
    for step in (1, 3, 22):
        rounding, out = Rounding(vector, grids), fine.ring.zeros(22)
        for start in range(0, 22, step):
            rounding(start, out[start : start + step])
        signed = fine.from_ring(fine.ring.reduce(out)) / fine.step
        assert signed.tolist() == [*range(10), *range(7), *(-one for one in range(5))]


@pytest.mark.parametrize("sizes", [[9], [11], [5, 4], []])
def test_grids_that_do_not_cover_the_vector_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=f"expected grids for 10 numbers, found {sum(sizes)}"):
        Rounding(np.zeros(10), [(size, Grid(0, 2)) for size in sizes])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_refused(bits: int, dtype: type[np.floating], bad: float) -> None:
    """Wherever it is."""
    for place in (0, 700, 999):
        vector = np.zeros(1000, dtype)
        vector[place] = bad
        with pytest.raises(NonFiniteError, match="expected finite numbers, found NaN or infinity: nothing is sent"):
            Rounding(vector, [(1000, Grid(0, 2, bits))])(0, Ring(bits).zeros(1000))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_two_infinities_that_would_cancel_are_refused_without_a_warning(dtype: type[np.floating]) -> None:
    for grid in (Grid(0, 2), Grid(0, 8, 16)):
        with pytest.raises(NonFiniteError, match="expected finite numbers, found NaN or infinity: nothing is sent"):
            Rounding(np.array([math.inf, -math.inf], dtype), [(2, grid)])(0, grid.ring.zeros(2))


def test_a_nonfinite_number_in_the_last_piece_stops_the_whole_upload() -> None:
    vector = np.zeros(2**17 + 1, np.float32)
    vector[-1] = math.nan
    with pytest.raises(NonFiniteError, match="nothing is sent"):
        masked(Rounding(vector, [(len(vector), Grid(0, 2))]), len(vector), Ring(32), [])


@pytest.mark.parametrize("bits", BITS)
def test_vectors_of_other_layouts_are_rounded_alike(bits: int) -> None:
    """Strided, reversed, read-only, big-endian."""
    grid, base = Grid(0, 2, bits), np.arange(-50, 50, dtype=np.float32)
    read_only = base.copy()
    read_only.flags.writeable = False
    doubled = np.repeat(base, 2)
    for vector in (doubled[::2], base[::-1].copy()[::-1], read_only, base.astype(">f4"), base.astype(">f8")):
        assert rounded(vector, grid) == list(range(-50, 50))
    np.testing.assert_array_equal(read_only, base)


def test_the_vector_is_not_changed() -> None:
    vector = np.linspace(-1, 1, 100)
    before = vector.copy()
    rounded(vector, Grid(-5, 2))
    np.testing.assert_array_equal(vector, before)


def test_an_empty_vector_is_rounded_to_nothing() -> None:
    rounding = Rounding(np.zeros(0), [])
    rounding(0, Ring(32).zeros(0))
    assert rounding.num_clamped == 0


def drawn(stream: RandomStream, size: int = 64) -> bytes:
    return stream.uint16(size).tobytes()


def test_two_streams_never_draw_the_same() -> None:
    assert len({drawn(RandomStream()) for _ in range(200)}) == 200


def test_a_stream_does_not_repeat_itself_whatever_the_pieces() -> None:
    """20,000 pieces of 16 bytes; equal by chance with 1e-30."""
    stream = RandomStream()
    pieces = {drawn(stream, 8) for _ in range(20_000)}
    assert len(pieces) == 20_000


def test_a_larger_draw_than_before_goes_on_in_the_stream() -> None:
    stream = RandomStream()
    small, large = drawn(stream, 16), drawn(stream, 100_000)
    assert len(large) == 200_000
    assert small not in large


def test_numpys_seed_does_not_reach_the_stream() -> None:
    seen = set()
    for _ in range(2):
        np.random.seed(1)
        seen.add(drawn(RandomStream()))
    assert len(seen) == 2


@FORKED
def test_a_fork_draws_other_numbers_from_a_new_stream() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in the child: it ends here
        os.write(writer, drawn(RandomStream()))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000) != drawn(RandomStream())
    os.close(reader)
    os.close(writer)


@FORKED
def test_a_stream_that_was_made_before_a_fork_does_not_go_on_alike_in_both() -> None:
    stream = RandomStream()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, drawn(stream))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 1000)
    os.close(reader)
    os.close(writer)
    assert theirs != drawn(stream)


def test_all_16_bits_of_a_draw_are_uniform() -> None:
    """Each bit of 200,000 draws within 5.5 sigma of one half; false alarm 6e-7 for all."""
    draws = RandomStream().uint16(200_000)
    for bit in range(16):
        ones = int((draws >> np.uint16(bit) & np.uint16(1)).sum())
        assert abs(ones - 100_000) < 5.5 * math.sqrt(50_000)


def test_a_fill_gives_a_vector_of_the_ring() -> None:
    """As `masked` uses it, without masks: the wire holds the integers."""
    vector, grid = np.arange(-5.0, 5.0), Grid(0, 2, 24)
    wire = masked(Rounding(vector, [(10, grid)]), 10, grid.ring, [])[0]
    found: Vector = grid.ring.from_wire(wire)
    assert grid.from_ring(found).tolist() == vector.tolist()
