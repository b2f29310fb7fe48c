"""The supervisor with real processes: restarts, failures, and that no process or file remains."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.launch.process_plan import ProcessSpec
from learner.launch.restart_policy import RestartPolicy
from learner.launch.supervisor import RunFailed, Supervisor
from learner.store.run_folder import RunFolder
from protocol.errors import DataError, TrainingStopped, UserError

WAIT_S = 30.0
SLEEP = "import time; time.sleep(600)"
AT_ONCE = RestartPolicy(base_pause_s=0.0, patience_s=0.0)
MAX_RESTARTS = AT_ONCE.max_restarts


def python(name: str, code: str) -> ProcessSpec:
    return ProcessSpec(name, name.partition("-")[0], (sys.executable, "-c", code))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (the condition depends on other processes)
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """False for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(run_dir: Path) -> dict[str, int]:
    try:
        return json.loads((run_dir / "processes.json").read_text())
    except FileNotFoundError:
        return {}


async def test_a_killed_process_is_restarted(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("role", SLEEP), python("other", SLEEP)])
        first = pids(tmp_path)
        os.kill(first["role"], signal.SIGKILL)
        await until(lambda: pids(tmp_path).get("role") not in (None, first["role"]))
        assert pids(tmp_path)["other"] == first["other"]
        assert supervisor.states() == {"role": ("running", 1), "other": ("running", 0)}
        last = pids(tmp_path)
    assert not any(alive(pid) for pid in [*first.values(), *last.values()])
    assert not (tmp_path / "processes.json").exists()


async def test_wait_returns_when_the_process_exits_with_status_0(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    code = f"import pathlib, sys; p = pathlib.Path({str(flag)!r}); e = p.exists(); p.touch(); sys.exit(0 if e else 7)"
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("learner", code), python("engine", SLEEP)])
        await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
        assert supervisor.states() == {"learner": ("done", 1), "engine": ("running", 0)}
        assert list(pids(tmp_path)) == ["engine"]


async def test_a_user_error_stops_the_run_with_its_message(tmp_path: Path) -> None:
    code = (
        "import sys; print('a log line', file=sys.stderr); print('error: no such model', file=sys.stderr); sys.exit(2)"
    )
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("learner", SLEEP), python("engine-0", code)])
        running = pids(tmp_path)["learner"]
        with pytest.raises(UserError, match=r"^engine-0: no such model$"):
            await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
    assert not alive(running)


async def test_too_many_restarts_fail_the_run_with_the_log(tmp_path: Path) -> None:
    code = "import sys; print('trouble'); sys.exit(4)"
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("learner", SLEEP), python("actor-0", code)])
        with pytest.raises(RunFailed, match=r"(?s)actor-0 ended \(exit status 4\); .*actor-0.log ends:\n.*trouble"):
            await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
        assert supervisor.states()["actor-0"][1] == MAX_RESTARTS
    assert supervisor.log_path("actor-0").read_text().count("trouble") == MAX_RESTARTS + 1


async def test_a_new_step_between_failures_resets_the_failure_count(tmp_path: Path) -> None:
    """The process fails after each step, more often than `max_restarts`, and exits with status 0 at the end."""
    metrics = RunFolder(tmp_path).metrics
    code = (
        f"import pathlib, sys; metrics = pathlib.Path({str(metrics)!r})\n"
        "step = len(metrics.read_text().splitlines()) if metrics.exists() else 0\n"
        f"if step == {MAX_RESTARTS + 2}: sys.exit(0)\n"
        "with metrics.open('a') as lines: lines.write(f'{{\"step\": {step}}}\\n')\n"
        "sys.exit(4)"
    )
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("learner", code)])
        await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
        assert supervisor.states()["learner"] == ("done", MAX_RESTARTS + 2)


async def test_pauses_double_with_each_short_uptime(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pause_s = 0.001
    code = "import sys; sys.exit(4)"
    async with Supervisor(tmp_path, restart_policy=RestartPolicy(base_pause_s=pause_s)) as supervisor:
        await supervisor.start([python("learner", code)])
        with pytest.raises(RunFailed):
            await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
    pauses = [record.args[2] for record in caplog.records if isinstance(record.args, tuple)]
    assert pauses == [pause_s * 2**i for i in range(2, 7)]


async def test_a_learner_whose_training_cannot_continue_is_not_restarted(tmp_path: Path) -> None:
    """Also if it was restarted before for another reason."""
    flag = tmp_path / "flag"
    code = (
        f"import os, pathlib, sys; flag = pathlib.Path({str(flag)!r})\n"
        "if not flag.exists(): flag.touch(); os.kill(os.getpid(), 9)\n"
        "print('error: they drift'); sys.exit(3)"
    )
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("learner", code)])
        with pytest.raises(TrainingStopped, match=r"^learner: they drift$"):
            await asyncio.wait_for(supervisor.wait("learner"), WAIT_S)
        assert supervisor.states()["learner"][1] == 1


