import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Result, Strategy

from tests.mean_consortium import MeanConsortium, Metrics, app_of, code_of, identify, keys_in, kind_of
from urna.client.mean_site import ROUNDS_FILE
from urna.client.round_store import RoundStore
from urna.privacy.secure_sum import burnt_statement
from urna.protocol.averaging import HEADER, GreetRequest, MeanAbortRequest, MeanUnmaskRequest, RingBits
from urna.protocol.errors import RoundError, SiteConfigError
from urna.protocol.identity import IDENTITY_FILE, create_consortium, load_identity
from urna.protocol.messages import AnswerOfSite, AnyArray, Burnt, HelloReply, Member, Reply, from_record, signed, to_record
from urna.strategies import SecureSum
from urna.strategies.secure_sum import ALLOWED, REASONS

COUNT = 5
FIRST_GRID = 2e-5  # what a first round's grids, set by default constants, cost at the weights below
Arrays = dict[str, AnyArray]


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    identify(monkeypatch)


def train(site: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
    """Each site pulls towards its own point, so that strategies with state move on for many rounds."""
    own = {name: np.cos(np.arange(one.size) * site).reshape(one.shape) for name, one in arrays.items()}
    moved = {name: (one + 0.3 * (own[name] - one)).astype(one.dtype) for name, one in arrays.items()}
    return moved, {"num-examples": 100 * site + 7, "train_loss": 1.0 / site}


def evaluate(site: int, arrays: Arrays) -> Metrics:
    level = float(np.mean([np.mean(one) for one in arrays.values()]))
    return {"num-examples": 10 * site, "eval_loss": level + 0.5 * site, "eval_acc": 1.0 / site}


def initial() -> ArrayRecord:
    return ArrayRecord({"layer.weight": Array(np.zeros((7, 5), np.float32)), "layer.bias": Array(np.full(5, 2, np.float32))})


def run(
    strategy: Strategy, grid: MeanConsortium, rounds: int = 4, arrays: ArrayRecord | None = None, timeout: float = 60
) -> Result:
    first = initial() if arrays is None else arrays
    return strategy.start(grid, first, rounds, timeout, ConfigRecord({"lr": 0.1}), ConfigRecord({"depth": 2}))


def consortium(tmp_path: Path, *, count: int = COUNT, own: Callable[..., tuple[Arrays, Metrics]] = train) -> MeanConsortium:
    return MeanConsortium(tmp_path / "consortium", app_of(own, evaluate), count)


def plain(tmp_path: Path, *, count: int = COUNT, own: Callable[..., tuple[Arrays, Metrics]] = train) -> MeanConsortium:
    return MeanConsortium(tmp_path / "plain", app_of(own, evaluate, mods=False), count, secure=False)


def largest_difference(one: ArrayRecord, other: ArrayRecord) -> float:
    assert list(one) == list(other)
    pairs = [(one[name].numpy(), other[name].numpy()) for name in one]
    assert [(a.shape, a.dtype) for a, _ in pairs] == [(b.shape, b.dtype) for _, b in pairs]
    return max(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) for a, b in pairs)


