"""A pretrained model of Hugging Face becomes a candidate: checked, reduced to its features, written once, known by one hash.

    candidate.json       its public facts, and hash and size of the others; its own hash is the candidate's
    config.json          the architecture, every default written out
    model.safetensors    float32, by the features module's names; `feature_mean` and `feature_scale` centre the features
    tokenizer.json       of a text model

Covered:
    what a folder may hold: see `hub_folder`; what a config.json may say: see `assembly`;
    nothing is written before the artefact gave finite features; a crash leaves the old artefact or none;
    a built-in candidate's name cannot be taken; code of elsewhere is never run, from a folder or from a hub;
    a hub is asked only by an explicit call with a full commit, anonymously, for safetensors, JSON and vocabularies.
Not covered:
    licence and origin are the word of whoever installs the model.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from transformers import PreTrainedConfig

from urna.models.assembly import config_bytes, count_parameters, expected_tensors, read_config
from urna.models.candidate_file import (
    CANDIDATE_FILE,
    CONFIG_FILE,
    MAX_TOKENS,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CandidateFile,
    PictureInput,
    TextInput,
)
from urna.models.catalogue import CATALOGUE, CandidateSpec, cache_root, is_installed
from urna.models.hub import fetch
from urna.models.hub_folder import max_tokens_of, picture_input, read_model, read_tokenizer_json
from urna.models.huggingface import FAMILIES, feature_dim
from urna.models.loading import Backbone, Inputs, artefact_sha256, backbone_from, read_artefact_folder
from urna.models.trial import try_out
from urna.protocol.errors import ModelError

DEFAULT_MAX_TOKENS = 128
Public = Callable[[str], Inputs]  # modality -> public records of it
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class About:
    """What no file says of a model.

    Args:
        licence: SPDX identifier of the weights.
        pretrained_on: The public data and the task behind the weights, in one clause.
        summary: What it is, in one sentence; "" writes one from the configuration.
    """

    licence: str
    pretrained_on: str
    summary: str = ""


@dataclass(frozen=True)
class Installed:
    """A candidate that is there now.

    Args:
        spec: Its public facts.
        sha256: Its hash: what a plan pins.
        folder: Of its artefact.
        dropped: Published tensors that no feature needs.
    """

    spec: CandidateSpec
    sha256: str
    folder: Path
    dropped: tuple[str, ...] = ()


def install(
    name: str,
    folder: Path,
    about: About,
    *,
    max_tokens: int | None = None,
    centre_on: Public | None = None,
    root: Path | None = None,
) -> Installed:
    """Make a candidate of a local folder as Hugging Face writes it.

    Args:
        name: What plans will call it.
        folder: config.json; model.safetensors, or shards with their index; the tokenizer's or preprocessor's files.
        about: What no file says.
        max_tokens: Of one text; None is 128, or the model's limit if that is lower.
        centre_on: Gives PUBLIC records, whose mean feature becomes 0 and mean norm 1; never a site's own.
        root: Folder of artefacts; None is `cache_root()`.

    Raises:
        ModelError: name or folder are not acceptable; nothing was written.
    """
    check_name(name)
    config, weights = read_model(name, folder)
    config = read_config(config_bytes(config))  # as every later reader sees it
    contents = {CONFIG_FILE: config_bytes(config)}
    text, picture = None, None
    modality = FAMILIES[config.model_type].modality
    if modality == "text":
        contents[TOKENIZER_FILE] = read_tokenizer_json(folder)
        text = _text_input(config, folder, max_tokens)
    elif max_tokens is not None:
        raise ModelError(f"max_tokens is for models of texts, found one of {modality}: leave it away")
    elif modality == "image":
        picture = picture_input(config, FAMILIES[config.model_type], folder)
    facts = _Facts(name, config, about, text, picture)
    neutral = {"feature_mean": torch.zeros(feature_dim(config)), "feature_scale": torch.ones(())}
    artefact = facts.artefact(contents, dict(weights.tensors) | neutral)
    backbone = _tried(name, artefact, folder)
    if centre_on is not None:
        artefact = facts.artefact(contents, dict(weights.tensors) | _centring(backbone, centre_on(modality)))
        backbone = _tried(name, artefact, folder)
    return Installed(backbone.spec, backbone.sha256, _write(name, artefact, root), weights.dropped)


def install_from_hub(
    name: str,
    repository: str,
    revision: str,
    about: About,
    *,
    max_tokens: int | None = None,
    centre_on: Public | None = None,
    root: Path | None = None,
) -> Installed:
    """Fetch a repository at one commit from the hub (HF_ENDPOINT), anonymously, then do as `install`.

    Args:
        name: What plans will call it.
        repository: As the hub calls it: owner/name.
        revision: The full commit, 40 hexadecimal digits: a branch may be another model tomorrow.
        about: What no file says.
        max_tokens: See `install`.
        centre_on: See `install`.
        root: See `install`.

    Raises:
        ModelError: see `install`; or there is no way to the hub, or HF_HUB_OFFLINE says not to look for one.
    """
    check_name(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        fetch(repository, revision, folder)
        return install(name, folder, about, max_tokens=max_tokens, centre_on=centre_on, root=root)


def check_name(name: str) -> None:
    """Whether a candidate may be called this.

    Raises:
        ModelError: it is no name, or a built-in candidate's.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(f"a candidate's name has up to 63 of a-z, 0-9, - and _, found {name[:80]!r}: choose another")
    if name in CATALOGUE:
        raise ModelError(f"{name!r} is a built-in candidate and cannot be replaced: choose another name")


