"""Losses, corrections, KL and PPO of the trainer against loops over tokens and plain forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.importance_weights import make_corrections, needs_prepass
from learner.batch.flatten import flatten
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.algorithm_config import ValueConfig
from protocol.learner_config import LearnerConfig, OptimizerConfig
from protocol.types import Context
from tests.learner.configs import advantage_config, correction, loss_config
from tests.learner.reference import (
    accumulate_reference,
    frozen,
    full_logprobs,
    reference_loss,
    reference_token_advantages,
    trajectories_of,
)
from tests.learner.test_trainer import STEP, TEMPERATURE, distance, gradient_of, uneven_groups
from tests.learner.tiny import group, tiny_model

LOSSES = {
    "gspo": loss_config(use="gspo", clip_low=0.05, clip_high=0.05),
    "cispo": loss_config(use="cispo", clip_low=0.05, clip_high=0.1),
    "dual_clip": loss_config(clip_low=0.05, clip_high=0.05, dual_clip=1.05),
    "kl": loss_config(kl_coefficient=0.3, kl_estimator="k3"),
    "kl_k1": loss_config(kl_coefficient=0.3, kl_estimator="k1"),
    "second_moment": loss_config(
        corrections=(correction("second_moment", threshold=0.5), correction("truncate", high=1.5))
    ),
    "masks": loss_config(
        corrections=(
            correction("reject", scope="trajectory", low=0.3, high=3.0),
            correction("reject_negative", threshold=0.05),
            correction("mask", low=0.1, high=4.0),
        )
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer_of(config: LearnerConfig, *, with_reference: bool = False) -> Trainer:
    reference = Policy(tiny_model(seed=7, dtype=torch.float64), ()) if with_reference else None
    model = tiny_model(dtype=torch.float64)
    return Trainer(policy=Policy(model, ()), config=config, temperature=TEMPERATURE, reference=reference)


def accumulate_after_a_move(trainer: Trainer) -> None:
    """Changes the model after the proximal log-probs are computed, then accumulates all minibatches' gradients."""
    batch = flatten(uneven_groups())
    plan = trainer.plan(batch, step=STEP)
    tokens = trainer.prepare(batch, plan, step=STEP)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.scorer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for minibatch in plan.minibatches:
        trainer.accumulate(minibatch, tokens)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_other_weights_than_the_proximal_policy_equals_the_reference(name: str) -> None:
    num_parts = 1 if name == "second_moment" else 2  # second_moment is computed over the whole batch, not per minibatch
    loss = LOSSES[name].model_copy(update={"minibatches": num_parts})
    config = LearnerConfig(staleness_bound=2, tokens_per_micro_batch=64, loss=loss)
    if num_parts == 1:
        assert needs_prepass(make_corrections(loss.corrections))
    trainer = trainer_of(config, with_reference=loss.kl_coefficient > 0)
    model = trainer.policy.model
    everything = trajectories_of(uneven_groups())
    contexts = [context for trajectory, _ in everything for context in trajectory.contexts]
    proximal = frozen(tiny_model(dtype=torch.float64), temperature=TEMPERATURE, contexts=contexts)
    other = frozen(tiny_model(seed=7, dtype=torch.float64), temperature=TEMPERATURE) if trainer.reference else None
    accumulate_after_a_move(trainer)
    found = gradient_of(model)

    model.zero_grad(set_to_none=True)
    for part in np.array_split(np.arange(len(everything)), num_parts):
        now = frozen(model, temperature=TEMPERATURE)
        chosen = [everything[i] for i in part]
        wanted = reference_loss(chosen, step=STEP, current=now, proximal=proximal, config=config, reference=other)
        accumulate_reference(model, wanted, temperature=TEMPERATURE)
    assert gradient_of(model).norm() > 1e-3
    assert distance(found, gradient_of(model)) < 1e-5


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "maxrl", "reinforce_pp", "gae"])
def test_a_batch_of_over_age_tokens_only_changes_nothing(estimator: str) -> None:
    advantage = advantage_config(use=estimator)  # pyright: ignore[reportArgumentType]
    trainer = trainer_of(LearnerConfig(staleness_bound=0, advantage=advantage))
    before = [parameter.clone() for parameter in trainer.scorer.parameters()]
    values = trainer.train_step(uneven_groups(), step=50).values
    for tag in ("learner/trained_tokens", "learner/loss", "learner/grad_norm", "learner/skipped_updates"):
        assert values[tag] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.scorer.parameters(), strict=True))


def values_of(trainer: Trainer, context: Context) -> Tensor:
    """[L] with gradient: the value before each token, by a plain forward; [0] is 0."""
    ids = torch.from_numpy(context.token_ids.astype(np.int64))[None]
    head = trainer.scorer.value_head
    assert head is not None
    hidden = trainer.policy.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    values = head(hidden).squeeze(-1)[:-1]
    return torch.cat([values.new_zeros(1), values])


