"""The result of a workflow's `run`: how one trajectory ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.types import Status


@dataclass(frozen=True, slots=True)
class Episode:
    """How one trajectory ended. Its tokens are in the session's contexts.

    status           COMPLETED (the default) if the policy answered in the format of the workflow; FORMAT_ERROR and
                     OVER_BUDGET are trained as well; FAILED is not
    answer           the policy's final answer, as written; None if it gave none
    reason           why the status is not COMPLETED; shown in evaluation files
    memories         the memory at the start of each context, except the first
    stats            counts for metrics, by name; the session's own counts are added to them
    context_rewards  rewards of single contexts, in addition to the trajectory's; empty, or one for each context
    transcripts      the text of each context, special tokens included; filled in by the actor
    weight_versions  the weight versions that sampled its tokens, as the engines state them; filled in by the actor
    """

    status: Status = Status.COMPLETED
    answer: str | None = None
    reason: str = ""
    memories: tuple[str, ...] = ()
    stats: dict[str, float] = field(default_factory=dict)
    context_rewards: tuple[float, ...] = ()
    transcripts: tuple[str, ...] = ()
    weight_versions: tuple[str, ...] = ()
