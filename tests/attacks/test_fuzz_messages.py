"""Messages that a hostile operator signs, parcels that a hostile relay or member seals, replies that a hostile site signs.

Every altered body is signed again, so that what is tried is the schema and what the site makes of it, not the signature alone.
Cases: 10,000 for `Site.handle`, for `Site.receive` and for the operator's `open_reply` each (`mutations`). A site that a case
changed is put back, so no case depends on another.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attacks.mutations import FUZZ, NUM_CASES, Edit, byte_edits, edits, fingerprint, must_fail, mutated, one_line, spliced
from tests.client.clinic import CANDIDATES, NAME, Clinic, Round, a_head, a_plan
from urna.client.site import Site, open_site
from urna.models.pretrain import pretrain
from urna.privacy.secure_sum import upload_of
from urna.protocol.errors import FailureCode, ProtocolError
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import (
    AnyArray,
    AnyReply,
    Envelope,
    Failure,
    Head,
    Masked,
    Pending,
    Refusal,
    SetupRequest,
    WeightsRequest,
    _signed_bytes,
    open_reply,
    open_request,
)
from urna.protocol.sealing import HEADER_BYTES, INFO, OVERHEAD_BYTES, SUITE, Header, Parcel, key_id, seal, unseal

ARRAYS: list[Any] = [
    *(np.float64, np.float16, np.int64, np.uint8, np.uint64, np.bool_, np.complex64, "U3", object, ">f4", "datetime64[s]"),
]
array_edits = st.one_of(
    st.just(("keep", 0)),
    st.just(("keep", 0)),
    st.tuples(st.sampled_from(["type", "shape", "value", "name"]), st.integers(0, 99)),
)
Change = tuple[list[Edit] | None, Any, tuple[str, int]]
changes = st.one_of(
    st.tuples(edits, st.none(), array_edits),
    st.tuples(edits, st.none(), array_edits),
    st.tuples(st.none(), byte_edits, array_edits),
    st.tuples(st.none(), st.none(), array_edits),
)


def resigned(signer: Identity, body: bytes, arrays: Mapping[str, AnyArray], sender: str | None = None) -> Envelope:
    """Any body, signed."""
    try:
        signature = signer.sign("message", _signed_bytes(body, arrays))
    except (TypeError, ValueError):  # arrays that have no bytes
        signature = bytes(64)
    return Envelope(sender or signer.name, body, signature, arrays)


def altered(signer: Identity, good: Envelope, change: Change) -> Envelope:
    """A message after its edits, signed again."""
    structural, raw, array = change
    body = good.body
    if structural is not None:
        body = json.dumps(mutated(json.loads(body), structural)).encode()
    if raw is not None:
        body = spliced(body, raw)
    return resigned(signer, body, altered_arrays(good.arrays, *array))


def altered_arrays(good: Mapping[str, AnyArray], what: str, number: int) -> dict[str, AnyArray]:
    arrays = dict(good)
    name = sorted(arrays)[number % len(arrays)] if arrays else "vector"
    array = arrays.get(name, np.zeros(3, np.float32))
    match what:
        case "type":
            arrays[name] = np.zeros(array.shape, ARRAYS[number % len(ARRAYS)])
        case "shape":
            shapes = [array[:-1], array[None], np.concatenate([array, array]), array[:0], np.zeros((), array.dtype)]
            arrays[name] = shapes[number % len(shapes)]
        case "value" if array.size and array.dtype == np.float32:
            arrays[name] = array.copy()
            arrays[name].reshape(-1)[number % array.size] = [np.nan, np.inf, -np.inf, 3.4e38, -1e20, 1e-45][number % 6]
        case "value":
            arrays[name] = array ^ array.dtype.type(255) if array.size else array
        case "name":
            arrays[["", "vector-1", "a" * 1000, "../x", "\u2028", "pads"][number % 6]] = arrays.pop(name, array)
    return arrays


# ---- the site


@dataclass
class Ward:
    """A site in the midst of a campaign, put back after each case that changed it."""

    clinic: Clinic
    kept: Path  # its folder as it was
    one: Round  # that it has uploaded for
    good: dict[str, Envelope]
    files: dict[str, Any]

    @property
    def site(self) -> Site:
        return self.clinic.site

    @property
    def roster(self) -> Roster:
        return self.site.roster

    def releases(self) -> int:
        return sum(row.count for row in self.site.ledger.rows())

    def state(self) -> dict[str, Any]:
        found = fingerprint(self.clinic.folder)
        return {name: one for name, one in found.items() if not name.startswith(("site.log", "ledger.sqlite.lock"))}

    def put_back(self) -> None:
        benches = self.site._benches
        self.site.close()
        shutil.rmtree(self.clinic.folder)
        shutil.copytree(self.kept, self.clinic.folder)
        self.clinic.site = open_site(self.clinic.folder)
        self.clinic.site._benches.update(benches)
        self.site.log.disabled = True
        self.files = self.state()

    def check(self, request: Envelope, reply: AnyReply, before: int) -> str:
        """What must hold after any answer; the reply's kind."""
        spent = self.releases() - before
        is_repeat = request.sha256 in {self.one.request.sha256}
        if isinstance(reply, Masked) and not is_repeat:
            assert spent == 1, f"{spent} releases for one answer"
        else:
            assert spent == 0, f"{spent} releases, and the answer is {reply.kind}"
        if isinstance(reply, Refusal | Failure | Pending):
            assert self.state() == self.files, f"a {reply.kind} left something behind"
        if isinstance(reply, Failure):
            assert reply.code in FailureCode
        if isinstance(reply, Refusal):
            assert all(reason.isprintable() for reason in reply.reasons), reply.reasons
        return reply.kind


