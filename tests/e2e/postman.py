"""A run whose ServerApp only carries mail: what is put in its folder goes to a node, and the node's answer comes back.

    with posted(link, folder) as postman:
        answer = postman.ask(node_id, record)

Bundles are written by the test, code and all, as an operator's would be: `hostile` ones carry code for the sites.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from tests.e2e.superlink import NAME, LoopbackFederation

PROJECT = """
[project]
name = "{name}"
version = "1.0.0"
description = "carries mail"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "{name}.server:app"
clientapp = "{client}"
"""
SERVER = """
import json, pathlib, time
from flwr.app import Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()
folder = pathlib.Path({folder!r})

@app.main()
def main(grid, context):
    while not (folder / "stop").exists():
        for path in sorted(folder.glob("*.ask")):
            carry(grid, path)
        time.sleep(0.005)

def carry(grid, path):
    asked = json.loads(path.read_text())
    path.unlink()
    while asked["node"] not in grid.get_node_ids():
        time.sleep(0.05)
    record = recorddict_from_proto(RecordDict.FromString(path.with_suffix(".record").read_bytes()))
    started = time.monotonic()
    (message_id,) = grid.push_messages([Message(record, asked["node"], asked["type"])])
    while not (replies := list(grid.pull_messages([message_id]))):
        time.sleep(0.01)
    said = {{"seconds": time.monotonic() - started, "code": 0, "reason": "", "record": ""}}
    (reply,) = replies
    if reply.has_error():
        said |= {{"code": reply.error.code, "reason": reply.error.reason}}
    else:
        said["record"] = recorddict_to_proto(reply.content).SerializeToString().hex()
    path.with_suffix(".new").write_text(json.dumps(said))
    path.with_suffix(".new").rename(path.with_suffix(".answer"))
"""
HOSTILE = """
import pathlib
with pathlib.Path({mark!r}).open("a") as file:
    file.write({where!r} + "\\n")
"""
HOSTILE_APP = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
import urna

app = ClientApp()

@app.query("hello")
def hello(message, context):
    with pathlib.Path({mark!r}).open("a") as file:
        file.write("executed\\n")
    return Message(RecordDict(), reply_to=message)
"""


@dataclass(frozen=True)
class Answer:
    """What the ServerApp got."""

    seconds: float  # from pushing the message to having the answer
    code: int
    reason: str
    record: RecordDict | None


@dataclass
class Postman:
    """A run, as the operator uses it."""

    link: LoopbackFederation
    folder: Path
    bundle_sha256: str
    _number: int = 0

    def ask(self, node: int, record: RecordDict, message_type: str = "query.hello", timeout_seconds: float = 120) -> Answer:
        """Send a message and wait for the answer."""
        self._number += 1
        path = self.folder / f"{self._number:04d}"
        path.with_suffix(".record").write_bytes(recorddict_to_proto(record).SerializeToString())
        path.with_suffix(".new").write_text(json.dumps({"node": node, "type": message_type}))
        path.with_suffix(".new").rename(path.with_suffix(".ask"))
        deadline = time.monotonic() + timeout_seconds
        while not path.with_suffix(".answer").exists():
            assert time.monotonic() < deadline, f"no answer:\n{self.link.log('superexec')[-3000:]}"
            time.sleep(0.005)
        said = json.loads(path.with_suffix(".answer").read_text())
        raw = bytes.fromhex(said["record"])
        content = recorddict_from_proto(ProtoRecordDict.FromString(raw)) if raw or not said["code"] else None
        return Answer(said["seconds"], said["code"], said["reason"], content)


def write_bundle(folder: Path, mark: Path | None = None, client: str = "urna.client.app:app") -> tuple[Path, Path]:
    """An app, and the folder that its ServerApp carries mail from; with ``mark``, one whose code writes there at a site."""
    name = "mail" if mark is None else "hostile"
    app, mail = folder / name, folder / f"{name}-letters"
    for one in (app / name, mail):
        one.mkdir(parents=True)
    client = client if mark is None else f"{name}.client:app"
    (app / "pyproject.toml").write_text(PROJECT.format(name=name, client=client), encoding="utf-8")
    (app / name / "__init__.py").write_text("", encoding="utf-8")
    (app / name / "server.py").write_text(SERVER.format(folder=str(mail)), encoding="utf-8")
    if mark is not None:
        text = HOSTILE.format(mark=str(mark), where="app imported") + HOSTILE_APP.format(mark=str(mark))
        (app / name / "client.py").write_text(text, encoding="utf-8")
        for package in ("", "client", "protocol"):  # what a site's own process imports
            shadow = app / "urna" / package
            shadow.mkdir(parents=True, exist_ok=True)
            (shadow / "__init__.py").write_text(HOSTILE.format(mark=str(mark), where="urna imported"), encoding="utf-8")
    return app, mail


def built_sha256(link: LoopbackFederation, app: Path) -> str:
    """Hash of the bundle that Flower makes of an app; it makes the same one for the same files."""
    home = link.home("operator")
    link.flwr("build", "--app", str(app))
    (built,) = home.glob("*.fab")
    sha256 = hashlib.sha256(built.read_bytes()).hexdigest()
    built.unlink()
    return sha256


@contextmanager
def posted(link: LoopbackFederation, app: Path, mail: Path) -> Iterator[Postman]:
    """Start the run; it ends with the block."""
    sha256 = built_sha256(link, app)
    link.flwr("run", str(app), NAME, "--format", "json")
    try:
        yield Postman(link, mail, sha256)
    finally:
        (mail / "stop").touch()
        shutil.rmtree(app)
