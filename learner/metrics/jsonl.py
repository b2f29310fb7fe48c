"""Formats, parses and reads lines of metrics.jsonl. JSON has no NaN: a value that is not finite is written as null."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# `last_step` reads this much of the end of the file: more than two lines.
_TAIL_BYTES = 1 << 18
MAX_PENDING_LINES = 10_000


def format_line(values: Mapping[str, float], counts: Mapping[str, Mapping[int, int]]) -> str:
    """One line, with its newline."""
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps(finite | dict(counts), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> dict[str, Any]:
    """The inverse of `format_line`; null becomes NaN."""
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}


class LineWriter:
    """Appends lines to the file `path`. Lines that the disk has no room for are kept, and written when there is room.

    At most MAX_PENDING_LINES are kept; then the oldest are dropped. An incomplete last line, of a killed writer or of a
    full disk, is ended by a newline, so that readers skip it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING_LINES)
        self._is_failing = False

    def append(self, line: str) -> None:
        """Writes the kept lines and this one. Never raises OSError."""
        self._pending.append(line.encode())
        self.flush()

    def flush(self) -> None:
        """Tries to write the kept lines."""
        try:
            with self._path.open("a+b", buffering=0) as file:
                is_torn = bool(file.tell()) and _last_byte(file) != b"\n"
                while self._pending:
                    data = b"\n" * is_torn + self._pending[0]
                    is_torn = file.write(data) < len(data)
                    if not is_torn:
                        self._pending.popleft()
        except OSError as error:
            if not self._is_failing:
                log.warning("%s cannot be written: %s; its lines are kept until there is room", self._path, error)
            self._is_failing = True
        else:
            self._is_failing = False


def _last_byte(file: FileIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read_line(line: bytes) -> dict[str, Any] | None:
    """Parses a line. Returns None if it is incomplete because its writer was killed."""
    try:
        return parse_line(line)
    except ValueError:
        return None


def last_step(path: Path) -> int:
    """The step of the last complete line of metrics.jsonl; -1 if there is none."""
    if not path.is_file():
        return -1
    with path.open("rb") as lines:
        lines.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        *complete, _ = lines.read().split(b"\n")
    return next((int(step["step"]) for line in reversed(complete) if (step := read_line(line)) is not None), -1)
