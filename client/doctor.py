"""`urna-site check`: is everything in place for this site to take part, and if not, what to do?

Every check is a function of its own that yields findings. One that breaks is a red finding itself, by the type of what went
wrong, and ends no other. Nothing is changed; nothing is sent but the greetings of TLS and of the health services.

Covered:
    * what stops a site, before a campaign does: configuration, records, keys, ledger, disk, clock, versions, link;
    * what is open to others on this machine: modes of the folder and of what is secret in it.
Not covered:
    * whether the declarations in site.toml are true, or chosen without looking at the records;
    * what a platform must do below: encrypted disks, backups of the ledger, updates of the system.
"""

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from urna.client import doctor_link
from urna.client.findings import Check, Finding, Level, Subject
from urna.protocol.errors import UrnaError

GPU_SECONDS = 20.0
DISK_RED_BYTES, DISK_YELLOW_BYTES = 200_000_000, 2_000_000_000
MEMORY_RED_BYTES, MEMORY_YELLOW_BYTES = 500_000_000, 2_000_000_000
CLOCK_SLACK_SECONDS = 300
DECLARED_TOLERANCE = 0.1  # num_records may be rounded by that much


def examine(folder: Path, *, offline: bool = False) -> list[Finding]:
    """Everything about a site's folder, the worst not first but each in its place.

    Args:
        folder: the site's.
        offline: leave out what asks another machine or process.
    """
    subject = _subject(folder, offline)
    return [finding for name, check in CHECKS.items() for finding in _run(name, check, subject)]


def is_fit(findings: list[Finding]) -> bool:
    """Whether none is red."""
    return not any(finding.level == "no" for finding in findings)


def _subject(folder: Path, offline: bool) -> Subject:
    from urna.client.config import load_site_config
    from urna.client.control import connect

    config, trouble, runner = None, None, None
    try:
        config = load_site_config(folder)
    except UrnaError as error:
        trouble = error
    try:
        with connect(folder, doctor_link.NETWORK_SECONDS) as client:
            runner = client.status()
    except UrnaError:
        pass  # the control check says more
    return Subject(folder, offline, config, trouble, runner)


def _run(name: str, check: Check, subject: Subject) -> list[Finding]:
    began = time.monotonic()
    found: list[Finding] = []
    try:
        found.extend(check(subject))
    except UrnaError as error:
        found.append(Finding(name, "no", str(error)))
    except OSError as error:
        found.append(Finding(name, "no", f"{error.filename or 'a file'}: {error.strerror or type(error).__name__}"))
    except Exception as error:  # the edge: the other checks go on, and no text of a record is shown
        found.append(Finding(name, "no", f"the check itself failed: {type(error).__name__}", "tell who maintains urna"))
    took = round(time.monotonic() - began, 2)
    return [replace(one, seconds=took) for one in found]


def _config(subject: Subject) -> Iterator[Finding]:
    if subject.config is None:
        yield Finding("site.toml", "no", str(subject.trouble), "correct it, or write one with `urna-site init`")
        return
    num_datasets = len(subject.config.dataset)
    yield Finding("site.toml", "ok", f"{subject.config.name}, {num_datasets} data set{'s' if num_datasets > 1 else ''}")


def _modes(subject: Subject) -> Iterator[Finding]:
    """Who else on this machine could read or change something."""
    from urna.client.config import CONFIG_FILE, DATA_KEY_FILE, LEDGER_FILE
    from urna.client.control import SOCKET_FILE
    from urna.client.local_log import LOG_FILE
    from urna.client.supervisor import SECRET_FILE
    from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE

    folder, vault = subject.folder, subject.vault
    link = subject.link
    secret = [folder / IDENTITY_FILE, vault / DATA_KEY_FILE, vault / LEDGER_FILE, folder / SOCKET_FILE]
    secret += [folder / SECRET_FILE]
    secret += [*sorted(folder.glob(f"{LOG_FILE}*")), *([folder / link.node_key] if link else [])]
    public = [folder, vault, folder / CONFIG_FILE, folder / ROSTER_FILE]
    public += [folder / link.root_certificates] if link else []
    wrong = [
        (path, cure)
        for paths, bits, cure in ((secret, 0o077, "go="), (public, 0o022, "go-w"))
        for path in dict.fromkeys(paths)
        if path.exists() and path.stat().st_mode & bits
    ]
    for path, cure in wrong:
        mode = stat.filemode(path.stat().st_mode)
        yield Finding("modes", "no", f"{path.name or path}: others may read or change it ({mode})", f"chmod {cure} {path}")
    if folder.stat().st_mode & 0o007:
        yield Finding("modes", "warn", "others on this machine may look into the folder", f"chmod o= {folder}")
    elif not wrong:
        yield Finding("modes", "ok", "what is secret is readable by its owner alone")
    if folder.stat().st_uid != os.geteuid():
        yield Finding("modes", "warn", "the folder belongs to another user", "run urna-site as the site's own user")


