"""`SecureSum`: a Flower strategy that sees nothing but the weighted mean of all sites.

    strategy = SecureSum(FedAdam(), operator_key="operator.key", roster="roster.json")
    result = strategy.start(grid, initial_arrays, num_rounds=10)

The sites' ClientApps have `urna.client.secure_sum_mod`. The wrapped strategy runs unchanged, with one reply a batch: the mean.

Covered:
    * strategies that are functions of the weighted mean give the same result as with the plain replies, to grid precision;
    * others are refused here, with the reason, rather than run on a reply that means something else to them.
Not covered:
    * see `mean_rounds`; and differential privacy: the mean itself is opened exactly, round after round.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from urna.privacy.fixed_point import grid_for
from urna.privacy.ring import RING_BITS
from urna.protocol.averaging import RingBits
from urna.protocol.identity import OPERATOR, load_identity, load_roster
from urna.protocol.quorum import quorum
from urna.strategies.mean_rounds import Terms
from urna.strategies.secure_grid import SecureGrid

ALLOWED: tuple[type[FedAvg], ...] = (FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi, FedProx)
AGGREGATION = ("aggregate", "_check_and_log_replies")  # beginnings of methods' names
REASONS = {  # of Flower's strategies, by class name
    **dict.fromkeys(("FedMedian", "FedTrimmedAvg"), "it takes the median or a trimmed mean of the single updates"),
    **dict.fromkeys(("Krum", "MultiKrum", "Bulyan"), "it compares the single updates with one another"),
    "QFedAvg": "it weights each single update by that site's own loss",
    **dict.fromkeys(("FedXgbBagging", "FedXgbCyclic"), "it collects each site's trees; trees have no mean"),
    **dict.fromkeys(
        ("DifferentialPrivacyServerSideFixedClipping", "DifferentialPrivacyServerSideAdaptiveClipping"),
        "it clips each single update at the server; clip and add noise at the sites",
    ),
    **dict.fromkeys(
        ("DifferentialPrivacyClientSideFixedClipping", "DifferentialPrivacyClientSideAdaptiveClipping"),
        "it sets its noise by the number of replies, and there is one; add noise at the sites",
    ),
}


class SecureSum(Strategy):
    """Runs a Flower strategy on secure sums.

    Args:
        strategy: FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi or FedProx of Flower, or a subclass that configures only.
        operator_key: file of the operator's private key.
        roster: file of the pinned public keys.
        min_sites: no sum over fewer is opened. The sites have a minimum of their own (3 unless they say otherwise).
        num_colluding: how many sites that work together with the server the masks bear.
        ring_bits: 32; 24 or 16 send fewer bytes and are coarser.
        max_abs: the largest change of a float in one round.
        max_abs_integers: of an integer (batch counters and the like).
        max_weight: the largest weight (number of examples) of one site; a site with more refuses.
        train_metrics: what the app's training reply holds beside the weight; averaged, exact to 2**-20.
        evaluate_metrics: the same of its evaluation reply.
        setup_timeout_seconds: how long to wait for ``min_sites``.
        unmask_timeout_seconds: how long to wait for enough answers, once the uploads are there.

    Raises:
        ValueError: a strategy that is no function of the weighted mean, or numbers that do not go together.
        SiteConfigError: a key file is missing or malformed.
    """

    def __init__(
        self,
        strategy: FedAvg,
        *,
        operator_key: str | Path,
        roster: str | Path,
        min_sites: int = 3,
        num_colluding: int = 1,
        ring_bits: RingBits = 32,
        max_abs: float = 8.0,
        max_abs_integers: float = 4096.0,
        max_weight: int = 100_000,
        train_metrics: tuple[str, ...] = ("train_loss",),
        evaluate_metrics: tuple[str, ...] = ("eval_loss", "eval_acc"),
        setup_timeout_seconds: float = 120.0,
        unmask_timeout_seconds: float = 300.0,
    ) -> None:
        check_strategy(strategy)
        check_sampling(strategy, min_sites)
        quorum(min_sites, num_colluding, min_sites)
        if ring_bits not in RING_BITS:
            raise ValueError(f"ring_bits must be 16, 24 or 32, found {ring_bits}")
        if min(max_abs, max_abs_integers, max_weight) <= 0:
            raise ValueError(f"max_abs, max_abs_integers and max_weight must be positive, found {max_abs}, {max_weight}")
        if max_weight > 10**12 or num_colluding > 80:
            raise ValueError(f"max_weight is at most 10**12, num_colluding at most 80, found {max_weight}, {num_colluding}")
        for name, largest in (("max_abs", max_abs), ("max_abs_integers", max_abs_integers)):
            try:
                grid_for(max_weight * largest * min_sites, min_sites, ring_bits)
            except ValueError as error:
                raise ValueError(f"{name} = {largest:g} and max_weight = {max_weight} fit no ring: {error}") from None
        if strategy.weighted_by_key in (*train_metrics, *evaluate_metrics):
            raise ValueError(f"{strategy.weighted_by_key!r} is the weight: leave it out of the metrics")
        self.strategy = strategy
        self._identity = load_identity(OPERATOR, Path(operator_key))
        self._roster = load_roster(Path(roster))
        if self._identity.public_key_hex != self._roster.operator:
            raise ValueError(f"{operator_key} is not the key that {roster} pins to the operator: no site would answer")
        self._terms = Terms(
            min_sites=min_sites,
            num_colluding=num_colluding,
            ring_bits=ring_bits,
            max_abs=max_abs,
            max_abs_integers=max_abs_integers,
            max_weight=max_weight,
            weight_key=strategy.weighted_by_key,
            train_metrics=tuple(train_metrics),
            evaluate_metrics=tuple(evaluate_metrics),
            setup_timeout_seconds=setup_timeout_seconds,
            unmask_timeout_seconds=unmask_timeout_seconds,
        )

    def secured(self, grid: Grid) -> SecureGrid:
        """The grid that the wrapped strategy gets; for strategies' methods called by hand."""
        greeting = "train" if self.strategy.fraction_train > 0 else "evaluate"
        return SecureGrid(grid, self._identity, self._roster, self._terms, greeting)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the wrapped strategy; arguments and result are Flower's.

        Raises:
            RoundError: too few sites.
        """
        return self.strategy.start(
            self.secured(grid), initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The wrapped strategy's."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The wrapped strategy's."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The wrapped strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The wrapped strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The wrapped strategy's."""
        self.strategy.summary()


