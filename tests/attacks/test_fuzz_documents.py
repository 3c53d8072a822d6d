"""Documents that a person writes or hands over, altered in every way: each is read, or refused in one line, and nothing else.

Cases: 10,000 each, half of them altered keys and values of the parsed document, half altered bytes (`mutations`).
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.attacks.mutations import (
    FUZZ,
    MESSAGE_LIMIT,
    NUM_CASES,
    SECRET,
    Edit,
    byte_edits,
    edits,
    fingerprint,
    must_fail,
    mutated,
    one_line,
    spliced,
    toml_of,
)
from tests.client.clinic import a_signer
from urna.client.config import CONFIG_FILE, SiteConfig, load_site_config
from urna.protocol.errors import BadInputError, PlanError, SiteConfigError
from urna.protocol.identity import OPERATOR, Roster, create_consortium, load_roster
from urna.protocol.plan import Plan, load_plan
from urna.server.consortium import Consortium, load_consortium

PLANS = Path(__file__).parents[2] / "plans"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SITE: dict[str, Any] = {
    "name": "site-1",
    "dataset": [
        {
            "url": f"postgresql://u:{SECRET}@host/d",
            "name": "visits",
            "format": "sql",
            "modality": "table",
            "num_records": 1000,
            "query": "SELECT * FROM visits",
            "labels": ["no", "yes"],
            "person_column": "person",
            "max_records_per_person": 3,
            "columns": [
                {"name": "age", "type": "number", "minimum": 0.0, "maximum": 120.0},
                {"name": "ward", "type": "category", "categories": ["a", "b"]},
            ],
            "deidentify": [
                {"column": "age", "action": "generalise", "to": "band", "width": 5.0, "minimum": 0.0, "maximum": 90.0},
                {"column": "person", "action": "keyed_hash"},
            ],
        },
        {
            "name": "scans",
            "format": "images",
            "modality": "image",
            "num_records": 60,
            "path": "scans",
            "num_classes": 3,
            "image_height": 8,
            "image_width": 8,
        },
    ],
    "policy": {
        "epsilon_total": 8.0,
        "epsilon_per_campaign": 4.0,
        "delta": 1e-4,
        "min_cohort": 3,
        "required_peers": ["site-2"],
        "operators": ["0" * 128],
        "approval_required": False,
    },
    "vault": {"folder": ".", "anchor": "ledger.anchor"},
    "link": {"superlink": "fleet.example.org:443", "runtime_port": 9094, "allowed_bundles": ["0" * 64]},
}
PLAN: dict[str, Any] = json.loads(json.dumps(tomllib.loads((PLANS / "digits.toml").read_text("utf-8"))))
CONSORTIUM: dict[str, Any] = json.loads(json.dumps(tomllib.loads((PLANS / "consortium.toml").read_text("utf-8"))))
altered = st.one_of(edits.map(lambda e: (e, None)), byte_edits.map(lambda e: (None, e)))


def content_of(good: dict[str, Any], change: tuple[list[Edit] | None, Any]) -> bytes:
    """A TOML document after its edits."""
    structural, raw = change
    if structural is None:
        return spliced(toml_of(good), raw)
    return toml_of(mutated(good, structural), twice=structural[0][1] % 97 == 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with other files in it, which must be as they are afterwards."""
    path = tmp_path_factory.mktemp("site")
    for name in ("ledger.sqlite", "data.key"):
        (path / name).write_bytes(name.encode())
    before = fingerprint(path)
    yield path
    after = fingerprint(path)
    assert {name: after[name] for name in before} == before
    assert len(after) <= len(before) + 1  # the document itself


# ---- what holds of everything that is read


def number_paths(node: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], object]]:
    """All numbers of a read document and where they are."""
    if isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from number_paths(value, (*path, key))
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node


def at(document: Any, path: tuple[Any, ...]) -> object:
    """What a document says at a path; None where it leaves the default."""
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document


