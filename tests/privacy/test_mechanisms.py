"""Statistical tests here fail by chance in about one of a million runs each; the noise has no seed that could be fixed."""

import math
import os
import tracemalloc
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from urna.privacy import mechanisms
from urna.privacy.mechanisms import (
    Floats,
    Integers,
    clip_rows,
    counter_mode,
    integer_noise,
    key_stream,
    poisson_sample,
    random_bytes,
    standard_normal,
    uniform,
)
from urna.protocol.errors import ProtocolError

ALPHA = 1e-6
SIZE = 1_000_000

# NIST SP 800-38A, F.5.5, and the GCM specification's test case 14: zero key, counter block 2
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_COUNTER = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
NIST_PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
NIST_CIPHER = "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
ZERO_KEY_BLOCK = "cea7403d4d606b6e074ec5d3baf39d18"


def encrypt_block(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def counter_blocks(key: bytes, start: int, count: int) -> bytes:
    """CTR's key stream, block by block: an independent computation."""
    return b"".join(encrypt_block(key, (start + number).to_bytes(16, "big")) for number in range(count))


def test_the_reference_is_the_ctr_mode_of_nist() -> None:
    stream = counter_blocks(NIST_KEY, int.from_bytes(NIST_COUNTER, "big"), 2)
    assert bytes(a ^ b for a, b in zip(stream, NIST_PLAIN, strict=True)).hex() == NIST_CIPHER


def test_the_key_stream_gives_the_known_answer_of_counter_two() -> None:
    assert key_stream(bytes(32), 16).hex() == ZERO_KEY_BLOCK


def test_the_key_stream_counts_from_two_past_byte_boundaries() -> None:
    assert key_stream(NIST_KEY, 16 * 700) == counter_blocks(NIST_KEY, 2, 700)
    assert key_stream(NIST_KEY[:16], 64) == counter_blocks(NIST_KEY[:16], 2, 4)
    assert key_stream(NIST_KEY, 16 * 66_000)[-32:] == counter_blocks(NIST_KEY, 66_000, 2)


def test_a_key_stream_in_pieces_is_the_same_stream() -> None:
    cipher = counter_mode(NIST_KEY)
    assert b"".join(cipher.update(bytes(size)) for size in (16, 0, 32, 4096, 16)) == counter_blocks(NIST_KEY, 2, 260)


@given(st.integers(0, 200))
def test_a_shorter_key_stream_is_the_beginning_of_a_longer_one(size: int) -> None:
    assert key_stream(NIST_KEY, size) == key_stream(NIST_KEY, 200)[:size]


def wrong_noise(draw: Callable[[int, float], NDArray[np.generic]], scale: float = 1000.0, size: int = SIZE) -> set[str]:
    """How a source of Gaussian noise of standard deviation ``scale`` departs from it; each test at ALPHA."""
    first = draw(size, scale).astype(np.float64) / scale
    second = draw(size, scale).astype(np.float64) / scale
    wrong = set()
    squares = float((first**2).sum())
    if not stats.chi2.ppf(ALPHA / 2, size) < squares < stats.chi2.isf(ALPHA / 2, size):
        wrong.add("variance")
    if stats.kstest(first[: size // 4], "norm").pvalue < ALPHA:
        wrong.add("shape")
    if abs(first.mean()) * math.sqrt(size) > stats.norm.isf(ALPHA / 2):
        wrong.add("mean")
    others = {"fresh": second, "halves": np.roll(first, size // 2), "neighbours": np.roll(first, 1)}
    for name, other in others.items():
        if abs(float(first @ other)) / math.sqrt(size) > stats.norm.isf(ALPHA / 2):
            wrong.add(name)
    if np.array_equal(first, second):
        wrong.add("repeated")
    return wrong


def test_noise_distribution() -> None:
    """The integers are N(0, scale^2) to 1 %, of independent draws; false alarm about 5e-6 for all parts."""
    assert wrong_noise(integer_noise) == set()


def test_standard_normal_distribution() -> None:
    """False alarm about 5e-6 for all parts."""
    assert wrong_noise(lambda size, scale: standard_normal(size) * scale) == set()


def smoothed(noise: Floats) -> Floats:
    return (noise + np.roll(noise, 1)) / math.sqrt(2)


ONE_DRAW = integer_noise(SIZE, 1000.0)
MUTANTS: dict[str, tuple[Callable[[int, float], NDArray[np.generic]], str]] = {
    "half the scale": (lambda size, scale: integer_noise(size, scale / 2), "variance"),
    "one per cent too little": (lambda size, scale: integer_noise(size, scale * 0.99), "variance"),
    "variance for deviation": (lambda size, scale: integer_noise(size, scale * math.sqrt(2)), "variance"),
    "none": (lambda size, _: np.zeros(size), "variance"),
    "used again": (lambda _, __: ONE_DRAW, "repeated"),
    "added twice": (lambda size, scale: integer_noise(size, scale) + ONE_DRAW, "fresh"),
    "half drawn, then copied": (lambda size, scale: np.tile(integer_noise(size // 2, scale), 2), "halves"),
    "not centred": (lambda size, scale: integer_noise(size, scale) + 20, "mean"),
    "uniform": (lambda size, scale: (uniform(size) - 0.5) * math.sqrt(12) * scale, "shape"),
    "smoothed": (lambda size, scale: smoothed(standard_normal(size)) * scale, "neighbours"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_of_the_noise_is_found(name: str) -> None:
    mutant, symptom = MUTANTS[name]
    assert symptom in wrong_noise(mutant)


@pytest.mark.parametrize("scale", [31.999, 0.0, -1000.0, math.nan, math.inf, 2.0**55])
def test_noise_too_fine_or_too_coarse_for_the_grid_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"noise needs a scale of 32 to 2\*\*55 grid units, found .*: change the grid step"):
        integer_noise(3, scale)


def test_the_largest_noise_does_not_wrap() -> None:
    noise = integer_noise(1000, math.nextafter(2.0**55, 0))
    assert np.abs(noise.astype(np.float64)).max() < 2.0**60


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_any_number_of_draws_is_made(size: int) -> None:
    assert integer_noise(size, 100.0).shape == standard_normal(size).shape == uniform(size).shape == (size,)


def test_manual_seed_does_not_fix_noise() -> None:
    """Two independent draws of 64 numbers are equal with probability below 2**-500."""
    draws = []
    for _ in range(2):
        np.random.seed(42)
        torch.manual_seed(42)
        draws.append((integer_noise(64, 1e6).tobytes(), poisson_sample(512, 0.5).tobytes(), random_bytes(64)))
    assert all(one != other for one, other in zip(*draws, strict=True))


def test_noise_fresh_after_fork() -> None:
    random_bytes(64)  # a generator kept in the process would be copied into the children from here
    drawn = [random_bytes(64)]
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, mechanisms.random_bytes(64))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            drawn.append(pipe.read())
        os.waitpid(child, 0)
    drawn.append(random_bytes(64))
    assert [len(one) for one in drawn] == [64] * 4
    assert len(set(drawn)) == 4


def test_every_draw_takes_a_fresh_key_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes([len(asked)]) * size

    monkeypatch.setattr(os, "urandom", urandom)
    assert random_bytes(64) != random_bytes(64)
    standard_normal(10)
    assert asked == [32] * 3  # 256 bits
    integer_noise(5 * mechanisms.NORMAL_BLOCK, 100.0)
    assert asked == [32] * 4  # once, and no part of its stream is used again: see the known answer


def test_random_bytes_are_uniform() -> None:
    """Chi-square over the 256 values of 4 million bytes; false alarm 1e-6 on each side."""
    counts = np.bincount(np.frombuffer(random_bytes(4 * SIZE), np.uint8), minlength=256)
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert stats.chi2.ppf(ALPHA, 255) < statistic < stats.chi2.isf(ALPHA, 255)


def test_uniform_numbers_are_uniform() -> None:
    """Chi-square over 1000 cells; false alarm 1e-6 on each side."""
    counts = np.histogram(uniform(SIZE), bins=1000, range=(0, 1))[0]
    statistic = float(((counts - SIZE / 1000) ** 2 / (SIZE / 1000)).sum())
    assert stats.chi2.ppf(ALPHA, 999) < statistic < stats.chi2.isf(ALPHA, 999)


@pytest.mark.parametrize(("byte", "expected"), [(b"\x00", 2.0**-53), (b"\xff", 1 - 2.0**-53)])
def test_uniform_numbers_are_never_zero_or_one(byte: bytes, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "random_bytes", lambda size: byte * size)
    assert uniform(2).tolist() == [expected] * 2


class Constant:
    """A cipher whose stream is one byte, for ever."""

    def __init__(self, byte: bytes) -> None:
        self.byte = byte

    def update_into(self, data: memoryview, out: bytearray) -> int:
        out[: len(data)] = self.byte * len(data)
        return len(data)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b"\x7f", b"\x80"])
def test_no_bits_give_a_number_that_is_not_finite_or_beyond_the_documented_tail(
    byte: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanisms, "counter_mode", lambda _: Constant(byte))
    assert np.abs(standard_normal(5)).max() <= math.sqrt(-2 * math.log(2.0**-53)) < 8.6  # false for NaN, too


def box_muller(key: bytes, size: int, block: int) -> list[float]:
    """From the same bits with 40 digits, by cosine and sine: an independent computation."""
    words = np.frombuffer(counter_blocks(key, 2, size + 1), "<u8").tolist()
    normal: list[float] = []
    with mpmath.workdps(40):
        while len(normal) < size:
            pairs = min(block, (size - len(normal) + 1) // 2)
            uniforms = [(mpmath.mpf(word >> 12) + 0.5) / 2**52 for word in words[: 2 * pairs]]
            words = words[2 * pairs :]
            radii = [mpmath.sqrt(-2 * mpmath.log(one)) for one in uniforms[:pairs]]
            angles = [2 * mpmath.pi * (one - 0.5) for one in uniforms[pairs:]]
            normal += [float(r * mpmath.cos(a)) for r, a in zip(radii, angles, strict=True)]
            normal += [float(r * mpmath.sin(a)) for r, a in zip(radii, angles, strict=True)]
    return normal[:size]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 32, 333])
def test_normal_numbers_are_those_of_cosine_and_sine_whatever_the_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "NORMAL_BLOCK", 8)
    monkeypatch.setattr(os, "urandom", lambda _: NIST_KEY)
    expected = box_muller(NIST_KEY, size, 8)
    np.testing.assert_allclose(standard_normal(size), expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(integer_noise(size, 1e4), np.rint(standard_normal(size) * 1e4))


def test_normal_numbers_are_fresh_after_fork() -> None:
    """Parent and two children, each with blocks of before behind them."""
    standard_normal(10)
    drawn = [standard_normal(64).tobytes()]
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, standard_normal(64).tobytes())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            drawn.append(pipe.read())
        os.waitpid(child, 0)
    drawn.append(standard_normal(64).tobytes())
    assert [len(one) for one in drawn] == [8 * 64] * 4
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("draw", [standard_normal, lambda size: integer_noise(size, 1e5)], ids=["normal", "integers"])
def test_noise_for_a_large_model_takes_no_memory_beside_its_result(draw: Callable[[int], NDArray[np.generic]]) -> None:
    draw(10)
    tracemalloc.start()
    try:
        result = draw(4_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.nbytes <= peak < result.nbytes + 1_000_000


@pytest.mark.parametrize("rate", [0.001, 0.25, 0.5, 0.99])
def test_a_poisson_sample_has_its_rate(rate: float) -> None:
    """False alarm 1e-6, by the exact binomial tails."""
    taken = int(poisson_sample(SIZE, rate).sum())
    assert stats.binom.ppf(ALPHA / 2, SIZE, rate) <= taken <= stats.binom.isf(ALPHA / 2, SIZE, rate)


def test_records_are_sampled_independently_of_each_other_and_of_the_last_time() -> None:
    """Covariance of a record with its neighbour, and with itself in the next step; false alarm 2e-6."""
    first, second = (poisson_sample(SIZE, 0.25) - 0.25 for _ in range(2))
    for other in (np.roll(first, 1), second):
        assert abs(float(first @ other)) / (0.25 * 0.75 * math.sqrt(SIZE)) < stats.norm.isf(ALPHA / 2)


def test_sample_sizes_vary_as_poisson_sampling_does() -> None:
    """A fixed batch size would be accounted wrongly: 100 equal sizes of binomial(1000, .5) have probability below 1e-100."""
    assert len({int(poisson_sample(1000, 0.5).sum()) for _ in range(100)}) > 5


@settings(max_examples=50)
@given(st.floats(0, 1, exclude_min=True), st.integers(0, 2**53 - 1))
def test_the_sampling_rate_is_never_above_the_one_that_is_accounted(rate: float, draw: int) -> None:
    threshold = math.floor(Fraction(rate) * 2**53)
    draws = {draw, max(0, threshold - 1), min(threshold, 2**53 - 1)}
    with pytest.MonkeyPatch.context() as patch:
        for integer in draws:
            patch.setattr(
                mechanisms, "random_bytes", lambda size, integer=integer: (integer << 11).to_bytes(8, "little") * (size // 8)
            )
            assert poisson_sample(1, rate).tolist() == [integer < threshold]
    assert Fraction(threshold, 2**53) <= Fraction(rate)


def test_a_rate_of_one_takes_every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert poisson_sample(1000, 1.0).all()
    monkeypatch.setattr(mechanisms, "random_bytes", lambda size: b"\xff" * size)
    assert poisson_sample(10, 1.0).all()


def reference_clip(rows: Floats, max_norm: float) -> list[list[float]]:
    """A loop over rows with 60 digits."""
    result = []
    with mpmath.workdps(60):
        for row in rows.tolist():
            norm = mpmath.sqrt(mpmath.fsum(mpmath.mpf(value) ** 2 for value in row))
            factor = min(mpmath.mpf(1), mpmath.mpf(max_norm) / norm) if norm else mpmath.mpf(1)
            result.append([float(mpmath.mpf(value) * factor) for value in row])
    return result


def exact_norm_ratio(row: Floats, max_norm: float) -> float:
    return math.sqrt(sum((Fraction(value) ** 2 for value in row.tolist()), Fraction(0)) / Fraction(max_norm) ** 2)


values = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-10, 10)
matrices = st.integers(0, 5).flatmap(lambda p: st.lists(st.lists(values, min_size=p, max_size=p), min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(matrices, st.floats(1e-6, 1e6))
def test_the_clip_agrees_with_a_loop_of_sixty_digits(rows: list[list[float]], max_norm: float) -> None:
    matrix = np.array(rows, dtype=np.float64).reshape(len(rows), -1)
    clipped = clip_rows(matrix, max_norm)
    np.testing.assert_allclose(
        clipped, np.array(reference_clip(matrix, max_norm)).reshape(matrix.shape), rtol=1e-12, atol=1e-307
    )
    for row in clipped:
        assert exact_norm_ratio(row, max_norm) <= 1 + 1e-14


@pytest.mark.parametrize("huge", [1e155, 1e200, 1e300, 1.7e308])
def test_a_huge_gradient_is_clipped_to_the_bound_and_keeps_its_direction(huge: float) -> None:
    np.testing.assert_allclose(clip_rows(np.array([[huge, -huge, 0.0]]), 2.0), [[math.sqrt(2), -math.sqrt(2), 0.0]], rtol=1e-15)


@pytest.mark.parametrize("tiny", [0.0, 5e-324, 1e-320, 1e-200, 1e-10])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 2.0**62])
def test_a_tiny_gradient_stays_as_it_is(tiny: float, max_norm: float) -> None:
    rows = np.array([[tiny, -tiny, 0.0]])
    np.testing.assert_array_equal(clip_rows(rows, max_norm), rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_stops_the_release(bad: float) -> None:
    rows = np.ones((3, 4))
    rows[1, 2] = bad
    with pytest.raises(
        ProtocolError, match="expected finite numbers before the clip, found NaN or infinity: nothing is released"
    ):
        clip_rows(rows, 1.0)


def test_the_clip_leaves_its_input_alone_and_takes_empty_samples() -> None:
    rows = np.full((2, 3), 5.0)
    clip_rows(rows, 1.0)
    assert (rows == 5.0).all()
    assert clip_rows(np.zeros((0, 3)), 1.0).shape == (0, 3)
    assert clip_rows(np.zeros((2, 0)), 1.0).shape == (2, 0)


def wrong_clip(clip: Callable[[Floats, float], Floats]) -> set[str]:
    """How a clip to norm 1 fails on rows that are long, short, many and not finite."""
    wrong = set()
    rows = np.array([[3.0, 4.0, 0.0], [0.3, 0.0, 0.4], [-60.0, 80.0, 0.0], [0.9, 0.9, 0.9]])
    clipped = clip(rows, 1.0)
    if (np.linalg.norm(clipped, axis=1) > 1 + 1e-12).any():
        wrong.add("long")
    if not np.allclose(clipped, reference_clip(rows, 1.0)):
        wrong.add("other")
    for bad in (math.nan, math.inf):
        try:
            clip(np.array([[bad, 100.0, 0.0]]), 1.0)
            wrong.add("not finite")
        except ProtocolError:
            pass
    return wrong


def clip_that_skips_nan(rows: Floats, max_norm: float) -> Floats:
    norms = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    return rows * np.where(norms > max_norm, max_norm / norms, 1.0)  # nan > 1 is false


CLIP_MUTANTS: dict[str, tuple[Callable[[Floats, float], Floats], str]] = {
    "none": (lambda rows, _: rows, "long"),
    "per coordinate": (lambda rows, max_norm: np.clip(rows, -max_norm, max_norm), "long"),
    "by the L1 norm": (lambda rows, c: rows * np.minimum(1, c / np.abs(rows).sum(axis=1, keepdims=True)), "other"),
    "by the largest entry": (lambda rows, c: rows * np.minimum(1, c / np.abs(rows).max(axis=1, keepdims=True)), "long"),
    "by the batch's norm": (lambda rows, max_norm: rows * min(1.0, max_norm / float(np.linalg.norm(rows))), "other"),
    "after the sum": (lambda rows, c: rows * min(1.0, c / float(np.linalg.norm(rows.sum(axis=0)))), "other"),
    "normalises short rows too": (lambda rows, c: rows * c / np.linalg.norm(rows, axis=1, keepdims=True), "other"),
    "skips NaN": (clip_that_skips_nan, "not finite"),
}


@pytest.mark.parametrize("name", CLIP_MUTANTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_planted_fault_of_the_clip_is_found(name: str) -> None:
    mutant, symptom = CLIP_MUTANTS[name]
    assert symptom in wrong_clip(mutant)


def test_the_clip_has_none_of_these_faults() -> None:
    assert wrong_clip(clip_rows) == set()


def test_noise_is_whole_numbers() -> None:
    noise: Integers = integer_noise(100, 50.0)
    assert noise.dtype == np.int64
