"""One model per request and reply, versioned and signed; an `Envelope` is what travels.

    hello     plan, model hashes                  -> HelloReply: what a site may say publicly, its round key
    ballot    candidates, mechanism, cohort       -> Masked: its buckets' votes (K numbers)
    train     candidate, mechanism, cohort, head  -> Masked: its clipped gradients (p numbers)
    evaluate  candidates, mechanism, cohort       -> Masked: its held-out counts
    close     nothing                             -> Statement: what its ledger says this campaign cost

Any reply may be a `Refusal` (policy: all reasons at once) or a `Failure` (a fixed code, never a text).

Covered:
    * the signature binds sender, body and every array's bytes, shape and type; a reply names the request it answers.
Not covered:
    * freshness by clock: a request id is answered once with the same bytes, whenever it is repeated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from urna.protocol.errors import FailureCode, ProtocolError, SignatureError
from urna.protocol.identity import Identity, PublicKeyHex, Roster, verify
from urna.protocol.plan import Name

if TYPE_CHECKING:
    from flwr.app import RecordDict

BODY_LIMIT_BYTES = 4_000_000
ARRAYS_LIMIT = 1_000
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Stage = Literal["hello", "ballot", "runoff", "final", "evaluation", "close"]
Partition = Literal["tuning", "heldout"]  # of a site's records, by a keyed hash of each id
PARTITIONS: tuple[Partition, ...] = ("tuning", "heldout")
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]
AnyArray = npt.NDArray[Any]  # of the types in ARRAY_TYPES only
ARRAY_TYPES = ("float32", "uint32")
RAW = "urna.raw"  # how arrays travel in Flower records: their bytes, little-endian, in C order


class Message(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1


class Member(Message):
    """A site in one campaign: its X25519 round key and declared size, signed by its identity."""

    site: Name
    public_key: PublicKeyHex
    num_records: Annotated[int, Field(ge=1, le=10**12)]  # declared, public, may be rounded
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @staticmethod
    def create(identity: Identity, campaign: str, public_key: str, num_records: int) -> "Member":
        """Sign this site's round key and size for one campaign."""
        signature = identity.sign("member", _member_bytes(campaign, public_key, num_records))
        return Member(site=identity.name, public_key=public_key, num_records=num_records, signature=signature.hex())

    def check(self, roster: Roster, campaign: str) -> None:
        """Check the signature against the pinned identity.

        Raises:
            SignatureError: no site of the roster (the operator is none), or the key or size was not signed by this site for
                this campaign.
        """
        if self.site not in roster.sites:
            raise SignatureError(f"expected a site of the roster, found {self.site!r}: ask for a new roster")
        data = _member_bytes(campaign, self.public_key, self.num_records)
        verify(roster, self.site, "member", data, bytes.fromhex(self.signature))


def _member_bytes(campaign: str, public_key: str, num_records: int) -> bytes:
    return f"{campaign}/{public_key}/{num_records}".encode()


class Request(Message):
    """What all requests share; ``request_id`` is spent once at every site."""

    campaign: Name
    plan_sha256: Sha256
    request_id: Annotated[str, Field(pattern=r"^[a-z0-9_/.-]{1,200}$")]
    stage: Stage


class HelloRequest(Request):
    """Opens a campaign: the plan in full, and the hash of every candidate as the operator built it."""

    kind: Literal["hello"] = "hello"
    stage: Literal["hello"] = "hello"
    plan_json: Annotated[str, Field(max_length=1_000_000)]
    models: dict[Name, Sha256]


class Summed(Request):
    """A request whose reply is one masked vector of a secure sum."""

    cohort: tuple[Member, ...]
    noise_multiplier: PositiveFinite  # of the whole sum
    step_exp: Annotated[int, Field(ge=-60, le=30)]
    planned_count: Annotated[int, Field(ge=1, le=100_000)] = 1  # releases of this kind that the stage will ask for


class BallotRequest(Summed):
    """Asks for a site's votes over ``candidates``, in this order."""

    kind: Literal["ballot"] = "ballot"
    stage: Literal["ballot"] = "ballot"
    candidates: Annotated[tuple[Name, ...], Field(min_length=2, max_length=64)]


