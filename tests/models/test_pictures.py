"""Images become what an installed vision model reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from tests.models import folders
from tests.models.folders import ABOUT, RESNET, SIZE, VIT
from urna.models.candidate_file import PictureInput
from urna.models.installed import install
from urna.models.loading import Backbone, load_backbone
from urna.models.pictures import PIXELS, PictureAdapter
from urna.protocol.errors import ModelError


def images(*shape: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.linspace(0.0, 1.0, int(np.prod(shape))).reshape(shape)
    return found


def backbone(folder: Path, config: PreTrainedConfig, preprocessor: dict[str, object]) -> Backbone:
    source = folders.save(folders.model_of(config), folder / "source", words=False)
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return load_backbone("tiny", install("tiny", source, ABOUT, root=folder / "cache").sha256, folder / "cache")


def adapter(**changed: object) -> PictureAdapter:
    facts = {"height": 16, "width": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]} | changed
    return PictureAdapter(PictureInput.model_validate_json(json.dumps(facts)))


def test_grey_images_become_three_channels_centred_by_the_publishers_constants() -> None:
    pixels = adapter().batch(images(3, 16, 16))[PIXELS]
    assert pixels.shape == (3, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()  # what is expanded makes hooks compute wrong norms
    for channel, (mean, std) in enumerate([(0.5, 0.2), (0.4, 0.3), (0.3, 0.4)]):
        np.testing.assert_allclose(pixels[:, channel], (images(3, 16, 16) - mean) / std, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(4, 3, 40, 24), (4, 3, 5, 7), (4, 8, 8), (4, 1, 1)])
def test_images_of_any_shape_are_resized_whole_and_stay_in_range(shape: tuple[int, ...], interpolation: str) -> None:
    plain = adapter(mean=[0.0] * 3, std=[1.0] * 3, interpolation=interpolation)
    pixels = plain.batch(np.round(images(*shape)))[PIXELS]  # hard edges, where bicubic interpolation overshoots
    assert pixels.shape == (4, 3, 16, 16)
    assert 0.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0
    flat = plain.batch(np.full(shape, 0.25))[PIXELS]
    np.testing.assert_allclose(flat, 0.25, atol=1e-6)


def test_an_image_is_adapted_alone() -> None:
    together = adapter().batch(images(5, 3, 20, 30))[PIXELS]
    assert torch.equal(adapter().batch(images(5, 3, 20, 30)[2:3])[PIXELS], together[2:3])


def test_a_large_image_is_averaged_and_not_sampled() -> None:
    stripes = np.tile(np.array([0.0, 1.0]), (1, 64, 32))  # columns in turn black and white
    pixels = adapter(mean=[0.0] * 3, std=[1.0] * 3).batch(stripes)[PIXELS]
    np.testing.assert_allclose(pixels[:, :, 2:-2, 2:-2], 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (np.zeros((2, 8, 8), np.uint8), "must be floating point"),
        (["a text"], "must be floating point in .*, found list"),
        (np.zeros((2, 8)), r"must be \(n, H, W\) or"),
        (np.zeros((2, 1, 8, 8)), r"must be \(n, H, W\) or"),
        (np.zeros((2, 0, 8)), r"must be \(n, H, W\) or"),
        (np.full((2, 8, 8), 1.5), "must lie in"),
        (np.full((2, 8, 8), np.nan), "must lie in"),
    ],
)
def test_what_is_no_images_is_refused(wrong: NDArray[np.float64], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        adapter().batch(wrong)


def test_an_installed_vit_gives_the_class_token_of_the_published_one(tmp_path: Path) -> None:
    source = folders.vit(tmp_path / "source")
    found = install("tiny", source, ABOUT, root=tmp_path / "cache")
    model = load_backbone("tiny", found.sha256, tmp_path / "cache")
    assert (model.spec.modality, model.spec.input_shape, model.spec.feature_dim) == ("image", (3, 16, 16), 16)
    published = hf.ViTModel.from_pretrained(source).train(False)
    pixels = (images(2, 3, 16, 16) - np.array([0.5, 0.4, 0.3]).reshape(3, 1, 1)) / np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    with torch.no_grad():
        states = published(pixel_values=torch.tensor(pixels, dtype=torch.float32)).last_hidden_state
    np.testing.assert_allclose(model.features(images(2, 3, 16, 16)), states[:, 0].numpy(), atol=1e-5)
    assert model.features(np.zeros((0, 9, 9))).shape == (0, 16)


def test_an_image_has_the_same_features_alone_and_in_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(tmp_path, RESNET, {"size": {"shortest_edge": 24}})  # with batch normalisation, frozen
    together = model.features(images(5, 12, 12))
    monkeypatch.setattr("urna.models.loading.INSTALLED_SLOTS", 2)
    np.testing.assert_allclose(model.features(images(5, 12, 12)), together, atol=1e-5)
    np.testing.assert_allclose(model.features(images(5, 12, 12)[3:4]), together[3:4], atol=1e-5)


@pytest.mark.parametrize(
    ("preprocessor", "shape"),
    [
        ({}, (3, 224, 224)),
        ({"size": 32}, (3, 32, 32)),
        ({"size": {"shortest_edge": 40}}, (3, 40, 40)),
        ({"size": {"height": 32, "width": 48}}, (3, 32, 48)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, (3, 32, 32)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": False}, (3, 40, 40)),
    ],
)
def test_a_model_of_any_size_reads_what_its_preprocessor_gave_it(
    tmp_path: Path, preprocessor: dict[str, object], shape: tuple[int, ...]
) -> None:
    assert backbone(tmp_path, RESNET, preprocessor).spec.input_shape == shape


def test_a_model_of_one_size_reads_that_whatever_its_preprocessor_says(tmp_path: Path) -> None:
    assert backbone(tmp_path, VIT, {"size": 224}).spec.input_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("preprocessor", "part"),
    [
        ({"image_std": [0.0, 1.0, 1.0]}, "must give size, mean and std"),
        ({"image_mean": [0.5]}, "must give size, mean and std"),
        ({"image_mean": "half"}, "must give size, mean and std"),
        ({"size": 10**6}, "must give size, mean and std"),
        ({"resample": 77}, "known resample, found 77"),
        ({"resample": [1]}, "known resample"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(tmp_path: Path, preprocessor: dict[str, object], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        backbone(tmp_path, RESNET, preprocessor)


def test_a_model_of_one_colour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a model of three colours, found num_channels 1"):
        backbone(tmp_path, hf.ViTConfig(image_size=16, patch_size=8, num_channels=1, **SIZE), {})
