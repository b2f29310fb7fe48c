"""Waiting, in asyncio, for events of a socket whose file descriptor is edge-triggered (ZeroMQ's ZMQ_FD).

The descriptor becomes readable only when the socket's state changes, and any operation on the socket may consume that
signal. Poll again after every operation: otherwise other tasks that wait on the socket are not woken.
Cancelling a wait loses no message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class SocketWaiter:
    """Lets several tasks wait for events of one socket with the edge-triggered file descriptor `fd`.

    `poll` returns the pending events as bits and rearms `fd`.
    """

    def __init__(self, fd: int, poll: Callable[[], int]) -> None:
        self._fd = fd
        self._poll = poll
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    async def wait(self, event: int) -> None:
        """Waits until `event` is pending.

        If several tasks wait for one event, another task may have consumed it before the caller runs: try the
        operation, and wait again if it would block.
        """
        if self._poll_and_wake() & event:
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._poll_and_wake)
        waiter = (event, self._loop.create_future())
        self._waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            self._waiters.remove(waiter)

    def after_operation(self) -> None:
        """Polls again and wakes the waiting tasks; must be called after every operation on the socket."""
        if self._waiters:
            self._poll_and_wake()

    def close(self) -> None:
        """Cancels all waits. Must be called before the socket is closed; a second call does nothing."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._loop = None  # the system may reuse the descriptor's number: never remove its reader twice
        for _, future in self._waiters:
            future.cancel()

    def _poll_and_wake(self) -> int:
        """Wakes every task whose event is pending. Returns the pending events."""
        events = self._poll()
        for event, future in self._waiters:
            if events & event and not future.done():
                future.set_result(None)
        return events
