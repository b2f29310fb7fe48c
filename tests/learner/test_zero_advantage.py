"""Contexts whose advantages are all 0 are not computed, and the gradient does not change."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.losses import PPO
from learner.batch.flatten import flatten
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.learner_config import LearnerConfig, OptimizerConfig
from protocol.types import TrajectoryGroup
from tests.learner.configs import advantage_config, correction, loss_config
from tests.learner.tiny import group, tiny_model

TEMPERATURE = 0.7
STEP = 5
ESTIMATORS = {
    "grpo": advantage_config(),
    "dr_grpo": advantage_config(normalize_std=False),
    "rloo": advantage_config(use="rloo"),
    "maxrl": advantage_config(use="maxrl"),
    "reinforce_pp": advantage_config(use="reinforce_pp", whiten=False),
    "gae": advantage_config(use="gae"),
    "role_weights": advantage_config(role_weights={"reader": 0.0}),
}
LOSSES = {
    "ppo": {"clip_low": 0.05, "clip_high": 0.05, "dual_clip": 1.05},
    "gspo": {"use": "gspo", "clip_low": 0.02, "clip_high": 0.02},
    "cispo": {"use": "cispo", "clip_low": 0.05},
    "kl": {"kl_coefficient": 0.3},
    "kl in the reward": {"kl_coefficient": 0.3, "kl_in": "reward"},
    "entropy": {"entropy_coefficient": 0.1},
}
CORRECTIONS = {
    "none": (),
    "truncate by token": (correction("truncate", high=1.5),),
    "mask by context": (correction("mask", scope="context", low=0.5, high=1.5),),
    "truncate by trajectory": (correction("truncate", scope="trajectory", high=1.5),),
    "second moment": (correction("second_moment", threshold=0.5),),
    "worst of the trajectory": (
        correction("reject", scope="trajectory", ratio="worst", low=0.02, high=30.0),
        correction("reject_negative", threshold=0.05),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def with_roles(one: TrajectoryGroup) -> TrajectoryGroup:
    """Every second context of a trajectory has the role `reader`."""
    return dataclasses.replace(
        one,
        trajectories=tuple(
            dataclasses.replace(
                t,
                contexts=tuple(
                    dataclasses.replace(c, role="reader" if k % 2 else "agent") for k, c in enumerate(t.contexts)
                ),
            )
            for t in one.trajectories
        ),
    )


def random_groups(seed: int, *, num_groups: int = 4) -> list[TrajectoryGroup]:
    """Groups of random rewards; half of them have equal rewards. Some tokens are over age at step 5, bound 2."""
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(num_groups):
        num_contexts = tuple(rng.integers(1, 4, size=int(rng.integers(2, 5))).tolist())
        rewards = rng.choice([0.0, 0.5, 1.0], size=len(num_contexts))
        rewards[0] = 1.0 - rewards[-1] if number % 2 else rewards[-1]
        if number % 2 == 0:
            rewards[:] = 0.0
        versions = tuple(sorted(rng.choice([2, 3, 4, 5], size=2).tolist()))
        made = group(
            1000 * seed + number,
            num_contexts=num_contexts,
            rewards=tuple(rewards.tolist()),
            versions=versions,
            lengths=(4, 16),
            cursor=number,
        )
        groups.append(with_roles(made))
    return groups


def config_of(
    estimator: str = "grpo",
    loss: str = "ppo",
    corrections: str = "truncate by token",
    *,
    skip: bool,
    aggregation: str = "trajectory",
    minibatches: int = 1,
    budget: int = 64,
    **options: Any,
) -> LearnerConfig:
    return LearnerConfig(
        staleness_bound=2,
        tokens_per_micro_batch=budget,
        skip_zero_advantage=skip,
        advantage=ESTIMATORS[estimator],
        loss=loss_config(
            **LOSSES[loss],
            corrections=CORRECTIONS[corrections],
            aggregation=aggregation,
            constant=20.0,
            minibatches=minibatches,
        ),
        **options,
    )


def trainer_of(config: LearnerConfig, *, dtype: torch.dtype = torch.float64) -> Trainer:
    reference = Policy(tiny_model(seed=7, dtype=dtype), ()) if config.loss.kl_coefficient else None
    return Trainer(
        policy=Policy(tiny_model(dtype=dtype), ()), config=config, temperature=TEMPERATURE, reference=reference
    )


def gradient(
    config: LearnerConfig, groups: Sequence[TrajectoryGroup], *, dtype: torch.dtype = torch.float64, move: bool = True
) -> tuple[Tensor, float]:
    """(gradient, loss) of all minibatches; `move` changes the weights after pi_prox is known, so that r is not 1."""
    trainer = trainer_of(config, dtype=dtype)
    batch = flatten(groups)
    plan = trainer.plan(batch, step=STEP)
    tokens = trainer.prepare(batch, plan, step=STEP)
    if move and tokens.proximal is not None:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.policy.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    loss = sum(trainer.accumulate(minibatch, tokens).loss for minibatch in plan.minibatches)
    parameters = list(trainer.scorer.parameters())
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters]
    return torch.cat(flat), loss


def num_computed(config: LearnerConfig, groups: Sequence[TrajectoryGroup]) -> tuple[int, int]:
    """Tokens of the training pass, and of passes without gradient."""
    plan = trainer_of(config).plan(flatten(groups), step=STEP)
    training = sum(len(part.tokens) for minibatch in plan.minibatches for part in minibatch)
    return training, sum(len(part.tokens) for part in plan.prepass)


def assert_same_gradient(groups: Sequence[TrajectoryGroup], *arguments: str, **options: Any) -> None:
    wanted, loss_without = gradient(config_of(*arguments, skip=False, **options), groups)
    found, loss = gradient(config_of(*arguments, skip=True, **options), groups)
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())
    assert loss == pytest.approx(loss_without, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("corrections", CORRECTIONS)
def test_the_gradient_is_the_same_for_all_estimators_and_corrections(estimator: str, corrections: str) -> None:
    assert_same_gradient(random_groups(1), estimator, "ppo", corrections)


@pytest.mark.parametrize("corrections", ["none", "second moment"])
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_the_gradient_is_the_same_in_several_minibatches(loss: str, corrections: str) -> None:
    assert_same_gradient(random_groups(1), "rloo", loss, corrections, minibatches=3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", ["trajectory", "context", "token", "constant"])
def test_the_gradient_is_the_same_for_all_losses_and_aggregations(loss: str, aggregation: str) -> None:
    estimator = "dr_grpo" if loss == "kl in the reward" else "grpo"
    assert_same_gradient(random_groups(2), estimator, loss, "truncate by trajectory", aggregation=aggregation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("corrections", CORRECTIONS)
def test_the_gradient_is_bitwise_the_same_if_whole_micro_batches_are_left_out(
    loss: str, corrections: str, dtype: torch.dtype
) -> None:
    """Every context is a separate micro-batch, so the others are computed as before and in the same order."""
    groups = random_groups(3)
    found = [gradient(config_of("grpo", loss, corrections, skip=skip, budget=1), groups, dtype=dtype) for skip in
             (True, False)]  # fmt: skip
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_contexts_of_groups_with_equal_rewards_are_not_computed() -> None:
    groups = random_groups(4)
    batch = flatten(groups)
    trained = batch.sampled.version >= STEP - 2
    different = np.array([number % 2 == 1 for number in range(len(groups))])
    wanted = int((trained & different[batch.group][batch.sampled.trajectory]).sum())
    assert num_computed(config_of(skip=True), groups) == (wanted, wanted)
    assert num_computed(config_of(skip=False), groups) == (int(trained.sum()),) * 2
    assert 0 < wanted < trained.sum()


def test_a_correction_scores_its_whole_scope_and_training_only_the_rest() -> None:
    """Role weight 0: half of the contexts of a live trajectory have advantage 0."""
    groups = random_groups(4)
    by_token, by_trajectory, by_batch = (
        num_computed(config_of("role_weights", "ppo", name, skip=True), groups)
        for name in ("truncate by token", "truncate by trajectory", "second moment")
    )
    everything = num_computed(config_of(skip=False), groups)[0]
    assert by_token[0] == by_trajectory[0] == by_batch[0] == by_token[1]
    assert by_token[1] < by_trajectory[1] < by_batch[1] == everything


@pytest.mark.parametrize(("estimator", "loss"), [("grpo", "kl"), ("grpo", "entropy"), ("gae", "ppo"),
                                                 ("dr_grpo", "kl in the reward")])  # fmt: skip
def test_other_terms_of_the_loss_need_every_context(estimator: str, loss: str) -> None:
    groups = random_groups(4)
    arguments = (estimator, loss)
    assert num_computed(config_of(*arguments, skip=True), groups) == num_computed(
        config_of(*arguments, skip=False), groups
    )


def test_a_drift_check_computes_every_context() -> None:
    groups = random_groups(4)
    everything = num_computed(config_of(skip=False), groups)
    assert num_computed(config_of(skip=True, check_drift=True), groups) == everything


class Undeclared(PPO):
    """A user's loss: it inherits PPO, and could add terms that do not depend on the advantage."""


