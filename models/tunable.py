"""A model with what a tuning mode trains of it, as one flat vector.

    mode    what is trained                                                     how per-example gradients come about
    head    a linear layer on frozen features                                   `tuning.per_example_gradients`, cached features
    lora    one low-rank factor beside linear layers (see `lora`), the head     `engines`
    full    every weight that per-example gradients exist for, the head         `engines`

The vector is an *offset* from the start: zeros are the pretrained weights with an all-zero head, so sites start alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from urna.models.tuning import HEAD_FEATURE_NORM
from urna.protocol.errors import ModelError

Batch = Mapping[str, torch.Tensor]  # each tensor (b, ...): the example comes first
PerExampleLoss = Callable[[nn.Module, Batch], torch.Tensor]  # (module, batch) -> (b,); outside of the module, never a mean
LABELS = "labels"  # the entry of a classifier's batch that the loss reads; all others are the backbone's


class Classifier(nn.Module):
    """A backbone's features, centred and scaled as for head tuning, and a linear head on them."""

    feature_mean: torch.Tensor
    feature_scale: torch.Tensor

    def __init__(self, backbone: nn.Module, feature_mean: torch.Tensor, feature_scale: torch.Tensor, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("feature_mean", feature_mean)
        self.register_buffer("feature_scale", feature_scale)
        self.head = nn.Linear(feature_mean.numel(), num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Each (b, ...) -> logits (b, num_classes)."""
        features = (self.backbone(**inputs) - self.feature_mean) * self.feature_scale
        logits: torch.Tensor = self.head(functional.normalize(features, dim=1) * HEAD_FEATURE_NORM)
        return logits


def cross_entropy(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Each example's loss (b,) of a `Classifier`."""
    inputs = {name: tensor for name, tensor in batch.items() if name != LABELS}
    return functional.cross_entropy(module(**inputs), batch[LABELS], reduction="none")


@dataclass(eq=False)
class Tunable:
    """A module in eval mode whose trained parameters, in the module's order, are one flat vector of p numbers.

    Args:
        module: Whole; its parameters that require a gradient are those that are trained.
        loss: Of each example, outside of the module.
        notes: What was repaired or frozen so that per-example gradients exist, in words.
        share_trained: Of the weights that the mode would train, the part that is left.
    """

    module: nn.Module
    loss: PerExampleLoss = cross_entropy
    notes: tuple[str, ...] = ()
    share_trained: float = 1.0
    names: tuple[str, ...] = field(init=False)
    parameters: tuple[nn.Parameter, ...] = field(init=False)
    _start: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        named = [(name, one) for name, one in self.module.named_parameters() if one.requires_grad]
        if not named:
            raise ModelError("expected parameters that can be trained, found none: choose another tuning mode")
        self.names = tuple(name for name, _ in named)
        self.parameters = tuple(one for _, one in named)
        self._start = self._flat().cpu()

    @property
    def size(self) -> int:
        """The number p of trained weights."""
        return sum(one.numel() for one in self.parameters)

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return self.parameters[0].device

    def load(self, offset: NDArray[np.float32]) -> None:
        """Set the trained parameters to the start plus ``offset`` (p,).

        Raises:
            ModelError: the vector has another length or type, or holds a value that is not finite.
        """
        if offset.shape != (self.size,) or offset.dtype != np.float32:
            raise ModelError(
                f"the vector of this model must be float32 ({self.size},), found {offset.dtype} {offset.shape}: "
                "was it trained for another candidate?"
            )
        if not np.isfinite(offset).all():
            raise ModelError("the vector of a model must be finite, found NaN or infinity: the training diverged")
        self._put(self._start + torch.from_numpy(offset))

    def named_weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters as they are now, detached, by name."""
        return {name: one.detach() for name, one in zip(self.names, self.parameters, strict=True)}

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat vector (p,) as views in the parameters' shapes, by name."""
        parts = torch.split(vector, [one.numel() for one in self.parameters])
        return {name: part.view_as(one) for name, part, one in zip(self.names, parts, self.parameters, strict=True)}

    def _flat(self) -> torch.Tensor:
        return torch.cat([one.detach().reshape(-1).float() for one in self.parameters])

    def _put(self, flat: torch.Tensor) -> None:
        with torch.no_grad():
            for name, part in self.split(flat).items():
                self.module.get_parameter(name).copy_(part)
