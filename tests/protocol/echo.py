"""A server that echoes messages, and clients that check it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from protocol.transport import Dealer, Router, Transport

WAIT_S = 20.0

Open = Callable[..., Transport]


@asynccontextmanager
async def echoing(router: Router) -> AsyncIterator[None]:
    """Runs a server that echoes every message, and penalizes the sender of a message `bad` instead."""

    async def echo() -> None:
        while True:
            peer, frames = await router.recv()
            if frames and bytes(frames[0]) == b"bad":
                router.penalize(peer)
            else:
                router.send(peer, frames)

    task = asyncio.create_task(echo())
    yield
    task.cancel()
    await asyncio.wait([task])


async def echoed(dealer: Dealer, text: bytes, *, timeout_s: float = WAIT_S) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await dealer.send([text])
            return bytes((await dealer.recv())[0]) == text
    except TimeoutError:
        return False
