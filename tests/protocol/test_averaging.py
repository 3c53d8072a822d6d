import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError

from urna.protocol.averaging import (
    HEADER,
    GreetRequest,
    campaign_of,
    content_sha256,
    open_asked,
    with_header,
    without_header,
)
from urna.protocol.errors import ProtocolError
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import BODY_LIMIT_BYTES, Envelope, signed

OPERATOR_IDENTITY = Identity(OPERATOR, Ed25519PrivateKey.generate())
SITE = Identity("site-1", Ed25519PrivateKey.generate())
ROSTER = Roster(operator=OPERATOR_IDENTITY.public_key_hex, sites={"site-1": SITE.public_key_hex})
GREET = GreetRequest(campaign=campaign_of(7, "ab" * 32), run_id=7, message_type="train")


def content(**changes: object) -> RecordDict:
    values: dict[str, object] = {"lr": 0.1, "steps": 3, "name": "a", "flag": True, "raw": b"\0\1", "many": [1, 2]}
    arrays = ArrayRecord({"a": Array(np.zeros(3, np.float32)), "b": Array(np.ones(2))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord(values | changes), "more": MetricRecord({"x": 1})})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.2},
        {"steps": 3.0},
        {"steps": "3"},
        {"flag": 1},
        {"raw": b"\0\2"},
        {"many": [2, 1]},
        {"many": [1.0, 2.0]},
        {"z": 1},
    ],
    ids=str,
)
def test_every_value_and_its_type_is_in_the_hash(change: dict[str, object]) -> None:
    assert content_sha256(content(**change)) != content_sha256(content())


def test_names_shapes_types_bytes_and_order_of_arrays_are_in_the_hash() -> None:
    whole = content()
    array = whole.array_records["arrays"]["a"]
    others = {
        "name": ArrayRecord({"c": array, "b": whole.array_records["arrays"]["b"]}),
        "order": ArrayRecord(dict(reversed(list(whole.array_records["arrays"].items())))),
        "shape": ArrayRecord({**whole.array_records["arrays"], "a": Array(array.dtype, (3, 1), array.stype, array.data)}),
        "type": ArrayRecord({**whole.array_records["arrays"], "a": Array("int32", array.shape, array.stype, array.data)}),
        "kind": ArrayRecord({**whole.array_records["arrays"], "a": Array(array.dtype, array.shape, "other", array.data)}),
        "bytes": ArrayRecord(
            {**whole.array_records["arrays"], "a": Array(array.dtype, (3,), array.stype, array.data[:-1] + b"\1")}
        ),
    }
    hashes = {content_sha256(whole)}
    for record in others.values():
        changed = content()
        changed["arrays"] = record
        hashes.add(content_sha256(changed))
    renamed = RecordDict({("model" if name == "arrays" else name): record for name, record in whole.items()})
    hashes.add(content_sha256(renamed))
    assert len(hashes) == len(others) + 2


def test_the_order_of_records_and_of_settings_does_not_matter() -> None:
    whole = content()
    turned = RecordDict(dict(reversed(list(whole.items()))))
    turned["config"] = ConfigRecord(dict(reversed(list(whole.config_records["config"].items()))))
    assert content_sha256(turned) == content_sha256(whole)


def test_a_header_travels_beside_the_records_and_leaves_them_as_they_were() -> None:
    whole, envelope = content(), signed(OPERATOR_IDENTITY, GREET)
    sent = with_header(whole, envelope)
    assert HEADER not in whole
    assert without_header(sent) == envelope
    assert content_sha256(sent) == content_sha256(whole)
    assert without_header(sent) is None
    with pytest.raises(ValueError, match=r"a record may not be called 'urna\.secure-sum'"):
        with_header(with_header(whole, envelope), envelope)


def test_a_record_of_another_kind_is_no_header() -> None:
    for record in (MetricRecord({"sender": 1}), ArrayRecord(), ConfigRecord({"sender": "operator"})):
        assert without_header(RecordDict({HEADER: record})) is None


def test_a_request_is_for_one_run_and_message_type_and_signed_by_the_operator() -> None:
    assert open_asked(signed(OPERATOR_IDENTITY, GREET), ROSTER, 7, "train") == GREET
    for run, kind in ((8, "train"), (7, "evaluate"), (7, "train.other")):
        with pytest.raises(ProtocolError, match="expected a request for run"):
            open_asked(signed(OPERATOR_IDENTITY, GREET), ROSTER, run, kind)
    with pytest.raises(ProtocolError, match="expected a message of operator"):
        open_asked(signed(SITE, GREET), ROSTER, 7, "train")
    good = signed(OPERATOR_IDENTITY, GREET)
    with pytest.raises(ProtocolError, match="expected a message signed by operator"):
        open_asked(Envelope(OPERATOR, good.body.replace(b'"run_id":7', b'"run_id":8'), good.signature), ROSTER, 8, "train")
    body = b" " * (BODY_LIMIT_BYTES + 1)
    with pytest.raises(ProtocolError, match="expected a body of at most"):
        open_asked(Envelope(OPERATOR, body, good.signature), ROSTER, 7, "train")


@pytest.mark.parametrize("message_type", ["query", "trainer", "train.a.b", "", "evaluate\n"])
def test_only_training_and_evaluation_are_averaged(message_type: str) -> None:
    with pytest.raises(ValidationError):
        GreetRequest(campaign="mean-1", run_id=7, message_type=message_type)


def test_campaigns_are_named_by_run_and_nonce() -> None:
    names = {campaign_of(run, nonce) for run in (1, 11) for nonce in ("ab" * 32, "cd" * 32)}
    assert len(names) == 4
    assert all(len(name) <= 63 for name in names)
