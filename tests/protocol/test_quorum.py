import math
from dataclasses import replace

import pytest

from urna.protocol.quorum import FULL_GRAPH_LIMIT, Quorum, quorum

EVERY = [(n, c) for n in range(2, 256) for c in range(n - 1) if not (n > FULL_GRAPH_LIMIT and min(n, 3 * (c + 1)) > 255)]
FIVE = quorum(5, 1)


def test_every_cohort_of_2_to_255_sites_keeps_the_rules() -> None:
    """All of the module's inequalities, in integers, for every number of sites and of colluders."""
    for n, c in EVERY:
        one = quorum(n, c)
        m, t = one.num_holders, one.threshold
        assert 2 * t > m + c, (n, c)
        assert c + 2 <= t <= m <= n, (n, c)
        assert 3 * t > 2 * m, (n, c)
        assert 3 * one.min_survivors > 2 * n, (n, c)
        assert t <= one.min_survivors <= n, (n, c)


def test_without_many_colluders_the_threshold_is_just_above_two_thirds() -> None:
    for n in range(4, 33):
        one = quorum(n, 1)
        assert one.threshold == one.min_survivors == math.floor(2 * n / 3) + 1
        assert one.num_holders == n


def test_two_groups_of_honest_holders_never_both_reach_the_threshold() -> None:
    """With c holders that answer both; by counting, not by the formula."""
    for n, c in EVERY:
        one = quorum(n, c)
        honest = one.num_holders - min(c, one.num_holders)
        assert not any(first + c >= one.threshold and honest - first + c >= one.threshold for first in range(honest + 1)), (
            n,
            c,
        )


def test_up_to_32_sites_everybody_shares_masks_with_everybody_and_holds_shares() -> None:
    for n in range(2, FULL_GRAPH_LIMIT + 1):
        one = quorum(n, 0)
        assert one.is_full
        assert (one.degree, one.num_holders) == (n - 1, n)


@pytest.mark.parametrize("n", [34, 64, 100, 200, 255, 1000, 100_000])
@pytest.mark.parametrize("c", [0, 1, 3])
def test_larger_cohorts_have_a_sparse_graph_and_a_committee(n: int, c: int) -> None:
    one = quorum(n, c)
    assert not one.is_full
    assert one.degree % 2 == 0
    assert one.degree >= max(32, 2 * math.log2(n), 4 * (c + 1))
    assert one.degree <= max(32, 2 * math.log2(n) + 2, 4 * (c + 1))
    assert one.num_holders == 32


def test_a_cohort_of_33_is_still_a_full_graph() -> None:
    assert quorum(33).is_full
    assert not quorum(34).is_full


def test_the_committee_grows_with_the_colluders() -> None:
    assert quorum(200, 9).num_holders == 32
    assert quorum(200, 10).num_holders == 33
    assert quorum(200, 20).num_holders == 63


@pytest.mark.parametrize(
    ("n", "c", "expected"),
    [(3, 1, 2), (4, 1, 2), (5, 0, 4), (5, 1, 3), (7, 2, 2), (10, 0, 6), (10, 1, 5), (10, 3, 2), (32, 1, 17)],
)
def test_noise_counts_on_the_honest_sites_that_no_lists_cut_off(n: int, c: int, expected: int) -> None:
    """Numbers by hand: of 10 sites, 9 honest lists of 3 dead and 6 of them for each site that is cut off, so 10 - 1 - 4."""
    assert quorum(n, c).noise_parties == expected


def test_noise_never_counts_on_more_sites_than_one_list_or_many_leave() -> None:
    """The largest number of sites that a greedy server cuts off: one after the other, while its lists have room."""
    for n, c in EVERY:
        one = quorum(n, c)
        assert one.noise_parties >= 2, (n, c)
        if n > 40:
            continue
        room, need = (one.num_holders - c) * (n - one.min_survivors), one.threshold - c
        cut = next(count for count in range(n + 1) if need * (count + 1) > room)
        assert one.noise_parties == min(n - c - cut, one.min_survivors - c), (n, c)


def test_fewer_dropouts_mean_more_survivors_and_less_noise() -> None:
    assert [quorum(10, 1, max_dropouts=one).min_survivors for one in (0, 1, 2, 3, 4, 10)] == [10, 9, 8, 7, 7, 7]
    assert [quorum(10, 1, max_dropouts=one).noise_parties for one in (0, 1, 2, 3)] == [9, 8, 6, 5]


@pytest.mark.parametrize("n", [3, 10, 30, 64])
def test_a_fraction_raises_the_threshold_and_never_lowers_it(n: int) -> None:
    plain = quorum(n, 1)
    assert quorum(n, 1, threshold_fraction=0.0).threshold == plain.threshold
    assert quorum(n, 1, threshold_fraction=2 / 3).threshold == plain.threshold
    assert quorum(n, 1, threshold_fraction=0.8).threshold == max(plain.threshold, math.floor(0.8 * plain.num_holders) + 1)
    assert quorum(n, 1, threshold_fraction=1.0).threshold == plain.num_holders


def test_no_sum_over_fewer_than_the_least_number_of_sites() -> None:
    assert quorum(10, 1, min_sites=9).min_survivors == 9
    assert quorum(10, 1, min_sites=10).min_survivors == 10
    with pytest.raises(ValueError, match="expected a cohort of at least 11 sites, found 10"):
        quorum(10, 1, min_sites=11)


