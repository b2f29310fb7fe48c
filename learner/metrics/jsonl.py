"""The lines of metrics.jsonl. JSON has no NaN: a value that is not finite is written as null."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# At least the length of two lines.
_TAIL_BYTES = 1 << 18


def format_line(values: Mapping[str, float], counts: Mapping[str, Mapping[int, int]]) -> str:
    """One line, including its line end."""
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps(finite | dict(counts), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> dict[str, Any]:
    """The inverse of `format_line`; null becomes NaN."""
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}


def open_lines(path: Path) -> TextIO:
    """Opens the file to append lines to it.

    If a killed writer left an incomplete last line, it gets a line end, so that readers skip it.
    """
    lines = path.open("a", buffering=1)
    if lines.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                lines.write("\n")
    return lines


def read_line(line: bytes) -> dict[str, Any] | None:
    """None if the line is incomplete because its writer was killed."""
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
