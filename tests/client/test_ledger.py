import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.client import crash_points
from tests.client.crash_points import EVENT, PROCESSES, RELEASES, REPLY, a_release
from urna.client.ledger import CampaignRow, Ledger
from urna.client.round_store import KeptRound
from urna.client.site import create_keys
from urna.privacy.accounting import epsilon_of_rows, gaussian, gaussian_delta
from urna.privacy.secure_sum import Progress
from urna.protocol.errors import LedgerError, ProtocolError
from urna.protocol.messages import SpentRow

SHA = "0" * 64


def a_ledger(path: Path, releases: int = 4) -> Ledger:
    """Releases with replies, but for the last, which crashed."""
    ledger = Ledger.create(path)
    ledger.join(CampaignRow("run-1", SHA, '{"evaluation": {"holdout_fraction": 0.2}}', {"pixels": SHA}, bytes(32), b"hello"))
    for number in range(1, releases + 1):
        ledger.reserve(a_release(f"run-1/ballot/{number}", event=gaussian(float(number))))
        if number < releases:
            ledger.settle(f"run-1/ballot/{number}", REPLY + bytes([number]))
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    a_ledger(path).close()
    return path


def alter(path: Path, *statements: str) -> None:
    """As someone with the file in hand would, constraints switched off."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA ignore_check_constraints=ON")
    for statement in statements:
        assert connection.execute(statement).rowcount != 0, statement
    connection.close()


def script(*arguments: str) -> None:
    subprocess.run([sys.executable, crash_points.__file__, *arguments], check=True, timeout=120)


def test_the_disk_has_a_reservation_before_reserve_returns(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] >= 2  # FULL; 3 is EXTRA: the journal's folder too
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    reopened = Ledger.open(tmp_path / "ledger.sqlite")  # the setting belongs to a connection, not to the file
    assert reopened._db.execute("PRAGMA synchronous").fetchone()[0] == 3


def test_a_deleted_journal_that_a_power_cut_brings_back_is_synced_away(tmp_path: Path) -> None:
    assert Ledger.create(tmp_path / "ledger.sqlite")._db.execute("PRAGMA synchronous").fetchone()[0] == 3


def test_a_reservation_is_counted_by_another_process_at_once(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.reserve(a_release("run-1/ballot/9"))
    assert SpentRow(stage="ballot", partition="tuning", event=EVENT, count=1) in Ledger.open(path).rows()


def test_missing_ledger_is_error_not_zero(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"found nothing: restore it; a lost ledger is not a new budget"):
        Ledger.open(tmp_path / "ledger.sqlite")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_an_empty_file_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(LedgerError, match="no such table: release"):
        Ledger.open(tmp_path / "ledger.sqlite")


def test_a_ledger_is_never_made_over_another(path: Path) -> None:
    with pytest.raises(LedgerError, match="made once and kept for ever"):
        Ledger.create(path)
    assert len(Ledger.open(path).rows()) == 4


def test_ledger_and_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    create_keys(tmp_path / "site", "site-1")
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "site").iterdir()}
    assert modes == {"identity.key": 0o600, "data.key": 0o600, "ledger.sqlite": 0o600}


def test_the_journal_of_a_transaction_is_readable_by_its_owner_alone(path: Path) -> None:
    ledger = Ledger.open(path)
    with ledger.exclusive():
        ledger.reserve(a_release("run-1/ballot/9"))
        assert (path.parent / "ledger.sqlite-journal").stat().st_mode & 0o777 == 0o600


ALTERATIONS = {
    "seq": "9",
    "request_id": "'run-1/other'",
    "request_sha256": "'1'",
    "campaign": "'run-2'",
    "stage": "'final'",
    "partition": "'heldout'",
    "event": f"'{gaussian(99.0)}'",
    "count": "2",
    "reserved_at": "reserved_at + 1",
    "link": "'0'",
    "reply": "x'00'",
    "reply_link": "'0'",
}


def test_every_column_is_among_the_alterations(path: Path) -> None:
    columns = sqlite3.connect(path).execute("SELECT name FROM pragma_table_info('release')").fetchall()
    assert {name for (name,) in columns} == set(ALTERATIONS)


@pytest.mark.parametrize("column", ALTERATIONS)
def test_altered_row_is_detected(path: Path, column: str) -> None:
    alter(path, f"UPDATE release SET {column} = {ALTERATIONS[column]} WHERE seq = 2")
    with pytest.raises(LedgerError, match=r"altered at row [23]: restore it; it is never repaired"):
        Ledger.open(path)


@pytest.mark.parametrize("column", ["reply", "reply_link"])
def test_a_reply_that_was_taken_away_is_detected(path: Path, column: str) -> None:
    alter(path, f"UPDATE release SET {column} = NULL WHERE seq = 2")
    with pytest.raises(LedgerError, match="the ledger's file was altered: restore it"):
        Ledger.open(path)


def test_a_row_of_the_ledger_with_no_accountable_event_is_detected(path: Path) -> None:
    alter(path, "UPDATE release SET event = '{\"ZeroDpEvent\":{}}' WHERE seq = 2")
    with pytest.raises(LedgerError, match="cannot be used: expected a release that this version can account for"):
        Ledger.open(path)


@pytest.mark.parametrize("row", [1, 2, 3])
def test_a_deleted_row_before_the_last_is_detected(path: Path, row: int) -> None:
    alter(path, f"DELETE FROM release WHERE seq = {row}")
    with pytest.raises(LedgerError, match=f"altered at row {row}"):
        Ledger.open(path)


def test_deleted_and_renumbered_rows_are_detected(path: Path) -> None:
    alter(path, "DELETE FROM release WHERE seq = 2", "UPDATE release SET seq = seq - 1 WHERE seq > 2")
    with pytest.raises(LedgerError, match="altered at row 2"):
        Ledger.open(path)


def test_reordered_rows_are_detected(path: Path) -> None:
    steps = ["SET seq = 99 WHERE seq = 2", "SET seq = 2 WHERE seq = 3", "SET seq = 3 WHERE seq = 99"]
    alter(path, *(f"UPDATE release {step}" for step in steps))
    with pytest.raises(LedgerError, match="altered at row 2"):
        Ledger.open(path)


@pytest.mark.xfail(reason="rows cut off at the end need the head that the operator echoes (DESIGN 5)", strict=True)
def test_a_cut_tail_is_detected(path: Path) -> None:
    alter(path, "DELETE FROM release WHERE seq = 4")
    with pytest.raises(LedgerError):
        Ledger.open(path)


@pytest.mark.xfail(reason="a restored older copy needs the head that the operator echoes (DESIGN 5)", strict=True)
def test_a_restored_older_copy_is_detected(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "older")
    ledger = Ledger.open(path)
    ledger.reserve(a_release("run-1/ballot/9"))
    ledger.close()
    shutil.copy(tmp_path / "older", path)
    with pytest.raises(LedgerError):
        Ledger.open(path)


def test_a_file_that_was_cut_off_is_detected(path: Path) -> None:
    """But for the unused space of the last page, which holds nothing."""
    content = path.read_bytes()
    for size in range(1, len(content) - 4096, 1024):
        path.write_bytes(content[:size])
        with pytest.raises(LedgerError, match=r"cannot be used|the ledger's file was altered"):
            Ledger.open(path)


def test_a_flipped_bit_never_makes_a_ledger_say_less(path: Path) -> None:
    content = path.read_bytes()
    before = Ledger.open(path)
    known = [(f"run-1/ballot/{number}", before.find(f"run-1/ballot/{number}", SHA)) for number in range(1, 5)]
    rows = before.rows()
    before.close()
    detected = 0
    for at in range(0, len(content), 61):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            ledger = Ledger.open(path)
            assert ledger.rows() == rows, at
            assert [(name, ledger.find(name, SHA)) for name, _ in known] == known, at
            ledger.close()
        except LedgerError:
            detected += 1
    assert detected > 10  # the others hit unused space or what a campaign keeps


OLD_SCHEMA = """
CREATE TABLE campaign (
    campaign TEXT PRIMARY KEY, request_sha256 TEXT NOT NULL, plan_json TEXT NOT NULL, models_json TEXT NOT NULL,
    round_key BLOB NOT NULL, reply BLOB NOT NULL
) STRICT;
CREATE TABLE release (
    seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, request_sha256 TEXT NOT NULL, campaign TEXT NOT NULL,
    stage TEXT NOT NULL, partition TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL CHECK (count > 0),
    reserved_at REAL NOT NULL, link TEXT NOT NULL, reply BLOB, reply_link TEXT CHECK ((reply IS NULL) = (reply_link IS NULL))
) STRICT;
"""


@pytest.fixture
def old_path(path: Path, tmp_path: Path) -> Path:
    """The same ledger as a site had it before the secure sum's rounds were kept: two tables, one column less."""
    old = tmp_path / "old.sqlite"
    connection = sqlite3.connect(old, isolation_level=None)
    connection.executescript(OLD_SCHEMA)
    connection.execute("ATTACH ? AS new", (str(path),))
    columns = "campaign, request_sha256, plan_json, models_json, round_key, reply"
    connection.execute(f"INSERT INTO campaign SELECT {columns} FROM new.campaign")
    connection.execute("INSERT INTO release SELECT * FROM new.release")
    connection.close()
    return old


