"""Waits while a disk or a quota is full."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from protocol.errors import StoreFullError

log = logging.getLogger(__name__)

T = TypeVar("T")

# No space, quota exceeded, limit on the size of a file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RETRY_S = 2.0
_LOG_EVERY_S = 60.0


def is_no_room(error: BaseException) -> bool:
    """Whether the error says that a disk or a quota is full."""
    return isinstance(error, StoreFullError) or (isinstance(error, OSError) and error.errno in _NO_ROOM)


def wait_for_room(
    write: Callable[[], T],
    *,
    what: str,
    is_retried: Callable[[BaseException], bool] = is_no_room,
    retry_s: float = _RETRY_S,
    log_every_s: float = _LOG_EVERY_S,
) -> T:
    """Returns the result of `write`, repeated until it does not fail for lack of room. It may be repeated at any point.

    what         what cannot be written, for the log: "the last checkpoint"
    is_retried   which errors are waited out; others are raised
    log_every_s  the log says again after this time that it waits
    """
    logged_s: float | None = None
    while True:
        try:
            result = write()
        except (OSError, StoreFullError) as error:
            if not is_retried(error):
                raise
            if logged_s is None or time.monotonic() - logged_s >= log_every_s:
                log.error("%s cannot be written: %s; waiting until there is room", what, error)
                logged_s = time.monotonic()
            time.sleep(retry_s)
        else:
            if logged_s is not None:
                log.info("%s is written", what)
            return result
