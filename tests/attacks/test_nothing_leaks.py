"""Nothing that a site knows is in anything that leaves it: a whole campaign over planted strings, and every exception's text.

Planted: record ids, person ids, labels' names, contents of a column that is dropped, the name of the database's file, and the
password in the environment variable that says where it is. Searched in every form of `tests.canaries.disguises`.
"""

import csv
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import ValidationError

from tests.canaries import campaign_of, disguises, found_in, outside, secrets_of
from tests.client.clinic import CANARY, CANDIDATES, NAME, Clinic
from tests.client.runtime_api import SECRET, supernode
from tests.simulator import Federation
from urna.client import app as app_module
from urna.client import site as site_module
from urna.client.app import answer_record, client_app
from urna.client.flower_runtime import Runtime
from urna.client.local_log import local_log
from urna.client.receipts import write_receipts
from urna.client.runner import CANNOT_ANSWER, Runner, WarmSite
from urna.client.site import Site, failure_code
from urna.models.pretrain import pretrain
from urna.protocol import errors
from urna.protocol.errors import FailureCode, ProtocolError, UrnaError
from urna.protocol.messages import Failure, Head, signed
from urna.protocol.sealing import Parcel, from_record, seal, to_record, unseal
from urna.server.metrics import RunsCollector
from urna.server.report_page import write_report

PERSON, LABEL, REMARK, FILE, PASSWORD = "person-5be1c0", "label-77aa19", "remark-31c4e2", "file-09fe7d", "hunter2-9d1c"
URL_VARIABLE = "URNA_TEST_DATABASE"


def into_a_database(folder: Path) -> None:
    """Put a site's records into a database, with a planted string in every place that has one."""
    with (folder / "records.csv").open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    pixels = names[2:]
    database = sqlite3.connect(folder / f"{FILE}.sqlite")
    database.execute(
        f"CREATE TABLE visits (id TEXT, person TEXT, label TEXT, remark TEXT, {', '.join(f'{p} REAL' for p in pixels)})"
    )
    for at, (key, label, *values) in enumerate(rows):
        row = [key, f"{PERSON}-{at}", f"{LABEL}-{label}", f"{REMARK} {key}", *map(float, values)]
        database.execute(f"INSERT INTO visits VALUES ({', '.join('?' * len(row))})", row)
    database.commit()
    database.close()
    (folder / "records.csv").unlink()
    text = (folder / "site.toml").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("path = ", "format = ", "num_classes = "))]
    at = lines.index("[[dataset]]") + 1
    labels = json.dumps([f"{LABEL}-{number}" for number in range(10)])
    lines[at:at] = [
        *('format = "sql"', f'url_variable = "{URL_VARIABLE}"', 'query = "SELECT * FROM visits"', 'person_column = "person"'),
        *(f"labels = {labels}", 'deidentify = [{column = "remark", action = "drop"}]'),
    ]
    (folder / "site.toml").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(URL_VARIABLE, f"sqlite://clerk:{PASSWORD}@/{FILE}.sqlite")
        with campaign_of(tmp_path_factory.mktemp("leaks") / "runs" / "run", into_a_database) as federation:
            yield federation


def planted(federation: Federation) -> list[bytes]:
    """Everything that must not leave, in every form."""
    forms = [form for text in (PERSON, LABEL, REMARK, FILE, PASSWORD) for form in disguises(text.encode())]
    return [*secrets_of(federation), *forms]


def leaving(federation: Federation, out: Path) -> dict[str, bytes]:
    """All that leaves a site, or that the operator makes of it."""
    write_report(federation.run_dir)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunsCollector(federation.run_dir.parent))
    found = {"metrics": generate_latest(registry)}
    found |= {f"file {one.name}": one.read_bytes() for one in outside(federation)}
    for site in federation.sites:
        for path in write_receipts(site.folder, out / site.config.name):
            found[f"receipt of {site.config.name}"] = path.read_bytes()
    for at, parcel in enumerate(federation.parcels):
        found[f"parcel {at}"] = b"\n".join(
            [*(key.encode() + value for key, value in parcel.headers.items()), parcel.content.tobytes()]
        )
    for at, envelope in enumerate(federation.wire):
        arrays = (array.tobytes() for array in envelope.arrays.values())
        found[f"envelope {at}"] = b"\n".join([envelope.body, envelope.to_bytes(), *arrays])
    return found


