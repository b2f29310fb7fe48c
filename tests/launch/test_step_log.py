"""metrics.jsonl read while it is written, also after its writer was killed."""

from __future__ import annotations

from pathlib import Path

from learner.launch.step_log import StepLog
from learner.metrics.jsonl import LineWriter, last_step
from tests.launch.metrics_lines import metrics_line


def test_only_complete_lines_are_read_and_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = StepLog(path)
    steps.refresh()
    assert steps.last is None
    with path.open("w", buffering=1) as file:
        file.write(metrics_line(0, 0.1) + "\n" + metrics_line(1, 0.2)[:20])
        file.flush()
        steps.refresh()
        assert sorted(steps.by_step) == [0]
        file.write(metrics_line(1, 0.2)[20:] + "\n" + metrics_line(1, 0.7) + "\n")
        file.flush()
        steps.refresh()
        assert sorted(steps.by_step) == [0, 1]
        assert steps.by_step[1]["reward/mean"] == 0.7


def test_a_partial_line_of_a_killed_learner_is_skipped(tmp_path: Path) -> None:
    """The next learner starts a new line, and readers skip the partial one."""
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == -1
    path.write_text(metrics_line(0, 0.1) + "\n" + metrics_line(1, 0.2)[:20])
    assert last_step(path) == 0
    LineWriter(path).append(metrics_line(1, 0.3) + "\n")
    LineWriter(path).append(metrics_line(2, 0.4) + "\n")
    steps = StepLog(path)
    steps.refresh()
    assert sorted(steps.by_step) == [0, 1, 2]
    assert last_step(path) == 2
