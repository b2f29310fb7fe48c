"""Numeric cases from the tests of other projects (rl_vectors.jsonl), and an adapter to our functions per operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.algorithms.advantages import grpo_advantages, maxrl_advantages, rloo_advantages
from learner.algorithms.importance_weights import (
    inside,
    scoped_log_ratio,
    truncated_weights,
    without_off_policy_negatives,
    without_outliers,
)
from learner.algorithms.losses import approx_kl, cispo, clipped_surrogate, sequence_log_ratio
from learner.algorithms.returns import discounted_sums, generalized_advantages, whitened
from learner.batch.flatten import aggregation_weights

DESCRIPTIVE = {"note", "whiten"}
"""Parameters that do not change the result."""

Array = NDArray[np.float64]
Outputs = dict[str, Array]
Value = TypeVar("Value")


class Row:
    """One case: inputs [R, L] of R sequences with a mask. It records which inputs and parameters were read."""

    def __init__(self, raw: dict) -> None:
        self.name = f"{raw['id']}-{raw['op']}"
        self.op: str = raw["op"]
        self.expected: dict = raw["expected"]
        self.tolerance = {"rtol": raw["rtol"], "atol": raw["atol"]}
        self._params: dict = raw["params"]
        self._inputs: dict = raw["inputs"]
        self._unread = (raw["params"].keys() - DESCRIPTIVE) | raw["inputs"].keys()

    @property
    def unread(self) -> list[str]:
        return sorted(self._unread)

    def has(self, name: str) -> bool:
        return name in self._inputs

    def param(self, name: str, default: Value) -> Value:
        """The parameter `name`; `default` if it is absent or null."""
        self._unread -= {name}
        found = self._params.get(name)
        return default if found is None else found

    def tensor(self, name: str) -> Tensor:
        self._unread -= {name}
        return torch.tensor(self._inputs[name], dtype=torch.float64)

    @property
    def mask(self) -> Tensor:
        """bool [R, L]; all true if the row has none."""
        for name in ("mask", "response_mask"):
            if self.has(name):
                return self.tensor(name).bool()
        return torch.ones_like(self.tensor(next(iter(self._inputs))), dtype=torch.bool)

    @property
    def segment(self) -> Tensor:
        """int64 [N]: the sequence of each unmasked token."""
        return torch.nonzero(self.mask)[:, 0]

    def flat(self, name: str) -> Tensor:
        """[N]: the unmasked tokens."""
        return self.tensor(name)[self.mask]

    def log_ratio(self, numerator: str, denominator: str) -> Tensor:
        """[N]: from two columns of log-probs, or from the input `ratio`."""
        return self.flat("ratio").log() if self.has("ratio") else self.flat(numerator) - self.flat(denominator)

    def spread(self, tokens: Tensor | Array, *, masked: float | None = None) -> Array:
        """[R, L] of values of the unmasked tokens [N]; a masked token is `masked`, or not compared if that is None."""
        spread = np.full(self.mask.shape, masked or 0.0)
        spread[self.mask.numpy()] = np.asarray(tokens)
        return spread if masked is not None else np.ma.array(spread, mask=~self.mask.numpy())

    def per_sequence(self, tokens: Tensor, *, empty: float = 1.0) -> Array:
        """[R, 1] of values [N] that are equal within a sequence; `empty` for a sequence without unmasked tokens."""
        found = torch.full((len(self.mask), 1), empty, dtype=torch.float64)
        found[self.segment, 0] = tokens.double()
        return found.numpy()

    def bounds(self, low: str = "low", high: str = "high") -> dict[str, float]:
        """Keyword arguments of a band; a bound that is absent or null does not bind."""
        return {"low": self.param(low, 0.0), "high": self.param(high, float("inf"))}

    def scope(self, default: str) -> Tensor | None:
        """None for `level` = token, else the sequences."""
        level = self.param("level", default)
        assert level in ("token", "sequence"), level
        return None if level == "token" else self.segment


def with_sum(advantages: Array) -> Outputs:
    return {"advantages": advantages, "sum": np.asarray(advantages.sum())}


def over_groups(row: Row, estimate: Callable[[Array], Array]) -> Outputs:
    rewards, group = row.tensor("token_level_rewards").sum(1).numpy(), row.tensor("group").numpy()
    found = np.zeros(len(rewards))
    for each in np.unique(group):
        found[group == each] = estimate(rewards[group == each])
    return with_sum(found[:, None] * row.tensor("response_mask").numpy())


def grpo_advantage(row: Row) -> Outputs:
    normalize_std = row.param("norm_by_std", default=True)
    return over_groups(row, lambda rewards: grpo_advantages(rewards, normalize_std=normalize_std))


def rloo_advantage(row: Row) -> Outputs:
    return over_groups(row, rloo_advantages)


def maxrl_advantage(row: Row) -> Outputs:
    return over_groups(row, maxrl_advantages)


def maxrl_scalar_advantage(row: Row) -> Outputs:
    return with_sum(maxrl_advantages(row.tensor("rewards").numpy()))


def group_centered_advantage(row: Row) -> Outputs:
    return with_sum(grpo_advantages(row.tensor("rewards").numpy(), normalize_std=False))


def gae(row: Row) -> Outputs:
    advantages, returns = generalized_advantages(
        row.flat("token_level_rewards").numpy(),
        row.flat("values").numpy(),
        row.segment.numpy(),
        gamma=row.param("gamma", 1.0),
        lam=row.param("lam", 1.0),
    )
    if row.param("advantages_whitened", default=False):
        advantages = whitened(advantages, eps=1e-8)
    return {"returns": row.spread(returns), "advantages": row.spread(advantages, masked=0.0)}


def reward_to_go(row: Row) -> Array:
    rewards = row.flat("token_level_rewards").numpy()
    return discounted_sums(rewards, row.segment.numpy(), discount=row.param("gamma", 1.0))


def reinforce_pp_returns(row: Row) -> Outputs:
    return {"returns": row.spread(reward_to_go(row))}


def reinforce_whitened_advantage(row: Row) -> Outputs:
    return with_sum(row.spread(whitened(reward_to_go(row), eps=1e-8), masked=0.0))


def masked_loss_sum(row: Row) -> Outputs:
    owner = row.segment.numpy()
    weight = aggregation_weights(owner, owner, aggregation="constant", constant=1 / len(np.unique(owner)))
    return {"value": np.asarray((row.flat("loss").numpy() * weight).sum())}


def approx_kl_of(row: Row) -> Outputs:
    found = approx_kl(row.flat("logprobs"), row.flat("ref_logprobs"), estimator=row.param("estimator", "k3"))
    return {"kl": row.spread(found, masked=0.0)}


def tis_ratio(row: Row) -> Outputs:
    """A sequence's ratio is the product of its tokens' ratios."""
    scope, cap = row.scope("token"), row.param("cap", float("inf"))
    log_ratio = scoped_log_ratio(row.log_ratio("old_logprobs", "rollout_logprobs"), scope, product=True)
    found = truncated_weights(log_ratio, high=cap)
    ratio = row.spread(found) if scope is None else row.per_sequence(found)
    is_capped = log_ratio.exp() > cap
    fraction = is_capped.double() if scope is None else torch.from_numpy(row.per_sequence(is_capped, empty=0.0))
    return {"ratio": ratio, "capped_fraction": fraction.mean().numpy()}


def sequence_mask(row: Row) -> Outputs:
    is_product = row.param("metric", "geometric") == "product"
    log_ratio = row.log_ratio("old_logprobs", "rollout_logprobs")
    scope = row.scope("sequence")
    kept = inside(scoped_log_ratio(log_ratio, scope, product=is_product), **row.bounds())
    return {"mask": row.spread(kept, masked=0.0) if scope is None else row.per_sequence(kept)}


def outlier_sequence_mask(row: Row) -> Outputs:
    log_ratio = row.log_ratio("old_logprobs", "rollout_logprobs")
    return {"mask": row.per_sequence(without_outliers(log_ratio, row.segment, **row.bounds()))}


def off_policy_sequence_mask(row: Row) -> Outputs:
    log_ratio = row.log_ratio("per_token_logps", "sampling_per_token_logps")
    advantages = row.tensor("advantages")[row.segment]
    kept = without_off_policy_negatives(
        log_ratio, row.segment, advantages, threshold=row.param("threshold", float("inf"))
    )
    return {"mask": row.per_sequence(kept)}


def loss_outputs(row: Row, losses: Tensor) -> Outputs:
    return {"per_token": row.spread(losses), "sum": losses.sum().numpy(), "loss": losses.mean().numpy()}


def ppo_dual_clip_loss(row: Row) -> Outputs:
    low = row.param("eps_low", 0.2)
    losses, _ = clipped_surrogate(
        row.log_ratio("logprobs", "old_logprobs"),
        row.flat("advantages"),
        clip_low=low,
        clip_high=row.param("eps_high", low),
        dual_clip=row.param("clip_c", None),
    )
    return loss_outputs(row, losses)


def cispo_loss(row: Row) -> Outputs:
    logprobs, low = row.flat("logprobs"), row.param("eps_low", 0.2)
    log_ratio = row.log_ratio("logprobs", "old_logprobs")
    losses, _ = cispo(logprobs, log_ratio, row.flat("advantages"), clip_low=low, clip_high=row.param("eps_high", low))
    return loss_outputs(row, losses)


def gspo_loss_adv_mean(row: Row) -> Outputs:
    """The case averages the advantage over the sequence; with one ratio for all tokens the mean loss is the same."""
    log_ratio, scope = row.log_ratio("logprobs", "proximal_logprobs"), row.scope("sequence")
    log_ratio = log_ratio if scope is None else sequence_log_ratio(log_ratio, scope)
    clip = row.param("eps_clip", 0.2)
    losses, _ = clipped_surrogate(log_ratio, row.flat("advantages"), clip_low=clip, clip_high=clip)
    if row.has("old_logprobs"):
        losses = losses * (row.flat("proximal_logprobs") - row.flat("old_logprobs")).exp()
    return loss_outputs(row, losses)


def sequence_ratio_geomean(row: Row) -> Outputs:
    log_ratio = row.log_ratio("logprobs", "proximal_logprobs")
    return {"ratio": row.spread(sequence_log_ratio(log_ratio, row.segment).exp())}


def behave_weight_clamp(row: Row) -> Outputs:
    """A sequence's weight is the geometric mean of its tokens' weights, given to each of them."""
    bounds = row.bounds("lower", "upper")
    assert bounds["low"] == 0.0, "a lower clamp is not built"
    log_ratio = scoped_log_ratio(row.log_ratio("proximal_logprobs", "old_logprobs"), row.scope("token"))
    return {"weight": row.spread(truncated_weights(log_ratio, high=bounds["high"]))}


def reject_mask_ratio(row: Row) -> Outputs:
    log_ratio = scoped_log_ratio(row.log_ratio("proximal_logprobs", "old_logprobs"), row.scope("token"))
    return {"mask": row.spread(inside(log_ratio, **row.bounds("lower", "upper")), masked=0.0)}


ADAPTERS: dict[str, Callable[[Row], Outputs]] = {
    "approx_kl": approx_kl_of,
    "behave_weight_clamp": behave_weight_clamp,
    "cispo_loss": cispo_loss,
    "gae": gae,
    "group_centered_advantage": group_centered_advantage,
    "grpo_advantage": grpo_advantage,
    "gspo_loss_adv_mean": gspo_loss_adv_mean,
    "masked_loss_sum": masked_loss_sum,
    "maxrl_advantage": maxrl_advantage,
    "maxrl_scalar_advantage": maxrl_scalar_advantage,
    "off_policy_sequence_mask": off_policy_sequence_mask,
    "outlier_sequence_mask": outlier_sequence_mask,
    "ppo_dual_clip_loss": ppo_dual_clip_loss,
    "reinforce_pp_returns": reinforce_pp_returns,
    "reinforce_whitened_advantage": reinforce_whitened_advantage,
    "reject_mask_ratio": reject_mask_ratio,
    "rloo_advantage": rloo_advantage,
    "sequence_mask": sequence_mask,
    "sequence_ratio_geomean": sequence_ratio_geomean,
    "tis_ratio": tis_ratio,
}
