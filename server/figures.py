"""The report's figures: numbers in, the text of an svg element out; in the colours and fonts of the page around it."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from urna.protocol.messages import Partition

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.8  # texts of 9 points are then readable on a telephone too
LABEL_LENGTH = 24  # letters of a name
# Matplotlib knows no CSS: it draws in these colours, and `_svg` writes the page's variables in their place.
INK, MUTED, RULE, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", ACCENT: "--accent", SECOND: "--second"}
LINES: tuple[tuple[Partition, str, str], ...] = (
    ("tuning", ACCENT, "records that train"),
    ("heldout", SECOND, "held-out records"),
)


@dataclass(frozen=True)
class Mark:
    """A candidate in the figure of the ranking; ``score`` and ``stderr`` are shares, not percent."""

    name: str
    score: float
    stderr: float
    contender: bool
    winner: bool


def ranking(marks: Sequence[Mark]) -> "Markup":
    """Ballot scores with one standard error each way, the first on top."""
    figure, axes = _axes(0.34 * len(marks) + 0.75)
    for at, one in enumerate(marks):
        color = ACCENT if one.winner else INK if one.contender else MUTED
        filled = color if one.contender else "none"
        score, stderr = 100 * one.score, 100 * one.stderr
        axes.errorbar(score, at, xerr=stderr, fmt="o", color=color, markerfacecolor=filled, markersize=6, linewidth=1.6)
    axes.axvline(0, color=RULE, linewidth=1, zorder=0)
    axes.set_ylim(len(marks) - 0.5, -0.5)
    axes.set_yticks(range(len(marks)), [_short(one.name) for one in marks], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ballot score: points of 1-NN accuracy above the mean of all candidates")
    return _svg(figure, "ranking", "Ranking: " + ", ".join(f"{one.name} {100 * one.score:+.1f}" for one in marks))


def learning_curve(rounds: Sequence[int], accuracy: Sequence[float], stderr: Sequence[float]) -> "Markup":
    """Accuracy after a round, with a band of one standard error; both are shares, not percent."""
    figure, axes = _axes(2.6)
    percent, band = 100 * np.array(accuracy), 100 * np.array(stderr)
    axes.fill_between(rounds, percent - band, percent + band, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(rounds, percent, "o-", color=ACCENT, markersize=5, linewidth=1.6)
    axes.yaxis.grid(visible=True, color=RULE, linewidth=0.8)
    axes.set_xlabel("round of training")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))  # noise can carry a point above 100, never an accuracy
    title = "Learning curve: " + ", ".join(f"round {at} {value:.1f} %" for at, value in zip(rounds, percent, strict=True))
    return _svg(figure, "curve", title)


def spending(rounds: Sequence[tuple[str, float]], planned: float) -> "Markup":
    """Epsilon over all rounds: of each, its partition and what the partition's records have spent with it."""
    figure, axes = _axes(2.6)
    for partition, color, name in LINES:
        points = [(at, epsilon) for at, (of, epsilon) in enumerate(rounds, start=1) if of == partition]
        if points:
            at, epsilon = zip((0, 0.0), *points, (len(rounds), points[-1][1]), strict=True)
            axes.step(at, epsilon, where="post", color=color, linewidth=1.8, label=name)
    axes.axhline(planned, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=f"planned, {planned:g}")
    style = {"frameon": False, "labelcolor": "linecolor", "fontsize": 9, "handlelength": 1.6, "ncols": 3}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), **style)
    axes.set_ylim(0, 1.05 * max(planned, *(epsilon for _, epsilon in rounds)))
    axes.set_xlim(0, len(rounds) + 0.5)
    axes.yaxis.grid(visible=True, color=RULE, linewidth=0.8)
    axes.set_xlabel("rounds asked")
    axes.set_ylabel("epsilon spent")
    return _svg(figure, "spending", f"Epsilon spent over {len(rounds)} rounds, planned {planned:g}")


def _short(name: str) -> str:
    """As a figure has room for it."""
    return name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"


def _axes(height_inches: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(color=RULE, labelcolor=MUTED, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(MUTED)
        axis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: "Figure", name: str, title: str) -> "Markup":
    """The figure as an element of the page, in its colours and fonts; the same figure gives the same text."""
    import matplotlib as mpl
    from markupsafe import Markup, escape

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # one page, several figures
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    text = text.replace("<svg", head, 1).replace(">", f'><title id="{name}-title">{escape(title)}</title>', 1)
    return Markup(text)
