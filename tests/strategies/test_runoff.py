import numpy as np
import pytest

from urna.strategies.ballot import rank
from urna.strategies.runoff import finalists, winner

NEAR = rank(("a", "b", "c", "d"), np.array([0.1, 0.3, 0.2, -90.0]), 1.0, 10)


def test_finalists_are_the_leading_contenders() -> None:
    assert NEAR.contenders == ("b", "c", "a")
    assert finalists(NEAR, 2) == ("b", "c")


def test_whoever_is_no_contender_is_no_finalist() -> None:
    assert finalists(NEAR, 4) == ("b", "c", "a")


@pytest.mark.parametrize(("accuracy", "expected"), [((0.7, 0.8, 0.6), "c"), ((0.9, 0.8, 0.6), "b"), ((0.1, 0.2, 0.3), "a")])
def test_the_higher_accuracy_wins(accuracy: tuple[float, ...], expected: str) -> None:
    assert winner(("b", "c", "a"), np.array(accuracy)) == expected


def test_the_ballots_order_breaks_a_tie() -> None:
    assert winner(("b", "c", "a"), np.array([0.5, 0.8, 0.8])) == "c"
