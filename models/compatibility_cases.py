"""Tiny models of every family, with random weights and what they are trained for: what the compatibility matrix measures.

Each family once as features with a linear head, and those with a task of their own once with that task; the loss is taken
outside of the model, example by example, for a model's own loss is a mean.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig

from urna.models.huggingface import (
    IDS,
    MASK,
    MEL,
    PIXELS,
    SERIES,
    WAVE,
    additive_mask,
    build_features,
    synthetic_inputs,
    undo_weight_norm,
)
from urna.models.tunable import LABELS, Batch, Classifier, PerExampleLoss, cross_entropy

Settings = dict[str, Any]  # keywords of a configuration, each of its own type

NUM_CLASSES = 3
WORDS = 40
BOXES = "boxes"
IGNORED = -100  # what torch's cross entropy leaves out
DECODER_LENGTH = 7
SEED = 7
SPREAD = 0.15  # of drawn biases and scales: enough that no layer is dead behind another

_SIZE: Settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VOCABULARY: Settings = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WORDS: Settings = _VOCABULARY | {"max_position_embeddings": 20}
_RELATIVE: Settings = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
_TWO_SIDES: Settings = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    "d_model": 16,
    "decoder_start_token_id": 1,
}
_IMAGE: Settings = {"image_size": 32}
_PATCHES: Settings = _IMAGE | {"patch_size": 8}
_RESNET: Settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_SEGFORMER: Settings = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
_NO_MIDDLE: Settings = {"use_mid_position_embeddings": False}
_OWN_BACKBONE: Settings = {
    "backbone": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2"], **_RESNET},
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
_SOUND: Settings = {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_SERIES: Settings = {
    "num_input_channels": 2,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "prediction_length": 4,
    "loss": "mse",
}
TINY: Mapping[str, Settings] = MappingProxyType(
    {
        "bert": _WORDS | _SIZE,
        "distilbert": _WORDS | {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
        "roberta": _WORDS | _SIZE,
        "xlm-roberta": _WORDS | _SIZE,
        "albert": _WORDS | _SIZE | {"embedding_size": 8},
        "electra": _WORDS | _SIZE | {"embedding_size": 8},
        "deberta-v2": _WORDS | _SIZE | _RELATIVE,
        "xlnet": _VOCABULARY | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        "gpt2": _VOCABULARY | {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "llama": _WORDS | _SIZE | {"num_key_value_heads": 1},
        "t5": {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        "bart": _WORDS | _TWO_SIDES,
        "marian": _WORDS | _TWO_SIDES,
        "vit": _PATCHES | _SIZE,
        "deit": _PATCHES | _SIZE,
        "dinov2": _PATCHES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2},
        "swin": _IMAGE | {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        "convnext": _IMAGE | {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "resnet": _IMAGE | _RESNET,
        "efficientnet": _IMAGE | {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
        "mobilenet_v2": _IMAGE | {"depth_multiplier": 0.25},
        "segformer": _IMAGE | _SEGFORMER,
        "yolos": _SIZE | {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4, "num_labels": 2} | _NO_MIDDLE,
        "detr": _IMAGE | _TWO_SIDES | {"num_queries": 4, "num_labels": 2} | _OWN_BACKBONE,
        "clip": {"text_config": _WORDS | _SIZE, "vision_config": _PATCHES | _SIZE, "projection_dim": 16},
        "clip_vision_model": _PATCHES | _SIZE,
        "wav2vec2": {"vocab_size": WORDS} | _SIZE | _SOUND,
        "hubert": {"vocab_size": WORDS} | _SIZE | _SOUND,
        "whisper": _VOCABULARY | _TWO_SIDES | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 20},
        "patchtst": _SERIES | {"d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32},
    }
)


def tiny_configs() -> Mapping[str, PreTrainedConfig]:
    """A configuration of each family: about two layers of width 16, images of 32 pixels, twelve words."""
    return {model_type: hf.CONFIG_MAPPING[model_type](**settings) for model_type, settings in TINY.items()}


@dataclass(frozen=True)
class Case:
    """One row group of the matrix.

    Args:
        name: Family and, in brackets, the task.
        build: Makes the module, whole.
        loss: Of each example.
        batch: Makes examples, of a number and a seed.
        head: What the names of the head's parameters begin with; () where the head is tied to the embeddings.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: PerExampleLoss
    batch: Callable[[int, int], Batch]
    head: tuple[str, ...]


