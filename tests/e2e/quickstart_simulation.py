"""Runs the quickstart example on Flower's simulation engine, in a process of its own.

python -m tests.e2e.quickstart_simulation secure|plain CONFIG.json     writes final_model.pt into its output-dir
"""

import json
import os
import sys
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


def plain_apps(config: UserConfig) -> tuple[ServerApp, ClientApp]:
    """The example as it was before it got a secure sum."""
    import torch
    from secure_quickstart import client_app, task  # type: ignore[import-not-found]

    client, server = ClientApp(), ServerApp()
    client.train()(client_app.train)
    client.evaluate()(client_app.evaluate)

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        torch.manual_seed(0)
        arrays, settings = ArrayRecord(task.Net().state_dict()), ConfigRecord({"lr": float(config["learning-rate"])})
        result = FedAvg().start(grid, arrays, num_rounds=int(config["num-server-rounds"]), train_config=settings)
        torch.save(result.arrays.to_torch_state_dict(), Path(str(config["output-dir"])) / "final_model.pt")

    return server, client


def main(kind: str, config: UserConfig) -> None:
    """Run one kind with a run config, which the engine's Python call does not take."""
    os.environ.update(
        {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    )
    from flwr.simulation import run_simulation

    if kind == "secure":
        from secure_quickstart import client_app, server_app

        server, client = server_app.app, client_app.app
    else:
        server, client = plain_apps(config)

    class Configured(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            own = Context(context.run_id, context.node_id, context.node_config, context.state, dict(config))
            return client(message, own)  # type: ignore[no-any-return]

    outer = ServerApp()

    @outer.main()
    def started(grid: Grid, context: Context) -> None:
        context.run_config = dict(config)
        server(grid, context)

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}}
    run_simulation(outer, Configured(), num_supernodes=3, backend_config=backend)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8")))
