import importlib.util
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from urna.client import control, control_pb2, control_pb2_grpc
from urna.client.control import (
    SERVICE,
    SOCKET_FILE,
    Asked,
    CampaignStatus,
    DenyReason,
    SiteStatus,
    State,
    asked_of,
    connect,
    serve,
)
from urna.client.local_log import LOG_FILE, local_log
from urna.protocol.errors import ControlError, LedgerError, RunnerError
from urna.protocol.plan import Plan

CLIENT = Path(control.__file__).parent
PLAN_SHA256 = "ab" * 32
ASKED = Asked("digits", 3.0, 1e-5, ("pixels", "autoencoder"), 40, 3, 180, "shared", True, 1)
STATUS = SiteStatus(
    site="site-1",
    version="1.0",
    paused=False,
    running_since=1.8e9,
    work="final/3 of run-0",
    epsilon_spent=1.25,
    epsilon_total=8.0,
    delta=1e-4,
    campaigns=(
        CampaignStatus("run-1", "waiting", PLAN_SHA256, "0c" * 32, ASKED),
        CampaignStatus("run-0", "open", "cd" * 32, "0c" * 32, ASKED, 1.25, "final", 1.8e9 + 7),
    ),
    bundles_seen=("ef" * 32,),
)


class ADesk:
    """Remembers what it was told; knows one campaign that waits."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.now = STATUS
        self.fails: Exception | None = None

    def status(self) -> SiteStatus:
        if self.fails:
            raise self.fails
        return self.now

    def approve(self, campaign: str, plan_sha256: str, by: str) -> None:
        if (campaign, plan_sha256) != ("run-1", PLAN_SHA256):
            raise ControlError(f"expected the plan that waits, found another for {campaign}: look again")
        self.told.append(("approve", campaign, plan_sha256, by))

    def deny(self, campaign: str, reason: DenyReason, by: str) -> None:
        self.told.append(("deny", campaign, reason.value, by))

    def pause(self, by: str) -> None:
        self.told.append(("pause", by))

    def resume(self, by: str) -> None:
        self.told.append(("resume", by))


@pytest.fixture
def desk() -> ADesk:
    return ADesk()


@pytest.fixture
def site_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "site-1"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def log(site_folder: Path) -> logging.Logger:
    return local_log("site-1", site_folder)


@pytest.fixture
def served(site_folder: Path, desk: ADesk, log: logging.Logger) -> Iterator[Path]:
    with serve(site_folder, desk, log):
        yield site_folder


def raw_channel(folder: Path) -> Any:
    return grpc.insecure_channel(f"unix:{folder / SOCKET_FILE}")


def test_status_arrives_as_it_was_said(served: Path) -> None:
    with connect(served) as runner:
        assert runner.status() == STATUS


@pytest.mark.parametrize("state", ["waiting", "approved", "open", "closed", "denied"])
def test_every_state_of_a_campaign_has_a_number_on_the_wire(served: Path, desk: ADesk, state: State) -> None:
    desk.now = replace(STATUS, campaigns=(replace(STATUS.campaigns[0], state=state),))
    with connect(served) as runner:
        assert runner.status().campaigns[0].state == state


def test_decisions_reach_the_desk_with_who_made_them(served: Path, desk: ADesk) -> None:
    with connect(served) as runner:
        runner.approve("run-1", PLAN_SHA256, "ada")
        runner.deny("run-2", DenyReason.MEMBERS, "ada")
        runner.pause("ada")
        runner.resume()
    assert desk.told == [
        ("approve", "run-1", PLAN_SHA256, "ada"),
        ("deny", "run-2", "members", "ada"),
        ("pause", "ada"),
        ("resume", control.user()),
    ]


@pytest.mark.parametrize("reason", list(DenyReason))
def test_every_reason_has_a_number_on_the_wire(served: Path, desk: ADesk, reason: DenyReason) -> None:
    with connect(served) as runner:
        runner.deny("run-1", reason, "ada")
    assert desk.told == [("deny", "run-1", reason.value, "ada")]


def test_what_the_desk_refuses_is_said_to_who_asked(served: Path) -> None:
    with connect(served) as runner, pytest.raises(ControlError, match="expected the plan that waits, found another for run-1"):
        runner.approve("run-1", "cd" * 32)


def test_an_error_of_the_site_is_said_to_its_own_people(served: Path, desk: ADesk) -> None:
    desk.fails = LedgerError("the ledger is locked")
    with connect(served) as runner, pytest.raises(RunnerError, match=r"could not do that .*: the ledger is locked"):
        runner.status()


def test_a_failure_of_the_desk_is_logged_and_the_server_goes_on(served: Path, desk: ADesk) -> None:
    desk.fails = KeyError("canary-7f3a")
    with connect(served) as runner:
        with pytest.raises(RunnerError, match=r"site\.log says why") as caught:
            runner.status()
        desk.fails = None
        assert runner.status() == STATUS
    assert "canary-7f3a" not in str(caught.value)
    assert '"event": "control_failed", "exception": "KeyError"' in (served / LOG_FILE).read_text()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (control_pb2.ApproveRequest(campaign="Run 1", plan_sha256=PLAN_SHA256, by="ada"), "campaign: expected text"),
        (control_pb2.ApproveRequest(campaign="run-1", plan_sha256=PLAN_SHA256[:12], by="ada"), "plan_sha256: expected text"),
        (control_pb2.ApproveRequest(campaign="run-1", plan_sha256=PLAN_SHA256, by="ada\nroot"), "by: expected text"),
        (control_pb2.ApproveRequest(campaign="run-1", plan_sha256=PLAN_SHA256), "by: expected text"),
    ],
)
def test_what_is_not_as_declared_never_reaches_the_desk(
    served: Path, desk: ADesk, request_: control_pb2.ApproveRequest, said: str
) -> None:
    with raw_channel(served) as channel, pytest.raises(grpc.RpcError) as caught:
        control_pb2_grpc.ControlStub(channel).Approve(request_, timeout=5)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details().startswith(said)
    assert desk.told == []


def test_a_reason_outside_the_list_is_refused(served: Path, desk: ADesk) -> None:
    request = control_pb2.DenyRequest(campaign="run-1", by="ada")
    request.reason = 99  # type: ignore[assignment]
    with raw_channel(served) as channel, pytest.raises(grpc.RpcError, match="reason: expected one of unspecified, budget"):
        control_pb2_grpc.ControlStub(channel).Deny(request, timeout=5)
    assert desk.told == []


def test_a_large_request_is_refused_unread(served: Path, desk: ADesk) -> None:
    request = control_pb2.PauseRequest(by="a" * 10_000)
    with raw_channel(served) as channel, pytest.raises(grpc.RpcError) as caught:
        control_pb2_grpc.ControlStub(channel).Pause(request, timeout=5)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert desk.told == []


def test_many_campaigns_are_cut_and_counted(served: Path, desk: ADesk) -> None:
    many = tuple(replace(STATUS.campaigns[0], name=f"run-{number}") for number in range(5000))
    desk.now = replace(STATUS, campaigns=many, num_older_campaigns=7, bundles_seen=("ef" * 32,) * 100)
    with connect(served) as runner:
        status = runner.status()
    assert status.campaigns == many[:200]
    assert status.num_older_campaigns == 4807
    assert len(status.bundles_seen) == 50


def test_the_standard_health_service_is_beside_it(served: Path) -> None:
    with connect(served) as runner:
        assert runner.healthy()
    with raw_channel(served) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="urna.other"), timeout=5)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_nobody_can_watch_health_and_so_hold_up_the_end(served: Path) -> None:
    """The standard servicer's `Watch` can lock a server that stops; `Check` is enough."""
    with raw_channel(served) as channel, pytest.raises(grpc.RpcError) as caught:
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_that_hangs_leaves_a_thread_for_the_next(served: Path, desk: ADesk) -> None:
    hold = threading.Event()
    began = threading.Event()

    def hang(by: str) -> None:  # noqa: ARG001 - as the desk is called
        began.set()
        hold.wait(30)

    desk.pause = hang  # type: ignore[method-assign]
    other = threading.Thread(target=lambda: _pause(served))
    other.start()
    try:
        assert began.wait(30)
        with connect(served) as runner:
            assert runner.status() == STATUS
    finally:
        hold.set()
        other.join()


