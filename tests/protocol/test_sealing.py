"""Parcels: what a relay sees of them, and every way in which a foreign one can be wrong."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from urna.protocol import sealing
from urna.protocol.errors import ProtocolError, SignatureError
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import RAW, AnyArray, Envelope, Head, Masked, signed, to_record
from urna.protocol.sealing import HEADER_BYTES, INFO, NONCE, SUITE, Header, Parcel, key_id, seal, unseal

CANARY = "canary-7f3a"


def identity(name: str) -> Identity:
    return Identity(name, Ed25519PrivateKey.generate())


BOSS, ONE, TWO, STRANGER = (identity(name) for name in (OPERATOR, "site-1", "site-2", "site-3"))
ROSTER = Roster(operator=BOSS.public_key_hex, sites={one.name: one.public_key_hex for one in (ONE, TWO)})
BODY = json.dumps({"kind": "train", "canary": CANARY}).encode()
ARRAYS: dict[str, AnyArray] = {"vector": np.linspace(-1, 1, 40).astype(np.float32), "shares": np.arange(7, dtype=np.uint8)}
REQUEST = Envelope(OPERATOR, BODY, b"s" * 64, ARRAYS)  # its own signature is not the parcel's business
LEDGER = "0e" * 16
HEAD = Head.create(ONE, LEDGER, 7, "ab" * 32)
ASKED = seal(BOSS, ROSTER, REQUEST, {"site-1": HEAD, "site-2": None})
FOR_ONE, FOR_TWO = ASKED.only_for(ROSTER, "site-1"), ASKED.only_for(ROSTER, "site-2")
ANSWER = signed(ONE, Masked(request_sha256="0" * 64), {"pads": np.zeros((2, 32), np.uint8)})
REPLY = seal(ONE, ROSTER, ANSWER, {OPERATOR: HEAD}, answers=ASKED.sha256)
KEY_ONE = key_id(ONE.sealing_key.public_key())


def header_of(parcel: Parcel, receiver: Identity) -> Header:
    """What a receiver reads, unchecked."""
    sealed = parcel.headers[key_id(receiver.sealing_key.public_key())]
    return Header.model_validate_json(SUITE.decrypt(sealed, receiver.sealing_key, INFO))


def sealed_header(header: Header | bytes, receiver: Identity) -> dict[str, bytes]:
    """A header that anybody can seal: encryption alone says nothing about who did."""
    plain = header if isinstance(header, bytes) else header.model_dump_json().encode()
    public = receiver.sealing_key.public_key()
    return {key_id(public): SUITE.encrypt(plain.ljust(HEADER_BYTES - 48), public, INFO)}


def same(one: Envelope, other: Envelope) -> bool:
    return (one.sender, one.signature, one.sha256) == (other.sender, other.signature, other.sha256)


def refused(parcel: Parcel, receiver: Identity = ONE, sender: str | None = OPERATOR, answers: str = "") -> str:
    """The text of the refusal, which tells nothing of the content."""
    with pytest.raises(ProtocolError) as caught:
        unseal(receiver, ROSTER, parcel, sender, answers)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


# ---- what arrives


def test_each_receiver_opens_the_same_content_and_sees_its_own_head() -> None:
    for parcel in (ASKED, FOR_ONE):
        opened, head = unseal(ONE, ROSTER, parcel, OPERATOR)
        assert same(opened, REQUEST)
        assert head == HEAD
    opened, head = unseal(TWO, ROSTER, FOR_TWO, OPERATOR)
    assert (same(opened, REQUEST), head) == (True, None)
    assert FOR_ONE.content is FOR_TWO.content  # Flower stores equal objects once
    assert [len(one.headers) for one in (ASKED, FOR_ONE, FOR_TWO)] == [2, 1, 1]


def test_a_reply_names_the_parcel_that_it_answers_and_its_sender_is_found_in_it() -> None:
    opened, head = unseal(BOSS, ROSTER, REPLY, answers=ASKED.sha256)
    assert (opened.sender, head) == ("site-1", HEAD)


def test_parcels_survive_flowers_records_and_its_wire() -> None:
    carried = sealing.from_record(recorddict_from_proto(recorddict_to_proto(sealing.to_record(ASKED))))
    assert dict(carried.headers) == dict(ASKED.headers)
    assert same(unseal(TWO, ROSTER, carried, OPERATOR)[0], REQUEST)


def test_the_same_message_is_never_sealed_to_the_same_bytes() -> None:
    again = seal(BOSS, ROSTER, REQUEST, {"site-1": HEAD})
    assert again.sha256 != ASKED.sha256
    assert again.headers[KEY_ONE] != ASKED.headers[KEY_ONE]
    assert header_of(again, ONE).content_key != header_of(ASKED, ONE).content_key


def test_nobody_seals_to_a_stranger() -> None:
    with pytest.raises(SignatureError, match="expected a member of the roster, found 'site-3'"):
        seal(BOSS, ROSTER, REQUEST, {"site-3": None})


# ---- what the relay sees


def windows(data: bytes, size: int = 8) -> set[bytes]:
    return {data[at : at + size] for at in range(len(data) - size + 1)}


def seen(parcel: Parcel) -> bytes:
    return b"\n".join([parcel.content.tobytes(), *(key.encode() + value for key, value in parcel.headers.items())])


UNSEALED = [REQUEST.to_bytes(), header_of(ASKED, ONE).model_dump_json().encode(), b"site-1", b"site-2"]
SECRETS = set().union(*map(windows, UNSEALED)) | {b"site-1", b"site-2", CANARY.encode()}


def test_the_relay_sees_no_byte_of_a_message_and_no_name() -> None:
    carried = seen(ASKED)
    assert len(SECRETS) > 900
    assert not [secret for secret in SECRETS if secret in carried]


def test_the_scan_finds_them_where_they_are_not_sealed() -> None:
    carried = seen(Parcel({"site-2": UNSEALED[1]}, np.frombuffer(REQUEST.to_bytes(), np.uint8)))
    assert sum(secret in carried for secret in SECRETS) > 0.9 * len(SECRETS)  # safetensors orders its texts as it likes


def test_headers_have_one_size_whatever_is_in_them() -> None:
    long, short = identity("s" * 63), identity("s")
    roster = Roster(operator=BOSS.public_key_hex, sites={one.name: one.public_key_hex for one in (long, short)})
    heads = {long.name: Head.create(long, LEDGER, 2**63 - 1, "0" * 64), short.name: None}
    parcel = seal(BOSS, roster, REQUEST, heads, answers="0" * 64)
    largest = seal(long, roster, replace(REQUEST, sender=long.name), heads, answers="0" * 64)
    assert {len(value) for one in (parcel, largest) for value in one.headers.values()} == {HEADER_BYTES}
    assert unseal(long, roster, largest, answers="0" * 64)[1] == heads[long.name]


# ---- forged, altered, mixed


def test_every_flipped_bit_of_a_header_is_refused() -> None:
    good = FOR_ONE.headers[KEY_ONE]
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << (at % 8)
        refused(Parcel({KEY_ONE: bytes(bad)}, FOR_ONE.content))


def test_every_flipped_bit_of_a_content_is_refused() -> None:
    for at in range(len(FOR_ONE.content)):
        bad = FOR_ONE.content.copy()
        bad[at] ^= 1 << (at % 8)
        assert "expected the content that the header was signed for" in refused(Parcel(FOR_ONE.headers, bad))


@pytest.mark.parametrize("change", [-1, 1, -HEADER_BYTES, -HEADER_BYTES + 1])
def test_cut_and_longer_parcels_are_refused(change: int) -> None:
    header = FOR_ONE.headers[KEY_ONE]
    altered = header[:change] if change < 0 else header + b"\0"
    assert f"expected a header of {HEADER_BYTES} bytes for site-1" in refused(Parcel({KEY_ONE: altered}, FOR_ONE.content))
    content = FOR_ONE.content[:change] if change < 0 else np.append(FOR_ONE.content, np.uint8(0))
    refused(Parcel(FOR_ONE.headers, content))


@pytest.mark.parametrize(
    "content",
    [np.empty(0, np.uint8), np.zeros(15, np.uint8), np.zeros(64, np.float32), np.zeros((8, 8), np.uint8)],
    ids=["empty", "shorter than a tag", "of another type", "of another shape"],
)
def test_what_is_no_content_is_refused(content: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    assert "expected a content of 16 to" in refused(Parcel(FOR_ONE.headers, content))


def test_a_parcel_for_another_member_is_refused() -> None:
    assert "expected a header of 1024 bytes for site-1, found none" in refused(FOR_TWO)
    (other,) = FOR_TWO.headers.values()
    assert "expected a header sealed to site-1" in refused(Parcel({KEY_ONE: other}, FOR_TWO.content))


def test_headers_and_contents_of_two_parcels_do_not_mix() -> None:
    other = seal(BOSS, ROSTER, REQUEST, {"site-1": HEAD})
    for mixed in (Parcel(other.headers, ASKED.content), Parcel(FOR_ONE.headers, other.content)):
        assert "expected the content that the header was signed for" in refused(mixed)


def forged_header(**changes: object) -> Parcel:
    """The operator's header, changed by somebody who may read it, and sealed again."""
    header = header_of(ASKED, ONE).model_copy(update=changes)
    return Parcel(sealed_header(header, ONE), ASKED.content)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": None},
        {"head": Head.create(ONE, LEDGER, 6, "ab" * 32)},
        {"content_key": "00" * 32},
        {"answers": "00" * 32},
        {"content_sha256": "00" * 32},
        {"signature": "00" * 64},
        {"signature": BOSS.sign("message", b"").hex()},
    ],
    ids=["no head", "older head", "key", "answers", "content", "zeros", "another purpose"],
)
def test_everything_in_a_header_is_signed(changes: dict[str, object]) -> None:
    assert "expected a parcel signed by operator" in refused(forged_header(**changes))


