import hashlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import crash_points
from tests.client.crash_points import EVENT, KEY, PROCESSES, RELEASES, REPLY, a_release
from urna.client.ledger import Ledger
from urna.client.ledger_rows import CampaignRow, Event, Noted, Waiting
from urna.client.vault import create_keys
from urna.privacy.accounting import epsilon_of_rows, gaussian, gaussian_delta
from urna.protocol.errors import LedgerError, ProtocolError, RollbackError
from urna.protocol.messages import SpentRow

SHA = "0" * 64


def a_ledger(path: Path, releases: int = 4) -> Ledger:
    """Releases with replies, but for the last, which crashed."""
    ledger = Ledger.create(path, KEY)
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


def script(*arguments: str) -> None:
    subprocess.run([sys.executable, crash_points.__file__, *arguments], check=True, timeout=120)


def test_the_disk_has_a_reservation_before_reserve_returns(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", KEY)
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] >= 2  # FULL; 3 is EXTRA: the journal's folder too
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    reopened = Ledger.open(tmp_path / "ledger.sqlite", KEY)  # the setting belongs to a connection, not to the file
    assert reopened._db.execute("PRAGMA synchronous").fetchone()[0] == 3


def test_a_deleted_journal_that_a_power_cut_brings_back_is_synced_away(tmp_path: Path) -> None:
    assert Ledger.create(tmp_path / "ledger.sqlite", KEY)._db.execute("PRAGMA synchronous").fetchone()[0] == 3


def test_a_reservation_is_counted_by_another_process_at_once(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    ledger.reserve(a_release("run-1/ballot/9"))
    assert SpentRow(stage="ballot", partition="tuning", event=EVENT, count=1) in Ledger.open(path, KEY).rows()


def test_missing_ledger_is_error_not_zero(path: Path) -> None:
    """Deleting the ledger for a fresh budget: it is not opened as an empty one, and not made anew while its anchor is there."""
    path.unlink()
    with pytest.raises(LedgerError, match=r"found nothing: restore it; a lost ledger is not a new budget"):
        Ledger.open(path, KEY)
    with pytest.raises(
        LedgerError, match=r"ledger.anchor exists: there was a ledger here; restore it, a lost ledger is not a new"
    ):
        Ledger.create(path, KEY)
    with pytest.raises(LedgerError, match=r"found nothing: restore it"):
        Ledger.renew_anchor(path, KEY, path.with_name("another.anchor"))
    assert not path.exists()
    assert not path.with_name("another.anchor").exists()


def test_an_empty_file_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    with pytest.raises(LedgerError, match="expected a ledger of format 2, found format 0, or no ledger"):
        Ledger.open(tmp_path / "ledger.sqlite", KEY)


def test_a_ledger_is_never_made_over_another(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"ledger.anchor exists: there was a ledger here"):
        Ledger.create(path, KEY)
    with pytest.raises(LedgerError, match="made once and kept for ever"):
        Ledger.create(path, KEY, tmp_path / "another.anchor")
    assert len(Ledger.open(path, KEY).rows()) == 4


def test_ledger_and_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    create_keys(tmp_path / "site", "site-1")
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "site").iterdir()}
    assert modes == dict.fromkeys(["identity.key", "data.key", "ledger.sqlite", "ledger.anchor", "ledger.sqlite.lock"], 0o600)


