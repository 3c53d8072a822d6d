"""Compare a site's receipt with the operator's journal of the run: what either holds of the other's doing must be in both.

Covered:
    * an answer that the operator holds and the receipt leaves out, or has of another request, stage, event or count;
    * a release that the operator never asked for;
    * a statement that says another cost; a ledger that stood elsewhere when the site showed it to the operator.
Not covered:
    * the bytes of uploads: a running sum has them, and the journal does not. That a site answered is what the journal says.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from urna.protocol.errors import ProtocolError, RunError
from urna.protocol.identity import OPERATOR, Roster
from urna.protocol.messages import Envelope, Head, Statement, open_reply, read_request
from urna.protocol.receipt import Left, Receipt
from urna.server.journal import Entry, Journal
from urna.server.receipt_check import TOLERANCE, Finding, rows_of


def compare_with_run(receipt: Receipt, roster: Roster, run_dir: Path) -> list[Finding]:
    """What the journal of a run and a receipt say differently.

    Raises:
        RunError: there is no journal, or it cannot be read.
    """
    try:
        with closing(Journal.read(run_dir)) as journal:
            return [*_compared(receipt, roster, journal)]
    except (KeyError, TypeError, AttributeError, ValueError, ProtocolError) as error:  # a ValidationError is a ValueError
        raise RunError(f"the journal of {run_dir} cannot be read: {type(error).__name__}; was it altered?") from None


def _compared(receipt: Receipt, roster: Roster, journal: Journal) -> Iterator[Finding]:
    run, hello, models = journal.find("run"), journal.find("ask/hello"), journal.find("models")
    if run is None or hello is None or models is None:
        raise RunError(f"the journal of {journal.run_dir} says of no site that it was asked anything: is it this run's?")
    campaign = read_request(hello.value["body"].encode()).campaign
    if campaign != receipt.campaign:
        yield _wrong(f"the run is campaign {campaign}, the receipt is of {receipt.campaign}")
        return
    if run.value["plan_sha256"] != receipt.plan_sha256:
        yield _wrong("the run's plan is another")
    if models.value != receipt.models:
        yield _wrong("the run's models are others")
    yield from _about_rounds(receipt, journal)
    yield from _about_statement(receipt, roster, journal)
    yield from _about_head(receipt, roster, journal)


def _about_rounds(receipt: Receipt, journal: Journal) -> Iterator[Finding]:
    listed = {one.request_id: one for one in receipt.left}
    for entry in journal.entries():
        if entry.kind != "round" or receipt.site not in entry.value["delivered"]:
            continue
        request_id = f"{receipt.campaign}/{entry.key.removeprefix('round/')}"
        if request_id not in listed:
            yield _wrong(f"the operator holds an answer to {request_id}, the receipt does not have it")
            continue
        fault = _fault_of(listed[request_id], entry)
        if fault is not None:
            yield _wrong(f"release {request_id}: {fault}")
    for request_id, one in listed.items():
        asked = journal.find(f"ask/{request_id.removeprefix(f'{receipt.campaign}/')}")
        if asked is None:
            yield _wrong(f"release {request_id}: this run never asked for it")
        elif _envelope(OPERATOR, asked).sha256 != one.request_sha256:
            yield _wrong(f"release {request_id}: the run asked something else under this id")


def _fault_of(one: Left, entry: Entry) -> str | None:
    said = (one.stage, one.partition, one.event, one.count)
    asked = tuple(entry.value[name] for name in ("stage", "partition", "event", "count"))
    if said != asked:
        return f"the operator asked for {asked[0]}, {asked[1]}, {asked[2]}, {asked[3]} times"
    return None if one.reply_sha256 else "the operator holds its answer, the receipt says that none was sent"


def _about_statement(receipt: Receipt, roster: Roster, journal: Journal) -> Iterator[Finding]:
    """The statement, if one came, was signed and kept: it must say the same."""
    kept, asked = journal.find(f"reply/close/{receipt.site}"), journal.find("ask/close")
    if kept is None or asked is None:
        yield Finding("note", f"the run holds no closing statement of {receipt.site}")
        return
    try:
        said = open_reply(_envelope(receipt.site, kept), roster, receipt.site, _envelope(OPERATOR, asked))
    except ProtocolError as error:
        yield _wrong(f"the statement in the run's journal is not this site's: {error}")
        return
    if not isinstance(said, Statement):
        yield Finding("note", f"{receipt.site} gave no closing statement but a {said.kind}")
        return
    counted = {(row.stage, row.partition, row.event): row.count for row in said.rows}
    if counted != {(row.stage, row.partition, row.event): row.count for row in rows_of(receipt)}:
        yield _wrong("its closing statement lists other releases")
    if abs(said.epsilon - receipt.epsilon) > TOLERANCE or said.delta != receipt.delta:
        yield _wrong(f"its closing statement says epsilon {said.epsilon:.9g} at delta {said.delta:g}")
    if receipt.state == "open":
        yield Finding("note", "it was written before the campaign was closed: ask for a newer one")


def _about_head(receipt: Receipt, roster: Roster, journal: Journal) -> Iterator[Finding]:
    """The newest entry of its ledger that the site showed the operator."""
    shown = [entry.value[receipt.site] for entry in journal.entries() if entry.kind == "heads" and receipt.site in entry.value]
    if not shown:
        return
    head = Head.model_validate(shown[-1])
    head.check(roster)
    if head.seq == receipt.ledger_seq and head.link != receipt.ledger_link:
        yield _wrong(f"the site showed the operator another ledger: its entry {head.seq} is not the one in the receipt")
    if head.seq > receipt.ledger_seq:
        yield Finding(
            "note", f"it was written at entry {receipt.ledger_seq} of the ledger; the site has shown entry {head.seq}"
        )


def _envelope(sender: str, entry: Entry) -> Envelope:
    body, signature = entry.value["body"], entry.value["signature"]
    return Envelope(sender, body.encode(), bytes.fromhex(signature), dict(entry.arrays))


def _wrong(text: str) -> Finding:
    return Finding("wrong", text)