@pytest.fixture(scope="module")
def contents(campaign: Federation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return leaving(campaign, tmp_path_factory.mktemp("receipts"))


def test_the_campaign_read_the_planted_records(campaign: Federation) -> None:
    for site in campaign.sites:
        records = site.bench(site.config.dataset[0]).records()
        assert all(one.startswith(CANARY) for one in records.ids)
        assert all(one.startswith(PERSON) for one in records.units)
        assert all(one.startswith(LABEL) for one in site.config.dataset[0].label_names)
        assert REMARK.encode() in (site.folder / f"{FILE}.sqlite").read_bytes()


def test_canary_string_nowhere(campaign: Federation, contents: dict[str, bytes]) -> None:
    forbidden = planted(campaign)
    expected = {"metrics", "file journal.sqlite", "file report.html", "file report.json", "receipt of site-1", "parcel 0"}
    assert expected <= contents.keys()
    assert len(campaign.parcels) == len(campaign.wire) > 50
    assert {name: found_in(forbidden, content) for name, content in contents.items() if found_in(forbidden, content)} == {}


def test_a_sites_own_ledger_and_log_hold_no_record(campaign: Federation) -> None:
    forms = [form for text in (CANARY, PERSON, LABEL, REMARK, FILE, PASSWORD) for form in disguises(text.encode())]
    for site in campaign.sites:
        kept = [one for one in site.folder.iterdir() if one.name.startswith(("ledger", "site.log"))]
        assert len(kept) >= 3
        for path in kept:
            assert found_in(forms, path.read_bytes()) == [], path.name


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("text", [CANARY, PERSON, LABEL, REMARK, FILE, PASSWORD])
def test_the_scan_would_find_what_was_planted(campaign: Federation, contents: dict[str, bytes], text: str, at: int) -> None:
    """A positive control: each planted string, disguised, in one of the things that are searched."""
    content = contents[("metrics", "file journal.sqlite", "envelope 3")[at]]
    forbidden = planted(campaign)
    for form in disguises(text.encode()):
        assert found_in(forbidden, content[:100] + form + content[100:])


# ---- exceptions


def classes() -> list[type[Exception]]:
    """Every error of the tree, and what Python and the libraries raise."""
    found, waiting = list[type[Exception]](), [UrnaError]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += one.__subclasses__()
    builtins: list[type[Exception]] = [ValueError, KeyError, OSError, TypeError, RuntimeError, RecursionError, MemoryError]
    builtins += [ZeroDivisionError, OverflowError, AssertionError, AttributeError, ImportError, EOFError, sqlite3.DatabaseError]
    return [one for one in found if one.__module__ == errors.__name__] + builtins


CLASSES = classes()
TEXT = f"record {CANARY} of Jane Doe"
LEAKS = [form for text in (CANARY, "Jane Doe") for form in disguises(text.encode())]


def test_all_classes_are_tried() -> None:
    assert len(CLASSES) > 30
    assert {FailureCode.ROLLBACK, FailureCode.PAUSED, FailureCode.INTERNAL} <= {failure_code(one(TEXT)) for one in CLASSES}


def fails(error: type[Exception]) -> Callable[..., Any]:
    def raises(*_: object, **__: object) -> Any:
        raise error(TEXT)

    return raises


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Clinic:
    for name in CANDIDATES:
        pretrain(name)
    return Clinic.build(tmp_path_factory.mktemp("leaks") / "site-1")


def asked(clinic: Clinic) -> Parcel:
    head = Head.create(clinic.site.identity, clinic.site.ledger.id, *clinic.site.ledger.head())
    return seal(clinic.operator, clinic.site.roster, clinic.hello_request(), {NAME: head})


def fails_alone(clinic: Clinic, parcel: Parcel, reply: Parcel, error: type[Exception] | None) -> None:
    """A code and nothing else, sealed or opened."""
    envelope, _ = unseal(clinic.operator, clinic.site.roster, reply, NAME, parcel.sha256)
    said = Failure.model_validate_json(envelope.body)
    assert error is None or said.code == failure_code(error(TEXT))
    assert set(json.loads(envelope.body)) == {"version", "request_sha256", "kind", "code"}
    assert not envelope.arrays
    for content in (*reply.headers.values(), reply.content.tobytes(), envelope.to_bytes()):
        assert found_in(LEAKS, content) == []


STEPS = ["Site.handle", "Site._answer", "Site._check_echo", "Ledger.head", "Ledger.check_head", "unseal", "open_request"]


def owner_of(step: str) -> tuple[object, str]:
    owner, _, name = step.rpartition(".")
    return (getattr(site_module, owner) if owner else site_module), name


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", CLASSES, ids=lambda one: one.__name__)
def test_exception_text_never_leaves_a_parcel(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, step: str, error: type[Exception]
) -> None:
    parcel = asked(clinic)
    owner, name = owner_of(step)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails(error))
        reply = clinic.site.receive(parcel)
        carried = from_record(answer_record(clinic.site, to_record(parcel)))
    for one in (reply, carried):
        fails_alone(clinic, parcel, one, error)
    assert TEXT in clinic.log()


