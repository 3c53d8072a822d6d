"""Flower's ServerApp: loads the plan, opens the journal, runs; no logic.

Run config (declared in deploy/app/pyproject.toml): ``run-dir`` (this machine's folder of the run), ``plan`` (the plan as
JSON; used once, to begin), ``operator-key`` and ``roster`` (paths on this machine).
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from urna.protocol.errors import RunError
from urna.protocol.identity import OPERATOR, Identity, Roster, load_identity, load_roster
from urna.protocol.plan import Plan
from urna.server.campaign import run_campaign
from urna.server.deployed import ENGINE, write_exit
from urna.server.exchange import GridTransport
from urna.server.journal import JOURNAL_FILE, begin
from urna.server.process import log_to, record_error

DEPLOYED_POLL_SECONDS = 0.2


def run_on_grid(run_dir: Path, grid: Grid, identity: Identity, roster: Roster, poll_seconds: float = 0.05) -> None:
    """Run a begun campaign over a Flower Grid."""
    run_campaign(run_dir, GridTransport(grid, poll_seconds), identity, roster)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry of a deployed run; how it ended is written into the run's folder, for nobody waits for this process."""
    config = {key: Path(str(context.run_config[key])) for key in ("run-dir", "operator-key", "roster")}
    run_dir = config["run-dir"]
    if not run_dir.is_absolute():
        raise RunError(
            "expected the run config that `urna run --federation NAME` fills in, found an empty one: use that command"
        )
    try:
        if not (run_dir / JOURNAL_FILE).is_file():
            begin(run_dir, Plan.model_validate_json(str(context.run_config["plan"])), engine=ENGINE)
        log_to(run_dir)
        identity = load_identity(OPERATOR, config["operator-key"])
        run_on_grid(run_dir, grid, identity, load_roster(config["roster"]), DEPLOYED_POLL_SECONDS)
    except Exception as error:
        write_exit(run_dir, context.run_id, record_error(run_dir, error))
        raise  # so that Flower, too, calls the run failed
    write_exit(run_dir, context.run_id, 0)
