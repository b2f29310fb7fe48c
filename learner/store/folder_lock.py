"""An advisory file lock for one process at a time. The kernel releases it when the process ends, even after SIGKILL.

The file states who holds it (`LockHolder`), so that an error can name the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from protocol.errors import DataError
from protocol.role_startup import LAUNCHER_PID_VARIABLE

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A process that holds a lock. `launcher_pid`: the launcher that started it; None if a user started it."""

    pid: int
    host: str
    launcher_pid: int | None

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host}"


@contextmanager
def locked(path: Path, *, what: str, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which it creates. No other file is changed.

    what       a noun phrase for the caller, such as "a learner", for the error text
    timeout_s  how long it waits for another holder to end

    Raises: DataError if another process holds the lock or the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise DataError(f"run.dir {path.parent} cannot be written: {error.strerror}; choose another run.dir") from error
    with file:
        deadline_s = time.monotonic() + timeout_s
        while not _acquire(file):
            if time.monotonic() >= deadline_s:
                holder = read_holder(path)
                named = f" ({holder})" if holder else ""
                raise DataError(f"{what} is already running in {path.parent}{named}: stop it, or choose another folder")
            time.sleep(_POLL_S)
        with suppress(OSError):  # only information; the disk may be full
            file.truncate(0)
            file.write(json.dumps(asdict(_this_process())))
            file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock now."""
    if not path.is_file():
        return False
    with path.open("a") as file:
        return not _acquire(file)


def read_holder(path: Path) -> LockHolder | None:
    """The process that holds the lock, or held it last; None if it is not known."""
    try:
        return LockHolder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def end_orphan(path: Path, *, what: str, timeout_s: float = 10.0) -> LockHolder | None:
    """Ends the holder of a lock if the launcher that started it has ended. Returns it; None if there was none.

    Call it only while no launcher runs in the folder. A holder may be an orphan if it was stopped (SIGSTOP) when its
    launcher was killed, or may be ending just now: it gets SIGKILL, and this waits until the lock is free. A process
    that a user started or that runs on another host is not ended.

    Raises: DataError, with the process and what to do, if the lock is still held after `timeout_s`.
    """
    if not is_locked(path):
        return None
    holder = read_holder(path)
    deadline_s = time.monotonic() + timeout_s
    if holder is not None and holder.launcher_pid is not None and holder.host == socket.gethostname():
        _kill_if_open(holder.pid, path)
    elif holder is not None and holder.launcher_pid is None:
        deadline_s = time.monotonic()
    while is_locked(path):
        if time.monotonic() >= deadline_s:
            named, kill = (f" ({holder})", f": end it with `kill -9 {holder.pid}` there") if holder else ("", "")
            raise DataError(
                f"{what}{named} still runs in {path.parent}, without a launcher{kill}; or choose another folder"
            )
        time.sleep(_POLL_S)
    return holder


def _kill_if_open(pid: int, path: Path) -> None:
    """Sends SIGKILL to `pid` if it has the file `path` open, so that no other process with this pid can be hit."""
    with suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            if any(_is_same_file(entry, path) for entry in Path(f"/proc/{pid}/fd").iterdir()):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def _is_same_file(entry: Path, path: Path) -> bool:
    try:
        return entry.samefile(path)
    except OSError:
        return False


def _this_process() -> LockHolder:
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    return LockHolder(os.getpid(), socket.gethostname(), int(launcher) if launcher else None)


def _acquire(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
