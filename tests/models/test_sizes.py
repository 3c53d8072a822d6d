"""How many numbers are trained of a candidate, and what the operator's preflight says of it before anything is spent."""

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from urna.models import sizes
from urna.models.engines import ORDER
from urna.models.loading import load_backbone
from urna.models.prepared import prepare
from urna.models.pretrain import pretrain
from urna.models.sizes import trained_size_of, try_trained_size
from urna.protocol.errors import ModelError

prepared: Any = importlib.import_module("urna.models.prepared")
engines: Any = importlib.import_module("urna.models.engines")
MODES = pytest.mark.parametrize("tuning", ["lora", "full"])


@pytest.fixture(autouse=True)
def _measured_afresh() -> Iterator[None]:
    pretrain("autoencoder")
    sizes._measured.cache_clear()
    yield
    sizes._measured.cache_clear()  # what a test made of a candidate is no other test's


@MODES
def test_the_operators_preflight_gives_what_a_site_prepares(tuning: Literal["lora", "full"]) -> None:
    found, site = try_trained_size("autoencoder", 3, tuning, 2), prepare(load_backbone("autoencoder"), 3, tuning, lora_rank=2)
    assert (found.size, found.share_trained, found.notes) == (
        site.tunable.size,
        site.tunable.share_trained,
        site.tunable.notes,
    )
    assert (found.engine, found.fallbacks, found.reason) == (site.engine.name, site.fallbacks, "")
    assert found.size == trained_size_of("autoencoder", 3, tuning, 2)


@MODES
def test_an_engine_that_fails_is_told_with_the_one_that_serves(
    tuning: Literal["lora", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ORDER[tuning][:2]

    def refuses(_: object) -> None:
        raise ModelError("a layer of no known kind")

    monkeypatch.setitem(engines._MAKERS, first, refuses)
    found = try_trained_size("autoencoder", 3, tuning, 2)
    assert found.engine == second
    assert len(found.fallbacks) == 1
    assert first in found.fallbacks[0]
    assert "a layer of no known kind" in found.fallbacks[0]


@MODES
def test_a_candidate_that_no_engine_serves_has_a_reason_and_no_size(
    tuning: Literal["lora", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_passes(*_: object, **__: object) -> None:
        raise ModelError("expected an engine, found none")

    monkeypatch.setattr(prepared, "choose", none_passes)
    found = try_trained_size("autoencoder", 3, tuning, 2)
    assert (found.size, found.engine, found.reason) == (0, "", "expected an engine, found none")


def test_a_head_needs_neither_weights_nor_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URNA_CACHE_DIR", "/nowhere")
    found = try_trained_size("pixels", 3, "head", 8)
    assert (found.size, found.engine, found.notes) == (195, "", ())
    assert trained_size_of("pixels", 3, "head", 8) == 195
