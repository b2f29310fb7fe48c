"""Transports that are closed after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.transport import Transport
from tests.protocol.echo import Open


@pytest.fixture
async def transport() -> AsyncIterator[Open]:
    opened: list[Transport] = []

    def make(keys: Path | None = None) -> Transport:
        opened.append(Transport(keys=keys))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
