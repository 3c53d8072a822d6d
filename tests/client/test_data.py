import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.client.clinic import CANARY, write_records
from urna.client import data
from urna.client.data import DataConfig, Records, buckets, keyed_uniform, load_records, split
from urna.protocol.errors import SiteConfigError

FALSE_ALARM = 1e-6
CONFIG = DataConfig(path="records.csv", num_records=60, num_classes=3, image_height=8, image_width=8, max_value=16.0)
SMALL = DataConfig(path="records.csv", num_records=60, num_classes=3, image_height=1, image_width=2, max_value=16.0)
HEADER = "id,label,p0,p1"


def of_ids(ids: list[str]) -> Records:
    return Records(tuple(ids), np.zeros((len(ids), 1, 1), np.float32), np.zeros(len(ids), np.int64))


def written(folder: Path, *lines: str) -> Path:
    (folder / "records.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_records_are_read_as_declared(tmp_path: Path) -> None:
    records = load_records(written(tmp_path, "p0,label,id,p1", "8,2,a,16", "0,0,b,4"), SMALL)
    assert records.ids == ("a", "b")
    assert records.labels.tolist() == [2, 0]
    assert records.images.tolist() == [[[0.5, 1.0]], [[0.0, 0.25]]]
    assert records.images.dtype == np.float32


def test_a_path_with_dots_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    written(tmp_path, HEADER)
    with pytest.raises(SiteConfigError, match=r"must stay inside the site's folder, found '../records.csv'"):
        load_records(tmp_path / "site", SMALL.model_copy(update={"path": "../records.csv"}))


def test_an_absolute_path_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    outside = written(tmp_path, HEADER) / "records.csv"
    with pytest.raises(SiteConfigError, match="must stay inside the site's folder"):
        load_records(tmp_path / "site", SMALL.model_copy(update={"path": str(outside)}))


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_symbolic_link_cannot_leave_the_folder(tmp_path: Path, what: str) -> None:
    (tmp_path / "site").mkdir()
    outside = written(tmp_path, HEADER)
    link = tmp_path / "site" / "link"
    link.symlink_to(outside / "records.csv" if what == "file" else outside)
    path = "link" if what == "file" else "link/records.csv"
    with pytest.raises(SiteConfigError, match="must stay inside the site's folder"):
        load_records(tmp_path / "site", SMALL.model_copy(update={"path": path}))


def test_a_missing_file_is_an_error_and_not_an_empty_data_set(tmp_path: Path) -> None:
    with pytest.raises(SiteConfigError, match=r"expected a file 'records.csv' in the site's folder, found none"):
        load_records(tmp_path, SMALL)


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "RECORDS_LIMIT_BYTES", 10)
    with pytest.raises(SiteConfigError, match="at most 10 bytes are read, found 11"):
        load_records(written(tmp_path, "x" * 10), SMALL)


def test_no_more_rows_are_read_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS_LIMIT", 2)
    rows = ["a,1,2,3", "b,1,2,3", "c,1,2,3", "not even a row"]
    with pytest.raises(SiteConfigError, match="at most 2 rows are read, found more"):
        load_records(written(tmp_path, HEADER, *rows), SMALL)


