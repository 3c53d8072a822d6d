"""``[compute]`` in site.toml: what a site computes with; nothing of it changes what a release means."""

from typing import Annotated, Literal

from pydantic import Field

from urna.protocol.plan import Section


class Compute(Section):
    """Device, micro-batches and precision of models that are fine-tuned here."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a CUDA device where there is one
    micro_batch: Annotated[int, Field(ge=1, le=1_000_000)] | None = None  # examples at once, at most; None: as memory allows
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; gradients and noise are float32 always
