"""The embedded engine: Flower's simulation in a process of its own, killed and resumed, as `urna run` starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from urna.client.config import Vault
from urna.client.vault import open_ledger
from urna.protocol.plan import load_plan
from urna.server.journal import Journal, is_running

ROOT = Path(__file__).parents[2]
NAMES = ("pixels", "pca", "cnn")
DEADLINE_SECONDS = 150


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    """The digits plan with few rounds and candidates."""
    text = (ROOT / "plans" / "digits.toml").read_text()
    text = text[: text.index("# The operator's prior")].replace("num_rounds = 80", "num_rounds = 12")
    path = tmp_path / "plan.toml"
    path.write_text(text + "".join(f'[[candidates]]\nname = "{name}"\n' for name in NAMES))
    load_plan(path)
    return path


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    command = [str(Path(sys.executable).parent / "urna"), *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run_dir: Path, key: str) -> None:
    """Until the run's journal has an entry of this key."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if (run_dir / "engine.pid").is_file():  # written when the journal is begun and the engine started
            journal = Journal.read(run_dir)
            found = journal.find(key)
            journal.close()
            if found is not None:
                return
        time.sleep(0.02)
    raise AssertionError(f"{key} was not reached in {DEADLINE_SECONDS} s")


def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, output


def test_killed_in_a_round_the_run_resumes_to_a_report_and_spends_nothing_twice(tmp_path: Path, plan_path: Path) -> None:
    plan = load_plan(plan_path)
    run_dir = tmp_path / "runs" / "killed"
    process = start("run", str(plan_path), "--name", "killed", cwd=tmp_path)
    try:
        wait_for(run_dir, "round/ballot/1")  # in the first rounds of training, whichever candidates they are of
        os.kill(int((run_dir / "engine.pid").read_text()), signal.SIGKILL)
        code, output = finished(process)
    finally:
        process.kill()
    assert code == 4, output
    assert "urna resume runs/killed` goes on from the journal" in output
    assert not is_running(run_dir)

    process = start("resume", "runs/killed", cwd=tmp_path)
    try:
        code, output = finished(process)
    finally:
        process.kill()
    assert code == 0, output

    report = json.loads((run_dir / "report.json").read_text())
    assert report["winner"] in NAMES
    assert report["resumed"] == 1
    journal = Journal.read(run_dir)
    rounds = [entry for entry in journal.entries() if entry.kind == "round"]
    journal.close()
    releases = sum(entry.value["count"] for entry in rounds)
    for site in sorted((run_dir / "sites").iterdir()):
        ledger = open_ledger(site, Vault())
        assert sum(row.count for row in ledger.rows()) == releases
        ledger.close()
    for name, spent in report["epsilon_spent"]["sites"].items():
        assert spent["total"] <= plan.privacy.epsilon, name
    required = {"ranking", "undecided", "accuracy", "accuracy_stderr", "macro_f1", "epsilon_planned", "rounds", "dropouts"}
    assert required | {"seconds", "versions"} <= set(report)

    labels = predictions(tmp_path)
    assert len(labels) == 3
    assert all(0 <= int(line.split("\t")[0]) <= 9 for line in labels)


def predictions(cwd: Path) -> list[str]:
    """`urna predict` on three digits of a CSV file, as an operator would."""
    with (cwd / "runs" / "killed" / "sites" / "site-1" / "records.csv").open() as source:
        (cwd / "images.csv").write_text("".join(source.readline() for _ in range(4)))
    process = start("predict", "runs/killed", "--input", "images.csv", "--max-value", "16", cwd=cwd)
    code, output = finished(process)
    assert code == 0, output
    return output.splitlines()


def test_the_engine_ends_with_the_command_that_started_it(tmp_path: Path, plan_path: Path) -> None:
    run_dir = tmp_path / "runs" / "orphan"
    process = start("run", str(plan_path), "--name", "orphan", cwd=tmp_path)
    try:
        wait_for(run_dir, "start/1")
    finally:
        process.kill()  # it cannot say goodbye to its engine
        process.communicate()
    deadline = time.monotonic() + 20
    while is_running(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(run_dir)
    shutil.rmtree(run_dir)
