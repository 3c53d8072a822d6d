"""The operator's command line: `urna`.

Exit codes: 0 ok, 2 bad input, 3 refused by a site's policy, 4 failed round (`urna resume` goes on).
"""

import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

import urna
from urna.protocol import commandline
from urna.protocol.errors import BadInputError, PlanError, RefusedError, RoundError, RunError
from urna.protocol.plan import Plan, load_plan
from urna.server.journal import JOURNAL_FILE, Journal, begin, is_running, recorded_plan

if TYPE_CHECKING:
    from urna.server.progress import Progress

app = typer.Typer(
    help="Choose one pretrained model by sealed ballots, fine-tune it under differential privacy, prove what it cost.",
    epilog="Exit codes: 0 ok, 2 bad input, 3 refused by a site's policy, 4 failed round (urna resume goes on).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at a plan before anything is asked of anyone.", no_args_is_help=True)
models_app = typer.Typer(help="The candidates: list, build, check.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
app.add_typer(models_app, name="models")
console = Console(highlight=False)

PlanPath = Annotated[Path, typer.Argument(help="The plan, a TOML file.", show_default=False)]
RunsDir = Annotated[Path, typer.Option(help="Folder of all runs.", envvar="URNA_RUNS_DIR")]
Tuning = Literal["head", "lora", "full"]
RunDir = Annotated[Path, typer.Argument(help="A run's folder, like runs/digits-20260101-120000.", show_default=False)]


@plan_app.command("check")
def plan_check(path: PlanPath) -> None:
    """Validate a plan and say in words what it will ask of the sites, how often, and at which cost."""
    from urna.server.prose import plan_in_words

    console.print(Text(plan_in_words(load_plan(path))), soft_wrap=True)


@app.command()
def run(
    path: PlanPath,
    runs_dir: RunsDir = Path("runs"),
    name: Annotated[str | None, typer.Option(help="The run's name; a new one is made from plan and time.")] = None,
    federation: Annotated[str | None, typer.Option(help="A Flower federation; without it the embedded engine runs.")] = None,
    operator_key: Annotated[Path | None, typer.Option(help="The operator's private key (with --federation).")] = None,
    roster: Annotated[Path | None, typer.Option(help="The roster of pinned keys (with --federation).")] = None,
) -> None:
    """Run a plan: shortlist, ballot, fine-tune, evaluate, report."""
    from urna.server.prose import plan_in_words
    from urna.strategies.budget import check_affordable

    plan = load_plan(path)
    name = f"{plan.name[:47]}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise RunError(f"a run's name has up to 63 of a-z, 0-9, - and _, found {name!r}: choose another --name")
    run_dir = runs_dir / name
    if run_dir.exists():
        raise RunError(f"{run_dir} exists: choose another --name, or `urna resume {run_dir}`")
    if federation is None and plan.federation.virtual is None:
        raise PlanError("federation.virtual: expected for the embedded engine, found none: add it, or use --federation NAME")
    plan_in_words(plan)  # what it cannot say cannot be run
    check_affordable(plan)
    _prepare_models(plan)
    runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        run_dir.mkdir()
    except FileExistsError:
        raise RunError(f"{run_dir} was begun by another process meanwhile: choose another --name") from None
    try:
        if federation is None:
            begin(run_dir, plan, "embedded")
        else:
            _begin_deployed(run_dir, plan, federation, operator_key, roster)
    except BaseException:
        for folder in (run_dir, runs_dir):  # bad input leaves nothing behind; a folder that holds something stays
            with suppress(OSError):
                folder.rmdir()
        raise
    _go(run_dir, plan)


@app.command()
def resume(run_dir: RunDir) -> None:
    """Go on with a run that was interrupted; sites spend nothing twice."""
    journal = Journal.read(run_dir)
    plan = recorded_plan(journal)
    finished = journal.find("finished") is not None
    journal.close()
    if finished:
        console.print(Text(f"{run_dir} is finished; its report is drawn again"))
        _write_views(run_dir)
        return
    _prepare_models(plan)
    _go(run_dir, plan)


@app.command()
def status(
    run_dir: Annotated[Path | None, typer.Argument(help="A run's folder; without it all runs are listed.")] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Where runs stand."""
    if run_dir is None and not runs_dir.is_dir():
        raise RunError(f"expected a folder of runs at {runs_dir}, found none: see --runs-dir")
    rows: list[tuple[str, ...]] = [("run", "state", "stage", "rounds", "sites", "epsilon", "accuracy")]
    for one in [run_dir] if run_dir else sorted(path.parent for path in runs_dir.glob(f"*/{JOURNAL_FILE}")):
        try:
            rows.append((one.name, *_standing(one)))
        except RunError as error:
            if run_dir is not None:
                raise
            rows.append((one.name, "unreadable", str(error), "", "", "", ""))
    widths = [max(len(row[at]) for row in rows) for at in range(2)]
    for name, state, *rest in rows:  # never cut: a name is there to be copied
        console.print(
            Text(f"{name:<{widths[0]}}  {state:<{widths[1]}}  {'  '.join(f'{cell:<11}' for cell in rest)}"), soft_wrap=True
        )


def _standing(run_dir: Path) -> tuple[str, ...]:
    progress = _progress_of(run_dir)
    state = "finished" if progress.finished else "running" if is_running(run_dir) else "stopped"
    planned = progress.rounds_done if progress.finished else max(progress.rounds_planned, progress.rounds_done)
    return (
        state,
        progress.stage,
        f"{progress.rounds_done}/{planned}",
        str(progress.members),
        f"{max(progress.epsilon.values()):.3f}/{progress.plan.privacy.epsilon:g}",
        progress.accuracy or "-",
    )


@app.command()
def report(run_dir: RunDir) -> None:
    """Draw a run's report (and model folder) again from its journal."""
    _write_views(run_dir)


@app.command()
def predict(
    run_dir: RunDir,
    input: Annotated[  # noqa: A002 - the option's name
        Path, typer.Option(help="Images: a CSV of pixels (a row each) or a PNG. Texts: a CSV, JSON lines, or one text a line.")
    ],
    max_value: Annotated[
        float | None, typer.Option(help="What counts as white; without it 255 for a PNG and 1 for a CSV.")
    ] = None,
    column: Annotated[str, typer.Option(help="Which column of a CSV, or key of JSON lines, holds the text.")] = "text",
) -> None:
    """Label images or texts with a run's model: one line each, label and probability."""
    from urna.server.artefact import load_model
    from urna.server.inputs import read_images, read_texts

    model = load_model(run_dir)
    if model.config.modality == "text":
        labels, probabilities = model.predict(read_texts(input, column))
    else:
        labels, probabilities = model.predict(read_images(input, max_value, any_shape=not model.config.is_built_in))
    for label, row in zip(labels, probabilities, strict=True):
        print(f"{int(label)}\t{float(row[label]):.4f}")


@app.command()
def monitor(
    runs_dir: RunsDir = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 9464,
) -> None:
    """Serve the runs' metrics to Prometheus until Ctrl-C."""
    from urna.server.metrics import serve_forever

    serve_forever(runs_dir, host, port, ready=lambda served: console.print(f"serving {runs_dir} at {served.url}"))


@models_app.command("list")
def models_list() -> None:
    """Every candidate that this installation knows, built-in or installed."""
    from urna.server.candidates import candidate_lines

    for facts, words in candidate_lines():
        console.print(Text(facts), soft_wrap=True)
        console.print(Text(f"{'':<13} {words}"), style="dim", soft_wrap=True)


@models_app.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="What plans will call it: a-z, 0-9, - and _.", show_default=False)],
    folder: Annotated[Path | None, typer.Argument(help="The model, as Hugging Face writes it.", show_default=False)] = None,
    *,
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights.", show_default=False)],
    pretrained_on: Annotated[str, typer.Option(help="The public data and the task behind them.", show_default=False)],
    summary: Annotated[str, typer.Option(help="What it is, in one sentence.", show_default=False)] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Of one text; without it 128 or the model's limit.")] = None,
    centre_on: Annotated[
        Path | None, typer.Option(help="PUBLIC records to centre features on, as `urna predict` reads them.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="Instead of a folder: a repository of the hub, owner/name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Its full commit (with --hub).")] = None,
) -> None:
    """Install a pretrained model as a candidate: safetensors of a known family, checked, pinned by one hash."""
    if (folder is None) == (hub is None) or (hub is None) != (revision is None):
        raise BadInputError("expected a folder, or --hub with --revision, found neither or both: give one of them")
    from urna.models.installed import About, install, install_from_hub
    from urna.server.candidates import public_records

    about = About(licence, pretrained_on, summary)
    records = None if centre_on is None else partial(public_records, centre_on)
    if hub is not None and revision is not None:
        found = install_from_hub(name, hub, revision, about, max_tokens=max_tokens, centre_on=records)
    else:
        assert folder is not None
        found = install(name, folder, about, max_tokens=max_tokens, centre_on=records)
    size = f"{found.spec.num_parameters:,} parameters, {found.spec.feature_dim} features"
    console.print(Text(f"{name}: {found.spec.family}, {found.spec.modality}, {size}"), soft_wrap=True)
    console.print(Text(f"  sha256 {found.sha256}"), soft_wrap=True)
    if found.dropped:
        console.print(Text(f"  no feature needs, so dropped: {', '.join(found.dropped)}"), soft_wrap=True)


@app.command()
def provision(
    path: Annotated[Path, typer.Argument(help="The consortium, a TOML file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to make; with --add, the one to add to.", show_default=False)],
    add: Annotated[bool, typer.Option("--add", help="Add the sites that are new in the document.")] = False,
) -> None:
    """Make keys, TLS certificates and configurations of a consortium: a folder for the operator, the proxy and each site."""
    from urna.server import provision as provisioning

    for line in provisioning.provision(path, out, add=add):
        console.print(Text(line), soft_wrap=True)


@app.command("verify-receipt")
def verify_receipt(
    path: Annotated[Path, typer.Argument(help="The receipt, as a site wrote it.", show_default=False)],
    roster: Annotated[Path | None, typer.Option(help="The roster of pinned keys.")] = None,
    key: Annotated[str | None, typer.Option(help="Instead of a roster: the site's public key, 128 hex digits.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder: compare with what the operator holds.")] = None,
) -> None:
    """Check a site's receipt without the site: signature, plan, releases, and epsilon computed again from them."""
    from urna.server.receipt_check import check_file
    from urna.server.receipt_words import lines_of

    checked = check_file(path, roster, key, run)
    for line in lines_of(checked):
        console.print(Text(line), soft_wrap=True)
    if not checked.is_good:
        raise typer.Exit(BadInputError.exit_code)


@models_app.command("pretrain")
def models_pretrain(
    names: Annotated[list[str] | None, typer.Argument(help="Which candidates; all without it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is built.")] = False,
) -> None:
    """Build candidates on public data, once; they are kept in the user's cache and checked by hash."""
    from urna.models.catalogue import CATALOGUE, spec

    for name in names or ():
        if spec(name).name not in CATALOGUE:
            raise BadInputError(f"{name!r} was installed, not built here: see `urna models add`")
    _build(names or list(CATALOGUE), force=force)


@models_app.command("check")
def models_check(
    name: Annotated[str, typer.Argument(help="A candidate.")],
    tuning: Annotated[Tuning, typer.Option(help="What would be trained.")] = "head",
    num_classes: Annotated[int, typer.Option(help="Outputs of the head.", min=2, max=1000)] = 10,
    lora_rank: Annotated[int, typer.Option(help="Inner dimension of low-rank factors.", min=1, max=256)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
) -> None:
    """Verify a candidate's files, and its per-example gradients, parameter by parameter, against a one-example loop."""
    from urna.models.loading import load_backbone
    from urna.server.candidates import check_candidate, check_lines, check_table

    backbone = load_backbone(name)
    checked = check_candidate(backbone, tuning, num_classes, lora_rank, device)
    what = f"per-example gradients of tuning {tuning} with {num_classes} classes are sound"
    console.print(Text(f"{name}: files {backbone.sha256[:12]} verified; {what}"), soft_wrap=True)
    console.print(check_table(checked.report))
    for line in check_lines(checked):
        console.print(Text(f"  {line}"), soft_wrap=True)


def _begin_deployed(run_dir: Path, plan: Plan, federation: str, operator_key: Path | None, roster: Path | None) -> None:
    from urna.server.deployed import begin_deployed

    if operator_key is None or roster is None:
        raise BadInputError("--federation needs --operator-key and --roster, found one or none: give both")
    begin_deployed(run_dir, plan, federation, operator_key, roster)


def _prepare_models(plan: Plan) -> None:
    """Every candidate of a plan is known, built (a missing one is built now), and what the plan or its manifest pins."""
    from urna.models.catalogue import CATALOGUE, spec
    from urna.models.loading import cache_root, load_backbone

    for entry in plan.candidates:
        if (cache_root() / spec(entry.name).name).exists():
            load_backbone(entry.name, entry.sha256)  # a file that is not what it should be is said, never replaced unasked
    _build([entry.name for entry in plan.candidates if entry.name in CATALOGUE], force=False)
    for entry in plan.candidates:
        load_backbone(entry.name, entry.sha256)


def _build(names: list[str], *, force: bool) -> None:
    from urna.models.pretrain import is_current, pretrain

    for name in names:
        if not force and is_current(name):
            continue
        started = time.monotonic()
        console.print(f"building candidate {name} on public data ...", end=" ")
        pretrain(name, force=force)
        console.print(f"{time.monotonic() - started:.1f} s")


def _go(run_dir: Path, plan: Plan) -> None:
    """Run the engine in a process of its own, show its journal, and write the views when it ends."""
    from urna.server.progress import watch

    if is_running(run_dir):
        raise RunError(f"{run_dir} is being run by another process: `urna status {run_dir}` shows it")
    console.print(Text(f"run {run_dir}  plan {plan.sha256[:12]}  epsilon {plan.privacy.epsilon:g}  noise {plan.privacy.noise}"))
    engine = "urna.server.deployed" if (run_dir / "deployment.json").is_file() else "urna.embedded"
    with (run_dir / "engine.out").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", engine, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (run_dir / "engine.pid").write_text(str(process.pid), encoding="utf-8")
    try:
        watch(run_dir, plan, process, console)
    except KeyboardInterrupt:
        assert process.stdin is not None
        process.stdin.close()  # the engine ends when its standard input does
        process.wait()
        raise RoundError(f"interrupted; nothing is lost: `urna resume {run_dir}` goes on") from None
    _check_engine(run_dir, process.returncode)
    _write_views(run_dir)


def _check_engine(run_dir: Path, code: int) -> None:
    if code == 0:
        return
    error_file = run_dir / "error.txt"
    text = error_file.read_text("utf-8") if error_file.is_file() else f"the engine ended with code {code}"
    if code in (2, 3):
        error = BadInputError(text) if code == 2 else RefusedError(text)
        raise error
    raise RoundError(f"{text}; `urna resume {run_dir}` goes on from the journal")


def _write_views(run_dir: Path) -> None:
    from urna.server.artefact import write_model
    from urna.server.report_page import write_report

    page = write_report(run_dir)
    journal = Journal.read(run_dir)
    trained = journal.find("model") is not None
    journal.close()
    console.print(Text(f"report  {page.with_suffix('.html')}"))
    if trained:
        console.print(Text(f"model   {write_model(run_dir)}"))
        console.print(Text(f"use it  urna predict {shlex.quote(str(run_dir))} --input FILE"))


def _progress_of(run_dir: Path) -> "Progress":
    from urna.server.progress import describe

    journal = Journal.read(run_dir)
    try:
        return describe(journal.entries(), recorded_plan(journal))
    finally:
        journal.close()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Choose one pretrained model by sealed ballots, fine-tune it under differential privacy, prove what it cost."""
    if version:
        print(f"urna {urna.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point."""
    commandline.run(app)
