"""The peer: one round of Flower's SecAgg+ (`flwr` 1.41), by Flower's own functions with its own defaults.

The client's stages are called as they are, in their order (setup, share keys, masked vectors, unmask). Left out on both sides
is what is not the protocol: numpy's file format before and after (two of Flower's names are replaced by the identity),
messages, dequantisation. Seconds of making and agreeing on keys are told apart (``setup``); Flower pays them every round.

The server's two loops stand in the middle of long methods of `SecAggPlusWorkflow` that also talk to a Grid and a Strategy; they
are repeated here with the same calls in the same order.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

from benchmarks.rounds_in_memory import Case, Peak, median, normal, timed

# The package hides the module behind its function of the same name.
mod: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
CLIPPING_RANGE, QUANTIZATION_RANGE, MODULUS, MAX_WEIGHT, NUM_EXAMPLES = 8.0, 2**22, 2**32, 1000.0, 1000
MAX_NEIGHBOURS = 32
MEASURED_OWNERS = 100  # of a larger cohort's secrets, that many are combined and removed, in proportion; then scaled up
Arrays = list[npt.NDArray[Any]]


def num_shares(num_sites: int) -> int:
    """A site's neighbours and itself: everybody, or as many neighbours as our sparse graph has."""
    return min(num_sites, MAX_NEIGHBOURS + 1)


def threshold(num_sites: int) -> int:
    """Of the shares, by a reconstruction threshold of 2/3."""
    return max(round(2 / 3 * num_shares(num_sites)), 2)


