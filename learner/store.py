"""The run's store: one SQLite file that holds leases, groups, publications and the batches in the order trained.

A group and the decision on it are one transaction, committed before the actor is answered. Batches are a log: what
was trained at each step can be read back and trained again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from learner.ledger import Entry, LeaseRecord, State
from protocol.codec import decode_group
from protocol.errors import DataError, StoreError
from protocol.faults import fault_point
from protocol.messages import SubmitGroup
from protocol.types import TrajectoryGroup
from protocol.wire import Buffer, decode, expect

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
  lease_id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, slot INTEGER NOT NULL, attempt INTEGER NOT NULL,
  actor TEXT NOT NULL, engine_version INTEGER NOT NULL, granted_at REAL NOT NULL,
  outcome TEXT NOT NULL DEFAULT 'running', reason TEXT NOT NULL DEFAULT '');
CREATE INDEX leases_running ON leases(outcome) WHERE outcome = 'running';
CREATE TABLE entries (
  cursor INTEGER PRIMARY KEY, slot INTEGER NOT NULL, attempt INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE groups (
  cursor INTEGER PRIMARY KEY, lease_id INTEGER NOT NULL, attempt INTEGER NOT NULL, stored_at REAL NOT NULL,
  num_trajectories INTEGER NOT NULL, num_contexts INTEGER NOT NULL, num_trained_tokens INTEGER NOT NULL,
  oldest_version INTEGER, reward_mean REAL NOT NULL,
  header BLOB NOT NULL, token_ids BLOB NOT NULL, loss_mask BLOB NOT NULL, logprobs BLOB NOT NULL, spans BLOB NOT NULL);
CREATE TABLE batches (step INTEGER NOT NULL, position INTEGER NOT NULL, cursor INTEGER NOT NULL UNIQUE,
  PRIMARY KEY (step, position)) WITHOUT ROWID;
CREATE TABLE publications (
  publication INTEGER PRIMARY KEY AUTOINCREMENT, version INTEGER NOT NULL, published_at REAL NOT NULL);
"""


def store_path(run_dir: Path) -> Path:
    return run_dir / "store.sqlite"


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def finished_path(run_dir: Path) -> Path:
    """Written by the learner after its last step."""
    return run_dir / "finished.json"