def check_strategy(strategy: Strategy) -> None:
    """Whether a strategy's result depends on the replies by their weighted mean alone.

    Raises:
        ValueError: it does not, or nobody can say.
    """
    lineage = type(strategy).__mro__
    name = type(strategy).__name__
    reason = next((REASONS[one.__name__] for one in lineage if one.__name__ in REASONS), None)
    if reason is not None:
        raise ValueError(f"{name} cannot run on a secure sum: {reason}")
    if not isinstance(strategy, ALLOWED):
        known = ", ".join(one.__name__ for one in ALLOWED)
        raise ValueError(
            f"{name} cannot run on a secure sum: it is not known to depend on the weighted mean alone, as {known} do"
        )
    own = lineage[: next(at for at, one in enumerate(lineage) if one in ALLOWED)]
    changed = sorted({key for space in (vars(strategy), *map(vars, own)) for key in space if key.startswith(AGGREGATION)})
    if changed:
        raise ValueError(
            f"{name} cannot run on a secure sum: it changes {', '.join(changed)}, which would see one reply, the mean"
        )
    if (strategy.train_metrics_aggr_fn, strategy.evaluate_metrics_aggr_fn) != (aggregate_metricrecords,) * 2:
        raise ValueError(f"{name} cannot run on a secure sum with its own function over single metrics: use the weighted mean")


def check_sampling(strategy: FedAvg, min_sites: int) -> None:
    """Whether every batch is large enough.

    Raises:
        ValueError: the strategy may sample fewer nodes than a sum is opened over.
    """
    for what, fraction, least in (
        ("train", strategy.fraction_train, strategy.min_train_nodes),
        ("evaluate", strategy.fraction_evaluate, strategy.min_evaluate_nodes),
    ):
        if 0 < fraction < 1 and least < min_sites:
            raise ValueError(f"expected min_{what}_nodes of at least {min_sites} when a fraction is sampled, found {least}")
