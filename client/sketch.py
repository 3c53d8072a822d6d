"""A keyed sketch of a data set: the budget follows the records, whatever the data set is called.

A record leaves three 64-bit values: HMAC-SHA256 under the site's data key of its unit's id, of its content, and of both (with
the upper half of the content's, so that both are kept or neither). A sketch keeps those below 2**64 / 2**rate_exp, with the
smallest rate_exp that leaves at most 65,536 (FracMinHash: Irber et al. 2022, doi:10.1101/2022.01.11.475838).

Covered:
    * a data set under another name or path, or with other labels: same ids, same contents;
    * the same records with new ids: same contents; the same persons with changed inputs: same ids;
    * a subset, a union, another partition: all that is common to both is compared, at the coarser rate of the two;
    * up to 65,536 units, or contents, on both sides nothing is left to chance: one common record is seen (two different
      values collide with probability 2**-64 a pair, about 2**-32 between two full sketches);
    * sketches hold no record and no hash that can be computed without the site's key.
Not covered:
    * above that a common record is seen only if its value is kept: m common records are missed with probability
      (1 - 2**-rate_exp)**m. Of 10 million records (rate_exp 8) 1,000 common ones are missed once in 50, 2,300 once in 8,000;
      a copied handful may go unseen, by design: a larger MAX_KEPT costs memory and nothing else;
    * records that were given new ids *and* changed inputs (rescaled pixels, other image size, rewritten text);
    * it errs to the safe side: two data sets that number their records 1, 2, 3, or that hold equal contents (blank images,
      tables of few categories), share values without sharing persons;
    * another site, or the same site under another data key: such sketches are unrelated.
"""

import hashlib
import hmac
import struct
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from urna.client.records import Images, Inputs, Records, Texts, keyed_numbers
from urna.protocol.errors import LedgerError

MAX_KEPT = 65_536  # values of a kind in a sketch: half a megabyte
MAX_RATE_EXP = 31  # the upper half of a value decides whether it is kept
_HEADER = struct.Struct("<16sBBBIII")  # magic, three rates, three lengths
_MAGIC = b"urna-sketch-2".ljust(16, b"\0")
_HALF = np.uint64(32)  # bits

Values = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Sample:
    """Sorted different values below 2**64 / 2**rate_exp."""

    rate_exp: int
    values: Values

    def at(self, rate_exp: int) -> Values:
        """The values that a coarser rate keeps."""
        return self.values[self.values <= _highest(rate_exp)]


@dataclass(frozen=True)
class Sketch:
    """What is remembered of a data set."""

    ids: Sample
    contents: Sample
    owned: Sample  # a content with the unit that has it

    @property
    def samples(self) -> tuple[Sample, Sample, Sample]:
        """All three."""
        return self.ids, self.contents, self.owned

    def to_bytes(self) -> bytes:
        """For the ledger."""
        sizes = (*(one.rate_exp for one in self.samples), *(len(one.values) for one in self.samples))
        return _HEADER.pack(_MAGIC, *sizes) + b"".join(one.values.astype("<u8").tobytes() for one in self.samples)

    @property
    def sha256(self) -> str:
        """Of its bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @staticmethod
    def from_bytes(data: bytes) -> "Sketch":
        """Read what `to_bytes` wrote.

        Raises:
            LedgerError: the bytes are no sketch.
        """
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise LedgerError(f"expected a sketch of records, found {len(data)} other bytes: restore the ledger")
        _, *rates, num_ids, num_contents, num_owned = _HEADER.unpack_from(data)
        num_values = num_ids + num_contents + num_owned
        if len(data) != _HEADER.size + 8 * num_values:
            raise LedgerError(f"expected a sketch of {num_values} values, found {len(data)} bytes: restore the ledger")
        values = np.frombuffer(data, "<u8", offset=_HEADER.size).astype(np.uint64)
        parts = np.split(values, [num_ids, num_ids + num_contents])
        return Sketch(*(_checked(rate, part) for rate, part in zip(rates, parts, strict=True)))


def sketch_of(records: Records, key: bytes) -> Sketch:
    """Sketch records under the site's data key; the order and the labels of the records do not matter."""
    ids = keyed_numbers(key, "sketch-id", records.units)
    digests = (hmac.digest(key, b"sketch-content\0" + content, "sha256")[:8] for content in _contents(records.inputs))
    contents = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
    both = (
        hmac.digest(key, b"sketch-owner\0" + struct.pack("<QQ", *pair), "sha256")[:8]
        for pair in zip(ids, contents, strict=True)
    )
    owners = np.frombuffer(b"".join(both), "<u8").astype(np.uint64)
    return Sketch(_sampled(ids), _sampled(contents), _sampled(contents >> _HALF << _HALF | owners >> _HALF))


