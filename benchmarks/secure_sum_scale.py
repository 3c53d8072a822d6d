"""One round of the secure sum with 100, 1,000 and 10,000 sites, each of them run: what grows, and how fast.

1e5 numbers of 32 bits and one scalar; 5 % of the sites drop out before they upload; up to 32 sites everybody is joined to
everybody, above to 32 others. The sites work one after another in one process, the server in another: its peak is its own.

Seconds are CPU seconds, each measured on its own; a site's set-up is the agreement on all pair keys that its uploads need.
A site's context (names, digest and graph of the whole cohort) is computed once in the sites' process, so it is told apart
(``context_seconds``, measured at the server): every site pays it, too. ``holder_unmask_seconds`` has pair keys in hand.
``exponents``: least squares on the logarithms of seconds or bytes against those of N.
"""

import argparse
import json
import statistics
from typing import Any

import numpy as np

from benchmarks.rounds_in_memory import Case, Round, Sites, alone, run_round

SIZE = 100_000
SIZES = (100, 1_000, 10_000)
DROPPED = 0.05


def one_round(num_sites: int) -> dict[str, Any]:
    """What one round took."""
    case = Case(SIZE, num_sites, int(DROPPED * num_sites))
    with Sites(num_sites) as sites:
        members = sites.members
        measured = run_round(sites, members, case, "round")
    return {"n": num_sites, "dropped": case.num_dropped, "d": SIZE, **_figures(measured, case)} | {
        "setup_bytes_down": len(json.dumps([member.model_dump() for member in members]))
    }


def _figures(measured: Round, case: Case) -> dict[str, Any]:
    vector_bytes = 4 * case.size
    return {
        "site_setup_seconds": _mean(measured.agree_seconds),
        "site_upload_seconds": _mean(measured.upload_seconds),
        "site_upload_seconds_max": round(max(measured.upload_seconds), 5),
        "holder_unmask_seconds": _mean(measured.unmask_seconds),
        "context_seconds": round(measured.context_seconds, 5),
        "server_add_seconds": round(measured.add_seconds, 4),
        "server_close_seconds": round(measured.close_seconds, 4),
        "server_open_seconds": round(measured.open_seconds, 4),
        "server_total_seconds": round(measured.total_seconds, 4),
        "server_seconds": round(measured.server_seconds, 4),
        "server_seconds_per_site": round(measured.server_seconds / case.num_sites, 6),
        "server_peak_mb": round(measured.server_peak_bytes / 1e6, 1),
        "bytes_up": vector_bytes + measured.small_upload_bytes,
        "bytes_up_of_a_holder": vector_bytes + measured.small_upload_bytes + measured.answer_bytes,
        "bytes_down": len(json.dumps(measured.alive)),
        "vector_bytes": vector_bytes,
    }


def _mean(values: list[float]) -> float:
    return round(statistics.mean(values), 5)


def exponent(lines: list[dict[str, Any]], key: str) -> float:
    """Of the growth of ``key`` with N."""
    slope = np.polyfit(np.log([one["n"] for one in lines]), np.log([max(one[key], 1e-6) for one in lines]), 1)[0]
    return round(float(slope), 2)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All numbers of sites."""
    lines = []
    for num_sites in options.sizes or SIZES:
        lines.append(alone(one_round, num_sites))
        print(lines[-1], flush=True)
    keys = [key for key in lines[0] if key.endswith("seconds")]
    keys += ["server_peak_mb", "bytes_up", "bytes_up_of_a_holder", "bytes_down"]
    return {"rounds": lines, "exponents": {key: exponent(lines, key) for key in keys} if len(lines) > 1 else {}}
