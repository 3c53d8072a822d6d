"""Columns of a batch -> arrays, checked whole columns at a time; what is wrong is named by its row, never by its value."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from urna.protocol.errors import SiteConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_NUMBER = r"^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$"  # RE2


def as_texts(column: "pa.Array", name: str, where: str) -> "pa.Array":
    """A column as texts; whole numbers and truth values are written out, nulls stay.

    Raises:
        SiteConfigError: it holds broken numbers, which have no one way of being written.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type):
        raise SiteConfigError(f"{where}: expected text or whole numbers in column {name!r}, found broken numbers: convert it")
    return pc.cast(column, pa.string())


def full(column: "pa.Array", name: str, where: str, first_row: int) -> "pa.Array":
    """The same column.

    Raises:
        SiteConfigError: a value is missing.
    """
    import pyarrow.compute as pc

    if column.null_count:
        row = first_row + _first(pc.is_null(column))
        raise SiteConfigError(f"{where}: row {row}: expected a value in column {name!r}, found none: fill it in")
    return column


def names_of(column: "pa.Array", name: str, where: str, first_row: int) -> list[str]:
    """Ids or persons: texts of at least one character.

    Raises:
        SiteConfigError: one is missing or empty.
    """
    import pyarrow.compute as pc

    texts = full(as_texts(column, name, where), name, where, first_row)
    empty = pc.equal(pc.utf8_length(texts), 0)
    if pc.any(empty).as_py():
        raise SiteConfigError(
            f"{where}: row {first_row + _first(empty)}: expected a value in column {name!r}, found an empty one"
        )
    values: list[str] = texts.to_pylist()
    return values


def codes_of(column: "pa.Array", closed: Sequence[str], name: str, where: str, first_row: int) -> npt.NDArray[np.int64]:
    """Each text's place in a closed set.

    Raises:
        SiteConfigError: one is not in it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = full(as_texts(column, name, where), name, where, first_row)
    codes = pc.index_in(texts, value_set=pa.array(closed, pa.string()))
    if codes.null_count:
        row = first_row + _first(pc.is_null(codes))
        raise SiteConfigError(
            f"{where}: row {row}: expected one of the {len(closed)} declared values in column {name!r}, found another:"
            " correct it, or declare it"
        )
    return np.asarray(codes.to_numpy(zero_copy_only=False), np.int64)


def numbers_of(
    columns: Sequence["pa.Array"], minimum: float, maximum: float, what: str, where: str, first_row: int
) -> npt.NDArray[np.float64]:
    """Columns of numbers as (rows, columns).

    Args:
        columns: of texts or numbers.
        minimum: every number must be at least this.
        maximum: every number must be at most this, and finite.
        what: what messages call a column's values.
        where: the file in messages.
        first_row: of the file, for messages.

    Raises:
        SiteConfigError: a number is missing, none, or out of its range.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays = []
    for column in columns:
        try:
            numbers = pc.cast(column, pa.float64())
        except pa.ArrowInvalid:
            numbers = None
        if numbers is None or numbers.null_count:
            raise SiteConfigError(
                f"{where}: row {first_row + _first_no_number(columns)}: expected numbers as {what}: correct them"
            )
        arrays.append(numbers.to_numpy(zero_copy_only=False))
    matrix = np.stack(arrays, axis=1) if arrays else np.zeros((0, 0))
    wrong = ~((matrix >= minimum) & (matrix <= maximum)).all(axis=1)  # NaN is neither
    if wrong.any():
        row = first_row + int(np.flatnonzero(wrong)[0])
        raise SiteConfigError(f"{where}: row {row}: expected {what} of {minimum:g} to {maximum:g}, found others: correct them")
    return matrix


def _first_no_number(columns: Sequence["pa.Array"]) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    places = []
    for column in columns:
        is_text = pa.types.is_string(column.type)
        fits = pc.match_substring_regex(column, _NUMBER) if is_text else pc.is_valid(column)
        wrong = pc.invert(pc.fill_null(fits, False))
        places += [_first(wrong)] if pc.any(wrong).as_py() else []
    return min(places, default=0)


def _first(mask: "pa.Array") -> int:
    return int(mask.index(True).as_py())
