"""A ledger against a simple model of it, through random requests, notes, restarts, crashes and restored copies.

At every step: what was released is counted, each id once; the head only moves on, and every head that was ever shown is still
known; a copy that is older than the ledger is never taken for it.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.client.crash_points import KEY, a_release
from urna.client.ledger import Ledger
from urna.client.ledger_rows import CampaignRow
from urna.client.round_store import KeptRound
from urna.privacy.accounting import gaussian
from urna.privacy.secure_sum import Progress
from urna.protocol.errors import LedgerError, ReplayError, RollbackError
from urna.protocol.messages import SpentRow

SHA = "0" * 64
NUMBERS = st.integers(0, 5)
FILES = ("ledger.sqlite", "ledger.anchor")


class LedgerMachine(RuleBasedStateMachine):
    """The model: releases by id, with their reply if there is one; campaigns; rounds; notes; heads; copies with their age."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / FILES[0]
        self.releases: dict[str, tuple[float, int]] = {}
        self.replies: dict[str, bytes] = {}
        self.campaigns: dict[str, bytes] = {}
        self.rounds: dict[str, bool] = {}
        self.notes: list[str] = []
        self.heads: list[tuple[int, str]] = []
        self.copies: list[Path] = []

    @initialize()
    def create(self) -> None:
        self.ledger = Ledger.create(self.path, KEY)
        self.heads.append(self.ledger.head())

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        shutil.rmtree(self.folder)

    # ---- what a site does

    @rule(number=NUMBERS, noise=st.sampled_from([1.0, 2.0]), count=st.integers(1, 3))
    def reserve(self, number: int, noise: float, count: int) -> None:
        name = f"run/{number}"
        release = a_release(name, event=gaussian(noise), count=count)
        if name in self.releases:
            with pytest.raises(LedgerError, match="UNIQUE"):
                self.ledger.reserve(release)
        else:
            self.ledger.reserve(release)
            self.releases[name] = (noise, count)

    @rule(number=NUMBERS, reply=st.binary(min_size=1, max_size=5))
    def settle(self, number: int, reply: bytes) -> None:
        name = f"run/{number}"
        if name in self.releases and name not in self.replies:
            self.ledger.settle(name, reply)
            self.replies[name] = reply
        else:
            with pytest.raises(RuntimeError, match="found none"):
                self.ledger.settle(name, reply)

    @rule(number=NUMBERS)
    def repeat(self, number: int) -> None:
        name = f"run/{number}"
        known = self.replies.get(name, "reserved") if name in self.releases else None
        assert self.ledger.find(name, SHA) == known
        if known is not None:
            with pytest.raises(ReplayError, match="other content"):
                self.ledger.find(name, "1" * 64)

    @rule(number=NUMBERS, noise=st.sampled_from([1.0, 2.0]))
    def decide_otherwise(self, number: int, noise: float) -> None:
        """A reservation whose decision fails in the end."""
        if f"run/{number}" in self.releases:
            return

        def decide() -> None:
            with self.ledger.exclusive():
                self.ledger.reserve(a_release(f"run/{number}", event=gaussian(noise)))
                self.ledger.note("approve", "never")
                raise KeyError

        with pytest.raises(KeyError):
            decide()

    @rule(subject=st.text(max_size=3))
    def note(self, subject: str) -> None:
        self.ledger.note("pause", subject, why="Ω")
        self.notes.append(subject)

    @rule(number=NUMBERS, reply=st.sampled_from([b"one", b"other"]))
    def join(self, number: int, reply: bytes) -> None:
        name = f"campaign-{number}"
        kept = self.ledger.join(CampaignRow(name, SHA, "{}", {}, bytes(32), reply))
        assert kept.reply == self.campaigns.setdefault(name, reply)

    @rule(number=NUMBERS, burnt=st.booleans())
    def keep_round(self, number: int, burnt: bool) -> None:
        name = f"round/{number}"
        kept = KeptRound("run-1", None, Progress("ab" * 32, "", burnt=burnt))
        if self.rounds.get(name) and not burnt:
            with pytest.raises(RuntimeError, match="cannot go back"):
                self.ledger.rounds.keep(name, kept)
        else:
            self.ledger.rounds.keep(name, kept)
            self.rounds[name] = burnt

    # ---- what befalls it

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.open(self.path, KEY)

    @rule()
    def crash(self) -> None:
        """In the middle of a transaction: another process takes over from the files as they were then."""
        with self.ledger.exclusive():
            self.ledger.reserve(a_release("run/never"))
            there = self.copy()
            self.ledger._db.execute("ROLLBACK")  # what dies is not there to commit
            self.ledger._db.execute("BEGIN")
        self.ledger.close()
        self.restore(there)
        self.ledger = Ledger.open(self.path, KEY)

    @rule()
    def anchor_that_a_crash_left_behind(self) -> None:
        """Between the commit and the anchor: the ledger is newer, which is none of an attacker's doing."""
        before = (self.folder / FILES[1]).read_bytes()
        self.ledger.note("pause", "crashed")
        self.notes.append("crashed")
        self.ledger.close()
        (self.folder / FILES[1]).write_bytes(before)
        self.ledger = Ledger.open(self.path, KEY)

    @rule()
    def keep_a_copy(self) -> None:
        self.copies.append(self.copy())

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """The ledger alone is put back: its anchor knows better, unless nothing was written since."""
        copy, now = data.draw(st.sampled_from(self.copies)), self.copy()
        self.ledger.close()
        shutil.copy(copy / FILES[0], self.path)
        if (copy / FILES[1]).read_bytes() == (now / FILES[1]).read_bytes():
            Ledger.open(self.path, KEY).close()
        else:
            with pytest.raises(RollbackError, match="as its anchor says"):
                Ledger.open(self.path, KEY)
        self.restore(now)
        self.ledger = Ledger.open(self.path, KEY)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def roll_back_both(self, data: st.DataObject) -> None:
        """Anchor included: the newest head that was shown is what tells."""
        copy, now = data.draw(st.sampled_from(self.copies)), self.copy()
        self.ledger.close()
        self.restore(copy)
        older = Ledger.open(self.path, KEY)
        if older.head() != self.heads[-1]:
            with pytest.raises(RollbackError, match="as this ledger showed it before"):
                older.check_head(*self.heads[-1])
            with pytest.raises(RollbackError, match="nothing is released"):
                older.reserve(a_release("run/new"))
        older.close()
        self.restore(now)
        self.ledger = Ledger.open(self.path, KEY)

    def copy(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for name in FILES:
            shutil.copy(self.folder / name, folder / name)
        return folder

    def restore(self, folder: Path) -> None:
        for name in FILES:
            shutil.copy(folder / name, self.folder / name)

    # ---- what always holds

    @invariant()
    def all_that_was_released_is_counted(self) -> None:
        if not hasattr(self, "ledger"):
            return
        expected: dict[str, int] = {}
        for noise, count in self.releases.values():
            expected[gaussian(noise)] = expected.get(gaussian(noise), 0) + count
        rows = [SpentRow(stage="ballot", partition="tuning", event=event, count=count) for event, count in expected.items()]
        assert sorted(self.ledger.rows(), key=str) == sorted(rows, key=str)
        assert {one.release.request_id for one in self.ledger.releases()} == set(self.releases)

    @invariant()
    def all_that_was_kept_is_known(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert [one.subject for one in self.ledger.all_noted("pause")] == self.notes
        assert self.ledger.all_noted("approve") == ()
        assert {one.campaign: one.reply for one in self.ledger.campaigns()} == self.campaigns
        assert {name: one.burnt for name, one in self.ledger.rounds.progress("run-1").items()} == self.rounds

    @invariant()
    def the_head_only_moves_on(self) -> None:
        if not hasattr(self, "ledger"):
            return
        head = self.ledger.head()
        assert head[0] > self.heads[-1][0] or head == self.heads[-1]
        self.heads.append(head)
        for one in self.heads[:: max(1, len(self.heads) // 5)]:
            self.ledger.check_head(*one)


LedgerMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLedgerMachine = LedgerMachine.TestCase
