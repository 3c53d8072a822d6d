import json
import logging
import logging.handlers
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.clinic import CANARY
from urna.client import local_log as module
from urna.client.local_log import FIELDS, LOG_FILE, Event, JsonLines, local_log, write
from urna.protocol.errors import SiteConfigError

ALLOWED = {"time", "level", "event", "exception", "where", "detail", *FIELDS}


@pytest.fixture
def log(tmp_path: Path) -> logging.Logger:
    return local_log("site-1", tmp_path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text("ascii").splitlines()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fail(value: str) -> None:
    raise SiteConfigError(f"expected a number, found {value}")


def test_an_unused_log_is_an_empty_file_of_its_owner(log: logging.Logger, tmp_path: Path) -> None:
    assert log.handlers
    assert (tmp_path / LOG_FILE).read_bytes() == b""
    assert mode(tmp_path / LOG_FILE) == 0o600


def test_a_line_names_its_event_and_only_what_was_given(log: logging.Logger, tmp_path: Path) -> None:
    write(log, Event.RELEASE_REFUSED, "over budget", level=logging.WARNING, campaign="run-1", request_id="run-1/ballot/1")
    (line,) = lines(tmp_path)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "event": "release_refused",
        "campaign": "run-1",
        "request_id": "run-1/ballot/1",
        "detail": "over budget",
    }


def test_plain_calls_of_the_logger_keep_working(log: logging.Logger, tmp_path: Path) -> None:
    log.warning("refused campaign %s: %s", "run-1", "budget")
    (line,) = lines(tmp_path)
    assert (line["event"], line["level"], line["detail"]) == ("note", "warning", "refused campaign run-1: budget")


def test_an_exception_is_its_type_our_own_places_and_its_text(log: logging.Logger, tmp_path: Path) -> None:
    from urna.client.config import load_site_config

    try:
        load_site_config(tmp_path)
    except SiteConfigError:
        log.exception("request failed with code %s", "data")
    (line,) = lines(tmp_path)
    assert line["exception"] == "SiteConfigError"
    assert [place.split(":")[0] for place in line["where"]] == ["client/config.py", "protocol/plan.py", "protocol/plan.py"]
    assert line["detail"].startswith("request failed with code data: expected a site.toml file at ")


def test_locals_and_source_lines_never_reach_the_log(log: logging.Logger, tmp_path: Path) -> None:
    secret = f"{CANARY}-local"
    try:
        fail(str(len(secret)))
    except SiteConfigError as error:
        write(log, Event.REQUEST_FAILED, error=error, level=logging.ERROR)
    text = (tmp_path / LOG_FILE).read_text()
    assert secret not in text
    assert "Traceback" not in text
    assert f"expected a number, found {len(secret)}" in text


def test_a_field_outside_the_list_is_left_out(log: logging.Logger, tmp_path: Path) -> None:
    log.info("told", extra={"patient": CANARY, "urna_patient": CANARY})
    assert set(lines(tmp_path)[0]) == {"time", "level", "event", "detail"}
    assert CANARY not in (tmp_path / LOG_FILE).read_text()


def test_the_causes_of_an_exception_are_named_by_type_only(log: logging.Logger, tmp_path: Path) -> None:
    try:
        try:
            int(CANARY)
        except ValueError as error:
            raise SiteConfigError("not a number") from error
    except SiteConfigError as error:
        write(log, Event.REQUEST_FAILED, error=error)
    (line,) = lines(tmp_path)
    assert line["exception"] == "SiteConfigError from ValueError"
    assert CANARY not in json.dumps(line)


@given(text=st.text(max_size=3000), campaign=st.text(max_size=300))
def test_whatever_is_logged_is_one_line_of_ascii_with_known_fields(text: str, campaign: str) -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%s", (text,), None)
    record.__dict__["urna_campaign"] = campaign
    line = JsonLines().format(record)
    assert all(" " <= sign <= "~" for sign in line)
    found = json.loads(line)
    assert set(found) <= ALLOWED
    assert all(len(value) <= 2000 for value in found.values())


def test_a_forged_line_break_makes_no_second_line(log: logging.Logger, tmp_path: Path) -> None:
    log.warning("refused campaign %s", 'x\n{"event": "approved"}\r\x1b[2K')
    assert [line["event"] for line in lines(tmp_path)] == ["note"]


def test_every_rotated_file_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_LIMIT_BYTES", 500)
    before = os.umask(0)
    try:
        log = local_log("rotated", tmp_path)
        for number in range(40):
            write(log, Event.NOTE, f"line {number}")
    finally:
        os.umask(before)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [LOG_FILE, *(f"{LOG_FILE}.{number}" for number in range(1, 6))]
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}
    assert all(path.stat().st_size <= 500 for path in tmp_path.iterdir())


def test_a_log_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).touch(mode=0o644)
    local_log("opened", tmp_path)
    assert mode(tmp_path / LOG_FILE) == 0o600


def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / LOG_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        local_log("linked", tmp_path)


def test_nothing_is_handed_on_to_other_loggers(log: logging.Logger) -> None:
    seen = logging.handlers.BufferingHandler(1000)
    logging.getLogger().addHandler(seen)
    try:
        write(log, Event.STARTED, CANARY)
    finally:
        logging.getLogger().removeHandler(seen)
    assert [record for record in seen.buffer if record.name == log.name] == []


def test_a_log_that_cannot_be_written_prints_no_message_and_stops_nothing(tmp_path: Path) -> None:
    script = (
        "import logging, pathlib, sys\nfrom urna.client.local_log import *\n"
        "log = local_log('full', pathlib.Path(sys.argv[1]))\n"
        "log.handlers[0].setStream(open('/dev/full', 'w'))\n"
        f"write(log, Event.NOTE, '{CANARY}')\nprint('went on')\n"
        "import os; sys.stdout.flush(); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "went on\n"
    assert done.stderr == "urna: the site's log cannot be written (OSError)\n"
