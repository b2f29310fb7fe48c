"""From the configuration's words to a task."""

from __future__ import annotations

from actor.rewards.reward import reward_named
from actor.tasks.qa import QuestionAnswering, read_questions
from actor.tasks.task import Task
from actor.tasks.toy.task import ToyQuestions
from actor.tasks.toy.world import make_world
from protocol.config import TaskConfig
from protocol.errors import ConfigError


def training_task(config: TaskConfig, *, seed: int) -> Task:
    """Raises: DataError where a file of questions cannot be used."""
    reward = reward_named(config.reward)
    if config.kind == "toy":
        return ToyQuestions([make_world(world) for world in config.worlds], reward=reward, seed=seed)
    return QuestionAnswering(read_questions(config.questions), reward=reward, seed=seed)


def evaluation_task(config: TaskConfig, *, seed: int) -> Task:
    """Question files are taken in their order. Raises: ConfigError where the task names nothing to evaluate on."""
    reward = reward_named(config.reward)
    if config.kind == "toy":
        if not config.eval_worlds:
            raise ConfigError("task.eval_worlds must name at least one seed to evaluate on, got none")
        return ToyQuestions([make_world(world) for world in config.eval_worlds], reward=reward, seed=seed)
    if not config.eval_questions:
        raise ConfigError("task.eval_questions must name at least one JSONL file to evaluate on, got none")
    return QuestionAnswering(read_questions(config.eval_questions), reward=reward, seed=None)
