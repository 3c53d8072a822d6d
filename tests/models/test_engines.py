import copy
import logging
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.models.engine_cases import (
    CANNOT,
    CASES,
    SIZE,
    CalledTwice,
    SharedTable,
    Tokens,
    make,
    repaired,
    rows_by_definition,
    tunable_of,
)
from urna.models import engines
from urna.models.engine_types import Engine
from urna.models.engines import ORDER, choose
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

NAMES = ("book-keeping", "hooks", "vmap", "loop")


def by_definition(rows: torch.Tensor, max_grad_norm: float, weights: torch.Tensor | None) -> torch.Tensor:
    clipped = rows * (max_grad_norm / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)
    total: torch.Tensor = (clipped if weights is None else clipped * weights[:, None]).sum(0)
    return total


def close(found: torch.Tensor, true: torch.Tensor) -> bool:
    return bool((found - true).norm() <= 1e-5 * true.norm())


@pytest.fixture
def tokens() -> Iterator[tuple[Engine, Tunable, dict[str, torch.Tensor]]]:
    tunable, batch = repaired("tokens")
    engine = make("hooks", tunable)
    yield engine, tunable, batch
    engine.close()


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in NAMES for case in CASES if case not in CANNOT[name]])
def test_every_engine_clips_each_example_as_a_whole(name: str, case: str) -> None:
    tunable, batch = repaired(case)
    rows = rows_by_definition(tunable, batch)
    max_grad_norm, weights = float(rows.norm(dim=1).median()), torch.linspace(0, 2, SIZE)
    engine = make(name, tunable)
    found = engine.clipped_sum(batch, max_grad_norm)
    weighted = engine.clipped_sum(batch, max_grad_norm, weights)
    engine.close()
    sizes = [one.numel() for one in tunable.parameters]
    true = torch.stack([part.square().sum(1) for part in torch.split(rows, sizes, 1)], 1)
    assert found.total.dtype == found.squared_norms.dtype == torch.float32
    assert bool(((found.squared_norms - true).abs() <= 1e-4 * true.sum(1, keepdim=True)).all())
    assert close(found.total, by_definition(rows, max_grad_norm, None))
    assert close(weighted.total, by_definition(rows, max_grad_norm, weights))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_leaves_nothing_behind(name: str, case: str) -> None:
    tunable, batch = repaired(case)
    before = everything(tunable.module)
    with pytest.raises(ModelError) if case in CANNOT[name] else nullcontext():
        engine = make(name, tunable)
        engine.clipped_sum(batch, 1.0)
        engine.close()
    after = everything(tunable.module)
    assert before.keys() == after.keys()
    for key, one in before.items():
        other = after[key]
        same = isinstance(other, torch.Tensor) and torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, key


