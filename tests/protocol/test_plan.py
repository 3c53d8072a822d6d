import json
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from urna.protocol.errors import PlanError, SiteConfigError
from urna.protocol.plan import PLAN_LIMIT_BYTES, Final, Plan, explain, load_plan, parse_plan, read_text

DIGITS = (Path(__file__).parents[2] / "plans" / "digits.toml").read_text("utf-8")
PLAN = parse_plan(DIGITS)


def changed(key: str, value: str, text: str = DIGITS) -> str:
    """The plan with the first ``key = ...`` line replaced."""
    result, count = re.subn(rf"^{key} = [^#\n]*", lambda _: f"{key} = {value} ", text, count=1, flags=re.MULTILINE)
    assert count == 1, key
    return result


def in_section(section: str, line: str) -> str:
    """The plan with one more line under ``[section]``."""
    result, count = re.subn(rf"^\[{re.escape(section)}\].*$", rf"\g<0>\n{line}", DIGITS, count=1, flags=re.MULTILINE)
    assert count == 1, section
    return result


def error_of(text: str) -> str:
    """The one line that a person reads."""
    with pytest.raises(PlanError) as caught:
        parse_plan(text)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 2000
    return message


def test_the_example_plan_is_read() -> None:
    assert (PLAN.name, PLAN.privacy.epsilon, PLAN.federation.min_sites) == ("digits", 3.0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("sample_rate", "0.25\nsample_rat = 0.3"), "unknown key final.sample_rat: did you mean sample_rate?"),
        (in_section("privacy", "epsilonn = 9"), "unknown key privacy.epsilonn: did you mean epsilon?"),
        ("privcy = 1\n" + DIGITS, "unknown key privcy: did you mean privacy?"),
        (in_section("federation.virtual", "num_site = 5"), "unknown key federation.virtual.num_site: did you mean num_sites?"),
        (DIGITS + '\nsha265 = "00"', f"unknown key candidates.{len(PLAN.candidates) - 1}.sha265: did you mean sha256?"),
        (in_section("ballot", "zzz = 1"), "unknown key ballot.zzz: known keys: budget_fraction, bucket_size, clip, "),
    ],
)
def test_a_misspelt_key_is_refused_and_the_right_one_named(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "privacy.epsilon: input should be greater than 0, found 0"),
        ("-1.5", "privacy.epsilon: input should be greater than 0, found -1.5"),
        ("nan", "privacy.epsilon: input should be a finite number, found nan"),
        ("inf", "privacy.epsilon: input should be a finite number, found inf"),
        ("1e999", "privacy.epsilon: input should be a finite number, found inf"),
        ("-inf", "privacy.epsilon: input should be a finite number, found -inf"),
        ("101", "privacy.epsilon: input should be less than or equal to 100, found 101"),
        ("1e300", "privacy.epsilon: input should be less than or equal to 100, found 1e+300"),
        ('"3.0"', "privacy.epsilon: input should be a number, without quotes, found '3.0'"),
        ("true", "privacy.epsilon: input should be a number, without quotes, found True"),
        ("[3.0]", "privacy.epsilon: input should be a valid number, found [3.0]"),
        ("1979-05-27", "privacy.epsilon: input should be a valid number, found datetime.date(1979, 5, 27)"),
        ("0x" + "f" * 5000, "privacy.epsilon: input should be below 2**63, found a number of thousands of digits"),
    ],
)
def test_an_epsilon_that_means_nothing_is_refused(value: str, message: str) -> None:
    assert error_of(changed("epsilon", value)) == message


