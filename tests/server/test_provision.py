"""`urna provision`: everything for a consortium, all or nothing, private from the first moment on."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.consortium_files import DOCUMENT, EXAMPLE, client_context, handshake, server_context, write_document
from tests.server.test_cli import refused, urna
from tests.system_tools import require
from urna.client.config import Link
from urna.protocol.errors import BadInputError
from urna.protocol.identity import OPERATOR, create_identity, load_identity, load_roster
from urna.server.certificates import new_key
from urna.server.consortium import load_consortium
from urna.server.provision import provision

NEW_SITE = '[[site]]\nname = "hospital-c"\n'


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A provisioned folder; its document lies beside it."""
    provision(write_document(tmp_path), tmp_path / "made")
    return tmp_path / "made"


def test_every_member_gets_what_it_needs_and_no_more(made: Path) -> None:
    site = {"identity.key", "node.key", "roster.json", "ca.pem", "site.toml", "README.txt", "egress"}
    expected = {
        "authority": {"ca.key", "ca.pem"},
        "operator": {
            *("operator.key", "roster.json", "ca.pem", "superlink.pem", "superlink.key", "superexec.secret"),
            *("flwr", "nodes", "consortium.json", "README.txt"),
        },
        "operator/nodes": {"hospital-a.pub", "hospital-b.pub"},
        "operator/flwr": {"config.toml"},
        "proxy": {"nginx.conf", "ca.pem", "proxy.pem", "proxy.key"},
        "sites": {"hospital-a", "hospital-b"},
        "sites/hospital-a": site,
        "sites/hospital-a/egress": {"nginx.conf", "ca.pem", "client.pem", "loopback.pem", "tls.key"},
        "sites/hospital-b": site,
    }
    for folder, names in expected.items():
        assert {path.name for path in (made / folder).iterdir()} == names, folder
    assert sorted(path.name for path in made.parent.iterdir()) == ["consortium.toml", "made"]


