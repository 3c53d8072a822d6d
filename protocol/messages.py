"""One model per request and reply, versioned and signed; an `Envelope` is what travels.

    hello     plan, model hashes                  -> HelloReply: what a site may say publicly, its round key
    weights   a piece of a candidate's file       -> WeightsReply: how much it holds; only to sites that lack the candidate
    setup     all members; sparse graphs only     -> SetupReply: the nonce it had committed to
    ballot    candidates, mechanism, cohort       -> Masked: its buckets' votes (K numbers)
    train     candidate, mechanism, cohort, head  -> Masked: its clipped gradients (p numbers)
    evaluate  candidates, mechanism, cohort       -> Masked: its held-out counts
    unmask    who uploaded                        -> Unmasked: what opens the sum of these sites, and no other
    abort     a round that will not be opened     -> Burnt: it never will be, and whether this site had answered
    close     nothing                             -> Statement: what its ledger says this campaign cost

The second exchange of a round is `unmask`. The next request shows all sites what each signed in it (`Audit`).

Any reply may be a `Refusal` (policy: all reasons at once) or a `Failure` (a fixed code, never a text). The reply to a hello may
be `Pending` (a person at the site must approve first): the operator asks the same bytes again later.

Covered:
    * the signature binds sender, body and every array's bytes, shape and type; a reply names the request it answers.
Not covered:
    * freshness by clock: a request id is answered once with the same bytes, whenever it is repeated;
    * who may read it: `sealing` encrypts a whole envelope past the relay.
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
from urna.protocol.identity import Identity, PublicKeyHex, Roster, length_prefixed, verify
from urna.protocol.plan import Name

if TYPE_CHECKING:
    from flwr.app import RecordDict

BODY_LIMIT_BYTES = 4_000_000
ARRAYS_LIMIT = 1_000
PIECE_LIMIT_BYTES = 16 * 2**20  # of a weights file, in one message
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Stage = Literal["hello", "ballot", "runoff", "final", "evaluation", "close"]
Partition = Literal["tuning", "heldout"]  # of a site's records, by a keyed hash of each id
FileName = Literal["candidate.json", "config.json", "model.safetensors", "tokenizer.json"]  # of all that is ever delivered
FileSize = Annotated[int, Field(ge=1, le=2**40)]
RequestId = Annotated[str, Field(pattern=r"^[a-z0-9_/.-]{1,200}$")]
LedgerId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # made with the ledger
SignatureHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
PARTITIONS: tuple[Partition, ...] = ("tuning", "heldout")
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]
AnyArray = npt.NDArray[Any]  # of the types in ARRAY_TYPES only
ARRAY_TYPES = ("float32", "uint8", "uint64")
RAW = "urna.raw"  # how arrays travel in Flower records: their bytes, little-endian, in C order


class Message(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2


class Member(Message):
    """A site in one campaign: its X25519 round key and declared size, signed by its identity.

    ``graph_commitment`` is the hash of a nonce that sparse graphs depend on; it is told when the members are fixed.
    """

    site: Name
    public_key: PublicKeyHex
    num_records: Annotated[int, Field(ge=1, le=10**12)]  # declared, public, may be rounded
    graph_commitment: Sha256 | Literal[""] = ""
    signature: SignatureHex

    @staticmethod
    def create(identity: Identity, campaign: str, public_key: str, num_records: int, graph_commitment: str = "") -> "Member":
        """Sign this site's round key, size and commitment for one campaign."""
        signature = identity.sign("member", _member_bytes(campaign, public_key, num_records, graph_commitment))
        return Member(
            site=identity.name,
            public_key=public_key,
            num_records=num_records,
            graph_commitment=graph_commitment,
            signature=signature.hex(),
        )

    def check(self, roster: Roster, campaign: str) -> None:
        """Check the signature against the pinned identity.

        Raises:
            SignatureError: no site of the roster (the operator is none), or the key, size or commitment was not signed by this
                site for this campaign.
        """
        if self.site not in roster.sites:
            raise SignatureError(f"expected a site of the roster, found {self.site!r}: ask for a new roster")
        data = _member_bytes(campaign, self.public_key, self.num_records, self.graph_commitment)
        verify(roster, self.site, "member", data, bytes.fromhex(self.signature))