def check_bounds(model: BaseModel) -> None:
    """Every bound that a model's fields declare, tested again by other code."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        for limit in () if value is None else field.metadata:
            for bound, holds in LIMITS.items():
                assert not hasattr(limit, bound) or holds(value, getattr(limit, bound)), (name, value, limit)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, BaseModel):
                check_bounds(one)


LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda value, limit: value > limit,
    "ge": lambda value, limit: value >= limit,
    "lt": lambda value, limit: value < limit,
    "le": lambda value, limit: value <= limit,
    "min_length": lambda value, limit: len(value) >= limit,
    "max_length": lambda value, limit: len(value) <= limit,
}


def check_numbers(model: BaseModel, document: Any) -> None:
    """What was read as a number was written as one, finite and without quotes, and fits in 64 bits."""
    for path, found in number_paths(model.model_dump()):
        written = at(document, path)
        assert written is None or (isinstance(written, int | float) and not isinstance(written, bool)), (path, written)
        assert not isinstance(found, float) or math.isfinite(found), (path, found)
        assert not isinstance(found, int) or abs(found) < 2**63, (path, found)


def check_site(config: SiteConfig) -> None:
    policy = config.policy
    assert NAME.fullmatch(config.name)
    assert 0 < policy.epsilon_total <= 1000
    assert 0 < policy.epsilon_per_campaign <= 1000
    assert 0 < policy.delta < 1
    assert policy.min_cohort >= 2
    assert 2 / 3 <= policy.threshold_fraction <= 1
    assert 1 <= len({one.name for one in config.dataset}) == len(config.dataset)
    for one in config.dataset:
        assert 1 <= one.num_records <= 10**12  # what a `Member` can declare
        assert len(one.label_names) >= 2
        for path in (one.path, one.manifest):
            assert path is None or (path and not path.startswith("/") and ".." not in path.split("/"))
    assert SiteConfig.model_validate(config.model_dump(exclude_unset=True)) == config


def check_plan(plan: Plan) -> None:
    assert NAME.fullmatch(plan.name)
    assert all(NAME.fullmatch(one.name) for one in plan.candidates)
    assert 1 <= len({one.name for one in plan.candidates}) == len(plan.candidates) <= 64
    assert 0 < plan.privacy.epsilon <= 100
    assert 0 < plan.privacy.delta < 1 / plan.federation.num_records
    assert plan.federation.min_sites >= 2
    assert plan.privacy.noise == "local" or plan.privacy.max_colluding_sites <= plan.federation.min_sites - 2
    assert plan.federation.secure_sum or plan.privacy.noise == "local"
    assert Plan.model_validate_json(plan.model_dump_json()).sha256 == plan.sha256


def check_consortium(consortium: Consortium) -> None:
    names = [one.name for one in consortium.site]
    assert OPERATOR not in names
    assert len(set(names)) == len(names)
    assert all(NAME.fullmatch(name) for name in (consortium.name, *names))
    hosts = [consortium.operator.address, consortium.operator.superlink, *consortium.operator.also]
    assert all(re.fullmatch(r"[a-z0-9.:\[\]-]+", host) for host in hosts), hosts  # they go into other programs' files


def check_refusal(error: BadInputError, refusal: type[BadInputError]) -> None:
    assert type(error) is refusal
    one_line(error)


def read_or_refused(
    folder: Path, name: str, content: bytes, load: Callable[[Path], Any], refusal: type[BadInputError], check: Any
) -> bool:
    """The property; whether the document was read."""
    (folder / name).write_bytes(content)
    try:
        read = load(folder / name)
    except refusal as error:
        check_refusal(error, refusal)
        return False
    check_bounds(read)
    check(read)
    if name.endswith(".toml"):
        check_numbers(read, tomllib.loads((folder / name).read_text("utf-8")))
    return True


DOCUMENTS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any], type[BadInputError], Any]] = {
    "site": (CONFIG_FILE, SITE, lambda path: load_site_config(path.parent), SiteConfigError, check_site),
    "plan": ("plan.toml", PLAN, load_plan, PlanError, check_plan),
    "consortium": ("consortium.toml", CONSORTIUM, load_consortium, BadInputError, check_consortium),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_is_read_or_refused_in_one_line(folder: Path, kind: str) -> None:
    name, good, load, refusal, check = DOCUMENTS[kind]
    assert read_or_refused(folder, name, toml_of(good), load, refusal, check)
    counts = {True: 0, False: 0}

    @FUZZ
    @given(altered)
    def holds(change: tuple[list[Edit] | None, Any]) -> None:
        counts[read_or_refused(folder, name, content_of(good, change), load, refusal, check)] += 1

    holds()
    (folder / name).unlink()
    assert min(counts.values()) > NUM_CASES // 100, counts  # the cases are hostile, and not all of them


@pytest.fixture(scope="module")
def roster(tmp_path_factory: pytest.TempPathFactory) -> Roster:
    return create_consortium(tmp_path_factory.mktemp("keys"), ["site-1", "site-2"])


def check_roster(roster: Roster) -> None:
    keys = [roster.operator, *roster.sites.values()]
    assert OPERATOR not in roster.sites
    assert all(NAME.fullmatch(name) for name in roster.sites)
    assert all(re.fullmatch("[0-9a-f]{128}", key) for key in keys)
    for half in (slice(0, 64), slice(64, 128)):
        assert len({key[half] for key in keys}) == len(keys)
    for name in (OPERATOR, *roster.sites):
        roster.sealing_key_of(name)


def roster_content(good: dict[str, Any], change: tuple[list[Edit] | None, Any]) -> bytes:
    structural, raw = change
    if structural is None:
        return spliced(json.dumps(good).encode(), raw)
    return json.dumps(mutated(good, structural)).encode()


def test_a_roster_is_read_or_refused_in_one_line(folder: Path, roster: Roster) -> None:
    good = json.loads(roster.model_dump_json())
    counts = {True: 0, False: 0}

    @FUZZ
    @given(altered)
    def holds(change: tuple[list[Edit] | None, Any]) -> None:
        content = roster_content(good, change)
        counts[read_or_refused(folder, "roster.json", content, load_roster, SiteConfigError, check_roster)] += 1

    holds()
    (folder / "roster.json").unlink()
    assert min(counts.values()) > NUM_CASES // 100, counts


# ---- single cases, which the edits above reach seldom or never


CASES: dict[str, bytes] = {
    "an integer of 5000 digits": b"a = " + b"1" * 5000,
    "brackets of 20,000 levels": b"a = " + b"[" * 20_000,
    "a dotted key of 20,000 parts": b"name" + b".a" * 20_000 + b" = 1",
    "3,000 unknown keys": b"\n".join(b"k%d = 1" % number for number in range(3000)),
    "a key of 900,000 letters": b"a" * 900_000 + b" = 1",
    "a text of 900,000 letters": b'name = "' + b"a" * 900_000 + b'"',
    "10,000 candidates and data sets": b"[[candidates]]\n[[dataset]]\n[[site]]\n" * 10_000,
    "a key twice": b"name = 1\nname = 2",
    "UTF-16": 'name = "a"'.encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_that_is_made_to_break_its_reader_is_refused_in_one_line(folder: Path, kind: str, case: str) -> None:
    name, _, load, refusal, check = DOCUMENTS[kind]
    assert not read_or_refused(folder, name, CASES[case], load, refusal, check)
    (folder / name).unlink()


NUMBERS_THAT_MAY_BE_LEFT_OUT = [
    ("plan", "federation", "max_dropouts"),
    ("site", "dataset", "num_classes"),
    ("site", "dataset", "image_height"),
    ("consortium", "operator", "certificate_days"),
]


@pytest.mark.parametrize("value", ["2", True, 10**30])
@pytest.mark.parametrize(("kind", "section", "key"), NUMBERS_THAT_MAY_BE_LEFT_OUT)
def test_an_optional_number_is_as_strict_as_any_other(folder: Path, kind: str, section: str, key: str, value: object) -> None:
    name, good, load, refusal, check = DOCUMENTS[kind]
    document = json.loads(json.dumps(good))
    where = document[section][-1] if isinstance(document[section], list) else document[section]
    where[key] = value
    assert not read_or_refused(folder, name, toml_of(document), load, refusal, check)
    (folder / name).unlink()


def test_a_password_in_a_url_is_in_no_message(folder: Path) -> None:
    name, good, load, refusal, check = DOCUMENTS["site"]
    data = good["dataset"][0]
    for change in ({"url_variable": "URL"}, {"url": [data["url"]]}, {"url_variable": [data["url"]]}, {"name": data["url"]}):
        content = toml_of(good | {"dataset": [data | change]})
        assert not read_or_refused(folder, name, content, load, refusal, check)
    (folder / name).unlink()


# ---- planted mutants


def test_mutants_of_the_reader_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, good, load, refusal, check = DOCUMENTS["site"]

    def reads(document: dict[str, Any], by: Callable[[Path], Any] = load) -> Callable[[], None]:
        def run() -> None:
            read_or_refused(folder, name, toml_of(document), by, refusal, check)

        return run

    def without_bounds(path: Path) -> SiteConfig:
        config = load_site_config(path.parent)
        return config.model_copy(update={"policy": config.policy.model_copy(update={"delta": 1.0})})

    def without_strictness(path: Path) -> SiteConfig:
        written = path.read_bytes()
        path.write_bytes(written.replace(b'"120.0"', b"120.0"))
        config = load_site_config(path.parent)
        path.write_bytes(written)
        return config

    def with_many_lines(*_: object) -> str:
        return "one\ntwo"

    quoted = json.loads(json.dumps(good))
    quoted["dataset"][0]["columns"][0]["maximum"] = "120.0"
    reads(good)()
    must_fail(reads(good, without_bounds))
    must_fail(reads(quoted, without_strictness))
    wrong = good | {"policy": good["policy"] | {"delta": 2.0}}
    reads(wrong)()
    for explained in (with_many_lines, lambda *_: "x" * MESSAGE_LIMIT, lambda *_: SECRET, lambda *_: 1 / 0):
        with monkeypatch.context() as patch:
            patch.setattr("urna.client.config.explain", explained)
            must_fail(reads(wrong))
    (folder / name).unlink()


def check_all(plan: Plan) -> None:
    check_bounds(plan)
    check_plan(plan)


def test_mutants_of_the_schema_are_noticed() -> None:
    plan = Plan.model_validate(PLAN)
    for broken in (
        plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"delta": 0.5})}),
        plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"epsilon": 101.0})}),
        plan.model_copy(update={"name": "../x"}),
        plan.model_copy(update={"candidates": ()}),
    ):
        must_fail(partial(check_all, broken))
    key = a_signer("a").public_key_hex
    twice = Roster.model_construct(operator=key, sites={"a": key})
    must_fail(lambda: check_roster(twice))


def test_a_touched_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"a")
    before = fingerprint(tmp_path)
    (tmp_path / "ledger.sqlite").write_bytes(b"a")
    assert fingerprint(tmp_path) != before
