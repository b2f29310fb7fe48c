"""Runs the processes of a plan on this machine: starts, watches, restarts, stops.

    start ─► running ──exit 0──► done
               │  └──exit 2──► a user error at the first start: the run stops with its sentence; 3: at any start
               └──any other──► restarted after a growing pause; too often while the run makes no step: it stops

Each process leads a session of its own, so Ctrl-C reaches only the launcher, which ends them in order: SIGTERM, then
SIGKILL after `STOP_TIMEOUT_S`. Should the launcher itself be killed, the kernel ends its children.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from learner.launch.plan import ProcessSpec
from learner.metrics.jsonl import last_step
from learner.store.folder_lock import locked
from learner.store.run_folder import RunFolder
from protocol.errors import PalimpsestError, TrainingStopped, UserError
from protocol.fault_injection import VARIABLE as FAULT_VARIABLE

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
_RESTART_PAUSE_S = 0.25
# A process that is started again so often, and ends again, while the run makes no step fails the run.
MAX_RESTARTS = 5
# Whoever ran so long had started well: it is no part of a row of failures.
_LONG_LIFE_S = 600.0
# The pause before a restart doubles with each life in a row that was as short as this; one that was killed may well
# work at once, one that ended by itself will hardly.
_SHORT_LIFE_S = 10.0
_MAX_PAUSE_S = 15.0
_MAX_PAUSE_KILLED_S = 2.0
_USER_ERROR_STATUS = 2
_TRAINING_STOPPED_STATUS = 3


class RunFailed(PalimpsestError):
    """A process ended too often; its last log lines are in the message."""


@dataclass(slots=True)
class _Child:
    spec: ProcessSpec
    process: asyncio.subprocess.Process | None = None
    status: int | None = None
    num_restarts: int = 0
    started_s: float = 0.0
    num_failures: int = 0
    """In a row: the run has made no step since the first of them."""
    failed_at_step: int = -1
    num_short_lives: int = 0
    """In a row."""


class Supervisor:
    """An async context manager: leaving it stops all processes, whatever the reason."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._temporary = run_dir.resolve() / "tmp"
        self._children: dict[str, _Child] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] | None = None
        self._lock = ExitStack()

    async def __aenter__(self) -> Supervisor:
        """Raises: DataError where another launcher works in the folder."""
        self._lock.enter_context(locked(RunFolder(self._run_dir).launcher_lock, what="a launcher"))
        (self._run_dir / "logs").mkdir(exist_ok=True)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._failure = asyncio.get_running_loop().create_future()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._lock:
            await self.stop(list(self._children))
            if self._failure is not None and self._failure.done() and not self._failure.cancelled():
                self._failure.exception()
            (self._run_dir / "processes.json").unlink(missing_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)

    def log_path(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"

    async def start(self, specs: Iterable[ProcessSpec]) -> None:
        for spec in specs:
            child = self._children[spec.name] = _Child(spec)
            await self._spawn(child)
            watcher = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")
            watcher.add_done_callback(self._watcher_ended)
            self._watchers[spec.name] = watcher

    async def wait(self, name: str) -> None:
        """Until `name` has ended well. Raises: UserError, RunFailed where any process stops the run."""
        assert self._failure is not None
        watcher = self._watchers[name]
        await asyncio.wait([watcher, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            self._failure.result()

    async def run(self, spec: ProcessSpec) -> None:
        """Runs a process that is to end by itself. Raises: UserError, RunFailed (also for any other status but 0)."""
        child = self._children[spec.name] = _Child(spec)
        await self._spawn(child)
        assert child.process is not None
        assert self._failure is not None
        ended = asyncio.ensure_future(child.process.wait())
        await asyncio.wait([ended, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            ended.cancel()
            self._failure.result()
        del self._children[spec.name]
        self._write_processes()
        if (error := self._error_of(child, ended.result())) is not None:
            raise error

    def _watcher_ended(self, watcher: asyncio.Task[None]) -> None:
        """A watcher that dies leaves its process unwatched: the run stops with its error."""
        error = None if watcher.cancelled() else watcher.exception()
        if error is not None and self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def stop(self, names: list[str]) -> None:
        """SIGTERM to all, SIGKILL to those that stay. Shielded: a second Ctrl-C does not leave half of them."""
        for name in names:
            if (watcher := self._watchers.pop(name, None)) is not None:
                watcher.cancel()
        children = [self._children.pop(name) for name in names if name in self._children]
        await asyncio.shield(asyncio.gather(*(self._end(child) for child in children)))

    def states(self) -> dict[str, tuple[str, int]]:
        """name → (running, restarting or its exit status; restarts so far)"""
        return {name: (_state(child), child.num_restarts) for name, child in self._children.items()}

    async def _spawn(self, child: _Child) -> None:
        with self.log_path(child.spec.name).open("ab") as output:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_environment(self._temporary, first=child.num_restarts == 0),
            )
        child.status, child.started_s = None, time.monotonic()
        self._write_processes()

    async def _watch(self, child: _Child) -> None:
        assert self._failure is not None
        while True:
            assert child.process is not None
            child.status = await child.process.wait()
            self._write_processes()
            if child.status == 0:
                return
            too_often = self._count_failure(child) > MAX_RESTARTS
            wrong_from_the_start = child.status == _USER_ERROR_STATUS and child.num_restarts == 0
            if wrong_from_the_start or child.status == _TRAINING_STOPPED_STATUS or too_often:
                if not self._failure.done():
                    self._failure.set_exception(self._error_of(child, child.status) or RunFailed(child.spec.name))
                return
            pause_s = self._pause_s(child)
            log.warning("%s ended (%s): restarting in %.1f s", child.spec.name, _ended(child.status), pause_s)
            await asyncio.sleep(pause_s)
            child.num_restarts += 1
            await self._spawn(child)

    def _pause_s(self, child: _Child) -> float:
        is_short = time.monotonic() - child.started_s < _SHORT_LIFE_S
        child.num_short_lives = child.num_short_lives + 1 if is_short else 0
        longest_s = _MAX_PAUSE_KILLED_S if child.status == -signal.SIGKILL else _MAX_PAUSE_S
        return min(longest_s, _RESTART_PAUSE_S * 2 ** (child.num_short_lives + 1))

    def _count_failure(self, child: _Child) -> int:
        """How often in a row it has failed by now."""
        step = last_step(RunFolder(self._run_dir).metrics)
        if step > child.failed_at_step or time.monotonic() - child.started_s > _LONG_LIFE_S:
            child.num_failures = 0
        child.num_failures += 1
        child.failed_at_step = max(child.failed_at_step, step)
        return child.num_failures

    async def _end(self, child: _Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop in %.0f s: killed", child.spec.name, STOP_TIMEOUT_S)
            process.kill()
            await process.wait()

    def _error_of(self, child: _Child, status: int) -> PalimpsestError | None:
        if status == 0:
            return None
        lines = self.log_path(child.spec.name).read_text(errors="replace").splitlines()
        if status in (_USER_ERROR_STATUS, _TRAINING_STOPPED_STATUS):
            said = next((line for line in reversed(lines) if line.startswith("error: ")), "error: see its log")
            kind = UserError if status == _USER_ERROR_STATUS else TrainingStopped
            return kind(f"{child.spec.name}: {said.removeprefix('error: ')}")
        tail = "\n".join(lines[-15:])
        return RunFailed(f"{child.spec.name} ended ({_ended(status)}); {self.log_path(child.spec.name)} ends:\n{tail}")

    def _write_processes(self) -> None:
        """RUN/processes.json: who runs under which pid, for people and tools."""
        pids = {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process is not None and child.process.returncode is None
        }
        aside = self._run_dir / "processes.json.tmp"
        aside.write_text(json.dumps(pids, indent=2) + "\n")
        aside.replace(self._run_dir / "processes.json")


def _environment(temporary: Path, *, first: bool) -> dict[str, str]:
    """One torch/BLAS thread a process unless a role asks for more; the launcher's pid, whose end is theirs; a folder
    for temporary files, which the launcher removes, because a process that is killed cannot; and faults that were asked
    for, at a `first` start only."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name not in os.environ}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    launcher = {"PALIMPSEST_LAUNCHER_PID": str(os.getpid()), "TMPDIR": str(temporary)}
    given = {name: value for name, value in os.environ.items() if first or name != FAULT_VARIABLE}
    return {**given, **threads, **quiet, **launcher}


def _state(child: _Child) -> str:
    if child.process is not None and child.process.returncode is None:
        return "running"
    return "done" if child.status == 0 else "restarting"


def _ended(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
