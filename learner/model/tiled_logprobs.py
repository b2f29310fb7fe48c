"""Log-probs and entropies of chosen tokens from hidden states, without forming logits [tokens, vocabulary].

Logits are computed in tiles (some tokens x a part of the vocabulary). The softmax needs one pass over the tiles: with m
the largest logit so far, s the sum of exp(z - m) and e the sum of exp(z - m) (z - m), s and e are rescaled when m grows
(Milakov & Gimelshein 2018). At the end log sum exp z = m + log s, and the entropy is log s - e / s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Logits per tile. At most three fp32 copies exist: 6 MiB on a CPU; 1.5 GiB on a GPU, which needs large tiles."""


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    tile_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob [M], entropy [M] in nats) of `target` under softmax((hidden weight^T + bias) / temperature).

    hidden [M, H]; weight [V, H], the output embedding, tied or not; bias [V]; target int64 [M]. The softmax is in fp32,
    or in fp64 for fp64 inputs. Entropy carries gradient only with `entropy_grad`. At most `tile_elements` logits exist
    at a time (default 2^19 on a CPU, 2^27 on a GPU); they are recomputed in the backward pass unless one tile holds
    all, so memory for logits depends neither on M nor on V.
    """
    elements = tile_elements or _TILE_ELEMENTS[hidden.device.type]
    tile = tile_shape(len(hidden), len(weight), elements)
    logprob, entropy = _TokenScores.apply(hidden, weight, bias, target, temperature, tile)  # pyright: ignore[reportGeneralTypeIssues]
    return logprob, entropy if entropy_grad else entropy.detach()


def tile_shape(num_rows: int, num_columns: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile of at most `elements` logits.

    Full rows if 128 of them fit (or all of fewer), else about square, which minimises how often hidden states and the
    output embedding are read.
    """
    columns = num_columns
    if elements // num_columns < min(num_rows, 128):
        columns = min(num_columns, max(math.isqrt(elements), elements // max(1, num_rows)))
    columns = math.ceil(num_columns / math.ceil(num_columns / columns))  # columns of equal size
    return max(1, min(num_rows, elements // columns)), columns


class _TokenScores(torch.autograd.Function):
    """With z the logits, p = softmax(z) and h its entropy: d logprob = onehot - p, d entropy = -p (log p + h)."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        kept = None
        if len(hidden) <= tile[0] and len(weight) <= tile[1]:
            kept = _logits(hidden, weight, bias, temperature)
            kept.sub_(kept.logsumexp(dim=-1, keepdim=True))  # log_softmax adds the V terms one by one: errors of 3e-5
            logprob = kept.gather(1, target[:, None]).squeeze(1).clone()  # not a view: FSDP hooks outputs
            normalizer, entropy = torch.zeros_like(logprob), kept.exp().mul_(kept).sum(dim=-1).neg_()
        else:
            rows = (
                _score_rows(hidden[chunk], weight, bias, target[chunk], temperature, tile[1])
                for chunk in _slices(len(hidden), tile[0])
            )
            logprob, entropy, normalizer = (torch.cat(parts) for parts in zip(*rows, strict=True))
        ctx.save_for_backward(hidden, weight, bias, target, kept, normalizer, entropy)
        ctx.temperature, ctx.tile = temperature, tile
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, kept, normalizer, entropy = ctx.saved_tensors
        precise = torch.promote_types(weight.dtype, torch.float32)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(each, dtype=precise) if needed else None
            for each, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for rows in _slices(len(hidden), ctx.tile[0]):
            of_logprob, of_entropy = (None if grad is None else grad[rows, None] / ctx.temperature for grad in grads)
            for columns in _slices(len(weight), ctx.tile[1]):
                logprobs = kept
                if logprobs is None:
                    some = None if bias is None else bias[columns]
                    logprobs = _logits(hidden[rows], weight[columns], some, ctx.temperature)
                    logprobs.sub_(normalizer[rows, None])
                of_logits = _grad_of_logits(logprobs, entropy[rows, None], of_logprob, of_entropy)
                if of_logprob is not None:
                    inside, where = _inside(target[rows], columns)
                    of_logits[inside, where] += of_logprob[inside, 0]
                del logprobs
                of_logits = of_logits.to(hidden.dtype)
                if of_hidden is not None:
                    _add_product(of_hidden[rows], of_logits, weight[columns])
                if of_weight is not None:
                    _add_product(of_weight[columns], of_logits.T, hidden[rows])
                if of_bias is not None:
                    of_bias[columns] += of_logits.sum(dim=0)
        found = (of_hidden, of_weight, of_bias)
        return *(None if each is None else each.to(weight.dtype) for each in found), None, None, None


def _score_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, num_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, log sum exp of the logits), [rows] each, from tiles of `num_columns` vocabulary entries."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    largest = torch.full((len(hidden),), -1e30, dtype=precise, device=hidden.device)  # finite, because it is subtracted
    total, weighted, picked = torch.zeros_like(largest), torch.zeros_like(largest), torch.zeros_like(largest)
    for columns in _slices(len(weight), num_columns):
        logits = _logits(hidden, weight[columns], None if bias is None else bias[columns], temperature)
        inside, where = _inside(target, columns)
        picked[inside] = logits[inside, where]
        above = torch.maximum(largest, logits.amax(dim=1))
        down, logits = largest - above, logits.sub_(above[:, None])
        parts = logits.exp()
        weighted = (weighted + down * total) * down.exp() + parts.mul_(logits).sum(dim=1)
        total = total * down.exp() + torch.exp(logits, out=parts).sum(dim=1)
        largest = above
    normalizer = largest + total.log()
    return picked - normalizer, total.log() - weighted / total, normalizer


def _slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of [0, length), the last may be shorter; one empty slice if length is 0."""
    for start in range(0, max(1, length), step):
        yield slice(start, min(length, start + step))


def _inside(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(rows whose target is in these columns, the column within the slice), int64 each."""
    rows = torch.nonzero((target >= columns.start) & (target < columns.stop)).squeeze(1)
    return rows, target[rows] - columns.start


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """fp32 or fp64 [rows, columns]: logits divided by the temperature."""
    logits = torch.nn.functional.linear(rows, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds one @ other to `total`, which is fp32 for bf16 inputs, so that rounding does not grow with the tiles."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _grad_of_logits(logprobs: Tensor, entropy: Tensor, of_logprob: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    """[rows, columns] without the one-hot term of the targets, from the gradients of logprob and entropy [rows, 1]."""
    grad = logprobs.exp()
    if of_entropy is not None:
        inner = (logprobs + entropy).mul_(of_entropy)
        return grad.mul_(inner if of_logprob is None else inner.add_(of_logprob)).neg_()
    return grad.mul_(-of_logprob) if of_logprob is not None else grad.zero_()