@contextmanager
def agreements_apart() -> Iterator[list[float]]:
    """Seconds of key agreement within the client's stages, apart; and no file format around its arrays."""
    seconds: list[float] = []

    def apart(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            taken, result = timed(function, *arguments)
            seconds.append(taken)
            return result

        return call

    replaced: dict[str, Any] = {
        name: apart(getattr(mod, name)) for name in ("generate_shared_key", "bytes_to_private_key", "bytes_to_public_key")
    }
    replaced |= {"parameters_to_ndarrays": lambda arrays: arrays, "ndarray_to_bytes": lambda array: array}
    with mock.patch.multiple(mod, **replaced):
        yield seconds


class Client:
    """One client of a cohort whose ids are 1, 2, ..., with what the server would forward to it."""

    def __init__(self, node_id: int, num_sites: int) -> None:
        self.state = mod.SecAggPlusState()
        self.state.nid = node_id
        rules = {Key.SAMPLE_NUMBER: num_sites, Key.SHARE_NUMBER: num_shares(num_sites), Key.THRESHOLD: threshold(num_sites)}
        ranges = {Key.CLIPPING_RANGE: CLIPPING_RANGE, Key.TARGET_RANGE: QUANTIZATION_RANGE, Key.MOD_RANGE: MODULUS}
        record = ConfigRecord(cast(Any, {**rules, **ranges, Key.MAX_WEIGHT: MAX_WEIGHT}))
        self.setup_seconds, self.keys = timed(mod._setup, self.state, record)

    @property
    def public_keys(self) -> list[bytes]:
        """Both, as the server forwards them."""
        return [cast(bytes, self.keys[Key.PUBLIC_KEY_1]), cast(bytes, self.keys[Key.PUBLIC_KEY_2])]

    def share(self, public_keys: Mapping[int, list[bytes]]) -> dict[int, bytes]:
        """Sealed shares by receiver."""
        record = ConfigRecord(cast(Any, {str(node_id): keys for node_id, keys in public_keys.items()}))
        reply = mod._share_keys(self.state, record)
        receivers, sealed = cast(list[int], reply[Key.DESTINATION_LIST]), cast(list[bytes], reply[Key.CIPHERTEXT_LIST])
        return dict(zip(receivers, sealed, strict=True))

    def mask(self, sealed: Mapping[int, bytes], vector: npt.NDArray[np.float32]) -> Arrays:
        """The factor and the masked vector, int64."""
        record = ConfigRecord({Key.SOURCE_LIST: list(sealed), Key.CIPHERTEXT_LIST: list(sealed.values())})
        reply = mod._collect_masked_vectors(self.state, record, NUM_EXAMPLES, cast(Any, [vector]))
        return cast(Arrays, reply[Key.MASKED_PARAMETERS])

    def unmask(self, active: list[int], dead: list[int]) -> dict[int, bytes]:
        """Shares by owner."""
        record = ConfigRecord({Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead})
        reply = mod._unmask(self.state, record)
        return dict(zip(cast(list[int], reply[Key.NODE_ID_LIST]), cast(list[bytes], reply[Key.SHARE_LIST]), strict=True))


def client(case: Case, repeats: int) -> dict[str, Any]:
    """One client's round, ``repeats`` times: seconds with keys agreed, of its keys, peak of the first, bytes it moved."""
    seconds, setup = [], []
    vector = normal(case.size)
    peers = range(1, num_shares(case.num_sites) + 1)
    own = len(peers) // 2
    for repeat in range(repeats):
        with agreements_apart() as agreeing:
            ours = Client(own, case.num_sites)
            theirs = {peer: Client(peer, case.num_sites) for peer in peers if peer != own}
            public_keys = {peer: (ours if peer == own else theirs[peer]).public_keys for peer in peers}
            sealed_for_us = _sealed_by_peers(theirs, ours, case.num_sites)
            agreeing.clear()
            with Peak() as peak:
                started = time.process_time()
                sealed = ours.share(public_keys)
                masked = ours.mask(sealed_for_us, vector)
                shares = ours.unmask(list(peers), [])
                taken = time.process_time() - started
        seconds.append(taken - sum(agreeing))
        setup.append(ours.setup_seconds + sum(agreeing))
        if repeat == 0:
            peak_bytes = peak.bytes
            ids = 8 * (len(sealed) + len(shares))
            up = [*ours.public_keys, *sealed.values(), *shares.values()]
            down = [*(key for keys in public_keys.values() for key in keys), *sealed_for_us.values()]
            bytes_up = sum(map(len, up)) + ids + sum(array.nbytes for array in masked)
            bytes_down = sum(map(len, down)) + ids
        del masked
    return {
        "seconds": [round(one, 4) for one in seconds],
        "setup_seconds": median(setup),
        "peak_bytes": peak_bytes,
        "bytes_up": bytes_up,
        "bytes_down": bytes_down,
    }


def _sealed_by_peers(peers: Mapping[int, Client], ours: Client, num_sites: int) -> dict[int, bytes]:
    """What reaches us from each peer; of one secret's shares, for their size is all that matters here."""
    rules = (threshold(num_sites), num_shares(num_sites))
    seed_share = create_shares(os.urandom(32), *rules)[0]
    key_share = create_shares(next(iter(peers.values())).state.sk1, *rules)[0]
    theirs = bytes_to_public_key(ours.state.pk2)
    return {
        peer: encrypt(
            generate_shared_key(bytes_to_private_key(one.state.sk2), theirs),
            share_keys_plaintext_concat(peer, ours.state.nid, seed_share, key_share),
        )
        for peer, one in peers.items()
    }


@dataclass(frozen=True)
class Opening:
    """What the server knows when it removes the masks."""

    active: set[int]
    shares: Mapping[int, Sequence[bytes]]  # by owner: seeds of the active, first private keys of the dead
    public_keys: Mapping[int, bytes]  # first ones
    neighbours: Mapping[int, set[int]]


def summed(uploads: Iterable[Arrays]) -> Arrays:
    """The server's first loop."""
    masked: Arrays | None = None
    for upload in uploads:
        masked = upload if masked is None else parameters_addition(masked, upload)
    assert masked is not None
    return parameters_mod(masked, MODULUS)


def unmasked(masked: Arrays, opening: Opening) -> Arrays:
    """The server's second loop."""
    for owner, shares in opening.shares.items():
        secret = combine_shares(list(shares))
        shapes = get_parameters_shape(masked)
        if owner in opening.active:
            masked = parameters_subtraction(masked, cast(Arrays, pseudo_rand_gen(secret, MODULUS, shapes)))
            continue
        for neighbour in opening.neighbours[owner] - {owner}:
            shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(opening.public_keys[neighbour]))
            mask = cast(Arrays, pseudo_rand_gen(shared, MODULUS, shapes))
            masked = (parameters_addition if owner > neighbour else parameters_subtraction)(masked, mask)
    return parameters_mod(masked, MODULUS)


