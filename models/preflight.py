"""Is what will be clipped really one example's gradient? Asked before the first private step, on synthetic inputs.

The engine's norms, parameter by parameter, and its clipped sums are compared with plain autograd on one example at a time, at
weights that are moved by a random step: at a zero head, or behind a layer scale of 1e-6, hardly any layer has a gradient.

Covered:
    a loss that is averaged over the batch, or computed inside the model;
    layers that mix examples (batch normalisation), and answers that change with the batch's size, order or companions;
    inputs whose layout makes hooks compute wrong norms;
    parameters that an engine leaves out, counts twice, or returns in another order than the flat vector;
    clipping by layer, after the sum, or not at all; weights of examples that are not used;
    weights, buffers or gradients that an engine writes to;
    for a head: an empty batch, which Poisson sampling does draw (`parts.MicroBatches` never runs one).

Not covered:
    a fault that shows only on other inputs or at another size than those checked;
    the noise, the sampling and the clipping of the real step: they are in `privacy/` and have tests of their own;
    memory in a module or in an engine that changes its answer after the check.

`company_share` asks once more, in the precision that will be used and far more closely: does an example's contribution
move when its companions are others and the shapes stay?
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from urna.models.engine_types import Clipped, Engine, Precision, factors
from urna.models.row_engines import clip_and_add, out_of_memory
from urna.models.tunable import Batch, Tunable
from urna.models.tuning import HEAD_FEATURE_NORM, head_from_vector, per_example_gradients, trainable_size
from urna.protocol.errors import ModelError

TOLERANCE = 1e-3  # largest relative error of a norm, or of the clipped sum, that floating point may explain
# Largest part of its clip by which an example's contribution may move when its companions are others, in shapes that stay:
# bfloat16 may spend `privacy.release.FLOAT_SLACK`; float32 moves nothing in 82 of 84 models and modes, EfficientNet by 1e-5.
COMPANY_SLACK: dict[Precision, float] = {"float32": 5e-5, "bfloat16": 1e-3}
NUM_EXAMPLES = 12
STEPS = (1.0, 0.1, 0.0)  # of the random move of the weights: the first at which every gradient is finite

PerExampleFn = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ParameterError:
    """How well one parameter's norms agree.

    Args:
        name: As the module calls it.
        num_weights: How many numbers it has.
        error: Largest relative error of one example's gradient norm.
    """

    name: str
    num_weights: int
    error: float


@dataclass(frozen=True)
class PreflightReport:
    """What a passed check measured.

    Args:
        engine: Whose gradients were checked.
        num_examples: Synthetic examples compared.
        num_parameters: Trained weights compared.
        worst_norm_error: Largest relative error of one example's gradient norm in one parameter.
        worst_parameter: The parameter that has it.
        clipped_sum_error: Relative error of the sum of clipped gradients.
        rows: Every parameter, in the order of the flat vector.
    """

    engine: str
    num_examples: int
    num_parameters: int
    worst_norm_error: float
    worst_parameter: str
    clipped_sum_error: float
    rows: tuple[ParameterError, ...]


def check_head(feature_dim: int, num_classes: int, seed: int) -> PreflightReport:
    """Check the per-example gradients of a linear head of this size, on synthetic features.

    Raises:
        ModelError: they are not the one-example loop's; the message names the parameter.
    """
    generator = torch.Generator().manual_seed(seed)  # synthetic inputs: no privacy rests on this generator
    vector = 0.1 * torch.randn(trainable_size(feature_dim, num_classes), generator=generator)
    head = head_from_vector(vector.numpy(), feature_dim, num_classes)
    features = functional.normalize(torch.randn((NUM_EXAMPLES, feature_dim), generator=generator)) * HEAD_FEATURE_NORM
    labels = torch.randint(num_classes, (NUM_EXAMPLES,), generator=generator)
    return check_rows(_head_gradients, head, features, labels)


def _head_gradients(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert isinstance(module, nn.Linear)
    return per_example_gradients(module, inputs, labels)


def check_rows(per_example_fn: PerExampleFn, module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> PreflightReport:
    """Check a function that gives each example's gradient as a row.

    Args:
        per_example_fn: (module, inputs, labels) -> (b, p), the trained parameters in the module's order; b may be 0.
        module: Gives logits; its trainable parameters are those that are checked.
        inputs: (b, ...) public or synthetic, b >= 2, since one example shows no mixing.
        labels: int64 (b,).

    Raises:
        ModelError: the rows are not one-example gradients; the message names the parameter.
    """
    engine = _RowsEngine(per_example_fn, Tunable(module, _cross_entropy))
    report = check(engine, engine.tunable, {"inputs": inputs, "labels": labels})
    with _a_crash_refuses("an empty batch"):
        engine.rows(inputs[:0], labels[:0], "an empty batch")
    return report


def _cross_entropy(module: nn.Module, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(module(batch["inputs"]), batch["labels"], reduction="none")


@dataclass(frozen=True, eq=False)
class _RowsEngine:
    """The engine that a function of rows makes."""

    per_example_fn: PerExampleFn
    tunable: Tunable
    name: str = "rows"

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        rows = self.rows(batch["inputs"], batch["labels"], "a batch")
        return clip_and_add(
            list(torch.split(rows, [one.numel() for one in self.tunable.parameters], 1)), max_grad_norm, weights
        )

    def close(self) -> None:
        """Nothing was changed."""

    def rows(self, inputs: torch.Tensor, labels: torch.Tensor, what: str) -> torch.Tensor:
        """Each example's gradient (b, p)."""
        found = self.per_example_fn(self.tunable.module, inputs, labels)
        expected = (len(inputs), self.tunable.size)
        if found.shape != expected:
            raise ModelError(
                f"per-example gradients of {what} must be {expected}, "
                f"found {tuple(found.shape)}: this module cannot be tuned privately"
            )
        return found