MAKERS: dict[str, Callable[[], FedAvg]] = {
    "FedAvg": FedAvg,
    "FedAvg of a sample": lambda: FedAvg(fraction_evaluate=0.0, weighted_by_key="num-examples"),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdam": lambda: FedAdam(eta=0.05),
    "FedAdagrad": lambda: FedAdagrad(eta=0.05),
    "FedYogi": lambda: FedYogi(eta=0.05),
    "FedProx": lambda: FedProx(proximal_mu=0.1),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_allowed_strategy_equals_flower(tmp_path: Path, make: Callable[[], FedAvg]) -> None:
    """Six rounds carry momentum and second moments; the reference is the same class, fed with the plain replies."""
    one = consortium(tmp_path)
    secure = run(SecureSum(make(), **one.keys, max_abs=4.0, max_weight=1000), one, rounds=6)
    reference = run(make(), plain(tmp_path), rounds=6)
    assert largest_difference(secure.arrays, reference.arrays) < 5e-6  # adaptive rules make 50 of a difference of one
    assert float(np.abs(reference.arrays["layer.weight"].numpy()).max()) > 0.05
    for found, expected in (
        (secure.train_metrics_clientapp, reference.train_metrics_clientapp),
        (secure.evaluate_metrics_clientapp, reference.evaluate_metrics_clientapp),
    ):
        assert found.keys() == expected.keys()
        for number in expected:
            assert dict(found[number]) == pytest.approx(dict(expected[number]), abs=1e-5)


def test_every_allowed_class_is_tested() -> None:
    assert {make().__class__ for make in MAKERS.values()} == set(ALLOWED)


@pytest.mark.parametrize(("ring_bits", "tolerance"), [(16, 2e-2), (24, 1e-4), (32, 1e-6)])
def test_narrow_rings_are_coarser_and_right(tmp_path: Path, ring_bits: RingBits, tolerance: float) -> None:
    one = consortium(tmp_path)
    secure = run(SecureSum(FedAvg(), **one.keys, ring_bits=ring_bits, max_abs=2.0, max_weight=1000), one)
    assert largest_difference(secure.arrays, run(FedAvg(), plain(tmp_path)).arrays) < tolerance


def test_integers_doubles_halves_and_scalars_are_averaged_as_flower_does(tmp_path: Path) -> None:
    """A state dict of torch has int64 counters without dimensions (``num_batches_tracked``); their mean is a float64."""

    def own(site: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
        new = {name: np.asarray(one + np.asarray(site, dtype=one.dtype)) for name, one in arrays.items()}
        return new, {"num-examples": 10 * site, "train_loss": 0.0}

    kinds = {
        "counter": np.asarray(3, np.int64),
        "double": np.full((2, 3), 0.25),
        "half": np.ones(4, np.float16),
        "none": np.zeros((0, 2)),
    }
    arrays = ArrayRecord({name: Array(np.asarray(one)) for name, one in kinds.items()})
    one = consortium(tmp_path, own=own)
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=1, arrays=arrays)
    reference = run(FedAvg(fraction_evaluate=0.0), plain(tmp_path, own=own), rounds=1, arrays=arrays)
    found = {name: one.numpy() for name, one in secure.arrays.items()}
    expected = {name: one.numpy() for name, one in reference.arrays.items()}
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in expected.items()
    }
    for name, tolerance in (("counter", 2e-2), ("double", 2e-5), ("half", 5e-3)):  # a first round's grids, wide for integers
        assert np.allclose(found[name], expected[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("name", sorted(set(flower.__all__) - {"Result", "Strategy"} - {one.__name__ for one in ALLOWED}))
def test_robust_rules_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    """All that Flower exports beside the allowed ones, whatever it adds later."""
    strategy = object.__new__(getattr(flower, name))  # their constructors differ; the class decides
    with pytest.raises(ValueError, match=f"{name} cannot run on a secure sum: {REASONS[name]}"):
        SecureSum(strategy, operator_key=tmp_path, roster=tmp_path)


def test_a_subclass_that_changes_the_aggregation_is_refused_and_one_that_configures_is_not(tmp_path: Path) -> None:
    class Decay(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
            config["lr"] = 0.1 * 0.5**server_round
            return super().configure_train(server_round, arrays, config, grid)

    class Sorted(Decay):
        def aggregate_train(self, server_round, replies):  # type: ignore[no-untyped-def]
            return super().aggregate_train(server_round, sorted(replies, key=str))

    class Median(flower.FedMedian):
        pass

    create_consortium(tmp_path, ["site-1", "site-2", "site-3"])
    keys = keys_in(tmp_path)
    SecureSum(Decay(), **keys)
    with pytest.raises(ValueError, match="Sorted cannot run on a secure sum: it changes aggregate_train"):
        SecureSum(Sorted(), **keys)
    with pytest.raises(ValueError, match="Median cannot run on a secure sum: it takes the median"):
        SecureSum(Median(), **keys)
    patched = FedAvg()
    patched.aggregate_train = lambda *_: (None, None)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="it changes aggregate_train"):
        SecureSum(patched, **keys)


def test_other_reasons_to_refuse_are_said(tmp_path: Path) -> None:
    create_consortium(tmp_path / "a", ["site-1", "site-2", "site-3"])
    create_consortium(tmp_path / "b", ["site-1", "site-2", "site-3"])
    keys = keys_in(tmp_path / "a")

    class Own(Strategy):
        configure_train = configure_evaluate = aggregate_train = aggregate_evaluate = summary = None  # type: ignore[assignment]

    with pytest.raises(
        ValueError, match="Own cannot run on a secure sum: it is not known to depend on the weighted mean alone"
    ):
        SecureSum(Own(), **keys)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with its own function over single metrics"):
        SecureSum(FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()), **keys)  # noqa: ARG005
    with pytest.raises(ValueError, match="expected min_train_nodes of at least 3 when a fraction is sampled, found 2"):
        SecureSum(FedAvg(fraction_train=0.5), **keys)
    with pytest.raises(ValueError, match="is the weight: leave it out of the metrics"):
        SecureSum(FedAvg(), **keys, train_metrics=("num-examples",))
    with pytest.raises(ValueError, match=r"is not the key that .* pins to the operator"):
        SecureSum(FedAvg(), operator_key=tmp_path / "b" / "operator.key", roster=keys["roster"])
    with pytest.raises(ValueError, match="at least two honest sites"):
        SecureSum(FedAvg(), **keys, num_colluding=2)
    with pytest.raises(SiteConfigError, match="expected the private key of operator"):
        SecureSum(FedAvg(), operator_key=tmp_path / "none", roster=keys["roster"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_weight": 10**12 + 1}, r"max_weight is at most 10\*\*12, .* found 1000000000001"),
        ({"num_colluding": 81, "min_sites": 300}, "num_colluding at most 80, found 100000, 81"),
        ({"max_abs": 1e300}, "step_exp must be -60 to 30, found"),
        ({"max_abs_integers": 1e-300}, "step_exp must be -60 to 30, found -"),
        ({"max_abs": float("inf")}, "largest_sum must be positive and finite, found inf"),
        ({"ring_bits": 16, "min_sites": 40_000, "num_colluding": 0}, "a ring of 16 bits has no room for 40000 summands"),
    ],
    ids=["weight", "colluding", "large", "tiny", "infinite", "narrow ring"],
)
def test_numbers_that_no_request_could_carry_are_said_before_anything_is_asked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    create_consortium(tmp_path, ["site-1", "site-2", "site-3"])
    SecureSum(FedAvg(), **keys_in(tmp_path), max_weight=10**12, max_abs_integers=1.0, max_abs=1.0)
    with pytest.raises(ValueError, match=message):
        SecureSum(FedAvg(), **keys_in(tmp_path), **changes)


def test_dropout_before_upload_opens_the_sum_of_the_others(tmp_path: Path) -> None:
    one = consortium(tmp_path)
    one.faults[2] = lambda request, reply: None if kind_of(request) == "mean-average" else reply
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys, unmask_timeout_seconds=1), one, rounds=1, timeout=3)
    others = MeanConsortium(tmp_path / "plain", app_of(train, evaluate, mods=False), COUNT, secure=False)
    del others.contexts[2]
    assert largest_difference(secure.arrays, run(FedAvg(fraction_evaluate=0.0), others, rounds=1).arrays) < FIRST_GRID


