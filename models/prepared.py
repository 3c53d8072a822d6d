"""A candidate made ready for a tuning mode: copied, given a head, repaired, and checked before it sees a record.

    backbone -> classifier -> low-rank factors, or every weight -> repairs -> engine that passes the preflight

What is trained, and in which order, depends on the weights, the mode and this version alone, so the server and all sites agree
on the vector; which engine serves depends on nothing that leaves.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from urna.models.engine_types import Engine, Precision
from urna.models.engines import choose
from urna.models.loading import Backbone, filled, resolve_device
from urna.models.lora import SCALE, add_lora
from urna.models.parts import MicroBatches, autocasting, micro_batches
from urna.models.preflight import PreflightReport
from urna.models.repairs import repair
from urna.models.tunable import LABELS, Batch, Classifier, Tunable, cross_entropy

NUM_SYNTHETIC = 5  # examples; no layer of a model has this many of anything


@dataclass(frozen=True, eq=False)
class Prepared:
    """A candidate that may be trained on records.

    Args:
        backbone: Whose adapter makes inputs of records; its own module stays frozen and as it was.
        tunable: A copy with a head; what is trained.
        engine: The fastest that passed the preflight.
        report: What the preflight measured.
        fallbacks: Why faster engines do not serve, one sentence each.
        parts: The engine, given parts of one number of slots.
        num_classes: Outputs of the head.
    """

    backbone: Backbone
    tunable: Tunable
    engine: Engine
    report: PreflightReport
    fallbacks: tuple[str, ...]
    parts: MicroBatches
    num_classes: int


def clipped_sum(prepared: Prepared, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the clipped gradients of examples of one length, in parts of one number of slots.

    Args:
        prepared: At the weights where the gradients are wanted.
        batch: Of any size, 0 included; on any device.
        max_grad_norm: C, the largest L2 norm of one example's gradient.
        weights: (b,), what each clipped gradient is multiplied by; None is 1.

    Returns:
        float32 (p,).

    Raises:
        ModelError: memory is not enough for a part.
    """
    device = prepared.tunable.device
    there = {name: one.to(device) for name, one in batch.items()}
    return prepared.parts.clipped_sum(there, max_grad_norm, None if weights is None else weights.to(device)).total


def logits(prepared: Prepared, batch: Batch) -> NDArray[np.float32]:
    """The tuned model's answer to inputs of one length, without labels: (b, num_classes), in parts as for training."""
    tunable, size = prepared.tunable, prepared.parts.size
    blank = {name: one for name, one in prepared.parts.blank.items() if name != LABELS}
    whole = {name: one.to(tunable.device) for name, one in batch.items() if name != LABELS}
    num_examples = len(next(iter(whole.values())))
    found = [np.zeros((0, prepared.num_classes), np.float32)]
    for start in range(0, num_examples, size):
        some = {name: one[start : start + size] for name, one in whole.items()}
        with torch.no_grad(), autocasting(tunable.device, prepared.parts.precision):
            answer = tunable.module(**filled(some, blank, size))
        found.append(answer.float().cpu().numpy()[: num_examples - start])
    return np.concatenate(found)


def prepare(
    backbone: Backbone,
    num_classes: int,
    tuning: Literal["lora", "full"],
    *,
    lora_rank: int = 8,
    device: str = "cpu",
    precision: Literal["auto", "float32", "bfloat16"] = "float32",
    micro_batch: int | None = None,
) -> Prepared:
    """Copy a candidate, repair the copy, and choose the fastest engine that computes its per-example gradients rightly.

    Args:
        backbone: Stays as it is.
        num_classes: Outputs of the head.
        tuning: What is trained.
        lora_rank: The inner dimension of low-rank factors.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: Of the forward and backward pass; gradients, norms and sums are float32. ``auto`` is bfloat16 where a CUDA
            device has it.
        micro_batch: The most examples at once; None leaves it to the memory.

    Raises:
        ModelError: the mode cannot train this candidate, or no engine is right for it.
    """
    tunable = tunable_of(backbone, num_classes, tuning, lora_rank)
    where = resolve_device(device)
    if where.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # 10 bits of a convolution's gradient would be too few for the clip
    tunable.module.to(where)
    batch = {name: one.to(where) for name, one in _synthetic(backbone, num_classes).items()}
    chosen = choose(tunable, batch, tuning, _resolved(precision, where))
    blank = {name: one.to(where) for name, one in _blank(backbone).items()}
    parts = micro_batches(chosen.engine, tunable, blank, limit=micro_batch, precision=chosen.precision)
    parts.settle()
    return Prepared(backbone, tunable, chosen.engine, chosen.report, chosen.fallbacks, parts, num_classes)


def _resolved(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def trained_size(backbone: Backbone, num_classes: int, tuning: Literal["lora", "full"], lora_rank: int = 8) -> int:
    """The length p of the vector that `prepare` would train, without a preflight.

    Raises:
        ModelError: the mode cannot train this candidate.
    """
    return tunable_of(backbone, num_classes, tuning, lora_rank).size


def tunable_of(backbone: Backbone, num_classes: int, tuning: Literal["lora", "full"], lora_rank: int = 8) -> Tunable:
    """A repaired copy with a head, at its start; on the processor, for what is frozen must not depend on a device.

    Raises:
        ModelError: the mode cannot train this candidate.
    """
    body = copy.deepcopy(backbone.module)
    body.requires_grad_(tuning == "full")
    module = Classifier(body, backbone.feature_mean.clone(), backbone.feature_scale.clone(), num_classes)
    if tuning == "lora":
        add_lora(module, lora_rank, alpha=SCALE * lora_rank)
    with torch.no_grad():  # behind a head of zeros nothing would get a gradient, and all would look unused
        module.head.weight.fill_(1.0).mul_(torch.linspace(-1.0, 1.0, module.head.weight.numel()).view_as(module.head.weight))
    repairs = repair(module, _synthetic(backbone, num_classes), cross_entropy)
    with torch.no_grad():
        module.head.weight.zero_()
    return Tunable(module, cross_entropy, repairs.notes, repairs.share_trained)


def _synthetic(backbone: Backbone, num_classes: int) -> dict[str, torch.Tensor]:
    labels = torch.arange(NUM_SYNTHETIC) % num_classes
    return {**backbone.synthetic(NUM_SYNTHETIC, seed=0), LABELS: labels}


def _blank(backbone: Backbone) -> dict[str, torch.Tensor]:
    """One example that is nobody's, as long as one can be; where no adapter reads records yet, a synthetic one."""
    inputs = backbone.blank() if backbone.has_adapter else {k: one[:1] for k, one in backbone.synthetic(2, seed=0).items()}
    return {**inputs, LABELS: torch.zeros(1, dtype=torch.int64)}
