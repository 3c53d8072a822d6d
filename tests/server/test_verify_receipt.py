import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.signed_receipts import (
    OTHER,
    PLAN,
    RELEASES,
    ROSTER,
    SITE,
    STEP,
    a_receipt,
    a_signed,
    altered,
    left,
    rows_of,
)
from tests.simulator import Federation, small
from urna.client.receipts import write_receipts
from urna.privacy.accounting import epsilon_of_rows, gaussian, subsampled_gaussian
from urna.protocol.errors import RunError
from urna.protocol.identity import IDENTITY_FILE, SITES_DIR, Identity, Roster, load_identity
from urna.protocol.messages import Statement, signed
from urna.protocol.receipt import Left, Receipt, SignedReceipt, plan_hash, read_receipt, sign_receipt
from urna.server import receipt_check
from urna.server.receipt_check import Checked, Finding, check_file, check_receipt
from urna.server.receipt_words import lines_of


def found(receipt: SignedReceipt, roster: Roster = ROSTER) -> list[Finding]:
    return [*check_receipt(receipt, roster)]


def wrong(receipt: SignedReceipt) -> str:
    return "\n".join(one.text for one in found(receipt) if one.kind == "wrong")


def notes(receipt: SignedReceipt) -> str:
    return "\n".join(one.text for one in found(receipt) if one.kind == "note")


def test_an_honest_receipt_is_good() -> None:
    assert found(a_signed()) == []
    assert found(a_signed((), state="open")) == []  # joined, and nothing left yet


def test_a_lower_epsilon_is_found_by_computing_it_again() -> None:
    honest = a_receipt()
    assert "it says epsilon 0.5, its releases cost" in wrong(a_signed(epsilon=0.5))
    assert wrong(a_signed(epsilon=honest.epsilon - 1e-6)) != ""
    stages = honest.epsilon_by_stage | {"final": 0.1}
    assert "final: it says epsilon 0.1, its releases cost" in wrong(a_signed(epsilon_by_stage=stages))
    assert "other stages" in wrong(a_signed(epsilon_by_stage={}))
    assert "its delta is 0.001, the plan's 1e-05" in wrong(a_signed(delta=1e-3))


def test_a_dropped_release_does_not_fit_the_epsilon_that_is_said() -> None:
    honest = a_receipt()
    said = {"epsilon": honest.epsilon, "epsilon_by_stage": honest.epsilon_by_stage}
    for at in range(len(RELEASES)):
        assert "its releases cost" in wrong(a_signed(RELEASES[:at] + RELEASES[at + 1 :], **said)) or at == 0
    assert "other stages" in wrong(a_signed(RELEASES[1:], **said))


def test_another_plan_is_found() -> None:
    other = PLAN.model_copy(update={"name": "letters"})
    assert "the plan's hash is not that of the plan in it" in wrong(a_signed(plan_json=other.model_dump_json()))
    assert "the plan's hash is not that of the plan in it" in wrong(a_signed(plan_sha256=other.sha256))
    assert "none that this version can run" in wrong(a_signed(plan_json="{}", plan_sha256=plan_hash("{}")))


def test_a_plan_of_another_version_is_believed_by_its_bytes_and_noted() -> None:
    text = PLAN.model_dump_json().replace('"name"', ' "name"', 1)
    signed_receipt = a_signed(plan_json=text, plan_sha256=plan_hash(text))
    assert wrong(signed_receipt) == ""
    assert "not written as this version of urna writes it" in notes(signed_receipt)


