"""How many numbers a tuning mode trains of a candidate: public, and the same at the server and at every site.

For a head the catalogue's facts are enough and no library is loaded; for other modes the weights are read, for what is trained
depends on the architecture and on what had to be repaired or frozen. The operator's preflight runs here, too, before anything
is spent; each site runs its own, on its own machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from urna.models.catalogue import spec
from urna.protocol.errors import ModelError

Tuning = Literal["head", "lora", "full"]


@dataclass(frozen=True)
class TrainedSize:
    """The length p of a candidate's vector, and how it is trained.

    Args:
        size: p; 0 with a reason where the mode cannot train this candidate.
        reason: Why not.
        engine: The first of the mode's order that passed the preflight here; empty for a head, which needs none.
        share_trained: Of the weights that the mode would train, the part that is left.
        notes: What was repaired or frozen so that per-example gradients exist, in words.
        fallbacks: Why faster engines do not serve, one sentence each.
    """

    size: int
    reason: str = ""
    engine: str = ""
    share_trained: float = 1.0
    notes: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()


def trained_size_of(name: str, num_classes: int, tuning: Tuning, lora_rank: int) -> int:
    """The length p of what is trained of a candidate, without a preflight.

    Raises:
        ModelError: unknown or not installed, or the mode cannot train it.
    """
    if tuning == "head":
        return _head_size(name, num_classes)
    from urna.models.loading import artefact_sha256

    return _size(name, artefact_sha256(name), num_classes, tuning, lora_rank)


def try_trained_size(name: str, num_classes: int, tuning: Tuning, lora_rank: int) -> TrainedSize:
    """The same after a preflight, with a reason instead of an error where the mode cannot train the candidate.

    Raises:
        ModelError: unknown or not installed.
    """
    if tuning == "head":
        return TrainedSize(_head_size(name, num_classes))
    from urna.models.loading import artefact_sha256

    return _measured(name, artefact_sha256(name), num_classes, tuning, lora_rank)


def _head_size(name: str, num_classes: int) -> int:
    return (spec(name).feature_dim + 1) * num_classes


@lru_cache(maxsize=256)
def _size(name: str, sha256: str, num_classes: int, tuning: Literal["lora", "full"], lora_rank: int) -> int:
    from urna.models.loading import load_backbone
    from urna.models.prepared import trained_size

    return trained_size(load_backbone(name, expected_sha256=sha256), num_classes, tuning, lora_rank)


@lru_cache(maxsize=256)
def _measured(name: str, sha256: str, num_classes: int, tuning: Literal["lora", "full"], lora_rank: int) -> TrainedSize:
    from urna.models.loading import load_backbone
    from urna.models.prepared import prepare

    backbone = load_backbone(name, expected_sha256=sha256)
    try:
        prepared = prepare(backbone, num_classes, tuning, lora_rank=lora_rank)
    except ModelError as error:
        return TrainedSize(0, str(error))
    prepared.engine.close()
    tunable = prepared.tunable
    return TrainedSize(
        tunable.size,
        engine=prepared.engine.name,
        share_trained=tunable.share_trained,
        notes=tuple(tunable.notes),
        fallbacks=prepared.fallbacks,
    )
