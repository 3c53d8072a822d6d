"""docs/site.md is true: its site.toml makes a site, its commands run, in its order, on a runner's real socket."""

import csv
import os
import re
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client.clinic import a_plan
from urna.client.config import load_site_config
from urna.client.control import serve
from urna.client.desk import LedgerDesk
from urna.client.ledger_rows import Waiting
from urna.client.local_log import local_log
from urna.client.vault import open_ledger
from urna.protocol.identity import IDENTITY_FILE, OPERATOR, ROSTER_FILE, Roster, create_identity, load_identity, load_roster
from urna.server.certificates import certificate_pem, create_authority

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "site.md").read_text("utf-8")
CAMPAIGN = "winter-study"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [line.split() for block in blocks("sh") for line in block.splitlines()]


def urna_site(cwd: Path, *arguments: str) -> str:
    program = str(Path(sys.executable).parent / "urna-site")
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False, input="yes\n"
    )
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the records and the answers of the page."""
    home = tmp_path / "hospital-a"
    home.mkdir(mode=0o700)
    with (home / "ward.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            [f"v{at}", f"p{at % 1150}", 20 + at % 70, "fmx"[at % 3], "Elm Street 1", ["home", "died"][at % 2]]
            for at in range(1200)
        ]
        csv.writer(file).writerows([["visit", "patient", "age", "sex", "address", "outcome"], *rows])
    (toml,) = blocks("toml")
    (tmp_path / "answers.toml").write_text(toml.replace("/var/lib/urna/", f"{tmp_path}/"), encoding="utf-8")
    return tmp_path


def test_the_page_from_top_to_bottom(place: Path) -> None:
    home, ran = place / "hospital-a", 0
    plan = a_plan(task={"num_classes": 3})
    with ExitStack() as stack:
        for program, verb, *arguments in commands():
            assert program == "urna-site"
            if verb == "check":  # the federation is not there
                arguments.append("--offline")
                operator, peer = (create_identity(name, place / f"{name}.key") for name in (OPERATOR, "hospital-b"))
                keys = {one.name: one.public_key_hex for one in (load_identity("hospital-a", home / IDENTITY_FILE), peer)}
                roster = Roster(operator=operator.public_key_hex, sites=keys)
                (home / ROSTER_FILE).write_text(roster.model_dump_json(), encoding="utf-8")
                (home / "ca.pem").write_bytes(certificate_pem(create_authority("winter").certificate))
            if verb == "status":  # from here on a runner is there, and a campaign has asked
                config = load_site_config(home)
                ledger = open_ledger(home, config.vault)
                stack.callback(ledger.close)
                ledger.wait(Waiting(CAMPAIGN, "0" * 64, plan.model_dump_json()))
                desk = LedgerDesk(config.name, config.policy, load_roster(home / ROSTER_FILE), ledger)
                stack.enter_context(serve(home, desk, local_log(config.name, home)))
            if verb in ("up", "run"):  # serves until it is stopped: tests/e2e/test_runner.py
                continue
            output = urna_site(place, verb, *arguments)
            ran += 1
            if verb == "preview" or arguments[:1] == ["preview"]:
                assert "Elm Street" not in output
                assert not re.search(r"\bp0\b", output)
            if verb == "status":
                assert CAMPAIGN in output
                assert "waiting" in output
    assert ran == 10


def test_the_pages_site_toml_is_what_a_site_reads(place: Path) -> None:
    (toml,) = blocks("toml")
    (place / "hospital-a" / "site.toml").write_text(toml, encoding="utf-8")
    config = load_site_config(place / "hospital-a")
    assert config.policy.approval_required
    assert config.policy.required_peers == ("hospital-b",)
    assert set(tomllib.loads(toml)) == set(type(config).model_fields)
