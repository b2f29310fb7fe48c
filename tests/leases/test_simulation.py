"""Under every fault: no acknowledged group is lost, none is trained twice or over age, and there is no deadlock."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.leases.simulation import Shape, World

FAULTS = (
    "message lost",
    "message duplicated",
    "actor killed",
    "actor drained",
    "actor cut off",
    "engine killed",
    "engine stuck",
    "learner killed",
    "learner killed between answers",
    "learner killed between log and checkpoint",
    "learner killed between checkpoint and retention",
    "learner killed at a commit",
    "lease undelivered",
    "disk full",
    "refused",
    "duplicate",
    "zero variance",
)


def simulate(folder: Path, *, seed: int, shape: Shape, num_events: int) -> World:
    world = World(folder, seed=seed, shape=shape)
    world.run(num_events)
    world.check()
    return world


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    groups_per_batch=st.integers(1, 5),
    staleness_bound=st.integers(0, 3),
    chaos=st.sampled_from([0.0, 1.0, 3.0]),
    flat=st.sampled_from([0.0, 0.1, 0.8]),
    straggler_timeout_s=st.sampled_from([None, 3.0]),
)
def test_a_run_reaches_its_last_step(
    seed: int,
    groups_per_batch: int,
    staleness_bound: int,
    chaos: float,
    flat: float,
    straggler_timeout_s: float | None,
) -> None:
    """Also if most groups have zero variance, and in synchronous mode."""
    shape = Shape(
        groups_per_batch=groups_per_batch,
        staleness_bound=staleness_bound,
        num_steps=12,
        chaos=chaos,
        flat=flat,
        straggler_timeout_s=straggler_timeout_s,
    )
    with tempfile.TemporaryDirectory() as folder:
        world = simulate(Path(folder), seed=seed, shape=shape, num_events=100_000)
    assert world.seen["steps"] == 12
    if straggler_timeout_s is None:
        assert world.seen["tokens masked"] == 0


def test_a_hundred_thousand_events(tmp_path: Path) -> None:
    """Every fault occurs. Stragglers are overtaken; their over-age tokens, which are rare, are masked."""
    world = simulate(tmp_path, seed=1, shape=Shape(straggler_timeout_s=15.0), num_events=100_000)
    assert [fault for fault in FAULTS if not world.seen[fault]] == []
    assert world.seen["steps"] > 300
    assert 0 < world.seen["tokens masked"] < 0.05 * world.seen["tokens trained"]


@pytest.mark.slow
@pytest.mark.parametrize("straggler_timeout_s", [None, 15.0])
def test_a_million_events(tmp_path: Path, straggler_timeout_s: float | None) -> None:
    shape = Shape(straggler_timeout_s=straggler_timeout_s)
    world = simulate(tmp_path, seed=2, shape=shape, num_events=1_000_000)
    assert [fault for fault in FAULTS if not world.seen[fault]] == []
    if straggler_timeout_s is None:
        assert world.seen["tokens masked"] == 0