@pytest.mark.parametrize(
    ("n", "c"), [(2, 1), (3, 2), (10, 9), (5, -1), (1, 0), (0, 0), (34, 33)], ids=lambda number: str(number)
)
def test_without_two_honest_sites_there_is_no_quorum(n: int, c: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least two honest sites beside {c} colluding ones, found {n}|cohort"):
        quorum(n, c)


def test_fewer_survivors_than_a_negative_number_of_dropouts_asks_for_are_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 2/3 of 5 sites as survivors, at least 4, found 6"):
        quorum(5, 1, max_dropouts=-1)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_sites": 1, "num_colluding": 0}, "expected at least two honest sites beside 0 colluding ones, found 1"),
        ({"num_colluding": 4}, "expected at least two honest sites beside 4 colluding ones, found 5"),
        ({"num_colluding": -1}, "expected at least two honest sites beside -1 colluding ones, found 5"),
        ({"threshold": 3}, "expected a threshold above 2/3 of 5 holders and of at least 3, found 3"),
        ({"threshold": 6}, "expected a threshold above 2/3 of 5 holders and of at least 3, found 6"),
        ({"num_colluding": 3}, "expected a threshold above 2/3 of 5 holders and of at least 5, found 4"),
        ({"num_holders": 6}, "expected a threshold above 2/3 of 6 holders and of at least 3, found 4"),
        ({"num_holders": 0, "threshold": 0}, "expected a threshold above 2/3 of 0 holders and of at least 3, found 0"),
        ({"min_survivors": 3}, "expected more than 2/3 of 5 sites as survivors, at least 4, found 3"),
        ({"min_survivors": 6}, "expected more than 2/3 of 5 sites as survivors, at least 4, found 6"),
        ({"degree": 3}, "expected every site to share masks with 4 others or an even number, found 3"),
        ({"degree": 2}, "expected every site to share masks with 4 others or an even number, found 2"),
        ({"degree": 5}, "expected every site to share masks with 4 others or an even number, found 5"),
        ({"degree": 0}, "expected every site to share masks with 4 others or an even number, found 0"),
    ],
)
def test_numbers_that_cannot_keep_the_promises_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FIVE, **numbers)


def test_a_committee_smaller_than_the_cohorts_numbers_give_is_refused() -> None:
    """All sites up to 32, 32 above: two holders of ten sites are never enough, whoever names the numbers."""
    with pytest.raises(ValueError, match="expected at least 10 holders of 10 sites, found 2"):
        Quorum(num_sites=10, num_colluding=0, degree=4, num_holders=2, threshold=2, min_survivors=7)
    with pytest.raises(ValueError, match="expected at least 5 holders of 5 sites, found 4"):
        replace(FIVE, num_holders=4)
    with pytest.raises(ValueError, match="expected at least 32 holders of 100 sites, found 31"):
        replace(quorum(100), num_holders=31)


def test_a_sparse_graph_in_which_lists_cut_a_site_off_is_refused() -> None:
    """26 honest lists that each drop 16 of its 32 neighbours, 16 for each that is cut off: 26 are, and 6 colluders are left."""
    with pytest.raises(
        ValueError, match="expected a threshold that keeps a site of 32 neighbours from being cut off, found 22"
    ):
        Quorum(64, 6, 32, 32, 22, 43)
    Quorum(64, 6, 32, 32, 23, 43)  # 24 are: two honest neighbours stay
    Quorum(33, 6, 32, 32, 22, 23)  # a full graph needs no more


@pytest.mark.parametrize("n", [34, 64, 200, 1000])
def test_the_threshold_of_a_sparse_graph_is_the_smallest_that_leaves_three_eighths_of_the_neighbours(n: int) -> None:
    for c in range(8 if n > 34 else 7):
        one = quorum(n, c)
        assert not one.is_full

        def left(threshold: int, one: Quorum = one) -> int:
            honest = one.num_holders - one.num_colluding
            return one.degree - honest * (one.degree // 2) // (threshold - one.num_colluding)

        wanted = c + 3 * one.degree // 8
        assert left(one.threshold) >= wanted or one.threshold == one.num_holders, c
        assert left(one.threshold) > c
        plain = max(2 * one.num_holders // 3 + 1, (one.num_holders + c) // 2 + 1, c + 2)
        assert one.threshold == plain or left(one.threshold - 1) < wanted, c


def test_more_than_255_holders_are_refused() -> None:
    """A field of 256 elements has 255 points for shares."""
    Quorum(255, 0, 254, 255, 171, 171)
    with pytest.raises(ValueError, match="expected a threshold above 2/3 of 256 holders"):
        Quorum(256, 0, 255, 256, 171, 171)
    with pytest.raises(ValueError, match="expected a threshold above 2/3 of 258 holders"):
        quorum(1000, 85)


@pytest.mark.parametrize("n", range(2, 33))
def test_one_answer_fewer_than_the_threshold_would_break_a_rule(n: int) -> None:
    """The threshold is the smallest that keeps them."""
    for c in range(n - 1):
        one = quorum(n, c)
        with pytest.raises(ValueError, match="expected a threshold above"):
            replace(one, threshold=one.threshold - 1)
