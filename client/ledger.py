"""A site's durable record of everything that left it, and of nothing else.

Reserve, do, settle: a release is written, and on disk, before its bytes exist outside this process; the exact bytes are
kept, so a repeated request gets the same bytes and spends nothing. A crash between the two over-counts or repeats the
work under the same reservation; it never under-counts.

Covered:
    * crash at any point; replays; a known request id with other content; a ledger that is missing, re-ordered, altered in a
      reservation or a reply, or that lacks a row before its last (each row is chained to the one before by SHA-256);
    * two processes at once (SQLite's lock; what a reservation was decided on cannot change before it is written).
Not covered (yet):
    * rows cut off at the end, a restored older copy of the whole file, and whoever writes a new chain on purpose (needs the
      signed head echoed by the operator and a second anchor);
    * the same records under another ledger (needs the keyed sketch of record ids).
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from urna.client.round_store import RoundStore, connect
from urna.privacy.accounting import event_from_json
from urna.protocol.errors import LedgerError, ReplayError, RollbackError
from urna.protocol.messages import Partition, SpentRow, Stage

GENESIS = "0" * 64
SCHEMA = """
CREATE TABLE campaign (
    campaign TEXT PRIMARY KEY, request_sha256 TEXT NOT NULL, plan_json TEXT NOT NULL, models_json TEXT NOT NULL,
    round_key BLOB NOT NULL, reply BLOB NOT NULL, graph_commitment TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE release (
    seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, request_sha256 TEXT NOT NULL, campaign TEXT NOT NULL,
    stage TEXT NOT NULL, partition TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL CHECK (count > 0),
    reserved_at REAL NOT NULL, link TEXT NOT NULL, reply BLOB, reply_link TEXT CHECK ((reply IS NULL) = (reply_link IS NULL))
) STRICT;
"""


@dataclass(frozen=True)
class Release:
    """What a reservation says: ``count`` events of one kind, on one partition of the records."""

    request_id: str
    request_sha256: str
    campaign: str
    stage: Stage
    partition: Partition
    event: str  # JSON, see `accounting`
    count: int = 1

    def __post_init__(self) -> None:
        event_from_json(self.event)  # an event that cannot be accounted is refused before it is written
        if self.count < 1:
            raise ValueError(f"a release counts at least once, found {self.count}")


@dataclass(frozen=True)
class CampaignRow:
    """What a site keeps of a campaign that it joined."""

    campaign: str
    request_sha256: str
    plan_json: str
    models: dict[str, str]
    round_key: bytes  # X25519 private key, 32 bytes
    reply: bytes
    graph_commitment: str = ""  # of the operator's nonce, hex; "" in a campaign of before sparse graphs


class Ledger:
    """The SQLite file; open it with `create` or `open`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        with _mapped():
            columns = [row[1] for row in connection.execute("PRAGMA table_info(campaign)")]
            if columns and "graph_commitment" not in columns:  # a ledger of before sparse graphs
                connection.execute("ALTER TABLE campaign ADD COLUMN graph_commitment TEXT NOT NULL DEFAULT ''")
            self.rounds = RoundStore(connection)

    @staticmethod
    def create(path: Path) -> "Ledger":
        """Make an empty ledger: an explicit act, once for each site.

        Raises:
            LedgerError: there is one already, or the disk refuses.
        """
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            raise LedgerError(f"{path} exists: a ledger is made once and kept for ever") from None
        with _mapped(path):
            connection = connect(path)
            connection.executescript(SCHEMA)
        return Ledger(connection)

    @staticmethod
    def open(path: Path) -> "Ledger":
        """Open an existing ledger and check its chain.

        Raises:
            LedgerError: it is missing (which is never read as "nothing spent"), altered, or no ledger.
        """
        if not path.is_file():
            raise LedgerError(f"expected the ledger at {path}, found nothing: restore it; a lost ledger is not a new budget")
        with _mapped(path):
            connection = connect(path)
            Ledger._check_chain(connection)  # before anything is written: what is refused stays as it was
        return Ledger(connection)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def join(self, row: CampaignRow) -> CampaignRow:
        """Keep what a campaign needs; joining again gives back what was kept.

        Raises:
            ReplayError: the campaign is known with another opening request.
        """
        with _mapped(), self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO campaign (campaign, request_sha256, plan_json, models_json, round_key, reply,"
                " graph_commitment) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (row.campaign, row.request_sha256, row.plan_json, json.dumps(row.models), *_secrets(row)),
            )
        kept = self.campaign(row.campaign)
        if kept is None or kept.request_sha256 != row.request_sha256:
            raise ReplayError(f"campaign {row.campaign} is known here with another opening request")
        return kept

    def campaign(self, campaign: str) -> CampaignRow | None:
        """What is kept of a campaign, if this site joined it."""
        with _mapped():
            row = self._db.execute(
                "SELECT campaign, request_sha256, plan_json, models_json, round_key, reply, graph_commitment"
                " FROM campaign WHERE campaign = ?",
                (campaign,),
            ).fetchone()
        return None if row is None else CampaignRow(row[0], row[1], row[2], json.loads(row[3]), *row[4:])

    def find(self, request_id: str, request_sha256: str) -> bytes | Literal["reserved"] | None:
        """What this ledger holds for a request: the released bytes, a bare reservation, or nothing.

        Raises:
            ReplayError: the id is known with other content.
        """
        with _mapped():
            row = self._db.execute("SELECT request_sha256, reply FROM release WHERE request_id = ?", (request_id,)).fetchone()
        if row is None:
            return None
        if row[0] != request_sha256:
            raise ReplayError(f"request {request_id} is known here with other content: refused")
        return "reserved" if row[1] is None else bytes(row[1])

    def holdout_fractions(self) -> frozenset[float]:
        """How the campaigns that released anything split the records: parallel composition holds for one split only."""
        query = "SELECT plan_json FROM campaign WHERE campaign IN (SELECT campaign FROM release)"
        with _mapped():
            plans = [json.loads(row[0]) for row in self._db.execute(query).fetchall()]
        return frozenset(float(plan["evaluation"]["holdout_fraction"]) for plan in plans)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let no other process reserve between what is read here and what is written here.

        Raises:
            LedgerError: another process holds the ledger for too long, or the disk refuses.
        """
        with self._transaction():
            yield

    def head(self) -> tuple[int, str]:
        """The last entry of the chain: its number and link; what follows later is appended to it."""
        with _mapped():
            row = self._db.execute("SELECT seq, link FROM release ORDER BY seq DESC LIMIT 1").fetchone()
        return (0, GENESIS) if row is None else (int(row[0]), str(row[1]))

    def check_head(self, seq: int, link: str) -> None:
        """Whether this ledger still holds an entry that it showed before.

        Raises:
            RollbackError: it does not: this is an older copy, or another.
        """
        with _mapped():
            row = self._db.execute("SELECT link FROM release WHERE seq = ?", (seq,)).fetchone()
        if (GENESIS if seq == 0 else row and row[0]) != link:
            raise RollbackError(f"expected entry {seq} as this ledger showed it before, found an older or another ledger")

    def reserve(self, release: Release) -> None:
        """Write the release, durably (within `exclusive`: when that ends), before anything is computed for it.

        Raises:
            LedgerError: the disk refuses, or the request id is taken.
        """
        with _mapped(), self._transaction():
            last = self._db.execute("SELECT link FROM release ORDER BY seq DESC LIMIT 1").fetchone()
            now = time.time()
            link = _link(last[0] if last else GENESIS, *_fields(release), now)
            self._db.execute(
                "INSERT INTO release (request_id, request_sha256, campaign, stage, partition, event, count, reserved_at,"
                " link) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_fields(release), now, link),
            )

    def settle(self, request_id: str, reply: bytes) -> None:
        """Keep the exact bytes that will leave, durably (within `exclusive`: when that ends), before they do.

        Raises:
            RuntimeError: no open reservation of this id.
            LedgerError: the disk refuses.
        """
        with _mapped(), self._transaction():
            query = "SELECT link FROM release WHERE request_id = ? AND reply IS NULL"
            found = self._db.execute(query, (request_id,)).fetchone()
            if found is None:
                raise RuntimeError(f"settle needs an open reservation, found none for {request_id}")
            self._db.execute(
                "UPDATE release SET reply = ?, reply_link = ? WHERE request_id = ?",
                (reply, _link(found[0], hashlib.sha256(reply).hexdigest()), request_id),
            )

    def rows(self, campaign: str | None = None) -> tuple[SpentRow, ...]:
        """Everything released (of one campaign), equal events of a stage merged."""
        query = "SELECT stage, partition, event, SUM(count) FROM release WHERE ?1 IS NULL OR campaign = ?1"
        with _mapped():
            found = self._db.execute(query + " GROUP BY stage, partition, event ORDER BY MIN(seq)", (campaign,)).fetchall()
        return tuple(SpentRow(stage=row[0], partition=row[1], event=row[2], count=row[3]) for row in found)

    @staticmethod
    def _check_chain(db: sqlite3.Connection) -> None:
        if db.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:  # an index that lost a row would hide a request
            raise LedgerError("the ledger's file was altered: restore it; it is never repaired")
        link = GENESIS
        query = (
            "SELECT request_id, request_sha256, campaign, stage, partition, event, count, reserved_at, link, seq, reply,"
            " reply_link FROM release ORDER BY seq"
        )
        for position, row in enumerate(db.execute(query), start=1):
            link = _link(link, *_fields(Release(*row[:7])), row[7])
            reply_link = None if row[10] is None else _link(link, hashlib.sha256(row[10]).hexdigest())
            if row[8:10] != (link, position) or row[11] != reply_link:
                raise LedgerError(f"the ledger was altered at row {position}: restore it; it is never repaired")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:  # `exclusive` began it and ends it
            yield
            return
        with _mapped():
            self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            with _mapped():
                self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # also after a commit that failed: what is not on disk must not be read back
                self._db.execute("ROLLBACK")
            raise


def _secrets(row: CampaignRow) -> tuple[bytes, bytes, str]:
    return (row.round_key, row.reply, row.graph_commitment)


def _fields(release: Release) -> tuple[str, str, str, str, str, str, int]:
    r = release
    return (r.request_id, r.request_sha256, r.campaign, r.stage, r.partition, r.event, r.count)


def _link(previous: str, *fields: str | float) -> str:
    return hashlib.sha256(json.dumps([previous, *fields]).encode()).hexdigest()


@contextmanager
def _mapped(path: Path | None = None) -> Iterator[None]:
    """SQLite's errors and unreadable rows as ours."""
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        raise LedgerError(f"the ledger{f' {path}' if path else ''} cannot be used: {error}") from None
