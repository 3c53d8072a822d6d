import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.privacy.secure_sum_cohort import fill_of, in_ring, looks_uniform
from urna.privacy.mechanisms import key_stream
from urna.privacy.ring import (
    RING_BITS,
    SEGMENT_SIZE,
    Ring,
    Signed,
    Vector,
    Wire,
    add_segments,
    add_streams,
    masked,
    spans,
)
from urna.protocol.errors import ProtocolError

KEYS: list[Signed] = [(hashlib.sha256(bytes([at])).digest(), at % 2 == 1) for at in range(5)]
LENGTHS = [0, 1, 7, 15, 16, 17, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 5, SEGMENT_SIZE - 1, SEGMENT_SIZE, SEGMENT_SIZE + 3]


def numbers(ring: Ring, size: int, seed: int = 0) -> Vector:
    return in_ring(ring, np.random.default_rng(seed).integers(0, 2**ring.bits, size, dtype=np.uint64))


def stream_of(ring: Ring, key: bytes, size: int) -> list[int]:
    """A key stream as numbers, by blocks of AES: each counter, from 2 on, encrypted by itself."""
    count = -(-size * ring.dtype.itemsize // 16)
    counters = b"".join(at.to_bytes(16, "big") for at in range(2, 2 + count))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    width = ring.dtype.itemsize
    return [int.from_bytes(stream[width * at : width * (at + 1)], "little") % 2**ring.bits for at in range(size)]


def opened(ring: Ring, segments: list[Wire], size: int) -> Vector:
    total = ring.zeros(size)
    add_segments(total, ring, segments)
    return ring.reduce(total)


@pytest.mark.parametrize("bits", [0, 8, 31, 33, 64, -16])
def test_a_ring_of_another_width_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"ring_bits must be 16, 24 or 32, found {bits}"):
        Ring(bits)


