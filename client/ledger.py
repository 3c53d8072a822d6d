"""A site's durable record of everything that left it, and of nothing else.

Reserve, do, settle: a release is written, and on disk, before its bytes exist outside this process; the exact bytes are
kept, so a repeated request gets the same bytes and spends nothing. A crash between the two over-counts or repeats the
work under the same reservation; it never under-counts.

Every write appends an entry to one chain (HMAC-SHA256, keyed by the site's data key): releases, replies, campaigns, rounds of
the secure sum, data sets, a person's decisions. The chain's head goes to the `anchor` before anything leaves, and with every
reply to the operator, who shows it again with the next request.

Covered:
    * crash at any point; replays; a known request id with other content;
    * a ledger that is missing, cut off, re-ordered or altered in anything that it says, also by someone who knows the format;
    * an older copy of it: noticed by the anchor, or, where that is older too, when the operator shows a newer head;
      from then on nothing is released any more;
    * two processes at once (a lock, held by a runner all its life where the vault is its own);
    * a file that is exchanged under a running process;
    * the same records under another name, as a copy or a part, or through a second node: all that share records share a budget.
Not covered:
    * whoever has the data key and both files: a site can always lie to itself;
    * an older copy of ledger and anchor, together with an operator or relay who hides the newer head;
    * the same records under another ledger: nodes that hold the same records must share one (``[vault]``).
"""

import hashlib
import hmac
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from urna.client.anchor import Anchored, read_anchor, sync_folder, write_anchor
from urna.client.file_lock import FileLock
from urna.client.ledger_file import (
    FORMAT,
    GENESIS,
    SCHEMA,
    campaign_fields,
    campaign_of,
    check_form,
    check_rows,
    link_of,
    mapped,
    release_fields,
)
from urna.client.ledger_rows import EVENTS, CampaignRow, Event, Noted, Release, Waiting, Written
from urna.client.round_store import RoundStore, connect, digest_of
from urna.client.sketch import Charged, Sketch, charged_with
from urna.protocol.errors import LedgerError, ReplayError, RollbackError
from urna.protocol.messages import SpentRow

LOCK_TIMEOUT_SECONDS = 30.0
MAX_PLANS_OF_A_CAMPAIGN = 100  # that are kept for a person, one after the other
_OTHER = {"tuning": "heldout", "heldout": "tuning"}


