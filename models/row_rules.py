"""How the per-example gradients of one layer come from what it was given and the gradient of what it gave.

Opacus' rules, and rules of our own where those are silent or wrong:

    Conv2d            Opacus reads inputs that are not contiguous in the wrong order: norms 0.4 to 0.9 times the true ones
    Embedding         Opacus gives the padding index a gradient, torch does not
    BatchNorm         with frozen statistics it is a scale and a shift of each channel; Opacus refuses it
    GPT-2's Conv1D    a linear layer with a transposed weight; Opacus has no rule
"""

from collections.abc import Callable

import torch
from torch import nn

from urna.protocol.errors import ModelError

Rows = dict[str, torch.Tensor]  # by the name that the layer itself gives the parameter; each (b, ...)
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor], Rows]  # (layer, input, gradient of output): contiguous, float32


def rule_of(layer: nn.Module) -> Rule | None:
    """How this layer's per-example gradients come about; None: there is no rule."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros":
        return None
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        return None
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        return _transposed_linear
    return _RULES.get(type(layer))


def rows_of(rule: Rule, layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor, size: int) -> Rows:
    """Each example's rows; what the layer was given may be ``size`` * m parts, those of one example after another.

    Raises:
        ModelError: it was given something else; which examples own which part is left to the preflight.
    """
    if not given.ndim or (given.is_floating_point() and given.ndim < 2) or len(given) % size or not len(given):
        raise ModelError(
            f"a layer must be given a batch of {size}, found a tensor {tuple(given.shape)}: no example owns its gradient"
        )
    given = (given.float() if given.is_floating_point() else given).contiguous()
    gradient = gradient.float().contiguous()
    if len(given) == size:
        return rule(layer, given, gradient)
    if rule in (_embedding, _transposed_linear) or isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return rule(layer, _parts(given, size), _parts(gradient, size))
    return {name: _parts(row, size).sum(1) for name, row in rule(layer, given, gradient).items()}


def _parts(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor.reshape(size, -1, *tensor.shape[1:])  # (b * m, ...) -> (b, m, ...)


def _by_opacus(layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor) -> Rows:
    from opacus.grad_sample import GradSampleModule  # takes seconds to import

    by_parameter = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [given], gradient)
    return {name: by_parameter[one] for name, one in layer._parameters.items() if one is not None and one.requires_grad}


def _embedding(layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor) -> Rows:
    assert isinstance(layer, nn.Embedding)
    size, indices = len(given), given.reshape(len(given), -1, 1)
    gradient = gradient.reshape(size, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        gradient = gradient.masked_fill(indices == layer.padding_idx, 0.0)
    row = gradient.new_zeros(size, *layer.weight.shape)
    return {"weight": row.scatter_add_(1, indices.expand(gradient.shape), gradient)}


def _transposed_linear(layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor) -> Rows:  # noqa: ARG001  # a rule's signature
    return {"weight": torch.einsum("b...i,b...o->bio", given, gradient), "bias": torch.einsum("b...o->bo", gradient)}


def _frozen_statistics(layer: nn.Module, given: torch.Tensor, gradient: torch.Tensor) -> Rows:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise ModelError("batch normalisation must use frozen statistics, found those of the batch: it mixes examples")
    channels = (1, -1) + (1,) * (given.ndim - 2)
    scale = (layer.running_var + layer.eps).rsqrt().view(channels)
    normalised = (given - layer.running_mean.view(channels)) * scale
    return {"weight": torch.einsum("bc...->bc", gradient * normalised), "bias": torch.einsum("bc...->bc", gradient)}


_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys((nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d), _by_opacus),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _frozen_statistics),
    nn.Embedding: _embedding,
}
