"""Sums over trained tokens of what is watched beside the loss: they add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_BUCKETS = 16
"""Ages and turns from 0; the last bucket holds all that are larger."""


def _buckets() -> NDArray[np.float64]:
    return np.zeros(NUM_BUCKETS)


@dataclass(frozen=True, slots=True, eq=False)
class Diagnostics:
    """Add two of them with `+`; reduce over ranks with `to_tensors` and `from_tensors`.

    Sums over trained tokens, except the total `loss`, `importance_weight_max` and `ratio_max`. `ratio` is w = pi_prox /
    pi_behave, `importance_weight` what corrections make of it, `weight_zeroed` counts the tokens that one dropped.
    `kl_behavior` estimates KL(pi_behave || pi_theta) by k3; `*_by_age`, `*_by_turn` float64 [NUM_BUCKETS] split it, and
    the tokens, by the age of the token and the index of its context.
    """

    num_tokens: int = 0
    loss: float = 0.0
    clipped: float = 0.0
    kl_behavior: float = 0.0
    kl_reference: float = 0.0
    importance_weight: float = 0.0
    weight_zeroed: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    entropy: float = 0.0
    value_loss: float = 0.0
    tokens_by_age: NDArray[np.float64] = field(default_factory=_buckets)
    kl_by_age: NDArray[np.float64] = field(default_factory=_buckets)
    tokens_by_turn: NDArray[np.float64] = field(default_factory=_buckets)
    kl_by_turn: NDArray[np.float64] = field(default_factory=_buckets)
    importance_weight_max: float = 0.0
    ratio_max: float = 0.0

    def __add__(self, other: Diagnostics) -> Diagnostics:
        (sums, maxima), (other_sums, other_maxima) = self.to_tensors(), other.to_tensors()
        return Diagnostics.from_tensors(sums + other_sums, torch.maximum(maxima, other_maxima))

    def to_tensors(self) -> tuple[Tensor, Tensor]:
        """(sums float64 [S], maxima float64 [2]) on the CPU: to be reduced over ranks by SUM and by MAX."""
        values = [np.atleast_1d(getattr(self, each.name)) for each in fields(self)]
        flat = torch.from_numpy(np.concatenate(values, dtype=np.float64))
        return flat[:-2], flat[-2:]

    @classmethod
    def from_tensors(cls, sums: Tensor, maxima: Tensor) -> Diagnostics:
        """What `to_tensors` gave, after any reduction."""
        num_scalars = len(sums) - 4 * NUM_BUCKETS
        num_tokens, *scalars = sums[:num_scalars].tolist()
        histograms = sums[num_scalars:].cpu().numpy().reshape(4, NUM_BUCKETS)
        return cls(int(num_tokens), *scalars, *histograms, *maxima.tolist())

    def mean(self, total: float) -> float:
        """`total` for each trained token; 0 where none was trained."""
        return total / self.num_tokens if self.num_tokens else 0.0

    @property
    def effective_sample_fraction(self) -> float:
        """(sum w)^2 / (N sum w^2), in 0..1: the effective sample size by token (Kish 1965); 0 where there is none.

        Of w = pi_prox / pi_behave itself: what corrections make of it would hide what they are there for.
        """
        squares = self.num_tokens * self.ratio_squared
        return self.ratio**2 / squares if squares else 0.0


@torch.no_grad()
def diagnose(
    *,
    loss: Tensor,
    clipped: Tensor,
    kl_behavior: Tensor,
    kl_reference: Tensor | None,
    importance: Tensor,
    ratio: Tensor,
    entropy: Tensor,
    value_loss: Tensor | None,
    age: Tensor,
    turn: Tensor,
) -> Diagnostics:
    """The sums of one micro-batch of N trained tokens, with one transfer to the CPU. loss []; the others [N]."""
    if clipped.numel() == 0:
        return Diagnostics()
    nothing = loss.new_zeros(())
    sums = (
        torch.ones_like(clipped).sum(),
        loss,
        clipped.sum(),
        kl_behavior.sum(),
        nothing if kl_reference is None else kl_reference.sum(),
        importance.sum(),
        (importance == 0).sum(),
        ratio.sum(),
        ratio.square().sum(),
        entropy.sum(),
        nothing if value_loss is None else value_loss.sum(),
    )
    parts = [torch.stack([each.double() for each in sums])]
    for bucket in (age, turn):
        bucket = bucket.clamp(0, NUM_BUCKETS - 1)
        parts.append(torch.bincount(bucket, minlength=NUM_BUCKETS).double())
        parts.append(torch.bincount(bucket, weights=kl_behavior.double(), minlength=NUM_BUCKETS))
    maxima = torch.stack([importance.max(), ratio.max()]).double()
    sums_and_maxima = torch.cat([*parts, maxima]).cpu()
    return Diagnostics.from_tensors(sums_and_maxima[:-2], sums_and_maxima[-2:])
