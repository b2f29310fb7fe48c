"""The phase timer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from learner.launch.phase_timer import PhaseTimer


def test_seconds_add_up_over_restarts_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    path.write_text('{"rl_s": 100.0}')
    timer = PhaseTimer(path)
    with pytest.raises(ZeroDivisionError), timer.measure("rl_s"):
        raise ZeroDivisionError
    with timer.measure("eval_s"):
        pass
    seconds = json.loads(path.read_text())
    assert seconds == timer.seconds
    assert 100.0 < seconds["rl_s"] < 101.0
    assert set(seconds) == {"rl_s", "eval_s"}


def test_a_killed_process_has_saved_its_phase(tmp_path: Path) -> None:
    """The block of the killed process never ends; the file grows at the same time."""
    path = tmp_path / "seconds.json"
    code = (
        "import sys, threading; from pathlib import Path; from learner.launch.phase_timer import PhaseTimer\n"
        f"with PhaseTimer(Path({str(path)!r}), save_every_s=0.01).measure('rl_s'): threading.Event().wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            deadline_s = time.monotonic() + 30.0
            while not path.is_file() or json.loads(path.read_text())["rl_s"] < 0.05:
                assert time.monotonic() < deadline_s
        finally:
            process.kill()
    before_s = json.loads(path.read_text())["rl_s"]
    timer = PhaseTimer(path)
    with timer.measure("rl_s"):
        pass
    assert timer.seconds["rl_s"] > before_s >= 0.05
