"""Sites that are lost at any point of a round: the survivors' sum opens or nothing does, and the audit passes afterwards."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.simulator import Fault, Federation, always, bodies, lost, once, rounds, small, value
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats
from urna.privacy.ring import Vector
from urna.privacy.secure_sum import ServerRole, Upload, burnt_statement, upload_of
from urna.protocol.errors import FailureCode, ProtocolError, RefusedError
from urna.protocol.identity import Identity
from urna.protocol.messages import (
    AnswerOfSite,
    AnyRequest,
    Burnt,
    Envelope,
    Failure,
    Head,
    Masked,
    Refusal,
    Summed,
    Unmasked,
    read_request,
    signed,
)
from urna.protocol.plan import Plan
from urna.protocol.sealing import unseal
from urna.server.rounds import Outcome
from urna.server.stages import Stages
from urna.strategies.aggregation import OptimizerState, apply
from urna.strategies.ballot import Ranking

SITES = tuple(f"site-{number}" for number in range(1, 6))
NOISE = 4.0  # multiplier of rounds that are asked by hand


def brief(**changes: object) -> Plan:
    """Five sites, one candidate, two rounds."""
    return small(**{"names": ("pixels",), "num_rounds": 2, "if_undecided": "prior", "num_curve_points": 0} | changes)  # type: ignore[arg-type]


@dataclass
class Plain:
    """What sites put into the ring, by (site, round's id): seen inside them, where no server sees it."""

    federation: Federation
    numbers: dict[tuple[str, str], Vector] = field(default_factory=dict)

    def total_of(self, entry_key: str, sites: tuple[str, ...]) -> Floats:
        """The plain sum of some sites in a round, in real units."""
        run_dir = self.federation.run_dir
        request = read_request(value(run_dir, f"ask/{entry_key}")["body"].encode())  # type: ignore[attr-defined]
        assert isinstance(request, Summed)
        grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
        numbers = [self.numbers[site, request.request_id].astype(np.uint64) for site in sites]
        return grid.from_ring(grid.ring.reduce(np.sum(numbers, axis=0).astype(np.uint32)))


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "run", brief())


