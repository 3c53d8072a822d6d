"""What the people of a site see of it and decide: a `control.Desk` over its ledger.

Decisions are entries of the ledger, so they outlive the process, and none can be taken out unseen.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import ValidationError

import urna
from urna.client.control import BUNDLES_LIMIT, CAMPAIGNS_LIMIT, CampaignStatus, DenyReason, SiteStatus, State, asked_of
from urna.client.ledger import Ledger
from urna.client.ledger_rows import Event
from urna.client.policy import Policy
from urna.privacy.accounting import epsilon_of_rows
from urna.protocol.errors import ControlError
from urna.protocol.identity import Roster
from urna.protocol.plan import Plan


@dataclass
class LedgerDesk:
    """One site's desk; its methods may be called from any thread.

    Args:
        site: its name.
        policy: for the budget's limits.
        roster: for the operator's key.
        ledger: where decisions are kept.
        running_since: seconds since 1970; 0: nobody runs.
        work: says what the runner does at this moment.
    """

    site: str
    policy: Policy
    roster: Roster
    ledger: Ledger
    running_since: float = field(default_factory=time.time)
    work: Callable[[], str] = str  # "": nothing

    def status(self) -> SiteStatus:
        """Where the site stands."""
        campaigns = self._campaigns()
        last = self.ledger.noted("pause", "resume")
        spent = [self.ledger.rows(dataset=number) for number in self.ledger.datasets()] or [self.ledger.rows()]
        return SiteStatus(
            site=self.site,
            version=urna.__version__,
            paused=last is not None and last.event == "pause",
            running_since=self.running_since,
            work=self.work(),
            epsilon_spent=max(epsilon_of_rows(rows, self.policy.delta) for rows in spent),  # of the records that paid most
            epsilon_total=self.policy.epsilon_total,
            delta=self.policy.delta,
            campaigns=campaigns[:CAMPAIGNS_LIMIT],
            num_older_campaigns=max(0, len(campaigns) - CAMPAIGNS_LIMIT),
            bundles_seen=tuple(one.subject for one in self.ledger.all_noted("bundle")[-BUNDLES_LIMIT:]),
        )

    def approve(self, campaign: str, plan_sha256: str, by: str) -> None:
        """Let this campaign be opened with exactly this plan.

        Raises:
            ControlError: it waits for nobody, or with another plan.
        """
        self._decide("approve", campaign, plan_sha256, by=by)

    def deny(self, campaign: str, reason: DenyReason, by: str) -> None:
        """Refuse this campaign: it is not opened, and where it is open nothing more is released for it.

        Raises:
            ControlError: there is no such campaign here.
        """
        self._decide("deny", campaign, None, by=by, reason=str(reason))

    def pause(self, by: str) -> None:
        """Release nothing until `resume`."""
        self.ledger.note("pause", self.site, by=by)

    def resume(self, by: str) -> None:
        """Go on."""
        self.ledger.note("resume", self.site, by=by)

    def _decide(self, event: Event, campaign: str, plan_sha256: str | None, **said: str) -> None:
        with self.ledger.exclusive():  # no other plan can take its place between the look and the note
            plan = self._plans().get(campaign)
            if plan is None:
                raise ControlError(f"expected a campaign that asked this site, found none called {campaign!r}: see the status")
            if plan_sha256 is not None and plan.sha256 != plan_sha256:
                raise ControlError(f"{campaign} now asks with another plan ({plan.sha256[:12]}): look at it again")
            self.ledger.note(event, campaign, plan_sha256=plan.sha256, **said)

    def _plans(self) -> dict[str, Plan]:
        """Of every campaign: the plan that it was joined with, else the last one that waited."""
        asked = {one.campaign: one.plan_json for one in self.ledger.waiting()}
        asked |= {one.campaign: one.plan_json for one in self.ledger.campaigns()}
        plans = {name: _plan(text) for name, text in asked.items()}
        return {name: plan for name, plan in plans.items() if plan is not None}

    def _campaigns(self) -> tuple[CampaignStatus, ...]:
        return tuple(self._campaign(name, plan) for name, plan in reversed(self._plans().items()))

    def _campaign(self, name: str, plan: Plan) -> CampaignStatus:
        releases = self.ledger.releases(name)
        rows = self.ledger.rows(name)
        return CampaignStatus(
            name=name,
            state=self._state(name, plan),
            plan_sha256=plan.sha256,
            operator=self.roster.operator[:64],
            asked=asked_of(plan),
            epsilon_spent=epsilon_of_rows(rows, plan.privacy.delta),
            stage=releases[-1].release.stage if releases else "",
            last_activity=releases[-1].reserved_at if releases else 0.0,
        )

    def _state(self, name: str, plan: Plan) -> State:
        decided = self.ledger.noted("approve", "deny", subject=name)
        if decided is not None and decided.event == "deny" and decided.detail.get("plan_sha256") == plan.sha256:
            return "denied"
        if self.ledger.noted("close", subject=name) is not None:
            return "closed"
        if self.ledger.campaign(name) is not None:
            return "open"
        approved = decided is not None and decided.detail.get("plan_sha256") == plan.sha256
        return "approved" if approved else "waiting"


def _plan(text: str) -> Plan | None:
    """A plan; None if it is of a version that this one cannot read, which is no reason to hide the others."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError:
        return None
