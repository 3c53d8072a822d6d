import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from urna.protocol.errors import FailureCode, ProtocolError, SignatureError
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import (
    ARRAY_TYPES,
    ARRAYS_LIMIT,
    BODY_LIMIT_BYTES,
    RAW,
    AbortRequest,
    AnswerOfSite,
    AnyArray,
    AnyReply,
    AnyRequest,
    Audit,
    BallotRequest,
    Burnt,
    CloseRequest,
    Envelope,
    EvaluateRequest,
    Failure,
    Head,
    HelloReply,
    HelloRequest,
    Masked,
    Member,
    Message,
    Pending,
    Refusal,
    SpentRow,
    Statement,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    WeightsReply,
    WeightsRequest,
    from_record,
    open_reply,
    open_request,
    signed,
    to_record,
)


def identity(name: str) -> Identity:
    return Identity(name, Ed25519PrivateKey.generate())


OPERATOR_IDENTITY, ONE, TWO = identity(OPERATOR), identity("site-1"), identity("site-2")
ROSTER = Roster(operator=OPERATOR_IDENTITY.public_key_hex, sites={"site-1": ONE.public_key_hex, "site-2": TWO.public_key_hex})
CAMPAIGN, ROUND_KEY, SHA = "c-1", "ab" * 32, "0" * 64
MEMBER = Member.create(ONE, CAMPAIGN, ROUND_KEY, 300)
HEAD = np.linspace(-1, 1, 6).astype(np.float32)


def train_request(round_number: int = 1) -> TrainRequest:
    return TrainRequest(
        campaign=CAMPAIGN,
        plan_sha256=SHA,
        request_id=f"{CAMPAIGN}/final-{round_number}",
        stage="final",
        cohort=(MEMBER,),
        noise_multiplier=1.5,
        step_exp=-20,
        planned_count=40,
        graph_nonce=SHA,
        candidate="cnn",
    )


REQUEST = signed(OPERATOR_IDENTITY, train_request(), {"vector": HEAD})
UPLOAD: dict[str, AnyArray] = {
    "segment-000000": np.arange(5, dtype=np.uint8),
    "scalars": np.arange(2, dtype=np.uint64),
    "shares": np.zeros((1, 1, 2), np.uint8),
}
REPLY = signed(ONE, Masked(request_sha256=REQUEST.sha256), UPLOAD)
ANSWER, SILENT = (AnswerOfSite(alive_sha256=digest, signature="0" * 128) for digest in (SHA, ""))
AUDITS = (
    Audit(round_id="c/b", alive=("site-1", "site-2"), answers={"site-1": ANSWER}),
    Audit(round_id="c/a", alive=(), answers={"site-2": SILENT}),
)

REQUESTS: list[AnyRequest] = [
    HelloRequest(
        campaign="c", plan_sha256=SHA, request_id="c/h", stage="hello", plan_json="{}", models={"cnn": SHA},
        graph_commitment=SHA,
    ),
    BallotRequest(
        campaign="c", plan_sha256=SHA, request_id="c/b", stage="ballot", cohort=(MEMBER,), noise_multiplier=0.1, step_exp=-60,
        candidates=("a", "b"), graph_nonce=SHA, audits=AUDITS,
    ),
    train_request(),
    EvaluateRequest(
        campaign="c", plan_sha256=SHA, request_id="c/e", stage="evaluation", cohort=(), noise_multiplier=3, step_exp=30,
        candidates=("a",), detail=True, graph_nonce=SHA,
    ),
    UnmaskRequest(campaign="c", plan_sha256=SHA, request_id="c/b/u", stage="ballot", round_id="c/b", alive=("site-1",)),
    AbortRequest(campaign="c", plan_sha256=SHA, request_id="c/b/a", stage="ballot", round_id="c/b"),
    CloseRequest(campaign="c", plan_sha256=SHA, request_id="c/z", stage="close", audits=AUDITS),
    WeightsRequest(
        campaign="c", plan_sha256=SHA, request_id="c/weights/cnn/0/7", candidate="cnn", file="model.safetensors", sha256=SHA,
        size=9, offset=7,
    ),
]  # fmt: skip
REPLIES: list[AnyReply] = [
    HelloReply(request_sha256=REQUEST.sha256, urna_version="0.1", member=MEMBER),
    HelloReply(request_sha256=REQUEST.sha256, urna_version="0.1", member=MEMBER, lacks=("cnn",)),
    WeightsReply(request_sha256=REQUEST.sha256, received=9, complete=True),
    Pending(request_sha256=REQUEST.sha256),
    Masked(request_sha256=REQUEST.sha256),
    Unmasked(request_sha256=REQUEST.sha256, answer=ANSWER),
    Burnt(request_sha256=REQUEST.sha256, answer=SILENT),
    Statement(
        request_sha256=REQUEST.sha256,
        rows=(SpentRow(stage="final", partition="tuning", event="{}", count=2),),
        epsilon_by_stage={"final": 1.0}, epsilon=1.0, delta=1e-5,
    ),
    Refusal(request_sha256=REQUEST.sha256, reasons=("budget: no",)),
    Failure(request_sha256=REQUEST.sha256, code=FailureCode.DATA),
]  # fmt: skip


