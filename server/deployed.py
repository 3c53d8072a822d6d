"""The engine on a Flower federation: sends the thin app with `flwr run`, and waits for what becomes of it.

    python -m urna.server.deployed RUN_DIR      run or go on with a run; stops it when its standard input closes

The bundle that is sent is two names and no code (deploy/app): the ServerApp is the `urna` that is installed where the
SuperExec runs. That machine holds the run's folder, the operator's key and the roster, and this process runs there too, so
the journal is the progress. Flower's Control API has no login: whoever reaches the SuperLink's port may start runs, so the
port stays on loopback and the operator on that machine (docs/deployment.md).

Not covered (yet):
    * sites run the bundle's names through stock Flower, which would also run a bundle with code: the operator is trusted.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

import urna
from urna.protocol.errors import BadInputError, RefusedError, RoundError, RunError, UrnaError
from urna.protocol.identity import OPERATOR, load_identity, load_roster
from urna.protocol.plan import Plan
from urna.server.journal import Journal, begin, recorded_plan
from urna.server.process import ERROR_FILE, engine_process

ENGINE = "flower"  # what the journal calls this engine
APP_DIR = Path(urna.__file__).parent / "deploy" / "app"
DEPLOYMENT_FILE, EXIT_FILE = "deployment.json", "exit.txt"
POLL_SECONDS = 0.5
ASK_FLOWER_SECONDS = 15.0  # each question starts an interpreter and takes a second of CPU
START_SECONDS = 120.0  # a run that no SuperExec took by then will not be taken
_ANSWER: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


class Deployment(BaseModel, frozen=True, extra="forbid"):
    """Where a run is sent and who asks; kept in the run's folder, so that it can go on."""

    federation: str  # [superlink.NAME] in $FLWR_HOME/config.toml
    operator_key: Path
    roster: Path


def begin_deployed(run_dir: Path, plan: Plan, federation: str, operator_key: Path, roster: Path) -> None:
    """Make a run's folder for a federation; nothing is sent yet.

    Raises:
        BadInputError: the federation, the key or the roster is none.
    """
    _check_federation(federation)
    load_identity(OPERATOR, operator_key)
    load_roster(roster)
    begin(run_dir, plan, ENGINE)
    deployment = Deployment(federation=federation, operator_key=operator_key.resolve(), roster=roster.resolve())
    (run_dir / DEPLOYMENT_FILE).write_text(deployment.model_dump_json(indent=2), encoding="utf-8")


def launch(run_dir: Path) -> None:
    """Run, or go on with, a begun campaign; returns when it has finished.

    Raises:
        BadInputError: the folder, the federation or what the campaign asks for is wrong.
        RefusedError: too many sites' policies said no.
        RoundError: too few sites are left.
        UrnaError: Flower ended the run.
    """
    start(run_dir).wait()


