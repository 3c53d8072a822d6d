"""A site's side of rounds, without a site around it: audits of cohorts of any size, and what no order of requests can bring."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.client.clinic import a_signer
from urna.client.round_store import KeptRound, RoundStore
from urna.client.secure_rounds import MAX_UNPROVEN_ABORTS, SecureRounds, graph_nonce
from urna.privacy.ring import numbers_of
from urna.privacy.secure_sum import Bytes, Context, Progress, alive_digest, burnt_statement, opened_items
from urna.protocol.errors import AuditError, ProtocolError, ReplayError
from urna.protocol.identity import OPERATOR, Identity, Roster, verify
from urna.protocol.messages import AnswerOfSite, Audit, BallotRequest, Member
from urna.protocol.quorum import MAX_SILENT_AT_SETUP, quorum

CAMPAIGN = "run-1"


@cache
def signer(number: int) -> Identity:
    return a_signer(f"site-{number:02}")


@cache
def key_of(number: int) -> X25519PrivateKey:  # noqa: ARG001 - one each
    return X25519PrivateKey.generate()


@cache
def member(number: int) -> Member:
    public = key_of(number).public_key().public_bytes_raw().hex()
    return Member.create(signer(number), CAMPAIGN, public, 60)


def a_context(num_sites: int, round_id: str = "run-1/1", num_colluding: int = 1, size: int = 3) -> Context:
    cohort = tuple(member(number) for number in range(num_sites))
    return Context(CAMPAIGN, round_id, cohort, quorum(num_sites, num_colluding), size, 0, 32, b"graph", "ef" * 32)


@dataclass
class Desk:
    """The rounds of one member, and all who sign."""

    store: RoundStore
    path: Path
    number: int = 0
    min_cohort: int = 3
    max_unproven_aborts: int = MAX_UNPROVEN_ABORTS

    @property
    def rounds(self) -> SecureRounds:
        sites = {signer(number).name: signer(number).public_key_hex for number in range(50)}
        roster = Roster(operator=signer(99).public_key_hex, sites=sites)
        return SecureRounds(signer(self.number), roster, self.store, self.min_cohort, self.max_unproven_aborts)

    def upload(self, context: Context) -> None:
        self.rounds.upload(context, key_of(self.number), numbers_of(context.ring.zeros(context.size)))
        self.rounds.keep(context)

    def unmask(self, context: Context, alive: Sequence[str], request: str = "aa" * 32) -> bytes:
        def sealed(pads: Bytes, answer: AnswerOfSite) -> bytes:
            return pads.tobytes() + answer.signature.encode()

        return self.rounds.unmask(context.round_id, key_of(self.number), alive, request, sealed)

    def restart(self) -> None:
        self.store.close()
        self.store = RoundStore.open(self.path)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(RoundStore.open(tmp_path / "rounds.sqlite"), tmp_path / "rounds.sqlite")


def by_name(name: str) -> Identity:
    return signer(int(name.removeprefix("site-")))


def signed(context: Context, alive: Sequence[str], signers: Sequence[str]) -> Audit:
    digest = alive_digest(context, alive)
    answers = {
        name: AnswerOfSite(alive_sha256=digest.hex(), signature=by_name(name).sign("alive", digest).hex()) for name in signers
    }
    return Audit(round_id=context.round_id, alive=tuple(alive), answers=answers)


def burnt(context: Context, names: Sequence[str]) -> Audit:
    statement = burnt_statement(context.round_id, context.digest.hex(), "")
    answers = {name: AnswerOfSite(alive_sha256="", signature=by_name(name).sign("burnt", statement).hex()) for name in names}
    return Audit(round_id=context.round_id, alive=(), answers=answers)


def holders_of(context: Context) -> list[str]:
    return [context.names[at] for at in context.graph.holders]


def answered_by_a_holder(desk: Desk, num_sites: int) -> tuple[Context, list[str]]:
    """A round whose full list was answered by the first holder; and all holders."""
    context = a_context(num_sites)
    holders = holders_of(context)
    desk.number = int(holders[0].removeprefix("site-"))
    desk.upload(context)
    desk.unmask(context, context.names)
    return context, holders


SIZES = [3, 4, 5, 10, 32, 40]


@pytest.mark.parametrize("num_sites", SIZES)
def test_an_opened_round_is_shown_by_as_many_holders_as_the_threshold_and_by_no_fewer(desk: Desk, num_sites: int) -> None:
    context, holders = answered_by_a_holder(desk, num_sites)
    threshold = context.quorum.threshold
    with pytest.raises(AuditError, match=f"expected {threshold} holders' signatures .* found {threshold - 1}"):
        desk.rounds.check_audits(CAMPAIGN, [signed(context, context.names, holders[: threshold - 1])])
    found = desk.rounds.check_audits(CAMPAIGN, [signed(context, context.names, holders[-threshold:])])
    assert found == {context.round_id: "opened"}


@pytest.mark.parametrize("num_sites", SIZES)
def test_an_aborted_round_is_proven_when_the_others_are_too_few_to_open_it(desk: Desk, num_sites: int) -> None:
    """The holders that never answered and never will, but for colluders who lie, leave fewer than the threshold."""
    context, holders = answered_by_a_holder(desk, num_sites)
    needed = len(holders) - context.quorum.threshold + 1 + context.quorum.num_colluding
    assert desk.rounds.check_audits(CAMPAIGN, [burnt(context, holders[-needed:])]) == {context.round_id: "aborted"}
    assert desk.rounds.check_audits(CAMPAIGN, [burnt(context, holders[-needed + 1 :] if needed > 1 else [])]) == {
        context.round_id: "unproven"
    }


def test_signatures_of_sites_that_hold_no_shares_count_for_nothing(desk: Desk) -> None:
    """Above 32 sites a committee holds the shares: who cannot answer has not answered."""
    context, holders = answered_by_a_holder(desk, 40)
    others = [name for name in context.names if name not in holders]
    assert len(others) == 8
    threshold = context.quorum.threshold
    some = [*holders[: threshold - 8], *others]
    assert len(some) == threshold
    with pytest.raises(AuditError, match=f"found {threshold - 8}"):
        desk.rounds.check_audits(CAMPAIGN, [signed(context, context.names, some)])
    needed = len(holders) - threshold + 1
    audit = burnt(context, [*holders[: needed - 1], *others])
    assert desk.rounds.check_audits(CAMPAIGN, [audit]) == {context.round_id: "unproven"}


def test_a_site_without_shares_uploads_and_is_never_asked_what_became_of_it(desk: Desk) -> None:
    context = a_context(40)
    desk.number = next(at for at in range(40) if at not in context.graph.holders)
    desk.upload(context)
    with pytest.raises(ProtocolError, match="expected a holder of shares"):
        desk.unmask(context, context.names)
    assert desk.rounds.check_audits(CAMPAIGN, []) == {}


def test_two_sites_of_a_split_view_are_never_both_shown_enough(desk: Desk, tmp_path: Path) -> None:
    """Whatever signatures a server gathers, with a colluding site that signs both lists."""
    for num_sites in (4, 5, 7, 10):
        context = a_context(num_sites, f"run-1/{num_sites}")
        first, second = context.names, context.names[:-1]
        colluder = context.names[1]
        one, other = desk, Desk(RoundStore.open(tmp_path / f"other-{num_sites}.sqlite"), tmp_path, 2)
        one.number = 0
        for each, alive in ((one, first), (other, second)):
            each.upload(context)
            each.unmask(context, alive)
        honest = [name for name in context.names if name != colluder]
        for cut in range(len(honest) + 1):  # the honest sign one list each, as they were shown
            satisfied = 0
            for each, alive, signers in ((one, first, honest[:cut]), (other, second, honest[cut:])):
                try:
                    each.rounds.check_audits(CAMPAIGN, [signed(context, alive, [*signers, colluder])])
                    satisfied += 1
                except AuditError:
                    continue
            assert satisfied <= 1, (num_sites, cut)
        desk.store.set_audited(context.round_id, "opened")


def test_what_was_found_is_kept_only_when_it_is_noted(desk: Desk) -> None:
    context, holders = answered_by_a_holder(desk, 5)
    found = desk.rounds.check_audits(CAMPAIGN, [signed(context, context.names, holders)])
    with pytest.raises(AuditError, match="found nothing"):
        desk.rounds.check_audits(CAMPAIGN, [])
    desk.rounds.note(found)
    assert desk.rounds.check_audits(CAMPAIGN, []) == {}


def test_an_audit_of_another_campaign_is_asked_there(desk: Desk) -> None:
    answered_by_a_holder(desk, 5)
    assert desk.rounds.check_audits("run-2", []) == {}


def test_a_site_of_the_roster_alone_can_speak(desk: Desk) -> None:
    """A member whose identity the site's roster does not know (any more) is not believed."""
    context, holders = answered_by_a_holder(desk, 5)
    rounds = desk.rounds
    gone = {name: key for name, key in rounds.roster.sites.items() if name != holders[1]}
    smaller = SecureRounds(rounds.identity, Roster(operator=rounds.roster.operator, sites=gone), desk.store, 3)
    signers = holders[: context.quorum.threshold]
    assert rounds.check_audits(CAMPAIGN, [signed(context, context.names, signers)])
    with pytest.raises(AuditError, match="found 3"):
        smaller.check_audits(CAMPAIGN, [signed(context, context.names, signers)])
    assert OPERATOR not in gone


