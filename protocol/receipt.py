"""A receipt: all that one campaign took from one site, as that site's ledger has it, signed by the site for anyone to keep.

It is a JSON file, ``{"receipt": {...}, "signature": "<hex>"}``. Signed is the compact JSON of what stands under ``receipt``:
its keys in this order, no spaces between. Space between the parts of the file is free; nothing else is.

Covered:
    * an altered file, in any byte that says something; a receipt of another key, or in another site's name;
    * a file that says one thing to a program and another to a person: keys given twice, numbers written as text.
Not covered:
    * whether its numbers fit together and to the plan: `server.receipt_check` computes them again;
    * whether it is true: a site can always lie about itself, but not later deny what it signed.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from urna.protocol.errors import BadInputError, SignatureError
from urna.protocol.identity import Identity, IdentityKeyHex, Roster, verify
from urna.protocol.messages import NotNegative, Partition, RequestId, Sha256, SignatureHex, Stage, Text
from urna.protocol.plan import PLAN_LIMIT_BYTES, Name, explain

PURPOSE = "receipt"
FILE_LIMIT_BYTES = 64_000_000  # refused before it is parsed
SECONDS = "%Y-%m-%dT%H:%M:%SZ"
Moment = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]  # UTC, by the site's clock
State = Literal["open", "closed", "denied"]


class Part(BaseModel):
    """Of a receipt; what is written must be of its type already, or it would say two things."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Left(Part):
    """One release: what a reply was charged for. An empty ``reply_sha256``: reserved and charged, but never sent."""

    request_id: RequestId
    request_sha256: Sha256
    stage: Stage
    partition: Partition
    event: Text  # JSON of a dp_accounting event
    count: Annotated[int, Field(ge=1, le=10**12)]  # how often it counts
    reserved_at: Moment
    reply_sha256: Sha256 | Literal[""]  # of the exact bytes that were kept, and then sent


class Receipt(Part):
    """What ran, what left and what it cost; never who decided, nor anything of a record."""

    format: Annotated[int, Field(ge=1, le=1)] = 1  # a Literal would take ``true`` for it
    site: Name
    site_key: IdentityKeyHex
    operator_key: IdentityKeyHex
    campaign: Name
    plan_sha256: Sha256
    plan_json: Annotated[str, Field(max_length=PLAN_LIMIT_BYTES)]  # what ``plan_sha256`` is the hash of, to the byte
    models: Annotated[dict[Name, Sha256], Field(max_length=64)]
    urna_version: Annotated[str, Field(pattern=r"^[0-9A-Za-z.+_-]{1,50}$")]
    joined_at: Moment
    written_at: Moment
    state: State
    approved_by_a_person: bool
    bundles_seen: Annotated[tuple[Sha256, ...], Field(max_length=10_000)]  # app bundles, of any run; none was ever run here
    left: Annotated[tuple[Left, ...], Field(max_length=100_000)]
    epsilon_by_stage: dict[Stage, NotNegative]
    epsilon: NotNegative  # of the campaign: the larger of the two partitions, which compose in parallel
    delta: Annotated[float, Field(gt=0, lt=1)]
    ledger_seq: Annotated[int, Field(ge=1, lt=2**63)]  # the ledger's last entry when this was written
    ledger_link: Sha256


class SignedReceipt(Part):
    """A receipt with its site's signature: what is in the file."""

    receipt: Receipt
    signature: SignatureHex

    def check(self, roster: Roster) -> None:
        """Check the signature against the pinned identity.

        Raises:
            SignatureError: no site of the roster, another key than the pinned one, or not what this site signed.
        """
        receipt = self.receipt
        if receipt.site not in roster.sites:  # the operator signs no receipts
            raise SignatureError(f"expected a receipt of a site of the roster, found one of {receipt.site!r}")
        if receipt.site_key != roster.sites[receipt.site]:
            raise SignatureError(f"expected the key that is pinned to {receipt.site}, found another in the receipt")
        verify(roster, receipt.site, PURPOSE, _signed_bytes(receipt), bytes.fromhex(self.signature))

    def to_text(self) -> str:
        """The file."""
        return f"{self.model_dump_json(indent=2)}\n"


def sign_receipt(identity: Identity, receipt: Receipt) -> SignedReceipt:
    """Sign for this site.

    Raises:
        RuntimeError: the receipt names another site or key.
    """
    if (identity.name, identity.public_key_hex) != (receipt.site, receipt.site_key):
        raise RuntimeError(f"{identity.name} signs its own receipts, found one of {receipt.site}")
    return SignedReceipt(receipt=receipt, signature=identity.sign(PURPOSE, _signed_bytes(receipt)).hex())


def read_receipt(data: bytes) -> SignedReceipt:
    """Read a receipt's file; who signed it is not looked at yet (`SignedReceipt.check`).

    Raises:
        BadInputError: other bytes than a receipt's, or ones that may be read in two ways.
    """
    if len(data) > FILE_LIMIT_BYTES:
        raise BadInputError(f"expected a receipt of at most {FILE_LIMIT_BYTES} bytes, found more")
    try:
        found = SignedReceipt.model_validate_json(data)
        written = json.loads(data.decode("utf-8"), object_pairs_hook=_each_once)
    except ValidationError as error:
        why = explain(error, SignedReceipt)[:500]
        raise BadInputError(f"expected a receipt of format 1, found another file: {why}") from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"expected a receipt of format 1, found another file: {error}") from None
    if written != json.loads(found.model_dump_json()):
        raise BadInputError("expected a receipt as a site writes it, found the same in other words: ask for the original file")
    return found


def goes_on(newer: Receipt, older: Receipt) -> bool:
    """Whether ``newer`` says all that ``older`` says of the same campaign, and maybe more."""
    fixed = ("site", "site_key", "operator_key", "campaign", "plan_sha256", "plan_json", "models", "joined_at")
    return (
        all(getattr(newer, name) == getattr(older, name) for name in fixed)
        and newer.ledger_seq >= older.ledger_seq
        and (newer.ledger_seq > older.ledger_seq or newer.ledger_link == older.ledger_link)
        and not (newer.state == "open" and older.state == "closed")
        and set(older.bundles_seen) <= set(newer.bundles_seen)
        and _starts_with(newer.left, older.left)
    )


def moment(seconds: float) -> str:
    """A time (seconds since 1970) as receipts write it."""
    return datetime.fromtimestamp(seconds, UTC).strftime(SECONDS)


def plan_hash(plan_json: str) -> str:
    """What a plan's hash must be, whatever later versions would write of it."""
    return hashlib.sha256(plan_json.encode()).hexdigest()


def _starts_with(newer: Sequence[Left], older: Sequence[Left]) -> bool:
    """A reservation may have been settled since; nothing else of a release ever changes."""
    pairs = zip(newer, older, strict=False)
    return len(newer) >= len(older) and all(
        one == was or (not was.reply_sha256 and was.model_copy(update={"reply_sha256": one.reply_sha256}) == one)
        for one, was in pairs
    )


def _signed_bytes(receipt: Receipt) -> bytes:
    return receipt.model_dump_json().encode()


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