def test_a_validation_error_of_pydantic_leaves_as_a_code(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text quotes the input."""

    def raises(*_: object) -> None:
        Head.model_validate({"site": TEXT})

    parcel = asked(clinic)
    with pytest.raises(ValidationError, match="Jane Doe"):
        raises()
    with monkeypatch.context() as patch:
        patch.setattr(Site, "_check_echo", raises)
        fails_alone(clinic, parcel, clinic.site.receive(parcel), None)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower lets only a task of a run make messages; the app lowers torch's threads for its whole process."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    threads = torch.get_num_threads()
    app_module._site.cache_clear()
    yield
    app_module._site.cache_clear()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("task")
@pytest.mark.parametrize("step", ["open_site", "answer_record", "from_record", "to_record"])
@pytest.mark.parametrize("error", CLASSES, ids=lambda one: one.__name__)
def test_exception_text_never_leaves_flowers_app(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch, step: str, error: type[Exception]
) -> None:
    """Flower sends the text of what an app raises to the operator."""
    message = Message(content=to_record(asked(clinic)), dst_node_id=1, message_type="query.hello")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    monkeypatch.setattr(app_module, step, fails(error))
    ask = partial(client_app(lambda _: clinic.folder), message, context)
    if step == "from_record" and issubclass(error, ProtocolError):
        content = from_record(ask().content)  # answered by the site, as a parcel that nobody sealed
        assert all(found_in(LEAKS, one) == [] for one in (*content.headers.values(), content.content.tobytes()))
    else:
        with pytest.raises(RuntimeError) as caught:
            ask()
        assert str(caught.value) == CANNOT_ANSWER
        assert caught.value.__suppress_context__
        assert caught.value.__cause__ is None
    assert TEXT in clinic.log()


def test_exception_text_never_leaves_the_runner(tmp_path: Path) -> None:
    """A site that cannot be opened, for every reason: the operator reads one fixed text."""
    opened: list[type[Exception] | None] = []

    def answer(content: RecordDict) -> RecordDict:
        error = CLASSES[len(opened)] if len(opened) < len(CLASSES) else None
        opened.append(error)
        if error is not None:
            raise error(TEXT)
        return WarmSite(tmp_path)(content)  # there is no site in this folder

    (tmp_path / "site.toml").write_text(f'secret = "{TEXT}"\n', encoding="utf-8")
    with supernode() as node:
        runtime, stop = Runtime(node.address, SECRET), threading.Event()
        runner = Runner(runtime, answer, local_log(NAME, tmp_path))
        thread = threading.Thread(target=runner.serve, args=(stop,), daemon=True)
        thread.start()
        try:
            for _ in range(len(CLASSES) + 1):
                node.deliver(RecordDict({"envelope": ConfigRecord({"text": "hello"})}))
                reply = node.collect()
                assert reply.error.reason == CANNOT_ANSWER
                assert found_in(LEAKS, str(reply).encode()) == []
            details = [one.status.details for one in node.factory.state().get_tasks()]
        finally:
            stop.set()
            thread.join(20)
            runtime.close()
    assert set(details) == {CANNOT_ANSWER}
    assert opened[-1] is None
    log = (tmp_path / "site.log").read_text("utf-8")
    assert log.count(TEXT) >= len(CLASSES)
    assert "unknown key secret" in log


def test_an_edge_that_tells_is_noticed(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant: a failure that carries the text of its exception."""
    parcel = asked(clinic)
    real = signed

    def tells(identity: Any, message: Any, arrays: Any = None) -> Any:
        envelope = real(identity, message, arrays)
        body = envelope.body[:-1] + b',"text":"' + TEXT.encode() + b'"}'
        return type(envelope)(envelope.sender, body, envelope.signature, envelope.arrays)

    monkeypatch.setattr(Site, "_answer", fails(ValueError))
    fails_alone(clinic, parcel, clinic.site.receive(parcel), ValueError)
    monkeypatch.setattr(site_module, "signed", tells)
    with pytest.raises((ValidationError, AssertionError)):
        fails_alone(clinic, parcel, clinic.site.receive(parcel), ValueError)
