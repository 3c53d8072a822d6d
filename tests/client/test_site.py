"""What the site answers, to whom, in which order it acts, and what it never says."""

import base64
import importlib
import logging.handlers
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.client.clinic import CANARY, CANDIDATES, NAME, NUM_RECORDS, Clinic, a_head, a_plan, a_signer, write_config
from urna.client.ledger import Ledger
from urna.client.policy import admit_release
from urna.client.site import Site, failure_code, open_site
from urna.client.vault import create_keys
from urna.models.catalogue import cache_root
from urna.models.loading import WEIGHTS_FILE, Backbone, artefact_sha256, load_backbone
from urna.privacy.accounting import epsilon_of, gaussian, subsampled_gaussian
from urna.protocol.errors import FailureCode, LedgerError, ModelError, ProtocolError, SiteConfigError
from urna.protocol.identity import Identity
from urna.protocol.messages import (
    AnyReply,
    BallotRequest,
    Envelope,
    Failure,
    Masked,
    Member,
    Refusal,
    Statement,
    open_reply,
    signed,
)
from urna.protocol.plan import Plan

site_module: Any = importlib.import_module("urna.client.site")  # for what they import, to be spied on
work_module: Any = importlib.import_module("urna.client.work")


def code(reply: AnyReply) -> FailureCode:
    assert isinstance(reply, Failure), reply
    return reply.code


def refused(reply: AnyReply) -> str:
    assert isinstance(reply, Refusal), reply
    return "; ".join(reply.reasons)


def same(reply: Envelope) -> tuple[str, bytes, bytes, dict[str, bytes]]:
    """All bytes of a reply, in an order that safetensors does not choose."""
    return reply.sender, reply.body, reply.signature, {name: array.tobytes() for name, array in reply.arrays.items()}


def num_releases(clinic: Clinic) -> int:
    return sum(row.count for row in clinic.site.ledger.rows())


# ---- who is heard


def test_an_unsigned_request_is_not_read(clinic: Clinic) -> None:
    request = clinic.hello_request()
    unsigned = Envelope(request.sender, request.body, bytes(64), request.arrays)
    assert code(clinic.ask(unsigned)) == FailureCode.BAD_REQUEST
    assert "expected a message signed by operator" in clinic.log()


def test_another_operator_is_not_heard(clinic: Clinic) -> None:
    clinic.operator = a_signer("operator")
    assert code(clinic.ask(clinic.hello_request())) == FailureCode.BAD_REQUEST


def test_a_member_site_is_no_operator(clinic: Clinic) -> None:
    clinic.operator = clinic.peers[0]
    assert code(clinic.ask(clinic.hello_request())) == FailureCode.BAD_REQUEST
    assert "expected a message of operator, found one of 'site-2'" in clinic.log()


@pytest.mark.parametrize("what", ["body", "array"])
def test_an_altered_request_is_not_read(clinic: Clinic, what: str) -> None:
    good = clinic.train()
    body = good.body.replace(b'"noise_multiplier":10.0', b'"noise_multiplier":0.10') if what == "body" else good.body
    arrays = {"vector": good.arrays["vector"] + np.float32(what == "array")}
    assert code(clinic.ask(Envelope(good.sender, body, good.signature, arrays))) == FailureCode.BAD_REQUEST
    assert num_releases(clinic) == 0


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b'{"kind":"pickle"}', b"[" * 10_000])
def test_a_body_that_is_no_request_is_answered_with_a_code(clinic: Clinic, body: bytes) -> None:
    good = signed(clinic.operator, clinic.hello_request_model())
    signature = clinic.operator.sign("message", len(body).to_bytes(8, "big") + body)
    assert code(clinic.ask(Envelope(good.sender, body, signature))) == FailureCode.BAD_REQUEST


def test_a_reply_names_its_request_and_is_signed_by_the_site(clinic: Clinic) -> None:
    request, other = clinic.ballot(), clinic.ballot("ballot/2")
    reply = clinic.site.handle(request)
    with pytest.raises(ProtocolError, match="found one to another request"):
        open_reply(reply, clinic.site.roster, NAME, other)


# ---- hello


def test_a_site_joins_with_a_signed_round_key_and_its_declared_size(clinic: Clinic) -> None:
    member = clinic.hello().member
    member.check(clinic.site.roster, clinic.campaign)
    assert member.num_records == NUM_RECORDS


def test_the_declared_size_is_said_and_not_the_true_one(clinic: Clinic) -> None:
    lines = (clinic.folder / "records.csv").read_text().splitlines()
    (clinic.folder / "records.csv").write_text("\n".join(lines[:-7]) + "\n")
    assert clinic.hello().member.num_records == NUM_RECORDS