def check(engine: Engine, tunable: Tunable, batch: Batch) -> PreflightReport:
    """Compare an engine with plain autograd on one example at a time; the module is as before afterwards, bit for bit.

    Args:
        engine: Made for ``tunable``.
        tunable: In eval mode.
        batch: Public or synthetic, of 2 or more different examples, since one example shows no mixing.

    Raises:
        ModelError: the two differ by more than `TOLERANCE`; the message names the parameter.
    """
    if (size := _size(batch)) < 2:
        raise ValueError(f"a preflight needs at least 2 examples, found {size}")
    before = _state(tunable.module)
    try:
        reference = _reference(tunable, batch, before)
        _check_companions(tunable, batch, reference)
        found = _run_and_look(engine, tunable, batch, reference.max_grad_norm)
        rows = _check_norms(found, tunable, reference.rows)
        error = _check_sums(found, engine, tunable, batch, reference)
        _check_order(engine, tunable, batch, reference)
    finally:
        _restore(before)
    worst = max(rows, key=lambda row: row.error)
    return PreflightReport(engine.name, size, tunable.size, worst.error, worst.name, error, rows)


# --- the reference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Reference:
    """What one example at a time gives.

    Args:
        losses: (b,).
        rows: Each parameter's gradients (b, numel).
    """

    losses: torch.Tensor
    rows: list[torch.Tensor]

    @property
    def norms(self) -> torch.Tensor:
        """Of each example's whole gradient, (b,)."""
        return torch.stack([(row * row).sum(1) for row in self.rows], 1).sum(1).sqrt()

    @property
    def max_grad_norm(self) -> float:
        """A threshold that clips about half the examples."""
        return max(float(self.norms.median()), 1e-6)

    def clipped_sum(self, max_grad_norm: float, weights: torch.Tensor | None) -> torch.Tensor:
        """By the definition, (p,)."""
        scale = factors((self.norms**2)[:, None], max_grad_norm, weights)
        return torch.cat([scale @ row for row in self.rows])


def _reference(tunable: Tunable, batch: Batch, before: dict[str, "_Kept"]) -> _Reference:
    for step in STEPS:
        _restore(before)
        _move(tunable.module, step)
        with _a_crash_refuses("one example at a time"):
            found = _one_example_loop(tunable, batch)
        usable = bool(torch.isfinite(found.norms).all()) and bool((found.norms > 0).any())
        # a deep network far from its weights multiplies rounding: then a smaller step tells more
        if usable and (not step or _adds_up(tunable, batch, found)):
            return found
    raise ModelError(
        f"gradients of one example at a time must be finite and not all zero, found norms {found.norms.tolist()[:3]}: "
        "this module cannot be tuned privately"
    )


def _adds_up(tunable: Tunable, batch: Batch, found: "_Reference") -> bool:
    """Whether plain autograd on the batch gives the sum of the examples' gradients, ten times closer than engines have to."""
    with torch.enable_grad():
        loss = tunable.loss(tunable.module, batch).sum()
    parts = zip(torch.autograd.grad(loss, tunable.parameters, allow_unused=True), tunable.parameters, strict=True)
    total = torch.cat([(torch.zeros_like(one) if part is None else part).reshape(-1).float() for part, one in parts])
    return bool(_relative(total, torch.cat([row.sum(0) for row in found.rows])) <= TOLERANCE / 10)


@torch.no_grad()
def _move(module: nn.Module, step: float) -> None:
    """Move every weight by a normal step: 0.15 for vectors, 0.3 / sqrt(fan in) for matrices."""
    generator = torch.Generator().manual_seed(0)  # synthetic weights: no privacy rests on this generator
    for one in module.parameters():
        if not step or not one.is_floating_point():
            continue
        scale = 0.15 if one.dim() < 2 else min(0.15, 0.3 * (one.numel() / len(one)) ** -0.5)
        one.add_(step * scale * torch.randn(one.shape, generator=generator).to(one))


