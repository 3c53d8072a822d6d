"""The secure sum as an operator meets it at a site: what is uploaded, opened, given up and audited, and what never is.

Every request is really signed by the pinned operator: all attacks here are the operator's own, or a member's through it. Each
guarantee is a property of its own, so that a site without the rule behind it (a planted mutant) can be seen to break it.
"""

import importlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.client.clinic import NAME, NONCE, NUM_RECORDS, Clinic, Round, a_plan, a_signer, five_sites
from urna.client.ledger import Ledger
from urna.client.round_store import KeptRound, RoundStore
from urna.client.secure_rounds import SecureRounds
from urna.client.site import open_site
from urna.privacy import secure_sum
from urna.privacy.fixed_point import Grid
from urna.privacy.secure_sum import Context, Progress, alive_digest, burnt_statement, segments_of
from urna.protocol.errors import FailureCode
from urna.protocol.identity import verify
from urna.protocol.messages import (
    AnyReply,
    Audit,
    Burnt,
    Envelope,
    Failure,
    Masked,
    Member,
    Refusal,
    Statement,
    Summed,
    Unmasked,
    open_reply,
    signed,
)

site_module: Any = importlib.import_module("urna.client.site")  # for what they import, to be spied on
work_module: Any = importlib.import_module("urna.client.work")
release_module: Any = importlib.import_module("urna.privacy.release")
GONE = "site-5"


def code(reply: AnyReply) -> FailureCode:
    assert isinstance(reply, Failure), reply
    return reply.code


def same(reply: Envelope) -> tuple[str, bytes, bytes, dict[str, bytes]]:
    """All bytes of a reply, in an order that safetensors does not choose."""
    return reply.sender, reply.body, reply.signature, {name: array.tobytes() for name, array in reply.arrays.items()}


def num_releases(clinic: Clinic) -> int:
    return sum(row.count for row in clinic.site.ledger.rows())


def refused_for_nothing(clinic: Clinic, cohort: tuple[Member, ...], why: str) -> None:
    """A cohort that is no cohort costs nothing, and leaves no round behind."""
    assert code(clinic.ask(clinic.ballot(cohort=cohort))) == FailureCode.BAD_REQUEST
    assert why in clinic.log()
    assert num_releases(clinic) == 0
    assert clinic.site.ledger.rounds.progress(clinic.campaign) == {}


# ---- who is in a sum


def test_a_round_opens_with_its_peers_also_when_one_is_lost(five: Clinic) -> None:
    """The two exchanges fit together: of peers that send zeros the sum is what this site sent."""
    one = five.uploaded(five.evaluate("one"))
    first = five.opened(one)
    two = five.uploaded(five.evaluate("two", audits=(five.audit(one),)))
    for mine in (first, five.opened(two, silent=[GONE])):
        assert len(mine) == 1 + 1 + 9
        assert 0 < np.abs(mine).max() < 2**14 * 10 * 12  # noise of 10 / sqrt(3) steps of 2**-14, and counts of 12 records


def test_unsigned_key_refused(five: Clinic) -> None:
    *others, last = five.cohort()
    unsigned = last.model_copy(update={"signature": "0" * 128})
    refused_for_nothing(five, (*others, unsigned), "expected a member signed by site-5")


def test_swapped_key_refused(five: Clinic) -> None:
    """A relay that puts its own key in a member's place would read what is masked for that member."""
    *others, last = five.cohort()
    swapped = last.model_copy(update={"public_key": "ab" * 32})
    refused_for_nothing(five, (*others, swapped), "expected a member signed by site-5")


def test_keys_of_two_members_swapped_are_refused(five: Clinic) -> None:
    mine, two, three, *others = five.cohort()
    keys = two.public_key, three.public_key
    crossed = two.model_copy(update={"public_key": keys[1]}), three.model_copy(update={"public_key": keys[0]})
    refused_for_nothing(five, (mine, *crossed, *others), "expected a member signed by site-2")


def test_own_key_altered_refused(five: Clinic) -> None:
    """Also when this site signed it once, for another campaign or before it lost its ledger."""
    _, *others = five.cohort()
    other = Member.create(five.site.identity, five.campaign, "ab" * 32, NUM_RECORDS)
    refused_for_nothing(five, (other, *others), "expected site-1 with its own round key in the cohort, found another or none")


def test_unknown_identity_refused(five: Clinic) -> None:
    *others, _ = five.cohort()
    stranger = Member.create(a_signer("site-9"), five.campaign, "ab" * 32, NUM_RECORDS)
    refused_for_nothing(five, (*others, stranger), "expected a site of the roster, found 'site-9'")


def test_the_operator_is_no_member(five: Clinic) -> None:
    *others, _ = five.cohort()
    itself = Member.create(five.operator, five.campaign, "ab" * 32, NUM_RECORDS)
    refused_for_nothing(five, (*others, itself), "expected a site of the roster, found 'operator'")


def test_a_key_of_another_campaign_is_refused(five: Clinic) -> None:
    *others, _ = five.cohort()
    old = Member.create(five.peers[-1], "run-0", "ab" * 32, NUM_RECORDS)
    refused_for_nothing(five, (*others, old), "expected a member signed by site-5")


@pytest.mark.parametrize("what", ["member", "key"])
def test_duplicates_do_not_count(clinic: Clinic, what: str) -> None:
    """Two real members of three: a sum of two where three were promised."""
    mine, two, three = clinic.cohort()
    again = two if what == "member" else Member.create(clinic.peers[1], clinic.campaign, two.public_key, NUM_RECORDS)
    assert three.site == clinic.peers[1].name
    refused_for_nothing(clinic, (mine, two, again), "expected each site and key once, found duplicates")


def small_cohort_costs_nothing(clinic: Clinic) -> None:
    """Three of five, where the policy asks for four; the plan would take them."""
    reply = clinic.ask(clinic.ballot(cohort=clinic.cohort()[:3]))
    assert isinstance(reply, Failure), reply
    assert num_releases(clinic) == 0


def raised(clinic: Clinic, min_cohort: int) -> Clinic:
    """The site after its owner asked for larger cohorts, which campaigns that it had joined do not know."""
    policy = clinic.site.config.policy.model_copy(update={"min_cohort": min_cohort})
    clinic.site.config = clinic.site.config.model_copy(update={"policy": policy})
    return clinic


