import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric

from tests.system_tools import require
from urna.protocol.errors import BadInputError
from urna.protocol.plan import parse_plan
from urna.server.journal import JOURNAL_FILE, Entry, Journal
from urna.server.metrics import (
    ENGINES,
    FOLDERS,
    MAX_RUNS,
    Monitor,
    RunsCollector,
    serve,
    serve_forever,
)
from urna.server.run_view import PARTITIONS, REASONS, STATES

PLAN = parse_plan("""
name = "digits"
candidates = [{ name = "cnn" }, { name = "rff" }, { name = "pixels" }]
[task]
num_classes = 10
[privacy]
epsilon = 3.0
delta = 1e-5
[federation]
min_sites = 3
num_records = 1797
round_timeout_seconds = 60
[final]
num_rounds = 4
sample_rate = 0.25
learning_rate = 0.05
[evaluation]
num_curve_points = 1
""")
SITES = ("site-1", "site-2", "site-3", "site-4")
DECLARED = {"site-1": 90011, "site-2": 90023, "site-3": 90031, "site-4": 90053}  # numbers that nothing else here is made of
Facts = list[tuple[str, dict[str, Any]]]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def round_facts(key: str, epsilon: float, dropped: dict[str, str] | None = None, **more: object) -> tuple[str, dict[str, Any]]:
    stage = key.split("/")[0]
    return f"round/{key}", {
        "cohort": list(SITES),
        "dropped": dropped or {},
        "opened": not dropped,
        "seconds": 0.5,
        "stage": stage,
        "partition": "heldout" if stage == "evaluation" else "tuning",
        "epsilon": epsilon,
        **more,
    }


def counts(candidates: list[str], accuracy: list[float], stderr: list[float]) -> dict[str, Any]:
    return {
        "candidates": candidates,
        "num_records": 359.5,
        "accuracy": accuracy,
        "accuracy_stderr": stderr,
        "confusion": [[7.7]],
    }


def story() -> Facts:
    """The facts of a finished run with one lost round and a runoff."""
    standings = [
        {"name": name, "score": score, "stderr": 0.015} for name, score in (("rff", 0.02), ("cnn", 0.01), ("pixels", -0.03))
    ]
    hello = {name: {"num_records": number, "urna_version": "0.1.0"} for name, number in DECLARED.items()}
    return [
        ("run", {"plan": PLAN.model_dump(mode="json"), "plan_sha256": PLAN.sha256, "engine": "embedded", "started_at": 1000.5}),
        ("start/1", {"versions": {}}),
        ("ask/hello", {"body": "{}", "signature": "00"}),
        ("hello", {"members": hello, "others": {"site-9": "refused: operator is unknown"}}),
        ("shortlist", {"noise_multiplier": 2.5, "candidates": []}),
        round_facts("ballot/1", 1.0, {"site-2": "silent"}),
        round_facts("ballot/2", 1.2, seconds=5.0),
        ("ballot", {"opened": True, "standings": standings, "contenders": ["rff", "cnn"], "undecided": True}),
        ("schedule", {"finalists": ["rff", "cnn"], "runoff_rounds": 1, "num_releases": 5, "noise_multiplier": 2.5}),
        round_facts("runoff/rff/1", 1.4),
        round_facts("runoff/cnn/1", 1.6),
        round_facts("evaluation/runoff/1", 0.5),
        ("counts/runoff", counts(["rff", "cnn"], [0.86, 0.90], [0.02, 0.03])),
        ("decision", {"winner": "cnn", "by": "runoff", "undecided": True}),
        round_facts("final/2", 1.8, {"site-1": "refused: budget: 2.0 of 1.9 left", "site-3": "failed: ledger"}),
        round_facts("final/3", 2.0),
        round_facts("evaluation/curve-3/1", 0.9),
        ("counts/curve-3", counts(["cnn"], [0.93], [0.025])),
        round_facts("final/4", 2.2, seconds=0.25),
        ("model", {"candidate": "cnn", "steps": 4}),
        round_facts("evaluation/final/1", 1.5),
        ("counts/final", counts(["cnn"], [0.95], [0.015])),
        ("statements", {site: {"epsilon": 2.2, "rows": [], "epsilon_by_stage": {}, "delta": 1e-5} for site in SITES}),
        ("finished", {"winner": "cnn"}),
    ]


