"""Hostile variants of good documents: the same edits for TOML, for JSON and for raw bytes.

Seeds: the cases are derived from the test's name (hypothesis ``derandomize``), so CI runs the same 10,000 each time. With
``URNA_FUZZ_RANDOM`` set they are others each time, and a failing one is kept in ``.hypothesis``.
"""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NUM_CASES = 10_000
FUZZ = settings(
    max_examples=NUM_CASES,
    deadline=None,
    derandomize="URNA_FUZZ_RANDOM" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
Edit = tuple[str, int, Any]
SECRET = "hunter2-9d1c"  # of a database; planted in documents, and no part of any message
MESSAGE_LIMIT = 2000

DEEP: Any = 1
for _ in range(60):
    DEEP = {"a": [DEEP]}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e-3, 1e3, 1e300, 1.7e308, math.nan, math.inf, -math.inf),
    *("", "1", "3.0", "true", "nan", "a", "A", "a\n", "../x", "/etc/passwd", "a\0b", "x" * 300, "x" * 5_000, "\x1b[2J"),
    *("é", "\u2028", "\u202e", "0" * 64, "f" * 128, "operator", "site-1", "١٢", f"postgresql://u:{SECRET}@host/d"),
    *([], [[]], [1, "a"], ["a", "a"], ["a"] * 300, {}, {"a": 1}, {"": ""}, DEEP),
]
KEYS = ["x", "name", "", "a" * 300, "a\nb", "é", "version", "__class__", "kind", "epsilonn", "password"]
OPERATIONS = ["replace", "replace", "replace", "remove", "add", "rename", "double", "wrap", "swap"]
_edit = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 10**6), st.sampled_from(VALUES) | st.integers() | st.floats())
edits = st.lists(_edit, min_size=1, max_size=1) | st.lists(_edit, min_size=1, max_size=4)
FRAGMENTS = [
    *(b"", b"[", b"]]", b"{", b"}", b'"', b"'''", b"=", b"\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b"[" * 1500, b"a." * 1500, b"1" * 5000, b"0x" + b"f" * 4000, b"nan", b"1e999", b"-1", b"true", b"\\ud800", b"1979-05-27"),
]
byte_edits = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from(FRAGMENTS) | st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every key of every section and every index of every list: container and key."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        found += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def mutated(document: Any, changes: list[Edit]) -> Any:
    """A copy with each edit applied to a place that its number chooses."""
    changing = json.loads(json.dumps(document))
    for operation, number, drawn in changes:
        value = copy.deepcopy(drawn)  # later edits may change it
        known = places(changing)[:1000]
        if not known:
            break
        node, key = known[number % len(known)]
        match operation:
            case "replace":
                node[key] = value
            case "remove":
                del node[key]
            case "wrap":
                node[key] = [node[key]] if number % 2 else {"a": node[key]}
            case "swap":
                other, other_key = known[number // 7 % len(known)]
                taken = json.loads(json.dumps(other[other_key], default=str))
                node[key] = taken
            case "add" if isinstance(node, dict):
                node[KEYS[number % len(KEYS)]] = value
            case "rename" if isinstance(node, dict):
                node[KEYS[number % len(KEYS)]] = node.pop(key)
            case _:  # "double", and whatever does not fit a list
                if isinstance(node, list):
                    node.append(copy.deepcopy(node[key]))
                else:
                    node[f"{key}{key}"] = copy.deepcopy(node[key])
    return changing


def spliced(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes with each edit at a place that its number chooses."""
    for number, length, fragment in changes:
        at = number % (len(content) + 1)
        content = content[:at] + fragment + content[at + length :]
    return content


def toml_of(document: dict[str, Any], twice: bool = False) -> bytes:
    """As TOML, sections inline; with ``twice`` its first key comes twice. None has no form in TOML: a mistake."""
    lines = [f"{_string(key)} = {_toml(value)}" for key, value in document.items()]
    return "\n".join([*lines, *(lines[:1] if twice else ())]).encode("utf-8", "replace")


def _toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{_string(key)} = {_toml(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case bool():
            return "true" if value else "false"
        case int():
            return hex(value) if value > 2**200 else str(value)
        case float():
            return repr(value)
        case None:
            return "null"  # no TOML: a syntax error
    return _string(str(value))


def _string(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


def one_line(error: BaseException, *secrets: str) -> str:
    """The message of an error that a person is shown: one printable line that is not long and tells no secret."""
    text = str(error)
    assert text, "an empty message"
    assert text.isprintable(), text[:500]
    assert len(text) < MESSAGE_LIMIT, f"{len(text)} characters: {text[:500]}"
    assert "Traceback" not in text
    for secret in (SECRET, *secrets):
        assert secret not in text, text
    return text


def fingerprint(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Every file of a folder: size, time of change, mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns, status.st_mode, content)
    return found


def must_fail(check: Callable[[], object]) -> None:
    """A planted mutant: the property that it breaks has to notice."""
    try:
        check()
    except Exception:
        return
    raise RuntimeError("the property held although it was broken on purpose")
