"""Finds common prefixes of contexts, predicts the cost saved by sharing them, and cuts their order into intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protocol.errors import ConfigError

Index = NDArray[np.int64]
Share = bool | Literal["auto"]

MIN_SAVING = 0.1
"""`auto` shares prefixes if this saves at least this fraction of the predicted cost. Below it, the overhead of smaller
attention calls is larger than the saving."""

_PAIR_COST = 1 / 8192
"""Cost of a query-key pair in units of a token's linear layers: 2 x width of the heads / parameters of a layer. The
value is for a 0.5B model; a 3B model has half of it. Costs are only compared with each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """C contexts in depth-first order.

    order    int64 [C]  the context at each place
    lengths  int64 [C]
    shared   int64 [C]  length of the prefix that the i-th context shares with the one before it
    """

    order: Index
    lengths: Index
    shared: Index

    @classmethod
    def of(cls, contexts: Sequence[NDArray[np.integer]], *, min_share: int) -> Forest:
        if min_share < 1:
            raise ConfigError(f"min_share must be >= 1, got {min_share}")
        keys = [
            np.asarray(context).astype(">u4").tobytes() for context in contexts
        ]  # big-endian bytes sort as the ids do
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
        lengths = np.array([len(contexts[c]) for c in order], dtype=np.int64)
        common = np.zeros(len(order), dtype=np.int64)
        for i in range(1, len(order)):
            common[i] = _common_prefix(contexts[order[i - 1]], contexts[order[i]])
        continued = np.append(False, common[1:] == lengths[:-1]) if len(order) else np.zeros(0, dtype=np.bool_)
        return cls(order, lengths, np.where(continued, common, common - common % min_share))

    @property
    def unshared(self) -> Index:
        """int64 [C], zeros: replaces `shared` if prefixes are not shared."""
        return np.zeros_like(self.shared)

    def costs(self, *, shared: bool) -> NDArray[np.float64]:
        """float64 [C]: the cost that each context adds, in units of one token through the linear layers."""
        whole = _cost(self.lengths)
        return whole - _cost(self.shared) if shared else whole

    def cost(self, *, shared: bool) -> float:
        return float(self.costs(shared=shared).sum())


def _cost(length: Index) -> NDArray[np.float64]:
    """Cost of the first `length` tokens of a context: linear layers, and attention to all earlier tokens."""
    return length + _PAIR_COST * length * (length + 1) / 2


def is_worth_sharing(shared_cost: float, unshared_cost: float, share: Share) -> bool:
    """`share` if it is a bool; for `auto`, whether sharing saves at least MIN_SAVING of the cost."""
    enough = shared_cost <= (1 - MIN_SAVING) * unshared_cost * (1 + 1e-9)  # tolerates other orders of summation
    return enough if share == "auto" else share


def _common_prefix(one: NDArray[np.integer], other: NDArray[np.integer]) -> int:
    """The length of the common prefix."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


class Cutter:
    """Cuts a forest's order [0, C) into intervals, using prefix sums of sizes and costs."""

    def __init__(self, forest: Forest, *, budget: int, share: Share) -> None:
        self._budget = budget
        self._share: Share = share
        self._num_contexts = len(forest.order)
        self._sizes = {shared: _Sums(forest.lengths, forest.shared * shared) for shared in (False, True)}
        costs, saved = forest.costs(shared=False), _cost(forest.shared)
        self._costs = {shared: _Sums(costs, saved * shared) for shared in (False, True)}

    def balanced(self, num_ranks: int) -> list[tuple[int, int]]:
        """Intervals by descending cost.

        Their number is the smallest possible multiple of `num_ranks`; the cost of the first is minimised to 1 %.
        """
        low, high = 0.0, self._costs[False].of(0, self._num_contexts)
        parts = self._cut(high)
        wanted = -(-len(parts) // num_ranks) * num_ranks
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            found = self._cut(middle)
            if len(found) <= wanted and max(self._cost(*part) for part in found) <= middle:
                parts, high = found, middle
            else:
                low = middle
        while len(parts) < wanted:
            parts = self._with_one_more(parts)
        return sorted(parts, key=lambda part: self._cost(*part), reverse=True)

    def _with_one_more(self, parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Halves the most expensive interval that can be halved; if there is none, adds an empty interval."""
        for start, end in sorted(parts, key=lambda part: self._cost(*part), reverse=True):
            halves = [(start, (start + end) // 2), ((start + end) // 2, end)]
            if end - start > 1 and all(self._fits(*half) for half in halves):
                return [part for part in parts if part != (start, end)] + halves
        return [*parts, (self._num_contexts, self._num_contexts)]

    def _fits(self, start: int, end: int) -> bool:
        """Whether the interval is within the budget. Half of a shared interval may be packed unshared and be larger."""
        return end - start == 1 or self._sizes[self._is_shared(start, end)].of(start, end) <= self._budget

    def _cut(self, bound: float) -> list[tuple[int, int]]:
        """Cuts greedily from the left: each interval is as long as the token budget and the cost `bound` allow."""
        parts, start = [], 0
        while start < self._num_contexts:
            end = self._furthest(start, bound, shared=self._share is not False)
            if not self._is_shared(start, end):
                end = self._furthest(start, bound, shared=False)
            parts.append((start, end))
            start = end
        return parts

    def _furthest(self, start: int, bound: float, *, shared: bool) -> int:
        within = (self._sizes[shared].reach(start, self._budget), self._costs[shared].reach(start, bound))
        return max(start + 1, min(within))

    def _is_shared(self, start: int, end: int) -> bool:
        return is_worth_sharing(self._costs[True].of(start, end), self._costs[False].of(start, end), self._share)

    def _cost(self, start: int, end: int) -> float:
        return self._costs[self._is_shared(start, end)].of(start, end)


class _Sums:
    """Sums over intervals: a context adds `whole` [C], minus `shared` [C] unless it is the first of the interval."""

    def __init__(self, whole: ArrayLike, shared: ArrayLike) -> None:
        self._shared = np.asarray(shared, dtype=np.float64)
        self._sums = np.concatenate([[0.0], np.cumsum(np.asarray(whole, dtype=np.float64) - self._shared)])

    def of(self, start: int, end: int) -> float:
        return float(self._sums[end] - self._sums[start] + self._shared[start]) if end > start else 0.0

    def reach(self, start: int, limit: float) -> int:
        """The largest end with of(start, end) <= limit."""
        bound = self._sums[start] - self._shared[start] + limit
        return int(np.searchsorted(self._sums, bound, side="right")) - 1
