"""`urna provision consortium.toml`: keys, certificates and configurations of a whole consortium, a folder for each member.

    FOLDER/authority/    ca.pem, ca.key: signs certificates; only --add needs it again
    FOLDER/operator/     operator.key, roster.json, the SuperLink's certificate, SuperNodes' public keys, README.txt
    FOLDER/proxy/        nginx.conf and its certificate: the only way from outside to the SuperLink
    FOLDER/sites/NAME/   identity.key, node.key, roster.json, site.toml (a draft), README.txt
                 egress/ nginx.conf, client certificate: the site's way out to the proxy

Covered:
    * folders are 0700 and private files 0600 from the moment that they exist, whatever the umask.
    * all or nothing: what is new is made in a folder beside and renamed; nothing that is there is written over, but for the
      roster and the texts that list all sites (--add), which are put back when something fails.
    * a site that sends public halves of its own keys: none of its private keys was ever here.
Not covered:
    * of all other sites, and of the operator, whoever has had the folder could speak in their names.
    * a process that is killed leaves a hidden folder beside FOLDER, with keys in it: delete it.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import ValidationError

import urna
from urna.protocol.errors import BadInputError
from urna.protocol.expiry import valid_until
from urna.protocol.identity import (
    IDENTITY_FILE,
    OPERATOR,
    OPERATOR_KEY_FILE,
    ROSTER_FILE,
    SITES_DIR,
    Roster,
    create_identity,
    load_roster,
)
from urna.protocol.plan import explain, read_text
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
from urna.server.consortium import Consortium, Member, is_ip, join_address, load_consortium, split_address

TEMPLATES = Path(urna.__file__).parent / "deploy"
RECORD_FILE = "consortium.json"  # what was provisioned, in operator/
BODY_LIMIT_BYTES = 6 * 1024 * 1024  # Flower sends objects of 5 MiB in frames of 5,243,032 bytes
PROXY_NAME, SUPERLINK_NAME = "proxy.urna.internal", "superlink.urna.internal"  # nginx checks DNS names only, no IP addresses
PRIVATE, PUBLIC = 0o600, 0o644


def provision(path: Path, out: Path, *, add: bool = False) -> list[str]:
    """Make everything for the consortium of a document; returns what to tell the person, a line each.

    Args:
        path: ``consortium.toml``.
        out: the folder to make; its parent is there.
        add: ``out`` is there, and gets what the sites that are new in the document need.

    Raises:
        BadInputError: the document is wrong, or ``out`` is there and holds something else; nothing was written then.
    """
    consortium = load_consortium(path)
    if not os.path.lexists(out):
        if add:
            raise BadInputError(f"--add expects a folder that was provisioned at {out}, found nothing: leave --add away")
        return _create(consortium, out)
    known = _load_record(out)
    if known == consortium:
        return [f"{out} holds all of {path} already: nothing was changed"]
    _check_only_grown(known, consortium, out)
    if not add:
        raise BadInputError(f"{out} was made for other sites or contacts than {path} lists: use --add, or another folder")
    return _add(known, consortium, out)


def who_could_impersonate(consortium: Consortium) -> str:
    """Said on the screen and in the operator's folder."""
    made = [one.name for one in consortium.site if not one.own_keys]
    own = [one.name for one in consortium.site if one.own_keys]
    speakers = f"the operator{' and as ' + ', '.join(made) if made else ''}"
    text = f"Whoever has had this folder can speak as {speakers}: keys were made here."
    if made:
        text += " A site that shall be spoken for by nobody else makes its own keys (urna-site init) and sends the public ones."
    return text + (f" Nobody here can speak as {', '.join(own)}." if own else "")


