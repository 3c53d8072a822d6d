"""A site's records in memory, their unit of privacy, and the fixed split: decided by keyed hashes, never by order.

Covered:
    * tuning and held-out records are split by a keyed hash of the record's unit (its person where the site declares one,
      else its id) and the plan's fraction: one person is on one side and in one bucket;
    * which records of a person are kept under a cap is decided by a keyed hash of their ids, whatever their order.
Not covered:
    * a unit that gets another name (another id column, a keyed hash that was not there) may change sides: whoever keeps the
      budget has to charge such a data set as the same records (`sketch.py` sees it by their content);
    * a person whom two sites know, or whom one site knows under two names, counts as two.
"""

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from urna.protocol.errors import SiteConfigError
from urna.protocol.plan import Fraction

Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1]: (n, h, w) where grey, (n, 3, h, w) where coloured."""

    pixels: npt.NDArray[np.float32]

    def take(self, chosen: Chosen) -> "Images":
        """The chosen ones, in order."""
        return Images(self.pixels[chosen])


@dataclass(frozen=True)
class Texts:
    """One text a record."""

    texts: tuple[str, ...]

    def take(self, chosen: Chosen) -> "Texts":
        """The chosen ones, in order."""
        return Texts(tuple(text for text, keep in zip(self.texts, chosen, strict=True) if keep))


@dataclass(frozen=True)
class Table:
    """Columns by their declared names, (n,) each: numbers, or codes 0 ... k - 1 of a column's closed categories."""

    columns: Mapping[str, npt.NDArray[np.float64]]

    def take(self, chosen: Chosen) -> "Table":
        """The chosen rows, in order."""
        return Table({name: values[chosen] for name, values in self.columns.items()})


Inputs = Images | Texts | Table


@dataclass(frozen=True)
class Records:
    """n records: ids, units of privacy (persons, or the ids themselves), labels (n,) int64, inputs."""

    ids: tuple[str, ...]
    units: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    inputs: Inputs

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def groups(self) -> npt.NDArray[np.int64]:
        """Each record's unit as a number, 0 ... number of units - 1, in the order in which units first occur."""
        numbers = {unit: number for number, unit in enumerate(dict.fromkeys(self.units))}
        return np.fromiter((numbers[unit] for unit in self.units), np.int64, len(self.units))

    @property
    def images(self) -> npt.NDArray[np.float32]:
        """The pixels.

        Raises:
            SiteConfigError: the records are not images.
        """
        if not isinstance(self.inputs, Images):
            found = type(self.inputs).__name__.lower()
            raise SiteConfigError(f"expected records of images, found {found}: ask for models of this modality")
        return self.inputs.pixels

    @property
    def model_inputs(self) -> npt.NDArray[np.float32] | tuple[str, ...]:
        """What a candidate reads: the pixels, or the texts.

        Raises:
            SiteConfigError: the records are a table.
        """
        match self.inputs:
            case Images(pixels):
                return pixels
            case Texts(texts):
                return texts
        found = type(self.inputs).__name__.lower()
        raise SiteConfigError(f"expected records of images or texts, found {found}: no candidate reads them")

    def take(self, chosen: Chosen) -> "Records":
        """The chosen records, in order."""
        pairs = [pair for *pair, keep in zip(self.ids, self.units, chosen, strict=True) if keep]
        ids, units = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        return Records(ids, units, self.labels[chosen], self.inputs.take(chosen))


def split(records: Records, data_key: bytes, holdout_fraction: Fraction) -> tuple[Records, Records]:
    """Tuning and held-out records, by a keyed hash of each unit: the same for ever, whatever else is in the file."""
    held = keyed_uniform(data_key, "holdout", records.units) < holdout_fraction
    return records.take(~held), records.take(held)


def buckets(records: Records, data_key: bytes, num_buckets: int) -> npt.NDArray[np.int64]:
    """Each record's bucket 0 ... num_buckets - 1, by a keyed hash of its unit: a person touches one bucket only."""
    return (keyed_uniform(data_key, "bucket", records.units) * num_buckets).astype(np.int64)


def capped(records: Records, data_key: bytes, max_records_per_unit: int) -> Records:
    """At most so many records of each unit: those whose ids have the smallest keyed hashes."""
    counts = np.bincount(records.groups) if len(records) else np.zeros(0, np.int64)
    if not (counts > max_records_per_unit).any():
        return records
    order = np.lexsort((keyed_numbers(data_key, "person-cap", records.ids), records.groups))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(records), np.int64)  # of a record among its unit's
    rank[order] = np.arange(len(records)) - starts[records.groups[order]]
    return records.take(rank < max_records_per_unit)


def keyed_uniform(key: bytes, purpose: str, ids: Sequence[str]) -> npt.NDArray[np.float64]:
    """HMAC-SHA256 of each id as a number in [0, 1), 52 bits: unpredictable without the site's key."""
    return (keyed_numbers(key, purpose, ids) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def keyed_numbers(key: bytes, purpose: str, ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of HMAC-SHA256(key, purpose 00 id), little end first: stored splits rest on these very bytes."""
    digests = [hmac.digest(key, f"{purpose}\0{one}".encode(), "sha256")[:8] for one in ids]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
