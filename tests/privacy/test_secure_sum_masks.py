"""What hides a vector: masks, their keys and their binding. Statistical tests fail in less than one of a million runs."""

import hashlib
import hmac
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.privacy.secure_sum_cohort import (
    CAMPAIGN,
    Cohort,
    context_of,
    fill_of,
    key_of,
    looks_uniform,
    mask_of,
    member,
    one_hot,
    opened_vector,
)
from tests.privacy.secure_sum_properties import CHANGED, every_seed_depends_on_the_context
from urna.privacy import secure_sum, shamir
from urna.privacy.mechanisms import key_stream
from urna.privacy.secure_sum import CHECK_BYTES, SEED_BYTES, Bytes, Context, SiteRole, Upload
from urna.protocol.quorum import quorum

BITS = [16, 24, 32]


def reference_digest(context: Context) -> bytes:
    numbers = context.quorum
    fields = [
        context.campaign,
        context.round_id,
        sorted([one.site, one.public_key] for one in context.cohort),
        [numbers.num_colluding, numbers.degree, numbers.num_holders, numbers.threshold],
        numbers.min_survivors,
    ]
    sizes = [context.size, context.num_scalars, context.ring_bits, context.graph_seed.hex(), context.request_sha256]
    return hashlib.sha256(b"urna-secure-sum/2" + json.dumps([fields, sizes]).encode()).digest()


def reference_pair_key(own: X25519PrivateKey, own_name: str, peer_name: str, peer_key: bytes, campaign: str) -> bytes:
    """X25519, then HKDF by RFC 5869 written as its two HMACs."""
    own_key = own.public_key().public_bytes_raw()
    shared = own.exchange(X25519PublicKey.from_public_bytes(peer_key))
    if own_name == peer_name:
        shared = own.private_bytes_raw()
    info = json.dumps([campaign, sorted([[own_name, own_key.hex()], [peer_name, peer_key.hex()]])]).encode()
    extracted = hmac.digest(b"urna-secure-sum/2", shared, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def reference_pads(context: Context, dealer: str, holder: str) -> Bytes:
    key = key_of(holder)
    pair_key = reference_pair_key(key, holder, dealer, bytes.fromhex(context.keys[dealer]), context.campaign)
    pad_key = hmac.digest(pair_key, b"pad" + reference_digest(context) + json.dumps([dealer, holder]).encode(), "sha256")
    return np.frombuffer(key_stream(pad_key, SEED_BYTES * (1 + context.quorum.degree)), np.uint8).reshape(-1, SEED_BYTES)


def reference_seeds(context: Context, site: str, upload: Upload) -> list[bytes]:
    """Every seed of an upload, by all holders' pads, recomputed from the words of the protocol."""
    holders = [context.names[at] for at in context.graph.holders]
    pads = np.stack([reference_pads(context, site, holder) for holder in holders])
    secrets = shamir.combine(upload.shares ^ pads, [at + 1 for at in range(len(holders))])
    return [row.tobytes() for row in secrets]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [2, 5])
def test_masks_shares_and_checks_are_those_of_the_protocol(count: int, bits: int) -> None:
    """Computed a second time from its description; versions of the product must agree on every bit."""
    context = context_of(count, size=40, ring_bits=bits)
    cohort = Cohort(context)
    assert context.digest == reference_digest(context)
    for at, name in enumerate(context.names):
        upload = cohort.upload(name, one_hot(context, name))
        seeds = reference_seeds(context, name, upload)
        peers = [one for one in context.names if one != name]
        for seed, peer in zip(seeds[1:], peers, strict=True):
            pair_key = reference_pair_key(key_of(name), name, peer, bytes.fromhex(context.keys[peer]), CAMPAIGN)
            assert seed == hmac.digest(pair_key, b"mask" + reference_digest(context), "sha256")
        for seed, whose, check in zip(seeds, [[name], *(sorted([name, peer]) for peer in peers)], upload.checks, strict=True):
            text = b"check" + context.digest + json.dumps(whose).encode() + b"\0" + seed
            assert check.tobytes() == hashlib.sha256(text).digest()[:CHECK_BYTES]
        vector = opened_vector(context, upload)
        found = context.ring.reduce(vector - mask_of(context, name, seeds))
        assert found.tolist() == [1 if place == at else 0 for place in range(40)]