def _create(consortium: Consortium, out: Path) -> list[str]:
    if not out.parent.is_dir():
        raise BadInputError(f"expected a folder at {out.parent} to make {out.name} in, found none: make it first")
    with _stage(out.parent, out.name) as stage:
        for name in ("authority", OPERATOR, f"{OPERATOR}/nodes", f"{OPERATOR}/flwr", "proxy", SITES_DIR):
            _make_folder(stage / name)
        authority = create_authority(consortium.name)
        _write(stage / "authority" / "ca.key", key_pem(authority.private_key), PRIVATE)
        for name in ("authority", OPERATOR, "proxy"):
            _write(stage / name / "ca.pem", certificate_pem(authority.certificate), PUBLIC)
        operator = create_identity(OPERATOR, stage / OPERATOR / OPERATOR_KEY_FILE).public_key_hex
        _write_servers(stage, consortium, authority)
        flower = f'[superlink.{consortium.name}]\naddress = "{consortium.operator.superlink}"\n'
        flower += f"root-certificates = {_toml_string(str(out.resolve() / OPERATOR / 'ca.pem'))}\n"
        _write(stage / OPERATOR / "flwr" / "config.toml", flower.encode(), PUBLIC)
        roster = _roster(operator, _make_sites(stage, consortium, consortium.site, authority))
        for relative, data in _views(stage, consortium, roster).items():
            _write(stage / relative, data, PUBLIC)
        stage.rename(out)  # fails where a folder with something in it has come up meanwhile
    return [
        f"{out} holds keys and certificates of {len(consortium.site)} sites and the operator.",
        who_could_impersonate(consortium),
        f"Next: {out / OPERATOR / 'README.txt'}; each site gets its own folder of {out / SITES_DIR}, and nobody else's.",
        f"Keep {out / 'authority'} offline: it lets others connect, and --add needs it.",
    ]


def _add(known: Consortium, consortium: Consortium, out: Path) -> list[str]:
    new = consortium.site[len(known.site) :]
    old_roster = load_roster(out / OPERATOR / ROSTER_FILE)
    if set(old_roster.sites) != {one.name for one in known.site}:
        raise BadInputError(
            f"{out / OPERATOR / ROSTER_FILE}: expected the sites that were provisioned, found others: put it back"
        )
    there = [
        str(path) for one in new for path in (out / SITES_DIR / one.name, _node_key(out, one.name)) if os.path.lexists(path)
    ]
    if there:
        raise BadInputError(f"{', '.join(there[:3])} exist, though nothing was provisioned for them: move them away")
    with _stage(out, "adding") as stage:
        for name in (OPERATOR, f"{OPERATOR}/nodes", SITES_DIR):
            _make_folder(stage / name)
        keys = _make_sites(stage, consortium, new, _load_authority(out, consortium)) if new else {}
        roster = _roster(old_roster.operator, old_roster.sites | keys)
        with _undone_on_error() as done:
            (out / SITES_DIR).mkdir(mode=0o700, exist_ok=True)  # the operator may have handed out and deleted all
            for one in new:
                for path in (_node_key(Path(), one.name), Path(SITES_DIR, one.name)):
                    (stage / path).rename(out / path)
                    done.append((out / path, None))
            for relative, data in _views(out, consortium, roster).items():
                _replace(out / relative, data, done)
    lines = [f"{out}: {', '.join(one.name for one in new) or 'no site'} added."]
    if new:
        lines.append(f"The roster has changed: give {out / OPERATOR / ROSTER_FILE} to every site, the earlier ones too.")
        lines.append("Then reload the proxy and register the new SuperNodes' keys: see the operator's README.txt.")
        lines.append(who_could_impersonate(consortium))
    return lines


def _make_sites(stage: Path, consortium: Consortium, members: Iterable[Member], authority: Authority) -> dict[str, str]:
    """Folders of new sites, but for what lists all sites; returns the public keys."""
    return {one.name: _make_site(stage, consortium, one, authority) for one in members}


