"""Attention over a packed forest on a GPU: FlexAttention with the forest's integer mask, one block mask for all layers.

The block mask comes from the integers themselves: key block J is visible to a later query block I where some key of J
still has a subtree that reaches into I, and wholly where every key of J has one that reaches beyond I. So no
[U, U] mask is ever formed. Its forward is tested uncompiled on a CPU; it has not been run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch._dynamo.config as dynamo
import torch.fx.experimental._config as symbolic_shapes
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from learner.batch.packing import Index, Pack

_BLOCK = 128
"""Tokens of a mask block; the row is padded to a multiple, so that the compiled kernel sees whole blocks only."""


@dataclass(frozen=True, slots=True, eq=False)
class FlexPlan:
    """A pack's block mask."""

    num_depths: int
    block_mask: BlockMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """[1, U, H, D] from query [1, H, U, D] and key, value [1, K, U, D], H a multiple of K."""
        is_grouped = query.shape[1] != key.shape[1]
        if query.is_cuda:
            out = compiled(scale, is_grouped)(query, key, value, self.block_mask)
        else:
            out = flex_attention(query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=is_grouped)
        return cast(Tensor, out).transpose(1, 2)


def flex_inputs(pack: Pack, device: torch.device) -> tuple[Tensor, Tensor, FlexPlan]:
    """(token_ids [U], position_ids [U], plan), U a multiple of 128 and at least 256; added tokens see only themselves.

    At least two blocks, because the compiler makes a graph of its own for a size of 1.
    """
    num_added = max(2 * _BLOCK - pack.num_unique_tokens, -pack.num_unique_tokens % _BLOCK)
    token_ids, depth = (np.pad(column, (0, num_added)) for column in (pack.token_ids, pack.depth))
    alone = np.arange(pack.num_unique_tokens, len(token_ids)) + 1
    subtree_end = np.concatenate([pack.subtree_end, alone])
    plan = FlexPlan(num_depths=int(pack.depth.max()) + 1, block_mask=block_mask(subtree_end, device))
    return torch.from_numpy(token_ids), torch.from_numpy(depth), plan


def block_mask(subtree_end: Index, device: torch.device) -> BlockMask:
    """Key j is visible to query i iff j <= i < subtree_end[j]; subtree_end int64 [U], U a multiple of 128."""
    size = len(subtree_end)
    blocks = subtree_end.reshape(-1, _BLOCK)
    number = np.arange(len(blocks))
    query, key = number[:, None], number[None, :]
    visible = (query == key) | ((query > key) & (blocks.max(axis=1)[None, :] > query * _BLOCK))
    whole = (query > key) & (blocks.min(axis=1)[None, :] >= (query + 1) * _BLOCK)
    ends = torch.from_numpy(subtree_end).to(device)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        *_ordered(visible & ~whole, device),
        *_ordered(whole, device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=is_visible,
        seq_lengths=(size, size),
    )


def _ordered(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """(counts int32 [1, 1, Q], key blocks int32 [1, 1, Q, K], those that count first) of a bool [Q, K]."""
    counts, order = blocks.sum(axis=1), np.argsort(~blocks, axis=1, kind="stable")
    count, indices = (torch.from_numpy(array.astype(np.int32))[None, None].to(device) for array in (counts, order))
    return count, indices


Attend = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]


@functools.cache
def compiled(scale: float, is_grouped: bool, *, backend: str | Callable = "inductor") -> Attend:
    """One graph for every number of tokens: (query, key, value, block mask) -> out.

    The number of blocks may by chance be that of heads, or of a head's width: without `use_duck_shape` the compiler
    does not take them for the same size. Beyond the limit of graphs it would run uncompiled, which forms all scores,
    in silence: it shall fail.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        out = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=is_grouped)
        return cast(Tensor, out)

    function = torch.compile(attend, dynamic=True, backend=backend)

    def call(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
        with (
            symbolic_shapes.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]
            dynamo.patch(fail_on_recompile_limit_hit=True),  # pyright: ignore[reportAttributeAccessIssue]
        ):
            return function(query, key, value, mask)

    return call
