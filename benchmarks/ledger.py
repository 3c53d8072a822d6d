"""A site's ledger: what a durable reservation costs, and how long the budget takes to add up after 10,000 releases.

    reserve_per_second          reservations, each on disk (``synchronous=EXTRA``) and anchored when the call returns
    reserve_settle_per_second   the same with the kept reply: two transactions a release
    sqlite_per_second           the floor: a plain SQLite insert of the same release with ``synchronous=FULL``, one commit each
    epsilon_seconds             median: all rows read, merged, and their epsilon computed, nothing remembered from before
    one_by_one                  the peer: dp_accounting's PLD accountant, one release after the other, as its API invites to;
                                measured for some releases of the mix, and scaled to all of them in proportion
    open_seconds                median: opened, every entry of the chain and every row checked
    file_bytes                  of the ledger with all releases settled; ``bytes_per_release`` without their replies

10,000 releases each: ``equal`` events; ``fifty`` different ones; ``campaigns``: 20 campaigns with a noise of their own, of 10
ballots, 480 steps of DP-SGD and 10 evaluations (on the other partition), which makes 60 different ones.
"""

import argparse
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from dp_accounting import pld

from urna.client.ledger import Ledger
from urna.client.ledger_rows import Release
from urna.privacy import accounting
from urna.privacy.accounting import PLD_STEP, epsilon_of_rows, event_from_json, gaussian, subsampled_gaussian
from urna.protocol.messages import Partition, Stage

NUM_ROWS, NUM_WRITES, NUM_REPEATS = 10_000, 200, 5
NUM_ONE_BY_ONE = 50
REPLY_BYTES = 100
DELTA = 1e-6
KEY = bytes(range(32))
SHA = "0" * 64

One = tuple[Stage, Partition, str]
Events = Iterator[One]


def equal() -> Events:
    """One event."""
    return (("ballot", "tuning", gaussian(200.0)) for _ in range(NUM_ROWS))


def fifty() -> Events:
    """Fifty events."""
    return (("final", "tuning", subsampled_gaussian(0.01, 1.0 + number % 50 / 10)) for number in range(NUM_ROWS))


def campaigns() -> Events:
    """As campaigns make them."""
    for campaign in range(NUM_ROWS // 500):
        noise = 2.0 + campaign / 10
        ballot: One = ("ballot", "tuning", gaussian(20 * noise))
        step: One = ("final", "tuning", subsampled_gaussian(0.01 + campaign / 1000, noise))
        evaluation: One = ("evaluation", "heldout", gaussian(30 * noise))
        yield from [ballot] * 10 + [step] * 480 + [evaluation] * 10


MIXES: dict[str, Callable[[], Events]] = {"equal": equal, "fifty": fifty, "campaigns": campaigns}


def a_release(number: int, stage: Stage = "ballot", partition: Partition = "tuning", event: str = gaussian(4.0)) -> Release:
    """A release with an id as long as real ones."""
    return Release(f"a-campaign-of-2026/{stage}/{number}", SHA, "a-campaign-of-2026", stage, partition, event)


def filled(path: Path, events: Events) -> Ledger:
    """A ledger with these releases, all settled, in one transaction."""
    ledger = Ledger.create(path, KEY)
    with ledger.exclusive():
        for number, one in enumerate(events):
            release = a_release(number, *one)
            ledger.reserve(release)
            ledger.settle(release.request_id, os.urandom(REPLY_BYTES))
    return ledger


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def opened_and_closed(path: Path) -> None:
    """Open, which checks everything."""
    Ledger.open(path, KEY).close()


def median_seconds(work: Callable[[], object]) -> float:
    """Of some calls."""
    return round(statistics.median(seconds_of(work) for _ in range(NUM_REPEATS)), 4)


def writes(folder: Path) -> dict[str, float]:
    """Durable writes per second, the three kinds in turns, so that the disk is the same for all."""
    ledger = Ledger.create(folder / "writes.sqlite", KEY)
    plain = sqlite3.connect(folder / "plain.sqlite", isolation_level=None)
    plain.executescript("PRAGMA synchronous=FULL; CREATE TABLE release (number INTEGER PRIMARY KEY, release TEXT NOT NULL);")
    spent = dict.fromkeys(("sqlite", "reserve", "reserve_settle"), 0.0)
    for number in range(NUM_WRITES):
        one, other = a_release(number), a_release(number + NUM_WRITES)
        text = json.dumps([one.request_id, one.request_sha256, one.campaign, one.stage, one.partition, one.event, one.count])

        def both(other: Release = other) -> None:
            ledger.reserve(other)
            ledger.settle(other.request_id, bytes(REPLY_BYTES))

        def insert(text: str = text) -> None:
            plain.execute("INSERT INTO release (release) VALUES (?)", (text,))

        spent["sqlite"] += seconds_of(insert)
        spent["reserve"] += seconds_of(partial(ledger.reserve, one))
        spent["reserve_settle"] += seconds_of(both)
    ledger.close()
    plain.close()
    return {f"{name}_per_second": round(NUM_WRITES / seconds, 1) for name, seconds in spent.items()}


def epsilon_of_ledger(ledger: Ledger) -> float:
    """What a site asks before every release; nothing is remembered from the last time."""
    accounting._epsilon.cache_clear()
    return epsilon_of_rows(ledger.rows(), DELTA)


def one_by_one() -> dict[str, float]:
    """What it takes without merging."""
    events = [event for _, partition, event in campaigns() if partition == "tuning"]
    chosen = events[:: len(events) // NUM_ONE_BY_ONE][:NUM_ONE_BY_ONE]

    def compose() -> None:
        accountant = pld.PLDAccountant(value_discretization_interval=PLD_STEP)
        for event in chosen:
            accountant.compose(event_from_json(event))
        accountant.get_epsilon(DELTA)

    seconds = seconds_of(compose)
    return {
        "releases": len(chosen),
        "seconds": round(seconds, 3),
        "scaled_seconds": round(seconds / len(chosen) * len(events), 1),
    }


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes them
    """All of it; see the module's docstring."""
    epsilons, query, rows, distinct, opened, size = {}, {}, {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = writes(folder)
        for mix, events in MIXES.items():
            path = folder / f"{mix}.sqlite"
            with closing(filled(path, events())) as ledger:
                epsilons[mix] = round(epsilon_of_ledger(ledger), 4)
                distinct[mix] = len(ledger.rows())
                query[mix] = median_seconds(partial(epsilon_of_ledger, ledger))
                rows[mix] = median_seconds(ledger.rows)
            opened[mix] = median_seconds(partial(opened_and_closed, path))
            size[mix] = path.stat().st_size
    return {
        **written,
        "rows": NUM_ROWS,
        "distinct_rows": distinct,
        "epsilon": epsilons,
        "epsilon_seconds": query,
        "read_seconds": rows,
        "one_by_one": one_by_one(),
        "open_seconds": opened,
        "file_bytes": size,
        "bytes_per_release": round(size["campaigns"] / NUM_ROWS - REPLY_BYTES),
    }