WRONG = {
    "no id column": (["name,label,p0,p1"], "expected one column 'id', found 0"),
    "no label column": (["id,class,p0,p1"], "expected one column 'label', found 0"),
    "two id columns": (["id,id,label,p0,p1"], "expected one column 'id', found 2"),
    "no header": ([f"{CANARY},1,{CANARY},3"], "expected one column 'id', found 0"),
    "wrong width": (["id,label,p0,p1,p2"], "expected 2 pixel columns, found 3"),
    "short row": ([HEADER, f"{CANARY},1,2"], "row 2: expected 4 fields and an id, found 3 fields"),
    "long row": ([HEADER, "a,1,2,3", f"{CANARY},1,2,3,4"], "row 3: expected 4 fields and an id, found 5 fields"),
    "no id": ([HEADER, ",1,2,3"], "row 2: expected 4 fields and an id"),
    "text as pixel": ([HEADER, f"a,1,2,{CANARY}"], "row 2: expected a whole number as label and numbers as pixels"),
    "text as label": ([HEADER, f"a,{CANARY},2,3"], "row 2: expected a whole number as label and numbers as pixels"),
    "NaN": ([HEADER, f"{CANARY},1,2,nan"], "row 2: expected pixels of 0 to 16, found others"),
    "infinity": ([HEADER, f"{CANARY},1,inf,2"], "row 2: expected pixels of 0 to 16, found others"),
    "overflow": ([HEADER, f"{CANARY},1,1e999,2"], "row 2: expected pixels of 0 to 16, found others"),
    "negative pixel": ([HEADER, f"{CANARY},1,-0.5,2"], "row 2: expected pixels of 0 to 16, found others"),
    "bright pixel": ([HEADER, f"{CANARY},1,16.5,2"], "row 2: expected pixels of 0 to 16, found others"),
    "label too high": ([HEADER, f"{CANARY},3,2,2"], "row 2: expected a label of 0 to 2, found another"),
    "negative label": ([HEADER, f"{CANARY},-1,2,2"], "row 2: expected a label of 0 to 2, found another"),
    "repeated id": ([HEADER, f"{CANARY},1,2,2", f"{CANARY},2,3,3"], "ids must differ, found 1 repeated"),
    "open quote": ([HEADER, f'"{CANARY},1,2,2'], "expected CSV in UTF-8, found Error"),
    "empty file": ([], "expected one column 'id', found 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_records_are_refused_in_words_without_their_values(tmp_path: Path, case: str) -> None:
    lines, message = WRONG[case]
    with pytest.raises(SiteConfigError, match=re.escape(message)) as caught:
        load_records(written(tmp_path, *lines), SMALL)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_bytes_that_are_not_utf8_are_refused_without_their_values(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_bytes(f"{HEADER}\n{CANARY},1,2,2\n".encode() + b"\xff\xfe,1,2,2\n")
    with pytest.raises(SiteConfigError, match="expected CSV in UTF-8, found UnicodeDecodeError") as caught:
        load_records(tmp_path, SMALL)
    assert CANARY not in str(caught.value)


def test_a_site_without_records_has_empty_partitions(tmp_path: Path) -> None:
    records = load_records(written(tmp_path, HEADER), SMALL)
    tuning, held = split(records, bytes(32), 0.2)
    assert tuning.images.shape == held.images.shape == (0, 1, 2)
    assert buckets(tuning, bytes(32), 5).shape == (0,)


def test_the_split_of_a_record_does_not_depend_on_others_or_on_order() -> None:
    ids = [f"r{n}" for n in range(500)]
    held = set(split(of_ids(ids), b"k" * 32, 0.2)[1].ids)
    assert set(split(of_ids(ids[::-1]), b"k" * 32, 0.2)[1].ids) == held
    more = [f"new{n}" for n in range(300)] + ids
    assert {one for one in split(of_ids(more), b"k" * 32, 0.2)[1].ids if one.startswith("r")} == held
    assert set(split(of_ids(ids[::2]), b"k" * 32, 0.2)[1].ids) == held & set(ids[::2])


def test_the_split_keeps_every_record_once_with_its_own_image_and_label(tmp_path: Path) -> None:
    write_records(tmp_path / "records.csv")
    records = load_records(tmp_path, CONFIG)
    parts = split(records, b"k" * 32, 0.2)
    assert sorted(parts[0].ids + parts[1].ids) == sorted(records.ids)
    for part in parts:
        at = [records.ids.index(one) for one in part.ids]
        np.testing.assert_array_equal(part.images, records.images[at])
        np.testing.assert_array_equal(part.labels, records.labels[at])


def test_a_larger_fraction_only_adds_held_out_records() -> None:
    records = of_ids([f"r{n}" for n in range(500)])
    assert set(split(records, b"k" * 32, 0.2)[1].ids) < set(split(records, b"k" * 32, 0.3)[1].ids)


def test_another_key_gives_an_independent_split() -> None:
    """By chance |correlation| exceeds the bound once in a million."""
    ids = [f"r{n}" for n in range(20_000)]
    one, other = keyed_uniform(b"a" * 32, "holdout", ids) < 0.2, keyed_uniform(b"b" * 32, "holdout", ids) < 0.2
    bound = stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(len(ids))
    assert abs(np.corrcoef(one, other)[0, 1]) < bound


def test_bucket_and_split_of_a_record_are_independent() -> None:
    """By chance |correlation| exceeds the bound once in a million."""
    ids = [f"r{n}" for n in range(20_000)]
    draws = [keyed_uniform(b"a" * 32, purpose, ids) for purpose in ("holdout", "bucket")]
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(len(ids))


def test_the_held_out_part_has_the_asked_size() -> None:
    """A fair split fails once in a million keys."""
    held = (keyed_uniform(b"k" * 32, "holdout", [f"r{n}" for n in range(20_000)]) < 0.2).sum()
    assert stats.binomtest(int(held), 20_000, 0.2).pvalue > FALSE_ALARM


def test_records_fall_into_all_buckets_alike() -> None:
    """Fair buckets fail the chi-square test once in a million keys."""
    found = buckets(of_ids([f"r{n}" for n in range(20_000)]), b"k" * 32, 40)
    counts = np.bincount(found, minlength=40)
    assert len(counts) == 40
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_the_keyed_hash_is_uniform() -> None:
    """A uniform hash fails Kolmogorov and Smirnov's test once in a million keys."""
    draws = keyed_uniform(b"k" * 32, "bucket", [f"r{n}" for n in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_a_records_bucket_depends_on_its_id_and_the_public_number_only(num_buckets: int) -> None:
    ids = [f"r{n}" for n in range(100)]

    def place(some: list[str]) -> dict[str, int]:
        return dict(zip(some, buckets(of_ids(some), b"k" * 32, num_buckets).tolist(), strict=True))

    whole = place(ids)
    assert all(place(ids[start:])[one] == whole[one] for start in (0, 33) for one in ids[start:])
    assert set(whole.values()) <= set(range(num_buckets))
