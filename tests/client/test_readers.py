import io
import os
import pickle
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.client.refusals import CANARY, refused
from tests.client.test_dataset import KEY, PICTURES, SQL, TABLE, TEXT, WRITERS, declared, write_csv, write_parquet, write_sql
from urna.client import readers, sql_reader
from urna.client.dataset import load_records
from urna.client.image_files import FORMATS, read_image
from urna.client.readers import Limits, inside, opened_csv, opened_file, opened_jsonl, opened_parquet
from urna.client.records import Texts
from urna.protocol.errors import SiteConfigError

LIMITS = Limits(max_rows=1000, max_bytes=1_000_000, max_pixels=1_000_000, max_expansion_ratio=100)
OPENERS = {"csv": opened_csv, "jsonl": opened_jsonl, "parquet": opened_parquet}
ROW: dict[str, Any] = {"id": CANARY, "label": 1, "age": 5.0, "sex": "f"}


def rows_of(folder: Path, format_: str, limits: Limits = LIMITS, wanted: Sequence[str] = ("text",)) -> list[dict[str, Any]]:
    with OPENERS[format_](folder, f"records.{format_}", "data", limits) as opened:
        return [row for batch in opened.batches(wanted) for row in batch.to_pylist()]


# ---- paths


def site_of(folder: Path) -> Path:
    (folder / "site" / "below").mkdir(parents=True)
    (folder / "site" / "below" / "file").write_text("inside", encoding="utf-8")
    (folder / CANARY).write_text("outside", encoding="utf-8")
    return folder / "site"


PATHS = {
    "dots": f"../{CANARY}",
    "dots that come back": "below/../below/file",
    "absolute": f"/{CANARY}",
    "nothing": "",
    "a null byte": f"below/file\0{CANARY}",
    "missing": CANARY,
    "a surrogate": "\udcff" + CANARY,
    "a long name": CANARY * 100,
}


@pytest.mark.parametrize("case", PATHS)
def test_a_path_that_leaves_its_folder_or_leads_nowhere_is_refused(tmp_path: Path, case: str) -> None:
    message = "found nothing" if case in ("missing", "a surrogate", "a long name") else "without '..'"
    with refused(message):
        inside(site_of(tmp_path), PATHS[case], "data")


@pytest.mark.parametrize("what", ["file", "folder", "chain", "dangling", "loop"])
def test_a_symbolic_link_cannot_leave_the_folder(tmp_path: Path, what: str) -> None:
    site = site_of(tmp_path)
    targets = {
        "file": tmp_path / CANARY,
        "folder": tmp_path,
        "chain": Path("hop"),
        "dangling": tmp_path / "no",
        "loop": Path("link"),
    }
    (site / "link").symlink_to(targets[what])
    if what == "chain":
        (site / "hop").symlink_to(Path("below/../..") / CANARY)
    message = "found nothing" if what in ("dangling", "loop") else "a symbolic link leaves its folder"
    with refused(message):
        inside(site, f"link/{CANARY}" if what == "folder" else "link", "data")


def test_a_symbolic_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    (site / "link").symlink_to("below")
    with opened_file(site, "link/file", "data", 100) as file:
        assert file.read() == b"inside"


def test_a_link_that_is_put_there_after_the_check_is_not_followed(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    (site / "folder").symlink_to("below")
    (site / "link").symlink_to("below/file")
    with refused("expected a file that can be read, found"):
        readers._descriptor(site / "folder" / "file", "data")
    with refused("expected a regular file"):
        readers._descriptor(site / "link", "data")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "records.csv")
    for format_ in OPENERS:
        (tmp_path / "records.csv").rename(tmp_path / f"records.{format_}")
        with refused("expected a regular file"):
            rows_of(tmp_path, format_)
        (tmp_path / f"records.{format_}").rename(tmp_path / "records.csv")


