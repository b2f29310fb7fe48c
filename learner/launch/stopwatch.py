"""Seconds by phase, kept in a file, so that a run that was stopped and resumed adds up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopwatch:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Adds what passes to `phase`, also where it is left by an error."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
            self._path.write_text(json.dumps(self.seconds) + "\n")