# ---- any order of requests


def lists_of(context: Context) -> list[tuple[str, ...]]:
    names = context.names
    return [names, *(tuple(name for name in names if name != gone) for gone in names[1:]), names[:3], names[::-1]]


class Model:
    """What one round has come to, as an outsider remembers it."""

    def __init__(self) -> None:
        self.uploaded = self.burnt = False
        self.answers: dict[tuple[str, tuple[str, ...]], bytes] = {}  # (request, list) -> answer
        self.said_unanswered = False


def check_one_way(desk: Desk, seed: int, steps: int = 25) -> None:
    """A server that asks anything in any order, with restarts: it learns one list's pads, and no burnt statement is untrue."""
    chance = random.Random(seed)
    context = replace(a_context(5, f"run-{seed}/1"), campaign=f"run-{seed}")
    model, lists = Model(), lists_of(context)
    for _ in range(steps):
        action = chance.choice(["upload", "unmask", "unmask", "unmask", "burn", "restart"])
        if action == "restart":
            desk.restart()
        elif action == "upload":
            try:
                desk.upload(context)
            except ReplayError:
                assert model.uploaded or model.burnt
                continue
            assert not model.uploaded
            assert not model.burnt
            model.uploaded = True
        elif action == "burn" and chance.random() < 0.3:
            said = desk.rounds.burn(context.campaign, context.round_id)
            model.burnt = True
            model.said_unanswered |= said.alive_sha256 == ""
            digest = context.digest.hex() if model.uploaded else ""
            statement = burnt_statement(context.round_id, digest, said.alive_sha256)
            verify(desk.rounds.roster, signer(desk.number).name, "burnt", statement, bytes.fromhex(said.signature))
        elif action == "unmask":
            request, alive = chance.choice(["aa" * 32, "bb" * 32]), chance.choice(lists)
            try:
                answer = desk.unmask(context, alive, request)
            except ProtocolError:
                continue
            assert model.uploaded
            assert not model.burnt
            if (request, alive) not in model.answers and model.answers:  # the same request id, as its hash says
                assert answer in model.answers.values()
                assert request in {known for known, _ in model.answers}
            model.answers.setdefault((request, alive), answer)
    assert len(set(model.answers.values())) <= 1
    assert not (model.answers and model.said_unanswered)


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_requests_opens_two_lists_or_makes_a_burnt_statement_untrue(desk: Desk, seed: int) -> None:
    check_one_way(desk, seed)


