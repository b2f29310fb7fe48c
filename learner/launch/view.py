"""The live view of a run: what it learns, how stale it trains, and who waits for whom. Reads RUN/metrics.jsonl."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from learner.metrics.jsonl import read_line
from learner.store.run_folder import RunFolder
from protocol.config import Config

_BARS = "▁▂▃▄▅▆▇█"
_REFRESH_S = 0.5
_PLAIN_EVERY_STEPS = 10

Step = Mapping[str, float]
States = Mapping[str, tuple[str, int]]


class Steps:
    """The lines of metrics.jsonl, read as they come; a step that was written twice counts once, the later one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.by_step: dict[int, Step] = {}

    def refresh(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                if (step := read_line(line)) is not None:
                    self.by_step[int(step["step"])] = step

    @property
    def last(self) -> Step | None:
        return self.by_step[max(self.by_step)] if self.by_step else None


class View:
    """Runs beside a supervisor. On a terminal it redraws a panel; elsewhere it prints a line now and then."""

    def __init__(
        self,
        *,
        title: str,
        metrics: Path,
        num_steps: int,
        staleness_bound: int,
        states: Callable[[], States],
        quiet: bool,
    ) -> None:
        self._title = title
        self._steps = Steps(metrics)
        self._num_steps = num_steps
        self._bound = staleness_bound
        self._states = states
        self._quiet = quiet
        self._console = Console()
        self._printed = -1

    async def run(self) -> None:
        """Until cancelled."""
        if self._quiet or not self._console.is_terminal:
            while True:
                self._print_lines()
                await asyncio.sleep(_REFRESH_S)
        with Live(console=self._console, auto_refresh=False, transient=False) as live:
            try:
                while True:
                    self._steps.refresh()
                    live.update(self.render(), refresh=True)
                    await asyncio.sleep(_REFRESH_S)
            finally:
                self._steps.refresh()
                live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        last = self._steps.last
        processes = Text("  ".join(_state(name, *state) for name, state in self._states().items()), style="dim")
        if last is None:
            return Panel(Group(Text("waiting for the first batch …"), processes), title=self._title)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        for name, value in rows(last, bound=self._bound):
            table.add_row(name, value)
        rewards = [step["reward/mean"] for _, step in sorted(self._steps.by_step.items())]
        table.add_row("curve", sparkline(rewards, width=60))
        progress = ProgressBar(total=self._num_steps, completed=int(last["step"]) + 1, width=60)
        head = f"{self._title}   step {int(last['step']) + 1}/{self._num_steps}"
        return Panel(Group(progress, table, processes), title=head, width=100)

    def _print_lines(self) -> None:
        self._steps.refresh()
        for number in sorted(self._steps.by_step):
            due = number % _PLAIN_EVERY_STEPS == 0 or number + 1 == self._num_steps
            if number > self._printed and due and not self._quiet:
                facts = "  ".join(
                    f"{name}: {value}" for name, value in rows(self._steps.by_step[number], bound=self._bound)
                )
                self._console.print(f"step {number + 1}/{self._num_steps}  {facts}", highlight=False, soft_wrap=True)
                self._printed = number


def view_of(config: Config, states: Callable[[], States], *, quiet: bool) -> View:
    return View(
        title=config.run.name,
        metrics=RunFolder(config.run.dir).metrics,
        num_steps=config.learner.num_steps,
        staleness_bound=config.learner.staleness_bound,
        states=states,
        quiet=quiet,
    )


async def show_while(view: View, waiting: Awaitable[None]) -> None:
    """Shows `view` until `waiting` ends; raises what it raises."""
    viewing = asyncio.create_task(view.run())
    try:
        await waiting
    finally:
        viewing.cancel()
        await asyncio.gather(viewing, return_exceptions=True)


def rows(step: Step, *, bound: int) -> list[tuple[str, str]]:
    """(what, how it stands) of one step's metrics."""
    busy_s = step["learner/step_s"] + step["learner/publish_s"]
    waiting = step["learner/wait_s"] / max(1e-9, busy_s + step["learner/wait_s"])
    waits = f"learner {waiting:.0%} of its time for trajectories"
    free = step.get("queue/credits_free", 0.0)
    if free > 0:
        waits += f"; actors for leases: {free:.0f} groups held back by the staleness bound"
    reward = f"{step['reward/mean']:.3f}"
    if "reward/em" in step:
        reward += f"   EM {step['reward/em']:.3f}"
    return [
        ("reward", f"{reward}   entropy {step['policy/entropy']:.3f}"),
        ("staleness", f"mean {step['staleness/mean']:.2f}, max {step['staleness/max']:.0f} of at most {bound}"),
        (
            "tokens/s",
            f"sampled {step['rollout/tokens_per_s']:,.0f}, learner {step['learner/tokens_per_s']:,.0f} (step "
            f"{step['learner/step_s']:.2f} s)",
        ),
        ("contexts", f"{step['rollout/contexts']:.2f} a trajectory, {step['rollout/context_tokens']:.0f} tokens each"),
        (
            "queue",
            f"{step.get('queue/running', 0):.0f} groups running, {step.get('queue/buffered', 0):.0f} buffered, "
            f"{step.get('queue/expired', 0):.0f} leases expired",
        ),
        ("waits", waits),
    ]


def sparkline(values: list[float], *, width: int) -> str:
    """At most `width` bars over [0, max(1, …)], each the mean of its share of the values."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    top = max(1.0, *means)
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(mean / top * len(_BARS))))] for mean in means)


def _state(name: str, state: str, num_restarts: int) -> str:
    return f"{name} {state}" + (f" ({num_restarts} restarts)" if num_restarts else "")
