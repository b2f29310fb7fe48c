"""Advantages over the trajectories of a group: a trajectory counts once, whatever its number of contexts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protocol.config import AdvantageConfig
from protocol.types import Status, TrajectoryGroup


def grpo_advantages(
    rewards: ArrayLike,
    valid: ArrayLike,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
    normalize_std: bool = True,
) -> NDArray[np.float64]:
    """A_i = (R_i - mean R) / (std R + eps), float64 [G], statistics over the valid trajectories only.

    rewards [G]; valid bool [G], false for environment failures, whose A is 0. Fewer than two valid trajectories, or
    equal rewards, give exactly 0. Without `normalize_std` the centred rewards are returned (Dr. GRPO).
    Source: Shao et al. 2024 (GRPO), section 4.1; Liu et al. 2025 (Dr. GRPO), section 3.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    valid = np.asarray(valid, dtype=np.bool_)
    if rewards.ndim != 1 or rewards.shape != valid.shape:
        raise ValueError(f"rewards and valid must be [G] alike, got {rewards.shape} and {valid.shape}")
    advantages = np.zeros_like(rewards)
    counted = rewards[valid]
    if not has_signal(rewards, valid):
        return advantages
    centred = counted - counted.mean()
    if normalize_std:
        centred /= counted.std(ddof=min(ddof, len(counted) - 1)) + eps
    advantages[valid] = centred
    return advantages


def has_signal(rewards: ArrayLike, valid: ArrayLike) -> bool:
    """Whether the valid trajectories of a group differ in reward; otherwise every advantage is 0."""
    counted = np.asarray(rewards, dtype=np.float64)[np.asarray(valid, dtype=np.bool_)]
    return len(counted) > 1 and bool((counted != counted[0]).any())


def group_rewards(group: TrajectoryGroup) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(rewards float64 [G], valid bool [G]) of a group; failed trajectories are not valid."""
    rewards = np.array([trajectory.reward for trajectory in group.trajectories], dtype=np.float64)
    valid = np.array([trajectory.status is not Status.FAILED for trajectory in group.trajectories], dtype=np.bool_)
    return rewards, valid


def group_advantages(group: TrajectoryGroup, config: AdvantageConfig) -> NDArray[np.float64]:
    """float64 [G]: the advantage that every trained token of every context of a trajectory gets."""
    rewards, valid = group_rewards(group)
    return grpo_advantages(rewards, valid, ddof=config.ddof, eps=config.eps, normalize_std=config.normalize_std)
