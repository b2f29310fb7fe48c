"""Writes the scheduler's records as rows of the store's tables (schema.py), inside the caller's transaction."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import astuple

from learner.leases.decisions import Ended, EntryChanged, Granted, GroupReceived, Record, SlotChanged, Trained


def write_record(db: sqlite3.Connection, record: Record) -> None:
    """Raises: sqlite3.Error."""
    match record:
        case Granted(lease, engine_version):
            db.execute(
                "INSERT INTO leases (lease_id, cursor, slot, attempt, actor, granted_at, engine_version) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*astuple(lease), engine_version),
            )
        case Ended(lease_id, outcome, reason):
            db.execute(
                "UPDATE leases SET outcome = ?, reason = ? WHERE lease_id = ?", (outcome, reason[:1000], lease_id)
            )
        case EntryChanged(entry):
            db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                (entry.cursor, entry.slot, entry.attempt, entry.state.value, entry.first_slot),
            )
        case GroupReceived():
            _insert_group(db, record)
        case SlotChanged(step, cursor, from_slot, to_slot):
            db.execute(
                "INSERT INTO moves (step, cursor, from_slot, to_slot) VALUES (?, ?, ?, ?)",
                (step, cursor, from_slot, to_slot),
            )
        case Trained(step, cursors):
            rows = [(step, position, cursor) for position, cursor in enumerate(cursors)]
            db.executemany("INSERT INTO batches VALUES (?, ?, ?)", rows)
            db.executemany("UPDATE entries SET state = 'trained' WHERE cursor = ?", [(cursor,) for cursor in cursors])


def _insert_group(db: sqlite3.Connection, record: GroupReceived) -> None:
    group, frames = record.group, record.frames
    rewards = group.header.rewards
    db.execute(
        "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', ?, ?, ?, ?)",
        (
            group.cursor,
            record.lease_id,
            group.attempt,
            time.time(),
            len(rewards),
            len(group.header.context_lengths),
            group.num_trained_tokens,
            group.oldest_version,
            sum(rewards) / len(rewards),
            sum(len(frame) for frame in frames),
            *frames,
        ),
    )
