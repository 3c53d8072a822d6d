import json
import re
from typing import Any

import pytest

from tests.signed_receipts import OPERATOR_IDENTITY, OTHER, RELEASES, ROSTER, SITE, STEP, a_receipt, a_signed, altered, left
from urna.protocol.errors import BadInputError, SignatureError
from urna.protocol.identity import Roster
from urna.protocol.receipt import Receipt, SignedReceipt, goes_on, moment, read_receipt, sign_receipt


def file_of(signed: SignedReceipt) -> bytes:
    return signed.to_text().encode()


def test_what_was_written_is_read_and_its_signature_holds() -> None:
    signed = a_signed()
    found = read_receipt(file_of(signed))
    assert found == signed
    found.check(ROSTER)


def test_space_between_the_parts_says_nothing() -> None:
    signed = a_signed()
    for text in (signed.model_dump_json(), signed.to_text().replace("\n", "\r\n"), json.dumps(json.loads(signed.to_text()))):
        read_receipt(text.encode()).check(ROSTER)


def test_every_flipped_byte_is_refused_or_says_the_same() -> None:
    signed = a_signed(RELEASES[:1])
    raw = file_of(signed)
    refused = 0
    for position in range(len(raw)):
        for mask in (0x01, 0x20, 0x80):
            changed = bytearray(raw)
            changed[position] ^= mask
            try:
                found = read_receipt(bytes(changed))
                found.check(ROSTER)
            except (BadInputError, SignatureError):
                refused += 1
            else:
                assert found == signed
    assert refused > 2.9 * len(raw)


@pytest.mark.parametrize("field", sorted(set(Receipt.model_fields) - {"format"}))  # there is one format
def test_the_signature_covers_every_field(field: str) -> None:
    other: dict[str, Any] = {
        "site": "hospital-b",
        "campaign": "run-2",
        "plan_json": "{}",
        "models": {},
        "urna_version": "0.2.0",
        "joined_at": moment(0),
        "written_at": moment(0),
        "state": "open",
        "approved_by_a_person": False,
        "bundles_seen": [],
        "left": [],
        "epsilon_by_stage": {},
        "epsilon": 0.5,
        "delta": 0.5,
        "ledger_seq": 13,
    }
    changed = other.get(field, "ee" * (64 if field in ("site_key", "operator_key") else 32))
    with pytest.raises(SignatureError):
        read_receipt(altered(a_signed(), **{field: changed})).check(ROSTER)


def test_a_receipt_in_another_sites_name_is_refused() -> None:
    for key in (SITE, OTHER):  # it names the other's key, or its own
        forged = altered(a_signed(), SITE, site=OTHER.name, site_key=key.public_key_hex)
        with pytest.raises(SignatureError, match=r"the key that is pinned to hospital-b|signed by hospital-b"):
            read_receipt(forged).check(ROSTER)


def test_a_receipt_signed_by_a_foreign_key_is_refused() -> None:
    with pytest.raises(SignatureError, match="expected a receipt signed by hospital-a, found another or no signature"):
        read_receipt(altered(a_signed(), OTHER, epsilon=0.1)).check(ROSTER)


def test_the_operator_signs_no_receipts() -> None:
    forged = altered(a_signed(), OPERATOR_IDENTITY, site="operator", site_key=OPERATOR_IDENTITY.public_key_hex)
    with pytest.raises(SignatureError, match="expected a receipt of a site of the roster, found one of 'operator'"):
        read_receipt(forged).check(ROSTER)


def test_a_site_that_another_roster_lists_is_unknown() -> None:
    with pytest.raises(SignatureError, match="expected a receipt of a site of the roster"):
        a_signed().check(Roster(operator=ROSTER.operator, sites={OTHER.name: OTHER.public_key_hex}))


def test_a_signature_for_another_purpose_is_no_receipts() -> None:
    receipt = a_receipt()
    signature = SITE.sign("message", receipt.model_dump_json().encode()).hex()
    with pytest.raises(SignatureError):
        SignedReceipt(receipt=receipt, signature=signature).check(ROSTER)