def test_the_random_server_gets_somewhere(desk: Desk) -> None:
    """The test above is not empty: over its seeds rounds are uploaded, answered, repeated and given up."""
    for seed in range(12):
        check_one_way(desk, seed)
    kept = [desk.store.find(f"run-{seed}/1") for seed in range(12)]
    assert sum(one is not None and one.answer is not None for one in kept) >= 3
    assert sum(one is not None and one.progress.burnt for one in kept) >= 3


def test_the_pads_of_an_answer_are_of_its_list_alone(desk: Desk) -> None:
    context = a_context(5)
    desk.upload(context)
    alive = context.names[:-1]
    pads = desk.unmask(context, alive)[:-128]
    assert len(pads) == 32 * len(opened_items(context, alive))
    table = np.frombuffer(pads, np.uint8).reshape(-1, 32)
    assert len({row.tobytes() for row in table}) == len(table)  # none opens two shares


def forgets_answers(patch: pytest.MonkeyPatch) -> None:
    find, progress = RoundStore.find, RoundStore.progress
    patch.setattr(RoundStore, "find", lambda *args: fresh(find(*args)))
    patch.setattr(RoundStore, "progress", lambda *args: {name: Progress(one.context) for name, one in progress(*args).items()})


def fresh(kept: KeptRound | None) -> KeptRound | None:
    return None if kept is None else replace(kept, progress=Progress(kept.progress.context), answer=None, answer_to="")


