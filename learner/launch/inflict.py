"""What chaos does to a process of this machine, by its pid (Linux): kill it, stop it, slow it down, cut it off.

A pidfd is held throughout, so that a pid which was given to another process meanwhile is not hit.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Kind = Literal["kill", "stop", "slow", "cut"]

# A slowed process runs for a tenth of the time.
_SLOW_STOPPED_S, _SLOW_RUNNING_S = 0.09, 0.01
_CUT_EVERY_S = 0.02
_PIDFD_GETFD = 438  # the system call's number, the same on every architecture


async def inflict(kind: Kind, pid: int, *, for_s: float) -> bool:
    """False where there is no such process, or it ends meanwhile. However this ends, what was stopped runs again.

    Raises: PermissionError.
    """
    try:
        with _held(pid) as process:
            if kind == "kill":
                signal.pidfd_send_signal(process, signal.SIGKILL)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(for_s):
                        await _disturb(kind, pid, process)
    except (ProcessLookupError, FileNotFoundError):  # the latter: of its folder in /proc
        return False
    return True


def can_cut(pid: int) -> bool:
    """Whether this process may reach into the sockets of `pid`: what a debugger may (kernel.yama.ptrace_scope)."""
    try:
        with _held(pid) as process:
            return all(True for _ in _connections(pid, process))
    except OSError:
        return False


async def _disturb(kind: Kind, pid: int, process: int) -> None:
    """Until cancelled."""
    if kind == "cut":
        while True:
            for connection in _connections(pid, process):
                with suppress(OSError):  # it has gone by itself
                    connection.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(_CUT_EVERY_S)
    try:
        while True:
            signal.pidfd_send_signal(process, signal.SIGSTOP)
            await asyncio.sleep(_SLOW_STOPPED_S)
            if kind == "slow":
                signal.pidfd_send_signal(process, signal.SIGCONT)
                await asyncio.sleep(_SLOW_RUNNING_S)
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)


@contextmanager
def _held(pid: int) -> Iterator[int]:
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _connections(pid: int, process: int) -> Iterator[socket.socket]:
    """The established TCP connections of a process, each a duplicate that is closed when the next one is asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
        except FileNotFoundError:
            continue
        duplicate = libc.syscall(_PIDFD_GETFD, process, int(entry.name), 0)
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
