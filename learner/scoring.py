"""Log-probabilities and entropies of chosen tokens, from hidden states, without ever forming [tokens, vocabulary]."""

from __future__ import annotations

from torch import Tensor


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
    """(logprob [M], entropy [M], in nats) of `target` under softmax((hidden weight^T + bias) / temperature).

    hidden [M, H]; weight [V, H], the output embedding, tied or not; bias [V]; target int64 [M]. The softmax is in fp32,
    in fp64 for fp64. Entropy carries gradient only with `entropy_grad`. Logits exist for `chunk_elements` // V rows at
    a time (2^22 elements on a CPU, 2^27 on a GPU, if not given) and are formed again in the backward pass, unless one
    chunk is all; so memory depends neither on M nor on V.
    """
    raise NotImplementedError
