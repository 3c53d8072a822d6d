"""A hub is asked by an explicit call alone, and for nothing but what a model is made of; here a small hub of the test's own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.models import folders
from tests.models.folders import ABOUT
from urna.models.candidate_file import MAX_INSTALLED_BYTES
from urna.models.catalogue import installed
from urna.models.hub import fetch
from urna.models.installed import install, install_from_hub
from urna.protocol.errors import ModelError

COMMIT = "a1" * 20


@dataclass
class Hub:
    """A hub with one repository, `owner/tiny`, at one commit.

    Args:
        folder: Its files.
        declared: Sizes that it states instead of the true ones.
    """

    folder: Path
    declared: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[bytes, int, dict[str, str]] | None:
        """Body, stated size and headers."""
        if path.startswith(f"/api/models/owner/tiny/tree/{COMMIT}"):
            files = [{"type": "file", "path": one.name, "oid": "b" * 40, "size": self._size(one)} for one in self._files()]
            body = json.dumps(files).encode()
            return body, len(body), {}
        if path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            file = self.folder / path.rpartition("/")[2]
            body = file.read_bytes()
            return body, self._size(file), {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def _size(self, file: Path) -> int:
        return self.declared.get(file.name, file.stat().st_size)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    served = Hub(folders.bert(tmp_path / "repository"))
    (served.folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (served.folder / "pytorch_model.bin").write_bytes(b"\x80\x04")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            served.asked.append(f"{self.command} {self.path}")
            served.tokens += [str(self.headers.get("Authorization"))] if "Authorization" in self.headers else []
            found = served.answer(self.path.partition("?")[0])
            self.send_response(404 if found is None else 200)
            body, size, headers = found or (b"", 0, {})
            for name, value in {"Content-Length": str(size), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def add(hub: Hub, tmp_path: Path, repository: str = "owner/tiny", **environment: str) -> "subprocess.CompletedProcess[str]":
    """`urna models add` as a person would, in a process of its own: the client of a hub reads its address only once."""
    own = {"HF_ENDPOINT": hub.url, "URNA_CACHE_DIR": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command = [str(Path(sys.executable).parent / "urna"), "models", "add", "tiny", "--hub", repository, "--revision", COMMIT]
    return subprocess.run(
        [*command, "--licence", ABOUT.licence, "--pretrained-on", ABOUT.pretrained_on, "--summary", ABOUT.summary],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")} | own | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_commit_of_a_hub_becomes_the_candidate_that_its_folder_would(hub: Hub, tmp_path: Path) -> None:
    result = add(hub, tmp_path, HF_TOKEN="hf_of_this_user")
    assert result.returncode == 0, result
    (hub.folder / "modeling_evil.py").unlink()
    (hub.folder / "pytorch_model.bin").unlink()
    assert install("tiny", hub.folder, ABOUT, root=tmp_path / "local").sha256 in result.stdout
    fetched = {one.rpartition("/")[2] for one in hub.asked if one.startswith("GET /owner/tiny/resolve")}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not any("evil" in one or ".bin" in one for one in hub.asked)
    assert hub.tokens == []


def test_a_model_over_the_limit_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.declared["model.safetensors"] = MAX_INSTALLED_BYTES + 1
    result = add(hub, tmp_path)
    assert result.returncode == 2
    assert "must have at most 4294967296 bytes, found 42949" in result.stderr
    assert not any(one.startswith("GET /owner/tiny/resolve") for one in hub.asked)
    assert installed(tmp_path / "cache" / "models") == ()


def test_a_repository_that_is_not_there_is_one_line(hub: Hub, tmp_path: Path) -> None:
    result = add(hub, tmp_path, "owner/absent")
    assert result.returncode == 2
    assert result.stderr.startswith("error: expected owner/absent at a1a1a1a1a1a1 from the hub")
    assert result.stderr.count("\n") == 1


def test_offline_means_that_nothing_is_asked(hub: Hub, tmp_path: Path) -> None:
    result = add(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: a hub is asked only without HF_HUB_OFFLINE, found it set")
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["main", "v1.0", "", "a1" * 19, "A1" * 20, "a1" * 20 + "\n", "refs/pr/1"])
def test_a_branch_or_tag_is_refused(tmp_path: Path, revision: str) -> None:
    with pytest.raises(ModelError, match="must be a full commit of 40 hexadecimal digits"):
        install_from_hub("tiny", "owner/tiny", revision, ABOUT, root=tmp_path)


@pytest.mark.parametrize("repository", ["tiny", "a/b/c", "../x", "owner/..", "http://x/y", "owner/tiny\n", "ow ner/tiny", ""])
def test_what_is_no_repository_is_refused(tmp_path: Path, repository: str) -> None:
    with pytest.raises(ModelError, match="a repository must be owner/name"):
        fetch(repository, COMMIT, tmp_path / "model")


def test_a_built_in_name_is_refused_before_a_hub_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="built-in candidate"):
        install_from_hub("cnn", "owner/tiny", "main", ABOUT, root=tmp_path)
