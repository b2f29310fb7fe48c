"""A flood from one process without keys: the learner's memory is bounded, and an honest actor is still served."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import flood
from tests.network.peers import WAIT_S

MAX_GROWTH_MB = 100.0
# Messages of each kind that the test sends: more than the limits of unread bytes and the tokens of a peer allow.
NUM_MESSAGES = {"small": 50_000, "reconnect": 50_000, "large": 1_000, "deaf": 50_000, "half": 8_000}

pytestmark = pytest.mark.slow


@contextmanager
def served_learner(folder: Path) -> Iterator[flood.Stage]:
    """A learner whose main thread computes, and an honest actor that is served, in separate processes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    learner = context.Process(target=flood.learn, args=(theirs, str(folder), True), daemon=True)
    learner.start()
    try:
        assert ours.poll(WAIT_S)
        address, num_done = ours.recv(), context.Value("q", 0)
        actor = context.Process(target=flood.act, args=(address, num_done), daemon=True)
        actor.start()
        try:
            stage = flood.Stage(address, ours, num_done, context, seconds=1.0)
            stage.until_served(20, timeout_s=WAIT_S)
            yield stage
        finally:
            actor.kill()
            actor.join()
    finally:
        learner.kill()
        learner.join()


@pytest.mark.parametrize("kind", NUM_MESSAGES)
def test_memory_is_bounded_and_an_honest_actor_is_served(tmp_path: Path, kind: str) -> None:
    with served_learner(tmp_path) as stage, stage.hostile(kind) as hostile:
        start_mb, _ = stage.memory()
        hostile.running.set()
        deadline_s = time.monotonic() + 3 * WAIT_S
        while hostile.num_sent.value < NUM_MESSAGES[kind]:
            assert time.monotonic() < deadline_s, f"sent {hostile.num_sent.value}"
            stage.until_served(5, timeout_s=WAIT_S)
        _, peak_mb = stage.memory()
        assert peak_mb - start_mb < MAX_GROWTH_MB
        hostile.running.clear()
        stage.until_served(20, timeout_s=WAIT_S)
