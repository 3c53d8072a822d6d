"""The part of `urna-site check` that looks beyond the folder: certificates, SuperLink, SuperNode and runner.

Nothing is sent but the greetings of TLS and of the health services.
"""

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from urna.client.findings import Finding, Level, Subject
from urna.protocol.errors import ControlError, RunnerError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

NETWORK_SECONDS = 2.0
CERTIFICATE_YELLOW_DAYS = 30


def certificates(subject: Subject) -> Iterator[Finding]:
    """How long the roots are good for."""
    link = subject.link
    if link is None:
        yield Finding("certificate", "skip", "no [link] in site.toml")
        return
    if not (subject.folder / link.root_certificates).is_file():
        text = f"expected {link.root_certificates} in the site's folder, found nothing"
        yield Finding("certificate", "no", text, "ask the operator for the SuperLink's root certificate")
        return
    roots = root_certificates(subject)
    if not roots:
        yield Finding("certificate", "no", f"{link.root_certificates} holds no certificate (PEM)", "ask the operator for it")
    for certificate in roots:
        yield _days_left("certificate", certificate)


def _days_left(name: str, certificate: "Certificate") -> Finding:
    days = (certificate.not_valid_after_utc - datetime.now(UTC)).days
    subject = certificate.subject.rfc4514_string() or "a certificate without a name"
    if days < 0:
        return Finding(name, "no", f"{subject}: ran out {-days} days ago", "ask the operator for a new one")
    if days < CERTIFICATE_YELLOW_DAYS:
        return Finding(name, "warn", f"{subject}: {days} days left", "ask the operator for a new one in time")
    return Finding(name, "ok", f"{subject}: {days} days left")


def root_certificates(subject: Subject) -> "list[Certificate]":
    """All that can be read; none if there is no link."""
    from cryptography.x509 import load_pem_x509_certificates

    link = subject.link
    try:
        return load_pem_x509_certificates((subject.folder / link.root_certificates).read_bytes()) if link else []
    except (OSError, ValueError):
        return []


def runner(subject: Subject) -> Iterator[Finding]:
    """Whether the runner answers its own people."""
    from urna.client.control import connect

    if subject.runner is not None:
        state = "paused by a person" if subject.runner.paused else "answers"
        remedy = f"urna-site resume {subject.folder}" if subject.runner.paused else ""
        yield Finding("runner", "warn" if subject.runner.paused else "ok", state, remedy)
        return
    try:
        with connect(subject.folder, NETWORK_SECONDS) as client:
            client.healthy()
    except ControlError as error:
        yield Finding("runner", "no", str(error))
        return
    except RunnerError:
        yield Finding("runner", "skip", "does not run")
        return
    yield Finding("runner", "warn", "runs, but cannot say where it stands", "look at site.log, then restart it")


def superlink(subject: Subject) -> Iterator[Finding]:
    """Whether the SuperLink, or the proxy before it, is reached and shows the right certificate."""
    link = subject.link
    if link is None or subject.offline:
        yield Finding("SuperLink", "skip", "not asked" if link else "no [link] in site.toml")
        return
    host, _, port = link.superlink.rpartition(":")
    if not host or not port.isdecimal():
        yield Finding("SuperLink", "no", f"expected host:port as link.superlink, found {link.superlink!r}", "correct site.toml")
        return
    remedy = f"check name, route and firewall: this machine must reach {link.superlink} (TCP, outgoing)"
    try:
        context = ssl.create_default_context(cafile=subject.folder / link.root_certificates)
    except (OSError, ssl.SSLError):
        yield Finding("SuperLink", "no", f"not asked: {link.root_certificates} cannot be read", "see certificate above")
        return
    host = host.strip("[]")
    try:
        with (
            socket.create_connection((host, int(port)), NETWORK_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            raw, protocol = secured.getpeercert(binary_form=True), secured.version()
    except ssl.SSLCertVerificationError as error:
        text = f"{link.superlink} shows a certificate that {link.root_certificates} does not vouch for: {error.verify_message}"
        yield Finding("SuperLink", "no", text, "compare both with the operator by another way; do not go on until they agree")
        return
    except ssl.SSLError as error:
        yield Finding("SuperLink", "no", f"{link.superlink} does not speak TLS as expected ({error.reason})", remedy)
        return
    except OSError as error:
        yield Finding("SuperLink", "no", f"{link.superlink} does not answer ({error.strerror or type(error).__name__})", remedy)
        return
    yield Finding("SuperLink", "ok", f"{link.superlink} answers with {protocol}")
    if raw:
        from cryptography.x509 import load_der_x509_certificate

        yield _days_left("SuperLink", load_der_x509_certificate(raw))


def supernode(subject: Subject) -> Iterator[Finding]:
    """Whether the site's own SuperNode serves, by its health service."""
    link = subject.link
    if link is None or subject.offline:
        yield Finding("SuperNode", "skip", "not asked" if link else "no [link] in site.toml")
        return
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    where = f"127.0.0.1:{link.health_port}"
    try:
        with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
            request = health_pb2.HealthCheckRequest()
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=NETWORK_SECONDS).status
    except grpc.RpcError as error:
        level: Level = "warn" if subject.runner is None else "no"  # a site that is not started yet is no fault
        yield Finding("SuperNode", level, f"{where} does not answer ({error.code().name.lower()})", "start it: `urna-site up`")
        return
    if status == health_pb2.HealthCheckResponse.SERVING:
        yield Finding("SuperNode", "ok", f"{where} serves")
    else:
        yield Finding("SuperNode", "no", f"{where} does not serve", "look at its log; `urna-site up` restarts it")