def numeric_fields() -> list[tuple[str, ...]]:
    """Paths of every number in the plan."""
    found: list[tuple[str, ...]] = []

    def visit(node: object, path: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(value, (*path, key))
        elif isinstance(node, int | float) and not isinstance(node, bool):
            found.append(path)

    visit(json.loads(PLAN.model_dump_json(exclude={"candidates"})), ())
    return found


@pytest.mark.parametrize("path", numeric_fields(), ids=".".join)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1, "1", True, 2**63, None, 1e308])
def test_no_number_of_the_plan_takes_nonsense(path: tuple[str, ...], value: object) -> None:
    document: dict[str, Any] = tomllib.loads(DIGITS)
    section = document
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    allowed = (path[-1], value) == ("max_noise_to_signal", 1e308)  # a filter may be switched off
    if allowed:
        Plan.model_validate(document)
        return
    with pytest.raises(ValidationError, match=re.escape(".".join(path))):
        Plan.model_validate(document)


def test_there_are_numbers_to_try() -> None:
    assert len(numeric_fields()) > 25


@pytest.mark.parametrize("delta", ["0.000556", "0.1", "0.999"])  # 1/1797 = 0.0005565 is refused from the other side below
def test_delta_stays_below_one_over_n(delta: str) -> None:
    text = changed("num_records", "1799", changed("delta", delta))
    assert error_of(text).startswith("privacy.delta must be below 1/n = 0.000556 (n = federation.num_records = 1799), found ")


def test_a_delta_of_exactly_one_over_n_is_refused() -> None:
    assert "privacy.delta must be below 1/n" in error_of(changed("num_records", "1024", changed("delta", str(1 / 1024))))
    assert parse_plan(changed("num_records", "1023", changed("delta", str(1 / 1024)))).federation.num_records == 1023


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            changed("num_sites", "3"),
            "federation.virtual.num_sites must be at least federation.min_sites = 4, found 3: add sites or lower the minimum",
        ),
        (DIGITS + '\n[[candidates]]\nname = "cnn"\n', "candidates must differ, found cnn twice: remove one entry"),
        (
            in_section("final", "local_steps = 2"),
            (
                'final.local_steps must be 1 with privacy.noise = "shared", found 2: shared noise opens one step a round; '
                'use noise = "local" for more'
            ),
        ),
        (
            changed("max_colluding_sites", "3"),
            (
                "privacy.max_colluding_sites must be at most federation.min_sites - 2 = 2, found 3: "
                "with fewer than two honest sites a sum hides nothing; add sites or lower it"
            ),
        ),
        (
            in_section("evaluation", "curve_budget_fraction = 0.5\nrunoff_budget_fraction = 0.6"),
            (
                "evaluation.curve_budget_fraction and evaluation.runoff_budget_fraction may take 0.9 together, "
                "found 1.1: leave some for the final counts"
            ),
        ),
        (changed("min_sites", "1"), "federation.min_sites: input should be greater than or equal to 2, found 1"),
        (changed("sample_rate", "1.01"), "final.sample_rate: input should be less than or equal to 1, found 1.01"),
        (
            changed("num_rounds", "2.5"),
            "runoff.num_rounds: input should be a valid integer, got a number with a fractional part, found 2.5",
        ),
        (changed("noise", '"none"'), "privacy.noise: input should be 'shared' or 'local', found 'none'"),
        (changed("name", '"Digits\\n"'), r"name: string should match pattern '^[a-z0-9][a-z0-9_-]{0,62}$', found 'Digits\n'"),
        (changed("name", '"digits\\n"'), r"name: string should match pattern '^[a-z0-9][a-z0-9_-]{0,62}$', found 'digits\n'"),
        (changed("name", '"../x"'), "name: string should match pattern '^[a-z0-9][a-z0-9_-]{0,62}$', found '../x'"),
        (DIGITS.replace("[final]", "[finale]"), "missing key final: add it; unknown key finale: did you mean final?"),
        (DIGITS.split("[[candidates]]")[0], "missing key candidates: add it"),
        (
            "candidates = []\n" + DIGITS.split("[[candidates]]")[0],
            "candidates: tuple should have at least 1 item after validation, not 0, found []",
        ),
    ],
)
def test_a_plan_whose_parts_do_not_agree_is_refused(text: str, message: str) -> None:
    assert error_of(text) == message