def test_without_the_signature_check_a_forged_header_would_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant: the test above rests on that check."""
    monkeypatch.setattr(sealing, "verify", lambda *_: None)
    assert unseal(ONE, ROSTER, forged_header(head=None), OPERATOR)[1] is None


def test_what_one_member_hands_on_is_no_parcel_to_another() -> None:
    """Site 1 may read it; with the operator's own signature it tries to send it to site 2."""
    mine = header_of(ASKED, ONE)
    handed_on = Parcel(sealed_header(mine, TWO), ASKED.content)
    assert "expected a parcel for site-2, found one for another member" in refused(handed_on, TWO)
    readdressed = mine.model_copy(update={"receiver": "site-2"})
    assert "expected a parcel signed by operator" in refused(Parcel(sealed_header(readdressed, TWO), ASKED.content), TWO)
    own = seal(ONE, ROSTER, REQUEST, {"site-2": None})
    assert "expected a parcel of operator, found one of site-1" in refused(own, TWO)
    assert "expected a message of site-1 in its own parcel" in refused(own, TWO, sender="site-1")


def other_content_under_its_key() -> Parcel:
    """Site 1 knows the content's key: it is the same for all receivers. It puts other words under it for site 2."""
    key = AESGCM(bytes.fromhex(header_of(ASKED, ONE).content_key))
    other = Envelope(OPERATOR, b'{"kind": "other"}', b"s" * 64)
    return Parcel(FOR_TWO.headers, np.frombuffer(key.encrypt(NONCE, other.to_bytes(), INFO), np.uint8))


