"""How many sites must be there for a secure sum to open, from public numbers only; both sides compute it alike.

* holders: m of the n sites keep shares of every mask, all of them up to 32 sites, a fixed committee above;
* threshold: t = floor(2m/3) + 1 holders must answer, and 2t > m + c, t >= c + 2 for c colluding sites: with two different
  lists of who is alive, no server gathers t answers of both kinds about one site;
* survivors: at least s = floor(2n/3) + 1 sites' vectors are in every sum that opens;
* degree: every site shares a mask with all others up to 32 sites, with k = O(log n) of them above;
* noise parties: honest sites whose noise is surely in any sum that can be opened, also by a server that shows every holder
  another list. Each of m - c honest holders may be told n - s sites dead, and t - c of them must be told so of each site that
  is to be cut off: at most D = (m - c)(n - s) / (t - c) sites are, which leaves n - c - D honest ones in the sum.

In a sparse graph each survivor must keep half of its neighbours in every list, so by the same count no more than
(m - c)(k / 2) / (t - c) of a site's edges can be cut. The threshold is raised until c + 3k/8 are left. That sets so small as to
have less noise than is counted cannot be cut off then rests on the graph being an expander, which is likely and not proven.
"""

import math
from dataclasses import dataclass

FULL_GRAPH_LIMIT = 32
MAX_SILENT_AT_SETUP = 3  # members that may not tell their graph nonce: the choice of whom to leave out could be ground


@dataclass(frozen=True)
class Quorum:
    """The numbers of one cohort; see the module's docstring.

    Raises:
        ValueError: numbers with which a sum of the kept promises cannot exist.
    """

    num_sites: int
    num_colluding: int
    degree: int
    num_holders: int
    threshold: int
    min_survivors: int

    def __post_init__(self) -> None:
        n, m, c, t = self.num_sites, self.num_holders, self.num_colluding, self.threshold
        if n < 2 or not 0 <= c <= n - 2:
            raise ValueError(f"expected at least two honest sites beside {c} colluding ones, found {n} sites in all")
        if not (c + 2 <= t <= m <= min(n, 255) and 3 * t > 2 * m and 2 * t > m + c):
            raise ValueError(f"expected a threshold above 2/3 of {m} holders and of at least {c + 2}, found {t}")
        if m < min(n, FULL_GRAPH_LIMIT):
            raise ValueError(f"expected at least {min(n, FULL_GRAPH_LIMIT)} holders of {n} sites, found {m}")
        if not (t <= self.min_survivors <= n and 3 * self.min_survivors > 2 * n):
            raise ValueError(f"expected more than 2/3 of {n} sites as survivors, at least {t}, found {self.min_survivors}")
        if not (self.degree == n - 1 or (self.degree % 2 == 0 and 4 * (c + 1) <= self.degree < n)):
            raise ValueError(f"expected every site to share masks with {n - 1} others or an even number, found {self.degree}")
        if not self.is_full and self.degree - _most_cut(self.degree // 2, m, c, t) <= c:
            raise ValueError(
                f"expected a threshold that keeps a site of {self.degree} neighbours from being cut off, found {t}"
            )

    @property
    def noise_parties(self) -> int:
        """How many honest sites' shares of the noise are surely in a sum that opens, whatever lists the server shows."""
        return self.num_sites - self.num_colluding - self.most_cut_off

    @property
    def most_cut_off(self) -> int:
        """D: how many sites different lists can cut off together."""
        return _most_cut(self.num_sites - self.min_survivors, self.num_holders, self.num_colluding, self.threshold)

    @property
    def is_full(self) -> bool:
        """Whether every pair of sites shares a mask."""
        return self.degree == self.num_sites - 1


def _most_cut(in_one_list: int, num_holders: int, num_colluding: int, threshold: int) -> int:
    """How many sites (or edges) lists can cut off together when each may cut off ``in_one_list``."""
    return (num_holders - num_colluding) * in_one_list // (threshold - num_colluding)


def quorum(
    num_sites: int,
    num_colluding: int = 1,
    min_sites: int = 2,
    max_dropouts: int | None = None,
    threshold_fraction: float = 2 / 3,
) -> Quorum:
    """The quorum of a cohort.

    Args:
        num_sites: n.
        num_colluding: c, members that may work together with the server.
        min_sites: no sum over fewer is opened.
        max_dropouts: how many sites a round survives the loss of; None: as many as the two thirds allow. Fewer means less
            noise in every share, for more honest sites surely survive.
        threshold_fraction: more than this part of the holders must answer, 2/3 ... 1; it raises the threshold, never lowers it.

    Raises:
        ValueError: too few sites for so many colluders, or fewer than ``min_sites``.
    """
    if num_sites < min_sites:
        raise ValueError(f"expected a cohort of at least {min_sites} sites, found {num_sites}")
    degree, holders = num_sites - 1, num_sites
    if num_sites > FULL_GRAPH_LIMIT:
        wanted = max(32, 2 * math.ceil(math.log2(num_sites)), 4 * (num_colluding + 1))
        degree = wanted if wanted < num_sites - 1 else num_sites - 1
        holders = min(num_sites, max(32, 3 * (num_colluding + 1)))
    raised = min(holders, math.floor(threshold_fraction * holders) + 1)
    threshold = max(raised, 2 * holders // 3 + 1, (holders + num_colluding) // 2 + 1, num_colluding + 2)
    if degree < num_sites - 1:
        wanted = num_colluding + 3 * degree // 8
        while threshold < holders and degree - _most_cut(degree // 2, holders, num_colluding, threshold) < wanted:
            threshold += 1
    survivors = max(min_sites, 2 * num_sites // 3 + 1, threshold)
    if max_dropouts is not None:
        survivors = max(survivors, num_sites - max_dropouts)
    return Quorum(num_sites, num_colluding, degree, holders, threshold, survivors)
