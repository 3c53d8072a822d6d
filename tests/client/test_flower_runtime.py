"""The contract with Flower: what `client/flower_runtime.py` rests on, tried against the installed Flower's own SuperNode.

Another Flower fails here, and not at a site.
"""

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, ErrorCode, SubStatus
from flwr.proto import message_pb2, runtime_pb2
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.exit import ExitCode
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from tests.client.runtime_api import NODE, RUN, SECRET, SERVER, SuperNode, supernode
from urna.client import flower_runtime
from urna.client.config import Link
from urna.client.flower_runtime import (
    BUNDLE_LIMIT_BYTES,
    BUSY_IDLE_WAIT_SECONDS,
    BUSY_SECONDS,
    HEARTBEAT_SECONDS,
    IDLE_WAIT_SECONDS,
    INVALID_BUNDLE,
    RAISED,
    REPLY_WAIT_SECONDS,
    SHORTEST_WAIT_SECONDS,
    LinkError,
    OversizedError,
    Pace,
    Runtime,
    Task,
    TaskLostError,
)
from urna.client.supervisor import CONNECTED, NOT_YET, supernode_command

SOURCE = Path(flower_runtime.__file__).read_text("utf-8")


@pytest.fixture
def node() -> Iterator[SuperNode]:
    with supernode() as one:
        yield one


@pytest.fixture
def runtime(node: SuperNode) -> Iterator[Runtime]:
    one = Runtime(node.address, SECRET)
    yield one
    one.close()


def a_record(size: int = 3) -> RecordDict:
    array = Array("uint8", (size,), "urna.raw", bytes(size))
    return RecordDict({"envelope": ConfigRecord({"sender": "operator", "body": b"{}"}), "arrays": ArrayRecord({"a": array})})


def acquired(runtime: Runtime) -> Task:
    task = runtime.acquire()
    assert task is not None
    return task


# ---- the contract


def test_the_installed_flower_is_the_one_this_was_made_for() -> None:
    assert importlib.metadata.version("flwr").split(".")[:2] == ["1", "41"]


def test_every_internal_name_is_where_it_was() -> None:
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)]
    flower = [(node.module, alias.name) for node in imports for alias in node.names if str(node.module).startswith("flwr")]
    assert len(flower) > 25
    for module, name in flower:
        assert hasattr(importlib.import_module(str(module)), name), f"{module}.{name}"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("AcquireTask", "acquire-task"),
        ("SendTaskHeartbeat", "send-task-heartbeat"),
        ("PullMessages", "pull-messages"),
        ("PullTaskInput", "pull-task-input"),
        ("PullObject", "pull-object"),
        ("ConfirmMessageReceived", "confirm-message-received"),
        ("PushMessages", "push-messages"),
        ("PushObject", "push-object"),
        ("PushTaskOutput", "push-task-output"),
    ],
)
def test_every_call_takes_one_request_and_goes_where_it_went(method: str, path: str) -> None:
    called = getattr(RuntimeHttpClient, method)
    assert list(inspect.signature(called).parameters) == ["self", "request"]
    assert f'path="/v1/runtime/{path}"' in inspect.getsource(called)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (runtime_pb2.AcquireTaskRequest, {"supported_task_types"}),
        (runtime_pb2.AcquireTaskResponse, {"task", "token"}),
        (runtime_pb2.PullAppMessagesResponse, {"messages_list", "message_object_trees"}),
        (runtime_pb2.PullTaskInputResponse, {"run", "fab"}),
        (runtime_pb2.PushAppMessagesRequest, {"messages_list", "message_object_trees"}),
        (runtime_pb2.PushAppMessagesResponse, {"objects_to_push", "session_id"}),
        (runtime_pb2.PushTaskOutputRequest, {"sub_status", "details"}),
        (message_pb2.PullObjectRequest, {"node", "run_id", "object_id"}),
        (message_pb2.PullObjectResponse, {"object_found", "object_available", "object_content"}),
        (message_pb2.PushObjectRequest, {"node", "run_id", "object_id", "object_content", "session_id"}),
        (message_pb2.PushObjectResponse, {"stored"}),
        (message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"}),
        (message_pb2.ObjectTree, {"object_id", "children"}),
    ],
)
def test_the_fields_of_every_message_are_there(message: type, fields: set[str]) -> None:
    assert fields <= {field.name for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]


