"""The key-value cache of the running sequences, and the attention function that reads and writes it.

Each sequence has one row, and rows are dense from 0, so a step reads plain slices: nothing is copied when a sequence
starts, and one row is copied when a sequence in the middle ends. The tokens of a step are packed into one row of input,
first one token of each decoding sequence, then the prompts one after another. Only attention separates the sequences:

    packed   d0 d1 d2 | p p p p p | p p p        cache rows 0 1 2 | 3 | 4

All decoding rows attend to the first L positions, L being the longest row's length. So a batch with very unequal
lengths computes more than it needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from protocol.errors import ConfigError

ATTENTION_NAME = "palimpsest_rows"


@dataclass(frozen=True, slots=True)
class KVCache:
    """`keys` and `values`: float [layers, rows, kv_heads, length, head_dim].

    The operating system commits a page when it is first written, so the memory in use grows with the longest sequence
    that each row has held.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(
        cls, *, num_layers: int, num_rows: int, num_kv_heads: int, length: int, head_dim: int, dtype: torch.dtype
    ) -> KVCache:
        """Allocates a zeroed cache. Raises: ConfigError (not enough memory)."""
        # Zeros, because masked values are multiplied by 0, and uninitialised memory may hold nan (0 * nan is nan).
        shape = (num_layers, num_rows, num_kv_heads, length, head_dim)
        try:
            return cls(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        except RuntimeError as error:
            num_bytes = 2 * math.prod(shape) * dtype.itemsize
            raise ConfigError(
                f"engine.max_running_requests {num_rows} x context length {length} (workflow.context_tokens, at most "
                f"the model's own) needs {num_bytes} bytes of key-value cache, more than this machine has: lower "
                "one of them"
            ) from error

    def move(self, moves: tuple[tuple[int, int], ...], *, length: int) -> None:
        """Copies the first `length` positions of each source row to its target row. The two sets are disjoint."""
        sources = [source for source, _ in moves]
        targets = [target for _, target in moves]
        for cache in (self.keys, self.values):
            cache[:, targets, :, :length] = cache[:, sources, :, :length]

    def clear(self, row: int) -> None:
        """Zeroes a row that may hold values that are not finite."""
        self.keys[:, row] = 0
        self.values[:, row] = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The place in the cache of each packed token of one step: D decoding tokens, P prompts of <= S tokens, N tokens.

    rows           int64 [D]     0..D-1, the cache rows of the decoding tokens
    positions      int64 [D]     cache position of each decoding token
    decode_bias    float [D, 1, 1, L] or None: added to the scores of cache positions 0..L-1; None if nothing is masked
    length         L, one more than the largest decoding position
    pad_index      int64 [P, S]  packed index of each prompt position; any valid index in the padding
    unpad_index    int64 [N]     index into the flattened [P * S] of each prompt token, in packed order
    """

    cache: KVCache
    rows: torch.Tensor
    positions: torch.Tensor
    decode_bias: torch.Tensor | None
    length: int
    pad_index: torch.Tensor | None
    unpad_index: torch.Tensor | None

    @property
    def num_decode(self) -> int:
        return len(self.positions)


def pack(cache: KVCache, *, decode_lengths: list[int], prompt_lengths: list[int]) -> PackedBatch:
    """Computes the layout of a step. `decode_lengths`: number of tokens in the cache for each decoding row."""
    positions = torch.tensor(decode_lengths, dtype=torch.int64)
    num_decode = len(decode_lengths)
    length = max(decode_lengths, default=-1) + 1
    bias: torch.Tensor | None = None
    if num_decode and min(decode_lengths) + 1 < length:
        hidden = torch.arange(length) > positions[:, None]
        bias = torch.zeros(hidden.shape, dtype=cache.keys.dtype).masked_fill_(hidden, -torch.inf)[:, None, None, :]
    pad_index = unpad_index = None
    if prompt_lengths:
        lengths = torch.tensor(prompt_lengths, dtype=torch.int64)
        starts = num_decode + lengths.cumsum(0) - lengths
        offsets = torch.arange(max(prompt_lengths))
        inside = offsets < lengths[:, None]
        pad_index = torch.where(inside, starts[:, None] + offsets, starts[:, None])
        unpad_index = inside.flatten().nonzero()[:, 0]
    return PackedBatch(
        cache=cache,
        rows=torch.arange(num_decode),
        positions=positions,
        decode_bias=bias,
        length=length,
        pad_index=pad_index,
        unpad_index=unpad_index,
    )


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: PackedBatch,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention of packed tokens within their own sequences; writes keys and values to the cache.

    An attention function for transformers' AttentionInterface. `query`: float [1, H, T, E]; `key`, `value`:
    float [1, KV, T, E]. Returns float [1, T, H, E].
    """
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    keys, values = batch.cache.keys[layer], batch.cache.values[layer]
    parts: list[torch.Tensor] = []
    if batch.num_decode:
        parts.append(_attend_decode(query[0], key[0], value[0], keys, values, batch=batch, scaling=scaling))
    if batch.pad_index is not None:
        parts.append(_attend_prefill(query[0], key[0], value[0], keys, values, batch=batch, scaling=scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    batch: PackedBatch,
    scaling: float | None,
) -> torch.Tensor:
    """Attends from one new token in each of the first D rows: float [D, H, E]."""
    n = batch.num_decode
    num_heads, _, head_dim = query.shape
    num_kv_heads = key.shape[0]
    keys[batch.rows, :, batch.positions] = key[:, :n].transpose(0, 1)
    values[batch.rows, :, batch.positions] = value[:, :n].transpose(0, 1)
    # Query heads that share a key head are passed as query positions, so that keys need not be repeated.
    grouped = query[:, :n].transpose(0, 1).reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = scaled_dot_product_attention(
        grouped,
        keys[:n, :, : batch.length],
        values[:n, :, : batch.length],
        attn_mask=batch.decode_bias,
        scale=scaling,
    )
    return out.reshape(n, num_heads, head_dim)


def _attend_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    batch: PackedBatch,
    scaling: float | None,
) -> torch.Tensor:
    """Attends within whole prompts, cached in the rows after the decoding ones: float [T - D, H, E].

    Padding is on the right, so causal attention of real tokens never reads it, and its cache positions are overwritten
    before they are read.
    """
    assert batch.pad_index is not None
    assert batch.unpad_index is not None
    num_prompts, longest = batch.pad_index.shape
    first = batch.num_decode
    padded_query, padded_key, padded_value = (
        tokens.transpose(0, 1)
        .index_select(0, batch.pad_index.flatten())
        .unflatten(0, (num_prompts, longest))
        .transpose(1, 2)
        for tokens in (query, key, value)
    )
    keys[first : first + num_prompts, :, :longest] = padded_key
    values[first : first + num_prompts, :, :longest] = padded_value
    out = scaled_dot_product_attention(
        padded_query,
        padded_key,
        padded_value,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch.unpad_index)