def test_dropout_during_unmask_opens_the_sum_of_all(tmp_path: Path) -> None:
    one = consortium(tmp_path)
    one.faults[2] = lambda request, reply: None if kind_of(request) == "mean-unmask" else reply
    secure = run(SecureSum(FedAvg(), **one.keys), one)
    assert largest_difference(secure.arrays, run(FedAvg(), plain(tmp_path)).arrays) < FIRST_GRID


def test_a_lost_round_keeps_the_arrays_and_the_next_is_opened_after_everybody_saw_what_became_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of five are silent in the second round's unmask: it is burnt, audited, and the third opens."""
    one = consortium(tmp_path)
    unmasks = dict.fromkeys((1, 2), 0)

    def silent(node: int) -> Callable[[Message, Message], Message | None]:
        def fault(request: Message, reply: Message) -> Message | None:
            unmasks[node] += kind_of(request) == "mean-unmask"
            return None if kind_of(request) == "mean-unmask" and unmasks[node] == 2 else reply

        return fault

    one.faults = {node: silent(node) for node in unmasks}
    strategy = FedAvg(fraction_evaluate=0.0)
    secure = run(SecureSum(strategy, **one.keys, unmask_timeout_seconds=2), one, rounds=3)
    reference = run(FedAvg(fraction_evaluate=0.0), plain(tmp_path), rounds=2)
    assert largest_difference(secure.arrays, reference.arrays) < FIRST_GRID
    assert sorted(secure.train_metrics_clientapp) == [1, 3]
    assert "is lost: 3 of 5 answered" in caplog.text


def reseal(one: MeanConsortium, node: int, answer: Reply, reply: Message) -> Message:
    """Another answer, signed by the node's own site."""
    identity = load_identity(f"site-{node}", one.site(node) / IDENTITY_FILE)
    reply.content = to_record(signed(identity, answer))
    return reply


def asked_in(request: Message) -> bytes:
    """The body of a request of a secure sum."""
    return cast("bytes", request.content.config_records[HEADER]["body"])


def kept_of(one: MeanConsortium, node: int) -> RoundStore:
    return RoundStore.open(one.site(node) / ROUNDS_FILE)


