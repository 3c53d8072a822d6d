import hashlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import MobileNetV2Config

from urna.models.compatibility_cases import enliven, tiny_configs
from urna.models.huggingface import FAMILIES, build_features, synthetic_inputs
from urna.models.lora import add_lora, lora_targets, public_start
from urna.models.tunable import Classifier
from urna.models.vision import ConvGRU, ConvNet, Encoder, Pixels, RowLSTM
from urna.protocol.errors import ModelError

CONFIGS = tiny_configs()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_starts_at_its_pretrained_features_and_trains_factor_b_alone(name: str) -> None:
    config = CONFIGS[name]
    module, batch = build_features(config), synthetic_inputs(config, 3, seed=1)
    enliven(module, lambda: module(**batch))
    with torch.no_grad():
        before = module(**batch)
        add_lora(module, rank=4, alpha=8.0)
        after = module(**batch)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert {key.split(".")[-3] for key in trained(module)} == {"lora_B"}
    assert not any(part.training for part in module.modules())
    features = module(**batch)
    features.backward(torch.ones_like(features))
    assert [key for key, one in module.named_parameters() if one.requires_grad and one.grad is None] == []


def test_every_site_starts_from_the_same_factors_whatever_its_generator() -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = build_features(CONFIGS["bert"])
        add_lora(module, rank=4, alpha=8.0)
        starts.append({name: one.detach() for name, one in module.named_parameters() if "lora_" in name})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    down = [one for name, one in starts[0].items() if "lora_A" in name]
    assert all(bool((one != 0).any()) for one in down)
    assert not torch.equal(down[0], down[1])  # a layer has its own
    assert all(bool((one == 0).all()) for name, one in starts[0].items() if "lora_B" in name)


def test_the_public_start_never_changes() -> None:
    start = public_start("layer.0.query.lora_A", torch.Size((4, 16)))
    assert (
        hashlib.sha256(start.numpy().tobytes()).hexdigest()
        == "b2441b8b1e4c61676d9ac4f5ff111425463347eba3b6cef43d3bbf9695038b49"
    )
    assert start.dtype == torch.float32
    assert float(start.abs().max()) <= 0.25  # 1 / sqrt(16)
    assert abs(float(public_start("wide", torch.Size((8, 4096))).std()) * 64 - 3**-0.5) < 0.02  # uniform; 5 standard errors


def test_a_classifier_keeps_its_whole_head_and_starts_like_its_backbone() -> None:
    alone, backbone = Encoder(8, 6), Encoder(8, 6)
    classifier = Classifier(backbone, torch.zeros(6), torch.ones(()), 3)
    assert lora_targets(classifier) == ("backbone.hidden", "backbone.code")
    add_lora(alone, rank=2, alpha=4.0)
    add_lora(classifier, rank=2, alpha=4.0)
    names = trained(classifier)
    assert {name for name in names if not name.startswith("backbone.")} == {"head.weight", "head.bias"}
    for name, one in alone.named_parameters():
        if "lora_" in name:
            assert torch.equal(classifier.get_parameter(f"backbone.{name}"), one)


def test_own_backbones_adapt_linear_layers_and_convolutions() -> None:
    assert lora_targets(ConvNet(4, 6)) == ("conv1", "conv2", "conv3", "project")
    assert lora_targets(ConvGRU(4, 6)) == ("conv",)
    module, images = ConvNet(4, 6), torch.rand(2, 1, 8, 8)
    before = module(images)
    add_lora(module, rank=2, alpha=4.0)
    assert torch.allclose(module(images), before, atol=1e-6)


@pytest.mark.parametrize("module", [Pixels(), RowLSTM(4), nn.MultiheadAttention(8, 2)])
def test_a_model_without_a_layer_to_adapt_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError, match=f"found none in {type(module).__name__}: choose head or full"):
        add_lora(module, rank=2, alpha=4.0)


def test_factors_are_added_once() -> None:
    module = Encoder(8, 6)
    add_lora(module, rank=2, alpha=4.0)
    with pytest.raises(ModelError, match="without low-rank factors, found some"):
        add_lora(module, rank=2, alpha=4.0)


def test_a_layer_whose_name_ends_like_a_target_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"query": nn.Conv2d(4, 4, 1, groups=4)})  # depthwise: it has no low rank

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.query(inputs)
            return outputs

    module = Both()
    add_lora(module, rank=2, alpha=4.0)
    assert set(trained(module)) == {"query.lora_B.default.weight"}


@pytest.mark.parametrize("tf_padding", [True, False])
def test_mobilenet_pads_by_the_stride_of_an_adapted_convolution(tf_padding: bool) -> None:
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, tf_padding=tf_padding)
    module, batch = build_features(config), synthetic_inputs(config, 2, seed=1)
    enliven(module, lambda: module(**batch))
    with torch.no_grad():
        before = module(**batch)
        add_lora(module, rank=2, alpha=4.0)
        assert torch.allclose(module(**batch), before, atol=1e-5)
    assert any("first_conv" in name for name in trained(module))


def test_the_factors_product_is_scaled_by_alpha_over_rank() -> None:
    module, inputs = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5)
    before = module(inputs)
    add_lora(module, rank=2, alpha=6.0)
    down, up = module.get_parameter("0.lora_A.default.weight"), module.get_parameter("0.lora_B.default.weight")
    with torch.no_grad():
        up.fill_(0.5)
    expected = before + 3.0 * functional.linear(functional.linear(inputs, down), up)
    assert torch.allclose(module(inputs), expected, atol=1e-5)