class FlowerRun:
    """A campaign that was sent; `number` is Flower's run id.

    Its ServerApp says in the run's folder how it ended; Flower is asked now and then, in case it could not.
    """

    def __init__(self, run_dir: Path, federation: str, number: str) -> None:
        self.number = number
        self._run_dir = run_dir
        self._federation = federation
        self._ask_at = time.monotonic() + ASK_FLOWER_SECONDS
        self._taken_by = time.monotonic() + START_SECONDS

    def wait(self) -> None:
        """Return when the campaign has finished.

        Raises:
            UrnaError: see `launch`.
        """
        while not self._ended():
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Ask Flower to end the run; the campaign can go on later.

        Raises:
            BadInputError: Flower did not.
        """
        _flwr("stop", self.number, self._federation)

    def _ended(self) -> bool:
        if self._said():
            return True
        if time.monotonic() < self._ask_at:
            return False
        self._ask_at = time.monotonic() + ASK_FLOWER_SECONDS
        try:
            status, details = self._status()
        except BadInputError:
            return False  # the SuperLink restarts; if it stays away, the ServerApp says so
        if status == "pending" and time.monotonic() > self._taken_by:
            self.stop()
            raise BadInputError(f"no SuperExec took the run within {START_SECONDS:.0f} s: start flower-superexec, then resume")
        if not status.startswith("finished"):
            return False
        if self._said():
            return True
        raise UrnaError(f"Flower ended the run ({status}): {details or 'nothing more is known'}; see `flwr log {self.number}`")

    def _said(self) -> bool:
        """Whether the ServerApp has finished.

        Raises:
            UrnaError: it has, with this error.
        """
        path = self._run_dir / EXIT_FILE
        number, _, code = path.read_text("utf-8").partition(" ") if path.is_file() else ("", "", "")
        if number != self.number:
            return False  # the word of an earlier run
        if code == "0":
            return True
        kind = {2: BadInputError, 3: RefusedError, 4: RoundError}.get(int(code), UrnaError)
        raise kind((self._run_dir / ERROR_FILE).read_text("utf-8"))

    def _status(self) -> tuple[str, str]:
        runs = _flwr("ls", self._federation, "--run-id", self.number)["runs"]
        assert isinstance(runs, list)
        return str(runs[0]["status"]), str(runs[0]["status-details"])


def start(run_dir: Path) -> FlowerRun:
    """Send a begun campaign to its federation.

    Raises:
        BadInputError: it was not begun for one, runs already, or Flower did not take it.
    """
    path = run_dir / DEPLOYMENT_FILE
    try:
        deployment = Deployment.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError):
        raise RunError(f"expected a run that was begun with --federation, found no {DEPLOYMENT_FILE} in {run_dir}") from None
    _check_federation(deployment.federation)
    journal = Journal.read(run_dir)
    plan = recorded_plan(journal)
    journal.close()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(_run_config(run_dir.resolve(), plan, deployment), encoding="utf-8")
        answer = _flwr("run", str(APP_DIR), deployment.federation, "--run-config", str(config))
    return FlowerRun(run_dir, deployment.federation, str(answer["run-id"]))


def write_exit(run_dir: Path, number: int, code: int) -> None:
    """Say, for the ServerApp, how a Flower run ended: nobody waits for its process. After `record_error`."""
    draft = run_dir / f"{EXIT_FILE}.part"
    draft.write_text(f"{number} {code}", encoding="utf-8")
    draft.replace(run_dir / EXIT_FILE)


def _run_config(run_dir: Path, plan: Plan, deployment: Deployment) -> str:
    """TOML, as Flower reads it: strings only."""
    values = {
        "run-dir": run_dir,
        "plan": plan.model_dump_json(),
        "operator-key": deployment.operator_key,
        "roster": deployment.roster,
    }
    return "".join(f"{key} = {_toml_string(str(value))}\n" for key, value in values.items())


def _toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's, but for DEL


def _check_federation(name: str) -> None:
    """Flower would take a missing or local name for its own simulation, with a SuperLink that stays behind."""
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    path = home / "config.toml"
    try:
        known = tomllib.loads(path.read_text("utf-8")).get("superlink", {}) if path.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: expected TOML, found a syntax error: {error}") from None
    entry = known.get(name) if isinstance(known, dict) else None
    address = entry.get("address", "") if isinstance(entry, dict) else ""
    if not address or address.startswith(":"):
        raise BadInputError(
            f"expected the federation {name!r} as [superlink.{name}] with address and root-certificates in {path}, found "
            f"{'a local one' if address else 'none'}: add it"
        )


def _flwr(*arguments: str) -> dict[str, object]:
    """Answer of a command of Flower's own CLI.

    Raises:
        BadInputError: it failed, with its text.
    """
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"} | os.environ
    command = [sys.executable, "-P", "-m", "flwr.cli.app", *arguments, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False)
    try:
        answer = _ANSWER.validate_json(done.stdout)
    except ValidationError:
        answer = {"error-message": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    if answer.get("success") is not True:
        text = " ".join(str(answer.get("error-message", "no reason given")).split())
        raise BadInputError(f"flwr {arguments[0]}: {text}")
    return answer


def main() -> int:
    """Entry of the engine's process; returns its exit code."""
    sent: list[FlowerRun] = []
    sending = threading.Lock()

    def run(run_dir: Path) -> None:
        with sending:
            sent.append(start(run_dir))
        sent[0].wait()

    def stop() -> None:
        with sending:  # or a run that is just being sent would stay behind
            for one in sent:
                one.stop()

    return engine_process(run, sys.argv[1:], at_interrupt=stop)


if __name__ == "__main__":
    sys.exit(main())
