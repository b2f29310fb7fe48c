"""The texts of the live view, from the metrics of steps: rows, curve, durations. Pure functions."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping

from learner.launch.step_log import StepMetrics

_BARS = "▁▂▃▄▅▆▇█"
_NUM_INTERVALS = 20
_MAX_PROCESS_NAMES = 12

States = Mapping[str, tuple[str, int]]
"""process name → (its state, restarts so far)"""


def rows(step: StepMetrics, *, bound: int) -> list[tuple[str, str]]:
    """(label, text) for each row of a training step. `bound`: the staleness bound. Absent metrics are left out."""
    labelled = [
        ("reward", _joined(_reward(step))),
        ("policy", _joined(_policy(step))),
        ("staleness", f"mean {step['staleness/mean']:.2f}, max {step['staleness/max']:.0f} (bound {bound})"),
        (
            "tokens/s",
            f"sampled {step['rollout/tokens_per_s']:,.0f}, learner {step['learner/tokens_per_s']:,.0f} "
            f"(step {step['learner/step_s']:.2f} s)",
        ),
        (
            "contexts",
            f"{step['rollout/contexts']:.2f} per trajectory, {step['rollout/context_tokens']:.0f} tokens each",
        ),
        (
            "queue",
            f"{step.get('queue/running', 0):.0f} groups running, {step.get('queue/buffered', 0):.0f} buffered, "
            f"{step.get('queue/expired', 0):.0f} leases expired",
        ),
        ("waits", _joined(_waits(step))),
    ]
    return [(label, text) for label, text in labelled if text]


def sparkline(values: list[float], *, width: int) -> str:
    """At most `width` bars on the scale 0 to max(1, largest bar). Each bar is the mean of consecutive values."""
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    top = max(1.0, *means)
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(mean / top * len(_BARS))))] for mean in means)


def remaining_s(steps: Mapping[int, StepMetrics], *, num_steps: int) -> float | None:
    """Seconds to step `num_steps` at the median pace of the last 20 steps; None before the second step.

    The median is not affected by the pause of a restart.
    """
    numbers = sorted(steps)[-_NUM_INTERVALS - 1 :]
    times = [time for number in numbers if (time := steps[number].get("time")) is not None]
    if len(times) < 2:
        return None
    pace_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
    return max(0.0, pace_s) * (num_steps - 1 - numbers[-1])


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`"""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def process_text(states: States) -> str:
    """Each state with its processes; processes that are not running, or were restarted, come first."""
    troubled = [
        f"{printable(name)} {state}" + (f" ({num_restarts} restarts)" if num_restarts else "")
        for name, (state, num_restarts) in states.items()
        if num_restarts or state != "running"
    ]
    steady = [
        printable(name) for name, (state, num_restarts) in states.items() if not num_restarts and state == "running"
    ]
    more = len(steady) - _MAX_PROCESS_NAMES
    named = ", ".join(steady[:_MAX_PROCESS_NAMES]) + (f" and {more} more" if more > 0 else "")
    return _joined([*troubled, f"running: {named}" if steady else ""], separator="; ")


def printable(text: str) -> str:
    """The text on one line, with `?` for control characters: it cannot move the cursor or change colours."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _reward(step: StepMetrics) -> list[str]:
    return [
        f"{step['reward/mean']:.3f}",
        f"EM {step['reward/em']:.3f}" if "reward/em" in step else "",
        _percent(step, "reward/zero_variance_fraction", "of groups without signal (equal rewards)"),
    ]


def _policy(step: StepMetrics) -> list[str]:
    reference = step.get("policy/kl_reference", 0.0)
    return [
        f"entropy {step['policy/entropy']:.3f}" if "policy/entropy" in step else "",
        f"KL to the sampling policy {step['policy/kl_behavior']:.1e}" if "policy/kl_behavior" in step else "",
        f"to the reference {reference:.1e}" if reference else "",
    ]


def _waits(step: StepMetrics) -> list[str]:
    total_s = step["learner/step_s"] + step["learner/publish_s"] + step["learner/wait_s"]
    free, slots = step.get("queue/slots_free", 0.0), step.get("queue/slots", 0.0)
    return [
        f"the learner waits {step['learner/wait_s'] / max(1e-9, total_s):.0%} of its time for trajectories",
        f"{free:.0f} of {slots:.0f} trajectory slots of the actors are free" if slots else "",
    ]


def _percent(step: StepMetrics, name: str, text: str) -> str:
    return f"{step[name]:.0%} {text}" if name in step else ""


def _joined(parts: list[str], *, separator: str = ", ") -> str:
    return separator.join(part for part in parts if part)