def _one_example_loop(tunable: Tunable, batch: Batch) -> _Reference:
    losses, rows = [], []
    for i in range(_size(batch)):
        with torch.enable_grad():
            loss = tunable.loss(tunable.module, _some(batch, slice(i, i + 1)))
        if loss.shape != (1,):
            raise ModelError(f"the loss of one example must be (1,), found {tuple(loss.shape)}: a mean, or none per example")
        found = torch.autograd.grad(loss.sum(), tunable.parameters, allow_unused=True)
        pairs = zip(found, tunable.parameters, strict=True)
        rows.append([(torch.zeros_like(one) if part is None else part).reshape(-1).float() for part, one in pairs])
        losses.append(loss.detach())
    return _Reference(torch.cat(losses), [torch.stack(parameter) for parameter in zip(*rows, strict=True)])


# --- company -------------------------------------------------------------------------------------------------------------


def company_share(engine: Engine, tunable: Tunable, batch: Batch, precision: Precision) -> float:
    """Largest part of its clip by which one example's contribution moves, when others stand beside it or it stands elsewhere.

    The shapes stay. What is measured is what the engine adds up when every other example has the weight 0, at a clip of half
    the example's norm, at the weights where `check` compares; the module is as before afterwards.

    Args:
        engine: One that passed `check`.
        tunable: What it was made for.
        batch: As for `check`.
        precision: What the module computes in.

    Raises:
        ModelError: in this precision the gradients are not finite, or cannot be computed.
    """
    before = _state(tunable.module)
    try:
        _reference(tunable, batch, before)
        return _company_share(engine, tunable, batch, precision)
    finally:
        _restore(before)


