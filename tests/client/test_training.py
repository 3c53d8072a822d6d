"""What makes a training round private, measured on the integers that leave, and the known wrong ways caught by it."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from tests.client.clinic import NUM_CLASSES, a_plan
from tests.client.kinds import (
    HEAD,
    Kind,
    Set,
    head_records,
    kinds,
    model_records,
    model_set,
    raw_total,
    softmax_gradients,
    some,
    tiny,
)
from urna.client.training import (
    ModelSet,
    Tuned,
    TuningSet,
    Vector,
    local_grid,
    local_steps,
    sample_gradients,
    shared_step,
    unit_means,
    unit_weights,
)
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers, clip_rows
from urna.privacy.release import noise_share
from urna.protocol.errors import ModelError
from urna.protocol.plan import Plan

Step = Callable[[Tuned, Vector, Plan, float, Grid, int], Integers]
SIZE = HEAD.size
GRID = Grid(step_exp=-26, num_summands=3)
ALMOST_NONE = 1e-5  # a noise multiplier that hides nothing, so that sums can be looked at
NOT_CLIPPED = 1e6  # a clip that clips nothing
FALSE_ALARM = 1e-6


def kinds_by_name(name: str) -> Kind:
    return next(one for one in kinds() if one.name == name)


KINDS = pytest.mark.parametrize("kind", kinds(), ids=lambda one: one.name)


def a_plan_of(sample_rate: float = 1.0, clip: float = 1.0, **final: object) -> Plan:
    return a_plan(final={"sample_rate": sample_rate, "max_grad_norm": clip} | final)


def a_set(features: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> TuningSet:
    """Every record a unit of its own."""
    return TuningSet(features, labels, np.arange(len(labels)))


def some_records(num_records: int, seed: int = 0, scale: float = 1.0) -> TuningSet:
    return head_records(num_records, seed, scale)


def a_vector(seed: int = 1) -> Vector:
    return HEAD.vector(seed)


def clipped(rows: Floats, clip: float) -> Floats:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * np.minimum(1, clip / norms))


def norm(integers: Integers) -> float:
    return float(np.linalg.norm(integers.astype(np.float64)) * GRID.step)


def wrong_variance(draws: list[Integers], expected: float) -> bool:
    """Whether a chi-square test at a false alarm of 1e-6 says that the noise is not of this variance (real units)."""
    values = np.concatenate(draws).astype(np.float64) * GRID.step
    tail = stats.chi2.cdf(float((values**2).sum()) / expected, len(values))
    return not FALSE_ALARM / 2 < tail < 1 - FALSE_ALARM / 2


def complaints(step: Step, kind: Kind = HEAD) -> set[str]:
    """All that is wrong with a training step; intact steps fail a chi-square test once in 300,000 runs."""
    found = set()
    nobody, vector = kind.records(0, 0, 1.0), kind.vector()
    for clip, parties, multiplier in ((1.0, 1, 2.0), (0.25, 1, 2.0), (1.0, 4, 3.0)):
        draws = [step(nobody, vector, a_plan_of(clip=clip), multiplier, GRID, parties) for _ in range(60)]
        if wrong_variance(draws, (multiplier * clip) ** 2 / parties):
            found.add("noise")
    if np.array_equal(draws[0], draws[1]):
        found.add("repeated noise")
    many, plan, bound = kind.records(20, 0, 1.0), a_plan_of(clip=0.5), kind.clip(0.5, GRID)
    first, everyone = np.zeros(20, np.int64), np.arange(20)
    alike, huge = some(many, first), some(kind.records(20, 0, 1000.0), first)
    if not math.isclose(norm(step(alike, vector, plan, ALMOST_NONE, GRID, 1)), 20 * bound, rel_tol=1e-3):
        found.add("not a sum of clipped records")
    if norm(step(huge, vector, plan, ALMOST_NONE, GRID, 1)) > 20 * 0.5 + 1e-3:
        found.add("sensitivity")
    for count in (19, 1):
        fewer, more = some(many, everyone[:count]), some(many, everyone[: count + 1])
        results = [step(one, vector, plan, ALMOST_NONE, GRID, 1) for one in (fewer, more)]
        if norm(results[1] - results[0]) > 0.5 + 1e-3:
            found.add("sensitivity")
    person = some(many, first[:6], np.zeros(6, np.int64))  # six records of one person
    if norm(step(person, vector, plan, ALMOST_NONE, GRID, 1)) > 0.5 + 1e-3:
        found.add("a person counts as many")
    expected = clipped(kind.gradients(many, vector), bound).sum(axis=0)
    total = step(many, vector, plan, ALMOST_NONE, GRID, 1) * GRID.step
    if not np.allclose(total, expected, atol=2e-4):
        found.add("not the sum of gradients")
    return found


@KINDS
def test_a_training_step_is_the_described_release(kind: Kind) -> None:
    assert complaints(shared_step, kind) == set()


def as_set(data: Tuned) -> Set:
    assert isinstance(data, TuningSet | ModelSet)
    return data


def mean_by_realised_batch(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    total = raw_total(as_set(data), vector, plan, plan.final.max_grad_norm) / max(1, len(as_set(data).groups))
    return grid.quantise(total) + noise_share(total.size, plan.final.max_grad_norm, nm, grid, parties, 1)


def noise_without_clip(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    total = raw_total(as_set(data), vector, plan, plan.final.max_grad_norm)
    return grid.quantise(total) + noise_share(total.size, 1.0, nm, grid, parties, 1)


def clip_after_sum(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    total = raw_total(as_set(data), vector, plan, NOT_CLIPPED)
    total = clip_rows(total[None], plan.final.max_grad_norm)[0]
    return grid.quantise(total) + noise_share(total.size, plan.final.max_grad_norm, nm, grid, parties, 1)


def no_clip(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    total = raw_total(as_set(data), vector, plan, NOT_CLIPPED)
    return grid.quantise(total) + noise_share(total.size, plan.final.max_grad_norm, nm, grid, parties, 1)


def no_noise_on_empty_batch(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    if not len(as_set(data).groups):
        return np.zeros(vector.size, np.int64)
    return shared_step(data, vector, plan, nm, grid, parties)


def one_noise_for_ever(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    scale = nm * plan.final.max_grad_norm / math.sqrt(parties) / grid.step
    noise = np.rint(np.random.default_rng(0).normal(0, scale, vector.size)).astype(np.int64)
    return np.asarray(grid.quantise(raw_total(as_set(data), vector, plan, plan.final.max_grad_norm)) + noise)


def more_parties_than_there_are(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    return shared_step(data, vector, plan, nm, grid, parties * parties + 1)


def a_little_too_little(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    return shared_step(data, vector, plan, nm * 0.85, grid, parties)


def every_record_its_own_person(data: Tuned, vector: Vector, plan: Plan, nm: float, grid: Grid, parties: int) -> Integers:
    mine = as_set(data)
    return shared_step(some(mine, np.arange(len(mine.groups))), vector, plan, nm, grid, parties)


MUTANTS: dict[Step, str] = {
    every_record_its_own_person: "a person counts as many",
    mean_by_realised_batch: "not a sum of clipped records",
    noise_without_clip: "noise",
    clip_after_sum: "not a sum of clipped records",
    no_clip: "sensitivity",
    no_noise_on_empty_batch: "noise",
    one_noise_for_ever: "repeated noise",
    more_parties_than_there_are: "noise",
    a_little_too_little: "noise",
}


@KINDS
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.__name__)
def test_a_planted_mutant_is_killed(mutant: Step, kind: Kind) -> None:
    assert MUTANTS[mutant] in complaints(mutant, kind)


@KINDS
def test_every_uploaded_tensor_noised(kind: Kind) -> None:
    """Weights without dimensions included: of 1,000 draws each number has the plan's variance; all fail once in a million."""
    draws = [kind.records(0, 0, 1.0).noisy_step(kind.vector(), a_plan_of(clip=0.5), 2.0, GRID, 1) for _ in range(1000)]
    squares = ((np.stack(draws) * GRID.step) ** 2).sum(axis=0)  # (p,)
    tails = stats.chi2.cdf(squares / (2.0 * 0.5) ** 2, 1000)
    alarm = FALSE_ALARM / kind.size
    assert (alarm / 2 < tails).all()
    assert (tails < 1 - alarm / 2).all()


