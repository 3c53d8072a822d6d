import hmac
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from urna.protocol.errors import SignatureError, SiteConfigError
from urna.protocol.identity import (
    OPERATOR,
    Identity,
    Roster,
    create_consortium,
    create_identity,
    load_identity,
    load_roster,
    verify,
)

# RFC 8032, section 7.1, test 2
RFC_SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
RFC_SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def identity(name: str) -> Identity:
    return Identity(name, Ed25519PrivateKey.generate())


OPERATOR_IDENTITY, ONE, TWO = identity(OPERATOR), identity("site-1"), identity("site-2")
ROSTER = Roster(operator=OPERATOR_IDENTITY.public_key_hex, sites={"site-1": ONE.public_key_hex, "site-2": TWO.public_key_hex})


def test_signatures_are_the_ed25519_of_rfc_8032() -> None:
    key = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    assert Identity("x", key).public_key_hex[:64] == RFC_PUBLIC
    assert key.sign(b"\x72").hex() == RFC_SIGNATURE


def test_what_a_member_signed_is_accepted() -> None:
    for member in (OPERATOR_IDENTITY, ONE, TWO):
        verify(ROSTER, member.name, "message", b"data", member.sign("message", b"data"))


@pytest.mark.parametrize(
    ("name", "purpose", "data", "signature"),
    [
        ("site-1", "message", b"datA", ONE.sign("message", b"data")),
        ("site-1", "member", b"data", ONE.sign("message", b"data")),
        ("site-2", "message", b"data", ONE.sign("message", b"data")),
        ("operator", "message", b"data", ONE.sign("message", b"data")),
        ("site-1", "message", b"data", identity("site-1").sign("message", b"data")),
        ("site-1", "message", b"data", Identity("site-2", ONE.private_key).sign("message", b"data")),
        ("site-1", "message", b"data", ONE.private_key.sign(b"data")),
        ("site-1", "message", b"data", b""),
        ("site-1", "message", b"data", bytes(64)),
        ("site-1", "message", b"data", ONE.sign("message", b"data") + b"\0"),
    ],
    ids=[
        *("altered", "other purpose", "swapped sender", "in the operator's name", "own key", "own name", "unbound"),
        *("empty", "zeros", "longer"),
    ],
)
def test_a_forged_signature_is_refused(name: str, purpose: str, data: bytes, signature: bytes) -> None:
    with pytest.raises(SignatureError, match=f"expected a {purpose} signed by {name}, found another or no signature"):
        verify(ROSTER, name, purpose, data, signature)


def test_a_signature_with_one_bit_flipped_is_refused() -> None:
    good = ONE.sign("message", b"data")
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(SignatureError, match="found another or no signature"):
            verify(ROSTER, "site-1", "message", b"data", bytes(bad))


def test_a_stranger_is_refused() -> None:
    with pytest.raises(SignatureError, match="expected a member of the roster, found 'site-3': ask for a new roster"):
        verify(ROSTER, "site-3", "message", b"data", identity("site-3").sign("message", b"data"))


parts = st.tuples(st.text(max_size=4), st.text(max_size=4), st.binary(max_size=4))


@given(parts, parts)
def test_no_two_signed_things_have_the_same_bytes(one: tuple[str, str, bytes], other: tuple[str, str, bytes]) -> None:
    def signed(name: str, purpose: str, data: bytes) -> bytes:
        return Identity(name, ONE.private_key).sign(purpose, data)  # Ed25519 is deterministic

    assert (signed(*one) == signed(*other)) == (one == other)


def test_moving_a_byte_from_one_field_to_the_next_changes_the_signature() -> None:
    assert Identity("ab", ONE.private_key).sign("p", b"c") != Identity("a", ONE.private_key).sign("p", b"bc")
    assert Identity("a", ONE.private_key).sign("pa", b"c") != Identity("aa", ONE.private_key).sign("p", b"c")


