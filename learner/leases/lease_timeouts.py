"""Time-outs of leases and actors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseTimeouts:
    """The scheduler's time-outs, in seconds.

    lease_timeout_s      the leases of an actor expire if it sends no heartbeat for this long
    straggler_timeout_s  a question whose lease has run for this long may be overtaken; None: never
    lost_after_s         a lease is treated as lost if its actor's heartbeats do not list it this long after the grant
    max_tick_s           if two ticks are further apart, the excess counts as a stall of the learner's event loop
    """

    lease_timeout_s: float
    straggler_timeout_s: float | None = None
    lost_after_s: float = 5.0
    max_tick_s: float = 1.0
