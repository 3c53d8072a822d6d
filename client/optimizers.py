"""The optimiser of a site's local steps: what becomes of a noisy mean gradient.

Covered:
    * post-processing: a step reads the plan's public numbers, the global vector and noisy gradients, never a record;
    * moments are of one round: they start at zero with every request, so that a site keeps nothing between rounds that was
      made from its records, and a request that is computed again after a crash starts where it started before.
Not covered:
    * moments across rounds: whoever wants them takes `final.optimizer`, which the server applies to the opened mean.
"""

import numpy as np
import torch

from urna.privacy.mechanisms import Floats
from urna.protocol.plan import Final

MOMENTUM = 0.9
BETAS, TAU = (0.9, 0.999), 1e-8  # Kingma, Ba 2015


class LocalOptimizer:
    """Takes the steps of one round, in float64.

    Args:
        vector: (p,) the global offset; it is copied. Decoupled weight decay (Loshchilov, Hutter 2019) shrinks the offset, so it
            pulls to the pretrained weights and an all-zero head.
        final: the plan's.
    """

    def __init__(self, vector: Floats, final: Final) -> None:
        self._rate = final.local_learning_rate
        self._vector = torch.nn.Parameter(torch.from_numpy(vector.astype(np.float64)))
        self._optimizer = _optimizer(self._vector, final)

    @property
    def vector(self) -> Floats:
        """Where the steps so far have led, (p,)."""
        return np.asarray(self._vector.detach().numpy(), dtype=np.float64)

    def step(self, gradient: Floats, rate_factor: float) -> None:
        """Take one step with a noisy mean gradient (p,), at ``rate_factor`` times the plan's rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * rate_factor
        self._vector.grad = torch.from_numpy(gradient)
        self._optimizer.step()


def _optimizer(vector: torch.nn.Parameter, final: Final) -> torch.optim.Optimizer:
    rate = final.local_learning_rate
    match final.local_optimizer:
        case "adam":
            return torch.optim.Adam([vector], lr=rate, betas=BETAS, eps=TAU)
        case "adamw":
            return torch.optim.AdamW([vector], lr=rate, betas=BETAS, eps=TAU, weight_decay=final.local_weight_decay)
        case "momentum":
            return torch.optim.SGD([vector], lr=rate, momentum=MOMENTUM)
    return torch.optim.SGD([vector], lr=rate)
