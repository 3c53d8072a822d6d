import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from urna.client import supervisor
from urna.client.config import Link
from urna.client.supervisor import (
    LONGEST_PAUSE_SECONDS,
    SECRET_FILE,
    SUPERNODE_LOG,
    Command,
    Part,
    runner_command,
    supernode_command,
    up,
)
from urna.protocol.errors import SiteConfigError

LINK = Link(superlink="fleet.example.org:443", allowed_bundles=None)
SITE = """
name = "site-1"
[[dataset]]
name = "digits"
format = "csv"
modality = "image"
path = "records.csv"
num_records = 60
num_classes = 3
image_height = 8
image_width = 8
max_value = 16.0
[policy]
epsilon_total = 8.0
epsilon_per_campaign = 4.0
delta = 1e-4
[link]
superlink = "127.0.0.1:{port}"
runtime_port = {runtime}
health_port = {health}
"""


def wait_for(holds: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def a_part(tmp_path: Path, script: str, name: str = "runner", log: Path | None = None) -> Part:
    return Part(name, Command((sys.executable, "-c", script), dict(os.environ), tmp_path, log))


def looked(part: Part) -> Part:
    part.look()
    return part


def process_of(part: Part) -> "subprocess.Popen[bytes]":
    process = part._process
    assert process is not None
    return process


def until_ended(part: Part) -> None:
    process_of(part).wait(30)
    part.look()
    assert part._process is None


def test_the_supernode_is_told_nothing_about_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://urna:password@warehouse/patients")
    monkeypatch.setenv("URNA_SITE", str(tmp_path))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = supernode_command(tmp_path, LINK)
    told = " ".join([*command.words, *command.environment.values()])
    assert str(tmp_path) not in told
    assert "patients" not in told
    assert set(command.environment) <= supervisor.PASSED_ON | {"FLWR_HOME", *supervisor.FLOWER}
    assert command.environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert command.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert list(command.folder.iterdir()) == []
    assert command.folder.stat().st_mode & 0o777 == 0o700


def test_its_paths_are_those_of_the_site_seen_from_where_it_starts(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = LINK.model_copy(update={"root_certificates": str(tmp_path / "elsewhere" / "ca.pem")})
    command = supernode_command(tmp_path, link)
    words = command.words
    for option, path in (
        ("--root-certificates", tmp_path / "elsewhere" / "ca.pem"),
        ("--auth-supernode-private-key", tmp_path / "node.key"),
        ("--superexec-auth-secret-file", tmp_path / SECRET_FILE),
    ):
        assert (command.folder / words[words.index(option) + 1]).resolve() == path.resolve()


def test_the_runner_keeps_its_environment_and_tells_flower_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://warehouse/patients")
    monkeypatch.setenv("FLWR_HOME", "/anywhere")
    command = runner_command(tmp_path)
    assert command.environment["DATABASE_URL"] == "postgresql://warehouse/patients"
    assert {name for name in command.environment if name.startswith("FLWR_")} == set(supervisor.FLOWER)
    assert "-P" in command.words  # nothing is imported from the folder it starts in


def test_what_dies_is_started_again_after_a_pause_that_grows_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setitem(LONGEST_PAUSE_SECONDS, "runner", 0.1)
    part = a_part(tmp_path, "raise SystemExit(7)")
    pauses = []
    for _ in range(5):
        wait_for(lambda: looked(part)._process)
        until_ended(part)
        pauses.append(part._start_at - time.monotonic())
    assert part._pause_seconds == 0.1
    assert max(pauses) <= 0.1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("runner: started as process ")
    assert said[1] == "runner: ended with exit 7; it is started again"
    assert len(said) == 10  # one line a change


def test_a_good_minute_makes_the_pause_short_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = a_part(tmp_path, "")
    part._pause_seconds, part._bad_since = 16.0, time.monotonic() - 1000
    part.look()
    part._started_at -= 61
    until_ended(part)
    assert part._start_at - time.monotonic() <= 1.0
    assert part._pause_seconds == 2.0
    monkeypatch.setattr(part, "_start_at", 0.0)
    part.look()
    process_of(part).wait(30)


def test_what_stays_bad_is_tried_less_often(tmp_path: Path) -> None:
    part = a_part(tmp_path, "raise SystemExit(1)", "SuperNode")
    part._pause_seconds, part._bad_since = 20.0, time.monotonic() - 181  # as one whose key nobody ever registered
    part.look()
    until_ended(part)
    assert part._pause_seconds == 30.0


def test_a_program_that_is_not_there_is_said_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = Part("runner", Command((str(tmp_path / "none"),), {}, tmp_path, None))
    part.look()
    part.look()
    part.stop()
    assert capsys.readouterr().out == "runner: cannot be started (No such file or directory); it is tried again\n"


def test_flowers_exit_305_is_said_once_and_tried_again_without_a_human(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.01)
    script = """
import pathlib, time
seen = pathlib.Path("tries")
seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
if len(seen.read_text()) < 4:
    print("Exit Code: 305\\n[2004] Failed to activate SuperNode")
    raise SystemExit(1)
print("INFO : SuperNode ID: 123", flush=True)
time.sleep(1000)
"""
    part = a_part(tmp_path, script, "SuperNode", tmp_path / SUPERNODE_LOG)
    said: list[str] = []

    def connected() -> bool:
        part.look()
        said.extend(capsys.readouterr().out.splitlines())
        return any("connected" in line for line in said)

    wait_for(connected)
    part.stop()
    assert [line.split(" (")[0].split(" as ")[0] for line in said] == [
        "SuperNode: started",
        "SuperNode: the SuperLink does not let it in",
        "SuperNode: connected to the SuperLink",
    ]
    assert (tmp_path / SUPERNODE_LOG).stat().st_mode & 0o777 == 0o600
    # Flower's old heartbeat expires 43 seconds after a crash; then the next attempt gets in
    assert LONGEST_PAUSE_SECONDS["SuperNode"] <= 5


def test_its_log_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_LIMIT_BYTES", 10_000)
    log = tmp_path / SUPERNODE_LOG
    script = "import time\nfor _ in range(3000): print('x' * 99, flush=True); time.sleep(0.0001)\ntime.sleep(1000)"
    part = a_part(tmp_path, script, "SuperNode", log)
    wait_for(lambda: looked(part) and (tmp_path / "supernode.log.old").is_file())
    part.stop()
    assert (tmp_path / "supernode.log.old").stat().st_mode & 0o777 == 0o600


def test_a_part_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervisor.STOP_SECONDS, "runner", 0.2)
    script = "import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path('up').touch(); time.sleep(1000)"
    part = a_part(tmp_path, script)
    part.look()
    wait_for((tmp_path / "up").is_file)
    process = process_of(part)
    part.stop()
    assert process.returncode == -signal.SIGKILL


# ---- `up`


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site whose SuperLink does not answer."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        port, runtime, health = (one.getsockname()[1] for one in sockets)
    (tmp_path / "site.toml").write_text(SITE.format(port=port, runtime=runtime, health=health), encoding="utf-8")
    for name in ("ca.pem", "node.key"):
        (tmp_path / name).touch()
    return tmp_path


@contextlib.contextmanager
def supervised(site: Path) -> Iterator["subprocess.Popen[str]"]:
    """`up`, with two processes in the places of the SuperNode and the runner that only say what happens to them."""
    script = """
import pathlib, sys
from urna.client import supervisor
child = '''
import os, pathlib, signal, sys, time
from urna.client.supervisor import end_with
me = pathlib.Path(sys.argv[1])
def end(*_):
    with open("order", "a") as file:
        file.write(me.name + chr(10))
    os._exit(0)
signal.signal(15, end)
end_with(int(sys.argv[2]))
me.with_name(me.name + ".new").write_text(str(os.getpid()))
me.with_name(me.name + ".new").rename(me)
time.sleep(1000)
'''
def command(folder, name):
    words = (sys.executable, "-c", child, str(folder / name), str(__import__("os").getpid()))
    return supervisor.Command(words, dict(__import__("os").environ), folder, None)
supervisor.supernode_command = lambda folder, link: command(folder, "SuperNode")
supervisor.runner_command = lambda folder: command(folder, "runner")
sys.exit(supervisor.main())
"""
    command = [sys.executable, "-c", script, str(site)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        try:
            wait_for(lambda: (site / "runner").is_file() and (site / "SuperNode").is_file())
            yield one
        finally:
            one.kill()


def pid_of(site: Path, name: str) -> int:
    return int((site / name).read_text())


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().split()[2] != "Z"


def test_told_to_stop_it_ends_the_runner_first_then_the_supernode(site: Path) -> None:
    with supervised(site) as one:
        for _ in range(3):
            one.send_signal(signal.SIGINT)  # as an impatient Ctrl-C
        assert one.wait(15) == 0
        assert one.stdout is not None
        said = one.stdout.read().splitlines()
    assert (site / "order").read_text().split() == ["runner", "SuperNode"]
    assert said[-2:] == ["runner: stopped", "SuperNode: stopped"]


def test_when_it_dies_both_end(site: Path) -> None:
    with supervised(site) as one:
        children = [pid_of(site, name) for name in ("runner", "SuperNode")]
        one.kill()
        one.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in children))
    assert sorted((site / "order").read_text().split()) == ["SuperNode", "runner"]


