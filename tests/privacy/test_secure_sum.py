"""Statistical tests here fail by chance in about one of a million runs each; keys and masks have no seed."""

import hashlib
import hmac
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from urna.privacy.fixed_point import Ring
from urna.privacy.mechanisms import key_stream, random_bytes
from urna.privacy.secure_sum import CHUNK, Context, ServerRole, SiteRole, add_mask, check_cohort
from urna.protocol.errors import ProtocolError
from urna.protocol.identity import Identity
from urna.protocol.messages import Member

ALPHA = 1e-6
CAMPAIGN, PARAMETERS = "c-1", "ab" * 32


class Group:
    """Sites with their round keys, and the context of one round of all of them."""

    def __init__(self, count: int) -> None:
        self.names = [f"site-{number}" for number in range(1, count + 1)]
        self.keys = {name: X25519PrivateKey.generate() for name in self.names}
        self.members = tuple(member(name, self.keys[name]) for name in self.names)
        self.context = Context(CAMPAIGN, f"{CAMPAIGN}/round-1", self.members, PARAMETERS)

    def role(self, name: str, min_cohort: int = 2) -> SiteRole:
        return SiteRole(name, self.keys[name], min_cohort)

    def mask(self, name: str, vector: Ring, context: Context | None = None) -> Ring:
        return self.role(name).mask(vector, context or self.context)


def member(name: str, key: X25519PrivateKey, campaign: str = CAMPAIGN) -> Member:
    identity = Identity(name, Ed25519PrivateKey.generate())
    return Member.create(identity, campaign, key.public_key().public_bytes_raw().hex(), 100)


def uniform_ring(size: int) -> Ring:
    return np.frombuffer(random_bytes(4 * size), np.uint32).copy()


def looks_uniform(ring: Ring) -> bool:
    """Chi-square over the 256 values of every one of the four bytes; false alarm 2e-6 for each byte."""
    for byte in ring.view(np.uint8).reshape(-1, 4).T:
        counts = np.bincount(byte, minlength=256)
        statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        if not stats.chi2.ppf(ALPHA, 255) < statistic < stats.chi2.isf(ALPHA, 255):
            return False
    return True


