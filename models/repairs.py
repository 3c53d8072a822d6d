"""The smallest changes that make per-example gradients exist; none changes what the module computes in eval mode.

    found                                        repair
    dropout, batch statistics                    eval mode everywhere; no buffer is ever trained or updated
    batch normalisation behind a convolution     folded into it; its shift is still trained
    activations in place                         out of place
    position ids without a batch axis            repeated for each example
    nn.LSTM, nn.GRU, nn.RNN, attention           twins made of steps and layers that can be seen
    parameters without a gradient                frozen
    parameters that no example owns              frozen, where enough of the mode's weights is left

All sites and the server must come to the same trained parameters: nothing here depends on values in the batch, on a random
number or on the machine.

Not covered:
    parameters that no example owns, where too little would be left: whole-module engines have to serve those;
    whether a repair was enough: `preflight` says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree

from urna.models.attention import AttentionTwin
from urna.models.recurrent import RecurrentTwin, recurrent_twin
from urna.models.tunable import Batch, PerExampleLoss
from urna.protocol.errors import ModelError

MIN_SHARE = 0.7  # of the mode's weights that must be left before parameters that no example owns are frozen
FOLD_TOLERANCE = 1e-4  # relative change of the losses and outputs that floating point may explain

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Repairs:
    """What was changed.

    Args:
        notes: One sentence each, in plain words.
        share_trained: Of the weights that the mode would train, the part that is left.
    """

    notes: tuple[str, ...]
    share_trained: float


def repair(module: nn.Module, batch: Batch, loss: PerExampleLoss) -> Repairs:
    """Make per-example gradients exist, in place.

    Args:
        module: Its parameters that require a gradient are those that the mode would train.
        batch: Synthetic, of a size that is no other dimension of the model, and no divisor of one: 5, say.
        loss: Of each example, outside of the module.

    Raises:
        ModelError: nothing that could be trained is left, or the module cannot compute the batch.
    """
    size = len(next(iter(batch.values())))
    if size < 2:
        raise ValueError(f"a repair needs at least 2 examples to see what belongs to each, found {size}")
    mode_size = _num_trained(module)
    if not mode_size:
        raise ModelError("expected parameters that can be trained, found none: choose another tuning mode")
    _freeze_behaviour(module)
    notes = [_take_out_of_place(module), *_put_twins(module)]
    notes.append(_fold(module, batch, loss))
    notes.append(_repeat_position_ids(module, batch, loss))
    notes += _freeze_parameters(module, batch, loss, size, mode_size)
    if not _num_trained(module):
        raise ModelError("expected parameters that reach the loss, found none: choose another tuning mode")
    return Repairs(tuple(note for note in notes if note), _num_trained(module) / mode_size)


def _num_trained(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad)


def _own_trained(layer: nn.Module) -> list[nn.Parameter]:
    return [one for one in layer.parameters(recurse=False) if one.requires_grad]


def _freeze_behaviour(module: nn.Module) -> None:
    module.eval()
    for buffer in module.buffers():
        if buffer.requires_grad and buffer.is_leaf:
            buffer.requires_grad_(False)


def _take_out_of_place(module: nn.Module) -> str:
    found = [layer for layer in module.modules() if getattr(layer, "inplace", False) is True]
    for layer in found:
        setattr(layer, "inplace", False)  # noqa: B010  # torch declares it on each class alone
    return f"switched {len(found)} activations from in place to out of place" if found else ""


def _put_twins(module: nn.Module) -> Iterator[str]:
    def is_recurrent(layer: nn.Module) -> bool:
        return isinstance(layer, nn.RNNBase) and not isinstance(layer, RecurrentTwin)

    recurrent = _replace(module, is_recurrent, lambda layer: recurrent_twin(layer) if isinstance(layer, nn.RNNBase) else layer)
    if recurrent:
        yield f"replaced {recurrent} recurrent layers by twins whose steps can be seen; their parameters keep their names"
    attention = _replace(
        module,
        lambda layer: type(layer) is nn.MultiheadAttention,
        lambda layer: AttentionTwin(layer) if isinstance(layer, nn.MultiheadAttention) else layer,
    )
    if attention:
        yield f"replaced {attention} nn.MultiheadAttention by twins of linear layers: q_proj, k_proj, v_proj, out_proj"


def _replace(module: nn.Module, wanted: Callable[[nn.Module], bool], twin_of: Callable[[nn.Module], nn.Module]) -> int:
    """Put a twin in the place of each wanted layer that is trained; a layer in two places gets one twin."""
    twins: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for layer in parent.children():
            if layer not in twins and wanted(layer) and any(one.requires_grad for one in layer.parameters()):
                with suppress(ModelError):  # no twin exists for such settings: the preflight finds who can serve the layer
                    twins[layer] = twin_of(layer)
        for name, child in list(parent._modules.items()):
            if child in twins:
                parent._modules[name] = twins[child]
    return len(twins)


# --- what a forward pass shows -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """One call of a layer in the probe; the tensors are kept, so that none is taken for another at the same address."""

    layer: nn.Module
    given: list[torch.Tensor]
    gave: list[torch.Tensor]


@contextmanager
def _watching(layers: list[nn.Module]) -> Iterator[list[_Seen]]:
    seen: list[_Seen] = []

    def record(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        seen.append(_Seen(layer, _tensors((args, kwargs)), _tensors(output)))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(tree: object) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _outcome(module: nn.Module, batch: Batch, loss: PerExampleLoss) -> list[torch.Tensor]:
    """The losses and the last outputs, so that a repair can be seen to change nothing; a zero head hides behind neither."""
    leaves = [layer for layer in module.modules() if _own_trained(layer)]
    with torch.no_grad(), _watching(leaves) as seen:
        losses = loss(module, batch)
    return [losses, *(seen[-1].given if seen else []), *(seen[-1].gave if seen else [])]


def _same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    if [one.shape for one in before] != [one.shape for one in after]:
        return False
    floats = [(one, two) for one, two in zip(before, after, strict=True) if one.is_floating_point()]
    return all(bool((one - two).norm() <= FOLD_TOLERANCE * one.norm().clamp(min=1e-6)) for one, two in floats)


# --- batch normalisation -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Fold:
    convolution: Convolution
    norm: BatchNorm
    _kept: list[torch.Tensor] = field(default_factory=list)

    def _touched(self) -> list[torch.Tensor]:
        tensors = (self.convolution.weight, self.convolution.bias, self.norm.weight, self.norm.bias)
        return [one for one in (*tensors, self.norm.running_mean, self.norm.running_var) if one is not None]

    @torch.no_grad()
    def do(self) -> None:
        """Scale the convolution, leave the shift; a bias of the convolution goes into the shift."""
        self._kept = [one.detach().clone() for one in self._touched()]
        norm, convolution = self.norm, self.convolution
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        mean = norm.running_mean.double() - (0.0 if convolution.bias is None else convolution.bias.double())
        norm.bias.copy_(norm.bias.double() - mean * scale)
        convolution.weight.copy_(convolution.weight.double() * scale.view(-1, *(1,) * (convolution.weight.dim() - 1)))
        norm.weight.fill_(1.0)
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0 - norm.eps)
        if convolution.bias is not None:
            convolution.bias.zero_()

    @torch.no_grad()
    def undo(self) -> None:
        for one, kept in zip(self._touched(), self._kept, strict=True):
            one.copy_(kept)

    def freeze(self) -> None:
        """The scale is in the convolution now, and the convolution's bias in the shift."""
        self.norm.weight.requires_grad_(False)
        if self.convolution.bias is not None:
            self.convolution.bias.requires_grad_(False)