def test_a_ledger_of_the_schema_before_is_migrated_without_losing_a_row(path: Path, old_path: Path) -> None:
    before, tables = Ledger.open(path), "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    for _ in range(2):  # and again
        after = Ledger.open(old_path)
        assert after.rows() == before.rows()
        assert after.campaign("run-1") == before.campaign("run-1")
        for number in range(1, 5):
            assert after.find(f"run-1/ballot/{number}", SHA) == before.find(f"run-1/ballot/{number}", SHA)
        assert after._db.execute(tables).fetchall() == before._db.execute(tables).fetchall()
        after.close()


def test_a_migrated_ledger_goes_on(old_path: Path) -> None:
    ledger = Ledger.open(old_path)
    kept = ledger.campaign("run-1")
    assert kept is not None
    assert kept.graph_commitment == ""
    row = CampaignRow("run-2", SHA, "{}", {}, bytes(32), b"hello", "ab" * 32)
    assert ledger.join(row) == row
    ledger.reserve(a_release("run-1/ballot/9"))
    ledger.settle("run-1/ballot/9", REPLY)
    ledger.rounds.keep("run-2/ballot/1", KeptRound("run-2", None, Progress("ab" * 32)))
    ledger.close()
    again = Ledger.open(old_path)
    assert again.campaign("run-2") == row
    assert again.find("run-1/ballot/9", SHA) == REPLY
    assert again.rounds.progress("run-2") == {"run-2/ballot/1": Progress("ab" * 32)}