def test_a_device_is_never_opened() -> None:
    with refused("expected a regular file"), opened_file(Path("/dev"), "zero", "data", 100):
        pass


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    site = site_of(tmp_path)
    with refused("expected a regular file"), opened_file(site, "below", "data", 100):
        pass
    with refused("expected a folder"):
        readers.listed(site / "below" / "file", 10, "data")


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(CANARY, encoding="utf-8")
    with refused("data: at most 5 bytes are read, found 11: raise max_bytes"), opened_file(tmp_path, "file", "data", 5):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_the_right_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0)
    with refused("found PermissionError: look at its rights"), opened_file(tmp_path, "file", "data", 5):
        pass


def test_a_file_name_that_is_not_utf8_is_refused_by_its_place(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff" + CANARY.encode())).touch()
    (tmp_path / "a").touch()
    (tmp_path / ".DS_Store").touch()
    with refused("expected file names in UTF-8, found others: rename file 2 in sorted order"):
        readers.listed(tmp_path, 10, "data")


# ---- what is not what it is called


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_the_planted_pickle_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "marker")))  # or the next tests could not fail
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet", "sql"])
def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path: Path, format_: str, protocol: int) -> None:
    config = declared(TABLE | WRITERS[format_][1])
    name = "records.sqlite" if format_ == "sql" else f"records.{format_}"
    (tmp_path / name).write_bytes(pickle.dumps([CANARY, Planted(tmp_path / "marker")], protocol))
    with refused("expected"):
        load_records(tmp_path, config, KEY)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_under_an_images_name_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pickle.dumps([CANARY, Planted(tmp_path / "marker")]))
    with refused("expected an image"):
        read_image(tmp_path, "a.png", "data", LIMITS, 2, 2, 1)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_parquets_metadata_is_not_run(tmp_path: Path) -> None:
    """CVE-2023-47248: Arrow used to build extension types from a pickle in the schema."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Planted(tmp_path / "marker")),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    parquet.write_table(pa.table({"text": ["a"]}, schema=schema), tmp_path / "records.parquet")
    assert rows_of(tmp_path, "parquet") == [{"text": "a"}]
    assert not (tmp_path / "marker").exists()


# ---- CSV


def csv_of(folder: Path, content: bytes) -> Path:
    (folder / "records.csv").write_bytes(content)
    return folder


def test_quotes_may_hold_commas_lines_and_quotes(tmp_path: Path) -> None:
    csv_of(tmp_path, b'id,text\r\n1,"a,b\nc ""d"""\r\n2,\r\n')
    assert rows_of(tmp_path, "csv") == [{"text": 'a,b\nc "d"'}, {"text": ""}]


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    assert rows_of(csv_of(tmp_path, b"\xef\xbb\xbftext,id\na,b\n"), "csv") == [{"text": "a"}]


CSV = {
    "an open quote that swallows rows": (f'id,text\n1,a\n2,"b\n3,{CANARY}\n', "every quote is closed, found an open one"),
    "a header without an end": (f"id,text,{CANARY}", "starts with a line of different column names"),
    "an empty header": (f"\n{CANARY}\n", "starts with a line of different column names"),
    "a header over two lines": (f'"id\n{CANARY}",text\n1,2\n', "starts with a line of different column names"),
    "one column twice": (f"text,text\n{CANARY},1\n", "starts with a line of different column names"),
    "bytes": (f"id,text\n1,{CANARY}\n2,{CANARY}\udcff\n", "row 3: expected text in UTF-8, found other bytes"),
    "a short row far down": ("id,text\n" + "1,a\n" * 50_000 + CANARY + "\n", "row 50002: expected 2 fields, found 1"),
}


@pytest.mark.parametrize("case", CSV)
def test_what_is_no_csv_is_refused_by_its_row(tmp_path: Path, case: str) -> None:
    content, message = CSV[case]
    limits = Limits(1_000_000, 10_000_000, 1, 100)
    with refused(message):
        rows_of(csv_of(tmp_path, content.encode("utf-8", "surrogateescape")), "csv", limits)


def test_a_row_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    with refused("expected rows of at most 1000 bytes, found a longer one"):
        rows_of(csv_of(tmp_path, f"id,text\n1,{CANARY * 1000}\n".encode()), "csv")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for format_ in OPENERS:
        (folder / f"records.{format_}").write_bytes(content)
        try:
            with OPENERS[format_](folder, f"records.{format_}", "data", LIMITS) as opened:
                assert all(batch.num_columns == len(opened.names) for batch in opened.batches(opened.names))
        except SiteConfigError:
            pass


