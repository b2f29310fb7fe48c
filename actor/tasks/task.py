"""What a task is: questions in an order that a seed fixes, and what an answer is worth."""

from __future__ import annotations

from typing import Protocol

from actor.rewards.reward import Reward
from protocol.types import Question


class Task(Protocol):
    @property
    def num_questions(self) -> int | None:
        """Questions an epoch; None where they are drawn without end."""
        ...

    @property
    def reward(self) -> Reward: ...

    def question(self, cursor: int) -> Question:
        """The question of a lease: a function of the task's seed and `cursor` >= 0, in any process at any time."""
        ...
