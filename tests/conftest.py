"""What every test may count on: the candidates are built, once, in the user's cache."""

import pytest

from urna.models.pretrain import pretrain_all


@pytest.fixture(scope="session", autouse=True)
def _candidates_are_built() -> None:
    pretrain_all()
