"""Does an example's contribution move when its companions are others? Asked in the precision that will be used."""

import copy

import pytest
import torch

from tests.models.engine_cases import CASES, CalledTwice, make, tunable_of
from urna.models.engines import choose
from urna.models.preflight import COMPANY_SLACK, check, company_share
from urna.models.repairs import repair
from urna.models.tunable import Tunable, cross_entropy
from urna.privacy.release import FLOAT_SLACK


def repaired(case: str) -> tuple[Tunable, dict[str, torch.Tensor]]:
    module, batch = CASES[case].module(), CASES[case].batch()
    repair(module, batch, cross_entropy)
    return tunable_of(module), batch


class Whispers(CalledTwice):
    """Each example hears its companions, by a part of the mean of what they say; in bfloat16 only, or always."""

    def __init__(self, part: float, *, always: bool) -> None:
        super().__init__()
        self.part, self.always = part, always

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        heard = self.part if self.always or logits.dtype == torch.bfloat16 else 0.0
        return logits.float() + heard * ids.float().mean() * torch.tensor([1.0, -1.0, 0.0])


@pytest.mark.parametrize("case", ["tokens", "convolutions", "attention", "lstm"])
def test_companions_and_slots_move_nothing_in_either_precision(case: str) -> None:
    tunable, batch = repaired(case)
    before = copy.deepcopy(tunable.module.state_dict())
    engine = make("book-keeping", tunable)
    for precision, slack in COMPANY_SLACK.items():
        assert company_share(engine, tunable, batch, precision) <= slack
    engine.close()
    assert all(torch.equal(one, before[name]) for name, one in tunable.module.state_dict().items())
    assert COMPANY_SLACK["float32"] < COMPANY_SLACK["bfloat16"] <= FLOAT_SLACK


def test_bfloat16_is_given_up_where_it_lets_companions_move_an_example() -> None:
    tunable, batch = tunable_of(Whispers(0.05, always=False).eval()), CASES["tied"].batch()
    chosen = choose(tunable, batch, "full", "bfloat16")
    chosen.engine.close()
    assert chosen.precision == "float32"
    assert "bfloat16 cannot serve this model: an example's contribution must move by at most 0.001" in chosen.fallbacks[-1]


def test_bfloat16_stays_where_companions_move_nothing() -> None:
    tunable, batch = tunable_of(Whispers(0.0, always=True).eval()), CASES["tied"].batch()
    chosen = choose(tunable, batch, "full", "bfloat16")
    chosen.engine.close()
    assert (chosen.precision, chosen.fallbacks) == ("bfloat16", ())


def test_a_whisper_below_the_tolerance_of_norms_is_heard_in_float32() -> None:
    tunable, batch = tunable_of(Whispers(5e-4, always=True).eval()), CASES["tied"].batch()
    by_batch = make("hooks", tunable)
    check(by_batch, tunable, batch)
    assert company_share(by_batch, tunable, batch, "float32") > COMPANY_SLACK["float32"]
    by_batch.close()