def test_keys_are_those_of_the_roster_and_all_different(made: Path) -> None:
    roster = load_roster(made / "operator" / "roster.json")
    assert load_identity(OPERATOR, made / "operator" / "operator.key").public_key_hex == roster.operator
    for name in ("hospital-a", "hospital-b"):
        home = made / "sites" / name
        assert load_identity(name, home / "identity.key").public_key_hex == roster.sites[name]
        assert (home / "roster.json").read_bytes() == (made / "operator" / "roster.json").read_bytes()
        key = load_ssh_private_key((home / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert isinstance(key.curve, ec.SECP384R1)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        assert (made / "operator" / "nodes" / f"{name}.pub").read_bytes().strip() == public
    private = [path.read_bytes() for path in made.rglob("*") if path.suffix in (".key", ".secret")]
    assert len(set(private)) == len(private) == 11


@pytest.mark.parametrize("umask", [0, 0o077, 0o022])
def test_modes_hold_under_every_umask(tmp_path: Path, umask: int) -> None:
    document = write_document(tmp_path)
    before = os.umask(umask)
    try:
        provision(document, tmp_path / "made")
        document.write_text(DOCUMENT + NEW_SITE, encoding="utf-8")
        provision(document, tmp_path / "made", add=True)
    finally:
        os.umask(before)
    made = tmp_path / "made"
    for path in (made, *made.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        else:
            private = path.suffix in (".key", ".secret")
            assert mode == (0o600 if private else 0o644), path


def test_no_file_is_open_to_others_at_any_moment(tmp_path: Path) -> None:
    """As the kernel saw it: every file is made with 0600, every folder with 0700, with no umask to help."""
    strace = require("strace")
    code = "import os, sys; os.umask(0); from pathlib import Path; from urna.server.provision import provision; "
    code += f"provision(Path({str(write_document(tmp_path))!r}), Path({str(tmp_path / 'made')!r}))"
    log = tmp_path / "strace.log"
    command = [strace, "-f", "-qq", "-s", "500", "-e", "trace=open,openat,creat,mkdir,mkdirat", "-o", str(log)]
    subprocess.run([*command, sys.executable, "-B", "-c", code], check=True, timeout=120)
    made = [line for line in log.read_text().splitlines() if ".made." in line and " = -1" not in line]
    files = [line for line in made if "O_CREAT" in line]
    folders = [line for line in made if "mkdir" in line]
    assert len(files) > 25
    assert len(folders) > 9
    assert [line for line in files if "O_EXCL" not in line or not re.search(r", 0600\)", line)] == []
    assert [line for line in folders if not re.search(r", 0700\)", line)] == []


def test_the_drafts_link_is_one_that_a_site_can_read(made: Path) -> None:
    draft = tomllib.loads((made / "sites" / "hospital-a" / "site.toml").read_text("utf-8"))
    assert draft["name"] == "hospital-a"
    link = Link.model_validate(draft["link"])
    assert link.superlink == "127.0.0.1:9443"
    assert (made / "sites" / "hospital-a" / link.root_certificates).is_file()
    assert (made / "sites" / "hospital-a" / link.node_key).is_file()


def test_flowers_command_line_finds_the_federation(made: Path) -> None:
    entry = tomllib.loads((made / "operator" / "flwr" / "config.toml").read_text("utf-8"))["superlink"]["retina"]
    assert entry["address"] == "127.0.0.1:8000"
    assert Path(entry["root-certificates"]).read_bytes() == (made / "authority" / "ca.pem").read_bytes()


def test_the_certificates_fit_their_places(made: Path) -> None:
    """Site to its own egress, egress to proxy, proxy to SuperLink; and no server's certificate in another's place."""
    site, ca = made / "sites" / "hospital-a" / "egress", made / "authority" / "ca.pem"
    loopback = server_context(site / "loopback.pem", site / "tls.key")
    proxy = server_context(made / "proxy" / "proxy.pem", made / "proxy" / "proxy.key", ca)
    superlink = server_context(made / "operator" / "superlink.pem", made / "operator" / "superlink.key")
    assert handshake(loopback, client_context(ca), "127.0.0.1") == b"heard"
    assert handshake(proxy, client_context(ca, site / "client.pem", site / "tls.key"), "localhost") == b"heard"
    for host in ("127.0.0.1", "superlink.urna.internal"):
        assert handshake(superlink, client_context(ca), host) == b"heard"
    for impostor in (loopback, proxy):
        with pytest.raises(OSError, match=r"(?i)certificate"):
            handshake(impostor, client_context(ca, site / "client.pem", site / "tls.key"), "superlink.urna.internal")
    with pytest.raises(OSError, match=r"(?i)certificate"):
        handshake(loopback, client_context(ca), "proxy.urna.internal")


def test_a_second_run_changes_nothing_and_says_so(made: Path) -> None:
    before = snapshot(made)
    for add in (False, True):
        (line,) = provision(made.parent / "consortium.toml", made, add=add)
        assert "nothing was changed" in line
    assert snapshot(made) == before


def test_adding_a_site_keeps_everything_but_what_lists_all_sites(made: Path) -> None:
    before, document = snapshot(made), write_document(made.parent, DOCUMENT + NEW_SITE)
    with pytest.raises(BadInputError, match="--add"):
        provision(document, made)
    lines = provision(document, made, add=True)
    assert any("roster has changed" in line and "every site" in line for line in lines)
    after = snapshot(made)
    new = {name for name in after if "hospital-c" in name}
    assert len(new) == 14
    assert set(after) == set(before) | new
    assert {name for name in before if before[name] != after[name]} == {
        *("operator/roster.json", "operator/README.txt", "operator/consortium.json", "proxy/nginx.conf"),
        *(f"sites/{site}/{name}" for site in ("hospital-a", "hospital-b") for name in ("roster.json", "README.txt")),
    }
    rosters = [load_roster(path) for path in made.rglob("roster.json")]
    assert len(rosters) == 4
    assert all(one == rosters[0] and list(one.sites) == ["hospital-a", "hospital-b", "hospital-c"] for one in rosters)
    home = made / "sites" / "hospital-c"
    assert load_identity("hospital-c", home / "identity.key").public_key_hex == rosters[0].sites["hospital-c"]
    proxy = server_context(made / "proxy" / "proxy.pem", made / "proxy" / "proxy.key", made / "authority" / "ca.pem")
    client = client_context(made / "authority" / "ca.pem", home / "egress" / "client.pem", home / "egress" / "tls.key")
    assert handshake(proxy, client, "localhost") == b"heard"


def test_folders_that_were_handed_out_and_deleted_are_not_made_again(made: Path) -> None:
    shutil.rmtree(made / "sites")
    provision(write_document(made.parent, DOCUMENT + NEW_SITE), made, add=True)
    assert [path.name for path in (made / "sites").iterdir()] == ["hospital-c"]
    assert list(load_roster(made / "operator" / "roster.json").sites) == ["hospital-a", "hospital-b", "hospital-c"]


def test_a_contact_may_change(made: Path) -> None:
    document = write_document(made.parent, DOCUMENT + 'contact = "the night desk"\n')
    before = snapshot(made)
    provision(document, made, add=True)
    assert "the night desk" in (made / "operator" / "README.txt").read_text("utf-8")
    changed = {name for name, was in before.items() if snapshot(made)[name] != was}
    assert changed == {"operator/README.txt", "operator/consortium.json"}


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"localhost:8443"', '"localhost:8444"', "another operator"),
        ('name = "retina"', 'name = "other"', "another name"),
        ('name = "hospital-a"', 'name = "hospital-x"', "in their order"),
        ('name = "hospital-a"', 'name = "hospital-a"\negress_port = 1234', "another site hospital-a"),
    ],
)
def test_what_stands_in_certificates_cannot_be_changed_by_adding(made: Path, old: str, new: str, part: str) -> None:
    before = snapshot(made)
    with pytest.raises(BadInputError, match=part):
        provision(write_document(made.parent, DOCUMENT.replace(old, new) + NEW_SITE), made, add=True)
    assert snapshot(made) == before


def break_authority(made: Path) -> None:
    (made / "authority" / "ca.key").unlink()


def break_new_site(made: Path) -> None:
    (made / "sites" / "hospital-c").mkdir()


def break_roster(made: Path) -> None:
    (made / "operator" / "roster.json").write_text("{}")


def break_last_write(made: Path) -> None:
    """A folder where a file is to be replaced, almost at the end: by then the new site's folders and the roster are there."""
    shutil.rmtree(made / "sites" / "hospital-b")
    (made / "sites" / "hospital-b" / "roster.json" / "x").mkdir(parents=True)


@pytest.mark.parametrize("break_it", [break_authority, break_new_site, break_roster, break_last_write])
def test_an_addition_that_fails_leaves_all_as_it_was(made: Path, break_it: Callable[[Path], None]) -> None:
    break_it(made)
    before = snapshot(made)
    with pytest.raises((BadInputError, OSError)):
        provision(write_document(made.parent, DOCUMENT + NEW_SITE), made, add=True)
    assert snapshot(made) == before


def test_an_existing_folder_or_file_is_never_written_to(tmp_path: Path) -> None:
    document = write_document(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path / "mine")
    for name in ("mine", "file", "dangling"):
        for add in (False, True):
            with pytest.raises(BadInputError, match="did not make it"):
                provision(document, tmp_path / name, add=add)
    assert snapshot(tmp_path / "mine") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consortium.toml", "dangling", "file", "mine"]


@pytest.mark.parametrize("out", ["nowhere/made", "consortium.toml/made"])
def test_a_folder_without_a_parent_is_not_made(tmp_path: Path, out: str) -> None:
    with pytest.raises(BadInputError, match="make it first"):
        provision(write_document(tmp_path), tmp_path / out)


def own_keys(folder: Path, name: str = "hospital-c") -> tuple[str, ec.EllipticCurvePrivateKey]:
    """A site's own keys: its entry of the document, and its TLS key."""
    folder.mkdir()
    identity = create_identity(name, folder / "identity.key")
    node = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "anything")])
    request = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    entry = f'[[site]]\nname = "{name}"\npublic_key = "{identity.public_key_hex}"\n'
    entry += f'node_public_key = "{node} someone@somewhere"\ncertificate_request = """\n{request}"""\n'
    return entry, key


