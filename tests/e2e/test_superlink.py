import json
import re
import shlex
import ssl
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import urna
from tests.e2e.superlink import NAME, LoopbackFederation, federation
from urna.client.config import Vault
from urna.client.ledger import Ledger
from urna.client.local_log import LOG_FILE
from urna.client.vault import open_ledger
from urna.embedded import prepare
from urna.models.pretrain import pretrain
from urna.privacy.accounting import epsilon_of_rows
from urna.protocol.errors import BadInputError, RunError, UrnaError
from urna.protocol.identity import OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, Identity, Roster
from urna.protocol.messages import Statement
from urna.protocol.plan import Plan
from urna.server.deployed import APP_DIR, begin_deployed, launch
from urna.server.journal import Journal

SITES = ("site-1", "site-2", "site-3")
PLAN = {
    "name": "digits",
    "task": {"num_classes": 10},
    "candidates": [{"name": "pixels"}, {"name": "rff"}, {"name": "cnn"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 1797, "round_timeout_seconds": 120},
    "ballot": {"if_undecided": "prior"},
    "final": {"num_rounds": 2, "sample_rate": 0.25, "learning_rate": 0.05},
    "evaluation": {"num_curve_points": 0},
}


@dataclass(frozen=True)
class Deployed:
    """A federation whose three sites are up, and what the operator holds."""

    link: LoopbackFederation
    folder: Path  # the operator's key and roster, and each site's folder
    plan: Plan

    def begin(self, name: str) -> Path:
        """Begin a run of the plan."""
        run_dir = self.folder / "runs" / name
        begin_deployed(run_dir, self.plan, NAME, self.folder / OPERATOR_KEY_FILE, self.folder / ROSTER_FILE)
        return run_dir

    def ledger_of(self, site: str) -> Ledger:
        """What a site has spent."""
        return open_ledger(self.folder / SITES_DIR / site, Vault())


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    plan = Plan.model_validate(PLAN)
    for entry in plan.candidates:
        pretrain(entry.name)
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "runs").mkdir()
    virtual = {"dataset": "digits", "num_sites": len(SITES)}
    prepare(folder, Plan.model_validate(PLAN | {"federation": plan.federation.model_dump() | {"virtual": virtual}}))
    with federation(tmp_path_factory.mktemp("link")) as link, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(link.home("operator")))
        for site in SITES[:2]:
            link.join_by_runner(site, folder / SITES_DIR / site)
        link.join(SITES[2], folder / SITES_DIR / SITES[2])  # stock Flower
        yield Deployed(link, folder, plan)


@pytest.fixture(scope="module")
def finished(deployed: Deployed) -> Path:
    """The folder of a run that went through."""
    run_dir = deployed.begin("first")
    try:
        launch(run_dir)
    except UrnaError as error:
        logs = [deployed.folder / SITES_DIR / site / LOG_FILE for site in SITES]
        error.add_note("\n".join(f"{log}:\n{log.read_text('utf-8')[-2000:]}" for log in logs if log.is_file()))
        raise
    return run_dir


def test_campaign_on_a_real_superlink_with_tls_and_node_authentication(deployed: Deployed, finished: Path) -> None:
    journal = Journal.read(finished)
    entries = {entry.key: entry.value for entry in journal.entries()}
    journal.close()
    assert entries["finished"]["winner"] in {entry.name for entry in deployed.plan.candidates}
    assert all(value["opened"] and not value["dropped"] for key, value in entries.items() if key.startswith("round/"))
    assert {"round/ballot/1", "round/final/1", "round/final/2", "round/evaluation/final/1"} <= set(entries)
    assert tuple(entries["statements"]) == SITES
    for site, value in entries["statements"].items():
        statement = Statement.model_validate(value)
        rows = deployed.ledger_of(site).rows(finished.name)
        assert statement.rows == rows
        assert statement.epsilon == epsilon_of_rows(rows, deployed.plan.privacy.delta)
        assert 0.9 * deployed.plan.privacy.epsilon < statement.epsilon <= deployed.plan.privacy.epsilon


@pytest.mark.usefixtures("finished")
def test_what_was_sent_holds_no_code_and_every_member_resolved_the_installed_package(deployed: Deployed) -> None:
    for member in SITES[:2]:  # a runner unpacks nothing
        assert not list(deployed.link.home(member).rglob("apps"))
        assert not list((deployed.folder / SITES_DIR / member).rglob("apps"))
    for member in ("superexec", SITES[2]):
        (bundle,) = (deployed.link.home(member) / "apps").iterdir()
        files = {path.name for path in bundle.rglob("*") if path.is_file()}
        assert files <= {"pyproject.toml", "CONTENT"}
        # Flower puts the bundle first on sys.path; with nothing in it, the member's Python finds what is installed
        script = f"import sys; sys.path.insert(0, {str(bundle)!r}); from importlib.util import find_spec"
        script += "; print(find_spec('urna.server.app').origin, find_spec('urna.client.app').origin, sep='\\n')"
        found = subprocess.check_output(
            [sys.executable, "-c", script], env=deployed.link.environment(member), cwd=deployed.link.home(member), text=True
        )
        installed = Path(urna.__file__).parent
        assert [Path(line) for line in found.splitlines()] == [installed / "server" / "app.py", installed / "client" / "app.py"]


