"""Copies a store's write-ahead log into its database in a thread, so that commits do not wait for it.

By default, SQLite copies it within the commit that makes the log longer than 4 MB and then syncs the database. At 50
groups per second this was every 20th commit, and took up to 0.9 s on a busy disk (docs/benchmarks.md).
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from pathlib import Path

from protocol.errors import StoreError

log = logging.getLogger(__name__)

# Pause between two copies: all commits since the last copy are copied together.
_EVERY_S = 0.25
# At 32 MB, a commit copies the log itself: SQLite can overwrite the log only if no commit was added during a copy.
MAX_LOG_PAGES = 8_192


class WalCheckpointer:
    """A context manager that runs the thread, which has its own connection. If a copy fails, a later one repeats it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._committed = threading.Event()
        self._stopping = threading.Event()
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
        self._stopping.set()
        self._committed.set()
        self._thread.join()
        self._db.close()

    def committed(self) -> None:
        """Tells the thread that the log has new commits."""
        self._committed.set()

    def _run(self) -> None:
        while self._committed.wait() and not self._stopping.is_set():
            self._committed.clear()
            try:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:  # for example a full disk: commits stay in the log
                log.warning(
                    "store %s: the write-ahead log could not be copied into the database: %s", self._path, error
                )
            self._stopping.wait(_EVERY_S)