@pytest.mark.parametrize("bits", RING_BITS)
def test_numbers_travel_little_endian_at_their_width(bits: int) -> None:
    ring = Ring(bits)
    vector = numbers(ring, 5)
    wire = np.zeros(ring.wire_bytes(5), np.uint8)
    ring.to_wire(vector, wire)
    as_bytes = [int(value).to_bytes(bits // 8, "little") for value in vector]
    planar = b"".join(one[:2] for one in as_bytes) + b"".join(one[2:] for one in as_bytes)
    assert wire.tobytes() == (planar if bits == 24 else b"".join(as_bytes))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(RING_BITS), st.integers(0, 300), st.integers(0, 2**32))
def test_a_segment_is_read_back_as_it_was_written(bits: int, size: int, seed: int) -> None:
    ring = Ring(bits)
    vector = numbers(ring, size, seed)
    wire = np.zeros(ring.wire_bytes(size), np.uint8)
    ring.to_wire(vector, wire)
    np.testing.assert_array_equal(ring.from_wire(wire), vector)


def test_the_upper_byte_of_24_bits_never_travels() -> None:
    ring = Ring(24)
    wire = np.zeros(6, np.uint8)
    ring.to_wire(np.array([0xFF123456, 0x00ABCDEF], np.uint32), wire)
    assert [hex(value) for value in ring.from_wire(wire).tolist()] == ["0x123456", "0xabcdef"]


@pytest.mark.parametrize("bits", RING_BITS)
def test_reduction_is_modulo_the_ring(bits: int) -> None:
    ring = Ring(bits)
    values = [0, 1, ring.half - 1, ring.half, 2**bits - 1]
    total = in_ring(ring, np.array(values, np.uint64))
    np.add(total, total, out=total)
    assert ring.reduce(total).tolist() == [2 * value % 2**bits for value in values]


@pytest.mark.parametrize("bits", RING_BITS)
@pytest.mark.parametrize("size", LENGTHS)
def test_masks_of_any_length_come_off_again(bits: int, size: int) -> None:
    """Lengths around a block of AES, a chunk and a segment."""
    ring = Ring(bits)
    vector = numbers(ring, size)
    segments = masked(fill_of(vector), size, ring, KEYS)
    assert sum(len(one) for one in segments) == ring.wire_bytes(size)
    ring.check(segments, size)
    total = opened(ring, segments, size)
    if size > 16:
        assert not np.array_equal(total, vector)
    add_streams(total, ring, [(key, not negative) for key, negative in KEYS])
    np.testing.assert_array_equal(ring.reduce(total), vector)


@pytest.mark.parametrize("bits", RING_BITS)
def test_a_mask_is_the_key_stream_of_aes_in_counter_mode(bits: int) -> None:
    """Block by block, from ECB."""
    ring = Ring(bits)
    for negative in (False, True):
        total = opened(ring, masked(fill_of(ring.zeros(50)), 50, ring, [(KEYS[0][0], negative)]), 50)
        stream = stream_of(ring, KEYS[0][0], 50)
        assert total.tolist() == [(-one if negative else one) % 2**bits for one in stream]


@pytest.mark.parametrize("bits", RING_BITS)
def test_no_piece_of_a_key_stream_is_used_twice(bits: int) -> None:
    """Over chunks and segments the stream is one: the same bytes as from one call."""
    ring, size = Ring(bits), SEGMENT_SIZE + 2**17 + 9
    total = opened(ring, masked(fill_of(ring.zeros(size)), size, ring, KEYS[:1]), size)
    stream: npt.NDArray[np.integer] = np.frombuffer(key_stream(KEYS[0][0], size * ring.dtype.itemsize), ring.dtype)
    np.testing.assert_array_equal(total, in_ring(ring, stream))


@pytest.mark.parametrize("bits", RING_BITS)
def test_several_vectors_are_added_to_one_total(bits: int) -> None:
    ring, size = Ring(bits), 2**17 + 77
    vectors = [numbers(ring, size, seed) for seed in range(5)]
    total = numbers(ring, size, 99)
    expected = sum((one.astype(np.uint64) for one in vectors), total.astype(np.uint64)) % 2**bits
    for one in vectors:
        add_segments(total, ring, masked(fill_of(one), size, ring, []))
    np.testing.assert_array_equal(ring.reduce(total), expected)


def test_no_streams_change_nothing() -> None:
    ring = Ring(32)
    total = numbers(ring, 10)
    before = total.copy()
    add_streams(total, ring, [])
    np.testing.assert_array_equal(total, before)


@pytest.mark.parametrize("bits", RING_BITS)
def test_mask_uniform_chi2(bits: int) -> None:
    """Each byte of a number on the wire, of constant input, also where the constant is the largest; false alarm 3e-7."""
    ring, size = Ring(bits), 150_000
    for value in (0, 1, 2**bits - 1):
        constant = np.full(size, value, ring.dtype)
        wire = masked(fill_of(constant), size, ring, KEYS)[0]
        planes = (
            [wire[0 : 2 * size : 2], wire[1 : 2 * size : 2], wire[2 * size :]] if bits == 24 else [*wire.reshape(size, -1).T]
        )
        assert all(looks_uniform(plane) for plane in planes)
        assert not looks_uniform(masked(fill_of(constant), size, ring, [])[0])  # the test sees a mask that is not there


@pytest.mark.parametrize("bits", RING_BITS)
def test_wire_segments_of_other_sizes_are_refused(bits: int) -> None:
    ring, size = Ring(bits), SEGMENT_SIZE + 10
    good = masked(fill_of(ring.zeros(size)), size, ring, [])
    ring.check(good, size)
    bad: list[list[Wire]] = [
        [],
        good[:1],
        good[::-1],
        [*good, good[1]],
        [good[0], good[1][:-1]],
        [good[0], np.append(good[1], np.uint8(0))],
        [np.concatenate(good)],
    ]
    for segments in bad:
        with pytest.raises(ProtocolError, match=f"expected 2 segments of {ring.wire_bytes(size)} bytes, found"):
            ring.check(segments, size)


def test_segments_that_are_not_rows_of_bytes_are_refused() -> None:
    ring = Ring(32)
    every: list[Any] = [np.zeros((2, 8), np.uint8), np.zeros(16, np.int8), np.zeros(4, np.uint32), np.zeros((), np.uint8)]
    for wrong in every:
        with pytest.raises(ProtocolError, match=r"expected 1 segments of 16 bytes, found \[-1\]"):
            ring.check([wrong], 4)


def test_an_endless_list_of_segments_makes_a_short_message() -> None:
    with pytest.raises(ProtocolError) as error:
        Ring(32).check([np.zeros(1, np.uint8)] * 10_000, 4)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("bits", RING_BITS)
def test_segments_as_they_come_from_a_message_are_added(bits: int) -> None:
    """Read-only, and at an odd address: pieces of a larger block of bytes."""
    ring = Ring(bits)
    vector = numbers(ring, 1000)
    sent = masked(fill_of(vector), 1000, ring, [])[0].tobytes()
    received = np.frombuffer(b"x" + sent, np.uint8)[1:]
    assert not received.flags.writeable
    ring.check([received], 1000)
    np.testing.assert_array_equal(opened(ring, [received], 1000), vector)


def test_the_filled_chunks_are_in_order_and_cover_the_vector() -> None:
    ring, size, seen = Ring(16), SEGMENT_SIZE + 5, list[tuple[int, int]]()

    def fill(start: int, out: Vector) -> None:
        out[:] = 0
        seen.append((start, start + len(out)))

    masked(fill, size, ring, [])
    assert seen == [*spans(SEGMENT_SIZE, ring.chunk), (SEGMENT_SIZE, size)]


def test_a_fill_that_fails_sends_nothing() -> None:
    def fill(start: int, out: Vector) -> None:
        raise ProtocolError(f"no numbers at {start} for {len(out)}")

    with pytest.raises(ProtocolError, match="no numbers at 0 for 10"):
        masked(fill, 10, Ring(32), KEYS)
