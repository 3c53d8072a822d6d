"""A run's model as a folder that stands alone: weights, configuration, model card; and how to use it.

    model/backbone.safetensors   the pinned pretrained weights, as they were
    model/head.safetensors       weight (num_classes, feature_dim), bias (num_classes,): what the sites trained
    model/config.json            what both are, and their hashes
    model/README.md              the model card

Covered:
    * the folder is replaced as a whole; the backbone's bytes are those that the sites agreed on, by hash;
    * weights are read once, as safetensors only, and refused unless hash, names, shapes and numbers are as declared;
    * images are limited in bytes, rows and pixels before they are decoded; a bad one is one line, never a traceback.
Not covered:
    * someone who can write config.json too: its hashes find damage, not an attacker; `urna report` makes the folder anew.
"""

import csv
import hashlib
import json
import math
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

import urna
from urna.models.catalogue import spec
from urna.protocol.errors import BadInputError, ModelError, RunError
from urna.protocol.messages import Sha256
from urna.protocol.plan import Name
from urna.server.journal import Journal
from urna.server.report import Report
from urna.server.report_page import decision_in_words
from urna.server.report_reading import read_report

if TYPE_CHECKING:
    from urna.models.loading import Backbone

MODEL_DIR = "model"
BACKBONE_FILE, HEAD_FILE, CONFIG_FILE, CARD_FILE = "backbone.safetensors", "head.safetensors", "config.json", "README.md"
CONFIG_LIMIT_BYTES = 2**16
INPUT_LIMIT_BYTES = 64 * 2**20
ROWS_LIMIT = 100_000
PIXELS_LIMIT = 2**24  # of one image
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NO_PIXELS = ("id", "label")  # columns of a records file that are not looked at

Images = npt.NDArray[np.float64]  # (n, h, w) in [0, 1]


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """config.json: which files belong together, and what they mean."""

    format: Literal["urna-model-1"] = "urna-model-1"
    candidate: Name
    architecture: str
    architecture_config: dict[str, int]
    tuning: Literal["head"] = "head"
    num_classes: Annotated[int, Field(ge=2, le=1000)]
    input_shape: tuple[int, int, int]  # channels, height, width after the adapter, values 0 to 1
    feature_dim: Annotated[int, Field(ge=1)]
    feature_centring: Literal["backbone.safetensors: (feature - feature_mean) * feature_scale"] = (
        "backbone.safetensors: (feature - feature_mean) * feature_scale"
    )
    head_feature_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # to which centred features are scaled, row by row
    backbone_sha256: Sha256
    head_sha256: Sha256
    plan_sha256: Sha256
    run_id: str
    urna_version: str


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A backbone and the head that was trained on it."""

    config: ModelConfig
    backbone: "Backbone"
    vector: npt.NDArray[np.float32]

    def predict(self, images: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Label images.

        Args:
            images: (n, h, h) in [0, 1], of any size; n may be 0.

        Returns:
            labels (n,) and probabilities (n, num_classes).

        Raises:
            ModelError: the images are not what the model reads.
        """
        from urna.models.tuning import normalise_for_head, predict_logits

        logits = predict_logits(self.vector, normalise_for_head(self.backbone.features(images))).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return logits.argmax(axis=1).astype(np.int64), odds / odds.sum(axis=1, keepdims=True)


def write_model(run_dir: Path) -> Path:
    """Make the model folder of a run, or make it again.

    Returns:
        The folder.

    Raises:
        RunError: there is no journal, or no model in it yet.
        ModelError: the pretrained backbone is missing, or not the one that the sites agreed on.
    """
    from urna.models.loading import WEIGHTS_FILE, cache_root, read_pinned

    report = read_report(run_dir)
    name, vector = _trained(run_dir, report.state)
    pinned = report.models[name]
    num_classes = int(report.plan["task"]["num_classes"])
    contents = {
        BACKBONE_FILE: read_pinned(name, cache_root() / name / WEIGHTS_FILE, pinned),
        HEAD_FILE: _head_bytes(name, vector, num_classes),
    }
    config = _config(report, name, num_classes, pinned, hashlib.sha256(contents[HEAD_FILE]).hexdigest())
    contents[CONFIG_FILE] = config.model_dump_json(indent=2).encode() + b"\n"
    contents[CARD_FILE] = model_card(report, config).encode()
    _replace_folder(run_dir / MODEL_DIR, contents)
    return run_dir / MODEL_DIR


