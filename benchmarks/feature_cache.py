"""Head training on kept features beside a forward pass of the backbone in every step.

    epoch_seconds_uncached   a pass over the records: each step samples, runs the frozen backbone on its sample, then steps
    epoch_seconds_cached     the same steps on features that are in memory
    speed_up                 the one over the other; features are computed once a campaign, which is not counted here:
    compute_seconds          that once
    write_seconds, read_seconds   of the cache on the disk, encrypted; the reader is a process of its own, as in stock Flower
    version_seconds          the keyed hash of all records, by which they are found again
    file_bytes               on the disk

A step is the product's: Poisson sample, per-example gradients, clip on the grid, sum, noise. The model has the shape of
MiniLM (6 layers of 384), random weights, 32 tokens a record; each part runs in its own process, on one thread, the
median of three turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from urna.client.feature_cache import FeatureCache, data_version
from urna.client.records import Records, Texts

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import nn

NUM_RECORDS, NUM_TOKENS, NUM_CLASSES = 1000, 32, 4
WIDTH, NUM_LAYERS, NUM_WORDS = 384, 6, 30_522
SAMPLE_RATE, MAX_GRAD_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 0.1, 1.0, 1.0, 0.5
NUM_TURNS = 3
KEY = bytes(range(32))
PARTS = ("a model", "the records", "tuning", "1")

Features = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Result = TypeVar("Result")


def some_tokens() -> Tokens:
    """Of all records, (n, T)."""
    return np.random.default_rng(0).integers(1000, NUM_WORDS, (NUM_RECORDS, NUM_TOKENS))


def a_backbone() -> "nn.Module":
    """The same in every process."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=NUM_WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
    )
    backbone: torch.nn.Module = BertModel(config, add_pooling_layer=False)
    return backbone.eval().requires_grad_(False)


def features_of(backbone: "nn.Module", tokens: Tokens) -> Features:
    """The mean over tokens, (n, 384), normalised for a head."""
    import torch

    from urna.models.tuning import normalise_for_head

    parts = [np.zeros((0, WIDTH), np.float32)]
    with torch.no_grad():
        for start in range(0, len(tokens), 128):
            hidden = backbone(input_ids=torch.from_numpy(tokens[start : start + 128])).last_hidden_state
            parts.append(hidden.mean(dim=1).numpy())
    return normalise_for_head(np.concatenate(parts))


def seconds_of_epoch(features: Callable[[npt.NDArray[np.bool_]], Features]) -> float:
    """1 / q steps; of each, ``features`` gives those of the chosen records."""
    import torch

    from urna.client.training import local_grid
    from urna.models.tuning import head_from_vector, per_example_gradients, trainable_size
    from urna.privacy.mechanisms import poisson_sample
    from urna.privacy.release import noisy_sum

    labels = np.arange(NUM_RECORDS) % NUM_CLASSES
    vector = np.zeros(trainable_size(WIDTH, NUM_CLASSES), np.float32)
    grid = local_grid(MAX_GRAD_NORM)
    started = time.perf_counter()
    for _ in range(round(1 / SAMPLE_RATE)):
        chosen = poisson_sample(NUM_RECORDS, SAMPLE_RATE)
        head = head_from_vector(vector, WIDTH, NUM_CLASSES)
        rows = per_example_gradients(head, torch.from_numpy(features(chosen)), torch.from_numpy(labels[chosen]))
        total = noisy_sum(rows.double().numpy(), MAX_GRAD_NORM, NOISE_MULTIPLIER, grid, num_noise_parties=1) * grid.step
        vector = (vector - LEARNING_RATE * total / (SAMPLE_RATE * NUM_RECORDS)).astype(np.float32)
    return time.perf_counter() - started


def uncached() -> float:
    """Seconds of an epoch."""
    backbone, tokens = a_backbone(), some_tokens()
    features_of(backbone, tokens[:10])  # imports and first allocations
    return _median(lambda: seconds_of_epoch(lambda chosen: features_of(backbone, tokens[chosen])))


def computed(folder: str) -> tuple[float, float, float]:
    """Seconds to compute all features, to keep them, and to hash the records."""
    backbone, tokens = a_backbone(), some_tokens()
    features_of(backbone, tokens[:10])
    started = time.perf_counter()
    features = features_of(backbone, tokens)
    compute = time.perf_counter() - started
    cache = FeatureCache(Path(folder), KEY)
    key = cache.key(PARTS)
    started = time.perf_counter()
    cache.put(key, features)
    write = time.perf_counter() - started
    ids = tuple(f"record-{number}" for number in range(NUM_RECORDS))
    texts = Texts(tuple(" ".join(map(str, row)) for row in tokens.tolist()))
    records = Records(ids, ids, np.arange(NUM_RECORDS) % NUM_CLASSES, texts)
    return compute, write, _median(lambda: _seconds_of(lambda: data_version(records, KEY)))


def cached(folder: str) -> tuple[float, float]:
    """Seconds to read all features, the first time, and of an epoch."""
    cache = FeatureCache(Path(folder), KEY)
    started = time.perf_counter()
    features = cache.get(cache.key(PARTS))
    read = time.perf_counter() - started
    if features is None or features.shape != (NUM_RECORDS, WIDTH):
        raise RuntimeError(f"expected features of {NUM_RECORDS} records in the cache, found none")
    kept = features
    seconds_of_epoch(lambda chosen: kept[chosen])  # imports and first allocations
    return read, _median(lambda: seconds_of_epoch(lambda chosen: kept[chosen]))


def in_a_process(work: Callable[..., Result], *arguments: str) -> Result:
    """Run it in a fresh one, on one thread."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        return pool.submit(work, *arguments).result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _median(work: Callable[[], float]) -> float:
    return statistics.median(work() for _ in range(NUM_TURNS))


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes them
    """All of it; see the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        compute, write, version = in_a_process(computed, folder)
        read, epoch_cached = in_a_process(cached, folder)
        file_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    epoch_uncached = in_a_process(uncached)
    return {
        "model": {"layers": NUM_LAYERS, "width": WIDTH, "tokens": NUM_TOKENS, "classes": NUM_CLASSES},
        "records": NUM_RECORDS,
        "steps_per_epoch": round(1 / SAMPLE_RATE),
        "epoch_seconds_uncached": round(epoch_uncached, 3),
        "epoch_seconds_cached": round(epoch_cached, 4),
        "speed_up": round(epoch_uncached / epoch_cached, 1),
        "compute_seconds": round(compute, 3),
        "write_seconds": round(write, 5),
        "read_seconds": round(read, 5),
        "version_seconds": round(version, 5),
        "file_bytes": file_bytes,
    }
