"""How long leases and actors may take. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseTimeouts:
    """Durations of the scheduler, in seconds.

    lease_timeout_s      an actor that sends no heartbeat for this long loses its leases
    straggler_timeout_s  a lease that has run for this long may be overtaken; None: never
    lost_after_s         a lease that its actor's heartbeats do not name after this long was lost on the way
    max_tick_s           a longer time between two ticks is time that the learner's event loop stalled
    """

    lease_timeout_s: float
    straggler_timeout_s: float | None = None
    lost_after_s: float = 5.0
    max_tick_s: float = 1.0
