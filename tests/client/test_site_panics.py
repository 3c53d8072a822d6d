"""A library written in Rust panics: that is no Exception, and still only a fixed code leaves the site."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.client.clinic import Clinic
from urna.client.ledger import Ledger
from urna.client.site import Site
from urna.protocol.errors import FailureCode
from urna.protocol.messages import Failure, open_reply
from urna.protocol.sealing import Parcel, seal, unseal

STOPS = [KeyboardInterrupt, SystemExit, GeneratorExit]


def panic(*args: object) -> None:  # noqa: ARG001 - in the place of anything
    """A real one."""
    found = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    found.encode("a")


def parcel(clinic: Clinic) -> Parcel:
    return seal(clinic.operator, clinic.site.roster, clinic.hello_request(), {clinic.site.identity.name: None})


def test_a_panic_is_no_exception() -> None:
    with pytest.raises(BaseException, match="chunk") as caught:
        panic()
    assert not isinstance(caught.value, Exception)


def test_a_panic_under_a_request_is_answered_with_a_code(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "_answer", panic)
    request = clinic.hello_request()
    reply = open_reply(clinic.site.handle(request), clinic.site.roster, clinic.site.identity.name, request)
    assert isinstance(reply, Failure)
    assert reply.code == FailureCode.INTERNAL


def test_a_panic_around_a_request_is_answered_with_a_code(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "head", panic)
    sent = parcel(clinic)
    answer = clinic.site.receive(sent)
    envelope, _ = unseal(clinic.operator, clinic.site.roster, answer, clinic.site.identity.name, sent.sha256)
    assert b'"internal"' in envelope.body


@pytest.mark.parametrize("stop", STOPS)
def test_who_stops_a_site_stops_it(clinic: Clinic, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
    def stopped(*args: object) -> None:  # noqa: ARG001 - in the place of anything
        raise stop

    sent = parcel(clinic)
    with monkeypatch.context() as patch:
        patch.setattr(Site, "_answer", stopped)
        with pytest.raises(stop):
            clinic.site.handle(clinic.hello_request())
    monkeypatch.setattr(Ledger, "head", stopped)
    with pytest.raises(stop):
        clinic.site.receive(sent)