def test_a_liar_in_an_abort_is_left_out_of_the_audit_and_stops_nobody(tmp_path: Path) -> None:
    """Site 2 does not open the first round, and signs that it had answered a list that nobody asked about."""
    one = consortium(tmp_path)
    aborted: list[str] = []

    def first_is_lost(request: Message, reply: Message) -> Message | None:
        return None if kind_of(request) == "mean-unmask" and not aborted else reply

    def lying(request: Message, reply: Message) -> Message | None:
        if kind_of(request) != "mean-abort":
            return first_is_lost(request, reply)
        round_id = MeanAbortRequest.model_validate_json(asked_in(request)).round_id
        aborted.append(round_id)
        said = Burnt.model_validate_json(from_record(reply.content).body)
        kept = kept_of(one, 2).find(round_id)
        assert kept is not None
        identity = load_identity("site-2", one.site(2) / IDENTITY_FILE)
        signature = identity.sign("burnt", burnt_statement(round_id, kept.progress.context, "ab" * 32)).hex()
        answer = AnswerOfSite(alive_sha256="ab" * 32, signature=signature)
        return reseal(one, 2, said.model_copy(update={"answer": answer}), reply)

    one.faults = {2: lying, 4: first_is_lost}
    strategy = SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys, unmask_timeout_seconds=1)
    secure = run(strategy, one, rounds=2)
    assert len(aborted) == 1
    assert sorted(secure.train_metrics_clientapp) == [2]
    assert b'"audit"' not in one.all_bytes("reply")


def test_rounds_that_were_provably_given_up_never_make_a_site_refuse(tmp_path: Path) -> None:
    """Three of five are not reached by the unmask, five times; as claims without proof that would be two too many."""
    one = consortium(tmp_path)
    app, campaigns, num_unreached = one.app, set[str](), 0

    def reached(message: Message, context: Context) -> Message:
        nonlocal num_unreached
        if kind_of(message) == "mean-unmask" and context.node_id >= 3 and num_unreached < 15:
            campaigns.add(MeanUnmaskRequest.model_validate_json(asked_in(message)).campaign)
            num_unreached += 1
            return Message(Error(code=0, reason="not reached"), reply_to=message)
        return app(message, context)

    one.app = cast("ClientApp", reached)
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=6)
    assert sorted(secure.train_metrics_clientapp) == [6]
    (campaign,) = campaigns
    for node in (1, 2):
        store = kept_of(one, node)
        assert store.num_unproven(campaign) == 0
        assert list(store.unaudited(campaign)) == [f"{campaign}/6"]
    assert b'"audit"' not in one.all_bytes("reply")


@pytest.mark.parametrize("kind", ["copied", "low_order"])
def test_a_member_with_anothers_or_a_useless_round_key_takes_no_part_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    one = consortium(tmp_path)
    shown: list[Member] = []

    def noted(request: Message, reply: Message) -> Message:
        if kind_of(request) == "mean-greet":
            shown.append(HelloReply.model_validate_json(from_record(reply.content).body).member)
        return reply

    def forged(request: Message, reply: Message) -> Message:
        if kind_of(request) != "mean-greet":
            return reply
        campaign = GreetRequest.model_validate_json(asked_in(request)).campaign
        said = HelloReply.model_validate_json(from_record(reply.content).body)
        key = shown[0].public_key if kind == "copied" else bytes(32).hex()
        member = Member.create(load_identity("site-5", one.site(5) / IDENTITY_FILE), campaign, key, 1)
        return reseal(one, 5, said.model_copy(update={"member": member}), reply)

    one.faults = {1: noted, 5: forged}
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=1)
    others = plain(tmp_path, count=4)
    assert largest_difference(secure.arrays, run(FedAvg(fraction_evaluate=0.0), others, rounds=1).arrays) < FIRST_GRID
    why = "shows the round key of site-1" if kind == "copied" else "shows a round key of low order"
    assert f"node 5 does not take part: {why}" in caplog.text


def test_nonfinite_update_is_refused_and_the_round_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def own(site: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
        new, metrics = train(site, arrays)
        if site == 4:
            new["layer.bias"][2] = np.nan
        return new, metrics

    one = consortium(tmp_path, own=own)
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=2)
    others = plain(tmp_path)
    del others.contexts[4]
    assert largest_difference(secure.arrays, run(FedAvg(fraction_evaluate=0.0), others, rounds=2).arrays) < FIRST_GRID
    assert "site-4 is not in round" in caplog.text
    assert "it failed: numeric" in caplog.text


def test_too_few_uploads_lose_the_round_and_nothing_is_asked_to_be_opened(tmp_path: Path) -> None:
    one = consortium(tmp_path)
    for node in (1, 2):
        one.faults[node] = lambda request, reply: None if kind_of(request) == "mean-average" else reply
    secure = run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=1, timeout=3)
    assert not secure.arrays
    assert b"mean-average" in one.all_bytes("request")
    assert b"mean-unmask" not in one.all_bytes("request")


