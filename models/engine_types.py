"""What every engine of per-example gradients gives, however it computes it."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from urna.models.tunable import Batch

Precision = Literal["float32", "bfloat16"]  # of a forward and backward pass; gradients, norms and sums are float32

PIECE = 256  # of a row, whose squares are added up in float32


@dataclass(frozen=True, eq=False)
class Clipped:
    """Clipped gradients of a batch, summed, and the norms that they were clipped by.

    Args:
        total: float32 (p,), the sum of weight_i * min(1, C / |g_i|) * g_i; an example whose g_i is not finite adds zero.
        squared_norms: float32 (b, k), of each example's unclipped gradient in each of the k trained parameters.
    """

    total: torch.Tensor
    squared_norms: torch.Tensor


class Engine(Protocol):
    """Computes clipped sums for one `Tunable`, at the weights that it has at that moment."""

    @property
    def name(self) -> str:
        """What logs and reports call it."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """Clip each example's gradient to ``max_grad_norm``, weigh it by ``weights`` (b,), add up; b is 1 or more."""

    def close(self) -> None:
        """Give the module back as it was."""


def gamma(count: int) -> float:
    """Largest relative error of a float32 sum of so many numbers, or of products, in any order (Higham 2002, section 3.1)."""
    rounded = count * 2.0**-24
    return rounded / (1 - rounded) if rounded < 0.5 else float("inf")


def squared_row_norms(rows: torch.Tensor) -> torch.Tensor:
    """(b,) float64 of float32 (b, numel), to `gamma` (PIECE + 2) of each: in float32 a sum of a million squares can lose 10^-3.

    A row shorter than 2^-63 sqrt(numel) may be taken for zero, one with a number over 10^19 for infinite.
    """
    whole = rows.shape[1] // PIECE * PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, PIECE), dim=2) if whole else rows[:, :0]
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    return torch.cat([pieces, rest], 1).double().square().sum(1)


def factors(squared_norms: torch.Tensor, max_grad_norm: float, weights: torch.Tensor | None) -> torch.Tensor:
    """What each example's gradient is multiplied by, (b,): weight * min(1, C / norm), 0 where the norm is not finite."""
    norms = squared_norms.double().sum(1).sqrt()
    scale = max_grad_norm / norms.clamp(min=max_grad_norm)
    scale = torch.where(torch.isfinite(norms), scale, torch.zeros_like(scale)).float()
    return scale if weights is None else scale * weights
