"""A task, a workflow and a reward that run files of the evaluation's tests name; none of them needs an engine."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from actor.episode import Episode
from actor.rewards.reward import Reward, Score
from actor.session import Session
from actor.tasks.task import Task
from actor.workflows.workflow import Workflow
from protocol.config_base import Options
from protocol.types import Question, Status, Trajectory


class NumberedOptions(Options):
    num: int | None = Field(default=None, description="Number of questions.")
    broken: tuple[int, ...] = Field(default=(), description="Numbers of questions that raise.")


class Numbered(Task):
    """Question k has the text k."""

    Options = NumberedOptions
    options: NumberedOptions

    @property
    def num_questions(self) -> int | None:
        return self.options.num

    def question(self, cursor: int) -> Question:
        if cursor in self.options.broken:
            raise LookupError(f"there is no question {cursor}")
        return Question(id=f"q{cursor}", text=str(cursor), answers=(str(cursor % 2),))


class InstantOptions(Options):
    answer: str = Field(default="1", description="The answer to every question.")
    repeats: int = Field(default=1, description="How often the answer is repeated.")
    failing: tuple[str, ...] = Field(default=(), description="Questions whose trajectory fails.")
    stats: dict[str, Any] = Field(default={}, description="Stats of every episode.")


class Instant(Workflow):
    """Answers without sampling a token."""

    Options = InstantOptions
    options: InstantOptions
    tool_names = ()

    async def run(self, question: Question, session: Session) -> Episode:
        if question.text in self.options.failing:
            return Episode(status=Status.FAILED, reason=f"no passage for question {question.text}")
        return Episode(answer=self.options.answer * self.options.repeats, stats=dict(self.options.stats))


class Parity(Reward):
    """1 if the answer is the gold one; question 4 raises."""

    async def score(self, question: Question, episode: Episode, trajectory: Trajectory) -> Score:
        if question.text == "4":
            raise ZeroDivisionError("no score for 4")
        right = float(episode.answer in question.answers)
        return Score(right, {"em": right})
