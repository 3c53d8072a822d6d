"""Who speaks, and who may read: Ed25519 identities (RFC 8032), pinned in a roster that is made once, out of band.

Flower's node ids are never identities: any node that reaches the link can file a message in another's name. So
every Urna message is signed by its sender, and a name means the keys that the roster pins to it. A member has one secret of 32
bytes: the Ed25519 key that it signs with, from which the X25519 key that others seal to is derived (see `sealing`).

Covered:
    * forged and altered messages; messages in another member's name; keys that the roster does not list;
    * one member under two names, by either key; sealing keys with which no secret can be shared.
Not covered:
    * a stolen identity file: who has it reads everything that was ever sealed to this member, earlier parcels included;
    * replacing a key: the roster is pinned, a new key is a new roster at every member.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, Field, ValidationError, model_validator

from urna.protocol.errors import SignatureError, SiteConfigError
from urna.protocol.plan import Name, explain, read_text

OPERATOR = "operator"
OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, IDENTITY_FILE = "operator.key", "roster.json", "sites", "identity.key"
PublicKeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # one key
IdentityKeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]  # Ed25519, then X25519
FIELD_PRIME = 2**255 - 19  # of X25519: larger numbers are second names of smaller ones


class Roster(BaseModel, frozen=True, extra="forbid"):
    """The pinned public keys (hex, Ed25519 then X25519) of the operator and of every member site."""

    operator: IdentityKeyHex
    sites: dict[Name, IdentityKeyHex]

    @model_validator(mode="after")
    def _one_key_one_member(self) -> Self:
        """A cohort is counted by names: one member under two would count twice."""
        if OPERATOR in self.sites:
            raise ValueError(f"a site may not be called {OPERATOR}: rename it")
        members = {OPERATOR: self.operator, **self.sites}
        for half in (slice(0, 64), slice(64, 128)):
            count = Counter(key[half] for key in members.values())
            twice = sorted(name for name, key in members.items() if count[key[half]] > 1)
            if twice:
                raise ValueError(f"each member must have its own key, found one of {', '.join(twice)} twice: make another")
        return self

    @model_validator(mode="after")
    def _can_be_sealed_to(self) -> Self:
        probe = X25519PrivateKey.generate()
        for name, key in {OPERATOR: self.operator, **self.sites}.items():
            raw = bytes.fromhex(key[64:])
            try:
                probe.exchange(X25519PublicKey.from_public_bytes(raw))
                usable = int.from_bytes(raw, "little") < FIELD_PRIME
            except ValueError:  # the shared secret would be zero
                usable = False
            if not usable:
                raise ValueError(f"the second key of {name} shares no secret with anyone: ask {name} for its real one")
        return self

    def key_of(self, name: str) -> str:
        """The pinned keys of a member.

        Raises:
            SignatureError: the roster lists no such member.
        """
        key = self.operator if name == OPERATOR else self.sites.get(name)
        if key is None:
            raise SignatureError(f"expected a member of the roster, found {name!r}: ask for a new roster")
        return key

    def sealing_key_of(self, name: str) -> X25519PublicKey:
        """What is sealed to a member is sealed to this key.

        Raises:
            SignatureError: the roster lists no such member.
        """
        return X25519PublicKey.from_public_bytes(bytes.fromhex(self.key_of(name)[64:]))


@dataclass(frozen=True)
class Identity:
    """A name with its private key, from which the key that others seal to is derived."""

    name: str
    private_key: Ed25519PrivateKey

    @cached_property
    def sealing_key(self) -> X25519PrivateKey:
        """Opens what was sealed to this member."""
        derive = HKDF(SHA256(), 32, salt=None, info=b"urna/1 sealing key")
        return X25519PrivateKey.from_private_bytes(derive.derive(self.private_key.private_bytes_raw()))

    @property
    def public_key_hex(self) -> str:
        """Both public keys as the roster lists them."""
        signing, sealing = self.private_key.public_key(), self.sealing_key.public_key()
        return (signing.public_bytes_raw() + sealing.public_bytes_raw()).hex()

    def sign(self, purpose: str, data: bytes) -> bytes:
        """Sign ``data`` for one ``purpose``, bound to this name."""
        return self.private_key.sign(_bound(purpose, self.name, data))


def verify(roster: Roster, name: str, purpose: str, data: bytes, signature: bytes) -> None:
    """Check that the roster's ``name`` signed ``data`` for this ``purpose``.

    Raises:
        SignatureError: it did not, or is not in the roster.
    """
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(roster.key_of(name)[:64]))
    try:
        key.verify(signature, _bound(purpose, name, data))
    except InvalidSignature:
        raise SignatureError(f"expected a {purpose} signed by {name}, found another or no signature") from None


def _bound(purpose: str, name: str, data: bytes) -> bytes:
    return length_prefixed(b"urna/1", purpose.encode(), name.encode(), data)


def length_prefixed(*parts: bytes) -> bytes:
    """One byte string of several: no two lists of parts give the same."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def create_identity(name: str, path: Path) -> Identity:
    """Make a key and store it with mode 0600; an existing file is never overwritten.

    Raises:
        SiteConfigError: there is a file already.
    """
    key = Ed25519PrivateKey.generate()
    _write_key(key, path)
    return Identity(name, key)


