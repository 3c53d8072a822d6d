"""Pretraining: every candidate of the catalogue, made from public data in about a minute on one core.

What is made is reproducible for a seed, a machine and a version of torch; on another processor the last bits of the
weights, and so the hash, may differ. Sites that are to agree on one hash copy the artefact instead of making it.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from urna.models import public_data
from urna.models.catalogue import CATALOGUE, spec
from urna.models.loading import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, cache_root, load_backbone, read_manifest
from urna.models.vision import ARCHITECTURES, Components, PatchClusters, RandomFourier, build
from urna.protocol.errors import ModelError

RECIPE_VERSION = 1  # raise it when the public data or the training changes: stale artefacts are then made anew

Progress = Callable[[str, float], None]  # (candidate, part done in 0..1)


@dataclass(frozen=True)
class Recipe:
    """How one backbone is pretrained.

    Args:
        task: `none`, `bandwidth` (random Fourier features), `components`, `clusters`, `classes` or
            `reconstruction`.
        num_epochs: Passes over the public examples.
        learning_rate: Peak of a one-cycle schedule of AdamW.
        num_examples: Public examples.
        batch_size: Public examples per step.
    """

    task: str
    num_epochs: int = 0
    learning_rate: float = 0.0
    num_examples: int = 20_000
    batch_size: int = 100


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "pixels": Recipe("none"),
        "rff": Recipe("bandwidth"),
        "pca": Recipe("components"),
        "kmeans": Recipe("clusters"),
        "mlp": Recipe("classes", num_epochs=6, learning_rate=4e-3),
        "autoencoder": Recipe("reconstruction", num_epochs=10, learning_rate=3e-3),
        "cnn": Recipe("classes", num_epochs=6, learning_rate=4e-3),
        "cnn_random": Recipe("none"),
        "conv_gru": Recipe("classes", num_epochs=5, learning_rate=4e-3),
        "lstm": Recipe("classes", num_epochs=8, learning_rate=8e-3),
        "vit": Recipe("classes", num_epochs=6, learning_rate=5e-3),
    }
)


def pretrain_all(
    names: Iterable[str] = tuple(CATALOGUE),
    root: Path | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = lambda _name, _done: None,
) -> dict[str, Path]:
    """Pretrain several candidates; see `pretrain`.

    Returns:
        The folder of each artefact, by candidate.
    """
    return {name: pretrain(name, root, force, seed, progress) for name in names}


def pretrain(
    name: str,
    root: Path | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = lambda _name, _done: None,
) -> Path:
    """Make a candidate's artefact, unless the same recipe and seed made the one that is there.

    Safe to call from several processes at once: one makes it, the others wait and find it.

    Args:
        name: A candidate of the catalogue.
        root: Folder of artefacts; None is `cache_root()`.
        force: Make it anew in any case.
        seed: Of the public data and the training.
        progress: Called with the candidate's name and the part that is done, from 0.0 to 1.0.

    Returns:
        The artefact's folder: model.safetensors, config.json and manifest.json.

    Raises:
        ModelError: the catalogue knows no candidate of this name.
    """
    root = root or cache_root()
    folder = root / spec(name).name
    progress(name, 0.0)
    with _locked(root / f".{name}.lock"):
        if force or not is_current(name, root, seed):
            with _reproducible(seed):
                tensors = _train(name, seed, progress)
            _write(folder, safetensors.torch.save(tensors), _config(name, seed), recipe_hash(name, seed))
    progress(name, 1.0)
    return folder


def recipe_hash(name: str, seed: int) -> str:
    """Return the hash of all that decides an artefact, except the machine and the version of torch."""
    decisive = {"name": name, "seed": seed, "version": RECIPE_VERSION, "recipe": asdict(RECIPES[name])}
    decisive["architecture"] = dict(ARCHITECTURES[name][1])
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def is_current(name: str, root: Path | None = None, seed: int = 0) -> bool:
    """Whether an intact artefact of the present recipe is there."""
    try:
        load_backbone(name, root=root)
        return read_manifest(name, root)["recipe"] == recipe_hash(name, seed)
    except ModelError:
        return False


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Fix torch's generator and threads, whose number changes the order of sums, and give both back afterwards."""
    num_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)


