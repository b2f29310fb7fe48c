"""Advantages, corrections and losses against the published vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.advantages import Credit, grpo_advantages, maxrl_advantages, token_advantages
from learner.algorithms.importance_weights import (
    inside,
    masked_weights,
    negative_on_policy,
    scoped_log_ratio,
    truncated_weights,
    without_outliers,
)
from learner.algorithms.losses import approx_kl, cispo, clipped_surrogate, sequence_log_ratio
from learner.algorithms.returns import discounted_sums, generalized_advantages, whitened
from learner.batch.flatten import aggregation_weights
from protocol.algorithm_config import AdvantageConfig

DATA = Path(os.environ.get("PALIMPSEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
VECTORS = DATA / "vectors" / "rl_vectors.jsonl"

NOT_BUILT = {
    "prox_logp_loglinear": "never needed: proximal log-probs are computed, not interpolated",
    "prox_logp_linear": "never needed: proximal log-probs are computed, not interpolated",
}
"""Operations of the vectors that the learner does not have yet, and why."""


class Row:
    """One vector: inputs as float64 tensors, all contexts [R, L] with a mask."""

    def __init__(self, raw: dict) -> None:
        self.op: str = raw["op"]
        self.params: dict = raw["params"]
        self.expected: dict = raw["expected"]
        self.inputs: dict = raw["inputs"]
        self.tolerance = {"rtol": raw["rtol"], "atol": raw["atol"]}

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self.inputs[name], dtype=torch.float64)

    @property
    def mask(self) -> Tensor:
        return self.tensor("mask").bool()

    def flat(self, name: str) -> Tensor:
        return self.tensor(name)[self.mask]

    @property
    def segment(self) -> Tensor:
        """The row of each unmasked token."""
        return torch.nonzero(self.mask)[:, 0]

    def check(self, found: Tensor | np.ndarray | float, key: str) -> None:
        np.testing.assert_allclose(np.asarray(found), np.asarray(self.expected[key], dtype=float), **self.tolerance)


def credit_of(rewards: np.ndarray, groups: Sequence[int]) -> Credit:
    """Trajectories of one context of one token."""
    index, zeros = np.arange(len(rewards)), np.zeros(len(rewards), dtype=np.int64)
    return Credit(rewards, np.array(groups), index, zeros, zeros, index, index, zeros, ("agent",))


def _check_group_estimator(row: Row, config: AdvantageConfig) -> None:
    rewards = row.tensor("token_level_rewards").sum(1).numpy()
    found = token_advantages(credit_of(rewards, row.inputs["group"]), config).advantage
    row.check(found[:, None] * row.tensor("response_mask").numpy(), "advantages")


def check_grpo_advantage(row: Row) -> None:
    _check_group_estimator(row, AdvantageConfig(normalize_std=row.params["norm_by_std"]))


def check_rloo_advantage(row: Row) -> None:
    _check_group_estimator(row, AdvantageConfig(estimator="rloo"))


def check_maxrl_advantage(row: Row) -> None:
    _check_group_estimator(row, AdvantageConfig(estimator="maxrl"))


def check_maxrl_scalar_advantage(row: Row) -> None:
    row.check(maxrl_advantages(row.inputs["rewards"]), "advantages")


def check_group_centered_advantage(row: Row) -> None:
    row.check(grpo_advantages(row.inputs["rewards"], normalize_std=False).sum(), "sum")


def check_gae(row: Row) -> None:
    mask = row.tensor("response_mask").bool()
    rewards, values = (row.tensor(name)[mask].numpy() for name in ("token_level_rewards", "values"))
    chain = torch.nonzero(mask)[:, 0].numpy()
    _, returns = generalized_advantages(rewards, values, chain, gamma=row.params["gamma"], lam=row.params["lam"])
    row.check(returns.reshape(mask.shape), "returns")


def returns_of(row: Row) -> tuple[Tensor, np.ndarray]:
    """(mask, reward-to-go [N]): the vectors' masked tokens have returns that nothing reads."""
    mask = row.tensor("response_mask").bool()
    rewards = row.tensor("token_level_rewards")[mask].numpy()
    return mask, discounted_sums(rewards, torch.nonzero(mask)[:, 0].numpy(), discount=row.params["gamma"])


def check_reinforce_pp_returns(row: Row) -> None:
    mask, returns = returns_of(row)
    wanted = torch.tensor(row.expected["returns"], dtype=torch.float64)[mask].numpy()
    np.testing.assert_allclose(returns, wanted, **row.tolerance)


def check_reinforce_whitened_advantage(row: Row) -> None:
    mask, returns = returns_of(row)
    found = np.zeros(mask.shape)
    found[mask.numpy()] = whitened(returns, eps=1e-8)
    row.check(found, "advantages")