def test_every_mistake_is_named_at_once() -> None:
    message = error_of(changed("epsilon", "0", changed("min_sites", "1", changed("clip", "3"))))
    assert [part.split(":")[0] for part in message.split("; ")] == ["privacy.epsilon", "federation.min_sites", "ballot.clip"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"a\\nb" = 1\n' + DIGITS, r"unknown key 'a\nb': known keys"),
        ('"\\u001b[2J" = 1\n' + DIGITS, r"unknown key '\x1b[2J': known keys"),
        (f"{'a' * 100_000} = 1\n" + DIGITS, "unknown key 'aaaaaaaaaaa"),
        (changed("name", f'"{"a" * 100_000}"'), "name: string should match pattern"),
    ],
)
def test_a_hostile_key_or_value_cannot_break_the_line_or_fill_the_screen(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "the plan must be TOML, found a syntax error: Invalid value"),
        ("a = " + "[" * 20_000, "the plan must be TOML, found brackets nested too deep"),
        ("a = " + "1" * 5000, "the plan must be TOML, found a syntax error: Exceeds the limit"),
        ("a = 1\na = 2", "the plan must be TOML, found a syntax error: Cannot overwrite a value"),
        ('name = "\\ud800"', "the plan must be TOML, found a syntax error: Escaped character is not a Unicode scalar value"),
        ("", "missing key name: add it; missing key task: add it"),
    ],
)
def test_what_is_not_toml_is_a_plan_error(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.with_name("other.toml").touch(), "expected a plan file at .*plan.toml, found nothing"),
        (lambda path: path.mkdir(), "expected a plan file at .*plan.toml, found a folder"),
        (lambda path: _write(path, b""), "missing key name"),
        (
            lambda path: _write(path, b"#" * (PLAN_LIMIT_BYTES + 1)),
            "plan.toml: a plan has at most 1000000 bytes, found 1000001",
        ),
        (lambda path: _write(path, b'name = "\xff"'), "plan.toml: a plan must be UTF-8 text, found other bytes"),
        (lambda path: _write(path, DIGITS.encode("utf-16")), "plan.toml: a plan must be UTF-8 text, found other bytes"),
    ],
    ids=["missing", "folder", "empty", "too large", "not UTF-8", "UTF-16"],
)
def test_a_file_that_is_no_plan_is_refused(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "plan.toml")
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.toml")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "plan.toml", (DIGITS + "\n#").encode().ljust(PLAN_LIMIT_BYTES, b"x"))
    assert load_plan(tmp_path / "plan.toml") == PLAN


def test_other_files_have_their_own_error(tmp_path: Path) -> None:
    with pytest.raises(SiteConfigError, match="expected a roster file"):
        read_text(tmp_path / "roster.json", "roster", SiteConfigError)


FRAGMENTS = [
    *(
        "nan",
        "inf",
        "-1",
        "0",
        "1e400",
        "0x" + "f" * 4000,
        "true",
        '"x"',
        "[]",
        "{}",
        "''",
        '"""',
        "[",
        "]]",
        "=",
        "\n",
        "\x00",
    ),
    *(
        "privacy",
        "[federation]",
        "[[candidates]]",
        "candidates = 3",
        "federation.virtual = 1",
        '"\\n" = 1',
        "\ud7ff",
        "é",
        "\u2028",
    ),
    *("name = {x = 0x" + "f" * 4000 + "}", "[final.tuning]", "[[privacy]]", ".", "1979-05-27", "25:00:00", "\r", "\x1b"),
]
edit = st.tuples(st.integers(0, len(DIGITS)), st.integers(0, 40), st.sampled_from(FRAGMENTS) | st.text(max_size=8))


