import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.client.clinic import CANARY, NUM_RECORDS, Clinic
from tests.client.test_control import PLAN_SHA256, STATUS, ADesk
from urna.client import cli
from urna.client.control import serve, user
from urna.client.desk import LedgerDesk
from urna.client.ledger_rows import Waiting
from urna.client.local_log import local_log
from urna.client.tables import columns, event_in_words, printable
from urna.privacy.accounting import epsilon_of, gaussian
from urna.protocol.errors import BadInputError, ControlError, LedgerError, RunnerError, SiteConfigError


def run(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(cli.app, arguments, input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def urna_site(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from urna.client.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"COLUMNS": "200"})


@pytest.fixture
def home(clinic: Clinic) -> Path:
    clinic.folder.chmod(0o700)
    return clinic.folder


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[ADesk]:
    """Of a runner that serves `tmp_path`."""
    tmp_path.chmod(0o700)
    desk = ADesk()
    with serve(tmp_path, desk, local_log("cli", tmp_path)):
        yield desk


# ---- check


def test_a_site_in_order_has_no_red_line(home: Path) -> None:
    lines = run("check", str(home), "--offline").splitlines()
    marks = [line.split()[0] for line in lines if not line.lstrip().startswith("->")]
    assert set(marks) <= {"ok", "warn", "skip"}
    assert "ok    site.toml       site-1, 1 data set" in lines
    assert f"ok    records digits  {NUM_RECORDS} read, {NUM_RECORDS} declared" in lines


def test_everything_that_is_wrong_is_listed_at_once_with_what_to_do(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "ledger.sqlite").unlink()
    (home / "records.csv").write_text(f"id,label\n{CANARY},1\n")
    with pytest.raises(BadInputError, match="cannot take part: ledger, records digits"):
        cli.app(["check", str(home), "--offline"], standalone_mode=False)
    output = capsys.readouterr().out
    assert "-> restore the newest copy; it is never repaired, and never made anew" in " ".join(output.split())
    assert CANARY not in output


def test_a_check_is_json_for_programs_and_ends_in_exit_code_2_when_red(home: Path) -> None:
    (home / "roster.json").unlink()
    done = urna_site("check", str(home), "--offline", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 2
    assert [one["name"] for one in findings if one["level"] == "no"] == ["roster"]
    assert set(findings[0]) == {"name", "level", "text", "remedy", "seconds"}


def test_the_time_of_a_check_is_shown_only_when_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from urna.client.findings import Finding

    shown = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(cli, "console", shown)
    cli._finding(Finding("disk", "ok", "fine", seconds=0.9), 4)
    cli._finding(Finding("disk", "ok", "fine", seconds=1.25), 4)
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().splitlines() == ["ok    disk  fine", "ok    disk  fine  (1.2 s)"]


# ---- ledger


def test_the_ledger_is_shown_by_release_by_campaign_and_in_total(clinic: Clinic) -> None:
    clinic.ask(clinic.ballot("ballot/1"))
    clinic.ask(clinic.ballot("ballot/2"))
    clinic.ask(clinic.evaluate())
    lines = run("ledger", str(clinic.folder)).splitlines()
    event, plan = gaussian(10.0), clinic.plan
    said = ["Gaussian,", "noise", "multiplier", "10"]
    assert [line.split() for line in lines[:1]] == [["when", "campaign", "stage", "partition", "event", "count"]]
    assert [line.split()[2:] for line in lines[1:3]] == [
        ["run-1", "ballot", "tuning", *said, "2"],
        ["run-1", "evaluation", "heldout", *said, "1"],
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d  ", line) for line in lines[1:3])
    own, total = epsilon_of([event] * 2, plan.privacy.delta), epsilon_of([event] * 2, 1e-4)
    assert lines[4] == f"run-1  epsilon {own:.4f}, delta 1e-05"
    assert lines[5] == f"total  epsilon {total:.4f} of 8, delta 0.0001; {8 - total:.4f} left"


def test_an_unused_ledger_says_nothing_was_spent(clinic: Clinic) -> None:
    assert "total  epsilon 0.0000 of 8, delta 0.0001; 8.0000 left" in run("ledger", str(clinic.folder))


def test_a_missing_ledger_is_an_error_and_not_an_empty_table(clinic: Clinic) -> None:
    (clinic.folder / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="a lost ledger is not a new budget"):
        cli.app(["ledger", str(clinic.folder)], standalone_mode=False)


def test_a_lost_ledger_ends_in_one_line_and_exit_code_4(clinic: Clinic) -> None:
    (clinic.folder / "ledger.sqlite").unlink()
    result = urna_site("ledger", str(clinic.folder))
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)


def test_a_lost_anchor_is_made_anew_only_with_a_yes(clinic: Clinic) -> None:
    clinic.site.ledger.close()
    anchor = clinic.folder / "ledger.anchor"
    anchor.unlink()
    with pytest.raises(BadInputError, match="nothing was changed"):
        run("ledger", str(clinic.folder), "--renew-anchor", typed="n\n")
    assert not anchor.exists()
    assert "total  epsilon 0.0000" in run("ledger", str(clinic.folder), "--renew-anchor", typed="y\n")
    assert anchor.is_file()


# ---- status and decisions


def test_status_shows_budget_campaigns_and_what_waits(desk: ADesk, tmp_path: Path) -> None:
    lines = run("status", str(tmp_path)).splitlines()
    assert lines[0].startswith("site     site-1  running since ")
    assert lines[1] == "budget   epsilon 1.2500 of 8 spent, 6.7500 left, delta 0.0001"
    assert lines[2] == "work     final/3 of run-0"
    assert lines[3] == "bundles  1 seen, none unpacked: efefefefefef"
    assert [line.split()[:5] for line in lines[5:8]] == [
        ["campaign", "state", "plan", "epsilon", "spent"],
        ["run-1", "waiting", "abababababab", "3", "0.0000"],
        ["run-0", "open", "cdcdcdcdcdcd", "3", "1.2500"],
    ]
    assert lines[8].startswith(f"run-1 waits for a person here: `urna-site approve {tmp_path} run-1`")
    assert desk.told == []


def test_status_says_loudly_that_a_site_is_paused(desk: ADesk, tmp_path: Path) -> None:
    desk.now = replace(STATUS, paused=True, campaigns=(), num_older_campaigns=3)
    printed = run("status", str(tmp_path))
    assert "PAUSED: `urna-site resume" in printed
    assert "... and 3 older ones" in printed


def test_status_is_json_for_programs(desk: ADesk, tmp_path: Path) -> None:
    found = json.loads(run("status", str(tmp_path), "--json"))
    assert found["campaigns"][0]["asked"]["candidates"] == ["pixels", "autoencoder"]
    assert found["epsilon_total"] == desk.now.epsilon_total


def test_without_a_runner_status_is_what_the_ledger_says(clinic: Clinic) -> None:
    clinic.ask(clinic.ballot())
    waiting = clinic.plan.model_copy(update={"name": "second"})
    clinic.site.ledger.wait(Waiting("run-2", "00" * 32, waiting.model_dump_json()))
    before = (clinic.folder / "ledger.sqlite").read_bytes()
    printed = run("status", str(clinic.folder))
    assert "no runner answers; as its ledger says" in printed
    rows = [line.split()[:3] for line in printed.splitlines() if re.match(r"run-\d  ", line)]
    assert sorted(rows) == [["run-1", "open", clinic.plan.sha256[:12]], ["run-2", "waiting", waiting.sha256[:12]]]
    assert (clinic.folder / "ledger.sqlite").read_bytes() == before


def test_approving_shows_the_plan_and_asks(desk: ADesk, tmp_path: Path) -> None:
    printed = run("approve", str(tmp_path), "run-1", typed="y\n")
    for said in (
        PLAN_SHA256,
        "at most 3 at delta 1e-05",
        "6.7500 of 8 are left",
        "pixels, autoencoder",
        "up to 40 of fine-tuning",
        "at least 3 sites, 180 records",
        "up to 1 sites may collude",
        "sees sums only",
    ):
        assert said in printed
    assert [one[:3] for one in desk.told] == [("approve", "run-1", PLAN_SHA256)]


def test_a_plan_that_shows_single_releases_says_so(desk: ADesk, tmp_path: Path) -> None:
    asked = replace(STATUS.campaigns[0].asked, secure_sum=False, noise="local")
    desk.now = replace(STATUS, campaigns=(replace(STATUS.campaigns[0], asked=asked),))
    printed = run("approve", str(tmp_path), "run-1", typed="y\n")
    assert "sees the releases of this site" in printed
    assert "collude" not in printed


@pytest.mark.parametrize("typed", ["n\n", "\n", "maybe\nn\n"])
def test_anything_but_yes_approves_nothing(desk: ADesk, tmp_path: Path, typed: str) -> None:
    with pytest.raises(BadInputError, match="run-1 was not approved: it still waits"):
        run("approve", str(tmp_path), "run-1", typed=typed)
    assert desk.told == []


def test_a_script_approves_only_the_plan_that_it_names(desk: ADesk, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="--yes needs --plan"):
        run("approve", str(tmp_path), "run-1", "--yes")
    for wrong in ("cdcdcdcd", "abab", PLAN_SHA256 + "0"):
        with pytest.raises(ControlError, match="--plan: expected 8 or more first digits of abababababab"):
            run("approve", str(tmp_path), "run-1", "--yes", "--plan", wrong)
    assert desk.told == []
    run("approve", str(tmp_path), "run-1", "--yes", "--plan", PLAN_SHA256[:8].upper())
    assert [one[:3] for one in desk.told] == [("approve", "run-1", PLAN_SHA256)]


def test_a_plan_that_is_exchanged_while_a_person_reads_is_not_approved(
    desk: ADesk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(STATUS, campaigns=(replace(STATUS.campaigns[0], plan_sha256="cd" * 32),))
    desk.now = other  # what the person sees; the desk itself holds another plan by now
    monkeypatch.setattr("typer.confirm", lambda _: True)
    with pytest.raises(ControlError, match="expected the plan that waits, found another"):
        run("approve", str(tmp_path), "run-1")
    assert desk.told == []


def test_an_unknown_campaign_is_an_error_that_names_the_known(desk: ADesk, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"expected a campaign of this site \(run-1, run-0\), found 'run-7'"):
        run("approve", str(tmp_path), "run-7")
    assert desk.told == []


def test_deny_pause_and_resume_reach_the_runner(desk: ADesk, tmp_path: Path) -> None:
    run("deny", str(tmp_path), "run-1", "--reason", "members")
    run("pause", str(tmp_path))
    run("resume", str(tmp_path))
    assert [one[:-1] for one in desk.told] == [("deny", "run-1", "members"), ("pause",), ("resume",)]


def test_a_reason_that_is_no_code_is_refused(desk: ADesk, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["deny", str(tmp_path), "run-1", "--reason", "Jane Doe objects"])
    assert result.exit_code == 2
    assert desk.told == []


@pytest.mark.parametrize("command", [["approve", "F", "run-1"], ["deny", "F", "run-1"], ["pause", "F"], ["resume", "F"]])
def test_without_a_runner_a_decision_is_one_clear_line_and_exit_code_4(home: Path, command: list[str]) -> None:
    arguments = [str(home) if one == "F" else one for one in command]
    with pytest.raises(RunnerError, match="no runner answers at") as caught:
        cli.app(arguments, standalone_mode=False)
    assert caught.value.exit_code == 4


def test_a_decision_becomes_an_entry_of_the_ledger(home: Path, clinic: Clinic) -> None:
    site = clinic.site
    site.ledger.wait(Waiting("run-2", "00" * 32, clinic.plan.model_dump_json()))
    real = LedgerDesk(site.config.name, site.config.policy, site.roster, site.ledger)
    with serve(home, real, local_log("real", home)):
        run("approve", str(home), "run-2", "--yes", "--plan", clinic.plan.sha256[:12])
        run("pause", str(home))
        printed = run("status", str(home))
        with pytest.raises(ControlError, match="expected a campaign that asked this site, found none called 'run-9'"):
            run("deny", str(home), "run-9")
    assert re.search(r"run-2 +approved", printed)
    assert "PAUSED" in printed
    noted = site.ledger.noted("approve", subject="run-2")
    assert noted is not None
    assert noted.detail == {"plan_sha256": clinic.plan.sha256, "by": user()}


# ---- records, and the rest


def test_a_preview_shows_some_records_and_what_there_is(clinic: Clinic) -> None:
    lines = run("data", "preview", str(clinic.folder), "--rows", "2").splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["id", f"{CANARY}-000", f"{CANARY}-001"]
    assert f"{NUM_RECORDS} records of {NUM_RECORDS} persons or units, 0 left out by the cap" in lines
    assert "labels    0 20, 1 20, 2 20" in lines


def test_a_preview_of_an_unknown_data_set_names_the_known(clinic: Clinic) -> None:
    with pytest.raises(BadInputError, match=r"expected a data set of site.toml \(digits\), found 'x'"):
        run("data", "preview", str(clinic.folder), "x")


@pytest.mark.parametrize("command", ["ledger", "status", "receipts"])
def test_a_folder_that_is_no_site_is_an_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(SiteConfigError, match=r"expected a site\.toml file at .*, found nothing"):
        cli.app([command, str(tmp_path)], standalone_mode=False)


def test_an_error_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = urna_site("status", str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: expected a site.toml file at ")
    assert result.stderr.count("\n") == 1


def test_help_names_the_commands_and_exit_codes() -> None:
    text = " ".join(run("--help").split())
    verbs = ("init", "check", "ledger", "status", "approve", "deny", "pause", "resume", "run", "up", "receipts", "data")
    for word in (*verbs, "Exit codes: 0 ok, 2 bad input or a red check, 4 the ledger cannot be used or no runner answers."):
        assert word in text


HEAVY = ("torch", "flwr", "scipy", "numpy", "sqlalchemy", "pyarrow", "dp_accounting", "matplotlib")


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["status", "F"], ["pause", "F"]])
def test_a_command_loads_only_what_it_needs(desk: ADesk, tmp_path: Path, command: list[str]) -> None:
    arguments = [str(tmp_path) if one == "F" else one for one in command]
    script = (
        "import sys\nfrom urna.client.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print('loaded', sorted(set({HEAVY!r}) & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "loaded []\n"
    assert [one[0] for one in desk.told] == [one for one in command if one == "pause"]


@pytest.mark.parametrize("module", ["ledger", "check"])
def test_torch_and_flower_are_not_needed_to_look(clinic: Clinic, module: str) -> None:
    arguments = [module, str(clinic.folder)]
    script = (
        "import sys\nfrom urna.client.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\nprint('loaded', {{'torch', 'flwr'}} & sys.modules.keys(), file=sys.stderr)"
    )
    clinic.folder.chmod(0o700)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.splitlines()[-1:] == ["loaded set()"]


# ---- what is printed


def test_a_text_of_a_record_cannot_steer_the_terminal() -> None:
    assert printable("Zoë\x1b[2J\n\u202edrowssap") == "Zoë\\x1b[2J\\n\\u202edrowssap"


def test_columns_are_as_wide_as_their_widest_cell_and_never_cut() -> None:
    assert columns([("a", "b"), ("a-very-long-name", "c")]) == ["a                 b", "a-very-long-name  c"]


def test_an_event_is_said_in_words() -> None:
    sampled = (
        '{"PoissonSampledDpEvent": {"sampling_probability": 0.5, "event": {"GaussianDpEvent": {"noise_multiplier": 2.0}}}}'
    )
    assert event_in_words(sampled) == "Gaussian, noise multiplier 2, of a Poisson sample of 0.5"
