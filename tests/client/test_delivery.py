"""A site that lacks a candidate: what it says, what it takes, what it never lets become an artefact."""

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from tests.attacks.mutations import FUZZ
from tests.attacks.test_fuzz_messages import Change, altered, changes
from tests.client.clinic import CANDIDATES, NAME, Clinic, a_plan, a_signer, write_config
from tests.models import folders
from tests.tiny_candidate import install_tiny
from urna.client import delivery
from urna.client.site import NOT_INSTALLED
from urna.models.candidate_file import CandidateFile
from urna.models.catalogue import cache_root
from urna.models.installed import install
from urna.models.loading import artefact_sha256, load_backbone
from urna.protocol.errors import FailureCode, ProtocolError
from urna.protocol.messages import (
    AnyReply,
    Envelope,
    Failure,
    HelloReply,
    HelloRequest,
    Masked,
    Refusal,
    WeightsReply,
    WeightsRequest,
    open_reply,
    signed,
)

SOME = 20_000  # bytes of a piece


@dataclass
class Remote:
    """A clinic whose site has a cache of its own, and what the operator can send it."""

    clinic: Clinic
    cache: Path
    files: dict[str, bytes]
    hello_request: Envelope
    own: HelloReply | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # of every piece
    around: set[str] = field(default_factory=set)  # what is in the site's folder before anything is sent

    @property
    def scratch(self) -> Path:
        return self.clinic.folder / delivery.SCRATCH

    def hello(self) -> AnyReply:
        reply = self.clinic.ask(self.hello_request)
        if isinstance(reply, HelloReply):
            self.own, self.clinic.own = reply, reply.member
        return reply

    def piece(self, offset: int = 0, length: int = SOME, name: str = "autoencoder", **changes: Any) -> Envelope:
        content = self.files[name]
        facts = {
            "candidate": name,
            "file": "model.safetensors",
            "sha256": sha256(content).hexdigest(),
            "size": len(content),
            "offset": offset,
        }
        fields = self.clinic.fields(f"weights/{name}/0/{offset}", "hello") | facts | self.changes | changes
        part = np.frombuffer(content[offset : offset + length], np.uint8)
        return self.clinic.sealed(WeightsRequest.model_validate(fields), {"part": part})

    def deliver(self, name: str = "autoencoder", length: int = SOME, start: int = 0) -> AnyReply:
        """Every piece, or those from ``start`` on; the last reply."""
        for offset in range(start, len(self.files[name]), length):
            reply = self.clinic.ask(self.piece(offset, length, name))
            if not isinstance(reply, WeightsReply):
                break
        return reply

    def installed(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture
def remote(clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """It has not said hello yet."""
    files = {name: (cache_root() / name / "model.safetensors").read_bytes() for name in CANDIDATES}
    write_config(clinic.folder, accept_weights=True)
    request = clinic.hello_request()
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "own"))
    return Remote(clinic.reopened(), tmp_path / "own" / "models", files, request)


@pytest.fixture
def joined(remote: Remote) -> Remote:
    assert isinstance(remote.hello(), HelloReply)
    remote.around = {path.name for path in remote.clinic.folder.iterdir() if "site.log" not in path.name}
    return remote


def code(reply: AnyReply) -> FailureCode:
    assert isinstance(reply, Failure), reply
    return reply.code


def refused(reply: AnyReply) -> str:
    assert isinstance(reply, Refusal), reply
    return "; ".join(reply.reasons)


def received(reply: AnyReply) -> tuple[int, bool]:
    assert isinstance(reply, WeightsReply), reply
    return reply.received, reply.complete


# ---- the hello


def test_a_site_says_what_it_lacks_where_its_policy_lets_weights_come(remote: Remote) -> None:
    reply = remote.hello()
    assert isinstance(reply, HelloReply)
    assert reply.lacks == CANDIDATES
    assert remote.clinic.ask(remote.hello_request) == reply  # again, and after the delivery too
    remote.deliver()
    assert remote.clinic.ask(remote.hello_request) == reply


