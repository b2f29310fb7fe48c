"""The messages between the weight agents of engines and the publisher.

agent     → publisher   EngineReport, ManifestRequest, ChunkRequest
publisher → agent       EngineReply, Manifest, Chunk (+ 1 frame)      and Announcement on PUB/SUB
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.framing import Message
from protocol.messages import Checksum, Count, EngineFields, Id, Name

MAX_ERROR_CHARS = 1_000


class EngineReport(Message):
    """The state of an engine, sent by its weight agent every second and on each change."""

    kind: ClassVar[str] = "engine_report"
    request_id: Id
    engine: EngineFields
    state: Literal["joining", "serving", "updating", "quarantined"]
    error: Annotated[str, Field(max_length=MAX_ERROR_CHARS)] = ""
    counters: Annotated[dict[Name, float], Field(max_length=64)] = Field(default_factory=dict)


class EngineReply(Message):
    """The newest publication: the agent must install it on its engine.

    `num_other_serving`: engines besides this one that serve leases.
    """

    kind: ClassVar[str] = "engine_reply"
    request_id: Id
    run_id: Name
    publication: Annotated[int, Field(ge=-1)]
    version: Annotated[int, Field(ge=-1)]
    num_other_serving: Count = 0


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
    shape: Annotated[list[Count], Field(max_length=16)]
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
    chunk_checksums: Annotated[list[Checksum], Field(max_length=1 << 20)]


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
    tensors: Annotated[list[TensorFields], Field(max_length=1 << 16)]
    parts: Annotated[list[PartFields], Field(max_length=4_096)]
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
