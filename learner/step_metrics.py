"""What one training step did, in numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.batching import Minibatch
from learner.loss import Diagnostics
from protocol.types import Status, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did. Counts are of what was trained; docs/metrics.md explains each.

    `staleness_counts[a]`: trained tokens of age a = step - version. `num_input_tokens`: context tokens that went
    through the model, without padding. `num_skipped_updates`: minibatches whose gradient was not finite.
    """

    step: int
    num_groups: int
    num_trajectories: int
    num_failed_trajectories: int
    num_contexts: int
    num_tokens: int
    num_over_age_tokens: int
    num_input_tokens: int
    padding_fraction: float
    num_skipped_updates: int
    loss: float
    entropy: float
    clip_fraction: float
    kl_behavior: float
    importance_weight_mean: float
    importance_weight_max: float
    importance_zero_fraction: float
    grad_norm: float
    learning_rate: float
    staleness_counts: tuple[int, ...]
    prepare_s: float
    proximal_s: float
    forward_s: float
    backward_s: float
    update_s: float
    step_s: float

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
        """Context tokens trained on in a second of the step."""
        return self.num_input_tokens / self.step_s


class Clock:
    """Seconds by phase; each lap belongs to the phase that it names."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        return self._last - self._start


def summarise(
    groups: Sequence[TrajectoryGroup],
    minibatches: Sequence[Minibatch],
    watched: Diagnostics,
    norms: Sequence[float],
    *,
    step: int,
    rate: float,
    num_skipped: int,
    clock: Clock,
) -> StepMetrics:
    """The metrics of a step from what its minibatches saw; `norms` are gradient norms by minibatch."""
    micro_batches = [micro_batch for minibatch in minibatches for micro_batch in minibatch.micro_batches]
    num_input_tokens = sum(micro_batch.num_input_tokens for micro_batch in micro_batches)
    num_padded = sum(micro_batch.token_ids.size for micro_batch in micro_batches)
    ages = np.concatenate([step - m.tokens.version for m in micro_batches]) if micro_batches else np.zeros(0, np.int32)
    owners = [m.tokens.trajectory for m in micro_batches]
    statuses = [trajectory.status for group in groups for trajectory in group.trajectories]
    seconds = clock.seconds
    return StepMetrics(
        step=step,
        num_groups=len(groups),
        num_trajectories=len(np.unique(np.concatenate(owners))) if owners else 0,
        num_failed_trajectories=statuses.count(Status.FAILED),
        num_contexts=sum(len(micro_batch.token_ids) for micro_batch in micro_batches),
        num_tokens=watched.num_tokens,
        num_over_age_tokens=sum(minibatch.num_over_age for minibatch in minibatches),
        num_input_tokens=num_input_tokens,
        padding_fraction=1.0 - num_input_tokens / num_padded if num_padded else 0.0,
        num_skipped_updates=num_skipped,
        loss=watched.loss,
        entropy=watched.mean(watched.entropy),
        clip_fraction=watched.mean(watched.clipped),
        kl_behavior=watched.mean(watched.kl_behavior),
        importance_weight_mean=watched.mean(watched.importance_weight),
        importance_weight_max=watched.importance_weight_max,
        importance_zero_fraction=watched.mean(watched.weight_zeroed),
        grad_norm=float(np.mean(norms)) if norms else 0.0,
        learning_rate=rate,
        staleness_counts=tuple(np.bincount(ages).tolist()),
        prepare_s=seconds.get("prepare", 0.0),
        proximal_s=seconds.get("proximal", 0.0),
        forward_s=seconds.get("forward", 0.0),
        backward_s=seconds.get("backward", 0.0),
        update_s=seconds.get("update", 0.0),
        step_s=clock.total_s,
    )