def build(folder: Path) -> Ward:
    for name in CANDIDATES:
        pretrain(name)
    clinic = Clinic.build(folder / "site-1", epsilon_total=50.0)
    clinic.hello()
    one = clinic.uploaded(clinic.train())
    for work in (clinic.ballot("b"), clinic.evaluate("e")):  # models and features are warm before the first case
        clinic.ask(work)
    audits = [clinic.audit(one)]
    other = a_plan(ballot={"clip": 0.1})
    second = {
        "campaign": "run-2",
        "request_id": "run-2/hello",
        "plan_json": other.model_dump_json(),
        "plan_sha256": other.sha256,
    }
    setup = SetupRequest(**clinic.fields("setup", "hello", cohort=clinic.cohort()))
    piece = {"candidate": "pixels", "file": "model.safetensors", "sha256": "0" * 64, "size": 9, "offset": 0}
    weights = WeightsRequest(**clinic.fields("weights/pixels/0/0", "hello", **piece))
    good = {
        "hello": clinic.hello_request(**second),
        "setup": clinic.sealed(setup),
        "ballot": clinic.ballot("ballot/9", audits=audits),
        "train": clinic.train("final/9", audits=audits, vector=a_head("pixels") + 0.01),
        "evaluate": clinic.evaluate("evaluation/9", audits=audits),
        "unmask": clinic.unmask(one),
        "abort": clinic.abort(one),
        "close": clinic.close(),
        "weights": clinic.sealed(weights, {"part": np.zeros(9, np.uint8)}),  # nobody lacks any here: refused
        "repeat": one.request,
        "dear": clinic.ballot("ballot/8", audits=audits, noise_multiplier=0.5),  # refused: over the plan's epsilon
    }
    clinic.site.close()
    kept = folder / "kept"
    shutil.copytree(clinic.folder, kept)
    benches = clinic.site._benches
    clinic.site = open_site(clinic.folder)
    clinic.site._benches.update(benches)
    clinic.site.log.disabled = True  # what it writes has tests of its own, and takes half of the time here
    ward = Ward(clinic, kept, one, good, {})
    ward.files = ward.state()
    return ward


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    built = build(tmp_path_factory.mktemp("ward"))
    yield built
    built.site.log.disabled = False
    built.site.close()


def handled(ward: Ward, request: Envelope) -> str:
    """Hand a request to the site, and see what must hold afterwards; the reply's kind, or a failure's code."""
    before = ward.releases()
    try:
        envelope = ward.site.handle(request)
        said = open_reply(envelope, ward.roster, NAME, request)
        ward.check(request, said, before)
    finally:
        if ward.state() != ward.files:
            ward.put_back()
    return str(said.code) if isinstance(said, Failure) else said.kind


def test_the_good_messages_are_answered_as_they_should_be(ward: Ward) -> None:
    kinds = {name: handled(ward, request) for name, request in ward.good.items()}
    assert kinds["hello"] == "hello"
    assert {kinds[name] for name in ("ballot", "train", "evaluate", "repeat")} == {"masked"}
    assert (kinds["unmask"], kinds["abort"], kinds["weights"]) == ("unmasked", "burnt", "bad_request")


