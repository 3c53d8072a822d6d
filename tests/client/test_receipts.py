import json
import shutil
import threading
from pathlib import Path

import pytest

from tests.client.clinic import NAME, a_plan, write_config
from urna.client.config import Vault
from urna.client.ledger import Ledger
from urna.client.ledger_rows import CampaignRow, Release
from urna.client.receipts import write_receipts
from urna.client.vault import create_keys, open_ledger
from urna.privacy.accounting import epsilon_of_rows, gaussian, subsampled_gaussian
from urna.protocol.errors import BadInputError, LedgerError, SiteConfigError
from urna.protocol.identity import IDENTITY_FILE, OPERATOR, ROSTER_FILE, Identity, Roster, create_identity, load_identity
from urna.protocol.receipt import Receipt, read_receipt
from urna.server.receipt_check import check_file

PLAN = a_plan()
MODELS = {"pixels": "aa" * 32, "autoencoder": "bb" * 32}
STEP = subsampled_gaussian(PLAN.final.sample_rate, 2.0)


def joined(ledger: Ledger, identity: Identity, campaign: str = "run-1") -> None:
    row = CampaignRow(campaign, "11" * 32, PLAN.model_dump_json(), MODELS, bytes(32), b"hello", site=identity.public_key_hex)
    ledger.join(row)


def a_release(key: str, event: str = STEP, campaign: str = "run-1") -> Release:
    stage = key.split("/")[0]
    partition = "heldout" if stage == "evaluation" else "tuning"
    return Release(f"{campaign}/{key}", "22" * 32, campaign, stage, partition, event)  # type: ignore[arg-type]  # a shorthand


