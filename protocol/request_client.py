"""Many requests in flight over one DEALER, matched to their replies by `request_id`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from typing import TypeVar

from protocol.errors import ProtocolError, RemoteError
from protocol.framing import Buffer, Message, decode, encode, expect
from protocol.messages import ErrorReply
from protocol.transport import Dealer

M = TypeVar("M", bound=Message)


class RequestClient:
    """Sends requests that carry a `request_id` and awaits the reply with the same one.

    A late or foreign reply is dropped. Used as an async context manager; leaving it cancels what is in flight.
    """

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
        self._ids = count(1)
        self._pending: dict[int, asyncio.Future[tuple[Message, Sequence[Buffer]]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self.num_dropped = 0

    async def __aenter__(self) -> RequestClient:
        self._reader = asyncio.create_task(self._read(), name=f"rpc-reader {self._dealer.address}")
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
        return next(self._ids)

    async def request(
        self, message: Message, reply: type[M], *, timeout_s: float, resend_s: float | None = None
    ) -> tuple[M, Sequence[Buffer]]:
        """`resend_s`, of a request that can be answered twice: it is sent again after so long, then after twice that,
        and so on, as a server that is killed takes what it had read with it; the first answer counts.

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
        """Should the reader die, what waits for it is told why, and so is whoever asks next."""
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