def test_a_weight_without_dimensions_is_among_them() -> None:
    parameters = tiny("full").tunable.parameters
    assert min(one.ndim for one in parameters) == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_buffers_unchanged(tuning: Literal["lora", "full"]) -> None:
    """Bit-identical before and after steps with records, and so is every weight that is not trained."""
    data = model_records(tuning, 12)
    module = data.prepared.tunable.module
    trained = set(data.prepared.tunable.names)
    before = {name: one.clone() for name, one in module.state_dict().items() if name not in trained}
    assert any("running_mean" in name or name == "feature_mean" for name in before)
    shared_step(data, kinds_by_name(tuning).vector(), a_plan_of(), 2.0, GRID, 1)
    local_steps(data, kinds_by_name(tuning).vector(), a_plan_of(), 2.0, 5.0)
    after = module.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
    assert not module.training


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_an_empty_sample_of_a_model_is_noise_without_a_forward_pass(
    tuning: Literal["lora", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kind = model_records(tuning, 5), kinds_by_name(tuning)

    def never(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(data.prepared.tunable.module, "forward", never)
    step = shared_step(data, kind.vector(), a_plan_of(sample_rate=1e-12), 2.0, GRID, 1)
    assert step.any()


def test_weights_of_a_persons_records_add_up_to_one_at_most() -> None:
    for count in range(1, 400):
        weights = unit_weights(np.zeros(count, np.int64)).double()
        assert 1 - 1e-5 < float(weights.sum()) <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_record_of_a_model_whose_gradient_is_not_finite_counts_as_zero(tuning: Literal["lora", "full"], bad: float) -> None:
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.normal(size=(5, 1, 8, 8)).astype(np.float32))
    labels = generator.integers(0, NUM_CLASSES, 5)
    broken = images.clone()
    broken[2, 0, 3, 3] = bad
    vector = kinds_by_name(tuning).vector()
    with_it = model_set(tiny(tuning), broken, labels, np.arange(5))
    without = some(model_set(tiny(tuning), images, labels, np.arange(5)), np.array([0, 1, 3, 4]))
    sums = [raw_total(one, vector, a_plan_of(), 0.5) for one in (with_it, without)]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5)


def test_gradients_are_those_of_the_softmax_in_closed_form() -> None:
    data, vector = some_records(30), a_vector()
    np.testing.assert_allclose(
        sample_gradients(data, vector, a_plan_of()), softmax_gradients(data, vector.astype(np.float64)), atol=1e-5
    )


def test_an_empty_sample_is_no_error_and_has_no_rows() -> None:
    assert sample_gradients(some_records(0), a_vector(), a_plan_of()).shape == (0, SIZE)
    assert sample_gradients(some_records(5), a_vector(), a_plan_of(sample_rate=1e-12)).shape == (0, SIZE)


def test_the_sample_has_the_plans_rate_whatever_the_data() -> None:
    """A fair sample fails once in a million runs."""
    data, plan = some_records(20_000), a_plan_of(sample_rate=0.05)
    size = len(sample_gradients(data, a_vector(), plan))
    assert stats.binomtest(size, 20_000, 0.05).pvalue > FALSE_ALARM


def test_samples_are_drawn_afresh() -> None:
    """Two samples of 2000 of the same size and sum are no accident."""
    data, plan = some_records(2000), a_plan_of(sample_rate=0.5)
    first, second = (sample_gradients(data, a_vector(), plan).sum() for _ in range(2))
    assert first != second


@KINDS
def test_output_scale_independent_of_n(kind: Kind) -> None:
    """The step of n records plus one is the step of n plus one clipped gradient; nothing is divided by n."""
    plan, vector = a_plan_of(clip=0.5), kind.vector()
    for num_records in (0, 1, 10, 50):
        data = kind.records(num_records, 0, 1.0)
        expected = clipped(kind.gradients(data, vector), kind.clip(0.5, GRID)).sum(axis=0)
        total = shared_step(data, vector, plan, ALMOST_NONE, GRID, 1) * GRID.step
        np.testing.assert_allclose(total, expected, atol=2e-4 * max(1, num_records / 20))


@KINDS
def test_local_output_scale_independent_of_n(kind: Kind) -> None:
    plan = a_plan(privacy={"noise": "local"}, final={"sample_rate": 1.0, "max_grad_norm": 0.5, "local_steps": 1})
    vector, batch = kind.vector(), 13.0
    for num_records in (0, 1, 10, 50):
        data = kind.records(num_records, 0, 1.0)
        expected = -clipped(kind.gradients(data, vector), kind.clip(0.5, local_grid(0.5))).sum(axis=0) / batch
        np.testing.assert_allclose(local_steps(data, vector, plan, ALMOST_NONE, batch), expected, atol=1e-4)


def test_local_steps_are_dp_sgd_in_closed_form() -> None:
    final = {"sample_rate": 1.0, "max_grad_norm": 0.7, "local_steps": 6, "local_learning_rate": 0.8}
    plan = a_plan(privacy={"noise": "local"}, final=final)
    data, vector = some_records(25), a_vector()
    current = vector.astype(np.float64)
    for _ in range(6):
        current = current - 0.8 / 25 * clipped(softmax_gradients(data, current), 0.7).sum(axis=0)
    np.testing.assert_allclose(local_steps(data, vector, plan, ALMOST_NONE, 25.0), current - vector, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 9])
