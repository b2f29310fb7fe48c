"""`palimpsest chaos`: the draws, the faults on a process, the recovery times, and a run under faults."""

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

from learner.launch.fault_actions import can_cut, inject_fault
from learner.launch.fault_draw import KILLS, KINDS, Fault, draw, eligible_processes
from learner.launch.recovery_time import full_rate_s, second_step_s
from learner.launch.restart_policy import RestartPolicy
from learner.store.audit import audit_run
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


def test_draws_depend_only_on_the_seed() -> None:
    def drawn(seed: int) -> list[Fault]:
        rng = random.Random(seed)
        found = [draw(rng, kinds=KINDS, processes=["actor-0", "learner"], every_s=5.0) for _ in range(400)]
        return [fault for fault in found if fault is not None]

    faults = drawn(0)
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.role for fault in faults} == {"actor", "learner"}
    assert all(0 <= fault.pause_s <= 15.0 for fault in faults)
    assert 4.0 < sum(fault.pause_s for fault in faults) / len(faults) < 6.0
    assert all((fault.for_s == 0) == (fault.kind in KILLS) for fault in faults)
    assert {fault.role for fault in faults if fault.kind in ("full", "damage", "clock", "flood")} == {"learner"}
    assert {fault.role for fault in faults if fault.kind == "drain"} == {"actor"}
    assert draw(random.Random(0), kinds=["drain"], processes=["learner"], every_s=5.0) is None


def test_recovery_is_the_second_new_step_after_a_fault() -> None:
    assert second_step_s(10.0, {0: 9.0, 1: 11.0, 2: 12.5, 3: 14.0}) == 2.5
    assert second_step_s(12.0, {0: 9.0, 1: 11.0, 2: 12.5}) is None
    assert second_step_s(10.0, {0: 9.0, 1: 13.0, 2: 14.0}) == 4.0, "step 1 was repeated after the fault"


def test_full_rate_is_five_consecutive_steps_near_the_median_rate() -> None:
    times = [*range(10), 15.0, 18.0, *(19.0 + i for i in range(8))]
    steps = dict(enumerate(map(float, times)))
    assert full_rate_s(9.5, steps) == 8.5, "steps 10 and 11 are late; after them there is one per second"
    assert full_rate_s(5.0, steps) == 14.0 - 1.0
    assert full_rate_s(2.0, steps) == 1.0
    assert full_rate_s(9.5, steps, next_fault_at=17.0) is None
    assert full_rate_s(24.0, steps) is None
    assert full_rate_s(0.0, {0: 1.0}) is None


async def test_kill_ends_the_process_and_later_faults_return_false() -> None:
    with process(SLEEPS) as victim:
        assert await inject_fault("kill", victim.pid, for_s=0.0)
        assert victim.wait(timeout=WAIT_S) == -signal.SIGKILL
        assert not await inject_fault("kill", victim.pid, for_s=0.0)
        assert not await inject_fault("stop", victim.pid, for_s=0.1)
        assert not await inject_fault("cut", victim.pid, for_s=0.1)


async def test_a_stopped_process_is_continued_also_after_cancellation() -> None:
    with process(SLEEPS) as victim:
        assert await inject_fault("stop", victim.pid, for_s=0.05)
        assert not is_stopped(victim.pid)
        stopping = asyncio.create_task(inject_fault("stop", victim.pid, for_s=600.0))
        async with asyncio.timeout(WAIT_S):
            while not is_stopped(victim.pid):  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.001)
        stopping.cancel()
        await asyncio.wait([stopping])
        assert not is_stopped(victim.pid)


async def test_a_slowed_process_is_stopped_for_nine_tenths_of_each_cycle() -> None:
    num_sleeps = 6
    cycle: list[tuple[bool, float]] = []
    done = asyncio.Event()

    async def record(seconds: float) -> None:
        """Replaces the sleep of `seconds`: waits until the process has changed its state."""
        expected = not cycle[-1][0] if cycle else True
        while is_stopped(victim.pid) != expected:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0)
        cycle.append((expected, seconds))
        if len(cycle) == num_sleeps:
            done.set()
            await asyncio.Event().wait()

    with process(SLEEPS) as victim:
        slowing = asyncio.create_task(inject_fault("slow", victim.pid, for_s=600.0, sleep=record))
        await asyncio.wait_for(done.wait(), WAIT_S)
        slowing.cancel()
        await asyncio.wait([slowing])
        assert not is_stopped(victim.pid)
    stopped_s = sum(seconds for stopped, seconds in cycle if stopped)
    assert stopped_s / sum(seconds for _, seconds in cycle) == pytest.approx(0.9)


async def test_cut_also_breaks_new_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        port = server.getsockname()[1]
        connect = f"socket.create_connection(('127.0.0.1', {port})).recv(1)"
        with process(f"import socket, time\nwhile True:\n    {connect}\n    time.sleep(0.01)") as victim:
            first, _ = await asyncio.to_thread(server.accept)
            if not can_cut(victim.pid):
                pytest.skip("needs the permission to trace processes")
            cutting = asyncio.create_task(inject_fault("cut", victim.pid, for_s=600.0))
            for connection in (first, (await asyncio.to_thread(server.accept))[0]):
                connection.settimeout(WAIT_S)
                assert await asyncio.to_thread(connection.recv, 1) == b""
                connection.close()
            cutting.cancel()
            await asyncio.wait([cutting])
            assert victim.poll() is None


def test_eligible_processes_are_restartable_idle_and_not_near_the_restart_limit() -> None:
    """Eligible: restarted by the launcher, of a chosen role, and not one kill away from the restart limit."""
    names = ("learner", "actor-0", "actor-12", "engine-0", "sglang-0", "eval-before-greedy")
    running: dict[str, int] = dict.fromkeys(names, 1)
    roles, max_restarts = ("actor", "learner"), RestartPolicy().max_restarts
    assert eligible_processes(running, roles=roles) == ["actor-0", "actor-12", "learner"]
    assert eligible_processes(running, roles=roles, disturbed={"actor-12"}) == ["actor-0", "learner"]
    kills = [("learner", 4)] * (max_restarts - 1) + [("actor-0", 3)] * max_restarts + [("actor-0", 4)]
    assert eligible_processes(running, roles=roles, kills=kills, newest_step=4) == ["actor-0", "actor-12"]
    assert eligible_processes(running, roles=()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_completes_under_chaos(tmp_path: Path, seed: int) -> None:
    num_steps = 60
    run = make_tiny_run(tmp_path)
    log, chaos_log = tmp_path / "up.log", tmp_path / "chaos.log"
    with launched("up", run.config, "--set", f"learner.num_steps={num_steps}", log=log) as process:
        until(lambda: steps(run.run_dir) >= 1, process, log)
        options = ("--seed", str(seed), "--num-faults", "8", "--every", "2")
        with launched("chaos", run.run_dir, *options, log=chaos_log) as chaos:
            assert chaos.wait(timeout=RUN_TIMEOUT_S) == 0, chaos_log.read_text() + log.read_text()[-4000:]
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    assert "audit: clean" in chaos_log.read_text()
    faults = json.loads((run.run_dir / "chaos.json").read_text())
    assert len(faults) >= 4
    audit = audit_run(run.run_dir)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_groups_lost) == (num_steps, 0)
    assert steps(run.run_dir) == num_steps