def test_a_receiver_cannot_change_what_another_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected the content that the header was signed for" in refused(other_content_under_its_key(), TWO)
    monkeypatch.setattr(Parcel, "sha256", ASKED.sha256)  # a planted mutant: the hash is believed, not computed
    assert unseal(TWO, ROSTER, other_content_under_its_key(), OPERATOR)[0].body == b'{"kind": "other"}'


def test_a_parcel_in_anothers_name_is_refused() -> None:
    posing = Identity("site-1", TWO.private_key)
    parcel = seal(posing, ROSTER, ANSWER, {OPERATOR: None}, answers=ASKED.sha256)
    assert "expected a parcel signed by site-1" in refused(parcel, BOSS, None, ASKED.sha256)
    own = seal(TWO, ROSTER, ANSWER, {OPERATOR: None}, answers=ASKED.sha256)  # site 1's signed reply, in site 2's parcel
    assert "expected a message of site-2 in its own parcel" in refused(own, BOSS, None, ASKED.sha256)
    assert "expected a parcel of site-1, found one of site-2" in refused(own, BOSS, "site-1", ASKED.sha256)


def test_a_strangers_parcel_is_refused() -> None:
    parcel = seal(STRANGER, ROSTER, replace(REQUEST, sender="site-3"), {"site-1": None})
    assert "expected a member of the roster, found 'site-3'" in refused(parcel, sender=None)


def test_an_old_reply_is_no_answer_to_the_next_request() -> None:
    again = seal(BOSS, ROSTER, REQUEST, {"site-1": HEAD})  # even if the very same bytes are asked again
    assert "expected an answer to this request, found another parcel" in refused(REPLY, BOSS, "site-1", again.sha256)
    assert "expected a request, found another parcel" in refused(REPLY, BOSS, "site-1")
    assert "expected an answer to this request" in refused(FOR_ONE, answers=ASKED.sha256)


@pytest.mark.parametrize("version", [1, 3, "2", None])
def test_another_version_is_refused(version: object) -> None:
    header = header_of(ASKED, ONE).model_dump() | {"version": version}
    parcel = Parcel(sealed_header(json.dumps(header).encode(), ONE), ASKED.content)
    assert "expected a parcel's header of version 2, found version: literal_error" in refused(parcel)


@pytest.mark.parametrize("plain", [b"", b"null", b"[]", CANARY.encode(), b"{" * 900, b'"' + CANARY.encode() + b'"', b"\xff"])
def test_what_is_no_header_is_refused(plain: bytes) -> None:
    assert "expected a parcel's header of version 2" in refused(Parcel(sealed_header(plain, ONE), ASKED.content))


