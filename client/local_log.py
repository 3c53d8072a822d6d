"""The log that stays at the site; nothing of it ever leaves."""

import logging
from pathlib import Path

LOG_FILE = "site.log"


def local_log(name: str, folder: Path) -> logging.Logger:
    """The log of the site in ``folder``, readable by its owner alone."""
    log = logging.getLogger(f"urna.site.{name}.{folder}")
    log.propagate = False  # not into Flower's log, which the operator can read
    if not log.handlers:
        (folder / LOG_FILE).touch(mode=0o600)
        handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return log
