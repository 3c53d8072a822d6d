import contextlib
import re
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.client.clinic import CANARY, write_records
from urna.client import cli
from urna.client.config import load_site_config
from urna.client.init import ask, checked, make_site, read_answers, render
from urna.client.questions import QUESTIONS, look, rounded, suggested_delta
from urna.client.vault import open_ledger
from urna.protocol.errors import BadInputError, SiteConfigError
from urna.protocol.identity import IDENTITY_FILE, create_identity, load_identity

ANSWERS = """
name = "hospital-a"
[dataset]
num_classes = 3
max_value = 16.0
[policy]
required_peers = ["hospital-b"]
[link]
superlink = "127.0.0.1:9443"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "hospital-a"
    home.mkdir(mode=0o700)
    write_records(home / "records.csv")
    return home


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.toml"
    path.write_text(ANSWERS)
    return path


def init(*arguments: str, typed: str | None = None) -> str:
    result = CliRunner().invoke(cli.app, ["init", *arguments], input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def content(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_a_file_of_answers_makes_a_site_with_keys_and_a_ledger(folder: Path, answers: Path) -> None:
    init(str(folder), "--answers", str(answers), "--yes")
    config = load_site_config(folder)
    dataset, policy = config.dataset[0], config.policy
    assert (config.name, dataset.format, dataset.modality, dataset.path) == ("hospital-a", "csv", "image", "records.csv")
    assert (dataset.id_column, dataset.label_column, dataset.num_records) == ("id", "label", 60)
    assert (dataset.image_height, dataset.image_width) == (8, 8)
    assert (policy.epsilon_total, policy.epsilon_per_campaign, policy.delta) == (8.0, 3.0, 1e-2)
    assert policy.required_peers == ("hospital-b",)
    assert policy.approval_required
    assert config.link is not None
    assert open_ledger(folder, config.vault, read_only=True).rows() == ()


def test_every_private_file_is_its_owners_alone(folder: Path, answers: Path) -> None:
    home = folder.with_name("new")
    home.mkdir(mode=0o700)
    (home / "records.csv").write_bytes((folder / "records.csv").read_bytes())
    init(str(home), "--answers", str(answers), "--yes")
    made = [one for one in home.rglob("*") if one.is_file() and one.name != "records.csv"]
    assert {one.name for one in made} >= {"identity.key", "data.key", "ledger.sqlite", "node.key", "tls.key", "site.toml"}
    assert {stat.S_IMODE(one.stat().st_mode) for one in made} == {0o600}
    assert stat.S_IMODE((home / "egress").stat().st_mode) == 0o700


def test_the_anchor_is_proposed_outside_the_folder(folder: Path, answers: Path) -> None:
    init(str(folder), "--answers", str(answers), "--yes")
    assert (folder.parent / "hospital-a.anchor").is_file()
    assert not list(folder.glob("*.anchor"))


def test_the_printed_lines_are_what_a_consortium_takes(folder: Path, answers: Path) -> None:
    from urna.server.consortium import Member

    printed = init(str(folder), "--answers", str(answers), "--yes")
    block = printed[printed.index("[[site]]") : printed.index("what comes back")]
    (site,) = tomllib.loads(block)["site"]
    member = Member.model_validate(site)
    assert member.public_key == load_identity("hospital-a", folder / IDENTITY_FILE).public_key_hex
    assert member.node_public_key is not None
    assert member.node_public_key.startswith("ecdsa-sha2-nistp384 ")
    assert "PRIVATE" not in printed


def test_a_site_can_be_made_by_accepting_what_is_proposed(folder: Path) -> None:
    typed = {"Number of classes": "3", "Largest value of a pixel": "16"}
    asked: list[str] = []

    def prompt(question: str, proposed: str | None) -> str:
        asked.append(question)
        return typed.get(question, proposed or "")

    document = ask(folder, prompt, lambda _: None)
    make_site(folder, render(document))
    assert load_site_config(folder).dataset[0].num_classes == 3
    assert len(asked) == len(set(asked)) >= 20
    assert load_site_config(folder).link is None


def test_the_terminal_asks_explains_shows_and_makes(folder: Path) -> None:
    num_before = [question.key for question in QUESTIONS].index("num_classes")
    skipped = [one for one in QUESTIONS[:num_before] if one.key in ("url_variable", "query")]
    lines = (
        [""] * (num_before - len(skipped)) + ["three", "3"] + [""] * 3 + [""] * 9 + ["y"]
    )  # three of images, nine of policy, vault and link
    printed = init(str(folder), typed="\n".join(lines) + "\n")
    for question in QUESTIONS:
        if question.key not in ("url_variable", "query", "text_column", "max_characters", "columns", "root_certificates"):
            assert question.why in printed
    assert "expected a whole number" in printed
    assert (folder / "site.toml").is_file()
    assert load_site_config(folder).dataset[0].num_classes == 3


def test_nothing_is_made_without_a_yes(folder: Path, answers: Path) -> None:
    before = content(folder)
    with pytest.raises(BadInputError, match="nothing was written"):
        CliRunner().invoke(cli.app, ["init", str(folder), "--answers", str(answers)], input="n\n", catch_exceptions=False)
    assert content(folder) == before
    assert not (folder.parent / "hospital-a.anchor").exists()


def test_a_site_is_never_overwritten(folder: Path, answers: Path) -> None:
    init(str(folder), "--answers", str(answers), "--yes")
    before = content(folder)
    with pytest.raises(SiteConfigError, match="exists: it is never overwritten"):
        init(str(folder), "--answers", str(answers), "--yes")
    with pytest.raises(SiteConfigError, match="exists: it is never overwritten"):
        make_site(folder, (folder / "site.toml").read_text())
    assert content(folder) == before


def test_a_draft_of_provisioning_is_completed_and_kept_beside(folder: Path) -> None:
    draft = '# A draft.\nname = "hospital-a"\n\n[link]\nsuperlink = "127.0.0.1:9443" # egress\n'
    (folder / "site.toml").write_text(draft)
    identity = create_identity("hospital-a", folder / IDENTITY_FILE)
    answers = folder.parent / "rest.toml"
    answers.write_text("[dataset]\nnum_classes = 3\nmax_value = 16.0\n")
    printed = init(str(folder), "--answers", str(answers), "--yes")
    config = load_site_config(folder)
    assert config.link is not None
    assert (config.name, config.link.superlink) == ("hospital-a", "127.0.0.1:9443")
    assert load_identity("hospital-a", folder / IDENTITY_FILE).public_key_hex == identity.public_key_hex
    assert (folder / "site.toml.draft").read_text() == draft
    assert identity.public_key_hex in printed


def test_a_second_try_goes_on_where_the_first_was_interrupted(folder: Path, answers: Path) -> None:
    init(str(folder), "--answers", str(answers), "--yes")
    before = content(folder)
    (folder / "site.toml").unlink()
    init(str(folder), "--answers", str(answers), "--yes")
    assert content(folder) == before


def test_an_answer_that_is_missing_is_named_and_nothing_is_made(folder: Path, answers: Path) -> None:
    before = content(folder)
    answers.write_text('name = "hospital-a"\n[dataset]\nmax_value = 16.0\n')
    with pytest.raises(SiteConfigError, match=r"answers: expected dataset\.num_classes, found nothing"):
        init(str(folder), "--answers", str(answers), "--yes")
    answers.write_text(ANSWERS + "[policy.extra]\n")
    with pytest.raises(SiteConfigError, match=r"unknown key policy\.extra"):
        init(str(folder), "--answers", str(answers), "--yes")
    assert content(folder) == before


def test_of_the_records_only_the_names_of_columns_are_told(folder: Path, answers: Path) -> None:
    printed = init(str(folder), "--answers", str(answers), "--yes")
    assert CANARY not in printed
    assert CANARY not in (folder / "site.toml").read_text()
    seen = look(folder)
    assert CANARY not in repr(seen)
    assert seen.columns[:2] == ("id", "label")


def test_a_file_outside_the_folder_is_not_looked_at(folder: Path) -> None:
    (folder.parent / "secret.csv").write_text("a,b\n1,2\n")
    (folder / "link.csv").symlink_to(folder.parent / "secret.csv")
    assert look(folder, "../secret.csv").columns == ()
    assert look(folder, "link.csv").columns == ()


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"format": "images", "path": "scans", "labels": ["ill", "well"], "num_records": 900}, {"modality": "image"}),
        ({"format": "text", "path": "notes", "labels": ["ill", "well"], "num_records": 900}, {"max_characters": 2000}),
        (
            {"format": "sql", "query": "SELECT 1", "modality": "table", "num_classes": 2, "num_records": 70_123}
            | {
                "id_column": "id",
                "label_column": "y",
                "columns": [{"name": "age", "type": "number", "minimum": 0, "maximum": 9}],
            },
            {"url_variable": "URNA_DATABASE_URL"},
        ),
    ],
)
def test_other_formats_are_asked_for_what_they_need(tmp_path: Path, dataset: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "site").mkdir()
    answers = tmp_path / "answers.toml"
    answers.write_text(render_answers({"dataset": dataset | ({"image_height": 8} if dataset["format"] == "images" else {})}))
    config = checked(render(read_answers(tmp_path / "site", answers)))
    assert config.dataset[0].model_dump().items() >= expected.items()


def render_answers(document: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps(document)


def test_columns_of_a_table_are_read_as_they_are_typed() -> None:
    (question,) = (one for one in QUESTIONS if one.key == "columns")
    assert question.read("age=0:120, sex=f|m") == [
        {"name": "age", "type": "number", "minimum": 0.0, "maximum": 120.0},
        {"name": "sex", "type": "category", "categories": ["f", "m"]},
    ]
    for wrong in ("age", "=1:2", "age=a:b"):
        with pytest.raises(ValueError, match=r"^(age=0:120|a number)"):
            question.read(wrong)


@given(st.integers(1, 10**15))
def test_the_proposed_delta_is_below_one_in_the_number_of_records(num_records: int) -> None:
    assert 0 < suggested_delta(num_records) < 1 / num_records
    assert suggested_delta(num_records) * num_records >= 0.1 - 1e-9


@given(st.integers(1, 10**9))
def test_the_proposed_number_of_records_is_near_the_true_one_and_not_it(count: int) -> None:
    assert 0.9 < rounded(count) / count <= 1
    assert re.fullmatch(r"[0-9]{1,2}0*", str(rounded(count)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=2, max_size=5, unique=True))
def test_any_label_comes_back_as_it_was_answered(folder: Path, labels: list[str]) -> None:
    path = folder.parent / "labels.toml"
    path.write_text(render_answers({"dataset": {"labels": labels, "max_value": 16.0}}), encoding="utf-8")
    try:
        text = render(read_answers(folder, path))
    except SiteConfigError:
        return  # a label that no site takes
    assert checked(text).dataset[0].labels == tuple(labels)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
).filter(lambda value: value is not None)
KEYS = st.sampled_from(sorted({one.key for one in QUESTIONS})) | st.text(max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    document=st.dictionaries(
        st.sampled_from(["dataset", "policy", "vault", "link", "name", "x"]), VALUES | st.dictionaries(KEYS, VALUES, max_size=4)
    )
)
def test_any_answers_make_a_site_or_an_error_of_ours(folder: Path, document: dict[str, Any]) -> None:
    path = folder.parent / "fuzzed.toml"
    try:
        path.write_text(render_answers(document), encoding="utf-8")
    except (TypeError, ValueError, UnicodeError):
        return  # no TOML holds it
    with contextlib.suppress(BadInputError):
        checked(render(read_answers(folder, path)))
    assert not (folder / "site.toml").exists()


def test_what_is_typed_wrongly_is_asked_again(folder: Path) -> None:
    typed = iter(["", "two", "2"])
    told: list[str] = []

    def prompt(question: str, proposed: str | None) -> str:
        return next(typed) if question == "Number of classes" else proposed or ""

    def say(lines: Iterable[str]) -> None:
        told.extend(lines)

    document = ask(folder, prompt, say)
    assert document["dataset"][0]["num_classes"] == 2
    assert "this one must be answered" in told
    assert "expected a whole number" in told
