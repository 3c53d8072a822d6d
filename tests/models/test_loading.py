import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from urna.models import loading
from urna.models.catalogue import CATALOGUE, spec
from urna.models.loading import artefact_sha256, cache_root, load_backbone
from urna.protocol.errors import ModelError


@pytest.fixture
def mine(artefacts: Path, tmp_path: Path) -> Path:
    """A root of its own with the cnn in it, for the test to damage."""
    shutil.copytree(artefacts / "cnn", tmp_path / "cnn")
    return tmp_path


def plant(root: Path, content: bytes) -> None:
    """Replace the cnn's weights as someone would who can write to the cache: the manifest agrees with the new bytes."""
    (root / "cnn" / "model.safetensors").write_bytes(content)
    manifest = {"sha256": hashlib.sha256(content).hexdigest(), "recipe": "any"}
    (root / "cnn" / "manifest.json").write_text(json.dumps(manifest))


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((root / "cnn" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_candidate_yields_features_of_its_declared_size(artefacts: Path, name: str) -> None:
    features = load_backbone(name, root=artefacts).features(np.random.default_rng(0).random((5, 8, 8)))
    assert features.shape == (5, spec(name).feature_dim)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


@pytest.mark.parametrize("name", CATALOGUE)
def test_no_records_give_no_features(artefacts: Path, name: str) -> None:
    assert load_backbone(name, root=artefacts).features(np.zeros((0, 8, 8))).shape == (0, spec(name).feature_dim)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_record_has_the_same_features_alone_and_in_company(
    artefacts: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(name, root=artefacts)
    images = np.random.default_rng(0).random((7, 8, 8))
    together = backbone.features(images)
    np.testing.assert_array_equal(backbone.features(images[4:5]), together[4:5])  # bit for bit: see `models/parts.py`
    monkeypatch.setattr(loading, "SLOTS", 3)
    np.testing.assert_allclose(backbone.features(images), together, atol=1e-5)


def test_a_record_whose_features_are_not_finite_has_zeros_and_tells_nobody(
    artefacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone("mlp", root=artefacts)
    images = np.random.default_rng(0).random((4, 8, 8))
    expected = backbone.features(images)
    whole = backbone.module.forward

    def breaks_for_one(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = whole(images).clone()
        features[2, 5] = torch.inf
        return features

    monkeypatch.setattr(backbone.module, "forward", breaks_for_one)
    expected[2] = 0.0
    np.testing.assert_array_equal(backbone.features(images), expected)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_loaded_backbone_is_frozen_and_holds_the_bytes_of_its_file(artefacts: Path, name: str) -> None:
    backbone = load_backbone(name, artefact_sha256(name, artefacts), artefacts)
    stored = safetensors.torch.load((artefacts / name / "model.safetensors").read_bytes())
    assert not backbone.module.training
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    assert all(torch.equal(value, stored[key]) for key, value in backbone.module.state_dict().items())
    assert torch.equal(backbone.feature_mean, stored["feature_mean"])
    assert backbone.sha256 == artefact_sha256(name, artefacts)


def test_pickle_refused_without_opening(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = mine / "opened"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (os.mkdir, (str(trap),))

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"opened with {args} {kwargs}")

    for opener in ("torch.load", "pickle.load", "pickle.loads"):
        monkeypatch.setattr(opener, never)
    plant(mine, pickle.dumps(Trap()))
    with pytest.raises(ModelError, match="must be safetensors, found a pickle; it was not opened"):
        load_backbone("cnn", root=mine)
    assert not trap.exists()


def test_torch_archive_under_a_safetensors_name_is_refused(mine: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, mine / "archive")
    plant(mine, (mine / "archive").read_bytes())
    with pytest.raises(ModelError, match="must be safetensors, found a zip archive"):
        load_backbone("cnn", root=mine)


def test_changed_file_same_name_refused(mine: Path) -> None:
    pinned = artefact_sha256("cnn", mine)
    tensors = tensors_of(mine)
    tensors["conv1.bias"] = tensors["conv1.bias"] + 1e-3
    plant(mine, safetensors.torch.save(tensors))
    assert load_backbone("cnn", root=mine).sha256 != pinned  # the manifest beside it is no defence
    with pytest.raises(ModelError, match=f"weights of 'cnn' must have sha256 {pinned}, found [0-9a-f]{{64}} in"):
        load_backbone("cnn", pinned, mine)


def test_one_flipped_bit_is_refused(mine: Path) -> None:
    path = mine / "cnn" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="must have sha256"):
        load_backbone("cnn", root=mine)


def test_the_hash_is_checked_before_anything_is_parsed(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(content: bytes) -> None:
        raise AssertionError(f"parsed {len(content)} bytes")

    monkeypatch.setattr("safetensors.torch.load", never)
    with pytest.raises(ModelError, match=f"must have sha256 {'0' * 64}"):
        load_backbone("cnn", "0" * 64, mine)


def test_a_huge_file_is_refused_before_it_is_read(mine: Path) -> None:
    os.truncate(mine / "cnn" / "model.safetensors", loading.MAX_WEIGHTS_BYTES + 1)
    with pytest.raises(ModelError, match="must be at most 67108864 bytes, found 67108865: remove it"):
        load_backbone("cnn", root=mine)


def test_a_pipe_in_place_of_a_file_does_not_block(mine: Path) -> None:
    (mine / "cnn" / "model.safetensors").unlink()
    os.mkfifo(mine / "cnn" / "model.safetensors")
    with pytest.raises(ModelError, match="must be a regular file"):
        load_backbone("cnn", root=mine)


def test_another_architectures_tensors_are_refused_by_name(mine: Path) -> None:
    tensors = tensors_of(mine)
    tensors["conv9.weight"] = tensors.pop("conv1.weight")
    plant(mine, safetensors.torch.save(tensors))
    with pytest.raises(ModelError, match=r"lack \['conv1.weight'\] and have unexpected \['conv9.weight'\]"):
        load_backbone("cnn", root=mine)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("feature_mean", torch.zeros(65), r"must be torch.float32 \(64,\), found torch.float32 \(65,\)"),
        ("conv1.bias", torch.zeros(16, dtype=torch.float64), r"found torch.float64 \(16,\)"),
        ("feature_scale", torch.tensor(float("inf")), "must be finite"),
        ("conv1.bias", torch.full((16,), float("nan")), "must be finite"),
    ],
)
def test_tensors_of_wrong_shape_type_or_value_are_refused(mine: Path, key: str, value: torch.Tensor, message: str) -> None:
    plant(mine, safetensors.torch.save(tensors_of(mine) | {key: value}))
    with pytest.raises(ModelError, match=f"tensor '{key}' of 'cnn' .*{message}"):
        load_backbone("cnn", root=mine)


def test_truncated_weights_are_refused(mine: Path) -> None:
    plant(mine, (mine / "cnn" / "model.safetensors").read_bytes()[:-7])
    with pytest.raises(ModelError, match="must be well-formed safetensors"):
        load_backbone("cnn", root=mine)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: len(b).to_bytes(8, "little") + b"{" + b))
def test_no_bytes_whatever_raise_anything_but_one_line_of_model_error(mine: Path, content: bytes) -> None:
    plant(mine, content)
    with pytest.raises(ModelError) as caught:
        load_backbone("cnn", root=mine)
    assert "\n" not in str(caught.value)


def test_a_candidate_that_is_not_pretrained_yet_says_what_to_run(tmp_path: Path) -> None:
    for ask in (artefact_sha256, lambda name, root: load_backbone(name, root=root)):
        with pytest.raises(ModelError, match=r"'vit' is not pretrained yet, found no .*: run `urna models pretrain`"):
            ask("vit", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1, "recipe": "x"}', "\x00"])
def test_a_damaged_manifest_is_refused(mine: Path, text: str) -> None:
    (mine / "cnn" / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match="manifest of 'cnn' must"):
        artefact_sha256("cnn", mine)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URNA_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/a/models")
    monkeypatch.delenv("URNA_CACHE_DIR")
    assert cache_root() == Path("/b/urna/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root() == Path("/c/.cache/urna/models")


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_batch_is_what_the_module_takes(artefacts: Path, name: str) -> None:
    backbone = load_backbone(name, root=artefacts)
    batch = backbone.batch(np.random.default_rng(0).random((3, 16, 16)))
    raw = backbone.module(**batch)
    expected = backbone.features(np.random.default_rng(0).random((3, 16, 16)))
    np.testing.assert_allclose((raw - backbone.feature_mean) * backbone.feature_scale, expected, atol=1e-5)


def test_synthetic_inputs_are_images_that_differ_and_are_the_same_for_a_seed(artefacts: Path) -> None:
    backbone = load_backbone("cnn", root=artefacts)
    one, again, other = (backbone.synthetic(6, seed)["images"] for seed in (1, 1, 2))
    assert one.shape == (6, 1, 8, 8)
    assert one.dtype == torch.float32
    assert 0.0 <= float(one.min()) < 0.1 < 0.9 < float(one.max()) <= 1.0
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(torch.unique(one.flatten(1), dim=0)) == 6
    assert backbone.module(**backbone.synthetic(0, 1)).shape == (0, 64)


def test_texts_are_no_images(artefacts: Path) -> None:
    with pytest.raises(ModelError, match="expected images, found list"):
        load_backbone("cnn", root=artefacts).features(["a text"])


def test_a_device_is_one_that_this_machine_has(artefacts: Path) -> None:
    backbone = load_backbone("cnn", root=artefacts)
    images = np.random.default_rng(0).random((3, 8, 8))
    np.testing.assert_allclose(backbone.features(images, device="auto"), backbone.features(images), atol=1e-4)
    assert next(backbone.module.parameters()).device.type == "cpu"
    with pytest.raises(ModelError, match="device must be auto, cpu or cuda, found 'tpu'"):
        backbone.features(images, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="needs a CUDA device, found none"):
            backbone.features(images, device="cuda")


def test_the_pinned_files_of_a_built_in_candidate_are_its_weights(mine: Path) -> None:
    pinned = artefact_sha256("cnn", mine)
    files = loading.read_artefact("cnn", pinned, mine)
    assert files == {"model.safetensors": (mine / "cnn" / "model.safetensors").read_bytes()}
    assert loading.load_backbone_folder("cnn", mine / "cnn", pinned).sha256 == pinned
    with pytest.raises(ModelError, match="must have sha256"):
        loading.read_artefact("cnn", "0" * 64, mine)
