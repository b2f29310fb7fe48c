"""Start-up of every role's process: logging, process title, and an orderly stop on SIGTERM."""

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
    """Sets up logging to stderr and the process title, and turns SIGTERM into SystemExit(143) so that `finally` runs.

    An asyncio role then calls `run_async`, whose signal handlers cancel the main task instead.
    """
    import setproctitle

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {title} %(levelname)s %(message)s", force=True
    )
    for noisy in ("httpx", "urllib3", "transformers", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    setproctitle.setproctitle(f"palimpsest {title}")
    signal.signal(signal.SIGTERM, _exit_on_signal)
    _allow_many_connections()
    _die_with_launcher()


def run_async(coroutine: Coroutine[object, object, T]) -> T:
    """Runs `coroutine` as `asyncio.run` does, on uvloop except on Windows.

    SIGTERM and SIGHUP act like Ctrl-C: the task is cancelled, and KeyboardInterrupt is raised after it has ended.
    """
    signals: list[int] = []
    run = asyncio.run
    if sys.platform != "win32":
        import uvloop

        run = uvloop.run
    try:
        return run(_cancel_on_signals(coroutine, signals))
    except asyncio.CancelledError:
        if signals:
            raise KeyboardInterrupt from None
        raise


async def _cancel_on_signals(coroutine: Coroutine[object, object, T], signals: list[int]) -> T:
    """Cancels the running task at the first signal and appends it to `signals`; later signals are ignored."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if not signals:
            signals.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    return await coroutine


def _exit_on_signal(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(143)


def _allow_many_connections() -> None:
    """Raises the soft limit of open files to the hard limit: each peer of a server needs one, and 1,024 is usual."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a lower limit that it does not report
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def _die_with_launcher() -> None:
    """Asks the kernel to send SIGTERM to this process when the launcher that started it ends (Linux).

    Exits if the launcher has ended already. The check is skipped for torchrun's ranks: their parent is torchrun, which
    runs in a process that has itself called this function.
    """
    launcher = os.environ.get("PALIMPSEST_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(launcher) and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(143)