def test_a_site_answers_any_signed_message_with_a_code_and_spends_nothing_unasked(ward: Ward) -> None:
    counts: Counter[str] = Counter()

    @FUZZ
    @given(st.sampled_from(sorted(ward.good)), changes)
    def holds(kind: str, change: Change) -> None:
        counts[handled(ward, altered(ward.clinic.operator, ward.good[kind], change))] += 1

    holds()
    assert counts["masked"] > NUM_CASES // 200, counts  # the cases are hostile, and not all of them
    assert counts["refusal"] > 0, counts
    assert counts["bad_request"] > NUM_CASES // 3, counts


NUMBERS = [1e-300, 1e-9, 1e-3, 1e6, 1e12, 1e20, 1e300]


@pytest.mark.parametrize("step_exp", [-60, -14, 30])
@pytest.mark.parametrize("noise_multiplier", NUMBERS)
@pytest.mark.parametrize("kind", ["ballot", "train", "evaluate"])
def test_extreme_noise_is_refused_before_it_costs_anything_and_at_once(
    ward: Ward, kind: str, noise_multiplier: float, step_exp: int
) -> None:
    """Too little noise would keep the accountant busy for hours, too much overflows the ring after the reservation."""
    change = {"noise_multiplier": noise_multiplier, "step_exp": step_exp}
    body = json.loads(ward.good[kind].body) | change
    handled(ward, resigned(ward.clinic.operator, json.dumps(body).encode(), ward.good[kind].arrays))


def test_a_plan_of_many_unwelcome_candidates_is_refused_with_its_reasons(ward: Ward) -> None:
    plan = a_plan(candidates=[{"name": f"{'a' * 60}{number}"} for number in range(10, 74)])
    ward.clinic.site.config = ward.site.config.model_copy(
        update={"policy": ward.site.config.policy.model_copy(update={"candidates": ("pixels",), "licences": ("MIT",)})}
    )
    try:
        fields = {
            "campaign": "run-3",
            "request_id": "run-3/hello",
            "plan_json": plan.model_dump_json(),
            "plan_sha256": plan.sha256,
            "models": {},
        }
        assert handled(ward, ward.clinic.hello_request(**fields)) == "refusal"
    finally:
        ward.put_back()


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "a\0b", "..", "x" * 300, "é", "a\n"])
@pytest.mark.parametrize("field", ["campaign", "request_id", "round_id", "site", "candidate"])
def test_names_with_path_parts_never_become_files(ward: Ward, field: str, name: str) -> None:
    """A request id may hold slashes and dots; it is a key in a database and no file is ever called by it."""
    around = ward.clinic.folder.parent
    before = {one for one in around.rglob("*") if "site.log" not in one.name}
    for good in ward.good.values():
        body = json.loads(good.body)
        body |= {field: name} if field in body else {}
        if field == "site" and body.get("cohort"):
            body["cohort"][0]["site"] = name
        handled(ward, resigned(ward.clinic.operator, json.dumps(body).encode(), good.arrays))
    assert {one for one in around.rglob("*") if "site.log" not in one.name} == before


# ---- sealed


def a_header(ward: Ward, request: Envelope, head: Head | None) -> tuple[dict[str, Any], Parcel]:
    parcel = seal(ward.clinic.operator, ward.roster, request, {NAME: head})
    plain = SUITE.decrypt(next(iter(parcel.headers.values())), ward.site.identity.sealing_key, INFO)
    return json.loads(plain), parcel


def sealed_by_hand(ward: Ward, plain: bytes, content: np.ndarray[Any, Any]) -> Parcel:
    public = ward.roster.sealing_key_of(NAME)
    return Parcel({key_id(public): SUITE.encrypt(plain.ljust(HEADER_BYTES - OVERHEAD_BYTES), public, INFO)}, content)


def re_signed_header(ward: Ward, fields: dict[str, Any]) -> bytes:
    """A header with any fields, signed by the operator where they can be signed."""
    from urna.protocol.sealing import _signed_bytes as header_bytes

    try:
        header = Header.model_validate(fields)
        data = header_bytes(header.receiver, header.content_key, header.content_sha256, header.answers, header.head)
        fields = fields | {"signature": ward.clinic.operator.sign("parcel", data).hex()}
    except ValueError:
        pass
    return json.dumps(fields).encode()


def received(ward: Ward, parcel: Parcel, request: Envelope) -> str:
    """Hand a parcel to the site; the kind of what the operator finds in the answer."""
    before = ward.releases()
    try:
        envelope, head = unseal(ward.clinic.operator, ward.roster, ward.site.receive(parcel), NAME, parcel.sha256)
        said = Failure.model_validate_json(envelope.body) if b'"kind":"failure"' in envelope.body else None
        if said is None:
            ward.check(request, open_reply(envelope, ward.roster, NAME, request), before)
        else:
            ward.check(request, said, before)
            assert said.request_sha256 in (parcel.sha256, request.sha256)
        if head is not None:
            head.check(ward.roster)
            assert (head.seq, head.link) == ward.site.ledger.head()
    finally:
        if ward.state() != ward.files:
            ward.put_back()
    return "answer" if said is None else str(said.code)


