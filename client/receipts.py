"""Receipts: what each campaign took from this site, read from the ledger and signed, to be handed out.

The ledger is opened for reading only, so receipts can be written while a runner works.

Covered:
    * a receipt is of one moment of the ledger, whatever a runner writes meanwhile; it is written whole or not at all;
    * a receipt that was written before is replaced only by one that says all of it, and maybe more;
    * of nodes that share a ledger, each signs for the campaigns that it joined itself.
Not covered:
    * campaigns that were never joined: nothing left for them.
"""

import os
import time
from contextlib import closing, suppress
from pathlib import Path

import urna
from urna.client.config import load_site_config
from urna.client.ledger import Ledger
from urna.client.ledger_rows import CampaignRow
from urna.client.vault import open_ledger
from urna.privacy.accounting import epsilon_of_rows
from urna.protocol.errors import BadInputError
from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE, Identity, Roster, load_identity, load_roster
from urna.protocol.messages import SpentRow, Stage
from urna.protocol.plan import Plan
from urna.protocol.receipt import Left, Receipt, State, goes_on, moment, plan_hash, read_receipt, sign_receipt

SUFFIX = ".receipt.json"
FILE_MODE = 0o644  # it is there to be handed out, and holds no secret


def write_receipts(folder: Path, out: Path, campaign: str | None = None, *, force: bool = False) -> tuple[Path, ...]:
    """Write a receipt of every campaign that this site joined, or of one, as ``CAMPAIGN.receipt.json``.

    Args:
        folder: the site's, with site.toml in it.
        out: where receipts go; made if it is not there.
        campaign: this one only.
        force: replace also a file that says something else.

    Raises:
        SiteConfigError: the site's configuration, identity or roster cannot be read.
        LedgerError: the ledger cannot be read.
        BadInputError: this site never joined such a campaign, or a file in the way says something that the ledger does not.
        OSError: the disk refuses.
    """
    config = load_site_config(folder)
    identity, roster = load_identity(config.name, folder / IDENTITY_FILE), load_roster(folder / ROSTER_FILE)
    with closing(open_ledger(folder, config.vault, read_only=True)) as ledger:
        own = [row for row in ledger.campaigns() if row.site in ("", identity.public_key_hex)]
        wanted = [row for row in own if campaign in (None, row.campaign)]
        if campaign is not None and not wanted:
            known = ", ".join(row.campaign for row in own[-10:]) or "none at all"
            raise BadInputError(f"expected a campaign that {config.name} joined, found {campaign!r}: it joined {known}")
        receipts = [receipt_of(ledger, row, identity, roster) for row in wanted]
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{receipt.campaign}{SUFFIX}" for receipt in receipts]
    for receipt, path in zip(receipts, paths, strict=True):
        _check_free(path, receipt, force=force)
    for receipt, path in zip(receipts, paths, strict=True):
        _write(path, sign_receipt(identity, receipt).to_text())
    return tuple(paths)


def receipt_of(ledger: Ledger, row: CampaignRow, identity: Identity, roster: Roster) -> Receipt:
    """What a ledger says of one campaign, all of it at one moment.

    Raises:
        LedgerError: it cannot be read.
    """
    with ledger.view():  # short: epsilon is computed after it, for a runner waits meanwhile
        state, approved = _decided(ledger, row)
        rows, left, bundles = ledger.rows(row.campaign), _left(ledger, row.campaign), ledger.all_noted("bundle")
        joined_at, (seq, link) = ledger.joined_at(row.campaign), ledger.head()
    delta = Plan.model_validate_json(row.plan_json).privacy.delta
    return Receipt(
        site=identity.name,
        site_key=identity.public_key_hex,
        operator_key=roster.operator,
        campaign=row.campaign,
        plan_sha256=plan_hash(row.plan_json),
        plan_json=row.plan_json,
        models=row.models,
        urna_version=urna.__version__,
        joined_at=moment(joined_at),
        written_at=moment(time.time()),
        state=state,
        approved_by_a_person=approved,
        bundles_seen=tuple(dict.fromkeys(one.subject for one in bundles)),
        left=left,
        epsilon_by_stage=_epsilon_by_stage(rows, delta),
        epsilon=epsilon_of_rows(rows, delta),
        delta=delta,
        ledger_seq=seq,
        ledger_link=link,
    )


def _decided(ledger: Ledger, row: CampaignRow) -> tuple[State, bool]:
    """Where the campaign stands, and whether a person said yes to this very plan."""
    name, plan_sha256 = row.campaign, plan_hash(row.plan_json)
    said = [one for one in ledger.all_noted("approve", "deny", subject=name) if one.detail.get("plan_sha256") == plan_sha256]
    if said and said[-1].event == "deny":
        return "denied", any(one.event == "approve" for one in said)
    return ("open" if ledger.noted("close", subject=name) is None else "closed"), bool(said)


def _left(ledger: Ledger, campaign: str) -> tuple[Left, ...]:
    return tuple(
        Left(
            request_id=one.release.request_id,
            request_sha256=one.release.request_sha256,
            stage=one.release.stage,
            partition=one.release.partition,
            event=one.release.event,
            count=one.release.count,
            reserved_at=moment(one.reserved_at),
            reply_sha256=one.reply_sha256 or "",
        )
        for one in ledger.releases(campaign)
    )


def _epsilon_by_stage(rows: tuple[SpentRow, ...], delta: float) -> dict[Stage, float]:
    stages: list[Stage] = list(dict.fromkeys(row.stage for row in rows))
    return {stage: epsilon_of_rows((row for row in rows if row.stage == stage), delta) for stage in stages}


def _check_free(path: Path, receipt: Receipt, *, force: bool) -> None:
    """Whether nothing is lost when this file is written over.

    Raises:
        BadInputError: something is.
    """
    if force or not path.exists():
        return
    try:
        older = read_receipt(path.read_bytes()).receipt
    except BadInputError:
        raise BadInputError(f"{path} exists and is no receipt: choose another folder, or --force") from None
    if not goes_on(receipt, older):
        raise BadInputError(
            f"{path} exists and says something that the ledger does not (any more): keep it and find out why; choose another "
            "folder, or --force"
        )


def _write(path: Path, text: str) -> None:
    """The whole file, durably, or nothing of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
