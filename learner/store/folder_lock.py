"""One process at a time: an advisory lock that the kernel releases however its holder ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import DataError


@contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Holds `path`, made where it is missing. Raises: DataError where another process holds it or it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise DataError(f"run.dir {path.parent} cannot be written: {error.strerror}; choose another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{what} is already running in {path.parent}: stop it, or choose another folder") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds `path` now."""
    if not path.is_file():
        return False
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
