import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models.engine_cases import CASES, NUM_CLASSES, SIZE, Pictures, SharedTable, Tokens, make, pictures, tunable_of
from urna.models.attention import AttentionTwin
from urna.models.preflight import check
from urna.models.recurrent import RecurrentTwin
from urna.models.repairs import repair
from urna.models.tunable import LABELS, Batch, Classifier, Tunable, cross_entropy
from urna.protocol.errors import ModelError

FOLDED = "folded 2 batch normalisations into the convolutions before them, their shifts are trained"


def losses(module: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return cross_entropy(module, batch)


def trained(module: nn.Module) -> list[str]:
    return [name for name, one in module.named_parameters() if one.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_a_repair_changes_nothing_that_the_module_computes(case: str) -> None:
    module, batch = CASES[case].module(), CASES[case].batch()
    before = losses(module, batch)
    repair(module, batch, cross_entropy)
    assert torch.allclose(losses(module, batch), before, rtol=1e-5, atol=1e-6)
    one = {name: part[:1] for name, part in batch.items()}
    assert torch.allclose(losses(module, one), before[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_sites_come_to_the_same_trained_parameters(case: str) -> None:
    here, there = CASES[case].module(), CASES[case].module()
    batch = CASES[case].batch()
    other = {name: part.flip(0) for name, part in batch.items()}  # other values, the same shapes
    found = repair(here, batch, cross_entropy)
    assert repair(there, other, cross_entropy) == found
    assert trained(here) == trained(there)
    for (name, one), (_, two) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_everything_is_in_eval_mode_and_buffers_are_not_trained() -> None:
    module, batch = CASES["attention"].module().train(), CASES["attention"].batch()
    module.register_buffer("table", torch.ones(3, requires_grad=True))
    repair(module, batch, cross_entropy)
    assert not any(layer.training for layer in module.modules())
    assert not any(buffer.requires_grad for buffer in module.buffers())


def test_batch_normalisation_is_folded_and_its_shift_is_still_trained() -> None:
    module, batch = CASES["batch norm"].module(), CASES["batch norm"].batch()
    names = [name for name, _ in module.named_parameters()]
    found = repair(module, batch, cross_entropy)
    assert found.notes == (
        "switched 1 activations from in place to out of place",
        f"{FOLDED}; froze the statistics of 1 batch normalisations",
    )
    assert [name for name, _ in module.named_parameters()] == names
    frozen = {"layers.0.bias", "layers.1.weight", "layers.4.weight"}  # the third is behind an activation: it keeps its scale
    assert set(names) - set(trained(module)) == frozen
    norm, convolution = module.get_submodule("layers.1"), module.get_submodule("layers.0")
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.equal(norm.weight, torch.ones(4))
    assert not module.get_parameter("layers.0.bias").any()
    assert norm.running_mean is not None
    assert not norm.running_mean.any()
    given = pictures()
    with torch.no_grad():
        assert torch.allclose(norm(convolution(given)), convolution(given) + norm.bias[:, None, None], atol=1e-6)


def test_a_convolution_that_is_read_elsewhere_too_is_not_folded() -> None:
    class Twice(Pictures):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.layers[0](x)
            found: torch.Tensor = self.head((hidden + self.layers[1](hidden)).flatten(2).mean(2))
            return found

    module = Twice(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), width=4)
    nn.init.constant_(module.get_parameter("layers.1.weight"), 0.5)
    before = copy.deepcopy(module.state_dict())
    found = repair(module, CASES["batch norm"].batch(), cross_entropy)
    assert found.notes == ("froze the statistics of 1 batch normalisations",)
    assert found.share_trained == 1.0
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def test_one_pair_that_cannot_be_folded_does_not_keep_the_others_from_it() -> None:
    class Twice(Pictures):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.layers[:4](x)
            found: torch.Tensor = self.head((hidden + self.layers[4](hidden)).flatten(2).mean(2))
            return found

    layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    module = Twice(*layers, width=4)
    for name in ("layers.1.weight", "layers.4.weight"):
        nn.init.constant_(module.get_parameter(name), 0.5)
    found = repair(module, CASES["batch norm"].batch(), cross_entropy)
    assert found.notes[0].startswith("folded 1 batch normalisations")
    assert set(trained(module)) >= {"layers.3.bias", "layers.4.weight"}
    assert "layers.1.weight" not in trained(module)


def test_a_frozen_backbone_is_not_folded() -> None:
    module, batch = CASES["batch norm"].module(), CASES["batch norm"].batch()
    module.get_submodule("layers").requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    found = repair(module, batch, cross_entropy)
    assert found.notes[1] == "froze the statistics of 3 batch normalisations"
    assert (found.share_trained, trained(module)) == (1.0, ["head.weight", "head.bias"])
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def test_position_ids_get_a_batch_axis_so_that_hooks_can_see_whose_they_are() -> None:
    plain, batch = CASES["tokens"].module(), CASES["tokens"].batch()
    with pytest.raises(ModelError, match=r"parameter 'positions\.weight': a layer must be given a batch of 5, found"):
        check(make("hooks", tunable_of(plain)), tunable_of(plain), batch)
    module = CASES["tokens"].module()
    found = repair(module, batch, cross_entropy)
    assert found == repair(copy.deepcopy(plain), batch, cross_entropy)
    assert found.notes == ("gave the indices of 1 embeddings a batch axis, so that each example owns its rows",)
    for tunable in (tunable_of(module), tunable_of(copy.deepcopy(module))):
        engine = make("hooks", tunable)
        assert check(engine, tunable, batch).worst_norm_error < 1e-4
        engine.close()


def test_a_batch_axis_that_changes_the_outcome_is_taken_back() -> None:
    class Sums(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            shift = self.positions(torch.arange(7)[None]).sum((0, 1))
            found: torch.Tensor = self.head(self.norm(self.words(ids).mean(1)) + shift)
            return found

    module, batch = Sums(), CASES["tokens"].batch()
    before = losses(module.eval(), batch)
    found = repair(module, batch, cross_entropy)
    assert not any("batch axis" in note for note in found.notes)
    assert not module._forward_pre_hooks
    assert torch.equal(losses(module, batch), before)


@pytest.mark.parametrize(("kind", "width"), [("lstm", 10), ("gru", 5), ("rnn", 5)])
def test_recurrent_layers_get_twins_with_the_same_names(kind: str, width: int) -> None:
    module, batch = CASES[kind].module(), CASES[kind].batch()
    names = [name for name, _ in module.named_parameters()]
    found = repair(module, batch, cross_entropy)
    assert isinstance(module.get_submodule("layer"), RecurrentTwin)
    assert [name for name, _ in module.named_parameters()] == names == trained(module)
    assert found.share_trained == 1.0
    assert width == module.get_parameter("head.weight").shape[1]


def test_a_frozen_recurrent_layer_stays_as_it_is() -> None:
    module, batch = CASES["lstm"].module(), CASES["lstm"].batch()
    module.get_submodule("layer").requires_grad_(False)
    assert repair(module, batch, cross_entropy).notes == ()
    assert isinstance(module.get_submodule("layer"), nn.LSTM)


# --- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(8, 8), (6, 10)])
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "additive", "per head", "both"])
def test_attention_twins_compute_the_same(batch_first: bool, bias: bool, widths: tuple[int, int], mask: str) -> None:
    torch.manual_seed(0)
    settings = {"bias": bias, "kdim": widths[0], "vdim": widths[1], "batch_first": batch_first}
    attention = nn.MultiheadAttention(8, 2, **settings).eval()
    twin = AttentionTwin(attention)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 5, widths[0]), torch.randn(3, 5, widths[1])
    if not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0] * 5]).bool() if mask in ("padding", "both") else None
    attn_mask = {
        "causal": torch.ones(4, 5).triu(1).bool(),
        "both": torch.ones(4, 5).triu(1).bool(),
        "additive": torch.linspace(-1, 1, 20).view(4, 5),
        "per head": (torch.arange(6 * 20).view(6, 4, 5) % 7 == 6),
    }.get(mask)
    for average in (True, False):
        arguments = (query, key, value, padding, True, attn_mask, average)
        for ours, true in zip(twin(*arguments), attention(*arguments), strict=True):
            assert torch.allclose(ours, true, atol=1e-6)
    assert twin(query, key, value, need_weights=False)[1] is None


