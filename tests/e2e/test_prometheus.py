"""A real Prometheus scrapes a real monitor, and every panel of the dashboard asks it: one that shows nothing is a fault."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulator import Federation
from tests.system_tools import require
from urna.protocol.messages import Envelope
from urna.protocol.plan import Plan, load_plan
from urna.server.journal import Journal
from urna.server.metrics import serve

ROOT = Path(__file__).parents[2]
PROMETHEUS_DIR = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "urna.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"$run": ".*", "$__rate_interval": "1m", "$__range": "1h", "$__interval": "5s"}


def small_plan() -> Plan:
    """The digits plan with three candidates and three final rounds."""
    plan = load_plan(ROOT / "plans" / "digits.toml").model_dump()
    plan["candidates"] = [{"name": name} for name in ("cnn", "rff", "pixels")]
    plan["final"] |= {"num_rounds": 3}
    plan["runoff"] |= {"num_rounds": 1}
    plan["evaluation"] |= {"num_curve_points": 1}
    return Plan.model_validate(plan)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: a finished one in which site-3 fell silent once, and the same, ended by somebody half way."""
    federation = Federation(tmp_path_factory.mktemp("work") / "digits-1", small_plan())
    failed: list[str] = []

    def silent_once(route: str, reply: Envelope) -> Envelope | None:
        if route == "train" and not failed:
            failed.append(route)
            return None
        return reply

    federation.faults["site-3"] = silent_once
    federation.run()
    assert failed
    runs = tmp_path_factory.mktemp("runs")
    journal = Journal.read(federation.run_dir)
    entries = journal.entries(with_arrays=True)
    journal.close()
    for name, kept in (("digits-1", len(entries)), ("digits-2", len(entries) // 2)):
        copy = Journal.open_for_writing(runs / name)
        for entry in entries[:kept]:
            copy.record(entry.key, entry.value, entry.arrays)
        copy.close()
    return runs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """A server that is being asked."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["result"]
        return result

    def wait_for(self, expression: str, timeout_seconds: float = 30.0) -> list[dict[str, Any]]:
        """What the expression gives, as soon as it gives anything."""
        deadline = time.monotonic() + timeout_seconds
        while not (found := self.query(expression)) and time.monotonic() < deadline:
            time.sleep(0.25)
        return found


@pytest.fixture(scope="module")
def prometheus(runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = require("prometheus")
    work = tmp_path_factory.mktemp("prometheus")
    monitor = serve(runs_dir, port=0)
    config = (PROMETHEUS_DIR / "prometheus.yml").read_text("utf-8")
    assert config.count("127.0.0.1:9464") == 1
    config = config.replace("127.0.0.1:9464", f"127.0.0.1:{monitor.port}").replace("interval: 5s", "interval: 1s")
    (work / "prometheus.yml").write_text(config, "utf-8")
    shutil.copy(PROMETHEUS_DIR / "alerts.yml", work)
    url = f"127.0.0.1:{free_port()}"
    with (work / "log.txt").open("wb") as log:
        command = [program, f"--config.file={work}/prometheus.yml", f"--storage.tsdb.path={work}/data"]
        process = subprocess.Popen([*command, f"--web.listen-address={url}"], stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://{url}/-/ready", process, work / "log.txt")
        yield Prometheus(f"http://{url}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        monitor.close()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"prometheus did not become ready: {log.read_text('utf-8')[-2000:]}")


def asked(expression: str) -> str:
    """The expression as Grafana would send it, with every run selected."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_the_monitor_is_scraped(prometheus: Prometheus) -> None:
    assert prometheus.wait_for('up{job="urna"} == 1')
    targets = prometheus.get("/api/v1/targets")["activeTargets"]
    assert [(one["health"], one["lastError"]) for one in targets] == [("up", "")]


@pytest.mark.parametrize("panel", PANELS, ids=[f"{panel['id']}-{panel['title']}" for panel in PANELS])
def test_every_query_of_the_panel_returns_data(prometheus: Prometheus, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        found = prometheus.wait_for(asked(target["expr"]))
        assert found, f"{target['refId']}: {target['expr']}"
        if "{{" in target["legendFormat"]:
            labels = [name.split("}}")[0] for name in target["legendFormat"].split("{{")[1:]]
            assert all(name in one["metric"] for one in found for name in labels), target["legendFormat"]


def test_the_run_variable_offers_the_runs(prometheus: Prometheus) -> None:
    assert prometheus.wait_for("urna_run_info")
    assert prometheus.get("/api/v1/label/run/values", **{"match[]": "urna_run_info"}) == ["digits-1", "digits-2"]


def test_prometheus_holds_what_the_journal_says(prometheus: Prometheus, runs_dir: Path) -> None:
    journal = Journal.read(runs_dir / "digits-1")
    entries = journal.entries()
    journal.close()
    epsilon = max(one.value["epsilon"] for one in entries if one.kind == "round" and one.value["partition"] == "tuning")
    (found,) = prometheus.wait_for('max(urna_epsilon_spent{run="digits-1",partition="tuning"})')
    assert float(found["value"][1]) == epsilon
    (found,) = prometheus.wait_for('urna_dropouts_total{run="digits-1"}')
    assert (found["metric"]["site"], found["metric"]["reason"], found["value"][1]) == ("site-3", "silent", "1")


def test_every_alert_rule_is_evaluated_and_only_the_stopped_run_is_told(prometheus: Prometheus) -> None:
    assert prometheus.wait_for('ALERTS{alertname="UrnaRunStopped",run="digits-2"}')
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    assert {rule["name"] for rule in rules if rule["alerts"]} == {"UrnaRunStopped"}


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([require("promtool"), *arguments], cwd=PROMETHEUS_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
