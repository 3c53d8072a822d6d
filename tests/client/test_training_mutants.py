"""The known wrong ways of DP-SGD, one by one, and the test that kills each; what no other file does is done here.

    wrong way                                      killed by
    (of a model)                                   of tests/models: test_engine_mutants, test_cancellation
    shuffled batches taken for Poisson samples     here: "batch size", "overlap"
    sampling rate of the private n                 here: "rate"
    mean by the realised batch                     here: "scale"; test_training, test_release_total
    mean loss, averaged again                      here: "scale"
    noise scaled without the clip                  here: "noise"; test_training, test_release
    noise for every micro-batch                    here: "noise"
    accumulation adds noise twice, or not          here: "noise"
    clip after the sum                             here: "scale"; test_training, test_release_total
    clip by layer, accounted as flat               test_engine_mutants: "sensitivity"
    a parameter escapes the clip (0-d)             test_engine_mutants: "sensitivity"
    a parameter escapes the noise, or the vector   test_engine_mutants: "another gradient"
    frozen weights taken for trained               test_engine_mutants: "another gradient"
    tied weights counted once, or apart            test_engine_mutants: "another gradient", "sensitivity"
    buffers that records change                    test_engine_mutants: "buffers"
    average of weights before the noise            here: of local steps
    the same sample in every round                 here: "overlap"
    the same noise in every round or start         here: "repeated"; test_training
    a fork shares its generator                    here: "fork"; test_mechanisms
    manual_seed fixes the noise                    here: "seed"; test_mechanisms, test_architecture (no such generator is near)
    NaN switches the clip off, or fails            here: "not finite"; test_mechanisms
    a zero gradient divides by zero                here: "zero"
    parts of a gradient that cancel                test_cancellation
    epsilon of one round told as the total         test_budget (every local step of every round), test_accounting (mutants)
    delta above 1 / n                              test_plan (two tests)
    too few orders of Renyi DP                     test_accounting: privacy loss distributions, bracketed by the exact ones
    floating-point attack on the noise             test_release, test_fixed_point: data and noise are integers before they meet

Statistical tests here fail by chance about once in a million runs; nothing of the product's is seeded.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import nn

from tests.client.clinic import NUM_CLASSES, a_plan
from urna.client.training import ModelSet, TuningSet, local_steps, shared_step
from urna.models.engines import choose
from urna.models.loading import Backbone
from urna.models.parts import MicroBatches
from urna.models.prepared import Prepared
from urna.models.tunable import Batch, Tunable
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, clip_rows, poisson_sample
from urna.privacy.release import noise_share, noisy_sum

FALSE_ALARM = 1e-6
ALMOST_NONE = 1e-4  # a noise multiplier that hides nothing, so that sums can be looked at
GRID = Grid(step_exp=-20, num_summands=1)
DIM = 60
Features = npt.NDArray[np.float32]
Step = Callable[[Features, float, float, float], Floats]  # features (n, 60), sample rate, clip, noise multiplier -> (60,)


def plan_of(sample_rate: float, clip: float, **final: object) -> dict[str, object]:
    return {"sample_rate": sample_rate, "max_grad_norm": clip} | final


def head_step(features: Features, sample_rate: float, clip: float, multiplier: float) -> Floats:
    """`shared_step` of a zero head, of it the weights of class 0: two thirds of the features, before the clip."""
    data = TuningSet(features, np.zeros(len(features), np.int64), np.arange(len(features)))
    vector = np.zeros((DIM + 1) * NUM_CLASSES, np.float32)
    total = shared_step(data, vector, a_plan(final=plan_of(sample_rate, clip)), multiplier, GRID, 1) * GRID.step
    return np.asarray(total[:DIM])


def score_of(module: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of a model with one weight a feature: an example's gradient is its features."""
    scores: torch.Tensor = module(batch["features"])
    return scores[:, 0]


@functools.cache
def prepared() -> Prepared:
    """With the engine that the product chooses, seven records at a time."""
    linear = Tunable(nn.Linear(DIM, 1, bias=False), loss=score_of)
    chosen = choose(linear, {"features": torch.arange(5.0 * DIM).view(5, DIM) / DIM}, "full")
    no_backbone = cast(Backbone, None)  # the batches are made here
    parts = MicroBatches(chosen.engine, linear, {"features": torch.zeros(1, DIM)}, 7)
    return Prepared(no_backbone, linear, chosen.engine, chosen.report, chosen.fallbacks, parts, 1)


