"""The edge of a site: sealed parcels in, sealed answers out, and the ledger head that the operator echoes."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.client.clinic import CANARY, NAME, Clinic, a_signer
from urna.protocol.errors import FailureCode
from urna.protocol.identity import OPERATOR, Identity
from urna.protocol.messages import Envelope, Failure, Head, HelloReply, Masked, open_reply
from urna.protocol.sealing import Parcel, seal, unseal


def sealed(clinic: Clinic, request: Envelope, head: Head | None = None) -> Parcel:
    return seal(clinic.operator, clinic.site.roster, request, {NAME: head})


def received(clinic: Clinic, parcel: Parcel) -> tuple[Envelope, Head | None]:
    """What the operator finds in the answer."""
    return unseal(clinic.operator, clinic.site.roster, clinic.site.receive(parcel), NAME, parcel.sha256)


def failed(clinic: Clinic, parcel: Parcel) -> Failure:
    """The code in an answer that comes without a head: nothing was asked of the site's records, and nothing is spent."""
    before = clinic.site.ledger.rows()
    reply, head = received(clinic, parcel)
    assert head is None
    assert CANARY.encode() not in reply.body
    assert clinic.site.ledger.rows() == before
    return Failure.model_validate_json(reply.body)


def own_head(clinic: Clinic, seq: int | None = None, link: str | None = None) -> Head:
    newest = clinic.site.ledger.head()
    at = (newest[0] if seq is None else seq, newest[1] if link is None else link)
    return Head.create(clinic.site.identity, clinic.site.ledger.id, *at)


def test_an_answer_is_sealed_to_the_operator_with_the_newest_head(clinic: Clinic) -> None:
    request = clinic.hello_request()
    reply, head = received(clinic, sealed(clinic, request))
    said = open_reply(reply, clinic.site.roster, NAME, request)
    assert isinstance(said, HelloReply)
    clinic.own = said.member
    request = clinic.train()
    reply, later = received(clinic, sealed(clinic, request, head))
    assert isinstance(open_reply(reply, clinic.site.roster, NAME, request), Masked)
    assert head is not None
    assert later is not None
    later.check(clinic.site.roster)
    assert (later.seq, later.link) == clinic.site.ledger.head()
    assert later.seq > head.seq


def test_an_older_head_of_this_ledger_is_no_rollback(clinic: Clinic) -> None:
    clinic.hello()
    before = own_head(clinic)
    clinic.uploaded(clinic.train())
    request = clinic.train("final/2")
    reply, _ = received(clinic, sealed(clinic, request, before))
    assert b'"code":"rollback"' not in reply.body


@pytest.mark.parametrize("change", [{"seq": 1000}, {"link": "0f" * 32}], ids=["newer than this ledger", "another link"])
def test_a_head_that_this_ledger_does_not_hold_stops_everything(clinic: Clinic, change: dict[str, object]) -> None:
    clinic.hello()
    clinic.uploaded(clinic.train())
    request = clinic.train("final/2")
    failure = failed(clinic, sealed(clinic, request, own_head(clinic, **change)))  # type: ignore[arg-type]
    assert (failure.code, failure.request_sha256) == (FailureCode.ROLLBACK, request.sha256)
    assert '"code": "rollback"' in clinic.log()


@pytest.mark.parametrize(
    "make",
    [
        lambda clinic, seq, link: Head.create(clinic.peers[0], clinic.site.ledger.id, seq, link),
        lambda clinic, seq, link: Head.create(Identity(NAME, clinic.peers[0].private_key), clinic.site.ledger.id, seq, link),
        lambda clinic, seq, link: Head.create(clinic.operator, clinic.site.ledger.id, seq, link),
        lambda clinic, seq, link: own_head(clinic, seq, link).model_copy(update={"seq": seq + 1}),
    ],
    ids=["another site's", "forged", "the operator's", "altered"],
)
def test_a_head_that_this_site_did_not_sign_is_refused(clinic: Clinic, make: Callable[[Clinic, int, str], Head]) -> None:
    head = make(clinic, *clinic.site.ledger.head())
    assert failed(clinic, sealed(clinic, clinic.hello_request(), head)).code == FailureCode.BAD_REQUEST


