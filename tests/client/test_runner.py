import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType

from tests.client.clinic import Clinic
from tests.client.runtime_api import RUN, SECRET, SuperNode, supernode
from urna.client import flower_runtime
from urna.client.control import connect
from urna.client.flower_runtime import BUNDLE_LIMIT_BYTES, Answer, Runtime
from urna.client.local_log import LOG_FILE, local_log
from urna.client.runner import CANNOT_ANSWER, NO_SUCH_BUNDLE, Runner, WarmSite, attended, run
from urna.client.supervisor import SECRET_FILE
from urna.protocol.errors import LedgerError, RunnerError, SiteConfigError

CANARY = "canary-7f3a"


def a_message(text: str = "hello") -> RecordDict:
    return RecordDict({"envelope": ConfigRecord({"text": text})})


def echo(content: RecordDict) -> RecordDict:
    return content


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text("utf-8").splitlines()]


@pytest.fixture
def node() -> Iterator[SuperNode]:
    with supernode() as one:
        yield one


@contextmanager
def running(
    node: SuperNode,
    folder: Path,
    answer: Answer = echo,
    *,
    allowed: tuple[str, ...] | None = None,
    on_bundle: Callable[[str, int], None] | None = None,
) -> Iterator[Runner]:
    """A runner in a thread; it must end when it is told to."""
    runtime, stop = Runtime(node.address, SECRET), threading.Event()
    runner = Runner(runtime, answer, local_log("site-1", folder), allowed_bundles=allowed, on_bundle=on_bundle)
    thread = threading.Thread(target=runner.serve, args=(stop,), daemon=True)
    thread.start()
    try:
        yield runner
    finally:
        stop.set()
        thread.join(20)
        runtime.close()
        assert not thread.is_alive()


def test_every_message_gets_its_answer_from_one_process_that_stays(node: SuperNode, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    with running(node, tmp_path, on_bundle=lambda *what: seen.append(what)):
        for number in range(5):
            message_type = ("query.hello", "train", "evaluate", "query.anything")[number % 4]
            node.deliver(a_message(str(number)), message_type=message_type)
            assert node.collect().content == a_message(str(number))
    sha256 = hashlib.sha256(node.link.bundle).hexdigest()
    assert seen == [(sha256, RUN)] * 5
    noted = [line for line in lines(tmp_path) if line["event"] == "bundle_seen"]
    assert len(noted) == 5
    assert noted[0]["detail"] == f"run {RUN}, bundle {sha256}"
    assert set(node.statuses()) == {"completed"}


def test_exception_text_never_leaves(node: SuperNode, tmp_path: Path) -> None:
    def fails(content: RecordDict) -> RecordDict:
        raise ValueError(f"record {CANARY} of {content}")

    with running(node, tmp_path, fails):
        node.deliver(a_message())
        reply = node.collect()
        assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, CANNOT_ANSWER)
        assert CANARY not in str(reply)
        (task,) = node.factory.state().get_tasks()
        assert task.status.details == CANNOT_ANSWER
    (line,) = [line for line in lines(tmp_path) if line["event"] == "request_failed"]
    assert line["exception"] == "ValueError"
    assert CANARY in line["detail"]


def test_an_answer_that_cannot_be_sent_is_a_fixed_text_too(node: SuperNode, tmp_path: Path) -> None:
    with running(node, tmp_path, lambda content: f"{CANARY} is no record, nor {content}"):  # type: ignore[arg-type,return-value]
        node.deliver(a_message())
        assert node.collect().error.reason == CANNOT_ANSWER


def test_a_bundle_that_is_not_listed_is_refused_and_its_message_not_read(node: SuperNode, tmp_path: Path) -> None:
    with running(node, tmp_path, allowed=("ab" * 32,)):
        node.deliver(a_message(CANARY))
        reply = node.collect()
    assert (reply.error.code, reply.error.reason) == (ErrorCode.INVALID_FAB, NO_SUCH_BUNDLE)
    (line,) = [line for line in lines(tmp_path) if line["event"] == "bundle_refused"]
    assert line["detail"].endswith("not on link.allowed_bundles")
    assert CANARY not in (tmp_path / LOG_FILE).read_text("utf-8")


