"""Tiny modules, each with one thing in it that per-example code is known to get wrong, and engines that get it wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from urna.models.engine_types import Clipped, Engine
from urna.models.engines import _MAKERS
from urna.models.repairs import repair
from urna.models.tunable import LABELS, Batch, Tunable, cross_entropy

NUM_CLASSES = 3
SIZE = 5


class Pictures(nn.Module):
    """Takes (b, 2, 8, 8) by the name ``x``."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layers(x).flatten(2).mean(2))
        return found


class ChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Takes (b, 7) ids by the name ``ids``; positions have no batch axis; the padding index has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])[None]
        found: torch.Tensor = self.head(self.norm(self.words(ids) + self.positions(places)).mean(1))
        return found


def one_hot(ids: torch.Tensor) -> torch.Tensor:
    return torch.eye(6)[ids % 6]


class Tied(nn.Module):
    """One weight in two layers, of which one is given its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = one_hot(ids).mean(1)
        found: torch.Tensor = self.head(self.second(torch.tanh(self.first(hidden))))
        return found


class CalledTwice(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.second = self.first


class Raw(nn.Module):
    """Parameters that a module owns itself: a token, a table, a scale without any dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 6), 0.3))
        self.table = nn.Parameter(torch.linspace(-1, 1, 48).view(1, 8, 6))
        self.logit_scale = nn.Parameter(torch.tensor(0.7))
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = one_hot(ids)
        hidden = torch.cat([self.token.expand(len(ids), -1, -1), hidden], 1) + self.table
        found: torch.Tensor = self.head(torch.tanh(self.mix(hidden)).mean(1)) * self.logit_scale.exp()
        return found


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 4)
        self.layer = layer
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layer(self.words(ids))[0].mean(1))
        return found


class Attention(nn.Module):
    """nn.TransformerEncoderLayer with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, 1:] == 0], 1).bool()
        found: torch.Tensor = self.head(self.layer(self.words(ids), src_key_padding_mask=mask)[:, 0])
        return found


class SharedTable(nn.Module):
    """A table that all examples share, through a layer that is given no batch; most weights are elsewhere."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.through = nn.Linear(width, width)
        self.mix = nn.Linear(6, width)
        self.wide = nn.Linear(width, 40)
        self.head = nn.Linear(40, NUM_CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        shared = self.through(self.table(torch.arange(7)))  # (7, width)
        hidden = torch.tanh(self.mix(one_hot(ids)) * shared)
        found: torch.Tensor = self.head(self.wide(hidden).mean(1))
        return found


def ids() -> torch.Tensor:
    return (torch.arange(SIZE * 7).view(SIZE, 7) * 13 + torch.arange(SIZE)[:, None] * 5) % 11


def pictures() -> torch.Tensor:
    return torch.linspace(0, 300, SIZE * 128).sin().view(SIZE, 2, 8, 8)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    entry: str

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self) -> dict[str, torch.Tensor]:
        return {self.entry: pictures() if self.entry == "x" else ids(), LABELS: torch.arange(SIZE) % NUM_CLASSES}


def with_statistics(module: nn.Module) -> nn.Module:
    """Batch normalisations as after a training."""
    for number, layer in enumerate(one for one in module.modules() if isinstance(one, nn.BatchNorm2d)):
        channels = torch.arange(layer.num_features)
        for tensor, value in (
            (layer.running_mean, 0.3 * channels - 0.2 * number),
            (layer.running_var, 0.5 + channels),
            (layer.weight, 1.0 - 0.3 * channels),
            (layer.bias, 0.1 * channels),
        ):
            assert tensor is not None
            tensor.data.copy_(value)
    return module


def normalised() -> nn.Module:
    """Behind a convolution with and without bias, and one that is behind none."""
    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    return with_statistics(Pictures(*layers, nn.ReLU(), nn.BatchNorm2d(4), width=4))


CASES = {
    "convolutions": Case(lambda: Pictures(nn.Conv2d(2, 4, 3, stride=2), nn.GELU(), nn.Conv2d(4, 4, 3, groups=2), width=4), "x"),
    "channels-last": Case(lambda: Pictures(ChannelsLast(), nn.Conv2d(2, 4, 3, padding=1), width=4), "x"),
    "circular": Case(lambda: Pictures(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), width=4), "x"),
    "transposed": Case(lambda: Pictures(nn.ConvTranspose2d(2, 4, 3), nn.GroupNorm(2, 4), width=4), "x"),
    "in-place": Case(lambda: Pictures(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), width=4), "x"),
    "batch norm": Case(normalised, "x"),
    "tokens": Case(Tokens, "ids"),
    "tied": Case(Tied, "ids"),
    "called twice": Case(CalledTwice, "ids"),
    "raw": Case(Raw, "ids"),
    "lstm": Case(lambda: Recurrent(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), 10), "ids"),
    "gru": Case(lambda: Recurrent(nn.GRU(4, 5, batch_first=True), 5), "ids"),
    "rnn": Case(lambda: Recurrent(nn.RNN(4, 5, batch_first=True), 5), "ids"),
    "attention": Case(Attention, "ids"),
}


CANNOT = {  # engine -> what it refuses, with an error
    "book-keeping": ("circular", "transposed"),
    "hooks": (),
    "vmap": ("lstm", "gru", "rnn"),  # a twin's recurrence is a function of its own
    "loop": (),
}


def tunable_of(module: nn.Module) -> Tunable:
    return Tunable(module, cross_entropy)


def repaired(case: str) -> tuple[Tunable, dict[str, torch.Tensor]]:
    module, batch = CASES[case].module(), CASES[case].batch()
    repair(module, batch, cross_entropy)
    return tunable_of(module), batch


def make(name: str, tunable: Tunable) -> Engine:
    return _MAKERS[name](tunable)


def rows_by_definition(tunable: Tunable, batch: Batch) -> torch.Tensor:
    """Plain autograd, one example at a time, (b, p)."""
    rows = []
    for i in range(len(next(iter(batch.values())))):
        loss = tunable.loss(tunable.module, {name: part[i : i + 1] for name, part in batch.items()})
        found = torch.autograd.grad(loss.sum(), tunable.parameters, allow_unused=True)
        pairs = zip(found, tunable.parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(one) if part is None else part).flatten() for part, one in pairs]))
    return torch.stack(rows)


@dataclass(eq=False)
class Mutant:
    """An engine with one fault in it, made of rows by definition."""

    tunable: Tunable
    fault: Callable[[torch.Tensor, float, torch.Tensor, list[int]], tuple[torch.Tensor, torch.Tensor]]
    name: str = "mutant"

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        rows = rows_by_definition(self.tunable, batch)
        weight = torch.ones(len(rows)) if weights is None else weights
        sizes = [one.numel() for one in self.tunable.parameters]
        total, rows = self.fault(rows, max_grad_norm, weight, sizes)
        return Clipped(total, torch.stack([part.square().sum(1) for part in torch.split(rows, sizes, 1)], 1))

    def close(self) -> None:
        pass
