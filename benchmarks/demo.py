"""What a newcomer waits for: wall seconds and peak memory of `make demo` after installation, candidates built anew."""

import argparse
import json
import os
import re
import secrets
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.5


def memory_bytes(marker: str) -> int:
    """Proportional set size of every process that inherited ``marker`` in its environment (Ray's daemons too)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() not in (process / "environ").read_bytes():
                continue
            rollup = (process / "smaps_rollup").read_text()
        except OSError:  # it ended meanwhile
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        total += int(found.group(1)) * 1024 if found else 0
    return total


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes the options
    """Run `make demo` with an empty cache and an empty folder of runs."""
    with tempfile.TemporaryDirectory() as folder:
        token = secrets.token_hex(8)
        environment = os.environ | {
            "URNA_BENCHMARK": token,
            "URNA_CACHE_DIR": f"{folder}/cache",
            "URNA_RUNS_DIR": f"{folder}/runs",
        }
        started = time.monotonic()
        process = subprocess.Popen(
            ["make", "demo"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, memory_bytes(f"URNA_BENCHMARK={token}"))
            time.sleep(SAMPLE_SECONDS)
        wall_seconds = time.monotonic() - started
        assert process.stdout is not None
        output = process.stdout.read().decode()
        if process.returncode:
            raise SystemExit(f"make demo ended with code {process.returncode}:\n{output[-2000:]}")
        (report,) = Path(folder, "runs").glob("*/report.json")
        accuracy = json.loads(report.read_text())["accuracy"]
    return {"wall_seconds": round(wall_seconds, 1), "peak_memory_mb": round(peak / 1e6), "accuracy": accuracy, "seed": 0}