def test_hello_repeated_gives_the_same_bytes_also_after_a_restart(clinic: Clinic) -> None:
    request = clinic.hello_request()
    first = same(clinic.site.handle(request))
    assert same(clinic.site.handle(request)) == first
    assert same(clinic.reopened().site.handle(request)) == first


def test_the_same_campaign_cannot_be_opened_with_other_content(clinic: Clinic) -> None:
    clinic.hello()
    clinic.plan = a_plan(privacy={"epsilon": 2.0})
    assert code(clinic.ask(clinic.hello_request())) == FailureCode.REPLAY_CHANGED
    assert "known here with another opening request" in clinic.log()


def test_every_reason_of_policy_and_installation_is_given_at_once(clinic: Clinic) -> None:
    clinic.plan = a_plan(
        privacy={"epsilon": 5.0, "max_colluding_sites": 0}, federation={"min_sites": 2}, task={"num_classes": 7}
    )
    found = refused(clinic.ask(clinic.hello_request(models={})))
    for reason in (
        "budget: the plan asks epsilon 5",
        "cohort:",
        "task: this site has no records of images of 7 classes",
        "model pixels",
    ):
        assert reason in found
    assert clinic.site.ledger.campaign(clinic.campaign) is None


def test_a_missing_model_is_refused_at_hello_with_its_name(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = clinic.hello_request()
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "empty"))
    assert refused(clinic.ask(request)) == "; ".join(
        f"model {one}: {site_module.NOT_INSTALLED}" for one in ("pixels", "autoencoder")
    )


def test_other_weights_than_the_operator_pinned_are_refused(clinic: Clinic) -> None:
    models = {"pixels": "0" * 64, "autoencoder": "0" * 64}
    assert "model pixels: other weights are installed here" in refused(clinic.ask(clinic.hello_request(models=models)))


def test_other_weights_than_the_plan_pins_are_refused(clinic: Clinic) -> None:
    clinic.plan = a_plan(candidates=[{"name": "pixels", "sha256": "0" * 64}, {"name": "autoencoder"}])
    assert refused(clinic.ask(clinic.hello_request())) == (
        "model pixels: other weights are installed here than the operator pinned"
    )


def test_a_plan_and_another_plans_hash_are_refused(clinic: Clinic) -> None:
    assert code(clinic.ask(clinic.hello_request(plan_sha256="0" * 64))) == FailureCode.BAD_REQUEST


def test_a_record_cannot_change_sides_between_campaigns(clinic: Clinic) -> None:
    """Tuning and held-out budgets compose in parallel only while no record is in both."""
    assert isinstance(clinic.ask(clinic.ballot()), Masked)
    write_config(clinic.folder, holdout_fraction=0.5)
    second = clinic.reopened()
    second.campaign, second.own, second.plan = "run-2", None, a_plan(evaluation={"holdout_fraction": 0.5})
    assert "holdout: the plan holds out 0.5 of the records, this site's releases 0.2" in refused(
        second.ask(second.hello_request())
    )


def test_the_split_is_the_sites_to_choose(clinic: Clinic) -> None:
    """Or the first operator, with a release that costs nothing, would shut all others out for ever."""
    clinic.plan = a_plan(evaluation={"holdout_fraction": 0.05})
    assert refused(clinic.ask(clinic.hello_request())) == "holdout: the plan holds out 0.05, this site 0.2"


def test_a_record_cannot_change_sides_between_campaigns_that_opened_together(clinic: Clinic) -> None:
    clinic.hello()
    write_config(clinic.folder, holdout_fraction=0.5)  # the site changed its mind: too late once anything was released
    second = clinic.reopened()
    second.campaign, second.own, second.plan = "run-2", None, a_plan(evaluation={"holdout_fraction": 0.5})
    second.hello()
    assert isinstance(clinic.ask(clinic.ballot()), Masked)
    assert "holdout: the plan holds out 0.5" in refused(second.ask(second.evaluate()))
    assert num_releases(clinic) == 1


# ---- what a request must be


def test_a_campaign_that_was_never_opened_is_unknown(clinic: Clinic) -> None:
    clinic.hello()
    clinic.campaign = "run-2"
    assert code(clinic.ask(clinic.ballot())) == FailureCode.BAD_REQUEST
    assert "campaign run-2 was never opened here" in clinic.log()


def test_a_request_of_another_plan_is_refused(clinic: Clinic) -> None:
    assert code(clinic.ask(clinic.ballot(plan_sha256="0" * 64))) == FailureCode.BAD_REQUEST
    assert "was opened with another plan" in clinic.log()


