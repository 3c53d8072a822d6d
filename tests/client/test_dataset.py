import csv
import io
import json
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from pydantic import ValidationError
from scipy import stats

from tests.client.refusals import CANARY, refused
from urna.client.dataset import DatasetConfig, load_records, pixel_csv
from urna.client.preview import preview
from urna.client.records import Images, Records, Table, Texts, buckets, keyed_uniform, split
from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import explain

KEY = b"k" * 32
FALSE_ALARM = 1e-6
SMALL = pixel_csv(num_records=60, num_classes=3, image_height=1, image_width=2, max_value=16.0)
HEADER = "id,label,p0,p1"
IMAGE: dict[str, Any] = SMALL.model_dump(exclude_unset=True)
TEXT: dict[str, Any] = {
    "name": "notes",
    "format": "jsonl",
    "modality": "text",
    "path": "records.jsonl",
    "num_records": 10,
    "labels": ("no", "yes"),
    "max_characters": 20,
}
TABLE: dict[str, Any] = {
    "name": "table",
    "format": "csv",
    "modality": "table",
    "path": "records.csv",
    "num_records": 10,
    "num_classes": 2,
    "columns": (
        {"name": "age", "type": "number", "minimum": 0, "maximum": 120},
        {"name": "sex", "type": "category", "categories": ("f", "m")},
    ),
}
SQL: dict[str, Any] = {"format": "sql", "path": None, "url": "sqlite:///records.sqlite", "query": "SELECT * FROM records"}


def declared(base: dict[str, Any], **changes: Any) -> DatasetConfig:
    """A key that is None is left out."""
    return DatasetConfig.model_validate({key: value for key, value in (base | changes).items() if value is not None})


def of_units(units: list[str], ids: list[str] | None = None) -> Records:
    return Records(tuple(ids or units), tuple(units), np.zeros(len(units), np.int64), Texts(("",) * len(units)))


def written(folder: Path, *lines: str) -> Path:
    (folder / "records.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


Rows = list[dict[str, Any]]


def write_csv(folder: Path, rows: Rows) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "records.csv").write_bytes(text.getvalue().encode())