def test_prg_known_answers() -> None:
    """Of AES-256-CTR from counter 2: the ciphertext of zeros in case 14 of the GCM specification (McGrew, Viega).

    And the key of NIST SP 800-38A (F.5.5) with counters that are encrypted one by one.
    """
    assert key_stream(bytes(32), 16).hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    assert key_stream(bytes(32), 5).hex() == "cea7403d4d"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    assert ecb.update(bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")).hex() == "f3eed1bdb5d2a03c064b5a7e3db181f8"  # F.1.5
    assert key_stream(key, 80) == b"".join(ecb.update(at.to_bytes(16, "big")) for at in range(2, 7))


def test_hkdf_gives_the_known_answer_of_rfc_5869() -> None:
    derived = HKDF(SHA256(), 42, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA))).derive(b"\x0b" * 22)
    assert derived.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


def test_x25519_gives_the_known_answer_of_rfc_7748() -> None:
    """Section 6.1: Bob's private key with Alice's public key."""
    bob = X25519PrivateKey.from_private_bytes(BOB)
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public_key().public_bytes_raw().hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = bob.exchange(X25519PublicKey.from_public_bytes(alice))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def pinned_context() -> tuple[Context, dict[str, X25519PrivateKey]]:
    """Two sites whose private keys are 32 times the byte 1, and 2; nothing in it is drawn at random but the signatures."""
    keys = {name: X25519PrivateKey.from_private_bytes(bytes([at]) * 32) for at, name in enumerate(("alice", "bob"), start=1)}
    cohort = tuple(
        member(name).model_copy(update={"public_key": key.public_key().public_bytes_raw().hex()}) for name, key in keys.items()
    )
    return Context("c", "c/r", cohort, quorum(2, 0), 4, 1, 32, b"seed", "00" * 32), keys


def test_the_chain_from_keys_to_an_edge_seed_is_pinned() -> None:
    """A stored round must open with the next version too: pair key and edge seed of fixed keys, by both ends."""
    context, keys = pinned_context()
    alice, bob = keys.values()
    pair_key = reference_pair_key(alice, "alice", "bob", bob.public_key().public_bytes_raw(), "c")
    assert pair_key.hex() == "b59c17b27e8c57dd31b7f7b9005178c9eea8eac740a80f99d39bb768d6ccfe7b"
    assert pair_key == reference_pair_key(bob, "bob", "alice", alice.public_key().public_bytes_raw(), "c")
    edge_seed = hmac.digest(pair_key, b"mask" + reference_digest(context), "sha256")
    assert reference_digest(context).hex() == "7c847cff0ef79e7180774420388e861c3a447294fb0a26930295b2ee8c104869"
    assert edge_seed.hex() == "5a9c0e0126be6b60ebab330ff44339d602cf93d1ec156e5ba52e4f3c715178d8"
    label = json.dumps(["alice", "bob"]).encode()
    check = hashlib.sha256(b"check" + context.digest + label + b"\0" + edge_seed).digest()[:CHECK_BYTES]
    for name, key in keys.items():
        upload = SiteRole(name, key, "c", 2).upload(context, fill_of(context.ring.zeros(4)), [0])
        assert upload.checks[1].tobytes() == check


