"""What the live view shows in each phase of a run, at several widths of the terminal and without one."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from learner.launch.live_view import FINISHED, TRAINING, LiveView, RunStatus, render
from learner.launch.step_log import StepLog
from learner.launch.view_text import rows
from learner.metrics.jsonl import format_line
from learner.metrics.progress import Progress
from protocol.step_progress import StepProgress
from tests.launch.metrics_lines import metrics_line

WIDTHS = (80, 100, 160)
NOW = 1_000.0
WAITING = "waiting for the batch of step 2: 9 of 16 slots, oldest lease 41 s at actor-1"
FAILURES = {"retriever timeout after 30 s": 398, "engine-0 returned HTTP 500 because its memory was used up": 14}
WARNING = "no signal: every reward is 0 in the last 32 groups, which were skipped (zero variance)"


def step(number: int, **values: float) -> dict[str, float]:
    row = json.loads(metrics_line(number, 0.25 * number)) | {"time": 100.0 + 3 * number}
    return row | {name.replace("__", "/"): value for name, value in values.items()}


def learner(**values: object) -> Progress:
    fields = {"phase": "waiting", "step": 2, "num_steps": 10, "since": NOW - 5, "written": NOW, "text": WAITING}
    return Progress(**{**fields, **values})  # pyright: ignore[reportArgumentType]


TRAINING_STATUS = RunStatus(
    title="my run",
    phase=TRAINING,
    elapsed_s=71.0,
    now=NOW,
    num_steps=10,
    bound=2,
    states={"learner": ("running", 0), "actor-0": ("restarting", 3), "engine-0": ("running", 0)},
    steps={0: step(0), 1: step(1, reward__zero_variance_fraction=0.31, policy__kl_behavior=1.2e-3)},
    learner=learner(failures=FAILURES, warnings=(WARNING,)),
)


class Output(io.StringIO):
    """The file of a console; a test waits for a text in it."""

    def __init__(self) -> None:
        super().__init__()
        self._written = asyncio.Event()

    def write(self, text: str, /) -> int:
        self._written.set()
        return super().write(text)

    async def contains(self, text: str) -> None:
        async with asyncio.timeout(30):
            while text not in self.getvalue():
                self._written.clear()
                await self._written.wait()


def shown(status: RunStatus, *, width: int) -> list[str]:
    """The lines of the panel on a terminal of this width; each must be exactly as wide."""
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    console.print(render(status))
    lines = console.export_text().splitlines()
    assert {len(line) for line in lines} == {width}
    return lines


def text_of(lines: list[str]) -> str:
    """The panel's text without its frame, wrapped lines joined."""
    return " ".join(" ".join(line.strip("│╭╮╰╯─ ").split()) for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_training_shows_every_fact_at_every_width(width: int) -> None:
    lines = shown(TRAINING_STATUS, width=width)
    text = text_of(lines)
    for fact in (
        "my run",
        "training, step 2/10",
        "1:11 elapsed, about 0:24 left",
        f"now {WAITING}",
        "failed 412 failed: retriever timeout after 30 s (398), engine-0 returned HTTP 500 because its memory was used "
        "up (14)",
        f"warning {WARNING}",
        "reward 0.250, EM 1.000, 31% of groups without signal (equal rewards)",
        "entropy 1.000, KL to the sampling policy 1.2e-03",
        "mean 1.00, max 1 (bound 2)",
        "sampled 1, learner 1 (step 1.00 s)",
        "the learner waits 33% of its time for trajectories",
        "actor-0 restarting (3 restarts); running: learner, engine-0",
        "▁▃",
    ):
        assert fact in text, fact
    assert "…" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_the_progress_bar_has_a_line_of_its_own_and_fills_it(width: int) -> None:
    bar = shown(TRAINING_STATUS, width=width)[1]
    assert re.fullmatch(r"│ [━╸╺]+ +20% │", bar)
    assert bar.count("━") + bar.count("╸") + bar.count("╺") == width - 9


@pytest.mark.parametrize("width", WIDTHS)
def test_a_phase_before_training_shows_the_progress_of_its_processes(width: int) -> None:
    phase = "warm start: supervised training on scripted, noisy demonstrations, then the indexes of all worlds"
    stages = {
        "warm-start": StepProgress(450, 800, "steps of imitation, loss 0.312"),
        "index": StepProgress(1_000, 4_000, "passages of world-1.jsonl"),
    }
    status = replace(TRAINING_STATUS, phase=phase, stages=stages, steps={}, learner=None)
    lines = shown(status, width=width)
    text = text_of(lines)
    assert phase in text
    assert "1:11 elapsed" in text
    assert "left" not in text
    assert "450 of 800 steps of imitation, loss 0.312" in text
    assert "1,000 of 4,000 passages of world-1.jsonl" in text
    assert [match[1] for line in lines if (match := re.search(r"━ +(\d+)%", line))] == ["56", "25"]
    assert "now" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_before_the_first_batch_the_reason_is_shown(width: int) -> None:
    for progress, reason in (
        (None, "now the learner has not started"),
        (learner(text="waiting for the batch of step 0: no engine is connected"), "step 0: no engine is connected"),
        (learner(written=NOW - 60), "(reported 60 s ago)"),
    ):
        status = replace(TRAINING_STATUS, steps={}, learner=progress)
        text = text_of(shown(status, width=width))
        assert reason in text
        assert "training, step 0/10" in text


def test_a_finished_run_shows_its_summary_and_waits_for_nothing() -> None:
    status = replace(TRAINING_STATUS, phase=FINISHED, states={}, steps={**TRAINING_STATUS.steps, 9: step(9)})
    text = text_of(shown(status, width=80))
    assert "finished, step 10/10" in text
    assert "100%" in text
    assert "reward 2.250" in text
    assert "now" not in text
    assert "left" not in text
    assert "processes" not in text


def test_names_cannot_control_the_terminal() -> None:
    hostile = "\x1b[2J\x1b[31mred\r\n\x07[bold]x[/bold]"
    status = replace(
        TRAINING_STATUS,
        title=hostile,
        states={hostile: ("running", 0)},
        stages={hostile: StepProgress(1, 2, hostile)},
        learner=learner(text=hostile, failures={hostile: 1}, warnings=(hostile,)),
    )
    view = LiveView(
        title=hostile, run_dir=Path("none"), num_steps=1, staleness_bound=0, states=lambda: {hostile: ("running", 0)}
    )
    for each in (replace(status, title=view.status().title), view.status()):
        text = "\n".join(shown(each, width=100))
        assert not set(text) & set("\x1b\r\x07")
        assert "[bold]x[/bold]" in text


def test_a_step_whose_update_was_skipped_is_shown(tmp_path: Path) -> None:
    """Its entropy is not finite, which JSON cannot represent; the view must still show the step."""
    path = tmp_path / "metrics.jsonl"
    written = format_line(json.loads(metrics_line(0, 0.1)) | {"policy/entropy": math.nan}, {"tokens_by_age": {0: 3}})
    assert "NaN" not in written
    path.write_text(written)
    steps = StepLog(path)
    steps.refresh()
    assert steps.last is not None
    assert dict(rows(steps.last, bound=2))["policy"].startswith("entropy nan")


def test_a_step_without_metrics_of_computed_tokens_is_shown() -> None:
    """If every advantage is 0, no token goes through the model."""
    values = {name: value for name, value in step(0).items() if not name.startswith("policy/")}
    labels = [label for label, _ in rows(values, bound=2)]
    assert "policy" not in labels
    assert "reward" in labels


async def show(view: LiveView, run: Awaitable[None]) -> None:
    """Shows the view while `run` changes what it shows, then the finished run."""
    async with view.shown():
        await run
        view.phase = FINISHED


def view_in(folder: Path, console: Console, *, num_steps: int = 12, quiet: bool = False) -> LiveView:
    states = {"learner": ("running", 0), "warm-start": ("running", 0)}
    return LiveView(
        title="my run", run_dir=folder, num_steps=num_steps, staleness_bound=2, states=lambda: states, quiet=quiet,
        console=console,
    )  # fmt: skip


def test_without_a_terminal_it_prints_phases_and_every_tenth_step(tmp_path: Path) -> None:
    output = Output()
    view = view_in(tmp_path, Console(file=output, width=80))

    async def run() -> None:
        view.phase = "warm start"
        await output.contains("warm start")
        view.phase = TRAINING
        await output.contains("training")
        learner(warnings=(WARNING,)).write(tmp_path / "progress.json")
        lines = "".join(metrics_line(number, 0.5) + "\n" for number in range(12))
        (tmp_path / "metrics.jsonl").write_text(lines)
        await output.contains("step 12/12")

    asyncio.run(show(view, run()))
    lines = [line.partition(" (0:")[0] for line in output.getvalue().splitlines()]
    assert lines[:2] == ["my run: warm start", "my run: training"]
    assert [line.partition("  ")[0] for line in lines if line.startswith("step ")] == [
        "step 1/12",
        "step 11/12",
        "step 12/12",
    ]
    assert lines.count(f"warning: {WARNING}") == 1
    assert lines[-1] == "my run: finished"


def test_the_status_has_the_progress_of_running_processes_and_of_the_learner(tmp_path: Path) -> None:
    view = view_in(tmp_path, Console(file=io.StringIO()))
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "warm-start.log"
    log.write_text("a warning\nprogress: 10/700 steps of copying, loss 0.5\nprogress: 20/7")
    learner().write(tmp_path / "progress.json")
    status = view.status()
    assert status.stages == {"warm-start": StepProgress(10, 700, "steps of copying, loss 0.5")}
    assert status.learner is not None
    assert status.learner.text == WAITING
    view.phase = "evaluating"
    assert view.status().learner is None


def test_quiet_shows_nothing(tmp_path: Path) -> None:
    output = Output()

    async def run() -> None:
        await asyncio.sleep(0)

    asyncio.run(show(view_in(tmp_path, Console(file=output, force_terminal=True), quiet=True), run()))
    assert output.getvalue() == ""


def test_a_terminal_is_cleared_when_its_size_changes(tmp_path: Path) -> None:
    """A narrower terminal wraps the lines of the last panel, so that the next one cannot be drawn over them."""
    output = Output()
    console = Console(file=output, force_terminal=True, width=100, height=40)
    clear = "\x1b[2J"

    async def run() -> None:
        await output.contains("my run")
        assert clear not in output.getvalue()
        console.size = (80, 40)
        await output.contains(clear)

    asyncio.run(show(view_in(tmp_path, console), run()))
    last = output.getvalue().rpartition(clear)[2]
    assert {len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).split("\n") if "│" in line} == {80}