@pytest.mark.parametrize("added_later", [False, True])
def test_a_site_with_its_own_keys_gets_no_private_one(tmp_path: Path, added_later: bool) -> None:
    entry, key = own_keys(tmp_path / "own")
    made = tmp_path / "made"
    if added_later:
        provision(write_document(tmp_path), made)
    lines = provision(write_document(tmp_path, DOCUMENT + entry), made, add=added_later)
    home = made / "sites" / "hospital-c"
    assert {path.name for path in home.rglob("*") if path.is_file()} == {
        *("roster.json", "ca.pem", "site.toml", "README.txt", "nginx.conf", "client.pem", "loopback.pem")
    }
    certificate = x509.load_pem_x509_certificate((home / "egress" / "client.pem").read_bytes())
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=hospital-c,O=retina"
    roster = load_roster(home / "roster.json")
    assert roster.sites["hospital-c"] == load_identity("hospital-c", tmp_path / "own" / "identity.key").public_key_hex
    assert "someone" not in (made / "operator" / "nodes" / "hospital-c.pub").read_text()
    (said,) = [line for line in lines if "Whoever" in line]
    assert "as the operator and as hospital-a, hospital-b:" in said
    assert "Nobody here can speak as hospital-c." in said
    assert said in (made / "operator" / "README.txt").read_text("utf-8")
    assert "made your own keys" in (home / "README.txt").read_text("utf-8")