def test_every_local_step_adds_its_own_noise(steps: int) -> None:
    """The right noise fails a chi-square test once in a million runs."""
    final = {"sample_rate": 0.5, "max_grad_norm": 0.7, "local_steps": steps, "local_learning_rate": 0.8}
    plan = a_plan(privacy={"noise": "local"}, final=final)
    nobody = some_records(0)
    changes = np.concatenate([local_steps(nobody, a_vector(), plan, 3.0, 25.0) for _ in range(40)])
    expected = steps * (0.8 / 25 * 3.0 * 0.7) ** 2
    tail = stats.chi2.cdf(float((changes**2).sum()) / expected, len(changes))
    assert FALSE_ALARM / 2 < tail < 1 - FALSE_ALARM / 2


def test_noise_is_fresh_after_every_seed() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        results.append(shared_step(some_records(0), a_vector(), a_plan_of(), 2.0, GRID, 1))
    assert not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_head_that_is_not_finite_releases_nothing(bad: float) -> None:
    vector = a_vector()
    vector[3] = bad
    with pytest.raises(ModelError, match="must be finite"):
        shared_step(some_records(5), vector, a_plan_of(), 2.0, GRID, 1)


def test_a_record_whose_gradient_is_not_finite_counts_as_zero_and_causes_no_failure() -> None:
    """An error would tell, without noise, that such a record was sampled; the others' gradients are as without it."""
    plan = a_plan(final={"sample_rate": 1.0})
    data = some_records(5)
    data.features[2, 2] = np.nan
    rows = sample_gradients(data, a_vector(), plan)
    assert not rows[2].any()
    others = np.arange(5) != 2
    without = sample_gradients(a_set(data.features[others], data.labels[others]), a_vector(), plan)
    np.testing.assert_allclose(rows[others], without, atol=1e-6)
    shared_step(data, a_vector(), plan, 2.0, GRID, 1)
    local_steps(data, a_vector(), a_plan_of(), 2.0, 5.0)


