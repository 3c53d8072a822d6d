"""A folder as Hugging Face writes it, read with suspicion: what it holds of a model, or a one-line reason why not.

Covered:
    a folder without safetensors (only pickles, say) is refused by its names: nothing of it is opened;
    links, names that are paths, files over their limits, shards that are not what the index says, are refused;
    tensors that are malformed, not finite, or not this architecture's are refused; those of a head are dropped and named;
    a tokenizer is made from known files in a folder of their own, so that no other file can take part.

Not covered:
    weights that were poisoned before they were pinned.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from urna.models.assembly import UNFIT, in_one_line, own_tensors, read_config
from urna.models.candidate_file import MAX_CONFIG_BYTES, MAX_INSTALLED_BYTES, MAX_TOKENIZER_BYTES, PictureInput, read_limited
from urna.models.huggingface import Family, HuggingFaceFeatures, family_of
from urna.models.loading import check_tensors, parse_tensors, require_safetensors, some
from urna.models.text import positions
from urna.protocol.errors import ModelError

MAX_SHARDS = 256
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib")
TOKENIZER_SOURCES = (  # all that a tokenizer is ever made of; none of it is code
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "target.spm"),
)
_REMEDY = "get the model's files again"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.safetensors")


@dataclass(frozen=True)
class Weights:
    """What the features of a model need of its published weights.

    Args:
        tensors: float32 (integers as they are), by the features module's own names.
        dropped: Names of published tensors that no feature needs.
    """

    tensors: Mapping[str, torch.Tensor]
    dropped: tuple[str, ...]


def read_model(name: str, folder: Path) -> tuple[PreTrainedConfig, Weights]:
    """Read config.json and the weights.

    Raises:
        ModelError: see the module.
    """
    if not folder.is_dir():
        raise ModelError(f"expected a folder with a model at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    names = sorted(path.name for path in folder.iterdir())
    if not any(one.endswith(".safetensors") for one in names):
        pickles = [one for one in names if one.lower().endswith(PICKLES)]
        found = f"only {some(pickles)}, which were not opened" if pickles else "no weights"
        raise ModelError(f"expected weights as safetensors in {folder}, found {found}: convert them where you trust them")
    config = read_config(_read(folder, "config.json", MAX_CONFIG_BYTES))
    tensors = _shards(name, folder) if "model.safetensors" not in names else _shard(name, folder, "model.safetensors")[0]
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {key!r} of {name!r} must be finite, found NaN or infinity: {_REMEDY}")
    return config, _fitted(name, config, tensors)


def read_tokenizer_json(folder: Path) -> bytes:
    """The tokenizer as one JSON file; where the model came without, it is made of its vocabulary.

    Raises:
        ModelError: there is none, or it cannot be made without the publisher's code.
    """
    found = {one: _read(folder, one, MAX_TOKENIZER_BYTES) for one in TOKENIZER_SOURCES if (folder / one).exists()}
    settings = read_json(folder, "tokenizer_config.json")
    if settings.get("auto_map"):
        raise ModelError("tokenizer_config.json must not name code of its publisher, found auto_map: it is never run")
    if "tokenizer.json" in found:
        return found["tokenizer.json"]
    if not found.keys() - {"tokenizer_config.json", "special_tokens_map.json"}:
        raise ModelError(f"expected tokenizer.json or a vocabulary in {folder}, found neither: add the tokenizer's files")
    config = _read(folder, "config.json", MAX_CONFIG_BYTES)
    with tempfile.TemporaryDirectory() as scratch, _quietly():
        for one, content in ({"config.json": config} | found).items():
            (Path(scratch) / one).write_bytes(content)
        try:
            fast = transformers.AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
            return str(fast.backend_tokenizer.to_str()).encode()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's library is no Exception
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(f"expected a tokenizer in {folder}, found {reason!r}: add its tokenizer.json") from None


def max_tokens_of(config: PreTrainedConfig, folder: Path) -> int | None:
    """The longest text that a model reads, in tokens; None if its positions do not end."""
    stated = read_json(folder, "tokenizer_config.json").get("model_max_length")
    stated = stated if isinstance(stated, int) and 0 < stated < 10**6 else None  # "no limit" is written as 1e30
    return min((one for one in (positions(config), stated) if one is not None), default=None)


def picture_input(config: PreTrainedConfig, family: Family, folder: Path) -> PictureInput:
    """How the model's own preprocessor treats pictures, without its crop.

    Raises:
        ModelError: it treats them in a way that is not known, or the model has not three channels.
    """
    if getattr(config, "num_channels", 3) != 3:
        raise ModelError(f"expected a model of three colours, found num_channels {config.num_channels}: choose another")
    said = read_json(folder, "preprocessor_config.json")
    declared = said.get("crop_size") if said.get("do_center_crop") else None
    size = _side(getattr(config, "image_size", None))
    if size is None or family.any_size:
        size = _side(declared) or _side(said.get("size")) or size or (224, 224)
    known: Mapping[object, str] = {0: "bilinear", 1: "bicubic", 2: "bilinear", 3: "bicubic", None: "bilinear"}
    if isinstance(said.get("resample"), list | dict) or said.get("resample") not in known:
        raise ModelError(f"preprocessor_config.json must name a known resample, found {said.get('resample')!r}: mend it")
    normalised = said.get("do_normalize", True)
    try:
        return PictureInput.model_validate_json(
            json.dumps(
                {
                    "height": size[0],
                    "width": size[1],
                    "mean": said.get("image_mean", [0.5] * 3) if normalised else [0.0] * 3,
                    "std": said.get("image_std", [0.5] * 3) if normalised else [1.0] * 3,
                    "interpolation": known[said.get("resample")],
                }
            )
        )
    except ValueError as error:
        raise ModelError(
            f"preprocessor_config.json must give size, mean and std, found {in_one_line(error)}: mend it"
        ) from None


def read_json(folder: Path, name: str) -> Mapping[str, object]:
    """A JSON object of the folder; an empty one where there is none.

    Raises:
        ModelError: there is something else.
    """
    if not (folder / name).exists():
        return {}
    try:
        found = json.loads(_read(folder, name, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{folder / name} must be a JSON object, found something else: {_REMEDY}")
    return found


def _side(value: object) -> tuple[int, int] | None:
    """Height and width, however a configuration spells them."""
    match value:
        case int() if value > 0:
            return value, value
        case [int() as height, int() as width] | {"height": int() as height, "width": int() as width}:
            return height, width
        case {"shortest_edge": int() as side}:
            return side, side
    return None


def _read(folder: Path, name: str, limit_bytes: int) -> bytes:
    path = folder / name
    if path.is_symlink():  # of a download cache, mostly; but a link may lead anywhere
        raise ModelError(f"{path} must be a file, found a link: copy the folder with `cp -rL`")
    return read_limited(path, limit_bytes, f"the model in {folder} is not whole", _REMEDY)


def _shard(name: str, folder: Path, file: str, budget: int = MAX_INSTALLED_BYTES) -> tuple[dict[str, torch.Tensor], int]:
    content = _read(folder, file, budget)
    require_safetensors(content, folder / file, _REMEDY)
    return parse_tensors(name, content, _REMEDY), len(content)


def _shards(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all shards, each from the one that the index names."""
    index = read_json(folder, "model.safetensors.index.json").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ModelError(f"expected model.safetensors, or shards with an index, in {folder}, found neither: {_REMEDY}")
    files = sorted({str(one) for one in index.values()})
    for file in files[: MAX_SHARDS + 1]:
        if not _SHARD.fullmatch(file):
            raise ModelError(f"the index of {name!r} must name safetensors files beside it, found {file[:80]!r}: {_REMEDY}")
    if len(files) > MAX_SHARDS:
        raise ModelError(f"the index of {name!r} must name at most {MAX_SHARDS} files, found {len(files)}: {_REMEDY}")
    tensors: dict[str, torch.Tensor] = {}
    budget = MAX_INSTALLED_BYTES
    for file in files:
        found, size = _shard(name, folder, file, budget)
        wanted = {key for key, where in index.items() if where == file}
        if found.keys() != wanted:
            wrong = sorted(found.keys() ^ wanted)
            raise ModelError(f"{file} of {name!r} must hold what the index says, found other tensors {some(wrong)}: {_REMEDY}")
        tensors |= found
        budget -= size
    return tensors


