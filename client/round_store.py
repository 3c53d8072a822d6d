"""What a site keeps of the secure sum's rounds, on disk before any answer leaves: a round only ever moves forward.

Three tables in a SQLite file of the site's own: in its ledger for Urna's campaigns, in a file by itself for `flower_mod`.

Covered:
    * a restart at any point: a round that was uploaded, answered for one alive list, or given up stays so;
    * a repeated unmask request gets the same bytes;
    * in a ledger: altered rows and older copies, as for all that a ledger says.
Not covered:
    * in a file by itself: a restored older copy of it.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.privacy.secure_sum import Context, Progress
from urna.protocol.errors import LedgerError, ProtocolError, ReplayError
from urna.protocol.messages import Member
from urna.protocol.quorum import Quorum

BUSY_TIMEOUT_SECONDS = 30
SCHEMA = """
CREATE TABLE secure_round (
    round_id TEXT PRIMARY KEY, campaign TEXT NOT NULL, context_json TEXT, context_sha256 TEXT NOT NULL,
    alive_sha256 TEXT NOT NULL, burnt INTEGER NOT NULL, audited TEXT NOT NULL, answer_to TEXT NOT NULL, answer BLOB
) STRICT;
CREATE TABLE secure_setup (campaign TEXT PRIMARY KEY, commitments_json TEXT NOT NULL) STRICT;
CREATE TABLE secure_campaign (campaign TEXT PRIMARY KEY, private_key BLOB NOT NULL) STRICT;
"""
Audited = Literal["", "opened", "aborted", "unproven"]  # what the operator has shown of a round; "unproven": it says aborted


@dataclass(frozen=True)
class KeptRound:
    """One round as this site knows it."""

    campaign: str
    context: Context | None  # None: given up before any upload
    progress: Progress
    audited: Audited = ""
    answer_to: str = ""  # hash of the unmask request that was answered
    answer: bytes | None = None  # and the very bytes


class RoundStore:
    """The tables; each write is durable when it returns, or when the transaction around it ends.

    Args:
        connection: to a file that has them.
        append: told of each row that is written: its kind, its name, its hash.
        transaction: of whoever else writes into the same file.
        mutex: held by a thread during its transaction.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        append: Callable[[str, str, str], None] | None = None,
        transaction: Callable[[], AbstractContextManager[None]] | None = None,
        mutex: AbstractContextManager[object] | None = None,
    ) -> None:
        self._db = connection
        self._append = append or _not_told
        self._transaction = transaction or self._own_transaction
        self._mutex = mutex or threading.RLock()

    @staticmethod
    def open(path: Path) -> "RoundStore":
        """Open (or make) a file by itself, readable by its owner alone.

        Raises:
            LedgerError: the disk refuses, or it is another file.
        """
        try:
            path.touch(mode=0o600)
            connection = connect(path)
            for statement in SCHEMA.split(";")[:-1]:
                connection.execute(statement.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
            return RoundStore(connection)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"the rounds of {path} cannot be kept: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def private_key(self, campaign: str) -> X25519PrivateKey:
        """This site's round key of a campaign; made and kept now if there is none."""
        query = "SELECT private_key FROM secure_campaign WHERE campaign = ?"
        with _mapped(), self._transaction():
            row = self._db.execute(query, (campaign,)).fetchone()
            if row is None:
                row = (X25519PrivateKey.generate().private_bytes_raw(),)
                self._db.execute("INSERT INTO secure_campaign VALUES (?, ?)", (campaign, *row))
                self._append("round-key", campaign, digest_of(campaign, *row))
        return X25519PrivateKey.from_private_bytes(row[0])

    def setup(self, campaign: str) -> dict[str, str]:
        """The members' graph commitments as they were fixed; empty before that."""
        with self._mutex, _mapped():
            row = self._db.execute("SELECT commitments_json FROM secure_setup WHERE campaign = ?", (campaign,)).fetchone()
            return {} if row is None else dict(json.loads(row[0]))

    def keep_setup(self, campaign: str, commitments: Mapping[str, str]) -> None:
        """Fix the members' graph commitments of a campaign, once.

        Raises:
            ReplayError: others were fixed before.
        """
        with _mapped(), self._transaction():
            fixed = self.setup(campaign)
            if not fixed:
                row = (campaign, json.dumps(dict(commitments), sort_keys=True))
                self._db.execute("INSERT INTO secure_setup VALUES (?, ?)", row)
                self._append("setup", campaign, digest_of(*row))
                fixed = dict(commitments)
        if fixed != dict(commitments):
            raise ReplayError(f"the members of {campaign} were fixed before, with others: this site's nonce is told once")

    def find(self, round_id: str) -> KeptRound | None:
        """What is kept of a round."""
        with self._mutex, _mapped():
            row = self._db.execute("SELECT * FROM secure_round WHERE round_id = ?", (round_id,)).fetchone()
            return None if row is None else _kept(row)

    def keep(self, round_id: str, kept: KeptRound) -> None:
        """Write how far a round is; it never moves back.

        Raises:
            RuntimeError: what is kept already is further.
        """
        with _mapped(), self._transaction():
            old = self.find(round_id)
            if old is not None and _moves_back(old, kept):
                raise RuntimeError(f"round {round_id} cannot go back from {old.progress} to {kept.progress}")
            if old == kept:  # a request that was delivered again writes nothing
                return
            context = None if kept.context is None else _context_json(kept.context)
            progress = kept.progress
            begun = (round_id, kept.campaign, context, progress.context, progress.alive_sha256, int(progress.burnt))
            row = (*begun, kept.audited, kept.answer_to, kept.answer)
            self._db.execute("INSERT OR REPLACE INTO secure_round VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            self._append("round", round_id, digest_of(*row))

    def digests(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Kind, name and hash of every row, as `append` was last told of it."""
        for kind, table in (("round", "secure_round"), ("setup", "secure_setup"), ("round-key", "secure_campaign")):
            for row in self._db.execute(f"SELECT * FROM {table}"):
                yield (kind, row[0]), digest_of(*row)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """All that is written inside is on disk when this ends, or nothing; no other process writes meanwhile.

        Raises:
            LedgerError: the disk refuses.
        """
        try:
            with self._transaction():
                yield
        except sqlite3.Error as error:
            raise LedgerError(f"the rounds that this site keeps cannot be used: {error}") from None

    @contextmanager
    def _own_transaction(self) -> Iterator[None]:
        with self._mutex:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def progress(self, campaign: str) -> dict[str, Progress]:
        """Of all rounds of a campaign, for a `SiteRole`."""
        query = "SELECT round_id, context_sha256, alive_sha256, burnt FROM secure_round WHERE campaign = ?"
        with self._mutex, _mapped():
            rows = self._db.execute(query, (campaign,)).fetchall()
        return {row[0]: Progress(row[1], row[2], bool(row[3])) for row in rows}

    def unaudited(self, campaign: str) -> dict[str, KeptRound]:
        """The rounds whose unmask this site answered and that it has not been shown the end of."""
        query = "SELECT * FROM secure_round WHERE campaign = ? AND alive_sha256 != '' AND audited = '' ORDER BY rowid"
        with self._mutex, _mapped():
            return {row[0]: _kept(row) for row in self._db.execute(query, (campaign,)).fetchall()}

    def set_audited(self, round_id: str, audited: Audited) -> None:
        """What became of a round has been shown; one that was given up is burnt."""
        kept = self.find(round_id)
        assert kept is not None  # it came from `unaudited`
        progress = kept.progress if audited == "opened" else replace(kept.progress, burnt=True)
        self.keep(round_id, replace(kept, audited=audited, progress=progress))

    def num_unproven(self, campaign: str) -> int:
        """How many rounds that this site had answered the operator gave up without proof."""
        query = "SELECT COUNT(*) FROM secure_round WHERE campaign = ? AND audited = 'unproven'"
        with self._mutex, _mapped():
            return int(self._db.execute(query, (campaign,)).fetchone()[0])


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A SQLite file whose writes are on disk when they return."""
    if read_only:
        uri = f"file:{quote(str(path.resolve()))}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_SECONDS, check_same_thread=False)
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_SECONDS, check_same_thread=False)
    # NORMAL lets bytes leave before the write is on disk; after FULL a power cut may bring the deleted journal, and with it
    # the file before the write, back
    connection.execute("PRAGMA synchronous=EXTRA")
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA secure_delete=ON")
    return connection


def digest_of(*row: str | bytes | int | None) -> str:
    """SHA-256 of a row, each field by its type and length, so that no two rows give the same bytes."""
    hasher = hashlib.sha256()
    for field in row:
        raw = field if isinstance(field, bytes) else json.dumps(field).encode()
        hasher.update(f"{type(field).__name__}:{len(raw)}:".encode())
        hasher.update(raw)
    return hasher.hexdigest()


def _not_told(_kind: str, _name: str, _digest: str) -> None:
    """In a file by itself there is no chain to append to."""


def _moves_back(old: KeptRound, new: KeptRound) -> bool:
    before, after = old.progress, new.progress
    return (
        (before.context not in ("", after.context))
        or (before.alive_sha256 not in ("", after.alive_sha256))
        or (before.burnt and not after.burnt)
        or (old.audited not in ("", new.audited))
        or (old.answer is not None and old.answer != new.answer)
    )


def _context_json(context: Context) -> str:
    return json.dumps(
        {
            **{name: getattr(context, name) for name in ("campaign", "round_id", "size", "num_scalars", "ring_bits")},
            "cohort": [member.model_dump() for member in context.cohort],
            "quorum": asdict(context.quorum),
            "graph_seed": context.graph_seed.hex(),
            "request_sha256": context.request_sha256,
        }
    )


def _kept(row: tuple[str, str, str | None, str, str, int, str, str, bytes | None]) -> KeptRound:
    context = None
    if row[2] is not None:
        value = json.loads(row[2])
        cohort = tuple(Member.model_validate(member) for member in value.pop("cohort"))
        quorum, seed = Quorum(**value.pop("quorum")), bytes.fromhex(value.pop("graph_seed"))
        context = Context(cohort=cohort, quorum=quorum, graph_seed=seed, **value)
    return KeptRound(row[1], context, Progress(row[3], row[4], bool(row[5])), cast("Audited", row[6]), row[7], row[8])


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, KeyError, ProtocolError) as error:
        raise LedgerError(f"the rounds that this site keeps cannot be used: {error}") from None
