"""One backward pass gives what a loop over single examples gives: each rule, shared and tied weights, and what is refused."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as Turned1D  # GPT-2's linear layer

from urna.models.book_keeping import BookKeeping
from urna.models.recurrent import recurrent_twin
from urna.models.terms import Convolved, Looked, Outer, Rows
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

SIZE = 5
TOLERANCE = 1e-4


def squares(module: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss that depends on every output of every example: (b,)."""
    output: torch.Tensor = module(batch["x"])
    return (output.float() - 0.3).square().flatten(1).sum(1) if output.dim() > 1 else output.float().square()


def a_tunable(module: nn.Module, seed: int = 1) -> Tunable:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return Tunable(module.eval(), squares)


def reference(tunable: Tunable, batch: Batch) -> torch.Tensor:
    """Each example's gradient by plain autograd, (b, p)."""
    rows = []
    for at in range(len(batch["x"])):
        loss = tunable.loss(tunable.module, {name: one[at : at + 1] for name, one in batch.items()}).sum()
        found = torch.autograd.grad(loss, tunable.parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, tunable.parameters, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def assert_right(tunable: Tunable, batch: Batch) -> None:
    rows = reference(tunable, batch)
    parts = torch.split(rows, [one.numel() for one in tunable.parameters], dim=1)
    norms = torch.stack([part.square().sum(1) for part in parts], dim=1)
    clip = float(rows.norm(dim=1).median())  # about half the examples are clipped
    weights = torch.linspace(0.5, 1.0, len(rows))
    found = BookKeeping(tunable).clipped_sum(batch, clip, weights)
    expected = (weights * clip / rows.norm(dim=1).clamp(min=clip)) @ rows
    assert torch.allclose(found.squared_norms, norms, rtol=TOLERANCE, atol=TOLERANCE * float(norms.max()))
    assert float((found.total - expected).norm()) <= TOLERANCE * float(expected.norm())


def randoms(*shape: int) -> torch.Tensor:
    return torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(7))


def ids(*shape: int, below: int = 6) -> torch.Tensor:
    return torch.randint(below, (SIZE, *shape), generator=torch.Generator().manual_seed(8))


