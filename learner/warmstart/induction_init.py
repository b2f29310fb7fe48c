"""Initialises a two-layer model with induction heads and trains it to copy, before it is trained on a task.

A search agent copies names from the question into a query, and facts from passages into its memory. An induction head
(find an earlier occurrence of the current token, output the token that followed it) can copy. From random weights,
gradient descent learns it here only after a plateau of 900 steps, and not for every seed; from this initialisation, in
100 to 200 steps. Two tokens are matched, not one, because a single syllable occurs in many names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from learner.warmstart.sft import NextTokenFit, OnProgress
from protocol.learner_config import OptimizerConfig

_EMBEDDING_STD = 0.1
_POSITION_LOGIT = 36.0
"""Attention logit of the target position times sqrt(head size), split over the rotary frequencies."""
_MATCH_GAIN = 3.0
_DISTINCT_LOSS = 0.1


@torch.no_grad()
def wire_induction(model: Qwen2ForCausalLM, *, seed: int) -> None:
    """Sets heads of the first two layers to an induction circuit, in place; all other weights keep their random values.

    Layer 0: biases alone make each of four heads attend one or two positions back (RoPE rotates the query back by that
    many positions); the head writes that token's embedding into a random subspace. Layer 1: queries encode the
    current token and the one before it, keys the two tokens before the key; so two heads attend to the token after an
    earlier occurrence of both, and values copy this token.
    """
    hidden, heads = model.config.hidden_size, model.config.num_attention_heads
    size = hidden // heads
    generator = torch.Generator().manual_seed(seed)
    own, previous = (_orthonormal_blocks(heads, size, generator) for _ in range(2))
    model.get_parameter("model.embed_tokens.weight").mul_(_EMBEDDING_STD / model.config.initializer_range)
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    first, second = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    rows_of = [slice(head * size, (head + 1) * size) for head in range(heads)]
    for head, (offset, read) in enumerate([(1, own[0]), (1, own[1]), (2, own[1]), (2, own[0])]):
        rows = rows_of[head]
        query_bias, key_bias = _offset_biases(frequencies, offset)
        for projection, bias in (("q_proj", query_bias), ("k_proj", key_bias)):
            model.get_parameter(f"{first}.{projection}.weight")[rows] *= 0.2
            model.get_parameter(f"{first}.{projection}.bias")[rows] = bias
        _set_values(model, first, rows, read=read, written=previous[head], scale=_EMBEDDING_STD)
    for head in range(2):
        rows, other = rows_of[head], 1 - head
        query, key = own[head] + previous[other], previous[head] + previous[2 + head]
        model.get_parameter(f"{second}.q_proj.weight")[rows] = math.sqrt(_MATCH_GAIN) * query
        model.get_parameter(f"{second}.k_proj.weight")[rows] = math.sqrt(_MATCH_GAIN) * key
        _set_values(model, second, rows, read=own[head], written=own[head], scale=2 * _EMBEDDING_STD)


def induction_pretrain(
    model: Qwen2ForCausalLM,
    *,
    symbols: range,
    max_distinct_steps: int = 300,
    repeated_steps: int = 400,
    batch_size: int = 32,
    optimizer: OptimizerConfig,
    seed: int,
    on_progress: OnProgress | None = None,
) -> float:
    """Trains copying on random sequences of `symbols`, in place; returns the mean loss of the last steps.

    It trains first on sequences of distinct symbols, until the loss is below 0.1 or for `max_distinct_steps`; then
    for `repeated_steps` on sequences of few, repeated symbols, in which one token does not determine the next.
    """
    rng = np.random.default_rng([seed, 0x1D])
    fit = NextTokenFit(model, optimizer, num_steps=max_distinct_steps + repeated_steps)
    while fit.num_steps_done < max_distinct_steps and not (fit.num_steps_done > 20 and fit.mean_loss < _DISTINCT_LOSS):
        fit.step(*distinct_batch(symbols, batch_size=batch_size, rng=rng))
        if on_progress is not None:
            on_progress("copying", fit.num_steps_done, fit.mean_loss)
    for _ in range(repeated_steps):
        fit.step(*repeated_batch(symbols, batch_size=batch_size, rng=rng))
        if on_progress is not None:
            on_progress("copying", fit.num_steps_done, fit.mean_loss)
    return fit.mean_loss


def distinct_batch(
    symbols: range, *, batch_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """16–24 distinct symbols, 0–12 other symbols, then a copy of the first from a random offset to their end.

    ids int64 [B, L]; mask bool [B, L]: the copy without its first symbol, which cannot be predicted.
    """
    num, gap = int(rng.integers(16, 25)), int(rng.integers(0, 13))
    rows: list[NDArray[np.int64]] = []
    for _ in range(batch_size):
        drawn = rng.permutation(np.asarray(symbols))
        start = int(rng.integers(0, num - 2))
        rows.append(np.concatenate([drawn[: num + gap], drawn[start:num]]))
    return _stack(rows, [np.arange(len(row)) > num + gap for row in rows])


def repeated_batch(
    symbols: range, *, batch_size: int, rng: np.random.Generator, num_chunks: int = 4
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """12–23 draws from 6–16 symbols, then `num_chunks` chunks of 3–6 of them, copied from random offsets.

    ids int64 [B, L]; mask bool [B, L]: each chunk without its first symbol.
    """
    num = int(rng.integers(12, 24))
    rows: list[NDArray[np.int64]] = []
    masks: list[NDArray[np.bool_]] = []
    for _ in range(batch_size):
        alphabet = rng.choice(np.asarray(symbols), size=int(rng.integers(6, 17)), replace=False)
        source = rng.choice(alphabet, size=num)
        lengths = rng.integers(3, 7, size=num_chunks)
        starts = [int(rng.integers(0, num - length + 1)) for length in lengths]
        chunks = [source[a : a + length] for a, length in zip(starts, lengths, strict=True)]
        rows.append(np.concatenate([source, *chunks]))
        masks.append(np.concatenate([np.zeros(num, np.bool_), *(np.arange(length) > 0 for length in lengths)]))
    return _stack(rows, masks)


def _stack(
    rows: list[NDArray[np.int64]], masks: list[NDArray[np.bool_]]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.bool_)
    for k, (row, marked) in enumerate(zip(rows, masks, strict=True)):
        ids[k, : len(row)], mask[k, : len(row)] = row, marked
    return ids, mask


def _orthonormal_blocks(heads: int, size: int, generator: torch.Generator) -> Tensor:
    """float32 [heads, size, heads * size]: orthonormal rows."""
    width = heads * size
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0].view(heads, size, width)


def _offset_biases(frequencies: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """float32 [size] each, from float32 [size / 2]: under RoPE their product peaks `offset` positions back."""
    gain = math.sqrt(_POSITION_LOGIT)
    query = torch.cat([torch.cos(offset * frequencies), -torch.sin(offset * frequencies)])
    key = torch.cat([torch.ones_like(frequencies), torch.zeros_like(frequencies)])
    return gain * query, gain * key


def _set_values(model: nn.Module, attention: str, rows: slice, *, read: Tensor, written: Tensor, scale: float) -> None:
    """Makes the head of `rows` map `read` [size, hidden] to `written` [size, hidden], times `scale`."""
    model.get_parameter(f"{attention}.v_proj.weight")[rows] = math.sqrt(scale) * read
    model.get_parameter(f"{attention}.o_proj.weight")[:, rows] = math.sqrt(scale) * written.T
