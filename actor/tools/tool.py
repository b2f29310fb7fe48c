"""The base class of tools: functions that the policy can call during an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from protocol.config_base import Options
from protocol.types import Passage, Question


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of a tool call. The policy reads it; its tokens are not trained.

    text      the tool's reply
    passages  documents, best first, for workflows that number or shorten them; `text` may be empty then
    error     why the call could not be carried out (bad arguments); the policy reads it and may try again
    """

    text: str = ""
    passages: tuple[Passage, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """The episode that calls a tool. `episode_id` is unique among the episodes of a run."""

    question: Question
    episode_id: str


class Searcher(Protocol):
    """The retriever's interface for tools."""

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        """Returns for each query its passages, best first, at most `top_n`."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """Services of the actor for tools. `searcher` is None if the run has no retriever."""

    searcher: Searcher | None = None


class Tool(ABC):
    """Base class of tools. One instance serves all episodes of an actor, many at once.

    `Options` describes the keys of the tool's `[[tool]]` section. If a call takes time, `await` it: other episodes run
    in that time. An exception from `call` fails the trajectory, not the actor; for invalid arguments,
    return `Observation(error=...)` instead.

    schema   `name`, `description` and `parameters` (JSON schema): the `function` object of a tool in a chat template
    """

    Options: ClassVar[type[BaseModel]] = Options
    schema: Mapping[str, Any]

    def __init__(self, options: Any, *, services: Services) -> None:
        self.options = options
        self.services = services

    @abstractmethod
    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> Observation:
        """Carries out one call. `arguments` is the object that the policy wrote, not validated."""

    async def start(self) -> None:
        """Called once in the actor's event loop, before the first episode."""

    async def stop(self) -> None:
        """Called once after the last episode."""
