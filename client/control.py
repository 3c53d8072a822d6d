"""A person at the site and its running runner: gRPC on a Unix socket in the site's folder.

    urna-site status | approve | deny | pause | resume   ->   control.sock   ->   a `Desk`, which the runner's process keeps

The service is `control.proto`; the standard ``grpc.health.v1`` service is beside it on the same socket. The server has two
threads of its own: it never waits for the runner's work, and the runner never waits for a person.

Covered:
    * the socket is closed to everybody but its owner (mode 0600, made under a umask, looked at before it serves); a folder
      that others may write to is refused; the socket of a dead process is removed, that of a live one is left alone;
    * an approval names the exact plan (all of its hash), so no plan can be put in its place between looking and saying yes;
    * sizes, names and numbers of requests are limited; what a person writes is checked before the desk sees it.
Not covered:
    * who at this account asks: grpcio does not show a peer's user id, so the file's mode is the guard; every process of the
      same user, and root, can ask. ``by`` is what the client says, kept for people, never believed by the program.
"""

import contextlib
import dataclasses
import getpass
import logging
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import quote

from urna.client.local_log import Event, write
from urna.protocol.errors import ControlError, RunnerError, UrnaError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from urna.client import control_pb2 as wire
    from urna.protocol.plan import Plan

SOCKET_FILE = "control.sock"
SERVICE = "urna.site.v1.Control"
PATH_LIMIT_BYTES = 103  # of a socket's address: 107 on Linux, 103 elsewhere
REQUEST_LIMIT_BYTES, REPLY_LIMIT_BYTES = 4096, 1_000_000
CAMPAIGNS_LIMIT, BUNDLES_LIMIT, TEXT_LIMIT = 200, 50, 1000
ANSWER_SECONDS = 5.0
PATTERNS = {"campaign": r"[a-z0-9][a-z0-9_-]{0,62}", "plan_sha256": r"[0-9a-f]{64}", "by": r"[\x21-\x7e]{1,64}"}

State = Literal["waiting", "approved", "open", "closed", "denied"]
T = TypeVar("T")


class DenyReason(StrEnum):
    """Why a person said no, as the operator is told: a closed set, so that no free text leaves."""

    UNSPECIFIED = "unspecified"
    BUDGET = "budget"
    CANDIDATES = "candidates"
    MEMBERS = "members"
    PURPOSE = "purpose"
    TIME = "time"


@dataclass(frozen=True)
class Asked:
    """A plan in the numbers that a person decides on."""

    plan: str
    epsilon: float  # at most, over the whole campaign
    delta: float
    candidates: tuple[str, ...]
    num_rounds: int  # of the final fine-tune, at most
    min_sites: int
    num_records: int  # of all sites together, as the plan declares
    noise: str
    secure_sum: bool
    max_colluding_sites: int


@dataclass(frozen=True)
class CampaignStatus:
    """Where a campaign stands at this site."""

    name: str
    state: State
    plan_sha256: str
    operator: str  # public key, Ed25519, hex
    asked: Asked
    epsilon_spent: float = 0.0  # at the plan's delta
    stage: str = ""  # of the last release; "": none yet
    last_activity: float = 0.0  # seconds since 1970, UTC; 0: none yet


@dataclass(frozen=True)
class SiteStatus:
    """Where a site stands."""

    site: str
    version: str
    paused: bool
    running_since: float  # seconds since 1970, UTC; 0: it is not running
    work: str  # what the runner does at this moment; "": it waits for the operator
    epsilon_spent: float  # for ever, over all campaigns, at delta
    epsilon_total: float  # that the policy allows
    delta: float
    campaigns: tuple[CampaignStatus, ...] = ()  # the newest first
    num_older_campaigns: int = 0  # that are not listed
    bundles_seen: tuple[str, ...] = ()  # SHA-256 of the app bundles that runs came with


class Desk(Protocol):
    """What the server asks; called from its two threads, so quick and safe to call at any time.

    Each method raises `ControlError` for what cannot be done: an unknown campaign, one that waits for nobody, another plan.
    """

    def status(self) -> SiteStatus:
        """Where the site stands."""
        ...

    def approve(self, campaign: str, plan_sha256: str, by: str) -> None:
        """Let this campaign be opened with exactly this plan."""
        ...

    def deny(self, campaign: str, reason: DenyReason, by: str) -> None:
        """Refuse this campaign for good."""
        ...

    def pause(self, by: str) -> None:
        """Release nothing until `resume`; pausing twice is pausing."""
        ...

    def resume(self, by: str) -> None:
        """Go on."""
        ...