def write_jsonl(folder: Path, rows: Rows) -> None:
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(folder: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")


def write_sql(folder: Path, rows: Rows) -> None:
    (folder / "records.sqlite").unlink(missing_ok=True)
    database = sqlite3.connect(folder / "records.sqlite")
    names = ", ".join(f'"{name}"' for name in rows[0])
    database.execute(f"CREATE TABLE records ({names})")
    database.executemany(f"INSERT INTO records VALUES ({', '.join('?' * len(rows[0]))})", [tuple(row.values()) for row in rows])
    database.commit()
    database.close()


WRITERS: dict[str, tuple[Callable[[Path, Rows], None], dict[str, Any]]] = {
    "csv": (write_csv, {"format": "csv", "path": "records.csv"}),
    "jsonl": (write_jsonl, {"format": "jsonl", "path": "records.jsonl"}),
    "parquet": (write_parquet, {"format": "parquet", "path": "records.parquet"}),
    "sql": (write_sql, SQL),
}


def loaded(folder: Path, format_: str, base: dict[str, Any], rows: Rows, **changes: Any) -> Records:
    write, source = WRITERS[format_]
    write(folder, rows)
    return load_records(folder, declared(base | source, **changes), KEY)


# ---- what is declared


REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "absolute path": (IMAGE, {"path": "/etc/passwd"}, "must stay inside the site's folder, found '/etc/passwd'"),
    "dots": (IMAGE, {"path": "a/../../b"}, "must stay inside the site's folder, found 'a/../../b'"),
    "no path": (IMAGE, {"path": None}, "missing key path"),
    "no size": (IMAGE, {"image_width": None}, "missing key image_width: modality image needs it"),
    "no maximum": (IMAGE, {"max_value": None}, "missing key max_value: pixel columns needs it"),
    "no labels": (IMAGE, {"num_classes": None}, "expected one of labels and num_classes"),
    "labels twice": (IMAGE, {"labels": ("a", "b")}, "expected one of labels and num_classes"),
    "one label": (TEXT, {"labels": ("a",)}, "expected two or more different labels, found 1"),
    "equal labels": (TEXT, {"labels": ("a", "a")}, "expected two or more different labels, found 1"),
    "foreign size": (TEXT, {"image_height": 8}, "image_height belongs to modality image: take it out"),
    "foreign columns": (IMAGE, {"columns": TABLE["columns"]}, "columns belongs to modality table: take it out"),
    "no columns": (TABLE, {"columns": None}, "missing key columns"),
    "no length": (TEXT, {"max_characters": None}, "missing key max_characters"),
    "a query for a file": (IMAGE, {"query": "SELECT 1"}, "query belongs to format sql: take it out"),
    "a path for a database": (TABLE | SQL, {"path": "x"}, "path belongs to another format than sql: take it out"),
    "no URL": (TABLE | SQL, {"url": None}, "expected one of url and url_variable"),
    "two URLs": (TABLE | SQL, {"url_variable": "URL"}, "expected one of url and url_variable"),
    "no query": (TABLE | SQL, {"query": None}, "missing key query"),
    "cap without person": (IMAGE, {"max_records_per_person": 3}, "max_records_per_person belongs to a person_column"),
    "person of folders": (
        TEXT,
        {"format": "text", "path": "t", "person_column": "p"},
        "person_column belongs to tables and manifests",
    ),
    "manifest of a table": (IMAGE, {"manifest": "m.csv"}, "manifest belongs to formats images and text"),
    "images of text": (TEXT, {"format": "images"}, "format 'images' holds no records of modality 'text'"),
    "two roles": (IMAGE, {"label_column": "id"}, "expected one role for a column, found 'id' in two"),
    "dropped id": (IMAGE, {"deidentify": ({"column": "id", "action": "drop"},)}, "column 'id' is needed and cannot be dropped"),
    "no range": (TABLE, {"columns": ({"name": "a", "type": "number"},)}, "column 'a': a number needs minimum and maximum"),
    "range of words": (TABLE, {"columns": ({"name": "a", "type": "category"},)}, "column 'a': a category needs categories"),
    "too many pixels": (IMAGE, {"max_pixels": 10**9}, "less than or equal to 89478485"),
    "unknown key": (IMAGE, {"num_clases": 3}, "unknown key num_clases: did you mean num_classes?"),
    "unknown key of a rule": (
        IMAGE,
        {"deidentify": ({"column": "x", "action": "drop", "with": 1},)},
        "unknown key deidentify.0.with: did you mean width?",
    ),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_a_wrong_declaration_is_refused_in_words(case: str) -> None:
    base, changes, message = REFUSED_CONFIGS[case]
    with pytest.raises(ValidationError) as caught:
        declared(base, **changes)
    assert message in explain(caught.value, DatasetConfig)


def test_classes_are_labels_called_by_their_numbers() -> None:
    assert SMALL.label_names == ("0", "1", "2")
    assert declared(TEXT).label_names == ("no", "yes")


# ---- records as declared


def test_records_are_read_as_declared(tmp_path: Path) -> None:
    records = load_records(written(tmp_path, "p0,label,id,p1", "8,2,a,16", "0,0,b,4"), SMALL, KEY)
    assert records.ids == records.units == ("a", "b")
    assert records.labels.tolist() == [2, 0]
    assert records.images.tolist() == [[[0.5, 1.0]], [[0.0, 0.25]]]
    assert records.images.dtype == np.float32


@pytest.mark.parametrize("format_", WRITERS)
def test_every_format_gives_the_same_images(tmp_path: Path, format_: str) -> None:
    rows = [{"id": "a", "label": 2, "p0": 8, "p1": 16.0}, {"id": "b", "label": 0, "p0": 1, "p1": 0.1}]
    records = loaded(tmp_path, format_, IMAGE, rows)
    assert records.ids == ("a", "b")
    assert records.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(records.images, np.array([[[8, 16]], [[1, 0.1]]], np.float32) / np.float32(16))


def test_three_channels_are_read_channel_by_channel(tmp_path: Path) -> None:
    config = declared(IMAGE, image_channels=3, max_value=1.0)
    written(tmp_path, "id,label," + ",".join(f"p{n}" for n in range(6)), "a,0,0,.1,.2,.3,.4,.5")
    pixels = load_records(tmp_path, config, KEY).images
    assert pixels.shape == (1, 3, 1, 2)
    np.testing.assert_allclose(pixels.ravel(), [0, 0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)


@pytest.mark.parametrize("format_", WRITERS)
def test_every_format_gives_the_same_table(tmp_path: Path, format_: str) -> None:
    rows = [
        {"id": 7, "label": 1, "age": 64.5, "sex": "m", "other": "x"},
        {"id": 8, "label": 0, "age": 3.0, "sex": "f", "other": "y"},
    ]
    records = loaded(tmp_path, format_, TABLE, rows)
    assert records.ids == ("7", "8")
    assert isinstance(records.inputs, Table)
    assert {name: values.tolist() for name, values in records.inputs.columns.items()} == {"age": [64.5, 3.0], "sex": [1.0, 0.0]}
    with pytest.raises(SiteConfigError, match="expected records of images, found table"):
        _ = records.images


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            st.sampled_from(["no", "yes"]),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda row: row[0],
    )
)
def test_any_text_comes_back_from_every_format(rows: list[tuple[str, str, str]]) -> None:
    documents = [{"id": one, "label": label, "text": text} for one, label, text in rows]
    with tempfile.TemporaryDirectory() as folder:
        for format_ in WRITERS:
            records = loaded(Path(folder), format_, TEXT, documents, max_characters=10_000)
            assert records.ids == tuple(row[0] for row in rows), format_
            assert [("no", "yes")[label] for label in records.labels] == [row[1] for row in rows]
            assert isinstance(records.inputs, Texts)
            assert records.inputs.texts == tuple(row[2] for row in rows), format_


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 120), min_size=1, max_size=20))
def test_any_number_comes_back_from_every_format(numbers: list[float]) -> None:
    rows = [{"id": f"r{at}", "label": 0, "age": number, "sex": "f"} for at, number in enumerate(numbers)]
    with tempfile.TemporaryDirectory() as folder:
        for format_ in WRITERS:
            records = loaded(Path(folder), format_, TABLE, rows)
            assert isinstance(records.inputs, Table)
            assert records.inputs.columns["age"].tolist() == numbers, format_


