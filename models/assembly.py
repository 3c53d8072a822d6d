"""A configuration and tensors of elsewhere become a frozen module of known code, or a one-line reason why not.

Covered:
    a config.json that names code, kernels, quantisation or other weights to fetch is refused; nothing of it is followed;
    sizes are limited and the module is made of shapes only before any memory is taken for it;
    tensors are those of the architecture, in name, shape and type, all of them and no others, and finite.

Not covered:
    weights that were poisoned before they were pinned.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

from urna.models.candidate_file import MAX_INSTALLED_BYTES
from urna.models.huggingface import FAMILIES, build_features
from urna.protocol.errors import ModelError

MAX_INTEGER = 2**24
MAX_REPEATS = 256  # of layers, heads, stages; and entries of a list
_REPEATS = re.compile(r"layers|blocks|depth|stages|heads|experts|repeats|groups|kernel|stride")
_PICKS_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "_target_", "kernel_config", "use_kernels")
_PICKS_WEIGHTS = ("use_timm_backbone", "use_pretrained_backbone", "quantization_config", "compression_config")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation")
_KNOWN_ATTENTION = (None, "eager", "sdpa")  # any other name may be a repository whose code would be fetched
_NO_FACTS = (  # of where a file came from, or of heads; dropped
    *("_name_or_path", "architectures", "transformers_version", "_commit_hash", "torch_dtype", "dtype", *_ATTENTION),
    *("id2label", "label2id", "num_labels", "task_specific_params", "problem_type", "finetuning_task", "pipeline_tag"),
)
UNFIT = (  # what libraries raise on configurations, weights and tokenizers that do not fit
    *(RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError, ArithmeticError, OSError),
    StrictDataclassError,
)
Json = Mapping[str, object]


def read_config(content: bytes) -> PreTrainedConfig:
    """Read a config.json.

    Raises:
        ModelError: it is none, names a family that is not known, or asks for something that is never done.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError("config.json must be JSON, found other bytes: restore the file") from None
    if not isinstance(found, dict):
        raise ModelError(f"config.json must be a JSON object, found {type(found).__name__}: restore the file")
    for where, key, value in _walk(found, "", 0):
        _check_entry(where, key, value)
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"config.json must be of a known family, found model_type {str(model_type)[:60]!r}: known are {known}")
    facts = _without(found)
    try:
        return CONFIG_MAPPING[model_type].from_dict(facts)
    except UNFIT as error:
        raise ModelError(f"config.json must be a {model_type} configuration, found {in_one_line(error)}: restore it") from None


def config_bytes(config: PreTrainedConfig) -> bytes:
    """The one spelling of a configuration, with every default written out."""
    facts = _without(config.to_dict()) | {"model_type": config.model_type}
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def expected_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Names, shapes and types of the features module's tensors, without memory; a tied tensor has its first name only.

    Raises:
        ModelError: the configuration fits no module, or one that is too large.
    """
    try:
        with torch.device("meta"):
            module = build_features(config)
    except UNFIT as error:
        raise ModelError(f"config.json must describe a module, found {in_one_line(error)}: restore it") from None
    every = [*module.parameters(), *module.buffers()]  # tables that are not stored take memory too
    size = sum(tensor.numel() * tensor.element_size() for tensor in every)
    if size > MAX_INSTALLED_BYTES:
        raise ModelError(f"a model must have at most {MAX_INSTALLED_BYTES} bytes of weights, found {size}: take a smaller one")
    return own_tensors(module)


def assemble(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make the features module with these weights, frozen, in eval mode; the tensors were checked with `loading.check_tensors`.

    Raises:
        ModelError: they do not fit.
    """
    try:
        module = build_features(config)  # not of shapes only: tables that are not stored are computed here
        module.load_state_dict(dict(tensors), strict=False)  # tied tensors have one name of several
    except UNFIT as error:
        raise ModelError(f"weights must fit their config.json, found {in_one_line(error)}: restore the files") from None
    return module.eval().requires_grad_(False)


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What is stored of a module, each tensor once, under its first name."""
    seen: set[int] = set()
    own = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # keep_vars: a tied tensor is one object
            seen.add(id(tensor))
            own[key] = tensor
    return own


def count_parameters(tensors: Mapping[str, torch.Tensor]) -> int:
    """Weights among the tensors of a module, without its statistics and tables."""
    return sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def _walk(found: Json, where: str, depth: int) -> Iterator[tuple[str, str, object]]:
    """Every entry of a JSON object and of the objects in it: place, key, value; lists are walked as their own key's."""
    if depth > 8:
        raise ModelError(f"config.json must not be nested deeply, found {where}: restore it")
    for key, value in found.items():
        place = f"{where}{key}"
        if key in ("id2label", "label2id", "task_specific_params"):  # dropped, whatever it holds
            continue
        yield place, key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{place}.", depth + 1)
        elif isinstance(value, list):
            yield from _walk_list(value, place, key, depth + 1)


def _walk_list(values: list[object], place: str, key: str, depth: int) -> Iterator[tuple[str, str, object]]:
    for one in values[: MAX_REPEATS + 1]:
        if isinstance(one, dict):
            yield from _walk(one, f"{place}.", depth)
        elif isinstance(one, list):
            yield place, key, one
            if depth <= 8:
                yield from _walk_list(one, place, key, depth + 1)
        else:
            yield place, key, one


def _check_entry(where: str, key: str, value: object) -> None:
    if key in _PICKS_CODE and value:
        raise ModelError(f"config.json must not name code of its publisher, found {where}: code of elsewhere is never run")
    if key in _PICKS_WEIGHTS and value:
        raise ModelError(f"config.json must describe all weights by itself, found {where}: take a plain variant of the model")
    if key in _ATTENTION and value not in _KNOWN_ATTENTION:
        raise ModelError(f"config.json must name no attention kernel, found {where} = {str(value)[:60]!r}: remove the entry")
    if isinstance(value, list) and len(value) > MAX_REPEATS:
        raise ModelError(f"config.json must have at most {MAX_REPEATS} entries in a list, found {len(value)} in {where}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ModelError(f"config.json must hold finite numbers, found {value} in {where}: restore it")
    limit = MAX_REPEATS if _REPEATS.search(key) else MAX_INTEGER
    if isinstance(value, int) and abs(value) > limit:
        raise ModelError(f"config.json must hold whole numbers up to {limit} in {where}, found {value}: take a smaller model")


def _without(found: Json) -> dict[str, object]:
    return {key: _without(value) if isinstance(value, dict) else value for key, value in found.items() if key not in _NO_FACTS}


def in_one_line(error: Exception) -> str:
    """An error of a library, short enough for a message."""
    return repr(" ".join(str(error).split())[:200] or type(error).__name__)
