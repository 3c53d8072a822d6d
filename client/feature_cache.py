"""Frozen features of a site's records, computed once and kept on its disk: stock Flower starts a process for each message.

A file a key, in the site's folder: header, AES-256-GCM of the float32 numbers, tag. Whatever is wrong with a file, it is a
miss: the features are computed again, the log says why, and no request fails.

Covered:
    * features lie encrypted, under a key that HKDF (RFC 5869) derives from the site's data key: a lost disk shows sizes only;
    * a file's name is a keyed hash of model, records and preprocessing, and is authenticated with its content: a file that was
      cut, changed, renamed or made under another data key is not read; another record, label or order is another key;
    * nobody but the owner reads the folder; files are complete or absent; the oldest go first when the disk's share is full.
Not covered:
    * whoever has the data key has the features; they tell of records nearly as much as the records themselves;
    * memory: the features of one call are whole in it; what is deleted may stay on the disk's blocks, encrypted.
"""

import hmac
import json
import logging
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from urna.client.records import Images, Records, Texts

Features = npt.NDArray[np.float32]
LIMIT_BYTES = 2_000_000_000
SUFFIX, UNFINISHED = ".features", ".part"
STALE_SECONDS = 3600  # a file that was being written so long ago never will be complete
_MAGIC = b"urna-features-1".ljust(16, b"\0")
_HEADER = struct.Struct("<16s12sQQ")  # magic, nonce, n, d
_TAG_BYTES, _NONCE_BYTES = 16, 12
_PIECE_BYTES = 1 << 20


