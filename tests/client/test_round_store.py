"""What a site keeps of its rounds: forward only, on disk when the call returns, for all processes of the site alike."""

import importlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.client import crash_points
from tests.client.clinic import a_signer
from tests.client.crash_points import KEY, PROCESSES
from urna.client.ledger import Ledger
from urna.client.round_store import KeptRound, RoundStore, connect
from urna.privacy.secure_sum import Context, Progress
from urna.protocol.errors import LedgerError
from urna.protocol.messages import Member
from urna.protocol.quorum import quorum

round_store_module: Any = importlib.import_module("urna.client.round_store")  # for what it calls, to be interrupted
CAMPAIGN, ROUND = "run-1", "run-1/ballot/1"
ONE, OTHER = "a1" * 32, "b2" * 32  # digests


def a_context(num_sites: int = 4, round_id: str = ROUND) -> Context:
    signers = [a_signer(f"site-{number}") for number in range(1, num_sites + 1)]
    keys = [X25519PrivateKey.generate().public_key().public_bytes_raw().hex() for _ in signers]
    cohort = tuple(Member.create(one, CAMPAIGN, key, 60) for one, key in zip(signers, keys, strict=True))
    return Context(CAMPAIGN, round_id, cohort, quorum(num_sites), 7, 2, 24, b"\x00seed", "ef" * 32)


