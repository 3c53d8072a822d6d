"""The vault: the ledger, its anchor and the data key, which belong to the records and not to a node.

Two nodes that hold the same records point ``[vault] folder`` at one place; so do a node and the one that replaces it.
"""

import os
from pathlib import Path

from urna.client.config import DATA_KEY_FILE, LEDGER_FILE, Vault
from urna.client.ledger import Ledger
from urna.protocol.errors import LedgerError, SiteConfigError
from urna.protocol.identity import IDENTITY_FILE, Identity, create_identity

KEY_BYTES = 32


def vault_folder(folder: Path, vault: Vault) -> Path:
    """Where a site's vault is."""
    return folder / vault.folder


def anchor_path(folder: Path, vault: Vault) -> Path:
    """Where the ledger's anchor is; a relative path is one in the vault."""
    return vault_folder(folder, vault) / vault.anchor


def open_ledger(folder: Path, vault: Vault, *, read_only: bool = False) -> Ledger:
    """Open a site's ledger.

    Raises:
        SiteConfigError: the data key is missing.
        LedgerError: see `Ledger.open`.
    """
    path = vault_folder(folder, vault) / LEDGER_FILE
    return Ledger.open(path, load_data_key(folder, vault), anchor_path(folder, vault), read_only=read_only)


def load_data_key(folder: Path, vault: Vault) -> bytes:
    """Read the key of the records' split and buckets, of their sketches and of the ledger's chain.

    Raises:
        SiteConfigError: missing, or not 32 bytes.
    """
    path = vault_folder(folder, vault) / DATA_KEY_FILE
    try:
        is_key = path.is_file() and path.stat().st_size == KEY_BYTES
    except OSError:  # a name that no file system has
        is_key = False
    if not is_key:
        raise SiteConfigError(f"expected the site's data key (32 bytes) at {path}: restore it, a new one moves records")
    return path.read_bytes()


def create_keys(folder: Path, name: str, vault: Vault | None = None) -> Identity:
    """Make a site's identity and, unless it is there, its vault: once, at its own machine.

    Raises:
        SiteConfigError: there is an identity already, or see `create_vault`.
        LedgerError: see `create_vault`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = create_identity(name, folder / IDENTITY_FILE)
    create_vault(folder, vault or Vault())
    return identity


def create_vault(folder: Path, vault: Vault) -> None:
    """Make the data key and an empty ledger; a vault that is there already, another node's, is only looked at.

    Raises:
        SiteConfigError: a data key without its ledger.
        LedgerError: a ledger without its key or anchor, an anchor without its ledger, or the disk refuses.
    """
    home, anchor = vault_folder(folder, vault), anchor_path(folder, vault)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    anchor.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key_path, ledger_path = home / DATA_KEY_FILE, home / LEDGER_FILE
    if key_path.exists() and ledger_path.exists():
        open_ledger(folder, vault, read_only=True).close()
        return
    if key_path.exists():
        raise SiteConfigError(f"{key_path} exists without {LEDGER_FILE}: restore the ledger; a lost ledger is not a new budget")
    if ledger_path.exists():
        raise LedgerError(f"{ledger_path} exists without {DATA_KEY_FILE}: restore the key; a new one opens no old ledger")
    if anchor.exists():
        raise LedgerError(f"{anchor} exists: there was a ledger here; restore it, a lost ledger is not a new budget")
    descriptor = os.open(key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    Ledger.create(ledger_path, load_data_key(folder, vault), anchor).close()
