"""Documents and TLS contexts of provisioned consortia, for tests."""

import ssl
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "plans" / "consortium.toml"
DOCUMENT = """
name = "retina"
[operator]
address = "localhost:8443"
superlink = "127.0.0.1:8000"
[[site]]
name = "hospital-a"
[[site]]
name = "hospital-b"
"""


def write_document(folder: Path, text: str = DOCUMENT) -> Path:
    """A ``consortium.toml`` in a folder."""
    path = folder / "consortium.toml"
    path.write_text(text, encoding="utf-8")
    return path


def client_context(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Trusts ``ca`` only, as strictly as newer Pythons do, and shows a certificate if there is one."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def server_context(certificate: Path, key: Path, ca: Path | None = None) -> ssl.SSLContext:
    """Shows a certificate; with ``ca`` it asks for one of its, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    if ca is not None:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bytes:
    """One TLS connection in memory; what the client hears after both have agreed.

    Raises:
        ssl.SSLError: one of them refused.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=host)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [one, other]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    other.write(b"heard")
    return one.read(5)
