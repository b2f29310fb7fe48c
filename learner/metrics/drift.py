"""Whether engines and learner agree: at a learning rate of 0 nothing moves, so the mismatch between them must be flat.

What grows all the same is a defect: stale caches, weights that were brought wrongly, tokens recorded under another
version or another context than they were sampled in. Judged from the run's metrics.jsonl, so that a learner that was
killed and came back is judged on all of its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.metrics.jsonl import read_line

FLOOR = 1e-5
"""Nats a token, of k3: below it is rounding, of log-probs in fp32 on both sides (bf16 engines are near 1e-3)."""
FACTOR = 2.0
MIN_TOKENS = 100
"""Means over fewer tokens are reported, and judge nothing."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Of the mismatch KL over some tokens."""

    kl: float
    num_tokens: int

    @classmethod
    def of(cls, parts: Iterable[tuple[float, int]]) -> Mean:
        """From (mean, number of tokens) of each part; 0 over none."""
        parts = list(parts)
        total = sum(num for _, num in parts)
        return cls(sum(kl * num for kl, num in parts) / total if total else 0.0, total)


@dataclass(frozen=True, slots=True)
class Drift:
    """Mean mismatch KL in nats a token: of the first and the last third of the steps, by age, by context number."""

    first: Mean
    last: Mean
    by_age: dict[int, Mean]
    by_context: dict[int, Mean]

    @classmethod
    def read(cls, metrics: Path) -> Drift:
        """From the lines of metrics.jsonl, the last one of each step."""
        lines = map(read_line, metrics.read_bytes().splitlines())
        rows = list({line["step"]: line for line in lines if line is not None}.values())
        third = max(1, len(rows) // 3)
        return cls(
            Mean.of(_steps(rows[:third])),
            Mean.of(_steps(rows[-third:])),
            _by(rows, "policy/kl_behavior_age_", "tokens_by_age"),
            _by(rows, "policy/kl_behavior_context_", "tokens_by_context"),
        )

    @property
    def is_flat(self) -> bool:
        """Neither time, nor age, nor the number of the context raises the mismatch above twice that of the first."""
        rows = [[self.first, self.last]]
        rows += [[means[key] for key in sorted(means)] for means in (self.by_age, self.by_context)]
        for row in rows:
            judged = [mean.kl for mean in row if mean.num_tokens >= MIN_TOKENS]
            if not all(kl <= FACTOR * max(judged[0], FLOOR) for kl in judged):  # NaN is not flat
                return False
        return True

    def __str__(self) -> str:
        ages, contexts = (
            ", ".join(f"{key}: {mean.kl:.1e}" for key, mean in sorted(means.items())) or "none"
            for means in (self.by_age, self.by_context)
        )
        return (
            f"mismatch KL, nats a token: {self.first.kl:.1e} in the first third of steps, {self.last.kl:.1e} in the "
            f"last; by age {ages}; by context {contexts}"
        )


def _steps(rows: Sequence[Mapping]) -> list[tuple[float, int]]:
    return [(row["policy/kl_behavior"], row["learner/trained_tokens"]) for row in rows]


def _by(rows: Sequence[Mapping], tag: str, counts: str) -> dict[int, Mean]:
    keys = sorted({int(key) for row in rows for key in row[counts]})
    return {
        key: Mean.of((row[f"{tag}{key}"], row[counts][str(key)]) for row in rows if str(key) in row[counts])
        for key in keys
    }
