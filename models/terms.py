"""What is kept of one parameter's per-example gradients until the clip is known: rows, or what rows are made of.

Norms of sums of products, sum_t left_t (x) right_t, come from Gram matrices. Where the parts cancel, rounding leaves of such a
norm what it likes, and a gradient that is taken for shorter than it is would be clipped too little; and the clipped sum has
rounding errors of its own, of the parts' size. So two bounds of what float32 may have done go along with each example, and
where one of them is not small, that example alone is computed again in float64.

Proven, with u = 2^-24, S = sum_t |left_t| |right_t|, gamma_n = n u / (1 - n u) (Higham 2002, section 3.1):
    a dot product of K numbers, in n pieces of at most c each, is off by gamma_(c+n) times the lengths, in any order, so a Gram
    norm's square by DOUBT = ((1 + gamma)(1 + gamma')(1 + u) - 1) S^2: used where DOUBT <= `DOUBT_SHARE` of it;
    an example's own part of the clipped sum is off by gamma_(T+2) factor S: in float32 where that is <= `ROUNDING_SHARE` of
    the example's own norm.
Together no example's part is longer than its clip by more than DOUBT_SHARE / 2 + ROUNDING_SHARE of it, and `NEGLIGIBLE`.

Not covered: rounding of sums that hold other examples' parts too; convolutions by algorithms that are no sums of products
(Winograd's, of cuDNN); matrix products for which a program chose TF32.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import nn
from torch.nn import functional

from urna.models.engine_types import gamma, squared_row_norms

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
DOUBT_SHARE = 5e-4  # of a squared norm: with half of it and the next, half of `release.FLOAT_SLACK` is spent
ROUNDING_SHARE = 2e-4  # of a norm
NEGLIGIBLE = 2.0**-40  # a gradient's length, 10^-12; what underflows is shorter
FLUSHED = 2.0**-126  # what float32 makes of smaller numbers may be zero
PIECES = (384, 32)  # of the dot products in a Gram matrix: what is cheap, and what is closer, before float64
BLOCK_BYTES = 2**27  # of rows that are made only to be added up or measured


@dataclass(frozen=True, eq=False)
class Measured:
    """Of each example, (b,) float64: its squared norm, and a bound of what rounding adds to its part of a clipped sum."""

    squares: torch.Tensor
    rounding: torch.Tensor  # over the factor

    @property
    def delicate(self) -> torch.Tensor:
        """Whose part must not be added up in float32, (b,)."""
        return ~(self.rounding <= ROUNDING_SHARE * self.squares.sqrt() + NEGLIGIBLE)  # NaN is


class _HasMeasured(Protocol):
    @property
    def measured(self) -> Measured: ...


def _apart(term: _HasMeasured, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (b,) without those of delicate examples, and where those are, (n,)."""
    delicate = term.measured.delicate
    return torch.where(delicate, torch.zeros_like(factors), factors), (delicate & (factors != 0)).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Rows:
    """The gradients themselves, float32 (b, numel)."""

    rows: torch.Tensor

    @classmethod
    def none(cls, size: int, parameter: nn.Parameter) -> Self:
        """Of a parameter that this batch did not touch."""
        return cls(torch.zeros(1, 1, device=parameter.device).expand(size, parameter.numel()))

    def squared_norms(self) -> torch.Tensor:
        """(b,)."""
        return squared_row_norms(self.rows).float()

    def weighted(self, factors: torch.Tensor, out: torch.Tensor) -> None:
        """Write the sum of factors (b,) times rows into ``out``, a parameter's part of the flat vector."""
        torch.mv(self.rows.T, factors, out=out.view(-1))

    def take(self, chosen: torch.Tensor) -> Self:
        """The chosen examples' part."""
        return type(self)(self.rows[chosen])

    def as_rows(self) -> torch.Tensor:
        """(b, numel)."""
        return self.rows