def test_texts_are_cut_at_the_declared_length(tmp_path: Path) -> None:
    records = loaded(tmp_path, "jsonl", TEXT, [{"id": "a", "label": "no", "text": "x" * 21}])
    assert isinstance(records.inputs, Texts)
    assert records.inputs.texts == ("x" * 20,)


def test_an_id_that_looks_like_a_date_stays_as_it_is(tmp_path: Path) -> None:
    records = loaded(tmp_path, "jsonl", TEXT, [{"id": "2020-01-01", "label": "no", "text": ""}])
    assert records.ids == ("2020-01-01",)


def test_columns_without_a_role_are_not_read(tmp_path: Path) -> None:
    rows = [{"id": "a", "label": "no", "text": "t", "nested": [{"x": CANARY}]}]
    assert len(loaded(tmp_path, "jsonl", TEXT, rows)) == 1


# ---- records that are not as declared


WRONG = {
    "no id column": (["name,label,p0,p1"], "expected one column 'id', found 0"),
    "no label column": (["id,class,p0,p1"], "expected one column 'label', found 0"),
    "two id columns": (["id,id,label,p0,p1"], "starts with a line of different column names"),
    "no header": ([f"{CANARY},1,{CANARY},3"], "starts with a line of different column names"),
    "a record as header": ([f"{CANARY},1,2,3"], "expected one column 'id', found 0"),
    "wrong width": (["id,label,p0,p1,p2"], "expected 2 pixel columns, found 3"),
    "short row": ([HEADER, f"{CANARY},1,2"], "row 2: expected 4 fields, found 3"),
    "long row": ([HEADER, "a,1,2,3", f"{CANARY},1,2,3,4"], "row 3: expected 4 fields, found 5"),
    "no id": ([HEADER, ",1,2,3"], "row 2: expected a value in column 'id', found an empty one"),
    "empty line": ([HEADER, "a,1,2,3", "", "b,1,2,3"], "row 3: expected a value in column 'id'"),
    "text as pixel": ([HEADER, "a,1,2,2", f"b,1,2,{CANARY}"], "row 3: expected numbers as pixels"),
    "text as label": ([HEADER, f"a,{CANARY},2,3"], "row 2: expected one of the 3 declared values in column 'label'"),
    "NaN": ([HEADER, f"{CANARY},1,2,nan"], "row 2: expected pixels of 0 to 16, found others"),
    "infinity": ([HEADER, f"{CANARY},1,inf,2"], "row 2: expected pixels of 0 to 16, found others"),
    "overflow": ([HEADER, f"{CANARY},1,1e999,2"], "row 2: expected pixels of 0 to 16, found others"),
    "negative pixel": ([HEADER, f"{CANARY},1,-0.5,2"], "row 2: expected pixels of 0 to 16, found others"),
    "bright pixel": ([HEADER, f"{CANARY},1,16.5,2"], "row 2: expected pixels of 0 to 16, found others"),
    "no pixel": ([HEADER, f"{CANARY},1,,2"], "row 2: expected numbers as pixels"),
    "label too high": ([HEADER, f"{CANARY},3,2,2"], "row 2: expected one of the 3 declared values in column 'label'"),
    "negative label": ([HEADER, f"{CANARY},-1,2,2"], "row 2: expected one of the 3 declared values in column 'label'"),
    "repeated id": ([HEADER, f"{CANARY},1,2,2", f"{CANARY},2,3,3"], "ids must differ, found 1 repeated"),
    "open quote": ([HEADER, f'"{CANARY},1,2,2'], "row 2: expected 4 fields, found 1"),
    "open quote at the end": ([HEADER, "a,1,2,2", f'b,1,2,"{CANARY}'], "row 3: expected numbers as pixels"),
    "empty file": ([], "starts with a line of different column names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_records_are_refused_in_words_without_their_values(tmp_path: Path, case: str) -> None:
    lines, message = WRONG[case]
    with refused(message):
        load_records(written(tmp_path, *lines), SMALL, KEY)


GOOD_ROW: dict[str, Any] = {"id": "a", "label": 1, "age": 5.0, "sex": "f", "person": "p"}
WRONG_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"id": None}, "expected a value in column 'id', found none"),
    "empty id": ({"id": ""}, "expected a value in column 'id', found an empty one"),
    "broken id": ({"id": 1.5}, "expected text or whole numbers in column 'id'"),
    "no label": ({"label": None}, "expected a value in column 'label', found none"),
    "other label": ({"label": 2}, "expected one of the 2 declared values in column 'label'"),
    "no number": ({"age": None}, "expected numbers as numbers in column 'age'"),
    "too old": ({"age": 120.5}, "expected numbers in column 'age' of 0 to 120"),
    "NaN": ({"age": float("nan")}, "column 'age'"),
    "other category": ({"sex": CANARY}, "expected one of the 2 declared values in column 'sex'"),
    "no person": ({"person": None}, "expected a value in column 'person', found none"),
}


