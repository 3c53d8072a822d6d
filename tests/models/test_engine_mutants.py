"""Wrong ways to clip a model's gradients that no single layer shows: tied weights, 0-d and frozen ones, buffers, clip by layer.

The reference is autograd, one example at a time, through a model that has all of these; the whole list of wrong ways is in
tests/client/test_training_mutants.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from urna.models.book_keeping import BookKeeping
from urna.models.engine_types import Clipped, Engine
from urna.models.row_engines import Hooks, Loop, Vmap
from urna.models.tunable import LABELS, Batch, Tunable
from urna.privacy.release import FLOAT_SLACK

SMALL, LARGE = 0.05, 1e6  # clips: all examples are longer, none is
NUM_EXAMPLES, NUM_WORDS, WIDTH, LENGTH = 6, 11, 4, 5
ENGINES: list[Callable[[Tunable], Engine]] = [BookKeeping, Hooks, Vmap, Loop]


class Scale(nn.Module):
    """A number to learn: 0-d."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of any shape."""
        return hidden * self.factor


class Tied(nn.Module):
    """Words to words: the table that reads them writes them, too; a frozen layer, a norm with buffers, a number."""

    def __init__(self, ties: str = "both") -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_WORDS, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = Scale()
        self.out = nn.Linear(WIDTH, NUM_WORDS, bias=False)
        self.out.weight = self.table.weight
        self.ties = ties

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(b, T) -> (b, T, words)."""
        read = self.table(ids)
        hidden = self.frozen(read if self.ties != "out" else read.detach())
        hidden = self.scale(self.norm(hidden.mT).mT)
        if self.ties == "table":
            return functional.linear(hidden, self.out.weight.detach())
        written: torch.Tensor = self.out(hidden)
        return written


def loss_of(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Each example's."""
    return functional.cross_entropy(module(batch["ids"]).mT, batch[LABELS], reduction="none").sum(1)


def a_tunable(ties: str = "both") -> Tunable:
    torch.manual_seed(0)
    module = Tied(ties).eval()
    with torch.no_grad():
        module.norm.running_mean = torch.randn(WIDTH)
    return Tunable(module, loss=loss_of)


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(NUM_WORDS, (2, NUM_EXAMPLES, LENGTH), generator=generator)
    return {"ids": ids, LABELS: labels}


def one_of(batch: Batch, at: int) -> Batch:
    return {name: part[at : at + 1] for name, part in batch.items()}


def gradients_of(tunable: Tunable, batch: Batch) -> list[torch.Tensor]:
    """Of one example, a flat part for each parameter."""
    found = torch.autograd.grad(tunable.loss(tunable.module, batch).sum(), tunable.parameters, allow_unused=True)
    return [
        torch.zeros(one.numel()) if part is None else part.reshape(-1)
        for part, one in zip(found, tunable.parameters, strict=True)
    ]


def reference(tunable: Tunable, batch: Batch, clip: float) -> torch.Tensor:
    """In float64 from the gradients on."""
    total = torch.zeros(tunable.size, dtype=torch.float64)
    for at in range(NUM_EXAMPLES):
        row = torch.cat(gradients_of(tunable, one_of(batch, at))).double()
        total += row * min(1.0, clip / float(row.norm()))
    return total


def state_of(tunable: Tunable) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in tunable.module.state_dict().items()}


def complaints(make: Callable[[Tunable], Engine]) -> set[str]:
    """What is wrong with an engine."""
    found, tunable, batch = set(), a_tunable(), a_batch()
    before, engine = state_of(tunable), make(tunable)
    for clip in (SMALL, LARGE):
        total = engine.clipped_sum(batch, clip).total.double()
        expected = reference(a_tunable(), batch, clip)
        if total.shape != expected.shape or not float((total - expected).norm()) < 1e-4 * float(expected.norm()):
            found.add("another gradient")
    for at in range(NUM_EXAMPLES):
        alone = engine.clipped_sum(one_of(batch, at), SMALL).total
        others = {name: part[torch.arange(NUM_EXAMPLES) != at] for name, part in batch.items()}
        moved = engine.clipped_sum(batch, SMALL).total - engine.clipped_sum(others, SMALL).total
        if max(float(alone.norm()), float(moved.norm())) > SMALL * (1 + FLOAT_SLACK):
            found.add("sensitivity")
    engine.close()
    after = state_of(tunable)
    if any(not torch.equal(one, after[name]) for name, one in before.items()):
        found.add("buffers")
    return found


@pytest.mark.parametrize("make", ENGINES)
def test_no_engine_has_one_of_these_faults(make: Callable[[Tunable], Engine]) -> None:
    assert complaints(make) == set()


@dataclass
class Faulty:
    """Rows of single examples, made and clipped in a wrong way."""

    tunable: Tunable
    name = "faulty"

    def rows(self, batch: Batch) -> list[torch.Tensor]:
        """Of one example, by parameter."""
        return gradients_of(self.tunable, batch)

    def clipped(self, rows: list[torch.Tensor], clip: float) -> torch.Tensor:
        """What it adds to the sum."""
        row = torch.cat(rows)
        return row * min(1.0, clip / float(row.norm()))

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:  # noqa: ARG002
        """As `Engine`."""
        size = len(batch[LABELS])
        parts = [self.clipped(self.rows(one_of(batch, at)), max_grad_norm) for at in range(size)]
        return Clipped(torch.stack(parts).sum(0), torch.zeros(size, 1))

    def close(self) -> None:
        """Nothing was changed."""


class ByLayer(Faulty):
    """Each parameter is clipped to the whole clip."""

    def clipped(self, rows: list[torch.Tensor], clip: float) -> torch.Tensor:
        """As above."""
        return torch.cat([row * min(1.0, clip / max(1e-12, float(row.norm()))) for row in rows])