def test_records_and_head_are_left_as_they_were() -> None:
    data, vector = some_records(10), a_vector()
    features, labels, head = data.features.copy(), data.labels.copy(), vector.copy()
    shared_step(data, vector, a_plan_of(), 2.0, GRID, 1)
    local_steps(data, vector, a_plan_of(), 2.0, 5.0)
    np.testing.assert_array_equal(data.features, features)
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_array_equal(vector, head)


def test_a_person_is_sampled_with_all_of_their_records_or_not_at_all() -> None:
    """A mean of some of them would be another number; 40 persons of 5 equal records give rows that are those of one each."""
    one_each = some_records(40)
    five_each = TuningSet(np.repeat(one_each.features, 5, axis=0), np.repeat(one_each.labels, 5), np.repeat(np.arange(40), 5))
    rows = sample_gradients(five_each, a_vector(), a_plan_of(sample_rate=0.5))
    every = sample_gradients(one_each, a_vector(), a_plan_of())
    assert 0 < len(rows) < 40  # each fails once in 2**40
    assert all(np.isclose(every, row, atol=1e-6).all(axis=1).any() for row in rows)


def test_a_mean_over_a_persons_records_stays_within_the_norm_of_one() -> None:
    generator = np.random.default_rng(3)
    rows, groups = generator.normal(size=(50, 7)), generator.integers(0, 9, 50)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    means = unit_means(rows, groups)
    assert means.shape == (len(set(groups.tolist())), 7)
    assert (np.linalg.norm(means, axis=1) <= 1 + 1e-12).all()
    np.testing.assert_allclose(means[0], rows[groups == min(groups)].mean(axis=0))
