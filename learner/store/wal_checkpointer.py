"""Copies a store's write-ahead log into its database in a thread, so that commits do not wait for it.

SQLite alone does it in the commit that makes the log 4 MB long, and syncs the database: with 50 groups a second in
every 20th commit, for up to 0.9 s on a busy disk (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from protocol.errors import StoreError

log = logging.getLogger(__name__)

# Commits of this period are copied together.
_EVERY_S = 0.25
# A log of 32 MB is copied within a commit: SQLite cannot restart a log from its beginning if it grows during the copy.
MAX_LOG_PAGES = 8_192


class WalCheckpointer:
    """A thread with its own connection, as a context manager. SQLite copies later what it has not copied."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._committed = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wal_checkpointer", daemon=True)

    def __enter__(self) -> WalCheckpointer:
        """Raises: StoreError."""
        try:
            self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StoreError(f"store {self._path}: {error}") from error
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._committed.set()
        self._thread.join()
        self._db.close()

    def committed(self) -> None:
        """Tells the thread that the log has new commits."""
        self._committed.set()

    def _run(self) -> None:
        while self._committed.wait() and not self._leaving.is_set():
            self._committed.clear()
            try:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:  # for example a full disk: commits stay in the log
                log.warning(
                    "store %s: the write-ahead log could not be copied into the database: %s", self._path, error
                )
            self._leaving.wait(_EVERY_S)
