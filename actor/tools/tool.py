"""What a tool is: something that the policy can call in the middle of an episode."""

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
    """What a tool call returned. It is given to the policy, which did not sample it.

    text      the tool's reply
    passages  documents, best first, for workflows that number or shorten them; `text` may be empty then
    error     why the call could not be carried out (bad arguments); the policy reads it and may try again
    """

    text: str = ""
    passages: tuple[Passage, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """The episode that calls. `episode_id` is unique among the episodes of a run."""

    question: Question
    episode_id: str


class Searcher(Protocol):
    """The retriever, as a tool sees it."""

    async def search(self, queries: Sequence[str], *, top_n: int, collection: str = "") -> list[list[Passage]]:
        """For each query its passages, best first, at most `top_n`."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """What an actor offers to tools. `searcher` is None if the run has no retriever."""

    searcher: Searcher | None = None


class Tool(ABC):
    """Base class of tools. One instance serves all episodes of an actor, many at once.

    `Options` describes the keys of the tool's `[[tool]]` section. If a call takes time, `await` it: other episodes run
    in that time. An exception from `call` fails the trajectory, not the actor; for arguments that the policy got wrong,
    return `Observation(error=...)` instead.

    schema   `name`, `description` and `parameters` (JSON schema), as in the `function` of a chat template's tools
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
