"""Measures the seconds of each phase of a run, summed in a file over stops, kills and resumes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.atomic_write import atomic_write

log = logging.getLogger(__name__)

# A killed process loses at most this much of its phase.
_SAVE_EVERY_S = 1.0


class PhaseTimer:
    """`seconds`: phase → total seconds, loaded from `path` if it exists. At most one phase is measured at a time."""

    def __init__(self, path: Path, *, save_every_s: float = _SAVE_EVERY_S) -> None:
        self._path = path
        self._save_every_s = save_every_s
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the duration of the block to `phase`, also if it raises. While it runs, a thread saves the file."""
        before_s, started_s, ended = self.seconds.get(phase, 0.0), time.perf_counter(), threading.Event()

        def save_until_ended() -> None:
            while True:
                is_last = ended.wait(self._save_every_s)
                self.seconds[phase] = before_s + time.perf_counter() - started_s
                self._save()
                if is_last:
                    return

        saving = threading.Thread(target=save_until_ended, name="phase timer", daemon=True)
        saving.start()
        try:
            yield
        finally:
            ended.set()
            saving.join()

    def _save(self) -> None:
        try:
            atomic_write(self._path, json.dumps(self.seconds) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
