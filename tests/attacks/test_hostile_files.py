"""Files that are not what they are called: pickles, pipes, devices, links and names that lead elsewhere.

Readers of records have such tests of their own (`tests/client/test_readers.py`); here every file that a site opens is tried, by
the function that the site calls. ``vault.folder`` and ``vault.anchor`` may be anywhere, by design: two nodes share a vault, and
the anchor belongs on another disk; whoever writes site.toml decides where.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.mutations import one_line
from tests.client.clinic import CANDIDATES, Clinic, write_config
from urna.client.config import CONFIG_FILE, DATA_KEY_FILE, LEDGER_FILE
from urna.client.dataset import DatasetConfig, load_records
from urna.client.site import open_site
from urna.models.loading import MANIFEST_FILE, WEIGHTS_FILE, cache_root, load_backbone
from urna.models.pretrain import pretrain
from urna.protocol.errors import BadInputError, LedgerError, ModelError, PlanError, ProtocolError, SiteConfigError, UrnaError
from urna.protocol.identity import IDENTITY_FILE, ROSTER_FILE
from urna.protocol.messages import Envelope
from urna.protocol.plan import load_plan
from urna.server.consortium import load_consortium

KEY = bytes(32)
TABLE = {"name": "t", "modality": "table", "num_records": 9, "labels": ["a", "b"], "format": "csv", "path": "records.csv"}
TABLE |= {"columns": [{"name": "x", "type": "number", "minimum": 0.0, "maximum": 1.0}]}
FILES = {"name": "f", "num_records": 9, "labels": ["a", "b"], "path": "files", "manifest": "manifest.csv"}
IMAGES = FILES | {"format": "images", "modality": "image", "image_height": 8, "image_width": 8}
TEXTS = FILES | {"format": "text", "modality": "text", "max_characters": 100}


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a pickle would make, were it ever opened as one."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture(params=[0, 2, 5])
def payload(request: pytest.FixtureRequest, marker: Path) -> bytes:
    return pickle.dumps([Planted(marker)], request.param)


def test_the_planted_pickle_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "executed")))  # or the tests below could not fail
    assert (tmp_path / "executed").exists()


def dataset(**changes: Any) -> DatasetConfig:
    return DatasetConfig.model_validate(TABLE | changes)


@pytest.mark.parametrize("format_", ["csv", "parquet", "jsonl"])
def test_a_pickle_is_no_table(tmp_path: Path, payload: bytes, format_: str) -> None:
    (tmp_path / f"records.{format_}").write_bytes(payload)
    with pytest.raises(SiteConfigError) as caught:
        load_records(tmp_path, dataset(format=format_, path=f"records.{format_}"), KEY)
    one_line(caught.value)


def listed(folder: Path, name: str, declared: dict[str, Any] = IMAGES) -> DatasetConfig:
    """Files with a manifest whose only entry is ``name``."""
    (folder / "files").mkdir(exist_ok=True)
    (folder / "files" / "manifest.csv").write_text(f'id,file,label\n1,"{name}",a\n', encoding="utf-8")
    return DatasetConfig.model_validate(declared)


@pytest.mark.parametrize("declared", [IMAGES, TEXTS], ids=["image", "text"])
def test_a_pickle_is_no_image_and_no_text(tmp_path: Path, payload: bytes, declared: dict[str, Any]) -> None:
    name = "a.png" if declared is IMAGES else "a.txt"
    config = listed(tmp_path, name, declared)
    (tmp_path / "files" / name).write_bytes(payload)
    if declared is TEXTS and payload[:1] != b"\x80":  # protocol 0 is text, and is only ever read as such
        assert len(load_records(tmp_path, config, KEY)) == 1
        return
    with pytest.raises(SiteConfigError) as caught:
        load_records(tmp_path, config, KEY)
    one_line(caught.value)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, MANIFEST_FILE])
def test_a_pickle_is_no_model(tmp_path: Path, payload: bytes, file: str) -> None:
    pretrain("pixels")
    shutil.copytree(cache_root() / "pixels", tmp_path / "pixels")
    load_backbone("pixels", root=tmp_path)
    (tmp_path / "pixels" / file).write_bytes(payload)
    with pytest.raises(ModelError) as caught:
        load_backbone("pixels", root=tmp_path)
    one_line(caught.value)


def test_a_pickle_is_no_envelope(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Envelope.from_bytes(payload)
    one_line(caught.value)


def a_site(folder: Path) -> Path:
    """A site's folder that opens."""
    for name in CANDIDATES:
        pretrain(name)
    clinic = Clinic.build(folder / "site-1")
    clinic.site.close()
    return clinic.folder