def forgets_burnt(patch: pytest.MonkeyPatch) -> None:
    """Says that it gives a round up, and does not."""
    burn = SecureRounds.burn

    def forgetful(self: SecureRounds, campaign: str, round_id: str) -> AnswerOfSite:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(RoundStore, "keep", lambda *_: None)
            return burn(self, campaign, round_id)

    patch.setattr(SecureRounds, "burn", forgetful)


@pytest.mark.parametrize("plant", [forgets_answers, forgets_burnt], ids=lambda one: one.__name__)
def test_a_planted_mutant_is_caught(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)

    def all_seeds() -> None:
        for seed in range(12):
            check_one_way(desk, seed)

    with pytest.raises(AssertionError):
        all_seeds()


# ---- who chooses a sparse graph


@cache
def committed(number: int) -> Member:
    """A member with its commitment to its part of the graph."""
    commitment = hashlib.sha256(bytes.fromhex(graph_nonce(key_of(number)))).hexdigest()
    public = key_of(number).public_key().public_bytes_raw().hex()
    return Member.create(signer(number), CAMPAIGN, public, 60, commitment)


OPERATOR_NONCE = "0e" * 32
OPERATOR_COMMITMENT = hashlib.sha256(bytes.fromhex(OPERATOR_NONCE)).hexdigest()


def nonces_of(numbers: Iterable[int]) -> dict[str, str]:
    return {signer(number).name: graph_nonce(key_of(number)) for number in numbers}


def sparse_request(members: Iterable[int] = range(40), **changes: Any) -> BallotRequest:
    fields: dict[str, Any] = {
        "campaign": CAMPAIGN,
        "plan_sha256": "0" * 64,
        "request_id": "run-1/1",
        "cohort": tuple(committed(number) for number in members),
        "noise_multiplier": 1.0,
        "step_exp": -14,
        "graph_nonce": OPERATOR_NONCE,
        "graph_nonces": nonces_of(members),
        "candidates": ("a", "b"),
    }
    return BallotRequest(**(fields | changes))


@pytest.fixture
def fixed(desk: Desk) -> Desk:
    """A desk whose campaign has forty members."""
    desk.rounds.setup(CAMPAIGN, key_of(0), [committed(number) for number in range(40)])
    return desk