def _keys(subject: Subject) -> Iterator[Finding]:
    from urna.client.vault import load_data_key
    from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE, load_identity, load_roster

    config, folder = subject.config, subject.folder
    if config is None:
        yield _waits("keys")
        return
    identity = None
    for name, load in (
        ("identity", lambda: load_identity(config.name, folder / IDENTITY_FILE)),
        ("data key", lambda: load_data_key(folder, config.vault)),
    ):
        try:
            found = load()
        except UrnaError as error:
            yield Finding(name, "no", str(error), "`urna-site init` makes the keys of a new site; restore those of an old one")
        else:
            identity = found if not isinstance(found, bytes) else identity
            yield Finding(name, "ok", "there" if isinstance(found, bytes) else f"{found.public_key_hex[:12]}...")
    try:
        roster = load_roster(folder / ROSTER_FILE)
    except UrnaError as error:
        yield Finding("roster", "no", str(error), "ask the operator for the consortium's roster.json")
        return
    if roster.sites.get(config.name) is None:
        yield Finding("roster", "no", f"it lists no {config.name}", "send your public key to the operator, who makes a new one")
    elif identity is not None and roster.sites[config.name] != identity.public_key_hex:
        text = f"expected this identity's key in the roster, found another for {config.name}"
        yield Finding("roster", "no", text, "ask for a new roster, or restore the identity that it lists")
    else:
        yield Finding("roster", "ok", f"{len(roster.sites)} sites, operator {roster.operator[:12]}...")
    if lost := sorted(set(config.policy.required_peers) - roster.sites.keys()):
        yield Finding(
            "roster", "no", f"policy.required_peers names {', '.join(lost)}, not in the roster", "correct one of them"
        )
    if config.policy.operators is not None and roster.operator not in config.policy.operators:
        yield Finding("roster", "no", "policy.operators takes no plans of the roster's operator", "correct one of them")


def _ledger(subject: Subject) -> Iterator[Finding]:
    from urna.client.vault import open_ledger
    from urna.privacy.accounting import epsilon_of_rows

    config = subject.config
    if config is None:
        yield _waits("ledger")
        return
    try:
        ledger = open_ledger(subject.folder, config.vault, read_only=True)
    except UrnaError as error:
        yield Finding("ledger", "no", str(error), "restore the newest copy; it is never repaired, and never made anew")
        return
    try:
        rows, num_entries = ledger.rows(), ledger.head()[0]
        stopped = ledger.noted("stop")
    finally:
        ledger.close()
    yield Finding("ledger", "ok", f"chain unbroken, {num_entries} entries, {sum(row.count for row in rows)} releases")
    if stopped is not None:
        yield Finding("ledger", "no", "it is stopped: a newer head of it was seen elsewhere", "restore the newest copy of it")
    policy = config.policy
    spent = epsilon_of_rows(rows, policy.delta)
    left, text = policy.epsilon_total - spent, f"epsilon {spent:.4f} of {policy.epsilon_total:g} spent"
    if left <= 0:
        yield Finding(
            "budget", "no", f"{text}: nothing is left", "nothing more is released; only new records bring a new budget"
        )
    elif left < policy.epsilon_per_campaign:
        yield Finding("budget", "warn", text, f"less than one campaign of {policy.epsilon_per_campaign:g} is left")
    else:
        yield Finding("budget", "ok", text)


def _anchor(subject: Subject) -> Iterator[Finding]:
    from urna.client.config import LEDGER_FILE
    from urna.client.vault import anchor_path

    if subject.config is None:
        yield _waits("anchor")
        return
    path, ledger = anchor_path(subject.folder, subject.config.vault), subject.vault / LEDGER_FILE
    if not path.is_file():
        yield Finding("anchor", "no", f"expected it at {path}, found nothing", "mount its disk, or restore it")
    elif not ledger.is_file():
        yield Finding("anchor", "warn", "there, without its ledger", "restore the ledger")
    elif path.parent.resolve() == ledger.parent.resolve():
        text = "beside its ledger: one backup that is put back brings back both"
        yield Finding("anchor", "warn", text, "set vault.anchor to a path on another disk, and move it there")
    elif path.stat().st_dev == ledger.stat().st_dev:
        text = "on the same disk as its ledger: one snapshot that is put back brings back both"
        yield Finding("anchor", "warn", text, "move it to another disk, out of the backups of the ledger")
    else:
        yield Finding("anchor", "ok", "on another disk than its ledger")


