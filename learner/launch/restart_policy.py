"""Decides whether and when a process that failed is restarted, and when the run fails. Pure.

    a process ends ─► RestartState.record_failure ─► decide ─┬─ "stop": its error stops the run
                                                             └─ "restart" after pause_s

                        failures are counted since            the run stops if
    learner             the run's newest step                 they exceed max_restarts
    any other role      the run's newest step                 every process of the role exceeds max_restarts and
                                                              has failed for patience_s

The uptime is no progress: a learner that dies after each hour without a step stops the run. A process other than the
learner is restarted as long as the run can continue without it: others of its role work, or the learner is busy with a
long step. Its pauses grow.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

USER_ERROR_STATUS = 2
TRAINING_STOPPED_STATUS = 3


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Constants of the restart rule. The defaults are those of `palimpsest up` and `palimpsest demo`."""

    max_restarts: int = 5
    """Restarts without a new step of the run in between."""
    patience_s: float = 120.0
    """Shortest time from the first of such failures after which a role other than the learner may stop the run."""
    base_pause_s: float = 0.25
    """The pause before a restart: `base_pause_s` * 2 ** (1 + consecutive short uptimes), up to a maximum."""
    short_uptime_s: float = 10.0
    max_pause_s: float = 15.0
    max_pause_after_kill_s: float = 2.0
    """Maximum pause after SIGKILL. It is shorter, because a killed process probably has no defect."""


@dataclass(slots=True)
class RestartState:
    """Counts the failures of one process. Times: seconds of any monotonic clock."""

    policy: RestartPolicy
    role: str
    num_failures: int = 0
    """Consecutive failures without a new step of the run between them."""
    num_short_uptimes: int = 0
    """Consecutive uptimes below `short_uptime_s`."""
    num_user_errors: int = 0
    """Consecutive failures with the status of a user error."""
    num_ends: int = 0
    first_failure_s: float = 0.0
    """Time of the first of `num_failures`."""
    _newest_step: int = -1

    def record_failure(self, *, status: int, uptime_s: float, newest_step: int, now_s: float) -> None:
        """Call it after each failure. `newest_step`: the newest completed step of the run, -1 before the first."""
        if newest_step > self._newest_step:
            self.num_failures = 0
        if self.num_failures == 0:
            self.first_failure_s = now_s
        self.num_failures += 1
        self.num_ends += 1
        self._newest_step = max(self._newest_step, newest_step)
        self.num_short_uptimes = self.num_short_uptimes + 1 if uptime_s < self.policy.short_uptime_s else 0
        self.num_user_errors = self.num_user_errors + 1 if status == USER_ERROR_STATUS else 0

    def is_exhausted(self, *, newest_step: int, now_s: float) -> bool:
        """Whether this process has failed too often, and long enough, without a new step of the run."""
        if newest_step > self._newest_step or self.num_failures <= self.policy.max_restarts:
            return False
        return self.role == "learner" or now_s - self.first_failure_s >= self.policy.patience_s

    def pause_s(self, *, was_killed: bool) -> float:
        """The pause before the next restart. `was_killed`: the process ended by SIGKILL."""
        longest_s = self.policy.max_pause_after_kill_s if was_killed else self.policy.max_pause_s
        return min(longest_s, self.policy.base_pause_s * 2 ** (self.num_short_uptimes + 1))


def decide(
    state: RestartState, *, status: int, others: Collection[RestartState], newest_step: int, now_s: float
) -> Literal["restart", "stop"]:
    """Whether the process is restarted after the failure that `state` recorded last, or its error stops the run.

    A user error (exit status 2) is not restarted. Only if it comes after a restart, it is tried once more, because its
    cause may be what the killed process left: a port or a lock that is released a moment later.

    others: states of the other processes of its role
    """
    if status == TRAINING_STOPPED_STATUS:
        return "stop"
    if status == USER_ERROR_STATUS and (state.num_ends == 1 or state.num_user_errors > 1):
        return "stop"
    exhausted = all(each.is_exhausted(newest_step=newest_step, now_s=now_s) for each in (state, *others))
    return "stop" if exhausted else "restart"
