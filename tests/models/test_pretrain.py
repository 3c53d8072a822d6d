import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from urna.models import pretrain as module
from urna.models import public_data
from urna.models.catalogue import CATALOGUE, spec
from urna.models.loading import artefact_sha256, load_backbone
from urna.models.pretrain import pretrain, pretrain_all
from urna.protocol.errors import ModelError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipes on so few examples that a candidate takes a moment."""
    short = {name: replace(recipe, num_examples=200, num_epochs=1) for name, recipe in module.RECIPES.items()}
    monkeypatch.setattr(module, "RECIPES", short)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", CATALOGUE)
def test_pretraining_is_deterministic(name: str, tmp_path: Path) -> None:
    hashes: list[str] = []
    for attempt in ("first", "second"):
        torch.manual_seed(len(hashes))  # whatever the caller did with torch's generator before
        pretrain(name, tmp_path / attempt)
        hashes.append(artefact_sha256(name, tmp_path / attempt))
        module._characters.cache_clear()
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("quick")
def test_another_seed_gives_another_artefact(tmp_path: Path) -> None:
    pretrain("rff", tmp_path, seed=0)
    first = artefact_sha256("rff", tmp_path)
    pretrain("rff", tmp_path, seed=1)
    assert artefact_sha256("rff", tmp_path) != first


@pytest.mark.usefixtures("quick")
def test_pretraining_leaves_torchs_generator_and_threads_as_they_were(tmp_path: Path) -> None:
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    pretrain("lstm", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.usefixtures("quick")
def test_a_fresh_artefact_is_kept_and_a_stale_one_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inode() -> int:
        return pretrain("pixels", tmp_path).stat().st_ino

    first = inode()
    assert inode() == first
    monkeypatch.setattr(module, "RECIPE_VERSION", module.RECIPE_VERSION + 1)
    assert inode() != first


@pytest.mark.usefixtures("quick")
def test_a_damaged_artefact_is_made_anew(tmp_path: Path) -> None:
    weights = pretrain("rff", tmp_path) / "model.safetensors"
    sha256 = artefact_sha256("rff", tmp_path)
    weights.write_bytes(b"damaged")
    pretrain("rff", tmp_path)
    assert load_backbone("rff", sha256, tmp_path).sha256 == sha256


@pytest.mark.usefixtures("quick")
def test_force_makes_anew_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    first = pretrain("pixels", tmp_path).stat().st_ino
    assert pretrain("pixels", tmp_path, force=True).stat().st_ino != first
    assert {path.name for path in tmp_path.iterdir()} == {"pixels", ".pixels.lock"}
    assert {path.name for path in (tmp_path / "pixels").iterdir()} == {
        "model.safetensors",
        "config.json",
        "manifest.json",
    }


@pytest.mark.usefixtures("quick")
def test_a_crash_while_writing_leaves_the_old_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("rff", tmp_path)
    sha256 = artefact_sha256("rff", tmp_path)

    def disk_full(*args: object) -> None:
        raise OSError(f"no space left for {args}")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="no space left"):
        pretrain("rff", tmp_path, seed=1)
    assert load_backbone("rff", root=tmp_path).sha256 == sha256
    assert {path.name for path in tmp_path.iterdir()} == {"rff", ".rff.lock"}


@pytest.mark.usefixtures("quick")
def test_of_two_that_ask_at_once_one_makes_and_the_other_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    train = module._train

    def counted(name: str, seed: int, progress: module.Progress) -> dict[str, torch.Tensor]:
        made.append(name)
        return train(name, seed, progress)

    monkeypatch.setattr(module, "_train", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: pretrain("rff", tmp_path), range(2)))
    assert made == ["rff"]


@pytest.mark.usefixtures("quick")
def test_progress_runs_from_none_to_all_for_every_candidate(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    folders = pretrain_all(("pixels", "autoencoder"), tmp_path, progress=lambda name, done: seen.append((name, done)))
    assert folders == {"pixels": tmp_path / "pixels", "autoencoder": tmp_path / "autoencoder"}
    for name in folders:
        done = [part for candidate, part in seen if candidate == name]
        assert (done[0], done[-1]) == (0.0, 1.0)
        assert done == sorted(done)


@pytest.mark.usefixtures("quick")
def test_config_tells_the_licence_the_public_data_and_the_libraries(tmp_path: Path) -> None:
    config = json.loads((pretrain("vit", tmp_path) / "config.json").read_text())
    assert config["licence"] == "Apache-2.0"
    assert config["pretrained_on"] == spec("vit").pretrained_on
    assert config["architecture"] == {"module": "VisionTransformer", "width": 48, "depth": 2, "num_heads": 4}
    assert config["recipe"]["seed"] == 0
    assert config["libraries"]["torch"] == torch.__version__


def test_an_unknown_candidate_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'vit'"):
        pretrain("vitt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


_opened: list[str] | None = None


def _note_opened(event: str, args: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(args[0]))


@pytest.mark.usefixtures("quick")
def test_pretraining_never_reads_the_private_digits(tmp_path: Path) -> None:
    global _opened
    sys.addaudithook(_note_opened)  # stays for the process, asleep
    module._characters.cache_clear()
    public_data._centre_lines.cache_clear()
    _opened = []
    try:
        pretrain_all(root=tmp_path)
        opened, _opened = _opened, []
        load_digits()
        control = _opened
    finally:
        _opened = None
    assert any(Path(path).is_relative_to(tmp_path) for path in opened)
    assert not [path for path in opened if "digits" in Path(path).name]
    assert [path for path in control if "digits" in Path(path).name]  # the hook would have seen it


def test_public_characters_are_counts_over_blocks_of_every_class() -> None:
    images, labels = public_data.characters(3000, torch.Generator().manual_seed(0))
    assert images.shape == (3000, 1, 8, 8)
    assert set(labels.tolist()) == set(range(47))
    np.testing.assert_array_equal(images * 16, (images * 16).round())
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0
    occupied = images.sum((1, 3)) > 0  # (3000, 8 rows)
    assert float(occupied[:, 0].float().mean()) > 0.5  # the size is normalised: ink reaches the edge


@pytest.mark.parametrize("name", CATALOGUE)
def test_features_of_public_characters_are_centred_and_of_mean_norm_one(artefacts: Path, name: str) -> None:
    images, _ = public_data.characters(2000, torch.Generator().manual_seed(123))
    features = load_backbone(name, root=artefacts).features(images[:, 0].numpy())
    assert np.linalg.norm(features.mean(0)) < 0.1
    assert abs(np.linalg.norm(features, axis=1).mean() - 1.0) < 0.05