class Turned(nn.Module):
    """Hands a layer another shape, and takes it back."""

    def __init__(self, layer: nn.Module, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.turn = layer, turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.layer(self.turn(x))
        return torch.as_tensor(output[0] if isinstance(output, tuple) else output).reshape(len(x), -1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), randoms(4)),
    "linear-wide": (lambda: nn.Linear(40, 30), randoms(3, 40)),  # Gram matrices
    "linear-long": (lambda: nn.Linear(4, 3, bias=False), randoms(20, 4)),  # rows
    "linear-four-axes": (lambda: nn.Linear(4, 3), randoms(2, 6, 4)),
    "linear-windows": (lambda: Turned(nn.Linear(4, 3), lambda x: x.reshape(-1, 2, 4)), randoms(6, 4)),
    "gpt2-linear": (partial(Turned1D, 3, 4), randoms(7, 4)),
    "gpt2-linear-wide": (partial(Turned1D, 30, 40), randoms(2, 40)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), randoms(3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), randoms(3, 8, 8)),
    "conv2d-gram": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=2, dilation=2), randoms(16, 5, 5)),
    "conv2d-gram-same": (lambda: nn.Conv2d(32, 32, (1, 3), padding="same", dilation=2), randoms(32, 2, 3)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), randoms(4, 6, 6)),
    "conv2d-channels-last": (
        lambda: nn.Conv2d(3, 4, 3, padding=1),
        randoms(3, 8, 8).contiguous(memory_format=torch.channels_last),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), randoms(2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(6, 4), ids(9)),
    "embedding-large": (lambda: nn.Embedding(50, 4, padding_idx=2), ids(9)),
    "embedding-one-each": (lambda: nn.Embedding(6, 4), ids()),
    "layer-norm": (lambda: nn.LayerNorm(4), randoms(6, 4)),
    "layer-norm-two-axes": (lambda: nn.LayerNorm((6, 4)), randoms(6, 4)),
    "layer-norm-one-vector": (lambda: nn.LayerNorm(4), randoms(4)),
    "rms-norm": (lambda: nn.RMSNorm(4, eps=1e-5), randoms(6, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), randoms(4, 3, 3)),
    "instance-norm": (lambda: nn.InstanceNorm2d(4, affine=True), randoms(4, 3, 3)),
    "batch-norm-frozen": (lambda: nn.BatchNorm2d(4), randoms(4, 3, 3)),
    "batch-norm-frozen-parts": (lambda: Turned(nn.BatchNorm1d(4), lambda x: x.reshape(-1, 3, 4).mT), randoms(6, 4)),
    "batch-norm-frozen-vectors": (lambda: nn.BatchNorm1d(4), randoms(4)),
    "lstm": (
        lambda: Turned(recurrent_twin(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), torch.clone),
        randoms(6, 4),
    ),
    "gru": (lambda: Turned(recurrent_twin(nn.GRU(4, 3, batch_first=True)), torch.clone), randoms(6, 4)),
    "rnn": (lambda: Turned(recurrent_twin(nn.RNN(4, 3, batch_first=True, bias=False)), torch.clone), randoms(6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_gradients_by_example_are_those_of_a_loop(name: str) -> None:
    make, x = LAYERS[name]
    before = nn.Linear(x.shape[-1], x.shape[-1]) if x.is_floating_point() and x.dim() < 4 else None
    layer = make()
    module = layer if before is None else nn.Sequential(before, layer)
    assert_right(a_tunable(module), {"x": x})


class Owner(nn.Module):
    """Owns parameters as transformers do: a class token, positions, a scale of channels, a scale of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 7, 4))
        self.gamma = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        result: torch.Tensor = self.gamma * self.linear(tokens) * self.scale
        return result


def test_parameters_that_a_module_owns_are_seen_by_example_scalars_included() -> None:
    tunable = a_tunable(Owner())
    assert_right(tunable, {"x": randoms(6, 4)})
    assert BookKeeping(tunable).clipped_sum({"x": randoms(6, 4)[:1]}, 1.0).squared_norms.shape == (1, 6)  # one example, too


class Twice(nn.Module):
    """One layer, called on its own output: as in ALBERT."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(torch.tanh(self.layer(x)))
        return result


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 4), randoms(30, 4)),
        (nn.Linear(30, 30), randoms(2, 30)),
        (nn.Conv2d(3, 3, 3, padding=1), randoms(3, 6, 6)),
        (nn.Conv2d(24, 24, 3, padding=1), randoms(24, 2, 2)),
        (nn.LayerNorm(4), randoms(6, 4)),
    ],
    ids=["rows", "gram", "conv-rows", "conv-gram", "norm"],
)
def test_a_layer_that_is_called_twice_has_one_gradient(layer: nn.Module, x: torch.Tensor) -> None:
    assert_right(a_tunable(Twice(layer)), {"x": x})


class Tied(nn.Module):
    """A language model: the table of words is the last layer's weight, too."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 4)
        self.out = nn.Linear(4, words, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(torch.tanh(self.words(x)))
        return result


@pytest.mark.parametrize("words", [6, 60], ids=["rows", "table"])
def test_tied_weights_are_counted_together(words: int) -> None:
    tunable = a_tunable(Tied(words))
    assert len(tunable.parameters) == 1
    assert_right(tunable, {"x": ids(9)})


class Positions(nn.Module):
    """Looks positions up without a batch axis, as BERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x + self.table(torch.arange(x.shape[1])[None]))
        return result


def test_positions_without_a_batch_axis_are_looked_up_for_each_example() -> None:
    assert_right(a_tunable(Positions()), {"x": randoms(6, 4)})