def cases() -> Mapping[str, Case]:
    """Every case, by name, sorted."""
    configs = tiny_configs()
    found = [*map(_classifier, configs.values()), *_tasks(configs)]
    return {case.name: case for case in sorted(found, key=lambda case: case.name)}


def enliven(module: nn.Module, run: Callable[[], object]) -> None:
    """Draw every weight so that every layer matters: no zero heads, no layer scales of 1e-6, statistics of what runs.

    Args:
        module: In eval mode, and so it stays.
        run: Computes it on examples; the statistics of its batch normalisations become theirs.
    """
    generator = torch.Generator().manual_seed(SEED)  # weights of a self-test; nothing of a record is near
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for name, one in module.named_parameters():
            draw = torch.randn(one.shape, generator=generator)
            if one.ndim > 1:
                one.copy_(draw * one[0].numel() ** -0.5)
            else:
                one.copy_(SPREAD * draw + (0.0 if "bias" in name else 1.0))
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        run()
    for norm in norms:
        norm.eval()


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)  # synthetic targets of a self-test; nothing of a record is near


def _classifier(config: PreTrainedConfig) -> Case:
    def build() -> nn.Module:
        backbone = build_features(config)
        return Classifier(backbone, torch.zeros(backbone.feature_dim), torch.ones(()), NUM_CLASSES)

    def batch(num_examples: int, seed: int) -> Batch:
        labels = torch.randint(NUM_CLASSES, (num_examples,), generator=_draws(seed))
        return {**synthetic_inputs(config, num_examples, seed), LABELS: labels}

    return Case(config.model_type, build, cross_entropy, batch, ("head.",))


# --- tasks of their own --------------------------------------------------------------------------------------------------


def _tasks(configs: Mapping[str, PreTrainedConfig]) -> Iterator[Case]:
    def words(num_examples: int, seed: int) -> Batch:
        inputs = synthetic_inputs(configs["bert"], num_examples, seed)
        return {**inputs, LABELS: torch.where(inputs[MASK] > 0, inputs[IDS], IGNORED)}

    def masked_words(num_examples: int, seed: int) -> Batch:
        batch = words(num_examples, seed)
        hidden = torch.zeros_like(batch[IDS], dtype=torch.bool)
        hidden[:, ::3] = True
        return {**batch, IDS: torch.where(hidden, 3, batch[IDS]), LABELS: torch.where(hidden, batch[LABELS], IGNORED)}

    def answers(family: str) -> Callable[[int, int], Batch]:
        def batch(num_examples: int, seed: int) -> Batch:
            target = torch.randint(3, WORDS, (num_examples, DECODER_LENGTH), generator=_draws(seed))
            target[1::2, -2:] = IGNORED
            return {**synthetic_inputs(configs[family], num_examples, seed), LABELS: target}

        return batch

    yield _task("bert (masked words, tied)", hf.BertForMaskedLM, configs["bert"], _masked_words, masked_words, "cls.")
    yield _task("gpt2 (next word, tied)", hf.GPT2LMHeadModel, configs["gpt2"], _next_word, words)
    yield _task("llama (next word)", hf.LlamaForCausalLM, configs["llama"], _next_word, words, "lm_head.")
    for family, model_class in (
        ("t5", hf.T5ForConditionalGeneration),
        ("bart", hf.BartForConditionalGeneration),
        ("marian", hf.MarianMTModel),
    ):
        yield _task(f"{family} (text to text, tied)", model_class, configs[family], _text_to_text, answers(family))
    whisper = hf.WhisperForConditionalGeneration
    yield _task("whisper (speech to text, tied)", whisper, configs["whisper"], _speech_to_text, answers("whisper"))
    yield _task("wav2vec2 (speech to text)", hf.Wav2Vec2ForCTC, configs["wav2vec2"], _ctc, answers("wav2vec2"), "lm_head.")
    yield from _image_tasks(configs)

    def futures(num_examples: int, seed: int) -> Batch:
        future = torch.randn((num_examples, 4, 2), generator=_draws(seed))
        return {**synthetic_inputs(configs["patchtst"], num_examples, seed), LABELS: future}

    yield _task("patchtst (forecast)", hf.PatchTSTForPrediction, configs["patchtst"], _forecast, futures, "head.")


