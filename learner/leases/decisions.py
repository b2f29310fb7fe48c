"""The output of the scheduler for one event: records, which the store writes in one transaction, and messages to send.

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
    """A lease was granted; `engine_version`: the lowest version that the serving engines had committed."""

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
    """A group to store. `frames`: its header and its three columns, as received."""

    kind: ClassVar[str] = "group"
    lease_id: int
    group: GroupView
    frames: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Moved:
    """A question changed its slot at learner step `step`: a straggler to a later slot, or the group that overtook it
    to an earlier one."""

    kind: ClassVar[str] = ""
    step: int
    cursor: int
    from_slot: int
    to_slot: int


@dataclass(frozen=True, slots=True)
class Placed:
    """The new state of a question; `entry` is a copy."""

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
    """`records` are written in one transaction. `sends` are sent in order after it; if it fails, none is sent."""

    records: list[Record] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
