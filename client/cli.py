"""The site's command line: `urna-site`. What it prints stays on this machine.

Exit codes: 0 ok, 2 bad input, or a check that is red, 4 the ledger cannot be used, or no runner answers.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

import urna
from urna.client.control import CampaignStatus, DenyReason, RunnerClient, SiteStatus, connect
from urna.client.tables import asked_lines, columns, ledger_lines, printable, status_lines
from urna.protocol import commandline
from urna.protocol.errors import BadInputError, ControlError, RunnerError

if TYPE_CHECKING:
    from urna.client.findings import Finding
    from urna.client.ledger import Ledger

EXIT_CODES = "Exit codes: 0 ok, 2 bad input or a red check, 4 the ledger cannot be used or no runner answers."
MIN_PREFIX = 8  # digits of a plan's hash that a person must give
MARKS = {"ok": "green", "warn": "yellow", "no": "red", "skip": "dim"}

app = typer.Typer(
    help="A site's own tools: join, run, watch and decide; what has it ever released?",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The site's records, shown on this machine.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console(highlight=False)

Folder = Annotated[Path, typer.Argument(help="The site's folder, with site.toml in it.", show_default=False)]
Campaign = Annotated[str, typer.Argument(help="The campaign's name, as the status shows it.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the site's folder is to be.", show_default=False)],
    answers: Annotated[Path | None, typer.Option(help="A TOML file with the answers; nothing is asked.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write without showing it first.")] = False,
) -> None:
    """Make a site: asks what must be declared and says why, writes site.toml, makes the keys. Never overwrites."""
    from urna.client.init import ask, checked, make_site, read_answers, render, said_after

    text = render(ask(folder, _prompt, _say) if answers is None else read_answers(folder, answers))
    if not yes:
        _say([f"--- {folder / 'site.toml'}", *text.splitlines(), "---"])
        if not typer.confirm("Write this, and make the keys?"):
            raise BadInputError("nothing was written")
    identity = make_site(folder, text)
    _say(said_after(folder, checked(text), identity))


@app.command()
def check(
    folder: Folder,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no other machine or process.")] = False,
    as_json: Json = False,
) -> None:
    """Look at every part of a site: red, yellow or green, and what to do. Nothing is changed."""
    from urna.client.doctor import examine, is_fit

    findings = examine(folder, offline=offline)
    if as_json:
        print(json.dumps([asdict(one) for one in findings], indent=2))
    else:
        width = max(len(one.name) for one in findings)
        for one in findings:
            _finding(one, width)
    if not is_fit(findings):
        wrong = dict.fromkeys(one.name for one in findings if one.level == "no")
        raise BadInputError(f"{folder} cannot take part: {', '.join(wrong)}")


@app.command()
def ledger(
    folder: Folder,
    renew_anchor: Annotated[
        bool, typer.Option("--renew-anchor", help="Make a lost anchor anew; the ledger records it.")
    ] = False,
) -> None:
    """What this site has ever released, and its epsilon, of each campaign and in total."""
    from urna.client.config import load_site_config

    config = load_site_config(folder)
    if renew_anchor:
        _renew_anchor(folder)
    with _opened(folder) as opened:
        _say(ledger_lines(opened, config.policy))


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Where the site stands: budget, campaigns, what waits for a person. Without a runner: as its ledger says."""
    found = _status(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _say(status_lines(found, str(folder)))


@app.command()
def approve(
    folder: Folder,
    campaign: Campaign,
    plan: Annotated[str, typer.Option(help="The first digits of the plan's hash, as the status shows them.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needs --plan.")] = False,
) -> None:
    """Let a campaign be opened, with exactly the plan that is shown."""
    if yes and not plan:
        raise BadInputError("--yes needs --plan: what is approved must be what was looked at")
    with connect(folder) as runner:
        one = _campaign(runner, campaign, plan)
        if not yes:
            _say(asked_lines(one, runner.status()))
            if not typer.confirm("Approve exactly this plan?"):
                raise BadInputError(f"{campaign} was not approved: it still waits; `urna-site deny` says no for good")
        runner.approve(campaign, one.plan_sha256)
    _say([f"{campaign} is approved with plan {one.plan_sha256[:12]}; it opens when the operator asks again"])


@app.command()
def deny(
    folder: Folder,
    campaign: Campaign,
    reason: Annotated[DenyReason, typer.Option(help="Why; noted in the ledger, and told to nobody.")] = DenyReason.UNSPECIFIED,
) -> None:
    """Refuse a campaign, or end its releases; the operator is told that a person said no, and not why."""
    with connect(folder) as runner:
        runner.deny(campaign, reason)
    _say([f"{campaign} is denied"])


@app.command()
def pause(folder: Folder) -> None:
    """Release nothing more until `resume`."""
    with connect(folder) as runner:
        runner.pause()
    _say(["paused: nothing is released until `urna-site resume`"])


@app.command()
def resume(folder: Folder) -> None:
    """Go on after `pause`."""
    with connect(folder) as runner:
        runner.resume()
    _say(["the site goes on"])


@app.command()
def run(folder: Folder) -> None:
    """Serve the site: take requests from its SuperNode, keep models and records warm. `up` starts both."""
    from urna.client.runner import run as run_site

    raise typer.Exit(run_site(folder))


@app.command()
def up(folder: Folder) -> None:
    """Start the SuperNode and the runner, and keep both going."""
    from urna.client.supervisor import up as keep_up

    raise typer.Exit(keep_up(folder))


@app.command()
def receipts(
    folder: Folder,
    campaign: Annotated[str | None, typer.Argument(help="Of this campaign only.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; FOLDER/receipts if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace also a file that says something else.")] = False,
) -> None:
    """Write a signed statement of each campaign: what ran, what left, what it cost. `urna verify-receipt` checks it."""
    from urna.client.receipts import write_receipts

    _say(f"receipt  {path}" for path in write_receipts(folder, out or folder / "receipts", campaign, force=force))


@data_app.command("preview")
def preview(
    folder: Folder,
    dataset: Annotated[str | None, typer.Argument(help="Its name in site.toml; the first one if none is given.")] = None,
    num_rows: Annotated[int, typer.Option("--rows", min=0, max=1000, help="How many records are shown.")] = 5,
) -> None:
    """Show records as they are after de-identification. It shows values: for this screen alone."""
    from urna.client.config import load_site_config
    from urna.client.preview import preview as look
    from urna.client.vault import load_data_key

    config = load_site_config(folder)
    chosen = next((one for one in config.dataset if dataset in (None, one.name)), None)
    if chosen is None:
        names = ", ".join(one.name for one in config.dataset)
        raise BadInputError(f"expected a data set of site.toml ({names}), found {dataset!r}")
    shown = look(folder, chosen, load_data_key(folder, config.vault), num_rows)
    _say(columns([shown.columns, *(tuple(map(printable, row)) for row in shown.rows)]))
    _say(["", f"{shown.num_records} records of {shown.num_units} persons or units, {shown.num_left_out} left out by the cap"])
    _say([f"labels    {', '.join(f'{printable(name)} {count}' for name, count in shown.num_by_label.items())}"])
    if shown.num_scrubbed:
        _say([f"scrubbed  {', '.join(f'{token} {count}' for token, count in shown.num_scrubbed.items())}"])


def _status(folder: Path) -> SiteStatus:
    try:
        with connect(folder) as runner:
            return runner.status()
    except RunnerError:
        from urna.client.config import load_site_config
        from urna.client.desk import LedgerDesk
        from urna.protocol.identity import ROSTER_FILE, load_roster

        config = load_site_config(folder)
        with _opened(folder) as opened:
            return LedgerDesk(config.name, config.policy, load_roster(folder / ROSTER_FILE), opened, running_since=0.0).status()


def _campaign(runner: RunnerClient, name: str, prefix: str) -> CampaignStatus:
    """The campaign that a person means.

    Raises:
        ControlError: there is none of this name, or it has another plan.
    """
    known = {one.name: one for one in runner.status().campaigns}
    if name not in known:
        raise ControlError(f"expected a campaign of this site ({', '.join(known) or 'there is none'}), found {name!r}")
    found = known[name].plan_sha256
    if prefix and (len(prefix) < MIN_PREFIX or not found.startswith(prefix.lower())):
        raise ControlError(
            f"--plan: expected {MIN_PREFIX} or more first digits of {found[:12]}, found {prefix!r}: look at what it asks now"
        )
    return known[name]


@contextmanager
def _opened(folder: Path) -> "Iterator[Ledger]":
    from urna.client.config import load_site_config
    from urna.client.vault import open_ledger

    opened = open_ledger(folder, load_site_config(folder).vault, read_only=True)
    try:
        yield opened
    finally:
        opened.close()


def _renew_anchor(folder: Path) -> None:
    from urna.client.config import LEDGER_FILE, load_site_config
    from urna.client.ledger import Ledger
    from urna.client.vault import anchor_path, load_data_key, vault_folder

    vault = load_site_config(folder).vault
    _say(["Only if the anchor is lost for good, and this ledger is its newest copy: an older one would spend twice."])
    if not typer.confirm("Make a new anchor?"):
        raise BadInputError("nothing was changed")
    Ledger.renew_anchor(vault_folder(folder, vault) / LEDGER_FILE, load_data_key(folder, vault), anchor_path(folder, vault))


def _finding(one: "Finding", width: int) -> None:
    took = f"  ({one.seconds:.1f} s)" if one.seconds > 1 else ""
    line = Text.assemble((f"{one.level:<4}", MARKS[one.level]), f"  {one.name:<{width}}  {printable(one.text)}{took}")
    console.print(line, soft_wrap=True)
    if one.remedy and one.level != "ok":
        console.print(Text(f"      {'':<{width}}  -> {printable(one.remedy)}"), soft_wrap=True)


def _prompt(question: str, proposed: str | None) -> str:
    return str(typer.prompt(question, default=proposed or "", show_default=proposed is not None))


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """A site's own tools: join, run, watch and decide; what has it ever released?"""
    if version:
        print(f"urna {urna.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point."""
    commandline.run(app)
