import csv
import hashlib
import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from PIL import Image

from urna.models.catalogue import spec
from urna.models.loading import artefact_sha256, load_backbone
from urna.models.pretrain import pretrain
from urna.models.tuning import normalise_for_head, predict_logits, trainable_size
from urna.protocol.errors import BadInputError, ModelError, RunError
from urna.protocol.plan import parse_plan
from urna.server.artefact import CONFIG_FILE, MODEL_DIR, load_model, write_model
from urna.server.inputs import read_images
from urna.server.journal import Journal, begin
from urna.server.model_config import HEAD_FILE

PLAN = """
name = "digits"
privacy = { epsilon = 3.0, delta = 1e-5 }
task = { num_classes = 10 }
federation = { min_sites = 4, num_records = 1797 }
final = { num_rounds = 3, sample_rate = 0.25, learning_rate = 0.05 }
candidates = [{ name = "cnn" }]
"""
FEATURES = spec("cnn").feature_dim
VECTOR = np.random.default_rng(0).normal(size=trainable_size(FEATURES, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose journal holds a model of the cnn, and its model folder; copy it before damaging it."""
    pretrain("cnn")
    run_dir = tmp_path_factory.mktemp("runs") / "run-7"
    begin(run_dir, parse_plan(PLAN), engine="memory")
    journal = Journal.open_for_writing(run_dir)
    journal.record("models", {"cnn": artefact_sha256("cnn")})
    journal.record("hello", {"members": {"site-1": {"num_records": 300, "urna_version": "0.1.0"}}, "others": {}})
    journal.record("decision", {"winner": "cnn", "by": "ballot", "undecided": False})
    journal.record("model", {"candidate": "cnn", "steps": 40}, {"vector": VECTOR})
    confusion = (np.eye(10) * 33.0).tolist()
    counts = {"num_records": 340.0, "accuracy": [0.955], "accuracy_stderr": [0.015], "confusion": confusion}
    journal.record("counts/final", counts | {"candidates": ["cnn"], "confusion_noise_std": 4.0})
    journal.record("statements", {"site-1": {"epsilon": 2.9, "epsilon_by_stage": {"final": 2.5}, "rows": [], "delta": 1e-5}})
    journal.record("finished", {"winner": "cnn"})
    journal.close()
    write_model(run_dir)
    return run_dir


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run-7")
    return tmp_path / "run-7"


def plant_head(run_dir: Path, content: bytes) -> None:
    """Replace the head as someone would who can write all of the folder: config.json agrees with the new bytes."""
    folder = run_dir / MODEL_DIR
    (folder / HEAD_FILE).write_bytes(content)
    change_config(run_dir, head_sha256=hashlib.sha256(content).hexdigest())


def change_config(run_dir: Path, **changes: object) -> None:
    path = run_dir / MODEL_DIR / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_model_folder_predicts_as_the_campaign_did(finished: Path) -> None:
    images = np.random.default_rng(1).random((20, 8, 8))
    features = normalise_for_head(load_backbone("cnn").features(images))
    logits = predict_logits(VECTOR, features)  # as client/evaluation.py counts
    labels, probabilities = load_model(finished).predict(images)
    np.testing.assert_array_equal(labels, logits.argmax(axis=1))
    np.testing.assert_allclose(np.log(probabilities[:, 1:] / probabilities[:, :1]), logits[:, 1:] - logits[:, :1], atol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_model_folder_stands_alone(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(mine / MODEL_DIR, tmp_path / "other" / MODEL_DIR)
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "empty"))
    assert load_model(tmp_path / "other").predict(np.zeros((2, 16, 16)))[1].shape == (2, 10)


def test_no_images_give_no_labels(finished: Path) -> None:
    labels, probabilities = load_model(finished).predict(np.zeros((0, 8, 8)))
    assert (labels.shape, probabilities.shape) == ((0,), (0, 10))


def test_the_model_is_written_the_same_again_and_leaves_nothing_behind(mine: Path) -> None:
    before = {path.name: path.read_bytes() for path in (mine / MODEL_DIR).iterdir()}
    (mine / MODEL_DIR / "stray").write_text("x")
    write_model(mine)
    assert {path.name: path.read_bytes() for path in (mine / MODEL_DIR).iterdir()} == before
    assert not [path for path in mine.iterdir() if path.name.startswith(".")]


def test_the_model_card_states_privacy_accuracy_and_limits(finished: Path) -> None:
    card = (finished / MODEL_DIR / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    fields = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in header.splitlines())}
    assert (fields["license"], fields["pipeline_tag"]) == ("apache-2.0", "image-classification")
    assert "differential-privacy" in fields["tags"]
    for words in (
        "Planned: epsilon 3 at delta 1e-05. Spent by the dearest site: epsilon 2.900",
        "Unit: one record of one site; add or remove.",
        "| accuracy | 95.5 % ± 1.5 |",
        "The sites were folders of one person",
        "| site-1 | 300 |",
        "load_model(Path",
    ):
        assert words in body


def test_the_model_card_of_a_plan_without_a_confusion_matrix_has_its_accuracy(tmp_path: Path) -> None:
    begin(tmp_path / "run-9", parse_plan(f"{PLAN}evaluation = {{ confusion = false }}\n"), engine="memory")
    journal = Journal.open_for_writing(tmp_path / "run-9")
    journal.record("models", {"cnn": artefact_sha256("cnn")})
    journal.record("model", {"candidate": "cnn", "steps": 40}, {"vector": VECTOR})
    counts = {"num_records": 340.0, "accuracy": [0.955], "accuracy_stderr": [0.015], "confusion": None}
    journal.record("counts/final", counts | {"candidates": ["cnn"], "confusion_noise_std": 4.0})
    journal.close()
    card = (write_model(tmp_path / "run-9") / "README.md").read_text()
    assert "| accuracy | 95.5 % ± 1.5 |" in card
    assert "macro F1" not in card


def test_a_run_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    begin(tmp_path / "run-8", parse_plan(PLAN), engine="memory")
    with pytest.raises(RunError, match="has no model yet, it is running or stopped at stage hello: wait, or `urna resume"):
        write_model(tmp_path / "run-8")
    with pytest.raises(RunError, match=r"found no config\.json: make it with `urna report"):
        load_model(tmp_path / "run-8")


def test_altered_head_refused(mine: Path) -> None:
    path = mine / MODEL_DIR / HEAD_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"weights of 'head' must have sha256 .* or make it with `urna report"):
        load_model(mine)


def test_altered_backbone_refused(mine: Path) -> None:
    path = mine / MODEL_DIR / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelError, match="weights of 'cnn' must have sha256"):
        load_model(mine)


def test_a_backbone_in_the_cache_that_the_sites_did_not_agree_on_is_not_packed(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "cache" / "models" / "cnn"
    other.mkdir(parents=True)
    tensors = safetensors.numpy.load((mine / MODEL_DIR / "backbone.safetensors").read_bytes())
    (other / "model.safetensors").write_bytes(safetensors.numpy.save(tensors | {"conv1.bias": tensors["conv1.bias"] + 1}))
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="weights of 'cnn' must have sha256"):
        write_model(mine)


def test_pickled_head_refused_without_opening(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = mine / "opened"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (trap.mkdir, ())

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"opened with {args} {kwargs}")

    content = pickle.dumps(Trap())
    for opener in ("torch.load", "pickle.load", "pickle.loads"):
        monkeypatch.setattr(opener, never)
    plant_head(mine, content)
    with pytest.raises(ModelError, match="must be safetensors, found a pickle; it was not opened"):
        load_model(mine)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight": np.zeros((10, FEATURES - 1), np.float32), "bias": np.zeros(10, np.float32)}, "the head must hold float32"),
        ({"weight": np.zeros((10, FEATURES), np.float64), "bias": np.zeros(10, np.float64)}, "the head must hold float32"),
        ({"weight": np.zeros((10, FEATURES), np.float32)}, "the head must hold float32"),
        ({"weight": np.full((10, FEATURES), np.nan, np.float32), "bias": np.zeros(10, np.float32)}, "must be finite"),
    ],
)
def test_a_head_of_other_shape_type_or_numbers_is_refused(
    mine: Path, head: dict[str, npt.NDArray[np.floating]], message: str
) -> None:
    plant_head(mine, safetensors.numpy.save(head))
    with pytest.raises(ModelError, match=message):
        load_model(mine)


def test_a_truncated_head_is_one_line(mine: Path) -> None:
    plant_head(mine, (mine / MODEL_DIR / HEAD_FILE).read_bytes()[:-8])
    with pytest.raises(ModelError, match="the head must be well-formed safetensors, found SafetensorError"):
        load_model(mine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate": "resnet"}, "urna-model-1 is of heads on built-in candidates"),
        ({"candidate": "../cnn"}, "must be the configuration of a model, found candidate"),
        ({"head_sha256": "no"}, "must be the configuration of a model, found head_sha256"),
        ({"format": "urna-model-3"}, "must be the configuration of a model, found format"),
        ({"extra": 1}, "must be the configuration of a model, found extra"),
        ({"head_feature_norm": 4.0}, "cnn must be .* in this version of urna"),
        ({"feature_dim": 10_000_000}, "cnn must be .* in this version of urna"),
    ],
)
def test_a_configuration_of_something_else_is_refused(mine: Path, changes: dict[str, object], message: str) -> None:
    change_config(mine, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(mine)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{" * 70_000])
def test_a_broken_configuration_is_one_line(mine: Path, content: bytes) -> None:
    (mine / MODEL_DIR / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ModelError, match=r"config.json must (be the configuration|have at most)") as caught:
        load_model(mine)
    assert "\n" not in str(caught.value)


# --- images


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_records_files_of_the_sites_can_be_labelled(tmp_path: Path) -> None:
    header = ["id", *(f"pixel_{at}" for at in range(4)), "label"]
    path = write_csv(tmp_path / "records.csv", header, [["a", 0, 4, 8, 16, 7], ["b", 16, 0, 0, 0, 1]])
    np.testing.assert_allclose(read_images(path, 16), np.array([[[0, 0.25], [0.5, 1]], [[1, 0], [0, 0]]]))


def test_a_csv_without_max_value_is_never_scaled_by_a_guess(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["p"], [[0.5]])
    assert read_images(path)[0, 0, 0] == 0.5
    path = write_csv(tmp_path / "b.csv", ["p"], [[16]])
    with pytest.raises(BadInputError, match="expected pixels of 0 to 1, found 16 to 16: give --max-value"):
        read_images(path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_of_any_size_is_read_as_grey(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (30, 30), "white").save(tmp_path / "white.png")
    images = read_images(tmp_path / "white.png")
    assert images.shape == (1, 30, 30)
    np.testing.assert_allclose(images, 1)


def test_a_file_with_a_header_alone_has_no_images(tmp_path: Path) -> None:
    assert read_images(write_csv(tmp_path / "a.csv", ["a", "b", "c", "d"], [])).shape == (0, 2, 2)


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes of PNG that announce a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(mode: str, size: tuple[int, int]) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, size).save(path, format="PNG")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "expected a CSV or PNG file at .*, found a folder"),
        (Path.exists, "expected a CSV or PNG file at .*, found nothing"),
        (lambda path: path.write_bytes(b""), "expected a header with a square number of pixel columns .* found 0"),
        (lambda path: path.write_text("id,label\n1,2\n"), "square number of pixel columns"),
        (lambda path: path.write_text("a,b,c\n1,2,3\n"), "square number of pixel columns .*, found 3"),
        (lambda path: path.write_text("0,1,0,1\n0,1,0,1\n"), "expected a header in the first line, found numbers"),
        (lambda path: path.write_text("a,b,c,d\n0,1,0,1\n0,1,0\n"), "line 3: expected 4 numbers"),
        (lambda path: path.write_text("a\nx\n"), "line 2: expected 1 numbers"),
        (lambda path: path.write_text("a\nnan\n"), "line 2: expected finite numbers"),
        (lambda path: path.write_text("a\n-1\n"), "expected pixels of 0 to 1, found -1 to -1"),
        (lambda path: path.write_text('a\n"0'), "expected a CSV in UTF-8 or a PNG, found Error"),
        (lambda path: path.write_text("a" * 200_000), "expected a CSV in UTF-8 or a PNG, found Error"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0 jpeg"), "expected a CSV in UTF-8 or a PNG, found UnicodeDecodeError"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n rest"), "expected a PNG image, found damage"),
        (lambda path: path.write_bytes(png_that_claims(8, 8)), "expected a PNG image, found damage"),
        (lambda path: path.write_bytes(png_that_claims(10_000, 10_000)), "found 10000 x 10000: crop it first"),
        (lambda path: path.write_bytes(png_that_claims(60_000, 60_000)), "expected a PNG image, found damage"),
        (saved("RGBA", (8, 8)), "expected 8-bit grey or RGB, found mode RGBA"),
        (saved("1", (8, 8)), "expected 8-bit grey or RGB, found mode 1"),
        (saved("L", (8, 9)), "expected a square of at most .*, found 8 x 9: crop it first"),
    ],
)
def test_bad_images_are_one_line(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "input"
    make(path)
    with pytest.raises(BadInputError, match=message) as caught:
        read_images(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_largest_grey_value_that_is_none_is_refused(tmp_path: Path, max_value: float) -> None:
    with pytest.raises(BadInputError, match="the largest grey value must be a number above 0"):
        read_images(tmp_path / "any", max_value)


def test_too_many_rows_are_refused_before_they_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urna.server.inputs.ROWS_LIMIT", 3)
    with pytest.raises(BadInputError, match="at most 3 rows are read at once"):
        read_images(write_csv(tmp_path / "a.csv", ["p"], [[0]] * 4))
    monkeypatch.setattr("urna.server.inputs.INPUT_LIMIT_BYTES", 5)
    with pytest.raises(BadInputError, match="must have at most 5 bytes"):
        read_images(tmp_path / "a.csv")