async def test_run_raises_the_error_of_the_process(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.run(python("good", "pass"))
        with pytest.raises(RunFailed, match=r"(?s)bad ended \(exit status 1\).*ZeroDivisionError"):
            await supervisor.run(python("bad", "1 / 0"))
        with pytest.raises(RunFailed, match="killed by SIGKILL"):
            await supervisor.run(python("shot", "import os; os.kill(os.getpid(), 9)"))
        with pytest.raises(UserError, match=r"^bad: no such file$"):
            await supervisor.run(
                python("bad", "import sys; print('error: no such file', file=sys.stderr); sys.exit(2)")
            )


async def test_run_ends_when_another_process_stops_the_run(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        step = asyncio.create_task(supervisor.run(python("step", SLEEP)))
        await until(lambda: "step" in pids(tmp_path))
        pid = pids(tmp_path)["step"]
        await supervisor.start([python("role", "import sys; sys.exit(2)")])
        with pytest.raises(UserError, match=r"^role: see .*role\.log$"):
            await asyncio.wait_for(step, WAIT_S)
    assert not alive(pid)


async def test_a_process_that_ignores_sigterm_is_killed_after_the_time_out(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); {SLEEP}"
    async with Supervisor(tmp_path, stop_timeout_s=0.2) as supervisor:
        await supervisor.start([python("role", code)])
        await until(lambda: "ready" in supervisor.log_path("role").read_text())
        pid = pids(tmp_path)["role"]
    assert not alive(pid)


async def test_no_process_remains_after_an_error_in_the_block(tmp_path: Path) -> None:
    found: dict[str, int] = {}

    async def launch() -> None:
        async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
            await supervisor.start([python("a", SLEEP), python("b", SLEEP)])
            found.update(pids(tmp_path))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await launch()
    assert len(found) == 2
    assert not any(alive(pid) for pid in found.values())


async def test_no_process_remains_after_cancellation(tmp_path: Path) -> None:
    async def launch() -> None:
        async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
            await supervisor.start([python("a", SLEEP)])
            await supervisor.run(python("b", SLEEP))

    launching = asyncio.create_task(launch())
    await until(lambda: len(pids(tmp_path)) == 2)
    found = pids(tmp_path)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(launching, WAIT_S)
    assert not any(alive(pid) for pid in found.values())


async def test_temporary_files_of_a_killed_process_are_removed_at_the_end(tmp_path: Path) -> None:
    """A killed engine cannot remove its folder of weights, so the launcher removes it."""
    code = f"import tempfile; print(tempfile.mkdtemp(), flush=True); {SLEEP}"
    async with Supervisor(tmp_path, restart_policy=AT_ONCE) as supervisor:
        await supervisor.start([python("engine", code)])
        await until(lambda: "\n" in supervisor.log_path("engine").read_text())
        folder = Path(supervisor.log_path("engine").read_text().strip())
        assert folder.is_dir()
        os.kill(pids(tmp_path)["engine"], signal.SIGKILL)
    assert not folder.exists()


_LAUNCHER = """
import asyncio, sys
from pathlib import Path
from learner.launch.process_plan import ProcessSpec
from learner.launch.supervisor import Supervisor

async def main():
    role = "from protocol.role_startup import start_role; start_role('role'); print('up', flush=True); " + sys.argv[2]
    async with Supervisor(Path(sys.argv[1])) as supervisor:
        await supervisor.start([ProcessSpec("role", "step", (sys.executable, "-c", role))])
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_roles_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", _LAUNCHER, str(tmp_path), SLEEP])  # noqa: ASYNC220
    try:
        log = tmp_path / "logs" / "role.log"
        await until(lambda: log.is_file() and "up" in log.read_text())
        pid = pids(tmp_path)["role"]
        assert alive(pid)
    finally:
        launcher.kill()
        launcher.wait()
    await until(lambda: not alive(pid))


async def test_a_stopped_role_also_ends_when_the_launcher_is_killed(tmp_path: Path) -> None:
    """SIGTERM would not reach a stopped process."""
    launcher = subprocess.Popen([sys.executable, "-c", _LAUNCHER, str(tmp_path), SLEEP])  # noqa: ASYNC220
    try:
        log = tmp_path / "logs" / "role.log"
        await until(lambda: log.is_file() and "up" in log.read_text())
        pid = pids(tmp_path)["role"]
        os.kill(pid, signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.wait()
    await until(lambda: not alive(pid))


def holder_code(lock: Path, *, launcher_pid: str) -> str:
    """Holds the lock as a learner does that is not ended with its launcher."""
    return (
        f"import os, time; os.environ.update(PALIMPSEST_LAUNCHER_PID={launcher_pid!r})\n"
        f"if not {launcher_pid!r}: del os.environ['PALIMPSEST_LAUNCHER_PID']\n"
        "from pathlib import Path; from learner.store.folder_lock import locked\n"
        f"with locked(Path({str(lock)!r}), what='a learner'): print('locked', flush=True); time.sleep(600)"
    )


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_an_orphaned_learner_is_ended_by_the_next_launcher(
    tmp_path: Path, is_stopped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lock = RunFolder(tmp_path).learner_lock
    code = holder_code(lock, launcher_pid="1")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as orphan:  # noqa: ASYNC220
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == b"locked\n"
        if is_stopped:
            os.kill(orphan.pid, signal.SIGSTOP)
        async with Supervisor(tmp_path):
            assert orphan.wait(timeout=WAIT_S) == -signal.SIGKILL
    assert f"ended a learner (pid {orphan.pid} on host " in caplog.text


async def test_a_learner_that_a_user_started_is_named_and_not_ended(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path).learner_lock
    code = holder_code(lock, launcher_pid="")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:  # noqa: ASYNC220
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"locked\n"
            with pytest.raises(
                DataError, match=rf"a learner \(pid {running.pid} on host \S+\) still runs in .*kill -9"
            ):
                async with Supervisor(tmp_path):
                    pass
            assert running.poll() is None
            assert sorted(path.name for path in tmp_path.iterdir()) == ["launcher.lock", "learner.lock"]
        finally:
            running.kill()


def test_a_role_whose_launcher_has_ended_exits_at_start() -> None:
    code = "from protocol.role_startup import start_role; start_role('role'); print('never')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PALIMPSEST_LAUNCHER_PID": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stdout) == (143, "")
