"""What the operator keeps of the sites between exchanges: their ledgers' heads, and who still waits for a person.

Also what a relay can do to sealed replies in a campaign: nothing but lose them.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.simulator import Federation, bodies, entries, rounds, small, value
from urna.client.site import open_site
from urna.protocol.errors import FailureCode, RoundError
from urna.protocol.identity import OPERATOR, Identity
from urna.protocol.messages import Envelope, Failure, Head, Pending, read_request, signed
from urna.protocol.plan import Plan
from urna.protocol.sealing import Parcel, seal, unseal
from urna.server.exchange import APPROVAL_POLL_SECONDS, Exchange
from urna.server.stages import Stages
from urna.strategies.aggregation import OptimizerState

SITES = tuple(f"site-{number}" for number in range(1, 6))


def brief(**changes: object) -> Plan:
    """Five sites, one candidate, three rounds; three are enough."""
    usual = {"names": ("pixels",), "num_rounds": 3, "if_undecided": "prior", "num_curve_points": 0, "min_sites": 3}
    return small(**usual | changes)  # type: ignore[arg-type]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "run", brief())


def trained(stages: Stages, index: int, state: OptimizerState | None = None) -> OptimizerState:
    return stages.train("final", f"final/{index}", "pixels", state or stages.start("pixels"), index, 4.0, 3)


def newest_heads(run_dir: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for entry in entries(run_dir):
        found |= entry.value if entry.kind == "heads" else {}
    return found


# ---- a ledger that goes back


class TimeMachine:
    """Copies a site's folder, and later puts the copy in its place: as a backup or a snapshot of a machine would."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.federation, self.name = federation, name
        self.folder = federation.site(name).folder
        self.copy = self.folder.with_name(f"{name}-backup")

    def save(self) -> None:
        self.federation.site(self.name).ledger.close()
        shutil.copytree(self.folder, self.copy)
        self._reopen()

    def restore(self) -> None:
        self.federation.site(self.name).ledger.close()
        shutil.rmtree(self.folder)
        self.copy.rename(self.folder)
        self._reopen()

    def _reopen(self) -> None:
        at = self.federation.sites.index(self.federation.site(self.name))
        self.federation.sites[at] = open_site(self.folder)


def rolled_back(federation: Federation) -> tuple[str, int]:
    """Site 3 goes back to before round 1; why round 2 dropped it, and how many releases it holds after that."""
    machine = TimeMachine(federation, "site-3")
    with federation.stages() as stages:
        machine.save()
        state = trained(stages, 1)
        machine.restore()
        trained(stages, 2, state)
    entry = rounds(federation.run_dir)["final/2"]
    assert entry.value["opened"]
    return entry.value["dropped"].get("site-3", ""), sum(row.count for row in federation.site("site-3").ledger.rows())


def test_rollback_detected_by_echoed_head(federation: Federation) -> None:
    """Round 1 is forgotten at site 3, which would spend its budget again: it refuses, and the others' sum opens."""
    assert rolled_back(federation) == ("failed: rollback", 0)
    assert [body["code"] for _, body in bodies(federation, "failure")] == ["rollback"]


def test_without_the_echo_the_operator_still_drops_what_comes_from_an_older_ledger(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A planted mutant of the test above: the site cannot know, and spends again."""
    monkeypatch.setattr(Exchange, "_echo", lambda *_: None)
    assert rolled_back(federation) == ("ledger went back", 1)
    assert "expected site-3's ledger to hold entry" in caplog.text


def test_without_echo_and_check_nobody_sees_a_rollback(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mutant of both."""
    monkeypatch.setattr(Exchange, "_echo", lambda *_: None)
    monkeypatch.setattr(Exchange, "_note", lambda *_: None)
    assert rolled_back(federation) == ("", 1)


def resealed(federation: Federation, name: str, head: Callable[[Head], Head | None]) -> Callable[[str, Parcel], Parcel]:
    """A site that shows another head with its upload, signed by itself."""
    site = federation.site(name)

    def tampering(route: str, parcel: Parcel) -> Parcel:
        if route != "train":
            return parcel
        answers = federation.last_request.sha256
        reply, shown = unseal(federation.operator, site.roster, parcel, answers=answers)
        assert shown is not None
        return seal(site.identity, site.roster, reply, {OPERATOR: head(shown)}, answers)

    return tampering


def in_another_name(site: Identity, shown: Head) -> Head:
    return Head.create(Identity("site-4", site.private_key), shown.ledger, shown.seq, shown.link)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (lambda site, shown: Head.create(site, shown.ledger, shown.seq, shown.link), ""),
        (lambda site, shown: Head.create(site, shown.ledger, shown.seq + 1, "0" * 64), ""),
        (lambda site, shown: Head.create(site, shown.ledger, 0, "0" * 64), "ledger went back"),
        (lambda *_: None, "not believed"),
        (lambda _, shown: shown.model_copy(update={"seq": shown.seq + 1}), "not believed"),
        (in_another_name, "not believed"),
    ],
    ids=["its own", "a later one", "the first", "none", "altered", "in another's name"],
)
def test_only_a_reply_with_a_head_of_its_own_and_no_older_one_is_believed(
    federation: Federation, head: Callable[[Identity, Head], Head | None], why: str
) -> None:
    site = federation.site("site-3").identity
    with federation.stages() as stages:
        state = trained(stages, 1)
        federation.tampered["site-3"] = resealed(federation, "site-3", lambda shown: head(site, shown))
        trained(stages, 2, state)
    entry = rounds(federation.run_dir)["final/2"]
    assert entry.value["opened"]
    assert entry.value["dropped"] == ({"site-3": why} if why else {})