@dataclass(frozen=True, eq=False)
class Outer:
    """sum_t left_t (x) right_t: left (b, T, p) and right (b, T, d) for a weight (p, d)."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def smallest(cls, left: torch.Tensor, right: torch.Tensor) -> "Outer | Rows":
        """Rows where they are no larger than left and right; the same condition says that they cost no more to make."""
        steps, p, d = left.shape[1], left.shape[2], right.shape[2]
        term = cls(left, right)
        return Rows(term.as_rows()) if steps > 1 and p * d <= steps * (p + d) else term

    @cached_property
    def measured(self) -> Measured:
        """By Gram matrices, sum_{s,t} (left_s . left_t) (right_s . right_t); or of the rows, where they cost less."""
        left, right = self.left.float(), self.right.float()
        steps, p, d = left.shape[1], left.shape[2], right.shape[2]
        lefts, rights = _lengths(left), _lengths(right)
        parts = (lefts * rights).sum(1)
        flushed = FLUSHED * (math.sqrt(p) * rights.sum(1) + math.sqrt(d) * lefts.sum(1) + steps * math.sqrt(p * d))
        if steps == 1:
            squares = left.double().square().sum((1, 2)) * right.double().square().sum((1, 2))
            return Measured(squares, gamma(2) * squares.sqrt() + flushed)
        if steps * (p + d) > p * d:
            squares = torch.cat([squared_row_norms(part.as_rows()) for part in self._blocks(4 * p * d)])
            error = gamma(steps) * parts + flushed
            again = _doubtful(squares, (2 * squares.sqrt() + error) * error)
        else:
            squares, again = parts.clone(), torch.arange(len(parts), device=parts.device)
            for piece in PIECES:
                one, other = (left, right) if len(again) == len(parts) else (left[again], right[again])
                squares[again] = (_gram(one, piece) * _gram(other, piece)).sum((1, 2), dtype=torch.float64)
                again = again[_doubtful(squares[again], _gram_doubt(p, d, piece) * parts[again].square())]
                if not len(again):
                    break
        if len(again):
            some = Outer(self.left[again], self.right[again])
            squares[again] = torch.cat([part._exact_squares() for part in some._blocks(8 * steps * (steps + p + d))])
        return Measured(
            squares.clamp(min=0), gamma(steps + 2) * parts + flushed
        )  # whichever side is weighed, and what underflows

    def squared_norms(self) -> torch.Tensor:
        """(b,)."""
        return self.measured.squares.float()

    def _exact_squares(self) -> torch.Tensor:
        """In float64, rounded up by what that may have done: 10^-12 of the parts."""
        left, right = self.left.double(), self.right.double()
        steps, p, d = left.shape[1], left.shape[2], right.shape[2]
        parts = (torch.linalg.vector_norm(left, dim=2) * torch.linalg.vector_norm(right, dim=2)).sum(1)
        squares: torch.Tensor = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
        rounded_up: torch.Tensor = squares + (p + d + steps**2 + 4) * 2.0**-52 * parts.square()
        return rounded_up

    def _blocks(self, bytes_each: int) -> "list[Outer]":
        each = max(1, BLOCK_BYTES // bytes_each)
        pairs = zip(torch.split(self.left, each), torch.split(self.right, each), strict=True)
        return [Outer(left, right) for left, right in pairs]

    def weighted(self, factors: torch.Tensor, out: torch.Tensor) -> None:
        """As `Rows.weighted`, in one matrix product; what is smaller is weighed."""
        common, apart = _apart(self, factors)
        torch.mm(*_weighed(self.left.float(), self.right.float(), common), out=out)
        if len(apart):
            left, right = self.left[apart].double(), self.right[apart].double()
            out += torch.mm(*_weighed(left, right, factors[apart]))

    def take(self, chosen: torch.Tensor) -> "Outer":
        """The chosen examples' part."""
        return Outer(self.left[chosen], self.right[chosen])

    def as_rows(self) -> torch.Tensor:
        """(b, p d)."""
        return (self.left.float().mT @ self.right.float()).flatten(1)