def check_masked_loss_sum(row: Row) -> None:
    owner = row.segment.numpy()
    weight = aggregation_weights(owner, owner, aggregation="constant", constant=1 / len(row.inputs["loss"]))
    row.check((row.flat("loss").numpy() * weight).sum(), "value")


def check_approx_kl(row: Row) -> None:
    found = torch.zeros(row.mask.shape, dtype=torch.float64)
    found[row.mask] = approx_kl(row.flat("logprobs"), row.flat("ref_logprobs"), estimator=row.params["estimator"])
    row.check(found, "kl")


def check_tis_ratio(row: Row) -> None:
    log_ratio = row.flat("old_logprobs") - row.flat("rollout_logprobs")
    if row.params["level"] == "sequence":
        log_ratio = scoped_log_ratio(log_ratio, row.segment, product=True)[:1]
    found = truncated_weights(log_ratio, high=row.params["cap"])
    row.check(found[None], "ratio")
    row.check((log_ratio.exp() > row.params["cap"]).double().mean(), "capped_fraction")


def check_sequence_mask(row: Row) -> None:
    log_ratio = row.flat("old_logprobs") - row.flat("rollout_logprobs")
    scoped = scoped_log_ratio(log_ratio, row.segment, product=row.params["metric"] == "product")
    kept = inside(scoped, low=row.params["low"], high=row.params["high"])
    row.check(kept[:1, None].double(), "mask")


def check_outlier_sequence_mask(row: Row) -> None:
    log_ratio = row.flat("old_logprobs") - row.flat("rollout_logprobs")
    kept = without_outliers(log_ratio, row.segment, low=row.params["low"], high=row.params["high"])
    row.check(kept[:1, None].double(), "mask")


def check_off_policy_sequence_mask(row: Row) -> None:
    log_ratio = row.flat("per_token_logps") - row.flat("sampling_per_token_logps")
    advantages = row.tensor("advantages")[row.segment]
    kept = negative_on_policy(log_ratio, row.segment, advantages, threshold=row.params["threshold"])
    first = torch.searchsorted(row.segment, torch.arange(len(row.mask)))
    row.check(kept[first, None].double(), "mask")


def check_ppo_dual_clip_loss(row: Row) -> None:
    found, _ = clipped_surrogate(
        row.flat("logprobs") - row.flat("old_logprobs"),
        row.flat("advantages"),
        clip_low=row.params["eps_low"],
        clip_high=row.params["eps_high"],
        dual_clip=row.params["clip_c"],
    )
    row.check(found[None], "per_token")
    row.check(found.sum(), "sum")


def check_cispo_loss(row: Row) -> None:
    logprobs = row.flat("logprobs")
    low, high = row.params["eps_low"], row.params["eps_high"]
    log_ratio = logprobs - row.flat("old_logprobs")
    found, _ = cispo(logprobs, log_ratio, row.flat("advantages"), clip_low=low, clip_high=high)
    row.check(found.sum(), "sum")


def check_gspo_loss_adv_mean(row: Row) -> None:
    """The vector averages the advantage over the sequence; with one ratio for all tokens the mean loss is the same."""
    log_ratio = sequence_log_ratio(row.flat("logprobs") - row.flat("proximal_logprobs"), row.segment)
    clip = row.params["eps_clip"]
    found, _ = clipped_surrogate(log_ratio, row.flat("advantages"), clip_low=clip, clip_high=clip)
    row.check(found.mean(), "loss")


def check_sequence_ratio_geomean(row: Row) -> None:
    log_ratio = row.flat("logprobs") - row.flat("proximal_logprobs")
    row.check(sequence_log_ratio(log_ratio, row.segment).exp().reshape(row.mask.shape), "ratio")


def check_behave_weight_clamp(row: Row) -> None:
    log_ratio = row.flat("proximal_logprobs") - row.flat("old_logprobs")
    row.check(truncated_weights(log_ratio, high=row.params["upper"])[None], "weight")


def check_reject_mask_ratio(row: Row) -> None:
    log_ratio = row.flat("proximal_logprobs") - row.flat("old_logprobs")
    row.check((masked_weights(log_ratio, low=0.0, high=row.params["upper"]) > 0)[None].double(), "mask")


CHECKS: dict[str, Callable[[Row], None]] = {
    name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")
}


@pytest.mark.skipif(not VECTORS.exists(), reason=f"no vectors at {VECTORS}; set PALIMPSEST_DATA")
def test_every_vector_of_an_operation_that_we_have_passes() -> None:
    rows = [Row(json.loads(line)) for line in VECTORS.read_text().splitlines()]
    operations = {row.op for row in rows}
    assert operations == CHECKS.keys() | NOT_BUILT.keys()
    for row in rows:
        if row.op in CHECKS:
            CHECKS[row.op](row)
