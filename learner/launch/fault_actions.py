"""Implements the faults of `palimpsest chaos` for a process of this machine. Linux only.

Each fault uses a pidfd, so that it cannot hit a new process with the same pid.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from learner.launch.fault_draw import KILLS, FaultKind

Sleep = Callable[[float], Awaitable[object]]

_SLOW_STOPPED_S, _SLOW_RUNNING_S = 0.09, 0.01
_CUT_INTERVAL_S = 0.02
_PIDFD_GETFD = 438  # number of the system call on every architecture


async def inject_fault(kind: FaultKind, pid: int, *, for_s: float, sleep: Sleep = asyncio.sleep) -> bool:
    """Injects a fault for `for_s` seconds. Returns False if the process does not exist or ends during the fault.

    A stopped process always gets SIGCONT, also after an error or a cancellation. `sleep`: waits between the signals or
    cuts. Raises: PermissionError.
    """
    try:
        with _open_pidfd(pid) as pidfd:
            if kind in KILLS:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM if kind == "drain" else signal.SIGKILL)
            elif kind == "full":
                with _no_room(pid):
                    await sleep(for_s)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(for_s):
                        await _disturb_until_cancelled(kind, pid, pidfd, sleep)
    except (ProcessLookupError, FileNotFoundError):  # FileNotFoundError: its folder in /proc is gone
        return False
    return True


def can_cut(pid: int) -> bool:
    """Whether this process may duplicate the sockets of `pid` (ptrace permission, see kernel.yama.ptrace_scope)."""
    try:
        with _open_pidfd(pid) as pidfd:
            return all(True for _ in _connections(pid, pidfd))
    except OSError:
        return False


async def _disturb_until_cancelled(kind: FaultKind, pid: int, pidfd: int, sleep: Sleep) -> None:
    if kind == "cut":
        while True:
            for connection in _connections(pid, pidfd):
                with suppress(OSError):  # it is closed already
                    connection.shutdown(socket.SHUT_RDWR)
            await sleep(_CUT_INTERVAL_S)
    try:
        while True:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            await sleep(_SLOW_STOPPED_S)
            if kind == "slow":
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                await sleep(_SLOW_RUNNING_S)
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


@contextmanager
def _no_room(pid: int) -> Iterator[None]:
    """No file of the process can grow, as if its quota were used up: writes fail with EFBIG."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _open_pidfd(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _connections(pid: int, pidfd: int) -> Iterator[socket.socket]:
    """Yields duplicates of the process's established TCP connections; each is closed when the next one is requested."""
    libc = ctypes.CDLL(None, use_errno=True)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
        except FileNotFoundError:
            continue
        duplicate = libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
        if duplicate < 0:
            if (error := ctypes.get_errno()) == errno.EBADF:
                continue
            raise OSError(error, os.strerror(error))
        with socket.socket(fileno=duplicate) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and _is_connected(connection):
                yield connection


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True
