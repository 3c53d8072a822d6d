import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from urna.models.compatibility import MODES, NUM_EXAMPLES, Mode, Row, measure
from urna.models.compatibility_cases import cases
from urna.models.huggingface import FAMILIES
from urna.models.preflight import TOLERANCE

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "dp-compatibility.md"
CELLS = [(name, mode) for name in cases() for mode in MODES]


@pytest.fixture(autouse=True)
def _one_quiet_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.ERROR)  # fallbacks are in the row
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documented() -> dict[tuple[str, str], tuple[str, str]]:
    """(model, mode) -> (engine, share) of the document's table."""
    lines = [line.split("|") for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:5]] for line in lines]
    return {(model, mode): (engine, share) for model, mode, engine, share in rows if model != "model"}


@pytest.mark.parametrize(("name", "mode"), CELLS, ids=[f"{name}-{mode}" for name, mode in CELLS])
def test_a_cell_measures_as_documented(name: str, mode: Mode) -> None:
    case = cases()[name]
    row = measure(case, mode)
    assert (row.engine, f"{row.share:.1%}") == documented()[name, mode], row.notes
    assert row.worst_error <= TOLERANCE
    if mode == "head" and not case.head:
        assert row.engine == "none"
    else:
        assert row.engine not in ("none", "loop"), row.notes


def test_the_document_has_every_cell_in_order_and_no_other() -> None:
    assert list(documented()) == CELLS


def test_every_family_is_measured_as_features_and_every_modality_with_a_task() -> None:
    names = set(cases())
    assert names >= set(FAMILIES)
    tasks = {FAMILIES[name.partition(" (")[0]].modality for name in names - set(FAMILIES)}
    assert tasks == {"text", "image", "audio", "series"}


@pytest.mark.parametrize("name", list(cases()))
def test_a_loss_is_of_each_example_alone(name: str) -> None:
    case = cases()[name]
    module, batch = case.build(), case.batch(NUM_EXAMPLES, 3)
    with torch.no_grad():
        together = case.loss(module, batch)
        alone = [case.loss(module, {key: one[i : i + 1] for key, one in batch.items()}) for i in range(NUM_EXAMPLES)]
    assert together.shape == (NUM_EXAMPLES,)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_a_row_is_one_line_of_a_table() -> None:
    row = Row("a", "full", "hooks", 0.98765, ("froze x|y", "no"), 0.0)
    assert str(row) == r"| a | full | hooks | 98.8% | froze x\|y; no |"