class Head(Message):
    """The last entry of a site's ledger, signed by the site: whoever was shown it can tell an older copy of that ledger."""

    site: Name
    ledger: LedgerId
    seq: Annotated[int, Field(ge=0, lt=2**63)]
    link: Sha256
    signature: SignatureHex

    @staticmethod
    def create(identity: Identity, ledger: str, seq: int, link: str) -> "Head":
        """Sign this site's newest entry."""
        signature = identity.sign("ledger head", _head_bytes(identity.name, ledger, seq, link))
        return Head(site=identity.name, ledger=ledger, seq=seq, link=link, signature=signature.hex())

    def check(self, roster: Roster) -> None:
        """Check the signature against the pinned identity.

        Raises:
            SignatureError: no site of the roster, or another number or link than this site signed.
        """
        if self.site not in roster.sites:
            raise SignatureError(f"expected a ledger head of a site, found one of {self.site!r}: ask for a new roster")
        verify(
            roster,
            self.site,
            "ledger head",
            _head_bytes(self.site, self.ledger, self.seq, self.link),
            bytes.fromhex(self.signature),
        )


def _head_bytes(site: str, ledger: str, seq: int, link: str) -> bytes:
    return length_prefixed(site.encode(), ledger.encode(), str(seq).encode(), link.encode())


def _member_bytes(campaign: str, public_key: str, num_records: int, graph_commitment: str) -> bytes:
    return f"{campaign}/{public_key}/{num_records}/{graph_commitment}".encode()


class Request(Message):
    """What all requests share; ``request_id`` is spent once at every site."""

    campaign: Name
    plan_sha256: Sha256
    request_id: RequestId
    stage: Stage


class HelloRequest(Request):
    """Opens a campaign: the plan in full, and the hash of every candidate as the operator built it."""

    kind: Literal["hello"] = "hello"
    stage: Literal["hello"] = "hello"
    plan_json: Annotated[str, Field(max_length=1_000_000)]
    models: dict[Name, Sha256]
    graph_commitment: Sha256  # of the nonce that sparse graphs will depend on, fixed before any site shows its key


class WeightsRequest(Request):
    """A piece of a candidate's file, in array ``part`` (n,) uint8, for a site that said in its hello that it lacks it.

    The pieces of a file come in order, and the file that names the others' hashes comes first. Costs nothing of the budget.
    """

    kind: Literal["weights"] = "weights"
    stage: Literal["hello"] = "hello"
    candidate: Name
    file: FileName
    sha256: Sha256  # of the whole file
    size: FileSize
    offset: Annotated[int, Field(ge=0, lt=2**40)]


class SetupRequest(Request):
    """Fixes the members of a campaign with a sparse graph: asks for the nonces that they committed to."""

    kind: Literal["setup"] = "setup"
    stage: Literal["hello"] = "hello"
    cohort: Annotated[tuple[Member, ...], Field(max_length=10_000)]


class AnswerOfSite(Message):
    """What one holder signed about a round: the alive list that it answered for (its digest), or that it answered none."""

    alive_sha256: Sha256 | Literal[""]
    signature: SignatureHex


class Audit(Message):
    """What became of an earlier round, with what the holders signed: everyone sees that all were shown one alive list.

    An opened round lists its ``alive`` and at least the threshold of answers for it. A round that was given up lists nobody,
    and what the holders said when they burnt it.
    """

    round_id: RequestId
    alive: Annotated[tuple[Name, ...], Field(max_length=10_000)]
    answers: Annotated[dict[Name, AnswerOfSite], Field(max_length=255)]


