"""What a site allows: its policy is the ceiling, the operator can only go below it.

Covered:
    * every reason at once, for a plan as a whole and for each single release before it happens;
    * the budget over all campaigns that records of this data set were in, and within one;
    * who asks, with which models under which licences, and together with whom: also when a round's survivors are told.
Not covered:
    * that a yes or no by itself tells something of what these records were in before: refusals have no numbers of that;
    * several operators with budgets of their own: all spend from one;
    * whether the named peers are honest: they are members whose keys are pinned, no more.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from urna.client.ledger_rows import Release
from urna.privacy.accounting import counted, epsilon_of, epsilon_of_rows, is_accountable
from urna.protocol.identity import IdentityKeyHex
from urna.protocol.messages import SpentRow
from urna.protocol.plan import Name, Plan, Section

Metric = Literal["accuracy", "confusion"]


class Policy(Section):
    """``[policy]`` in site.toml."""

    epsilon_total: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]  # for ever, over all campaigns
    epsilon_per_campaign: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
    min_cohort: Annotated[int, Field(ge=2)] = 3
    min_colluding_sites: Annotated[int, Field(ge=0)] = 1  # the plan's noise must bear that many; 0 trusts every member
    secure_sum_required: bool = True  # false: also plans that see this site's own release, private by its own noise
    threshold_fraction: Annotated[float, Field(ge=2 / 3, le=1)] = 2 / 3  # a plan's may be higher, not lower
    max_unproven_aborts: Annotated[int, Field(ge=0)] = 3  # rounds answered here that a campaign may give up without proof
    candidates: tuple[Name, ...] | None = None  # None: any that this installation knows
    licences: tuple[str, ...] | None = None  # SPDX identifiers of candidates' weights; None: any
    operators: tuple[IdentityKeyHex, ...] | None = None  # public keys that may ask; None: the roster's
    required_peers: tuple[Name, ...] = ()  # sites that must be in every sum that this site is in
    holdout_fraction: Annotated[float, Field(ge=0.05, le=0.5)] = (
        0.2  # of the records, for ever: the site's choice, not a plan's
    )
    metrics: tuple[Metric, ...] = ("accuracy", "confusion")  # noisy counts of held-out records that may leave
    approval_required: bool = False  # a person here must say yes to each campaign: `urna-site approve`
    accept_weights: bool = False  # candidates that are not installed here may come through the campaign, by the hash it pins
    max_weights_bytes: Annotated[int, Field(ge=1, le=2**40)] = 10**9  # of all candidates that ever came like that, together


@dataclass(frozen=True)
class Grant:
    """The policy says yes, within these limits."""

    epsilon: float  # of this campaign: the lower of the plan's and the policy's
    delta: float


@dataclass(frozen=True)
class Denial:
    """The policy says no; every reason, for the operator to read."""

    reasons: tuple[str, ...]


def admit_plan(
    policy: Policy,
    plan: Plan,
    spent: tuple[SpentRow, ...],
    operator: str,
    licence_of: Mapping[str, str],
    unseen: Collection[str] = (),
) -> Grant | Denial:
    """Decide about a plan as a whole.

    Args:
        policy: this site's policy.
        plan: what is asked.
        spent: everything that records of this data set were ever released in.
        operator: the public key of who asks.
        licence_of: of the candidates that this installation knows.
        unseen: candidates that are still to come: their licence is looked at when it is here.
    """
    used = epsilon_of_rows(spent, policy.delta)
    left = policy.epsilon_total - used
    asked = plan.privacy.epsilon
    allowed = None if policy.candidates is None else set(policy.candidates)
    foreign = [c.name for c in plan.candidates if allowed is not None and c.name not in allowed]
    licences = {c.name: licence_of.get(c.name, "unknown") for c in plan.candidates if c.name not in unseen}
    barred = [f"{name} ({one})" for name, one in licences.items() if not allows_licence(policy, one)]
    extra = plan.evaluation.metrics_asked - set(policy.metrics)
    checks = [
        (
            asked <= left,
            f"budget: the plan asks epsilon {asked:g}, these records have less left",  # how much tells who is in two data sets
        ),
        (
            asked <= policy.epsilon_per_campaign,
            f"budget: the plan asks epsilon {asked:g}, this site allows {policy.epsilon_per_campaign:g} a campaign",
        ),
        (
            plan.privacy.delta <= policy.delta,
            f"delta: the plan asks {plan.privacy.delta:g}, this site allows at most {policy.delta:g}",
        ),
        (
            plan.federation.min_sites >= policy.min_cohort,
            f"cohort: the plan opens sums of {plan.federation.min_sites} sites, this site asks for {policy.min_cohort}",
        ),
        (
            plan.privacy.noise == "local" or plan.privacy.max_colluding_sites >= policy.min_colluding_sites,
            f"noise: the plan bears {plan.privacy.max_colluding_sites} colluders, this site asks {policy.min_colluding_sites}",
        ),
        (
            plan.federation.secure_sum or not policy.secure_sum_required,
            "secure sum: the plan sees single releases (federation.secure_sum = false), this site requires sums",
        ),
        (
            plan.federation.threshold_fraction >= policy.threshold_fraction,
            f"threshold: {plan.federation.threshold_fraction:.3g} of holders open sums, {policy.threshold_fraction:.3g} here",
        ),
        (
            plan.evaluation.holdout_fraction == policy.holdout_fraction,
            f"holdout: the plan holds out {plan.evaluation.holdout_fraction:g}, this site {policy.holdout_fraction:g}",
        ),
        (not foreign, f"candidates: not allowed at this site: {', '.join(foreign)}"),
        (not barred, f"licences: not allowed at this site: {', '.join(barred)}"),
        (policy.operators is None or operator in policy.operators, "operator: this site takes no plans of this key"),
        (not extra, f"metrics: the plan asks for {', '.join(sorted(extra))}, which may not leave this site"),
    ]
    reasons = tuple(reason for fine, reason in checks if not fine)
    return Denial(reasons) if reasons else Grant(epsilon=asked, delta=plan.privacy.delta)


def allows_licence(policy: Policy, licence: str) -> bool:
    """Whether weights of this licence may be used here."""
    return policy.licences is None or licence in policy.licences


def admit_release(
    policy: Policy,
    plan: Plan,
    release: Release,
    planned_count: int,
    spent_here: tuple[SpentRow, ...],
    spent_ever: tuple[SpentRow, ...],
) -> Denial | None:
    """Decide about one more release, looking as far ahead as the stage says it will go.

    Args:
        policy: this site's policy.
        plan: the campaign's plan, as admitted.
        release: what would be reserved.
        planned_count: how many of its events the campaign will ask for in all; at least this release is added to those so far.
        spent_here: what this campaign has released.
        spent_ever: what this site has ever released, this campaign included.
    """
    partition, event = release.partition, release.event
    campaign, ever = counted(spent_here, partition), counted(spent_ever, partition)
    more = max(planned_count - campaign[event], release.count)
    campaign[event] += more
    ever[event] += more
    if not is_accountable(campaign) or not is_accountable(ever):
        return Denial(("budget: this stage has so little noise for so many releases that no budget could hold it",))
    epsilon_campaign = epsilon_of(campaign, plan.privacy.delta)
    cap = min(plan.privacy.epsilon, policy.epsilon_per_campaign)
    epsilon_ever = epsilon_of(ever, policy.delta)
    reasons = []
    if epsilon_campaign > cap:
        reasons.append(f"budget: this stage would bring the campaign to epsilon {epsilon_campaign:.4g} of {cap:g}")
    if epsilon_ever > policy.epsilon_total:
        reasons.append("budget: this stage asks more than these records have left over all campaigns")
    return Denial(tuple(reasons)) if reasons else None


def missing_peers(policy: Policy, members: Sequence[str]) -> Denial | None:
    """Whether everybody is there that this site wants to be summed with."""
    missing = sorted(set(policy.required_peers) - set(members))
    return Denial((f"peers: this site releases only together with {', '.join(missing)}",)) if missing else None