@pytest.mark.parametrize("name", ["runner", "SuperNode"])
def test_either_is_started_again_when_it_is_killed_and_the_other_left_alone(site: Path, name: str) -> None:
    with supervised(site) as one:
        before = {part: pid_of(site, part) for part in ("runner", "SuperNode")}
        (site / name).unlink()
        os.kill(before[name], signal.SIGKILL)
        wait_for((site / name).is_file)
        after = {part: pid_of(site, part) for part in ("runner", "SuperNode")}
        assert [part for part in before if before[part] != after[part]] == [name]
        one.terminate()
        assert one.wait(15) == 0


def test_a_second_one_for_the_same_site_is_refused(site: Path) -> None:
    with supervised(site), pytest.raises(SiteConfigError, match="`urna-site up` runs here already: stop it first"):
        up(site)


def test_the_secret_is_made_once_for_its_owner_alone(site: Path) -> None:
    with supervised(site) as one:
        first = (site / SECRET_FILE).read_bytes()
        one.terminate()
        one.wait(15)
    assert len(first) == 64
    assert (site / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    (site / "runner").unlink()
    with supervised(site):
        assert (site / SECRET_FILE).read_bytes() == first


def test_the_secret_is_not_written_through_a_symbolic_link(site: Path) -> None:
    (site / SECRET_FILE).symlink_to(site / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        up(site)
    assert not (site / "elsewhere").exists()


def test_a_site_that_is_not_linked_is_told_what_to_write(site: Path) -> None:
    text = (site / "site.toml").read_text("utf-8")
    (site / "site.toml").write_text(text[: text.index("[link]")], encoding="utf-8")
    with pytest.raises(SiteConfigError, match=r"expected \[link\] with superlink = \"host:port\", found none: add it"):
        up(site)


def test_a_missing_key_is_said_before_anything_starts(site: Path) -> None:
    (site / "node.key").unlink()
    with pytest.raises(SiteConfigError, match=r"link: expected a file at .*node\.key, found none"):
        up(site)
