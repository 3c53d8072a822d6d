"""Receipts made by hand: one site with its key, a plan, and what left; `altered` and signed again as a liar would."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from urna.privacy.accounting import epsilon_of_rows, gaussian, subsampled_gaussian
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import SpentRow
from urna.protocol.plan import Plan
from urna.protocol.receipt import Left, Receipt, SignedReceipt, sign_receipt

SITE, OTHER = (Identity(name, Ed25519PrivateKey.generate()) for name in ("hospital-a", "hospital-b"))
OPERATOR_IDENTITY = Identity(OPERATOR, Ed25519PrivateKey.generate())
ROSTER = Roster(
    operator=OPERATOR_IDENTITY.public_key_hex, sites={SITE.name: SITE.public_key_hex, OTHER.name: OTHER.public_key_hex}
)
PLAN = Plan.model_validate(
    {
        "name": "digits",
        "task": {"num_classes": 3},
        "candidates": [{"name": "pixels"}, {"name": "pca", "sha256": "bb" * 32}],
        "privacy": {"epsilon": 3.0, "delta": 1e-5},
        "federation": {"min_sites": 3, "num_records": 180},
        "final": {"num_rounds": 3, "sample_rate": 0.5, "learning_rate": 0.1},
    }
)
MODELS = {"pixels": "aa" * 32, "pca": "bb" * 32}
STEP = subsampled_gaussian(0.5, 2.0)


def left(key: str, event: str, partition: str = "tuning", **changes: Any) -> Left:
    fields: dict[str, Any] = {"request_sha256": "11" * 32, "stage": key.split("/")[0], "count": 1, "reply_sha256": "22" * 32}
    at = {"request_id": f"run-1/{key}", "reserved_at": "2026-01-02T03:04:05Z"}
    return Left(**(fields | at | {"partition": partition, "event": event} | changes))


RELEASES = (
    left("ballot/1", gaussian(4.0)),
    left("final/1", STEP),
    left("final/2", STEP, reply_sha256=""),
    left("evaluation/final/1", gaussian(1.75), "heldout"),
)


def rows_of(releases: Iterable[Left]) -> list[SpentRow]:
    return [SpentRow(stage=one.stage, partition=one.partition, event=one.event, count=one.count) for one in releases]


def a_receipt(releases: Sequence[Left] = RELEASES, **changes: Any) -> Receipt:
    """What an honest site writes; epsilon follows from the releases unless it is given."""
    delta = PLAN.privacy.delta
    if "epsilon" not in changes or "epsilon_by_stage" not in changes:
        rows = rows_of(releases)
        stages = dict.fromkeys(row.stage for row in rows)
        by_stage = {stage: epsilon_of_rows([r for r in rows if r.stage == stage], delta) for stage in stages}
        changes = {"epsilon": epsilon_of_rows(rows, delta), "epsilon_by_stage": by_stage} | changes
    fields = {
        "site": SITE.name,
        "site_key": SITE.public_key_hex,
        "operator_key": ROSTER.operator,
        "campaign": "run-1",
        "plan_sha256": PLAN.sha256,
        "plan_json": PLAN.model_dump_json(),
        "models": MODELS,
        "urna_version": "0.1.0",
        "joined_at": "2026-01-02T03:04:00Z",
        "written_at": "2026-01-02T04:00:00Z",
        "state": "closed",
        "approved_by_a_person": True,
        "bundles_seen": ("cc" * 32,),
        "left": tuple(releases),
        "delta": delta,
        "ledger_seq": 12,
        "ledger_link": "dd" * 32,
    }
    return Receipt(**(fields | changes))


def a_signed(releases: Sequence[Left] = RELEASES, **changes: Any) -> SignedReceipt:
    return sign_receipt(SITE, a_receipt(releases, **changes))


def altered(signed: SignedReceipt, signer: Identity | None = None, **changes: Any) -> bytes:
    """The file with fields changed: the old signature, or one made anew by anyone, who need not be whom it names."""
    receipt = Receipt.model_validate_json(json.dumps(json.loads(signed.receipt.model_dump_json()) | changes))
    signature = signed.signature
    if signer is not None:
        named = Identity(receipt.site, signer.private_key)
        signature = named.sign("receipt", receipt.model_dump_json().encode()).hex()
    return SignedReceipt(receipt=receipt, signature=signature).to_text().encode()
