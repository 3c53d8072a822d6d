"""TLS certificates of one consortium: an authority of its own, and leaves for servers and for clients.

Keys are on P-256. The authority signs leaves only (path length 0). A leaf is for one side of a handshake, never for both: the
server's certificate of one member cannot be shown as another's client certificate.

Covered:
    * who may connect: a proxy that asks for these client certificates hears nobody else.
Not covered:
    * who speaks: that is the signature of the roster's key on every message. Whoever holds the authority's key can let
      others connect, and can sign nothing in a member's name.
    * taking a certificate back: the proxy's configuration lists the members it lets in; remove the line there.
"""

import datetime
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from urna.protocol.errors import BadInputError

AUTHORITY_DAYS = 3650
AUTHORITY = "Urna consortium authority"  # common name; the consortium's own is the organisation
_CLOCK_SLACK = datetime.timedelta(hours=1)  # a member's clock may be behind


@dataclass(frozen=True)
class Authority:
    """A consortium's certificate authority with its private key."""

    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    @property
    def consortium(self) -> str:
        """The organisation that its certificates name."""
        (attribute,) = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(attribute.value)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key for TLS, on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def create_authority(consortium: str, days: int = AUTHORITY_DAYS) -> Authority:
    """Make a consortium's authority, self-signed."""
    key = new_key()
    name = _name(consortium, AUTHORITY)
    builder = _builder(name, name, key.public_key(), _now() + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)


def load_authority(certificate: bytes, private_key: bytes) -> Authority:
    """Read an authority from PEM.

    Raises:
        BadInputError: it is not one, or the key is another's.
    """
    try:
        found = Authority(x509.load_pem_x509_certificate(certificate), _ec_key(private_key))
        _ = found.consortium
    except (ValueError, TypeError) as error:
        raise BadInputError(
            f"expected the authority's certificate and private key in PEM, found something else: {error}"
        ) from None
    if found.certificate.public_key() != found.private_key.public_key():
        raise BadInputError("the authority's private key does not belong to its certificate: bring both from one folder")
    return found


def server_certificate(
    authority: Authority, common_name: str, hosts: Iterable[str], public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.Certificate:
    """A certificate to answer with at ``hosts`` (DNS names and IP addresses); good for no client."""
    names = [_general_name(host) for host in hosts]
    builder = _leaf(authority, common_name, public_key, days, ExtendedKeyUsageOID.SERVER_AUTH)
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(
        authority.private_key, hashes.SHA256()
    )


def client_certificate(
    authority: Authority, common_name: str, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.Certificate:
    """A certificate to connect with; good for no server."""
    return _leaf(authority, common_name, public_key, days, ExtendedKeyUsageOID.CLIENT_AUTH).sign(
        authority.private_key, hashes.SHA256()
    )


def requested_key(request: str) -> ec.EllipticCurvePublicKey:
    """The public key of a certificate request in PEM; all else that it asks for is ignored.

    Raises:
        ValueError: it is none, its signature is not that key's, or the key is on another curve than P-256 or P-384.
    """
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        valid = parsed.is_signature_valid
        key = parsed.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ValueError(f"expected a certificate request in PEM, found something else ({type(error).__name__})") from None
    if not valid:
        raise ValueError("expected a certificate request that is signed by its own key, found another signature")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise ValueError("expected a certificate request for a key on P-256 or P-384, found another kind of key")
    return key


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The bytes of a certificate's file."""
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The bytes of a private key's file (PKCS #8, not encrypted): for a file that only its owner reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def subject(common_name: str, consortium: str) -> str:
    """The subject of a leaf as RFC 4514 and nginx write it."""
    return _name(consortium, common_name).rfc4514_string()


def _leaf(
    authority: Authority, common_name: str, key: ec.EllipticCurvePublicKey, days: int, purpose: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    """Without its signature; never good for longer than the authority."""
    issuer = authority.certificate
    end = min(_now() + datetime.timedelta(days=days), issuer.not_valid_after_utc)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = _builder(_name(authority.consortium, common_name), issuer.subject, key, end)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )


def _builder(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(_now() - _CLOCK_SLACK).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(consortium: str, common_name: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium)
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
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


def _ec_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the private key is not on an elliptic curve")
    return key


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
