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
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from urna.models.catalogue import CandidateSpec, spec
from urna.models.vision import adapt, build
from urna.protocol.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
MAX_WEIGHTS_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 2**16
BATCH_SIZE = 1024  # records per forward pass; bounds memory only

_REBUILD = "run `urna models pretrain`"
_FOREIGN_KINDS = ((b"PK", "a zip archive, as torch.save writes"), (b"\x80", "a pickle"), (b"\x1f\x8b", "gzip"))


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen candidate, ready to give features.

    Args:
        spec: Its public facts.
        sha256: Hash of the weights file that it was loaded from.
        module: In eval mode, nothing requires a gradient.
        feature_mean: float32 (d,), the mean feature of public rendered characters.
        feature_scale: float32 (), one over the mean norm of their centred features.
    """

    spec: CandidateSpec
    sha256: str
    module: nn.Module
    feature_mean: torch.Tensor
    feature_scale: torch.Tensor

    def features(self, images: NDArray[np.floating]) -> NDArray[np.float32]:
        """Give each record's feature vector, centred and scaled by public constants only.

        Args:
            images: (n, H, H) in [0, 1], usually H = 8; n may be 0.

        Returns:
            float32 (n, d); on the public characters the mean is 0 and the mean norm 1.

        Raises:
            ModelError: the images are not what the input adapter reads.
        """
        adapted = adapt(images)
        features = np.empty((len(adapted), self.spec.feature_dim), np.float32)
        with torch.no_grad():
            for start in range(0, len(adapted), BATCH_SIZE):
                raw = self.module(adapted[start : start + BATCH_SIZE])
                features[start : start + BATCH_SIZE] = ((raw - self.feature_mean) * self.feature_scale).numpy()
        return features


def cache_root() -> Path:
    """Return the folder that holds one folder per pretrained candidate; it need not exist yet."""
    if configured := os.environ.get("URNA_CACHE_DIR"):
        return Path(configured) / "models"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "urna" / "models"
    return Path.home() / ".cache" / "urna" / "models"


def artefact_sha256(name: str, root: Path | None = None) -> str:
    """Return the hash that an artefact's manifest records for its weights, without opening the weights.

    Raises:
        ModelError: the candidate is unknown, not pretrained yet, or its manifest cannot be read.
    """
    return read_manifest(name, root)["sha256"]


def read_manifest(name: str, root: Path | None = None) -> Mapping[str, str]:
    """Return an artefact's manifest: `sha256` of the weights and `recipe`, the hash of how they were made.

    Raises:
        ModelError: the candidate is unknown, not pretrained yet, or its manifest cannot be read.
    """
    path = (root or cache_root()) / spec(name).name / MANIFEST_FILE
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
        name: A candidate of the catalogue.
        expected_sha256: The hash pinned by a plan; None trusts the manifest beside the file.
        root: Folder of artefacts; None is `cache_root()`.

    Raises:
        ModelError: unknown, missing, too large, not safetensors, not the pinned bytes, or not this architecture.
    """
    expected = expected_sha256 or artefact_sha256(name, root)
    return load_backbone_file(name, (root or cache_root()) / spec(name).name / WEIGHTS_FILE, expected)


def load_backbone_file(name: str, path: Path, expected_sha256: str) -> Backbone:
    """Load a candidate from a file of its own, wherever that lies.

    Raises:
        ModelError: see `load_backbone`.
    """
    facts = spec(name)
    content = read_pinned(name, path, expected_sha256)
    with torch.device("meta"):  # shapes only: no random draw for weights that are replaced at once
        module = build(name)
    tensors = _parse(name, content, module, facts.feature_dim)
    mean, scale = tensors.pop("feature_mean"), tensors.pop("feature_scale")
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
    return Backbone(spec=facts, sha256=expected_sha256, module=module, feature_mean=mean, feature_scale=scale)


def read_pinned(name: str, path: Path, expected_sha256: str) -> bytes:
    """Read a weights file once: of limited size, safetensors by its first bytes, with this hash; nothing is parsed.

    Raises:
        ModelError: missing, too large, not safetensors, or other bytes than the pinned ones.
    """
    content = _read_limited(name, path, MAX_WEIGHTS_BYTES)
    _require_safetensors(content, path)
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256:
        raise ModelError(
            f"weights of {name!r} must have sha256 {expected_sha256}, found {found} in {path}: "
            f"restore the pinned file, or {_REBUILD} and pin its hash"
        )
    return content


def _read_limited(name: str, path: Path, limit_bytes: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device would never end
            raise ModelError(f"{path} must be a regular file, found another kind: remove it, then {_REBUILD}")
        if status.st_size > limit_bytes:
            raise ModelError(f"{path} must be at most {limit_bytes} bytes, found {status.st_size}: remove it, then {_REBUILD}")
        with path.open("rb") as file:
            return file.read(limit_bytes)  # bounded again: the file may have grown since
    except FileNotFoundError:
        raise ModelError(f"candidate {name!r} is not pretrained yet, found no {path}: {_REBUILD}") from None
    except OSError as error:
        raise ModelError(f"{path} must be readable, found {error.strerror}: give this user access to it") from None


def _require_safetensors(content: bytes, path: Path) -> None:
    """Refuse what does not begin as safetensors: an 8-byte little-endian header length, then a JSON object."""
    header_bytes = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 2 <= header_bytes <= len(content) - 8:
        return
    kind = next((kind for magic, kind in _FOREIGN_KINDS if content.startswith(magic)), "other bytes")
    raise ModelError(f"{path} must be safetensors, found {kind}; it was not opened: remove it, then {_REBUILD}")


def _parse(name: str, content: bytes, module: nn.Module, feature_dim: int) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"weights of {name!r} must be well-formed safetensors, found {error}: {_REBUILD}") from None
    expected = dict(module.state_dict())
    expected |= {"feature_mean": torch.zeros(feature_dim), "feature_scale": torch.zeros(())}
    if tensors.keys() != expected.keys():
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ModelError(f"weights of {name!r} lack {missing} and have unexpected {surplus}: {_REBUILD}")
    for key, tensor in tensors.items():
        wanted = expected[key]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ModelError(
                f"tensor {key!r} of {name!r} must be {wanted.dtype} {tuple(wanted.shape)}, "
                f"found {tensor.dtype} {tuple(tensor.shape)}: {_REBUILD}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {key!r} of {name!r} must be finite, found NaN or infinity: {_REBUILD}")
    return tensors
