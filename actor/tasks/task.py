"""The base class of tasks: questions in an order that depends only on a seed."""

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
        """`split`: `train` or `eval` questions. `seed` is `run.seed`."""
        self.options = options
        self.split = split
        self.seed = seed

    @property
    def num_questions(self) -> int | None:
        """The number of questions in an epoch; None if it is unlimited."""
        return None

    @abstractmethod
    def question(self, cursor: int) -> Question:
        """Returns question number `cursor` >= 0. It must depend only on options, split, seed and `cursor`.

        Any process may call it, in any order.
        """
