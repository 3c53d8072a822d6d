"""How tests look at a refusal of records: its words, and that no value is in it, in its causes or in its traceback."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from urna.protocol.errors import SiteConfigError

CANARY = "canary-7f3a"


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The message must be in the error, the canary nowhere in what a log would print of it."""
    with pytest.raises(SiteConfigError, match=re.escape(message)) as caught:
        yield
    assert CANARY not in "".join(traceback.format_exception(caught.value))