def test_the_journal_of_a_transaction_is_readable_by_its_owner_alone(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    with ledger.exclusive():
        ledger.reserve(a_release("run-1/ballot/9"))
        assert (path.parent / "ledger.sqlite-journal").stat().st_mode & 0o777 == 0o600


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


def an_old_ledger(path: Path) -> None:
    """As no site ever had it outside its development: one chain over the releases alone, without key and anchor."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(OLD_SCHEMA)
    connection.execute(
        "INSERT INTO release VALUES (1, 'run-1/ballot/1', ?, 'run-1', 'ballot', 'tuning', ?, 1, 1.0, ?, NULL, NULL)",
        (SHA, EVENT, SHA),
    )
    connection.close()


def no_file(path: Path) -> None:
    path.touch()


def another_database(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()


@pytest.mark.parametrize("make", [an_old_ledger, no_file, another_database])
def test_a_file_of_another_format_is_refused_and_not_written_to(path: Path, make: Callable[[Path], None]) -> None:
    """It is evidence, or it belongs to someone else."""
    path.unlink()
    make(path)
    content, files = path.read_bytes(), sorted(path.parent.iterdir())
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="expected a ledger of format 2, found format 0, or no ledger"):
            Ledger.open(path, KEY, read_only=read_only)
    assert path.read_bytes() == content
    assert sorted(path.parent.iterdir()) == files


def test_an_unknown_event_is_refused_before_it_is_written(path: Path) -> None:
    with pytest.raises(ValueError, match="expected a release that this version can account for"):
        a_release("run-1/ballot/9", event='{"LaplaceDpEvent":{"noise_multiplier":1.0}}')
    assert len(Ledger.open(path, KEY).rows()) == 4


@pytest.mark.parametrize("count", [0, -3, 10**9 + 1, 2**63])
def test_a_release_cannot_give_budget_back(count: int) -> None:
    with pytest.raises(ValueError, match=f"counts at least once, .*found {count}"):
        a_release("run-1/ballot/9", count=count)


def test_replay_with_changed_content_refused(path: Path) -> None:
    with pytest.raises(ProtocolError, match="run-1/ballot/1 is known here with other content: refused"):
        Ledger.open(path, KEY).find("run-1/ballot/1", "1" * 64)


def test_a_request_id_is_reserved_once(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    with pytest.raises(LedgerError, match="UNIQUE constraint failed"):
        ledger.reserve(a_release("run-1/ballot/1"))
    assert sum(row.count for row in ledger.rows()) == 4


def test_a_reservation_without_reply_survives_and_is_settled_without_a_second_row(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    assert ledger.find("run-1/ballot/4", SHA) == "reserved"
    ledger.settle("run-1/ballot/4", b"late")
    reopened = Ledger.open(path, KEY)
    assert reopened.find("run-1/ballot/4", SHA) == b"late"
    assert sum(row.count for row in reopened.rows()) == 4


@pytest.mark.parametrize("request_id", ["run-1/ballot/1", "run-1/never"])
def test_bytes_are_kept_once_and_only_under_a_reservation(path: Path, request_id: str) -> None:
    ledger = Ledger.open(path, KEY)
    with pytest.raises(RuntimeError, match=f"found none for {request_id}"):
        ledger.settle(request_id, b"other bytes")
    assert ledger.find("run-1/ballot/1", SHA) == REPLY + b"\x01"


def test_what_a_failed_commit_did_not_write_is_not_read_back(path: Path) -> None:
    ledger, reader = Ledger.open(path, KEY), sqlite3.connect(path, isolation_level=None)
    ledger._db.execute("PRAGMA busy_timeout=1")
    cursor = reader.execute("SELECT * FROM release")
    cursor.fetchone()  # an open read keeps a commit from the disk
    with pytest.raises(LedgerError, match="locked"):
        ledger.settle("run-1/ballot/4", b"never on disk")
    assert ledger.find("run-1/ballot/4", SHA) == "reserved"
    cursor.close()
    reader.close()
    ledger.settle("run-1/ballot/4", b"on disk")  # and the ledger goes on
    assert Ledger.open(path, KEY).find("run-1/ballot/4", SHA) == b"on disk"


def test_nobody_spends_between_a_decision_and_its_reservation(path: Path) -> None:
    one, other = Ledger.open(path, KEY), Ledger.open(path, KEY)
    other.timeout_seconds = 0
    with one.exclusive():
        decided_on = one.rows()
        with pytest.raises(LedgerError, match=rf"locked: process {os.getpid()} of this site uses it"):
            other.reserve(a_release("run-1/ballot/8"))
        assert one.rows() == decided_on
        one.reserve(a_release("run-1/ballot/9"))
    other.reserve(a_release("run-1/ballot/8"))
    assert sum(row.count for row in Ledger.open(path, KEY).rows()) == 6


def test_an_error_within_a_decision_reserves_nothing(path: Path) -> None:
    ledger = Ledger.open(path, KEY)

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
        ledger = Ledger.open(folder / "ledger.sqlite", KEY)
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
        assert sum(row.count for row in Ledger.open(folder / "ledger.sqlite", KEY).rows()) == 2, point


def test_releases_of_several_processes_at_once_are_all_recorded(tmp_path: Path) -> None:
    script("crowd", str(tmp_path))
    assert sum(row.count for row in Ledger.open(tmp_path / "ledger.sqlite", KEY).rows()) == PROCESSES * RELEASES


def test_joining_again_gives_back_what_was_kept(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    other = CampaignRow("run-1", SHA, "{}", {}, bytes(range(32)), b"another hello")
    assert ledger.join(other).reply == b"hello"
    with pytest.raises(ProtocolError, match="run-1 is known here with another opening request"):
        ledger.join(CampaignRow("run-1", "1" * 64, "{}", {}, bytes(32), b"hello"))


def test_rows_are_merged_within_a_campaign_and_over_all(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", KEY)
    for number, campaign in enumerate(["run-1", "run-1", "run-2"]):
        ledger.reserve(a_release(f"r/{number}", campaign=campaign, count=number + 1))
    assert [row.count for row in ledger.rows("run-1")] == [3]
    assert [row.count for row in ledger.rows("run-2")] == [3]
    assert [row.count for row in ledger.rows()] == [6]
    assert ledger.rows("run-3") == ()


def test_only_campaigns_that_released_something_decide_the_split(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    ledger.join(CampaignRow("run-2", SHA, '{"evaluation": {"holdout_fraction": 0.5}}', {}, bytes(32), b"hello"))
    assert ledger.holdout_fractions() == {0.2}
    ledger.reserve(a_release("run-2/1", campaign="run-2"))
    assert ledger.holdout_fractions() == {0.2, 0.5}


NOTES: tuple[tuple[Event, str, dict[str, str]], ...] = (
    ("approve", "run-1", {"by": "Ada"}),
    ("pause", "", {}),
    ("resume", "", {"by": "Grace", "why": "Zürich"}),
)


def test_decisions_of_persons_survive_in_order(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    for event, subject, detail in NOTES:
        ledger.note(event, subject, **detail)
    ledger.wait(Waiting("run-2", SHA, "{}"))
    ledger.close()
    again = Ledger.open(path, KEY)
    noted = again.all_noted("approve", "deny", "pause", "resume")
    assert [(one.event, one.subject, one.detail) for one in noted] == list(NOTES)
    last = again.noted("pause", "resume")
    assert isinstance(last, Noted)
    assert last.event == "resume"
    assert again.noted("approve", subject="run-2") is None
    assert again.waiting() == (Waiting("run-2", SHA, "{}"),)


def test_another_plan_of_a_waiting_campaign_replaces_it(path: Path) -> None:
    ledger = Ledger.open(path, KEY)
    for plan in ("{}", "{}", '{"other": 1}'):
        ledger.wait(Waiting("run-2", SHA, plan))
    ledger.wait(Waiting("run-3", SHA, "{}"))
    head = ledger.head()
    ledger.wait(Waiting("run-3", SHA, "{}"))  # known: nothing is written
    assert ledger.head() == head
    ledger.close()
    assert [one.plan_json for one in Ledger.open(path, KEY).waiting()] == ['{"other": 1}', "{}"]


def test_a_head_only_moves_on_and_stays_known(tmp_path: Path) -> None:
    ledger = a_ledger(tmp_path / "ledger.sqlite")
    heads = [ledger.head()]
    for number in range(3):
        ledger.reserve(a_release(f"run-1/final/{number}"))
        heads.append(ledger.head())
    assert [seq - heads[0][0] for seq, _ in heads] == [0, 1, 2, 3]
    for head in heads:
        ledger.check_head(*head)
    assert ledger.noted("stop") is None


def test_every_release_is_listed_with_its_time_and_what_was_sent(path: Path) -> None:
    written = Ledger.open(path, KEY).releases("run-1")
    assert [one.release.request_id for one in written] == [f"run-1/ballot/{number}" for number in range(1, 5)]
    assert [one.reply_sha256 is None for one in written] == [False, False, False, True]
    assert written[0].reply_sha256 == hashlib.sha256(REPLY + b"\x01").hexdigest()
    assert written[0].reserved_at <= written[3].reserved_at
    assert Ledger.open(path, KEY).releases("run-2") == ()


def test_clock_skew_gives_no_budget(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock set back to reopen an expired window: nothing of the budget hangs on the time."""
    before = sum(row.count for row in Ledger.open(path, KEY).rows())
    times = (0.0, -1e9, 4e12)
    for number, now in enumerate(times):
        monkeypatch.setattr("time.time", lambda now=now: now)
        ledger = Ledger.open(path, KEY)
        assert sum(row.count for row in ledger.rows()) == before + number
        ledger.reserve(a_release(f"run-1/final/{number}"))
        ledger.close()
    assert sum(row.count for row in Ledger.open(path, KEY).rows()) == before + len(times)
    assert tuple(one.reserved_at for one in Ledger.open(path, KEY).releases())[-3:] == times


def test_a_look_while_another_process_may_write_writes_nothing(path: Path) -> None:
    holder, look = Ledger.open(path, KEY), Ledger.open(path, KEY, read_only=True)
    holder.hold()
    holder.reserve(a_release("run-1/ballot/9"))
    assert look.rows() == holder.rows()
    assert look.head() == holder.head()
    holder.close()
    writes: list[Callable[[], object]] = [
        lambda: look.reserve(a_release("run-1/ballot/8")),
        lambda: look.settle("run-1/ballot/9", b""),
        lambda: look.note("pause", ""),
        lambda: look.wait(Waiting("run-2", SHA, "{}")),
        lambda: look.rounds.private_key("run-9"),
    ]
    for write in writes:
        with pytest.raises(LedgerError, match="opened for a look only"):
            write()
    assert sum(row.count for row in Ledger.open(path, KEY).rows()) == 5


def test_a_note_of_another_thread_is_not_undone_with_a_failed_decision(path: Path) -> None:
    """A pause comes through the control socket, in its own thread, while a request is decided on."""
    ledger, seen = Ledger.open(path, KEY), list[object]()
    before = ledger.head()

    def pause() -> None:
        seen.append(ledger.head())
        ledger.note("pause", "")

    thread = threading.Thread(target=pause)

    def decide() -> None:
        with ledger.exclusive():
            ledger.reserve(a_release("run-1/ballot/9"))
            thread.start()
            thread.join(0.2)  # it waits for this one to end; the assertions hold, too, if it did not even begin
            raise KeyError("no")

    with pytest.raises(KeyError):
        decide()
    thread.join()
    assert seen == [before]  # it did not see what was never kept
    assert Ledger.open(path, KEY).noted("pause") is not None
    assert sum(row.count for row in ledger.rows()) == 4


def test_a_renewed_anchor_is_a_persons_act_and_recorded(path: Path) -> None:
    anchor = path.with_suffix(".anchor")
    with pytest.raises(LedgerError, match="only a lost anchor is made anew"):
        Ledger.renew_anchor(path, KEY, anchor)
    anchor.unlink()
    with pytest.raises(LedgerError, match=r"found nothing: mount or restore it; .* `urna-site ledger --renew-anchor`"):
        Ledger.open(path, KEY)
    Ledger.renew_anchor(path, KEY, anchor)
    ledger = Ledger.open(path, KEY)
    noted = ledger.noted("anchor")
    assert noted is not None
    assert noted.subject == "renewed"
    assert len(ledger.rows()) == 4


def test_a_stopped_ledger_releases_nothing_to_anybody(path: Path) -> None:
    """An older copy that was found out: nothing to other operators, after a restart, or for what was reserved before."""
    ledger = Ledger.open(path, KEY)
    for _ in range(2):
        with pytest.raises(RollbackError, match="expected entry 99 as this ledger showed it before, found an older"):
            ledger.check_head(99, SHA)
    assert len(ledger.all_noted("stop")) == 1
    for number, one in enumerate((ledger, Ledger.open(path, KEY))):
        with pytest.raises(RollbackError, match="nothing is released from it"):
            one.reserve(a_release("run-2/ballot/1", campaign="run-2"))
        with pytest.raises(RollbackError, match="nothing is released from it"):
            one.settle("run-1/ballot/4", b"with fresh noise")
        with pytest.raises(RollbackError, match="nothing is released from it"):
            one.rounds.private_key("run-2")
        one.note("pause", str(number))  # a person may still say something
        assert one.find("run-1/ballot/4", SHA) == "reserved"


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
