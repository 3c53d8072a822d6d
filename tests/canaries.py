"""Strings that are planted at a site, in every form in which they could leave, and a campaign over records that hold them."""

import base64
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client.clinic import CANARY
from tests.simulator import Federation
from urna import embedded
from urna.client.config import DATA_KEY_FILE
from urna.models.pretrain import pretrain
from urna.protocol.identity import IDENTITY_FILE, OPERATOR_KEY_FILE, SITES_DIR
from urna.protocol.plan import Plan

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


@contextmanager
def campaign_of(run_dir: Path, prepare: Callable[[Path], None] | None = None, **federation: object) -> Iterator[Federation]:
    """A finished campaign of three sites whose records' ids are canaries; ``prepare`` changes each site's folder before."""
    for name in ("pixels", "autoencoder"):
        pretrain(name)
    with pytest.MonkeyPatch.context() as patch:
        digits = embedded.load_dataset("digits")
        ids = tuple(f"{CANARY}-{at}" for at in range(len(digits.ids)))
        patch.setattr(embedded, "load_dataset", lambda _: dataclasses.replace(digits, ids=ids))
        if prepare is not None:
            real = embedded.prepare

            def prepared(folder: Path, plan: Plan) -> None:
                real(folder, plan)
                for site in sorted((folder / SITES_DIR).iterdir()):
                    prepare(site)

            patch.setattr("tests.simulator.prepare", prepared)
        one = Federation(run_dir, Plan.model_validate(PLAN), **federation)  # type: ignore[arg-type]
        one.run()
        yield one


def disguises(secret: bytes) -> list[bytes]:
    """A secret as it is, in hex, reversed, and in each of base64's three alignments (its middle, which no neighbour touches).

    Texts also in capitals and small letters, and as UTF-16.
    """
    aligned = [base64.b64encode(bytes(shift) + secret)[4:-4] for shift in range(3)]
    safe = [base64.urlsafe_b64encode(bytes(shift) + secret)[4:-4] for shift in range(3)]
    forms = [secret, secret[::-1], secret.hex().encode(), secret.hex().upper().encode(), *aligned, *safe]
    if secret.isascii():
        text = secret.decode()
        forms += [secret.upper(), secret.lower(), text.encode("utf-16-le"), text.encode("utf-16-be")]
    return list(dict.fromkeys(forms))


def found_in(forms: Iterable[bytes], content: bytes) -> list[bytes]:
    """Which of them are there."""
    return [form for form in forms if form in content]


def secrets_of(federation: Federation) -> list[bytes]:
    """Canary, keys and a record of every site, in every form."""
    found = [CANARY.encode()]
    for folder in (federation.run_dir / SITES_DIR).iterdir():
        found += [(folder / name).read_bytes() for name in (DATA_KEY_FILE, IDENTITY_FILE)]
    for site in federation.sites:
        kept = site.ledger.campaign(federation.run_dir.name)
        assert kept is not None
        found += [kept.round_key, site.bench(site.config.dataset[0]).split(0.2)[0].images[0].tobytes()]
    return [form for secret in found for form in disguises(secret)]


def outside(federation: Federation) -> list[Path]:
    """Every file of the run but the sites' own folders and the operator's key."""
    files = [one for one in federation.run_dir.rglob("*") if one.is_file() and one.name != OPERATOR_KEY_FILE]
    return [one for one in files if SITES_DIR not in one.relative_to(federation.run_dir).parts]
