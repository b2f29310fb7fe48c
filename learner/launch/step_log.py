"""Reads RUN/metrics.jsonl incrementally while the learner writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from learner.metrics.jsonl import read_line

StepMetrics = Mapping[str, float]
"""metric name → value, of one step"""


class StepLog:
    """The steps in a metrics.jsonl. If a step was written twice, the later line is used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_bytes = 0
        self.by_step: dict[int, StepMetrics] = {}

    def refresh(self) -> None:
        """Reads the complete lines that were added since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as lines:
            lines.seek(self._offset_bytes)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._offset_bytes += len(line)
                if (step := read_line(line)) is not None:
                    self.by_step[int(step["step"])] = step

    @property
    def last(self) -> StepMetrics | None:
        return self.by_step[max(self.by_step)] if self.by_step else None
