"""`python -m benchmarks.run NAME [--option value ...]`: measure, print one JSON line last, append it to results/NAME.jsonl.

A record says what was run where (commit, command, seed, machine), so that a number in the README can be traced to a line.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

NAMES = (
    "campaign_digits",
    "demo",
    "secure_sum",
    "secure_sum_scale",
    "server_memory",
    "round_overhead",
    "site_message",
    "ledger",
    "noise",
    "feature_cache",
    "dp_step",
    "dp_accuracy",
)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """What the numbers were measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    return f"{os.cpu_count()} cores, {model}"


def commit() -> str:
    """The commit, with a plus when the tree has changes that are not in it (results aside)."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ":!benchmarks/results"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seeds", type=int, default=5, help="how many partitions (campaign_digits)")
    parser.add_argument("--sizes", type=int, nargs="*", help="other numbers of sites (secure_sum_scale, server_memory)")
    parser.add_argument("--quick", action="store_true", help="small cases only (secure_sum)")
    parser.add_argument("--dry", action="store_true", help="print the line, append nothing")
    options = parser.parse_args()
    started = time.time()
    measured = importlib.import_module(f"benchmarks.{options.name}").measure(options)
    record = {
        "name": options.name,
        "commit": commit(),
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        **measured,
    }
    line = json.dumps(record)
    if not options.dry:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{options.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
