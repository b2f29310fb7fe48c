"""Decides whether and when a process that failed is restarted. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Constants of the restart rule. The defaults are those of `palimpsest up` and `palimpsest demo`."""

    max_restarts: int = 5
    """The run fails if a process fails more often than this without a new step of the run in between."""
    base_pause_s: float = 0.25
    """The pause before a restart: `base_pause_s` * 2 ** (1 + consecutive short uptimes), up to a maximum."""
    short_uptime_s: float = 10.0
    max_pause_s: float = 15.0
    max_pause_after_kill_s: float = 2.0
    """Maximum pause after SIGKILL. It is shorter, because a killed process probably has no defect."""
    reset_uptime_s: float = 600.0
    """The uptime that resets the crash-loop counter."""


@dataclass(slots=True)
class RestartState:
    """Counts the failures of one process."""

    policy: RestartPolicy
    num_failures: int = 0
    """Consecutive failures without a new step of the run between them."""
    num_short_uptimes: int = 0
    """Consecutive uptimes below `short_uptime_s`."""
    _newest_step: int = -1

    def record_failure(self, *, uptime_s: float, newest_step: int) -> None:
        """Call it after each failure. `newest_step`: the newest completed step of the run, -1 before the first."""
        if newest_step > self._newest_step or uptime_s > self.policy.reset_uptime_s:
            self.num_failures = 0
        self.num_failures += 1
        self._newest_step = max(self._newest_step, newest_step)
        self.num_short_uptimes = self.num_short_uptimes + 1 if uptime_s < self.policy.short_uptime_s else 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the process must not be restarted again."""
        return self.num_failures > self.policy.max_restarts

    def pause_s(self, *, was_killed: bool) -> float:
        """The pause before the next restart. `was_killed`: the process ended by SIGKILL."""
        longest_s = self.policy.max_pause_after_kill_s if was_killed else self.policy.max_pause_s
        return min(longest_s, self.policy.base_pause_s * 2 ** (self.num_short_uptimes + 1))
