import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.models.engine_cases import (
    CANNOT,
    CASES,
    NUM_CLASSES,
    SIZE,
    CalledTwice,
    Mutant,
    SharedTable,
    make,
    rows_by_definition,
    tunable_of,
)
from urna.models.catalogue import CATALOGUE, spec
from urna.models.engine_types import Clipped
from urna.models.preflight import TOLERANCE, PerExampleFn, check, check_head, check_rows
from urna.models.repairs import repair
from urna.models.tunable import LABELS, Batch, Tunable, cross_entropy
from urna.models.tuning import per_example_gradients, trainable_size
from urna.models.vision import build
from urna.protocol.errors import ModelError


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


INPUTS = torch.linspace(-2.0, 2.0, 48).sin().view(8, 6)
CLASSES = torch.arange(8) % 3


def sound(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert isinstance(module, nn.Linear)
    return per_example_gradients(module, inputs, labels)


def from_one_batch(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each example's gradient out of one forward pass of the whole batch, as hooks and vmap see it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not len(inputs):
        return torch.zeros(0, sum(parameter.numel() for parameter in trained))
    losses = functional.cross_entropy(module(inputs), labels, reduction="none")
    rows = [torch.autograd.grad(loss, trained, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_head_of_every_candidate_passes(name: str) -> None:
    report = check_head(spec(name).feature_dim, num_classes=10, seed=1)
    assert report.num_parameters == trainable_size(spec(name).feature_dim, 10)
    assert max(report.worst_norm_error, report.clipped_sum_error) < TOLERANCE / 100


def by_hooks(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each example's gradient of a whole network, as Opacus computes it with hooks."""
    from opacus.grad_sample import GradSampleModule

    if not len(inputs):
        return torch.zeros(0, sum(parameter.numel() for parameter in module.parameters()))
    sampled = GradSampleModule(copy.deepcopy(module), batch_first=True, loss_reduction="sum")
    logits = sampled(inputs.detach().requires_grad_())
    torch.autograd.backward(functional.cross_entropy(logits, labels, reduction="none").sum())
    return torch.cat([parameter.grad_sample.flatten(1) for parameter in sampled.parameters()], dim=1).detach()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # positions are integers: no gradient
@pytest.mark.parametrize("name", ["rff", "autoencoder", "cnn", "vit"])  # hooks need twins of nn.GRU and nn.LSTM
def test_whole_backbones_have_sound_per_example_gradients(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(build(name), nn.Linear(spec(name).feature_dim, 10))
    images = torch.linspace(0.0, 90.0, 4 * 64).sin().abs().view(4, 1, 8, 8)
    report = check_rows(by_hooks, network, images, torch.arange(4))
    assert report.num_parameters == spec(name).num_parameters + trainable_size(spec(name).feature_dim, 10)


def test_the_check_leaves_torchs_generator_as_it_was() -> None:
    state = torch.get_rng_state()
    check_head(6, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_preflight_catches_a_batch_mean_loss(head: nn.Linear) -> None:
    def mean_loss(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) / max(len(inputs), 1)

    with pytest.raises(ModelError, match=r"per-example gradient norm of 'weight' must be .*a batch mean"):
        check_rows(mean_loss, head, INPUTS, CLASSES)


def test_preflight_catches_an_error_in_one_parameter_and_names_it(head: nn.Linear) -> None:
    def no_bias(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gradients = sound(module, inputs, labels)
        gradients[:, -3:] *= 1.01
        return gradients

    with pytest.raises(ModelError, match="norm of 'bias'"):
        check_rows(no_bias, head, INPUTS, CLASSES)


def test_preflight_catches_a_layer_that_mixes_examples() -> None:
    class Centring(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs - 0.5 * inputs.mean(0)

    with pytest.raises(ModelError, match=r"loss must not depend on its companions, .* a layer that mixes examples"):
        check_rows(from_one_batch, nn.Sequential(Centring(), nn.Linear(6, 3)), INPUTS, CLASSES)


def test_preflight_catches_batch_normalisation_in_training_mode() -> None:
    with pytest.raises(ModelError, match="gradients of one example at a time must be computable, found 'Expected more"):
        check_rows(from_one_batch, nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), INPUTS, CLASSES)


def test_preflight_accepts_batch_normalisation_that_is_frozen() -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    module[0].requires_grad_(False)
    assert check_rows(from_one_batch, module, INPUTS, CLASSES).num_parameters == 21


def reversed_signs(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -sound(module, inputs, labels)


def columns_first(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    gradients = sound(module, inputs, labels)
    weight = gradients[:, :18].view(-1, 3, 6).transpose(1, 2).flatten(1)
    return torch.cat([weight, gradients[:, 18:]], 1)


@pytest.mark.parametrize("mutant", [reversed_signs, columns_first])
def test_preflight_catches_right_norms_in_wrong_directions(head: nn.Linear, mutant: PerExampleFn) -> None:
    with pytest.raises(ModelError, match=r"clipped sum .* must be within 0.001 of the one-example loop"):
        check_rows(mutant, head, INPUTS, CLASSES)


def test_preflight_catches_an_empty_sample_that_crashes(head: nn.Linear) -> None:
    def crashes(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.view(len(inputs), -1)  # what most transformers do
        return sound(module, inputs, labels)

    with pytest.raises(ModelError, match="gradients of an empty batch must be computable"):
        check_rows(crashes, head, INPUTS, CLASSES)


def test_preflight_catches_an_empty_sample_that_contributes(head: nn.Linear) -> None:
    def contributes(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) if len(inputs) else torch.ones(1, 21)

    with pytest.raises(ModelError, match=r"of an empty batch must be \(0, 21\), found \(1, 21\)"):
        check_rows(contributes, head, INPUTS, CLASSES)


def test_preflight_catches_a_forgotten_parameter(head: nn.Linear) -> None:
    def weight_only(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels)[:, :18]

    with pytest.raises(ModelError, match=r"must be \(8, 21\), found \(8, 18\)"):
        check_rows(weight_only, head, INPUTS, CLASSES)


def test_preflight_catches_not_a_number(head: nn.Linear) -> None:
    def broken(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) * float("nan")

    with pytest.raises(ModelError, match="found nan"):
        check_rows(broken, head, INPUTS, CLASSES)


def test_one_example_cannot_show_mixing(head: nn.Linear) -> None:
    with pytest.raises(ValueError, match="at least 2 examples, found 1"):
        check_rows(sound, head, INPUTS[:1], CLASSES[:1])


# --- engines -------------------------------------------------------------------------------------------------------------


def repaired(case: str) -> tuple[Tunable, dict[str, torch.Tensor]]:
    module, batch = CASES[case].module(), CASES[case].batch()
    repair(module, batch, cross_entropy)
    return tunable_of(module), batch


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.parametrize("case", CASES)
def test_a_repaired_module_passes_with_every_engine_that_can_serve_it(case: str, name: str) -> None:
    tunable, batch = repaired(case)
    before = state(tunable.module)
    if case in CANNOT[name]:
        with pytest.raises(ModelError):
            check(make(name, tunable), tunable, batch)
    else:
        engine = make(name, tunable)
        report = check(engine, tunable, batch)
        engine.close()
        assert (report.engine, report.num_examples, report.num_parameters) == (name, SIZE, tunable.size)
        assert [row.name for row in report.rows] == list(tunable.names)
        assert max(report.rows, key=lambda row: row.error).name == report.worst_parameter
        assert max(report.worst_norm_error, report.clipped_sum_error) < TOLERANCE / 10
    assert same(before, state(tunable.module))


@pytest.mark.parametrize("case", ["in-place", "batch norm", "tied", "called twice", "attention", "convolutions"])
def test_the_loop_needs_no_repair_of_a_module_in_eval_mode(case: str) -> None:
    tunable = tunable_of(CASES[case].module())
    check(make("loop", tunable), tunable, CASES[case].batch())


Fault = tuple[torch.Tensor, torch.Tensor]


def plain(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = (weights * (max_grad_norm / rows.norm(dim=1)).clamp(max=1.0)) @ rows
    return total


def no_fault(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return plain(rows, max_grad_norm, weights), rows


def mean_loss(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
    return no_fault(rows / len(rows), max_grad_norm, weights, sizes)


def clipped_by_layer(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
    parts = torch.split(rows, sizes, 1)
    return torch.cat([plain(part, max_grad_norm / len(sizes) ** 0.5, weights) for part in parts]), rows


def clipped_after_the_sum(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return plain((weights @ rows)[None], max_grad_norm, torch.ones(1)), rows


def not_clipped(rows: torch.Tensor, _: float, weights: torch.Tensor, __: list[int]) -> Fault:
    return weights @ rows, rows


def always_scaled(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return (weights * max_grad_norm / rows.norm(dim=1)) @ rows, rows  # short gradients made longer


def weights_ignored(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return plain(rows, max_grad_norm, torch.ones_like(weights)), rows


def weighed_before_the_clip(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return plain(rows * weights[:, None] + 1e-12, max_grad_norm, torch.ones_like(weights)), rows


def a_parameter_forgotten(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
    kept = rows.clone()
    kept[:, : sizes[0]] = 0
    return no_fault(kept, max_grad_norm, weights, sizes)


def order_changed(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, _: list[int]) -> Fault:
    return plain(rows.flip(1), max_grad_norm, weights), rows


def wrong_for_one_example(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
    return no_fault(rows * 2 if len(rows) == 1 else rows, max_grad_norm, weights, sizes)


def wrong_for_three_examples(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
    return no_fault(rows.roll(1, 0) if len(rows) == 3 else rows, max_grad_norm, weights, sizes)


MUTANTS = (
    *((mean_loss, "norm of"), (clipped_by_layer, "not clipped as a whole"), (clipped_after_the_sum, "clipped sum")),
    *((not_clipped, "clipped sum"), (always_scaled, "clipped sum"), (weights_ignored, "clipped sum")),
    *((weighed_before_the_clip, "clipped sum"), (a_parameter_forgotten, "norm of 'words.weight'")),
    *((order_changed, "clipped sum .* most in "), (wrong_for_one_example, "norm of"), (wrong_for_three_examples, "norm of")),
)


@pytest.mark.parametrize(("fault", "message"), MUTANTS, ids=[fault.__name__ for fault, _ in MUTANTS])
def test_a_planted_mutant_is_refused(
    fault: Callable[[torch.Tensor, float, torch.Tensor, list[int]], Fault], message: str
) -> None:
    tunable, batch = repaired("tokens")
    before = state(tunable.module)
    with pytest.raises(ModelError, match=message):
        check(Mutant(tunable, fault), tunable, batch)
    assert same(before, state(tunable.module))


def test_the_mutant_without_a_fault_passes() -> None:
    tunable, batch = repaired("tokens")
    assert check(Mutant(tunable, no_fault), tunable, batch).worst_norm_error < 1e-5


def test_a_tied_weight_that_is_counted_once_is_refused() -> None:
    class Untied(CalledTwice):
        """Its gradient forgets the second call."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.first(torch.eye(6)[ids % 6].mean(1)))
            frozen = nn.functional.linear(hidden, self.first.weight.detach(), self.first.bias.detach())
            found: torch.Tensor = self.head(frozen)
            return found

    torch.manual_seed(0)
    sound = CalledTwice().eval()
    blind = Untied().eval()
    blind.load_state_dict(sound.state_dict())
    tunable = tunable_of(sound)

    def once(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
        blind.load_state_dict(sound.state_dict())
        return no_fault(rows_by_definition(tunable_of(blind), batch_of(len(rows))), max_grad_norm, weights, sizes)

    def batch_of(size: int) -> dict[str, torch.Tensor]:
        return {name: part[:size] for name, part in CASES["tied"].batch().items()}

    with pytest.raises(ModelError, match=r"norm of 'first\.weight' must be"):
        check(Mutant(tunable, once), tunable, CASES["tied"].batch())


class Writes(Mutant):
    """An engine that computes well, and writes to the module."""

    def clipped_sum(self, batch: Batch, max_grad_norm: float, weights: torch.Tensor | None = None) -> Clipped:
        self.write()
        return super().clipped_sum(batch, max_grad_norm, weights)

    def write(self) -> None:
        raise NotImplementedError


def test_an_engine_that_updates_statistics_is_refused_and_they_are_put_back() -> None:
    class Updates(Writes):
        def write(self) -> None:
            self.tunable.module.get_buffer("layers.1.running_mean").add_(1e-5)

    tunable, batch = repaired("batch norm")
    before = state(tunable.module)
    with pytest.raises(ModelError, match=r"'layers\.1\.running_mean' must stay as it was, found that engine 'mutant' writes"):
        check(Updates(tunable, no_fault), tunable, batch)
    assert same(before, state(tunable.module))


def test_an_engine_that_leaves_gradients_is_refused() -> None:
    class Leaves(Writes):
        def write(self) -> None:
            self.tunable.parameters[0].grad = torch.zeros_like(self.tunable.parameters[0])

    tunable, batch = repaired("tokens")
    with pytest.raises(ModelError, match="gradients must not stay behind"):
        check(Leaves(tunable, no_fault), tunable, batch)


@pytest.mark.parametrize("name", ["hooks", "loop", "vmap"])
def test_a_layer_that_mixes_examples_is_refused_whatever_the_engine(name: str) -> None:
    class Mixes(CalledTwice):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(ids)
            return logits - 0.5 * logits.mean(0)

    tunable = tunable_of(Mixes().eval())
    with pytest.raises(ModelError, match="must not depend on its companions"):
        check(make(name, tunable), tunable, CASES["tied"].batch())


def test_statistics_of_the_batch_in_eval_mode_are_refused() -> None:
    module = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False, affine=False), nn.Linear(6, 3)).eval()
    with pytest.raises(ModelError, match=r"companions|Expected more than 1 value"):
        check_rows(from_one_batch, module, INPUTS, CLASSES)


def test_dropout_is_refused() -> None:
    module = CASES["attention"].module().train()
    tunable = tunable_of(module)
    with pytest.raises(ModelError, match="companions"):
        check(make("loop", tunable), tunable, CASES["attention"].batch())


@pytest.mark.parametrize(
    ("shape", "message"), [("mean", "loss of one example must be"), ("sum of both", "companions|one example")]
)
def test_a_loss_that_is_not_one_number_an_example_is_refused(shape: str, message: str) -> None:
    def averaged(module: nn.Module, batch: Batch) -> torch.Tensor:
        losses = cross_entropy(module, batch)
        return losses.mean() if shape == "mean" else losses.mean().expand(len(losses))

    tunable = Tunable(CASES["tied"].module(), averaged)
    with pytest.raises(ModelError, match=message):
        check(make("loop", tunable), tunable, CASES["tied"].batch())


def test_hooks_are_refused_where_examples_share_a_table_and_the_parameter_is_named() -> None:
    tunable = tunable_of(SharedTable().eval())
    engine = make("hooks", tunable)
    with pytest.raises(ModelError, match=r"parameter '(through|table)\.weight'"):
        check(engine, tunable, CASES["tokens"].batch())


def test_a_zero_head_does_not_hide_the_layers_before_it() -> None:
    module = CASES["tokens"].module()
    head = module.get_submodule("head")
    for one in head.parameters():
        nn.init.zeros_(one)
    tunable = tunable_of(module)

    def blind(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor, sizes: list[int]) -> Fault:
        kept = rows.clone()
        kept[:, : sizes[0]] = 0  # what is true of the words at a zero head
        return no_fault(kept, max_grad_norm, weights, sizes)

    with pytest.raises(ModelError, match=r"norm of 'words\.weight'"):
        check(Mutant(tunable, blind), tunable, CASES["tokens"].batch())
    assert not head.weight.any() if isinstance(head, nn.Linear) else False


def test_a_lack_of_memory_says_nothing_about_the_module() -> None:
    class Scarce(Writes):
        def write(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    tunable, batch = repaired("tokens")
    before = state(tunable.module)
    with pytest.raises(torch.OutOfMemoryError):
        check(Scarce(tunable, no_fault), tunable, batch)
    assert same(before, state(tunable.module))


def test_one_example_cannot_show_what_an_engine_mixes() -> None:
    tunable, batch = repaired("tokens")
    with pytest.raises(ValueError, match="at least 2 examples, found 1"):
        check(make("loop", tunable), tunable, {name: part[:1] for name, part in batch.items()})
    assert set(batch[LABELS].tolist()) == set(range(NUM_CLASSES))
