"""Clipped sums from one backward pass: book-keeping (Bu, Wang, Zha, Karypis 2023, arXiv:2210.00038, algorithm 1).

Each layer's inputs a and output gradients g are all that its per-example gradients are made of. While the one backward pass
goes by, a `Term` is kept for each parameter and call: the rows themselves, (b, numel), where they are smaller than a and g, or
else a and g. Norms come from the terms (of a and g by Gram matrices: Goodfellow 2015, arXiv:1510.01799; Li et al. 2021,
arXiv:2110.05679), then one matrix product a layer makes the clipped sum.

Covered: Linear with any axes between, Conv1d/2d/3d with groups, strides and dilation, GPT-2's Conv1D, Embedding, LayerNorm,
RMSNorm, GroupNorm, InstanceNorm, BatchNorm with frozen statistics, recurrent twins, parameters that a module owns and uses by
broadcasting (class tokens, position tables, layer scales); layers that are called several times, weights that are tied.

Not covered, and refused when the engine is made or by the preflight: parameters that meet the examples in any other way
(tables of relative positions, XLNet's einsums, EmbeddingBag, packed sequences).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from urna.models.engine_types import Clipped, factors
from urna.models.recurrent import Direction, RecurrentTwin, Sink, Watch
from urna.models.terms import Convolved, Looked, Outer, Rows, Term, merged
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

Forward = Callable[..., torch.Tensor]
_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)  # a subclass may do more


class _Lookups(TorchFunctionMode):
    """While it is on, lookups in one weight are made by a function of ids."""

    def __init__(self, weight: torch.Tensor, look_up: Forward) -> None:
        super().__init__()
        self._weight, self._look_up = weight, look_up

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Every other function of torch is left alone."""
        del types
        if func is functional.embedding and args[1] is self._weight:
            return self._look_up(args[0])
        return func(*args, **(kwargs or {}))


