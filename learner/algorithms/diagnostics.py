"""Sums and maxima over computed tokens, from which `TOKEN_METRICS` are computed; additive over micro-batches and ranks.

TokenTerms of a micro-batch ─► diagnose ─► Diagnostics ─► + over micro-batches ─► reduced over ranks ─► values by tag
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.algorithms.token_metrics import NUM_BUCKETS, TOKEN_METRICS, Reduction, TokenTerms

_NUM_SUMS = {
    Reduction.TOTAL: 1,
    Reduction.MEAN: 1,
    Reduction.MAX: 0,
    Reduction.MEAN_BY_AGE: NUM_BUCKETS,
    Reduction.MEAN_BY_CONTEXT_INDEX: NUM_BUCKETS,
    Reduction.EFFECTIVE_FRACTION: 2,
}
_NUM_COUNTS = 2 * NUM_BUCKETS
# TOKEN_METRICS[i] has sums[_ENDS[i] : _ENDS[i + 1]]; before them are the token counts by age and by context index.
_ENDS = np.cumsum([_NUM_COUNTS, *(_NUM_SUMS[metric.reduction] for metric in TOKEN_METRICS)]).tolist()
_NUM_MAXIMA = sum(metric.reduction is Reduction.MAX for metric in TOKEN_METRICS)


def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Diagnostics:
    """Sums and maxima of zero or more computed tokens. `+` adds two; `to_tensors` is for reduction over ranks.

    sums     float64 [S] on the CPU: number of tokens by age [NUM_BUCKETS] and by context index [NUM_BUCKETS], then the
             sums of each of `TOKEN_METRICS`
    maxima   float64 [M] on the CPU: one for each metric with `Reduction.MAX`; 0 without tokens
    """

    sums: Tensor = field(default_factory=lambda: _zeros(_ENDS[-1]))
    maxima: Tensor = field(default_factory=lambda: _zeros(_NUM_MAXIMA))

    def __add__(self, other: Diagnostics) -> Diagnostics:
        return Diagnostics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def to_tensors(self) -> tuple[Tensor, Tensor]:
        """Copies of (sums, maxima), to be reduced over ranks by SUM and by MAX."""
        return self.sums.clone(), self.maxima.clone()

    @classmethod
    def from_tensors(cls, sums: Tensor, maxima: Tensor) -> Diagnostics:
        """The inverse of `to_tensors`; the tensors may be on any device."""
        return cls(sums.cpu(), maxima.cpu())

    @property
    def tokens_by_age(self) -> NDArray[np.float64]:
        """float64 [NUM_BUCKETS]: number of computed tokens of each age; the last bucket holds all older ones."""
        return self.sums[:NUM_BUCKETS].numpy()

    @property
    def tokens_by_context_index(self) -> NDArray[np.float64]:
        """float64 [NUM_BUCKETS]: number of computed tokens at each context index; the last holds all later ones."""
        return self.sums[NUM_BUCKETS:_NUM_COUNTS].numpy()

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_by_age.sum())

    @property
    def loss(self) -> float:
        return self.values()["learner/loss"]

    def values(self) -> dict[str, float]:
        """The value of each token metric by tag: without tokens only sums, of a family the buckets with tokens."""
        found: dict[str, float] = {}
        maxima = iter(self.maxima.tolist())
        for metric, start, end in zip(TOKEN_METRICS, _ENDS[:-1], _ENDS[1:], strict=True):
            sums = self.sums[start:end].tolist()
            match metric.reduction:
                case Reduction.TOTAL:
                    found[metric.name] = sums[0]
                case _ if not self.num_tokens:
                    continue
                case Reduction.MEAN:
                    found[metric.name] = sums[0] / self.num_tokens
                case Reduction.MAX:
                    found[metric.name] = next(maxima)
                case Reduction.EFFECTIVE_FRACTION:
                    found[metric.name] = _fraction(sums[0] ** 2, self.num_tokens * sums[1])
                case Reduction.MEAN_BY_AGE:
                    found |= {metric.member(age): mean for age, mean in _means(sums, self.tokens_by_age)}
                case Reduction.MEAN_BY_CONTEXT_INDEX:
                    found |= {metric.member(k): mean for k, mean in _means(sums, self.tokens_by_context_index)}
        return found


@torch.no_grad()
def diagnose(terms: TokenTerms) -> Diagnostics:
    """The sums and maxima of one micro-batch of N computed tokens, with one transfer to the CPU."""
    if terms.tokens.age.numel() == 0:
        return Diagnostics()
    age, context_index = (each.clamp(0, NUM_BUCKETS - 1) for each in (terms.tokens.age, terms.tokens.context_index))
    sums = [torch.bincount(bucket, minlength=NUM_BUCKETS) for bucket in (age, context_index)]
    maxima: list[Tensor] = []
    for metric in TOKEN_METRICS:
        values = metric.values(terms)
        if values is None:
            values = torch.zeros_like(terms.kl_behavior)
        match metric.reduction:
            case Reduction.TOTAL | Reduction.MEAN:
                sums.append(values.sum().reshape(1))
            case Reduction.MAX:
                maxima.append(values.max().reshape(1))
            case Reduction.EFFECTIVE_FRACTION:
                sums.append(torch.stack([values.sum(), values.square().sum()]))
            case Reduction.MEAN_BY_AGE:
                sums.append(torch.bincount(age, weights=values.double(), minlength=NUM_BUCKETS))
            case Reduction.MEAN_BY_CONTEXT_INDEX:
                sums.append(torch.bincount(context_index, weights=values.double(), minlength=NUM_BUCKETS))
    sums_and_maxima = torch.cat([each.double() for each in (*sums, *maxima)]).cpu()
    return Diagnostics.from_tensors(sums_and_maxima[: _ENDS[-1]], sums_and_maxima[_ENDS[-1] :])


def _fraction(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _means(sums: list[float], counts: NDArray[np.float64]) -> list[tuple[int, float]]:
    """(bucket, mean) of every bucket that has tokens."""
    return [(int(bucket), float(sums[bucket] / counts[bucket])) for bucket in np.flatnonzero(counts)]
