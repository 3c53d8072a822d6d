"""A plan in words: what will leave the sites, how often, at which cost. All of it from public numbers."""

from collections.abc import Mapping

from urna.models.catalogue import CandidateSpec, spec
from urna.models.sizes import TrainedSize
from urna.privacy.accounting import epsilon_of, gaussian, subsampled_gaussian
from urna.protocol.errors import PlanError
from urna.protocol.plan import Plan
from urna.strategies.budget import ballot_noise_multiplier, evaluation_budget, training_noise_multiplier
from urna.strategies.shortlist import Shortlisted, shortlist, trained_sizes


def plan_in_words(plan: Plan) -> str:
    """Describe a campaign for people who decide about it.

    Raises:
        ModelError: a candidate is unknown, or has to be measured (any mode but "head") and is not installed.
        PlanError: epsilon cannot pay for it, or no candidate is left.
    """
    specs = [spec(entry.name) for entry in plan.candidates]
    vote = ballot_noise_multiplier(plan)
    ahead = [gaussian(vote)] if len(specs) > 1 else []
    step = training_noise_multiplier(plan, plan.final.num_rounds, ahead)
    sizes = trained_sizes(plan, specs)
    judged = shortlist(plan, specs, step, sizes)
    kept = [one for one in judged if not one.reasons]
    if not kept:
        why = "; ".join(f"{one.name} {', '.join(one.reasons)}" for one in judged)
        raise PlanError(f"shortlist: it leaves no candidate ({why}): loosen [shortlist] or add candidates")
    parts = [
        _who(plan),
        _choice(judged, specs, sizes),
        _ballot(plan, len(kept), vote),
        _training(plan, kept, step),
        _evaluation(plan),
        _limits(plan),
    ]
    return f"plan {plan.name}  {plan.sha256}\n\n" + "\n\n".join(parts)


def _who(plan: Plan) -> str:
    privacy, federation = plan.privacy, plan.federation
    noise = {
        "shared": "each site adds its part of the noise and only the secure sum over a round's surviving sites is opened",
        "local": "each site's contribution is private by itself",
    }[privacy.noise]
    if not federation.secure_sum:
        noise += "; there is no secure sum, so the operator sees each site's contribution"
    return (
        f"Sites. At least {federation.min_sites} sites with {federation.num_records} records in all (public number). "
        f"No record leaves a site. Whatever leaves is noisy: {noise}"
        + (f"; up to {privacy.max_colluding_sites} sites may collude with the server" if privacy.max_colluding_sites else "")
        + f".\nCost. At most epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each record of a site, over everything "
        "below together (adding or removing one record). Every site's own ledger and policy enforce it."
    )


def _choice(judged: list[Shortlisted], specs: list[CandidateSpec], sizes: Mapping[str, TrainedSize]) -> str:
    lines = []
    for one, candidate in zip(judged, specs, strict=True):
        engine = sizes[one.name].engine if one.name in sizes else ""
        fine = f"{one.trainable_parameters} numbers to train" + (f" by {engine}" if engine else "")
        verdict = f"dropped: {', '.join(one.reasons)}" if one.reasons else fine
        lines.append(f"  {one.name:<14}{candidate.family:<26}{candidate.num_parameters:>9,} parameters   {verdict}")
    return f"Candidates (shortlist by public numbers, free):\n{chr(10).join(lines)}"


def _ballot(plan: Plan, num_candidates: int, vote: float) -> str:
    settings = plan.ballot
    if num_candidates < 2:
        return "Ballot. None is held: there is one candidate."
    cost = epsilon_of([gaussian(vote)], plan.privacy.delta)
    return (
        f"Ballot. {num_candidates} numbers leave once, and once more for each attempt that is lost ({settings.max_attempts} "
        f"attempts at most): votes of buckets of about {settings.bucket_size} records, noise multiplier {vote:.2f}, epsilon "
        f"{cost:.3f} an attempt. If it is undecided, {_then(plan)}."
    )


def _then(plan: Plan) -> str:
    if plan.ballot.if_undecided == "prior":
        return "the operator's order of candidates decides among the leaders"
    runoff = plan.runoff
    return (
        f"up to {runoff.num_finalists} leaders train {plan.num_runoff_rounds} rounds each and are "
        "compared on held-out records; the winner keeps its rounds"
    )


