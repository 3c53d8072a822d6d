"""The report as people read it: report.html, complete in one file, and its sentences.

Covered: every text is escaped; the page needs no network and no script.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from urna.server import figures
from urna.server.report import Report
from urna.server.report_reading import read_report

if TYPE_CHECKING:
    from markupsafe import Markup

JSON_FILE, HTML_FILE, TEMPLATE_FILE = "report.json", "report.html", "report.html.j2"
MAX_MATRIX_CLASSES = 16  # a larger confusion matrix is in report.json only
MAX_LISTED = 40  # sites or lost replies; report.json has all


def write_report(run_dir: Path) -> Path:
    """Write report.json and report.html into a run's folder, each replaced in one step.

    Returns:
        The page.

    Raises:
        RunError: there is no journal, or it holds no plan.
    """
    report = read_report(run_dir)
    write_atomically(run_dir / JSON_FILE, report.model_dump_json(indent=2).encode() + b"\n")
    write_atomically(run_dir / HTML_FILE, render(report).encode())
    return run_dir / HTML_FILE


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a reader sees the old bytes or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(name).chmod(0o644)
    Path(name).replace(path)


def render(report: Report) -> str:
    """The page, complete in one file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": _duration, "small": _small}
    page: str = environment.get_template(TEMPLATE_FILE).render(
        report=report,
        headline=headline(report),
        decision=decision_in_words(report),
        preparation=preparation_in_words(report),
        figures=_figures(report),
        plan_lines=list(_flat(report.plan)),
        show_matrix=report.confusion is not None and len(report.confusion.cells) <= MAX_MATRIX_CLASSES,
        max_listed=MAX_LISTED,
    )
    return page


def headline(report: Report) -> str:
    """The answer to the operator's question, in one sentence."""
    if not report.finished:
        return f"Not finished: {report.state}."
    spent = report.epsilon_spent.max
    cost = f"epsilon {spent:.2f} of {report.epsilon_planned:.2f}" if spent is not None else "an epsilon that no site confirmed"
    if report.accuracy is None or report.accuracy_stderr is None:
        return f"Fine-tune {report.winner}; how good it is is not known, for the final counts were lost, at {cost}."
    return (
        f"Fine-tune {report.winner}: {_percent(report.accuracy)} % ± {_percent(report.accuracy_stderr)} "
        f"on held-out records nobody pooled, at {cost}."
    )


def decision_in_words(report: Report) -> list[str]:
    """How the winner was chosen, a sentence each."""
    kept = [one for one in report.ranking if one.shortlisted]
    words = [f"{len(kept)} of {len(report.ranking)} candidates passed the public shortlist."] if report.ranking else []
    voted = [one for one in report.ranking if one.rank is not None]
    contenders = [one.name for one in voted if one.contender]
    if len(contenders) > 1:
        words.append(f"The ballot was undecided: its noise cannot tell {_listed(contenders)} apart.")
    elif contenders:
        words.append(f"The ballot was decided: {contenders[0]} is clear of all others by more than two standard errors.")
    if report.runoff:
        results = [f"{one.name} {_percent(one.accuracy)} % ± {_percent(one.stderr)}" for one in report.runoff]
        words.append(
            f"A runoff trained the leaders a few rounds each and compared them on held-out records: {_listed(results)}."
        )
    words += _verdict(report)
    return words or ["Nothing is decided yet."]


def preparation_in_words(report: Report) -> list[str]:
    """How the winner was made ready for training, a sentence each: mode, numbers, engine, repairs, fallbacks."""
    found = report.preparation
    if found is None:
        return []
    share = f"{found.share_trained:.1%} of what the mode trains"
    whose = "by the operator's preflight. Each site chose its own in the same order, and says it in its log."
    return [
        f"{report.winner}, mode {found.mode}: {found.numbers:,} numbers were trained, {share}.",
        f"Engine of per-example gradients: {found.engine}, {whose}",
        *(_sentence(f"Repair: {note}") for note in found.notes),
        *(_sentence(f"Fallback: {why}") for why in found.fallbacks),
    ]


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _verdict(report: Report) -> list[str]:
    if report.winner is None or report.decided_by is None:
        return []
    by = {
        "ballot": "The ballot decided for {}.",
        "runoff": "It decided for {}.",
        "prior": "The operator's order of candidates, written before anything was asked, decided for {}.",
        "only candidate": "{} was the only candidate left, so nothing was voted on.",
    }.get(report.decided_by, f"{{}} was taken: {report.decided_by}.")
    words = [by.format(report.winner)]
    if report.decided_by == "runoff" and len(report.runoff) > 1:
        first, second = sorted(report.runoff, key=lambda one: -one.accuracy)[:2]
        apart = (first.accuracy - second.accuracy) / max(math.hypot(first.stderr, second.stderr), 1e-9)
        if apart < 2:
            words.append(f"The best two are only {apart:.1f} standard errors apart: {second.name} may be as good.")
    return words


def _figures(report: Report) -> dict[str, "Markup"]:
    drawn = {}
    if marks := [
        figures.Mark(one.name, one.score, one.stderr, one.contender, winner=one.name == report.winner)
        for one in report.ranking
        if one.score is not None and one.stderr is not None
    ]:
        drawn["ranking"] = figures.ranking(marks)
    if len(curve := report.learning_curve) > 1:
        rounds, accuracy, stderr = zip(*((point.round, point.accuracy, point.stderr) for point in curve), strict=True)
        drawn["curve"] = figures.learning_curve(rounds, accuracy, stderr)
    if len(report.rounds) > 1:
        drawn["spending"] = figures.spending([(one.partition, one.epsilon) for one in report.rounds], report.epsilon_planned)
    return drawn


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _small(value: float) -> str:
    """0.00001 -> 1e-05, 2.99865 -> 2.999."""
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The plan as lines of dotted keys; what is not set is left out."""
    lines: list[tuple[str, str]] = []
    for key, one in value.items():
        if isinstance(one, dict):
            lines += _flat(one, f"{prefix}{key}.")
        elif key == "candidates":
            lines.append((f"{prefix}{key}", ", ".join(str(entry["name"]) for entry in one)))
        elif one is not None:
            lines.append((f"{prefix}{key}", ", ".join(map(str, one)) if isinstance(one, list) else str(one)))
    return lines
