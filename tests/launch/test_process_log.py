"""Logs of processes: their size is limited, and a full disk ends neither the process nor the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.launch.process_log import ProcessLog
from tests.store.small_disk import small_disk

WAIT_S = 30.0


def run(log: ProcessLog, code: str) -> int:
    """Runs Python code with its output in `log`; returns the exit status."""
    output = log.open_pipe()
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
    finally:
        os.close(output)
    status = process.wait(timeout=WAIT_S)
    log.wait_for_last_output()
    return status


def test_a_log_is_two_files_of_limited_size(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "actor.log", max_bytes=1 << 20)
    assert run(log, "for i in range(40_000): print(f'{i:063d}')") == 0
    old, new = tmp_path / "actor.log.1", tmp_path / "actor.log"
    assert sorted(tmp_path.iterdir()) == [new, old]
    assert old.stat().st_size <= 1 << 20
    assert new.stat().st_size <= 1 << 20
    text = (old.read_bytes() + new.read_bytes()).splitlines()
    assert text[-1] == b"%063d" % 39_999
    assert [int(line) for line in text[1:]] == list(range(int(text[1]), 40_000)), "no line is lost between the files"


def test_two_lives_of_a_process_append_to_one_log(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "actor.log")
    assert (run(log, "print('first')"), run(log, "print('second'); exit(3)")) == (0, 3)
    assert log.last_lines() == ["first", "second"]
    assert (tmp_path / "actor.log").read_text() == "first\nsecond\n"


def test_the_last_lines_are_kept_in_memory_and_bounded(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "actor.log")
    assert run(log, "for i in range(100_000): print(i)") == 0
    assert log.last_lines()[-1] == "99999"
    assert sum(map(len, log.last_lines())) < 1 << 17


def test_a_full_disk_does_not_end_the_process_and_the_gap_is_stated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", num_bytes=256 << 10) as disk:
        ballast = disk / "ballast"
        log = ProcessLog(disk / "actor.log")
        assert run(log, "for i in range(20_000): print(f'{i:063d}')") == 0
        assert log.last_lines()[-1] == f"{19_999:063d}"
        assert "cannot be written (No space left on device): its lines are dropped" in caplog.text
        (disk / "actor.log").replace(ballast)
        ballast.unlink()
        assert run(log, "print('after')") == 0
        text = (disk / "actor.log").read_text()
        assert "bytes are missing here: the disk was full]\n" in text
        assert text.endswith("after\n")
