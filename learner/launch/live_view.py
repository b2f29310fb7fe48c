"""The live view of a run: the phase, what it waits for, failures, metrics, processes.

launcher ──phase──┐      RUN/progress.json  the learner: what it waits for, failures by reason
supervisor ─states┤      RUN/metrics.jsonl  the learner: one line per step
                  ▼      RUN/logs/NAME.log  processes that run once: `progress: 450/700 …`
              LiveView ◄──────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from learner.launch.step_log import StepLog, StepMetrics
from learner.launch.view_text import (
    States,
    duration,
    printable,
    process_text,
    remaining_s,
    rows,
    sparkline,
)
from learner.metrics.progress import Progress, progress_lines
from learner.store.run_folder import RunFolder
from protocol.config import Config
from protocol.step_progress import StepProgress

_REFRESH_S = 0.5
_PRINT_EVERY_STEPS = 10
_PRINT_EVERY_S = 60.0

TRAINING = "training"
"""The phase in which the learner waits for batches and trains. All others are shown by their name and the progress of
their processes."""
FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the view shows.

    elapsed_s   since the launcher started
    now         seconds since the epoch
    bound       the staleness bound
    steps       step → metrics, of the steps that are trained
    stages      process name → progress, of running processes that end by themselves
    learner     the learner's progress.json, in the phase TRAINING
    """

    title: str
    phase: str
    elapsed_s: float
    now: float
    num_steps: int
    bound: int
    states: States = field(default_factory=dict)
    steps: Mapping[int, StepMetrics] = field(default_factory=dict)
    stages: Mapping[str, StepProgress] = field(default_factory=dict)
    learner: Progress | None = None

    @property
    def num_done(self) -> int:
        """Steps that are trained."""
        return max(self.steps) + 1 if self.steps else 0


