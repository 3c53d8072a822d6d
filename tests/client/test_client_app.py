import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from tests.client.clinic import CANARY, NAME, Clinic
from urna.client.app import client_app
from urna.protocol.messages import AnyReply, Envelope, HelloReply, open_reply
from urna.protocol.sealing import from_record, seal, to_record, unseal


def asked(app: ClientApp, folder: Path, content: RecordDict) -> Message:
    message = Message(content=content, dst_node_id=1, message_type="query.hello")
    return app(message, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"folder": str(folder)}))


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flower lets only a task of a run make messages; the app lowers torch's threads for its whole process."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def an_app() -> ClientApp:
    return client_app(lambda context: Path(str(context.run_config["folder"])))


def sealed(clinic: Clinic, request: Envelope) -> RecordDict:
    return to_record(seal(clinic.operator, clinic.site.roster, request, {NAME: None}))


def opened(clinic: Clinic, reply: Message, asked: RecordDict, request: Envelope) -> AnyReply:
    answers = from_record(asked).sha256
    envelope = unseal(clinic.operator, clinic.site.roster, from_record(reply.content), sender=NAME, answers=answers)[0]
    return open_reply(envelope, clinic.site.roster, NAME, request)


def test_the_app_carries_a_request_to_the_site_and_its_reply_back(clinic: Clinic) -> None:
    request = clinic.hello_request()
    content = sealed(clinic, request)
    reply = asked(an_app(), clinic.folder, content)
    assert isinstance(opened(clinic, reply, content, request), HelloReply)


def test_a_site_that_cannot_be_opened_tells_flower_nothing(clinic: Clinic) -> None:
    """Flower sends the text of an exception to the operator."""
    request = sealed(clinic, clinic.hello_request())
    with (clinic.folder / "site.toml").open("a") as file:
        file.write(f'secret = "{CANARY}"\n')
    with pytest.raises(RuntimeError) as caught:
        asked(an_app(), clinic.folder, request)
    assert str(caught.value) == "this site cannot answer; its own log says why"
    assert caught.value.__suppress_context__
    assert "unknown key policy.secret" in clinic.log()


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"envelope": ConfigRecord({"sender": CANARY})})])
def test_a_foreign_message_is_answered_with_a_code_that_only_the_operator_can_read(clinic: Clinic, content: RecordDict) -> None:
    reply = asked(an_app(), clinic.folder, content)
    nothing = hashlib.sha256().hexdigest()
    envelope = unseal(clinic.operator, clinic.site.roster, from_record(reply.content), sender=NAME, answers=nothing)[0]
    assert b"bad_request" in envelope.body
    assert CANARY.encode() not in envelope.to_bytes()
    assert "expected an Urna message, found another: KeyError" in clinic.log()
