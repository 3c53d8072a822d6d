"""Local records -> arrays, by constants that the site declares; nothing is fitted to the records.

Covered:
    * a records file that leaves the site's folder (absolute, "..", or through a symbolic link) is refused;
    * limits on bytes and rows; wrong columns, types, ranges, labels and repeated ids are refused before anything is used;
    * tuning and held-out records are split by a keyed hash of the record's id and the plan's fraction; the site answers no
      two fractions for ever (`site.py`), so no request can move a record over;
    * error texts give row numbers, never values.
Not covered (yet):
    * other formats than CSV, several rows of one person, de-identification.
"""

import csv
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import Fraction, Section

RECORDS_LIMIT_BYTES = 2_000_000_000
ROWS_LIMIT = 5_000_000


class DataConfig(Section):
    """``[data]`` in site.toml: where the records are and what they look like, as public constants."""

    path: str  # relative to the site's folder
    num_records: Annotated[int, Field(ge=1)]  # declared: public, may be rounded; the true count shapes nothing
    id_column: str = "id"
    label_column: str = "label"
    num_classes: Annotated[int, Field(ge=2, le=1000)]
    image_height: Annotated[int, Field(ge=1, le=4096)]
    image_width: Annotated[int, Field(ge=1, le=4096)]
    max_value: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # pixels are 0 ... max_value, and scaled to 0 ... 1


@dataclass(frozen=True)
class Records:
    """n records: ids, images (n, h, w) float32 in [0, 1], labels (n,) int64."""

    ids: tuple[str, ...]
    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def take(self, chosen: npt.NDArray[np.bool_]) -> "Records":
        """The chosen records, in order."""
        ids = tuple(one for one, keep in zip(self.ids, chosen, strict=True) if keep)
        return Records(ids, self.images[chosen], self.labels[chosen])


def load_records(folder: Path, config: DataConfig) -> Records:
    """Read the site's CSV file: an id, a label, and the pixels row by row in all other columns.

    Raises:
        SiteConfigError: the file is missing, outside the folder, too large, or not as declared.
    """
    path = _inside(folder, config.path)
    with path.open(newline="", encoding="utf-8") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            pixels = _pixel_columns(header, config, path)
            id_at, label_at = header.index(config.id_column), header.index(config.label_column)
            lines = enumerate(islice(reader, ROWS_LIMIT + 1), start=2)
            rows = [_row(row, number, id_at, label_at, pixels, config) for number, row in lines]
        except (csv.Error, UnicodeDecodeError) as error:
            raise SiteConfigError(f"{path.name}: expected CSV in UTF-8, found {type(error).__name__}") from None
    if len(rows) > ROWS_LIMIT:
        raise SiteConfigError(f"{path.name}: at most {ROWS_LIMIT} rows are read, found more")
    ids = tuple(row[0] for row in rows)
    if len(set(ids)) != len(ids):
        raise SiteConfigError(f"{path.name}: ids must differ, found {len(ids) - len(set(ids))} repeated: one row a record")
    shape = (len(rows), config.image_height, config.image_width)
    images = np.array([row[2] for row in rows], dtype=np.float32).reshape(shape) / np.float32(config.max_value)
    return Records(ids, images, np.array([row[1] for row in rows], dtype=np.int64))


def split(records: Records, data_key: bytes, holdout_fraction: Fraction) -> tuple[Records, Records]:
    """Tuning and held-out records, by a keyed hash of each id: the same for ever, whatever else is in the file."""
    held = keyed_uniform(data_key, "holdout", records.ids) < holdout_fraction
    return records.take(~held), records.take(held)


def buckets(records: Records, data_key: bytes, num_buckets: int) -> npt.NDArray[np.int64]:
    """Each record's bucket 0 ... num_buckets - 1, by a keyed hash of its id: a record touches one bucket only."""
    return (keyed_uniform(data_key, "bucket", records.ids) * num_buckets).astype(np.int64)


def keyed_uniform(key: bytes, purpose: str, ids: Sequence[str]) -> npt.NDArray[np.float64]:
    """HMAC-SHA256 of each id as a number in [0, 1), 52 bits: unpredictable without the site's key."""
    digests = [hmac.digest(key, f"{purpose}\0{one}".encode(), "sha256")[:8] for one in ids]
    return (np.frombuffer(b"".join(digests), dtype="<u8") >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _inside(folder: Path, relative: str) -> Path:
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise SiteConfigError(f"data.path must stay inside the site's folder, found {relative!r}")
    if not path.is_file():
        raise SiteConfigError(f"data.path: expected a file {relative!r} in the site's folder, found none")
    if path.stat().st_size > RECORDS_LIMIT_BYTES:
        raise SiteConfigError(f"{path.name}: at most {RECORDS_LIMIT_BYTES} bytes are read, found {path.stat().st_size}")
    return path


def _pixel_columns(header: list[str], config: DataConfig, path: Path) -> list[int]:
    for column in (config.id_column, config.label_column):
        if header.count(column) != 1:
            raise SiteConfigError(f"{path.name}: expected one column {column!r}, found {header.count(column)}")
    pixels = [at for at, name in enumerate(header) if name not in (config.id_column, config.label_column)]
    expected = config.image_height * config.image_width
    if len(pixels) != expected:
        raise SiteConfigError(f"{path.name}: expected {expected} pixel columns, found {len(pixels)}")
    return pixels


def _row(
    row: list[str], number: int, id_at: int, label_at: int, pixels: list[int], config: DataConfig
) -> tuple[str, int, list[float]]:
    if len(row) != len(pixels) + 2 or not row[id_at]:
        raise SiteConfigError(f"row {number}: expected {len(pixels) + 2} fields and an id, found {len(row)} fields")
    try:
        label, values = int(row[label_at]), [float(row[at]) for at in pixels]
    except ValueError:
        raise SiteConfigError(f"row {number}: expected a whole number as label and numbers as pixels") from None
    if not 0 <= label < config.num_classes:
        raise SiteConfigError(f"row {number}: expected a label of 0 to {config.num_classes - 1}, found another")
    if not all(math.isfinite(value) and 0 <= value <= config.max_value for value in values):
        raise SiteConfigError(f"row {number}: expected pixels of 0 to {config.max_value:g}, found others")
    return row[id_at], label, values