@pytest.mark.parametrize("message", REQUESTS, ids=lambda one: one.kind)
def test_every_request_arrives_as_it_was_sent(message: AnyRequest) -> None:
    assert open_request(signed(OPERATOR_IDENTITY, message), ROSTER, OPERATOR) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda one: one.kind)
def test_every_reply_arrives_as_it_was_sent(message: AnyReply) -> None:
    assert open_reply(signed(ONE, message), ROSTER, "site-1", REQUEST) == message


def with_arrays(**arrays: AnyArray) -> Envelope:
    return replace(REQUEST, arrays=arrays)


def altered(array: AnyArray) -> AnyArray:
    result = array.copy()
    result[3] = np.nextafter(result[3], np.float32(9))
    return result


POSED = f'vector", "float32", [6], "{hashlib.sha256(HEAD.tobytes()).hexdigest()}"], ["x'


@pytest.mark.parametrize(
    "envelope",
    [
        replace(REQUEST, body=REQUEST.body.replace(b"1.5", b"0.5")),
        replace(REQUEST, body=REQUEST.body + b" "),
        replace(REQUEST, signature=bytes(64)),
        replace(REQUEST, signature=signed(OPERATOR_IDENTITY, train_request(2), {"vector": HEAD}).signature),
        replace(REQUEST, signature=signed(ONE, train_request(), {"vector": HEAD}).signature),
        signed(identity(OPERATOR), train_request(), {"vector": HEAD}),
        with_arrays(),
        with_arrays(vector=altered(HEAD)),
        with_arrays(vector=HEAD[::-1]),
        with_arrays(vector=HEAD.reshape(2, 3)),
        with_arrays(vector=HEAD.view(np.uint64)),
        with_arrays(vector=HEAD[:5]),
        with_arrays(vector_=HEAD),
        with_arrays(vector=HEAD, more=HEAD),
        replace(REQUEST, arrays={POSED: HEAD}),
    ],
    ids=[
        *("body", "longer body", "no signature", "signature of another", "of a site", "of a foreign key", "array left out"),
        *("array altered", "reversed", "reshaped", "other type", "shorter", "renamed", "added", "posing as two"),
    ],
)
def test_a_request_that_the_operator_did_not_sign_is_refused(envelope: Envelope) -> None:
    with pytest.raises(SignatureError, match="expected a message signed by operator, found another or no signature"):
        open_request(envelope, ROSTER, OPERATOR)


def test_two_arrays_cannot_be_swapped() -> None:
    first, second = HEAD, HEAD[::-1].copy()
    sealed = signed(OPERATOR_IDENTITY, REQUESTS[3], {"vector-0": first, "vector-1": second})
    open_request(sealed, ROSTER, OPERATOR)
    with pytest.raises(SignatureError, match="found another or no signature"):
        open_request(replace(sealed, arrays={"vector-0": second, "vector-1": first}), ROSTER, OPERATOR)


