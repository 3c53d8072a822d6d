import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from urna.models.catalogue import CATALOGUE, spec
from urna.models.preflight import TOLERANCE, PerExampleFn, check, check_head
from urna.models.tuning import per_example_gradients, trainable_size
from urna.models.vision import build
from urna.protocol.errors import ModelError


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


INPUTS = torch.linspace(-2.0, 2.0, 48).sin().view(8, 6)
LABELS = torch.arange(8) % 3


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
    report = check(by_hooks, network, images, torch.arange(4))
    assert report.num_parameters == spec(name).num_parameters + trainable_size(spec(name).feature_dim, 10)


def test_the_check_leaves_torchs_generator_as_it_was() -> None:
    state = torch.get_rng_state()
    check_head(6, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_preflight_catches_a_batch_mean_loss(head: nn.Linear) -> None:
    def mean_loss(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) / max(len(inputs), 1)

    with pytest.raises(ModelError, match=r"per-example gradient norm of 'weight' must be .*a batch mean"):
        check(mean_loss, head, INPUTS, LABELS)


def test_preflight_catches_an_error_in_one_parameter_and_names_it(head: nn.Linear) -> None:
    def no_bias(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gradients = sound(module, inputs, labels)
        gradients[:, -3:] *= 1.01
        return gradients

    with pytest.raises(ModelError, match="norm of 'bias'"):
        check(no_bias, head, INPUTS, LABELS)


def test_preflight_catches_a_layer_that_mixes_examples() -> None:
    class Centring(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs - 0.5 * inputs.mean(0)

    with pytest.raises(ModelError, match=r"norm of '1\.weight'"):
        check(from_one_batch, nn.Sequential(Centring(), nn.Linear(6, 3)), INPUTS, LABELS)


def test_preflight_catches_batch_normalisation_in_training_mode() -> None:
    with pytest.raises(ModelError, match="gradients of one example at a time must be computable, found 'Expected more"):
        check(from_one_batch, nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), INPUTS, LABELS)


def test_preflight_accepts_batch_normalisation_that_is_frozen() -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    module[0].requires_grad_(False)
    assert check(from_one_batch, module, INPUTS, LABELS).num_parameters == 21


def reversed_signs(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -sound(module, inputs, labels)


def columns_first(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    gradients = sound(module, inputs, labels)
    weight = gradients[:, :18].view(-1, 3, 6).transpose(1, 2).flatten(1)
    return torch.cat([weight, gradients[:, 18:]], 1)


@pytest.mark.parametrize("mutant", [reversed_signs, columns_first])
def test_preflight_catches_right_norms_in_wrong_directions(head: nn.Linear, mutant: PerExampleFn) -> None:
    with pytest.raises(ModelError, match=r"clipped sum .* must be within 0.001 of the one-example loop"):
        check(mutant, head, INPUTS, LABELS)


def test_preflight_catches_an_empty_sample_that_crashes(head: nn.Linear) -> None:
    def crashes(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.view(len(inputs), -1)  # what most transformers do
        return sound(module, inputs, labels)

    with pytest.raises(ModelError, match="gradients of an empty batch must be computable"):
        check(crashes, head, INPUTS, LABELS)


def test_preflight_catches_an_empty_sample_that_contributes(head: nn.Linear) -> None:
    def contributes(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) if len(inputs) else torch.ones(1, 21)

    with pytest.raises(ModelError, match=r"of an empty batch must be \(0, 21\), found \(1, 21\)"):
        check(contributes, head, INPUTS, LABELS)


def test_preflight_catches_a_forgotten_parameter(head: nn.Linear) -> None:
    def weight_only(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels)[:, :18]

    with pytest.raises(ModelError, match=r"must be \(8, 21\), found \(8, 18\)"):
        check(weight_only, head, INPUTS, LABELS)


def test_preflight_catches_not_a_number(head: nn.Linear) -> None:
    def broken(module: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sound(module, inputs, labels) * float("nan")

    with pytest.raises(ModelError, match="found nan"):
        check(broken, head, INPUTS, LABELS)


def test_one_example_cannot_show_mixing(head: nn.Linear) -> None:
    with pytest.raises(ValueError, match="at least 2 examples, found 1"):
        check(sound, head, INPUTS[:1], LABELS[:1])
