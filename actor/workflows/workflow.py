"""The base class of workflows: programs that run the episode of one question."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from actor.chat.tokenizer import Tokenizer
from actor.episode import Episode
from actor.session import Session
from actor.tools.tool import Tool
from protocol.config_base import Options
from protocol.types import Question


class Workflow(ABC):
    """Base class of workflows. One instance runs many episodes at once, each with its own session.

    `Options` describes the keys of the `[workflow]` section. `tool_names` lists the tools in `self.tools`; the key
    `workflow.tools` overrides it. Do not keep the state of an episode in `self`.

    An exception from `run` fails the trajectory, which is then not trained; the error is counted and its traceback is
    in the actor's log. `BudgetExceeded` of the session ends the trajectory as OVER_BUDGET.
    """

    Options: ClassVar[type[BaseModel]] = Options
    tool_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any, *, tools: Mapping[str, Tool], context_tokens: int) -> None:
        """`tools` by name; `context_tokens`: maximum number of tokens of a context."""
        self.options = options
        self.tools = dict(tools)
        self.context_tokens = context_tokens

    def check(self, tokenizer: Tokenizer) -> None:
        """Called once at start-up. Raises: UserError if the workflow cannot run with this tokenizer."""

    def first_prompt(self, question: Question) -> str:
        """The prompt of an episode's first context, for `palimpsest check`, which counts its tokens. Empty: unknown."""
        return ""

    @abstractmethod
    async def run(self, question: Question, session: Session) -> Episode:
        """Runs one episode: opens contexts, samples, calls tools, and returns how the episode ended."""
