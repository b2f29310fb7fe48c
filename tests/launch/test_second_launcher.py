"""Launchers that cannot run or are stopped (real processes): a second `up`, repeated Ctrl-C, a read-only folder."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

from learner.store.folder_lock import read_holder
from tests.launch.running import RUN_TIMEOUT_S, launched, pids, until
from tests.launch.tiny_run import make_tiny_run
from tests.store.small_disk import small_disk


def content(folder: Path) -> dict[str, bytes]:
    names = ("config.json", "processes.json", "launcher.lock", "learner.lock")
    return {name: (folder / name).read_bytes() for name in names}


def test_a_second_up_changes_nothing_in_the_folder_of_a_running_run(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    log, second_log = tmp_path / "up.log", tmp_path / "second.log"
    with launched("up", run.config, "--set", "learner.num_steps=1000", log=log) as first:
        until(lambda: len(pids(run.run_dir)) == 4, first, log)
        until(lambda: read_holder(run.run_dir / "learner.lock") is not None, first, log)
        before = content(run.run_dir)
        with launched("up", run.config, "--set", "learner.num_steps=1000", log=second_log) as second:
            assert second.wait(timeout=RUN_TIMEOUT_S) == 2, second_log.read_text()
        assert content(run.run_dir) == before
        assert first.poll() is None
        first.terminate()
        assert first.wait(timeout=RUN_TIMEOUT_S) == 130, log.read_text()
    text = second_log.read_text()
    assert f"error: a launcher is already running in {run.run_dir} (pid {first.pid} on host " in text
    assert "Traceback" not in text


def test_ctrl_c_again_and_again_prints_no_traceback(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    log = tmp_path / "up.log"
    with launched("up", run.config, "--set", "learner.num_steps=1000", log=log) as process:
        until(lambda: len(pids(run.run_dir)) == 4, process, log)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.002)
        assert process.returncode == 130
    assert "up: stopped; the same command resumes the run" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    with small_disk(tmp_path / "disk", num_bytes=1 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        log = tmp_path / "up.log"
        with launched("up", run.config, "--set", f"run.dir={disk}/run", log=log) as process:
            assert process.wait(timeout=RUN_TIMEOUT_S) == 2
    assert "Traceback" not in log.read_text()
    assert "Read-only file system" in log.read_text()
