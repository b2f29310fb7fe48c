"""Decides whether a run without progress must end, and states why in one sentence. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from learner.leases.wait_cause import skipped_text

# The start of a reason, as actors and `GroupOutcomes` write it → what the user can do. The first match counts.
_REMEDIES = (
    ("SearchFailed:", "Start the retriever (retriever.indexes, or retriever.port on network.host)"),
    ("EngineRefused:", "Start the engines with a context length of at least workflow.context_tokens"),
    (("Engine", "UnknownVersion:"), "See the logs of the engines"),
    (("workflow_", "tool_", "reward_", "task_"), "Correct the code; tracebacks are in the actors' logs"),
    ("refused:", "Give all actors the run's config.json and the same version of Palimpsest"),
)


@dataclass(frozen=True, slots=True)
class ProgressLimits:
    """A run ends after `max_failed` failed or refused groups in a row, or `max_skipped` skipped ones. 0: never."""

    max_failed: int = 0
    max_skipped: int = 0


def why_failing(num_groups: int, failures: Mapping[str, int], *, step: int) -> str:
    """`failures`: reason → FAILED trajectories since the last accepted group, most frequent first."""
    sentence = f"the run ended: {num_groups} groups in a row failed without a step"
    if not failures:
        return f"{sentence}; the actors reported no reason, see their logs"
    reason, count = next(iter(failures.items()))
    remedy = next((text for start, text in _REMEDIES if reason.startswith(start)), "Remove the cause")
    return (
        f"{sentence}; most frequent reason ({count} of {sum(failures.values())} trajectories): {reason}. "
        f"{remedy}, then start the run again: it resumes at step {step}"
    )


def why_skipping(num_groups: int, reward: float | None, *, step: int) -> str:
    """`reward`: as in `skipped_text`."""
    return (
        f"the run ended without a step: {skipped_text(num_groups, reward)}. Check the reward function and the prompt, "
        "or choose questions of which the model solves some, then start the run again: it resumes at step "
        f"{step}; learner.max_skipped_groups = 0 switches this limit off"
    )
