"""The run's store: one SQLite file with leases, groups, publications and the log of trained batches.

A group and the decision on it are written in one transaction, which is committed before the actor receives its reply.
The groups of each trained batch can be read and trained again until `learner.retention` drops their tokens.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from learner.leases.decisions import ACTOR_DIED, Record
from learner.leases.entries import Entry, LeaseRecord, State
from learner.leases.lease_table import LeaseTable
from learner.store.record_rows import write_record
from learner.store.resume_key import changes
from learner.store.schema import OPEN, SCHEMA, SCHEMA_VERSION
from learner.store.sqlite_file import connect, connect_read_only, store_error
from learner.store.wal_checkpointer import MAX_LOG_PAGES, WalCheckpointer
from protocol.codec import decode_frames
from protocol.errors import DataError, StoreError, StoreFullError
from protocol.fault_injection import fault_point
from protocol.types import TrajectoryGroup


class Store:
    """Opens or creates the store at `path`. Not thread-safe.

    Raises: DataError if it cannot be opened, StoreFullError if there is no room, StoreError if a read or write fails.
    """

    def __init__(
        self, path: Path, *, read_only: bool = False, fault_point: Callable[[str], None] = fault_point
    ) -> None:
        self._path = path
        self._fault_point = fault_point
        self._wal_checkpointer: WalCheckpointer | None = None
        self._copy: TemporaryDirectory[str] | None = None
        try:
            if read_only:
                self._db, self._copy = connect_read_only(path)
            else:
                self._db = connect(f"file:{path}?mode=rwc")
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._create()
            self._query("SELECT count(*) FROM meta")
        except (sqlite3.Error, StoreError) as error:
            if hasattr(self, "_db"):
                self._db.close()
            failure = store_error(path, error) if isinstance(error, sqlite3.Error) else error
            if isinstance(failure, StoreFullError):
                raise failure from error
            raise DataError(f"store {path} cannot be opened: {error}; give a run's folder") from error

    def close(self) -> None:
        self._db.close()
        if self._copy is not None:
            self._copy.cleanup()

    @contextmanager
    def wal_checkpointing(self) -> Iterator[None]:
        """Inside the block, a thread copies the write-ahead log into the database; commits do not wait for it."""
        with WalCheckpointer(self._path) as self._wal_checkpointer:
            self._query(f"PRAGMA wal_autocheckpoint = {MAX_LOG_PAGES}")
            try:
                yield
            finally:
                self._query("PRAGMA wal_autocheckpoint = 1000")
                self._wal_checkpointer = None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads inside the block see one state of the store, even if another process writes."""
        self._query("BEGIN")
        try:
            yield
        finally:
            self._query("COMMIT")

    @contextmanager
    def transaction(self, *names: str) -> Iterator[None]:
        """A transaction: commits at the end of the block, durably; rolls back if the block raises.

        names: each one adds the fault points `store.NAME.open` (before the commit) and `store.NAME.durable` (after it)

        Raises: StoreFullError, StoreError.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                for name in names:
                    self._fault_point(f"store.{name}.open")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # if the disk is full, SQLite has already rolled back
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise store_error(self._path, error) from error
        if self._wal_checkpointer is not None:
            self._wal_checkpointer.committed()
        for name in names:
            self._fault_point(f"store.{name}.durable")

    # --- resume key ---

    def claim(self, resume_key: Mapping[str, str]) -> None:
        """Stores the resume key of a new run. Raises: DataError if the store has another one: it names each change."""
        found = self.meta()
        if problems := changes(found, resume_key):
            raise DataError(
                f"{self._path} is of another run: {'; '.join(problems)}; to resume, undo the change; to start a new "
                "run, choose another run.dir"
            )
        if not found:
            with self.transaction("claim"):
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", resume_key.items())

    def meta(self) -> dict[str, str]:
        """The stored resume key."""
        return dict(self._query("SELECT key, value FROM meta"))

    # --- writing decisions ---

    def commit(self, records: Sequence[Record]) -> None:
        """Writes the records of an event in one transaction. Raises: StoreFullError, StoreError."""
        if not records:
            return
        with self.transaction(*sorted({record.kind for record in records} - {""})):
            for record in records:
                write_record(self._db, record)

    def new_publication(self, version: int) -> int:
        """Returns a publication id that this run has not used before. Raises: StoreFullError, StoreError."""
        with self.transaction("publication"):
            row = self._db.execute(
                "INSERT INTO publications (version, published_at) VALUES (?, ?)", (version, time.time())
            )
            assert row.lastrowid is not None
            return row.lastrowid

    def drop_tokens(self, tallies: Mapping[int, str]) -> None:
        """Replaces the tokens of groups by their tallies. `tallies`: cursor → JSON. SQLite reuses the space."""
        with self.transaction("retention"):
            self._db.executemany(
                "UPDATE groups SET header = x'', token_ids = x'', spans = x'', logprobs = x'', num_bytes = 0, "
                "tally = ? WHERE cursor = ?",
                [(tally, cursor) for cursor, tally in tallies.items()],
            )

    # --- reading back ---

    def restore_lease_table(
        self, *, groups_per_batch: int, staleness_bound: int, num_steps: int, now_s: float
    ) -> LeaseTable:
        """The lease table as of the last commit.

        now_s  seconds since the epoch. A lease that was granted later, by a clock that was set back since, counts as
               granted now; else it would not expire before the clock is there again.
        """
        entries = self._query(
            f"SELECT cursor, slot, attempt, state, first_slot FROM entries WHERE {OPEN} ORDER BY cursor"
        )
        leases = self._query(
            "SELECT lease_id, cursor, slot, attempt, actor, min(granted_at, ?) FROM leases WHERE outcome = 'running'",
            now_s,
        )
        return LeaseTable.restore(
            groups_per_batch=groups_per_batch,
            staleness_bound=staleness_bound,
            num_steps=num_steps,
            step=self.num_batches(),
            entries=[
                Entry(cursor, slot, attempt, State(state), first) for cursor, slot, attempt, state, first in entries
            ],
            leases=[LeaseRecord(*row) for row in leases],
            next_lease_id=self._query("SELECT coalesce(max(lease_id), 0) + 1 FROM leases")[0][0],
            next_cursor=self._query("SELECT coalesce(max(cursor), -1) + 1 FROM entries")[0][0],
        )

    def num_failures(self) -> dict[int, int]:
        """cursor → number of its failures (`scheduler.MAX_FAILURES`), for questions neither trained nor skipped."""
        return dict(
            self._query(
                "SELECT cursor, count(*) FROM leases "
                "WHERE (outcome IN ('failed', 'refused') OR (outcome = 'expired' AND reason = ?)) "
                f"AND cursor IN (SELECT cursor FROM entries WHERE {OPEN}) GROUP BY cursor",
                ACTOR_DIED,
            )
        )

    def publications(self) -> dict[int, int]:
        """publication → version"""
        return dict(self._query("SELECT publication, version FROM publications"))

    def num_batches(self) -> int:
        """The number of trained batches."""
        return int(self._query("SELECT coalesce(max(step), -1) + 1 FROM batches")[0][0])

    def batch(self, step: int) -> list[int]:
        """The cursors of a trained batch, in slot order."""
        return [row[0] for row in self._query("SELECT cursor FROM batches WHERE step = ? ORDER BY position", step)]

    def group(self, cursor: int) -> TrajectoryGroup:
        """Reads and decodes a group. Raises: StoreError if it is not stored or its tokens were dropped."""
        rows = self._query("SELECT header, token_ids, spans, logprobs FROM groups WHERE cursor = ?", cursor)
        if not rows:
            raise StoreError(f"store {self._path} holds no group {cursor}")
        if not rows[0][0]:
            raise StoreError(f"store {self._path} has dropped the tokens of group {cursor} (see learner.retention)")
        return decode_frames(rows[0]).unpack()

    def query(self, sql: str, *parameters: object) -> list[tuple]:
        """Runs one SQL statement outside a transaction and returns its rows. For reads and pragmas."""
        return self._query(sql, *parameters)

    # --- inside ---

    def _create(self) -> None:
        version = self._query("PRAGMA user_version")[0][0]
        if version == 0:
            self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise DataError(
                f"store {self._path} must have schema {SCHEMA_VERSION}, got {version} (another version of Palimpsest)"
            )

    def _query(self, sql: str, *parameters: object) -> list[tuple]:
        try:
            with closing(self._db.execute(sql, parameters)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise store_error(self._path, error) from error
