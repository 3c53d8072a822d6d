"""The operator's side: Flower's quickstart with its strategy inside `SecureSum`."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from secure_quickstart.task import Net
from urna.strategies import SecureSum

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run federated averaging on secure sums."""
    config = context.run_config
    consortium = Path(str(config["consortium-dir"]))
    torch.manual_seed(0)
    strategy = SecureSum(
        FedAvg(fraction_evaluate=float(config["fraction-evaluate"])),
        operator_key=consortium / "operator.key",
        roster=consortium / "roster.json",
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
    )
    torch.save(result.arrays.to_torch_state_dict(), Path(str(config["output-dir"])) / "final_model.pt")
