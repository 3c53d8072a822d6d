"""Decoded sum -> next global vector: the server's optimiser, pure.

With ``noise = "shared"`` the sum is one noisy gradient sum, divided by the plan's expected batch B. With ``"local"`` it is
already the weighted mean of the sites' changes, applied as a step of FedOpt (Reddi et al. 2021) with the negative change as
gradient.
"""

from dataclasses import dataclass

import numpy as np

from urna.privacy.mechanisms import Floats
from urna.protocol.plan import Final

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8  # Kingma, Ba 2015


@dataclass(frozen=True)
class OptimizerState:
    """A global vector (p,) and the optimiser's moments; ``step`` counts the updates taken."""

    vector: Floats
    first: Floats
    second: Floats
    step: int = 0

    @staticmethod
    def start(size: int) -> "OptimizerState":
        """Zero everything: a head that favours no class."""
        return OptimizerState(np.zeros(size), np.zeros(size), np.zeros(size))


def apply(state: OptimizerState, gradient: Floats, final: Final) -> OptimizerState:
    """One update with a noisy mean gradient (p,).

    Raises:
        ValueError: a number is not finite.
    """
    if not np.isfinite(gradient).all():
        raise ValueError("expected a finite gradient, found NaN or infinity")
    step = state.step + 1
    if final.optimizer == "sgd":
        return OptimizerState(state.vector - final.learning_rate * gradient, state.first, state.second, step)
    first = ADAM_BETA1 * state.first + (1 - ADAM_BETA1) * gradient
    second = ADAM_BETA2 * state.second + (1 - ADAM_BETA2) * gradient**2
    mean, variance = first / (1 - ADAM_BETA1**step), second / (1 - ADAM_BETA2**step)
    vector = state.vector - final.learning_rate * mean / (np.sqrt(variance) + ADAM_EPSILON)
    return OptimizerState(vector, first, second, step)