def test_a_transformer_layer_with_a_twin_computes_the_same_with_and_without_gradients() -> None:
    module, batch = CASES["attention"].module(), CASES["attention"].batch()
    before = losses(module, batch)  # torch's fused path
    found = repair(module, batch, cross_entropy)
    assert found.notes == ("replaced 1 nn.MultiheadAttention by twins of linear layers: q_proj, k_proj, v_proj, out_proj",)
    assert torch.allclose(losses(module, batch), before, atol=1e-6)
    assert torch.allclose(cross_entropy(module, batch).detach(), before, atol=1e-6)


def test_attention_with_learnt_keys_is_left_to_engines_that_need_no_twin() -> None:
    class Learnt(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True, batch_first=True)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            words = self.norm(self.words(ids))
            found: torch.Tensor = self.head(self.attention(words, words, words)[0].mean(1))
            return found

    module, batch = Learnt(), CASES["tokens"].batch()
    repair(module, batch, cross_entropy)
    assert isinstance(module.attention, nn.MultiheadAttention)
    tunable = tunable_of(module)
    assert check(make("loop", tunable), tunable, batch).worst_norm_error < 1e-4


# --- parameters ----------------------------------------------------------------------------------------------------------


def test_parameters_that_the_loss_does_not_depend_on_are_frozen() -> None:
    module, batch = CASES["tied"].module(), CASES["tied"].batch()
    module.register_module("pooler", nn.Linear(6, 6))
    found = repair(module, batch, cross_entropy)
    assert found.notes == ("froze 2 of 6 parameters that the loss does not depend on: pooler.weight, pooler.bias, 60.0% left",)
    assert found.share_trained == pytest.approx((36 + 6 + 21) / (36 + 6 + 21 + 42))
    assert not any("pooler" in name for name in trained(module))


