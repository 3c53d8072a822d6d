"""What a secure round costs beside a plain one: Flower's FedAvg on its simulation engine, with and without `SecureSum`.

    ratio           median over pairs of (secure round / plain round), the two asked one after the other, order alternating
    plain_seconds, secure_seconds   medians of a round: train and evaluate, all sites
    overhead_seconds                median over pairs of (secure round - plain round)

A round trains a perceptron of about a million parameters at every site by a fixed number of SGD steps (``work``), or not at all
(``idle``: what is left is engine and protocol), and evaluates it. Same engine, workers, model and batches for both; keys
are exchanged before the clock starts, once a run. One thread a site; as many sites at a time as there are cores.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Flower and torch are imported late
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from torch import nn

NUM_SITES = 5
NUM_PAIRS = {"work": 7, "idle": 15}
NUM_STEPS = {"work": 400, "idle": 0}  # 400: about 2 seconds of one core
WIDTH, BATCH = 512, 64  # two layers of 512 x 1024: d = 1,050,112
METRICS = ("train_loss",)


def measure(options: argparse.Namespace) -> dict[str, object]:  # noqa: ARG001 - every benchmark takes them
    """Time pairs of rounds; see the module's docstring."""
    os.environ.update(
        {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    )
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from urna.protocol.identity import create_consortium

    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        create_consortium(Path(folder), [f"site-{number + 1}" for number in range(NUM_SITES)])
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
            found.update({task: _timed(grid, Path(folder), NUM_STEPS[task], NUM_PAIRS[task]) for task in NUM_STEPS})

        backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}}
        run_simulation(server, _client(Path(folder)), num_supernodes=NUM_SITES, backend_config=backend)  # type: ignore[arg-type]
    model = {"parameters": 2 * WIDTH * 2 * WIDTH + 3 * WIDTH, "batch": BATCH, "sites": NUM_SITES}
    return {"model": model, "ratio": found["work"]["ratio"], **found}


def _client(folder: Path) -> "ClientApp":
    """One ClientApp for both: a message with a request of a secure sum goes through the mod."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from urna.client import make_secure_sum_mod
    from urna.protocol.averaging import HEADER

    def site_of(context: Context) -> Path:
        return folder / "sites" / f"site-{int(context.node_config['partition-id']) + 1}"

    def train(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
        torch.set_num_threads(1)
        net = _net()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        inputs = torch.sin(torch.arange(BATCH * WIDTH, dtype=torch.float32)).reshape(BATCH, WIDTH)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        loss = torch.zeros(())
        for _ in range(int(str(message.content.config_records["config"]["steps"]))):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(inputs), inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        metrics = MetricRecord({"num-examples": BATCH, "train_loss": float(loss.detach())})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    def evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
        torch.set_num_threads(1)
        net = _net()
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        with torch.no_grad():
            loss = float(net(torch.ones(BATCH, WIDTH)).square().mean())
        metrics = MetricRecord({"num-examples": BATCH, "eval_loss": loss, "eval_acc": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    plain, secure = ClientApp(), ClientApp(mods=[make_secure_sum_mod(folder_of=site_of)])
    for one in (plain, secure):
        one.train()(train)
        one.evaluate()(evaluate)

    class Both(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            return (secure if HEADER in message.content else plain)(message, context)

    return Both()


def _net() -> "nn.Sequential":
    from torch import nn

    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))


def _timed(grid: "Grid", folder: Path, steps: int, pairs: int) -> dict[str, object]:
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    from urna.strategies import SecureSum

    arrays = ArrayRecord(_net().state_dict())
    strategy = SecureSum(FedAvg(), operator_key=folder / "operator.key", roster=folder / "roster.json", train_metrics=METRICS)
    grids = {"plain": grid, "secure": strategy.secured(grid)}

    def seconds(kind: str) -> float:
        started = time.monotonic()
        result = FedAvg().start(grids[kind], arrays, num_rounds=1, train_config=ConfigRecord({"steps": steps}))
        assert result.arrays, f"the {kind} round was lost"
        return time.monotonic() - started

    for kind in grids:
        seconds(kind)  # workers start, torch is imported, keys are exchanged
    both: dict[str, list[float]] = {kind: [] for kind in grids}
    for pair in range(pairs):
        for kind in sorted(grids, reverse=pair % 2 == 1):
            both[kind].append(seconds(kind))
    plain, secure = both["plain"], both["secure"]
    ratios = [one / other for one, other in zip(secure, plain, strict=True)]
    return {
        "steps": steps,
        "pairs": pairs,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "plain_seconds": round(statistics.median(plain), 3),
        "secure_seconds": round(statistics.median(secure), 3),
        "overhead_seconds": round(statistics.median(one - other for one, other in zip(secure, plain, strict=True)), 3),
        "load_average": round(os.getloadavg()[0], 1),
    }
