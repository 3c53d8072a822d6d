"""The story of a campaign in one screen: hello, shortlist, ballot, runoff, final, evaluate, close.

Everything that happened is in the journal under a key that is used once. After a crash the same code runs again and each
step gives back what was recorded, so the story reads as if nothing had stopped it. How each step asks is in `stages`.
"""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import urna
from urna.models.catalogue import spec
from urna.privacy.accounting import gaussian
from urna.protocol.errors import PlanError
from urna.protocol.identity import Identity, Roster
from urna.protocol.messages import Stage
from urna.protocol.plan import Plan
from urna.server.exchange import Transport
from urna.server.journal import Journal, Json, recorded_plan
from urna.server.rounds import Rounds
from urna.server.stages import Stages
from urna.strategies import ballot, budget, runoff
from urna.strategies.aggregation import OptimizerState
from urna.strategies.shortlist import shortlist, trained_sizes

VERSIONED = ("flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography")


@dataclass(frozen=True)
class Schedule:
    """How training goes on after the ballot: who runs off (nobody: decided), for how long, at which noise."""

    finalists: tuple[str, ...]
    runoff_rounds: int  # of each finalist
    num_releases: int  # of tuning records, runoff and final together
    noise_multiplier: float


@dataclass
class Campaign:
    """One execution of a plan."""

    plan: Plan
    journal: Journal
    stages: Stages

    def run(self) -> None:
        """From the first hello to the last statement; goes on where the journal ends.

        Raises:
            RefusedError: too many sites' policies said no.
            RoundError: too few sites are left; `urna resume` goes on.
        """
        self.stages.hello()  # 1. who takes part: signatures, policies, round keys
        names = self._shortlist()  # 2. public filter: free
        ranking = self._ballot(names)  # 3. one Gaussian release of one number a candidate
        schedule = self._schedule(ranking)  # 4. what is left, divided over the rounds to come
        winner, state = self._decide(ranking, schedule)  # 5. the ballot's leader, a runoff, or the prior
        state = self._final(winner, state, schedule)  # 6. fine-tune with what is left
        self._evaluate(winner, state)  # 7. noisy counts on records that never trained
        self.stages.close()  # 8. what the sites' ledgers say it cost
        self.journal.once("finished", lambda: {"winner": winner})

    def _shortlist(self) -> list[str]:
        plan = self.plan
        ahead = [gaussian(budget.ballot_noise_multiplier(plan))]
        multiplier = budget.training_noise_multiplier(plan, plan.final.num_rounds, ahead)
        specs = [spec(entry.name) for entry in plan.candidates]

        def make() -> Json:
            judged = shortlist(plan, specs, multiplier, trained_sizes(plan, specs))
            return {"noise_multiplier": multiplier, "candidates": [asdict(one) for one in judged]}

        judged = self.journal.once("shortlist", make)["candidates"]  # another preflight could judge otherwise: the first counts
        kept = [one["name"] for one in judged if not one["reasons"]]
        if not kept:
            why = "; ".join(f"{one['name']}: {', '.join(one['reasons'])}" for one in judged)
            raise PlanError(f"the shortlist left no candidate ({why}): loosen [shortlist] or add candidates")
        if plan.final.tuning != "head":
            self.journal.once("tuning", lambda: self._tuning(kept))
        self.stages.check_rings(kept, budget.ballot_noise_multiplier(plan), multiplier)
        return kept

    def _tuning(self, kept: list[str]) -> Json:
        """How the operator's preflight would train each candidate that is left; sites run their own."""
        sizes = trained_sizes(self.plan, [spec(name) for name in kept])
        return {"mode": self.plan.final.tuning, "candidates": {name: asdict(one) for name, one in sizes.items()}}

    def _ballot(self, names: list[str]) -> ballot.Ranking | None:
        """The ranking; None when there was nothing to choose or every attempt was lost."""
        if len(names) == 1:
            return None
        ranking = self.stages.ballot(names, budget.ballot_noise_multiplier(self.plan))
        self.journal.once("ballot", lambda: _ballot_json(ranking))
        return ranking

    def _schedule(self, ranking: ballot.Ranking | None) -> Schedule:
        plan = self.plan
        runs_off = ranking is not None and ranking.undecided and plan.ballot.if_undecided == "runoff"
        names = runoff.finalists(ranking, plan.runoff.num_finalists) if ranking is not None and runs_off else ()
        rounds = plan.num_runoff_rounds if names else 0
        releases = len(names) * rounds + plan.final.num_rounds - rounds

        def make() -> Json:
            multiplier = budget.training_noise_multiplier(plan, releases, self.stages.asked_events("tuning"))
            return asdict(Schedule(names, rounds, releases, multiplier))

        value = self.journal.once("schedule", make)
        return Schedule(**(value | {"finalists": tuple(value["finalists"])}))

    def _decide(self, ranking: ballot.Ranking | None, schedule: Schedule) -> tuple[str, OptimizerState]:
        """Who is fine-tuned, with the rounds it has already trained."""
        prior = [entry.name for entry in self.plan.candidates if entry.name in self._kept()]
        if schedule.finalists:
            winner, by, state = self._runoff(schedule)
        else:
            if ranking is None:
                winner, by = prior[0], "only candidate" if len(prior) == 1 else "prior, for the ballot was lost"
            elif ranking.undecided:
                winner, by = ballot.by_prior(ranking, prior), "prior"
            else:
                winner, by = ranking.contenders[0], "ballot"
            state = self.stages.start(winner)
        undecided = ranking.undecided if ranking is not None else len(prior) > 1
        self.journal.once("decision", lambda: {"winner": winner, "by": by, "undecided": undecided})
        return winner, state

    def _kept(self) -> set[str]:
        entry = self.journal.find("shortlist")
        assert entry is not None
        return {one["name"] for one in entry.value["candidates"] if not one["reasons"]}

    def _runoff(self, schedule: Schedule) -> tuple[str, str, OptimizerState]:
        self.stages.rounds.everyone_back()
        states = []
        for name in schedule.finalists:
            state = self.stages.start(name)
            for index in range(1, schedule.runoff_rounds + 1):
                state = self._step("runoff", f"runoff/{name}/{index}", name, state, index, schedule)
            states.append(state)
        names = schedule.finalists
        models = dict(zip(names, states, strict=True))
        multiplier, attempts = budget.evaluation_budget(self.plan).runoff, self.plan.evaluation.max_attempts
        for attempt in range(1, attempts + 1):
            counts = self.stages.count("runoff", attempt, models, multiplier, attempts)
            if counts is not None:
                winner = runoff.winner(names, counts.accuracy)
                return winner, "runoff", models[winner]
        return names[0], "ballot's leader, for the runoff's comparison was lost", states[0]

    def _final(self, winner: str, state: OptimizerState, schedule: Schedule) -> OptimizerState:
        self.stages.rounds.everyone_back()
        last = self.plan.final.num_rounds
        points = curve_points(schedule.runoff_rounds, last, self.plan.evaluation.num_curve_points)
        for index in range(schedule.runoff_rounds + 1, last + 1):
            state = self._step("final", f"final/{index}", winner, state, index, schedule)
            if index in points:
                multiplier = budget.evaluation_budget(self.plan).curve
                self.stages.count(f"curve-{index}", 1, {winner: state}, multiplier, len(points))
        if self.journal.find("model") is None:
            self.journal.record("model", {"candidate": winner, "steps": state.step}, {"vector": state.vector.astype("float32")})
        return state

    def _step(self, stage: Stage, key: str, name: str, state: OptimizerState, index: int, schedule: Schedule) -> OptimizerState:
        return self.stages.train(stage, key, name, state, index, schedule.noise_multiplier, schedule.num_releases)

    def _evaluate(self, winner: str, state: OptimizerState) -> None:
        self.stages.rounds.everyone_back()
        attempts = self.plan.evaluation.max_attempts
        for attempt in range(1, attempts + 1):
            spent = self.stages.asked_events("heldout")
            multiplier = budget.final_counts_noise_multiplier(self.plan, spent, last_attempt=attempt == attempts)
            detail = self.plan.evaluation.confusion
            if self.stages.count("final", attempt, {winner: state}, multiplier, 1, detail=detail) is not None:
                return


