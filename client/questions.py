"""What `urna-site init` asks: the keys of site.toml, each with its question, its reason, and what is proposed.

Of the records only the format, the names of columns and the number of lines are looked at: labels, ranges and categories are
public constants, and must come from a person, not from the values.
"""

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]  # as tomllib reads site.toml; checked by SiteConfig before it is used
Draft = dict[str, Document]  # the same by section; "" holds the keys before any section
MODALITY_OF = {"images": "image", "text": "text"}
FORMATS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl"}
FILES, TABLES = "csv parquet jsonl images text", "csv parquet jsonl sql"
ID_COLUMNS, LABEL_COLUMNS = ("id", "record_id", "uid", "key"), ("label", "class", "target", "diagnosis", "y")
PERSON_COLUMNS = ("person_id", "patient_id", "person", "patient", "subject", "customer_id", "client_id")
LICENCES = ["Apache-2.0", "MIT", "BSD-3-Clause"]
HEADER_LIMIT_BYTES = 1_000_000


@dataclass(frozen=True)
class Question:
    """One key of site.toml: how it is asked for, and why.

    Attributes:
        section: of site.toml; "" before any.
        key: its name there.
        text: the question.
        why: one line, also written into site.toml.
        read: a typed answer to its value; raises ValueError for another kind of answer.
        propose: the default, from the folder and what was answered so far; None: there is none, an empty answer leaves it out.
        applies: whether it is asked at all.
        is_needed: an empty answer is asked again.
    """

    section: str
    key: str
    text: str
    why: str
    read: Callable[[str], Any] = str
    propose: "Callable[[Seen, Draft], Any]" = lambda _seen, _draft: None
    applies: Callable[[Draft], bool] = lambda _draft: True
    is_needed: bool = True


@dataclass(frozen=True)
class Seen:
    """What a look at the folder shows, without a value of any record."""

    folder: Path
    records: Path | None  # a file in it that could be the records
    columns: tuple[str, ...]
    num_lines: int | None  # without the header


def look(folder: Path, path: str | None = None) -> Seen:
    """Which file could hold the records, and the names of its columns (CSV)."""
    files = sorted(one for one in folder.glob("*") if one.suffix in FORMATS and one.is_file()) if folder.is_dir() else []
    records = folder / path if path else (files[0] if files else None)
    if records is None or records.suffix != ".csv" or not _is_file_of(folder, records):
        return Seen(folder, records, (), None)
    try:
        with records.open("rb") as file:
            header = file.readline(HEADER_LIMIT_BYTES).decode("utf-8")
            num_lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        return Seen(folder, records, tuple(next(csv.reader([header]), [])), num_lines)
    except (OSError, UnicodeDecodeError, csv.Error):
        return Seen(folder, records, (), None)