def model_step(features: Features, sample_rate: float, clip: float, multiplier: float) -> Floats:
    """`shared_step` of a model's own weights, through the engine that the product chooses."""
    places = np.arange(len(features))
    data = ModelSet(prepared(), lambda at, _: {"features": torch.from_numpy(features[at])}, places, 0 * places)
    plan = a_plan(final=plan_of(sample_rate, clip))
    return np.asarray(shared_step(data, np.zeros(DIM, np.float32), plan, multiplier, GRID, 1) * GRID.step)


# --- what a step must be ---------------------------------------------------------------------------------------------------


def alike(num_records: int, length: float = 100.0) -> Features:
    """Records of one direction."""
    return np.full((num_records, DIM), length / math.sqrt(DIM), np.float32)


def sizes(step: Step, num_records: int, sample_rate: float, times: int) -> Floats:
    """How many records took part, each time: of long records in one direction, the sum is so many clips long."""
    full = float(np.linalg.norm(step(alike(num_records), 1.0, 1.0, ALMOST_NONE))) / num_records  # of one record
    sums = [float(np.linalg.norm(step(alike(num_records), sample_rate, 1.0, ALMOST_NONE))) for _ in range(times)]
    return np.rint(np.array(sums) / full)


def wrong_batch_size(step: Step) -> bool:
    drawn = sizes(step, 400, 0.5, 60)
    squares = float(((drawn - 200) ** 2).sum()) / 100  # variance n q (1 - q)
    return not stats.chi2.ppf(FALSE_ALARM / 2, 60) < squares < stats.chi2.isf(FALSE_ALARM / 2, 60)


def wrong_rate(step: Step) -> bool:
    taken = [(num_records, int(sizes(step, num_records, 0.2, 20).sum())) for num_records in (100, 1000)]
    return any(stats.binomtest(some, 20 * num_records, 0.2).pvalue < FALSE_ALARM / 2 for num_records, some in taken)


def wrong_overlap(step: Step) -> bool:
    """Whether records of one step are seen again in the next other than by chance: 20 pairs of steps, 60 records."""
    each = 100 * np.eye(DIM, dtype=np.float32)
    pairs = [[np.abs(step(each, 0.5, 1.0, ALMOST_NONE)) > 0.3 for _ in range(2)] for _ in range(20)]
    common = sum(int((one & other).sum()) for one, other in pairs)
    return bool(stats.binomtest(common, 20 * DIM, 0.25).pvalue < FALSE_ALARM)


def wrong_noise(step: Step) -> bool:
    """Around the known sum of 20 records that all take part."""
    clip, multiplier = 0.5, 3.0
    expected = step(alike(20), 1.0, clip, ALMOST_NONE)
    noise = np.concatenate([step(alike(20), 1.0, clip, multiplier) - expected for _ in range(60)])
    squares = float((noise**2).sum()) / (multiplier * clip) ** 2
    return not stats.chi2.ppf(FALSE_ALARM / 2, len(noise)) < squares < stats.chi2.isf(FALSE_ALARM / 2, len(noise))


def wrong_scale(step: Step) -> bool:
    """Whether n records are not n times one, short or long."""
    for length in (0.1, 100.0):
        one, many = (float(np.linalg.norm(step(alike(count, length), 1.0, 0.5, ALMOST_NONE))) for count in (1, 30))
        if not math.isclose(many, 30 * one, rel_tol=0.03):
            return True
    return False


def changes_short_ones(step: Step) -> bool:
    """Whether a gradient within the clip does not come out as it is, but for a part that depends on nothing of it."""
    shorter, longer = (float(np.linalg.norm(step(alike(30, length), 1.0, 1.0, ALMOST_NONE))) for length in (0.1, 0.2))
    return not math.isclose(longer, 2 * shorter, rel_tol=0.03)