def _records(subject: Subject) -> Iterator[Finding]:
    from urna.client.dataset import load_records
    from urna.client.vault import load_data_key

    if subject.config is None:
        yield _waits("records")
        return
    try:
        key = load_data_key(subject.folder, subject.config.vault)
    except UrnaError:
        yield Finding("records", "skip", "not looked at: the data key is missing")
        return
    for one in subject.config.dataset:
        name = f"records {one.name}"
        try:
            num_found = len(load_records(subject.folder, one, key))
        except UrnaError as error:
            yield Finding(name, "no", str(error), "correct the records, or how [[dataset]] declares them")
            continue
        if abs(one.num_records / max(num_found, 1) - 1) > DECLARED_TOLERANCE:
            text = f"data set {one.name}: expected {num_found} or a rounding of it as num_records, found {one.num_records}"
            yield Finding(name, "no", text, "declare anew in [[dataset]]")
        else:
            yield Finding(name, "ok", f"{num_found} read, {one.num_records} declared")


def _disk(subject: Subject) -> Iterator[Finding]:
    for folder in dict.fromkeys((subject.folder, subject.vault)):
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:.1f} GB free at {folder}"
        if free < DISK_YELLOW_BYTES:
            level: Level = "no" if free < DISK_RED_BYTES else "warn"
            yield Finding("disk", level, text, "make room: the ledger keeps what left, and a full disk stops every release")
        else:
            yield Finding("disk", "ok", text)


def _memory(_: Subject) -> Iterator[Finding]:
    free = _available_memory_bytes()
    if free is None:
        yield Finding("memory", "skip", "this system does not say")
        return
    text = f"{free / 1e9:.1f} GB available, {os.cpu_count()} processors"
    if free < MEMORY_YELLOW_BYTES:
        level: Level = "no" if free < MEMORY_RED_BYTES else "warn"
        yield Finding("memory", level, text, "end other programs, or use a larger machine: records and models stay in memory")
    else:
        yield Finding("memory", "ok", text)


def _available_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _clock(subject: Subject) -> Iterator[Finding]:
    """Whether this machine's time can be true, by what it wrote itself; no time service is asked."""
    import urna
    from urna.client.config import LEDGER_FILE

    now = time.time()
    written = {"urna was installed": Path(urna.__file__).stat().st_mtime}
    ledger = subject.vault / LEDGER_FILE
    if ledger.is_file():
        written["the ledger was written"] = ledger.stat().st_mtime
    for certificate in doctor_link.root_certificates(subject):
        written["a certificate became valid"] = certificate.not_valid_before_utc.timestamp()
    ahead = {what: at for what, at in written.items() if at > now + CLOCK_SLACK_SECONDS}
    shown = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    for what, at in ahead.items():
        text = f"{shown}, but {what} at {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
        yield Finding("clock", "no", text, "set the clock: certificates and expiry dates are read by it")
    if not ahead:
        yield Finding("clock", "ok", shown)


def _versions(_: Subject) -> Iterator[Finding]:
    """Against what the package itself asks for."""
    from importlib.metadata import PackageNotFoundError, metadata, version

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata("urna")
    except PackageNotFoundError:
        yield Finding("versions", "skip", "urna runs from a folder and is not installed")
        return
    python = ".".join(map(str, sys.version_info[:3]))
    range_of_python = about["Requires-Python"]
    wrong = [] if python in SpecifierSet(range_of_python) else [f"Python {python}, expected {range_of_python}"]
    shown = [f"urna {about['Version']}", f"Python {python}"]
    for wanted in map(Requirement, about.get_all("Requires-Dist") or []):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found}, expected {wanted.specifier}")
        if wanted.name in ("flwr", "torch"):
            shown.append(f"{wanted.name} {found}")
    if wrong:
        yield Finding("versions", "no", "; ".join(wrong), "install urna again with its constraints.txt")
    else:
        yield Finding("versions", "ok", ", ".join(shown))


def _gpu(_: Subject) -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding("GPU", "skip", "none: the processors do the work")
        return
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        yield Finding("GPU", "warn", "nvidia-smi does not answer", "look at the driver; the processors do the work")
        return
    if done.returncode or not done.stdout.strip():
        yield Finding("GPU", "warn", "nvidia-smi finds none that works", "look at the driver; the processors do the work")
        return
    import torch

    text = "; ".join(line.strip() for line in done.stdout.strip().splitlines()[:8])
    if torch.cuda.is_available():
        yield Finding("GPU", "ok", text)
    else:
        yield Finding("GPU", "warn", f"{text}, but torch cannot use it", "install a torch that fits the driver")


def _waits(name: str) -> Finding:
    return Finding(name, "skip", "not looked at: site.toml comes first")


CHECKS: dict[str, Check] = {
    "site.toml": _config,
    "modes": _modes,
    "keys": _keys,
    "ledger": _ledger,
    "anchor": _anchor,
    "records": _records,
    "disk": _disk,
    "memory": _memory,
    "clock": _clock,
    "certificate": doctor_link.certificates,
    "versions": _versions,
    "GPU": _gpu,
    "SuperLink": doctor_link.superlink,
    "SuperNode": doctor_link.supernode,
    "runner": doctor_link.runner,
}