def overlap(one: Sketch, other: Sketch) -> float:
    """The share of the smaller set that is common to both, by ids or by contents, whichever is more; 0 if one is empty.

    Above 65,536 values an estimate: see the head of this module.
    """
    return max(_overlap(one.ids, other.ids), _overlap(one.contents, other.contents))


def shares_records(one: Sketch, other: Sketch) -> bool:
    """Whether any id or any content is seen in both."""
    return bool(len(_common(one.ids, other.ids)) or len(_common(one.contents, other.contents)))


def may_split_differently(one: Sketch, other: Sketch) -> bool:
    """Whether a record that both have may be called differently in them: held out in one, tuned on in the other.

    The split goes by a unit's name. A content that is in both, and of no unit in common, was renamed (also where names were
    dealt anew among the same persons, as row numbers of a sorted export), or is equal by chance; either way releases must not
    be composed in parallel.
    """
    rate_exp = max(sample.rate_exp for sketch in (one, other) for sample in (sketch.contents, sketch.owned))
    contents = np.intersect1d(one.contents.at(rate_exp), other.contents.at(rate_exp), assume_unique=True)
    owned = np.intersect1d(one.owned.at(rate_exp), other.owned.at(rate_exp), assume_unique=True)
    return bool(len(np.setdiff1d(contents >> _HALF, owned >> _HALF)))


@dataclass(frozen=True)
class Charged:
    """Data sets by their numbers.

    Args:
        sharing: those whose releases count against the records of one of them, itself included.
        renamed: of these, those in which the same records may have had other names.
    """

    sharing: frozenset[int]
    renamed: frozenset[int]


def charged_with(dataset: int, sketches: Mapping[int, Sketch]) -> Charged:
    """What was released of the records of one data set, under whatever name and number.

    A common record is enough. Renaming is followed further: who gives records new ids first, and new values under these ids in
    a second step, has two data sets that share nothing, and a third between them that says so.
    """

    @cache
    def differ(one: int, other: int) -> bool:
        return may_split_differently(sketches[one], sketches[other])

    @cache
    def near(one: int) -> set[int]:
        return {other for other in sketches if shares_records(sketches[one], sketches[other])} | {one}

    alike = {one for one in near(dataset) if not differ(dataset, one)}  # names mean in them what they mean here
    sharing, renamed, ahead = near(dataset), set[int](), [(dataset, one) for one in near(dataset)]
    while ahead:
        here, there = ahead.pop()  # which share records
        if there not in alike | renamed and (here in renamed or differ(here, there)):
            renamed.add(there)
            sharing |= near(there)
            ahead += [(there, one) for one in near(there)]
        ahead += [(there, one) for one in near(there) - alike - renamed if differ(there, one)]
    return Charged(frozenset(sharing), frozenset(renamed))


def _contents(inputs: Inputs) -> Iterator[bytes]:
    """What a record is, in bytes that do not depend on how its file wrote it: text without case and spacing, float32 pixels."""
    if isinstance(inputs, Images):
        shape = b"image" + struct.pack(f"<{inputs.pixels.ndim - 1}I", *inputs.pixels.shape[1:])
        yield from (shape + (image + np.float32(0)).astype("<f4").tobytes() for image in inputs.pixels)  # -0.0 is 0.0
    elif isinstance(inputs, Texts):
        yield from (b"text" + "".join(unicodedata.normalize("NFKC", text).casefold().split()).encode() for text in inputs.texts)
    else:
        rows: Iterable[tuple[float, ...]] = zip(*(column.tolist() for column in inputs.columns.values()), strict=True)
        yield from (b"table" + struct.pack(f"<{len(row)}d", *(value + 0.0 for value in row)) for row in rows)


def _sampled(values: Values) -> Sample:
    values, rate_exp = np.unique(values), 0
    while len(values) > MAX_KEPT:
        rate_exp += 1
        values = values[values <= _highest(rate_exp)]
    return Sample(rate_exp, values)


def _highest(rate_exp: int) -> np.uint64:
    return np.uint64((2**64 >> rate_exp) - 1)


def _common(one: Sample, other: Sample) -> Values:
    rate_exp = max(one.rate_exp, other.rate_exp)
    return np.intersect1d(one.at(rate_exp), other.at(rate_exp), assume_unique=True)


def _overlap(one: Sample, other: Sample) -> float:
    rate_exp = max(one.rate_exp, other.rate_exp)
    smaller = min(len(one.at(rate_exp)), len(other.at(rate_exp)))
    return len(_common(one, other)) / smaller if smaller else 0.0


def _checked(rate_exp: int, values: Values) -> Sample:
    in_order = bool((values[1:] > values[:-1]).all())
    if rate_exp > MAX_RATE_EXP or len(values) > MAX_KEPT or not in_order or (len(values) and values[-1] > _highest(rate_exp)):
        raise LedgerError("expected a sketch with few, sorted, small values, found others: restore the ledger")
    return Sample(rate_exp, values)
