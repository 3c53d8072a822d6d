"""config.json of a model folder: which files belong together, what they mean, and whether this version means the same."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

import urna
from urna.models.catalogue import CATALOGUE, CandidateSpec, spec
from urna.protocol.errors import ModelError
from urna.protocol.messages import Sha256
from urna.protocol.plan import Name
from urna.server.report import Report

HEAD_FILE, TUNED_FILE = "head.safetensors", "tuned.safetensors"
CONFIG_LIMIT_BYTES = 2**18
Line = Annotated[str, Field(max_length=1000)]


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """config.json: which files belong together, and what they mean; format 1 has heads on built-in candidates only."""

    format: Literal["urna-model-1", "urna-model-2"] = "urna-model-1"
    candidate: Name
    modality: Literal["image", "text"] = "image"
    architecture: str
    architecture_config: dict[str, int]
    tuning: Literal["head", "lora", "full"] = "head"
    lora_rank: Annotated[int, Field(ge=1, le=256)] | None = None
    num_classes: Annotated[int, Field(ge=2, le=1000)]
    input_shape: Annotated[tuple[int, ...], Field(max_length=4)]  # of an image after the adapter: channels, height, width
    feature_dim: Annotated[int, Field(ge=1)]
    feature_centring: Literal["backbone.safetensors: (feature - feature_mean) * feature_scale"] = (
        "backbone.safetensors: (feature - feature_mean) * feature_scale"
    )
    head_feature_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # to which centred features are scaled, row by row
    num_trained: Annotated[int, Field(ge=1)] | None = None  # numbers that the sites trained
    share_trained: Annotated[float, Field(ge=0, le=1)] = 1.0  # of the weights that the mode would train
    notes: tuple[Line, ...] = ()  # what was repaired or frozen for per-example gradients
    backbone_sha256: Sha256
    head_sha256: Sha256 | None = None
    tuned_sha256: Sha256 | None = None
    plan_sha256: Sha256
    run_id: str
    urna_version: str

    @model_validator(mode="after")
    def _weights_are_named(self) -> Self:
        is_head = self.tuning == "head"
        if (self.head_sha256 is not None) != is_head or (self.tuned_sha256 is not None) == is_head:
            raise ValueError(f"tuning {self.tuning!r} needs {'head' if is_head else 'tuned'}_sha256 and no other")
        if (self.lora_rank is not None) != (self.tuning == "lora"):
            raise ValueError("lora_rank belongs to tuning 'lora'")
        if self.format == "urna-model-1" and not (is_head and self.is_built_in):
            raise ValueError("format urna-model-1 is of heads on built-in candidates")
        return self

    @property
    def is_built_in(self) -> bool:
        """Whether the candidate comes with Urna."""
        return self.candidate in CATALOGUE

    @property
    def weights_file(self) -> str:
        """Which file holds what was trained."""
        return HEAD_FILE if self.tuning == "head" else TUNED_FILE


def common_facts(report: Report, facts: CandidateSpec, num_classes: int, backbone_sha256: str) -> dict[str, object]:
    """What config.json says of every mode."""
    from urna.models.tuning import HEAD_FEATURE_NORM

    architecture, settings = _architecture(facts)
    is_old = facts.name in CATALOGUE and report.plan["final"]["tuning"] == "head"  # as older versions read it
    return {
        "format": "urna-model-1" if is_old else "urna-model-2",
        "candidate": facts.name,
        "modality": facts.modality,
        "architecture": architecture,
        "architecture_config": settings,
        "num_classes": num_classes,
        "input_shape": facts.input_shape,
        "feature_dim": facts.feature_dim,
        "head_feature_norm": HEAD_FEATURE_NORM,
        "backbone_sha256": backbone_sha256,
        "plan_sha256": report.plan_sha256,
        "run_id": report.run_id,
        "urna_version": urna.__version__,
    }


def _architecture(facts: CandidateSpec) -> tuple[str, dict[str, int]]:
    """Of an installed candidate its family: the settings are in its own config.json."""
    from urna.models.vision import ARCHITECTURES

    if facts.name not in CATALOGUE:
        return facts.family, {}
    architecture, settings = ARCHITECTURES[facts.name]
    return architecture.__name__, dict(settings)


def config_bytes(config: ModelConfig) -> bytes:
    """As JSON; a folder of format 1 has that format's keys and no others."""
    new = {"modality", "lora_rank", "num_trained", "share_trained", "notes", "tuned_sha256"}
    text = config.model_dump_json(indent=2, exclude=new if config.format == "urna-model-1" else None)
    return text.encode() + b"\n"


def read_config(path: Path) -> ModelConfig:
    """Read config.json and check that this installation means the same by it.

    Raises:
        ModelError: it does not.
    """
    size = path.stat().st_size
    if size > CONFIG_LIMIT_BYTES:
        raise ModelError(f"{path} must have at most {CONFIG_LIMIT_BYTES} bytes, found {size}: restore it")
    try:
        config = ModelConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:3])
        raise ModelError(f"{path} must be the configuration of a model, found {wrong}: restore it") from None
    if config.is_built_in:
        check_meaning(config, spec(config.candidate), path)
    return config


def check_meaning(config: ModelConfig, facts: CandidateSpec, path: Path) -> None:
    """Check that the candidate of this installation, or of the folder, is the one that was configured.

    Raises:
        ModelError: it is not.
    """
    from urna.models.tuning import HEAD_FEATURE_NORM

    here = (*_architecture(facts), facts.modality, facts.feature_dim, facts.input_shape, HEAD_FEATURE_NORM)
    declared = (
        config.architecture,
        config.architecture_config,
        config.modality,
        config.feature_dim,
        config.input_shape,
        config.head_feature_norm,
    )
    if here != declared:
        raise ModelError(
            f"{config.candidate} must be {here} in this version of urna, found {declared} in {path}: "
            f"use urna {config.urna_version[:20]}"
        )
