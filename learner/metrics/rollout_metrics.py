"""The metrics of a batch's trajectories: rewards, lengths, and the numbers that tasks and workflows return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from protocol.metric import Metric
from protocol.types import Status, TrajectoryGroup

_OVER_TRAJECTORIES = "mean over trajectories that did not fail"
_NOT_MEASURED = "the workflow does not measure it"
_LENGTH, _TOKENS, _MISTAKES = "Contexts, turns and searches", "Tokens of a trajectory", "Mistakes of a trajectory"

REWARD_METRICS = (
    Metric(
        name="reward/mean",
        chart="Reward and its parts",
        reduction=_OVER_TRAJECTORIES,
        unit="reward",
        explanation="R",
        healthy="increases; if it is flat from the first steps on, there is no signal: see "
        "`reward/zero_variance_fraction`",
    ),
    Metric(
        name="reward/std",
        chart="Spread of rewards",
        reduction="standard deviation over trajectories that did not fail",
        unit="reward",
        explanation="R",
        healthy="decreases as the task is solved",
    ),
    Metric(
        name="reward/zero_variance_fraction",
        chart="Groups without a signal",
        reduction="mean over groups",
        unit="0–1",
        explanation="fraction of groups whose trajectories all have the same R, so that A = 0",
        healthy="below 0.5; near 1 the questions are too easy or too hard",
    ),
    Metric(
        name="reward/{part}",
        chart="Reward and its parts",
        reduction=_OVER_TRAJECTORIES,
        unit="its own",
        explanation="each named part of the reward that the task computes: `em`, `f1`, `format` …",
        healthy="moves with `reward/mean`; format first, then em",
        absent_if="the task computes no such part",
    ),
)

ROLLOUT_METRICS = (
    Metric(
        name="rollout/tokens_per_s",
        chart="Tokens per second",
        reduction="sum over trajectories that did not fail, divided by the time between two steps",
        unit="tokens/s",
        explanation="sampled tokens of the batch's groups",
        healthy="steady; decreases if engines fail or have too little work",
    ),
    Metric(
        name="rollout/contexts",
        chart=_LENGTH,
        reduction=_OVER_TRAJECTORIES,
        unit="contexts",
        explanation="contexts of a trajectory",
        healthy="depends on the task; if it is at `workflow.max_turns`, the policy never ends an episode itself",
    ),
    Metric(
        name="rollout/context_tokens",
        chart="Context lengths in tokens",
        reduction="mean over contexts of trajectories that did not fail",
        unit="tokens",
        explanation="length of a context, including prompt and observations",
        healthy="constant over turns and training, because the memory is rewritten, not extended",
    ),
    Metric(
        name="rollout/failed_fraction",
        chart="How trajectories end",
        reduction="mean over trajectories",
        unit="0–1",
        explanation="fraction of trajectories with status FAILED: an engine, a tool, the workflow or the reward failed",
        healthy="0; the reasons are in the actors' logs",
    ),
    *(
        Metric(
            name=f"rollout/{status}_fraction",
            chart="How trajectories end",
            reduction="mean over trajectories",
            unit="0–1",
            explanation=f"fraction of trajectories with status {status.name}: {meaning}",
            healthy=healthy,
        )
        for status, meaning, healthy in (
            (Status.COMPLETED, "the policy gave an answer", "increases towards 1"),
            (Status.FORMAT_ERROR, "the policy broke a format rule of the workflow", "decreases towards 0"),
            (
                Status.OVER_BUDGET,
                "the budget of turns, memory or tokens was used up",
                "small; else the budget is too low, or the policy does not end its episodes",
            ),
        )
    ),
    *(
        Metric(
            name=f"rollout/{stat}",
            chart=chart,
            reduction=_OVER_TRAJECTORIES,
            unit=unit,
            explanation=explanation,
            healthy=healthy,
            absent_if=_NOT_MEASURED,
        )
        for stat, chart, unit, explanation, healthy in (
            ("num_turns", _LENGTH, "turns", "turns of a trajectory", "as the task needs"),
            ("num_generations", "", "generations", "completions requested from engines", "as the task needs"),
            ("num_searches", _LENGTH, "searches", "searches of a trajectory", "as the task needs"),
            ("num_prompt_tokens", _TOKENS, "tokens", "tokens that engines read, summed over generations", ""),
            ("num_generated_tokens", _TOKENS, "tokens", "tokens that engines sampled", ""),
            ("num_cached_tokens", _TOKENS, "tokens", "prompt tokens found in an engine's prefix cache", ""),
            (
                "peak_context_tokens",
                "Context lengths in tokens",
                "tokens",
                "longest context of a trajectory",
                "far below `workflow.context_tokens`",
            ),
            ("num_bad_calls", _MISTAKES, "calls", "tool calls that could not be parsed", "near 0"),
            ("num_truncated_memories", _MISTAKES, "memories", "memories cut at their length limit", "near 0"),
            ("num_truncated_questions", "", "questions", "questions cut at their length limit", "near 0"),
            (
                "num_shortened_observations",
                _MISTAKES,
                "observations",
                "observations shortened to fit the context",
                "near 0",
            ),
        )
    ),
    Metric(
        name="rollout/{stat}",
        reduction=_OVER_TRAJECTORIES,
        unit="its own",
        explanation="any other number that a workflow returns for a trajectory (`Episode.stats`)",
        absent_if=_NOT_MEASURED,
    ),
)


def rollout_metrics(groups: Sequence[TrajectoryGroup], *, interval_s: float) -> dict[str, float]:
    """Values by tag; 0 if every trajectory failed. `interval_s`: time since the batch of the previous step."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    counted = [trajectory for trajectory in trajectories if trajectory.status is not Status.FAILED]
    rewards = np.array([trajectory.reward for trajectory in counted])
    parts = _mean_by_name([trajectory.reward_parts for trajectory in counted])
    stats = _mean_by_name([trajectory.stats for trajectory in counted])
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "reward/zero_variance_fraction": _mean([_has_one_reward(group) for group in groups]),
        **{f"reward/{name}": value for name, value in parts.items()},
        "rollout/contexts": _mean([len(trajectory.contexts) for trajectory in counted]),
        "rollout/context_tokens": _mean([len(context) for each in counted for context in each.contexts]),
        **{f"rollout/{each}_fraction": _mean([one.status is each for one in trajectories]) for each in Status},
        **{f"rollout/{name}": value for name, value in stats.items()},
        "rollout/tokens_per_s": sum(trajectory.num_trained_tokens for trajectory in counted) / interval_s,
    }


def _has_one_reward(group: TrajectoryGroup) -> bool:
    rewards = {trajectory.reward for trajectory in group.trajectories if trajectory.status is not Status.FAILED}
    return len(rewards) < 2


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}