def test_parameters_that_no_example_owns_are_frozen_where_enough_is_left() -> None:
    module = SharedTable()
    found = repair(module, CASES["tokens"].batch(), cross_entropy)
    assert trained(module) == ["mix.weight", "mix.bias", "wide.weight", "wide.bias", "head.weight", "head.bias"]
    assert found.notes == (
        "froze 3 of 9 parameters that no example owns: table.weight, through.weight, through.bias, 84.1% left",
    )
    assert found.share_trained == pytest.approx(445 / 529)


def test_parameters_that_no_example_owns_stay_where_too_little_would_be_left() -> None:
    module = SharedTable(width=40)
    found = repair(module, CASES["tokens"].batch(), cross_entropy)
    assert found.share_trained == 1.0
    assert found.notes[0].startswith("kept 3 of 9 parameters that no example owns, ")
    assert len(trained(module)) == 9


def test_parameters_that_a_module_owns_itself_are_not_frozen() -> None:
    module = CASES["raw"].module()
    assert repair(module, CASES["raw"].batch(), cross_entropy).notes == ()
    assert {"token", "table", "logit_scale"} <= set(trained(module))


def test_nothing_to_train_is_an_error() -> None:
    module, batch = CASES["tied"].module().requires_grad_(False), CASES["tied"].batch()
    with pytest.raises(ModelError, match="expected parameters that can be trained, found none"):
        repair(module, batch, cross_entropy)


def test_a_loss_that_is_averaged_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"one number for each of 5 examples, found \(\)"):
        repair(CASES["tied"].module(), CASES["tied"].batch(), lambda module, batch: cross_entropy(module, batch).mean())


def test_one_example_shows_nothing() -> None:
    batch = {name: part[:1] for name, part in CASES["tied"].batch().items()}
    with pytest.raises(ValueError, match="at least 2 examples"):
        repair(CASES["tied"].module(), batch, cross_entropy)


# --- whole models --------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A model of transformers, its outputs pooled to (b, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(**inputs).last_hidden_state
        return hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1)


TEXT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig.from_dict({**TEXT, "max_position_embeddings": 13}), add_pooling_layer=False)


def deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    sizes = {**TEXT, **relative, "norm_rel_ebd": "layer_norm", "max_position_embeddings": 13}
    return DebertaV2Model(DebertaV2Config.from_dict(sizes))


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    small = {**TEXT, "image_size": 8, "patch_size": 4, "num_channels": 2}
    return ViTModel(ViTConfig.from_dict(small), add_pooling_layer=False)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    sizes = {"num_channels": 2, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig.from_dict(sizes))


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


def classifier(model: nn.Module, width: int) -> Classifier:
    return Classifier(Pooled(model), torch.zeros(width), torch.ones(width), NUM_CLASSES)


def text() -> dict[str, torch.Tensor]:
    ids = (torch.arange(SIZE * 7).view(SIZE, 7) * 13) % 31
    mask = torch.ones(SIZE, 7, dtype=torch.long)
    mask[1, 4:] = mask[3, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, LABELS: torch.arange(SIZE) % NUM_CLASSES}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": pictures(), LABELS: torch.arange(SIZE) % NUM_CLASSES}


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    ("build", "batch", "width", "share"),
    [(bert, text, 16, 1.0), (deberta, text, 16, 0.7), (t5, text, 16, 0.9), (vit, images, 16, 1.0), (resnet, images, 12, 0.9)],
)
def test_hooks_serve_whole_models_in_full(
    build: Callable[[], nn.Module], batch: Callable[[], dict[str, torch.Tensor]], width: int, share: float
) -> None:
    module = classifier(build(), width)
    before = losses(module.eval(), batch())
    found = repair(module, batch(), cross_entropy)
    assert torch.allclose(losses(module, batch()), before, atol=1e-5)
    assert found.share_trained >= share, found.notes
    tunable = Tunable(module, cross_entropy, found.notes, found.share_trained)
    engine = make("hooks", tunable)
    report = check(engine, tunable, batch())
    engine.close()
    assert report.num_parameters == tunable.size
    assert report.worst_norm_error < 1e-4
