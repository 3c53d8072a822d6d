"""docs/provisioning.md is true: its commands run, in its order, and its entry for a site with own keys is taken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.consortium_files import EXAMPLE, client_context, handshake, server_context
from tests.system_tools import require
from urna.protocol.expiry import days_left
from urna.protocol.identity import create_identity, load_roster

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "provisioning.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def shell(block: str, cwd: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = ["bash", "-euc", block]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (block, done.stdout, done.stderr)


def test_the_commands_run_and_a_site_with_its_own_keys_joins(tmp_path: Path) -> None:
    require("ssh-keygen")
    require("openssl")
    first, site_keys, later = blocks("sh")
    (entry,) = blocks("toml")
    operator, site = tmp_path / "operator", tmp_path / "hospital-c"
    operator.mkdir()
    site.mkdir(mode=0o700)
    (operator / "consortium.toml").write_text(EXAMPLE.read_text("utf-8"), encoding="utf-8")
    shell(first, operator)

    identity = create_identity("hospital-c", site / "identity.key")
    shell(site_keys, site)
    assert (site / "node.key").stat().st_mode & 0o077 == 0
    assert (site / "tls.key").stat().st_mode & 0o077 == 0

    entry = entry.replace("<what urna-site init printed>", identity.public_key_hex)
    entry = entry.replace("<the line of node.key.pub>", (site / "node.key.pub").read_text().strip())
    entry = entry.replace("<the lines of tls.csr>", (site / "tls.csr").read_text().strip())
    assert "<" not in entry
    with (operator / "consortium.toml").open("a", encoding="utf-8") as file:
        file.write("\n" + entry)
    shell(later, operator)

    made = operator / "consortium"
    home = made / "sites" / "hospital-c"
    assert load_roster(home / "roster.json").sites["hospital-c"] == identity.public_key_hex
    assert not [path for path in home.rglob("*") if path.suffix == ".key"]
    proxy = server_context(made / "proxy" / "proxy.pem", made / "proxy" / "proxy.key", made / "authority" / "ca.pem")
    client = client_context(home / "ca.pem", home / "egress" / "client.pem", site / "tls.key")
    assert handshake(proxy, client, "fleet.example.org") == b"heard"
    assert days_left(home / "egress" / "client.pem") == 364


@pytest.mark.parametrize("folder", ["authority", "operator", "proxy", "sites/NAME"])
def test_every_folder_is_in_the_table(folder: str) -> None:
    assert f"| `{folder}/` |" in DOCUMENT


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`(tests/[\w/]+\.py)`", DOCUMENT):
        assert (ROOT / path).is_file(), path
