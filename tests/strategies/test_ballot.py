import math

import numpy as np
import pytest
from scipy import stats

from urna.strategies.ballot import Ranking, by_prior, rank

NAMES = ("a", "b", "c")
BUCKETS = 100
MARGIN = 2 * math.sqrt(2)  # standard errors of one score


def ranked(*scores: float, noise_std: float = 1.0) -> Ranking:
    return rank(NAMES[: len(scores)], np.array(scores) * BUCKETS, noise_std, BUCKETS)


def test_scores_are_means_over_buckets_best_first() -> None:
    found = ranked(-0.1, 0.3, 0.2)
    assert [(one.name, round(one.score, 12)) for one in found.standings] == [("b", 0.3), ("c", 0.2), ("a", -0.1)]


def test_the_standard_error_is_the_noise_over_the_number_of_buckets() -> None:
    assert {one.stderr for one in ranked(0.1, 0.2, noise_std=0.7).standings} == {0.7 / BUCKETS}


def test_the_standard_error_is_the_spread_of_repeated_ballots() -> None:
    """A right one fails a chi-square test once in a million runs."""
    generator = np.random.default_rng(3)
    draws = [rank(NAMES, 5.0 + generator.normal(0, 3.0, 3), 3.0, BUCKETS) for _ in range(2000)]
    errors = [one.score - 0.05 for ranking in draws for one in ranking.standings]
    stderr = draws[0].standings[0].stderr
    tail = stats.chi2.cdf(sum((one / stderr) ** 2 for one in errors), len(errors))
    assert 5e-7 < tail < 1 - 5e-7


@pytest.mark.parametrize(("gap", "undecided"), [(0.999, True), (1.001, False)])
def test_two_standard_errors_of_the_difference_decide(gap: float, undecided: bool) -> None:
    stderr = 1.0 / BUCKETS
    found = ranked(0.5, 0.5 - gap * MARGIN * stderr)
    assert found.undecided is undecided
    assert found.contenders == (("a", "b") if undecided else ("a",))


def test_the_margin_itself_decides() -> None:
    found = rank(("a", "b"), np.array([MARGIN, 0.0]), 1.0, 1)
    assert found.contenders == ("a",)


def test_contenders_are_those_near_the_leader_and_not_near_each_other() -> None:
    stderr = 1.0 / BUCKETS
    steps = 0.7 * MARGIN * stderr
    assert ranked(0.5, 0.5 - steps, 0.5 - 2 * steps).contenders == ("a", "b")


def test_without_noise_the_leader_is_decided() -> None:
    assert ranked(0.1, 0.2, 0.3, noise_std=0.0).contenders == ("c",)


def test_names_and_sums_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        rank(NAMES, np.zeros(2), 1.0, BUCKETS)


def test_equal_candidates_are_seldom_called_decided() -> None:
    """Of two equal candidates 4.55 % are decided by chance; the test fails once in a million runs."""
    generator = np.random.default_rng(4)
    decided = sum(not rank(("a", "b"), generator.normal(0, 1, 2), 1.0, BUCKETS).undecided for _ in range(4000))
    assert stats.binomtest(decided, 4000, 2 * stats.norm.sf(2)).pvalue > 1e-6


def test_the_prior_chooses_among_contenders_only() -> None:
    near = ranked(0.100, 0.101, -0.5)
    assert near.contenders == ("b", "a")
    assert by_prior(near, ("c", "a", "b")) == "a"
    assert by_prior(near, ("b", "a", "c")) == "b"
