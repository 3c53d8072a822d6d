"""One whole campaign over records with canary ids: nothing that crosses a boundary holds one, or a site's secret."""

import base64
from collections.abc import Iterator

import pytest

from tests.canaries import campaign_of, disguises, found_in, outside, secrets_of
from tests.client.clinic import CANARY
from tests.simulator import Federation
from urna.server.journal import Journal


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with campaign_of(tmp_path_factory.mktemp("canary") / "run") as federation:
        yield federation


def test_the_campaign_finished_and_the_canaries_were_there(campaign: Federation) -> None:
    journal = Journal.read(campaign.run_dir)
    assert journal.find("finished") is not None
    journal.close()
    # requests and replies of 3 sites: hello, ballot, 2 rounds and 2 counts of two exchanges each, close
    assert len(campaign.wire) == 2 * 3 * (1 + 5 * 2 + 1)
    for site in campaign.sites:
        assert CANARY in (site.folder / "records.csv").read_text()
        assert all(one.startswith(CANARY) for one in site.bench(site.config.dataset[0]).split(0.2)[0].ids)


def test_canary_string_nowhere(campaign: Federation) -> None:
    forbidden = secrets_of(campaign)
    wire = [part for one in campaign.wire for part in (one.body, one.to_bytes(), *(a.tobytes() for a in one.arrays.values()))]
    files = {one.name: one.read_bytes() for one in outside(campaign)}
    assert "journal.sqlite" in files
    for content in [*wire, *files.values()]:
        assert not found_in(forbidden, content)


def test_ledger_and_local_log_hold_no_record(campaign: Federation) -> None:
    forms = disguises(CANARY.encode())
    for site in campaign.sites:
        for name in ("ledger.sqlite", "site.log"):
            assert not found_in(forms, (site.folder / name).read_bytes())


def test_the_scan_would_find_a_canary(campaign: Federation) -> None:
    content = base64.b64encode(b"{..}" + f"{CANARY}-12".encode() + b"...")
    assert found_in(secrets_of(campaign), content)


def test_every_site_stays_within_the_plan(campaign: Federation) -> None:
    journal = Journal.read(campaign.run_dir)
    statements = journal.find("statements")
    journal.close()
    assert statements is not None
    assert len(statements.value) == 3
    assert all(0 < one["epsilon"] <= 3.0 for one in statements.value.values())
