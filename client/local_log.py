"""The log that stays at the site; nothing of it ever leaves.

One JSON object a line, from a closed list of fields, so that a line can be read by a program and cannot be forged by a text.

Covered:
    * a line holds these fields and no others: no values of local variables, no request, no record;
    * control characters, line breaks and signs that only look like others are escaped (ASCII JSON), long texts are cut;
    * the file and every rotated one are readable by the owner alone, never through a symbolic link, and limited in size;
    * nothing is handed on to Flower's log, which the operator can read; an error of the log itself prints no message.
Not covered:
    * ``detail`` holds the text of an exception, and a foreign library may put a value of a record in it: so the file stays
      here; whoever ships logs to another machine leaves that field out.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE = "site.log"
FILE_LIMIT_BYTES, NUM_OLD_FILES = 5_000_000, 5
FIELD_LIMIT, DETAIL_LIMIT, PLACES_LIMIT = 200, 2000, 8
FIELDS = ("code", "campaign", "request_id", "stage")  # what a caller may add to a line
PACKAGE = Path(__file__).resolve().parent.parent
OWN_FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} - {"tests", "benchmarks", "docs"}


class Event(StrEnum):
    """What a line is about; a closed set, to be searched for."""

    STARTED = "started"
    STOPPED = "stopped"
    REQUEST_FAILED = "request_failed"
    CAMPAIGN_WAITS = "campaign_waits"  # for a person's yes
    CAMPAIGN_OPENED = "campaign_opened"
    CAMPAIGN_REFUSED = "campaign_refused"
    RELEASE_REFUSED = "release_refused"
    WEIGHTS_BEGUN = "weights_begun"  # a candidate's file begins to arrive
    WEIGHTS_REFUSED = "weights_refused"
    WEIGHTS_INSTALLED = "weights_installed"  # all of it is here, and has the hash that the campaign pinned
    MODEL_PREPARED = "model_prepared"  # for training: its engine, what was repaired or frozen, which engines could not serve it
    BUNDLE_SEEN = "bundle_seen"
    BUNDLE_REFUSED = "bundle_refused"
    SUPERNODE_LOST = "supernode_lost"
    SUPERNODE_BACK = "supernode_back"
    CONTROL_FAILED = "control_failed"
    NOTE = "note"  # anything else: a plain call of the logger


def write(
    log: logging.Logger,
    event: Event,
    detail: str = "",
    *,
    level: int = logging.INFO,
    code: str = "",
    campaign: str = "",
    request_id: str = "",
    stage: str = "",
    error: BaseException | None = None,
) -> None:
    """Add a line.

    Args:
        log: of `local_log`.
        event: what happened.
        detail: in words, for people at this site.
        level: as in `logging`.
        code: the failure code that left the site.
        campaign: its name.
        request_id: of the request at hand.
        stage: of the campaign.
        error: its type, text, and the places in our own code that it went through are noted.
    """
    known = {"code": code, "campaign": campaign, "request_id": request_id, "stage": stage}
    extra = {"urna_event": event} | {f"urna_{name}": value for name, value in known.items() if value}
    log.log(level, "%s", detail, exc_info=error, extra=extra)


class JsonLines(logging.Formatter):
    """A record as one line of JSON with the fields above; fields that say nothing are left out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": Event(getattr(record, "urna_event", Event.NOTE)).value,
        }
        line |= {name: _cut(getattr(record, f"urna_{name}", ""), FIELD_LIMIT) for name in FIELDS}
        detail = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line["exception"] = " from ".join(type(one).__name__ for one in _chain(error))
            line["where"] = _own_places(error)
            detail = f"{detail}: {error}" if detail else str(error)
        line["detail"] = _cut(detail, DETAIL_LIMIT)
        return json.dumps({name: value for name, value in line.items() if value not in ("", [])}).replace("\x7f", "\\u007f")


class OwnersFile(RotatingFileHandler):
    """A rotating file that only its owner can read."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

        raw = open(self.baseFilename, "ab", opener=opener)  # noqa: SIM115 - the handler closes it
        os.fchmod(raw.fileno(), 0o600)  # a file of before, or one that was copied here
        return TextIOWrapper(raw, encoding="ascii", write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        """A full disk must not stop the site, and what was to be written must not go to another log."""
        kind = sys.exc_info()[0]
        print(f"urna: the site's log cannot be written ({kind.__name__ if kind else record.levelname})", file=sys.stderr)


def local_log(name: str, folder: Path) -> logging.Logger:
    """The log of the site in ``folder``, readable by its owner alone."""
    log = logging.getLogger(f"urna.site.{name}.{folder}")
    log.propagate = False  # not into Flower's log, which the operator can read
    if not log.handlers:
        handler = OwnersFile(folder / LOG_FILE, maxBytes=FILE_LIMIT_BYTES, backupCount=NUM_OLD_FILES, encoding="utf-8")
        handler.setFormatter(JsonLines())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return log


def _cut(text: object, limit: int) -> str:
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[: limit - 3]}..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what it was raised from where that is shown."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen and len(seen) < PLACES_LIMIT:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _own_places(error: BaseException) -> list[str]:
    """``file:line`` of our own frames, the innermost last; other people's frames and all values are left out."""
    places = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(PACKAGE):
            relative = path.relative_to(PACKAGE)
            if relative.parts[0] in OWN_FOLDERS or len(relative.parts) == 1:
                places.append(f"{relative.as_posix()}:{frame.lineno}")
    return places[-PLACES_LIMIT:]
