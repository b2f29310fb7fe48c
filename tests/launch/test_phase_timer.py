"""The phase timer."""

from __future__ import annotations

import json
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