class Summed(Request):
    """A request whose reply is one masked vector of a secure sum.

    With ``federation.secure_sum = false`` the vector comes as it is, private by its own noise.
    """

    cohort: tuple[Member, ...]
    noise_multiplier: PositiveFinite  # of the whole sum
    step_exp: Annotated[int, Field(ge=-60, le=30)]
    ring_bits: Literal[16, 24, 32] = 32
    planned_count: Annotated[int, Field(ge=1, le=100_000)] = 1  # releases of this kind that the stage will ask for
    graph_nonce: Sha256  # opens the commitment of the hello
    graph_nonces: Annotated[dict[Name, Sha256], Field(max_length=10_000)] = {}  # where the graph is sparse: the members'
    audits: Annotated[tuple[Audit, ...], Field(max_length=1_000)] = ()  # of rounds that a member of the cohort answered


class BallotRequest(Summed):
    """Asks for a site's votes over ``candidates``, in this order."""

    kind: Literal["ballot"] = "ballot"
    stage: Literal["ballot"] = "ballot"
    candidates: Annotated[tuple[Name, ...], Field(min_length=2, max_length=64)]


class TrainRequest(Summed):
    """Asks for one round of DP training of ``candidate``; array ``vector`` (p,) float32 is what is trained, as an offset."""

    kind: Literal["train"] = "train"
    stage: Literal["runoff", "final"]
    candidate: Name
    index: Annotated[int, Field(ge=1, le=10_000)] = 1  # of the candidate's rounds, for the schedule of the sites' learning rate


class EvaluateRequest(Summed):
    """Asks for noisy held-out counts; array ``vector-i`` (p_i,) float32 is the head of candidate i.

    ``detail`` adds the confusion matrix of the (then only) candidate.
    """

    kind: Literal["evaluate"] = "evaluate"
    stage: Literal["evaluation"] = "evaluation"
    candidates: Annotated[tuple[Name, ...], Field(min_length=1, max_length=3)]
    detail: bool


class UnmaskRequest(Request):
    """The second exchange of a round: asks for what opens the sum of the sites in ``alive``."""

    kind: Literal["unmask"] = "unmask"
    round_id: RequestId
    alive: Annotated[tuple[Name, ...], Field(max_length=10_000)]  # sorted


class AbortRequest(Request):
    """Gives a round up after its unmask was asked and too few answered: no site will ever answer it from then on."""

    kind: Literal["abort"] = "abort"
    round_id: RequestId


class CloseRequest(Request):
    """Ends a campaign: asks for what the ledger says it cost."""

    kind: Literal["close"] = "close"
    stage: Literal["close"] = "close"
    audits: Annotated[tuple[Audit, ...], Field(max_length=1_000)] = ()  # of rounds that were not shown to every member yet


class Reply(Message):
    """What all replies share: the hash of the request's body that they answer."""

    request_sha256: Sha256


class HelloReply(Reply):
    """What a site may say publicly."""

    kind: Literal["hello"] = "hello"
    urna_version: Annotated[str, Field(max_length=50)]
    member: Member
    lacks: Annotated[tuple[Name, ...], Field(max_length=64)] = ()  # of the plan's candidates; its policy lets them be sent


class Pending(Reply):
    """A person at this site must approve the campaign first: nothing is decided, and the same hello may be asked again."""

    kind: Literal["pending"] = "pending"


class WeightsReply(Reply):
    """How much of the file this site holds now, from its beginning on; ``complete``: the whole candidate is installed."""

    kind: Literal["weights"] = "weights"
    received: Annotated[int, Field(ge=0, le=2**40)]
    complete: bool


class SetupReply(Reply):
    """The nonce that this site had committed to."""

    kind: Literal["setup"] = "setup"
    graph_nonce: Sha256


class Masked(Reply):
    """An upload of `secure_sum`: arrays ``segment-000000`` ... and ``shares``, ``checks`` (uint8), ``scalars`` (uint64).

    Without a secure sum: only segments, and nothing masks them.
    """

    kind: Literal["masked"] = "masked"