def load_model(run_dir: Path) -> TrainedModel:
    """Load the model folder of a run; the folder is all it needs.

    Raises:
        RunError: there is no model folder, or a file of it is missing.
        ModelError: a file is not what config.json says, or config.json is none of this version.
    """
    from urna.models.loading import load_backbone_file, read_pinned

    folder = run_dir / MODEL_DIR
    again = f"make it with `urna report {run_dir}`"
    for name in (CONFIG_FILE, BACKBONE_FILE, HEAD_FILE):
        if not (folder / name).is_file():
            raise RunError(f"expected a model at {folder}, found no {name}: {again}")
    try:
        config = _read_config(folder / CONFIG_FILE)
        backbone = load_backbone_file(config.candidate, folder / BACKBONE_FILE, config.backbone_sha256)
        head = _read_head(read_pinned("head", folder / HEAD_FILE, config.head_sha256), config)
    except ModelError as error:
        raise ModelError(f"{error}; or {again}") from None
    return TrainedModel(config, backbone, head)


def _trained(run_dir: Path, state: str) -> tuple[str, npt.NDArray[np.float32]]:
    with closing(Journal.read(run_dir)) as journal:
        entry = journal.find("model")
    if entry is None:
        raise RunError(f"{run_dir} has no model yet, it is {state}: wait, or `urna resume {run_dir}`")
    return str(entry.value["candidate"]), np.asarray(entry.arrays["vector"], dtype=np.float32)


def _head_bytes(name: str, vector: npt.NDArray[np.float32], num_classes: int) -> bytes:
    from safetensors.numpy import save

    from urna.models.tuning import head_from_vector

    head = head_from_vector(vector, spec(name).feature_dim, num_classes)
    arrays = {"weight": head.weight.detach().numpy(), "bias": head.bias.detach().numpy()}
    return bytes(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))


def _config(report: Report, name: str, num_classes: int, backbone_sha256: str, head_sha256: str) -> ModelConfig:
    from urna.models.tuning import HEAD_FEATURE_NORM
    from urna.models.vision import ARCHITECTURES

    architecture, settings = ARCHITECTURES[name]
    return ModelConfig(
        candidate=name,
        architecture=architecture.__name__,
        architecture_config=dict(settings),
        num_classes=num_classes,
        input_shape=spec(name).input_shape,
        feature_dim=spec(name).feature_dim,
        head_feature_norm=HEAD_FEATURE_NORM,
        backbone_sha256=backbone_sha256,
        head_sha256=head_sha256,
        plan_sha256=report.plan_sha256,
        run_id=report.run_id,
        urna_version=urna.__version__,
    )


def _replace_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Write a folder beside its place, then swap it in; a crash leaves the old one, the new one or none, never a mixture."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        for name, content in contents.items():
            (fresh / name).write_bytes(content)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)


def _read_config(path: Path) -> ModelConfig:
    """Read config.json and check that this installation means the same by it.

    Raises:
        ModelError: it does not.
    """
    size = path.stat().st_size
    if size > CONFIG_LIMIT_BYTES:
        raise ModelError(f"{path} must have at most {CONFIG_LIMIT_BYTES} bytes, found {size}: restore it")
    try:
        config = ModelConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:3])
        raise ModelError(f"{path} must be the configuration of a model, found {wrong}: restore it") from None
    from urna.models.tuning import HEAD_FEATURE_NORM
    from urna.models.vision import ARCHITECTURES

    facts = spec(config.candidate)
    architecture, settings = ARCHITECTURES[config.candidate]
    here = (architecture.__name__, dict(settings), facts.feature_dim, facts.input_shape, HEAD_FEATURE_NORM)
    declared = (
        config.architecture,
        config.architecture_config,
        config.feature_dim,
        config.input_shape,
        config.head_feature_norm,
    )
    if here != declared:
        raise ModelError(
            f"{config.candidate} must be {here} in this version of urna, found {declared} in {path}: "
            f"use urna {config.urna_version[:20]}"
        )
    return config


def _read_head(content: bytes, config: ModelConfig) -> npt.NDArray[np.float32]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from urna.models.tuning import head_from_vector

    wanted = {"weight": (config.num_classes, config.feature_dim), "bias": (config.num_classes,)}
    try:
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the head must be well-formed safetensors, found {type(error).__name__}: restore it") from None
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted or any(array.dtype != np.float32 for array in arrays.values()):
        raise ModelError(f"the head must hold float32 {wanted}, found {found}: restore it")
    vector = np.concatenate([arrays["weight"].ravel(), arrays["bias"]])
    head_from_vector(vector, config.feature_dim, config.num_classes)  # refuses numbers that are not finite
    return vector


