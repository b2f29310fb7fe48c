"""An advisory file lock for one process at a time. The kernel releases it when the process ends, even after SIGKILL."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import DataError


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which it creates.

    what: a noun phrase for the caller, such as "a learner", for the error text

    Raises: DataError if another process holds the lock or the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise DataError(f"run.dir {path.parent} cannot be written: {error.strerror}; choose another run.dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{what} is already running in {path.parent}: stop it, or choose another folder") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now."""
    if not path.is_file():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
