"""When the ballot is undecided: which leaders train a little, and who goes on (Jamieson, Talwalkar 2016: successive halving).

Research on this project found short races biased towards fast learners, so the runoff only separates candidates that the
ballot could not, and the winner keeps the rounds it trained.
"""

from collections.abc import Sequence

from urna.privacy.mechanisms import Floats
from urna.strategies.ballot import Ranking


def finalists(ranking: Ranking, num_finalists: int) -> tuple[str, ...]:
    """The leading contenders, best first, at most ``num_finalists``."""
    return ranking.contenders[:num_finalists]


def winner(names: Sequence[str], accuracy: Floats) -> str:
    """The finalist with the higher noisy held-out accuracy (K,); the ballot's order breaks a tie."""
    return names[int(accuracy.argmax())]
