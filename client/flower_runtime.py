"""All of Flower's internals that a site uses: the SuperNode's Runtime API, and the two waits of the SuperNode's own loop.

Flower calls none of this stable. So it is one file, made for Flower 1.41, and `tests/client/test_flower_runtime.py` fails on
another Flower before a site does.

    runtime = Runtime("127.0.0.1:9094", secret)
    task = runtime.acquire()                      None: nothing to do
    with task.alive():                            heartbeats, however long it takes
        task.read_header()                        the message's addresses
        bundle = task.open_bundle()               its hash; the bytes are gone when this returns
        task.reply(answer(task.read_content()))   or task.refuse(code, reason)

The order is not Flower's: a SuperNode waits for the reply to a message for ever, unless a task that had *taken* the message
dies. So the message is taken before the task is begun, and whatever goes wrong later is answered by an error message.

    python -m urna.client.flower_runtime PARENT_PID ARGUMENTS     is `flower-supernode ARGUMENTS` with shorter waits

Covered:
    * a bundle is hashed, and never written, unzipped or imported; one that is too large is not read to its end;
    * a message that is too large, or malformed, costs its own answer and nothing else;
    * what a process on another machine could ask for: the Runtime API is reached on loopback, with the SuperExec secret.
Not covered:
    * the SuperNode, which reads bundles and messages as they come from the SuperLink, in a process of its own.
"""

import contextlib
import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from urna.protocol.errors import UrnaError

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

Answer = Callable[[RecordDict], RecordDict]
RAISED, INVALID_BUNDLE = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB  # what an error message may say

ACQUIRE, TASK_INPUT = "/flwr.proto.Runtime/AcquireTask", "/flwr.proto.Runtime/PullTaskInput"
BUNDLE_LIMIT_BYTES = 12 * 2**20  # Flower's own limit of a bundle is 10 MiB; the rest is what comes with it
MESSAGE_LIMIT_BYTES = 2**30  # of all objects of one message
CALL_SECONDS = 10.0  # of one call to a process on this machine
RETRY_SECONDS = (0.05, 0.2, 1.0)  # between attempts at a call that did not get through
HEARTBEAT_SECONDS = 10.0  # Flower gives a task up after 60 seconds without one, one that was not begun after 30
STORED_SECONDS = 10.0  # a SuperNode offers a task just before it stores the message
OBJECT_SECONDS = 600.0  # until a SuperNode has fetched one more object of a message from the SuperLink

IDLE_WAIT_SECONDS, REPLY_WAIT_SECONDS = 3, 0.5  # the two waits of Flower's loop, in flwr/supernode/start_client_internal.py
BUSY_IDLE_WAIT_SECONDS, BUSY_SECONDS, SHORTEST_WAIT_SECONDS = 0.2, 60.0, 0.01
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class LinkError(UrnaError):
    """The SuperNode does not answer, or not as one."""


class TaskLostError(LinkError):
    """The SuperNode no longer knows the task, or cannot give what belongs to it."""


class OversizedError(UrnaError):
    """A bundle or a message is larger than a site reads."""


@dataclass(frozen=True)
class Bundle:
    """What a run came with; nobody here looks inside."""

    sha256: str  # of the bytes that arrived
    declared_sha256s: frozenset[str]  # what the SuperLink said it is, of the bundle and of the run

    @property
    def is_as_declared(self) -> bool:
        """Whether the bytes are what everybody else calls by this hash."""
        return self.declared_sha256s == {self.sha256}


class _Wire:
    """The last interceptor: adds the task's token, and reads no more of an answer than its limit."""

    def __init__(self) -> None:
        self.token = ""
        self.http = httpx.Client(timeout=CALL_SECONDS, trust_env=False)  # loopback is never behind a proxy

    def intercept(self, context: "ProtobufRequestContext", call_next: "ProtobufCall") -> httpx.Response:  # noqa: ARG002
        if context.rpc_method != ACQUIRE:
            context.request.headers[TASK_TOKEN_HEADER] = self.token
        limit = BUNDLE_LIMIT_BYTES if context.rpc_method == TASK_INPUT else MESSAGE_LIMIT_BYTES
        response = self.http.send(context.request, stream=True)
        content = bytearray()
        try:
            for part in response.iter_raw():
                content += part
                if len(content) > limit:
                    raise OversizedError(f"expected up to {limit} bytes in one answer of the SuperNode, found more")
        finally:
            response.close()
        return httpx.Response(response.status_code, content=bytes(content), request=context.request)


