"""Lossless deltas between two versions of the weights. Their size follows the fraction of words that changed.

A weights file is treated as words of 2 bytes (bf16) or 4 bytes (fp32), in blocks of 2 MiB. Each block has a codec:

    sparse   for few changed words: the gaps between them, and the change of each in units in the last place (ULP)
    dense    for many changed words: the XOR with the base

The columns of both are split into byte planes (bytes of equal significance are similar), and each plane is compressed
with zstd level 1. A snapshot is a delta whose base is all zeros. Measured sizes and times: docs/weights.md.

    block = codec u8, bytes per gap u8, number of planes u16, words written u32; the planes' sizes u32; the planes
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from protocol.errors import WeightsError

Data = bytes | bytearray | memoryview
Words = NDArray[np.unsignedinteger]

WORD_BYTES = (2, 4)
_BLOCK_BYTES = 2 << 20
# Sparse is used below this fraction of changed 8-byte pieces in a block. Above it (about 1/4 of bf16 values changed),
# the XOR is about as small as the sparse form and much faster.
_SPARSE_BELOW = 0.68
_SPARSE, _DENSE = 0, 1
_FORMS = {(_SPARSE, 1), (_SPARSE, 2), (_SPARSE, 4), (_DENSE, 0)}
_HEADER = struct.Struct("<BBHI")
_ZSTD_LEVEL = 1


def checksum(data: Data) -> str:
    """Returns the 128-bit xxh3 as hex. It detects accidental corruption; CURVE keys protect against forgery."""
    return xxhash.xxh3_128_hexdigest(data)


def encode(target: Data, base: Data | None, *, word_bytes: int) -> bytes:
    """Returns the delta from `base` to `target`, which have the same length; None means a base of zeros.

    Raises: WeightsError (the lengths differ, or `word_bytes` is not 2 or 4).
    """
    _check(base, num_bytes=len(target), word_bytes=word_bytes)
    word = np.dtype(f"<u{word_bytes}")
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    written: list[bytes] = []
    for start in range(0, len(target), _BLOCK_BYTES):
        new = _block(target, start)
        old = None if base is None else _block(base, start)
        difference = new if old is None else new ^ old
        touched = np.flatnonzero(difference != 0)
        if old is None or len(touched) >= _SPARSE_BELOW * len(new):
            form, columns = (_DENSE, 0), [difference.view(word)]
        else:
            columns = _sparse(_changed(difference, touched, word), new.view(word), old.view(word))
            form = _SPARSE, columns[0].itemsize
        planes = [compressor.compress(plane.data) if plane.any() else b"" for plane in _split_planes(columns)]
        written.append(_HEADER.pack(*form, len(planes), len(columns[0])))
        written.append(struct.pack(f"<{len(planes)}I", *map(len, planes)))
        written += planes
    return b"".join(written)


def decode(
    payload: Data, base: Data | None, *, num_bytes: int, word_bytes: int, expected: str, out: bytearray | None = None
) -> bytearray:
    """Applies the delta `payload` to `base` and returns the target: `num_bytes` bytes with the checksum `expected`.

    If `out` is given, the target is written to it and `out` is returned; `out` may be `base`. This saves time:
    allocating new memory takes as long as decoding.
    Raises: WeightsError (not a delta, another base, or damaged: any flipped bit is detected); the content of `out` is
    then undefined.
    """
    _check(base, num_bytes=num_bytes, word_bytes=word_bytes)
    if out is not None and len(out) != num_bytes:
        raise WeightsError(f"the memory for a target must have {num_bytes} bytes, got {len(out)}")
    data = bytearray(num_bytes) if out is None else out
    hasher = xxhash.xxh3_128()
    reader = _Reader(payload, word_bytes=word_bytes)
    for start in range(0, num_bytes, _BLOCK_BYTES):
        block = _block(data, start)
        if base is not data:
            block[:] = 0 if base is None else _block(base, start)
        reader.apply(block.view(f"<u{word_bytes}"))
        written = block.view(np.uint8)[: num_bytes - start].data
        if len(written) < block.nbytes:  # the last block: a padded copy, not a view
            data[start:] = written
        hasher.update(written)
    reader.end()
    if hasher.hexdigest() != expected:
        raise WeightsError(f"weights must have the checksum {expected}, got {hasher.hexdigest()}")
    return data


class _Reader:
    """Reads the blocks of a payload in order and checks every value."""

    def __init__(self, payload: Data, *, word_bytes: int) -> None:
        self._payload = memoryview(payload)
        self._word_bytes = word_bytes
        self._offset = 0
        self._decompressor = zstandard.ZstdDecompressor()

    def apply(self, words: Words) -> None:
        """Applies the payload's next block in place: `words` [N] is the base's block before and the target's after."""
        codec, gap_bytes, num_planes, num_written = _HEADER.unpack(self._take(_HEADER.size))
        if (codec, gap_bytes) not in _FORMS or num_planes != gap_bytes + self._word_bytes:
            raise WeightsError(f"a delta's block has codec {codec}, gaps of {gap_bytes} bytes and {num_planes} planes")
        if num_written > len(words) or (codec == _DENSE and num_written < len(words)):
            raise WeightsError(f"a delta's block has {len(words)} words, got {num_written} written words")
        sizes = struct.unpack(f"<{num_planes}I", self._take(4 * num_planes))
        planes = [self._plane(size, num_written) for size in sizes]
        if codec == _DENSE:
            words ^= _join_planes(planes, words.dtype, num_written)
        elif num_written:
            index = np.cumsum(_join_planes(planes[:gap_bytes], np.dtype(np.int64), num_written) + 1) - 1
            if index[-1] >= len(words):
                raise WeightsError(f"a changed word of a block must be < {len(words)}, got {index[-1]}")
            moves = _signed(_join_planes(planes[gap_bytes:], words.dtype, num_written))
            moves = ((moves >> 1) & np.iinfo(moves.dtype).max) ^ -(moves & 1)
            words[index] = ordered_integers(ordered_integers(_signed(words[index])) + moves).view(words.dtype)

    def end(self) -> None:
        """Checks that the payload has no bytes after the last block. Raises: WeightsError."""
        if self._offset != len(self._payload):
            raise WeightsError(f"a delta must have {self._offset} bytes, got {len(self._payload)}")

    def _take(self, size: int) -> memoryview:
        taken = self._payload[self._offset : self._offset + size]
        if len(taken) != size:
            raise WeightsError(f"a delta ends after {len(self._payload)} bytes, within a block")
        self._offset += size
        return taken

    def _plane(self, size: int, length: int) -> NDArray[np.uint8] | None:
        """Reads a plane: uint8 [length], or None if it is all zeros (such planes are not written)."""
        frame = self._take(size)
        if not size:
            return None
        try:
            if zstandard.frame_content_size(frame) != length:  # checked before decompress allocates it
                raise WeightsError(f"a plane of a delta must have {length} bytes")
            return np.frombuffer(self._decompressor.decompress(frame), np.uint8)
        except zstandard.ZstdError as error:
            raise WeightsError(f"a plane of a delta cannot be decompressed: {error}") from error


