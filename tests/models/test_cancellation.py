"""The attack on clips by Gram matrices: a record whose parts cancel, so that float32 loses its norm and leaves its gradient."""

import pytest
import torch
from torch import nn

from urna.models import terms
from urna.models.book_keeping import BookKeeping
from urna.models.row_engines import clip_and_add
from urna.models.tunable import Batch, Tunable
from urna.privacy.release import FLOAT_SLACK

WIDTH, LENGTH, NUM_EXAMPLES = 256, 16, 6


def score_of(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a model whose output gradients the attacker writes."""
    scores: torch.Tensor = module(batch["inputs"]) * batch["gradients"]
    return scores.sum((1, 2))


def attack(difference: float, ids: bool) -> tuple[Tunable, Batch]:
    """Positions that are almost alike, with output gradients of alternating sign: of long parts, little is left."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.tensor([1.0, -1.0] * (LENGTH // 2)).view(1, LENGTH, 1)
    gradients = sign * torch.randn(1, 1, WIDTH, generator=generator)
    near = torch.randn(NUM_EXAMPLES, LENGTH, WIDTH, generator=generator) * difference
    if ids:
        module: nn.Module = nn.Embedding(300, WIDTH)
        return Tunable(module, loss=score_of), {
            "inputs": torch.ones(NUM_EXAMPLES, LENGTH, dtype=torch.int64),
            "gradients": gradients + near,
        }
    inputs = torch.randn(1, 1, WIDTH, generator=generator) + near
    return Tunable(nn.Linear(WIDTH, WIDTH, bias=False), loss=score_of), {
        "inputs": inputs,
        "gradients": gradients.expand_as(inputs).contiguous(),
    }


def longest(ids: bool) -> float:
    """The longest gradient of one example that gets through, in clips."""
    found = 0.0
    for difference in (1e-2, 1e-3, 1e-4, 1e-6):
        tunable, batch = attack(difference, ids)
        engine = BookKeeping(tunable)
        for at in range(NUM_EXAMPLES):
            one = {name: part[at : at + 1] for name, part in batch.items()}
            whole = float(torch.autograd.grad(score_of(tunable.module, one).sum(), tunable.parameters)[0].double().norm())
            for clip in (whole / 3, whole / 100, whole / 1e4):
                found = max(found, float(engine.clipped_sum(one, clip).total.double().norm()) / clip)
        engine.close()
    return found


CANCELLATION = 2.0**-20


def in_float32(term: terms.Outer) -> torch.Tensor:
    """Norms as they once were: by Gram matrices in float32, with 2^-20 of the parts' square added."""
    left, right = term.left.float(), term.right.float()
    products: torch.Tensor = left.square().sum((1, 2)) * right.square().sum((1, 2))
    if left.shape[1] == 1:
        return products
    products = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    parts: torch.Tensor = torch.linalg.vector_norm(left, dim=2) * torch.linalg.vector_norm(right, dim=2)
    return products + CANCELLATION * parts.sum(1).square()


def all_together(_: object, factors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """No example's part is added up in float64."""
    return factors, torch.zeros(0, dtype=torch.int64)


class Two(nn.Module):
    """A wide layer, and a weight with which the attacker fills what rounding takes from the wide layer's squared norm."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, out, bias=False)
        self.narrow = nn.Linear(1, 1, bias=False)


def score_of_two(module: nn.Module, batch: Batch) -> torch.Tensor:
    assert isinstance(module, Two)
    wide: torch.Tensor = (module.wide(batch["inputs"]) * batch["gradients"]).sum((1, 2))
    filling: torch.Tensor = module.narrow(batch["filling"]).sum(1)
    return wide + filling


def through(module: Two, batch: Batch, clip: float) -> float:
    """Clips that one example's gradient has behind its clip."""
    tunable = Tunable(module, loss=score_of_two)
    engine = BookKeeping(tunable)
    found = float(engine.clipped_sum(batch, clip).total.double().norm()) / clip
    engine.close()
    return found


def coherent(clip: float) -> float:
    """Two positions, almost alike, of a width at which each product is rounded down: the squared norm was negative."""
    inputs = torch.stack([torch.full((3072,), 1.0) + 7.70569e-06, torch.ones(3072)])[None]
    gradients = torch.zeros(1, 2, 4096)
    gradients[0, :, 0] = torch.tensor([1.0, -1.0])
    worst, module = 0.0, Two(3072, 4096)
    lost = abs(float(in_float32(terms.Outer(gradients, inputs))[0]))
    for filling in (0.0, *(lost * more for more in (1.0001, 1.01, 1.1))):
        batch = {"inputs": inputs, "gradients": gradients, "filling": torch.full((1, 1), filling**0.5)}
        worst = max(worst, through(module, batch, clip))
    return worst


def underflowing(clip: float) -> float:
    """One position; the squares of its output gradient are zero in float32, and the gradient is not."""
    inputs, gradients = torch.full((1, 1, 512), 8e17), torch.full((1, 1, 3072), 2.6e-23)
    return through(Two(512, 3072), {"inputs": inputs, "gradients": gradients, "filling": torch.zeros(1, 1)}, clip)


def denormal(clip: float) -> float:
    """A factor times the smallest number of float32 is that number again."""
    inputs, gradients = torch.full((1, 2, 64), 1e38), torch.full((1, 2, 64), 1.4e-45)
    return through(Two(64, 64), {"inputs": inputs, "gradients": gradients, "filling": torch.zeros(1, 1)}, clip)


ATTACKS = {"coherent": (coherent, 1e-5), "underflow": (underflowing, 1e-2), "denormal": (denormal, 1.2e-5)}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_gradient_that_float32_cannot_measure_is_not_longer_than_the_clip(attack: str) -> None:
    crafted, clip = ATTACKS[attack]
    assert crafted(clip) <= 1 + FLOAT_SLACK / 2


@pytest.mark.parametrize("attack", ATTACKS)
def test_by_norms_and_sums_in_float32_it_gets_through(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if attack == "denormal":  # its norm overflowed in float32: then nothing got through
        monkeypatch.setattr(terms, "_apart", all_together)
    else:
        monkeypatch.setattr(terms.Outer, "squared_norms", in_float32)
    crafted, clip = ATTACKS[attack]
    assert crafted(clip) > 1 + FLOAT_SLACK


@pytest.mark.parametrize("ids", [False, True], ids=["linear", "table"])
def test_a_gradient_whose_parts_cancel_is_not_longer_than_the_clip(ids: bool) -> None:
    assert longest(ids) <= 1 + FLOAT_SLACK / 2


@pytest.mark.parametrize("ids", [False, True], ids=["linear", "table"])
def test_by_gram_matrices_in_float32_alone_it_would_be(ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "_doubtful", lambda squares, _: torch.zeros(0, dtype=torch.int64, device=squares.device))
    assert longest(ids) > 1 + FLOAT_SLACK


def longest_sum() -> float:
    """Of three positions that cancel but for 10^-5, at many clips: a factor rounds each of the three in its own way."""
    found, parts = 0.0, torch.tensor([3.0, 5.0, -8.0 * (1 + 1e-5)])
    left, right = torch.zeros(1, 3, 64), torch.ones(1, 3, 64)
    left[0, :, 0] = parts * 1.2345
    term, ids = terms.Outer(left, right), torch.zeros(1, 3, dtype=torch.int64)
    table = terms.Looked(ids, left, 5)
    for one, out in ((term, torch.empty(64, 64)), (table, torch.empty(5, 64))):
        norm = float(one.squared_norms().double().sqrt())
        for clip in torch.logspace(-3, 0, 50, dtype=torch.float64).tolist():
            one.weighted(torch.tensor([clip / norm]), out)
            found = max(found, float(out.double().norm()) / clip)
    return found


def test_a_sum_whose_parts_cancel_is_not_longer_than_the_clip() -> None:
    assert longest_sum() <= 1 + FLOAT_SLACK / 2


def test_by_sums_in_float32_alone_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "_apart", all_together)
    assert longest_sum() > 1 + FLOAT_SLACK


@pytest.mark.parametrize("value", [1.1, 1.0001, 1e-16])
def test_a_long_row_of_equal_numbers_is_not_taken_for_shorter(value: float) -> None:
    rows = torch.full((1, 2_000_003), value)
    true = float(rows.double().norm())
    assert float(terms.Rows(rows).squared_norms().double().sqrt()) == pytest.approx(true, rel=2e-5)
    assert float(clip_and_add([rows], true / 3, None).total.double().norm()) <= true / 3 * (1 + 2e-5)


def test_one_float32_sum_of_its_squares_would_take_it_for_shorter() -> None:
    rows = torch.full((1, 2_000_003), 1.1)
    assert float(torch.linalg.vector_norm(rows, dim=1)) < float(rows.double().norm()) * (1 - FLOAT_SLACK / 2)
