"""docs/secure-sum-for-flower.md is true: diffs are in the example, keys can be made, options are the tested ones."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.e2e import superlink
from urna.protocol.identity import OPERATOR, load_identity, load_roster

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "secure-sum-for-flower.md").read_text("utf-8")
EXAMPLE = ROOT / "examples" / "secure_quickstart"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def test_every_added_line_is_in_the_example_and_no_removed_one() -> None:
    for block in blocks("diff"):
        found = re.match(r" # (\w+\.py)\n", block)
        assert found is not None
        source = (EXAMPLE / "secure_quickstart" / found.group(1)).read_text("utf-8")
        lines = [line.strip() for line in source.splitlines()]
        added = [line[1:].strip() for line in block.splitlines() if line.startswith("+")]
        removed = [line[1:].strip() for line in block.splitlines() if line.startswith("-")]
        assert added
        assert [line for line in added if line not in lines] == []
        assert [line for line in removed if line in lines] == []


def test_the_changed_lines_are_few_and_nothing_else_knows_of_urna() -> None:
    sources = {path.name: path.read_text("utf-8") for path in (EXAMPLE / "secure_quickstart").glob("*.py")}
    imports = [line for source in sources.values() for line in source.splitlines() if "urna" in line and "import" in line]
    assert sorted(imports) == ["from urna.client import secure_sum_mod", "from urna.strategies import SecureSum"]


def test_the_keys_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(block, {})
    roster = load_roster(tmp_path / "consortium" / "roster.json")
    assert load_identity(OPERATOR, tmp_path / "consortium" / "operator.key").public_key_hex == roster.operator
    assert sorted(path.name for path in (tmp_path / "consortium" / "sites").iterdir()) == ["site-1", "site-2", "site-3"]


def test_the_commands_have_the_options_that_the_tests_use() -> None:
    """`tests/e2e/superlink.py` starts SuperNodes with the same; `test_secure_quickstart.py` runs the example with the same."""
    (block,) = blocks("sh")
    supernode, run = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    source = Path(superlink.__file__).read_text("utf-8")
    started = source[source.index("def start_supernode") : source.index("def join_by_runner")]
    assert {word for word in supernode if word.startswith("--")} == set(re.findall(r'"(--[\w-]+)"', started))
    assert run[:2] == ["flwr", "run"]
    assert (ROOT / run[2] / "pyproject.toml").is_file()
    tested = (ROOT / "tests" / "e2e" / "test_secure_quickstart.py").read_text("utf-8")
    assert 'link.flwr("run", str(APP), NAME, "--run-config"' in tested


def test_the_bundle_needs_nothing_that_is_not_installed() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dependencies"] == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target