@pytest.mark.parametrize("format_", ["parquet", "sql"])
@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_typed_records_are_refused_in_words(tmp_path: Path, format_: str, case: str) -> None:
    changes, message = WRONG_ROWS[case]
    if format_ == "sql" and case == "NaN":
        message = "expected numbers as numbers in column 'age'"  # SQLite keeps NaN as NULL
    rows = [GOOD_ROW | {"person": CANARY} | changes]
    with refused(message):
        loaded(tmp_path, format_, TABLE, rows, person_column="person")


def test_the_row_of_a_wrong_value_is_named_beyond_the_first_batch(tmp_path: Path) -> None:
    rows = [{"id": f"r{at}", "label": 0, "age": 1.0, "sex": "f"} for at in range(20_000)]
    rows[15_000]["sex"] = CANARY
    for format_, row in {"csv": 15_002, "jsonl": 15_001, "parquet": 15_001, "sql": 15_001}.items():
        with refused(f"row {row}: expected one of the 2 declared values in column 'sex'"):
            loaded(tmp_path, format_, TABLE, rows)


def test_rows_are_counted_against_the_limit_in_every_format(tmp_path: Path) -> None:
    rows = [{"id": f"{CANARY}{at}", "label": 0, "age": 1.0, "sex": "f"} for at in range(4)]
    for format_ in WRITERS:
        assert len(loaded(tmp_path, format_, TABLE, rows, max_rows=4)) == 4
        with refused("at most 3 rows are read, found more"):
            loaded(tmp_path, format_, TABLE, rows, max_rows=3)


