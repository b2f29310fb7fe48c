"""Whether engines and learner agree: at a learning rate of 0 nothing moves, so the mismatch between them must be flat.

What grows all the same is a defect: stale caches, weights that were brought wrongly, tokens recorded under another
version or another context than they were sampled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.step_metrics import StepMetrics

FLOOR = 1e-5
"""Nats a token, of k3: below it is rounding, of log-probs in fp32 on both sides (bf16 engines are near 1e-3)."""
FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Drift:
    """Mean mismatch KL in nats a token: of the first and the last third of the steps, by age, by context number."""

    first: float
    last: float
    by_age: dict[int, float]
    by_turn: dict[int, float]

    @classmethod
    def of(cls, steps: Sequence[StepMetrics]) -> Drift:
        """From at least one step; a third has at least one."""
        kl = np.array([step.kl_behavior for step in steps])
        third = max(1, len(steps) // 3)
        return cls(
            float(kl[:third].mean()),
            float(kl[-third:].mean()),
            _mean([step.kl_by_age for step in steps]),
            _mean([step.kl_by_turn for step in steps]),
        )

    @property
    def is_flat(self) -> bool:
        """Neither time, nor age, nor the number of the context raises the mismatch above twice that of the others."""
        pairs = [(self.first, self.last)]
        for means in (self.by_age, self.by_turn):
            pairs += [(means[min(means)], value) for value in means.values()] if means else []
        return all(later <= FACTOR * max(earlier, FLOOR) for earlier, later in pairs)

    def __str__(self) -> str:
        ages = ", ".join(f"{age}: {kl:.1e}" for age, kl in sorted(self.by_age.items()))
        turns = ", ".join(f"{turn}: {kl:.1e}" for turn, kl in sorted(self.by_turn.items()))
        return (
            f"mismatch KL, nats a token: {self.first:.1e} in the first third of steps, {self.last:.1e} in the last; "
            f"by age {ages or 'none'}; by context {turns or 'none'}"
        )


def _mean(rows: Sequence[dict[int, float]]) -> dict[int, float]:
    keys = sorted({key for row in rows for key in row})
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}