class Declared(PPO):
    is_zero_without_advantage = True


@pytest.mark.parametrize(("name", "skips"), [("Undeclared", False), ("Declared", True)])
def test_an_imported_loss_must_declare_that_it_is_zero_without_advantage(name: str, skips: bool) -> None:
    groups = random_groups(4)
    config = LearnerConfig(staleness_bound=2, loss=loss_config(use=f"{__name__}:{name}"))
    everything = num_computed(config_of(skip=False), groups)
    assert (num_computed(config, groups) != everything) == skips


def test_a_context_with_over_age_tokens_only_is_not_computed() -> None:
    old, young = group(1, versions=(0,)), group(2, versions=(5,))
    training, _ = num_computed(config_of(skip=False), [old, young])
    assert training == len(flatten([young]).sampled)


def states(trainer: Trainer) -> list[Tensor]:
    """Copies of the weights and of AdamW's state."""
    parameters = list(trainer.scorer.parameters())
    moments = [each for p in parameters for each in trainer.optimizer.state[p].values()]
    return [each.detach().clone() for each in (*parameters, *moments)]


@pytest.mark.parametrize("skip", [True, False])
def test_a_batch_without_advantages_changes_nothing_and_warns(skip: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(config_of(skip=skip, optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=0.1)))
    trainer.train_step([group(0, versions=(STEP,))], step=STEP)
    before = states(trainer)
    with caplog.at_level(logging.WARNING):
        values = trainer.train_step([group(1, rewards=(1.0,) * 4, versions=(STEP,))], step=STEP).values
    assert all(map(torch.equal, before, states(trainer)))
    assert [each.getMessage() for each in caplog.records] == ["every advantage of step 5 is 0: nothing was trained"]
    assert values["learner/grad_norm"] == values["learner/loss"] == 0.0
    assert values["learner/skipped_tokens"] == (1.0 if skip else 0.0)
    assert values["learner/trained_tokens"] == len(flatten([group(1)]).sampled)
    assert ("policy/entropy" in values) != skip  # no token was computed, so there is no mean


