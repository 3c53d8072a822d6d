"""A database -> columns: the rows of one SELECT statement, through SQLAlchemy.

Covered:
    * one SELECT statement; a SQLite file is opened for reading only, PostgreSQL's transaction is READ ONLY, nothing
      is committed;
    * a SQLite file stays inside the site's folder, by the rules of all files; rows and bytes are counted while streamed;
    * a password is no part of site.toml; error texts hold neither the query nor values.
Not covered:
    * a SELECT may call functions of the database that write: give the account the right to read, and no other;
    * the way to the database: ask for TLS in its URL.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from urna.client.readers import BATCH_ROWS, Limits, Opened, inside, opened_file, row_batches
from urna.protocol.errors import SiteConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    import sqlalchemy


@contextmanager
def opened_sql(root: Path, url: str, query: str, where: str, limits: Limits) -> Iterator[Opened]:
    """The rows of one SELECT statement, streamed. A SQLite file is looked for in ``root``, by the rules of all files.

    Raises:
        SiteConfigError: no URL or driver that SQLAlchemy knows, no such database, a failing query, or too many rows; also
            while its batches are read.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    check_select(query, where)
    try:
        with _connected(root, url, where, limits) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SET TRANSACTION READ ONLY"))
            elif connection.dialect.name == "sqlite":
                connection.execute(text("PRAGMA query_only = ON"))
            streaming = connection.execution_options(stream_results=True, yield_per=BATCH_ROWS)
            result = streaming.execute(text(query.replace(":", r"\:")))  # no parameter begins anywhere
            names = tuple(result.keys())
            if len(set(names)) != len(names):
                raise SiteConfigError(f"{where}: expected columns of different names, found two alike: name them with AS")

            def batches(wanted: Sequence[str]) -> Iterator["pa.RecordBatch"]:
                places = [names.index(name) for name in wanted]
                rows = ([row[place] for place in places] for row in result)
                yield from row_batches(rows, wanted, where, limits)

            yield Opened(names, batches)
    except (SQLAlchemyError, ImportError, OSError) as error:  # their texts hold the query, and values
        raise SiteConfigError(f"{where}: expected a database that answers the query, found {type(error).__name__}") from None


def check_select(query: str, where: str) -> None:
    """One SELECT statement; a guard against slips, not against whoever writes site.toml.

    Raises:
        SiteConfigError: it is another statement, or several.
    """
    bare = query.strip().removesuffix(";")
    if not re.match(r"(?i)select\b", bare) or ";" in bare or "\0" in bare or re.search(r"(?i)\binto\b", bare):
        raise SiteConfigError(f"{where}: expected one SELECT statement without ';' and INTO, found another: make a view of it")


@contextmanager
def _connected(root: Path, url: str, where: str, limits: Limits) -> Iterator["sqlalchemy.Connection"]:
    import sqlite3

    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.pool import NullPool

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise SiteConfigError(f"{where}: expected a URL as SQLAlchemy knows them, found another: correct it") from None
    if parsed.get_backend_name() == "sqlite":
        with opened_file(root, parsed.database or "", where, limits.max_bytes):
            path = inside(root, parsed.database or "", where)
        uri = f"{path.as_uri()}?mode=ro"
        engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool)
    else:
        engine = create_engine(parsed, poolclass=NullPool)
    with engine.connect() as connection:
        try:
            yield connection
        finally:
            connection.rollback()


def has_password(url: str) -> bool:
    """Whether a database's URL holds one; False for what is no URL."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).password is not None
    except (ArgumentError, ValueError):
        return False
