"""What the scheduler decides at an event: records, which the store writes in one transaction, and messages.

A record's `kind` names the fault points around the transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from learner.leases.lease_table import Entry, LeaseRecord
from protocol.framing import Buffer, Message
from protocol.group_view import GroupView

LeaseOutcome = Literal["accepted", "skipped", "duplicate", "refused", "failed", "expired", "lost"]


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease, given while the slowest serving engine had committed `engine_version`."""

    kind: ClassVar[str] = "lease"
    lease: LeaseRecord
    engine_version: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A lease has ended."""

    kind: ClassVar[str] = "end"
    lease_id: int
    outcome: LeaseOutcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A group to keep, as it came: `frames` are its header and its three columns."""

    kind: ClassVar[str] = "group"
    lease_id: int
    group: GroupView
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Moved:
    """While the learner was at `step`, a question changed its slot: up for a straggler, down for who overtook it."""

    kind: ClassVar[str] = ""
    step: int
    cursor: int
    from_slot: int
    to_slot: int


@dataclass(frozen=True, slots=True)
class Placed:
    """The state of a question, in a copy of its own."""

    kind: ClassVar[str] = ""
    entry: Entry


@dataclass(frozen=True, slots=True)
class Trained:
    """Step `step` was trained on these groups."""

    kind: ClassVar[str] = "batch"
    step: int
    cursors: tuple[int, ...]


Record = Granted | Ended | Arrived | Moved | Placed | Trained


@dataclass(frozen=True, slots=True)
class Send:
    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Decision:
    """`records` are one transaction; `sends` go out after it, in order, or not at all."""

    records: list[Record] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
