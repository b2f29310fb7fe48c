"""The live view of a run, from RUN/metrics.jsonl: reward, staleness, throughput, waiting times."""

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

from learner.launch.step_log import StepLog, StepMetrics
from learner.store.run_folder import RunFolder
from protocol.config import Config

_BARS = "▁▂▃▄▅▆▇█"
_REFRESH_S = 0.5
_PRINT_EVERY_STEPS = 10

States = Mapping[str, tuple[str, int]]
"""process name → (its state, restarts so far)"""


class LiveView:
    """Shows the progress of a run. On a terminal it redraws a panel; otherwise it prints a line for every tenth step
    and the last one. With `quiet` it shows nothing.

    states: returns the state of each process
    """

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
        self._steps = StepLog(metrics)
        self._num_steps = num_steps
        self._bound = staleness_bound
        self._states = states
        self._quiet = quiet
        self._console = Console()
        self._printed = -1

    async def run(self) -> None:
        """Runs until cancelled."""
        if self._quiet or not self._console.is_terminal:
            while True:
                self._print_lines()
                await asyncio.sleep(_REFRESH_S)
        with Live(console=self._console, auto_refresh=False, transient=False) as live:
            try:
                while True:
                    live.update(self.render(), refresh=True)
                    await asyncio.sleep(_REFRESH_S)
            finally:
                live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """The panel for the newest step in metrics.jsonl."""
        self._steps.refresh()
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
            due = number % _PRINT_EVERY_STEPS == 0 or number + 1 == self._num_steps
            if number > self._printed and due and not self._quiet:
                facts = "  ".join(
                    f"{name}: {value}" for name, value in rows(self._steps.by_step[number], bound=self._bound)
                )
                self._console.print(f"step {number + 1}/{self._num_steps}  {facts}", highlight=False, soft_wrap=True)
                self._printed = number


def view_of(config: Config, states: Callable[[], States], *, quiet: bool) -> LiveView:
    return LiveView(
        title=config.run.name,
        metrics=RunFolder(config.run.dir).metrics,
        num_steps=config.learner.num_steps,
        staleness_bound=config.learner.staleness_bound,
        states=states,
        quiet=quiet,
    )


async def show_while(view: LiveView, awaited: Awaitable[None]) -> None:
    """Shows `view` until `awaited` ends; raises its exception."""
    viewing = asyncio.create_task(view.run())
    try:
        await awaited
    finally:
        viewing.cancel()
        await asyncio.gather(viewing, return_exceptions=True)


def rows(step: StepMetrics, *, bound: int) -> list[tuple[str, str]]:
    """(label, text) for each row of the panel, from one step's metrics. `bound`: the staleness bound."""
    busy_s = step["learner/step_s"] + step["learner/publish_s"]
    waiting = step["learner/wait_s"] / max(1e-9, busy_s + step["learner/wait_s"])
    waits = f"learner waits for trajectories {waiting:.0%} of its time"
    free = step.get("queue/credits_free", 0.0)
    if free > 0:
        waits += f"; actors wait for leases of {free:.0f} groups (staleness bound)"
    reward = f"{step['reward/mean']:.3f}"
    if "reward/em" in step:
        reward += f"   EM {step['reward/em']:.3f}"
    return [
        ("reward", f"{reward}   entropy {step['policy/entropy']:.3f}"),
        ("staleness", f"mean {step['staleness/mean']:.2f}, max {step['staleness/max']:.0f} (bound {bound})"),
        (
            "tokens/s",
            f"sampled {step['rollout/tokens_per_s']:,.0f}, learner {step['learner/tokens_per_s']:,.0f} (step "
            f"{step['learner/step_s']:.2f} s)",
        ),
        (
            "contexts",
            f"{step['rollout/contexts']:.2f} per trajectory, {step['rollout/context_tokens']:.0f} tokens each",
        ),
        (
            "queue",
            f"{step.get('queue/running', 0):.0f} groups running, {step.get('queue/buffered', 0):.0f} buffered, "
            f"{step.get('queue/expired', 0):.0f} leases expired",
        ),
        ("waits", waits),
    ]


def sparkline(values: list[float], *, width: int) -> str:
    """At most `width` bars on the scale 0 to max(1, largest bar). Each bar is the mean of consecutive values."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    top = max(1.0, *means)
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(mean / top * len(_BARS))))] for mean in means)


def _state(name: str, state: str, num_restarts: int) -> str:
    return f"{name} {state}" + (f" ({num_restarts} restarts)" if num_restarts else "")
