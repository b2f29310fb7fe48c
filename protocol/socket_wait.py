"""Waiting, in asyncio, for a socket whose file descriptor says only that something has changed (as ZeroMQ's does).

Any operation on such a socket may use the signal up, so whoever has operated on it asks again on behalf of the others.
A wait that is cancelled takes no message with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Readiness:
    """`poll` returns the events that are there, as bits, and rearms the descriptor `fd`."""

    def __init__(self, fd: int, poll: Callable[[], int]) -> None:
        self._fd = fd
        self._poll = poll
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    async def wait(self, event: int) -> None:
        """Until `event` is there. It may be gone by the time the caller runs, where several wait for it."""
        if self._wake() & event:
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._fd, self._wake)
        waiter = (event, self._loop.create_future())
        self._waiters.append(waiter)
        try:
            await waiter[1]
        finally:
            self._waiters.remove(waiter)

    def operated(self) -> None:
        """To be called after each operation on the socket."""
        if self._waiters:
            self._wake()

    def close(self) -> None:
        """Before the socket is closed. Whoever waits is cancelled."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._loop = None  # the descriptor's number may soon be another's
        for _, future in self._waiters:
            future.cancel()

    def _wake(self) -> int:
        """The events that are there, of which everybody has been told who waits for them."""
        events = self._poll()
        for event, future in self._waiters:
            if events & event and not future.done():
                future.set_result(None)
        return events