class Ledger:
    """The SQLite file with its anchor; open it with `create` or `open`.

    Attributes:
        timeout_seconds: how long a write waits for another process of this site.
    """

    def __init__(
        self, connection: sqlite3.Connection, path: Path, key: bytes, anchor: Path, *, read_only: bool = False
    ) -> None:
        self._db = connection
        self._read_only = read_only
        self._behind = False  # there is an entry that the anchor may not have, or that may not be on disk
        self._seen = 0  # SQLite's number of what other connections wrote, when all was last checked
        self._path = path
        self._key = _chain_key(key)
        self._anchor = anchor
        self._inode = path.stat().st_ino
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        self._mutex = threading.RLock()  # a runner's control socket reads and notes in threads of its own
        self._sketches: dict[int, Sketch] = {}
        self.timeout_seconds = LOCK_TIMEOUT_SECONDS
        self.rounds = RoundStore(connection, self._append, self._transaction, self._mutex)

    @staticmethod
    def create(path: Path, key: bytes, anchor: Path | None = None) -> "Ledger":
        """Make an empty ledger: an explicit act, once for each body of records.

        Args:
            path: of the file.
            key: the data key, 32 bytes; the chain is keyed by it.
            anchor: another file, best on another disk; beside the ledger if it is not given.

        Raises:
            LedgerError: there is one already, or an anchor of one, or the disk refuses.
        """
        anchor = anchor or path.with_suffix(".anchor")
        if anchor.exists():
            raise LedgerError(f"{anchor} exists: there was a ledger here; restore it, a lost ledger is not a new budget")
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            raise LedgerError(f"{path} exists: a ledger is made once and kept for ever") from None
        with mapped(path):
            connection = connect(path)
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;")
            ledger = Ledger(connection, path, key, anchor)
            with ledger._transaction():
                ledger._append("created", os.urandom(16).hex(), str(FORMAT))
        return ledger

    @staticmethod
    def open(path: Path, key: bytes, anchor: Path | None = None, *, read_only: bool = False) -> "Ledger":
        """Open an existing ledger; check its chain, all that it says, and that it is not older than its anchor.

        Args:
            path: of the file.
            key: the data key.
            anchor: as it was created with.
            read_only: for a look while a runner works; nothing can be written then.

        Raises:
            LedgerError: it is missing (which is never read as "nothing spent"), altered, or no ledger.
            RollbackError: it is older than its anchor.
        """
        anchor = anchor or path.with_suffix(".anchor")
        if not path.is_file():
            raise LedgerError(f"expected the ledger at {path}, found nothing: restore it; a lost ledger is not a new budget")
        with mapped(path):
            connection = connect(path, read_only=read_only)
            try:
                ledger = Ledger(connection, path, key, anchor, read_only=read_only)
                with ledger.view():  # another process may write meanwhile
                    ledger._check()
            except BaseException:
                connection.close()
                raise
        if not read_only:
            sync_folder(ledger._anchor.parent)  # a crash may have come between its renaming and that
        return ledger

    @staticmethod
    def renew_anchor(path: Path, key: bytes, anchor: Path) -> None:
        """Make a new anchor where the old one is lost for good: a person's explicit act, which the ledger records.

        Raises:
            LedgerError: there is an anchor, or see `open`.
        """
        if anchor.exists():
            raise LedgerError(f"{anchor} exists: only a lost anchor is made anew")
        if not path.is_file():
            raise LedgerError(f"expected the ledger at {path}, found nothing: restore it; a lost ledger is not a new budget")
        with mapped(path), closing(connect(path)) as connection:
            ledger = Ledger(connection, path, key, anchor)
            with ledger.view():
                ledger._check(anchored=False)
            write_anchor(anchor, ledger._key, ledger._anchored())
            ledger.note("anchor", "renewed")

    def close(self) -> None:
        """Close the file, and let others use it."""
        self._db.close()
        self._lock.drop()

    def hold(self) -> None:
        """Keep every other process of this site from writing, until `close`: for a process that lives long.

        Raises:
            LedgerError: another process has it now.
        """
        self._lock.acquire(0)

    # ---- the chain

    @property
    def id(self) -> str:
        """What this ledger is called, since it was made."""
        with self._reading():
            return self._anchored().ledger_id

    def head(self) -> tuple[int, str]:
        """The last entry of the chain: its number and link; what follows later is appended to it.

        Raises:
            LedgerError: the disk refuses, also what a crash left to be anchored.
        """
        with self._reading():
            self._catch_up()
            return self._last()

    def check_head(self, seq: int, link: str) -> None:
        """Whether this ledger still holds an entry that it showed before; if not, it releases nothing any more.

        Raises:
            RollbackError: it does not: this is an older copy, or another.
        """
        if not self._holds(seq, link):
            if self.noted("stop") is None:
                self.note("stop", "rollback", seq=str(seq), link=link)
            raise RollbackError(
                f"expected entry {seq} as this ledger showed it before, found an older or another one: restore the newest copy"
            )

    def note(self, event: Event, subject: str, **detail: str) -> None:
        """Append what happened, durably.

        Raises:
            LedgerError: the disk refuses.
        """
        with self._writing():
            self._append(event, subject, json.dumps(detail, sort_keys=True))

    def noted(self, *events: Event, subject: str | None = None) -> Noted | None:
        """The last of some events, of one subject or of any."""
        every = self.all_noted(*events, subject=subject)
        return every[-1] if every else None

    def all_noted(self, *events: Event, subject: str | None = None) -> tuple[Noted, ...]:
        """Some events, in order."""
        marks = ", ".join("?" * len(events))
        query = (
            f"SELECT kind, subject, detail, at FROM entry WHERE kind IN ({marks}) AND (? IS NULL OR subject = ?) ORDER BY seq"
        )
        with self._reading():
            rows = self._db.execute(query, (*events, subject, subject)).fetchall()
            return tuple(Noted(row[0], row[1], json.loads(row[2]), row[3]) for row in rows)

    @contextmanager
    def view(self) -> Iterator[None]:
        """All that is read inside is of one moment, whatever another process writes meanwhile.

        Raises:
            LedgerError: the file cannot be read, or something is written inside.
        """
        with self._reading():
            self._db.execute("BEGIN")
            self._db.execute("PRAGMA query_only=ON")
            try:
                yield
            finally:
                self._db.execute("PRAGMA query_only=OFF")
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    # ---- campaigns

    def join(self, row: CampaignRow) -> CampaignRow:
        """Keep what a campaign needs; joining again gives back what was kept.

        Raises:
            ReplayError: the campaign is known with another opening request, or through another node of this ledger.
        """
        with self._writing():
            kept = self.campaign(row.campaign)
            if kept is None:
                fields = campaign_fields(row)
                self._db.execute("INSERT INTO campaign VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", fields)
                self._append("join", row.campaign, digest_of(*fields))
                kept = row
        if kept.request_sha256 != row.request_sha256 or kept.site != row.site:
            raise ReplayError(f"campaign {row.campaign} is known here with another opening request, or through another node")
        return kept

    def campaign(self, campaign: str) -> CampaignRow | None:
        """What is kept of a campaign, if this site joined it."""
        with self._reading():
            row = self._db.execute("SELECT * FROM campaign WHERE campaign = ?", (campaign,)).fetchone()
            return None if row is None else campaign_of(row)

    def campaigns(self) -> tuple[CampaignRow, ...]:
        """All that this site joined, in order."""
        with self._reading():
            query = "SELECT campaign.* FROM campaign JOIN entry ON kind = 'join' AND subject = campaign ORDER BY seq"
            return tuple(campaign_of(row) for row in self._db.execute(query).fetchall())

    def joined_at(self, campaign: str) -> float:
        """When this site joined a campaign: seconds since 1970, by this machine's clock.

        Raises:
            LedgerError: it never did.
        """
        with self._reading():
            row = self._db.execute("SELECT at FROM entry WHERE kind = 'join' AND subject = ?", (campaign,)).fetchone()
        if row is None:
            raise LedgerError(f"expected a campaign that this site joined, found none called {campaign!r}")
        return float(row[0])

    def wait(self, waiting: Waiting) -> None:
        """Keep a campaign that a person must decide on; another plan of the same name replaces it, and needs its own decision.

        Only so often: whoever delivers two old requests in turn would fill the disk.

        Raises:
            LedgerError: the disk refuses.
        """
        fields = (waiting.campaign, waiting.request_sha256, waiting.plan_json)
        count = "SELECT COUNT(*) FROM entry WHERE kind = 'wait' AND subject = ?"
        with self._writing():
            (times,) = self._db.execute(count, (waiting.campaign,)).fetchone()
            if waiting not in self.waiting() and times < MAX_PLANS_OF_A_CAMPAIGN:
                self._db.execute("INSERT OR REPLACE INTO waiting VALUES (?, ?, ?)", fields)
                self._append("wait", waiting.campaign, digest_of(*fields))

    def waiting(self) -> tuple[Waiting, ...]:
        """Every campaign that was ever kept for a person's decision; `noted` says what became of it."""
        with self._reading():
            query = "SELECT waiting.* FROM waiting JOIN entry ON kind = 'wait' AND subject = campaign GROUP BY campaign"
            return tuple(Waiting(*row) for row in self._db.execute(query + " ORDER BY MAX(seq)").fetchall())

    # ---- releases

    def find(self, request_id: str, request_sha256: str) -> bytes | Literal["reserved"] | None:
        """What this ledger holds for a request: the released bytes, a bare reservation, or nothing.

        Raises:
            ReplayError: the id is known with other content.
            LedgerError: the disk refuses, also what a crash left to be anchored.
        """
        with self._reading():
            row = self._db.execute("SELECT request_sha256, reply FROM release WHERE request_id = ?", (request_id,)).fetchone()
            if row is None:
                return None
            if row[0] != request_sha256:
                raise ReplayError(f"request {request_id} is known here with other content: refused")
            if row[1] is None:
                return "reserved"
            self._catch_up()
            return bytes(row[1])

    def reserved_for(self, request_id: str) -> int:
        """The data set that a release was charged to.

        Raises:
            LedgerError: there is no such release.
        """
        with self._reading():
            row = self._db.execute("SELECT dataset FROM release WHERE request_id = ?", (request_id,)).fetchone()
        if row is None:
            raise LedgerError(f"expected a release of id {request_id}, found none")
        return int(row[0])

    def holdout_fractions(self) -> frozenset[float]:
        """How the campaigns that released anything split the records: parallel composition holds for one split only."""
        query = "SELECT plan_json FROM campaign WHERE campaign IN (SELECT campaign FROM release)"
        with self._reading():
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

    def reserve(self, release: Release) -> None:
        """Write the release, durably (within `exclusive`: when that ends), before anything is computed for it.

        Raises:
            LedgerError: the disk refuses, or the request id is taken.
            RollbackError: this ledger was found to be an older copy.
        """
        with self._writing():
            fields = release_fields(release)
            written = self._db.execute(
                "INSERT INTO release (request_id, request_sha256, campaign, stage, partition, event, count, dataset)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                fields,
            )
            self._append("reserve", release.request_id, digest_of(written.lastrowid, *fields))

    def settle(self, request_id: str, reply: bytes) -> None:
        """Keep the exact bytes that will leave, durably (within `exclusive`: when that ends), before they do.

        Raises:
            RuntimeError: no open reservation of this id.
            LedgerError: the disk refuses.
            RollbackError: this ledger was found to be an older copy.
        """
        with self._writing():
            changed = self._db.execute(
                "UPDATE release SET reply = ? WHERE request_id = ? AND reply IS NULL", (reply, request_id)
            )
            if changed.rowcount != 1:
                raise RuntimeError(f"settle needs an open reservation, found none for {request_id}")
            self._append("settle", request_id, hashlib.sha256(reply).hexdigest())

    def rows(self, campaign: str | None = None, dataset: int | None = None) -> tuple[SpentRow, ...]:
        """Everything released, equal events of a stage merged.

        Args:
            campaign: of this campaign only.
            dataset: what records of this data set may be in: releases of it, and of those that share records with it; those of
                renamed records on both sides of the split, for nobody knows on which side they were.
        """
        charged = self.charged(dataset) if dataset else None
        query = "SELECT stage, partition, event, SUM(count) FROM release WHERE (?1 IS NULL OR campaign = ?1)"
        order = " GROUP BY stage, partition, event ORDER BY MIN(number)"
        with self._reading():
            every = query + ("" if charged is None else _among(charged.sharing | {0}))  # 0: of no registered one, so of any
            found = self._db.execute(every + order, (campaign,)).fetchall()
            moved = query + _among(charged.renamed if charged else frozenset())
            again = self._db.execute(moved + order, (campaign,)).fetchall()
            both = [*found, *((row[0], _OTHER[row[1]], *row[2:]) for row in again)]
            return tuple(SpentRow(stage=row[0], partition=row[1], event=row[2], count=row[3]) for row in both)

    def releases(self, campaign: str | None = None) -> tuple[Written, ...]:
        """Every single release (of one campaign), in order."""
        query = (
            "SELECT request_id, request_sha256, campaign, stage, partition, event, count, dataset, entry.at, settled.detail"
            " FROM release JOIN entry ON entry.kind = 'reserve' AND entry.subject = request_id"
            " LEFT JOIN entry AS settled ON settled.kind = 'settle' AND settled.subject = request_id"
            " WHERE ?1 IS NULL OR campaign = ?1 ORDER BY number"
        )
        with self._reading():
            return tuple(Written(Release(*row[:8]), row[8], row[9]) for row in self._db.execute(query, (campaign,)).fetchall())

    # ---- data sets

    def register(self, name: str, sketch: Sketch) -> int:
        """The number of a data set, by its records and not by its name; a new one if these were never seen as they are now.

        Raises:
            LedgerError: the disk refuses.
        """
        raw = sketch.to_bytes()
        with self._writing():
            known = self._db.execute("SELECT id FROM dataset WHERE sketch = ?", (raw,)).fetchone()
            if known is not None:
                return int(known[0])
            number = 1 + int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM dataset").fetchone()[0])
            self._db.execute("INSERT INTO dataset VALUES (?, ?, ?)", (number, name, raw))
            self._append("dataset", str(number), digest_of(number, name, raw))
        return number

    def datasets(self) -> tuple[int, ...]:
        """The numbers of all that were registered."""
        with self._reading():
            return tuple(int(row[0]) for row in self._db.execute("SELECT id FROM dataset ORDER BY id").fetchall())

    def charged(self, dataset: int) -> Charged:
        """The data sets whose releases the records of this one were in, or may have been."""
        with self._reading():
            for number, raw in self._db.execute("SELECT id, sketch FROM dataset").fetchall():
                if number not in self._sketches:
                    self._sketches[number] = Sketch.from_bytes(raw)
            if dataset not in self._sketches:
                raise LedgerError(f"expected data set {dataset} in the ledger, found none")
            return charged_with(dataset, self._sketches)

    # ---- how it is kept

    def _append(self, kind: str, subject: str, detail: str) -> None:
        """One more entry; within a transaction."""
        if kind not in EVENTS and self._is_stopped():
            raise RollbackError("this ledger was shown to be an older copy: restore the newest; nothing is released from it")
        last, previous = self._last()
        entry = (last + 1, kind, subject, detail, time.time())
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)", (*entry, link_of(self._key, previous, entry)))

    def _holds(self, seq: int, link: str) -> bool:
        with self._reading():
            row = self._db.execute("SELECT link FROM entry WHERE seq = ?", (seq,)).fetchone()
        return row is not None and hmac.compare_digest(row[0], link)

    def _anchored(self) -> Anchored:
        (ledger_id,) = self._db.execute("SELECT subject FROM entry WHERE seq = 1").fetchone()
        return Anchored(ledger_id, *self._last())

    def _last(self) -> tuple[int, str]:
        last = self._db.execute("SELECT seq, link FROM entry ORDER BY seq DESC LIMIT 1").fetchone()
        return (int(last[0]), str(last[1])) if last else (0, GENESIS)

    def _is_stopped(self) -> bool:
        return self._db.execute("SELECT 1 FROM entry WHERE kind = 'stop'").fetchone() is not None

    def _catch_up(self) -> None:
        """Before anything leaves: what a crash or a full disk left on its way to disk or anchor gets there.

        With one more entry, so that SQLite syncs all again: an error may have come after the file was written.
        """
        if self._behind and not self._read_only and not self._db.in_transaction and not self._is_stopped():
            self.note("anchor", "caught up")

    def _check_anchor(self) -> None:
        anchored, own = read_anchor(self._anchor, self._key), self._anchored()
        if anchored.ledger_id != own.ledger_id:
            raise LedgerError(f"the anchor {self._anchor} is of another ledger: restore the one that belongs to it")
        if not self._holds(anchored.seq, anchored.link):
            raise RollbackError(
                f"expected the ledger with entry {anchored.seq} as its anchor says, found an older one that ends at {own.seq}: "
                "restore the newest; nothing is released"
            )
        self._behind = self._behind or anchored.seq != own.seq

    def _check(self, *, anchored: bool = True) -> None:
        """Everything that this ledger says was written by it, in this order, and nothing is missing."""
        check_form(self._db)
        (self._seen,) = self._db.execute("PRAGMA data_version").fetchone()
        check_rows(self._db, self._key, dict(self.rounds.digests()))
        if anchored:
            self._check_anchor()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._mutex, mapped():
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._reading(), self._transaction():
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it is on disk and anchored when this ends, or nothing of it; other threads wait."""
        with self._mutex:
            if self._db.in_transaction:  # `exclusive` began it, in this thread, and ends it
                yield
            else:
                with self._new_transaction():
                    yield

    @contextmanager
    def _new_transaction(self) -> Iterator[None]:
        if self._read_only:
            raise LedgerError(f"the ledger {self._path} was opened for a look only")
        self._lock.acquire(self.timeout_seconds)
        try:
            self._check_in_place()
            with self._committed():
                yield
        finally:
            self._lock.release()

    @contextmanager
    def _committed(self) -> Iterator[None]:
        before: int | None = None
        behind = self._behind
        try:
            with mapped():
                self._db.execute("BEGIN IMMEDIATE")
                before = self._check_before()
                behind = self._behind
            yield
            with mapped():
                changed = self._last()[0] != before
                self._behind = self._behind or changed  # until it is anchored, whatever comes between
                self._db.execute("COMMIT")
        except BaseException:
            self._undo(before, behind)
            raise
        if changed and not self._is_stopped():  # or the anchor would say that this older copy is the newest
            with mapped():
                # SQLite syncs it too, but says nothing when it could not open it
                sync_folder(self._path.parent)
                write_anchor(self._anchor, self._key, self._anchored())
            self._behind = False

    def _check_before(self) -> int:
        """What can have changed under this process since its last look.

        Returns:
            The last entry's number; 0: this ledger is being created.
        """
        last = self._last()[0]
        if last and self._db.execute("PRAGMA data_version").fetchone() != (self._seen,):
            self._check()  # another connection wrote, or the file was overwritten in place
        elif last:
            self._check_anchor()
        return last

    def _undo(self, before: int | None, behind: bool) -> None:
        """Roll back, also after a commit that failed: what is not on disk must not be read back."""
        with mapped():
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            # an error can come after the file was written
            self._behind = behind or (before is not None and self._last()[0] != before)

    def _check_in_place(self) -> None:
        """Whether the file at the path still is the one that was opened: else writes would go to a deleted one."""
        try:
            here = self._path.stat().st_ino
        except OSError:
            here = None
        if here != self._inode:
            raise RollbackError(f"the ledger at {self._path} was exchanged while open: restore the newest copy, then restart")


def _chain_key(data_key: bytes) -> bytes:
    return hmac.digest(data_key, b"urna/2 ledger chain", "sha256")


def _among(datasets: frozenset[int]) -> str:
    return f" AND dataset IN ({', '.join(map(str, sorted(datasets)))})"
