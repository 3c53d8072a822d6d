"""``[[dataset]]`` in site.toml -> records, by constants that the site declares; nothing is fitted to the records.

Covered:
    * whatever a record's shape rests on is declared: labels, sizes, columns, ranges, closed categories; a record that
      differs is refused by its row, before any is used, and its values are in no message;
    * de-identification (`deidentify.py`) comes before anything else sees a value;
    * files, tables and databases are read within declared limits (`readers.py`, `image_files.py`);
    * a person's records are counted as one unit, at most `max_records_per_person` of them (`records.py`).
Not covered:
    * that the declarations are true: labels or ranges that were chosen by looking at the records tell of them;
    * encoded images inside Parquet or a database; nested columns; missing values (fill them in, or leave the row out).
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from urna.client import columns as arrays
from urna.client import readers
from urna.client.deidentify import Column, Finite, Rule, deidentified
from urna.client.records import Images, Inputs, Records, Table, Texts, capped
from urna.client.sql_reader import has_password, opened_sql
from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import Name, Section

if TYPE_CHECKING:
    import pyarrow as pa

PILLOW_LIMIT_PIXELS = 89_478_485  # where Pillow itself begins to speak of decompression bombs
Side = Annotated[int, Field(ge=1, le=4096)]
Label = Annotated[str, Field(min_length=1, max_length=200)]


class ColumnSchema(Section):
    """One of ``columns``: what a table's column holds, as public constants."""

    name: Column
    type: Literal["number", "category"]
    minimum: Finite | None = None  # of a number
    maximum: Finite | None = None  # of a number
    categories: Annotated[tuple[str, ...], Field(max_length=100_000)] = ()  # closed; a value's code is its place

    @model_validator(mode="after")
    def _range_or_categories(self) -> Self:
        is_number = self.type == "number"
        has_range = self.minimum is not None and self.maximum is not None and self.minimum <= self.maximum
        if is_number and (not has_range or self.categories):
            raise ValueError(f"column {self.name!r}: a number needs minimum and maximum, in order, and no categories")
        if not is_number and (self.minimum is not None or self.maximum is not None or not self.categories):
            raise ValueError(f"column {self.name!r}: a category needs categories, and neither minimum nor maximum")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError(f"column {self.name!r}: expected different categories, found one twice")
        return self