def test_a_site_tells_its_part_of_the_graph_once_the_members_are_fixed(desk: Desk) -> None:
    members = [committed(number) for number in range(40)]
    nonce = desk.rounds.setup(CAMPAIGN, key_of(0), members)
    assert hashlib.sha256(bytes.fromhex(nonce)).hexdigest() == members[0].graph_commitment
    desk.restart()
    assert desk.rounds.setup(CAMPAIGN, key_of(0), members[::-1]) == nonce  # the same members
    for others in (members[:-1], [*members[:-1], committed(41)]):
        with pytest.raises(ReplayError, match="the members of run-1 were fixed before, with others"):
            desk.rounds.setup(CAMPAIGN, key_of(0), others)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([1, 2, 3, 4], "expected site-00 with its own graph commitment among the members"),
        ([0, 1], "expected a cohort of at least 3 sites, found 2"),
        ([0, 1, 1], "expected each site and key once, found duplicates"),
    ],
    ids=["without this site", "too few", "one twice"],
)
def test_members_that_are_none_are_told_nothing(desk: Desk, members: list[int], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        desk.rounds.setup(CAMPAIGN, key_of(0), [committed(number) for number in members])
    assert desk.store.setup(CAMPAIGN) == {}


def test_another_commitment_of_this_site_is_refused(desk: Desk) -> None:
    mine = committed(0).model_copy(update={"graph_commitment": "ab" * 32})
    with pytest.raises(ProtocolError, match="expected site-00 with its own graph commitment"):
        desk.rounds.setup(CAMPAIGN, key_of(0), [mine, committed(1), committed(2)])


def test_a_nonce_does_not_tell_the_round_key() -> None:
    key = key_of(0)
    assert graph_nonce(key) == graph_nonce(X25519PrivateKey.from_private_bytes(key.private_bytes_raw()))
    assert key.private_bytes_raw().hex() not in graph_nonce(key)
    assert len({graph_nonce(key_of(number)) for number in range(40)}) == 40


def test_a_sparse_graph_of_nonces_that_were_committed_to_is_taken(fixed: Desk) -> None:
    fixed.rounds.check_graph(sparse_request(), quorum(40), OPERATOR_COMMITMENT)
    fixed.rounds.check_graph(sparse_request(range(38)), quorum(38), OPERATOR_COMMITMENT)  # two members sat out


WRONG_GRAPHS: dict[str, dict[str, Any]] = {
    "another nonce of the operator": {"graph_nonce": "0f" * 32},
    "no nonces": {"graph_nonces": {}},
    "one missing": {"graph_nonces": nonces_of(range(39))},
    "one made up": {"graph_nonces": nonces_of(range(40)) | {signer(7).name: "ab" * 32}},
    "two swapped": {
        "graph_nonces": nonces_of(range(40)) | {signer(7).name: graph_nonce(key_of(8)), signer(8).name: graph_nonce(key_of(7))}
    },
    "a late member": {"cohort": tuple(committed(number) for number in range(1, 41)), "graph_nonces": nonces_of(range(1, 41))},
}


@pytest.mark.parametrize("kind", WRONG_GRAPHS)
def test_a_sparse_graph_that_someone_chose_alone_is_refused(fixed: Desk, kind: str) -> None:
    with pytest.raises(ProtocolError, match="expected the graph nonce"):
        fixed.rounds.check_graph(sparse_request(**WRONG_GRAPHS[kind]), quorum(40), OPERATOR_COMMITMENT)


def test_a_sparse_graph_before_the_members_were_fixed_is_refused(desk: Desk) -> None:
    with pytest.raises(ProtocolError, match="expected the graph nonces of all members but 3, found fewer or others"):
        desk.rounds.check_graph(sparse_request(), quorum(40), OPERATOR_COMMITMENT)


def test_nobody_adds_to_what_a_sparse_graph_depends_on(fixed: Desk) -> None:
    """With one free number an operator tries graphs until one falls apart."""
    request = sparse_request(graph_nonces=nonces_of(range(40)) | {"nobody": "ab" * 32})
    with pytest.raises(ProtocolError, match="expected"):
        fixed.rounds.check_graph(request, quorum(40), OPERATOR_COMMITMENT)


def test_three_members_that_never_told_their_part_of_the_graph_are_borne_and_no_more(fixed: Desk) -> None:
    """The server stops at setup where the sites would refuse here."""
    assert MAX_SILENT_AT_SETUP == 3
    fixed.rounds.check_graph(sparse_request(range(37)), quorum(37), OPERATOR_COMMITMENT)
    with pytest.raises(ProtocolError, match="expected the graph nonces of all members but 3, found fewer or others"):
        fixed.rounds.check_graph(sparse_request(range(36)), quorum(36), OPERATOR_COMMITMENT)


def test_an_upload_of_a_round_that_another_process_kept_or_gave_up_is_not_kept(desk: Desk) -> None:
    """Both masked before either wrote: who writes second must not send."""
    for name in ("uploaded", "given up"):
        context = a_context(5, f"run-1/{name}")
        desk.rounds.upload(context, key_of(0), numbers_of(context.ring.zeros(context.size)))
        other = Desk(RoundStore.open(desk.path), desk.path)
        if name == "uploaded":
            other.upload(context)
        else:
            other.rounds.burn(CAMPAIGN, context.round_id)
        with pytest.raises(ReplayError, match=f"round run-1/{name} was uploaded before, or given up"):
            desk.rounds.keep(context)
        other.store.close()
