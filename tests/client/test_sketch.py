import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.client.refusals import CANARY
from urna.client import sketch
from urna.client.records import Images, Inputs, Records, Table, Texts
from urna.client.sketch import Charged, Sketch, charged_with, may_split_differently, overlap, shares_records, sketch_of
from urna.protocol.errors import LedgerError

KEY = b"k" * 32
FALSE_ALARM = 1e-6


def records_of(numbers: Sequence[int], prefix: str = "r", content: int = 0, kind: str = "texts") -> Records:
    """Record n has the id ``<prefix>n``, and a content that n and ``content`` decide."""
    ids = tuple(f"{prefix}{n}" for n in numbers)
    values = np.array(numbers, np.float64) + 1_000_000.0 * content
    inputs: dict[str, Inputs] = {
        "texts": Texts(tuple(f"{CANARY} number {value:g}" for value in values)),
        "images": Images((values[:, None, None] * np.ones((1, 2, 3)) / 1e9).astype(np.float32)),
        "table": Table({"x": values, "y": -values}),
    }
    return Records(ids, ids, np.zeros(len(ids), np.int64), inputs[kind])


def the_sketch(numbers: Sequence[int], prefix: str = "r", content: int = 0, key: bytes = KEY) -> Sketch:
    return sketch_of(records_of(numbers, prefix, content), key)


KINDS = pytest.mark.parametrize("kind", ["texts", "images", "table"])


@KINDS
def test_renamed_dataset_same_budget(kind: str) -> None:
    """Nothing of a sketch depends on where records lie, in which order, or what their labels are."""
    records = records_of(range(50), kind=kind)
    other = records_of(range(49, -1, -1), kind=kind)
    other = replace(other, labels=np.ones(50, np.int64))
    assert sketch_of(records, KEY).to_bytes() == sketch_of(other, KEY).to_bytes()


@KINDS
def test_a_copy_with_new_ids_is_seen_by_its_content(kind: str) -> None:
    one, other = sketch_of(records_of(range(50), kind=kind), KEY), sketch_of(records_of(range(50), "new", kind=kind), KEY)
    assert not np.intersect1d(one.ids.values, other.ids.values).size
    assert overlap(one, other) == 1


@KINDS
def test_the_same_persons_with_new_contents_are_seen_by_their_ids(kind: str) -> None:
    one, other = sketch_of(records_of(range(50), kind=kind), KEY), sketch_of(records_of(range(50), content=1, kind=kind), KEY)
    assert not np.intersect1d(one.contents.values, other.contents.values).size
    assert overlap(one, other) == 1


def test_subset_charged_to_parent() -> None:
    parent = the_sketch(range(1000))
    assert overlap(parent, the_sketch(range(0, 1000, 10))) == 1
    assert overlap(the_sketch([7], "new"), parent) == 1


def test_two_parts_and_another_partition_of_them_are_seen() -> None:
    parts = [the_sketch(range(500)), the_sketch(range(500, 1000))]
    assert not shares_records(*parts)
    across = the_sketch(range(250, 750), "new")
    assert [overlap(across, part) for part in parts] == [0.5, 0.5]


def test_one_common_record_among_thousands_is_seen() -> None:
    one, other = the_sketch(range(5000)), the_sketch([4999, *range(10_000, 15_000)], "new", 0)
    assert shares_records(one, other)
    assert overlap(one, other) == 1 / 5000


def test_other_records_share_nothing() -> None:
    """Two of 4,000 values collide by chance once in 10**12."""
    one, other = the_sketch(range(2000)), the_sketch(range(2000, 4000), "new", 1)
    assert not shares_records(one, other)
    assert overlap(one, other) == 0


def test_two_keys_give_unrelated_sketches() -> None:
    one, other = the_sketch(range(2000)), the_sketch(range(2000), key=b"other" * 8)
    assert not shares_records(one, other)
    assert not np.intersect1d(one.ids.values, one.contents.values).size


def test_no_record_and_no_hash_without_the_key_is_in_a_sketch() -> None:
    data = the_sketch(range(100)).to_bytes()
    assert CANARY.encode() not in data
    for n in range(100):
        for value in (f"r{n}", f"sketch-id\0r{n}", f"{CANARY} number {n}"):
            assert hashlib.sha256(value.encode()).digest()[:8] not in data


def test_one_persons_records_are_one_id() -> None:
    records = records_of(range(10))
    one = sketch_of(replace(records, units=("p", "q") * 5), KEY)
    assert (len(one.ids.values), len(one.contents.values)) == (2, 10)
    assert overlap(one, sketch_of(replace(records_of([77], content=5), units=("p",)), KEY)) == 1


def test_texts_that_differ_in_case_and_spacing_are_the_same() -> None:
    ids = ("a",)
    one = Records(ids, ids, np.zeros(1, np.int64), Texts(("Some  Text\n",)))
    other = Records(("b",), ("b",), np.zeros(1, np.int64), Texts(("some text",)))
    assert overlap(sketch_of(one, KEY), sketch_of(other, KEY)) == 1


