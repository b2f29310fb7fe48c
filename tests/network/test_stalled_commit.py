"""libzmq does not abort the learner while a commit stalls and peers with many unread messages disappear (B3)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("stall_s", [12.0])  # two intervals of a ZMTP heartbeat, which was 5 s
def test_a_learner_whose_commit_stalls_survives_peers_that_send_300_messages_and_die(
    tmp_path: Path, stall_s: float
) -> None:
    command = [sys.executable, "-m", "tests.network.stalled_learner", str(tmp_path), str(stall_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("survived\n")
