"""What a site keeps of the secure sum's rounds, on disk before any answer leaves: a round only ever moves forward.

One table in a SQLite file of the site's own: in its ledger for Urna's campaigns, in a file by itself for `flower_mod`.

Covered:
    * a restart at any point: a round that was uploaded, answered for one alive list, or given up stays so;
    * a repeated unmask request gets the same bytes.
Not covered:
    * a restored older copy of the file: as for the ledger, that needs an anchor outside it.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.privacy.secure_sum import Context, Progress
from urna.protocol.errors import LedgerError, ProtocolError, ReplayError
from urna.protocol.messages import Member
from urna.protocol.quorum import Quorum

BUSY_TIMEOUT_SECONDS = 30
SCHEMA = """
CREATE TABLE IF NOT EXISTS secure_round (
    round_id TEXT PRIMARY KEY, campaign TEXT NOT NULL, context_json TEXT, context_sha256 TEXT NOT NULL,
    alive_sha256 TEXT NOT NULL, burnt INTEGER NOT NULL, audited TEXT NOT NULL, answer_to TEXT NOT NULL, answer BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS secure_setup (campaign TEXT PRIMARY KEY, commitments_json TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS secure_campaign (campaign TEXT PRIMARY KEY, private_key BLOB NOT NULL) STRICT;
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
    """The table; each write is durable when it returns, or when the transaction around it ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        for statement in SCHEMA.split(";")[:-1]:  # not `executescript`: that would end a transaction around this
            self._db.execute(statement)

    @staticmethod
    def open(path: Path) -> "RoundStore":
        """Open (or make) a file by itself, readable by its owner alone.

        Raises:
            LedgerError: the disk refuses, or it is another file.
        """
        try:
            path.touch(mode=0o600)
            return RoundStore(connect(path))
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"the rounds of {path} cannot be kept: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def private_key(self, campaign: str) -> X25519PrivateKey:
        """This site's round key of a campaign; made and kept now if there is none."""
        query = "SELECT private_key FROM secure_campaign WHERE campaign = ?"
        with _mapped():
            row = self._db.execute(query, (campaign,)).fetchone()
            if row is None:
                fresh = X25519PrivateKey.generate().private_bytes_raw()
                self._db.execute("INSERT OR IGNORE INTO secure_campaign VALUES (?, ?)", (campaign, fresh))
                row = self._db.execute(query, (campaign,)).fetchone()
        return X25519PrivateKey.from_private_bytes(row[0])

    def setup(self, campaign: str) -> dict[str, str]:
        """The members' graph commitments as they were fixed; empty before that."""
        with _mapped():
            row = self._db.execute("SELECT commitments_json FROM secure_setup WHERE campaign = ?", (campaign,)).fetchone()
            return {} if row is None else dict(json.loads(row[0]))

    def keep_setup(self, campaign: str, commitments: Mapping[str, str]) -> None:
        """Fix the members' graph commitments of a campaign, once.

        Raises:
            ReplayError: others were fixed before.
        """
        with _mapped():
            row = (campaign, json.dumps(dict(commitments), sort_keys=True))
            self._db.execute("INSERT OR IGNORE INTO secure_setup VALUES (?, ?)", row)
        if self.setup(campaign) != dict(commitments):
            raise ReplayError(f"the members of {campaign} were fixed before, with others: this site's nonce is told once")

    def find(self, round_id: str) -> KeptRound | None:
        """What is kept of a round."""
        with _mapped():
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
            context = None if kept.context is None else _context_json(kept.context)
            progress = kept.progress
            row = (round_id, kept.campaign, context, progress.context, progress.alive_sha256, int(progress.burnt))
            self._db.execute(
                "INSERT OR REPLACE INTO secure_round VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, kept.audited, kept.answer_to, kept.answer),
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """No other process writes between what is looked at here and what is written here."""
        if self._db.in_transaction:  # a ledger began it and ends it
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
        with _mapped():
            rows = self._db.execute(query, (campaign,)).fetchall()
        return {row[0]: Progress(row[1], row[2], bool(row[3])) for row in rows}

    def unaudited(self, campaign: str) -> dict[str, KeptRound]:
        """The rounds whose unmask this site answered and that it has not been shown the end of."""
        query = "SELECT * FROM secure_round WHERE campaign = ? AND alive_sha256 != '' AND audited = '' ORDER BY rowid"
        with _mapped():
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
        with _mapped():
            return int(self._db.execute(query, (campaign,)).fetchone()[0])


def connect(path: Path) -> sqlite3.Connection:
    """A SQLite file whose writes are on disk when they return."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_SECONDS)
    # NORMAL lets bytes leave before the write is on disk; after FULL a power cut may bring the deleted journal, and with it
    # the file before the write, back
    connection.execute("PRAGMA synchronous=EXTRA")
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA secure_delete=ON")
    return connection


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