def test_weights_are_the_same_after_steps_with_and_without_skipping() -> None:
    """Three minibatches a step, one of them without signal; then a batch without any."""
    optimizer = OptimizerConfig(learning_rate=0.01, eps=1e-3, weight_decay=0.1)
    weights = []
    for skip in (True, False):
        trainer = trainer_of(config_of(skip=skip, minibatches=3, optimizer=optimizer))
        for batch in (random_groups(5), [group(9, rewards=(0.0,) * 4, versions=(STEP,))], random_groups(6)):
            trainer.train_step(batch, step=STEP)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.scorer.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-10, atol=1e-12)


def test_metrics_of_all_trained_tokens_do_not_change() -> None:
    found, wanted = (trainer_of(config_of(skip=skip)).train_step(random_groups(7), step=STEP) for skip in (True, False))
    for tag in ("learner/trained_tokens", "learner/trained_contexts", "learner/trained_trajectories", "staleness/mean",
                "staleness/max", "staleness/over_age_tokens", "learner/advantage_mean"):  # fmt: skip
        assert found.values[tag] == wanted.values[tag], tag
    assert found.tokens_by_age == wanted.tokens_by_age
    assert found.tokens_by_context == wanted.tokens_by_context
    assert found.values["learner/grad_norm"] == pytest.approx(wanted.values["learner/grad_norm"], rel=1e-12)
    assert 0 < found.values["learner/skipped_tokens"] < 1
    assert wanted.values["learner/skipped_tokens"] == 0