def test_another_operator_is_found() -> None:
    assert "another operator's key" in wrong(a_signed(operator_key=OTHER.public_key_hex))


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"pixels": "aa" * 32}, "its models are pixels, the plan's pca, pixels"),
        ({"pixels": "aa" * 32, "pca": "bb" * 32, "vit": "cc" * 32}, "its models are pca, pixels, vit"),
        ({"pixels": "aa" * 32, "pca": "cc" * 32}, "model pca has other weights than the plan pins"),
    ],
)
def test_candidates_that_the_plan_does_not_have_are_found(models: dict[str, str], said: str) -> None:
    assert said in wrong(a_signed(models=models))


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (left("ballot/1", gaussian(4.0), "heldout"), "the stage ballot is about tuning records, found heldout ones"),
        (left("final/9", STEP, "heldout"), "the stage final is about tuning records"),
        (left("evaluation/x/1", gaussian(4.0)), "the stage evaluation is about heldout records, found tuning ones"),
        (left("final/9", gaussian(4.0)), "of a Poisson sample of 0.5, found"),
        (left("final/9", subsampled_gaussian(0.1, 2.0)), "of a Poisson sample of 0.5, found"),
        (left("ballot/1", STEP), "the plan's ballot is Gaussian, noise multiplier 2, found"),
        (left("final/9", STEP, count=2), "the plan's final counts 1 a release, found 2"),
        (left("close", gaussian(4.0)), "nothing of a record leaves in the stage close"),
        (left("ballot/1", '{"ZeroDpEvent":{}}'), "its event is none that this version can account for"),
        (left("ballot/1", "["), "its event is none"),
        (left("ballot/1", "[" * 999), "its event is none"),
        (left("ballot/1", '{"GaussianDpEvent":{"noise_multiplier":-1.0}}'), "its event is none"),
        (left("ballot/1", '{"GaussianDpEvent":{"noise_multiplier":1e-9}}'), "no plan is paid for with so little noise"),
        (left("ballot/1", '{"GaussianDpEvent":{"noise_multiplier":0.3,"noise_multiplier":9.0}}'), "found '{"),
        (left("ballot/1", '{"GaussianDpEvent":\n{"noise_multiplier":4.0}}'), "found '{"),
        (left("ballot/1", gaussian(4.0), request_id="run-2/ballot/1"), "release run-2/ballot/1 is none of this campaign"),
        (left("ballot/1", gaussian(4.0), request_id="run-11/x"), "release run-11/x is none of this campaign"),
    ],
)
def test_a_release_that_the_plan_does_not_make_is_found(release: Left, said: str) -> None:
    reasons = wrong(a_signed((RELEASES[1], release), epsilon=1.0, epsilon_by_stage={"final": 1.0}))
    assert said in reasons
    assert reasons.count("\n") == 0


def test_a_release_that_is_listed_twice_is_found() -> None:
    assert "release run-1/final/1 is listed 2 times" in wrong(a_signed((*RELEASES, RELEASES[1])))


def test_costs_beyond_any_plan_are_not_computed_for_hours() -> None:
    releases = tuple(left(f"ballot/{at}", gaussian(0.06)) for at in range(3))
    receipt = sign_receipt(SITE, a_receipt().model_copy(update={"left": releases}))
    assert "more than any plan allows" in wrong(receipt)
    releases = tuple(left(f"ballot/{at}", gaussian(100.0 + at)) for at in range(receipt_check.MAX_KINDS + 1))
    receipt = sign_receipt(SITE, a_receipt().model_copy(update={"left": releases}))
    assert "more than any plan allows" in wrong(receipt)


def test_more_than_the_plan_is_no_lie_but_said_loudly() -> None:
    spent = a_signed((left("ballot/1", gaussian(0.9)),))
    assert epsilon_of_rows(rows_of(spent.receipt.left), 1e-5) > PLAN.privacy.epsilon
    assert wrong(spent) == ""
    assert notes(spent).startswith("MORE THAN THE PLAN: epsilon ")


def test_more_rounds_than_the_plan_speaks_of_are_noted() -> None:
    many = a_signed(tuple(left(f"final/{at}", subsampled_gaussian(0.5, 8.0)) for at in range(5)))
    assert wrong(many) == ""
    assert notes(many) == "5 releases of the stage final were asked, the plan speaks of 3 at most"


# ---- the command