def server(case: Case, repeats: int) -> dict[str, Any]:
    """The server's round, ``repeats`` times; secrets and shares are real, one random vector stands for all uploads.

    Of more than `MEASURED_OWNERS` sites, that many (in proportion alive and dead) are opened and ``scaled_by`` says how often
    their seconds are counted.
    """
    n, half = case.num_sites, num_shares(case.num_sites) // 2
    neighbours = {at: {(at + offset) % n for offset in range(-half, half + 1)} for at in range(n)}
    dead = {at * n // case.num_dropped for at in range(case.num_dropped)}  # spread over the ring
    scaled_by = max(1, n // MEASURED_OWNERS)
    opened = sorted(dead)[::scaled_by] + sorted(set(range(n)) - dead)[::scaled_by]
    pairs = [generate_key_pairs() for _ in range(n)]
    shares = {owner: _shares(owner, private_key_to_bytes(pairs[owner][0]), dead, neighbours[owner], n) for owner in opened}
    public_keys = {at: public_key_to_bytes(public) for at, (_, public) in enumerate(pairs)}
    opening = Opening(set(range(n)) - dead, shares, public_keys, neighbours)
    upload = [np.array([QUANTIZATION_RANGE]), np.random.default_rng(0).integers(0, MODULUS, case.size)]
    seconds = []
    for repeat in range(repeats):
        with Peak() as peak:
            adding, masked = timed(summed, (upload for _ in range(n - len(dead))))
            removing, masked = timed(unmasked, masked, opening)
        seconds.append(round(adding + scaled_by * removing, 4))
        if repeat == 0:
            peak_bytes = peak.bytes
        del masked
    return {"seconds": seconds, "peak_bytes": peak_bytes, "scaled_by": scaled_by}


def _shares(owner: int, private_key: bytes, dead: set[int], neighbours: set[int], num_sites: int) -> list[bytes]:
    """What the alive neighbours send of one owner's secret."""
    secret = private_key if owner in dead else os.urandom(32)
    shares = create_shares(secret, threshold(num_sites), len(neighbours))
    return [share for share, holder in zip(shares, sorted(neighbours), strict=True) if holder not in dead]


def mean_of(vectors: Sequence[npt.NDArray[np.float32]], num_dropped: int) -> npt.NDArray[np.float64]:
    """A whole round, all clients for real: it shows that the pieces above are Flower's protocol."""
    ids = range(1, len(vectors) + 1)
    with agreements_apart():
        clients = {node_id: Client(node_id, len(vectors)) for node_id in ids}
        public_keys = {node_id: one.public_keys for node_id, one in clients.items()}
        sealed = {node_id: one.share(public_keys) for node_id, one in clients.items()}
        active = list(ids)[num_dropped:]
        uploads = []
        for node_id in active:
            reaching = {source: sealed[source][node_id] for source in ids if source != node_id}
            uploads.append(clients[node_id].mask(reaching, vectors[node_id - 1]))
        answers = [clients[node_id].unmask(active, list(ids)[:num_dropped]) for node_id in active]
    shares = {owner: [answer[owner] for answer in answers] for owner in ids}
    first_keys = {node_id: keys[0] for node_id, keys in public_keys.items()}
    opening = Opening(set(active), shares, first_keys, {node_id: set(ids) for node_id in ids})
    factor, (total,) = factor_extract(unmasked(summed(uploads), opening))
    (reals,) = dequantize([total], CLIPPING_RANGE, QUANTIZATION_RANGE)
    mean: npt.NDArray[np.float64] = (reals - (len(active) - 1) * CLIPPING_RANGE) * (QUANTIZATION_RANGE / factor)
    return mean
