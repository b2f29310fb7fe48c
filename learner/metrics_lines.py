"""The lines of metrics.jsonl: JSON has no NaN, so that what was not finite is null there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def format_line(values: Mapping[str, float], counts: Mapping[str, Mapping[int, int]]) -> str:
    """One line, with its end."""
    finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return json.dumps(finite | dict(counts), allow_nan=False) + "\n"


def parse_line(line: str | bytes) -> dict[str, Any]:
    """What `format_line` wrote; null is NaN again."""
    return {key: math.nan if value is None else value for key, value in json.loads(line).items()}
