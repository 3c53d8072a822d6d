"""What a site computes with: features that are kept, models that are prepared once, vectors that are refused in time."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.client.clinic import CANARY, NUM_CLASSES, Clinic, a_plan
from urna.client.compute import Compute
from urna.client.work import FEATURES_DIR, Workbench, size_of
from urna.models import prepared as preparing
from urna.models.loading import Backbone, artefact_sha256
from urna.models.sizes import trained_size_of
from urna.privacy.counts import CountLayout
from urna.privacy.fixed_point import Grid
from urna.protocol.errors import FailureCode, ModelError
from urna.protocol.messages import AnyArray, AnyReply, EvaluateRequest, Failure
from urna.protocol.plan import Plan

MODELS = {name: artefact_sha256(name) for name in ("pixels", "autoencoder", "pca")}
MODES = pytest.mark.parametrize("tuning", ["lora", "full"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_plan_of(tuning: str, noise: str = "shared", **final: object) -> Plan:
    names = [{"name": name} for name in ("autoencoder", "pca")]
    return a_plan(candidates=names, privacy={"noise": noise}, final={"tuning": tuning, "lora_rank": 1} | final)


def code(reply: AnyReply) -> FailureCode | None:
    return reply.code if isinstance(reply, Failure) else None


def zeros(plan: Plan, candidate: str = "autoencoder") -> AnyArray:
    return np.zeros(size_of(candidate, plan), np.float32)


def a_bench(clinic: Clinic, **compute: object) -> Workbench:
    """As another process of the site would open it."""
    site = clinic.site
    return Workbench(clinic.folder, site.config.dataset[0], site.data_key, Compute.model_validate(compute), site.log)


def refused_step(*_: object) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    raise AssertionError("features were computed again")


def test_features_are_computed_once_for_all_processes_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic = Clinic.build(tmp_path / "site-1")
    first = a_bench(clinic)._both("pca", 0.2, MODELS)
    assert len(list((clinic.folder / FEATURES_DIR).iterdir())) == 2
    monkeypatch.setattr(Backbone, "features", refused_step)
    again = a_bench(clinic)._both("pca", 0.2, MODELS)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(AssertionError, match="computed again"):
        a_bench(clinic)._both("pca", 0.3, MODELS)  # another split has other records on each side


def test_kept_features_show_neither_records_nor_names(tmp_path: Path) -> None:
    clinic = Clinic.build(tmp_path / "site-1")
    features = a_bench(clinic)._both("pixels", 0.2, MODELS)[0]
    for path in (clinic.folder / FEATURES_DIR).iterdir():
        content = path.read_bytes()
        assert CANARY.encode() not in content
        assert features[0].tobytes() not in content


@MODES
@pytest.mark.parametrize("noise", ["shared", "local"])
def test_a_site_answers_a_round_of_every_mode(tmp_path: Path, tuning: str, noise: str) -> None:
    plan = a_plan_of(tuning, noise)
    clinic = Clinic.build(tmp_path / "site-1", plan)
    done = clinic.uploaded(clinic.train(candidate="autoencoder", vector=zeros(plan), step_exp=-20))
    numbers = clinic.opened(done) * Grid(-20, 3).step
    assert numbers.shape == (size_of("autoencoder", plan),)
    assert (numbers == 0).sum() <= 3  # each is noisy; one of them may come to 0 by chance


@MODES
def test_a_site_counts_with_the_tuned_model(tmp_path: Path, tuning: str) -> None:
    """A vector whose head always says class 2 is right where the label is 2, whatever the backbone gives."""
    plan = a_plan_of(tuning)
    clinic = Clinic.build(tmp_path / "site-1", plan)
    vector = zeros(plan)
    vector[-1] = 1000.0  # the bias of the last class: of all modes the head comes last
    envelope = clinic.evaluate(vector=vector, candidates=("autoencoder",), detail=False)
    bench, request = a_bench(clinic), clinic.read(envelope)
    assert isinstance(request, EvaluateRequest)
    rows = bench._count_rows(envelope, request, plan, MODELS)
    held = bench.split(plan.evaluation.holdout_fraction)[1]
    counts = CountLayout(1).decode(rows.sum(axis=0), 1e-9, len(held))
    assert counts.accuracy[0] == pytest.approx(float((held.labels == NUM_CLASSES - 1).mean()), abs=1e-6)


@MODES
@pytest.mark.parametrize("wrong", ["size", "head", "huge", "nan"])
def test_a_vector_of_another_mode_or_with_huge_numbers_is_refused_before_it_costs_anything(
    tmp_path: Path, tuning: str, wrong: str
) -> None:
    plan = a_plan_of(tuning)
    clinic = Clinic.build(tmp_path / "site-1", plan)
    vector = zeros(plan)
    head = np.zeros(trained_size_of("autoencoder", NUM_CLASSES, "head", 1), np.float32)
    bad = {"size": vector[:-1], "head": head, "huge": vector + np.float32(1e5), "nan": vector * np.float32(np.nan)}[wrong]
    assert code(clinic.ask(clinic.train(candidate="autoencoder", vector=bad))) == FailureCode.BAD_REQUEST
    assert not clinic.site.ledger.rows()


@MODES
def test_a_grid_too_coarse_for_the_rounding_of_a_sum_is_refused_before_it_costs_anything(tmp_path: Path, tuning: str) -> None:
    plan = a_plan_of(tuning)
    clinic = Clinic.build(tmp_path / "site-1", plan)
    step_exp = -int(np.log2(2 * np.sqrt(size_of("autoencoder", plan))))  # a clip of 1 is not more than 2 sqrt(p) units
    request = clinic.train(candidate="autoencoder", vector=zeros(plan), step_exp=step_exp)
    assert code(clinic.ask(request)) == FailureCode.BAD_REQUEST
    assert "too few for a sum of" in clinic.log()
    assert not clinic.site.ledger.rows()


def test_one_model_at_a_time_is_kept_prepared_and_the_log_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clinic, plan = Clinic.build(tmp_path / "site-1"), a_plan_of("lora")
    bench, asked, original = a_bench(clinic, micro_batch=3, device="cpu"), [], preparing.prepare

    def counted(backbone: Backbone, *rest: object, **named: object) -> object:
        asked.append((backbone.spec.name, named))
        return original(backbone, *rest, **named)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(preparing, "prepare", counted)
    for name in ("autoencoder", "autoencoder", "pca", "autoencoder"):
        ready = bench._prepare(name, plan, MODELS)
        assert ready.backbone.spec.name == name
        assert ready.prepared.parts.size == 3
    assert [name for name, _ in asked] == ["autoencoder", "pca", "autoencoder"]
    assert asked[0][1] == {"lora_rank": 1, "device": "cpu", "precision": "auto", "micro_batch": 3}
    logging.shutdown([])
    assert '"event": "model_prepared"' in clinic.log()
    assert "autoencoder for lora: engine " in clinic.log()


def test_a_mode_that_cannot_train_a_candidate_is_an_error_with_the_reason() -> None:
    with pytest.raises(ModelError, match="expected layers that LoRA can adapt, found none in Pixels"):
        trained_size_of("pixels", 3, "lora", 1)
