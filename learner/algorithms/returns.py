"""Returns and advantages along chains of tokens: the tokens of one trajectory that one policy sampled, in order.

All inputs are flat tokens [N] in the order of generation; `chain` int64 [N] is each token's chain number, 0 .. K - 1. A
token's successor is the next token of its chain, which may be in a later context. Computed in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Floats = NDArray[np.float64]


def discounted_sums(values: Floats, chain: Index, *, discount: float) -> Floats:
    """y [N]: y_t = values_t + discount * y of t's successor; y_t = values_t for the last token of a chain."""
    if len(values) == 0:
        return np.zeros(0)
    order, column = _aligned(chain)
    sums = np.zeros((int(chain.max()) + 1, int(column.max()) + 1))
    row = chain[order]
    sums[row, column] = values[order]
    for at in range(1, sums.shape[1]):
        sums[:, at] += discount * sums[:, at - 1]
    result = np.empty(len(values))
    result[order] = sums[row, column]
    return result


def generalized_advantages(
    rewards: Floats, values: Floats, chain: Index, *, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """(advantages [N], returns [N]): A_t = sum_l (gamma lam)^l delta_(t + l), delta_t = r_t + gamma V_(t+1) - V_t.

    Returns are A + V, the targets of the value head. Chains end in a terminal state, whose value is 0.
    Source: Schulman et al. 2016 (GAE), equation 16.
    """
    order, _ = _aligned(chain)
    successor = np.zeros(len(values))
    follows = chain[order[1:]] == chain[order[:-1]]
    successor[order[:-1][follows]] = values[order[1:][follows]]
    advantages = discounted_sums(rewards + gamma * successor - values, chain, discount=gamma * lam)
    return advantages, advantages + values


def whitened(values: Floats, *, eps: float) -> Floats:
    """(x - mean) / (std + eps) [N], sample std (ddof 1). Fewer than two values are unchanged; equal values give 0.

    Source: Hu et al. 2025 (REINFORCE++), the global batch normalisation.
    """
    if len(values) < 2:
        return values
    if (values == values[0]).all():
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std(ddof=1) + eps)


def last_of(segment: Index, *, num_segments: int) -> Index:
    """int64 [num_segments]: the index of the last token of each segment; -1 for a segment without tokens."""
    last = np.full(num_segments, -1, dtype=np.int64)
    np.maximum.at(last, segment, np.arange(len(segment)))
    return last


def _aligned(chain: Index) -> tuple[Index, Index]:
    """(order, column), int64 [N]: token indices by chain, and for each the number of later tokens of its chain."""
    order = np.argsort(chain, kind="stable")
    ends = np.cumsum(np.bincount(chain))
    return order, (ends[chain[order]] - 1 - np.arange(len(chain))).astype(np.int64)