def left(ledger: Ledger, key: str, event: str = STEP, campaign: str = "run-1") -> None:
    ledger.reserve(a_release(key, event, campaign))
    ledger.settle(f"{campaign}/{key}", key.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site that joined one campaign and answered three requests of it; one more was reserved and never sent."""
    folder = tmp_path / NAME
    identity = create_keys(folder, NAME)
    operator = create_identity(OPERATOR, tmp_path / "operator.key")
    roster = Roster(operator=operator.public_key_hex, sites={NAME: identity.public_key_hex})
    (folder / ROSTER_FILE).write_text(roster.model_dump_json(), encoding="utf-8")
    write_config(folder)
    ledger = open_ledger(folder, Vault())
    ledger.note("bundle", "cc" * 32, run="7")
    ledger.note("approve", "run-1", plan_sha256=PLAN.sha256, by="dr.mustermann")
    joined(ledger, identity)
    left(ledger, "ballot/1", gaussian(4.0))
    left(ledger, "final/1")
    ledger.reserve(a_release("final/2"))
    left(ledger, "evaluation/final/1", gaussian(1.75))
    ledger.close()
    return folder


def written(folder: Path, out: Path) -> Receipt:
    (path,) = write_receipts(folder, out)
    return read_receipt(path.read_bytes()).receipt


def test_a_receipt_says_what_the_ledger_says(folder: Path, tmp_path: Path) -> None:
    receipt = written(folder, tmp_path / "out")
    ledger = open_ledger(folder, Vault(), read_only=True)
    assert [(one.request_id, one.event, one.reply_sha256) for one in receipt.left] == [
        (one.release.request_id, one.release.event, one.reply_sha256 or "") for one in ledger.releases("run-1")
    ]
    assert [one.reply_sha256 == "" for one in receipt.left] == [False, False, True, False]
    assert receipt.epsilon == epsilon_of_rows(ledger.rows("run-1"), PLAN.privacy.delta)
    assert (receipt.ledger_seq, receipt.ledger_link) == ledger.head()
    assert (receipt.models, receipt.plan_sha256, receipt.bundles_seen) == (MODELS, PLAN.sha256, ("cc" * 32,))
    assert receipt.joined_at <= receipt.left[0].reserved_at <= receipt.written_at
    ledger.close()


def test_what_a_site_writes_the_verifier_finds_good(folder: Path, tmp_path: Path) -> None:
    (path,) = write_receipts(folder, tmp_path / "out")
    assert check_file(path, folder / ROSTER_FILE, None).findings == ()


def test_a_receipt_may_be_read_by_anyone_and_names_nobody(folder: Path, tmp_path: Path) -> None:
    (path,) = write_receipts(folder, tmp_path / "deep" / "out")
    assert path == tmp_path / "deep" / "out" / "run-1.receipt.json"
    assert path.stat().st_mode & 0o777 == 0o644
    text = path.read_text("utf-8")
    assert json.loads(text)["receipt"]["approved_by_a_person"] is True
    assert "mustermann" not in text
    secrets = [(folder / name).read_bytes().hex() for name in (IDENTITY_FILE, "data.key")]
    assert not any(secret in text for secret in secrets)


@pytest.mark.parametrize(
    ("notes", "state", "approved"),
    [
        ([], "open", True),
        ([("close", PLAN.sha256)], "closed", True),
        ([("deny", PLAN.sha256)], "denied", True),
        ([("deny", "00" * 32)], "open", True),  # another plan that asked under this name
        ([("close", PLAN.sha256), ("deny", PLAN.sha256)], "denied", True),
    ],
)
def test_where_a_campaign_stands(
    folder: Path, tmp_path: Path, notes: list[tuple[str, str]], state: str, approved: bool
) -> None:
    ledger = open_ledger(folder, Vault())
    for event, plan_sha256 in notes:
        ledger.note(event, "run-1", plan_sha256=plan_sha256)  # type: ignore[arg-type]  # parametrised
    ledger.close()
    receipt = written(folder, tmp_path / "out")
    assert (receipt.state, receipt.approved_by_a_person) == (state, approved)


def test_a_campaign_that_nobody_was_asked_about_says_so(folder: Path, tmp_path: Path) -> None:
    ledger = open_ledger(folder, Vault())
    joined(ledger, load_identity(NAME, folder / IDENTITY_FILE), "run-2")
    ledger.close()
    (path,) = write_receipts(folder, tmp_path / "out", "run-2")
    receipt = read_receipt(path.read_bytes()).receipt
    assert (receipt.approved_by_a_person, receipt.left, receipt.epsilon) == (False, (), 0.0)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["run-2.receipt.json"]


def test_an_unknown_campaign_is_bad_input_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="expected a campaign that site-1 joined, found 'run-9': it joined run-1"):
        write_receipts(folder, tmp_path / "out", "run-9")
    assert not (tmp_path / "out").exists()


def test_a_campaign_of_another_node_of_the_same_ledger_is_not_signed_here(folder: Path, tmp_path: Path) -> None:
    other = create_identity("site-2", tmp_path / "other.key")
    ledger = open_ledger(folder, Vault())
    joined(ledger, other, "run-2")
    ledger.close()
    assert [path.name for path in write_receipts(folder, tmp_path / "out")] == ["run-1.receipt.json"]
    with pytest.raises(BadInputError, match="found 'run-2'"):
        write_receipts(folder, tmp_path / "out", "run-2")


def test_receipts_are_written_while_a_runner_holds_the_ledger(folder: Path, tmp_path: Path) -> None:
    runner = open_ledger(folder, Vault())
    runner.hold()
    before = (folder / "ledger.sqlite").read_bytes()
    assert len(written(folder, tmp_path / "out").left) == 4
    assert (folder / "ledger.sqlite").read_bytes() == before
    left(runner, "final/3")
    assert len(written(folder, tmp_path / "out").left) == 5
    runner.close()


def test_a_receipt_is_of_one_moment_while_a_runner_writes(folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []
    first = written(folder, tmp_path / "first")
    others = first.ledger_seq - 7  # entries that are no release, and no reply; the runner makes no more of them

    def runner() -> None:
        try:
            ledger = open_ledger(folder, Vault())
            number = 3
            while not stop.is_set():
                left(ledger, f"final/{number}")
                number += 1
            ledger.close()
        except BaseException as error:  # handed to the test
            failed.append(error)

    thread = threading.Thread(target=runner)
    thread.start()
    try:
        for turn in range(25):
            (path,) = write_receipts(folder, tmp_path / str(turn))
            assert check_file(path, folder / ROSTER_FILE, None).is_good  # 3 rounds are planned: more is a note
            receipt = read_receipt(path.read_bytes()).receipt
            entries = sum(2 if one.reply_sha256 else 1 for one in receipt.left)
            assert receipt.ledger_seq - entries == others
    finally:
        stop.set()
        thread.join()
    assert failed == []


def test_a_later_receipt_replaces_an_older_one_that_it_goes_on_from(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    older = written(folder, out)
    ledger = open_ledger(folder, Vault())
    ledger.settle("run-1/final/2", b"late")
    left(ledger, "final/3")
    ledger.note("close", "run-1", plan_sha256=PLAN.sha256)
    ledger.close()
    newer = written(folder, out)
    assert (len(newer.left), newer.state) == (len(older.left) + 1, "closed")
    assert [one.name for one in out.iterdir()] == ["run-1.receipt.json"]  # no draft stays


@pytest.mark.parametrize("there", ["{}", "receipt"])
def test_a_file_that_says_something_else_is_kept_but_by_force(folder: Path, tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if there == "receipt":  # of a ledger that went on otherwise
        ledger = open_ledger(copy, Vault())
        left(ledger, "final/3")
        ledger.close()
        written(copy, out)
    else:
        out.mkdir()
        (out / "run-1.receipt.json").write_text(there, encoding="utf-8")
    before = (out / "run-1.receipt.json").read_bytes()
    with pytest.raises(BadInputError, match="--force"):
        write_receipts(folder, out)
    assert (out / "run-1.receipt.json").read_bytes() == before
    write_receipts(folder, out, force=True)
    assert len(read_receipt((out / "run-1.receipt.json").read_bytes()).receipt.left) == 4


def test_nothing_is_written_where_one_of_several_files_is_in_the_way(folder: Path, tmp_path: Path) -> None:
    ledger = open_ledger(folder, Vault())
    joined(ledger, load_identity(NAME, folder / IDENTITY_FILE), "run-2")
    ledger.close()
    out = tmp_path / "out"
    out.mkdir()
    (out / "run-2.receipt.json").write_text("mine", encoding="utf-8")
    with pytest.raises(BadInputError, match=r"run-2\.receipt\.json exists and is no receipt"):
        write_receipts(folder, out)
    assert [one.name for one in out.iterdir()] == ["run-2.receipt.json"]


def test_a_link_in_the_way_is_replaced_and_never_followed(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    (out / "run-1.receipt.json").symlink_to(victim)
    with pytest.raises(BadInputError, match="is no receipt"):
        write_receipts(folder, out)
    write_receipts(folder, out, force=True)
    assert victim.read_text("utf-8") == "precious"
    assert not (out / "run-1.receipt.json").is_symlink()


def test_a_receipt_of_an_altered_or_older_ledger_is_never_signed(folder: Path, tmp_path: Path) -> None:
    older = (folder / "ledger.sqlite").read_bytes()
    ledger = open_ledger(folder, Vault())
    left(ledger, "final/3")
    ledger.close()
    (folder / "ledger.sqlite").write_bytes(older)
    with pytest.raises(LedgerError, match="found an older one"):
        write_receipts(folder, tmp_path / "out")
    (folder / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="found nothing"):
        write_receipts(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_site_without_its_identity_writes_none(folder: Path, tmp_path: Path) -> None:
    (folder / IDENTITY_FILE).unlink()
    with pytest.raises(SiteConfigError, match="expected the private key of site-1"):
        write_receipts(folder, tmp_path / "out")
