"""Logs refused messages: the first ones of each peer, then one line per period with the number of the others.

Untrusted peers choose how many messages they send, so the number of lines must not depend on it.
"""

from __future__ import annotations

import asyncio
import logging

_LINES_PER_PEER = 3
# A peer can reconnect as another one, so there is a limit for all of them.
_MAX_LINES = 20
_PERIOD_S = 60.0


class RefusalLog:
    """Use it in one event loop. After a period without a refused message, each peer has its first lines again."""

    def __init__(self, log: logging.Logger, *, period_s: float = _PERIOD_S) -> None:
        self._log = log
        self._period_s = period_s
        self._num_logged: dict[bytes, int] = {}
        self._num_refused = 0
        self._num_not_logged = 0
        self._last = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, peer: bytes, error: Exception) -> None:
        """Logs or counts a message of `peer` that was refused because of `error`."""
        self._num_refused += 1
        num = self._num_logged.get(peer, 0)
        if num < _LINES_PER_PEER and sum(self._num_logged.values()) < _MAX_LINES:
            self._num_logged[peer] = num + 1
            self._log.warning("refused a message: %s", error)
        else:
            self._num_not_logged += 1
            self._last = str(error)
        if self._timer is None:
            self._start_period()

    def _start_period(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._end_period)

    def _end_period(self) -> None:
        self._timer = None
        if self._num_not_logged:
            self._log.warning(
                "refused %d more messages in %g s; the last one: %s", self._num_not_logged, self._period_s, self._last
            )
        if self._num_refused:
            self._start_period()
        else:
            self._num_logged.clear()
        self._num_refused = self._num_not_logged = 0
