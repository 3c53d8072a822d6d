"""A candidate computes before it may be used: with inputs that are no one's, of the largest and the smallest size it reads.

A model that is loaded and then fails would cost its site the epsilon of the release it failed in.
"""

from collections.abc import Iterator

import numpy as np
import torch

from urna.models.loading import Backbone
from urna.models.pictures import PictureAdapter
from urna.models.text import MASK, TOKENS, TextAdapter
from urna.models.tunable import Batch
from urna.protocol.errors import ModelError

_UNFIT = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, MemoryError)


def try_out(backbone: Backbone) -> None:
    """Compute features of a few inputs.

    Raises:
        ModelError: it fails, or gives features that are not finite or of another length.
    """
    name = backbone.spec.name
    for batch in _batches(backbone):
        try:
            with torch.no_grad():
                features = backbone.module(**batch)
        except _UNFIT as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{name!r} must give features, found {reason!r}: is max_tokens or the size too large?") from None
        wanted = (len(next(iter(batch.values()))), backbone.spec.feature_dim)
        if features.shape != wanted or not bool(torch.isfinite(features).all()):
            raise ModelError(
                f"features of {name!r} must be finite {wanted}, found {tuple(features.shape)}: "
                "the weights overflow in float32, or are another model's"
            )


def _batches(backbone: Backbone) -> Iterator[Batch]:
    yield backbone.synthetic(2, seed=0)
    adapter = backbone.adapter
    if isinstance(adapter, PictureAdapter):
        yield backbone.batch(np.linspace(0.0, 1.0, 2 * 8 * 8).reshape(2, 8, 8))
    elif isinstance(adapter, TextAdapter):
        yield adapter.batch(["a"], length=1)
        yield _longest_and_shortest(adapter)


def _longest_and_shortest(adapter: TextAdapter) -> Batch:
    """A text of max_tokens, none of them padding (which some models give no position), and one of a single token."""
    length, pad = adapter.settings.max_tokens, adapter.settings.pad_id
    ids = torch.arange(length) % max(adapter.vocab_size - 1, 1)
    ids += (ids >= pad) & (adapter.vocab_size > 1)
    real = torch.arange(length) < torch.tensor([[length], [1]])
    return {TOKENS: torch.where(real, ids, pad), MASK: real.long()}
