"""What only the site decides: a person's yes, a pause, an end, whose budget it is, and with whom."""

import csv
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.clinic import CANARY, NAME, NUM_RECORDS, Clinic, a_plan, five_sites, write_config, write_records
from urna.client.control import DenyReason
from urna.client.desk import LedgerDesk
from urna.client.ledger_rows import CampaignRow
from urna.client.site import Site, open_site
from urna.protocol.errors import ControlError, FailureCode, LedgerError
from urna.protocol.messages import AnyReply, Failure, HelloReply, Masked, Pending, Refusal, Statement, Unmasked

ledger_module: Any = importlib.import_module("urna.client.ledger")
work_module: Any = importlib.import_module("urna.client.work")  # for what it imports, to be interrupted


def code(reply: AnyReply) -> FailureCode:
    assert isinstance(reply, Failure), reply
    return reply.code


def reasons(reply: AnyReply) -> str:
    assert isinstance(reply, Refusal), reply
    return "; ".join(reply.reasons)


def spent(site: Site) -> int:
    return sum(row.count for row in site.ledger.rows())


def desk_of(clinic: Clinic) -> LedgerDesk:
    return LedgerDesk(NAME, clinic.site.config.policy, clinic.site.roster, clinic.site.ledger)


@pytest.fixture
def careful(artefacts: None, tmp_path: Path) -> Clinic:  # noqa: ARG001 - built, not used
    """A site where a person must approve each campaign."""
    return Clinic.build(tmp_path / "site-1", approval_required=True)


# ---- a person's yes


def test_a_campaign_waits_for_a_person_and_joins_by_the_very_same_request(careful: Clinic) -> None:
    request = careful.hello_request()
    assert isinstance(careful.ask(request), Pending)
    assert isinstance(careful.ask(request), Pending)
    assert careful.site.ledger.campaign("run-1") is None
    status = desk_of(careful).status()
    assert [(one.name, one.state, one.asked.epsilon) for one in status.campaigns] == [("run-1", "waiting", 3.0)]
    desk_of(careful).approve("run-1", careful.plan.sha256, "anna")
    assert desk_of(careful).status().campaigns[0].state == "approved"
    assert isinstance(careful.ask(request), HelloReply)
    assert desk_of(careful).status().campaigns[0].state == "open"


def test_a_yes_holds_for_the_plan_that_was_looked_at_and_no_other(careful: Clinic) -> None:
    """The operator swaps the plan between the look and the yes, or after it."""
    careful.ask(careful.hello_request())
    looked_at = careful.plan.sha256
    careful.plan = a_plan(privacy={"epsilon": 3.5})
    assert isinstance(careful.ask(careful.hello_request()), Pending)
    with pytest.raises(ControlError, match="run-1 now asks with another plan"):
        desk_of(careful).approve("run-1", looked_at, "anna")
    desk_of(careful).approve("run-1", careful.plan.sha256, "anna")
    careful.plan = a_plan(privacy={"epsilon": 3.9})
    assert isinstance(careful.ask(careful.hello_request()), Pending)


def test_a_yes_survives_a_restart_and_a_no_is_a_refusal(careful: Clinic) -> None:
    careful.ask(careful.hello_request())
    desk_of(careful).approve("run-1", careful.plan.sha256, "anna")
    again = careful.restarted()
    assert isinstance(again.ask(again.hello_request()), HelloReply)
    desk_of(careful).deny("run-1", DenyReason.BUDGET, "anna")
    assert reasons(careful.ask(careful.hello_request())) == "approval: a person at this site said no"


def test_a_campaign_over_the_policy_is_refused_and_never_bothers_a_person(careful: Clinic) -> None:
    careful.plan = a_plan(privacy={"epsilon": 5.0})
    assert "budget" in reasons(careful.ask(careful.hello_request()))
    assert desk_of(careful).status().campaigns == ()