def wrong_sensitivity(step: Step) -> bool:
    """Whether one record more moves the sum further than the clip (and the noise, 0.0008 clips)."""
    generator = np.random.default_rng(0)  # the data; not the noise
    records = generator.normal(size=(11, DIM)).astype(np.float32)
    for length in (0.01, 1.0, 1000.0):
        moved = step(records * np.float32(length), 1.0, 1.0, ALMOST_NONE) - step(
            records[:10] * np.float32(length), 1.0, 1.0, ALMOST_NONE
        )
        if float(np.linalg.norm(moved)) > 1.01:
            return True
    return False


def repeats(step: Step) -> bool:
    return np.array_equal(step(alike(3), 1.0, 1.0, 2.0), step(alike(3), 1.0, 1.0, 2.0))


def obeys_a_seed(step: Step) -> bool:
    drawn = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        drawn.append(step(alike(3), 1.0, 1.0, 2.0))
    return np.array_equal(drawn[0], drawn[1])


def shares_a_fork(step: Step) -> bool:
    """Two children that were forked at one moment must not draw alike."""
    step(alike(3), 1.0, 1.0, 2.0)
    drawn = []
    for _ in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the threads of the parent are not here
            os.write(writing, step(np.zeros((0, DIM), np.float32), 1.0, 1.0, 2.0).tobytes())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            drawn.append(pipe.read())
        os.waitpid(child, 0)
    assert len(drawn[0]) == 8 * DIM
    return drawn[0] == drawn[1]


def minds_what_is_not_finite(step: Step) -> bool:
    """Whether a record of NaN or infinity fails, or does anything but add nothing."""
    for bad in (np.nan, np.inf, 3e38):
        records = alike(5, 0.1)
        records[2, 3] = bad
        try:
            total = step(records, 1.0, 1.0, ALMOST_NONE)
        except Exception:
            return True
        rest = step(np.delete(records, 2, axis=0), 1.0, 1.0, ALMOST_NONE)
        if not float(np.linalg.norm(total - rest)) < (1.01 if bad == 3e38 else 0.01):  # false for NaN, too
            return True
    return False


def minds_zeros(step: Step) -> bool:
    try:
        total = step(alike(4, 0.0), 1.0, 1.0, ALMOST_NONE)
    except ZeroDivisionError:
        return True
    return not float(np.linalg.norm(total)) < 0.01


