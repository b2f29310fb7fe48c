"""Off-policy corrections: weights in [0, inf) computed from w = sg(pi_prox / pi_behave), without gradient.

All functions are pure and take flat trained tokens [N]. `segment` int64 [N] is the context or trajectory of each token;
None means that each token is its own scope. A token with weight 0 still counts in the loss's denominator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from protocol.algorithm_config import (
    CorrectionConfig,
    MaskOptions,
    RejectNegativeOptions,
    RejectOptions,
    SecondMomentOptions,
    TruncateOptions,
)
from protocol.config_base import Options
from protocol.extensions import ExtensionPoint

CorrectionScope = Literal["token", "context", "trajectory", "batch"]


class Correction(ABC):
    """Base class of corrections. `Options` declares their keys in an entry of `learner.loss.corrections`.

    scope   the tokens that one token's weight depends on; the option `scope`, if there is one, replaces it.
            `trajectory` and `batch` need one more forward pass per step: the tokens may be in several micro-batches,
            so pi_prox of all tokens must be computed first
    """

    Options: ClassVar[type[BaseModel]] = Options
    scope: CorrectionScope = "token"

    def __init__(self, options: Any) -> None:
        self.options = options
        self.scope = getattr(options, "scope", type(self).scope)

    @abstractmethod
    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        """The factors [N], >= 0, by which the tokens' policy losses are multiplied.

        log_weight [N] = log(pi_prox / pi_behave), without gradient; segment int64 [N]: the context or trajectory of
        each token if that is the scope, else None.
        """


class Truncate(Correction):
    """Truncated importance sampling: min(w, high)."""

    Options = TruncateOptions
    options: TruncateOptions

    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        product = self.options.ratio == "product"
        return truncated_weights(scoped_log_ratio(log_weight, segment, product=product), high=self.options.high)


class Mask(Correction):
    """Masked importance sampling (IcePop): w if it is in [low, high], else 0."""

    Options = MaskOptions
    options: MaskOptions

    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        scoped = scoped_log_ratio(log_weight, segment, product=self.options.ratio == "product")
        return masked_weights(scoped, low=self.options.low, high=self.options.high)


class Reject(Correction):
    """Weight 1 if the scope's w is in [low, high], else 0; with `ratio = "worst"`, if each of its tokens' w is."""

    Options = RejectOptions
    options: RejectOptions

    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        low, high = self.options.low, self.options.high
        if self.options.ratio == "worst":
            return without_outliers(log_weight, segment, low=low, high=high).to(log_weight.dtype)
        scoped = scoped_log_ratio(log_weight, segment, product=self.options.ratio == "product")
        return inside(scoped, low=low, high=high).to(log_weight.dtype)


class RejectNegative(Correction):
    """Weight 0 if A < 0 and the scope's mean log(pi_behave / pi_prox) is above `threshold`, else 1."""

    Options = RejectNegativeOptions
    options: RejectNegativeOptions

    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        kept = without_off_policy_negatives(log_weight, segment, advantages, threshold=self.options.threshold)
        return kept.to(log_weight.dtype)


class SecondMoment(Correction):
    """Weight 0 for the largest log(w)^2 of the batch, until the mean of the rest is <= `threshold`; else 1."""

    Options = SecondMomentOptions
    options: SecondMomentOptions
    scope = "batch"

    def __call__(self, log_weight: Tensor, *, advantages: Tensor, segment: Tensor | None) -> Tensor:
        return second_moment_mask(log_weight, threshold=self.options.threshold).to(log_weight.dtype)


CORRECTIONS = ExtensionPoint(
    key="learner.loss.corrections",
    noun="correction",
    builtins={
        "truncate": "learner.algorithms.importance_weights:Truncate",
        "mask": "learner.algorithms.importance_weights:Mask",
        "reject": "learner.algorithms.importance_weights:Reject",
        "reject_negative": "learner.algorithms.importance_weights:RejectNegative",
        "second_moment": "learner.algorithms.importance_weights:SecondMoment",
    },
    methods={"__call__": "def __call__(self, log_weight, *, advantages, segment) -> weight"},
)


def make_corrections(configs: Sequence[CorrectionConfig], *, base_dir: Path | None = None) -> tuple[Correction, ...]:
    """The corrections that `configs` name, in their order. Raises: ConfigError."""
    return tuple(
        CORRECTIONS.create(config, base_dir=base_dir, key=f"learner.loss.corrections[{i}]")
        for i, config in enumerate(configs)
    )


