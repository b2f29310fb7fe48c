"""Finds the longest prefix of a prompt whose keys and values are saved in the cache. Pure.

A request of a multi-turn context repeats the tokens of the previous one, and the trajectories of a group share their
first prompt. The saved rows of the cache hold the keys and values of recent sequences, so that these tokens are not
computed again. The least recently used row is overwritten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from dataclasses import dataclass

_BLOCK = 8
"""Prefixes are looked up at multiples of this number of tokens. Shorter ones are not found."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `length` tokens of a sequence are in the saved row `row`."""

    row: int
    length: int


class PrefixIndex:
    """The tokens of `num_rows` saved rows. Rows are numbered from `first_row`."""

    def __init__(self, *, first_row: int, num_rows: int) -> None:
        self._unused = list(range(first_row, first_row + num_rows))
        self._saved: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()
        """row → its tokens and their `block_hashes`, the least recently used row first"""
        self._row_of: dict[int, int] = {}
        """hash of a prefix of whole blocks → the row that holds it"""

    def find(self, tokens: Sequence[int], hashes: Sequence[int]) -> Prefix | None:
        """Returns the longest saved prefix of `tokens` that was found, None if it is shorter than one block.

        hashes  `block_hashes(tokens)`
        """
        for key in reversed(hashes):
            row = self._row_of.get(key)
            if row is not None and (length := _common_length(self._saved[row][0], tokens)):
                self._saved.move_to_end(row)
                return Prefix(row, length)
        return None

    def save(self, tokens: list[int]) -> int | None:
        """Chooses the row for the keys and values of `tokens`; the caller must copy them there.

        A row whose tokens are a prefix of `tokens` is extended. Returns None if `tokens` are saved already, are shorter
        than one block, or there are no rows.
        """
        hashes = block_hashes(tokens) if self._unused or self._saved else []
        found = self.find(tokens, hashes)
        if not hashes or (found is not None and found.length == len(tokens)):
            return None
        if found is not None and found.length == len(self._saved[found.row][0]):
            row = found.row
        else:
            row = self._unused.pop() if self._unused else self._evict()
        self._saved[row] = tokens, hashes
        self._saved.move_to_end(row)
        self._row_of.update(dict.fromkeys(hashes, row))
        return row

    def clear(self) -> None:
        """Forgets all rows. Call it when the weights change."""
        self._unused.extend(self._saved)
        self._saved.clear()
        self._row_of.clear()

    def _evict(self) -> int:
        row, (_, hashes) = self._saved.popitem(last=False)
        for key in hashes:
            if self._row_of.get(key) == row:
                del self._row_of[key]
        return row


def block_hashes(tokens: Sequence[int]) -> list[int]:
    """The hashes of the prefixes of 1, 2, … whole blocks. Equal prefixes have equal hashes; the converse is not
    guaranteed."""
    hashes: list[int] = []
    key = 0
    for start in range(0, len(tokens) - _BLOCK + 1, _BLOCK):
        key = hash((key, *tokens[start : start + _BLOCK]))
        hashes.append(key)
    return hashes


def shared_length(hashes: Sequence[int], others: Container[int]) -> int:
    """The length in tokens of the longest prefix in `hashes` that is also in `others`."""
    for i in reversed(range(len(hashes))):
        if hashes[i] in others:
            return (i + 1) * _BLOCK
    return 0


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of equal tokens at the start of both."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
