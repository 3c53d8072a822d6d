import time
from collections.abc import Callable, Iterable, Iterator

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from tests.mean_consortium import identify
from urna.strategies.grid import exchange


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    identify(monkeypatch)


class Scripted(Grid):
    """Stores what ``push`` says and answers what ``pull`` says."""

    def __init__(self, push: Callable[[Message], list[str]], pull: Callable[[str, int], list[Message]]) -> None:
        self.push, self.pull = push, pull
        self.log: list[str] = []
        self.asked: list[list[str]] = []

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        self.log.append(f"push {message.metadata.dst_node_id}")
        return self.push(message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.asked.append(list(message_ids))
        (message_id,) = self.asked[-1]
        self.log.append(f"pull {message_id}")
        return self.pull(message_id, len(self.asked))

    def send_and_receive(
        self,
        messages: Iterable[Message],  # noqa: ARG002 - Flower's signature
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> Iterable[Message]:
        raise AssertionError("it keeps all replies")


def message_to(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="train")


def reply_to(message_id: str, error: Error | None = None) -> Message:
    request = message_to(int(message_id.split("-")[-1]))
    request.metadata.__dict__["_message_id"] = message_id
    return Message(RecordDict(), reply_to=request) if error is None else Message(error, reply_to=request)


def stored(message: Message) -> list[str]:
    return [f"id-{message.metadata.dst_node_id}"]


def test_messages_are_pushed_one_by_one_as_they_are_made_and_replies_pulled_by_single_ids() -> None:
    grid = Scripted(stored, lambda one, _: [reply_to(one)])

    def made() -> Iterator[Message]:
        for node in (1, 2, 3):
            grid.log.append(f"make {node}")
            yield message_to(node)

    assert [node for node, reply in exchange(grid, made(), 5) if reply is not None] == [1, 2, 3]
    assert grid.log[:6] == ["make 1", "push 1", "make 2", "push 2", "make 3", "push 3"]
    assert grid.asked == [["id-1"], ["id-2"], ["id-3"]]


def test_the_next_reply_is_pulled_only_when_the_last_was_taken() -> None:
    grid = Scripted(stored, lambda one, _: [reply_to(one)])
    replies = exchange(grid, map(message_to, (1, 2, 3)), 5)
    next(replies)
    assert grid.asked == [["id-1"]]


@pytest.mark.parametrize("nothing", [[], [""], [None]], ids=["no id", "empty id", "None"])
def test_a_message_that_was_not_stored_yields_none_and_the_others_go_on(nothing: list[str]) -> None:
    def push(message: Message) -> list[str]:
        return nothing if message.metadata.dst_node_id == 2 else stored(message)

    grid = Scripted(push, lambda one, _: [reply_to(one)])
    found = dict(exchange(grid, map(message_to, (1, 2, 3)), 5))
    assert found[2] is None
    assert found[1] is not None
    assert found[3] is not None


def test_an_error_reply_is_yielded_as_it_is() -> None:
    error = Error(3, "gone")
    grid = Scripted(stored, lambda one, _: [reply_to(one, error if one == "id-2" else None)])
    found = dict(exchange(grid, map(message_to, (1, 2)), 5))
    assert found[2] is not None
    assert found[2].error == error


def test_a_silent_node_delays_nobody_and_is_given_up_at_the_deadline() -> None:
    grid = Scripted(stored, lambda one, look: [] if one == "id-1" or look < 4 else [reply_to(one)])
    start = time.monotonic()
    assert [node for node, _ in exchange(grid, map(message_to, (1, 2, 3)), 0.3, poll_seconds=0.02)] == [2, 3]
    assert 0.25 < time.monotonic() - start < 1.0


def test_the_deadline_holds_within_one_look_at_slow_nodes() -> None:
    def slow(_: str, __: int) -> list[Message]:
        time.sleep(0.1)
        return []

    grid = Scripted(stored, slow)
    start = time.monotonic()
    assert list(exchange(grid, map(message_to, range(1, 100)), 0.25)) == []
    assert time.monotonic() - start < 1.0


def test_a_reply_to_another_message_is_not_taken_for_this_ones() -> None:
    grid = Scripted(stored, lambda one, look: [reply_to("id-9" if look == 1 else one)])
    assert [node for node, _ in exchange(grid, [message_to(1)], 5, poll_seconds=0.01)] == [1]
    assert len(grid.asked) == 2