def test_one_array_cannot_pose_as_two() -> None:
    """Names were once joined by spaces and line breaks: a name that held the line of another array stood for both."""
    first, second = np.ones(2, np.float32), np.ones(3, np.float32)
    sealed = signed(OPERATOR_IDENTITY, train_request(), {"a": first, "b": second})
    for line in (f"a float32 (2,) {hashlib.sha256(first.tobytes()).hexdigest()}\nb", "a\nb", "a b", "a,b"):
        posing = replace(sealed, arrays={line: second})
        assert posing.sha256 != sealed.sha256
        with pytest.raises(SignatureError, match="found another or no signature"):
            open_request(posing, ROSTER, OPERATOR)


def test_a_message_in_another_members_name_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected a message of site-1, found one of 'site-2'"):
        open_reply(signed(TWO, Masked(request_sha256=REQUEST.sha256)), ROSTER, "site-1", REQUEST)
    with pytest.raises(SignatureError, match="expected a message signed by site-1"):
        open_reply(replace(signed(TWO, Masked(request_sha256=REQUEST.sha256)), sender="site-1"), ROSTER, "site-1", REQUEST)
    with pytest.raises(ProtocolError, match="expected a message of operator, found one of 'site-1'"):
        open_request(signed(ONE, train_request()), ROSTER, OPERATOR)


def test_a_site_without_a_place_in_the_roster_is_refused() -> None:
    stranger = identity("site-3")
    with pytest.raises(SignatureError, match="expected a member of the roster, found 'site-3'"):
        open_reply(signed(stranger, Masked(request_sha256=REQUEST.sha256)), ROSTER, "site-3", REQUEST)


def test_replayed_reply_answers_no_other_request() -> None:
    other = signed(OPERATOR_IDENTITY, train_request(2), {"vector": HEAD})
    assert open_reply(REPLY, ROSTER, "site-1", REQUEST) == Masked(request_sha256=REQUEST.sha256)
    with pytest.raises(ProtocolError, match=f"expected site-1's answer to {other.sha256[:12]}, found one to another request"):
        open_reply(REPLY, ROSTER, "site-1", other)


def test_a_reply_to_the_same_body_with_another_vector_is_another_reply() -> None:
    other = signed(OPERATOR_IDENTITY, train_request(), {"vector": altered(HEAD)})
    assert other.body == REQUEST.body
    with pytest.raises(ProtocolError, match="found one to another request"):
        open_reply(REPLY, ROSTER, "site-1", other)


def test_a_request_does_not_pass_for_a_reply_nor_a_reply_for_a_request() -> None:
    with pytest.raises(ProtocolError, match="expected a reply of version 2 from site-1, found body: union_tag_invalid"):
        open_reply(signed(ONE, train_request()), ROSTER, "site-1", REQUEST)
    with pytest.raises(ProtocolError, match="expected a request of version 2, found body: union_tag_invalid"):
        open_request(signed(OPERATOR_IDENTITY, Masked(request_sha256=SHA)), ROSTER, OPERATOR)


def raw(body: bytes) -> Envelope:
    """A body that no model made, rightly signed by the operator."""

    class Bare(Message):
        def model_dump_json(self, **_: object) -> str:
            return body.decode("latin-1")

    sealed = signed(OPERATOR_IDENTITY, Bare())
    assert sealed.body.decode() == body.decode("latin-1")
    return sealed