OWN_FILES: dict[str, type[UrnaError]] = {
    CONFIG_FILE: SiteConfigError,
    ROSTER_FILE: SiteConfigError,
    IDENTITY_FILE: SiteConfigError,
    DATA_KEY_FILE: SiteConfigError,
    LEDGER_FILE: LedgerError,
    "ledger.anchor": LedgerError,
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_pickle_is_none_of_a_sites_own_files(tmp_path: Path, payload: bytes, name: str) -> None:
    folder = a_site(tmp_path)
    (folder / name).write_bytes(payload)
    with pytest.raises(OWN_FILES[name]) as caught:
        open_site(folder)
    one_line(caught.value)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


STRANGE: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "loop": _loop,
    "device": _device,
    "dangling": _nowhere,
    "folder": Path.mkdir,
    "gone": lambda path: None,  # noqa: ARG005
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", OWN_FILES)
def test_a_sites_own_file_of_a_strange_kind_is_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    folder = a_site(tmp_path)
    (folder / name).unlink()
    STRANGE[kind](folder / name)
    with pytest.raises(OWN_FILES[name]) as caught:
        open_site(folder)
    one_line(caught.value)


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(("load", "refusal"), [(load_plan, PlanError), (load_consortium, BadInputError)], ids=["plan", "group"])
def test_a_document_of_a_strange_kind_is_refused_and_not_waited_for(
    tmp_path: Path, load: Callable[[Path], object], refusal: type[BadInputError], kind: str
) -> None:
    STRANGE[kind](tmp_path / "document.toml")
    with pytest.raises(refusal) as caught:
        load(tmp_path / "document.toml")
    one_line(caught.value)


# ---- paths of records

OUTSIDE = ["../secret.csv", "a/../../secret.csv", "/etc/passwd", "//etc/passwd", "..", "", "/dev/zero", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("key", ["path", "manifest"])
def test_a_declared_path_that_leaves_the_folder_is_refused(tmp_path: Path, key: str, path: str) -> None:
    (tmp_path / "secret.csv").write_text("id,label,x\n1,a,0.5\n", encoding="utf-8")
    folder = tmp_path / "site"
    (folder / "files").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected a relative path") if path != "a\0b" else pytest.raises(SiteConfigError):
        load_records(folder, DatasetConfig.model_validate((TABLE if key == "path" else IMAGES) | {key: path}), KEY)


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/passwd", "a/../../a.png", "a\0b", "x" * 5000, "x/" * 3000, "", ".", "é" * 200]
)
@pytest.mark.parametrize("declared", [IMAGES, TEXTS], ids=["image", "text"])
def test_a_manifests_entry_that_leaves_the_folder_is_refused_without_its_name(
    tmp_path: Path, declared: dict[str, Any], name: str
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SiteConfigError) as caught:
        load_records(tmp_path, listed(tmp_path, name, declared), KEY)
    text = one_line(caught.value)
    assert len(name) < 3 or name not in text


@pytest.mark.parametrize("kind", [*STRANGE, "link out", "link to a secret folder"])
@pytest.mark.parametrize("what", ["table", "manifest", "image"])
def test_records_of_a_strange_kind_are_refused_and_not_waited_for(tmp_path: Path, what: str, kind: str) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "secret.csv").write_text("id,label,x\n1,a,0.5\n", encoding="utf-8")
    config = dataset() if what == "table" else listed(folder, "a.png")
    path = folder / {"table": "records.csv", "manifest": "files/manifest.csv", "image": "files/a.png"}[what]
    path.unlink(missing_ok=True)
    if kind == "link out":
        path.symlink_to(tmp_path / "secret.csv")
    elif kind == "link to a secret folder":
        path.symlink_to(tmp_path)
    else:
        STRANGE[kind](path)
    with pytest.raises(SiteConfigError) as caught:
        load_records(folder, config, KEY)
    one_line(caught.value)


def test_a_link_that_stays_inside_is_read(tmp_path: Path) -> None:
    """Or the refusals above could be of everything."""
    (tmp_path / "real.csv").write_text("id,label,x\n1,a,0.5\n", encoding="utf-8")
    (tmp_path / "records.csv").symlink_to("real.csv")
    assert len(load_records(tmp_path, dataset(), KEY)) == 1


# ---- the vault


def with_vault(site: Path, **vault: str) -> None:
    write_config(site)
    text = "".join(f'{key} = "{value}"\n' for key, value in vault.items())
    with (site / CONFIG_FILE).open("a", encoding="utf-8") as file:
        file.write(f"[vault]\n{text}")


def test_a_vault_may_be_elsewhere_by_design(tmp_path: Path) -> None:
    folder = a_site(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name in (LEDGER_FILE, DATA_KEY_FILE, "ledger.anchor"):
        shutil.move(folder / name, tmp_path / "elsewhere" / name)
    with_vault(folder, folder="../elsewhere", anchor=str(tmp_path / "elsewhere" / "ledger.anchor"))
    open_site(folder).close()


@pytest.mark.parametrize("path", ["a\\u0000b", "x" * 300, "/dev/null", "nowhere"])
@pytest.mark.parametrize("key", ["folder", "anchor"])
def test_a_vault_that_cannot_be_is_refused_in_one_line(tmp_path: Path, key: str, path: str) -> None:
    folder = a_site(tmp_path)
    with_vault(folder, **{key: path})
    with pytest.raises((SiteConfigError, LedgerError)) as caught:
        open_site(folder)
    one_line(caught.value)


def test_a_reader_that_unpickles_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mutant of the tests above."""
    made = tmp_path / "made"
    (tmp_path / "records.csv").write_bytes(pickle.dumps(Planted(made)))

    def unpickles(folder: Path, *_: object) -> object:
        return pickle.loads((folder / "records.csv").read_bytes())

    monkeypatch.setattr("urna.client.readers.opened_csv", unpickles)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever comes of it
        load_records(tmp_path, dataset(), KEY)
    assert made.exists()
