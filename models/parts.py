"""A logical batch in physical parts of one shape, chosen from memory once.

A logical batch is what Poisson sampling drew, of any size. What is computed for one of its examples must not depend on which
others were drawn: their number and length decide shapes, shapes decide the order in which float32 rounds, and weights that an
operator chose can make a rounding error large. So every part has the same number of slots; those that no example takes hold a
blank of weight zero; and a text is padded to a length that it has by itself (`text.TextAdapter.length_classes`). Then a row of
a matrix product is the same whatever its companions are and wherever it stands: measured bit for bit, see the tests.

Covered:
    companions, their number and order; memory that is not enough, which is found out before records are looked at.
Not covered:
    the sum itself, whose last bits depend on all that is in it: about 1e-7 of a clip for each example beside it;
    libraries whose matrix products depend on where a row stands: the preflight compares slots.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from urna.models.engine_types import Clipped, Engine, Precision
from urna.models.loading import filled
from urna.models.row_engines import out_of_memory
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

MEMORY_FRACTION = 0.5  # of what is available: the rest is for temporaries, the optimiser and other processes
SLOTS = {"cpu": 32, "cuda": 128}  # of a part, at most: more are hardly faster, and more of them stay empty

log = logging.getLogger(__name__)


@dataclass(eq=False)
class MicroBatches:
    """Computes logical batches in parts of one number of slots.

    Args:
        engine: One that passed the preflight.
        tunable: What it was made for.
        blank: One example that is nobody's, as long as one can be.
        size: Slots of a part.
        precision: What the module computes in; gradients, norms and sums are float32 always.
    """

    engine: Engine
    tunable: Tunable
    blank: Batch
    size: int
    precision: Precision = "float32"
    settled: bool = field(default=False, init=False)

    def settle(self) -> None:
        """Compute one part of blanks, with half the slots for as long as memory is not enough; then the size stays.

        Raises:
            ModelError: memory is not enough for one example.
        """
        while not self.settled:
            try:
                self._part({name: one[:0] for name, one in self.blank.items()}, 1.0, None)
                self.settled = True
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if not self.settled:  # outside of the handler: the error's traceback holds the tensors that did not fit
                self._halve()

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        """The clipped sum of examples of one shape, possibly none: then nothing is computed and the sum is zero.

        Raises:
            ModelError: memory is not enough for a part.
        """
        num_examples = len(next(iter(batch.values())))
        norms = [torch.zeros((0, len(self.tunable.parameters)), device=self.tunable.device)]
        total: torch.Tensor | None = None
        if num_examples:
            self.settle()
        for start in range(0, num_examples, self.size):
            part = slice(start, start + self.size)
            try:
                found = self._part({name: one[part] for name, one in batch.items()}, max_grad_norm, _some(weights, part))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise ModelError(
                    f"expected memory for {self.size} examples at once, as there was before, found that it is not enough: "
                    "free some, or set compute.micro_batch"
                ) from error
            total = found.total if total is None else total.add_(found.total)
            norms.append(found.squared_norms)
        if total is None:
            total = torch.zeros(self.tunable.size, device=self.tunable.device)
        return Clipped(total, torch.cat(norms))

    def _part(self, some: Batch, max_grad_norm: float, weights: torch.Tensor | None) -> Clipped:
        num_examples = len(next(iter(some.values())))
        whole = filled(some, self.blank, self.size)
        factor = torch.zeros(self.size, device=self.tunable.device)
        factor[:num_examples] = 1.0 if weights is None else weights
        with autocasting(self.tunable.device, self.precision):
            found = self.engine.clipped_sum(whole, max_grad_norm, factor)
        return Clipped(found.total, found.squared_norms[:num_examples])

    def _halve(self) -> None:
        gc.collect()
        if self.tunable.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.size == 1:
            raise ModelError("expected memory for one example at a time, found that it is not enough: choose a smaller model")
        self.size //= 2
        log.warning("memory was not enough: %d examples are computed at once", self.size)


def micro_batches(
    engine: Engine, tunable: Tunable, blank: Batch, *, limit: int | None = None, precision: Precision = "float32"
) -> MicroBatches:
    """Choose the number of slots from memory; it is tried by `MicroBatches.settle`.

    Args:
        engine: One that passed the preflight.
        tunable: What it was made for.
        blank: See `MicroBatches`.
        limit: Most slots; None leaves it to memory.
        precision: bfloat16 on the CPU only where a person asked for it.
    """
    most = SLOTS.get(tunable.device.type, SLOTS["cpu"])
    budget = MEMORY_FRACTION * available_bytes(tunable.device)
    fitting = most if engine.name == "loop" else int(budget / bytes_per_example(engine.name, tunable, blank))
    size = max(1, min(most, fitting if limit is None else min(fitting, limit)))
    return MicroBatches(engine, tunable, blank, size, precision)


def autocasting(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """What a module computes in."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)  # a cast kept from no_grad has no gradient


def _some(weights: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if weights is None else weights[part]


# --- memory --------------------------------------------------------------------------------------------------------------


def bytes_per_example(engine_name: str, tunable: Tunable, blank: Batch) -> int:
    """What one more example takes: activations, their gradients, and rows where the engine holds rows."""
    one, two = (_saved_bytes(tunable, filled(blank, blank, n)) for n in (1, 2))
    activations = max(two - one, 1)
    rows = 4 * tunable.size
    return {
        "book-keeping": 3 * activations,  # inputs, output gradients, Gram matrices or unfolded images
        "hooks": 3 * activations + 2 * rows,  # the rows, and those of the layer that is being added
        "vmap": 4 * activations + 2 * rows,
    }.get(engine_name, 4 * activations + 2 * rows)


def _saved_bytes(tunable: Tunable, batch: Batch) -> int:
    """Memory that a forward pass keeps for its backward pass, each storage once."""
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # no address is used again while this holds

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tunable.loss(tunable.module, batch)
    return sum(seen.values())


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that is free now, on the device or, on the CPU, in this process's group and machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [*_meminfo(root / "proc/meminfo"), *_groups(root)]
    return max(0, min(found)) if found else 2 << 30  # what every machine that can load torch has


def _meminfo(path: Path) -> Iterator[int]:
    with _missing_is_fine():
        for line in path.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What the control groups, version 2 and 1, leave; a group without a limit says so with a word or a huge number."""
    group = ""
    with _missing_is_fine():
        lines = (root / "proc/self/cgroup").read_text("ascii").splitlines()
        group = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), "").strip("/")
    folders = [root / "sys/fs/cgroup" / group, root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"]
    for folder in folders:
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with _missing_is_fine():
                yield int((folder / limit).read_text("ascii")) - int((folder / used).read_text("ascii"))


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):  # not there, or the word "max"
        return
