"""Starts a launcher as a separate process and reads its run's folder while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RUN_TIMEOUT_S = 420.0


@contextmanager
def launched(
    *arguments: str | Path, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `palimpsest ARGUMENTS` in a new session, so that a signal reaches only the launcher."""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "learner.launch", *map(str, arguments)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Polls `condition`, which reads the run's folder. Fails if the launcher ends or RUN_TIMEOUT_S passes before."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.02)


def steps(run_dir: Path) -> int:
    """The number of different steps in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return len({json.loads(line)["step"] for line in path.read_text().splitlines()}) if path.is_file() else 0


def pids(run_dir: Path) -> dict[str, int]:
    """Process name → pid of the processes that the launcher runs."""
    try:
        return json.loads((run_dir / "processes.json").read_text())
    except FileNotFoundError:
        return {}
