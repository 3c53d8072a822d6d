"""What a server that takes a weighted mean and its sites say around a Flower app's own messages; all of it is signed.

    greet     run, and a nonce in the campaign's name   -> HelloReply: the site's round key
    average   who takes part, the mean's public numbers,
              the hash of the app's own records         -> Masked: weight * update, weight, metrics, as one secure sum
    unmask    who uploaded                              -> Unmasked: what opens the sum of these sites, and no other
    abort     a round that will not be opened           -> Burnt: it never will be

A request travels as one more record (`HEADER`) beside the records of the app's message; replies are those of `messages`. Both
sides compute the round's `Context` from the request (`context_of` of `privacy.weighted_mean`).

Covered:
    * a request binds Flower's run and message type and every byte of the app's records, so none can be used elsewhere;
    * the campaign's name is a hash of run and nonce, so two runs never share one.
Not covered:
    * above 33 sites operator and one member together can choose the sparse graph, by trying keys (Urna's own campaigns have a
      set-up exchange against that);
    * confidentiality of the app's own records: the global model and its settings travel as Flower sends them.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from urna.protocol.errors import ProtocolError
from urna.protocol.identity import OPERATOR, Roster
from urna.protocol.messages import (
    Audit,
    Envelope,
    Member,
    Message,
    PositiveFinite,
    RequestId,
    Sha256,
    check_envelope,
    summary_of,
)
from urna.protocol.plan import Name

if TYPE_CHECKING:
    from flwr.app import Array, RecordDict

HEADER = "urna.secure-sum"  # the record that carries a request
Key = Annotated[str, Field(min_length=1, max_length=200)]
Category = Literal["train", "evaluate"]
RingBits = Literal[16, 24, 32]


class Asked(Message):
    """What all requests share."""

    campaign: Name
    run_id: Annotated[int, Field(ge=0, lt=2**64)]  # Flower's
    message_type: Annotated[str, Field(pattern=r"^(train|evaluate)(\.\w+)?$", max_length=100)]  # Flower's


class GreetRequest(Asked):
    """Opens a run's campaign: asks for a round key."""

    kind: Literal["mean-greet"] = "mean-greet"


class AverageRequest(Asked):
    """Asks for a site's part of a weighted mean; with arrays when the message is of training, else of metrics alone.

    The site sends ``weight * (its arrays - the received ones)``, a tensor after the other, each on a grid for values up to
    its ``ranges`` entry; and as exact numbers its weight, how many values it clamped, and ``weight * metric`` for each metric.
    """

    kind: Literal["mean-average"] = "mean-average"
    round_id: RequestId
    nonce: Sha256  # opens the campaign's name
    cohort: Annotated[tuple[Member, ...], Field(min_length=2, max_length=10_000)]
    num_colluding: Annotated[int, Field(ge=0, le=100)]
    min_sites: Annotated[int, Field(ge=2, le=10_000)]
    ring_bits: RingBits
    weight_key: Key
    max_weight: Annotated[int, Field(ge=1, le=10**12)]
    metrics: Annotated[tuple[Key, ...], Field(max_length=1_000)]
    ranges: Annotated[tuple[PositiveFinite, ...], Field(max_length=100_000)]
    content_sha256: Sha256  # see `content_sha256`
    audits: Annotated[tuple[Audit, ...], Field(max_length=1_000)]

    @model_validator(mode="after")
    def _named_by_run_and_nonce(self) -> Self:
        if self.campaign != campaign_of(self.run_id, self.nonce) or not self.round_id.startswith(f"{self.campaign}/"):
            raise ValueError("the campaign is not named by this run and nonce, or the round is of another campaign")
        return self

    @property
    def category(self) -> Category:
        """Whether arrays are averaged beside the metrics."""
        return "train" if self.message_type.startswith("train") else "evaluate"


class MeanUnmaskRequest(Asked):
    """The second exchange of a round: asks for what opens the sum of the sites in ``alive``."""

    kind: Literal["mean-unmask"] = "mean-unmask"
    round_id: RequestId
    alive: Annotated[tuple[Name, ...], Field(max_length=10_000)]  # sorted


class MeanAbortRequest(Asked):
    """Gives a round up after its unmask was asked and too few answered."""

    kind: Literal["mean-abort"] = "mean-abort"
    round_id: RequestId


AnyAsked = GreetRequest | AverageRequest | MeanUnmaskRequest | MeanAbortRequest
_ASKED: TypeAdapter[AnyAsked] = TypeAdapter(Annotated[AnyAsked, Field(discriminator="kind")])


def campaign_of(run_id: int, nonce: str) -> str:
    """The name of a run's campaign; it fixes the nonce (32 bytes, hex) before any site has shown a key."""
    return "mean-" + hashlib.sha256(b"urna-mean/1" + json.dumps([run_id, nonce]).encode()).hexdigest()[:48]


def open_asked(envelope: Envelope, roster: Roster, run_id: int, message_type: str) -> AnyAsked:
    """Check the operator's signature and that this run and message type are meant, then read the request.

    Raises:
        ProtocolError: not signed by the operator, not a request of this version, or one for another run or message type.
    """
    check_envelope(envelope, roster, OPERATOR)
    try:
        request = _ASKED.validate_json(envelope.body)
    except ValidationError as error:
        raise ProtocolError(f"expected a request of a weighted mean, version 2, found {summary_of(error)}") from None
    if (request.run_id, request.message_type) != (run_id, message_type):
        found = f"run {request.run_id} and {request.message_type!r}"
        raise ProtocolError(f"expected a request for run {run_id} and {message_type!r}, found one for {found}")
    return request


def with_header(content: "RecordDict", envelope: Envelope) -> "RecordDict":
    """The app's records and a request beside them; the records themselves are shared, not copied.

    Raises:
        ValueError: the app uses the header's name itself.
    """
    from flwr.app import ConfigRecord, RecordDict

    if HEADER in content:
        raise ValueError(f"a record may not be called {HEADER!r}: rename it")
    header = ConfigRecord({"sender": envelope.sender, "body": envelope.body, "signature": envelope.signature})
    return RecordDict({**content, HEADER: header})


def without_header(content: "RecordDict") -> Envelope | None:
    """Take the request out of a message's content; None where there is none that could be one."""
    header = content.pop(HEADER, None)
    sender, body, signature = (header.get(name) if header else None for name in ("sender", "body", "signature"))
    if isinstance(sender, str) and isinstance(body, bytes) and isinstance(signature, bytes):
        return Envelope(sender, body, signature)
    return None


def content_sha256(content: "RecordDict") -> str:
    """Hash of all records of an app's message: names, types, order of arrays, and every byte, hex."""
    lines: list[object] = []
    for name, arrays in sorted(content.array_records.items()):
        lines.append([name, "arrays", [_array_line(key, array) for key, array in arrays.items()]])
    for name, config in sorted(content.config_records.items()):
        lines.append([name, "config", [[key, _value_line(value)] for key, value in sorted(config.items())]])
    for name, metrics in sorted(content.metric_records.items()):
        lines.append([name, "metrics", [[key, _value_line(value)] for key, value in sorted(metrics.items())]])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _array_line(key: str, array: "Array") -> list[object]:
    return [key, array.dtype, list(array.shape), array.stype, hashlib.sha256(array.data).hexdigest()]


def _value_line(value: object) -> list[object]:
    """A value with its type, so that 1, 1.0, true and "1" differ; bytes as their hash, lists item by item."""
    if isinstance(value, list):
        return ["list", [_value_line(one) for one in value]]
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    return [type(value).__name__, repr(value) if isinstance(value, float) else value]