def assert_plan_or_one_line(text: str) -> None:
    """Either a PlanError of one line, or a plan that survives its journey to a site; nothing else is raised."""
    plan, message = None, "-"
    try:
        plan = parse_plan(text)
    except PlanError as error:
        message = str(error)
    assert message.isprintable()
    if plan is not None:
        assert Plan.model_validate_json(plan.model_dump_json()).sha256 == plan.sha256
        assert plan.privacy.delta * plan.federation.num_records < 1


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(edit, min_size=1, max_size=4))
def test_a_mutilated_plan_is_a_plan_error_or_a_plan(changes: list[tuple[int, int, str]]) -> None:
    text = DIGITS
    for start, length, fragment in changes:
        text = text[:start] + fragment + text[start + length :]
    assert_plan_or_one_line(text)


line_edits = st.lists(
    st.tuples(st.integers(0, DIGITS.count("\n")), st.sampled_from(FRAGMENTS), st.booleans()), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(line_edits)
def test_a_plan_with_other_values_is_a_plan_error_or_a_plan(changes: list[tuple[int, str, bool]]) -> None:
    lines = DIGITS.splitlines()
    for number, fragment, keep_key in changes:
        key, _, _ = lines[number % len(lines)].partition(" = ")
        lines[number % len(lines)] = f"{key} = {fragment}" if keep_key else fragment
    assert_plan_or_one_line("\n".join(lines))


def test_the_hash_is_the_same_under_any_order_of_keys_and_with_defaults_spelt_out() -> None:
    def reverse(node: Any) -> Any:
        return {key: reverse(node[key]) for key in reversed(node)} if isinstance(node, dict) else node

    document = tomllib.loads(DIGITS)
    assert Plan.model_validate(reverse(document)).sha256 == PLAN.sha256
    assert Plan.model_validate(PLAN.model_dump()).sha256 == PLAN.sha256
    spelt = in_section("federation", "round_timeout_seconds = 60.0").replace("round_timeout_seconds = 60\n", "")
    spelt = spelt.replace("epsilon = 3.0", "epsilon = 3")
    assert parse_plan("# a comment\n" + spelt).sha256 == PLAN.sha256


def test_the_hash_is_of_json_with_defaults_spelt_out() -> None:
    document = {
        "name": "x",
        "task": {"num_classes": 2},
        "candidates": [{"name": "a"}],
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "federation": {"min_sites": 3, "num_records": 100},
        "final": {"num_rounds": 1, "sample_rate": 0.5, "learning_rate": 0.1},
    }
    assert json.loads(Plan.model_validate(document).model_dump_json())["privacy"] == {
        "epsilon": 1.0, "delta": 1e-5, "noise": "shared", "max_colluding_sites": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("epsilon", "3.0000001"), ("seed", "1"), ("name", '"digitz"'), ("min_sites", "3"), ("noise", '"local"'), ("clip", "0.3")],
)
def test_one_value_changed_gives_another_hash(key: str, value: str) -> None:
    assert parse_plan(changed(key, value)).sha256 != PLAN.sha256


def test_the_order_of_candidates_is_part_of_the_plan() -> None:
    swapped = DIGITS.replace('"cnn"', '"_"').replace('"vit"', '"cnn"').replace('"_"', '"vit"')
    assert parse_plan(swapped).sha256 != PLAN.sha256


def test_a_plan_survives_its_journey_as_json() -> None:
    again = Plan.model_validate_json(PLAN.model_dump_json())
    assert again == PLAN
    assert again.sha256 == PLAN.sha256


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.privacy.epsilon = 50.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.name = "other"  # type: ignore[misc]
    assert isinstance(PLAN.candidates, tuple)


def test_what_sums_are_divided_by_is_of_the_plan() -> None:
    assert PLAN.num_tuning_records + PLAN.num_heldout_records == PLAN.federation.num_records
    assert PLAN.expected_batch == 0.25 * 1438


