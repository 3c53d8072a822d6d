"""Flower's ServerApp: loads the plan, opens the journal, runs; no logic.

Run config (declared in deploy/app/pyproject.toml): ``run-dir`` (this machine's folder of the run), ``plan`` (the plan as
JSON; used once, to begin), ``operator-key`` and ``roster`` (paths on this machine).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from urna.protocol.identity import OPERATOR, load_identity, load_roster
from urna.protocol.plan import Plan
from urna.server.campaign import begin, run_campaign
from urna.server.journal import JOURNAL_FILE
from urna.server.rounds import GridTransport

if TYPE_CHECKING:
    from urna.protocol.identity import Identity, Roster

DEPLOYED_POLL_SECONDS = 0.2


def run_on_grid(run_dir: Path, grid: Grid, identity: "Identity", roster: "Roster", poll_seconds: float = 0.05) -> None:
    """Run a begun campaign over a Flower Grid."""
    run_campaign(run_dir, GridTransport(grid, poll_seconds), identity, roster)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry of a deployed run."""
    config = context.run_config
    run_dir = Path(str(config["run-dir"]))
    if not (run_dir / JOURNAL_FILE).is_file():
        begin(run_dir, Plan.model_validate_json(str(config["plan"])), engine="flower")
    identity = load_identity(OPERATOR, Path(str(config["operator-key"])))
    run_on_grid(run_dir, grid, identity, load_roster(Path(str(config["roster"]))), DEPLOYED_POLL_SECONDS)
