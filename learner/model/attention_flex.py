"""Attention over a packed forest on a GPU: FlexAttention with one block mask, used by all layers.

The block mask is computed from `subtree_end`: key block J is visible to a later query block I if the subtree of some
key in J extends into I, and fully visible if the subtree of every key in J covers I. No [U, U] mask is formed. The
forward pass is tested uncompiled on a CPU; it has not been run on a GPU.
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
"""Tokens per mask block. The row is padded to a multiple of it, so that the compiled kernel gets only whole blocks."""


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
    """(token_ids [U], position_ids [U], plan), U a multiple of 128 and at least 256; padding attends only to itself.

    At least two blocks, because the compiler makes a separate graph for a size of 1.
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
    """(counts int32 [1, 1, Q], key blocks int32 [1, 1, Q, K] with the true ones first) of a bool [Q, K]."""
    counts, order = blocks.sum(axis=1), np.argsort(~blocks, axis=1, kind="stable")
    count, indices = (torch.from_numpy(array.astype(np.int32))[None, None].to(device) for array in (counts, order))
    return count, indices


Attend = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]


@functools.cache
def compiled(scale: float, is_grouped: bool, *, backend: str | Callable = "inductor") -> Attend:
    """A compiled function (query, key, value, block mask) -> out, with one graph for every number of tokens.

    `use_duck_shape=False`: otherwise the compiler would treat sizes that are equal by chance (number of blocks, number
    of heads, head width) as one symbol. `fail_on_recompile_limit_hit`: otherwise, beyond the limit of graphs, it would
    run uncompiled without a warning, which forms all scores.
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
