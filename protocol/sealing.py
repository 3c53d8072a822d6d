"""What the relay carries: a parcel, readable by its receivers only, and by nobody between.

    content   one `Envelope` under AES-256-GCM, with a random key that is used once; the same bytes for all receivers
    headers   one for each receiver, by key id: HPKE (RFC 9180, base mode) of the content's key and hash, who sends it to whom,
              the parcel that it answers, and a ledger head; signed by the sender

The head in a request is the newest that this receiver had shown the operator; the head in a reply is the sender's own.

Covered:
    * the relay reads no body, no array and no name; headers have one size, whatever is in them;
    * headers and contents of different parcels do not mix; what was sealed to one member is no parcel to another, even if the
      first one hands it on; a reply names the parcel that it answers, so an old one, and its head, cannot be repeated;
    * whatever is wrong with a foreign parcel ends in a `ProtocolError` that repeats nothing of it; sizes are checked first.
Not covered:
    * sizes, times, and which node talks to which are visible: contents are not padded;
    * forward secrecy: who steals an identity file opens the parcels that were recorded for it;
    * a parcel that is held back, or a request that is delivered twice: requests are idempotent, replies are waited for once.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from pydantic import ValidationError

from urna.protocol.errors import ProtocolError
from urna.protocol.identity import Identity, PublicKeyHex, Roster, length_prefixed, verify
from urna.protocol.messages import BODY_LIMIT_BYTES, RAW, Envelope, Head, Message, Sha256, SignatureHex, summary_of
from urna.protocol.plan import Name

if TYPE_CHECKING:
    from flwr.app import RecordDict

CONTENT_LIMIT_BYTES = 2**31 - 1  # what one call of AES-GCM takes
HEADERS_LIMIT = 10_001  # the largest roster and the operator
HEADER_BYTES = 1024  # of 949 at most and 48 of HPKE; the plain text is filled up with spaces
SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
INFO = b"urna/1 parcel"
NONCE = bytes(12)  # a content key is used once
TAG_BYTES, OVERHEAD_BYTES = 16, 48  # of AES-GCM; of HPKE: an X25519 key and a tag

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Parcel:
    """All that the relay sees: ``content`` (n,) uint8, and a header by the key id of each receiver."""

    headers: Mapping[str, bytes]
    content: Bytes

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, hex."""
        return hashlib.sha256(np.ascontiguousarray(self.content).data).hexdigest()

    def only_for(self, roster: Roster, receiver: str) -> "Parcel":
        """The same content with the header of one receiver."""
        key = key_id(roster.sealing_key_of(receiver))
        return Parcel({key: self.headers[key]}, self.content)


class Header(Message):
    """What a receiver finds under its key id."""

    kind: Literal["parcel"] = "parcel"
    sender: Name
    receiver: Name
    content_key: PublicKeyHex  # not public: 32 bytes, hex
    content_sha256: Sha256
    answers: Sha256 | Literal[""]  # the content's hash of the parcel that this one answers; "" in a request
    head: Head | None
    signature: SignatureHex


