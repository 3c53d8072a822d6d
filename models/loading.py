"""Artefacts on disk become frozen backbones, or a one-line reason why not.

Covered:
    a pickle or a zip archive (whatever its file name) is refused by its first bytes and never unpickled;
    a file over the size limit is refused before it is read; bytes are read once, hashed, and only then parsed;
    tensors other than the architecture's, in name, shape or type, and non-finite weights are refused.

Not covered:
    weights that were poisoned before they were pinned: a hash says which file it is, not that it is a good one;
    the manifest beside the file is written by whoever wrote the file, so only `expected_sha256`, which comes from
    the signed plan, is a defence against someone who can write to the cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from urna.models.candidate_file import (
    CANDIDATE_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CandidateFile,
    parse_candidate,
    read_candidate,
    read_files,
    read_limited,
)
from urna.models.catalogue import CATALOGUE, CandidateSpec, cache_root, spec, spec_of
from urna.models.vision import adapt, build
from urna.protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "Backbone", "cache_root", "load_backbone"]

MANIFEST_FILE = "manifest.json"
MAX_WEIGHTS_BYTES = 64 * 2**20  # of a built-in candidate
MAX_MANIFEST_BYTES = 2**16
SLOTS, INSTALLED_SLOTS = 256, 32  # records per forward pass of a built-in and of an installed candidate: always as many
TOKENS_AT_ONCE = 16_384  # of long texts fewer at once

Inputs = NDArray[np.floating] | Sequence[str]  # images (n, H, W) or (n, 3, H, W) in [0, 1], or n texts

_REBUILD = "run `urna models pretrain`"
_REINSTALL = "install it again with `urna models add`"
_FOREIGN_KINDS = ((b"PK", "a zip archive, as torch.save writes"), (b"\x80", "a pickle"), (b"\x1f\x8b", "gzip"))


class Adapter(Protocol):
    """Records of one modality become a batch; each record by itself, by public constants."""

    def length_classes(self, inputs: Inputs) -> NDArray[np.int64]:
        """Of each record alone, the length that `batch` may be asked for; zeros where records have none."""

    def batch(self, inputs: Inputs, length: int | None = None) -> dict[str, torch.Tensor]:
        """Adapt all of these, texts to this length."""


class GreyAdapter:
    """Square grey images, as the built-in candidates read them."""

    def length_classes(self, inputs: Inputs) -> NDArray[np.int64]:
        """All alike: zeros, int64 (n,)."""
        return np.zeros(len(inputs), np.int64)

    def batch(self, inputs: Inputs, length: int | None = None) -> dict[str, torch.Tensor]:  # noqa: ARG002 - for texts
        """(n, H, H) in [0, 1] -> ``images``, float32 (n, 1, 8, 8)."""
        if not isinstance(inputs, np.ndarray):
            raise ModelError(f"expected images, found {type(inputs).__name__}: ask for models of this modality")
        return {"images": adapt(inputs)}


class NoAdapter:
    """Of a modality that no site's records have yet: the model can be checked, not used."""

    def __init__(self, modality: str) -> None:
        self.modality = modality

    def length_classes(self, inputs: Inputs) -> NDArray[np.int64]:
        """All alike: zeros, int64 (n,)."""
        return np.zeros(len(inputs), np.int64)

    def batch(self, inputs: Inputs, length: int | None = None) -> dict[str, torch.Tensor]:  # noqa: ARG002 - for texts
        """Refuse."""
        raise ModelError(f"no records of {self.modality} are read yet, found {len(inputs)}: choose a model of texts or images")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen candidate, ready to give features.

    Args:
        spec: Its public facts.
        sha256: The candidate's hash: of the weights file of a built-in one, of candidate.json of an installed one.
        module: In eval mode, nothing requires a gradient; takes the entries of a batch as keyword arguments.
        feature_mean: float32 (d,), the mean feature of public records; 0 if an installed candidate was not centred.
        feature_scale: float32 (), one over the mean norm of their centred features; 1 if not centred.
        adapter: Brings records to a batch.
        config: Of an installed candidate, as transformers reads it.
    """

    spec: CandidateSpec
    sha256: str
    module: nn.Module
    feature_mean: torch.Tensor
    feature_scale: torch.Tensor
    adapter: Adapter = field(default_factory=GreyAdapter)
    config: "PreTrainedConfig | None" = None

    @property
    def has_adapter(self) -> bool:
        """Whether records of this modality are read."""
        return not isinstance(self.adapter, NoAdapter)

    def lengths(self, inputs: Inputs) -> NDArray[np.int64]:
        """What each record is to be padded to, (n,): a function of that record alone; 0 where all are of one size."""
        return self.adapter.length_classes(inputs)

    def batch(self, inputs: Inputs, length: int | None = None) -> dict[str, torch.Tensor]:
        """Bring records to what the module takes: tensors by argument, the example first, on the CPU.

        Args:
            inputs: The records.
            length: One of `lengths`; None is the largest.

        Raises:
            ModelError: the records are not what the input adapter reads.
        """
        return self.adapter.batch(inputs, length)

    def blank(self) -> dict[str, torch.Tensor]:
        """One record that is nobody's, padded to the largest length: it fills the slots that no record takes."""
        if self.spec.modality == "text":
            return self.batch([""])
        return self.batch(np.zeros((1, 8, 8)))

    def features(self, inputs: Inputs, device: str = "cpu") -> NDArray[np.float32]:
        """Give each record's feature vector, centred and scaled by public constants only.

        The module always gets as many rows of one length; so a record's features do not depend on how many others there are, or
        on how long they are, even in the last bit, which weights that somebody chose could make a large one (`parts`).

        Args:
            inputs: Images (n, H, H) in [0, 1] for a built-in candidate; images (n, H, W) or (n, 3, H, W), or n texts,
                for an installed one; n may be 0.
            device: Where to compute: auto, cpu or cuda; the module comes back to the CPU.

        Returns:
            float32 (n, d); on the public records of the centring the mean is 0 and the mean norm 1. A record whose features
            are not finite has zeros.

        Raises:
            ModelError: the records are not what the input adapter reads, or there is no such device.
        """
        place, blank = resolve_device(device), self.blank()
        lengths = self.lengths(inputs)
        features = np.empty((len(lengths), self.spec.feature_dim), np.float32)
        if not len(lengths):
            self.batch(inputs)  # says it if these are records of another kind
        try:
            self.module.to(place)
            with torch.no_grad():
                for places, length in by_length(lengths, self._slots):
                    slots = self._slots(length)
                    batch = filled(self.batch(_take(inputs, places), length), blank, slots)
                    raw = self.module(**{name: tensor.to(place) for name, tensor in batch.items()}).float().cpu()
                    features[places] = ((raw[: len(places)] - self.feature_mean) * self.feature_scale).numpy()
        finally:
            self.module.to("cpu")
        features[~np.isfinite(features).all(axis=1)] = 0.0  # of one record, by itself: no error may tell that there is one
        return features

    def _slots(self, length: int) -> int:
        """Of a forward pass at this length."""
        return SLOTS if self.config is None else max(1, min(INSTALLED_SLOTS, TOKENS_AT_ONCE // max(length, 1)))

    def synthetic(self, num_examples: int, seed: int) -> Mapping[str, torch.Tensor]:
        """Inputs for a preflight, which are no one's: the same for the same seed.

        Returns:
            A batch as of `batch`, with ``num_examples`` examples.
        """
        if self.config is not None:
            from urna.models.huggingface import synthetic_inputs

            return synthetic_inputs(self.config, num_examples, seed)
        shape = (num_examples, *self.spec.input_shape)
        places = torch.arange(float(np.prod(shape)), dtype=torch.float64)  # a hash of the place: no generator is needed
        return {"images": torch.frac(torch.sin(places * 12.9898 + seed + 1.0).abs() * 43758.5453).float().view(shape)}


def by_length(lengths: NDArray[np.int64], slots: int | Callable[[int], int]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """The places of records of one length, in their order, at most so many slots at a time; and that length."""
    for length in np.unique(lengths).tolist():
        places, most = np.flatnonzero(lengths == length), slots if isinstance(slots, int) else slots(length)
        for start in range(0, len(places), most):
            yield places[start : start + most], length


def filled(some: Mapping[str, torch.Tensor], blank: Mapping[str, torch.Tensor], slots: int) -> dict[str, torch.Tensor]:
    """A batch with so many examples: behind its own come blanks, cut to its own length."""
    whole = {}
    for name, one in some.items():
        rest = blank[name][(slice(None), *(slice(side) for side in one.shape[1:]))].to(one.device)
        whole[name] = torch.cat([one, rest.expand(slots - len(one), *rest.shape[1:])])
    return whole


def resolve_device(device: str) -> torch.device:
    """Where to compute, for auto, cpu or cuda.

    Raises:
        ModelError: it is none of these, or this machine has no CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"device must be auto, cpu or cuda, found {device!r}: choose one of them")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda needs a CUDA device, found none: choose auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def artefact_sha256(name: str, root: Path | None = None) -> str:
    """Return a candidate's hash, without opening its weights: what the manifest records, or the hash of candidate.json.

    Raises:
        ModelError: the candidate is unknown, not pretrained yet, or its manifest cannot be read.
    """
    return read_manifest(name, root)["sha256"]


def read_manifest(name: str, root: Path | None = None) -> Mapping[str, str]:
    """Return an artefact's manifest: `sha256`, the candidate's hash, and `recipe`, the hash of how it was made.

    Raises:
        ModelError: the candidate is unknown, not pretrained yet, or its manifest cannot be read.
    """
    folder = (root or cache_root()) / spec(name, root).name
    if name not in CATALOGUE:
        return {"sha256": read_candidate(name, folder)[1], "recipe": "installed"}
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(_read_limited(name, path, MAX_MANIFEST_BYTES))
    except ValueError:
        raise ModelError(f"manifest of {name!r} must be JSON, found other bytes in {path}: {_REBUILD}") from None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), str) for key in ("sha256", "recipe")):
        raise ModelError(f"manifest of {name!r} must hold the texts sha256 and recipe, see {path}: {_REBUILD}")
    return manifest


def load_backbone(name: str, expected_sha256: str | None = None, root: Path | None = None) -> Backbone:
    """Load a candidate's artefact.

    Args:
        name: A candidate, built-in or installed.
        expected_sha256: The hash pinned by a plan; None trusts the manifest or candidate.json beside the files.
        root: Folder of artefacts; None is `cache_root()`.

    Raises:
        ModelError: unknown, missing, too large, not safetensors, not the pinned bytes, or not this architecture.
    """
    expected = expected_sha256 or artefact_sha256(name, root)
    return load_backbone_folder(name, (root or cache_root()) / spec(name, root).name, expected)


def load_backbone_folder(name: str, folder: Path, expected_sha256: str) -> Backbone:
    """Load a candidate from a folder of its own, wherever that lies: the files of `read_artefact`.

    Raises:
        ModelError: see `load_backbone`.
    """
    return backbone_from(name, read_artefact_folder(name, folder, expected_sha256), expected_sha256, folder)


def load_backbone_file(name: str, path: Path, expected_sha256: str) -> Backbone:
    """Load a built-in candidate from a file of its own, wherever that lies.

    Raises:
        ModelError: see `load_backbone`.
    """
    return backbone_from(name, {WEIGHTS_FILE: read_pinned(name, path, expected_sha256)}, expected_sha256, path)


def read_artefact(name: str, expected_sha256: str, root: Path | None = None) -> dict[str, bytes]:
    """Read every file that a candidate's hash pins, once, as bytes: what another place needs to load the candidate.

    Returns:
        model.safetensors alone for a built-in candidate; candidate.json and all that it pins for an installed one.

    Raises:
        ModelError: a file is missing, too large, or not the pinned bytes.
    """
    return read_artefact_folder(name, (root or cache_root()) / spec(name, root).name, expected_sha256)


def read_artefact_folder(name: str, folder: Path, expected_sha256: str) -> dict[str, bytes]:
    """Do the same with a folder that may lie anywhere.

    Raises:
        ModelError: see `read_artefact`.
    """
    if name in CATALOGUE:
        return {WEIGHTS_FILE: read_pinned(name, folder / WEIGHTS_FILE, expected_sha256)}
    file, found = read_candidate(name, folder)
    if found != expected_sha256:
        raise ModelError(
            f"candidate {name!r} must have sha256 {expected_sha256}, found {found} of {folder / CANDIDATE_FILE}: "
            "restore the pinned artefact, or pin the hash of this one"
        )
    return {CANDIDATE_FILE: file.to_bytes()} | read_files(name, folder, file.files)


def backbone_from(name: str, contents: Mapping[str, bytes], sha256: str, path: Path) -> Backbone:
    """Parse the files of `read_artefact`, whose hashes were compared.

    Args:
        name: The candidate.
        contents: Each file's bytes.
        sha256: The candidate's hash.
        path: Where the files come from, for messages.

    Raises:
        ModelError: they are not well-formed, or not this architecture.
    """
    if name not in CATALOGUE:
        file = parse_candidate(name, contents[CANDIDATE_FILE], path)
        return _installed(file, contents, sha256, path)
    facts = spec(name)
    with torch.device("meta"):  # shapes only: no random draw for weights that are replaced at once
        module = build(name)
    tensors = _parse(name, contents[WEIGHTS_FILE], module.state_dict(), facts.feature_dim, _REBUILD)
    mean, scale = tensors.pop("feature_mean"), tensors.pop("feature_scale")
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
    return Backbone(spec=facts, sha256=sha256, module=module, feature_mean=mean, feature_scale=scale)


def _installed(file: CandidateFile, contents: Mapping[str, bytes], sha256: str, path: Path) -> Backbone:
    from urna.models.assembly import assemble, count_parameters, expected_tensors, read_config  # they import transformers
    from urna.models.huggingface import feature_dim

    config = read_config(contents[CONFIG_FILE])
    require_safetensors(contents[WEIGHTS_FILE], path, _REINSTALL)
    expected = expected_tensors(config)
    facts = (file.model_type, file.feature_dim, file.num_parameters)
    found = (config.model_type, feature_dim(config), count_parameters(expected))
    if found != facts:
        raise ModelError(f"{file.name!r} must be of type, features and weights {facts}, found {found}: {_REINSTALL}")
    tensors = _parse(file.name, contents[WEIGHTS_FILE], expected, file.feature_dim, _REINSTALL)
    mean, scale = tensors.pop("feature_mean"), tensors.pop("feature_scale")
    module = assemble(config, tensors)
    adapter = adapter_of(file, contents.get(TOKENIZER_FILE), config)
    return Backbone(spec_of(file), sha256, module, mean, scale, adapter, config)


def adapter_of(file: CandidateFile, tokenizer_json: bytes | None, config: "PreTrainedConfig") -> Adapter:
    """The input adapter that a candidate.json describes.

    Raises:
        ModelError: its tokenizer is none, may not read records, or is another model's, or texts outgrow the model's positions.
    """
    from urna.models.pictures import PictureAdapter
    from urna.models.text import TextAdapter, check_positions, read_tokenizer

    if file.picture is not None:
        return PictureAdapter(file.picture)
    if file.text is None or tokenizer_json is None:
        return NoAdapter(file.modality)
    check_positions(config, file.text)
    vocab_size = int(config.vocab_size)
    return TextAdapter(file.text, read_tokenizer(tokenizer_json, file.text, vocab_size), vocab_size)


def _take(inputs: Inputs, chosen: NDArray[np.int64]) -> Inputs:
    return inputs[chosen] if isinstance(inputs, np.ndarray) else [inputs[at] for at in chosen]


def read_pinned(name: str, path: Path, expected_sha256: str) -> bytes:
    """Read a weights file once: of limited size, safetensors by its first bytes, with this hash; nothing is parsed.

    Raises:
        ModelError: missing, too large, not safetensors, or other bytes than the pinned ones.
    """
    content = _read_limited(name, path, MAX_WEIGHTS_BYTES)
    require_safetensors(content, path, _REBUILD)
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256:
        raise ModelError(
            f"weights of {name!r} must have sha256 {expected_sha256}, found {found} in {path}: "
            f"restore the pinned file, or {_REBUILD} and pin its hash"
        )
    return content


def _read_limited(name: str, path: Path, limit_bytes: int) -> bytes:
    return read_limited(path, limit_bytes, f"candidate {name!r} is not pretrained yet", _REBUILD)


def require_safetensors(content: bytes, path: Path, remedy: str) -> None:
    """Refuse what does not begin as safetensors: an 8-byte little-endian header length, then a JSON object.

    Raises:
        ModelError: it does not.
    """
    header_bytes = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 2 <= header_bytes <= len(content) - 8:
        return
    kind = next((kind for magic, kind in _FOREIGN_KINDS if content.startswith(magic)), "other bytes")
    raise ModelError(f"{path} must be safetensors, found {kind}; it was not opened: remove it, then {remedy}")


def parse_tensors(name: str, content: bytes, remedy: str) -> dict[str, torch.Tensor]:
    """Parse safetensors.

    Raises:
        ModelError: they are malformed.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"weights of {name!r} must be well-formed safetensors, found {error}: {remedy}") from None


def _parse(
    name: str, content: bytes, expected: Mapping[str, torch.Tensor], feature_dim: int, remedy: str
) -> dict[str, torch.Tensor]:
    tensors = parse_tensors(name, content, remedy)
    centring = {"feature_mean": torch.zeros(feature_dim), "feature_scale": torch.zeros(())}
    check_tensors(name, tensors, dict(expected) | centring, remedy)
    return tensors


def check_tensors(name: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], remedy: str) -> None:
    """Whether these are the architecture's tensors.

    Raises:
        ModelError: in name, shape or type they are not, or a number is not finite.
    """
    if tensors.keys() != expected.keys():
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ModelError(f"weights of {name!r} lack {some(missing)} and have unexpected {some(surplus)}: {remedy}")
    for key, tensor in tensors.items():
        wanted = expected[key]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ModelError(
                f"tensor {key!r} of {name!r} must be {wanted.dtype} {tuple(wanted.shape)}, "
                f"found {tensor.dtype} {tuple(tensor.shape)}: {remedy}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {key!r} of {name!r} must be finite, found NaN or infinity: {remedy}")


def some(names: Sequence[str], limit: int = 4) -> str:
    """A list of names in a message, cut after a few."""
    return f"{list(names)}" if len(names) <= limit else f"{list(names[:limit])} and {len(names) - limit} more"