class TrainRequest(Summed):
    """Asks for one round of DP training of ``candidate``; array ``vector`` (p,) float32 is the global head."""

    kind: Literal["train"] = "train"
    stage: Literal["runoff", "final"]
    candidate: Name


class EvaluateRequest(Summed):
    """Asks for noisy held-out counts; array ``vector-i`` (p_i,) float32 is the head of candidate i.

    ``detail`` adds the confusion matrix of the (then only) candidate.
    """

    kind: Literal["evaluate"] = "evaluate"
    stage: Literal["evaluation"] = "evaluation"
    candidates: Annotated[tuple[Name, ...], Field(min_length=1, max_length=3)]
    detail: bool


class CloseRequest(Request):
    """Ends a campaign: asks for what the ledger says it cost."""

    kind: Literal["close"] = "close"
    stage: Literal["close"] = "close"


class Reply(Message):
    """What all replies share: the hash of the request's body that they answer."""

    request_sha256: Sha256


class HelloReply(Reply):
    """What a site may say publicly."""

    kind: Literal["hello"] = "hello"
    urna_version: Annotated[str, Field(max_length=50)]
    member: Member


class Masked(Reply):
    """A masked vector, in array ``masked`` (d,) uint32."""

    kind: Literal["masked"] = "masked"


class SpentRow(Message):
    """Releases of one kind that a site's ledger holds."""

    stage: Stage
    partition: Partition
    event: Text  # JSON of a dp_accounting event
    count: Annotated[int, Field(ge=1, le=10**12)]


class Statement(Reply):
    """What a site's ledger says that this campaign cost; signed with the envelope."""

    kind: Literal["statement"] = "statement"
    rows: Annotated[tuple[SpentRow, ...], Field(max_length=10_000)]
    epsilon_by_stage: dict[Stage, NotNegative]
    epsilon: NotNegative  # of the campaign: the larger of the two partitions, which compose in parallel
    delta: Annotated[float, Field(gt=0, lt=1)]


class Refusal(Reply):
    """The policy says no, with every reason."""

    kind: Literal["refusal"] = "refusal"
    reasons: Annotated[tuple[Text, ...], Field(min_length=1, max_length=100)]


class Failure(Reply):
    """Something went wrong at the site; the text stays in its own log."""

    kind: Literal["failure"] = "failure"
    code: FailureCode


AnyRequest = HelloRequest | BallotRequest | TrainRequest | EvaluateRequest | CloseRequest
AnyReply = HelloReply | Masked | Statement | Refusal | Failure
_REQUEST: TypeAdapter[AnyRequest] = TypeAdapter(Annotated[AnyRequest, Field(discriminator="kind")])
_REPLY: TypeAdapter[AnyReply] = TypeAdapter(Annotated[AnyReply, Field(discriminator="kind")])


@dataclass(frozen=True)
class Envelope:
    """A signed body with its arrays: what travels, and what a ledger keeps."""

    sender: str
    body: bytes  # JSON
    signature: bytes
    arrays: Mapping[str, AnyArray] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of everything that the signature covers, hex."""
        return hashlib.sha256(_signed_bytes(self.body, self.arrays)).hexdigest()

    def to_bytes(self) -> bytes:
        """One byte string (safetensors), for storage."""
        from safetensors.numpy import save

        metadata = {"sender": self.sender, "body": self.body.decode(), "signature": self.signature.hex()}
        return save({name: np.asarray(array, order="C") for name, array in self.arrays.items()}, metadata)

    @staticmethod
    def from_bytes(data: bytes) -> "Envelope":
        """The inverse of `to_bytes`.

        Raises:
            ProtocolError: not such bytes.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            return Envelope(header["sender"], header["body"].encode(), bytes.fromhex(header["signature"]), arrays)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ProtocolError(f"expected a stored envelope, found other bytes: {type(error).__name__}") from None


def seal(identity: Identity, message: Message, arrays: Mapping[str, AnyArray] | None = None) -> Envelope:
    """Sign a message with its arrays (float32 or uint32)."""
    body = message.model_dump_json().encode()
    kept = dict(arrays or {})
    return Envelope(identity.name, body, identity.sign("message", _signed_bytes(body, kept)), kept)