@dataclass(frozen=True, eq=False)
class Looked:
    """Rows of a table that were looked up: ids (b, T) and their gradients (b, T, d)."""

    ids: torch.Tensor
    gradients: torch.Tensor
    num_rows: int

    @classmethod
    def smallest(cls, ids: torch.Tensor, gradients: torch.Tensor, num_rows: int) -> "Looked | Rows":
        """Rows where they are no larger."""
        term = cls(ids, gradients, num_rows)
        return Rows(term.as_rows()) if num_rows <= ids.shape[1] else term

    @cached_property
    def measured(self) -> Measured:
        """By Gram matrices: only equal ids meet."""
        steps, d = self.gradients.shape[1:]
        same = self.ids[:, :, None] == self.ids[:, None, :]
        parts = _lengths(self.gradients).sum(1)
        squares = (_gram(self.gradients, PIECES[-1]) * same).sum((1, 2), dtype=torch.float64)
        again = _doubtful(squares, _gram_gamma(d, PIECES[-1]) * parts.square())
        if len(again):
            some = self.gradients[again].double()
            exact = ((some @ some.mT) * same[again]).sum((1, 2))
            squares[again] = exact + (d + steps**2 + 2) * 2.0**-52 * parts[again].square()
        return Measured(squares.clamp(min=0), gamma(steps + 1) * parts + FLUSHED * steps * math.sqrt(d))

    def squared_norms(self) -> torch.Tensor:
        """(b,)."""
        return self.measured.squares.float()

    def weighted(self, factors: torch.Tensor, out: torch.Tensor) -> None:
        """As `Rows.weighted`."""
        common, apart = _apart(self, factors)
        out.zero_().index_add_(0, self.ids.flatten(), (self.gradients * common[:, None, None]).flatten(0, 1))
        if len(apart):
            weighed = (self.gradients[apart].double() * factors[apart, None, None]).flatten(0, 1)
            rows, places = torch.unique(self.ids[apart].flatten(), return_inverse=True)
            out.index_add_(0, rows, weighed.new_zeros(len(rows), weighed.shape[1]).index_add_(0, places, weighed).float())

    def take(self, chosen: torch.Tensor) -> "Looked":
        """The chosen examples' part."""
        return Looked(self.ids[chosen], self.gradients[chosen], self.num_rows)

    def as_rows(self) -> torch.Tensor:
        """(b, num_rows d)."""
        b, steps, d = self.gradients.shape
        at = torch.arange(b, device=self.ids.device)[:, None] * self.num_rows + self.ids  # (b, T)
        rows = self.gradients.new_zeros(b * self.num_rows, d)
        return rows.index_add_(0, at.flatten(), self.gradients.reshape(b * steps, d)).view(b, -1)


