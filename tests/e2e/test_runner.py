"""The site's own process on a real SuperLink and SuperNode: what is sent to a site never runs there, and it gets up by itself.

One SuperLink, two sites with `urna-site up`, one stock SuperNode beside them as the positive control, two runs.
"""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode

from tests.e2e.postman import Answer, Postman, built_sha256, posted, write_bundle
from tests.e2e.superlink import NAME, LoopbackFederation, federation
from urna.client.config import LEDGER_FILE
from urna.client.local_log import LOG_FILE
from urna.client.runner import CANNOT_ANSWER, NO_SUCH_BUNDLE
from urna.embedded import prepare
from urna.protocol.errors import FailureCode
from urna.protocol.identity import OPERATOR, OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, load_identity, load_roster
from urna.protocol.messages import Failure, check_envelope
from urna.protocol.plan import Plan
from urna.protocol.sealing import from_record, unseal

PLAN = {
    "name": "digits",
    "task": {"num_classes": 10},
    "candidates": [{"name": "pixels"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 1797, "virtual": {"dataset": "digits", "num_sites": 3}},
    "final": {"num_rounds": 2, "sample_rate": 0.25, "learning_rate": 0.05},
}
ANY, LISTED = "site-1", "site-2"  # the site that takes any bundle, and the one that takes the honest one only
UNSIGNED = RecordDict({"envelope": ConfigRecord({"sender": "operator", "body": b"{}", "signature": bytes(64)})})


@dataclass(frozen=True)
class Sites:
    """The federation, its sites, and what each is called by Flower."""

    link: LoopbackFederation
    folder: Path
    mark: Path  # what code that runs at a site would write
    nodes: dict[str, int]
    mail: tuple[Path, Path]
    hostile: tuple[Path, Path]

    def site(self, name: str) -> Path:
        return self.folder / SITES_DIR / name

    def log(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.site(name) / LOG_FILE).read_text("utf-8").splitlines()]

    def marks(self) -> set[str]:
        """What the code that was sent has done."""
        return set(self.mark.read_text().split("\n")) - {""} if self.mark.exists() else set()

    def failure(self, name: str, answer: Answer) -> Failure:
        """The site's answer, opened and its signature checked."""
        assert answer.record is not None, answer
        operator = load_identity(OPERATOR, self.folder / OPERATOR_KEY_FILE)
        roster = load_roster(self.folder / ROSTER_FILE)
        nothing = hashlib.sha256(b"").hexdigest()  # it answers a message in which it found no parcel
        envelope, _ = unseal(operator, roster, from_record(answer.record), sender=name, answers=nothing)
        check_envelope(envelope, roster, name)
        return Failure.model_validate_json(envelope.body)

    def children(self, name: str) -> dict[str, int]:
        """Process ids of a site's SuperNode and runner."""
        found = {}
        supervisor = self.link.processes[name].pid
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (path / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if parent == supervisor:
                found["runner" if "urna.client.runner" in words else "SuperNode"] = int(path.name)
        return found


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    folder = tmp_path_factory.mktemp("sites")
    prepare(folder, Plan.model_validate(PLAN))
    mark = folder / "mark"
    mail, hostile = write_bundle(folder), write_bundle(folder, mark)
    with federation(tmp_path_factory.mktemp("link")) as link:
        nodes = {ANY: link.join_by_runner(ANY, folder / SITES_DIR / ANY)}
        nodes[LISTED] = link.join_by_runner(LISTED, folder / SITES_DIR / LISTED, [built_sha256(link, mail[0])])
        link.join("stock", folder / SITES_DIR / "site-3")
        known = set(nodes.values())
        listed = json.loads(link.flwr("supernode", "list", NAME, "--format", "json"))["nodes"]
        nodes["stock"] = next(int(one["node-id"]) for one in listed if int(one["node-id"]) not in known)
        yield Sites(link, folder, mark, nodes, mail, hostile)


@pytest.fixture(scope="module")
def postman(sites: Sites) -> Iterator[Postman]:
    """The honest run."""
    with posted(sites.link, *sites.mail) as one:
        yield one


def wait_for(holds: Callable[[], object], seconds: float) -> float:
    """How long it took."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.1)
    return time.monotonic() - started


def test_foreign_fab_never_imported(sites: Sites) -> None:
    with posted(sites.link, *sites.hostile) as hostile:
        at_any = hostile.ask(sites.nodes[ANY], UNSIGNED)
        at_listed = hostile.ask(sites.nodes[LISTED], UNSIGNED)
        assert sites.marks() == set()
        at_stock = hostile.ask(sites.nodes["stock"], UNSIGNED)  # the positive control: it does run
        assert sites.marks() == {"app imported", "urna imported", "executed"}
        sha256 = hostile.bundle_sha256
    assert sites.failure(ANY, at_any).code == FailureCode.BAD_REQUEST  # by the urna that is installed there
    assert (at_listed.code, at_listed.reason) == (ErrorCode.INVALID_FAB, NO_SUCH_BUNDLE)
    assert (at_stock.code, at_stock.record) == (0, RecordDict())
    for name, event in ((ANY, "bundle_seen"), (LISTED, "bundle_refused")):
        assert [sha256 in line["detail"] for line in sites.log(name) if line["event"] == event] == [True]
        supernode = sites.site(name) / "supernode"
        assert {path.name for path in supernode.iterdir()} <= {"supernode.log", "source"}  # nothing was unpacked


def test_an_honest_message_is_answered_by_the_same_supernodes(sites: Sites, postman: Postman) -> None:
    for name in (ANY, LISTED):
        assert sites.failure(name, postman.ask(sites.nodes[name], UNSIGNED)).code == FailureCode.BAD_REQUEST
        again = postman.ask(sites.nodes[name], RecordDict({}), message_type="train")
        assert sites.failure(name, again).code == FailureCode.BAD_REQUEST


def test_neither_process_of_a_site_shows_where_the_records_are(sites: Sites) -> None:
    pid = sites.children(ANY)["SuperNode"]
    told = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    assert str(sites.site(ANY)).encode() not in told
    assert b"records.csv" not in told


def test_a_killed_runner_is_started_again_and_answers(sites: Sites, postman: Postman) -> None:
    before = sites.children(LISTED)
    os.kill(before["runner"], signal.SIGKILL)
    wait_for(lambda: sites.children(LISTED).get("runner", before["runner"]) != before["runner"], 30)
    assert sites.failure(LISTED, postman.ask(sites.nodes[LISTED], UNSIGNED))
    assert sites.children(LISTED)["SuperNode"] == before["SuperNode"]


def test_a_killed_supernode_comes_back_without_a_human(sites: Sites, postman: Postman) -> None:
    """The SuperLink refuses it (305) until the heartbeat of the dead one has expired."""
    before = sites.children(LISTED)
    os.kill(before["SuperNode"], signal.SIGKILL)
    log = sites.link.folder / f"{LISTED}.log"
    seconds = wait_for(lambda: log.read_text().count("SuperNode: connected to the SuperLink") == 2, 75)
    assert "the SuperLink does not let it in (Flower's exit 305)" in log.read_text()
    assert seconds > 5
    assert sites.children(LISTED)["runner"] == before["runner"]
    assert sites.failure(LISTED, postman.ask(sites.nodes[LISTED], UNSIGNED))


def test_a_site_that_cannot_be_opened_tells_the_operator_nothing(sites: Sites, postman: Postman) -> None:
    supervisor = sites.link.processes[ANY]
    supervisor.send_signal(signal.SIGTERM)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(20) == 0
    assert [line["event"] for line in sites.log(ANY)][-1] == "stopped"
    ledger = sites.site(ANY) / LEDGER_FILE
    ledger.rename(ledger.with_name("canary-7f3a"))
    sites.link.start_by_runner(ANY, sites.site(ANY))
    answer = postman.ask(sites.nodes[ANY], UNSIGNED)
    assert (answer.code, answer.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, CANNOT_ANSWER)
    told = "".join(sites.link.log(member) for member in ("superlink", "superexec"))
    assert "LedgerError" not in told
    assert str(sites.site(ANY)) not in told
    assert "LedgerError" in {line.get("exception") for line in sites.log(ANY)}
    ledger.with_name("canary-7f3a").rename(ledger)  # mended: the next message finds it open
    assert sites.failure(ANY, postman.ask(sites.nodes[ANY], UNSIGNED))