def _make_site(stage: Path, consortium: Consortium, member: Member, authority: Authority) -> str:
    home = stage / SITES_DIR / member.name
    for folder in (home, home / "egress"):
        _make_folder(folder)
    if member.public_key and member.node_public_key and member.certificate_request:
        identity, node = member.public_key, member.node_public_key.encode()
        tls_key = requested_key(member.certificate_request)
    else:
        identity = create_identity(member.name, home / IDENTITY_FILE).public_key_hex
        node_key = ec.generate_private_key(ec.SECP384R1())  # of the curves that Flower takes
        _write(home / "node.key", node_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), PRIVATE)
        node = node_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        private_key = new_key()
        _write(home / "egress" / "tls.key", key_pem(private_key), PRIVATE)
        tls_key = private_key.public_key()
    _write(_node_key(stage, member.name), node + b"\n", PUBLIC)
    days = consortium.operator.certificate_days
    client = client_certificate(authority, member.name, tls_key, days)
    loopback = server_certificate(authority, "loopback", ("localhost", "127.0.0.1"), tls_key, days)
    _write(home / "egress" / "client.pem", certificate_pem(client), PUBLIC)
    _write(home / "egress" / "loopback.pem", certificate_pem(loopback), PUBLIC)
    for folder in (home, home / "egress"):
        _write(folder / "ca.pem", certificate_pem(authority.certificate), PUBLIC)
    _write(home / "egress" / "nginx.conf", _egress_configuration(consortium, member), PUBLIC)
    draft = f'# A draft: `urna-site init` asks for the rest.\nname = "{member.name}"\n\n[link]\n'
    draft += (
        f'superlink = "127.0.0.1:{member.egress_port}" # egress/nginx.conf, which goes on to {consortium.operator.address}\n'
    )
    _write(home / "site.toml", draft.encode(), PUBLIC)
    return identity


def _write_servers(stage: Path, consortium: Consortium, authority: Authority) -> None:
    """Certificates of SuperLink and proxy, and the secret between SuperLink and SuperExec."""
    operator = consortium.operator
    inner = {SUPERLINK_NAME: None, split_address(operator.superlink)[0]: None, "localhost": None, "127.0.0.1": None}
    outer = {PROXY_NAME: None, split_address(operator.address)[0]: None} | dict.fromkeys(operator.also)
    for folder, name, hosts in ((OPERATOR, "superlink", inner), ("proxy", "proxy", outer)):
        key = new_key()
        _write(stage / folder / f"{name}.key", key_pem(key), PRIVATE)
        certificate = server_certificate(authority, name, hosts, key.public_key(), operator.certificate_days)
        _write(stage / folder / f"{name}.pem", certificate_pem(certificate), PUBLIC)
    _write(stage / OPERATOR / "superexec.secret", secrets.token_hex(32).encode(), PRIVATE)


def _views(folder: Path, consortium: Consortium, roster: Roster) -> dict[Path, bytes]:
    """What lists all sites, by path in ``folder``; for sites whose folder is still there. The record comes last."""
    members = roster.model_dump_json(indent=2).encode()
    views = {
        Path("proxy", "nginx.conf"): _proxy_configuration(consortium),
        Path(OPERATOR, ROSTER_FILE): members,
        Path(OPERATOR, "README.txt"): _operator_text(
            consortium, valid_until(folder / "proxy" / "proxy.pem").date().isoformat()
        ),
    }
    for one in consortium.site:
        home = Path(SITES_DIR, one.name)
        if (folder / home).is_dir():
            views[home / ROSTER_FILE] = members
            with suppress(BadInputError):  # parts of the folder were handed out and deleted
                ends = valid_until(folder / home / "egress" / "client.pem").date().isoformat()
                views[home / "README.txt"] = _site_text(consortium, one, ends, hashlib.sha256(members).hexdigest())
    return views | {Path(OPERATOR, RECORD_FILE): consortium.model_dump_json(indent=2).encode()}


def _proxy_configuration(consortium: Consortium) -> bytes:
    operator = consortium.operator
    return _rendered(
        "nginx/proxy.conf.j2",
        consortium=consortium.name,
        members=[subject(one.name, consortium.name) for one in consortium.site],
        listen=operator.listen or f"0.0.0.0:{split_address(operator.address)[1]}",
        body_limit_bytes=BODY_LIMIT_BYTES,
        superlink=operator.superlink,
        superlink_name=SUPERLINK_NAME,
    )


def _egress_configuration(consortium: Consortium, member: Member) -> bytes:
    host, _ = split_address(consortium.operator.address)
    return _rendered(
        "nginx/egress.conf.j2",
        consortium=consortium.name,
        site=member.name,
        address=consortium.operator.address,
        host_header=join_address(*split_address(consortium.operator.address)),
        egress_port=member.egress_port,
        body_limit_bytes=BODY_LIMIT_BYTES,
        proxy_name=PROXY_NAME if is_ip(host) else host,
    )


