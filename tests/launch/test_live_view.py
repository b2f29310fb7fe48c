"""The text that the live view shows for a run's metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console

from learner.launch.live_view import LiveView, rows, sparkline
from learner.launch.step_log import StepLog
from learner.metrics.jsonl import format_line
from tests.launch.metrics_lines import metrics_line


def test_a_step_whose_update_was_skipped_is_shown(tmp_path: Path) -> None:
    """Its entropy is not finite, which JSON cannot represent; the view must still show the step."""
    path = tmp_path / "metrics.jsonl"
    written = format_line(json.loads(metrics_line(0, 0.1)) | {"policy/entropy": math.nan}, {"tokens_by_age": {0: 3}})
    assert "NaN" not in written
    path.write_text(written)
    steps = StepLog(path)
    steps.refresh()
    assert steps.last is not None
    assert dict(rows(steps.last, bound=2))["reward"].endswith("entropy nan")


def test_the_view_shows_processes_progress_and_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    view = LiveView(
        title="my run",
        metrics=path,
        num_steps=10,
        staleness_bound=2,
        states=lambda: {"learner": ("running", 0), "actor-0": ("restarting", 3)},
        quiet=False,
    )
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(view.render())
    path.write_text(metrics_line(0, 0.25) + "\n" + metrics_line(1, 0.5) + "\n")
    console.print(view.render())
    shown = console.export_text()
    for text in (
        "waiting for the first batch",
        "actor-0 restarting (3 restarts)",
        "my run   step 2/10",
        "0.500",
        "bound 2",
    ):
        assert text in shown
    console.file.close()


def test_a_sparkline_spans_zero_to_one() -> None:
    assert sparkline([], width=5) == ""
    assert sparkline([0.0, 0.5, 1.0], width=5) == "▁▅█"
    assert len(sparkline([0.1] * 1_000, width=60)) <= 60
    assert sparkline([-3.0, 4.0], width=5) == "▁█"