def needs_prepass(corrections: Sequence[Correction]) -> bool:
    """Whether a token's weight may depend on tokens of other micro-batches.

    A context is in one micro-batch; a trajectory or the batch may be in several. Then the proximal log-probs of the
    whole batch must be computed before the first weight.
    """
    return widest_scope(corrections) != "context"


def widest_scope(corrections: Sequence[Correction]) -> Literal["context", "trajectory", "batch"]:
    """The tokens that a token's weight may depend on; `context` also for corrections by token, or none."""
    scopes = {each.scope for each in corrections}
    return "batch" if "batch" in scopes else "trajectory" if "trajectory" in scopes else "context"


def correction_weights(
    proximal: Tensor,
    behavior: Tensor,
    *,
    advantages: Tensor,
    context: Tensor,
    trajectory: Tensor,
    corrections: Sequence[Correction],
) -> Tensor:
    """w~ [N]: the product of all corrections' weights; ones without corrections.

    proximal, behavior: log-probabilities [N] under the proximal and the behaviour policy; advantages [N];
    context, trajectory: int64 [N]. The tokens must include every scope completely: the whole batch if
    `needs_prepass`. Raises: ExtensionError if an imported correction raises or returns a wrong shape.
    """
    segments = {"context": context, "trajectory": trajectory}
    log_weight = (proximal - behavior).detach()
    weights = torch.ones_like(log_weight)
    for each in corrections:
        with CORRECTIONS.running(each):
            factor = each(log_weight, advantages=advantages, segment=segments.get(each.scope))
            if factor.shape != weights.shape:
                raise ValueError(f"a correction must return [{len(weights)}] weights, got {list(factor.shape)}")
        weights = weights * factor.detach()
    return weights


def scoped_log_ratio(log_ratio: Tensor, segment: Tensor | None, *, product: bool = False) -> Tensor:
    """[N]: the mean of `log_ratio` over the token's segment, which is the log of the ratios' geometric mean.

    With `product`, the sum: the log of the segment's ratio, whose variance grows with length. Without `segment`,
    `log_ratio` itself.
    Source: Zheng et al. 2025 (GSPO), equation 7, applied to pi_prox / pi_behave.
    """
    if segment is None or log_ratio.numel() == 0:
        return log_ratio
    total = _segment_sum(log_ratio, segment)
    if not product:
        total = total / torch.bincount(segment).clamp(min=1)
    return total[segment]


def truncated_weights(log_ratio: Tensor, *, high: float) -> Tensor:
    """min(w, high) [N] (truncated importance sampling): bounds the variance, adds bias.

    Source: Ionides 2008; Espeholt et al. 2018 (IMPALA), the rho of equation 1.
    """
    return log_ratio.exp().clamp(max=high)


def masked_weights(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """w if low <= w <= high, else 0 [N] (masked importance sampling).

    Source: IcePop (Ling team 2025): double-sided masking of the mismatch between training and inference.
    """
    weights = log_ratio.exp()
    return torch.where(inside(log_ratio, low=low, high=high), weights, torch.zeros_like(weights))


def inside(log_ratio: Tensor, *, low: float, high: float) -> Tensor:
    """bool [N]: whether low <= w <= high.

    Source for the ratio of a sequence (geometric or product): Liu et al. 2025 ("When speed kills stability").
    """
    ratio = log_ratio.exp()
    return (ratio >= low) & (ratio <= high)


def without_outliers(log_ratio: Tensor, segment: Tensor | None, *, low: float, high: float) -> Tensor:
    """bool [N]: whether all tokens of the token's segment have low <= w <= high.

    Source: Liu et al. 2025 ("When speed kills stability"), the veto on catastrophic tokens.
    """
    kept = inside(log_ratio, low=low, high=high)
    if segment is None or kept.numel() == 0:
        return kept
    return _segment_sum((~kept).to(log_ratio.dtype), segment)[segment] == 0


def without_off_policy_negatives(
    log_ratio: Tensor, segment: Tensor | None, advantages: Tensor, *, threshold: float
) -> Tensor:
    """bool [N]: false if A < 0 and the mean of log(pi_behave / pi_prox) over the segment is above `threshold`.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2), off-policy sequence masking, with pi_prox instead of pi_theta, so that
    the mask does not depend on the minibatch.
    """
    return ~((advantages < 0) & (-scoped_log_ratio(log_ratio, segment) > threshold))


def second_moment_mask(log_ratio: Tensor, *, threshold: float) -> Tensor:
    """bool [N]: false for the largest log(w)^2 of the batch: as few as make the mean of the rest <= `threshold`.

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


def _segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """[number of segments]: the sum of `values` [N] over each segment."""
    return values.new_zeros(int(segment.max()) + 1).index_add_(0, segment, values)