def urna(*arguments: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command: list[str | Path] = [Path(sys.executable).parent / "urna", "verify-receipt", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


@dataclass(frozen=True)
class Run:
    """A campaign that was run, with the receipts of its five sites."""

    folder: Path
    receipts: Path

    @property
    def roster(self) -> Path:
        return self.folder / "roster.json"

    def receipt(self, site: str = "site-1") -> Path:
        return self.receipts / f"{site}.json"

    def identity(self, site: str = "site-1") -> Identity:
        return load_identity(site, self.folder / SITES_DIR / site / IDENTITY_FILE)

    def check(self, path: Path) -> Checked:
        return check_file(path, self.roster, None, self.folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("verify") / "run-1"
    federation = Federation(folder, small())
    federation.run()
    receipts = folder.parent / "receipts"
    receipts.mkdir()
    for site in federation.sites:
        (path,) = write_receipts(folder / SITES_DIR / site.config.name, folder.parent / "out" / site.config.name)
        shutil.copy(path, receipts / f"{site.config.name}.json")
        site.ledger.close()
    return Run(folder, receipts)


def test_receipts_of_a_whole_campaign_are_good_and_agree_with_the_operators_journal(run: Run) -> None:
    for site in ("site-1", "site-2", "site-3", "site-4", "site-5"):
        checked = run.check(run.receipt(site))
        assert checked.findings == ()
        assert checked.receipt is not None
        assert (checked.receipt.site, checked.receipt.state) == (site, "closed")
        assert all(one.reply_sha256 for one in checked.receipt.left)
        assert {one.stage for one in checked.receipt.left} >= {
            "ballot",
            "final",
            "evaluation",
        }  # a runoff is the ballot's choice


def test_the_command_says_what_left_and_ends_well(run: Run) -> None:
    result = urna(run.receipt(), "--roster", run.roster, "--run", run.folder, cwd=run.folder)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("verdict  GOOD: site-1 signed that campaign run-1 cost epsilon ")
    for part in (
        "plan     digits",
        "Gaussian, noise multiplier",
        "of a Poisson sample of 0.25",
        "epsilon  total",
        "none was run",
    ):
        assert part in result.stdout
    assert "note" not in result.stdout


def test_a_key_will_do_instead_of_a_roster_and_the_operator_is_then_not_compared(run: Run) -> None:
    result = urna(run.receipt(), "--key", run.identity().public_key_hex, cwd=run.folder)
    assert result.returncode == 0
    assert "no roster was compared" in result.stdout
    result = urna(run.receipt(), "--key", run.identity("site-2").public_key_hex, cwd=run.folder)
    assert result.returncode == 2
    assert "verdict  WRONG: 1 reason" in result.stdout
    for key in ("00" * 64, "x", json.loads(run.roster.read_text("utf-8"))["operator"]):
        result = urna(run.receipt(), "--key", key, cwd=run.folder)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr + result.stdout


def test_a_wrong_receipt_is_one_line_a_reason_and_code_2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    honest = read_receipt(run.receipt().read_bytes())
    path.write_bytes(altered(honest, run.identity(), epsilon=0.1, delta=0.5))
    result = urna(path, "--roster", run.roster, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.count("wrong    ") == 2
    assert result.stdout.splitlines()[-1] == "verdict  WRONG: 2 reasons"
    assert "epsilon  total" not in result.stdout  # nothing of it is shown as if it were so


@pytest.mark.parametrize("options", [[], ["--roster", "roster.json", "--key", "00"]])
def test_a_roster_or_a_key_is_needed(run: Run, options: list[str]) -> None:
    result = urna(run.receipt(), *options, cwd=run.folder)
    assert result.returncode == 2
    assert result.stderr == "error: expected --roster ROSTER or --key HEX, found none or both: give one\n"


def test_a_missing_file_is_one_line(run: Run) -> None:
    for path in ("nowhere.json", "."):
        result = urna(path, "--roster", run.roster, cwd=run.folder)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "Traceback" not in result.stderr


# ---- planted: what a liar would hand in


def dropped(receipt: Receipt, stage: str) -> dict[str, Any]:
    """A receipt without the last release of a stage, its epsilon computed anew: consistent in itself."""
    at = max(at for at, one in enumerate(receipt.left) if one.stage == stage)
    kept = receipt.left[:at] + receipt.left[at + 1 :]
    rows, delta = rows_of(kept), receipt.delta
    stages = dict.fromkeys(row.stage for row in rows)
    return {
        "left": [one.model_dump() for one in kept],
        "epsilon": epsilon_of_rows(rows, delta),
        "epsilon_by_stage": {stage: epsilon_of_rows([r for r in rows if r.stage == stage], delta) for stage in stages},
    }


MUTANTS: dict[str, Callable[[Receipt], dict[str, Any]]] = {
    "a lower epsilon": lambda receipt: {"epsilon": receipt.epsilon / 2},
    "a dropped release": lambda receipt: {"left": [one.model_dump() for one in receipt.left[:-1]]},
    "a dropped release, all computed anew": lambda receipt: dropped(receipt, "final"),
    "another site's name": lambda _: {"site": "site-2"},
    "another plan": lambda receipt: {"plan_json": receipt.plan_json.replace('"epsilon":3.0', '"epsilon":9.0')},
    "another campaign": lambda _: {"campaign": "run-2"},
    "other models": lambda receipt: {"models": dict.fromkeys(receipt.models, "00" * 32)},
    "a reply that was never sent": lambda receipt: {
        "left": [receipt.left[0].model_dump() | {"reply_sha256": ""}, *(one.model_dump() for one in receipt.left[1:])]
    },
    "another request": lambda receipt: {
        "left": [receipt.left[0].model_dump() | {"request_sha256": "00" * 32}, *(one.model_dump() for one in receipt.left[1:])]
    },
    "another ledger": lambda _: {"ledger_link": "00" * 32},
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("signer", ["nobody", "a stranger", "the site"])
def test_a_planted_mutant_is_found(run: Run, tmp_path: Path, mutant: str, signer: str) -> None:
    honest = read_receipt(run.receipt().read_bytes())
    stranger = Identity("site-1", Ed25519PrivateKey.generate())
    key = {"nobody": None, "a stranger": stranger, "the site": run.identity()}[signer]
    path = tmp_path / "mutant.json"
    path.write_bytes(altered(honest, key, **MUTANTS[mutant](honest.receipt)))
    if signer == "the site":
        assert not run.check(path).is_good
    else:
        checked = check_file(path, run.roster, None)  # the signature alone
        assert checked.receipt is None
        assert not checked.is_good
    verdict = [*lines_of(run.check(path))][-1]
    assert verdict.startswith("verdict  WRONG: ")


def test_a_site_that_drops_a_release_and_computes_anew_is_only_found_by_the_operators_journal(run: Run, tmp_path: Path) -> None:
    honest = read_receipt(run.receipt().read_bytes())
    path = tmp_path / "mutant.json"
    path.write_bytes(altered(honest, run.identity(), **dropped(honest.receipt, "final")))
    assert check_file(path, run.roster, None).is_good
    reasons = [one.text for one in run.check(path).findings]
    assert reasons[0] == "the operator holds an answer to run-1/final/4, the receipt does not have it"
    assert "its closing statement lists other releases" in reasons


def test_a_release_that_the_operator_never_asked_for_is_found(run: Run, tmp_path: Path) -> None:
    honest = read_receipt(run.receipt().read_bytes())
    more = (*honest.receipt.left, honest.receipt.left[0].model_copy(update={"request_id": "run-1/ballot/2"}))
    path = tmp_path / "mutant.json"
    path.write_bytes(altered(honest, run.identity(), left=[one.model_dump() for one in more]))
    assert "release run-1/ballot/2: this run never asked for it" in [one.text for one in run.check(path).findings]


def journal_of(run: Run, tmp_path: Path) -> Path:
    shutil.copytree(run.folder, tmp_path / "run-1")
    return tmp_path / "run-1"


def in_journal(folder: Path, statement: str, *values: str) -> None:
    connection = sqlite3.connect(folder / "journal.sqlite")
    assert connection.execute(statement, values).rowcount != 0
    connection.commit()
    connection.close()


def entry_of(folder: Path, key: str) -> dict[str, Any]:
    connection = sqlite3.connect(folder / "journal.sqlite")
    (value,) = connection.execute("SELECT value FROM entry WHERE key = ?", (key,)).fetchone()
    connection.close()
    return dict(json.loads(value))


def test_a_statement_of_another_cost_than_the_receipt_is_found(run: Run, tmp_path: Path) -> None:
    folder = journal_of(run, tmp_path)
    kept = entry_of(folder, "reply/close/site-1")
    said = Statement.model_validate_json(kept["body"])
    lie = signed(run.identity(), said.model_copy(update={"epsilon": 0.1, "rows": said.rows[1:]}))
    value = json.dumps({"body": lie.body.decode(), "signature": lie.signature.hex()})
    in_journal(folder, "UPDATE entry SET value = ? WHERE key = 'reply/close/site-1'", value)
    reasons = [one.text for one in check_file(run.receipt(), run.roster, None, folder).findings]
    assert reasons == [
        "its closing statement lists other releases",
        "its closing statement says epsilon 0.1 at delta 1e-05",
    ]


def test_a_statement_that_the_site_did_not_sign_is_found(run: Run, tmp_path: Path) -> None:
    folder = journal_of(run, tmp_path)
    kept = entry_of(folder, "reply/close/site-2")
    in_journal(folder, "UPDATE entry SET value = ? WHERE key = 'reply/close/site-1'", json.dumps(kept))
    (reason,) = [one.text for one in check_file(run.receipt(), run.roster, None, folder).findings]
    assert reason.startswith("the statement in the run's journal is not this site's: expected a message signed by site-1")


def test_a_missing_statement_is_a_note(run: Run, tmp_path: Path) -> None:
    folder = journal_of(run, tmp_path)
    in_journal(folder, "DELETE FROM entry WHERE key = 'reply/close/site-1'")
    checked = check_file(run.receipt(), run.roster, None, folder)
    assert checked.is_good
    assert [one.text for one in checked.findings] == ["the run holds no closing statement of site-1"]


def test_another_run_is_found(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "run-9"
    with Federation(other, small()).stages():
        pass
    checked = check_file(run.receipt(), run.roster, None, other)
    assert [one.text for one in checked.findings] == ["the run is campaign run-9, the receipt is of run-1"]


def test_a_journal_that_cannot_be_read_is_bad_input(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a run's folder"):
        check_file(run.receipt(), run.roster, None, tmp_path)
    folder = journal_of(run, tmp_path)
    for value in ("{}", "[]", '{"body": 3, "signature": "zz"}', "3"):
        in_journal(folder, "UPDATE entry SET value = ? WHERE key = 'ask/hello'", value)
        with pytest.raises(RunError, match="cannot be read"):
            check_file(run.receipt(), run.roster, None, folder)


# ---- any bytes


SMALL = a_signed(RELEASES[:2])
TREE = json.loads(SMALL.to_text())
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["00" * 32, "run-1", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(tree: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner: list[tuple[str | int, object]] = []
    if isinstance(tree, dict):
        inner = [*tree.items()]
    elif isinstance(tree, list):
        inner = [*enumerate(tree)]
    return [path, *(one for key, value in inner for one in places(value, (*path, key)))]


def replaced(tree: Any, path: tuple[str | int, ...], value: object) -> Any:
    if not path:
        return value
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def verdict_of(data: bytes, folder: Path) -> str:
    path, roster = folder / "fuzzed.json", folder / "roster.json"
    path.write_bytes(data)
    roster.write_text(ROSTER.model_dump_json(), encoding="utf-8")
    lines = [*lines_of(check_file(path, roster, None))]
    assert all(line.isprintable() for line in lines)
    return lines[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(places(TREE)), JUNK)
def test_mutated_json_is_never_a_traceback_and_never_good(folder: Path, path: tuple[str | int, ...], junk: object) -> None:
    tree = replaced(TREE, path, junk)
    text = json.dumps(tree)
    assert verdict_of(text.encode(), folder).startswith("verdict  GOOD" if text == json.dumps(TREE) else "verdict  WRONG")


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(places(TREE["receipt"])), JUNK)
def test_mutated_json_that_the_site_itself_signed_is_never_a_traceback(
    folder: Path, path: tuple[str | int, ...], junk: object
) -> None:
    """The signature holds, so that all that comes after it is looked at."""
    try:
        receipt = Receipt.model_validate_json(json.dumps(replaced(TREE["receipt"], path, junk)))
    except ValueError:
        return
    signature = Identity(receipt.site, SITE.private_key).sign("receipt", receipt.model_dump_json().encode()).hex()
    verdict_of(SignedReceipt(receipt=receipt, signature=signature).to_text().encode(), folder)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=300))
def test_any_event_is_judged_without_a_traceback(folder: Path, event: str) -> None:
    verdict = verdict_of(a_signed_event(event), folder)
    assert verdict.startswith("verdict  WRONG")


def a_signed_event(event: str) -> bytes:
    honest = a_receipt(RELEASES[:1])
    receipt = honest.model_copy(update={"left": (honest.left[0].model_copy(update={"event": event}),)})
    return sign_receipt(SITE, receipt).to_text().encode()


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_judged_without_a_traceback(folder: Path, data: bytes) -> None:
    assert verdict_of(data, folder).startswith("verdict  WRONG")
