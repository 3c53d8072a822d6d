"""What a ledger's rows say, as values."""

from dataclasses import dataclass
from typing import Literal

from urna.privacy.accounting import event_from_json
from urna.protocol.messages import Partition, Stage

MAX_COUNT = 10**9  # of a release: a thousand of them still are within `SpentRow.count`
# what an entry by itself says; of the other kinds it holds the hash of a row
Event = Literal["approve", "deny", "pause", "resume", "close", "bundle", "weights", "stop", "anchor"]
EVENTS: tuple[Event, ...] = ("approve", "deny", "pause", "resume", "close", "bundle", "weights", "stop", "anchor")


@dataclass(frozen=True)
class Release:
    """What a reservation says: ``count`` events of one kind, on one partition of one data set's records."""

    request_id: str
    request_sha256: str
    campaign: str
    stage: Stage
    partition: Partition
    event: str  # JSON, see `accounting`
    count: int = 1
    dataset: int = 0  # as `register` gave it; 0: of no registered one, which shares its budget with all

    def __post_init__(self) -> None:
        event_from_json(self.event)  # an event that cannot be accounted is refused before it is written
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"a release counts at least once, and at most {MAX_COUNT} times, found {self.count}")


@dataclass(frozen=True)
class Written:
    """A release as the ledger has it."""

    release: Release
    reserved_at: float  # seconds since 1970, by this machine's clock
    reply_sha256: str | None  # None: reserved, and never settled


@dataclass(frozen=True)
class CampaignRow:
    """What a site keeps of a campaign that it joined."""

    campaign: str
    request_sha256: str
    plan_json: str
    models: dict[str, str]
    round_key: bytes  # X25519 private key, 32 bytes
    reply: bytes
    graph_commitment: str = ""  # of the operator's nonce, hex
    site: str = ""  # public key of the node, of those that share this ledger, that joined
    dataset: int = 0


@dataclass(frozen=True)
class Waiting:
    """A campaign that a person at this site has yet to decide on."""

    campaign: str
    request_sha256: str
    plan_json: str


@dataclass(frozen=True)
class Noted:
    """An entry that says something by itself."""

    event: Event
    subject: str
    detail: dict[str, str]
    at: float  # seconds since 1970
