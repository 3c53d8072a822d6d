"""Seconds per message at a site: a warm `urna-site run` against stock Flower, which starts `flwr-clientapp` for every message.

    ratio            the claim: stock / ours of the site's own part, medians
    site_seconds     the site's own part: from the message's arrival at the SuperNode to the whole answer lying there
    exchange_seconds what the ServerApp sees: from pushing the message to having the answer; the SuperNode's and the ServerApp's
                     waits and the SuperLink are in it, so it says what the shorter waits of our SuperNode bring, too
    idle_percent     of one core, over 30 seconds without a message, a minute after the last one

One SuperLink with TLS and node authentication, on loopback, and two sites of the same digits, each with a SuperNode: one as
`urna-site up` starts it, one as Flower's documentation does (`--isolation subprocess`). Both run the same Urna on the same
signed and sealed request: a hello of another campaign every time, so that no answer comes from the ledger. Sites take turns;
first messages (the runner's imports, the first of each bundle) are left out. The SuperNodes' logs, at level DEBUG, have the
times.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Flower is imported late
    from flwr.app import RecordDict

    from tests.e2e.superlink import LoopbackFederation

NUM_MESSAGES, NUM_WARM_UP = 20, 2
IDLE_AFTER_SECONDS, IDLE_SECONDS = 75.0, 30.0
OURS, STOCK = "site-1", "site-2"
PLAN = {
    "name": "digits",
    "task": {"num_classes": 10},
    "candidates": [{"name": "pixels"}, {"name": "rff"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 1797, "virtual": {"dataset": "digits", "num_sites": 3}},
    "final": {"num_rounds": 2, "sample_rate": 0.25, "learning_rate": 0.05},
}
ARRIVED, STORED, DONE = "Receiving: ", "Runtime.PushObject", "Runtime.PushTaskOutput"


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes them
    """Time messages at two sites in turn; see the module's docstring."""
    from tests.e2e.postman import posted, write_bundle
    from tests.e2e.superlink import federation
    from urna.embedded import prepare
    from urna.models.pretrain import pretrain
    from urna.protocol.plan import Plan

    plan = Plan.model_validate(PLAN)
    for entry in plan.candidates:
        pretrain(entry.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder / "sites", plan)
        (folder / "link").mkdir()
        with federation(folder / "link") as link:
            nodes = _join(link, folder / "sites" / "sites")
            exchanges: dict[str, list[float]] = {site: [] for site in nodes}
            with posted(link, *write_bundle(folder)) as postman:
                for number in range(NUM_WARM_UP + NUM_MESSAGES):
                    for site in sorted(nodes, reverse=number % 2 == 1):
                        answer = postman.ask(nodes[site], _hello(folder / "sites", site, plan, f"run-{number}"))
                        if answer.record is None:
                            raise RuntimeError(f"{site} did not answer: {answer.reason}")
                        exchanges[site].append(answer.seconds)
                time.sleep(2)  # the last lines of the logs
                parts = {site: _site_parts(log) for site, log in _logs(link, folder).items()}
                load = round(os.getloadavg()[0], 1)
            idle = _idle(link)
    ours, stock = (_line(parts[site], exchanges[site]) for site in (OURS, STOCK))
    return {
        "messages": NUM_MESSAGES,
        "ratio": round(_median(parts[STOCK]) / _median(parts[OURS]), 1),
        "exchange_ratio": round(_median(exchanges[STOCK]) / _median(exchanges[OURS]), 1),
        "ours": ours,
        "stock": stock,
        "idle_percent": idle,
        "load_average": load,
    }


