"""A repository of a hub becomes a local folder: only on an explicit call, at one commit, without code and without a name.

Covered:
    a branch or tag is refused: it may be another model tomorrow;
    only safetensors, JSON and vocabularies are fetched, never code or pickles, and never more than the limit;
    no token is sent, whatever this user is logged in to; HF_HUB_OFFLINE is obeyed.
Not covered:
    what the files are: `hub_folder` looks at them as at any other folder;
    who the hub is: HF_ENDPOINT, which this user set, and the certificates of this machine decide.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from urna.models.assembly import in_one_line
from urna.models.candidate_file import MAX_INSTALLED_BYTES
from urna.models.hub_folder import TOKENIZER_SOURCES
from urna.protocol.errors import ModelError

PATTERNS = ["*.safetensors", "model.safetensors.index.json", "config.json", "preprocessor_config.json", *TOKENIZER_SOURCES]


def fetch(repository: str, revision: str, folder: Path) -> None:
    """Fetch what a model is made of into a new folder.

    Args:
        repository: As the hub calls it: owner/name.
        revision: The full commit, 40 hexadecimal digits.
        folder: Must not exist yet.

    Raises:
        ModelError: the names are not such, there is no way to the hub, or it has no such files.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ModelError(f"a revision must be a full commit of 40 hexadecimal digits, found {revision[:60]!r}: look it up")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", repository, re.ASCII) or ".." in repository:
        raise ModelError(f"a repository must be owner/name, found {repository[:120]!r}: copy it from its page")
    from huggingface_hub import DryRunFileInfo, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    if constants.HF_HUB_OFFLINE:
        raise ModelError("a hub is asked only without HF_HUB_OFFLINE, found it set: unset it, or install a local folder")
    ask = partial(snapshot_download, repository, revision=revision, local_dir=folder, allow_patterns=PATTERNS, token=False)
    listed = cast(Callable[[], list[DryRunFileInfo]], partial(ask, dry_run=True))
    http = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # of whichever HTTP library the hub's client uses
    failed: tuple[type[Exception], ...] = (OSError, ValueError, *http)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # what fails is said below, in one line
    try:
        size = sum(int(one.file_size or 0) for one in listed())
        if size > MAX_INSTALLED_BYTES:
            raise ModelError(f"a model must have at most {MAX_INSTALLED_BYTES} bytes, found {size}: take a smaller one")
        ask()
    except failed as error:
        raise ModelError(
            f"expected {repository} at {revision[:12]} from the hub, found {in_one_line(error)}: "
            "check both names and the way to it, or install a local folder"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
