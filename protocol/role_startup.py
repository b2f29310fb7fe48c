"""Start-up of every role's process: logging, process title, an orderly stop on SIGTERM, the end with its launcher."""

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

LAUNCHER_PID_VARIABLE = "PALIMPSEST_LAUNCHER_PID"
"""Environment variable with the pid of the launcher that started this process."""

_CONTROL_CHARS = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


class RoleLogFormatter(logging.Formatter):
    """Escapes control characters and indents the further lines of a message.

    So the names and texts of peers cannot write to the terminal or imitate a log line.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROL_CHARS).replace("\n", "\n    ")


def start_role(title: str) -> None:
    """Sets up logging to stderr and the process title, and turns SIGTERM into SystemExit(143) so that `finally` runs.

    An asyncio role then calls `run_async`, whose signal handlers cancel the main task instead.
    """
    import setproctitle

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RoleLogFormatter(f"%(asctime)s {title} %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "transformers", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    setproctitle.setproctitle(f"palimpsest {title}")
    signal.signal(signal.SIGTERM, _exit_on_signal)
    _allow_many_connections()
    end_with_launcher()


def run_async(coroutine: Coroutine[object, object, T], *, drain: asyncio.Event | None = None) -> T:
    """Runs `coroutine` as `asyncio.run` does, on uvloop except on Windows.

    SIGTERM and SIGHUP act like Ctrl-C: the task is cancelled, and KeyboardInterrupt is raised after it has ended.
    With `drain`, the first SIGTERM sets this event instead; any signal after it cancels the task.
    """
    signals: list[int] = []
    run = asyncio.run
    if sys.platform != "win32":
        import uvloop

        run = uvloop.run
    try:
        return run(_cancel_on_signals(coroutine, signals, drain))
    except asyncio.CancelledError:
        if signals:
            raise KeyboardInterrupt from None
        raise


async def _cancel_on_signals(
    coroutine: Coroutine[object, object, T], signals: list[int], drain: asyncio.Event | None
) -> T:
    """Cancels the running task at the first signal and appends it to `signals`; later signals are ignored.

    A first SIGTERM sets `drain` instead, if it is given.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(number: int) -> None:
        if number == signal.SIGTERM and drain is not None and not drain.is_set():
            drain.set()
        elif not signals:
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


def end_with_launcher() -> None:
    """Asks the kernel to send SIGKILL to this process when the launcher that started it ends (Linux).

    SIGKILL also ends a process that is stopped, or whose main thread waits; every role can be killed at any point.
    Exits if the launcher has ended already. The check is skipped for torchrun's ranks: their parent is torchrun, which
    runs in a process that has itself called this function.
    """
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher) and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(143)
