"""A folder of elsewhere becomes a candidate, or a one-line reason why not; nothing of a refused one is written."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import PreTrainedConfig

from tests.models import folders
from tests.models.folders import ABOUT, BERT, put_shards, put_tensors, tensors_of
from urna.models.catalogue import installed, known, spec
from urna.models.compatibility_cases import tiny_configs
from urna.models.huggingface import FAMILIES, HuggingFaceFeatures, build_features, synthetic_inputs
from urna.models.installed import Installed, install
from urna.models.loading import artefact_sha256, load_backbone, read_artefact, read_manifest
from urna.protocol.errors import ModelError

TEXTS = ["the dog runs", "a cat sleeps and she runs fast", "", "it"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny BERT's folder, for the test to spoil."""
    return folders.bert(tmp_path / "source")


@pytest.fixture
def there(source: Path, root: Path) -> Installed:
    """The tiny BERT, installed."""
    return install("tiny", source, ABOUT, root=root)


def test_an_installed_text_model_gives_the_mean_of_its_last_hidden_states(there: Installed, source: Path, root: Path) -> None:
    features = load_backbone("tiny", there.sha256, root).features(["the dog runs"])
    published = hf.BertModel.from_pretrained(source).train(False)
    with torch.no_grad():
        states = published(torch.tensor([[1, 4, 5, 7, 2]])).last_hidden_state
    np.testing.assert_allclose(features, states.mean(1).numpy(), atol=1e-5)


def test_its_facts_are_known_and_its_hash_is_that_of_candidate_json(there: Installed, root: Path) -> None:
    facts = spec("tiny", root)
    assert (facts.modality, facts.family, facts.feature_dim, facts.input_shape) == ("text", "bert", 16, ())
    assert (facts.licence, facts.pretrained_on, facts.summary) == (ABOUT.licence, ABOUT.pretrained_on, ABOUT.summary)
    assert facts.num_parameters == sum(one.numel() for one in build_features(BERT).parameters())
    found = hashlib.sha256((there.folder / "candidate.json").read_bytes()).hexdigest()
    assert there.sha256 == found == artefact_sha256("tiny", root) == read_manifest("tiny", root)["sha256"]
    assert installed(root) == ("tiny",)
    assert known(root)[-1] == "tiny"


def test_the_same_folder_has_the_same_hash_wherever_it_is_installed(there: Installed, source: Path, tmp_path: Path) -> None:
    assert install("tiny", source, ABOUT, root=tmp_path / "elsewhere").sha256 == there.sha256
    assert install("tiny", source, ABOUT, root=there.folder.parent).sha256 == there.sha256  # again: nothing changes


def test_tensors_that_no_feature_needs_are_dropped_and_named(tmp_path: Path, root: Path) -> None:
    torch.manual_seed(0)
    source = folders.save(hf.BertForSequenceClassification(BERT), tmp_path / "classifier", words=True)
    found = install("tiny", source, ABOUT, root=root)
    assert {"classifier.bias", "classifier.weight"} <= set(found.dropped)
    assert not any("classifier" in key or "pooler" in key for key in tensors_of(found.folder))


def test_half_precision_weights_become_float32(source: Path, root: Path) -> None:
    halves = {key: tensor.half() for key, tensor in tensors_of(source).items()}
    put_tensors(source, halves)
    stored = tensors_of(install("tiny", source, ABOUT, root=root).folder)
    key = "encoder.layer.1.output.dense.weight"
    assert torch.equal(stored[f"model.{key}"], halves[key].float())


