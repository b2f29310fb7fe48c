"""Resident memory (RSS) of a process."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def resident_mb(pid: int | str = "self") -> float:
    """Returns the resident memory of a process in megabytes (1e6 bytes).

    Without /proc (not Linux) it returns the peak so far, and of this process only, whatever `pid` is.
    Raises: FileNotFoundError if /proc has no such process.
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
