"""What of a group is trained, and by which versions it was sampled: what the audit keeps of dropped tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from protocol.types import Status, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Tally:
    """`tokens`: (version, publication, sampled tokens) in trajectories that the environment did not fail."""

    num_trajectories: int
    num_contexts: int
    tokens: list[tuple[int, int, int]]

    @classmethod
    def of(cls, group: TrajectoryGroup, *, last_context_only: bool) -> Tally:
        """`last_context_only`: of each trajectory, only its last context is trained (an ablation)."""
        num_trajectories, num_contexts = 0, 0
        tokens: Counter[tuple[int, int]] = Counter()
        for trajectory in group.trajectories:
            if trajectory.status is Status.FAILED:
                continue
            contexts = trajectory.contexts[-1:] if last_context_only else trajectory.contexts
            sampled = [context for context in contexts if context.policy_versions]
            num_trajectories += bool(sampled)
            num_contexts += len(sampled)
            for span in (span for context in sampled for span in context.policy_versions):
                tokens[span.version, span.publication] += span.end - span.start
        return cls(num_trajectories, num_contexts, [(*key, count) for key, count in tokens.items()])
