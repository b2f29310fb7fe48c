"""What is done about tokens that an older policy sampled: w = sg(pi_prox / pi_behave), truncated or masked.

Each function is pure, over flat tokens [N]; `segment` int64 [N] names the scope (context, trajectory) of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.config import CorrectionConfig


def scoped_log_ratio(log_ratio: Tensor, segment: Tensor | None, *, product: bool = False) -> Tensor:
    """[N]: the mean of `log_ratio` over each segment, the log of the geometric mean of its ratios; None is token scope.

    With `product` the sum, the log of the whole sequence's ratio, whose variance grows with its length.
    Source: Zheng et al. 2025 (GSPO), equation 7, applied to pi_prox / pi_behave.
    """
    if segment is None or log_ratio.numel() == 0:
        return log_ratio
    num_segments = int(segment.max()) + 1
    total = log_ratio.new_zeros(num_segments).index_add_(0, segment, log_ratio)
    if not product:
        total = total / torch.bincount(segment, minlength=num_segments).clamp(min=1)
    return total[segment]


def truncated_weights(log_ratio: Tensor, *, high: float) -> Tensor:
    """min(w, high) [N]: bounded variance for some bias (truncated importance sampling).

    Source: Ionides 2008; Espeholt et al. 2018 (IMPALA), the rho of equation 1.
    """
    return log_ratio.exp().clamp(max=high)


def masked_weights(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """w where low <= w <= high, else 0 [N]; the denominator of the loss does not change with it.

    Source: IcePop (Ling team 2025): double-sided masking of the mismatch between training and inference.
    """
    weights = log_ratio.exp()
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def importance_weights(
    proximal: Tensor, behavior: Tensor, segment: Tensor | None, *, config: CorrectionConfig
) -> Tensor:
    """w~ [N], without gradient, from log-probabilities [N] under the proximal and the behaviour policy.

    `segment` must be that of `config.scope` (None for `token`), and hold whole scopes. `none` gives ones: plain PPO.
    """
    if config.kind == "none":
        return torch.ones_like(proximal)
    log_ratio = scoped_log_ratio((proximal - behavior).detach(), segment)
    if config.kind == "truncate":
        return truncated_weights(log_ratio, high=config.high)
    return masked_weights(log_ratio, low=config.low, high=config.high)
