"""How a ledger is written down: its tables, the links of its chain, and whether a file is one that a ledger wrote.

Covered:
    * rows altered, added, taken out, re-ordered, renumbered in any table; triggers, views, tables that no ledger has;
    * a new chain by whoever knows this format and has no data key.
Not covered:
    * the newest rows cut off together: the chain alone cannot know what came after (`anchor.py`, and the echoed head).
"""

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from urna.client.ledger_rows import EVENTS, CampaignRow, Release
from urna.client.round_store import SCHEMA as ROUND_SCHEMA
from urna.client.round_store import digest_of
from urna.protocol.errors import LedgerError

FORMAT = 2
GENESIS = "0" * 64
SCHEMA = (
    """
CREATE TABLE entry (
    seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, detail TEXT NOT NULL, at REAL NOT NULL,
    link TEXT NOT NULL
) STRICT;
CREATE INDEX entry_of ON entry (kind, subject);
CREATE TABLE campaign (
    campaign TEXT PRIMARY KEY, site TEXT NOT NULL, request_sha256 TEXT NOT NULL, plan_json TEXT NOT NULL,
    models_json TEXT NOT NULL, dataset INTEGER NOT NULL, round_key BLOB NOT NULL, reply BLOB NOT NULL,
    graph_commitment TEXT NOT NULL
) STRICT;
CREATE TABLE release (
    number INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, request_sha256 TEXT NOT NULL, campaign TEXT NOT NULL,
    stage TEXT NOT NULL, partition TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL CHECK (count > 0),
    dataset INTEGER NOT NULL, reply BLOB
) STRICT;
CREATE TABLE dataset (id INTEGER PRIMARY KEY, name TEXT NOT NULL, sketch BLOB NOT NULL) STRICT;
CREATE TABLE waiting (
    campaign TEXT PRIMARY KEY, request_sha256 TEXT NOT NULL, plan_json TEXT NOT NULL
) STRICT;
"""
    + ROUND_SCHEMA
)  # the very text is part of the format: `check_form` compares it


def link_of(key: bytes, previous: str, entry: tuple[int, str, str, str, float]) -> str:
    """An entry's link: HMAC-SHA256 of the one before and of all that it says."""
    return hmac.digest(key, json.dumps([previous, *entry]).encode(), "sha256").hex()


def check_form(connection: sqlite3.Connection) -> None:
    """Whether these are a ledger's tables and nothing else.

    Raises:
        LedgerError: they are not.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise LedgerError(f"expected a ledger of format {FORMAT}, found format {version}, or no ledger")
    if _tables(connection) != _expected_tables():  # a trigger or a view would say one thing now and another thing later
        raise LedgerError("the ledger's tables were altered: restore it; it is never repaired")


def check_rows(connection: sqlite3.Connection, key: bytes, rounds: Mapping[tuple[str, str], str]) -> None:
    """Whether the chain is whole, and every row is as its last entry says.

    Args:
        connection: to the file.
        key: of the chain.
        rounds: the hashes of the secure sum's rows, by kind and name.

    Raises:
        LedgerError: something was altered.
    """
    if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:  # an index that lost a row would hide a request
        raise LedgerError("the ledger's file was altered: restore it; it is never repaired")
    link, said = GENESIS, dict[tuple[str, str], str]()
    rows = connection.execute("SELECT seq, kind, subject, detail, at, link FROM entry ORDER BY seq")
    for position, row in enumerate(rows, start=1):
        link = link_of(key, link, row[:5])
        if row[0] != position or not hmac.compare_digest(row[5], link):
            raise LedgerError(f"the ledger was altered at entry {position}, or is of another data key: restore it")
        if row[1] not in EVENTS and row[1] != "created":
            said[row[1], row[2]] = row[3]
    found = {**dict(_hashes(connection)), **rounds}
    if link == GENESIS or found != said:
        wrong = sorted(one for one in found.keys() | said.keys() if found.get(one) != said.get(one))
        kind, subject = wrong[0] if wrong else ("created", "ledger")
        raise LedgerError(f"the ledger was altered in what it says of {kind} {subject}: restore it; it is never repaired")


def _hashes(connection: sqlite3.Connection) -> Iterator[tuple[tuple[str, str], str]]:
    """Of every row, as its last entry must have it."""
    for row in connection.execute("SELECT * FROM campaign"):
        yield ("join", row[0]), digest_of(*row)
    for row in connection.execute("SELECT * FROM waiting"):
        yield ("wait", row[0]), digest_of(*row)
    for row in connection.execute("SELECT * FROM dataset"):
        yield ("dataset", str(row[0])), digest_of(*row)
    query = "SELECT request_id, request_sha256, campaign, stage, partition, event, count, dataset, reply, number FROM release"
    for row in connection.execute(query):
        yield ("reserve", row[0]), digest_of(row[9], *release_fields(Release(*row[:8])))
        if row[8] is not None:
            yield ("settle", row[0]), hashlib.sha256(row[8]).hexdigest()


def _tables(connection: sqlite3.Connection) -> list[tuple[str | None, ...]]:
    """Tables, indices, triggers, views as they were written, but for spaces."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
    return [(*row[:3], row[3] and " ".join(row[3].split())) for row in rows]


@cache
def _expected_tables() -> list[tuple[str | None, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _tables(connection)


def campaign_fields(row: CampaignRow) -> tuple[str | int | bytes, ...]:
    """As its table has it."""
    models = json.dumps(row.models, sort_keys=True)
    public = (row.campaign, row.site, row.request_sha256, row.plan_json, models, row.dataset)
    return (*public, row.round_key, row.reply, row.graph_commitment)


def campaign_of(row: tuple[str, str, str, str, str, int, bytes, bytes, str]) -> CampaignRow:
    """The inverse of `campaign_fields`."""
    return CampaignRow(row[0], row[2], row[3], json.loads(row[4]), row[6], row[7], row[8], row[1], row[5])


def release_fields(release: Release) -> tuple[str, str, str, str, str, str, int, int]:
    """As its table has it, without its number and reply."""
    r = release
    return (r.request_id, r.request_sha256, r.campaign, r.stage, r.partition, r.event, r.count, r.dataset)


@contextmanager
def mapped(path: Path | None = None) -> Iterator[None]:
    """SQLite's errors and unreadable rows as ours."""
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        raise LedgerError(f"the ledger{f' {path}' if path else ''} cannot be used: {error}") from None