def test_zero_and_minus_zero_are_the_same() -> None:
    for make in (lambda zero: Table({"x": np.array([zero])}), lambda zero: Images(np.full((1, 1, 1), zero, np.float32))):
        sketches = [sketch_of(Records((i,), (i,), np.zeros(1, np.int64), make(z)), KEY) for i, z in (("a", 0.0), ("b", -0.0))]
        assert overlap(*sketches) == 1


def test_records_of_another_kind_or_shape_share_nothing() -> None:
    ids, labels = ("a",), np.zeros(1, np.int64)
    inputs: list[Inputs] = [
        Images(np.zeros((1, 2, 3), np.float32)),
        Images(np.zeros((1, 3, 2), np.float32)),
        Table({name: np.zeros(1) for name in "abc"}),
        Texts(("",)),
    ]
    values = {int(sketch_of(Records(ids, ids, labels, one), KEY).contents.values[0]) for one in inputs}
    assert len(values) == len(inputs)


def test_an_empty_data_set_shares_nothing() -> None:
    empty = the_sketch([])
    assert overlap(empty, the_sketch(range(10))) == overlap(empty, empty) == 0
    assert Sketch.from_bytes(empty.to_bytes()) is not None


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.integers(0, 300), max_size=120),
    st.sets(st.integers(0, 300), max_size=120),
    st.booleans(),
    st.booleans(),
)
def test_overlaps_of_small_sets_are_exact(one: set[int], other: set[int], renumbered: bool, changed: bool) -> None:
    """Two of 240 values collide by chance once in 10**14."""
    sketches = the_sketch(sorted(one)), the_sketch(sorted(other), "new" if renumbered else "r", 1 if changed else 0)
    common = 0 if renumbered and changed else len(one & other)
    smaller = min(len(one), len(other))
    assert overlap(*sketches) == overlap(*sketches[::-1]) == (common / smaller if smaller else 0)
    assert shares_records(*sketches) == bool(common)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1000, 20_000), st.integers(1000, 20_000), st.floats(0, 1))
def test_overlaps_of_sampled_sets_are_estimates_without_bias(seed: int, size: int, other_size: int, share: float) -> None:
    """A fair sample leaves its bounds once in a million, for one of the 40 cases once in 25,000.

    The sketch holds at most 500 values here, as it would hold 65,536 of millions.
    """
    common = int(share * min(size, other_size))
    one = range(size)
    other = [*range(common), *range(10**6, 10**6 + other_size - common)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch, "MAX_KEPT", 500)
        key = seed.to_bytes(32, "little")
        one_sketch, other_sketch = the_sketch(one, key=key), the_sketch(other, "new", key=key)
    rate_exp = max(one_sketch.contents.rate_exp, other_sketch.contents.rate_exp)
    assert rate_exp > 0
    assert max(len(one_sketch.contents.values), len(other_sketch.contents.values)) <= 500
    kept = len(np.intersect1d(one_sketch.contents.at(rate_exp), other_sketch.contents.at(rate_exp)))
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], common, 2.0**-rate_exp) if common else (0, 0)
    assert low <= kept <= high
    assert shares_records(one_sketch, other_sketch) == (kept > 0)


def test_a_sample_is_the_same_whoever_drew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a coarser sketch keeps, a finer one holds too: sets of different sizes can be compared."""
    monkeypatch.setattr(sketch, "MAX_KEPT", 100)
    small, large = the_sketch(range(90)), the_sketch(range(3000))
    assert small.contents.rate_exp == 0
    assert large.contents.rate_exp in (5, 6)
    assert set(small.contents.at(large.contents.rate_exp)) <= set(large.contents.values)


def test_the_rate_is_the_smallest_that_leaves_few_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = the_sketch(range(3000)).ids.values
    monkeypatch.setattr(sketch, "MAX_KEPT", 100)
    sampled = the_sketch(range(3000)).ids
    np.testing.assert_array_equal(sampled.values, everything[everything < 2**64 >> sampled.rate_exp])
    assert (everything < 2**64 >> (sampled.rate_exp - 1)).sum() > 100


def test_a_sketch_comes_back_from_its_bytes() -> None:
    one = the_sketch(range(300))
    again = Sketch.from_bytes(one.to_bytes())
    np.testing.assert_array_equal(one.ids.values, again.ids.values)
    np.testing.assert_array_equal(one.contents.values, again.contents.values)
    assert again.sha256 == one.sha256 == hashlib.sha256(one.to_bytes()).hexdigest()
    assert overlap(one, again) == 1


@pytest.mark.parametrize(
    ("numbers", "prefix", "content", "moves"),
    [
        (range(50), "r", 0, False),  # the very same
        (range(10), "r", 0, False),  # a part
        (range(25, 99), "r", 0, False),  # some of them among others
        (range(50), "r", 1, False),  # other contents of the same persons
        (range(200, 250), "q", 0, False),  # nothing in common
        (range(50), "new", 0, True),  # all renamed
        (range(10), "new", 0, True),  # a part, renamed
    ],
)
def test_renamed_records_may_have_changed_sides_and_others_not(numbers: range, prefix: str, content: int, moves: bool) -> None:
    one, other = the_sketch(range(50)), the_sketch(numbers, prefix, content)
    assert may_split_differently(one, other) == may_split_differently(other, one) == moves


def test_some_renamed_records_among_others_of_the_same_names_may_have_changed_sides() -> None:
    """An operator's friend at the site renames ten of fifty."""
    mixed = Records(
        tuple(f"{'new' if n < 10 else 'r'}{n}" for n in range(50)),
        tuple(f"{'new' if n < 10 else 'r'}{n}" for n in range(50)),
        np.zeros(50, np.int64),
        records_of(range(50)).inputs,
    )
    assert may_split_differently(the_sketch(range(50)), sketch_of(mixed, KEY))