_MODES = {
    "head": "a linear head on frozen features",
    "lora": "low-rank factors (rank {rank}) beside the linear layers of the model, and a linear head on its features",
    "full": "every weight of the model, and a linear head on its features",
}


def _schedule(plan: Plan) -> str:
    """How the learning rate changes; empty where it does not."""
    final = plan.final
    parts = [f"rises over the first {final.warmup_fraction:.0%} of the steps"] if final.warmup_fraction else []
    falls = {"constant": "", "linear": "falls linearly to zero", "cosine": "falls to zero by a cosine"}[final.schedule]
    parts += [falls] if falls else []
    whose = "server's" if plan.privacy.noise == "shared" else "sites'"
    return f" The {whose} learning rate {', then '.join(parts)}." if parts else ""


def _steps_at_the_site(plan: Plan) -> str:
    final = plan.final
    name = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}[final.local_optimizer]
    steps = "1 noisy step" if final.local_steps == 1 else f"{final.local_steps} noisy steps"
    return f"{steps} of {name} at the site"


def _training(plan: Plan, kept: list[Shortlisted], step: float) -> str:
    final = plan.final
    sizes = sorted({one.trainable_parameters for one in kept})
    numbers = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    what_is_trained = _MODES[final.tuning].format(rank=final.lora_rank)
    most = max_training_rounds(plan)
    often = f"{final.num_rounds} times" + (f", with a runoff up to {most} times" if most > final.num_rounds else "")
    what = f"a random {final.sample_rate:.0%} of the records, each clipped to {final.max_grad_norm:g}"
    if plan.privacy.noise == "shared":
        each = f"gradients of {what}"
    else:
        each = f"the change of these numbers after {_steps_at_the_site(plan)}, each on gradients of {what}"
    steps = final.num_rounds * final.local_steps
    cost = epsilon_of({subsampled_gaussian(final.sample_rate, step): steps}, plan.privacy.delta)
    return (
        f"Fine-tune ({final.tuning}): {what_is_trained}. {numbers} numbers leave {often}: {each}; noise multiplier "
        f"{step:.2f} or more.{_schedule(plan)} "
        f"{final.num_rounds} rounds cost epsilon {cost:.3f}; more rounds get more noise. With the ballot that is epsilon "
        f"{plan.privacy.epsilon:g} or less."
    )


def _evaluation(plan: Plan) -> str:
    settings, shares = plan.evaluation, evaluation_budget(plan)
    parts = []
    if plan.ballot.if_undecided == "runoff" and len(plan.candidates) > 1:
        parts.append(
            f"after a runoff the finalists' right answers ({plan.runoff.num_finalists + 1} numbers at most, noise multiplier "
            f"{shares.runoff:.2f}, {settings.max_attempts} attempts at most)"
        )
    if settings.num_curve_points:
        parts.append(f"up to {settings.num_curve_points} times the accuracy so far (2 numbers, {shares.curve:.2f})")
    counts = 2 + (plan.task.num_classes**2 if settings.confusion else 0)
    matrix = " with a confusion matrix" if settings.confusion else ""
    parts.append(f"the final counts{matrix} ({counts} numbers, {settings.max_attempts} attempts at most)")
    return (
        f"Evaluation. {settings.holdout_fraction:.0%} of each site's records never train; a keyed hash chooses them once. From "
        f"them leave {'; '.join(parts)}. They may spend the same epsilon again, for no record is in both parts."
    )


def max_training_rounds(plan: Plan) -> int:
    """How often numbers can leave in training, runoff included."""
    if plan.ballot.if_undecided == "prior" or len(plan.candidates) < 2:
        return plan.final.num_rounds
    finalists = min(plan.runoff.num_finalists, len(plan.candidates))
    return plan.final.num_rounds + (finalists - 1) * plan.num_runoff_rounds


def _limits(plan: Plan) -> str:
    colluding = plan.privacy.max_colluding_sites
    who = f"all but {colluding}" if colluding else "all"
    note = f"The epsilon holds if, of the fewest sites whose sum can be opened, {who} add their noise honestly. "
    note = note if plan.privacy.noise == "shared" else ""
    if plan.privacy.noise == "shared" and not colluding:
        note += "It holds against the server, not against a fellow site, who knows its own share of the noise. "
    return (
        f"Limits. {note}A site can lie about its own contribution: its clip bounds it only while it is honest. "
        "One person with records at two sites pays at both."
    )
