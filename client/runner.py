"""The runner: one process per site that stays, takes tasks from the site's SuperNode, and answers with the installed Urna.

It takes the place of Flower's SuperExec, which starts a process for every message and runs in it what the operator sent.

    python -m urna.client.runner FOLDER [PARENT_PID]

Covered:
    * the bundle of a run is hashed and noted, and never written, unzipped or imported; `allowed_bundles` refuses all others;
    * a message that is none of Urna's is answered with a code, like one that nobody signed;
    * whatever goes wrong with a message costs that message alone; two fixed texts are all that leaves, details stay in the log;
    * a SuperNode that is away is waited for; a site that cannot be opened is opened again at the next message;
    * SIGTERM and SIGINT end it in under 5 seconds: a message that is not answered by then is dropped, as by a crash, for which
      the ledger is made; more signals change nothing.
Not covered:
    * what a message asks for: `Site` decides that; code that this machine's own administrator installs.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from urna.client.flower_runtime import (
    INVALID_BUNDLE,
    RAISED,
    Answer,
    LinkError,
    OversizedError,
    Runtime,
    Task,
)
from urna.client.local_log import Event, local_log, write
from urna.client.supervisor import SECRET_FILE, end_with, linked, say
from urna.protocol.errors import SiteConfigError, UrnaError

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from urna.client.site import Site

    Beside = Callable[[Site], contextlib.AbstractContextManager[object]]

CANNOT_ANSWER = "this site cannot answer; its own log says why"
NO_SUCH_BUNDLE = "this site does not take this bundle"
ACTIVE_SECONDS = 60.0  # after a message, in which the next one is looked for often
ACTIVE_POLL_SECONDS, IDLE_POLL_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 1.0, 5.0
GRACE_SECONDS, DROP_SECONDS = 3.0, 1.0  # for the message at hand, once told to stop; to tell its sender that there is no answer
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Runner:
    """Takes one task after the other until told to stop.

    Args:
        runtime: of the SuperNode.
        answer: from a message's record to the reply's; what it means is not known here.
        log: of the site.
        allowed_bundles: SHA-256 of those that a run may come with; None: any.
        on_bundle: called with the hash and the run's id of every message, before it is answered.
    """

    def __init__(
        self,
        runtime: Runtime,
        answer: Answer,
        log: logging.Logger,
        *,
        allowed_bundles: Collection[str] | None = None,
        on_bundle: Callable[[str, int], None] | None = None,
    ) -> None:
        self._runtime, self._answer, self._log = runtime, answer, log
        self._allowed, self._on_bundle = allowed_bundles, on_bundle
        self._task: Task | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a message is being answered at this moment."""
        return self._task is not None

    def serve(self, stop: threading.Event) -> None:
        """Answer messages until ``stop`` is set; a message at hand is answered first."""
        last_task_at, failures = -ACTIVE_SECONDS, 0
        while not stop.is_set():
            try:
                self._task = self._runtime.acquire()
            except (LinkError, OversizedError) as error:
                failures += 1
                if failures == 1:
                    write(self._log, Event.SUPERNODE_LOST, level=logging.WARNING, error=error)
                    say(f"runner: {error}; it is asked again until it answers")
                stop.wait(min(ACTIVE_POLL_SECONDS * 2 ** min(failures, 10), LONGEST_RETRY_SECONDS))
                continue
            if failures:
                write(self._log, Event.SUPERNODE_BACK)
                say("runner: the SuperNode answers again")
                failures = 0
            if self._task is not None:
                self._work(self._task)
                self._task, last_task_at = None, time.monotonic()
                continue  # without a pause: the SuperNode may have another
            is_active = time.monotonic() - last_task_at < ACTIVE_SECONDS
            stop.wait(ACTIVE_POLL_SECONDS if is_active else IDLE_POLL_SECONDS)

    def drop(self) -> None:
        """Tell the sender of the message at hand that there will be no answer; called from another thread."""
        task = self._task
        if task is not None:
            with contextlib.suppress(LinkError, OversizedError):
                task.refuse(RAISED, CANNOT_ANSWER)

    def _work(self, task: Task) -> None:
        """Answer one message, or let its sender know that there is no answer."""
        with task.alive():
            try:
                task.read_header()
            except Exception as error:  # the edge: without a header there is nobody to answer; Flower gives the task up itself
                self._failed(task, error)
                with contextlib.suppress(Exception):
                    task.open_bundle()  # a task that was begun and dies is answered by the SuperNode
                return
            try:
                if not self._takes(task):
                    task.refuse(INVALID_BUNDLE, NO_SUCH_BUNDLE)
                    return
                task.reply(self._answer(task.read_content()))
            except Exception as error:  # the edge: whatever happened, a fixed text leaves
                self._failed(task, error)
                with contextlib.suppress(UrnaError):
                    task.refuse(RAISED, CANNOT_ANSWER)

    def _takes(self, task: Task) -> bool:
        """Look at what a run came with: its hash, and nothing of its content."""
        try:
            bundle = task.open_bundle()
        except OversizedError as error:
            write(self._log, Event.BUNDLE_REFUSED, f"run {task.run_id}", level=logging.WARNING, error=error)
            return False
        why = ""
        if not task.is_for_client_app:
            why = "an agent's task"
        elif not bundle.is_as_declared:
            why = "not what the SuperLink says it is"
        elif self._allowed is not None and bundle.sha256 not in self._allowed:
            why = "not on link.allowed_bundles"
        detail = f"run {task.run_id}, bundle {bundle.sha256}"
        if why:
            write(self._log, Event.BUNDLE_REFUSED, f"{detail}: {why}", level=logging.WARNING)
        else:
            write(self._log, Event.BUNDLE_SEEN, detail)
        if self._on_bundle is not None:
            self._on_bundle(bundle.sha256, task.run_id)
        return not why

    def _failed(self, task: Task, error: Exception) -> None:
        write(self._log, Event.REQUEST_FAILED, f"run {task.run_id}", level=logging.ERROR, error=error)


