"""Hostile folders: refused in one line, without opening what is not safetensors or JSON, and nothing is written."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.models import folders
from tests.models.folders import ABOUT, change_config, put_index, put_shards, put_tensors, tensors_of
from urna.models import assembly, candidate_file, hub_folder
from urna.models.installed import About, check_name, install
from urna.protocol.errors import ModelError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny BERT's folder, for the test to spoil."""
    return folders.bert(tmp_path / "source")


def _only_pickles(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _renamed_pickle(source: Path) -> None:
    (source / "model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))


def _renamed_archive(source: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, source / "model.safetensors")


def _no_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def _missing_tensor(source: Path) -> None:
    put_tensors(source, {key: one for key, one in tensors_of(source).items() if key != "encoder.layer.1.output.dense.weight"})


def _wrong_shape(source: Path) -> None:
    put_tensors(source, tensors_of(source) | {"encoder.layer.0.output.dense.bias": torch.zeros(17)})


def _all_foreign(source: Path) -> None:
    put_tensors(source, {f"x{at}": torch.zeros(2) for at in range(3)})


def _nan(source: Path) -> None:
    tensors = tensors_of(source)
    tensors["embeddings.LayerNorm.bias"][3] = float("nan")
    put_tensors(source, tensors)


def _nan_in_what_is_dropped(source: Path) -> None:
    put_tensors(source, tensors_of(source) | {"classifier.bias": torch.tensor([float("inf")])})


def _float64_that_overflows(source: Path) -> None:
    tensors = tensors_of(source)
    tensors["embeddings.LayerNorm.bias"] = torch.full((16,), 1e300, dtype=torch.float64)
    put_tensors(source, tensors)


def _weights_that_overflow(source: Path) -> None:
    tensors = tensors_of(source)
    tensors["encoder.layer.1.output.LayerNorm.weight"] = torch.full((16,), 3e38)
    put_tensors(source, tensors)


def _long_texts_that_overflow(source: Path) -> None:
    tensors = tensors_of(source)
    tensors["embeddings.position_embeddings.weight"][19] = torch.tensor([3e38, -3e38] * 8)
    put_tensors(source, tensors)


def _truncated(source: Path) -> None:
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[:-9])


def _linked_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "elsewhere")
    (source / "model.safetensors").symlink_to(source.parent / "elsewhere")


def _linked_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("/etc/hostname")


def _pipe(source: Path) -> None:
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")


def _no_config(source: Path) -> None:
    (source / "config.json").unlink()


def _no_json(source: Path) -> None:
    (source / "config.json").write_bytes(b"\x80\x04nothing")


def _deep_json(source: Path) -> None:
    (source / "config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)


def _no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def _damaged_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text('{"model": 3}')


def _more_words(source: Path) -> None:
    found = folders.tokenizer()
    found.add_tokens(["zebra"])
    found.save(str(source / "tokenizer.json"))


def _no_unknown_word(source: Path) -> None:
    content = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(content.replace('"unk_token": "[UNK]"', '"unk_token": "[NONE]"'))


def _code_of_the_tokenizer(source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["owner/repository--code.T", null]}}')


def _config(**entries: object) -> Callable[[Path], None]:
    return lambda source: change_config(source, **entries)