def test_an_altered_ledger_of_the_schema_before_is_refused(old_path: Path) -> None:
    alter(old_path, f"UPDATE release SET event = '{gaussian(99.0)}' WHERE seq = 2")
    with pytest.raises(LedgerError, match="altered at row 2"):
        Ledger.open(old_path)


@pytest.mark.parametrize("kind", ["altered", "empty", "another database"])
def test_a_file_that_is_refused_is_not_written_to(old_path: Path, kind: str) -> None:
    """It is evidence, or it belongs to someone else."""
    if kind == "altered":
        alter(old_path, f"UPDATE release SET event = '{gaussian(99.0)}' WHERE seq = 2")
    else:
        old_path.unlink()
        old_path.touch()
    if kind == "another database":
        sqlite3.connect(old_path, isolation_level=None).execute("CREATE TABLE recipes (name TEXT)")
    content = old_path.read_bytes()
    with pytest.raises(LedgerError):
        Ledger.open(old_path)
    assert old_path.read_bytes() == content


def test_an_unknown_event_is_refused_before_it_is_written(path: Path) -> None:
    with pytest.raises(ValueError, match="expected a release that this version can account for"):
        a_release("run-1/ballot/9", event='{"LaplaceDpEvent":{"noise_multiplier":1.0}}')
    assert len(Ledger.open(path).rows()) == 4


