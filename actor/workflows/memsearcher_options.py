"""The options of the workflow memsearcher."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from protocol.config_base import Options, Positive

_PAPER_QUESTION_TOKENS = 695
_PAPER_RESPONSE_TOKENS = 6_024


class MemSearcherOptions(Options):
    """Options of the workflow memsearcher. Budgets are in tokens of the model's own tokenizer."""

    rendering: Literal["chat", "toy"] = Field(
        default="chat", description="Texts: `chat` is ChatML with JSON tool calls, `toy` the toy world's words."
    )
    fidelity: Literal["mended", "paper"] = Field(
        default="mended", description="`paper` reproduces the defects of the original code, for comparison."
    )
    max_turns: Positive = Field(default=5, description="Maximum number of turns of an episode.")
    action_tokens: Positive = Field(
        default=512, description="Maximum tokens of an action: a thought with tool calls or an answer."
    )
    memory_tokens: Positive = Field(default=1024, description="Maximum tokens of a memory.")
    memory_overflow: Literal["truncate", "fail"] = Field(
        default="truncate", description="A memory above its limit is truncated, or ends the trajectory."
    )
    question_tokens: Positive | None = Field(
        default=None,
        description=f"Longer questions are cut. Unset: no limit; {_PAPER_QUESTION_TOKENS} with fidelity `paper`.",
    )
    response_tokens: Positive | None = Field(
        default=None,
        description="Maximum tokens of a context after its prompt. Unset: only `context_tokens` is a limit; "
        f"{_PAPER_RESPONSE_TOKENS} with fidelity `paper`.",
    )

    @property
    def question_limit(self) -> int | None:
        """Tokens of a question; None: no limit."""
        return self.question_tokens or (_PAPER_QUESTION_TOKENS if self.fidelity == "paper" else None)

    @property
    def response_limit(self) -> int | None:
        """Tokens of a context after its prompt; None: no limit."""
        return self.response_tokens or (_PAPER_RESPONSE_TOKENS if self.fidelity == "paper" else None)