def _check(base: Data | None, *, num_bytes: int, word_bytes: int) -> None:
    if word_bytes not in WORD_BYTES:
        raise WeightsError(f"word_bytes must be one of {WORD_BYTES}, got {word_bytes}")
    if base is not None and len(base) != num_bytes:
        raise WeightsError(f"the base of a delta must have {num_bytes} bytes, got {len(base)}")


def _block(data: Data, start: int) -> NDArray[np.uint64]:
    """Returns the block at `start` as 8-byte pieces: a view, or a zero-padded copy if its end is not a whole piece."""
    num_bytes = min(_BLOCK_BYTES, len(data) - start)
    if num_bytes % 8 == 0:
        return np.frombuffer(data, "<u8", num_bytes // 8, start)
    padded = np.zeros(-(-num_bytes // 8), "<u8")
    padded.view(np.uint8)[:num_bytes] = np.frombuffer(data, np.uint8, num_bytes, start)
    return padded


def _changed(difference: NDArray[np.uint64], touched: NDArray[np.intp], word: np.dtype) -> NDArray[np.intp]:
    """Returns the ascending indices of the words that differ; searches only the 8-byte pieces `touched`."""
    num_lanes = 8 // word.itemsize
    lanes = np.flatnonzero(difference[touched].view(word) != 0)
    return touched[lanes // num_lanes] * num_lanes + lanes % num_lanes


def _sparse(index: NDArray[np.intp], new: Words, old: Words) -> list[Words]:
    """Returns [gaps, moves], each [len(index)].

    A gap is the number of unchanged words before a changed word. A move is the word's change in ULP, zigzag-coded:
    0 -1 1 -2 2 … as 0 1 2 3 4 …
    """
    gaps = np.diff(index, prepend=-1) - 1
    longest = int(gaps.max(initial=0))
    gap_bytes = next(size for size in (1, 2, 4) if longest < 1 << 8 * size)
    moves = ordered_integers(_signed(new[index])) - ordered_integers(_signed(old[index]))
    sign = moves >> (8 * new.itemsize - 1)
    return [gaps.astype(f"<u{gap_bytes}"), ((moves << 1) ^ sign).view(new.dtype)]


def _signed(words: Words) -> NDArray[np.signedinteger]:
    return words.view(f"<i{words.itemsize}")


def ordered_integers(bits: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    """Maps the bits of floating-point numbers to integers of the same order, one apart for neighbours (1 ULP).

    The function is its own inverse.
    """
    sign = bits >> (8 * bits.itemsize - 1)
    return np.bitwise_xor(bits, sign & np.iinfo(bits.dtype).max)


def _split_planes(columns: Sequence[Words]) -> list[NDArray[np.uint8]]:
    return [
        (column >> column.dtype.type(8 * place)).astype(np.uint8)
        for column in columns
        for place in range(column.itemsize)
    ]


def _join_planes(planes: Sequence[NDArray[np.uint8] | None], dtype: np.dtype, length: int) -> NDArray:
    """Returns integers [length] from their byte planes, the least significant plane first."""
    joined = np.zeros(length, dtype)
    for place, plane in enumerate(planes):
        if plane is not None:
            joined |= plane.astype(dtype) << dtype.type(8 * place)
    return joined