def test_a_site_gives_all_of_its_keys_or_none(tmp_path: Path) -> None:
    entry, _ = own_keys(tmp_path / "own")
    for missing in ("public_key", "node_public_key", "certificate_request"):
        pattern = rf'(?ms)^{missing} = (""".*?"""|".*?")\n'
        document = write_document(tmp_path, DOCUMENT + re.sub(pattern, "", entry))
        with pytest.raises(BadInputError, match=rf"site\.2: .* add {missing}"):
            provision(document, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_two_sites_with_one_key_are_refused(tmp_path: Path) -> None:
    """One member under two names would count twice."""
    first, _ = own_keys(tmp_path / "own")
    second = own_keys(tmp_path / "other", "hospital-d")[0]
    key = re.search(r'\npublic_key = "(.*)"', first)
    assert key is not None
    second = re.sub(r'\npublic_key = ".*"', f'\npublic_key = "{key.group(1)}"', second)
    with pytest.raises(BadInputError, match="its own public_key"):
        provision(write_document(tmp_path, DOCUMENT + first + second), tmp_path / "made")


def test_a_public_key_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    """It is found out late, when the roster is made: other sites' keys are on disk by then."""
    entry, _ = own_keys(tmp_path / "own")
    document = write_document(tmp_path, DOCUMENT + re.sub(r'\npublic_key = ".*"', '\npublic_key = "00"', entry))
    with pytest.raises(BadInputError, match="roster"):
        provision(document, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consortium.toml", "own"]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('name = "retina"', 'nmae = "retina"', ("nmae", "did you mean name?")),
        ("superlink =", "superlnk =", ("operator.superlnk", "did you mean superlink?")),
        ('name = "hospital-a"', 'name = "hospital-a"\ncontat = "x"', ("site.0.contat", "did you mean contact?")),
        ('name = "hospital-a"', 'name = "../x"', ("site.0.name", "'../x'")),
        ('name = "retina"', 'name = "../x"', ("name", "'../x'")),
        ('name = "hospital-b"', 'name = "hospital-a"', ("its own name", "'hospital-a'")),
        ('name = "hospital-b"', 'name = "operator"', ("may not be called operator",)),
        ('"127.0.0.1:8000"', '"0.0.0.0:8000"', ("operator.superlink", "open control port", "'0.0.0.0:8000'")),
        ("[operator]", "[operator", ("TOML", "syntax error")),
    ],
)
def test_a_bad_document_is_one_line_and_nothing_is_written(tmp_path: Path, old: str, new: str, parts: tuple[str, ...]) -> None:
    assert old in DOCUMENT
    write_document(tmp_path, DOCUMENT.replace(old, new, 1))
    refused(urna("provision", "consortium.toml", "--out", "made", cwd=tmp_path), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["consortium.toml"]


@pytest.mark.parametrize(
    "address",
    [
        *("", ":443", "host", "host:", "host:0", "host:65536", "host:443x", "host :443", "a b:443", "Host:443", "host:443\n"),
        *("h;}:443", "$host:443", "{{x}}:443", "a..b:443", "-a:443", "[host]:443", "2001:db8::1:443", "[::1:443", "1.2.3:443"),
        *(
            "[127.0.0.1]:443",
            "[fe80::1%eth0]:443",
            "a" * 64 + ":443",
            "hóst:443",
            "host:٤٤٣",
            "https://host:443",
            "300.1.1.1:4",
        ),
    ],
)
@pytest.mark.parametrize("field", ["address", "superlink", "listen"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, field: str, address: str) -> None:
    """Addresses are written into nginx's configuration and into commands for a shell."""
    text = re.sub(rf"(?m)^{field} = .*\n", "", DOCUMENT).replace("[operator]", f"[operator]\n{field} = '''{address}'''")
    with pytest.raises(BadInputError, match=rf"operator\.{field}"):
        load_consortium(write_document(tmp_path, text))


@pytest.mark.parametrize("address", ["host:1", "a.b-c.example:65535", "192.0.2.1:443", "[2001:db8::1]:443"])
def test_an_address_that_is_one_is_taken(tmp_path: Path, address: str) -> None:
    consortium = load_consortium(write_document(tmp_path, DOCUMENT.replace("localhost:8443", address)))
    assert consortium.operator.address == address
    provision(tmp_path / "consortium.toml", tmp_path / "made")
    assert f"server {address};" in (tmp_path / "made" / "sites" / "hospital-a" / "egress" / "nginx.conf").read_text()


PIECES = st.sampled_from(
    [
        *(
            "name",
            "[operator]",
            "[[site]]",
            "site",
            "=",
            '"',
            "'",
            "\n",
            "[",
            "]",
            "{",
            "}",
            "#",
            "\\",
            "\x7f",
            "\\u0000",
            "'''",
        ),
        *("true", "1", "-1", "1e999", "nan", "9" * 5000, "2026-01-01", "../x", "hospital-a", "operator", "public_key = 'aa'\n"),
        *(
            "certificate_days = 0\n",
            "also = ['a;b']\n",
            "listen = 'x'\n",
            "egress_port = 70000\n",
            "{{ 7 }}",
            "{% raw %}",
            ";",
            "$",
        ),
    ]
)
MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(DOCUMENT)), st.integers(0, 12), PIECES | st.text(max_size=5)), min_size=1, max_size=3
)