@dataclass(frozen=True)
class _Facts:
    name: str
    config: PreTrainedConfig
    about: About
    text: TextInput | None
    picture: PictureInput | None

    def artefact(self, contents: Mapping[str, bytes], tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
        """All files of the artefact, candidate.json included."""
        files = dict(contents) | {WEIGHTS_FILE: safetensors.torch.save(dict(tensors))}
        files[CANDIDATE_FILE] = self._candidate_json({one: _pin(content) for one, content in files.items()})
        return files

    def _candidate_json(self, pins: Mapping[str, dict[str, object]]) -> bytes:
        family = FAMILIES[self.config.model_type]
        num_parameters = count_parameters(expected_tensors(self.config))
        size = (3, self.picture.height, self.picture.width) if self.picture else ()
        facts = {
            "name": self.name,
            "family": self.config.model_type,
            "model_type": self.config.model_type,
            "modality": family.modality,
            "tasks": ["classification"],
            "input_shape": size,
            "feature_dim": feature_dim(self.config),
            "num_parameters": num_parameters,
            "licence": self.about.licence,
            "pretrained_on": self.about.pretrained_on,
            "summary": self.about.summary or f"A {self.config.model_type} model of {num_parameters:,} weights.",
            "text": self.text and self.text.model_dump(),
            "picture": self.picture and self.picture.model_dump(),
            "files": pins,
        }
        try:
            return CandidateFile.model_validate_json(json.dumps(facts)).to_bytes()
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
            raise ModelError(f"the facts of {self.name!r} cannot be a candidate's, found {wrong}: say them otherwise") from None


def _pin(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _text_input(config: PreTrainedConfig, folder: Path, max_tokens: int | None) -> TextInput:
    limit = max_tokens_of(config, folder)
    most = min(limit or MAX_TOKENS, MAX_TOKENS)
    if max_tokens is not None and not 1 <= max_tokens <= most:
        raise ModelError(f"max_tokens must be 1 to {most}, the model's limit, found {max_tokens}: change it")
    chosen = min(DEFAULT_MAX_TOKENS, limit or DEFAULT_MAX_TOKENS) if max_tokens is None else max_tokens
    pad = config.pad_token_id  # without one any token will do, for the mask hides it
    return TextInput(max_tokens=chosen, pad_id=pad if isinstance(pad, int) and pad >= 0 else 0)


def _centring(backbone: Backbone, public: Inputs) -> dict[str, torch.Tensor]:
    """Mean of the public records' features, and one over the mean norm of what is left."""
    features = torch.from_numpy(backbone.features(public, device="auto")).double()
    if len(features) < 2:
        raise ModelError(f"centring needs at least 2 public records, found {len(features)}: give more of them")
    mean = features.mean(0)
    spread = (features - mean).norm(dim=1).mean()
    if not float(spread) > 1e-6:
        raise ModelError(f"the public records must have different features, found mean norm {float(spread):.1e}: give others")
    return {"feature_mean": mean.float(), "feature_scale": (1.0 / spread).float()}


def _tried(name: str, artefact: Mapping[str, bytes], folder: Path) -> Backbone:
    """Load the artefact from its bytes, as a site will, and compute with it, a text of full length included."""
    backbone = backbone_from(name, artefact, hashlib.sha256(artefact[CANDIDATE_FILE]).hexdigest(), folder)
    try_out(backbone)
    return backbone


def _write(name: str, artefact: Mapping[str, bytes], root: Path | None) -> Path:
    """Write an artefact beside its place and move it there whole; one that is there with the same hash stays.

    Raises:
        ModelError: another candidate of this name is there.
    """
    folder = (root or cache_root()) / name
    if folder.exists() or folder.is_symlink():
        if is_installed(name, root) and artefact_sha256(name, root) == hashlib.sha256(artefact[CANDIDATE_FILE]).hexdigest():
            with suppress(ModelError):
                read_artefact_folder(name, folder, artefact_sha256(name, root))
                return folder
        raise ModelError(f"expected no candidate {name!r} yet, found another at {folder}: remove it, or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    try:
        for one, content in artefact.items():
            (fresh / one).write_bytes(content)
        fresh.chmod(0o755)
        os.rename(fresh, folder)  # onto a folder that another process made meanwhile it fails, for that is not empty
    except OSError as error:
        raise ModelError(f"expected to write {folder}, found {error.strerror}: mend it and install again") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