def test_a_site_that_has_everything_lacks_nothing(clinic: Clinic) -> None:
    write_config(clinic.folder, accept_weights=True)
    assert clinic.reopened().hello().lacks == ()


def test_without_that_policy_the_hello_is_refused_with_what_to_do(remote: Remote) -> None:
    write_config(remote.clinic.folder)
    remote.clinic = remote.clinic.reopened()
    assert refused(remote.hello()) == "; ".join(f"model {name}: {NOT_INSTALLED}" for name in CANDIDATES)


def test_other_weights_under_the_same_name_are_refused_and_never_replaced(remote: Remote) -> None:
    other = remote.cache / "pixels" / "manifest.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"sha256": "00", "recipe": "mine"}')
    assert "model pixels: other weights are installed here" in refused(remote.hello())


def test_a_damaged_artefact_is_refused_and_never_replaced(remote: Remote) -> None:
    (remote.cache / "pixels").mkdir(parents=True)
    assert "model pixels: other weights are installed here" in refused(remote.hello())


def test_what_the_operator_pins_no_hash_of_cannot_be_delivered(remote: Remote) -> None:
    for models in ({}, dict.fromkeys(CANDIDATES, "0" * 64)):
        plan = a_plan(candidates=[{"name": name, "sha256": "1" * 64} for name in CANDIDATES])
        fields = {"plan_json": plan.model_dump_json(), "plan_sha256": plan.sha256, "models": models}
        reply = remote.clinic.ask(remote.clinic.sealed(remote.clinic.read(remote.hello_request).model_copy(update=fields)))
        assert "the operator pinned no weights to deliver" in refused(reply)


# ---- pieces


def test_a_candidate_arrives_in_pieces_is_used_and_costs_nothing(joined: Remote) -> None:
    size = len(joined.files["autoencoder"])
    assert size > 2 * SOME
    assert received(joined.clinic.ask(joined.piece(0))) == (SOME, False)
    assert received(joined.clinic.ask(joined.piece(SOME))) == (2 * SOME, False)
    assert joined.installed() == []
    assert received(joined.deliver(start=2 * SOME)) == (size, True)
    assert received(joined.deliver("pixels")) == (len(joined.files["pixels"]), True)
    assert joined.installed() == sorted(CANDIDATES)
    for name in CANDIDATES:
        digest = sha256(joined.files[name]).hexdigest()
        assert load_backbone(name, digest).sha256 == artefact_sha256(name) == digest
    assert not joined.scratch.exists()
    assert joined.clinic.site.ledger.rows() == ()
    assert isinstance(joined.clinic.ask(joined.clinic.ballot()), Masked)
    log = joined.clinic.log()
    assert log.count("weights_begun") == 1  # pixels came in one piece
    assert log.count("weights_installed") == 2


def test_what_was_not_delivered_is_refused_before_it_is_reserved(joined: Remote) -> None:
    joined.deliver()
    for request in (joined.clinic.ballot(), joined.clinic.train(), joined.clinic.evaluate()):
        assert code(joined.clinic.ask(request)) == FailureCode.MODEL
    assert joined.clinic.site.ledger.rows() == ()


