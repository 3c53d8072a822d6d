import dataclasses
import math
from typing import Any

import pytest

import urna.strategies.shortlist
from urna.models.catalogue import CATALOGUE, CandidateSpec
from urna.protocol.plan import Plan
from urna.strategies.shortlist import Shortlisted, shortlist, trained_sizes

PLAN: dict[str, Any] = {
    "name": "any",
    "task": {"num_classes": 10},
    "candidates": [{"name": "cnn"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-6},
    "federation": {"min_sites": 3, "num_records": 10_000},
    "shortlist": {"max_parameters": 40_000},
    "final": {"num_rounds": 40, "sample_rate": 0.25, "learning_rate": 0.05},
}
FINE = CATALOGUE["cnn"]


def a_plan(**sections: dict[str, Any]) -> Plan:
    return Plan.model_validate(PLAN | {name: PLAN.get(name, {}) | section for name, section in sections.items()})


def judge(candidate: CandidateSpec, multiplier: float = 1.0, plan: Plan | None = None) -> Shortlisted:
    plan = plan or a_plan()
    return shortlist(plan, [candidate], multiplier, trained_sizes(plan, [candidate]))[0]


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"tasks": ("regression",)}, "does not do classification"),
    "modality": ({"modality": "text"}, "reads text, not image"),
    "licence": ({"licence": "CC-BY-NC-4.0"}, "licence CC-BY-NC-4.0 is not accepted"),
    "size": ({"num_parameters": 40_001}, "40001 parameters, more than 40000"),
}


def test_a_candidate_that_breaks_no_rule_is_kept() -> None:
    assert judge(FINE).reasons == ()


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_drops_with_its_own_reason(rule: str) -> None:
    change, reason = RULES[rule]
    assert judge(dataclasses.replace(FINE, **change)).reasons == (reason,)


def test_a_head_that_drowns_in_noise_is_dropped() -> None:
    found = judge(FINE, multiplier=100.0)
    assert found.reasons == ("noise-to-signal ratio 1.27, more than 1: a head of 650 numbers drowns",)


def test_every_reason_is_given_at_once() -> None:
    worst = dataclasses.replace(FINE, **{key: value for change, _ in RULES.values() for key, value in change.items()})
    reasons = judge(worst, multiplier=100.0).reasons
    assert reasons[:4] == tuple(reason for _, reason in RULES.values())
    assert len(reasons) == 5


def test_the_ratio_is_noise_over_the_largest_sum_of_clipped_gradients() -> None:
    found = judge(FINE, multiplier=2.5)
    assert found.trainable_parameters == (64 + 1) * 10
    assert found.noise_to_signal == pytest.approx(2.5 * math.sqrt(650) / (0.25 * 8000), rel=1e-12)


def test_limits_themselves_are_allowed() -> None:
    at_limit = dataclasses.replace(FINE, num_parameters=40_000)
    ratio = judge(FINE, 10.0).noise_to_signal
    assert judge(at_limit, 10.0, a_plan(shortlist={"max_parameters": 40_000, "max_noise_to_signal": ratio})).reasons == ()


def test_the_plans_order_stays() -> None:
    some = [CATALOGUE[name] for name in ("vit", "pixels", "cnn")]
    assert [one.name for one in shortlist(a_plan(), some, 1.0, trained_sizes(a_plan(), some))] == ["vit", "pixels", "cnn"]


def test_no_weights_are_read_of_a_candidate_that_the_catalogue_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urna.strategies.shortlist, "try_trained_size", lambda *_: pytest.fail("a model was read"))
    plan = a_plan(final={"tuning": "full"})
    for change, reason in RULES.values():
        dropped = dataclasses.replace(FINE, **change)
        assert trained_sizes(plan, [dropped]) == {}
        assert judge(dropped, plan=plan).reasons == (reason,)