@pytest.mark.parametrize(
    ("noise", "colluding", "parties"), [("shared", 0, 4), ("shared", 1, 3), ("shared", 2, 2), ("local", 0, 1), ("local", 2, 1)]
)
def test_a_share_of_the_noise_is_sized_for_the_honest_survivors_only(noise: str, colluding: int, parties: int) -> None:
    """Of five sites at least four are in every sum that opens."""
    text = changed("noise", f'"{noise}"', changed("max_colluding_sites", str(colluding)))
    assert parse_plan(text).noise_parties(5) == parties


@given(st.integers(1, 10**9))
def test_a_site_has_at_least_one_bucket_and_buckets_are_of_the_declared_size(num_records: int) -> None:
    count = PLAN.num_buckets(num_records)
    assert 1 <= count <= max(1, num_records * 0.8 / 15)


# ---- the secure sum


def of_sites(min_sites: int = 3, privacy: dict[str, Any] | None = None, **federation: Any) -> Plan:
    """A plan with these keys of its two sections."""
    return Plan.model_validate(
        {
            "name": "x",
            "task": {"num_classes": 2},
            "candidates": [{"name": "a"}],
            "privacy": {"epsilon": 1.0, "delta": 1e-5} | (privacy or {}),
            "federation": {"min_sites": min_sites, "num_records": 100} | federation,
            "final": {"num_rounds": 1, "sample_rate": 0.5, "learning_rate": 0.1},
        }
    )


def test_the_safe_choice_is_the_default() -> None:
    federation = of_sites().federation
    assert federation.secure_sum
    assert federation.ring_bits == 32
    assert federation.max_dropouts is None
    assert federation.threshold_fraction == 2 / 3
    assert (PLAN.final.aggregation, PLAN.final.num_malicious_sites) == ("mean", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ring_bits = 8", "federation.ring_bits: input should be 16, 24 or 32, found 8"),
        ("ring_bits = 64", "federation.ring_bits: input should be 16, 24 or 32, found 64"),
        ("max_dropouts = -1", "federation.max_dropouts: input should be greater than or equal to 0, found -1"),
        ("threshold_fraction = 0.5", "federation.threshold_fraction: input should be greater than or equal to 0.66666666"),
        ("threshold_fraction = 1.5", "federation.threshold_fraction: input should be less than or equal to 1, found 1.5"),
        ("secure_sum = 2", "federation.secure_sum: input should be true or false, without quotes, found 2"),
        ("secure_sum = []", "federation.secure_sum: input should be true or false, without quotes, found []"),
        ('secure_sum = "no"', "federation.secure_sum: input should be true or false, without quotes, found 'no'"),
        ("secure_sums = true", "unknown key federation.secure_sums: did you mean secure_sum?"),
    ],
)
def test_a_key_of_the_secure_sum_that_means_nothing_is_refused(line: str, message: str) -> None:
    assert error_of(in_section("federation", line)).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('aggregation = "best"', "final.aggregation: input should be 'mean', 'median', 'trimmed_mean', 'krum' or 'bulyan'"),
        ("num_malicious_sites = -1", "final.num_malicious_sites: input should be greater than or equal to 0, found -1"),
        (
            'aggregation = "krum"',
            (
                'final.aggregation = "krum" compares single updates, which a secure sum never opens: use "mean", or '
                'federation.secure_sum = false with privacy.noise = "local"'
            ),
        ),
    ],
)
def test_an_aggregation_that_cannot_be_is_refused(line: str, message: str) -> None:
    assert error_of(in_section("final", line)).startswith(message)


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean", "krum", "bulyan"])
def test_an_aggregation_of_single_updates_needs_that_each_is_private_by_itself(aggregation: str) -> None:
    text = in_section("final", f'aggregation = "{aggregation}"').replace("[federation]", "[federation]\nsecure_sum = false")
    text = changed("num_sites", "8", changed("min_sites", "8", text))
    assert error_of(text).startswith('federation.secure_sum = false needs privacy.noise = "local", found "shared"')
    assert parse_plan(changed("noise", '"local"', text)).final.aggregation == aggregation