class Runtime:
    """The Runtime API of this site's SuperNode. One task at a time.

    Args:
        address: host:port, on this machine.
        secret: what the SuperNode was started with as its SuperExec secret.
    """

    def __init__(self, address: str, secret: bytes) -> None:
        self._wire = _Wire()
        self.client = RuntimeHttpClient(
            f"http://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="urna"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={ACQUIRE}),
                self._wire,
            ],
        )

    def acquire(self) -> "Task | None":
        """Take the oldest task, if there is one. Tasks of agents are taken too: only to be refused.

        Raises:
            LinkError: no SuperNode answers at the address, or it does not accept the secret.
        """
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP, TaskType.AGENT_APP])
        try:
            acquired = self.client.AcquireTask(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            why = "another SuperExec secret was given to it" if status == 401 else "look at its log"
            raise LinkError(f"the SuperNode answered {status}: {why}") from None
        except (httpx.HTTPError, ValueError) as error:
            raise LinkError(f"no SuperNode answers: {type(error).__name__}") from None
        if not (acquired.HasField("task") and acquired.token):
            return None
        self._wire.token = acquired.token
        return Task(self, acquired.task.task_id, acquired.task.run_id, acquired.task.type == TaskType.CLIENT_APP)

    def call(self, method: Callable[[_Request], _Response], request: _Request) -> _Response:
        """One call in the name of the task; what does not get through is tried again.

        Raises:
            TaskLostError: the SuperNode does not know the task any more.
            LinkError: it does not answer, or answers an error.
            OversizedError: its answer is too large.
        """
        for delay in (*RETRY_SECONDS, None):
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (401, 403):
                    raise TaskLostError("the SuperNode has given the task up") from None
                if delay is None or error.response.status_code < 500:
                    raise LinkError(f"the SuperNode answered {error.response.status_code}") from None
            except (httpx.HTTPError, ValueError) as error:
                if delay is None:
                    raise LinkError(f"the SuperNode does not answer: {type(error).__name__}") from None
            time.sleep(delay)
        raise RuntimeError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._wire.http.close()


class Task:
    """One message that wants an answer. `read_header` comes first; `reply` or `refuse` end it."""

    def __init__(self, runtime: Runtime, task_id: int, run_id: int, is_for_client_app: bool) -> None:
        self.task_id, self.run_id, self.is_for_client_app = task_id, run_id, is_for_client_app
        self._runtime, self._client = runtime, runtime.client
        self._header: Message | None = None
        self._tree = ObjectTree()
        self._answering = threading.Lock()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Send heartbeats meanwhile.

        Flower's own sender is not used: when a task is lost it interrupts the whole process.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT_SECONDS):
                with contextlib.suppress(httpx.HTTPError, ValueError, RuntimeError):  # the next call of the task will tell
                    self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

        threading.Thread(target=beat, name="task heartbeat", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def read_header(self) -> None:
        """Take the message: from here on its sender gets an answer, if only that the task has died.

        Raises:
            LinkError: the SuperNode does not answer; `TaskLostError`: or has no message for this task.
        """
        deadline = time.monotonic() + STORED_SECONDS
        while not (pulled := self._call(self._client.PullMessages, PullAppMessagesRequest())).messages_list:
            if time.monotonic() > deadline:
                raise TaskLostError("the SuperNode has no message for this task")
            time.sleep(SHORTEST_WAIT_SECONDS)
        self._tree = pulled.message_object_trees[0]
        self._header = message_from_proto(pulled.messages_list[0])
        self._header.metadata.__dict__["_message_id"] = self._tree.object_id

    def open_bundle(self) -> Bundle:
        """Begin the task, and hash the bundle of its run.

        Raises:
            OversizedError: it was not read to its end.
            LinkError: the SuperNode does not answer, or cannot begin the task.
        """
        given = self._call(self._client.PullTaskInput, PullTaskInputRequest())
        return Bundle(hashlib.sha256(given.fab.content).hexdigest(), frozenset({given.fab.hash_str, given.run.fab_hash}))

    def read_content(self) -> RecordDict:
        """Read the message; the SuperNode then forgets it.

        Raises:
            OversizedError: it is too large.
            LinkError: the SuperNode does not answer, or cannot get the message.
            ValueError: it is malformed (any other exception of Flower's readers may come, too).
        """
        contents: dict[str, bytes] = {}
        size_bytes = 0
        for node in iterate_object_tree(self._tree):
            if node.object_id not in contents:
                contents[node.object_id] = self._pull_object(node.object_id)
                size_bytes += len(contents[node.object_id])
            if size_bytes > MESSAGE_LIMIT_BYTES:
                raise OversizedError(f"expected a message of up to {MESSAGE_LIMIT_BYTES} bytes, found a larger one")
        self._forget_request()
        message = inflate_object_from_contents(self._tree.object_id, contents)
        if not isinstance(message, Message) or not message.has_content():
            raise ValueError("expected a message with content, found none")
        return message.content

    def reply(self, content: RecordDict) -> None:
        """Answer with a record; the task is done.

        Raises:
            LinkError: the SuperNode does not take it.
        """
        self._answer(Message(content, reply_to=self._sent()), SubStatus.COMPLETED, "")

    def refuse(self, code: int, reason: str) -> None:
        """Answer with an error, unless there is an answer; the task has failed.

        Both go to the operator: never put the text of an exception there.

        Raises:
            LinkError: the SuperNode does not take it.
        """
        header = self._header
        if header is None:
            return
        with contextlib.suppress(LinkError):
            self._forget_request()
        self._answer(Message(Error(code, reason), reply_to=header), SubStatus.FAILED, reason)

    def _answer(self, message: Message, status: str, details: str) -> None:
        with self._answering:  # a task that is being dropped while it ends gets one answer
            if self._header is None:
                return
            self._push(message)
            self._header = None
            self._call(self._client.PushTaskOutput, PushTaskOutputRequest(sub_status=status, details=details))

    def _push(self, message: Message) -> None:
        objects = get_all_nested_objects(message)
        tree = get_object_tree(message)
        message.metadata.__dict__["_message_id"] = tree.object_id
        proto = message_to_proto(remove_content_from_message(message))
        request = PushAppMessagesRequest(messages_list=[proto], message_object_trees=[tree])
        pushed = self._call(self._client.PushMessages, request)
        node = Node(node_id=message.metadata.src_node_id)
        for object_id in pushed.objects_to_push:
            content = objects.pop(object_id).deflate()
            one = PushObjectRequest(node=node, run_id=self.run_id, object_id=object_id, object_content=content)
            one.session_id = pushed.session_id
            if not self._call(self._client.PushObject, one).stored:
                raise TaskLostError("the SuperNode did not store the answer")

    def _pull_object(self, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node(), run_id=self.run_id, object_id=object_id)
        deadline = time.monotonic() + OBJECT_SECONDS
        while True:
            pulled = self._call(self._client.PullObject, request)
            if pulled.object_available:
                return bytes(pulled.object_content)
            if not pulled.object_found or time.monotonic() > deadline:
                raise TaskLostError("the SuperNode does not have the whole message")
            time.sleep(SHORTEST_WAIT_SECONDS)  # it is still fetching it from the SuperLink

    def _forget_request(self) -> None:
        request = ConfirmMessageReceivedRequest(node=self._node(), run_id=self.run_id, message_object_id=self._tree.object_id)
        self._call(self._client.ConfirmMessageReceived, request)

    def _node(self) -> Node:
        return Node(node_id=self._sent().metadata.dst_node_id)

    def _sent(self) -> Message:
        if self._header is None:
            raise TaskLostError("there is no message to answer: it was not read, or is answered")
        return self._header

    def _call(self, method: Callable[[_Request], _Response], request: _Request) -> _Response:
        return self._runtime.call(method, request)


class Pace:
    """Stands for the module `time` in Flower's loop: the same waits, shorter where somebody waits for the answer.

    Flower's loop waits 3 seconds whenever the SuperLink had no message, and looks every 0.5 seconds whether a message is
    answered. Here the latter begins at 10 milliseconds and grows; the former is 0.2 seconds for a minute after a message. An
    idle site asks the SuperLink as often as Flower does.

    Args:
        sleep: of `time`.
        clock: in seconds, monotonic.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic) -> None:
        self._sleep, self._clock = sleep, clock
        self._worked_at = -math.inf
        self._wait_seconds = SHORTEST_WAIT_SECONDS

    def sleep(self, seconds: float) -> None:
        """As `time.sleep`, but shorter for Flower's two waits."""
        now = self._clock()
        if seconds == REPLY_WAIT_SECONDS:
            goes_on = now - self._worked_at < SHORTEST_WAIT_SECONDS  # else this is the first look for another message
            self._wait_seconds = min(1.25 * self._wait_seconds, seconds) if goes_on else SHORTEST_WAIT_SECONDS
            self._sleep(self._wait_seconds)
            self._worked_at = self._clock()
        elif seconds == IDLE_WAIT_SECONDS and now - self._worked_at < BUSY_SECONDS:
            self._sleep(BUSY_IDLE_WAIT_SECONDS)
        else:
            self._sleep(seconds)


def run_supernode(arguments: Sequence[str]) -> None:
    """Run Flower's SuperNode in this process, with `Pace`.

    It returns when its loop was ended by what the SuperLink sent (a bundle that is no ZIP is enough), its Runtime API still
    running: a process that looks alive and does nothing. So whoever calls this ends the process.
    """
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    loop: Any = start_client_internal
    loop.time = SimpleNamespace(sleep=Pace().sleep)  # the module uses nothing else of it; the contract test looks
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


def main() -> None:
    """Entry of the SuperNode's process."""
    from urna.client.supervisor import end_with

    end_with(int(sys.argv[1]))
    run_supernode(sys.argv[2:])
    os._exit(1)  # and is started again; `sys.exit` would wait for the Runtime API


if __name__ == "__main__":
    main()
