"""Concurrent requests over one DEALER, matched to their replies by `request_id`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from typing import TypeVar

from protocol.errors import ProtocolError, RemoteError
from protocol.framing import Buffer, Message, decode, encode, expect
from protocol.search_messages import ErrorReply
from protocol.transport import Dealer

M = TypeVar("M", bound=Message)


class RequestClient:
    """Sends requests that have a `request_id` and waits for the reply with the same id.

    Replies that match no pending request, and messages that cannot be decoded, are dropped and counted in
    `num_dropped`. Use it as an async context manager; leaving it cancels the pending requests and closes the DEALER.
    """

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
        self._ids = count(1)
        self._pending: dict[int, asyncio.Future[tuple[Message, Sequence[Buffer]]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self.num_dropped = 0

    async def __aenter__(self) -> RequestClient:
        self._reader = asyncio.create_task(self._read(), name=f"reply-reader {self._dealer.address}")
        self._reader.add_done_callback(self._fail_pending)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        for future in self._pending.values():
            future.cancel()
        self._dealer.close()

    def next_id(self) -> int:
        """Returns a `request_id` that this client has not used."""
        return next(self._ids)

    async def request(
        self, message: Message, reply: type[M], *, timeout_s: float, resend_s: float | None = None
    ) -> tuple[M, Sequence[Buffer]]:
        """Sends `message` and returns its reply and the reply's payload frames.

        `resend_s`: send the request again after this time, then after twice this time, and so on; the first reply is
        returned. It is needed because a killed server loses the requests that it has read. Use it only for requests
        that may be answered twice. None sends once.

        Raises: TimeoutError, RemoteError (the peer's ErrorReply), ProtocolError (another kind of reply).
        """
        if self._reader is not None and self._reader.done():
            self._reader.result()
        request_id: int = message.request_id  # type: ignore[attr-defined]
        future: asyncio.Future[tuple[Message, Sequence[Buffer]]] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = future
        try:
            async with asyncio.timeout(timeout_s):
                while not future.done():
                    await self._dealer.send([encode(message)], timeout_s=timeout_s)
                    await asyncio.wait([future], timeout=resend_s)
                    resend_s = None if resend_s is None else 2 * resend_s
                answer, frames = await future
        except TimeoutError:
            raise TimeoutError(f"no answer to {message.kind} from {self._dealer.address} in {timeout_s:g} s") from None
        finally:
            self._pending.pop(request_id, None)
        if isinstance(answer, ErrorReply):
            raise RemoteError(f"{message.kind} at {self._dealer.address}: {answer.error}")
        return expect(answer, reply), frames

    def _fail_pending(self, reader: asyncio.Task[None]) -> None:
        """If the reader task failed, raises its error in every pending request. Later requests raise it too."""
        error = None if reader.cancelled() else reader.exception()
        for future in self._pending.values():
            if error is not None and not future.done():
                future.set_exception(error)

    async def _read(self) -> None:
        while True:
            frames = await self._dealer.recv()
            try:
                message, payload = decode(frames)
            except ProtocolError:
                self.num_dropped += 1
                continue
            future = self._pending.get(getattr(message, "request_id", -1))
            if future is None or future.done():
                self.num_dropped += 1
                continue
            future.set_result((message, payload))