def asked_of(plan: "Plan") -> Asked:
    """What a plan asks of a site."""
    return Asked(
        plan=plan.name,
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        candidates=tuple(entry.name for entry in plan.candidates),
        num_rounds=plan.final.num_rounds,
        min_sites=plan.federation.min_sites,
        num_records=plan.federation.num_records,
        noise=plan.privacy.noise,
        secure_sum=plan.federation.secure_sum,
        max_colluding_sites=plan.privacy.max_colluding_sites,
    )


class ControlServer:
    """A socket that is served; made by `serve`."""

    def __init__(self, server: Any, address: "_Address") -> None:
        self._server, self._address = server, address

    @property
    def path(self) -> Path:
        """Where the socket is."""
        return self._address.path

    def stop(self, grace_seconds: float = 1.0) -> None:
        """Answer what was begun, then take the socket away."""
        self._server.stop(grace_seconds).wait(2 * grace_seconds + 1)  # never for ever: a runner that ends must end
        self._address.close()

    def __enter__(self) -> "ControlServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(folder: Path, desk: Desk, log: logging.Logger) -> ControlServer:
    """Serve ``desk`` on the socket of a site's folder, from two threads.

    Raises:
        ControlError: another process serves it, others may write to the folder, or there is no place for a socket.
    """
    import grpc
    from grpc_health.v1 import health_pb2_grpc

    from urna.client import control_pb2_grpc

    if folder.stat().st_mode & 0o022:
        raise ControlError(f"{folder}: expected a folder that only its owner may write to: `chmod go-w {folder}`")
    address = _Address.of(folder)
    try:
        _clear(address)
        options = [
            ("grpc.max_receive_message_length", REQUEST_LIMIT_BYTES),
            ("grpc.max_send_message_length", REPLY_LIMIT_BYTES),
            ("grpc.so_reuseport", 0),
        ]
        workers = futures.ThreadPoolExecutor(2, thread_name_prefix="urna-control")
        server = grpc.server(workers, options=options, maximum_concurrent_rpcs=8)
        control_pb2_grpc.add_ControlServicer_to_server(_Servicer(desk, log), server)
        health_pb2_grpc.add_HealthServicer_to_server(_health(), server)
        before = os.umask(0o077)  # of the whole process, for this one call; stricter harms nobody
        try:
            server.add_insecure_port(address.target)
        except RuntimeError:
            raise ControlError(f"{address.path}: expected a place for a socket, found a disk that refuses one") from None
        finally:
            os.umask(before)
        address.path.chmod(0o600)
        found = address.path.lstat()
        if not stat.S_ISSOCK(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
            raise ControlError(f"{address.path}: expected a socket of mode 0600, found mode {stat.filemode(found.st_mode)}")
        server.start()
    except BaseException:
        address.close()
        raise
    return ControlServer(server, address)


class RunnerClient:
    """A running runner, asked over its socket; made by `connect`."""

    def __init__(self, channel: Any, path: Path, timeout_seconds: float) -> None:
        from grpc_health.v1 import health_pb2_grpc

        from urna.client import control_pb2_grpc

        self._control, self._health = control_pb2_grpc.ControlStub(channel), health_pb2_grpc.HealthStub(channel)
        self._path, self._timeout = path, timeout_seconds

    def healthy(self) -> bool:
        """Whether the runner serves.

        Raises:
            RunnerError: it does not answer.
        """
        from grpc_health.v1 import health_pb2

        reply = self._call(self._health.Check, health_pb2.HealthCheckRequest(service=SERVICE))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def status(self) -> SiteStatus:
        """Where the site stands.

        Raises:
            RunnerError: the runner does not answer.
        """
        from urna.client import control_pb2 as wire

        return _from_wire(self._call(self._control.Status, wire.StatusRequest()))

    def approve(self, campaign: str, plan_sha256: str, by: str | None = None) -> None:
        """Let a campaign be opened with exactly this plan.

        Raises:
            ControlError: it waits for nobody, or has another plan.
            RunnerError: the runner does not answer.
        """
        from urna.client import control_pb2 as wire

        self._call(self._control.Approve, wire.ApproveRequest(campaign=campaign, plan_sha256=plan_sha256, by=by or user()))

    def deny(self, campaign: str, reason: DenyReason = DenyReason.UNSPECIFIED, by: str | None = None) -> None:
        """Refuse a campaign for good.

        Raises:
            ControlError: the runner does not know it, or it is closed.
            RunnerError: the runner does not answer.
        """
        from urna.client import control_pb2 as wire

        code = wire.DenyReason.Value(f"DENY_REASON_{reason.name}")
        self._call(self._control.Deny, wire.DenyRequest(campaign=campaign, reason=code, by=by or user()))

    def pause(self, by: str | None = None) -> None:
        """Release nothing until `resume`.

        Raises:
            RunnerError: the runner does not answer.
        """
        from urna.client import control_pb2 as wire

        self._call(self._control.Pause, wire.PauseRequest(by=by or user()))

    def resume(self, by: str | None = None) -> None:
        """Go on.

        Raises:
            RunnerError: the runner does not answer.
        """
        from urna.client import control_pb2 as wire

        self._call(self._control.Resume, wire.ResumeRequest(by=by or user()))

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        import grpc

        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            code, text = error.code(), error.details() or "no reason"
        if code == grpc.StatusCode.FAILED_PRECONDITION:
            raise ControlError(text)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise RunnerError(f"no runner answers at {self._path}: start it with `urna-site run` or `urna-site up`")
        raise RunnerError(f"the runner at {self._path} could not do that ({code.name.lower()}): {text}")


@contextmanager
def connect(folder: Path, timeout_seconds: float = ANSWER_SECONDS) -> Iterator[RunnerClient]:
    """The running runner of a site's folder.

    Raises:
        RunnerError: there is no socket, so no runner; that a socket is dead shows in the first call.
        ControlError: the socket is another user's.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines would be between ours
    path = folder.absolute() / SOCKET_FILE
    try:
        found = path.lstat()
    except OSError:
        raise RunnerError(f"no runner answers at {path}: start it with `urna-site run` or `urna-site up`") from None
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid not in (os.geteuid(), 0) or not os.access(path, os.W_OK):
        raise ControlError(f"{path}: expected a socket of this user, found another's or none: run as the site's user")
    import grpc

    address = _Address.of(folder)
    options = [
        ("grpc.max_receive_message_length", REPLY_LIMIT_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
    ]
    try:
        with grpc.insecure_channel(address.target, options=options) as channel:
            yield RunnerClient(channel, path, timeout_seconds)
    finally:
        address.close()


def user() -> str:
    """The name of who sits here, as the system says it."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # an account without a name, in a container
        name = ""
    return name if re.fullmatch(PATTERNS["by"], name) else f"uid-{os.getuid()}"


@dataclass(frozen=True)
class _Address:
    """The socket of a folder as gRPC is told of it; through an open folder where the path is too long for a socket."""

    path: Path
    target: str
    folder_descriptor: int | None = None

    @staticmethod
    def of(folder: Path) -> "_Address":
        path = folder.absolute() / SOCKET_FILE
        if len(os.fsencode(path)) <= PATH_LIMIT_BYTES:
            return _Address(path, f"unix:{quote(os.fsencode(path))}")
        if not Path("/proc/self/fd").is_dir():
            raise ControlError(f"{path}: a socket's path has at most {PATH_LIMIT_BYTES} bytes here: move the site's folder")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return _Address(path, f"unix:/proc/self/fd/{descriptor}/{SOCKET_FILE}", descriptor)

    @property
    def short_path(self) -> str:
        """What the socket module takes."""
        return str(self.path) if self.folder_descriptor is None else self.target.removeprefix("unix:")

    def close(self) -> None:
        if self.folder_descriptor is not None:
            os.close(self.folder_descriptor)


def _clear(address: _Address) -> None:
    """Take a dead process's socket away; gRPC alone would take a live one's too."""
    try:
        found = address.path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ControlError(f"{address.path}: expected a socket or nothing, found a file: move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_SECONDS)
        try:
            probe.connect(address.short_path)
        except ConnectionRefusedError:
            address.path.unlink(missing_ok=True)
        except OSError as error:
            raise ControlError(f"{address.path}: another process may serve it ({error.strerror}): end it first") from None
        else:
            raise ControlError(f"{address.path}: another runner of this site serves it: end it first")


class _Servicer:
    """The service of control.proto, over a desk."""

    def __init__(self, desk: Desk, log: logging.Logger) -> None:
        self._desk, self._log = desk, log

    def Status(self, _: "wire.StatusRequest", context: Any) -> "wire.StatusReply":  # noqa: N802 - named by control.proto
        return self._answer(context, lambda: _to_wire(self._desk.status()))

    def Approve(self, request: "wire.ApproveRequest", context: Any) -> "wire.Done":  # noqa: N802
        campaign, plan, by = request.campaign, request.plan_sha256, request.by
        return self._done(context, lambda: self._desk.approve(campaign, plan, by), campaign=campaign, plan_sha256=plan, by=by)

    def Deny(self, request: "wire.DenyRequest", context: Any) -> "wire.Done":  # noqa: N802
        campaign, by = request.campaign, request.by
        return self._done(context, lambda: self._desk.deny(campaign, _reason(request), by), campaign=campaign, by=by)

    def Pause(self, request: "wire.PauseRequest", context: Any) -> "wire.Done":  # noqa: N802
        return self._done(context, lambda: self._desk.pause(request.by), by=request.by)

    def Resume(self, request: "wire.ResumeRequest", context: Any) -> "wire.Done":  # noqa: N802
        return self._done(context, lambda: self._desk.resume(request.by), by=request.by)

    def _done(self, context: Any, work: Callable[[], None], **fields: str) -> "wire.Done":
        from urna.client import control_pb2 as wire

        def checked() -> wire.Done:
            for name, value in fields.items():
                if not re.fullmatch(PATTERNS[name], value):
                    raise ControlError(f"{name}: expected text like {PATTERNS[name]}, found another")
            work()
            return wire.Done()

        return self._answer(context, checked)

    def _answer(self, context: Any, work: Callable[[], T]) -> T:
        import grpc

        code, text = grpc.StatusCode.INTERNAL, "it failed; site.log says why"
        try:
            return work()
        except ControlError as error:
            code, text = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except UrnaError as error:  # the person who asks may read the site's own log
            code, text = grpc.StatusCode.ABORTED, str(error)
        except Exception as error:  # the edge: the runner goes on
            write(self._log, Event.CONTROL_FAILED, level=logging.ERROR, error=error)
        context.abort(code, text[:TEXT_LIMIT])
        raise RuntimeError("abort raises")


def _health() -> Any:
    """The standard service, its `Check` alone.

    `Watch` of grpcio-health-checking 1.81 takes a lock that the server's own thread waits for when a watcher leaves: a server
    that stops at that moment never ends.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its other methods say that they are not there
        def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the standard
            if request.service not in ("", SERVICE):
                context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    return Health()


def _reason(request: "wire.DenyRequest") -> DenyReason:
    from urna.client import control_pb2 as wire

    with contextlib.suppress(ValueError, KeyError):
        return DenyReason[wire.DenyReason.Name(request.reason).removeprefix("DENY_REASON_")]
    raise ControlError(f"reason: expected one of {', '.join(DenyReason)}, found number {request.reason}")


def _to_wire(status: SiteStatus) -> "wire.StatusReply":
    from urna.client import control_pb2 as wire

    shown = status.campaigns[:CAMPAIGNS_LIMIT]
    return wire.StatusReply(
        **_fields(status, "campaigns", "num_older_campaigns", "bundles_seen"),
        campaigns=[
            wire.Campaign(
                **_fields(one, "state", "asked"),
                state=wire.State.Value(f"STATE_{one.state.upper()}"),
                asked=wire.Asked(**_fields(one.asked)),
            )
            for one in shown
        ],
        num_older_campaigns=status.num_older_campaigns + len(status.campaigns) - len(shown),
        bundles_seen=status.bundles_seen[-BUNDLES_LIMIT:],
    )


def _from_wire(reply: "wire.StatusReply") -> SiteStatus:
    from urna.client import control_pb2 as wire

    def campaign(one: "wire.Campaign") -> CampaignStatus:
        state = wire.State.Name(one.state).removeprefix("STATE_").lower()
        asked = Asked(**_named(one.asked, Asked, candidates=tuple(one.asked.candidates)))
        return CampaignStatus(**_named(one, CampaignStatus, state=state, asked=asked))

    campaigns = tuple(campaign(one) for one in reply.campaigns)
    return SiteStatus(**_named(reply, SiteStatus, campaigns=campaigns, bundles_seen=tuple(reply.bundles_seen)))


def _fields(value: "DataclassInstance", *but: str) -> dict[str, Any]:
    """A dataclass's fields by name, shallow: the messages of control.proto have the same names."""
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value) if one.name not in but}


def _named(message: object, kind: "type[DataclassInstance]", **changed: Any) -> dict[str, Any]:
    return {one.name: getattr(message, one.name) for one in dataclasses.fields(kind) if one.name not in changed} | changed