def test_two_plans_that_are_delivered_in_turn_do_not_fill_the_disk(careful: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a relay that recorded both."""
    monkeypatch.setattr(ledger_module, "MAX_PLANS_OF_A_CAMPAIGN", 4)
    requests = [careful.hello_request()]
    careful.plan = a_plan(privacy={"epsilon": 3.5})
    requests.append(careful.hello_request())
    for _ in range(5):
        for request in requests:
            assert isinstance(careful.ask(request), Pending)
    assert careful.site.ledger.head()[0] == 1 + 1 + 4  # created, the data set, and these


def test_nobody_can_say_yes_to_a_campaign_that_never_asked(careful: Clinic) -> None:
    with pytest.raises(ControlError, match="found none called 'run-9'"):
        desk_of(careful).approve("run-9", "0" * 64, "anna")


def test_a_no_during_a_campaign_ends_its_releases(clinic: Clinic) -> None:
    first = clinic.ballot("ballot/1")
    assert isinstance(clinic.ask(first), Masked)
    desk_of(clinic).deny("run-1", DenyReason.PURPOSE, "anna")
    assert reasons(clinic.ask(clinic.ballot("ballot/2"))) == "approval: a person at this site said no"
    assert isinstance(clinic.ask(first), Masked)  # the bytes that had left are no new release
    assert spent(clinic.site) == 1


# ---- a pause, and the end


def test_a_pause_stops_every_release_and_resume_lets_it_go_on(clinic: Clinic) -> None:
    requests = (clinic.ballot(), clinic.train(), clinic.evaluate())
    desk_of(clinic).pause("anna")
    assert [code(clinic.ask(one)) for one in requests] == [FailureCode.PAUSED] * 3
    assert code(clinic.ask(requests[0], clinic.reopened().site)) == FailureCode.PAUSED
    assert spent(clinic.site) == 0
    desk_of(clinic).resume("anna")
    assert isinstance(clinic.ask(requests[0]), Masked)


def test_a_paused_site_joins_nothing_and_says_that_it_waits(clinic: Clinic) -> None:
    desk_of(clinic).pause("anna")
    assert isinstance(clinic.ask(clinic.hello_request()), Pending)
    desk_of(clinic).resume("anna")
    assert isinstance(clinic.ask(clinic.hello_request()), HelloReply)


def test_a_round_that_was_uploaded_before_a_pause_can_be_opened(clinic: Clinic) -> None:
    """Nothing new of this site's leaves by it, and the others' round is not lost."""
    one = clinic.uploaded(clinic.ballot())
    desk_of(clinic).pause("anna")
    assert isinstance(clinic.ask(clinic.unmask(one)), Unmasked)


def test_nothing_is_released_after_a_campaign_was_closed(clinic: Clinic) -> None:
    before = clinic.ballot("ballot/1")
    clinic.ask(before)
    assert isinstance(clinic.ask(clinic.close()), Statement)
    assert code(clinic.ask(clinic.ballot("ballot/2"))) == FailureCode.STALE
    assert isinstance(clinic.ask(before), Masked)
    assert isinstance(clinic.ask(clinic.close()), Statement)
    assert spent(clinic.site) == 1
    assert desk_of(clinic).status().campaigns[0].state == "closed"


# ---- named peers


def test_a_sum_without_a_named_peer_is_refused(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    plan = a_plan(federation={"num_records": 4 * NUM_RECORDS})
    clinic = Clinic.build(tmp_path / "site-1", plan, num_peers=3, required_peers=["site-3"])
    everyone = clinic.cohort()
    without = tuple(member for member in everyone if member.site != "site-3")
    assert reasons(clinic.ask(clinic.ballot(cohort=without))) == "peers: this site releases only together with site-3"
    assert spent(clinic.site) == 0
    assert isinstance(clinic.ask(clinic.ballot("ballot/2", cohort=everyone)), Masked)


def test_an_operator_cannot_drop_the_named_peer_afterwards(artefacts: None, tmp_path: Path) -> None:  # noqa: ARG001
    """It was in the cohort, and is left out of the survivors."""
    five = five_sites(tmp_path / "site-1", {"required_peers": ["site-3"]})
    one = five.uploaded(five.ballot())
    assert "only together with site-3" in reasons(five.ask(five.unmask(one, one.without("site-3"))))
    assert isinstance(five.ask(five.unmask(one, one.all)), Unmasked)


def test_a_confusion_matrix_that_the_plan_does_not_ask_for_is_refused(clinic: Clinic) -> None:
    """The policy was asked about the plan: what it says, not what a later request says, may leave."""
    clinic.plan = a_plan(evaluation={"confusion": False})
    assert code(clinic.ask(clinic.evaluate(detail=True))) == FailureCode.BAD_REQUEST
    assert isinstance(clinic.ask(clinic.evaluate("evaluation/2", detail=False)), Masked)


# ---- whose budget it is


def rewritten(clinic: Clinic, rows: list[list[str]], dataset: str = "digits") -> Site:
    """The same site with other records, or other names of them, in a new process."""
    header = (clinic.folder / "records.csv").read_text().splitlines()[0].split(",")
    with (clinic.folder / "copy.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    toml = clinic.folder / "site.toml"
    text = toml.read_text().replace("records.csv", "copy.csv").replace('name = "digits"', f"name = {json.dumps(dataset)}")
    toml.write_text(text)
    return open_site(clinic.folder)


def records_of(clinic: Clinic) -> list[list[str]]:
    with (clinic.folder / "records.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def spent_most(artefacts: None, tmp_path: Path) -> Clinic:  # noqa: ARG001 - built, not used
    """A site whose records have epsilon 5 for ever, with less than 4 of it left."""
    clinic = Clinic.build(tmp_path / "site-1", a_plan(privacy={"epsilon": 4.0}), epsilon_total=5.0)
    for attempt in (1, 2):
        assert isinstance(clinic.ask(clinic.ballot(f"ballot/{attempt}", noise_multiplier=2.0)), Masked)
    return clinic


Rows = list[list[str]]
COPIES: dict[str, Callable[[Rows], Rows]] = {
    "the same file under another name": lambda rows: rows,
    "in another order": lambda rows: rows[::-1],
    "new ids": lambda rows: [[f"x-{at}", *row[1:]] for at, row in enumerate(rows)],
    "a part": lambda rows: rows[:10],
    "a part among others": lambda rows: [*rows[:5], *([f"y-{at}", "0", *[str(at % 16)] * 64] for at in range(50))],
    "other values of the same persons": lambda rows: [[*row[:2], *["3"] * 64] for row in rows],
}


@pytest.mark.parametrize("how", COPIES)
def test_renamed_dataset_same_budget(spent_most: Clinic, how: str) -> None:
    """The site's data officer calls the records another study: renamed, copied, cut, numbered anew."""
    other = rewritten(spent_most, COPIES[how](records_of(spent_most)), dataset="another-study")
    spent_most.campaign, spent_most.own = "run-2", None
    refusal = reasons(spent_most.ask(spent_most.hello_request(), other))
    assert "budget: the plan asks epsilon 4" in refusal
    assert "these records have less left" in refusal


def test_records_that_were_never_here_have_a_budget_of_their_own(spent_most: Clinic) -> None:
    """The control of the test above."""
    write_records(spent_most.folder / "records.csv", seed=9)
    other = rewritten(spent_most, [[row[0].replace(CANARY, "others"), *row[1:]] for row in records_of(spent_most)])
    spent_most.campaign, spent_most.own = "run-2", None
    assert isinstance(spent_most.ask(spent_most.hello_request(), other), HelloReply)


def second_node(clinic: Clinic) -> Clinic:
    """Another node of the same institution: its own folder and name, the same records and the same vault."""
    total = clinic.site.config.policy.epsilon_total
    other = Clinic.build(clinic.folder.with_name("node-2"), epsilon_total=total)
    toml = other.folder / "site.toml"
    toml.write_text(f'{toml.read_text()}[vault]\nfolder = "../{clinic.folder.name}"\n')
    shutil.copy(clinic.folder / "records.csv", other.folder / "renamed.csv")
    toml.write_text(toml.read_text().replace("records.csv", "renamed.csv"))
    return Clinic(other.folder, open_site(other.folder), other.operator, other.peers, clinic.plan, "run-2")


def test_two_nodes_same_data_share_budget(spent_most: Clinic) -> None:
    other = second_node(spent_most)
    assert "these records have less left" in reasons(other.ask(other.hello_request()))
    assert spent(other.site) == spent(spent_most.site) == 2


def test_two_nodes_of_one_vault_cannot_both_be_in_a_campaign(clinic: Clinic) -> None:
    """The same persons would be counted as two sites of a cohort."""
    clinic.hello()
    other = second_node(clinic)
    other.campaign = clinic.campaign
    assert code(other.ask(other.hello_request())) == FailureCode.REPLAY_CHANGED
    kept = clinic.site.ledger.campaign(clinic.campaign)
    assert isinstance(kept, CampaignRow)
    assert kept.site == clinic.site.identity.public_key_hex


def test_two_nodes_of_one_vault_run_side_by_side_and_one_node_only_once(clinic: Clinic) -> None:
    other = second_node(clinic)
    shared = clinic.folder / "site.toml"
    shared.write_text(f'{shared.read_text()}[vault]\nfolder = "../{clinic.folder.name}"\n')  # both say so
    first, second, again = open_site(clinic.folder), other.site, open_site(clinic.folder)
    first.hold()
    second.hold()
    with pytest.raises(LedgerError, match="one process at a time may spend"):
        again.hold()
    clinic.site = first
    assert isinstance(clinic.ask(clinic.ballot()), Masked)
    assert isinstance(other.ask(other.ballot()), Masked)
    assert spent(first) == spent(second) == 2


# ---- between the decision and the release


def at_work(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """While the next release is computed, something happens."""
    real = work_module.noisy_sum

    def noisy_sum(*args: Any, **kwargs: Any) -> Any:
        act()
        return real(*args, **kwargs)

    monkeypatch.setattr(work_module, "noisy_sum", noisy_sum)


def test_a_pause_stops_a_release_that_is_being_computed(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    request = clinic.ballot()
    at_work(monkeypatch, lambda: desk_of(clinic).pause("anna"))
    assert code(clinic.ask(request)) == FailureCode.PAUSED
    monkeypatch.undo()
    desk_of(clinic).resume("anna")
    assert isinstance(clinic.ask(request), Masked)
    assert spent(clinic.site) == 1


def test_a_no_stops_a_release_that_is_being_computed(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    request = clinic.ballot()
    at_work(monkeypatch, lambda: desk_of(clinic).deny("run-1", DenyReason.TIME, "anna"))
    assert code(clinic.ask(request)) == FailureCode.STALE
    assert "was denied here" in clinic.log()


def test_a_reservation_is_never_answered_from_other_records(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved, crashed; then the file is exchanged for one that nothing was charged to."""
    request = clinic.ballot()

    def crash() -> None:
        raise KeyboardInterrupt

    at_work(monkeypatch, crash)
    with pytest.raises(KeyboardInterrupt):
        clinic.ask(request)
    monkeypatch.undo()
    write_records(clinic.folder / "records.csv", seed=9)
    other = rewritten(clinic, [[row[0].replace(CANARY, "others"), *row[1:]] for row in records_of(clinic)])
    assert code(clinic.ask(request, other)) == FailureCode.DATA
    assert "expected the records that run-1/ballot/1 was charged to, found others" in clinic.log()


def test_a_policy_that_was_made_stricter_binds_campaigns_that_are_open(clinic: Clinic) -> None:
    clinic.ask(clinic.ballot("ballot/1"))
    write_config(clinic.folder, candidates=["pixels"])
    stricter = clinic.reopened()
    assert reasons(stricter.ask(stricter.ballot("ballot/2"))) == "candidates: not allowed at this site: autoencoder"


def test_a_request_that_is_delivered_again_and_again_writes_nothing(clinic: Clinic) -> None:
    """By a relay that wants to fill a site's disk."""
    clinic.hello()
    requests = (clinic.ballot(), clinic.abort(f"{clinic.campaign}/ballot/9"), clinic.hello_request())
    for request in requests:
        clinic.ask(request)
    head = clinic.site.ledger.head()
    for _ in range(3):
        for request in requests:
            clinic.ask(request)
    assert clinic.site.ledger.head() == head
