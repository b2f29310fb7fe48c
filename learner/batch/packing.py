"""Prefix-shared packing, in pure NumPy: contexts become one row in which every common prefix occurs once.

    contexts ──sort──► depth-first order ──split──► micro-batches of at most `budget` unique tokens, dealt to ranks
                                            │
                                            pack
                                            ▼
    a b c d      0 1 2 3 4 5 6     token    a b c d x y z      one integer per token defines the mask:
    a b x y  ──► a b c d x y z     depth    0 1 2 3 2 3 3      key j is visible to query i
    a b x z                        end      7 7 4 4 7 6 7      iff j <= i < subtree_end[j]

Prefixes are shared in whole blocks of `min_share` tokens, as in prefix caches: sharing a prefix of a few tokens costs
more in small attention calls than it saves. The rule compares only neighbours in the sorted order, so it gives the same
result in any micro-batch. A context that is a prefix of the next one is shared completely. A log-prob is computed once
per (packed index, next token) and copied to every (context, position) that has this pair; losses are computed there.
The first token of a branch is predicted by the last token of its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learner.batch.prefix_tree import Cutter, Forest, Index, Share, is_worth_sharing
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """The M <= N distinct (source, target) pairs that give the scores of N requested tokens.

    source  int64 [M]  packed index whose hidden state predicts the target
    target  int64 [M]  the token id that is scored
    gather  int64 [N]  the pair of each requested token: its log-prob is `logprob[gather]`
    """

    source: Index
    target: Index
    gather: Index


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One row for the model: the unique tokens of a forest of contexts, in depth-first order.

    token_ids         int64 [U]
    depth             int64 [U]    position in the context, used as the rotary position
    subtree_end       int64 [U]    key j is visible to query i iff j <= i < subtree_end[j]
    node_start        int64 [B]    a node is an interval [start, end) of packed tokens with the same subtree_end
    node_end          int64 [B]
    num_total_tokens               sum of the contexts' lengths, without sharing
    path_first        int64 [C+1]  context c consists of the segments [path_first[c], path_first[c + 1])
    path_depth        int64 [P]    depth at which a segment starts
    path_shift        int64 [P]    packed index minus depth, in a segment
    """

    token_ids: Index
    depth: Index
    subtree_end: Index
    node_start: Index
    node_end: Index
    num_total_tokens: int
    path_first: Index
    path_depth: Index
    path_shift: Index

    @property
    def num_unique_tokens(self) -> int:
        return len(self.token_ids)

    def locate(self, context: ArrayLike, position: ArrayLike) -> Index:
        """int64 [N]: the packed index of the tokens at (context, position), int [N] each; positions must exist."""
        context, position = np.asarray(context, dtype=np.int64), np.asarray(position, dtype=np.int64)
        stride = int(self.depth.max(initial=0)) + 1
        owner = np.repeat(np.arange(len(self.path_first) - 1), np.diff(self.path_first))
        keys = owner * stride + self.path_depth
        return position + self.path_shift[np.searchsorted(keys, context * stride + position, side="right") - 1]

    def place(self, context: ArrayLike, position: ArrayLike, token_id: ArrayLike) -> Placement:
        """Places N tokens to score: `token_id` at (context, position >= 1). Only their predecessors must be inputs."""
        source = self.locate(context, np.asarray(position, dtype=np.int64) - 1)
        target = np.asarray(token_id, dtype=np.int64)
        stride = int(target.max(initial=0)) + 1
        pairs, gather = np.unique(source * stride + target, return_inverse=True)
        return Placement(source=pairs // stride, target=pairs % stride, gather=gather.reshape(-1))


def pack(contexts: Sequence[NDArray[np.integer]], *, share: Share = "auto", min_share: int = 8) -> Pack:
    """Packs C contexts, int [L_c] each, into one row. Each ends before its last trained token, which is only a target.

    share      whether common prefixes are computed once; `auto`: if this saves a tenth of the predicted cost
    min_share  prefixes are shared in blocks of this many tokens
    Without contexts the row is one token of id 0, so that a rank without work can run the sharded forward
    pass that all ranks must run.
    Raises: ConfigError for a `min_share` below 1.
    """
    forest = Forest.of(contexts, min_share=min_share)
    shared = (
        forest.shared
        if is_worth_sharing(forest.cost(shared=True), forest.cost(shared=False), share)
        else forest.unshared
    )
    return _lay_out([contexts[c] for c in forest.order], forest.order, shared) if len(contexts) else _empty()


def split(
    contexts: Sequence[NDArray[np.integer]],
    *,
    budget: int,
    num_ranks: int = 1,
    share: Share = "auto",
    min_share: int = 8,
) -> list[list[Index]]:
    """For each rank, its micro-batches (arrays of context indices) in order of execution; equally many on every rank.

    The depth-first order of the contexts is cut into intervals, so that contexts with a common prefix stay together.
    `pack` of an interval, with the same `share`, has at most `budget` tokens, or the interval is a single context.
    The number of intervals is as small as possible, and so is the cost of the most expensive one; the intervals that
    ranks execute at the same time have similar costs. A micro-batch is empty only if no interval can be cut further.
    Raises: ConfigError for a `budget`, `num_ranks` or `min_share` below 1.
    """
    for name, value in (("budget", budget), ("num_ranks", num_ranks)):
        if value < 1:
            raise ConfigError(f"{name} must be >= 1, got {value}")
    forest = Forest.of(contexts, min_share=min_share)
    cutter = Cutter(forest, budget=budget, share=share)
    parts = [forest.order[start:end] for start, end in cutter.balanced(num_ranks)]
    rounds = [parts[first : first + num_ranks] for first in range(0, len(parts), num_ranks)]
    snake = [each if number % 2 == 0 else each[::-1] for number, each in enumerate(rounds)]  # balances the sums
    return [[each[rank] for each in snake] for rank in range(num_ranks)]


def _lay_out(contexts: Sequence[NDArray[np.integer]], order: Index, shared: Index) -> Pack:
    """Packs contexts in depth-first order; the i-th shares its first shared[i] tokens with the one before it."""
    lengths = np.array([len(context) for context in contexts], dtype=np.int64)
    added = lengths - shared
    open_segments: list[_Segment] = []
    closed: list[tuple[int, int, int]] = []
    paths: list[list[tuple[int, int]]] = []
    cursor = 0
    for length, depth in zip(lengths.tolist(), shared.tolist(), strict=True):
        while open_segments and open_segments[-1].depth_end > depth:
            closed.append(open_segments[-1].close_from(depth, cursor))
            if open_segments[-1].depth_end == open_segments[-1].depth:
                open_segments.pop()
        if open_segments and open_segments[-1].end == cursor:
            open_segments[-1].depth_end = length
        elif length > depth:
            open_segments.append(_Segment(start=cursor, depth=depth, depth_end=length))
        cursor += length - depth
        paths.append([(segment.depth, segment.start - segment.depth) for segment in open_segments])
    closed += [segment.close_from(segment.depth, cursor) for segment in open_segments]
    nodes = np.array(sorted(closed), dtype=np.int64).reshape(-1, 3)
    first, segments = _by_context(paths, order)
    new = [context[skip:] for context, skip in zip(contexts, shared, strict=True)]
    return Pack(
        token_ids=np.concatenate(new).astype(np.int64),
        depth=np.arange(cursor) - np.repeat(np.cumsum(added) - added - shared, added),
        subtree_end=np.repeat(nodes[:, 2], nodes[:, 1] - nodes[:, 0]),
        node_start=nodes[:, 0],
        node_end=nodes[:, 1],
        num_total_tokens=int(lengths.sum()),
        path_first=first,
        path_depth=segments[:, 0],
        path_shift=segments[:, 1],
    )


@dataclass(slots=True)
class _Segment:
    """Packed tokens from index `start`, with depths [depth, depth_end), whose subtree is not complete yet."""

    start: int
    depth: int
    depth_end: int

    @property
    def end(self) -> int:
        return self.start + self.depth_end - self.depth

    def close_from(self, depth: int, subtree_end: int) -> tuple[int, int, int]:
        """Cuts off the tokens at `depth` or deeper; returns their (start, end, subtree_end)."""
        end, self.depth_end = self.end, max(self.depth, depth)
        return self.end, end, subtree_end


def _by_context(paths: list[list[tuple[int, int]]], order: Index) -> tuple[Index, Index]:
    """(path_first [C + 1], segments [P, 2]) of the contexts 0..C-1, from the paths in depth-first `order`."""
    rank = np.argsort(order)
    counts = np.array([len(paths[i]) for i in rank], dtype=np.int64)
    flat = [segment for i in rank for segment in paths[i]]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), np.array(flat, dtype=np.int64).reshape(-1, 2)


def _empty() -> Pack:
    zero, none = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return Pack(zero, zero, zero + 1, zero, zero + 1, 0, zero, none, none)