@pytest.mark.parametrize(("aggregation", "needed"), [("median", 3), ("trimmed_mean", 3), ("krum", 5), ("bulyan", 7)])
def test_a_robust_aggregation_of_too_few_sites_is_refused(aggregation: str, needed: int) -> None:
    text = in_section("final", f'aggregation = "{aggregation}"').replace("[federation]", "[federation]\nsecure_sum = false")
    text = changed("noise", '"local"', changed("max_colluding_sites", "0", changed("num_sites", "8", text)))
    assert f"bears 1 bad sites of {needed} or more" in error_of(changed("min_sites", str(needed - 1), text))
    assert parse_plan(changed("min_sites", str(needed), text)).final.aggregation == aggregation


def test_without_the_secure_sum_the_noise_of_one_site_makes_its_release_private() -> None:
    with pytest.raises(ValidationError, match=r'federation\.secure_sum = false needs privacy\.noise = "local"'):
        of_sites(secure_sum=False)
    plan = of_sites(secure_sum=False, privacy={"noise": "local"})
    assert [plan.noise_parties(cohort) for cohort in (3, 10, 100)] == [1, 1, 1]


def test_every_key_of_the_secure_sum_is_part_of_the_hash() -> None:
    plans = [
        of_sites(),
        of_sites(ring_bits=16),
        of_sites(max_dropouts=0),
        of_sites(threshold_fraction=0.9),
        of_sites(privacy={"noise": "local"}),
        of_sites(privacy={"noise": "local"}, secure_sum=False),
    ]
    assert len({plan.sha256 for plan in plans}) == len(plans)


def test_the_plans_keys_reach_the_quorum() -> None:
    assert of_sites().quorum(10).threshold == 7
    assert of_sites(threshold_fraction=0.9).quorum(10).threshold == 10
    assert of_sites().quorum(10).min_survivors == 7
    assert of_sites(max_dropouts=1).quorum(10).min_survivors == 9
    assert of_sites(max_dropouts=9).quorum(10).min_survivors == 7  # more than a third is never survived
    assert of_sites(min_sites=8).quorum(10).min_survivors == 8
    assert of_sites(5, privacy={"max_colluding_sites": 3}).quorum(10).num_colluding == 3


@pytest.mark.parametrize("federation", [{}, {"max_dropouts": 0}, {"max_dropouts": 2}, {"threshold_fraction": 1.0}])
@pytest.mark.parametrize("colluding", [0, 1, 3])
def test_noise_is_sized_for_the_survivors_that_surely_are_honest(federation: dict[str, Any], colluding: int) -> None:
    """Never for more, or the noise of a sum would fall short of its epsilon."""
    plan = of_sites(5, privacy={"max_colluding_sites": colluding}, **federation)
    for cohort in range(5, 41):
        quorum = plan.quorum(cohort)
        assert plan.noise_parties(cohort) == quorum.noise_parties
        assert 1 <= plan.noise_parties(cohort) <= quorum.min_survivors - colluding


def test_a_cohort_below_the_plans_minimum_has_no_quorum() -> None:
    with pytest.raises(ValueError, match="expected a cohort of at least 4 sites, found 3"):
        of_sites(4).quorum(3)


def test_with_local_noise_no_two_honest_sites_are_asked_for() -> None:
    """A plan of local noise may say that all are colluding: then the quorum counts on as many as it can."""
    plan = of_sites(2, privacy={"noise": "local", "max_colluding_sites": 9})
    assert plan.quorum(3).num_colluding == 1
    assert plan.noise_parties(3) == 1


LOCAL = {"noise": "local"}