GROUP = Group(4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_the_server_opens_the_plain_sum(count: int, size: int, seed: int) -> None:
    members = GROUP.members[:count]
    context = replace(GROUP.context, cohort=members)
    vectors = np.random.default_rng(seed).integers(0, 2**32, (count, size), dtype=np.uint32)
    server = ServerRole([one.site for one in members], size)
    for one, vector in zip(members, vectors, strict=True):
        server.add(one.site, GROUP.mask(one.site, vector, context))
    np.testing.assert_array_equal(server.total(), vectors.sum(axis=0, dtype=np.uint32))


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_vectors_of_any_length_are_summed(size: int) -> None:
    group = Group(3)
    server = ServerRole(reversed(group.names), size)
    vectors = {name: uniform_ring(size) for name in group.names}
    for name in group.names:
        server.add(name, group.mask(name, vectors[name]))
    np.testing.assert_array_equal(server.total(), sum(vectors.values(), np.zeros(size, np.uint32)))


def test_mask_uniform_chi2() -> None:
    """What the server sees of one site is uniform, even where its vector is all zeros; false alarm 8e-6."""
    assert looks_uniform(GROUP.mask("site-1", np.zeros(400_000, np.uint32)))


def test_the_uniformity_test_sees_a_mask_of_31_bits_and_a_missing_one() -> None:
    assert not looks_uniform(uniform_ring(400_000) >> np.uint32(1))
    assert not looks_uniform(np.full(400_000, 7, np.uint32))


def test_the_vector_is_not_changed_in_place() -> None:
    vector = np.arange(10, dtype=np.uint32)
    masked = GROUP.mask("site-2", vector)
    assert vector.tolist() == list(range(10))
    assert not np.array_equal(masked, vector)


OTHER = Group(4)
CHANGED_CONTEXTS = {
    "campaign": replace(GROUP.context, campaign="c-2"),
    "round": replace(GROUP.context, round_id=f"{CAMPAIGN}/round-2"),
    "parameters": replace(GROUP.context, parameters="ab" * 31 + "ac"),
    "a member less": replace(GROUP.context, cohort=GROUP.members[:3]),
    "a member's key": replace(GROUP.context, cohort=(*GROUP.members[:3], OTHER.members[3])),
    "a member's name": replace(GROUP.context, cohort=(*GROUP.members[:3], member("site-5", GROUP.keys["site-4"]))),
}


def pair_mask(one: SiteRole, peer: Member, context: Context) -> Ring:
    """The mask between two sites alone."""
    mask = np.zeros(8, np.uint32)
    add_mask(mask, one._edge_seed(peer, context.campaign, context.digest()), negative=False)
    return mask


@pytest.mark.parametrize("part", CHANGED_CONTEXTS)
def test_every_part_of_the_context_changes_every_mask(part: str) -> None:
    """Also of pairs that are not concerned; equal by chance with probability 2**-256."""
    changed = CHANGED_CONTEXTS[part]
    assert changed.digest() != GROUP.context.digest()
    for name, peer in [("site-1", 1), ("site-1", 2), ("site-2", 2), ("site-2", 0)]:
        role = GROUP.role(name)
        before, after = (pair_mask(role, GROUP.members[peer], one) for one in (GROUP.context, changed))
        assert not np.any(before == after) or (before == after).sum() < 3


def test_the_order_of_the_cohort_changes_nothing() -> None:
    again = replace(GROUP.context, cohort=GROUP.members[::-1])
    zeros = np.zeros(8, np.uint32)
    np.testing.assert_array_equal(GROUP.mask("site-1", zeros), GROUP.mask("site-1", zeros, again))


def test_fields_of_the_context_cannot_run_into_each_other() -> None:
    one = Context("a", "b/c", GROUP.members, "d")
    assert one.digest() != Context("a/b", "c", GROUP.members, "d").digest()
    assert one.digest() != Context("a", "b/cd", GROUP.members, "").digest()


def test_masks_of_two_rounds_do_not_cancel() -> None:
    zeros = np.zeros(50_000, np.uint32)
    second = GROUP.mask("site-1", zeros, CHANGED_CONTEXTS["round"])
    assert looks_uniform(GROUP.mask("site-1", zeros) - second)
    assert looks_uniform(GROUP.mask("site-1", zeros) + second)


def test_two_sites_use_one_mask_with_opposite_signs() -> None:
    context = replace(GROUP.context, cohort=GROUP.members[:2])
    zeros = np.zeros(100, np.uint32)
    one, other = (GROUP.mask(name, zeros, context) for name in ("site-1", "site-2"))
    assert np.any(one)
    assert not np.any(one + other)


def independent_mask(own: X25519PrivateKey, own_name: str, peer: Member, context: Context, size: int) -> Ring:
    """A pair's mask from the words of the protocol: X25519, HKDF by RFC 5869 (two HMACs), HMAC, AES-256-CTR."""
    shared = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer.public_key)))
    pairs = sorted([[own_name, own.public_key().public_bytes_raw().hex()], [peer.site, peer.public_key]])
    info = json.dumps([context.campaign, pairs]).encode()
    extracted = hmac.digest(b"urna-secure-sum/1", shared, "sha256")
    pair_secret = hmac.digest(extracted, info + b"\x01", "sha256")
    members = sorted([one.site, one.public_key] for one in context.cohort)
    fields = json.dumps([context.campaign, context.round_id, members, context.parameters]).encode()
    bound = hashlib.sha256(b"urna-secure-sum/1" + fields).digest()
    stream = key_stream(hmac.digest(pair_secret, b"mask" + bound, "sha256"), 4 * size)
    mask: Ring = np.frombuffer(stream, "<u4").astype(np.uint32)
    return mask if own_name < peer.site else np.zeros(size, np.uint32) - mask


def test_masks_are_those_of_the_protocol() -> None:
    """Computed a second time from its description; versions of the product must agree on every bit."""
    for number, name in enumerate(GROUP.names):
        peers = [one for index, one in enumerate(GROUP.members) if index != number]
        expected = sum(
            (independent_mask(GROUP.keys[name], name, peer, GROUP.context, 20) for peer in peers), np.zeros(20, np.uint32)
        )
        np.testing.assert_array_equal(GROUP.mask(name, np.zeros(20, np.uint32)), expected)


