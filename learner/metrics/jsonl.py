"""Formats, parses and reads lines of metrics.jsonl. JSON has no NaN: a value that is not finite is written as null."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# `last_step` reads this much of the end of the file: more than two lines.
_TAIL_BYTES = 1 << 18


def format_line(values: Mapping[str, float], counts: Mapping[str, Mapping[int, int]]) -> str:
    """One line, with its newline."""
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps(finite | dict(counts), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> dict[str, Any]:
    """The inverse of `format_line`; null becomes NaN."""
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}


def open_lines(path: Path) -> TextIO:
    """Opens the file to append lines to it.

    If a killed writer left an incomplete last line, a newline is appended to it, so that readers skip that line.
    """
    lines = path.open("a", buffering=1)
    if lines.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                lines.write("\n")
    return lines


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