def test_cohort_below_policy_refused(five: Clinic) -> None:
    five.hello()
    small_cohort_costs_nothing(raised(five, 4))
    assert "expected a cohort of at least 4 sites, found 3" in five.log()


def test_cohort_below_the_plans_minimum_refused(five: Clinic) -> None:
    refused_for_nothing(five, five.cohort()[:2], "expected a cohort of at least 3 sites, found 2")


def few_survivors_stay_hidden(clinic: Clinic) -> None:
    """Three of five survive: less than two thirds, and fewer than the holders that must answer."""
    one = clinic.uploaded(clinic.ballot())
    assert code(clinic.ask(clinic.unmask(one, one.without("site-4", GONE)))) == FailureCode.BAD_REQUEST
    progress = clinic.site.ledger.rounds.progress(clinic.campaign)[one.id]
    assert progress.alive_sha256 == ""  # nothing was answered, so the right list still can be


def survivors_below_policy_stay_hidden(clinic: Clinic) -> None:
    """Four of five survive, enough for the plan, where the policy has come to ask for five."""
    one = clinic.uploaded(clinic.ballot())
    raised(clinic, 5)
    assert code(clinic.ask(clinic.unmask(one, one.without(GONE)))) == FailureCode.BAD_REQUEST


def test_survivors_below_two_thirds_refused_at_unmask(five: Clinic) -> None:
    few_survivors_stay_hidden(five)
    assert "expected at least 4 of 5 sites alive, found 3" in five.log()


def test_survivors_below_policy_refused_at_unmask(five: Clinic) -> None:
    survivors_below_policy_stay_hidden(five)
    assert "expected at least 5 of 5 sites alive, found 4" in five.log()


def test_a_cohort_whose_survivors_may_be_below_policy_costs_nothing(five: Clinic) -> None:
    """Five members are enough, but four of them would do for the sum to open."""
    request = five.ballot()
    raised(five, 5)
    assert code(five.ask(request)) == FailureCode.BAD_REQUEST
    assert num_releases(five) == 0


def test_a_key_that_shares_no_secret_costs_nothing(five: Clinic) -> None:
    """One member's low-order point, signed by itself, would make all others pay for every round."""
    *others, _ = five.cohort()
    low = Member.create(five.peers[-1], five.campaign, "00" * 32, NUM_RECORDS)
    refused_for_nothing(five, (*others, low), "expected an X25519 key of site-5, found a low-order point")