class DatasetConfig(Section):
    """``[[dataset]]`` in site.toml: where records are and what they look like, as public constants."""

    name: Name
    format: Literal["csv", "parquet", "jsonl", "images", "text", "sql"]
    modality: Literal["image", "text", "table"]
    num_records: Annotated[int, Field(ge=1, le=10**12)]  # declared: public, may be rounded; the true count shapes nothing
    path: str | None = None  # relative to the site's folder: a file, or the folder of images or texts
    manifest: str | None = None  # of images or texts: a CSV file in their folder; None: one subfolder a label
    url: str | None = None  # of sql: SQLAlchemy's, without a password; a SQLite file is relative to the site's folder
    url_variable: str | None = None  # of sql: the environment variable that holds the URL, if it holds a password
    query: str | None = None  # of sql: one SELECT statement
    id_column: Column = "id"
    label_column: Column = "label"
    file_column: Column = "file"  # of a manifest
    person_column: Column | None = None  # whose records count as one unit; None: each record is one
    max_records_per_person: Annotated[int, Field(ge=1, le=10_000)] = 1  # the others are left out, by a keyed hash
    labels: Annotated[tuple[Label, ...], Field(max_length=1000)] | None = None  # closed; a label's class is its place
    num_classes: Annotated[int, Field(ge=2, le=1000)] | None = None  # instead: labels "0", "1", ...
    image_height: Side | None = None
    image_width: Side | None = None
    image_channels: Literal[1, 3] = 1
    # of pixel columns: all that have no other role, row by row, channel by channel; 0 ... max_value is scaled to 0 ... 1
    max_value: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    text_column: Column = "text"
    max_characters: Annotated[int, Field(ge=1, le=10_000_000)] | None = None  # of a text; longer ones are cut there
    columns: Annotated[tuple[ColumnSchema, ...], Field(max_length=10_000)] = ()
    deidentify: Annotated[tuple[Rule, ...], Field(max_length=1000)] = ()
    max_rows: Annotated[int, Field(ge=1)] = 5_000_000  # or files
    max_bytes: Annotated[int, Field(ge=1)] = 2_000_000_000  # of a file, of what it unpacks to, of images in memory
    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_LIMIT_PIXELS)] = 50_000_000  # of an image, before it is resized
    max_expansion_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0  # unpacked to packed bytes

    @field_validator("path", "manifest")
    @classmethod
    def _stays_inside(cls, path: str | None) -> str | None:
        if path is not None and (not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError("expected a relative path without '..': it must stay inside the site's folder")
        return path

    @model_validator(mode="after")
    def _keys_belong(self) -> Self:
        if self.format in ("images", "text") and self.modality != {"images": "image", "text": "text"}[self.format]:
            raise ValueError(f"format {self.format!r} holds no records of modality {self.modality!r}: correct one of them")
        for key, owner, is_owned, is_needed in self._owners():
            if key in self.model_fields_set and not is_owned:
                raise ValueError(f"{key} belongs to {owner}: take it out")
            if is_owned and is_needed and not getattr(self, key):
                raise ValueError(f"missing key {key}: {owner} needs it")
        if self.format == "sql" and (self.url is None) == (self.url_variable is None):
            raise ValueError("expected one of url and url_variable: a URL with a password belongs into the environment")
        return self

    def _owners(self) -> Iterator[tuple[str, str, bool, bool]]:
        """Keys that not every data set has: key, what it belongs to, whether this is one, whether it must be there."""
        is_sql, is_files = self.format == "sql", self.format in ("images", "text")
        yield "path", "another format than sql", not is_sql, True
        yield from ((key, "format sql", is_sql, key == "query") for key in ("url", "url_variable", "query"))
        yield "manifest", "formats images and text", is_files, False
        yield "file_column", "a manifest", self.manifest is not None, False
        yield "person_column", "tables and manifests", not is_files or self.manifest is not None, False
        yield "max_records_per_person", "a person_column", self.person_column is not None, False
        is_image, is_text = self.modality == "image", self.modality == "text"
        yield from ((key, "modality image", is_image, True) for key in ("image_height", "image_width"))
        yield "image_channels", "modality image", is_image, False
        yield "max_value", "pixel columns", is_image and not is_files, True
        yield "text_column", "modality text", is_text, False
        yield "max_characters", "modality text", is_text, True
        yield "columns", "modality table", self.modality == "table", True

    @model_validator(mode="after")
    def _labels_are_closed(self) -> Self:
        if (self.labels is None) == (self.num_classes is None):
            raise ValueError("expected one of labels and num_classes: they are the closed set of classes")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"expected two or more different labels, found {len(set(self.labels))}")
        return self

    @model_validator(mode="after")
    def _columns_have_one_role(self) -> Self:
        roles = self.roles
        twice = sorted(name for name, count in Counter(roles).items() if count > 1)
        if twice:
            raise ValueError(f"expected one role for a column, found {twice[0]!r} in two: name another")
        for rule in self.deidentify:
            if rule.action == "drop" and rule.column in roles:
                raise ValueError(f"deidentify: column {rule.column!r} is needed and cannot be dropped: hash or generalise it")
            if rule.column == self.person_column and rule.action in ("generalise", "scrub"):
                raise ValueError(f"deidentify: column {rule.column!r} tells persons apart and would merge them: use keyed_hash")
            if rule.column == self.file_column and self.manifest is not None:
                raise ValueError(f"deidentify: column {rule.column!r} names files and is not kept: take the rule out")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        """The columns that are needed by name."""
        person = () if self.person_column is None else (self.person_column,)
        file = () if self.manifest is None else (self.file_column,)
        text = (self.text_column,) if self.modality == "text" and self.manifest is None else ()
        return (self.id_column, *person, self.label_column, *file, *text, *(column.name for column in self.columns))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The closed set of labels; a label's class is its place."""
        return self.labels if self.labels is not None else tuple(map(str, range(self.num_classes or 0)))

    @property
    def limits(self) -> readers.Limits:
        """What its readers take in, at most."""
        return readers.Limits(self.max_rows, self.max_bytes, self.max_pixels, self.max_expansion_ratio)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w), or (3, h, w)."""
        size = (self.image_height or 0, self.image_width or 0)
        return size if self.image_channels == 1 else (3, *size)

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"dataset {self.name}"

    def rules_of(self, column: str) -> tuple[Rule, ...]:
        """What is done to a column, in order."""
        return tuple(rule for rule in self.deidentify if rule.column == column)


@dataclass(frozen=True)
class Loaded:
    """Records, and what happened on their way."""

    records: Records
    num_read: int  # before a person's cap
    scrubbed: Counter[str]  # by token: EMAIL, PHONE ...


@dataclass(frozen=True)
class _Reading:
    """What a load carries along."""

    folder: Path
    config: DatasetConfig
    key: bytes
    scrubbed: Counter[str]

    def clean(self, column: "pa.Array", name: str, first_row: int) -> "pa.Array":
        """The column after its rules; untouched where it has none."""
        rules = self.config.rules_of(name)
        if not rules:
            return column
        texts = arrays.as_texts(column, name, self.config.where)
        try:
            return deidentified(texts, rules, self.key, first_row, self.scrubbed)
        except SiteConfigError as error:
            raise SiteConfigError(f"{self.config.where}: {error}") from None


def load_records(folder: Path, config: DatasetConfig, key: bytes) -> Records:
    """Read a site's records.

    Args:
        folder: the site's.
        config: which records, and what they look like.
        key: the site's data key, for pseudonyms and for the cap.

    Raises:
        SiteConfigError: they are missing, outside the folder, too large, or not as declared.
    """
    return load(folder, config, key).records


def pixel_csv(
    num_records: int, num_classes: int, image_height: int, image_width: int, max_value: float, path: str = "records.csv"
) -> DatasetConfig:
    """The plainest data set: grey images in one CSV file with columns id, label and a column a pixel."""
    return DatasetConfig(
        name="records",
        format="csv",
        modality="image",
        path=path,
        num_records=num_records,
        num_classes=num_classes,
        image_height=image_height,
        image_width=image_width,
        max_value=max_value,
    )


def load(folder: Path, config: DatasetConfig, key: bytes) -> Loaded:
    """Read a site's records, and count what was done to them.

    Raises:
        SiteConfigError: as `load_records`.
    """
    reading = _Reading(folder, config, key, Counter())
    records = _from_files(reading) if config.format in ("images", "text") else _from_table(reading)
    repeated = len(records) - len(set(records.ids))
    if repeated:
        raise SiteConfigError(f"{config.where}: ids must differ, found {repeated} repeated: give each record one of its own")
    kept = records if config.person_column is None else capped(records, key, config.max_records_per_person)
    return Loaded(kept, len(records), reading.scrubbed)


# ---- tables


def _from_table(reading: _Reading) -> Records:
    config = reading.config
    parts: list[Records] = []
    with _opened(reading.folder, config) as opened:
        pixels = _pixel_columns(opened.names, config)
        row = opened.first_row
        for batch in opened.batches((*config.roles, *pixels)):
            columns = {name: reading.clean(batch.column(name), name, row) for name in batch.schema.names}
            part = _part(columns, config, row)
            parts.append(replace(part, inputs=_inputs(columns, pixels, config, row)))
            row += batch.num_rows
    return replace(_joined(parts, config), inputs=_joined_inputs([part.inputs for part in parts], config))


def _opened(folder: Path, config: DatasetConfig) -> AbstractContextManager[readers.Opened]:
    if config.format == "sql":
        return opened_sql(folder, _url(config), config.query or "", config.where, config.limits)
    reader = {"csv": readers.opened_csv, "parquet": readers.opened_parquet, "jsonl": readers.opened_jsonl}[config.format]
    return reader(folder, config.path or "", config.where, config.limits)


def _url(config: DatasetConfig) -> str:
    if config.url_variable is None:
        if has_password(config.url or ""):
            raise SiteConfigError(
                f"{config.where}: expected a URL without a password, found one: put it into an environment variable,"
                " and name that as url_variable"
            )
        return config.url or ""
    if config.url_variable not in os.environ:
        raise SiteConfigError(f"{config.where}: expected the environment variable {config.url_variable}, found none: set it")
    return os.environ[config.url_variable]


def _pixel_columns(names: Sequence[str], config: DatasetConfig) -> tuple[str, ...]:
    """Checks that all declared columns are there; the pixel columns of images, none otherwise."""
    for name in dict.fromkeys((*config.roles, *(rule.column for rule in config.deidentify))):
        if name not in names:
            raise SiteConfigError(f"{config.where}: expected one column {name!r}, found 0: correct the file, or site.toml")
    if config.modality != "image" or config.format == "images":
        return ()
    others = {*config.roles, *(rule.column for rule in config.deidentify if rule.action == "drop")}
    pixels = tuple(name for name in names if name not in others)
    expected = int(np.prod(config.image_shape))
    if len(pixels) != expected:
        raise SiteConfigError(
            f"{config.where}: expected {expected} pixel columns, found {len(pixels)}: correct the size, or drop the others"
        )
    return pixels


def _inputs(columns: Mapping[str, "pa.Array"], pixels: Sequence[str], config: DatasetConfig, row: int) -> Inputs:
    where = config.where
    if config.modality == "image":
        maximum = config.max_value or 1.0
        matrix = arrays.numbers_of([columns[name] for name in pixels], 0.0, maximum, "pixels", where, row)
        return Images(matrix.astype(np.float32).reshape(-1, *config.image_shape) / np.float32(maximum))
    if config.modality == "text":
        name = config.text_column
        texts = arrays.full(arrays.as_texts(columns[name], name, where), name, where, row)
        return Texts(tuple(text[: config.max_characters] for text in texts.to_pylist()))
    table = {}
    for one in config.columns:
        if one.type == "category":
            table[one.name] = arrays.codes_of(columns[one.name], one.categories, one.name, where, row).astype(np.float64)
        else:
            low, high = one.minimum or 0.0, one.maximum or 0.0
            what = f"numbers in column {one.name!r}"
            table[one.name] = arrays.numbers_of([columns[one.name]], low, high, what, where, row)[:, 0]
    return Table(table)


def _part(columns: Mapping[str, "pa.Array"], config: DatasetConfig, row: int) -> Records:
    """The records of a batch, without their inputs."""
    where, person = config.where, config.person_column
    ids = tuple(arrays.names_of(columns[config.id_column], config.id_column, where, row))
    units = ids if person is None else tuple(arrays.names_of(columns[person], person, where, row))
    labels = arrays.codes_of(columns[config.label_column], config.label_names, config.label_column, where, row)
    return Records(ids, units, labels, Texts(()))


def _joined(parts: Sequence[Records], config: DatasetConfig) -> Records:
    """All records, without their inputs."""
    ids = tuple(one for part in parts for one in part.ids)
    units = ids if config.person_column is None else tuple(one for part in parts for one in part.units)
    labels = np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)])
    return Records(ids, units, labels, Texts(()))


def _joined_inputs(parts: Sequence[Inputs], config: DatasetConfig) -> Inputs:
    if config.modality == "image":
        none = np.zeros((0, *config.image_shape), np.float32)
        return Images(np.concatenate([none, *(part.pixels for part in parts if isinstance(part, Images))]))
    if config.modality == "text":
        return Texts(tuple(text for part in parts if isinstance(part, Texts) for text in part.texts))
    tables = [part.columns for part in parts if isinstance(part, Table)]
    return Table({one.name: np.concatenate([np.zeros(0), *(table[one.name] for table in tables)]) for one in config.columns})


# ---- files


@dataclass(frozen=True)
class _Listing:
    """Records whose inputs are files: the files' paths, and how messages call each of them."""

    records: Records  # without inputs
    files: tuple[str, ...]
    places: tuple[str, ...]


