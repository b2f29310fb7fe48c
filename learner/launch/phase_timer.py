"""Measures the seconds of each phase of a run, summed in a file over stops and resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.atomic_write import atomic_write


class PhaseTimer:
    """`seconds`: phase → total seconds, loaded from `path` if it exists."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the duration of the block to `phase` and saves the file, also if the block raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            atomic_write(self._path, json.dumps(self.seconds) + "\n")
