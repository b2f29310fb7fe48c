"""What a workflow is: it drives a session through one question."""

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
    """Base class of workflows. One instance runs many episodes at once, each with a session of its own.

    `Options` describes the keys of the `[workflow]` section, `tool_names` the tools that `self.tools` holds unless
    `workflow.tools` names others. Keep no state of an episode in `self`.

    An exception from `run` fails the trajectory, which is then not trained; its reason is counted and its traceback is
    in the actor's log. `BudgetExceeded` of the session ends the trajectory as OVER_BUDGET.
    """

    Options: ClassVar[type[BaseModel]] = Options
    tool_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any, *, tools: Mapping[str, Tool], context_tokens: int) -> None:
        """`tools` by name; `context_tokens` is the most that a context of the session can hold."""
        self.options = options
        self.tools = dict(tools)
        self.context_tokens = context_tokens

    def check(self, tokenizer: Tokenizer) -> None:
        """Called once at start-up. Raises: UserError if the workflow cannot run with this tokenizer."""

    @abstractmethod
    async def run(self, question: Question, session: Session) -> Episode:
        """Plays one episode: opens contexts, samples, calls tools, rewrites its memory."""
