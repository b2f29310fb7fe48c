"""Advantage estimators: they compute the advantage of each trained token. `learner.advantage.use` selects one."""

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
    """Base class of advantage estimators. `Options` declares their keys in the `[learner.advantage]` section.

    `needs_values`: if true, a value head is trained and `credit.values` is set.
    """

    Options: ClassVar[type[BaseModel]] = Options
    needs_values: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def advantages(self, credit: Credit) -> Advantages:
        """The advantages [N] of the N >= 0 trained tokens of a batch."""


class GroupEstimator(AdvantageEstimator):
    """Base class of estimators that compare trajectories of a group. Subclasses implement only `group_advantages`."""

    @abstractmethod
    def group_advantages(self, rewards: Floats) -> Floats:
        """Advantages float64 [G] of the trajectories of one group from their rewards float64 [G], G >= 1."""

    def advantages(self, credit: Credit) -> Advantages:
        """A_i [N], plus A_k if contexts have rewards.

        A_i compares trajectory i with the trajectories of its group; A_k compares context k with the contexts of its
        group that have the same role and turn. The KL penalties of a trajectory's tokens are subtracted from its
        reward.
        Source of the sum: Feng et al. 2025 (GiGPO), with weight 1. GiGPO compares equal states; two states with a
        rewritten memory are never equal, so role and turn are used instead.
        """
        kl_penalty = np.bincount(credit.trajectory, weights=credit.penalty, minlength=len(credit.reward))
        advantage = self._by_group(credit.reward - kl_penalty, credit.group)[credit.trajectory]
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
    """GRPO: (R - mean) / (std + eps) over the trajectories of a group."""

    Options = GrpoOptions
    options: GrpoOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        o = self.options
        return grpo_advantages(rewards, ddof=o.ddof, eps=o.eps, normalize_std=o.normalize_std)


class RLOO(GroupEstimator):
    """RLOO: a trajectory's reward minus the mean reward of the others in its group."""

    Options = RlooOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        return rloo_advantages(rewards)


class MaxRL(GroupEstimator):
    """MaxRL: (R - mean) / (mean + eps); rewards must be >= 0."""

    Options = MaxrlOptions
    options: MaxrlOptions

    def group_advantages(self, rewards: Floats) -> Floats:
        return maxrl_advantages(rewards, eps=self.options.eps)


class ReinforcePP(AdvantageEstimator):
    """REINFORCE++: discounted sums of token rewards along each chain, whitened if `whiten`.

    Source: Hu et al. 2025 (REINFORCE++).
    """

    Options = ReinforceOptions
    options: ReinforceOptions

    def advantages(self, credit: Credit) -> Advantages:
        chain = chains(credit)
        advantage = discounted_sums(token_rewards(credit, chain), chain, discount=self.options.gamma)
        return Advantages(whitened(advantage, eps=self.options.eps) if self.options.whiten else advantage)


class GAE(AdvantageEstimator):
    """Generalized advantage estimation along each chain with a value head, whitened if `whiten`."""

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
    """The estimator that `config` names. Raises: ConfigError."""
    return ADVANTAGES.create(config, base_dir=base_dir)


def token_advantages(credit: Credit, config: AdvantageConfig, estimator: AdvantageEstimator) -> Advantages:
    """The advantages, float32 [N], of the trained tokens of a batch, multiplied by role weights.

    Raises: ConfigError if `context_rewards` is `add` and contexts have no rewards; ExtensionError if an imported
    estimator raises, returns a wrong shape or a value that is not finite.
    """
    if config.context_rewards == "add" and credit.context_reward is None:
        raise ConfigError(
            "learner.advantage.context_rewards must be 'none' if the workflow rewards no contexts, got 'add'"
        )
    if config.context_rewards == "none":
        credit = replace(credit, context_reward=None)
    with ADVANTAGES.running(config.use):
        found = estimator.advantages(credit)
        _check(found, num_tokens=credit.num_tokens)
    weight_of_role = np.array([config.role_weights.get(role, 1.0) for role in credit.roles])
    advantage = found.advantage * weight_of_role[credit.role[credit.context]]
    returns = None if found.returns is None else found.returns.astype(np.float32)
    return Advantages(advantage.astype(np.float32), returns)


def _check(found: Advantages, *, num_tokens: int) -> None:
    for name, column in (("advantage", found.advantage), ("returns", found.returns)):
        if column is None:
            continue
        if column.shape != (num_tokens,):
            raise ValueError(f"{name} must have shape [{num_tokens}], got {list(column.shape)}")
        if num_bad := int((~np.isfinite(column)).sum()):
            raise ValueError(f"{name} must be finite, got {num_bad} values that are not")


def token_rewards(credit: Credit, chain: Index) -> Floats:
    """float64 [N]: the reward of each token.

    It is minus the token's KL penalty. The last token of each chain gets the trajectory's reward in addition, and the
    last token of each context gets the context's reward (turn-level rewards).
    Sources: Ouyang et al. 2022 (KL in the reward); Zhou et al. 2025 (MEM1) for one chain over all contexts.
    """
    rewards = -credit.penalty
    last = last_of(chain, num_segments=int(chain.max(initial=-1)) + 1)
    rewards[last] += credit.reward[credit.trajectory[last]]
    if credit.context_reward is not None:
        last = last_of(credit.context, num_segments=len(credit.owner))
        has_tokens = last >= 0
        rewards[last[has_tokens]] += credit.context_reward[has_tokens]
    return rewards


def chains(credit: Credit) -> Index:
    """int64 [N]: the chain number of each token. The tokens that one policy sampled in one trajectory form a chain."""
    keys = credit.trajectory * (credit.policy.max(initial=0) + 1) + credit.policy
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)
