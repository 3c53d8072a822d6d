"""The operator's metrics: a view of the journals under a folder of runs, in Prometheus' format.

A ServerApp lives as long as a run, so nothing is counted in a process: every scrape reads what the journals gained since the
last one. Counters are therefore monotonic across restarts of the run and of the monitor.

Covered: label values come from closed sets (the newest runs' folder names, stages, the members' names, the plan's
candidates, codes); only public numbers are shown (opened, noised sums and what they cost); a folder that is no run, or a
broken one, is counted and never breaks a scrape; it listens on loopback unless told otherwise.
Not covered: TLS and passwords (put a proxy in front before listening elsewhere); a site's own numbers (`urna-site` has its
own metrics); cardinality of very wide federations (two series of a site for each of the newest runs).
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from urna.protocol.errors import BadInputError
from urna.server.journal import JOURNAL_FILE
from urna.server.run_view import STATES, Measured, RoundFact, RunView, updated

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 9464
MAX_RUNS = 20  # the newest; older ones stay in their folders, and in Prometheus as long as it keeps them
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ENGINES = ("embedded", "flower", "memory")
FOLDERS = ("read", "older", "unreadable", "foreign")
PAGE = b"""<!doctype html><title>urna monitor</title>
<h1>urna monitor</h1><p>The runs of this folder, for Prometheus: <a href="/metrics">/metrics</a></p>
"""
log = logging.getLogger(__name__)

Labelled = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True)
class Shown:
    """One metric: how its samples come from a run; the label ``run`` is put before ``labels``."""

    name: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[RunView], Labelled]
    counter: bool = False


def _last(run: RunView, number: Callable[[RoundFact], float]) -> Labelled:
    return [((), number(run.rounds[-1]))] if run.rounds else []


def _latest(run: RunView, number: Callable[[Measured], float]) -> Labelled:
    return [] if run.latest is None else [((), number(run.latest))]


def _measured(run: RunView, number: Callable[[Measured], float]) -> Labelled:
    return [((one.purpose, one.candidate), number(one)) for one in run.measured]


def _info(run: RunView) -> Labelled:
    assert run.run is not None
    engine = run.run.engine if run.run.engine in ENGINES else "other"
    return [((run.plan.name, engine, run.winner), 1)]


# fmt: off
SHOWN = (
    Shown("urna_run_info", "What a run is: its plan, its engine and, once it is decided, the winning candidate; always 1.",
          ("plan", "engine", "winner"), _info),
    Shown("urna_run_state", "1 for the state a run is in, 0 for the others.",
          ("state",), lambda run: [((one,), run.state == one) for one in STATES]),
    Shown("urna_run_starts_total", "Times a run was started or resumed.",
          (), lambda run: [((), run.starts)], counter=True),
    Shown("urna_run_started_timestamp_seconds", "When a run was begun, Unix time.",
          (), lambda run: [((), run.run.started_at)] if run.run else []),
    Shown("urna_run_last_event_timestamp_seconds", "When a run last wrote into its journal, Unix time.",
          (), lambda run: [((), run.last_at)]),
    Shown("urna_progress_ratio", "Steps done of steps planned, 0 to 1; a runoff, once decided on, adds steps.",
          (), lambda run: [((), run.progress)]),
    Shown("urna_stage_rounds_total", "Rounds asked, by stage and by outcome: opened, or lost with nothing of it opened.",
          ("stage", "outcome"), lambda run: run.outcomes.items(), counter=True),
    Shown("urna_last_round_seconds", "How long the last round of a stage took.",
          ("stage",), lambda run: [((stage,), all_of[-1]) for stage, all_of in run.seconds.items()]),
    Shown("urna_round_timeout_seconds", "How long each of a round's two exchanges may take by the plan.",
          (), lambda run: [((), run.plan.federation.round_timeout_seconds)]),
    Shown("urna_member_sites", "Sites that joined the run.",
          (), lambda run: [((), len(run.members))]),
    Shown("urna_cohort_sites", "Sites that the last round was asked of.",
          (), lambda run: _last(run, lambda one: len(one.cohort))),
    Shown("urna_delivered_sites", "Sites that delivered in the last round.",
          (), lambda run: _last(run, lambda one: len(one.cohort) - len(one.dropped))),
    Shown("urna_min_sites", "Fewest sites that the plan asks; a sum also needs more than two thirds of its cohort.",
          (), lambda run: [((), run.plan.federation.min_sites)]),
    Shown("urna_dropouts_total", "Rounds in which a member did not deliver, by reason.",
          ("site", "reason"), lambda run: run.dropouts.items(), counter=True),
    Shown("urna_epsilon_planned", "Epsilon that the plan allows for every record.",
          (), lambda run: [((), run.plan.privacy.epsilon)]),
    Shown("urna_epsilon_spent", "Epsilon of a partition's records up to and with a stage, had every site answered.",
          ("stage", "partition"), lambda run: run.spent.items()),
    Shown("urna_epsilon_left", "Epsilon of the plan that a partition's records have not spent.",
          ("partition",), lambda run: [((name,), value) for name, value in run.left.items()]),
    Shown("urna_site_epsilon", "Epsilon that the run cost a site's records, by that site's own ledger.",
          ("site",), lambda run: [((site,), one.epsilon) for site, one in run.statements.items()]),
    Shown("urna_accuracy", "Noisy held-out accuracy, by what it was measured for; noise may carry it past 0 or 1.",
          ("purpose", "candidate"), lambda run: _measured(run, lambda one: one.accuracy)),
    Shown("urna_accuracy_stderr", "Standard error of urna_accuracy, noise and sampling.",
          ("purpose", "candidate"), lambda run: _measured(run, lambda one: one.stderr)),
    Shown("urna_accuracy_latest", "Noisy held-out accuracy of the model being fine-tuned, as last measured.",
          (), lambda run: _latest(run, lambda one: one.accuracy)),
    Shown("urna_accuracy_latest_stderr", "Standard error of urna_accuracy_latest.",
          (), lambda run: _latest(run, lambda one: one.stderr)),
    Shown("urna_ballot_score", "A candidate's noisy mean score in the ballot, relative to the mean candidate.",
          ("candidate",), lambda run: [((one.name,), one.score) for one in run.standings]),
    Shown("urna_ballot_score_stderr", "Standard error of urna_ballot_score.",
          ("candidate",), lambda run: [((one.name,), one.stderr) for one in run.standings]),
    Shown("urna_ballot_undecided", "1 when the ballot's leaders were too close to call, or no ballot opened.",
          (), lambda run: [] if run.ballot is None else [((), run.ballot.undecided)]),
)
# fmt: on


class RunsCollector(Collector):
    """Reads the journals of the newest runs at every scrape.

    Args:
        runs_dir: its sub-folders are runs.
    """

    def __init__(self, runs_dir: Path) -> None:
        self._runs_dir = runs_dir
        self._views: dict[tuple[str, int], RunView] = {}  # by folder name and the journal's inode
        self._complaints: dict[str, str] = {}  # logged already
        self._lock = threading.Lock()  # two scrapes at once would read an entry twice

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, from the journals as they are now."""
        started = time.perf_counter()
        with self._lock:
            views, folders = self._read()
            metrics = [_metric(shown, views) for shown in SHOWN] + [_round_seconds(views)]
        up = GaugeMetricFamily("urna_store_up", "1 when the folder of runs could be listed.", value=folders is not None)
        kinds = GaugeMetricFamily("urna_store_folders", "Folders beside the runs, by what was done with them.", labels=["kind"])
        for kind in FOLDERS:
            kinds.add_metric([kind], (folders or {}).get(kind, 0))
        seconds = time.perf_counter() - started
        yield from metrics
        yield up
        yield kinds
        yield GaugeMetricFamily("urna_store_read_seconds", "How long this reading of the journals took.", value=seconds)

    def _read(self) -> tuple[list[RunView], Mapping[str, int] | None]:
        """The newest runs that can be read, and how many folders there are of each kind; None: nothing could be listed."""
        try:
            journals, num_foreign = _journals(self._runs_dir)
        except OSError as error:
            self._complain("", f"{self._runs_dir} cannot be listed: {error.strerror}")
            return [], None
        views: dict[tuple[str, int], RunView] = {}
        for run_dir, inode in journals[:MAX_RUNS]:
            key = (run_dir.name, inode)
            try:
                views[key] = updated(self._views.get(key) or RunView(run_dir.name), run_dir)
                self._complaints.pop(run_dir.name, None)
            except Exception as error:  # the edge of a scrape: whatever is in that file, the other runs are shown
                self._complain(run_dir.name, f"run {run_dir.name} cannot be read: {error}")
        self._views = views
        num_newest = len(journals[:MAX_RUNS])
        counted = {"read": len(views), "older": len(journals) - num_newest, "unreadable": num_newest - len(views)}
        return list(views.values()), counted | {"foreign": num_foreign}

    def _complain(self, name: str, text: str) -> None:
        if self._complaints.get(name) != text:
            self._complaints[name] = text
            log.warning("%s", text)