def _write_key(key: Ed25519PrivateKey, path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SiteConfigError(f"{path} exists: an identity is made once; move it away to make a new one") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes_raw())


def load_identity(name: str, path: Path) -> Identity:
    """Read a stored key.

    Raises:
        SiteConfigError: there is none, or it is not 32 bytes.
    """
    if not path.is_file():
        raise SiteConfigError(f"expected the private key of {name} at {path}, found nothing")
    raw = path.read_bytes()
    if len(raw) != 32:
        raise SiteConfigError(f"{path}: an Ed25519 private key has 32 bytes, found {len(raw)}")
    return Identity(name, Ed25519PrivateKey.from_private_bytes(raw))


def load_roster(path: Path) -> Roster:
    """Read a roster file (JSON).

    Raises:
        SiteConfigError: there is none, or it is not a roster.
    """
    try:
        return Roster.model_validate_json(read_text(path, "roster", SiteConfigError))
    except ValidationError as error:
        raise SiteConfigError(f"{path}: {explain(error, Roster)}") from None


def create_consortium(folder: Path, names: Iterable[str]) -> Roster:
    """Make all keys of a group at one place: for a simulation, a trial, or one trusted person who hands the folders out.

    ``folder`` gets ``operator.key`` and ``roster.json``; ``folder/sites/NAME``, for each site, gets ``identity.key`` and the
    same roster. Where members do not trust one person with all keys, each makes its own (`create_identity`).

    Args:
        folder: made if it is not there.
        names: of the sites; a simulation of Flower looks for ``site-1``, ``site-2``, ...

    Raises:
        SiteConfigError: one of the files is there already, or a name is none (nothing is written then).
    """
    wanted = list(names)
    keys = {name: Ed25519PrivateKey.generate() for name in (OPERATOR, *wanted)}
    public = {name: Identity(name, key).public_key_hex for name, key in keys.items()}
    operator = public.pop(OPERATOR)
    try:
        roster = Roster(operator=operator, sites=public)
    except ValidationError as error:
        raise SiteConfigError(f"these sites make no consortium: {explain(error, Roster)}") from None
    if not wanted or len(public) != len(wanted):
        raise SiteConfigError(f"expected different names of sites, none of them {OPERATOR!r}, found {wanted}")
    homes = {name: folder / SITES_DIR / name for name in public}
    files = [folder / OPERATOR_KEY_FILE, *(home / IDENTITY_FILE for home in homes.values())]
    rosters = [folder / ROSTER_FILE, *(home / ROSTER_FILE for home in homes.values())]
    there = [str(path) for path in (*files, *rosters) if path.exists()]
    if there:
        raise SiteConfigError(f"{', '.join(there[:3])} exist: keys are made once; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for home in homes.values():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path, key in zip(files, keys.values(), strict=True):
        _write_key(key, path)
    for path in rosters:
        path.write_text(roster.model_dump_json(indent=2), encoding="utf-8")
    return roster