CODE = {"AutoModel": "modeling_evil.EvilModel"}
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "only pickles": (_only_pickles, r"only \['pytorch_model.bin'\], which were not opened"),
    "a pickle renamed": (_renamed_pickle, "must be safetensors, found a pickle; it was not opened"),
    "a torch archive renamed": (_renamed_archive, "must be safetensors, found a zip archive"),
    "no weights": (_no_weights, "expected weights as safetensors in .*, found no weights"),
    "a tensor is missing": (_missing_tensor, r"lack \['encoder.layer.1.output.dense.weight'\]"),
    "a tensor of another shape": (_wrong_shape, "must fit their config.json"),
    "another model's tensors": (_all_foreign, "lack .* and [0-9]+ more"),
    "NaN": (_nan, "tensor 'embeddings.LayerNorm.bias' of 'tiny' must be finite"),
    "infinity in a head": (_nan_in_what_is_dropped, "tensor 'classifier.bias' of 'tiny' must be finite"),
    "infinity once float32": (_float64_that_overflows, "embeddings.LayerNorm.bias' of 'tiny' must be finite"),
    "features that overflow": (_weights_that_overflow, "features of 'tiny' must be finite"),
    "features of a text of full length that overflow": (_long_texts_that_overflow, "features of 'tiny' must be finite"),
    "truncated": (_truncated, "must be well-formed safetensors"),
    "linked weights": (_linked_weights, "must be a file, found a link"),
    "a linked tokenizer": (_linked_tokenizer, "must be a file, found a link"),
    "a pipe": (_pipe, "must be a regular file"),
    "no config.json": (_no_config, "found no .*config.json"),
    "a config.json that is none": (_no_json, "must be JSON"),
    "a config.json without end": (_deep_json, "must be JSON|must not be nested"),
    "no tokenizer": (_no_tokenizer, "expected tokenizer.json or a vocabulary"),
    "a damaged tokenizer": (_damaged_tokenizer, "tokenizer.json must be a tokenizer"),
    "more words than the model": (_more_words, "must have tokens below 15, the model's, found 15"),
    "a tokenizer that fails at unknown words": (_no_unknown_word, r"a token for unknown words .* found '\[NONE\]'"),
    "a tokenizer's code": (_code_of_the_tokenizer, "tokenizer_config.json must not name code"),
    "a model's code": (_config(auto_map=CODE), "must not name code of its publisher, found auto_map"),
    "code in a part": (_config(text_config={"auto_map": CODE}), "found text_config.auto_map"),
    "code in a list": (_config(parts=[[{"auto_map": CODE}]]), "found parts.auto_map"),
    "a kernel of a hub": (_config(attn_implementation="owner/kernel"), "must name no attention kernel"),
    "quantisation": (_config(quantization_config={"load_in_4bit": True}), "must describe all weights by itself"),
    "weights to fetch": (_config(backbone_config={"use_pretrained_backbone": True}), "must describe all weights by itself"),
    "an unknown family": (_config(model_type="evil"), "found model_type 'evil': known are albert"),
    "no family": (_config(model_type=...), "found model_type 'None'"),
    "a family that is no text": (_config(model_type=["bert"]), "must be of a known family"),
    "very many layers": (_config(num_hidden_layers=10**9), "whole numbers up to 256 in num_hidden_layers, found 1000000000"),
    "very wide": (_config(hidden_size=10**12), "whole numbers up to 16777216 in hidden_size"),
    "too wide together": (_config(hidden_size=2**16, intermediate_size=2**20), "bytes of weights|must fit their config"),
    "a list without end": (_config(anything=[1] * 300), "at most 256 entries in a list"),
    "no width": (_config(hidden_size=0), "must|lack"),
    "a width that is a text": (_config(hidden_size="16"), "must be a bert configuration"),
    "an unknown activation": (_config(hidden_act="os.system"), "must"),
    "infinity": (_config(layer_norm_eps=float("inf")), "finite numbers, found inf in layer_norm_eps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_line_and_nothing_is_written(
    source: Path, root: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"opened with {args} {kwargs}")

    spoil, part = HOSTILE[case]
    spoil(source)
    for opener in ("torch.load", "pickle.load", "pickle.loads", "subprocess.Popen", "socket.create_connection"):
        monkeypatch.setattr(opener, never)
    with pytest.raises(ModelError, match=part) as caught:
        install("tiny", source, ABOUT, root=root)
    assert "\n" not in str(caught.value)
    assert not root.exists() or not list(root.iterdir())


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({"a": "../model.safetensors"}, r"must name safetensors files beside it, found '../model.safetensors'"),
        ({"a": "/etc/passwd"}, "must name safetensors files beside it"),
        ({"a": "pytorch_model.bin"}, "must name safetensors files beside it"),
        ({"a": "sub/x.safetensors"}, "must name safetensors files beside it"),
        ({"a": ".hidden.safetensors"}, "must name safetensors files beside it"),
        ({"a": "absent.safetensors"}, "found no .*absent.safetensors"),
        ({f"t{at}": f"s{at}.safetensors" for at in range(300)}, "at most 256 files, found 300"),
        ({}, "found neither"),
    ],
)
def test_an_index_of_shards_names_files_beside_it_and_nothing_else(
    source: Path, root: Path, index: dict[str, str], part: str
) -> None:
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    put_index(source, index)
    with pytest.raises(ModelError, match=part):
        install("tiny", source, ABOUT, root=root)


