"""Samples tokens from logits for a whole batch, and returns their log-probs.

A token is sampled by inverting the cumulative distribution at one uniform number per (seed, position). So the tokens of
a sequence depend on its own seed and logits only, not on the other sequences of the batch. (The last bits of the logits
depend on the shape of the batch; a sampled token changes only if the uniform number falls within that difference.)

Log-probs are of the temperature-scaled distribution over the whole vocabulary: `top_p`, `top_k` and `min_new_tokens`
restrict which tokens can be sampled and do not renormalise it, as in SGLang. The log-probs of greedy tokens
(temperature 0) are at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from actor.engine.sequence import Sequence

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns uniform numbers in [0, 1), one per (seed, position): float64 [N].

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) is applied to the seed, and again to the sum with the
    position, so that consecutive seeds give unrelated streams.
    """
    mixed = _splitmix64(_splitmix64(seeds) + positions)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> tuple[list[int], list[float]]:
    """Returns the next token of each sequence and its log-prob. `logits`: float [N, V], row i for `sequences[i]`.

    If the logits of a row are not finite, its log-prob is nan and its token is meaningless.
    """
    params = [sequence.sampling for sequence in sequences]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    logprobs = logits.float() / temperatures[:, None]
    # log_softmax adds the V terms of a row one by one on a CPU: errors of 3e-5 with V = 49,152.
    logprobs -= logprobs.logsumexp(dim=-1, keepdim=True)
    probs = _restrict(logprobs.exp(), sequences)

    seeds = np.array([p.seed for p in params], dtype=np.uint64)
    positions = np.array([len(sequence.output_ids) for sequence in sequences], dtype=np.uint64)
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    targets = torch.from_numpy(uniforms(seeds, positions))[:, None] * cdf[:, -1:]
    # The first token whose cumulative probability exceeds the target: its own probability is > 0.
    token_ids = torch.searchsorted(cdf, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    if any(p.greedy for p in params):
        greedy = torch.tensor([p.greedy for p in params])[:, None]
        token_ids = torch.where(greedy, probs.argmax(dim=-1, keepdim=True), token_ids)
    chosen = logprobs.gather(-1, token_ids)
    return token_ids[:, 0].tolist(), chosen[:, 0].tolist()


def _restrict(probs: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sets to 0, in place, the probabilities of tokens that `min_new_tokens`, `top_k` or `top_p` forbid: [N, V]."""
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if len(sequence.output_ids) < params.min_new_tokens and params.stop_token_ids:
            forbidden = [token for token in params.stop_token_ids if 0 <= token < probs.shape[-1]]
            probs[row, forbidden] = 0.0
    limited = [row for row, s in enumerate(sequences) if s.sampling.top_p < 1.0 or s.sampling.top_k is not None]
    if not limited:
        return probs
    vocab_size = probs.shape[-1]
    top_p = torch.tensor([sequences[row].sampling.top_p for row in limited])
    top_k = torch.tensor([sequences[row].sampling.top_k or vocab_size for row in limited])
    ordered, order = probs[limited].sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    kept = (mass_before <= top_p[:, None] * ordered.sum(-1, keepdim=True)) & (torch.arange(vocab_size) < top_k[:, None])
    probs[limited] = torch.zeros_like(ordered).scatter_(-1, order, ordered * kept)
    return probs