def test_a_site_without_records_has_empty_partitions(tmp_path: Path) -> None:
    records = load_records(written(tmp_path, HEADER), SMALL, KEY)
    tuning, held = split(records, bytes(32), 0.2)
    assert tuning.images.shape == held.images.shape == (0, 1, 2)
    assert buckets(tuning, bytes(32), 5).shape == (0,)


# ---- de-identification on load


def test_rules_apply_before_anything_else_sees_a_value(tmp_path: Path) -> None:
    rules = [
        {"column": "id", "action": "keyed_hash"},
        {"column": "person", "action": "keyed_hash"},
        {"column": "age", "action": "generalise", "to": "band", "width": 10, "minimum": 0, "maximum": 90},
        {"column": "name", "action": "drop"},
    ]
    rows = [
        {"id": f"{CANARY}{at}", "label": 0, "age": 43 + at, "sex": "f", "person": CANARY, "name": CANARY} for at in range(2)
    ]
    for format_ in WRITERS:
        records = loaded(tmp_path, format_, TABLE, rows, deidentify=rules, person_column="person", max_records_per_person=2)
        assert isinstance(records.inputs, Table)
        assert records.inputs.columns["age"].tolist() == [40.0, 40.0]
        assert records.groups.tolist() == [0, 0]  # the pseudonym is still one person
        assert len(set(records.ids)) == 2
        assert CANARY not in repr(records)


def test_texts_are_scrubbed_before_they_are_cut(tmp_path: Path) -> None:
    rows = [{"id": "a", "label": "no", "text": "write to canary-7f3a@example.org today"}]
    for format_ in WRITERS:
        records = loaded(tmp_path, format_, TEXT, rows, deidentify=[{"column": "text", "action": "scrub"}])
        assert isinstance(records.inputs, Texts)
        assert records.inputs.texts == ("write to [EMAIL] tod",)


def test_dropped_columns_are_no_pixels(tmp_path: Path) -> None:
    config = declared(IMAGE, deidentify=[{"column": "name", "action": "drop"}])
    assert len(load_records(written(tmp_path, HEADER + ",name", f"a,1,2,3,{CANARY}"), config, KEY)) == 1


def test_a_rule_for_a_column_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    config = declared(IMAGE, deidentify=[{"column": "nmae", "action": "drop"}])
    with refused("expected one column 'nmae', found 0"):
        load_records(written(tmp_path, HEADER, f"{CANARY},1,2,3"), config, KEY)


def test_a_value_that_a_rule_cannot_read_is_refused_by_its_row(tmp_path: Path) -> None:
    rules = [{"column": "age", "action": "generalise", "to": "band", "width": 10, "minimum": 0, "maximum": 90}]
    rows = [GOOD_ROW, GOOD_ROW | {"id": "b", "age": CANARY}]
    with refused("dataset table: row 2: expected a number in column 'age', to generalise it to a band"):
        loaded(tmp_path, "jsonl", TABLE, [{**row, "age": str(row["age"])} for row in rows], deidentify=rules)


def test_a_preview_shows_what_was_loaded(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{at}", "label": "yes", "text": f"a{at}@b.org and 030 1234567", "p": "x" if at else "y"} for at in range(4)
    ]
    write_jsonl(tmp_path, rows)
    rules = [{"column": "text", "action": "scrub"}, {"column": "id", "action": "keyed_hash"}]
    config = declared(TEXT, deidentify=rules, person_column="p", max_characters=100)
    shown = preview(tmp_path, config, KEY, num_rows=1)
    assert shown.columns == ("id", "p", "label", "text")
    assert shown.rows[0][1:] == ("y", "yes", "[EMAIL] and [PHONE]")
    assert len(shown.rows[0][0]) == 32
    assert (shown.num_records, shown.num_units, shown.num_left_out) == (2, 2, 2)
    assert shown.num_by_label == {"no": 0, "yes": 2}
    assert shown.num_scrubbed == {"EMAIL": 4, "PHONE": 4}


def test_a_preview_of_images_and_tables_says_what_they_are(tmp_path: Path) -> None:
    written(tmp_path, HEADER, "a,1,0,16")
    assert preview(tmp_path, SMALL, KEY).rows == (("a", "1", "1 x 2, 0.00 to 1.00"),)
    write_csv(tmp_path, [GOOD_ROW])
    shown = preview(tmp_path, declared(TABLE), KEY)
    assert shown.columns == ("id", "label", "age", "sex")
    assert shown.rows == (("a", "1", "5", "f"),)


