"""The key-value cache of the running sequences, and the attention function that reads and writes it.

Each sequence has one row, and rows are dense from 0, so a step reads plain slices. A row is copied when a sequence in
the middle ends, and to and from the saved rows, which hold prefixes for later sequences. The tokens of a step are
packed into one row of input, first one token of each decoding sequence, then the prompts without their cached prefixes,
one after another. Only attention separates the sequences:

    packed   d0 d1 d2 | p p p p p | p p p        cache rows 0 1 2 | 3 | 4

All decoding rows attend to the first L positions, L being the longest row's length. So a batch with very unequal
lengths computes more than it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def copy(self, copies: tuple[tuple[int, int], ...], *, length: int) -> None:
        """Copies the first `length` positions of each source row to its target row. The two sets are disjoint."""
        if not copies:
            return
        sources, targets = torch.tensor(copies).T
        for cache in (self.keys, self.values):
            for layer in cache[:, :, :, :length]:
                layer.index_copy_(0, targets, layer.index_select(0, sources))

    def clear(self, row: int) -> None:
        """Zeroes a row that may hold values that are not finite."""
        self.keys[:, row] = 0
        self.values[:, row] = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The place in the cache of each packed token of one step: D decoding tokens, P prompts of <= S tokens, N tokens.

    rows            int64 [N]     cache row of each token
    positions       int64 [N]     cache position of each token
    num_decode      D; the decoding tokens are in rows 0..D-1
    decode_length   L, one more than the largest decoding position
    decode_bias     float [D, 1, 1, L] or None: added to the scores of cache positions 0..L-1; None if nothing is masked
    prefill_length  M, the length of the longest prompt, its cached prefix included
    prefill_bias    float [P, 1, S, M] or None: added to the scores; None if no prompt has a cached prefix (causal)
    pad_index       int64 [P, S]  packed index of each prompt position; any valid index in the padding
    unpad_index     int64 [N]     index into the flattened [P * S] of each prompt token, in packed order
    """

    cache: KVCache
    rows: torch.Tensor
    positions: torch.Tensor
    num_decode: int
    decode_length: int
    decode_bias: torch.Tensor | None
    prefill_length: int
    prefill_bias: torch.Tensor | None
    pad_index: torch.Tensor | None
    unpad_index: torch.Tensor | None


def pack(
    cache: KVCache, *, decode_lengths: list[int], prefix_lengths: Sequence[int], prompt_lengths: list[int]
) -> PackedBatch:
    """Computes the layout of a step.

    decode_lengths  number of tokens in the cache for each decoding row
    prefix_lengths  number of tokens in the cache for each prompt
    prompt_lengths  length of each prompt, its prefix included
    """
    num_decode = len(decode_lengths)
    rows, positions = list(range(num_decode)), list(decode_lengths)
    for row, (prefix, length) in enumerate(zip(prefix_lengths, prompt_lengths, strict=True), start=num_decode):
        rows += [row] * (length - prefix)
        positions += range(prefix, length)
    decode_length = max(decode_lengths, default=-1) + 1
    decode_bias = prefill_bias = pad_index = unpad_index = None
    if num_decode and min(decode_lengths) + 1 < decode_length:
        last_visible = torch.tensor(decode_lengths)[:, None, None, None]
        decode_bias = _bias(last_visible, length=decode_length, dtype=cache.keys.dtype)
    if prompt_lengths:
        prefixes = torch.tensor(prefix_lengths)
        lengths = torch.tensor(prompt_lengths) - prefixes
        starts = num_decode + lengths.cumsum(0) - lengths
        offsets = torch.arange(int(lengths.max()))
        inside = offsets < lengths[:, None]
        pad_index = torch.where(inside, starts[:, None] + offsets, starts[:, None])
        unpad_index = inside.flatten().nonzero()[:, 0]
        if any(prefix_lengths):
            last_visible = (prefixes[:, None] + offsets)[:, None, :, None]
            prefill_bias = _bias(last_visible, length=max(prompt_lengths), dtype=cache.keys.dtype)
    return PackedBatch(
        cache=cache,
        rows=torch.tensor(rows),
        positions=torch.tensor(positions),
        num_decode=num_decode,
        decode_length=decode_length,
        decode_bias=decode_bias,
        prefill_length=max(prompt_lengths, default=0),
        prefill_bias=prefill_bias,
        pad_index=pad_index,
        unpad_index=unpad_index,
    )


def _bias(last_visible: torch.Tensor, *, length: int, dtype: torch.dtype) -> torch.Tensor:
    """0 for the cache positions up to `last_visible`, [..., 1], and -inf for the later ones: [..., length]."""
    hidden = torch.arange(length) > last_visible
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


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
    keys[batch.rows, :, batch.positions] = key[0].transpose(0, 1)
    values[batch.rows, :, batch.positions] = value[0].transpose(0, 1)
    parts: list[torch.Tensor] = []
    if batch.num_decode:
        parts.append(_attend_decode(query[0], keys, values, batch=batch, scaling=scaling))
    if batch.pad_index is not None:
        parts.append(_attend_prefill(query[0], keys, values, batch=batch, scaling=scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _attend_decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, batch: PackedBatch, scaling: float | None
) -> torch.Tensor:
    """Attends from one new token in each of the first D rows: float [D, H, E]."""
    n = batch.num_decode
    num_heads, _, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    # Query heads that share a key head are passed as query positions, so that keys need not be repeated.
    grouped = query[:, :n].transpose(0, 1).reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = scaled_dot_product_attention(
        grouped,
        keys[:n, :, : batch.decode_length],
        values[:n, :, : batch.decode_length],
        attn_mask=batch.decode_bias,
        scale=scaling,
    )
    return out.reshape(n, num_heads, head_dim)


def _attend_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, batch: PackedBatch, scaling: float | None
) -> torch.Tensor:
    """Attends within whole prompts, cached in the rows after the decoding ones: float [N - D, H, E].

    Padding is on the right, so real tokens never attend to it. The keys at padded positions are those of earlier
    sequences in these rows: finite, and masked.
    """
    assert batch.pad_index is not None
    assert batch.unpad_index is not None
    num_prompts, longest = batch.pad_index.shape
    prompts = slice(batch.num_decode, batch.num_decode + num_prompts)
    padded_query = (
        query.transpose(0, 1)
        .index_select(0, batch.pad_index.flatten())
        .unflatten(0, (num_prompts, longest))
        .transpose(1, 2)
    )
    out = scaled_dot_product_attention(
        padded_query,
        keys[prompts, :, : batch.prefill_length],
        values[prompts, :, : batch.prefill_length],
        attn_mask=batch.prefill_bias,
        is_causal=batch.prefill_bias is None,
        scale=scaling,
        enable_gqa=query.shape[0] != keys.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch.unpad_index)