class BookKeeping:
    """The engine for full tuning; see the module's text."""

    name = "book-keeping"

    def __init__(self, tunable: Tunable) -> None:
        self._tunable = tunable
        self._place = {id(one): at for at, one in enumerate(tunable.parameters)}
        self._terms: list[Term | None] = []
        self._leaves: list[torch.Tensor] = []
        self._size = 0
        self._axes: dict[str, int] = {}  # of a layer: its first axis, in batches
        self._ranks: dict[int, int] = {}  # of a parameter that a module owns: axes to put between the batch's and its own
        self._rules: list[tuple[nn.Module, Forward]] = []
        self._watches: list[tuple[RecurrentTwin, Watch]] = []
        self._owned: list[tuple[str, nn.Module, str]] = []  # module's name, module, parameter
        for name, module in tunable.module.named_modules():
            own = [key for key, one in module.named_parameters(recurse=False) if id(one) in self._place]
            if not own:
                continue
            if isinstance(module, RecurrentTwin):
                self._watches.append((module, Watch(partial(self._before, name), self._after)))
            elif (forward := self._rule(name, module)) is not None:
                self._rules.append((module, forward))
            else:
                self._owned += [(name, module, key) for key in own]

    def close(self) -> None:
        """Nothing is left on the module between calls."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """See `engine_types.Engine`.

        Raises:
            ModelError: a parameter meets the examples in a way that this engine does not know.
        """
        self._size = len(next(iter(batch.values())))
        self._terms, self._leaves = [None] * len(self._tunable.parameters), []
        try:
            with self._looking_on(), self._broadcast(batch):
                loss = self._tunable.loss(self._tunable.module, batch).float().sum()
                with torch.autocast(self._tunable.device.type, enabled=False):  # what the module computes in is its own affair
                    torch.autograd.grad(loss, self._leaves, allow_unused=True)
            with torch.autocast(self._tunable.device.type, enabled=False):
                return self._clipped(max_grad_norm, weights)
        finally:
            self._terms, self._leaves = [], []

    @torch.no_grad()
    def _clipped(self, max_grad_norm: float, weights: torch.Tensor | None) -> Clipped:
        terms = [Rows.none(self._size, one) if term is None else term for term, one in self._finished()]
        squared_norms = torch.stack([term.squared_norms() for term in terms], dim=1)  # (b, k)
        factor = factors(squared_norms, max_grad_norm, weights)
        finite = torch.isfinite(squared_norms).all(dim=1)
        if not bool(finite.all()):  # zero times infinity is not zero
            terms, factor = [term.take(finite) for term in terms], factor[finite]
        total = torch.empty(self._tunable.size, device=factor.device)
        sizes = [one.numel() for one in self._tunable.parameters]
        for term, one, part in zip(terms, self._tunable.parameters, torch.split(total, sizes), strict=True):
            term.weighted(factor, part.view_as(one))
        return Clipped(total, squared_norms)

    def _finished(self) -> Iterator[tuple[Term | None, nn.Parameter]]:
        return zip(self._terms, self._tunable.parameters, strict=True)

    @contextmanager
    def _looking_on(self) -> Iterator[None]:
        """Rules in the place of forwards; and autograd shall not compute what the terms will give."""
        for one in self._tunable.parameters:
            one.requires_grad_(False)
        for module, forward in self._rules:
            module.__dict__["forward"] = forward
        for twin, watch in self._watches:
            twin.watch = watch
        try:
            yield
        finally:
            for module, _ in self._rules:
                module.__dict__.pop("forward", None)
            for twin, _ in self._watches:
                twin.__dict__.pop("watch", None)
            for one in self._tunable.parameters:
                one.requires_grad_(True)

    # --- what is kept

    def _keep(self, parameter: torch.Tensor, term: Term) -> None:
        at = self._place.get(id(parameter))
        if at is not None:
            earlier = self._terms[at]
            self._terms[at] = term if earlier is None else merged(earlier, term)

    def _seen(self, output: torch.Tensor, sink: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Have ``sink`` called with the output's gradient."""
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
            self._leaves.append(output)
        output.register_hook(sink)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return output

    def _by_example(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """(b, T, d) from (b, ..., d) or from (k b, ..., d), as windows of images come; always the same k for a layer."""
        times, rest = divmod(len(tensor), self._size)
        if rest or (self._size > 1 and self._axes.setdefault(name, times) != times) or not times:
            raise ModelError(
                f"layer {name!r} must see one input an example, found a first axis of {len(tensor)} for {self._size} examples: "
                "its parameters are shared by the batch"
            )
        return tensor.detach().reshape(self._size, -1, tensor.shape[-1])

    # --- rules, one for each kind of layer

    def _rule(self, name: str, module: nn.Module) -> Forward | None:
        """What replaces a layer's forward; None where no rule knows the layer."""
        plain: object = type(module).forward
        whole = MethodType(type(module).forward, module)  # as it was, even while a rule is in its place
        match module:
            case nn.Linear() if plain is nn.Linear.forward:
                return partial(self._linear, name, module)
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if plain in _CONVOLUTIONS and module.padding_mode == "zeros":
                return partial(self._convolution, name, module)
            case nn.Embedding() if plain is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
                return partial(self._embedding, name, module)
            case nn.Embedding() if module.max_norm is None and not module.scale_grad_by_freq:  # BART's: scaled, or by position
                return partial(self._lookups_within, name, module, whole)
            case nn.LayerNorm() if plain is nn.LayerNorm.forward or getattr(module, "data_format", "") == "channels_last":
                axes = len(module.normalized_shape)
                return partial(self._norm, name, module, whole, partial(_layer_norm, module), -axes)
            case nn.LayerNorm() if getattr(module, "data_format", "") == "channels_first":  # ConvNeXt's
                return partial(self._norm, name, module, whole, partial(_layer_norm_of_channels, module), 1)
            case nn.RMSNorm() if len(module.normalized_shape) == 1:
                return partial(self._norm, name, module, whole, partial(_rms_norm, module), -1)
            case nn.GroupNorm() | nn.modules.batchnorm._BatchNorm() | nn.modules.instancenorm._InstanceNorm():
                if not module.training:
                    return partial(self._norm, name, module, whole, partial(_channel_norm, module), 1)
        if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's: a linear layer with its weight transposed
            return partial(self._turned_linear, name, module)
        return None

    def _linear(self, name: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        held = [x]  # let go of when it was used, not when autograd forgets the hook

        def sink(gradient: torch.Tensor) -> None:
            g, a = self._by_example(name, gradient), self._by_example(name, held.pop())
            self._keep(module.weight, Outer.smallest(g, a))
            if module.bias is not None:
                self._keep(module.bias, Rows(g.float().sum(1)))

        return self._seen(functional.linear(x, module.weight, module.bias), sink)

    def _turned_linear(self, name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        held = [x]

        def sink(gradient: torch.Tensor) -> None:
            g, a = self._by_example(name, gradient), self._by_example(name, held.pop())
            self._keep(weight, Outer.smallest(a, g))
            self._keep(bias, Rows(g.float().sum(1)))

        return self._seen(functional.linear(x, weight.T, bias), sink)

    def _convolution(self, name: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        held = [x]
        if len(x) != self._size:
            raise ModelError(f"layer {name!r} must see one input an example, found {len(x)} for {self._size} examples")

        def sink(gradient: torch.Tensor) -> None:
            self._keep(module.weight, Convolved.smallest(held.pop().detach(), gradient.detach(), module))
            if module.bias is not None:
                self._keep(module.bias, Rows(gradient.detach().float().flatten(2).sum(2)))

        return self._seen(module._conv_forward(x, module.weight, module.bias), sink)

    def _embedding(self, name: str, module: nn.Embedding, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1 < self._size:  # positions without a batch axis: the same for each example
            x = x.expand(self._size, *x.shape[1:])
        ids = self._by_example(name, x[..., None])[..., 0]  # (b, T)

        def sink(gradient: torch.Tensor) -> None:
            g = gradient.detach().reshape(*ids.shape, -1).float()
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx)[..., None]
            self._keep(module.weight, Looked.smallest(ids, g, module.num_embeddings))

        return self._seen(functional.embedding(x, module.weight, module.padding_idx), sink)

    def _lookups_within(self, name: str, module: nn.Embedding, whole: Forward, *args: object, **kwargs: object) -> torch.Tensor:
        """Of a layer that does more than look up; one that reads its weight in another way is found out by the preflight."""
        with _Lookups(module.weight, partial(self._embedding, name, module)):
            return whole(*args, **kwargs)

    def _norm(
        self, name: str, module: nn.Module, whole: Forward, bare: Forward, channel_axis: int, x: torch.Tensor
    ) -> torch.Tensor:
        """Of y = weight * bare(x) + bias along an axis (1), or along the last ones (-1, -2 ...)."""
        held = [x]

        def summed(tensor: torch.Tensor) -> torch.Tensor:
            last = -channel_axis if channel_axis < 0 else 1
            if channel_axis > 0:
                channels = tensor.flatten(2).sum(2) if tensor.dim() > 2 else tensor  # (k b, channels)
                return channels.reshape(self._size, -1, channels.shape[1]).sum(1)
            return tensor.reshape(self._size, -1, *tensor.shape[-last:]).sum(1).flatten(1)

        def sink(gradient: torch.Tensor) -> None:
            self._by_example(name, gradient)
            g = gradient.detach().float()
            if (weight := getattr(module, "weight", None)) is not None and id(weight) in self._place:
                self._keep(weight, Rows(summed(g * bare(held.pop().detach().float()))))
            if (bias := getattr(module, "bias", None)) is not None and id(bias) in self._place:
                self._keep(bias, Rows(summed(g)))

        return self._seen(whole(x), sink)

    def _before(self, name: str, one: Direction, layer: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        held = [layer]

        def sink(gradient: torch.Tensor) -> None:
            d = gradient.detach().transpose(0, 1).float()  # (b, T, gates)
            self._keep(one.weight_ih, Outer.smallest(d, held.pop().detach().transpose(0, 1)))
            if one.bias_ih is not None:
                self._keep(one.bias_ih, Rows(d.sum(1)))

        if gates.shape[1] != self._size:
            raise ModelError(f"layer {name!r} must see one sequence an example, found {gates.shape[1]} for {self._size}")
        return self._seen(gates, sink)

    def _after(self, one: Direction) -> Sink:
        def sink(e: torch.Tensor, states: torch.Tensor) -> None:
            by_example = e.detach().transpose(0, 1).float()
            self._keep(one.weight_hh, Outer.smallest(by_example, states.detach().transpose(0, 1)))
            if one.bias_hh is not None:
                self._keep(one.bias_hh, Rows(by_example.sum(1)))

        return sink

    # --- parameters that a module owns and broadcasts

    @contextmanager
    def _broadcast(self, batch: Batch) -> Iterator[None]:
        """Have each module that owns a parameter find one copy of it an example, (b, 1, ..., 1, *shape), in its place."""
        if len(self._ranks) < len(self._owned) and self._size > 1:
            self._find_ranks(batch)
        shadowed = []
        try:
            for _, module, key in self._owned:
                parameter = module.get_parameter(key)

                def sink(gradient: torch.Tensor, parameter: nn.Parameter = parameter) -> None:
                    self._keep(parameter, Rows(gradient.detach().float().reshape(self._size, -1)))

                one_each = parameter.detach().clone()
                if self._size > 1:
                    one_each = self._one_each(parameter, self._ranks[id(parameter)]).clone()
                module.__dict__[key] = self._seen(one_each, sink)
                shadowed.append((module, key))
            yield
        finally:
            for module, key in shadowed:
                module.__dict__.pop(key, None)

    def _one_each(self, parameter: nn.Parameter, rank: int) -> torch.Tensor:
        shape = parameter.shape[1:] if rank < 0 else parameter.shape
        return parameter.detach().reshape(1, *[1] * rank, *shape).expand(self._size, *[1] * rank, *shape)

    def _find_ranks(self, batch: Batch) -> None:
        """Which number of axes between lets the module give the very same losses; -1: the first axis becomes the batch's."""
        size, self._size = self._size, 2  # enough to tell, and a wrong choice multiplies the examples
        batch = {name: tensor[:2] for name, tensor in batch.items()}
        try:
            self._try_ranks(batch)
        finally:
            self._size = size

    def _try_ranks(self, batch: Batch) -> None:
        with torch.no_grad():
            expected = self._tunable.loss(self._tunable.module, batch)
            for name, module, key in self._owned:
                parameter = module.get_parameter(key)
                choices = [-1] if parameter.dim() and parameter.shape[0] == 1 else []
                for rank in [*choices, 0, 1, 2, 3]:
                    module.__dict__[key] = self._one_each(parameter, rank)
                    try:
                        found = self._tunable.loss(self._tunable.module, batch)
                    except (RuntimeError, ValueError, IndexError, TypeError):
                        continue
                    finally:
                        module.__dict__.pop(key, None)
                    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                        self._ranks[id(parameter)] = rank
                        break
                else:
                    raise ModelError(
                        f"parameter {name}.{key} must be used by broadcasting, found another use: "
                        "book-keeping cannot give its gradients by example"
                    )


def _layer_norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)


def _layer_norm_of_channels(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return _layer_norm(module, x.movedim(1, -1)).movedim(-1, 1)


def _rms_norm(module: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, tuple(module.normalized_shape), None, module.eps)


def _channel_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Normalised, before weight and bias, along axis 1."""
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, None, None, module.eps)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        mean, var = module.running_mean, module.running_var
        if mean is None or var is None:
            raise ModelError("batch normalisation must keep statistics, found none: it mixes examples")
        return functional.batch_norm(x, mean, var, None, None, False, 0.0, module.eps)
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return functional.instance_norm(x, module.running_mean, module.running_var, None, None, not module.track_running_stats)
