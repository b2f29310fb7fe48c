"""How a workflow's turns are written and read: the seam between one workflow and its texts.

One context of a turn, and who writes what (`|` marks a border at which tokens are cut; each piece is encoded alone):

    prompt(question, memory) | action, by the policy | observation(results) | memory, by the policy

A policy's pieces end in `end_token`. `parse_*` read a policy's piece, with or without that token; `write_*` are the
scripted inverse, with it, used for demonstrations: `parse_action(write_answer(t, a)) == Answer(a)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from protocol.types import Passage

Fidelity = Literal["paper", "mended"]


@dataclass(frozen=True, slots=True)
class Search:
    """One call of the search tool. `top_n` is None where the policy left it out."""

    query: str
    top_n: int | None = None


@dataclass(frozen=True, slots=True)
class BadCall:
    """A tool call that could not be read; `error` is what the policy is told.

    `breaks_format`: it is no tool call at all, rather than one with wrong arguments.
    """

    error: str
    breaks_format: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy's final answer: the trajectory ends. `fault` as in `Searches`."""

    text: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Searches:
    """One or more tool calls, in the order written.

    `fault`: a format rule that the action breaks, though it can be run. The trajectory goes on, and cannot end as
    COMPLETED.
    """

    calls: tuple[Search | BadCall, ...]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Neither an answer nor a tool call: the trajectory ends. `reason` is for people and metrics."""

    reason: str


Action = Answer | Searches | Malformed


@dataclass(frozen=True, slots=True)
class Result:
    """What one call brought: passages, best first (none for a bad call)."""

    call: Search | BadCall
    passages: tuple[Passage, ...] = field(default=())


class Rendering(Protocol):
    """The texts of a search-and-remember workflow. Stateless: the same arguments give the same text."""

    @property
    def end_token(self) -> str:
        """The token that ends each of the policy's pieces, as text; the tokenizer knows it as one token."""
        ...

    def prompt(self, question: str, memory: str) -> str:
        """What a context begins with. `memory` is empty on the first turn."""
        ...

    def parse_action(self, text: str) -> Action: ...

    def observation(self, results: Sequence[Result]) -> str:
        """The glue from the end token of the action to where the policy writes its memory."""
        ...

    def parse_memory(self, text: str, *, truncated: bool = False) -> str | None:
        """The memory, stripped; None where it is missing, empty or malformed.

        `truncated`: the piece was cut off at its token limit, and what stands there shall be used.
        """
        ...

    def format_fault(self, transcript: str) -> str:
        """What the paper's format rules find wrong in a trajectory's last context; empty where that is nothing."""
        ...

    def write_action_search(self, thought: str, queries: Sequence[str]) -> str: ...

    def write_answer(self, thought: str, answer: str) -> str: ...

    def write_memory(self, memory: str) -> str: ...
