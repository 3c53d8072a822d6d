"""Opened sum -> next global vector, by Flower's own strategies: each is handed one synthetic reply, the mean.

With ``noise = "shared"`` the sum is one noisy gradient sum, divided by the plan's expected batch B. With ``"local"`` it is
already the weighted mean of the sites' changes, applied as a step of FedOpt (Reddi et al. 2021) with the negative change as
gradient. Nothing of the optimisers is written here: FedAvgM (SGD, momentum), FedAdam, FedYogi, FedAdagrad of Flower.

Robust rules compare single updates, so they exist for plans without a secure sum only (`combine`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from urna.privacy.mechanisms import Floats
from urna.protocol.plan import Final

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.serverapp.strategy import FedAvg

BETA1, BETA2, TAU = 0.9, 0.999, 1e-8  # Kingma, Ba 2015, for the adaptive optimisers
MOMENTUM = 0.9
KEY = "vector"


@dataclass(frozen=True)
class OptimizerState:
    """A global vector (p,) and the optimiser's moments; ``step`` counts the updates taken."""

    vector: Floats
    first: Floats
    second: Floats
    step: int = 0

    @staticmethod
    def start(size: int) -> "OptimizerState":
        """Zero everything: the pretrained weights, and a head that favours no class."""
        return OptimizerState(np.zeros(size), np.zeros(size), np.zeros(size))


def apply(state: OptimizerState, gradient: Floats, final: Final, rate_factor: float = 1.0) -> OptimizerState:
    """One update with a noisy mean gradient (p,), at ``rate_factor`` times the plan's learning rate.

    Raises:
        ValueError: a number is not finite.
    """
    from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

    if not np.isfinite(gradient).all():
        raise ValueError("expected a finite gradient, found NaN or infinity")
    rate = final.learning_rate * rate_factor
    if final.optimizer in ("sgd", "momentum"):
        plain = FedAvgM(server_learning_rate=rate, server_momentum=MOMENTUM if final.optimizer == "momentum" else 0.0)
        plain.server_opt = True  # also with a learning rate of 1, which Flower takes for "off"
        plain.current_arrays = _arrays(state.vector)
        plain.momentum_vector = [state.first.copy()]
        vector = _aggregated(plain, [state.vector - gradient], state.step)
        return OptimizerState(vector, plain.momentum_vector[0], state.second, state.step + 1)
    adaptive = {
        "adam": FedAdam(eta=rate, beta_1=BETA1, beta_2=BETA2, tau=TAU),
        "yogi": FedYogi(eta=rate, beta_1=BETA1, beta_2=BETA2, tau=TAU),
        "adagrad": FedAdagrad(eta=rate, tau=TAU),
    }[final.optimizer]
    adaptive.current_arrays = {KEY: state.vector}
    adaptive.m_t, adaptive.v_t = {KEY: state.first}, {KEY: state.second}
    vector = _aggregated(adaptive, [state.vector - gradient], state.step)  # its bias correction counts from round 0
    return OptimizerState(vector, adaptive.m_t[KEY], adaptive.v_t[KEY], state.step + 1)


def combine(changes: Mapping[str, Floats], final: Final) -> Floats:
    """One change from the sites' single ones, each (p,), by the plan's robust rule.

    Raises:
        ValueError: fewer sites than `Final.min_robust_sites`.
    """
    from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum

    count, bad = len(changes), final.num_malicious_sites
    if count < final.min_robust_sites:
        raise ValueError(f"expected at least {final.min_robust_sites} sites for {final.aggregation!r}, found {count}")
    rules: dict[str, Callable[[], FedAvg]] = {
        "median": FedMedian,
        "trimmed_mean": lambda: FedTrimmedAvg(beta=bad / count + 1e-9),  # of each end, rounded down by Flower
        "krum": lambda: Krum(num_malicious_nodes=bad),
        "bulyan": lambda: Bulyan(num_malicious_nodes=bad),
    }
    return _aggregated(rules[final.aggregation](), list(changes.values()), 0)


def _aggregated(strategy: "FedAvg", vectors: Sequence[Floats], server_round: int) -> Floats:
    """What a strategy makes of replies that hold one vector each, of equal weight."""
    flower_log = logging.getLogger("flwr")
    level = flower_log.level
    flower_log.setLevel(logging.WARNING)  # it announces every single aggregation
    try:
        arrays, _ = strategy.aggregate_train(server_round, [_reply(vector, strategy.weighted_by_key) for vector in vectors])
    finally:
        flower_log.setLevel(level)
    assert arrays is not None  # there was a reply
    return np.asarray(arrays[KEY].numpy(), dtype=np.float64)


def _reply(vector: Floats, weighted_by_key: str) -> "Message":
    """A message as a strategy gets it; its own constructor needs a running ServerApp, which this is not."""
    from flwr.app import MetricRecord, RecordDict
    from flwr.app.message.message import make_message
    from flwr.app.metadata import Metadata

    content = RecordDict({"arrays": _arrays(vector), "metrics": MetricRecord({weighted_by_key: 1})})
    run, site, server, asked, group, at, ttl = 1, 1, 1, "", "", 0.0, 1.0
    metadata = Metadata(run, "", site, server, asked, group, at, ttl, message_type="train")
    return make_message(metadata=metadata, content=content)


def _arrays(vector: Floats) -> "ArrayRecord":
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({KEY: Array(np.asarray(vector))})
