"""How fast the noise is beside generators that a seed fixes: numbers per second of one process.

urna_normal     `mechanisms.standard_normal`, float64, AES-256-CTR keyed by the operating system
urna_integers   `mechanisms.integer_noise`, int64 on the grid: what a release adds
numpy           Generator.standard_normal (PCG64), float64
torch32, torch64   torch.randn, one thread

ratio_numpy, ratio_torch32, ratio_torch64   urna_normal's numbers per second over theirs
full_model_seconds, full_model_peak_bytes   `integer_noise` of 22 million numbers, and the most memory during it

Ten million numbers at a time, the kinds in turns, the best of seven.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from urna.privacy.mechanisms import integer_noise, standard_normal

SIZE, FULL_MODEL = 10_000_000, 22_000_000
NUM_TURNS = 7
SCALE = 1e5  # grid units


def best_seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The kinds in turns, so that the machine is the same for all."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(NUM_TURNS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def peak_bytes(work: Callable[[], object]) -> int:
    """Of what Python and numpy ask for."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes them
    """All of it; see the module's docstring."""
    import torch

    torch.set_num_threads(1)
    generator = np.random.default_rng()
    seconds = best_seconds(
        {
            "urna_normal": lambda: standard_normal(SIZE),
            "urna_integers": lambda: integer_noise(SIZE, SCALE),
            "numpy": lambda: generator.standard_normal(SIZE),
            "torch32": lambda: torch.randn(SIZE),
            "torch64": lambda: torch.randn(SIZE, dtype=torch.float64),
        }
    )
    others = ("numpy", "torch32", "torch64")
    full = best_seconds({"full": lambda: integer_noise(FULL_MODEL, SCALE)})["full"]
    return {
        "numbers": SIZE,
        "per_second": {name: round(SIZE / one) for name, one in seconds.items()},
        **{f"ratio_{name}": round(seconds[name] / seconds["urna_normal"], 2) for name in others},
        "full_model_seconds": round(full, 3),
        "full_model_peak_bytes": peak_bytes(lambda: integer_noise(FULL_MODEL, SCALE)),
        "full_model_result_bytes": 8 * FULL_MODEL,
    }