@pytest.mark.parametrize(
    ("privacy", "final", "message"),
    [
        ({}, {"local_optimizer": "adam"}, "final.local_optimizer and final.local_weight_decay are of local steps, and"),
        ({}, {"local_weight_decay": 0.1}, 'choose final.optimizer, or noise = "local"'),
        (LOCAL, {"local_weight_decay": 0.1}, 'final.local_weight_decay is of final.local_optimizer = "adamw", found "sgd"'),
        (LOCAL, {"local_optimizer": "rmsprop"}, "final.local_optimizer: input should be 'sgd', 'momentum', 'adam' or 'adamw'"),
        ({}, {"tuning": "lorra"}, "final.tuning: input should be 'head', 'lora' or 'full', found 'lorra'"),
        ({}, {"lora_rank": 0}, "final.lora_rank: input should be greater than or equal to 1, found 0"),
        ({}, {"lora_rank": 257}, "final.lora_rank: input should be less than or equal to 256, found 257"),
        ({}, {"warmup_fraction": 1.0}, "final.warmup_fraction: input should be less than 1, found 1.0"),
        ({}, {"schedule": "step"}, "final.schedule: input should be 'constant', 'linear' or 'cosine', found 'step'"),
    ],
)
def test_a_way_of_tuning_that_does_not_exist_is_refused(
    privacy: dict[str, object], final: dict[str, object], message: str
) -> None:
    document: dict[str, Any] = tomllib.loads(DIGITS)
    document["privacy"] |= privacy
    document["final"] |= final
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(document)
    assert message in explain(caught.value, Plan)


@pytest.mark.parametrize("tuning", ["head", "lora", "full"])
def test_every_way_of_tuning_is_a_plan_of_its_own(tuning: str) -> None:
    document: dict[str, Any] = tomllib.loads(DIGITS)
    document["final"]["tuning"] = tuning
    plan = Plan.model_validate(document)
    assert (plan.sha256 == PLAN.sha256) == (tuning == "head")
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_embedded_sites_hold_no_texts() -> None:
    message = error_of(changed("modality", '"text"'))
    assert message.startswith(
        'federation.virtual has images of digits only, found task.modality = "text": take the section out'
    )


def test_the_example_of_texts_is_read() -> None:
    plan = load_plan(Path(__file__).parents[2] / "plans" / "notes-lora.toml")
    assert (plan.task.modality, plan.final.tuning, plan.final.local_optimizer) == ("text", "lora", "adamw")
    assert plan.final.learning_rate_factor(1) < plan.final.learning_rate_factor(2) > plan.final.learning_rate_factor(20, 9) > 0


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": schedule, "warmup_fraction": warmup, "num_rounds": rounds, "local_steps": steps}
    for schedule in ("constant", "linear", "cosine")
    for warmup in (0.0, 0.3, math.nextafter(1, 0))
    for rounds, steps in ((1, 1), (10, 3), (10_000, 10_000))
]


@pytest.mark.parametrize("final", SCHEDULES, ids=str)
def test_no_round_or_step_makes_a_rate_that_is_zero_negative_or_above_its_value(final: dict[str, Any]) -> None:
    """A factor below zero would be gradient ascent at every site; a request's index may be any number up to 10,000."""
    found = Final(sample_rate=0.5, learning_rate=0.1, **final)
    for index in (-5, 0, 1, 2, found.num_rounds, found.num_rounds + 1, 2 * found.num_rounds, 10_000):
        for step in (-1, 0, found.local_steps - 1, found.local_steps, 10**9):
            assert 0 < found.learning_rate_factor(index, step) <= 1
    last = found.learning_rate_factor(found.num_rounds, found.local_steps - 1)
    assert found.learning_rate_factor(found.num_rounds + 7) == last


@pytest.mark.parametrize(("runoff", "final", "expected"), [(10, 4, 4), (2, 4, 2), (4, 4, 4)])
def test_a_runoff_is_never_longer_than_the_fine_tune(runoff: int, final: int, expected: int) -> None:
    document: dict[str, Any] = tomllib.loads(DIGITS)
    document["runoff"], document["final"]["num_rounds"] = {"num_rounds": runoff}, final
    assert Plan.model_validate(document).num_runoff_rounds == expected