class Store:
    """Used by one thread at a time. Raises StoreError where the file cannot be read or written."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        mode = "ro" if read_only else "rwc"
        try:
            self._db = sqlite3.connect(
                f"file:{path}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=30.0
            )
            if not read_only:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._create()
            self._query("SELECT count(*) FROM meta")
        except sqlite3.Error as error:
            raise DataError(f"store {path} cannot be opened: {error}; give a run's folder") from error
        except StoreError as error:
            raise DataError(f"{error}; give a run's folder") from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reading within sees one state of the store, whatever others write meanwhile."""
        self._query("BEGIN")
        try:
            yield
        finally:
            self._query("COMMIT")

    @contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """All or nothing, durable when it returns. `name` is that of its fault points."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            fault_point(f"store.{name}.open")
            self._db.execute("COMMIT")
            fault_point(f"store.{name}.durable")
        except sqlite3.Error as error:
            raise StoreError(f"store {self._path}: {error}") from error

    # --- identity ---

    def claim(self, identity: Mapping[str, str]) -> None:
        """Writes the identity of a new run, or checks that of one to resume. Raises: DataError on a difference."""
        found = self.meta()
        with self.transaction("claim"):
            for key, value in identity.items():
                if key not in found:
                    self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, value))
                elif found[key] != value:
                    raise DataError(
                        f"{self._path} belongs to a run with {key} = {found[key]}, not {value}: "
                        "choose another run.dir, or set it back to resume"
                    )

    def meta(self) -> dict[str, str]:
        return dict(self._query("SELECT key, value FROM meta"))

    # --- leases and groups ---

    def record_lease(self, lease: LeaseRecord, *, engine_version: int) -> None:
        with self.transaction("lease"):
            self._db.execute(
                "INSERT INTO leases (lease_id, cursor, slot, attempt, actor, engine_version, granted_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (lease.lease_id, lease.cursor, lease.slot, lease.attempt, lease.actor, engine_version, lease.granted_s),
            )
            self._put_entry(Entry(lease.cursor, lease.slot, lease.attempt, State.RUNNING))

    def record_group(
        self, *, entry: Entry, lease_id: int, group: TrajectoryGroup, frames: Sequence[Buffer], outcome: str
    ) -> None:
        """The group as it came, with the decision on it (`accepted` or why it is skipped)."""
        rewards = [trajectory.reward for trajectory in group.trajectories]
        contexts = list(group.contexts())
        with self.transaction("group"):
            self._db.execute(
                "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    group.cursor,
                    lease_id,
                    group.attempt,
                    time.time(),
                    len(rewards),
                    len(contexts),
                    sum(context.num_trained_tokens for context in contexts),
                    group.oldest_version,
                    sum(rewards) / len(rewards),
                    *frames,
                ),
            )
            self._put_entry(entry)
            self._end_lease(lease_id, outcome, "")

    def record_end(self, *, entry: Entry | None, lease_id: int, outcome: str, reason: str = "") -> None:
        """A lease that ended without a group: expired, failed, refused, duplicate."""
        with self.transaction("end"):
            if entry is not None:
                self._put_entry(entry)
            self._end_lease(lease_id, outcome, reason)

    def record_batch(self, *, step: int, cursors: Sequence[int]) -> None:
        """Step `step` was trained on these groups."""
        with self.transaction("batch"):
            self._db.executemany(
                "INSERT INTO batches VALUES (?, ?, ?)", [(step, i, cursor) for i, cursor in enumerate(cursors)]
            )
            self._db.executemany(
                "UPDATE entries SET state = 'trained' WHERE cursor = ?", [(cursor,) for cursor in cursors]
            )

    def new_publication(self, version: int) -> int:
        """A publication id that was never used before in this run."""
        with self.transaction("publication"):
            row = self._db.execute(
                "INSERT INTO publications (version, published_at) VALUES (?, ?)", (version, time.time())
            )
            assert row.lastrowid is not None
            return row.lastrowid

    # --- reading back ---

    def entries(self) -> list[Entry]:
        rows = self._query("SELECT cursor, slot, attempt, state FROM entries ORDER BY cursor")
        return [Entry(cursor, slot, attempt, State(state)) for cursor, slot, attempt, state in rows]

    def running_leases(self) -> list[LeaseRecord]:
        rows = self._query(
            "SELECT lease_id, cursor, slot, attempt, actor, granted_at FROM leases WHERE outcome = 'running'"
        )
        return [LeaseRecord(*row) for row in rows]

    def next_lease_id(self) -> int:
        return int(self._query("SELECT coalesce(max(lease_id), 0) + 1 FROM leases")[0][0])

    def publications(self) -> dict[int, int]:
        """publication → version"""
        return dict(self._query("SELECT publication, version FROM publications"))

    def num_batches(self) -> int:
        return int(self._query("SELECT coalesce(max(step), -1) + 1 FROM batches")[0][0])

    def batch(self, step: int) -> list[int]:
        return [row[0] for row in self._query("SELECT cursor FROM batches WHERE step = ? ORDER BY position", step)]

    def group(self, cursor: int) -> TrajectoryGroup:
        rows = self._query("SELECT header, token_ids, loss_mask, logprobs, spans FROM groups WHERE cursor = ?", cursor)
        if not rows:
            raise StoreError(f"store {self._path} holds no group {cursor}")
        message, payload = decode(rows[0])
        return decode_group(expect(message, SubmitGroup), payload)

    def query(self, sql: str, *parameters: object) -> list[tuple]:
        """Read-only SQL, for the audit."""
        return self._query(sql, *parameters)

    # --- inside ---

    def _create(self) -> None:
        version = self._query("PRAGMA user_version")[0][0]
        if version == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise DataError(f"store {self._path} has schema {version}, this version reads {SCHEMA_VERSION}")

    def _put_entry(self, entry: Entry) -> None:
        self._db.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?) ON CONFLICT (cursor) DO UPDATE "
            "SET slot = excluded.slot, attempt = excluded.attempt, state = excluded.state",
            (entry.cursor, entry.slot, entry.attempt, entry.state.value),
        )

    def _end_lease(self, lease_id: int, outcome: str, reason: str) -> None:
        self._db.execute(
            "UPDATE leases SET outcome = ?, reason = ? WHERE lease_id = ?", (outcome, reason[:1000], lease_id)
        )

    def _query(self, sql: str, *parameters: object) -> list[tuple]:
        try:
            with closing(self._db.execute(sql, parameters)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"store {self._path}: {error}") from error
