"""`urna-site init`: what must be declared is asked, with the reason in one line; then site.toml and the keys are made.

The answers have the shape of site.toml itself, so a file of answers (`--answers`) is a site.toml with gaps: what it leaves out
takes the value that the question would have proposed.

Covered:
    * nothing is overwritten: not a site.toml (but a draft without records and policy, which is kept beside), not a key;
    * site.toml is read back by the same code that the site will use, before anything is written, and written in one step;
    * of the records only their format and the names of columns are looked at, and lines are counted and rounded: labels, ranges
      and categories are public constants, and must come from a person, not from the values.
Not covered:
    * whether the answers are wise; `urna-site check` says whether they fit.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from urna.client.config import CONFIG_FILE, SiteConfig
from urna.client.questions import QUESTIONS, Document, Draft, look
from urna.protocol.errors import BadInputError, SiteConfigError
from urna.protocol.identity import IDENTITY_FILE, Identity, load_identity
from urna.protocol.plan import explain, read_document

TLS_KEY_FILE, TLS_REQUEST_FILE = "egress/tls.key", "egress/tls.csr"


def read_answers(folder: Path, path: Path) -> Document:
    """A file of answers, completed by what the questions propose.

    Raises:
        SiteConfigError: missing, not TOML, or something that must be answered is not.
    """
    return _completed(folder, read_document(path, "answers", SiteConfigError))


def read_draft(folder: Path) -> Document:
    """What a draft of site.toml says already, as `urna provision` writes one; empty if there is none.

    Raises:
        SiteConfigError: there is a whole site.toml, or it cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return {}
    draft = read_document(path, "site.toml", SiteConfigError)
    if "dataset" in draft or "policy" in draft:
        raise SiteConfigError(f"{path} exists: it is never overwritten; edit it, or choose another folder")
    return draft


def ask(folder: Path, prompt: Callable[[str, str | None], str], say: Callable[[Iterable[str]], None]) -> Document:
    """Ask a person, question by question.

    Args:
        folder: of the site; what a draft in it says is not asked again.
        prompt: shows a question and a default, gives back what was typed.
        say: shows lines.
    """
    draft = _by_section(read_draft(folder))
    say(["An empty answer takes what is proposed; a dash leaves it out. Nothing is written before you have seen it.", ""])
    for question in QUESTIONS:
        section = draft.setdefault(question.section, {})
        if question.key in section or not question.applies(draft):
            continue
        proposed = question.propose(look(folder, _path(draft)), draft)
        say([question.why])
        while True:
            typed = prompt(question.text, None if proposed is None else _shown(proposed)).strip()
            if typed in ("", "-"):
                if not question.is_needed:
                    break
                say(["this one must be answered"])
                continue
            try:
                section[question.key] = question.read(typed)
            except ValueError as error:
                say([f"expected {error}" if str(error).startswith("a") else f"not understood: {question.why}"])
                continue
            break
        say([""])
    return _document(draft)


def render(document: Document) -> str:
    """The text of site.toml, each line with its reason.

    Raises:
        SiteConfigError: the site would not take it.
    """
    lines = ["# Written by `urna-site init`; `urna-site check` says whether it fits this machine."]
    draft = _by_section(document)
    order = {(question.section, question.key): question for question in QUESTIONS}
    for section in dict.fromkeys(["", *(question.section for question in QUESTIONS), *draft]):
        keys = draft.get(section) or {}
        if section and keys:
            lines += ["", f"[[{section}]]" if section == "dataset" else f"[{section}]"]
        asked = [key for of, key in order if of == section and key in keys]
        for key in dict.fromkeys([*asked, *keys]):  # as they are asked, then what only the answers know
            question = order.get((section, key))
            lines += [f"# {question.why}"] if question else []
            lines.append(f"{_key(key)} = {_toml(keys[key])}")
    text = "\n".join(lines) + "\n"
    checked(text)
    return text


def checked(text: str) -> SiteConfig:
    """The configuration as the site reads it.

    Raises:
        SiteConfigError: not TOML, or a key that is unknown, missing or out of range.
    """
    try:
        return SiteConfig.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise SiteConfigError(f"the answers make no TOML: {error}") from None
    except ValidationError as error:
        raise SiteConfigError(f"the answers make no site: {explain(error, SiteConfig)}") from None


