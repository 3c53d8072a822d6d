"""How much memory the server's process needs for N replies of 1e7 numbers: our running total against Flower's own FedAvg.

    ours      pull one message by its id, read its arrays, `ServerRole.add`, drop it; then the next; then unmask
    FedAvg    pull all N messages, then `FedAvg.aggregate_train` of the list, as `Grid.send_and_receive` hands it over

Real: the replies are Flower `Message`s that another process deflated into Flower's objects, and they are pulled and inflated
by Flower's own `pull_objects` and `inflate_object_from_contents`, as its Grid does; masks, shares and total are real and the
total is checked. Not real: there is no SuperLink and no network, objects come from a file on disk (so the buffers of gRPC and
HTTP are left out, on both sides), and FedAvg's N replies are one stored reply, pulled N times over. The peak is the growth of
the process' high-water mark over what was resident before the first pull. Disk: 40 MB a reply, removed after each N.
"""

import argparse
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

from benchmarks.rounds_in_memory import CAMPAIGN, Case, Peak, alone, cohort, context_of, normal
from urna.privacy.ring import Vector
from urna.privacy.secure_sum import ServerRole, SiteRole, Upload

SIZE = 10_000_000
SIZES = (4, 16, 64)
RAW = "raw"
Place = tuple[int, int]  # offset and length in the file


@dataclass(frozen=True)
class Stored:
    """Where the objects of one message lie."""

    message_id: str
    places: dict[str, Place]


class FileGrid:
    """The half of a Grid that pulls, from a file."""

    def __init__(self, file: Path, messages: Sequence[Stored]) -> None:
        self._file = file
        self._messages = {one.message_id: one for one in messages}

    def pull_messages(self, message_ids: Sequence[str]) -> Iterator[Message]:
        """Inflate each message; the list of a real Grid is made by the caller."""
        for message_id in message_ids:
            places = self._messages[message_id].places
            contents = pull_objects(list(places), partial(self._read, places))
            yield cast(Message, inflate_object_from_contents(message_id, contents))

    def _read(self, places: dict[str, Place], object_id: str) -> bytes:
        offset, length = places[object_id]
        with self._file.open("rb") as file:
            file.seek(offset)
            return file.read(length)


def store(file: Path, record: RecordDict) -> Stored:
    """Append all objects of a reply that carries ``record``."""
    metadata = Metadata(1, "", 2, 1, "", "", 0.0, 3600.0, MessageType.TRAIN)  # a reply of node 2 to node 1
    message = make_message(metadata, record)
    places = {}
    with file.open("ab") as out:
        for object_id, one in get_all_nested_objects(message).items():
            content = one.deflate()
            places[object_id] = (out.tell(), len(content))
            out.write(content)
    return Stored(message.object_id, places)


def write_uploads(folder: str, num_sites: int) -> list[Stored]:
    """Every site's masked upload, and what the server needs besides."""
    case = Case(SIZE, num_sites)
    everybody = cohort(num_sites)
    context = context_of(everybody.members, case, "round")
    roles = {name: SiteRole(name, key, CAMPAIGN, 2) for name, key in everybody.keys.items()}
    stored = []
    for number, name in enumerate(context.names, start=1):

        def fill(start: int, out: Vector, number: int = number) -> None:  # noqa: ARG001 - the same number everywhere
            out[:] = number

        upload = roles[name].upload(context, fill, [number])
        arrays = {f"segment-{at:04d}": _array(segment) for at, segment in enumerate(upload.segments)}
        arrays |= {"scalars": _array(upload.scalars), "shares": _array(upload.shares), "checks": _array(upload.checks)}
        stored.append(store(Path(folder, "objects"), RecordDict({"arrays": ArrayRecord(arrays)})))
    holders = [context.names[at] for at in context.graph.holders[: context.quorum.threshold]]
    pads = {name: roles[name].unmask(context, context.names) for name in holders}
    Path(folder, "round").write_bytes(pickle.dumps((everybody.members, pads)))
    return stored


def _array(array: np.ndarray[Any, Any]) -> Array:
    return Array(str(array.dtype), tuple(array.shape), RAW, array.tobytes())


def _numpy(array: Array) -> np.ndarray[Any, Any]:
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


def ours(folder: str, num_sites: int, stored: list[Stored]) -> int:
    """Peak bytes of the secure sum's server.

    Raises:
        RuntimeError: the total is wrong.
    """
    members, pads = pickle.loads(Path(folder, "round").read_bytes())
    context = context_of(members, Case(SIZE, num_sites), "round")
    grid = FileGrid(Path(folder, "objects"), stored)
    with Peak() as peak:
        server = ServerRole(context)
        for name, one in zip(context.names, stored, strict=True):
            server.add(name, _pulled(grid, one.message_id))
        server.close()
        for name, answer in pads.items():
            server.answer(name, answer)
        total, _ = server.total()
    if not np.all(total == sum(range(1, num_sites + 1))):
        raise RuntimeError(f"expected {sum(range(1, num_sites + 1))} everywhere, found {total[:3]}: the sum is wrong")
    return peak.bytes


def _pulled(grid: FileGrid, message_id: str) -> Upload:
    (message,) = grid.pull_messages([message_id])
    arrays = message.content.array_records["arrays"]
    small = {key: _numpy(arrays.pop(key)) for key in ("scalars", "shares", "checks")}
    segments = [_numpy(arrays.pop(key)) for key in sorted(arrays)]
    return Upload(segments, small["scalars"], small["shares"], small["checks"])


def write_update(folder: str) -> list[Stored]:
    """One float32 reply, in ten arrays, as FedAvg expects it."""
    vector = normal(SIZE)
    arrays = ArrayRecord({f"layer-{at}": Array(part) for at, part in enumerate(np.split(vector, 10))})
    record = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 100, "loss": 1.0})})
    return [store(Path(folder, "objects"), record)]


def fedavg(folder: str, num_sites: int, stored: list[Stored]) -> int:
    """Peak bytes of FedAvg's server."""
    grid = FileGrid(Path(folder, "objects"), stored)
    with Peak() as peak:
        replies = list(grid.pull_messages([stored[0].message_id] * num_sites))
        arrays, _ = FedAvg().aggregate_train(1, replies)
        assert arrays is not None
    return peak.bytes


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Both, for each number of sites."""
    sizes = options.sizes or SIZES
    found: dict[str, dict[int, float]] = {"ours": {}, "fedavg": {}}
    for num_sites in sizes:
        for key in found:
            with tempfile.TemporaryDirectory() as folder:
                if key == "ours":
                    peak = alone(ours, folder, num_sites, alone(write_uploads, folder, num_sites))
                else:
                    peak = alone(fedavg, folder, num_sites, alone(write_update, folder))
            found[key][num_sites] = round(peak / 1e6, 1)
            print(f"{key:7} {num_sites} replies: {found[key][num_sites]} MB", flush=True)
    few, many = min(sizes), max(sizes)
    growth = round(found["ours"][many] / found["ours"][few], 2)
    return {
        "d": SIZE,
        "reply_mb": 4 * SIZE / 1e6,
        "num_sites": list(sizes),
        "peak_mb": list(found["ours"].values()),
        "fedavg_peak_mb": list(found["fedavg"].values()),
        "growth": growth,
        "fedavg_growth": round(found["fedavg"][many] / found["fedavg"][few], 2),
        "targets": [{"name": "growth", "at_most": 1.3, "measured": growth, "met": growth <= 1.3}],
    }