def _is_file_of(folder: Path, path: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def suggested_delta(num_records: int) -> float:
    """A power of ten below 1/n: the chance of an answer that protects nobody must be smaller than picking one record."""
    return float(f"1e-{len(str(num_records))}")


def rounded(count: int) -> int:
    """To two digits, down: the true number is nobody's business."""
    scale: int = 10 ** max(len(str(count)) - 2, 0)
    return max(count // scale * scale, 1)


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("yes", "y", "true", "no", "n", "false"):
        raise ValueError("an answer of yes or no")
    return text.lower() in ("yes", "y", "true")


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text.replace("_", "")):
        raise ValueError("a whole number")
    return int(text.replace("_", ""))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number, with a point") from None


def _table_columns(text: str) -> list[Document]:
    """``age=0:120, sex=f|m`` as the columns of a table."""
    found: list[Document] = []
    for one in _listed(text):
        name, equals, values = one.partition("=")
        low, colon, high = values.partition(":")
        if not equals or not name.strip():
            raise ValueError("age=0:120, sex=f|m: a name, then a range or categories")
        if colon:
            found.append({"name": name.strip(), "type": "number", "minimum": _number(low), "maximum": _number(high)})
        else:
            found.append({"name": name.strip(), "type": "category", "categories": values.split("|")})
    return found


# ---- what is proposed


def _format(seen: Seen, _: Draft) -> str | None:
    return FORMATS.get(seen.records.suffix) if seen.records is not None else None


def _record_file(seen: Seen, _: Draft) -> str | None:
    return seen.records.name if seen.records is not None else None


def _modality(seen: Seen, draft: Draft) -> str | None:
    chosen = MODALITY_OF.get(str(draft["dataset"].get("format")))
    if chosen or not seen.columns:
        return chosen
    return "image" if _side(seen, draft) else "text" if "text" in seen.columns else "table"


def _side(seen: Seen, _: Draft) -> int | None:
    """Of square pictures with a column a pixel: all columns but a few."""
    for num_others in (2, 3):
        side = math.isqrt(max(len(seen.columns) - num_others, 0))
        if side >= 4 and side * side == len(seen.columns) - num_others:
            return side
    return None


def _one_of(*names: str) -> Callable[[Seen, Draft], str | None]:
    def propose(seen: Seen, _: Draft) -> str | None:
        return next((column for name in names for column in seen.columns if column.lower() == name), None)

    return propose


def _declared(seen: Seen, _: Draft) -> int | None:
    return rounded(seen.num_lines) if seen.num_lines else None


def _delta(_: Seen, draft: Draft) -> float | None:
    count = draft["dataset"].get("num_records")
    return suggested_delta(count) if isinstance(count, int) and count > 0 else None


def _per_campaign(_: Seen, draft: Draft) -> float:
    total = draft["policy"].get("epsilon_total")
    return min(3.0, float(total)) if isinstance(total, int | float) else 3.0


def _always(value: Any) -> Callable[[Seen, Draft], Any]:
    return lambda _seen, _draft: value


def _is(**wanted: str) -> Callable[[Draft], bool]:
    return lambda draft: all(draft["dataset"].get(key) in values.split() for key, values in wanted.items())


def _has_classes(draft: Draft) -> bool:
    return "num_classes" not in draft["dataset"]


def _is_linked(draft: Draft) -> bool:
    return bool(draft.get("link", {}).get("superlink"))


QUESTIONS = (
    Question(
        *("", "name", "Name of this site"),
        "The roster pins your keys to this name: up to 63 of a-z, 0-9, - and _.",
        propose=lambda seen, _: seen.folder.absolute().name.lower(),
    ),
    Question(
        *("dataset", "name", "Name of the data set"),
        "A plan may ask for it by this name; it is public.",
        propose=_always("records"),
    ),
    Question(
        *("dataset", "format", "Format (csv, parquet, jsonl, images, text, sql)"),
        "How the records are kept: a file, a folder of images or texts, or a query.",
        propose=_format,
    ),
    Question(
        *("dataset", "path", "Path, inside the site's folder"),
        "The file, or the folder of images or texts; nothing outside the site's folder is ever read.",
        propose=_record_file,
        applies=_is(format=FILES),
    ),
    Question(
        *("dataset", "url_variable", "Environment variable with the database's URL"),
        "A URL with a password belongs into the environment, not into a file.",
        propose=_always("URNA_DATABASE_URL"),
        applies=_is(format="sql"),
    ),
    Question(
        *("dataset", "query", "The SELECT statement"),
        "One statement that gives a row a record.",
        applies=_is(format="sql"),
    ),
    Question(
        *("dataset", "modality", "Kind of records (image, text, table)"),
        "What a model gets to see.",
        propose=_modality,
    ),
    Question(
        *("dataset", "id_column", "Column with a record's id"),
        "Decides, by a keyed hash, which records train and which test; it never leaves.",
        propose=_one_of(*ID_COLUMNS),
        applies=_is(format=TABLES),
    ),
    Question(
        *("dataset", "label_column", "Column with the label"),
        "What is to be predicted.",
        propose=_one_of(*LABEL_COLUMNS),
        applies=_is(format=TABLES),
    ),
    Question(
        *("dataset", "person_column", "Column with the person's id (empty: none)"),
        "With several records of one person, privacy must hold for the person, not for each record.",
        propose=_one_of(*PERSON_COLUMNS),
        applies=_is(format=TABLES),
        is_needed=False,
    ),
    Question(
        *("dataset", "num_records", "Number of records, rounded"),
        "Public, and declared: noise and batches rest on it, so that the true number shapes nothing. Within a tenth is enough.",
        _whole,
        propose=_declared,
    ),
    Question(
        *("dataset", "labels", "Labels, with commas (empty: 0, 1, 2 ...)"),
        "The closed list of classes, from the medical or business definition, not from a look at the records.",
        _listed,
        applies=_has_classes,
        is_needed=False,
    ),
    Question(
        *("dataset", "num_classes", "Number of classes"),
        "Labels are 0, 1 ... up to this number less one.",
        _whole,
        applies=lambda draft: "labels" not in draft["dataset"],
    ),
    Question(
        *("dataset", "image_height", "Height of the images in pixels"),
        "All are brought to one size.",
        _whole,
        propose=_side,
        applies=_is(modality="image"),
    ),
    Question(
        *("dataset", "image_width", "Width of the images in pixels"),
        "All are brought to one size.",
        _whole,
        propose=lambda _, draft: draft["dataset"].get("image_height"),
        applies=_is(modality="image"),
    ),
    Question(
        *("dataset", "max_value", "Largest value of a pixel"),
        "A public constant of the device or file type; pixels are scaled by it.",
        _number,
        propose=_always(255.0),
        applies=_is(modality="image", format=TABLES),
    ),
    Question(
        *("dataset", "text_column", "Column with the text"),
        "The only column that a model reads.",
        propose=_one_of("text", "note", "report"),
        applies=_is(modality="text", format=TABLES),
    ),
    Question(
        *("dataset", "max_characters", "Longest text in characters"),
        "Longer ones are cut there; a public constant.",
        _whole,
        propose=_always(2000),
        applies=_is(modality="text"),
    ),
    Question(
        *("dataset", "columns", "Columns, like age=0:120, sex=f|m"),
        "Ranges and categories are public constants: take them from definitions, not from the values.",
        _table_columns,
        applies=_is(modality="table"),
    ),
    Question(
        *("policy", "epsilon_total", "Epsilon that this site spends at most, ever"),
        "The privacy loss of any one person over all campaigns: no conclusion about a person becomes more likely by more than "
        "e^epsilon. 1 is strong, 8 is much; it cannot be taken back.",
        _number,
        propose=_always(8.0),
    ),
    Question(
        *("policy", "epsilon_per_campaign", "Epsilon of one campaign at most"),
        "So that no single campaign takes all of it. An operator can ask for less, never for more.",
        _number,
        propose=_per_campaign,
    ),
    Question(
        *("policy", "delta", "Delta at most"),
        "The chance that the bound above fails; it must be smaller than one in the number of records.",
        _number,
        propose=_delta,
    ),
    Question(
        *("policy", "min_cohort", "Sites in a sum at least"),
        "Only sums leave: the more sites are in one, the less it says of yours.",
        _whole,
        propose=_always(3),
    ),
    Question(
        *("policy", "required_peers", "Sites that must be in every sum, with commas (empty: none)"),
        "Members you trust not to work together against you.",
        _listed,
        is_needed=False,
    ),
    Question(
        *("policy", "licences", "Licences of models that you take, with commas (empty: any)"),
        "SPDX names; candidates under others are refused.",
        _listed,
        propose=_always(LICENCES),
        is_needed=False,
    ),
    Question(
        *("policy", "approval_required", "Must a person here say yes to each campaign"),
        "With yes, a campaign waits until `urna-site approve`; the policy holds either way.",
        _yes_or_no,
        propose=_always(True),
    ),
    Question(
        *("vault", "anchor", "Path of the ledger's anchor, best on another disk"),
        "A small second file: an old ledger that is put back from a backup is noticed by it, unless the backup holds both.",
        propose=lambda seen, _: f"../{seen.folder.absolute().name}.anchor",
    ),
    Question(
        *("link", "superlink", "SuperLink or proxy, host:port (empty: later)"),
        "Where this site connects to; nothing ever connects to this site.",
        is_needed=False,
    ),
    Question(
        *("link", "root_certificates", "Its root certificate, in this folder"),
        "From the operator; only who shows a certificate under it is talked to.",
        propose=_always("ca.pem"),
        applies=_is_linked,
    ),
)
