"""The operator's command line: what a person sees, and exit codes. Bad input: one line, code 2, nothing written."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.models import folders
from urna.models.loading import cache_root

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "plans" / "digits.toml"


def urna(*arguments: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the installed command as a person would."""
    import os

    return subprocess.run(
        [Path(sys.executable).parent / "urna", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "100", "NO_COLOR": "1"} | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def refused(result: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """One line on stderr with every part, exit code 2, no traceback."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr + result.stdout
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("epsilon = 3.0", "epsilno = 3.0", ("privacy.epsilno", "did you mean epsilon?")),
        ("epsilon = 3.0", "epsilon = 0", ("privacy.epsilon", "greater than 0", "found 0")),
        ("epsilon = 3.0", "epsilon = nan", ("privacy.epsilon", "finite", "found nan")),
        ("epsilon = 3.0", "epsilon = inf", ("privacy.epsilon", "finite", "found inf")),
        ("epsilon = 3.0", "epsilon = 0.0001", ("privacy.epsilon", "cannot pay", "raise epsilon")),
        ("epsilon = 3.0", "epsilon = -1.0", ("privacy.epsilon", "found -1.0")),
        ("delta = 1e-5", "delta = 0.01", ("privacy.delta", "below 1/n", "found 0.01", "lower delta")),
        ("num_sites = 5", "num_sites = 2", ("federation.virtual.num_sites", "at least federation.min_sites = 4", "found 2")),
        ('name = "cnn"', 'name = "cnnn"', ("'cnnn'", "did you mean 'cnn'?")),
        ("[task]", "[task", ("TOML", "syntax error")),
    ],
)
def test_a_bad_plan_is_one_line_and_nothing_is_written(tmp_path: Path, old: str, new: str, parts: tuple[str, ...]) -> None:
    text = PLAN.read_text()
    assert old in text
    (tmp_path / "plan.toml").write_text(text.replace(old, new, 1))
    refused(urna("run", "plan.toml", cwd=tmp_path), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]
    refused(urna("plan", "check", "plan.toml", cwd=tmp_path), *parts)


@pytest.mark.parametrize("command", ["resume", "status", "report", "predict"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, command: str) -> None:
    extra = ["--input", "x.csv"] if command == "predict" else []
    refused(urna(command, "nowhere", *extra, cwd=tmp_path), "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_missing_plan_is_one_line(tmp_path: Path) -> None:
    refused(urna("run", "nowhere.toml", cwd=tmp_path), "expected a plan file", "found nothing")


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of two built candidates that a test may spoil."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("pixels", "pca"):
        shutil.copytree(cache_root() / name, cache / "models" / name)
    return cache


@pytest.mark.parametrize(
    ("content", "part"),
    [(pickle.dumps({"weights": [1.0]}), "must be safetensors, found a pickle"), (b"\0" * 100, "safetensors")],
)
def test_a_corrupt_or_pickled_model_is_one_line_and_never_opened(
    tmp_path: Path, own_cache: Path, content: bytes, part: str
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(own_cache, cache)
    (cache / "models" / "pca" / "model.safetensors").write_bytes(content)
    text = PLAN.read_text()
    head = text[: text.index("# The operator's prior")]
    (tmp_path / "plan.toml").write_text(head + '[[candidates]]\nname = "pixels"\n[[candidates]]\nname = "pca"\n')
    result = urna("run", "plan.toml", cwd=tmp_path, environment={"URNA_CACHE_DIR": str(cache)})
    refused(result, part, "urna models pretrain")
    assert not (tmp_path / "runs").exists()


def test_a_plan_in_words_says_what_leaves_how_often_and_at_which_cost(tmp_path: Path) -> None:
    result = urna("plan", "check", PLAN, cwd=tmp_path)
    assert result.returncode == 0
    for part in (
        "No record leaves",
        "epsilon 3 at delta 1e-05",
        "numbers leave once",
        "numbers leave 80 times, with a runoff up to 96 times",
        "Limits.",
    ):
        assert part in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "",
        "plan",
        "plan check",
        "run",
        "resume",
        "status",
        "report",
        "predict",
        "monitor",
        "models list",
        "models pretrain",
        "models add",
    ],
)
def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    result = urna(*command.split(), "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "Usage: urna" in result.stdout


def test_the_command_line_starts_without_loading_torch_or_flower() -> None:
    code = "import sys, urna.server.cli; sys.exit(bool({'torch', 'flwr', 'opacus', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_option_is_bad_input(tmp_path: Path) -> None:
    assert urna("run", "--nope", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("options", "part"),
    [([], "--operator-key and --roster"), (["--operator-key", "k", "--roster", "r"], "expected the federation 'nowhere'")],
)
def test_a_federation_without_keys_or_roster_is_one_line_and_nothing_is_left(
    tmp_path: Path, options: list[str], part: str
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.read_text())
    refused(urna("run", "plan.toml", "--federation", "nowhere", "--name", "x", *options, cwd=tmp_path), part)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


# --- candidates


ABOUT = ("--licence", "MIT", "--pretrained-on", "nothing")


@pytest.fixture(scope="module")
def with_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tiny model of texts, added as a person would."""
    cache = tmp_path_factory.mktemp("tiny")
    source = folders.bert(cache / "source")
    (cache / "public.txt").write_text("the dog runs\na cat sleeps\nshe runs fast\n")
    options = ("--summary", "A test.", "--max-tokens", "9", "--centre-on", "public.txt")
    result = urna("models", "add", "tiny", source, *ABOUT, *options, cwd=cache, environment={"URNA_CACHE_DIR": str(cache)})
    assert result.returncode == 0, result
    assert "tiny: bert, text, " in result.stdout
    assert "no feature needs, so dropped: pooler.dense.bias, pooler.dense.weight" in result.stdout
    return cache


def test_an_added_model_is_listed_with_the_built_in_ones(with_tiny: Path) -> None:
    result = urna("models", "list", cwd=with_tiny, environment={"URNA_CACHE_DIR": str(with_tiny)})
    assert result.returncode == 0
    assert "cnn           convolutional, image, 31,024 parameters, 64 features, Apache-2.0, not built" in result.stdout
    assert "tiny          bert, text, 5,072 parameters, 16 features, MIT, installed " in result.stdout
    assert "A test. Pretrained on nothing." in result.stdout


def test_a_damaged_candidate_hides_no_other(with_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(with_tiny / "models", tmp_path / "models")
    shutil.copytree(tmp_path / "models" / "tiny", tmp_path / "models" / "spoilt")
    result = urna("models", "list", cwd=tmp_path, environment={"URNA_CACHE_DIR": str(tmp_path)})
    assert result.returncode == 0
    assert "spoilt        cannot be read" in result.stdout
    assert "must be of this name, found 'tiny'" in result.stdout
    assert "tiny          bert" in result.stdout


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_a_check_shows_every_trained_parameter_and_the_engine(with_tiny: Path, tuning: str) -> None:
    result = urna(
        *("models", "check", "tiny", "--tuning", tuning, "--num-classes", "3"),
        cwd=with_tiny,
        environment={"URNA_CACHE_DIR": str(with_tiny)},
    )
    assert result.returncode == 0, result
    rows = {
        "head": ["weight", "bias"],
        "full": ["embeddings.word_embeddings.weight", "layer.1.output.LayerNorm.bias", "head.weight"],
    }[tuning]
    for part in (f"gradients of tuning {tuning} with 3 classes are sound", *rows, "norm error", "tolerance 0.001", "engine "):
        assert part in result.stdout


def test_a_check_of_changed_files_is_one_line(with_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(with_tiny / "models", tmp_path / "models")
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    refused(urna("models", "check", "tiny", cwd=tmp_path, environment={"URNA_CACHE_DIR": str(tmp_path)}), "must have sha256")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("cnn", "source"), ("'cnn' is a built-in candidate",)),
        (("new", "nowhere"), ("expected a folder with a model at nowhere, found nothing",)),
        (("new", "source", "--hub", "owner/name"), ("expected a folder, or --hub with --revision",)),
        (("new", "source", "--centre-on", "nowhere.txt"), ("nowhere.txt", "found nothing")),
    ],
)
def test_a_bad_addition_is_one_line_and_nothing_is_added(
    with_tiny: Path, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    before = sorted(with_tiny.rglob("*"))
    environment = {"URNA_CACHE_DIR": str(with_tiny)}
    refused(urna("models", "add", *arguments, *ABOUT, cwd=with_tiny, environment=environment), *parts)
    assert sorted(with_tiny.rglob("*")) == before


def test_an_installed_model_is_not_built(with_tiny: Path) -> None:
    environment = {"URNA_CACHE_DIR": str(with_tiny)}
    refused(urna("models", "pretrain", "tiny", cwd=with_tiny, environment=environment), "'tiny' was installed, not built here")