def test_a_site_signs_only_in_its_own_name() -> None:
    with pytest.raises(RuntimeError, match="hospital-b signs its own receipts, found one of hospital-a"):
        sign_receipt(OTHER, a_receipt())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"epsilon": ', '"epsilon": 0.1,\n    "epsilon": '),  # a person reads the first, a program the last
        ('"ledger_seq": 12', '"ledger_seq": "12"'),
        ('"ledger_seq": 12', '"ledger_seq": 12.0'),
        ('"approved_by_a_person": true', '"approved_by_a_person": 1'),
        ('"format": 1', '"format": true'),
        ('"format": 1', '"format": 2'),
        ('"format": 1,', '"format": 1, "approved_by": "m.mustermann",'),
        ('  "receipt"', '  "note": "epsilon is 0.1",\n  "receipt"'),
    ],
)
def test_a_file_that_says_two_things_is_refused(old: str, new: str) -> None:
    text = a_signed().to_text()
    assert old in text
    with pytest.raises(BadInputError, match="expected a receipt"):
        read_receipt(text.replace(old, new, 1).encode())


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"null", b"[]", b"{}", b'{"receipt":{}}', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'"\\ud800"']
)
def test_other_bytes_are_no_receipt(data: bytes) -> None:
    with pytest.raises(BadInputError, match="expected a receipt of format 1"):
        read_receipt(data)


def test_a_file_of_any_size_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urna.protocol.receipt.FILE_LIMIT_BYTES", 100)
    with pytest.raises(BadInputError, match="at most 100 bytes"):
        read_receipt(file_of(a_signed()))


def test_a_terminal_is_never_steered_by_a_receipt() -> None:
    text = a_signed().to_text().replace('"0.1.0"', '"\\u001b[2J"')
    with pytest.raises(BadInputError) as caught:
        read_receipt(text.encode())
    assert str(caught.value).isprintable()


def test_seconds_are_in_utc() -> None:
    assert moment(0.0) == "1970-01-01T00:00:00Z"
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ", moment(1.8e9 + 0.7))


MORE = (*RELEASES, left("final/3", STEP))
SENT = (*RELEASES[:2], RELEASES[2].model_copy(update={"reply_sha256": "22" * 32}), RELEASES[3])


@pytest.mark.parametrize(
    "newer",
    [
        a_receipt(),
        a_receipt(MORE, ledger_seq=13, ledger_link="ee" * 32),
        a_receipt(SENT, ledger_seq=13, ledger_link="ee" * 32, written_at=moment(0)),
        a_receipt(bundles_seen=("cc" * 32, "ab" * 32), ledger_seq=13),
    ],
    ids=["the same", "one release more", "a reservation was settled", "one bundle more"],
)
def test_a_receipt_that_says_more_goes_on_from_an_older_one(newer: Receipt) -> None:
    assert goes_on(newer, a_receipt())


@pytest.mark.parametrize(
    "newer",
    [
        a_receipt(RELEASES[1:], ledger_seq=13),
        a_receipt((*RELEASES[:1], *RELEASES[2:], RELEASES[1]), ledger_seq=13),
        a_receipt((RELEASES[0].model_copy(update={"reply_sha256": ""}), *RELEASES[1:]), ledger_seq=13),
        a_receipt((RELEASES[0].model_copy(update={"count": 2}), *RELEASES[1:]), ledger_seq=13),
        a_receipt(ledger_seq=11),
        a_receipt(ledger_link="ee" * 32),
        a_receipt(state="open", ledger_seq=13),
        a_receipt(bundles_seen=(), ledger_seq=13),
        a_receipt(campaign="run-2", ledger_seq=13),
        a_receipt(plan_sha256="ee" * 32, ledger_seq=13),
        a_receipt(operator_key="ee" * 64, ledger_seq=13),
        a_receipt(models={}, ledger_seq=13),
        a_receipt(joined_at=moment(0), ledger_seq=13),
    ],
)
def test_a_receipt_that_takes_something_back_does_not(newer: Receipt) -> None:
    assert not goes_on(newer, a_receipt())