def test_two_heads_of_one_number_are_two_ledgers(federation: Federation) -> None:
    with federation.stages() as stages:
        state = trained(stages, 1)
        known = Head.model_validate(newest_heads(federation.run_dir)["site-3"])
        other = Head.create(federation.site("site-3").identity, known.ledger, known.seq, "0" * 64)
        federation.tampered["site-3"] = resealed(federation, "site-3", lambda _: other)
        trained(stages, 2, state)
    assert rounds(federation.run_dir)["final/2"].value["dropped"] == {"site-3": "ledger went back"}


def test_every_request_echoes_the_newest_head_and_only_to_its_own_site(federation: Federation) -> None:
    federation.run()
    last: dict[str, Head] = {}
    for _, site, head in federation.echoed:
        assert head is None or head.site == site
        if site in last:
            assert head is not None
            assert head.seq >= last[site].seq
        if head is not None:
            head.check(federation.site(site).roster)
            last[site] = head
    first = [head for request_id, _, head in federation.echoed if request_id == "run/hello"]
    assert first == [None] * 5
    assert all(head is not None for request_id, _, head in federation.echoed if request_id != "run/hello")
    final = {site: Head.model_validate(head) for site, head in newest_heads(federation.run_dir).items()}
    assert {site: (head.seq, head.link) for site, head in final.items()} == {
        site.config.name: site.ledger.head() for site in federation.sites
    }


def test_heads_are_in_the_journal_before_what_the_exchange_brought(federation: Federation) -> None:
    federation.run()
    found = entries(federation.run_dir)
    at = {entry.key: entry.seq for entry in found}
    for key in ("final/1", "final/2", "final/3", "evaluation/final/1"):
        assert any(at[f"ask/{key}"] < entry.seq < at[f"round/{key}"] for entry in found if entry.kind == "heads")
    assert sum(entry.kind == "heads" for entry in found) <= sum(entry.kind == "ask" for entry in found)  # one an exchange


class KilledError(BaseException):
    """Nothing of the campaign runs after it."""


def test_a_resumed_run_echoes_what_the_journal_holds(tmp_path: Path) -> None:
    def killed(route: str, reply: Envelope) -> Envelope:
        if route == "evaluate":
            raise KilledError
        return reply

    first = Federation(tmp_path / "run", brief())
    first.faults["site-5"] = killed
    with pytest.raises(KilledError):
        first.run()
    for site in first.sites:
        site.ledger.close()
    kept = {site: Head.model_validate(head) for site, head in newest_heads(tmp_path / "run").items()}
    assert set(kept) == set(SITES)
    second = Federation(tmp_path / "run", brief())
    second.run()
    assert {site: head for request_id, site, head in second.echoed if request_id == "run/hello"} == kept


# ---- what a relay can do


def test_reply_in_other_name_refused(federation: Federation) -> None:
    """The relay, or site 2 itself, hands over site 2's upload as site 1's; and site 2 signs one in site 1's name."""
    one, two = federation.site("site-1").identity, federation.site("site-2").identity
    kept: list[Parcel] = []

    def stolen(route: str, parcel: Parcel) -> Parcel:
        if route == "train":
            kept.append(parcel)
        return kept[0] if route == "train" else parcel

    federation.tampered |= {"site-1": stolen, "site-2": stolen}  # site 1 answers first: both addresses bring its parcel

    def in_the_name_of_one(route: str, reply: Envelope) -> Envelope:
        return Envelope(one.name, reply.body, reply.signature, reply.arrays) if route == "train" else reply

    federation.faults["site-3"] = in_the_name_of_one

    def posing(route: str, parcel: Parcel) -> Parcel:
        if route != "train":
            return parcel
        answers = federation.last_request.sha256
        reply, head = unseal(federation.operator, federation.site("site-4").roster, parcel, answers=answers)
        return seal(Identity(one.name, two.private_key), federation.site("site-4").roster, reply, {OPERATOR: head}, answers)

    federation.tampered["site-4"] = posing
    with federation.stages() as stages:
        trained(stages, 1)
    entry = rounds(federation.run_dir)["final/1"]
    assert entry.value["dropped"] == dict.fromkeys(("site-2", "site-3", "site-4"), "not believed")
    assert not entry.value["opened"]