def test_a_piece_that_comes_again_changes_nothing(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    joined.clinic.ask(joined.piece(SOME))
    (part,) = joined.scratch.rglob("*.part")
    for request in (joined.piece(0), joined.piece(SOME), joined.piece(7, 1000)):
        assert received(joined.clinic.ask(request)) == (2 * SOME, False)
        assert part.read_bytes() == joined.files["autoencoder"][: 2 * SOME]
    joined.deliver()
    head = joined.clinic.site.ledger.head()
    assert received(joined.clinic.ask(joined.piece(SOME))) == (len(joined.files["autoencoder"]), True)
    assert joined.clinic.site.ledger.head() == head


@pytest.mark.parametrize("is_installed", [False, True])
def test_another_piece_for_the_same_place_is_refused(joined: Remote, is_installed: bool) -> None:
    if is_installed:
        joined.deliver()
    else:
        joined.clinic.ask(joined.piece(0))
    good = joined.piece(0)
    part = good.arrays["part"].copy()
    part[100] ^= 1
    wrong = signed(joined.clinic.operator, joined.clinic.read(good), {"part": part})
    assert code(joined.clinic.ask(wrong)) == FailureCode.BAD_REQUEST
    assert received(joined.deliver())[1]


def test_a_piece_that_comes_too_early_is_not_kept_and_the_answer_says_where_to_go_on(joined: Remote) -> None:
    assert received(joined.clinic.ask(joined.piece(SOME))) == (0, False)
    joined.clinic.ask(joined.piece(0))
    assert received(joined.clinic.ask(joined.piece(2 * SOME))) == (SOME, False)


def test_a_delivery_goes_on_after_a_restart(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    joined.clinic = joined.clinic.restarted()
    assert received(joined.clinic.ask(joined.piece(SOME))) == (2 * SOME, False)
    assert received(joined.deliver())[1]
    assert not joined.scratch.exists()


def test_a_torn_piece_is_filled_up(joined: Remote) -> None:
    """As a power cut leaves it."""
    joined.clinic.ask(joined.piece(0))
    joined.clinic.ask(joined.piece(SOME))
    (part,) = joined.scratch.rglob("*.part")
    os.truncate(part, SOME + 123)
    assert received(joined.clinic.ask(joined.piece(2 * SOME))) == (SOME + 123, False)
    assert received(joined.clinic.ask(joined.piece(SOME))) == (2 * SOME, False)
    assert received(joined.deliver())[1]


def test_whole_files_that_were_not_installed_before_a_crash_are_installed_by_the_next_piece(
    joined: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delivery.Delivery, "_install", crashes)
        with pytest.raises(KeyboardInterrupt):
            joined.deliver("pixels")
    assert joined.installed() == []
    joined.clinic = joined.clinic.restarted()
    assert received(joined.clinic.ask(joined.piece(0, name="pixels"))) == (len(joined.files["pixels"]), True)
    assert joined.installed() == ["pixels"]


def test_what_was_installed_before_a_crash_and_not_noted_counts_with_the_next_piece(
    joined: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashes(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delivery.Delivery, "_note", crashes)
        with pytest.raises(KeyboardInterrupt):
            joined.deliver("pixels")
    assert joined.installed() == ["pixels"]
    joined.clinic.ask(joined.piece(0, name="pixels"))
    (noted,) = joined.clinic.site.ledger.all_noted("weights")
    assert noted.detail == {"sha256": sha256(joined.files["pixels"]).hexdigest(), "size": str(len(joined.files["pixels"]))}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 300)), max_size=12))
def test_in_whatever_order_pieces_come_only_the_pinned_file_is_installed(joined: Remote, pieces: list[tuple[int, int]]) -> None:
    size = len(joined.files["pixels"])
    for offset, length in pieces:
        offset %= size
        reply = joined.clinic.ask(joined.piece(offset, length, "pixels"))
        got, complete = received(reply)
        for part in joined.scratch.rglob("*.part"):
            assert part.read_bytes() == joined.files["pixels"][:got]
        assert joined.installed() == (["pixels"] if complete else [])
    assert received(joined.deliver("pixels", 150)) == (size, True)
    assert (joined.cache / "pixels" / "model.safetensors").read_bytes() == joined.files["pixels"]
    shutil.rmtree(joined.cache)


# ---- what is never taken


def test_other_bytes_than_the_pinned_ones_never_become_an_artefact(joined: Remote) -> None:
    wrong = bytearray(joined.files["autoencoder"])
    wrong[-1] ^= 1
    digest = sha256(joined.files["autoencoder"]).hexdigest()
    joined.files["autoencoder"] = bytes(wrong)
    joined.changes = {"sha256": digest}
    assert code(joined.deliver()) == FailureCode.BAD_REQUEST
    assert joined.installed() == []
    assert not joined.scratch.exists()
    assert "with the pinned hash, found other bytes" in joined.clinic.log()