def _join(link: "LoopbackFederation", sites: Path) -> dict[str, int]:
    """Start both sites; the node id of each."""
    from tests.e2e.superlink import NAME

    os.environ["FLWR_LOG_LEVEL"] = "DEBUG"
    link.keep.add("FLWR_LOG_LEVEL")
    nodes = {OURS: link.join_by_runner(OURS, sites / OURS)}
    link.join(STOCK, sites / STOCK)
    link.keep.discard("FLWR_LOG_LEVEL")
    listed = json.loads(link.flwr("supernode", "list", NAME, "--format", "json"))["nodes"]
    (nodes[STOCK],) = {int(one["node-id"]) for one in listed} - {nodes[OURS]}
    return nodes


def _hello(folder: Path, site: str, plan: object, campaign: str) -> "RecordDict":
    from urna.models.loading import artefact_sha256
    from urna.protocol.identity import OPERATOR, OPERATOR_KEY_FILE, ROSTER_FILE, load_identity, load_roster
    from urna.protocol.messages import HelloRequest, signed
    from urna.protocol.plan import Plan
    from urna.protocol.sealing import seal, to_record

    assert isinstance(plan, Plan)
    operator = load_identity(OPERATOR, folder / OPERATOR_KEY_FILE)
    request = HelloRequest(
        campaign=campaign,
        plan_sha256=plan.sha256,
        stage="hello",
        request_id=f"{campaign}/hello",
        plan_json=plan.model_dump_json(),
        models={entry.name: artefact_sha256(entry.name) for entry in plan.candidates},
        graph_commitment="ab" * 32,
    )
    return to_record(seal(operator, load_roster(folder / ROSTER_FILE), signed(operator, request), {site: None}))


def _logs(link: "LoopbackFederation", folder: Path) -> dict[str, Path]:
    from urna.client.supervisor import SUPERNODE_FOLDER, SUPERNODE_LOG

    return {OURS: folder / "sites" / "sites" / OURS / SUPERNODE_FOLDER / SUPERNODE_LOG, STOCK: link.folder / f"{STOCK}.log"}


def _site_parts(log: Path) -> list[float]:
    """Seconds from arrival to answer of each message that counts."""
    arrived, stored, seconds = None, None, []
    for line in log.read_text("utf-8", errors="replace").splitlines():
        found = re.search(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})", line)
        if found is None:
            continue
        at = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
        if ARRIVED in line:
            arrived, stored = at, None
        elif STORED in line:
            stored = at
        elif DONE in line and arrived is not None and stored is not None:
            seconds.append((stored - arrived).total_seconds())
            arrived = None
    if len(seconds) != NUM_WARM_UP + NUM_MESSAGES:
        raise RuntimeError(f"expected {NUM_WARM_UP + NUM_MESSAGES} messages in {log.name}, found {len(seconds)}")
    return seconds


def _line(parts: list[float], exchanges: list[float]) -> dict[str, object]:
    def short(values: list[float]) -> list[float]:
        return [round(one, 3) for one in (min(values), max(values))]

    counted, seen = parts[NUM_WARM_UP:], exchanges[NUM_WARM_UP:]
    return {
        "site_seconds": round(_median(parts), 4),
        "site_seconds_range": short(counted),
        "exchange_seconds": round(_median(exchanges), 3),
        "exchange_seconds_range": short(seen),
    }


def _median(values: list[float]) -> float:
    return statistics.median(values[NUM_WARM_UP:])


def _idle(link: "LoopbackFederation") -> dict[str, float]:
    """Processor time of both sites' processes when nothing happens, in percent of a core."""
    time.sleep(IDLE_AFTER_SECONDS)
    families = {site: _family(link.processes[site].pid) for site in (OURS, STOCK)}
    before = {pid: _cpu_seconds(pid) for family in families.values() for pid in family}
    time.sleep(IDLE_SECONDS)
    return {
        ("ours" if site == OURS else "stock"): round(
            100 * sum(_cpu_seconds(pid) - before[pid] for pid in family) / IDLE_SECONDS, 2
        )
        for site, family in families.items()
    }


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    pairs = list(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    family = [pid]
    for one in family:
        family += [child for child, parent in pairs if parent == one]
    return family


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
