"""`urna-site up`: starts a site's SuperNode and its runner, and starts again whichever of them ends.

The two are processes of their own. The SuperNode reads what comes from outside and is told nothing about the records: not in
its arguments, not in its environment, and its paths are relative to a folder with nothing in it.

Covered:
    * either process dies: it is started again, after a pause that grows to a limit and shrinks after a good minute;
    * Flower's exit 305 (the SuperLink still waits for a SuperNode that died): tried again every few seconds, by itself;
    * the supervisor is told to stop: the runner ends first, then the SuperNode; the supervisor dies: both end;
    * the SuperNode's environment: a short list of names passes, whatever else this process was given does not.
Not covered:
    * a SuperNode that was broken into: it is the same user's process, and could read the site's files. Where that matters,
      start it as another user, and `urna-site run` beside it.
"""

import fcntl
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from urna.client.config import CONFIG_FILE, Link, SiteConfig, load_site_config
from urna.protocol.errors import SiteConfigError, UrnaError

SECRET_FILE, SUPERNODE_FOLDER, SUPERNODE_LOG = "runtime.secret", "supernode", "supernode.log"
LOG_LIMIT_BYTES = 10_000_000
LOOK_SECONDS = 0.5
FIRST_PAUSE_SECONDS, GOOD_SECONDS = 1.0, 60.0
LONGEST_PAUSE_SECONDS = {"SuperNode": 3.0, "runner": 10.0}  # at first; after some bad minutes it is LAST_PAUSE_SECONDS
BAD_SECONDS, LAST_PAUSE_SECONDS = 180.0, 30.0
STOP_SECONDS = {"SuperNode": 8.0, "runner": 5.0}  # a SuperNode takes leave of the SuperLink
LEAVE_SECONDS = 0.5  # in which a last reply gets from the SuperNode on its way
PASSED_ON = {  # names of the environment that a SuperNode may need
    *("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "FLWR_LOG_LEVEL"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
}
FLOWER = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
CONNECTED, NOT_YET = b"SuperNode ID: ", b"Exit Code: 305"


@dataclass(frozen=True)
class Command:
    """How one of the two is started."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    log: Path | None  # None: what it says goes where the supervisor's words go


class Part:
    """One of the two processes, and when it is started again.

    Args:
        name: as people are told.
        command: how it is started.
    """

    def __init__(self, name: str, command: Command) -> None:
        self.name, self._command = name, command
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._started_at = self._start_at = self._bad_since = time.monotonic()
        self._log_start = 0
        self._said = ""
        self._is_connected = False

    def look(self) -> None:
        """Start it if it is time, notice that it ended, and say what changed."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start(now)
            return
        code = self._process.poll()
        if code is None:
            with suppress(OSError):  # somebody moved it away, or the disk is full: no reason to end a site
                self._watch_log()
            return
        if now - self._started_at >= GOOD_SECONDS:
            self._pause_seconds, self._bad_since = FIRST_PAUSE_SECONDS, now
        self._process, self._is_connected = None, False
        self._start_at = now + self._pause_seconds
        longest = LONGEST_PAUSE_SECONDS[self.name] if now - self._bad_since < BAD_SECONDS else LAST_PAUSE_SECONDS
        self._pause_seconds = min(2 * self._pause_seconds, longest)
        if self._command.log and NOT_YET in self._new_log():
            self._say(
                "the SuperLink does not let it in (Flower's exit 305): for up to a minute after a crash it cannot; after that, "
                "see whether its key is registered; tried again every few seconds"
            )
        else:
            where = f", {self._command.log.name} says why" if self._command.log else ""
            self._say(f"ended with {_exit_in_words(code)}{where}; it is started again")

    def stop(self) -> None:
        """End it, politely first."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS[self.name])
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._say("stopped")

    def _start(self, now: float) -> None:
        log = self._command.log
        self._started_at, self._start_at = now, now + LONGEST_PAUSE_SECONDS[self.name]  # the latter if it cannot be started
        try:
            with _output(log) as output:
                self._log_start = log.stat().st_size if log else 0
                self._process = subprocess.Popen(
                    self._command.words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=dict(self._command.environment),
                    cwd=self._command.folder,
                    start_new_session=True,  # Ctrl-C in a terminal is for the supervisor, which keeps the order
                )
        except OSError as error:
            self._say(f"cannot be started ({error.strerror}); it is tried again")
            return
        if log is None or not self._said:
            self._say(f"started as process {self._process.pid}")

    def _watch_log(self) -> None:
        log = self._command.log
        if log is None or (self._is_connected and log.stat().st_size < LOG_LIMIT_BYTES):
            return
        if not self._is_connected and CONNECTED in self._new_log():
            self._is_connected = True
            self._say("connected to the SuperLink")
        if log.stat().st_size >= LOG_LIMIT_BYTES:  # it writes at the end, wherever that is
            _set_aside(log)
            self._log_start = 0

    def _new_log(self) -> bytes:
        """What it has written since its start; at most a few lines are there when it matters."""
        if self._command.log is None:
            return b""
        with suppress(OSError), self._command.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read(1_000_000)
        return b""

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            say(f"{self.name}: {text}")


def up(folder: Path) -> int:
    """Keep the SuperNode and the runner of the site in ``folder`` running until SIGTERM or SIGINT; returns the exit code.

    Raises:
        SiteConfigError: site.toml cannot be used or has no ``[link]``, a file it names is missing, or another process is doing
            this already.
    """
    folder = folder.resolve()
    _, link = linked(folder)
    for name in (link.root_certificates, link.node_key):
        if not (folder / name).is_file():
            raise SiteConfigError(f"{folder / CONFIG_FILE}: link: expected a file at {folder / name}, found none")
    stop = threading.Event()
    with _only_one(folder), _told_to_stop(stop):
        supernode, runner = Part("SuperNode", supernode_command(folder, link)), Part("runner", runner_command(folder))
        try:
            while not stop.wait(LOOK_SECONDS):
                supernode.look()
                runner.look()
        finally:
            runner.stop()
            time.sleep(LEAVE_SECONDS)
            supernode.stop()
    return 0


def supernode_command(folder: Path, link: Link) -> Command:
    """Flower's SuperNode for a site, in process isolation: it starts nothing and runs nothing that it was sent."""
    home = folder / SUPERNODE_FOLDER
    home.mkdir(mode=0o700, exist_ok=True)
    words = [sys.executable, "-P", "-m", "urna.client.flower_runtime", str(os.getpid())]
    words += ["--superlink", link.superlink, "--isolation", "process"]
    words += ["--root-certificates", os.path.relpath(folder / link.root_certificates, home)]
    words += ["--auth-supernode-private-key", os.path.relpath(folder / link.node_key, home)]
    words += ["--superexec-auth-secret-file", os.path.relpath(folder / SECRET_FILE, home)]
    words += ["--host", "127.0.0.1", "--port", str(link.runtime_port)]
    words += ["--health-server-address", f"127.0.0.1:{link.health_port}"]
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return Command(tuple(words), passed | FLOWER | {"FLWR_HOME": "."}, home, home / SUPERNODE_LOG)


def runner_command(folder: Path) -> Command:
    """The site's runner."""
    words = (sys.executable, "-P", "-m", "urna.client.runner", str(folder), str(os.getpid()))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return Command(words, kept | FLOWER, folder, None)


def linked(folder: Path) -> tuple[SiteConfig, Link]:
    """A site's configuration and its ``[link]``.

    Raises:
        SiteConfigError: site.toml cannot be used, or has no ``[link]``.
    """
    config = load_site_config(folder)
    if config.link is None:
        raise SiteConfigError(f'{folder / CONFIG_FILE}: expected [link] with superlink = "host:port", found none: add it')
    return config, config.link


def end_with(parent: int) -> None:
    """Let this process be terminated when its parent ``parent`` is gone, and killed if it does not end then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(max(STOP_SECONDS.values()))
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def say(text: str) -> None:
    """One line for the person, or the journal, at this machine."""
    with suppress(OSError):  # a terminal that was closed must not end a site
        print(text, flush=True)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the secret's file, which is made if it is missing: it is read by both, and two of each would share a port."""
    path = folder / SECRET_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SiteConfigError(f"{folder}: `urna-site up` runs here already: stop it first") from None
        os.fchmod(descriptor, 0o600)
        if os.fstat(descriptor).st_size == 0:
            os.write(descriptor, secrets.token_hex(32).encode("ascii"))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _told_to_stop(stop: threading.Event) -> Iterator[None]:
    """Set ``stop`` at SIGTERM or SIGINT, however often they come."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _output(log: Path | None) -> Iterator[int | None]:
    """Where a process writes to: the end of a file that only its owner can read; None: where this one does."""
    if log is None:
        yield None
        return
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _set_aside(log: Path) -> None:
    """Move what a log holds to another file, for its owner alone; what was there before is lost."""
    old = log.with_suffix(".log.old")
    old.unlink(missing_ok=True)
    with _output(old) as output, open(output or 0, "wb", closefd=False) as file:
        file.write(log.read_bytes())
    os.truncate(log, 0)


def _exit_in_words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def main() -> int:
    """Entry: ``python -m urna.client.supervisor FOLDER``, as `urna-site up FOLDER`."""
    try:
        return up(Path(sys.argv[1]))
    except UrnaError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
