"""Advantage estimators: what each sampled token of a batch is credited with. `learner.advantage.use` names one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel

from learner.algorithms.advantages import (
    Advantages,
    Credit,
    Floats,
    Index,
    grpo_advantages,
    maxrl_advantages,
    rloo_advantages,
)
from learner.algorithms.returns import discounted_sums, generalized_advantages, last_of, whitened
from protocol.algorithm_config import (
    AdvantageConfig,
    GaeOptions,
    GrpoOptions,
    MaxrlOptions,
    ReinforceOptions,
    RlooOptions,
)
from protocol.config_base import Options
from protocol.errors import ConfigError
from protocol.extensions import ExtensionPoint


class AdvantageEstimator(ABC):
    """Base class of advantage estimators. `Options` describes their keys in the `[learner.advantage]` section.

    `needs_values`: a value head is trained, and `credit.values` is set.
    """

    Options: ClassVar[type[BaseModel]] = Options
    needs_values: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def advantages(self, credit: Credit) -> Advantages:
        """The advantage of every sampled token of a batch, N >= 0 tokens."""


class GroupEstimator(AdvantageEstimator):
    """Base class of estimators that compare the trajectories of a group: write `group_advantages` only."""

    @abstractmethod
    def group_advantages(self, rewards: Floats) -> Floats:
        """Advantages float64 [G] of the trajectories of one group from their rewards float64 [G], G >= 1."""

    def advantages(self, credit: Credit) -> Advantages:
        """A_i + A_k [N]: over the trajectories of a group, and over its contexts of one role and turn.

        The KL penalty of a trajectory's tokens is summed and subtracted from its reward. Source of the sum: Feng et al.
        2025 (GiGPO), with weight 1; contexts are compared by role and turn, since a rewritten memory makes no two
        states equal.
        """
        spent = np.bincount(credit.trajectory, weights=credit.penalty, minlength=len(credit.reward))
        advantage = self._by_group(credit.reward - spent, credit.group)[credit.trajectory]
        if credit.context_reward is not None and len(credit.owner):
            anchors = np.stack([credit.group[credit.owner], credit.role, credit.turn])
            _, anchor = np.unique(anchors, axis=1, return_inverse=True)
            advantage = advantage + self._by_group(credit.context_reward, anchor.reshape(-1))[credit.context]
        return Advantages(advantage)

    def _by_group(self, rewards: Floats, group: Index) -> Floats:
        advantages = np.zeros(len(rewards))
        for each in np.unique(group):
            member = group == each
            advantages[member] = self.group_advantages(rewards[member])
        return advantages


class GRPO(GroupEstimator):
    """`grpo_advantages`."""

    Options = GrpoOptions
    options: GrpoOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        o = self.options
        return grpo_advantages(rewards, ddof=o.ddof, eps=o.eps, normalize_std=o.normalize_std)


class RLOO(GroupEstimator):
    """`rloo_advantages`."""

    Options = RlooOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        return rloo_advantages(rewards)


class MaxRL(GroupEstimator):
    """`maxrl_advantages`."""

    Options = MaxrlOptions
    options: MaxrlOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        return maxrl_advantages(rewards, eps=self.options.eps)


class ReinforcePP(AdvantageEstimator):
    """Discounted sums of token rewards along each chain, whitened. Source: Hu et al. 2025 (REINFORCE++)."""

    Options = ReinforceOptions
    options: ReinforceOptions

    def advantages(self, credit: Credit) -> Advantages:
        chain = chains(credit)
        advantage = discounted_sums(token_rewards(credit, chain), chain, discount=self.options.gamma)
        return Advantages(whitened(advantage, eps=self.options.eps) if self.options.whiten else advantage)


class GAE(AdvantageEstimator):
    """`generalized_advantages` along each chain, whitened."""

    Options = GaeOptions
    options: GaeOptions
    needs_values = True

    def advantages(self, credit: Credit) -> Advantages:
        """Raises: ValueError if `credit.values` is None."""
        if credit.values is None:
            raise ValueError("estimator gae needs values [N], got None")
        chain = chains(credit)
        rewards = token_rewards(credit, chain)
        advantage, returns = generalized_advantages(
            rewards, credit.values, chain, gamma=self.options.gamma, lam=self.options.lam
        )
        return Advantages(whitened(advantage, eps=self.options.eps) if self.options.whiten else advantage, returns)


ADVANTAGES = ExtensionPoint(
    key="learner.advantage",
    noun="advantage estimator",
    builtins={
        "grpo": "learner.algorithms.estimators:GRPO",
        "rloo": "learner.algorithms.estimators:RLOO",
        "maxrl": "learner.algorithms.estimators:MaxRL",
        "reinforce_pp": "learner.algorithms.estimators:ReinforcePP",
        "gae": "learner.algorithms.estimators:GAE",
    },
    methods={"advantages": "def advantages(self, credit) -> Advantages"},
)


def make_estimator(config: AdvantageConfig, *, base_dir: Path | None = None) -> AdvantageEstimator:
    """Raises: ConfigError."""
    return ADVANTAGES.create(config, base_dir=base_dir)


def token_advantages(credit: Credit, config: AdvantageConfig, estimator: AdvantageEstimator) -> Advantages:
    """float32 [N]: the advantage of every sampled token of a batch, role weights applied.

    Raises: ConfigError if context rewards are to be credited and there are none; ExtensionError if an imported
    estimator raises, returns another shape or a value that is not finite.
    """
    if config.context_rewards == "add" and credit.context_reward is None:
        raise ConfigError(
            "learner.advantage.context_rewards must be 'none' if the workflow rewards no contexts, got 'add'"
        )
    if config.context_rewards == "none":
        credit = replace(credit, context_reward=None)
    with ADVANTAGES.running(config.use):
        earned = estimator.advantages(credit)
        _check(earned, num_tokens=credit.num_tokens)
    weight_of_role = np.array([config.role_weights.get(role, 1.0) for role in credit.roles])
    advantage = earned.advantage * weight_of_role[credit.role[credit.context]]
    returns = None if earned.returns is None else earned.returns.astype(np.float32)
    return Advantages(advantage.astype(np.float32), returns)


def _check(earned: Advantages, *, num_tokens: int) -> None:
    for name, column in (("advantage", earned.advantage), ("returns", earned.returns)):
        if column is not None and (column.shape != (num_tokens,) or not np.isfinite(column).all()):
            raise ValueError(f"{name} must be [{num_tokens}] finite numbers, got shape {list(column.shape)}")


def token_rewards(credit: Credit, chain: Index) -> Floats:
    """float64 [N]: minus the KL penalty, plus a trajectory's reward at the last token of each policy that acted in it,
    plus a context's reward at its last token (turn-level rewards).

    Sources: Ouyang et al. 2022 (KL in the reward); Zhou et al. 2025 (MEM1) for one chain over all contexts.
    """
    rewards = -credit.penalty
    last = last_of(chain, num_segments=int(chain.max(initial=-1)) + 1)
    rewards[last] += credit.reward[credit.trajectory[last]]
    if credit.context_reward is not None:
        last = last_of(credit.context, num_segments=len(credit.owner))
        acted = last >= 0
        rewards[last[acted]] += credit.context_reward[acted]
    return rewards


def chains(credit: Credit) -> Index:
    """int64 [N]: the chain of each token; the tokens that one policy sampled in one trajectory form a chain."""
    keys = credit.trajectory * (credit.policy.max(initial=0) + 1) + credit.policy
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
