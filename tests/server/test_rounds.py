"""What carries a round and what crosses the wire in it: Flower's Grid as a stub, hostile members, and no site's number."""

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.serverapp import Grid as FlowerGrid
from flwr.supercore.task_identity import TaskIdentity

from tests.simulator import Federation, bodies, lost, rounds, small, value
from urna.privacy.fixed_point import Grid
from urna.protocol import sealing
from urna.protocol.errors import PlanError, RoundError
from urna.protocol.identity import Identity, create_identity
from urna.protocol.messages import (
    AnyArray,
    Envelope,
    HelloReply,
    Masked,
    Member,
    signed,
    to_record,
)
from urna.protocol.plan import Plan
from urna.protocol.sealing import Parcel
from urna.server.exchange import GridTransport

SITES = tuple(f"site-{number}" for number in range(1, 6))


def brief(**changes: object) -> Plan:
    """Five sites, one candidate, two rounds."""
    return small(**{"names": ("pixels",), "num_rounds": 2, "if_undecided": "prior", "num_curve_points": 0} | changes)  # type: ignore[arg-type]


# ---- over Flower's Grid


@dataclass
class Stub:
    """Flower's Grid as far as it is used: what is pushed, and a reply to each after some pulls."""

    unpushable: dict[int, list[str]] = field(default_factory=dict)  # node -> what a push that stored nothing gives back
    silent: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)  # Flower answers with an error
    pulls_before_reply: int = 0
    pushed: dict[str, Message] = field(default_factory=dict)
    pulled: list[list[str]] = field(default_factory=list)
    handle: Callable[[Parcel], Parcel] = lambda request: request
    nodes: deque[list[int]] = field(default_factory=lambda: deque([[1, 2, 3]]))

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes[0] if len(self.nodes) == 1 else self.nodes.popleft()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        node = message.metadata.dst_node_id
        if node in self.unpushable:
            return self.unpushable[node]
        message.metadata.__dict__["_message_id"] = f"id-{node}"
        self.pushed[f"id-{node}"] = message
        return [f"id-{node}"]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = list(message_ids)
        self.pulled.append(asked)
        found = []
        for message_id in asked:
            request = self.pushed.get(message_id)
            node = 0 if request is None else request.metadata.dst_node_id
            late = sum(message_id in one for one in self.pulled) <= self.pulls_before_reply
            if request is None or node in self.silent or late:
                continue
            if node in self.broken:
                found.append(Message(Error(code=3, reason="no such node"), reply_to=request))
            else:
                reply = self.handle(sealing.from_record(request.content))
                found.append(Message(sealing.to_record(reply), reply_to=request))
            del self.pushed[message_id]
        return found


@pytest.fixture
def in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets only a task of a run make messages."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


REQUEST = Parcel({"0" * 16: b"header"}, np.arange(200, dtype=np.uint8))


def over(stub: Stub) -> GridTransport:
    return GridTransport(cast("FlowerGrid", stub), poll_seconds=0.001)


def asked_of(stub: Stub, *nodes: int, timeout_seconds: float = 5.0) -> Iterator[tuple[int, Parcel | None]]:
    return over(stub).ask("train", dict.fromkeys(nodes, REQUEST), timeout_seconds)


@pytest.mark.usefixtures("in_a_task")
def test_replies_are_pulled_one_id_at_a_time_and_only_when_the_last_was_taken() -> None:
    stub = Stub(pulls_before_reply=2)
    answers = asked_of(stub, 1, 2, 3)
    first = next(answers)
    replied = len(stub.pushed)
    assert (first[0], replied) == (1, 2)  # the others wait where they are
    assert [node for node, reply in answers if reply is not None] == [2, 3]
    assert all(len(ids) == 1 for ids in stub.pulled)
    assert first[1] is not None
    assert (first[1].headers, first[1].sha256) == (REQUEST.headers, REQUEST.sha256)


@pytest.mark.usefixtures("in_a_task")
def test_a_silent_site_holds_nobody_up_and_the_deadline_ends_the_exchange() -> None:
    stub = Stub(silent={1})
    started = time.monotonic()
    answers = asked_of(stub, 1, 2, timeout_seconds=0.3)
    assert next(answers)[0] == 2
    assert time.monotonic() - started < 0.25  # it did not wait for the silent one
    assert list(answers) == []
    assert 0.25 < time.monotonic() - started < 3


@pytest.mark.usefixtures("in_a_task")
@pytest.mark.parametrize("stored", [[], [""]])
def test_a_message_that_was_not_stored_is_told_at_once(stored: list[str]) -> None:
    stub = Stub(unpushable={2: stored})
    answers = list(asked_of(stub, 1, 2, 3))
    assert [(node, reply is None) for node, reply in answers] == [(2, True), (1, False), (3, False)]


@pytest.mark.usefixtures("in_a_task")
def test_flowers_errors_and_foreign_content_are_no_replies() -> None:
    class Foreign(Stub):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for reply in super().pull_messages(message_ids):
                if reply.has_content():
                    reply.content = to_record(Envelope("site-1", b"{}", b""))  # as it was before it was sealed
                yield reply

    stub = Foreign(broken={1})
    assert list(asked_of(stub, 1, 2)) == [(1, None), (2, None)]


@pytest.mark.usefixtures("in_a_task")
def test_messages_live_as_long_as_the_round_may_take() -> None:
    stub = Stub(silent={1})
    list(asked_of(stub, 1, timeout_seconds=0.05))
    (message,) = stub.pushed.values()
    assert (message.metadata.ttl, message.metadata.message_type) == (0.05, "train")


def test_addresses_are_waited_for_until_enough_are_there_or_the_time_is_up() -> None:
    stub = Stub(nodes=deque([[], [1], [1, 2]]))
    assert list(over(stub).addresses(2, timeout_seconds=5.0)) == [1, 2]
    assert list(over(stub).addresses(3, timeout_seconds=0.05)) == [1, 2]


@pytest.mark.usefixtures("in_a_task")
def test_a_round_over_flowers_records_opens_what_the_sites_sent(tmp_path: Path) -> None:
    """The same exchanges over the stub: segments, shares, checks and pads survive Flower's records."""

    class OverRecords(Federation):
        """Every parcel goes through Flower's records, both ways."""

        def _handled(self, route: str, address: int, request: Parcel) -> Parcel | None:
            reply = super()._handled(route, address, sealing.from_record(sealing.to_record(request)))
            return None if reply is None else sealing.from_record(sealing.to_record(reply))

    federation = OverRecords(tmp_path / "run", brief())
    with federation.stages() as stages:
        state = stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 4.0, 2)
    assert state.step == 1


# ---- what the next request shows


def test_every_request_shows_what_became_of_the_rounds_that_its_sites_answered_and_nothing_twice(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief(names=("pixels", "pca")))
    federation.run()
    asked: list[dict[str, object]] = []
    for _, body in (one for kind in ("ballot", "train", "evaluate", "close") for one in bodies(federation, kind)):
        if body not in asked:
            asked.append(body)
    shown = {str(body["request_id"]): [audit["round_id"] for audit in body["audits"]] for body in asked}  # type: ignore[attr-defined]
    assert shown == {
        "run/ballot/1": [],
        "run/final/1": ["run/ballot/1"],
        "run/final/2": ["run/final/1"],
        "run/evaluation/final/1": ["run/final/2"],
        "run/close": ["run/evaluation/final/1"],
    }
    for body in asked:
        for audit in body["audits"]:  # type: ignore[attr-defined]
            assert (tuple(audit["alive"]), len(audit["answers"]) >= 4) == (SITES, True)
    for site in federation.sites:
        assert not site.ledger.rounds.unaudited("run")


def test_a_round_is_shown_until_every_site_that_answered_it_has_seen_its_end(tmp_path: Path) -> None:
    """Site 2 answers the unmask of round 1 and hears nothing of round 2: round 3, a stage later, shows it what it missed."""
    federation = Federation(tmp_path / "run", brief(num_rounds=2))
    federation.unreached["site-2"] = lambda request: request.request_id == "run/final/2"
    federation.run()
    asked = {str(body["request_id"]): body for _, body in bodies(federation, "evaluate")}
    shown = {audit["round_id"] for audit in asked["run/evaluation/final/1"]["audits"]}  # type: ignore[attr-defined]
    assert shown == {"run/final/1", "run/final/2"}
    assert not bodies(federation, "failure")
    assert set(value(tmp_path / "run", "statements")) == set(SITES)


@pytest.mark.parametrize("change", [{"alive": list(SITES[:4])}, {"answers": {}}, None])
def test_a_server_that_shows_another_list_or_nothing_is_answered_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object] | None
) -> None:
    from urna.server.rounds import Rounds

    honest = Rounds.unshown_audits

    def forged(rounds_: Rounds, sites: tuple[str, ...]) -> tuple[object, ...]:
        shown = honest(rounds_, sites)
        if change is None:
            return ()
        return tuple(type(audit).model_validate(audit.model_dump() | change) for audit in shown)

    monkeypatch.setattr(Rounds, "unshown_audits", forged)
    federation = Federation(tmp_path / "run", brief())
    with federation.stages() as stages:
        state = stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 4.0, 2)
        assert stages.train("final", "final/2", "pixels", state, 2, 4.0, 2) is state
    dropped = rounds(tmp_path / "run")["final/2"].value["dropped"]
    assert dropped == dict.fromkeys(SITES, "failed: audit")
    for site in federation.sites:
        assert sum(row.count for row in site.ledger.rows()) == 1  # the refused round cost nothing


# ---- members that would stop everybody


def hello_with(identity: Identity, public_key: Callable[[], str]) -> Callable[[str, Envelope], Envelope]:
    """A member that shows another round key, signed by itself."""

    def fault(route: str, reply: Envelope) -> Envelope:
        if route != "query.hello":
            return reply
        said = HelloReply.model_validate_json(reply.body)
        member = Member.create(identity, "run", public_key(), said.member.num_records)
        return signed(identity, said.model_copy(update={"member": member}))

    return fault


def key_of(federation: Federation, name: str) -> str:
    (body,) = [body for sender, body in bodies(federation, "hello") if sender == name]
    return str(body["member"]["public_key"])  # type: ignore[index]


@pytest.mark.parametrize("kind", ["copied", "low_order"])
def test_a_member_with_anothers_or_a_useless_round_key_takes_no_part_and_stops_nobody(tmp_path: Path, kind: str) -> None:
    federation = Federation(tmp_path / "run", brief())
    key = (lambda: key_of(federation, "site-1")) if kind == "copied" else (lambda: bytes(32).hex())
    federation.faults["site-5"] = hello_with(federation.site("site-5").identity, key)
    federation.run()
    assert all(entry.value["opened"] for entry in rounds(tmp_path / "run").values())
    assert "site-5" in value(tmp_path / "run", "hello")["others"]  # type: ignore[operator]


def forty(tmp_path: Path) -> Federation:
    document = brief().model_dump()
    document["federation"]["virtual"] |= {"num_sites": 40, "dirichlet_alpha": 10.0}
    document["federation"]["min_sites"] = 10
    return Federation(tmp_path / "run", Plan.model_validate(document), keeps_wire=False)


def test_three_of_forty_that_are_silent_at_setup_are_borne_and_a_fourth_is_named(tmp_path: Path) -> None:
    """With more left out the sites would refuse every sparse graph, so nothing is asked before they are back."""
    federation = forty(tmp_path)
    federation.faults = {f"site-{number}": lost("query.setup") for number in (3, 7, 11, 40)}
    with (
        pytest.raises(RoundError, match=r"all but 3 of 40 sites, none came from site-11, site-3, site-40, site-7: bring them"),
        federation.stages(),
    ):
        pass
    federation.faults = {f"site-{number}": lost("query.setup") for number in (3, 7, 11)}
    with federation.stages() as stages:
        assert set(stages.rounds.member_names) == {f"site-{number}" for number in range(1, 41)} - {
            "site-3",
            "site-7",
            "site-11",
        }
        stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 4.0, 2)
    entry = rounds(tmp_path / "run")["final/1"]
    assert (entry.value["opened"], entry.value["dropped"]) == (True, {})


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    """A relay that doubles messages."""

    class Doubling(Federation):
        def ask(self, route, requests, timeout_seconds):  # type: ignore[no-untyped-def]
            for one in super().ask(route, requests, timeout_seconds):
                yield one
                yield one

    federation = Doubling(tmp_path / "run", brief())
    with federation.stages() as stages:
        stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 4.0, 2)
    (entry,) = rounds(tmp_path / "run").values()
    assert (entry.value["opened"], entry.value["dropped"]) == (True, {})
    assert tuple(entry.value["survivors"]) == SITES


# ---- widths of the ring


@pytest.mark.parametrize("noise", ["shared", "local"])
@pytest.mark.parametrize("bits", [16, 24])
def test_a_campaign_in_a_narrow_ring_opens_every_sum_and_widens_it_where_a_clip_would_not_fit(
    tmp_path: Path, bits: int, noise: str
) -> None:
    federation = Federation(tmp_path / "run", brief(ring_bits=bits, noise=noise))
    federation.run()
    assert all(entry.value["opened"] and not entry.value["dropped"] for entry in rounds(tmp_path / "run").values())
    asked = {body["request_id"]: body["ring_bits"] for kind in ("train", "evaluate") for _, body in bodies(federation, kind)}
    assert set(asked.values()) <= set(range(bits, 33))
    assert asked["run/final/1"] == bits or noise == "shared"  # local steps are private before they are rounded
    requests = {one.sha256: json.loads(one.body) for one in federation.wire if b'"ring_bits"' in one.body}
    for upload in (one for one in federation.wire if b'"kind":"masked"' in one.body):
        request = requests[json.loads(upload.body)["request_sha256"]]
        size = 650 if request["kind"] == "train" else 102
        sent = sum(array.nbytes for name, array in upload.arrays.items() if name.startswith("segment-"))
        assert sent == size * request["ring_bits"] // 8


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_the_mean_of_local_steps_is_as_exact_as_its_ring(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from urna.client import training

    federation = Federation(tmp_path / "run", brief(noise="local", ring_bits=bits))
    changes: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
    steps = training.local_steps
    monkeypatch.setattr(training, "local_steps", lambda *args: changes.append(steps(*args)) or changes[-1])  # type: ignore[func-returns-value]
    with federation.stages() as stages:
        stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 4.0, 2)
    sizes = [site.config.dataset[0].num_records for site in federation.sites]
    exact = sum(change * size for change, size in zip(changes, sizes, strict=True)) / sum(sizes)
    body = json.loads(str(value(tmp_path / "run", "ask/final/1")["body"]))
    grid = Grid(body["step_exp"], 5, bits)
    total = rounds(tmp_path / "run")["final/1"].arrays["total"]
    assert np.abs(total - exact).max() <= 2.5 * grid.step  # half a step for each of five sites


def test_a_round_that_no_ring_holds_is_refused_before_anyone_is_asked(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief())
    with federation.stages() as stages:
        with pytest.raises(PlanError, match=r"a ring of 32 bits to hold training of 5 sites .* found [0-9]+ grid units"):
            stages.train("final", "final/1", "pixels", stages.start("pixels"), 1, 1e9, 2)
        with pytest.raises(PlanError, match="to hold the ballot of 5 sites"):
            stages.ballot(("pixels", "pca"), 1e9)
    assert not bodies(federation, "train")
    assert not bodies(federation, "ballot")
    assert not rounds(tmp_path / "run")
    assert not any(site.ledger.rows() for site in federation.sites)


# ---- no site's number on the wire


def leaks(wire: Iterable[Envelope], numbers: set[int]) -> set[str]:
    """Where any of ``numbers`` is readable: as a JSON number, in a text, or as an element of an array of any width.

    Nested JSON (plans, events) is read too. A text counts where the digits stand alone, not within a hash.
    """
    found: set[str] = set()
    for envelope in wire:
        found |= _in_json(json.loads(envelope.body), numbers)
        for name, array in envelope.arrays.items():
            found |= {f"shape of {name}" for size in array.shape if size in numbers}
            for width in ("<f4", "<f8", "<u4", "<u8"):  # in bytes and pairs of them a number is there by chance
                found |= _in_array(name, array, width, numbers)
    return found


def _in_json(item: object, numbers: set[int]) -> set[str]:
    if isinstance(item, dict):
        names = {f"name {key}" for key in item if re.search(r"num.?examples|num.?samples|weight(?!ed|_decay)", str(key))}
        return names.union(*(_in_json(one, numbers) for one in [*item.values(), *item]))
    if isinstance(item, list):
        return set().union(*(_in_json(one, numbers) for one in item))
    if isinstance(item, str):
        if item[:1] in ("{", "["):
            return _in_json(json.loads(item), numbers)
        return {f"text {one}" for one in re.findall(r"(?<![0-9a-zA-Z.])[0-9]+(?![0-9a-zA-Z.])", item) if int(one) in numbers}
    return {f"number {item}"} if isinstance(item, int | float) and not isinstance(item, bool) and item in numbers else set()


def _in_array(name: str, array: AnyArray, width: str, numbers: set[int]) -> set[str]:
    data = array.tobytes()
    usable = len(data) - len(data) % np.dtype(width).itemsize
    with np.errstate(invalid="ignore"):
        elements = np.frombuffer(data[:usable], width)
        return {f"{width} in {name}" for number in numbers if (elements == number).any()}


def coarse(text: str) -> str:
    """Sites declare whole hundreds and seven."""
    return re.sub(r"num_records = (\d+)", lambda match: f"num_records = {int(match[1]) // 100 * 100 + 7}", text)


def true_numbers(federation: Federation) -> set[int]:
    """Of records, tuning and held-out ones, of every site; those that are small or in the plan are no evidence."""
    parts = [site.bench(site.config.dataset[0]).split(0.2) for site in federation.sites]
    counts = {len(part.labels) for both in parts for part in both} | {sum(len(part.labels) for part in both) for both in parts}
    return {count for count in counts if count > 150 and count % 100 != 7}


@pytest.mark.parametrize("noise", ["shared", "local"])
def test_no_plain_num_examples_on_wire(tmp_path: Path, noise: str) -> None:
    """Of records that a site has, it says what it declares: nothing else, in no field, array or text.

    Masked arrays are uniform: about 1e5 elements x 10 numbers / 2**32, one false alarm in 4,000 runs.
    """
    federation = Federation(tmp_path / "run", brief(noise=noise, names=("pixels", "pca")), site_toml=coarse)
    federation.faults["site-2"] = lost("train")  # dropouts say no more
    federation.run()
    numbers = true_numbers(federation)
    assert len(numbers) >= 8
    assert not leaks(federation.wire, numbers)
    for parcel in federation.parcels:
        record = sealing.to_record(parcel)
        assert not record.metric_records  # where Flower's own apps put num-examples
        assert (set(record.config_records), set(record.array_records)) == ({"parcel"}, {"content"})


def test_what_a_site_declares_would_be_found_were_it_its_true_number(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief())
    with federation.stages():
        pass
    declared = {site.config.dataset[0].num_records for site in federation.sites}
    assert leaks(federation.wire, declared) == {f"number {number}" for number in declared}


def test_planted_numbers_are_found_in_whatever_field_they_travel(tmp_path: Path) -> None:
    identity = create_identity("site-1", tmp_path / "identity.key")
    sha256 = "0" * 64
    masked = Masked(request_sha256=sha256)
    planted = [
        signed(identity, masked, {"scalars": np.array([346], np.uint64)}),
        signed(identity, masked, {"vector": np.array([0.5, 346.0], np.float32)}),
        signed(identity, masked, {"segment-000000": np.array([7, 346], "<u4").view(np.uint8)}),
        signed(identity, masked, {"pads": np.zeros((346, 32), np.uint8)}),
        Envelope("site-1", json.dumps({"kind": "masked", "num_examples": 1}).encode(), b""),
        Envelope("site-1", json.dumps({"kind": "masked", "epsilon": 346}).encode(), b""),
        Envelope("site-1", json.dumps({"kind": "refusal", "reasons": ["data: 346 records are here"]}).encode(), b""),
        Envelope("site-1", json.dumps({"kind": "statement", "rows": [{"event": json.dumps({"n": 346.0})}]}).encode(), b""),
    ]
    assert all(leaks([one], {346}) for one in planted)
    assert not leaks([signed(identity, masked, {"segment-000000": np.array([7, 345], "<u4").view(np.uint8)})], {346})
    assert not leaks([Envelope("site-1", json.dumps({"sha256": "ab346cd" + sha256}).encode(), b"")], {346})


def test_a_member_that_shows_anothers_key_after_a_resume_pushes_only_itself_out(tmp_path: Path) -> None:
    """By then every member knows every key: who showed one first keeps it."""

    class KilledError(BaseException):
        pass

    def killed(route: str, reply: Envelope) -> Envelope:
        if route == "query.unmask":
            raise KilledError
        return reply

    first = Federation(tmp_path / "run", brief(min_sites=3))
    first.faults["site-3"] = killed
    with pytest.raises(KilledError):
        first.run()
    stolen = key_of(first, "site-5")
    second = Federation(tmp_path / "run", brief(min_sites=3))
    second.faults["site-1"] = hello_with(second.site("site-1").identity, lambda: stolen)
    second.run()
    assert rounds(tmp_path / "run")["final/2"].value["cohort"] == ["site-2", "site-3", "site-4", "site-5"]