def test_bytes_of_the_pinned_hash_that_are_no_model_never_become_an_artefact(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator can pin the hash of anything."""
    write_config(clinic.folder, accept_weights=True)
    content = b"\x80\x04not a model" * 100
    pinned = dict.fromkeys(CANDIDATES, sha256(content).hexdigest())
    request = clinic.hello_request(models=pinned)
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "own"))
    remote = Remote(clinic.reopened(), tmp_path / "own" / "models", dict.fromkeys(CANDIDATES, content), request)
    assert isinstance(remote.hello(), HelloReply)
    assert code(remote.deliver()) == FailureCode.MODEL
    assert remote.installed() == []
    assert not remote.scratch.exists()
    assert remote.clinic.site.ledger.all_noted("weights") == ()


BAD_FIELDS: dict[str, dict[str, Any]] = {
    "another hash": {"sha256": "0" * 64},
    "of another file": {"file": "config.json"},
    "of an installed candidate": {"file": "candidate.json"},
    "larger than any": {"size": 65 * 2**20},
    "not of the plan": {"candidate": "cnn"},
    "past its end": {"size": 100},
}


@pytest.mark.parametrize("change", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_piece_that_is_not_of_what_was_pinned_leaves_nothing(joined: Remote, change: dict[str, Any]) -> None:
    assert code(joined.clinic.ask(joined.piece(**change))) == FailureCode.BAD_REQUEST
    assert not joined.scratch.exists()
    assert joined.installed() == []


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..", "", "a/b", "model.bin", "model.safetensors\0", "x.py", "manifest.json"],
)
@pytest.mark.parametrize("field", ["file", "candidate"])
def test_names_with_path_parts_and_foreign_names_are_no_requests(joined: Remote, field: str, name: str) -> None:
    good = joined.clinic.read(joined.piece())
    request = joined.clinic.sealed(good.model_copy(update={field: name}), {"part": np.zeros(9, np.uint8)})
    assert code(joined.clinic.ask(request)) == FailureCode.BAD_REQUEST
    assert not joined.scratch.exists()


ARRAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "empty": {"part": np.zeros(0, np.uint8)},
    "another type": {"part": np.zeros(5, np.float32)},
    "another shape": {"part": np.zeros((5, 5), np.uint8)},
    "another name": {"vector": np.zeros(5, np.uint8)},
    "one more": {"part": np.zeros(5, np.uint8), "more": np.zeros(5, np.uint8)},
    "too large": {"part": np.zeros(16 * 2**20 + 1, np.uint8)},
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_a_piece_of_another_form_is_refused(joined: Remote, arrays: dict[str, Any]) -> None:
    request = joined.clinic.sealed(joined.clinic.read(joined.piece(size=30 * 2**20)), arrays)
    assert code(joined.clinic.ask(request)) == FailureCode.BAD_REQUEST
    assert not joined.scratch.exists()


def test_nobody_but_the_operator_can_send_weights(joined: Remote) -> None:
    for stranger in (a_signer("operator"), joined.clinic.peers[0]):
        forged = signed(stranger, joined.clinic.read(joined.piece()), joined.piece().arrays)
        assert code(joined.clinic.ask(forged)) == FailureCode.BAD_REQUEST
    assert not joined.scratch.exists()


def test_weights_of_a_campaign_that_was_never_joined_are_refused(remote: Remote) -> None:
    assert code(remote.clinic.ask(remote.piece())) == FailureCode.BAD_REQUEST
    assert not remote.scratch.exists()


def test_what_a_site_has_is_never_sent_to_it(clinic: Clinic) -> None:
    write_config(clinic.folder, accept_weights=True)
    clinic = clinic.reopened()
    files = {name: (cache_root() / name / "model.safetensors").read_bytes() for name in CANDIDATES}
    clinic.hello()
    remote = Remote(clinic, cache_root(), files, clinic.hello_request())
    assert code(clinic.ask(remote.piece())) == FailureCode.BAD_REQUEST
    assert not remote.scratch.exists()


def test_after_the_first_release_no_weights_are_taken(joined: Remote) -> None:
    joined.deliver("pixels")
    assert isinstance(joined.clinic.ask(joined.clinic.train()), Masked)
    assert code(joined.clinic.ask(joined.piece())) == FailureCode.BAD_REQUEST
    assert not joined.scratch.exists()


def test_a_close_removes_what_was_begun_and_nothing_comes_after_it(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    assert joined.scratch.exists()
    joined.clinic.ask(joined.clinic.close())
    assert not joined.scratch.exists()
    assert code(joined.clinic.ask(joined.piece(0))) == FailureCode.STALE
    assert not joined.scratch.exists()


def test_a_policy_that_was_made_stricter_stops_a_delivery(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    write_config(joined.clinic.folder)
    joined.clinic = joined.clinic.reopened()
    assert "policy.accept_weights is off" in refused(joined.clinic.ask(joined.piece(SOME)))


def test_a_paused_site_takes_nothing(joined: Remote) -> None:
    joined.clinic.site.ledger.note("pause", "")
    assert code(joined.clinic.ask(joined.piece(0))) == FailureCode.PAUSED
    assert not joined.scratch.exists()


def test_somebody_who_installs_other_weights_in_the_meantime_keeps_them(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    mine = joined.cache / "autoencoder" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert code(joined.clinic.ask(joined.piece(SOME))) == FailureCode.MODEL
    assert mine.read_bytes() == b"mine"


# ---- limits


def limited(remote: Remote, **policy: Any) -> Remote:
    write_config(remote.clinic.folder, accept_weights=True, **policy)
    remote.clinic = remote.clinic.reopened()
    remote.hello()
    return remote


def test_a_candidate_over_the_limit_is_refused_with_the_first_piece(remote: Remote) -> None:
    size = len(remote.files["autoencoder"])
    limited(remote, max_weights_bytes=size - 1)
    assert f"{size} bytes would have come, this site allows {size - 1} in all" in refused(remote.clinic.ask(remote.piece(0)))
    assert not remote.scratch.exists()


def test_the_limit_holds_over_all_candidates_that_ever_came(remote: Remote) -> None:
    sizes = {name: len(content) for name, content in remote.files.items()}
    limited(remote, max_weights_bytes=sum(sizes.values()) - 1)
    assert received(remote.deliver())[1]
    assert f"{sum(sizes.values())} bytes would have come" in refused(remote.deliver("pixels"))
    assert received(remote.clinic.ask(remote.piece(0))) == (sizes["autoencoder"], True)  # what is here stays


def test_what_was_begun_counts_too(remote: Remote) -> None:
    sizes = {name: len(content) for name, content in remote.files.items()}
    limited(remote, max_weights_bytes=sizes["autoencoder"])
    half = sizes["pixels"] // 2
    remote.clinic.ask(remote.piece(0, half, "pixels"))
    assert f"{sizes['autoencoder'] + half} bytes would have come" in refused(remote.clinic.ask(remote.piece(0)))


def test_weights_leave_room_on_the_disk_for_the_ledger(joined: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(joined.clinic.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=delivery.SPARE_BYTES + 100))
    assert code(joined.clinic.ask(joined.piece(0))) == FailureCode.MODEL
    assert not list(joined.scratch.rglob("*.part"))
    assert received(joined.clinic.ask(joined.piece(0, name="pixels", size=99, length=9)))[0] == 9


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to write further, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_in_the_middle_of_a_piece_leaves_the_file_as_it_was(joined: Remote) -> None:
    joined.clinic.site.log.disabled = True  # its file is longer than that
    try:
        joined.clinic.ask(joined.piece(0, 10_000))
        path = joined.scratch / sha256(joined.files["autoencoder"]).hexdigest() / "autoencoder" / "model.safetensors.part"
        with files_up_to(15_000):
            with pytest.raises(OSError, match="large"):
                path.with_name("probe").write_bytes(bytes(20_000))
            path.with_name("probe").unlink()
            assert code(joined.clinic.ask(joined.piece(10_000))) == FailureCode.MODEL
        assert path.read_bytes() == joined.files["autoencoder"][:10_000]
        assert received(joined.deliver())[1]
    finally:
        joined.clinic.site.log.disabled = False


def test_what_nobody_went_on_with_for_a_week_is_removed(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    (begun,) = joined.scratch.iterdir()
    joined.clinic.ask(joined.piece(0, 100, "pixels"))
    assert begun.exists()
    long_ago = time.time() - delivery.KEPT_SECONDS - 60
    os.utime(begun, (long_ago, long_ago))
    joined.clinic.ask(joined.piece(100, 100, "pixels"))
    assert not begun.exists()


def test_only_the_owner_can_look_into_what_was_begun(joined: Remote) -> None:
    joined.clinic.ask(joined.piece(0))
    assert joined.scratch.stat().st_mode & 0o777 == 0o700
    (part,) = joined.scratch.rglob("*.part")
    assert part.stat().st_mode & 0o777 == 0o600


def test_a_link_in_place_of_a_growing_file_is_not_followed(joined: Remote, tmp_path: Path) -> None:
    joined.clinic.ask(joined.piece(0, 100))
    (part,) = joined.scratch.rglob("*.part")
    part.unlink()
    (tmp_path / "victim").write_bytes(b"")
    part.symlink_to(tmp_path / "victim")
    assert isinstance(joined.clinic.ask(joined.piece(0)), Failure)
    assert (tmp_path / "victim").read_bytes() == b""


def test_a_cache_on_another_disk_gets_the_whole_candidate_or_nothing(joined: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[Path, Path], Path] = Path.rename

    def rename(source: Path, target: Path) -> Path:
        if delivery.SCRATCH in source.parts and joined.cache in Path(target).parents:
            raise OSError(errno.EXDEV, "another disk")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert received(joined.deliver())[1]
    assert joined.installed() == ["autoencoder"]
    assert not joined.scratch.exists()


def test_two_sites_of_one_cache_do_not_disturb_each_other(joined: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was faster, between the look and the step."""
    real = delivery._move

    def slower(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        real(source, target)

    monkeypatch.setattr(delivery, "_move", slower)
    assert received(joined.deliver())[1]
    assert (joined.cache / "autoencoder" / "model.safetensors").read_bytes() == joined.files["autoencoder"]


# ---- candidates that the operator installed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer as `urna models add` installs it: the folder of its artefact."""
    return install_tiny(*(tmp_path_factory.mktemp(name) for name in ("hub", "root")))


@dataclass
class Added:
    """A clinic whose site never heard of the candidate."""

    clinic: Clinic
    files: dict[str, bytes]
    pinned: str
    cache: Path

    def piece(self, file: str, offset: int = 0, length: int = 10**6, **changes: Any) -> Envelope:
        content = self.files[file]
        facts = {"candidate": "tiny", "file": file, "sha256": sha256(content).hexdigest(), "size": len(content)}
        fields = self.clinic.fields(f"weights/tiny/{file}/{offset}".lower(), "hello") | facts | {"offset": offset} | changes
        part = np.frombuffer(content[offset : offset + length], np.uint8)
        return self.clinic.sealed(WeightsRequest.model_validate(fields), {"part": part})


@pytest.fixture
def added(clinic: Clinic, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Added:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    pinned = artefact_sha256("tiny", tiny.parent)
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "own"))
    clinic.plan = a_plan(candidates=[{"name": "tiny"}])
    return Added(clinic, files, pinned, tmp_path / "own" / "models")


def opened(added: Added, **policy: Any) -> Added:
    write_config(added.clinic.folder, **({"accept_weights": True} | policy))
    added.clinic = added.clinic.reopened()
    fields = {"plan_json": added.clinic.plan.model_dump_json(), "plan_sha256": added.clinic.plan.sha256}
    commitment = sha256(b"").hexdigest()
    header = added.clinic.fields("hello", "hello") | fields | {"models": {"tiny": added.pinned}, "graph_commitment": commitment}
    reply = added.clinic.ask(added.clinic.sealed(HelloRequest.model_validate(header)))
    assert isinstance(reply, HelloReply), reply
    assert reply.lacks == ("tiny",)
    return added


def test_an_installed_candidate_arrives_with_all_its_files_or_not_at_all(added: Added) -> None:
    opened(added)
    order = ["candidate.json", *sorted(set(added.files) - {"candidate.json"})]
    for file in order[:-1]:
        assert received(added.clinic.ask(added.piece(file))) == (len(added.files[file]), False)
        assert not added.cache.exists()
    half = len(added.files[order[-1]]) // 2
    assert received(added.clinic.ask(added.piece(order[-1], 0, half))) == (half, False)
    assert received(added.clinic.ask(added.piece(order[-1], half))) == (len(added.files[order[-1]]), True)
    assert load_backbone("tiny", added.pinned).spec.licence == "Apache-2.0"
    assert {path.name: path.read_bytes() for path in (added.cache / "tiny").iterdir()} == added.files
    assert not (added.clinic.folder / delivery.SCRATCH).exists()


def test_files_are_taken_only_once_the_list_of_their_hashes_is_here(added: Added) -> None:
    opened(added)
    assert code(added.clinic.ask(added.piece("config.json"))) == FailureCode.BAD_REQUEST
    assert code(added.clinic.ask(added.piece("model.safetensors"))) == FailureCode.BAD_REQUEST
    added.clinic.ask(added.piece("candidate.json"))
    added.files["config.json"] += b" "
    assert code(added.clinic.ask(added.piece("config.json"))) == FailureCode.BAD_REQUEST
    assert code(added.clinic.ask(added.piece("model.safetensors", size=2**40))) == FailureCode.BAD_REQUEST
    assert not added.cache.exists()


def test_a_licence_that_the_site_does_not_take_ends_the_delivery_when_it_is_known(added: Added) -> None:
    opened(added, licences=["MIT"])
    assert isinstance(added.clinic.ask(added.piece("candidate.json")), WeightsReply)
    assert refused(added.clinic.ask(added.piece("config.json"))) == "licences: not allowed at this site: tiny (Apache-2.0)"
    assert not added.cache.exists()


def test_the_whole_candidate_counts_as_soon_as_its_files_are_known(added: Added) -> None:
    total = sum(map(len, added.files.values()))
    opened(added, max_weights_bytes=total - 1)
    added.clinic.ask(added.piece("candidate.json"))
    assert f"with tiny {total} bytes would have come" in refused(added.clinic.ask(added.piece("config.json")))


def test_a_list_that_is_none_is_removed(added: Added) -> None:
    added.files["candidate.json"] = b'{"format": "urna-candidate-1", "files": {"../x": {}}}'
    added.pinned = sha256(added.files["candidate.json"]).hexdigest()
    opened(added)
    assert code(added.clinic.ask(added.piece("candidate.json"))) == FailureCode.MODEL
    assert not (added.clinic.folder / delivery.SCRATCH).exists()


def test_a_candidate_that_was_never_delivered_costs_nothing(added: Added) -> None:
    """Its site does not even know how many numbers it has."""
    opened(added)
    hello = added.clinic.site.ledger.campaign(added.clinic.campaign)
    assert hello is not None
    added.clinic.own = HelloReply.model_validate_json(Envelope.from_bytes(hello.reply).body).member
    request = added.clinic.ballot(candidates=("tiny", "tiny"))
    assert code(added.clinic.ask(request)) == FailureCode.MODEL
    assert code(added.clinic.ask(added.clinic.train(candidate="tiny"))) == FailureCode.MODEL
    assert added.clinic.site.ledger.rows() == ()


# ---- candidates that would say whether a site holds a record


def text_artefact(
    folder: Path, max_tokens: int = 20, tokenizer: bytes | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> dict[str, bytes]:
    """A tiny BERT of 20 positions, of which an operator changed something and pinned the result."""
    home = install("tiny", folders.bert(folder / "source"), folders.ABOUT, root=folder / "root").folder
    files = {path.name: path.read_bytes() for path in home.iterdir()}
    files["tokenizer.json"] = tokenizer or files["tokenizer.json"]
    files["model.safetensors"] = safetensors.torch.save(safetensors.torch.load(files["model.safetensors"]) | (tensors or {}))
    facts = json.loads(files["candidate.json"])
    facts["text"]["max_tokens"] = max_tokens
    for name, pin in facts["files"].items():
        pin |= {"sha256": sha256(files[name]).hexdigest(), "size": len(files[name])}
    return files | {"candidate.json": CandidateFile.model_validate_json(json.dumps(facts)).to_bytes()}


def without_an_unknown_word() -> bytes:
    found = Tokenizer(WordLevel({word: at for at, word in enumerate(folders.WORDS)}, unk_token="[NONE]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found.to_str().encode()


def infinite_at(position: int) -> torch.Tensor:
    """Position embeddings that overflow for texts that are this long."""
    table = torch.zeros(20, 16)
    table[position] = torch.tensor([3e38, -3e38] * 8)
    return table


def delivered(added: Added, files: dict[str, bytes]) -> AnyReply:
    added.files, added.pinned = files, sha256(files["candidate.json"]).hexdigest()
    opened(added)
    for file in ["candidate.json", *sorted(set(files) - {"candidate.json"})]:
        reply = added.clinic.ask(added.piece(file))
    return reply


def test_a_text_candidate_arrives(added: Added, tmp_path: Path) -> None:
    assert received(delivered(added, text_artefact(tmp_path)))[1]


@pytest.mark.parametrize("attack", ["a word that it cannot read", "a text longer than its positions", "a text of full length"])
def test_a_candidate_that_fails_for_single_records_is_not_installed(added: Added, tmp_path: Path, attack: str) -> None:
    """Its release would fail where one record is, and not where it is not: no noise hides that."""
    files = {
        "a word that it cannot read": lambda: text_artefact(tmp_path, tokenizer=without_an_unknown_word()),
        "a text longer than its positions": lambda: text_artefact(tmp_path, max_tokens=21),
        "a text of full length": lambda: text_artefact(
            tmp_path, tensors={"model.embeddings.position_embeddings.weight": infinite_at(19)}
        ),
    }[attack]()
    assert code(delivered(added, files)) == FailureCode.MODEL
    assert not added.cache.exists()
    assert not (added.clinic.folder / delivery.SCRATCH).exists()
    assert added.clinic.site.ledger.rows() == ()


# ---- hostile messages


@settings(FUZZ, max_examples=600)
@given(st.integers(0, 2), changes)
def test_whatever_the_operator_signs_the_cache_holds_the_pinned_candidate_or_none(
    joined: Remote, place: int, change: Change
) -> None:
    joined.clinic.site.log.disabled = True
    try:
        joined.clinic.ask(joined.piece(0))
        request = altered(joined.clinic.operator, joined.piece(SOME * place), change)
        reply = joined.clinic.site.handle(request)
        said = open_reply(reply, joined.clinic.site.roster, NAME, request)
        assert said.kind in ("weights", "refusal", "failure")
    finally:
        joined.clinic.site.log.disabled = False
    assert joined.installed() == []  # one piece is missing, whatever that was
    held = b"".join(part.read_bytes() for part in joined.scratch.rglob("*.part"))
    assert len(held) <= len(joined.files["autoencoder"])
    outside = {path.name for path in joined.clinic.folder.iterdir()} - {"delivery"}
    assert {name for name in outside if "site.log" not in name} == joined.around
    shutil.rmtree(joined.scratch, ignore_errors=True)


def test_a_reply_names_its_piece(joined: Remote) -> None:
    first, second = joined.piece(0), joined.piece(SOME)
    reply = joined.clinic.site.handle(first)
    with pytest.raises(ProtocolError):
        open_reply(reply, joined.clinic.site.roster, NAME, second)
