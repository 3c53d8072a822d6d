"""What people see and decide: from any thread, at any time, and never half of a transaction."""

import threading

import pytest

from tests.client.clinic import NAME, Clinic, a_plan
from urna.client.control import DenyReason
from urna.client.desk import LedgerDesk
from urna.client.ledger_rows import Waiting
from urna.privacy.accounting import epsilon_of_rows
from urna.protocol.errors import ControlError


@pytest.fixture
def desk(clinic: Clinic) -> LedgerDesk:
    return LedgerDesk(NAME, clinic.site.config.policy, clinic.site.roster, clinic.site.ledger)


def test_the_status_says_what_was_spent_and_on_what(clinic: Clinic, desk: LedgerDesk) -> None:
    assert desk.status().epsilon_spent == 0
    clinic.ask(clinic.ballot())
    clinic.site.saw_bundle("ab" * 32, 7)
    clinic.site.saw_bundle("ab" * 32, 8)
    status = desk.status()
    rows = clinic.site.ledger.rows()
    policy = clinic.site.config.policy
    assert status.epsilon_spent == epsilon_of_rows(rows, policy.delta) > 0
    assert (status.epsilon_total, status.delta) == (policy.epsilon_total, policy.delta)
    assert status.bundles_seen == ("ab" * 32,)
    (campaign,) = status.campaigns
    assert (campaign.name, campaign.state, campaign.stage) == ("run-1", "open", "ballot")
    assert campaign.epsilon_spent == epsilon_of_rows(rows, clinic.plan.privacy.delta)
    assert campaign.last_activity > 1.7e9
    assert campaign.plan_sha256 == clinic.plan.sha256


def test_campaigns_are_listed_the_newest_first_and_the_rest_is_counted(clinic: Clinic, desk: LedgerDesk) -> None:
    text = a_plan().model_dump_json()
    with clinic.site.ledger.exclusive():
        for number in range(203):
            clinic.site.ledger.wait(Waiting(f"run-{number}", "0" * 64, text))
    status = desk.status()
    assert [one.name for one in status.campaigns[:2]] == ["run-202", "run-201"]
    assert len(status.campaigns) == 200
    assert status.num_older_campaigns == 3


def test_a_look_during_a_transaction_waits_for_its_end(clinic: Clinic, desk: LedgerDesk) -> None:
    """What is not on disk yet may never be: nobody is told of it."""
    seen: list[bool] = []
    look = threading.Thread(target=lambda: seen.append(desk.status().paused))
    with clinic.site.ledger.exclusive():
        clinic.site.ledger.note("pause", NAME, by="anna")
        look.start()
        look.join(0.2)
        assert seen == []
        clinic.site.ledger.note("resume", NAME, by="anna")
    look.join(10)
    assert seen == [False]


def test_a_decision_from_another_thread_is_a_transaction_of_its_own(clinic: Clinic, desk: LedgerDesk) -> None:
    """Otherwise the runner's failed release would take a person's pause back."""
    pause = threading.Thread(target=lambda: desk.pause("anna"))

    def fail() -> None:
        with clinic.site.ledger.exclusive():
            pause.start()
            raise KeyError("the runner's release failed")

    with pytest.raises(KeyError):
        fail()
    pause.join(10)
    assert desk.status().paused


def test_a_denied_campaign_may_be_approved_after_all(clinic: Clinic, desk: LedgerDesk) -> None:
    clinic.hello()
    desk.deny("run-1", DenyReason.TIME, "anna")
    assert desk.status().campaigns[0].state == "denied"
    desk.approve("run-1", clinic.plan.sha256, "anna")
    assert desk.status().campaigns[0].state == "open"


@pytest.mark.parametrize("decide", ["approve", "deny"])
def test_an_unknown_campaign_is_named(desk: LedgerDesk, decide: str) -> None:
    def act() -> None:
        if decide == "approve":
            desk.approve("run-7", "0" * 64, "anna")
        else:
            desk.deny("run-7", DenyReason.BUDGET, "anna")

    with pytest.raises(ControlError, match="found none called 'run-7': see the status"):
        act()
