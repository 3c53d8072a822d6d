"""Where a run stands: a view of its journal, drawn live in a terminal or as plain lines."""

import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from urna.protocol.plan import Plan
from urna.server.journal import Entry, Journal, Json

REFRESH_SECONDS = 0.25
STAGES = ("hello", "shortlist", "ballot", "runoff", "final", "evaluation", "close")


@dataclass
class Progress:
    """What the journal says so far; feed it entries in order."""

    plan: Plan
    started_at: float
    stage: str = "starting"
    members: int = 0
    cohort: int = 0
    rounds_done: int = 0
    rounds_planned: int = 0
    index: str = ""
    epsilon: dict[str, float] = field(default_factory=lambda: {"tuning": 0.0, "heldout": 0.0})
    dropouts: int = 0
    lost: int = 0
    accuracy: str = ""
    finished: bool = False
    lines: list[str] = field(default_factory=list)
    _busy_seconds: float = 0.0

    def feed(self, entry: Entry) -> None:
        """Take one more entry; adds a line to ``lines`` when it is worth one."""
        value = entry.value
        match entry.kind:
            case "hello":
                self.stage, self.members = "hello", len(value["members"])
                self._say(f"hello: {self.members} sites joined" + _others(value["others"]))
            case "weights":
                self.stage = "hello"
                self._say(_delivery(value))
            case "waiting":
                self.stage, sites = "hello", value["sites"]
                self._say(f"hello: waiting for people at {', '.join(sites)} to approve" if sites else "hello: all have decided")
            case "shortlist":
                self.stage = "shortlist"
                kept = [one["name"] for one in value["candidates"] if not one["reasons"]]
                self._say(f"shortlist: {len(kept)} of {len(value['candidates'])} candidates: {', '.join(kept)}")
                self.rounds_planned = 2 + self.plan.final.num_rounds + self.plan.evaluation.num_curve_points
            case "tuning":
                for name, one in value["candidates"].items():
                    self._say(
                        f"preflight: {name} is trained by {one['engine']}" + "".join(f"; {why}" for why in one["fallbacks"])
                    )
            case "ballot":
                verdict = f"undecided among {', '.join(value['contenders'])}" if value["undecided"] else "decided"
                self._say(f"ballot: {verdict}" if value["opened"] else "ballot: lost")
            case "schedule":
                self.rounds_planned = (
                    2 + value["num_releases"] + self.plan.evaluation.num_curve_points + bool(value["finalists"])
                )
            case "decision":
                self._say(f"decision: {value['winner']} (by {value['by']})")
            case "counts":
                best = max(zip(value["accuracy"], value["accuracy_stderr"], value["candidates"], strict=True))
                self.accuracy = f"{best[0]:.1%} ± {best[1]:.1%}"
                self._say(f"evaluation {entry.key.removeprefix('counts/')}: {best[2]} {self.accuracy}")
            case "round":
                self._round(entry)
            case "statements":
                spent = max((one["epsilon"] for one in value.values()), default=0.0)
                self._say(
                    f"close: {len(value)} signed statements, epsilon at most {spent:.3f} of {self.plan.privacy.epsilon:g}"
                )
            case "finished":
                self.finished = True
                self.stage = "finished"

    def _round(self, entry: Entry) -> None:
        value = entry.value
        self.stage = value["stage"]
        self.rounds_done += 1
        self.cohort = len(value["cohort"])
        self.epsilon[value["partition"]] = max(self.epsilon[value["partition"]], value["epsilon"])
        self.dropouts += len(value["dropped"])
        self.lost += not value["opened"]
        self._busy_seconds += value["seconds"]
        if "index" in value:
            self.index = f"{value['candidate']} {value['index']}/{value['of']}"
        for site, why in value["dropped"].items():
            ended = f"the sum of {len(value['survivors'])} opened" if value["opened"] else "the round is lost"
            self._say(f"{entry.key.removeprefix('round/')}: {site} dropped out ({why}); {ended}, the campaign goes on")
        if not value["opened"] and not value["dropped"]:
            self._say(f"{entry.key.removeprefix('round/')}: too few sites unmasked; the round is lost, the campaign goes on")
        if value.get("index", 0) and (value["index"] % 10 == 0 or value["index"] == value["of"]):
            self._say(f"{self.stage} {self.index}: {len(value['survivors'])} sites, epsilon {value['epsilon']:.3f}")

    def _say(self, line: str) -> None:
        self.lines.append(line)

    @property
    def eta_seconds(self) -> float | None:
        """How long the planned rounds that are left take, at the pace so far."""
        if not self.rounds_done or self.finished:
            return None
        return (self.rounds_planned - self.rounds_done) * self._busy_seconds / self.rounds_done

    def render(self) -> RenderableType:
        """The live view."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        grid.add_column()
        steps = Text()
        for stage in STAGES:
            steps.append(f"{stage} ", style="bold green" if stage == self.stage else "dim")
        grid.add_row("stage", steps if self.stage != "starting" else Text("starting the engine ...", style="bold"))
        total = max(self.rounds_planned, self.rounds_done, 1)
        eta = "" if self.eta_seconds is None else f"  about {max(0, self.eta_seconds):.0f} s left"
        grid.add_row("rounds", Group(ProgressBar(total=total, completed=self.rounds_done, width=40)))
        grid.add_row("", f"{self.rounds_done} of {total}  {self.index}{eta}")
        grid.add_row("sites", f"{self.cohort or self.members} of {self.members} asked, {self.dropouts} dropouts")
        limit = self.plan.privacy.epsilon
        spent = f"{self.epsilon['tuning']:.3f} training, {self.epsilon['heldout']:.3f} held-out, of {limit:g}"
        grid.add_row("epsilon", spent)
        if self.accuracy:
            grid.add_row("accuracy", f"{self.accuracy} on held-out records")
        grid.add_row("elapsed", f"{time.time() - self.started_at:.0f} s")
        return grid


def watch(run_dir: Path, plan: Plan, process: "subprocess.Popen[bytes]", console: Console) -> None:
    """Show a run until its process ends: live in a terminal, else one line for what matters."""
    started = time.time()
    progress = Progress(plan, started)
    journal = Journal.read(run_dir)
    seen = said = 0

    def take() -> None:
        nonlocal seen
        for entry in journal.entries(after=seen):
            progress.feed(entry)
            seen = entry.seq

    def say() -> None:
        nonlocal said
        for line in progress.lines[said:]:
            console.print(Text(f"{time.time() - started:6.1f} s  {line}"), soft_wrap=True)
        said = len(progress.lines)

    if not console.is_terminal:
        console.print("  starting the engine ...")
    live = Live(progress.render(), console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    with live or nullcontext():
        while process.poll() is None:
            take()
            say()
            if live is not None:
                live.update(progress.render())
            time.sleep(REFRESH_SECONDS)
        take()
        say()
    journal.close()


def describe(entries: Sequence[Entry], plan: Plan) -> Progress:
    """The state of a run from all its entries."""
    progress = Progress(plan, entries[0].at if entries else time.time())
    for entry in entries:
        progress.feed(entry)
    return progress


def _delivery(value: Json) -> str:
    size = f"{value['bytes'] / 1e6:.1f} MB"
    if "delivered" not in value:
        return f"hello: sending {value['candidate']} ({size}) to {', '.join(value['sites'])}, which have it not installed"
    got = f"hello: {value['candidate']} is installed at {', '.join(value['delivered'])}" if value["delivered"] else ""
    lost = "; ".join(f"{site} did not get {value['candidate']} ({why})" for site, why in sorted(value["failed"].items()))
    return "; ".join(part for part in (got, lost) if part)


def _others(others: dict[str, str]) -> str:
    return "".join(f"; {site} {why}" for site, why in sorted(others.items()))