def test_an_identity_file_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_identity("site-1", tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    create_identity("site-1", path)
    before = path.read_bytes()
    with pytest.raises(SiteConfigError, match="key exists: an identity is made once; move it away to make a new one"):
        create_identity("site-1", path)
    assert path.read_bytes() == before


def test_an_identity_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "target")
    with pytest.raises(SiteConfigError, match="an identity is made once"):
        create_identity("site-1", tmp_path / "key")
    assert not (tmp_path / "target").exists()


def test_a_stored_identity_is_read_back(tmp_path: Path) -> None:
    made = create_identity("site-1", tmp_path / "key")
    assert load_identity("site-1", tmp_path / "key").public_key_hex == made.public_key_hex


def test_every_identity_has_its_own_key(tmp_path: Path) -> None:
    keys = {create_identity("site-1", tmp_path / str(number)).public_key_hex for number in range(20)}
    assert len(keys) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected the private key of site-1 at .*key, found nothing"),
        (b"x" * 31, "has 32 bytes, found 31"),
        (b"", "found 0"),
    ],
)
def test_what_is_no_identity_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SiteConfigError, match=message):
        load_identity("site-1", tmp_path / "key")


def test_a_private_key_is_not_in_the_text_of_an_identity() -> None:
    assert ONE.private_key.private_bytes_raw().hex() not in repr(ONE)


def test_the_sealing_key_is_a_function_of_the_signing_key_and_of_its_own() -> None:
    """HKDF-SHA256 of the secret of RFC 8032's test 2, so that a stored identity never opens other parcels than before."""
    one = Identity("x", Ed25519PrivateKey.from_private_bytes(RFC_SECRET))
    derived = hmac.digest(hmac.digest(bytes(32), RFC_SECRET, "sha256"), b"urna/1 sealing key\x01", "sha256")  # RFC 5869
    assert one.sealing_key.private_bytes_raw() == derived
    assert one.public_key_hex[64:] == one.sealing_key.public_key().public_bytes_raw().hex()
    assert one.public_key_hex[64:] != RFC_PUBLIC
    assert derived.hex() not in repr(one)


def test_a_member_shares_a_secret_with_whom_the_roster_lists() -> None:
    shared = TWO.sealing_key.exchange(ROSTER.sealing_key_of("site-1"))
    assert shared == ONE.sealing_key.exchange(ROSTER.sealing_key_of("site-2"))
    with pytest.raises(SignatureError, match="found 'site-3': ask for a new roster"):
        ROSTER.sealing_key_of("site-3")


LOW_ORDER = [  # of X25519 (RFC 7748, section 6.1; the list of curve25519 points of small order)
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
    "00" * 31 + "80",
]
GOOD = ONE.public_key_hex[64:]
SAME_POINT = GOOD[:62] + f"{int(GOOD[62:], 16) | 0x80:02x}"  # X25519 ignores the last bit


@pytest.mark.parametrize("second", [*LOW_ORDER, SAME_POINT], ids=[*map(str, range(len(LOW_ORDER))), "same point"])
def test_a_sealing_key_that_shares_no_secret_or_is_another_name_of_one_is_refused(second: str) -> None:
    with pytest.raises(ValidationError, match="the second key of site-1 shares no secret with anyone: ask site-1 for its"):
        Roster(operator=OPERATOR_IDENTITY.public_key_hex, sites={"site-1": ONE.public_key_hex[:64] + second})