GOOD = json.loads(REQUEST.body)
AUDIT, GIVEN = json.loads(AUDITS[0].model_dump_json()), json.loads(ANSWER.model_dump_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "train.version: literal_error"),
        ({"version": 3}, "train.version: literal_error"),
        ({"version": None}, "train.version: literal_error"),
        ({"version": "2"}, "train.version: literal_error"),
        ({"debug": True}, "train.debug: extra_forbidden"),
        ({"kind": "shell"}, "body: union_tag_invalid"),
        ({"noise_multiplier": 0}, "train.noise_multiplier: greater_than"),
        ({"noise_multiplier": -1.0}, "train.noise_multiplier: greater_than"),
        ({"noise_multiplier": math.nan}, "train.noise_multiplier: finite_number"),
        ({"noise_multiplier": math.inf}, "train.noise_multiplier: finite_number"),
        ({"noise_multiplier": None}, "train.noise_multiplier: float_type"),
        ({"step_exp": 31}, "train.step_exp: less_than_equal"),
        ({"graph_nonce": "0" * 63}, "train.graph_nonce: string_pattern_mismatch"),
        ({"graph_nonce": None}, "train.graph_nonce: string_type"),
        ({"audits": [{}]}, "train.audits.0.round_id: missing"),
        ({"audits": [AUDIT | {"alive": ["A"]}]}, "train.audits.0.alive.0: string_pattern_mismatch"),
        ({"audits": [AUDIT | {"answers": {"a": {}}}]}, "train.audits.0.answers.a.alive_sha256: missing"),
        (
            {"audits": [AUDIT | {"answers": {"a": GIVEN | {"signature": "00"}}}]},
            "train.audits.0.answers.a.signature: string_pat",
        ),
        (
            {"audits": [AUDIT | {"answers": {"a": GIVEN | {"alive_sha256": "x"}}}]},
            "train.audits.0.answers.a.alive_sha256.constr",
        ),
        ({"audits": [AUDIT | {"answers": {str(n): GIVEN for n in range(256)}}]}, "train.audits.0.answers: too_long"),
        ({"audits": [AUDIT] * 1001}, "train.audits: too_long"),
        ({"planned_count": 0}, "train.planned_count: greater_than_equal"),
        ({"request_id": "a\n"}, "train.request_id: string_pattern_mismatch"),
        ({"request_id": ""}, "train.request_id: string_pattern_mismatch"),
        ({"campaign": "../x"}, "train.campaign: string_pattern_mismatch"),
        ({"plan_sha256": "0" * 63}, "train.plan_sha256: string_pattern_mismatch"),
        ({"stage": "other"}, "train.stage: literal_error"),
        ({"cohort": [{**GOOD["cohort"][0], "num_records": 0}]}, "train.cohort.0.num_records: greater_than_equal"),
        ({"cohort": [{**GOOD["cohort"][0], "admin": 1}]}, "train.cohort.0.admin: extra_forbidden"),
    ],
)
def test_a_signed_request_of_another_form_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ProtocolError, match=f"expected a request of version 2, found {message}"):
        open_request(raw(json.dumps(GOOD | change).encode()), ROSTER, OPERATOR)


def test_the_form_that_is_changed_above_is_otherwise_good() -> None:
    assert open_request(raw(json.dumps(GOOD).encode()), ROSTER, OPERATOR) == train_request()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b"{}", b'"x"', b"[" * 100_000])
def test_a_signed_body_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="expected a request of version 2, found body: "):
        open_request(raw(body), ROSTER, OPERATOR)


def test_a_refused_message_is_not_quoted() -> None:
    with pytest.raises(ProtocolError) as caught:
        open_request(raw(json.dumps(GOOD | {"campaign": "Jane Doe"}).encode()), ROSTER, OPERATOR)
    assert "Jane" not in str(caught.value)


def test_a_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="expected a body of at most 4000000 bytes, found 4000001"):
        open_request(Envelope(OPERATOR, b"x" * (BODY_LIMIT_BYTES + 1), b""), ROSTER, OPERATOR)
    arrays = {str(number): np.zeros(1, np.float32) for number in range(ARRAYS_LIMIT + 1)}
    with pytest.raises(ProtocolError, match="expected a body of at most"):
        open_request(Envelope(OPERATOR, b"{}", b"", arrays), ROSTER, OPERATOR)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int64, np.uint32, np.int8, np.complex64, np.bool_, object, "U3", ">f4", ">u8", "datetime64[s]"]
)
def test_arrays_of_other_types_are_refused(dtype: str) -> None:
    array: AnyArray = np.zeros(3, dtype=dtype)
    with pytest.raises(ProtocolError, match=r"expected arrays of float32 or uint8 or uint64, found .* in 'vector'"):
        open_request(signed(OPERATOR_IDENTITY, train_request(), {"vector": array}), ROSTER, OPERATOR)