class Relative(nn.Module):
    """A table of relative positions, which no example owns: as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(12, 1)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[1])
        table = self.bias(steps[:, None] - steps[None] + 6)[..., 0]  # (T, T)
        result: torch.Tensor = (self.linear(x) @ x.mT + table).softmax(-1) @ x
        return result


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btd,ed->bte", x, self.linear.weight)


@pytest.mark.parametrize("seed", range(3))
def test_a_table_that_the_batch_shares_is_refused(seed: int) -> None:
    with pytest.raises(ModelError, match="must see one input an example"):
        BookKeeping(a_tunable(Relative(), seed)).clipped_sum({"x": randoms(6, 4)}, 1.0)


def test_a_weight_that_is_used_behind_its_layer_s_back_shows_no_gradient_and_so_fails_the_preflight() -> None:
    from urna.models.preflight import check

    tunable = a_tunable(Borrowed())
    with pytest.raises((ModelError, RuntimeError)):
        check(BookKeeping(tunable), tunable, {"x": randoms(6, 4)})


def test_an_example_that_is_not_finite_adds_zero_and_leaves_the_others_alone() -> None:
    tunable = a_tunable(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    x = randoms(6, 4)
    broken = x.clone()
    broken[2, 0, 0] = torch.nan
    broken[4, 1, 1] = torch.inf
    others = torch.tensor([0, 1, 3])
    found = BookKeeping(tunable).clipped_sum({"x": broken}, 0.7)
    expected = BookKeeping(tunable).clipped_sum({"x": x[others]}, 0.7)
    assert torch.isfinite(found.total).all()
    assert torch.allclose(found.total, expected.total, atol=1e-6)
    assert torch.allclose(found.squared_norms[others], expected.squared_norms, rtol=1e-5)


def test_nothing_is_left_on_the_module() -> None:
    tunable = a_tunable(nn.Sequential(nn.Linear(4, 4), Owner(), recurrent_twin(nn.LSTM(4, 3, batch_first=True))))
    tunable.loss = lambda module, batch: module(batch["x"])[0].square().flatten(1).sum(1)
    before = {name: set(one.__dict__) for name, one in tunable.module.named_modules()}
    weights = [one.clone() for one in tunable.parameters]
    BookKeeping(tunable).clipped_sum({"x": randoms(6, 4)}, 1.0)
    with pytest.raises(RuntimeError):
        BookKeeping(tunable).clipped_sum({"x": randoms(6, 3)}, 1.0)  # a crash in the middle
    assert {name: set(one.__dict__) for name, one in tunable.module.named_modules()} == before
    assert all(one.requires_grad and one.grad is None for one in tunable.parameters)
    assert all(torch.equal(one, old) for one, old in zip(tunable.parameters, weights, strict=True))


@pytest.mark.parametrize(
    "term",
    [
        Outer(randoms(3, 4), randoms(3, 6)),
        Outer(randoms(30, 4), randoms(30, 6)),
        Outer(randoms(1, 4), randoms(1, 6)),
        Looked(ids(9), randoms(9, 3), 6),
        Convolved(randoms(3, 6, 6), randoms(4, 6, 6), nn.Conv2d(3, 4, 3, padding=1)),
        Convolved(randoms(8, 2, 2), randoms(9, 2, 2), nn.Conv2d(8, 9, 3, padding=1)),
    ],
    ids=["gram", "rows", "one-step", "looked-up", "convolved", "convolved-gram"],
)
def test_a_term_means_the_same_however_it_is_kept(term: Outer | Looked | Convolved) -> None:
    rows = Rows(term.as_rows())
    factors = torch.linspace(0.1, 1.0, SIZE)
    weighted, expected = torch.zeros(rows.rows[0].numel()), torch.zeros(rows.rows[0].numel())
    shape = (
        term.module.weight.shape if isinstance(term, Convolved) else torch.Size([4, 6] if isinstance(term, Outer) else [6, 3])
    )
    with torch.no_grad():
        term.weighted(factors, weighted.view(shape))
        rows.weighted(factors, expected)
    assert torch.allclose(weighted, expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(term.squared_norms(), rows.squared_norms(), rtol=1e-4)
    chosen = torch.tensor([True, False, True, False, True])
    assert torch.allclose(term.take(chosen).as_rows(), rows.rows[chosen], atol=1e-5)
