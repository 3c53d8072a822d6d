"""One whole campaign over records with canary ids: nothing that crosses a boundary holds one, or a site's secret."""

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.clinic import CANARY
from tests.simulator import Federation
from urna import embedded
from urna.client.config import DATA_KEY_FILE
from urna.models.pretrain import pretrain
from urna.protocol.identity import IDENTITY_FILE, OPERATOR_KEY_FILE, SITES_DIR
from urna.protocol.plan import Plan
from urna.server.journal import Journal

PLAN = {
    "name": "digits",
    "task": {"num_classes": 10},
    "candidates": [{"name": "pixels"}, {"name": "autoencoder"}],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 1797, "virtual": {"dataset": "digits", "num_sites": 3}},
    "ballot": {"if_undecided": "prior"},
    "final": {"num_rounds": 2, "sample_rate": 0.25, "learning_rate": 0.05},
    "evaluation": {"num_curve_points": 1},
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    for name in ("pixels", "autoencoder"):
        pretrain(name)
    patch = pytest.MonkeyPatch()
    digits = embedded.load_dataset("digits")
    ids = tuple(f"{CANARY}-{at}" for at in range(len(digits.ids)))
    patch.setattr(embedded, "load_dataset", lambda _: dataclasses.replace(digits, ids=ids))
    federation = Federation(tmp_path_factory.mktemp("canary") / "run", Plan.model_validate(PLAN))
    federation.run()
    yield federation
    patch.undo()


def disguises(secret: bytes) -> list[bytes]:
    """A secret as it is, in hex, and in each of base64's three alignments (its middle, which no neighbour touches)."""
    aligned = [base64.b64encode(bytes(shift) + secret)[4:-4] for shift in range(3)]
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), *aligned]


def secrets(federation: Federation) -> list[bytes]:
    found = [CANARY.encode()]
    for folder in (federation.run_dir / SITES_DIR).iterdir():
        found += [(folder / name).read_bytes() for name in (DATA_KEY_FILE, IDENTITY_FILE)]
    for site in federation.sites:
        kept = site.ledger.campaign(federation.run_dir.name)
        assert kept is not None
        found += [kept.round_key, site.split_records(0.2)[0].images[0].tobytes()]
    return [form for secret in found for form in disguises(secret)]


def outside(federation: Federation) -> list[Path]:
    """Every file of the run but the sites' own folders and the operator's key."""
    files = [one for one in federation.run_dir.rglob("*") if one.is_file() and one.name != OPERATOR_KEY_FILE]
    return [one for one in files if SITES_DIR not in one.relative_to(federation.run_dir).parts]


def test_the_campaign_finished_and_the_canaries_were_there(campaign: Federation) -> None:
    journal = Journal.read(campaign.run_dir)
    assert journal.find("finished") is not None
    journal.close()
    # requests and replies of 3 sites: hello, ballot, 2 rounds and 2 counts of two exchanges each, close
    assert len(campaign.wire) == 2 * 3 * (1 + 5 * 2 + 1)
    for site in campaign.sites:
        assert CANARY in (site.folder / "records.csv").read_text()
        assert all(one.startswith(CANARY) for one in site.split_records(0.2)[0].ids)


def test_canary_string_nowhere(campaign: Federation) -> None:
    forbidden = secrets(campaign)
    wire = [part for one in campaign.wire for part in (one.body, one.to_bytes(), *(a.tobytes() for a in one.arrays.values()))]
    files = {one.name: one.read_bytes() for one in outside(campaign)}
    assert "journal.sqlite" in files
    for content in [*wire, *files.values()]:
        assert not [form for form in forbidden if form in content]


def test_ledger_and_local_log_hold_no_record(campaign: Federation) -> None:
    forms = disguises(CANARY.encode())
    for site in campaign.sites:
        for name in ("ledger.sqlite", "site.log"):
            assert not [form for form in forms if form in (site.folder / name).read_bytes()]


def test_the_scan_would_find_a_canary(campaign: Federation) -> None:
    content = base64.b64encode(b"{..}" + f"{CANARY}-12".encode() + b"...")
    assert [form for form in secrets(campaign) if form in content]


def test_every_site_stays_within_the_plan(campaign: Federation) -> None:
    journal = Journal.read(campaign.run_dir)
    statements = journal.find("statements")
    journal.close()
    assert statements is not None
    assert len(statements.value) == 3
    assert all(0 < one["epsilon"] <= 3.0 for one in statements.value.values())
