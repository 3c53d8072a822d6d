"""Parts of one shape: a logical batch's sum, memory, and that no example's gradient depends on who else was drawn."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import BertConfig

from tests.models.engine_cases import SIZE, make, repaired
from tests.models.folders import WORDS as VOCABULARY
from tests.models.folders import model_of, save
from urna.models.engine_types import Clipped, Engine
from urna.models.installed import About, install
from urna.models.loading import Backbone, by_length, filled, load_backbone
from urna.models.parts import MicroBatches, available_bytes, bytes_per_example, micro_batches
from urna.models.prepared import Prepared, clipped_sum, logits, prepare
from urna.models.tunable import LABELS, Batch, Tunable
from urna.protocol.errors import ModelError

NAMES = ("book-keeping", "hooks", "vmap", "loop")
Tokens = tuple[Engine, Tunable, dict[str, torch.Tensor]]


@pytest.fixture
def tokens() -> Iterator[Tokens]:
    tunable, batch = repaired("tokens")
    engine = make("hooks", tunable)
    yield engine, tunable, batch
    engine.close()


def blank_of(batch: Batch) -> Batch:
    return {name: one[:1] for name, one in batch.items()}


def close(found: torch.Tensor, true: torch.Tensor) -> bool:
    return bool((found - true).norm() <= 1e-5 * true.norm())


class Scarce:
    """An engine on a machine whose memory holds so many examples; it fails after it has begun."""

    name = "scarce"

    def __init__(self, engine: Engine, holds: int, error: type[BaseException] | str) -> None:
        self.engine, self.holds, self.error = engine, holds, error
        self.sizes: list[int] = []

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        found = self.engine.clipped_sum(batch, max_grad_norm, weights)
        self.sizes.append(len(batch[LABELS]))
        if len(batch[LABELS]) > self.holds:
            raise RuntimeError(self.error) if isinstance(self.error, str) else self.error("no memory")
        return found

    def close(self) -> None:
        self.engine.close()


OUT_OF_MEMORY = (
    torch.OutOfMemoryError,
    MemoryError,
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes",
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_slots_are_halved_on_blanks_when_memory_is_not_enough_and_the_sum_is_the_same(
    tokens: Tokens, error: type[BaseException] | str
) -> None:
    engine, tunable, batch = tokens
    weights = torch.linspace(0, 2, SIZE)
    whole = engine.clipped_sum(batch, 0.1, weights)
    scarce = Scarce(engine, 1, error)
    parts = MicroBatches(scarce, tunable, blank_of(batch), 4)
    parts.settle()
    assert scarce.sizes == [4, 2, 1]
    assert parts.size == 1
    found = parts.clipped_sum(batch, 0.1, weights)
    assert close(found.total, whole.total)
    assert torch.allclose(found.squared_norms, whole.squared_norms, rtol=1e-5)
    assert scarce.sizes[3:] == [1] * SIZE  # remembered


def test_memory_that_is_lost_later_is_an_error_and_never_another_shape(tokens: Tokens) -> None:
    engine, tunable, batch = tokens
    scarce = Scarce(engine, 4, MemoryError)
    parts = MicroBatches(scarce, tunable, blank_of(batch), 4)
    parts.settle()
    scarce.holds = 2
    with pytest.raises(ModelError, match="memory for 4 examples at once, as there was before"):
        parts.clipped_sum(batch, 0.1)
    assert parts.size == 4


def test_too_little_memory_for_one_example_is_an_error(tokens: Tokens) -> None:
    engine, tunable, batch = tokens
    with pytest.raises(ModelError, match="memory for one example at a time"):
        MicroBatches(Scarce(engine, 0, MemoryError), tunable, blank_of(batch), 4).clipped_sum(batch, 0.1)


def test_another_error_is_not_taken_for_a_lack_of_memory(tokens: Tokens) -> None:
    engine, tunable, batch = tokens
    scarce = Scarce(engine, 1, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        MicroBatches(scarce, tunable, blank_of(batch), 4).clipped_sum(batch, 0.1)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 99, None])
def test_the_logical_batch_does_not_depend_on_the_parts(tokens: Tokens, limit: int | None) -> None:
    engine, tunable, batch = tokens
    whole = engine.clipped_sum(batch, 0.1)
    found = micro_batches(engine, tunable, blank_of(batch), limit=limit).clipped_sum(batch, 0.1)
    assert close(found.total, whole.total)
    assert found.squared_norms.shape == whole.squared_norms.shape


def test_an_empty_batch_is_a_zero_sum_and_runs_nothing(tokens: Tokens) -> None:
    engine, tunable, batch = tokens
    tunable.module.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    nothing = {name: part[:0] for name, part in batch.items()}
    found = MicroBatches(engine, tunable, blank_of(batch), 4).clipped_sum(nothing, 0.1)
    assert found.total.shape == (tunable.size,)
    assert not found.total.any()
    assert found.squared_norms.shape == (0, len(tunable.parameters))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_sums_stay_float32(name: str) -> None:
    tunable, batch = repaired("raw")
    engine = make(name, tunable)
    whole = engine.clipped_sum(batch, 0.1)
    found = MicroBatches(engine, tunable, blank_of(batch), 5, "bfloat16").clipped_sum(batch, 0.1)
    engine.close()
    assert found.total.dtype == found.squared_norms.dtype == torch.float32
    assert not torch.equal(found.total, whole.total)
    assert float((found.total - whole.total).norm() / whole.total.norm()) < 0.03
    assert {one.dtype for one in tunable.parameters} == {torch.float32}


def test_memory_of_an_example_grows_with_what_is_kept_of_it() -> None:
    tunable, batch = repaired("convolutions")
    wide = {**batch, "x": batch["x"].repeat(1, 1, 4, 4)}
    narrow_bytes, wide_bytes = (bytes_per_example("book-keeping", tunable, blank_of(one)) for one in (batch, wide))
    assert 16 < wide_bytes / narrow_bytes < 40
    assert bytes_per_example("hooks", tunable, blank_of(batch)) >= narrow_bytes + 8 * tunable.size


def test_the_tightest_limit_on_memory_counts(tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 90 kB\n",
        "proc/self/cgroup": "0::/urna.slice\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "10\n",
        "sys/fs/cgroup/urna.slice/memory.max": "60000\n",
        "sys/fs/cgroup/urna.slice/memory.current": "20000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "ascii")
    assert available_bytes(torch.device("cpu"), tmp_path) == 40000
    (tmp_path / "sys/fs/cgroup/urna.slice/memory.max").write_text("max\n", "ascii")
    assert available_bytes(torch.device("cpu"), tmp_path) == 90 * 1024
    assert available_bytes(torch.device("cpu")) > 1 << 20


# --- the attack on companions: an operator's weights make a rounding error large ------------------------------------------

CLASSES, CLIP = 4, 1.0
READER = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
)
WORDS = ("the", "dog", "runs", "fast", "cat", "sleeps", "it", "a")


def sentences(count: int, words: int, seed: int) -> list[str]:
    drawn = np.random.default_rng(seed).integers(0, len(WORDS), (count, words))
    return [" ".join(WORDS[one] for one in row) for row in drawn]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    root, hub = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("hub")
    found = install("reader", save(model_of(READER), hub, words=True), About("MIT", "nothing"), root=root)
    return load_backbone("reader", found.sha256, root)


@functools.cache
def ready(backbone: Backbone) -> Prepared:
    prepared = prepare(backbone, CLASSES, "full", micro_batch=8)
    prepared.tunable.load(hostile(prepared.tunable, 300.0))
    return prepared


def hostile(tunable: Tunable, size: float) -> NDArray[np.float32]:
    """Weights that a site lets through and that no training gives: each layer multiplies differences."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for name, one in zip(tunable.names, tunable.parameters, strict=True):
        if name.startswith("head."):
            part = 0.5 * torch.randn(one.shape, generator=generator)
        elif name.endswith("LayerNorm.weight"):
            part = torch.full(one.shape, size)
        elif name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight")):
            part = size * 0.05 * torch.randn(one.shape, generator=generator)
        else:
            part = torch.zeros(one.shape)
        parts.append(part.flatten())
    return torch.cat(parts).numpy()


