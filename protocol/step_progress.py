"""The progress of a process that runs once and ends, as lines in its output: `progress: 450/700 copying, loss 0.312`.

The process prints them; the launcher, which sends the output to a log file, reads the last one for its live view.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^progress: (\d{1,15})/(\d{1,15}) ([^\r\n]{0,200})$", re.MULTILINE)
# The last line is looked for in the last bytes of a log only.
_TAIL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class StepProgress:
    """`num_done` of `num_total` units are done. `text`: the unit, and what else is worth showing."""

    num_done: int
    num_total: int
    text: str

    def __str__(self) -> str:
        return f"progress: {self.num_done}/{self.num_total} {self.text}"

    @classmethod
    def last_in(cls, log: Path) -> StepProgress | None:
        """The last complete progress line near the end of a log; None if there is none or the file does not exist."""
        try:
            with log.open("rb") as lines:
                lines.seek(max(0, lines.seek(0, os.SEEK_END) - _TAIL_BYTES))
                complete = lines.read().rpartition(b"\n")[0].decode(errors="replace")
        except FileNotFoundError:
            return None
        found = _LINE.findall(complete)
        return cls(int(found[-1][0]), int(found[-1][1]), found[-1][2]) if found else None
