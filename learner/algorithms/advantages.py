"""Advantages: what each sampled token is credited with.

    rewards of trajectories ──► within the group (grpo, rloo, maxrl) ──► one A a trajectory, for all of its tokens
                            ╰─► along the tokens (reinforce_pp, gae) ──► one A a token

Statistics are over trajectories: each counts once, whatever its number of contexts. Trajectories that the environment
failed are no part of any of this. Called once a batch, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learner.algorithms.returns import discounted_sums, generalized_advantages, last_of, whitened
from protocol.algorithm_config import AdvantageConfig
from protocol.errors import ConfigError

Index = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """What T trajectories of C contexts and N sampled tokens earned; none of them failed.

    reward          float64 [T]
    group           int64   [T]  equal where trajectories belong to one group
    owner           int64   [C]  the trajectory of each context
    role            int64   [C]  index into `roles`
    turn            int64   [C]
    trajectory      int64   [N]  tokens in the order of generation: by trajectory, context, position
    context         int64   [N]
    policy          int64   [N]  equal where one policy sampled
    context_reward  float64 [C]  what the task gave to single contexts; None where it gives nothing
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


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """advantage float32 [N]; returns float32 [N], the targets of the value head, with `gae` only."""

    advantage: NDArray[np.float32]
    returns: NDArray[np.float32] | None = None


def token_advantages(
    credit: Credit, config: AdvantageConfig, *, values: ArrayLike | None = None, kl_penalty: ArrayLike | None = None
) -> Advantages:
    """The advantage of every sampled token of a batch.

    values [N]: of the value head before each token, for `gae`. kl_penalty [N]: the KL coefficient times a per-token
    estimate, subtracted from the reward: token by token, or summed over a trajectory for estimators within a group.
    Raises: ConfigError where rewards of contexts are asked for and the task gives none; ValueError where `gae` has no
    values.
    """
    if config.context_rewards == "add" and credit.context_reward is None:
        raise ConfigError(
            "learner.advantage.context_rewards must be 'none' where the task rewards no contexts, got 'add'"
        )
    penalty = np.zeros(len(credit.trajectory)) if kl_penalty is None else np.asarray(kl_penalty, dtype=np.float64)
    returns = None
    if config.estimator in _ESTIMATORS:
        advantage = _within_groups(credit, config, penalty)
    else:
        chain = _chains(credit)
        rewards = _token_rewards(credit, config, penalty, chain)
        if config.estimator == "reinforce_pp":
            advantage = discounted_sums(rewards, chain, discount=config.gamma)
        elif values is None:
            raise ValueError("estimator gae needs values [N], got None")
        else:
            values = np.asarray(values, dtype=np.float64)
            advantage, returns = generalized_advantages(rewards, values, chain, gamma=config.gamma, lam=config.lam)
        advantage = whitened(advantage, eps=config.eps) if config.whiten else advantage
    weight_of_role = np.array([config.role_weights.get(role, 1.0) for role in credit.roles])
    advantage = advantage * weight_of_role[credit.role[credit.context]]
    return Advantages(advantage.astype(np.float32), None if returns is None else returns.astype(np.float32))


def _token_rewards(credit: Credit, config: AdvantageConfig, penalty: Floats, chain: Index) -> Floats:
    """float64 [N]: minus the penalty, plus a trajectory's reward at the last token of each policy that acted in it,
    plus, where `context_rewards` is `add`, a context's at its last token (turn-level rewards).

    Sources: Ouyang et al. 2022 (KL in the reward); Zhou et al. 2025 (MEM1) for one chain over all contexts.
    """
    rewards = -penalty
    last = last_of(chain, num_segments=int(chain.max(initial=-1)) + 1)
    rewards[last] += credit.reward[credit.trajectory[last]]
    if config.context_rewards == "add" and credit.context_reward is not None:
        last = last_of(credit.context, num_segments=len(credit.owner))
        acted = last >= 0
        rewards[last[acted]] += credit.context_reward[acted]
    return rewards


def _within_groups(credit: Credit, config: AdvantageConfig, penalty: Floats) -> Floats:
    """A_i + A_k [N]: over the trajectories of a group, and over its contexts of one role and turn.

    Source of the sum: Feng et al. 2025 (GiGPO), with weight 1; contexts are anchored by role and turn, as a
    rewritten memory makes no two states alike.
    """
    spent = np.bincount(credit.trajectory, weights=penalty, minlength=len(credit.reward))
    advantage = _by_group(credit.reward - spent, credit.group, config)[credit.trajectory]
    if config.context_rewards == "add" and credit.context_reward is not None and len(credit.owner):
        anchors = np.stack([credit.group[credit.owner], credit.role, credit.turn])
        _, anchor = np.unique(anchors, axis=1, return_inverse=True)
        advantage = advantage + _by_group(credit.context_reward, anchor.reshape(-1), config)[credit.context]
    return advantage


def _by_group(rewards: Floats, group: Index, config: AdvantageConfig) -> Floats:
    estimate = _ESTIMATORS[config.estimator]
    advantages = np.zeros(len(rewards))
    for each in np.unique(group):
        member = group == each
        advantages[member] = estimate(rewards[member], config)
    return advantages


def grpo_advantages(rewards: ArrayLike, *, ddof: int = 1, eps: float = 1e-6, normalize_std: bool = True) -> Floats:
    """A_i = (R_i - mean R) / (std R + eps), float64 [G], from the rewards [G] of a group.

    Fewer than two rewards, or equal ones, give exactly 0. Without `normalize_std` only centred (Dr. GRPO).
    Source: Shao et al. 2024 (GRPO), section 4.1; Liu et al. 2025 (Dr. GRPO), section 3.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not has_signal(rewards):
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=ddof) + eps) if normalize_std else centred


def rloo_advantages(rewards: ArrayLike) -> Floats:
    """A_i = R_i - mean of the others = G / (G - 1) (R_i - mean R), float64 [G]; a single reward gives 0.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    return grpo_advantages(rewards, normalize_std=False) * len(rewards) / max(1, len(rewards) - 1)


def maxrl_advantages(rewards: ArrayLike, *, eps: float = 1e-6) -> Floats:
    """A_i = (R_i - mean R) / (mean R + eps), float64 [G], for rewards >= 0; 0 where the mean is not above 0.

    Hard questions weigh more: in expectation the gradient of log p(success), to order G.
    Source: Tajwar et al. 2026 (Maximum Likelihood Reinforcement Learning, arXiv 2602.02710).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    mean = rewards.mean() if len(rewards) else 0.0
    centred = grpo_advantages(rewards, normalize_std=False)
    return centred / (mean + eps) if mean > 0 else np.zeros_like(centred)


def has_signal(rewards: ArrayLike) -> bool:
    """Whether the rewards [G] of a group differ; otherwise every advantage within it is 0."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return len(rewards) > 1 and bool((rewards != rewards[0]).any())


def _grpo(rewards: Floats, config: AdvantageConfig) -> Floats:
    return grpo_advantages(rewards, ddof=config.ddof, eps=config.eps, normalize_std=config.normalize_std)


_ESTIMATORS: dict[str, Callable[[Floats, AdvantageConfig], Floats]] = {
    "grpo": _grpo,
    "rloo": lambda rewards, config: rloo_advantages(rewards),
    "maxrl": lambda rewards, config: maxrl_advantages(rewards, eps=config.eps),
}


def _chains(credit: Credit) -> Index:
    """int64 [N]: what one policy sampled in one trajectory is one chain."""
    keys = credit.trajectory * (credit.policy.max(initial=0) + 1) + credit.policy
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
