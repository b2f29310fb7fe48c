"""The supervisor: starts, watches, restarts and stops the processes of a run on this machine.

    start ─► running ──exit 0──► done
               ├──exit 2──► user error: the run stops with its message
               ├──exit 3──► training cannot continue: the run stops with its message
               └──other───► restarted after a growing pause; too many failures without a new step stop the run
                            (learner/launch/restart_policy.py)

    task per process     consumes: its exit status      produces: a restart, or the run's failure
    thread per process   consumes: its output (a pipe)  produces: logs/NAME.log (learner/launch/process_log.py)
    wait(), run()        wait for: the process they name, or the run's failure

Each process runs in its own session, so Ctrl-C reaches only the launcher. The launcher stops the processes: SIGTERM to
all, then SIGKILL to those that still run after `stop_timeout_s`. If the launcher is killed, the kernel sends SIGKILL
to its processes (protocol/role_startup.py). A learner that remains all the same is ended by the next launcher.

A full disk ends nothing here: log lines are dropped, processes.json is written when there is room.
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
from typing import Literal

from learner.launch.process_log import ProcessLog
from learner.launch.process_plan import ProcessSpec
from learner.launch.restart_policy import (
    TRAINING_STOPPED_STATUS,
    USER_ERROR_STATUS,
    RestartPolicy,
    RestartState,
    decide,
)
from learner.metrics.jsonl import last_step
from learner.store.folder_lock import end_orphan, locked
from learner.store.run_folder import RunFolder
from protocol.atomic_write import atomic_write
from protocol.errors import DataError, PalimpsestError, TrainingStopped, UserError
from protocol.fault_injection import VARIABLE as FAULT_VARIABLE
from protocol.role_startup import LAUNCHER_PID_VARIABLE

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 10.0
_NUM_LOG_LINES_IN_ERROR = 15


class RunFailed(PalimpsestError):
    """A process failed too often. The message contains its last log lines."""


@dataclass(slots=True)
class _Child:
    spec: ProcessSpec
    restarts: RestartState
    log: ProcessLog
    process: asyncio.subprocess.Process | None = None
    status: int | None = None
    num_restarts: int = 0
    started_s: float = 0.0


class Supervisor:
    """An async context manager. Its exit stops all processes, also after an error or a cancellation."""

    def __init__(
        self,
        run_dir: Path,
        *,
        restart_policy: RestartPolicy = RestartPolicy(),
        stop_timeout_s: float = _STOP_TIMEOUT_S,
    ) -> None:
        self._folder = RunFolder(run_dir)
        self._temporary = RunFolder(run_dir.resolve()).temporary
        self._restart_policy = restart_policy
        self._stop_timeout_s = stop_timeout_s
        self._children: dict[str, _Child] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] | None = None
        self._lock = ExitStack()

    async def __aenter__(self) -> Supervisor:
        """Takes the folder's lock before it writes anything.

        Raises: DataError if another launcher, or a learner without a launcher, runs in the folder, or if it cannot be
        written.
        """
        with ExitStack() as stack:
            stack.enter_context(locked(self._folder.launcher_lock, what="a launcher"))
            if orphan := end_orphan(self._folder.learner_lock, what="a learner"):
                log.warning("ended a learner (%s) whose launcher had been killed", orphan)
            try:
                self._folder.processes.unlink(missing_ok=True)  # of a launcher that was killed
                self._folder.logs.mkdir(exist_ok=True)
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir()
            except OSError as error:
                raise DataError(f"run.dir {self._folder.root} cannot be written: {error.strerror}") from error
            self._lock = stack.pop_all()
        self._failure = asyncio.get_running_loop().create_future()
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._lock:
            await self.stop(list(self._children))
            if self._failure is not None and self._failure.done() and not self._failure.cancelled():
                self._failure.exception()  # marks it as retrieved
            self._folder.processes.unlink(missing_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)

    def log_path(self, name: str) -> Path:
        """The log of the process `name`; an older part of it is in the file of this name + .1."""
        return self._folder.log(name)

    async def start(self, specs: Iterable[ProcessSpec]) -> None:
        """Starts the processes in order; from now on, restarts those that fail."""
        for spec in specs:
            child = await self._spawn_new(spec)
            watcher = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")
            watcher.add_done_callback(self._watcher_ended)
            self._watchers[spec.name] = watcher

    async def wait(self, name: str) -> None:
        """Waits until the process `name` ends with status 0.

        Raises: UserError, TrainingStopped or RunFailed as soon as any process stops the run.
        """
        assert self._failure is not None
        watcher = self._watchers[name]
        await asyncio.wait([watcher, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            self._failure.result()

    async def run(self, spec: ProcessSpec) -> None:
        """Runs a process once, without restarts, and waits for its end.

        Raises: UserError (status 2), TrainingStopped (3), RunFailed (other than 0), or the error of another process
        that stops the run.
        """
        child = await self._spawn_new(spec)
        assert child.process is not None
        assert self._failure is not None
        ended = asyncio.ensure_future(child.process.wait())
        await asyncio.wait([ended, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            ended.cancel()
            self._failure.result()
        del self._children[spec.name]
        self._write_processes()
        await asyncio.to_thread(child.log.wait_for_last_output)
        if (error := self._error_of(child, ended.result())) is not None:
            raise error

    def _watcher_ended(self, watcher: asyncio.Task[None]) -> None:
        """Stops the run if a watcher raised, because its process is no longer supervised."""
        error = None if watcher.cancelled() else watcher.exception()
        if error is not None and self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def stop(self, names: list[str]) -> None:
        """Sends SIGTERM to all, and SIGKILL to those that run after `stop_timeout_s`. Shielded from cancellation."""
        for name in names:
            if (watcher := self._watchers.pop(name, None)) is not None:
                watcher.cancel()
        children = [self._children.pop(name) for name in names if name in self._children]
        await asyncio.shield(asyncio.gather(*(self._end(child) for child in children)))

    def states(self) -> dict[str, tuple[str, int]]:
        """Process name → (state: running, done or restarting; number of restarts)"""
        return {name: (_state(child), child.num_restarts) for name, child in self._children.items()}

    async def _spawn_new(self, spec: ProcessSpec) -> _Child:
        state = RestartState(self._restart_policy, spec.role)
        child = self._children[spec.name] = _Child(spec, state, ProcessLog(self.log_path(spec.name)))
        await self._spawn(child)
        return child

    async def _spawn(self, child: _Child) -> None:
        output = await asyncio.to_thread(child.log.open_pipe)
        try:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=_environment(self._temporary, first=child.num_restarts == 0),
            )
        finally:
            os.close(output)
        child.status, child.started_s = None, time.monotonic()
        self._write_processes()

    async def _watch(self, child: _Child) -> None:
        assert self._failure is not None
        while True:
            assert child.process is not None
            child.status = await child.process.wait()
            self._write_processes()
            await asyncio.to_thread(child.log.wait_for_last_output)
            if child.status == 0:
                return
            if self._outcome(child, child.status) == "stop":
                if not self._failure.done():
                    self._failure.set_exception(self._error_of(child, child.status) or RunFailed(child.spec.name))
                return
            pause_s = child.restarts.pause_s(was_killed=child.status == -signal.SIGKILL)
            log.warning("%s ended (%s): restarting in %.1f s", child.spec.name, _ended(child.status), pause_s)
            await asyncio.sleep(pause_s)
            child.num_restarts += 1
            await self._spawn(child)

    def _outcome(self, child: _Child, status: int) -> Literal["restart", "stop"]:
        """Records the failure of a process and decides what follows."""
        now_s, newest_step = time.monotonic(), last_step(self._folder.metrics)
        uptime_s = now_s - child.started_s
        child.restarts.record_failure(status=status, uptime_s=uptime_s, newest_step=newest_step, now_s=now_s)
        others = [
            other.restarts
            for other in self._children.values()
            if other.spec.role == child.spec.role and other is not child
        ]
        return decide(child.restarts, status=status, others=others, newest_step=newest_step, now_s=now_s)

    async def _end(self, child: _Child) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        if child.spec.role == "actor":
            process.send_signal(signal.SIGINT)  # after SIGTERM alone, an actor would finish its groups first
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop in %.0f s: killed", child.spec.name, self._stop_timeout_s)
            process.kill()
            await process.wait()

    def _error_of(self, child: _Child, status: int) -> PalimpsestError | None:
        if status == 0:
            return None
        path, lines = self.log_path(child.spec.name), child.log.last_lines()
        if status in (USER_ERROR_STATUS, TRAINING_STOPPED_STATUS):
            message = next((line for line in reversed(lines) if line.startswith("error: ")), f"error: see {path}")
            kind = UserError if status == USER_ERROR_STATUS else TrainingStopped
            return kind(f"{child.spec.name}: {message.removeprefix('error: ')}")
        tail = "\n".join(lines[-_NUM_LOG_LINES_IN_ERROR:])
        return RunFailed(f"{child.spec.name} ended ({_ended(status)}); {path} ends:\n{tail}")

    def _write_processes(self) -> None:
        """Writes RUN/processes.json: the name and pid of each running process."""
        pids = {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process is not None and child.process.returncode is None
        }
        try:
            atomic_write(self._folder.processes, json.dumps(pids, indent=2) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder.processes, error.strerror)


def _environment(temporary: Path, *, first: bool) -> dict[str, str]:
    """The environment of a child process.

    - One torch/BLAS thread per process, unless the user's environment sets another number.
    - The launcher's pid: a role ends when the launcher ends.
    - A folder for temporary files, which the launcher removes because a killed process cannot.
    - PALIMPSEST_FAULT, if it is set, only at the `first` start.
    """
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name not in os.environ}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    launcher = {LAUNCHER_PID_VARIABLE: str(os.getpid()), "TMPDIR": str(temporary)}
    inherited = {name: value for name, value in os.environ.items() if first or name != FAULT_VARIABLE}
    return {**inherited, **threads, **quiet, **launcher}


def _state(child: _Child) -> str:
    if child.process is not None and child.process.returncode is None:
        return "running"
    return "done" if child.status == 0 else "restarting"


def _ended(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
