"""Training sets of every tuning mode, and what their gradients are by another way: for tests of a site's training step."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tests.client.clinic import NUM_CLASSES
from urna.client.training import ModelSet, TuningSet, sample_gradients, sample_total
from urna.models.catalogue import CATALOGUE
from urna.models.loading import Backbone
from urna.models.prepared import Prepared, prepare
from urna.models.tunable import LABELS
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, clip_rows
from urna.privacy.release import engine_clip
from urna.protocol.plan import Plan

torch.set_num_threads(1)  # tiny models: threads only wait for each other
DIM = 31
Set = TuningSet | ModelSet
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """A tuning mode on records of its own.

    Args:
        name: of the mode.
        size: p.
        records: (n, seed, scale) -> a set, every record a unit of its own.
        gradients: of each record (n, p), unclipped, by another way than the product's.
        clip: what records are clipped to, given the plan's clip and the grid.
    """

    name: str
    size: int
    records: Callable[[int, int, float], Set]
    gradients: Callable[[Set, Vector], Floats]
    clip: Callable[[float, Grid], float]

    def vector(self, seed: int = 1) -> Vector:
        """Away from the start, where a head of zeros would hide the backbone."""
        return np.random.default_rng(seed).normal(0, 0.1, self.size).astype(np.float32)


# --- head


def head_records(num_records: int, seed: int = 0, scale: float = 1.0) -> TuningSet:
    generator = np.random.default_rng(seed)
    features = (scale * generator.normal(size=(num_records, DIM))).astype(np.float32)
    return TuningSet(features, generator.integers(0, NUM_CLASSES, num_records), np.arange(num_records))


def softmax_gradients(data: Set, vector: npt.NDArray[np.floating]) -> Floats:
    """(n, p) in closed form: (softmax(Wx + b) - onehot) outer (x, 1)."""
    assert isinstance(data, TuningSet)
    weight, bias = vector[: DIM * NUM_CLASSES].reshape(NUM_CLASSES, DIM), vector[DIM * NUM_CLASSES :]
    features = data.features.astype(np.float64)
    logits = features @ weight.T + bias
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = exp / exp.sum(axis=1, keepdims=True) - np.eye(NUM_CLASSES)[data.labels]
    return np.concatenate([(error[:, :, None] * features[:, None, :]).reshape(len(features), DIM * NUM_CLASSES), error], axis=1)


HEAD = Kind("head", (DIM + 1) * NUM_CLASSES, head_records, softmax_gradients, lambda clip, _grid: clip)


# --- lora, full


class Tiny(nn.Module):
    """A convolution, buffers that training would change, and a weight without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(27, 5)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, 5)."""
        hidden: torch.Tensor = self.linear(torch.relu(self.norm(self.conv(images))).flatten(1)) * self.gain
        return hidden


def tiny_backbone() -> Backbone:
    """Weights and statistics of a fixed draw."""
    generator = np.random.default_rng(7)
    module = Tiny()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim:
                drawn = generator.normal(0, 0.4, tensor.shape).astype(np.float32)
                tensor.copy_(torch.from_numpy(np.abs(drawn) + 0.5 if "var" in name else drawn))
    spec = dataclasses.replace(CATALOGUE["cnn"], feature_dim=5)
    return Backbone(spec, "0" * 64, module.eval().requires_grad_(False), torch.zeros(5), torch.tensor(1.0))


@functools.cache
def tiny(tuning: Literal["lora", "full"]) -> Prepared:
    """With the engine that the product chooses for it; eight records at a time, so that samples go in parts."""
    return prepare(tiny_backbone(), NUM_CLASSES, tuning, lora_rank=2, micro_batch=8)


def model_set(
    prepared: Prepared, images: torch.Tensor, labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]
) -> ModelSet:
    """Of these records."""

    def batch(at: npt.NDArray[np.int64], length: int) -> dict[str, torch.Tensor]:
        assert length == 0
        return {"images": images[torch.from_numpy(at)], LABELS: torch.from_numpy(labels[at])}

    return ModelSet(prepared, batch, groups, np.zeros(len(labels), np.int64))


def model_records(tuning: Literal["lora", "full"], num_records: int, seed: int = 0, scale: float = 1.0) -> ModelSet:
    generator = np.random.default_rng(seed)
    images = torch.from_numpy((scale * generator.normal(size=(num_records, 1, 8, 8))).astype(np.float32))
    labels = generator.integers(0, NUM_CLASSES, num_records)
    return model_set(tiny(tuning), images, labels, np.arange(num_records))


def loop_gradients(data: Set, vector: npt.NDArray[np.floating]) -> Floats:
    """One record at a time by plain autograd, in the order of the flat vector."""
    assert isinstance(data, ModelSet)
    tunable = data.prepared.tunable
    tunable.load(vector.astype(np.float32))
    rows = []
    for at in range(len(data.groups)):
        loss = tunable.loss(tunable.module, data.batch(np.array([at]), 0)).sum()
        rows.append(torch.cat([one.reshape(-1) for one in torch.autograd.grad(loss, tunable.parameters)]).double().numpy())
    return np.stack(rows) if rows else np.zeros((0, tunable.size))


@functools.cache
def kinds() -> tuple[Kind, ...]:
    """Every mode."""
    found = [HEAD]
    for tuning in ("lora", "full"):
        size = tiny(tuning).tunable.size
        records = functools.partial(model_records, tuning)
        found.append(Kind(tuning, size, records, loop_gradients, functools.partial(_engine_clip, size)))
    return tuple(found)


def _engine_clip(size: int, clip: float, grid: Grid) -> float:
    return engine_clip(clip, size, grid)


# --- any mode


def some(data: Set, at: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None = None) -> Set:
    """Records at these places, each a unit of its own unless ``groups`` says otherwise."""
    groups = np.arange(len(at)) if groups is None else groups
    if isinstance(data, TuningSet):
        return TuningSet(data.features[at], data.labels[at], groups)
    return ModelSet(data.prepared, lambda places, length: data.batch(at[places], length), groups, np.zeros(len(at), np.int64))


def raw_total(data: Set, vector: Vector, plan: Plan, clip: float) -> Floats:
    """The sum of a sample's gradients, each clipped to ``clip``, without noise."""
    if isinstance(data, TuningSet):
        return np.asarray(clip_rows(sample_gradients(data, vector, plan), clip).sum(axis=0))
    return sample_total(data, vector, plan, clip)
