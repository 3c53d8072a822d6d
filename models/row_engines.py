"""Engines that hold each example's gradient as a row, or make one row at a time, and then clip and add.

    hooks   The rule of each layer (`row_rules`, Opacus' where they are right), on what the layer was given and the gradient of
            what it gave; a layer without a rule is run again under vmap. One backward pass; b rows of p numbers in memory.
    vmap    The whole module as a function of its weights, differentiated for all examples at once: right for weights that no
            single call of a layer owns (tables that examples share); not for control flow that depends on the data.
    loop    One example at a time, b times: always right as long as examples do not touch, and it keeps no rows.

Opacus' `GradSampleModule` is not used whole: it records in training mode only, refuses frozen buffers, sees no keyword
arguments, wraps outputs so that in-place additions behind a layer fail, and leaves attributes on modules and parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from urna.models.engine_types import Clipped, factors, squared_row_norms
from urna.models.recurrent import Direction, RecurrentTwin, Sink, Watch
from urna.models.row_rules import Rows, rows_of, rule_of
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

RERUN_TOLERANCE = {False: 1e-3, True: 3e-2}  # of a layer that is run again, without and with bfloat16


def clip_and_add(rows: list[torch.Tensor], max_grad_norm: float, weights: torch.Tensor | None) -> Clipped:
    """Clip each example's whole gradient and add up; ``rows`` are float32 (b, size), one of each parameter."""
    squared_norms = torch.stack([squared_row_norms(part).float() for part in rows], dim=1)  # (b, k)
    scale = factors(squared_norms, max_grad_norm, weights)
    sound = torch.isfinite(squared_norms).all(1)
    if not bool(sound.all()):  # 0 * infinity is NaN: such rows have to go, not only their factor
        rows = [torch.where(sound[:, None], part, torch.zeros_like(part)) for part in rows]
    return Clipped(torch.cat([scale @ part for part in rows]), squared_norms)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough; the allocator of the CPU raises a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in words)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        yield


def _tensors(tree: object) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _detached(one: object) -> object:
    return one.detach() if isinstance(one, torch.Tensor) else one


def _as_float(one: object) -> object:
    return one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one


@dataclass(eq=False)
class _Call:
    """One call of a layer: what it was given, and where the gradient of each thing that it gave will appear.

    A direction of a recurrent twin is one call too: of what its inputs contribute to the gates.
    """

    layer: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    edges: dict[int, GradientEdge]  # of the outputs that have a gradient, by their place among all
    direction: Direction | None = None

    def __post_init__(self) -> None:
        self.args, self.kwargs = pytree.tree_map(_detached, (self.args, self.kwargs))
        self._versions = [one._version for one in self.given()]

    def given(self) -> list[torch.Tensor]:
        """The tensors among what the layer was given."""
        return _tensors((self.args, self.kwargs))

    def unchanged(self) -> bool:
        """Whether nothing was written into what the layer was given."""
        return [one._version for one in self.given()] == self._versions