@dataclass(frozen=True, eq=False)
class Convolved:
    """A convolution's input x (b, in, ...) and output gradient (b, out, ...)."""

    x: torch.Tensor
    gradient: torch.Tensor
    module: Convolution

    @classmethod
    def smallest(cls, x: torch.Tensor, gradient: torch.Tensor, module: Convolution) -> "Convolved | Rows":
        """Rows where they are smaller than what a Gram matrix needs."""
        term = cls(x, gradient, module)
        return term if term.is_by_gram else Rows(term.as_rows())

    @property
    def is_by_gram(self) -> bool:
        """Whether patches and their Gram matrices cost less than rows."""
        weight, steps = self.module.weight, math.prod(self.gradient.shape[2:])
        p, d = weight.shape[0], weight[0].numel()
        return isinstance(self.module, nn.Conv2d) and self.module.groups == 1 and steps * (p + d) < p * d

    @cached_property
    def measured(self) -> Measured:
        """By Gram matrices of patches."""
        if not self.is_by_gram:
            squares = squared_row_norms(self.as_rows())
            return Measured(squares, torch.zeros_like(squares))  # the preflight's affair: no model comes here
        module = self.module
        assert isinstance(module, nn.Conv2d)
        x, padding = _padded(self.x.float(), module)
        patches = functional.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (b, d, T)
        return Outer(self.gradient.float().flatten(2).mT, patches.mT).measured

    def squared_norms(self) -> torch.Tensor:
        """(b,)."""
        return self.measured.squares.float()

    def weighted(self, factors: torch.Tensor, out: torch.Tensor) -> None:
        """As `Rows.weighted`; as autograd would, of weighed output gradients."""
        common, apart = _apart(self, factors)
        out.copy_(self._weighed(common, slice(None), torch.float32))
        if len(apart):
            out += self._weighed(factors[apart], apart, torch.float64)

    def _weighed(self, factors: torch.Tensor, which: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        gradient = self.gradient[which].to(dtype) * factors.view(-1, *[1] * (self.gradient.dim() - 1))
        return _weight_gradient(self.module, self.x[which].to(dtype), gradient)

    def take(self, chosen: torch.Tensor) -> "Convolved":
        """The chosen examples' part."""
        return Convolved(self.x[chosen], self.gradient[chosen], self.module)

    def as_rows(self) -> torch.Tensor:
        """(b, numel), one example after the other: on a processor each is as fast as its part of the batch."""
        x, gradient = self.x.float(), self.gradient.float()
        rows = [_weight_gradient(self.module, x[i : i + 1], gradient[i : i + 1]).flatten() for i in range(len(x))]
        return torch.stack(rows)


Term = Rows | Outer | Looked | Convolved


def merged(one: Term, other: Term) -> Term:
    """What a parameter got from two calls, or from two layers that it is tied to."""
    match one, other:
        case Outer(), Outer():
            return Outer(torch.cat([one.left, other.left], 1), torch.cat([one.right, other.right], 1))
        case Looked(), Looked():
            ids, gradients = torch.cat([one.ids, other.ids], 1), torch.cat([one.gradients, other.gradients], 1)
            return Looked(ids, gradients, one.num_rows)
    return Rows(one.as_rows() + other.as_rows())


def _weighed(left: torch.Tensor, right: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is the weighed sum."""
    if left.shape[2] <= right.shape[2]:
        left = left * factors[:, None, None]
    else:
        right = right * factors[:, None, None]
    return left.flatten(0, 1).T, right.flatten(0, 1)


def _gram(x: torch.Tensor, piece: int) -> torch.Tensor:
    """Products x x^T of (b, T, K), in pieces of K: (b, T, T)."""
    first, *others = torch.split(x, piece, dim=2)
    gram = first @ first.mT
    for one in others:
        gram.baddbmm_(one, one.mT)
    return gram


def _gram_gamma(width: int, piece: int) -> float:
    """What `_gram` may be off by, over the lengths, in any order of addition."""
    return gamma(min(width, piece) + math.ceil(width / piece))


def _gram_doubt(p: int, d: int, piece: int) -> float:
    """What a sum of products of two Gram matrices may be off by, over the square of the parts."""
    return (1 + _gram_gamma(p, piece)) * (1 + _gram_gamma(d, piece)) * (1 + gamma(1)) - 1


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """|x_t| or more, (b, T) float64, of (b, T, K): so much more that what underflows in `_gram` is within its bound."""
    width = x.shape[2]
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=2).double()
    return norms * (1 + gamma(width + 2)) + math.sqrt(width * 2 * FLUSHED / gamma(1))


def _doubtful(squares: torch.Tensor, doubt: torch.Tensor) -> torch.Tensor:
    """Where squared norms are to be computed again, (n,); NaN is one."""
    return (~(doubt <= DOUBT_SHARE * (squares - doubt).clamp(min=0) + NEGLIGIBLE**2)).nonzero()[:, 0]


def _padded(x: torch.Tensor, module: Convolution) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The input, and what is still to be padded: "same" pads unevenly, so it is done here."""
    if isinstance(module.padding, str):
        return functional.pad(x, module._reversed_padding_repeated_twice), (0,) * len(module.kernel_size)
    return x, module.padding


def _weight_gradient(module: Convolution, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    x, padding = _padded(x, module)
    _, weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        x,
        module.weight.to(x.dtype),
        None,
        list(module.stride),
        list(padding),
        list(module.dilation),
        False,
        [0] * len(module.kernel_size),
        module.groups,
        [False, True, False],
    )
    result: torch.Tensor = weight
    return result
