"""What one training step did, in numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from learner.algorithms.diagnostics import Diagnostics
from learner.batch.flatten import Batch
from learner.batch.microbatches import Plan
from protocol.types import Status, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did. Counts are of what was trained; docs/metrics.md explains each.

    `staleness_counts[a]`: trained tokens of age a = step - version; `context_counts[k]`: of the k-th contexts, from 0.
    `num_input_tokens`: tokens of the trained contexts,
    for which `num_computed_tokens` went through the model: common prefixes do once. `num_skipped_updates`: minibatches
    whose gradient was not finite. `kl_by_age[a]`, `kl_by_turn[k]`: mean mismatch KL of tokens of age a, of context k.
    `seconds` by phase: plan, proximal, reference, advantage, forward, backward, update. `mfu` in 0..1, or None where
    the device's peak is not known.
    """

    step: int
    num_groups: int
    num_trajectories: int
    num_failed_trajectories: int
    num_contexts: int
    num_tokens: int
    num_over_age_tokens: int
    num_input_tokens: int
    num_computed_tokens: int
    num_padding_tokens: int
    num_skipped_updates: int
    loss: float
    value_loss: float
    entropy: float
    clip_fraction: float
    kl_behavior: float
    kl_reference: float
    kl_by_age: dict[int, float]
    kl_by_turn: dict[int, float]
    importance_weight_mean: float
    importance_weight_max: float
    importance_zero_fraction: float
    importance_ratio_mean: float
    importance_ratio_max: float
    effective_sample_fraction: float
    advantage_mean: float
    grad_norm: float
    learning_rate: float
    staleness_counts: tuple[int, ...]
    context_counts: dict[int, int]
    seconds: dict[str, float]
    step_s: float
    mfu: float | None

    @property
    def staleness_mean(self) -> float:
        """Mean age of the trained tokens; 0 where there are none."""
        return sum(age * count for age, count in enumerate(self.staleness_counts)) / max(1, self.num_tokens)

    @property
    def staleness_max(self) -> int:
        """The age of the oldest trained token; 0 where there are none."""
        return max(0, len(self.staleness_counts) - 1)

    @property
    def tokens_per_s(self) -> float:
        """Context tokens trained on in a second of the step, shared ones counted for each context."""
        return self.num_input_tokens / self.step_s

    @property
    def unique_fraction(self) -> float:
        """Tokens that were computed for each context token; 1 where nothing is shared, or nothing was trained."""
        return self.num_computed_tokens / self.num_input_tokens if self.num_input_tokens else 1.0

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag; metrics.jsonl has the same names."""
        optional = {} if self.mfu is None else {"learner/mfu": self.mfu}
        return {
            "staleness/mean": self.staleness_mean,
            "staleness/max": self.staleness_max,
            "staleness/over_age_tokens": self.num_over_age_tokens,
            "policy/entropy": self.entropy,
            "policy/clip_fraction": self.clip_fraction,
            "policy/kl_behavior": self.kl_behavior,
            "policy/kl_reference": self.kl_reference,
            **{f"policy/kl_behavior_age_{age}": kl for age, kl in self.kl_by_age.items()},
            **{f"policy/kl_behavior_context_{number}": kl for number, kl in self.kl_by_turn.items()},
            "policy/importance_weight_mean": self.importance_weight_mean,
            "policy/importance_weight_max": self.importance_weight_max,
            "policy/importance_zero_fraction": self.importance_zero_fraction,
            "policy/importance_ratio_mean": self.importance_ratio_mean,
            "policy/importance_ratio_max": self.importance_ratio_max,
            "policy/effective_sample_fraction": self.effective_sample_fraction,
            "learner/loss": self.loss,
            "learner/value_loss": self.value_loss,
            "learner/advantage_mean": self.advantage_mean,
            "learner/grad_norm": self.grad_norm,
            "learner/learning_rate": self.learning_rate,
            "learner/skipped_updates": self.num_skipped_updates,
            "learner/step_s": self.step_s,
            **{f"learner/{phase}_s": seconds for phase, seconds in self.seconds.items()},
            "learner/tokens_per_s": self.tokens_per_s,
            "learner/unique_fraction": self.unique_fraction,
            "learner/padding_fraction": self.num_padding_tokens / max(1, self.num_computed_tokens),
            "learner/trained_tokens": self.num_tokens,
            "learner/trained_contexts": self.num_contexts,
            "learner/trained_trajectories": self.num_trajectories,
            **optional,
        }


class Clock:
    """Seconds by phase; each lap belongs to the phase that it names, and waits for what the device still does of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return self._last - self._start


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computed, over all ranks: tokens of one forward of the batch, and floating-point operations.

    `num_padding_tokens`: those of them that belong to no context, where a rank has less work than others.
    `peak_flops` a second, of all devices; None where it is not known.
    """

    num_computed_tokens: int
    num_padding_tokens: int
    flops: float
    peak_flops: float | None


def summarise(
    groups: Sequence[TrajectoryGroup],
    batch: Batch,
    plan: Plan,
    watched: Diagnostics,
    work: Work,
    *,
    norms: Sequence[float],
    advantage_mean: float,
    step: int,
    rate: float,
    num_skipped: int,
    clock: Clock,
) -> StepMetrics:
    """The metrics of a step; `watched` over all ranks, `norms` are gradient norms by minibatch."""
    trained, sampled = plan.trained, batch.sampled
    lengths = np.zeros(batch.num_contexts, dtype=np.int64)
    np.maximum.at(lengths, sampled.context[trained], sampled.position[trained])
    statuses = [trajectory.status for group in groups for trajectory in group.trajectories]
    mfu = work.flops / clock.total_s / work.peak_flops if work.peak_flops else None
    return StepMetrics(
        step=step,
        num_groups=len(groups),
        num_trajectories=len(np.unique(sampled.trajectory[trained])),
        num_failed_trajectories=statuses.count(Status.FAILED),
        num_contexts=int(np.count_nonzero(lengths)),
        num_tokens=watched.num_tokens,
        num_over_age_tokens=plan.num_over_age,
        num_input_tokens=int(lengths.sum()),
        num_computed_tokens=work.num_computed_tokens,
        num_padding_tokens=work.num_padding_tokens,
        num_skipped_updates=num_skipped,
        loss=watched.loss,
        value_loss=watched.mean(watched.value_loss),
        entropy=watched.mean(watched.entropy),
        clip_fraction=watched.mean(watched.clipped),
        kl_behavior=watched.mean(watched.kl_behavior),
        kl_reference=watched.mean(watched.kl_reference),
        kl_by_age=_means(watched.kl_by_age, watched.tokens_by_age),
        kl_by_turn=_means(watched.kl_by_turn, watched.tokens_by_turn),
        importance_weight_mean=watched.mean(watched.importance_weight),
        importance_weight_max=watched.importance_weight_max,
        importance_zero_fraction=watched.mean(watched.weight_zeroed),
        importance_ratio_mean=watched.mean(watched.ratio),
        importance_ratio_max=watched.ratio_max,
        effective_sample_fraction=watched.effective_sample_fraction,
        advantage_mean=advantage_mean,
        grad_norm=float(np.mean(norms)) if norms else 0.0,
        learning_rate=rate,
        staleness_counts=tuple(np.bincount(step - sampled.version[trained]).tolist()),
        context_counts={int(k): int(watched.tokens_by_turn[k]) for k in np.flatnonzero(watched.tokens_by_turn)},
        seconds=dict(clock.seconds),
        step_s=clock.total_s,
        mfu=mfu,
    )


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> dict[int, float]:
    return {int(bucket): float(sums[bucket] / counts[bucket]) for bucket in np.flatnonzero(counts)}
