"""Whole campaigns in memory that tune more than a head: site, server, report, model folder, predictions."""

import hashlib
import html
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.simulator import Federation, entries, small
from urna.client.work import batch_of
from urna.models import sizes
from urna.models.loading import load_backbone
from urna.models.prepared import logits, prepare
from urna.models.sizes import trained_size_of, try_trained_size
from urna.models.tunable import Tunable
from urna.protocol.errors import ModelError
from urna.protocol.plan import Plan
from urna.server.artefact import MODEL_DIR, load_model, write_model
from urna.server.model_config import TUNED_FILE
from urna.server.prose import plan_in_words
from urna.server.report_page import render
from urna.server.report_reading import read_report

prepared_module: Any = importlib.import_module("urna.models.prepared")


def a_plan(tuning: str, noise: str, names: tuple[str, ...], **final: object) -> Plan:
    document = small(noise=noise, names=names, num_rounds=3, num_curve_points=0).model_dump()
    document["final"] |= {"tuning": tuning, "lora_rank": 2} | final
    document["shortlist"]["max_noise_to_signal"] = 1000.0
    return Plan.model_validate(document)


CAMPAIGNS = {
    "lora-shared": a_plan("lora", "shared", ("vit", "cnn"), schedule="linear", warmup_fraction=0.3),
    "full-local": a_plan(
        "full", "local", ("cnn",), schedule="cosine", local_optimizer="adamw", local_learning_rate=1e-3, local_weight_decay=0.1
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(CAMPAIGNS))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    found = Federation(tmp_path_factory.mktemp("runs") / "run-1", CAMPAIGNS[request.param], keeps_wire=False)
    found.run()
    write_model(found.run_dir)
    return found


def trained_vector(federation: Federation) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    entry = next(entry for entry in entries(federation.run_dir) if entry.key == "model")
    return np.asarray(entry.arrays["vector"], np.float32)


def test_a_campaign_runs_to_its_end_within_its_budget(federation: Federation) -> None:
    report, final = read_report(federation.run_dir), federation.plan.final
    assert report.finished
    assert report.winner is not None
    assert len(report.epsilon_spent.sites) == len(federation.sites)
    assert report.epsilon_spent.max is not None
    assert report.epsilon_spent.max <= federation.plan.privacy.epsilon
    size = trained_size_of(report.winner, 10, final.tuning, final.lora_rank)
    trained = [one for one in report.left if "gradients" in one.what or "changes" in one.what]
    assert {one.numbers for one in trained if report.winner in one.what} == {size}
    assert size > (load_backbone(report.winner).spec.feature_dim + 1) * 10


def test_every_trained_tensor_was_moved(federation: Federation) -> None:
    """Noise reaches each number, so none that a sum forgets stays at its start."""
    assert (trained_vector(federation) == 0).sum() <= 3  # noise may come to 0 by chance


def test_the_model_folder_predicts_as_the_sites_counted(federation: Federation) -> None:
    """By another way: prepared as at a site, the vector loaded; the folder holds final weights."""
    model, final = load_model(federation.run_dir), federation.plan.final
    assert final.tuning != "head"
    prepared = prepare(load_backbone(model.config.candidate), 10, final.tuning, lora_rank=final.lora_rank)
    prepared.tunable.load(trained_vector(federation))
    records = federation.sites[0].bench(federation.sites[0].config.dataset[0]).records()
    expected = logits(prepared, batch_of(prepared.backbone, records, np.arange(len(records)), 0))
    labels, probabilities = model.predict(records.images)
    np.testing.assert_array_equal(labels, expected.argmax(axis=1))
    np.testing.assert_allclose(
        np.log(probabilities[:, 1:] / probabilities[:, :1]), expected[:, 1:] - expected[:, :1], atol=1e-3
    )


def test_the_model_folder_stands_alone(federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(federation.run_dir / MODEL_DIR, tmp_path / MODEL_DIR)
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "empty"))
    assert load_model(tmp_path).predict(np.zeros((2, 16, 16)))[1].shape == (2, 10)
    assert load_model(tmp_path).predict(np.zeros((0, 8, 8)))[1].shape == (0, 10)