def _operator_text(consortium: Consortium, ends: str) -> bytes:
    host, port = split_address(consortium.operator.superlink)
    return _rendered(
        "provision/operator.txt.j2",
        consortium=consortium.name,
        impersonation=who_could_impersonate(consortium),
        sites=consortium.site,
        ends=ends,
        superlink=consortium.operator.superlink,
        superlink_host=host,
        superlink_port=port,
    )


def _site_text(consortium: Consortium, member: Member, ends: str, roster_sha256: str) -> bytes:
    return _rendered(
        "provision/site.txt.j2",
        consortium=consortium.name,
        site=member.name,
        own_keys=member.own_keys,
        address=consortium.operator.address,
        ends=ends,
        roster_sha256=roster_sha256,
    )


def _rendered(template: str, **values: object) -> bytes:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string((TEMPLATES / template).read_text("utf-8")).render(**values).encode()


def _load_record(out: Path) -> Consortium:
    path = out / OPERATOR / RECORD_FILE
    if not path.is_file():
        raise BadInputError(f"{out} exists, and urna provision did not make it (no {path}): choose another --out")
    try:
        return Consortium.model_validate_json(read_text(path, "record", BadInputError))
    except ValidationError as error:
        raise BadInputError(f"{path}: expected what urna provision wrote, found other: {explain(error, Consortium)}") from None


def _check_only_grown(known: Consortium, consortium: Consortium, out: Path) -> None:
    """Sites may be added at the end, and contacts changed; all else stands in certificates that were handed out.

    Raises:
        BadInputError: something else has changed.
    """
    changed = [name for name in ("name", "operator") if getattr(known, name) != getattr(consortium, name)]
    now = {one.name: one for one in consortium.site}
    same = {one.name: now.get(one.name, one).model_copy(update={"contact": one.contact}) == one for one in known.site}
    changed += [f"site {name}" for name, is_same in same.items() if not is_same]
    if changed:
        raise BadInputError(f"{out} was made with another {', another '.join(changed)}: put it back, or choose another --out")
    if [one.name for one in consortium.site[: len(known.site)]] != [one.name for one in known.site]:
        raise BadInputError(f"expected the sites of {out} in their order, and new ones after them: put them back")


def _load_authority(out: Path, consortium: Consortium) -> Authority:
    folder = out / "authority"
    try:
        authority = load_authority((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
    except FileNotFoundError as error:
        raise BadInputError(f"expected the authority's {error.filename}, found nothing: bring it back for --add") from None
    if authority.consortium != consortium.name:
        raise BadInputError(f"{folder}: expected the authority of {consortium.name}, found that of {authority.consortium}")
    return authority


def _roster(operator: str, sites: dict[str, str]) -> Roster:
    try:
        return Roster(operator=operator, sites=sites)
    except ValidationError as error:
        raise BadInputError(f"these sites make no roster: {explain(error, Roster)}") from None


def _node_key(folder: Path, name: str) -> Path:
    return folder / OPERATOR / "nodes" / f"{name}.pub"


@contextmanager
def _stage(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder (0700) that is gone afterwards, unless it was renamed."""
    stage = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _undone_on_error() -> Iterator[list[tuple[Path, bytes | None]]]:
    """Puts back, or takes away (None), what was done to each path, last first."""
    done: list[tuple[Path, bytes | None]] = []
    try:
        yield done
    except BaseException:
        for path, earlier in reversed(done):
            with suppress(OSError):
                if earlier is not None:
                    _swap(path, earlier)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        raise


def _replace(path: Path, data: bytes, done: list[tuple[Path, bytes | None]]) -> None:
    earlier = path.read_bytes() if path.is_file() else None
    if earlier != data:
        _swap(path, data)
        done.append((path, earlier))


def _swap(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write(draft, data, PUBLIC)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _make_folder(path: Path) -> None:
    path.mkdir(mode=0o700)
    path.chmod(0o700)  # whatever the umask took away


def _write(path: Path, data: bytes, mode: int) -> None:
    """Make a file that was not there; nobody but the owner can read it until it has its mode."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)


def _toml_string(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL
