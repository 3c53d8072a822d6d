"""The site's mod against an operator that misbehaves; `Operator` crafts requests by hand, sites and mods are real."""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict, UserConfig
from flwr.serverapp.strategy import FedAvg

from tests.mean_consortium import RUN_ID, MeanConsortium, Metrics, app_of, code_of, identify, keys_in
from urna.client import make_secure_sum_mod
from urna.client.flower_mod import own_folder
from urna.client.mean_site import ROUNDS_FILE
from urna.client.secure_rounds import SecureRounds
from urna.privacy.secure_sum import Context as RoundContext
from urna.privacy.secure_sum import ServerRole, Upload, alive_digest, burnt_statement, upload_of
from urna.privacy.weighted_mean import context_of, grids_for, opened
from urna.protocol.averaging import (
    Asked,
    AverageRequest,
    GreetRequest,
    MeanAbortRequest,
    MeanUnmaskRequest,
    campaign_of,
    content_sha256,
    with_header,
)
from urna.protocol.errors import SiteConfigError
from urna.protocol.identity import OPERATOR, Identity, create_consortium, create_identity, load_identity, load_roster
from urna.protocol.messages import (
    AnswerOfSite,
    AnyArray,
    Audit,
    Burnt,
    HelloReply,
    Masked,
    Member,
    Unmasked,
    from_record,
    open_reply,
    signed,
)
from urna.strategies import SecureSum

COUNT = 5
NUM_EXAMPLES = 31337
SECRET = "patient-8237"
PLAIN = "bad_request: this site answers only requests of urna.strategies.SecureSum"
Arrays = dict[str, AnyArray]


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    identify(monkeypatch)


@dataclass
class App:
    """What the sites' app does, and how often it was asked to; a test may change it."""

    calls: int = 0
    num_examples: float = NUM_EXAMPLES
    metrics: Metrics = field(default_factory=lambda: {"train_loss": 0.75})
    shift: float = 0.5
    error: Exception | None = None

    def train(self, site: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
        self.calls += 1
        if self.error is not None:
            raise self.error
        moved = {name: one + np.float32(self.shift * site) for name, one in arrays.items()}
        return moved, {"num-examples": self.num_examples, **self.metrics}

    def evaluate(self, site: int, arrays: Arrays) -> Metrics:  # noqa: ARG002
        self.calls += 1
        return {"num-examples": NUM_EXAMPLES, "eval_loss": 0.25, "eval_acc": 0.5}


class Operator:
    """Holds the operator's key and says what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.app = App()
        self.grid = MeanConsortium(folder, app_of(self.app.train, self.app.evaluate), COUNT)
        keys = keys_in(folder)
        self.identity = load_identity(OPERATOR, keys["operator_key"])
        self.roster = load_roster(keys["roster"])
        self.nonce = "ab" * 32
        self.campaign = campaign_of(RUN_ID, self.nonce)
        self.members = tuple(self.greeted(node) for node in range(1, COUNT + 1))

    def content(self) -> RecordDict:
        arrays = {"a": Array(np.zeros((2, 3), np.float32)), "b": Array(np.ones(4, np.float32))}
        return RecordDict({"arrays": ArrayRecord(arrays), "config": ConfigRecord({"lr": 0.1})})

    def send(
        self, node: int, request: Asked, content: RecordDict, *, message_type: str | None = None, signer: Identity | None = None
    ) -> Message:
        envelope = signed(signer or self.identity, request)
        message = Message(with_header(content, envelope), node, message_type or request.message_type)
        (reply,) = self.grid.send_and_receive([message])
        return reply

    def greeted(self, node: int) -> Member:
        request = GreetRequest(campaign=self.campaign, run_id=RUN_ID, message_type="train")
        reply = self.send(node, request, RecordDict())
        answer = open_reply(from_record(reply.content), self.roster, f"site-{node}", signed(self.identity, request))
        assert isinstance(answer, HelloReply)
        return answer.member

    def request(self, number: int = 1, **changes: object) -> AverageRequest:
        fields: dict[str, object] = {
            "campaign": self.campaign,
            "run_id": RUN_ID,
            "message_type": "train",
            "round_id": f"{self.campaign}/{number}",
            "nonce": self.nonce,
            "cohort": self.members,
            "num_colluding": 1,
            "min_sites": 3,
            "ring_bits": 32,
            "weight_key": "num-examples",
            "max_weight": 100_000,
            "metrics": ("train_loss",),
            "ranges": (1e6, 1e6),
            "content_sha256": content_sha256(self.content()),
            "audits": (),
        }
        return AverageRequest.model_validate(fields | changes)

    def average(self, node: int = 1, number: int = 1, **changes: object) -> Message:
        return self.send(node, self.request(number, **changes), self.content())

    def unmask(self, node: int, alive: tuple[str, ...], number: int = 1) -> Message:
        request = MeanUnmaskRequest(
            campaign=self.campaign, run_id=RUN_ID, message_type="train", round_id=f"{self.campaign}/{number}", alive=alive
        )
        return self.send(node, request, RecordDict())

    def abort(self, node: int, number: int = 1) -> AnswerOfSite:
        request = MeanAbortRequest(
            campaign=self.campaign, run_id=RUN_ID, message_type="train", round_id=f"{self.campaign}/{number}"
        )
        reply = self.send(node, request, RecordDict())
        answer = open_reply(from_record(reply.content), self.roster, f"site-{node}", signed(self.identity, request))
        assert isinstance(answer, Burnt)
        return answer.answer

    def context(self, number: int = 1, **changes: object) -> RoundContext:
        request = self.request(number, **changes)
        return context_of(request, 10, signed(self.identity, request).sha256)


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path / "consortium")


def is_masked(reply: Message) -> bool:
    return reply.has_content() and b'"kind":"masked"' in from_record(reply.content).body


def is_unmasked(reply: Message) -> bool:
    return reply.has_content() and b'"kind":"unmasked"' in from_record(reply.content).body


NAMES = tuple(f"site-{node}" for node in range(1, COUNT + 1))


def test_a_round_as_it_should_be_opens_the_weighted_mean(operator: Operator) -> None:
    """The positive control of all refusals below."""
    request = operator.request()
    envelope = signed(operator.identity, request)
    role = ServerRole(operator.context())
    for node, name in enumerate(NAMES, start=1):
        reply = from_record(operator.average(node).content)
        assert isinstance(open_reply(reply, operator.roster, name, envelope), Masked)
        role.add(name, upload_of(reply.arrays))
    alive = role.close()
    for node, name in enumerate(NAMES, start=1):
        opening = operator.unmask(node, alive)
        assert is_unmasked(opening)
        role.answer(name, from_record(opening.content).arrays["pads"])
    before = {name: one.numpy() for name, one in operator.content().array_records["arrays"].items()}
    grids = grids_for(before, request.ranges, COUNT, 32)
    found = opened(*role.total(), before, grids, request.metrics)
    assert found is not None
    assert (found.total_weight, found.num_clamped) == (COUNT * NUM_EXAMPLES, 0)
    assert found.metrics["train_loss"] == pytest.approx(0.75, abs=1e-9)
    assert found.tensors["a"] == pytest.approx(np.full((2, 3), 1.5), abs=1e-6)


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_plain_request_is_refused(operator: Operator, message_type: str) -> None:
    (reply,) = operator.grid.send_and_receive([Message(operator.content(), 1, message_type)])
    assert code_of(reply) == PLAIN
    assert operator.app.calls == 0


def test_a_header_without_its_fields_is_a_plain_request(operator: Operator) -> None:
    for header in (ConfigRecord({}), ConfigRecord({"sender": "operator", "body": "text", "signature": b""})):
        content = operator.content()
        content["urna.secure-sum"] = header
        (reply,) = operator.grid.send_and_receive([Message(content, 1, "train")])
        assert code_of(reply) == PLAIN
    assert operator.app.calls == 0


@pytest.mark.parametrize("who", ["stranger", "site"])
def test_forged_operator_refused(operator: Operator, tmp_path: Path, who: str) -> None:
    stranger = create_identity(OPERATOR, tmp_path / "stranger.key")
    member = Identity(OPERATOR, load_identity("site-2", operator.grid.site(2) / "identity.key").private_key)
    signer = {"stranger": stranger, "site": member}[who]
    assert code_of(operator.send(1, operator.request(), operator.content(), signer=signer)) == "bad_request"
    assert operator.app.calls == 0


def test_header_of_another_model_is_refused(operator: Operator) -> None:
    """Model, settings or the order of the tensors changed after signing."""
    model, settings, order, more = (operator.content() for _ in range(4))
    model["arrays"] = ArrayRecord({"a": Array(np.full((2, 3), 1e-7, np.float32)), "b": Array(np.ones(4, np.float32))})
    settings["config"] = ConfigRecord({"lr": 1000.0})
    order["arrays"] = ArrayRecord(dict(reversed(list(order.array_records["arrays"].items()))))
    more["other"] = ConfigRecord({"secret": "please"})
    for changed in (model, settings, order, more):
        assert code_of(operator.send(1, operator.request(), changed)) == "bad_request"
    assert operator.app.calls == 0


def test_header_of_another_run_or_message_type_is_refused(operator: Operator) -> None:
    assert code_of(operator.send(1, operator.request(), operator.content(), message_type="evaluate")) == "bad_request"
    other = campaign_of(RUN_ID + 1, operator.nonce)
    elsewhere = operator.average(campaign=other, run_id=RUN_ID + 1, round_id=f"{other}/1")
    assert code_of(elsewhere) == "bad_request"
    assert operator.app.calls == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"min_sites": 2},
        {"num_colluding": 0},
        {"cohort": 2},
        {"cohort": "twice"},
        {"cohort": "unsigned"},
        {"cohort": "without me"},
        {"ranges": (1e6,)},
        {"ranges": (1e6, 1e300)},
        {"content_sha256": "00" * 32},
    ],
    ids=str,
)
def test_numbers_below_the_sites_own_minimum_are_refused(operator: Operator, changes: dict[str, object]) -> None:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    forged = operator.members[4].model_copy(update={"public_key": key})
    cohorts: dict[object, object] = {
        2: operator.members[:2],
        "twice": (*operator.members[:4], operator.members[3]),
        "unsigned": (*operator.members[:4], forged),
        "without me": operator.members[1:],
    }
    changed = {name: cohorts[value] if name == "cohort" else value for name, value in changes.items()}
    assert code_of(operator.send(1, operator.request(1, **changed), operator.content())) == "bad_request"
    assert is_masked(operator.average()), "nothing was used up"


def test_a_campaign_that_does_not_open_its_nonce_is_refused(operator: Operator) -> None:
    """The graph seed was fixed before any key was shown: a nonce chosen afterwards is another campaign's."""
    with pytest.raises(ValueError, match="not named by this run and nonce"):
        operator.request(nonce="cd" * 32)
    request = operator.request().model_copy(update={"nonce": "cd" * 32})  # without validation
    assert code_of(operator.send(1, request, operator.content())) == "bad_request"


def test_a_tensor_that_says_more_numbers_than_it_has_is_refused(operator: Operator) -> None:
    """Its size decides how many numbers are masked: nothing but the update may be under the mask."""
    content = operator.content()
    arrays = content.array_records["arrays"]
    arrays["b"] = Array("float32", (4_000,), arrays["b"].stype, arrays["b"].data)
    request = operator.request(content_sha256=content_sha256(content))
    assert code_of(operator.send(1, request, content)) in ("bad_request", "model")


def test_a_round_is_answered_once(operator: Operator) -> None:
    assert is_masked(operator.average())
    assert code_of(operator.average()) == "replay_changed"
    assert code_of(operator.average(max_weight=99_999)) == "replay_changed"
    assert operator.app.calls == 1


def test_site_restart_answers_no_second_list(operator: Operator) -> None:
    """Each message opens the site's files anew, as a restarted SuperNode would."""
    for node in range(1, COUNT + 1):
        assert is_masked(operator.average(node))
    first = operator.unmask(1, NAMES)
    assert is_unmasked(first)
    assert code_of(operator.unmask(1, NAMES[:4])) == "replay_changed"
    again, kept = from_record(operator.unmask(1, NAMES).content), from_record(first.content)
    assert (again.body, again.signature) == (kept.body, kept.signature)
    assert np.array_equal(again.arrays["pads"], kept.arrays["pads"])


@pytest.mark.parametrize("alive", [NAMES[:3], NAMES[1:], (*NAMES, "site-9"), NAMES[::-1], ("site-1",)], ids=str)
def test_lists_that_may_not_be_opened_are_refused(operator: Operator, alive: tuple[str, ...]) -> None:
    assert is_masked(operator.average())
    assert code_of(operator.unmask(1, alive)) == "bad_request"


def test_an_unmask_without_an_upload_is_refused(operator: Operator) -> None:
    assert code_of(operator.unmask(1, NAMES)) == "bad_request"


def test_a_round_that_was_given_up_is_never_opened(operator: Operator) -> None:
    assert is_masked(operator.average())
    assert operator.abort(1).alive_sha256 == ""
    assert code_of(operator.unmask(1, NAMES)) == "replay_changed"
    operator.abort(2)
    assert code_of(operator.average(2)) == "replay_changed"
    assert operator.app.calls == 1


def answered(operator: Operator, node: int, alive: tuple[str, ...]) -> AnswerOfSite:
    reply = from_record(operator.unmask(node, alive).content)
    request = MeanUnmaskRequest(
        campaign=operator.campaign, run_id=RUN_ID, message_type="train", round_id=f"{operator.campaign}/1", alive=alive
    )
    answer = open_reply(reply, operator.roster, f"site-{node}", signed(operator.identity, request))
    assert isinstance(answer, Unmasked)
    return answer.answer


def test_a_request_that_skips_the_audit_is_refused_and_one_that_brings_it_is_not(operator: Operator) -> None:
    for node in range(1, COUNT + 1):
        operator.average(node)
    answers = {f"site-{node}": answered(operator, node, NAMES) for node in range(1, COUNT + 1)}
    audit = Audit(round_id=f"{operator.campaign}/1", alive=NAMES, answers=answers)
    assert code_of(operator.average(number=2)) == "audit"
    too_few = Audit(round_id=audit.round_id, alive=NAMES, answers=dict(list(answers.items())[:3]))
    assert code_of(operator.average(number=2, audits=(too_few,))) == "audit"
    assert is_masked(operator.average(number=2, audits=(audit,)))
    assert is_masked(operator.average(number=3)), "shown once is enough"


def test_two_groups_that_were_shown_different_lists_find_out(operator: Operator) -> None:
    for node in range(1, COUNT + 1):
        operator.average(node)
    shorter = NAMES[:4]
    answers = {f"site-{node}": answered(operator, node, NAMES) for node in (4, 5)}
    answers |= {f"site-{node}": answered(operator, node, shorter) for node in (1, 2, 3)}
    audit = Audit(round_id=f"{operator.campaign}/1", alive=NAMES, answers=answers)
    other = Audit(round_id=f"{operator.campaign}/1", alive=shorter, answers=answers)
    for node in range(1, COUNT + 1):
        for shown in (audit, other):
            assert code_of(operator.average(node, number=2, audits=(shown,))) == "audit"


def test_an_abort_that_is_only_claimed_uses_up_few_chances(operator: Operator) -> None:
    for number in range(1, 5):
        audits: tuple[Audit, ...] = ()
        if number > 1:
            audits = (Audit(round_id=f"{operator.campaign}/{number - 1}", alive=(), answers={}),)
        assert is_masked(operator.average(number=number, audits=audits))
        assert is_unmasked(operator.unmask(1, NAMES, number=number))
    last = Audit(round_id=f"{operator.campaign}/4", alive=(), answers={})
    assert code_of(operator.average(number=5, audits=(last,))) == "audit"


def test_an_abort_that_is_proven_is_taken(operator: Operator) -> None:
    operator.average()
    operator.unmask(1, NAMES)
    answers = {f"site-{node}": operator.abort(node) for node in (2, 3)}
    digest = alive_digest(operator.context(), NAMES)
    assert burnt_statement("x", "", "") != digest
    audit = Audit(round_id=f"{operator.campaign}/1", alive=(), answers=answers)
    assert is_masked(operator.average(number=2, audits=(audit,)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"shift": float("nan")}, "numeric"),
        ({"shift": float("inf")}, "numeric"),
        ({"metrics": {"train_loss": float("nan")}}, "numeric"),
        ({"metrics": {"train_loss": 1e30}}, "numeric"),
        ({"metrics": {}}, "data"),
        ({"num_examples": 1.5}, "data"),
        ({"num_examples": -1}, "data"),
        ({"num_examples": 100_001}, "data"),
        ({"error": ValueError(SECRET)}, "internal"),
        ({"error": KeyError(SECRET)}, "internal"),
    ],
    ids=str,
)
def test_what_cannot_be_summed_leaves_as_a_code_alone(operator: Operator, change: dict[str, object], code: str) -> None:
    for name, value in change.items():
        setattr(operator.app, name, value)
    assert code_of(operator.average()) == code
    assert SECRET.encode() not in operator.grid.all_bytes("reply")
    log = (operator.grid.site(1) / "site.log").read_text()
    assert "request_failed" in log
    assert SECRET in log or "error" not in change
    operator.app.__init__()  # type: ignore[misc]
    assert is_masked(operator.average()), "nothing was uploaded, so the round is not used up"


def test_other_tensors_than_were_received_are_refused(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: Metrics = {"num-examples": 1, "train_loss": 0.0}
    for wrong in ({"a": np.zeros((2, 3), np.float32)}, {"a": np.zeros((3, 2), np.float32), "b": np.ones(4, np.float32)}):
        monkeypatch.setattr(operator.grid, "app", app_of(lambda _, __, wrong=wrong: (wrong, metrics), operator.app.evaluate))  # type: ignore[misc]
        assert code_of(operator.average()) == "model"


def varint(number: int) -> bytes:
    """As protobuf writes it."""
    data = b""
    while number:
        data, number = data + bytes([number & 0x7F | (0x80 if number > 0x7F else 0)]), number >> 7
    return data


def found_in(wire: bytes, number: int) -> list[bytes]:
    """How a number could travel: text, protobuf's varint and zigzag, integers and floats of either order."""
    raw = [np.array(number).astype(kind).tobytes() for kind in ("<u4", ">u4", "<u8", ">u8", "<f4", ">f4", "<f8", ">f8")]
    return [one for one in (str(number).encode(), varint(number), varint(2 * number), *raw) if one in wire]


def test_no_plain_num_examples_on_wire(operator: Operator, tmp_path: Path) -> None:
    """All bytes of two rounds, both ways; the shortest encodings have 4 bytes: a chance hit in fewer than 1 of 1,000 runs."""
    arrays = ArrayRecord({"a": Array(np.zeros((2, 3), np.float32))})
    operator.grid.wire.clear()
    operator.app.num_examples = number = 3_133_731_337
    strategy = SecureSum(FedAvg(), **keys_in(operator.grid.folder), max_weight=10**10)
    result = strategy.start(operator.grid, arrays, num_rounds=2)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert found_in(operator.grid.all_bytes("reply") + operator.grid.all_bytes("request"), number) == []
    assert b"train_loss" not in operator.grid.all_bytes("reply")
    plain = MeanConsortium(
        tmp_path / "plain", app_of(operator.app.train, operator.app.evaluate, mods=False), COUNT, secure=False
    )
    FedAvg().start(plain, arrays, num_rounds=1)
    assert found_in(plain.all_bytes("reply"), number), "the scan must find it where it is"
    assert b"train_loss" in plain.all_bytes("reply")


def test_context_state_has_no_keys(operator: Operator) -> None:
    """Flower keeps ``context.state`` in the SuperNode and writes it after the reply has left."""
    operator.average()
    operator.unmask(1, NAMES)
    context = operator.grid.contexts[1]
    assert dict(context.state) == {}
    private = (operator.grid.site(1) / "identity.key").read_bytes()
    assert private.hex() not in repr(context)
    assert stat.S_IMODE((operator.grid.site(1) / ROUNDS_FILE).stat().st_mode) == 0o600


def test_two_runs_have_different_keys_and_the_round_key_of_one_stays(operator: Operator) -> None:
    first = operator.members[0]
    assert operator.greeted(1).public_key == first.public_key
    operator.campaign = campaign_of(RUN_ID, "cd" * 32)
    assert operator.greeted(1).public_key != first.public_key


def test_a_member_declares_no_number_of_records(operator: Operator) -> None:
    assert {member.num_records for member in operator.members} == {1}


def test_what_a_node_says_itself_is_not_overruled_by_the_run() -> None:
    def context(node: UserConfig, run: UserConfig) -> Context:
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)

    own = context({"site-dir": "own", "partition-id": 3}, {"consortium-dir": "elsewhere"})
    assert own_folder(own) == Path("own")
    assert own_folder(context({"partition-id": 3}, {"consortium-dir": "all"})) == Path("all/sites/site-4")
    cases: list[tuple[UserConfig, UserConfig]] = [({}, {"consortium-dir": "all"}), ({"partition-id": 3}, {})]
    for node, run in cases:
        with pytest.raises(SiteConfigError, match="expected 'site-dir' in the node config"):
            own_folder(context(node, run))


def test_a_site_that_cannot_be_opened_says_so_and_nothing_else(operator: Operator, tmp_path: Path) -> None:
    closed = "internal: this site cannot answer; its own log says why"
    operator.grid.contexts[1].node_config["site-dir"] = str(tmp_path / "nowhere")
    assert code_of(operator.average()) == closed
    create_consortium(tmp_path / "other", ["site-1"])
    roster = (operator.grid.site(1) / "roster.json").read_text()
    (tmp_path / "other" / "sites" / "site-1" / "roster.json").write_text(roster)
    operator.grid.contexts[1].node_config["site-dir"] = str(tmp_path / "other" / "sites" / "site-1")
    assert code_of(operator.average()) == closed
    assert str(tmp_path).encode() not in operator.grid.all_bytes("reply")


def test_a_mod_that_would_open_a_single_update_is_not_made() -> None:
    with pytest.raises(ValueError, match="expected min_cohort of at least 2"):
        make_secure_sum_mod(min_cohort=1)


def test_a_cohort_with_a_useless_round_key_is_refused_before_the_app_works(operator: Operator) -> None:
    identity = load_identity("site-5", operator.grid.site(5) / "identity.key")
    useless = Member.create(identity, operator.campaign, bytes(32).hex(), 1)
    assert code_of(operator.average(cohort=(*operator.members[:4], useless))) == "bad_request"
    assert operator.app.calls == 0
    assert is_masked(operator.average()), "nothing was used up"


def asked_again_by_another_process(operator: Operator, monkeypatch: pytest.MonkeyPatch, moment: str) -> list[Message]:
    """The same request, once, at some moment of this site's work on it; what the other process answers."""
    answers: list[Message] = []
    mask = SecureRounds.upload

    def again() -> None:
        if len(answers) == 0 and operator.app.calls == 1:
            answers.append(operator.average())

    def train(site: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
        operator.app.shift += 1.0  # the two would upload different updates
        answer = operator.app.train(site, arrays)
        if moment == "while the app works":
            again()
        return answer

    def masked(*arguments: Any) -> Upload:
        upload = mask(*arguments)
        if moment == "after masking":
            again()
        return upload

    monkeypatch.setattr(operator.grid, "app", app_of(train, operator.app.evaluate))
    monkeypatch.setattr(SecureRounds, "upload", masked)
    return answers


@pytest.mark.parametrize("moment", ["while the app works", "after masking"])
def test_of_two_processes_that_work_on_one_round_the_second_upload_never_leaves(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Two updates under one mask, subtracted, are their difference: the faster process's upload stands alone."""
    others = asked_again_by_another_process(operator, monkeypatch, moment)
    assert code_of(operator.average()) == "replay_changed"
    assert operator.app.calls == 2
    assert [is_masked(one) for one in others] == [True]
    assert operator.grid.all_bytes("reply").count(b'"kind":"masked"') == 1