def make_site(folder: Path, text: str) -> Identity:
    """Make what is missing of a site: its folder (0700), keys (0600), ledger, and at last site.toml, in one step.

    Keys that are there already are kept: of `urna provision`, or of an earlier try.

    Raises:
        SiteConfigError: there is a whole site.toml already, or a part of the keys without the other.
        LedgerError: a ledger without its key or anchor.
    """
    from urna.client.vault import create_keys, create_vault

    config = checked(text)
    read_draft(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (folder / IDENTITY_FILE).exists():
        identity = load_identity(config.name, folder / IDENTITY_FILE)
        create_vault(folder, config.vault)
    else:
        identity = create_keys(folder, config.name, config.vault)
    if config.link is not None and not (folder / config.link.node_key).exists():
        _create_link_keys(folder, config.link.node_key, config.name)
    _place(folder / CONFIG_FILE, text)
    return identity


def said_after(folder: Path, config: SiteConfig, identity: Identity) -> Iterator[str]:
    """What comes next; the lines are what the operator's consortium.toml takes."""
    from urna.protocol.identity import ROSTER_FILE

    yield f"{folder} is made; its keys never leave it, back them up as you do the records"
    if not (folder / ROSTER_FILE).exists():
        yield "send these public lines to the operator, and compare them by telephone:"
        yield ""
        yield "[[site]]"
        yield f'name = "{config.name}"'
        yield f'public_key = "{identity.public_key_hex}"'
        if config.link is not None:
            yield from _link_lines(folder / config.link.node_key, folder / TLS_REQUEST_FILE)
        yield ""
        yield "what comes back, roster.json and ca.pem, belongs into this folder"
    yield f"next: `urna-site check {folder}`"


def _create_link_keys(folder: Path, node_key: str, name: str) -> None:
    """The SuperNode's key, and the key and certificate request of the way out to the operator's proxy."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509 import CertificateSigningRequestBuilder, Name, NameAttribute
    from cryptography.x509.oid import NameOID

    node = ec.generate_private_key(ec.SECP384R1())  # of the curves that Flower takes
    _write_new(folder / node_key, node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    if (folder / TLS_KEY_FILE).exists():
        return
    (folder / TLS_KEY_FILE).parent.mkdir(mode=0o700, exist_ok=True)
    tls = ec.generate_private_key(ec.SECP256R1())
    subject = Name([NameAttribute(NameOID.COMMON_NAME, name)])
    request = CertificateSigningRequestBuilder().subject_name(subject).sign(tls, SHA256())
    _write_new(folder / TLS_KEY_FILE, tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    _write_new(folder / TLS_REQUEST_FILE, request.public_bytes(Encoding.PEM))


def _link_lines(node_key: Path, request: Path) -> Iterator[str]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

    if node_key.exists():
        try:
            public = load_ssh_private_key(node_key.read_bytes(), None).public_key()
            line = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")
        except ValueError:
            raise SiteConfigError(f"{node_key}: expected a private key in OpenSSH's format, found another") from None
        yield f'node_public_key = "{line}"'
    if request.exists():
        yield f'certificate_request = """\n{request.read_text("ascii").strip()}\n"""'


def _write_new(path: Path, content: bytes) -> None:
    """A file of this user alone, on the disk when this returns; one that is there is never overwritten."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _place(path: Path, text: str) -> None:
    """Write a whole file or nothing; a draft that was there stays beside it."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    _write_new(new, text.encode())
    try:
        if path.exists():
            os.link(path, path.with_name(f"{path.name}.draft"))
            new.replace(path)
        else:
            os.link(new, path)  # not a rename: what another process wrote meanwhile stays
    except FileExistsError as error:
        raise SiteConfigError(f"{error.filename2} exists: it is never overwritten; move it away") from None
    finally:
        new.unlink(missing_ok=True)


# ---- answers, from text to values and back


def _completed(folder: Path, answers: Document) -> Document:
    draft = _by_section(_merged(read_draft(folder), answers))
    for question in QUESTIONS:
        section = draft.setdefault(question.section, {})
        if question.key in section or not question.applies(draft):
            continue
        proposed = question.propose(look(folder, _path(draft)), draft)
        if proposed is not None:
            section[question.key] = proposed
        elif question.is_needed:
            where = f"{question.section}.{question.key}" if question.section else question.key
            raise SiteConfigError(f"answers: expected {where}, found nothing: {question.why}")
    return _document(draft)


def _merged(under: Document, over: Document) -> Document:
    both = under | over
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            both[key] = under[key] | over[key]
    return both


def _by_section(document: Mapping[str, Any]) -> Draft:
    """The document with one data set as a section; more than one are left as they are, beside."""
    draft: Draft = {"": {}}
    for key, value in document.items():
        if key == "dataset" and isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            draft["dataset"] = dict(value[0])
        elif isinstance(value, dict):
            draft[key] = dict(value)
        else:
            draft[""][key] = value
    if isinstance(draft[""].get("dataset"), list):
        raise SiteConfigError("answers: expected one [[dataset]], found more or none: add others to site.toml later")
    return draft


def _document(draft: Draft) -> Document:
    sections = {name: [keys] if name == "dataset" else keys for name, keys in draft.items() if name and keys}
    return draft[""] | sections


def _path(draft: Draft) -> str | None:
    path = draft.get("dataset", {}).get("path")
    return path if isinstance(path, str) else None


def _shown(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(str, value))
    return str(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    """A value as TOML writes it; JSON's strings are TOML's but for one sign."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{ " + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + " }"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise BadInputError(f"expected text, numbers, yes or no, lists and tables as answers, found {type(value).__name__}")