def everything(module: nn.Module) -> dict[str, object]:
    """Tensors, attributes and numbers of hooks of a module, of its layers and of its parameters."""
    found: dict[str, object] = dict(copy.deepcopy(module.state_dict()))
    for name, layer in module.named_modules():
        found[f"{name}/attributes"] = sorted(set(vars(layer)) - {"watch"})
        found[f"{name}/hooks"] = [
            len(getattr(layer, one)) for one in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ]
        found[f"{name}/training"] = layer.training
        found[f"{name}/watch"] = getattr(layer, "watch", None)
    for name, parameter in module.named_parameters():
        found[f"{name}/attributes"] = sorted(vars(parameter))
        found[f"{name}/grad"] = parameter.grad
        found[f"{name}/trained"] = parameter.requires_grad
        found[f"{name}/hooks"] = len(parameter._backward_hooks or {})
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_example_that_is_not_finite_adds_nothing_and_disturbs_nobody(name: str) -> None:
    tunable, batch = repaired("convolutions")
    pictures = batch["x"].clone()
    pictures[2] = float("nan")
    others = [0, 1, 3, 4]
    engine = make(name, tunable)
    found = engine.clipped_sum({**batch, "x": pictures}, 0.1)
    true = engine.clipped_sum({key: part[others] for key, part in batch.items()}, 0.1)
    engine.close()
    assert not bool(torch.isfinite(found.squared_norms[2]).all())
    assert close(found.total, true.total)
    assert torch.allclose(found.squared_norms[others], true.squared_norms, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_dimensions_is_clipped_with_the_rest(name: str) -> None:
    tunable, batch = repaired("raw")
    engine = make(name, tunable)
    assert engine.clipped_sum(batch, 0.01).total.shape == (tunable.size,)
    found = engine.clipped_sum({key: part[:1] for key, part in batch.items()}, 0.01)
    engine.close()
    place = tunable.names.index("logit_scale")
    assert float(found.squared_norms[0, place]) > 0
    assert float(found.total.norm()) == pytest.approx(0.01, rel=1e-4)


def test_hooks_refuse_a_table_that_examples_share_and_name_it() -> None:
    tunable = tunable_of(SharedTable())
    engine = make("hooks", tunable)
    with pytest.raises(ModelError, match=r"parameter '(table|through)\.weight': a layer must be given a batch of 5, found"):
        engine.clipped_sum(CASES["tokens"].batch(), 1.0)
    engine.close()


@pytest.mark.parametrize("name", ["vmap", "loop"])
def test_whole_module_engines_serve_a_table_that_examples_share(name: str) -> None:
    torch.manual_seed(0)
    tunable, batch = tunable_of(SharedTable()), CASES["tokens"].batch()
    rows = rows_by_definition(tunable, batch)
    engine = make(name, tunable)
    assert close(engine.clipped_sum(batch, 0.1).total, by_definition(rows, 0.1, None))


def test_hooks_see_a_layer_that_is_given_parts_of_examples() -> None:
    class Windows(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            words = self.words(ids[:, :6]).reshape(-1, 2, 6)  # (b * 3, 2, 6): windows of one example after another
            found: torch.Tensor = self.head(self.norm(words)).view(len(ids), -1, 3).mean(1)
            return found

    module, batch = Windows().eval(), CASES["tokens"].batch()
    module.positions.requires_grad_(False)
    tunable = tunable_of(module)
    engine = make("hooks", tunable)
    assert close(engine.clipped_sum(batch, 0.1).total, by_definition(rows_by_definition(tunable, batch), 0.1, None))
    engine.close()


def test_hooks_refuse_what_is_changed_in_place_behind_their_back() -> None:
    class Overwrites(CalledTwice):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = torch.ones(len(ids), 6)
            found: torch.Tensor = self.head(self.first(hidden))
            hidden.zero_()
            return found

    engine = make("hooks", tunable_of(Overwrites()))
    with pytest.raises(ModelError, match="was given must stay as it was, found it changed in place"):
        engine.clipped_sum(CASES["tied"].batch(), 1.0)
    engine.close()


def test_hooks_notice_an_input_of_no_example_that_has_the_batchs_length() -> None:
    class Misread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, hidden: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return (hidden * self.scale) @ table.T  # the table is (5, 6) and so is the batch

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.misread = Misread()
            self.register_buffer("table", torch.linspace(-1, 1, 30).view(5, 6))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.table, torch.Tensor)
            found: torch.Tensor = self.misread(ids[:, :6].float(), self.table)
            return found

    engine = make("hooks", tunable_of(Whole()))
    with pytest.raises(ModelError, match=r"gradient(s)? (of 'misread\.scale' )?must (add up|be computable)"):
        engine.clipped_sum(CASES["tied"].batch(), 1.0)
    engine.close()


def test_a_closed_engine_does_not_compute(tokens: tuple[Engine, Tunable, Batch]) -> None:
    engine, _, batch = tokens
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.clipped_sum(batch, 1.0)


# --- choosing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuning", "first"), [("full", "book-keeping"), ("lora", "hooks")])
def test_the_first_engine_of_the_order_that_passes_is_taken(tuning: engines.Tuning, first: str) -> None:
    tunable, batch = repaired("tokens")
    chosen = choose(tunable, batch, tuning)
    chosen.engine.close()
    assert (chosen.engine.name, chosen.report.engine, chosen.fallbacks) == (first, first, ())


def test_each_fallback_is_said_in_the_log_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    tunable = tunable_of(SharedTable())
    with caplog.at_level(logging.WARNING):
        chosen = choose(tunable, CASES["tokens"].batch(), "full")
    assert chosen.engine.name == "vmap"
    assert [reason.split(" cannot")[0] for reason in chosen.fallbacks] == ["book-keeping", "hooks"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[1].startswith("hooks cannot serve this model, vmap is tried instead: parameter '")


def test_a_model_that_mixes_examples_is_refused_with_every_reason() -> None:
    class Mixes(Tokens):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(ids)
            return logits - 0.5 * logits.mean(0)

    tunable = tunable_of(Mixes().eval())
    before = everything(tunable.module)
    with pytest.raises(ModelError, match=r"found none:\n  book-keeping .*\n  hooks .*\n  vmap .*\n  loop cannot"):
        choose(tunable, CASES["tokens"].batch(), "full")
    assert everything(tunable.module).keys() == before.keys()


def test_both_orders_end_with_the_loop_and_try_every_engine() -> None:
    assert {order[-1] for order in ORDER.values()} == {"loop"}
    assert {frozenset(order) for order in ORDER.values()} == {frozenset(NAMES)}
