"""The secure sum: the server learns the total of the sites' vectors and nothing else.

Source: Bonawitz et al. 2017 (pairwise masks), without dropout recovery: when a member of the round's cohort stays away, the
sum is not opened, for nobody holds the missing masks. Two roles:

    set-up (once)   site -> server: Member: a key signed by its identity          server -> sites: all of them
    round           site -> server: vector + sum of masks, modulo 2**32           server: adds; all there = the total

    pair secret     HKDF-SHA256(X25519(own key, peer's key), info = sorted names and keys, campaign)   RFC 7748, 5869
    mask            AES-256-CTR key stream under HMAC-SHA256(pair secret, "mask" || context); added by the site whose
                    name sorts first, subtracted by the other
    context         H(version, campaign, round id, sorted (site, key) list, parameters): one bit changed, other masks

Covered:
    * a curious server or relay, and any set of colluding sites that leaves two honest ones: it sees uniform ring elements;
    * swapped, unsigned and unknown keys, duplicates, a cohort below the minimum, this site missing from it or its key altered;
    * two uploads for one context in one life of a role; across requests and restarts that is the ledger's promise, which
      keeps the bytes for repeats.
Not covered:
    * dropouts: the round ends without a sum (double masking and Shamir shares come with the full protocol);
    * a site that lies about its own vector; n - 1 colluding sites always know the rest, so what is summed is DP anyway.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from urna.privacy.fixed_point import Ring
from urna.privacy.mechanisms import key_stream
from urna.protocol.errors import ProtocolError
from urna.protocol.messages import Member

VERSION = b"urna-secure-sum/1"
CHUNK = 65_536  # ring elements a pass: 256 KiB, so that accumulator and key stream stay in the L2 cache


@dataclass(frozen=True)
class Context:
    """What every mask of one round is bound to.

    Args:
        campaign: the campaign's id.
        round_id: the request's id; used once.
        cohort: the round keys of all members of this round, whose signatures have been checked.
        parameters: hash of the rest of the request (model, mechanism, grid), hex.
    """

    campaign: str
    round_id: str
    cohort: tuple[Member, ...]
    parameters: str

    def digest(self) -> bytes:
        """The binding, 32 bytes."""
        members = sorted((key.site, key.public_key) for key in self.cohort)
        fields = [self.campaign, self.round_id, members, self.parameters]
        return hashlib.sha256(VERSION + json.dumps(fields).encode()).digest()


class SiteRole:
    """One site's side.

    Args:
        site: this site's name.
        private_key: its X25519 round key, made for this campaign.
        min_cohort: the smallest cohort that it takes part in (at least 2).
    """

    def __init__(self, site: str, private_key: X25519PrivateKey, min_cohort: int) -> None:
        self._site = site
        self._private_key = private_key
        self._min_cohort = max(2, min_cohort)
        self._masked: set[bytes] = set()

    def mask(self, vector: Ring, context: Context) -> Ring:
        """Hide ``vector`` (d,) for one round: once for each context.

        Raises:
            RuntimeError: this context has been masked before (a second vector would open the difference).
            ProtocolError: the cohort is too small, has duplicates, or lacks this site with its own key.
        """
        own = check_cohort(context.cohort, self._min_cohort).get(self._site)
        if own is None or own != self._private_key.public_key().public_bytes_raw().hex():
            raise ProtocolError(f"expected {self._site} with its own round key in the cohort, found {own or 'neither'}")
        digest = context.digest()
        if digest in self._masked:
            raise RuntimeError("a round is masked once: answer a repeated request with the stored bytes")
        self._masked.add(digest)
        total = vector.copy()
        for peer in context.cohort:
            if peer.site != self._site:
                add_mask(total, self._edge_seed(peer, context.campaign, digest), negative=peer.site < self._site)
        return total

    def _edge_seed(self, peer: Member, campaign: str, context: bytes) -> bytes:
        own = self._private_key.public_key().public_bytes_raw().hex()
        try:
            shared = self._private_key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer.public_key)))
        except (ValueError, InvalidKey):
            raise ProtocolError(f"expected an X25519 key of {peer.site}, found a low-order point") from None
        info = json.dumps([campaign, sorted([(self._site, own), (peer.site, peer.public_key)])]).encode()
        pair_secret = HKDF(algorithm=SHA256(), length=32, salt=VERSION, info=info).derive(shared)
        return hmac.digest(pair_secret, b"mask" + context, "sha256")


class ServerRole:
    """The server's side: a running sum, so memory does not grow with the number of sites.

    Args:
        sites: the members of this round; all must deliver.
        size: d, the number of ring elements.
    """

    def __init__(self, sites: Iterable[str], size: int) -> None:
        self._missing = set(sites)
        self._total = np.zeros(size, dtype=np.uint32)

    def add(self, site: str, masked: Ring) -> None:
        """Take one site's masked vector.

        Raises:
            ProtocolError: not a member that is still awaited, or another shape or type than agreed.
        """
        if site not in self._missing:
            raise ProtocolError(f"expected one vector of each member, found a second or a foreign one from {site!r}")
        if masked.dtype != np.uint32 or masked.shape != self._total.shape:
            raise ProtocolError(
                f"expected uint32 of shape {self._total.shape} from {site}, found {masked.dtype} of {masked.shape}"
            )
        self._total += masked
        self._missing.discard(site)

    @property
    def missing(self) -> frozenset[str]:
        """The members that have not delivered."""
        return frozenset(self._missing)

    def total(self) -> Ring:
        """The sum of all members' vectors, modulo 2**32.

        Raises:
            RuntimeError: a member is missing; what is there is noise and means nothing.
        """
        if self._missing:
            raise RuntimeError(f"the sum of a round opens when all have delivered; missing: {sorted(self._missing)}")
        return self._total.copy()


def check_cohort(cohort: Sequence[Member], min_cohort: int) -> Mapping[str, str]:
    """The cohort's keys by name.

    Raises:
        ProtocolError: fewer distinct members or distinct keys than entries, or fewer than ``min_cohort``.
    """
    keys = {key.site: key.public_key for key in cohort}
    if len(keys) != len(cohort) or len(set(keys.values())) != len(cohort):
        raise ProtocolError(f"expected each site and key once, found duplicates among {[k.site for k in cohort]}")
    if len(keys) < min_cohort:
        raise ProtocolError(f"expected a cohort of at least {min_cohort} sites, found {len(keys)}")
    return keys


def add_mask(vector: Ring, seed: bytes, *, negative: bool) -> None:
    """Add (or subtract) the key stream of ``seed`` to ``vector`` in place, modulo 2**32."""
    stream = np.frombuffer(key_stream(seed, 4 * vector.size), dtype="<u4")
    operation = np.subtract if negative else np.add
    for start in range(0, vector.size, CHUNK):
        part = slice(start, start + CHUNK)
        operation(vector[part], stream[part], out=vector[part])
