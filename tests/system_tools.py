"""Programs that pip does not install: a test that needs one says so here, and is skipped or fails where it is missing."""

import os
import shutil

import pytest

REQUIRED = "URNA_REQUIRE_SYSTEM_TOOLS"  # "1" where they must be there, as in CI


def require(program: str) -> str:
    """The path of a program; without it the test is skipped, or fails where `REQUIRED` is 1."""
    found = shutil.which(program)
    if found is not None:
        return found
    text = f"{program} is not installed: install it (Debian: apt-get install), or leave {REQUIRED} unset to skip"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)
