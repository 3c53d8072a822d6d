"""What an intruder, a full disk or a crash can do to kept features: cause a miss, and nothing else."""

import logging
import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from urna.client import feature_cache
from urna.client.feature_cache import STALE_SECONDS, FeatureCache, data_version
from urna.client.records import Images, Records, Table, Texts

KEY = bytes(range(32))
PARTS = ("ab" * 32, "cd" * 32, "tuning", "1")
FILE_OVERHEAD = 16 + 12 + 16 + 16  # magic, nonce, shape, tag
Features = npt.NDArray[np.float32]


def some_features(num_records: int = 50, dim: int = 7, seed: int = 0) -> Features:
    return np.random.default_rng(seed).normal(size=(num_records, dim)).astype(np.float32)


def never() -> Features:
    pytest.fail("computed again")


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "site" / "features"


@pytest.fixture
def cache(folder: Path) -> FeatureCache:
    return FeatureCache(folder, KEY)


def test_features_are_computed_once_and_kept_across_openings(folder: Path) -> None:
    features = some_features()
    assert FeatureCache(folder, KEY).features(PARTS, lambda: features) is features
    again = FeatureCache(folder, KEY).features(PARTS, never)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, features)
    assert again.flags.writeable


def test_another_process_finds_them(folder: Path, cache: FeatureCache) -> None:
    features = some_features()
    cache.features(PARTS, lambda: features)
    source = (
        "import sys, pathlib; from urna.client.feature_cache import FeatureCache;"
        f"found = FeatureCache(pathlib.Path(sys.argv[1]), bytes(range(32))).features({PARTS!r}, lambda: 1 / 0);"
        "sys.stdout.write(found.tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", source, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == features.tobytes().hex()


@pytest.mark.parametrize(("num_records", "dim"), [(0, 5), (1, 1), (3, 100_000), (1, 262_144), (2, 262_145), (4, 0)])
def test_any_shape_comes_back_as_it_was(num_records: int, dim: int, cache: FeatureCache) -> None:
    features = some_features(num_records, dim)
    cache.put("a", features)
    found = cache.get("a")
    assert found is not None
    assert found.shape == features.shape
    np.testing.assert_array_equal(found, features)


def test_numbers_come_back_bit_for_bit_even_such_as_are_not_finite(cache: FeatureCache) -> None:
    features = np.array([[np.nan, -np.inf, -0.0, 1e-45]], np.float32)
    cache.put("a", features)
    found = cache.get("a")
    assert found is not None
    assert found.tobytes() == features.tobytes()


def test_a_view_that_is_not_contiguous_is_kept_as_it_reads(cache: FeatureCache) -> None:
    features = some_features(20, 20)[::2, ::3]
    cache.put("a", features)
    np.testing.assert_array_equal(cache.get("a"), features)


@pytest.mark.parametrize(
    "other",
    [("xx", *PARTS[1:]), (*PARTS[:3], "2"), (*PARTS[:2], "heldout", "1"), PARTS[:3], (PARTS[0] + PARTS[1], *PARTS[2:])],
    ids=["model", "preprocessing", "part of the split", "fewer parts", "parts run together"],
)
def test_other_parts_are_another_key(other: tuple[str, ...], cache: FeatureCache) -> None:
    cache.features(PARTS, some_features)
    fresh = some_features(seed=1)
    assert cache.features(other, lambda: fresh) is fresh
    np.testing.assert_array_equal(cache.features(PARTS, never), some_features())


def test_whoever_knows_the_model_and_the_records_cannot_name_the_file(cache: FeatureCache) -> None:
    """Else a list of names would tell which public model a site evaluates."""
    assert cache.key(PARTS) != FeatureCache(Path(), bytes(32)).key(PARTS)


def test_what_is_on_the_disk_shows_neither_features_nor_key(folder: Path, cache: FeatureCache) -> None:
    features = np.tile(some_features(1, 16), (1000, 1))
    cache.put("a", features)
    content = files_of(folder)[0].read_bytes()
    assert len(content) == features.nbytes + FILE_OVERHEAD
    assert features[0, :4].tobytes() not in content
    assert KEY[:8] not in content
    assert len({content[at : at + 64] for at in range(44, 44 + features.nbytes, 64)}) == 1000  # equal rows look different


def test_the_same_features_are_never_encrypted_alike(folder: Path, cache: FeatureCache) -> None:
    cache.put("a", some_features())
    first = files_of(folder)[0].read_bytes()
    cache.put("a", some_features())
    second = files_of(folder)[0].read_bytes()
    assert first[16:28] != second[16:28]
    assert first[44:] != second[44:]


def test_only_the_owner_reads_them_whatever_the_umask(folder: Path, cache: FeatureCache) -> None:
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    before = os.umask(0)
    try:
        cache.put("a", some_features())
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files_of(folder)] == [0o600]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def changed(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return change


def transposed(path: Path) -> None:
    """The same number of numbers in another shape."""
    content = bytearray(path.read_bytes())
    content[28:44] = struct.pack("<QQ", 7, 50)
    path.write_bytes(content)


def of_endless_rows(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:28] + struct.pack("<QQ", 0, 2**63) + bytes(16))


