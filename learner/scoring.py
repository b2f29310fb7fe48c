"""Log-probabilities and entropies of chosen tokens, from hidden states, without ever forming [tokens, vocabulary]."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}
"""Logits at a time, of which two fp32 copies exist at most: 4 MiB on a CPU, 1 GiB on a GPU, which needs it to fill."""


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprob [M], entropy [M] in nats) of `target` under softmax((hidden weight^T + bias) / temperature).

    hidden [M, H]; weight [V, H], the output embedding, tied or not; bias [V]; target int64 [M]. The softmax is in fp32,
    in fp64 for fp64. Entropy carries gradient only with `entropy_grad`. Logits exist for `chunk_elements` // V rows at
    a time (2^19 elements on a CPU, 2^27 on a GPU, if not given) and are formed again in the backward pass, unless one
    chunk is all; so memory depends neither on M nor on V.
    """
    elements = chunk_elements or _CHUNK_ELEMENTS[hidden.device.type]
    num_rows = max(1, elements // weight.shape[0])
    logprob, entropy = _TokenScores.apply(hidden, weight, bias, target, temperature, num_rows)  # pyright: ignore[reportGeneralTypeIssues]
    return logprob, entropy if entropy_grad else entropy.detach()


class _TokenScores(torch.autograd.Function):
    """With z the logits, p = softmax(z) and h its entropy: d logprob = onehot - p, d entropy = -p (log p + h)."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        kept = _log_softmax(hidden, weight, bias, temperature) if len(hidden) <= num_rows else None
        scores = []
        for start in range(0, max(1, len(hidden)), num_rows):
            chunk = slice(start, start + num_rows)
            logprobs = _log_softmax(hidden[chunk], weight, bias, temperature) if kept is None else kept
            scores.append((logprobs.gather(1, target[chunk, None]).squeeze(1), _entropy(logprobs)))
            del logprobs  # before the next are formed
        ctx.save_for_backward(hidden, weight, bias, target, kept)
        ctx.temperature, ctx.num_rows = temperature, num_rows
        ctx.set_materialize_grads(False)
        logprob, entropy = (torch.cat(parts) for parts in zip(*scores, strict=True))
        return logprob, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, kept = ctx.saved_tensors
        precise = torch.promote_types(weight.dtype, torch.float32)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(each, dtype=dtype) if needed else None
            for each, dtype, needed in zip(
                (hidden, weight, bias), (hidden.dtype, precise, precise), ctx.needs_input_grad[:3], strict=True
            )
        )
        for start in range(0, len(hidden), ctx.num_rows):
            chunk = slice(start, start + ctx.num_rows)
            logprobs = _log_softmax(hidden[chunk], weight, bias, ctx.temperature) if kept is None else kept
            of_scores = (None if grad is None else grad[chunk, None] / ctx.temperature for grad in grads)
            of_logits = _grad_of_logits(logprobs, target[chunk], *of_scores).to(hidden.dtype)
            del logprobs  # before the next are formed
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[chunk])
            if of_weight is not None:
                _add_product(of_weight, of_logits.T, hidden[chunk])
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0)
        of_weight, of_bias = (None if each is None else each.to(weight.dtype) for each in (of_weight, of_bias))
        return of_hidden, of_weight, of_bias, None, None, None


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds one @ other to `total`, which is fp32 where they are bf16: rounding must not grow with the chunks."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _log_softmax(rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """fp32 or fp64 [rows, V]"""
    logits = torch.nn.functional.linear(rows, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature).log_softmax(dim=-1)


def _entropy(logprobs: Tensor) -> Tensor:
    """[rows]"""
    return logprobs.exp().mul_(logprobs).sum(dim=-1).neg_()


def _grad_of_logits(logprobs: Tensor, target: Tensor, of_logprob: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    """[rows, V], from the gradients of logprob and entropy, [rows, 1] each."""
    grad = logprobs.exp()
    if of_entropy is not None:
        inner = (logprobs + _entropy(logprobs)[:, None]).mul_(of_entropy)
        grad.mul_(inner if of_logprob is None else inner.add_(of_logprob)).neg_()
    elif of_logprob is not None:
        grad.mul_(-of_logprob)
    return grad if of_logprob is None else grad.scatter_add_(1, target[:, None], of_logprob)
