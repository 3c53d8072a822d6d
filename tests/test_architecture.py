"""The tree is the architecture: imports point down, few files know Flower, and no weak generator is near the noise.

The checkers read source, lazy imports and `importlib.import_module("...")` included; each is also run on sources with a
planted violation, so that none can pass by being blind.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {  # package -> what it may import
    "protocol": {"protocol"},
    "privacy": {"privacy", "protocol"},
    "models": {"models", "protocol"},
    "strategies": {"strategies", "models", "privacy", "protocol"},
    "server": {"server", "strategies", "models", "privacy", "protocol"},
    "client": {"client", "models", "privacy", "protocol"},
}
ABOVE_ALL = "embedded.py"  # the virtual sites and their server live in one process: the one module above both sides
KNOWS_FLOWER = {
    "protocol/messages.py",  # to and from records, lazily
    "protocol/sealing.py",  # the same, of parcels
    "protocol/averaging.py",  # the same
    "strategies/aggregation.py",  # Flower's strategies, lazily
    "strategies/grid.py",  # one exchange over a Grid; types only
    "strategies/secure_grid.py",  # what a wrapped Flower strategy gets as its Grid
    "strategies/secure_sum.py",  # is a Flower strategy
    "client/flower_mod.py",  # is a Flower mod
    "server/app.py",
    "server/exchange.py",
    "server/deployed.py",
    "client/app.py",
    "client/flower_runtime.py",  # all that the runner needs of Flower
    "client/runner.py",  # a type of it
    "embedded.py",
}
WEAK_RNG_EXEMPT = {
    "models/public_data.py": "draws public images; a seed makes artefacts reproducible",
    "models/pretrain.py": "trains on public data; a seed makes artefacts reproducible",
    "models/preflight.py": "synthetic inputs of a self-test; nothing of a record is near",
    "models/huggingface.py": "synthetic inputs of the same",
    "models/compatibility_cases.py": "synthetic inputs and random weights of the matrix that a test writes",
    "models/attention.py": "a twin has the dropout of its layer; repairs switch both off",
    "models/recurrent.py": "the same",
    "strategies/scores.py": "simulates what is already public to give it error bars",
    "embedded.py": "decides which virtual site holds what in an experiment",
}
WEAK_MODULES = ("random", "numpy.random", "torch.random", "scipy.stats")
WEAK_NAMES = {
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "manual_seed", "initial_seed"),
    *("default_rng", "Generator", "RandomState", "SeedSequence", "multinomial", "bernoulli", "normal", "seed_all"),
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "dropout", "rvs", "DataLoader"),
}


def sources() -> Iterator[tuple[str, str]]:
    """(path below the root, source) of every module of the product."""
    files = [ROOT / ABOVE_ALL, *(path for package in LAYERS for path in sorted((ROOT / package).rglob("*.py")))]
    for path in files:
        yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


def imported_modules(path: str, source: str) -> set[str]:
    """Every module that is imported anywhere in a source, as an absolute dotted name; also inside functions."""
    found: set[str] = set()
    package = ["urna", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found |= {start} | {f"{start}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            constant = node.args[0] if node.args else None
            is_text = isinstance(constant, ast.Constant) and isinstance(constant.value, str)
            found.add(str(constant.value) if is_text and isinstance(constant, ast.Constant) else "<computed>")
    return found


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def violations(path: str, source: str) -> list[str]:
    """What a module imports and may not."""
    imported = imported_modules(path, source)
    package = path.split("/")[0]
    allowed = set(LAYERS) if path == ABOVE_ALL else LAYERS[package]
    reached = {parts[1] for name in imported if (parts := name.split("."))[0] == "urna" and len(parts) > 1}
    wrong = [f"{path} imports urna.{one}" for one in sorted(reached & {*LAYERS, "embedded"}) if one not in allowed]
    wrong += [f"{path} imports a second copy as {name}" for name in sorted(imported) if name.split(".")[0] in LAYERS]
    if path not in KNOWS_FLOWER and any(name.split(".")[0] == "flwr" for name in imported):
        wrong.append(f"{path} knows Flower")
    if "<computed>" in imported:
        wrong.append(f"{path} imports a module by a computed name")
    return wrong


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression; calls and subscripts on the way are skipped."""
    match node:
        case ast.Name():
            return node.id
        case ast.Attribute():
            return f"{dotted(node.value)}.{node.attr}"
    return ""