@pytest.mark.parametrize("count", [0, -3])
def test_a_release_cannot_give_budget_back(count: int) -> None:
    with pytest.raises(ValueError, match=f"counts at least once, found {count}"):
        a_release("run-1/ballot/9", count=count)


def test_replay_with_changed_content_refused(path: Path) -> None:
    with pytest.raises(ProtocolError, match="run-1/ballot/1 is known here with other content: refused"):
        Ledger.open(path).find("run-1/ballot/1", "1" * 64)


def test_a_request_id_is_reserved_once(path: Path) -> None:
    ledger = Ledger.open(path)
    with pytest.raises(LedgerError, match="UNIQUE constraint failed"):
        ledger.reserve(a_release("run-1/ballot/1"))
    assert sum(row.count for row in ledger.rows()) == 4


def test_a_reservation_without_reply_survives_and_is_settled_without_a_second_row(path: Path) -> None:
    ledger = Ledger.open(path)
    assert ledger.find("run-1/ballot/4", SHA) == "reserved"
    ledger.settle("run-1/ballot/4", b"late")
    reopened = Ledger.open(path)
    assert reopened.find("run-1/ballot/4", SHA) == b"late"
    assert sum(row.count for row in reopened.rows()) == 4


@pytest.mark.parametrize("request_id", ["run-1/ballot/1", "run-1/never"])
def test_bytes_are_kept_once_and_only_under_a_reservation(path: Path, request_id: str) -> None:
    ledger = Ledger.open(path)
    with pytest.raises(RuntimeError, match=f"found none for {request_id}"):
        ledger.settle(request_id, b"other bytes")
    assert ledger.find("run-1/ballot/1", SHA) == REPLY + b"\x01"


def test_what_a_failed_commit_did_not_write_is_not_read_back(path: Path) -> None:
    ledger, reader = Ledger.open(path), sqlite3.connect(path, isolation_level=None)
    ledger._db.execute("PRAGMA busy_timeout=1")
    cursor = reader.execute("SELECT * FROM release")
    cursor.fetchone()  # an open read keeps a commit from the disk
    with pytest.raises(LedgerError, match="locked"):
        ledger.settle("run-1/ballot/4", b"never on disk")
    assert ledger.find("run-1/ballot/4", SHA) == "reserved"
    cursor.close()
    reader.close()
    ledger.settle("run-1/ballot/4", b"on disk")  # and the ledger goes on
    assert Ledger.open(path).find("run-1/ballot/4", SHA) == b"on disk"


def test_nobody_spends_between_a_decision_and_its_reservation(path: Path) -> None:
    one, other = Ledger.open(path), Ledger.open(path)
    other._db.execute("PRAGMA busy_timeout=1")
    with one.exclusive():
        decided_on = one.rows()
        with pytest.raises(LedgerError, match="locked"):
            other.reserve(a_release("run-1/ballot/8"))
        assert one.rows() == decided_on
        one.reserve(a_release("run-1/ballot/9"))
    other.reserve(a_release("run-1/ballot/8"))
    assert sum(row.count for row in Ledger.open(path).rows()) == 6


