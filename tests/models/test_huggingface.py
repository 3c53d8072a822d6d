import copy
import socket
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    CLIPConfig,
    EfficientNetConfig,
    GPTNeoConfig,
    MobileNetV2Config,
    PreTrainedConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from urna.models.compatibility_cases import enliven, tiny_configs
from urna.models.huggingface import (
    FAMILIES,
    HuggingFaceFeatures,
    additive_mask,
    build_features,
    family_of,
    feature_dim,
    synthetic_inputs,
)
from urna.models.tunable import Batch
from urna.protocol.errors import ModelError

CONFIGS = tiny_configs()
TEXT = [name for name, family in FAMILIES.items() if family.modality == "text"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def live(config: PreTrainedConfig) -> HuggingFaceFeatures:
    """A features module whose every layer matters."""
    module = build_features(config)
    enliven(module, lambda: module(**synthetic_inputs(config, 8, seed=0)))
    return module


def one(batch: Batch, i: int) -> Batch:
    return {name: tensor[i : i + 1] for name, tensor in batch.items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def test_each_family_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_features_of_a_batch_are_those_of_its_examples_one_by_one(name: str) -> None:
    module, batch = live(CONFIGS[name]), synthetic_inputs(CONFIGS[name], 5, seed=1)
    with torch.no_grad():
        together = module(**batch)
        alone = torch.cat([module(**one(batch, i)) for i in range(5)])
    assert together.shape == (5, feature_dim(CONFIGS[name])) == (5, module.feature_dim)
    assert together.dtype == torch.float32
    assert bool(torch.isfinite(together).all())
    assert distance(together, alone) < 1e-5
    assert distance(together[:1], together[1:2]) > 1e-3  # not blind to its input


@pytest.mark.parametrize("name", [*TEXT, "clip"])
def test_text_features_do_not_depend_on_padding(name: str) -> None:
    module, batch = live(CONFIGS[name]), synthetic_inputs(CONFIGS[name], 5, seed=1)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    rows = []
    with torch.no_grad():
        together = module(**batch)
        for i, length in enumerate(lengths):
            example = dict(one(batch, i))
            example["input_ids"] = example["input_ids"][:, :length]
            del example["attention_mask"]  # all that is left is real
            rows.append(module(**example))
    assert distance(together, torch.cat(rows)) < 1e-5


def test_speech_features_of_models_trained_with_a_mask_do_not_depend_on_padding() -> None:
    settings = CONFIGS["wav2vec2"].to_dict() | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    config = Wav2Vec2Config(**settings)
    module, batch = live(config), synthetic_inputs(config, 4, seed=1)
    lengths = batch["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        rows = [module(input_values=batch["input_values"][i : i + 1, :length]) for i, length in enumerate(lengths)]
        assert distance(module(**batch), torch.cat(rows)) < 1e-5


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_parameter_that_is_trained_reaches_the_features(name: str) -> None:
    module, batch = live(CONFIGS[name]), synthetic_inputs(CONFIGS[name], 3, seed=1)
    features = module(**batch)
    features.backward(torch.randn(features.shape, generator=torch.Generator().manual_seed(2)))
    assert [key for key, weight in module.named_parameters() if weight.requires_grad and weight.grad is None] == []


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of operations that torch runs one by one
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_can_be_differentiated_for_all_examples_at_once(name: str) -> None:
    module, batch = live(CONFIGS[name]), dict(synthetic_inputs(CONFIGS[name], 3, seed=1))
    weights = {key: weight.detach() for key, weight in module.named_parameters() if weight.requires_grad}

    def of_one(values: dict[str, torch.Tensor], example: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {key: part.unsqueeze(0) for key, part in example.items()}
        features: torch.Tensor = torch.func.functional_call(module, values, (), inputs)
        return features.sin().sum()

    with sdpa_kernel(SDPBackend.MATH):
        rows = torch.vmap(torch.func.grad(of_one), in_dims=(None, 0))(weights, batch)
        total = torch.cat([rows[key].sum(0).flatten() for key in weights])
        loss = module(**batch).sin().sum()
        expected = torch.autograd.grad(loss, [module.get_parameter(key) for key in weights])
    assert distance(total, torch.cat([part.flatten() for part in expected])) < 1e-3


def test_no_family_needs_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for config in CONFIGS.values():
        build_features(config)


def test_a_backbone_to_download_is_refused() -> None:
    config = copy.deepcopy(CONFIGS["detr"])
    config.use_timm_backbone = True
    with pytest.raises(ModelError, match="found one to download: set backbone_config"):
        build_features(config)


def test_the_configuration_is_not_changed() -> None:
    for config in CONFIGS.values():
        before = config.to_json_string(use_diff=False)
        build_features(config)
        assert config.to_json_string(use_diff=False) == before


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"found 'gpt_neo': known are albert, bart, bert,"):
        family_of(GPTNeoConfig())


@pytest.mark.parametrize("inputs", [{}, {"images": torch.zeros(1, 3, 32, 32)}, {"pixel_values": 0, "input_ids": 0}])
def test_inputs_of_another_modality_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"inputs of vit must be \('pixel_values',\), found"):
        build_features(CONFIGS["vit"])(**inputs)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(), 768),
        (ViTConfig(), 768),
        (CLIPConfig(), 1024),  # two towers
        (EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280), 1280),  # B0
        (MobileNetV2Config(), 1280),
        (MobileNetV2Config(depth_multiplier=1.4), 1792),
        (MobileNetV2Config(depth_multiplier=0.35, finegrained_output=False), 448),
    ],
)
def test_feature_dim_is_that_of_published_sizes(config: PreTrainedConfig, expected: int) -> None:
    assert feature_dim(config) == expected


def test_a_mask_hides_padding_and_the_future_and_stays_finite_in_bfloat16() -> None:
    mask = additive_mask(torch.tensor([[1, 1, 0]]), causal=True)
    assert (mask[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    assert bool(torch.isfinite(mask.bfloat16()).all())
    assert additive_mask(torch.tensor([[1, 0]])).shape == (1, 1, 1, 2)


def test_a_text_without_a_real_token_gives_finite_features() -> None:
    for name in ("bert", "gpt2", "xlnet"):
        batch = dict(synthetic_inputs(CONFIGS[name], 2, seed=1))
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
        features = build_features(CONFIGS[name])(**batch)
        assert torch.equal(features, torch.zeros_like(features))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_synthetic_inputs_follow_their_seed_and_are_what_the_family_reads(name: str) -> None:
    config = CONFIGS[name]
    first, again, other = (synthetic_inputs(config, 5, seed) for seed in (3, 3, 4))
    assert set(first) == set(FAMILIES[name].inputs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert {len(tensor) for tensor in first.values()} == {5}


@pytest.mark.parametrize("name", TEXT)
def test_synthetic_texts_have_padding_and_no_padding_token_in_the_text(name: str) -> None:
    config = CONFIGS[name]
    batch = synthetic_inputs(config, 32, seed=0)
    pad = config.pad_token_id or 0
    assert bool(batch["attention_mask"][0].all())
    assert bool((batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).any())
    assert torch.equal(batch["input_ids"] != pad, batch["attention_mask"].bool())
    assert int(batch["input_ids"].max()) < config.vocab_size


def test_drawing_synthetic_inputs_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    for config in CONFIGS.values():
        synthetic_inputs(config, 2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_position_convolutions_get_one_plain_weight() -> None:
    module = build_features(CONFIGS["wav2vec2"])
    assert [name for name in dict(module.named_parameters()) if "parametrizations" in name] == []
    assert "model.encoder.pos_conv_embed.conv.weight" in dict(module.named_parameters())