header_edits = st.tuples(edits | st.none(), byte_edits | st.none())


def test_a_site_answers_any_parcel_with_a_sealed_code_and_spends_nothing_unasked(ward: Ward) -> None:
    counts: Counter[str] = Counter()
    head = Head.create(ward.site.identity, ward.site.ledger.id, *ward.site.ledger.head())
    cheap = ["hello", "unmask", "close", "repeat"]
    prepared = {kind: a_header(ward, ward.good[kind], head) for kind in cheap}

    @FUZZ
    @given(st.sampled_from(cheap), header_edits, byte_edits | st.none())
    def holds(kind: str, change: tuple[list[Edit] | None, Any], raw: Any) -> None:
        fields, parcel = prepared[kind]
        structural, header_raw = change
        plain = re_signed_header(ward, fields if structural is None else mutated(fields, structural))
        plain = plain if header_raw is None else spliced(plain, header_raw)
        content = parcel.content if raw is None else np.frombuffer(spliced(parcel.content.tobytes(), raw), np.uint8)
        counts[received(ward, sealed_by_hand(ward, plain[: HEADER_BYTES - OVERHEAD_BYTES], content), ward.good[kind])] += 1

    holds()
    assert counts["answer"] > NUM_CASES // 200, counts
    assert counts["bad_request"] > NUM_CASES // 3, counts


# ---- the operator


def believed(request: Envelope, reply: Envelope, roster: Roster) -> str:
    """Read a reply as the operator does."""
    try:
        said = open_reply(reply, roster, NAME, request)
        assert said.request_sha256 == request.sha256
        if isinstance(said, Masked):
            upload_of(reply.arrays)
    except ProtocolError as error:
        one_line(error)
        return type(error).__name__
    return said.kind


def test_an_operator_reads_any_signed_reply_or_refuses_it_in_one_line(ward: Ward) -> None:
    counts: Counter[str] = Counter()
    replies = {}
    for kind, request in ward.good.items():
        replies[kind] = ward.site.handle(request)
        ward.put_back()

    @FUZZ
    @given(st.sampled_from(sorted(replies)), changes)
    def holds(kind: str, change: Change) -> None:
        counts[believed(ward.good[kind], altered(ward.site.identity, replies[kind], change), ward.roster)] += 1

    holds()
    assert counts["ProtocolError"] > NUM_CASES // 3, counts
    assert sum(counts[kind] for kind in ("masked", "hello", "burnt", "unmasked")) > NUM_CASES // 100, counts


# ---- planted mutants


def test_mutants_of_the_site_are_noticed(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ward.good["train"]
    wrong = resigned(ward.clinic.operator, b"{}", {})

    def raises(*_: object) -> Envelope:
        raise RuntimeError("out of the edge")

    real_reserve, real_answer = Site._reserve, Site._answer

    def reserves_twice(self: Site, envelope: Envelope, request: Any, plan: Any, kept: Any) -> tuple[str, ...]:
        real_reserve(self, envelope, request.model_copy(update={"request_id": f"{request.request_id}-more"}), plan, kept)
        return real_reserve(self, envelope, request, plan, kept)

    def reserves_first(self: Site, envelope: Envelope) -> Envelope:
        request = open_request(envelope, self.roster, OPERATOR)
        if request.kind == "train":
            kept = self.ledger.campaign(request.campaign)
            assert kept is not None
            real_reserve(self, envelope, request, ward.clinic.plan, kept)
            raise ProtocolError("refused afterwards")
        return real_answer(self, envelope)

    def leaves_a_file(self: Site, envelope: Envelope) -> Envelope:
        (self.folder / "core").touch()
        return real_answer(self, envelope)

    handled(ward, train)
    handled(ward, wrong)
    for name, mutant, request in (
        ("handle", raises, wrong),
        ("_reserve", reserves_twice, train),
        ("_answer", reserves_first, train),
        ("_answer", leaves_a_file, wrong),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Site, name, mutant)
            must_fail(partial(handled, ward, request))


def test_a_reply_that_is_not_checked_is_noticed(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.attacks.test_fuzz_messages.open_reply", lambda *_: Masked(request_sha256="0" * 64))
    must_fail(lambda: believed(ward.good["train"], resigned(ward.site.identity, b"{", {}), ward.roster))
