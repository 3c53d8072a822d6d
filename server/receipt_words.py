"""A checked receipt in words: a short table and a verdict."""

from collections.abc import Iterator

from urna.protocol.plan import Plan
from urna.protocol.receipt import Receipt
from urna.server.receipt_check import Checked, in_words, rows_of

MAX_REASONS = 30


def lines_of(checked: Checked) -> Iterator[str]:
    """What is said about a receipt, line by line; the last one is the verdict."""
    receipt = checked.receipt
    if receipt is not None and checked.is_good:
        yield from _about(receipt)
    wrong = [one.text for one in checked.findings if one.kind == "wrong"]
    yield from (f"note     {one.text}" for one in checked.findings if one.kind == "note")
    yield from (f"wrong    {text}" for text in wrong[:MAX_REASONS])
    if wrong:
        more = len(wrong) - MAX_REASONS
        yield f"verdict  WRONG: {len(wrong)} reason{'s' if len(wrong) > 1 else ''}{f', {more} not shown' if more > 0 else ''}"
    elif receipt is not None:
        yield (
            f"verdict  GOOD: {receipt.site} signed that campaign {receipt.campaign} cost epsilon {receipt.epsilon:.4f} "
            f"at delta {receipt.delta:g}, and that follows from its {len(receipt.left)} releases"
        )


def _about(receipt: Receipt) -> Iterator[str]:
    plan = Plan.model_validate_json(receipt.plan_json)
    approved = "approved by a person there" if receipt.approved_by_a_person else "let in by its policy alone"
    yield f"site     {receipt.site}, key {receipt.site_key[:12]}..., urna {receipt.urna_version}"
    yield f"campaign {receipt.campaign}, {receipt.state}; joined {receipt.joined_at}, {approved}"
    yield f"plan     {plan.name} {receipt.plan_sha256[:12]}, by the operator with key {receipt.operator_key[:12]}..."
    yield f"models   {', '.join(f'{name} {sha256[:12]}' for name, sha256 in receipt.models.items())}"
    for row in rows_of(receipt):
        yield f"left     {row.stage:<10} {row.partition:<7} {row.count:>6} x {in_words(row.event)}"
    for stage, epsilon in receipt.epsilon_by_stage.items():
        yield f"epsilon  {stage:<10} {epsilon:.4f}"
    yield f"epsilon  {'total':<10} {receipt.epsilon:.4f} of {plan.privacy.epsilon:g}, delta {receipt.delta:g}"
    unsent = sum(not one.reply_sha256 for one in receipt.left)
    if unsent:
        yield f"unsent   {unsent} of {len(receipt.left)} releases were charged and never sent"
    yield f"bundles  {len(receipt.bundles_seen)} app bundles were seen, none was run"
    yield f"ledger   at entry {receipt.ledger_seq}, {receipt.ledger_link[:12]}..., on {receipt.written_at}"
