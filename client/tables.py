"""What `urna-site` prints: values -> lines of text for people at a terminal, nothing else."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from urna.client.control import CampaignStatus, SiteStatus
    from urna.client.ledger import Ledger
    from urna.client.ledger_rows import Written
    from urna.client.policy import Policy

NEVER = "-"
NOISE = {
    "shared": "every site adds its part of the noise; only the sum over the sites is opened",
    "local": "this site's release is private by its own noise",
}


def moment(seconds: float) -> str:
    """A time as the clock on the wall shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else NEVER


def printable(text: object) -> str:
    """A text that cannot steer the terminal it is shown on; accents stay."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in str(text))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under each other, each column as wide as its widest cell; never cut, a name is there to be copied."""
    widths = [max((len(cell) for cell in column), default=0) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def event_in_words(event: str) -> str:
    """An accounted event as a person says it."""
    match json.loads(event):
        case {"GaussianDpEvent": {"noise_multiplier": multiplier}}:
            return f"Gaussian, noise multiplier {multiplier:.4g}"
        case {"PoissonSampledDpEvent": {"sampling_probability": rate, "event": inner}}:
            return f"{event_in_words(json.dumps(inner))}, of a Poisson sample of {rate:.4g}"
    return printable(event)


def status_lines(status: "SiteStatus", folder: str) -> Iterator[str]:
    """Where a site stands, and what waits for a person."""
    running = (
        f"running since {moment(status.running_since)}" if status.running_since else "no runner answers; as its ledger says"
    )
    paused = f", PAUSED: `urna-site resume {folder}` lets it go on" if status.paused else ""
    yield f"site     {status.site}  {running}{paused}  (urna {status.version})"
    left = max(status.epsilon_total - status.epsilon_spent, 0)
    spent = f"epsilon {status.epsilon_spent:.4f} of {status.epsilon_total:g} spent"
    yield f"budget   {spent}, {left:.4f} left, delta {status.delta:g}"
    if status.running_since:
        yield f"work     {printable(status.work) if status.work else 'waits for the operator'}"
    if status.bundles_seen:
        last = ", ".join(one[:12] for one in status.bundles_seen[-3:])
        yield f"bundles  {len(status.bundles_seen)} seen, none unpacked: {last}"
    if status.campaigns:
        head = ("campaign", "state", "plan", "epsilon", "spent", "last stage", "last release")
        yield ""
        yield from columns([head, *map(_campaign_row, status.campaigns)])
    if status.num_older_campaigns:
        yield f"... and {status.num_older_campaigns} older ones"
    for one in status.campaigns:
        if one.state == "waiting":
            yield f"{one.name} waits for a person here: `urna-site approve {folder} {one.name}`, or deny"


def _campaign_row(one: "CampaignStatus") -> tuple[str, ...]:
    spent = (f"{one.asked.epsilon:g}", f"{one.epsilon_spent:.4f}")
    return (one.name, one.state, one.plan_sha256[:12], *spent, one.stage or NEVER, moment(one.last_activity))


def asked_lines(one: "CampaignStatus", status: "SiteStatus") -> Iterator[str]:
    """What saying yes to a campaign means."""
    asked = one.asked
    left = max(status.epsilon_total - status.epsilon_spent, 0)
    yield f"campaign    {one.name}, state {one.state}"
    yield f"plan        {asked.plan}, {one.plan_sha256}"
    yield f"asked by    operator {one.operator[:16]}..."
    yield f"epsilon     at most {asked.epsilon:g} at delta {asked.delta:g} for each record here, over the whole campaign"
    yield f"budget      {left:.4f} of {status.epsilon_total:g} are left at this site, for ever"
    yield f"candidates  {', '.join(asked.candidates)}"
    yield f"rounds      up to {asked.num_rounds} of fine-tuning, beside the ballot, runoffs and evaluation"
    yield f"who         sums over at least {asked.min_sites} sites, {asked.num_records} records in all as the plan declares"
    bears = f"; up to {asked.max_colluding_sites} sites may collude" if asked.noise == "shared" else ""
    yield f"noise       {asked.noise}: {NOISE.get(asked.noise, 'unknown')}{bears}"
    yield f"operator    {'sees sums only' if asked.secure_sum else 'sees the releases of this site, each noisy by itself'}"


def ledger_lines(ledger: "Ledger", policy: "Policy") -> Iterator[str]:
    """Everything that ever left, and what it cost: by campaign at its own delta, in total at the policy's."""
    from urna.privacy.accounting import epsilon_of_rows

    rows = [("when", "campaign", "stage", "partition", "event", "count"), *_merged(ledger.releases())]
    yield from columns(rows)
    yield ""
    plans = {one.campaign: json.loads(one.plan_json) for one in ledger.campaigns()}
    for name in dict.fromkeys(one.release.campaign for one in ledger.releases()):
        delta = float(plans[name]["privacy"]["delta"]) if name in plans else policy.delta
        epsilon = epsilon_of_rows(ledger.rows(name), delta)
        yield f"{name}  epsilon {epsilon:.4f}, delta {delta:g}"
    total = epsilon_of_rows(ledger.rows(), policy.delta)
    left = max(policy.epsilon_total - total, 0)
    yield f"total  epsilon {total:.4f} of {policy.epsilon_total:g}, delta {policy.delta:g}; {left:.4f} left"


def _merged(releases: Iterable["Written"]) -> Iterator[tuple[str, ...]]:
    """Equal releases that follow each other, as one row with the time of the first."""

    def kind(one: "Written") -> tuple[str, ...]:
        return one.release.campaign, one.release.stage, one.release.partition, one.release.event

    for (campaign, stage, partition, event), group in groupby(releases, key=kind):
        same = list(group)
        count = str(sum(one.release.count for one in same))
        yield moment(same[0].reserved_at), campaign, stage, partition, event_in_words(event), count
