"""The site's command line: `urna-site`. What it prints stays on this machine.

Exit codes: 0 ok, 2 bad input, 4 the ledger cannot be used.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import urna
from urna.client.ledger import Ledger
from urna.privacy.accounting import epsilon_of_rows
from urna.protocol import commandline
from urna.protocol.errors import BadInputError, SiteConfigError, UrnaError

app = typer.Typer(
    help="A site's own tools: is everything in place, and what has it ever released?",
    epilog="Exit codes: 0 ok, 2 bad input, 4 the ledger cannot be used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
Folder = Annotated[Path, typer.Argument(help="The site's folder, with site.toml in it.", show_default=False)]


@app.command()
def check(folder: Folder) -> None:
    """Look at every part of a site's folder: configuration, keys, ledger, records. Nothing is sent or changed."""
    from urna.client.config import load_site_config

    config = load_site_config(folder)
    _line("ok", f"site.toml  {config.name}")
    parts = {"keys": _check_keys, "ledger": _check_ledger, "records": _check_records}
    wrong = []
    for name, part in parts.items():
        try:
            _line("ok", f"{name:<9}  {part(folder)}")
        except UrnaError as error:
            wrong.append(name)
            _line("no", f"{name:<9}  {error}")
    if wrong:
        raise BadInputError(f"{folder} cannot take part: {', '.join(wrong)}")


@app.command()
def ledger(folder: Folder) -> None:
    """What this site has ever released, and its epsilon at the policy's delta, of each stage and in total."""
    from rich.table import Table

    from urna.client.config import LEDGER_FILE, load_site_config

    policy = load_site_config(folder).policy
    opened = Ledger.open(folder / LEDGER_FILE)
    rows = opened.rows()
    opened.close()
    released = Table("stage", "partition", "event", "count", box=None, pad_edge=False)
    for row in rows:
        released.add_row(row.stage, row.partition, _in_words(row.event), str(row.count))
    console.print(released)
    for stage in dict.fromkeys(row.stage for row in rows):
        epsilon = epsilon_of_rows(tuple(row for row in rows if row.stage == stage), policy.delta)
        console.print(f"{stage:<10}  epsilon {epsilon:.4f}")
    total = epsilon_of_rows(rows, policy.delta)
    console.print(f"total       epsilon {total:.4f} of {policy.epsilon_total:g}, delta {policy.delta:g}")


def _in_words(event: str) -> str:
    """An event as a person says it."""
    match json.loads(event):
        case {"GaussianDpEvent": {"noise_multiplier": multiplier}}:
            return f"Gaussian, noise multiplier {multiplier:.4g}"
        case {"PoissonSampledDpEvent": {"sampling_probability": rate, "event": inner}}:
            return f"{_in_words(json.dumps(inner))}, of a Poisson sample of {rate:.4g}"
    return event


def _check_keys(folder: Path) -> str:
    from urna.client.config import load_site_config
    from urna.client.site import load_data_key
    from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE, load_identity, load_roster

    name = load_site_config(folder).name
    identity, roster = load_identity(name, folder / IDENTITY_FILE), load_roster(folder / ROSTER_FILE)
    load_data_key(folder)
    if roster.key_of(name) != identity.public_key_hex:
        raise SiteConfigError(f"expected this identity's key in the roster, found another for {name}: ask for a new roster")
    return f"in a roster of {len(roster.sites)} sites"


def _check_ledger(folder: Path) -> str:
    from urna.client.config import LEDGER_FILE, load_site_config

    opened = Ledger.open(folder / LEDGER_FILE)
    rows = opened.rows()
    opened.close()
    policy = load_site_config(folder).policy
    spent = epsilon_of_rows(rows, policy.delta)
    if spent > policy.epsilon_total:
        raise SiteConfigError(f"policy.epsilon_total: {spent:.4f} of {policy.epsilon_total:g} are spent: nothing is left")
    return f"chain unbroken, {sum(row.count for row in rows)} releases, epsilon {spent:.4f} of {policy.epsilon_total:g} spent"


def _check_records(folder: Path) -> str:
    from urna.client.config import load_site_config
    from urna.client.data import load_records

    config = load_site_config(folder).data
    found = len(load_records(folder, config).ids)
    if not 0.9 <= config.num_records / max(found, 1) <= 1.1:
        raise SiteConfigError(
            f"data.num_records: expected {found} or a rounding of it, found {config.num_records}: declare anew"
        )
    return f"{found} read, {config.num_records} declared"


def _line(mark: str, text: str) -> None:
    console.print(Text.assemble((mark, "green" if mark == "ok" else "red"), f"  {text}"), soft_wrap=True)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """A site's own tools: is everything in place, and what has it ever released?"""
    if version:
        print(f"urna {urna.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point."""
    commandline.run(app)