def test_nobody_with_any_weight_is_a_lost_round(tmp_path: Path) -> None:
    def own(_: int, arrays: Arrays) -> tuple[Arrays, Metrics]:
        return arrays, {"num-examples": 0, "train_loss": 1.0}

    one = consortium(tmp_path, own=own)
    assert not run(SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys), one, rounds=1).arrays


def test_clamped_values_are_counted_and_the_next_ranges_are_wider(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = consortium(tmp_path)
    weight = max(train(site, {"a": np.zeros(1)})[1]["num-examples"] for site in range(1, COUNT + 1))
    strategy = SecureSum(FedAvg(fraction_evaluate=0.0), **one.keys, max_abs=0.01, max_weight=int(weight))
    run(strategy, one, rounds=1)
    assert "values were beyond their range and clamped" in caplog.text


def test_one_reply_at_a_time_is_in_memory(tmp_path: Path) -> None:
    one = consortium(tmp_path, count=9)
    run(SecureSum(FedAvg(), **one.keys), one, rounds=1)
    assert one.largest_backlog == 1


def test_forty_sites_share_masks_in_a_sparse_graph(tmp_path: Path) -> None:
    one = consortium(tmp_path, count=40)
    secure = run(SecureSum(FedAvg(), **one.keys), one, rounds=1)
    assert largest_difference(secure.arrays, run(FedAvg(), plain(tmp_path, count=40), rounds=1).arrays) < FIRST_GRID


def test_too_few_sites_are_said_in_time(tmp_path: Path) -> None:
    one = consortium(tmp_path, count=3)
    del one.contexts[3]
    with pytest.raises(RoundError, match=r"expected at least 3 sites of the roster within 0\.3 s, found 2 at 2 nodes"):
        run(SecureSum(FedAvg(), **one.keys, setup_timeout_seconds=0.3), one)


def test_a_node_that_is_no_site_of_the_roster_is_never_sampled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = consortium(tmp_path, count=4)
    stranger = tmp_path / "stranger"
    create_consortium(stranger, ["site-4"])
    one.contexts[4].node_config["site-dir"] = str(stranger / "sites" / "site-4")
    secure = run(SecureSum(FedAvg(), **one.keys), one, rounds=1)
    assert largest_difference(secure.arrays, run(FedAvg(), plain(tmp_path, count=3), rounds=1).arrays) < FIRST_GRID
    assert "node 4" in caplog.text


def test_messages_that_differ_or_ask_something_else_are_refused(tmp_path: Path) -> None:
    one = consortium(tmp_path, count=3)
    grid = SecureSum(FedAvg(), **one.keys).secured(one)
    nodes = list(grid.get_node_ids())

    def batch(kind: str, **different: AnyArray) -> list[Message]:
        records = [ArrayRecord({"a": Array(different.get(f"node_{node}", np.zeros(2, np.float32)))}) for node in nodes]
        return [Message(RecordDict({"arrays": one}), node, kind) for one, node in zip(records, nodes, strict=True)]

    with pytest.raises(ValueError, match="expected the same records for all nodes"):
        grid.send_and_receive(batch(MessageType.TRAIN, node_2=np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="nothing else is averaged"):
        grid.send_and_receive(batch(MessageType.QUERY))
    with pytest.raises(ValueError, match="expected one message for each node"):
        grid.send_and_receive(batch(MessageType.TRAIN) + batch(MessageType.TRAIN)[:1])
    with pytest.raises(RoundError, match="expected a batch to at least 3 sites, found 2"):
        grid.send_and_receive(batch(MessageType.TRAIN)[:2])
    for direct in (grid.push_messages, grid.pull_messages):
        with pytest.raises(RuntimeError, match="use send_and_receive"):
            direct([])
    assert list(grid.send_and_receive([])) == []


def test_a_server_without_secure_sum_gets_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = consortium(tmp_path, count=3)
    result = run(FedAvg(), one, rounds=1)
    assert not result.arrays
    assert "a message without a request of urna.strategies.SecureSum" in caplog.text
    plain_reply = next(iter(one.send_and_receive([Message(RecordDict({"arrays": initial()}), 1, "train")])))
    assert code_of(plain_reply) == "bad_request: this site answers only requests of urna.strategies.SecureSum"


def test_importing_the_packages_loads_neither_flower_nor_torch() -> None:
    source = (
        "import sys, urna.client, urna.strategies; print([name for name in ('flwr', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        __import__("urna.strategies").strategies.nothing  # noqa: B018