def _company_share(engine: Engine, tunable: Tunable, batch: Batch, precision: Precision) -> float:
    size, worst = _size(batch), 0.0
    with torch.autocast(tunable.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
        norms = _run(engine, tunable, batch, 1.0).squared_norms.sum(1).sqrt()
        if not bool(torch.isfinite(norms).all()):
            raise ModelError(f"gradients in {precision} must be finite, found norms {norms.tolist()[:3]}")
        for i in {0, size - 1}:
            if not norms[i] > 0:
                continue
            clip, other = float(norms[i]) / 2, (i + 1) % size
            moved, alike = list(range(size)), [other] * size  # i elsewhere; i where it was, beside other companions
            moved[i], moved[other], alike[i] = other, i, i
            here = _alone(engine, tunable, batch, clip, i)
            for chosen in (moved, alike):
                places = torch.tensor(chosen)
                company = {name: part[places.to(part.device)] for name, part in batch.items()}
                there = _alone(engine, tunable, company, clip, chosen.index(i))
                share = float((there - here).double().norm()) / clip
                worst = max(worst, share if share == share else float("inf"))  # NaN would be lost
    return worst


def _alone(engine: Engine, tunable: Tunable, batch: Batch, max_grad_norm: float, slot: int) -> torch.Tensor:
    """What one example adds to the sum, (p,)."""
    weights = torch.zeros(_size(batch), device=tunable.device)
    weights[slot] = 1.0
    return _run(engine, tunable, batch, max_grad_norm, weights).total


# --- the comparisons -----------------------------------------------------------------------------------------------------


def _check_companions(tunable: Tunable, batch: Batch, reference: _Reference) -> None:
    """An example's loss does not depend on those beside it."""
    with _a_crash_refuses("a batch"), torch.no_grad():
        together = tunable.loss(tunable.module, batch)
    if together.shape != reference.losses.shape:
        expected = tuple(reference.losses.shape)
        raise ModelError(f"the losses of a batch must be {expected}, found {tuple(together.shape)}: a batch mean")
    off = (together - reference.losses).abs() / (1.0 + reference.losses.abs())
    i = int(off.argmax())
    if not off[i] <= TOLERANCE:
        raise ModelError(
            f"an example's loss must not depend on its companions, found {together[i]:.4g} among them and "
            f"{reference.losses[i]:.4g} alone: a batch mean, or a layer that mixes examples; "
            "this module cannot be tuned privately"
        )


def _run_and_look(engine: Engine, tunable: Tunable, batch: Batch, max_grad_norm: float) -> Clipped:
    """Run the engine and see that it writes nothing to the module."""
    kept = _state(tunable.module)
    gradients = [one.grad for one in tunable.module.parameters()]
    found = _run(engine, tunable, batch, max_grad_norm)
    for name, one in kept.items():
        if not torch.equal(one.tensor.detach(), one.value):
            raise ModelError(f"{name!r} must stay as it was, found that engine {engine.name!r} writes to it")
    if any(one.grad is not before for one, before in zip(tunable.module.parameters(), gradients, strict=True)):
        raise ModelError(f"gradients must not stay behind, found that engine {engine.name!r} leaves them on the module")
    return found


def _check_norms(found: Clipped, tunable: Tunable, rows: list[torch.Tensor]) -> tuple[ParameterError, ...]:
    """Each parameter's worst relative error of a norm; raise where it is over the tolerance."""
    # a parameter with hardly any gradient is measured against the example's whole gradient, not against rounding
    floor = (TOLERANCE * torch.stack([(row * row).sum(1) for row in rows]).sum(0).sqrt()).clamp(min=1e-9)  # (b,)
    report = []
    for name, ours, row in zip(tunable.names, found.squared_norms.unbind(1), rows, strict=True):
        our_norms, true_norms = ours.sqrt(), row.norm(dim=1)  # (b,)
        errors = (our_norms - true_norms).abs() / torch.maximum(true_norms, floor)
        i = int(errors.argmax())  # the first NaN, if there is one
        if not errors[i] <= TOLERANCE:  # NaN fails too
            raise ModelError(
                f"per-example gradient norm of {name!r} must be {true_norms[i]:.4g}, found {our_norms[i]:.4g}: "
                "a batch mean, or a layer that mixes examples; this module cannot be tuned privately"
            )
        report.append(ParameterError(name, row.shape[1], float(errors[i])))
    return tuple(report)


def _check_sums(first: Clipped, engine: Engine, tunable: Tunable, batch: Batch, reference: _Reference) -> float:
    """The worst error of the clipped sum: half clipped (``first``), all clipped and weighed, none clipped."""
    uneven = torch.linspace(0.0, 2.0, _size(batch), device=tunable.device)  # one example does not count at all
    low, high = float(reference.norms.min().clamp(min=1e-6)) / 2, 2 * float(reference.norms.max())
    worst = 0.0
    for max_grad_norm, weights in ((reference.max_grad_norm, None), (low, uneven), (high, None)):
        found = first if max_grad_norm == reference.max_grad_norm else _run(engine, tunable, batch, max_grad_norm, weights)
        total = found.total
        true = reference.clipped_sum(max_grad_norm, weights)
        error = _relative(total, true)
        if not error <= TOLERANCE:
            parts = zip(tunable.split(total).items(), tunable.split(true).values(), strict=True)
            name = max(((_relative(ours, part), name) for (name, ours), part in parts))[1]
            raise ModelError(
                f"the clipped sum of per-example gradients must be within {TOLERANCE:g} of the one-example loop, found "
                f"{error:.2g} although every norm agrees, most in {name!r}: the parameters are in another order, the signs are "
                "wrong, or examples are not clipped as a whole"
            )
        worst = max(worst, error)
    return worst


def _check_order(engine: Engine, tunable: Tunable, batch: Batch, reference: _Reference) -> None:
    """The same examples in another order, half of them, and one alone have the same norms."""
    size = _size(batch)
    for chosen in (list(reversed(range(size))), list(range(0, size, 2)), [size - 1]):
        places = torch.tensor(chosen, device=tunable.device)
        some = {name: part[places.to(part.device)] for name, part in batch.items()}
        found = _run(engine, tunable, some, reference.max_grad_norm)
        _check_norms(found, tunable, [row[places] for row in reference.rows])


def _run(engine: Engine, tunable: Tunable, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
    with _a_crash_refuses("a batch"):
        found = engine.clipped_sum(batch, max_grad_norm, weights)
    expected = ((tunable.size,), (_size(batch), len(tunable.parameters)))
    shapes = (tuple(found.total.shape), tuple(found.squared_norms.shape))
    if shapes != expected or {found.total.dtype, found.squared_norms.dtype} != {torch.float32}:
        raise ModelError(
            f"an engine must give float32 {expected}, found {shapes} of {found.total.dtype} and {found.squared_norms.dtype}: "
            "a parameter was forgotten, or counted twice"
        )
    return found


def _relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm().clamp(min=1e-9))


# --- plumbing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Kept:
    tensor: torch.Tensor
    value: torch.Tensor


def _state(module: nn.Module) -> dict[str, _Kept]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: _Kept(one, one.detach().clone()) for name, one in named}


@torch.no_grad()
def _restore(state: dict[str, _Kept]) -> None:
    for one in state.values():
        one.tensor.copy_(one.value)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _some(batch: Batch, which: slice) -> dict[str, torch.Tensor]:
    return {name: part[which] for name, part in batch.items()}


@contextmanager
def _a_crash_refuses(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError, AssertionError) as error:
        if out_of_memory(error):  # says nothing about the module
            raise
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"gradients of {what} must be computable, found {reason!r}: this module cannot be tuned privately"
        ) from error