@lru_cache(maxsize=1)
def _characters(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return public_data.characters(number, torch.Generator().manual_seed(seed))


def _train(name: str, seed: int, progress: Progress) -> dict[str, torch.Tensor]:
    recipe = RECIPES[name]
    images, labels = _characters(recipe.num_examples, seed)
    backbone, feature_dim = build(name), spec(name).feature_dim
    if isinstance(backbone, RandomFourier):
        _draw_frequencies(backbone, images)
    elif isinstance(backbone, Components):
        _find_components(backbone, images)
    elif isinstance(backbone, PatchClusters):
        _find_clusters(backbone, images)
    elif recipe.task == "classes":
        _fit(backbone, nn.Linear(feature_dim, len(public_data.CHARACTERS)), images, labels, recipe, name, progress)
    elif recipe.task == "reconstruction":
        decoder = nn.Sequential(nn.Linear(feature_dim, 128), nn.GELU(), nn.Linear(128, 64))
        _fit(backbone, decoder, images, images.flatten(1), recipe, name, progress)
    with torch.no_grad():
        features = torch.cat([backbone.eval()(batch) for batch in torch.split(images, 1000)])
    mean = features.mean(0)
    scale = 1.0 / (features - mean).norm(dim=1).mean()
    return dict(backbone.state_dict()) | {"feature_mean": mean, "feature_scale": scale}


def _draw_frequencies(backbone: RandomFourier, images: torch.Tensor) -> None:
    """Draw the frequencies of a Gaussian kernel whose bandwidth is the median distance of public characters."""
    half = len(images) // 2
    bandwidth = (images[:half] - images[half : 2 * half]).flatten(1).norm(dim=1).median()
    with torch.no_grad():
        backbone.frequencies.weight.normal_().div_(bandwidth)
        backbone.frequencies.bias.uniform_(0.0, 2.0 * torch.pi)


def _find_components(backbone: Components, images: torch.Tensor) -> None:
    """Principal directions of the public characters, each divided by its spread plus that of the eleventh."""
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    _, spread, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    size = len(backbone.project.bias)
    weight = directions[:size] * (math.sqrt(len(flat)) / (spread[:size] + spread[10]))[:, None]
    weight = weight * weight[:, weight.abs().argmax(1)].diag().sign()[:, None]  # a sign that does not depend on the solver
    with torch.no_grad():
        backbone.project.weight.copy_(weight)
        backbone.project.bias.copy_(-weight @ mean)


def _find_clusters(backbone: PatchClusters, images: torch.Tensor, num_steps: int = 15) -> None:
    """Lloyd's algorithm on patches of public characters that have contrast."""
    patches = backbone.patches(images[:4000]).flatten(0, 1)
    patches = patches[patches.std(-1) > 0.5][:20_000]
    centres = patches[torch.randperm(len(patches))[: len(backbone.centres)]]
    for _ in range(num_steps):
        nearest = torch.cdist(patches, centres).argmin(1)
        ones = functional.one_hot(nearest, len(centres)).to(patches.dtype)  # (n, k)
        counts = ones.sum(0)[:, None]
        centres = torch.where(counts > 0, ones.T @ patches / counts.clamp(min=1), centres)
    with torch.no_grad():
        backbone.centres.copy_(centres)


def _fit(
    backbone: nn.Module,
    top: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    recipe: Recipe,
    name: str,
    progress: Progress,
) -> None:
    """Train a backbone with a throw-away top: integer targets are classes, real ones are to be reconstructed."""
    both = nn.Sequential(backbone, top).train()
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    num_steps = recipe.num_epochs * len(images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, num_steps)
    for epoch in range(recipe.num_epochs):
        for chosen in torch.split(torch.randperm(len(images)), recipe.batch_size):
            batch = images[chosen]
            if targets.is_floating_point():
                noisy = (batch + 0.2 * torch.randn_like(batch)).clamp(0.0, 1.0)
                loss = functional.mse_loss(both(noisy), targets[chosen])
            else:
                loss = functional.cross_entropy(both(batch), targets[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        progress(name, (epoch + 1) / recipe.num_epochs)


def _config(name: str, seed: int) -> dict[str, object]:
    facts = spec(name)
    return {
        "name": name,
        "architecture": {"module": ARCHITECTURES[name][0].__name__, **ARCHITECTURES[name][1]},
        "recipe": {"version": RECIPE_VERSION, "seed": seed, **asdict(RECIPES[name])},
        "pretrained_on": facts.pretrained_on,
        "licence": facts.licence,
        "libraries": {
            library: importlib.metadata.version(library)
            for library in ("torch", "numpy", "safetensors", "pillow", "matplotlib", "scikit-learn")
        },
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, also by a crash
        yield


def _write(folder: Path, weights: bytes, config: dict[str, object], recipe: str) -> None:
    """Write an artefact beside its place and move it there whole; a crash leaves the old one or none."""
    manifest = {"sha256": hashlib.sha256(weights).hexdigest(), "recipe": recipe}
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (fresh / WEIGHTS_FILE).write_bytes(weights)
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (fresh / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
        fresh.chmod(0o755)
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            os.replace(folder, fresh / "replaced")
        os.replace(fresh, folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