# --- the model card


def model_card(report: Report, config: ModelConfig) -> str:
    """The model card, as Hugging Face reads it: a YAML header (every value is JSON, which is YAML too), then Markdown."""
    facts = spec(config.candidate)
    header = {
        "license": facts.licence.lower(),
        "library_name": "urna",
        "pipeline_tag": "image-classification",
        "tags": ["differential-privacy", "federated-learning", "secure-aggregation", "urna"],
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    sections = [
        (
            f"# {config.candidate}, fine-tuned by the sites of plan {_plain(report.plan['name'])}",
            _about_model(report, config),
        ),
        ("## How it was chosen", " ".join(_plain(sentence) for sentence in decision_in_words(report))),
        ("## Data", _about_data(report)),
        ("## Privacy", _about_privacy(report)),
        ("## Accuracy", _about_accuracy(report)),
        ("## Limits", "\n".join(f"- {_plain(line)}" for line in report.limits)),
        ("## How to use it", _how_to_use()),
        ("## Provenance", _provenance(config)),
    ]
    return f"---\n{yaml}\n---\n\n" + "\n\n".join(f"{title}\n\n{text}" for title, text in sections) + "\n"


def _about_model(report: Report, config: ModelConfig) -> str:
    facts = spec(config.candidate)
    return (
        f"{facts.summary} Pretrained on {facts.pretrained_on}; frozen. A linear head of {config.num_classes} classes "
        f"on its {config.feature_dim} features was trained by {len(report.sites)} sites that did not pool their records."
    )


def _about_data(report: Report) -> str:
    sites = "\n".join(f"| {_plain(site)} | {size} |" for site, size in report.sites.items())
    held = report.plan["evaluation"]["holdout_fraction"]
    return (
        "Sizes are what the sites declared; nothing else about their records is known here.\n\n"
        f"| site | records |\n|---|---:|\n{sites}\n\n"
        f"{held:.0%} of each site's records, chosen by a keyed hash, never trained and measured the accuracy."
    )


def _about_privacy(report: Report) -> str:
    spent = report.epsilon_spent.max
    cost = f"epsilon {spent:.3f}, by the sites' own statements" if spent is not None else "not stated by the sites yet"
    missing = (
        f" No statement came from {', '.join(map(_plain, report.epsilon_spent.missing))}."
        if report.epsilon_spent.missing
        else ""
    )
    return (
        f"(epsilon, delta) differential privacy. Planned: epsilon {report.epsilon_planned:g} at delta {report.delta:g}. "
        f"Spent by the dearest site: {cost}.{missing}\n"
        f"Unit: {report.unit_of_privacy}. Choice, training and evaluation are all in it.\n"
        f"Noise is {report.noise.kind}: {report.noise.meaning}."
    )


def _about_accuracy(report: Report) -> str:
    if report.accuracy is None or report.accuracy_stderr is None:
        return "Not measured: the run is unfinished, or its final counts were lost."
    assert report.macro_f1 is not None
    assert report.macro_f1_stderr is not None
    assert report.baseline_majority_accuracy is not None
    rows = [
        ("accuracy", f"{100 * report.accuracy:.1f} % ± {100 * report.accuracy_stderr:.1f}"),
        ("macro F1", f"{100 * report.macro_f1:.1f} % ± {100 * report.macro_f1_stderr:.1f}"),
        ("always the largest class", f"{100 * report.baseline_majority_accuracy:.1f} %"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    note = "On held-out records of all sites; ± is one standard error, of sampling and privacy noise."
    return f"{note}\n\n| | |\n|---|---:|\n{table}"


def _how_to_use() -> str:
    return """\
    urna predict RUN --input FILE

or, with this folder at RUN/model:

    from pathlib import Path
    from urna.server.artefact import load_model, read_images

    model = load_model(Path("RUN"))
    labels, probabilities = model.predict(read_images(Path("digits.csv"), max_value=16))

Images are square and grey, 0 to 1, of any size (they are averaged down to 8 x 8), with the polarity of the training records
(for the bundled digits: bright strokes on a dark ground)."""


def _provenance(config: ModelConfig) -> str:
    rows = [
        ("run", _plain(config.run_id)),
        ("plan sha256", config.plan_sha256),
        ("backbone sha256", config.backbone_sha256),
        ("head sha256", config.head_sha256),
        ("urna", config.urna_version),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | `{value}` |" for name, value in rows)


def _plain(text: object) -> str:
    """A text of elsewhere as one line without Markdown or HTML of its own."""
    return "".join(" " if one in "\r\n" else one for one in str(text) if one not in "`|<>[]*\\")


# --- images


def read_images(path: Path, max_value: float | None = None) -> Images:
    """Read images to label: a CSV of pixels, a row each, or one 8-bit PNG (grey or RGB).

    Args:
        path: a CSV has a header; its columns ``id`` and ``label`` are ignored, all others are pixels, row by row, square.
        max_value: what counts as white; None is 255 for PNG and 1 for CSV. It is never guessed from the images, so that a
            record's label does not depend on its company.

    Raises:
        BadInputError: there is no such file, it is too large, or not as described.
    """
    if max_value is not None and not (math.isfinite(max_value) and max_value > 0):
        raise BadInputError(f"the largest grey value must be a number above 0, found {max_value:g}: change --max-value")
    if not path.is_file():
        raise BadInputError(f"expected a CSV or PNG file at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    size = path.stat().st_size
    if size > INPUT_LIMIT_BYTES:
        raise BadInputError(f"{path} must have at most {INPUT_LIMIT_BYTES} bytes, found {size}: split it")
    try:
        with path.open("rb") as file:
            is_png = file.read(len(PNG_MAGIC)) == PNG_MAGIC
    except OSError as error:
        raise BadInputError(f"{path} must be readable, found {error.strerror}: give this user access to it") from None
    return _scaled(_read_png(path) if is_png else _read_csv(path), max_value or (255.0 if is_png else 1.0), path)


def _scaled(images: Images, max_value: float, path: Path) -> Images:
    # written so that NaN fails too
    if images.size and not (images.min() >= 0 and images.max() <= max_value):
        found = f"{images.min():g} to {images.max():g}"
        raise BadInputError(f"{path}: expected pixels of 0 to {max_value:g}, found {found}: give --max-value")
    return images / max_value


def _read_png(path: Path) -> Images:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(path, formats=["PNG"]) as image:
                width, height = image.size
                if image.mode not in ("L", "RGB"):
                    raise BadInputError(f"{path}: expected 8-bit grey or RGB, found mode {image.mode}: convert it first")
                if width != height or width * height > PIXELS_LIMIT:
                    raise BadInputError(
                        f"{path}: expected a square of at most {PIXELS_LIMIT} pixels, found {width} x {height}: crop it first"
                    )
                return np.asarray(image.convert("L"), dtype=np.float64)[None]  # (1, h, w)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadInputError(f"{path}: expected a PNG image, found damage ({type(error).__name__}): save it again") from None


def _read_csv(path: Path) -> Images:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            pixels = _pixel_columns(next(reader, []), path)
            rows: list[list[float]] = []
            for number, row in enumerate(reader, start=2):
                if len(rows) == ROWS_LIMIT:
                    raise BadInputError(f"{path}: at most {ROWS_LIMIT} rows are read at once: split it")
                rows.append(_row(row, pixels, number, path))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: expected a CSV in UTF-8 or a PNG, found {type(error).__name__}: convert it") from None
    side = math.isqrt(len(pixels))
    return np.array(rows, dtype=np.float64).reshape(len(rows), side, side)


def _pixel_columns(header: Sequence[str], path: Path) -> list[int]:
    pixels = [at for at, name in enumerate(header) if name.strip().lower() not in NO_PIXELS]
    if not pixels or math.isqrt(len(pixels)) ** 2 != len(pixels):
        raise BadInputError(
            f"{path}: expected a header with a square number of pixel columns (64 for 8 x 8), found {len(pixels)}: "
            "columns besides id and label must be pixels"
        )
    if all(_is_number(header[at]) for at in pixels):
        raise BadInputError(f"{path}: expected a header in the first line, found numbers: add column names")
    return pixels


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _row(row: Sequence[str], pixels: Sequence[int], number: int, path: Path) -> list[float]:
    try:
        values = [float(row[at]) for at in pixels]
    except (ValueError, IndexError):
        raise BadInputError(f"{path}, line {number}: expected {len(pixels)} numbers, found something else: mend it") from None
    if not all(map(math.isfinite, values)):
        raise BadInputError(f"{path}, line {number}: expected finite numbers, found NaN or infinity: mend it")
    return values
