"""Deltas are lossless for every kind of change, and damaged ones raise a typed error and nothing else."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.deltas import checksum, decode, encode, ordered_integers
from protocol.errors import WeightsError

BLOCK = 2 << 20


def roundtrip(target: bytes, base: bytes | None, *, word_bytes: int) -> bytes:
    """Encodes, checks that decoding returns `target` (with and without `out`), and returns the payload."""
    payload = encode(target, base, word_bytes=word_bytes)
    outs = [None, bytearray(b"x" * len(target)), *([] if base is None else [bytearray(base)])]
    for out in outs:
        held = out if out is not None and out == base else base
        found = decode(payload, held, num_bytes=len(target), word_bytes=word_bytes, expected=checksum(target), out=out)
        assert found == target
        assert out is None or found is out
    return payload


def random_weights(rng: np.random.Generator, num: int, *, word_bytes: int) -> np.ndarray:
    """Words [num]: normally distributed numbers, and 2 % random bits (infinities, NaNs, denormals, any sign)."""
    bits = (rng.normal(size=num) * 0.02).astype(np.float32).view(np.uint32)
    words = bits if word_bytes == 4 else (bits >> 16).astype(np.uint16)
    odd = rng.integers(0, 1 << 8 * word_bytes, size=num // 50, dtype=words.dtype)
    words[rng.integers(0, num, size=len(odd))] = odd
    return words


@pytest.mark.parametrize("word_bytes", [2, 4])
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.01, 0.1, 0.5, 1.0])
def test_decoding_is_exact_for_every_fraction_of_changed_words(word_bytes: int, fraction: float) -> None:
    rng = np.random.default_rng(0)
    num = BLOCK // word_bytes + 777  # two blocks; the length is not a multiple of 8 bytes
    base = random_weights(rng, num, word_bytes=word_bytes)
    target = base.copy()
    index = np.flatnonzero(rng.random(num) < fraction)
    target[index] = random_weights(rng, len(index), word_bytes=word_bytes) if len(index) else target[index]
    roundtrip(target.tobytes(), base.tobytes(), word_bytes=word_bytes)
    roundtrip(target.tobytes() + b"abc", None, word_bytes=word_bytes)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), word_bytes=st.sampled_from([2, 4]))
def test_decoding_is_exact_for_bytes_of_any_length(data: st.DataObject, word_bytes: int) -> None:
    base = data.draw(st.binary(max_size=64))
    target = data.draw(st.binary(min_size=len(base), max_size=len(base)))
    roundtrip(target, base, word_bytes=word_bytes)
    roundtrip(target, None, word_bytes=word_bytes)


def test_the_size_of_a_sparse_delta_is_near_the_entropy_of_the_change() -> None:
    """1 ULP in 1 % of bf16 values: the size is within 20 % of the entropy of the positions plus a sign bit each."""
    rng = np.random.default_rng(1)
    num, fraction = 1 << 20, 0.01
    base = random_weights(rng, num, word_bytes=2)
    target = base.copy()
    changed = rng.random(num) < fraction
    target[changed] += 1
    payload = roundtrip(target.tobytes(), base.tobytes(), word_bytes=2)
    entropy = -(fraction * math.log2(fraction) + (1 - fraction) * math.log2(1 - fraction))
    bits = num * (entropy + fraction)  # one bit per sign
    assert len(payload) * 8 < 1.2 * bits
    assert len(roundtrip(base.tobytes(), base.tobytes(), word_bytes=2)) < 100


def test_a_dense_delta_is_smaller_than_a_snapshot() -> None:
    rng = np.random.default_rng(2)
    base = (rng.normal(size=1 << 19) * 0.02).astype(np.float32)
    moved = base + (1e-3 * rng.normal(size=len(base))).astype(np.float32)
    words = [(x.view(np.uint32) >> 16).astype(np.uint16).tobytes() for x in (base, moved)]
    snapshot = roundtrip(words[1], None, word_bytes=2)
    assert len(roundtrip(words[1], words[0], word_bytes=2)) < 0.8 * len(snapshot) < 0.8 * len(words[1])


def test_gaps_of_every_byte_width_are_decoded() -> None:
    for position in (0, 255, 256, 65_535, 65_536, BLOCK // 2 - 1):
        base = bytes(BLOCK)
        target = bytearray(base)
        target[2 * position] = 7
        roundtrip(bytes(target), base, word_bytes=2)


def test_ordered_integers_count_representable_numbers_and_are_their_own_inverse() -> None:
    bits = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x3F80, 0xBF80], dtype=np.uint16)
    values = ordered_integers(bits.view(np.int16))
    assert values.tolist() == [0, -1, 1, -2, 0x3F80, -0x3F81]
    assert (ordered_integers(values).view(np.uint16) == bits).all()


def test_a_flipped_bit_is_refused_or_changes_nothing() -> None:
    rng = random.Random(0)
    generator = np.random.default_rng(3)
    base = random_weights(generator, 5_000, word_bytes=2)
    target = base.copy()
    target[::40] += 1
    for held in (base.tobytes(), None):
        payload = encode(target.tobytes(), held, word_bytes=2)
        for bit in rng.sample(range(8 * len(payload)), 400):
            damaged = bytearray(payload)
            damaged[bit // 8] ^= 1 << bit % 8
            try:
                found = decode(damaged, held, num_bytes=10_000, word_bytes=2, expected=checksum(target.tobytes()))
            except WeightsError:
                continue
            assert found == target.tobytes(), "a flipped bit that is not refused must not change the target"


def test_another_base_and_a_truncated_payload_are_refused() -> None:
    target, base = b"\x01\x00" * 100, bytes(200)
    payload, expected = encode(target, base, word_bytes=2), checksum(target)
    with pytest.raises(WeightsError, match=f"must have the checksum {expected}, got "):
        decode(payload, b"\x01" * 200, num_bytes=200, word_bytes=2, expected=expected)
    with pytest.raises(WeightsError, match="base of a delta must have 200 bytes, got 199"):
        decode(payload, base[1:], num_bytes=200, word_bytes=2, expected=expected)
    with pytest.raises(WeightsError, match="word_bytes must be one of"):
        encode(target, base, word_bytes=3)
    for size in range(len(payload)):
        with pytest.raises(WeightsError, match="ends after"):
            decode(payload[:size], base, num_bytes=200, word_bytes=2, expected=expected)
    with pytest.raises(WeightsError, match=f"a delta must have {len(payload)} bytes, got {len(payload) + 1}"):
        decode(payload + b"\0", base, num_bytes=200, word_bytes=2, expected=expected)


@pytest.mark.parametrize(
    ("gaps", "num_written", "message"),
    [
        (bytes([31, 0]), 2, "a changed word of a block must be < 32, got 32"),
        (bytes([30, 1]), 2, "a changed word of a block must be < 32, got 32"),
        (b"", 2**32 - 1, "has 32 words, got 4294967295 written words"),
    ],
)
def test_indices_and_counts_beyond_a_block_are_refused(gaps: bytes, num_written: int, message: str) -> None:
    gap_plane = zstandard.ZstdCompressor().compress(gaps) if gaps else b""
    payload = struct.pack("<BBHI3I", 0, 1, 3, num_written, len(gap_plane), 0, 0) + gap_plane
    with pytest.raises(WeightsError, match=message):
        decode(payload, bytes(64), num_bytes=64, word_bytes=2, expected="0" * 32)
    with pytest.raises(WeightsError, match="memory for a target must have 64 bytes, got 63"):
        decode(payload, bytes(64), num_bytes=64, word_bytes=2, expected="0" * 32, out=bytearray(63))


def test_random_bytes_raise_a_weights_error() -> None:
    rng = random.Random(4)
    for _ in range(2_000):
        payload = rng.randbytes(rng.randrange(60))
        if payload:  # often a valid codec byte, so that the fields after it are read too
            payload = bytes([rng.randrange(2), rng.randrange(2), rng.randrange(5), 0]) + payload[1:]
        with pytest.raises(WeightsError):
            decode(payload, bytes(64), num_bytes=64, word_bytes=2, expected="0" * 32)