class Unmasked(Reply):
    """Pads of single shares, in array ``pads`` (items, 32) uint8, and the alive list signed for the next `Audit`."""

    kind: Literal["unmasked"] = "unmasked"
    answer: AnswerOfSite


class Burnt(Reply):
    """A round that this site will never unmask from now on, and the alive list that it had answered, if any, signed."""

    kind: Literal["burnt"] = "burnt"
    answer: AnswerOfSite


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


AnyRequest = (
    HelloRequest
    | WeightsRequest
    | SetupRequest
    | BallotRequest
    | TrainRequest
    | EvaluateRequest
    | UnmaskRequest
    | AbortRequest
    | CloseRequest
)
AnyReply = HelloReply | WeightsReply | Pending | SetupReply | Masked | Unmasked | Burnt | Statement | Refusal | Failure
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
        """One byte string (safetensors): what is stored, and what is sealed."""
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
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"expected a stored envelope, found other bytes: {type(error).__name__}") from None


def signed(identity: Identity, message: Message, arrays: Mapping[str, AnyArray] | None = None) -> Envelope:
    """Sign a message with its arrays (float32, uint8 or uint64)."""
    body = message.model_dump_json().encode()
    kept = dict(arrays or {})
    return Envelope(identity.name, body, identity.sign("message", _signed_bytes(body, kept)), kept)


def open_request(envelope: Envelope, roster: Roster, operator: str) -> AnyRequest:
    """Check the operator's signature, then read the request.

    Raises:
        ProtocolError: not signed by ``operator``, too large, or not a request of this version.
    """
    check_envelope(envelope, roster, operator)
    return read_request(envelope.body)


def open_reply(envelope: Envelope, roster: Roster, site: str, request: Envelope) -> AnyReply:
    """Check ``site``'s signature and that this answers ``request``, then read the reply.

    Raises:
        ProtocolError: not signed by that site, an answer to something else, or not a reply of this version.
    """
    check_envelope(envelope, roster, site)
    try:
        reply = _REPLY.validate_json(envelope.body)
    except ValidationError as error:
        raise ProtocolError(f"expected a reply of version 2 from {site}, found {summary_of(error)}") from None
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
        raise ProtocolError(f"expected a request of version 2, found {summary_of(error)}") from None


def check_envelope(envelope: Envelope, roster: Roster, sender: str) -> None:
    """Check who signed.

    Raises:
        ProtocolError: not signed by ``sender``, too large, or with arrays of other types.
    """
    if len(envelope.body) > BODY_LIMIT_BYTES or len(envelope.arrays) > ARRAYS_LIMIT:
        raise ProtocolError(f"expected a body of at most {BODY_LIMIT_BYTES} bytes, found {len(envelope.body)}")
    for name, array in envelope.arrays.items():
        if str(array.dtype) not in ARRAY_TYPES:
            raise ProtocolError(f"expected arrays of {' or '.join(ARRAY_TYPES)}, found {array.dtype} in {name[:80]!r}")
    if envelope.sender != sender:
        raise ProtocolError(f"expected a message of {sender}, found one of {envelope.sender[:80]!r}")
    verify(roster, sender, "message", _signed_bytes(envelope.body, envelope.arrays), envelope.signature)


def _signed_bytes(body: bytes, arrays: Mapping[str, AnyArray]) -> bytes:
    """The body and, for each array, name, type, shape and hash of its bytes; as JSON, so that no name can pose as two."""
    lines = [
        [name, str(array.dtype), list(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()]
        for name, array in sorted(arrays.items())
    ]
    return len(body).to_bytes(8, "big") + body + json.dumps(lines).encode()


def summary_of(error: ValidationError) -> str:
    """Where a foreign message is wrong, without its content; keys that nobody would name a field are left out, too."""
    return "; ".join(f"{'.'.join(map(_named, item['loc'])) or 'body'}: {item['type']}" for item in error.errors()[:3])


def _named(part: int | str) -> str:
    text = str(part)
    return text if text.isascii() and text.isprintable() and 0 < len(text) <= 80 else "..."


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