def with_ids(ids: Sequence[str]) -> Sketch:
    """The records 0, 1, ... under these ids."""
    inputs = records_of(range(len(ids))).inputs
    return sketch_of(Records(tuple(ids), tuple(ids), np.zeros(len(ids), np.int64), inputs), KEY)


def test_ids_that_were_dealt_anew_among_the_same_records_are_a_renaming() -> None:
    """An export that numbers rows 1 to n, sorted another way: the same ids, the same contents, other pairs."""
    one, other = with_ids([str(at) for at in range(50)]), with_ids([str(49 - at) for at in range(50)])
    assert overlap(one, other) == 1
    assert may_split_differently(one, other)
    assert charged_with(2, {1: one, 2: other}) == Charged(frozenset({1, 2}), frozenset({1}))


def test_sampling_makes_no_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large sets are compared by samples; half of the records exchanged, none renamed."""
    monkeypatch.setattr(sketch, "MAX_KEPT", 200)
    for start in range(500, 1500, 50):
        assert not may_split_differently(the_sketch(range(1000)), the_sketch(range(start, start + 1000)))


# data sets by what they are: ids r or q, contents 0, 1 or 2
KIN = {
    1: the_sketch(range(50), "r", 0),
    2: the_sketch(range(50), "q", 0),  # 1, renamed
    3: the_sketch(range(50), "q", 1),  # 2 with new values: shares nothing with 1
    4: the_sketch(range(50), "r", 2),  # 1 with new values
    5: the_sketch(range(200, 250), "z", 3),  # others
    6: the_sketch(range(40, 60), "r", 0),  # some of 1 among others
}


@pytest.mark.parametrize(
    ("dataset", "sharing", "renamed"),
    [
        (1, {1, 2, 3, 4, 6}, {2, 3}),
        (2, {1, 2, 3, 4, 6}, {1, 4, 6}),
        (3, {1, 2, 3, 4, 6}, {1, 4, 6}),
        (4, {1, 2, 3, 4, 6}, {2, 3}),
        (5, {5}, set()),
        (6, {1, 2, 3, 4, 6}, {2, 3}),
    ],
)
def test_renaming_in_two_steps_is_followed(dataset: int, sharing: set[int], renamed: set[int]) -> None:
    """New ids first, and then new values under them: nothing is left of the first data set in the third."""
    assert not shares_records(KIN[1], KIN[3])
    assert charged_with(dataset, KIN) == Charged(frozenset(sharing), frozenset(renamed))


def test_windows_that_roll_on_share_with_their_neighbours_only() -> None:
    """Each month the last twelve: patients of this year do not pay for those of five years ago."""
    windows = {month: the_sketch(range(10 * month, 10 * month + 120)) for month in range(60)}
    charged = charged_with(30, windows)
    assert charged == Charged(frozenset(range(19, 42)), frozenset())


def altered(change: str) -> bytes:
    data = the_sketch(range(3)).to_bytes()
    body = np.frombuffer(data, "<u8", offset=31)
    return {
        "nothing": b"",
        "other bytes": b"x" * len(data),
        "too short": data[:-1],
        "too long": data + b"\0",
        "not sorted": data[:31] + body[::-1].tobytes(),
        "equal values": data[:31] + np.full(9, 7, "<u8").tobytes(),
        "a rate that its values do not have": data[:16] + b"\x1f\x00" + data[18:],
        "an impossible rate": data[:16] + b"\xff\x00" + data[18:],
        "pickle": b"\x80\x04" + data,
    }[change]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing", "expected a sketch of records, found 0 other bytes"),
        ("other bytes", "expected a sketch of records, found 103 other bytes"),
        ("too short", "expected a sketch of 9 values, found 102 bytes"),
        ("too long", "expected a sketch of 9 values, found 104 bytes"),
        ("not sorted", "expected a sketch with few, sorted, small values"),
        ("equal values", "expected a sketch with few, sorted, small values"),
        ("a rate that its values do not have", "expected a sketch with few, sorted, small values"),
        ("an impossible rate", "expected a sketch with few, sorted, small values"),
        ("pickle", "expected a sketch of records"),
    ],
)
def test_an_altered_sketch_is_refused(change: str, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        Sketch.from_bytes(altered(change))