def test_the_same_list_opens_when_it_is_long_enough(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    assert code(five.ask(five.unmask(one, one.without("site-4", GONE), "first"))) == FailureCode.BAD_REQUEST
    assert isinstance(five.ask(five.unmask(one, one.without(GONE), "second")), Unmasked)


# ---- one list a round


LISTS: dict[str, Callable[[Round], tuple[str, ...]]] = {
    "with a stranger": lambda one: (*one.all, "site-9"),
    "with a site twice": lambda one: (*one.all, GONE),
    "not sorted": lambda one: one.all[::-1],
    "empty": lambda _: (),
    "of this site alone": lambda _: (NAME,),
    "without this site": lambda one: one.without(NAME),
}


@pytest.mark.parametrize("kind", LISTS)
def test_unmask_of_a_list_that_is_none_refused(five: Clinic, kind: str) -> None:
    one = five.uploaded(five.ballot())
    assert code(five.ask(five.unmask(one, LISTS[kind](one)))) == FailureCode.BAD_REQUEST
    assert five.site.ledger.rounds.progress(five.campaign)[one.id].alive_sha256 == ""
    assert five.site.ledger.rounds.unaudited(five.campaign) == {}


def test_unmask_of_a_list_without_this_site_refused(five: Clinic) -> None:
    """Its upload would be opened by its edges while its self-mask keeps what is left of it: it never helps with that."""
    one = five.uploaded(five.ballot())
    assert code(five.ask(five.unmask(one, one.without(NAME)))) == FailureCode.BAD_REQUEST
    assert "expected site-1, which uploaded, among the alive, found it dead: refused" in five.log()


def test_unmask_without_upload_refused(five: Clinic) -> None:
    five.hello()
    for reply in (five.ask(five.unmask("run-1/ballot/1", ())), five.ask(five.unmask("run-1/never", (NAME,)))):
        assert code(reply) == FailureCode.BAD_REQUEST
    assert "expected an unmask after an upload, found none of run-1/ballot/1 here" in five.log()


def test_unmask_of_a_round_that_was_reserved_and_crashed_refused(five: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    request = five.ballot()
    with monkeypatch.context() as patch:
        patch.setattr(SecureRounds, "keep", crash)
        with pytest.raises(KeyboardInterrupt):
            five.site.handle(request)
    assert code(five.ask(five.unmask("run-1/ballot/1", ("site-1", "site-2", "site-3", "site-4")))) == FailureCode.BAD_REQUEST


def crash(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def opened_of(clinic: Clinic, one: Round, *lists: tuple[str, ...]) -> int:
    """How many of these lists are answered; a site that forgets nothing answers one."""
    replies = [clinic.ask(clinic.unmask(one, alive, f"unmask-{at}")) for at, alive in enumerate(lists)]
    assert all(isinstance(reply, Unmasked | Failure) for reply in replies)
    return sum(isinstance(reply, Unmasked) for reply in replies)


def both_shares_stay_apart(clinic: Clinic) -> None:
    """The self-mask of site-5 as alive, its edges as dead: with both, its vector lies open."""
    one = clinic.uploaded(clinic.ballot())
    assert opened_of(clinic, one, one.all, one.without(GONE)) == 1


def test_both_shares_refused_in_two_requests(five: Clinic) -> None:
    both_shares_stay_apart(five)
    assert "was answered before, or given up: another request gets nothing" in five.log()


def test_both_shares_refused_in_two_requests_the_other_way_round(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    assert opened_of(five, one, one.without(GONE), one.all, one.without("site-4")) == 1


def test_both_shares_refused_in_one_request(five: Clinic) -> None:
    """One request has one list; no list opens two kinds of share of one site, whoever is on it."""
    one = five.uploaded(five.ballot())
    for alive in (one.all, one.without(GONE), one.without("site-3")):
        items = secure_sum.opened_items(one.context, alive)
        living = {one.context.index[name] for name in alive}
        selves = {item.dealer for item in items if item.peer is None}
        edges = {(item.dealer, item.peer) for item in items if item.peer is not None}
        assert selves == living
        assert not selves & {peer for _, peer in edges}
        assert all(dealer in living for dealer, _ in edges)
        assert len(items) == len(set(items))
    reply = five.site.handle(five.unmask(one, one.without(GONE)))
    assert reply.arrays["pads"].shape == (4 + 4, 32)  # of four self seeds and of the four edges to the lost site
    assert reply.arrays["pads"].dtype == np.uint8


def test_both_shares_refused_across_a_restart(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    five.unmasked(one)
    again = five.restarted()
    assert code(again.ask(again.unmask(one, one.without(GONE), "another"))) == FailureCode.REPLAY_CHANGED
    again.site.ledger.close()
    assert opened_of(five.reopened(), one, one.without(GONE)) == 0


def test_another_request_for_the_same_list_gets_nothing(five: Clinic) -> None:
    """Who lost the answer repeats the request; a second one under another name is an operator that keeps two books."""
    one = five.uploaded(five.ballot())
    five.unmasked(one)
    assert code(five.ask(five.unmask(one, one.all, "another"))) == FailureCode.REPLAY_CHANGED


@pytest.mark.parametrize("gone", [(), (GONE,)], ids=["all alive", "one lost"])
def test_repeated_unmask_gets_the_same_bytes_also_after_a_restart(five: Clinic, gone: tuple[str, ...]) -> None:
    one = five.uploaded(five.ballot())
    request = five.unmask(one, one.without(*gone))
    first = same(five.site.handle(request))
    assert same(five.site.handle(request)) == first
    assert same(five.restarted().site.handle(request)) == first
    assert same(five.reopened().site.handle(request)) == first


def test_an_answer_is_on_disk_before_it_leaves(five: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between computing pads and keeping them leaves a round that nobody has heard about."""
    one = five.uploaded(five.ballot())
    with monkeypatch.context() as patch:
        patch.setattr(RoundStore, "keep", crash)
        with pytest.raises(KeyboardInterrupt):
            five.site.handle(five.unmask(one))
    again = five.restarted()
    assert again.site.ledger.rounds.progress("run-1")[one.id].alive_sha256 == ""
    assert isinstance(again.ask(again.unmask(one, one.without(GONE))), Unmasked)


def test_a_second_process_answers_no_second_list(five: Clinic) -> None:
    one, other = five.uploaded(five.ballot()), five.reopened()
    five.unmasked(one)
    assert opened_of(other, one, one.without(GONE)) == 0


def test_what_is_signed_is_the_list_that_was_answered(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    alive = one.without(GONE)
    said = five.unmasked(one, alive).answer
    digest = alive_digest(one.context, alive)
    assert said.alive_sha256 == digest.hex()
    verify(five.site.roster, NAME, "alive", digest, bytes.fromhex(said.signature))
    assert said == five.answer(NAME, one, alive)


# ---- rounds that come again


def test_replayed_round_refused(five: Clinic) -> None:
    """The same round with another graph, noise, vector or cohort would mask a second vector with the same edges."""
    one = five.uploaded(five.train())
    changes: list[dict[str, Any]] = [{"noise_multiplier": 11.0}, {"cohort": five.cohort()[:4]}, {"step_exp": -13}]
    for change in changes:
        assert code(five.ask(five.train(**change))) == FailureCode.REPLAY_CHANGED
    assert code(five.ask(five.ballot("final/1"))) == FailureCode.REPLAY_CHANGED
    assert num_releases(five) == 1
    assert same(five.site.handle(one.request)) == same(one.reply)


def test_an_upload_is_repeated_also_after_its_round_was_opened(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    five.unmasked(one)
    assert same(five.restarted().site.handle(one.request)) == same(one.reply)


def test_a_round_is_masked_under_the_request_as_it_was_received(five: Clinic) -> None:
    """The arrays of a request are bound too: one bit of a global head, another context."""
    head = np.zeros(195, np.float32)
    one = five.uploaded(five.train("final/1", head.copy()))
    head[7] = np.nextafter(np.float32(0), np.float32(1))
    other = five.sealed(five.read(one.request), {"vector": head})
    assert other.body == one.request.body
    assert other.sha256 != one.request.sha256
    assert code(five.ask(other)) == FailureCode.REPLAY_CHANGED
    kept = five.site.ledger.rounds.find(one.id)
    assert kept is not None
    assert kept.context is not None
    assert kept.context.request_sha256 == one.request.sha256
    assert kept.progress.context == one.context.digest.hex()


@pytest.mark.parametrize("nonce", ["0f" * 32, "00" * 32])
def test_wrong_graph_nonce_refused(five: Clinic, nonce: str) -> None:
    """A graph that is chosen after the keys are known could be one that cuts a site off."""
    five.hello()
    assert code(five.ask(five.ballot(graph_nonce=nonce))) == FailureCode.BAD_REQUEST
    assert "expected the graph nonce that the hello was committed to, found another" in five.log()
    assert num_releases(five) == 0
    five.uploaded(five.ballot(graph_nonce=NONCE))


# ---- rounds that are given up


def test_upload_after_abort_costs_nothing(five: Clinic) -> None:
    """It will never leave: nothing is to be charged for it."""
    request = five.ballot()
    five.aborted("run-1/ballot/1")
    five.ask(request)
    assert num_releases(five) == 0


def test_unmask_after_abort_refused(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    five.aborted(one)
    assert opened_of(five, one, one.all) == 0
    assert opened_of(five.restarted(), one, one.all) == 0


def test_a_repeated_unmask_after_abort_refused(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    five.unmasked(one)
    five.aborted(one)
    assert code(five.ask(five.unmask(one))) == FailureCode.REPLAY_CHANGED
    assert code(five.restarted().ask(five.unmask(one))) == FailureCode.REPLAY_CHANGED


def test_upload_after_abort_refused(five: Clinic) -> None:
    """A late upload of a round that this site has sworn never to open."""
    request = five.ballot()
    said = five.aborted("run-1/ballot/1")
    assert said.answer.alive_sha256 == ""
    assert code(five.ask(request)) == FailureCode.REPLAY_CHANGED
    assert code(five.restarted().ask(request)) == FailureCode.REPLAY_CHANGED
    assert opened_of(five, Round(request, request, a_context(five, request)), five_names()) == 0


def five_names() -> tuple[str, ...]:
    return tuple(f"site-{number}" for number in range(1, 6))


def a_context(clinic: Clinic, request: Envelope) -> Context:
    summed = clinic.read(request)
    assert isinstance(summed, Summed)
    return secure_sum.context_of(summed, clinic.plan, 2, request.sha256)


def test_a_burnt_statement_is_signed_and_says_which_list_had_been_answered(five: Clinic) -> None:
    one, two = five.uploaded(five.ballot("ballot/1")), five.uploaded(five.ballot("ballot/2"))
    alive = one.without(GONE)
    five.unmasked(one, alive)
    cases = [
        (five.aborted(one), one.id, one.context.digest.hex(), alive_digest(one.context, alive).hex()),
        (five.aborted(two), two.id, two.context.digest.hex(), ""),  # uploaded, not answered
        (five.aborted("run-1/never"), "run-1/never", "", ""),  # not even uploaded
    ]
    for said, round_id, context, answered in cases:
        assert said.answer.alive_sha256 == answered
        statement = burnt_statement(round_id, context, answered)
        verify(five.site.roster, NAME, "burnt", statement, bytes.fromhex(said.answer.signature))
    assert cases[0][0].answer == five.burnt(NAME, one, alive)
    assert cases[1][0].answer == five.burnt(NAME, two)


def test_an_abort_says_the_same_again_and_after_a_restart(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    five.unmasked(one)
    first = five.aborted(one)
    assert five.ask(five.abort(one, "again")) == first.model_copy(update={"request_sha256": five.abort(one, "again").sha256})
    assert five.restarted().aborted(one) == first


def test_rounds_of_two_campaigns_are_kept_apart(five: Clinic) -> None:
    """A request of one campaign neither opens a round of another nor is answered with its keys."""
    one = five.uploaded(five.ballot())
    second = five.reopened()
    second.campaign, second.own, second.keys = "run-2", None, {}
    second.hello()
    assert not isinstance(second.ask(second.unmask(one)), Unmasked)


# ---- the audit


def answered(clinic: Clinic, alive: Callable[[Round], tuple[str, ...]] = lambda one: one.all) -> Round:
    """A first round that this site has helped to open."""
    one = clinic.uploaded(clinic.ballot("ballot/1"))
    clinic.unmasked(one, alive(one))
    return one


def kept_as_answered(clinic: Clinic, one: Round) -> None:
    """As if this site had answered the round's full list, whatever else waits for its audit."""
    store = clinic.site.ledger.rounds
    kept = store.find(one.id)
    assert kept is not None
    progress = replace(kept.progress, alive_sha256=alive_digest(one.context, one.all).hex())
    store.keep(one.id, replace(kept, progress=progress, answer_to="0" * 64, answer=b"pads"))


def resigned(audit: Audit, change: Callable[[str, str], str]) -> Audit:
    answers = {name: one.model_copy(update={"signature": change(name, one.signature)}) for name, one in audit.answers.items()}
    return audit.model_copy(update={"answers": answers})


def by_strangers(clinic: Clinic, one: Round) -> Audit:
    """As many good signatures as it takes, of sites that are in the roster and not in the round."""
    strangers = [a_signer(f"site-{number}") for number in range(6, 10)]
    clinic.site.roster.sites.update({stranger.name: stranger.public_key_hex for stranger in strangers})
    digest = alive_digest(one.context, one.all)
    mine = clinic.answer(NAME, one)
    answers = {who.name: mine.model_copy(update={"signature": who.sign("alive", digest).hex()}) for who in strangers}
    return Audit(round_id=one.id, alive=one.all, answers=answers)


def with_signatures_of_another_list(clinic: Clinic, one: Round) -> Audit:
    """The others were shown a list without site-5; this site is told that all signed its own."""
    others = clinic.audit(one, one.without(GONE)).answers
    return Audit(round_id=one.id, alive=one.all, answers=others | {NAME: clinic.answer(NAME, one)})


BAD_AUDITS: dict[str, tuple[Callable[[Clinic, Round], list[Audit]], str]] = {
    "nothing at all": (lambda _, __: [], "expected what became of round run-1/ballot/1, which this site answered"),
    "of another round": (
        lambda clinic, one: [clinic.audit(one).model_copy(update={"round_id": "run-1/ballot/0"})],
        "expected what became of round run-1/ballot/1, which this site answered; found nothing",
    ),
    "another list": (lambda clinic, one: [clinic.audit(one, one.without(GONE))], "split view: round run-1/ballot/1 is shown"),
    "the list in another order": (lambda clinic, one: [clinic.audit(one, one.all[::-1])], "split view"),
    "a longer list": (
        lambda clinic, one: [clinic.audit(one).model_copy(update={"alive": (*one.all, "site-9")})],
        "split view: round run-1/ballot/1 is shown",
    ),
    "one signature too few": (
        lambda clinic, one: [clinic.audit(one, signers=one.without("site-4", GONE))],
        "expected 4 holders' signatures over the alive list of round run-1/ballot/1, found 3",
    ),
    "nobody's signature": (lambda clinic, one: [clinic.audit(one, signers=())], "found 0"),
    "signatures of others than the members": (lambda clinic, one: [by_strangers(clinic, one)], "found 0"),
    "signatures over another list": (lambda clinic, one: [with_signatures_of_another_list(clinic, one)], "found 1"),
    "one signature for all": (
        lambda clinic, one: [resigned(clinic.audit(one), lambda _, __: clinic.answer(NAME, one).signature)],
        "found 1",
    ),
    "made-up signatures": (lambda clinic, one: [resigned(clinic.audit(one), lambda _, __: secrets.token_hex(64))], "found 0"),
    "signatures of its own upload's burning": (
        lambda clinic, one: [resigned(clinic.audit(one), lambda name, _: clinic.burnt(name, one, one.all).signature)],
        "found 0",
    ),
}


def stays_away(clinic: Clinic, audits: list[Audit]) -> None:
    """What a site does once it was not shown what it must see: it releases nothing, spends nothing, says "audit"."""
    before = num_releases(clinic)
    shown = tuple(audits)
    requests = [clinic.ballot("ballot/2", audits=shown), clinic.train(audits=shown), clinic.evaluate(audits=shown)]
    for request in (*requests, clinic.close(shown)):
        reply = clinic.site.handle(request)
        assert not reply.arrays
        assert code(open_reply(reply, clinic.site.roster, NAME, request)) == FailureCode.AUDIT
    assert num_releases(clinic) == before
    assert len(clinic.site.ledger.rounds.progress(clinic.campaign)) == 1


@pytest.mark.parametrize("kind", BAD_AUDITS)
def test_split_view_aborts(five: Clinic, kind: str) -> None:
    make, why = BAD_AUDITS[kind]
    audits = make(five, answered(five))
    stays_away(five, audits)
    assert why in five.log()


def split_view_is_noticed(clinic: Clinic) -> None:
    """This site was shown all five; the next request tells everybody that site-5 was lost."""
    one = answered(clinic)
    stays_away(clinic, [clinic.audit(one, one.without(GONE))])


def test_split_view_aborts_also_after_a_restart(five: Clinic) -> None:
    one = answered(five)
    again = five.restarted()
    stays_away(again, [five.audit(one, one.without(GONE))])
    stays_away(again, [])


def test_a_split_view_is_not_mended_by_another_round(five: Clinic) -> None:
    """Two rounds were answered; only the second is shown well."""
    one, two = five.uploaded(five.ballot("ballot/1")), five.uploaded(five.ballot("ballot/2"))
    for each in (one, two):
        kept_as_answered(five, each)
    good, bad = five.audit(two), five.audit(one, one.without(GONE))
    for audits in ([good], [good, bad], [bad, good]):
        assert code(five.ask(five.train(audits=tuple(audits)))) == FailureCode.AUDIT
    assert "final/1" not in {name.removeprefix("run-1/") for name in five.site.ledger.rounds.progress("run-1")}
    five.uploaded(five.train(audits=(five.audit(one), good)))


def test_no_second_round_is_opened_before_the_first_was_shown(five: Clinic) -> None:
    """A server that collects the uploads of all rounds first would split the view of each before any audit is due."""
    one, two = five.uploaded(five.ballot("ballot/1")), five.uploaded(five.train())
    five.unmasked(one)
    assert code(five.ask(five.unmask(two))) == FailureCode.AUDIT


def test_a_refused_audit_leaves_the_round_to_be_shown(five: Clinic) -> None:
    """A server that lost its journal's last line can still bring the right signatures."""
    one = answered(five)
    stays_away(five, [])
    five.uploaded(five.ballot("ballot/2", audits=(five.audit(one),)))


@pytest.mark.parametrize("gone", [(), (GONE,)], ids=["all alive", "one lost"])
def test_an_opened_round_passes_and_is_asked_only_once(five: Clinic, gone: tuple[str, ...]) -> None:
    one = answered(five, lambda one: one.without(*gone))
    five.uploaded(five.ballot("ballot/2", audits=(five.audit(one, one.without(*gone)),)))
    kept = five.site.ledger.rounds.find(one.id)
    assert kept is not None
    assert kept.audited == "opened"
    five.uploaded(five.train())
    five.restarted().uploaded(five.evaluate())


def test_as_many_signatures_as_the_threshold_are_enough(five: Clinic) -> None:
    one = answered(five)
    five.uploaded(five.ballot("ballot/2", audits=(five.audit(one, signers=("site-2", "site-3", "site-4", GONE)),)))


def test_a_good_audit_costs_a_refused_request_nothing(five: Clinic) -> None:
    """A refusal of the policy takes no note: the next request shows the round again."""
    one = answered(five)
    assert isinstance(five.ask(five.ballot("ballot/2", noise_multiplier=0.5, audits=(five.audit(one),))), Refusal)
    assert code(five.ask(five.ballot("ballot/3"))) == FailureCode.AUDIT
    five.uploaded(five.ballot("ballot/3", audits=(five.audit(one),)))


def test_a_round_that_was_not_answered_needs_no_audit(five: Clinic) -> None:
    five.uploaded(five.ballot("ballot/1"))
    two = five.uploaded(five.ballot("ballot/2"))
    five.unmasked(two)
    stranger = five.audit(two).model_copy(update={"round_id": "run-1/unknown"})
    five.uploaded(five.train(audits=(stranger, five.audit(two))))


def test_a_close_is_audited_too(five: Clinic) -> None:
    one = answered(five)
    assert code(five.ask(five.close())) == FailureCode.AUDIT
    assert code(five.ask(five.close([five.audit(one, one.without(GONE))]))) == FailureCode.AUDIT
    statement = five.ask(five.close([five.audit(one)]))
    assert isinstance(statement, Statement)
    assert five.ask(five.close([], "close-again")) == statement.model_copy(
        update={"request_sha256": five.close([], "close-again").sha256}
    )


# ---- the audit of rounds that were given up


@pytest.mark.parametrize("uploaded", [True, False], ids=["uploaded", "never uploaded"])
def test_an_aborted_round_is_proven_by_enough_burnt_statements(five: Clinic, uploaded: bool) -> None:
    """Three of five never answered and never will, one of them perhaps a liar: four answers cannot have come together."""
    one = answered(five)
    said = {name: five.burnt(name, one, uploaded=uploaded) for name in ("site-3", "site-4", GONE)}
    five.uploaded(five.ballot("ballot/2", audits=(five.given_up(one, said),)))
    kept = five.site.ledger.rounds.find(one.id)
    assert kept is not None
    assert (kept.audited, kept.progress.burnt) == ("aborted", True)
    assert code(five.ask(five.unmask(one))) == FailureCode.REPLAY_CHANGED  # what was proven stays true
    assert five.site.ledger.rounds.num_unproven("run-1") == 0


UNPROVEN: dict[str, Callable[[Clinic, Round], dict[str, Any]]] = {
    "nobody": lambda _, __: {},
    "one too few": lambda clinic, one: {GONE: clinic.burnt(GONE, one)},
    "one twice, under another name": lambda clinic, one: dict.fromkeys(("site-4", GONE), clinic.burnt(GONE, one)),
    "some who had answered": lambda clinic, one: {
        GONE: clinic.burnt(GONE, one),
        **{name: clinic.burnt(name, one, one.all) for name in ("site-2", "site-3", "site-4")},
    },
    "some for another context": lambda clinic, one: {
        name: clinic.answer(name, one).model_copy(
            update={
                "alive_sha256": "",
                "signature": clinic.identity(name).sign("burnt", burnt_statement(one.id, "ab" * 32, "")).hex(),
            }
        )
        for name in one.without(NAME)
    },
    "some for another round": lambda clinic, one: {
        name: clinic.answer(name, one).model_copy(
            update={
                "alive_sha256": "",
                "signature": clinic.identity(name).sign("burnt", burnt_statement("run-1/ballot/0", "", "")).hex(),
            }
        )
        for name in one.without(NAME)
    },
    "an answer that claims to be none": lambda clinic, one: {
        name: clinic.burnt(name, one, one.all).model_copy(update={"alive_sha256": ""}) for name in one.without(NAME)
    },
}


@pytest.mark.parametrize("kind", UNPROVEN)
def test_an_abort_that_is_not_proven_is_counted(five: Clinic, kind: str) -> None:
    one = answered(five)
    five.uploaded(five.ballot("ballot/2", audits=(five.given_up(one, UNPROVEN[kind](five, one)),)))
    kept = five.site.ledger.rounds.find(one.id)
    assert kept is not None
    assert (kept.audited, kept.progress.burnt) == ("unproven", True)
    assert five.site.ledger.rounds.num_unproven("run-1") == 1


def rounds_given_up(clinic: Clinic, count: int) -> list[AnyReply]:
    """The operator opens round after round and says each time that it was given up."""
    replies: list[AnyReply] = []
    audits: tuple[Audit, ...] = ()
    for number in range(1, count + 1):
        request = clinic.ballot(f"ballot/{number}", audits=audits)
        replies.append(clinic.ask(request))
        if isinstance(replies[-1], Masked):
            one = clinic.uploaded(request)
            clinic.unmasked(one)
            audits = (clinic.given_up(one),)
    return replies


@pytest.mark.parametrize("limit", [0, 2])
def test_unproven_claims_are_limited(artefacts: None, tmp_path: Path, limit: int) -> None:  # noqa: ARG001
    clinic = five_sites(tmp_path / "site-1", {"max_unproven_aborts": limit})
    replies = rounds_given_up(clinic, limit + 3)
    assert [isinstance(reply, Masked) for reply in replies] == [True] * (limit + 1) + [False, False]
    assert {code(reply) for reply in replies[limit + 1 :]} == {FailureCode.AUDIT}
    assert f"expected at most {limit} rounds given up without proof, found {limit + 1}" in clinic.log()
    assert num_releases(clinic) == limit + 1
    assert code(clinic.restarted().ask(clinic.close())) == FailureCode.AUDIT


def test_several_unproven_claims_at_once_are_all_counted(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = five_sites(tmp_path / "site-1", {"max_unproven_aborts": 1})
    rounds = [clinic.uploaded(clinic.ballot(f"ballot/{number}")) for number in (1, 2)]
    for one in rounds:
        kept_as_answered(clinic, one)
    audits = tuple(clinic.given_up(one) for one in rounds)
    assert code(clinic.ask(clinic.train(audits=audits))) == FailureCode.AUDIT
    clinic.uploaded(clinic.train(audits=(audits[0], clinic.audit(rounds[1]))))


def test_a_conflicting_list_in_an_abort_is_a_split_view(five: Clinic) -> None:
    """One member's honest word is enough, among whatever proof."""
    one = answered(five)
    said = {name: five.burnt(name, one) for name in ("site-3", "site-4", GONE)}
    said["site-2"] = five.burnt("site-2", one, one.without(GONE))
    stays_away(five, [five.given_up(one, said)])
    assert "split view: site-2 answered another alive list of round run-1/ballot/1 than this site" in five.log()


def test_a_made_up_conflict_is_not_believed(five: Clinic) -> None:
    """A server could else make honest sites leave in a member's name."""
    one = answered(five)
    digest = alive_digest(one.context, one.without(GONE)).hex()
    forged = five.burnt("site-2", one).model_copy(update={"alive_sha256": digest})
    said = {"site-2": forged, **{name: five.burnt(name, one) for name in ("site-4", GONE)}}
    five.uploaded(five.ballot("ballot/2", audits=(five.given_up(one, said),)))


def test_a_round_that_this_site_burnt_is_still_audited(five: Clinic) -> None:
    """It had answered before: what the others did with the round, it does not know."""
    one = answered(five)
    five.aborted(one)
    stays_away(five, [])
    said = {name: five.burnt(name, one) for name in ("site-4", GONE)}
    five.uploaded(five.ballot("ballot/2", audits=(five.given_up(one, said),)))


# ---- what a plan may ask


def test_a_plan_without_the_secure_sum_is_refused_by_default(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = five_sites(tmp_path / "site-1", privacy={"noise": "local"}, federation={"secure_sum": False})
    reply = clinic.ask(clinic.hello_request())
    assert isinstance(reply, Refusal)
    assert reply.reasons == (
        "secure sum: the plan sees single releases (federation.secure_sum = false), this site requires sums",
    )


def plain_site(folder: Path) -> Clinic:
    policy = {"secure_sum_required": False}
    return five_sites(folder, policy, privacy={"noise": "local"}, federation={"secure_sum": False})


def test_without_the_secure_sum_plain_segments_leave_with_all_of_their_noise(
    artefacts: None,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clinic = plain_site(tmp_path / "site-1")
    asked: list[int] = []
    real = release_module.noise_share

    def noise_share(*args: Any) -> Any:
        asked.append(args[4])
        return real(*args)

    monkeypatch.setattr(release_module, "noise_share", noise_share)
    request = clinic.evaluate()
    reply = clinic.site.handle(request)
    assert isinstance(open_reply(reply, clinic.site.roster, NAME, request), Masked)
    assert {name: (str(array.dtype), array.shape) for name, array in reply.arrays.items()} == {
        "segment-000000": ("uint8", (4 * 11,))
    }
    assert set(asked) == {1}  # this site alone makes it private, as it was also asked whether it can before it was charged
    grid = Grid(-14, 5, 32)
    counts = grid.from_ring(segments_of(reply.arrays)[0].view("<u4"))
    assert np.abs(counts).max() < 12 + 10 * 8  # counts of 12 held-out records and noise of 10: nothing masks them
    assert same(clinic.restarted().site.handle(request)) == same(reply)
    assert num_releases(clinic) == 1
    assert clinic.site.ledger.rounds.progress("run-1") == {}


def test_without_the_secure_sum_there_is_nothing_to_unmask(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = plain_site(tmp_path / "site-1")
    assert isinstance(clinic.ask(clinic.ballot()), Masked)
    assert code(clinic.ask(clinic.unmask("run-1/ballot/1", five_names()))) == FailureCode.BAD_REQUEST
    assert isinstance(clinic.ask(clinic.train()), Masked)  # and nothing to audit
    assert isinstance(clinic.ask(clinic.close()), Statement)


@pytest.mark.parametrize(("asked", "fine"), [(2 / 3, False), (0.79, False), (0.8, True), (1.0, True)])
def test_a_threshold_below_the_policys_is_refused(artefacts: None, tmp_path: Path, asked: float, fine: bool) -> None:  # noqa: ARG001
    clinic = five_sites(tmp_path / "site-1", {"threshold_fraction": 0.8}, federation={"threshold_fraction": asked})
    reply = clinic.ask(clinic.hello_request())
    assert isinstance(reply, Refusal) != fine
    if isinstance(reply, Refusal):
        assert reply.reasons == (f"threshold: {asked:.3g} of holders open sums, 0.8 here",)


def test_a_higher_threshold_is_kept_at_unmask_and_audit(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    clinic = five_sites(tmp_path / "site-1", federation={"threshold_fraction": 1.0})
    one = clinic.uploaded(clinic.ballot())
    assert code(clinic.ask(clinic.unmask(one, one.without(GONE), "first"))) == FailureCode.BAD_REQUEST
    clinic.unmasked(one)
    stays_away(clinic, [clinic.audit(one, signers=one.without(GONE))])
    clinic.uploaded(clinic.ballot("ballot/2", audits=(clinic.audit(one),)))


@pytest.mark.parametrize(("bits", "step_exp"), [(16, -6), (24, -13), (32, -14)])
def test_an_upload_has_the_rings_size_on_the_wire_and_opens(
    artefacts: None,  # noqa: ARG001
    tmp_path: Path,
    bits: int,
    step_exp: int,
) -> None:
    clinic = five_sites(tmp_path / "site-1")
    one = clinic.uploaded(clinic.train(step_exp=step_exp, ring_bits=bits))
    segment = one.reply.arrays["segment-000000"]
    assert (str(segment.dtype), segment.shape) == ("uint8", (195 * bits // 8,))
    mine = clinic.opened(one)
    spread = float(np.std(mine)) * 2.0**step_exp
    assert 4 < spread < 9  # noise of 10 / sqrt(3) = 5.8, and gradients of norm 1


# ---- noise


def shares_asked(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many honest parties each kind of work sizes its share of the noise."""
    found: list[int] = []
    real = release_module.noise_share

    def noise_share(*args: Any) -> Any:
        found.append(args[4])
        return real(*args)

    monkeypatch.setattr(release_module, "noise_share", noise_share)
    monkeypatch.setattr(work_module.training, "noise_share", noise_share, raising=False)
    for request in (clinic.ballot(), clinic.train(), clinic.evaluate()):
        clinic.uploaded(request)
    return found


@pytest.mark.parametrize(
    ("federation", "privacy", "parties"),
    [
        ({}, {}, 4 - 1),
        ({"max_dropouts": 0}, {}, 5 - 1),
        ({"threshold_fraction": 1.0}, {}, 5 - 1),
        ({}, {"max_colluding_sites": 2}, 4 - 2),
        ({"min_sites": 5}, {}, 5 - 1),
        ({}, {"noise": "local"}, 1),
    ],
    ids=["two thirds", "no dropouts", "all answer", "two colluders", "a high minimum", "local"],
)
def test_eps_accounts_for_min_survivors(
    artefacts: None,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    federation: dict[str, Any],
    privacy: dict[str, Any],
    parties: int,
) -> None:
    """The noise of the smallest sum that opens, its colluders taken off, is what the budget was charged for."""
    min_sites = {"min_sites": 4} if privacy.get("max_colluding_sites") == 2 else {}
    clinic = five_sites(tmp_path / "site-1", federation=min_sites | federation, privacy=privacy)
    assert clinic.plan.noise_parties(5) == parties
    found = shares_asked(clinic, monkeypatch)
    assert found
    assert set(found) == {parties}


@pytest.mark.parametrize(("federation", "parties"), [({}, 3), ({"max_dropouts": 0}, 4)])
def test_what_a_site_adds_has_the_variance_of_its_share(
    artefacts: None,  # noqa: ARG001
    tmp_path: Path,
    federation: dict[str, Any],
    parties: int,
) -> None:
    """Of a site without records the opened sum is its noise alone; a false alarm in 1e9 runs, and 3 is told from 4."""
    clinic = five_sites(tmp_path / "site-1", federation=federation)
    header = (clinic.folder / "records.csv").read_text().splitlines()[0]
    (clinic.folder / "records.csv").write_text(header + "\n")
    drawn: list[Any] = []
    audits: tuple[Audit, ...] = ()
    for number in range(1, 11):
        one = clinic.uploaded(clinic.train(f"final/{number}", audits=audits))
        drawn.append(clinic.opened(one))
        audits = (clinic.audit(one),)
    integers = np.concatenate(drawn).astype(np.float64)
    sigma = 10.0 * 2**14  # the multiplier, times a sensitivity of one clip in steps of 2**-14
    statistic = float(np.sum(integers**2)) / (sigma**2 / parties)
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(integers))
    assert low < statistic < high
    other = statistic * {3: 4, 4: 3}[parties] / parties
    assert not low < other < high


# ---- all of it is on disk, or nothing


@pytest.mark.parametrize("step", ["settle", "keep", "note"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_leaves_neither_a_reply_without_its_round_nor_the_reverse(
    five: Clinic, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    """Between computing and settling, at each of the three writes of its one transaction."""
    one = answered(five)
    request = five.train(audits=(five.audit(one),))
    owner: Any = Ledger if step == "settle" else SecureRounds
    real = getattr(owner, step)

    def fail(*args: Any, **kwargs: Any) -> None:
        if after:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(KeyboardInterrupt):
            five.site.handle(request)
    again = five.restarted()
    ledger = again.site.ledger
    assert ledger.find("run-1/final/1", request.sha256) == "reserved"
    assert ledger.rounds.find("run-1/final/1") is None
    assert set(ledger.rounds.unaudited("run-1")) == {one.id}
    two = again.uploaded(request)  # under the same reservation, with the same audit
    assert again.unmasked(two).answer == five.answer(NAME, two)
    assert num_releases(again) == 2
    assert set(ledger.rounds.unaudited("run-1")) == {two.id}


def test_an_error_at_the_last_write_is_an_answer_and_keeps_nothing(five: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RoundStore, "keep", fail)
        assert code(five.ask(five.ballot())) == FailureCode.INTERNAL
    assert five.site.ledger.rounds.progress("run-1") == {}
    five.uploaded(five.ballot())
    assert num_releases(five) == 1


def test_a_round_is_written_before_its_upload_leaves(five: Clinic) -> None:
    """Seen by another process as soon as there is a reply."""
    other = open_site(five.folder)
    one = five.uploaded(five.ballot())
    assert other.ledger.rounds.progress("run-1") == {one.id: Progress(one.context.digest.hex())}


# ---- what never leaves


def test_keys_and_pads_are_never_in_logs(five: Clinic) -> None:
    one = answered(five, lambda one: one.without(GONE))
    pads = five.site.handle(five.unmask(one, one.without(GONE))).arrays["pads"]
    five.ask(five.unmask(one, one.all, "another"))
    five.ask(five.ballot(cohort=five.cohort()[:2]))
    five.ask(five.ballot("ballot/2"))
    five.aborted(one)
    five.ask(five.unmask(one))
    kept = five.site.ledger.campaign("run-1")
    assert kept is not None
    secret = [kept.round_key, *(pad.tobytes() for pad in pads), five.site.data_key]
    log = five.log().encode()
    assert log.count(b"request_failed") == 4
    for one_secret in secret:
        for form in (one_secret, one_secret.hex().encode(), one_secret.hex().upper().encode(), repr(one_secret).encode()):
            assert form not in log


def test_the_round_key_and_seeds_are_never_in_replies(five: Clinic) -> None:
    one = five.uploaded(five.ballot())
    replies = [one.reply, five.site.handle(five.unmask(one)), five.site.handle(five.abort(one)), five.site.handle(five.close())]
    kept = five.site.ledger.campaign("run-1")
    assert kept is not None
    for reply in replies:
        content = reply.to_bytes()
        assert kept.round_key not in content
        assert kept.round_key.hex().encode() not in content


# ---- sites without a rule: each property above is broken by the rule's absence


def without_the_audit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SecureRounds, "check_audits", lambda *_: {})


def without_a_look_at_the_list(patch: pytest.MonkeyPatch) -> None:
    """Takes any list that is shown; only counts the signatures over that one."""
    real = SecureRounds._check_opened

    def check(self: SecureRounds, kept: KeptRound, audit: Audit) -> Any:
        assert kept.context is not None
        digest = alive_digest(kept.context, audit.alive).hex()
        shown = KeptRound(kept.campaign, kept.context, Progress(kept.progress.context, digest))
        return real(self, shown, audit)

    patch.setattr(SecureRounds, "_check_opened", check)


def with_a_memory_of_uploads_only(patch: pytest.MonkeyPatch) -> None:
    """What was answered, and that anything was given up, is forgotten."""
    find, progress = RoundStore.find, RoundStore.progress

    def fresh(one: Progress) -> Progress:
        return Progress(one.context)

    def forgetful_find(self: RoundStore, round_id: str) -> KeptRound | None:
        kept = find(self, round_id)
        return None if kept is None else KeptRound(kept.campaign, kept.context, fresh(kept.progress))

    def forgetful_progress(self: RoundStore, campaign: str) -> dict[str, Progress]:
        return {name: fresh(one) for name, one in progress(self, campaign).items()}

    patch.setattr(RoundStore, "unaudited", lambda *_: {})
    patch.setattr(RoundStore, "find", forgetful_find)
    patch.setattr(RoundStore, "progress", forgetful_progress)


def without_a_minimum_of_survivors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(secure_sum, "check_alive", lambda *_: None)


def without_the_policys_minimum_of_survivors(patch: pytest.MonkeyPatch) -> None:
    real = secure_sum.check_alive
    patch.setattr(secure_sum, "check_alive", lambda context, alive, *_: real(context, alive))


def without_a_minimum_of_members(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(site_module.Site, "_min_cohort", lambda *_: 2)


def small_cohort_of_the_policy_costs_nothing(clinic: Clinic) -> None:
    clinic.hello()
    small_cohort_costs_nothing(raised(clinic, 4))


def without_signatures_of_members(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Member, "check", lambda *_: None)


def keys_are_signed(clinic: Clinic) -> None:
    *others, last = clinic.cohort()
    for change in ({"public_key": "ab" * 32}, {"signature": "0" * 128}):
        reply = clinic.ask(clinic.ballot(cohort=(*others, last.model_copy(update=change))))
        assert isinstance(reply, Failure), reply


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Clinic], None]]] = [
    (without_the_audit, split_view_is_noticed),
    (without_a_look_at_the_list, split_view_is_noticed),
    (with_a_memory_of_uploads_only, both_shares_stay_apart),
    (without_a_minimum_of_survivors, few_survivors_stay_hidden),
    (without_a_minimum_of_survivors, survivors_below_policy_stay_hidden),
    (without_the_policys_minimum_of_survivors, survivors_below_policy_stay_hidden),
    (without_a_minimum_of_members, small_cohort_of_the_policy_costs_nothing),
    (without_signatures_of_members, keys_are_signed),
]


PROPERTIES = list(dict.fromkeys(one for _, one in MUTANTS))


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda one: one.__name__)
def test_the_property_holds(five: Clinic, holds: Callable[[Clinic], None]) -> None:
    holds(five)


@pytest.mark.parametrize(("plant", "holds"), MUTANTS, ids=lambda one: one.__name__)
def test_a_planted_mutant_is_caught(
    five: Clinic,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    holds: Callable[[Clinic], None],
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        holds(five)


def test_requests_are_what_the_helper_says(five: Clinic) -> None:
    """The clinic's own requests are well formed, so that a refusal above has the reason it names."""
    one = five.uploaded(five.ballot())
    assert isinstance(five.ask(five.unmask(one, one.without(GONE))), Unmasked)
    assert isinstance(five.ask(five.abort(one)), Burnt)
    assert isinstance(five.ask(five.close([five.audit(one, one.without(GONE))])), Statement)
    assert signed(five.operator, five.read(five.unmask(one))).sender == "operator"
    assert a_plan().federation.secure_sum
