"""The graph of masks against breadth-first search and counting, written here; rates of chance are stated."""

import math
import random
from collections.abc import Container

import pytest

from urna.privacy.secure_sum import Graph
from urna.protocol.quorum import Quorum, quorum

SIZES = [34, 35, 50, 64, 99, 100, 200, 255, 1000]


def edges_of(graph: Graph, count: int) -> list[list[int]]:
    return [graph.neighbours(site) for site in range(count)]


def is_connected(around: list[list[int]], among: Container[int]) -> bool:
    """Whether all sites of ``among`` reach each other through sites of ``among``."""
    sites = [site for site in range(len(around)) if site in among]
    seen, edge = {sites[0]}, [sites[0]]
    while edge:
        edge = [other for site in edge for other in around[site] if other in among and other not in seen]
        edge = list(dict.fromkeys(edge))
        seen.update(edge)
    return len(seen) == len(sites)


def a_seed(number: int) -> bytes:
    return b"seed" + number.to_bytes(4, "big")


@pytest.mark.parametrize("n", SIZES)
def test_every_site_has_exactly_the_same_number_of_neighbours(n: int) -> None:
    one = quorum(n)
    for number in range(10):
        for site, around in enumerate(edges_of(Graph(one, a_seed(number)), n)):
            assert len(set(around)) == len(around) == one.degree
            assert site not in around
            assert around == sorted(around)
            assert all(0 <= other < n for other in around)


@pytest.mark.parametrize("n", SIZES)
def test_a_mask_is_shared_in_both_directions(n: int) -> None:
    for number in range(10):
        around = edges_of(Graph(quorum(n), a_seed(number)), n)
        assert all(site in around[other] for site in range(n) for other in around[site])


@pytest.mark.parametrize("n", range(2, 34))
def test_a_small_cohort_shares_masks_all_with_all(n: int) -> None:
    graph = Graph(quorum(n, 0), a_seed(n))
    assert edges_of(graph, n) == [[other for other in range(n) if other != site] for site in range(n)]


@pytest.mark.parametrize("n", [34, 64, 200])
def test_the_graph_is_connected(n: int) -> None:
    """By search, over 300 seeds."""
    for number in range(300):
        assert is_connected(edges_of(Graph(quorum(n), a_seed(number)), n), range(n))


@pytest.mark.parametrize("n", SIZES)
def test_no_graph_falls_into_halves(n: int) -> None:
    """One circle through all sites is in every graph, whatever the seed: each site's neighbours on it are its own.

    With distances drawn alone about 1 graph of 100,000 had only even ones.
    """
    for number in range(50):
        graph = Graph(quorum(n), a_seed(number))
        assert 1 in graph._distances
        assert len(set(graph._distances)) == quorum(n).degree // 2
        assert all(1 <= one <= (n - 1) // 2 for one in graph._distances)
        assert all(graph._at[(place + 1) % n] in graph.neighbours(graph._at[place]) for place in range(n))


@pytest.mark.parametrize("n", [40, 64, 200, 1000])
def test_a_random_third_of_the_sites_may_leave_and_the_rest_stays_connected(n: int) -> None:
    """Over 30 seeds; a site loses all its 32 neighbours with chance below 3**-32 * n: far below 1e-9. Fixed seeds."""
    chance = random.Random(7)
    for number in range(30):
        around = edges_of(Graph(quorum(n), a_seed(number)), n)
        left = set(chance.sample(range(n), n - n // 3))
        assert is_connected(around, left)


def test_the_search_for_connection_sees_a_graph_in_two_parts() -> None:
    assert not is_connected([[1], [0], [3], [2]], range(4))
    assert is_connected([[1], [0], [3], [2]], {2, 3})


def test_the_graph_depends_on_the_seed_and_on_nothing_else() -> None:
    one = quorum(64)
    graphs = [edges_of(Graph(one, a_seed(number)), 64) for number in (1, 1, 2)]
    assert graphs[0] == graphs[1] != graphs[2]
    assert Graph(one, a_seed(1)).holders == Graph(one, a_seed(1)).holders != Graph(one, a_seed(2)).holders


def test_every_pair_of_sites_is_joined_about_equally_often() -> None:
    """64 sites with 32 of 63 neighbours, over 400 fixed seeds: no pair is six and a half sigma away; 2e-7 for all 2,016."""
    one, n, seeds = quorum(64), 64, 400
    counts = [0] * (n * n)
    for number in range(seeds):
        for site, around in enumerate(edges_of(Graph(one, a_seed(number)), n)):
            for other in around:
                counts[n * site + other] += 1
    rate = one.degree / (n - 1)
    sigma = math.sqrt(seeds * rate * (1 - rate))
    pairs = [counts[n * site + other] for site in range(n) for other in range(n) if site != other]
    assert max(abs(count - seeds * rate) for count in pairs) < 6.5 * sigma


@pytest.mark.parametrize("n", [2, 10, 32, 33, 34, 64, 200, 1000])
def test_the_committee_has_the_agreed_number_of_different_members(n: int) -> None:
    one = quorum(n, min(1, n - 2))
    for number in range(10):
        holders = Graph(one, a_seed(number)).holders
        assert len(set(holders)) == len(holders) == one.num_holders
        assert list(holders) == sorted(holders)
        assert all(0 <= site < n for site in holders)


def test_up_to_32_sites_all_hold_shares() -> None:
    for n in range(2, 33):
        assert Graph(quorum(n, 0), b"any").holders == tuple(range(n))


def test_every_site_is_on_the_committee_about_equally_often() -> None:
    """32 of 64 seats over 1,000 seeds: within six and a half sigma of 500; false alarm below 1e-8, and fixed seeds."""
    counts = [0] * 64
    for number in range(1000):
        for site in Graph(quorum(64), a_seed(number)).holders:
            counts[site] += 1
    assert max(abs(count - 500) for count in counts) < 6.5 * math.sqrt(250)


def test_the_committee_says_nothing_about_the_neighbours() -> None:
    """The order, the distances and the committee come from three key streams: an overlap of theirs would show as one order."""
    graph = Graph(Quorum(64, 1, 32, 32, 22, 43), b"seed")
    assert set(graph.holders) != set(graph.neighbours(graph.holders[0]))
    around = [set(graph.neighbours(site)) for site in range(64)]
    sizes = [len(one.intersection(graph.holders)) for one in around]
    assert min(sizes) > 4
    assert max(sizes) < 28


@pytest.mark.parametrize("degree", [8, 16, 32, 62])
def test_other_degrees_give_regular_graphs_too(degree: int) -> None:
    around = edges_of(Graph(Quorum(64, 1, degree, 32, 22, 43), b"seed"), 64)
    assert {len(set(one)) for one in around} == {degree}
