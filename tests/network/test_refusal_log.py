"""The number of log lines about refused messages does not depend on how many messages a peer sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from learner.network.refusal_log import RefusalLog
from protocol.errors import ProtocolError
from tests.network.peers import WAIT_S

PERIOD_S = 0.05
log = logging.getLogger("refusals")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_the_first_messages_of_each_peer_are_logged_and_the_others_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = RefusalLog(log, period_s=PERIOD_S)
    for i in range(1000):
        refusals.add(b"a", ProtocolError(f"a{i}"))
    refusals.add(b"b", ProtocolError("b0"))
    assert caplog.messages == [f"refused a message: {error}" for error in ("a0", "a1", "a2", "b0")]
    await until(lambda: "refused 997 more messages in 0.05 s; the last one: a999" in caplog.messages)


async def test_peers_with_ever_new_names_are_limited_together(caplog: pytest.LogCaptureFixture) -> None:
    refusals = RefusalLog(log, period_s=PERIOD_S)
    for i in range(1000):
        refusals.add(f"peer {i}".encode(), ProtocolError("no"))
    assert len(caplog.messages) == 20
    await until(lambda: "refused 980 more messages in 0.05 s; the last one: no" in caplog.messages)


async def test_a_peer_that_goes_on_gets_one_line_a_period_and_its_first_lines_again_after_a_quiet_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = RefusalLog(log, period_s=PERIOD_S)
    for _ in range(4):
        refusals.add(b"a", ProtocolError("first"))
    await until(lambda: len(caplog.messages) == 4)
    refusals.add(b"a", ProtocolError("second"))
    await until(lambda: len(caplog.messages) == 5)
    assert caplog.messages[3:] == [f"refused 1 more messages in 0.05 s; the last one: {e}" for e in ("first", "second")]
    caplog.clear()
    loop = asyncio.get_running_loop()
    quiet = loop.create_future()
    loop.call_later(3 * PERIOD_S, quiet.set_result, None)
    await quiet
    for _ in range(3):
        refusals.add(b"a", ProtocolError("third"))
    assert caplog.messages == ["refused a message: third"] * 3