def summed(prepared: Prepared, texts: list[str]) -> NDArray[np.float64]:
    """As a site adds them up; a text's label is its length."""
    backbone, total = prepared.backbone, np.zeros(prepared.tunable.size)
    for places, length in by_length(backbone.lengths(texts), prepared.parts.size):
        some = [texts[place] for place in places]
        labels = torch.tensor([len(text) % CLASSES for text in some])
        total += clipped_sum(prepared, {**backbone.batch(some, length), LABELS: labels}, CLIP).double().numpy()
    return total


@pytest.mark.parametrize("place", [0, 5, 40], ids=["first", "in-between", "last"])
@pytest.mark.parametrize("extra_words", [3, 60], ids=["short", "long"])
def test_one_record_more_moves_the_sum_by_no_more_than_its_clip_at_hostile_weights(
    reader: Backbone, place: int, extra_words: int
) -> None:
    prepared = ready(reader)
    texts, extra = sentences(40, 12, 1), sentences(1, extra_words, 2)
    moved = summed(prepared, texts[:place] + extra + texts[place:]) - summed(prepared, texts)
    assert 0.5 < np.linalg.norm(moved) <= CLIP * (1 + 1e-3)


def test_padded_to_the_longest_companion_it_would_move_by_more(reader: Backbone) -> None:
    """The mutant: shapes that depend on who else was drawn."""
    prepared = ready(reader)
    texts, extra = sentences(40, 12, 1), sentences(1, 60, 2)

    def together(some: list[str]) -> NDArray[np.float64]:
        batch = reader.batch(some, int(reader.lengths(some).max()))
        labels = torch.tensor([len(text) % CLASSES for text in some])
        return prepared.engine.clipped_sum({**batch, LABELS: labels}, CLIP).total.double().numpy()

    assert np.linalg.norm(together(texts + extra) - together(texts)) > 1.5 * CLIP