@pytest.mark.parametrize(
    "member",
    [
        MEMBER.model_copy(update={"num_records": 301}),
        MEMBER.model_copy(update={"public_key": "cd" * 32}),
        MEMBER.model_copy(update={"site": "site-2"}),
        MEMBER.model_copy(update={"signature": "0" * 128}),
        Member.create(ONE, "c-2", ROUND_KEY, 300),
        Member.create(identity("site-1"), CAMPAIGN, ROUND_KEY, 300),
        MEMBER.model_copy(update={"signature": ONE.sign("message", f"{CAMPAIGN}/{ROUND_KEY}/300".encode()).hex()}),
    ],
    ids=["size", "swapped key", "swapped site", "unsigned", "of another campaign", "foreign identity", "other purpose"],
)
def test_a_member_that_its_site_did_not_sign_is_refused(member: Member) -> None:
    MEMBER.check(ROSTER, CAMPAIGN)
    with pytest.raises(SignatureError, match=f"expected a member signed by {member.site}"):
        member.check(ROSTER, CAMPAIGN)


@pytest.mark.parametrize("stranger", [OPERATOR_IDENTITY, identity("site-3")], ids=["operator", "unknown"])
def test_the_operator_cannot_count_as_a_site_of_the_cohort(stranger: Identity) -> None:
    """With one more member under its own control a malicious operator would open the sum of one site less than agreed."""
    with pytest.raises(SignatureError, match=f"expected a site of the roster, found '{stranger.name}': ask for a new roster"):
        Member.create(stranger, CAMPAIGN, ROUND_KEY, 300).check(ROSTER, CAMPAIGN)


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        train_request().noise_multiplier = 0.1  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign"):
        REQUEST.sender = "site-1"  # type: ignore[misc]


names = st.text(max_size=12).filter(lambda name: name != "__metadata__" and "\x00" not in name)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def array_sets(draw: st.DrawFn) -> Mapping[str, AnyArray]:
    chosen = draw(st.dictionaries(names, st.tuples(shapes, st.sampled_from(ARRAY_TYPES)), max_size=3))
    sizes = {name: np.dtype(dtype).itemsize * math.prod(shape) for name, (shape, dtype) in chosen.items()}
    return {
        name: np.frombuffer(draw(st.binary(min_size=sizes[name], max_size=sizes[name])), dtype).reshape(shape)
        for name, (shape, dtype) in chosen.items()
    }


def assert_same(one: Envelope, other: Envelope) -> None:
    assert (one.sender, one.body, one.signature, one.sha256) == (other.sender, other.body, other.signature, other.sha256)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            other.arrays[name].dtype, other.arrays[name].shape, other.arrays[name].tobytes(),
        )  # fmt: skip


def through_flower(envelope: Envelope) -> Envelope:
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    return from_record(recorddict_from_proto(recorddict_to_proto(to_record(envelope))))


@settings(max_examples=60, deadline=None)
@given(array_sets(), st.text(max_size=30))
def test_storage_and_the_wire_keep_every_bit(arrays: Mapping[str, AnyArray], event: str) -> None:
    message = Refusal(request_sha256=SHA, reasons=(event,))
    envelope = signed(ONE, message, arrays)
    for carried in (Envelope.from_bytes(envelope.to_bytes()), from_record(to_record(envelope)), through_flower(envelope)):
        assert_same(carried, envelope)
        with pytest.raises(ProtocolError, match="found one to another request"):  # after the signature was found good
            open_reply(carried, ROSTER, "site-1", REQUEST)


@pytest.mark.parametrize("carry", [lambda e: Envelope.from_bytes(e.to_bytes()), through_flower], ids=["bytes", "Flower"])
def test_a_carried_message_is_still_signed(carry: Callable[[Envelope], Envelope]) -> None:
    assert open_request(carry(REQUEST), ROSTER, OPERATOR) == train_request()
    assert open_reply(carry(REPLY), ROSTER, "site-1", REQUEST) == Masked(request_sha256=REQUEST.sha256)


def test_arrays_in_any_layout_are_carried_by_value() -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    sealed = signed(OPERATOR_IDENTITY, train_request(), {"a": grid.T, "b": grid[:, ::2], "c": np.array(3, np.float32)})
    for carried in (Envelope.from_bytes(sealed.to_bytes()), through_flower(sealed)):
        open_request(carried, ROSTER, OPERATOR)
        np.testing.assert_array_equal(carried.arrays["a"], grid.T)
        np.testing.assert_array_equal(carried.arrays["b"], grid[:, ::2])


def test_an_array_from_the_wire_can_be_used_in_place() -> None:
    assert through_flower(REQUEST).arrays["vector"].flags.writeable


