from pathlib import Path

import pytest

from urna.models.pretrain import pretrain_all


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Every candidate, pretrained in the user's own cache: under a minute the first time, then only checked."""
    return next(iter(pretrain_all().values())).parent
