"""What the operator's command line says of candidates: a line each, a table of a check; and the public records that centre."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from urna.models.catalogue import CATALOGUE, CandidateSpec, known, spec
from urna.protocol.errors import BadInputError

if TYPE_CHECKING:
    from urna.models.loading import Backbone, Inputs
    from urna.models.preflight import PreflightReport

Tuning = Literal["head", "lora", "full"]


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check of one candidate in one mode found.

    Args:
        report: Of the preflight.
        share_trained: Of the weights that the mode would train, the part that is left.
        fallbacks: Why faster engines do not serve.
        notes: What was repaired or frozen.
    """

    report: "PreflightReport"
    share_trained: float = 1.0
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def candidate_lines() -> list[tuple[str, str]]:
    """Every candidate that this installation knows: facts and state in one line, what it is in another."""
    from urna.models.loading import artefact_sha256

    lines = []
    for name in known():
        try:
            facts = spec(name)
        except BadInputError as error:  # one damaged file hides no other candidate
            lines.append((f"{name:<13} cannot be read", str(error)))
            continue
        try:
            state = f"{'built' if name in CATALOGUE else 'installed'} {artefact_sha256(name)[:12]}"
        except BadInputError:
            state = "not built"
        lines.append((_facts(facts, state), f"{facts.summary} Pretrained on {facts.pretrained_on}."))
    return lines


def _facts(facts: CandidateSpec, state: str) -> str:
    size = f"{facts.num_parameters:,} parameters, {facts.feature_dim} features"
    return f"{facts.name:<13} {facts.family}, {facts.modality}, {size}, {facts.licence}, {state}"


def check_candidate(backbone: "Backbone", tuning: Tuning, num_classes: int, lora_rank: int, device: str) -> Checked:
    """Run the preflight of one tuning mode alone, on synthetic inputs.

    Raises:
        ModelError: this mode cannot train the candidate rightly; the message names what is wrong.
    """
    if tuning == "head":
        from urna.models.preflight import check_head

        return Checked(check_head(backbone.spec.feature_dim, num_classes, seed=0))
    from urna.models.prepared import prepare

    ready = prepare(backbone, num_classes, tuning, lora_rank=lora_rank, device=device)
    ready.engine.close()
    return Checked(ready.report, ready.tunable.share_trained, ready.fallbacks, ready.tunable.notes)


def check_table(report: "PreflightReport") -> Table:
    """A row for every trained parameter: how far its per-example norms are from a one-example loop's."""
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column("parameter", "all", overflow="fold")
    table.add_column("weights", f"{report.num_parameters:,}", justify="right")
    table.add_column("norm error", f"{report.worst_norm_error:.1e}", justify="right")
    for row in report.rows:
        table.add_row(row.name, f"{row.num_weights:,}", f"{row.error:.1e}")
    return table


def check_lines(checked: Checked) -> list[str]:
    """The rest of what was found, in words."""
    from urna.models.preflight import TOLERANCE

    report = checked.report
    errors = f"clipped sum error {report.clipped_sum_error:.1e}, tolerance {TOLERANCE:g}"
    share = f"{checked.share_trained:.1%} of the mode's weights are trained"
    summary = f"engine {report.engine}, {report.num_examples} synthetic examples, {errors}; {share}"
    return [summary, *(f"not chosen: {one}" for one in checked.fallbacks), *(f"note: {one}" for one in checked.notes)]


def public_records(path: Path, modality: str) -> "Inputs":
    """Read public records to centre features on, as `urna predict` reads records to label.

    Raises:
        BadInputError: there is no such file, it is not as described, or no records of this modality are read yet.
    """
    from urna.server.inputs import read_images, read_texts

    if modality not in ("image", "text"):
        raise BadInputError(f"no records of {modality} are read yet, found {path}: leave --centre-on away")
    return read_texts(path) if modality == "text" else read_images(path, any_shape=True)
