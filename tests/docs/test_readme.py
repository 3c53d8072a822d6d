"""The README is true: its tree, its measured table, its commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PACKAGES = ("protocol", "privacy", "models", "strategies", "server", "client")
RUN_BY_CI = ("make demo", "make test")  # .ci/run calls them, in a clean clone
SERVES_UNTIL_STOPPED = ("urna monitor",)


def test_the_tree_lists_every_module_with_one_clause() -> None:
    tree = README.split("<!-- tree: begin -->")[1].split("<!-- tree: end -->")[0]
    listed, folder = set(), ""
    for line in tree.splitlines():
        if re.fullmatch(r"\w+/", line):
            folder = line
        elif found := re.fullmatch(r"  (\w+\.py) +(\S.*)", line):
            listed.add(folder + found.group(1))
    expected = {
        f"{package}/{path.name}" for package in PACKAGES for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"
    }
    assert listed == expected


def test_the_measured_table_is_the_newest_committed_lines() -> None:
    assert "| campaign |" in table.table()
    assert table.rewritten(README) == README


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line[2:].split("#")[0].strip() for line in lines]


def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    """In order, in one folder; the plan of the same name has fewer rounds and candidates here."""
    names = ("pixels", "pca", "cnn")
    text = (ROOT / "plans" / "digits.toml").read_text()
    text = text[: text.index("# The operator's prior")].replace("num_rounds = 80", "num_rounds = 9")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "digits.toml").write_text(text + "".join(f'[[candidates]]\nname = "{name}"\n' for name in names))
    ran = 0
    for command in commands():
        if command in RUN_BY_CI or command.startswith(SERVES_UNTIL_STOPPED):
            continue
        program, *arguments = command.split()
        result = subprocess.run(
            [str(Path(sys.executable).parent / program), *arguments],
            cwd=tmp_path,
            env=os.environ | {"NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        ran += 1
    assert ran == 8
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


@pytest.mark.parametrize("command", RUN_BY_CI)
def test_ci_runs_the_two_commands(command: str) -> None:
    script = (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert command in script or re.search(rf"^check:.*\b{command.split()[1]}\b", makefile, re.MULTILINE)


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), (document.name, target)
