"""Faults on purpose: what is drawn, what is done to a process, and a run that goes on under it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from learner.launch.chaos import KINDS, Chaos, draw
from learner.launch.inflict import can_cut, inflict
from learner.launch.recovery import full_rate_s, second_step_s
from learner.launch.supervisor import MAX_RESTARTS
from learner.store.audit import audit_run
from learner.store.folder_lock import locked
from learner.store.run_folder import RunFolder
from tests.launch.running import RUN_TIMEOUT_S, launched, steps, until
from tests.launch.tiny_run import make_tiny_run

WAIT_S = 20.0
SLEEPS = "import time; time.sleep(600)"


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[object]:
        rng = random.Random(seed)
        return [draw(rng, kinds=KINDS, processes=["actor-0", "learner"], every_s=5.0) for _ in range(200)]

    faults = [draw(random.Random(i), kinds=KINDS, processes=["actor-0", "learner"], every_s=5.0) for i in range(400)]
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.role for fault in faults} == {"actor", "learner"}
    assert all(0 <= fault.pause_s <= 15.0 for fault in faults)
    assert 4.0 < sum(fault.pause_s for fault in faults) / len(faults) < 6.0
    assert all((fault.for_s == 0) == (fault.kind == "kill") for fault in faults)


def test_recovery_is_the_second_new_step_after_a_fault() -> None:
    assert second_step_s(10.0, {0: 9.0, 1: 11.0, 2: 12.5, 3: 14.0}) == 2.5
    assert second_step_s(12.0, {0: 9.0, 1: 11.0, 2: 12.5}) is None
    assert second_step_s(10.0, {0: 9.0, 1: 13.0, 2: 14.0}) == 4.0, "step 1 was made again, after the fault"


def test_full_rate_is_five_steps_in_a_row_at_nearly_the_runs_rate() -> None:
    times = [*range(10), 15.0, 18.0, *(19.0 + i for i in range(8))]
    steps = dict(enumerate(map(float, times)))
    assert full_rate_s(9.5, steps) == 8.5, "steps 10 and 11 are late, from then on it is one a second"
    assert full_rate_s(5.0, steps) == 14.0 - 1.0
    assert full_rate_s(2.0, steps) == 1.0
    assert full_rate_s(9.5, steps, others=17.0) is None
    assert full_rate_s(24.0, steps) is None
    assert full_rate_s(0.0, {0: 1.0}) is None


async def test_kill() -> None:
    with process(SLEEPS) as victim:
        assert await inflict("kill", victim.pid, for_s=0.0)
        assert victim.wait(timeout=WAIT_S) == -signal.SIGKILL
        assert not await inflict("kill", victim.pid, for_s=0.0)
        assert not await inflict("stop", victim.pid, for_s=0.1)
        assert not await inflict("cut", victim.pid, for_s=0.1)


async def test_a_stopped_process_runs_again_however_the_stop_ends() -> None:
    with process(SLEEPS) as victim:
        assert await inflict("stop", victim.pid, for_s=0.05)
        assert not is_stopped(victim.pid)
        stopping = asyncio.create_task(inflict("stop", victim.pid, for_s=600.0))
        async with asyncio.timeout(WAIT_S):
            while not is_stopped(victim.pid):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.001)
        stopping.cancel()
        await asyncio.wait([stopping])
        assert not is_stopped(victim.pid)


async def test_a_slowed_process_is_stopped_most_of_the_time() -> None:
    with process(SLEEPS) as victim:
        slowing = asyncio.create_task(inflict("slow", victim.pid, for_s=1.0))
        samples = []
        while not slowing.done():
            await asyncio.sleep(0.003)
            samples.append(is_stopped(victim.pid))
        assert 0.6 < sum(samples) / len(samples) < 1.0
        assert not is_stopped(victim.pid)


async def test_cut_breaks_connections_and_those_made_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        port = server.getsockname()[1]
        connect = f"socket.create_connection(('127.0.0.1', {port})).recv(1)"
        with process(f"import socket, time\nwhile True:\n    {connect}\n    time.sleep(0.01)") as victim:
            first, _ = await asyncio.to_thread(server.accept)
            if not can_cut(victim.pid):
                pytest.skip("needs the permission to trace")
            cutting = asyncio.create_task(inflict("cut", victim.pid, for_s=600.0))
            for connection in (first, (await asyncio.to_thread(server.accept))[0]):
                connection.settimeout(WAIT_S)
                assert await asyncio.to_thread(connection.recv, 1) == b""
                connection.close()
            cutting.cancel()
            await asyncio.wait([cutting])
            assert victim.poll() is None


def test_whom_chaos_hits(tmp_path: Path) -> None:
    """Processes that are started again, of the roles wanted; never so often that the launcher gives the run up."""
    running = dict.fromkeys(("learner", "actor-0", "actor-12", "engine-0", "sglang-0", "eval-before-greedy"), 1)
    (tmp_path / "processes.json").write_text(json.dumps(running))
    with locked(RunFolder(tmp_path).launcher_lock, what="a launcher"):
        chaos = Chaos(tmp_path, seed=0, kinds=KINDS, roles=("actor", "learner"), every_s=1.0)
    assert set(chaos._processes()) == {"learner", "actor-0", "actor-12"}
    RunFolder(tmp_path).metrics.write_text('{"step": 3, "time": 1.0}\n{"step": 4, "time": 2.0}\n')
    chaos._killed_at = [("learner", 4)] * (MAX_RESTARTS - 1) + [("actor-0", 3)] * MAX_RESTARTS
    chaos._busy = {"actor-12"}
    assert [name for name in running if chaos._may_hit(name)] == [
        "actor-0",
        "engine-0",
        "sglang-0",
        "eval-before-greedy",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_goes_on_under_chaos(tmp_path: Path, seed: int) -> None:
    num_steps = 60
    run = make_tiny_run(tmp_path)
    log, said = tmp_path / "up.log", tmp_path / "chaos.log"
    with launched("up", run.config, "--set", f"learner.num_steps={num_steps}", log=log) as process:
        until(lambda: steps(run.run_dir) >= 1, process, log)
        options = ("--seed", str(seed), "--faults", "8", "--every", "2")
        with launched("chaos", run.run_dir, *options, log=said) as chaos:
            assert chaos.wait(timeout=RUN_TIMEOUT_S) == 0, said.read_text() + log.read_text()[-4000:]
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    assert "audit: clean" in said.read_text()
    faults = json.loads((run.run_dir / "chaos.json").read_text())
    assert len(faults) >= 4
    audit = audit_run(run.run_dir)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_groups_lost) == (num_steps, 0)
    assert steps(run.run_dir) == num_steps
