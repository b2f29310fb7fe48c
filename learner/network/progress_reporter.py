"""Reports what the learner does or waits for: RUN/progress.json, log lines, the run's first samples.

    training loop ── enter(phase) ──► reporter thread, every second ──► progress.json
    coordinator ──── run_state() ───►                                   log, every progress_log_s of one phase
                                                                        first_samples.txt and TensorBoard, once

    thread   consumes: the phase, the coordinator's state   produces: files, log lines   waits for: the clock

A separate thread, because the main thread is blocked while it waits for a batch or trains. What cannot be written
(the disk is full) is written a second later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType

from learner.leases.first_samples import summary_lines, warnings
from learner.leases.wait_cause import RunState, wait_cause
from learner.metrics.progress import ENDED, Phase, Progress, phase_text, step_line, waiting_text
from learner.store.run_folder import RunFolder
from protocol.atomic_write import atomic_write
from protocol.errors import PalimpsestError
from protocol.failure_counts import failure_line
from protocol.types import Status

log = logging.getLogger(__name__)

_EVERY_S = 1.0


class ProgressReporter:
    """A context manager that runs the thread. At its exit, the last state of the run is written.

    num_steps    the last step of the run
    log_every_s  a phase that lasts this long is logged, and again after this time; new failures are logged as often
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        num_steps: int,
        log_every_s: float,
    ) -> None:
        self._folder = folder
        self._num_steps = num_steps
        self._log_every_s = log_every_s
        self._run_parts: tuple[Callable[[], RunState], Callable[[str, str, int], None]] | None = None
        self._lock = threading.Lock()
        self._phase: Phase = "starting"
        self._step = 0
        self._num_recorded = 0
        self._entered_s = self._logged_s = time.monotonic()
        self._cause = ""
        self._cause_s = self._entered_s
        self._num_failed_logged = 0
        self._failures_logged_s = -log_every_s
        self._state: RunState | None = None
        self._samples_done = folder.first_samples.exists()
        self._warnings: tuple[str, ...] = ()
        self._checkpoint_warning = ""
        self._error = ""
        self._is_unwritable = False
        # Held while a text is written to TensorBoard, so that its writer is not closed at the same time.
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressReporter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._entered_s = time.monotonic()
            if kind is None:
                self._phase = "done"
            else:
                self._phase = "failed" if issubclass(kind, Exception) else "stopped"
                self._error = str(error) if isinstance(error, PalimpsestError) else ""
        with suppress(OSError):
            self._progress().write(self._folder.progress)

    @contextmanager
    def attached(self, *, state: Callable[[], RunState], write_text: Callable[[str, str, int], None]) -> Iterator[None]:
        """Inside the block, the coordinator's state is reported as well.

        state       returns it. Raises: PalimpsestError, TimeoutError (then the last one is used)
        write_text  writes a text to TensorBoard: (tag, markdown, step)
        """
        with self._lock:
            self._run_parts = state, write_text
        try:
            yield
        finally:
            self._refresh()
            self._report()
            with self._writing:
                self._run_parts = None

    def stepped(self, values: Mapping[str, float], *, step: int) -> None:
        """Logs a trained step. If its rewards differ, the warnings of the first samples no longer hold.

        values  its metrics by tag
        """
        log.info("%s", step_line(values, step=step, num_steps=self._num_steps))
        if values["reward/std"] > 0:
            with self._lock:
                self._warnings = ()

    def checkpoint_failed(self, error: OSError, *, step: int) -> None:
        """Warns that the checkpoint of `step` cannot be written, until `checkpoint_saved`."""
        with self._lock:
            self._checkpoint_warning = (
                f"the checkpoint of step {step} cannot be written: {error.strerror or error}; it is tried again, and a "
                "restart repeats the steps since the last checkpoint"
            )

    def checkpoint_saved(self) -> None:
        """Ends the warning of `checkpoint_failed`."""
        with self._lock:
            self._checkpoint_warning = ""

    def enter(self, phase: Phase, *, step: int, num_recorded: int = 0) -> None:
        """Begins a phase. `step`: the version that the learner has trained. `num_recorded`: only in `retraining`."""
        with self._lock:
            self._phase, self._step, self._num_recorded = phase, step, num_recorded
            self._entered_s = self._logged_s = time.monotonic()
            self._cause = ""
        if phase == "training" and not self._samples_done:
            self._refresh()
            self._report_first_samples()

    def _run(self) -> None:
        while True:
            self._refresh()
            self._report()
            if self._stop.wait(_EVERY_S):
                return

    def _refresh(self) -> None:
        parts = self._run_parts
        if parts is None:
            return
        try:
            state = parts[0]()
        except (PalimpsestError, TimeoutError):
            return
        with self._lock:
            self._state = state

    def _report(self) -> None:
        """Writes progress.json and what else is due."""
        self._report_first_samples()
        progress = self._progress()
        try:
            progress.write(self._folder.progress)
        except OSError as error:
            if not self._is_unwritable:
                log.warning("progress.json cannot be written: %s", error)
            self._is_unwritable = True
        else:
            self._is_unwritable = False
        self._log(progress)

    def _progress(self) -> Progress:
        with self._lock:
            now_s = time.monotonic()
            text, since_s = self._describe(now_s)
            failures = self._state.failures if self._state is not None else {}
            fatal = self._state.fatal_questions if self._state is not None else ()
            others = [f"question {cursor} was skipped: its actors died" for cursor in fatal]
            if self._checkpoint_warning:
                others.append(self._checkpoint_warning)
            return Progress(
                phase=self._phase,
                step=self._step,
                num_steps=self._num_steps,
                since=time.time() - (now_s - since_s),
                written=time.time(),
                text=text,
                failures=failures,
                warnings=(*self._warnings, *others),
            )

    def _describe(self, now_s: float) -> tuple[str, float]:
        """(sentence, start of what it says on the monotonic clock)"""
        state = self._state
        waits = self._phase == "waiting" or (self._phase == "publishing" and state is not None and state.is_disk_full)
        if state is None or not waits:
            num_steps = self._num_recorded if self._phase == "retraining" else self._num_steps
            text, since_s = phase_text(self._phase, step=self._step, num_steps=num_steps), self._entered_s
            if self._error:
                text = f"{text}: {self._error}"
        else:
            cause = wait_cause(state)
            if cause.kind != self._cause:
                # The wait for groups of a batch began with the phase, even if other causes were reported since then.
                self._cause = cause.kind
                self._cause_s = self._entered_s if cause.kind == "leases" else now_s
            text, since_s = waiting_text(state), self._cause_s
            if self._phase != "waiting":
                text = f"{phase_text(self._phase, step=self._step, num_steps=self._num_steps)}: {cause.text}"
        if self._phase not in ENDED and now_s - since_s >= 1.0:
            text = f"{text} (for {now_s - since_s:.0f} s)"
        return text, since_s

    def _log(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.phase not in ENDED and now_s - self._logged_s >= self._log_every_s:
            self._logged_s = now_s
            log.info("%s", progress.text)
        num_failed = sum(progress.failures.values())
        if num_failed > self._num_failed_logged and now_s - self._failures_logged_s >= self._log_every_s:
            self._num_failed_logged, self._failures_logged_s = num_failed, now_s
            log.warning("trajectories since the learner's start: %s", failure_line(progress.failures))
            rows = "".join(f"\n| {count} | {_cell(reason)} |" for reason, count in progress.failures.items())
            self._write("trajectories/failures", f"| failed | reason |\n| ---: | --- |{rows}", progress.step)

    def _report_first_samples(self) -> None:
        """Prints and writes the summary of the first samples once, when all have arrived."""
        with self._lock:
            state = self._state
            if self._samples_done or state is None or not state.first_samples:
                return
            has_failed = any(sample.status == Status.FAILED for sample in state.first_samples)
            if has_failed and not state.failures:  # the reasons come with the actor's next heartbeat
                return
            self._samples_done = True
            self._warnings = tuple(warnings(state.first_samples, failures=state.failures))
            lines = summary_lines(state.first_samples, failures=state.failures)
            lines += [f"  warning   {warning}" for warning in self._warnings]
        print("\n".join(lines), flush=True)
        try:
            atomic_write(self._folder.first_samples, "\n".join(lines) + "\n")
        except OSError as error:
            log.warning("first_samples.txt cannot be written: %s", error)
        self._write("trajectories/first_samples", "\n".join(f"    {line}" for line in lines), self._step)

    def _write(self, tag: str, markdown: str, step: int) -> None:
        with self._writing:
            if self._run_parts is not None:
                self._run_parts[1](tag, markdown, step)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
