"""Texts become tokens, and their features do not depend on what they are padded with or to."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import PreTrainedConfig

from tests.models import folders
from tests.models.folders import ABOUT, BERT, SIZE, WORDS
from urna.models.candidate_file import TextInput
from urna.models.compatibility_cases import tiny_configs
from urna.models.huggingface import FAMILIES
from urna.models.installed import install
from urna.models.loading import Backbone, load_backbone
from urna.models.text import MASK, TOKENS, TextAdapter, read_tokenizer
from urna.protocol.errors import ModelError

TEXT_FAMILIES = [name for name, family in FAMILIES.items() if family.modality == "text"]
TEXTS = ["", "it", "the dog runs", "a cat sleeps and she runs fast", "unknown words", "the " * 50]


def adapter(max_tokens: int = 6, pad_id: int = 0, special: bool = True) -> TextAdapter:
    settings = TextInput(max_tokens=max_tokens, pad_id=pad_id)
    found = read_tokenizer(folders.tokenizer(special).to_str().encode(), settings, len(WORDS))
    return TextAdapter(settings, found, len(WORDS))


def backbone(folder: Path, config: PreTrainedConfig = BERT, special: bool = True, max_tokens: int | None = None) -> Backbone:
    """A tiny model of texts, installed and loaded."""
    source = folders.save(folders.model_of(config), folder / "source", words=True, special=special)
    return load_backbone(
        "tiny", install("tiny", source, ABOUT, max_tokens=max_tokens, root=folder / "cache").sha256, folder / "cache"
    )


def test_texts_are_truncated_and_padded_to_max_tokens() -> None:
    batch = adapter().batch(["it", "the dog runs", "the " * 50])
    assert batch[TOKENS].tolist() == [[1, 14, 2, 0, 0, 0], [1, 4, 5, 7, 2, 0], [1, 4, 4, 4, 4, 2]]
    assert batch[MASK].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1] * 6]


def test_a_texts_padding_does_not_depend_on_its_company() -> None:
    alone, together = adapter(40).batch(["it"]), adapter(40).batch(["the " * 50, "it"])
    assert alone[TOKENS].shape == (1, 40)
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)


def test_a_length_that_is_asked_for_is_padded_to_or_cut_to() -> None:
    batch = adapter().batch(["it", "the dog runs fast"], length=4)
    assert batch[TOKENS].tolist() == [[1, 14, 2, 0], [1, 4, 5, 7]]
    assert batch[MASK].tolist() == [[1, 1, 1, 0], [1] * 4]
    for length in (0, -1, 7):
        with pytest.raises(ModelError, match=f"length must be 1 to 6, found {length}"):
            adapter().batch(["it"], length=length)


@pytest.mark.parametrize(
    ("max_tokens", "classes"),
    [(6, [6] * 7), (16, [16] * 7), (20, [16, 16, 16, 16, 20, 20, 20]), (128, [16, 16, 16, 16, 32, 64, 128])],
)
def test_the_class_of_a_text_is_the_smallest_power_of_two_that_holds_it(max_tokens: int, classes: list[int]) -> None:
    texts = ["", "it", "the dog runs", "the " * 14, "the " * 15, "the " * 40, "the " * 500]
    found = adapter(max_tokens).length_classes(texts)
    assert found.dtype == np.int64
    assert found.tolist() == classes
    assert [adapter(max_tokens).length_classes([text]).item() for text in texts] == classes
    assert adapter(max_tokens).length_classes([]).shape == (0,)


def test_an_empty_text_is_one_token_and_no_texts_are_an_empty_batch() -> None:
    batch = adapter(special=False).batch([""])
    assert batch[TOKENS].tolist() == [[0] * 6]
    assert batch[MASK].tolist() == [[1, 0, 0, 0, 0, 0]]
    assert adapter().batch([])[TOKENS].shape == (0, 6)


def test_the_publishers_own_truncation_and_padding_are_not_used() -> None:
    found = folders.tokenizer()
    found.enable_truncation(3)
    found.enable_padding(length=12)
    settings = TextInput(max_tokens=8, pad_id=0)
    read = read_tokenizer(found.to_str().encode(), settings, len(WORDS))
    batch = TextAdapter(settings, read, len(WORDS)).batch(["the dog runs fast"])
    assert batch[TOKENS].tolist() == [[1, 4, 5, 7, 9, 2, 0, 0]]


@pytest.mark.parametrize("texts", ["one text", [1, 2], [b"x"], [None], np.array(["a", "b"]), np.zeros((2, 8, 8))])
def test_what_is_no_sequence_of_texts_is_refused(texts: list[str]) -> None:
    with pytest.raises(ModelError, match="expected a sequence of texts"):
        adapter().batch(texts)


def test_a_lone_surrogate_is_an_unknown_character() -> None:
    assert adapter().batch(["it \ud800"])[TOKENS].tolist() == [[1, 14, 3, 2, 0, 0]]


@pytest.mark.parametrize(
    ("content", "max_tokens", "pad_id", "part"),
    [
        (b"\x80\x04", 6, 0, "must be a tokenizer"),
        (b"[]", 6, 0, "must be a tokenizer"),
        (None, 2, 0, "must leave room for a text, found 2"),
        (None, 6, 15, "tokens below 15, the model's, found 15"),
    ],
)
def test_what_is_no_tokenizer_of_this_model_is_refused(content: bytes | None, max_tokens: int, pad_id: int, part: str) -> None:
    content = folders.tokenizer().to_str().encode() if content is None else content
    with pytest.raises(ModelError, match=part):
        read_tokenizer(content, TextInput(max_tokens=max_tokens, pad_id=pad_id), len(WORDS))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_text_has_the_same_features_alone_and_in_company(
    tmp_path: Path, family: str, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone(tmp_path, tiny_configs()[family], special)
    together = model.features(TEXTS)
    assert np.isfinite(together).all()
    alone = np.concatenate([model.features([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    monkeypatch.setattr("urna.models.loading.INSTALLED_SLOTS", 2)
    np.testing.assert_allclose(model.features(TEXTS), together, atol=1e-5)
    assert len({row.tobytes() for row in together.round(4)}) > 3  # and other texts have others


def test_no_texts_give_no_features_and_images_are_refused(tmp_path: Path) -> None:
    model = backbone(tmp_path)
    assert model.features([]).shape == (0, 16)
    for images in (np.zeros((0, 8, 8)), np.zeros((3, 8, 8))):
        with pytest.raises(ModelError, match="expected a sequence of texts, found ndarray"):
            model.features(images)


@pytest.mark.parametrize(("asked", "found"), [(None, 20), (20, 20), (7, 7)])
def test_max_tokens_is_the_models_limit_unless_less_is_asked(tmp_path: Path, asked: int | None, found: int) -> None:
    assert backbone(tmp_path, max_tokens=asked).batch(["the " * 200])[TOKENS].shape == (1, found)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    for asked in (0, 21):
        with pytest.raises(ModelError, match=f"max_tokens must be 1 to 20, the model's limit, found {asked}"):
            backbone(tmp_path / str(asked), max_tokens=asked)


def test_positions_before_the_first_token_are_none(tmp_path: Path) -> None:
    config = hf.RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=20, pad_token_id=1, **SIZE)
    assert backbone(tmp_path, config).batch(["the " * 200])[TOKENS].shape == (1, 18)


def test_a_publishers_limit_counts_and_long_texts_are_128_tokens(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=300, pad_token_id=0, **SIZE)
    assert backbone(tmp_path / "a", config).batch(["the " * 500])[TOKENS].shape == (1, 128)
    source = folders.save(folders.model_of(config), tmp_path / "b", words=True)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 11}')
    found = install("other", source, ABOUT, root=tmp_path / "cache")
    assert load_backbone("other", found.sha256, tmp_path / "cache").batch(["the " * 500])[TOKENS].shape == (1, 11)


def test_a_tokenizer_is_made_of_a_vocabulary_alone(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=len(WORDS) + 1, max_position_embeddings=20, pad_token_id=0, **SIZE)
    source = folders.save(folders.model_of(config), tmp_path / "source", words=False)
    (source / "vocab.txt").write_text("\n".join([*WORDS, "[MASK]"]) + "\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    found = install("tiny", source, ABOUT, root=tmp_path / "cache")
    batch = load_backbone("tiny", found.sha256, tmp_path / "cache").batch(["The DOG runs"])
    assert batch[TOKENS].tolist() == [[1, 4, 5, 7, 2, *[0] * 15]]