CHECKS: dict[str, Callable[[Step], bool]] = {
    "batch size": wrong_batch_size,
    "rate": wrong_rate,
    "overlap": wrong_overlap,
    "noise": wrong_noise,
    "scale": wrong_scale,
    "short": changes_short_ones,
    "sensitivity": wrong_sensitivity,
    "repeated": repeats,
    "seed": obeys_a_seed,
    "fork": shares_a_fork,
    "not finite": minds_what_is_not_finite,
    "zero": minds_zeros,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("step", [head_step, model_step], ids=["head", "model"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_step_of_the_product_has_none_of_these_faults(check: str, step: Step) -> None:
    assert not CHECKS[check](step)


# --- steps with one fault each ---------------------------------------------------------------------------------------------


@dataclass
class Faulty:
    """DP-SGD by rows of which any part can be replaced by a wrong one."""

    sample: Callable[[int, float], npt.NDArray[np.bool_]] = poisson_sample
    rows: Callable[[Floats], Floats] = lambda rows: rows
    total: Callable[[Floats, float], Integers] = lambda rows, clip: GRID.quantise_rows(rows, clip).sum(axis=0, dtype=np.int64)
    noise: Callable[[Floats, float, float], Integers] = lambda _, clip, multiplier: noise_share(
        DIM, clip, multiplier, GRID, 1, 1
    )

    def __call__(self, features: Features, sample_rate: float, clip: float, multiplier: float) -> Floats:
        chosen = self.sample(len(features), sample_rate)
        rows = features[chosen].astype(np.float64)
        rows[~(np.abs(rows) < 1e38).all(axis=1)] = 0.0
        rows = self.rows(rows)
        return np.asarray((self.total(rows, clip) + self.noise(rows, clip, multiplier)) * GRID.step)


def fixed_batch(size: int, sample_rate: float) -> npt.NDArray[np.bool_]:
    return np.random.default_rng().permutation(size) < round(size * sample_rate)


class Epochs:
    """Batches of one shuffled order, one after the other."""

    def __init__(self) -> None:
        self.order, self.at = np.zeros(0, np.int64), 0

    def __call__(self, size: int, sample_rate: float) -> npt.NDArray[np.bool_]:
        length = round(size * sample_rate)
        if len(self.order) != size or self.at + length > size:
            self.order, self.at = np.random.default_rng().permutation(size), 0
        self.at += length
        return np.isin(np.arange(size), self.order[self.at - length : self.at])


class Once:
    """The first sample, for ever."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, float], npt.NDArray[np.bool_]] = {}

    def __call__(self, size: int, sample_rate: float) -> npt.NDArray[np.bool_]:
        return self.kept.setdefault((size, sample_rate), poisson_sample(size, sample_rate))


def rate_of_private_n(size: int, sample_rate: float) -> npt.NDArray[np.bool_]:
    return poisson_sample(size, min(1.0, sample_rate * 300 / max(1, size)))  # a batch of 60, however many records there are


def quantised(total: Floats) -> Integers:
    return GRID.quantise(np.nan_to_num(total))


def gaussian(generator: np.random.Generator, clip: float, multiplier: float) -> Integers:
    return np.rint(generator.normal(0, multiplier * clip / GRID.step, DIM)).astype(np.int64)


def torch_noise(_: Floats, clip: float, multiplier: float) -> Integers:
    return np.rint(torch.randn(DIM).double().numpy() * multiplier * clip / GRID.step).astype(np.int64)


def by_micro_batch(rows: Floats, clip: float, multiplier: float) -> Integers:
    return np.asarray(sum(noise_share(DIM, clip, multiplier, GRID, 1, 1) for _ in range(0, max(1, len(rows)), 8)))


def not_for_the_last(rows: Floats, clip: float, multiplier: float) -> Integers:
    return noise_share(DIM, clip, multiplier, GRID, 1, 1) if len(rows) % 8 == 0 else np.zeros(DIM, np.int64)


def skips_nan(features: Features, sample_rate: float, clip: float, multiplier: float) -> Floats:
    rows = features[poisson_sample(len(features), sample_rate)].astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray((rows * np.where(norms > clip, clip / norms, 1.0)).sum(axis=0) + multiplier)


def stops_at_nan(features: Features, sample_rate: float, clip: float, multiplier: float) -> Floats:
    rows = features[poisson_sample(len(features), sample_rate)].astype(np.float64)
    return np.asarray(noisy_sum(rows, clip, multiplier, GRID, num_noise_parties=1) * GRID.step)


def divides_by_the_norm(rows: Floats, clip: float) -> Integers:
    factors = [min(1.0, clip / float(norm)) for norm in np.linalg.norm(rows, axis=1).tolist()]
    return quantised((rows * np.array(factors)[:, None]).sum(axis=0))


def makes_all_one_clip_long(rows: Floats, clip: float) -> Integers:
    return quantised((rows * clip / np.maximum(1e-12, np.linalg.norm(rows, axis=1, keepdims=True))).sum(axis=0))


FORKED = np.random.default_rng()  # fresh in every process that imports it, and the same in all that are forked from it

MUTANTS: dict[str, tuple[Step, str]] = {
    "a batch of fixed size": (Faulty(sample=fixed_batch), "batch size"),
    "shuffled epochs: size": (Faulty(sample=Epochs()), "batch size"),
    "shuffled epochs: order": (Faulty(sample=Epochs()), "overlap"),
    "the same sample in every round": (Faulty(sample=Once()), "overlap"),
    "rate of the private n": (Faulty(sample=rate_of_private_n), "rate"),
    "rate a fifth too high": (Faulty(sample=lambda n, rate: poisson_sample(n, min(1.0, 1.2 * rate))), "rate"),
    "mean by the realised batch": (
        Faulty(total=lambda rows, clip: quantised(clip_rows(rows, clip).sum(axis=0) / max(1, len(rows)))),
        "scale",
    ),
    "mean loss": (Faulty(rows=lambda rows: rows / max(1, len(rows))), "scale"),
    "clip after the sum": (Faulty(total=lambda rows, clip: quantised(clip_rows(rows.sum(axis=0)[None], clip)[0])), "scale"),
    "no clip": (Faulty(total=lambda rows, _: quantised(rows.sum(axis=0))), "sensitivity"),
    "clip by halves": (
        Faulty(
            total=lambda rows, clip: quantised(
                np.concatenate([clip_rows(part, clip).sum(axis=0) for part in np.split(rows, 2, axis=1)])
            )
        ),
        "sensitivity",
    ),
    "noise without the clip": (Faulty(noise=lambda _, __, nm: noise_share(DIM, 1.0, nm, GRID, 1, 1)), "noise"),
    "noise for every micro-batch": (Faulty(noise=by_micro_batch), "noise"),
    "noise of full micro-batches only": (Faulty(noise=not_for_the_last), "noise"),
    "noise twice": (Faulty(noise=lambda _, c, nm: noise_share(DIM, math.sqrt(2) * c, nm, GRID, 1, 1)), "noise"),
    "no noise": (Faulty(noise=lambda *_: np.zeros(DIM, np.int64)), "noise"),
    "the same noise in every round": (Faulty(noise=lambda _, c, nm: gaussian(np.random.default_rng(0), c, nm)), "repeated"),
    "torch's generator": (Faulty(noise=torch_noise), "seed"),
    "a generator of the module": (Faulty(noise=lambda _, c, nm: gaussian(FORKED, c, nm)), "fork"),
    "NaN switches the clip off": (skips_nan, "not finite"),
    "NaN stops the step": (stops_at_nan, "not finite"),
    "a zero gradient is divided by": (Faulty(total=divides_by_the_norm), "zero"),
    "all gradients are made one clip long": (Faulty(total=makes_all_one_clip_long), "short"),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*fork.*:DeprecationWarning")
def test_a_planted_fault_of_a_step_is_found(name: str) -> None:
    mutant, symptom = MUTANTS[name]
    assert CHECKS[symptom](mutant)


def test_the_step_into_which_faults_are_planted_has_none() -> None:
    assert {name for name, check in CHECKS.items() if check(Faulty())} == set()


# --- local steps -----------------------------------------------------------------------------------------------------------


def wrong_local_noise(work: Callable[[int, float], Floats]) -> bool:
    """Steps and multiplier -> change; of nobody's records the change is the noise of all steps."""
    changes = np.concatenate([work(5, 3.0) for _ in range(40)])
    squares = float((changes**2).sum()) / (5 * (0.8 / 25 * 3.0 * 0.7) ** 2)
    return not stats.chi2.ppf(FALSE_ALARM / 2, changes.size) < squares < stats.chi2.isf(FALSE_ALARM / 2, changes.size)


def real_local(steps: int, multiplier: float) -> Floats:
    final = plan_of(0.5, 0.7, local_steps=steps, local_learning_rate=0.8)
    plan = a_plan(privacy={"noise": "local"}, final=final)
    nobody = TuningSet(np.zeros((0, DIM), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return local_steps(nobody, np.zeros((DIM + 1) * NUM_CLASSES, np.float32), plan, multiplier, 25.0)


def average_before_the_noise(steps: int, multiplier: float) -> Floats:
    """An exponential mean of weights, each taken before its step's noise: the last step's noise never gets out."""
    mean = weights = np.zeros(200)
    for _ in range(steps):
        mean = 0.5 * mean + 0.5 * weights
        weights = weights + 0.8 / 25 * noise_share(200, 0.7, multiplier, GRID, 1, 1) * GRID.step
    return mean


LOCAL_MUTANTS: dict[str, Callable[[int, float], Floats]] = {
    "average of weights before the noise": average_before_the_noise,
    "noise of the last step only": lambda _, multiplier: real_local(1, multiplier),
    "noise of one step for all": lambda steps, multiplier: steps * real_local(1, multiplier),
}


def test_local_steps_add_their_noise() -> None:
    assert not wrong_local_noise(real_local)


@pytest.mark.parametrize("name", LOCAL_MUTANTS)
def test_a_planted_fault_of_local_steps_is_found(name: str) -> None:
    assert wrong_local_noise(LOCAL_MUTANTS[name])