def test_hkdf_gives_the_known_answer_of_rfc_5869() -> None:
    derived = HKDF(SHA256(), 42, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA))).derive(b"\x0b" * 22)
    assert derived.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


def test_x25519_gives_the_known_answer_of_rfc_7748() -> None:
    """Section 6.1: Bob's private key with Alice's public key."""
    bob = X25519PrivateKey.from_private_bytes(bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    alice = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public_key().public_bytes_raw().hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = bob.exchange(X25519PublicKey.from_public_bytes(alice))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_two_colluding_sites_and_the_server_learn_only_the_sum_of_the_other_two() -> None:
    """They take off every mask they can compute; false alarm about 2e-5 for all bytes."""
    size, context = 100_000, GROUP.context
    vectors = {name: np.full(size, 1000 * number, np.uint32) for number, name in enumerate(GROUP.names, start=1)}
    seen = {name: GROUP.mask(name, vectors[name]) for name in GROUP.names}
    left = {}
    for number, victim in enumerate(GROUP.names[:2]):
        left[victim] = seen[victim].copy()
        for colluder in GROUP.names[2:]:
            left[victim] += independent_mask(GROUP.keys[colluder], colluder, GROUP.members[number], context, size)
    total = left["site-1"] + left["site-2"]
    np.testing.assert_array_equal(total, vectors["site-1"] + vectors["site-2"])  # they do learn this
    assert looks_uniform(left["site-1"])
    assert looks_uniform(left["site-2"])


def test_three_colluding_sites_of_four_do_learn_the_fourth() -> None:
    """The other side of the last test: it would notice a mask that the colluders can take off."""
    size = 1000
    vector = np.arange(size, dtype=np.uint32)
    left = GROUP.mask("site-1", vector)
    for colluder in GROUP.names[1:]:
        left += independent_mask(GROUP.keys[colluder], colluder, GROUP.members[0], GROUP.context, size)
    np.testing.assert_array_equal(left, vector)


ZEROS = np.zeros(4, np.uint32)


def test_a_context_is_masked_once() -> None:
    role = GROUP.role("site-1")
    role.mask(ZEROS, GROUP.context)
    with pytest.raises(RuntimeError, match="a round is masked once: answer a repeated request with the stored bytes"):
        role.mask(ZEROS + np.uint32(1), GROUP.context)
    role.mask(ZEROS, CHANGED_CONTEXTS["round"])


def test_a_context_in_another_order_is_the_same_context() -> None:
    role = GROUP.role("site-1")
    role.mask(ZEROS, GROUP.context)
    with pytest.raises(RuntimeError, match="a round is masked once"):
        role.mask(ZEROS, replace(GROUP.context, cohort=GROUP.members[::-1]))


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ((), "expected a cohort of at least 3 sites, found 0"),
        (GROUP.members[:1], "expected a cohort of at least 3 sites, found 1"),
        (GROUP.members[:2], "expected a cohort of at least 3 sites, found 2"),
        (GROUP.members[1:], "expected site-1 with its own round key in the cohort, found neither"),
        ((OTHER.members[0], *GROUP.members[1:]), "expected site-1 with its own round key in the cohort, found [0-9a-f]{64}"),
        ((*GROUP.members, GROUP.members[1]), "expected each site and key once, found duplicates among"),
        ((*GROUP.members, OTHER.members[1]), "expected each site and key once, found duplicates among"),
        ((*GROUP.members, member("site-5", GROUP.keys["site-2"])), "expected each site and key once, found duplicates among"),
        ((*GROUP.members[:2], GROUP.members[1]), "expected each site and key once, found duplicates among"),
    ],
    ids=["nobody", "alone", "two", "without me", "my key altered", "doubled", "name twice", "key twice", "padded"],
)
def test_a_cohort_that_would_open_less_than_agreed_is_refused(cohort: tuple[Member, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        GROUP.role("site-1", min_cohort=3).mask(ZEROS, replace(GROUP.context, cohort=cohort))


@pytest.mark.parametrize("min_cohort", [-1, 0, 1])
def test_no_policy_lets_a_site_be_summed_alone(min_cohort: int) -> None:
    with pytest.raises(ProtocolError, match="expected a cohort of at least 2 sites, found 1"):
        GROUP.role("site-1", min_cohort).mask(ZEROS, replace(GROUP.context, cohort=GROUP.members[:1]))


def test_a_swapped_key_of_a_peer_leaves_noise_and_no_sum() -> None:
    """Site 2 is shown another key of site 1 than site 1 has: nothing opens, least of all site 1's vector."""
    context = replace(GROUP.context, cohort=(OTHER.members[0], *GROUP.members[1:]))
    server = ServerRole(GROUP.names, 50_000)
    vector = np.zeros(50_000, np.uint32)
    for name in GROUP.names:
        server.add(name, GROUP.mask(name, vector, GROUP.context if name == "site-1" else context))
    assert looks_uniform(server.total())


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31, "ecff" + "ff" * 29 + "7f"])
def test_a_key_that_makes_the_secret_known_to_all_is_refused(point: str) -> None:
    weak = GROUP.members[1].model_copy(update={"public_key": point})
    context = replace(GROUP.context, cohort=(GROUP.members[0], weak, *GROUP.members[2:]))
    with pytest.raises(ProtocolError, match="expected an X25519 key of site-2, found a low-order point"):
        GROUP.mask("site-1", ZEROS, context)


