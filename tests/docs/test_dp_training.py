"""docs/dp-training.md is true: its commands run on a real folder, its keys are taken, its numbers are the code's."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.client.clinic import a_plan
from tests.models.folders import bert
from urna.client.compute import Compute
from urna.models.engines import ORDER
from urna.models.preflight import TOLERANCE
from urna.models.repairs import MIN_SHARE

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "dp-training.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, flags=re.DOTALL | re.MULTILINE)


def test_its_plan_and_its_site_keys_are_taken() -> None:
    final, compute = (tomllib.loads(block) for block in blocks("toml"))
    assert a_plan(final=final["final"]).final.tuning == "lora"
    assert Compute.model_validate(compute["compute"]) == Compute()


@pytest.mark.timeout(300)
def test_its_commands_install_and_check_a_model(tmp_path: Path) -> None:
    bert(tmp_path / "path" / "to" / "folder")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": path, "URNA_CACHE_DIR": str(tmp_path / "cache"), "NO_COLOR": "1"}
    lines = [line.removeprefix("$ ") for line in blocks("console")[0].splitlines()]
    assert [line.split()[:3] for line in lines] == [["urna", "models", "add"], ["urna", "models", "check"]]
    for line in lines:
        done = subprocess.run(
            ["bash", "-euc", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert "are sound" in done.stdout


def test_its_numbers_and_engines_are_the_code_s() -> None:
    assert f"More than {TOLERANCE:g} off" in DOCUMENT.replace("1e-3", "0.001")
    assert f"at least {MIN_SHARE:.0%}".replace("%", " %") in DOCUMENT
    engines = {name for order in ORDER.values() for name in order}
    assert engines | {"cached"} == set(re.findall(r"^\| ([a-z-]+) \|", DOCUMENT.partition("## Engines")[2], re.MULTILINE)) - {
        "engine"
    }
