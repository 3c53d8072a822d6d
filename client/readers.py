"""Files and a database -> columns and arrays: one small reader per format, each with its limits, none of which runs content.

Covered:
    * a path that is absolute, holds "..", or leaves its root through a symbolic link is refused, that of a single image too;
      so is whatever is no regular file (a pipe or a device is never opened);
    * sizes are looked at before anything is unpacked: bytes of a file, declared rows and sizes of a Parquet file, width and
      height in an image's header; rows and bytes are counted again while reading, batch by batch;
    * what unpacks to more than `max_expansion_ratio` times its own size is refused, once it is worth it (1 MiB);
    * readers are fixed by the declared format, never by a file's name or content: no pickle, no `numpy.load`, no YAML;
    * error texts give row numbers and positions, never a value, an id or the name of a record's file.
Not covered:
    * a Parquet page that lies about its size in its own header allocates up to 2 GiB before it fails, and the decoders of
      Parquet, PNG, JPEG and TIFF are C++ and C: keep them up to date, and the process under a memory limit;
    * hard links, and files that change while they are read.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from io import BufferedReader, RawIOBase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from urna.protocol.errors import SiteConfigError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 8_192
BLOCK_BYTES = 4_194_304  # of a CSV file; the longest row
LINE_BYTES = 16_777_216  # of a header, and of a line of JSON
RATIO_MATTERS_BYTES = 1_048_576  # what unpacks to less is let through, whatever its ratio


@dataclass(frozen=True)
class Limits:
    """What a reader takes in, at most."""

    max_rows: int  # rows, or files
    max_bytes: int  # read, and unpacked
    max_pixels: int  # of one image, before it is resized
    max_expansion_ratio: float

    def check_expansion(self, unpacked_bytes: int, packed_bytes: int, where: str) -> None:
        """Look at declared sizes before unpacking.

        Raises:
            SiteConfigError: it would be too much.
        """
        if unpacked_bytes > self.max_bytes:
            raise SiteConfigError(f"{where}: expected at most {self.max_bytes} bytes unpacked, found more: raise max_bytes")
        if unpacked_bytes > max(RATIO_MATTERS_BYTES, self.max_expansion_ratio * packed_bytes):
            raise SiteConfigError(
                f"{where}: expected to unpack to at most {self.max_expansion_ratio:g} times its size, found more:"
                " take it out, or raise max_expansion_ratio"
            )


@dataclass(frozen=True)
class Opened:
    """A table that is being read: the names of its columns, and its rows in batches.

    A batch holds the wanted columns; each is of texts, numbers or truth values, with nulls where nothing is there.
    """

    names: tuple[str, ...]
    batches: Callable[[Sequence[str]], Iterator["pa.RecordBatch"]]
    first_row: int = 1  # how the first row of data is called in messages


# ---- paths


def inside(root: Path, relative: str, where: str) -> Path:
    """The real path of something in a folder, symbolic links followed.

    Args:
        root: what may not be left.
        relative: by its parts, as written in site.toml or in a manifest.
        where: how messages call it; they never show ``relative``.

    Raises:
        SiteConfigError: it is absolute, holds "..", leaves the root, or is not there.
    """
    pure = PurePosixPath(relative)
    if not relative or "\0" in relative or pure.is_absolute() or ".." in pure.parts:
        raise SiteConfigError(f"{where}: expected a relative path without '..', found another: it must stay inside its folder")
    try:
        path, real_root = (root / pure).resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # ValueError: not a name that a file system has
        raise SiteConfigError(f"{where}: expected something at its path, found nothing: correct the path") from None
    if not path.is_relative_to(real_root):
        raise SiteConfigError(f"{where}: a symbolic link leaves its folder: it must stay inside, copy or mount what it names")
    return path


@contextmanager
def opened_file(root: Path, relative: str, where: str, max_bytes: int) -> Iterator[BufferedReader]:
    """Open a regular file in a folder for reading.

    Raises:
        SiteConfigError: as `inside`; or it is no regular file, or too large.
    """
    path = inside(root, relative, where)
    descriptor = _descriptor(path, where)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise SiteConfigError(f"{where}: at most {max_bytes} bytes are read, found {size}: raise max_bytes")
        yield file


def _descriptor(path: Path, where: str) -> int:
    """Walk a resolved path part by part without following links: one that was put there meanwhile is refused."""
    folder = os.open(path.anchor, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in path.parts[1:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        if not stat.S_ISREG(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise SiteConfigError(f"{where}: expected a regular file, found a folder or something else: correct the path")
        descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise SiteConfigError(
            f"{where}: expected a file that can be read, found {type(error).__name__}: look at its rights"
        ) from None
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # exchanged between the two calls
        os.close(descriptor)
        raise SiteConfigError(f"{where}: expected a regular file, found something else: correct the path")
    return descriptor


def listed(folder: Path, max_files: int, where: str, num_before: int = 0) -> tuple[str, ...]:
    """The names in a folder, sorted; those that start with a dot (.DS_Store) are left out.

    Raises:
        SiteConfigError: it is no folder, there are too many, or a name is not UTF-8.
    """
    if not folder.is_dir():
        raise SiteConfigError(f"{where}: expected a folder, found another kind of file: correct the path")
    with os.scandir(folder) as entries:
        names = sorted(islice((entry.name for entry in entries if not entry.name.startswith(".")), max_files + 1))
    if num_before + len(names) > max_files:
        raise SiteConfigError(f"{where}: at most {max_files} files are read, found more: raise max_rows")
    for number, name in enumerate(names, start=1):
        if not _is_text(name):
            raise SiteConfigError(f"{where}: expected file names in UTF-8, found others: rename file {number} in sorted order")
    return tuple(names)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


# ---- CSV


class _Watched(RawIOBase):
    """A file that counts its quotes: Arrow takes an open quote at the end for a closed one, and the rows in it for text."""

    def __init__(self, file: BufferedReader) -> None:
        super().__init__()
        self.file, self.num_quotes = file, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(size)
        self.num_quotes += found.count(b'"')
        return found


@contextmanager
def opened_csv(root: Path, relative: str, where: str, limits: Limits) -> Iterator[Opened]:
    """Comma-separated values in UTF-8 with one header line (RFC 4180); every column is of texts.

    Raises:
        SiteConfigError: no CSV, or more than the limits allow; also while its batches are read.
    """
    with opened_file(root, relative, where, limits.max_bytes) as file:
        names = _csv_header(file, where)
        file.seek(0)
        yield Opened(names, lambda wanted: _csv_batches(file, names, wanted, where, limits), first_row=2)


def _csv_header(file: IO[bytes], where: str) -> tuple[str, ...]:
    line = file.readline(LINE_BYTES)
    try:
        text = line.decode("utf-8-sig")
        names = next(csv.reader([text], strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        names = []
    if not names or not line.endswith(b"\n") or len(set(names)) != len(names):
        raise SiteConfigError(f"{where}: expected CSV in UTF-8 that starts with a line of different column names, found none")
    return tuple(names)


def _csv_batches(
    file: BufferedReader, names: tuple[str, ...], wanted: Sequence[str], where: str, limits: Limits
) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    wrong: list[tuple[int, int]] = []  # row, fields

    def remember(row: arrow_csv.InvalidRow) -> str:
        wrong.append((row.number or 0, row.actual_columns))
        return "error"

    watched, num_rows = _Watched(file), 0
    try:
        reader = arrow_csv.open_csv(
            watched,
            read_options=arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            # an empty line is a row without an id, not nothing: row numbers count it
            parse_options=arrow_csv.ParseOptions(
                newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=remember
            ),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), include_columns=list(wanted)
            ),
        )
        for batch in reader:
            num_rows = _counted(num_rows, batch.num_rows, where, limits)
            yield batch
    except pa.ArrowException as error:  # its text holds the row
        raise SiteConfigError(_csv_complaint(str(error), wrong, len(names), where)) from None
    if watched.num_quotes % 2:
        raise SiteConfigError(f"{where}: expected CSV in which every quote is closed, found an open one: correct the file")


def _csv_complaint(message: str, wrong: list[tuple[int, int]], num_names: int, where: str) -> str:
    if wrong:
        return f"{where}: row {wrong[0][0]}: expected {num_names} fields, found {wrong[0][1]}: correct the row"
    row = re.search(r"^In CSV column #\d+: Row #(\d+):", message)
    if row and "UTF8" in message:
        return f"{where}: row {row[1]}: expected text in UTF-8, found other bytes: save the file as UTF-8"
    if "straddling" in message:
        return f"{where}: expected rows of at most {BLOCK_BYTES} bytes, found a longer one: close its quotes or split it"
    return f"{where}: expected CSV in UTF-8, found something else: save it as comma-separated values"


def _counted(before: int, more: int, where: str, limits: Limits) -> int:
    if before + more > limits.max_rows:
        raise SiteConfigError(f"{where}: at most {limits.max_rows} rows are read, found more: raise max_rows")
    return before + more


# ---- JSON lines


@contextmanager
def opened_jsonl(root: Path, relative: str, where: str, limits: Limits) -> Iterator[Opened]:
    """One JSON object a line, all with the keys of the first; values are text, numbers, true, false or null.

    Arrow's reader is not used: it turns texts that look like dates into dates.

    Raises:
        SiteConfigError: no such lines, or more than the limits allow; also while its batches are read.
    """
    with opened_file(root, relative, where, limits.max_bytes) as file:
        names = tuple(_json_row(file.readline(LINE_BYTES), f"{where}: row 1") if os.fstat(file.fileno()).st_size else ())
        file.seek(0)

        def batches(wanted: Sequence[str]) -> Iterator["pa.RecordBatch"]:
            yield from row_batches(_json_rows(file, names, wanted, where), wanted, where, limits)

        yield Opened(names, batches)


def _json_rows(file: BufferedReader, names: tuple[str, ...], wanted: Sequence[str], where: str) -> Iterator[Sequence[object]]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
        row = _json_row(line, f"{where}: row {number}")
        if row.keys() != set(names):
            raise SiteConfigError(
                f"{where}: row {number}: expected the {len(names)} keys of row 1, found others: write null for none"
            )
        yield [row[name] for name in wanted]


def _json_row(line: bytes, where: str) -> dict[str, object]:
    def no_constant(_: str) -> object:
        raise ValueError

    def different(pairs: list[tuple[str, object]]) -> dict[str, object]:
        row = dict(pairs)
        if len(row) != len(pairs):
            raise ValueError
        return row

    try:
        row = json.loads(line.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=different)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise SiteConfigError(f"{where}: expected one JSON object with different keys, found something else: write one a line")
    return row


# ---- rows of Python objects


def row_batches(
    rows: Iterator[Sequence[object]], wanted: Sequence[str], where: str, limits: Limits
) -> Iterator["pa.RecordBatch"]:
    """Rows of Python objects as batches.

    Raises:
        SiteConfigError: a cell is nested or binary, or there are more rows or bytes than the limits allow.
    """
    import pyarrow as pa

    num_rows, num_bytes = 0, 0
    while chunk := list(islice(rows, min(BATCH_ROWS, limits.max_rows + 1 - num_rows))):
        columns = [_column(cells, where, num_rows + 1) for cells in zip(*chunk, strict=True)]
        num_rows = _counted(num_rows, len(chunk), where, limits)
        num_bytes += sum(column.nbytes for column in columns)
        limits.check_expansion(num_bytes, limits.max_bytes, where)
        yield pa.record_batch(dict(zip(wanted, columns, strict=True)))


def _column(cells: Sequence[object], where: str, first_row: int) -> "pa.Array":
    """Cells of one kind as they are; all others as texts."""
    import pyarrow as pa

    kinds = set(map(type, cells)) - {type(None)}
    plain = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    if len(kinds) == 1 and (kind := kinds.pop()) in plain:
        try:
            return pa.array(cells, plain[kind])
        except (OverflowError, UnicodeEncodeError, pa.ArrowInvalid):  # cell by cell below, which names the row
            pass
    return pa.array([_text_of(cell, where, row) for row, cell in enumerate(cells, start=first_row)], pa.string())


def _text_of(cell: object, where: str, row: int) -> str | None:
    """A cell as text that reads back as the same value."""
    match cell:
        case None:
            return None
        case str() if _is_text(cell):
            return cell
        case bool():
            return str(cell).lower()
        case float():
            return repr(cell)
        case int() if -(2**63) <= cell < 2**63:
            return str(cell)
        case Decimal():
            return str(cell)
        case date() | datetime():
            return cell.isoformat()
    raise SiteConfigError(
        f"{where}: row {row}: expected text, numbers, dates or null, found another value: leave the column out"
    )


# ---- Parquet


@contextmanager
def opened_parquet(root: Path, relative: str, where: str, limits: Limits) -> Iterator[Opened]:
    """Flat columns of one Parquet file; its declared rows and sizes are looked at before anything is unpacked.

    Raises:
        SiteConfigError: no Parquet, or more than the limits allow; also while its batches are read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with opened_file(root, relative, where, limits.max_bytes) as file:
        options: dict[str, object] = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}
        try:
            metadata = parquet.ParquetFile(file, **options).metadata
            names = tuple(metadata.schema.column(at).path for at in range(metadata.num_columns))
            # kept as a dictionary, or one long text that is named a million times unpacks before it is counted
            source = parquet.ParquetFile(file, read_dictionary=list(names), **options)
        except (pa.ArrowException, OSError, ValueError):
            raise SiteConfigError(f"{where}: expected a Parquet file, found something else: write it anew") from None
        _counted(0, metadata.num_rows, where, limits)
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        chunks = [group.column(at) for group in groups for at in range(metadata.num_columns)]
        size = os.fstat(file.fileno()).st_size
        limits.check_expansion(sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks), size, where)
        if len(set(names)) != len(names) or names != tuple(source.schema_arrow.names):
            raise SiteConfigError(f"{where}: expected flat columns of different names, found others: unnest or rename them")
        yield Opened(names, lambda wanted: _parquet_batches(source, wanted, where, limits, size))