def _image_tasks(configs: Mapping[str, PreTrainedConfig]) -> Iterator[Case]:
    def pixels(num_examples: int, seed: int) -> Batch:
        labels = torch.randint(2, (num_examples, 8, 8), generator=_draws(seed))
        return {**synthetic_inputs(configs["segformer"], num_examples, seed), LABELS: labels}

    def objects(family: str) -> Callable[[int, int], Batch]:
        def batch(num_examples: int, seed: int) -> Batch:
            generator = _draws(seed)
            labels = torch.randint(3, (num_examples, 4), generator=generator)  # 2: no object
            boxes = torch.rand((num_examples, 4, 4), generator=generator)
            return {**synthetic_inputs(configs[family], num_examples, seed), LABELS: labels, BOXES: boxes}

        return batch

    segmentation = hf.SegformerForSemanticSegmentation
    yield _task("segformer (segmentation)", segmentation, configs["segformer"], _segmentation, pixels, "decode_head.")
    for family, model_class in (("yolos", hf.YolosForObjectDetection), ("detr", hf.DetrForObjectDetection)):
        heads = ("class_labels_classifier.", "bbox_predictor.")
        yield _task(f"{family} (detection)", model_class, configs[family], _detection, objects(family), *heads)


def _task(
    name: str,
    model_class: Callable[[Any], nn.Module],
    config: PreTrainedConfig,
    loss: PerExampleLoss,
    batch: Callable[[int, int], Batch],
    *head: str,
) -> Case:
    def build() -> nn.Module:
        module = model_class(config).eval()
        undo_weight_norm(module)
        return module

    return Case(name, build, loss, batch, head)


def _mean_over_words(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(b, t, vocabulary) and (b, t) -> (b,)."""
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _masked_words(module: nn.Module, batch: Batch) -> torch.Tensor:
    logits = module(input_ids=batch[IDS], attention_mask=additive_mask(batch[MASK])).logits
    return _mean_over_words(logits, batch[LABELS])


def _next_word(module: nn.Module, batch: Batch) -> torch.Tensor:
    mask = additive_mask(batch[MASK], causal=True)
    logits = module(input_ids=batch[IDS], attention_mask=mask, use_cache=False).logits
    return _mean_over_words(logits[:, :-1], batch[LABELS][:, 1:])


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """What the decoder is given, from the start token (1) on."""
    shown = torch.where(labels == IGNORED, 0, labels)
    return functional.pad(shown[:, :-1], (1, 0), value=1)


def _text_to_text(module: nn.Module, batch: Batch) -> torch.Tensor:
    given = {IDS: batch[IDS], MASK: additive_mask(batch[MASK]), "decoder_input_ids": _shifted(batch[LABELS])}
    return _mean_over_words(module(**given, use_cache=False).logits, batch[LABELS])


def _speech_to_text(module: nn.Module, batch: Batch) -> torch.Tensor:
    logits = module(input_features=batch[MEL], decoder_input_ids=_shifted(batch[LABELS]), use_cache=False).logits
    return _mean_over_words(logits, batch[LABELS])


def _ctc(module: nn.Module, batch: Batch) -> torch.Tensor:
    scores = functional.log_softmax(module(input_values=batch[WAVE]).logits, dim=2).transpose(0, 1)  # (frames, b, vocabulary)
    frames = torch.full((scores.shape[1],), len(scores))
    lengths = (batch[LABELS] != IGNORED).sum(1)
    return functional.ctc_loss(scores, batch[LABELS].clamp(min=0), frames, lengths, reduction="none")


def _segmentation(module: nn.Module, batch: Batch) -> torch.Tensor:
    logits = module(pixel_values=batch[PIXELS]).logits  # (b, 2, 8, 8)
    return functional.cross_entropy(logits, batch[LABELS], reduction="none").mean((1, 2))


def _detection(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Each query has its target: a matching is found per example and without gradients, so it plays no part here."""
    output = module(pixel_values=batch[PIXELS])
    labels = functional.cross_entropy(output.logits.transpose(1, 2), batch[LABELS], reduction="none").mean(1)
    distance: torch.Tensor = (output.pred_boxes - batch[BOXES]).abs().mean((1, 2))
    return labels + distance


def _forecast(module: nn.Module, batch: Batch) -> torch.Tensor:
    squared: torch.Tensor = (module(past_values=batch[SERIES]).prediction_outputs - batch[LABELS]) ** 2
    return squared.mean((1, 2))