def _journals(runs_dir: Path) -> tuple[list[tuple[Path, int]], int]:
    """Folders with a journal and its inode, the last written first; how many folders are no run."""
    found = []
    num_foreign = 0
    for folder in runs_dir.iterdir():
        if not folder.is_dir():
            continue
        file = folder / JOURNAL_FILE
        if not file.is_file() or not RUN_NAME.fullmatch(folder.name):
            num_foreign += 1
            continue
        ahead = file.with_name(f"{JOURNAL_FILE}-wal")  # written before the journal itself
        written = max(one.stat().st_mtime for one in (file, ahead) if one == file or ahead.exists())
        found.append((written, folder, file.stat().st_ino))
    return [(folder, inode) for _, folder, inode in sorted(found, reverse=True)], num_foreign


def _metric(shown: Shown, views: Iterable[RunView]) -> Metric:
    family = CounterMetricFamily if shown.counter else GaugeMetricFamily
    metric: CounterMetricFamily | GaugeMetricFamily = family(shown.name, shown.help, labels=["run", *shown.labels])
    for view in views:
        for labels, value in shown.samples(view):
            metric.add_metric([view.name, *labels], value)
    return metric


def _round_seconds(views: Iterable[RunView]) -> Metric:
    metric = SummaryMetricFamily("urna_round_seconds", "How long rounds took, by stage.", labels=["run", "stage"])
    for view in views:
        for stage, seconds in view.seconds.items():
            metric.add_metric([view.name, stage], count_value=len(seconds), sum_value=sum(seconds))
    return metric