def _parquet_batches(
    source: "pa.parquet.ParquetFile", wanted: Sequence[str], where: str, limits: Limits, size: int
) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    num_rows, num_bytes = 0, 0
    try:
        for batch in source.iter_batches(BATCH_ROWS, columns=list(wanted), use_threads=False):
            num_rows = _counted(num_rows, batch.num_rows, where, limits)
            num_bytes += sum(map(_unpacked_bytes, batch.columns))
            limits.check_expansion(num_bytes, size, where)
            yield pa.record_batch({name: _plain(batch.column(name), f"{where}: column {name!r}") for name in wanted})
    except (pa.ArrowException, OSError, ValueError):
        raise SiteConfigError(f"{where}: expected a Parquet file without damage, found some: write it anew") from None


def _unpacked_bytes(column: "pa.Array") -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int(pc.sum(pc.cast(lengths, pa.int64())).as_py() or 0) + 4 * len(column)


def _plain(column: "pa.Array", where: str) -> "pa.Array":
    """Texts, float64, int64 or truth values; dates become texts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = pa.types
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
        column.validate(full=True)  # Parquet's readers do not look whether text is UTF-8
        return pc.cast(column, pa.string())
    if kinds.is_null(kind):
        return pc.cast(column, pa.string())
    if kinds.is_boolean(kind):
        return column
    if kinds.is_integer(kind):
        return pc.cast(column, pa.int64())
    if kinds.is_floating(kind) or kinds.is_decimal(kind):
        return pc.cast(column, pa.float64())
    if kinds.is_timestamp(kind):
        column = pc.cast(column, pa.timestamp("us"), safe=False)  # Python knows no nanoseconds
    if kinds.is_date(kind) or kinds.is_timestamp(kind):
        return pa.array([None if one is None else one.isoformat() for one in column.to_pylist()], pa.string())
    raise SiteConfigError(f"{where}: expected text, numbers, truth values or dates, found {kind}: leave it out or convert it")


# ---- texts


def read_text_file(root: Path, relative: str, where: str, max_bytes: int) -> str:
    """A text in UTF-8.

    Raises:
        SiteConfigError: as `opened_file`; or it is not UTF-8.
    """
    with opened_file(root, relative, where, max_bytes) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise SiteConfigError(f"{where}: expected text in UTF-8, found other bytes: save it as UTF-8") from None