def _pause(folder: Path) -> None:
    with connect(folder, timeout_seconds=60) as runner:
        runner.pause("ada")


# ---- the socket


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_socket_is_its_owners_alone_under_any_umask(
    site_folder: Path, desk: ADesk, log: logging.Logger, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with serve(site_folder, desk, log) as server:
            found = server.path.lstat()
            assert os.umask(umask) == umask, "the process's own umask is as before"
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert not server.path.exists()


def test_a_folder_that_others_may_write_to_is_refused(site_folder: Path, desk: ADesk, log: logging.Logger) -> None:
    site_folder.chmod(0o770)
    with pytest.raises(ControlError, match="expected a folder that only its owner may write to: `chmod go-w "):
        serve(site_folder, desk, log)


def test_a_live_socket_is_left_alone(served: Path, desk: ADesk, log: logging.Logger) -> None:
    with pytest.raises(ControlError, match="another runner of this site serves it"):
        serve(served, desk, log)
    with connect(served) as runner:
        assert runner.status() == STATUS


def test_a_killed_runners_socket_is_replaced(site_folder: Path, desk: ADesk, log: logging.Logger) -> None:
    script = (
        "import logging, os, sys, pathlib\nfrom tests.client.test_control import ADesk\nfrom urna.client.control import serve\n"
        "serve(pathlib.Path(sys.argv[1]), ADesk(), logging.getLogger('x'))\nprint('serving', flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(site_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CLIENT.parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"serving\n"
        process.send_signal(signal.SIGKILL)
    assert (site_folder / SOCKET_FILE).is_socket(), "it was left behind"
    with connect(site_folder) as runner, pytest.raises(RunnerError, match="no runner answers at"):
        runner.status()
    with serve(site_folder, desk, log), connect(site_folder) as runner:
        assert runner.status() == STATUS


def test_a_file_in_the_sockets_place_is_never_removed(site_folder: Path, desk: ADesk, log: logging.Logger) -> None:
    (site_folder / SOCKET_FILE).write_text("mine")
    with pytest.raises(ControlError, match="expected a socket or nothing, found a file"):
        serve(site_folder, desk, log)
    assert (site_folder / SOCKET_FILE).read_text() == "mine"


def test_a_link_in_the_sockets_place_is_never_followed(
    site_folder: Path, tmp_path: Path, desk: ADesk, log: logging.Logger
) -> None:
    (site_folder / SOCKET_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ControlError, match="expected a socket or nothing, found a file"):
        serve(site_folder, desk, log)
    with pytest.raises(ControlError, match="expected a socket of this user"), connect(site_folder):
        pass


def test_a_client_asks_no_socket_that_it_may_not_write_to(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # the socket is now another user's
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ControlError, match="run as the site's user"), connect(served):
        pass


@pytest.mark.parametrize("name", ["a b", "50%25 off", "küche", "#1?x=y", "x" * 150, "ü" * 100])
def test_any_folder_name_has_a_socket(tmp_path: Path, desk: ADesk, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir(mode=0o700)
    log = local_log("named", folder)
    with serve(folder, desk, log) as server:
        assert (folder / SOCKET_FILE).is_socket()
        assert stat.S_IMODE(server.path.lstat().st_mode) == 0o600
        with connect(folder) as runner:
            assert runner.status() == STATUS
        with pytest.raises(ControlError, match="another runner of this site serves it"):
            serve(folder, desk, log)
    assert not (folder / SOCKET_FILE).exists()


def test_a_dead_socket_at_a_long_path_is_replaced(tmp_path: Path, desk: ADesk) -> None:
    folder = tmp_path / ("y" * 150)
    folder.mkdir(mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(f"/proc/self/fd/{descriptor}/{SOCKET_FILE}")
    dead.close()
    os.close(descriptor)
    with serve(folder, desk, local_log("long", folder)), connect(folder) as runner:
        assert runner.status() == STATUS


def test_without_a_runner_there_is_one_clear_line(site_folder: Path) -> None:
    with (
        pytest.raises(RunnerError, match=r"no runner answers at .*control\.sock: start it with `urna-site run`"),
        connect(site_folder),
    ):
        pass


def test_no_descriptor_stays_open(tmp_path: Path, desk: ADesk) -> None:
    folder = tmp_path / ("z" * 150)
    folder.mkdir(mode=0o700)
    log = local_log("closed", folder)

    def once() -> None:
        with serve(folder, desk, log), connect(folder) as runner:
            runner.status()

    once()
    held = [path.name for path in Path("/proc/self/fd").iterdir() if str(folder) == os.path.realpath(path)]
    assert held == []


# ---- what is generated, and what is loaded


def test_the_generated_files_are_those_of_the_proto(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is a tool of developers; it is not installed")
    (tmp_path / "urna/client").mkdir(parents=True)
    (tmp_path / "urna/client/control.proto").write_bytes((CLIENT / "control.proto").read_bytes())
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "grpc_tools.protoc",
        f"-I{tmp_path}",
        *outputs,
        "urna/client/control.proto",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    for name in ("control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py"):
        assert (tmp_path / "urna/client" / name).read_text() == (CLIENT / name).read_text(), "run `make proto`"


def test_every_state_and_reason_is_in_the_proto() -> None:
    assert {name.removeprefix("DENY_REASON_").lower() for name in control_pb2.DenyReason.keys()} == set(DenyReason)  # noqa: SIM118


def test_a_plan_is_asked_in_its_own_numbers() -> None:
    plan = Plan.model_validate(
        {
            "name": "digits",
            "task": {"num_classes": 3},
            "candidates": [{"name": "pixels"}, {"name": "autoencoder"}],
            "privacy": {"epsilon": 3.0, "delta": 1e-5},
            "federation": {"min_sites": 3, "num_records": 180},
            "final": {"num_rounds": 40, "sample_rate": 0.5, "learning_rate": 0.1},
        }
    )
    assert asked_of(plan) == ASKED


def test_the_module_loads_grpc_only_when_it_is_used() -> None:
    script = (
        "import sys, urna.client.control; print([m for m in ('grpc', 'torch', 'flwr', 'google.protobuf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