@dataclass(frozen=True)
class Monitor:
    """A monitor that is being served; `close` ends it."""

    host: str
    port: int
    _server: ThreadingWSGIServer
    _thread: threading.Thread

    @property
    def url(self) -> str:
        """Where Prometheus finds the metrics."""
        return f"http://{self.host}:{self.port}/metrics"

    def wait(self) -> None:
        """Until somebody closes it."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(runs_dir: Path, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT) -> Monitor:
    """Serve the metrics of the runs in ``runs_dir`` from a thread.

    Args:
        runs_dir: the folder that holds the runs' folders.
        host: address or name (IPv4) to listen on; anything but loopback shows the numbers to whoever reaches it.
        port: 0 for any free one; see the result's ``port``.

    Raises:
        BadInputError: there is no such folder, or the address cannot be listened on.
    """
    if not runs_dir.is_dir():
        raise BadInputError(f"expected a folder of runs at {runs_dir}, found {'a file' if runs_dir.exists() else 'nothing'}")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunsCollector(runs_dir))
    metrics = make_wsgi_app(registry)

    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        found = path == "/"
        start_response("200 OK" if found else "404 Not Found", [("Content-Type", "text/html; charset=utf-8")])
        return [PAGE if found else b"not here: see /metrics\n"]

    try:
        server = make_server(host, port, app, server_class=ThreadingWSGIServer, handler_class=_QuietHandler)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise BadInputError(f"expected an address to listen on, found {host}:{port}: {why}; choose another --port") from None
    thread = threading.Thread(target=server.serve_forever, name="urna-monitor", daemon=True)
    thread.start()
    return Monitor(host, server.server_port, server, thread)


def serve_forever(
    runs_dir: Path, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, ready: Callable[[Monitor], None] | None = None
) -> None:
    """Serve until Ctrl-C; ``ready`` is called once the port is open.

    Raises:
        BadInputError: see `serve`.
    """
    with closing(serve(runs_dir, host, port)) as monitor:
        try:
            if ready is not None:
                ready(monitor)
            monitor.wait()
        except KeyboardInterrupt:
            pass


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's signature
        """A scrape every few seconds is no news."""
