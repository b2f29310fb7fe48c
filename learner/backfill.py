"""Copies a store's write-ahead log into its database, beside the commits instead of within one of them.

SQLite does it in the commit that makes the log 4 MB long, and syncs the database: with 50 groups a second, every 20th
actor waited for it, up to 0.9 s where the disk was busy; beside the commits, p99 is 8 ms (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

log = logging.getLogger(__name__)

# Commits of so long are copied at once.
_EVERY_S = 0.25


class Backfill:
    """A thread with a connection of its own, from entering to leaving. What it does not come to, SQLite does later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._committed = threading.Event()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="backfill", daemon=True)

    def __enter__(self) -> Backfill:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._committed.set()
        self._thread.join()

    def committed(self) -> None:
        """There is something new in the log."""
        self._committed.set()

    def _run(self) -> None:
        db = sqlite3.connect(self._path, isolation_level=None)
        try:
            while self._committed.wait() and not self._leaving.is_set():
                self._committed.clear()
                try:
                    db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                except sqlite3.Error as error:  # a full disk, say: what is committed stays in the log
                    log.warning("store %s: its log could not be copied into it: %s", self._path, error)
                self._leaving.wait(_EVERY_S)
        finally:
            db.close()