@dataclass(eq=False)
class Hooks:
    """Per-example rows from one backward pass, layer by layer.

    Args:
        tunable: Its layers get forward hooks until `close`; nothing else of it is touched.

    Raises:
        ModelError: from `clipped_sum`, which names a parameter whose layer cannot say which example owns what.
    """

    tunable: Tunable
    name: str = field(default="hooks", init=False)
    _calls: list[_Call] = field(default_factory=list, init=False, repr=False)
    _rows: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)  # by place in the flat vector
    _listening: bool = field(default=False, init=False, repr=False)
    _size: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._places = {id(one): place for place, one in enumerate(self.tunable.parameters)}
        self._handles = []
        self._twins = []
        for layer in self.tunable.module.modules():
            if not self._owned(layer):
                continue
            if isinstance(layer, RecurrentTwin):
                self._twins.append(layer)
            else:
                self._handles.append(layer.register_forward_hook(self._record, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._twins = [], []

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """Clip each example's gradient to ``max_grad_norm``, weigh it, add up."""
        if not self._handles and not self._twins:
            raise RuntimeError("this engine was closed")
        self._size = len(next(iter(batch.values())))
        try:
            with self._listen():
                losses = self.tunable.loss(self.tunable.module, batch)
            edges = [edge for call in self._calls for edge in call.edges.values()]
            with torch.autocast(self.tunable.device.type, enabled=False):
                found = iter(torch.autograd.grad(losses.sum(), edges, allow_unused=True) if edges else ())
            while self._calls:
                call = self._calls.pop(0)
                self._add_call(call, {place: one for place in call.edges if (one := next(found)) is not None})
            rows = [
                self._rows.pop(place, one.new_zeros(())).expand(self._size, one.numel())
                for place, one in enumerate(self.tunable.parameters)
            ]
            with _full_precision(self.tunable.device):
                return clip_and_add(rows, max_grad_norm, weights)
        finally:
            self._calls, self._rows = [], {}

    @contextmanager
    def _listen(self) -> Iterator[None]:
        self._listening = True
        for twin in self._twins:
            twin.watch = Watch(self._before_gates, self._after_gates)
        try:
            yield
        finally:
            self._listening = False
            for twin in self._twins:
                del twin.watch

    def _owned(self, layer: nn.Module) -> dict[str, int]:
        """The layer's own name of each trained parameter that it holds itself -> the place in the flat vector."""
        return {name: self._places[id(one)] for name, one in layer._parameters.items() if id(one) in self._places}

    def _record(self, layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if self._listening:
            # an edge taken now is not moved by a later change in place
            edges = {place: get_gradient_edge(one) for place, one in enumerate(_tensors(output)) if one.requires_grad}
            self._calls.append(_Call(layer, args, kwargs, edges))

    def _add_call(self, call: _Call, gradients: dict[int, torch.Tensor]) -> None:
        if not gradients:  # what this call gave does not reach the loss
            return
        if call.direction is not None:
            self._add_gates(call.direction.weight_ih, call.direction.bias_ih, gradients[0], call.given()[0])
            return
        names = self._owned(call.layer)
        first = self.tunable.names[next(iter(names.values()))]
        if not call.unchanged():
            raise ModelError(f"what the layer of {first!r} was given must stay as it was, found it changed in place")
        rule = rule_of(call.layer)
        try:
            if rule is None or len(call.given()) != 1:
                rows = _rerun(call, gradients, self._size)
            else:
                with _full_precision(self.tunable.device):
                    rows = rows_of(rule, call.layer, call.given()[0], gradients[0], self._size)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(f"each example's gradient of {first!r} must be computable, found {reason!r}") from error
        except ModelError as error:
            raise ModelError(f"parameter {first!r}: {error}") from error
        for name, place in names.items():
            self._add(place, rows[name])

    def _add(self, place: int, row: torch.Tensor) -> None:
        row = row.detach().reshape(self._size, -1).float()
        before = self._rows.get(place)
        self._rows[place] = row if before is None else before + row  # tied weights, and layers that are called twice

    def _before_gates(self, direction: Direction, inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        gates = gates if gates.requires_grad else gates.detach().requires_grad_()
        self._calls.append(_Call(self._twins[0], (inputs,), {}, {0: get_gradient_edge(gates)}, direction))
        return gates

    def _after_gates(self, direction: Direction) -> Sink:
        def sink(gradients: torch.Tensor, states: torch.Tensor) -> None:
            self._add_gates(direction.weight_hh, direction.bias_hh, gradients, states)

        return sink

    def _add_gates(
        self, weight: nn.Parameter, bias: nn.Parameter | None, gradients: torch.Tensor, given: torch.Tensor
    ) -> None:  # (T, n, gates), (T, n, d)
        sequences = gradients.shape[1]
        if sequences % self._size:
            named = self.tunable.names[self._places.get(id(weight), 0)]
            raise ModelError(f"parameter {named!r}: a layer must be given a batch of {self._size}, found {sequences} sequences")
        with _full_precision(self.tunable.device):
            parts = [one.detach().float().reshape(len(one), self._size, -1, one.shape[2]) for one in (gradients, given)]
            if (place := self._places.get(id(weight))) is not None:
                self._add(place, torch.einsum("tbmg,tbmd->bgd", *parts))
            if bias is not None and (place := self._places.get(id(bias))) is not None:
                self._add(place, parts[0].sum((0, 2)))


def _rerun(call: _Call, gradients: Mapping[int, torch.Tensor], size: int) -> Rows:
    """Run the layer again for each example and differentiate it by the parameters that it holds itself."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    leaves = [_as_float(one) for one in leaves]
    own = {name: one.detach() for name, one in call.layer._parameters.items() if one is not None and one.requires_grad}
    batched = [isinstance(one, torch.Tensor) and one.ndim > 0 and len(one) == size for one in leaves]
    if not any(batched) or any(not one.ndim or len(one) != size for one in gradients.values()):
        raise ModelError(f"a layer must be given a batch of {size}, found none among its inputs: no example owns its gradient")

    def product(weights: dict[str, torch.Tensor], given: list[object], wanted: dict[int, torch.Tensor]) -> torch.Tensor:
        args, kwargs = pytree.tree_unflatten(given, spec)
        outputs = _tensors(torch.func.functional_call(call.layer, weights, args, kwargs))
        return torch.stack([(outputs[place].float() * one).sum() for place, one in wanted.items()]).sum()

    def of_one(weights: dict[str, torch.Tensor], given: list[object], wanted: dict[int, torch.Tensor]) -> torch.Tensor:
        inputs = [
            one.unsqueeze(0) if has_batch and isinstance(one, torch.Tensor) else one
            for one, has_batch in zip(given, batched, strict=True)
        ]
        return product(weights, inputs, {place: one.unsqueeze(0) for place, one in wanted.items()})

    wanted = {place: one.float() for place, one in gradients.items()}
    device_type = next(iter(wanted.values())).device.type
    with torch.autocast(device_type, enabled=False):
        in_dims = (None, [0 if one else None for one in batched], 0)
        rows: Rows = torch.vmap(torch.func.grad(of_one), in_dims)(own, leaves, wanted)
        true: Rows = torch.func.grad(product)(own, leaves, wanted)
    lower = any(one.dtype == torch.bfloat16 for one in gradients.values())
    for name, row in rows.items():  # an input that belongs to no example may happen to have the batch's length
        allowed = RERUN_TOLERANCE[lower] * row.reshape(size, -1).norm(dim=1).sum().clamp(min=1e-9)
        if bool((row.sum(0) - true[name]).norm() > allowed):  # NaN compares as not greater
            raise ModelError("the examples' gradients must add up to the batch's, found that they do not")
    return rows


class _Loss(nn.Module):
    """The loss as a module, since `functional_call` swaps the weights of one."""

    def __init__(self, tunable: Tunable) -> None:
        super().__init__()
        self.module = tunable.module
        self._loss = tunable.loss

    def forward(self, batch: Batch) -> torch.Tensor:
        """Each example's loss (b,)."""
        return self._loss(self.module, batch)


@dataclass(eq=False)
class Vmap:
    """Per-example rows of the whole module at once.

    Raises:
        ModelError: from `clipped_sum`: the module's code cannot be run for all examples at once.
    """

    tunable: Tunable
    name: str = field(default="vmap", init=False)

    def __post_init__(self) -> None:
        loss = _Loss(self.tunable)
        names = [f"module.{name}" for name in self.tunable.names]

        def of_one(weights: tuple[torch.Tensor, ...], example: dict[str, torch.Tensor]) -> torch.Tensor:
            batch = {name: part.unsqueeze(0) for name, part in example.items()}
            total: torch.Tensor = torch.func.functional_call(loss, dict(zip(names, weights, strict=True)), (batch,)).sum()
            return total

        self._gradients = torch.vmap(torch.func.grad(of_one), in_dims=(None, 0))

    def close(self) -> None:
        """Nothing was changed."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """Clip each example's gradient to ``max_grad_norm``, weigh it, add up."""
        here = tuple(one.detach() for one in self.tunable.parameters)
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for all examples at once: slow, and a warning
                rows = self._gradients(here, dict(batch))
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(f"the module must run for all examples at once, found {reason!r}") from error
        with _full_precision(self.tunable.device):
            return clip_and_add([row.detach().reshape(len(row), -1).float() for row in rows], max_grad_norm, weights)


@dataclass(eq=False)
class Loop:
    """One example at a time; only the sum is kept."""

    tunable: Tunable
    name: str = field(default="loop", init=False)

    def close(self) -> None:
        """Nothing was changed."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """Clip each example's gradient to ``max_grad_norm``, weigh it, add up."""
        total = torch.zeros(self.tunable.size, device=self.tunable.device)
        squared_norms = []
        for i in range(len(next(iter(batch.values())))):
            loss = self.tunable.loss(self.tunable.module, {name: part[i : i + 1] for name, part in batch.items()}).sum()
            with torch.autocast(self.tunable.device.type, enabled=False):
                found = torch.autograd.grad(loss, self.tunable.parameters, allow_unused=True)
            rows = [
                (torch.zeros_like(one) if part is None else part).detach().reshape(1, -1).float()
                for part, one in zip(found, self.tunable.parameters, strict=True)
            ]
            with _full_precision(self.tunable.device):
                alone = clip_and_add(rows, max_grad_norm, None if weights is None else weights[i : i + 1])
            total += alone.total
            squared_norms.append(alone.squared_norms)
        return Clipped(total, torch.cat(squared_norms))
