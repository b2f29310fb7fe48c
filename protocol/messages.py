"""Every message that crosses a process boundary.

actor    → coordinator   Heartbeat, SubmitGroup (+ 3 column frames), Goodbye
coordinator → actor      RunStatus, Lease, SubmitReply, Drain
agent    → publisher     EngineReport, ManifestRequest, ChunkRequest
publisher → agent        EngineReply, Manifest, Chunk (+ 1 frame)      and Announcement on PUB/SUB
actor    → retriever     SearchRequest
retriever → actor        SearchReply, ErrorReply
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from protocol.framing import Message

MAX_QUESTION_CHARS = 65_536
MAX_ANSWER_CHARS = 4_096
MAX_NAME_CHARS = 128

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Id = Annotated[int, Field(ge=0, lt=1 << 62)]
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
"""As computed by `protocol.deltas.checksum`."""
Counts = Annotated[list[Count], FailFast()]
"""A column. Validation stops at the first wrong value, so a long wrong column costs little time."""


# --- actor <-> coordinator ---


class QuestionFields(BaseModel):
    """`protocol.types.Question` as it is sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: Name
    text: Annotated[str, Field(max_length=MAX_QUESTION_CHARS)]
    answers: list[Annotated[str, Field(max_length=MAX_ANSWER_CHARS)]]
    metadata: dict[Name, Annotated[str, Field(max_length=MAX_ANSWER_CHARS)]] = Field(default_factory=dict)


class Heartbeat(Message):
    """An actor's complete state, sent twice a second and on each change; a lost heartbeat does no harm.

    `capacity`: the number of groups that it can hold at once. `held`: the leases that it works on or whose group is not
    yet acknowledged. `incarnation`: random, chosen at start; a new incarnation of the same name frees the old one's
    leases.
    """

    kind: ClassVar[str] = "heartbeat"
    actor: Name
    incarnation: Name
    capacity: Count
    held: list[Id]
    counters: Annotated[dict[Name, float], Field(max_length=64)] = Field(default_factory=dict)


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
    reward_parts: dict[Name, Annotated[list[float | None], FailFast()]]
    stats: dict[Name, Annotated[list[float | None], FailFast()]]
    num_contexts: Counts
    context_lengths: Counts
    context_num_spans: Counts
    context_turns: Counts
    context_roles: Counts
    context_policies: Counts
    context_edges: Annotated[list[Literal["start", "memory_reset", "sub_agent"]], FailFast()]
    context_rewards: Annotated[list[float], FailFast()]
    role_names: list[Name]
    policy_names: list[Name]


class SubmitReply(Message):
    """`accepted`: the group is stored durably. `duplicate`: another attempt was stored first. `refused`: invalid."""

    kind: ClassVar[str] = "submit_reply"
    lease_id: Id
    outcome: Literal["accepted", "duplicate", "refused"]
    reason: str = ""


class Drain(Message):
    """The run is over or paused: the actor must stop its rollouts and leave."""

    kind: ClassVar[str] = "drain"
    reason: str = ""


# --- weights ---


class EngineReport(Message):
    """The state of an engine, sent by its weight agent every second and on each change."""

    kind: ClassVar[str] = "engine_report"
    request_id: Id
    engine: EngineFields
    state: Literal["joining", "serving", "updating", "quarantined"]
    error: str = ""
    counters: Annotated[dict[Name, float], Field(max_length=64)] = Field(default_factory=dict)


class EngineReply(Message):
    """The newest publication: the agent must install it on its engine."""

    kind: ClassVar[str] = "engine_reply"
    request_id: Id
    run_id: Name
    publication: Annotated[int, Field(ge=-1)]
    version: Annotated[int, Field(ge=-1)]


class Announcement(Message):
    """Sent on PUB/SUB when a new version can be fetched."""

    kind: ClassVar[str] = "announcement"
    run_id: Name
    publication: Count
    version: Count


class ManifestRequest(Message):
    """Asks for the parts that update publication `held` (-1: none) to `publication`."""

    kind: ClassVar[str] = "manifest_request"
    request_id: Id
    publication: Count
    held: Annotated[int, Field(ge=-1)]


class TensorFields(BaseModel):
    """One tensor of a publication: its bytes are [offset, offset + num_bytes) of the safetensors file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Annotated[str, Field(max_length=512)]
    shape: list[Count]
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"]
    offset: Id
    num_bytes: Id


class PartFields(BaseModel):
    """A delta of `num_bytes` (see `protocol.deltas`) from `base` (-1: a snapshot) to `publication`, sent in chunks.

    `checksum` is the checksum of the resulting weights, `chunk_checksums` are the checksums of the delta's chunks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    base: Annotated[int, Field(ge=-1)]
    publication: Count
    num_bytes: Id
    checksum: Checksum
    chunk_checksums: list[Checksum]


class CanaryFields(BaseModel):
    """Short prompts, and the learner's log-prob of the most likely next token of each under the published weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    prompts: Annotated[list[Annotated[list[Count], Field(min_length=1, max_length=64)]], Field(max_length=16)]
    logprobs: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=16)]

    @model_validator(mode="after")
    def _has_one_logprob_per_prompt(self) -> CanaryFields:
        if len(self.prompts) != len(self.logprobs):
            raise ValueError(f"logprobs must have {len(self.prompts)} entries, got {len(self.logprobs)}")
        return self


class Manifest(Message):
    """The tensors of a publication, and the parts that produce it, each applied to the result of the previous one."""

    kind: ClassVar[str] = "manifest"
    request_id: Id
    run_id: Name
    publication: Count
    version: Count
    num_bytes: Id
    word_bytes: Literal[2, 4]
    chunk_bytes: Annotated[int, Field(ge=1)]
    tensors: list[TensorFields]
    parts: list[PartFields]
    canary: CanaryFields | None = None


class ChunkRequest(Message):
    """Asks for one chunk of the part from `base` to `publication`."""

    kind: ClassVar[str] = "chunk_request"
    request_id: Id
    base: Annotated[int, Field(ge=-1)]
    publication: Count
    index: Count


class Chunk(Message):
    """One payload frame: at most chunk_bytes bytes of the part, from offset index * chunk_bytes."""

    kind: ClassVar[str] = "chunk"
    request_id: Id
    base: Annotated[int, Field(ge=-1)]
    publication: Count
    index: Count


# --- retrieval ---


class SearchRequest(Message):
    """Up to 256 queries to one index. `collection` names one of the service's indexes; "" selects the first."""

    kind: ClassVar[str] = "search"
    request_id: Id
    queries: Annotated[list[Annotated[str, Field(max_length=8_192)]], Field(min_length=1, max_length=256)]
    top_n: Annotated[int, Field(ge=1, le=100)]
    collection: Annotated[str, Field(max_length=128)] = ""


class PassageFields(BaseModel):
    """`protocol.types.Passage` as it is sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    id: str
    title: str
    text: str
    score: float


class SearchReply(Message):
    """The passages of each query, in the order of the queries, best passage first."""

    kind: ClassVar[str] = "search_reply"
    request_id: Id
    results: list[list[PassageFields]]


class ErrorReply(Message):
    """The request with this id failed; `request_id` is 0 if the id could not be read."""

    kind: ClassVar[str] = "error"
    request_id: Id
    error: str
