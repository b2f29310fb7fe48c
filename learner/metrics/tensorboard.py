"""TensorBoard. The tags are those of `scalars()`; docs/metrics.md says what each means and what is healthy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from learner.metrics.step_metrics import StepMetrics
from protocol.types import Context, Status, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Means over the non-failed trajectories of a batch; `context_tokens` over their contexts."""

    num_trajectories: int
    num_sampled_tokens: int
    reward_mean: float
    reward_std: float
    reward_parts: dict[str, float]
    stats: dict[str, float]
    turns: float
    context_tokens: float
    failed_fraction: float
    zero_variance_fraction: float

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag; metrics.jsonl has the same names."""
        return {
            "reward/mean": self.reward_mean,
            "reward/std": self.reward_std,
            "reward/zero_variance_fraction": self.zero_variance_fraction,
            **{f"reward/{name}": value for name, value in self.reward_parts.items()},
            "rollout/turns": self.turns,
            "rollout/context_tokens": self.context_tokens,
            "rollout/failed_fraction": self.failed_fraction,
            **{f"rollout/{name}": value for name, value in self.stats.items()},
        }


def summarise_rollouts(groups: Sequence[TrajectoryGroup]) -> RolloutSummary:
    """What a batch's trajectories got and how long they were; zeros where all failed."""
    everyone = [trajectory for group in groups for trajectory in group.trajectories]
    counted = [trajectory for trajectory in everyone if trajectory.status is not Status.FAILED]
    lengths = [len(context) for trajectory in counted for context in trajectory.contexts]
    rewards = np.array([trajectory.reward for trajectory in counted])
    return RolloutSummary(
        num_trajectories=len(counted),
        num_sampled_tokens=sum(trajectory.num_trained_tokens for trajectory in counted),
        reward_mean=_mean(rewards),
        reward_std=float(rewards.std()) if len(rewards) else 0.0,
        reward_parts=_mean_by_name([trajectory.reward_parts for trajectory in counted]),
        stats=_mean_by_name([trajectory.stats for trajectory in counted]),
        turns=_mean([len(trajectory.contexts) for trajectory in counted]),
        context_tokens=_mean(lengths),
        failed_fraction=_mean([trajectory.status is Status.FAILED for trajectory in everyone]),
        zero_variance_fraction=_mean([_is_flat(group) for group in groups]),
    )


class TensorBoardWriter:
    """Writes TensorBoard events into `folder`. Every call takes the step that its values belong to.

    `purge_step`: on resuming, events of this step and later are hidden, as they will be written again.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step, flush_secs=5)

    def step(self, metrics: StepMetrics) -> None:
        """`policy/*`, `staleness/*` and `learner/*` of one training step."""
        self.scalars(metrics.scalars(), step=metrics.step)
        self._ages(metrics.staleness_counts, step=metrics.step)

    def rollouts(self, summary: RolloutSummary, *, step: int) -> None:
        """`reward/*` and `rollout/*` of the batch that step trained on."""
        self.scalars(summary.scalars(), step=step)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Any tag by its full name: `rollout/tokens_per_s`, `learner/wait_s`, `queue/*`: made elsewhere."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, global_step=step)

    def trajectory(self, tag: str, text: str, *, step: int) -> None:
        """A trajectory as text (Markdown), such as `render_trajectory` makes, under `trajectories/<tag>`."""
        self._writer.add_text(f"trajectories/{tag}", text, global_step=step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()

    def _ages(self, counts: Sequence[int], *, step: int) -> None:
        ages = np.flatnonzero(counts)
        if not len(ages):
            return
        held = np.asarray(counts, dtype=np.int64)[: ages[-1] + 1]
        every = np.arange(len(held))
        self._writer.add_histogram_raw(
            "staleness/histogram",
            min=float(ages[0]),
            max=float(ages[-1]),
            num=int(held.sum()),
            sum=float((every * held).sum()),
            sum_squares=float((every**2 * held).sum()),
            bucket_limits=(every + 0.5).tolist(),
            bucket_counts=held.tolist(),
            global_step=step,
        )


def render_trajectory(trajectory: Trajectory, contexts: Sequence[str], *, question: str) -> str:
    """Markdown of a trajectory from the decoded text of its contexts, turn by turn."""
    head = f"**{question}** → {trajectory.answer!r}, reward {trajectory.reward:.3f}, {trajectory.status}"
    turns = [
        f"Context {number} ({_ages_of(context)}, {len(context)} tokens)\n\n```\n{text}\n```"
        for number, (context, text) in enumerate(zip(trajectory.contexts, contexts, strict=True), start=1)
    ]
    return "\n\n".join([head, *turns])


def _ages_of(context: Context) -> str:
    versions = sorted({span.version for span in context.policy_versions})
    return f"{context.role}, versions {', '.join(map(str, versions)) or 'none'}"


def _is_flat(group: TrajectoryGroup) -> bool:
    rewards = {trajectory.reward for trajectory in group.trajectories if trajectory.status is not Status.FAILED}
    return len(rewards) < 2


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}
