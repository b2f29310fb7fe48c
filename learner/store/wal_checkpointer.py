"""Copies a store's write-ahead log into its database, beside the commits instead of within one of them.

SQLite does it in the commit that makes the log 4 MB long, and syncs the database: with 50 groups a second every 20th
commit, up to 0.9 s of it where the disk was busy (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from protocol.errors import StoreError

log = logging.getLogger(__name__)

# Commits of so long are copied at once.
_EVERY_S = 0.25
# A log of 32 MB is copied within a commit after all: one that is copied while it grows never begins anew.
MAX_LOG_PAGES = 8_192


class WalCheckpointer:
    """A thread with a connection of its own, from entering to leaving. What it does not come to, SQLite does later."""

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
        """There is something new in the log."""
        self._committed.set()

    def _run(self) -> None:
        while self._committed.wait() and not self._leaving.is_set():
            self._committed.clear()
            try:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:  # a full disk, say: what is committed stays in the log
                log.warning("store %s: its log could not be copied into it: %s", self._path, error)
            self._leaving.wait(_EVERY_S)