# ---- files


def images_of(folder: Path, count: int = 2) -> Path:
    for label, level in {"cat": 0, "dog": 255}.items():
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (4, 2), level).save(folder / "pictures" / label / f"{CANARY}{number}.png")
    return folder


PICTURES: dict[str, Any] = {
    "name": "pictures",
    "format": "images",
    "modality": "image",
    "path": "pictures",
    "num_records": 4,
    "labels": ("dog", "cat"),
    "image_height": 2,
    "image_width": 4,
}


def test_an_image_folder_has_a_subfolder_for_each_label(tmp_path: Path) -> None:
    records = load_records(images_of(tmp_path), declared(PICTURES), KEY)
    assert records.ids == tuple(f"{label}/{CANARY}{at}.png" for label in ("cat", "dog") for at in range(2))
    assert records.labels.tolist() == [1, 1, 0, 0]
    assert records.images[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert records.images.shape == (4, 2, 4)


def test_file_names_can_be_pseudonyms(tmp_path: Path) -> None:
    rules = [{"column": "id", "action": "keyed_hash"}]
    assert CANARY not in repr(load_records(images_of(tmp_path), declared(PICTURES, deidentify=rules), KEY))


def test_a_rule_for_another_column_of_a_folder_is_refused(tmp_path: Path) -> None:
    rules = [{"column": "name", "action": "keyed_hash"}]
    with refused("expected rules for columns id, found others"):
        load_records(images_of(tmp_path), declared(PICTURES, deidentify=rules), KEY)


def test_a_folder_that_is_no_declared_label_is_refused(tmp_path: Path) -> None:
    (images_of(tmp_path) / "pictures" / CANARY).mkdir()
    with refused("expected folders called like the declared labels, found another: look at entry 1 in sorted order"):
        load_records(tmp_path, declared(PICTURES), KEY)


def test_files_are_counted_against_the_limit(tmp_path: Path) -> None:
    with refused("at most 3 files are read, found more"):
        load_records(images_of(tmp_path), declared(PICTURES, max_rows=3), KEY)


def test_images_that_do_not_fit_into_the_declared_memory_are_refused_undecoded(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
    (tmp_path / "pictures" / "cat" / f"{CANARY}.png").write_bytes(b"not even an image")
    config = declared(PICTURES, image_height=1000, image_width=1000, image_channels=3, max_bytes=10_000_000)
    with refused("expected images of at most 10000000 bytes in memory, found 12000000"):
        load_records(tmp_path, config, KEY)


def manifest_of(folder: Path, *lines: str) -> Path:
    (folder / "pictures" / "list.csv").write_text("\n".join(["id,file,label,person", *lines]) + "\n", encoding="utf-8")
    return folder


LISTED = PICTURES | {"manifest": "list.csv", "person_column": "person"}


def test_a_manifest_names_files_labels_and_persons(tmp_path: Path) -> None:
    manifest_of(images_of(tmp_path), f"a,cat/{CANARY}0.png,dog,p", f"b,dog/{CANARY}1.png,cat,q")
    records = load_records(tmp_path, declared(LISTED), KEY)
    assert (records.ids, records.units) == (("a", "b"), ("p", "q"))
    assert records.labels.tolist() == [0, 1]
    assert records.images[:, 0, 0].tolist() == [0, 1]


MANIFESTS = {
    "absolute": (f"/{CANARY}", "row 2: its file: expected a relative path without '..'"),
    "dots": (f"../pictures/{CANARY}", "row 2: its file: expected a relative path without '..'"),
    "missing": (f"{CANARY}.png", "row 2: its file: expected something at its path, found nothing"),
    "a folder": ("cat", "row 2: its file: expected a regular file"),
    "not an image": ("list.csv", "row 2: its file: expected an image (PNG, JPEG, TIFF, BMP), found something else"),
    "a link that leaves": ("link.png", "row 2: its file: a symbolic link leaves its folder"),
    "empty": ("", "row 2: expected a value in column 'file', found an empty one"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_cannot_name_what_is_no_image_of_its_folder(tmp_path: Path, case: str) -> None:
    file, message = MANIFESTS[case]
    images_of(tmp_path)
    (tmp_path / f"{CANARY}.png").write_bytes((tmp_path / "pictures" / "cat" / f"{CANARY}0.png").read_bytes())
    (tmp_path / "pictures" / "link.png").symlink_to(tmp_path / f"{CANARY}.png")
    with refused(message):
        load_records(manifest_of(tmp_path, f"{CANARY},{file},cat,{CANARY}"), declared(LISTED), KEY)


def test_a_manifest_without_a_declared_column_is_refused(tmp_path: Path) -> None:
    images_of(tmp_path)
    (tmp_path / "pictures" / "list.csv").write_text(f"id,file,label\n{CANARY},x,cat\n", encoding="utf-8")
    with refused("manifest: expected one column 'person', found 0"):
        load_records(tmp_path, declared(LISTED), KEY)


def texts_of(folder: Path) -> Path:
    for label in ("no", "yes"):
        (folder / "notes" / label).mkdir(parents=True)
        (folder / "notes" / label / f"{CANARY}.txt").write_text(f"{label}, mail a@b.org", encoding="utf-8")
    return folder


NOTES = TEXT | {"format": "text", "path": "notes"}


def test_a_text_folder_has_a_subfolder_for_each_label(tmp_path: Path) -> None:
    config = declared(NOTES, deidentify=[{"column": "text", "action": "scrub"}])
    records = load_records(texts_of(tmp_path), config, KEY)
    assert records.inputs == Texts(("no, mail [EMAIL]", "yes, mail [EMAIL]"))
    assert records.labels.tolist() == [0, 1]


def test_a_text_manifest_names_its_files(tmp_path: Path) -> None:
    (texts_of(tmp_path) / "notes" / "list.csv").write_text(f"id,file,label\na,yes/{CANARY}.txt,no\n", encoding="utf-8")
    records = load_records(tmp_path, declared(NOTES, manifest="list.csv"), KEY)
    assert records.ids == ("a",)
    assert records.inputs == Texts(("yes, mail a@b.org",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (f"{CANARY}.md", b"x", "label 'no': file 1 in sorted order: expected a name that ends in .txt"),
        (f"{CANARY}.0.txt", b"\xff\xfe" + CANARY.encode(), "file 1 in sorted order: expected text in UTF-8, found other bytes"),
        (f"{CANARY}.0.txt", b"x" * 100, "file 1 in sorted order: at most 50 bytes are read, found 100"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (texts_of(tmp_path) / "notes" / "no" / name).write_bytes(content)
    with refused(message):
        load_records(tmp_path, declared(NOTES, max_bytes=50), KEY)


# ---- persons


def test_one_person_counts_as_one_unit(tmp_path: Path) -> None:
    rows = [GOOD_ROW | {"id": f"r{at}", "person": f"p{at % 3}"} for at in range(9)]
    records = loaded(tmp_path, "csv", TABLE, rows, person_column="person", max_records_per_person=3)
    assert records.units == ("p0", "p1", "p2") * 3
    assert records.groups.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("cap", [1, 2])
def test_a_persons_cap_does_not_depend_on_the_order_of_the_file(tmp_path: Path, cap: int) -> None:
    generator = np.random.default_rng(0)
    rows = [GOOD_ROW | {"id": f"r{at}", "person": f"p{generator.integers(40)}"} for at in range(200)]
    kept = []
    for order in (rows, rows[::-1], [rows[at] for at in generator.permutation(200)]):
        records = loaded(tmp_path, "csv", TABLE, order, person_column="person", max_records_per_person=cap)
        assert np.bincount(records.groups).max() == cap
        kept.append(set(records.ids))
    assert kept[0] == kept[1] == kept[2]
    assert {row["person"] for row in rows} == {row["person"] for row in rows if row["id"] in kept[0]}


def test_one_record_a_person_is_the_default(tmp_path: Path) -> None:
    rows = [GOOD_ROW | {"id": f"r{at}"} for at in range(5)]
    assert len(loaded(tmp_path, "csv", TABLE, rows, person_column="person")) == 1


def test_who_is_kept_under_a_cap_depends_on_the_key(tmp_path: Path) -> None:
    """Equal choices for 64 persons of two records have a chance of 2**-64."""
    write_csv(tmp_path, [GOOD_ROW | {"id": f"r{at}", "person": f"p{at // 2}"} for at in range(128)])
    config = declared(TABLE, person_column="person")
    assert load_records(tmp_path, config, b"a" * 32).ids != load_records(tmp_path, config, b"b" * 32).ids


def test_a_person_is_on_one_side_and_in_one_bucket() -> None:
    records = of_units([f"p{at % 100}" for at in range(500)], [f"r{at}" for at in range(500)])
    tuning, held = split(records, KEY, 0.3)
    assert held.units
    assert not set(tuning.units) & set(held.units)
    by_person = {(unit, int(bucket)) for unit, bucket in zip(records.units, buckets(records, KEY, 7), strict=True)}
    assert len(by_person) == 100


# ---- the split


def test_the_keyed_hash_is_the_one_that_stored_splits_rest_on() -> None:
    """These numbers are promises: another hash would move records of existing sites from one side to the other."""
    np.testing.assert_array_equal(keyed_uniform(bytes(32), "holdout", ["r0", "ä"]), [0.5700739834474606, 0.07838178598132739])
    assert keyed_uniform(bytes(32), "bucket", ["r0"])[0] == 0.3968167856912326


def test_the_split_of_a_record_does_not_depend_on_others_or_on_order() -> None:
    ids = [f"r{n}" for n in range(500)]
    held = set(split(of_units(ids), KEY, 0.2)[1].ids)
    assert set(split(of_units(ids[::-1]), KEY, 0.2)[1].ids) == held
    more = [f"new{n}" for n in range(300)] + ids
    assert {one for one in split(of_units(more), KEY, 0.2)[1].ids if one.startswith("r")} == held
    assert set(split(of_units(ids[::2]), KEY, 0.2)[1].ids) == held & set(ids[::2])


def test_the_split_keeps_every_record_once_with_its_own_input_and_label() -> None:
    pixels = (np.arange(200).reshape(100, 1, 2) / 200).astype(np.float32)
    ids = tuple(f"r{n}" for n in range(100))
    records = Records(ids, ids, np.arange(100) % 3, Images(pixels))
    parts = split(records, KEY, 0.2)
    assert sorted(parts[0].ids + parts[1].ids) == sorted(ids)
    for part in parts:
        at = [ids.index(one) for one in part.ids]
        np.testing.assert_array_equal(part.images, pixels[at])
        np.testing.assert_array_equal(part.labels, records.labels[at])


def test_tables_and_texts_are_split_with_their_records() -> None:
    ids = tuple(f"r{n}" for n in range(50))
    keep = np.arange(50) % 2 == 0
    assert Records(ids, ids, np.arange(50), Texts(ids)).take(keep).inputs == Texts(ids[::2])
    table = Records(ids, ids, np.arange(50), Table({"x": np.arange(50.0)})).take(keep).inputs
    assert isinstance(table, Table)
    np.testing.assert_array_equal(table.columns["x"], np.arange(0, 50, 2))


def test_a_larger_fraction_only_adds_held_out_records() -> None:
    records = of_units([f"r{n}" for n in range(500)])
    assert set(split(records, KEY, 0.2)[1].ids) < set(split(records, KEY, 0.3)[1].ids)


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
    held = (keyed_uniform(KEY, "holdout", [f"r{n}" for n in range(20_000)]) < 0.2).sum()
    assert stats.binomtest(int(held), 20_000, 0.2).pvalue > FALSE_ALARM


def test_records_fall_into_all_buckets_alike() -> None:
    """Fair buckets fail the chi-square test once in a million keys."""
    counts = np.bincount(buckets(of_units([f"r{n}" for n in range(20_000)]), KEY, 40), minlength=40)
    assert len(counts) == 40
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_the_keyed_hash_is_uniform() -> None:
    """A uniform hash fails Kolmogorov and Smirnov's test once in a million keys."""
    draws = keyed_uniform(KEY, "bucket", [f"r{n}" for n in range(20_000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > FALSE_ALARM


@pytest.mark.parametrize("num_buckets", [1, 7])
def test_a_records_bucket_depends_on_its_unit_and_the_public_number_only(num_buckets: int) -> None:
    ids = [f"r{n}" for n in range(100)]

    def place(some: list[str]) -> dict[str, int]:
        return dict(zip(some, buckets(of_units(some), KEY, num_buckets).tolist(), strict=True))

    whole = place(ids)
    assert all(place(ids[start:])[one] == whole[one] for start in (0, 33) for one in ids[start:])
    assert set(whole.values()) <= set(range(num_buckets))