class LiveView:
    """Shows a run until it ends. On a terminal it redraws a panel. Otherwise it prints a line for each phase, for every
    tenth step and the last one, and, if there was none for a minute, what the run waits for. `quiet`: it shows nothing.

    states: returns the state of each process
    """

    def __init__(
        self,
        *,
        title: str,
        run_dir: Path,
        num_steps: int,
        staleness_bound: int,
        states: Callable[[], States],
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._title = title
        self._folder = RunFolder(run_dir)
        self._log = StepLog(self._folder.metrics)
        self._num_steps = num_steps
        self._bound = staleness_bound
        self._states = states
        self._quiet = quiet
        self._console = console or Console()
        self._started_s = time.monotonic()
        self._lines = _Lines()
        self.phase = TRAINING
        """Set by the launcher."""

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Shows the view while the block runs."""
        showing = asyncio.create_task(self._show(), name="live view")
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)

    def status(self) -> RunStatus:
        """Reads the run's folder."""
        self._log.refresh()
        states = self._states()
        logs = {name: self._folder.log(name) for name, (state, _) in states.items() if state == "running"}
        stages = {name: found for name, log in logs.items() if (found := StepProgress.last_in(log)) is not None}
        return RunStatus(
            title=printable(self._title),
            phase=self.phase,
            elapsed_s=time.monotonic() - self._started_s,
            now=time.time(),
            num_steps=self._num_steps,
            bound=self._bound,
            states=states,
            steps=self._log.by_step,
            stages=stages,
            learner=Progress.read(self._folder.progress) if self.phase == TRAINING else None,
        )

    async def _show(self) -> None:
        if self._quiet:
            return
        if not self._console.is_terminal:
            await self._print_lines()
        with Live(console=self._console, auto_refresh=False) as live:
            size = self._console.size
            try:
                while True:
                    if self._console.size != size:  # the terminal has wrapped the lines of the last panel
                        size = self._console.size
                        self._console.clear()
                    live.update(render(self.status()), refresh=True)
                    await asyncio.sleep(_REFRESH_S)
            finally:
                live.update(render(self.status()), refresh=True)

    async def _print_lines(self) -> None:
        try:
            while True:
                self._print_new_lines()
                await asyncio.sleep(_REFRESH_S)
        finally:
            self._print_new_lines()

    def _print_new_lines(self) -> None:
        for line in self._lines.new(self.status()):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def view_of(config: Config, states: Callable[[], States], *, quiet: bool) -> LiveView:
    return LiveView(
        title=config.run.name,
        run_dir=config.run.dir,
        num_steps=config.learner.num_steps,
        staleness_bound=config.learner.staleness_bound,
        states=states,
        quiet=quiet,
    )


def render(status: RunStatus) -> RenderableType:
    """The panel, as wide as the terminal. Long texts are wrapped; nothing is cut."""
    shows_steps = bool(status.steps) or status.phase == TRAINING
    parts: list[RenderableType] = [_bar(status.num_done, status.num_steps)] if shows_steps else []
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_row("phase", Text(status.phase + (f", step {status.num_done}/{status.num_steps}" if shows_steps else "")))
    table.add_row("time", Text(_time(status)))
    for name, stage in status.stages.items():
        table.add_row(printable(name), _bar(stage.num_done, stage.num_total))
        table.add_row("", Text(f"{stage.num_done:,} of {stage.num_total:,} {printable(stage.text)}"))
    if status.phase == TRAINING:
        for label, text in _now(status):
            table.add_row(label, Text(text, style="" if label == "now" else "yellow"))
    if status.steps:
        rewards = [status.steps[step]["reward/mean"] for step in sorted(status.steps)]
        table.add_row("rewards", _Curve(rewards))
        for label, text in rows(status.steps[max(status.steps)], bound=status.bound):
            table.add_row(label, Text(text))
    if status.states:
        table.add_row("processes", Text(process_text(status.states), style="dim"))
    return Panel(Group(*parts, table), title=Text(status.title))


def _time(status: RunStatus) -> str:
    left_s = remaining_s(status.steps, num_steps=status.num_steps) if status.phase == TRAINING else None
    left = "" if left_s is None else f", about {duration(left_s)} left"
    return f"{duration(status.elapsed_s)} elapsed{left}"


def _now(status: RunStatus) -> list[tuple[str, str]]:
    """(label, text): what the learner does, failures, warnings."""
    first, *others = map(printable, progress_lines(status.learner, now=status.now))
    warning = "warning: "
    return [
        ("now", first),
        *(("warning", line.removeprefix(warning)) if line.startswith(warning) else ("failed", line) for line in others),
    ]


def _bar(num_done: int, num_total: int) -> RenderableType:
    """A progress bar on its own line, with the percentage at its end."""
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(ProgressBar(total=max(1, num_total), completed=num_done), f"{num_done / max(1, num_total):4.0%}")
    return line


class _Curve:
    """A sparkline that is as wide as its place."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._values, width=options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)


class _Lines:
    """The lines that a view prints where there is no terminal."""

    def __init__(self) -> None:
        self._phase = ""
        self._step = -1
        self._warnings: set[str] = set()
        self._printed_s = 0.0

    def new(self, status: RunStatus) -> list[str]:
        """The lines that were not returned before."""
        lines = []
        if status.phase != self._phase:
            self._phase = status.phase
            lines.append(f"{status.title}: {status.phase} ({duration(status.elapsed_s)} elapsed)")
        lines[:0] = self._steps(status)
        if status.phase == TRAINING:
            warnings = [f"warning: {text}" for label, text in _now(status) if label == "warning"]
            lines += [text for text in warnings if text not in self._warnings]
            self._warnings.update(warnings)
        if lines:
            self._printed_s = status.elapsed_s
        elif status.elapsed_s - self._printed_s >= _PRINT_EVERY_S:
            self._printed_s = status.elapsed_s
            lines += [f"{label}: {text}" for label, text in _now(status)] if status.phase == TRAINING else []
            lines += [f"{printable(name)}: {stage}" for name, stage in status.stages.items()]
        return lines

    def _steps(self, status: RunStatus) -> list[str]:
        lines = []
        for number in sorted(status.steps):
            due = number % _PRINT_EVERY_STEPS == 0 or number + 1 == status.num_steps
            if number > self._step and due:
                facts = "  ".join(f"{label}: {text}" for label, text in rows(status.steps[number], bound=status.bound))
                lines.append(f"step {number + 1}/{status.num_steps}  {facts}")
                self._step = number
        return lines
