"""Secret sharing: any ``threshold`` of the shares give a secret back, fewer say nothing about it.

Source: Shamir 1979, over GF(2**8) with the AES polynomial x^8 + x^4 + x^3 + x + 1, each byte of a secret by itself;
vectorised over many secrets that have the same holders.

Covered:
    * fewer than ``threshold`` shares are uniform and independent of the secret: coefficients come from the CSPRNG.
Not covered:
    * a wrong share is not noticed here: whoever combines checks the secret against a commitment;
    * timing: table look-ups depend on the values (shares are made and combined on the owner's machine only).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from urna.privacy.mechanisms import random_bytes

Bytes = npt.NDArray[np.uint8]
MAX_SHARES = 255  # the non-zero elements of the field, one for each holder


def _tables() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Powers of the generator 3 (twice over, so that two logarithms can be added), and logarithms (of 0: unused)."""
    powers = np.zeros(510, dtype=np.uint8)
    logarithms = np.zeros(256, dtype=np.int64)
    value = 1
    for exponent in range(255):
        powers[exponent] = powers[exponent + 255] = value
        logarithms[value] = exponent
        value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)  # times 3
    return powers, logarithms


POWERS, LOGARITHMS = _tables()


def _times(factor: int) -> bytes:
    """The table of every byte times ``factor``."""
    values = np.arange(256, dtype=np.uint8)
    if factor == 0:
        return bytes(256)
    return np.where(values == 0, np.uint8(0), POWERS[LOGARITHMS[values] + LOGARITHMS[factor]]).astype(np.uint8).tobytes()


TIMES = [_times(factor) for factor in range(256)]  # 64 KiB


def multiply(left: Bytes, factor: int) -> Bytes:
    """Every byte of ``left`` times ``factor`` in GF(2**8)."""
    return np.frombuffer(left.tobytes().translate(TIMES[factor]), np.uint8).reshape(left.shape)


def split(secrets: Bytes, threshold: int, num_shares: int) -> Bytes:
    """Share every row of ``secrets`` (s, b).

    Returns:
        (num_shares, s, b): share i is the polynomials' value at x = i + 1.

    Raises:
        ValueError: not 1 <= threshold <= num_shares <= 255.
    """
    if not 1 <= threshold <= num_shares <= MAX_SHARES:
        raise ValueError(f"expected 1 <= threshold <= num_shares <= {MAX_SHARES}, found {threshold} of {num_shares}")
    random = np.frombuffer(random_bytes((threshold - 1) * secrets.size), np.uint8).reshape(threshold - 1, *secrets.shape)
    shares = np.empty((num_shares, *secrets.shape), dtype=np.uint8)
    for at in range(num_shares):
        value = np.zeros_like(secrets)
        for coefficient in random:  # Horner, highest power first
            value = multiply(value ^ coefficient, at + 1)
        shares[at] = value ^ secrets
    return shares


def combine(shares: Bytes, points: Sequence[int]) -> Bytes:
    """Secrets (s, b) from ``shares`` (t, s, b) at the x coordinates ``points``: t of them, the threshold.

    Raises:
        ValueError: points that are not distinct, or not one for each share.
    """
    return interpolate(shares, points, 0)


def interpolate(shares: Bytes, points: Sequence[int], at: int) -> Bytes:
    """The polynomials' values (s, b) at x = ``at`` (Lagrange); at 0 they are the secrets.

    Raises:
        ValueError: see `combine`.
    """
    if len(set(points)) != len(points) or len(points) != len(shares) or not all(1 <= x <= MAX_SHARES for x in points):
        raise ValueError(f"expected one distinct point of 1 to {MAX_SHARES} for each share, found {list(points)}")
    total: Bytes = np.zeros(shares.shape[1:], dtype=np.uint8)
    for share, x in zip(shares, points, strict=True):
        total ^= multiply(share, _weight(x, points, at))
    return total


def _weight(x: int, points: Sequence[int], at: int) -> int:
    """Product over the other points z of (at - z) / (x - z); minus is XOR here."""
    exponent = 0
    for other in points:
        if other != x:
            if at == other:
                return 0
            exponent += int(LOGARITHMS[at ^ other]) - int(LOGARITHMS[x ^ other])
    return int(POWERS[exponent % 255])
