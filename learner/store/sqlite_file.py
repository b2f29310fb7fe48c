"""Opens the SQLite file of a store, also on a read-only disk, and translates SQLite's errors."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

from protocol.errors import StoreError, StoreFullError

# SQLite reports a write that a quota or a limit on the size of files ends as one of these, not as SQLITE_FULL.
_NO_ROOM_CODES = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_TRUNCATE)


def connect(uri: str) -> sqlite3.Connection:
    """Raises: sqlite3.Error."""
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30.0)


def connect_read_only(path: Path) -> tuple[sqlite3.Connection, TemporaryDirectory[str] | None]:
    """Opens an existing database for reading. Returns the temporary folder of a copy too, if one had to be made.

    On a read-only disk, SQLite cannot create the index of a write-ahead log: there the database is read without its log
    if that is empty; else both are copied to a temporary folder. Raises: sqlite3.Error, OSError.
    """
    wal = Path(f"{path}-wal")
    if os.access(path.parent, os.W_OK):
        return connect(f"file:{path}?mode=ro"), None
    if not wal.exists() or not wal.stat().st_size:
        return connect(f"file:{path}?mode=ro&immutable=1"), None
    copy = TemporaryDirectory(prefix="palimpsest-store-")
    for file in (path, wal):
        shutil.copy(file, copy.name)
    return connect(f"file:{Path(copy.name) / path.name}?mode=rw"), copy


def store_error(path: Path, error: sqlite3.Error) -> StoreError:
    """StoreFullError if the disk, a quota or a limit is full, else StoreError."""
    code = getattr(error, "sqlite_errorcode", 0)
    is_full = code & 0xFF == sqlite3.SQLITE_FULL or code in _NO_ROOM_CODES
    return (StoreFullError if is_full else StoreError)(f"store {path}: {error}")
