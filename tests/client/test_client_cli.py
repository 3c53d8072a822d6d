import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.client.clinic import CANARY, NUM_RECORDS, Clinic, a_signer
from urna.client import cli
from urna.privacy.accounting import epsilon_of, gaussian
from urna.protocol.errors import BadInputError, LedgerError, SiteConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def urna_site(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from urna.client.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"COLUMNS": "200"})


def test_a_site_in_order_is_all_green(clinic: Clinic) -> None:
    lines = run("check", str(clinic.folder)).splitlines()
    assert lines == [
        "ok  site.toml  site-1",
        "ok  keys       in a roster of 3 sites",
        "ok  ledger     chain unbroken, 0 releases, epsilon 0.0000 of 8 spent",
        f"ok  records    {NUM_RECORDS} read, {NUM_RECORDS} declared",
    ]


def test_everything_that_is_wrong_is_listed_at_once(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    (clinic.folder / "data.key").unlink()
    (clinic.folder / "ledger.sqlite").unlink()
    (clinic.folder / "records.csv").write_text(f"id,label\n{CANARY},1\n")
    with pytest.raises(BadInputError, match="cannot take part: keys, ledger, records"):
        cli.app(["check", str(clinic.folder)], standalone_mode=False)
    output = capsys.readouterr().out
    assert [line[:13].rstrip() for line in output.splitlines()] == ["ok  site.toml", "no  keys", "no  ledger", "no  records"]
    assert "expected 64 pixel columns, found 0" in output
    assert CANARY not in output


def test_a_roster_with_another_key_of_this_site_is_red(clinic: Clinic) -> None:
    roster = (clinic.folder / "roster.json").read_text()
    mine = clinic.site.identity.public_key_hex
    (clinic.folder / "roster.json").write_text(roster.replace(mine, a_signer("site-1").public_key_hex))
    result = CliRunner().invoke(cli.app, ["check", str(clinic.folder)])
    assert "no  keys       expected this identity's key in the roster, found another for site-1" in result.stdout


def test_check_changes_nothing(clinic: Clinic) -> None:
    before = {one.name: one.read_bytes() for one in clinic.folder.iterdir()}
    run("check", str(clinic.folder))
    assert {one.name: one.read_bytes() for one in clinic.folder.iterdir()} == before


def test_the_ledger_is_shown_by_stage_and_in_total(clinic: Clinic) -> None:
    clinic.ask(clinic.ballot("ballot/1"))
    clinic.ask(clinic.ballot("ballot/2"))
    clinic.ask(clinic.evaluate())
    words = [line.split() for line in run("ledger", str(clinic.folder)).splitlines()]
    event, delta = gaussian(10.0), 1e-4
    said = ["Gaussian,", "noise", "multiplier", "10"]
    two, one = epsilon_of([event] * 2, delta), epsilon_of([event], delta)
    assert words == [
        ["stage", "partition", "event", "count"],
        ["ballot", "tuning", *said, "2"],
        ["evaluation", "heldout", *said, "1"],
        ["ballot", "epsilon", f"{two:.4f}"],
        ["evaluation", "epsilon", f"{one:.4f}"],
        ["total", "epsilon", f"{two:.4f}", "of", "8,", "delta", "0.0001"],
    ]


def test_an_unused_ledger_says_nothing_was_spent(clinic: Clinic) -> None:
    assert "total       epsilon 0.0000 of 8, delta 0.0001" in run("ledger", str(clinic.folder))


@pytest.mark.parametrize("command", ["check", "ledger"])
def test_a_folder_that_is_no_site_is_an_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(SiteConfigError, match=r"expected a site\.toml file at .*, found nothing"):
        cli.app([command, str(tmp_path)], standalone_mode=False)


def test_a_missing_ledger_is_an_error_and_not_an_empty_table(clinic: Clinic) -> None:
    (clinic.folder / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError, match="a lost ledger is not a new budget"):
        cli.app(["ledger", str(clinic.folder)], standalone_mode=False)


def test_an_error_ends_in_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = urna_site("check", str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: expected a site.toml file at ")
    assert result.stderr.count("\n") == 1


def test_a_lost_ledger_ends_in_one_line_and_exit_code_4(clinic: Clinic) -> None:
    (clinic.folder / "ledger.sqlite").unlink()
    result = urna_site("ledger", str(clinic.folder))
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)


def test_help_names_the_commands_and_exit_codes() -> None:
    text = " ".join(run("--help").split())
    for word in ("check", "ledger", "Exit codes: 0 ok, 2 bad input, 4 the ledger cannot be used."):
        assert word in text


def test_an_overspent_site_is_red(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    clinic.ask(clinic.ballot("ballot/1"))
    path = clinic.folder / "site.toml"
    path.write_text(re.sub(r"epsilon_total = [0-9.]+", "epsilon_total = 0.01", path.read_text()))
    with pytest.raises(BadInputError, match="cannot take part: ledger"):
        cli.app(["check", str(clinic.folder)], standalone_mode=False)
    assert "of 0.01 are spent: nothing is left" in capsys.readouterr().out


def test_records_that_are_far_from_the_declared_number_are_red(clinic: Clinic, capsys: pytest.CaptureFixture[str]) -> None:
    path = clinic.folder / "site.toml"
    path.write_text(re.sub(r"num_records = [0-9]+", "num_records = 5", path.read_text()))
    with pytest.raises(BadInputError, match="cannot take part: records"):
        cli.app(["check", str(clinic.folder)], standalone_mode=False)
    assert "found 5: declare anew" in capsys.readouterr().out
