import configparser
import subprocess
import sys
from pathlib import Path

from tests.system_tools import require
from urna.client.supervisor import LEAVE_SECONDS, STOP_SECONDS

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "urna-site.service"


def the_unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names of systemd have capitals
    parser.read_string(UNIT.read_text("utf-8"))
    return parser


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    tool = require("systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text("utf-8").replace("/opt/urna/bin/urna-site", sys.executable), encoding="utf-8")
    done = subprocess.run([tool, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text("utf-8").replace("ProtectClock=yes", "ProtectClok=yes"), encoding="utf-8")
    done = subprocess.run([tool, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    assert "ProtectClok" in done.stderr  # the check is not blind


def test_systemd_waits_for_the_order_in_which_a_site_stops() -> None:
    service = the_unit()["Service"]
    assert int(service["TimeoutStopSec"]) > sum(STOP_SECONDS.values()) + LEAVE_SECONDS
    assert service["KillMode"] == "mixed"  # SIGTERM goes to the supervisor alone
    assert service["ExecStart"].split()[1:] == ["up", service["ReadWritePaths"]]


def test_systemd_never_gives_up() -> None:
    unit = the_unit()
    assert unit["Service"]["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