def open_request(envelope: Envelope, roster: Roster, operator: str) -> AnyRequest:
    """Check the operator's signature, then read the request.

    Raises:
        ProtocolError: not signed by ``operator``, too large, or not a request of this version.
    """
    _check(envelope, roster, operator)
    return read_request(envelope.body)


def open_reply(envelope: Envelope, roster: Roster, site: str, request: Envelope) -> AnyReply:
    """Check ``site``'s signature and that this answers ``request``, then read the reply.

    Raises:
        ProtocolError: not signed by that site, an answer to something else, or not a reply of this version.
    """
    _check(envelope, roster, site)
    try:
        reply = _REPLY.validate_json(envelope.body)
    except ValidationError as error:
        raise ProtocolError(f"expected a reply of version 1 from {site}, found {_summary(error)}") from None
    if reply.request_sha256 != request.sha256:
        raise ProtocolError(f"expected {site}'s answer to {request.sha256[:12]}, found one to another request")
    return reply


def read_request(body: bytes) -> AnyRequest:
    """Read the body of a request that was signed here.

    Raises:
        ProtocolError: not a request of this version.
    """
    try:
        return _REQUEST.validate_json(body)
    except ValidationError as error:
        raise ProtocolError(f"expected a request of version 1, found {_summary(error)}") from None


def _check(envelope: Envelope, roster: Roster, sender: str) -> None:
    if len(envelope.body) > BODY_LIMIT_BYTES or len(envelope.arrays) > ARRAYS_LIMIT:
        raise ProtocolError(f"expected a body of at most {BODY_LIMIT_BYTES} bytes, found {len(envelope.body)}")
    for name, array in envelope.arrays.items():
        if str(array.dtype) not in ARRAY_TYPES:
            raise ProtocolError(f"expected arrays of {' or '.join(ARRAY_TYPES)}, found {array.dtype} in {name!r}")
    if envelope.sender != sender:
        raise ProtocolError(f"expected a message of {sender}, found one of {envelope.sender!r}")
    verify(roster, sender, "message", _signed_bytes(envelope.body, envelope.arrays), envelope.signature)


def _signed_bytes(body: bytes, arrays: Mapping[str, AnyArray]) -> bytes:
    """The body and, for each array, name, type, shape and hash of its bytes; as JSON, so that no name can pose as two."""
    lines = [
        [name, str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
        for name, array in sorted(arrays.items())
    ]
    return len(body).to_bytes(8, "big") + body + json.dumps(lines).encode()


def _summary(error: ValidationError) -> str:
    """Where a foreign message is wrong, without its content."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['type']}" for item in error.errors()[:3])


def to_record(envelope: Envelope) -> "RecordDict":
    """As Flower carries it."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    header = ConfigRecord({"sender": envelope.sender, "body": envelope.body, "signature": envelope.signature})
    arrays = ArrayRecord({name: Array(str(one.dtype), one.shape, RAW, _raw(one)) for name, one in envelope.arrays.items()})
    return RecordDict({"envelope": header, "arrays": arrays})


def _raw(array: AnyArray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def from_record(record: "RecordDict") -> Envelope:
    """The inverse of `to_record`.

    A peer's bytes never reach numpy's file reader, which raises many things and allocates what a header says.

    Raises:
        ProtocolError: not an Urna message.
    """
    try:
        header, arrays = record.config_records["envelope"], record.array_records["arrays"]
        sender, body, signature = header["sender"], header["body"], header["signature"]
        loaded = {name: _from_raw(array.dtype, tuple(array.shape), array.stype, array.data) for name, array in arrays.items()}
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"expected an Urna message, found another: {type(error).__name__}") from None
    if not (isinstance(sender, str) and isinstance(body, bytes) and isinstance(signature, bytes)):
        raise ProtocolError("expected an Urna message, found fields of other types")
    return Envelope(sender, body, signature, loaded)


def _from_raw(dtype: str, shape: tuple[int, ...], kind: str, data: bytes) -> AnyArray:
    if kind != RAW or dtype not in ARRAY_TYPES or min(shape, default=0) < 0:
        raise ValueError("not an array of this protocol")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
