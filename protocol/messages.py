"""The messages between actors and the coordinator, and the field types that all messages share.

actor       → coordinator   Heartbeat, SubmitGroup (+ 3 column frames), Goodbye
coordinator → actor         RunStatus, Lease, SubmitReply, Drain

The other messages are in `protocol.weight_messages` and `protocol.search_messages`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from protocol.failure_counts import MAX_REASON_CHARS, MAX_SENT_REASONS
from protocol.framing import Message
from protocol.identity_differences import MAX_SECTION_CHARS

MAX_QUESTION_CHARS = 65_536
MAX_ANSWER_CHARS = 4_096
MAX_NAME_CHARS = 128
MAX_SECTIONS = 64
MAX_HELD = 65_536
MAX_PARTS = 256

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Id = Annotated[int, Field(ge=0, lt=1 << 62)]
SectionText = Annotated[str, Field(max_length=MAX_SECTION_CHARS)]
"""One section of a run's identity (`protocol.run_identity`)."""
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""As computed by `protocol.deltas.checksum`."""
Reason = Annotated[str, Field(min_length=1, max_length=MAX_REASON_CHARS)]
"""Why a trajectory failed, as `protocol.failure_counts.clean_reason` returns it."""
Counts = Annotated[list[Count], FailFast()]
"""A column. Validation stops at the first wrong value, so a long wrong column costs little time."""


class QuestionFields(BaseModel):
    """`protocol.types.Question` as it is sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: Name
    text: Annotated[str, Field(max_length=MAX_QUESTION_CHARS)]
    answers: list[Annotated[str, Field(max_length=MAX_ANSWER_CHARS)]]
    metadata: dict[Name, Annotated[str, Field(max_length=MAX_ANSWER_CHARS)]] = Field(default_factory=dict)


class Heartbeat(Message):
    """An actor's complete state, sent twice a second and on each change; a lost heartbeat does no harm.

    `capacity`: its trajectory slots in total. `free_slots`: the slots that no trajectory of the leases in `held` uses
    or waits for. `held`: the leases that it works on or whose group is not yet acknowledged. `draining`: it takes no
    new lease; leases that are not in `held` may be issued again at once. `incarnation`: random, chosen at start; a new
    incarnation of the same name frees the old one's leases. `failures`: FAILED trajectories by reason since the
    actor's start; the rarest are one entry. `identity`: of the run that it works for (`protocol.run_identity`).
    """

    kind: ClassVar[str] = "heartbeat"
    actor: Name
    incarnation: Name
    capacity: Count
    free_slots: Count
    held: Annotated[list[Id], Field(max_length=MAX_HELD), FailFast()]
    draining: bool = False
    counters: Annotated[dict[Name, float], Field(max_length=64)] = Field(default_factory=dict)
    failures: Annotated[dict[Reason, Count], Field(max_length=MAX_SENT_REASONS)] = Field(default_factory=dict)
    identity: Annotated[dict[Name, SectionText], Field(max_length=MAX_SECTIONS)] = Field(default_factory=dict)


class Goodbye(Message):
    """The actor leaves the run; its leases are freed."""

    kind: ClassVar[str] = "goodbye"
    actor: Name
    incarnation: Name


class EngineFields(BaseModel):
    """An engine: its address, and the version and publication that it has committed (-1: none yet)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Name
    url: Annotated[str, Field(max_length=512)]
    version: Annotated[int, Field(ge=-1)]
    publication: Annotated[int, Field(ge=-1)]


class RunStatus(Message):
    """The coordinator's reply to a heartbeat: the run, its step, and the engines that actors may use."""

    kind: ClassVar[str] = "status"
    run_id: Name
    step: Count
    num_steps: Count
    engines: list[EngineFields]


class Lease(Message):
    """Permission to answer the question at `cursor` `group_size` times.

    `lease_id` is never reused. `min_version`: a group with tokens of an older version will be refused.
    """

    kind: ClassVar[str] = "lease"
    lease_id: Id
    run_id: Name
    cursor: Id
    attempt: Count
    group_size: Annotated[int, Field(ge=1, le=4096)]
    min_version: Count


class SubmitGroup(Message):
    """A group's header: columns over trajectories [G] and over contexts [sum K]; three payload frames hold the tokens.

    Payload (little-endian, contexts concatenated): token_ids int32 [T]; spans int32 [S, 4] of (start, end, version,
    publication), positions within the span's context; behavior_logprobs float32 [N] of the N tokens that spans cover.
    """

    kind: ClassVar[str] = "group"
    lease_id: Id
    run_id: Name
    cursor: Id
    attempt: Count
    question: QuestionFields
    rewards: Annotated[list[float], FailFast()]
    statuses: Annotated[list[Literal["completed", "format_error", "over_budget", "failed"]], FailFast()]
    answers: Annotated[list[str], FailFast()]
    reward_parts: Annotated[dict[Name, Annotated[list[float | None], FailFast()]], Field(max_length=MAX_PARTS)]
    stats: Annotated[dict[Name, Annotated[list[float | None], FailFast()]], Field(max_length=MAX_PARTS)]
    num_contexts: Counts
    context_lengths: Counts
    context_num_spans: Counts
    context_turns: Counts
    context_roles: Counts
    context_policies: Counts
    context_edges: Annotated[list[Literal["start", "memory_reset", "sub_agent"]], FailFast()]
    context_rewards: Annotated[list[float], FailFast()]
    role_names: Annotated[list[Name], Field(max_length=MAX_PARTS)]
    policy_names: Annotated[list[Name], Field(max_length=MAX_PARTS)]


class SubmitReply(Message):
    """`accepted`: the group is stored durably. `duplicate`: another attempt was stored first. `refused`: invalid."""

    kind: ClassVar[str] = "submit_reply"
    lease_id: Id
    outcome: Literal["accepted", "duplicate", "refused"]
    reason: str = ""


class Drain(Message):
    """The run is over or paused: the actor must stop its rollouts and leave.

    `refused`: the actor must not work for this run, because its identity differs; `reason` names the keys.
    """

    kind: ClassVar[str] = "drain"
    reason: str = ""
    refused: bool = False
