"""Shows the progress of an evaluation, from the report that the evaluator rewrites every second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protocol.errors import DataError
from protocol.evaluation import EvaluationFolder, EvaluationReport

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0


async def show_progress(folder: EvaluationFolder, awaited: Awaitable[None]) -> None:
    """Shows done/total, the reward so far, failures and the remaining time until `awaited` ends; raises its error.

    On a terminal it draws a bar on stderr; otherwise it prints a line every 10 s.
    """
    console = Console(stderr=True)
    showing = asyncio.create_task((_draw if console.is_terminal else _print_lines)(folder, console))
    try:
        await awaited
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


def status_text(report: EvaluationReport) -> str:
    """`reward 0.412, 3 failed`"""
    reward = "none yet" if report.reward is None else f"{report.reward.mean:.3f}"
    return f"reward {reward}" + (f", {report.num_failed} failed" if report.num_failed else "")


def remaining_text(*, num_done: int, num_new: int, num_samples: int, elapsed_s: float) -> str:
    """`, about 40 s left`; empty until a sample was taken. `num_new`: samples taken in `elapsed_s`."""
    if not num_new:
        return ""
    left_s = (num_samples - num_done) * elapsed_s / num_new
    return f", about {left_s:.0f} s left" if left_s < 120 else f", about {left_s / 60:.0f} min left"


async def _draw(folder: EvaluationFolder, console: Console) -> None:
    columns = (TextColumn("eval"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    started = time.time()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = None
        try:
            while True:
                if (report := _newer(folder, started)) is not None:
                    if task is None:  # the samples of an earlier call do not count for the remaining time
                        task = progress.add_task("", total=report.num_samples, completed=report.num_done)
                    progress.update(task, completed=report.num_done, description=status_text(report))
                await asyncio.sleep(_REFRESH_S)
        finally:
            if task is not None and (report := _newer(folder, started)) is not None:
                progress.update(task, completed=report.num_done, description=status_text(report))


async def _print_lines(folder: EvaluationFolder, console: Console) -> None:
    started, first, printed_s = time.time(), None, 0.0
    while True:
        report = _newer(folder, started)
        if report is not None:
            first = first or (time.monotonic(), report.num_done)
            if time.monotonic() - printed_s >= _LINE_EVERY_S:
                left = remaining_text(
                    num_done=report.num_done,
                    num_new=report.num_done - first[1],
                    num_samples=report.num_samples,
                    elapsed_s=time.monotonic() - first[0],
                )
                done = f"{report.num_done} of {report.num_samples} samples"
                console.print(f"eval: {done}, {status_text(report)}{left}", highlight=False, soft_wrap=True)
                printed_s = time.monotonic()
        await asyncio.sleep(_REFRESH_S)


def _newer(folder: EvaluationFolder, since: float) -> EvaluationReport | None:
    """The report if it was written after `since` (seconds since the epoch); an earlier call's is not shown."""
    try:
        return folder.read_report() if _mtime(folder.report) >= since else None
    except (DataError, OSError):
        return None


def _mtime(path: Path) -> float:
    return path.stat().st_mtime