def test_constants_are_what_they_were() -> None:
    assert (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB) == (2, 7) == (RAISED, INVALID_BUNDLE)
    assert (SubStatus.COMPLETED, SubStatus.FAILED) == ("completed", "failed")
    assert {TaskType.CLIENT_APP, TaskType.AGENT_APP} == {"flwr-clientapp", "flwr-agentapp"}
    assert TASK_TOKEN_HEADER == "flwr-task-token"
    assert 2.5 * HEARTBEAT_SECONDS < HEARTBEAT_DEFAULT_INTERVAL  # two may be lost before a task is given up
    assert HEARTBEAT_PATIENCE == 2


def test_the_loop_of_the_supernode_waits_twice_and_uses_time_for_nothing_else() -> None:
    tree = ast.parse(inspect.getsource(start_client_internal))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time"]
    assert {node.attr for node in used} == {"sleep"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"]
    assert sorted(float(ast.unparse(call.args[0])) for call in calls) == [REPLY_WAIT_SECONDS] * 2 + [IDLE_WAIT_SECONDS]


def test_what_the_supervisor_looks_for_in_the_supernodes_log_is_written_there() -> None:
    assert CONNECTED.decode() + "%s" in inspect.getsource(start_client_internal)
    assert f"Exit Code: {ExitCode.SUPERNODE_CONNECTION_ERROR}".encode() == NOT_YET


def test_the_supernode_takes_the_options_that_it_is_started_with(tmp_path: Path) -> None:
    link = Link(superlink="localhost:1")
    words = supernode_command(tmp_path, link).words
    options = vars(_parse_args_run_supernode().parse_args(list(words[5:])))
    assert options["isolation"] == "process"
    assert (options["host"], options["port"]) == ("127.0.0.1", link.runtime_port)
    assert options["health_server_address"] == f"127.0.0.1:{link.health_port}"
    assert options["insecure"] is False
    assert options["node_config"] is None


def test_the_secret_is_read_as_raw_bytes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    assert load_superexec_auth_secret(str(tmp_path / "secret")) == SECRET


# ---- against the SuperNode


def test_a_message_travels_in_and_its_answer_out_and_nothing_stays(node: SuperNode, runtime: Runtime) -> None:
    assert runtime.acquire() is None
    for size in (0, 1000, 7_000_000):  # an array above 5 MiB travels in several objects
        node.deliver(a_record(size))
        task = acquired(runtime)
        assert (task.run_id, task.is_for_client_app) == (RUN, True)
        with task.alive():
            task.read_header()
            assert task.open_bundle().is_as_declared
            content = task.read_content()
            assert content["envelope"] == a_record()["envelope"]
            assert content.array_records["arrays"]["a"].data == bytes(size)
            task.reply(content)
        reply = node.collect()
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (NODE, SERVER)
        assert reply.content.array_records["arrays"]["a"].shape == (size,)
        assert set(node.statuses()) == {"completed"}
        assert node.num_objects() == 0
    assert runtime.acquire() is None


def test_a_refusal_is_a_code_and_a_fixed_text(node: SuperNode, runtime: Runtime) -> None:
    node.deliver(a_record())
    task = acquired(runtime)
    task.read_header()
    task.open_bundle()
    task.refuse(RAISED, "a fixed text")
    reply = node.collect()
    assert (reply.error.code, reply.error.reason) == (2, "a fixed text")
    assert node.statuses() == ["failed"]
    assert node.num_objects() == 0
    task.refuse(RAISED, "again")  # as when it is dropped while it ends
    with pytest.raises(TaskLostError, match="no message to answer"):
        task.reply(a_record())


def test_the_hash_is_of_the_bytes_and_not_what_was_declared(node: SuperNode, runtime: Runtime) -> None:
    node.link.declared_sha256 = "ab" * 32
    node.deliver(a_record())
    bundles = node.factory.state().fab_store  # type: ignore[attr-defined]
    bundles["ab" * 32] = dataclasses.replace(*bundles.values(), hash_str="ab" * 32)  # Flower's SuperNode finds that out itself
    task = acquired(runtime)
    task.read_header()
    bundle = task.open_bundle()
    assert bundle.sha256 == hashlib.sha256(node.link.bundle).hexdigest()
    assert "ab" * 32 in bundle.declared_sha256s
    assert not bundle.is_as_declared


def test_a_bundle_that_is_too_large_is_not_read_to_its_end(node: SuperNode, runtime: Runtime) -> None:
    node.link.bundle = bytes(BUNDLE_LIMIT_BYTES) + node.link.bundle  # what comes before a ZIP is ignored
    node.deliver(a_record())
    task = acquired(runtime)
    task.read_header()
    with pytest.raises(OversizedError, match=f"expected up to {BUNDLE_LIMIT_BYTES} bytes"):
        task.open_bundle()
    task.refuse(INVALID_BUNDLE, "too large")
    assert node.collect().error.reason == "too large"


def test_a_message_that_is_too_large_is_not_read_to_its_end(
    node: SuperNode, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_runtime, "MESSAGE_LIMIT_BYTES", 100_000)
    node.deliver(a_record(100_000))
    task = acquired(runtime)
    task.read_header()
    task.open_bundle()
    with pytest.raises(OversizedError):
        task.read_content()
    task.refuse(RAISED, "too large")
    assert node.collect().has_error()
    assert node.num_objects() == 0


def test_who_does_not_know_the_secret_gets_no_task(node: SuperNode) -> None:
    node.deliver(a_record())
    stranger = Runtime(node.address, b"another secret")
    with pytest.raises(LinkError, match="answered 401: another SuperExec secret"):
        stranger.acquire()
    stranger.close()
    assert node.statuses() == ["pending"]


def test_no_supernode_is_an_error_with_no_address_of_a_proxy_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with supernode() as node:
        runtime = Runtime(node.address, SECRET)
        assert runtime.acquire() is None  # a proxy in the environment is not asked
    with pytest.raises(LinkError, match="no SuperNode answers: ConnectError"):
        runtime.acquire()
    runtime.close()


def test_a_server_of_another_kind_at_the_port_is_an_error(node: SuperNode) -> None:
    runtime = Runtime(f"{node.address}/docs", SECRET)
    with pytest.raises(LinkError, match="the SuperNode answered 404"):
        runtime.acquire()
    runtime.close()


def test_a_task_is_offered_before_its_message_is_stored_and_is_waited_for(node: SuperNode, runtime: Runtime) -> None:
    node.deliver(a_record())
    task = acquired(runtime)
    (stored,) = node.factory.state().msg_store.items()  # type: ignore[attr-defined]
    node.factory.state().msg_store.clear()  # type: ignore[attr-defined]
    later = threading.Timer(0.3, node.factory.state().msg_store.update, [dict([stored])])  # type: ignore[attr-defined]
    later.start()
    task.read_header()
    task.open_bundle()
    task.reply(task.read_content())
    later.join()
    assert node.collect().has_content()


def test_a_task_that_was_begun_and_dies_is_answered_by_the_supernode(
    node: SuperNode, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the message is taken before the task is begun: else nobody would be told."""
    node.deliver(a_record())
    task = acquired(runtime)
    task.read_header()
    task.open_bundle()
    (token,) = node.factory.state().task_token_store.values()  # type: ignore[attr-defined]
    monkeypatch.setattr(token, "active_until", token.active_until.replace(year=2000))
    reply = node.collect()
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding.")
    with pytest.raises(TaskLostError, match="given the task up"):
        task.reply(a_record())


def test_heartbeats_keep_a_task(node: SuperNode, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_runtime, "HEARTBEAT_SECONDS", 0.01)
    node.deliver(a_record())
    task = acquired(runtime)
    with task.alive():
        task.read_header()
        task.open_bundle()
        (token,) = node.factory.state().task_token_store.values()  # type: ignore[attr-defined]
        before = token.active_until
        deadline = time.monotonic() + 20
        while token.active_until == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        task.reply(a_record())
    assert node.collect().has_content()


def test_a_call_that_did_not_get_through_is_tried_again(runtime: Runtime) -> None:
    attempts = []

    def flaky(request: runtime_pb2.PullAppMessagesRequest) -> runtime_pb2.PullAppMessagesResponse:
        attempts.append(request)
        if len(attempts) < 3:
            raise httpx.ReadError("the connection was closed")
        return runtime_pb2.PullAppMessagesResponse()

    runtime.call(flaky, runtime_pb2.PullAppMessagesRequest())
    assert len(attempts) == 3


def test_a_call_that_never_gets_through_is_an_error_without_its_text(runtime: Runtime) -> None:
    def dead(request: runtime_pb2.PullAppMessagesRequest) -> runtime_pb2.PullAppMessagesResponse:  # noqa: ARG001
        raise httpx.ReadError("text")

    with pytest.raises(LinkError, match=r"^the SuperNode does not answer: ReadError$"):
        runtime.call(dead, runtime_pb2.PullAppMessagesRequest())


def test_the_content_of_an_error_message_is_not_read_as_a_record(node: SuperNode, runtime: Runtime) -> None:
    node.deliver(a_record())
    task = acquired(runtime)
    task.read_header()
    task.open_bundle()
    task._pull_object = lambda object_id: b"no such object"  # type: ignore[method-assign]  # noqa: ARG005
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Flower's readers raise is caught at the edge
        task.read_content()


# ---- the pace of the SuperNode's loop


def a_pace() -> tuple[Pace, SimpleNamespace]:
    clock = SimpleNamespace(now=1000.0, slept=[])

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    return Pace(sleep, lambda: clock.now), clock


def test_an_idle_site_asks_as_seldom_as_flower_does() -> None:
    pace, clock = a_pace()
    for _ in range(3):
        pace.sleep(IDLE_WAIT_SECONDS)
    assert clock.slept == [3, 3, 3]


def test_for_a_minute_after_a_message_the_next_is_asked_for_often() -> None:
    pace, clock = a_pace()
    pace.sleep(REPLY_WAIT_SECONDS)
    for _ in range(1000):
        pace.sleep(IDLE_WAIT_SECONDS)
    assert clock.slept[1] == BUSY_IDLE_WAIT_SECONDS
    assert clock.slept[-1] == 3
    assert clock.slept.count(BUSY_IDLE_WAIT_SECONDS) == pytest.approx(BUSY_SECONDS / BUSY_IDLE_WAIT_SECONDS, abs=2)


def test_a_long_answer_is_looked_for_as_seldom_as_by_flower_in_the_end_and_the_next_one_often_again() -> None:
    pace, clock = a_pace()
    for _ in range(100):
        pace.sleep(REPLY_WAIT_SECONDS)
    assert clock.slept == sorted(clock.slept)
    assert (clock.slept[0], clock.slept[-1]) == (SHORTEST_WAIT_SECONDS, REPLY_WAIT_SECONDS)
    clock.now += 0.05  # the reply is sent, another message comes
    pace.sleep(REPLY_WAIT_SECONDS)
    assert clock.slept[-1] == SHORTEST_WAIT_SECONDS


def test_other_waits_are_left_as_they_are() -> None:
    pace, clock = a_pace()
    pace.sleep(1.5)
    assert clock.slept == [1.5]


def test_a_supernode_whose_loop_was_ended_by_what_it_was_sent_ends(node: SuperNode) -> None:
    """Its Runtime API would go on by itself, and the supervisor see a process that lives."""
    node.link.bundle = b"no ZIP"
    with pytest.raises(zipfile.BadZipFile):  # what Flower's loop does not catch
        node.deliver(a_record())
    script = """
import importlib, sys, threading, time
module = importlib.import_module("flwr.supernode.cli.flower_supernode")
module.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(1000,)).start()
sys.argv = ["", str(__import__("os").getppid()), "--superlink", "x"]
from urna.client.flower_runtime import main
main()
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 1


def test_nothing_here_writes_unzips_or_imports_what_was_sent() -> None:
    imported = {node.module or "" for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"zipfile", "importlib", "shutil", "tempfile", "pathlib", "flwr.cli.install", "pickle"}
    assert "open(" not in SOURCE.replace("urlopen(", "")
    assert {one.type for one in dataclasses.fields(flower_runtime.Bundle)} == {str, frozenset[str]}  # no bytes are kept