def without_this_site(clinic: Clinic) -> tuple[Member, ...]:
    third = a_signer("site-4")
    clinic.site.roster.sites["site-4"] = third.public_key_hex
    extra = Member.create(third, clinic.campaign, "ab" * 32, NUM_RECORDS)
    return (*clinic.cohort()[1:], extra)


def with_an_unknown_site(clinic: Clinic) -> tuple[Member, ...]:
    return (*clinic.cohort(), Member.create(a_signer("site-9"), clinic.campaign, "ab" * 32, NUM_RECORDS))


def with_a_forged_signature(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, third = clinic.cohort()
    return (mine, other, third.model_copy(update={"signature": other.signature}))


def with_a_swapped_key(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, third = clinic.cohort()
    return (mine, other, third.model_copy(update={"public_key": "ab" * 32}))


def with_a_raised_size(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, third = clinic.cohort()
    return (mine, other, third.model_copy(update={"num_records": 1}))


def with_another_campaigns_member(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, _ = clinic.cohort()
    return (mine, other, Member.create(clinic.peers[1], "run-0", "ab" * 32, NUM_RECORDS))


def with_a_duplicate(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, _ = clinic.cohort()
    return (mine, other, other)


def with_one_key_twice(clinic: Clinic) -> tuple[Member, ...]:
    mine, other, _ = clinic.cohort()
    return (mine, other, Member.create(clinic.peers[1], clinic.campaign, other.public_key, NUM_RECORDS))


def below_the_minimum(clinic: Clinic) -> tuple[Member, ...]:
    return clinic.cohort()[:2]


def of_this_site_alone(clinic: Clinic) -> tuple[Member, ...]:
    return clinic.cohort()[:1]


def with_another_key_of_this_site(clinic: Clinic) -> tuple[Member, ...]:
    mine = Member.create(clinic.site.identity, clinic.campaign, "ab" * 32, NUM_RECORDS)
    return (mine, *clinic.cohort()[1:])


COHORTS: list[Callable[[Clinic], tuple[Member, ...]]] = [
    without_this_site,
    with_an_unknown_site,
    with_a_forged_signature,
    with_a_swapped_key,
    with_a_raised_size,
    with_another_campaigns_member,
    with_a_duplicate,
    with_one_key_twice,
    below_the_minimum,
    of_this_site_alone,
    with_another_key_of_this_site,
]


@pytest.mark.parametrize("cohort", COHORTS, ids=lambda one: one.__name__)
def test_a_wrong_cohort_is_refused_before_it_costs_anything(
    clinic: Clinic, cohort: Callable[[Clinic], tuple[Member, ...]]
) -> None:
    clinic.hello()
    assert code(clinic.ask(clinic.ballot(cohort=cohort(clinic)))) == FailureCode.BAD_REQUEST
    assert num_releases(clinic) == 0


def test_a_cohort_below_the_sites_own_minimum_is_refused_whatever_the_plan(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = Clinic.build(tmp_path / "site-1", min_cohort=3)
    clinic.plan = a_plan(federation={"min_sites": 3})
    clinic.hello()
    clinic.site = Site(**{**vars(clinic.site), "config": clinic.site.config.model_copy(deep=True)})
    raised = clinic.site.config.policy.model_copy(update={"min_cohort": 4})
    clinic.site.config = clinic.site.config.model_copy(update={"policy": raised})
    assert code(clinic.ask(clinic.ballot())) == FailureCode.BAD_REQUEST
    assert "expected a cohort of at least 4 sites, found 3" in clinic.log()


HEADS = {
    "too short": a_head("pixels")[:-1],
    "too long": np.zeros(a_head("pixels").size + 1, np.float32),
    "of another shape": a_head("pixels")[None],
    "of another type": np.zeros(a_head("pixels").size, np.uint64),
    "of a type that never travels": np.zeros(a_head("pixels").size, np.float64),
    "NaN": np.full_like(a_head("pixels"), np.nan),
    "infinite": np.full_like(a_head("pixels"), -np.inf),
    "so large that one record's gradient overflows": np.full_like(a_head("pixels"), 1e38),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_a_wrong_head_is_refused_before_it_costs_anything(clinic: Clinic, head: str, work: str) -> None:
    request = clinic.train(vector=HEADS[head]) if work == "train" else clinic.evaluate(vector=HEADS[head])
    assert code(clinic.ask(request)) == FailureCode.BAD_REQUEST
    assert num_releases(clinic) == 0
    reasons = ("expected a float32 head (195,) in array 'vector", "expected a head of numbers", "expected arrays of float32 or")
    assert [reason for reason in reasons if reason in clinic.log()]


def test_a_missing_head_is_refused(clinic: Clinic) -> None:
    request = clinic.train()
    assert code(clinic.ask(signed(clinic.operator, clinic.read(request), {}))) == FailureCode.BAD_REQUEST


def test_a_hello_with_hashes_of_more_than_the_plans_candidates_is_refused(clinic: Clinic) -> None:
    """The policy allows the plan's candidates; a hello that lists more hashes must not add to them."""
    clinic.plan = a_plan(candidates=[{"name": "pixels"}])
    models = {one: artefact_sha256(one) for one in ("pixels", "autoencoder")}
    assert code(clinic.ask(clinic.hello_request(models=models))) == FailureCode.BAD_REQUEST
    assert clinic.site.ledger.campaign(clinic.campaign) is None


@pytest.mark.parametrize("request_id", ["run-2/ballot/1", "run-1", "run-10/ballot/1", "ballot/1"])
def test_a_request_id_of_another_campaign_is_refused(clinic: Clinic, request_id: str) -> None:
    """A ledger that holds several campaigns, and their receipts, would be mixed up."""
    request = clinic.read(clinic.ballot()).model_copy(update={"request_id": request_id})
    assert code(clinic.ask(clinic.sealed(request))) == FailureCode.BAD_REQUEST
    assert num_releases(clinic) == 0


def test_a_candidate_outside_the_plan_is_refused(clinic: Clinic) -> None:
    clinic.plan = a_plan(candidates=[{"name": "pixels"}])
    clinic.hello()
    requests = [clinic.ballot(), clinic.train(candidate="autoencoder", vector=a_head("autoencoder"))]
    requests.append(clinic.evaluate(candidates=("autoencoder",), vector=a_head("autoencoder")))
    for request in requests:
        assert code(clinic.ask(request)) == FailureCode.BAD_REQUEST
    assert clinic.log().count("expected candidates of the plan, found autoencoder") == 3
    assert num_releases(clinic) == 0


@pytest.mark.parametrize("stage", ["runoff", "final"])
@pytest.mark.parametrize("noise", ["shared", "local"])
def test_a_round_after_the_plans_last_is_refused_before_it_costs_anything(clinic: Clinic, stage: str, noise: str) -> None:
    """By a linear schedule its rate would be zero, then negative: gradient ascent at every site."""
    final = {"num_rounds": 4, "schedule": "linear", "local_steps": 2 if noise == "local" else 1}
    clinic.plan = a_plan(privacy={"noise": noise}, runoff={"num_rounds": 2}, final=final)
    last = {"runoff": 2, "final": 4}[stage]
    for index in (last + 1, 2 * last, 10_000):
        assert code(clinic.ask(clinic.train(f"{stage}/{index}", stage=stage, index=index))) == FailureCode.BAD_REQUEST
    assert clinic.log().count(f"expected {stage} round {last} or an earlier one, found ") == 3
    assert num_releases(clinic) == 0
    assert isinstance(clinic.ask(clinic.train(f"{stage}/{last}", stage=stage, index=last)), Masked)


# ---- reserve, do, settle


class Spy:
    """Writes down the order of what a site does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for owner, name in [
            (Ledger, "reserve"),
            (Ledger, "settle"),
            (work_module, "split"),
            (work_module, "noisy_sum"),
            (work_module.training, "shared_step"),
            (site_module.SecureRounds, "upload"),
            (site_module.SecureRounds, "keep"),
        ]:
            monkeypatch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            result = real(*args, **kwargs)
            if name in ("reserve", "settle"):
                assert isinstance(args[0], Ledger)
                assert args[0]._db.in_transaction
            return result

        return call


WORK: dict[str, tuple[str, Callable[[Clinic], Envelope]]] = {
    "ballot": ("noisy_sum", lambda clinic: clinic.ballot()),
    "train": ("shared_step", lambda clinic: clinic.train()),
    "evaluate": ("noisy_sum", lambda clinic: clinic.evaluate()),
}


@pytest.mark.parametrize("work", WORK)
def test_release_follows_reservation(clinic: Clinic, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    compute, make = WORK[work]
    request, spy = make(clinic), Spy(monkeypatch)
    assert isinstance(clinic.ask(request), Masked)
    assert spy.calls == ["reserve", "split", compute, "upload", "settle", "keep"]


def test_the_reservation_is_on_disk_when_records_are_first_worked_with(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were read before, to know whose budget it is: by their keyed hashes."""
    request, real, seen = clinic.ballot(), work_module.split, []

    def load(*args: Any) -> Any:
        seen.append(sum(row.count for row in clinic.reopened().site.ledger.rows()))
        return real(*args)

    monkeypatch.setattr(work_module, "split", load)
    clinic.ask(request)
    assert seen == [1]


@pytest.mark.parametrize("work", WORK)
def test_resend_same_bytes_spends_once(clinic: Clinic, work: str) -> None:
    request = WORK[work][1](clinic)
    first = same(clinic.site.handle(request))
    assert same(clinic.site.handle(request)) == first
    assert same(clinic.reopened().site.handle(request)) == first
    assert num_releases(clinic) == 1


@pytest.fixture
def own_cache(clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The clinic's artefacts, to be damaged."""
    clinic.hello()
    for name in CANDIDATES:
        shutil.copytree(cache_root() / name, tmp_path / "cache" / "models" / name)
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "cache"))
    return cache_root()


@pytest.mark.parametrize("damage", ["other bytes", "no file"])
@pytest.mark.parametrize("work", WORK)
def test_damaged_weights_behind_a_good_manifest_spend_nothing(
    clinic: Clinic, own_cache: Path, monkeypatch: pytest.MonkeyPatch, work: str, damage: str
) -> None:
    request, weights = WORK[work][1](clinic), own_cache / "pixels" / WEIGHTS_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\1\0") if damage == "other bytes" else weights.unlink()
    spy = Spy(monkeypatch)
    for _ in range(2):
        assert code(clinic.ask(request)) == FailureCode.MODEL
    assert "as the hello pinned it" not in clinic.log()  # the manifest is as it was
    assert spy.calls == []
    assert num_releases(clinic) == 0
    weights.write_bytes(whole)  # the very same request is answered once they are whole again
    assert isinstance(clinic.ask(request), Masked)
    assert num_releases(clinic) == 1


@pytest.mark.parametrize("work", WORK)
def test_a_release_that_was_answered_needs_no_weights_to_be_repeated(clinic: Clinic, own_cache: Path, work: str) -> None:
    request = WORK[work][1](clinic)
    first = same(clinic.site.handle(request))
    for name in CANDIDATES:
        shutil.rmtree(own_cache / name)
    assert same(clinic.reopened().site.handle(request)) == first


@pytest.mark.parametrize("work", ["train", "evaluate"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_candidate_that_no_engine_serves_spends_nothing(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, tuning: str, work: str
) -> None:
    """The preflight comes before the reservation."""
    clinic.plan = a_plan(final={"tuning": tuning, "lora_rank": 1})
    vector = np.zeros(work_module.size_of("autoencoder", clinic.plan), np.float32)
    if work == "train":
        request = clinic.train(candidate="autoencoder", vector=vector, step_exp=-20)
    else:
        request = clinic.evaluate(candidates=("autoencoder",), vector=vector)
    prepared, spy = importlib.import_module("urna.models.prepared"), Spy(monkeypatch)

    def none_passes(*_: object, **__: object) -> None:
        raise ModelError(f"expected an engine, found none for {CANARY}")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "choose", none_passes)
        assert code(clinic.ask(request)) == FailureCode.MODEL
    assert spy.calls == []
    assert num_releases(clinic) == 0
    assert f"found none for {CANARY}" in clinic.log()
    assert isinstance(clinic.ask(request), Masked)
    assert num_releases(clinic) == 1


def test_what_the_policy_refuses_is_not_prepared(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for more than is left makes no site load models."""
    request, loaded = clinic.ballot(noise_multiplier=0.5), []
    monkeypatch.setattr(work_module.Workbench, "ready", lambda *_: loaded.append(1))
    assert refused(clinic.ask(request)).startswith("budget: ")
    assert loaded == []


def test_replay_with_changed_content_refused(clinic: Clinic) -> None:
    clinic.ask(clinic.ballot())
    assert code(clinic.ask(clinic.ballot(noise_multiplier=11.0))) == FailureCode.REPLAY_CHANGED
    assert "request run-1/ballot/1 is known here with other content: refused" in clinic.log()
    assert num_releases(clinic) == 1


def test_two_rounds_of_one_content_are_masked_and_noised_apart(clinic: Clinic) -> None:
    replies = [clinic.site.handle(clinic.ballot(f"ballot/{attempt}")).arrays["segment-000000"] for attempt in (1, 2)]
    assert not np.array_equal(replies[0], replies[1])


@pytest.mark.parametrize("step", ["split", "noisy_sum", "upload", "settle", "keep", "note"])
def test_a_crash_after_the_reservation_is_counted_and_answered_under_it(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    request = clinic.ballot()
    secure = site_module.SecureRounds
    owner: Any = {"upload": secure, "keep": secure, "note": secure, "settle": Ledger}.get(step, work_module)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        with pytest.raises(KeyboardInterrupt):
            clinic.site.handle(request)
    clinic.site.ledger.close()
    again = clinic.reopened()
    assert num_releases(again) == 1
    assert isinstance(again.ask(request), Masked)
    assert num_releases(again) == 1


def test_a_second_process_on_one_folder_answers_the_same_bytes(clinic: Clinic) -> None:
    other = clinic.reopened()
    request = clinic.ballot()
    assert same(other.site.handle(request)) == same(clinic.site.handle(request))
    assert num_releases(other) == 1


def test_of_two_processes_that_answer_at_once_one_is_heard(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    request, other, real = clinic.ballot(), clinic.reopened(), work_module.noisy_sum
    first: list[Envelope] = []

    def compute(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(work_module, "noisy_sum", real)
        first.append(other.site.handle(request))
        return real(*args, **kwargs)

    monkeypatch.setattr(work_module, "noisy_sum", compute)
    assert isinstance(clinic.ask(request), Failure)  # its own bytes differ, so they must not leave
    assert same(clinic.site.handle(request)) == same(first[0])
    assert num_releases(clinic) == 1


def test_two_processes_cannot_spend_the_same_last_epsilon(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    other = clinic.reopened()
    one, two = (clinic.ballot(f"ballot/{n}", noise_multiplier=1.6) for n in (1, 2))  # each fits, both do not
    other.site.ledger.timeout_seconds = 0.0

    calls: list[object] = []

    def admit(*args: Any) -> Any:
        calls.append(args)
        verdict = admit_release(*args)
        if len(calls) == 2:  # the first time is only to have it accounted
            monkeypatch.setattr(site_module, "admit_release", admit_release)
            assert code(other.ask(two)) == FailureCode.LEDGER
        return verdict

    monkeypatch.setattr(site_module, "admit_release", admit)
    assert isinstance(clinic.ask(one), Masked)
    assert "budget" in refused(other.ask(two))
    assert num_releases(clinic) == 1


# ---- what it costs


def test_a_release_over_the_budget_is_refused_before_anything_is_computed(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, spy = clinic.ballot(noise_multiplier=0.5), Spy(monkeypatch)
    assert refused(clinic.ask(request)).startswith("budget: this stage would bring the campaign to epsilon ")
    assert spy.calls == []
    assert num_releases(clinic) == 0


def test_a_stage_that_would_not_end_is_refused_at_its_first_request(clinic: Clinic) -> None:
    assert "budget" in refused(clinic.ask(clinic.ballot(noise_multiplier=0.8, planned_count=2)))
    assert num_releases(clinic) == 0


def test_a_stage_of_more_releases_than_the_plan_can_need_is_refused(clinic: Clinic) -> None:
    assert code(clinic.ask(clinic.ballot(planned_count=100_000))) == FailureCode.BAD_REQUEST
    assert "planned releases, found 100000" in clinic.log()
    assert num_releases(clinic) == 0


def test_a_refused_release_can_be_asked_again_with_more_noise(clinic: Clinic) -> None:
    assert isinstance(clinic.ask(clinic.ballot(noise_multiplier=0.5)), Refusal)
    assert isinstance(clinic.ask(clinic.ballot(noise_multiplier=10.0)), Masked)


def test_two_campaigns_share_one_budget(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = Clinic.build(tmp_path / "site-1", epsilon_total=3.0)
    second = clinic.reopened()
    second.campaign = "run-2"
    clinic.hello()
    second.hello()
    assert isinstance(clinic.ask(clinic.ballot(noise_multiplier=1.6)), Masked)
    assert "asks more than these records have left over all campaigns" in refused(
        second.ask(second.ballot(noise_multiplier=1.6))
    )


def test_the_statement_is_the_ledgers_and_of_this_campaign_only(clinic: Clinic) -> None:
    second = clinic.reopened()
    second.campaign = "run-2"
    second.ask(second.ballot())
    clinic.ask(clinic.ballot())
    clinic.ask(clinic.train())
    clinic.ask(clinic.evaluate())
    statement = clinic.ask(clinic.close())
    assert isinstance(statement, Statement)
    event = gaussian(10.0)
    step = subsampled_gaussian(0.5, 10.0)
    assert [(row.stage, row.partition, row.event, row.count) for row in statement.rows] == [
        ("ballot", "tuning", event, 1),
        ("final", "tuning", step, 1),
        ("evaluation", "heldout", event, 1),
    ]
    assert statement.epsilon == max(epsilon_of([event, step], 1e-5), epsilon_of([event], 1e-5))
    assert statement.epsilon_by_stage["final"] == epsilon_of([step], 1e-5)


def test_local_noise_is_charged_for_every_step(clinic: Clinic) -> None:
    clinic.plan = a_plan(privacy={"noise": "local"}, final={"local_steps": 5})
    assert isinstance(clinic.ask(clinic.train(noise_multiplier=10.0)), Masked)
    assert [row.count for row in clinic.site.ledger.rows()] == [5]


# ---- what leaves


@pytest.mark.parametrize("work", WORK)
def test_an_upload_leaves_and_backbones_stay_as_they_were(clinic: Clinic, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    loaded: list[Backbone] = []

    def load(name: str, expected_sha256: str) -> Backbone:
        loaded.append(load_backbone(name, expected_sha256))
        return loaded[-1]

    monkeypatch.setattr(work_module, "load_backbone", load)
    reply = clinic.site.handle(WORK[work][1](clinic))
    sizes = {name: (str(array.dtype), array.shape) for name, array in reply.arrays.items()}
    assert sizes == {
        "segment-000000": ("uint8", (4 * {"ballot": 2, "train": 195, "evaluate": 1 + 1 + 9}[work],)),
        "scalars": ("uint64", (0,)),
        "shares": ("uint8", (3, 3, 32)),  # for each of three holders: of the self seed and of two edge seeds
        "checks": ("uint8", (3, 16)),
    }
    assert loaded
    for backbone in loaded:
        fresh = load_backbone(backbone.spec.name, backbone.sha256)
        state, expected = backbone.module.state_dict(), fresh.module.state_dict()
        assert all((state[key] == expected[key]).all() for key in expected)
        assert not backbone.module.training
        assert (backbone.feature_mean == fresh.feature_mean).all()


def test_a_site_without_records_answers_in_the_same_format(clinic: Clinic) -> None:
    header = (clinic.folder / "records.csv").read_text().splitlines()[0]
    sizes = {work: clinic.site.handle(make(clinic)).arrays["segment-000000"].shape for work, (_, make) in WORK.items()}
    (clinic.folder / "records.csv").write_text(header + "\n")
    empty = clinic.reopened()
    for work, (_, make) in WORK.items():
        request = clinic.sealed(
            clinic.read(make(empty)).model_copy(update={"request_id": f"run-1/again/{work}"}), dict(make(empty).arrays)
        )
        assert empty.site.handle(request).arrays["segment-000000"].shape == sizes[work]


STEPS: list[tuple[str, str]] = [
    ("open_request", "hello"),
    ("admit_plan", "hello"),
    ("is_intact", "hello"),
    ("Ledger.campaign", "hello"),
    ("Ledger.join", "hello"),
    ("Ledger.rows", "hello"),
    ("Member.create", "hello"),
    ("Ledger.campaign", "ballot"),
    ("Ledger.find", "ballot"),
    ("check_cohort", "ballot"),
    ("described", "ballot"),
    ("admit_release", "ballot"),
    ("Ledger.exclusive", "ballot"),
    ("Ledger.reserve", "ballot"),
    ("load_records", "again"),
    ("sketch_of", "again"),
    ("Ledger.register", "ballot"),
    ("missing_peers", "ballot"),
    ("split", "ballot"),
    ("buckets", "ballot"),
    ("load_backbone", "ballot"),
    ("Backbone.features", "ballot"),
    ("ballot.votes", "ballot"),
    ("noisy_sum", "ballot"),
    ("Grid.to_ring", "ballot"),
    ("context_of", "ballot"),
    ("SecureRounds.check_audits", "ballot"),
    ("SecureRounds.upload", "ballot"),
    ("Ledger.settle", "ballot"),
    ("SecureRounds.keep", "ballot"),
    ("SecureRounds.note", "ballot"),
    ("SecureRounds.unmask", "unmask"),
    ("SecureRounds.burn", "abort"),
    ("SecureRounds.check_audits", "close"),
    ("check_head", "train"),
    ("normalise_for_head", "train"),
    ("training.shared_step", "train"),
    ("evaluation.count_rows", "evaluate"),
    ("epsilon_of_rows", "close"),
]


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, KeyError, OSError, ModelError, SiteConfigError, LedgerError, ZeroDivisionError]
)
def test_every_error_has_a_code_of_the_closed_set(error: type[Exception]) -> None:
    assert failure_code(error(CANARY)) in FailureCode


@pytest.mark.parametrize(("step", "work"), STEPS, ids=["-".join(one) for one in STEPS])
def test_exception_text_never_leaves(clinic: Clinic, monkeypatch: pytest.MonkeyPatch, step: str, work: str) -> None:
    owner_name, _, name = step.rpartition(".")
    modules: dict[str, Any] = vars(work_module) | vars(site_module) | {"Backbone": Backbone}
    owner = modules[owner_name] if owner_name else site_module if name in vars(site_module) else work_module
    requests: dict[str, Callable[[Clinic], Envelope]] = {
        "hello": lambda clinic: clinic.hello_request(),
        "again": lambda clinic: clinic.ballot(),
        "close": lambda clinic: clinic.close(),
        "unmask": lambda clinic: clinic.unmask(f"{clinic.campaign}/ballot/1"),
        "abort": lambda clinic: clinic.abort(f"{clinic.campaign}/ballot/1"),
    } | {name: make for name, (_, make) in WORK.items()}
    if work in ("close", "unmask", "abort"):
        clinic.ask(clinic.ballot())
    request = requests[work](clinic)
    if work == "again":  # in a process that has not read the records yet
        clinic = clinic.reopened()
    for error in (ValueError, ProtocolError, KeyError):

        def fail(*_: Any, error: type[Exception] = error, **__: Any) -> None:
            raise error(f"{CANARY}-secret of Jane Doe")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            reply = clinic.site.handle(request)
        assert isinstance(open_reply(reply, clinic.site.roster, NAME, request), Failure)
        assert CANARY.encode() not in reply.to_bytes()
        assert b"Jane" not in reply.to_bytes()
    assert f"{CANARY}-secret of Jane Doe" in clinic.log()


def test_a_broken_records_file_is_a_code_and_its_values_stay_out_of_the_log_too(clinic: Clinic) -> None:
    with (clinic.folder / "records.csv").open("a") as file:
        file.write(f"{CANARY},1,broken\n")
    clinic.site = clinic.reopened().site
    request = clinic.hello_request()
    reply = clinic.site.handle(request)
    assert code(open_reply(reply, clinic.site.roster, NAME, request)) == FailureCode.DATA
    assert CANARY not in clinic.log()
    assert "row 62: expected 66 fields, found 3" in clinic.log()


def test_the_local_log_is_readable_by_its_owner_alone(clinic: Clinic) -> None:
    assert (clinic.folder / "site.log").stat().st_mode & 0o777 == 0o600


def test_the_local_log_does_not_reach_other_loggers(clinic: Clinic) -> None:
    seen = logging.handlers.BufferingHandler(1000)
    logging.getLogger().addHandler(seen)
    try:
        clinic.ask(Envelope("operator", b"", b""))
    finally:
        logging.getLogger().removeHandler(seen)
    assert [record for record in seen.buffer if record.name.startswith("urna.site")] == []
    assert "request_failed" in clinic.log()


def test_ledger_has_no_record_values(clinic: Clinic) -> None:
    for _, make in WORK.values():
        clinic.ask(make(clinic))
    records = clinic.site.bench(clinic.site.config.dataset[0]).records()
    content = (clinic.folder / "ledger.sqlite").read_bytes()
    forms: Iterator[bytes] = (
        form
        for one in (CANARY.encode(), clinic.site.data_key, records.images[0].tobytes(), records.labels[:16].tobytes())
        for form in (one, base64.b64encode(one)[:-4], one.hex().encode())
    )
    assert not [form for form in forms if form in content]
    assert b"GaussianDpEvent" in content


# ---- the folder


def test_a_lost_data_key_is_never_made_again(clinic: Clinic) -> None:
    (clinic.folder / "data.key").unlink()
    with pytest.raises(SiteConfigError, match="restore it, a new one moves records"):
        open_site(clinic.folder)


def test_a_lost_ledger_keeps_the_site_closed(clinic: Clinic) -> None:
    (clinic.folder / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="a lost ledger is not a new budget"):
        open_site(clinic.folder)


def test_keys_are_made_once(tmp_path: Path) -> None:
    create_keys(tmp_path, NAME)
    with pytest.raises(SiteConfigError, match="an identity is made once"):
        create_keys(tmp_path, NAME)


@pytest.mark.parametrize(
    ("line", "message"),
    [("epsilon_totl = 8.0", r"unknown key policy.epsilon_totl: did you mean epsilon_total\?"), ("[policy", "syntax error")],
)
def test_a_wrong_site_toml_is_explained(clinic: Clinic, line: str, message: str) -> None:
    with (clinic.folder / "site.toml").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SiteConfigError, match=message):
        open_site(clinic.folder)


def test_requests_are_what_the_helper_says(clinic: Clinic) -> None:
    """The clinic's own requests are well formed, so that a refusal above has the reason it names."""
    for _, make in WORK.values():
        assert isinstance(clinic.ask(make(clinic)), Masked)
    assert isinstance(clinic.read(clinic.ballot()), BallotRequest)
    assert isinstance(clinic.operator, Identity)
    assert isinstance(clinic.plan, Plan)
