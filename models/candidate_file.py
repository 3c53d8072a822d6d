"""candidate.json: all that is public about an installed candidate, and the hash of every file of its artefact.

Its own hash is the candidate's: what a plan pins, a hello states and a ledger knows. One spelling only is accepted, so the
same facts have one hash.

Covered:
    a file that is not JSON, too large, in another spelling, or with unknown, missing or senseless fields;
    names of files that are paths, or are none that an artefact may hold (no code, no pickle).
Not covered:
    whether what it says is true: licence and origin are the word of whoever installed the model.
"""

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from urna.protocol.errors import ModelError

CANDIDATE_FILE, CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = (
    "candidate.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
)
MAX_CANDIDATE_BYTES = 2**16
MAX_CONFIG_BYTES = 2**20
MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_INSTALLED_BYTES = 4 * 2**30  # of the weights; they are read into memory before they are parsed
FileName = Literal["config.json", "model.safetensors", "tokenizer.json"]
FILE_LIMITS: Mapping[str, int] = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    WEIGHTS_FILE: MAX_INSTALLED_BYTES,
    TOKENIZER_FILE: MAX_TOKENIZER_BYTES,
}

_REINSTALL = "install it again with `urna models add`"


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


Line = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_one_line)]
CandidateName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Size = Annotated[int, Field(ge=1, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FilePin(_Stored):
    """What one file of the artefact has to be."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=1, le=MAX_INSTALLED_BYTES)]


MAX_TOKENS = 2**13  # of a text, whatever a model could read: one longer would take a site's memory


class TextInput(_Stored):
    """How texts become tokens: truncated to ``max_tokens``, padded on the right with ``pad_id``."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    pad_id: Annotated[int, Field(ge=0, le=2**24)]


class PictureInput(_Stored):
    """How pictures become tensors: resized whole to ``height`` x ``width``, then (value - mean) / std per channel."""

    height: Annotated[int, Field(ge=1, le=2048)]
    width: Annotated[int, Field(ge=1, le=2048)]
    mean: Annotated[tuple[Finite, ...], Field(min_length=3, max_length=3, strict=False)]
    std: Annotated[tuple[Positive, ...], Field(min_length=3, max_length=3, strict=False)]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class CandidateFile(_Stored):
    """candidate.json; the facts are those of `catalogue.CandidateSpec`."""

    format: Literal["urna-candidate-1"] = "urna-candidate-1"
    name: CandidateName
    family: Line
    model_type: Line  # as config.json says it; one of `huggingface.FAMILIES`
    modality: Line
    tasks: Annotated[tuple[Line, ...], Field(min_length=1, max_length=16, strict=False)]
    input_shape: Annotated[tuple[Size, ...], Field(max_length=4, strict=False)]
    feature_dim: Annotated[int, Field(ge=1, le=2**16)]
    num_parameters: Annotated[int, Field(ge=1, le=2**40)]
    licence: Line
    pretrained_on: Line
    summary: Line
    text: TextInput | None = None
    picture: PictureInput | None = None
    files: dict[FileName, FilePin]

    def to_bytes(self) -> bytes:
        """The one spelling: sorted keys, no spaces, a newline at the end."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode() + b"\n"

    @property
    def sha256(self) -> str:
        """The candidate's hash."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def parse_candidate(name: str, content: bytes, path: Path) -> CandidateFile:
    """Read the bytes of a candidate.json.

    Args:
        name: What the candidate has to be called.
        content: The bytes.
        path: Where they come from, for the message.

    Raises:
        ModelError: they are not those of a candidate of this name, or not in the one spelling.
    """
    try:
        found = CandidateFile.model_validate_json(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()[:3])
        raise ModelError(f"candidate.json of {name!r} is malformed, found {wrong!r} in {path}: {_REINSTALL}") from None
    except RecursionError:
        raise ModelError(f"candidate.json of {name!r} is malformed, found deep nesting in {path}: {_REINSTALL}") from None
    if found.name != name:
        raise ModelError(f"candidate.json of {name!r} must be of this name, found {found.name!r} in {path}: {_REINSTALL}")
    if found.to_bytes() != content:
        raise ModelError(f"candidate.json of {name!r} must be in its one spelling, found another in {path}: {_REINSTALL}")
    wanted = {CONFIG_FILE, WEIGHTS_FILE} | ({TOKENIZER_FILE} if found.text else set())
    if set(found.files) != wanted or (found.text is None) != (found.modality != "text"):
        raise ModelError(f"candidate.json of {name!r} must pin {sorted(wanted)}, found {sorted(found.files)}: {_REINSTALL}")
    if (found.picture is None) != (found.modality != "image"):
        raise ModelError(f"candidate.json of {name!r} must say how pictures are read, or read none: {_REINSTALL}")
    return found


def read_candidate(name: str, folder: Path) -> tuple[CandidateFile, str]:
    """Read an installed candidate's candidate.json, once.

    Returns:
        What it says, and the hash of its bytes: the candidate's.

    Raises:
        ModelError: it is missing or malformed.
    """
    path = folder / CANDIDATE_FILE
    content = read_limited(path, MAX_CANDIDATE_BYTES, f"candidate {name!r} is not installed", _REINSTALL)
    return parse_candidate(name, content, path), hashlib.sha256(content).hexdigest()


def read_files(name: str, folder: Path, pins: Mapping[FileName, FilePin]) -> dict[str, bytes]:
    """Read every pinned file once and compare it with its pin; nothing is parsed.

    Raises:
        ModelError: a file is missing, no regular file, too large, or other bytes than the pinned ones.
    """
    contents: dict[str, bytes] = {}
    for file, pin in pins.items():
        path, limit = folder / file, FILE_LIMITS[file]
        content = read_limited(path, min(limit, pin.size), f"candidate {name!r} is not whole", _REINSTALL)
        found = hashlib.sha256(content).hexdigest()
        if found != pin.sha256:
            raise ModelError(f"{file} of {name!r} must have sha256 {pin.sha256}, found {found} in {path}: {_REINSTALL}")
        contents[file] = content
    return contents


def read_limited(path: Path, limit_bytes: int, absent: str, remedy: str) -> bytes:
    """Read a regular file of limited size, once.

    Args:
        path: The file.
        limit_bytes: The most that it may hold.
        absent: What it means when there is none, in words.
        remedy: What to do, in words.

    Raises:
        ModelError: it is missing, no regular file, too large, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device would never end
            raise ModelError(f"{path} must be a regular file, found another kind: remove it, then {remedy}")
        if status.st_size > limit_bytes:
            raise ModelError(f"{path} must be at most {limit_bytes} bytes, found {status.st_size}: remove it, then {remedy}")
        with path.open("rb") as file:
            return file.read(limit_bytes)  # bounded again: the file may have grown since
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{absent}, found no {path}: {remedy}") from None
    except OSError as error:
        raise ModelError(f"{path} must be readable, found {error.strerror}: give this user access to it") from None
