"""A Flower Grid whose replies are one: the weighted mean of all sites, opened by a secure sum (`mean_rounds`).

Covered:
    * nothing goes out and nothing comes back but requests of a secure sum and their answers;
    * only nodes of sites of the roster are offered to a strategy's sampling, and never fewer than the minimum.
Not covered:
    * a lost round: the strategy gets no reply, keeps its arrays and goes on, as Flower's do;
    * messages that differ by node, or of other types than train and evaluate: refused.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from urna.privacy.weighted_mean import Opened, Ranges, Tensors, check_types
from urna.protocol.averaging import content_sha256, with_header
from urna.protocol.errors import ProtocolError, RoundError
from urna.protocol.identity import Identity, Roster
from urna.protocol.messages import Envelope, from_record
from urna.strategies.grid import exchange
from urna.strategies.mean_rounds import Ask, Batch, MeanRounds, Terms

LATE_GREETING_SECONDS = 10.0
WAIT_SECONDS = 0.2  # between two looks for nodes
log = logging.getLogger(__name__)


class SecureGrid(Grid):
    """Wraps the Grid that Flower gives a ServerApp.

    Args:
        grid: Flower's.
        identity: the operator's.
        roster: pinned keys of operator and sites.
        terms: public numbers.
        greeting: Flower's message type of greetings; one that the sites' app answers.
    """

    def __init__(self, grid: Grid, identity: Identity, roster: Roster, terms: Terms, greeting: str = "train") -> None:
        self._grid = grid
        self._terms = terms
        self._greeting = greeting
        self._rounds = MeanRounds(grid.run.run_id, identity, roster, terms, self._sender(RecordDict()))
        self._ranges: dict[tuple[tuple[str, int], ...], Ranges] = {}  # by names and sizes of the tensors

    def set_run(self, run: Run) -> None:
        """See Flower."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """See Flower."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See Flower."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: ARG002 - Flower's signature
        """Refused: the sites would not answer.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("under a secure sum there are no single replies: use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: ARG002 - Flower's signature
        """Refused: there is nothing to pull.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("under a secure sum there are no single replies: use send_and_receive")

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of sites of the roster that take part; waits until there are enough of them.

        Raises:
            RoundError: there were not enough in time.
        """
        deadline = time.monotonic() + self._terms.setup_timeout_seconds
        while True:
            present = list(self._grid.get_node_ids())
            left = max(0.0, deadline - time.monotonic())
            enough = len(self._rounds.members) >= self._terms.min_sites  # then nobody is waited for long
            self._rounds.greet(present, self._greeting, min(left, LATE_GREETING_SECONDS) if enough else left)
            members = [node for node in present if node in self._rounds.members]
            if len(members) >= self._terms.min_sites:
                return members
            if time.monotonic() >= deadline:
                doubts = "; ".join(sorted(set(self._rounds.doubts.values()))[:3])
                raise RoundError(
                    f"expected at least {self._terms.min_sites} sites of the roster within "
                    f"{self._terms.setup_timeout_seconds:g} s, found {len(members)} at {len(present)} nodes"
                    f"{f' ({doubts})' if doubts else ''}: is secure_sum_mod in their ClientApp, and has each its folder?"
                )
            time.sleep(WAIT_SECONDS)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send a batch to its nodes; one reply holds the weighted mean of theirs, or there is none: the round is lost.

        Raises:
            ValueError: the messages differ, or are not of training or evaluation.
            RoundError: they are to fewer sites than a sum is opened over.
        """
        sent = list(messages)
        if not sent:
            return []
        record, message_type, content = _common(sent)
        nodes = tuple(one.metadata.dst_node_id for one in sent if one.metadata.dst_node_id in self._rounds.members)
        if len(nodes) < self._terms.min_sites:
            raise RoundError(
                f"expected a batch to at least {self._terms.min_sites} sites, found {len(nodes)}: raise the strategy's "
                "min_train_nodes and min_evaluate_nodes"
            )
        before = _tensors(record) if message_type.startswith("train") else {}
        ranges = self._ranges_of(before)
        batch = Batch(nodes, message_type, content, before, ranges.now, self._sender(record))
        found = self._rounds.round(batch, sent[0].metadata.ttl if timeout is None else timeout)
        if found is None:
            return []
        ranges.learn(found.largest, found.num_clamped)
        if found.num_clamped:
            log.warning("%d values were beyond their range and clamped: the next round's are wider", found.num_clamped)
        return [Message(_content(found, record, self._terms.weight_key), reply_to=sent[0])]

    def _ranges_of(self, before: Tensors) -> Ranges:
        terms = self._terms
        largest = [terms.max_abs if one.dtype.kind == "f" else terms.max_abs_integers for one in before.values()]
        fresh = Ranges(tuple(terms.max_weight * one for one in largest), terms.ring_bits)
        return self._ranges.setdefault(tuple((name, one.size) for name, one in before.items()), fresh)

    def _sender(self, record: RecordDict) -> Ask:
        """Sends requests with these records beside them; what was lost on the way is logged."""

        def ask(nodes: Sequence[int], message_type: str, envelope: Envelope, seconds: float) -> Iterator[tuple[int, Envelope]]:
            content = with_header(record, envelope)
            ttl = max(1.0, seconds)
            messages = (Message(content, dst_node_id=node, message_type=message_type, ttl=ttl) for node in nodes)
            for node, reply in exchange(self._grid, messages, seconds):
                if reply is None:
                    log.warning("a message to node %s could not be sent", node)
                elif reply.has_error():
                    log.warning("node %s answered with error %s: %s", node, reply.error.code, reply.error.reason)
                else:
                    try:
                        yield node, from_record(reply.content)
                    except ProtocolError as error:
                        log.warning("node %s is not believed: %s", node, error)

        return ask


def _common(sent: Sequence[Message]) -> tuple[RecordDict, str, str]:
    """The records and the type that all messages of a batch share, and the records' hash.

    Raises:
        ValueError: they differ: what would the mean be relative to?
    """
    hashes = {content_sha256(one) for one in {id(message.content): message.content for message in sent}.values()}
    types = {message.metadata.message_type for message in sent}
    if len(hashes) != 1 or len(types) != 1:
        raise ValueError("expected the same records for all nodes, found different ones: a mean has one starting point")
    if len({message.metadata.dst_node_id for message in sent}) != len(sent):
        raise ValueError("expected one message for each node, found two for one")
    (message_type,), (content,) = types, hashes
    if not message_type.startswith(("train", "evaluate")):
        raise ValueError(f"expected messages of training or evaluation, found {message_type!r}: nothing else is averaged")
    return sent[0].content, message_type, content


def _tensors(record: RecordDict) -> Tensors:
    records = list(record.array_records.values())
    if len(records) != 1:
        raise ValueError(f"expected one array record to train on, found {len(records)}")
    tensors = {name: array.numpy() for name, array in records[0].items()}
    check_types(tensors)
    return tensors


def _content(found: Opened, record: RecordDict, weight_key: str) -> RecordDict:
    """The one reply's records, as Flower's strategies expect them."""
    metrics = MetricRecord({weight_key: found.total_weight, **found.metrics})
    if not found.tensors:
        return RecordDict({"metrics": metrics})
    (name,) = record.array_records
    return RecordDict({name: ArrayRecord({key: Array(one) for key, one in found.tensors.items()}), "metrics": metrics})
