"""The token loss of DESIGN.md: -w~ min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), and what is watched beside it.

Everything is over flat trained tokens [N]; sums, never means, so that micro-batches add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, proximal: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(loss [N], clipped bool [N]): -min(r A, clip(r) A) with r = pi_theta / pi_prox, and where the clip is binding.

    Source: Schulman et al. 2017 (PPO), equation 7; decoupled from the behaviour policy: Hilton et al. 2022, equation 5;
    asymmetric bounds: Yu et al. 2025 (DAPO), equation 10.
    """
    ratio = (logprobs - proximal).exp()
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(free, bounded), bounded < free


def approx_kl(logprobs: Tensor, other: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """[N]: per-token estimates of KL(p || q) from tokens sampled by p (`logprobs`), q being `other`.

    k1 = log p - log q (unbiased); k2 = k1^2 / 2 (biased, never negative); k3 = q/p - 1 - log q/p (both virtues).
    Source: Schulman 2020, "Approximating KL divergence".
    """
    log_ratio = other - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - 1 - log_ratio


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Sums over trained tokens of what is watched; add two of them with `+`. Means are per trained token."""

    num_tokens: int = 0
    loss: float = 0.0
    clipped: float = 0.0
    kl_behavior: float = 0.0
    importance_weight: float = 0.0
    importance_weight_max: float = 0.0
    weight_zeroed: float = 0.0
    entropy: float = 0.0

    def __add__(self, other: Diagnostics) -> Diagnostics:
        return Diagnostics(
            num_tokens=self.num_tokens + other.num_tokens,
            loss=self.loss + other.loss,
            clipped=self.clipped + other.clipped,
            kl_behavior=self.kl_behavior + other.kl_behavior,
            importance_weight=self.importance_weight + other.importance_weight,
            importance_weight_max=max(self.importance_weight_max, other.importance_weight_max),
            weight_zeroed=self.weight_zeroed + other.weight_zeroed,
            entropy=self.entropy + other.entropy,
        )

    def mean(self, total: float) -> float:
        """`total` for each trained token; 0 where none was trained."""
        return total / self.num_tokens if self.num_tokens else 0.0


def policy_loss(
    *,
    logprobs: Tensor,
    proximal: Tensor,
    behavior: Tensor,
    importance: Tensor,
    advantages: Tensor,
    weight: Tensor,
    entropy: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Diagnostics]:
    """(loss [], diagnostics) of N >= 0 trained tokens; only `logprobs` carries gradient. All arguments are [N].

    loss = sum_t weight_t importance_t * clipped surrogate_t. `kl_behavior` estimates KL(pi_behave || pi_theta) by k3.
    """
    surrogate, clipped = clipped_surrogate(logprobs, proximal, advantages, clip_low=clip_low, clip_high=clip_high)
    loss = (weight * importance * surrogate).sum()
    if logprobs.numel() == 0:
        return loss, Diagnostics()
    with torch.no_grad():
        watched = (
            loss,
            clipped.sum(),
            approx_kl(behavior, logprobs).sum(),
            importance.sum(),
            importance.max(),
            (importance == 0).sum(),
            entropy.sum(),
        )
        values = torch.stack([value.double() for value in watched]).tolist()
    return loss, Diagnostics(logprobs.numel(), *values)
