"""Counts the ballots: noisy sums -> a ranking with its uncertainty, or *undecided*."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from urna.privacy.mechanisms import Floats

DECIDED_STDERRS = 2.0  # the leader must be this many standard errors of the difference ahead


@dataclass(frozen=True)
class Standing:
    """One candidate's mean score (1-NN accuracy above the mean of all candidates) and its standard error.

    The error is that of the privacy noise alone: how much the buckets' votes vary is not released. At small epsilon the noise
    dominates; at epsilon 8 a ranking is somewhat less certain than it looks.
    """

    name: str
    score: float
    stderr: float


@dataclass(frozen=True)
class Ranking:
    """All candidates, best first, and those that the noise cannot tell from the leader."""

    standings: tuple[Standing, ...]
    contenders: tuple[str, ...]  # the leader first

    @property
    def undecided(self) -> bool:
        """Whether the leader is not clear of the second."""
        return len(self.contenders) > 1


def rank(names: Sequence[str], total: Floats, noise_std: float, num_buckets: int) -> Ranking:
    """Rank candidates by the opened sum of votes (K,).

    Args:
        names: the candidates, in the order of ``total``.
        total: noisy sums of clipped votes over all buckets and sites.
        noise_std: standard deviation of the noise on each sum.
        num_buckets: m, public, over all sites.
    """
    stderr = noise_std / num_buckets
    standings = sorted(
        (Standing(name, float(score) / num_buckets, stderr) for name, score in zip(names, total, strict=True)),
        key=lambda one: -one.score,
    )
    margin = DECIDED_STDERRS * math.sqrt(2) * stderr
    leader = standings[0]
    contenders = tuple(one.name for one in standings if leader.score - one.score < margin or one is leader)
    return Ranking(tuple(standings), contenders)


def by_prior(ranking: Ranking, prior: Sequence[str]) -> str:
    """The contender that the operator's prior puts first."""
    return min(ranking.contenders, key=list(prior).index)