def _from_files(reading: _Reading) -> Records:
    config = reading.config
    base = readers.inside(reading.folder, config.path or "", config.where)
    listing = _from_manifest(reading, base) if config.manifest is not None else _from_folders(reading, base)
    inputs = _images(base, listing, config) if config.format == "images" else _texts(base, listing, reading)
    return replace(listing.records, inputs=inputs)


def _from_folders(reading: _Reading, base: Path) -> _Listing:
    """One subfolder a label; a record's id is the path of its file below ``base``."""
    import pyarrow as pa

    config, files, places, labels = reading.config, list[str](), list[str](), list[int]()
    known = {config.id_column, *((config.text_column,) if config.format == "text" else ())}
    if any(rule.column not in known for rule in config.deidentify):
        raise SiteConfigError(
            f"{config.where}: expected rules for columns {', '.join(sorted(known))}, found others: take them out"
        )
    for number, label in enumerate(readers.listed(base, config.max_rows, config.where), start=1):
        if label not in config.label_names:
            raise SiteConfigError(
                f"{config.where}: expected folders called like the declared labels, found another:"
                f" look at entry {number} in sorted order"
            )
        where = f"{config.where}: label {label!r}"
        names = readers.listed(readers.inside(base, label, where), config.max_rows, where, len(files))
        files += [f"{label}/{name}" for name in names]
        places += [f"{where}: file {at} in sorted order" for at in range(1, len(names) + 1)]
        labels += [config.label_names.index(label)] * len(names)
    ids = tuple(reading.clean(pa.array(files, pa.string()), config.id_column, 1).to_pylist())
    return _Listing(Records(ids, ids, np.array(labels, np.int64), Texts(())), tuple(files), tuple(places))