def test_a_listed_bundle_is_taken(node: SuperNode, tmp_path: Path) -> None:
    with running(node, tmp_path, allowed=(hashlib.sha256(node.link.bundle).hexdigest(),)):
        node.deliver(a_message())
        assert node.collect().has_content()


def test_a_bundle_whose_hash_is_another_than_declared_is_refused(node: SuperNode, tmp_path: Path) -> None:
    node.link.declared_sha256 = "ab" * 32
    node.deliver(a_message())
    bundles = node.factory.state().fab_store  # type: ignore[attr-defined]
    bundles["ab" * 32] = replace(*bundles.values(), hash_str="ab" * 32)
    with running(node, tmp_path, allowed=("ab" * 32,)):
        assert node.collect().error.reason == NO_SUCH_BUNDLE
    assert "not what the SuperLink says it is" in lines(tmp_path)[-1]["detail"]


def test_a_bundle_that_is_too_large_is_refused(node: SuperNode, tmp_path: Path) -> None:
    node.link.bundle = bytes(BUNDLE_LIMIT_BYTES) + node.link.bundle
    with running(node, tmp_path):
        node.deliver(a_message())
        assert node.collect().error.reason == NO_SUCH_BUNDLE


def test_a_task_of_an_agent_is_refused_and_does_not_block_the_next(node: SuperNode, tmp_path: Path) -> None:
    node.link.task_type = TaskType.AGENT_APP
    with running(node, tmp_path):
        node.deliver(a_message())
        assert node.collect().error.reason == NO_SUCH_BUNDLE
        node.link.task_type = ""
        node.deliver(a_message(), run_id=RUN + 1)
        assert node.collect().has_content()


