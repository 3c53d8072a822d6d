"""A plan in words: what will leave the sites, how often, at which cost. All of it from public numbers."""

from urna.models.catalogue import CandidateSpec, spec
from urna.privacy.accounting import epsilon_of, gaussian, subsampled_gaussian
from urna.protocol.plan import Plan
from urna.strategies.budget import ballot_noise_multiplier, evaluation_budget, training_noise_multiplier
from urna.strategies.shortlist import shortlist


def plan_in_words(plan: Plan) -> str:
    """Describe a campaign for people who decide about it.

    Raises:
        ModelError: a candidate is unknown.
    """
    specs = [spec(entry.name) for entry in plan.candidates]
    vote = ballot_noise_multiplier(plan)
    ahead = [gaussian(vote)] if len(specs) > 1 else []
    step = training_noise_multiplier(plan, plan.final.num_rounds, ahead)
    parts = [_who(plan), _choice(plan, specs, vote, step), _training(plan, specs, step), _evaluation(plan), _limits(plan)]
    return f"plan {plan.name}  {plan.sha256}\n\n" + "\n\n".join(parts)


def _who(plan: Plan) -> str:
    privacy, federation = plan.privacy, plan.federation
    noise = {
        "shared": "each site adds its part of the noise and only the secure sum over all of a round's sites is opened",
        "local": "each site's contribution is private by itself",
    }[privacy.noise]
    return (
        f"Sites. At least {federation.min_sites} sites with {federation.num_records} records in all (public number). "
        f"No record leaves a site. Whatever leaves is noisy: {noise}"
        + (f"; up to {privacy.max_colluding_sites} sites may collude with the server" if privacy.max_colluding_sites else "")
        + f".\nCost. At most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each record of a site, over everything "
        "below together (adding or removing one record). Every site's own ledger and policy enforce it."
    )


def _choice(plan: Plan, specs: list[CandidateSpec], vote: float, step: float) -> str:
    judged = shortlist(plan, specs, step)
    lines = []
    for one, candidate in zip(judged, specs, strict=True):
        verdict = f"dropped: {', '.join(one.reasons)}" if one.reasons else f"{one.trainable_parameters} numbers to train"
        lines.append(f"  {one.name:<14}{candidate.family:<26}{candidate.num_parameters:>9,} parameters   {verdict}")
    kept = [one for one in judged if not one.reasons]
    cost = epsilon_of([gaussian(vote)], plan.privacy.delta)
    then = {
        "runoff": f"the leading {plan.runoff.num_finalists} train {plan.runoff.num_rounds} rounds each and are compared on "
        "held-out records",
        "prior": "the operator's order of candidates decides among the leaders",
    }[plan.ballot.if_undecided]
    return (
        f"Candidates (shortlist by public numbers, free):\n{chr(10).join(lines)}\n"
        f"Ballot. {len(kept)} numbers leave once: votes of buckets of about {plan.ballot.bucket_size} records, "
        f"noise multiplier {vote:.2f}, epsilon {cost:.3f} an attempt, at most {plan.ballot.max_attempts} attempts. "
        f"If it is undecided, {then}."
    )


def _training(plan: Plan, specs: list[CandidateSpec], step: float) -> str:
    final = plan.final
    sizes = sorted({(one.feature_dim + 1) * plan.task.num_classes for one in specs})
    numbers = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    steps = final.num_rounds * final.local_steps
    cost = epsilon_of([subsampled_gaussian(final.sample_rate, step)] * steps, plan.privacy.delta)
    return (
        f"Fine-tune ({final.tuning}). {numbers} numbers leave {final.num_rounds} times: gradients of a random "
        f"{final.sample_rate:.0%} of the records, each clipped to {final.max_grad_norm:g}, "
        f"noise multiplier {step:.2f} or more, epsilon {cost:.3f}. "
        f"With the ballot that is epsilon {plan.privacy.epsilon:g} or less."
    )


def _evaluation(plan: Plan) -> str:
    settings, shares = plan.evaluation, evaluation_budget(plan)
    curve = f"{settings.num_curve_points} times the accuracy so far (noise multiplier {shares.curve:.2f}), then "
    return (
        f"Evaluation. {settings.holdout_fraction:.0%} of each site's records never train; a keyed hash chooses them once. From "
        f"them leave {curve if settings.num_curve_points else ''}the final counts with a confusion matrix "
        f"({1 + 1 + plan.task.num_classes**2} numbers). They may spend the same epsilon again, for no record is in both parts."
    )


def _limits(plan: Plan) -> str:
    honest = plan.noise_parties(plan.federation.min_sites)
    note = (
        f"The epsilon holds if {honest} of the sites of a round add their noise honestly. "
        if plan.privacy.noise == "shared"
        else ""
    )
    return (
        f"Limits. {note}A site can lie about its own contribution: its clip bounds it only while it is honest. "
        "One person with records at two sites pays at both."
    )