def _from_manifest(reading: _Reading, base: Path) -> _Listing:
    """A CSV file with ids, files, labels and perhaps persons."""
    config, parts, files = reading.config, [], []
    where = f"{config.where}: manifest"
    with readers.opened_csv(base, config.manifest or "", where, config.limits) as opened:
        known = {*config.roles, *((config.text_column,) if config.format == "text" else ())}
        ruled = {rule.column for rule in config.deidentify}
        missing = sorted((set(config.roles) | ruled) - known.difference(config.roles) - set(opened.names))
        if missing:
            raise SiteConfigError(f"{where}: expected one column {missing[0]!r}, found 0: correct the file, or site.toml")
        row = opened.first_row
        for batch in opened.batches(config.roles):
            columns = {name: reading.clean(batch.column(name), name, row) for name in batch.schema.names}
            parts.append(_part(columns, config, row))
            files += arrays.names_of(columns[config.file_column], config.file_column, where, row)
            row += batch.num_rows
        places = tuple(f"{where}: row {at}: its file" for at in range(opened.first_row, row))
    return _Listing(_joined(parts, config), tuple(files), places)


def _images(base: Path, listing: _Listing, config: DatasetConfig) -> Images:
    from urna.client.image_files import read_image

    num_bytes = 4 * len(listing.files) * int(np.prod(config.image_shape))
    if num_bytes > config.max_bytes:
        raise SiteConfigError(
            f"{config.where}: expected images of at most {config.max_bytes} bytes in memory, found {num_bytes}:"
            " raise max_bytes, or declare a smaller size"
        )
    pixels: npt.NDArray[np.float32] = np.empty((len(listing.files), *config.image_shape), np.float32)
    height, width = config.image_shape[-2:]
    for at, (file, place) in enumerate(zip(listing.files, listing.places, strict=True)):
        pixels[at] = read_image(base, file, place, config.limits, height, width, config.image_channels)
    return Images(pixels)


def _texts(base: Path, listing: _Listing, reading: _Reading) -> Texts:
    import pyarrow as pa

    config, texts, num_characters = reading.config, [], 0
    for at in range(0, len(listing.files), 1000):
        part = []
        for file, place in zip(listing.files[at : at + 1000], listing.places[at : at + 1000], strict=True):
            if not file.endswith(".txt"):
                raise SiteConfigError(f"{place}: expected a name that ends in .txt, found another: move or rename it")
            part.append(readers.read_text_file(base, file, place, config.max_bytes))
            num_characters += len(part[-1])
            config.limits.check_expansion(num_characters, config.max_bytes, config.where)
        clean = reading.clean(pa.array(part, pa.string()), config.text_column, at + 1)
        texts += [text[: config.max_characters] for text in clean.to_pylist()]
    return Texts(tuple(texts))