def key_id(key: X25519PublicKey) -> str:
    """What a header is found by: 16 hex digits that tell the relay no name."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def seal(identity: Identity, roster: Roster, envelope: Envelope, heads: Mapping[str, Head | None], answers: str = "") -> Parcel:
    """Encrypt an envelope once, for all receivers that ``heads`` names.

    Args:
        identity: of the sender.
        roster: holds the receivers' keys.
        envelope: what only they may read.
        heads: by receiver, the ledger head that it shall see.
        answers: the content's hash of the parcel that this one answers.

    Raises:
        SignatureError: a receiver is not in the roster.
        ProtocolError: the envelope is too large to be sent.
    """
    plain = envelope.to_bytes()
    if len(plain) + TAG_BYTES > CONTENT_LIMIT_BYTES:
        raise ProtocolError(f"expected a message of at most {CONTENT_LIMIT_BYTES} bytes, found {len(plain)}")
    key = AESGCM.generate_key(256)
    content = np.empty(len(plain) + TAG_BYTES, np.uint8)
    AESGCM(key).encrypt_into(NONCE, plain, INFO, content.data)
    del plain
    headers: dict[str, bytes] = {}
    parcel = Parcel(headers, content)  # the hash of its content is computed once for all headers
    for receiver, head in heads.items():
        data = _signed_bytes(receiver, key.hex(), parcel.sha256, answers, head)
        header = Header(
            sender=identity.name,
            receiver=receiver,
            content_key=key.hex(),
            content_sha256=parcel.sha256,
            answers=answers,
            head=head,
            signature=identity.sign("parcel", data).hex(),
        )
        public = roster.sealing_key_of(receiver)
        padded = header.model_dump_json().encode().ljust(HEADER_BYTES - OVERHEAD_BYTES)
        headers[key_id(public)] = SUITE.encrypt(padded, public, INFO)
    return parcel


def unseal(
    identity: Identity, roster: Roster, parcel: Parcel, sender: str | None = None, answers: str = ""
) -> tuple[Envelope, Head | None]:
    """Open a parcel.

    Args:
        identity: of the receiver.
        roster: holds the sender's key.
        parcel: as the relay delivered it.
        sender: who must have sent it; None: any member, the envelope says which.
        answers: the content's hash of the parcel that it must answer; "" where a request is expected.

    Returns:
        The envelope, whose sender is the parcel's, and the head that travelled with it. Neither's own signature is checked yet.

    Raises:
        ProtocolError: too large, not sealed to this receiver, altered, or not an answer to that parcel.
        SignatureError: not signed by ``sender``, or by nobody of the roster.
    """
    header = _open_header(identity, roster, parcel, sender, answers)
    if header.content_sha256 != parcel.sha256:
        raise ProtocolError("expected the content that the header was signed for, found another")
    try:
        plain = AESGCM(bytes.fromhex(header.content_key)).decrypt(NONCE, np.ascontiguousarray(parcel.content).data, INFO)
    except InvalidTag:
        raise ProtocolError("expected a content that its header's key opens, found another") from None
    if int.from_bytes(plain[:8], "little") > 3 * BODY_LIMIT_BYTES:  # before it is parsed; a body's quotes are escaped in it
        raise ProtocolError(f"expected a body of at most {BODY_LIMIT_BYTES} bytes, found more")
    envelope = Envelope.from_bytes(plain)
    if envelope.sender != header.sender:
        raise ProtocolError(f"expected a message of {header.sender} in its own parcel, found another's")
    return envelope, header.head


def _open_header(identity: Identity, roster: Roster, parcel: Parcel, sender: str | None, answers: str) -> Header:
    """This receiver's header, decrypted and checked."""
    content = parcel.content
    if content.dtype != np.uint8 or content.ndim != 1 or not TAG_BYTES <= content.size <= CONTENT_LIMIT_BYTES:
        raise ProtocolError(f"expected a content of {TAG_BYTES} to {CONTENT_LIMIT_BYTES} bytes, found {content.nbytes}")
    sealed = parcel.headers.get(key_id(identity.sealing_key.public_key()))
    if sealed is None or len(sealed) != HEADER_BYTES or len(parcel.headers) > HEADERS_LIMIT:
        found = "none" if sealed is None else f"one of {len(sealed)} among {len(parcel.headers)}"
        raise ProtocolError(f"expected a header of {HEADER_BYTES} bytes for {identity.name}, found {found}")
    try:
        plain = SUITE.decrypt(sealed, identity.sealing_key, INFO)
    except (InvalidTag, ValueError):
        raise ProtocolError(f"expected a header sealed to {identity.name}, found one that its key does not open") from None
    try:
        header = Header.model_validate_json(plain)
    except ValidationError as error:
        raise ProtocolError(f"expected a parcel's header of version 2, found {summary_of(error)}") from None
    if header.receiver != identity.name:
        raise ProtocolError(f"expected a parcel for {identity.name}, found one for another member")
    if sender is not None and header.sender != sender:
        raise ProtocolError(f"expected a parcel of {sender}, found one of {header.sender}")
    data = _signed_bytes(header.receiver, header.content_key, header.content_sha256, header.answers, header.head)
    verify(roster, header.sender, "parcel", data, bytes.fromhex(header.signature))
    if header.answers != answers:
        raise ProtocolError(f"expected {'an answer to this request' if answers else 'a request'}, found another parcel")
    return header


def _signed_bytes(receiver: str, content_key: str, content_sha256: str, answers: str, head: Head | None) -> bytes:
    shown = head.model_dump_json() if head is not None else ""
    return length_prefixed(*(part.encode() for part in (receiver, content_key, content_sha256, answers, shown)))


def to_record(parcel: Parcel) -> "RecordDict":
    """As Flower carries it; the content is an object of its own, which Flower stores once for all receivers."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    content = Array("uint8", parcel.content.shape, RAW, parcel.content.tobytes())
    return RecordDict({"parcel": ConfigRecord(dict(parcel.headers)), "content": ArrayRecord({"content": content})})


def from_record(record: "RecordDict") -> Parcel:
    """The inverse of `to_record`; nothing is copied.

    Raises:
        ProtocolError: not a parcel.
    """
    try:
        headers, arrays = record.config_records["parcel"], record.array_records["content"]
        array = arrays["content"]
        found = {key: value for key, value in headers.items() if isinstance(value, bytes)}
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"expected an Urna message, found another: {type(error).__name__}") from None
    described = (array.dtype, tuple(array.shape), array.stype)
    if len(found) != len(headers) or len(arrays) != 1 or described != ("uint8", (len(array.data),), RAW):
        raise ProtocolError("expected an Urna message, found fields of other types")
    return Parcel(found, np.frombuffer(array.data, np.uint8))