def test_stored_bytes_altered_anywhere_are_never_another_message() -> None:
    """Every byte, three ways; what opens at all must be the very same message (a flipped letter of the hex signature is)."""
    stored = REPLY.to_bytes()
    opened = 0
    for position in range(len(stored)):
        for flip in (0x01, 0x20, 0xFF):
            bad = bytearray(stored)
            bad[position] ^= flip
            try:
                envelope = Envelope.from_bytes(bytes(bad))
                open_reply(envelope, ROSTER, "site-1", REQUEST)
            except ProtocolError:
                continue
            opened += 1
            assert_same(envelope, REPLY)
    assert opened < 200  # of about 2500: letters of 128 hex digits and spaces of the padding


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_stored_bytes_that_were_cut_are_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match="expected a stored envelope, found other bytes"):
        Envelope.from_bytes(REPLY.to_bytes()[:length])


def test_tensors_without_an_envelope_are_refused() -> None:
    from safetensors.numpy import save

    with pytest.raises(ProtocolError, match="expected a stored envelope, found other bytes: KeyError"):
        Envelope.from_bytes(save({"a": HEAD}))


def numpy_file(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


@dataclass(frozen=True)
class Forged:
    """An array as a site could put it into a Flower record."""

    data: bytes = bytes(8)
    shape: tuple[int, ...] = (2,)
    dtype: str = "float32"
    stype: str = RAW

    def record(self) -> RecordDict:
        header = ConfigRecord({"sender": "site-1", "body": b"{}", "signature": b"x"})
        array = Array(self.dtype, self.shape, self.stype, self.data)
        return RecordDict({"envelope": header, "arrays": ArrayRecord({"a": array})})


@pytest.mark.parametrize(
    "array",
    [
        Forged(bytes(7)),
        Forged(b""),
        Forged(shape=(3,)),
        Forged(shape=(-1,)),
        Forged(shape=(2, -1)),
        Forged(shape=(10**30,)),
        Forged(shape=(2**62, 2**62)),
        Forged(dtype="float64"),
        Forged(dtype="uint32"),
        Forged(bytes(9), shape=(1,), dtype="uint64"),
        Forged(dtype="object"),
        Forged(dtype="nonsense"),
        Forged(numpy_file((10**15,)), stype="numpy.ndarray"),
        Forged(numpy_file((10**30,)), stype="numpy.ndarray"),
        Forged(b"", stype="numpy.ndarray"),
        Forged(b"PK\x03\x04aaa", stype="numpy.ndarray"),
        Forged(b"\x93NUMPY\x01\x00" + (5000).to_bytes(2, "little") + b"(" * 5000, stype="numpy.ndarray"),
    ],
    ids=lambda one: f"{one.stype} {one.dtype} {one.shape} {one.data[:12]!r}",
)
def test_one_bad_array_is_a_protocol_error_and_nothing_else(array: Forged) -> None:
    """EOFError, BadZipFile, MemoryError ... of numpy's own reader on these would have ended the server's round."""
    with pytest.raises(ProtocolError, match="expected an Urna message, found another: "):
        from_record(array.record())


def test_a_good_array_in_a_record_is_read() -> None:
    np.testing.assert_array_equal(from_record(Forged().record()).arrays["a"], np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RecordDict(), "found another: KeyError"),
        (RecordDict({"envelope": ConfigRecord({"sender": "a"}), "arrays": ArrayRecord()}), "found another: KeyError"),
        (
            RecordDict({"envelope": ConfigRecord({"sender": 1, "body": b"", "signature": b""}), "arrays": ArrayRecord()}),
            "found fields of other types",
        ),
    ],
)
def test_a_foreign_record_is_refused(content: RecordDict, message: str) -> None:
    with pytest.raises(ProtocolError, match=f"expected an Urna message, {message}"):
        from_record(content)


def test_the_hash_covers_body_and_arrays_but_is_not_moved_by_their_order() -> None:
    one = signed(OPERATOR_IDENTITY, train_request(), {"a": HEAD, "b": HEAD[:2]})
    other = signed(OPERATOR_IDENTITY, train_request(), {"b": HEAD[:2], "a": HEAD})
    assert one.sha256 == other.sha256
    assert len({one.sha256, REQUEST.sha256, replace(REQUEST, body=b"{}").sha256, replace(REQUEST, arrays={}).sha256}) == 4


