"""How soon a run has recovered from a fault, from the times at which its steps were made. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import pairwise

# So many steps in a row, at no less than this part of the run's median rate, are full rate.
_NUM_STEPS = 5
_FULL = 0.8


def second_step_s(ended_at: float, steps: Mapping[int, float]) -> float | None:
    """From a fault's end to the second new step after it: the first may have been under way. None where there is none.

    `steps`: step → Unix time; one that was made again after a kill has its later time.
    """
    after = steps.get(_newest(ended_at, steps) + 2)
    return after - ended_at if after is not None else None


def full_rate_s(ended_at: float, steps: Mapping[int, float], *, others: float | None = None) -> float | None:
    """From a fault's end until the run makes steps at full rate again; None where the run, or the time `others` of the
    next fault, came before it."""
    first, numbers = _newest(ended_at, steps) + 1, sorted(steps)
    if len(numbers) < 2:
        return None
    slowest_s = _NUM_STEPS / _FULL * statistics.median(steps[b] - steps[a] for a, b in pairwise(numbers))
    for step in range(first, numbers[-1] - _NUM_STEPS + 1):
        begun, done = steps.get(step), steps.get(step + _NUM_STEPS)
        if begun is None or done is None or (others is not None and begun > others):
            return None
        if done - begun <= slowest_s:
            return max(0.0, begun - ended_at)
    return None


def _newest(then: float, steps: Mapping[int, float]) -> int:
    return max((step for step, time in steps.items() if time <= then), default=-1)