def test_an_error_within_a_decision_reserves_nothing(path: Path) -> None:
    ledger = Ledger.open(path)

    def decide() -> None:
        with ledger.exclusive():
            ledger.reserve(a_release("run-1/ballot/9"))
            raise KeyError("no")

    with pytest.raises(KeyError):
        decide()
    assert sum(row.count for row in ledger.rows()) == 4


def test_kill_at_every_statement_never_under_counts(tmp_path: Path) -> None:
    script("kill", str(tmp_path))
    folders = sorted((int(one.name), one) for one in tmp_path.iterdir() if one.is_dir())
    assert (folders[-1][1] / "done").exists()
    assert len(folders) > 6
    assert {(folder / "computed").exists() for _, folder in folders} == {True, False}
    for point, folder in folders:
        ledger = Ledger.open(folder / "ledger.sqlite")
        count = sum(row.count for row in ledger.rows())
        known = ledger.find("run-1/ballot/2", SHA)
        assert count == (1 if known is None else 2), point
        assert ledger.find("run-1/ballot/1", SHA) == REPLY, point
        if (folder / "computed").exists():
            assert count == 2, point
        if (folder / "released").exists():
            assert known == REPLY, point
        if known is None:  # the request is repeated
            ledger.reserve(a_release("run-1/ballot/2"))
        if known != REPLY:
            ledger.settle("run-1/ballot/2", REPLY)
        assert sum(row.count for row in Ledger.open(folder / "ledger.sqlite").rows()) == 2, point


def test_releases_of_several_processes_at_once_are_all_recorded(tmp_path: Path) -> None:
    script("crowd", str(tmp_path))
    assert sum(row.count for row in Ledger.open(tmp_path / "ledger.sqlite").rows()) == PROCESSES * RELEASES


def test_joining_again_gives_back_what_was_kept(path: Path) -> None:
    ledger = Ledger.open(path)
    other = CampaignRow("run-1", SHA, "{}", {}, bytes(range(32)), b"another hello")
    assert ledger.join(other).reply == b"hello"
    with pytest.raises(ProtocolError, match="run-1 is known here with another opening request"):
        ledger.join(CampaignRow("run-1", "1" * 64, "{}", {}, bytes(32), b"hello"))


def test_rows_are_merged_within_a_campaign_and_over_all(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    for number, campaign in enumerate(["run-1", "run-1", "run-2"]):
        ledger.reserve(a_release(f"r/{number}", campaign=campaign, count=number + 1))
    assert [row.count for row in ledger.rows("run-1")] == [3]
    assert [row.count for row in ledger.rows("run-2")] == [3]
    assert [row.count for row in ledger.rows()] == [6]
    assert ledger.rows("run-3") == ()


def test_only_campaigns_that_released_something_decide_the_split(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.join(CampaignRow("run-2", SHA, '{"evaluation": {"holdout_fraction": 0.5}}', {}, bytes(32), b"hello"))
    assert ledger.holdout_fractions() == {0.2}
    ledger.reserve(a_release("run-2/1", campaign="run-2"))
    assert ledger.holdout_fractions() == {0.2, 0.5}


def test_partitions_compose_in_parallel_and_events_of_one_add_up() -> None:
    def rows(tuning: int, heldout: int) -> tuple[SpentRow, ...]:
        counts = {"tuning": tuning, "heldout": heldout}
        return tuple(
            SpentRow(stage="ballot", partition=part, event=gaussian(4.0), count=count)
            for part, count in counts.items()
            if count
        )

    assert epsilon_of_rows(rows(0, 0), 1e-5) == 0
    assert epsilon_of_rows(rows(3, 9), 1e-5) == epsilon_of_rows(rows(0, 9), 1e-5) == epsilon_of_rows(rows(9, 3), 1e-5)
    epsilon = epsilon_of_rows(rows(9, 3), 1e-5)  # independent: nine of 1/4 are one Gaussian of mu 3/4
    assert gaussian_delta(0.75, epsilon) <= 1e-5 <= gaussian_delta(0.75, epsilon - 0.01)
