"""``consortium.toml``: who takes part, and where the sites reach the operator. Read by `urna provision`.

Every value goes into other programs' files (nginx, Flower, a shell's command line), so each has a narrow form here.
"""

import ipaddress
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import Field, ValidationError, field_validator, model_validator

from urna.protocol.errors import BadInputError
from urna.protocol.identity import OPERATOR
from urna.protocol.plan import Name, Section, explain, read_document
from urna.server.certificates import requested_key

Port = Annotated[int, Field(ge=1, le=65_535)]
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*{_LABEL}\Z")
_MAX_SITES = 1000


class Operator(Section):
    """``[operator]``: one machine, with the SuperLink on an inner address and a proxy on the one that the sites reach."""

    address: str  # host:port of the proxy, as the sites reach it
    also: tuple[str, ...] = ()  # further DNS names and IP addresses of the proxy's certificate
    listen: str | None = None  # ip:port that the proxy listens on; None: all IPv4 addresses, port as in address
    superlink: str = "127.0.0.1:8000"  # host:port of the SuperLink: loopback, or an inner network's
    certificate_days: Annotated[int, Field(ge=1, le=3650)] = 365

    @field_validator("address", "listen", "superlink")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @field_validator("also")
    @classmethod
    def _hosts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            _check_host(value)
        return values

    @field_validator("listen")
    @classmethod
    def _listens_on_an_ip_address(cls, value: str | None) -> str | None:
        if value is not None and _ip(split_address(value)[0]) is None:
            raise ValueError("expected an IP address and a port, like 0.0.0.0:443")
        return value

    @field_validator("superlink")
    @classmethod
    def _superlink_stays_inside(cls, value: str) -> str:
        """Its port also serves the Control API, which has no login."""
        address = _ip(split_address(value)[0])
        if address is not None and (address.is_unspecified or address.is_global):
            raise ValueError(
                "the SuperLink has an open control port: expected a loopback or inner address, like 127.0.0.1:8000"
            )
        return value


class Member(Section):
    """``[[site]]``: a name; its keys are made here, unless the site has made its own and sent the public halves."""

    name: Name
    contact: Annotated[str, Field(max_length=200)] | None = None  # for the operator's eyes
    egress_port: Port = 9443  # of the site's own way out to the proxy, on its loopback
    public_key: str | None = None  # of the site's identity, as `urna-site init` prints it
    node_public_key: str | None = None  # of its SuperNode: one OpenSSH line
    certificate_request: str | None = None  # PEM, for its TLS key

    @property
    def own_keys(self) -> bool:
        """Whether the site made its keys: then none of its private keys was ever here."""
        return self.public_key is not None

    @field_validator("contact")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("expected one line of text")
        return value

    @field_validator("node_public_key")
    @classmethod
    def _node_key(cls, value: str | None) -> str | None:
        return None if value is None else _openssh_line(value)

    @field_validator("certificate_request")
    @classmethod
    def _request(cls, value: str | None) -> str | None:
        if value is not None:
            requested_key(value)
        return value

    @model_validator(mode="after")
    def _all_keys_or_none(self) -> Self:
        given = {name: getattr(self, name) for name in ("public_key", "node_public_key", "certificate_request")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise ValueError(f"a site that makes its own keys gives the public half of all three: add {', '.join(missing)}")
        return self


class Consortium(Section):
    """``consortium.toml``."""

    name: Name  # also the federation's, for `urna run --federation NAME`
    operator: Operator
    site: Annotated[tuple[Member, ...], Field(min_length=1, max_length=_MAX_SITES)]

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        names = [one.name for one in self.site]
        if OPERATOR in names:
            raise ValueError(f"a site may not be called {OPERATOR}: rename it")
        for what, values in (
            ("name", names),
            ("public_key", [one.public_key for one in self.site]),
            ("node_public_key", [one.node_public_key for one in self.site]),
            ("certificate_request", [one.certificate_request for one in self.site]),
        ):
            twice = [value for value, count in Counter(values).items() if value is not None and count > 1]
            if twice:
                raise ValueError(f"each site must have its own {what}, found one twice: {twice[0][:80]!r}")
        return self


def load_consortium(path: Path) -> Consortium:
    """Read ``consortium.toml``.

    Raises:
        BadInputError: missing, not TOML, or a key that is unknown, missing or out of range.
    """
    document = read_document(path, "consortium.toml", BadInputError)
    try:
        return Consortium.model_validate(document)
    except ValidationError as error:
        raise BadInputError(f"{path}: {explain(error, Consortium)}") from None


def split_address(value: str) -> tuple[str, int]:
    """Host and port; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is neither a DNS name nor an IP address with a port.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65_535:
        raise ValueError("expected host:port, like fleet.example.org:443")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    address = _check_host(host)
    if (address is not None and address.version == 6) != bracketed:
        raise ValueError("expected an IPv6 address, and nothing else, in brackets, like [2001:db8::1]:443")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """What `split_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether a host is an IP address; else it is a DNS name."""
    return _ip(host) is not None


def _check_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    address = _ip(host)
    if address is None and (not _DNS_NAME.match(host) or re.search(r"(^|\.)[0-9]+\Z", host)):
        raise ValueError("expected a DNS name in small letters or an IP address")
    return address


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def _openssh_line(value: str) -> str:
    """Key type and key, without the comment."""
    try:
        key = load_ssh_public_key(value.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("expected one line of OpenSSH, like ecdsa-sha2-nistp384 AAAA...") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("a SuperNode's key is on a NIST curve, found another kind: ssh-keygen -t ecdsa -b 384")
    return " ".join(value.split()[:2])
