import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.client.clinic import CANARY, NAME, NUM_RECORDS, Clinic, a_signer
from tests.client.test_control import ADesk
from urna.client import doctor, doctor_link
from urna.client.control import serve
from urna.client.doctor import examine, is_fit
from urna.client.findings import Finding, Subject
from urna.client.local_log import local_log

DAY = timedelta(days=1)


def found(folder: Path, name: str, *, offline: bool = True) -> list[Finding]:
    return [one for one in examine(folder, offline=offline) if one.name == name]


def only(folder: Path, name: str, *, offline: bool = True) -> Finding:
    (finding,) = found(folder, name, offline=offline)
    return finding


def change(folder: Path, pattern: str, replacement: str) -> None:
    path = folder / "site.toml"
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count == 1
    path.write_text(text)


def add(folder: Path, text: str) -> None:
    with (folder / "site.toml").open("a") as file:
        file.write(text)


@pytest.fixture
def home(clinic: Clinic) -> Path:
    """The clinic's folder as a site keeps it: nobody else looks in."""
    clinic.folder.chmod(0o700)
    return clinic.folder


# ---- what is in the folder


def test_a_site_in_order_has_no_red_finding(home: Path) -> None:
    findings = examine(home, offline=True)
    assert is_fit(findings), findings
    levels = {one.name: one.level for one in findings}
    expected: dict[str, tuple[str, ...]] = {
        "ok": ("site.toml", "modes", "identity", "data key", "roster", "ledger", "budget", "records digits", "clock"),
        "warn": ("anchor",),
        "skip": ("certificate", "SuperLink", "SuperNode", "runner"),
    }
    for level, names in expected.items():
        assert {name: levels[name] for name in names} == dict.fromkeys(names, level)


def test_every_red_or_yellow_finding_has_a_remedy(home: Path) -> None:
    for name in ("data.key", "ledger.sqlite", "ledger.anchor", "roster.json", "identity.key", "records.csv"):
        (home / name).unlink()
    add(home, '[link]\nsuperlink = "127.0.0.1:1"\n')
    home.chmod(0o777)
    findings = [one for one in examine(home) if one.level in ("no", "warn")]
    assert len(findings) > 8
    assert [one for one in findings if not one.remedy] == []


def test_looking_changes_nothing(home: Path) -> None:
    before = {one.name: one.read_bytes() for one in home.iterdir()}
    examine(home)
    assert {one.name: one.read_bytes() for one in home.iterdir()} == before


def test_everything_that_is_wrong_is_found_at_once_and_shows_no_record(home: Path) -> None:
    (home / "data.key").unlink()
    (home / "ledger.sqlite").unlink()
    (home / "roster.json").write_text("{}")
    findings = examine(home, offline=True)
    assert {one.name for one in findings if one.level == "no"} == {"data key", "ledger", "roster"}
    assert CANARY not in repr(findings)


def test_a_site_toml_that_cannot_be_read_is_red_and_what_rests_on_it_waits(home: Path) -> None:
    add(home, "secret = 1\n")
    assert only(home, "site.toml").level == "no"
    assert "unknown key policy.secret" in only(home, "site.toml").text
    assert only(home, "records").text == "not looked at: site.toml comes first"
    assert only(home, "disk").level == "ok"


def test_a_folder_that_is_none_is_red_and_breaks_nothing(tmp_path: Path) -> None:
    findings = examine(tmp_path / "nowhere", offline=True)
    assert not is_fit(findings)
    assert [one for one in findings if "the check itself failed" in one.text] == []


def test_a_check_that_breaks_is_red_by_type_and_ends_no_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Subject) -> Iterator[Finding]:
        raise ZeroDivisionError(CANARY)
        yield

    monkeypatch.setitem(doctor.CHECKS, "modes", broken)
    finding = only(home, "modes")
    assert (finding.level, finding.text) == ("no", "the check itself failed: ZeroDivisionError")
    assert only(home, "clock").level == "ok"
    assert CANARY not in repr(examine(home, offline=True))


@pytest.mark.parametrize("name", ["identity.key", "data.key", "ledger.sqlite", "site.log"])
def test_what_others_may_read_is_red_with_the_command_that_closes_it(home: Path, name: str) -> None:
    (home / name).chmod(0o640)
    finding = only(home, "modes")
    assert (finding.level, finding.remedy) == ("no", f"chmod go= {home / name}")


@pytest.mark.parametrize("name", ["site.toml", "roster.json"])
def test_what_others_may_write_is_red(home: Path, name: str) -> None:
    (home / name).chmod(0o664)
    assert only(home, "modes").remedy == f"chmod go-w {home / name}"


def test_a_folder_that_others_may_look_into_is_yellow(home: Path) -> None:
    home.chmod(0o755)
    assert (only(home, "modes").level, only(home, "modes").remedy) == ("warn", f"chmod o= {home}")


def test_a_roster_with_another_key_of_this_site_is_red(home: Path, clinic: Clinic) -> None:
    roster = (home / "roster.json").read_text()
    (home / "roster.json").write_text(roster.replace(clinic.site.identity.public_key_hex, a_signer(NAME).public_key_hex))
    assert only(home, "roster").text == "expected this identity's key in the roster, found another for site-1"