@pytest.mark.parametrize("bits", BITS)
def test_mask_uniform_chi2(bits: int) -> None:
    """What leaves a site of constant input: every byte of its numbers, its scalars, its shares; false alarm 1e-7."""
    context = context_of(9, size=120_000, num_scalars=15_000, ring_bits=bits)
    upload = Cohort(context).upload("site-003", np.full(120_000, 3, context.ring.dtype), [7] * 15_000)
    numbers = opened_vector(context, upload)
    for byte in range(bits // 8):
        assert looks_uniform((numbers >> numbers.dtype.type(8 * byte)).astype(np.uint8))
    assert looks_uniform(np.concatenate(list(upload.segments)))
    assert looks_uniform(upload.scalars)


def test_shares_and_checks_look_uniform() -> None:
    """26,912 bytes of shares; 13,952 of checks of 24 sites: each of the 256 values 50 times on average; false alarm 4e-8."""
    context = context_of(29)
    cohort = Cohort(context)
    assert looks_uniform(cohort.upload("site-000").shares)
    own = [cohort.upload(name).checks[0].tobytes() for name in context.names[1:]]
    assert len(set(own)) == len(own)
    assert looks_uniform(Cohort(context).upload("site-001").shares ^ np.uint8(255))


def test_masks_of_two_rounds_differ() -> None:
    """Neither their difference nor their sum shows the vectors; false alarm 4e-8."""
    first = context_of(4, size=50_000)
    second = replace(first, round_id=f"{CAMPAIGN}/round-2")
    cohort, zeros = Cohort(first), first.ring.zeros(50_000)
    vectors = [opened_vector(context, cohort.roles["site-001"].upload(context, fill_of(zeros))) for context in (first, second)]
    assert looks_uniform(vectors[0] - vectors[1])
    assert looks_uniform(vectors[0] + vectors[1])


def test_two_vectors_of_a_site_that_forgot_the_first_do_not_open_their_difference_by_themselves() -> None:
    """A site whose progress was lost: edge masks are the same, self masks are not; false alarm 2e-8."""
    context = context_of(4, size=50_000)
    vectors = [opened_vector(context, Cohort(context).upload("site-001")) for _ in range(2)]
    assert looks_uniform(vectors[0] - vectors[1])


@pytest.mark.parametrize("part", CHANGED)
def test_one_bit_of_the_context_changes_every_mask(part: str) -> None:
    """Also of pairs that are not concerned; equal by chance with probability 2**-250."""
    context = context_of(5)
    assert CHANGED[part].digest != context.digest
    assert every_seed_depends_on_the_context(secure_sum, context, CHANGED[part])


def test_every_field_of_the_context_is_bound() -> None:
    """A field that is added must be added to the list of changes above, and to the digest."""
    covered = ["campaign", "round_id", "cohort", "quorum", "size", "num_scalars", "ring_bits", "graph_seed", "request_sha256"]
    assert list(Context.__dataclass_fields__) == covered
    assert len({one.digest for one in CHANGED.values()}) == len(CHANGED)
    sparse = context_of(100)  # of fewer sites all hold shares and share masks
    numbers = [sparse.quorum, replace(sparse.quorum, num_holders=33), replace(sparse.quorum, degree=34)]
    assert len({replace(sparse, quorum=one).digest for one in numbers}) == 3


def test_the_order_of_the_cohort_changes_nothing() -> None:
    context = context_of(4)
    assert replace(context, cohort=context.cohort[::-1]).digest == context.digest


def test_fields_of_the_context_cannot_run_into_each_other() -> None:
    context = context_of(4)
    one, other = replace(context, campaign="a", round_id="b/c"), replace(context, campaign="a/b", round_id="c")
    assert one.digest != other.digest
    assert replace(context, size=1, num_scalars=23).digest != replace(context, size=12, num_scalars=3).digest


def test_no_two_keys_of_a_round_are_the_same() -> None:
    """Seeds, pads in both directions and of each holder, of all sites: 5 * (1 + 4) seeds of which 10 are of both ends."""
    context = context_of(5)
    cohort = Cohort(context)
    seeds = [seed for name in context.names for seed in reference_seeds(context, name, cohort.upload(name))]
    assert len(set(seeds)) == 5 + 10
    pads = [row.tobytes() for pair in itertools.product(context.names, repeat=2) for row in reference_pads(context, *pair)]
    assert len(set(pads)) == 5 * 5 * 5
    assert not set(pads) & set(seeds)
