"""Clip, sample and noise, from a generator that no seed reaches.

Covered:
    * every random bit of sampling, rounding, noise and masks comes from AES-256-CTR under a key that the operating
      system draws afresh for each call, so `torch.manual_seed`, numpy seeds, a fork or a restart fix nothing;
    * a non-finite number is an error, never an integer, and never switches a clip off.
Not covered:
    * timing: the time a draw takes is not hidden;
    * the tail beyond 8.5 standard deviations, which 52-bit Box-Muller cannot reach (its mass, below 1e-16 a draw,
      is far below any delta that a plan can ask for).
"""

import math
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from urna.protocol.errors import NonFiniteError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
NORMAL_BLOCK = 1 << 13  # pairs of normal numbers that are drawn at a time: what works on them stays in the L2 cache


def random_bytes(size: int) -> bytes:
    """Draw ``size`` bytes: the AES-256-CTR key stream (NIST SP 800-38A) of a fresh key from the operating system."""
    return key_stream(os.urandom(32), size)


def key_stream(key: bytes, size: int) -> bytes:
    """The first ``size`` bytes of AES-CTR under ``key`` (16 or 32 bytes) with the counter starting at 2: see `counter_mode`."""
    return counter_mode(key).update(bytes(size))


def counter_mode(key: bytes) -> CipherContext:
    """Whose encryption of zeros is the key stream of ``key``: AES-CTR whose counter starts at 2.

    It is taken from AES-GCM (NIST SP 800-38D, section 7.1: GCTR from inc32(J0), IV of 96 zero bits), whose authentication is
    never asked for: OpenSSL has vectorised AES there (VAES), not in plain CTR: twice as fast. At most 2**36 - 32 bytes a key.
    """
    return Cipher(algorithms.AES(key), modes.GCM(bytes(12))).encryptor()


class RandomStream:
    """`random_bytes` in pieces from one fresh key, for loops that draw often."""

    def __init__(self) -> None:
        self._draw_key()
        self._zeros = memoryview(bytes(1 << 16))
        self._buffer = bytearray((1 << 16) + 15)

    def _draw_key(self) -> None:
        self._cipher = counter_mode(os.urandom(32))
        self._process = os.getpid()

    def uint16(self, size: int) -> npt.NDArray[np.uint16]:
        """The next ``size`` numbers in 0 ... 65535; overwritten by the next call."""
        if os.getpid() != self._process:  # a fork must not go on with the same numbers
            self._draw_key()
        if 2 * size > len(self._zeros):
            self._zeros = memoryview(bytes(2 * size))
            self._buffer = bytearray(2 * size + 15)
        self._cipher.update_into(self._zeros[: 2 * size], self._buffer)
        return np.frombuffer(self._buffer, dtype="<u2", count=size)


def uniform(size: int) -> Floats:
    """Draw ``size`` uniform numbers in (0, 1): 52 random bits each, centred in their cell so that neither 0 nor 1 occurs."""
    return _centred(np.frombuffer(random_bytes(8 * size), dtype="<u8").astype(np.uint64))


def _centred(words: npt.NDArray[np.uint64]) -> Floats:
    """Turn 64 random bits each into (k + 1/2) / 2**52 for their upper 52, k, in place; every step is exact."""
    np.right_shift(words, np.uint64(12), out=words)
    np.bitwise_or(words, np.uint64(0x3FF << 52), out=words)  # the exponent of 1: read as a float64, 1 + k / 2**52
    numbers = words.view(np.float64)
    np.subtract(numbers, 1 - 2.0**-53, out=numbers)
    return numbers


def _random_integers(size: int, bits: int) -> npt.NDArray[np.uint64]:
    """Draw ``size`` integers in 0 ... 2**bits - 1."""
    return np.frombuffer(random_bytes(8 * size), dtype="<u8").astype(np.uint64) >> np.uint64(64 - bits)


def standard_normal(size: int) -> Floats:
    """Draw ``size`` standard normal numbers; beside them half a megabyte is used."""
    drawn, at = np.empty(size), 0
    for block in _normal_blocks(size):
        drawn[at : at + len(block)] = block
        at += len(block)
    return drawn


