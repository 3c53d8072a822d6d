"""Files of records to label, for `urna predict`: images as CSV or PNG, texts as CSV, JSON lines or plain text.

Covered:
    * files are limited in bytes, rows, pixels and characters before they are decoded; a bad one is one line, never a traceback.
"""

import csv
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from urna.protocol.errors import BadInputError

INPUT_LIMIT_BYTES = 64 * 2**20
ROWS_LIMIT = 100_000
PIXELS_LIMIT = 2**24  # of one image
CHARACTERS_LIMIT = 1_000_000  # of one text
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NO_PIXELS = ("id", "label")  # columns of a records file that are not looked at

Images = npt.NDArray[np.float64]  # (n, h, w), or (n, 3, h, w) where coloured, in [0, 1]


# --- images


def read_images(path: Path, max_value: float | None = None, *, any_shape: bool = False) -> Images:
    """Read images to label: a CSV of pixels, a row each, or one 8-bit PNG (grey or RGB).

    Args:
        path: a CSV has a header; its columns ``id`` and ``label`` are ignored, all others are pixels, row by row, square.
        max_value: what counts as white; None is 255 for PNG and 1 for CSV. It is never guessed from the images, so that a
            record's label does not depend on its company.
        any_shape: for models that resize whole pictures: a PNG may be of any shape, and its colours are kept.

    Raises:
        BadInputError: there is no such file, it is too large, or not as described.
    """
    if max_value is not None and not (math.isfinite(max_value) and max_value > 0):
        raise BadInputError(f"the largest grey value must be a number above 0, found {max_value:g}: change --max-value")
    _check_file(path, "a CSV or PNG")
    try:
        with path.open("rb") as file:
            is_png = file.read(len(PNG_MAGIC)) == PNG_MAGIC
    except OSError as error:
        raise BadInputError(f"{path} must be readable, found {error.strerror}: give this user access to it") from None
    pixels = _read_png(path, any_shape=any_shape) if is_png else _read_csv(path)
    return _scaled(pixels, max_value or (255.0 if is_png else 1.0), path)


def _check_file(path: Path, kinds: str) -> None:
    if not path.is_file():
        raise BadInputError(f"expected {kinds} file at {path}, found {'a folder' if path.is_dir() else 'nothing'}")
    size = path.stat().st_size
    if size > INPUT_LIMIT_BYTES:
        raise BadInputError(f"{path} must have at most {INPUT_LIMIT_BYTES} bytes, found {size}: split it")


def _scaled(images: Images, max_value: float, path: Path) -> Images:
    # written so that NaN fails too
    if images.size and not (images.min() >= 0 and images.max() <= max_value):
        found = f"{images.min():g} to {images.max():g}"
        raise BadInputError(f"{path}: expected pixels of 0 to {max_value:g}, found {found}: give --max-value")
    return images / max_value


def _read_png(path: Path, *, any_shape: bool) -> Images:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(path, formats=["PNG"]) as image:
                width, height = image.size
                if image.mode not in ("L", "RGB"):
                    raise BadInputError(f"{path}: expected 8-bit grey or RGB, found mode {image.mode}: convert it first")
                if (width != height and not any_shape) or width * height > PIXELS_LIMIT:
                    shape = "an image" if any_shape else "a square"
                    raise BadInputError(
                        f"{path}: expected {shape} of at most {PIXELS_LIMIT} pixels, found {width} x {height}: crop it first"
                    )
                if any_shape:
                    return np.asarray(image.convert("RGB"), dtype=np.float64).transpose(2, 0, 1)[None]  # (1, 3, h, w)
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


# --- texts


def read_texts(path: Path, column: str = "text") -> tuple[str, ...]:
    """Read texts to label, by the file's name: ``.csv`` with a header, ``.jsonl`` (an object a line), else one text a line.

    Args:
        path: in UTF-8.
        column: which column of a CSV, or key of an object, holds the text.

    Raises:
        BadInputError: there is no such file, it is too large, or not as described.
    """
    _check_file(path, "a text, CSV or JSON lines")
    read = {".csv": _csv_texts, ".jsonl": _json_texts}.get(path.suffix.lower(), _plain_texts)
    texts: list[str] = []
    try:
        for number, text in read(path, column):
            if len(texts) == ROWS_LIMIT:
                raise BadInputError(f"{path}: at most {ROWS_LIMIT} texts are read at once: split it")
            if len(text) > CHARACTERS_LIMIT:
                raise BadInputError(
                    f"{path}, line {number}: a text has at most {CHARACTERS_LIMIT} characters, found {len(text)}: cut it"
                )
            texts.append(text)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise BadInputError(f"{path}: expected texts in UTF-8, found {type(error).__name__}: convert it") from None
    return tuple(texts)


def _csv_texts(path: Path, column: str) -> Iterator[tuple[int, str]]:
    before = csv.field_size_limit(4 * CHARACTERS_LIMIT)  # of the process; longer texts are refused by their line
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if column not in header:
                raise BadInputError(
                    f"{path}: expected a column {column!r} in the first line, found none: name it with --column"
                )
            for row in reader:
                if len(row) != len(header):
                    raise BadInputError(
                        f"{path}, line {reader.line_num}: expected {len(header)} fields, found {len(row)}: mend it"
                    )
                yield reader.line_num, row[header.index(column)]
    finally:
        csv.field_size_limit(before)


def _json_texts(path: Path, column: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise BadInputError(f"{path}, line {number}: expected a JSON object, found something else: mend it") from None
            text = value.get(column) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise BadInputError(f"{path}, line {number}: expected a text under {column!r}, found none: name its key")
            yield number, text


def _plain_texts(path: Path, _column: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from enumerate((line.rstrip("\r\n") for line in file), start=1)