class WarmSite:
    """The site behind `Answer`: opened once and kept; while it cannot be opened, tried again at every message.

    Args:
        folder: of the site.
        beside: what runs as long as the site is open, as the control socket; entered once, with the site.
    """

    def __init__(self, folder: Path, beside: "Beside | None" = None) -> None:
        self._folder, self._beside = folder, beside
        self._site: Site | None = None
        self._opened = contextlib.ExitStack()

    def __call__(self, content: "RecordDict") -> "RecordDict":
        """Answer one message."""
        from urna.client.app import answer_record

        return answer_record(self.open(), content)

    def open(self) -> "Site":
        """The site.

        Raises:
            UrnaError: it cannot be opened.
        """
        if self._site is None:
            from urna.client.site import open_site

            with contextlib.ExitStack() as opening:
                site = open_site(self._folder)
                opening.callback(site.close)
                site.hold()
                if self._beside is not None:
                    opening.enter_context(self._beside(site))
                self._opened, self._site = opening.pop_all(), site
        return self._site

    def saw_bundle(self, sha256: str, run_id: int) -> None:
        """Record a bundle in the ledger; while there is none to record it in, the message is not answered."""
        self.open().saw_bundle(sha256, run_id)

    def close(self) -> None:
        """End what runs beside the site, and close the ledger."""
        self._opened.close()
        self._site = None


def run(
    folder: Path,
    parent: int | None = None,
    *,
    beside: "Beside | None" = None,
) -> int:
    """Serve the site in ``folder`` until SIGTERM or SIGINT; returns the exit code.

    Args:
        folder: of the site; its ``runtime.secret`` is what the SuperNode was started with.
        parent: process id; the runner ends when this process does.
        beside: see `WarmSite`; None: the control socket, for the people of the site.

    Raises:
        SiteConfigError: site.toml cannot be used, has no ``[link]``, or there is no secret.
    """
    folder = folder.resolve()
    config, link = linked(folder)
    secret = _read_secret(folder)
    with _signals_as_event(parent) as (stop, ended):
        log = local_log(config.name, folder)
        site, runtime = WarmSite(folder, beside or attended), Runtime(f"127.0.0.1:{link.runtime_port}", secret)
        runner = Runner(runtime, site, log, allowed_bundles=link.allowed_bundles, on_bundle=site.saw_bundle)
        threading.Thread(target=_end, args=(runner, stop, ended), name="end of the runner", daemon=True).start()
        write(log, Event.STARTED, f"runner, process {os.getpid()}")
        _warm_up(site, config.name, log)
        try:
            runner.serve(stop)
        finally:
            site.close()
            runtime.close()
        write(log, Event.STOPPED, f"runner, process {os.getpid()}")
    return 0


def attended(site: "Site") -> "contextlib.AbstractContextManager[object]":
    """The control socket, for the people of the site."""
    from urna.client.control import serve
    from urna.client.desk import LedgerDesk

    desk = LedgerDesk(site.config.name, site.config.policy, site.roster, site.ledger, work=lambda: site.work)
    return serve(site.folder, desk, site.log)


def _warm_up(site: WarmSite, name: str, log: logging.Logger) -> None:
    try:
        site.open()
    except Exception as error:  # the edge: the runner stays, and says at every message that there is no answer
        write(log, Event.REQUEST_FAILED, "the site cannot be opened", level=logging.ERROR, error=error)
        say(f"runner: {name} cannot be opened, site.log says why; it is tried again at every message")
    else:
        say(f"runner: {name} is open")


@contextmanager
def _signals_as_event(parent: int | None) -> Iterator[tuple[threading.Event, threading.Event]]:
    """``stop`` and ``ended``.

    Python runs a handler between two steps of the main thread, which may be long in torch; but when a signal arrives it writes
    a byte, which a thread reads at once.
    """
    stop, ended = threading.Event(), threading.Event()
    arrived, arrives = socket.socketpair()
    arrives.setblocking(False)  # what is not read yet is enough
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(arrives.fileno(), warn_on_full_buffer=False)
    if parent is not None:
        end_with(parent)

    def wait() -> None:
        if arrived.recv(1):  # nothing: it was closed
            stop.set()

    waiting = threading.Thread(target=wait, name="signals", daemon=True)
    waiting.start()
    try:
        yield stop, ended
    finally:
        ended.set()
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.is_set() else handler)  # one more must not undo a clean end
        arrives.close()
        waiting.join()
        arrived.close()


def _end(runner: Runner, stop: threading.Event, ended: threading.Event) -> None:
    """See to it that a runner that was told to stop does."""
    stop.wait()
    if ended.wait(GRACE_SECONDS):
        return
    dropping = threading.Thread(target=runner.drop, daemon=True)
    dropping.start()
    dropping.join(DROP_SECONDS)
    os._exit(0)  # as by a crash: every release is on disk before it leaves, and nothing else needs to be


def _read_secret(folder: Path) -> bytes:
    path = folder / SECRET_FILE
    try:
        secret = path.read_bytes()
    except OSError:
        secret = b""
    if not secret:
        raise SiteConfigError(f"expected the SuperNode's secret at {path}, found none: `urna-site up` makes one")
    return secret


def main() -> int:
    """Entry of the runner's process."""
    parent = int(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        return run(Path(sys.argv[1]), parent)
    except UrnaError as error:
        say(f"runner: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
