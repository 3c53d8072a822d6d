"""Which engine computes a model's clipped sums; `parts` says how many examples it gets at once.

mode   tried in this order, the first that passes `preflight` is taken
full   book-keeping, hooks, vmap, loop
lora   hooks, book-keeping, vmap, loop
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from urna.models.engine_types import Engine, Precision
from urna.models.preflight import COMPANY_SLACK, PreflightReport, check, company_share
from urna.models.row_engines import Hooks, Loop, Vmap, out_of_memory
from urna.models.tunable import Batch, Tunable
from urna.protocol.errors import ModelError

Tuning = Literal["lora", "full"]

ORDER: dict[Tuning, tuple[str, ...]] = {
    "full": ("book-keeping", "hooks", "vmap", "loop"),
    "lora": ("hooks", "book-keeping", "vmap", "loop"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chosen:
    """An engine that computes this model's per-example gradients, as far as the preflight can see.

    Args:
        engine: Open; close it when the model is not trained any more.
        report: What its preflight measured.
        fallbacks: Why those that would have been tried before it were not taken, one sentence each; and why not the precision.
        precision: What the module is to compute in: what was asked for, or float32.
    """

    engine: Engine
    report: PreflightReport
    fallbacks: tuple[str, ...]
    precision: Precision = "float32"


def choose(tunable: Tunable, batch: Batch, tuning: Tuning, precision: Precision = "float32") -> Chosen:
    """Take the first engine of the mode's order that passes the preflight.

    Args:
        tunable: What is to be trained.
        batch: Public or synthetic; its size should be no other dimension of the model.
        tuning: The mode.
        precision: What the module is to compute in.

    Raises:
        ModelError: none passes, so this model cannot be trained privately in this mode; the message has each reason.
    """
    reasons: list[str] = []
    for place, name in enumerate(ORDER[tuning]):
        engine: Engine | None = None
        try:
            engine = _MAKERS[name](tunable)
            report = check(engine, tunable, batch)
            refused = _refusal(engine, tunable, batch, precision)
            if refused is None:
                return Chosen(engine, report, tuple(reasons), precision)
            if precision != "float32" and (worse := _refusal(engine, tunable, batch, "float32")) is None:
                log.warning("%s", refused)
                return Chosen(engine, report, (*reasons, refused), "float32")
            raise ModelError(refused if precision == "float32" else str(worse))
        except (ModelError, RuntimeError) as error:
            if engine is not None:
                engine.close()
            if not isinstance(error, ModelError) and not out_of_memory(error):
                raise
            rest = ORDER[tuning][place + 1 :]
            reasons.append(f"{name} cannot serve this model: {error}")
            if rest:
                log.warning("%s cannot serve this model, %s is tried instead: %s", name, rest[0], error)
        except BaseException:
            if engine is not None:
                engine.close()
            raise
    raise ModelError("expected an engine that computes each example's gradient, found none:\n  " + "\n  ".join(reasons))


def _refusal(engine: Engine, tunable: Tunable, batch: Batch, precision: Precision) -> str | None:
    """Why this precision must not be used; None where no example moves with its companions."""
    try:
        share = company_share(engine, tunable, batch, precision)
    except ModelError as error:
        return f"{precision} cannot serve this model: {error}"
    if share <= COMPANY_SLACK[precision]:
        return None
    return (
        f"{precision} cannot serve this model: an example's contribution must move by at most {COMPANY_SLACK[precision]:g} "
        f"of its clip when its companions are others, found {share:.2g}"
    )


def _book_keeping(tunable: Tunable) -> Engine:
    from urna.models.book_keeping import BookKeeping

    return BookKeeping(tunable)


_MAKERS: dict[str, Callable[[Tunable], Engine]] = {"book-keeping": _book_keeping, "hooks": Hooks, "vmap": Vmap, "loop": Loop}
