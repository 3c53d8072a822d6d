"""One exchange over Flower's Grid: push one by one, pull one by one, so that one reply at a time is in memory.

Flower's own ``send_and_receive`` keeps all replies (9 of 100 MB peaked at 1.35 GB) and sleeps for 3 seconds between looks.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

POLL_SECONDS = 0.05


def exchange(
    grid: "Grid", messages: "Iterable[Message]", timeout_seconds: float, poll_seconds: float = POLL_SECONDS
) -> "Iterator[tuple[int, Message | None]]":
    """Send messages; yield (node, reply) as the replies arrive, and stop at the deadline.

    Args:
        grid: given by Flower to a ServerApp.
        messages: made one at a time while they are pushed, if this is a generator.
        timeout_seconds: from the first push to the last pull; who is silent until then is not in what this yields.
        poll_seconds: between two looks at all that are waited for.

    Yields:
        A node and its reply; an error reply (of the app, or Flower's own) as it is; None where a message could not be pushed.
    """
    deadline = time.monotonic() + timeout_seconds
    waiting: dict[str, int] = {}
    for message in messages:
        node = message.metadata.dst_node_id
        pushed = [one for one in grid.push_messages([message]) if one]  # empty, None or "" where it was not stored
        if pushed:
            waiting[pushed[0]] = node
        else:
            yield node, None
    while waiting and time.monotonic() < deadline:
        found = False
        for message_id in list(waiting):
            for reply in grid.pull_messages([message_id]):
                if reply.metadata.reply_to_message_id == message_id and message_id in waiting:
                    found = True
                    yield waiting.pop(message_id), reply
                del reply  # before the next one is pulled
            if time.monotonic() >= deadline:
                return
        if not found:
            time.sleep(min(poll_seconds, max(0.0, deadline - time.monotonic())))
