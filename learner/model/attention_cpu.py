"""Exact attention over a packed forest on a CPU: a few calls of PyTorch's flash kernel, without a dense mask.

    packed       [ system | question | memory a | memory b ]      self   each node's queries on its own keys, causal
    self           ◣        ◣          ◣          ◣               cross  descendants' queries on a node's keys
    cross                   ■system────────────────────►
                                       ■question────────►

Partial results are merged by their log-sum-exp (lse). With P = exp(S - lse) and D = rowsum(dO O), the gradient of a
block depends on other blocks only through lse and O, so the backward pass calls each block's kernel with the *global*
lse and O (Dao et al. 2022, FlashAttention, algorithm 4). Small blocks of similar size are computed as one batch,
padded on the right: in self blocks the causal mask hides padded keys from real queries, in cross blocks an additive
mask does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.batch.packing import Index, Pack

_SMALL = 128**2
"""In query-key pairs. A larger block gets a separate kernel call, which needs no copies."""
_CLASS = 1.25
"""Largest ratio of two lengths in one padded batch."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True, slots=True)
class _Slice:
    """The packed tokens [start, end), as a batch of one."""

    start: int
    end: int

    def take(self, tokens: Tensor, *, padding: float | None = None) -> Tensor:
        """[1, L, ...] of tokens [U, ...]"""
        return tokens[None, self.start : self.end]

    def unpadded(self, batch: Tensor) -> Tensor:
        """[L, ...] of [1, L, ...]"""
        return batch[0]

    def read(self, tokens: Tensor) -> Tensor:
        return tokens[self.start : self.end]

    def write(self, tokens: Tensor, values: Tensor) -> None:
        tokens[self.start : self.end] = values

    def add(self, tokens: Tensor, values: Tensor) -> None:
        tokens[self.start : self.end] += values


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """N packed tokens as b rows padded to L; each row is an interval of packed tokens.

    index    int64 [b * L]   packed index of each place; an arbitrary valid one for padding
    real     int64 [N]       the places with a real token
    padding  int64 [b*L-N]   the other places
    tokens   int64 [N]       index[real]
    """

    num_rows: int
    index: Tensor
    real: Tensor
    padding: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, starts: Index, lengths: Index) -> _Rows:
        columns = np.arange(int(lengths.max()))
        inside = (columns < lengths[:, None]).reshape(-1)
        index = np.where(columns < lengths[:, None], starts[:, None] + columns, starts[:, None]).reshape(-1)
        real = np.flatnonzero(inside)
        arrays = (index, real, np.flatnonzero(~inside), index[real])
        return cls(len(starts), *(torch.from_numpy(array) for array in arrays))

    def take(self, tokens: Tensor, *, padding: float | None = None) -> Tensor:
        """[b, L, ...] of tokens [U, ...]; padded places hold `padding`, or an arbitrary finite value if it is None."""
        rows = tokens.index_select(0, self.index)
        if padding is not None:
            rows.index_fill_(0, self.padding, padding)
        return rows.unflatten(0, (self.num_rows, -1))

    def unpadded(self, batch: Tensor) -> Tensor:
        """[N, ...] of [b, L, ...]"""
        return batch.flatten(0, 1).index_select(0, self.real)

    def read(self, tokens: Tensor) -> Tensor:
        return tokens.index_select(0, self.tokens)

    def write(self, tokens: Tensor, values: Tensor) -> None:
        tokens.index_copy_(0, self.tokens, values)

    def add(self, tokens: Tensor, values: Tensor) -> None:
        tokens.index_add_(0, self.tokens, values)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Queries and the keys that they attend to, causally or all. mask: additive [b, 1, Lq, Lk], hides padded keys."""

    queries: _Slice | _Rows
    keys: _Slice | _Rows
    causal: bool
    mask: Tensor | None = None

    @property
    def sides(self) -> tuple[_Slice | _Rows, _Slice | _Rows, _Slice | _Rows]:
        """The rows of query, key and value, which are also the rows of their gradients."""
        return self.queries, self.keys, self.keys

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(out [n, H, D], lse [n, H]) of the block's queries over the block's keys only; arguments [U, heads, D]."""
        inputs = _heads_first(self.queries.take(query), self.keys.take(key), self.keys.take(value))
        out, lse = _forward(*inputs, 0.0, self.causal, attn_mask=self._mask(query), scale=scale)
        return self.queries.unpadded(out.transpose(1, 2)), self.queries.unpadded(lse.transpose(1, 2))

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's part of the gradients of its queries [n, H, D], keys and values [n', K, D]."""
        inputs = _heads_first(
            self.queries.take(grad, padding=0.0),
            self.queries.take(query),
            self.keys.take(key),
            self.keys.take(value),
            self.queries.take(out),
            self.queries.take(lse, padding=float("inf")),
        )
        grads = _backward(*inputs, 0.0, self.causal, attn_mask=self._mask(query), scale=scale)
        grad_query, grad_key, grad_value = (each.transpose(1, 2) for each in grads)
        return self.queries.unpadded(grad_query), self.keys.unpadded(grad_key), self.keys.unpadded(grad_value)

    def _mask(self, query: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask.to(query.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """The blocks of a pack. Every token is a query of exactly one self block; cross blocks add its ancestors' keys."""

    num_depths: int
    self_blocks: tuple[_Block, ...]
    cross_blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, pack: Pack) -> BlockPlan:
        starts, ends, subtree_ends = pack.node_start, pack.node_end, pack.subtree_end[pack.node_start]
        self_blocks = []
        for members in _batches(ends - starts, ends - starts):
            rows = _rows(starts[members], ends[members])
            self_blocks.append(_Block(rows, rows, causal=True))
        cross_blocks = []
        level = _levels(starts, subtree_ends)
        parents = subtree_ends > ends
        for each in np.unique(level[parents]):
            nodes = np.flatnonzero(parents & (level == each))
            for members in _batches(subtree_ends[nodes] - ends[nodes], (ends - starts)[nodes]):
                cross_blocks.append(_cross(starts[nodes[members]], ends[nodes[members]], subtree_ends[nodes[members]]))
        num_depths = int(pack.depth.max()) + 1
        return cls(num_depths=num_depths, self_blocks=tuple(self_blocks), cross_blocks=tuple(cross_blocks))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[1, U, H, D] from query [1, H, U, D] and key, value [1, K, U, D], H a multiple of K."""
        tokens_first = (each[0].transpose(0, 1) for each in (query, key, value))
        return _BlockAttention.apply(*tokens_first, self, scale)[None]  # pyright: ignore[reportOptionalSubscript]


class _BlockAttention(torch.autograd.Function):
    """[U, H, D] from query [U, H, D] and key, value [U, K, D]."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scale: float) -> Tensor:
        precise = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(query.shape, dtype=precise)
        lse = torch.empty(query.shape[:2], dtype=precise)
        for block in plan.self_blocks:
            part, part_lse = block.forward(query, key, value, scale)
            block.queries.write(out, part.to(precise))
            block.queries.write(lse, part_lse)
        for block in plan.cross_blocks:
            part, part_lse = block.forward(query, key, value, scale)
            before = block.queries.read(lse)
            after = torch.logaddexp(before, part_lse)
            kept, added = (before - after).exp_()[..., None], (part_lse - after).exp_()[..., None]
            block.queries.write(out, (block.queries.read(out) * kept).addcmul_(part.to(precise), added))
            block.queries.write(lse, after)
        result = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.plan, ctx.scale = plan, scale
        return result

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        precise = torch.promote_types(saved[0].dtype, torch.float32)
        totals = [torch.empty(each.shape, dtype=precise) for each in saved[:3]]
        for block in ctx.plan.self_blocks:
            parts = block.backward(grads[0], *saved, ctx.scale)
            for rows, total, part in zip(block.sides, totals, parts, strict=True):
                rows.write(total, part.to(precise))
        for block in ctx.plan.cross_blocks:
            parts = block.backward(grads[0], *saved, ctx.scale)
            for rows, total, part in zip(block.sides, totals, parts, strict=True):
                rows.add(total, part.to(precise))
        return *(total.to(saved[0].dtype) for total in totals), None, None


