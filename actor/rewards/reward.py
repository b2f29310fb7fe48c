"""Rewards of trajectories: the base class, and rewards for questions with gold answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from actor.episode import Episode
from actor.rewards.text import exact_match, f1
from protocol.config_base import Options
from protocol.types import Question, Status, Trajectory


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of a trajectory, a finite number. `parts` are named scalars for metrics (em, f1, format …)."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Reward(ABC):
    """Base class of rewards. `Options` describes the keys of the `[reward]` section.

    An exception from `score` fails the trajectory, not the actor: the error is counted and its traceback is logged.
    """

    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        """Returns the reward of one trajectory. Not called for FAILED trajectories.

        `trajectory` has its contexts but no reward yet. The method may await a call to a judge.
        """

    async def start(self) -> None:
        """Called once in the actor's event loop, before the first episode."""

    async def stop(self) -> None:
        """Called once after the last episode."""


class ExactMatchReward(Reward):
    """1 if the answer is right, else 0; 0 after a format error."""

    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        parts = measure(question, episode)
        return Score(parts["em"], parts)


class F1Reward(Reward):
    """The largest token F1 over the gold answers; 0 after a format error."""

    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        parts = measure(question, episode)
        return Score(parts["f1"], parts)


class MemSearcherOptions(Options):
    """Options of the reward of MemSearcher."""

    well_formed_reward: float = Field(default=0.1, description="Reward of a well-formed answer with F1 0.")


class MemSearcherReward(Reward):
    """0 after a format error; otherwise the largest F1, or 0.1 if F1 is 0 (arXiv 2511.02805)."""

    Options = MemSearcherOptions
    options: MemSearcherOptions

    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        parts = measure(question, episode)
        if not parts["format"]:
            return Score(0.0, parts)
        return Score(parts["f1"] or self.options.well_formed_reward, parts)


def measure(question: Question, episode: Episode) -> dict[str, float]:
    """Returns em, f1 and format of an episode. Without a well-formed answer, em and f1 are 0.

    `format` is 1 if the status is COMPLETED and there is an answer: the workflow has checked its own format rules.
    """
    given = episode.answer if episode.status is Status.COMPLETED else None
    return {
        "em": exact_match(given, question.answers) if given is not None else 0.0,
        "f1": f1(given, question.answers) if given is not None else 0.0,
        "format": float(given is not None),
    }
