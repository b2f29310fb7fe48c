"""Inputs and outputs of advantage estimators, and the formulas within a group. The estimators are in estimators.py.

    rewards of trajectories ──► compared within the group (grpo, rloo, maxrl) ──► one A per trajectory, for all tokens
                            ╰─► summed along the tokens (reinforce_pp, gae)   ──► one A per token

Statistics are over trajectories: each counts once, for any number of contexts. FAILED trajectories are excluded.
Advantages are computed once per batch, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Index = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """The inputs of an estimator: T trajectories (none FAILED) with C contexts and N trained tokens.

    reward          float64 [T]
    group           int64   [T]  equal for trajectories of one group
    owner           int64   [C]  the trajectory of each context
    role            int64   [C]  index into `roles`
    turn            int64   [C]
    trajectory      int64   [N]  tokens in the order of generation: by trajectory, context, position
    context         int64   [N]
    policy          int64   [N]  equal for tokens that one policy sampled
    context_reward  float64 [C]  rewards of single contexts; None unless the config has `context_rewards = "add"`
    kl_penalty      float64 [N]  KL coefficient times KL estimate, subtracted from rewards; None: no KL in the reward
    values          float64 [N]  value head at the state before each token; None without a value head
    """

    reward: Floats
    group: Index
    owner: Index
    role: Index
    turn: Index
    trajectory: Index
    context: Index
    policy: Index
    roles: tuple[str, ...]
    context_reward: Floats | None = None
    kl_penalty: Floats | None = None
    values: Floats | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.trajectory)

    @property
    def penalty(self) -> Floats:
        """float64 [N]: `kl_penalty`, or zeros."""
        return np.zeros(self.num_tokens) if self.kl_penalty is None else self.kl_penalty


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """advantage float [N]; returns float [N], the targets of the value head, or None if there is none."""

    advantage: NDArray[np.floating]
    returns: NDArray[np.floating] | None = None


def grpo_advantages(rewards: ArrayLike, *, ddof: int = 1, eps: float = 1e-6, normalize_std: bool = True) -> Floats:
    """A_i = (R_i - mean R) / (std R + eps), float64 [G], from the rewards [G] of a group.

    Fewer than two rewards, or equal rewards, give exactly 0. Without `normalize_std`: R_i - mean R (Dr. GRPO).
    Source: Shao et al. 2024 (GRPO), section 4.1; Liu et al. 2025 (Dr. GRPO), section 3.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not rewards_differ(rewards):
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=ddof) + eps) if normalize_std else centred


def rloo_advantages(rewards: ArrayLike) -> Floats:
    """A_i = R_i - mean of the other rewards = G / (G - 1) (R_i - mean R), float64 [G]; a single reward gives 0.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    return grpo_advantages(rewards, normalize_std=False) * len(rewards) / max(1, len(rewards) - 1)


def maxrl_advantages(rewards: ArrayLike, *, eps: float = 1e-6) -> Floats:
    """A_i = (R_i - mean R) / (mean R + eps), float64 [G], for rewards >= 0; 0 if the mean is not above 0.

    Hard questions get more weight: the expected gradient is that of log p(success), expanded to order G.
    Source: Tajwar et al. 2026 (Maximum Likelihood Reinforcement Learning, arXiv 2602.02710).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    mean = rewards.mean() if len(rewards) else 0.0
    centred = grpo_advantages(rewards, normalize_std=False)
    return centred / (mean + eps) if mean > 0 else np.zeros_like(centred)


def rewards_differ(rewards: ArrayLike) -> bool:
    """Whether the rewards [G] of a group differ; otherwise every advantage within it is 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return len(rewards) > 1 and bool((rewards != rewards[0]).any())
