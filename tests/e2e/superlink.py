"""A Flower federation on loopback: SuperLink with TLS and node authentication, its SuperExec, and SuperNodes.

    with federation(folder) as one:
        one.join("site-1", site_dir)
        ...

Every process leads a session of its own, so that what it started ends with it, and writes to ``folder/NAME.log``. Ports are
free ones; every member has its own FLWR_HOME and starts in an empty folder, where no `urna` but the installed one is found.
"""

import datetime
import ipaddress
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

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

NAME = "loopback"  # of the federation, as the operator's config.toml calls it
START_SECONDS = 60.0


@dataclass
class LoopbackFederation:
    """What `federation` gives: addresses, certificates, and the processes by name."""

    folder: Path
    port: int
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def ca(self) -> Path:
        """The certificate authority that everyone trusts."""
        return self.folder / "ca.pem"

    def environment(self, member: str) -> dict[str, str]:
        """A member's environment: its own FLWR_HOME, no telemetry, nothing that leads Python to the sources."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "PYTHON", "PYTEST"))}
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
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "urna test authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    ca = (
        _certificate(authority, authority, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    leaf = (
        _certificate(server, authority, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (folder / "server.key").write_bytes(server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - hour).not_valid_after(now + 24 * hour)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