# ---- JSON lines


JSON = {
    "no object": (f'["{CANARY}"]\n', "row 1: expected one JSON object"),
    "not JSON": (f"{CANARY}\n", "row 1: expected one JSON object"),
    "an array of all rows": (f'[{{"text": "{CANARY}"}},\n', "row 1: expected one JSON object"),
    "an empty line": (f'{{"text": "{CANARY}"}}\n\n', "row 2: expected one JSON object"),
    "one key twice": (f'{{"text": "{CANARY}", "text": 1}}\n', "row 1: expected one JSON object with different keys"),
    "NaN": (f'{{"text": NaN, "{CANARY}": 1}}\n', "row 1: expected one JSON object"),
    "deep nesting": ('{"text": ' + "[" * 100_000 + "\n", "row 1: expected one JSON object"),
    "a number of thousands of digits": ('{"text": ' + "1" * 5000 + "}\n", "row 1: expected one JSON object"),
    "other keys": (f'{{"text": 1}}\n{{"text": 1, "{CANARY}": 2}}\n', "row 2: expected the 1 keys of row 1, found others"),
    "a nested value": (f'{{"text": 1}}\n{{"text": ["{CANARY}"]}}\n', "row 2: expected text, numbers, dates or null"),
    "half a character": ('{"text": "a"}\n{"text": "\\ud800' + CANARY + '"}\n', "row 2: expected text, numbers, dates or null"),
    "a large number": ('{"text": 1}\n{"text": 9223372036854775808}\n', "row 2: expected text, numbers, dates or null"),
    "bytes": ('{"text": "' + CANARY + '\udcff"}\n', "row 1: expected one JSON object"),
}


@pytest.mark.parametrize("case", JSON)
def test_what_is_no_json_object_a_line_is_refused_by_its_row(tmp_path: Path, case: str) -> None:
    content, message = JSON[case]
    (tmp_path / "records.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(message):
        rows_of(tmp_path, "jsonl")


def test_values_of_several_kinds_in_one_column_are_read_as_texts(tmp_path: Path) -> None:
    values = '"a"', "1", "2.5", "true", "null"
    (tmp_path / "records.jsonl").write_text("".join(f'{{"text": {one}}}\n' for one in values), encoding="utf-8")
    assert [row["text"] for row in rows_of(tmp_path, "jsonl")] == ["a", "1", "2.5", "true", None]


# ---- Parquet


def parquet_of(folder: Path, table: pa.Table, **options: Any) -> Path:
    parquet.write_table(table, folder / "records.parquet", **options)
    return folder


def test_a_text_that_is_named_a_million_times_is_not_unpacked(tmp_path: Path) -> None:
    long = pa.array([CANARY * 20_000])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), long)  # 22 GB, if somebody unpacked it
    parquet_of(tmp_path, pa.table({"text": column}), compression="zstd", store_schema=False)
    before = pa.total_allocated_bytes()
    limits = Limits(1_000_000, 10**12, 1, 100)
    with refused("expected to unpack to at most 100 times its size, found more"):
        rows_of(tmp_path, "parquet", limits)
    assert pa.total_allocated_bytes() - before < 50_000_000
    with refused("expected at most 1000000 bytes unpacked, found more"):
        rows_of(tmp_path, "parquet", Limits(1_000_000, 1_000_000, 1, 10**9))


def test_zeros_that_unpack_to_a_thousand_times_their_size_are_refused(tmp_path: Path) -> None:
    zeros = pa.table({"text": np.zeros(2_000_000)})
    parquet_of(tmp_path, zeros, compression="zstd", use_dictionary=False)
    with refused("expected to unpack to at most 100 times its size, found more"):
        rows_of(tmp_path, "parquet", Limits(10_000_000, 10**12, 1, 100))