def curve_points(done: int, last: int, count: int) -> set[int]:
    """After which rounds of ``done + 1 ... last - 1`` the learning curve is measured: ``count`` of them, evenly."""
    return {done + round((last - done) * (at + 1) / (count + 1)) for at in range(count)} - {done, last}


def run_campaign(run_dir: Path, transport: Transport, identity: Identity, roster: Roster) -> None:
    """Run, or go on with, the campaign of a run folder that `begin` made.

    Raises:
        RunError: another process runs it, or it is no run folder.
        RefusedError: see `Campaign.run`.
        RoundError: see `Campaign.run`.
    """
    journal = Journal.open_for_writing(run_dir)
    try:
        plan = recorded_plan(journal)
        starts = sum(entry.kind == "start" for entry in journal.entries())
        journal.record(f"start/{starts + 1}", {"versions": versions()})
        rounds = Rounds(transport, journal, identity, roster, plan)
        Campaign(plan, journal, Stages(run_dir.name, plan, journal, rounds)).run()
    finally:
        journal.close()


def versions() -> dict[str, str]:
    """What this process runs."""
    return {"urna": urna.__version__, "python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def _ballot_json(ranking: ballot.Ranking | None) -> Json:
    if ranking is None:
        return {"opened": False, "standings": [], "contenders": [], "undecided": True}
    return {
        "opened": True,
        "standings": [asdict(one) for one in ranking.standings],
        "contenders": list(ranking.contenders),
        "undecided": ranking.undecided,
    }
