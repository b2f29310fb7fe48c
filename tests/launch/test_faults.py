"""Tiny runs of real processes in which one process dies at a fault point: the run completes and loses no group."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from learner.store.audit import audit_run
from protocol import fault_injection as faults
from tests.launch.running import RUN_TIMEOUT_S, launched, pids, steps, until
from tests.launch.tiny_run import make_tiny_run

NUM_STEPS = 4
BATCH_SIZE = 2
# Prefixes of fault points that a run passes once, or only in its last steps.
ONCE = ("store.claim", "store.end", "store.retention", "run.finished")
QUICK = {"store.group.durable"}


def all_slow_except(quick: set[str]) -> list[object]:
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in faults.FAULT_POINTS]


@pytest.mark.parametrize("name", all_slow_except(QUICK))
def test_a_run_completes_without_losses_when_a_process_dies(tmp_path: Path, name: str) -> None:
    run = make_tiny_run(tmp_path)
    log = tmp_path / "up.log"
    count = 1 if name.startswith(ONCE) else 2
    wanted = ("--set", f"learner.num_steps={NUM_STEPS}", "--set", "learner.retention.keep_steps=0")
    with launched("up", run.config, *wanted, log=log, environment={faults.VARIABLE: f"{name}:{count}"}) as process:
        if name.startswith("store.end"):  # a lease ends without a group when its actor is lost
            until(lambda: steps(run.run_dir) >= 1, process, log)
            os.kill(pids(run.run_dir)["actor-0"], signal.SIGKILL)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    role = faults.FAULT_POINTS[name].partition(":")[0]
    assert re.search(rf"^{role}\S* ended \(killed by SIGKILL\)", log.read_text(), re.MULTILINE), log.read_text()
    audit = audit_run(run.run_dir)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_trained, audit.num_groups_lost) == (NUM_STEPS, NUM_STEPS * BATCH_SIZE, 0)
    assert steps(run.run_dir) == NUM_STEPS
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == [f"step-{NUM_STEPS:08d}"]


def reach(fault: str, *points: str) -> tuple[int, str]:
    """Returns (exit status, stderr) of a process that passes the fault points `points` in order."""
    code = f"from protocol.fault_injection import fault_point\nfor name in {points!r}: fault_point(name)"
    environment = {**os.environ, faults.VARIABLE: fault}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_process_is_killed_at_the_nth_pass_of_its_fault_point() -> None:
    assert reach("actor.sent:2", "actor.sent", "actor.finished")[0] == 0
    assert reach("actor.sent:2", "actor.sent", "actor.finished", "actor.sent")[0] == -signal.SIGKILL
    assert reach("", "actor.sent")[0] == 0


@pytest.mark.parametrize("fault", ["actor.sent", "actor.sent:0", "actor.sent:-1", "actor.sent:x", "nowhere:1"])
def test_an_invalid_fault_is_refused(fault: str) -> None:
    status, stderr = reach(fault, "actor.sent")
    assert status == 1
    assert f"PALIMPSEST_FAULT must be name:count with a count >= 1, got '{fault}'" in stderr


def test_every_fault_point_is_in_the_code_once() -> None:
    """A transaction has a fault point before its commit and one after."""
    root = Path(faults.__file__).parents[1]
    code = "".join(path.read_text() for folder in ("actor", "learner") for path in (root / folder).rglob("*.py"))
    named = re.findall(r'fault_point\("([a-z.]+)"\)', code)
    transactions = re.findall(r'self\.transaction\("([a-z]+)"\)|kind: ClassVar\[str\] = "([a-z]+)"', code)
    transactions = [transaction or record for transaction, record in transactions]
    named += [f"store.{name}.{when}" for name in transactions for when in ("open", "durable")]
    assert sorted(named) == sorted(faults.FAULT_POINTS)