def weak_draws(path: str, source: str) -> list[str]:
    """Where a module could draw from a generator that a seed reaches."""
    wrong = []
    for name in sorted(imported_modules(path, source)):
        inside_torch = name.startswith("torch.") and name.split(".")[-1] in WEAK_NAMES
        if inside_torch or any(name == weak or name.startswith(f"{weak}.") for weak in WEAK_MODULES):
            wrong.append(f"{path} imports {name}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if node.attr in WEAK_NAMES or ".random." in f".{name}.":
                wrong.append(f"{path}:{node.lineno} uses {name or node.attr}")
    return wrong


def test_imports_only_point_down() -> None:
    assert [wrong for path, source in sources() for wrong in violations(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("protocol/plan.py", "from urna.privacy import accounting", "protocol/plan.py imports urna.privacy"),
        ("privacy/release.py", "def f():\n    import urna.models.tuning", "privacy/release.py imports urna.models"),
        ("client/site.py", "from urna.server.journal import Journal", "client/site.py imports urna.server"),
        ("server/rounds.py", "from urna import client", "server/rounds.py imports urna.client"),
        ("server/rounds.py", "from ..client import site", "server/rounds.py imports urna.client"),
        ("server/rounds.py", "from .. import client", "server/rounds.py imports urna.client"),
        ("client/site.py", "from urna.embedded import run", "client/site.py imports urna.embedded"),
        (
            "models/tuning.py",
            "import importlib\nimportlib.import_module('urna.server')",
            "models/tuning.py imports urna.server",
        ),
        ("models/tuning.py", "name = 'x'\n__import__(name)", "models/tuning.py imports a module by a computed name"),
        ("client/site.py", "import server.journal", "client/site.py imports a second copy as server.journal"),
        ("client/site.py", "def f():\n    from flwr.app import Array", "client/site.py knows Flower"),
        ("privacy/secure_sum.py", "if TYPE_CHECKING:\n    import flwr", "privacy/secure_sum.py knows Flower"),
    ],
)
def test_a_planted_import_is_caught(path: str, source: str, message: str) -> None:
    assert violations(path, source) == [message]


def test_the_checker_lets_through_what_is_allowed() -> None:
    assert violations("client/site.py", "import urna\nfrom urna.privacy.release import noisy_sum\nimport numpy") == []
    assert violations("embedded.py", "from urna.client import site\nfrom urna.server import app\nimport flwr") == []


def test_flower_is_only_loaded_when_a_record_is_made() -> None:
    for path in (
        "protocol/messages.py",
        "protocol/averaging.py",
        "protocol/sealing.py",
        "server/exchange.py",
        "strategies/grid.py",
        "strategies/__init__.py",
        "client/__init__.py",
    ):
        source = (ROOT / path).read_text("utf-8")
        at_import = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert at_import
        assert "flwr" not in " ".join(ast.unparse(node) for node in at_import)


def test_privacy_touches_neither_disk_nor_network() -> None:
    banned = {"pathlib", "socket", "sqlite3", "urllib", "http", "requests", "tempfile", "shutil", "subprocess", "logging"}
    for path, source in sources():
        if path.startswith("privacy/"):
            assert {name.split(".")[0] for name in imported_modules(path, source)} & banned == set(), path
            assert "open" not in {_called(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}, path


def package_folders() -> set[str]:
    """Dotted names of all folders of the product that hold modules."""
    folders = {path.parent for package in LAYERS for path in (ROOT / package).rglob("*.py")}
    return {"urna"} | {".".join(["urna", *folder.relative_to(ROOT).parts]) for folder in folders}


def test_every_package_folder_is_installed() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert set(packages) == package_folders()
    assert len(packages) == len(set(packages))


def test_every_top_level_package_has_a_layer() -> None:
    outside = {"tests", "benchmarks", "docs", "deploy"}  # not installed
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - outside == set(LAYERS)


def test_no_weak_rng_in_privacy_paths() -> None:
    found = [wrong for path, source in sources() if path not in WEAK_RNG_EXEMPT for wrong in weak_draws(path, source)]
    assert found == []


def test_every_exemption_from_the_rng_scan_is_still_needed() -> None:
    sources_by_path = dict(sources())
    stale = [path for path in WEAK_RNG_EXEMPT if not weak_draws(path, sources_by_path[path])]
    assert stale == []
    assert not any(path.startswith(("protocol/", "privacy/", "client/", "server/")) for path in WEAK_RNG_EXEMPT)


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import gauss",
        "import numpy as np\nnp.random.normal(size=3)",
        "import numpy as np\nnp.random.default_rng()",
        "from numpy.random import default_rng",
        "from numpy import random as r",
        "import torch\ntorch.randn(3)",
        "import torch\nx.normal_(0, 1)",
        "import torch\ntorch.manual_seed(42)",
        "def f():\n    from torch import randn\n    return randn(3)",
        "import torch\ntorch.cuda.manual_seed(1)",
        "import torch\ng = torch.Generator()",
        "from torch.utils.data import DataLoader",
        "from scipy.stats import norm\nnorm.rvs()",
        "import importlib\nimportlib.import_module('random')",
    ],
)
def test_a_planted_weak_generator_is_caught(source: str) -> None:
    assert weak_draws("privacy/mechanisms.py", source) != []
