"""Certificates of a consortium in real TLS handshakes: who is let in, and who is not."""

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import example, given
from hypothesis import strategies as st

from tests.consortium_files import client_context, handshake, server_context
from urna.protocol.errors import BadInputError
from urna.protocol.expiry import days_left
from urna.server.certificates import (
    Authority,
    certificate_pem,
    client_certificate,
    create_authority,
    key_pem,
    load_authority,
    new_key,
    requested_key,
    server_certificate,
    subject,
)

HOSTS = ("fleet.example.org", "127.0.0.1")


def member(folder: Path, authority: Authority) -> Path:
    """A folder with ca.pem, and server.pem and client.pem with their keys."""
    folder.mkdir()
    (folder / "ca.pem").write_bytes(certificate_pem(authority.certificate))
    for name in ("server", "client"):
        key = new_key()
        if name == "server":
            certificate = server_certificate(authority, "proxy", HOSTS, key.public_key(), 365)
        else:
            certificate = client_certificate(authority, "hospital-a", key.public_key(), 365)
        (folder / f"{name}.pem").write_bytes(certificate_pem(certificate))
        (folder / f"{name}.key").write_bytes(key_pem(key))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return member(tmp_path_factory.mktemp("ours") / "x", create_authority("retina"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another authority of the same name, made by somebody else."""
    return member(tmp_path_factory.mktemp("theirs") / "x", create_authority("retina"))


def connect(
    server: Path, client: Path, *, shown: str | None = "client", answers: str = "server", host: str = HOSTS[0]
) -> bytes:
    server_side = server_context(server / f"{answers}.pem", server / f"{answers}.key", server / "ca.pem")
    if shown is None:
        return handshake(server_side, client_context(client / "ca.pem"), host)
    # each trusts its own authority for the other's certificate; the client's own is whatever is in its folder
    return handshake(server_side, client_context(server / "ca.pem", client / f"{shown}.pem", client / f"{shown}.key"), host)


@pytest.mark.parametrize("host", HOSTS)
def test_a_member_is_let_in(ours: Path, host: str) -> None:
    assert connect(ours, ours, host=host) == b"heard"


def test_no_client_certificate_is_refused(ours: Path) -> None:
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required|peer did not return a certificate"):
        connect(ours, ours, shown=None)


def test_a_client_certificate_of_another_authority_of_the_same_name_is_refused(ours: Path, theirs: Path) -> None:
    with pytest.raises(ssl.SSLError):
        connect(ours, theirs)


def test_a_servers_certificate_is_refused_as_a_clients(ours: Path) -> None:
    with pytest.raises(ssl.SSLError, match="certificate"):
        connect(ours, ours, shown="server")


def test_a_clients_certificate_is_refused_as_a_servers(ours: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(ours, ours, answers="client")


def test_a_server_of_another_authority_is_refused(ours: Path, theirs: Path) -> None:
    server = server_context(theirs / "server.pem", theirs / "server.key")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client_context(ours / "ca.pem"), HOSTS[0])


@pytest.mark.parametrize("host", ["other.example.org", "127.0.0.2", "localhost"])
def test_a_server_at_another_address_is_refused(ours: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch|not valid for"):
        connect(ours, ours, host=host)


def test_a_member_cannot_sign_certificates(ours: Path, tmp_path: Path) -> None:
    """Neither with its leaf as the issuer, nor with one that says it is an authority below the consortium's."""
    issuer = x509.load_pem_x509_certificate((ours / "client.pem").read_bytes())
    issuer_key = load_key(ours / "client.key")
    key = new_key()
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hospital-b")])
    forged = (
        x509.CertificateBuilder(issuer.subject, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(issuer_key, hashes.SHA256())
    )
    (tmp_path / "client.pem").write_bytes(certificate_pem(forged) + certificate_pem(issuer))
    (tmp_path / "client.key").write_bytes(key_pem(key))
    with pytest.raises(ssl.SSLError):
        connect(ours, tmp_path)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def test_what_the_certificates_say() -> None:
    authority = create_authority("retina")
    leaf = client_certificate(authority, "hospital-a", new_key().public_key(), 365)
    now = datetime.datetime.now(datetime.UTC)
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = authority.certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert isinstance(authority.private_key.curve, ec.SECP256R1)
    assert datetime.timedelta(minutes=59) < now - leaf.not_valid_before_utc < datetime.timedelta(minutes=62)
    assert leaf.subject.rfc4514_string() == subject("hospital-a", "retina") == "CN=hospital-a,O=retina"
    assert authority.consortium == "retina"


def test_serial_numbers_are_random() -> None:
    authority = create_authority("retina")
    key = new_key().public_key()
    serials = {client_certificate(authority, "a", key, 1).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert min(serials) > 2**64


def test_a_leaf_ends_before_its_authority_does() -> None:
    authority = create_authority("retina", days=30)
    leaf = server_certificate(authority, "proxy", HOSTS, new_key().public_key(), 365)
    assert leaf.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_days_left_counts_whole_days(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(certificate_pem(create_authority("retina", days=10).certificate))
    assert days_left(path) == 9


@pytest.mark.parametrize("content", [None, b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_days_left_of_no_certificate_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInputError, match="expected a certificate") as error:
        days_left(path)
    assert "\n" not in str(error.value)


def test_days_left_is_negative_once_it_has_ended(tmp_path: Path) -> None:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old")])
    now = datetime.datetime.now(datetime.UTC)
    old = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now - datetime.timedelta(days=3))
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "old.pem").write_bytes(certificate_pem(old))
    assert days_left(tmp_path / "old.pem") == -4


def test_an_authority_comes_back_from_its_files() -> None:
    one, other = create_authority("retina"), create_authority("retina")
    again = load_authority(certificate_pem(one.certificate), key_pem(one.private_key))
    assert again.certificate == one.certificate
    with pytest.raises(BadInputError, match="does not belong"):
        load_authority(certificate_pem(one.certificate), key_pem(other.private_key))
    with pytest.raises(BadInputError, match="expected the authority's"):
        load_authority(b"", key_pem(one.private_key))
    with pytest.raises(BadInputError, match="expected the authority's"):
        load_authority(certificate_pem(one.certificate), b"nothing")


def request_for(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operator")])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return x509.CertificateSigningRequestBuilder(name).sign(key, algorithm).public_bytes(Encoding.PEM).decode()


def test_a_request_gives_its_key_and_nothing_else() -> None:
    key = new_key()
    assert requested_key(request_for(key)) == key.public_key()


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())],
)
def test_a_request_for_another_kind_of_key_is_refused(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
) -> None:
    with pytest.raises(ValueError, match=r"P-256 or P-384"):
        requested_key(request_for(key))


@example(at=7, byte=1, junk="")  # another version of the format
@example(at=129, byte=1, junk="")  # another number of unused bits
@given(at=st.integers(0, 400), byte=st.integers(0, 255), junk=st.text(max_size=50))
def test_an_altered_request_is_refused_or_asks_for_the_same_key(at: int, byte: int, junk: str) -> None:
    key = ec.derive_private_key(2026, ec.SECP256R1())  # the same bytes in every run
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder(name).sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    der = bytearray(request.public_bytes(Encoding.DER))
    at %= len(der)
    was, der[at] = der[at], byte
    import base64

    text = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.b64encode(der).decode()}\n-----END CERTIFICATE REQUEST-----\n"
    try:
        assert requested_key(text) == key.public_key()  # OpenSSL lets the number of a signature's unused bits be another
    except ValueError:
        assert byte != was
    with pytest.raises(ValueError, match="expected a certificate request"):
        requested_key(junk)
