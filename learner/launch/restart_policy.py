"""Decides whether and when a process that failed is restarted. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The limits of `RestartState`. The defaults are those of `palimpsest up` and `palimpsest demo`."""

    max_restarts: int = 5
    """A process that fails once more than this while the run completes no step fails the run."""
    base_pause_s: float = 0.25
    """The pause before a restart is this, doubled once, and once more for each short uptime in a row."""
    short_uptime_s: float = 10.0
    max_pause_s: float = 15.0
    max_pause_after_kill_s: float = 2.0
    """After SIGKILL: the process itself is probably sound, so an early restart probably works."""
    reset_uptime_s: float = 600.0
    """The uptime that resets the crash-loop counter."""


@dataclass(slots=True)
class RestartState:
    """The failures of one process so far."""

    policy: RestartPolicy
    num_failures: int = 0
    """Consecutive failures without a new step of the run between them."""
    num_short_uptimes: int = 0
    """Consecutive uptimes below `short_uptime_s`."""
    _newest_step: int = -1

    def record_failure(self, *, uptime_s: float, newest_step: int) -> None:
        """`newest_step` is the newest step that the run has completed, -1 before the first."""
        if newest_step > self._newest_step or uptime_s > self.policy.reset_uptime_s:
            self.num_failures = 0
        self.num_failures += 1
        self._newest_step = max(self._newest_step, newest_step)
        self.num_short_uptimes = self.num_short_uptimes + 1 if uptime_s < self.policy.short_uptime_s else 0

    @property
    def is_exhausted(self) -> bool:
        return self.num_failures > self.policy.max_restarts

    def pause_s(self, *, was_killed: bool) -> float:
        """The pause before the next restart. `was_killed`: the process ended by SIGKILL."""
        longest_s = self.policy.max_pause_after_kill_s if was_killed else self.policy.max_pause_s
        return min(longest_s, self.policy.base_pause_s * 2 ** (self.num_short_uptimes + 1))