def flipped(parcel: Parcel) -> Parcel:
    content = parcel.content.copy()
    content[len(content) // 2] ^= 1
    return Parcel(parcel.headers, content)


@pytest.mark.parametrize("kind", ["flipped", "cut", "no header", "replayed", "reflected", "anothers content", "older request"])
def test_what_a_relay_alters_repeats_or_swaps_is_lost_and_stops_nobody(federation: Federation, kind: str) -> None:
    earlier: dict[str, Parcel] = {}

    def watched(name: str) -> Callable[[str, Parcel], Parcel]:
        def tampering(route: str, parcel: Parcel) -> Parcel:
            if route != "train":
                return parcel
            old, other = earlier.get(name), earlier.get("site-1")
            earlier[name] = parcel
            if name == "site-1" or old is None or other is None:
                return parcel
            match kind:
                case "flipped":
                    return flipped(parcel)
                case "cut":
                    return Parcel(parcel.headers, parcel.content[:-1])
                case "no header":
                    return Parcel({}, parcel.content)
                case "replayed":
                    return old
                case "reflected":
                    return federation.last_request
                case "anothers content":
                    return Parcel(parcel.headers, other.content)
            return Parcel(old.headers, parcel.content)

        return tampering

    federation.tampered |= {name: watched(name) for name in ("site-1", "site-2")}
    with federation.stages() as stages:
        trained(stages, 2, trained(stages, 1))
    one, two = rounds(federation.run_dir).values()
    assert one.value["dropped"] == {}
    assert (two.value["opened"], two.value["dropped"]) == (True, {"site-2": "not believed"})


def test_a_request_that_the_relay_alters_is_not_answered_and_costs_nothing(tmp_path: Path) -> None:
    class Tampering(Federation):
        def _handled(self, route: str, address: int, request: Parcel) -> Parcel | None:
            if (route, address) == ("train", 1):
                return self.sites[address].receive(flipped(request))
            return super()._handled(route, address, request)

    federation = Tampering(tmp_path / "run", brief())
    with federation.stages() as stages:
        trained(stages, 1)
    # its failure names the parcel that arrived, which is not the one that was asked
    assert rounds(tmp_path / "run")["final/1"].value["dropped"] == {"site-2": "not believed"}
    assert not federation.site("site-2").ledger.rows()


def test_relay_learns_no_plaintext(federation: Federation) -> None:
    federation.run()
    needles = {*(site.encode() for site in SITES), b"operator", b"pixels", b"request_sha256", b'"kind"', b"run/final"}
    needles |= {one.signature[:16] for one in federation.wire}
    needles |= {array.tobytes()[at : at + 16] for one in federation.wire for array in one.arrays.values() for at in (0, 16, 64)}
    needles = {one for one in needles if len(one) >= 6 and len(set(one)) > 2}
    carried = [part for one in federation.parcels for part in (one.content.tobytes(), *one.headers.values())]
    assert len(carried) > 100
    assert not [needle for needle in needles for part in carried if needle in part]
    plain = b"".join(
        part
        for one in federation.wire
        for part in (one.sender.encode(), one.body, one.signature, *(array.tobytes() for array in one.arrays.values()))
    )
    assert all(needle in plain for needle in needles)  # the scan would find them
    keys = {key for one in federation.parcels for key in one.headers}
    assert len(keys) == 6
    assert not any(site in key for site in SITES for key in keys)


# ---- who waits for a person


def undecided(federation: Federation, name: str, times: int) -> None:
    """A site where a person approves after the hello was asked ``times`` times."""
    site, asked = federation.site(name), 0

    def fault(route: str, reply: Envelope) -> Envelope:
        nonlocal asked
        asked += route == "query.hello"
        if route != "query.hello" or asked > times:
            return reply
        return signed(site.identity, Pending(request_sha256=json.loads(reply.body)["request_sha256"]))

    federation.faults[name] = fault


def hellos(federation: Federation) -> list[str]:
    """Which sites were asked to join, in order."""
    return [site for request_id, site, _ in federation.echoed if request_id == "run/hello"]


def test_a_site_that_waits_for_a_person_is_asked_again_until_it_joins(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "urna.server.exchange")
    undecided(federation, "site-2", times=3)
    undecided(federation, "site-4", times=1)
    federation.run()
    assert hellos(federation) == [*SITES, "site-2", "site-4", "site-2", "site-2"]
    requests = {one.sha256 for one in federation.wire if read_kind(one) == "hello" and one.sender == OPERATOR}
    assert len(requests) == 1  # the very same bytes
    assert federation.slept_seconds == 3 * APPROVAL_POLL_SECONDS
    assert set(value(federation.run_dir, "hello")["members"]) == set(SITES)  # type: ignore[call-overload]
    shown = [entry.value["sites"] for entry in entries(federation.run_dir) if entry.kind == "waiting"]
    assert shown == [["site-2", "site-4"], ["site-2"], []]
    lines = [line for line in caplog.messages if line.startswith("waiting for approval at")]
    assert lines == [f"waiting for approval at {who}" for who in ("site-2, site-4", "site-2", "no site any more")]


def read_kind(envelope: Envelope) -> str:
    return str(json.loads(envelope.body)["kind"])


def test_who_has_not_approved_when_patience_ends_takes_no_part(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief(approval_timeout_seconds=12.0))
    undecided(federation, "site-2", times=100)
    federation.run()
    assert hellos(federation) == [*SITES, *["site-2"] * 3]  # after 5, 10 and 12 seconds
    assert federation.slept_seconds == 12.0
    hello = value(tmp_path / "run", "hello")
    assert hello["others"] == {"site-2": "waits for approval at the site"}
    assert "site-2" not in hello["members"]  # type: ignore[operator]
    assert all("site-2" not in entry.value["cohort"] for entry in rounds(tmp_path / "run").values())


def test_too_few_approvals_are_named_and_without_patience_nobody_is_asked_twice(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "run", brief(approval_timeout_seconds=0))
    for name in SITES[:3]:
        undecided(federation, name, times=100)
    with pytest.raises(RoundError, match=r"needs 3 sites, found 2: site-1 waits for approval at the site; site-2 waits"):
        federation.run()
    assert hellos(federation) == list(SITES)
    assert federation.slept_seconds == 0


def test_a_resumed_campaign_waits_for_nobody_once_it_had_begun(tmp_path: Path) -> None:
    """And a site that approves after the campaign began is told so."""
    first = Federation(tmp_path / "run", brief(approval_timeout_seconds=5.0))
    undecided(first, "site-2", times=100)
    with first.stages():
        pass
    for site in first.sites:
        site.ledger.close()
    second = Federation(tmp_path / "run", brief(approval_timeout_seconds=5.0))
    undecided(second, "site-2", times=100)
    second.run()
    assert (hellos(second), second.slept_seconds) == (list(SITES), 0)
    assert "finished" in {entry.kind for entry in entries(tmp_path / "run")}


@pytest.mark.parametrize("what", ["lost", "forged"])
def test_a_relay_cannot_end_somebodys_waiting(federation: Federation, what: str) -> None:
    """The second answer of site 2 is lost, or altered; it is asked again, and joins with the third."""
    undecided(federation, "site-2", times=1)
    heard = 0

    def tampering(route: str, parcel: Parcel) -> Parcel | None:
        nonlocal heard
        heard += route == "query.hello"
        if route != "query.hello" or heard != 2:
            return parcel
        return None if what == "lost" else flipped(parcel)

    federation.tampered["site-2"] = tampering
    with federation.stages() as stages:
        assert stages.rounds.member_names == SITES
    assert hellos(federation) == [*SITES, "site-2", "site-2"]


def test_a_site_that_refuses_while_others_wait_is_never_asked_again(federation: Federation) -> None:
    site = federation.site("site-5")

    def paused(route: str, reply: Envelope) -> Envelope:
        if route != "query.hello":
            return reply
        asked = json.loads(reply.body)["request_sha256"]
        return signed(site.identity, Failure(request_sha256=asked, code=FailureCode.PAUSED))

    federation.faults["site-5"] = paused
    undecided(federation, "site-2", times=2)
    federation.run()
    assert hellos(federation) == [*SITES, "site-2", "site-2"]
    assert value(federation.run_dir, "hello")["others"] == {"site-5": "failed: paused"}


def test_a_request_reads_the_same_through_the_seal(federation: Federation) -> None:
    """What the tests of other files look at: `wire` holds what was signed, in the order in which it crossed."""
    federation.run()
    asked = [one for one in federation.wire if one.sender == OPERATOR]
    assert {read_request(one.body).campaign for one in asked} == {"run"}
    assert len(federation.wire) == len(federation.parcels)