def write(run_dir: Path, facts: Iterable[tuple[str, dict[str, Any]]]) -> None:
    with closing(Journal.open_for_writing(run_dir)) as journal:
        for key, value in facts:
            journal.record(key, value)


def samples(metrics: Iterable[Metric]) -> Samples:
    return {(one.name, frozenset(one.labels.items())): one.value for metric in metrics for one in metric.samples}


def scrape(runs_dir: Path) -> Samples:
    return samples(RunsCollector(runs_dir).collect())


def runs_in(found: Samples) -> set[str]:
    return {value for _, labels in found for name, value in labels if name == "run"}


def one(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def finished(runs: Path) -> Path:
    write(runs / "digits-1", story())
    return runs


def test_values_equal_the_journal(finished: Path) -> None:
    found = scrape(finished)
    run = "digits-1"
    expected: dict[str, dict[tuple[str, ...], object]] = {
        "urna_run_info": {("plan", "digits", "engine", "embedded", "winner", "cnn"): 1},
        "urna_run_state": {("state", "finished"): 1, ("state", "running"): 0, ("state", "stopped"): 0},
        "urna_run_starts_total": {(): 1},
        "urna_run_started_timestamp_seconds": {(): 1000.5},
        "urna_progress_ratio": {(): 1},
        "urna_stage_rounds_total": {
            ("stage", "ballot", "outcome", "opened"): 1,
            ("stage", "ballot", "outcome", "lost"): 1,
            ("stage", "runoff", "outcome", "opened"): 2,
            ("stage", "final", "outcome", "opened"): 2,
            ("stage", "final", "outcome", "lost"): 1,
            ("stage", "evaluation", "outcome", "opened"): 3,
            ("stage", "evaluation", "outcome", "lost"): 0,
        },
        "urna_last_round_seconds": {("stage", "ballot"): 5.0, ("stage", "final"): 0.25},
        "urna_round_seconds_count": {("stage", "ballot"): 2},
        "urna_round_seconds_sum": {("stage", "ballot"): 5.5},
        "urna_round_timeout_seconds": {(): 60},
        "urna_member_sites": {(): 4},
        "urna_cohort_sites": {(): 4},
        "urna_delivered_sites": {(): 4},
        "urna_min_sites": {(): 3},
        "urna_dropouts_total": {
            ("site", "site-2", "reason", "silent"): 1,
            ("site", "site-1", "reason", "refused"): 1,
            ("site", "site-3", "reason", "failed"): 1,
        },
        "urna_epsilon_planned": {(): 3},
        "urna_epsilon_spent": {
            ("stage", "ballot", "partition", "tuning"): 1.2,
            ("stage", "runoff", "partition", "tuning"): 1.6,
            ("stage", "final", "partition", "tuning"): 2.2,
            ("stage", "evaluation", "partition", "heldout"): 1.5,
        },
        "urna_epsilon_left": {("partition", "tuning"): pytest.approx(0.8), ("partition", "heldout"): 1.5},
        "urna_site_epsilon": {("site", "site-4"): 2.2},
        "urna_accuracy": {
            ("purpose", "runoff", "candidate", "rff"): 0.86,
            ("purpose", "curve-3", "candidate", "cnn"): 0.93,
            ("purpose", "final", "candidate", "cnn"): 0.95,
        },
        "urna_accuracy_stderr": {("purpose", "runoff", "candidate", "cnn"): 0.03},
        "urna_accuracy_latest": {(): 0.95},
        "urna_accuracy_latest_stderr": {(): 0.015},
        "urna_ballot_score": {("candidate", "pixels"): -0.03},
        "urna_ballot_score_stderr": {("candidate", "pixels"): 0.015},
        "urna_ballot_undecided": {(): 1},
    }
    for name, by_labels in expected.items():
        for flat, value in by_labels.items():
            labels = dict(zip(flat[::2], flat[1::2], strict=True))
            assert one(found, name, run=run, **labels) == value, (name, labels)
    journal = Journal.read(finished / run)
    assert one(found, "urna_run_last_event_timestamp_seconds", run=run) == journal.entries()[-1].at
    journal.close()
    shown = {name for name, labels in found if ("run", run) in labels}
    assert shown == set(expected) | {"urna_run_last_event_timestamp_seconds"}


def test_a_run_is_running_while_a_process_holds_it_then_stopped_then_finished(runs: Path) -> None:
    def state() -> str:
        found = scrape(runs)
        (name,) = [name for name in STATES if one(found, "urna_run_state", run="digits-1", state=name)]
        return name

    journal = Journal.open_for_writing(runs / "digits-1")
    for key, value in story()[:-1]:
        journal.record(key, value)
    assert state() == "running"
    journal.close()
    assert state() == "stopped"
    write(runs / "digits-1", story()[-1:])
    assert state() == "finished"


def test_reading_on_shows_the_same_as_reading_afresh(runs: Path) -> None:
    collector = RunsCollector(runs)
    with closing(Journal.open_for_writing(runs / "digits-1")) as journal:
        for key, value in story():
            journal.record(key, value)
            again, afresh = samples(collector.collect()), scrape(runs)
            again.pop(("urna_store_read_seconds", frozenset())), afresh.pop(("urna_store_read_seconds", frozenset()))
            assert again == afresh


def test_counters_survive_a_restart_of_the_run_and_of_the_monitor(runs: Path) -> None:
    facts = story()
    write(runs / "digits-1", facts[:12])
    before = scrape(runs)
    write(runs / "digits-1", [("start/2", {"versions": {}}), *facts[12:]])
    after = scrape(runs)
    counters = [key for key in before if key[0].endswith(("_total", "_count", "_sum"))]
    assert counters
    assert all(after[key] >= before[key] for key in counters)
    assert one(after, "urna_run_starts_total", run="digits-1") == 2


def test_progress_only_grows_once_the_schedule_is_known(runs: Path) -> None:
    facts = story()
    schedule = [key for key, _ in facts].index("schedule")
    seen = []
    with closing(Journal.open_for_writing(runs / "digits-1")) as journal:
        for at, (key, value) in enumerate(facts):
            journal.record(key, value)
            if at >= schedule:
                seen.append(one(scrape(runs), "urna_progress_ratio", run="digits-1"))
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.2
    assert seen[-1] == 1


def test_a_run_that_waits_for_its_first_site_is_shown(runs: Path) -> None:
    write(runs / "digits-1", story()[:1])
    found = scrape(runs)
    assert one(found, "urna_member_sites", run="digits-1") == 0
    assert one(found, "urna_epsilon_left", run="digits-1", partition="tuning") == 3
    assert not [name for name, _ in found if name in ("urna_cohort_sites", "urna_accuracy_latest", "urna_ballot_undecided")]


def test_label_values_come_from_closed_sets_whatever_the_journal_holds(runs: Path) -> None:
    facts = dict(story())
    facts["run"]["engine"] = "patient 4711"
    facts["decision"]["winner"] = "stranger"
    facts["ballot"]["standings"][0]["name"] = "stranger"
    facts["counts/final"]["candidates"] = ["stranger"]
    facts["counts/patient-4711"] = counts(["cnn"], [0.5], [0.1])
    facts["statements"]["site-9"] = facts["statements"]["site-1"]
    why = {"site-1": "refused: patient 4711", "site-2": "answered with a patient", "site-3": "not believed", "site-9": "silent"}
    facts["round/final/2"]["dropped"] = why
    write(runs / "digits-1", facts.items())
    found = scrape(runs)
    allowed: dict[str, set[str]] = {
        "run": {"digits-1"},
        "plan": {"digits"},
        "engine": {*ENGINES, "other"},
        "winner": {"cnn", "rff", "pixels", ""},
        "state": set(STATES),
        "stage": {"ballot", "runoff", "final", "evaluation"},
        "outcome": {"opened", "lost"},
        "partition": set(PARTITIONS),
        "site": set(SITES),
        "reason": set(REASONS),
        "candidate": {"cnn", "rff", "pixels"},
        "purpose": {"runoff", "curve-3", "final"},
        "kind": set(FOLDERS),
    }
    for name, labels in found:
        for label, value in labels:
            assert value in allowed[label], (name, label, value)
    reasons = {dict(labels)["site"]: dict(labels)["reason"] for name, labels in found if name == "urna_dropouts_total"}
    assert reasons == {"site-1": "refused", "site-2": "other", "site-3": "not_believed"}


def test_no_number_of_a_single_site_is_shown_but_its_dropouts_and_its_ledgers_epsilon(finished: Path) -> None:
    found = scrape(finished)
    assert {name for name, labels in found if "site" in dict(labels)} == {"urna_dropouts_total", "urna_site_epsilon"}
    unshown = {*DECLARED.values(), 359.5, 7.7, 4.4}
    assert unshown.isdisjoint(found.values())
    registry = CollectorRegistry()
    registry.register(RunsCollector(finished))
    assert not re.search("|".join(str(number) for number in DECLARED.values()), generate_latest(registry).decode())


def _sqlite(folder: Path, *statements: str) -> None:
    folder.mkdir()
    with closing(sqlite3.connect(folder / JOURNAL_FILE)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


FOREIGN_TABLE = "CREATE TABLE entry (seq, key, at, value, arrays)"


def test_broken_and_foreign_folders_are_counted_and_never_break_a_scrape(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(name: str) -> Path:
        (finished / name).mkdir()
        return finished / name / JOURNAL_FILE

    (finished / "notes").mkdir()
    (finished / "notes.txt").write_text("no folder")
    (finished / "a name\nurna_store_up 1").mkdir()
    write(finished / "a b", story())  # a run whose folder's name is no label
    broken("bytes").write_bytes(b"\0not sqlite" * 100)
    broken("empty").touch()
    shutil.copy(finished / "digits-1" / JOURNAL_FILE, broken("cut"))
    os.truncate(finished / "cut" / JOURNAL_FILE, 5000)
    _sqlite(finished / "other-table", "CREATE TABLE t (x)")
    _sqlite(finished / "other-columns", "CREATE TABLE entry (x)")
    _sqlite(finished / "no-key", FOREIGN_TABLE, "INSERT INTO entry VALUES (1, 5, 'x', '{}', NULL)")
    _sqlite(finished / "no-json", FOREIGN_TABLE, "INSERT INTO entry VALUES (1, 'run', 1, 'x', NULL)")
    run = json.dumps(story()[0][1])
    _sqlite(finished / "no-time", FOREIGN_TABLE, f"INSERT INTO entry VALUES (1, 'run', 'never', '{run}', NULL)")
    write(finished / "no-plan", [("start/1", {})])
    write(finished / "other-plan", [("run", {"plan": {"name": "x"}, "engine": "flower", "started_at": 1.0})])
    write(finished / "other-round", [*story()[:4], ("round/final/1", {"stage": "hello"})])
    write(finished / "other-counts", [*story()[:4], ("counts/final", counts(["cnn", "rff"], [0.5], [0.1]))])
    collector = RunsCollector(finished)
    with caplog.at_level(logging.WARNING):
        found = samples(collector.collect())
        num_warnings = len(caplog.records)
        samples(collector.collect())
    assert runs_in(found) == {"digits-1"}
    assert one(found, "urna_store_up") == 1
    assert {kind: one(found, "urna_store_folders", kind=kind) for kind in FOLDERS} == {
        "read": 1,
        "older": 0,
        "unreadable": 12,
        "foreign": 3,
    }
    assert num_warnings == len(caplog.records) == 12  # each is told once, not at every scrape


def test_a_journal_that_breaks_takes_only_its_own_run_away(finished: Path) -> None:
    write(finished / "digits-2", story()[:5])
    collector = RunsCollector(finished)
    assert runs_in(samples(collector.collect())) == {"digits-1", "digits-2"}
    write(finished / "digits-2", [("round/final/1", {"nothing": "known"})])
    found = samples(collector.collect())
    assert runs_in(found) == {"digits-1"}
    assert one(found, "urna_store_folders", kind="unreadable") == 1


def test_a_run_folder_that_is_made_anew_is_read_from_its_start(runs: Path, tmp_path: Path) -> None:
    write(runs / "digits-1", story())
    collector = RunsCollector(runs)
    samples(collector.collect())
    write(tmp_path / "new", story()[:3])
    shutil.rmtree(runs / "digits-1")
    shutil.move(tmp_path / "new", runs / "digits-1")
    assert one(samples(collector.collect()), "urna_member_sites", run="digits-1") == 0


def test_only_the_newest_runs_are_shown(runs: Path) -> None:
    write(runs / "digits-00", story()[:5])
    for number in range(1, MAX_RUNS + 3):
        shutil.copytree(runs / "digits-00", runs / f"digits-{number:02}")
    for number in range(MAX_RUNS + 3):
        os.utime(runs / f"digits-{number:02}" / JOURNAL_FILE, (1000 + number, 1000 + number))
    found = scrape(runs)
    assert runs_in(found) == {f"digits-{number:02}" for number in range(3, MAX_RUNS + 3)}
    assert one(found, "urna_store_folders", kind="older") == 3


def test_a_folder_of_runs_that_is_gone_is_told_by_store_up(runs: Path) -> None:
    collector = RunsCollector(runs)
    runs.rmdir()
    found = samples(collector.collect())
    assert one(found, "urna_store_up") == 0
    assert not runs_in(found)


def test_scrapes_at_once_count_nothing_twice(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(runs / "digits-1", story()[:5])
    collector = RunsCollector(runs)
    samples(collector.collect())
    write(runs / "digits-1", story()[5:])
    together = threading.Barrier(8)
    read = Journal.entries

    def read_slowly(journal: Journal, after: int = 0) -> list[Entry]:
        entries = read(journal, after)
        time.sleep(0.02)
        return entries

    monkeypatch.setattr(Journal, "entries", read_slowly)

    def scrape_together(_: int) -> Samples:
        together.wait(timeout=10)
        return samples(collector.collect())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(scrape_together, range(8)))
    assert {one(each, "urna_stage_rounds_total", run="digits-1", stage="runoff", outcome="opened") for each in found} == {2}


def test_registering_reads_nothing(runs: Path) -> None:
    assert list(RunsCollector(runs / "nowhere").describe()) == []


def test_promtool_accepts_the_exposition(finished: Path) -> None:
    with closing(serve(finished, port=0)) as monitor:
        text = urllib.request.urlopen(monitor.url).read()
    done = subprocess.run([require("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_monitor_serves_metrics_and_a_page_and_nothing_else(finished: Path) -> None:
    with closing(serve(finished, port=0)) as monitor:
        root = monitor.url.removesuffix("/metrics")
        assert monitor.port > 0
        with urllib.request.urlopen(monitor.url) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            assert b'urna_run_starts_total{run="digits-1"} 1.0' in answer.read()
        with urllib.request.urlopen(root) as answer:
            assert b'href="/metrics"' in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{root}/digits-1/journal.sqlite")
        refused.value.close()


def test_the_monitor_listens_on_loopback_unless_told_otherwise(runs: Path) -> None:
    with closing(serve(runs, port=0)) as monitor:
        assert monitor.url == f"http://127.0.0.1:{monitor.port}/metrics"
        assert monitor._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_said_in_one_line(runs: Path) -> None:
    with closing(serve(runs, port=0)) as monitor:
        with pytest.raises(BadInputError, match=rf"found 127\.0\.0\.1:{monitor.port}: Address already in use; choose") as error:
            serve(runs, port=monitor.port)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInputError, match=r"found 127\.0\.0\.1:70000: .*0-65535"):
        serve(runs, port=70000)


def test_a_folder_of_runs_that_is_none_is_refused_at_the_start(runs: Path) -> None:
    with pytest.raises(BadInputError, match=r"expected a folder of runs at .*nowhere, found nothing"):
        serve(runs / "nowhere", port=0)


def test_ctrl_c_ends_the_monitor_and_frees_its_port(runs: Path) -> None:
    ports = []

    def ready(monitor: Monitor) -> None:
        ports.append(monitor.port)
        raise KeyboardInterrupt

    serve_forever(runs, port=0, ready=ready)
    serve(runs, port=ports[0]).close()
