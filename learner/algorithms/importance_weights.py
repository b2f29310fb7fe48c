"""What is done about tokens that an older policy sampled: weights from w = sg(pi_prox / pi_behave), in [0, inf).

Each function is pure, over flat trained tokens [N], without gradient; `segment` int64 [N] names the scope (context,
trajectory) of each token, None is token scope. A token that a mask drops keeps its part of the loss's denominator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.algorithm_config import (
    Correction,
    MaskConfig,
    RejectConfig,
    RejectNegativeConfig,
    SecondMomentConfig,
    TruncateConfig,
)


def scoped_log_ratio(log_ratio: Tensor, segment: Tensor | None, *, product: bool = False) -> Tensor:
    """[N]: the mean of `log_ratio` over each segment, the log of the geometric mean of its ratios.

    With `product` the sum, the log of the whole sequence's ratio, whose variance grows with its length.
    Source: Zheng et al. 2025 (GSPO), equation 7, applied to pi_prox / pi_behave.
    """
    if segment is None or log_ratio.numel() == 0:
        return log_ratio
    total = _segment_sum(log_ratio, segment)
    if not product:
        total = total / torch.bincount(segment).clamp(min=1)
    return total[segment]


def truncated_weights(log_ratio: Tensor, *, high: float) -> Tensor:
    """min(w, high) [N]: bounded variance for some bias (truncated importance sampling).

    Source: Ionides 2008; Espeholt et al. 2018 (IMPALA), the rho of equation 1.
    """
    return log_ratio.exp().clamp(max=high)


def masked_weights(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """w where low <= w <= high, else 0 [N] (masked importance sampling).

    Source: IcePop (Ling team 2025): double-sided masking of the mismatch between training and inference.
    """
    weights = log_ratio.exp()
    return torch.where(inside(log_ratio, low=low, high=high), weights, torch.zeros_like(weights))


def inside(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """bool [N]: low <= w <= high. Over a sequence's ratio: the sequence masks of Liu et al. 2025 ("When speed kills
    stability"), geometric or product."""
    ratio = log_ratio.exp()
    return (ratio >= low) & (ratio <= high)


def without_outliers(log_ratio: Tensor, segment: Tensor | None, *, low: float, high: float) -> Tensor:
    """bool [N]: whether every token of its segment has low <= w <= high: a scope is judged by its worst token.

    Source: Liu et al. 2025 ("When speed kills stability"), the veto on catastrophic tokens.
    """
    kept = inside(log_ratio, low=low, high=high)
    if segment is None or kept.numel() == 0:
        return kept
    return _segment_sum((~kept).to(log_ratio.dtype), segment)[segment] == 0


def negative_on_policy(log_ratio: Tensor, segment: Tensor | None, advantages: Tensor, *, threshold: float) -> Tensor:
    """bool [N]: false where A < 0 and the mean of log(pi_behave / pi_prox) over the segment is above `threshold`.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), off-policy sequence masking; pi_prox stands for pi_theta, so that what is
    dropped does not depend on the minibatch.
    """
    return ~((advantages < 0) & (-scoped_log_ratio(log_ratio, segment) > threshold))


def second_moment_mask(log_ratio: Tensor, *, threshold: float) -> Tensor:
    """bool [N]: drops the largest log(w)^2 of the batch until the mean of the rest is <= `threshold`.

    Equal values are kept or dropped together, so that the order of tokens does not matter.
    Source: Zheng et al. 2025 (M2PO, arXiv 2510.01161), the mask on the second moment of the log-ratio.
    """
    squares = log_ratio.double().square()
    ascending = squares.sort().values
    counts = torch.arange(1, len(squares) + 1, dtype=torch.float64, device=squares.device)
    num_kept = int((ascending.cumsum(0) / counts <= threshold).sum())
    if num_kept == len(squares):
        return torch.ones_like(squares, dtype=torch.bool)
    return squares < ascending[num_kept]


def needs_prepass(corrections: Sequence[Correction]) -> bool:
    """Whether the weights of a token depend on tokens that may lie in other micro-batches.

    A context always lies in one micro-batch; a trajectory and the batch do not, so that the proximal log-probs of the
    whole batch must be known before the first weight is.
    """
    return any(isinstance(each, SecondMomentConfig) or each.scope == "trajectory" for each in corrections)


def correction_weights(
    proximal: Tensor,
    behavior: Tensor,
    *,
    advantages: Tensor,
    context: Tensor,
    trajectory: Tensor,
    corrections: Sequence[Correction],
) -> Tensor:
    """w~ [N]: the product of the weights of all corrections, each over all given tokens; ones where there are none.

    proximal, behavior: log-probabilities [N] under the proximal and the behaviour policy; advantages [N];
    context, trajectory: int64 [N]. The tokens must hold whole scopes: the whole batch where `needs_prepass`.
    """
    segments = {"token": None, "context": context, "trajectory": trajectory}
    log_ratio = (proximal - behavior).detach()
    weights = torch.ones_like(log_ratio)
    for each in corrections:
        segment = None if isinstance(each, SecondMomentConfig) else segments[each.scope]
        weights = weights * _weights(log_ratio, segment, advantages, each)
    return weights


def _weights(log_ratio: Tensor, segment: Tensor | None, advantages: Tensor, correction: Correction) -> Tensor:
    match correction:
        case TruncateConfig(ratio=ratio, high=high):
            return truncated_weights(scoped_log_ratio(log_ratio, segment, product=ratio == "product"), high=high)
        case MaskConfig(ratio=ratio, low=low, high=high):
            scoped = scoped_log_ratio(log_ratio, segment, product=ratio == "product")
            return masked_weights(scoped, low=low, high=high)
        case RejectConfig(ratio="worst", low=low, high=high):
            return without_outliers(log_ratio, segment, low=low, high=high).to(log_ratio.dtype)
        case RejectConfig(ratio=ratio, low=low, high=high):
            scoped = scoped_log_ratio(log_ratio, segment, product=ratio == "product")
            return inside(scoped, low=low, high=high).to(log_ratio.dtype)
        case RejectNegativeConfig(threshold=threshold):
            return negative_on_policy(log_ratio, segment, advantages, threshold=threshold).to(log_ratio.dtype)
        case SecondMomentConfig(threshold=threshold):
            return second_moment_mask(log_ratio, threshold=threshold).to(log_ratio.dtype)


def _segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """[number of segments]: the sum of `values` [N] over each."""
    return values.new_zeros(int(segment.max()) + 1).index_add_(0, segment, values)