def _fold(module: nn.Module, batch: Batch, loss: PerExampleLoss) -> str:
    norms = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    if not norms:
        return ""
    before = _outcome(module, batch, loss)
    done = _folds(module, batch, loss)
    for fold in done:
        fold.do()
    if not _same(before, _outcome(module, batch, loss)):
        for fold in done:
            fold.undo()
        done = [fold for fold in done if _holds(fold, before, module, batch, loss)]
    for fold in done:
        fold.freeze()
    kept = len(norms) - len(done)
    folded = f"folded {len(done)} batch normalisations into the convolutions before them, their shifts are trained"
    frozen = f"froze the statistics of {kept} batch normalisations"
    return "; ".join(note for note, count in ((folded, len(done)), (frozen, kept)) if count)


def _holds(fold: _Fold, before: list[torch.Tensor], module: nn.Module, batch: Batch, loss: PerExampleLoss) -> bool:
    fold.do()
    if _same(before, _outcome(module, batch, loss)):
        return True
    fold.undo()
    return False


def _folds(module: nn.Module, batch: Batch, loss: PerExampleLoss) -> list[_Fold]:
    """Pairs of a trained convolution and the trained normalisation that alone is given what it gave."""
    layers: list[nn.Module] = [layer for layer in module.modules() if isinstance(layer, BatchNorm | Convolution)]
    with torch.no_grad(), _watching(layers) as seen:
        loss(module, batch)
    calls = {layer: [one for one in seen if one.layer is layer] for layer in layers}
    holders = [id(one) for layer in module.modules() for one in layer._parameters.values() if one is not None]
    found = []
    for norm in layers:
        if not isinstance(norm, BatchNorm) or len(calls[norm]) != 1 or not _can_be_folded(norm):
            continue
        given = calls[norm][0].given[0]
        makers = [one.layer for one in seen if one.gave[0] is given]
        if len(makers) != 1 or not isinstance(convolution := makers[0], Convolution) or len(calls[convolution]) != 1:
            continue
        alone = all(holders.count(id(one)) == 1 for one in (*convolution.parameters(), *norm.parameters()))
        if alone and convolution.weight.requires_grad and norm.num_features == convolution.out_channels:
            found.append(_Fold(convolution, norm))
    return found


