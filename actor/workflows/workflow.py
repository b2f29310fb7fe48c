"""What a workflow is: it drives a session through one question."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from actor.session import Session
from protocol.types import Question, Status


@dataclass(frozen=True, slots=True)
class Episode:
    """How one trajectory ended. Its tokens are in the session's contexts.

    status       COMPLETED only where the format holds in every context
    answer       the policy's final answer, as written; None where it gave none
    reason       why it ended otherwise, for people and metrics; empty where it completed
    transcripts  each context as text, special tokens included: what format rules are checked against
    memories     the memory that each context but the first began with
    stats        counts for metrics
    context_rewards  of single contexts, beside the trajectory's; empty where the workflow gives none
    """

    status: Status
    answer: str | None = None
    reason: str = ""
    transcripts: tuple[str, ...] = ()
    memories: tuple[str, ...] = ()
    stats: dict[str, float] = field(default_factory=dict)
    context_rewards: tuple[float, ...] = ()


class Workflow(Protocol):
    """Stateless between runs: many episodes run on one workflow at once, each with a session of its own."""

    async def run(self, question: Question, session: Session) -> Episode:
        """Never raises for the environment's failures: they are `Status.FAILED`."""
        ...
