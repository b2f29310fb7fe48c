"""Loss and corrections against the published vectors, and by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.advantage import grpo_advantages
from learner.batching import aggregation_weights
from learner.corrections import masked_weights, scoped_log_ratio, truncated_weights
from learner.loss import approx_kl, clipped_surrogate, policy_loss

DATA = Path(os.environ.get("PALIMPSEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
VECTORS = DATA / "vectors" / "rl_vectors.jsonl"

NOT_BUILT = {
    "maxrl_advantage": "issue 3: MaxRL",
    "maxrl_scalar_advantage": "issue 3: MaxRL",
    "rloo_advantage": "issue 3: RLOO",
    "gae": "issue 3: PPO with a value head",
    "reinforce_pp_returns": "issue 3: REINFORCE++",
    "reinforce_whitened_advantage": "issue 3: REINFORCE++",
    "outlier_sequence_mask": "issue 3: sequence masks by their worst token",
    "cispo_loss": "issue 3: CISPO",
    "gspo_loss_adv_mean": "issue 3: GSPO",
    "prox_logp_loglinear": "never needed: proximal log-probs are computed, not interpolated",
    "prox_logp_linear": "never needed: proximal log-probs are computed, not interpolated",
    "off_policy_sequence_mask": "issue 3: sequence masks by the sign of the advantage",
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


def check_grpo_advantage(row: Row) -> None:
    rewards, groups = row.tensor("token_level_rewards").sum(1).numpy(), np.array(row.inputs["group"])
    found = np.zeros(len(rewards))
    for one in set(groups.tolist()):
        member = groups == one
        found[member] = grpo_advantages(rewards[member], [True] * member.sum(), normalize_std=row.params["norm_by_std"])
    row.check(found[:, None] * row.tensor("response_mask").numpy(), "advantages")


def check_group_centered_advantage(row: Row) -> None:
    rewards = row.inputs["rewards"]
    row.check(grpo_advantages(rewards, [True] * len(rewards), normalize_std=False).sum(), "sum")


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
    kept = masked_weights(scoped, low=row.params["low"], high=row.params["high"]) > 0
    row.check(kept[:1, None].double(), "mask")


def check_ppo_dual_clip_loss(row: Row) -> None:
    """The tokens on which the dual clip (issue 3) does not bind: the last is at its bound c |A|."""
    found, clipped = clipped_surrogate(
        row.flat("logprobs"),
        row.flat("old_logprobs"),
        row.flat("advantages"),
        clip_low=row.params["eps_low"],
        clip_high=row.params["eps_high"],
    )
    wanted = torch.tensor(row.expected["per_token"], dtype=torch.float64)[0]
    free = wanted < row.params["clip_c"] * row.flat("advantages").abs() - 1e-6
    assert free.tolist() == [True, True, False]
    torch.testing.assert_close(found[free], wanted[free], **row.tolerance)
    assert not clipped.any()


def check_sequence_ratio_geomean(row: Row) -> None:
    log_ratio = row.flat("logprobs") - row.flat("proximal_logprobs")
    row.check(scoped_log_ratio(log_ratio, row.segment).exp().reshape(row.mask.shape), "ratio")


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


def test_one_token_with_both_signs_is_clipped_for_each_by_itself() -> None:
    """r = 1.5 with A = +1 and -1 gives -1.2 + 1.5, not 0."""
    ratio = torch.tensor([1.5, 1.5], dtype=torch.float64)
    loss, clipped = clipped_surrogate(
        ratio.log(), torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.2
    )
    assert loss.tolist() == pytest.approx([-1.2, 1.5])
    assert clipped.tolist() == [True, False]


def test_on_policy_gradient_is_minus_weight_times_advantage() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages, weight = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25])
    loss, seen = policy_loss(
        logprobs=logprobs,
        proximal=logprobs.detach(),
        behavior=logprobs.detach(),
        importance=torch.ones(3),
        advantages=advantages,
        weight=weight,
        entropy=torch.tensor([1.0, 2.0, 3.0]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -weight * advantages)
    assert (seen.num_tokens, seen.clipped, seen.kl_behavior, seen.importance_weight_max) == (3, 0.0, 0.0, 1.0)
    assert seen.mean(seen.entropy) == pytest.approx(2.0)


def test_no_tokens_give_zero_and_a_gradient() -> None:
    empty = torch.zeros(0, requires_grad=True)
    nothing = empty.detach()
    loss, seen = policy_loss(
        logprobs=empty,
        proximal=nothing,
        behavior=nothing,
        importance=nothing,
        advantages=nothing,
        weight=nothing,
        entropy=nothing,
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.backward()
    assert (float(loss.detach()), seen.num_tokens, seen.mean(seen.entropy)) == (0.0, 0, 0.0)


def test_overflowing_ratios_stay_finite_where_they_are_capped_or_masked() -> None:
    huge = torch.tensor([200.0, -200.0, 0.0])
    assert truncated_weights(huge, high=2.0).tolist() == [2.0, 0.0, 1.0]
    assert masked_weights(huge, low=0.5, high=2.0).tolist() == [0.0, 0.0, 1.0]


def test_k3_is_unbiased_and_never_negative() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, dtype=torch.float64).log_softmax(0) for _ in range(2))
    per_token = approx_kl(p, q)
    assert (per_token >= 0).all()
    torch.testing.assert_close((p.exp() * per_token).sum(), (p.exp() * (p - q)).sum())
