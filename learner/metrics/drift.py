"""The drift check: compares log-probs of engines and learner in a run with learning rate 0 (`learner.check_drift`).

At learning rate 0 the weights do not change, so the mismatch KL must not increase with the step, the age of the tokens
or the context index. If it does, there is a defect: stale caches, damaged weights, or tokens that were recorded with
another version or context than the one that sampled them. The check reads metrics.jsonl, which has all steps of the
run, including those before a restart of the learner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learner.algorithms.token_metrics import NUM_BUCKETS
from learner.metrics.jsonl import read_line

FLOOR = 1e-5
"""Mismatch KL (k3 estimator) in nats per token that fp32 rounding alone can cause; with bf16 engines about 1e-3."""
FACTOR = 2.0
"""Largest allowed ratio of a mean to the first mean of its kind."""
MIN_TOKENS = 100
"""Means over fewer tokens are reported, but not checked."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean mismatch KL, in nats per token, over `num_tokens` tokens."""

    kl: float
    num_tokens: int

    @classmethod
    def of(cls, parts: Iterable[tuple[float, int]]) -> Mean:
        """Combines parts (mean, number of tokens) into one mean; 0 if there are no tokens."""
        parts = list(parts)
        total = sum(num for _, num in parts)
        return cls(sum(kl * num for kl, num in parts) / total if total else 0.0, total)


@dataclass(frozen=True, slots=True)
class Drift:
    """Mean mismatch KL of the first and the last third of the steps, and by age and by context index."""

    first: Mean
    last: Mean
    by_age: dict[int, Mean]
    by_context: dict[int, Mean]

    @classmethod
    def read(cls, metrics: Path) -> Drift:
        """Computes the means from a metrics.jsonl; of several lines of one step it uses the last."""
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
        """Whether no mean exceeds `FACTOR` times the first mean of its kind (third of steps, age, context index).

        A first mean below `FLOOR` is replaced by `FLOOR`. False if a mean is NaN.
        """
        rows = [[self.first, self.last]]
        rows += [[means[key] for key in sorted(means)] for means in (self.by_age, self.by_context)]
        for row in rows:
            checked = [mean.kl for mean in row if mean.num_tokens >= MIN_TOKENS]
            if not all(kl <= FACTOR * max(checked[0], FLOOR) for kl in checked):
                return False
        return True

    def __str__(self) -> str:
        ages, contexts = (
            ", ".join(f"{key}: {mean.kl:.1e}" for key, mean in sorted(means.items())) or "none"
            for means in (self.by_age, self.by_context)
        )
        return (
            f"mismatch KL, nats per token: {self.first.kl:.1e} in the first third of steps, {self.last.kl:.1e} in the "
            f"last; by age {ages}; by context index {contexts}"
        )


def _steps(rows: Sequence[Mapping]) -> list[tuple[float, int]]:
    """(mean over trained tokens, their number) of every step that computed a token."""
    tag = "policy/kl_behavior"
    return [(row[tag], row["learner/trained_tokens"]) for row in rows if tag in row]


def _by(rows: Sequence[Mapping], tag: str, counts: str) -> dict[int, Mean]:
    """Means by key. The metric's last bucket contains all larger keys of `counts`."""
    parts: dict[int, list[tuple[float, int]]] = {}
    for row in rows:
        num_tokens: Counter[int] = Counter()
        for key, count in row[counts].items():
            num_tokens[min(int(key), NUM_BUCKETS - 1)] += count
        for key, count in num_tokens.items():
            if f"{tag}{key}" in row:
                parts.setdefault(key, []).append((row[f"{tag}{key}"], count))
    return {key: Mean.of(parts[key]) for key in sorted(parts)}
