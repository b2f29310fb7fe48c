"""What the lease table holds: questions (`Entry`) and the attempts at them (`LeaseRecord`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    RUNNING = "running"
    WAITING = "waiting"
    """The last attempt expired, failed or was refused; the question will be issued again."""
    BUFFERED = "buffered"
    TRAINED = "trained"
    SKIPPED = "skipped"


@dataclass(slots=True)
class Entry:
    """A question. `slot`: the slot in which it is trained (-1 if skipped). `first_slot`: the slot of its first lease.

    The two differ only if the question was overtaken or has overtaken another one.
    """

    cursor: int
    slot: int
    attempt: int
    state: State
    first_slot: int


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """One attempt at a question, leased to one actor. `granted_s`: seconds since the epoch."""

    lease_id: int
    cursor: int
    slot: int
    attempt: int
    actor: str
    granted_s: float