@pytest.mark.parametrize("half", [slice(0, 64), slice(64, 128)], ids=["signing", "sealing"])
def test_no_half_of_a_members_keys_is_anothers(half: slice) -> None:
    parts = [TWO.public_key_hex[:64], TWO.public_key_hex[64:]]
    parts[half.start // 64] = ONE.public_key_hex[half]
    with pytest.raises(ValidationError, match="own key, found one of site-1, site-2 twice"):
        Roster(operator=OPERATOR_IDENTITY.public_key_hex, sites={"site-1": ONE.public_key_hex, "site-2": "".join(parts)})


K1, K2, K3 = ("1" * 128, "2" * 128, "3" * 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "roster.json: Invalid JSON"),
        ("{}", "roster.json: missing key operator: add it; missing key sites: add it"),
        (f'{{"operator": "{K1}", "sites": {{}}, "extra": 1}}', "roster.json: unknown key extra"),
        (f'{{"operator": "{K1}", "sites": {{"a": "xyz"}}}}', "sites.a: string should match pattern"),
        (f'{{"operator": "{K1.replace("1", "A")}", "sites": {{}}}}', "operator: string should match pattern"),
        (f'{{"operator": "{K1}", "sites": {{"../a": "{K2}"}}}}', "string should match pattern"),
        (f'{{"operator": "{K1}", "sites": {{"a": "{K2}", "b": "{K2}"}}}}', "own key, found one of a, b twice: make another"),
        (f'{{"operator": "{K1}", "sites": {{"a": "{K1}", "b": "{K2}"}}}}', "own key, found one of a, operator twice"),
        (f'{{"operator": "{K1[:64]}", "sites": {{}}}}', "operator: string should match pattern"),
        (f'{{"operator": "{K1}", "sites": {{"operator": "{K2}"}}}}', "a site may not be called operator: rename it"),
    ],
    ids=[
        "cut",
        "empty",
        "extra",
        "key",
        "upper case",
        "name",
        "one key twice",
        "operator's key",
        "one half",
        "operator's name",
    ],
)
def test_what_is_no_roster_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "roster.json").write_text(text, "utf-8")
    with pytest.raises(SiteConfigError, match=message):
        load_roster(tmp_path / "roster.json")


def test_a_roster_is_read_and_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "roster.json").write_text(ROSTER.model_dump_json(), "utf-8")
    roster = load_roster(tmp_path / "roster.json")
    assert roster == ROSTER
    assert roster.key_of(OPERATOR) == OPERATOR_IDENTITY.public_key_hex
    with pytest.raises(ValidationError, match="frozen"):
        roster.operator = K3  # type: ignore[misc]


def test_a_consortium_has_all_keys_and_one_roster(tmp_path: Path) -> None:
    names = ["site-1", "hospital-a"]
    roster = create_consortium(tmp_path / "group", names)
    assert list(roster.sites) == names
    assert load_roster(tmp_path / "group" / "roster.json") == roster
    operator = load_identity(OPERATOR, tmp_path / "group" / "operator.key")
    assert operator.public_key_hex == roster.operator
    for name in names:
        folder = tmp_path / "group" / "sites" / name
        assert load_identity(name, folder / "identity.key").public_key_hex == roster.sites[name]
        assert load_roster(folder / "roster.json") == roster
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = list((tmp_path / "group").rglob("*.key"))
    assert len(keys) == 3
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_consortium_is_never_made_over_another(tmp_path: Path) -> None:
    create_consortium(tmp_path, ["site-1", "site-2"])
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SiteConfigError, match=r"operator\.key.* exist: keys are made once; choose another folder"):
        create_consortium(tmp_path, ["site-3", "site-4"])
    (tmp_path / "operator.key").unlink()
    (tmp_path / "roster.json").unlink()
    with pytest.raises(SiteConfigError, match="exist: keys are made once"):
        create_consortium(tmp_path, ["site-2", "site-3"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items() <= kept.items()
    assert not (tmp_path / "sites" / "site-3").exists()


@pytest.mark.parametrize("names", [[], ["operator"], ["site-1", "site-1"], ["Site 1"], ["../site-1"]], ids=str)
def test_names_that_make_no_consortium_write_nothing(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(SiteConfigError, match=r"expected different names of sites|make no consortium"):
        create_consortium(tmp_path / "group", names)
    assert not (tmp_path / "group").exists()