def test_the_bundle_is_two_names(tmp_path: Path) -> None:
    flwr = LoopbackFederation(tmp_path, port=0)
    flwr.flwr("build", "--app", str(APP_DIR))
    (built,) = flwr.home("operator").glob("*.fab")
    with zipfile.ZipFile(built) as bundle:
        assert sorted(bundle.namelist()) == [".info/CONTENT", "pyproject.toml"]
        sent = tomllib.loads(bundle.read("pyproject.toml").decode())
    assert sent["project"]["dependencies"] == []
    assert sent["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "urna.server.app:app",
        "clientapp": "urna.client.app:app",
    }


@pytest.mark.usefixtures("finished")
def test_the_operator_reads_in_one_line_that_spent_budgets_refuse(deployed: Deployed) -> None:
    before = [deployed.ledger_of(site).rows() for site in SITES]
    run_dir = deployed.begin("second")
    command = [sys.executable, "-P", "-m", "urna.server.deployed", str(run_dir)]  # as `urna run` starts it
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=deployed.link.environment("operator")) as engine:
        code = engine.wait(timeout=120)
    text = (run_dir / "error.txt").read_text("utf-8")
    assert code == 3, text
    assert text.startswith("the plan needs 3 sites, found 0: site-1 refused: ")
    assert len(text.splitlines()) == 1
    assert [deployed.ledger_of(site).rows() for site in SITES] == before


def test_supernode_without_a_registered_key_is_refused(deployed: Deployed) -> None:
    key = deployed.link.create_key("stranger")
    stranger = deployed.link.start_supernode("stranger", key, deployed.folder / SITES_DIR / "site-1")
    assert stranger.wait(timeout=60) != 0
    assert "Failed to activate SuperNode" in deployed.link.log("stranger")
    nodes = json.loads(deployed.link.flwr("supernode", "list", NAME, "--format", "json"))["nodes"]
    assert len(nodes) == len(SITES)


def test_superlink_speaks_to_nobody_in_the_clear(deployed: Deployed) -> None:
    assert deployed.link.get("/health") == 200
    with pytest.raises(OSError, match=r"closed connection|reset"):
        deployed.link.get("/health", scheme="http")
    address = f"https://127.0.0.1:{deployed.link.port}/health"
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(address, timeout=10, context=ssl.create_default_context())


def test_superlink_gives_no_task_to_who_does_not_know_the_superexec_secret(deployed: Deployed) -> None:
    request = urllib.request.Request(
        f"https://127.0.0.1:{deployed.link.port}/v1/runtime/acquire-task",
        data=b"",
        headers={"Content-Type": "application/protobuf"},
    )
    context = ssl.create_default_context(cafile=str(deployed.link.ca))
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(request, timeout=10, context=context)
    refused.value.close()


def test_the_documented_commands_are_the_tested_ones(deployed: Deployed) -> None:
    documented = documented_blocks("sh").replace("\\\n", " ").splitlines()
    for member in ("superlink", "superexec", "site-3"):
        command = deployed.link.processes[member].args
        assert isinstance(command, tuple)
        (line,) = [shlex.split(line) for line in documented if line.startswith(f"{command[0]} ")]
        assert {word for word in line if word.startswith("--")} == {word for word in command if word.startswith("--")}


def test_the_documented_keys_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(documented_blocks("python"), {})
    (operator,) = capsys.readouterr().out.split()
    site = Identity("hospital-a", Ed25519PrivateKey.generate())
    assert Roster(operator=operator, sites={"hospital-a": site.public_key_hex})


def documented_blocks(language: str) -> str:
    """The fenced blocks of one language in docs/deployment.md, one after another."""
    text = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text("utf-8")
    return "".join(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def test_unknown_and_local_federations_are_refused_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    plan = Plan.model_validate(PLAN)
    with pytest.raises(BadInputError, match=r"expected the federation 'study' as \[superlink.study\] .* found none: add it"):
        begin_deployed(tmp_path / "run", plan, "study", tmp_path / "key", tmp_path / "roster")
    (tmp_path / "config.toml").write_text('[superlink.study]\naddress = ":local:"\n', encoding="utf-8")
    with pytest.raises(BadInputError, match="found a local one"):
        begin_deployed(tmp_path / "run", plan, "study", tmp_path / "key", tmp_path / "roster")
    assert not (tmp_path / "run").exists()


def test_run_that_was_begun_for_the_embedded_engine_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"begun with --federation, found no deployment\.json"):
        launch(tmp_path)