def _fitted(name: str, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> Weights:
    """Bring published tensors under the features module's names, as transformers maps them, in memory alone."""
    family = family_of(config)
    model_class: type[PreTrainedModel] = getattr(transformers, family.model_class)
    with _quietly():
        try:
            model, found = _from_pretrained(model_class, config, tensors, family.options)
            module = HuggingFaceFeatures(model)
        except UNFIT as error:
            raise ModelError(f"weights of {name!r} must fit their config.json, found {in_one_line(error)}: {_REMEDY}") from None
    prefix = f"{family.part}." if family.part else ""
    needed = (key for key in found["missing_keys"] if key.startswith(prefix) and key.split(".")[-1] not in family.dropped)
    if missing := sorted(needed):  # under the published names: some are folded into others by now
        raise ModelError(f"weights of {name!r} lack {some(missing)}: {_REMEDY}")
    own = {key: tensor.detach().contiguous() for key, tensor in own_tensors(module).items()}
    check_tensors(name, own, own, _REMEDY)  # finite also as float32
    return Weights(own, tuple(sorted(found["unexpected_keys"])))


def _from_pretrained(
    kind: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], options: Mapping[str, bool]
) -> tuple[PreTrainedModel, Mapping[str, set[str]]]:
    """Of tensors in memory: no name of a repository or a file is given, so nothing is looked for."""
    load = cast(Callable[..., tuple[PreTrainedModel, Mapping[str, set[str]]]], kind.from_pretrained)
    return load(None, config=config, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True, **options)


@contextmanager
def _quietly() -> Iterator[None]:
    """No tables and bars of transformers: what is dropped is said by whoever asked."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the library leaves it untyped
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library leaves it untyped
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # the library leaves it untyped