def test_declared_rows_are_counted_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_of(tmp_path, pa.table({"text": range(1001)}))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", None)
    with refused("at most 1000 rows are read, found more"):
        rows_of(tmp_path, "parquet")


COLUMNS = {
    "nested": (pa.array([{"a": CANARY}]), "expected flat columns of different names, found others"),
    "a list": (pa.array([[CANARY]]), "expected flat columns of different names, found others"),
    "bytes": (pa.array([CANARY.encode()]), "column 'text': expected text, numbers, truth values or dates, found binary"),
    "times of day": (
        pa.array([1], pa.time64("us")),
        "column 'text': expected text, numbers, truth values or dates, found time64",
    ),
    "a number that is too large": (pa.array([2**63], pa.uint64()), "expected a Parquet file without damage"),
    "text that is no UTF-8": (
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(struct.pack("<2i", 0, 2)), pa.py_buffer(b"\xff\xfe")]),
        "expected a Parquet file without damage",
    ),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_of_another_kind_is_refused(tmp_path: Path, case: str) -> None:
    column, message = COLUMNS[case]
    parquet_of(tmp_path, pa.table({"text": column}))
    with refused(message):
        rows_of(tmp_path, "parquet")


PLAIN = {
    "small integers": (pa.array([1, None], pa.int8()), [1, None]),
    "halves": (pa.array([0.5], pa.float32()), [0.5]),
    "decimals": (pa.array(["1.50"]).cast(pa.decimal128(5, 2)), [1.5]),
    "truth": (pa.array([True, False]), [True, False]),
    "days": (pa.array(["2020-01-31"]).cast(pa.date32()), ["2020-01-31"]),
    "moments": (pa.array([1_000_000_001], pa.timestamp("ns")), ["1970-01-01T00:00:01"]),
    "large texts": (pa.array(["ä", None], pa.large_string()), ["ä", None]),
    "categories": (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    "nothing": (pa.nulls(2), [None, None]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_flat_parquet_columns_become_texts_and_numbers(tmp_path: Path, case: str) -> None:
    column, expected = PLAIN[case]
    assert [row["text"] for row in rows_of(parquet_of(tmp_path, pa.table({"text": column})), "parquet")] == expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    parquet_of(folder, pa.table({"text": [CANARY, "b", CANARY], "n": [1, 2, 3]}))
    content = bytearray((folder / "records.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "records.parquet").write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    message = ""
    try:
        with opened_parquet(folder, "records.parquet", "data", LIMITS) as opened:
            list(opened.batches(opened.names))
    except SiteConfigError as error:
        message = str(error)
    assert CANARY not in message


# ---- SQL


def test_a_query_may_hold_colons_and_percent_signs(tmp_path: Path) -> None:
    write_sql(tmp_path, [ROW | {"id": "a:b"}, ROW | {"id": "c"}])
    query = "SELECT * FROM records WHERE id LIKE 'a:%' AND id != ':none' ;"
    assert load_records(tmp_path, declared(TABLE | SQL, query=query), KEY).ids == ("a:b",)


QUERIES = [
    *(
        "DELETE FROM records",
        "SELECT 1; DELETE FROM records",
        "INSERT INTO records SELECT * FROM records",
        "PRAGMA writable_schema=1",
    ),
    *(
        "SELECT * INTO copied FROM records",
        "WITH gone AS (DELETE FROM records RETURNING *) SELECT * FROM gone",
        "selection",
        "",
    ),
]


@pytest.mark.parametrize("query", QUERIES)
def test_only_one_select_is_run(tmp_path: Path, query: str) -> None:
    write_sql(tmp_path, [ROW])
    with refused("expected one SELECT statement"):
        sql_reader.check_select(query, "data")
    with sqlite3.connect(tmp_path / "records.sqlite") as database:
        assert database.execute("SELECT count(*) FROM records").fetchone() == (1,)
    database.close()


def test_the_connection_to_sqlite_cannot_write(tmp_path: Path) -> None:
    write_sql(tmp_path, [ROW])
    with sql_reader._connected(tmp_path, "sqlite:///records.sqlite", "data", LIMITS) as connection:
        with pytest.raises(OperationalError, match="readonly"):
            connection.execute(text("DELETE FROM records"))
        connection.rollback()


DATABASES: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({"url": f"sqlite:///../{CANARY}"}, "expected a relative path without '..'"),
    "absolute": ({"url": f"sqlite:////{CANARY}"}, "expected a relative path without '..'"),
    "in memory": ({"url": "sqlite://"}, "expected a relative path without '..'"),
    "missing": ({"url": f"sqlite:///{CANARY}"}, "expected something at its path, found nothing"),
    "no URL": ({"url": CANARY}, "expected a URL as SQLAlchemy knows them, found another"),
    "a port of letters": ({"url": f"postgresql://host:{CANARY}/x"}, "expected a URL as SQLAlchemy knows them, found another"),
    "unknown": ({"url": f"{CANARY.replace('-', '')}://host/x"}, "found NoSuchModuleError"),
    "no driver": ({"url": f"postgresql+pg8000://{CANARY}/x"}, "found ModuleNotFoundError"),
    "a password": ({"url": f"postgresql://user:{CANARY}@host/x"}, "expected a URL without a password, found one"),
    "no variable": (
        {"url": None, "url_variable": "URNA_TEST_URL"},
        "expected the environment variable URNA_TEST_URL, found none",
    ),
    "no table": ({"query": f"SELECT * FROM '{CANARY}'"}, "found OperationalError"),
    "no column": ({"query": f"SELECT [{CANARY}] FROM records"}, "found OperationalError"),
    "two columns alike": ({"query": "SELECT id, id FROM records"}, "expected columns of different names, found two alike"),
    "bytes": ({"query": "SELECT id, label, age, x'ff' AS sex FROM records"}, "row 1: expected text, numbers, dates or null"),
    "no UTF-8": ({"query": "SELECT CAST(x'ff' AS TEXT) AS id, label, age, sex FROM records"}, "found OperationalError"),
}


@pytest.mark.parametrize("case", DATABASES)
def test_a_database_that_does_not_answer_is_refused_without_the_query_or_values(tmp_path: Path, case: str) -> None:
    changes, message = DATABASES[case]
    write_sql(tmp_path, [ROW])
    with refused(message):
        load_records(tmp_path, declared(TABLE | SQL, **changes), KEY)


def test_a_url_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sql(tmp_path, [ROW])
    monkeypatch.setenv("URNA_TEST_URL", "sqlite:///records.sqlite")
    assert len(load_records(tmp_path, declared(TABLE | SQL, url=None, url_variable="URNA_TEST_URL"), KEY)) == 1


# ---- images


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def a_png(image: Image.Image, format_: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


def pixels_of(folder: Path, content: bytes, height: int = 2, width: int = 3, channels: int = 1) -> Any:
    (folder / f"{CANARY}.png").write_bytes(content)
    return read_image(folder, f"{CANARY}.png", "image 1", LIMITS, height, width, channels)


def frames(*images: Image.Image) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


GREY = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 51)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 100), np.uint8))
BROKEN = {
    "no image": (CANARY.encode(), "expected an image (PNG, JPEG, TIFF, BMP), found something else"),
    "another format": (a_png(GREY, "GIF"), "expected an image (PNG, JPEG, TIFF, BMP), found something else"),
    "cut off": (a_png(NOISE)[:5000], "expected an image that can be decoded, found damage"),
    "over the limit": (png_header(1001, 1000), "expected an image of at most 1000000 pixels, found more"),
    "where Pillow warns": (png_header(10_000, 9_500), "expected an image of at most 1000000 pixels, found more"),
    "where Pillow stops": (png_header(60_000, 60_000), "expected an image of at most 1000000 pixels, found more"),
    "a bomb": (a_png(Image.new("RGB", (1000, 1000))), "expected at most 1000000 bytes unpacked, found more"),
    "several in one": (frames(GREY, GREY), "expected one image in the file, found several"),
    "32 bits": (a_png(Image.new("F", (3, 2)), "TIFF"), "expected pixels of 8 or 16 bits, found mode F"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_plain_image_is_refused_by_its_place(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    with refused(f"image 1: {message}"):
        pixels_of(tmp_path, content)


def test_an_image_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    content = a_png(Image.new("RGB", (1000, 1000)))
    assert 100 * len(content) < 3_000_000
    (tmp_path / "a.png").write_bytes(content)
    with refused("expected to unpack to at most 100 times its size, found more"):
        read_image(tmp_path, "a.png", "image 1", Limits(10, 10_000_000, 10_000_000, 100), 2, 2, 1)
    wider = Limits(10, 10_000_000, 10_000_000, 10_000)
    assert read_image(tmp_path, "a.png", "image 1", wider, 2, 2, 1).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("format_", FORMATS)
def test_pixels_of_the_declared_size_are_kept_as_they_are(tmp_path: Path, format_: str) -> None:
    pixels = pixels_of(tmp_path, a_png(GREY, format_))
    assert pixels.dtype == np.float32
    exact = np.arange(6, dtype=np.float32).reshape(2, 3) * 51 / 255
    np.testing.assert_allclose(pixels, exact, atol=0.1 if format_ == "JPEG" else 0)


def test_colours_become_three_channels_and_grey_one(tmp_path: Path) -> None:
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    pixels = pixels_of(tmp_path, a_png(red), channels=3)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 0].tolist() == [1, 0, 0]
    assert pixels_of(tmp_path, a_png(red))[0, 0] == pytest.approx(0.299, abs=0.005)
    assert pixels_of(tmp_path, a_png(GREY), channels=3)[:, 0, 1].tolist() == pytest.approx([0.2] * 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_every_mode_of_eight_bits_is_read(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    assert pixels_of(tmp_path, a_png(white)).tolist() == [[1.0] * 3] * 2


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 300, 65_535], [1000, 20_000, 40_000]], np.uint16)
    content = a_png(Image.fromarray(values))
    np.testing.assert_allclose(pixels_of(tmp_path, content), values / 65_535, rtol=1e-6)
    assert pixels_of(tmp_path, content, channels=3).shape == (3, 2, 3)


def test_a_larger_image_is_averaged_to_the_declared_size(tmp_path: Path) -> None:
    halves = np.zeros((40, 60), np.uint8)
    halves[:, 30:] = 255
    pixels = pixels_of(tmp_path, a_png(Image.fromarray(halves)), height=2, width=2)
    np.testing.assert_allclose(pixels, [[0, 1], [0, 1]], atol=0.2)


def test_an_image_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    (tmp_path / f"{CANARY}.png").write_bytes(a_png(GREY))
    (tmp_path / "pictures" / "cat" / f"{CANARY}.png").symlink_to(tmp_path / f"{CANARY}.png")
    with refused("label 'cat': file 1 in sorted order: a symbolic link leaves its folder"):
        load_records(tmp_path, declared(PICTURES), KEY)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_a_damaged_image_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, format_: str, data: st.DataObject
) -> None:
    content = bytearray(a_png(GREY, format_))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    message, pixels = "", np.zeros((2, 3))
    try:
        pixels = pixels_of(tmp_path_factory.mktemp("damaged"), bytes(content))
    except SiteConfigError as error:
        message = str(error)
    assert CANARY not in message
    assert pixels.shape == (2, 3)
    assert 0 <= pixels.min() <= pixels.max() <= 1


# ---- texts


def test_a_text_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "notes" / "no").mkdir(parents=True)
    (tmp_path / "notes" / "no" / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    records = load_records(tmp_path, declared(TEXT | {"format": "text", "path": "notes"}), KEY)
    assert records.inputs == Texts(("hello",))


def test_unused_columns_of_a_parquet_file_are_not_unpacked(tmp_path: Path) -> None:
    write_parquet(tmp_path, [ROW | {"nested": "x", "binary": b"\xff"}])
    write_csv(tmp_path, [ROW | {"extra": CANARY}])
    for format_ in ("parquet", "csv"):
        assert len(load_records(tmp_path, declared(TABLE | WRITERS[format_][1]), KEY)) == 1