class FeatureCache:
    """What is kept of one site.

    Args:
        folder: its own; made when something is kept.
        data_key: the site's, 32 bytes.
        limit_bytes: of all files together.
        log: the site's.
    """

    def __init__(
        self, folder: Path, data_key: bytes, *, limit_bytes: int = LIMIT_BYTES, log: logging.Logger | None = None
    ) -> None:
        derived = HKDF(SHA256(), 64, salt=None, info=b"urna/1 feature cache").derive(data_key)
        self._content_key, self._name_key = derived[:32], derived[32:]
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._log = logging.getLogger("urna.site") if log is None else log

    def features(self, key_parts: Sequence[str], compute: Callable[[], Features]) -> Features:
        """Those that are kept under this key, or else computed, and kept.

        Args:
            key_parts: all that they depend on: model's hash, `data_version`, part of the split, version of the preprocessing.
            compute: makes them, float32 (n, d).
        """
        key = self.key(key_parts)
        found = self.get(key)
        if found is None:
            found = compute()
            self.put(key, found)
        return found

    def key(self, parts: Sequence[str]) -> str:
        """The name of what depends on these parts, in this order; nobody without the data key can tell of what."""
        return hmac.digest(self._name_key, json.dumps(list(parts)).encode(), "sha256").hex()

    def get(self, key: str) -> Features | None:
        """The features that were kept, (n, d), or None."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                found = self._opened(file, key)
            os.utime(path)  # it is the newest now
        except FileNotFoundError:
            return None
        except (OSError, ValueError, InvalidTag) as error:
            self._log.warning("features that were kept cannot be read, so they are computed again: %s", _said(error))
            return None
        return found

    def put(self, key: str, features: Features) -> None:
        """Keep features, (n, d); what does not fit, or what the disk refuses, is only not kept.

        Raises:
            ValueError: they are no float32 matrix.
        """
        if features.dtype != np.float32 or features.ndim != 2:
            raise ValueError(f"expected features of float32 (n, d), found {features.dtype} {features.shape}")
        if _HEADER.size + features.nbytes + _TAG_BYTES > self._limit_bytes:
            self._log.warning("features are not kept: they take more than %d bytes", self._limit_bytes)
            return
        unfinished = self._folder / f"{key}.{os.urandom(8).hex()}{UNFINISHED}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)  # a folder of before, or one that was copied here
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                self._seal(file, key, features)
            unfinished.replace(self._path(key))  # not synchronised: what a power cut leaves is a miss
            self._make_room(key)
        except OSError as error:
            self._log.warning("features are not kept: %s", _said(error))
            with suppress(OSError):
                unfinished.unlink()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"

    def _seal(self, file: FileIO, key: str, features: Features) -> None:
        header = _HEADER.pack(_MAGIC, nonce := os.urandom(_NONCE_BYTES), *features.shape)
        cipher = Cipher(algorithms.AES(self._content_key), modes.GCM(nonce)).encryptor()
        cipher.authenticate_additional_data(header + key.encode())
        _write(file, header)
        plain = np.ascontiguousarray(features, "<f4").reshape(-1).view(np.uint8).data
        for start in range(0, len(plain), _PIECE_BYTES):
            _write(file, cipher.update(plain[start : start + _PIECE_BYTES]))
        cipher.finalize()
        _write(file, cipher.tag)

    def _opened(self, file: FileIO, key: str) -> Features:
        header, tag, size = bytearray(_HEADER.size), bytearray(_TAG_BYTES), os.fstat(file.fileno()).st_size
        _read_into(file, header)
        magic, nonce, *shape = _HEADER.unpack(header)
        num_numbers = shape[0] * shape[1]
        expected = _HEADER.size + 4 * num_numbers + _TAG_BYTES
        if magic != _MAGIC or size != expected or size > self._limit_bytes:  # before any memory is asked for
            raise ValueError(f"expected a file of {expected} bytes of features, found {size}, or something else")
        numbers = np.empty(num_numbers, "<f4")
        content = numbers.view(np.uint8).data
        _read_into(file, content)
        _read_into(file, tag)
        cipher = Cipher(algorithms.AES(self._content_key), modes.GCM(nonce, bytes(tag))).decryptor()
        cipher.authenticate_additional_data(bytes(header) + key.encode())
        for start in range(0, len(content), _PIECE_BYTES):
            piece = content[start : start + _PIECE_BYTES]
            piece[:] = cipher.update(piece)
        cipher.finalize()  # nothing of it is used before
        return np.asarray(numbers.reshape(shape), dtype=np.float32)

    def _make_room(self, kept: str) -> None:
        """Take away the oldest until all fit, and what was never finished."""
        files = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith((SUFFIX, UNFINISHED)):
                with suppress(FileNotFoundError):  # another process took it away
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        stale = time.time_ns() - STALE_SECONDS * 10**9
        for at, size, path in sorted(files):
            is_unfinished = path.name.endswith(UNFINISHED)
            if (at < stale) if is_unfinished else (total > self._limit_bytes and path != self._path(kept)):
                path.unlink(missing_ok=True)
                total -= size


def data_version(records: Records, data_key: bytes) -> str:
    """A keyed hash of all of the records, in order: ids, units, labels and inputs."""
    digest = hmac.new(data_key, b"feature-cache-version\0", "sha256")

    def add(kind: str, content: bytes | memoryview, *numbers: int) -> None:
        digest.update(json.dumps([kind, len(content), *numbers]).encode() + b"\0")  # so that no two records read alike
        digest.update(content)

    def add_texts(kind: str, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        add(f"{kind} lengths", np.array([len(one) for one in encoded], "<u8").tobytes())
        add(kind, b"".join(encoded))

    add_texts("ids", records.ids)
    add_texts("units", records.units)
    add("labels", np.ascontiguousarray(records.labels, "<i8").tobytes())
    inputs = records.inputs
    if isinstance(inputs, Images):
        pixels = np.ascontiguousarray(inputs.pixels, "<f4")
        add("pixels", pixels.reshape(-1).view(np.uint8).data, *pixels.shape)
    elif isinstance(inputs, Texts):
        add_texts("texts", inputs.texts)
    else:
        add_texts("columns", list(inputs.columns))
        for values in inputs.columns.values():
            add("column", np.ascontiguousarray(values, "<f8").tobytes())
    return digest.hexdigest()


def _write(file: FileIO, content: bytes) -> None:
    view = memoryview(content)
    while view:  # a full disk may take a part, and refuse the next
        view = view[file.write(view) :]


def _read_into(file: FileIO, out: bytearray | memoryview) -> None:
    view = memoryview(out)
    while view:
        length = file.readinto(view)
        if not length:
            raise ValueError(f"expected {len(view)} bytes more, found the end of the file")
        view = view[length:]


def _said(error: Exception) -> str:
    is_tag = isinstance(error, InvalidTag)
    return "they were changed, renamed, or made under another data key" if is_tag else str(error)
