"""A real SuperNode in this process: Flower's Runtime API over HTTP and its two steps of the loop; only the SuperLink is played.

with supernode() as node:
    node.deliver(record)           as from the SuperLink
    ...                            a runner answers over HTTP
    node.collect()                 as to the SuperLink
"""

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message, _push_messages

from tests.e2e.superlink import free_ports

SECRET = b"a secret that the runner and its SuperNode share"
RUN, NODE, SERVER, WAIT_SECONDS = 11, 7, 1, 20.0


def a_bundle(extra: str = "") -> bytes:
    """A bundle as Flower packs it; with ``extra`` another one."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(
            "pyproject.toml",
            '[project]\nname = "x"\nversion = "1"\n[tool.flwr.app]\npublisher = "p"\n'
            f'[tool.flwr.app.components]\nserverapp = "x:a"\nclientapp = "x:a"\n[tool.flwr.app.config]\nextra = "{extra}"\n',
        )
    return packed.getvalue()


@dataclass
class FakeSuperLink:
    """What the SuperNode would get from the SuperLink, and what it sends there."""

    bundle: bytes = field(default_factory=a_bundle)
    declared_sha256: str = ""  # none: the right one
    task_type: str = ""
    messages: list[Message] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    lost: bool = False  # whether the objects of a message cannot be fetched
    replies: list[Message] = field(default_factory=list)

    def receive(self) -> tuple[Message, ObjectTree] | None:
        if not self.messages:
            return None
        message = self.messages.pop(0)
        self.objects |= {key: one.deflate() for key, one in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return remove_content_from_message(message), tree

    def run(self, run_id: int) -> Run:
        run = Run.create_empty(run_id)
        run.fab_hash = self.declared_sha256 or hashlib.sha256(self.bundle).hexdigest()
        run.primary_task_type = self.task_type or run.primary_task_type
        return run

    def fab(self, hash_str: str, run_id: int) -> Fab:  # noqa: ARG002 - Flower's signature
        return Fab("", self.bundle, {})

    def object(self, run_id: int, object_id: str) -> bytes:  # noqa: ARG002 - Flower's signature
        if self.lost:
            raise RuntimeError("the SuperLink went away")
        return self.objects[object_id]

    def send(self, message: Message, tree: ObjectTree, seconds: float) -> tuple[set[str], str]:  # noqa: ARG002
        self.replies.append(message)
        self.reply_id = tree.object_id
        return {tree.object_id, *(child.object_id for child in _below(tree))}, "session"

    def store(self, run_id: int, session: str, object_id: str, content: bytes) -> None:  # noqa: ARG002
        self.objects[object_id] = content


def _below(tree: ObjectTree) -> Iterator[ObjectTree]:
    for child in tree.children:
        yield child
        yield from _below(child)


@dataclass
class SuperNode:
    """The SuperNode, and the SuperLink that is played."""

    port: int
    link: FakeSuperLink
    factory: NodeStateFactory
    store: ObjectStoreFactory

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def deliver(self, content: RecordDict, run_id: int = RUN, message_type: str = "query.hello") -> None:
        """Let the SuperNode fetch a message: it then has a task."""
        metadata = Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=SERVER,
            dst_node_id=NODE,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=600.0,
            message_type=message_type,
        )
        self.link.messages.append(make_message(metadata, content))
        _pull_and_store_message(
            state=self.factory.state(),
            object_store=self.store.store(),
            node_config={},
            receive=self.link.receive,
            get_run=self.link.run,
            get_fab=self.link.fab,
            pull_object=self.link.object,
            confirm_message_received=lambda run_id, object_id: None,  # noqa: ARG005
            trusted_entities=None,
        )

    def collect(self) -> Message:
        """The reply, as it arrives at the SuperLink: Flower's own step, which waits for it."""
        done = threading.Event()

        def push() -> None:
            _push_messages(self.factory.state(), self.store.store(), self.link.send, self.link.store)
            done.set()

        threading.Thread(target=push, daemon=True).start()
        assert done.wait(WAIT_SECONDS), "no reply came"
        sent = self.link.replies.pop()
        if sent.has_error():
            return sent
        message = inflate_object_from_contents(self.link.reply_id, dict(self.link.objects))
        assert isinstance(message, Message)
        return message

    def statuses(self) -> list[str]:
        """Of all tasks, as they were made."""
        return [task.status.sub_status or task.status.status for task in self.factory.state().get_tasks()]

    def num_objects(self) -> int:
        """Objects that the SuperNode still holds."""
        return len(self.store.store())


@contextmanager
def supernode(port: int | None = None) -> Iterator[SuperNode]:
    """Serve a Runtime API on loopback."""
    store = ObjectStoreFactory()
    factory = NodeStateFactory(objectstore_factory=store)
    factory.state().set_node_id(NODE)
    port = port or free_ports(1)[0]
    app = create_app(state_factory=factory, superexec_auth_secret=SECRET)
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + WAIT_SECONDS
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield SuperNode(port, FakeSuperLink(), factory, store)
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