CONTEXT = a_context()
UPLOADED = KeptRound(CAMPAIGN, CONTEXT, Progress(CONTEXT.digest.hex()))
ANSWERED = replace(UPLOADED, progress=replace(UPLOADED.progress, alive_sha256=ONE), answer_to=OTHER, answer=b"pads\x00\xff")
BURNT = replace(UPLOADED, progress=replace(UPLOADED.progress, burnt=True))
NEVER = KeptRound(CAMPAIGN, None, Progress("", "", burnt=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rounds.sqlite"


@pytest.fixture
def store(path: Path) -> RoundStore:
    return RoundStore.open(path)


def test_a_write_is_on_disk_before_it_returns(store: RoundStore, path: Path) -> None:
    """EXTRA: also the journal's folder, so that a power cut cannot bring the round before it back."""
    for one in (store, RoundStore.open(path)):  # the settings belong to a connection, not to the file
        assert one._db.execute("PRAGMA synchronous").fetchone() == (3,)
        assert one._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert one._db.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_the_rounds_of_a_ledger_are_as_durable(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", KEY)
    assert ledger.rounds._db is ledger._db  # so that both can be in one transaction
    assert ledger.rounds._db.execute("PRAGMA synchronous").fetchone() == (3,)


def test_the_file_is_readable_by_its_owner_alone(store: RoundStore, path: Path) -> None:
    store.keep(ROUND, UPLOADED)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kept", [UPLOADED, ANSWERED, BURNT, NEVER], ids=["uploaded", "answered", "burnt", "never uploaded"])
def test_what_is_kept_comes_back_from_another_process(store: RoundStore, path: Path, kept: KeptRound) -> None:
    store.keep(ROUND, kept)
    store.close()
    again = RoundStore.open(path).find(ROUND)
    assert again == kept
    if kept.context is not None:
        assert again is not None
        assert again.context is not None
        assert again.context.digest == CONTEXT.digest
        assert again.context.graph.holders == CONTEXT.graph.holders


def test_every_field_of_a_context_comes_back(store: RoundStore) -> None:
    """A context that came back with one field changed would have other pads, and nobody would know why."""
    sparse = a_context(40, "run-1/ballot/40")
    store.keep(sparse.round_id, KeptRound(CAMPAIGN, sparse, Progress(sparse.digest.hex())))
    kept = store.find(sparse.round_id)
    assert kept is not None
    assert kept.context == sparse
    assert kept.context is not None
    assert kept.context.graph.neighbours(3) == sparse.graph.neighbours(3)


def test_an_unknown_round_is_nothing(store: RoundStore) -> None:
    assert store.find(ROUND) is None
    assert store.progress(CAMPAIGN) == {}
    assert store.unaudited(CAMPAIGN) == {}


BACK: dict[str, tuple[KeptRound, KeptRound]] = {
    "another context": (UPLOADED, replace(UPLOADED, progress=Progress(OTHER))),
    "no context": (UPLOADED, replace(UPLOADED, progress=Progress(""))),
    "unanswered": (ANSWERED, UPLOADED),
    "another list": (ANSWERED, replace(ANSWERED, progress=replace(ANSWERED.progress, alive_sha256=OTHER))),
    "another answer": (ANSWERED, replace(ANSWERED, answer=b"other pads")),
    "no answer": (ANSWERED, replace(ANSWERED, answer=None)),
    "not burnt": (BURNT, UPLOADED),
    "uploaded though burnt": (NEVER, UPLOADED),
    "answered though burnt": (BURNT, ANSWERED),
    "shown otherwise": (replace(ANSWERED, audited="unproven"), replace(ANSWERED, audited="opened")),
    "not shown": (replace(ANSWERED, audited="opened"), ANSWERED),
}


@pytest.mark.parametrize("move", BACK)
def test_a_round_never_moves_back(store: RoundStore, path: Path, move: str) -> None:
    before, after = BACK[move]
    for one in (store, RoundStore.open(path)):
        one.keep(ROUND, before)
        with pytest.raises(RuntimeError, match=f"round {ROUND} cannot go back from Progress"):
            one.keep(ROUND, after)
        assert one.find(ROUND) == before


def test_a_round_moves_forward_and_may_stay(store: RoundStore) -> None:
    audited = replace(ANSWERED, audited="opened")
    for kept in (UPLOADED, ANSWERED, audited, replace(audited, progress=replace(audited.progress, burnt=True))):
        store.keep(ROUND, kept)
        store.keep(ROUND, kept)
        assert store.find(ROUND) == kept


def test_progress_is_of_one_campaign(store: RoundStore) -> None:
    store.keep(ROUND, ANSWERED)
    store.keep("run-1/ballot/2", NEVER)
    store.keep("run-2/ballot/1", replace(UPLOADED, campaign="run-2"))
    assert store.progress(CAMPAIGN) == {ROUND: ANSWERED.progress, "run-1/ballot/2": NEVER.progress}
    assert store.progress("run-2") == {"run-2/ballot/1": UPLOADED.progress}
    assert store.progress("run-3") == {}


def test_only_answered_rounds_wait_for_their_audit_until_they_had_it(store: RoundStore) -> None:
    for number, kept in enumerate([UPLOADED, ANSWERED, BURNT, NEVER, ANSWERED, replace(ANSWERED, campaign="run-2")]):
        store.keep(f"round/{number}", kept)
    assert list(store.unaudited(CAMPAIGN)) == ["round/1", "round/4"]
    assert store.unaudited(CAMPAIGN)["round/1"] == ANSWERED
    store.set_audited("round/4", "opened")
    assert list(store.unaudited(CAMPAIGN)) == ["round/1"]
    store.set_audited("round/1", "aborted")
    assert store.unaudited(CAMPAIGN) == {}
    assert list(store.unaudited("run-2")) == ["round/5"]


@pytest.mark.parametrize(("audited", "burnt"), [("opened", False), ("aborted", True), ("unproven", True)])
def test_a_round_that_was_given_up_is_burnt_when_that_is_noted(store: RoundStore, audited: Any, burnt: bool) -> None:
    store.keep(ROUND, ANSWERED)
    store.set_audited(ROUND, audited)
    kept = store.find(ROUND)
    assert kept is not None
    assert (kept.audited, kept.progress.burnt) == (audited, burnt)
    assert store.num_unproven(CAMPAIGN) == (audited == "unproven")
    assert store.num_unproven("run-2") == 0


def test_the_order_of_rounds_is_that_of_their_uploads(store: RoundStore) -> None:
    """`INSERT OR REPLACE` gives a row another number; what waits for its audit stays complete."""
    for number in (3, 1, 2):
        store.keep(f"round/{number}", UPLOADED)
    for number in (2, 3, 1):
        store.keep(f"round/{number}", ANSWERED)
    assert sorted(store.unaudited(CAMPAIGN)) == ["round/1", "round/2", "round/3"]


def test_a_round_key_is_made_once(store: RoundStore, path: Path) -> None:
    first = store.private_key(CAMPAIGN).private_bytes_raw()
    assert store.private_key(CAMPAIGN).private_bytes_raw() == first
    assert RoundStore.open(path).private_key(CAMPAIGN).private_bytes_raw() == first
    assert store.private_key("run-2").private_bytes_raw() != first


def test_what_was_rolled_back_was_never_kept(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", KEY)

    def fail() -> None:
        with ledger.exclusive():
            ledger.rounds.keep(ROUND, ANSWERED)
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    assert ledger.rounds.find(ROUND) is None
    with ledger.exclusive():
        ledger.rounds.keep(ROUND, UPLOADED)
    assert Ledger.open(tmp_path / "ledger.sqlite", KEY).rounds.find(ROUND) == UPLOADED


def test_a_refused_move_back_undoes_its_transaction(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", KEY)
    ledger.rounds.keep(ROUND, ANSWERED)

    def move_back() -> None:
        with ledger.exclusive():
            ledger.rounds.keep("run-1/ballot/2", NEVER)
            ledger.rounds.keep(ROUND, UPLOADED)

    with pytest.raises(RuntimeError, match="cannot go back"):
        move_back()
    assert ledger.rounds.progress(CAMPAIGN) == {ROUND: ANSWERED.progress}


# ---- files that are none


def test_another_file_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to look at it" * 20)
    with pytest.raises(LedgerError, match="cannot be kept: file is not a database"):
        RoundStore.open(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be kept"):
        RoundStore.open(tmp_path)
    with pytest.raises(LedgerError, match="cannot be kept"):
        RoundStore.open(tmp_path / "missing" / "rounds.sqlite")


@pytest.mark.parametrize("content", ["'{}'", "'[1'", '\'{"cohort": [{}], "quorum": {}, "graph_seed": "00"}\''])
def test_a_context_that_cannot_be_read_is_an_error_and_never_a_fresh_round(store: RoundStore, path: Path, content: str) -> None:
    store.keep(ROUND, UPLOADED)
    sqlite3.connect(path, isolation_level=None).execute(f"UPDATE secure_round SET context_json = {content}")
    with pytest.raises(LedgerError, match="the rounds that this site keeps cannot be used"):
        store.find(ROUND)


def test_a_closed_file_is_an_error(store: RoundStore) -> None:
    store.close()
    for use in (lambda: store.find(ROUND), lambda: store.keep(ROUND, UPLOADED), lambda: store.progress(CAMPAIGN)):
        with pytest.raises(LedgerError, match="cannot be used: Cannot operate on a closed database"):
            use()


# ---- several processes


RACES: dict[str, tuple[KeptRound, KeptRound]] = {
    "two lists": (ANSWERED, replace(ANSWERED, progress=replace(ANSWERED.progress, alive_sha256=OTHER), answer=b"other")),
    "a list, and given up": (ANSWERED, BURNT),
    "given up, and a list": (BURNT, ANSWERED),
    "two contexts": (UPLOADED, replace(UPLOADED, progress=Progress(OTHER))),
}


@pytest.mark.parametrize("race", RACES)
def test_of_two_processes_that_move_one_round_at_once_one_is_stopped(
    store: RoundStore, path: Path, monkeypatch: pytest.MonkeyPatch, race: str
) -> None:
    """The other one writes after this one has looked and before it writes itself."""
    first, second = RACES[race]
    if first.progress.alive_sha256 or second.progress.alive_sha256:
        store.keep(ROUND, UPLOADED)
    other, real = RoundStore.open(path), round_store_module._moves_back
    other._db.execute("PRAGMA busy_timeout=1")
    done: list[KeptRound] = []

    def attempt(one: RoundStore, kept: KeptRound) -> None:
        try:
            one.keep(ROUND, kept)
        except (LedgerError, RuntimeError):
            return
        done.append(kept)

    def interrupted(old: KeptRound, new: KeptRound) -> bool:
        monkeypatch.setattr(round_store_module, "_moves_back", real)
        attempt(other, second)
        return bool(real(old, new))

    if store.find(ROUND) is None:  # then nothing is compared: interrupt the look itself
        find = RoundStore.find

        def interrupted_find(self: RoundStore, round_id: str) -> KeptRound | None:
            found = find(self, round_id)
            monkeypatch.setattr(RoundStore, "find", find)
            attempt(other, second)
            return found

        monkeypatch.setattr(RoundStore, "find", interrupted_find)
    else:
        monkeypatch.setattr(round_store_module, "_moves_back", interrupted)
    attempt(store, first)
    assert len(done) == 1
    assert store.find(ROUND) == done[0]


def script(*arguments: str) -> None:
    subprocess.run([sys.executable, crash_points.__file__, *arguments], check=True, timeout=120)


def test_of_many_processes_that_answer_at_once_one_is_heard(tmp_path: Path) -> None:
    script("answer", str(tmp_path))
    won = [one.name.split("-") for one in tmp_path.glob("won-*")]
    rounds = {number for _, number, _ in won}
    assert len(rounds) > 5
    assert len(won) == len(rounds)  # one process each
    store = RoundStore.open(tmp_path / "ledger.sqlite")
    for _, number, process in won:
        kept = store.find(f"round/{number}")
        assert kept is not None
        assert kept.answer == process.encode()


def test_one_key_for_many_processes(tmp_path: Path) -> None:
    script("key", str(tmp_path))
    keys = [one.read_bytes() for one in tmp_path.glob("key-*")]
    assert len(keys) == PROCESSES
    assert set(keys) == {RoundStore.open(tmp_path / "ledger.sqlite").private_key(CAMPAIGN).private_bytes_raw()}


def test_a_kill_at_every_statement_keeps_a_reply_and_its_round_together(tmp_path: Path) -> None:
    """Of a settled reply, its round, and the note that an earlier round was shown: all, or nothing."""
    script("kill-rounds", str(tmp_path))
    folders = [one for one in tmp_path.iterdir() if one.is_dir()]
    assert len(folders) > 6
    assert sum((folder / "done").exists() for folder in folders) == 1
    seen = set()
    for folder in folders:
        ledger = Ledger.open(folder / "ledger.sqlite", KEY)
        settled = ledger.find("run-1/ballot/2", "0" * 64)
        earlier = ledger.rounds.find("run-1/ballot/1")
        assert earlier is not None
        state = (settled != "reserved", ledger.rounds.find("run-1/ballot/2") is not None, earlier.audited == "opened")
        assert state in {(False, False, False), (True, True, True)}
        seen.add(state)
        if (folder / "released").exists():
            assert state[0]
    assert len(seen) == 2


# ---- a store without the rule


def never_moves_back(path: Path) -> None:
    store = RoundStore.open(path)
    store.keep(ROUND, ANSWERED)
    try:
        store.keep(ROUND, BACK["another list"][1])
    except RuntimeError:
        return
    raise AssertionError("a round was answered for two lists")


def survives_a_restart(path: Path) -> None:
    store = RoundStore.open(path)
    store.keep(ROUND, ANSWERED)
    shutil.copy(path, path.with_suffix(".copy"))
    assert RoundStore.open(path.with_suffix(".copy")).find(ROUND) == ANSWERED


def without_the_rule(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(round_store_module, "_moves_back", lambda *_: False)


def with_a_fresh_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RoundStore, "find", lambda *_: None)


def in_memory(patch: pytest.MonkeyPatch) -> None:
    """As Flower keeps a context's state: until the process ends."""
    patch.setattr(round_store_module, "connect", lambda _: connect(Path(":memory:")))


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Path], None]]] = [
    (without_the_rule, never_moves_back),
    (with_a_fresh_memory, never_moves_back),
    (in_memory, survives_a_restart),
]


@pytest.mark.parametrize("holds", [never_moves_back, survives_a_restart])
def test_the_property_holds(path: Path, holds: Callable[[Path], None]) -> None:
    holds(path)


@pytest.mark.parametrize(("plant", "holds"), MUTANTS, ids=lambda one: one.__name__)
def test_a_planted_mutant_is_caught(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    holds: Callable[[Path], None],
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        holds(path)
