"""The vault belongs to the records: made once, never half, and shared by the nodes that hold them."""

from pathlib import Path

import pytest

from urna.client.config import DATA_KEY_FILE, LEDGER_FILE, Vault
from urna.client.vault import anchor_path, create_keys, create_vault, load_data_key, open_ledger
from urna.protocol.errors import LedgerError, RollbackError, SiteConfigError


def test_a_second_node_joins_a_vault_and_changes_nothing_in_it(tmp_path: Path) -> None:
    create_keys(tmp_path / "one", "site-1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    shared = Vault(folder="../one")
    identity = create_keys(tmp_path / "two", "site-2", shared)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["identity.key"]
    assert load_data_key(tmp_path / "two", shared) == load_data_key(tmp_path / "one", Vault())
    assert identity.name == "site-2"


def test_the_anchor_may_be_at_another_place(tmp_path: Path) -> None:
    vault = Vault(anchor=str(tmp_path / "elsewhere" / "anchor"))
    create_vault(tmp_path / "one", vault)
    assert anchor_path(tmp_path / "one", vault) == tmp_path / "elsewhere" / "anchor"
    open_ledger(tmp_path / "one", vault).close()
    (tmp_path / "elsewhere" / "anchor").unlink()
    with pytest.raises(LedgerError, match="expected the ledger's anchor at"):
        open_ledger(tmp_path / "one", vault)


@pytest.mark.parametrize(
    ("lost", "error", "message"),
    [
        (LEDGER_FILE, SiteConfigError, "exists without ledger.sqlite: restore the ledger; a lost ledger is not a new budget"),
        (DATA_KEY_FILE, LedgerError, "exists without data.key: restore the key; a new one opens no old ledger"),
    ],
)
def test_half_a_vault_is_never_filled_up(tmp_path: Path, lost: str, error: type[Exception], message: str) -> None:
    create_vault(tmp_path, Vault())
    (tmp_path / lost).unlink()
    with pytest.raises(error, match=message):
        create_vault(tmp_path, Vault())
    assert not (tmp_path / lost).exists()


def test_an_anchor_without_ledger_and_key_is_a_lost_ledger(tmp_path: Path) -> None:
    """Whoever deletes both to begin anew forgets the file at the other place."""
    vault = Vault(anchor=str(tmp_path / "elsewhere" / "anchor"))
    create_vault(tmp_path / "one", vault)
    for name in (LEDGER_FILE, DATA_KEY_FILE):
        (tmp_path / "one" / name).unlink()
    with pytest.raises(LedgerError, match="there was a ledger here; restore it, a lost ledger is not a new budget"):
        create_vault(tmp_path / "one", vault)
    assert list((tmp_path / "one").iterdir()) == [tmp_path / "one" / f"{LEDGER_FILE}.lock"]


def test_a_ledger_under_another_data_key_is_refused(tmp_path: Path) -> None:
    create_vault(tmp_path, Vault())
    (tmp_path / DATA_KEY_FILE).write_bytes(bytes(32))
    with pytest.raises(LedgerError, match="or is of another data key"):
        open_ledger(tmp_path, Vault())


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    create_keys(tmp_path / "one", "site-1")
    open_ledger(tmp_path / "one", Vault()).note("pause", "site-1")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").iterdir()} == {0o600}


def test_an_older_vault_beside_a_newer_anchor_is_refused(tmp_path: Path) -> None:
    vault = Vault(anchor=str(tmp_path / "elsewhere" / "anchor"))
    create_vault(tmp_path / "one", vault)
    older = (tmp_path / "one" / LEDGER_FILE).read_bytes()
    ledger = open_ledger(tmp_path / "one", vault)
    ledger.note("pause", "site-1")
    ledger.close()
    (tmp_path / "one" / LEDGER_FILE).write_bytes(older)
    with pytest.raises(RollbackError, match="found an older one that ends at 1: restore the newest"):
        open_ledger(tmp_path / "one", vault)
