"""The output of the scheduler for one event: records, which the store writes in one transaction, and messages to send.

A transaction has the fault points `store.KIND.open` and `store.KIND.durable` for the `kind` of each of its records;
records with an empty `kind` add none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from learner.leases.entries import Entry, LeaseRecord
from protocol.framing import Buffer, Message
from protocol.group_view import GroupView

# The reason of expired leases that count as failures of their questions (`received_groups.MAX_FAILURES`).
ACTOR_DIED = "its actor died"

LeaseOutcome = Literal["accepted", "skipped", "duplicate", "refused", "failed", "expired", "lost", "returned"]


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease was granted. `engine_version`: s of the lease rule (lease_table.py)."""

    kind: ClassVar[str] = "lease"
    lease: LeaseRecord
    engine_version: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A lease has ended. "returned": its actor gave it back, by Goodbye or while it drains."""

    kind: ClassVar[str] = "end"
    lease_id: int
    outcome: LeaseOutcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GroupReceived:
    """A group was accepted or skipped, and must be stored. `frames`: its header and three columns, as received."""

    kind: ClassVar[str] = "group"
    lease_id: int
    group: GroupView
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class SlotChanged:
    """A question changed its slot at learner step `step`. A straggler moves to a later slot, the group that
    overtakes it to an earlier one."""

    kind: ClassVar[str] = ""
    step: int
    cursor: int
    from_slot: int
    to_slot: int


@dataclass(frozen=True, slots=True)
class EntryChanged:
    """A question was created or changed. `entry`: a copy of its new entry."""

    kind: ClassVar[str] = ""
    entry: Entry


@dataclass(frozen=True, slots=True)
class Trained:
    """Step `step` was trained on these groups."""

    kind: ClassVar[str] = "batch"
    step: int
    cursors: tuple[int, ...]


Record = Granted | Ended | GroupReceived | SlotChanged | EntryChanged | Trained


@dataclass(frozen=True, slots=True)
class Send:
    """A message to send. `peer`: the ROUTER identity of its receiver."""

    peer: bytes
    message: Message


@dataclass(frozen=True, slots=True)
class Decision:
    """`records` are written in one transaction. `sends` are sent in order after it; if it fails, none is sent."""

    records: list[Record] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
