"""The lines of metrics.jsonl: JSON has no NaN, so that what was not finite is null there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Longer than two lines.
_TAIL_BYTES = 1 << 18


def format_line(values: Mapping[str, float], counts: Mapping[str, Mapping[int, int]]) -> str:
    """One line, with its end."""
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps(finite | dict(counts), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> dict[str, Any]:
    """What `format_line` wrote; null is NaN again."""
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}


def last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 where there is none."""
    if not path.is_file():
        return -1
    with path.open("rb") as lines:
        lines.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        whole = lines.read().rpartition(b"\n")[0]
    return int(parse_line(whole.rpartition(b"\n")[2])["step"]) if whole else -1
