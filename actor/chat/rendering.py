"""MemSearcher's texts: writes its prompts and parses the policy's pieces.

The pieces of one context (`|` marks a boundary; each piece is encoded separately):

    prompt(question, memory) | action, by the policy | observation(results) | memory, by the policy

The policy's pieces end with `end_token`. `parse_*` parse such a piece, with or without the token. `write_*` are the
inverse, for scripted demonstrations, and add the token: `parse_action(write_answer(t, a)) == Answer(a)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from actor.tools.tool import Observation

Fidelity = Literal["paper", "mended"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the policy wrote it. `name` is the name in the tool's schema; the tool validates `arguments`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadCall:
    """A tool call that is not carried out; `error` is shown to the policy.

    `breaks_format`: the call is not a JSON object with `name` and `arguments`, which violates the format rules.
    """

    error: str
    breaks_format: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy's final answer, which ends the trajectory. `fault` as in `ToolCalls`."""

    text: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """One or more tool calls, in the order written.

    `fault`: the format rule that the action violates, or empty. The calls are carried out even so, but with fidelity
    `mended` the trajectory can no longer end as COMPLETED.
    """

    calls: tuple[ToolCall | BadCall, ...]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An action that is neither an answer nor a tool call. It ends the trajectory."""

    reason: str


Action = Answer | ToolCalls | Malformed


@dataclass(frozen=True, slots=True)
class Result:
    """A call and the tool's observation; it is empty for a `BadCall`."""

    call: ToolCall | BadCall
    observation: Observation = field(default_factory=Observation)


class Rendering(Protocol):
    """Writes prompts and parses the policy's pieces. Stateless: the same arguments give the same result."""

    @property
    def end_token(self) -> str:
        """The token that ends each of the policy's pieces, as text; it must be one token of the tokenizer."""
        ...

    def prompt(self, question: str, memory: str) -> str:
        """The first piece of a context. `memory` is empty on the first turn."""
        ...

    def parse_action(self, text: str) -> Action: ...

    def observation(self, results: Sequence[Result]) -> str:
        """The text between the end token of the action and the memory that the policy writes next."""
        ...

    def parse_memory(self, text: str, *, truncated: bool = False) -> str | None:
        """The memory, stripped; None if it is missing, empty or malformed.

        `truncated`: the piece was cut off at its token limit; the memory up to there is used.
        """
        ...

    def format_fault(self, transcript: str) -> str:
        """The first violation of the paper's format rules in a trajectory's last context; empty if there is none."""
        ...

    def write_action_search(self, thought: str, queries: Sequence[str]) -> str: ...

    def write_answer(self, thought: str, answer: str) -> str: ...

    def write_memory(self, memory: str) -> str: ...