def test_the_server_adds_each_member_once() -> None:
    server = ServerRole(["site-1", "site-2"], 4)
    server.add("site-1", ZEROS)
    with pytest.raises(
        ProtocolError, match="expected one vector of each member, found a second or a foreign one from 'site-1'"
    ):
        server.add("site-1", ZEROS)
    with pytest.raises(ProtocolError, match="found a second or a foreign one from 'site-3'"):
        server.add("site-3", ZEROS)
    assert server.missing == {"site-2"}


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros(5, np.uint32), r"expected uint32 of shape \(4,\) from site-1, found uint32 of \(5,\)"),
        (np.zeros((), np.uint32), r"found uint32 of \(\)"),
        (np.zeros(1, np.uint32), r"found uint32 of \(1,\)"),
        (np.zeros((1, 4), np.uint32), r"found uint32 of \(1, 4\)"),
        (np.zeros(4, np.float32), r"found float32 of \(4,\)"),
        (np.zeros(4, np.int32), r"found int32 of \(4,\)"),
        (np.zeros(4, np.uint64), r"found uint64 of \(4,\)"),
    ],
)
def test_a_vector_of_another_form_is_refused_and_changes_nothing(vector: Ring, message: str) -> None:
    server = ServerRole(["site-1"], 4)
    with pytest.raises(ProtocolError, match=message):
        server.add("site-1", vector)
    server.add("site-1", ZEROS + np.uint32(3))
    assert server.total().tolist() == [3] * 4


def test_nothing_is_read_before_all_have_delivered() -> None:
    server = ServerRole(["site-1", "site-2", "site-3"], 4)
    for name in ("site-1", "site-2"):
        server.add(name, ZEROS)
    with pytest.raises(RuntimeError, match=r"opens when all have delivered; missing: \['site-3'\]"):
        server.total()


def test_the_total_is_a_copy() -> None:
    server = ServerRole(["site-1"], 4)
    server.add("site-1", ZEROS)
    server.total()[:] = 9
    assert server.total().tolist() == [0] * 4


def test_without_one_member_the_rest_is_noise() -> None:
    """Nothing can be read from an incomplete sum; false alarm 8e-6."""
    partial = np.zeros(100_000, np.uint32)
    for name in GROUP.names[:3]:
        partial += GROUP.mask(name, np.zeros(100_000, np.uint32))
    assert looks_uniform(partial)


def test_check_cohort_gives_the_keys_by_name() -> None:
    assert check_cohort(GROUP.members, 4) == {one.site: one.public_key for one in GROUP.members}
