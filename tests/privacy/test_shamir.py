"""Against a second implementation: polynomials over GF(2) as Python integers, and Lagrange's formula word for word."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from urna.privacy.shamir import MAX_SHARES, Bytes, combine, interpolate, multiply, split

ALPHA = 1e-7


def product(left: int, right: int) -> int:
    """Multiply as polynomials, then divide by x^8 + x^4 + x^3 + x + 1 (FIPS 197, section 4.2)."""
    total = 0
    for bit in range(8):
        if right >> bit & 1:
            total ^= left << bit
    for bit in range(15, 7, -1):
        if total >> bit & 1:
            total ^= 0x11B << (bit - 8)
    return total


PRODUCTS = [[product(left, right) for right in range(256)] for left in range(256)]
INVERSES = [0] + [next(one for one in range(256) if PRODUCTS[value][one] == 1) for value in range(1, 256)]


def lagrange(points: dict[int, int], at: int) -> int:
    """The value at ``at`` of the polynomial through the points (x, y)."""
    total = 0
    for x, y in points.items():
        weight = y
        for other in points:
            if other != x:
                weight = PRODUCTS[weight][PRODUCTS[at ^ other][INVERSES[x ^ other]]]
        total ^= weight
    return total


@pytest.mark.parametrize(
    ("left", "right", "expected"), [(0x57, 0x83, 0xC1), (0x57, 0x13, 0xFE), (0x57, 0x02, 0xAE), (0x53, 0xCA, 0x01)]
)
def test_products_are_those_of_fips_197(left: int, right: int, expected: int) -> None:
    assert product(left, right) == expected
    assert multiply(np.array([left], np.uint8), right).tolist() == [expected]
    assert multiply(np.array([right], np.uint8), left).tolist() == [expected]


def test_every_product_is_that_of_the_reference() -> None:
    every = np.arange(256, dtype=np.uint8)
    assert [multiply(every, factor).tolist() for factor in range(256)] == PRODUCTS


secrets_of = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.binary(min_size=width, max_size=width), min_size=1, max_size=4)
)


def rows(secrets: list[bytes]) -> Bytes:
    return np.frombuffer(b"".join(secrets), np.uint8).reshape(len(secrets), -1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(secrets_of, st.data())
def test_any_threshold_of_the_shares_opens_the_secrets(secrets: list[bytes], data: st.DataObject) -> None:
    num_shares = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, num_shares))
    order = data.draw(st.permutations(range(num_shares)))[:threshold]
    shares = split(rows(secrets), threshold, num_shares)
    assert shares.shape == (num_shares, *rows(secrets).shape)
    np.testing.assert_array_equal(combine(shares[list(order)], [at + 1 for at in order]), rows(secrets))


def test_every_subset_of_a_small_sharing_opens_it() -> None:
    secret = rows([b"\x00\x01\xfe\xff"])
    shares = split(secret, 3, 6)
    for subset in itertools.combinations(range(6), 3):
        np.testing.assert_array_equal(combine(shares[list(subset)], [at + 1 for at in subset]), secret)


def test_more_shares_than_the_threshold_open_it_too() -> None:
    secret = rows([bytes(range(32))])
    np.testing.assert_array_equal(combine(split(secret, 3, 9), range(1, 10)), secret)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(1, 255), st.integers(0, 255), min_size=1, max_size=8), st.integers(0, 255))
def test_interpolation_is_lagranges(points: dict[int, int], at: int) -> None:
    shares = np.array(list(points.values()), np.uint8)[:, None, None]
    assert interpolate(shares, list(points), at).item() == lagrange(points, at)


def test_interpolation_at_a_given_point_gives_its_share() -> None:
    shares = split(rows([b"secret"]), 4, 4)
    for at in range(4):
        np.testing.assert_array_equal(interpolate(shares, [1, 2, 3, 4], at + 1), shares[at])


def test_shares_are_the_values_of_one_polynomial_of_degree_below_the_threshold() -> None:
    """The reference finds all other shares from the first three."""
    shares = split(rows([b"\x2a"]), 3, 8)[:, 0, 0].tolist()
    given_points = dict(zip((1, 2, 3), shares, strict=False))
    assert [lagrange(given_points, x) for x in range(1, 9)] == shares
    assert lagrange(given_points, 0) == 0x2A


def test_one_share_of_two_fits_every_secret() -> None:
    """Exhaustive: for every x, every share and every secret there is exactly one line, so one share excludes no secret."""
    for x in range(1, 256):
        for share in (0, 1, 0x53, 0xFF):
            slopes = {PRODUCTS[share ^ secret][INVERSES[x]] for secret in range(256)}
            assert len(slopes) == 256
    for share, secret in itertools.product(range(256), repeat=2):
        other = lagrange({0: secret, 1: share}, 2)
        assert lagrange({1: share, 2: other}, 0) == secret


@pytest.mark.parametrize("secret", [0x00, 0x01, 0xFF])
@pytest.mark.parametrize(("threshold", "num_shares"), [(2, 2), (3, 4), (5, 5)])
def test_below_the_threshold_shares_are_uniform_whatever_the_secret(secret: int, threshold: int, num_shares: int) -> None:
    """Chi-square of each share, and of the sum of two where two are below the threshold; false alarm below 1e-6 a case."""
    shares = split(np.full((40_000, 1), secret, np.uint8), threshold, num_shares)[:, :, 0]
    seen = [*shares] if threshold > 1 else []
    if threshold > 2:
        seen.append(shares[0] ^ shares[1])
    for one in seen:
        statistic = stats.chisquare(np.bincount(one, minlength=256)).statistic
        assert stats.chi2.ppf(ALPHA / 2, 255) < statistic < stats.chi2.isf(ALPHA / 2, 255)


def test_pairs_of_shares_below_a_threshold_of_three_are_uniform_together() -> None:
    """All 65,536 pairs, 2.6 million draws; false alarm 1e-7."""
    shares = split(np.full((2_621_440, 1), 0x77, np.uint8), 3, 3)[:, :, 0].astype(np.int64)
    statistic = stats.chisquare(np.bincount(256 * shares[0] + shares[2], minlength=65_536)).statistic
    assert stats.chi2.ppf(ALPHA / 2, 65_535) < statistic < stats.chi2.isf(ALPHA / 2, 65_535)


def test_a_threshold_of_one_hides_nothing() -> None:
    """The other side of the last tests: they would see shares that depend on the secret."""
    shares = split(np.full((1000, 1), 0x77, np.uint8), 1, 3)
    assert (shares == 0x77).all()


def test_bytes_of_a_secret_are_shared_by_polynomials_of_their_own() -> None:
    """Two equal bytes, one share of each: equal in 1 of 256 cases; 40,000 pairs; false alarm below 1e-9."""
    shares = split(np.zeros((40_000, 2), np.uint8), 2, 2)
    equal = int((shares[0, :, 0] == shares[0, :, 1]).sum())
    assert stats.binom.sf(equal, 40_000, 1 / 256) > 1e-10
    assert stats.binom.cdf(equal, 40_000, 1 / 256) > 1e-10


def test_the_same_secret_is_shared_anew_every_time() -> None:
    secret = np.zeros((1, 32), np.uint8)
    assert not np.array_equal(split(secret, 2, 2), split(secret, 2, 2))


def test_the_largest_sharing_opens_with_its_last_holders() -> None:
    secret = rows([b"\x80\x7f"])
    shares = split(secret, 171, MAX_SHARES)
    points = list(range(85, 256))
    np.testing.assert_array_equal(combine(shares[[x - 1 for x in points]], points), secret)


@pytest.mark.parametrize(("threshold", "num_shares"), [(0, 3), (4, 3), (-1, 2), (2, 256), (256, 256), (1, 0)])
def test_a_sharing_that_cannot_be_is_refused(threshold: int, num_shares: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 <= threshold <= num_shares <= 255, found {threshold} of {num_shares}"):
        split(np.zeros((1, 1), np.uint8), threshold, num_shares)


@pytest.mark.parametrize("points", [[1, 1], [1], [1, 2, 3], [0, 1], [1, 256], [-1, 2], []])
def test_points_that_do_not_fit_the_shares_are_refused(points: list[int]) -> None:
    """Point 0 is the secret itself, and a point given twice would divide by zero."""
    with pytest.raises(ValueError, match="expected one distinct point of 1 to 255 for each share, found"):
        combine(np.zeros((2, 1, 1), np.uint8), points)


def test_neither_secrets_nor_shares_are_changed_in_place() -> None:
    secret = rows([b"abc"])
    assert not secret.flags.writeable
    shares = split(secret, 2, 3)
    before = shares.copy()
    combine(shares[:2], [1, 2])
    np.testing.assert_array_equal(shares, before)


def test_a_wrong_share_gives_a_wrong_secret() -> None:
    """It is not noticed here; whoever combines checks the secret."""
    secret = rows([bytes(32)])
    shares = split(secret, 2, 3)
    shares[0] ^= 1
    assert not np.array_equal(combine(shares[:2], [1, 2]), secret)