# ---- the secure sum


def test_a_wire_array_is_little_endian_on_any_machine() -> None:
    """What a masked scalar's bytes say must not depend on who reads them."""
    record = to_record(signed(ONE, Masked(request_sha256=SHA), {"scalars": np.array([1, 2**40], np.uint64)}))
    array = record.array_records["arrays"]["scalars"]
    assert array.data == (1).to_bytes(8, "little") + (2**40).to_bytes(8, "little")
    assert (array.dtype, array.stype) == ("uint64", RAW)


def test_an_answer_says_which_list_or_that_there_was_none() -> None:
    assert AnswerOfSite(alive_sha256="", signature="0" * 128).alive_sha256 == ""
    for wrong in ("0", "0" * 63, "0" * 65, "G" * 64, " "):
        with pytest.raises(ValidationError, match="alive_sha256"):
            AnswerOfSite(alive_sha256=wrong, signature="0" * 128)


def test_an_audit_cannot_be_changed_under_way() -> None:
    """Who answered what is under the operator's signature, as all of a request is."""
    sealed = signed(OPERATOR_IDENTITY, REQUESTS[1])
    assert AUDITS[0].answers["site-1"].signature.encode() in sealed.body
    forged = replace(sealed, body=sealed.body.replace(b'"alive":["site-1","site-2"]', b'"alive":["site-1"]'))
    assert forged.body != sealed.body
    with pytest.raises(SignatureError, match="expected a message signed by operator"):
        open_request(forged, ROSTER, OPERATOR)


def test_an_unmask_names_the_round_and_the_list() -> None:
    fields = {"campaign": "c", "plan_sha256": SHA, "request_id": "c/u", "stage": "final"}
    for missing in ({"round_id": "c/r"}, {"alive": ("site-1",)}, {"round_id": "c/r\n", "alive": ()}):
        with pytest.raises(ValidationError, match="UnmaskRequest"):
            UnmaskRequest(**fields, **missing)


def test_a_hello_without_a_commitment_to_the_graph_is_no_hello() -> None:
    fields = json.loads(REQUESTS[0].model_dump_json())
    del fields["graph_commitment"]
    with pytest.raises(ProtocolError, match=r"expected a request of version 2, found hello\.graph_commitment: missing"):
        open_request(raw(json.dumps(fields).encode()), ROSTER, OPERATOR)


# ---- ledger heads

LEDGER = "0e" * 16
LEDGER_HEAD = Head.create(ONE, LEDGER, 3, SHA)


def test_a_ledger_head_is_believed_from_its_site_only() -> None:
    LEDGER_HEAD.check(ROSTER)
    Head.model_validate_json(LEDGER_HEAD.model_dump_json()).check(ROSTER)


@pytest.mark.parametrize(
    "changes",
    [{"seq": 4}, {"seq": 30}, {"link": "1" * 64}, {"site": "site-2"}, {"signature": "0" * 128}],
    ids=str,
)
def test_an_altered_ledger_head_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SignatureError, match=r"expected a ledger head signed by site-[12], found another or no signature"):
        LEDGER_HEAD.model_copy(update=changes).check(ROSTER)


def test_a_ledger_head_of_no_site_is_refused() -> None:
    for name in (OPERATOR, "site-3"):
        with pytest.raises(SignatureError, match=f"expected a ledger head of a site, found one of '{name}'"):
            Head.create(identity(name), LEDGER, 3, SHA).check(ROSTER)


def test_another_signature_of_the_site_is_no_ledger_head() -> None:
    signature = ONE.sign("message", b"").hex()
    with pytest.raises(SignatureError, match="expected a ledger head signed by site-1"):
        LEDGER_HEAD.model_copy(update={"signature": signature}).check(ROSTER)


@pytest.mark.parametrize("changes", [{"seq": -1}, {"seq": 2**63}, {"seq": 1.5}, {"link": "g" * 64}, {"version": 1}], ids=str)
def test_what_is_no_ledger_head_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Head.model_validate(LEDGER_HEAD.model_dump() | changes)
