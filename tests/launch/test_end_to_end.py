"""Whole runs of real processes: a tiny run, and a demo that is interrupted and whose processes are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from learner.metrics.catalogue import CATALOGUE, undeclared
from learner.store.audit import audit_run
from tests.launch.running import RUN_TIMEOUT_S, launched, pids, steps, until
from tests.launch.tiny_run import make_tiny_run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ports(run_dir: Path) -> list[int]:
    config = json.loads((run_dir / "config.json").read_text())
    network = config["network"]
    named = [network[f"{name}_port"] for name in ("control", "weights", "announce")]
    return [*named, config["retriever"]["port"], *config["engine"]["ports"]]


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def assert_nothing_left(run_dir: Path, processes: dict[str, int]) -> None:
    assert not any(alive(pid) for pid in processes.values())
    assert all(can_bind(port) for port in ports(run_dir))
    assert not (run_dir / "tmp").exists()
    assert not (run_dir / "processes.json").exists()


def assert_metrics_are_declared(run_dir: Path) -> None:
    """The last line of metrics.jsonl has every declared metric that a run always reports, and no undeclared one.

    If no trajectory of the step has a signal, no token is computed, and all means over computed tokens are absent.
    """
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    tags = row.keys() - {"time", "step", "tokens_by_age", "tokens_by_context"}
    assert undeclared(tags) == set()
    always = {each for each in CATALOGUE if not each.is_family and each.section not in ("learner", "trajectories")}
    means = {each.name for each in always if each.section == "policy"}
    absent = means if row["learner/skipped_tokens"] == 1 else set()
    assert {each.name for each in always} - tags == {"staleness/histogram"} | absent


def test_a_tiny_run_of_all_roles_completes(tmp_path: Path) -> None:
    """Two steps of an untrained model; retriever, engine, actor and learner are processes on real sockets."""
    run = make_tiny_run(tmp_path)
    log = tmp_path / "up.log"
    with launched("up", run.config, log=log) as process:
        until(lambda: len(pids(run.run_dir)) == 4, process, log)
        processes = pids(run.run_dir)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    assert_nothing_left(run.run_dir, processes)
    assert "up: tiny has completed its last step, 2" in log.read_text()
    audit = audit_run(run.run_dir)
    assert audit.problems == ()
    assert (audit.num_steps, audit.num_trained, audit.num_trajectories_trained) == (2, 4, 8)
    assert (audit.num_groups_lost, audit.num_publications) == (0, 3)
    assert audit.staleness_max <= 1
    assert audit.num_tokens_trained > 0
    assert steps(run.run_dir) == 2
    assert_metrics_are_declared(run.run_dir)
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_two_ranks_with_learning_rate_0_agree_with_the_engine(tmp_path: Path) -> None:
    """If the weights that two ranks publish differed from the trained ones, the mismatch would not be flat."""
    run = make_tiny_run(tmp_path)
    log = tmp_path / "up.log"
    with launched("up", run.config, "--check-drift", "--set", "learner.ranks=2", log=log) as process:
        until(lambda: len(pids(run.run_dir)) == 4, process, log)
        processes = pids(run.run_dir)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    assert_nothing_left(run.run_dir, processes)
    assert re.search(r"mismatch KL, nats per token: \S+ in the first third of steps", log.read_text())
    assert audit_run(run.run_dir).problems == ()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["learner/learning_rate"] == 0.0 for row in rows)
    assert all(row["learner/skipped_tokens"] == 0 for row in rows), "the check needs every trained token"
    assert max(row["policy/kl_behavior"] for row in rows) < 1e-6
    assert_metrics_are_declared(run.run_dir)


def demo(run_dir: Path) -> tuple[str | Path, ...]:
    sizes = ("--steps", "6", "--eval-questions", "32", "--seed", "0", "--quiet")
    return ("demo", *sizes, "--run-dir", run_dir)


@pytest.fixture(scope="module")
def interrupted_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that was interrupted after two steps; no process, port or temporary file remains."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    log = run_dir.parent / "demo.log"
    before = set(Path("/tmp").glob("palimpsest-*"))
    with launched(*demo(run_dir), log=log) as process:
        until(lambda: steps(run_dir) >= 2, process, log)
        processes = pids(run_dir)
        assert set(processes) >= {"retriever", "learner", "engine-0", "actor-0", "actor-1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    assert_nothing_left(run_dir, processes)
    assert set(Path("/tmp").glob("palimpsest-*")) <= before
    assert not (run_dir / "report.json").exists()
    return run_dir


@pytest.mark.slow
def test_an_interrupted_demo_completes_although_processes_are_killed(interrupted_demo: Path) -> None:
    """Resumed after Ctrl-C, the demo completes although an actor, the engine and the learner are killed."""
    run_dir, log = interrupted_demo, interrupted_demo.parent / "demo.log"
    audit = audit_run(run_dir)
    assert audit.problems == ()
    already = steps(run_dir)
    victims = ["actor-0", "engine-0", "learner"]
    with launched(*demo(run_dir), log=log) as process:
        for i, victim in enumerate(victims):
            until(lambda i=i: steps(run_dir) >= min(5, already + i), process, log)
            until(lambda victim=victim: victim in pids(run_dir), process, log)
            pid = pids(run_dir)[victim]
            os.kill(pid, signal.SIGKILL)
            until(lambda victim=victim, pid=pid: pids(run_dir).get(victim) not in (None, pid), process, log)
        processes = pids(run_dir)
        assert process.wait(timeout=RUN_TIMEOUT_S) == 0, log.read_text()
    assert_nothing_left(run_dir, processes)
    report = json.loads((run_dir / "report.json").read_text())
    assert report["num_steps"] == 6
    assert report["num_groups_trained"] == 6 * 16
    assert report["num_groups_lost"] == 0
    assert report["audit_problems"] == []
    assert report["num_eval_questions"] == 32
    assert 0 <= report["staleness_max"] <= report["staleness_bound"]
    audit = audit_run(run_dir)
    assert audit.problems == ()
    assert audit.num_steps == 6