def test_ppo_with_a_value_head_equals_plain_forwards_and_loops() -> None:
    config = LearnerConfig(
        staleness_bound=2,
        tokens_per_micro_batch=64,
        advantage=advantage_config(use="gae", gamma=0.95, lam=0.9),
        loss=loss_config(corrections=(), aggregation="token", value=ValueConfig(coefficient=0.7)),
    )
    trainer = trainer_of(config)
    head = trainer.scorer.value_head
    assert head is not None
    torch.manual_seed(3)
    with torch.no_grad():
        head.weight.normal_(std=0.5)
    batch = flatten(uneven_groups())
    plan = trainer.plan(batch, step=STEP)
    tokens = trainer.prepare(batch, plan, step=STEP)
    (minibatch,) = plan.minibatches
    watched = trainer.accumulate(minibatch, tokens)
    found, found_head = gradient_of(trainer.policy.model), head.weight.grad
    assert found_head is not None

    trainer.scorer.zero_grad(set_to_none=True)
    contexts = [c for t, _ in trajectories_of(uneven_groups()) for c in t.contexts]
    sampled, trained = batch.sampled, np.flatnonzero(plan.trained)
    logprobs = [full_logprobs(trainer.policy.model, context, temperature=TEMPERATURE) for context in contexts]
    values = [values_of(trainer, context) for context in contexts]
    places = [(int(sampled.context[n]), int(sampled.position[n])) for n in trained]
    now = torch.stack([values[c][t] for c, t in places])
    advantages, returns = reference_token_advantages(batch.credit(plan.trained), config.advantage, values=now.tolist())
    assert returns is not None
    logp = torch.stack([logprobs[c][t] for c, t in places])
    policy = -(logp - logp.detach()).exp() * torch.tensor(advantages)
    value = (now - torch.tensor(returns)).square() / 2
    loss = ((policy + 0.7 * value) / len(sampled)).sum()
    loss.backward()
    assert watched.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert distance(found, gradient_of(trainer.policy.model)) < 1e-5
    torch.testing.assert_close(found_head, head.weight.grad, rtol=1e-5, atol=1e-8)
    assert float(found_head.norm()) > 1e-3


def test_the_value_head_is_trained_with_its_own_learning_rate() -> None:
    """The policy's rate is 0: only the value head moves."""
    optimizer = OptimizerConfig(learning_rate=0.0, value_learning_rate=0.01)
    trainer = trainer_of(LearnerConfig(staleness_bound=2, advantage=advantage_config(use="gae"), optimizer=optimizer))
    before = {name: p.detach().clone() for name, p in trainer.scorer.named_parameters()}
    trainer.train_step(uneven_groups(), step=STEP)
    moved = {name for name, p in trainer.scorer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"value_head.weight", "value_head.bias"}


def test_a_kl_in_the_reward_gives_groups_of_equal_task_rewards_advantages_of_its_own_size() -> None:
    """The std of GRPO would scale them to +-1.4; the config refuses it."""
    loss = loss_config(kl_coefficient=1e-6, kl_in="reward")
    trainer = trainer_of(
        LearnerConfig(staleness_bound=9, loss=loss, advantage=advantage_config(use="rloo")), with_reference=True
    )
    batch = flatten([group(0, rewards=(1.0,) * 4)])
    tokens = trainer.prepare(batch, trainer.plan(batch, step=0), step=0)
    assert 0 < float(tokens.advantages.abs().max()) < 1e-3
    with pytest.raises(ValueError, match=r"learner\.loss\.kl_in must be 'loss'"):
        LearnerConfig(loss=loss)


def test_a_kl_in_the_reward_changes_advantages_by_the_mean_kl_of_each_trajectory() -> None:
    loss = loss_config(kl_coefficient=0.5, kl_estimator="k1", kl_in="reward", corrections=())
    config = LearnerConfig(staleness_bound=9, loss=loss, advantage=advantage_config(normalize_std=False))
    trainer = trainer_of(config, with_reference=True)
    batch = flatten(uneven_groups())
    tokens = trainer.prepare(batch, trainer.plan(batch, step=STEP), step=STEP)
    everything = trajectories_of(uneven_groups())
    now = frozen(tiny_model(dtype=torch.float64), temperature=TEMPERATURE)
    other = frozen(tiny_model(seed=7, dtype=torch.float64), temperature=TEMPERATURE)
    penalties = [
        sum(0.5 * float((now(c) - other(c))[c.loss_mask].sum()) for c in trajectory.contexts)
        for trajectory, _ in everything
    ]
    owner = batch.sampled.trajectory
    for i, (trajectory, _) in enumerate(everything):
        fellows = [j for j in range(len(everything)) if batch.group[j] == batch.group[i]]
        rewards = {j: everything[j][0].reward - penalties[j] for j in fellows}
        wanted = rewards[i] - sum(rewards.values()) / len(rewards) if len(fellows) > 1 else 0.0
        assert tokens.advantages[torch.from_numpy(owner == i)].tolist() == pytest.approx(
            [wanted] * int((owner == i).sum()), abs=1e-4
        ), trajectory.reward