def _normal_blocks(size: int) -> Iterator[Floats]:
    """``size`` standard normal numbers (Box and Muller 1958), a block at a time; overwritten by the next block.

    Cosine and sine of the angle come from one tangent, of its half, t: (1 - t^2) / (1 + t^2) and 2 t / (1 + t^2). That
    takes a third of the time. The key lives for one call: what is drawn after a fork has another.
    """
    half = min(NORMAL_BLOCK, max(1, (size + 1) // 2))
    cipher = counter_mode(os.urandom(32))
    zeros, stream = memoryview(bytes(16 * half)), bytearray(16 * half + 15)
    normal, square = np.empty(2 * half), np.empty(half)
    for start in range(0, size, 2 * half):
        pairs = min(half, (size - start + 1) // 2)
        cipher.update_into(zeros[: 16 * pairs], stream)
        numbers = _centred(np.frombuffer(stream, dtype="<u8", count=2 * pairs))
        radius, tangent, squared = numbers[:pairs], numbers[pairs:], square[:pairs]
        np.log(radius, out=radius)
        np.multiply(radius, -2.0, out=radius)
        np.sqrt(radius, out=radius)
        np.subtract(tangent, 0.5, out=tangent)
        np.multiply(tangent, math.pi, out=tangent)  # half an angle that is uniform in (-pi, pi)
        np.tan(tangent, out=tangent)  # at most 2e16: its square does not overflow
        np.multiply(tangent, tangent, out=squared)
        cosine, sine = normal[:pairs], normal[pairs : 2 * pairs]
        np.subtract(1.0, squared, out=cosine)
        np.add(squared, 1.0, out=squared)
        np.divide(radius, squared, out=radius)
        np.multiply(cosine, radius, out=cosine)
        np.multiply(tangent, radius, out=sine)
        np.multiply(sine, 2.0, out=sine)
        yield normal[: min(2 * pairs, size - start)]


def integer_noise(size: int, scale: float) -> Integers:
    """Draw ``size`` rounded Gaussian integers of standard deviation ``scale`` (grid units).

    Rounding after the draw is post-processing. For ``scale`` of 32 or more the sum of several parties' rounded
    shares differs from a discrete Gaussian of the added variances by less than exp(-2 pi^2 scale^2) < 1e-8000
    (Canonne, Kamath, Steinke 2020, section 3; Kairouz et al. 2021, theorem 3), so the ledger describes the sum as
    a Gaussian.

    Raises:
        ValueError: ``scale`` is below 32, where that argument gets weak, or so large that int64 could wrap.
    """
    if not 32 <= scale < 2**55:
        raise ValueError(f"noise needs a scale of 32 to 2**55 grid units, found {scale:g}: change the grid step")
    drawn, at = np.empty(size, np.int64), 0
    for block in _normal_blocks(size):
        np.multiply(block, scale, out=block)
        np.rint(block, out=block)
        np.copyto(drawn[at : at + len(block)], block, casting="unsafe")
        at += len(block)
    return drawn


def poisson_sample(size: int, sample_rate: float) -> npt.NDArray[np.bool_]:
    """Decide for each of ``size`` records, independently with probability ``sample_rate``, whether it takes part.

    The rate that is used is rounded down to a multiple of 2**-53, so never above the one that is accounted.
    """
    return _random_integers(size, 53) < np.uint64(math.floor(sample_rate * 2.0**53))


def clip_rows(rows: Floats, max_norm: float) -> Floats:
    """Scale each row of (n, p) down to an L2 norm of at most ``max_norm``; shorter rows stay as they are.

    Raises:
        NonFiniteError: a number is not finite (it would switch the clip off: min(1, nan) is 1).
    """
    if not np.isfinite(rows).all():
        raise NonFiniteError("expected finite numbers before the clip, found NaN or infinity: nothing is released")
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scaled = rows / np.where(largest > 0, largest, 1.0)  # largest entry 1: squares neither overflow nor vanish
    allowed = max_norm / np.maximum(np.sqrt((scaled**2).sum(axis=1, keepdims=True)), 1.0)  # for the largest entry
    return np.where(largest > allowed, scaled * allowed, rows)