def of_a_size_that_no_memory_has(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:28] + struct.pack("<QQ", 2**40, 2**20) + content[44:])


def unreadable_kind(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_a_good_one(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def of_another_key(path: Path) -> None:
    other = FeatureCache(path.parent, bytes(32))
    other.put(path.name.removesuffix(".features"), some_features())


def renamed_from_another(path: Path) -> None:
    FeatureCache(path.parent, KEY).put("other", some_features(seed=5))
    (path.parent / "other.features").replace(path)


DAMAGES = {
    "cut": cut,
    "cut to nothing": cut_to_nothing,
    "cut in the header": cut_in_the_header,
    "lengthened": lengthened,
    "another magic": changed(0),
    "another nonce": changed(20),
    "another number": changed(60),
    "another tag": changed(-1),
    "transposed": transposed,
    "endless rows": of_endless_rows,
    "too large for any memory": of_a_size_that_no_memory_has,
    "a folder": unreadable_kind,
    "a pipe": a_pipe,
    "a symbolic link": a_link_to_a_good_one,
    "of another data key": of_another_key,
    "renamed": renamed_from_another,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_a_miss_that_is_logged(
    damage: str, folder: Path, cache: FeatureCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.features(PARTS, some_features)
    DAMAGES[damage](files_of(folder)[0])
    fresh = some_features(seed=1)
    with caplog.at_level(logging.WARNING, "urna.site"):
        assert cache.features(PARTS, lambda: fresh) is fresh
    assert "features that were kept cannot be read, so they are computed again" in caplog.text
    if damage != "a folder":  # in whose place nothing can be put
        np.testing.assert_array_equal(cache.features(PARTS, never), fresh)


def test_every_bit_of_a_file_counts(folder: Path, cache: FeatureCache) -> None:
    cache.put("a", some_features(2, 2))
    path = files_of(folder)[0]
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        content = bytearray(whole)
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        assert cache.get("a") is None
    path.write_bytes(whole)
    assert cache.get("a") is not None


def test_what_is_kept_takes_no_more_than_its_part_of_the_disk_and_the_oldest_go_first(folder: Path) -> None:
    one = some_features(10, 10)
    cache = FeatureCache(folder, KEY, limit_bytes=3 * (one.nbytes + FILE_OVERHEAD))
    for number, name in enumerate("abc"):
        cache.put(name, one)
        os.utime(folder / f"{name}.features", (number, number))
    assert cache.get("a") is not None  # used: the newest now
    cache.put("d", one)
    assert [path.stem for path in files_of(folder)] == ["a", "c", "d"]
    cache.put("e", some_features(20, 10))
    assert [path.stem for path in files_of(folder)] == ["d", "e"]
    assert sum(path.stat().st_size for path in files_of(folder)) <= 3 * (one.nbytes + FILE_OVERHEAD)


def test_what_is_larger_than_all_room_is_used_and_not_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(folder, KEY, limit_bytes=1000)
    features = some_features(100, 100)
    with caplog.at_level(logging.WARNING, "urna.site"):
        assert cache.features(PARTS, lambda: features) is features
    assert "features are not kept: they take more than 1000 bytes" in caplog.text
    assert not folder.exists()


def test_a_clock_that_went_back_does_not_take_away_what_was_just_kept(folder: Path) -> None:
    one = some_features(10, 10)
    cache = FeatureCache(folder, KEY, limit_bytes=one.nbytes + FILE_OVERHEAD)
    cache.put("a", one)
    future = time.time() + 10**6
    os.utime(folder / "a.features", (future, future))
    cache.put("b", one)
    assert [path.stem for path in files_of(folder)] == ["b"]


def test_what_a_crash_left_unfinished_goes_and_what_is_being_written_stays(folder: Path, cache: FeatureCache) -> None:
    folder.mkdir(parents=True)
    old, new, strange = folder / "x.0.part", folder / "y.0.part", folder / "notes.txt"
    for path in (old, new, strange):
        path.write_bytes(b"...")
    long_ago = time.time() - STALE_SECONDS - 60
    for path in (old, strange):
        os.utime(path, (long_ago, long_ago))
    cache.put("a", some_features())
    assert [path.name for path in files_of(folder)] == ["a.features", "notes.txt", "y.0.part"]


@pytest.mark.parametrize("fails_at", ["_write", "_make_room"])
def test_a_disk_that_refuses_costs_the_cache_and_not_the_request(
    fails_at: str, folder: Path, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache if fails_at == "_write" else FeatureCache, fails_at, refuse)
    features = some_features()
    with caplog.at_level(logging.WARNING, "urna.site"):
        assert cache.features(PARTS, lambda: features) is features
    assert "features are not kept: [Errno 28] No space left on device" in caplog.text
    assert [path.suffix for path in files_of(folder)] in ([], [".features"])  # nothing unfinished


def test_a_folder_that_cannot_be_made_costs_the_cache_and_not_the_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    features = some_features()
    assert FeatureCache(tmp_path / "file" / "features", KEY).features(PARTS, lambda: features) is features


def test_an_error_of_the_model_is_no_entry(folder: Path, cache: FeatureCache) -> None:
    with pytest.raises(ZeroDivisionError):
        cache.features(PARTS, lambda: some_features(1 // 0))
    assert not folder.exists()


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros(4, np.float32), np.zeros((1, 2, 2), np.float32)])
def test_only_a_matrix_of_float32_is_kept(wrong: npt.NDArray[np.float32], cache: FeatureCache) -> None:
    with pytest.raises(ValueError, match=r"expected features of float32 \(n, d\), found"):
        cache.put("a", wrong)


def test_the_log_names_no_record_and_no_key(folder: Path, cache: FeatureCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.features(PARTS, some_features)
    cut(files_of(folder)[0])
    with caplog.at_level(logging.DEBUG):
        cache.features(PARTS, some_features)
    assert not [secret for secret in (*PARTS[:2], KEY.hex()) if secret in caplog.text]


def some_records() -> Records:
    pixels = np.random.default_rng(0).uniform(size=(4, 2, 3)).astype(np.float32)
    return Records(("a", "b", "c", "d"), ("p", "p", "q", "r"), np.array([0, 1, 0, 1]), Images(pixels))


def some_texts(*texts: str) -> Records:
    return Records(("a", "b"), ("a", "b"), np.array([0, 1]), Texts(texts))


def some_rows(**columns: list[float]) -> Records:
    values = {name: np.array(column, np.float64) for name, column in columns.items()}
    return Records(("a", "b"), ("a", "b"), np.array([0, 1]), Table(values))


def with_pixel(at: tuple[int, int, int], value: float) -> Records:
    records = some_records()
    records.images[at] = value
    return records


CHANGED_RECORDS = {
    "an id": replace(some_records(), ids=("a", "b", "c", "e")),
    "ids run together": replace(some_records(), ids=("ab", "", "c", "d")),
    "a unit": replace(some_records(), units=("p", "q", "q", "r")),
    "a label": replace(some_records(), labels=np.array([0, 1, 1, 1])),
    "a pixel": with_pixel((3, 1, 2), 0.5),
    "a record less": some_records().take(np.array([True, True, True, False])),
    "another shape": replace(some_records(), inputs=Images(some_records().images.reshape(4, 3, 2))),
    "texts": some_texts("ab", "c"),
    "texts cut elsewhere": some_texts("a", "bc"),
    "text in capitals": some_texts("AB", "c"),
    "columns": some_rows(x=[1, 2], y=[3, 4]),
    "columns called otherwise": some_rows(y=[1, 2], x=[3, 4]),
    "another value": some_rows(x=[1, 2], y=[3, 5]),
    "a column less": some_rows(x=[1, 2]),
}


def test_any_changed_record_is_another_version() -> None:
    versions = [data_version(records, KEY) for records in (some_records(), *CHANGED_RECORDS.values())]
    assert len(set(versions)) == len(versions)
    assert data_version(some_records(), KEY) == versions[0]
    assert data_version(some_records(), bytes(32)) != versions[0]  # unrelated under another key


def test_records_in_another_order_are_another_version() -> None:
    turned = np.array([1, 0, 2, 3])
    one = some_records()
    other = Records(
        tuple(one.ids[at] for at in turned),
        tuple(one.units[at] for at in turned),
        one.labels[turned],
        Images(one.images[turned]),
    )
    assert data_version(one, KEY) != data_version(other, KEY)


def test_no_records_have_a_version_too() -> None:
    none = some_records().take(np.zeros(4, np.bool_))
    assert len(data_version(none, KEY)) == 64
