"""Which recorded batches still hold their tokens.

Leases, decisions and the log of batches are kept for ever. Tokens are dropped only of steps that a durable checkpoint
covers, and leave a tally for the audit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from learner.store.store import Store
from learner.store.tally import Tally


def expired_steps(
    store: Store, *, checkpoint_step: int, keep_steps: int | None, keep_bytes: int | None
) -> Iterator[int]:
    """Steps whose tokens need not be kept, oldest first.

    checkpoint_step  of a checkpoint that is durable: batches from this step on would be trained again after a crash
    keep_steps       so many steps before it are kept
    keep_bytes       oldest steps go while the groups of the store hold more
    None: no such limit; without any, nothing goes.
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


def drop_tokens(store: Store, step: int) -> bool:
    """Drops the tokens of a trained batch, and of questions that were skipped before its last. Raises: StoreError."""
    cursors = store.batch(step)
    last_context_only = store.meta().get("ablation") == "last-context"
    tallies = {cursor: Tally.of(store.group(cursor), last_context_only=last_context_only) for cursor in cursors}
    skipped = store.query(
        "SELECT cursor FROM groups JOIN entries USING (cursor) "
        "WHERE num_bytes > 0 AND state = 'skipped' AND cursor < ?",
        max(cursors),
    )
    store.drop_tokens(
        {cursor: json.dumps(asdict(tally)) for cursor, tally in tallies.items()} | {row[0]: "" for row in skipped}
    )
    return True
