"""Vectors modulo 2**16, 2**24 or 2**32: how they travel, and key streams added to them at nearly the speed of memory.

A vector travels in segments of 2**20 numbers (at most 4 MiB). Loops go over chunks of 256 KiB outside and over key streams
inside, so that a chunk and one piece of key stream stay in the L2 cache while all streams are added.

    bits    a number on the wire                           in memory
    16      2 bytes, little-endian                         uint16
    24      2 bytes; then, for the whole segment, 1 byte   uint32, the upper byte meaningless until `reduce`
    32      4 bytes, little-endian                         uint32

Covered:
    * a masked number is uniform over the whole ring: AES-256-CTR (NIST SP 800-38A) key streams of the full width.
Not covered:
    * what a sum means: that no honest sum wraps is `fixed_point`'s promise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import CipherContext

from urna.privacy.mechanisms import counter_mode
from urna.protocol.errors import ProtocolError

RING_BITS = (16, 24, 32)
CHUNK_BYTES = 1 << 18
HUGE_PAGE_BYTES = 1 << 21
SEGMENT_SIZE = 1 << 20  # numbers in a segment; a multiple of every chunk
Vector = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Wire = npt.NDArray[np.uint8]  # one segment as it travels
Fill = Callable[[int, Vector], None]  # (start, out): write the numbers start ... start + len(out) into out
Signed = tuple[bytes, bool]  # a stream's key, and whether it is subtracted


@dataclass(frozen=True)
class Ring:
    """The integers modulo 2**bits.

    Raises:
        ValueError: ``bits`` is not 16, 24 or 32.
    """

    bits: int = 32

    def __post_init__(self) -> None:
        if self.bits not in RING_BITS:
            raise ValueError(f"ring_bits must be 16, 24 or 32, found {self.bits}")

    @property
    def half(self) -> int:
        """2**(bits - 1), as an integer: in float32, 2**31 - 1 would round up to 2**31."""
        return 1 << (self.bits - 1)

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
        """What numbers are held in."""
        return np.dtype(np.uint16) if self.bits == 16 else np.dtype(np.uint32)

    @property
    def chunk(self) -> int:
        """Numbers in a chunk."""
        return CHUNK_BYTES // self.dtype.itemsize

    def zeros(self, size: int) -> Vector:
        """A vector (size,) of zeros."""
        return np.zeros(size, dtype=np.uint16) if self.bits == 16 else np.zeros(size, dtype=np.uint32)

    def wire_bytes(self, size: int) -> int:
        """How many bytes ``size`` numbers take on the wire."""
        return size * self.bits // 8

    def to_wire(self, vector: Vector, out: Wire) -> None:
        """Write all numbers of a segment into ``out`` (wire_bytes,)."""
        if self.bits != 24:
            out.view(self.dtype)[:] = vector
            return
        low = 2 * len(vector)
        out[:low].view("<u2")[:] = vector.astype("<u2")
        out[low:] = (vector >> np.uint32(16)).astype(np.uint8)

    def from_wire(self, wire: Wire) -> Vector:
        """The numbers of a segment; for 16 and 32 bits a view of its bytes."""
        if self.bits != 24:
            return self.numbers(wire)
        low = 2 * (len(wire) // 3)
        numbers: npt.NDArray[np.uint32] = wire[low:].astype("<u4") << np.uint32(16)
        numbers |= wire[:low].view("<u2")
        return numbers

    def numbers(self, room: Wire) -> Vector:
        """A view of bytes as numbers; not for 24 bits on the wire."""
        return room.view(np.uint16) if self.bits == 16 else room.view(np.uint32)

    def reduce(self, vector: Vector) -> Vector:
        """The numbers in 0 ... 2**bits - 1; in place."""
        if self.bits == 24:
            np.bitwise_and(vector, np.uint32(0xFFFFFF), out=vector)
        return vector

    def check(self, segments: Sequence[Wire], size: int) -> None:
        """Whether ``segments`` hold exactly ``size`` numbers.

        Raises:
            ProtocolError: another number, shape or type of segments.
        """
        expected = [self.wire_bytes(stop - start) for start, stop in spans(size)]
        found = [len(one) if one.dtype == np.uint8 and one.ndim == 1 and one.flags.c_contiguous else -1 for one in segments]
        if found != expected:
            raise ProtocolError(f"expected {len(expected)} segments of {sum(expected)} bytes, found {found[:5]}")


def spans(size: int, step: int = SEGMENT_SIZE) -> Iterator[tuple[int, int]]:
    """(start, stop) of each segment (or of each piece of ``step``) of a vector of ``size`` numbers."""
    for start in range(0, size, step):
        yield start, min(start + step, size)


class Streams:
    """Key streams that are added to (or subtracted from) one vector, chunk after chunk, in order."""

    def __init__(self, ring: Ring, keys: Sequence[Signed]) -> None:
        self._ciphers: list[tuple[CipherContext, bool]] = [(counter_mode(key), negative) for key, negative in keys]
        self._zeros = memoryview(bytes(CHUNK_BYTES))
        self._buffer = bytearray(CHUNK_BYTES + 15)  # `update_into` asks for a block of room
        room = np.frombuffer(self._buffer, dtype=np.uint8, count=CHUNK_BYTES)
        self._stream = ring.numbers(room)

    def add(self, chunk: Vector) -> None:
        """Add the next piece of every stream to ``chunk``, in place; all but the last chunk must be full."""
        size, zeros, stream = chunk.nbytes, self._zeros, self._stream[: len(chunk)]
        for cipher, negative in self._ciphers:
            cipher.update_into(zeros[:size], self._buffer)
            operation = np.subtract if negative else np.add
            operation(chunk, stream, out=chunk)


def masked(fill: Fill, size: int, ring: Ring, keys: Sequence[Signed]) -> list[Wire]:
    """Numbers and key streams in one pass, straight into wire segments.

    Args:
        fill: gives the numbers.
        size: d.
        ring: their ring.
        keys: 32-byte keys of distinct streams.
    """
    streams = Streams(ring, keys)
    segments = []
    scratch = ring.zeros(min(size, SEGMENT_SIZE)) if ring.bits == 24 else None
    for start, stop in spans(size):
        wire = _segment(ring.wire_bytes(stop - start))
        numbers = ring.numbers(wire) if scratch is None else scratch[: stop - start]
        for low, high in spans(stop - start, ring.chunk):
            chunk = numbers[low:high]
            fill(start + low, chunk)
            streams.add(chunk)
        if scratch is not None:
            ring.to_wire(numbers, wire)
        segments.append(wire)
    return segments


def numbers_of(vector: Vector) -> Fill:
    """A `Fill` from numbers that are in the ring already."""

    def fill(start: int, out: Vector) -> None:
        out[:] = vector[start : start + len(out)]

    return fill


def _segment(size: int) -> Wire:
    """Room for ``size`` bytes that starts on a huge page: first touched 4 KiB at a time, it costs as much as a key stream.

    numpy asks the kernel for huge pages from 4 MiB on; what is not touched is not resident.
    """
    if size < HUGE_PAGE_BYTES:
        return np.empty(size, dtype=np.uint8)
    room = np.empty(max(size + HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES), dtype=np.uint8)
    start = -room.ctypes.data % HUGE_PAGE_BYTES
    return room[start : start + size]


def add_streams(total: Vector, ring: Ring, keys: Sequence[Signed]) -> None:
    """Add key streams to ``total`` (d,) in place."""
    if keys:
        streams = Streams(ring, keys)
        for start, stop in spans(len(total), ring.chunk):
            streams.add(total[start:stop])


def add_segments(total: Vector, ring: Ring, segments: Sequence[Wire]) -> None:
    """Add a vector in wire form to ``total`` (d,) in place."""
    for (start, stop), segment in zip(spans(len(total)), segments, strict=True):
        np.add(total[start:stop], ring.from_wire(segment), out=total[start:stop])
