"""What every role's process does first: logging, a title, and SIGTERM as an orderly stop."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


def start_role(title: str) -> None:
    """Logs to stderr, names the process for `ps`, and turns SIGTERM into SystemExit(143) so that `finally` runs.

    An asyncio role goes on with `run_async`, whose signals cancel a task instead.
    """
    import setproctitle

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {title} %(levelname)s %(message)s", force=True
    )
    for noisy in ("httpx", "urllib3", "transformers", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    setproctitle.setproctitle(f"palimpsest {title}")
    signal.signal(signal.SIGTERM, _stop)
    _allow_many_connections()
    _die_with_launcher()


def run_async(coroutine: Coroutine[object, object, T]) -> T:
    """asyncio.run on uvloop, where there is one. SIGTERM and SIGHUP stop it as Ctrl-C does: its task is cancelled,
    and when that is done, KeyboardInterrupt is raised."""
    signals: list[int] = []
    run = asyncio.run
    if sys.platform != "win32":
        import uvloop

        run = uvloop.run
    try:
        return run(_cancelled_by_signals(coroutine, signals))
    except asyncio.CancelledError:
        if signals:
            raise KeyboardInterrupt from None
        raise


async def _cancelled_by_signals(coroutine: Coroutine[object, object, T], signals: list[int]) -> T:
    """Cancels the running task at the first signal and notes it in `signals`; later ones change nothing."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if not signals:
            signals.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    return await coroutine


def _stop(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(143)


def _allow_many_connections() -> None:
    """As many open files as the system allows: each peer of a server is one, and the usual soft limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a lower one that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _die_with_launcher() -> None:
    """Where a launcher started this process, the kernel sends SIGTERM when the launcher ends (Linux).

    A rank's parent is torchrun, which runs in a process that has done this.
    """
    launcher = os.environ.get("PALIMPSEST_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher) and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(143)