def test_the_model_folder_names_every_trained_tensor(federation: Federation) -> None:
    folder, final = federation.run_dir / MODEL_DIR, federation.plan.final
    arrays = safetensors.numpy.load((folder / TUNED_FILE).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    assert sum(array.size for array in arrays.values()) == config["num_trained"] == trained_vector(federation).size
    assert {"head.weight", "head.bias"} < set(arrays)
    assert (config["format"], config["tuning"], config["share_trained"]) == ("urna-model-2", final.tuning, 1.0)
    card = (folder / "README.md").read_text()
    words = {"lora": "Low-rank factors (LoRA, rank 2)", "full": "Its weights and a linear head"}[final.tuning]
    assert words in card


def test_report_and_plan_say_the_mode_in_words(federation: Federation) -> None:
    words = {"lora": "low-rank factors", "full": "every weight"}[federation.plan.final.tuning]
    assert words in read_report(federation.run_dir).tuning
    assert words in render(read_report(federation.run_dir))
    assert words in plan_in_words(federation.plan)


def test_report_and_model_card_say_the_engine_of_the_operators_preflight(federation: Federation) -> None:
    report, final = read_report(federation.run_dir), federation.plan.final
    assert report.winner is not None
    assert final.tuning != "head"
    measured = try_trained_size(report.winner, 10, final.tuning, final.lora_rank)
    found = report.preparation
    assert found is not None
    assert (found.mode, found.numbers, found.engine) == (final.tuning, measured.size, measured.engine)
    assert (found.share_trained, found.notes, found.fallbacks) == (1.0, measured.notes, measured.fallbacks)
    words = f"Engine of per-example gradients: {measured.engine}, by the operator's preflight."
    assert words in html.unescape(render(report))
    card = (federation.run_dir / MODEL_DIR / "README.md").read_text()
    assert f"Engine of per-example gradients, by the operator's preflight: {measured.engine}" in card
    assert f"numbers to train by {measured.engine}" in plan_in_words(federation.plan)


def test_a_candidate_that_no_engine_serves_is_dropped_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, barred = prepared_module.choose, type(load_backbone("cnn").module)

    def choose(tunable: Tunable, *rest: object, **named: object) -> object:
        if isinstance(tunable.module.backbone, barred):
            raise ModelError("expected an engine, found none for this test")
        return real(tunable, *rest, **named)

    monkeypatch.setattr(prepared_module, "choose", choose)
    monkeypatch.setattr(sizes, "_measured", sizes._measured.__wrapped__)
    federation = Federation(
        tmp_path / "run-1", a_plan("full", "shared", ("cnn", "autoencoder"), num_rounds=1), keeps_wire=False
    )
    federation.run()
    report = read_report(federation.run_dir)
    dropped = next(one for one in report.ranking if one.name == "cnn")
    assert dropped.reasons[0] == "cannot be tuned (full): expected an engine, found none for this test"
    assert report.winner == "autoencoder"
    tuning = next(entry.value for entry in entries(federation.run_dir) if entry.key == "tuning")
    assert list(tuning["candidates"]) == ["autoencoder"]


def test_the_sites_log_says_how_the_model_was_prepared(federation: Federation) -> None:
    log = (federation.sites[0].folder / "site.log").read_text()
    assert "model_prepared" in log
    assert "engine " in log


def damaged(run_dir: Path, tmp_path: Path, **arrays: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Path:
    """A copy of a run's model with other trained tensors, config.json agreeing with them."""
    shutil.copytree(run_dir / MODEL_DIR, tmp_path / MODEL_DIR)
    path = tmp_path / MODEL_DIR / TUNED_FILE
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()) | arrays))
    config = json.loads((tmp_path / MODEL_DIR / "config.json").read_text())
    config["tuned_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / MODEL_DIR / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_trained_weights_of_other_names_shapes_or_numbers_are_refused(federation: Federation, tmp_path: Path) -> None:
    wrong = {
        "more": ({"body.more": np.zeros(3, np.float32)}, "must hold the .* float32 tensors of"),
        "shape": ({"head.bias": np.zeros(11, np.float32)}, "must hold the .* float32 tensors of"),
        "nan": ({"head.bias": np.full(10, np.nan, np.float32)}, "must be finite, found NaN"),
    }
    for name, (arrays, message) in wrong.items():
        with pytest.raises(ModelError, match=message):
            load_model(damaged(federation.run_dir, tmp_path / name, **arrays))


def test_altered_trained_weights_are_refused(federation: Federation, tmp_path: Path) -> None:
    shutil.copytree(federation.run_dir / MODEL_DIR, tmp_path / MODEL_DIR)
    path = tmp_path / MODEL_DIR / TUNED_FILE
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelError, match=r"tuned\.safetensors must have sha256"):
        load_model(tmp_path)


def test_a_candidate_that_the_mode_cannot_train_is_dropped_with_the_reason() -> None:
    words = plan_in_words(a_plan("lora", "shared", ("pixels", "cnn")))
    assert "dropped: cannot be tuned (lora): expected layers that LoRA can adapt, found none in Pixels" in words
