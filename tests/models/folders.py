"""Folders as Hugging Face writes them: tiny models with random weights, and a tokenizer of a few words."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedConfig, PreTrainedModel

from urna.models.compatibility_cases import Settings
from urna.models.installed import About

ABOUT = About("Apache-2.0", "nothing: random weights of a test", "A tiny model of a test.")
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "dog", "cat", "runs", "sleeps", "fast", "a", "and", "he", "she", "it")
SIZE: Settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, pad_token_id=0, **SIZE)
VIT = hf.ViTConfig(image_size=16, patch_size=8, **SIZE)
RESNET = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def tokenizer(special: bool = True) -> Tokenizer:
    """Whole words; with ``special``, a [CLS] before and a [SEP] behind."""
    found = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        found.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return found


def model_of(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of this configuration, in eval mode."""
    torch.manual_seed(seed)
    model = hf.AutoModel.from_config(config)  # type: ignore[no-untyped-call]  # the library leaves it untyped
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def save(model: PreTrainedModel, folder: Path, *, words: bool, special: bool = True) -> Path:
    """Write a model, and for one that reads words a tokenizer, as a publisher would."""
    model.save_pretrained(folder)
    if words:
        tokenizer(special).save(str(folder / "tokenizer.json"))
    return folder


def bert(folder: Path, seed: int = 0) -> Path:
    """A tiny BERT with its tokenizer."""
    return save(model_of(BERT, seed), folder, words=True)


def vit(folder: Path) -> Path:
    """A tiny ViT with its preprocessor's settings."""
    save(model_of(VIT), folder, words=False)
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def change_config(folder: Path, **entries: object) -> None:
    """Set entries of config.json; ... takes one away."""
    found = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The published tensors."""
    return safetensors.torch.load((folder / "model.safetensors").read_bytes())


def put_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the published tensors."""
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(dict(tensors)))


def put_shards(folder: Path, tensors: Mapping[str, torch.Tensor], index: Mapping[str, str]) -> None:
    """Replace the published weights by shards, and write the index as it is given."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file in set(index.values()):
        shard = {key: tensors[key] for key, where in index.items() if where == file}
        (folder / file).write_bytes(safetensors.torch.save(shard))
    put_index(folder, index)


def put_index(folder: Path, index: Mapping[str, str]) -> None:
    """Write an index of shards."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(index)}))
