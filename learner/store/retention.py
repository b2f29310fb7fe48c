"""Retention: which trained batches may lose their tokens, and the counts (`Tally`) that replace dropped tokens.

Leases, decisions and the log of batches are never deleted. Tokens are dropped only for steps that the oldest of the
newest `learner.checkpoint.keep` checkpoints covers, so that a run can fall back to it if the others are damaged; a
`Tally` of each group is kept for the audit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from learner.store.resume_key import run_facts
from learner.store.store import Store
from protocol.errors import DataError
from protocol.types import Status, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Tally:
    """The counts of a group that the audit needs. Trajectories with status FAILED are not counted.

    tokens: (version, publication, number of sampled tokens), one row per version and publication
    """

    num_trajectories: int
    num_contexts: int
    tokens: list[tuple[int, int, int]]

    @classmethod
    def of(cls, group: TrajectoryGroup, *, last_context_only: bool) -> Tally:
        """Counts a group. `last_context_only`: only the last context of each trajectory (ablation `last-context`)."""
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


def expired_steps(
    store: Store, *, checkpoint_step: int, keep_steps: int | None, keep_bytes: int | None
) -> Iterator[int]:
    """Steps whose tokens may be dropped, oldest first.

    checkpoint_step  step of the oldest checkpoint to which the run may fall back: it would train the batches from this
                     step on again
    keep_steps       number of steps before `checkpoint_step` whose tokens are kept; None: no limit by steps
    keep_bytes       the oldest steps are dropped until all stored groups have at most this size; None: no limit

    With both None, no step is dropped.
    """
    held = store.query(
        "SELECT step, sum(num_bytes) FROM batches JOIN groups USING (cursor) WHERE step < ? AND num_bytes > 0 "
        "GROUP BY step ORDER BY step",
        checkpoint_step,
    )
    total = store.query("SELECT coalesce(sum(num_bytes), 0) FROM groups WHERE num_bytes > 0")[0][0]
    for step, num_bytes in held:
        is_old = keep_steps is not None and step < checkpoint_step - keep_steps
        if not is_old and (keep_bytes is None or total <= keep_bytes):
            return
        total -= num_bytes
        yield step


def check_resumable(store: Store, *, step: int) -> None:
    """Checks that the tokens of all batches from `step` on are stored, so that they can be trained again.

    Raises: DataError. It is possible only if more checkpoints are damaged than `learner.checkpoint.keep` provides for.
    """
    dropped = store.query(
        "SELECT min(step), max(step) FROM batches JOIN groups USING (cursor) WHERE step >= ? AND num_bytes = 0", step
    )[0]
    if dropped[0] is not None:
        raise DataError(
            f"the run can be resumed from step {step} only, but the tokens of the steps {dropped[0]} to {dropped[1]} "
            "were dropped (learner.retention), because newer checkpoints had been written: restore the newest "
            "checkpoint from a backup, or start a new run from the weights of an older one"
        )


def drop_tokens(store: Store, step: int) -> None:
    """Drops the tokens of a trained batch and of all skipped questions with a lower cursor than its highest one.

    Raises: StoreError.
    """
    cursors = store.batch(step)
    last_context_only = run_facts(store.meta()).last_context_only
    tallies = {cursor: Tally.of(store.group(cursor), last_context_only=last_context_only) for cursor in cursors}
    skipped = store.query(
        "SELECT cursor FROM groups JOIN entries USING (cursor) "
        "WHERE num_bytes > 0 AND state = 'skipped' AND cursor < ?",
        max(cursors),
    )
    store.drop_tokens(
        {cursor: json.dumps(asdict(tally)) for cursor, tally in tallies.items()} | {row[0]: "" for row in skipped}
    )