def test_without_the_echos_check_a_lost_ledger_would_answer(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant of the two tests above."""
    monkeypatch.setattr(type(clinic.site), "_check_echo", lambda *_: None)
    reply, _ = received(clinic, sealed(clinic, clinic.hello_request(), own_head(clinic, 1000)))
    assert b'"kind":"hello"' in reply.body


def altered(parcel: Parcel, at: int) -> Parcel:
    content = parcel.content.copy()
    content[at] ^= 1
    return Parcel(parcel.headers, content)


@pytest.mark.parametrize(
    "make",
    [
        lambda _, good: Parcel({}, good.content),
        lambda _, good: Parcel(good.headers, np.empty(0, np.uint8)),
        lambda _, good: Parcel(good.headers, np.zeros((2, 20), np.uint8)),
        lambda _, good: altered(good, 0),
        lambda _, good: altered(good, -1),
        lambda clinic, _: seal(clinic.operator, clinic.site.roster, clinic.hello_request(), {clinic.peers[0].name: None}),
        lambda clinic, _: seal(clinic.peers[0], clinic.site.roster, clinic.hello_request(), {NAME: None}),
        lambda clinic, _: seal(a_signer(OPERATOR), clinic.site.roster, clinic.hello_request(), {NAME: None}),
        lambda clinic, _: seal(clinic.operator, clinic.site.roster, clinic.hello_request(), {NAME: None}, "0" * 64),
        lambda clinic, _: seal(clinic.operator, clinic.site.roster, Envelope(CANARY, b"", b""), {NAME: None}),
    ],
    ids=[
        *("no header", "no content", "a matrix", "first byte", "last byte", "for another site", "by another site"),
        *("by a stranger", "a reply", "another's message"),
    ],
)
def test_a_parcel_that_cannot_be_opened_gets_a_code_that_names_its_content(
    clinic: Clinic, make: Callable[[Clinic, Parcel], Parcel]
) -> None:
    parcel = make(clinic, sealed(clinic, clinic.hello_request()))
    failure = failed(clinic, parcel)
    assert (failure.code, failure.request_sha256) == (FailureCode.BAD_REQUEST, parcel.sha256)
    assert clinic.site.ledger.campaign("run-1") is None


def test_a_request_that_the_operator_did_not_sign_is_refused_inside_its_own_parcel(clinic: Clinic) -> None:
    """Two signatures: the parcel's says who sent it, the envelope's what was asked, for as long as it is kept."""
    good = clinic.hello_request()
    unsigned = Envelope(OPERATOR, good.body, bytes(64), good.arrays)
    reply, head = received(clinic, sealed(clinic, unsigned))
    assert Failure.model_validate_json(reply.body).code == FailureCode.BAD_REQUEST
    assert head == own_head(clinic)


def test_a_ledger_that_cannot_be_read_gets_its_code_and_no_head(clinic: Clinic) -> None:
    parcel = sealed(clinic, clinic.hello_request())
    clinic.site.ledger.close()
    reply, head = received(clinic, parcel)
    assert (Failure.model_validate_json(reply.body).code, head) == (FailureCode.LEDGER, None)


def test_whatever_goes_wrong_at_the_edge_only_a_code_leaves(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(type(clinic.site.ledger), "head", broken)
    assert failed(clinic, sealed(clinic, clinic.hello_request())).code == FailureCode.INTERNAL
    assert CANARY in clinic.log()


def test_a_head_of_another_ledger_stops_nothing(clinic: Clinic) -> None:
    """This site had another vault once; an operator who kept its old head must not shut the new one for ever."""
    old = Head.create(clinic.site.identity, "0e" * 16, 3, "ab" * 32)
    parcel = seal(clinic.operator, clinic.site.roster, clinic.hello_request(), {NAME: old})
    assert failed(clinic, parcel).code == FailureCode.ROLLBACK
    assert clinic.site.ledger.noted("stop") is None
