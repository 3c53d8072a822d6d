"""A run's model as a folder that stands alone: weights, configuration, model card; and how to use it.

    model/backbone.safetensors   the pinned pretrained weights of a built-in candidate, as they were
    model/backbone/              instead, of an installed candidate: its files, as they were (candidate.json pins them)
    model/head.safetensors       of mode "head": weight (num_classes, feature_dim), bias (num_classes,)
    model/tuned.safetensors      of other modes: every trained tensor by its name in the model, as it is after training
    model/config.json            what all are, and their hashes
    model/README.md              the model card

Covered:
    * the folder is replaced as a whole; the backbone's bytes are those that the sites agreed on, by hash;
    * weights are read once, as safetensors only, and refused unless hash, names, shapes and numbers are as declared;
    * folders that an older version wrote (format urna-model-1: a head on a built-in candidate) load as ever, and such models
      are still written like that.
Not covered:
    * someone who can write config.json too: its hashes find damage, not an attacker; `urna report` makes the folder anew.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from urna.models.catalogue import CATALOGUE, CandidateSpec, spec
from urna.protocol.errors import ModelError, RunError
from urna.protocol.plan import Final
from urna.server.journal import Journal
from urna.server.model_card import model_card
from urna.server.model_config import HEAD_FILE, TUNED_FILE, ModelConfig, check_meaning, common_facts, config_bytes, read_config
from urna.server.report_reading import read_report

if TYPE_CHECKING:
    from urna.models.loading import Backbone
    from urna.models.tunable import Tunable

MODEL_DIR, BACKBONE_DIR = "model", "backbone"
BACKBONE_FILE, CONFIG_FILE, CARD_FILE = "backbone.safetensors", "config.json", "README.md"
TUNED_LIMIT_BYTES = 4 * 2**30
BATCH_SIZE = 32  # records that are labelled at once; bounds memory only

Inputs = npt.NDArray[np.floating] | Sequence[str]


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A backbone and what was trained: a head's flat vector, or a whole model with the trained weights in it."""

    config: ModelConfig
    backbone: "Backbone"
    trained: "npt.NDArray[np.float32] | Tunable"

    def predict(self, inputs: Inputs) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Label records.

        Args:
            inputs: images (n, h, h) in [0, 1], of any size, for a built-in candidate; (n, h, w) or (n, 3, h, w), or n texts,
                for an installed one; n may be 0.

        Returns:
            labels (n,) and probabilities (n, num_classes).

        Raises:
            ModelError: the records are not what the model reads.
        """
        logits = self._logits(inputs).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return logits.argmax(axis=1).astype(np.int64), odds / odds.sum(axis=1, keepdims=True)

    def _logits(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        import torch

        from urna.models.tuning import normalise_for_head, predict_logits

        if isinstance(self.trained, np.ndarray):
            return predict_logits(self.trained, normalise_for_head(self.backbone.features(inputs)))
        found = [np.zeros((0, self.config.num_classes), np.float32)]
        if not len(inputs):
            self.backbone.batch(inputs)  # says it if these are records of another kind
        batches = (inputs[start : start + BATCH_SIZE] for start in range(0, len(inputs), BATCH_SIZE))
        with torch.no_grad():
            found += [self.trained.module(**self.backbone.batch(one)).numpy() for one in batches]
        return np.concatenate(found)


def write_model(run_dir: Path) -> Path:
    """Make the model folder of a run, or make it again.

    Returns:
        The folder.

    Raises:
        RunError: there is no journal, or no model in it yet.
        ModelError: the pretrained backbone is missing, or not the one that the sites agreed on.
    """
    from urna.models.loading import WEIGHTS_FILE, read_artefact

    report = read_report(run_dir)
    name, vector = _trained(run_dir, report.state)
    pinned, final = report.models[name], Final.model_validate(report.plan["final"])
    num_classes = int(report.plan["task"]["num_classes"])
    files = read_artefact(name, pinned)
    contents = (
        {BACKBONE_FILE: files[WEIGHTS_FILE]}
        if name in CATALOGUE
        else {f"{BACKBONE_DIR}/{file}": content for file, content in files.items()}
    )
    facts = spec(name)
    common = common_facts(report, facts, num_classes, pinned)
    if final.tuning == "head":
        contents[HEAD_FILE] = _head_bytes(facts, vector, num_classes)
        config = ModelConfig(**common, head_sha256=hashlib.sha256(contents[HEAD_FILE]).hexdigest())
    else:
        tunable = _tunable(_backbone(name, pinned), num_classes, final.tuning, final.lora_rank)
        tunable.load(vector)
        contents[TUNED_FILE] = _tuned_bytes(tunable)
        config = ModelConfig(
            **common,
            tuning=final.tuning,
            lora_rank=final.lora_rank if final.tuning == "lora" else None,
            num_trained=tunable.size,
            share_trained=tunable.share_trained,
            notes=tuple(note[:1000] for note in tunable.notes),
            tuned_sha256=hashlib.sha256(contents[TUNED_FILE]).hexdigest(),
        )
    contents[CONFIG_FILE] = config_bytes(config)
    contents[CARD_FILE] = model_card(report, config, facts).encode()
    _replace_folder(run_dir / MODEL_DIR, contents)
    return run_dir / MODEL_DIR


def load_model(run_dir: Path) -> TrainedModel:
    """Load the model folder of a run; the folder is all it needs.

    Raises:
        RunError: there is no model folder, or a file of it is missing.
        ModelError: a file is not what config.json says, or config.json is none of this version.
    """
    folder = run_dir / MODEL_DIR
    again = f"make it with `urna report {run_dir}`"

    def check(name: str) -> None:
        if not (folder / name).is_file():
            raise RunError(f"expected a model at {folder}, found no {name}: {again}")

    check(CONFIG_FILE)
    try:
        config = read_config(folder / CONFIG_FILE)
        for name in (BACKBONE_FILE if config.is_built_in else f"{BACKBONE_DIR}/candidate.json", config.weights_file):
            check(name)
        return _loaded(folder, config)
    except ModelError as error:
        raise ModelError(f"{error}; or {again}") from None


def _loaded(folder: Path, config: ModelConfig) -> TrainedModel:
    from urna.models.loading import load_backbone_file, load_backbone_folder, read_pinned

    name = config.candidate
    if config.is_built_in:
        backbone = load_backbone_file(name, folder / BACKBONE_FILE, config.backbone_sha256)
    else:
        backbone = load_backbone_folder(name, folder / BACKBONE_DIR, config.backbone_sha256)
        check_meaning(config, backbone.spec, folder)
    if config.head_sha256 is not None:
        content = read_pinned("head", folder / HEAD_FILE, config.head_sha256)
        return TrainedModel(config, backbone, _read_head(content, config))
    assert config.tuning != "head"
    tunable = _tunable(backbone, config.num_classes, config.tuning, config.lora_rank or 1)
    _put_tuned(tunable, _read_tuned(folder / TUNED_FILE, str(config.tuned_sha256)), config)
    return TrainedModel(config, backbone, tunable)


def _trained(run_dir: Path, state: str) -> tuple[str, npt.NDArray[np.float32]]:
    with closing(Journal.read(run_dir)) as journal:
        entry = journal.find("model")
    if entry is None:
        raise RunError(f"{run_dir} has no model yet, it is {state}: wait, or `urna resume {run_dir}`")
    return str(entry.value["candidate"]), np.asarray(entry.arrays["vector"], dtype=np.float32)


def _backbone(name: str, pinned: str) -> "Backbone":
    from urna.models.loading import load_backbone

    return load_backbone(name, expected_sha256=pinned)


def _tunable(backbone: "Backbone", num_classes: int, tuning: Literal["lora", "full"], lora_rank: int) -> "Tunable":
    """The model as the sites trained it, at its start."""
    from urna.models.prepared import tunable_of

    return tunable_of(backbone, num_classes, tuning, lora_rank)


def _head_bytes(facts: CandidateSpec, vector: npt.NDArray[np.float32], num_classes: int) -> bytes:
    from safetensors.numpy import save

    from urna.models.tuning import head_from_vector

    head = head_from_vector(vector, facts.feature_dim, num_classes)
    arrays = {"weight": head.weight.detach().numpy(), "bias": head.bias.detach().numpy()}
    return bytes(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))


def _tuned_bytes(tunable: "Tunable") -> bytes:
    from safetensors.numpy import save

    weights = {name: np.ascontiguousarray(one.cpu().numpy()) for name, one in tunable.named_weights().items()}
    return bytes(save(weights))


def _replace_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder beside its place, then swap it in; a crash leaves the old one, the new one or none, never a mixture."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        for name, content in contents.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(content)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)


def _read_head(content: bytes, config: ModelConfig) -> npt.NDArray[np.float32]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from urna.models.tuning import head_from_vector

    wanted = {"weight": (config.num_classes, config.feature_dim), "bias": (config.num_classes,)}
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the head must be well-formed safetensors, found {type(error).__name__}: restore it") from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted or any(array.dtype != np.float32 for array in arrays.values()):
        raise ModelError(f"the head must hold float32 {wanted}, found {found}: restore it")
    vector = np.concatenate([arrays["weight"].ravel(), arrays["bias"]])
    head_from_vector(vector, config.feature_dim, config.num_classes)  # refuses numbers that are not finite
    return vector


def _read_tuned(path: Path, expected_sha256: str) -> dict[str, npt.NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from urna.models.candidate_file import read_limited

    content = read_limited(path, TUNED_LIMIT_BYTES, "the trained weights are missing", "restore the file")
    found = hashlib.sha256(content).hexdigest()
    if found != expected_sha256:
        raise ModelError(f"{path} must have sha256 {expected_sha256}, found {found}: restore the file")
    try:
        return dict(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} must be well-formed safetensors, found {type(error).__name__}: restore it") from None


def _put_tuned(tunable: "Tunable", arrays: Mapping[str, npt.NDArray[np.float32]], config: ModelConfig) -> None:
    """Set the trained weights to what the file holds, exactly."""
    import torch

    weights = tunable.named_weights()
    wanted = {name: tuple(one.shape) for name, one in weights.items()}
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted or any(array.dtype != np.float32 for array in arrays.values()):
        differing = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise ModelError(
            f"{TUNED_FILE} must hold the {len(wanted)} float32 tensors of {config.candidate} ({config.tuning}), "
            f"found others, such as {differing}: restore it, or use urna {config.urna_version[:20]}"
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ModelError(f"tensor {name!r} of {TUNED_FILE} must be finite, found NaN or infinity: restore it")
        weights[name].copy_(torch.from_numpy(array))
