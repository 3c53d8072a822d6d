"""docs/receipts.md is true: its commands run, its output is theirs, and a signature can be checked by what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.signed_receipts import RELEASES, ROSTER, SITE, a_receipt
from urna.protocol.receipt import Receipt, sign_receipt

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "receipts.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def a_campaign() -> Receipt:
    """The document's: the releases of `signed_receipts` under another name."""
    releases = [one.model_copy(update={"request_id": one.request_id.replace("run-1/", "digits-1/")}) for one in RELEASES]
    return a_receipt(releases, campaign="digits-1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the document's commands are run."""
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "digits-1.receipt.json").write_text(sign_receipt(SITE, a_campaign()).to_text(), encoding="utf-8")
    (tmp_path / "roster.json").write_text(ROSTER.model_dump_json(), encoding="utf-8")
    return tmp_path


def run(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).parent / program
    return subprocess.run([path, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def without_keys(text: str) -> str:
    """Keys and hashes differ from run to run."""
    return re.sub(r"\b[0-9a-f]{12}\b", "<hex>", text)


def test_the_command_says_what_the_document_shows(folder: Path) -> None:
    result = run(blocks("sh")[1], folder)
    assert (result.returncode, result.stderr) == (0, "")
    (shown,) = blocks("text")
    assert without_keys(result.stdout) == without_keys(shown)


def test_the_command_with_a_run_takes_a_folder(folder: Path) -> None:
    result = run(blocks("sh")[2], folder)
    assert result.returncode == 2
    assert "expected a run's folder" in result.stderr


def test_the_signature_can_be_checked_as_the_document_describes(folder: Path) -> None:
    """By nothing of Urna: four parts with their lengths, the receipt's own text without the space between."""
    text = (folder / "receipts" / "digits-1.receipt.json").read_text("utf-8")
    inner = text[text.index('"receipt": {') + len('"receipt": ') : text.rindex(',\n  "signature"')]
    strings = re.compile(r'("(?:[^"\\]|\\.)*")|\s+')
    compact = strings.sub(lambda found: found.group(1) or "", inner)
    parts = (b"urna/1", b"receipt", b"hospital-a", compact.encode())
    data = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(ROSTER.sites["hospital-a"][:64]))
    key.verify(bytes.fromhex(json.loads(text)["signature"]), data)


def test_the_shape_of_the_file_is_the_documents() -> None:
    (block,) = blocks("json")
    shown = json.loads(block)
    assert list(shown) == ["receipt", "signature"]
    fields = list(Receipt.model_fields)
    assert [*shown["receipt"]][:2] == fields[:2]


def test_the_sites_command_explains_itself_with_the_documents_options(folder: Path) -> None:
    words = shlex.split(blocks("sh")[0])
    result = run(f"{words[0]} {words[1]} --help", folder)
    assert result.returncode == 0
    assert all(word in result.stdout for word in [*words, "--force"] if word.startswith("--"))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
