from pathlib import Path

import pytest

from tests.client.clinic import CANDIDATES, Clinic, five_sites
from urna.models.pretrain import pretrain


@pytest.fixture(scope="session")
def artefacts() -> None:
    """The clinic's candidates, in the user's own cache."""
    for name in CANDIDATES:
        pretrain(name)


@pytest.fixture
def clinic(artefacts: None, tmp_path: Path) -> Clinic:  # noqa: ARG001 - built, not used
    """A site that nobody has asked anything."""
    return Clinic.build(tmp_path / "site-1")


@pytest.fixture
def five(artefacts: None, tmp_path: Path) -> Clinic:  # noqa: ARG001 - built, not used
    """A site with four peers: a sum of four of them opens, with the answers of four."""
    return five_sites(tmp_path / "site-1")
