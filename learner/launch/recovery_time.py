"""Computes how long a run took to recover from a fault, from the completion times of its steps. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise

# The run is at full rate when this many consecutive steps reach at least this fraction of its median rate.
_NUM_STEPS = 5
_FULL_RATE_FRACTION = 0.8


def second_step_s(ended_at: float, steps: Mapping[int, float]) -> float | None:
    """Returns the seconds from a fault's end to the second new step after it, or None if there is no such step.

    The second, because the first may already have been running during the fault.

    ended_at  Unix time of the fault's end
    steps     step → Unix time of its completion; of a step that was repeated after a kill, the last one
    """
    after = steps.get(_newest_step(ended_at, steps) + 2)
    return after - ended_at if after is not None else None


def full_rate_s(ended_at: float, steps: Mapping[int, float], *, next_fault_at: float | None = None) -> float | None:
    """Returns the seconds from a fault's end until the run is at full rate again.

    Full rate: _NUM_STEPS consecutive steps at _FULL_RATE_FRACTION of the run's median rate. None if the run ended or
    `next_fault_at` (Unix time) came before that.
    """
    first, numbers = _newest_step(ended_at, steps) + 1, sorted(steps)
    if len(numbers) < 2:
        return None
    slowest_s = _NUM_STEPS / _FULL_RATE_FRACTION * statistics.median(steps[b] - steps[a] for a, b in pairwise(numbers))
    for step in range(first, numbers[-1] - _NUM_STEPS + 1):
        begun, done = steps.get(step), steps.get(step + _NUM_STEPS)
        if begun is None or done is None or (next_fault_at is not None and begun > next_fault_at):
            return None
        if done - begun <= slowest_s:
            return max(0.0, begun - ended_at)
    return None


def _newest_step(at: float, steps: Mapping[int, float]) -> int:
    """The newest step that was complete at the Unix time `at`; -1 if there is none."""
    return max((step for step, time in steps.items() if time <= at), default=-1)
