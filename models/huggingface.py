"""What Urna knows of the model families of Hugging Face transformers: which class gives features, how they are pooled.

    modality    features                                                              what is dropped of the published model
    text        mean of the last hidden states over real tokens (Reimers, Gurevych 2019)   pooler; a decoder
    image       class token, mean of tokens or of positions, as the family was pretrained  pooler; mask token
    audio       mean of the encoder's frames, over real ones where there is a mask         decoder; mask embedding
    image+text  the two towers' projections, side by side                                  logit scale
    series      mean over channels and patches

Covered:
    modules come from a configuration alone: no download, no code of a publisher;
    an example's features do not depend on its company, at one padded length; text features not on the padding either;
    parameters that no feature depends on are dropped, so that `full` has nothing dead to train.
Not covered:
    audio models whose first layer normalises over time (wav2vec2-base): their features depend on how long the padding is.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel

from urna.models.tunable import Batch
from urna.protocol.errors import ModelError

Modality = Literal["text", "image", "audio", "image+text", "series"]
Pooling = Literal["tokens", "first", "two", "mean", "pooler", "positions", "frames", "towers", "patches"]
Dim = Callable[[Any], int]  # a configuration's attributes are its family's: the library has no type for them

TEXT_LENGTH = 12  # tokens of a synthetic text
AUDIO_FRAMES = 16  # of a synthetic sound, after the convolutions
HIDDEN = -1e9  # added to the score of a token that is not seen: finite in bfloat16 too
IMAGE_SIDE = 64  # pixels of a synthetic image, where a family reads any size
IDS, MASK, PIXELS, WAVE, MEL, SERIES = (
    *("input_ids", "attention_mask", "pixel_values", "input_values", "input_features", "past_values"),
)


@dataclass(frozen=True)
class Family:
    """What is known of one model_type.

    Args:
        modality: What it reads.
        model_class: Name in `transformers` of the class that gives hidden states.
        pooling: How these become one vector an example.
        dim: The features' length, of a configuration.
        lora: Last parts of the names of the layers that LoRA adapts.
        inputs: Names of the tensors that `HuggingFaceFeatures.forward` takes.
        options: Of the class's constructor: leave out what features do not need.
        flags: Of its forward.
        part: The submodule that is kept; "" keeps all.
        dropped: Last parts of the names of parameters that no feature depends on.
        causal: A token sees only those before it.
        any_size: Images of any size are read.
    """

    modality: Modality
    model_class: str
    pooling: Pooling
    dim: Dim
    lora: tuple[str, ...]
    inputs: tuple[str, ...]
    options: Mapping[str, bool] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    part: str = ""
    dropped: tuple[str, ...] = ()
    causal: bool = False
    any_size: bool = False


def _hidden(config: Any) -> int:
    return int(config.hidden_size)  # `attribute_map` gives d_model, n_embd and dim this name too


def _last_stage(config: Any) -> int:
    return int(config.hidden_sizes[-1])


def _rounded(channels: float, divisor: int, least: int) -> int:
    """Round a number of channels to a multiple, as the mobile networks do: never down by more than a tenth."""
    rounded = max(least, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _efficientnet(config: Any) -> int:
    return int(config.hidden_dim)


def _mobilenet_v2(config: Any) -> int:
    if config.finegrained_output and config.depth_multiplier < 1.0:
        return 1280
    return _rounded(round(1280 * config.depth_multiplier), config.depth_divisible_by, config.min_depth)


def _two_towers(config: Any) -> int:
    return 2 * int(config.projection_dim)


def _text(model_class: str, *lora: str, **more: Any) -> Family:
    return Family("text", model_class, "tokens", _hidden, lora, (IDS, MASK), **more)


def _image(model_class: str, pooling: Pooling, dim: Dim, *lora: str, **more: Any) -> Family:
    return Family("image", model_class, pooling, dim, lora, (PIXELS,), **more)


_NO_POOLER = {"add_pooling_layer": False}
_NO_CACHE = {"use_cache": False}
_BERT_LORA = ("query", "value")
_LLAMA_LORA = ("q_proj", "v_proj")
_MASKED_FRAMES = ("masked_spec_embed",)  # read in training mode only, which a features module is never in

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": _text("BertModel", *_BERT_LORA, options=_NO_POOLER),
        "distilbert": _text("DistilBertModel", "q_lin", "v_lin"),
        "roberta": _text("RobertaModel", *_BERT_LORA, options=_NO_POOLER),
        "xlm-roberta": _text("XLMRobertaModel", *_BERT_LORA, options=_NO_POOLER),
        "albert": _text("AlbertModel", *_BERT_LORA, options=_NO_POOLER),
        "electra": _text("ElectraModel", *_BERT_LORA),
        "deberta-v2": _text("DebertaV2Model", "query_proj", "value_proj"),
        "xlnet": _text(
            "XLNetModel", "layer_1", "layer_2", flags={"use_mems": False}, dropped=("mask_emb", "seg_embed", "r_s_bias")
        ),
        "gpt2": _text("GPT2Model", "c_attn", flags=_NO_CACHE, causal=True),
        "llama": _text("LlamaModel", *_LLAMA_LORA, flags=_NO_CACHE, causal=True),
        "t5": _text("T5EncoderModel", "q", "v"),
        "bart": _text("BartModel", *_LLAMA_LORA, part="encoder"),
        "marian": _text("MarianModel", *_LLAMA_LORA, part="encoder"),
        "vit": _image("ViTModel", "first", _hidden, *_LLAMA_LORA, options=_NO_POOLER),
        "deit": _image("DeiTModel", "two", _hidden, *_LLAMA_LORA, options=_NO_POOLER),
        "dinov2": _image("Dinov2Model", "first", _hidden, *_BERT_LORA, *_LLAMA_LORA, dropped=("mask_token",)),
        "swin": _image("SwinModel", "pooler", _hidden, *_LLAMA_LORA),
        "convnext": _image("ConvNextModel", "pooler", _last_stage, "pwconv1", "pwconv2", any_size=True),
        "resnet": _image("ResNetModel", "positions", _last_stage, "convolution", any_size=True),
        "efficientnet": _image(
            *("EfficientNetModel", "positions", _efficientnet),
            *("convolution", "expand_conv", "project_conv", "top_conv"),
            any_size=True,
        ),
        "mobilenet_v2": _image("MobileNetV2Model", "positions", _mobilenet_v2, "convolution", any_size=True),
        "segformer": _image("SegformerModel", "positions", _last_stage, *_LLAMA_LORA, any_size=True),
        "yolos": _image("YolosModel", "mean", _hidden, *_BERT_LORA, options=_NO_POOLER),
        "detr": _image("DetrModel", "mean", _hidden, *_LLAMA_LORA, any_size=True),
        "clip_vision_model": _image("CLIPVisionModel", "pooler", _hidden, *_LLAMA_LORA),
        "clip": Family(
            *("image+text", "CLIPModel", "towers", _two_towers, _LLAMA_LORA, (PIXELS, IDS, MASK)),
            dropped=("logit_scale",),
            causal=True,
        ),
        "wav2vec2": Family("audio", "Wav2Vec2Model", "frames", _hidden, _LLAMA_LORA, (WAVE, MASK), dropped=_MASKED_FRAMES),
        "hubert": Family("audio", "HubertModel", "frames", _hidden, _LLAMA_LORA, (WAVE, MASK), dropped=_MASKED_FRAMES),
        "whisper": Family("audio", "WhisperModel", "mean", _hidden, _LLAMA_LORA, (MEL,), part="encoder"),
        "patchtst": Family("series", "PatchTSTModel", "patches", _hidden, _LLAMA_LORA, (SERIES,)),
    }
)


def family_of(config: PreTrainedConfig) -> Family:
    """What is known of a configuration's family.

    Raises:
        ModelError: nothing.
    """
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model_type must be a known family, found {config.model_type!r}: known are {known}")
    return FAMILIES[config.model_type]


def feature_dim(config: PreTrainedConfig) -> int:
    """The length d of one example's features, without building the model.

    Raises:
        ModelError: the family is unknown.
    """
    return family_of(config).dim(config)


def build_features(config: PreTrainedConfig) -> "HuggingFaceFeatures":
    """Make the features module of a configuration, with random weights, float32, in eval mode; nothing is downloaded.

    Tables that no file stores (rotary frequencies, position ids) are computed here, so build it on a real device.

    Raises:
        ModelError: the family is unknown, or the configuration names weights of elsewhere.
    """
    family = family_of(config)
    if getattr(config, "use_timm_backbone", False) or getattr(config, "use_pretrained_backbone", False):
        raise ModelError("expected a backbone that the configuration describes, found one to download: set backbone_config")
    model: PreTrainedModel = getattr(transformers, family.model_class)(copy.deepcopy(config), **family.options)
    return HuggingFaceFeatures(model)


class HuggingFaceFeatures(nn.Module):
    """A transformers model and the pooling of its hidden states: (b, d), each row of its own example alone.

    Args:
        model: An instance of its family's `model_class`; what no feature depends on is removed from it.

    Raises:
        ModelError: the family is unknown.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.configuration = model.config
        self.family = family_of(model.config)
        for part in list(model.modules()):
            for name in set(self.family.dropped) & set(dict(part.named_parameters(recurse=False))):
                delattr(part, name)
        undo_weight_norm(model)
        if self.family.pooling == "frames":
            setattr(model, "adapter", None)  # noqa: B010  # not every class declares it; made for tasks of its own, behind the frames
        self.model: nn.Module = model.get_submodule(self.family.part)
        self.eval()

    @property
    def feature_dim(self) -> int:
        """The features' length d."""
        return self.family.dim(self.configuration)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Each (b, ...) -> (b, d); an attention mask is 1 on what is real and may be left out.

        Raises:
            ModelError: the inputs are not the family's.
        """
        if (set(inputs) ^ set(self.family.inputs)) - {MASK}:
            kind, known = self.configuration.model_type, self.family.inputs
            raise ModelError(f"inputs of {kind} must be {known}, found {tuple(inputs)}: pass those")
        match self.family.modality:
            case "text":
                return self._text(inputs[IDS], inputs.get(MASK))
            case "image+text":
                return self._towers(inputs[PIXELS], inputs[IDS], inputs.get(MASK))
            case "audio" if self.family.pooling == "frames":
                return self._frames(inputs[WAVE], inputs.get(MASK))
        output = self.model(**inputs)
        return _pool(self.family.pooling, output)

    def _text(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        real = torch.ones_like(ids) if mask is None else mask
        states = self.model(input_ids=ids, attention_mask=self._handed(real), **self.family.flags).last_hidden_state
        return _masked_mean(states, real)

    def _handed(self, real: torch.Tensor) -> torch.Tensor:
        """The mask as the model is given it: ready made, for whether a 2-D one is used depends on its values (no vmap)."""
        if self.configuration.model_type in ("deberta-v2", "xlnet"):  # these two make their own, of values only
            return real.float() if self.configuration.model_type == "xlnet" else real
        return additive_mask(real, self.family.causal)

    def _towers(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        real = torch.ones_like(ids) if mask is None else mask
        towers = self.model
        image = towers.get_submodule("vision_model")(pixel_values=pixels).pooler_output
        text = towers.get_submodule("text_model")(input_ids=ids, attention_mask=self._handed(real)).pooler_output
        project_image, project_text = towers.get_submodule("visual_projection"), towers.get_submodule("text_projection")
        return torch.cat([project_image(image), project_text(text)], dim=1)

    def _frames(self, wave: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        mask = torch.ones_like(wave, dtype=torch.long) if mask is None else mask
        # checkpoints whose first layer normalises over time were trained without a mask, on zeros as padding
        handed = {MASK: mask} if self.configuration.feat_extract_norm == "layer" else {}
        states = self.model(input_values=wave, **handed).last_hidden_state  # (b, frames, d)
        lengths = mask.sum(1)
        for kernel, stride in zip(self.configuration.conv_kernel, self.configuration.conv_stride, strict=True):
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        real = torch.arange(states.shape[1], device=wave.device) < lengths[:, None]
        return _masked_mean(states, real)


def undo_weight_norm(module: nn.Module) -> None:
    """Make each norm and direction, which no example owns, the one weight that they stand for; in place."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")