def test_a_row_is_the_same_bit_for_bit_whatever_stands_beside_it(reader: Backbone) -> None:
    prepared = ready(reader)
    text = sentences(1, 6, 3)
    length = int(reader.lengths(text)[0])
    rows = []
    for companions in ([], sentences(7, 6, 4), sentences(3, 2, 5)):
        for place in {0, len(companions)}:
            some = companions[:place] + text + companions[place:]
            rows.append(logits(prepared, reader.batch(some, length))[place])
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_features_do_not_depend_on_companions_bit_for_bit(reader: Backbone) -> None:
    texts, long = sentences(5, 6, 6), sentences(1, 90, 7)
    alone, together = reader.features(texts), reader.features(long + texts)
    assert np.array_equal(alone, together[1:])


def test_blanks_fill_a_batch_at_its_own_length() -> None:
    some = {"ids": torch.ones(2, 3, dtype=torch.int64), LABELS: torch.ones(2, dtype=torch.int64)}
    blank = {"ids": torch.tensor([[7, 0, 0, 0]]), LABELS: torch.zeros(1, dtype=torch.int64)}
    whole = filled(some, blank, 4)
    assert whole["ids"].tolist() == [[1, 1, 1], [1, 1, 1], [7, 0, 0], [7, 0, 0]]
    assert whole[LABELS].tolist() == [1, 1, 0, 0]


def test_a_model_s_longest_input_decides_its_memory(reader: Backbone) -> None:
    prepared = ready(reader)
    assert isinstance(reader.config, BertConfig)
    assert prepared.parts.blank["input_ids"].shape == (1, reader.config.max_position_embeddings)
    assert prepared.parts.settled