# ---- sizes


def test_sizes_are_limited_before_anything_is_decrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SUITE", None)
    monkeypatch.setattr(sealing, "CONTENT_LIMIT_BYTES", 100)
    assert "expected a content of 16 to 100 bytes" in refused(FOR_ONE)
    with pytest.raises(ProtocolError, match="expected a message of at most 100 bytes"):
        seal(BOSS, ROSTER, REQUEST, {"site-1": None})
    monkeypatch.setattr(sealing, "CONTENT_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(sealing, "HEADERS_LIMIT", 1)
    assert "found one of 1024 among 2" in refused(ASKED)


def test_a_member_cannot_make_another_parse_a_huge_body() -> None:
    class Huge(Envelope):
        def to_bytes(self) -> bytes:
            return (12_000_001).to_bytes(8, "little") + b"{"

    parcel = seal(BOSS, ROSTER, Huge(OPERATOR, b"", b""), {"site-1": None})
    assert "expected a body of at most 4000000 bytes, found more" in refused(parcel)


# ---- whatever else arrives


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([KEY_ONE, "0" * 16]), st.binary(max_size=1100)), st.binary(max_size=200))
def test_random_parcels_are_refused(headers: dict[str, bytes], content: bytes) -> None:
    refused(Parcel(headers, np.frombuffer(content, np.uint8)))


DTYPES = st.sampled_from(["F32", "U8", "U64", "F64", "BF16", "F8_E4M3", "BOOL", "I64", "X", ""])
SIZES = st.one_of(st.integers(0, 4), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, -1]))
TENSOR = st.fixed_dictionaries(
    {
        "dtype": DTYPES,
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.tuples(st.integers(0, 2), st.integers(0, 8)),
    }
)
TEXTS = {"sender": OPERATOR, "body": CANARY, "signature": "00"}
METADATA = st.one_of(
    st.just(TEXTS),
    st.dictionaries(st.sampled_from([*TEXTS, "x"]), st.one_of(st.text(max_size=4), st.integers(), st.none())),
)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), TENSOR), METADATA, st.binary(max_size=16))
def test_a_members_hostile_content_opens_or_is_refused(
    tensors: dict[str, object], metadata: dict[str, object], data: bytes
) -> None:
    """Sealed and signed by the operator: neither encryption nor signature says that the bytes are sound."""

    class Hostile(Envelope):
        def to_bytes(self) -> bytes:
            header = json.dumps({**tensors, "__metadata__": metadata}).encode()
            return len(header).to_bytes(8, "little") + header + data

    parcel = seal(BOSS, ROSTER, Hostile(OPERATOR, b"", b""), {"site-1": None})
    with suppress(ProtocolError):  # and no other
        assert unseal(ONE, ROSTER, parcel, OPERATOR)[0].sender == OPERATOR


def content_record(array: Array | None = None, more: dict[str, Array] | None = None) -> ArrayRecord:
    good = Array("uint8", ASKED.content.shape, RAW, ASKED.content.tobytes())
    return ArrayRecord({"content": array or good} | (more or {}))


@pytest.mark.parametrize(
    "make",
    [
        RecordDict,
        lambda: to_record(ANSWER),
        lambda: RecordDict({"parcel": ConfigRecord(dict(ASKED.headers))}),
        lambda: RecordDict({"content": content_record()}),
        lambda: RecordDict({"parcel": ConfigRecord({KEY_ONE: CANARY}), "content": content_record()}),
        lambda: RecordDict({"parcel": ConfigRecord({}), "content": ArrayRecord({})}),
        lambda: of(content_record(more={"more": Array("uint8", (1,), RAW, b"1")})),
        lambda: of(content_record(Array("float32", (4,), RAW, bytes(16)))),
        lambda: of(content_record(Array("uint8", (17,), RAW, bytes(16)))),
        lambda: of(content_record(Array("uint8", (4, 4), RAW, bytes(16)))),
        lambda: of(content_record(Array("uint8", (16,), "numpy.ndarray", bytes(16)))),
    ],
    ids=[
        *("empty", "unsealed", "no content", "no headers", "text", "no array", "two arrays"),
        *("type", "size", "shape", "numpy's file"),
    ],
)
def test_what_is_no_parcels_record_is_refused(make: Callable[[], RecordDict]) -> None:
    with pytest.raises(ProtocolError, match="expected an Urna message, found") as caught:
        sealing.from_record(make())
    assert CANARY not in str(caught.value)


def of(content: ArrayRecord) -> RecordDict:
    return RecordDict({"parcel": ConfigRecord(dict(ASKED.headers)), "content": content})
