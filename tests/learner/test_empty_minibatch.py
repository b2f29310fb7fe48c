"""A minibatch without trained tokens, or with advantages of 0 only, makes no update; one of masked tokens makes one."""

from __future__ import annotations

import pytest
import torch

from learner.algorithms.importance_weights import make_corrections
from learner.model.loading import Policy
from learner.training.trainer import Trainer
from protocol.learner_config import LearnerConfig, OptimizerConfig
from protocol.types import TrajectoryGroup
from tests.learner.configs import correction
from tests.learner.tiny import group, tiny_model


@pytest.fixture
def trainer() -> Trainer:
    """A trainer with weight decay after one update, so that AdamW has moments."""
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)
    made = Trainer(
        policy=Policy(tiny_model(), ()), config=LearnerConfig(staleness_bound=1, num_steps=10, optimizer=optimizer)
    )
    made.train_step([group(0, versions=(0,))], step=0)
    made.guard.num_consecutive = 1
    return made


def state_after(trainer: Trainer, groups: list[TrajectoryGroup], *, step: int) -> tuple[bool, bool]:
    """Trains a step. Returns (True if the weights are unchanged, True if AdamW's state is unchanged)."""
    parameters = list(trainer.scorer.parameters())
    before = [parameter.clone() for parameter in parameters]
    moments = [{name: each.clone() for name, each in trainer.optimizer.state[p].items()} for p in parameters]
    trainer.train_step(groups, step=step)
    same_weights = all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    same_state = all(
        torch.equal(held[name], trainer.optimizer.state[p][name])
        for p, held in zip(parameters, moments, strict=True)
        for name in held
    )
    return same_weights, same_state


def test_a_minibatch_without_trained_tokens_makes_no_update_and_no_skip(trainer: Trainer) -> None:
    over_age = [group(1, versions=(0,))]
    assert state_after(trainer, over_age, step=5) == (True, True)
    assert (trainer.guard.num_skipped, trainer.guard.num_consecutive) == (0, 0)


def test_a_minibatch_of_advantage_zero_makes_no_update_and_no_skip(trainer: Trainer) -> None:
    equal_rewards = [group(1, rewards=(1.0, 1.0, 1.0, 1.0), versions=(1,))]
    assert state_after(trainer, equal_rewards, step=1) == (True, True)
    assert (trainer.guard.num_skipped, trainer.guard.num_consecutive) == (0, 0)


def test_a_minibatch_that_corrections_mask_decays_weights_and_moments(trainer: Trainer) -> None:
    trainer.corrections = make_corrections([correction("mask", low=1e8, high=1e9)])
    assert state_after(trainer, [group(1, versions=(1,))], step=1) == (False, False)
