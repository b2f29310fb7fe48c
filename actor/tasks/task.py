"""What a task is: questions in an order that a seed fixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from protocol.config_base import Options
from protocol.types import Question

Split = Literal["train", "eval"]


class Task(ABC):
    """Base class of tasks. `Options` describes the keys of the `[task]` section."""

    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: Any, *, split: Split, seed: int) -> None:
        """`split`: the questions to train on, or those to evaluate on. `seed` is `run.seed`."""
        self.options = options
        self.split = split
        self.seed = seed

    @property
    def num_questions(self) -> int | None:
        """Questions of one epoch; None if they are drawn without end."""
        return None

    @abstractmethod
    def question(self, cursor: int) -> Question:
        """The question of a lease: a function of options, split, seed and `cursor` >= 0 only, in any process."""
