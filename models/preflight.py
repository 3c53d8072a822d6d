"""Is what will be clipped really one example's gradient? Asked before the first private step, on synthetic inputs.

Covered:
    a loss that is averaged over the batch, or computed inside the model;
    layers that mix examples (batch normalisation) and inputs whose layout makes hooks compute wrong norms;
    parameters that per-example code leaves out, repeats, or returns in another order than the flat vector;
    an empty batch, which Poisson sampling does draw.

Not covered:
    a fault that shows only on other inputs or at another size than those checked;
    the noise, the sampling and the clipping of the real step: they are in `privacy/` and have tests of their own;
    memory in a module or in per-example code that changes its answer after the check.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from urna.models.tuning import HEAD_FEATURE_NORM, head_from_vector, per_example_gradients, trainable_size
from urna.protocol.errors import ModelError

TOLERANCE = 1e-3  # largest relative error of a norm, or of the clipped sum, that floating point may explain
NUM_EXAMPLES = 12

PerExampleFn = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PreflightReport:
    """What a passed check measured.

    Args:
        num_examples: Synthetic examples compared.
        num_parameters: Trained weights compared.
        worst_norm_error: Largest relative error of one example's gradient norm in one parameter.
        clipped_sum_error: Relative error of the sum of clipped gradients.
    """

    num_examples: int
    num_parameters: int
    worst_norm_error: float
    clipped_sum_error: float


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
    return check(_head_gradients, head, features, labels)


def _head_gradients(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert isinstance(module, nn.Linear)
    return per_example_gradients(module, inputs, labels)


def check(per_example_fn: PerExampleFn, module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> PreflightReport:
    """Compare per-example gradients with plain autograd on one example at a time.

    Args:
        per_example_fn: (module, inputs, labels) -> (b, p), the trained parameters in the module's order.
        module: Gives logits; its trainable parameters are those that are checked.
        inputs: (b, ...) public or synthetic, b >= 2, since one example shows no mixing.
        labels: int64 (b,).

    Raises:
        ModelError: the two differ by more than `TOLERANCE`; the message names the parameter.
    """
    if len(inputs) < 2:
        raise ValueError(f"a preflight needs at least 2 examples, found {len(inputs)}")
    with _a_crash_refuses("one example at a time"):
        reference = _one_example_loop(module, inputs, labels)  # (b, p)
    with _a_crash_refuses("a batch"):
        found = per_example_fn(module, inputs, labels)
    with _a_crash_refuses("an empty batch"):
        empty = per_example_fn(module, inputs[:0], labels[:0])
    for what, gradients, rows in (("a batch", found, len(inputs)), ("an empty batch", empty, 0)):
        if gradients.shape != (rows, reference.shape[1]):
            raise ModelError(
                f"per-example gradients of {what} must be {(rows, reference.shape[1])}, "
                f"found {tuple(gradients.shape)}: this module cannot be tuned privately"
            )
    worst = _compare_norms(module, found, reference)
    max_grad_norm = float(reference.norm(dim=1).median())  # about half the examples are clipped
    error = _relative(_clipped_sum(found, max_grad_norm), _clipped_sum(reference, max_grad_norm))
    if not error <= TOLERANCE:
        raise ModelError(
            f"the clipped sum of per-example gradients must be within {TOLERANCE:g} of the one-example loop, found "
            f"{error:.2g} although every norm agrees: the parameters are in another order or the signs are wrong"
        )
    return PreflightReport(len(inputs), reference.shape[1], worst, error)


@contextmanager
def _a_crash_refuses(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:  # what torch raises on shapes it does not support
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"gradients of {what} must be computable, found {reason!r}: this module cannot be tuned privately"
        ) from error


def _one_example_loop(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = []
    for i in range(len(inputs)):
        loss = functional.cross_entropy(module(inputs[i : i + 1]), labels[i : i + 1], reduction="sum")
        gradients = torch.autograd.grad(loss, trained)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)  # (b, p)


def _compare_norms(module: nn.Module, found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the worst relative error of a norm; raise where it is over the tolerance."""
    # a parameter with hardly any gradient is measured against the example's whole gradient, not against rounding
    floor = (TOLERANCE * reference.norm(dim=1)).clamp(min=1e-9)  # (b,)
    trained = [(name, parameter.numel()) for name, parameter in module.named_parameters() if parameter.requires_grad]
    sizes = [size for _, size in trained]
    worst = 0.0
    for (name, _), ours, true in zip(trained, torch.split(found, sizes, 1), torch.split(reference, sizes, 1), strict=True):
        our_norms, true_norms = ours.norm(dim=1), true.norm(dim=1)  # (b,)
        errors = (our_norms - true_norms).abs() / torch.maximum(true_norms, floor)
        i = int(errors.argmax())  # the first NaN, if there is one
        if not errors[i] <= TOLERANCE:  # NaN fails too
            raise ModelError(
                f"per-example gradient norm of {name!r} must be {true_norms[i]:.4g}, found {our_norms[i]:.4g}: "
                "a batch mean, or a layer that mixes examples; this module cannot be tuned privately"
            )
        worst = max(worst, float(errors[i]))
    return worst


def _clipped_sum(gradients: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    factors = max_grad_norm / gradients.norm(dim=1).clamp(min=max_grad_norm)  # (b,), min(1, C / norm)
    clipped_sum: torch.Tensor = factors @ gradients
    return clipped_sum


def _relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / reference.norm().clamp(min=1e-9))