@given(mutations=MUTATIONS)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_mutated_document_is_one_line_or_a_whole_folder(tmp_path: Path, mutations: list[tuple[int, int, str]]) -> None:
    text = DOCUMENT
    for at, length, piece in mutations:
        text = text[:at] + piece + text[at + length :]
    document, made = tmp_path / "consortium.toml", tmp_path / "made"
    document.write_bytes(text.encode(errors="surrogatepass"))
    said = ""
    try:
        provision(document, made)
    except BadInputError as error:
        said = str(error)
    if said:
        assert said.isprintable()  # one line
        assert [path.name for path in tmp_path.iterdir()] == ["consortium.toml"]
        return
    assert {path.name for path in made.iterdir()} == {"authority", "operator", "proxy", "sites"}
    configuration = (made / "proxy" / "nginx.conf").read_text("utf-8")
    assert len(re.findall(r"[;{]", configuration)) in range(60, 75)  # no statement came in with a value
    shutil.rmtree(made)


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    for content in (b"\xff\xfe\x00", b"#" * 2_000_000, b"a = " + b"[" * 100_000):
        (tmp_path / "consortium.toml").write_bytes(content)
        with pytest.raises(BadInputError):
            provision(tmp_path / "consortium.toml", tmp_path / "made")
    with pytest.raises(BadInputError, match="found nothing"):
        provision(tmp_path / "nowhere.toml", tmp_path / "made")


def test_the_example_is_one_that_can_be_provisioned(tmp_path: Path) -> None:
    """As a person would; the commented entry is what a site with its own keys sends."""
    result = urna("provision", EXAMPLE, "--out", "made", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "can speak as the operator and as hospital-a, hospital-b" in result.stdout
    again = urna("provision", EXAMPLE, "--out", "made", cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing was changed" in again.stdout
    commented = EXAMPLE.read_text("utf-8").split("# [[site]]")[1]
    keys = set(re.findall(r"(?m)^# (\w+) = ", commented))
    assert keys == {"name", "public_key", "node_public_key", "certificate_request"}


def test_no_private_key_is_printed(tmp_path: Path) -> None:
    result = urna("provision", write_document(tmp_path), "--out", "made", cwd=tmp_path)
    said = result.stdout + result.stderr
    for path in (tmp_path / "made").rglob("*"):
        if path.suffix in (".key", ".secret"):
            raw = path.read_bytes()
            assert raw.hex() not in said
            assert raw.decode("latin-1") not in said
            public = [one for one in (tmp_path / "made").rglob("*") if one.is_file() and one != path]
            assert not [one for one in public if raw in one.read_bytes() or raw.hex().encode() in one.read_bytes()]


def test_help_explains_the_command(tmp_path: Path) -> None:
    result = urna("provision", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    for part in ("Usage: urna provision", "--out", "--add"):
        assert part in result.stdout


def test_other_kinds_of_node_keys_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    entry, _ = own_keys(tmp_path / "own")
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode().replace("\n", "\\n")
    for found in (public, private, "ecdsa-sha2-nistp384 AAAA", "x"):
        head, line, tail = re.split(r'(node_public_key = ".*")', entry)
        document = write_document(tmp_path, f'{DOCUMENT}{head}node_public_key = "{found}"{tail}')
        assert line
        with pytest.raises(BadInputError, match=r"site\.2\.node_public_key"):
            provision(document, tmp_path / "made")