def test_a_message_that_cannot_be_pulled_is_reported_failed_and_the_next_is_answered(
    node: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(node, tmp_path), monkeypatch.context() as patch:
        patch.setattr(node.factory.state(), "get_object", lambda *_: None)
        node.deliver(a_message("lost"))
        assert node.collect().error.reason == CANNOT_ANSWER
        patch.undo()
        node.deliver(a_message("next"))
        assert node.collect().content == a_message("next")
    assert sorted(node.statuses()) == ["completed", "failed"]


def test_a_task_without_a_message_is_left_to_the_supernode_and_the_next_is_answered(
    node: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_runtime, "STORED_SECONDS", 0.1)
    node.deliver(a_message("lost"))
    node.factory.state().msg_store.clear()  # type: ignore[attr-defined]
    with running(node, tmp_path):
        wait_for(tmp_path / LOG_FILE)
        node.deliver(a_message("next"), run_id=RUN + 1)
        assert node.collect().content == a_message("next")
    assert sorted(node.statuses()) == ["completed", "running"]  # the latter ends, and is answered, when heartbeats stay away


def test_a_bundle_that_cannot_be_noted_is_not_answered(node: SuperNode, tmp_path: Path) -> None:
    def full_disk(sha256: str, run_id: int) -> None:
        raise OSError(f"{CANARY}: no space for {sha256} of {run_id}")

    with running(node, tmp_path, on_bundle=full_disk):
        node.deliver(a_message())
        assert node.collect().error.reason == CANNOT_ANSWER


def test_a_supernode_that_went_away_is_waited_for(tmp_path: Path) -> None:
    with supernode() as first:
        node = first
    with running(node, tmp_path):
        deadline = time.monotonic() + 20
        while not (tmp_path / LOG_FILE).is_file() or not lines(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with supernode(node.port) as second:
            second.deliver(a_message())
            assert second.collect().has_content()
    events = [line["event"] for line in lines(tmp_path)]
    assert events[:3] == ["supernode_lost", "supernode_back", "bundle_seen"]


def test_the_message_at_hand_is_answered_before_it_ends(node: SuperNode, tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(content: RecordDict) -> RecordDict:
        entered.set()
        go_on.wait(20)
        return content

    with running(node, tmp_path, slow) as runner:
        node.deliver(a_message())
        assert entered.wait(20)
        assert runner.is_busy
        threading.Timer(0.2, go_on.set).start()  # after it was told to stop
    assert node.collect().has_content()


# ---- the process


SCRIPT = """
import pathlib, sys, time
from urna.client import runner, supervisor
from urna.client.config import Link

class Config:
    name = "site-1"

class Site(runner.WarmSite):
    def open(self):
        pass
    def close(self):
        (self._folder / "closed").touch()
    def saw_bundle(self, sha256, run_id):
        pass
    def __call__(self, content):
        (self._folder / "entered").touch()
        time.sleep({seconds})
        return content

runner.linked = lambda folder: (Config, Link(superlink="x:1", runtime_port={port}))
runner.WarmSite = Site
sys.exit(runner.run(pathlib.Path(sys.argv[1]), {parent}))
"""


@contextmanager
def process(
    node: SuperNode, folder: Path, seconds: float = 0.0, parent: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """The runner as a process, its site replaced by one that takes some time."""
    (folder / SECRET_FILE).write_bytes(SECRET)
    script = SCRIPT.format(seconds=seconds, port=node.port, parent=parent)
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.DEVNULL) as one:
        try:
            wait_for(folder / LOG_FILE)
            yield one
        finally:
            one.kill()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_more_of_them_change_nothing(node: SuperNode, tmp_path: Path, number: int) -> None:
    with process(node, tmp_path) as one:
        node.deliver(a_message())
        assert node.collect().has_content()
        for _ in range(5):
            one.send_signal(number)
        assert one.wait(5) == 0
    assert (tmp_path / "closed").is_file()
    assert [line["event"] for line in lines(tmp_path)] == ["started", "bundle_seen", "stopped"]


def test_a_message_that_takes_too_long_is_dropped_when_it_is_told_to_stop_and_its_sender_told(
    node: SuperNode, tmp_path: Path
) -> None:
    with process(node, tmp_path, seconds=1000) as one:
        node.deliver(a_message())
        wait_for(tmp_path / "entered")
        one.terminate()
        assert one.wait(5) == 0
    reply = node.collect()
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, CANNOT_ANSWER)


def test_it_ends_with_its_parent(node: SuperNode, tmp_path: Path) -> None:
    """Here the parent was gone before it looked."""
    with process(node, tmp_path, parent=1) as one:
        assert one.wait(10) == 0


def test_without_a_link_or_a_secret_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SiteConfigError, match=r"site\.toml"):
        run(tmp_path)


# ---- the site behind it


def test_an_open_site_holds_its_ledger_serves_its_people_and_notes_bundles(clinic: Clinic) -> None:
    clinic.folder.chmod(0o700)
    clinic.site.close()
    warm = WarmSite(clinic.folder, attended)
    warm.saw_bundle("ab" * 32, 7)
    with connect(clinic.folder) as person:
        assert person.status().bundles_seen == ("ab" * 32,)
        person.pause()
        assert person.status().paused
    other = clinic.reopened().site
    other.ledger.timeout_seconds = 0.0
    with pytest.raises(LedgerError, match=f"process {os.getpid()} of this site uses it; one process at a time may spend"):
        other.ledger.note("resume", "site-1")
    warm.close()
    other.ledger.note("resume", "site-1")
    with pytest.raises(RunnerError), connect(clinic.folder) as nobody:
        nobody.status()


def test_a_second_runner_of_one_site_does_not_open_it(clinic: Clinic) -> None:
    clinic.folder.chmod(0o700)
    clinic.site.close()
    first, second = WarmSite(clinic.folder, attended), WarmSite(clinic.folder, attended)
    first.open()
    with pytest.raises(LedgerError, match="one process at a time may spend"):
        second.open()
    first.close()
    second.open()
    second.close()