def additive_mask(real: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """What is added to attention scores, float32 (b, 1, 1 or t, t): 0 where a token (b, t) is seen, else `HIDDEN`."""
    seen = real[:, None, None, :].bool()
    if causal:
        seen = seen & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    return torch.where(seen, 0.0, HIDDEN)


def _masked_mean(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(b, t, d) and (b, t) -> (b, d); an example with nothing real gives zeros."""
    weights = real.to(states.dtype)
    total: torch.Tensor = (states * weights.unsqueeze(-1)).sum(1)
    return total / weights.sum(1, keepdim=True).clamp(min=1.0)


def _pool(pooling: Pooling, output: Any) -> torch.Tensor:
    if pooling == "pooler":
        pooled: torch.Tensor = output.pooler_output
        return pooled
    states: torch.Tensor = output.last_hidden_state
    match pooling:
        case "first":  # the class token
            return states[:, 0]
        case "two":  # the class token and the one that was distilled
            return states[:, :2].mean(1)
        case "positions":  # (b, d, h, w)
            return states.mean((2, 3))
        case "patches":  # (b, channels, patches, d)
            return states.mean((1, 2))
    return states.mean(1)


def synthetic_inputs(config: PreTrainedConfig, num_examples: int, seed: int) -> Batch:
    """Make inputs of the shapes that a family reads: texts and sounds of several lengths with padding, images of noise.

    Args:
        config: Of a known family.
        num_examples: The number b of examples; the first has no padding.
        seed: The same seed gives the same inputs; nothing of a record is near.

    Raises:
        ModelError: the family is unknown.
    """
    family = family_of(config)
    generator = torch.Generator().manual_seed(seed)
    makers = {PIXELS: _images, SERIES: _series, MEL: _spectrograms, WAVE: _waves, IDS: _texts}
    batch: dict[str, torch.Tensor] = {}
    for name, make in makers.items():
        if name in family.inputs:
            batch |= make(config, num_examples, generator)
    return batch


def _lengths(num_examples: int, longest: int, generator: torch.Generator) -> torch.Tensor:
    """(b,): the longest first, then some between half and all of it."""
    lengths = torch.randint(max(longest // 2, 1), longest + 1, (num_examples,), generator=generator)
    lengths[:1] = longest
    return lengths


def _texts(config: Any, num_examples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    text = getattr(config, "text_config", config)
    pad = getattr(text, "pad_token_id", None) or 0
    real = torch.arange(TEXT_LENGTH) < _lengths(num_examples, TEXT_LENGTH, generator)[:, None]
    ids = torch.randint(text.vocab_size - 1, real.shape, generator=generator)
    ids += ids >= pad  # any token but padding
    return {IDS: torch.where(real, ids, pad), MASK: real.long()}


def _images(config: Any, num_examples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE_SIDE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if family_of(config).any_size:
        height, width = min(height, IMAGE_SIDE), min(width, IMAGE_SIDE)
    channels = getattr(vision, "num_channels", None) or 3
    return {PIXELS: torch.randn(num_examples, channels, height, width, generator=generator)}


def _waves(config: Any, num_examples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    longest = AUDIO_FRAMES
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        longest = (longest - 1) * stride + kernel
    real = torch.arange(longest) < _lengths(num_examples, longest, generator)[:, None]
    return {WAVE: torch.randn(real.shape, generator=generator) * real, MASK: real.long()}


def _spectrograms(config: Any, num_examples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (num_examples, config.num_mel_bins, 2 * config.max_source_positions)
    return {MEL: torch.randn(shape, generator=generator)}


def _series(config: Any, num_examples: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    steps = torch.randn((num_examples, config.context_length, config.num_input_channels), generator=generator)
    return {SERIES: steps.cumsum(1)}
