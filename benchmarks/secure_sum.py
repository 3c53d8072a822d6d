"""One round of the secure sum against one round of Flower's SecAgg+, same machine, same run: CPU seconds, peaks, bytes.

    ours, client   context, `Rounding` on a grid of the whole ring, `SiteRole.upload` with one scalar, `SiteRole.unmask`
    ours, server   context, `ServerRole.add` of every upload (made in another process, read from a file off the clock), `close`,
                   `answer` to the threshold, `total`; the total is checked
    Flower         see `flower_secagg`: its client's stages, its server's loops, `num_shares` = degree + 1

Both bring pair keys along: making and agreeing on keys is ``setup_seconds`` (ours once a campaign, Flower's every round). Peaks
are the growth of the high-water mark over what the process held before, vector included there; of the client over the bytes
of its upload, of the server over one vector as it keeps it (uploads that wait are in it; Flower's list of messages is not).
The first repeat in a fresh process pays for memory that a virtual machine has yet to get from its host, up to as much again
as the work itself: medians of three and more leave it out, on both sides.

Not measured: Flower's server at 1e8 numbers, and with 1,000 sites more than a tenth of them (``flower_server_scaled_by`` times
their seconds stand for all; see `flower_secagg.server`). Flower has one width: its figures repeat on the lines of ours.

Headline cases run three times in turns, each time in fresh processes; their targets carry the median and the spread of all.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from benchmarks import flower_secagg
from benchmarks.rounds_in_memory import (
    CAMPAIGN,
    Case,
    Cohort,
    Peak,
    Sites,
    alone,
    cohort,
    context_of,
    median,
    normal,
    run_round,
    timed,
)
from urna.privacy.fixed_point import Rounding, grid_for
from urna.privacy.ring import CHUNK_BYTES, Ring, add_streams
from urna.privacy.secure_sum import SiteRole
from urna.protocol.identity import Identity
from urna.protocol.messages import Member

MILLION = 10**6
TURNS = 3
CLIENT_HEADLINE = (Case(10 * MILLION, 10), Case(10 * MILLION, 10, 0, 16))
SERVER_HEADLINE = (Case(10 * MILLION, 10), Case(MILLION, 32, 3))
LARGEST = 100 * MILLION
Seconds = dict[str, Any]


def cases(quick: bool) -> list[Case]:
    """Every line of the result; a tenth of the sites dropped, at least one."""
    cohorts = [(MILLION, (4, 10, 32) if quick else (4, 10, 32, 100, 1000))] + ([] if quick else [(10 * MILLION, (4, 10, 32))])
    found = []
    for size, numbers in cohorts:
        for n in numbers:
            widths = (32,) if n > 100 else (32, 16)
            found += [Case(size, n, dropped, bits) for dropped in (0, max(1, n // 10)) for bits in widths]
    found.insert(0, Case((1 if quick else 10) * MILLION, 10, 0, 24))
    return found + ([] if quick else [Case(LARGEST, 4), Case(LARGEST, 10), Case(LARGEST, 10, 0, 16)])


def repeats_of(role: str, case: Case) -> int:
    """How often within one process: what takes long takes part once."""
    if case.size >= LARGEST:
        return {"client": 3, "flower client": 2}.get(role, 1)
    if case.num_sites >= 100 or (role == "flower server" and case.num_sites >= 32):
        return 1
    return 3 if case.size >= 10 * MILLION else 7


def client(case: Case, repeats: int) -> Seconds:
    """One site's round: seconds of each repeat, set-up, peak of the first, bytes of its messages."""
    everybody = cohort(case.num_sites)
    vector = normal(case.size)
    grid = grid_for(8.0 * case.num_sites, case.num_sites, case.ring_bits)
    context = context_of(everybody.members, case, "names")
    name = context.names[context.graph.holders[len(context.graph.holders) // 2]]  # a holder: it also unmasks
    alive = context.names[case.num_dropped :]
    if name not in alive:
        raise RuntimeError(f"expected {name} among the alive: choose another cohort")
    role = SiteRole(name, everybody.keys[name], CAMPAIGN, 2)
    keys = _setup_seconds(everybody, role, case, alive)

    def one(round_id: str) -> tuple[int, int]:
        fresh = context_of(everybody.members, case, round_id)
        upload = role.upload(fresh, Rounding(vector, [(case.size, grid)]), [1000])
        pads = role.unmask(fresh, alive)
        vector_bytes = sum(map(len, upload.segments))
        rest = (upload.scalars, upload.shares, upload.checks, pads)
        return vector_bytes, sum(part.nbytes for part in rest)

    seconds = []
    for repeat in range(repeats):
        with Peak() as peak:
            taken, (vector_bytes, small_bytes) = timed(one, f"r{repeat}")
        seconds.append(round(taken, 4))
        if repeat == 0:
            peak_bytes = peak.bytes
    members = json.dumps([member.model_dump() for member in everybody.members])
    return {
        "seconds": seconds,
        "setup_seconds": round(keys, 4),
        "peak_bytes": peak_bytes,
        "vector_bytes": vector_bytes,
        "bytes_up": vector_bytes + small_bytes,
        "bytes_down": len(json.dumps(alive)),
        "setup_bytes_down": len(members),
    }


def _setup_seconds(everybody: Cohort, role: SiteRole, case: Case, alive: tuple[str, ...]) -> float:
    """Make and sign a key, check all others' signatures, agree: a first tiny round, less a second with the keys in hand."""
    identity = Identity(everybody.members[0].site, Ed25519PrivateKey.generate())

    def make() -> None:
        Member.create(identity, CAMPAIGN, X25519PrivateKey.generate().public_key().public_bytes_raw().hex(), 1)

    def check() -> None:
        for member in everybody.members:
            member.check(everybody.roster, CAMPAIGN)

    def tiny(round_id: str) -> None:
        context = context_of(everybody.members, replace(case, size=1), round_id)
        role.upload(context, lambda _, out: out.fill(0), [1])
        role.unmask(context, alive)

    return timed(make)[0] + timed(check)[0] + max(0.0, timed(tiny, "first")[0] - timed(tiny, "second")[0])


def server(case: Case, repeats: int) -> Seconds:
    """The server's round: seconds of each repeat, peak of the first."""
    seconds = []
    with Sites(case.num_sites) as sites:
        members = sites.members
        for repeat in range(repeats):
            one = run_round(sites, members, case, f"r{repeat}")
            seconds.append(round(one.server_seconds, 4))
            if repeat == 0:
                peak_bytes = one.server_peak_bytes
    return {"seconds": seconds, "peak_bytes": peak_bytes}


class Runs:
    """Measures each role of each case once, or in turns; Flower's only once for all widths."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, Case], Seconds] = {}

    def of(self, role: str, work: Callable[[Case, int], Seconds], case: Case) -> Seconds:
        """What was measured before, or now."""
        if (role, case) not in self._kept:
            self._kept[role, case] = self._once(role, work, case)
        return self._kept[role, case]

    def again(self, role: str, work: Callable[[Case, int], Seconds], case: Case) -> None:
        """Add one more turn's seconds."""
        more = self._once(role, work, case)
        self._kept[role, case]["seconds"] += more["seconds"]

    def _once(self, role: str, work: Callable[[Case, int], Seconds], case: Case) -> Seconds:
        found = alone(work, case, repeats_of(role, case))
        print(f"{role:14} {asdict(case)} {found['seconds']} s", flush=True)
        return found


def line(runs: Runs, case: Case) -> dict[str, Any]:
    """One flat record."""
    largest = case.size >= LARGEST
    ours = runs.of("client", client, case) if case.num_sites != 4 or not largest else None
    plain = replace(case, ring_bits=32)
    theirs = runs.of("flower client", flower_secagg.client, replace(plain, num_dropped=0)) if ours else None
    our_server = runs.of("server", server, case)
    their_server = None if largest else runs.of("flower server", flower_secagg.server, plain)
    context = context_of(cohort(case.num_sites).members, case, "r")
    found: dict[str, Any] = {
        "d": case.size,
        "n": case.num_sites,
        "degree": context.quorum.degree,
        "ring_bits": case.ring_bits,
        "dropped": case.num_dropped,
        "exchanges": 2,
        "flower_exchanges": 4,
        "server_seconds": median(our_server["seconds"]),
        "server_peak_over_vector": round(our_server["peak_bytes"] / (case.size * context.ring.dtype.itemsize), 3),
        "server_peak_mb": round(our_server["peak_bytes"] / 1e6, 1),
    }
    if ours and theirs:
        found |= {
            "client_seconds": median(ours["seconds"]),
            "flower_client_seconds": median(theirs["seconds"]),
            "client_ratio": _ratio(theirs["seconds"], ours["seconds"]),
            "client_peak_over_upload": round(ours["peak_bytes"] / ours["bytes_up"], 3),
            "client_peak_mb": round(ours["peak_bytes"] / 1e6, 1),
            "flower_client_peak_over_upload": round(theirs["peak_bytes"] / theirs["bytes_up"], 3),
            "flower_client_peak_mb": round(theirs["peak_bytes"] / 1e6, 1),
            "upload_bytes": ours["bytes_up"],
            "flower_upload_bytes": theirs["bytes_up"],
            "upload_ratio": round(ours["bytes_up"] / theirs["bytes_up"], 4),
            "bytes_down": ours["bytes_down"],
            "flower_bytes_down": theirs["bytes_down"],
            "setup_bytes_down": ours["setup_bytes_down"],
            "setup_seconds": ours["setup_seconds"],
            "flower_setup_seconds": theirs["setup_seconds"],
        }
    if their_server:
        found |= {
            "flower_server_seconds": median(their_server["seconds"]),
            "server_ratio": _ratio(their_server["seconds"], our_server["seconds"]),
            "flower_server_peak_over_vector": round(their_server["peak_bytes"] / (8 * case.size), 3),
            "flower_server_peak_mb": round(their_server["peak_bytes"] / 1e6, 1),
            "flower_server_scaled_by": their_server["scaled_by"],
        }
    return found


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return round(float(np.median(theirs) / np.median(ours)), 2)


def _spread(theirs: list[float], ours: list[float]) -> list[float]:
    """Smallest and largest ratio of any of theirs over any of ours."""
    return [round(min(theirs) / max(ours), 2), round(max(theirs) / min(ours), 2)]


def mask_loop(turns: int = 9) -> dict[str, float]:
    """Bytes of key stream per CPU second: ten streams added to 1e7 numbers, against AES-256-CTR alone within the cache."""
    size, streams = 10 * MILLION, 10
    total = Ring(32).zeros(size)
    keys = [(bytes([at]) * 32, at % 2 == 1) for at in range(streams)]
    encryptor = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = memoryview(bytes(CHUNK_BYTES)), bytearray(CHUNK_BYTES + 15)
    count = streams * total.nbytes // CHUNK_BYTES

    def raw() -> None:
        for _ in range(count):
            encryptor.update_into(zeros, buffer)

    ours, alone_in_cache = [], []
    for _ in range(turns):
        alone_in_cache.append(count * CHUNK_BYTES / timed(raw)[0])
        ours.append(streams * total.nbytes / timed(add_streams, total, Ring(32), keys)[0])
    ratios = [one / other for one, other in zip(ours, alone_in_cache, strict=True)]
    return {
        "mask_loop_ratio": round(float(np.median(ratios)), 3),
        "mask_loop_ratio_min": round(min(ratios), 3),
        "mask_loop_ratio_max": round(max(ratios), 3),
        "mask_loop_gb_per_second": round(float(np.median(ours)) / 1e9, 2),
        "aes_ctr_gb_per_second": round(float(np.median(alone_in_cache)) / 1e9, 2),
    }


def mean_errors(num_sites: int = 10, size: int = MILLION) -> dict[str, float]:
    """Relative L2 error of the mean of ``num_sites`` normal vectors, by width; a site's range is -8 ... 8, as Flower's."""
    vectors = [normal(size, seed) for seed in range(num_sites)]
    mean = np.mean([vector.astype(np.float64) for vector in vectors], axis=0)
    found = {}
    for bits in (32, 24, 16):
        grid = grid_for(8.0, num_sites, bits)
        total = grid.ring.zeros(size)
        for vector in vectors:
            one, rounding = grid.ring.zeros(size), Rounding(vector, [(size, grid)])
            for start in range(0, size, grid.ring.chunk):
                rounding(start, one[start : start + grid.ring.chunk])
            total += one
        found[f"w{bits}"] = _error(grid.from_ring(grid.ring.reduce(total)) / num_sites, mean)
    few = vectors[0][:1000], vectors[1][:1000], vectors[2][:1000]
    found["flower_3_sites"] = _error(flower_secagg.mean_of(few, 0), np.mean([one.astype(np.float64) for one in few], axis=0))
    return found


def _error(found: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> float:
    error = float(np.linalg.norm(found - true) / np.linalg.norm(true))
    return round(error, 2 - math.floor(math.log10(error)))


def targets(runs: Runs, lines: list[dict[str, Any]], loop: dict[str, float]) -> list[dict[str, Any]]:
    """What is demanded beside what was measured; ``met`` by the median."""
    by_case = {Case(one["d"], one["n"], one["dropped"], one["ring_bits"]): one for one in lines}
    found: list[dict[str, Any]] = [{"name": "mask loop over AES-CTR", "at_least": 0.65, "measured": loop["mask_loop_ratio"]}]
    demands = [("client", client, flower_secagg.client, case) for case in CLIENT_HEADLINE]
    demands += [("server", server, flower_secagg.server, case) for case in SERVER_HEADLINE]
    for (role, ours, theirs, case), demanded in zip(demands, (8.0, 13.0, 9.0, 40.0), strict=True):
        if case in by_case:
            first = runs.of(role, ours, case)["seconds"]
            second = runs.of(f"flower {role}", theirs, replace(case, ring_bits=32))["seconds"]
            ratios = {"measured": _ratio(second, first), "spread": _spread(second, first), "repeats": [len(first), len(second)]}
            found.append({"name": f"{role} {asdict(case)}", "at_least": demanded, **ratios})
    for case, key, demanded in (
        (Case(LARGEST, 10), "client_ratio", 20.0),
        (Case(10 * MILLION, 10), "upload_ratio", 0.51),
        (Case(10 * MILLION, 10, 0, 16), "upload_ratio", 0.26),
        (Case(10 * MILLION, 10), "client_peak_over_upload", 1.2),
        (Case(10 * MILLION, 10, 0, 16), "client_peak_over_upload", 1.2),
    ):
        if case in by_case:
            side = "at_least" if key.endswith("client_ratio") else "at_most"
            found.append({"name": f"{key} {asdict(case)}", side: demanded, "measured": by_case[case][key]})
    for one in found:
        one["met"] = one["measured"] >= one["at_least"] if "at_least" in one else one["measured"] <= one["at_most"]
    return found


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All numbers."""
    started = time.monotonic()
    runs = Runs()
    errors = mean_errors()
    loop = alone(mask_loop)
    todo = cases(options.quick)
    for case in todo:
        line(runs, case)
        print(f"{time.monotonic() - started:.0f} s: {asdict(case)}", flush=True)
    for _ in range(TURNS - 1):
        for role, work, peer, headline in (
            ("client", client, flower_secagg.client, CLIENT_HEADLINE),
            ("server", server, flower_secagg.server, SERVER_HEADLINE),
        ):
            for case in headline:
                if case in todo:
                    runs.again(role, work, case)
                    if case.ring_bits == 32:
                        runs.again(f"flower {role}", peer, case)
    lines = [line(runs, case) for case in todo]
    return {"cases": lines, "targets": targets(runs, lines, loop), **loop, "relative_error_of_the_mean": errors}