class ByLayersShare(Faulty):
    """Each parameter is clipped to an equal share: as private, and another gradient than the flat clip's."""

    def clipped(self, rows: list[torch.Tensor], clip: float) -> torch.Tensor:
        """As above."""
        share = clip / len(rows) ** 0.5
        return torch.cat([row * min(1.0, share / max(1e-12, float(row.norm()))) for row in rows])


class NumberEscapesTheClip(Faulty):
    """What is 0-d is neither measured nor scaled."""

    def clipped(self, rows: list[torch.Tensor], clip: float) -> torch.Tensor:
        """As above."""
        norm = float(torch.cat([row for row in rows if row.numel() > 1]).norm())
        return torch.cat([row * min(1.0, clip / norm) if row.numel() > 1 else row for row in rows])


class NumberIsForgotten(Faulty):
    """What is 0-d gets no gradient."""

    def rows(self, batch: Batch) -> list[torch.Tensor]:
        """As above."""
        return [row if row.numel() > 1 else torch.zeros(1) for row in super().rows(batch)]


class OtherOrder(Faulty):
    """The vector is not in the order of the parameters."""

    def clipped(self, rows: list[torch.Tensor], clip: float) -> torch.Tensor:
        """As above."""
        return super().clipped(rows[::-1], clip)


class FrozenTakePart(Faulty):
    """The frozen layer's gradient is in the vector."""

    def rows(self, batch: Batch) -> list[torch.Tensor]:
        """As above."""
        return [*super().rows(batch), torch.ones(WIDTH * WIDTH + WIDTH)]


class TiedCountOnce(Faulty):
    """Only the writing use of the table is seen."""

    def rows(self, batch: Batch) -> list[torch.Tensor]:
        """As above."""
        return gradients_of(a_tunable("out"), batch)


class TiedApart(Faulty):
    """The table's two uses are clipped as if they were two tables."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:  # noqa: ARG002
        """As above."""
        total = torch.zeros(self.tunable.size)
        for at in range(len(batch[LABELS])):
            one = one_of(batch, at)
            read, both = gradients_of(a_tunable("table"), one), self.rows(one)
            at_table = self.tunable.names.index("table.weight")
            wrote = [row - read[at_table] if place == at_table else row for place, row in enumerate(both)]
            only_read = [row if place == at_table else torch.zeros_like(row) for place, row in enumerate(read)]
            total += self.clipped(wrote, max_grad_norm) + self.clipped(only_read, max_grad_norm)
        return Clipped(total, torch.zeros(len(batch[LABELS]), 1))


class LearnsStatistics(Faulty):
    """The norm is in training mode: examples touch, and its buffers tell of them."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """As above."""
        self.tunable.module.train()
        return super().clipped_sum(batch, max_grad_norm, weights)


class ClipOfTheMean(Faulty):
    """The batch's norm decides."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """As above."""
        total = super().clipped_sum(batch, 1e12, weights).total
        return Clipped(total * min(1.0, max_grad_norm / float(total.norm())), torch.zeros(len(batch[LABELS]), 1))


MUTANTS: dict[Callable[[Tunable], Engine], str] = {
    ByLayer: "sensitivity",
    ByLayersShare: "another gradient",
    NumberEscapesTheClip: "sensitivity",
    NumberIsForgotten: "another gradient",
    OtherOrder: "another gradient",
    FrozenTakePart: "another gradient",
    TiedCountOnce: "another gradient",
    TiedApart: "sensitivity",
    LearnsStatistics: "buffers",
    ClipOfTheMean: "another gradient",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_of_an_engine_is_found(mutant: Callable[[Tunable], Engine]) -> None:
    assert MUTANTS[mutant] in complaints(mutant)


def test_the_engine_into_which_faults_are_planted_has_none() -> None:
    assert complaints(Faulty) == set()


@pytest.mark.parametrize("make", ENGINES)
def test_zero_gradients_add_nothing_and_are_no_error(make: Callable[[Tunable], Engine]) -> None:
    module = nn.Linear(3, 2)
    engine = make(Tunable(module, loss=lambda module, batch: module(batch["x"]).sum(1) * 0))
    assert engine.clipped_sum({"x": torch.randn(4, 3)}, 1.0).total.tolist() == [0.0] * 8


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_an_example_that_is_not_finite_adds_nothing_and_the_others_are_as_without_it(
    make: Callable[[Tunable], Engine], bad: float
) -> None:
    """Of 1e30 the squares overflow."""
    module = nn.Linear(3, 1, bias=False)
    engine = make(Tunable(module, loss=lambda module, batch: module(batch["x"])[:, 0]))
    rows = torch.ones(4, 3)
    whole = engine.clipped_sum({"x": rows[:3]}, 1.0).total
    rows[1, 2] = bad
    torch.testing.assert_close(engine.clipped_sum({"x": rows}, 1.0).total, whole)


@pytest.mark.parametrize("make", ENGINES)
def test_one_example_more_moves_a_large_sum_by_the_clip_and_the_slack_at_most(make: Callable[[Tunable], Engine]) -> None:
    """Measured, as FLOAT_SLACK says: 300 examples of about one direction beside one more, of 16,512 weights."""
    torch.manual_seed(0)
    module = nn.Linear(128, 128)
    engine = make(Tunable(module, loss=lambda module, batch: (module(batch["x"]) * batch["y"]).sum(1)))
    x, y = (torch.randn(128) + 0.1 * torch.randn(301, 128) for _ in range(2))
    clip = 0.5
    moved = [engine.clipped_sum({"x": x[:size], "y": y[:size]}, clip).total.double() for size in (301, 300)]
    assert float((moved[0] - moved[1]).norm()) < clip * (1 + FLOAT_SLACK)
