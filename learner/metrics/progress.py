"""RUN/progress.json: what the learner does or waits for now, since when, and which trajectories failed.

The learner's `ProgressReporter` writes it; the live view prints its `progress_lines`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from learner.leases.wait_cause import RunState, wait_cause
from protocol.atomic_write import atomic_write
from protocol.failure_counts import failure_line

Phase = Literal[
    "starting",
    "retraining",
    "waiting",
    "training",
    "checkpoint",
    "publishing",
    "finishing",
    "done",
    "stopped",
    "failed",
]

ENDED = ("done", "stopped", "failed")
# A file that is older than this was written by a learner that has ended or is blocked.
OLD_AFTER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The content of progress.json.

    step      the version that the learner has trained; the next batch is the batch of this step
    since     start of the phase, seconds since the epoch
    written   when this was written, seconds since the epoch
    text      one sentence: what the learner does or waits for, and since when
    failures  reason → FAILED trajectories since the learner's start, most frequent first
    warnings  what is wrong with the run although no process has failed, one sentence each
    """

    phase: Phase
    step: int
    num_steps: int
    since: float
    written: float
    text: str
    failures: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """Raises: OSError."""
        atomic_write(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Progress | None:
        """None if the file does not exist or does not hold a progress."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**content, "warnings": tuple(content["warnings"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


def phase_text(phase: Phase, *, step: int, num_steps: int) -> str:
    """What the learner does in a phase in which it waits for no other process.

    The batch of step k takes version k to k + 1. `num_steps`: in `retraining`, the number of recorded steps.
    """
    texts: dict[Phase, str] = {
        "starting": "starting: loading model and checkpoint",
        "retraining": f"retraining recorded step {step} of {num_steps}",
        "waiting": f"waiting for the batch of step {step}",
        "training": f"training step {step}",
        "checkpoint": f"saving the checkpoint of version {step}",
        "publishing": f"publishing version {step}",
        "finishing": f"waiting for the engines to commit the last version, {step}",
        "done": f"the run has completed its last step, {step}",
        "stopped": f"the learner was stopped at step {step}",
        "failed": f"the learner ended at step {step}",
    }
    return texts[phase]


def waiting_text(state: RunState) -> str:
    """`waiting for the batch of step 12, 9 of 16 groups: oldest lease 41 s at actor-1`"""
    stored = f"{state.num_ready} of {state.groups_per_batch} groups"
    return f"{phase_text('waiting', step=state.step, num_steps=0)}, {stored}: {wait_cause(state).text}"


def step_line(values: Mapping[str, float], *, step: int, num_steps: int) -> str:
    """The learner's log line of a step. `values`: its metrics by tag."""
    failed = values["rollout/failed_fraction"]
    return (
        f"step {step} of {num_steps}: reward {values['reward/mean']:.4g}, staleness {values['staleness/mean']:.2f} "
        f"(max {values['staleness/max']:.0f}), failed {failed:.1%}, waited {values['learner/wait_s']:.1f} s, "
        f"trained {values['learner/step_s']:.1f} s"
    )


def progress_lines(progress: Progress | None, *, now: float) -> list[str]:
    """The lines that a view shows: what the learner does, what failed, warnings. `now`: seconds since the epoch."""
    if progress is None:
        return ["the learner has not started"]
    age_s = now - progress.written
    is_old = age_s > OLD_AFTER_S and progress.phase not in ENDED
    first = f"{progress.text} (reported {age_s:.0f} s ago)" if is_old else progress.text
    failed = failure_line(progress.failures)
    return [first, *([failed] if failed else []), *(f"warning: {warning}" for warning in progress.warnings)]
