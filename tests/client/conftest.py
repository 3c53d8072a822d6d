import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():  # typer 0.20 imports names that Click 8.5 deprecates; nobody else's warning is hidden
    warnings.filterwarnings("ignore", r"'click\..* is deprecated", DeprecationWarning)
    import typer.testing  # noqa: F401 - loaded once, here

from tests.client.clinic import CANDIDATES, Clinic
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