def watched(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Plain:
    plain, to_ring = Plain(federation), Grid.to_ring

    def seen(grid: Grid, integers: npt.NDArray[np.int64]) -> Vector:
        numbers = to_ring(grid, integers)
        plain.numbers[federation.working] = numbers.copy()
        return numbers

    monkeypatch.setattr(Grid, "to_ring", seen)
    return plain


def trained(stages: Stages, index: int, state: OptimizerState | None = None) -> OptimizerState:
    """One round of the final stage, asked by hand."""
    return stages.train("final", f"final/{index}", "pixels", state or stages.start("pixels"), index, NOISE, 2)


def codes(federation: Federation) -> set[str]:
    """All failure codes that crossed the wire."""
    return {str(body["code"]) for _, body in bodies(federation, "failure")}


def failing(identity: Identity, code: FailureCode = FailureCode.INTERNAL) -> Fault:
    def fault(_route: str, reply: Envelope) -> Envelope:
        answered = json.loads(reply.body)["request_sha256"]
        return signed(identity, Failure(request_sha256=answered, code=code))

    return fault


def refusing(identity: Identity) -> Fault:
    def fault(_route: str, reply: Envelope) -> Envelope:
        answered = json.loads(reply.body)["request_sha256"]
        return signed(identity, Refusal(request_sha256=answered, reasons=("budget: none is left",)))

    return fault


def with_arrays(identity: Identity, change: Callable[[dict[str, npt.NDArray[np.uint8]]], object]) -> Fault:
    """Other arrays, signed by the site itself."""

    def fault(_route: str, reply: Envelope) -> Envelope:
        arrays = {name: array.copy() for name, array in reply.arrays.items()}
        change(arrays)
        model = Masked if json.loads(reply.body)["kind"] == "masked" else Unmasked
        return signed(identity, model.model_validate_json(reply.body), arrays)

    return fault


def tampered(_route: str, reply: Envelope) -> Envelope:
    """Other arrays, under the signature of the true ones."""
    return Envelope(reply.sender, reply.body, reply.signature, {"pads": np.zeros((1, 32), np.uint8)})


def other_signature(identity: Identity) -> Fault:
    """A sound answer whose signature over the alive list is of another list."""

    def fault(_route: str, reply: Envelope) -> Envelope:
        message = Unmasked.model_validate_json(reply.body)
        signature = identity.sign("alive", bytes(32)).hex()
        answer = message.answer.model_copy(update={"signature": signature})
        return signed(identity, message.model_copy(update={"answer": answer}), reply.arrays)

    return fault


def zeroed(name: str) -> Callable[[dict[str, npt.NDArray[np.uint8]]], object]:
    return lambda arrays: arrays.update({name: np.zeros_like(arrays[name])})


def kind(wanted: str) -> Callable[[AnyRequest], bool]:
    return lambda request: request.kind == wanted


BEFORE_UPLOAD: dict[str, tuple[Callable[[Federation], None], str]] = {
    "request_lost": (lambda f: f.unreached.update({"site-3": kind("train")}), "silent"),
    "upload_lost": (lambda f: f.faults.update({"site-3": lost("train")}), "silent"),
    "upload_tampered": (lambda f: f.faults.update({"site-3": once(tampered, "train")}), "not believed"),
    "refused": (
        lambda f: f.faults.update({"site-3": once(refusing(f.site("site-3").identity), "train")}),
        "refused: budget: none is left",
    ),
    "failed": (
        lambda f: f.faults.update({"site-3": once(failing(f.site("site-3").identity), "train")}),
        "failed: internal",
    ),
    "upload_without_shares": (
        lambda f: f.faults.update(
            {"site-3": once(with_arrays(f.site("site-3").identity, lambda arrays: arrays.pop("shares")), "train")}
        ),
        "not believed",
    ),
    "checks_that_differ_from_the_neighbours": (
        lambda f: f.faults.update({"site-3": once(with_arrays(f.site("site-3").identity, zeroed("checks")), "train")}),
        "not believed",
    ),
}


@pytest.mark.parametrize("how", BEFORE_UPLOAD)
def test_a_site_lost_before_its_upload_arrives_is_left_out_and_the_others_sum_opens(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    plain = watched(federation, monkeypatch)
    install, why = BEFORE_UPLOAD[how]
    install(federation)
    others = tuple(site for site in SITES if site != "site-3")
    with federation.stages() as stages:
        state = trained(stages, 1)
        trained(stages, 2, state)
        stages.close()
    first, second = rounds(federation.run_dir).values()
    assert first.value["dropped"] == {"site-3": why}
    assert tuple(first.value["survivors"]) == tuple(first.value["delivered"]) == others
    assert np.array_equal(first.arrays["total"], plain.total_of("final/1", others))
    assert tuple(second.value["cohort"]) == others  # it sits out until the next stage
    assert second.value["opened"]
    assert np.array_equal(second.arrays["total"], plain.total_of("final/2", others))
    assert codes(federation) <= {"internal"}  # no audit failed
    assert len(value(federation.run_dir, "statements")) == 5


DURING_UNMASK: dict[str, Callable[[Federation], None]] = {
    "request_lost": lambda f: f.unreached.update({"site-3": kind("unmask")}),
    "answer_lost": lambda f: f.faults.update({"site-3": lost("query.unmask")}),
    "refused": lambda f: f.faults.update({"site-3": once(refusing(f.site("site-3").identity), "query.unmask")}),
    "answer_tampered": lambda f: f.faults.update({"site-3": once(tampered, "query.unmask")}),
    "pads_forged": lambda f: f.faults.update(
        {"site-3": once(with_arrays(f.site("site-3").identity, zeroed("pads")), "query.unmask")}
    ),
    "pads_of_another_shape": lambda f: f.faults.update(
        {
            "site-3": once(
                with_arrays(f.site("site-3").identity, lambda arrays: arrays.update(pads=arrays["pads"][:2])), "query.unmask"
            )
        }
    ),
    "no_pads": lambda f: f.faults.update(
        {"site-3": once(with_arrays(f.site("site-3").identity, lambda arrays: arrays.pop("pads")), "query.unmask")}
    ),
    "another_list_signed": lambda f: f.faults.update(
        {"site-3": once(other_signature(f.site("site-3").identity), "query.unmask")}
    ),
}


@pytest.mark.parametrize("how", DURING_UNMASK)
def test_a_site_lost_after_its_upload_stays_in_the_sum_that_opens(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    plain = watched(federation, monkeypatch)
    DURING_UNMASK[how](federation)
    with federation.stages() as stages:
        trained(stages, 2, trained(stages, 1))
        stages.close()
    for key, entry in rounds(federation.run_dir).items():
        assert (entry.value["opened"], entry.value["dropped"], tuple(entry.value["survivors"])) == (True, {}, SITES)
        assert np.array_equal(entry.arrays["total"], plain.total_of(key, SITES))
        assert len(value(federation.run_dir, f"audit/{key}")["audit"]["answers"]) >= 4  # type: ignore[index]
    assert not codes(federation)
    assert len(value(federation.run_dir, "statements")) == 5


def test_a_liar_about_its_checks_that_comes_first_is_left_out_and_not_the_others(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief())
    lie = with_arrays(federation.site("site-1").identity, zeroed("checks"))
    federation.faults["site-1"] = always(lie, "train")
    federation.run()
    found = rounds(tmp_path / "run")
    assert not [site for entry in found.values() for site in entry.value["dropped"] if site != "site-1"]
    assert found["final/2"].value["opened"]  # at the latest the next round does without it


def test_one_forger_and_one_lost_upload_lose_the_round_and_a_wrong_total_never_opens(federation: Federation) -> None:
    forged = with_arrays(federation.site("site-3").identity, zeroed("pads"))
    federation.faults |= {"site-1": lost("train"), "site-3": once(forged, "query.unmask")}
    with federation.stages() as stages:
        state = stages.start("pixels")
        assert trained(stages, 1, state) is state
    (entry,) = rounds(federation.run_dir).values()
    assert not entry.value["opened"]
    assert "total" not in entry.arrays


def two(install: Callable[[Federation, str], None]) -> Callable[[Federation], None]:
    def both(federation: Federation) -> None:
        for site in ("site-2", "site-4"):
            install(federation, site)

    return both


def mixed(federation: Federation) -> None:
    federation.faults["site-2"] = lost("train")
    federation.unreached["site-4"] = first_only("unmask")


def first_only(wanted: str) -> Callable[[AnyRequest], bool]:
    """The requests of a kind about the first round never arrive."""
    return lambda request: request.kind == wanted and "/final/1" in request.request_id


LOSSES: dict[str, tuple[Callable[[Federation], None], bool, str]] = {  # -> whether the unmask was asked, what sites say after
    "two_uploads_lost": (two(lambda f, site: f.faults.update({site: lost("train")})), False, ""),
    "two_never_reached": (two(lambda f, site: f.unreached.update({site: first_only("train")})), False, ""),
    "an_upload_and_an_unmask": (mixed, True, "unproven"),
    "two_unmasks_never_arrive": (two(lambda f, site: f.unreached.update({site: first_only("unmask")})), True, "unproven"),
    "two_answers_lost": (two(lambda f, site: f.faults.update({site: lost("query.unmask")})), True, "unproven"),
}


@pytest.mark.parametrize("how", LOSSES)
def test_two_of_five_lost_lose_the_round_and_never_the_campaign(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    federation = Federation(tmp_path / "run", brief(min_sites=3))
    install, unmasked, said = LOSSES[how]
    install(federation)
    with caplog.at_level(logging.WARNING), federation.stages() as stages:
        state = stages.start("pixels")
        assert trained(stages, 1, state) is state  # a lost round trains nothing
        assert trained(stages, 2, state).step == 1
        stages.close()
    first, second = rounds(federation.run_dir).values()
    assert (first.value["opened"], first.value["survivors"], dict(first.arrays)) == (False, [], {})
    assert second.value["opened"]
    said_of_it = (
        "round final/1 is given up" if unmasked else "round final/1 is lost: expected at least 4 of 5 sites alive, found 3"
    )
    assert any(said_of_it in one for one in caplog.messages)
    assert len(bodies(federation, "abort")) == (5 if unmasked else 0)
    for site in federation.sites:
        kept = site.ledger.rounds.find("run/final/1")
        if kept is not None and kept.progress.alive_sha256:
            assert kept.audited == said
        assert kept is None or kept.progress.burnt == unmasked or not kept.progress.context
    assert not codes(federation)
    assert len(value(federation.run_dir, "statements")) == 5


def test_a_round_that_was_given_up_is_never_unmasked_afterwards(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief())
    LOSSES["two_unmasks_never_arrive"][0](federation)
    with federation.stages() as stages:
        trained(stages, 1)
    asked = next(one for one in federation.wire if b'"kind":"unmask"' in one.body)
    for site in federation.sites:
        assert json.loads(site.handle(asked).body)["code"] == "replay_changed"


def test_a_late_upload_stays_hidden_and_changes_no_total(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = watched(federation, monkeypatch)
    roles: list[ServerRole] = []

    class Watched(ServerRole):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            roles.append(self)

    monkeypatch.setattr("urna.server.rounds.ServerRole", Watched)
    late: list[Envelope] = []

    def withheld(route: str, reply: Envelope) -> Envelope | None:
        """The first upload comes instead of the answer to the next request, signature and all."""
        if route == "train" and not late:
            late.append(reply)
            return None
        return late[0] if late else reply

    federation.faults["site-3"] = withheld
    others = tuple(site for site in SITES if site != "site-3")
    with federation.stages() as stages:
        trained(stages, 1)
        stages.rounds.everyone_back()
        trained(stages, 2)
    first, second = rounds(federation.run_dir).values()
    assert (first.value["dropped"], second.value["dropped"]) == ({"site-3": "silent"}, {"site-3": "not believed"})
    for key, entry in (("final/1", first), ("final/2", second)):
        assert np.array_equal(entry.arrays["total"], plain.total_of(key, others))
    before = (roles[0]._total.copy(), dict(roles[0]._shares))
    with pytest.raises(ProtocolError, match="a late one from site-3: it stays hidden"):
        roles[0].add("site-3", upload_of(late[0].arrays))
    assert np.array_equal(roles[0]._total, before[0])
    assert roles[0]._shares.keys() == before[1].keys()


def test_a_site_that_dropped_out_comes_back_in_the_next_stage(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief(names=("pixels", "pca")))
    federation.faults["site-2"] = lost("query.ballot")
    federation.faults["site-4"] = lost("train")
    federation.run()
    found = rounds(tmp_path / "run")
    cohorts = {key: set(SITES) - set(entry.value["cohort"]) for key, entry in found.items()}
    assert cohorts == {"ballot/1": set(), "final/1": set(), "final/2": {"site-4"}, "evaluation/final/1": set()}
    assert [set(entry.value["dropped"]) for entry in found.values()] == [{"site-2"}, {"site-4"}, set(), set()]
    assert all(entry.value["opened"] for entry in found.values())
    assert not codes(federation)
    assert set(value(tmp_path / "run", "statements")) == set(SITES)


class ServerKilledError(BaseException):
    """Nothing of the campaign runs after it."""


def killed_at(route: str) -> Fault:
    def fault(this: str, reply: Envelope) -> Envelope:
        if this == route:
            raise ServerKilledError
        return reply

    return fault


@pytest.mark.parametrize("route", ["train", "query.unmask"])
def test_a_site_that_comes_back_with_another_ledger_is_in_no_later_sum_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """An older copy is restored between the upload and the resume: the round in flight does without it, or is given up."""
    first = Federation(tmp_path / "run", brief(min_sites=3))
    folder = tmp_path / "run" / "sites" / "site-3"
    shutil.copytree(folder, tmp_path / "backup")
    first.faults["site-4"] = killed_at(route)  # with its answer the sum would have opened
    with pytest.raises(ServerKilledError):
        first.run()
    for site in first.sites:
        site.ledger.close()
    shutil.rmtree(folder)
    (tmp_path / "backup").rename(folder)
    second = Federation(tmp_path / "run", brief(min_sites=3))
    plain = watched(second, monkeypatch)
    second.run()
    one, two_, counted = rounds(tmp_path / "run").values()
    others = tuple(site for site in SITES if site != "site-3")
    assert codes(second) == {"rollback"}
    if route == "train":  # no list was fixed: the others' sum opens
        assert (one.value["opened"], one.value["dropped"]) == (True, {"site-3": "silent"})
    else:  # the list names it: no other list is ever asked about that round
        assert not one.value["opened"]
        assert len({body for _, body in unmask_lists(second, "final/1")}) <= 1
    assert two_.value["opened"]
    assert (counted.value["opened"], tuple(counted.value["cohort"])) == (True, others)
    assert np.array_equal(counted.arrays["total"], plain.total_of("evaluation/final/1", others))
    assert set(value(tmp_path / "run", "statements")) == set(others)


def unmask_lists(federation: Federation, key: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every alive list that was asked about a round, with the request's id."""
    return [
        (str(body["request_id"]), tuple(body["alive"]))  # type: ignore[arg-type]
        for _, body in bodies(federation, "unmask")
        if body["round_id"] == f"{federation.run_dir.name}/{key}"
    ]


@pytest.mark.parametrize("lost_uploads", [0, 1])
def test_noise_of_an_opened_sum_is_that_of_its_survivors(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, lost_uploads: int
) -> None:
    """Measured over 2 rounds x 650 numbers to 2 %; six standard errors either way, so fewer than one false alarm in 1e8.

    The plan counts on 3 honest survivors, of cohorts of 5 and of 4; of all that are in the sum, the share is in it.
    """
    from urna.privacy import release

    shares: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
    draw = release.noise_share

    def seen(*arguments: object, **more: object) -> npt.NDArray[np.int64]:
        shares[federation.working] = draw(*arguments, **more)  # type: ignore[arg-type]
        return shares[federation.working]

    monkeypatch.setattr(release, "noise_share", seen)
    outcomes: list[Outcome] = []
    ask = Stages._sum

    def noted(stages: Stages, *arguments: object, **more: object) -> Outcome:
        outcomes.append(ask(stages, *arguments, **more))  # type: ignore[arg-type]
        return outcomes[-1]

    monkeypatch.setattr(Stages, "_sum", noted)
    if lost_uploads:
        federation.faults["site-1"] = lost("train")
    with federation.stages() as stages:
        trained(stages, 2, trained(stages, 1))
        declared = [stages.noise_std(1.0, outcome) for outcome in outcomes]
    assert declared == pytest.approx([NOISE * math.sqrt((5 - lost_uploads) / 3)] * 2)
    measured: list[float] = []
    for outcome, std in zip(outcomes, declared, strict=True):
        body = json.loads(str(value(federation.run_dir, f"ask/{outcome.key}")["body"]))
        step = math.ldexp(1.0, body["step_exp"])
        drawn = np.sum([shares[one.site, f"run/{outcome.key}"] for one in outcome.survivors], axis=0)
        measured.append(float(np.square(drawn * step / std).mean()))
    assert np.mean(measured) == pytest.approx(1.0, abs=6 * math.sqrt(2 / (2 * 650)))


def test_a_ballot_counts_the_buckets_of_its_survivors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urna.strategies import ballot

    counted: list[int] = []
    rank = ballot.rank

    def seen(names: tuple[str, ...], total: Floats, noise_std: float, num_buckets: int) -> Ranking:
        counted.append(num_buckets)
        return rank(names, total, noise_std, num_buckets)

    monkeypatch.setattr("urna.server.stages.ballot.rank", seen)
    plan = brief(names=("pixels", "pca"))
    federation = Federation(tmp_path / "run", plan)
    federation.faults["site-4"] = lost("query.ballot")
    with federation.stages() as stages:
        assert stages.ballot(("pixels", "pca"), 8.0) is not None
    sizes = {site.config.name: plan.num_buckets(site.config.dataset[0].num_records) for site in federation.sites}
    assert counted == [sum(sizes.values()) - sizes["site-4"]]


@pytest.mark.parametrize("secure_sum", [True, False])
def test_a_mean_of_local_steps_is_weighted_over_its_survivors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure_sum: bool
) -> None:
    from urna.client import training

    federation = Federation(tmp_path / "run", brief(noise="local", secure_sum=secure_sum))
    changes: dict[str, Floats] = {}
    steps, gradients = training.local_steps, []

    def seen(*arguments: object, **more: object) -> Floats:
        changes[federation.working[0]] = steps(*arguments, **more)  # type: ignore[arg-type]
        return changes[federation.working[0]]

    def applied(state: OptimizerState, gradient: Floats, final: object) -> OptimizerState:
        gradients.append(gradient)
        return apply(state, gradient, final)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "local_steps", seen)
    monkeypatch.setattr("urna.server.stages.apply", applied)
    federation.faults["site-2"] = lost("train")
    with federation.stages() as stages:
        trained(stages, 1)
    sizes = {site.config.name: site.config.dataset[0].num_records for site in federation.sites if site.config.name != "site-2"}
    expected = sum(changes[site] * size for site, size in sizes.items()) / sum(sizes.values())
    assert np.allclose(-gradients[0], expected, atol=1e-5 * np.abs(expected).max())
    unmasks = [one for one in federation.wire if b'"kind":"unmask"' in one.body]
    assert bool(unmasks) is secure_sum


def test_without_a_secure_sum_a_robust_rule_bears_a_liar_and_a_dropout(tmp_path: Path) -> None:
    document = brief(noise="local", secure_sum=False).model_dump()
    document["final"] |= {"aggregation": "median", "num_malicious_sites": 1}
    federation = Federation(tmp_path / "run", Plan.model_validate(document))
    liar = with_arrays(federation.site("site-3").identity, lambda arrays: arrays["segment-000000"].fill(127))  # + 2**31 or so
    federation.faults |= {"site-3": always(liar, "train"), "site-2": lost("train")}
    federation.run()
    found = rounds(tmp_path / "run")
    assert [found[key].value["dropped"] for key in ("final/1", "final/2")] == [{"site-2": "silent"}, {}]
    largest = max(float(np.abs(found[key].arrays["total"]).max()) for key in ("final/1", "final/2"))
    body = json.loads(str(value(tmp_path / "run", "ask/final/1")["body"]))
    assert largest < math.ldexp(0x7F7F7F7F, body["step_exp"]) / 100
    assert not bodies(federation, "unmask")


def test_without_a_secure_sum_below_the_minimum_nothing_is_used(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief(noise="local", secure_sum=False))
    federation.faults |= {"site-2": lost("train"), "site-4": lost("train")}
    with federation.stages() as stages:
        state = stages.start("pixels")
        assert trained(stages, 1, state) is state
    (entry,) = rounds(federation.run_dir).values()
    assert (entry.value["opened"], set(entry.value["dropped"])) == (False, {"site-2", "site-4"})


def test_a_site_that_requires_sums_refuses_a_plan_without_them(tmp_path: Path) -> None:
    def strict(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if not line.startswith("secure_sum_required")) + "\n"

    federation = Federation(tmp_path / "run", brief(noise="local", secure_sum=False), site_toml=strict)
    with pytest.raises(RefusedError, match=r"found 0: site-1 refused: secure sum: the plan sees single releases"):
        federation.run()
    assert not rounds(tmp_path / "run")


def test_an_alive_list_that_was_recorded_is_never_replaced(tmp_path: Path) -> None:
    """A listed site is gone at the resume: the round is given up, although the others would be enough for another list."""
    for last in ("site-1", "site-4"):  # nobody's answer was heard, or all but one that the sum needs
        run_dir = tmp_path / f"run-{last}"
        first = Federation(run_dir, brief())
        first.faults[last] = killed_at("query.unmask")
        with pytest.raises(ServerKilledError):
            first.run()
        second = Federation(run_dir, brief())
        second.unreached["site-2"] = lambda request: "final/1" in request.request_id or request.kind == "hello"
        second.run()
        found = rounds(run_dir)
        assert not found["final/1"].value["opened"]
        assert found["final/1"].value["dropped"] == {"site-2": "silent"}
        assert [found[key].value["opened"] for key in ("final/2", "evaluation/final/1")] == [True, True]
        lists = {alive for one in (first, second) for _, alive in unmask_lists(one, "final/1")}
        assert lists == {SITES}
        assert "audit" not in codes(second)
        assert len(bodies(second, "abort")) == 4  # of those that said hello
        kept = [site.ledger.rounds.find(f"{run_dir.name}/final/1") for site in second.sites if site.config.name != "site-2"]
        assert all(one is not None and one.progress.burnt for one in kept)


def test_an_abort_that_was_recorded_is_final(tmp_path: Path) -> None:
    first = Federation(tmp_path / "run", brief())
    for site in ("site-2", "site-4"):
        first.unreached[site] = first_only("unmask")
    for site in ("site-1", "site-2", "site-3", "site-4"):  # the abort reaches nobody but site 5
        lost_before = first.unreached.get(site, kind("abort"))
        first.unreached[site] = lambda request, before=lost_before: before(request) or kind("abort")(request)  # type: ignore[misc]
    first.faults["site-5"] = killed_at("query.abort")
    with pytest.raises(ServerKilledError):
        first.run()
    second = Federation(tmp_path / "run", brief())
    second.run()
    assert not rounds(tmp_path / "run")["final/1"].value["opened"]
    assert "audit" not in codes(second)


@pytest.fixture
def survivors_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Federation, list[int]]:
    """Twenty sites, and how many segments of uploads the server held at each one that it opened."""
    import weakref

    from urna.server import exchange

    alive: set[int] = set()
    most: list[int] = []

    def counted(*arguments: Any, **options: Any) -> tuple[Envelope, Head | None]:
        reply, head = unseal(*arguments, **options)
        segments = [array for name, array in reply.arrays.items() if name.startswith("segment-")]
        for array in segments:
            number = len(most) * 1000 + len(alive)
            alive.add(number)
            weakref.finalize(array, alive.discard, number)
        most.extend([len(alive)] if segments else [])
        return reply, head

    monkeypatch.setattr(exchange, "unseal", counted)
    document = brief().model_dump()
    document["federation"]["virtual"] |= {"num_sites": 20, "dirichlet_alpha": 10.0}
    document["federation"]["min_sites"] = 10
    return Federation(tmp_path / "run", Plan.model_validate(document), keeps_wire=False), most


def test_the_server_keeps_a_running_sum_and_no_replies(survivors_of_many: tuple[Federation, list[int]]) -> None:
    federation, most = survivors_of_many
    with federation.stages() as stages:
        trained(stages, 1)
    assert most == [1] * 20  # the one being added
    assert rounds(federation.run_dir)["final/1"].value["opened"]


def test_a_server_that_kept_replies_would_be_seen(
    survivors_of_many: tuple[Federation, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, most = survivors_of_many
    hoard: list[Upload] = []
    add = ServerRole.add

    def hoarding(role: ServerRole, site: str, upload: Upload) -> None:
        hoard.append(upload)
        add(role, site, upload)

    monkeypatch.setattr(ServerRole, "add", hoarding)
    with federation.stages() as stages:
        trained(stages, 1)
    assert most == list(range(1, 21))


# ---- liars and the silent, where a round is given up


def lying_about_its_list(federation: Federation, name: str) -> Fault:
    """Signs that it had answered a list that nobody asked about."""

    def fault(_route: str, reply: Envelope) -> Envelope:
        site = federation.site(name)
        kept = site.ledger.rounds.find("run/final/1")
        assert kept is not None
        statement = burnt_statement("run/final/1", kept.progress.context, "ab" * 32)
        answer = AnswerOfSite(alive_sha256="ab" * 32, signature=site.identity.sign("burnt", statement).hex())
        said = Burnt.model_validate_json(reply.body)
        return signed(site.identity, said.model_copy(update={"answer": answer}))

    return fault


def test_a_liar_in_an_abort_is_left_out_of_the_audit_and_stops_nobody(federation: Federation) -> None:
    """With its statement among the others', every honest site would see a split view in the next request."""
    refuse = once(refusing(federation.site("site-2").identity), "query.unmask")
    lie = once(lying_about_its_list(federation, "site-2"), "query.abort")
    federation.unreached["site-4"] = first_only("unmask")
    federation.faults["site-2"] = lambda route, reply: (lie if route == "query.abort" else refuse)(route, reply)
    federation.run()
    found = rounds(federation.run_dir)
    assert {key: entry.value["opened"] for key, entry in found.items()} == {
        "final/1": False,
        "final/2": True,
        "evaluation/final/1": True,
    }
    answers = value(federation.run_dir, "audit/final/1")["audit"]["answers"]  # type: ignore[index]
    assert set(answers) == set(SITES) - {"site-2"}
    assert codes(federation) == set()
    assert set(value(federation.run_dir, "statements")) == set(SITES)


def test_a_resumed_abort_counts_a_silent_member_as_one_that_was_shown_nothing(tmp_path: Path) -> None:
    """Site 5 answers round 1 and hears nothing of round 2, which is given up, before and after a crash."""
    first = Federation(tmp_path / "run", brief())
    first.unreached["site-5"] = lambda request: request.request_id == "run/final/2"
    first.unreached["site-2"] = lambda request: request.request_id == "run/final/2/unmask"
    first.faults["site-1"] = killed_at("query.abort")
    with pytest.raises(ServerKilledError):
        first.run()
    second = Federation(tmp_path / "run", brief())
    second.run()
    found = rounds(tmp_path / "run")
    assert {key: entry.value["opened"] for key, entry in found.items()} == {
        "final/1": True,
        "final/2": False,
        "evaluation/final/1": True,
    }
    assert found["evaluation/final/1"].value["dropped"] == {}
    assert codes(second) == set()
    assert not second.site("site-5").ledger.rounds.unaudited("run")
