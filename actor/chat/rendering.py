"""The texts of MemSearcher: how its prompts are written and how the policy's pieces are read.

One context of a turn, and who writes what (`|` marks a piece boundary; each piece is encoded alone):

    prompt(question, memory) | action, by the policy | observation(results) | memory, by the policy

A policy's pieces end in `end_token`. `parse_*` read a policy's piece, with or without that token; `write_*` are the
inverse, with the token, for scripted demonstrations: `parse_action(write_answer(t, a)) == Answer(a)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from actor.tools.tool import Observation

Fidelity = Literal["paper", "mended"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the policy wrote it. The arguments are validated by the tool. `name` is that of the tool's schema."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadCall:
    """A tool call that could not be read; `error` is shown to the policy.

    `breaks_format`: it does not have the form of a tool call at all.
    """

    error: str
    breaks_format: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy's final answer: the trajectory ends. `fault` as in `ToolCalls`."""

    text: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """One or more tool calls, in the order written.

    `fault`: a format rule that the action breaks although it can be carried out. The trajectory continues and cannot
    end as COMPLETED.
    """

    calls: tuple[ToolCall | BadCall, ...]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Neither an answer nor a tool call: the trajectory ends. `reason` is for people and metrics."""

    reason: str


Action = Answer | ToolCalls | Malformed


@dataclass(frozen=True, slots=True)
class Result:
    """What one call returned."""

    call: ToolCall | BadCall
    observation: Observation = field(default_factory=Observation)


class Rendering(Protocol):
    """Stateless: the same arguments give the same text."""

    @property
    def end_token(self) -> str:
        """The token that ends each of the policy's pieces, as text; it must be one token of the tokenizer."""
        ...

    def prompt(self, question: str, memory: str) -> str:
        """The first piece of a context. `memory` is empty on the first turn."""
        ...

    def parse_action(self, text: str) -> Action: ...

    def observation(self, results: Sequence[Result]) -> str:
        """The text from the end token of the action to the place where the policy writes its memory."""
        ...

    def parse_memory(self, text: str, *, truncated: bool = False) -> str | None:
        """The memory, stripped; None if it is missing, empty or malformed.

        `truncated`: the piece was cut off at its token limit; the memory up to there is used.
        """
        ...

    def format_fault(self, transcript: str) -> str:
        """What the paper's format rules find wrong in a trajectory's last context; empty if nothing."""
        ...

    def write_action_search(self, thought: str, queries: Sequence[str]) -> str: ...

    def write_answer(self, thought: str, answer: str) -> str: ...

    def write_memory(self, memory: str) -> str: ...
