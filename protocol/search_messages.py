"""The messages between clients and the retriever.

client    → retriever   SearchRequest
retriever → client      SearchReply, ErrorReply
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from protocol.framing import Message
from protocol.messages import Id


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