def _heads_first(*batches: Tensor) -> list[Tensor]:
    return [batch.transpose(1, 2) for batch in batches]


def _rows(starts: Index, ends: Index) -> _Slice | _Rows:
    return _Slice(int(starts[0]), int(ends[0])) if len(starts) == 1 else _Rows.of(starts, ends - starts)


def _cross(starts: Index, ends: Index, subtree_ends: Index) -> _Block:
    """All queries below some nodes on these nodes' keys. The nodes have the same level, so no query occurs twice."""
    queries, keys = _rows(ends, subtree_ends), _rows(starts, ends)
    if isinstance(keys, _Slice) or not len(keys.padding):
        return _Block(queries, keys, causal=False)
    hidden = torch.zeros(len(keys.index)).index_fill_(0, keys.padding, float("-inf"))
    length = int((subtree_ends - ends).max())
    return _Block(queries, keys, causal=False, mask=hidden.view(len(starts), 1, 1, -1).expand(-1, -1, length, -1))


def _batches(num_queries: Index, num_keys: Index) -> list[Index]:
    """Block indices of each kernel call: one large block, or small blocks of similar size. Arguments are int64 [n]."""
    sizes = np.stack([num_queries, num_keys])
    classes = np.ceil(np.log(np.maximum(sizes, 8)) / np.log(_CLASS)).astype(np.int64)
    large, small = np.flatnonzero(num_queries * num_keys > _SMALL), np.flatnonzero(num_queries * num_keys <= _SMALL)
    _, which = np.unique(classes[:, small], axis=1, return_inverse=True)
    which = which.reshape(-1)
    together = [small[which == each] for each in range(int(which.max(initial=-1)) + 1)]
    return [np.array([each]) for each in large] + together


def _levels(starts: Index, subtree_ends: Index) -> Index:
    """int64 [B]: the number of each node's ancestors."""
    order = np.sort(subtree_ends)
    return np.arange(len(starts)) - np.searchsorted(order, starts, side="right")