def test_shards_are_one_model(source: Path, there: Installed, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    put_shards(source, tensors, {key: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, key in enumerate(sorted(tensors))})
    assert install("tiny", source, ABOUT, root=tmp_path / "other").sha256 == there.sha256


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_installed_and_loaded_with_the_features_it_had(tmp_path: Path, root: Path, family: str) -> None:
    config: PreTrainedConfig = tiny_configs()[family]
    source = folders.save(folders.model_of(config), tmp_path / "source", words=FAMILIES[family].modality == "text")
    found = install("any", source, ABOUT, root=root)
    backbone = load_backbone("any", found.sha256, root)
    kept = getattr(hf, FAMILIES[family].model_class).from_pretrained(source, **FAMILIES[family].options).eval()
    reference = HuggingFaceFeatures(kept)
    batch = synthetic_inputs(config, 3, seed=1)
    with torch.no_grad():
        np.testing.assert_allclose(backbone.module(**batch), reference(**batch), atol=1e-5)
    assert backbone.spec.num_parameters == sum(one.numel() for one in reference.parameters())
    assert not any(one.requires_grad for one in backbone.module.parameters())
    assert backbone.synthetic(2, seed=3).keys() == batch.keys()


def test_half_of_a_weight_that_is_stored_in_two_parts_is_missed(tmp_path: Path, root: Path) -> None:
    source = folders.save(folders.model_of(tiny_configs()["wav2vec2"]), tmp_path / "source", words=False)
    half = next(key for key in tensors_of(source) if key.endswith(("original0", "weight_g")))
    put_tensors(source, {key: one for key, one in tensors_of(source).items() if key != half})
    with pytest.raises(ModelError, match=r"weights of 'any' lack \['encoder.pos_conv_embed.conv.param"):
        install("any", source, ABOUT, root=root)


def test_a_model_of_sound_can_be_checked_but_reads_no_records(tmp_path: Path, root: Path) -> None:
    source = folders.save(folders.model_of(tiny_configs()["whisper"]), tmp_path / "source", words=False)
    backbone = load_backbone("any", install("any", source, ABOUT, root=root).sha256, root)
    with pytest.raises(ModelError, match="no records of audio are read yet"):
        backbone.features(np.zeros((2, 100)))


# --- centring


def test_public_texts_centre_and_scale_features_and_the_constants_are_pinned(source: Path, root: Path) -> None:
    found = install("tiny", source, ABOUT, centre_on=lambda _modality: TEXTS, root=root)
    features = load_backbone("tiny", found.sha256, root).features(TEXTS)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    assert np.linalg.norm(features, axis=1).mean() == pytest.approx(1, abs=1e-4)
    assert found.sha256 != install("other", source, ABOUT, root=root).sha256
    assert {"feature_mean", "feature_scale"} <= tensors_of(found.folder).keys()


@pytest.mark.parametrize(("texts", "part"), [(["it"], "at least 2 public records"), (["it", "it"], "different features")])
def test_public_texts_that_say_nothing_are_refused(source: Path, root: Path, texts: list[str], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        install("tiny", source, ABOUT, centre_on=lambda _modality: texts, root=root)
    assert installed(root) == ()


def test_another_model_of_the_same_name_does_not_replace_the_first(there: Installed, tmp_path: Path, root: Path) -> None:
    with pytest.raises(ModelError, match="expected no candidate 'tiny' yet, found another"):
        install("tiny", folders.bert(tmp_path / "second", seed=1), ABOUT, root=root)
    assert artefact_sha256("tiny", root) == there.sha256


# --- a spoilt artefact


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_other_bytes_in_any_file_are_refused(there: Installed, root: Path, file: str) -> None:
    content = bytearray((there.folder / file).read_bytes())
    content[-2] ^= 1
    (there.folder / file).write_bytes(content)
    for expected in (there.sha256, None):
        with pytest.raises(ModelError, match=f"{file} of 'tiny' must have sha256 [0-9a-f]{{64}}, found"):
            load_backbone("tiny", expected, root)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_grown_file_is_refused(there: Installed, root: Path, file: str) -> None:
    with (there.folder / file).open("ab") as more:
        more.write(b" ")
    with pytest.raises(ModelError, match="must be at most"):
        load_backbone("tiny", None, root)
    (there.folder / file).unlink()
    with pytest.raises(ModelError, match="'tiny' is not whole, found no"):
        load_backbone("tiny", None, root)


def edit(there: Installed, **entries: object) -> None:
    """Change facts as someone would who can write to the cache, in the one spelling."""
    path = there.folder / "candidate.json"
    facts = json.loads(path.read_text()) | entries
    path.write_bytes(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def test_edited_facts_are_another_candidate(there: Installed, root: Path) -> None:
    edit(there, licence="CC0-1.0")
    assert spec("tiny", root).licence == "CC0-1.0"
    assert artefact_sha256("tiny", root) != there.sha256
    with pytest.raises(ModelError, match=f"candidate 'tiny' must have sha256 {there.sha256}, found [0-9a-f]{{64}} of"):
        load_backbone("tiny", there.sha256, root)
    with pytest.raises(ModelError, match="must have sha256"):
        read_artefact("tiny", there.sha256, root)


@pytest.mark.parametrize(
    ("entries", "part"),
    [
        ({"name": "cnn"}, "must be of this name, found 'cnn'"),
        ({"feature_dim": 17}, "must be of type, features and weights"),
        ({"num_parameters": 1}, "must be of type, features and weights"),
        ({"model_type": "roberta"}, "must be of type, features and weights"),
        ({"feature_dim": 10**9}, "malformed"),
        ({"feature_dim": "16"}, "malformed"),
        ({"files": {}}, "must pin"),
        ({"files": {"../x": {"sha256": "0" * 64, "size": 1}}}, "malformed"),
        ({"text": None}, "must pin"),
        ({"modality": "image"}, "must pin|must say how pictures"),
        ({"unknown": 1}, "malformed"),
        ({"format": "urna-candidate-9"}, "malformed"),
        ({"licence": "a\nb"}, "malformed"),
        ({"text": {"max_tokens": 2, "pad_id": 0}}, "must leave room for a text"),
        ({"text": {"max_tokens": 9, "pad_id": 15}}, "must have tokens below 15"),
    ],
)
def test_senseless_facts_are_refused_in_one_line(there: Installed, root: Path, entries: dict[str, object], part: str) -> None:
    edit(there, **entries)
    with pytest.raises(ModelError, match=part) as caught:
        load_backbone("tiny", None, root)
    assert "\n" not in str(caught.value)


def test_facts_in_another_spelling_are_refused(there: Installed, root: Path) -> None:
    path = there.folder / "candidate.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    with pytest.raises(ModelError, match="must be in its one spelling"):
        spec("tiny", root)


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04", b"{}", b"[" * 60_000, b"x" * 70_000])
def test_a_damaged_candidate_json_is_refused(there: Installed, root: Path, content: bytes) -> None:
    (there.folder / "candidate.json").write_bytes(content)
    for ask in (spec, artefact_sha256):
        with pytest.raises(ModelError, match=r"'tiny' is malformed|must be at most 65536 bytes"):
            ask("tiny", root)


def repin(there: Installed, file: str, content: bytes) -> None:
    """Replace a file, with its pin: a whole artefact of an attacker's."""
    (there.folder / file).write_bytes(content)
    facts = json.loads((there.folder / "candidate.json").read_text())
    facts["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(there, files=facts["files"])


def _without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.encoder.layer.0.output.dense.bias"]


def _with_one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.extra"] = torch.zeros(2)


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embeddings.LayerNorm.bias"][0] = float("nan")


def _in_halves(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embeddings.LayerNorm.bias"] = tensors["model.embeddings.LayerNorm.bias"].half()


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_without_one, r"lack \['model.encoder.layer.0.output.dense.bias'\]"),
        (_with_one_more, r"unexpected \['model.extra'\]"),
        (_with_nan, "must be finite"),
        (_in_halves, "must be torch.float32"),
    ],
)
def test_an_artefact_of_an_attacker_is_no_better_than_its_tensors(
    there: Installed, root: Path, spoil: Callable[[dict[str, torch.Tensor]], None], part: str
) -> None:
    tensors = tensors_of(there.folder)
    spoil(tensors)
    import safetensors.torch

    repin(there, "model.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(ModelError, match=part):
        load_backbone("tiny", None, root)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model.safetensors", pickle.dumps([1, 2]), "must be safetensors, found a pickle"),
        ("config.json", b'{"model_type":"bert","auto_map":{"AutoModel":"x.Y"}}', "must not name code"),
        ("config.json", b'{"model_type":"bert","num_hidden_layers":99999}', "whole numbers up to 256"),
        ("tokenizer.json", b"{}", "tokenizer.json must be a tokenizer"),
    ],
)
def test_an_artefact_of_an_attacker_is_looked_at_like_a_folder(
    there: Installed, root: Path, file: str, content: bytes, part: str
) -> None:
    repin(there, file, content)
    with pytest.raises(ModelError, match=part):
        load_backbone("tiny", None, root)


def test_nothing_but_the_pinned_files_is_opened(there: Installed, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (there.folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (there.folder / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    opened: list[str] = []
    whole = Path.open

    def watched(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(self.name)
        return whole(self, *args, **kwargs)  # type: ignore[call-overload]  # passes on whatever it was given

    monkeypatch.setattr(Path, "open", watched)
    load_backbone("tiny", there.sha256, root)
    assert sorted(set(opened)) == ["candidate.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert len(opened) <= 6  # spec and loader both read candidate.json; every other file is read once


def test_a_folder_moved_elsewhere_loads_by_its_hash(there: Installed, tmp_path: Path) -> None:
    from urna.models.loading import load_backbone_folder

    shutil.move(there.folder, tmp_path / "backbone")
    assert load_backbone_folder("tiny", tmp_path / "backbone", there.sha256).spec == there.spec
