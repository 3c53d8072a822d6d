"""A consortium of sites with real mods and a Grid in memory; every message crosses as bytes and is kept in ``wire``.

one = MeanConsortium(tmp_path, app, count=5)
one.faults[2] = lambda request, reply: None     # drop, alter or raise, per node
SecureSum(FedAvg(), **one.keys).start(one, arrays)
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast
from uuid import uuid4

import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict, UserConfig
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from urna.client import secure_sum_mod
from urna.client.flower_mod import SITE_DIR_KEY
from urna.protocol.averaging import HEADER
from urna.protocol.identity import OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, create_consortium
from urna.protocol.messages import AnyArray, from_record

RUN_ID = 4242
Fault = Callable[[Message, Message], Message | None]  # (request, reply) -> what arrives
Metrics = dict[str, float | int]
Train = Callable[[int, dict[str, AnyArray]], tuple[dict[str, AnyArray], Metrics]]  # (site number, arrays)
Evaluate = Callable[[int, dict[str, AnyArray]], Metrics]


def app_of(train: Train, evaluate: Evaluate, *, mods: bool = True) -> ClientApp:
    """A Flower ClientApp as users write it; with the mod, or (to compare) without."""
    app = ClientApp(mods=[secure_sum_mod] if mods else [])

    @app.train()
    def trained(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        new, metrics = train(int(context.node_config["partition-id"]) + 1, arrays)
        record = ArrayRecord({name: Array(one) for name, one in new.items()})
        return Message(RecordDict({"arrays": record, "metrics": MetricRecord(dict(metrics))}), reply_to=message)

    @app.evaluate()
    def evaluated(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        metrics = evaluate(int(context.node_config["partition-id"]) + 1, arrays)
        return Message(RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)

    return app


def identify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets only a task of a run make messages."""
    for name, value in (("_task_id", 1), ("_run_id", RUN_ID), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


class Keys(TypedDict):
    """What `SecureSum` needs."""

    operator_key: Path
    roster: Path


def keys_in(folder: Path) -> Keys:
    """Of a consortium's folder."""
    return {"operator_key": folder / OPERATOR_KEY_FILE, "roster": folder / ROSTER_FILE}


@dataclass
class MeanConsortium(Grid):
    """Nodes 1 ... ``count``, each with the folder of its site; node n is site-n."""

    folder: Path
    app: ClientApp
    count: int = 3
    secure: bool = True
    faults: dict[int, Fault] = field(default_factory=dict)
    wire: list[tuple[int, str, list[bytes]]] = field(default_factory=list)  # (node, "request" or "reply", objects)
    contexts: dict[int, Context] = field(default_factory=dict)
    largest_backlog: int = 0

    def __post_init__(self) -> None:
        self._replies: dict[str, Message] = {}
        if self.secure:
            create_consortium(self.folder, [f"site-{number}" for number in range(1, self.count + 1)])
        for node in range(1, self.count + 1):
            config: UserConfig = {"partition-id": node - 1, SITE_DIR_KEY: str(self.site(node))}
            self.contexts[node] = Context(RUN_ID, node, config, RecordDict(), {})

    def site(self, node: int) -> Path:
        """The folder of a node's site."""
        return self.folder / SITES_DIR / f"site-{node}"

    @property
    def keys(self) -> Keys:
        """What `SecureSum` needs."""
        return keys_in(self.folder)

    def set_run(self, run: Run) -> None:
        """Not used."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            request = self._carried(message, node, "request")
            message_id = str(uuid4())
            request.metadata.__dict__["_message_id"] = message_id
            arrived: Message | None = self._carried(self.app(request, self.contexts[node]), node, "reply")
            if node in self.faults and arrived is not None:
                arrived = self.faults[node](message, arrived)
            if arrived is not None:
                self._replies[message_id] = arrived
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [self._replies.pop(one) for one in message_ids if one in self._replies]
        self.largest_backlog = max(self.largest_backlog, len(found))
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Plain Flower, to compare with."""
        assert timeout is None or timeout > 0
        return list(self.pull_messages(self.push_messages(messages)))

    def all_bytes(self, direction: str) -> bytes:
        """Everything that went one way."""
        return b"".join(b"".join(objects) for _, one, objects in self.wire if one == direction)

    def _carried(self, message: Message, node: int, direction: str) -> Message:
        """Through Flower's own serialisation."""
        if message.has_error():
            self.wire.append((node, direction, [str(message.error.reason).encode()]))
            return message
        objects = {key: one.deflate() for key, one in get_all_nested_objects(message.content).items()}
        self.wire.append((node, direction, list(objects.values())))
        content = inflate_object_from_contents(message.content.object_id, dict(objects))
        return make_message(message.metadata, cast(RecordDict, content))


def kind_of(request: Message) -> str:
    """Of a request of a secure sum."""
    return str(json.loads(cast(bytes, request.content.config_records[HEADER]["body"]))["kind"])


def code_of(reply: Message) -> str:
    """Of a failure, or the fixed reason of an error."""
    if reply.has_error():
        return str(reply.error.reason)
    return str(json.loads(from_record(reply.content).body).get("code", ""))