def test_a_shard_that_is_a_link_is_refused(source: Path, root: Path) -> None:
    tensors = tensors_of(source)
    put_shards(source, tensors, dict.fromkeys(tensors, "model-1.safetensors"))
    (source / "model-1.safetensors").rename(source.parent / "elsewhere.safetensors")
    (source / "model-1.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(ModelError, match="must be a file, found a link"):
        install("tiny", source, ABOUT, root=root)


def test_a_shard_holds_what_the_index_says(source: Path, root: Path) -> None:
    tensors = tensors_of(source)
    put_shards(source, tensors, dict.fromkeys(tensors, "model-1.safetensors"))
    put_index(source, dict.fromkeys(list(tensors)[1:], "model-1.safetensors"))
    with pytest.raises(ModelError, match="must hold what the index says, found other tensors"):
        install("tiny", source, ABOUT, root=root)


def test_weights_over_the_limit_are_refused_before_they_are_read(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(source / "model.safetensors", candidate_file.MAX_INSTALLED_BYTES + 1)  # a hole: takes no room
    with pytest.raises(ModelError, match="must be at most 4294967296 bytes, found 4294967297"):
        install("tiny", source, ABOUT, root=root)
    tensors = tensors_of(folders.bert(source.parent / "again"))
    put_shards(source, tensors, {key: f"model-{at % 2}.safetensors" for at, key in enumerate(tensors)})
    size = (source / "model-0.safetensors").stat().st_size
    monkeypatch.setattr(hub_folder, "MAX_INSTALLED_BYTES", size + 100)  # both together are too large
    with pytest.raises(ModelError, match="must be at most 100 bytes"):
        install("tiny", source, ABOUT, root=root)


def test_a_module_over_the_limit_is_refused_before_any_memory_is_taken(
    source: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"must have at most 4294967296 bytes of weights, found [0-9]{11}"):
        assembly.expected_tensors(hf.BertConfig(hidden_size=2**14, intermediate_size=2**17, num_attention_heads=2))
    monkeypatch.setattr(assembly, "MAX_INSTALLED_BYTES", 1000)
    with pytest.raises(ModelError, match="at most 1000 bytes of weights"):
        install("tiny", source, ABOUT, root=root)


@pytest.mark.parametrize("name", ["cnn", "pixels", "../x", "a/b", "", ".hidden", "Tiny", "x" * 64, "tiny\n", "tïny"])
def test_a_name_that_is_taken_or_a_path_is_refused(source: Path, root: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"built-in candidate and cannot be replaced|name has up to 63 of"):
        install(name, source, ABOUT, root=root)
    with pytest.raises(ModelError):
        check_name(name)


@pytest.mark.parametrize("about", [About("", "x"), About("MIT", ""), About("MIT", "x\ny"), About("MIT", "x" * 301)])
def test_facts_that_are_missing_or_no_line_are_refused(source: Path, root: Path, about: About) -> None:
    with pytest.raises(ModelError, match=r"the facts of 'tiny' cannot be a candidate's, found (licence|pretrained_on)"):
        install("tiny", source, about, root=root)


def test_a_place_that_is_taken_is_not_written_over(source: Path, root: Path) -> None:
    (root / "tiny").mkdir(parents=True)
    with pytest.raises(ModelError, match="found another"):
        install("tiny", source, ABOUT, root=root)


def test_a_crash_while_writing_leaves_nothing(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(ModelError, match="found No space left on device"):
        install("tiny", source, ABOUT, root=root)
    assert list(root.iterdir()) == []
