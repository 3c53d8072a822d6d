"""A campaign in which sites lack candidates: what is sent to whom, once, and what becomes of those that do not get it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.simulator import Federation, always, bodies, entries, lost, once, silent, small, value
from tests.tiny_candidate import install_tiny
from urna.models.catalogue import cache_root
from urna.models.loading import artefact_sha256
from urna.protocol.errors import ModelError, RefusedError, RoundError
from urna.protocol.messages import Envelope, HelloReply, WeightsReply, signed
from urna.protocol.plan import Plan
from urna.protocol.sealing import Parcel
from urna.server import rounds
from urna.server.delivery import MAX_STALLS, files_of
from urna.server.journal import Entry
from urna.server.progress import describe

NAMES = ("pixels", "pca")
PIECE = 1000  # bytes


def plan_of(names: tuple[str, ...] = NAMES) -> Plan:
    return small(names=names, num_rounds=2, if_undecided="prior", num_curve_points=0)


def accepting(text: str) -> str:
    return f"{text}accept_weights = true\n"


@dataclass
class Machines(Federation):
    """Every site is on a machine of its own: ``caches`` says where candidates are on it; the others share the operator's."""

    site_toml: Callable[[str], str] = accepting
    caches: dict[str, Path] = field(default_factory=dict)

    def _handled(self, route: str, address: int, request: Parcel) -> Parcel | None:
        own = self.caches.get(self.sites[address].config.name)
        if own is None:
            return super()._handled(route, address, request)
        before = os.environ.get("URNA_CACHE_DIR")
        os.environ["URNA_CACHE_DIR"] = str(own)
        try:
            return super()._handled(route, address, request)
        finally:
            del os.environ["URNA_CACHE_DIR"]
            if before is not None:
                os.environ["URNA_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "PIECE_LIMIT_BYTES", PIECE)


def federation(tmp_path: Path, *empty: str, names: tuple[str, ...] = NAMES, **changes: object) -> Machines:
    """Some sites have empty caches of their own."""
    caches = {site: tmp_path / "machines" / site for site in empty}
    return Machines(tmp_path / "run", plan_of(names), caches=caches, **changes)  # type: ignore[arg-type]


def num_pieces(name: str) -> int:
    return -(-(cache_root() / name / "model.safetensors").stat().st_size // PIECE)


def others(run_dir: Path) -> dict[str, str]:
    found = value(run_dir, "hello")["others"]
    assert isinstance(found, dict)
    return found


def notes(run_dir: Path) -> list[Entry]:
    return [entry for entry in entries(run_dir) if entry.kind == "weights"]


class CrashError(Exception):
    """Of the operator's process."""


def crash(_route: str, _reply: Envelope) -> Envelope:
    raise CrashError


def started(one: Machines) -> None:
    """As far as to the first round."""
    with one.stages():
        pass


def test_a_campaign_in_which_one_site_starts_with_an_empty_cache(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2")
    one.run()
    assert value(tmp_path / "run", "finished")["winner"] in NAMES
    assert others(tmp_path / "run") == {}
    for name in NAMES:
        assert artefact_sha256(name, one.caches["site-2"] / "models") == artefact_sha256(name)
    for entry in entries(tmp_path / "run"):
        if entry.kind == "round":
            assert "site-2" in entry.value["survivors"]
    sent = bodies(one, "weights")
    assert [sender for sender, _ in sent].count("operator") == sum(map(num_pieces, NAMES))
    assert {sender for sender, _ in sent} == {"operator", "site-2"}
    assert not (one.site("site-2").folder / "delivery").exists()
    assert one.site("site-2").ledger.noted("weights") is not None
    assert one.site("site-1").ledger.noted("weights") is None


def test_a_candidate_that_the_operator_installed_is_used_where_nobody_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "operator"))
    install_tiny(tmp_path / "hub")
    one = federation(tmp_path, "site-2", "site-4", names=("tiny",))
    one.run()
    assert value(tmp_path / "run", "finished")["winner"] == "tiny"
    assert others(tmp_path / "run") == {}
    files = [body["file"] for sender, body in bodies(one, "weights") if sender == "operator" and body["offset"] == 0]
    assert list(dict.fromkeys(files)) == ["candidate.json", "config.json", "model.safetensors"]
    for site in ("site-2", "site-4"):
        assert artefact_sha256("tiny", one.caches[site] / "models") == artefact_sha256("tiny")


def test_a_piece_is_sealed_once_for_all_sites_that_lack_it(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", "site-3", names=("pca",))
    started(one)
    requests = [parcel for parcel, opened in zip(one.parcels, one.wire, strict=True) if _is_piece(opened)]
    assert len(requests) == 2 * num_pieces("pca")
    assert len({parcel.sha256 for parcel in requests}) == num_pieces("pca")


def _is_piece(opened: Envelope) -> bool:
    return opened.sender == "operator" and json.loads(opened.body)["kind"] == "weights"


def test_the_story_says_what_is_sent_to_whom(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", names=("pixels",))
    started(one)
    lines = describe(entries(tmp_path / "run"), one.plan).lines
    assert "hello: sending pixels (0.0 MB) to site-2, which have it not installed" in lines
    assert "hello: pixels is installed at site-2" in lines


def test_without_the_policy_the_site_is_left_out_with_what_to_do(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", site_toml=str)
    with one.stages() as stages:
        assert "site-2" not in stages.rounds.member_names
    assert "policy.accept_weights is off: run `urna models pretrain`" in others(tmp_path / "run")["site-2"]
    assert not notes(tmp_path / "run")


def test_too_few_sites_with_weights_end_the_run_with_the_reasons(tmp_path: Path) -> None:
    one = federation(
        tmp_path, "site-2", "site-3", "site-4", site_toml=lambda text: f"{accepting(text)}max_weights_bytes = 10\n"
    )
    with pytest.raises(
        RefusedError, match=r"site-2 refused: weights: with pixels \d+ bytes would have come, this site allows 10"
    ):
        one.run()


def test_a_site_that_does_not_answer_is_left_out_and_the_others_get_theirs(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", "site-3")
    one.faults["site-3"] = always(silent, "query.weights")
    started(one)
    assert others(tmp_path / "run") == {"site-3": "silent (weights of pixels)"}
    asked = [body["request_id"] for sender, body in bodies(one, "weights") if sender == "operator"]
    assert len(asked) == MAX_STALLS - 1 + sum(map(num_pieces, NAMES)) + 1  # pixels, in its one piece, to both at once


def test_one_lost_answer_is_asked_again(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2")
    one.faults["site-2"] = lost("query.weights", nth=3)
    started(one)
    assert others(tmp_path / "run") == {}


def test_a_site_that_loses_what_it_held_gets_it_again(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", names=("pca",))

    def forgets(_route: str, reply: Envelope) -> Envelope:
        shutil.rmtree(one.site("site-2").folder / "delivery")
        return reply

    one.faults["site-2"] = once(forgets, "query.weights", nth=4)
    started(one)
    assert others(tmp_path / "run") == {}
    assert artefact_sha256("pca", one.caches["site-2"] / "models") == artefact_sha256("pca")


LIES = {
    "nothing": (0, False),
    "more than there is": (10**9, False),
    "all, and never installs it": (None, False),
    "a byte": (1, False),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_site_that_lies_about_what_it_holds_is_asked_a_few_times_and_not_for_ever(
    tmp_path: Path, lie: tuple[int | None, bool]
) -> None:
    one = federation(tmp_path, "site-2", names=("pca",))
    identity = one.site("site-2").identity
    size = (cache_root() / "pca" / "model.safetensors").stat().st_size

    def lies(_route: str, reply: Envelope) -> Envelope:
        said = WeightsReply.model_validate_json(reply.body)
        says = {"received": size if lie[0] is None else lie[0], "complete": lie[1]}
        return signed(identity, said.model_copy(update=says))

    one.faults["site-2"] = always(lies, "query.weights")
    with one.stages() as stages:
        assert "site-2" not in stages.rounds.member_names
    assert "weights of pca" in others(tmp_path / "run")["site-2"]
    asked = [sender for sender, _ in bodies(one, "weights") if sender == "operator"]
    assert len(asked) <= MAX_STALLS


def test_a_site_that_goes_to_and_fro_is_not_asked_for_ever(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", names=("pca",))
    identity, turn = one.site("site-2").identity, 0

    def lies(_route: str, reply: Envelope) -> Envelope:
        nonlocal turn
        turn += 1
        said = WeightsReply.model_validate_json(reply.body)
        return signed(identity, said.model_copy(update={"received": PIECE * (turn % 2), "complete": False}))

    one.faults["site-2"] = always(lies, "query.weights")
    started(one)
    assert "does not keep what it gets" in others(tmp_path / "run")["site-2"]
    assert turn <= 2 * MAX_STALLS


def test_a_site_that_says_that_it_lacks_what_nobody_asked_for_is_no_member(tmp_path: Path) -> None:
    one = federation(tmp_path)
    identity = one.site("site-2").identity

    def wants(_route: str, reply: Envelope) -> Envelope:
        said = HelloReply.model_validate_json(reply.body)
        return signed(identity, said.model_copy(update={"lacks": ("vit",)}))

    one.faults["site-2"] = always(wants, "query.hello")
    started(one)
    assert others(tmp_path / "run")["site-2"] == "says that it lacks vit, which nobody asked for"


def test_a_resumed_campaign_goes_on_where_the_site_is(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2", names=("pca",))
    one.faults["site-2"] = once(crash, "query.weights", nth=5)
    with pytest.raises(CrashError):
        started(one)
    del one.faults["site-2"]
    one.wire.clear()
    started(one)
    offsets = [body["offset"] for sender, body in bodies(one, "weights") if sender == "operator"]
    assert offsets == [0, *(PIECE * at for at in range(5, num_pieces("pca")))]
    assert others(tmp_path / "run") == {}


def test_a_resumed_campaign_sends_nothing_again_that_was_installed(tmp_path: Path) -> None:
    one = federation(tmp_path, "site-2")
    one.faults["site-2"] = once(crash, "query.ballot")
    with pytest.raises(CrashError):
        one.run()
    one.wire.clear()
    del one.faults["site-2"]
    one.run()
    assert value(tmp_path / "run", "finished")
    assert bodies(one, "weights") == []
    assert "site-2" not in others(tmp_path / "run")


def test_an_operator_without_the_pinned_bytes_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine" / "models"
    for name in NAMES:
        shutil.copytree(cache_root() / name, mine / name)
    monkeypatch.setenv("URNA_CACHE_DIR", str(mine.parent))
    with (mine / "pca" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    one = federation(tmp_path, "site-2", names=("pca",))
    with pytest.raises(ModelError, match="as it was pinned"):
        one.run()
    assert bodies(one, "weights") == []


def test_nobody_of_too_few_is_sent_round_requests(tmp_path: Path) -> None:
    one = federation(tmp_path, *(f"site-{at}" for at in range(1, 6)), names=("pixels",))
    for site in one.sites:
        one.faults[site.config.name] = always(silent, "query.weights")
    with pytest.raises(RoundError, match=r"site-1 silent \(weights of pixels\)"):
        one.run()
    assert all(not site.ledger.rows() for site in one.sites)


def test_a_missing_artefact_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = artefact_sha256("pca")
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path))
    with pytest.raises(ModelError, match="must be readable to be sent, found No such file"):
        files_of("pca", pinned)
