"""A Flower federation on loopback: SuperLink with TLS and node authentication, its SuperExec, and SuperNodes.

    with federation(folder) as one:
        one.join("site-1", site_dir)
        ...

Every process leads a session of its own, so that what it started ends with it, and writes to ``folder/NAME.log``. Ports are
free ones; every member has its own FLWR_HOME and starts in an empty folder, where no `urna` but the installed one is found.
"""

import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from urna.server.certificates import certificate_pem, create_authority, key_pem, new_key, server_certificate

NAME = "loopback"  # of the federation, as the operator's config.toml calls it
START_SECONDS = 60.0


@dataclass
class LoopbackFederation:
    """What `federation` gives: addresses, certificates, and the processes by name."""

    folder: Path
    port: int
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    keep: set[str] = field(default_factory=set)  # names of the environment that are passed on all the same

    @property
    def ca(self) -> Path:
        """The certificate authority that everyone trusts."""
        return self.folder / "ca.pem"

    def environment(self, member: str) -> dict[str, str]:
        """A member's environment: its own FLWR_HOME, no telemetry, nothing that leads Python to the sources."""
        strange = {key for key in os.environ if key.startswith(("FLWR_", "PYTHON", "PYTEST"))} - self.keep
        kept = {key: value for key, value in os.environ.items() if key not in strange}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home(member)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONSAFEPATH": "1",
        }

    def home(self, member: str) -> Path:
        """A member's FLWR_HOME; also the folder it starts in."""
        home = self.folder / member
        home.mkdir(parents=True, exist_ok=True)
        return home

    def start(self, member: str, *command: str) -> "subprocess.Popen[bytes]":
        """Start a process that ends with the federation."""
        with (self.folder / f"{member}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(member),
                cwd=self.home(member),
                start_new_session=True,
            )
        self.processes[member] = process
        return process

    def log(self, member: str) -> str:
        """What a process has written."""
        return (self.folder / f"{member}.log").read_text("utf-8", errors="replace")

    def flwr(self, *arguments: str) -> str:
        """Run Flower's CLI as the operator."""
        command = [str(Path(sys.executable).parent / "flwr"), *arguments]
        done = subprocess.run(
            command,
            env=self.environment("operator"),
            cwd=self.home("operator"),
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def create_key(self, member: str) -> Path:
        """Make a SuperNode's key pair; the public half lies beside the private one, as NAME.key.pub."""
        key = ec.generate_private_key(ec.SECP384R1())
        path = self.folder / f"{member}.key"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        path.with_suffix(".key.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        return path

    def join(self, member: str, site_dir: Path, node_config: str = "") -> None:
        """Register a SuperNode's key and start it for the site in ``site_dir``; ``node_config`` is added to that."""
        key = self.create_key(member)
        self.flwr("supernode", "register", str(key.with_suffix(".key.pub")), NAME)
        self.start_supernode(member, key, site_dir, node_config)

    def start_supernode(self, member: str, key: Path, site_dir: Path, node_config: str = "") -> "subprocess.Popen[bytes]":
        """Start a SuperNode, whether or not its key is registered."""
        return self.start(
            member,
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.ca)),
            *("--auth-supernode-private-key", str(key)),
            *("--node-config", f'site-dir="{site_dir}" {node_config}'.strip()),
            *("--host", "127.0.0.1", "--port", str(free_ports(1)[0])),
        )

    def join_by_runner(self, member: str, site_dir: Path, allowed_bundles: list[str] | None = None) -> int:
        """Register a SuperNode's key and start SuperNode and runner as `urna-site up` does; returns the node's id."""
        key = self.create_key(member)
        said = json.loads(self.flwr("supernode", "register", str(key.with_suffix(".key.pub")), NAME, "--format", "json"))
        runtime_port, health_port = free_ports(2)
        (site_dir / "node.key").write_bytes(key.read_bytes())
        (site_dir / "ca.pem").write_bytes(self.ca.read_bytes())
        with (site_dir / "site.toml").open("a", encoding="utf-8") as file:
            file.write(f'\n[link]\nsuperlink = "127.0.0.1:{self.port}"\n')
            file.write(f"runtime_port = {runtime_port}\nhealth_port = {health_port}\n")
            if allowed_bundles is not None:
                file.write(f"allowed_bundles = {json.dumps(allowed_bundles)}\n")
        self.start_by_runner(member, site_dir)
        return int(said["node-id"])

    def start_by_runner(self, member: str, site_dir: Path) -> "subprocess.Popen[bytes]":
        """Start what `urna-site up` starts."""
        return self.start(member, sys.executable, "-P", "-m", "urna.client.supervisor", str(site_dir))

    def get(self, path: str, scheme: str = "https") -> int:
        """Status of a request to the SuperLink."""
        context = ssl.create_default_context(cafile=str(self.ca))
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{self.port}{path}", timeout=10, context=context) as answer:
            return int(answer.status)

    def wait_for_superlink(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + START_SECONDS
        while self.processes["superlink"].poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                if self.get("/health") == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"the SuperLink did not start:\n{self.log('superlink')[-2000:]}")

    def stop(self) -> None:
        """End all processes, last started first."""
        for process in reversed(self.processes.values()):
            _signal(process, signal.SIGTERM)
        for process in reversed(self.processes.values()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            _signal(process, signal.SIGKILL)  # and whatever of its session is left
            process.wait()


@contextmanager
def federation(folder: Path) -> Iterator[LoopbackFederation]:
    """A SuperLink as docs/deployment.md says to run it, with nobody registered yet."""
    _write_certificates(folder)
    secret = folder / "superexec.secret"
    secret.write_text(secrets.token_hex(32), encoding="utf-8")
    one = LoopbackFederation(folder, free_ports(1)[0])
    address = f"127.0.0.1:{one.port}"
    (one.home("operator") / "config.toml").write_text(
        f'[superlink.{NAME}]\naddress = "{address}"\nroot-certificates = "{one.ca}"\n', encoding="utf-8"
    )
    with ExitStack() as stack:
        stack.callback(one.stop)
        one.start(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(one.port), "--database", str(folder / "state.db")),
            *("--ssl-ca-certfile", str(one.ca), "--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
            "--disable-runtime-dependency-installation",
        )
        one.wait_for_superlink()
        one.start(
            "superexec",
            "flower-superexec",
            *("--runtime-api-address", address, "--root-certificates", str(one.ca)),
            *("--superexec-auth-secret-file", str(secret)),
        )
        yield one


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _write_certificates(folder: Path) -> None:
    """ca.pem, and server.pem with server.key for localhost and 127.0.0.1; the authority's key is thrown away."""
    authority, key = create_authority("loopback"), new_key()
    certificate = server_certificate(authority, "superlink", ("localhost", "127.0.0.1"), key.public_key(), days=1)
    (folder / "ca.pem").write_bytes(certificate_pem(authority.certificate))
    (folder / "server.pem").write_bytes(certificate_pem(certificate))
    (folder / "server.key").write_bytes(key_pem(key))
