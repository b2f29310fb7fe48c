"""A second `up` in the folder of a running run is refused before it changes anything (real launchers)."""

from __future__ import annotations

from pathlib import Path

from learner.store.folder_lock import read_holder
from tests.launch.running import RUN_TIMEOUT_S, launched, pids, until
from tests.launch.tiny_run import make_tiny_run


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