def test_a_peer_that_the_policy_names_and_the_roster_does_not_is_red(home: Path) -> None:
    change(home, r"min_cohort = 3", 'min_cohort = 3\nrequired_peers = ["site-2", "site-9"]')
    assert [one.level for one in found(home, "roster")] == ["ok", "no"]
    assert found(home, "roster")[1].text == "policy.required_peers names site-9, not in the roster"


def test_an_altered_ledger_is_red(home: Path, clinic: Clinic) -> None:
    clinic.ask(clinic.ballot())
    clinic.site.ledger.close()
    raw = (home / "ledger.sqlite").read_bytes()
    at = raw.index(b"GaussianDpEvent")
    (home / "ledger.sqlite").write_bytes(raw[:at] + b"Laplacian" + raw[at + 9 :])
    assert only(home, "ledger").level == "no"


def test_a_ledger_that_a_runner_holds_can_be_looked_at(home: Path, clinic: Clinic) -> None:
    clinic.ask(clinic.ballot())
    clinic.site.ledger.hold()
    script = (
        "import sys, pathlib\nfrom urna.client.doctor import examine\nprint(examine(pathlib.Path(sys.argv[1]), offline=True))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(home)], capture_output=True, text=True, timeout=60, check=True)
    assert "name='ledger', level='ok'" in done.stdout
    assert "1 releases" in done.stdout


def test_a_spent_budget_is_red_and_a_small_rest_yellow(home: Path, clinic: Clinic) -> None:
    clinic.ask(clinic.ballot())
    change(home, r"epsilon_total = 8\.0", "epsilon_total = 4.0")
    assert only(home, "budget").level == "warn"
    change(home, r"epsilon_total = 4\.0", "epsilon_total = 0.01")
    assert (only(home, "budget").level, "nothing is left" in only(home, "budget").text) == ("no", True)


def test_an_anchor_beside_its_ledger_is_yellow_and_a_lost_one_red(home: Path) -> None:
    assert only(home, "anchor").level == "warn"
    (home / "ledger.anchor").unlink()
    assert only(home, "anchor").level == "no"


def test_an_anchor_on_another_disk_is_green(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == home.stat().st_dev or not os.access(other, os.W_OK):
        pytest.skip("there is no second disk here")
    anchor = other / f"urna-test-{os.getpid()}-{tmp_path_factory.getbasetemp().name}.anchor"
    try:
        anchor.write_bytes((home / "ledger.anchor").read_bytes())
        add(home, f'[vault]\nanchor = "{anchor}"\n')
        assert only(home, "anchor").level == "ok"
        assert only(home, "ledger").level == "ok"
    finally:
        anchor.unlink(missing_ok=True)


def test_records_that_are_far_from_the_declared_number_are_red(home: Path) -> None:
    change(home, rf"num_records = {NUM_RECORDS}", "num_records = 53")
    assert only(home, "records digits").level == "no"
    change(home, "num_records = 53", "num_records = 54")
    assert only(home, "records digits").level == "ok"


def test_broken_records_are_red_and_their_values_are_not_shown(home: Path) -> None:
    with (home / "records.csv").open("a") as file:
        file.write(f"{CANARY},1,broken\n")
    finding = only(home, "records digits")
    assert finding.level == "no"
    assert CANARY not in repr(finding)


def test_a_full_disk_is_red(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_YELLOW_BYTES", 10**18)
    assert only(home, "disk").level == "warn"
    monkeypatch.setattr(doctor, "DISK_RED_BYTES", 10**18)
    assert only(home, "disk").level == "no"


def test_little_memory_is_red(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_memory_bytes", lambda: 10**9)
    assert only(home, "memory").level == "warn"
    monkeypatch.setattr(doctor, "_available_memory_bytes", lambda: 10**6)
    assert only(home, "memory").level == "no"


def test_a_clock_that_is_behind_the_ledger_is_red(home: Path) -> None:
    ahead = datetime.now(UTC).timestamp() + 3600
    os.utime(home / "ledger.sqlite", (ahead, ahead))
    assert only(home, "clock").level == "no"
    assert "but the ledger was written at" in only(home, "clock").text


def test_versions_outside_the_declared_ranges_are_red(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    assert only(home, "versions").level == "ok"
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.40.0" if name == "flwr" else real(name))
    finding = only(home, "versions")
    assert finding.level == "no"
    assert "flwr 1.40.0, expected" in finding.text


def test_a_machine_without_a_gpu_is_no_fault(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(home, "GPU").level == "skip"


def test_a_gpu_whose_driver_is_broken_is_yellow(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert (only(home, "GPU").level, only(home, "GPU").text) == ("warn", "nvidia-smi finds none that works")


# ---- certificates and the SuperLink


def certificate_of(
    name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None, days: tuple[float, float] = (-1, 90)
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer, signing_key = issuer or (subject, key)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(signer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now + days[0] * DAY).not_valid_after(now + days[1] * DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    if issuer is None:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    else:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
        builder = builder.add_extension(names, critical=False).add_extension(identifier, critical=False)
    return builder.sign(signing_key, SHA256()), key


@contextmanager
def tls_server(folder: Path, authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey]) -> Iterator[int]:
    """A server on loopback that greets with TLS and says no more."""
    certificate, key = certificate_of("superlink", (authority[0].subject, authority[1]))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.pem").write_bytes(private + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    ended = threading.Event()

    def answer(listener: socket.socket) -> None:
        while not ended.is_set():
            try:
                plain, _ = listener.accept()
            except TimeoutError:
                continue
            with plain, contextlib.suppress(OSError):  # a client that does not believe it hangs up
                context.wrap_socket(plain, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def linked(home: Path, port: int, authority: x509.Certificate | None) -> None:
    add(home, f'[link]\nsuperlink = "localhost:{port}"\n')
    if authority is not None:
        (home / "ca.pem").write_bytes(authority.public_bytes(Encoding.PEM))


def test_a_superlink_that_shows_the_right_certificate_is_green(home: Path, tmp_path: Path) -> None:
    authority = certificate_of("authority", None)
    with tls_server(tmp_path, authority) as port:
        linked(home, port, authority[0])
        answers, certificate = found(home, "SuperLink", offline=False)
    assert (answers.level, certificate.level) == ("ok", "ok")
    assert f"localhost:{port} answers with TLSv1.3" in answers.text
    assert re.fullmatch(r"CN=superlink: (89|90) days left", certificate.text)


def test_a_superlink_with_a_foreign_certificate_is_red(home: Path, tmp_path: Path) -> None:
    with tls_server(tmp_path, certificate_of("authority", None)) as port:
        linked(home, port, certificate_of("authority", None)[0])
        finding = only(home, "SuperLink", offline=False)
    assert finding.level == "no"
    assert "does not vouch for" in finding.text
    assert "do not go on until they agree" in finding.remedy


def test_a_superlink_that_does_not_answer_is_red(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    linked(home, port, certificate_of("authority", None)[0])
    finding = only(home, "SuperLink", offline=False)
    assert finding.level == "no"
    assert "does not answer" in finding.text


def test_a_superlink_that_accepts_and_stays_silent_is_red_in_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_link, "NETWORK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        linked(home, silent.getsockname()[1], certificate_of("authority", None)[0])
        assert only(home, "SuperLink", offline=False).level == "no"


@pytest.mark.parametrize(("days", "level"), [(365, "ok"), (10, "warn"), (-0.5, "no")])
def test_a_root_certificate_is_watched_for_its_end(home: Path, days: float, level: str) -> None:
    linked(home, 1, certificate_of("authority", None, (-400, days))[0])
    assert only(home, "certificate").level == level


def test_a_clock_before_the_certificates_beginning_is_red(home: Path) -> None:
    linked(home, 1, certificate_of("authority", None, (2, 90))[0])
    assert only(home, "clock").level == "no"
    assert "but a certificate became valid at" in only(home, "clock").text


@pytest.mark.parametrize("content", [None, b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_missing_or_broken_root_certificate_is_red(home: Path, content: bytes | None) -> None:
    linked(home, 1, None)
    if content is not None:
        (home / "ca.pem").write_bytes(content)
    assert only(home, "certificate").level == "no"
    assert only(home, "SuperLink", offline=False).level == "no"


def test_offline_asks_nobody(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        linked(home, listener.getsockname()[1], certificate_of("authority", None)[0])
        assert only(home, "SuperLink").text == "not asked"
        assert only(home, "SuperNode").text == "not asked"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


# ---- processes of this site


@contextmanager
def health_server(serving: bool) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait(10)


@pytest.mark.parametrize(("serving", "level"), [(True, "ok"), (False, "no")])
def test_the_supernodes_health_is_asked(home: Path, serving: bool, level: str) -> None:
    with health_server(serving) as port:
        add(home, f'[link]\nsuperlink = "localhost:1"\nhealth_port = {port}\n')
        assert only(home, "SuperNode", offline=False).level == level


def test_a_supernode_that_does_not_run_yet_is_yellow_and_beside_a_runner_red(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    add(home, f'[link]\nsuperlink = "localhost:1"\nhealth_port = {port}\n')
    assert only(home, "SuperNode", offline=False).level == "warn"
    with serve(home, ADesk(), local_log("doctor", home)):
        assert only(home, "SuperNode", offline=False).level == "no"


def test_a_running_runner_is_seen_and_a_paused_one_is_yellow(home: Path) -> None:
    desk = ADesk()
    with serve(home, desk, local_log("doctor", home)):
        assert (only(home, "runner").level, only(home, "runner").text) == ("ok", "answers")
        desk.now = replace(desk.now, paused=True)
        assert (only(home, "runner").level, only(home, "runner").remedy) == ("warn", f"urna-site resume {home}")
        desk.fails = RuntimeError("broken")
        assert only(home, "runner").text == "runs, but cannot say where it stands"
    assert only(home, "runner").level == "skip"


def test_findings_are_values_that_a_program_can_read(home: Path) -> None:
    assert json.loads(json.dumps([asdict(one) for one in examine(home, offline=True)]))[0]["name"] == "site.toml"