def _can_be_folded(norm: BatchNorm) -> bool:
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    return has_statistics and norm.affine and norm.weight.requires_grad and norm.bias.requires_grad


# --- position ids --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _BatchSize:
    """How many examples the module is computing, while it does."""

    value: int = 1

    def note(self, _layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.value = next((len(one) for one in _tensors((args, kwargs)) if one.ndim), 1)

    def forget(self, _layer: nn.Module, _args: tuple[object, ...], _output: object) -> None:
        self.value = 1  # a layer that is run again on its own is given single examples


@dataclass(eq=False)
class _Repeat:
    """A forward pre-hook: indices without a batch axis, (1, s), become (b, s), so that each example owns its rows."""

    batch: _BatchSize

    def __call__(self, _layer: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        indices = args[0] if args else None
        if not isinstance(indices, torch.Tensor) or indices.ndim < 2 or len(indices) != 1 or self.batch.value == 1:
            return None
        return (indices.expand(self.batch.value, *indices.shape[1:]), *args[1:])


def _repeat_position_ids(module: nn.Module, batch: Batch, loss: PerExampleLoss) -> str:
    layers: list[nn.Module] = [one for one in module.modules() if isinstance(one, nn.Embedding) and _own_trained(one)]
    with torch.no_grad(), _watching(layers) as seen:
        loss(module, batch)
    wanted = {one.layer for one in seen if one.given and one.given[0].ndim >= 2 and len(one.given[0]) == 1}
    if not wanted:
        return ""
    before, count, state = _outcome(module, batch, loss), 0, _BatchSize()
    handles = [
        module.register_forward_pre_hook(state.note, with_kwargs=True, prepend=True),
        module.register_forward_hook(state.forget, always_call=True),
    ]
    for layer in layers:
        if layer not in wanted:
            continue
        handle = layer.register_forward_pre_hook(_Repeat(state))
        try:
            unchanged = _same(before, _outcome(module, batch, loss))
        except RuntimeError:  # the shapes behind it do not allow a batch axis
            unchanged = False
        if unchanged:
            count += 1
        else:
            handle.remove()
    if not count:
        for handle in handles:
            handle.remove()
        return ""
    return f"gave the indices of {count} embeddings a batch axis, so that each example owns its rows"


# --- parameters ----------------------------------------------------------------------------------------------------------


def _freeze_parameters(module: nn.Module, batch: Batch, loss: PerExampleLoss, size: int, mode_size: int) -> Iterator[str]:
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    with torch.enable_grad(), _watching([layer for layer in module.modules() if _own_trained(layer)]) as seen:
        losses = loss(module, batch)
        if losses.shape != (size,):
            raise ModelError(f"the loss must be one number for each of {size} examples, found {tuple(losses.shape)}")
        gradients = torch.autograd.grad(losses.sum(), [one for _, one in named], allow_unused=True)
    unused = [pair for pair, gradient in zip(named, gradients, strict=True) if gradient is None]
    for _, one in unused:
        one.requires_grad_(False)
    if unused:
        yield _frozen_note(unused, len(named), "that the loss does not depend on", _num_trained(module) / mode_size)
    owned = _owned_by_examples(seen, size)
    shared = [(name, one) for name, one in named if one.requires_grad and id(one) not in owned]
    left = (_num_trained(module) - sum(one.numel() for _, one in shared)) / mode_size
    if not shared:
        return
    if left < MIN_SHARE:
        names = _some([name for name, _ in shared])
        yield f"kept {len(shared)} of {len(named)} parameters that no example owns, {left:.1%} would be left: {names}"
        return
    for _, one in shared:
        one.requires_grad_(False)
    yield _frozen_note(shared, len(named), "that no example owns", left)


def _owned_by_examples(seen: list[_Seen], size: int) -> set[int]:
    """Parameters (by id) whose layers were given a batch, or parts of one, in every call."""
    owned: set[int] = set()
    shared: set[int] = set()
    for call in seen:
        by_example = all(
            any(one.ndim and len(one) and len(one) % size == 0 for one in part) for part in (call.given, call.gave)
        )
        in_sight = by_example or isinstance(call.layer, RecurrentTwin)  # a twin may be given (T, b, d)
        (owned if in_sight else shared).update(id(one) for one in call.layer.parameters(recurse=False))
    return owned - shared


def _frozen_note(frozen: list[tuple[str, nn.Parameter]], total: int, why: str, left: float) -> str:
    return f"froze {len(frozen)} of {total} parameters {why}: {_some([name for name, _ in frozen])}, {left:.1%} left"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
