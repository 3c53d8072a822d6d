"""The embedded engine: Flower's simulation in one process, with virtual sites over local data.

It is for experiments and demonstrations. The sites are real sites (a folder, keys, a ledger, `Site.handle`) except that one
person holds them all; their ledgers live and end with the run's folder. This is the one module above both sides.

    python -m urna.embedded RUN_DIR      run or go on with a run; ends when its standard input closes
"""

import csv
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from urna.protocol.errors import RunError
from urna.protocol.identity import (
    OPERATOR,
    OPERATOR_KEY_FILE,
    ROSTER_FILE,
    SITES_DIR,
    Roster,
    create_identity,
    load_identity,
    load_roster,
)
from urna.protocol.plan import Plan, VirtualSites


@dataclass(frozen=True)
class Dataset:
    """n labelled images: ids, images (n, h, w) in 0 ... max_value, labels (n,)."""

    name: str
    ids: tuple[str, ...]
    images: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    max_value: float


def load_dataset(name: str) -> Dataset:
    """scikit-learn's bundled digits: 1797 real handwritten digits of 8 x 8 pixels (UCI, test part)."""
    from sklearn.datasets import load_digits

    assert name == "digits"
    bunch = load_digits()
    ids = tuple(f"digits-{index:04d}" for index in range(len(bunch.target)))
    return Dataset(name, ids, bunch.images, bunch.target.astype(np.int64), max_value=16.0)


def partition(labels: npt.NDArray[np.int64], virtual: VirtualSites, minimum: int = 30) -> list[npt.NDArray[np.int64]]:
    """Record indices of each site: every class is divided by its own Dirichlet draw (Hsu, Qi, Brown 2019).

    Drawn again (with the same generator) until every site has ``minimum`` records or a fair tenth, whichever is less.
    """
    generator = np.random.default_rng(virtual.seed)  # decides who holds what in an experiment; no privacy rests on it
    enough = min(minimum, len(labels) // (10 * virtual.num_sites))
    for _ in range(1000):
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            shares = generator.dirichlet([virtual.dirichlet_alpha] * virtual.num_sites)
            owner[members] = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(len(members)) + 0.5) / len(members))
        parts = [np.flatnonzero(owner == site) for site in range(virtual.num_sites)]
        if min(len(part) for part in parts) >= enough:
            return parts
    raise RunError(f"no partition gives every site {enough} records: raise federation.virtual.dirichlet_alpha")


def prepare(run_dir: Path, plan: Plan) -> None:
    """Make the operator's key, the roster and a folder for every virtual site, unless all of it is there.

    What an interrupted attempt left behind is made anew: without a roster nothing can have been asked of these sites.

    Raises:
        RunError: the plan has no virtual sites.
    """
    virtual = plan.federation.virtual
    if virtual is None:
        raise RunError("the embedded engine needs [federation.virtual] in the plan: add it, or use --federation NAME")
    if (run_dir / ROSTER_FILE).exists():
        return
    from urna.client.vault import create_keys

    dataset = load_dataset(virtual.dataset)
    run_dir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run_dir / SITES_DIR, ignore_errors=True)
    (run_dir / OPERATOR_KEY_FILE).unlink(missing_ok=True)
    operator = create_identity(OPERATOR, run_dir / OPERATOR_KEY_FILE)
    keys = {}
    for number, part in enumerate(partition(dataset.labels, virtual), start=1):
        name = f"site-{number}"
        folder = run_dir / SITES_DIR / name
        keys[name] = create_keys(folder, name).public_key_hex
        _write_records(folder / "records.csv", dataset, part)
        (folder / "site.toml").write_text(_site_toml(name, len(part), dataset, plan), encoding="utf-8")
    roster = Roster(operator=operator.public_key_hex, sites=keys)
    for name in keys:
        (run_dir / SITES_DIR / name / ROSTER_FILE).write_text(roster.model_dump_json(indent=2), encoding="utf-8")
    unnamed = run_dir / f"{ROSTER_FILE}.new"
    unnamed.write_text(roster.model_dump_json(indent=2), encoding="utf-8")
    unnamed.replace(run_dir / ROSTER_FILE)  # last: it says that all is there


def _write_records(path: Path, dataset: Dataset, part: npt.NDArray[np.int64]) -> None:
    height, width = dataset.images.shape[1:]
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", *(f"pixel_{row}_{column}" for row in range(height) for column in range(width))])
        for index in part:
            pixels = [f"{value:g}" for value in dataset.images[index].ravel()]
            writer.writerow([dataset.ids[index], int(dataset.labels[index]), *pixels])


def _site_toml(name: str, num_records: int, dataset: Dataset, plan: Plan) -> str:
    height, width = dataset.images.shape[1:]
    privacy = plan.privacy
    return f"""\
name = {json.dumps(name)}

[[dataset]]
name = {json.dumps(dataset.name)}
format = "csv"
modality = "image"
path = "records.csv"
num_records = {num_records}
num_classes = {len(np.unique(dataset.labels))}
image_height = {height}
image_width = {width}
max_value = {dataset.max_value}

[policy]
epsilon_total = {privacy.epsilon}
epsilon_per_campaign = {privacy.epsilon}
delta = {privacy.delta}
min_cohort = {min(3, plan.federation.min_sites)}
min_colluding_sites = {min(1, privacy.max_colluding_sites)}
holdout_fraction = {plan.evaluation.holdout_fraction}
secure_sum_required = {str(plan.federation.secure_sum).lower()}
"""


def run(run_dir: Path) -> None:
    """Run, or go on with, a campaign on Flower's simulation engine.

    Raises:
        UrnaError: see `run_campaign`.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from urna.client.app import client_app
    from urna.server.app import run_on_grid
    from urna.server.journal import Journal, recorded_plan

    journal = Journal.read(run_dir)
    plan = recorded_plan(journal)
    journal.close()
    prepare(run_dir, plan)
    names = sorted(load_roster(run_dir / ROSTER_FILE).sites, key=lambda name: int(name.removeprefix("site-")))
    sites_dir = (run_dir / SITES_DIR).resolve()
    server = ServerApp()
    failures: list[BaseException] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        try:
            identity = load_identity(OPERATOR, run_dir / OPERATOR_KEY_FILE)
            run_on_grid(run_dir, grid, identity, load_roster(run_dir / ROSTER_FILE))
        except BaseException as error:  # Flower would print it and lose its type
            failures.append(error)

    def folder_of(context: Context) -> Path:
        return sites_dir / names[int(context.node_config["partition-id"])]

    run_simulation(
        server_app=server,
        client_app=client_app(folder_of),
        num_supernodes=len(names),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"include_dashboard": False, "log_to_driver": False},
        },
    )
    if failures:
        raise failures[0]


def main() -> int:
    """Entry of the engine's process; returns its exit code."""
    from urna.server.process import engine_process

    return engine_process(run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
