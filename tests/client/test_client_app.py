from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from tests.client.clinic import CANARY, NAME, Clinic
from urna.client.app import client_app
from urna.protocol.messages import HelloReply, from_record, open_reply, to_record


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


def test_the_app_carries_a_request_to_the_site_and_its_reply_back(clinic: Clinic) -> None:
    request = clinic.hello_request()
    reply = asked(an_app(), clinic.folder, to_record(request))
    assert isinstance(open_reply(from_record(reply.content), clinic.site.roster, NAME, request), HelloReply)


def test_a_site_that_cannot_be_opened_tells_flower_nothing(clinic: Clinic) -> None:
    """Flower sends the text of an exception to the operator."""
    request = to_record(clinic.hello_request())
    with (clinic.folder / "site.toml").open("a") as file:
        file.write(f'secret = "{CANARY}"\n')
    with pytest.raises(RuntimeError) as caught:
        asked(an_app(), clinic.folder, request)
    assert str(caught.value) == "this site cannot answer; its own log says why"
    assert caught.value.__suppress_context__
    assert "unknown key policy.secret" in clinic.log()


def test_a_foreign_message_tells_flower_nothing(clinic: Clinic) -> None:
    content = RecordDict({"envelope": ConfigRecord({"sender": CANARY})})
    with pytest.raises(RuntimeError, match="this site cannot answer; its own log says why"):
        asked(an_app(), clinic.folder, content)
    assert "expected an Urna message, found another: KeyError" in clinic.log()
